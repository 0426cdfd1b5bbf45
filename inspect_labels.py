"""Look before training: which tokens of a record are trained, and what is wrong in a whole file.

Reads   the tokenizer of a model, and records of any format in sample/README.md
Writes  one record with its trained part marked, and an audit of the file, to the terminal; on request a page or a dump

    python inspect_labels.py --model_name_or_path M --data_path D               # record 0 and the audit
    python inspect_labels.py --model_name_or_path M --data_path D --record 7 --html record.html
    python inspect_labels.py --model_name_or_path M --data_path D --dump examples.jsonl

Most failed runs are visible here: prompts that are trained, answers without a stop token, half of the data cut off.
"""
import contextlib
import html as html_module
import json
import os
import sys
from collections import Counter

from utils import IGNORE_INDEX, BadInput, Chat, check_file, check_model, cli, numbered_records, summarize, tokenize_records


def main(
    *,
    # model and data
    model_name_or_path: str,
    data_path: str,
    template: str = "auto",
    last_round_only: bool = False,
    max_length: int = 1024,
    skip_bad_records: bool = False,
    unescape_newlines: bool = False,
    trust_remote_code: bool = False,
    # what to show
    record: int = 0,
    html: str | None = None,
    dump: str | None = None,
):
    """Show what is trained in one record, and audit the whole file.

    Args:
        model_name_or_path: Folder or hub name of the base model.
        data_path: Training data: JSON, JSONL, CSV or Parquet (pretrain_clm.py: also .txt, or a folder); see sample/README.md.
        template: Prompt format: auto (the model's own), alpaca, vicuna_chat, yayi, chatml, ziya, llama2_chinese, llama2 or plain.
        last_round_only: Train the last answer of each dialogue alone.
        max_length: Tokens per example; what is longer is cut into windows, a dialogue into whole rounds.
        skip_bad_records: Drop bad records and say how many and why, instead of stopping.
        unescape_newlines: Turn a literal backslash and n in the data into a line break.
        trust_remote_code: Run Python code that comes with the model.
        record: Number of the record to show, from 0.
        html: File to write the record to, as a page with every token and its id.
        dump: File to write all examples to, one JSON object a line: input_ids, labels, record.
    """
    check_file("data_path", data_path)
    if not os.path.isdir(model_name_or_path):  # of a folder, the tokenizer is enough
        check_model(model_name_or_path)

    # ---- load ----
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model_name_or_path, trust_remote_code=trust_remote_code)
    except Exception as problem:  # the libraries raise whatever a damaged file makes of them
        raise BadInput(f"no tokenizer could be loaded from {model_name_or_path}: {str(problem)[:200]}") from None
    chat = Chat(tokenizer, template, last_round_only)
    examples, counts = tokenize_records(data_path, chat, max_length, skip_bad_records, unescape_newlines)

    # ---- look ----
    numbers = examples["record"][:]
    shown = [examples[e] for e, number in enumerate(numbers) if number == record]
    if not shown:
        raise BadInput(f"--record={record} is not in {data_path}: its last record is number {numbers[-1]}, and dropped ones have no examples")
    start, end = ("\033[42;30m", "\033[0m") if sys.stdout.isatty() else ("«", "»")
    for window, example in enumerate(shown, 1):
        print(f"record {record}, window {window} of {len(shown)}: {len(example['input_ids'])} tokens, trained between {start}the marks{end}")
        print("".join(start + text + end if trained else text for text, trained, _ in spans(tokenizer, example, by_token=False)), "\n")
    print(audit(examples, counts, chat, numbered_records(data_path, True, unescape_newlines), max_length))

    # ---- save ----
    if html:
        with open(html, "w", encoding="utf-8") as file:
            file.write(page(tokenizer, shown, f"{data_path}, record {record}"))
    if dump:
        with open(dump, "w", encoding="utf-8") as file:
            file.writelines(json.dumps({name: example[name] for name in ("input_ids", "labels", "record")}) + "\n" for example in examples)


def spans(tokenizer, example: dict, by_token: bool):
    """Yield (text, trained, ids) of runs of tokens: as short as whole characters allow, or as long as the label stays."""
    ids: list[int] = []
    rest = list(zip(example["input_ids"], example["labels"]))
    for place, (token, label) in enumerate(rest):
        ids.append(token)
        last = place + 1 == len(rest) or (rest[place + 1][1] == IGNORE_INDEX) != (label == IGNORE_INDEX)
        text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        if last or (by_token and "\ufffd" not in text):
            yield text, label != IGNORE_INDEX, ids
            ids = []


def audit(examples, counts: Counter, chat: Chat, records, max_length: int) -> str:
    """The lines that say what is in the file and what is odd about it."""
    bos = chat.tokenizer.bos_token_id
    found, seen, lengths = Counter(), Counter(), examples["length"][:]
    for example in examples:
        ids, labels = example["input_ids"], example["labels"]
        seen[hash(tuple(ids))] += 1
        found["examples with a doubled BOS"] += bos is not None and any(a == b == bos for a, b in zip(ids, ids[1:]))
        ends = [i for i, label in enumerate(labels) if label != IGNORE_INDEX and (i + 1 == len(labels) or labels[i + 1] == IGNORE_INDEX)]
        found["answers without a stop token (cut, or the template writes none)"] += sum(labels[i] not in chat.stop_ids for i in ends)
    found["examples that stand more than once"] = sum(count for count in seen.values() if count > 1)
    chat.crossed = 0
    for _, record in records:
        with contextlib.suppress(BadInput):  # one that the template refuses was dropped, or the run had ended before
            chat.encode(record["messages"])
    found["places where a merge would cross from prompt to answer (tokenized apart, as in generation)"] = chat.crossed
    lines = [summarize(counts),
             f"supervised share {counts['supervised_tokens'] / counts['tokens']:.1%}, {counts['windows']:,} windows made of longer dialogues"]
    lines += [f"  {count:,} x {what}" for what, count in found.items() if count] or ["  nothing odd in the labels"]
    edges = [0, *(edge for edge in (64, 128, 256, 512, 1024, 2048, 4096, 8192) if edge < max_length), max_length]
    bars = [sum(low < length <= high for length in lengths) for low, high in zip(edges, edges[1:])]
    lines += [f"{low + 1:>6}-{high:<6} {count:>8,} {'█' * round(40 * count / max(bars))}" for low, high, count in zip(edges, edges[1:], bars)]
    return "\n".join(lines)


def page(tokenizer, shown: list[dict], title: str) -> str:
    """The examples as an HTML page: a box per token, green where it is trained, its ids in the tooltip."""
    body = []
    for example in shown:
        boxes = (f'<span class="{"trained" if trained else "read"}" title="{" ".join(map(str, ids))}">{html_module.escape(text)}</span>'
                 for text, trained, ids in spans(tokenizer, example, by_token=True))
        body.append(f"<pre>{''.join(boxes)}</pre>")
    style = "pre{white-space:pre-wrap;font:16px/1.7 sans-serif}span{outline:1px solid #ddd}.trained{background:#b7e4c7}"
    title = html_module.escape(title)
    return f"<!doctype html><meta charset=utf-8><title>{title}</title><style>{style}</style><h1>{title}</h1>{''.join(body)}"


if __name__ == "__main__":
    cli(main)
