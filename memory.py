"""Arithmetic of the memory that a training run takes: what is kept for each weight and each token, and when it is most.

Follows what training.py allocates: documents packed without a mask, a head that runs in chunks, LoraUpdate, one input per
layer under gradient checkpointing. Nothing here imports torch. benchmarks/memory.py holds it against measurement.
"""
import difflib
import json
import os
import re
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from utils import BadInput

LOGITS_AT_ONCE = 2**25  # as in training.py
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

    def count(self, linear=lambda linear: True) -> int:
        """Weights of the linears of all layers."""
        return self.layers * sum(l.d_in * l.d_out + l.bias * l.d_out for l in self.linears if linear(l))

    @property
    def table(self) -> int:
        """Weights of the embedding, and of the head."""
        return self.vocabulary * self.width

    @property
    def weights(self) -> int:
        return self.count() + self.layers * self.in_norms + self.outside + (1 if self.tied else 2) * self.table


# ---- model ----
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
    name = re.sub(r"-(hf|instruct|chat|base|v0\.\d)$", "", path.name.lower())
    if name not in SIZES:
        near = difflib.get_close_matches(name, SIZES, n=1, cutoff=0)[0]
        raise BadInput(f"{model_name_or_path} is no folder, no config.json and no size that is known here: did you mean {near}? Known: {', '.join(SIZES)}")
    return shapes_of(SIZES[name], name)


def shapes_of(config: dict, where: str) -> Shapes:
    """The shapes that a configuration describes; BadInput if it lacks one."""
    config = config | (config.get("text_config") or {})
    kind = str(config.get("model_type"))

    def field(*names, default=None):
        found = next((config[name] for name in names if config.get(name) is not None), default)
        if found is None:
            raise BadInput(f"{where} has no {names[0]} (it has {', '.join(sorted(config)[:12])}): the estimate needs it")
        return found

    width, layers = field("hidden_size", "n_embed", "n_embd"), field("num_hidden_layers", "n_layer")
    heads, vocabulary = field("num_attention_heads", "n_head"), field("vocab_size")
    for name, value in (("hidden_size", width), ("num_hidden_layers", layers), ("num_attention_heads", heads), ("vocab_size", vocabulary)):
        if not isinstance(value, int) or value < 1:
            raise BadInput(f"{where}: {name} is {value!r}, not a number above zero")
    if kind == "bloom":
        linears = (Linear("query_key_value", width, 3 * width, True, "norm1"), Linear("dense", width, width, True, "attention"),
                   Linear("dense_h_to_4h", width, 4 * width, True, "norm2"), Linear("dense_4h_to_h", 4 * width, width, True, "inner"))
        return Shapes(kind, vocabulary, width, 4 * width, layers, heads, linears, 4 * width, 4 * width, True, "")
    size = field("head_dim", default=width // heads)
    inner, key = field("intermediate_size"), field("num_key_value_heads", default=heads) * size
    bias = bool(field("attention_bias", default=kind == "qwen2"))
    linears = (Linear("q_proj", width, heads * size, bias, "norm1"), Linear("k_proj", width, key, bias, "norm1"), Linear("v_proj", width, key, bias, "norm1"),
               Linear("o_proj", heads * size, width, bias and kind != "qwen2", "attention"),
               *(Linear(name, width, inner, bool(config.get("mlp_bias")), "norm2") for name in ("gate_proj", "up_proj")),
               Linear("down_proj", inner, width, bool(config.get("mlp_bias")), "inner"))
    assumed = "" if kind in LLAMA_LIKE else f"the architecture {kind} is not known here: layers as LLaMA's are assumed"
    if experts := config.get("num_local_experts") or config.get("num_experts"):
        assumed += f", each with one inner layer, not with its {experts} experts, so this is too little"
    norms = 2 * width + (2 * size if kind == "qwen3" else 0)
    return Shapes(kind, vocabulary, width, inner, layers, heads, linears, norms, width, bool(config.get("tie_word_embeddings")), assumed)


# ---- a run ----
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


def estimate(shapes: Shapes, run: Run) -> dict[str, float]:
    """Bytes on one card, by what they are for, at the moment when they are most; "host" are those in RAM besides.

    Each tensor of a layer is counted as autograd keeps it; T = tokens of the micro-batch, D = width, F = inner width.
    """
    zero, stage = run.zero or {}, (run.zero or {}).get("stage", 0)
    lora, full = run.train == "lora", run.train == "full"
    half = 4 if run.precision == "fp32" else 2  # bytes of what is computed in
    autocast = half == 2 and run.zero is None
    master = half if run.zero is not None else 4  # bytes of a trained weight on the card
    adapts = lambda linear: lora and run.lora_target_modules in ("all-linear", linear.name) or linear.name in targets
    targets = [name.strip() for name in run.lora_target_modules.split(",")] if lora else []

    # ---- what is there all the time ----
    per_layer = shapes.count() // shapes.layers + shapes.in_norms
    tables = (1 if shapes.tied else 2) * shapes.table
    adapters = shapes.layers * sum(run.lora_r * (l.d_in + l.d_out) + run.use_dora * l.d_out for l in shapes.linears if adapts(l))
    tuned = {"full": shapes.weights - run.freeze_layers * per_layer - bool(run.freeze_layers) * shapes.table, "embeddings": tables, "lora": run.tables * tables}[run.train]
    frozen = shapes.weights - (0 if lora else tuned)  # under LoRA trained tables are copies
    quantized = shapes.count() if run.bits < 16 else 0
    scales = shapes.layers * sum(l.d_out * 4 if run.bits == 8 else l.d_in * l.d_out / 64 * (1 + 4 / 256) for l in shapes.linears) if quantized else 0
    weights = tuned * master + (frozen - quantized) * (master if full else half) + quantized * run.bits / 8
    trained, embeddings = tuned + adapters, min(tuned, tables)
    gradients, optimizer = trained * master, optimizer_bytes(run.optim, trained, embeddings)
    optimizer += 4 * trained * (run.zero is not None and half == 2)  # DeepSpeed's fp32 copy
    buffers = host = 0
    if run.ranks > 1 and run.zero is None:
        buffers = gradients  # DDP's buckets
    if stage == 2:
        buffers = 2 * half * min(trained, shapes.width**2) + half * min(trained, zero.get("allgather_bucket_size", 5e8))
    if stage >= 1:
        optimizer /= run.ranks
    if stage >= 2:
        gradients /= run.ranks
    if stage == 3:
        buffers = half * min(shapes.weights, zero.get("stage3_max_live_parameters", 1e9))
        weights /= run.ranks
    if zero.get("offload_optimizer", {}).get("device") == "cpu":
        host, optimizer, gradients = 16 * trained, 0, min(gradients, 2 * half * shapes.width**2)
    if zero.get("offload_param", {}).get("device") == "cpu":
        host, weights = host + half * shapes.weights, 0

    # ---- what comes and goes with the tokens ----
    tokens, supervised = run.tokens, run.tokens if run.supervised is None else run.supervised
    stream = 4 if autocast and (embeddings or full) else half  # bytes of the hidden states between layers: fp32 tables give fp32
    kept, working = layer_bytes(shapes, run, adapts, half, stream)
    layers = shapes.layers - run.freeze_layers
    inputs = stream * shapes.width * tokens
    activations = layers * inputs if run.gradient_checkpointing else layers * kept * tokens
    recomputed = kept * tokens - inputs * (stream == 4) if run.gradient_checkpointing else 0  # the norm keeps its input, in fp32
    chunk = min(supervised, max(1, LOGITS_AT_ONCE // shapes.vocabulary)) * shapes.vocabulary  # logits at once
    trains_head = bool(embeddings) and not (full and shapes.tied and run.freeze_layers)
    head_gradient, head_copy = shapes.table * master * trains_head, shapes.table * half * (autocast and trains_head)
    hidden = shapes.width * (half if run.zero is not None else stream)
    # The final norm; supervised states and their gradients; then logits, fp32 logits and probabilities, or those with the head's gradients
    of_head = tokens * (8 * shapes.width + 2 * hidden) + 2 * supervised * hidden + head_gradient + head_copy
    of_head += max(chunk * (8 if half == 4 else 10), chunk * 8 + head_gradient + head_copy)
    if stage == 3:
        of_head = 2 * supervised * hidden + chunk * (2 * half + 12)
    copies = half * shapes.count() if full and autocast else 0  # autocast keeps what it casts until the forward pass is over
    dequantized = max(l.d_in * l.d_out for l in shapes.linears) * half if quantized or run.use_dora else 0
    before = gradients if run.gradient_accumulation_steps > 1 or stage else 0
    last_table = shapes.table * master * bool(embeddings) * (shapes.tied or run.gradient_accumulation_steps > 1)
    moments = [  # gradients, activations, head and loss, quantisation buffers
        (before, activations + copies, of_head, 0),  # the head
        (max(before, min(gradients, head_gradient)), activations + recomputed + working * tokens + copies * (not run.gradient_checkpointing), supervised * hidden, dequantized),  # backward of the last layer
        (gradients, (kept + working) * tokens + inputs, 0, dequantized),  # backward of the first
        (gradients, 0, last_table, 0),  # gradient of the embedding
        (gradients + 4 * trained * (run.optim == "adamw_torch"), 0, 0, 0),
    ]
    gradients, activations, of_head, dequantized = max(moments, key=sum)
    return {"weights": weights, "adapters": adapters * master, "gradients": gradients, "optimizer": optimizer, "activations": activations, "head and loss": of_head,
            "quantisation": scales + dequantized, "ranks and ZeRO": buffers, "framework": CUDA if run.gpu else 0, "host": host}


def layer_bytes(shapes: Shapes, run: Run, adapts, half: int, stream: int) -> tuple[float, float]:
    """Bytes a token that autograd keeps of one layer, and that its backward pass needs at the most on top."""
    full, width, inner = run.train == "full", shapes.width, shapes.inner
    mask = 1 if run.gpu else half  # dropout keeps a mask, on a CPU as wide as what it masks
    kept = 0.0
    for source in dict.fromkeys(l.source for l in shapes.linears):
        readers = [l for l in shapes.linears if l.source == source]
        adapted = sum(map(adapts, readers))
        own_copies = stream > half and source.startswith("norm")  # autocast casts for each linear apart
        if full:
            copies = len(readers) if own_copies else 1
        elif adapted and run.lora_dropout:
            copies = adapted * (1 + mask / half) + (run.bits == 8 and run.gpu)
        else:
            copies = adapted if own_copies else bool(adapted) or (run.bits == 8 and run.gpu)
        kept += copies * half * readers[0].d_in + adapted * half * run.lora_r
        if source.startswith("norm"):
            kept += 4 * width + 4 + stream * width * full  # its input in fp32, the root, and what its weight multiplies
    attention = sum(l.d_out for l in shapes.linears if l.source == "norm1") + next(l.d_in for l in shapes.linears if l.source == "attention")
    kept += half * attention + 4 * shapes.heads  # queries, keys, values, output and the logarithms of the sums
    kept += (3 if shapes.kind != "bloom" else 2) * half * inner  # gate, its activation, up
    dropped = run.train == "lora" and run.lora_dropout
    working = stream * width + half * inner * (1 if dropped else 2)
    return kept, working


def optimizer_bytes(optim: str, trained: int, embeddings: int) -> float:
    """State of an optimizer; bitsandbytes leaves embeddings in fp32."""
    bytes_each = next((size for name, size in OPTIMIZERS.items() if name in optim), 8)
    if "8bit" in optim:
        return (trained - embeddings) * bytes_each / 4 + embeddings * bytes_each
    return trained * bytes_each
