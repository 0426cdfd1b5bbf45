"""Does it fit? The memory of a training run, part by part, from the shapes of the model and the flags of the script.

Reads   a model's config.json, or the name of a size such as llama-2-7b; nothing is downloaded and nothing is loaded
Writes  a table of what takes how much, which cards hold it, and on request the cheapest flags that make it fit

    python estimate_memory.py --model_name_or_path llama-2-13b --bits 4                        # finetune_lora.py, on which cards?
    python estimate_memory.py --stage finetune --model_name_or_path qwen2.5-7b --fit 40        # what to change for 40 GB
    python estimate_memory.py                                                                  # usual sizes and ways on usual cards

The flags are those of the training script, and so are their defaults. GB are 10^9 bytes, and of a card of 11 GB 11 of them
are counted on, though it holds a little more. Every position is taken for supervised and every block for full, so that a run
can need less. benchmarks/memory.py compares the arithmetic with measured peaks: within 10 % on each row.
"""
import ast
import difflib
import inspect
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Literal, NamedTuple

from utils import BadInput, RunStopped, check_file, check_positive, cli, convert_flags

CARDS = (11, 16, 24, 40, 80)
WHAT = {"weights": "as they lie on the card", "adapters": "A and B of each adapted layer", "gradients": "of what is trained", "optimizer": "its state",
        "activations": "what the backward pass needs of the layers", "head and loss": "one chunk of logits, and the head's gradient",
        "quantisation": "scales, and one layer's weights as they were", "ranks and ZeRO": "buckets, and gathered layers",
        "framework": "CUDA, cuBLAS, fragments"}
LOGITS_AT_ONCE = 2**25  # as in the block "training" of the training scripts
CUDA = 0.7e9  # the driver's context, cuBLAS workspaces, what the allocator cannot fill
# Bytes of state a trained weight, besides itself and its gradient; fused AdamW, the default, needs nothing on top
OPTIMIZERS = {"adamw": 8, "adafactor": 0, "sgd": 0, "rmsprop": 4, "adagrad": 4, "lion": 4, "lomo": 0}
LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")

# (width, inner width, layers, heads, heads of keys, vocabulary, tied) as in the config.json of each model on the hub
_QWEN = {"0.5b": (896, 4864, 24, 14, 2, 151936, True), "1.5b": (1536, 8960, 28, 12, 2, 151936, True), "3b": (2048, 11008, 36, 16, 2, 151936, True),
         "7b": (3584, 18944, 28, 28, 4, 152064, False), "14b": (5120, 13824, 48, 40, 8, 152064, False),
         "32b": (5120, 27648, 64, 40, 8, 152064, False), "72b": (8192, 29568, 80, 64, 8, 152064, False)}
_LLAMA = {"llama-7b": (4096, 11008, 32, 32, 32, 32000, False), "llama-13b": (5120, 13824, 40, 40, 40, 32000, False),
          "llama-2-7b": (4096, 11008, 32, 32, 32, 32000, False), "llama-2-13b": (5120, 13824, 40, 40, 40, 32000, False),
          "llama-2-70b": (8192, 28672, 80, 64, 8, 32000, False), "llama-3-8b": (4096, 14336, 32, 32, 8, 128256, False),
          "llama-3-70b": (8192, 28672, 80, 64, 8, 128256, False), "llama-3.2-1b": (2048, 8192, 16, 32, 8, 128256, True),
          "llama-3.2-3b": (3072, 8192, 28, 24, 8, 128256, True), "chinese-llama-2-7b": (4096, 11008, 32, 32, 32, 55296, False),
          "chinese-llama-2-13b": (5120, 13824, 40, 40, 40, 55296, False), "ziya-llama-13b": (5120, 13824, 40, 40, 40, 39424, False),
          "tinyllama-1.1b": (2048, 5632, 22, 32, 4, 32000, False), "smollm2-135m": (576, 1536, 30, 9, 3, 49152, True)}
_FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size", "tie_word_embeddings")
SIZES = {name: {"model_type": "llama"} | dict(zip(_FIELDS, row)) for name, row in _LLAMA.items()}
SIZES |= {f"qwen2.5-{size}": {"model_type": "qwen2"} | dict(zip(_FIELDS, row)) for size, row in _QWEN.items()}
SIZES |= {"mistral-7b": {"model_type": "mistral"} | dict(zip(_FIELDS, (4096, 14336, 32, 32, 8, 32000, False))),
          "yayi-7b": {"model_type": "bloom", "hidden_size": 4096, "n_layer": 30, "n_head": 32, "vocab_size": 250880}}


class Linear(NamedTuple):
    name: str
    d_in: int
    d_out: int
    bias: bool
    source: str  # what it reads: linears of one source share it


class Shapes(NamedTuple):
    """What the estimate needs to know of a model: D = width, F = inner width, V = vocabulary."""
    kind: str
    vocabulary: int
    width: int
    inner: int
    layers: int
    heads: int
    linears: tuple[Linear, ...]  # of one layer
    in_norms: int  # weights of one layer's norms
    outside: int  # weights of the norms outside of the layers
    tied: bool
    assumed: str  # what is not known, and taken for granted

    def count(self) -> int:
        """Weights of the linears of all layers."""
        return self.layers * sum(linear.d_in * linear.d_out + linear.bias * linear.d_out for linear in self.linears)

    @property
    def table(self) -> int:
        """Weights of the embedding, and of the head."""
        return self.vocabulary * self.width

    @property
    def weights(self) -> int:
        return self.count() + self.layers * self.in_norms + self.outside + (1 if self.tied else 2) * self.table


class Run(NamedTuple):
    """What the estimate needs to know of a run, in the words of the flags.

    Args:
        train: full, embeddings or lora; lora with tables trains embedding and head besides, as pretrain_clm.py does.
        tokens: Of the longest micro-batch.
        supervised: Of them; None: all.
        zero: The section zero_optimization of the DeepSpeed file; None without DeepSpeed.
        gpu: Else on the CPU.
    """
    train: str
    tokens: int
    supervised: int | None = None
    tables: bool = False
    bits: int = 16
    lora_r: int = 8
    lora_dropout: float = 0.05
    lora_target_modules: str = "all-linear"
    use_dora: bool = False
    freeze_layers: int = 0
    gradient_accumulation_steps: int = 8
    precision: str = "bf16"
    gradient_checkpointing: bool = True
    optim: str = "adamw_torch_fused"
    zero: dict | None = None
    ranks: int = 1
    gpu: bool = True


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
    run: str | None = None,
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
        run: Flags of a run that is about to start, a word a line, as the wrappers give them: say in one line whether it fits here; exit status 1: it does not.
        training_arguments: Any other field of transformers.TrainingArguments, such as --max_steps or --report_to.
    """
    flags = dict(locals())
    if fit < 0:
        raise BadInput(f"--fit={fit:g} is no size of a card in GB")
    if run is not None:
        return announce(stage, run.splitlines(), ranks)
    others = ("stage", "model_name_or_path", "data_path", "ranks", "fit", "run", "training_arguments")
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


def announce(stage: str, words: list[str], ranks: int) -> None:
    """One line on the standard error about a run that is about to start; RunStopped where it will hardly fit, nothing where there is no estimate."""
    given = dict(word.removeprefix("--").split("=", 1) if "=" in word else (word.removeprefix("--"), value)
                 for word, value in zip(words, [*words[1:], ""]) if word.startswith("--"))
    known = inspect.signature(main).parameters.keys() & flags_of(stage).keys()
    try:
        given = convert_flags(main, {name: text for name, text in given.items() if name in known | {"deepspeed", "optim"}})
        shapes = read_shapes(given["model_name_or_path"])
        flags = complete(stage, {name: value for name, value in given.items() if name in known - {"model_name_or_path", "data_path"}})
        flags |= {"ranks": ranks, "deepspeed": given.get("deepspeed"), "optim": given.get("optim", "adamw_torch_fused")}
        free = free_memory()
        parts = estimate(shapes, as_run(flags)._replace(gpu=free is not None, **{} if free else {"precision": "fp32"}))
    except (BadInput, OSError, KeyError) as problem:  # it may well be trained all the same
        return print(f"memory: no estimate ({problem})", file=sys.stderr)
    where, needed = "the smallest GPU", total(parts)
    if free is None:
        where, needed = "this machine", total(parts) * ranks
        free = int(re.search(r"MemAvailable: +(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024
    sizes = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items() if size > 0.005 * needed)
    print(f"memory (estimate): {needed / 1e9:.2f} GB for full blocks ({sizes}); {where} has {free / 1e9:.1f} GB free"
          + f"; {shapes.assumed}" * bool(shapes.assumed), file=sys.stderr)
    if needed > free:
        raise RunStopped(f"this will hardly fit: estimate_memory.py --stage {stage} --fit {free / 1e9:.0f}, with these flags, says what to change")


def free_memory() -> int | None:
    """Bytes that are free on the GPU that has least, of those that are to be used; None without one."""
    asked = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    if used := os.environ.get("CUDA_VISIBLE_DEVICES"):
        asked.append(f"--id={used}")
    try:
        found = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return min(int(size) for size in found) * 2**20 if found and os.environ.get("CUDA_VISIBLE_DEVICES") != "" else None


def flags_of(stage: str) -> dict:
    """{flag: default} of a training script, read from its source: an import would need what it needs."""
    tree = ast.parse(Path(__file__).with_name(f"{stage}.py").read_text("utf-8"))
    arguments = next(node.args for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    return {flag.arg: default and ast.literal_eval(default) for flag, default in zip(arguments.kwonlyargs, arguments.kw_defaults)}


def complete(stage: str, given: dict) -> dict:
    """The flags with the stage's defaults for those that are not given; BadInput for one that the stage does not have."""
    defaults = flags_of(stage)
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


# ==== arithmetic ====
# What is kept for each weight and each token, and when it is most: documents packed without a mask, a head that runs in chunks, one input
# per layer under gradient checkpointing.
def read_shapes(model_name_or_path: str) -> Shapes:
    """The shapes of a model folder, a config.json or one of SIZES; BadInput for another name, which would be a download."""
    path = Path(model_name_or_path)
    file = path / "config.json" if path.is_dir() else path
    if file.is_file():
        try:
            return shapes_of(json.loads(file.read_text("utf-8")), str(file))
        except (json.JSONDecodeError, UnicodeDecodeError) as problem:
            raise BadInput(f"{file} is no config.json: {problem}") from None
    if path.is_dir():
        raise BadInput(f"{path} has no config.json, so it is no model")
    name = re.sub(r"(-(hf|instruct|chat|base|v\d\.\d))+$", "", path.name.lower())
    if name not in SIZES:
        near = difflib.get_close_matches(name, SIZES, n=1, cutoff=0)[0]
        raise BadInput(f"{model_name_or_path} is no folder, no config.json and no size that is known here (nothing is downloaded): did you mean {near}? "
                       f"Known: {', '.join(SIZES)}")
    return shapes_of(SIZES[name], name)


def shapes_of(config: dict, where: str) -> Shapes:
    """The shapes that a configuration describes; BadInput if it lacks one."""
    if not isinstance(config, dict):
        raise BadInput(f"{where} holds a {type(config).__name__}, no configuration of a model")
    config = config | (config.get("text_config") or {})
    kind = str(config.get("model_type"))

    def field(*names, default=None) -> int:
        found = next((config[name] for name in names if config.get(name) is not None), default)
        if found is None:
            raise BadInput(f"{where} has no {names[0]} (it has {', '.join(sorted(config)[:12])}): the estimate needs it")
        if not isinstance(found, int) or found < 1:
            raise BadInput(f"{where}: {names[0]} is {found!r}, the estimate needs a number above zero")
        return found

    width, layers = field("hidden_size", "n_embed", "n_embd"), field("num_hidden_layers", "n_layer")
    heads, vocabulary = field("num_attention_heads", "n_head"), field("vocab_size")
    if kind == "bloom":
        linears = (Linear("query_key_value", width, 3 * width, True, "norm1"), Linear("dense", width, width, True, "attention"),
                   Linear("dense_h_to_4h", width, 4 * width, True, "norm2"), Linear("dense_4h_to_h", 4 * width, width, True, "inner"))
        return Shapes(kind, vocabulary, width, 4 * width, layers, heads, linears, 4 * width, 4 * width, True, "")
    size = field("head_dim", default=max(1, width // heads))
    inner, key = field("intermediate_size"), field("num_key_value_heads", default=heads) * size
    bias = bool(config.get("attention_bias", kind == "qwen2"))
    linears = (Linear("q_proj", width, heads * size, bias, "norm1"), Linear("k_proj", width, key, bias, "norm1"), Linear("v_proj", width, key, bias, "norm1"),
               Linear("o_proj", heads * size, width, bias and kind != "qwen2", "attention"),
               *(Linear(name, width, inner, bool(config.get("mlp_bias")), "norm2") for name in ("gate_proj", "up_proj")),
               Linear("down_proj", inner, width, bool(config.get("mlp_bias")), "inner"))
    assumed = "" if kind in LLAMA_LIKE else f"the architecture {kind} is not known here: layers as LLaMA's are assumed"
    if experts := config.get("num_local_experts") or config.get("num_experts"):
        assumed += f", each with one inner layer, not with its {experts} experts, so this is too little"
    norms = 2 * width + (2 * size if kind == "qwen3" else 0)
    return Shapes(kind, vocabulary, width, inner, layers, heads, linears, norms, width, bool(config.get("tie_word_embeddings")), assumed)


def estimate(shapes: Shapes, run: Run) -> dict[str, float]:
    """Bytes on one card, by what they are for, at the moment when they are most; "host" are those in RAM besides."""
    full, tokens = run.train == "full", run.tokens
    computed = 4 if run.precision == "fp32" else 2  # bytes of a number that is computed with
    autocast = computed == 2 and run.zero is None
    master = 4 if run.zero is None else computed  # bytes of a trained weight on the card
    targets = [name.strip() for name in run.lora_target_modules.split(",")] if run.train == "lora" else []
    adapted = [linear for linear in shapes.linears if {"all-linear", linear.name} & {*targets}]

    # ---- what is there all the time ----
    tables = (1 if shapes.tied else 2) * shapes.table
    adapters = shapes.layers * sum(run.lora_r * (linear.d_in + linear.d_out) + run.use_dora * linear.d_out for linear in adapted)
    trained = {"full": shapes.weights, "embeddings": tables, "lora": tables * run.tables}[run.train]
    if run.freeze_layers:  # the embedding as well
        trained -= run.freeze_layers * (shapes.count() // shapes.layers + shapes.in_norms) + shapes.table
    trains_head = trained >= tables or (full and not shapes.tied)
    frozen = shapes.weights - (0 if run.train == "lora" else trained)  # under LoRA the trained tables are copies
    quantized = shapes.count() if run.bits < 16 else 0
    scales = 0.0
    if run.bits == 8:  # one in fp32 for each row
        scales = 4 * shapes.layers * sum(linear.d_out for linear in shapes.linears)
    elif run.bits == 4:  # one in 8 bit for each 64 weights, and for each 256 of them one in fp32
        scales = quantized / 64 * (1 + 4 / 256)
    weights = trained * master + (frozen - quantized) * (master if full else computed) + quantized * run.bits / 8
    gradients = (trained + adapters) * master
    optimizer = optimizer_bytes(run.optim, trained + adapters, tables if trains_head else 0)
    buffers = gradients if run.ranks > 1 and run.zero is None else 0  # DDP's buckets
    host = 0.0
    if run.zero is not None:
        zero, stage, bucket = run.zero, run.zero.get("stage", 0), min(trained + adapters, shapes.width**2)
        optimizer += 4 * (trained + adapters) * (computed == 2)  # its own copy in fp32
        optimizer /= run.ranks if stage >= 1 else 1
        gradients /= run.ranks if stage >= 2 else 1
        buffers = 2 * computed * bucket + computed * min(trained + adapters, zero.get("allgather_bucket_size", 5e8)) if stage < 3 else 0
        if stage == 3:
            weights, buffers = weights / run.ranks, computed * min(shapes.weights, zero.get("stage3_max_live_parameters", 1e9))
        if (zero.get("offload_optimizer") or {}).get("device") == "cpu":
            host, optimizer, gradients = 16 * (trained + adapters), 0, min(gradients, 2 * computed * bucket)
        if (zero.get("offload_param") or {}).get("device") == "cpu":
            host, weights = host + computed * shapes.weights, 0

    # ---- what comes and goes with the tokens ----
    stream = 4 if autocast and trained else computed  # of the hidden states between layers: an fp32 embedding makes them fp32
    kept, held, working = layer_bytes(shapes, run, adapted, computed, stream)
    layers, inputs = shapes.layers - run.freeze_layers, tokens * shapes.width * stream
    activations = layers * (inputs + held * tokens if run.gradient_checkpointing else kept * tokens)
    again = kept * tokens - inputs * (stream == 4) if run.gradient_checkpointing else 0  # of the layer that is recomputed; its norm keeps the input
    copies = computed * shapes.count() if full and autocast else 0  # what autocast has cast stays until the forward pass is over
    before = gradients if run.gradient_accumulation_steps > 1 or run.zero is not None else 0
    head = head_bytes(shapes, run, computed, stream, trains_head * master * shapes.table, trains_head * autocast * computed * shapes.table)
    second_table = shapes.table * master * (trained > 0 and (shapes.tied or before > 0))  # a gradient that is added to one that is there
    whole = max(linear.d_in * linear.d_out for linear in shapes.linears) * computed * (run.bits < 16 or run.use_dora)  # dequantized, or added up
    of_head = trains_head * master * shapes.table
    # Gradients appear as activations go, from the last layer to the first, so that the ends are enough
    moments = {  # gradients, activations, head and loss, quantisation buffers
        "head": (before, activations + copies, head, 0),
        "last layer": (max(before, min(gradients, of_head)), activations + again + working * tokens + copies * (not run.gradient_checkpointing),
                       shapes.width * stream * (tokens if run.supervised is None else run.supervised), whole),
        "first layer": (gradients, (kept + working) * tokens + inputs, 0, whole),
        "embedding": (gradients, 0, second_table, 0),
        "step": (gradients, 0, 4 * (trained + adapters) * (run.optim == "adamw_torch" and run.gpu), 0),  # its roots, of all weights at once
    }
    gradients, activations, head, whole = max(moments.values(), key=sum)
    return {"weights": weights, "adapters": adapters * master, "gradients": gradients, "optimizer": optimizer, "activations": activations,
            "head and loss": head, "quantisation": scales + whole, "ranks and ZeRO": buffers, "framework": CUDA if run.gpu else 0, "host": host}


def head_bytes(shapes: Shapes, run: Run, computed: int, stream: int, gradient: int, copy: int) -> float:
    """Bytes of the final norm, the head and the loss while a chunk of logits is there.

    Args:
        gradient: Bytes of the head's gradient, if it is trained.
        copy: Bytes of the head as autocast casts it, if it does.
    """
    supervised = run.tokens if run.supervised is None else run.supervised
    logits = min(supervised, max(1, LOGITS_AT_ONCE // shapes.vocabulary)) * shapes.vocabulary
    states = 2 * supervised * shapes.width * stream  # the supervised ones, and their gradient
    if run.zero is not None and run.zero.get("stage") == 3:  # plain autograd: logits, in fp32, their logarithms and the gradients of these
        return states + logits * (2 * computed + 12)
    norm = run.tokens * shapes.width * (8 + 2 * stream)
    # Logits, what the softmax casts and gives; then logits, gradient, and the head's gradient of this chunk beside that of all
    return norm + states + gradient + copy + max(logits * (8 if computed == 4 else 10), logits * 8 + gradient + copy)


def layer_bytes(shapes: Shapes, run: Run, adapted: list[Linear], computed: int, stream: int) -> tuple[float, float, float]:
    """Bytes a token that autograd keeps of one layer, those of them that gradient checkpointing does not drop, and what backward needs besides.

    Args:
        adapted: Linears with a LoRA update.
        computed: Bytes of a number inside of the layer.
        stream: Bytes of a number between layers.
    """
    full, width, kept, held = run.train == "full", shapes.width, 0.0, 0.0
    dropped = run.lora_dropout > 0 and bool(adapted)
    mask = 1 if run.gpu else computed  # of dropout
    for source in dict.fromkeys(linear.source for linear in shapes.linears):
        readers = [linear for linear in shapes.linears if linear.source == source]
        updates = sum(linear in adapted for linear in readers)
        if source.startswith("norm"):
            kept += 4 * width + 4 + stream * width * full  # its input in fp32, a root, and what its weight multiplies
        inputs = len(readers) if full else updates
        if not (stream > computed and source.startswith("norm")) and not (dropped and updates):
            inputs = min(inputs, 1)  # one for all; else autocast or dropout makes one for each
        held += readers[0].d_in * computed * (run.bits == 8)  # bitsandbytes hangs it on the graph, where no hook of checkpointing finds it
        kept += readers[0].d_in * inputs * (computed + mask * (dropped and updates > 0)) + updates * computed * run.lora_r
    queries_keys_values = sum(linear.d_out for linear in shapes.linears if linear.source == "norm1")
    attended = next(linear.d_in for linear in shapes.linears if linear.source == "attention")
    kept += computed * (queries_keys_values + attended) + 4 * shapes.heads  # and the logarithms of the sums
    kept += computed * shapes.inner * (2 if shapes.kind == "bloom" else 3)  # the inner layer, its activation, and what gates it
    return kept + held, held, stream * width + computed * shapes.inner * (1 if dropped else 2)


def optimizer_bytes(optim: str, trained: int, tables: int) -> float:
    """State of an optimizer, AdamW's if it is not known; bitsandbytes keeps that of embeddings in fp32."""
    each = next((size for name, size in OPTIMIZERS.items() if name in optim), 8)
    return each * (trained - tables) / 4 + each * min(trained, tables) if "8bit" in optim else each * trained


def run_of(flags: dict, *, tokens: int, precision: str, optim: str, zero: dict | None, ranks: int, gpu: bool) -> Run:
    """The run that a training script's flags describe; those that it does not have are left at their defaults."""
    train = flags.get("train") or ("lora" if "lora_r" in flags else "full")
    known = {name: flags[name] for name in Run._fields if flags.get(name) is not None}
    return Run(**known | dict(train=train, tables="train" in flags and train == "lora", tokens=tokens, precision=precision, optim=optim, zero=zero,
                              ranks=ranks, gpu=gpu))


def read_zero(path: str | None) -> dict | None:
    """The section zero_optimization of a DeepSpeed file; None without one."""
    try:
        return None if path is None else json.loads(Path(path).read_text("utf-8")).get("zero_optimization", {})
    except (OSError, json.JSONDecodeError, AttributeError) as problem:
        raise BadInput(f"--deepspeed={path} cannot be read: {problem}") from None


def total(parts: dict[str, float]) -> float:
    """Bytes on the card."""
    return sum(size for name, size in parts.items() if name != "host")


if __name__ == "__main__":
    cli(main)
