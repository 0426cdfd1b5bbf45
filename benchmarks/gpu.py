"""One card, ten minutes: every training script for some steps, generation, GPTQ and merging, on random LLaMAs of three sizes.

    bash benchmarks/gpu.sh                                # an NVIDIA card of 11 GB or more; this file, then tests/test_gpu.py
    python benchmarks/gpu.py --only "LoRA, 4 bit"         # some rows
    python benchmarks/gpu.py --rehearse True              # without a card: the same rows with a tiny model on the CPU

Nothing is downloaded: models are random, the tokenizer is trained on sample/, the records are put together from it. Each row is a command line
of a script in a process of its own, in bf16 or fp16 as `--precision auto` finds it. MFU is the share of the card's arithmetic that the model's
matrix products take: 6 operations a weight and token where all weights are trained, 4 where the base is frozen, the head on supervised tokens
only; neither attention nor what gradient checkpointing computes again is counted. The card's arithmetic is measured first, by products of
large matrices in the same precision. Peak memory is torch's max_memory_allocated, the estimate that of estimate_memory.py without its share for
CUDA. "of peer" is, in the first row, supervised tokens a second of ours by trl's, where trl is installed; in the rows of generation, of streaming
one answer by bare model.generate (tokens/s are those of eight answers at once). "resumed" trains the second half of the steps again from the
checkpoint in their middle: the largest difference of a weight, as a share of the largest weight. Rows that do not fit the
card, lack their script or come when the time is up are named with the reason. Exit status 1 if a row failed or a loss is not finite.
"""
import functools
import importlib.util
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.report import machine
from utils import BadInput, cli

SIZES = {  # width, inner width, layers, heads, heads of keys; the vocabulary is LLaMA's. steps, blocks a step
    "tiny": ((64, 128, 2, 4, 2), 4, 2),
    "0.1B": ((768, 2048, 12, 12, 12), 40, 8),
    "1B": ((2048, 5632, 22, 32, 4), 20, 4),
    "7B": ((4096, 11008, 32, 32, 32), 8, 1)}
HEAD = "| what | model | tokens/s | of peer | MFU | peak memory | estimate | loss | resumed |\n|" + "---|" * 9
TRAIN = dict(max_length=1024, gradient_accumulation_steps=1, logging_steps=5, learning_rate=1e-4)


class Row(NamedTuple):
    script: str
    sizes: str
    data: str = "dialogues.jsonl"
    flags: dict = {}
    base: str = "llama"  # kind of model
    factor: int = 0  # operations a weight of the base and token; 0: not counted, since the script does more than train
    resumed: bool = False


ROWS = {
    "LoRA, 16 bit": Row("finetune_lora.py", "0.1B 1B 7B", factor=4, resumed=True),
    "LoRA, 8 bit": Row("finetune_lora.py", "1B 7B", flags=dict(bits=8), factor=4),
    "LoRA, 4 bit": Row("finetune_lora.py", "1B 7B", flags=dict(bits=4), factor=4),
    "LoRA, unpacked": Row("finetune_lora.py", "0.1B 1B", flags=dict(packing=False), factor=4),
    "LoRA, padded rows": Row("finetune_lora.py", "0.1B", base="mistral", factor=4),  # its window is too short to pack
    "full": Row("finetune.py", "0.1B 1B", factor=6, resumed=True),
    "full, conversations": Row("finetune_multi_rounds.py", "0.1B", factor=6),
    "pretraining, full": Row("pretrain_clm.py", "0.1B", "documents.txt", factor=6),
    "pretraining, LoRA": Row("pretrain_clm.py", "1B", "documents.txt", dict(train="lora"), factor=4),
    "reward model": Row("train_reward.py", "0.1B 1B", "preference.jsonl"),
    "DPO": Row("train_dpo.py", "0.1B 1B", "preference.jsonl"),
    "PPO": Row("train_ppo.py", "0.1B 1B", "prompts.jsonl", dict(rules="sample/rules.py:finished=1,repetition=1", max_new_tokens=64, rollout_batch_size=8,
                                                               num_generations=4, max_steps=2, max_kl=1000)),  # a random model strays far at once
    "generation": Row("generate.py", "0.1B 1B 7B"),
    "generation, 8 bit": Row("generate.py", "1B", flags=dict(bits=8)),
    "generation, 4 bit": Row("generate.py", "1B 7B", flags=dict(bits=4)),
    "GPTQ, 4 bit": Row("quantize_gptq.py", "0.1B 1B", "documents.txt"),
    "merging": Row("merge_lora.py", "0.1B 1B"),  # the adapter of the first row
}


def main(
    *,
    minutes: float = 10,
    sizes: str = "0.1B,1B,7B",
    only: str = "",
    peer: str = "trl",
    rehearse: bool = False,
    output_dir: str = "output/gpu",
    side: Literal["all", "card", "model", "generate", "theirs"] = "all",
    folder: str = "",
    bits: int = 16,
):
    """Print a table of what each script does on this card.

    Args:
        minutes: After which no further row is begun.
        sizes: Of the models, with commas.
        only: Part of the names of the rows to run; else all.
        peer: Package that the first row is compared with, where it is installed.
        rehearse: Run each row with a tiny model on the CPU.
        output_dir: Folder for table.md, results.json and what the scripts write.
        side: What this process does; all starts a process for each row.
        folder: The model of this process.
        bits: Of the model's weights in this process.
    """
    if side != "all":
        return print(json.dumps(dict(card=card, model=make_model, generate=generate_some, theirs=theirs)[side](folder, bits)))
    begun, output, rows, failed = time.monotonic(), Path(output_dir).resolve(), [], []
    output.mkdir(parents=True, exist_ok=True)
    if rehearse:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    here = own("card")
    if not here["cuda"] and not rehearse:
        raise BadInput("this machine has no CUDA device: --rehearse True runs the same rows with a tiny model on the CPU")
    make_data(output)
    title = (f"{here['name']}, {here['memory'] / 2**30:.0f} GiB, {here['precision']}, {here['rate'] / 1e12:.3g} TFLOP/s in large products; "
             f"{machine()}; {here['packages']}")
    print(f"{title}\n\n{HEAD}", flush=True)
    for size in ["tiny"] if rehearse else sizes.split(","):
        clear(output, size)  # a model of a run that was stopped may be half a model
        for name, row in ROWS.items():
            if only not in name or not rehearse and size not in row.sizes.split():
                continue
            found = dict(what=name, model=size, why=obstacle(row, size, here, output, begun + 60 * minutes))
            if not found["why"]:
                try:
                    found |= measure(name, row, size, here, output, peer)
                except subprocess.CalledProcessError as problem:
                    found["why"] = f"failed: {([str(problem)] + problem.stderr.strip().splitlines())[-1][:300]}"
            failed += [name] * (found["why"].startswith("failed") or not math.isfinite(found.get("loss") or 0))
            rows.append(found)
            print(line_of(found), flush=True)
            (output / "results.json").write_text(json.dumps(dict(card=here, machine=machine(), rows=rows), indent=1, ensure_ascii=False), "utf-8")
        clear(output, size)  # 13 GB for a 7B
    (output / "table.md").write_text("\n".join([title, "", HEAD, *map(line_of, rows), ""]), "utf-8")
    print(f"\n{time.monotonic() - begun:.0f} seconds; {output}/table.md, {output}/results.json" + f"; failed: {', '.join(failed)}" * bool(failed))
    sys.exit(bool(failed))


def clear(output: Path, size: str) -> None:
    """Remove models and results of this size."""
    for folder in output.glob(f"*-{size}*/"):
        shutil.rmtree(folder)


def line_of(row: dict) -> str:
    """A line of the table."""
    in_gb = row | {key: row[key] / 1e9 for key in ("peak", "estimate") if row.get(key) is not None}
    show = {"tokens_per_second": "{:,.0f}", "of_peer": "{:.2f}", "mfu": "{:.1%}", "peak": "{:.2f} GB", "estimate": "{:.2f} GB", "loss": "{:.3f}",
            "resumed": "{:.1g}"}
    cells = [form.format(in_gb[key]) if in_gb.get(key) is not None else "" for key, form in show.items()]
    return f"| {row['what']} | {row['model']} | " + (f"{row['why']} |" + " |" * 6 if row["why"] else " | ".join(cells) + " |")


# ---- a row ----
def obstacle(row: Row, size: str, here: dict, output: Path, until: float) -> str:
    """Why a row cannot be run, or nothing."""
    if time.monotonic() > until:
        return "left out: the time is up"
    if not (ROOT / row.script).is_file():
        return f"left out: {row.script} is not there"
    known = flags_of(row.script)
    if unknown := row.flags.keys() - known - ({"max_steps"} if "training_arguments" in known else set()):
        return f"failed: {row.script} has no --{min(unknown)}"
    needed = weights(size) * (2 if row.flags.get("bits", 16) == 16 else 1 if row.flags["bits"] == 8 else 0.6) * 1.1 if size in SIZES else 0
    if here["cuda"] and max(needed, estimate(row, size, output) or 0) + 0.7e9 > here["memory"]:
        return "does not fit this card"
    if shutil.disk_usage(output).free < 3 * weights(size) * 2:
        return "left out: the disk is full"
    return ""


@functools.cache
def flags_of(script: str) -> set[str]:
    """The flags that --help of a script names."""
    shown = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(re.findall(r"--(\w+)=", shown.stdout)) | ({"training_arguments"} if "TrainingArguments" in shown.stdout else set())


def command(row: Row, size: str, output: Path) -> dict:
    """The flags of a training row."""
    _, steps, blocks = SIZES[size]
    flags = dict(model_name_or_path=str(output / f"{row.base}-{size}"), data_path=str(output / row.data), output_dir=str(output / f"run-{size}"))
    flags |= TRAIN | dict(per_device_train_batch_size=blocks, max_steps=steps) | row.flags
    flags |= dict(save_steps=steps // 2, save_total_limit=2) if resumes(row, size) else dict(save_strategy="no")
    known = flags_of(row.script)
    handed_on = {"max_steps", "logging_steps", "save_steps", "save_total_limit", "save_strategy"} if "training_arguments" in known else set()
    return {name: value for name, value in flags.items() if name in known | handed_on}


def resumes(row: Row, size: str) -> bool:
    """Whether the checkpoints are small enough to try: all but those of all weights of a larger model."""
    return row.resumed and (row.factor == 4 or size in ("tiny", "0.1B"))


def words(flags: dict) -> list[str]:
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def estimate(row: Row, size: str, output: Path) -> float | None:
    """Bytes that estimate_memory.py expects torch's allocator to need; None for stages that it does not know."""
    if not row.factor:
        return None
    shape = output / f"shape-{row.base}-{size}.json"
    shape.write_text(json.dumps(config_of(row.base, size)))
    flags = command(row, size, output) | dict(model_name_or_path=str(shape))
    asked = [sys.executable, "estimate_memory.py", "--stage", row.script.removesuffix(".py"), *words(flags)]
    run = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True)
    parts = {name: float(size) * 1e9 for name, size in re.findall(r"^\| (sum|framework) \| ([\d.]+) \|", run.stdout, re.M)}
    return parts["sum"] - parts["framework"]


def run_script(script: str, flags: dict) -> dict | None:
    """Run a script of the project; its last line, if that is JSON."""
    done = subprocess.run([sys.executable, script, *words(flags)], cwd=ROOT, capture_output=True, text=True, check=True)
    last = (done.stdout.splitlines() or [""])[-1]
    return json.loads(last) if last.startswith("{") else None


def own(side: str, folder="", bits: int = 16) -> dict:
    """What a process of this file with another side prints: the card's memory is then free again."""
    flags = dict(side=side, folder=folder, bits=bits)
    return json.loads(subprocess.run([sys.executable, __file__, *words(flags)], capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def measure(name: str, row: Row, size: str, here: dict, output: Path, peer: str) -> dict:
    """The figures of a row."""
    base, adapter = output / f"{row.base}-{size}", output / f"adapter-{size}"
    if not base.is_dir():
        own("model", str(base))
    start = time.monotonic()
    if row.script == "generate.py":
        return own("generate", base, row.flags.get("bits", 16))
    if row.script == "merge_lora.py":
        if not adapter.is_dir():
            return dict(why="left out: it needs the adapter of the first row")
        run_script(row.script, dict(model_name_or_path=base, lora_path=adapter, output_dir=output / f"merged-{size}"))
        return dict(seconds=time.monotonic() - start)
    if row.script == "quantize_gptq.py":
        flags = dict(model_name_or_path=base, calibration_path=output / row.data, calibration_size=32, group_size=64, output_dir=output / f"gptq-{size}")
        report = run_script(row.script, flags)
        return dict(seconds=report["seconds"], loss=math.log(report["perplexity"]["gptq"]))
    flags = command(row, size, output)
    shutil.rmtree(flags["output_dir"], ignore_errors=True)
    report = run_script(row.script, flags) or {}
    found = dict(seconds=time.monotonic() - start, peak=report.get("peak_memory_bytes"), estimate=estimate(row, size, output), loss=report.get("train_loss"),
                 tokens_per_second=report.get("tokens_per_second"))
    if row.factor:
        width, head = SIZES[size][0][0], 32000
        operations = row.factor * ((weights(size) - 2 * width * head) * report["tokens"] + width * head * report["supervised_tokens"])
        found["mfu"] = operations / report["seconds"] / here["rate"]
    if resumes(row, size):
        found["resumed"] = resumed(row, flags)
    if name == "LoRA, 16 bit":
        shutil.copytree(flags["output_dir"], adapter, ignore=shutil.ignore_patterns("checkpoint-*"))
        if importlib.util.find_spec(peer) and size != "7B":  # minutes
            theirs = own("theirs", base)
            found["of_peer"] = report["supervised_tokens"] / report["seconds"] / (theirs["supervised_tokens"] / theirs["seconds"])
    return found


def resumed(row: Row, flags: dict) -> float:
    """Largest difference of a weight between a run and one that goes on from the checkpoint in its middle, as a share of the largest weight."""
    from safetensors.torch import load_file

    whole, again = Path(flags["output_dir"]), Path(flags["output_dir"] + "-resumed")
    shutil.rmtree(again, ignore_errors=True)
    shutil.copytree(whole / f"checkpoint-{flags['save_steps']}", again / f"checkpoint-{flags['save_steps']}")
    shutil.copy(whole / "run.json", again)
    run_script(row.script, flags | dict(output_dir=str(again), resume=True))
    pairs = [(load_file(file), load_file(again / file.name)) for file in whole.glob("*.safetensors")]
    apart = max(float((a[key].float() - b[key].float()).abs().max()) for a, b in pairs for key in a)
    return apart / max(float(tensor.abs().max()) for a, _ in pairs for tensor in a.values())


# ---- data and models ----
def make_data(output: Path) -> None:
    """Records enough for each row, put together from sample/."""
    from utils import numbered_records

    draw = random.Random(0)
    talks = [record["messages"] for file in ("instruction.json", "conversation.json", "company.json") for _, record in numbered_records(str(ROOT / "sample" / file))]
    dialogues = [{"messages": draw.choice(talks)} for _ in range(6000)]
    made = {"dialogues.jsonl": [json.dumps(record, ensure_ascii=False) for record in dialogues],
            "documents.txt": [" ".join(m["content"] for m in record["messages"]).replace("\n", " ") for record in dialogues]}
    for name, file in (("preference.jsonl", "preference.json"), ("prompts.jsonl", "prompts.jsonl")):
        if (source := ROOT / "sample" / file).is_file():
            text = source.read_text("utf-8")
            records = json.loads(text) if file.endswith(".json") else [json.loads(line) for line in text.splitlines()]
            made[name] = [json.dumps(record, ensure_ascii=False) for record in records * (600 // len(records))]
    for name, lines in made.items():
        (output / name).write_text("".join(line + "\n" for line in lines), "utf-8")


def config_of(base: str, size: str) -> dict:
    """config.json of a random model. A mistral's window is shorter than a block, which our attention in documents does not know: it gets padded rows."""
    width, inner, layers, heads, kv_heads = SIZES[size][0]
    return dict(model_type=base, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
                vocab_size=32000, max_position_embeddings=4096, tie_word_embeddings=False) | ({"sliding_window": 512} if base == "mistral" else {})


def weights(size: str) -> int:
    width, inner, layers, heads, kv_heads = SIZES[size][0]
    return 2 * 32000 * width + layers * (2 * width * width * (heads + kv_heads) // heads + 3 * width * inner)


def make_model(folder: str, bits: int) -> dict:
    """Save a random model, in the precision of the card, with a byte-level BPE of 8,192 trained on sample/, as ChatML."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    from utils import Chat

    base, size = Path(folder).name.split("-")
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.train_from_iterator((path.read_text("utf-8") for path in sorted((ROOT / "sample").glob("*.json*"))), trainers.BpeTrainer(
        vocab_size=8190, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<|end|>", "<|pad|>"], show_progress=False))
    chat = Chat(PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", pad_token="<|pad|>"), "chatml")
    config = config_of(base, size)
    torch.manual_seed(0)
    room = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0
    with torch.device("cuda" if room > 2.5 * weights(size) else "cpu"):  # else a minute slower
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=dtype_of(precision()))
    model.save_pretrained(folder)
    chat.tokenizer.save_pretrained(folder)
    return {}


# ---- the card ----
def precision() -> str:
    """What --precision auto takes."""
    import torch

    from finetune_lora import make_arguments

    return make_arguments(dict(output_dir="output/gpu"), "auto")[1] if torch.cuda.is_available() else "fp32"


def dtype_of(name: str):
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]


def card(folder: str, bits: int) -> dict:
    """Name, memory in bytes, operations a second in products of large matrices, and what is installed."""
    import torch

    cuda, n = torch.cuda.is_available(), 8192 if torch.cuda.is_available() else 1024
    kind = precision()
    a, b = (torch.randn(n, n, device="cuda" if cuda else "cpu", dtype=dtype_of(kind)) for _ in range(2))
    rates = []
    for repeats in (3, 10, 10, 10):
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            a @ b
        if cuda:
            torch.cuda.synchronize()
        rates.append(2 * n**3 * repeats / (time.perf_counter() - start))
    versions = [f"{name} {'installed' if importlib.util.find_spec(name) else 'not installed'}" for name in ("flash_attn", "trl")]
    memory = torch.cuda.get_device_properties(0).total_memory if cuda else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    name = torch.cuda.get_device_name(0) if cuda else "the CPU (rehearsal)"
    return dict(cuda=cuda, name=name, memory=memory, precision=kind, rate=max(rates), packages=", ".join(versions))


def generate_some(folder: str, bits: int) -> dict:
    """Tokens a second of eight greedy answers at once, and what streaming one answer has of bare model.generate."""
    import torch

    import generate

    model, chat = generate.load_model(folder, bits=bits)
    length = 128 if torch.cuda.is_available() else 8
    settings = dict(max_new_tokens=length, temperature=0, top_p=1.0, top_k=0, repetition_penalty=1.0)
    model.generation_config.eos_token_id, chat.stop_ids = None, chat.stop_ids[:1]
    model.generation_config.suppress_tokens = chat.stop_ids  # so that all answers are as long
    asked, seconds = [{"role": "user", "content": "羊驼是什么？"}], {}
    ids = torch.tensor([generate.prompt_ids(chat, asked)], device=model.device)

    def bare():
        with torch.inference_mode():
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **generate.generation_arguments(model, chat, **settings))

    ways = {"bare": bare, "streamed": lambda: list(generate.stream(model, chat, asked, **settings)),
            "eight": lambda: generate.answer_batch(model, chat, [asked] * 8, **settings)}
    for turn in range(3):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds.setdefault(name, []).append(time.perf_counter() - start)
    best = {name: min(times[1:]) for name, times in seconds.items()}
    return dict(tokens_per_second=8 * length / best["eight"], of_peer=best["bare"] / best["streamed"],
                peak=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None)


def theirs(folder: str, bits: int) -> dict:
    """trl's SFTTrainer with packing on the same model, records, blocks and steps."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    size, seen = Path(folder).name.split("-")[1], {"supervised_tokens": 0}
    _, steps, blocks = SIZES[size]
    kind, cuda = precision(), torch.cuda.is_available()

    class Counting(SFTTrainer):
        def training_step(self, model, inputs, *rest, **more):
            seen["supervised_tokens"] += int((inputs["labels"] != -100).sum())
            return super().training_step(model, inputs, *rest, **more)

    lines = Path(folder).with_name("dialogues.jsonl").read_text("utf-8").splitlines()
    args = SFTConfig(f"{folder}-trl", packing=True, max_length=1024, assistant_only_loss=True, gradient_checkpointing=True, bf16=kind == "bf16",
                     fp16=kind == "fp16", max_steps=steps, per_device_train_batch_size=blocks, gradient_accumulation_steps=1, learning_rate=1e-4,
                     save_strategy="no", report_to="none", use_cpu=not cuda)
    trainer = Counting(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype_of(kind)), args, processing_class=AutoTokenizer.from_pretrained(folder),
                       train_dataset=Dataset.from_list([json.loads(line) for line in lines[: 12 * steps * blocks]]),
                       peft_config=LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, lora_dropout=0.05, target_modules="all-linear"))
    start = time.perf_counter()
    trainer.train()
    return seen | dict(seconds=time.perf_counter() - start)


if __name__ == "__main__":
    cli(main)
