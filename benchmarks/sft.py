"""Supervised tokens a second and peak memory of one training step, against trl's SFTTrainer with packing.

    python benchmarks/sft.py --data_dir ../shared/data      # about 40 minutes
    python benchmarks/sft.py --precision fp32               # else in fp32 and, where the CPU has it, in bf16, which `auto` takes there
    python benchmarks/sft.py --profile True                 # where the time of our steps goes, with the cores' own rate in matrix products

Both train the same random LLaMA (12 layers, 512 wide, vocabulary 8,192), LoRA with r = 8 on all linear layers or
all weights, on the same records, once each, with the same optimizer, in processes of their own that take turns. The
records are the first that fit max_length, so that neither side cuts any. Time is that of the training loop alone.
"""
import contextlib
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.report import add, pairwise
from estimate_memory import has_bf16
from utils import Chat, cli, make_blocks, numbered_records, tokenize_records

ROWS = {  # name: file, max_length, records, LoRA or all weights
    "LoRA, long dialogues, 2,048": ("dialogue/sharegpt_zh_1K.jsonl", 2048, 20, True),
    "LoRA, short records, 1,024": ("sft/alpaca_zh_demo.json", 1024, 60, True),
    "full, long dialogues, 2,048": ("dialogue/sharegpt_zh_1K.jsonl", 2048, 15, False),
    "full, short records, 1,024": ("sft/alpaca_zh_demo.json", 1024, 40, False),
    "pretraining, paragraphs, 1,024": ("text/三国演义.txt", 1024, 45, False),
}


def main(
    *,
    data_dir: str = "../shared/data",
    peer: str = "trl",
    repeats: int = 3,
    threads: int = 2,
    side: Literal["both", "ours", "theirs"] = "both",
    row: str = "",
    only: str = "",
    precision: Literal["all", "fp32", "bf16"] = "all",
    profile: bool = False,
):
    """Print a table of supervised tokens a second and peak memory, ours and theirs.

    Args:
        data_dir: Folder with the data; see its README for what it is.
        peer: Package to compare with.
        repeats: Runs of each side, taking turns; the table has their medians and spread.
        threads: Of the CPU.
        side: Which side this process runs; both starts a process for each run.
        row: Which row of the table this process runs.
        only: Part of the names of the rows to run; else all.
        precision: Arithmetic of both sides; all is fp32, and bf16 where the CPU has it. In bf16 LoRA has its base in 16 bit; all weights are trained in fp32
            under autocast.
        profile: Print the share and rate of matrix products in our steps instead.
    """
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if side != "both":
        return print(json.dumps((ours if side == "ours" else theirs)(*prepare(Path(data_dir), row), precision)))
    if profile:
        return print_profile(Path(data_dir), [name for name in ROWS if only in name], threads, "bf16" if precision == "bf16" else "fp32")
    precisions = ["fp32"] + ["bf16"] * has_bf16() if precision == "all" else [precision]
    print(f"| records, max_length | side | supervised tokens/s | spread | peak memory | real tokens | ours / {peer} |\n|---|---|---|---|---|---|---|")
    for precision, name in itertools.product(precisions, [name for name in ROWS if only in name]):
        results = {"ours": [], "theirs": []}
        for _ in range(repeats):
            for who in results:
                command = [sys.executable, __file__, "--side", who, "--row", name, "--data_dir", data_dir, "--threads", str(threads),
                           "--precision", precision]
                results[who].append(json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout.splitlines()[-1]))
        speed = {who: [run["supervised_tokens"] / run["seconds"] for run in runs] for who, runs in results.items()}
        for who, runs in results.items():
            ratio = statistics.median(pairwise(speed["ours"], speed["theirs"]))
            memory = statistics.median(run["peak_memory_bytes"] for run in runs)
            print(f"| {name}, {precision} | {who if who == 'ours' else peer} | {statistics.median(speed[who]):.0f} | {min(speed[who]):.0f} to {max(speed[who]):.0f} "
                  f"| {memory / 1e9:.2f} GB | {runs[0]['real']:.1%} | {f'{ratio:.2f}' if who == 'ours' else ''} |", flush=True)
        add(f"{name}, {precision}", "supervised tokens/s", speed["ours"], peer, speed["theirs"])
        mine, other = ([run["peak_memory_bytes"] / 1e9 for run in runs] for runs in results.values())
        add(f"{name}, {precision}", "peak memory, GB", mine, peer, other)


def prepare(data_dir: Path, row: str):
    """(Chat, rows that fit, max_length, lora): a byte-level BPE of 8,192 trained on the row's own file, as ChatML."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    file, max_length, count, lora = ROWS[row]
    documents = "line" if file.endswith(".txt") else None
    records = [record["messages"] for _, record in numbered_records(str(data_dir / file), skip_bad_records=True, document_separator=documents)]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.train_from_iterator((m["content"] for messages in records for m in messages), trainers.BpeTrainer(
        vocab_size=8190, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<|end|>"], show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", pad_token="<|end|>")
    chat = Chat(tokenizer, "plain" if documents else "chatml")
    fitting = (messages for messages in records if sum(len(ids) for ids, _ in chat.encode(messages)) <= max_length)
    rows = [{"text": messages[-1]["content"]} if documents else {"messages": messages} for messages in itertools.islice(fitting, count)]
    return chat, rows, max_length, lora


def random_llama(attention: str, dtype: str = "float32"):
    """A LLaMA of random weights, the same for both sides."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM._from_config(LlamaConfig(
        vocab_size=8192, hidden_size=512, intermediate_size=1408, num_hidden_layers=12, num_attention_heads=8, num_key_value_heads=8,
        max_position_embeddings=4096), attn_implementation=attention).to(getattr(torch, dtype))


LOOP = dict(num_train_epochs=1, learning_rate=1e-4, lr_scheduler_type="constant", per_device_train_batch_size=1, gradient_accumulation_steps=1,
            save_strategy="no", logging_steps=1000, report_to="none", use_cpu=True, disable_tqdm=True)


def base_dtype(lora: bool, precision: str) -> str:
    """In what the weights are held: frozen ones as they are computed with, trained ones in fp32."""
    return "bfloat16" if lora and precision == "bf16" else "float32"


def peak_memory() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def lora_config():
    from peft import LoraConfig

    return LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear")


def ours(chat, rows, max_length, lora, precision, around=None) -> dict:
    import tempfile
    from types import MethodType

    import torch
    from peft import get_peft_model
    from transformers import TrainingArguments

    from finetune_lora import choose_attention, collate, make_trainer, speed_up_lora, supervised_forward

    positions = 0

    def batches(blocks):
        nonlocal positions
        batch = collate(blocks, examples, padded=False)
        positions += batch["input_ids"].numel()
        return batch

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "data.jsonl")
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
        examples, _ = tokenize_records(str(path), chat, max_length, document_separator="line" if "text" in rows[0] else None)
        with torch.device("meta"):
            skeleton = random_llama("sdpa")
        model = random_llama(choose_attention(skeleton, precision, max_length), base_dtype(lora, precision))
        model.forward = MethodType(supervised_forward, model)
        if lora:
            model = get_peft_model(model, lora_config())
            speed_up_lora(model)
        blocks = make_blocks(examples["length"], range(len(examples)), max_length, packing=True, shuffle=True, multiple_of=1)
        args = TrainingArguments(folder, remove_unused_columns=False, logging_nan_inf_filter=False, bf16=precision == "bf16", **LOOP)
        trainer = make_trainer(model, args, chat, {}, batches, blocks, [])
        start = time.perf_counter()
        with around or contextlib.nullcontext():
            trainer.train()
        seconds = time.perf_counter() - start
    tokens, supervised, *_ = trainer.seen
    return {"supervised_tokens": int(supervised), "seconds": seconds, "peak_memory_bytes": peak_memory(), "real": tokens / positions}


def print_profile(data_dir: Path, names: list[str], threads: int, precision: str) -> None:
    """For each row: share of the time in matrix products, attention kernels and the rest, and the rate of the products beside that of large square ones."""
    import torch

    torch.set_num_threads(threads)
    matrix = torch.randn(2048, 2048, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    matrix @ matrix
    rates = []
    for _ in range(5):
        start = time.perf_counter()
        matrix @ matrix
        rates.append(2 * 2048**3 / (time.perf_counter() - start) / 1e9)
    print(f"the cores' own: {statistics.median(rates):.0f} GFLOP/s\n\n| records, max_length | matrix products | attention | the rest | GFLOP/s in products |\n|---|---|---|---|---|")
    for name in names:
        seen = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], with_flops=True)
        ours(*prepare(data_dir, name), precision, around=seen)
        events = [event for event in seen.key_averages() if event.key.startswith("aten::")]  # the data loader and Trainer are left out
        kinds = {"products": r"aten::(mm|addmm_?|bmm|baddbmm)$", "attention": "flash_attention"}
        spent = {kind: sum(event.self_cpu_time_total for event in events if re.search(pattern, event.key)) for kind, pattern in kinds.items()}
        total, flops = sum(event.self_cpu_time_total for event in events), sum(event.flops for event in events if re.search(kinds["products"], event.key))
        rest = 1 - sum(spent.values()) / total
        print(f"| {name} | {spent['products'] / total:.0%} | {spent['attention'] / total:.0%} | {rest:.0%} | {flops / spent['products'] / 1e3:.0f} |", flush=True)
        for event in sorted(events, key=lambda event: -event.self_cpu_time_total)[:8]:
            print(f"    {event.key} {event.self_cpu_time_total / total:.1%}", file=sys.stderr)


def theirs(chat, rows, max_length, lora, precision) -> dict:
    import tempfile

    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    seen = {"supervised": 0, "real": 0, "all": 0}

    class Counting(SFTTrainer):
        def training_step(self, model, inputs, *rest, **more):
            labels = inputs["labels"]
            seen["supervised"] += int((labels != -100).sum())
            seen["real"] += int(inputs["input_ids"].ne(chat.tokenizer.pad_token_id).sum())
            seen["all"] += inputs["input_ids"].numel()
            return super().training_step(model, inputs, *rest, **more)

    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(folder, packing=True, max_length=max_length, assistant_only_loss="messages" in rows[0], gradient_checkpointing=False,
                         bf16=precision == "bf16", **LOOP)
        dataset = Dataset.from_list(rows)
        trainer = Counting(random_llama("sdpa", base_dtype(lora, precision)), args, train_dataset=dataset, processing_class=chat.tokenizer,
                           peft_config=lora_config() if lora else None)
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    return {"supervised_tokens": seen["supervised"], "seconds": seconds, "peak_memory_bytes": peak_memory(), "real": seen["real"] / seen["all"]}


if __name__ == "__main__":
    cli(main)
