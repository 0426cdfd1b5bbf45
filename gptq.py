"""GPTQ: the algorithm, and the checkpoint format that gptqmodel, transformers and vLLM read.

A linear layer of shape (out, in) is stored as four tensors, which its file has in the place of `weight`:

    qweight  int32 (in * bits / 32, out)          codes of 0 to 2^bits - 1, packed along `in`, lowest bits first
    qzeros   int32 (groups, out * bits / 32)      zero points, packed along `out`
    scales   fp16  (groups, out)
    g_idx    int32 (in,)                          the group of each input

and weight[o, i] = scales[g, o] * (code[i, o] - zero[g, o]) with g = g_idx[i]. The first version of the format, "gptq", holds
the zero points less one, so that none can be 0: all readers know it, but it is kept to symmetric codes. Others go into "gptq_v2",
which holds them as they are.
"""
import importlib.util
import json
import math
import sys
from pathlib import Path

import torch

from tensors import Tensor, Weights
from utils import BadInput, RunStopped

PARTS = ("qweight", "qzeros", "scales", "g_idx")
BLOCK = 32  # columns whose errors are passed on together; divides every group
KINDS = {"I32": torch.int32, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


# ---- arXiv:2210.17323 ----
def hessian(rows):
    """X^T X / N of the inputs X (N, in) of a layer: half the Hessian of its squared error."""
    width, tile = rows.shape[1], -(-rows.shape[1] // 4)
    total = rows.new_empty(width, width)
    for begin in range(0, width, tile):  # what is below the diagonal is the same
        total[begin : begin + tile, begin:] = rows[:, begin : begin + tile].T @ rows[:, begin:]
        total[begin + tile :, begin : begin + tile] = total[begin : begin + tile, begin + tile :].T
    return total.div_(len(rows))


def inverse_factor(hessian, settings: dict):
    """(U, order): the inputs in the order in which they are quantized, and the upper U (in, in) with H^-1 = U^T U in that order.

    Inputs that are used much come first, when most others are left to make up for their errors. Without desc_act the
    groups stay as they are: they are sorted as wholes, and the inputs inside of each.
    """
    size, diagonal = settings["group_size"], hessian.diagonal()
    order = diagonal.argsort(descending=True, stable=True)
    if size > 0 and not settings["desc_act"]:
        groups = diagonal.view(-1, size).mean(dim=1).argsort(descending=True, stable=True)
        inside = diagonal.view(-1, size).argsort(dim=1, descending=True, stable=True)
        order = (inside + torch.arange(len(inside), device=inside.device)[:, None] * size)[groups].flatten()
    # H read backwards is L L^T, so H^-1 is U^T U with U = L^-1 read backwards: one factorization in the place of the paper's two
    backwards, mean = hessian[order][:, order].flip(0, 1), diagonal.mean()
    damp = added = settings["damp_percent"]
    for _ in range(4):
        backwards.diagonal().add_(added * mean)
        factor, failed = torch.linalg.cholesky_ex(backwards)
        if not failed and factor.isfinite().all():
            return torch.linalg.solve_triangular(factor, torch.eye(len(order), device=order.device), upper=False).flip(0, 1), order
        print(f"a Hessian has no inverse with --damp_percent {damp:g}: {10 * damp:g} is tried (more calibration data is better)", file=sys.stderr)
        damp, added = 10 * damp, 9 * damp
    raise RunStopped("a Hessian is not positive: the calibration data has too few tokens, or the model's numbers are infinite")


def quantize(weight, factor, order, settings: dict):
    """Codes (in, out) uint8, scales and zeros (groups, out) and g_idx (in) of a matrix (out, in): algorithm 1 of the paper.

    The matrix lies transposed here, so that a column of the paper's is a row, whose numbers are neighbours in memory.
    """
    bits, size, sym = settings["bits"], settings["group_size"] if settings["group_size"] > 0 else len(order), settings["sym"]
    rest = weight.T[order].contiguous()  # (in, out)
    codes = torch.empty(rest.shape, dtype=torch.uint8, device=rest.device)
    groups = torch.arange(len(order), device=order.device) // size
    g_idx = torch.empty_like(order).index_copy_(0, order, groups) if settings["desc_act"] else groups
    scales, zeros = rest.new_empty(2, len(order) // size, rest.shape[1])
    for begin in range(0, len(order), BLOCK):
        end = begin + BLOCK
        block, corner = rest[begin:end], factor[begin:end, begin:end]
        errors, rounded = torch.empty_like(block), torch.empty_like(block)
        if begin % size == 0:
            g = g_idx[order[begin]]
            scale, zero = grid(rest[begin : begin + size], bits, sym)
            scales[g], zeros[g] = scale, zero
        for i, inverse in enumerate(corner.diagonal().reciprocal().tolist()):
            torch.div(block[i], scale, out=rounded[i]).round_().add_(zero).clamp_(0, 2**bits - 1)
            torch.sub(block[i], (rounded[i] - zero).mul_(scale), out=errors[i]).mul_(inverse)  # the paper's E
            block[i + 1 :].addr_(corner[i, i + 1 :], errors[i], alpha=-1)
        codes[order[begin:end]] = rounded.byte()
        rest[end:].addmm_(factor[begin:end, end:].T, errors, alpha=-1)  # the block's errors to all that is left
    return codes, scales, zeros, g_idx


def grid(values, bits: int, sym: bool):
    """Scale and zero point (..., out) of the codes of a group (..., n, out), from its least and greatest number."""
    low, high, top = values.amin(dim=-2).clamp(max=0), values.amax(dim=-2).clamp(min=0), 2**bits - 1
    if sym:
        high = high.maximum(-low)
        low = -high
    scale = ((high - low) / top).half().float().clamp(min=2**-24)  # as it will be stored
    zero = scale.new_full(scale.shape, 2 ** (bits - 1)) if sym else (-low / scale).round().clamp(0, top)
    return scale, zero


def round_to_nearest(weight, settings: dict):
    """The matrix (out, in) with each number rounded by itself, on the same kind of grid."""
    values = weight.T.reshape(-1, settings["group_size"] if settings["group_size"] > 0 else weight.shape[1], weight.shape[0])  # (groups, n, out)
    scale, zero = (part[:, None] for part in grid(values, settings["bits"], settings["sym"]))
    codes = (values / scale).round_().add_(zero).clamp_(0, 2 ** settings["bits"] - 1)
    return codes.sub_(zero).mul_(scale).view(weight.shape[1], -1).T


# ---- format ----
def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes (n, m) of 0 to 2^bits - 1 as int32 (n * bits / 32, m): each column one stream of bits, n a multiple of 32."""
    n, m = codes.shape
    codes = codes.reshape(n // 32, 32, m).long()
    words = torch.zeros(n // 32, bits, m, dtype=torch.int64, device=codes.device)  # 32 codes fill `bits` words
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        words[:, word] |= codes[:, i] << shift & 0xFFFFFFFF
        if shift + bits > 32:
            words[:, word + 1] |= codes[:, i] >> 32 - shift
    return torch.where(words >= 2**31, words - 2**32, words).int().view(-1, m)


def unpack_codes(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The codes (n, m) in int32 words (n * bits / 32, m), as uint8."""
    words = words.view(-1, bits, words.shape[1]).long() & 0xFFFFFFFF
    codes = torch.empty(len(words), 32, words.shape[2], dtype=torch.uint8, device=words.device)
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        code = words[:, word] >> shift
        if shift + bits > 32:
            code |= words[:, word + 1] << 32 - shift
        codes[:, i] = code & 2**bits - 1
    return codes.view(-1, words.shape[2])


def to_parts(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, g_idx: torch.Tensor, settings: dict) -> dict[str, torch.Tensor]:
    """codes (in, out), scales and zeros (groups, out), g_idx (in) -> the four tensors of the file, which is as its settings say."""
    bits, less = settings["bits"], int(settings["checkpoint_format"] == "gptq")
    return {"qweight": pack_codes(codes, bits), "qzeros": pack_codes(zeros.T - less, bits).T.contiguous(), "scales": scales.half(), "g_idx": g_idx.int()}


def dequantize(parts: dict[str, torch.Tensor], settings: dict, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The weight (out, in) that the four tensors of a layer stand for."""
    bits, less = settings["bits"], int(settings["checkpoint_format"] == "gptq")
    zeros = unpack_codes(parts["qzeros"].T.contiguous(), bits).T.float() + less
    codes, g_idx = unpack_codes(parts["qweight"], bits), parts["g_idx"].long()
    return ((codes - zeros[g_idx]) * parts["scales"].float()[g_idx]).to(dtype).T.contiguous()


def file_tensors(name: str, tensor: Tensor, quantized: bool, bits: int, group_size: int) -> dict[str, Tensor]:
    """The tensors that stand in the file for one of the original's: its four parts, or itself, in 16 bit."""
    if not quantized:
        return {name: tensor._replace(dtype="F16", size=2 * math.prod(tensor.shape)) if tensor.dtype in ("F32", "F64") else tensor}
    rows, columns = tensor.shape
    groups = columns // group_size if group_size > 0 else 1
    shapes = {"qweight": (columns * bits // 32, rows), "qzeros": (groups, rows * bits // 32), "scales": (groups, rows), "g_idx": (columns,)}
    kinds = {part: ("F16", 2) if part == "scales" else ("I32", 4) for part in PARTS}
    return {f"{name.removesuffix('.weight')}.{part}": Tensor(kinds[part][0], shape, tensor.file, 0, math.prod(shape) * kinds[part][1])
            for part, shape in shapes.items()}


def read_parts(source, name: str) -> dict[str, torch.Tensor]:
    """The four tensors of a layer, from Shards or Weights."""
    parts = {}
    for part in PARTS:
        tensor = source.tensors[f"{name}.{part}"]
        data = source.read(f"{name}.{part}", 0, tensor.size)
        parts[part] = torch.frombuffer(bytearray(data), dtype=KINDS[tensor.dtype]).view(tensor.shape)
    return parts


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


def has_gptqmodel() -> bool:
    """Whether transformers can load a GPTQ folder by itself."""
    return bool(importlib.util.find_spec("gptqmodel") and importlib.util.find_spec("optimum"))


def dequantized_state(folder: str, settings: dict, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """All weights of a GPTQ folder by name, each layer as a plain matrix."""
    weights, state = Weights(folder), {}
    for name, tensor in weights.tensors.items():
        layer, _, part = name.rpartition(".")
        if part == "qweight":
            if missing := [other for other in PARTS if f"{layer}.{other}" not in weights.tensors]:
                raise BadInput(f"{folder} lacks {layer}.{missing[0]}: finish the download")
            state[f"{layer}.weight"] = dequantize(read_parts(weights, layer), settings, dtype)
        elif part not in PARTS:
            state[name] = torch.from_numpy(weights.read(name)).view(KINDS[tensor.dtype]).view(tensor.shape).to(dtype)
    return state
