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

peft merges, module by module, as `merge_and_unload` does: the weights of one are read, merged, kept for the file that is
written next, and forgotten. That takes the libraries' 0.4 GB, the adapters and 0.4 GB, whatever the model (benchmarks/surgery.py).
"""
import contextlib
import ctypes
import fcntl
import itertools
import json
import math
import os
import re
import shutil
import zipfile
from pathlib import Path

from utils import BadInput, RunStopped, check_adapter, check_model, check_output_dir, cli, fingerprint, read_json, show

# Fields of adapter_config.json that peft's merging of plain files honours, or that matter in training alone. Any other that is set
# is refused: were it ignored, the model would be quietly wrong.
KNOWN = set("""alpha_pattern auto_mapping base_model_name_or_path bias corda_config ensure_weight_tying eva_config exclude_modules fan_in_fan_out
    inference_mode init_lora_weights layers_pattern layers_to_transform loftq_config lora_alpha lora_dropout lora_ga_config megatron_core
    modules_to_save peft_type peft_version qalora_group_size r rank_pattern revision runtime_config target_modules task_type
    trainable_token_indices use_dora use_rslora""".split())
EMBEDDINGS = ("embed_tokens.weight", "word_embeddings.weight", "wte.weight", "embed_in.weight")  # how the names of these tables end
HEADS = ("lm_head.weight", "embed_out.weight")
TOKENIZER = ("tokenizer", "special_tokens_map", "added_tokens", "vocab", "merges", "chat_template")  # how the names of its files begin


def main(
    *,
    # model and data
    model_name_or_path: str,
    lora_path: str,
    output_dir: str = "output/merge_lora",
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    # merging
    weights: str | None = None,
):
    """Merge one or several LoRA adapters into their base model; lora_path takes several folders with commas.

    Args:
        model_name_or_path: Folder or hub name of the base model.
        lora_path: Folder of an adapter for this base.
        output_dir: Folder for checkpoints and the result.
        trust_remote_code: Run Python code that comes with the model.
        allow_pickle: Load weights that are pickles, which can run code.
        weights: What each adapter is multiplied by, with commas, such as 0.7,0.3; without it they are merged in turn.
    """
    flags = dict(locals())
    check_model(model_name_or_path, allow_pickle)
    check_output_dir(output_dir)
    folders = [Path(folder.strip()) for folder in lora_path.split(",")]
    shares = read_shares(weights, len(folders))
    for folder in folders:
        check_adapter(str(folder))
        check_kind(folder, alone=len(folders) == 1 and shares is None)
    show(flags)

    # ---- load ----
    base = Weights(local_folder(model_name_or_path, allow_pickle), allow_pickle=allow_pickle)
    config, beside = read_json(base.folder / "config.json"), files_beside(base.folder)
    states = [read_adapter(folder, base.folder, allow_pickle) for folder in folders]
    tables = [tensor for state in states for key, tensor in state.items() if is_table(key)]
    model = hollow_model(base, max([carry_tokenizer(folders, beside), *map(len, tables)]), trust_remote_code)
    adapted = attach(model, folders, states, shares)

    # ---- merge ----
    size = sum(tensor.nbytes for tensor in base.tensors.values()) + sum(file.stat().st_size for file in beside.values())
    with unfinished_folder(Path(output_dir), size, "output_dir") as unfinished:
        write_shards(unfinished, merged_tensors(adapted, base, config))

        # ---- save ----
        for name, file in beside.items():
            shutil.copyfile(file, unfinished / name)
        (unfinished / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False), "utf-8")
        about = {"base": model_name_or_path, "base_fingerprint": fingerprint(str(base.folder)), "adapters": list(map(str, folders)), "weights": shares}
        (unfinished / "yangtuo.json").write_text(json.dumps(about, indent=2, ensure_ascii=False), "utf-8")
    print(f"{output_dir}: {size / 1e9:.2f} GB, {len(folders)} adapters merged")


# ---- what is given ----
def read_shares(weights: str | None, count: int) -> list[float] | None:
    """--weights as numbers, one for each adapter."""
    try:
        shares = [float(text) for text in weights.split(",")] if weights is not None else None
    except ValueError:
        raise BadInput(f"--weights={weights} are not numbers with commas between, such as 0.7,0.3") from None
    if shares and (len(shares) != count or not all(map(math.isfinite, shares))):
        raise BadInput(f"--weights={weights}: --lora_path names {count} adapters, give a number for each")
    return shares


def check_kind(folder: Path, alone: bool) -> None:
    """BadInput if adapter_config.json asks for anything that is not known here."""
    config = read_json(folder / "adapter_config.json")
    if config.get("peft_type") != "LORA":
        raise BadInput(f"{folder} is an adapter of type {config.get('peft_type')}: only LORA is merged here")
    if strange := [name for name, value in config.items() if value and name not in KNOWN]:
        raise BadInput(f"{folder}: {strange[0]} = {str(config[strange[0]])[:60]} in adapter_config.json changes the arithmetic in a way that is not known here")
    if (start := config.get("init_lora_weights", True)) not in (True, False, None, "gaussian", "orthogonal", "eva"):
        raise BadInput(f"{folder}: init_lora_weights = {start} changed the base: save it as plain LoRA first (peft: path_initial_model_for_weight_conversion)")
    if config.get("use_dora") and not alone:
        raise BadInput(f"{folder} is DoRA, which rescales the weights that it is added to: merge it alone, without --weights")


def read_adapter(folder: Path, base: Path, allow_pickle: bool) -> dict:
    """The tensors of an adapter in fp32, by the names that peft gives them today; BadInput if it was trained on another base, or not at all."""
    about, given = folder / "yangtuo.json", fingerprint(str(base))
    trained_on = read_json(about).get("base_fingerprint") if about.is_file() else None
    if trained_on and given and trained_on != given:
        raise BadInput(f"{folder} was trained on another base than {base} (fingerprint {trained_on[:12]}, this one has {given[:12]}); "
                       f"if that was the result of an earlier merge, give it as the base")
    weights = Weights(folder, "adapter_model", allow_pickle)
    state = {re.sub(r"\.(default|modules_to_save)(?=\.|$)", "", key): weights.read(key).float() for key in weights.tensors if ".original_module." not in key}
    # of a LoRA these begin at zero; whatever else there is, as rows and whole layers, was trained; tables may be saved as they were
    begun = [key for key in state if not re.search("lora_A|lora_embedding_B|lora_magnitude", key) and not is_table(key)]
    if begun and not any(state[key].any() for key in begun) and not read_json(folder / "adapter_config.json").get("modules_to_save"):
        raise BadInput(f"{folder} changes nothing, all its B matrices are zero: it was not trained, or was saved wrongly (tloen/alpaca-lora#446)")
    return state


def is_table(key: str) -> bool:
    return key.replace(".base_layer", "").endswith(EMBEDDINGS + HEADS)


def carry_tokenizer(folders: list[Path], beside: dict[str, Path]) -> int:
    """Put the files of the adapters' tokenizers, if they bring some, in the place of the base's in `beside`: the last one counts.

    Returns the number of its tokens, or 0. BadInput if a token of one has another number in the next.
    """
    from transformers import AutoTokenizer

    numbers, owner = {}, None
    for folder in [folder for folder in folders if (folder / "tokenizer_config.json").is_file()]:
        for name in [name for name in beside if name.startswith(TOKENIZER)]:
            del beside[name]
        beside.update({name: file for name, file in files_beside(folder).items() if name.startswith((*TOKENIZER, "generation_config"))})
        try:
            found = AutoTokenizer.from_pretrained(folder).get_vocab()
        except Exception as problem:  # the libraries raise whatever a damaged file makes of them
            raise BadInput(f"no tokenizer could be loaded from {folder}: {str(problem)[:200]}") from None
        for token, number in numbers.items():
            if found.get(token) != number:
                raise BadInput(f"{owner} and {folder} do not go together: token {token!r} is {number} in one and {found.get(token)} in the other")
        numbers, owner = found, folder
    return max(numbers.values(), default=-1) + 1


# ---- merging ----
def hollow_model(base: "Weights", rows: int, trust_remote_code: bool):
    """The base without its weights, with `rows` tokens at least: each weight is one NaN, spread over its shape, so that none can be used unread."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(base.folder, trust_remote_code=trust_remote_code)
        config.vocab_size = max(config.vocab_size, rows)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
    except Exception as problem:  # the libraries raise whatever a damaged file makes of them
        raise BadInput(f"{base.folder} is no causal language model that transformers can load: {str(problem)[:200]}") from None
    # not on the meta device, to which peft would move its adapters
    hollow = {p: torch.nn.Parameter(torch.tensor(torch.nan).expand(p.shape), requires_grad=False) for p in model.parameters()}
    for module in model.modules():
        module._parameters.update({name: hollow[p] for name, p in module._parameters.items() if p is not None})  # tied ones stay one
    return model


def is_hollow(p) -> bool:
    return not any(p.stride())


def attach(model, folders: list[Path], states: list[dict], shares: list[float] | None):
    """The hollow model with all adapters in it, by peft, all active.

    Args:
        shares: What each is multiplied by; rows and layers that they replace are averaged. None: the last one's stand.
    """
    import torch
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

    adapted, replaced, share_of = None, {}, {f"adapter{number}": share for number, share in enumerate(shares or [1.0] * len(folders))}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = embedding.weight is head.weight
    # peft looks for trained rows in all adapters behind the first that has some: those with rows come last
    for name, folder, state in sorted(zip(share_of, folders, states), key=lambda given: any("token_adapter" in key for key in given[2])):
        try:
            config = LoraConfig.from_pretrained(folder)
            config.init_lora_weights = True  # some ways to begin look at the weights of the base
            if adapted is None:
                adapted = get_peft_model(model, config, name, low_cpu_mem_usage=True)
            else:
                adapted.add_adapter(name, config, low_cpu_mem_usage=True)
            missing = get_peft_model_state_dict(adapted, adapter_name=name, save_embedding_layers=False).keys() - state.keys()
            unknown = [] if missing else set_peft_model_state_dict(adapted, state, name, low_cpu_mem_usage=True).unexpected_keys
        except Exception as problem:  # peft raises whatever a damaged configuration makes of it
            raise BadInput(f"{folder} does not fit this model: was it trained on another base, or does one adapter add to what another one replaces? "
                           f"{' '.join(str(problem).split())[:200]}") from None
        if missing:
            raise BadInput(f"{folder} lacks {len(missing)} tensors, {min(missing)} for one: it is not whole")
        if unknown:
            raise BadInput(f"{folder}: {unknown[0]} belongs to no layer of this model: it was trained on another base, or is not known here")
        for key in state.keys() & dict(adapted.named_parameters()).keys():  # biases, and tables that peft saved whole
            replaced.setdefault(key, {})[name] = state[key]
    if tied and is_hollow(head.weight) and not is_hollow(embedding.weight):  # peft may have saved a tied table once
        head.weight = torch.nn.Parameter(embedding.weight.data.clone(), requires_grad=False)

    def average(values: dict):
        if abs(total := sum(share_of[name] for name in values)) < 1e-6:
            raise BadInput("--weights cancel out, but rows or layers are to be averaged by them")
        return sum(share_of[name] * value for name, value in values.items()) / total

    for key in replaced if shares else ():
        adapted.get_parameter(key).data = average(replaced[key])
    for module in adapted.modules():
        if isinstance(module, LoraLayer):
            module.set_adapter([name for name in share_of if name in module.scaling])
            module.scaling.update({name: share_of[name] * scaling for name, scaling in module.scaling.items()})
        elif isinstance(module, ModulesToSaveWrapper):
            last = list(module.modules_to_save)[-1]
            module.set_adapter(last)
            for key, p in module.modules_to_save[last].named_parameters() if shares else ():
                p.data = average({name: copy.get_parameter(key).data for name, copy in module.modules_to_save.items()})
        elif isinstance(module, TrainableTokensWrapper):
            layer, rows = module.token_adapter, {}
            last = list(layer.trainable_tokens_delta)[-1]
            for name, values in layer.trainable_tokens_delta.items() if not layer.tied_adapter else ():
                for number, value in zip(layer.token_indices[name], values.data):
                    rows[number] = {name: value} | (rows.get(number, {}) if shares else {})
            if rows:
                layer.token_indices[last] = list(rows)
                layer.trainable_tokens_delta[last] = torch.nn.Parameter(torch.stack([average(row) for row in rows.values()]))
            module.set_adapter(last)
    return adapted


def merged_tensors(adapted, base: "Weights", config: dict):
    """Yield name and tensor of the result: first what changes, merged in fp32 and rounded into the type of the base, then the rest as it is.

    vocab_size and tie_word_embeddings in `config` are brought up to date.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper
    from tqdm import tqdm

    model, changed, done = adapted.get_base_model(), {}, set()
    paths = {module: path for path, module in model.named_modules()}
    for module, path in paths.items():
        own = any(not is_hollow(p) for p in module._parameters.values() if p is not None)  # biases, whole tables
        if (own or isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))) and not any(path.startswith(f"{other}.") for other in changed):
            changed[path] = module
    embedding, head = tables = [paths[model.get_input_embeddings()], paths[model.get_output_embeddings()]]
    tied, config["vocab_size"] = model.config.tie_word_embeddings, model.config.vocab_size
    if config["vocab_size"] > len(base.tensors[file_name(base, f"{embedding}.weight")]) or tied and changed.keys() & set(tables):
        changed = {path: model.get_submodule(path) for path in tables} | changed
    for path, module in tqdm(changed.items(), "merging", unit=" modules", leave=False):
        for leaf, tensor in merged_module(module, path, base).items():
            source = file_name(base, name := f"{path}.{leaf}")
            name = source if path != head or source.endswith(HEADS) else name  # files may leave out a prefix, and a head that is tied
            tensor = tensor.to(base.tensors[source].dtype)
            if not all(end.isfinite() for end in tensor.aminmax()):  # one pass, where isfinite().all() takes several
                raise RunStopped(f"{name} becomes infinite or no number: is the adapter damaged, or did its training diverge?")
            done.add(name)
            if tied and path == embedding:
                table = tensor
            elif tied and path == head and not tensor.equal(table):
                config["tie_word_embeddings"] = False  # peft adapts one and leaves the other as it was, unless told to
            elif tied and path == head and name not in base.tensors:
                continue
            yield name, tensor
    yield from ((name, base.read(name)) for name in base.tensors if name not in done)


def merged_module(module, path: str, base: "Weights") -> dict:
    """The parameters of a module of the base with its adapters merged in, by peft; the weights read for that are forgotten again."""
    import torch

    hollow = [(owner, inner, leaf, p) for inner, owner in module.named_modules() if "original_module" not in inner
              for leaf, p in owner._parameters.items() if p is not None and is_hollow(p)]
    for owner, inner, leaf, p in hollow:
        data = base.read(file_name(base, re.sub(r"\.(base_layer|token_adapter)(?=\.|$)", "", f"{path}.{inner}".strip(".")) + f".{leaf}")).float()
        if len(data) < len(p):  # rows of new tokens start as the mean of the old ones
            data = torch.cat([data, data.mean(dim=0, keepdim=True).expand(len(p) - len(data), *data.shape[1:])])
        owner._parameters[leaf] = torch.nn.Parameter(data, requires_grad=False)
    if hasattr(module, "unload_and_optionally_merge_module"):
        result = module.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
    elif hasattr(module, "merge"):
        module.merge()
        result = module.get_base_layer()
    else:
        result = module
    merged = {name: p.data for name, p in result.named_parameters()}
    for owner, _, leaf, p in hollow:
        owner._parameters[leaf] = p
    return merged


def file_name(base: "Weights", name: str) -> str:
    """The tensor in the files that a parameter is read from: some files leave out a prefix, a tied head is the embedding."""
    embedding = next((tensor for tensor in base.tensors if tensor.endswith(EMBEDDINGS)), None)
    for candidate in (name, name.partition(".")[2], embedding if name.endswith(HEADS) else None):
        if candidate in base.tensors:
            return candidate
    raise BadInput(f"{base.folder} has no tensor {name}: adapters of such modules are not known here")


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
