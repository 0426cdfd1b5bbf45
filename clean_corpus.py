"""Clean a corpus: normalize, drop by rules, de-duplicate, score, look for words and for test questions, and say what was dropped and why.

Reads   documents or instruction records in every format of sample/README.md: a file, or a folder of them
Writes  output_dir/: kept.jsonl (the records), dropped.jsonl (the others, with the reason), report.md, report.json, histograms.svg.
        Next: extend_vocab.py, pretrain_clm.py or a finetune script, with kept.jsonl

    bash scripts/clean_corpus.sh                                                            # sample/
    python clean_corpus.py --data_path new/ --against old/ --eval_data eval/ --good_text F  # more

Judged one by one, by all cores: rules, words, test questions. Then together: of texts that are equal, or alike by the Jaccard index of
their five-unit shingles (a unit is a Han character, a run of letters and digits, or a sign of arithmetic), the longest stays. Candidates
come from MinHash (14 bands of 8 rows), and each is compared as a whole with texts that stay: there are no chains.
`measure`, `verdict` and `signature` need nothing but a record or a text, so other engines can map them (tests/test_clean_corpus.py).

Files are read a block at a time, a JSON array or a CSV record as a whole; besides the blocks under way some 90 bytes a record are in memory.
"""
import contextlib
import ctypes
import difflib
import functools
import hashlib
import ipaddress
import itertools
import json
import math
import multiprocessing
import os
import platform
import re
import resource
import shutil
import signal
import sys
import time
import unicodedata
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np

from utils import (BadInput, RunStopped, check_file, check_model, check_output_dir, clean_text, cli, document_files, document_turns, file_hash,
                   read_json, read_lines, read_rows, replace_json, row_turns, show, write_facts)

STEPS = ("normalize", "rules", "exact", "near", "score", "words", "contamination", "private")
# What drops a text, in this order: {least_ or most_ and a measure: (default, where it comes from)}. --limits changes some, null switches one off
RULES = {
    "least_characters": (20, "below the shortest poem; ChineseWebText has 200 for web pages"),
    "least_record_characters": (4, "an instruction with its answer; data-juicer has 10"),
    "most_mojibake": (0.1, "share of UTF-8 read as GBK; 1 for any text that the training scripts refuse"),
    "most_garbage": (0.01, "share of U+FFFD, control and private characters, rows of boxes"),
    "most_rare_han": (0.2, "share of the Han characters that neither GB2312 nor Big5 has (with Hong Kong's): bad OCR"),
    "least_alphanumeric": (0.1, "share of letters and digits; data-juicer, Chinese fine-tuning data"),
    "least_han": (0.3, "share of Han among the letters of prose, for --language zh; ChineseWebText"),
    "least_latin": (0.5, "share of Latin among the letters of prose, for --language en"),
    "least_line_characters": (3, "mean line of prose; ChineseWebText has 10 for web pages, which no poem of five characters a line passes"),
    "least_ended_lines": (0.106, "share of lines with a final mark, in 8 lines of prose or more with a mean below 4 (menus); FineWeb-2, Chinese"),
    "most_repeated_lines": (0.287, "share of the lines of prose that stood before, of 8 lines or more; FineWeb-2, Chinese"),
    "most_repeated_13grams": (0.5, "share of 13 characters in a row that stood before; ChineseWebText"),
    "least_word_letters": (3, "mean word of English prose; Gopher, arXiv:2112.11446"),
    "most_word_letters": (10, "mean word of English prose; Gopher"),
}
OTHER_LIMITS = {
    "jaccard": (0.7, "of two texts that are near duplicates; FineWeb's bands, every candidate verified"),
    "same_but_numbers": (0, "1: texts that differ in their numbers and signs alone are duplicates too"),
    "contamination": (0.5, "share of a question's 13 units in a row that a text holds; any one would drop quoted statutes and poems"),
    "high": (0.3, "best share of the scored texts, of their language and length; Ziya2"),
    "medium": (0.6, "and the share down to which the next bucket reaches; Ziya2"),
}
DEFAULTS = {name: value for name, (value, _) in (RULES | OTHER_LIMITS).items()}
MEASURES = list(dict.fromkeys(name.partition("_")[2] for name in RULES))
REASONS = ["", "broken", "words", "contamination", *(f"rule:{name}" for name in RULES), "exact", "near"]
BANDS, ROWS, SHINGLE, GRAM = 14, 8, 5, 13  # FineWeb's bands; units of a shingle; units of a question that count as found
BLOCK, SLICE, LONGEST = 2**21, 2**17, 2**24  # bytes of a part; characters judged at a time, in a core's cache; bytes of a line beyond which it is no document
FEW = 5000  # texts that are compared sooner than processes begin
TEXTS = ("text", "completion", "content", "context", "instruction", "input", "output", "target", "prompt", "system", "history", "conversations", "messages")
ADDED = ("quality", "bucket", "flagged")  # columns that kept records get
UNSEEN = "\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u00ad\u200b\u2060\ufeff"  # controls, soft hyphen, zero width; not the joiners of emoji and Indic scripts
ODD = re.compile(f"[{UNSEEN}\r\ud800-\udfff]")  # none above U+FFFF: then it takes half the time
BOILERPLATE = re.compile(  # every alternative begins with a letter of its own: so a search takes no longer than reading
    "版权所有|未经(?:授权|许可|允许).*转载|关注.{0,8}公众号|扫码|扫一扫|上一篇[:：]|下一篇[:：]|ICP备|点击(?:查看|阅读|下载|进入|这里)|责任编辑[:：]|"
    "All rights reserved|all rights reserved|Click here|click here|Subscribe to our")
DTYPE = np.dtype([("source", "u4"), ("record", "u8"), ("begin", "u8"), ("length", "u4"), ("read", "u4"), ("bytes", "u4"), ("size", "u4"), ("units", "u4"),
                  ("reason", "u1"), ("group", "u1"), ("quality", "f4"), ("share", "f4"), ("tie", "u8"), ("key", "u8", 2), ("bands", "u8", BANDS),
                  ("measures", "f4", len(MEASURES))])  # what is known of a record by itself; `read` and `bytes` of its text, as read and as it would be kept


def main(
    *,
    # model and data
    model_name_or_path: str | None = None,
    data_path: str,
    document_separator: Literal["line", "blank_line"] = "line",
    against: str | None = None,
    eval_data: str | None = None,
    output_dir: str = "output/clean_corpus",
    # what is done
    steps: str = "normalize,rules,exact,near,score,words,contamination",
    language: Literal["auto", "zh", "en"] = "auto",
    limits: str | None = None,
    good_text: str | None = None,
    word_list: str | None = None,
    # how
    workers: int = 0,
    seed: int = 42,
    resume: bool = False,
):
    """Clean and de-duplicate a corpus.

    Args:
        model_name_or_path: Folder or hub name of the base model.
        data_path: What is cleaned: .txt, JSON, JSONL, CSV or Parquet, a file or a folder; see sample/README.md.
        document_separator: What parts the documents of a .txt file: line (one a line) or blank_line.
        against: Older data, a file or a folder: what it holds already is dropped; with commas between several.
        eval_data: Test questions, a file or a folder: texts that hold one are dropped.
        output_dir: Folder for checkpoints and the result.
        steps: Some of normalize, rules, exact, near, score, words, contamination, private (tags for telephone numbers and the like), with commas.
        language: Of the corpus: zh or en drops prose in other scripts, auto takes any.
        limits: JSON file of thresholds to change, as {"least_characters": 200}; report.md lists all.
        good_text: Text like which the corpus should be, a file or a folder: its pairs of characters score the others.
        word_list: Lines of category, tab, word, and perhaps tab and what to do: flag, drop_line, drop, or allow (spares what it covers).
        workers: Processes that judge texts; 0: one for each core.
        seed: Of everything random.
        resume: Go on from the last checkpoint in output_dir.
    """
    flags, started = dict(locals()), time.perf_counter()
    sources, older, chosen, thresholds = check_cleaning(flags)
    show(flags)

    # ---- load ----
    output, files = Path(output_dir), {name: flags[name] for name in ("data_path", "against", "eval_data", "good_text", "word_list")}
    facts = {name: value for name, value in flags.items() if name not in ("output_dir", "workers", "resume", *files)}
    facts |= {name: [[path, os.path.getsize(path), os.stat(path).st_mtime_ns] for path in list_files(paths, name)] for name, paths in files.items()}
    facts |= {"limits": thresholds, "code": file_hash(__file__)}
    check_facts(output_dir, facts, resume)
    write_facts(output_dir, facts)
    parts = output / "parts"
    job = SimpleNamespace(parts=parts, cleaned=len(sources), steps=chosen, language=language, limits=thresholds, seed=seed)
    job.words = read_word_list(word_list) if "words" in chosen and word_list else None
    job.questions = read_questions(eval_data) if "contamination" in chosen and eval_data else None
    job.good = count_pairs(good_text, document_separator) if "score" in chosen and good_text else None
    by_model = "score" in chosen and model_name_or_path
    for step, flag, given in (("words", "word_list", job.words), ("contamination", "eval_data", job.questions),
                              ("score", "good_text or --model_name_or_path", job.good or by_model)):
        if step in chosen and not given:
            print(f"step {step}: nothing to do without --{flag}", file=sys.stderr)
            chosen.remove(step)

    # ---- clean ----
    parts.mkdir(exist_ok=True)
    try:
        judge_files(job, sources + older, document_separator, workers)
        table = load_parts(parts)
        ours = table["source"] < len(sources)
        if np.all(table["reason"][ours] == REASONS.index("broken")):
            raise BadInput(f"--data_path={data_path}: none of its {ours.sum():,} records can be read" + first_problem(parts))
    except BadInput:
        shutil.rmtree(parts)  # a file must be mended, so this run cannot go on
        raise
    twins = deduplicate(table, chosen, thresholds, len(sources), workers)
    if by_model:
        score_by_model(model_name_or_path, table, parts, len(sources))
    buckets = bucket_of(table, thresholds, len(sources)) if job.good or by_model else None

    # ---- save ----
    found = write_records(output, table, twins, buckets, sources + older, len(sources))
    kept = found.pop("", {"records": 0, "bytes": 0})
    histograms, what_if = survey(table, twins, thresholds, len(sources))
    versions = {"python": platform.python_version(), "numpy": np.__version__, "unicode": unicodedata.unidata_version}
    report = {"read": int(ours.sum()), "kept": kept["records"], "dropped": int(ours.sum()) - kept["records"], "bytes_read": int(table["read"][ours].sum()),
              "bytes_kept": kept["bytes"], "reasons": found, "steps": chosen, "limits": thresholds, "what_if": what_if, "histograms": histograms, "seed": seed,
              "versions": versions}
    report["bytes_taken_out"] = report["bytes_read"] - sum(count["bytes"] for count in found.values()) - kept["bytes"]
    if job.questions:
        report["contamination"] = met_questions(parts, job.questions)
    write_cleaning_report(output, report)
    shutil.rmtree(parts)
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) * 1024
    print(json.dumps({name: report[name] for name in ("read", "kept", "dropped", "bytes_read", "bytes_kept")} | {
        "reasons": {reason: count["records"] for reason, count in report["reasons"].items()}, "seconds": round(time.perf_counter() - started, 1),
        "peak_memory_bytes": peak, "output_dir": output_dir}, ensure_ascii=False))


# ---- flags ----
def check_cleaning(flags: dict) -> tuple[list[str], list[str], list[str], dict]:
    """(files to clean, older files, steps, limits), or BadInput."""
    chosen = [step.strip() for step in flags["steps"].split(",") if step.strip()]
    for step in set(chosen) - {*STEPS}:
        near = "".join(f": did you mean {name}?" for name in difflib.get_close_matches(step, STEPS, n=1))
        raise BadInput(f"--steps: {step!r} is none of {', '.join(STEPS)}{near}")
    if flags["workers"] < 0:
        raise BadInput(f"--workers={flags['workers']} must be zero (all cores) or more")
    limits = dict(DEFAULTS)
    if flags["limits"]:
        check_file("limits", flags["limits"])
        for name, value in read_json(flags["limits"]).items():
            near = "".join(f": did you mean {other}?" for other in difflib.get_close_matches(name, limits, n=1))
            if name not in limits:
                raise BadInput(f"--limits={flags['limits']}: {name!r} is no limit{near or ', they are ' + ', '.join(limits)}")
            if not (value is None and name in RULES or isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)):
                raise BadInput(f"--limits={flags['limits']}: {name} is {value!r}, a number belongs there" + ", or null for none" * (name in RULES))
            limits[name] = value
    if not 0 < limits["jaccard"] <= 1 or not 0 <= limits["high"] <= limits["medium"] <= 1:
        raise BadInput(f"--limits={flags['limits']}: jaccard must be above 0 and at most 1, and high at most medium, both from 0 to 1")
    check_file("word_list", flags["word_list"])
    files = {name: list_files(flags[name], name) for name in ("data_path", "against", "eval_data", "good_text")}
    if both := {*map(os.path.realpath, files["data_path"])} & {*map(os.path.realpath, files["against"])}:
        raise BadInput(f"--against={flags['against']} holds {min(both)}, which --data_path has too: every record of it would be a duplicate of itself")
    if flags["model_name_or_path"]:
        check_model(flags["model_name_or_path"])
    output = Path(flags["output_dir"]).resolve()
    for name in ("data_path", "against", "eval_data", "good_text"):
        for folder in (Path(part).resolve() for part in (flags[name] or "").split(",") if os.path.isdir(part)):
            if output == folder or folder in output.parents:
                raise BadInput(f"--output_dir={flags['output_dir']} is inside --{name}={folder}: a second run would read what the first wrote; give another")
    check_output_dir(flags["output_dir"], flags["resume"])
    needed = 2.5 * sum(map(os.path.getsize, files["data_path"] + files["against"]))  # judged records, and what is kept and dropped of them
    free = shutil.disk_usage(next(folder for folder in (output, *output.parents) if folder.exists())).free
    if free < needed:
        raise BadInput(f"--output_dir={flags['output_dir']} has {free / 1e9:.1f} GB free, cleaning needs {needed / 1e9:.1f}: free some space, or give another")
    return files["data_path"], files["against"], chosen, limits


def list_files(paths: str | None, flag: str) -> list[str]:
    """The files of a flag, which may have several paths with commas between them; BadInput where one holds no records."""
    files = []
    for path in filter(None, (paths or "").split(",")):
        if not os.path.isdir(path):
            check_file(flag, path)
        files += document_files(path)
    for file in files:
        if not file.endswith((".txt", ".json", ".jsonl", ".csv", ".parquet")) and flag != "word_list":
            raise BadInput(f"--{flag}={file} ends in none of .txt, .json, .jsonl, .csv, .parquet, which say how it is read: rename or unpack it")
    return files


def check_facts(output_dir: str, facts: dict, resume: bool) -> None:
    """BadInput if a run that is to go on was begun with something else."""
    file = Path(output_dir, "run.json")
    begun = read_json(file) if resume and file.is_file() else facts
    for name in sorted(begun.keys() | facts.keys()):
        if begun.get(name) != json.loads(json.dumps(facts.get(name))) and begun is not facts:
            raise BadInput(f"--resume: {output_dir} was begun with another {name}: give the same, or a new --output_dir")
    if resume and Path(output_dir, "report.json").is_file():
        raise BadInput(f"--resume: the run in {output_dir} is finished: its report.md says what came out")


# ---- reading ----
def cut_pieces(path: str, document_separator: str):
    """Yield (bytes of a line, or of a paragraph; what is wrong with it or None), in bounded memory whatever the file holds."""
    paragraph, size, problem = [], 0, None
    long = f"it is longer than {LONGEST >> 20} MiB: part it into documents"
    by_line = document_separator == "line" or not path.endswith(".txt")
    with open(path, "rb", 2**20) as file:
        file.seek(3 * (file.read(3) == b"\xef\xbb\xbf"))  # a byte order mark
        while line := file.readline(LONGEST + 1):
            whole = len(line) <= LONGEST
            while not whole and line[-1:] != b"\n" and (more := file.readline(LONGEST)):
                line = line[:1000] + more[-1:]  # its beginning will do to find it
            if by_line:
                if line.strip():
                    yield line, None if whole else long
            elif line.strip():
                size += len(line)
                problem = problem or (None if whole and size <= LONGEST else long)
                if not problem or not paragraph:
                    paragraph.append(line)
            elif paragraph:
                yield b"".join(paragraph), problem
                paragraph, size, problem = [], 0, None
    if paragraph:
        yield b"".join(paragraph), problem


def read_blocks(path: str, document_separator: str):
    """Yield (number of the first record, list of records) of about BLOCK bytes: (bytes, problem) to be read yet, or rows of CSV, Parquet and JSON arrays."""
    with open(path, "rb") as file:
        array = path.endswith((".json", ".jsonl")) and file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["
    by_row = array or path.endswith((".csv", ".parquet"))
    size = lambda item: len(item[0]) if not by_row else len(str(item))
    block, number, held = [], 0, 0
    for item in read_rows(path, Counter()) if by_row else cut_pieces(path, document_separator):
        block.append(item)
        held += size(item)
        if held >= BLOCK:
            yield number, block
            block, number, held = [], number + len(block), 0
    if block:
        yield number, block


def parse(item, text_file: bool) -> dict:
    """A row of one line or paragraph, whatever its schema; BadInput says why there is none."""
    if not isinstance(item, tuple):
        return item
    data, problem = item
    if problem:
        raise BadInput(problem)
    try:
        text = data.decode("utf-8")
        return {"text": text.rstrip("\r\n")} if text_file else json.loads(text)
    except UnicodeDecodeError as error:
        gbk = "\ufffd" not in data.decode("gb18030", "replace")
        raise BadInput(f"its byte {error.start} is not UTF-8" + (", it looks like GBK: mend it with iconv -f GB18030 -t UTF-8" if gbk else "")) from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"not whole JSON ({getattr(error, 'msg', str(error)[:60])})") from None


def turns_of(row: dict) -> tuple[list[str], bool]:
    """(texts of a record in their order, is it a document); BadInput where training would refuse it."""
    if not isinstance(row, dict):
        raise BadInput(f"a {type(row).__name__} where an object {{...}} belongs")
    holds = lambda *names: not row.keys().isdisjoint(names)
    if holds("chosen", "response_chosen"):
        raise BadInput("a preference: two answers to one question would be taken for duplicates; clean the questions, not the pairs")
    document = any(row.get(name) is not None for name in ("text", "completion", "content")) and not holds("messages", "conversations", "instruction")
    document = document and not str(row.get("text", "")).lstrip().startswith("<s>")  # that is Llama2-Chinese
    turns = document_turns(row, Counter()) if document else row_turns(row, Counter())
    texts = [text for _, *texts in turns for text in texts]
    if not all(isinstance(text, str) for text in texts):
        role, text = next((role, text) for role, *texts in turns for text in texts if not isinstance(text, str))
        raise BadInput(f"the {role} text is a {type(text).__name__}, a string belongs there: {str(text)[:60]}")
    if not document and not any(role == "assistant" and texts[0].strip() for role, *texts in turns):
        raise BadInput("it has no answer to train on")
    return [*filter(None, texts)], document


def map_texts(value, function, key: str | None = None):
    """A record with `function` applied to its texts; other columns stay as they are."""
    if isinstance(value, dict):
        return {name: map_texts(part, function, key or name) for name, part in value.items()}
    if isinstance(value, list):
        return [map_texts(part, function, key) for part in value]
    return function(value) if isinstance(value, str) and key in TEXTS else value


# ---- what is changed ----
def normalize(text: str) -> str:
    """Line ends as \\n, no characters that nobody sees. NFKC is for comparing alone: it would rewrite full-width signs."""
    return re.sub(f"[{UNSEEN}]", "", re.sub("\r\n?", "\n", text)) if ODD.search(text) else text


def drop_boilerplate(text: str) -> str:
    """A document without its short lines that only a web page needs."""
    if not BOILERPLATE.search(text):
        return text
    return "\n".join(line for line in text.split("\n") if len(line) >= 40 or not BOILERPLATE.search(line))


def mask_private(text: str) -> str:
    """Tags for telephone and identity numbers, e-mail, QQ and WeChat accounts, bank cards, public IP addresses."""
    def identity(match) -> str:  # GB 11643: a date of birth, and a check digit
        number, month, day = match[0].upper(), int(match[0][10:12]), int(match[0][12:14])
        check = "10X98765432"[sum(int(digit) * 2 ** (17 - i) for i, digit in enumerate(number[:17])) % 11]
        return "<identity>" if 1 <= month <= 12 and 1 <= day <= 31 and number[6:8] in ("19", "20") and number[17] == check else match[0]

    def card(match) -> str:  # Luhn
        digits = [int(digit) for digit in reversed(match[0]) if digit.isdigit()]
        return "<card>" if 16 <= len(digits) <= 19 and not sum(digits[0::2] + [sum(divmod(2 * digit, 10)) for digit in digits[1::2]]) % 10 else match[0]

    def address(match) -> str:
        with contextlib.suppress(ValueError):
            return "<ip>" if ipaddress.ip_address(match[0]).is_global else match[0]
        return match[0]

    text = re.sub(r"[\w.+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.)+[A-Za-z]{2,}", "<email>", text, flags=re.ASCII)
    text = re.sub(r"(?<![\w.-])\d{17}[\dXx](?![\w-])", identity, text, flags=re.ASCII)
    text = re.sub(r"(?<![\w.-])(?:62|4|5)\d{3}(?:[ -]?\d{4}){2,3}[ -]?\d{1,4}(?![\w-])", card, text, flags=re.ASCII)
    text = re.sub(r"(?<![\w.+-])(?:\+?86[ -]?)?1[3-9]\d(?:\d{8}|-\d{4}-\d{4}| \d{4} \d{4})(?![\w-]|\.\d|[元年万亿])", "<phone>", text, flags=re.ASCII)
    text = re.sub(r"(?i)((?:QQ|企鹅)(?:群|号|群号)?\s*[:：]?\s*)[1-9]\d{4,10}(?!\d)", r"\1<account>", text)
    text = re.sub(r"((?:微信|(?i:wechat))号?\s*[:：]\s*)[A-Za-z][\w-]{5,19}", r"\1<account>", text, flags=re.ASCII)
    return re.sub(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w]|\.\d)", address, text, flags=re.ASCII)


# ---- characters as numbers ----
KINDS = HAN, RARE, LEAD, TRAIL, ACCENTED, LATIN, LETTER, DIGIT, SPACE, GARBAGE, BOX, SIGN, SEPARATOR, END, MARK = range(15)  # classes of characters


@functools.cache
def tables() -> SimpleNamespace:
    """By code point: `key`, what it is compared as (NFKC, lower case; 0: not at all); `unit` (1: a unit by itself, 2: part of a run), with its
    `value` in a run and its hash `alone`; `kind`, its class. Columns of all characters, since one after the other would take three times as long."""
    size, told = 0x110000, 0x32400  # nothing but private use and tags stands above
    code, chars = np.arange(told), [*map(chr, range(told))]
    major, minor = np.frombuffer("".join(map(unicodedata.category, chars)).encode(), np.uint8).reshape(told, 2).T
    of = lambda first, second="": np.isin(major, [*first.encode()]) & (np.isin(minor, [*second.encode()]) if second else True)
    unified = of("L", "o") & ((code >= 0x3400) & (code < 0xA000) | (code >= 0x20000) & (code < 0x2F800) | (code >= 0x30000))
    ideograph = unified | (code >= 0xF900) & (code < 0xFB00) | (code >= 0x2F800) & (code < 0x2FA1E)
    key, unit, kind = np.arange(size, dtype=np.uint32), np.zeros(size, np.uint8), np.full(size, MARK, np.uint8)
    for at in np.flatnonzero(~(unified | of("C"))).tolist():
        same = unicodedata.normalize("NFKC", chars[at]).lower()
        if len(same) == 1:
            key[at] = ord(same)
    key[:told][of("Z") | of("C", "cf")] = 0
    alone = ideograph | of("L", "o") & (code >= 0x0E00) & (code < 0x3400)  # Thai to kana: written without blanks
    unit[:told] = np.where(alone | of("S", "m"), 1, 2 * of("LNM"))
    unit[[*map(ord, "+-*/=<>%^&|~")]] = 1
    for first, second, what in (("LM", "", LETTER), ("N", "", DIGIT), ("Z", "", SPACE), ("C", "", GARBAGE), ("C", "f", SPACE)):
        kind[:told][of(first, second)] = what
    kind[[*map(ord, "\t\n")]] = SPACE
    kind[:told][ideograph] = RARE
    han = np.flatnonzero(ideograph[:0xFB00])
    begin, end, third, _ = np.frombuffer(b"".join(chars[at].encode("gb18030").ljust(4, b"\0") for at in han), np.uint8).reshape(-1, 4).T
    two, (first, other) = third == 0, ((byte >= 0xE3) & (byte < 0xEA) | (byte == 0xEF) for byte in (begin, end))  # begins of a Han character in UTF-8
    known = two & (begin > 0xAF) & (end > 0xA0)
    known[two & ~known] = [chars[at].encode("big5hkscs", "ignore") != b"" for at in han[two & ~known]]
    kind[han] = np.select([first & (end >= 0x80) & (end < 0xC0), other & (begin >= 0x80) & (begin < 0xC0), known], [LEAD, TRAIL, HAN], RARE)
    for at in np.flatnonzero(of("L") & ~alone).tolist():
        if "LATIN" in unicodedata.name(chars[at], ""):
            kind[at] = ACCENTED if 0xC0 <= at < 0x100 else LATIN
    signs, ends = "{}[]()<>=;_+*/\\|&^%$#@~`", "。！？；…」』”’.!?;:：）》】\"'"
    for letters, what in ((signs, SIGN), (",\t", SEPARATOR), (ends, END), ("□■◆◇", BOX), ("\ufffd", GARBAGE)):
        kind[[*map(ord, letters)]] = what
    kind[0xD800:0xF900] = kind[0xF0000:] = GARBAGE
    key[[*map(ord, "\t\n")]] = 0
    value = np.zeros((2, size), np.uint64)
    value[0, :told] = mix(key[:told].astype(np.uint64)) * (unit[:told] > 0)
    value[1, :told] = mix(value[0, :told])
    return SimpleNamespace(key=key, unit=unit, kind=kind, value=value[0], alone=value[1])


def mix(values):
    """Spread 64-bit numbers: every bit depends on every other (splitmix64's finish)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@functools.lru_cache(maxsize=2)
def powers(count: int) -> tuple:
    """(x^0, x^1, ...; and of 1 / x) modulo 2^64, for polynomial hashes of any part of a sequence."""
    base = 0x9E3779B97F4A7C15  # odd, so it has an inverse
    one = np.ones(1, np.uint64)
    return tuple(np.concatenate([one, np.cumprod(np.full(count, value, np.uint64))]) for value in (base, pow(base, -1, 2**64)))


def span_hashes(values, begin, end):
    """Hashes of values[begin:end], for arrays of begins and ends; equal parts have equal hashes wherever they stand."""
    power, inverse = powers(1 << (len(values) | 2**16).bit_length())
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(values * power[: len(values)], dtype=np.uint64)])
    return mix((sums[end] - sums[begin]) * inverse[begin])


def grams_of(values, owner, size: int):
    """(hash, text) of every `size` values in a row of one text."""
    begin = np.flatnonzero(owner[: len(owner) - size + 1] == owner[size - 1:]) if len(owner) >= size else np.zeros(0, np.int64)
    return span_hashes(values, begin, begin + size), owner[begin]


def spell(texts: list[str]) -> SimpleNamespace:
    """Texts as arrays: `codes` (N,) of all, a line end behind each, and their text `owner`, each text from `bounds`[i] to `bounds`[i + 1]; of the
    characters that count `place` (K,), `key` (K,) and `key_owner` (K,)."""
    codes = np.frombuffer(("\n".join(texts) + "\n").encode("utf-32-le", "surrogatepass"), np.uint32)
    lengths = np.fromiter((len(text) + 1 for text in texts), np.int64, len(texts))
    owner, keys = np.repeat(np.arange(len(texts), dtype=np.uint32), lengths), tables().key.take(codes)
    place = np.flatnonzero(keys > 0)
    return SimpleNamespace(count=len(texts), codes=codes, owner=owner, bounds=np.concatenate([[0], np.cumsum(lengths)]), place=place, key=keys.take(place),
                           key_owner=owner.take(place))


def units_of(spelled):
    """(hash, text) of every unit: a Han character, a run of letters and digits, a sign of arithmetic."""
    look = tables()
    unit = look.unit.take(spelled.codes)
    first = unit > 0
    first[1:] &= (unit[1:] == 1) | (unit[:-1] != 2)
    begin, letters = np.flatnonzero(first), np.flatnonzero(unit == 2)
    hashes, begin_run = look.alone.take(spelled.codes.take(begin)), np.flatnonzero(first.take(letters))
    if len(letters):
        runs = np.flatnonzero(unit.take(begin) == 2)
        hashes[runs] = span_hashes(look.value.take(spelled.codes.take(letters)), begin_run, np.append(begin_run[1:], len(letters)))
    return hashes, spelled.owner.take(begin)


# ---- rules ----
def measure(record: dict, language: str = "auto") -> dict[str, float]:
    """The measures of one record, by name; nan where one does not apply. A pure function, as verdict is: engines map them."""
    texts, document = turns_of(record)
    return dict(zip(MEASURES, measure_texts([text := "\n".join(texts)], spell([text]), np.array([document]), language)[0].tolist()))


def verdict(measures: dict[str, float], limits: dict | None = None) -> str | None:
    """The first rule that a record breaks, as rule:NAME, or None; `limits` changes some of RULES."""
    broken = first_broken(np.array([[measures[name] for name in MEASURES]], np.float32), DEFAULTS | (limits or {}))[0]
    return REASONS[broken] or None


def first_broken(measures, limits: dict):
    """(n,) of the (n, len(MEASURES)) measures: the number in REASONS of the first rule that each text breaks, 0: none."""
    broken = np.zeros(len(measures), np.uint8)
    for name in reversed(RULES):
        broken[breaks(measures, name, limits[name])] = REASONS.index(f"rule:{name}")
    return broken


def breaks(measures, name: str, limit: float | None):
    """(n,) whether each text breaks a rule at this limit."""
    value = measures[:, MEASURES.index(name.partition("_")[2])]
    return np.zeros(len(value), bool) if limit is None else value < np.float32(limit) if name.startswith("least") else value > np.float32(limit)


def measure_texts(texts: list[str], spelled, document, language: str = "auto"):
    """(n, len(MEASURES)) float32; `document` (n,) tells documents from instruction records, whose lines are not judged."""
    n, look, owner = spelled.count, tables(), spelled.owner
    kinds = look.kind[spelled.codes]
    counts = np.bincount(owner.astype(np.int64) * len(KINDS) + kinds, minlength=len(KINDS) * n).reshape(n, -1)  # of each class in each text
    spaces = counts[:, SPACE] + (counts[:, SEPARATOR] - np.bincount(owner[spelled.codes == ord(",")], minlength=n))
    total = np.maximum(1, counts.sum(1) - spaces)
    han, latin = counts[:, [HAN, RARE, LEAD, TRAIL]].sum(1), counts[:, [LATIN, ACCENTED]].sum(1)
    letters, digits = han + latin + counts[:, LETTER], counts[:, DIGIT]
    # Lines that hold something: their characters, whether a final mark ends them, whether they stood before
    ends = np.flatnonzero(spelled.codes == ord("\n"))
    bounds = np.searchsorted(spelled.place, np.concatenate([[0], ends]))  # of the lines, among the characters that count
    begin, end, of_text = bounds[:-1], bounds[1:], owner[ends]
    begin, end, of_text = (part[bounds[1:] > bounds[:-1]] for part in (begin, end, of_text))
    lines, first = np.bincount(of_text, minlength=n), spelled.codes[spelled.place[begin]]
    listed = np.bincount(of_text, np.isin(first, [*map(ord, "-*+•·")]) | (look.kind[first] == DIGIT), minlength=n)
    # Code, tables, lists: what is usual of prose says nothing of them
    prose = document & (counts[:, SIGN] < 0.08 * total) & (counts[:, SEPARATOR] + digits < 0.35 * total) & (listed < 0.5 * np.maximum(1, lines))
    boxes = kinds == BOX  # one stands for a character that is lost in an old text, rows of them for a font that lacked them
    garbage = counts[:, GARBAGE] + np.bincount(owner[2:][boxes[2:] & boxes[1:-1] & boxes[:-2]], minlength=n)
    ended = np.bincount(of_text, kinds[spelled.place[end - 1]] == END, minlength=n)
    key = spelled.key.astype(np.uint64)
    repeated = repeats(span_hashes(mix(key), begin, end), of_text, n)
    grams, gram_owner = grams_of(key, spelled.key_owner, 13)
    words = np.bincount(owner[1:][(kinds[1:] == LATIN) & (kinds[:-1] != LATIN)], minlength=n) + (n > 0 and kinds[0] == LATIN) * (np.arange(n) == 0)
    mean_line, english, gram_count = total / np.maximum(1, lines), prose & (latin > 0.7 * total) & (words >= 50), np.bincount(gram_owner, minlength=n)
    found = {"characters": (total, document), "record_characters": (total, ~document), "garbage": (garbage / total, True),
             "mojibake": (mojibake(texts, kinds, owner, han), True), "rare_han": (counts[:, RARE] / np.maximum(1, han), han >= 10),
             "alphanumeric": ((letters + digits) / total, True), "line_characters": (mean_line, prose),
             "han": (han / np.maximum(1, letters), (language == "zh") & prose), "latin": (latin / np.maximum(1, letters), (language == "en") & prose),
             "ended_lines": (ended / np.maximum(1, lines), prose & (lines >= 8) & (mean_line < 4)),
             "repeated_lines": (repeated / np.maximum(1, lines), prose & (lines >= 8)),
             "repeated_13grams": (repeats(grams, gram_owner, n) / np.maximum(1, gram_count), gram_count >= 40),
             "word_letters": (latin / np.maximum(1, words), english)}
    return np.stack([np.where(found[name][1], found[name][0], np.nan) for name in MEASURES], axis=1).astype(np.float32)


def repeats(values, owner, count: int):
    """(count,) how many of a text's values stood before in it."""
    packed = np.sort(owner.astype(np.uint64) << np.uint64(40) | values >> np.uint64(24))  # a text's values beside one another; 2^24 texts at most
    return np.bincount((packed[1:][packed[1:] == packed[:-1]] >> np.uint64(40)).astype(np.int64), minlength=count)


def mojibake(texts: list[str], kinds, owner, han):
    """(n,) the share of a text's Han characters that are UTF-8 read as GBK, by the pattern of the bytes; 1 where clean_text refuses the text.

    That is the check in utils.py, which every training script makes. It is asked only where it might refuse: it takes longer than all the rest.
    """
    maybe = owner[:-1][(kinds[:-1] == LEAD) & (kinds[1:] == TRAIL)]
    share = np.minimum(1, 3 * np.bincount(maybe, minlength=len(texts)) / np.maximum(10, han))
    for i in {*maybe.tolist(), *owner[kinds == ACCENTED].tolist(), *(i for i, text in enumerate(texts) if "锟斤拷" in text)}:
        try:
            clean_text(texts[i], "", False, Counter())
        except BadInput:
            share[i] = 1
    return share


# ---- near duplicates ----
def signature(texts: list[str], seed: int = 42):
    """MinHash of texts: uint32 (n, BANDS * ROWS). Two texts agree in the share of places that is the Jaccard index of their shingles.

    A text of fewer than SHINGLE units has no shingle, and 2^32 - 1 everywhere: it can be an exact duplicate alone.
    """
    return minhash(*units_of(spell(texts)), len(texts), seed)


@functools.lru_cache(maxsize=2)
def randomness(seed: int) -> tuple:
    """(three odd numbers; in each column i, an order of all places, in which place i looks for another where it has none itself) of a seed."""
    places = BANDS * ROWS
    random = mix(np.arange(3 + places * places, dtype=np.uint64) + np.uint64(seed) * np.uint64(2**32))
    return (random[:3] >> np.uint64(32)).astype(np.uint32) | np.uint32(1), np.argsort(random[3:].reshape(places, places), axis=0)


def minhash(units, owner, count: int, seed: int):
    """The signatures of `count` texts, from their units (hash, text), by one hash of each shingle in place of one for each place.

    One permutation hashing (arXiv:1208.1259): the hash says at which of the places a shingle competes, and the least at each stays. A place
    where none competes takes over from another, the first in an order of its own that has one (optimal densification, arXiv:1703.04664).
    """
    places, none = BANDS * ROWS, np.uint32(2**32 - 1)
    (base, factor, term), orders = randomness(seed)
    values = (units >> np.uint64(32)).astype(np.uint32)
    if len(values) < SHINGLE:
        return np.full((count, places), none)
    shingles = values[SHINGLE - 1:].copy()
    for i in range(2, SHINGLE + 1):
        shingles *= base
        shingles += values[SHINGLE - i : 1 - i]
    shingles ^= shingles >> np.uint32(16)
    shingles *= factor
    shingles ^= shingles >> np.uint32(15)
    shingles += term
    # Shingles that reach into the next text go to a row behind the last
    sizes = np.diff(np.searchsorted(owner, np.arange(count + 1)))
    whole = np.maximum(0, sizes - SHINGLE + 1)
    rows = np.repeat(np.stack([np.arange(count), np.full(count, count)], axis=1).ravel() * places, np.stack([whole, sizes - whole], axis=1).ravel())
    least = np.full((count + 1) * places, none)
    np.minimum.at(least, rows[: len(shingles)] + ((shingles >> np.uint32(16)) * np.uint32(places) >> np.uint32(16)), shingles)
    least = least[:-places]
    empty, result = np.flatnonzero((least == none) & np.repeat(whole > 0, places)), least.copy()
    for others in orders:
        row, place = np.divmod(empty, places)
        found = least.take(row * places + others.take(place))
        result[empty] = found
        if not len(empty := empty[found == none]):
            break
    return result.reshape(count, places)


def band_keys(signatures):
    """uint64 (n, BANDS): what two texts must share in one band to be compared."""
    rows = signatures.reshape(len(signatures), BANDS, ROWS).astype(np.uint64)
    keys = np.zeros(rows.shape[:2], np.uint64)
    for row in range(ROWS):
        keys = mix(keys + rows[:, :, row] + np.uint64(row + 1))
    return keys


# ---- quality ----
def count_pairs(good_text: str, document_separator: str):
    """Counts of the pairs of characters in good text, hashed to 2^20 places, and of the characters before them."""
    pairs, singles = np.zeros(2**20, np.float32), np.zeros(2**16, np.float32)
    for path in list_files(good_text, "good_text"):
        for _, block in read_blocks(path, document_separator):
            texts = []
            for item in block:
                with contextlib.suppress(BadInput):
                    texts.append("\n".join(turns_of(parse(item, path.endswith(".txt")))[0]))
            if texts:
                pair, single, _ = pairs_of(spell(texts))
                pairs += np.bincount(pair, minlength=2**20)
                singles += np.bincount(single, minlength=2**16)
    if not singles.sum():
        raise BadInput(f"--good_text={good_text} holds no text that can be read")
    return pairs, singles


def pairs_of(spelled):
    """(pair of characters hashed to 2^20 places, the first of them to 2^16, text)."""
    key, owner = spelled.key.astype(np.uint64), spelled.key_owner
    same = np.flatnonzero(owner[1:] == owner[:-1])
    single = (key[:-1] * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(48))[same].astype(np.int64)
    pair = (mix(key[:-1] << np.uint64(32) | key[1:]) >> np.uint64(44))[same].astype(np.int64)
    return pair, single, owner[same]


def quality_of(spelled, good):
    """(n,) the mean log2 of a character's probability behind the one before it, as counted in good text."""
    pair, single, owner = pairs_of(spelled)
    logs = np.log2((good[0][pair] + 0.01) / (good[1][single] + 0.01 * 2**13))  # as if each of 8,192 characters had been seen 0.01 times
    return np.bincount(owner, logs, minlength=spelled.count) / np.maximum(1, np.bincount(owner, minlength=spelled.count))


# ---- words ----
def read_word_list(path: str) -> dict:
    """{two characters: [(word, category, action)]} of a user's list, as texts are compared: NFKC, lower case, no blanks."""
    words = {}
    for number, line in enumerate(read_lines(path, Counter()), 1):
        category, word, action, *rest = [*map(str.strip, line.split("\t")), "", ""] if "\t" in line else ["", "", ""]
        if not line.strip() or line.startswith("#"):
            continue
        if not word or (action or "flag") not in ("flag", "drop_line", "drop", "allow") or any(rest[:-2]):
            raise BadInput(f"{path}, line {number}: {line.strip()[:40]!r} is not category, tab, word, and perhaps tab and flag, drop_line, drop or allow")
        key = "".join(map(chr, spell([word]).key))
        if key:
            words.setdefault(key[:2], []).append((key, category, action or "flag"))
    if not words:
        raise BadInput(f"--word_list={path} holds no word")
    return words


def find_words(spelled, words: dict) -> dict[int, list[tuple[str, str, str, int]]]:
    """{text: [(word, category, action, its place in spelled.codes)]}; Latin words at their borders alone, and none inside of an allowed one."""
    pairs = spelled.key[:-1].astype(np.uint64) << np.uint64(32) | spelled.key[1:]
    wanted = np.array([ord(start[0]) << 32 | ord(start[1]) for start in words if len(start) == 2], np.uint64)
    single = np.array([ord(start) for start in words if len(start) == 1], np.uint32)
    maybe = np.zeros(2**20, bool)  # few pairs begin a word, and a look in this table tells most of the others
    maybe[(mix(wanted) >> np.uint64(44)).astype(np.int64)] = True
    places = np.flatnonzero(maybe[(mix(pairs) >> np.uint64(44)).astype(np.int64)])
    places = np.union1d(places[np.isin(pairs[places], wanted)], np.flatnonzero(np.isin(spelled.key, single)))
    text = spelled.key.astype("<u4").tobytes().decode("utf-32-le", "surrogatepass") if len(places) else ""
    letter = lambda place: 0 <= place < len(spelled.codes) and tables().kind[spelled.codes[place]] in (LATIN, DIGIT)
    hits, allowed = {}, set()
    for at in places.tolist():
        for word, category, action in itertools.chain.from_iterable(words.get(start, []) for start in {text[at : at + 2], text[at]}):
            last = at + len(word) - 1
            if not text.startswith(word, at) or spelled.key_owner[at] != spelled.key_owner[last]:
                continue
            first_place, last_place = int(spelled.place[at]), int(spelled.place[last])
            if word.isascii() and (letter(first_place - 1) or letter(last_place + 1)):
                continue
            if action == "allow":
                allowed.update(range(at, last + 1))
            else:
                hits.setdefault(int(spelled.key_owner[at]), []).append((word, category, action, first_place, at))
    hits = {owner: [hit[:4] for hit in found if not allowed.issuperset(range(hit[4], hit[4] + len(hit[0])))] for owner, found in hits.items()}
    return {owner: found for owner, found in hits.items() if found}


# ---- test questions ----
def read_questions(path: str) -> SimpleNamespace:
    """An index of evaluation sets: GRAM units in a row of each question; of a short one, all its units with those of its options.

    `names` and `units` (grams) of the questions; `index` {size: (maybe, gram, question)}, with the grams sorted; `short`, how many are
    below 8 units even with their options, which any text might hold by chance.
    """
    names, texts, unread = [], [], []
    for file in list_files(path, "eval_data"):
        try:
            for number, row in enumerate(read_rows(file, Counter(), "line")):
                if alternatives := question_texts(row):
                    names.append(f"{Path(file).name}:{number}")
                    texts.append(alternatives)
        except BadInput as problem:
            unread.append(str(problem))
    for problem in unread:
        print(f"--eval_data: {problem}; its other questions are not looked for", file=sys.stderr)
    if not names:
        raise BadInput(f"--eval_data={path} holds no question that can be read")
    units = lambda strings: np.split((found := units_of(spell(strings)))[0], np.searchsorted(found[1], np.arange(1, len(strings))))
    stems, wholes = units([alternatives[0] for alternatives in texts]), units([alternatives[1] for alternatives in texts])
    lettered = units([alternatives[2] for alternatives in texts])
    found, sizes, short = {}, np.zeros(len(names), np.int64), 0
    for question, (stem, whole, letters) in enumerate(zip(stems, wholes, lettered)):
        short += len(whole) < 8
        for sequence in [stem] if len(stem) >= GRAM else [whole, letters] if len(whole) >= 8 else []:
            size = min(GRAM, len(sequence))
            grams = np.unique(grams_of(sequence, np.zeros(len(sequence), np.uint32), size)[0])
            sizes[question] = len(grams) if sequence is not letters else min(sizes[question], len(grams))
            found.setdefault(size, []).append((grams, np.full(len(grams), question)))
    index = {}
    for size, entries in found.items():
        grams, owners = (np.concatenate(part) for part in zip(*entries))
        order, maybe = np.argsort(grams, kind="stable"), np.zeros(2**22, bool)
        maybe[(grams >> np.uint64(42)).astype(np.int64)] = True
        index[size] = maybe, grams[order], owners[order]
    return SimpleNamespace(names=names, sizes=sizes, index=index, short=short, unread=unread)


def question_texts(row) -> tuple[str, str, str] | None:
    """(question, question and options, the same with letters before the options) of a row of any evaluation set; None where it holds none."""
    row = {str(key).lower(): value for key, value in row.items()} if isinstance(row, dict) else {}
    asked = next((row[key] for key in ("question", "ctx", "premise", "prompt", "query", "instruction", "problem", "text") if row.get(key)), None)
    options = next((row[key] for key in ("choices", "options", "endings") if row.get(key)), None)
    stem, options = (asked.get("stem"), asked.get("choices")) if isinstance(asked, dict) else (asked, options)
    if isinstance(options, dict):  # {"text": [...], "label": [...]}
        options = options.get("text") or list(options.values())
    options = [str(option.get("text", "") if isinstance(option, dict) else option) for option in options] if isinstance(options, list) else []
    options = options or [str(row[key]) for key in ("a", "b", "c", "d", "choice1", "choice2") if row.get(key)]
    if not isinstance(stem, str) or not stem.strip():
        return None
    return stem, "\n".join([stem, *options]), "\n".join([stem, *(f"{letter} {option}" for letter, option in zip("ABCDEFGHIJ", options))])


def find_questions(units, owner, questions) -> dict[int, dict[int, float]]:
    """{text: {question: share of its grams that the text holds}}, of the questions of which a text holds any."""
    held = Counter()
    for size, (maybe, grams, of_question) in questions.index.items():
        hashes, texts = grams_of(units, owner, size)
        likely = np.flatnonzero(maybe[(hashes >> np.uint64(42)).astype(np.int64)])
        hashes, texts = hashes[likely], texts[likely]
        first = np.searchsorted(grams, hashes)
        hit = np.flatnonzero(grams[np.minimum(first, len(grams) - 1)] == hashes)
        for text, gram in set(zip(texts[hit].tolist(), hashes[hit].tolist())):
            gram = np.uint64(gram)
            held.update((text, int(question)) for question in set(of_question[np.searchsorted(grams, gram) : np.searchsorted(grams, gram, "right")].tolist()))
    shares = {}
    for (text, question), count in held.items():
        shares.setdefault(text, {})[question] = min(1.0, count / int(questions.sizes[question]))
    return shares


# ---- one block after the other: what is known of a record by itself ----
def judge(job: SimpleNamespace, task: tuple) -> int:
    """Judge a block of records, and write what was found into the folder job.parts; returns the bytes of its texts.

    NUMBER.jsonl has a line for each record, of three fields with tabs between them (JSON holds none): the record as it would be kept, as it
    was read if that differs, and what else is known of it. NUMBER.npy has its row of DTYPE, NUMBER.json the test questions that were met.
    """
    number, source, path, first, block = task
    table, new, old, about, texts, document = np.zeros(len(block), DTYPE), [], [], [], [], []
    table["source"], table["record"], table["quality"] = source, np.arange(first, first + len(block)), np.nan
    for i, item in enumerate(block):
        row = item
        try:
            row = parse(item, path.endswith(".txt"))
            row, original, strings, is_document = clean(row, job.steps)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as problem:  # one record, whatever is in it, does not end the run
            table["reason"][i] = REASONS.index("broken")
            shown = item[0][:LONGEST].decode("utf-8", "backslashreplace") if isinstance(item, tuple) else str(item)
            readable = isinstance(row, dict) and not isinstance(problem, RecursionError)
            row, original, strings, is_document = row if readable else {"text": shown}, None, [shown], True
            about.append({"problem": str(problem)})
        else:
            about.append({})
        new.append(row)
        old.append(original)
        document.append(is_document)
        texts.append("\n".join(strings))
    fine = np.flatnonzero(table["reason"] == 0)
    met = {}
    sizes = np.cumsum([len(texts[i]) for i in fine])
    for chosen in filter(len, np.split(fine, np.searchsorted(sizes, np.arange(SLICE, sizes[-1], SLICE))) if len(fine) else []):
        judge_texts(job, table, chosen, new, old, about, texts, np.array(document, bool), met)
    size = lambda text: len(text.encode("utf-8", "surrogatepass"))
    table["bytes"] = table["read"] = [*map(size, texts)]
    records, lines, by_line = [], [], isinstance(block[0], tuple) and not path.endswith(".txt")
    for i, broken in enumerate((table["reason"] == REASONS.index("broken")).tolist()):
        record = block[i][0].strip() if by_line and not broken and old[i] is None else b"\t"
        if b"\t" in record or b"\r" in record or b"\\u" in record:  # what is no field, or no line, or hides the name of a column
            record = dump(new[i])
        records.append(record)
        lines.append(b"%b\t%b\t%b\n" % (record, dump(old[i]) if old[i] is not None else b"", dump(about[i]) if about[i] else b""))
        if old[i] is not None:
            table["read"][i] = size("\n".join(turns_of(old[i])[0]))
    table["begin"], table["length"] = np.cumsum([0, *map(len, lines[:-1])]), [*map(len, records)]
    table["tie"] = np.frombuffer(b"".join(hashlib.sha1(record).digest()[:8] for record in records), np.uint64)
    with finished_file(job.parts / f"{number:06}.jsonl") as file:
        file.write(b"".join(lines))
    if source >= job.cleaned:  # older records are not cleaned, only compared with
        table["reason"][fine] = 0
    if met and source < job.cleaned:
        replace_json(job.parts / f"{number:06}.json", met)
    with finished_file(job.parts / f"{number:06}.npy") as file:
        np.save(file, table)
    return int(table["read"].sum())


def clean(row: dict, steps: list[str]) -> tuple[dict, dict | None, list[str], bool]:
    """(the record as it is judged, as it was if that differs, its texts, is it a document); BadInput where no training script takes it."""
    texts, document = turns_of(row)
    text = "\n".join(texts)
    odd = ODD.search(text) or "\U000f1000" in text or "\U000f1001" in text
    if half := re.search("[\ud800-\udfff\U000f1000\U000f1001]", text) if odd else None:
        raise BadInput(f"it holds half a character, or U+F1000 or U+F1001, behind {half.string[max(0, half.start() - 10) : half.start()]!r}")
    changes = [normalize] * ("normalize" in steps and bool(odd)) + [mask_private] * ("private" in steps)
    changes += [drop_boilerplate] * (document and "rules" in steps and bool(BOILERPLATE.search(text)))
    added = {name for name, step in zip(ADDED, ("score", "score", "words")) if step in steps} & row.keys()  # by an earlier run
    if not changes and not added:
        return row, None, texts, document
    new = {name: value for name, value in row.items() if name not in added}
    for function in changes:
        new = map_texts(new, function)
    return new, row if new != row else None, turns_of(new)[0], document


def judge_texts(job: SimpleNamespace, table, chosen, new: list, old: list, about: list, texts: list[str], document, met: dict) -> None:
    """Fill the rows `chosen` of the table, and note the test questions in `met`, {number: [greatest share, the text that has it]}."""
    strings, document = [texts[i] for i in chosen], document[chosen]
    spelled = spell(strings)
    reason = np.zeros(len(chosen), np.uint8)
    if job.words:
        hits, again = find_words(spelled, job.words), False
        for j, found in hits.items():
            i, actions = int(chosen[j]), {action for _, _, action, _ in found}
            name = next((name for name in ("text", "completion", "content") if new[i].get(name) == strings[j]), None)
            if "drop" in actions or "drop_line" in actions and not name:  # lines can be taken out of a text alone, not out of an answer
                reason[j] = REASONS.index("words")
            elif "drop_line" in actions:
                places = {strings[j].count("\n", 0, place - int(spelled.bounds[j])) for _, _, action, place in found if action == "drop_line"}
                kept = [line for k, line in enumerate(strings[j].split("\n")) if k not in places]
                texts[i] = strings[j] = "\n".join(kept)
                old[i], new[i], again = old[i] or new[i], new[i] | {name: texts[i]}, True
                reason[j] = 0 if strings[j].strip() else REASONS.index("words")
            about[i]["words"] = [[category, word, action] for word, category, action, _ in found]
        spelled = spell(strings) if again else spelled
    table["measures"][chosen] = np.nan
    if "rules" in job.steps:
        table["measures"][chosen] = measures = measure_texts(strings, spelled, document, job.language)
        reason = np.where(reason == 0, first_broken(measures, job.limits), reason)
    bounds = np.searchsorted(spelled.place, spelled.bounds)
    table["size"][chosen] = size = np.diff(bounds)
    if "score" in job.steps:  # language and length, within which texts are ranked
        han = np.bincount(spelled.key_owner, spelled.key - 0x4E00 < 0x5200, minlength=len(chosen))
        table["group"][chosen] = 3 * (han > 0.3 * size) + (size > 200) + (size > 2000)
    if "exact" in job.steps:
        data = spelled.key.tobytes()
        digests = b"".join(hashlib.blake2b(data[begin:end], digest_size=16).digest() for begin, end in itertools.pairwise((bounds * 4).tolist()))
        table["key"][chosen] = np.frombuffer(digests, np.uint64).reshape(-1, 2)
    if job.good:
        table["quality"][chosen] = quality_of(spelled, job.good)
    if job.questions or "near" in job.steps:
        units, owner = units_of(spelled)
        table["units"][chosen] = np.diff(np.searchsorted(owner, np.arange(len(chosen) + 1)))
    if "near" in job.steps:
        table["bands"][chosen] = band_keys(minhash(units, owner, len(chosen), job.seed))
    for j, shares in (find_questions(units, owner, job.questions) if job.questions else {}).items():
        question, table["share"][chosen[j]] = max(shares.items(), key=lambda item: (item[1], -item[0]))
        about[chosen[j]]["question"] = [job.questions.names[question], round(shares[question], 3)]
        if reason[j] == 0 and shares[question] >= job.limits["contamination"]:
            reason[j] = REASONS.index("contamination")
        for question, share in shares.items():
            met[question] = max(met.get(question, [0, ""]), [round(share, 3), strings[j][:200]])
    table["reason"][chosen] = reason


def dump(row) -> bytes:
    """A row as JSON in UTF-8; half a character in one of its other columns stays escaped."""
    try:
        return json.dumps(row, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        return json.dumps(row, default=str).encode()


@contextlib.contextmanager
def finished_file(path: Path):
    """A file to write to, that is there whole or not at all."""
    unfinished = path.with_name(f".{path.name}.new")
    with open(unfinished, "wb", 2**20) as file:
        yield file
    unfinished.replace(path)


# ---- all cores ----
def in_processes(function, tasks, workers: int):
    """Yield function(task) for every task, in order, from `workers` processes; few tasks are under way at a time."""
    workers = workers or len(os.sched_getaffinity(0))
    if workers == 1:
        yield from map(function, tasks)
        return
    waiting = deque()
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _begin_process, (function,)) as pool:
        try:
            for task in tasks:
                waiting.append(pool.submit(_run, task))
                while len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise RunStopped("a process was killed, for want of memory perhaps: go on with --resume True, and fewer --workers") from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _begin_process(function) -> None:
    global _function
    _function = function  # by fork: what it holds is not sent with every task
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process stops the others
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # and they end with it if it is killed (Linux)


def _run(task):
    return _function(task)


def judge_files(job: SimpleNamespace, files: list[str], document_separator: str, workers: int) -> None:
    """Judge every block of every file whose part is not there yet."""
    from tqdm import tqdm

    def tasks():
        number = 0
        for source, path in enumerate(files):
            for first, block in read_blocks(path, document_separator):
                if not (part := job.parts / f"{number:06}.npy").is_file():
                    yield number, source, path, first, block
                else:
                    bar.update(int(np.load(part, mmap_mode="r")["read"].sum()))
                number += 1

    tables()  # before the processes begin, which then have them
    with contextlib.suppress(OSError, AttributeError):  # glibc: arrays come and go, and a quarter of the time would go into pages given back and asked for
        for option, size in ((-3, 2**25), (-1, 2**28)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(option, size)
    with tqdm(total=sum(map(os.path.getsize, files)), unit="B", unit_scale=True, desc="judging") as bar:
        for size in in_processes(functools.partial(judge, job), tasks(), workers):
            bar.update(size)


# ---- all records together ----
def load_parts(parts: Path) -> dict:
    """The columns of all parts that fit the memory (some 90 bytes a record), with `part` and the records' paths of all; bands and measures stay on the disk."""
    files = sorted(parts.glob("[0-9]*.npy"))  # scores.npy is no part
    maps = [np.load(file, mmap_mode="r") for file in files]
    table = {name: np.concatenate([part[name] for part in maps] or [np.zeros(0, DTYPE[name])])
             for name in ("source", "record", "begin", "length", "read", "bytes", "reason", "group", "size", "units", "quality", "share", "key", "tie")}
    table["part"] = np.repeat(np.arange(len(maps), dtype=np.uint32), [len(part) for part in maps])
    return table | {"maps": maps, "records_of": [str(file.with_suffix(".jsonl")) for file in files]}


def column(table: dict, name: str, index) -> np.ndarray:
    """One column of bands or measures of all records, from the disk."""
    return np.concatenate([part[name][:, index] for part in table["maps"]])


def deduplicate(table: dict, steps: list[str], limits: dict, cleaned: int, workers: int) -> dict:
    """Give reasons to the duplicates among the records that have none; returns {"twin": of which (n,), -1: of none, "jaccard": to it (n,)}.

    Older records, whose source is not among the `cleaned` first, stay; of the others the longest does, whatever the order: ties are
    broken by the text's hash, then by the record's.
    """
    n, key, older = len(table["reason"]), table["key"], table["source"] >= cleaned
    best_first = np.lexsort((table["tie"], key[:, 1], key[:, 0], -table["size"].astype(np.int64), ~older))
    rank = np.empty(n, np.int64)
    rank[best_first] = np.arange(n)
    twin, jaccard, alive = np.full(n, -1), np.zeros(n, np.float32), table["reason"] == 0
    if "exact" in steps:
        order = np.flatnonzero(alive)
        order = order[np.lexsort((rank[order], key[order, 1], key[order, 0]))]
        again = np.concatenate([[False], (key[order[1:]] == key[order[:-1]]).all(1)]) if len(order) else np.zeros(0, bool)
        stays = order[np.maximum.accumulate(np.where(again, 0, np.arange(len(order))))]
        twin[order[again]] = stays[again]
        table["reason"][order[again]], jaccard[order[again]], alive[order[again]] = REASONS.index("exact"), 1, False
    if "near" in steps:
        for found in near_duplicates(table, np.flatnonzero(alive & (table["units"] >= SHINGLE)), rank, older, limits, workers):
            for member, stays, index in found:
                jaccard[member] = index
                if stays >= 0:
                    table["reason"][member], twin[member] = REASONS.index("near"), stays
    return {"twin": twin, "jaccard": jaccard}


def near_duplicates(table: dict, members, rank, older, limits: dict, workers: int):
    """Yield lists of (record, the one that stays or -1, Jaccard index to the nearest that was compared), of those of `members` that have candidates."""
    from tqdm import tqdm

    edges = [np.zeros((0, 2), np.int64)]
    for band in range(BANDS):
        keys = column(table, "bands", band)[members]
        order = np.argsort(keys, kind="stable")
        same = np.flatnonzero(keys[order[1:]] == keys[order[:-1]])
        edges.append(np.stack([order[same], order[same + 1]], axis=1))
    edges = np.concatenate(edges)
    group = np.arange(len(members))
    while True:  # the least number of all that are linked spreads to each of them
        least = group.copy()
        np.minimum.at(least, edges[:, 0], group[edges[:, 1]])
        np.minimum.at(least, edges[:, 1], group[edges[:, 0]])
        least = least[least]
        if np.array_equal(least, group):
            break
        group = least
    linked = np.unique(edges)
    linked = linked[np.lexsort((rank[members[linked]], group[linked]))]
    clusters = np.split(members[linked], np.flatnonzero(np.diff(group[linked])) + 1) if len(linked) else []
    bands = np.stack([column(table, "bands", band)[members[linked]] for band in range(BANDS)], axis=1)

    def tasks():
        task, size, first = [], 0, 0
        for cluster in clusters:
            where = [place_of(table, i) for i in cluster]
            task.append((cluster.tolist(), where, bands[first : first + len(cluster)], older[cluster].tolist()))
            size, first = size + len(cluster), first + len(cluster)
            if size > 200:
                yield task
                task, size = [], 0
        if task:
            yield task

    workers = workers if len(linked) > FEW else 1
    with tqdm(total=len(linked), unit=" texts", desc="comparing") as bar:
        for found in in_processes(functools.partial(compare_clusters, limits=limits), tasks(), workers):
            bar.update(len(found))
            yield found


def compare_clusters(task, *, limits: dict) -> list[tuple[int, int, float]]:
    """Of clusters of candidates, best first: (record, the first that stays and is alike or -1, Jaccard index to the nearest compared) of each."""
    found, places = [], [place for _, where, _, _ in task for place in where]
    known = dict(zip(places, load_texts(places))) if sum(length for _, _, length in places) < 2**23 else {}  # a cluster may be larger than the memory
    read = functools.lru_cache(maxsize=8)(lambda place: known.get(place) or load_texts([place])[0])
    for members, where, bands, older in task:
        stay = {}  # {(band, key): those that stay}
        for i, member in enumerate(members):
            keys, twin, nearest = list(enumerate(bands[i].tolist())), -1, 0.0
            for j in [] if older[i] else sorted({j for key in keys for j in stay.get(key, ())}):
                (shingles, words, numbers), (others, other_words, other_numbers) = read(where[i]), read(where[j])
                both = np.sort(np.concatenate([shingles, others]), kind="stable")  # which merges what is sorted already
                common = int((both[1:] == both[:-1]).sum())
                index = common / (len(shingles) + len(others) - common)
                # Two sums, two receipts, two editions of a price list: what says the same but for its numbers and signs is no copy
                if not limits["same_but_numbers"] and words == other_words and numbers != other_numbers:
                    continue
                nearest = max(nearest, index)
                if index >= limits["jaccard"]:
                    twin = members[j]
                    break
            else:
                for key in keys:
                    stay.setdefault(key, []).append(i)
            found.append((member, twin, nearest))
    return found


def place_of(table: dict, i: int) -> tuple[str, int, int]:
    """(path, begin, length) of a record as it would be kept."""
    return table["records_of"][table["part"][i]], int(table["begin"][i]), int(table["length"][i])


def texts_at(places: list) -> list[str]:
    """The texts of records of parts; a file is opened once."""
    texts = {}
    for path, those in itertools.groupby(sorted(places), key=lambda place: place[0]):
        with open(path, "rb") as file:
            for place in those:
                file.seek(place[1])
                texts[place] = "\n".join(turns_of(json.loads(file.read(place[2])))[0])
    return [texts[place] for place in places]


def load_texts(places: list) -> list[tuple]:
    """(its different shingles, sorted; its letters; its digits and signs of arithmetic) of each text."""
    spelled, look = spell(texts_at(places)), tables()
    codes = spelled.codes.take(spelled.place)
    number = (look.kind[codes] == DIGIT) | (look.unit[codes] == 1) & (look.kind[codes] != HAN) & (codes < 0x2E80)
    split = lambda values, owner: np.split(values, np.searchsorted(owner, np.arange(1, len(places))))
    texts = [*map(np.sort, split(*grams_of(*units_of(spelled), SHINGLE)))]
    shingles = [text[np.append(True, text[1:] != text[:-1])] if len(text) else text for text in texts]
    letters, numbers = (split(spelled.key[chosen], spelled.key_owner[chosen]) for chosen in (~number & (look.unit[codes] > 0), number))
    return [(different, letter.tobytes(), digit.tobytes()) for different, letter, digit in zip(shingles, letters, numbers)]


def score_by_model(model_name_or_path: str, table: dict, parts: Path, cleaned: int) -> None:
    """Give the records that stay as quality the bits that a model needs for a character of their first 1,000, times -1; goes on where it was."""
    import torch
    from tqdm import tqdm
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, device = load(AutoTokenizer, model_name_or_path), "cuda" if torch.cuda.is_available() else "cpu"
    model = load(AutoModelForCausalLM, model_name_or_path, dtype="auto" if device == "cuda" else torch.float32, output_loading_info=True).to(device).eval()
    begin, rows = [tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id], model.get_input_embeddings().weight.shape[0]
    beyond = {token for token, i in tokenizer.get_vocab().items() if i >= rows} - {*tokenizer.all_special_tokens}
    if begin == [None] or beyond:
        raise BadInput(f"--model_name_or_path={model_name_or_path}: its tokenizer has " + (
            f"{len(tokenizer):,} tokens, its model {rows:,} rows: they do not belong together" if beyond else "neither a bos_token nor an eos_token"))
    scores = np.load(parts / "scores.npy") if (parts / "scores.npy").is_file() else np.full(len(table["reason"]), np.nan, np.float32)
    stay = np.flatnonzero((table["reason"] == 0) & (table["source"] < cleaned))
    for i in tqdm(stay, desc="scoring", unit=" texts"):
        if np.isnan(scores[i]):
            text = texts_at([place_of(table, i)])[0][:1000]
            ids = torch.tensor([begin + tokenizer(text, add_special_tokens=False).input_ids], device=device)
            with torch.inference_mode():
                loss = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1].float(), ids[0, 1:], reduction="sum")
            scores[i] = -float(loss) / math.log(2) / max(1, len(text))
            if i % 100 == 0:
                with finished_file(parts / "scores.npy") as file:
                    np.save(file, scores)
    table["quality"] = scores


def load(auto_class, name: str, may_lack: tuple = (), **arguments):
    """auto_class.from_pretrained(name); BadInput where a file is absent or cut off, or a weight is missing: transformers would take random ones."""
    try:
        loaded = auto_class.from_pretrained(name, **arguments)
    except Exception as problem:  # a cut-off file raises SafetensorError, RuntimeError or OSError, by where it was cut
        raise problem if "out of memory" in str(problem) else BadInput(f"{name} could not be loaded ({auto_class.__name__}): {str(problem)[:300]}") from None
    if arguments.get("output_loading_info"):
        loaded, found = loaded
        if missing := sorted({*found["missing_keys"]} - {*may_lack}) + sorted(str(key) for key in found["mismatched_keys"]):
            raise BadInput(f"{name} lacks {len(missing)} of its weights, {missing[0]} for one: the files do not belong to its config.json")
    return loaded


def bucket_of(table: dict, limits: dict, cleaned: int) -> np.ndarray:
    """(n,) 0 high, 1 medium, 2 low, -1 none: by rank among the texts that stay of one language and length (Ziya2)."""
    bucket, stay = np.full(len(table["reason"]), -1, np.int8), (table["reason"] == 0) & (table["source"] < cleaned) & ~np.isnan(table["quality"])
    for group in np.unique(table["group"][stay]):
        those = np.flatnonzero(stay & (table["group"] == group))
        high, medium = np.quantile(table["quality"][those], [1 - limits["high"], 1 - limits["medium"]])  # equal texts are not parted
        bucket[those] = np.where(table["quality"][those] >= high, 0, np.where(table["quality"][those] >= medium, 1, 2))
    return bucket


# ---- what is written ----
def first_problem(parts: Path) -> str:
    """What is wrong with the first record, to be said where none can be read."""
    for file in sorted(parts.glob("*.jsonl")):
        for line in file.read_bytes().splitlines():
            return ": " + json.loads(line.split(b"\t")[2])["problem"]
    return ""


def write_records(output_dir: Path, table: dict, twins: dict, buckets, sources: list[str], cleaned: int) -> dict:
    """Write kept.jsonl and dropped.jsonl, in the order read; returns {reason: {"records", "bytes", "examples"}} with "" for what is kept.

    The bytes are those of the texts as they were read, of the kept ones as they are kept."""
    name = lambda i: f"{sources[table['source'][i]]}:{table['record'][i]}"
    found, first = {}, 0
    for number, reason in enumerate(REASONS):
        those = (table["source"] < cleaned) & (table["reason"] == number)
        if those.any():
            found[reason] = {"records": int(those.sum()), "bytes": int(table["read" if reason else "bytes"][those].sum()), "examples": []}
    with finished_file(output_dir / "kept.jsonl") as kept, finished_file(output_dir / "dropped.jsonl") as dropped:
        for path, part in zip(table["records_of"], table["maps"]):
            if table["source"][first] >= cleaned:
                break
            with open(path, "rb", 2**20) as lines:
                for i, (line, number) in enumerate(zip(lines, table["reason"][first : first + len(part)].tolist()), first):
                    new, old, known = line.rstrip(b"\n").split(b"\t")
                    about, more, reason = json.loads(known) if known else {}, {}, REASONS[number]
                    if reason:
                        more = {"reason": reason, "read_from": name(i)} | ({"duplicate_of": name(twins["twin"][i])} if twins["twin"][i] >= 0 else {}) | about
                        if len(found[reason]["examples"]) < 3:
                            found[reason]["examples"].append({**more, "record": (old or new).decode()[:300]})
                    else:
                        if buckets is not None and buckets[i] >= 0:
                            more = {"quality": round(float(table["quality"][i]), 4), "bucket": ("high", "medium", "low")[buckets[i]]}
                        if flagged := Counter(category for category, _, action in about.get("words", []) if action == "flag"):
                            more["flagged"] = dict(flagged)
                    (dropped if reason else kept).write(with_columns(old if reason and old else new, more) + b"\n")
            first += len(part)
    return found


def with_columns(record: bytes, more: dict) -> bytes:
    """A record, as JSON, with more columns; those of the same name give way."""
    if not more:
        return record
    row = json.loads(record) if any(f'"{name}"'.encode() in record for name in more) else None
    if row is not None and more.keys() & row.keys():
        return dump({name: value for name, value in row.items() if name not in more} | more)
    return record[:-1] + (b", " if len(record) > 2 else b"") + dump(more)[1:]


def survey(table: dict, twins: dict, limits: dict, cleaned: int) -> tuple[dict, dict]:
    """({measure: {"edges", "counts"}}, {limit: [[value, records it would drop by itself]]}: laxer, as it is, stricter); a part at a time."""
    wide = ("characters", "record_characters", "line_characters", "word_letters")
    histograms = {name: {"edges": np.geomspace(1, 1e6, 41) if name in wide else np.linspace(0, 1, 41), "counts": 0} for name in MEASURES}
    tried = {name: [(limit / 2, 0), (limit, 0), (limit * 2, 0)] for name in RULES if (limit := limits[name])}
    tried = {name: found[::-1] if name.startswith("most") else found for name, found in tried.items()}
    for part in table["maps"]:
        measures = np.array(part["measures"][(part["source"] < cleaned) & (part["reason"] != REASONS.index("broken"))])
        for name, histogram in histograms.items():
            values, edges = measures[:, MEASURES.index(name)], histogram["edges"]
            histogram["counts"] = histogram["counts"] + np.histogram(np.clip(values[~np.isnan(values)], edges[0], edges[-1]), edges)[0]
        tried = {name: [(limit, count + int(breaks(measures, name, limit).sum())) for limit, count in found] for name, found in tried.items()}
    ours = table["source"] < cleaned
    for name, values in (("jaccard", twins["jaccard"][ours & (table["reason"] != REASONS.index("exact"))]), ("contamination", table["share"][ours])):
        values = values[values > 0]
        histograms[name] = {"edges": np.linspace(0, 1, 41), "counts": np.histogram(values, np.linspace(0, 1, 41))[0]}
        tried[name] = [(limit, int((values >= np.float32(limit)).sum())) for limit in (limits[name] + 0.1, limits[name], limits[name] - 0.1)]
    quality = table["quality"][ours & ~np.isnan(table["quality"])]
    if len(quality):
        counts, edges = np.histogram(quality, 40)
        histograms["quality"] = {"edges": edges, "counts": counts}
    histograms = {name: histogram for name, histogram in histograms.items() if np.any(histogram["counts"])}
    histograms = {name: {key: np.round(value, 4).tolist() for key, value in histogram.items()} for name, histogram in histograms.items()}
    return histograms, {name: [[round(limit, 4), count] for limit, count in found] for name, found in tried.items()}


def met_questions(parts: Path, questions) -> dict:
    """How much of the test questions the texts hold: by set, and the questions that were met most."""
    best = {}
    for file in sorted(parts.glob("[0-9]*.json")):
        for question, found in read_json(file).items():
            best[int(question)] = max(best.get(int(question), [0, ""]), found)
    sets = {}
    for question, name in enumerate(questions.names):
        counts = sets.setdefault(name.rpartition(":")[0], {"questions": 0, "any": 0, "half": 0, "most": 0})
        share = best.get(question, [0])[0]
        for count, is_so in (("questions", True), ("any", share > 0), ("half", share >= 0.5), ("most", share >= 0.8)):
            counts[count] += bool(is_so)
    most = sorted(best, key=lambda question: (-best[question][0], question))[:10]
    return {"sets": sets, "too_short": questions.short, "unread": questions.unread,
            "examples": [{"question": questions.names[question], "share": best[question][0], "text": best[question][1]} for question in most]}


def write_cleaning_report(folder: Path, report: dict) -> None:
    """report.md, histograms.svg, and at the last report.json, by which a run is finished."""
    lines = ["# What the cleaning of this corpus did", "", f"{report['read']:,} records read, {report['kept']:,} kept, {report['dropped']:,} dropped; "
             f"{report['bytes_read']:,} bytes of text read, {report['bytes_kept']:,} kept; {report['bytes_taken_out']:,} were taken out of texts that are kept "
             f"(boilerplate, lines with listed words, what nobody sees). Steps: {', '.join(report['steps'])}.",
             "", "| why dropped | records | bytes | share of bytes |", "|---|---|---|---|"]
    share = lambda size: f"{size / max(1, report['bytes_read']):.2%}"
    lines += [f"| {reason} | {found['records']:,} | {found['bytes']:,} | {share(found['bytes'])} |" for reason, found in report["reasons"].items()]
    lines += ["", "## Limits, and what others would drop", "", "Records that a rule by itself would drop. Change limits by `--limits limits.json`, "
              "as `{\"least_characters\": 200, \"most_repeated_lines\": null}`.", "",
              "| limit | laxer | as it is | stricter | what it is |", "|---|---|---|---|---|"]
    for name, (_, about) in (RULES | OTHER_LIMITS).items():
        tried = [f"{limit:g}: {count:,}" for limit, count in report["what_if"].get(name, [])] or ["", f"{report['limits'][name]}", ""]
        lines.append(f"| {name} | {' | '.join(tried)} | {about} |")
    if "contamination" in report:
        found = report["contamination"]
        lines += ["", "## Test questions", "", f"{found['too_short']:,} questions are too short to look for.", *found["unread"],
                  "", "| set | questions | any part found | half or more | four fifths or more |", "|---|---|---|---|---|"]
        lines += [f"| {name} | {' | '.join(f'{count:,}' for count in counts.values())} |" for name, counts in found["sets"].items()]
        lines += [""] + [f"- {example['question']}, {example['share']:.0%} of it: {code(example['text'])}" for example in found["examples"]]
    lines += ["", "## How the texts are spread", "", "![histograms](histograms.svg)", "", "## Examples", ""]
    for reason, found in report["reasons"].items():
        lines += [f"### {reason}", ""]
        for example in found["examples"]:
            more = "".join(f", {key}: {value}" for key, value in example.items() if key not in ("read_from", "reason", "record"))
            lines.append(f"- {example['read_from']}{more}: {code(example['record'])}")
        lines.append("")
    lines += [f"Seed {report['seed']}; " + ", ".join(f"{name} {version}" for name, version in report["versions"].items()) + "; MinHash of "
              f"{BANDS} bands of {ROWS} rows over {SHINGLE} units."]
    (folder / "report.md").write_text("\n".join(lines) + "\n", "utf-8")
    draw_histograms(folder / "histograms.svg", report["histograms"], report["limits"])
    replace_json(folder / "report.json", report)


def code(text: str) -> str:
    """A text as code of Markdown, in one line."""
    return "`` " + " ".join(text.replace("``", "' '").split())[:200] + " ``"


def draw_histograms(path: Path, histograms: dict, limits: dict) -> None:
    """All histograms in one picture, records on a scale of logarithms, the limits in red. As SVG: importing matplotlib takes as long as 10 MB of text."""
    parts, columns, width, height = [], 4, 260, 120
    for number, (name, found) in enumerate(histograms.items()):
        edges, counts = np.array(found["edges"]), np.array(found["counts"], float)
        borders, tops = across(edges, edges, width), np.round(height * (1 - np.log1p(counts) / np.log1p(counts.max())), 1).tolist()
        bars = "".join(f"M{left} {height}V{top}H{right}V{height}" for left, right, top in zip(borders, borders[1:], tops) if top < height)
        drawn = [limits[limit] for limit in (f"least_{name}", f"most_{name}", name) if limits.get(limit) is not None]
        lines = "".join(f"M{across(limit, edges, width)} 0V{height}" for limit in drawn if edges[0] <= limit <= edges[-1])
        texts = [(0, -6, "start", f"up to {counts.max():,.0f} records"), (width, -6, "end", name.replace("_", " ")),
                 (0, height + 14, "start", f"{edges[0]:,.7g}"), (width, height + 14, "end", f"{edges[-1]:,.7g}")]
        labels = "".join(f'<text x="{x}" y="{y}" text-anchor="{anchor}">{text}</text>' for x, y, anchor, text in texts)
        left, top = 20 + number % columns * (width + 40), 30 + number // columns * (height + 50)
        parts.append(f'<g transform="translate({left} {top})"><path d="{bars}" fill="#4477aa"/>'
                     f'<path d="M0 {height}H{width}" stroke="black"/><path d="{lines}" stroke="#cc3311" stroke-width="2"/>{labels}</g>')
    size = columns * (width + 40), 20 + -(-len(histograms) // columns) * (height + 50)
    path.write_text(f'<svg xmlns="http://www.w3.org/2000/svg" width="{size[0]}" height="{size[1]}" font-family="sans-serif" font-size="12">'
                    f'<rect width="100%" height="100%" fill="white"/>{"".join(parts)}</svg>\n', "utf-8")


def across(values, edges, width: int):
    """Where values stand on an axis of this width from the first edge to the last, by their logarithms where it reaches to a million."""
    scale = np.log10 if edges[-1] == 1e6 else np.asarray
    return np.round(width * (scale(values) - scale(edges[0])) / (scale(edges[-1]) - scale(edges[0]) or 1), 1).tolist()


if __name__ == "__main__":
    cli(main)
