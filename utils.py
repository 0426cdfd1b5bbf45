"""What must not differ between the scripts: the command line, and what is checked before anything expensive.

Nothing here imports torch or transformers, so that a mistyped flag is refused before the seconds that those take. What
else the scripts share: records.py (data formats), chat.py (prompt text and label mask), models.py (loading), training.py.
"""
import ast
import contextlib
import difflib
import functools
import hashlib
import importlib.util
import inspect
import json
import logging
import os
import pprint
import re
import shutil
import sys
import tempfile
import typing
import warnings
from pathlib import Path

import fire


class BadInput(ValueError):
    """What the user gave cannot be used: one line that says what, where and how to mend it."""


class RunStopped(RuntimeError):
    """A run that had begun cannot go on, or ends early; `status` is the exit status."""

    def __init__(self, message: str, status: int = 1):
        super().__init__(message)
        self.status = status


# ---- command line ----
def cli(main) -> None:
    """fire.Fire(main), except that main starts only once the whole command line is understood.

    fire calls the function first and reports unknown flags afterwards (google/python-fire#168), and it guesses types:
    "a, b" becomes a tuple, false a true string. Here it hands over every flag as text, which is looked up and converted
    by main's annotations. Exit status: 2 for bad input, 130 after Ctrl-C.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads cost 2 to 5 times on a shared machine
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it asks for a package that only speeds up 4 bit on a CPU
    warnings.filterwarnings("ignore", category=FutureWarning)  # transformers and peft warn of one another
    if "LOCAL_RANK" not in os.environ:  # without torchrun one GPU is used: Trainer would split each batch over all (nn.DataParallel)
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    if {"-h", "--help"} & set(sys.argv[1:]):
        os.environ.setdefault("PAGER", "cat")
        with contextlib.redirect_stderr(sys.stdout):  # so that --help | less shows it
            return fire.Fire(main, command=["--", "--help"])
    strays, texts = [], {}

    @fire.decorators.SetParseFn(str)
    def collect(*rest, **flags):
        strays.extend(rest)
        texts.update(flags)

    fire.Fire(collect)
    try:
        if strays:
            raise BadInput(f"{strays[0]!r} belongs to no flag: write --name value, with quotes around text that has blanks")
        main(**convert_flags(main, texts))
    except BadInput as problem:
        if os.environ.get("RANK", "0") == "0":  # every rank finds the same: say it once
            print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
    except RunStopped as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(problem.status)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as problem:  # torch raises RuntimeError, safetensors its own error, Python OSError
        if "No space left" not in str(problem) and "file write failed" not in str(problem):
            raise
        print(f"error: the disk is full ({problem.__class__.__name__}); what was whole before is kept: free some space, then --resume True "
              f"or the same command again", file=sys.stderr)
        sys.exit(2)


def convert_flags(main, texts: dict[str, str]) -> dict:
    """The flags with the types that main asks for; BadInput where one is unknown, missing or of another type.

    A main with **training_arguments takes every field of transformers.TrainingArguments as well.
    """
    parameters = inspect.signature(main).parameters
    kinds = {name: p.annotation for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    if len(kinds) < len(parameters):
        kinds = training_argument_kinds() | kinds
    for name in list(texts):
        meant = [flag for flag in parameters if flag.startswith(name)]
        if len(name) == len(meant) == 1:  # fire's help offers -d for --data_path
            texts[meant[0]] = texts.pop(name)
        elif name not in kinds:
            near = difflib.get_close_matches(name, kinds, n=1)
            hint = f"did you mean --{near[0]}?" if near else "--help lists the flags"
            raise BadInput(f"--{name} is not a flag of {Path(sys.argv[0]).name}: {hint}")
    for name, p in parameters.items():
        if p.kind is p.KEYWORD_ONLY and p.default is p.empty and name not in texts:
            about = re.search(rf"^ +{name}: (.*)", main.__doc__, re.M)
            raise BadInput(f"--{name} is missing: {about[1] if about else 'it has no default'}")
    return {name: convert_flag(name, text, kinds[name]) for name, text in texts.items()}


def convert_flag(name: str, text: str, kind):
    """`text` as the type that `kind`, an annotation or its source, asks for; BadInput if it cannot be."""
    literals = [part for part in (kind, *typing.get_args(kind)) if typing.get_origin(part) is typing.Literal]
    if literals:
        choices = {str(choice): choice for choice in typing.get_args(literals[0])}
        if text not in choices:
            raise BadInput(f"--{name}={text} is not one of {', '.join(choices)}")
        return choices[text]
    words = re.findall(r"\w+", str(kind))  # "int | None", "<class 'float'>", "dict[str, Any] | str | None"
    if "None" in words and text == "None":
        return None
    if "bool" in words and text.lower() in ("true", "false"):
        return text.lower() == "true"
    for word, number in (("int", int), ("float", float)):
        if word in words:
            try:
                return number(text)
            except ValueError:
                pass
    if "str" in words:
        return text
    wanted = "True or False" if "bool" in words else "a whole number" if "int" in words else "a number"
    raise BadInput(f"--{name}={text} is not {wanted}")


@functools.cache
def training_argument_kinds() -> dict[str, str]:
    """{field: source of its annotation} of transformers.TrainingArguments, read from the file: an import takes 5 s."""
    path = Path(importlib.util.find_spec("transformers").origin).with_name("training_args.py")
    classes = [node for node in ast.parse(path.read_text("utf-8")).body if isinstance(node, ast.ClassDef)]
    fields = next(c.body for c in classes if c.name == "TrainingArguments")
    return {f.target.id: ast.unparse(f.annotation) for f in fields if isinstance(f, ast.AnnAssign)}


# ---- files ----
def cache_folder() -> Path:
    """Where tokenized data and the default model are kept: $YANGTUO_CACHE, else ~/.cache/yangtuo."""
    return Path(os.environ.get("YANGTUO_CACHE") or Path.home() / ".cache" / "yangtuo")


@contextlib.contextmanager
def whole_folder(folder: Path):
    """A folder that is there whole or not at all: write to the path this yields, it is renamed at the end."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name[:40]}-", dir=folder.parent))
    try:
        yield unfinished
        unfinished.chmod(0o755)  # mkdtemp's are closed to everyone else
        if not folder.is_dir():
            unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def check_model(model_name_or_path: str, allow_pickle: bool = False, quantized: bool = False) -> None:
    """BadInput if a folder cannot be loaded as a model, of quantize_gptq.py's too if `quantized`; a name that is no folder is left to the hub."""
    folder = Path(model_name_or_path)
    if not folder.is_dir():
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", model_name_or_path) or folder.parent.is_dir():
            raise BadInput(f"{model_name_or_path} does not exist: give a model folder, or a name on the hub such as Qwen/Qwen2.5-7B")
        return
    names = {file.name for file in folder.iterdir()}
    if "config.json" not in names:
        what = "has no config.json, so it is no model"
        if "adapter_config.json" in names:
            what = "is a LoRA adapter: give its base as the model and this as --lora_path"
        raise BadInput(f"{folder} {what} (it holds {', '.join(sorted(names)[:8]) or 'nothing'})")
    if "delta.json" in names:
        raise BadInput(f"{folder} is a delta, which only babbles by itself: make the model of it with apply_delta.py")
    if not quantized and "quantize_config.json" in names:
        raise BadInput(f"{folder} is quantized, its weights are for generate.py alone: give the 16-bit model that it was made from")
    for index in names & {"model.safetensors.index.json", "pytorch_model.bin.index.json"}:
        missing = sorted(set(json.loads((folder / index).read_text("utf-8"))["weight_map"].values()) - names)
        if missing:
            raise BadInput(f"{folder} lacks {missing[0]}, which its {index} names ({len(missing)} missing): finish the download")
    if not any(name.endswith(".safetensors") for name in names):
        pickles = sorted(name for name in names if name.endswith((".bin", ".pt", ".pth")))
        if not pickles:
            raise BadInput(f"{folder} holds no weights (*.safetensors): it holds {', '.join(sorted(names)[:8])}")
        if not allow_pickle:
            raise BadInput(f"{folder} has its weights as a pickle ({pickles[0]}), which can run code when it is loaded: if you trust "
                           f"it, add --allow_pickle True")


def check_adapter(lora_path: str | None) -> None:
    """BadInput if a folder is given that is no adapter."""
    if lora_path and not Path(lora_path, "adapter_config.json").is_file():
        raise BadInput(f"--lora_path={lora_path} " + ("is no adapter: it has no adapter_config.json" if os.path.isdir(lora_path) else "does not exist"))


def check_file(flag: str, path: str | None) -> None:
    """BadInput if the path of a flag is given and is not that of a file with something in it."""
    if path is not None and not os.path.isfile(path):
        raise BadInput(f"--{flag}={path} " + ("is a folder, a file is wanted" if os.path.isdir(path) else "does not exist"))
    if path is not None and not os.path.getsize(path):
        raise BadInput(f"--{flag}={path} is empty")


def check_output_dir(output_dir: str, resume: bool | None = None) -> None:
    """BadInput if output_dir holds something and this run is not to go on with it; None: it is of a script that cannot."""
    folder = Path(output_dir)
    existing = next(parent for parent in (folder, *folder.resolve().parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise BadInput(f"--output_dir={output_dir}: {existing} is " + ("not a folder" if not existing.is_dir() else "not writable"))
    begun = {"run.json", ".saving", "runs"} if resume is not None else set()  # of a run that never came to its first checkpoint
    if not resume and folder.is_dir() and any(file.name not in begun for file in folder.iterdir()):
        raise BadInput(f"--output_dir={output_dir} holds another run: " + "go on with it by --resume True, or " * (resume is not None) + "give a new folder")


def resume_point(output_dir: str, facts: dict) -> str | None:
    """The last checkpoint in output_dir; BadInput if run.json says that the run there was another one.

    Args:
        facts: What a run that goes on must have in common with the one that began: data, template, length, ...
    """
    whole = [folder for folder in Path(output_dir).glob("checkpoint-*") if (folder / "trainer_state.json").is_file()]
    checkpoints = {int(folder.name[11:]): str(folder) for folder in whole if folder.name[11:].isdigit()}
    begun = Path(output_dir) / "run.json"
    if checkpoints and begun.is_file():
        for name, before in json.loads(begun.read_text("utf-8")).items():
            if name in facts and facts[name] != before:
                raise BadInput(f"--resume: {output_dir} was begun with {name} = {before}, now it is {facts[name]}: give the same, or a new --output_dir")
    return checkpoints[max(checkpoints)] if checkpoints else None


def run_facts(flags: dict, **found) -> dict:
    """What a run must have in common with the one it goes on from: the flags, less those that may change, and what was found."""
    may_change = {"output_dir", "resume", "num_train_epochs", "early_stopping_patience", "training_arguments", "trust_remote_code", "allow_pickle",
                  "check_memory", "model_name_or_path", "data_path", "eval_path", "per_device_train_batch_size", "gradient_accumulation_steps"}
    blocks = flags["per_device_train_batch_size"] * flags["gradient_accumulation_steps"]  # one can be traded for the other
    return {name: value for name, value in flags.items() if name not in may_change} | {"blocks_per_rank_and_step": blocks} | found


def check_positive(**flags: float) -> None:
    """BadInput if one of the flags is not above zero."""
    for name, value in flags.items():
        if value <= 0:
            raise BadInput(f"--{name}={value} must be above zero")


def show(flags: dict) -> None:
    """Print what a run is started with, once for all ranks."""
    if os.environ.get("RANK", "0") == "0":
        pprint.pprint(flags, stream=sys.stderr)


def write_facts(output_dir: str, facts: dict) -> None:
    """Note in run.json what the run that begins is made of, for resume_point."""
    if os.environ.get("RANK", "0") == "0":
        os.makedirs(output_dir, exist_ok=True)
        Path(output_dir, "run.json").write_text(json.dumps(facts, indent=2, ensure_ascii=False), "utf-8")


def file_hash(path: str) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fingerprint(model_name_or_path: str) -> str | None:
    """SHA-256 over names, shapes and the first 4 KiB of every tensor of a safetensors folder; None where there is none.

    Tells one base from another in a second, where hashing 13 GB whole takes a minute.
    """
    digest = hashlib.sha256()
    files = sorted(Path(model_name_or_path).glob("model*.safetensors"))
    for file in files:
        with open(file, "rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(size))
            header.pop("__metadata__", None)
            for name, tensor in sorted(header.items()):
                begin, end = tensor["data_offsets"]
                stream.seek(8 + size + begin)
                digest.update(f"{name}{tensor['dtype']}{tensor['shape']}".encode() + stream.read(min(4096, end - begin)))
    return digest.hexdigest() if files else None
