"""Make a model out of its base and a delta, bit for bit, or the delta out of both: how weights are passed on whose base may not be.

Reads   base and delta, or with --make base and tuned model: safetensors folders of any shards, .bin with --allow_pickle
Writes  target, a model folder for generate.py; or with --make the delta, of the size of the model

    python -m apply_delta --base B --target T --delta D               # writes T
    python -m apply_delta --base B --target T --delta D --make True   # writes D

A delta made here holds the difference of the bit patterns, as integers that wrap around, so that nothing is rounded. Its
delta.json holds the SHA-256 of every tensor of base, delta and target: a wrong base is refused before anything is
written, and every tensor is checked as it is written. Rows and tensors that the base lacks are taken as zero there, so they stand
whole in the delta. Deltas of floating-point numbers, as published for Ziya and by FastChat, are added as their own
scripts do it, but hold nothing that could tell a wrong base.

Time is that of reading, hashing and writing; memory is 50 MB, for sums 300 MB, whatever the model (benchmarks/surgery.py).
"""
import hashlib
import json
import math
import shutil
import sys
from functools import partial
from pathlib import Path

import numpy

from tensors import (CHUNK, EMBEDDINGS, HEADS, ROTARY, Shards, Weights, check_new_folder, files_beside, in_threads, local_folder, open_model,
                     torch_dtype, unfinished_folder)
from utils import BadInput, RunStopped, cli, file_hash, show


def main(
    *,
    base: str,
    target: str,
    delta: str,
    allow_pickle: bool = False,
    make: bool = False,
):
    """Make a model out of its base and a delta, or the delta out of both.

    Args:
        base: Folder or hub name of the base model.
        target: Folder of the tuned model: written, or read to make the delta.
        delta: Folder of the delta: read, or written to make it.
        allow_pickle: Load weights that are pickles, which can run code.
        make: Write the delta from base and target, instead of the target from base and delta.
    """
    show(locals())
    source, result, flag = (target, delta, "delta") if make else (delta, target, "target")
    check_new_folder(result, flag)

    # ---- load ----
    old, given = open_model(local_folder(base, allow_pickle), allow_pickle), local_folder(source, allow_pickle)
    exact = make or (given / "delta.json").is_file()
    if make:
        new, act = open_model(given, allow_pickle), make_tensor
        check_fit(old, new, "target")
        written = {name: tensor._replace(dtype=integers(tensor)) for name, tensor in new.tensors.items()}
    elif exact:
        new, facts = open_delta(given)
        check_base(old, facts["base"])
        act = partial(restore_tensor, facts)
        written = {name: tensor._replace(dtype=facts["dtypes"][name]) for name, tensor in new.tensors.items()}
    else:
        new, act = open_sums(given, allow_pickle), add_tensor
        check_fit(old, new, "delta")
        check_sums(old, new)
        written = {name: tensor for name, tensor in new.tensors.items() if not name.endswith(ROTARY)}

    # ---- apply ----
    beside = [new.folder / name for name in facts["files"]] if exact and not make else files_beside(new.folder)
    size = sum(tensor.size for tensor in written.values()) + sum(file.stat().st_size for file in beside)
    with unfinished_folder(Path(result), size, flag, keep=exact and not make) as unfinished:
        shards = Shards(unfinished, "delta" if make else "model", written)
        hashes = list(in_threads(lambda name: act(old, new, shards, name), list(written), "making" if make else "applying"))

        # ---- save ----
        Weights(unfinished, "delta" if make else "model")  # every file has the length that its header says
        for file in beside:
            shutil.copyfile(file, unfinished / file.name)
        if make:
            facts = {"format": 1, "files": {file.name: file_hash(unfinished / file.name) for file in beside}, "base": dict(hash_all(old)),
                     "delta": {name: of_delta for name, (of_delta, _) in zip(written, hashes)},
                     "target": {name: of_target for name, (_, of_target) in zip(written, hashes)},
                     "dtypes": {name: tensor.dtype for name, tensor in new.tensors.items()}}
            (unfinished / "delta.json").write_text(json.dumps(facts, indent=1), "utf-8")
    print(f"{result}: {len(written)} tensors, {size / 1e9:.2f} GB" + ", every SHA-256 as delta.json has it" * (exact and not make))


# ---- what is given ----
def open_delta(folder: Path) -> tuple[Weights, dict]:
    """A delta made here and its delta.json; BadInput if it is not whole."""
    try:
        facts = json.loads((folder / "delta.json").read_text("utf-8"))
        dtypes, names = facts["dtypes"], [facts[key].keys() for key in ("delta", "target")]
        known = facts["format"] == 1 and names == [dtypes.keys()] * 2 and all(Path(name).name == name for name in facts["files"])
    except (ValueError, KeyError, AttributeError, TypeError):
        known = False
    if not known:
        raise BadInput(f"{folder}/delta.json is not as apply_delta.py writes it: download the delta again")
    weights = Weights(folder, "delta")
    for problem, rest in (("lacks", dtypes.keys() - weights.tensors.keys()), ("has besides", weights.tensors.keys() - dtypes.keys())):
        if rest:
            raise BadInput(f"{folder} {problem} {len(rest)} tensors, {min(rest)} for one: its files do not belong to its delta.json")
    for name, wanted in facts["files"].items():
        if not (folder / name).is_file() or file_hash(folder / name) != wanted:
            raise BadInput(f"{folder}/{name} is missing or was changed since the delta was made: download it again")
    return weights, facts


def open_sums(folder: Path, allow_pickle: bool) -> Weights:
    """A delta of floating-point numbers, which has the shape of a model."""
    if (folder / "adapter_config.json").is_file():
        raise BadInput(f"{folder} is a LoRA adapter, no delta: merge_lora.py merges it into its base")
    weights = open_model(folder, allow_pickle)
    print(f"warning: {folder} has no delta.json, so it is taken for a sum of floating-point numbers, as published for Ziya and by FastChat. "
          f"Nothing in it tells the right base from a wrong one: try the result before you rely on it", file=sys.stderr)
    return weights


def check_fit(old: Weights, new: Weights, flag: str) -> None:
    """BadInput if tensors of `new`, which is --flag, are missing or do not fit those of the base; rows may be added to each."""
    tied = json.loads((new.folder / "config.json").read_text("utf-8")).get("tie_word_embeddings")
    missing = [name for name in old.tensors if name not in new.tensors and not name.endswith(ROTARY) and not (tied and name.endswith(HEADS))]
    extra = [name for name in new.tensors if name not in old.tensors and not name.endswith(ROTARY)]
    if missing:
        raise BadInput(f"--{flag}={new.folder} lacks {len(missing)} tensors of the base, {missing[0]} for one")
    if extra and flag == "delta":
        raise BadInput(f"--{flag}={new.folder} has {len(extra)} tensors that the base lacks, {extra[0]} for one")
    for name in [name for name in new.tensors if name in old.tensors and not name.endswith(ROTARY)]:
        a, b = old.tensors[name], new.tensors[name]
        if a.shape[1:] != b.shape[1:] or a.shape[:1] > b.shape[:1] or len(a.shape) != len(b.shape):
            raise BadInput(f"--{flag}={new.folder}: {name} is {list(b.shape)}, in the base it is {list(a.shape)}: it was made from another base")
        if flag == "target" and integers(a) != integers(b):
            raise BadInput(f"--{flag}={new.folder}: {name} is of type {b.dtype}, in the base of type {a.dtype}: save both in types of one width first")


def check_base(old: Weights, wanted: dict[str, str]) -> None:
    """BadInput, naming the first tensor that differs, if this is not the base that a delta was made from."""
    found = {name for name in old.tensors if not name.endswith(ROTARY)}
    for problem, names in (("lacks", wanted.keys() - found), ("has besides", found - wanted.keys())):
        if names:
            raise BadInput(f"--base={old.folder} {problem} {len(names)} tensors, {min(names)} for one: the delta was made from another base")
    for name, found in hash_all(old):
        if found != wanted[name]:
            raise BadInput(f"--base={old.folder} is not the base that the delta was made from: {name} differs (SHA-256 {found[:12]}, not {wanted[name][:12]})")


def check_sums(old: Weights, new: Weights) -> None:
    """BadInput if what is given as a sum is a whole model, or is larger than the base, as when the two are swapped."""
    matrices = [name for name, tensor in new.tensors.items() if len(tensor.shape) == 2 and not name.endswith(EMBEDDINGS + HEADS)]
    for name in matrices[:: max(1, len(matrices) // 4)]:
        first, last = next(new.tensors[name].row_chunks())
        a, b = old.floats(name, first, last).flatten(), new.floats(name, first, last).flatten()
        if a.dot(b) > a.dot(a) / 2:
            raise BadInput(f"--delta={new.folder} is no delta but a whole model: its {name} is nearly that of the base")
        if b.dot(b) > a.dot(a):
            raise BadInput(f"--delta={new.folder}: its {name} is larger than that of --base={old.folder}: is the delta given as the base?")


# ---- tensors ----
def integers(tensor) -> str:
    """The integer type, in the words of safetensors, whose numbers are as wide as those of a tensor."""
    return f"I{8 * tensor.size // max(1, numpy.prod(tensor.shape, dtype=int))}"


def shift(data: numpy.ndarray, old: Weights, name: str, start: int, dtype: str, sign: int) -> None:
    """Add the bit patterns of the base to those in `data`, or take them away; they wrap around. What the base lacks is zero."""
    if name in old.tensors and not name.endswith(ROTARY):
        words, by = data.view(dtype.lower().replace("i", "uint")), old.read(name, start, start + len(data))
        change = numpy.add if sign > 0 else numpy.subtract
        words = words[: len(by) // words.itemsize]
        change(words, by.view(words.dtype), out=words)


def make_tensor(old: Weights, new: Weights, shards: Shards, name: str) -> tuple[str, str]:
    """Write the difference of one tensor; its SHA-256 and that of the target."""
    tensor, of_delta, of_target = new.tensors[name], hashlib.sha256(), hashlib.sha256()
    for start in range(0, tensor.size, CHUNK):
        data = new.read(name, start, start + CHUNK)
        of_target.update(data)
        shift(data, old, name, start, integers(tensor), -1)
        of_delta.update(data)
        shards.write(name, start, data)
    return of_delta.hexdigest(), of_target.hexdigest()


def restore_tensor(facts: dict, old: Weights, new: Weights, shards: Shards, name: str) -> None:
    """Write one tensor of the target, if a killed run has not done so, and check it."""
    size, wanted, found = new.tensors[name].size, facts["target"][name], hashlib.sha256()
    if name in shards.kept and digest(shards, name, size) == wanted:
        return
    for start in range(0, size, CHUNK):
        data = new.read(name, start, start + CHUNK)
        shift(data, old, name, start, new.tensors[name].dtype, 1)
        found.update(data)
        shards.write(name, start, data)
    if found.hexdigest() != wanted:
        if digest(new, name, size) != facts["delta"][name]:
            raise BadInput(f"{new.folder} is damaged: its {name} is not as it was made. Download it again; what is done is kept")
        raise RunStopped(f"{name} did not come out as it was made: was the base changed meanwhile, or is the disk failing?")


def add_tensor(old: Weights, new: Weights, shards: Shards, name: str) -> None:
    """Write base + delta in the type of the delta, summed in fp32; rows that the base lacks stand whole in the delta."""
    import torch

    tensor, rows = new.tensors[name], old.tensors[name].shape[0]
    whole = name.endswith(EMBEDDINGS + HEADS) and stands_whole(old, new, name)
    for first, last in tensor.row_chunks():
        data = new.floats(name, first, last)
        if first < rows and not whole:
            data[: rows - first] += old.floats(name, first, min(last, rows))
        data = data.to(torch_dtype(tensor.dtype))
        if not math.isfinite(data.sum(dtype=torch.float32)):  # one pass, where isfinite() takes several
            raise RunStopped(f"{name} becomes infinite or no number: this delta is for another base, or one of the two is damaged")
        width = tensor.row * data.itemsize
        shards.write(name, first * width, data.view(torch.uint8).numpy())


def stands_whole(old: Weights, new: Weights, name: str) -> bool:
    """Whether a table stands whole in the delta, as in Ziya's, or as a difference, as in FastChat's: is it nearer to the base or to zero?"""
    both = of_base = 0.0
    chunks = list(old.tensors[name].row_chunks())
    for first, last in chunks[:: max(1, len(chunks) // 16)]:
        a, b = old.floats(name, first, last).flatten(), new.floats(name, first, last).flatten()
        both, of_base = both + float(a.dot(b)), of_base + float(a.dot(a))
    print(f"{name} stands {'whole in the delta' if both > of_base / 2 else 'in the delta as a difference'}", file=sys.stderr)
    return both > of_base / 2


def hash_all(weights: Weights):
    """Yield (name, SHA-256) of every tensor of a base, in the order of its files."""
    names = [name for name in weights.tensors if not name.endswith(ROTARY)]
    return zip(names, in_threads(lambda name: digest(weights, name, weights.tensors[name].size), names, "hashing the base"))


def digest(source: Weights | Shards, name: str, size: int) -> str:
    """SHA-256 of a tensor as it lies on disk."""
    found = hashlib.sha256()
    for start in range(0, size, CHUNK):
        found.update(source.read(name, start, min(start + CHUNK, size)))
    return found.hexdigest()


if __name__ == "__main__":
    cli(main)
