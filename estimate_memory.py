"""Does it fit? The memory of a training run, part by part, from the shapes of the model and the flags of the script.

Reads   a model's config.json, or the name of a size such as llama-2-7b; nothing is downloaded and nothing is loaded
Writes  a table of what takes how much, which cards hold it, and on request the cheapest flags that make it fit

    python estimate_memory.py --model_name_or_path llama-2-13b --bits 4                        # finetune_lora.py, on which cards?
    python estimate_memory.py --stage finetune --model_name_or_path qwen2.5-7b --fit 40        # what to change for 40 GB
    python estimate_memory.py                                                                  # usual sizes and ways on usual cards

The flags are those of the training script, and so are their defaults: a wrapper hands over the command line of its run, with --verdict. GB are
10^9 bytes. Every block is taken for full and every position for supervised, so that a run can need less. The arithmetic follows what the blocks
of the training scripts allocate: documents packed without a mask, a head in chunks, one input per layer under gradient checkpointing.
benchmarks/memory.py holds it against measured peaks: within 10 % on each row.
"""
import ast
import contextlib
import difflib
import inspect
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Literal, NamedTuple, get_args, get_origin

from utils import BadInput, RunStopped, check_file, check_positive, cli, training_argument_kinds

DS_CONFIGS = Path(__file__).with_name("ds_configs")
STAGES = ("finetune_lora", "finetune", "finetune_multi_rounds", "pretrain_clm", "train_reward", "train_dpo", "train_ppo")
ABOVE_ZERO = ("fit", "nnodes", "ranks", "max_length", "lora_r", "per_device_train_batch_size", "gradient_accumulation_steps",
              "per_device_rollout_batch_size", "max_new_tokens")
CARDS = (11, 16, 24, 40, 80)
VISIBLE = os.environ.get("CUDA_VISIBLE_DEVICES")  # read here, since cli() leaves one GPU of them
LOGITS_AT_ONCE = 2**25  # as in the training scripts
CUDA = 0.7e9  # the driver's context, cuBLAS workspaces, what the allocator cannot fill
# Bytes of state a trained weight, besides itself and its gradient; fused AdamW, the default, needs nothing on top
OPTIMIZERS = {"adamw": 8, "adafactor": 0, "sgd": 0, "rmsprop": 4, "adagrad": 4, "lion": 4, "lomo": 0}
WHAT = {"weights": "as they lie on the card", "adapters": "A and B of each adapted layer", "gradients": "of what is trained", "optimizer": "its state",
        "activations": "what the backward pass needs of the layers", "head and loss": "one chunk of logits, and the head's gradient",
        "quantisation": "scales, and one layer's weights as they were", "ranks and ZeRO": "buckets, and gathered layers",
        "framework": "CUDA, cuBLAS, fragments", "sum": "on each card", "RAM": "of all ranks together: what is offloaded"}
# Width, inner width, layers, heads, heads of keys, vocabulary, is the head tied, as in the config.json of each model on the hub
SIZES = {
    "llama-7b": (4096, 11008, 32, 32, 32, 32000), "llama-13b": (5120, 13824, 40, 40, 40, 32000), "llama-2-7b": (4096, 11008, 32, 32, 32, 32000),
    "llama-2-13b": (5120, 13824, 40, 40, 40, 32000), "llama-2-70b": (8192, 28672, 80, 64, 8, 32000), "llama-3-8b": (4096, 14336, 32, 32, 8, 128256),
    "llama-3-70b": (8192, 28672, 80, 64, 8, 128256), "llama-3.2-1b": (2048, 8192, 16, 32, 8, 128256, True),
    "llama-3.2-3b": (3072, 8192, 28, 24, 8, 128256, True), "tinyllama-1.1b": (2048, 5632, 22, 32, 4, 32000), "mistral-7b": (4096, 14336, 32, 32, 8, 32000),
    "smollm2-135m": (576, 1536, 30, 9, 3, 49152, True), "chinese-llama-2-7b": (4096, 11008, 32, 32, 32, 55296),
    "chinese-llama-2-13b": (5120, 13824, 40, 40, 40, 55296), "ziya-llama-13b": (5120, 13824, 40, 40, 40, 39424),
    "yayi-7b": (4096, 16384, 30, 32, 32, 250880, True), "qwen2.5-0.5b": (896, 4864, 24, 14, 2, 151936, True),
    "qwen2.5-1.5b": (1536, 8960, 28, 12, 2, 151936, True), "qwen2.5-3b": (2048, 11008, 36, 16, 2, 151936, True),
    "qwen2.5-7b": (3584, 18944, 28, 28, 4, 152064), "qwen2.5-14b": (5120, 13824, 48, 40, 8, 152064), "qwen2.5-32b": (5120, 27648, 64, 40, 8, 152064),
    "qwen2.5-72b": (8192, 29568, 80, 64, 8, 152064)}
FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size", "tie_word_embeddings")


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

    def count(self) -> int:  # weights of the linears of all layers
        return self.layers * sum(linear.d_in * linear.d_out + linear.bias * linear.d_out for linear in self.linears)

    @property
    def table(self) -> int:  # weights of the embedding, and of the head
        return self.vocabulary * self.width

    @property
    def weights(self) -> int:
        return self.count() + self.layers * self.in_norms + self.outside + (1 if self.tied else 2) * self.table


class Run(NamedTuple):
    """What the estimate needs to know of a run, in the words of the flags."""
    train: str  # full, embeddings or lora
    tokens: int  # of the longest micro-batch
    supervised: int | None = None  # of them; None: all
    tables: bool = False  # are embedding and head trained besides, as pretrain_clm.py does under LoRA
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
    zero: dict | None = None  # the section zero_optimization of the DeepSpeed file; None without DeepSpeed
    ranks: int = 1
    gpu: bool = True  # else on the CPU
    critic: bool = False  # train_ppo.py: an adapter more that is trained
    judge: float = 0.0  # train_ppo.py: weights of the reward model, in the precision of the run; those of an adapter at least
    answers: int = 0  # train_ppo.py: sampled at once
    max_length: int = 0  # tokens of one of them with its prompt
    max_new_tokens: int = 0


# ---- the flags of the training scripts ----
def script_of(stage: str):
    """main of a training script without its body: its flags, and what it says of them. The source is read, nothing is imported."""
    file = Path(__file__).with_name(f"{stage}.py")
    if not file.is_file():
        raise BadInput(f"--stage={stage}: {file.name} does not stand beside estimate_memory.py, which takes its flags from there")
    head = next(node for node in ast.parse(file.read_text("utf-8")).body if getattr(node, "name", "") == "main")
    head.body, names = head.body[:1], {"Literal": Literal}  # the docstring is left
    exec(compile(ast.Module([head], []), str(file), "exec"), names)
    return names["main"]


def taking_the_flags_of_stages(main):
    """`main`, to which any flag of a training script may be given as well, with the type and the line of help that it has there."""
    *own, rest = inspect.signature(main).parameters.values()
    flags, about = {}, {}
    for script in (script_of(stage) for stage in STAGES if Path(__file__).with_name(f"{stage}.py").is_file()):
        for name, p in inspect.signature(script).parameters.items():
            if choices := [*get_args(flags[name].annotation), *get_args(p.annotation)] if name in flags and get_origin(p.annotation) is Literal else []:
                p = p.replace(annotation=Literal[tuple(choices)])  # another stage has others
            flags |= {name: p.replace(default=None)} if p.kind is p.KEYWORD_ONLY else {}
        about |= {line.strip().partition(":")[0]: line for line in script.__doc__.splitlines()}
    flags = {name: p for name, p in flags.items() if p.name not in {p.name for p in own}}
    main.__signature__ = inspect.Signature([*own, *flags.values(), rest])
    main.__doc__ = "\n".join([main.__doc__.rstrip(), *map(about.get, flags)])
    return main


@taking_the_flags_of_stages
def main(
    *,
    stage: Literal[STAGES] = "finetune_lora",
    model_name_or_path: str | None = None,
    ranks: int = 1,
    nnodes: int = 1,
    fit: float | None = None,
    verdict: Literal["warn", "stop"] | None = None,
    **given,
):
    """Estimate the memory of a training run; model_name_or_path may be a config.json or a size such as llama-2-7b as well.

    Args:
        stage: The training script, without .py.
        model_name_or_path: Folder or hub name of the base model.
        ranks: Number of GPUs, of each machine.
        nnodes: Number of machines.
        fit: Size of a card in GB: print the cheapest flags with which it is enough.
        verdict: Say in a line or two whether the run fits what is free on this machine: warn where it does not, or stop, with exit status 3.
        given: Any other flag of the training script or field of transformers.TrainingArguments; what takes no memory is passed over.
    """
    if model_name_or_path is None:
        return print(fit_table())

    # ---- load ----
    try:
        flags = complete(stage, given) | {"ranks": ranks * nnodes, "nnodes": nnodes, "fit": fit}
        check_positive(**{name: flags[name] for name in ABOVE_ZERO if flags.get(name) is not None})
        check_file("deepspeed", flags["deepspeed"])
        shapes = read_shapes(flags.get("config_name") or model_name_or_path)
        if problem := impossible(flags, shapes):
            raise BadInput(problem)
        if verdict:
            return compare(flags, shapes, verdict == "stop")
    except BadInput as problem:
        if not verdict:
            raise
        return print(f"memory: no estimate, {str(problem).partition(', did you mean')[0]}")  # no reason to hold the run up

    # ---- estimate ----
    parts = estimate(shapes, as_run(flags))
    print(f"{stage}.py on {Path(model_name_or_path).name}: {shapes.weights / 1e9:.2f}e9 weights, {flags['per_device_train_batch_size']} x "
          f"{flags['max_length']:,} tokens at once, {flags['ranks']} GPU{'s' * (flags['ranks'] > 1)}" + f"\n{shapes.assumed}" * bool(shapes.assumed))
    print("\n| what | GB | |\n|---|---|---|")
    for name, size in (parts | {"sum": total(parts), "RAM": parts["host"]}).items():
        if name in WHAT and size:
            print(f"| {name} | {size / 1e9:.{1 if name == 'RAM' else 2}f} | {WHAT[name]} |")
    print("\n| card | " + " | ".join(f"{card} GB" for card in CARDS) + " |\n" + "|---" * (1 + len(CARDS)) + f"|\n| fits | {fits(parts)} |")
    if fit:
        change, parts = cheapest(flags, shapes, fit)
        print(f"\nto fit {fit:g} GB: {in_words(change) or 'nothing need change'}; {total(parts) / 1e9:.1f} GB on each card"
              + f", {parts['host'] / 1e9:.0f} GB of RAM" * (parts["host"] > 0))
        sample = {"pretrain_clm": "corpus.txt", "train_reward": "preference.json", "train_dpo": "preference.json", "train_ppo": "prompts.jsonl"}
        rules = {"rules": "sample/rules.py:finished=1"} if stage == "train_ppo" and not given.get("reward_model") else {}
        words = {"data_path": f"sample/{sample.get(stage, 'instruction.json')}", "model_name_or_path":
                 "my/" * (not os.path.exists(model_name_or_path)) + model_name_or_path} | rules | given | change  # no script can load a size
        launcher = f"torchrun --nproc_per_node {ranks}" if ranks > 1 or "deepspeed" in words else "python"
        print(f"\n    {launcher} {stage}.py {in_words(words)}")


def in_words(flags: dict) -> str:
    return " ".join(f"--{name} {shlex.quote(str(value))}" for name, value in flags.items())


def fits(parts: dict[str, float]) -> str:
    return " | ".join("yes" if total(parts) <= card * 1e9 else "no" for card in CARDS)


def complete(stage: str, given: dict) -> dict:
    """The flags with the stage's defaults for those that are not given, on a GPU; BadInput for one that only other stages have."""
    parameters = inspect.signature(script_of(stage)).parameters
    foreign = given.keys() & inspect.signature(main).parameters.keys() - parameters.keys()
    if foreign and any(p.kind is p.VAR_KEYWORD for p in parameters.values()):  # train_ppo.py names some that the others take as transformers' own
        foreign -= training_argument_kinds().keys()
    for name in foreign:
        others = [other for other in STAGES if name in inspect.signature(script_of(other)).parameters]
        raise BadInput(f"--{name} is not a flag of {stage}.py: leave it out, or take --stage {' or '.join(others)}")
    for name in given.keys() & parameters.keys():
        if get_origin(kind := parameters[name].annotation) is Literal and given[name] not in get_args(kind):
            raise BadInput(f"--{name}={given[name]} is not one of {', '.join(map(str, get_args(kind)))}, which --stage {stage} takes")
    defaults = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
    return {"deepspeed": None, "optim": "adamw_torch_fused", "ranks": 1, "gpu": True, "stage": stage} | defaults | given


def impossible(flags: dict, shapes: Shapes) -> str | None:
    """Why these flags cannot be together; None if they can."""
    zero, bits = read_zero(flags["deepspeed"]) or {}, flags.get("bits", 16)
    if bits < 16 and flags.get("train", "lora") != "lora":
        return f"--bits={bits} needs --train lora: quantized weights cannot be trained themselves"
    if zero.get("stage") == 3 and bits < 16:
        return f"--bits={bits} cannot be spread by ZeRO-3: take ds_configs/zero2.json, or --bits 16"
    offloads = any((zero.get(what) or {}).get("device") == "cpu" for what in ("offload_optimizer", "offload_param"))
    if zero.get("stage") == 3 and flags["ranks"] == 1 and not offloads:
        return f"--deepspeed={flags['deepspeed']}: ZeRO-3 on one GPU has nobody to share with: give --ranks, or take ds_configs/zero3_offload.json"
    if not 0 <= flags.get("freeze_layers", 0) < shapes.layers:
        return f"--freeze_layers={flags['freeze_layers']}: this model has {shapes.layers} layers, leave one at least"
    names = [linear.name for linear in shapes.linears]
    if unknown := {name.strip() for name in flags.get("lora_target_modules", "all-linear").split(",")} - {"all-linear", *names}:
        return f"--lora_target_modules: this model has no linear layer {min(unknown)!r}, it has {', '.join(sorted(names))}; or take all-linear"


def compare(flags: dict, shapes: Shapes, stop: bool) -> None:
    """Print what the run takes of what is free on this machine, and what to change where it does not fit; RunStopped if it is to stop then."""
    cards, ram = free_memory()
    flags["gpu"] = bool(cards)
    parts = estimate(shapes, as_run(flags))
    needed, free = total(parts), min(cards, default=ram)
    sizes = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items() if size > 0.02 * needed and name != "host")
    print(f"memory (estimate): {needed / 1e9:.2f} of {free / 1e9:.2f} GB free on {'each GPU' if cards else 'this machine, which has no GPU'}"
          + f" and {parts['host'] / flags['nnodes'] / 1e9:.0f} of {ram / 1e9:.0f} GB of RAM" * (parts["host"] > 0)
          + f", for {flags['per_device_train_batch_size']} x {flags['max_length']:,} tokens at once ({sizes})" + f"; {shapes.assumed}" * bool(shapes.assumed))
    if needed <= free and parts["host"] <= ram * flags["nnodes"]:
        return
    try:
        change, parts = cheapest(flags, shapes, free / 1e9, ram * flags["nnodes"])
        advice = f"what costs least to change is {in_words(change)} ({total(parts) / 1e9:.2f} GB)"
    except RunStopped as problem:
        advice = str(problem)
    print(f"memory: this will hardly fit; {advice}")
    if stop:
        raise RunStopped("the run does not fit", status=3)


def free_memory() -> tuple[list[int], int]:
    """Bytes that are free, on each visible GPU and in RAM."""
    shown, query = "", ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits", *([f"--id={VISIBLE}"] if VISIBLE else [])]
    if VISIBLE not in ("", "-1") and shutil.which("nvidia-smi"):  # else the run does not see a GPU, even if there is one
        shown = subprocess.run(query, capture_output=True, text=True).stdout
    cards = [int(size) * 2**20 for size in re.findall(r"^\d+$", shown, re.M)]
    if not cards and VISIBLE not in ("", "-1", None):
        raise BadInput(f"nvidia-smi does not say what is free on GPU {VISIBLE}")
    return cards, int(re.search(r"MemAvailable: +(\d+)", Path("/proc/meminfo").read_text())[1]) * 2**10


def cheapest(flags: dict, shapes: Shapes, fit: float, ram: float = float("inf")) -> tuple[dict, dict[str, float]]:
    """The flags whose change costs least to fit `fit` GB on each card, and the estimate with them; RunStopped if there are none."""
    batch, steps, length = flags["per_device_train_batch_size"], flags.get("gradient_accumulation_steps"), flags["max_length"]
    answers = flags.get("per_device_rollout_batch_size", 1)
    lora = "lora_r" in flags and flags.get("train", "lora") == "lora"
    files = ((1, "zero2"), (2, "zero3")) * (flags["ranks"] > 1) + ((4, "zero2_offload"), (6, "zero3_offload"))
    changes = [  # what each costs, a guess (the time that it takes; more where precision or context is the price), and what is changed
        [(0.1 * n, {"per_device_train_batch_size": batch >> n} | ({"gradient_accumulation_steps": steps << n} if steps else {}))
         for n in range(1, batch.bit_length())],
        [(0.3 * n, {"per_device_rollout_batch_size": answers >> n}) for n in range(1, answers.bit_length())],
        [(1, {"gradient_checkpointing": True})] * (not flags["gradient_checkpointing"]),
        [(0.5, {"optim": "adamw_8bit"})] * (flags["gpu"] and not flags["deepspeed"] and "8bit" not in flags["optim"] and bool(steps)),
        [(cost, {"bits": bits}) for cost, bits in ((2, 4), (2.5, 8)) if lora and bits < flags["bits"]],
        [(cost, {"deepspeed": os.path.relpath(DS_CONFIGS / f"{name}.json")}) for cost, name in files if flags["gpu"] and not flags["deepspeed"] and steps],
        [(5.0 * n, {"max_length": length >> n}) for n in range(1, 5) if length >> n >= max(256, 2 * flags.get("max_new_tokens", 0))],
    ]
    found = []  # what it costs, what it takes, what is changed, the estimate
    for choice in itertools.product(*([(0, {}), *ways] for ways in changes)):
        change = {name: value for _, part in choice for name, value in part.items()}
        if not {"optim", "deepspeed"} <= change.keys() and not impossible(flags | change, shapes):  # DeepSpeed keeps fp32 copies whatever the optimizer
            parts = estimate(shapes, as_run(flags | change))
            found.append((sum(cost for cost, _ in choice), total(parts), change, parts))
    fitting = [entry for entry in found if entry[1] <= fit * 1e9 and entry[3]["host"] <= ram]
    if not fitting:
        _, least, _, parts = min(found, key=lambda entry: entry[1])
        raise RunStopped(f"no flags make this fit {fit:.4g} GB: the least is {least / 1e9:.1f} GB, and {parts['host'] / 1e9:.0f} of RAM. "
                         f"Take more GPUs, a smaller model" + ("" if lora else ", or finetune_lora.py, which takes far less"))
    return min(fitting, key=lambda entry: entry[:2])[2:]


def fit_table() -> str:
    """7B and 13B, each way to tune, on each card: the table in the README."""
    ways = {**{f"LoRA, {bits} bit": ("finetune_lora", {"bits": bits}) for bits in (4, 8, 16)}, "full": ("finetune", {}),
            "full, `zero3_offload.json`": ("finetune", {"deepspeed": str(DS_CONFIGS / "zero3_offload.json")})}
    lines = ["| | GB | " + " | ".join(f"{card} GB" for card in CARDS) + " |", "|---" * (2 + len(CARDS)) + "|"]
    for size, (way, (stage, changes)) in itertools.product(("7B", "13B"), ways.items()):
        parts = estimate(read_shapes(f"llama-2-{size}"), as_run(complete(stage, changes)))
        ram = f" + {parts['host'] / 1e9:.0f} RAM" * (parts["host"] > 0)
        lines.append(f"| {size}, {way} | {total(parts) / 1e9:.1f}{ram} | {fits(parts)} |")
    return "\n".join(lines)


# ---- arithmetic ----
def read_shapes(model_name_or_path: str) -> Shapes:
    """The shapes of a model folder, a config.json, a hub name that is in the cache, or one of SIZES; BadInput for another, which would be a download."""
    path = Path(model_name_or_path)
    file = path / "config.json" if path.is_dir() else path
    if not path.exists() and re.fullmatch(r"\w[\w.-]*/[\w.-]*\w", model_name_or_path):
        from huggingface_hub import try_to_load_from_cache

        file = Path(str(try_to_load_from_cache(model_name_or_path, "config.json")))  # a path, None, or a mark that there is none
    if file.is_file():
        try:
            return shapes_of(json.loads(file.read_text("utf-8")), str(file))
        except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as problem:
            raise BadInput(f"{file} is no config.json: {problem}") from None
    name = re.sub(r"(-(hf|instruct|chat|base|v\d\.\d))+$", "", path.name.lower())
    if name not in SIZES:
        near = difflib.get_close_matches(name, SIZES, n=1, cutoff=0)[0]
        raise BadInput(f"{model_name_or_path} holds no config.json and is no size that is known here (nothing is downloaded), did you mean {near}? "
                       f"Known: {', '.join(SIZES)}")
    kind = {"qwen2.5": "qwen2", "yayi": "bloom"}.get(name.partition("-")[0], "llama")
    return shapes_of({"model_type": kind} | dict(zip(FIELDS, SIZES[name])), name)


def shapes_of(config: dict, where: str) -> Shapes:
    """The shapes that a configuration describes; BadInput if it lacks one."""
    config = config | (config.get("text_config") or {})
    kind = str(config.get("model_type"))

    def field(*names, default=None) -> int:
        found = next((config[name] for name in names if config.get(name) is not None), default)
        if not isinstance(found, int) or found < 1:
            raise BadInput(f"{where}: {names[0]} is {'missing' if found is None else repr(found)}, the estimate needs a number above zero")
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
    assumed = "" if kind in ("llama", "mistral", "qwen2", "qwen3") else f"the architecture {kind} is not known here: layers as LLaMA's are assumed"
    if experts := config.get("num_local_experts") or config.get("num_experts"):
        assumed += f", each with one inner layer, not with its {experts} experts, so this is too little"
    norms = 2 * width + (2 * size if kind == "qwen3" else 0)
    return Shapes(kind, vocabulary, width, inner, layers, heads, linears, norms, width, bool(config.get("tie_word_embeddings")), assumed)


def has_bf16() -> bool:
    """Whether this CPU computes in bf16, which auto then takes: torch would say it, after seconds."""
    with contextlib.suppress(OSError):
        return "avx512_bf16" in Path("/proc/cpuinfo").read_text("utf-8") and os.environ.get("ATEN_CPU_CAPABILITY", "avx512") == "avx512"
    return False


def as_run(flags: dict) -> Run:
    """The run of these flags with every block full."""
    train = flags.get("train") or ("lora" if "lora_r" in flags else "full")
    precision = flags["precision"] if flags["precision"] != "auto" else "bf16" if flags["gpu"] or has_bf16() and flags["stage"] != "train_ppo" else "fp32"
    answers = 2 if flags["stage"] in ("train_reward", "train_dpo") else 1  # of up to max_length tokens each, in one block, without dropout
    return Run(**{"lora_dropout": 0.0} | {name: flags[name] for name in Run._fields if name in flags} | dict(
        train=train, tables=flags["stage"] == "pretrain_clm" and train == "lora", precision=precision, zero=read_zero(flags["deepspeed"]),
        tokens=answers * flags["per_device_train_batch_size"] * flags["max_length"], supervised=0 if flags["stage"] == "train_reward" else None)
               | (of_rewards(flags) if flags["stage"] == "train_ppo" else {}))


def of_rewards(flags: dict) -> dict:
    """What a run of train_ppo.py has besides: a critic, a reward model (an adapter, where its folder does not say otherwise), and answers that are sampled."""
    judge, weights = Path(flags["reward_model"] or ""), 0
    if flags["reward_model"] and (judge / "config.json").is_file() and not (judge / "adapter_config.json").is_file():
        weights = read_shapes(str(judge)).weights
    return {"critic": flags["advantage"] == "gae", "judge": weights or int(bool(flags["reward_model"])), "gradient_accumulation_steps": 2,  # several blocks
            "answers": min(flags["per_device_rollout_batch_size"], flags["rollout_batch_size"] * flags["num_generations"])}


def estimate(shapes: Shapes, run: Run) -> dict[str, float]:
    """Bytes on one card, by what they are for, at the moment when they are most; "host" are those in RAM besides."""
    full, tokens = run.train == "full", run.tokens
    computed = 4 if run.precision == "fp32" else 2  # bytes of a number that is computed with
    autocast = computed == 2 and run.zero is None
    master = 4 if run.zero is None else computed  # bytes of a trained weight on the card
    targets = {name.strip() for name in run.lora_target_modules.split(",")}
    adapted = [linear for linear in shapes.linears if run.train == "lora" and {"all-linear", linear.name} & targets]

    # ---- what is there all the time ----
    tables = (1 if shapes.tied else 2) * shapes.table
    adapters = shapes.layers * sum(run.lora_r * (linear.d_in + linear.d_out) + run.use_dora * linear.d_out for linear in adapted)
    frozen_adapters, judge = adapters * (run.judge == 1), run.judge if run.judge > 1 else 0
    adapters *= 1 + run.critic
    trained = {"full": shapes.weights, "embeddings": tables, "lora": tables * run.tables}[run.train]
    if run.freeze_layers:  # the embedding as well
        trained -= run.freeze_layers * (shapes.count() // shapes.layers + shapes.in_norms) + shapes.table
    trains_head = trained >= tables or (full and not shapes.tied)
    frozen = shapes.weights - (0 if run.train == "lora" else trained)  # under LoRA the trained tables are copies
    quantized = shapes.count() if run.bits < 16 else 0
    # One in fp32 for each row; or one in 8 bit for each 64 weights, and for each 256 of them one in fp32
    scales = {8: 4 * shapes.layers * sum(linear.d_out for linear in shapes.linears), 4: quantized / 64 * (1 + 4 / 256)}.get(run.bits, 0)
    weights = trained * master + (frozen - quantized) * (master if full else computed) + quantized * run.bits / 8
    weights += judge * computed
    gradients = (trained + adapters) * master
    state, of_tables = next((size for name, size in OPTIMIZERS.items() if name in run.optim), 8), min(trained, tables * trains_head)
    optimizer = state * (of_tables + (trained + adapters - of_tables) / (4 if "8bit" in run.optim else 1))  # bitsandbytes keeps that of embeddings in fp32
    host, buffers = 0.0, gradients * (run.ranks > 1 and run.zero is None)  # DDP's buckets
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
    of_head = trains_head * master * shapes.table
    head = head_bytes(shapes, run, computed, stream, of_head, trains_head * autocast * computed * shapes.table)
    second_table = shapes.table * master * (trained > 0 and (shapes.tied or before > 0))  # a gradient that is added to one that is there
    whole = max(linear.d_in * linear.d_out for linear in shapes.linears) * computed * (run.bits < 16 or run.use_dora)  # dequantized, or added up
    # Gradients appear as activations go, from the last layer to the first, so that the ends are enough
    moments = {  # gradients, activations, head and loss, quantisation buffers
        "head": (before, activations + copies, head, 0),
        "last layer": (max(before, min(gradients, of_head)), activations + again + working * tokens + copies * (not run.gradient_checkpointing),
                       shapes.width * stream * (tokens if run.supervised is None else run.supervised), whole),
        "first layer": (gradients, (kept + working) * tokens + inputs, 0, whole),
        "embedding": (gradients, 0, second_table, 0),
        "sampling": (0, *sampling_bytes(shapes, run, computed), whole),
        "step": (gradients, 0, 4 * (trained + adapters) * (run.optim == "adamw_torch" and run.gpu), 0),  # its roots, of all weights at once
    }
    gradients, activations, head, whole = max(moments.values(), key=sum)
    return {"weights": weights, "adapters": (adapters + frozen_adapters) * master, "gradients": gradients, "optimizer": optimizer, "activations": activations,
            "head and loss": head, "quantisation": scales + whole, "ranks and ZeRO": buffers, "framework": CUDA if run.gpu else 0, "host": host}


def sampling_bytes(shapes: Shapes, run: Run, computed: int) -> tuple[float, float]:
    """Bytes of the keys and values of the answers that are sampled at once, with one layer of their prompts; and of the scores of one token of each."""
    keys_values = 2 * shapes.width if shapes.kind == "bloom" else sum(linear.d_out for linear in shapes.linears if linear.name in ("k_proj", "v_proj"))
    prompts = run.answers * (run.max_length - run.max_new_tokens)
    layer = prompts * computed * (3 * shapes.inner + 4 * shapes.width)
    # The cache grows by a copy of one layer's; scores in fp32, divided, as probabilities, summed up
    return run.answers * run.max_length * keys_values * computed * (shapes.layers + 1) + layer, run.answers * shapes.vocabulary * 16


def head_bytes(shapes: Shapes, run: Run, computed: int, stream: int, gradient: int, copy: int) -> float:
    """Bytes of the final norm, the head and the loss while a chunk of logits is there; `gradient` and `copy` are the bytes of the head's gradient,
    if it is trained, and of the head as autocast casts it, if it does."""
    supervised = run.tokens if run.supervised is None else run.supervised
    logits = min(supervised, max(1, LOGITS_AT_ONCE // shapes.vocabulary)) * shapes.vocabulary
    states = 2 * supervised * shapes.width * stream  # the supervised ones, and their gradient
    if run.answers:  # autograd of one chunk: logits, in fp32, by temperature, their logarithms, and the gradients of these
        return states + logits * (2 * computed + 24)
    if run.zero is not None and run.zero.get("stage") == 3:  # plain autograd: logits, in fp32, their logarithms and the gradients of these
        return states + logits * (2 * computed + 12)
    norm = run.tokens * shapes.width * (8 + 2 * stream)
    # Logits, what the softmax casts and gives; then logits, gradient, and the head's gradient of this chunk beside that of all
    return norm + states + gradient + copy + max(logits * (8 if computed == 4 else 10), logits * 8 + gradient + copy)


def layer_bytes(shapes: Shapes, run: Run, adapted: list[Linear], computed: int, stream: int) -> tuple[float, float, float]:
    """Bytes a token that autograd keeps of one layer, those of them that gradient checkpointing does not drop, and what backward needs besides;
    `adapted` have a LoRA update, a number takes `computed` bytes inside of the layer and `stream` between layers."""
    full, width, kept, held = run.train == "full", shapes.width, 0.0, 0.0
    dropped = run.lora_dropout > 0 and bool(adapted)
    for source in dict.fromkeys(linear.source for linear in shapes.linears):
        readers = [linear for linear in shapes.linears if linear.source == source]
        updates = sum(linear in adapted for linear in readers)
        if source.startswith("norm"):
            kept += 4 * width + 4 + stream * width * full  # its input in fp32, a root, and what its weight multiplies
        inputs = len(readers) if full else updates
        if not (stream > computed and source.startswith("norm")) and not (dropped and updates):
            inputs = min(inputs, 1)  # one for all; else autocast or dropout makes one for each
        held += readers[0].d_in * computed * (run.bits == 8)  # bitsandbytes hangs it on the graph, where no hook of checkpointing finds it
        kept += readers[0].d_in * inputs * (computed + (1 if run.gpu else computed) * (dropped and updates > 0)) + updates * computed * run.lora_r
    queries_keys_values = sum(linear.d_out for linear in shapes.linears if linear.source == "norm1")
    attended = next(linear.d_in for linear in shapes.linears if linear.source == "attention")
    kept += (computed if run.gpu else 4) * (queries_keys_values + attended) + 4 * shapes.heads  # on CPUs in fp32 where short; and the logarithms of the sums
    kept += computed * shapes.inner * (2 if shapes.kind == "bloom" else 3)  # the inner layer, its activation, and what gates it
    return kept + held, held, stream * width + computed * (shapes.inner + 2 * width * (run.bits == 16) if dropped else 2 * shapes.inner)


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
