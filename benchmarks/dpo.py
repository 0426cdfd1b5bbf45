"""Supervised tokens a second and peak memory of a DPO step, against trl's DPOTrainer, which does not pack pairs.

    python benchmarks/dpo.py --data_dir ../shared/data                 # two CPU threads, about 20 minutes
    python benchmarks/dpo.py --data_dir ../shared/data --check True    # the same batch: are the losses the same?

Both train the same random LLaMA (12 layers, 512 wide, vocabulary 8,192, fp32), LoRA with r = 8 on all linear layers, on the same pairs, once each, with the
adapter switched off as the reference, in processes of their own that take turns. The pairs are the first of dpo_zh_demo.json that fit max_length, so that
neither side cuts any. Ours packs them into rows of 2 * max_length tokens; theirs takes --at_once pairs, padded: two fill such a row on the average.
Time is that of the training loop alone. trl, and telemetry off: pip install trl==1.16.0, which changes none of our pins.
"""
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.report import add
from benchmarks.sft import LOOP, lora_config, peak_memory, random_llama
from utils import Chat, cli, make_pair_blocks, numbered_records, tokenize_records


def main(
    *,
    data_dir: str = "../shared/data",
    peer: str = "trl",
    repeats: int = 3,
    threads: int = 2,
    pairs: int = 60,
    max_length: int = 1024,
    at_once: int = 2,
    side: Literal["both", "ours", "theirs"] = "both",
    check: bool = False,
):
    """Print a table of supervised tokens a second and peak memory, ours and theirs.

    Args:
        data_dir: Folder with the data; see its README for what it is.
        peer: Package to compare with.
        repeats: Runs of each side, taking turns; the table has their medians and spread.
        threads: Of the CPU.
        pairs: Number of pairs to train on.
        max_length: Tokens of a question with one answer.
        at_once: Pairs that trl takes in one step.
        side: Which side this process runs; both starts a process for each run.
        check: Compare the losses of one batch instead.
    """
    os.environ |= {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TRL_TELEMETRY": "0"}
    if check or side != "both":
        given = prepare(Path(data_dir), pairs, max_length)
        return compare_losses(*given) if check else print(json.dumps((ours if side == "ours" else partial(theirs, at_once=at_once))(*given)))
    results = {"ours": [], "theirs": []}
    for _ in range(repeats):
        for who in results:
            command = [sys.executable, __file__, "--side", who, "--data_dir", data_dir, "--threads", threads, "--pairs", pairs, "--max_length", max_length,
                       "--at_once", at_once]
            results[who].append(json.loads(subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, check=True, text=True).stdout.splitlines()[-1]))
    speed = {who: [run["supervised_tokens"] / run["seconds"] for run in runs] for who, runs in results.items()}
    of_cpu = {who: [run["supervised_tokens"] / run["cpu_seconds"] for run in runs] for who, runs in results.items()}
    memory = {who: [run["peak_memory_bytes"] / 1e9 for run in runs] for who, runs in results.items()}
    print("| side | supervised tokens/s | spread | per CPU second | peak memory |\n|---|---|---|---|---|")
    for who in results:
        print(f"| {who if who == 'ours' else peer} | {statistics.median(speed[who]):.0f} | {min(speed[who]):.0f} to {max(speed[who]):.0f} "
              f"| {statistics.median(of_cpu[who]):.0f} | {statistics.median(memory[who]):.2f} GB |")
    for what, figures in (("supervised tokens/s", speed), ("supervised tokens/CPU s", of_cpu), ("peak memory, GB", memory)):
        print(f"{what}: ours / {peer} = {statistics.median(figures['ours']) / statistics.median(figures['theirs']):.2f}")
        add(f"DPO, dpo_zh_demo, {max_length:,}", what, figures["ours"], peer, figures["theirs"])


def prepare(data_dir: Path, count: int, max_length: int):
    """(Chat, records that fit, max_length): a byte-level BPE of 8,192 trained on the file, as ChatML."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    records = [record for _, record in numbered_records(str(data_dir / "preference" / "dpo_zh_demo.json"), preference=True)]
    texts = (text for record in records for text in (*(m["content"] for m in record["messages"]), record["chosen"], record["rejected"]))
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=8190, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<|end|>"], show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", pad_token="<|end|>")
    chat = Chat(tokenizer, "chatml", last_round_only=True)
    long = lambda record, answer: sum(len(ids) for ids, _ in chat.encode([*record["messages"], {"role": "assistant", "content": record[answer]}]))
    return chat, list(itertools.islice((r for r in records if max(long(r, "chosen"), long(r, "rejected")) <= max_length), count)), max_length


def tokenized(folder: str, chat, records, max_length):
    path = Path(folder, "data.jsonl")
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8")
    return tokenize_records(str(path), chat, max_length, preference=True)[0]


def our_model(max_length: int, loss_type: str = "sigmoid"):
    import torch
    from peft import get_peft_model

    from train_dpo import BETA, choose_attention, preference_forward, preference_loss, speed_up_lora

    with torch.device("meta"):
        skeleton = random_llama("sdpa")
    core = random_llama(choose_attention(skeleton, "fp32", max_length))
    model = get_peft_model(core, lora_config())
    speed_up_lora(model)
    core.may_be_off = 1e-4
    core.forward = MethodType(partial(preference_forward, loss=partial(preference_loss, loss_type=loss_type, beta=BETA[loss_type]),
                                      without_adapter=model.disable_adapter), core)
    return model


def ours(chat, records, max_length) -> dict:
    from transformers import TrainingArguments

    from train_dpo import collate_pairs, log_sums, make_trainer

    with tempfile.TemporaryDirectory() as folder:
        examples = tokenized(folder, chat, records, max_length)
        blocks = make_pair_blocks(list(examples["length"]), range(len(examples)), max_length, True, True, 1)
        args = TrainingArguments(folder, remove_unused_columns=False, logging_nan_inf_filter=False, **LOOP)
        trainer = make_trainer(our_model(max_length), args, chat, {}, partial(collate_pairs, examples=examples, padded=False), blocks, [])
        log_sums(trainer)
        start, begun = time.perf_counter(), time.process_time()
        trainer.train()
        seconds, cpu = time.perf_counter() - start, time.process_time() - begun
    return {"supervised_tokens": int(trainer.seen[1]), "seconds": seconds, "cpu_seconds": cpu, "peak_memory_bytes": peak_memory()}


def their_trainer(folder: str, chat, records, max_length: int, at_once: int, loss_type: str = "sigmoid", beta: float = 0.1):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    from train_reward import template_up_to_the_stop_token

    seen = {"supervised": 0}

    class Counting(DPOTrainer):
        def training_step(self, model, inputs, *rest, **more):
            seen["supervised"] += int(inputs["completion_mask"].sum())
            return super().training_step(model, inputs, *rest, **more)

    rows = [{"prompt": record["messages"], **{name: [{"role": "assistant", "content": record[name]}] for name in ("chosen", "rejected")}} for record in records]
    rows = [{**row, "prompt": [{name: message[name] for name in ("role", "content")} for message in row["prompt"]]} for row in rows]
    chat.tokenizer.chat_template = template_up_to_the_stop_token(chat)  # else it trains the line break behind the stop token as well
    model = random_llama("sdpa")
    model.save_pretrained(Path(folder, "model"))  # it wants a name
    model = type(model).from_pretrained(Path(folder, "model"), attn_implementation="sdpa")
    args = DPOConfig(folder, max_length=max_length + 8, bf16=False, gradient_checkpointing=False, loss_type=loss_type, beta=beta,
                     **LOOP | {"per_device_train_batch_size": at_once})
    return Counting(model, args=args, train_dataset=Dataset.from_list(rows), processing_class=chat.tokenizer, peft_config=lora_config()), seen


def theirs(chat, records, max_length, at_once) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        trainer, seen = their_trainer(folder, chat, records, max_length, at_once)
        start, begun = time.perf_counter(), time.process_time()
        trainer.train()
        seconds, cpu = time.perf_counter() - start, time.process_time() - begun
    return {"supervised_tokens": seen["supervised"], "seconds": seconds, "cpu_seconds": cpu, "peak_memory_bytes": peak_memory()}


def compare_losses(chat, records, max_length) -> None:
    """The losses of four pairs under adapters that are no longer zero, ours and theirs."""
    import torch
    from peft.tuners.lora import LoraLayer

    from train_dpo import BETA, collate_pairs

    def disturb(model):
        torch.manual_seed(1)
        for module in (module for module in model.modules() if isinstance(module, LoraLayer)):
            for linear in (*module.lora_A.values(), *module.lora_B.values()):
                torch.nn.init.normal_(linear.weight, std=0.01)
        return model.eval()

    for loss_type in ("sigmoid", "ipo", "sigmoid_norm"):
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            examples = tokenized(folder, chat, records[:4], max_length)
            batch = collate_pairs([list(range(len(examples)))], examples, padded=False)
            mine = float(disturb(our_model(max_length, loss_type))(**batch)["loss"]) / 4
            trainer, _ = their_trainer(folder, chat, records[:4], max_length, 4, loss_type, BETA[loss_type])
            other = float(trainer.compute_loss(disturb(trainer.model), trainer.data_collator([trainer.train_dataset[n] for n in range(4)])))
        print(f"{loss_type}: ours {mine:.7f}, trl {other:.7f}, apart {abs(mine - other):.1e}")


if __name__ == "__main__":
    cli(main)
