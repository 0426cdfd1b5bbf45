"""Quantize a model to 8, 4, 3 or 2 bits by GPTQ (arXiv:2210.17323), in the format that gptqmodel, transformers and vLLM load.

Reads   a model in 16 or 32 bit, and text or records like those it will be used on
Writes  output_dir/, the quantized model with its tokenizer. Next: generate.py

    bash scripts/quantize_gptq.sh
    python quantize_gptq.py --model_name_or_path M --calibration_path D --output_dir O --bits 4 --group_size 128

Rounding a weight makes an error in what the layer puts out; GPTQ makes up for it in the weights that are not rounded yet,
by how the layer's inputs go together in the calibration data. The model is run once, on all texts together, its weights read
from their files one matrix at a time: a matrix is quantized at the moment its inputs come, and its result goes on to the next,
so that each makes up for those before it. Text that was held out runs along three times, through original, rounded and quantized
weights: the table at the end is of one pass. A run that was stopped goes on behind its last matrix.

Memory: one matrix in fp32, its inputs (tokens x width x 4 bytes; three times the inner width in the MLP), and one Hessian.
Embedding and head stay in 16 bit.
"""
import contextlib
import copy
import ctypes
import hashlib
import itertools
import json
import logging
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Literal

from utils import (IGNORE_INDEX, BadInput, Chat, RunStopped, check_file, check_model, check_output_dir, check_positive, cli, document_turns, fingerprint,
                   hold_out, lock_folder, pack, read_json, read_rows, row_turns, show, tokenize_documents, tokenize_records)

MULTIPLE = 32  # of which every size is one: so many codes fill whole words of a file, whatever the bits
BLOCK = 32  # columns whose errors are passed on together; divides every group
SHARD = 200e6  # bytes of tensors that are held, and then written as one file
LOGITS_AT_ONCE = 2**25  # numbers: 128 MiB in fp32


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
    check_output_dir(output_dir)
    for flag, path in (("calibration_path", calibration_path), ("eval_path", eval_path)):
        if not os.path.isdir(path or ""):
            check_file(flag, path)
    check_positive(max_length=max_length, damp_percent=damp_percent, calibration_size=calibration_size)
    if group_size != -1 and (group_size <= 0 or group_size % MULTIPLE):
        raise BadInput(f"--group_size={group_size} is no multiple of {MULTIPLE}, nor -1 for one group")
    check_model(model_name_or_path, allow_pickle)
    show(flags)

    # ---- load ----
    import torch
    from transformers.utils import cached_file

    copied = tempfile.TemporaryDirectory()  # stays empty but for pickles, which cannot be read tensor by tensor
    model, tokenizer, stored, device = load_on_disk(model_name_or_path, copied.name, trust_remote_code, allow_pickle)
    linear = linear_layers(model, group_size)
    examples = choose_examples(tokenizer, template, calibration_path, eval_path, max_length, calibration_size, seed)
    ids, labels, positions, real, rows = make_rows(examples, max_length, model)
    print(f"calibrating on {len(examples[0]):,} examples, {real[:rows].sum():,} tokens; evaluating on {len(examples[1]):,}, {real[rows:].sum():,} tokens",
          file=sys.stderr)
    base = Path(cached_file(model_name_or_path, "config.json")).parent  # of a name on the hub, where it was put
    files = list(base.glob("*.safetensors")) or list(base.glob("*.bin"))
    before = sum(file.stat().st_size for file in files)
    settings = dict(bits=bits, group_size=group_size, desc_act=desc_act, sym=sym, damp_percent=damp_percent, checkpoint_format="gptq" if sym else "gptq_v2")
    facts = settings | {"base": fingerprint(str(base)) or before, "text": hashlib.sha256(ids.numpy().tobytes()).hexdigest()}

    # ---- quantize ----
    started, weights = time.monotonic(), sum(module.weight.numel() for module in linear.values())
    each = (bits + (bits + 16) / max(group_size, MULTIPLE)) / 8  # bytes of a quantized weight, with its share of scale and zero
    size = 2 * each * weights + 2 * (model.num_parameters() - weights)  # what is quantized is written matrix by matrix, and once more at the end
    unfinished = begin_or_go_on(Path(output_dir).resolve(), facts, size)  # a link cannot be renamed onto
    done = quantize_in_passing(linear, unfinished / "parts", settings, real[:rows].to(device), ids[rows:].numel())
    copies = lambda tensor: torch.cat([tensor, tensor[rows:], tensor[rows:]]).to(device)  # what is evaluated on, for all three kinds of weights
    with torch.inference_mode():
        apart = {} if positions is None else {"position_ids": copies(positions)}
        hidden = model.base_model(input_ids=copies(ids), use_cache=False, **apart)[0]
        perplexities = evaluate_copies(model.get_output_embeddings(), hidden[rows:], labels[rows:].to(device))
    if missing := linear.keys() - done:
        raise RunStopped(f"no input came to {min(missing)} ({len(missing)} matrices in all): a model that leaves out layers is not known here")

    # ---- save ----
    config = json.loads((base / "config.json").read_text("utf-8"))
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    config[key] = config[key] if config.get(key) in ("float16", "bfloat16") else "float16"
    save_shards(unfinished, result(model, stored, linear, unfinished / "parts", getattr(torch, config[key])))
    for file in base.iterdir():
        if file.suffix in (".json", ".jinja", ".model", ".py", ".tiktoken", ".txt") and not file.name.endswith((".index.json", "delta.json")):
            shutil.copyfile(file, unfinished / file.name)
    written = settings | {"quant_method": "gptq", "lm_head": False, "true_sequential": True, "static_groups": False}
    for name, about in (("config.json", config | {"quantization_config": written}), ("quantize_config.json", written)):
        (unfinished / name).write_text(json.dumps(about, indent=2, ensure_ascii=False), "utf-8")
    shutil.rmtree(unfinished / "parts")
    for name in ("run.json", "run.lock"):
        (unfinished / name).unlink()
    unfinished.rename(Path(output_dir).resolve())
    seconds, size = time.monotonic() - started, sum(file.stat().st_size for file in Path(output_dir).glob("*.safetensors"))
    print(f"{'weights':18}{'perplexity':>10}{'size':>12}{'time':>10}", file=sys.stderr)
    for name, key, taken, took in (("original", "original", before, ""), ("rounded (RTN)", "rounded", size, ""), ("GPTQ", "gptq", size, f"{seconds:.0f} s")):
        print(f"{name:18}{perplexities[key]:10.3f}{taken / 1e9:9.3f} GB{took:>10}", file=sys.stderr)
    print(json.dumps({"perplexity": perplexities, "bytes": size, "bytes_before": before, "seconds": round(seconds, 1), "output_dir": output_dir}))


# ---- what is given ----
def load_on_disk(model_name_or_path: str, copied: str, trust_remote_code: bool, allow_pickle: bool):
    """(model, tokenizer, {name: where its weight is stored}, device): a model whose weights stay in their files, by accelerate's disk offload.

    A module's weight is read, in fp32, just before it runs on the device, a GPU if there is one, and forgotten behind it.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)  # it warns of what is asked for here
    with contextlib.suppress(AttributeError, OSError):  # glibc alone: what is freed between tensors that are held goes back to the system (M_MMAP_THRESHOLD)
        ctypes.CDLL(None).mallopt(-3, 2**20)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_name_or_path, trust_remote_code=trust_remote_code)
        model, loaded = AutoModelForCausalLM.from_pretrained(
            model_name_or_path, dtype=torch.float32, device_map={"": "disk"}, offload_folder=copied, use_safetensors=None if allow_pickle else True,
            trust_remote_code=trust_remote_code, output_loading_info=True)
    except Exception as problem:  # a cut-off file raises SafetensorError, RuntimeError or OSError, by where it was cut
        raise BadInput(f"{model_name_or_path} could not be loaded: {str(problem)[:300]}") from problem
    if hasattr(model.config, "quantization_config"):
        raise BadInput(f"{model_name_or_path} is quantized: give the 16-bit model that it was made from")
    if missing := sorted(loaded["missing_keys"]) + sorted(str(key) for key in loaded["mismatched_keys"]):
        raise BadInput(f"{model_name_or_path} lacks {len(missing)} of its weights, {missing[0]} for one: the files do not belong to its config.json")
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(model.config, name, None) not in (None, 1, 1.0):
            raise BadInput(f"models of the kind {model.config.model_type} change their logits ({name}), which the evaluation here would leave out")
    stored = model.get_output_embeddings()._hf_hook.weights_map.dataset.index
    for name, source in model.all_tied_weights_keys.items():  # transformers forgets them where it copies pickles
        stored.setdefault(name, stored[source])
    device = "cuda" if torch.cuda.is_available() else "cpu"  # with all on disk, accelerate would take the CPU
    for module in model.modules():
        if hasattr(module, "_hf_hook"):
            module._hf_hook.execution_device = device
        module._buffers.update({name: value.to(device) for name, value in module._buffers.items() if value is not None})
    return model.eval(), tokenizer, stored, device


def linear_layers(model, group_size: int) -> dict:
    """{name: module} of what is quantized: the linear layers inside of the blocks. BadInput if one cannot be."""
    import torch

    blocks = max((module for module in model.modules() if isinstance(module, torch.nn.ModuleList)), key=len)
    linear = {module for module in blocks.modules() if isinstance(module, torch.nn.Linear)}
    rest = [name for name, p in blocks.named_parameters() if p.dim() > 1 and not any(p is module.weight for module in linear)]
    if rest or not linear:
        raise BadInput(f"{model.name_or_path}: most of this model is not in linear layers but in others ({(rest or ['none'])[0]}), which are not known here")
    found = {name: module for name, module in model.named_modules() if module in linear}
    for name, module in found.items():
        if module.in_features % MULTIPLE or module.out_features % MULTIPLE or module.in_features % max(group_size, 1):
            sizes = [g for g in (128, 64, 32) if module.in_features % g == 0 and module.out_features % MULTIPLE == 0]
            raise BadInput(f"--group_size={group_size}: {name} has {module.in_features} inputs and {module.out_features} outputs; "
                           + (f"take {sizes[0]}" if sizes else f"only multiples of {MULTIPLE} can be quantized"))
    return found


def choose_examples(tokenizer, template: str, calibration_path: str, eval_path: str | None, max_length: int, calibration_size: int, seed: int):
    """Examples to calibrate on, calibration_size * max_length tokens of them, and a quarter as many others to evaluate on, 16 * max_length at most."""
    import numpy

    def read(path: str):
        if holds_text(path):
            return tokenize_documents(path, Chat(copy.deepcopy(tokenizer), "plain"), max_length)[0]
        chat = Chat(copy.deepcopy(tokenizer), template)
        if chat.new_tokens:  # their rows, if the model has any to spare, were never trained
            raise BadInput(f"--template={template} writes tokens that this model does not have ({chat.new_tokens[0]}): take the one that it was trained with")
        return tokenize_records(path, chat, max_length)[0]

    def take(source, numbers, tokens: int) -> list[dict]:
        numbers = numpy.random.default_rng(seed).permutation(numbers)
        lengths = numpy.asarray(source.with_format("numpy")["length"][:])[numbers]
        enough = int(numpy.searchsorted(numpy.cumsum(lengths), tokens)) + 1  # the last one may be longer than what is left
        return [source[int(e)] for e in sorted(numbers[:enough])]

    examples = read(calibration_path)
    others, chosen, held = (read(eval_path) if eval_path else examples), range(len(examples)), ()
    if eval_path:
        held = range(len(others))
    elif (records := len(set(examples["record"]))) > 1:
        chosen, held = hold_out(examples, max(1, records // 4), seed)
    else:
        raise BadInput(f"--calibration_path={calibration_path} holds one record only: give more, or an --eval_path")
    return take(examples, chosen, calibration_size * max_length), take(others, held, min(16, max(1, calibration_size // 4)) * max_length)


def holds_text(path: str) -> bool:
    """Whether a file or folder holds documents, rather than instructions or dialogues."""
    if os.path.isdir(path) or path.endswith(".txt"):
        return True
    row = next(iter(read_rows(path, Counter())), None)
    for turns_of in (row_turns, document_turns):  # an instruction may have a column `text` besides
        with contextlib.suppress(BadInput, AttributeError):  # of another kind, or no object
            turns_of(row, Counter())
            return turns_of is document_turns
    return False  # neither: reading it says what is wrong


def make_rows(examples: tuple[list[dict], list[dict]], max_length: int, model):
    """What is to calibrate and to evaluate on as rows of one batch: whole examples laid end to end, which transformers keeps apart by their
    positions; one a row, with more padding, where it cannot (BLOOM).

    Padding stands behind them, where no token sees it, once in each row at least: so transformers always makes a mask. Without one, torch would
    hold all T x T scores of grouped heads on a GPU, having no fused kernel for them in fp32. Returns input_ids, labels, position_ids (or None) and
    whether there is a token, (B, T) each, and how many of the B rows are to calibrate on.
    """
    import torch

    packed = model._supports_attention_backend and set(getattr(model.config, "layer_types", None) or []) <= {"full_attention", "sliding_attention"}
    blocks = [pack([len(example["input_ids"]) for example in part], max_length) if packed else [[e] for e in range(len(part))] for part in examples]
    rows = [[part[e] for e in block] for part, of_part in zip(examples, blocks) for block in of_part]

    def join(piece, padding):
        joined = [torch.tensor([value for example in row for value in piece(example)] + [padding]) for row in rows]
        return torch.nn.utils.rnn.pad_sequence(joined, batch_first=True, padding_value=padding)

    ids, labels = join(lambda example: example["input_ids"], 0), join(lambda example: [IGNORE_INDEX, *example["labels"][1:]], IGNORE_INDEX)
    positions, real = join(lambda example: range(len(example["input_ids"])), 0), join(lambda example: [True] * len(example["input_ids"]), False)
    return ids, labels, positions if packed else None, real, len(blocks[0])


# ---- one pass through the model ----
def quantize_in_passing(linear: dict, folder: Path, settings: dict, real, evaluated: int) -> set:
    """Let the linear layers of a model quantize themselves when their inputs come, and put out what they will from now on.

    The rows of every input are the positions of one batch: those to calibrate on, then three times those to evaluate on, for the quantized,
    the original and the rounded weights. Each matrix goes into a file of its own in `folder`, and is taken as it is where there is one already.
    Returns a set, to which the name of each is added when it was at work.

    Args:
        real: (B, T), false where there is padding in what is calibrated on.
        evaluated: Positions to evaluate on.
    """
    import torch
    from safetensors.torch import load_file, save_file
    from torch.nn import functional as F
    from tqdm import tqdm

    calibrated, padding = real.numel(), (~real).flatten().nonzero()[:, 0]
    splits, done, bar = [calibrated + evaluated, evaluated, evaluated], set(), tqdm(total=len(linear), desc="quantizing", unit=" matrices")
    shared = None, None, None  # by query, key and value: their input, and what inverse_factor makes of it

    def forward(name: str, module, x):
        """x (..., in) -> (..., out)."""
        nonlocal shared
        weight, rows, file = module.weight, x.reshape(-1, x.shape[-1]), folder / f"{name}.safetensors"  # (out, in), (N, in)
        if len(rows) != sum(splits):
            raise RunStopped(f"{name} sees {len(rows)} of {sum(splits)} positions: a model that routes them is not known here")
        if file.is_file():
            parts = {part: tensor.to(x.device) for part, tensor in load_file(file).items()}
        else:
            if shared[0] is not x:
                rows[padding] = 0  # no token sees what comes of it
                shared = x, *inverse_factor(hessian(rows[:calibrated]), settings)
            parts = to_parts(*quantize(weight, *shared[1:], settings), settings)
            save_file({part: tensor.cpu() for part, tensor in parts.items()}, unfinished := file.with_suffix(".unfinished"))
            unfinished.rename(file)
        done.add(name)
        bar.update()
        if len(done) == len(linear):
            bar.close()
        outputs = zip(rows.split(splits), (dequantize(parts, settings), weight, round_to_nearest(weight, settings)))
        return torch.cat([F.linear(part, matrix, module.bias) for part, matrix in outputs]).view(*x.shape[:-1], -1)

    for name, module in linear.items():
        module._old_forward = partial(forward, name, module)  # what accelerate calls while it holds the weight
    return done


def evaluate_copies(head, hidden, labels) -> dict[str, float]:
    """Perplexities by quantized, original and rounded weights, from the last hidden states (3 * B, T, D) and the labels (B, T)."""
    import torch
    from torch.nn import functional as F

    def losses(hidden, targets):
        """(N, D), (N,) -> (N,), a chunk of logits at a time."""
        chunks = zip(*(tensor.split(max(1, LOGITS_AT_ONCE // len(head.weight))) for tensor in (hidden, targets)))
        return torch.cat([F.cross_entropy(F.linear(part, head.weight, head.bias), those, reduction="none") for part, those in chunks])

    head._old_forward = losses  # as above; the head is read once
    trained = labels[:, 1:] != IGNORE_INDEX
    hidden = hidden.view(3, *labels.shape, -1)[:, :, :-1][:, trained]  # (3, N, D)
    found = head(hidden.flatten(0, 1), labels[:, 1:][trained].repeat(3)).view(3, -1).mean(dim=1).exp()
    return {name: round(float(value), 4) for name, value in zip(("gptq", "original", "rounded"), found)}


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
    import torch

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
    import torch

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


def pack_codes(codes, bits: int):
    """Codes (n, m) of 0 to 2^bits - 1 as int32 (n * bits / 32, m): each column one stream of bits, n a multiple of 32."""
    import torch

    n, m = codes.shape
    codes = codes.reshape(n // 32, 32, m).long()
    words = torch.zeros(n // 32, bits, m, dtype=torch.int64, device=codes.device)  # 32 codes fill `bits` words
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        words[:, word] |= codes[:, i] << shift & 0xFFFFFFFF
        if shift + bits > 32:
            words[:, word + 1] |= codes[:, i] >> 32 - shift
    return torch.where(words >= 2**31, words - 2**32, words).int().view(-1, m)


def to_parts(codes, scales, zeros, g_idx, settings: dict) -> dict:
    """codes (in, out), scales and zeros (groups, out), g_idx (in) -> the four tensors of the file, which is as its settings say."""
    bits, less = settings["bits"], int(settings["checkpoint_format"] == "gptq")
    return {"qweight": pack_codes(codes, bits), "qzeros": pack_codes(zeros.T - less, bits).T.contiguous(), "scales": scales.half(), "g_idx": g_idx.int()}


# ---- writing ----
def begin_or_go_on(output_dir: Path, facts: dict, size: float) -> Path:
    """The folder .NAME-unfinished beside output_dir, new or as a run with the same facts left it; BadInput if another run did."""
    unfinished = output_dir.parent / f".{output_dir.name}-unfinished"
    begun = unfinished / "run.json"
    lock_folder(unfinished)
    before = read_json(begun) if begun.is_file() else facts
    for name in facts:
        if before.get(name) != facts[name]:
            raise BadInput(f"{unfinished} was begun with {name} = {str(before.get(name))[:20]}, now it is {str(facts[name])[:20]}: give the same, or remove "
                           f"that folder")
    if not begun.is_file():
        shutil.rmtree(unfinished / "parts", ignore_errors=True)
        if (free := shutil.disk_usage(output_dir.parent).free) < size:
            raise BadInput(f"--output_dir={output_dir} has {free / 1e9:.1f} GB free, {size / 1e9:.1f} GB are to be written: free some space")
        (unfinished / "parts").mkdir()
        (unfinished / "facts").write_text(json.dumps(facts), "utf-8")
        (unfinished / "facts").rename(begun)  # there whole or not at all
    return unfinished


def result(model, stored: dict, linear: dict, folder: Path, dtype):
    """Yield (name, tensor) of what is to be saved: the four parts of each matrix, and what is not quantized as it is, or in 16 bit where it had 32."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    for name, tensor in model.state_dict().items():
        layer, _, leaf = name.rpartition(".")
        if layer in linear and leaf == "weight":
            yield from ((f"{layer}.{part}", of_part) for part, of_part in load_file(folder / f"{layer}.safetensors").items())
        elif name not in model.all_tied_weights_keys:
            if name in stored:
                with safe_open(stored[name]["safetensors_file"], "pt") as file:
                    tensor = file.get_tensor(stored[name]["weight_name"])
            tensor = tensor.to(dtype) if tensor.is_floating_point() and tensor.itemsize > 2 else tensor
            if not tensor.isfinite().all():
                raise RunStopped(f"{name} holds numbers beyond the 65,504 of fp16: convert the model to bf16 first")
            yield name, tensor


def save_shards(folder: Path, tensors) -> None:
    """Write (name, tensor) pairs as the safetensors files of a model, SHARD bytes at once, and read them back."""
    import torch
    from safetensors.torch import load_file, save_file

    held, shards = {}, []
    for name, tensor in itertools.chain(tensors, [(None, None)]):
        if held and (name is None or sum(other.nbytes for other in held.values()) + tensor.nbytes > SHARD):
            save_file(held, file := folder / f"{len(shards)}.part", {"format": "pt"})
            if not all(torch.equal(held[other], read) for other, read in load_file(file).items()):
                raise RunStopped(f"{file} was written, but reads back otherwise: is the disk damaged?")
            shards, held = [*shards, list(held)], {}
        held[name] = tensor
    files = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)] if len(shards) > 1 else ["model.safetensors"]
    for number, file in enumerate(files):
        (folder / f"{number}.part").rename(folder / file)
    if len(files) > 1:
        index = {"metadata": {}, "weight_map": {name: file for file, names in zip(files, shards) for name in names}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), "utf-8")


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


if __name__ == "__main__":
    cli(main)
