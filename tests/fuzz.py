"""Damage everything a user could hand over, at random, and see that each case ends well or in one line (exit status 2). Not part of the suite.

    python tests/fuzz.py --minutes 30                         # all areas, in turn
    python tests/fuzz.py --areas records,kills --seed 7
    python tests/fuzz.py --replay output/fuzz/records-7-41    # one that failed, once more: its folder holds all it was made of

A case fails that ends in any other exception, takes more than a minute or 10 GB, gives something that cannot be meant, or changes a file it
was only to read. Areas: records (every format, tokenized), readers (those of the other scripts), sets (of evaluate.py, as they are published), headers (of safetensors:
base, adapter, reward model, delta), side_files (JSON beside the weights, of a run's own), flags (of every script), kills (SIGKILL at random
moments, then the same command again).
"""
import contextlib
import importlib
import inspect
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]
os.environ |= {"OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "TQDM_DISABLE": "1"}
from utils import BadInput, Chat, RunStopped, cli, file_hash, numbered_records, tokenize_records  # noqa: E402

SECONDS, MEMORY = 60, 10 << 30  # a case that takes longer hangs; bytes of address space, of which torch itself has some 4 GB
SAMPLE = str(ROOT / "sample")
RULES = f"{SAMPLE}/rules.py:finished=1,chinese=1"
PPO = dict(rules=RULES, template="ziya", max_length=128, max_new_tokens=8, rollout_batch_size=1, num_generations=2, missing_eos_penalty=0.5, max_steps=2,
           gradient_checkpointing=False)
EVALUATION = dict(eval_path=f"{SAMPLE}/eval/company.jsonl", limit=3, num_answers=1, max_length=128, max_new_tokens=3)
ODD = [None, True, False, 0, -1, 5, 1.5, 10**400, [], {}, [[]], [None], {"a": {}}, "", " ", "\n", "null", "x", "é" * 3, "你好", "a\ud83d", "\U000f1000", "\U000f1001b",
       "\x00", "\ufeff", "\ufffd", "\\n", "<|im_end|>", "<s>Human: ", "user", "assistant", "system", "../x", "/", "a" * 5000, "[" * 300, "NaN", "锟斤拷"]
NUMBERS = ["-1", "0", "1", "2", "0.5", "-0.1", "nan", "inf", "1e-320", "1e400", "99999999999999", "4294967296", "10" * 20, "", "x", "True", "None", "１"]
WORDS = ["", " ", "x", "-h", "--", "a,b", "[1]", "{}", "None", "True", "false", "/", ".", "/dev/null", "/proc/x", "a\nb", "'", '"', ";", "$(x)", "é", "\udcff", "../x", "a" * 300]


# ---- damage ----
def nodes(tree, path=()):
    """The paths of all nodes of a JSON value."""
    yield path
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield from nodes(value, (*path, key))


def damage_json(rng: random.Random, tree):
    """A JSON value with one to three nodes replaced, removed, renamed or doubled."""
    tree = json.loads(json.dumps(tree))
    for _ in range(rng.randint(1, 3)):
        path = rng.choice(list(nodes(tree)))
        if not path:
            if rng.random() < 0.1:
                return rng.choice(ODD)
            continue
        owner = tree
        for key in path[:-1]:
            owner = owner[key]
        match rng.randrange(5):
            case 0 | 1:
                owner[path[-1]] = rng.choice(ODD)
            case 2:
                del owner[path[-1]]
            case 3 if isinstance(owner, dict):
                owner[rng.choice(["x", "", "input", "system", "history", "messages", "text", "dtype"])] = owner.pop(path[-1])
            case _:
                owner[path[-1]] = [owner[path[-1]]] * rng.randint(1, 3)
    return tree


def damage_bytes(rng: random.Random, data: bytes) -> bytes:
    """Bytes with some changed, cut off, doubled or put in."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) or 1)
        match rng.randrange(6):
            case 0 if data:
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                del data[at:]
            case 2:
                del data[at : at + rng.randint(1, 20)]
            case 3:
                data[at:at] = data[at : at + rng.randint(1, 200)]
            case 4:
                data[at:at] = rng.choice([b"\x00", b"\xff", b"\xef\xbb\xbf", b"\r", b"\n", b'"', b"{", b"[", b",", "中".encode("gb18030"), b"\xed\xa0\xbd", b"\x1a"])
            case _:
                data[at : at + 4] = rng.randbytes(4)
    return bytes(data)


def damage_header(rng: random.Random, data: bytes) -> bytes:
    """A safetensors file with its header damaged, as JSON or as bytes; its length field may follow or not."""
    size = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + size], data[8 + size:]
    if rng.random() < 0.5:
        damaged = json.dumps(damage_json(rng, json.loads(header))).encode()
        return len(damaged).to_bytes(8, "little") + damaged + rest
    if rng.random() < 0.7:
        damaged = damage_bytes(rng, header)
        return (len(damaged) if rng.random() < 0.5 else size).to_bytes(8, "little") + damaged + rest
    return damage_bytes(rng, data[: 8 + size + 64]) + data[8 + size + 64:]


# ---- what is damaged: made once ----
def make_fixtures(folder: Path) -> None:
    """A tiny model, one tuned from it, an adapter, a reward model, a delta, a 4-bit model and runs that are finished, as the scripts make them."""
    import conftest
    from transformers import AutoTokenizer

    import apply_delta
    import evaluate
    import finetune
    import finetune_lora
    import quantize_gptq
    import train_ppo
    import train_reward
    from record_lm_eval import write_sets

    text = "".join(path.read_text("utf-8") for path in sorted((ROOT / "sample").glob("*.json*"))).split("\n")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.train_from_iterator(text, trainers.BpeTrainer(vocab_size=1000, special_tokens=["<|begin|>", "<|end|>"],
                                                            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token="<|end|>").save_pretrained(folder / "tokenizer")
    model = str(conftest.make_model(folder / "model", AutoTokenizer.from_pretrained(folder / "tokenizer")))
    run = dict(model_name_or_path=model, data_path=str(ROOT / "sample/instruction.json"), max_length=128, max_steps=2, learning_rate=1e-2)
    finetune_lora.main(**run, output_dir=str(folder / "adapter"), save_steps=1)
    finetune.main(**run, output_dir=str(folder / "tuned"))
    train_reward.main(**run | {"data_path": f"{SAMPLE}/preference.json"}, template="ziya", output_dir=str(folder / "reward"))
    train_ppo.main(model_name_or_path=model, data_path=f"{SAMPLE}/prompts.jsonl", output_dir=str(folder / "policy"), save_steps=1, **PPO)
    evaluate.main(model_name_or_path=model, output_dir=str(folder / "measured"), **EVALUATION)
    for name in ("adapter", "tuned", "reward", "policy", "measured"):
        (folder / name / "run.lock").unlink()
    (folder / "sets").mkdir()
    write_sets(folder / "sets")
    apply_delta.main(base=model, target=str(folder / "tuned"), delta=str(folder / "delta"), make=True)
    quantize_gptq.main(model_name_or_path=model, calibration_path=str(ROOT / "sample/corpus.txt"), output_dir=str(folder / "quantized"), bits=4, group_size=32)


# ---- the areas: each makes a case in `folder` and runs it ----
def case_records(rng: random.Random, folder: Path, fixtures: Path) -> None:
    from transformers import AutoTokenizer

    source = rng.choice([path for path in sorted((ROOT / "sample").glob("*.*")) if path.suffix in (".json", ".jsonl", ".csv", ".txt")])
    notes, data, suffix = Counter(), source.read_bytes(), source.suffix
    if suffix in (".json", ".jsonl") and rng.random() < 0.75:
        rows = json.loads(data) if suffix == ".json" else list(map(json.loads, data.decode().splitlines()))
        rows = [damage_json(rng, row) if rng.random() < 0.4 else row for row in rng.sample(rows, 4)]
        if rng.random() < 0.2:
            with contextlib.suppress(Exception):  # not every tree is a table
                import pandas
                suffix = rng.choice([".csv", ".parquet"])
                frame = pandas.DataFrame(rows)
                frame.to_csv(folder / "data.csv", index=False) if suffix == ".csv" else frame.to_parquet(folder / "data.parquet")
        if not (folder / f"data{suffix}").is_file():
            suffix = ".jsonl" if suffix not in (".json", ".jsonl") else suffix
            (folder / f"data{suffix}").write_text(json.dumps(rows) if suffix == ".json" else "\n".join(json.dumps(row, ensure_ascii=rng.random() < 0.5).encode(
                "utf-8", "surrogatepass").decode("utf-8", "replace") for row in rows), "utf-8")
    else:
        (folder / f"data{suffix}").write_bytes(damage_bytes(rng, data))
    path, skip = str(folder / f"data{suffix}"), rng.random() < 0.5
    kind = {"corpus": dict(document_separator=rng.choice(["line", "blank_line"])), "completion": dict(document_separator="line"), "preference": dict(preference=True)}
    for how in (kind.get(source.stem, {}), rng.choice([{}, dict(document_separator="line"), dict(preference=True)])):
        with contextlib.suppress(BadInput):
            for number, record in numbered_records(path, skip, rng.random() < 0.5, notes, **how):
                texts = [message["content"] for message in record["messages"]] + [record[name] for name in ("chosen", "rejected") if name in record]
                assert record["messages"] and all(isinstance(text, str) and text.encode() is not None for text in texts), record
    tokenizer = AutoTokenizer.from_pretrained(fixtures / "tokenizer")
    chat = Chat(tokenizer, rng.choice(["alpaca", "chatml", "llama2", "yayi", "plain", "ziya"]))
    examples, _ = tokenize_records(path, chat, rng.choice([64, 256]), skip, False, kind.get(source.stem, {}).get("document_separator"))
    for example in examples:
        assert all(0 <= i < len(tokenizer) for i in example["input_ids"]) and any(label >= 0 for label in example["labels"][1:]), example


def case_readers(rng: random.Random, folder: Path, fixtures: Path) -> None:
    """The same damage, in front of those that read rows in their own way."""
    from transformers import AutoTokenizer

    import clean_corpus
    import evaluate
    import generate
    import score_records
    import train_ppo

    with contextlib.suppress(BadInput):
        case_records(rng, folder, fixtures)
    path, skip = str(next(folder.glob("data.*"))), rng.random() < 0.5
    model = dict(model_name_or_path=str(fixtures / "model"), template="ziya", output_file=str(folder / "out.jsonl"), skip_bad_records=skip)
    match rng.randrange(6):
        case 0:
            chat = Chat(AutoTokenizer.from_pretrained(fixtures / "tokenizer"), "ziya")
            assert all(prompt["messages"] and prompt["prompt"] for prompt in train_ppo.read_prompts(path, chat, 500, skip))
        case 1:
            by = rng.choice([dict(by="length"), dict(by="rules", rules=RULES), dict(by="loss"), dict(by="ifd"), dict(by="judge"), dict(by="reward", reward_model=str(fixtures / "reward"))])
            score_records.main(data_path=path, keep=rng.choice(["all", "all", "best", "pairs", "hindsight"]), buckets=rng.choice([0, 0, 2]), **model | by)
        case 2:
            score_records.main(data_path=path, keep=rng.choice(["prompts", "best", "pairs"]), **model)
        case 3:
            given = dict(eval_data=rng.choice([None, path, f"{SAMPLE}/web/questions.csv"]), good_text=rng.choice([None, path, f"{SAMPLE}/corpus.txt"]),
                         against=rng.choice([None, f"{SAMPLE}/corpus.txt"]), document_separator=rng.choice(["line", "blank_line"]))
            steps = ",".join(step for step in clean_corpus.STEPS if rng.random() < 0.8)
            clean_corpus.main(data_path=path, output_dir=str(folder / "out"), workers=rng.choice([1, 1, 1, 2]), steps=steps, **given)
            lines = [json.loads(line) for name in ("kept", "dropped") for line in (folder / "out" / f"{name}.jsonl").read_bytes().splitlines()]
            assert len(lines) == json.loads((folder / "out" / "report.json").read_text("utf-8"))["read"]
        case 4:
            assert all(question["messages"] for question in evaluate.read_tasks(["perplexity"], None, None, 0, None, path, 3))
        case 5:
            del model["skip_bad_records"]
            generate.main(input_file=path, max_new_tokens=2, temperature=0, **model)


def case_sets(rng: random.Random, folder: Path, fixtures: Path) -> None:
    """A set of evaluate.py with its records or its bytes damaged: read, and now and then asked."""
    import evaluate

    shutil.copytree(fixtures / "sets", folder / "sets")
    file = rng.choice(sorted(path for path in (folder / "sets").rglob("*.*") if path.is_file()))
    if file.suffix == ".jsonl" and rng.random() < 0.7:
        rows = [damage_json(rng, json.loads(line)) if rng.random() < 0.7 else json.loads(line) for line in file.read_text("utf-8").splitlines()]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    else:
        file.write_bytes(damage_bytes(rng, file.read_bytes()))
    task = next(task for task in evaluate.TASKS if task in str(file.relative_to(folder)).lower())
    if rng.random() < 0.7:
        evaluate.read_tasks([task], str(folder / "sets"), None, rng.choice([0, 2, 5]), rng.choice([None, 2]), None, 2)
    else:
        evaluate.main(model_name_or_path=str(fixtures / "model"), data_dir=str(folder / "sets"), tasks=task, output_dir=str(folder / "out"), max_new_tokens=3, shots=rng.choice([0, 2]))


def case_headers(rng: random.Random, folder: Path, fixtures: Path) -> None:
    name = rng.choice(["model", "adapter", "delta", "tuned", "reward"])
    shutil.copytree(fixtures / name, folder / name, ignore=shutil.ignore_patterns("checkpoint-*"))
    file = next((folder / name).glob("*.safetensors"))
    file.write_bytes(damage_header(rng, file.read_bytes()))
    use(rng, folder, fixtures, name)


def case_side_files(rng: random.Random, folder: Path, fixtures: Path) -> None:
    name = rng.choice(["model", "adapter", "delta", "quantized", "checkpoint", "reward", "policy", "measured"])
    source = fixtures / ("adapter" if name == "checkpoint" else name)
    shutil.copytree(source, folder / name)
    if name == "model" and rng.random() < 0.3:
        (folder / name / "model.safetensors").rename(folder / name / "model-00001-of-00001.safetensors")
        names = json.loads((fixtures / "model.names.json").read_text())
        (folder / name / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}))
    file = rng.choice(sorted((folder / name).rglob("*.json*") if name in GOES_ON else (folder / name).glob("*.json")))
    if rng.random() < 0.6 and file.suffix == ".jsonl":
        lines = [json.dumps(damage_json(rng, json.loads(line))) if rng.random() < 0.3 else line for line in file.read_text("utf-8").splitlines()]
        file.write_text("\n".join(lines), "utf-8")
    elif rng.random() < 0.6 and file.suffix == ".json":
        file.write_text(json.dumps(damage_json(rng, json.loads(file.read_text("utf-8")))), "utf-8")
    else:
        file.write_bytes(rng.choice([b"", b"{", b"[]", b"null", b"5", b"{}", damage_bytes(rng, file.read_bytes())]))
    use(rng, folder, fixtures, name)


GOES_ON = ("checkpoint", "policy", "measured")  # output folders of runs


def use(rng: random.Random, folder: Path, fixtures: Path, name: str) -> None:
    """Hand a damaged folder to one of the scripts that read such a folder."""
    of = lambda kind: str(folder / kind if kind == name else fixtures / kind)
    data, small = str(ROOT / "sample/instruction.json"), dict(max_length=128, max_steps=1)
    prompts, pairs, scored = f"{SAMPLE}/prompts.jsonl", f"{SAMPLE}/preference.json", str(folder / "out.jsonl")
    judged = [("score_records", dict(by="reward", reward_model=of("reward"), data_path=pairs, output_file=scored, **{"model_name_or_path": of("model")} if rng.random() < 0.5 else {})),
              ("train_ppo", dict(model_name_or_path=of("model"), data_path=prompts, reward_model=of("reward"), **PPO | {"max_steps": 1}))]
    calls = {
        "model": [("merge_lora", dict(model_name_or_path=of("model"), lora_path=of("adapter"))), ("generate", dict(model_name_or_path=of("model"), prompt="你好", max_new_tokens=3)),
                  ("finetune_lora", dict(model_name_or_path=of("model"), data_path=data, **small)), ("inspect_labels", dict(model_name_or_path=of("model"), data_path=data)),
                  ("quantize_gptq", dict(model_name_or_path=of("model"), calibration_path=str(ROOT / "sample/corpus.txt"), bits=4, group_size=32)),
                  ("estimate_memory", dict(model_name_or_path=of("model"))), ("extend_vocab", dict(model_name_or_path=of("model"), corpus_path=str(ROOT / "sample/corpus.txt"), num_pieces=20)),
                  ("apply_delta", dict(base=of("model"), delta=of("delta"))), *judged,
                  ("train_reward", dict(model_name_or_path=of("model"), data_path=pairs, **small)), ("train_dpo", dict(model_name_or_path=of("model"), data_path=pairs, **small)),
                  ("evaluate", dict(model_name_or_path=of("model"), **EVALUATION)), ("export_gguf", dict(model_name_or_path=of("model"), output_file=str(folder / "out.gguf"))),
                  ("score_records", dict(by=rng.choice(["loss", "judge"]), model_name_or_path=of("model"), data_path=pairs, output_file=scored)),
                  ("clean_corpus", dict(model_name_or_path=of("model"), data_path=f"{SAMPLE}/corpus.txt", workers=1))],
        "reward": judged,
        "policy": [("train_ppo", dict(model_name_or_path=of("model"), data_path=prompts, output_dir=of("policy"), resume=True, save_steps=1, **PPO | {"max_steps": 3}))],
        "measured": [("evaluate", dict(model_name_or_path=of("model"), output_dir=of("measured"), **EVALUATION)),
                     ("evaluate", dict(compare=f"{of('measured')},{fixtures / 'measured'}"))],
        "adapter": [("evaluate", dict(model_name_or_path=of("model"), lora_path=of("adapter"), **EVALUATION)),
                    ("score_records", dict(by="loss", model_name_or_path=of("model"), lora_path=of("adapter"), data_path=data, output_file=scored)),
                    ("merge_lora", dict(model_name_or_path=of("model"), lora_path=of("adapter"))),
                    ("generate", dict(model_name_or_path=of("model"), lora_path=of("adapter"), prompt="你好", max_new_tokens=3))],
        "delta": [("apply_delta", dict(base=of("model"), delta=of("delta")))],
        "tuned": [("apply_delta", dict(base=of("model"), target=of("tuned"), delta=str(folder / "out"), make=True)), ("generate", dict(model_name_or_path=of("tuned"), prompt="你好", max_new_tokens=3))],
        "quantized": [("generate", dict(model_name_or_path=of("quantized"), prompt="你好", max_new_tokens=3))],
        "checkpoint": [("finetune_lora", dict(model_name_or_path=of("model"), data_path=data, max_length=128, max_steps=2, learning_rate=1e-2, save_steps=1, resume=True, output_dir=str(folder / "checkpoint")))],
    }
    script, flags = rng.choice(calls[name])
    if script == "apply_delta":
        flags.setdefault("target", str(folder / "out"))
    elif "output_dir" in inspect.signature(importlib.import_module(script).main).parameters:
        flags.setdefault("output_dir", str(folder / "out"))
    before = {path: file_hash(path) for path in (folder / name).rglob("*") if path.is_file()} if name not in GOES_ON else {}
    (folder / "call.json").write_text(json.dumps([script, flags]))
    try:
        importlib.import_module(script).main(**flags)
    finally:
        assert before == {path: file_hash(path) for path in before}, "a file that was only to be read has changed"


def case_flags(rng: random.Random, folder: Path, fixtures: Path) -> None:
    """A command line of a random script: what it needs, and some flags with odd values; nothing is trained for longer than a step."""
    script = rng.choice(sorted(path.stem for path in ROOT.glob("*.py") if path.stem not in ("utils", "webui")))
    main, sample = importlib.import_module(script).main, SAMPLE
    known = {"model_name_or_path": str(fixtures / "model"), "data_path": f"{sample}/instruction.json", "lora_path": str(fixtures / "adapter"), "calibration_path": f"{sample}/corpus.txt",
             "corpus_path": f"{sample}/corpus.txt", "base": str(fixtures / "model"), "target": str(folder / "out"), "delta": str(fixtures / "delta"), "output_dir": str(folder / "out"), "bits": "4",
             "group_size": "32", "num_pieces": "20", "max_length": "128", "prompt": "你好", "max_new_tokens": "3", "output_file": str(folder / "out.jsonl")}
    parameters = inspect.signature(main).parameters
    flags = {name: value for name, value in known.items() if name in parameters and not (name == "output_file" and script == "generate") and not (
        name == "lora_path" and script not in ("merge_lora", "generate")) and not (name == "bits" and script != "quantize_gptq")}
    if "training_arguments" in parameters:
        flags["max_steps"] = "1"
    pairs, by = f"{sample}/preference.json", rng.choice(["rules", "length", "reward", "loss", "ifd", "judge"])
    needs = {"reward": {"reward_model": str(fixtures / "reward")}, "rules": {"rules": RULES}, "length": {}}.get(by, {"model_name_or_path": str(fixtures / "model")})
    flags |= {"train_reward": {"data_path": pairs}, "train_dpo": {"data_path": pairs}, "train_ppo": PPO | {"data_path": f"{sample}/prompts.jsonl", "max_steps": "1"},
              "evaluate": EVALUATION, "export_gguf": {"output_file": str(folder / "out.gguf")},
              "clean_corpus": {"data_path": f"{sample}/web/pages.txt", "eval_data": f"{sample}/web/questions.csv", "good_text": f"{sample}/corpus.txt", "word_list": f"{sample}/web/words.tsv",
                               "document_separator": "blank_line", "workers": "1"}}.get(script, {})
    if script == "score_records":
        flags = {"data_path": rng.choice([pairs, f"{sample}/instruction.json"]), "by": by, "output_file": str(folder / "out.jsonl")} | needs
    if script == "clean_corpus" and rng.random() < 0.8:
        del flags["model_name_or_path"]
    flags = {name: str(value) for name, value in flags.items()}
    more = ["adam_beta1", "adam_epsilon", "weight_decay", "max_grad_norm", "optim", "lr_scheduler_type", "save_steps", "logging_steps", "eval_strategy", "save_strategy", "report_to", "neftune_noise_alpha",
            "dataloader_num_workers", "data_seed", "bf16", "deepspeed", "fsdp"] if "training_arguments" in parameters else []
    for name in rng.sample(sorted(set(parameters) - {"training_arguments"}) + more, rng.randint(1, 3)):
        if name not in ("trust_remote_code", "num_train_epochs", "max_steps", "max_kl", "port"):
            flags[name] = rng.choice(NUMBERS if rng.random() < 0.6 else WORDS)
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    (folder / "call.json").write_text(json.dumps([script, words]))
    before, argv, here = {path: file_hash(path) for path in fixtures.rglob("*") if path.is_file()}, sys.argv, os.getcwd()
    sys.argv, place = [f"{script}.py", *words], folder / "here"
    place.mkdir()
    os.chdir(place)
    try:
        cli(main)
    finally:
        sys.argv = argv
        os.chdir(here)
        assert before == {path: file_hash(path) for path in before}, "a file that was only to be read has changed"


def case_kills(rng: random.Random, folder: Path, fixtures: Path) -> None:
    """Kill a command up to three times, let it end, and compare with one that was never killed."""
    sample, model = ROOT / "sample", fixtures / "model"
    common = ["--model_name_or_path", model, "--data_path", sample / "instruction.json", "--max_length", "128", "--gradient_accumulation_steps", "1"]
    script, flags, result, resumes = rng.choice([
        ("finetune_lora.py", [*common, "--max_steps", "9", "--save_steps", "2"], "adapter_model.safetensors", True),
        ("finetune.py", [*common, "--num_train_epochs", "2", "--save_steps", "3", "--eval_size", "2", "--early_stopping_patience", "2"], "model.safetensors", True),
        ("merge_lora.py", ["--model_name_or_path", model, "--lora_path", fixtures / "adapter"], "model.safetensors", False),
        ("quantize_gptq.py", ["--model_name_or_path", model, "--calibration_path", sample / "corpus.txt", "--bits", "4", "--group_size", "32"], "model.safetensors", False),
        ("extend_vocab.py", ["--model_name_or_path", model, "--corpus_path", sample / "corpus.txt", "--num_pieces", "20"], "model.safetensors", False),
        ("train_dpo.py", ["--data_path", sample / "preference.json", *common[:2], *common[4:], "--max_steps", "9", "--save_steps", "2"], "adapter_model.safetensors", True),
        ("train_reward.py", ["--data_path", sample / "preference.json", *common[:2], *common[4:], "--max_steps", "9", "--save_steps", "2"], "adapter_model.safetensors", True),
        ("train_ppo.py", [*common[:2], "--data_path", sample / "prompts.jsonl", *(word for name, value in (PPO | {"rollout_batch_size": 9, "save_steps": 1}).items() for word in (f"--{name}", value))],
         "adapter_model.safetensors", True),
        ("clean_corpus.py", ["--data_path", sample / "web/pages.txt", "--document_separator", "blank_line", "--good_text", sample / "corpus.txt"], "kept.jsonl", True),
        ("evaluate.py", ["--model_name_or_path", model, *(word for name, value in EVALUATION.items() for word in (f"--{name}", value)), "--limit", "9", "--num_answers", "9"], "samples.jsonl", False),
    ])
    soon, late = (0.5, 4) if script == "clean_corpus.py" else (3, 14)
    def run(out, kill_after=None, *more):
        process = subprocess.Popen([sys.executable, str(ROOT / script), *map(str, [*flags, "--output_dir", out, *more])], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
        try:
            _, said = process.communicate(timeout=kill_after)
            return process.returncode, said.decode()
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return None, ""
    whole = fixtures / "whole" / f"{script}.out"
    if not whole.is_dir():
        code, said = run(whole)
        assert code == 0, said
    for _ in range(rng.randint(1, 3)):
        begun = resumes and (folder / "out" / "run.json").is_file()
        code, said = run(folder / "out", rng.uniform(soon, late), *["--resume", "True"] * begun)
        if code is not None:
            break
    if code is None:
        begun = resumes and (folder / "out" / "run.json").is_file()
        code, said = run(folder / "out", None, *["--resume", "True"] * begun)
    assert code == 0 or re.search("holds another run|the run in .* is finished", said) and (folder / "out" / result).is_file(), said
    assert file_hash(folder / "out" / result) == file_hash(whole / result), "the weights differ from those of a run that was never killed"


# ---- running ----
def attempt(area: str, seed: int, number: int, folder: Path, fixtures: Path) -> tuple[str, str]:
    """("survived" or "refused" or "failed", what was wrong) of one case."""
    def alarm(*_):
        raise TimeoutError(f"no end in {SECONDS} s")
    signal.signal(signal.SIGALRM, alarm)
    signal.alarm(SECONDS if area != "kills" else 600)
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            globals()[f"case_{area}"](random.Random(f"{seed}/{area}/{number}"), folder, fixtures)
        return "survived", ""
    except (BadInput, RunStopped) as problem:
        return ("refused", "") if str(problem).strip() and "\n" not in str(problem).strip() else ("failed", f"not one line: {problem}")
    except SystemExit as ended:
        return ("refused" if ended.code else "survived", "") if ended.code in (0, None, 2, 3) or "error: " in said.getvalue() else ("failed", said.getvalue())
    except BaseException:
        return "failed", traceback.format_exc()
    finally:
        signal.alarm(0)


def main(*, minutes: float = 30, areas: str = "records,readers,sets,headers,side_files,flags,kills", seed: int = 0, output_dir: str = "output/fuzz", replay: str | None = None):
    """Try cases of each area in turn for some minutes, and print the counts; cases that failed are kept in output_dir.

    Args:
        minutes: How long.
        areas: Which, with commas.
        seed: Of all cases; 0 takes the time.
        output_dir: Where what failed is kept.
        replay: Folder of a case that failed, to run it again and see its traceback.
    """
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    home = Path(tempfile.mkdtemp(prefix="fuzz-"))
    os.environ["YANGTUO_CACHE"] = str(home / "cache")
    fixtures = home / "fixtures"
    with contextlib.redirect_stdout(sys.stderr):
        make_fixtures(fixtures)
    from safetensors import safe_open

    (fixtures / "model.names.json").write_text(json.dumps(list(safe_open(fixtures / "model" / "model.safetensors", "pt").keys())))
    if replay:
        area, seed, number = Path(replay).name.rsplit("-", 2)
        (case := home / "case").mkdir()
        return print(*attempt(area, int(seed), int(number), case, fixtures), sep="\n")
    seed, counts, begin = seed or int(time.time()), {area: Counter() for area in areas.split(",")}, time.time()
    print(f"seed {seed}", file=sys.stderr)
    spent = dict.fromkeys(counts, 0.0)
    while time.time() - begin < minutes * 60:
        area = min(spent, key=spent.get)  # each area has the same time
        case, start, number = home / "case", time.time(), sum(counts[area].values())
        shutil.rmtree(case, ignore_errors=True)
        case.mkdir()
        outcome, problem = attempt(area, seed, number, case, fixtures)
        counts[area][outcome] += 1
        spent[area] += time.time() - start
        if problem:
            kept = Path(output_dir, f"{area}-{seed}-{number}")
            shutil.rmtree(kept, ignore_errors=True)
            shutil.copytree(case, kept, symlinks=True)
            (kept / "problem.txt").write_text(problem, "utf-8", "replace")
            print(f"{kept}: {problem.strip().splitlines()[-1][:200]}", file=sys.stderr)
    print(f"seed {seed}, {minutes} minutes\n\n| area | tried | ended well | refused in one line | failed |\n|---|---|---|---|---|")
    for area, count in counts.items():
        print(f"| {area} | {sum(count.values())} | {count['survived']} | {count['refused']} | {count['failed']} |")
    shutil.rmtree(home)
    sys.exit(any(count["failed"] for count in counts.values()))


if __name__ == "__main__":
    cli(main)
