"""The GPTQ checkpoint format, in which quantize_gptq.py writes and gptqmodel, transformers and vLLM read.

A linear layer of shape (out, in) is stored as four tensors, which its file has in the place of `weight`:

    qweight  int32 (in * bits / 32, out)          codes of 0 to 2^bits - 1, packed along `in`, lowest bits first
    qzeros   int32 (groups, out * bits / 32)      zero points less one, packed along `out`
    scales   fp16  (groups, out)
    g_idx    int32 (in,)                          the group of each input

and weight[o, i] = scales[g, o] * (code[i, o] - zero[g, o]) with g = g_idx[i]. The one that is taken from the zero points
is AutoGPTQ's, and of all versions of the format this is the one that every reader knows.
"""
import importlib.util
import json
import math
from pathlib import Path

import torch

from tensors import Tensor, Weights
from utils import BadInput

PARTS = ("qweight", "qzeros", "scales", "g_idx")
KINDS = {"I32": torch.int32, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


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


def to_parts(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, g_idx: torch.Tensor, bits: int) -> dict[str, torch.Tensor]:
    """codes (in, out), scales and zeros (groups, out), g_idx (in) -> the four tensors of the file."""
    return {"qweight": pack_codes(codes, bits), "qzeros": pack_codes(zeros.T - 1, bits).T.contiguous(), "scales": scales.half(), "g_idx": g_idx.int()}


def dequantize(parts: dict[str, torch.Tensor], bits: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The weight (out, in) that the four tensors of a layer stand for."""
    zeros = unpack_codes(parts["qzeros"].T.contiguous(), bits).T.float() + 1
    codes, g_idx = unpack_codes(parts["qweight"], bits), parts["g_idx"].long()
    return ((codes - zeros[g_idx]) * parts["scales"].float()[g_idx]).to(dtype).T.contiguous()


def file_tensors(name: str, tensor: Tensor, quantized: bool, bits: int, group_size: int) -> dict[str, Tensor]:
    """The tensors that stand in the file for one of the original's: its four parts, or itself, in 16 bit."""
    if not quantized:
        wide = tensor.dtype in ("F32", "F64")
        return {name: tensor._replace(dtype="F16", size=tensor.size // (tensor.size // max(1, math.prod(tensor.shape))) * 2) if wide else tensor}
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
    config = (json.loads(file.read_text("utf-8")) if file.is_file() else {}).get("quantization_config") or {}
    if config.get("quant_method") != "gptq":
        return None
    if config.get("checkpoint_format", "gptq") != "gptq" or config.get("bits") not in (2, 3, 4, 8):
        raise BadInput(f"{model_name_or_path} is of the GPTQ format {config.get('checkpoint_format')} with {config.get('bits')} bits, which only gptqmodel "
                       f"reads: pip install gptqmodel optimum")
    return config


def has_gptqmodel() -> bool:
    return bool(importlib.util.find_spec("gptqmodel") and importlib.util.find_spec("optimum"))


def dequantized_state(folder: str, bits: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """All weights of a GPTQ folder by name, each layer as a plain matrix."""
    weights, state = Weights(folder), {}
    for name, tensor in weights.tensors.items():
        layer, _, part = name.rpartition(".")
        if part == "qweight":
            if missing := [other for other in PARTS if f"{layer}.{other}" not in weights.tensors]:
                raise BadInput(f"{folder} lacks {layer}.{missing[0]}: finish the download")
            state[f"{layer}.weight"] = dequantize(read_parts(weights, layer), bits, dtype)
        elif part not in PARTS:
            state[name] = torch.from_numpy(weights.read(name)).view(KINDS[tensor.dtype]).view(tensor.shape).to(dtype)
    return state
