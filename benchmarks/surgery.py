"""Seconds and peak memory of apply_delta.py and merge_lora.py, against loading whole models with transformers and peft.

    python benchmarks/surgery.py                       # 0.8, 1.6 and 3.2 GB, about 20 minutes on two CPU threads and 20 GB of disk
    python benchmarks/surgery.py --sizes 1.6 --repeats 5

A random LLaMA in bf16, in shards of 200 MB, stands for a model; it is made on the spot, with a model tuned from it and an
adapter (r = 8 on all linear layers). The ways take turns, each in a process of its own, whose wall time and peak resident
memory are measured from its start to its end, imports included. The inputs are in the page cache, and what the run before
has written is on disk. cp of the same files is the limit.
"""
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.report import add
from utils import cli

WAYS = {  # name: what it does, and the command, in a folder with base, tuned, delta, sums and adapter
    "cp": ("copy of the base", ["cp", "-r", "--reflink=never", "base", "out"]),
    "apply_delta.py, exact": ("delta", ["python", "apply_delta.py", "--base", "base", "--target", "out", "--delta", "delta"]),
    "apply_delta.py, sums": ("delta", ["python", "apply_delta.py", "--base", "base", "--target", "out", "--delta", "sums"]),
    "transformers, sums": ("delta", ["python", "benchmarks/surgery.py", "--way", "add"]),
    "apply_delta.py --make": ("make", ["python", "apply_delta.py", "--base", "base", "--target", "tuned", "--delta", "out", "--make", "True"]),
    "merge_lora.py": ("merge", ["python", "merge_lora.py", "--model_name_or_path", "base", "--lora_path", "adapter", "--output_dir", "out"]),
    "transformers + peft": ("merge", ["python", "benchmarks/surgery.py", "--way", "merge"]),
}


def main(
    *,
    sizes: str = "0.8,1.6,3.2",
    repeats: int = 5,
    threads: int = 2,
    work_dir: str | None = None,
    only: str = "",
    way: str = "",
):
    """Print a table of seconds and peak memory, ours and theirs.

    Args:
        sizes: Of the models, in GB, with commas.
        repeats: Runs of each way, taking turns; the table has their medians and spread.
        threads: Of the CPU.
        work_dir: Folder on the disk to measure on; else that of temporary files.
        only: Part of the names of the ways to run, and cp; else all.
        way: What this process does: inputs, add or merge; by itself it starts one process for each.
    """
    if way:
        return make_inputs(Path(), float(sizes)) if way == "inputs" else add_whole() if way == "add" else merge_whole()
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    print("| model | task | way | seconds, median | spread | times cp | peak memory |\n|---|---|---|---|---|---|---|")
    for size in map(float, sizes.split(",")):
        with tempfile.TemporaryDirectory(dir=work_dir) as folder:
            # in a process of its own: memory at the fork would count for what is measured
            subprocess.run([sys.executable, Path(__file__).resolve(), "--way", "inputs", "--sizes", str(size)], cwd=folder, env=environment, check=True)
            runs = {name: [] for name in WAYS if only in name or name == "cp"}
            for _ in range(repeats):
                for name, times in runs.items():
                    times.append(measure(WAYS[name][1], Path(folder), environment))
        cp = statistics.median(seconds for seconds, _ in runs["cp"])
        for name, times in runs.items():
            seconds, memory = zip(*times)
            print(f"| {size} GB | {WAYS[name][0]} | {name} | {statistics.median(seconds):.1f} | {min(seconds):.1f} to {max(seconds):.1f} "
                  f"| {statistics.median(seconds) / cp:.1f} | {statistics.median(memory) / 1e6:,.0f} MB |", flush=True)
        for ours, peer in (("apply_delta.py, exact", "transformers, sums"), ("apply_delta.py, sums", "transformers, sums"),
                           ("merge_lora.py", "transformers + peft")):
            if {ours, peer} <= runs.keys():
                for unit, column, scale in (("seconds", 0, 1), ("peak memory, MB", 1, 1e6)):
                    mine, other = ([run[column] / scale for run in runs[name]] for name in (ours, peer))
                    add(f"{ours}, {size} GB", unit, mine, peer, other)


def measure(command: list[str], folder: Path, environment: dict) -> tuple[float, int]:
    """(wall seconds, peak resident bytes) of a command in a folder; its result is removed."""
    words = [sys.executable if word == "python" else str(ROOT / word) if word.endswith(".py") else word for word in command]
    os.sync()
    started = time.perf_counter()
    process = subprocess.Popen(words, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    error = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if status:
        sys.exit(f"{' '.join(words)}: {error.decode()[-2000:]}")
    process.returncode = 0
    shutil.rmtree(folder / "out")
    return seconds, usage.ru_maxrss * 1024


# ---- what is measured ----
def make_inputs(folder: Path, size: float) -> None:
    """base, tuned (base and a little noise), delta (ours), sums (tuned - base, as FastChat does it) and adapter."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    hidden, inner, vocabulary = 2048, 5632, 32000
    layers = round((size * 1e9 / 2 - 2 * vocabulary * hidden) / (4 * hidden**2 + 3 * hidden * inner))
    config = LlamaConfig(vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=16,
                         dtype="bfloat16", architectures=["LlamaForCausalLM"])
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.train_from_iterator([], trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<s>", "</s>"], show_progress=False))
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden), "lm_head.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
    for layer in range(layers):
        sides = dict.fromkeys([f"self_attn.{name}_proj" for name in "qkvo"], (hidden, hidden))
        sides |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
        sides |= {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in sides.items()}
    shards, held = [[]], 0
    for name, shape in shapes.items():
        if held > 200e6:
            shards, held = [*shards, []], 0
        shards[-1].append(name)
        held += 2 * torch.Size(shape).numel()
    torch.manual_seed(0)
    mapped = {name: f"model-{number:05}-of-{len(shards):05}.safetensors" for number, names in enumerate(shards, 1) for name in names}
    for kind in ("base", "tuned", "sums"):
        config.save_pretrained(folder / kind)
        PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>").save_pretrained(folder / kind)
        (folder / kind / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": mapped}))
    for names in shards:
        base = {name: (torch.randn(shapes[name]) * 0.02 if len(shapes[name]) == 2 else torch.ones(shapes[name])).bfloat16() for name in names}
        tuned = {name: (tensor.float() + torch.randn_like(tensor, dtype=torch.float32) * 0.001).bfloat16() for name, tensor in base.items()}
        sums = {name: tuned[name] - base[name] for name in names}
        for kind, tensors in (("base", base), ("tuned", tuned), ("sums", sums)):
            save_file(tensors, folder / kind / mapped[names[0]], {"format": "pt"})
    (folder / "adapter").mkdir()
    linear = {name.removesuffix(".weight"): shape for name, shape in shapes.items() if name.endswith("_proj.weight")}
    factors = {f"base_model.model.{name}.lora_A.weight": torch.randn(8, shape[1]) * shape[1] ** -0.5 for name, shape in linear.items()}
    factors |= {f"base_model.model.{name}.lora_B.weight": torch.randn(shape[0], 8) * 0.02 for name, shape in linear.items()}
    save_file(factors, folder / "adapter" / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "bias": "none", "target_modules": "all-linear"}))
    subprocess.run([sys.executable, ROOT / "apply_delta.py", "--base", "base", "--target", "tuned", "--delta", "delta", "--make", "True"], cwd=folder,
                   check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def add_whole() -> None:
    """As fastchat/model/apply_delta.py does it: both models loaded, one added to the other, saved."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, delta = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16) for folder in ("base", "sums"))
    added = delta.state_dict()
    for name, p in base.state_dict().items():
        p += added[name]
    base.save_pretrained("out")
    AutoTokenizer.from_pretrained("sums").save_pretrained("out")


def merge_whole() -> None:
    """As the documentation of peft does it."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base", dtype=torch.bfloat16), "adapter")
    model.merge_and_unload().save_pretrained("out")
    AutoTokenizer.from_pretrained("base").save_pretrained("out")


if __name__ == "__main__":
    cli(main)
