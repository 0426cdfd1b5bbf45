"""Export a model to GGUF, the one file that llama.cpp, Ollama and LM Studio run: a Chinese model on a laptop.

Reads   a model of the LLaMA, Mistral, Qwen2, 2.5 or 3 family, with its own vocabulary or one that extend_vocab.py made longer
Writes  output_file: weights, vocabulary, chat template and stop tokens; beside it a Modelfile, which Ollama wants

    bash scripts/export_gguf.sh
    python export_gguf.py --model_name_or_path M --output_file F.gguf --type q8_0

| type      | bytes a weight | 7B      | what is lost (benchmarks/export_gguf.py)         |
|-----------|----------------|---------|--------------------------------------------------|
| f16, bf16 | 2              | 13.5 GB | nothing where the weights have that type already |
| q8_0      | 1.06           | 7.2 GB  | hardly anything                                  |
| q4_1      | 0.63           | 4.3 GB  | a little                                         |
| q4_0      | 0.56           | 3.9 GB  | much, on a small model: then q4_1 is the better  |

In the types of 4 bit, embedding and head have 8. An adapter is merged by merge_lora.py first. Weights go from file to file some rows
at a time, so that the memory is that of the libraries. At the end the ids of some lines are compared, by llama.cpp and by
transformers, where llama-cpp-python is installed.

llama.cpp does not read a tokenizer, it has its own: one for SentencePiece, to which pieces and scores are given, and one for byte-level
BPE, to which pieces, merges and the name of what cuts a text before are given. So what the vocabulary does has to be expressed in those, or refused.
"""
import contextlib
import fcntl
import importlib.util
import itertools
import json
import math
import os
import re
import resource
import shutil
import sys
import time
import zipfile
from collections import Counter
from pathlib import Path
from typing import Literal

from utils import SHORTEST, BadInput, Chat, RunStopped, check_file, check_model, cli, read_json, read_rows, show

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}  # {model_type of transformers: llama.cpp's name}
ROWS_AT_ONCE = 2**24  # numbers: 64 MiB in fp32
COMPARED = 2000  # lines of each kind of text, at the end
# What cuts a text before byte-level BPE merges, {regular expressions in the order in which they cut: (llama.cpp's name for that, does it
# take a word that is a piece whole, whatever the merges (`ignore_merges`))}
BYTE_LEVEL = "ByteLevel"  # GPT-2's own expression, which `tokenizers` has under that name
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
PRE_TOKENIZERS = {
    (BYTE_LEVEL,): ("gpt-2", False),
    (r"\p{N}", BYTE_LEVEL): ("smollm", False),
    (WORDS % r"\p{N}{1,3}",): ("llama-bpe", True),
    (WORDS % r"\p{N}",): ("qwen2", False),
    (rf"{UPPER}*{LOWER}+|{UPPER}+{LOWER}*|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",): ("tekken", True),
}


def main(
    *,
    # model and data
    model_name_or_path: str,
    eval_path: str | None = None,
    allow_pickle: bool = False,
    # export
    output_file: str = "output/export_gguf/model.gguf",
    type: Literal["f16", "bf16", "q8_0", "q4_1", "q4_0"] = "f16",
):
    """Export a model to GGUF, for llama.cpp, Ollama and LM Studio.

    Args:
        model_name_or_path: Folder or hub name of the base model.
        eval_path: File of records to evaluate on.
        allow_pickle: Load weights that are pickles, which can run code.
        output_file: The .gguf file to write; it may not be there yet.
        type: Of the weights: f16, bf16, q8_0, q4_1 or q4_0; see the table above.
    """
    flags, started = dict(locals()), time.perf_counter()
    file, modelfile = Path(output_file), Path(output_file).parent / f"{Path(output_file).stem}.Modelfile"
    check_file("eval_path", eval_path)
    check_output_file(file, modelfile)
    check_merged(Path(model_name_or_path))
    check_model(model_name_or_path, allow_pickle)
    show(flags)

    # ---- load ----
    folder = local_folder(model_name_or_path, allow_pickle)
    if (model_type := read_json(folder / "config.json").get("model_type")) not in ARCHITECTURES:
        raise BadInput(f"{folder} is a model of the kind {model_type}, which is not known here; known are {', '.join(ARCHITECTURES)}. llama.cpp may know it: "
                       f"try its own convert_hf_to_gguf.py")
    base, tokenizer = Weights(folder, allow_pickle=allow_pickle), read_tokenizer(folder)
    config, shapes = read_config(base)
    chat = Chat(tokenizer) if tokenizer.chat_template else None
    vocabulary = read_vocabulary(tokenizer, chat, config.vocab_size)
    plan = plan_tensors(base, config, shapes, type)

    # ---- export ----
    size = sum(nbytes(shape, kind) for _, _, shape, kind in plan) + sum(len(token.encode()) + 16 for token in vocabulary["tokens"] + vocabulary["merges"])
    template, stops = "{{ .Prompt }}", []
    if chat:
        template, stops = ollama_template(chat, vocabulary["add_bos_token"]), [json.dumps(token) for token in tokenizer.convert_ids_to_tokens(chat.stop_ids)]
    with whole_file(file, size) as unfinished:
        write_gguf(unfinished, base, config, vocabulary, plan, type)
        if template is not None:  # before the model has its name: what fails here leaves neither
            with whole_file(modelfile, 0) as text:
                text.write_text(f'FROM ./{file.name}\nTEMPLATE """{template}"""\n' + "".join(f"PARAMETER stop {stop}\n" for stop in stops), "utf-8")

    # ---- look ----
    equal = compare_ids(file, tokenizer, chat, vocabulary, eval_path)
    print(f"llama.cpp   llama-server -m {file}    # a chat page and an API on port 8080\n"
          f"            " + (f"llama-cli -m {file}\n" if chat else f"llama-completion -m {file} -p '...'    # a base model: it goes on with a text\n")
          + (f"Ollama      ollama create {file.stem} -f {modelfile} && ollama run {file.stem}\n" if template is not None else
             "Ollama      write a Modelfile by hand: the chat template is no fixed text around each message\n")
          + f"LM Studio   lms import {file}", file=sys.stderr)
    figures = {"architecture": ARCHITECTURES[model_type], "tokenizer": vocabulary["model"], "pre_tokenizer": vocabulary["pre"], "tokens": config.vocab_size,
               "bytes": file.stat().st_size, "ids_equal": equal, "seconds": round(time.perf_counter() - started, 1)}
    print(json.dumps(figures | {"peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "output_file": output_file}))


# ---- what is given ----
def check_output_file(*files: Path) -> None:
    """BadInput if the first is no name for a new .gguf file, or one of them is there already."""
    if files[0].suffix != ".gguf":
        raise BadInput(f"--output_file={files[0]} must end in .gguf, by which Ollama and LM Studio know it")
    if existing := [file for file in files if file.exists() or file.is_symlink()]:
        raise BadInput(f"--output_file={files[0]}: {existing[0]} exists: give another name, or remove it")
    if not (above := next(folder for folder in files[0].resolve().parents if folder.exists())).is_dir() or not os.access(above, os.W_OK):
        raise BadInput(f"--output_file={files[0]}: {above} is not a folder that can be written to: give another")


def check_merged(folder: Path) -> None:
    """BadInput if a folder is a LoRA adapter, with the command that makes a model of it."""
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path") or "BASE"
        raise BadInput(f"{folder} is a LoRA adapter, without its base. Merge them first, and give the result: "
                       f"python merge_lora.py --model_name_or_path {base} --lora_path {folder} --output_dir output/merge_lora")


def read_tokenizer(folder: Path):
    """The tokenizer of a model folder. From tokenizer.model alone AutoTokenizer would make one without BOS and first blank."""
    from transformers import AutoTokenizer, LlamaTokenizer

    try:
        if (folder / "tokenizer.model").is_file() and not any((folder / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json")):
            return LlamaTokenizer.from_pretrained(folder, add_bos_token=True)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as problem:  # `tokenizers` and sentencepiece have their own for a file that is cut off
        raise BadInput(f"no tokenizer could be loaded from {folder}: {str(problem)[:200]}") from None
    if not tokenizer.is_fast:
        raise BadInput(f"the tokenizer in {folder} lacks a fast version (tokenizer.json)")
    return tokenizer


def read_config(base: "Weights"):
    """(configuration, {name: shape of each weight}) of a model. BadInput if llama.cpp would compute another one, or a weight is missing."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(base.folder)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as problem:  # whatever a configuration makes a model's code do
        raise BadInput(f"{base.folder} is no model that transformers can load: {str(problem)[:200]}") from None
    tied = set(model.all_tied_weights_keys)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}
    for name, shape in shapes.items():
        if name not in base.tensors or tuple(base.tensors[name].shape) != shape:
            has = f"has {name} of {tuple(base.tensors[name].shape)}" if name in base.tensors else f"lacks {name}"
            raise BadInput(f"{base.folder} {has}, its config.json asks for {shape}: the files do not belong together")
    rope, config.head_dim = config.rope_parameters, getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if config.hidden_act != "silu" or rope.get("partial_rotary_factor", 1) != 1:
        raise BadInput(f"{base.folder}: llama.cpp computes this kind of model with the activation silu and whole rotary embeddings, "
                       f"config.json has {config.hidden_act} and {rope.get('partial_rotary_factor', 1)}")
    if rope["rope_type"] not in ("default", "linear", "yarn", *["llama3"] * (config.model_type in ("llama", "mistral"))):
        raise BadInput(f"{base.folder}: its positions are scaled by {rope['rope_type']}, which llama.cpp lacks for a {config.model_type}")
    if strange := sorted(rope.keys() - {"rope_theta", "rope_type", "type", "partial_rotary_factor", "factor", "original_max_position_embeddings", "beta_fast",
                                        "beta_slow", "low_freq_factor", "high_freq_factor"}):
        raise BadInput(f"{base.folder}: {strange[0]} in rope_parameters of config.json changes the positions in a way that is not known here")
    return config, shapes


# ---- vocabulary ----
def read_vocabulary(tokenizer, chat: Chat | None, rows: int) -> dict:
    """What llama.cpp is told of a vocabulary: tokens, types, scores or merges, special tokens, and how a text begins.

    Args:
        rows: Of the embedding. What a model has beyond its tokens is named, and unused.
    """
    from gguf import TokenType

    name, state = tokenizer.name_or_path, json.loads(tokenizer.backend_tokenizer.to_str())
    model, ids = state["model"], tokenizer.get_vocab()
    spells = f"{tokenizer.chat_template}{tokenizer.bos_token}{tokenizer.eos_token}"
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    if beyond := sorted(token for token, i in ids.items() if i >= rows and (token not in special or token in spells)):
        raise BadInput(f"{name}: its tokenizer has {len(ids):,} tokens, the model {rows:,} rows, so {beyond[0]!r} has none: they do not belong together, "
                       f"or the model was not resized (extend_vocab.py does both)")
    if model["type"] != "BPE" or model.get("dropout"):
        raise BadInput(f"{name}: its tokenizer is {model['type']}; llama.cpp's are SentencePiece with byte fallback, and byte-level BPE")
    ids = {token: i for token, i in ids.items() if i < rows}
    tokens, types = [f"[UNUSED{i}]" for i in range(rows)], [TokenType.UNUSED] * rows
    for token, i in ids.items():
        byte = model.get("byte_fallback") and re.fullmatch("<0x[0-9A-F]{2}>", token)
        tokens[i], types[i] = token, TokenType.BYTE if byte else TokenType.NORMAL
    for i, token in tokenizer.added_tokens_decoder.items():
        if i < rows:
            types[i] = TokenType.CONTROL if token.special else TokenType.USER_DEFINED
            tokens[i] = tokens[i].replace("▁", " ") if model.get("byte_fallback") and not token.special else tokens[i]
    if len(set(tokens)) < rows:
        raise BadInput(f"{name}: {Counter(tokens).most_common(1)[0][0]!r} is the text of two tokens, which llama.cpp could not tell apart")
    prompt = chat.render(SHORTEST[:1], True)[0] if chat else tokenizer.bos_token
    begins = tokenizer("a").input_ids[0] == tokenizer.bos_token_id and prompt.startswith(tokenizer.bos_token)  # else the template writes it, or leaves it out
    merges = [tuple(pair) for pair in model["merges"]]
    vocabulary = {"tokens": tokens, "types": types, "merges": [], "chat_template": tokenizer.chat_template, "add_bos_token": begins}
    if model.get("byte_fallback"):
        if tokenizer.unk_token_id is not None:
            types[tokenizer.unk_token_id] = TokenType.UNKNOWN
        prefix = blank_before(state, name)
        if prefix == "first" and chat:  # llama.cpp puts it behind control tokens too: prompts that begin with one have none
            prefix = "" if chat.control_pattern.match(prompt) else prefix
        usual = {token: i for token, i in ids.items() if types[i] == TokenType.NORMAL}
        vocabulary |= {"model": "llama", "pre": "default", "scores": merge_scores(tokens, usual, merges, name), "add_space_prefix": bool(prefix)}
    else:
        vocabulary |= {"model": "gpt2", "pre": pre_tokenizer(state, tokenizer), "merges": [" ".join(pair) for pair in merges], "add_space_prefix": False}
    stop = next((i for i in (chat.stop_ids if chat else ()) if i != tokenizer.eos_token_id), None)
    special_ids = dict(bos=tokenizer.bos_token_id, eos=tokenizer.eos_token_id, unk=tokenizer.unk_token_id, pad=tokenizer.pad_token_id, eot=stop)
    return vocabulary | {"special_ids": {what: i for what, i in special_ids.items() if i is not None and i < rows}}


def blank_before(state: dict, name: str) -> str:
    """When a SentencePiece tokenizer puts a blank before a text: always, first (not behind a control token), or "" for never."""
    normalizer, cut = state["normalizer"] or {"type": None}, state["pre_tokenizer"] or {"type": None}
    steps = normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer] * (normalizer["type"] is not None)
    blank = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    if steps in ([blank], [{"type": "Prepend", "prepend": "▁"}, blank]) and cut["type"] is None:
        return "always" if len(steps) == 2 else ""
    if not steps and cut["type"] == "Metaspace" and cut["replacement"] == "▁" and not cut["split"]:
        return {"always": "always", "first": "first", "never": ""}[cut["prepend_scheme"]]
    raise BadInput(f"{name}: its tokenizer changes a text ({normalizer['type'] or cut['type']}) in a way that llama.cpp's for SentencePiece does not")


def merge_scores(tokens: list[str], usual: dict[str, int], merges: list[tuple], name: str) -> list[float]:
    """The scores by which llama.cpp merges as the list of merges does.

    It merges any two neighbours that are a piece together, the highest score first. Whatever stands around a piece, its letters come together
    as they do when it stands alone, or it does not come up. So its score is minus the rank of the merge that is then the last.
    """
    rank, scores = {pair: place for place, pair in enumerate(merges)}, [-float(len(merges))] * len(tokens)
    for piece, i in usual.items():
        parts = list(piece)
        while len(parts) > 1:
            last, place = min((rank.get(pair, len(merges)), place) for place, pair in enumerate(itertools.pairwise(parts)))
            if last == len(merges):
                break
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
            scores[i] = -float(last)
        if len(parts) == 2:
            raise BadInput(f"{name}: no merge makes the piece {piece!r} of {parts[0]!r} and {parts[1]!r}, and llama.cpp would: the tokenizer is damaged, or "
                           f"its pieces were added by hand; extend_vocab.py adds them with their merges")
    return scores


def pre_tokenizer(state: dict, tokenizer) -> str:
    """llama.cpp's name for what cuts a text before byte-level BPE merges; BadInput where it has none."""
    def cuts(step: dict) -> list[str]:
        match step:
            case {"type": "Sequence", "pretokenizers": steps}:
                return [cut for inner in steps for cut in cuts(inner)]
            case {"type": "Digits", "individual_digits": True}:
                return [r"\p{N}"]
            case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
                return [pattern]
            case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": regex}:
                return [BYTE_LEVEL] * regex
        return [json.dumps(step, ensure_ascii=False)]

    found, name = tuple(cuts(state["pre_tokenizer"] or {"type": "Sequence", "pretokenizers": []})), tokenizer.name_or_path
    normalizer = (state["normalizer"] or {"type": None})["type"]
    if found not in PRE_TOKENIZERS or normalizer not in (None, "NFC"):
        ways = ", ".join(known for known, _ in PRE_TOKENIZERS.values())
        raise BadInput(f"{name}: its tokenizer cuts a text by {' and then '.join(found) or 'nothing'}, after {normalizer or 'no'} normalization; what is known "
                       f"here of llama.cpp's ways are {ways}: start from a base whose tokenizer is one of these")
    known, whole = PRE_TOKENIZERS[found]
    ignores, bpe = state["model"].get("ignore_merges", False), tokenizer.backend_tokenizer.model
    pieces = state["model"]["vocab"].keys() - {token["content"] for token in state["added_tokens"]}
    if whole != ignores and (ignores or any(len(bpe.tokenize(piece)) > 1 for piece in pieces)):
        raise BadInput(f"{name}: its tokenizer has ignore_merges = {ignores}, llama.cpp's {known} the other, and there are pieces that no merges make")
    if normalizer:
        print("llama.cpp does not compose characters (NFC): text with accents apart from their letters gets other ids there", file=sys.stderr)
    return known


# ---- weights ----
def plan_tensors(base: "Weights", config, shapes: dict[str, tuple], type: str) -> list[tuple]:
    """(name in the files, llama.cpp's name, shape, type) of each tensor of the result."""
    import gguf

    architecture = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == ARCHITECTURES[config.model_type])
    names, plan = gguf.get_tensor_name_map(architecture, config.num_hidden_layers), []
    if config.rope_parameters["rope_type"] == "llama3":
        plan.append((None, "rope_freqs.weight", (config.head_dim // 2,), gguf.GGMLQuantizationType.F32))
    for name, shape in shapes.items():
        target, wanted = names.get_name(name, (".weight", ".bias")), gguf.GGMLQuantizationType[type.upper()]
        if target is None or (name.endswith(".bias") and config.model_type.startswith("qwen") and not re.search(r"[qkv]_proj\.bias$", name)):
            raise BadInput(f"{base.folder}: llama.cpp has no place for {name} in a {config.model_type}")
        if len(shape) == 1:  # norms and biases: llama.cpp adds them up in fp32
            wanted = gguf.GGMLQuantizationType.F32
        elif type.startswith("q"):
            wanted = gguf.GGMLQuantizationType.Q8_0 if target in ("token_embd.weight", "output.weight") else wanted
            wanted = wanted if shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0] == 0 else gguf.GGMLQuantizationType.F16
        plan.append((name, target, shape, wanted))
    return plan


def nbytes(shape: tuple, kind) -> int:
    """Bytes of a tensor in a type of gguf's."""
    from gguf import quant_shape_to_byte_shape

    return math.prod(quant_shape_to_byte_shape(shape, kind))


def parts_of(base: "Weights", config, name: str | None, shape: tuple, kind):
    """Yield a tensor's bytes as numpy arrays, some rows at a time.

    Queries and keys of llama.cpp's LLaMA have the two numbers of a pair that is turned together beside one another, those of
    transformers half a head apart.
    """
    import torch
    from gguf import quants

    if name is None:
        yield rope_factors(config)
        return
    head = config.head_dim if ARCHITECTURES[config.model_type] == "llama" and re.search(r"self_attn\.[qk]_proj\.", name) else 1
    step = max(1, ROWS_AT_ONCE // math.prod(shape[1:]) // head) * head  # whole heads
    for begin in range(0, shape[0], step):
        rows = base.read(name, slice(begin, begin + step)).float()
        if not (most := rows.abs().max()) <= (limit := torch.finfo(torch.float16 if kind.name == "F16" else torch.float32).max):
            raise RunStopped(f"{name} holds {most:g}, which is more than {limit:g}" + " in f16: take --type bf16" * bool(most.isfinite()))
        if head > 1:
            rows = rows.view(-1, 2, head // 2, *shape[1:]).transpose(1, 2).reshape(rows.shape)
        if kind.name == "BF16":
            yield rows.bfloat16().view(torch.int16).numpy()
            continue
        yield quants.quantize(rows.numpy(), kind)


def rope_factors(config):
    """By what LLaMA 3 divides each of the D/2 frequencies of its positions."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")  # (D / 2,)
    exponents = scaled.new_tensor(range(0, config.head_dim, 2)) / config.head_dim
    return (config.rope_parameters["rope_theta"] ** -exponents / scaled).numpy()


# ---- file ----
@contextlib.contextmanager
def whole_file(file: Path, size: int):
    """A file that is there whole or not at all: write `size` bytes to the path this yields, it is renamed at the end."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise BadInput(f"--output_file={file}: {file.parent} cannot be made ({problem.strerror}): give another") from None
    if (free := shutil.disk_usage(file.parent).free) < size:
        raise BadInput(f"--output_file={file}: {free / 1e9:.1f} GB are free, {size / 1e9:.1f} GB are to be written: free some space, or take a smaller --type")
    unfinished = file.with_name(f".{file.name}.unfinished")  # a fixed name: the next run writes over what a killed one left
    with open(unfinished, "ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput(f"--output_file={file} is being written by another run") from None
        try:
            yield unfinished
            unfinished.rename(file)
        finally:
            unfinished.unlink(missing_ok=True)


def write_gguf(file: Path, base: "Weights", config, vocabulary: dict, plan: list[tuple], type: str) -> None:
    """Write a GGUF file, one tensor after the other, and read back what is in it."""
    import gguf
    import numpy
    from tqdm import tqdm

    writer = gguf.GGUFWriter(None, ARCHITECTURES[config.model_type])
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(base.folder.resolve().name)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{type.upper()}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_architecture(writer, config)
    add_vocabulary(writer, vocabulary)
    for _, target, shape, kind in plan:
        writer.add_tensor_info(target, shape, numpy.dtype(numpy.float32), nbytes(shape, kind), kind)
    writer.write_header_to_file(file)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    stream = writer.fout[0]
    for name, _, shape, kind in tqdm(plan, "exporting", unit=" tensors", leave=False):
        writer.write_padding(stream, stream.tell())
        for part in parts_of(base, config, name, shape, kind):
            part.tofile(stream)
    writer.write_padding(stream, stream.tell())
    writer.close()
    try:
        found = [(tensor.name, tuple(tensor.shape.tolist()[::-1]), tensor.tensor_type) for tensor in gguf.GGUFReader(file).tensors]
    except ValueError:  # it ends before its last tensor does
        found = []
    if found != [(target, shape, kind) for _, target, shape, kind in plan]:
        raise RunStopped("the file was written, but reads back with other tensors: is the disk failing?")


def add_architecture(writer, config) -> None:
    """Sizes and positions."""
    from gguf import RopeScalingType

    rope, window = config.rope_parameters, getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    writer.add_context_length(min(config.max_position_embeddings, window or config.max_position_embeddings))  # llama.cpp's LLaMA and Qwen see all of it
    writer.add_vocab_size(config.vocab_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType[rope["rope_type"].upper()])
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope.get("original_max_position_embeddings") or config.max_position_embeddings)
        writer.add_rope_scaling_yarn_beta_fast(rope.get("beta_fast") or 32)
        writer.add_rope_scaling_yarn_beta_slow(rope.get("beta_slow") or 1)


def add_vocabulary(writer, vocabulary: dict) -> None:
    """What read_vocabulary found, by llama.cpp's names."""
    writer.add_tokenizer_model(vocabulary["model"])
    writer.add_tokenizer_pre(vocabulary["pre"])
    writer.add_token_list(vocabulary["tokens"])
    writer.add_token_types(vocabulary["types"])
    if "scores" in vocabulary:
        writer.add_token_scores(vocabulary["scores"])
    else:
        writer.add_token_merges(vocabulary["merges"])
    writer.add_add_space_prefix(vocabulary["add_space_prefix"])
    writer.add_add_bos_token(vocabulary["add_bos_token"])
    writer.add_add_eos_token(False)
    for what, i in vocabulary["special_ids"].items():
        getattr(writer, f"add_{what}_token_id")(i)
    if vocabulary["chat_template"]:  # {% generation %}, which marks what is trained, is transformers' own
        template = re.sub(r"({%[-+]?\s*)generation\b", r"\1if true", vocabulary["chat_template"])
        writer.add_chat_template(re.sub(r"({%[-+]?\s*)endgeneration\b", r"\1endif", template))


# ---- use ----
def ollama_template(chat: Chat, add_bos: bool) -> str | None:
    """The chat template in Go's language, which Ollama wants, or None where it is no fixed text around each message.

    It is read off a dialogue of two rounds, with signs in the place of the texts.
    """
    sign, parts = "\U000f2000", {}  # for private use
    messages = [{"role": role, "content": sign} for role in ("system", "user", "assistant", "user", "assistant", "user")]
    for system in (True, False):
        try:
            parts[system] = chat.render(messages[not system:], True)[0].split(sign)
        except BadInput:  # some have no place for a system text
            parts[system] = []
    head, *without = parts[False] or [""]
    first, mid, *behind = parts[True] if len(parts[True]) == 7 else [head, "", *without]
    if len(without) != 5 or behind != without or without[:2] != without[2:4] or not without[0].startswith(without[4]):
        return None
    (before_answer, behind_answer), prompt_end = without[:2], without[4]
    if add_bos:  # Ollama puts it before the whole
        first, head = first.removeprefix(chat.tokenizer.bos_token), head.removeprefix(chat.tokenizer.bos_token)
    if any("{{" in part or '"""' in part for part in (first, mid, head, *without)):
        return None
    return (f"{{{{ if .System }}}}{first}{{{{ .System }}}}{mid}{{{{ else }}}}{head}{{{{ end }}}}{{{{ range .Messages }}}}"
            f'{{{{ if eq .Role "user" }}}}{{{{ .Content }}}}{prompt_end}'
            f'{{{{ else if eq .Role "assistant" }}}}{before_answer.removeprefix(prompt_end)}{{{{ .Content }}}}{behind_answer}{{{{ end }}}}{{{{ end }}}}')


def text_lines(value):
    """Yield the lines of every text in a record, whatever its schema."""
    if isinstance(value, str):
        yield from value.strip("\r\n").split("\n")
    elif isinstance(value, (dict, list)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from text_lines(part)


def compare_ids(file: Path, tokenizer, chat: Chat | None, vocabulary: dict, eval_path: str | None) -> dict[str, float] | None:
    """Share of lines, by kind of text, whose ids are the same by llama.cpp and by transformers, as they are or as the prompts of a chat.

    None without llama-cpp-python. The kinds: all pieces of the vocabulary in another order, Python's manual and code, and eval_path.
    """
    if importlib.util.find_spec("llama_cpp") is None:
        print("ids were not compared: pip install llama-cpp-python==0.3.36 for that", file=sys.stderr)
        return None
    import argparse
    import inspect
    import random
    from pydoc_data.topics import topics

    import llama_cpp

    peer = llama_cpp.Llama(str(file), vocab_only=True, verbose=False)
    usual = [i for i, kind in enumerate(vocabulary["types"]) if kind.name == "NORMAL"]
    random.Random(0).shuffle(usual)
    texts = {"the vocabulary": [tokenizer.decode(usual[i : i + 20]) for i in range(0, len(usual), 20)],
             "English": "\n".join(topics.values()).split("\n"), "code": inspect.getsource(argparse).split("\n")}
    if eval_path:
        rows = read_rows(eval_path, Counter(), "line")
        texts[Path(eval_path).stem] = [line for row in rows for line in text_lines(row)]
    figures, control = {}, chat.control_pattern if chat else re.compile("|".join(map(re.escape, tokenizer.all_special_tokens)) or "(?!)")
    for kind, lines in texts.items():
        # Before a first blank llama.cpp puts another, as SentencePiece does, and newer transformers do not
        lines = [line for line in map(str.strip, lines) if line and not control.search(line)]
        lines = lines[:: max(1, len(lines) // COMPARED)]
        pairs = []
        for line in lines:
            if chat:
                prompt = [{"role": "user", "content": line}]
                text, ours = chat.render(prompt, True)[0], [i for ids, _ in chat.encode(prompt, True) for i in ids]
                text = text.removeprefix(tokenizer.bos_token) if vocabulary["add_bos_token"] else text
            else:
                text, ours = line, tokenizer(line).input_ids
            pairs.append((line, ours, peer.tokenize(text.encode(), add_bos=vocabulary["add_bos_token"], special=True)))
        other = [(line, ours, theirs) for line, ours, theirs in pairs if ours != theirs]
        if not pairs:
            figures[kind] = None
            print(f"{kind} holds no line whose ids could be compared", file=sys.stderr)
            continue
        figures[kind] = round(1 - len(other) / len(pairs), 5)
        print(f"llama.cpp gives the ids of transformers on {figures[kind]:.2%} of {len(pairs):,} lines of {kind}", file=sys.stderr)
        for line, ours, theirs in other[:3]:
            place = next(place for place, (a, b) in enumerate(itertools.zip_longest(ours, theirs)) if a != b)
            print(f"  {line[:60]!r}: {tokenizer.convert_ids_to_tokens(ours[place : place + 4])} there, here "
                  f"{tokenizer.convert_ids_to_tokens(theirs[place : place + 4])}", file=sys.stderr)
    return figures


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


if __name__ == "__main__":
    cli(main)
