"""Quantize a model to 8, 4, 3 or 2 bits by GPTQ (arXiv:2210.17323), in the format that gptqmodel, transformers and vLLM load.

Reads   a model in 16 or 32 bit, and text or records like those it will be used on
Writes  output_dir/, the quantized model with its tokenizer. Next: generate.py

    bash scripts/quantize_gptq.sh
    python quantize_gptq.py --model_name_or_path M --calibration_path D --output_dir O --bits 4 --group_size 128

Rounding a weight makes an error in what the layer puts out; GPTQ makes up for it in the weights that are not rounded yet,
by how the layer's inputs go together in the calibration data. The model is run once, layer by layer from its files: a
matrix is quantized at the moment its inputs come, and its result goes on to the next, so that each makes up for those
before it. Text that was held out runs along three times, through original, rounded and quantized weights: the table at
the end is of one pass. A run that was stopped goes on behind its last matrix.

Memory: one layer in fp32, its inputs (tokens x width x 4 bytes; three times the inner width in the MLP), and one Hessian.
Embedding and head stay in 16 bit.
"""
import copy
import hashlib
import importlib.util
import json
import os
import shutil
import sys
import time
from functools import partial
from pathlib import Path
from typing import Literal

from tensors import Shards, Tensor, Weights, files_beside, local_folder, open_model, unfinished_folder
from utils import BadInput, RunStopped, check_file, check_output_dir, check_positive, cli, fingerprint, show

MULTIPLE = 32  # of which every size is one: so many codes fill whole words of a file, whatever the bits
PROGRESS = "progress.txt"  # in the unfinished folder: the facts of the run, then the matrices that are done, a line each


def main(
    *,
    # model and data
    model_name_or_path: str,
    calibration_path: str,
    eval_path: str | None = None,
    output_dir: str = "output/quantize_gptq",
    template: str = "auto",
    max_length: int = 512,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    # quantization
    bits: Literal[8, 4, 3, 2] = 4,
    group_size: int = 128,
    desc_act: bool = False,
    sym: bool = True,
    damp_percent: float = 0.05,
    calibration_size: int = 128,
    seed: int = 42,
):
    """Quantize a model by GPTQ.

    Args:
        model_name_or_path: Folder or hub name of the base model.
        calibration_path: Text, or records in any format of sample/README.md: a file, or a folder of text.
        eval_path: File of records to evaluate on.
        output_dir: Folder for checkpoints and the result.
        template: Prompt format: auto (the model's own), alpaca, vicuna_chat, yayi, chatml, ziya, llama2_chinese, llama2 or plain.
        max_length: Tokens per example; what is longer is cut into windows, a dialogue into whole rounds.
        trust_remote_code: Run Python code that comes with the model.
        allow_pickle: Load weights that are pickles, which can run code.
        bits: Of a quantized weight: 8, 4, 3 or 2.
        group_size: Inputs that share a scale and a zero point, a multiple of 32; -1 for all inputs of a layer.
        desc_act: Sort all inputs by size before they are grouped: a little better with few bits, slower to run.
        sym: Put the zero in the middle of the codes, as the fastest kernels want it; else where it fits the weights.
        damp_percent: Share of the mean of the Hessian's diagonal that is added to it.
        calibration_size: Times max_length tokens are calibrated on.
        seed: Of everything random.
    """
    flags = dict(locals())
    show(flags)
    check_output_dir(output_dir)
    for flag, path in (("calibration_path", calibration_path), ("eval_path", eval_path)):
        if not os.path.isdir(path or ""):
            check_file(flag, path)
    check_positive(max_length=max_length, damp_percent=damp_percent, calibration_size=calibration_size)
    if group_size != -1 and (group_size <= 0 or group_size % MULTIPLE):
        raise BadInput(f"--group_size={group_size} is no multiple of {MULTIPLE}, nor -1 for one group")

    # ---- load ----
    base = open_model(local_folder(model_name_or_path, allow_pickle), allow_pickle)
    import torch

    from gptq import file_tensors
    from layerwise import hollow_model, stream_layers
    from models import load_skeleton, load_tokenizer
    from training import choose_attention, collate

    attention = choose_attention(load_skeleton(str(base.folder), trust_remote_code), "fp32", max_length)
    model = hollow_model(base, trust_remote_code, attention=attention)
    linear = linear_layers(model, base, group_size)
    tokenizer = load_tokenizer(str(base.folder), trust_remote_code)
    calibrated, evaluated = choose_examples(tokenizer, template, calibration_path, eval_path, max_length, calibration_size, seed)
    batch = collate([calibrated, evaluated, evaluated, evaluated], padded=attention is None)
    positions = [len(examples) * batch["input_ids"].shape[1] if attention is None else sum(len(example["input_ids"]) for example in examples)
                 for examples in (calibrated, evaluated)]
    print(f"calibrating on {len(calibrated):,} examples, {positions[0]:,} tokens; evaluating on {len(evaluated):,}, {positions[1]:,} tokens", file=sys.stderr)
    tensors = {}
    for name, tensor in base.tensors.items():
        tensors |= file_tensors(name, tensor, name in linear, bits, group_size)
    settings = dict(bits=bits, group_size=group_size, desc_act=desc_act, sym=sym, damp_percent=damp_percent, checkpoint_format="gptq" if sym else "gptq_v2")
    files = [(file, (base.folder / file).stat().st_size, (base.folder / file).stat().st_mtime) for file in base.files]  # of pickles, which have no fingerprint
    facts = settings | {"base": fingerprint(str(base.folder)) or str(files), "text": hashlib.sha256(batch["input_ids"].numpy().tobytes()).hexdigest()}

    # ---- quantize ----
    device = stream_layers(model, base)
    started = time.monotonic()
    size = sum(tensor.size for tensor in tensors.values())
    with unfinished_folder(Path(output_dir), size, "output_dir", keep=True) as unfinished:
        quantizer = Quantizer(unfinished, tensors, facts, linear, positions, batch.get("attention_mask"))
        inputs = {name: batch[name].to(device) for name in ("input_ids", "position_ids", "attention_mask") if name in batch}
        lengths = {"document_lengths": batch["document_lengths"]} if attention == "documents" else {}
        with torch.inference_mode(), quantizer.bar:
            hidden = model.base_model(**inputs, use_cache=False, **lengths)[0]
            perplexities = evaluate(model, base, hidden, batch["labels"].to(device), quantizer.splits)
        if missing := {name.removesuffix(".weight") for name in linear} - quantizer.done:
            raise RunStopped(f"no input came to {min(missing)} ({len(missing)} matrices in all): a model that leaves out layers is not known here")
        for name in base.tensors.keys() - linear.keys():
            copy_tensor(base, quantizer.shards, name, tensors[name])

        # ---- save ----
        for file in files_beside(base.folder):
            shutil.copyfile(file, unfinished / file.name)
        config = json.loads((base.folder / "config.json").read_text("utf-8"))
        if {tensor.dtype for tensor in base.tensors.values()} <= {"F32", "F64"}:
            config["torch_dtype" if "torch_dtype" in config else "dtype"] = "float16"
        written = settings | {"quant_method": "gptq", "lm_head": False, "true_sequential": True, "static_groups": False}
        for name, about in (("config.json", config | {"quantization_config": written}), ("quantize_config.json", written)):
            (unfinished / name).write_text(json.dumps(about, indent=2, ensure_ascii=False), "utf-8")
        quantizer.progress.close()
        (unfinished / PROGRESS).unlink()
    seconds, before = time.monotonic() - started, sum(tensor.size for tensor in base.tensors.values())
    print(f"{'weights':18}{'perplexity':>10}{'size':>12}{'time':>10}", file=sys.stderr)
    for name, key, stored, took in (("original", "original", before, ""), ("rounded (RTN)", "rounded", size, ""), ("GPTQ", "gptq", size, f"{seconds:.0f} s")):
        print(f"{name:18}{perplexities[key]:10.3f}{stored / 1e9:9.3f} GB{took:>10}", file=sys.stderr)
    print(json.dumps({"perplexity": perplexities, "bytes": size, "bytes_before": before, "seconds": round(seconds, 1), "output_dir": output_dir}))


# ---- what is given ----
def linear_layers(model, base: Weights, group_size: int) -> dict:
    """{name of its weight in the files: module} of what is quantized: the linear layers inside of the blocks. BadInput if one cannot be."""
    import torch

    from layerwise import file_name

    blocks = max((module for module in model.modules() if isinstance(module, torch.nn.ModuleList)), key=len)
    linear = {module for module in blocks.modules() if isinstance(module, torch.nn.Linear)}
    rest = [name for name, p in blocks.named_parameters() if p.dim() > 1 and not any(p is module.weight for module in linear)]
    if rest or not linear:
        raise BadInput(f"{base.folder}: most of this model is not in linear layers but in others ({(rest or ['none'])[0]}), which are not known here")
    found = {}
    for name, module in model.named_modules():
        if module in linear:
            if module.in_features % MULTIPLE or module.out_features % MULTIPLE or module.in_features % max(group_size, 1):
                sizes = [g for g in (128, 64, 32) if module.in_features % g == 0 and module.out_features % MULTIPLE == 0]
                raise BadInput(f"--group_size={group_size}: {name} has {module.in_features} inputs and {module.out_features} outputs; "
                               + (f"take {sizes[0]}" if sizes else f"only multiples of {MULTIPLE} can be quantized"))
            found[file_name(base, f"{name}.weight")] = module
    return found


def choose_examples(tokenizer, template: str, calibration_path: str, eval_path: str | None, max_length: int, calibration_size: int, seed: int):
    """Examples to calibrate on, calibration_size * max_length tokens of them, and a quarter as many others to evaluate on, 16 * max_length at most."""
    import numpy

    from utils import Chat, hold_out, tokenize_documents, tokenize_records
    from utils import holds_text

    def read(path: str):
        if holds_text(path):
            return tokenize_documents(path, Chat(copy.deepcopy(tokenizer), "plain"), max_length)
        chat = Chat(copy.deepcopy(tokenizer), template)
        if chat.new_tokens:  # their rows, if the model has any to spare, were never trained
            raise BadInput(f"--template={template} writes tokens that this model does not have ({chat.new_tokens[0]}): take the one that it was trained with")
        return tokenize_records(path, chat, max_length)

    examples = read(calibration_path)
    others, chosen, held = read(eval_path) if eval_path else examples, numpy.arange(len(examples)), None
    if eval_path:
        held = numpy.arange(len(others))
    else:
        records = len(numpy.unique(examples.records))
        if records < 2:
            raise BadInput(f"--calibration_path={calibration_path} holds one record only: give more, or an --eval_path")
        chosen, held = hold_out(examples, max(1, records // 4), seed)

    def take(source, numbers, tokens: int) -> list[dict]:
        numbers = numpy.random.default_rng(seed).permutation(numbers)
        enough = int(numpy.searchsorted(numpy.cumsum(source.lengths[numbers]), tokens)) + 1  # the last one may be longer than what is left
        return [source[int(e)] for e in sorted(numbers[:enough])]

    return take(examples, chosen, calibration_size * max_length), take(others, held, min(16, max(1, calibration_size // 4)) * max_length)


def copy_tensor(base: Weights, shards: Shards, name: str, tensor: Tensor) -> None:
    """Write a tensor that is not quantized; what was of 32 bit has 16."""
    import torch

    if tensor.dtype == base.tensors[name].dtype:
        return shards.copy(base, name)
    for first, last in base.tensors[name].row_chunks():
        data = base.floats(name, first, last).half()
        if not data.isfinite().all():
            raise RunStopped(f"{name} holds numbers beyond the 65,504 of fp16: convert the model to bf16 first")
        shards.write(name, first * tensor.row * 2, data.view(torch.uint8).numpy())


# ---- one pass through the model ----
class Quantizer:
    """What the linear layers of a model do when their inputs come: quantize themselves, and put out what they will from now on.

    The rows of every input are the positions of one batch: those to calibrate on, then three times those to evaluate on, for
    the quantized, the original and the rounded weights.

    Args:
        folder: Of the result; what an earlier run with the same facts finished there is taken as it is.
        positions: To calibrate and to evaluate on.
        mask: (B, T), 0 where a padded row is empty, or None.
    """

    def __init__(self, folder: Path, tensors: dict[str, Tensor], facts: dict, linear: dict, positions: list[int], mask):
        from tqdm import tqdm

        self.facts, self.splits, self.shared = facts, [sum(positions), positions[1], positions[1]], (None, None, None)
        self.real = slice(positions[0]) if mask is None else mask.flatten()[: positions[0]].nonzero()[:, 0]
        begun = (folder / PROGRESS).read_text("utf-8").split("\n")[:-1] if (folder / PROGRESS).is_file() else []  # a line without end was cut off
        for name, before in (json.loads(begun[0]) if begun else {}).items():
            if before != facts[name]:
                raise BadInput(f"{folder} was begun with {name} = {str(before)[:20]}, now it is {str(facts[name])[:20]}: give the same, or remove that folder")
        self.shards = Shards(folder, "model", tensors)
        self.done = {name for name in begun[1:] if f"{name}.qweight" in self.shards.kept}
        self.progress = open(folder / PROGRESS, "a" if begun else "w", encoding="utf-8")
        self.note("" if begun else json.dumps(facts))  # an empty line ends one that was cut off
        self.bar = tqdm(total=len(linear), desc="quantizing", unit=" matrices")
        for name, module in linear.items():
            module.forward = partial(self.forward, name.removesuffix(".weight"), module)

    def note(self, line: str) -> None:
        self.progress.write(f"{line}\n")
        self.progress.flush()

    def write(self, name: str, parts: dict) -> None:
        for part, tensor in parts.items():
            data = tensor.cpu().numpy().tobytes()
            self.shards.write(f"{name}.{part}", 0, data)
            if self.shards.read(f"{name}.{part}", 0, len(data)) != data:
                raise RunStopped(f"{name}.{part} was written, but reads back otherwise: is the disk damaged?")
        self.note(name)
        self.done.add(name)

    def forward(self, name: str, module, x):
        """x (..., in) -> (..., out)."""
        import torch
        from torch.nn import functional as F

        from gptq import dequantize, hessian, inverse_factor, quantize, read_parts, round_to_nearest, to_parts

        weight, rows = module.weight, x.reshape(-1, x.shape[-1])  # (out, in), (N, in)
        if len(rows) != sum(self.splits):
            raise RunStopped(f"{name} sees {len(rows)} of {sum(self.splits)} positions: a model that routes them is not known here")
        if name in self.done:
            parts = {part: tensor.to(x.device) for part, tensor in read_parts(self.shards, name).items()}
        else:
            if self.shared[0] is not x:  # query, key and value have one input
                self.shared = x, *inverse_factor(hessian(rows[self.real]), self.facts)
            parts = to_parts(*quantize(weight, *self.shared[1:], self.facts), self.facts)
            self.write(name, parts)
        rounded = round_to_nearest(weight, self.facts)
        outputs = zip(rows.split(self.splits), (dequantize(parts, self.facts), weight, rounded))
        self.bar.update()
        return torch.cat([F.linear(part, matrix, module.bias) for part, matrix in outputs]).view(*x.shape[:-1], -1)


def evaluate(model, base: Weights, hidden, labels, splits: list[int]) -> dict[str, float]:
    """Perplexities on the three copies of what is evaluated on, from the last hidden states (B, T, D) and the labels (B, T)."""
    import torch
    from torch.nn import functional as F

    from layerwise import file_name
    from training import LOGITS_AT_ONCE, head_chunk

    name = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
    if model.get_output_embeddings().bias is not None:
        raise BadInput(f"{base.folder}: its head has a bias, which is not known here")
    head = partial(F.linear, weight=base.floats(file_name(base, f"{name}.weight")).to(hidden.device))
    hidden, targets = hidden.flatten(0, 1), F.pad(labels[:, 1:], (0, 1), value=-100).flatten()  # (N, D), (N,)
    perplexities, end = {}, len(targets)
    count = splits[1]  # of each copy
    for name in ("rounded", "original", "gptq"):
        these, of_these = hidden[end - count : end], targets[end - count : end]
        trained = (of_these != -100).nonzero()[:, 0]
        parts = trained.split(max(1, LOGITS_AT_ONCE // head.keywords["weight"].shape[0]))
        loss = sum(head_chunk(head, these[part], of_these[part])[0] for part in parts) / len(trained)
        perplexities[name], end = round(float(torch.exp(loss)), 4), end - count
    return perplexities


# ==== gptq ====
# The format: a linear layer of shape (out, in) has four tensors in the place of `weight`:
#
#     qweight  int32 (in * bits / 32, out)       codes of 0 to 2^bits - 1, packed along `in`, lowest bits first
#     qzeros   int32 (groups, out * bits / 32)   zero points, packed along `out`
#     scales   fp16  (groups, out)
#     g_idx    int32 (in,)                       the group of each input
#
# and weight[o, i] = scales[g, o] * (code[i, o] - zero[g, o]) with g = g_idx[i]. The first version of the format, "gptq", holds the zero
# points less one, so that none can be 0: all readers know it, but it is kept to symmetric codes. Others go into "gptq_v2", which holds them as they are.
PARTS = ("qweight", "qzeros", "scales", "g_idx")


def has_gptqmodel() -> bool:
    """Whether transformers can load a GPTQ folder by itself."""
    return bool(importlib.util.find_spec("gptqmodel") and importlib.util.find_spec("optimum"))


def gptq_config(model_name_or_path: str) -> dict | None:
    """quantization_config of a GPTQ folder; None for any other. BadInput if it is of a version that is not known here."""
    file = Path(model_name_or_path) / "config.json"
    try:
        config = (json.loads(file.read_text("utf-8")) if file.is_file() else {}).get("quantization_config") or {}
    except ValueError as problem:
        raise BadInput(f"{file} is no whole JSON: {problem}") from None
    if config.get("quant_method") != "gptq":
        return None
    config.setdefault("checkpoint_format", "gptq")
    if config["checkpoint_format"] not in ("gptq", "gptq_v2") or config.get("bits") not in (2, 3, 4, 8):
        raise BadInput(f"{model_name_or_path} is of the GPTQ format {config['checkpoint_format']} with {config.get('bits')} bits, which only gptqmodel "
                       f"reads: pip install gptqmodel optimum")
    return config


def unpack_codes(words, bits: int):
    """The codes (n, m) in int32 words (n * bits / 32, m), as uint8."""
    import torch

    words = words.view(-1, bits, words.shape[1]).long() & 0xFFFFFFFF
    codes = torch.empty(len(words), 32, words.shape[2], dtype=torch.uint8, device=words.device)
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        code = words[:, word] >> shift
        if shift + bits > 32:
            code |= words[:, word + 1] << 32 - shift
        codes[:, i] = code & 2**bits - 1
    return codes.view(-1, words.shape[2])


def dequantize(parts: dict, settings: dict):
    """The weight (out, in), in fp32, that the four tensors of a layer stand for."""
    bits, less = settings["bits"], int(settings["checkpoint_format"] == "gptq")
    zeros = unpack_codes(parts["qzeros"].T.contiguous(), bits).T.float() + less
    codes, g_idx = unpack_codes(parts["qweight"], bits), parts["g_idx"].long()
    return ((codes - zeros[g_idx]) * parts["scales"].float()[g_idx]).T.contiguous()


def dequantized_state(folder: str, settings: dict, dtype) -> dict:
    """All weights of a GPTQ folder by name, each layer as a plain matrix; BadInput if some are missing or cut off."""
    from safetensors import SafetensorError, safe_open

    index = Path(folder) / "model.safetensors.index.json"
    files = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    layers, state = {}, {}
    for file in files:
        try:
            with safe_open(Path(folder) / file, "pt") as tensors:
                for name in tensors.keys():
                    layer, _, part = name.rpartition(".")
                    if part not in PARTS:
                        state[name] = tensors.get_tensor(name).to(dtype)
                        continue
                    parts = layers.setdefault(layer, {})
                    parts[part] = tensors.get_tensor(name)
                    if len(parts) == len(PARTS):  # they may lie in two files
                        state[f"{layer}.weight"] = dequantize(layers.pop(layer), settings).to(dtype)
        except (OSError, SafetensorError) as problem:
            raise BadInput(f"{folder}: {file} is missing, cut off or damaged, download it again ({problem})") from None
    for layer, parts in layers.items():
        raise BadInput(f"{folder} lacks {layer}.{min(set(PARTS) - set(parts))}: finish the download")
    return state


if __name__ == "__main__":
    cli(main)
