"""Does it fit? The memory of a training run, part by part, from the shapes of the model and the flags of the script.

Reads   a model's config.json, or the name of a size such as llama-2-7b; nothing is downloaded and nothing is loaded
Writes  a table of what takes how much, which cards hold it, and on request the cheapest flags that make it fit

    python estimate_memory.py --model_name_or_path llama-2-13b --bits 4                        # finetune_lora.py, on which cards?
    python estimate_memory.py --stage finetune --model_name_or_path qwen2.5-7b --fit 40        # what to change for 40 GB
    python estimate_memory.py                                                                  # usual sizes and ways on usual cards

The flags are those of the training script, and so are their defaults. GB are 10^9 bytes, and of a card of 11 GB 11 of them
are counted on, though it holds a little more. Every position is taken for supervised and every block for full, so that a run
can need less. benchmarks/memory.py compares the arithmetic (memory.py) with measured peaks: within 10 % on each row.
"""
import importlib
import inspect
import itertools
import os
import shlex
from pathlib import Path
from typing import Literal

from memory import Run, Shapes, estimate, read_shapes, read_zero, run_of, total
from utils import BadInput, RunStopped, check_file, check_positive, cli

CARDS = (11, 16, 24, 40, 80)
WHAT = {"weights": "as they lie on the card", "adapters": "A and B of each adapted layer", "gradients": "of what is trained", "optimizer": "its state",
        "activations": "what the backward pass needs of the layers", "head and loss": "one chunk of logits, and the head's gradient",
        "quantisation": "scales, and one layer's weights as they were", "ranks and ZeRO": "buckets, and gathered layers",
        "framework": "CUDA, cuBLAS, fragments"}


def main(
    *,
    stage: Literal["finetune_lora", "finetune", "finetune_multi_rounds", "pretrain_clm"] = "finetune_lora",
    # model and data
    model_name_or_path: str | None = None,
    data_path: str | None = None,
    max_length: int | None = None,
    packing: bool | None = None,
    # what is trained
    train: Literal["full", "embeddings", "lora"] | None = None,
    bits: Literal[16, 8, 4] | None = None,
    lora_r: int | None = None,
    lora_dropout: float | None = None,
    lora_target_modules: str | None = None,
    use_dora: bool | None = None,
    # optimization
    freeze_layers: int | None = None,
    per_device_train_batch_size: int | None = None,
    gradient_accumulation_steps: int | None = None,
    precision: Literal["auto", "bf16", "fp16", "fp32"] | None = None,
    gradient_checkpointing: bool | None = None,
    # where
    ranks: int = 1,
    fit: float = 0,
    **training_arguments,
):
    """Estimate the memory of a training run; model_name_or_path may be a config.json or a size such as llama-2-7b as well, and flags
    that are not given are as in the script of the stage.

    Args:
        stage: The training script, without .py.
        model_name_or_path: Folder or hub name of the base model.
        data_path: Training data: JSON, JSONL, CSV or Parquet (pretrain_clm.py: also .txt, or a folder); see sample/README.md.
        max_length: Tokens per example; what is longer is cut into windows, a dialogue into whole rounds.
        packing: Fill blocks of max_length tokens with whole examples; else an example is a block.
        train: full (all weights), embeddings (embedding and head alone) or lora (those two, and an adapter for the rest).
        bits: Of the base model's weights: 16 as they are, 8 (int8) or 4 (NF4).
        lora_r: Rank of the update: r * (d_in + d_out) new weights per adapted layer.
        lora_dropout: Share of the adapter's inputs that is dropped.
        lora_target_modules: Layers to adapt: all-linear, or names with commas such as q_proj,v_proj.
        use_dora: Learn the magnitude of each weight apart (arXiv:2402.09353).
        freeze_layers: Lowest layers, with the embeddings, that are not trained.
        per_device_train_batch_size: Blocks per step and GPU.
        gradient_accumulation_steps: Steps whose gradients are added up before the weights change.
        precision: Arithmetic: auto (bf16 where the GPU has it, else fp16; fp32 on a CPU), bf16, fp16 or fp32.
        gradient_checkpointing: Keep one activation per layer and recompute the rest: a quarter slower, far less memory.
        ranks: Number of GPUs.
        fit: Size of a card in GB: print the cheapest flags with which it is enough.
        training_arguments: Any other field of transformers.TrainingArguments, such as --max_steps or --report_to.
    """
    flags = dict(locals())
    if fit < 0:
        raise BadInput(f"--fit={fit:g} is no size of a card in GB")
    others = ("stage", "model_name_or_path", "data_path", "ranks", "fit", "training_arguments")
    given = {name: value for name, value in flags.items() if name not in others and value is not None}
    if model_name_or_path is None:
        return print(fit_table())
    flags = complete(stage, given)
    check_positive(ranks=ranks, **{name: flags[name] for name in ("max_length", "lora_r", "per_device_train_batch_size", "gradient_accumulation_steps")
                                   if name in flags})
    deepspeed = training_arguments.get("deepspeed")
    check_file("deepspeed", deepspeed)

    # ---- load ----
    shapes = read_shapes(model_name_or_path)
    flags |= {"ranks": ranks, "deepspeed": deepspeed, "optim": training_arguments.get("optim", "adamw_torch_fused")}
    check_possible(stage, flags, shapes)

    # ---- estimate ----
    parts = estimate(shapes, as_run(flags))
    print(f"{stage}.py on {Path(model_name_or_path).name}: {shapes.weights / 1e9:.2f}e9 weights, {flags['per_device_train_batch_size']} x "
          f"{flags['max_length']:,} tokens at once, {ranks} GPU{'s' * (ranks > 1)}" + f"\n{shapes.assumed}" * bool(shapes.assumed))
    print("\n| what | GB | |\n|---|---|---|")
    for name, size in parts.items():
        if name != "host" and size:
            print(f"| {name} | {size / 1e9:.2f} | {WHAT[name]} |")
    print(f"| sum | {total(parts) / 1e9:.2f} | on each card |")
    if parts["host"]:
        print(f"| RAM | {parts['host'] / 1e9:.1f} | of all ranks together: what is offloaded |")
    print("\n| card | " + " | ".join(f"{card} GB" for card in CARDS) + " |\n" + "|---" * (1 + len(CARDS)) + f"|\n| fits | {verdict(parts)} |")
    if fit:
        given = {"model_name_or_path": model_name_or_path, "data_path": data_path} | given | training_arguments
        print(f"\n{cheapest(stage, flags, shapes, fit, given)}")


def verdict(parts: dict[str, float]) -> str:
    return " | ".join("yes" if total(parts) <= card * 1e9 else "no" for card in CARDS)


def complete(stage: str, given: dict) -> dict:
    """The flags with the stage's defaults for those that are not given; BadInput for one that the stage does not have."""
    defaults = {name: p.default for name, p in inspect.signature(importlib.import_module(stage).main).parameters.items()}
    for name, value in given.items():
        if name not in defaults:
            if name == "bits":
                if value == 16:
                    continue
                raise BadInput(f"--bits={value} cannot be with --stage {stage}, which trains all weights: quantized ones cannot be trained themselves. "
                               f"Take --stage finetune_lora")
            raise BadInput(f"--{name} is not a flag of {stage}.py: leave it out, or take another --stage")
    known = inspect.signature(main).parameters
    own = ("model_name_or_path", "data_path", "training_arguments")
    return {name: default for name, default in defaults.items() if name in known and name not in own} | given


def check_possible(stage: str, flags: dict, shapes: Shapes) -> None:
    """BadInput for flags that cannot be together."""
    zero, bits = read_zero(flags["deepspeed"]) or {}, flags.get("bits", 16)
    if bits < 16 and flags.get("train", "lora") != "lora":
        raise BadInput(f"--bits={bits} needs --train lora: quantized weights cannot be trained themselves")
    if zero.get("stage") == 3 and bits < 16:
        raise BadInput(f"--bits={bits} cannot be spread by ZeRO-3: take ds_configs/zero2.json, or --bits 16")
    offloads = any((zero.get(what) or {}).get("device") == "cpu" for what in ("offload_optimizer", "offload_param"))
    if zero.get("stage") == 3 and flags["ranks"] == 1 and not offloads:
        raise BadInput(f"--deepspeed={flags['deepspeed']}: ZeRO-3 on one GPU without offload has nobody to share with: give --ranks, or take "
                       f"ds_configs/zero3_offload.json")
    if not 0 <= flags.get("freeze_layers", 0) < shapes.layers:
        raise BadInput(f"--freeze_layers={flags['freeze_layers']}: this model has {shapes.layers} layers, leave one at least")
    names = [linear.name for linear in shapes.linears]
    for name in flags.get("lora_target_modules", "all-linear").split(","):
        if name.strip() not in ("all-linear", *names):
            raise BadInput(f"--lora_target_modules: this model has no linear layer {name.strip()!r}, it has {', '.join(sorted(names))}; or take all-linear")


def as_run(flags: dict) -> Run:
    """The run of these flags on GPUs with every block full."""
    precision = "bf16" if flags["precision"] == "auto" else flags["precision"]
    return run_of(flags, tokens=flags["per_device_train_batch_size"] * flags["max_length"], precision=precision, optim=flags["optim"],
                  zero=read_zero(flags["deepspeed"]), ranks=flags["ranks"], gpu=True)


def cheapest(stage: str, flags: dict, shapes: Shapes, fit: float, given: dict) -> str:
    """The command whose run fits, changed by what costs least; RunStopped if there is none.

    What a change costs is a guess: at the time that it takes, and more where a loss of precision or of context is the price.
    """
    batch, steps, length = (flags[name] for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "max_length"))
    lora = "lora_r" in flags and flags.get("train", "lora") == "lora"
    files = ((1, "zero2"), (2, "zero3")) * (flags["ranks"] > 1) + ((4, "zero2_offload"), (6, "zero3_offload"))
    folder = os.path.relpath(Path(__file__).with_name("ds_configs"))
    changes = [  # of each, what it costs and what is changed
        [(0.1 * n, {"per_device_train_batch_size": batch >> n, "gradient_accumulation_steps": steps << n}) for n in range(1, batch.bit_length())],
        [(1, {"gradient_checkpointing": True})] * (not flags["gradient_checkpointing"]),
        [(0.5, {"optim": "adamw_8bit"})] * (not flags["deepspeed"] and "8bit" not in flags["optim"]),
        [(cost, {"bits": bits}) for cost, bits in ((2, 4), (2.5, 8)) if lora and bits < flags["bits"]],
        [(cost, {"deepspeed": f"{folder}/{name}.json"}) for cost, name in files if not flags["deepspeed"]],
        [(5.0 * n, {"max_length": length >> n}) for n in range(1, 5) if length >> n >= 256],
    ]
    found = []
    for choice in itertools.product(*([(0, {}), *ways] for ways in changes)):
        change = {name: value for _, part in choice for name, value in part.items()}
        if {"optim", "deepspeed"} <= change.keys():
            continue  # DeepSpeed keeps fp32 copies whatever the optimizer
        new = flags | change
        try:
            check_possible(stage, new, shapes)
        except BadInput:
            continue
        found.append((sum(cost for cost, _ in choice), total(estimate(shapes, as_run(new))), change))
    fitting = [entry for entry in found if entry[1] <= fit * 1e9]
    if not fitting:
        raise RunStopped(f"no flags make this fit {fit:g} GB: the least is {min(size for _, size, _ in found) / 1e9:.1f} GB. Take more GPUs (--ranks), "
                         f"a smaller model" + ("" if lora else ", or finetune_lora.py, which takes far less"))
    _, size, change = min(fitting, key=lambda entry: entry[:2])
    ram = estimate(shapes, as_run(flags | change))["host"]
    sample = "sample/corpus.txt" if stage == "pretrain_clm" else "sample/instruction.json"
    words = {"data_path": sample} | {name: value for name, value in given.items() if value is not None} | change
    if not os.path.exists(words["model_name_or_path"]):
        words["model_name_or_path"] = f"my/{words['model_name_or_path']}"  # a size, which no script can load
    launcher = f"torchrun --nproc_per_node {flags['ranks']}" if flags["ranks"] > 1 or "deepspeed" in words else "python"
    return (f"to fit {fit:g} GB: {', '.join(f'--{name} {value}' for name, value in change.items()) or 'nothing need change'}; {size / 1e9:.1f} GB on each card"
            + f", {ram / 1e9:.0f} GB of RAM" * (ram > 0)
            + f"\n\n    {launcher} {stage}.py " + " ".join(f"--{name} {shlex.quote(str(value))}" for name, value in words.items()))


def fit_table() -> str:
    """7B and 13B, each way to tune, on each card: the table in the README."""
    offload = str(Path(__file__).with_name("ds_configs") / "zero3_offload.json")
    ways = {**{f"LoRA, {bits} bit": ("finetune_lora", {"bits": bits}) for bits in (4, 8, 16)}, "full": ("finetune", {}),
            "full, `zero3_offload.json`": ("finetune", {"deepspeed": offload})}
    lines = ["| | GB | " + " | ".join(f"{card} GB" for card in CARDS) + " |", "|---" * (2 + len(CARDS)) + "|"]
    for label, size in (("7B", "llama-2-7b"), ("13B", "llama-2-13b")):
        for way, (stage, changes) in ways.items():
            flags = complete(stage, {}) | {"ranks": 1, "deepspeed": None, "optim": "adamw_torch_fused"} | changes
            parts = estimate(read_shapes(size), as_run(flags))
            ram = f" + {parts['host'] / 1e9:.0f} RAM" if parts["host"] else ""
            lines.append(f"| {label}, {way} | {total(parts) / 1e9:.1f}{ram} | {verdict(parts)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    cli(main)
