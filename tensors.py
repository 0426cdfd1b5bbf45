"""Weights as they lie in a folder, read and written piece by piece: a converter takes megabytes, whatever the model.

A safetensors file is the length of its header in 8 bytes, the header in JSON, {name: {"dtype", "shape", "data_offsets"}},
and the bytes of the tensors end to end. That much is read and written here without torch, whose import alone takes
longer than a copy of a gigabyte, and without memory maps, whose pages would count as memory.
"""
import contextlib
import fcntl
import json
import math
import os
import re
import shutil
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy

from utils import BadInput, RunStopped, check_model

CHUNK = 2**20  # bytes read, changed and written at once by each thread: they stay in a core's cache
BESIDE = (".json", ".jinja", ".model", ".py", ".tiktoken", ".txt")  # endings of what a model needs besides its weights
EMBEDDINGS = ("embed_tokens.weight", "word_embeddings.weight", "wte.weight", "embed_in.weight")  # how the names of these tables end
HEADS = ("lm_head.weight", "embed_out.weight")
TOKENIZER = ("tokenizer", "special_tokens_map", "added_tokens", "vocab", "merges", "chat_template")  # how the names of its files begin
ROTARY = "rotary_emb.inv_freq"  # a buffer that old conversions hold and transformers computes: no weight


class Tensor(NamedTuple):
    dtype: str  # in the words of safetensors: BF16, F16, F32, I16, ...
    shape: tuple[int, ...]
    file: str
    start: int  # of its bytes in the file
    size: int  # in bytes

    @property
    def row(self) -> int:
        """Numbers in one row: the shape is (rows, ...)."""
        return math.prod(self.shape[1:])

    def row_chunks(self):
        """Yield (first, last) of rows that together are about CHUNK bytes in fp32."""
        rows, step = (self.shape or (1,))[0], max(1, CHUNK // (4 * max(1, self.row)))
        return ((first, min(first + step, rows)) for first in range(0, rows, step))


# ---- reading ----
class Weights:
    """The tensors in a folder, read on demand and from any thread.

    Args:
        folder: Holds stem.safetensors, or an index of shards; or, with allow_pickle, one of the pickles.
        stem: model, delta or adapter_model.
    """

    def __init__(self, folder: Path | str, stem: str = "model", allow_pickle: bool = False, pickles: tuple[str, ...] = ("pytorch_model.bin",)):
        self.folder, self.tensors, self.opened, self.unpickled = Path(folder), {}, {}, {}
        candidates = [f"{stem}.safetensors", f"{stem}.safetensors.index.json"]
        candidates += [name for pickle in pickles if allow_pickle for name in (pickle, f"{pickle}.index.json")]
        found = next((name for name in candidates if (self.folder / name).is_file()), None)
        if found is None:
            waiting = next((pickle for pickle in pickles if (self.folder / pickle).is_file()), None)
            why = f" but a pickle, {waiting}, which can run code when it is loaded: if you trust it, add --allow_pickle True" if waiting else ""
            raise BadInput(f"{folder} holds no {stem}.safetensors{why}")
        mapped = json.loads((self.folder / found).read_text("utf-8"))["weight_map"] if found.endswith(".json") else {}
        self.files = sorted(set(mapped.values())) or [found]
        for file in self.files:
            if not (self.folder / file).is_file():
                raise BadInput(f"{folder} lacks {file}, which its {found} names: finish the download")
            self._read_pickle(file) if file.endswith((".bin", ".pt", ".pth")) else self._read_header(file)
        if missing := mapped.keys() - self.tensors.keys():
            raise BadInput(f"{folder} lacks {len(missing)} tensors that its {found} names, {min(missing)} for one")

    def _read_header(self, file: str) -> None:
        path = self.folder / file
        size = path.stat().st_size
        self.opened[file] = stream = open(path, "rb", buffering=0)
        length = int.from_bytes(stream.read(8), "little")
        try:
            header = json.loads(stream.read(length)) if 8 + length <= size else None
        except ValueError:  # no JSON, no UTF-8
            header = None
        if not isinstance(header, dict):
            raise BadInput(f"{path} is no whole safetensors file, or only points to the real one (git-lfs): its header cannot be read. Download it again")
        header.pop("__metadata__", None)
        for name, about in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            start, end = about["data_offsets"]
            self.tensors[name] = Tensor(about["dtype"], tuple(about["shape"]), file, 8 + length + start, end - start)
        if size != (whole := max((t.start + t.size for t in self.tensors.values() if t.file == file), default=8 + length)):
            raise BadInput(f"{path} has {size:,} bytes, by its header it should have {whole:,}: it is cut off or damaged. Download it again")

    def _read_pickle(self, file: str) -> None:
        import torch

        names = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64", torch.int64: "I64", torch.bool: "BOOL"}
        path = self.folder / file
        try:  # files of torch before 1.6 are no zip and cannot be mapped
            held = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except Exception as problem:
            raise BadInput(f"{path} could not be loaded: {str(problem).strip().splitlines()[0][:200]}") from None
        for name, tensor in held.items():
            if tensor.dtype not in names:
                raise BadInput(f"{path}: {name} is of {tensor.dtype}, which is not read from a pickle")
            self.unpickled[name] = tensor
            self.tensors[name] = Tensor(names[tensor.dtype], tuple(tensor.shape), file, 0, tensor.numel() * tensor.element_size())

    def read(self, name: str, start: int = 0, stop: int | None = None) -> numpy.ndarray:
        """Bytes start to stop of a tensor, as an array of uint8 that may be written to."""
        tensor = self.tensors[name]
        stop = tensor.size if stop is None else min(stop, tensor.size)
        if name in self.unpickled:
            import torch

            return self.unpickled[name].contiguous().reshape(-1).view(torch.uint8)[start:stop].numpy().copy()
        data = numpy.empty(max(0, stop - start), "uint8")
        done = 0
        while done < len(data):
            count = os.preadv(self.opened[tensor.file].fileno(), [data[done:]], tensor.start + start + done)
            if not count:
                raise RunStopped(f"{self.folder / tensor.file} became shorter while it was read")
            done += count
        return data

    def floats(self, name: str, first: int = 0, last: int | None = None):
        """Rows first to last of a tensor as a torch tensor (last - first, ...) in fp32."""
        import torch

        tensor = self.tensors[name]
        kind = torch_dtype(tensor.dtype)
        if kind is None:
            raise BadInput(f"{self.folder}: {name} is of type {tensor.dtype}, not of 16 or 32 bit: is the model quantized? Take the one it was made from")
        width = tensor.row * kind.itemsize
        data = self.read(name, first * width, None if last is None else last * width)
        return torch.from_numpy(data).view(kind).float().view(-1, *tensor.shape[1:])


def same_floats(a: Weights, in_a: str, b: Weights, in_b: str) -> bool:
    """Whether two tensors hold the same numbers."""
    if in_b not in b.tensors or a.tensors[in_a].shape != b.tensors[in_b].shape:
        return False
    return all(bool((a.floats(in_a, *rows) == b.floats(in_b, *rows)).all()) for rows in a.tensors[in_a].row_chunks())


def torch_dtype(dtype: str):
    """The floating-point type of torch that safetensors calls `dtype`, or None."""
    import torch

    return {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}.get(dtype)


def local_folder(model_name_or_path: str, allow_pickle: bool = False) -> Path:
    """A folder as it is given, or that of a name on the hub, fetched if need be."""
    if os.path.isdir(model_name_or_path) or not re.fullmatch(r"[\w.-]+/[\w.-]+", model_name_or_path) or Path(model_name_or_path).parent.is_dir():
        return Path(model_name_or_path)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model_name_or_path, allow_patterns=[f"*{ending}" for ending in (*BESIDE, ".safetensors", *[".bin"] * allow_pickle)]))
    except (OSError, ValueError) as problem:
        raise BadInput(f"{model_name_or_path} is no folder, and could not be fetched from the hub: {str(problem).strip().splitlines()[0][:200]}") from None


def open_model(folder: Path, allow_pickle: bool = False) -> Weights:
    """The weights of a model folder; BadInput if it is something else or is not whole."""
    if (folder / "delta.json").is_file():
        raise BadInput(f"{folder} is a delta, no model: apply_delta.py makes the model out of it and its base")
    check_model(str(folder), allow_pickle)
    if "quantization_config" in json.loads((folder / "config.json").read_text("utf-8")):
        raise BadInput(f"{folder} is quantized: give the 16-bit model that it was made from")
    return Weights(folder, "model", allow_pickle)


def files_beside(folder: Path) -> list[Path]:
    """What a model needs besides its weights: configuration, tokenizer, chat template."""
    return sorted(file for file in folder.iterdir() if file.suffix in BESIDE and not file.name.endswith((".index.json", "delta.json")))


def carry_tokenizer(folders: list[Path], beside: dict[str, Path]) -> int:
    """Put the files of the tokenizers in `folders`, if there are any, in the place of those in `beside`: the last one counts.

    Returns its number of tokens, or 0. BadInput if a token of one has another number in the next.
    """
    numbers, owner = {}, None
    for folder in [folder for folder in folders if (folder / "tokenizer_config.json").is_file()]:
        for name in [name for name in beside if name.startswith(TOKENIZER)]:
            del beside[name]
        beside.update({file.name: file for file in files_beside(folder) if file.name.startswith((*TOKENIZER, "generation_config"))})
        if (folder / "tokenizer.json").is_file():  # without the seconds that transformers takes
            from tokenizers import Tokenizer

            found = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
        else:
            from models import load_tokenizer

            found = load_tokenizer(str(folder)).get_vocab()
        for token, number in numbers.items():
            if found.get(token) != number:
                raise BadInput(f"{owner} and {folder} do not go together: token {token!r} is {number} in one and {found.get(token)} in the other")
        numbers, owner = found, folder
    return len(numbers)


# ---- writing ----
class Shards:
    """safetensors files in a folder of their own, whose tensors may be written in any order and from any thread.

    A file that is there already with the same header is written over, not anew; `kept` are its tensors, whole or not.

    Args:
        tensors: Of all files, by name; those that came from one file go into one file.
    """

    def __init__(self, folder: Path, stem: str, tensors: dict[str, Tensor]):
        self.tensors, self.streams, self.places, self.kept, weight_map = tensors, [], {}, set(), {}
        sources = list(dict.fromkeys(tensor.file for tensor in tensors.values()))
        count = len(sources)
        files = [f"{stem}-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)] if count > 1 else [f"{stem}.safetensors"]
        for left in folder.iterdir():
            if left.name not in files:
                left.unlink()
        for file, source in zip(files, sources):
            those = {name: tensor for name, tensor in tensors.items() if tensor.file == source}
            header, end = {"__metadata__": {"format": "pt"}}, 0
            for name, tensor in those.items():
                header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [end, end + tensor.size]}
                end += tensor.size
            text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
            text += b" " * (-len(text) % 8)  # so that the tensors begin at a multiple of 8, as the format asks for
            text = len(text).to_bytes(8, "little") + text
            stream = open(os.open(folder / file, os.O_RDWR | os.O_CREAT, 0o644), "rb+", buffering=0)
            if stream.read(len(text)) == text:
                self.kept.update(those)
            else:
                stream.truncate(0)
                os.pwrite(stream.fileno(), text, 0)
            self.streams.append(stream)
            for name, tensor in those.items():
                self.places[name] = stream.fileno(), len(text) + header[name]["data_offsets"][0], tensor.size
                weight_map[name] = file
        if len(files) > 1:
            index = {"metadata": {"total_size": sum(size for _, _, size in self.places.values())}, "weight_map": weight_map}
            (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2), "utf-8")

    def write(self, name: str, start: int, data) -> None:
        """Put bytes at `start` of a tensor."""
        descriptor, place, size = self.places[name]
        data = memoryview(data).cast("B")
        assert start + len(data) <= size, name
        done = 0
        while done < len(data):
            done += os.pwrite(descriptor, data[done:], place + start + done)

    def copy(self, weights: Weights, name: str, source: str | None = None) -> None:
        """Write a tensor as it is, or as another of the same type and shape is."""
        for start in range(0, self.tensors[name].size, CHUNK):
            self.write(name, start, weights.read(source or name, start, start + CHUNK))

    def read(self, name: str, start: int, stop: int) -> bytes:
        """Bytes start to stop of a tensor, as they were written."""
        descriptor, place, size = self.places[name]
        return os.pread(descriptor, min(stop, size) - start, place + start)


def check_new_folder(folder: Path | str, flag: str) -> None:
    """BadInput if there is something where a result is to be written."""
    if os.path.exists(folder) and (not os.path.isdir(folder) or os.listdir(folder)):
        raise BadInput(f"--{flag}={folder} exists already: give a new folder, or remove it first")


@contextlib.contextmanager
def unfinished_folder(folder: Path, size: int, flag: str, keep: bool = False):
    """A folder that is there whole or not at all: write to the path this yields, it is renamed at the end.

    Unlike utils.whole_folder it has a fixed name, .NAME-unfinished: what a killed run left is found again, not 13 GB that
    no one sees.

    Args:
        size: Bytes to be written; BadInput if the disk has not so many free.
        flag: Its name, for messages.
        keep: Leave what was written when something fails, for the next run to go on with.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.parent / f".{folder.name}-unfinished"
    left = sum(file.stat().st_blocks * 512 for file in unfinished.iterdir()) if unfinished.is_dir() else 0
    if (free := shutil.disk_usage(folder.parent).free + left) < size:
        raise BadInput(f"--{flag}={folder} has {free / 1e9:.1f} GB free, {size / 1e9:.1f} GB are to be written: free some space")
    unfinished.mkdir(exist_ok=True)
    lock = os.open(unfinished, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BadInput(f"--{flag}={folder} is being written by another run") from None
    try:
        yield unfinished
        unfinished.rename(folder)
    except BaseException:
        if not keep:
            shutil.rmtree(unfinished, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def in_threads(work, items: list, about: str):
    """Yield work(item) in the order of the items; reading, writing, hashing and adding of large pieces run at the same time."""
    from tqdm import tqdm

    pool, torch = ThreadPoolExecutor(min(8, 2 * len(os.sched_getaffinity(0)))), sys.modules.get("torch")  # some wait for the disk
    threads = torch.get_num_threads() if torch else 0
    try:
        if torch:
            torch.set_num_threads(1)  # each of ours adds up alone
        yield from tqdm(pool.map(work, items), about, len(items), unit=" tensors", leave=False)
    finally:
        pool.shutdown(cancel_futures=True)
        if torch:
            torch.set_num_threads(threads)
