"""Make a model out of its base and a delta, bit for bit, or the delta out of both: how weights are passed on whose base may not be.

Reads   base and delta, or with --make base and tuned model: safetensors folders of any shards, .bin with --allow_pickle
Writes  target, a model folder for generate.py; or with --make the delta, of the size of the model

    python -m apply_delta --base B --target T --delta D               # writes T
    python -m apply_delta --base B --target T --delta D --make True   # writes D

A delta made here holds the difference of the bit patterns, as integers that wrap around, so that nothing is rounded. Its
delta.json holds the SHA-256 of every tensor of base, delta and target: a wrong base is refused before anything is
written, and every tensor is checked before it is. Rows and tensors that the base lacks are taken as zero there, so they stand
whole in the delta. Deltas of floating-point numbers, as published for Ziya and by FastChat, are added as their own
scripts do it, but hold nothing that could tell a wrong base.

Time is that of reading, hashing and writing; memory is 0.4 GB above torch's own, whatever the model (benchmarks/surgery.py).
"""
import contextlib
import ctypes
import fcntl
import hashlib
import itertools
import json
import os
import shutil
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from utils import BadInput, RunStopped, check_model, cli, file_hash, show

EMBEDDINGS = ("embed_tokens.weight", "word_embeddings.weight", "wte.weight", "embed_in.weight")  # how the names of these tables end
HEADS = ("lm_head.weight", "embed_out.weight")
ROTARY = "rotary_emb.inv_freq"  # a buffer that old conversions hold and transformers computes: no weight
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
          "U8": "uint8", "BOOL": "bool"}  # what safetensors and delta.json call torch's types


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
    flags = dict(locals())
    source, result, flag = (target, delta, "delta") if make else (delta, target, "target")
    if os.path.exists(result) and (not os.path.isdir(result) or os.listdir(result)):
        raise BadInput(f"--{flag}={result} exists already: give a new folder, or remove it first")
    if os.path.isdir(result) and os.path.ismount(result):
        raise BadInput(f"--{flag}={result} is a mount point, onto which no result can be renamed: give a folder inside it")
    if not make and Path(source, "adapter_config.json").is_file():
        raise BadInput(f"{source} is a LoRA adapter, no delta: merge_lora.py merges it into its base")
    for folder in [base] if not make and Path(source, "delta.json").is_file() else [base, source]:
        check_model(folder, allow_pickle)
    show(flags)

    # ---- load ----
    old, given = Weights(local_folder(base, allow_pickle), allow_pickle=allow_pickle), local_folder(source, allow_pickle)
    exact, hashes = not make and (given / "delta.json").is_file(), {}
    new, facts = open_delta(given) if exact else (Weights(given, allow_pickle=allow_pickle), {})
    if exact:
        check_base(old, facts["base"])
        work = partial(restore_tensor, old, new, facts)
    else:
        check_fit(old, new, "target" if make else "delta")
        work = partial(make_tensor, old, new, hashes) if make else partial(add_tensor, old, new)
    names = [name for name in new.tensors if make or exact or not name.endswith(ROTARY)]

    # ---- apply ----
    beside = {name: given / name for name in facts["files"]} if exact else files_beside(given)
    size = sum(new.tensors[name].nbytes for name in names) + sum(file.stat().st_size for file in beside.values())
    with unfinished_folder(Path(result), size, flag) as unfinished:
        write_shards(unfinished, in_threads(work, names, "making" if make else "applying"), "delta" if make else "model")

        # ---- save ----
        for name, file in beside.items():
            shutil.copyfile(file, unfinished / name)
        if make:
            facts = {"format": 2, "files": {name: file_hash(unfinished / name) for name in beside}, "base": dict(hash_all(old)),
                     "delta": {name: hashes[name][0] for name in names}, "target": {name: hashes[name][1] for name in names},
                     "dtypes": {name: type_name(new.tensors[name]) for name in names}}
            (unfinished / "delta.json").write_text(json.dumps(facts | {"sha256": seal(facts)}, indent=1), "utf-8")
    print(f"{result}: {len(names)} tensors, {size / 1e9:.2f} GB" + ", every SHA-256 as delta.json has it" * exact)


# ---- what is given ----
def open_delta(folder: Path) -> tuple["Weights", dict]:
    """A delta made here and its delta.json; BadInput if it is not whole."""
    try:
        facts = json.loads((folder / "delta.json").read_text("utf-8"))
        dtypes, names = facts["dtypes"], [facts[key].keys() for key in ("delta", "target")]
        known = facts["format"] == 1 or (facts["format"] == 2 and facts.pop("sha256") == seal(facts))  # the first format had no seal
        known = known and {*dtypes.values()} <= DTYPES.keys() and facts["base"].keys() and names == [dtypes.keys()] * 2
        known = known and all(Path(name).name == name for name in facts["files"])
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


def seal(facts: dict) -> str:
    """SHA-256 of delta.json's own content: a damaged type would give another tensor with the right bytes."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def check_base(old: "Weights", wanted: dict[str, str]) -> None:
    """BadInput, naming the first tensor that differs, if this is not the base that a delta was made from."""
    found = {name for name in old.tensors if not name.endswith(ROTARY)}
    for problem, names in (("lacks", wanted.keys() - found), ("has besides", found - wanted.keys())):
        if names:
            raise BadInput(f"--base={old.folder} {problem} {len(names)} tensors, {min(names)} for one: the delta was made from another base")
    for name, found in hash_all(old):
        if found != wanted[name]:
            raise BadInput(f"--base={old.folder} is not the base that the delta was made from: {name} differs (SHA-256 {found[:12]}, not {wanted[name][:12]})")


def check_fit(old: "Weights", new: "Weights", flag: str) -> None:
    """BadInput if tensors of `new`, which is --flag, are missing or do not fit those of the base; rows may be added to each."""
    tied = json.loads((new.folder / "config.json").read_text("utf-8")).get("tie_word_embeddings")
    missing = [name for name in old.tensors if name not in new.tensors and not name.endswith(ROTARY) and not (tied and name.endswith(HEADS))]
    extra = [name for name in new.tensors if name not in old.tensors and not name.endswith(ROTARY)]
    if missing:
        raise BadInput(f"--{flag}={new.folder} lacks {len(missing)} tensors of the base, {missing[0]} for one")
    if extra and flag == "delta":
        raise BadInput(f"--{flag}={new.folder} has {len(extra)} tensors that the base lacks, {extra[0]} for one")
    shared = [name for name in new.tensors if name in old.tensors and not name.endswith(ROTARY)]
    for name in shared:
        a, b = old.tensors[name], new.tensors[name]
        if a.shape[1:] != b.shape[1:] or a.shape[:1] > b.shape[:1] or a.dim() != b.dim():
            raise BadInput(f"--{flag}={new.folder}: {name} is {list(b.shape)}, in the base it is {list(a.shape)}: it was made from another base")
        if flag == "target" and a.itemsize != b.itemsize:
            raise BadInput(f"--{flag}={new.folder}: {name} is of type {type_name(b)}, in the base of {type_name(a)}: save both in types of one width first")
    if flag == "target":
        return
    print(f"warning: {new.folder} has no delta.json, so it is taken for a sum of floating-point numbers, as published for Ziya and by FastChat. "
          f"Nothing in it tells the right base from a wrong one: try the result before you rely on it", file=sys.stderr)
    matrices = [name for name in shared if new.tensors[name].dim() == 2 and not name.endswith(EMBEDDINGS + HEADS)]
    for name in matrices[:: max(1, len(matrices) // 4)]:
        a, b = (weights.read(name, slice(256)).float().flatten() for weights in (old, new))
        if a.dot(b) > a.dot(a) / 2:
            raise BadInput(f"--delta={new.folder} is no delta but a whole model: its {name} is nearly that of the base")
        if b.dot(b) > a.dot(a):
            raise BadInput(f"--delta={new.folder}: its {name} is larger than that of --base={old.folder}: is the delta given as the base?")


# ---- one tensor ----
def make_tensor(old: "Weights", new: "Weights", hashes: dict, name: str):
    """The difference of one tensor; its SHA-256 and that of the target go into `hashes`."""
    tensor = new.read(name)
    of_target = digest(tensor)
    data = shifted(tensor, old, name, -1)
    hashes[name] = digest(data), of_target
    return data


def restore_tensor(old: "Weights", new: "Weights", facts: dict, name: str):
    """One tensor of the target, checked."""
    import torch

    data = shifted(new.read(name), old, name, 1).view(getattr(torch, DTYPES[facts["dtypes"][name]]))
    if digest(data) != facts["target"][name]:
        if digest(new.read(name)) != facts["delta"][name]:
            raise BadInput(f"{new.folder} is damaged: its {name} is not as it was made. Download it again")
        raise RunStopped(f"{name} did not come out as it was made: was the base changed meanwhile, or is the disk failing?")
    return data


def shifted(tensor, old: "Weights", name: str, sign: int):
    """The bit patterns of a tensor, as integers, with those of the base added or taken away; they wrap around. What the base lacks is zero."""
    import torch

    words = tensor.contiguous().view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize])
    if name in old.tensors and not name.endswith(ROTARY):
        for part, by in pieces(words, old, name):
            part.add_(by.view(words.dtype), alpha=sign)
    return words


def add_tensor(old: "Weights", new: "Weights", name: str):
    """Base + delta in the type of the delta, summed in fp32; rows that the base lacks stand whole in the delta."""
    data = new.read(name).contiguous()
    if not name.endswith(EMBEDDINGS + HEADS) or not stands_whole(old, new, name):
        for part, by in pieces(data, old, name):
            for some, rest in zip(part.view(-1).split(2**17), by.reshape(-1).split(2**17)):  # so few stay in a core's cache
                some.copy_(some.float() + rest.float())
    if not all(end.isfinite() for end in data.aminmax()):  # one pass, where isfinite().all() takes several
        raise RunStopped(f"{name} becomes infinite or no number: this delta is for another base, or one of the two is damaged")
    return data


def pieces(data, old: "Weights", name: str):
    """Yield rows of `data` and those of the base that belong to them, some MB at a time: a mapping of the whole would take as much memory again."""
    shape = old.tensors[name].shape
    step = max(1, 2**22 * shape[0] // old.tensors[name].numel()) if shape else 0
    for rows in [slice(first, first + step) for first in range(0, shape[0], step)] if step else [None]:
        by = old.read(name, rows)
        yield (data if rows is None else data[rows][: len(by)]), by


def stands_whole(old: "Weights", new: "Weights", name: str) -> bool:
    """Whether a table stands whole in the delta, as in Ziya's, or as a difference, as in FastChat's: is it nearer to the base or to zero?"""
    both = of_base = 0.0
    for first in range(0, rows := len(old.tensors[name]), max(1, rows // 16)):
        a, b = (weights.read(name, slice(first, min(first + 64, rows))).float().flatten() for weights in (old, new))
        both, of_base = both + float(a.dot(b)), of_base + float(a.dot(a))
    print(f"{name} stands {'whole in the delta' if both > of_base / 2 else 'in the delta as a difference'}", file=sys.stderr)
    return both > of_base / 2


def hash_all(weights: "Weights"):
    """Yield (name, SHA-256) of every tensor of a base, in the order of its files."""
    names = [name for name in weights.tensors if not name.endswith(ROTARY)]
    return in_threads(lambda name: digest(weights.read(name)), names, "hashing the base")


def digest(tensor) -> str:
    """SHA-256 of the bytes of a tensor."""
    import torch

    return hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy()).hexdigest()


def type_name(tensor) -> str:
    return {f"torch.{of_torch}": name for name, of_torch in DTYPES.items()}[str(tensor.dtype)]


def in_threads(work, names: list[str], about: str):
    """Yield (name, work(name)) in order; two at a time, which hash side by side, and no more, which would take memory."""
    from tqdm import tqdm

    with ThreadPoolExecutor(2) as pool, tqdm(total=len(names), desc=about, unit=" tensors", leave=False) as bar:
        for two in (names[i : i + 2] for i in range(0, len(names), 2)):
            yield from zip(two, pool.map(work, two))
            bar.update(len(two))


# ==== tensors ====
# Weights as they lie in a folder, read one by one: a converter takes the memory of a few tensors, whatever the model.
BESIDE = (".json", ".jinja", ".model", ".py", ".tiktoken", ".txt")  # endings of what a model needs besides its weights


def local_folder(model_name_or_path: str, allow_pickle: bool = False) -> Path:
    """The folder of a model or a delta, fetched if it is a name on the hub; BadInput if a model is not whole, or quantized."""
    folder = Path(model_name_or_path)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(model_name_or_path, allow_patterns=[f"*{end}" for end in (*BESIDE, ".safetensors", *[".bin"] * allow_pickle)]))
        except (OSError, ValueError) as problem:
            raise BadInput(f"{folder} is no folder, and could not be fetched from the hub: {str(problem)[:200]}") from None
    if not (folder / "delta.json").is_file():
        check_model(str(folder), allow_pickle)
        if "quantization_config" in json.loads((folder / "config.json").read_text("utf-8")):
            raise BadInput(f"{folder} is quantized: give the 16-bit model that it was made from")
    return folder


class Weights:
    """The tensors in a folder, each read when it is asked for. `tensors` has type and shape of each, as a tensor on torch's meta device.

    Args:
        stem: The folder holds stem.safetensors, or shards with an index; or, with allow_pickle, one of the pickles.
    """

    def __init__(self, folder: Path, stem: str = "model", allow_pickle: bool = False):
        self.folder, self.tensors, self.paths, pickles = folder, {}, {}, (f"{stem}.bin", "pytorch_model.bin")
        candidates = [name for file in (f"{stem}.safetensors", *pickles * allow_pickle) for name in (file, f"{file}.index.json")]
        found = next((name for name in candidates if (self.folder / name).is_file()), None)
        if found is None:
            waiting = next((pickle for pickle in pickles if (self.folder / pickle).is_file()), None)
            why = f" but a pickle, {waiting}, which can run code when it is loaded: if you trust it, add --allow_pickle True" if waiting else ""
            raise BadInput(f"{folder} holds no {stem}.safetensors{why}")
        mapped = json.loads((self.folder / found).read_text("utf-8"))["weight_map"] if found.endswith(".json") else {}
        for path in [self.folder / file for file in sorted(set(mapped.values())) or [found]]:
            try:
                names, get, _ = self._open(path)
                self.tensors.update({name: get(name).to("meta") for name in names})
            except Exception as problem:  # safetensors, zip and pickle have their own for a file that is cut off
                raise BadInput(f"{path} could not be read ({str(problem)[:200]}): it is missing, cut off or damaged, "
                               f"or only points to the real one (git-lfs). Download it again") from None
            self.paths.update(dict.fromkeys(names, path))
        if missing := mapped.keys() - self.tensors.keys():
            raise BadInput(f"{folder} lacks {len(missing)} tensors that its {found} names, {min(missing)} for one")

    def read(self, name: str, rows: slice | None = None):
        """A tensor, or some of its rows, that may be changed; mapped anew, since pages that were read count as memory as long as a mapping lives."""
        _, get, get_slice = self._open(self.paths[name])
        return get(name) if rows is None else get_slice(name)[rows]

    def _open(self, path: Path):
        """The names in a file, and functions that map the tensor of one, whole or in part."""
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            opened = safe_open(path, "pt")
            return opened.offset_keys(), opened.get_tensor, opened.get_slice
        import torch

        held = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))  # files of torch before 1.6 are no zip
        return list(held), held.__getitem__, held.__getitem__


# ==== shards ====
# A folder written tensor by tensor, as they come, with what a model needs besides.
SHARD = 200e6  # bytes of tensors that are held, and then written as one file


def files_beside(folder: Path) -> dict[str, Path]:
    """What a model needs besides its weights, by name: configuration, tokenizer, chat template."""
    return {file.name: file for file in sorted(folder.iterdir()) if file.suffix in BESIDE and not file.name.endswith((".index.json", "delta.json"))}


def write_shards(folder: Path, tensors, stem: str = "model") -> None:
    """Write pairs of name and tensor as they come, in files of about 200 MB with an index, and read back what is in them."""
    from safetensors.torch import save_file

    with contextlib.suppress(AttributeError, OSError):  # glibc alone: what is freed between tensors that are held goes back to the system (M_MMAP_THRESHOLD)
        ctypes.CDLL(None).mallopt(-3, 2**20)
    parts, part, size, wanted = [], {}, 0, {}
    for name, tensor in itertools.chain(tensors, [(None, None)]):
        if part and (name is None or size + tensor.nbytes > SHARD):
            save_file(part, folder / f"{len(parts)}.part", {"format": "pt"})
            parts, part, size = [*parts, list(part)], {}, 0
        if name is not None:
            part[name], wanted[name], size = tensor.contiguous(), (tensor.dtype, tensor.shape), size + tensor.nbytes
        del tensor  # or it would live on while the next one is made
    files = [f"{stem}-{number:05}-of-{len(parts):05}.safetensors" for number in range(1, len(parts) + 1)] if len(parts) > 1 else [f"{stem}.safetensors"]
    for number, file in enumerate(files):
        (folder / f"{number}.part").rename(folder / file)
    if len(files) > 1:
        size = sum((folder / file).stat().st_size for file in files)
        index = {"metadata": {"total_size": size}, "weight_map": {name: file for file, names in zip(files, parts) for name in names}}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2), "utf-8")
    if {name: (tensor.dtype, tensor.shape) for name, tensor in Weights(folder, stem).tensors.items()} != wanted:
        raise RunStopped("the weights were written, but read back with other tensors: is the disk failing?")


@contextlib.contextmanager
def unfinished_folder(folder: Path, size: int, flag: str):
    """A folder, which --flag gave, that is there whole or not at all: write `size` bytes to the path this yields, it is renamed at the end."""
    folder = folder.resolve()  # a link cannot be renamed onto
    unfinished = folder.parent / f".{folder.name}-unfinished"  # a fixed name: the next run clears away what a killed one left
    try:
        unfinished.mkdir(parents=True, exist_ok=True)
    except OSError as problem:  # a name that is too long, a file system that takes no folders
        raise BadInput(f"--{flag}={str(folder)[:60]} cannot be written: {problem.strerror}") from None
    lock = os.open(unfinished, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BadInput(f"--{flag}={folder} is being written by another run") from None
    try:
        for left in unfinished.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        if (free := shutil.disk_usage(unfinished).free) < size:
            raise BadInput(f"--{flag}={folder} has {free / 1e9:.1f} GB free, {size / 1e9:.1f} GB are to be written: free some space")
        yield unfinished
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        os.close(lock)


if __name__ == "__main__":
    cli(main)
