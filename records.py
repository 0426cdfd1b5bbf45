"""Data formats: what each record of a file becomes, {"messages": [{"role", "content"}, ...]}, and what is refused.

A document for pretraining becomes messages as well: its context, which is not trained, stands as the user's.
"""
import csv
import json
import os
import re
import sys
from collections import Counter
from pathlib import Path

from utils import BadInput

ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
         "yayi": "assistant", "bot": "assistant", "function_call": "assistant",
         "function": "tool", "observation": "tool", "tool": "tool"}
# UTF-8 read as Latin-1 or cp1252: the three bytes of a Chinese character become a letter of ä-é and two odd signs.
LATIN_MOJIBAKE = re.compile("(?:[ä-é][\u0080-\u00bfŒœŠšŸŽžƒˆ˜–-›€™]{2}){2}")


def read_records(path: str, *, skip_bad_records: bool = False, unescape_newlines: bool = False, notes: Counter | None = None):
    """Yield {"messages": [{"role", "content"}, ...]} for every record of a JSON, JSONL, CSV or Parquet file.

    The schema is told from the keys of each record (sample/README.md shows them all). The user turn of an alpaca record
    with an `input` holds "instruction\\ninput", and the input once more as "input", for templates that set it apart.

    Args:
        skip_bad_records: Drop bad records and print how many, why, and the first three; else BadInput names the first.
        unescape_newlines: Turn a literal backslash and n into a line break.
        notes: Counts here what was odd but can be trained on (joined turns, empty answers, unknown columns, ...).
    """
    for _, record in numbered_records(path, skip_bad_records, unescape_newlines, notes):
        yield record


def numbered_records(path, skip_bad_records=False, unescape_newlines=False, notes=None, document_separator=None):
    """As read_records, yielding (number of the record in the file, from 0; record).

    Args:
        document_separator: Read documents for pretraining: line or blank_line is what parts them in a .txt file.
    """
    notes = Counter() if notes is None else notes
    bad: list[str] = []
    number = -1
    turns_of = document_turns if document_separator else row_turns
    rows = read_texts(path, document_separator, notes) if document_separator and path.endswith(".txt") else read_rows(path, notes)
    for number, row in enumerate(rows):
        try:
            messages = clean_messages(turns_of(row, notes), unescape_newlines, notes)
            while messages and messages[-1]["role"] != "assistant":
                notes[f"trailing {messages[-1]['role']} turn (dropped)"] += 1
                messages.pop()
            if not messages:
                raise BadInput("it has no answer to train on")
            yield number, {"messages": messages}
        except BadInput as problem:
            problem = f"{path}, record {number}: {problem}"
            if not skip_bad_records:
                raise BadInput(f"{problem}. See sample/README.md, or drop bad records with --skip_bad_records True") from None
            bad.append(problem)
            notes["bad record (dropped)"] += 1
    if number < 0:
        raise BadInput(f"{path} is empty: it should hold records, see sample/README.md")
    if bad:
        print(f"dropped {len(bad)} bad records of {number + 1}:", *bad[:3], sep="\n  ", file=sys.stderr)


def read_rows(path: str, notes: Counter):
    """Yield the rows of a file as dictionaries, before anything is known of their schema."""
    if not os.path.isfile(path):
        raise BadInput(f"{path} does not exist" if not os.path.exists(path) else f"{path} is a folder, a file is wanted")
    if path.endswith(".parquet"):
        import pyarrow.parquet

        try:
            for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
                yield from batch.to_pylist()
        except (pyarrow.ArrowInvalid, OSError) as problem:
            raise BadInput(f"{path} is not whole Parquet: {str(problem).splitlines()[0]}") from None
        return
    if path.endswith(".csv"):
        csv.field_size_limit(2**31 - 1)
        try:
            yield from csv.DictReader(read_lines(path, notes), strict=True)
        except csv.Error as problem:
            raise BadInput(f"{path} is not whole CSV ({problem}): is it cut off, or a quotation mark not doubled?") from None
        return
    lines = enumerate(read_lines(path, notes), 1)
    begun = False
    for number, line in lines:
        if not begun and line.lstrip().startswith("["):
            try:
                yield from json.loads("\n" * (number - 1) + line + "".join(rest for _, rest in lines))
            except json.JSONDecodeError as problem:
                raise BadInput(f"{path}, line {problem.lineno}: not whole JSON ({problem.msg}): is the file cut off?") from None
        elif line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as problem:
                raise BadInput(f"{path}, line {number}: not JSON ({problem.msg}): a .json or .jsonl file holds "
                               f"one array, or one object a line") from None
        begun = begun or bool(line.strip())


def read_texts(path: str, document_separator: str, notes: Counter):
    """Yield the documents of a .txt file as {"text"}: one a line, or with blank lines between them."""
    held: list[str] = []
    for line in read_lines(path, notes):
        if line.strip():
            held.append(line)
        if held and (document_separator == "line" or not line.strip()):
            yield {"text": "".join(held).rstrip("\r\n")}
            held = []
    if held:
        yield {"text": "".join(held).rstrip("\r\n")}


def read_lines(path: str, notes: Counter):
    """Yield a file's lines with their ends, one at a time; it must be UTF-8, and a byte order mark is dropped and noted."""
    with open(path, "rb") as file:
        for number, data in enumerate(file, 1):
            try:
                line = data.decode("utf-8")
            except UnicodeDecodeError as problem:
                try:
                    data.decode("gb18030")
                    raise BadInput(f"{path}, line {number}: this is not UTF-8 but looks like GBK: mend it with "
                                   f"iconv -f GB18030 -t UTF-8 {path} > new_file") from None
                except UnicodeDecodeError:
                    raise BadInput(f"{path}, line {number}: its byte {problem.start} is not UTF-8") from None
            notes["byte order mark (dropped)"] += number == 1 and line.startswith("\ufeff")
            yield line.removeprefix("\ufeff") if number == 1 else line


def read_text(path: str, notes: Counter) -> str:
    """A whole file, as read_lines reads it."""
    return "".join(read_lines(path, notes))


def document_files(path: str) -> list[str]:
    """The file, or all files of a folder that can hold documents, sorted by name; BadInput where there is none."""
    if not os.path.isdir(path):
        return [path]
    files = sorted(str(file) for file in Path(path).rglob("*") if file.suffix in (".txt", ".json", ".jsonl", ".csv", ".parquet") and file.stat().st_size)
    if not files:
        raise BadInput(f"{path} holds no .txt, .json, .jsonl, .csv or .parquet file with something in it")
    return files


def document_turns(row: dict, notes: Counter) -> list[tuple]:
    """The turns of one document: its context, where it has one, as the user's, its text as the answer to train."""
    if not isinstance(row, dict):
        raise BadInput(f"a {type(row).__name__} where an object {{...}} belongs")
    text = next((name for name in ("text", "completion", "content") if row.get(name) is not None), None)
    if text is None:
        raise BadInput(f"no document: it needs 'text', or 'context' and 'completion' (it has {', '.join(map(str, row))})")
    for key in row.keys() - {text, "context"}:
        notes[f"unknown column {key!r} (not used)"] += 1
    return [("user", row.get("context") or ""), ("assistant", row[text])]


def holds_text(path: str) -> bool:
    """Whether a file or folder holds documents, rather than instructions or dialogues."""
    if os.path.isdir(path) or path.endswith(".txt"):
        return True
    row = next(iter(read_rows(path, Counter())), None)
    for turns_of in (row_turns, document_turns):  # an instruction may have a column `text` besides
        try:
            turns_of(row, Counter())
            return turns_of is document_turns
        except BadInput:
            pass
    return False  # neither: reading it says what is wrong


def row_turns(row: dict, notes: Counter) -> list[tuple]:
    """The turns of one row as (role, text), or (role, instruction, input); the keys tell the schema."""
    if not isinstance(row, dict):
        raise BadInput(f"a {type(row).__name__} where an object {{...}} belongs")
    row = {key: value for key, value in row.items() if value is not None}
    known = {"system"}
    turns = [("system", row["system"])] if row.get("system") else []
    if "messages" in row or "conversations" in row:
        name, role, text = ("messages", "role", "content") if "messages" in row else ("conversations", "from", "value")
        known |= {name}
        if not isinstance(row[name], list):
            raise BadInput(f"{name!r} is a {type(row[name]).__name__}, a list of turns belongs there")
        for turn in row[name]:
            if not isinstance(turn, dict) or turn.get(role) is None or turn.get(text) is None:
                raise BadInput(f"a turn of {name!r} lacks {role!r} or {text!r}: {str(turn)[:60]}")
            if turn[role] not in ROLES:
                raise BadInput(f"unknown role {turn[role]!r}; known are {', '.join(ROLES)}")
            turns.append((ROLES[turn[role]], turn[text]))
    elif isinstance(row.get("input"), list) or isinstance(row.get("prompt"), list):  # Chinese-Vicuna chat, Ziya
        name = "input" if "input" in row else "prompt"
        known |= {name, "output", "task"}
        if not isinstance(row.get("output"), list) or len(row["output"]) != len(row[name]):
            raise BadInput(f"{name!r} is a list of {len(row[name])} turns, so 'output' must be a list of as many answers")
        turns += [turn for user, answer in zip(row[name], row["output"]) for turn in (("user", user), ("assistant", answer))]
    elif "instruction" in row:
        known |= {"instruction", "input", "output", "history"}
        for pair in row.get("history") or []:
            if not isinstance(pair, list) or len(pair) != 2:
                raise BadInput("'history' must be a list of [user, answer] pairs")
            turns += [("user", pair[0]), ("assistant", pair[1])]
        turns.append(("user", row["instruction"], row["input"]) if row.get("input") else ("user", row["instruction"]))
        turns += [("assistant", row["output"])] if "output" in row else []
    elif "input" in row and "target" in row:  # Llama2-Chinese, two columns
        known |= {"input", "target"}
        turns += [("user", row["input"]), ("assistant", row["target"])]
    elif str(row.get("text", "")).lstrip().startswith("<s>"):  # Llama2-Chinese, one column
        known |= {"text"}
        turn = re.compile(r"\s*<s>(Human|Assistant|System): (.*?)\n?</s>", re.S)
        end = 0
        while match := turn.match(row["text"], end):
            turns.append(({"Human": "user"}.get(match[1], match[1].lower()), match[2]))
            end = match.end()
        if row["text"][end:].strip():
            raise BadInput(f"'text' breaks the pattern <s>Human: ...\\n</s><s>Assistant: ...\\n</s> at {row['text'][end:end + 30]!r}")
    else:
        raise BadInput(f"no known schema: it has the keys {', '.join(map(str, row))}")
    for key in row.keys() - known:
        notes[f"unknown column {key!r} (not used)"] += 1
    return turns


def clean_messages(turns: list[tuple], unescape_newlines: bool, notes: Counter) -> list[dict]:
    """Check the turns' texts and their order; what can be mended is mended and noted, the rest is BadInput."""
    messages: list[dict] = []
    for role, *texts in turns:
        texts = [clean_text(text, role, unescape_newlines, notes) for text in texts]
        message = {"role": role, "content": "\n".join(texts)}
        if len(texts) == 2:
            message["input"] = texts[1]
        if role == "system" and messages:
            raise BadInput("a system text that does not stand first")
        if role == "assistant" and not any(m["role"] != "system" for m in messages):
            notes["answer before any question (dropped)"] += 1
        elif messages and messages[-1]["role"] == role != "tool":
            notes[f"two {role} turns in a row (joined)"] += 1
            messages[-1] = {"role": role, "content": messages[-1]["content"] + "\n" + message["content"]}
        else:
            messages.append(message)
        notes["empty answer"] += role == "assistant" and not texts[0].strip()
    return messages


def prompt_messages(row: dict) -> list[dict]:
    """The messages of a record or of {"prompt": ...} up to the last question: what a model is asked for an answer to."""
    if isinstance(row, dict) and isinstance(row.get("prompt"), str):
        row = {"instruction": row["prompt"]} | ({"system": row["system"]} if "system" in row else {})
    messages = clean_messages(row_turns(row, Counter()), False, Counter())
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages or messages[-1]["role"] == "system":
        raise BadInput("it asks nothing")
    return messages


def clean_text(text, role: str, unescape_newlines: bool, notes: Counter) -> str:
    """Check one text; BadInput if it is not a string or is mojibake, notes for what is only odd."""
    if not isinstance(text, str):
        raise BadInput(f"the {role} text is a {type(text).__name__}, a string belongs there: {str(text)[:60]}")
    if LATIN_MOJIBAKE.search(text) or "锟斤拷" in text or gbk_mojibake(text):
        raise BadInput(f"the {role} text is UTF-8 that was read in another encoding (mojibake): {text[:40]!r}")
    if "\ufeff" in text:
        notes["byte order mark (dropped)"] += 1
        text = text.replace("\ufeff", "")
    notes["U+FFFD, a character lost in an earlier conversion"] += "\ufffd" in text
    if "\\n" in text:
        notes["literal \\n in a text" + " (mended)" * unescape_newlines] += 1
        text = text.replace("\\r\\n", "\n").replace("\\n", "\n") if unescape_newlines else text
    return text


def gbk_mojibake(text: str) -> bool:
    """Whether a run of Chinese, taken back to GBK bytes, is UTF-8: UTF-8 read as GBK turns 你好 into 浣犲ソ."""
    for run in re.finditer("[\u4e00-\u9fff]{6,60}", text):
        data = run[0].encode("gb18030")
        for start in range(3):  # the run may begin inside a character
            whole = data[start : start + (len(data) - start) // 3 * 3].decode("utf-8", "replace")
            if re.fullmatch("[\u3000-\u9fff\uff00-\uffef]+", whole):
                return True
    return False
