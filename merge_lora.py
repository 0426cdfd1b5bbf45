"""Merge LoRA adapters into their base model: one folder for generate.py, vLLM and llama.cpp's converter.

Reads   base and adapters: safetensors, or with --allow_pickle the pickles of older peft
Writes  output_dir/, a model in the base's own type, with the tokenizer and chat template of the adapter

    bash scripts/merge_lora.sh
    python merge_lora.py --model_name_or_path M --lora_path A --output_dir O
    python merge_lora.py --model_name_or_path M --lora_path A,B --output_dir O                     # in turn
    python merge_lora.py --model_name_or_path M --lora_path A,B --weights 0.7,0.3 --output_dir O

Several adapters are merged in turn: what they add is summed, and of rows and layers that they replace the last one's
stand. With --weights what they add is multiplied, and what they replace is averaged. Adapters that were trained in 8 or
4 bit are merged into the 16-bit base. Sums are in fp32 and rounded once.

Merging takes 300 MB, whatever the model (benchmarks/surgery.py). The check behind it runs base + adapter (by peft) and the
merged model layer by layer, on a GPU if there is one: half a GB for libraries, one layer or table in fp32, the adapters.
"""
import contextlib
import fcntl
import itertools
import json
import math
import os
import re
import shutil
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tensors import (EMBEDDINGS, HEADS, Shards, Tensor, Weights, carry_tokenizer, check_new_folder, files_beside, in_threads, local_folder,
                     open_model, same_floats, torch_dtype, unfinished_folder)
from utils import BadInput, RunStopped, check_adapter, check_file, check_model, cli, fingerprint, show

# Fields of adapter_config.json that are honoured below, or matter in training alone. Any other that is set is refused: if it
# were ignored, the model would be quietly wrong.
KNOWN = set("""alpha_pattern auto_mapping base_model_name_or_path bias corda_config ensure_weight_tying eva_config exclude_modules fan_in_fan_out
    inference_mode init_lora_weights layers_pattern layers_to_transform loftq_config lora_alpha lora_dropout lora_ga_config megatron_core
    modules_to_save peft_type peft_version qalora_group_size r rank_pattern revision runtime_config target_modules task_type
    trainable_token_indices use_dora use_rslora""".split())
FACTORS = ("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")
ROWS = "token_adapter.trainable_tokens_delta"
KEY = re.compile(rf"(?:base_model\.model\.)?(.+)\.(lora_(?:embedding_)?[AB]|lora_magnitude_vector|{ROWS})(?:\.default)?(?:\.weight)?")
WRAPPERS = re.compile(r"^base_model\.model\.|\.(base_layer|token_adapter|modules_to_save(\.default)?)(?=\.)")  # what peft puts into names
BOUND = {"F64": 1e-4, "F32": 1e-4, "F16": 0.005, "BF16": 0.03}  # the mean difference that rounding may make, as a share of the logits' spread


def main(
    *,
    # model and data
    model_name_or_path: str,
    lora_path: str,
    eval_path: str | None = None,
    output_dir: str = "output/merge_lora",
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    # merging
    weights: str | None = None,
    check: bool = True,
):
    """Merge one or several LoRA adapters into their base model; lora_path takes several folders with commas.

    Args:
        model_name_or_path: Folder or hub name of the base model.
        lora_path: Folder of an adapter for this base.
        eval_path: File of records to evaluate on.
        output_dir: Folder for checkpoints and the result.
        trust_remote_code: Run Python code that comes with the model.
        allow_pickle: Load weights that are pickles, which can run code.
        weights: What each adapter is multiplied by, with commas, such as 0.7,0.3; without it they are merged in turn.
        check: Compare the logits of base + adapter and merged model on four records, of eval_path or else of sample/.
    """
    show(locals())
    check_new_folder(output_dir, "output_dir")
    check_file("eval_path", eval_path)
    folders = [folder.strip() for folder in lora_path.split(",")]
    for folder in folders:
        check_adapter(folder)
    shares = read_shares(weights, len(folders))

    # ---- load ----
    base = open_model(local_folder(model_name_or_path, allow_pickle), allow_pickle)
    config = json.loads((base.folder / "config.json").read_text("utf-8"))
    adapters = [open_adapter(Path(folder), base, allow_pickle, alone=len(folders) == 1 and shares is None) for folder in folders]
    beside = {file.name: file for file in files_beside(base.folder)}
    plans = make_plans(base, config, adapters, shares, tokens=carry_tokenizer([adapter.folder for adapter in adapters], beside))
    size = sum(plan.tensor.size for plan in plans.values()) + sum(file.stat().st_size for file in beside.values())
    if check:
        from layerwise import attach, compare_logits, hollow_model, layerwise_logits, read_prompts

        ids = read_prompts(beside.get("tokenizer_config.json", base.folder).parent, eval_path, config["vocab_size"], trust_remote_code)
        model = hollow_model(base, trust_remote_code, config["vocab_size"])
        attach(model, [(adapter.folder, adapter.weights) for adapter in adapters], shares)
        expected = layerwise_logits(model, base, ids)

    # ---- merge ----
    with unfinished_folder(Path(output_dir), size, "output_dir") as unfinished:
        shards = Shards(unfinished, "model", {name: plan.tensor for name, plan in plans.items()})
        for _ in in_threads(lambda name: merge_tensor(base, shards, name, plans[name]), list(plans), "merging"):
            pass

        # ---- save ----
        for name, file in beside.items():
            shutil.copyfile(file, unfinished / name)
        (unfinished / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False), "utf-8")
        about = {"base": model_name_or_path, "base_fingerprint": fingerprint(str(base.folder)), "adapters": folders, "weights": shares}
        (unfinished / "yangtuo.json").write_text(json.dumps(about, indent=2, ensure_ascii=False), "utf-8")
        if check:
            found = layerwise_logits(hollow_model(merged := Weights(unfinished), trust_remote_code), merged, ids)
            verdict = compare_logits(expected, found, max(BOUND[plan.tensor.dtype] for plan in plans.values() if plan.changed))
    print(f"{output_dir}: {sum(plan.changed for plan in plans.values())} of {len(plans)} tensors changed, {size / 1e9:.2f} GB")
    print(f"fidelity: {verdict if check else 'not checked'}")


# ---- what is given ----
class Adapter(NamedTuple):
    folder: Path
    config: dict
    weights: Weights
    parts: dict[str, dict[str, str]]  # tensor of the base: {"lora_A" and so on, or "whole": its name in the adapter's file}


def read_shares(weights: str | None, count: int) -> list[float] | None:
    """--weights as numbers, one for each adapter."""
    try:
        shares = [float(text) for text in weights.split(",")] if weights is not None else None
    except ValueError:
        raise BadInput(f"--weights={weights} are not numbers with commas between, such as 0.7,0.3") from None
    if shares and (len(shares) != count or not all(map(math.isfinite, shares))):
        raise BadInput(f"--weights={weights}: --lora_path names {count} adapters, give a number for each")
    return shares


def open_adapter(folder: Path, base: Weights, allow_pickle: bool, alone: bool) -> Adapter:
    """An adapter, and what it does to which tensor of the base; BadInput if it does anything that is not known here."""
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    if config.get("peft_type") != "LORA":
        raise BadInput(f"{folder} is an adapter of type {config.get('peft_type')}: only LORA is merged here")
    if strange := [name for name, value in config.items() if value and name not in KNOWN]:
        raise BadInput(f"{folder}: {strange[0]} = {str(config[strange[0]])[:60]} in adapter_config.json changes the arithmetic in a way that is not known here")
    if (start := config.get("init_lora_weights", True)) not in (True, False, None, "gaussian", "orthogonal", "eva"):
        raise BadInput(f"{folder}: init_lora_weights = {start} changed the base: save it as plain LoRA first (peft: path_initial_model_for_weight_conversion)")
    if config.get("use_dora") and (config.get("fan_in_fan_out") or not alone):
        raise BadInput(f"{folder} is DoRA, which rescales the weights that it is added to: merge it alone, without --weights")
    about, given = folder / "yangtuo.json", fingerprint(str(base.folder))
    trained_on = json.loads(about.read_text("utf-8")).get("base_fingerprint") if about.is_file() else None
    if trained_on and given and trained_on != given:
        raise BadInput(f"{folder} was trained on another base than {base.folder} (fingerprint {trained_on[:12]}, this one has {given[:12]}); "
                       f"if that was the result of an earlier merge, give it as the base")
    weights, parts = Weights(folder, "adapter_model", allow_pickle, ("adapter_model.bin", "pytorch_model.bin")), {}
    for key in weights.tensors:
        if ".original_module." not in key:
            match = KEY.fullmatch(key)
            name, part = (f"{match[1]}.weight", match[2]) if match else (WRAPPERS.sub("", key), "whole")
            names = [name, name.partition(".")[2]]  # some bases leave out "model." or "transformer." in their files
            found = next((name for name in names if name in base.tensors), name if name.endswith(HEADS) else None)
            if found is None:
                raise BadInput(f"{folder}: {key} belongs to no tensor of {base.folder}: it was trained on another base, or is not known here")
            if part != "whole" or not same_floats(weights, key, base, found):  # peft may save tables of the base as they were
                parts.setdefault(found, {})[part] = key
    trained = [key for those in parts.values() for part, key in those.items() if part not in ("lora_A", "lora_embedding_B", "lora_magnitude_vector")]
    if (trained or not parts) and not any(weights.floats(key).any() for key in trained):
        raise BadInput(f"{folder} changes nothing, all its B matrices are zero: it was not trained, or was saved wrongly (tloen/alpaca-lora#446)")
    return Adapter(folder, config, weights, parts)


# ---- what becomes of each tensor ----
@dataclass
class Plan:
    """How a tensor of the result comes about: taken from the base or replaced, then added to, then rows of it replaced."""

    tensor: Tensor  # the result's type and shape, and the shard of the base that it goes with
    source: str
    whole: list[tuple] = field(default_factory=list)  # (share, Weights, name)
    added: list[tuple] = field(default_factory=list)  # (scale, Weights, names of A, B and DoRA's magnitude, are A and B transposed)
    rows: dict[int, list[tuple]] = field(default_factory=dict)  # row: [(share, its numbers)]
    changed: bool = False

    def add(self, adapter: Adapter, parts: dict[str, str], share: float, in_turn: bool) -> None:
        """Take in what one adapter does to this tensor."""
        config, weights, self.changed = adapter.config, adapter.weights, True
        if "whole" in parts:
            self.whole = ([] if in_turn else self.whole) + [(share, weights, parts["whole"])]
        for a, b in FACTORS:
            if a in parts or b in parts:
                names = parts.get(a), parts.get(b), parts.get("lora_magnitude_vector")
                if None in names[: 3 if config.get("use_dora") else 2]:
                    raise BadInput(f"{adapter.folder} is not whole: it has {min(parts.values())}, but not what belongs to it")
                transposed = a == "lora_embedding_A" or bool(config.get("fan_in_fan_out"))
                if transposed and names[2]:
                    raise BadInput(f"{adapter.folder}: DoRA on an embedding ({names[2]}) is not known here")
                rank, module, alphas = weights.tensors[names[0]].shape[0], KEY.fullmatch(names[0])[1], config.get("alpha_pattern") or {}
                alpha = next((alphas[key] for key in alphas if re.match(rf"(.*\.)?({key})$", module)), config.get("lora_alpha", 8))
                scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
                self.added.append((share * scale, weights, names, transposed))
        if ROWS in parts:
            module, numbers = KEY.fullmatch(parts[ROWS])[1], config.get("trainable_token_indices")
            if isinstance(numbers, dict):
                numbers = next(rows for name, rows in numbers.items() if module.endswith(name))
            for number, row in zip(numbers, weights.floats(parts[ROWS]), strict=True):
                self.rows[number] = ([] if in_turn else self.rows.get(number, [])) + [(share, row)]

    def check(self, name: str, several: bool) -> None:
        """BadInput if the parts do not fit the tensor or one another."""
        rows, columns = self.tensor.shape[0], self.tensor.row
        for _, weights, whole in self.whole:
            if weights.tensors[whole].shape != self.tensor.shape:
                raise BadInput(f"{weights.folder}: {whole} is {list(weights.tensors[whole].shape)}, for {name} it should be {list(self.tensor.shape)}")
        for _, weights, (a, b, _), transposed in self.added:
            a, b = weights.tensors[a].shape, weights.tensors[b].shape
            if a[0] != b[1] or (a[1], b[0]) != ((rows, columns) if transposed else (columns, rows)):
                raise BadInput(f"{weights.folder}: factors of {list(b)} and {list(a)} do not fit {name}, {[rows, columns]}: it was trained on another base")
        if several and bool(self.whole) + bool(self.added) + bool(self.rows) > 1:
            raise BadInput(f"one adapter adds to {name}, another one replaces it or rows of it: merge them one after the other, in the order that is meant")
        if any(parts and abs(sum(part[0] for part in parts)) < 1e-6 for parts in (self.whole, *self.rows.values())):
            raise BadInput(f"--weights cancel out, but {name} is to be averaged by them")


def make_plans(base: Weights, config: dict, adapters: list[Adapter], shares: list[float] | None, tokens: int) -> dict[str, Plan]:
    """A plan for each tensor of the result; vocab_size and tie_word_embeddings in `config` are brought up to date.

    Args:
        tokens: Number of tokens of the tokenizer that an adapter brings, or 0.
    """
    plans = {name: Plan(tensor, name) for name, tensor in base.tensors.items()}
    embedding, stored = (next((name for name in plans if name.endswith(endings)), None) for endings in (EMBEDDINGS, HEADS))
    head, tied, apart = stored or HEADS[0], embedding and config.get("tie_word_embeddings", stored is None), False
    if tied:  # the head is planned like any other tensor, and left out again if nothing sets it apart from the embedding
        plans[head] = Plan(plans[embedding].tensor._replace(file=base.tensors[stored or embedding].file), embedding)
    for adapter, share in zip(adapters, shares or [1.0] * len(adapters)):
        parts = dict(adapter.parts)
        if tied and parts.keys() & {embedding, head}:
            # peft adapts one and leaves the other as it was, unless told to; rows, and tables that only grew, stay tied
            saved = tuple(f"{module}.weight" for module in adapter.config.get("modules_to_save") or [])
            one = "lora_embedding_A" in parts.get(embedding, {}) or embedding.endswith(saved)
            if adapter.config.get("ensure_weight_tying"):
                parts[embedding] = parts[head] = parts.get(embedding) or parts[head]
            elif head not in parts and not one:
                parts[head] = parts[embedding]
            else:
                apart = True
        for name, those in parts.items():
            if name not in plans:
                raise BadInput(f"{adapter.folder}: {min(those.values())} belongs to no tensor of {base.folder}: it was trained on another base")
            plans[name].add(adapter, those, share, in_turn=shares is None)
    if apart:
        config["tie_word_embeddings"] = False
    elif tied and not stored:
        del plans[head]
    tables = [plans[name] for name in (embedding, head) if name in plans]
    wholes = [weights.tensors[key].shape[0] for plan in tables for _, weights, key in plan.whole]
    rows = max([tokens, *wholes, *(row + 1 for plan in tables for row in plan.rows)])
    for plan in tables:
        if rows > (old := plan.tensor.shape[0]):
            plan.tensor, plan.changed = plan.tensor._replace(shape=(rows, *plan.tensor.shape[1:]), size=plan.tensor.size // old * rows), True
            config["vocab_size"] = rows
    for name, plan in plans.items():
        plan.check(name, several=len(adapters) > 1)
    return plans


def merge_tensor(base: Weights, shards: Shards, name: str, plan: Plan) -> None:
    """Write one tensor of the result, a few rows at a time."""
    import torch

    tensor, source = plan.tensor, base.tensors[plan.source]
    if not plan.changed:
        return shards.copy(base, name, plan.source)
    products = []
    for scale, weights, (a, b, magnitude), transposed in plan.added:
        a, b = weights.floats(a), weights.floats(b)  # (r, d_in), (d_out, r)
        left, right = (a.T, b.T) if transposed else (b, a)
        products.append((left * scale, right, weights.floats(magnitude) if magnitude else None))
    if tensor.shape > source.shape and not plan.whole:  # rows of new tokens start as the mean of the old ones
        mean = sum(base.floats(plan.source, *rows).sum(dim=0, dtype=torch.float64) for rows in source.row_chunks()).float() / source.shape[0]
    average = lambda parts: sum(share * values for share, values in parts) / sum(share for share, _ in parts)
    for first, last in tensor.row_chunks():
        if plan.whole:
            data = average([(share, weights.floats(whole, first, last)) for share, weights, whole in plan.whole])
        else:
            data = base.floats(plan.source, first, last)
            if last > source.shape[0]:
                data = torch.cat([data, mean.expand(last - first - len(data), -1)])
        for left, right, magnitude in products:
            data.addmm_(left[first:last], right)
            if magnitude is not None:  # DoRA: of the sum, only the direction of each row counts (arXiv:2402.09353, eq. 5)
                data *= (magnitude[first:last] / data.norm(dim=1))[:, None]
        for row in [row for row in plan.rows if first <= row < last]:
            data[row - first] = average(plan.rows[row])
        data = data.to(torch_dtype(tensor.dtype))
        if not math.isfinite(data.sum(dtype=torch.float32)):  # one pass, where isfinite() takes several
            raise RunStopped(f"{name} becomes infinite or no number: is the adapter damaged, or did its training diverge?")
        shards.write(name, first * tensor.row * data.itemsize, data.view(torch.uint8).numpy())


# ==== tensors ====
# Weights as they lie in a folder, read and written one by one: a converter takes the memory of a few tensors, whatever the model.
SHARD = 300e6  # bytes of tensors that are held, and then written as one file
BESIDE = (".json", ".jinja", ".model", ".py", ".tiktoken", ".txt")  # endings of what a model needs besides its weights


def local_folder(model_name_or_path: str, allow_pickle: bool = False) -> Path:
    """A folder as it is given, or that of a name on the hub, fetched if need be."""
    if os.path.isdir(model_name_or_path):
        return Path(model_name_or_path)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model_name_or_path, allow_patterns=[f"*{ending}" for ending in (*BESIDE, ".safetensors", *[".bin"] * allow_pickle)]))
    except (OSError, ValueError) as problem:
        raise BadInput(f"{model_name_or_path} is no folder, and could not be fetched from the hub: {str(problem).strip().splitlines()[0][:200]}") from None


def open_model(folder: Path, allow_pickle: bool = False) -> "Weights":
    """The weights of a model folder; BadInput if it is not whole, or quantized."""
    check_model(str(folder), allow_pickle)
    if "quantization_config" in json.loads((folder / "config.json").read_text("utf-8")):
        raise BadInput(f"{folder} is quantized: give the 16-bit model that it was made from")
    return Weights(folder, "model", allow_pickle)


def files_beside(folder: Path) -> dict[str, Path]:
    """What a model needs besides its weights, by name: configuration, tokenizer, chat template."""
    return {file.name: file for file in sorted(folder.iterdir()) if file.suffix in BESIDE and not file.name.endswith((".index.json", "delta.json"))}


class Weights:
    """The tensors in a folder, each read from its file when it is asked for.

    `tensors` has the type and shape of each, as a tensor on torch's meta device, in the order of the files.

    Args:
        stem: The folder holds stem.safetensors, or shards with an index; or, with allow_pickle, one of the pickles.
    """

    def __init__(self, folder: Path | str, stem: str = "model", allow_pickle: bool = False, pickles: tuple[str, ...] = ("pytorch_model.bin",)):
        self.folder, self.tensors, self.paths = Path(folder), {}, {}
        candidates = [name for file in (f"{stem}.safetensors", *pickles * allow_pickle) for name in (file, f"{file}.index.json")]
        found = next((name for name in candidates if (self.folder / name).is_file()), None)
        if found is None:
            waiting = next((pickle for pickle in pickles if (self.folder / pickle).is_file()), None)
            why = f" but a pickle, {waiting}, which can run code when it is loaded: if you trust it, add --allow_pickle True" if waiting else ""
            raise BadInput(f"{folder} holds no {stem}.safetensors{why}")
        mapped = json.loads((self.folder / found).read_text("utf-8"))["weight_map"] if found.endswith(".json") else {}
        for file in sorted(set(mapped.values())) or [found]:
            if not (path := self.folder / file).is_file():
                raise BadInput(f"{folder} lacks {file}, which its {found} names: finish the download")
            try:
                names, get = self._open(path)
                self.tensors.update({name: get(name).to("meta") for name in names})
            except Exception as problem:  # safetensors, zip and pickle have their own for a file that is cut off
                raise BadInput(f"{path} could not be read ({str(problem).strip().splitlines()[0][:200]}): it is cut off or damaged, "
                               f"or only points to the real one (git-lfs). Download it again") from None
            self.paths.update(dict.fromkeys(names, path))
        if missing := mapped.keys() - self.tensors.keys():
            raise BadInput(f"{folder} lacks {len(missing)} tensors that its {found} names, {min(missing)} for one")

    def read(self, name: str):
        """A tensor, which may be changed. Its file is mapped anew: pages that were read count as memory as long as a mapping lives."""
        return self._open(self.paths[name])[1](name)

    def _open(self, path: Path):
        """The names in a file, and a function that maps the tensor of one."""
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            opened = safe_open(path, "pt")
            return opened.offset_keys(), opened.get_tensor
        import torch

        held = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))  # files of torch before 1.6 are no zip
        return list(held), held.__getitem__


def write_shards(folder: Path, tensors, stem: str = "model") -> None:
    """Write pairs of name and tensor as they come, in files of about 300 MB with an index, and read back what is in them."""
    from safetensors.torch import save_file

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
        index = {"metadata": {"total_size": sum((folder / file).stat().st_size for file in files)}, "weight_map": {name: file for file, names in zip(files, parts) for name in names}}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2), "utf-8")
    if {name: (tensor.dtype, tensor.shape) for name, tensor in Weights(folder, stem).tensors.items()} != wanted:
        raise RunStopped("the weights were written, but read back with other tensors: is the disk failing?")


@contextlib.contextmanager
def unfinished_folder(folder: Path, size: int, flag: str):
    """A folder, which --flag gave, that is there whole or not at all: write `size` bytes to the path this yields, it is renamed at the end."""
    unfinished = folder.parent / f".{folder.name}-unfinished"  # a fixed name: the next run clears away what a killed one left
    unfinished.mkdir(parents=True, exist_ok=True)
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
