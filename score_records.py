"""Score answers, and make of the scores what the next stage learns from: preferences, best answers, dialogues with hindsight, an order.

Reads   records of any format with one answer, several (`answers`, from generate.py --num_return_sequences) or a preferred and a rejected one
Writes  output_file, by --keep: all records with their scores, the best answers, pairs, dialogues with the verdict, or prompts

    generate.py --num_return_sequences 4 --input_file sample/prompts.jsonl --output_file answers.jsonl ...    # candidates
    score_records.py --by rules --rules sample/rules.py:finished=1,chinese=1 --data_path answers.jsonl --output_file scored.jsonl
    score_records.py --data_path scored.jsonl --keep best --output_file best.jsonl                            # best of n, to finetune_lora.py
    score_records.py --data_path scored.jsonl --keep pairs --output_file pairs.jsonl                          # to train_dpo.py, train_reward.py
    score_records.py --by ifd --model_name_or_path M --data_path D --buckets 4 --output_file ordered.jsonl    # from easy to hard

| --by    | score of an answer                                                                     |
|---------|----------------------------------------------------------------------------------------|
| reward  | of a reward model, read at the stop token; with --rules their weighted sum added to it |
| rules   | sum of weight * rule                                                                   |
| judge   | probability that a model calls it the better one, or good; asked in both orders        |
| loss    | of a model that is given the question: nats per token                                  |
| ifd     | that loss / the loss without the question (arXiv:2308.12032): near 1, it does not help |
| length  | characters                                                                             |

What a model says is kept in the cache, by content: a run that was killed goes on, and another --keep of the same costs nothing.
"""
import contextlib
import difflib
import hashlib
import importlib.util
import inspect
import itertools
import json
import math
import os
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from utils import (BadInput, Chat, cache_folder, can_pack, check_adapter, check_file, check_model, check_positive, check_tokenizer, clean_messages,
                   clean_text, cli, file_hash, fingerprint, numbered_records, preference_record, read_json, row_turns)

# What a judge is asked: a question in which two answers change places, since the first is often preferred
COMPARE = ("下面是对同一个问题的两个回答。请判断哪一个更好：正确、切题、完整、不重复的更好，长的不一定更好。\n\n[问题]\n{question}\n\n[回答 A]\n{a}\n\n"
           "[回答 B]\n{b}\n\n哪一个更好？只写 A 或 B。")
GRADE = "下面的回答好不好？正确、切题、完整、不重复才算好。\n\n[问题]\n{question}\n\n[回答]\n{answer}\n\nA. {a}\nB. {b}\n\n只写 A 或 B。", ("好", "不好")
DIFFICULTY = "下面的问题难不难回答？\n\n[问题]\n{question}\n\nA. {a}\nB. {b}\n\n只写 A 或 B。", ("难", "容易")
# Chain of hindsight (arXiv:2302.02676): what a question ends with in training, and the first of them when the model is used
GOOD, BAD = "请给出一个好的回答。", "请给出一个差的回答。"
OF_A_DIALOGUE = {"system", "messages", "conversations", "instruction", "input", "output", "history", "prompt", "question", "task", "text", "target",
                 "answer", "answers", "finished", "chosen", "rejected", "response_chosen", "response_rejected", "score", "scores", "rules",
                 "score_chosen", "score_rejected"}


def main(
    *,
    # what to score
    by: Literal["reward", "rules", "judge", "loss", "ifd", "length"] | None = None,
    model_name_or_path: str | None = None,
    lora_path: str | None = None,
    data_path: str,
    template: str = "auto",
    skip_bad_records: bool = False,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    bits: Literal[16, 8, 4] = 16,
    reward_model: str | None = None,
    rules: str | None = None,
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto",
    # what to write
    output_file: str,
    keep: Literal["all", "best", "pairs", "hindsight", "prompts"] = "all",
    min_gap: float = 0.0,
    buckets: int = 0,
    per_device_eval_batch_size: int = 8,
):
    """Score the answers of a file, and write what can be learned from them.

    Args:
        by: What scores: reward, rules, judge, loss, ifd or length; not given: the scores that the records have already, or whoever chose.
        model_name_or_path: Folder or hub name of the base model.
        lora_path: Folder of an adapter for this base.
        data_path: Records with one answer, with `answers`, or with a preference; for --keep prompts also without any.
        template: Prompt format: auto (the model's own), alpaca, vicuna_chat, yayi, chatml, ziya, llama2_chinese, llama2 or plain.
        skip_bad_records: Drop bad records and say how many and why, instead of stopping.
        trust_remote_code: Run Python code that comes with the model.
        allow_pickle: Load weights that are pickles, which can run code.
        bits: Of the base model's weights: 16 as they are, 8 (int8) or 4 (NF4).
        reward_model: Folder of a reward model, or of an adapter that is one.
        rules: Python file and the weights of its rules, as in sample/rules.py:finished=1,chinese=0.5.
        precision: Arithmetic: auto (bf16 where the GPU has it, else fp16; fp32 on a CPU), bf16, fp16 or fp32.
        output_file: File to write; it may not be there yet. prompts: .jsonl for train_ppo.py and OpenRLHF, .parquet for verl.
        keep: Write all records with their scores, the best answers, pairs of best and worst, hindsight dialogues of the two, or the prompts alone.
        min_gap: Write pairs and hindsight only of answers whose scores lie further apart than this.
        buckets: Sort records with one answer from easy to hard, and write as many files of like difficulty besides.
        per_device_eval_batch_size: Prompts that go through the model together.
    """
    flags = dict(locals())
    judges = check_scoring(flags)

    # ---- load ----
    items = read_items(data_path, skip_bad_records, answered=by or keep != "prompts")
    if buckets and (several := next((item for item in items if item["kind"] != "one"), None)):
        raise BadInput(f"{several['where']} has several answers: --buckets sorts records that have one")
    if keep in ("best", "pairs", "hindsight") and all(len(item["answers"]) < 2 for item in items):
        raise BadInput(f"--keep={keep}: no record of {data_path} has several answers: make them with generate.py --num_return_sequences 4")
    if keep not in ("all", "prompts") and not by:
        old_scores(items)

    # ---- score ----
    for item in items if judges else []:
        item["rules"] = [run_rules(judges, item["messages"], *answer, item["row"], item["where"]) for answer in zip(item["answers"], item["finished"])]
    order = give_scores(items, flags, judges) if by else {}
    if too_long := [item["where"] for item in items if None in item.get("scores", [])]:
        items = [item for item in items if None not in item.get("scores", [])]
        print(f"dropped {len(too_long)} records that are empty or longer than the model's context, {too_long[0]} for one", file=sys.stderr)
    if not items:
        raise BadInput(f"no record of {data_path} can be read by the model: all are empty or longer than its context")

    # ---- save ----
    rows = in_buckets(items, flags) if buckets else [row for item in items for row in kept_rows(item, keep, min_gap, output_file)]
    if not rows:
        raise BadInput(f"--keep={keep}: of {len(items)} records none has two answers that the model ended, with scores more than {min_gap} apart")
    write_rows({bucket_file(output_file, number): [row for row in rows if row["bucket"] == number] for number in range(buckets)} | {output_file: rows})
    print(json.dumps(summary_of(items, judges) | order | {"written": len(rows), "output_file": output_file}, ensure_ascii=False))


def check_scoring(flags: dict) -> dict:
    """The rules; BadInput if flags do not go together or name what is not there: all of it without torch."""
    by, keep, buckets = flags["by"], flags["keep"], flags["buckets"]
    check_file("data_path", flags["data_path"])
    check_positive(per_device_eval_batch_size=flags["per_device_eval_batch_size"])
    needed = {"reward": "reward_model", "rules": "rules", "judge": "model_name_or_path", "loss": "model_name_or_path", "ifd": "model_name_or_path"}
    for wrong, what in (
            (not by and keep == "all", "--by is missing: reward, rules, judge, loss, ifd or length"),
            (by and keep == "prompts", "--keep prompts writes no answers, so it takes no --by"),
            (by in needed and not flags[needed.get(by)], f"--by={by} needs --{needed.get(by)}"),
            (flags["reward_model"] and by != "reward", "--reward_model goes with --by reward"),
            (flags["rules"] and by not in ("rules", "reward"), "--rules goes with --by rules, or with --by reward"),
            (flags["lora_path"] and not flags["model_name_or_path"], "--lora_path needs the --model_name_or_path that it was trained on"),
            (keep in ("best", "pairs", "hindsight") and by in ("loss", "ifd", "length"),
             f"--by={by} does not say which answer is better: take --by reward, rules or judge"),
            (buckets > 0 and (by not in ("loss", "ifd", "length", "judge") or keep != "all"), "--buckets goes with --by loss, ifd, length or judge"),
            (buckets < 0 or not flags["min_gap"] >= 0, f"--buckets={buckets} and --min_gap={flags['min_gap']} must be zero or more")):
        if wrong:
            raise BadInput(what)
    for file in (flags["output_file"], *(bucket_file(flags["output_file"], number) for number in range(buckets))):
        if Path(file).exists() or not os.access(Path(file).resolve().parent, os.W_OK | os.X_OK):
            raise BadInput(f"--output_file={file} is there already, or in a folder that does not exist or cannot be written: give the path of a new file")
    if flags["reward_model"]:
        check_reward(flags["reward_model"], flags["allow_pickle"])
    if flags["model_name_or_path"]:
        check_model(name := flags["model_name_or_path"], flags["allow_pickle"])
        if Path(name).is_dir() and str(read_json(Path(name, "config.json")).get("architectures")).endswith("ForSequenceClassification']"):
            raise BadInput(f"--model_name_or_path={name} is a reward model, which writes no text: give it as --reward_model, with --by reward")
    if flags["lora_path"]:
        check_adapter(flags["lora_path"])
    return load_rules(flags["rules"]) if flags["rules"] else {}


# ---- records ----
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


def read_items(path: str, skip_bad_records: bool, answered: bool) -> list[dict]:
    """The records as {"where", "number", "row", "kind", "messages", "answers", "finished"}: messages up to the question, and the answers to it.

    kind: one (answer), answers, preference (chosen and rejected), prompt (no answer, which is bad if `answered`).
    """
    def read(row) -> dict:
        item = item_of(row) | {"row": row}
        if answered and not item["answers"]:
            raise BadInput("it has no answer to score")
        return item

    return [item | {"where": f"{path}, record {number}", "number": number} for number, item in numbered_records(path, skip_bad_records, read=read)]


def item_of(row: dict) -> dict:
    """What read_items makes of a row."""
    if {"chosen", "response_chosen"} & row.keys():
        record = preference_record(row, False, Counter())
        return {"kind": "preference", "messages": record["messages"], "answers": [record["chosen"], record["rejected"]], "finished": [True, True]}
    messages = prompt_messages(row)
    name = next((name for name in ("answers", "answer") if row.get(name) is not None), None)
    if name:
        answers, finished = row[name], row.get("finished", True)
        answers = answers if isinstance(answers, list) and name == "answers" else [answers]
        finished = finished if isinstance(finished, list) else [finished] * len(answers)
        if not answers or len(finished) != len(answers) or not all(isinstance(ended, bool) for ended in finished):
            raise BadInput(f"{name!r} holds {len(answers)} answers and 'finished' {row.get('finished')}: it needs a true or false for each")
    else:  # the answer is the last turn
        turns = clean_messages(row_turns({"instruction": row["prompt"]} if isinstance(row.get("prompt"), str) else row, Counter()), False, Counter())
        answers = [turns[-1]["content"]] if turns[-1]["role"] == "assistant" else []
        finished = [True] * len(answers)
    answers = [clean_text(answer, "assistant", False, Counter()) for answer in answers]
    return {"kind": "answers" if name == "answers" else "one" if answers else "prompt", "messages": messages, "answers": answers, "finished": finished}


def old_scores(items: list[dict]) -> None:
    """Give the items the scores that stand in their rows, or people's verdict, 1 for the chosen answer; BadInput where there is neither."""
    for item in items:
        row, kind = item["row"], item["kind"]
        found = [row.get("score_chosen", 1.0), row.get("score_rejected", 0.0)] if kind == "preference" else row.get("scores", [row.get("score")])
        if not isinstance(found, list) or len(found) != len(item["answers"]) or not all(isinstance(score, (int, float)) for score in found):
            raise BadInput(f"{item['where']} has no score for each of its answers: score them with --by")
        item["scores"] = found


# ---- scores ----
def give_scores(items: list[dict], flags: dict, judges: dict) -> dict:
    """Give each item its `scores`, of None where it is too long for the model; for a judge, how often its verdict changed with the order."""
    by, flipped, pairs = flags["by"], 0, 0
    asked = {item["number"]: asked_of(item, by, flags["buckets"] > 0) for item in items if by not in ("rules", "length")}
    said = cached({(number, *key): what for number, of_item in asked.items() for key, what in of_item.items()}, flags) if asked else {}
    for item in items:
        of_item, count = {key: said[item["number"], *key] for key in asked.get(item["number"], ())}, range(len(item["answers"]))
        if None in of_item.values():
            item["scores"] = [None] * len(count)
            continue
        if by == "judge":  # p(i, j): that the judge names i, where i stands first
            better = {(i, j): (p + 1 - of_item[j, i]) / 2 for (i, j), p in of_item.items()}
            flipped += sum((p > 0.5) != (1 - of_item[j, i] > 0.5) for (i, j), p in of_item.items() if i < j)
            pairs += len(better) // 2
            item["scores"] = [sum(p for (one, _), p in better.items() if one == i) / max(1, len(count) - 1) for i in count]
        elif by == "ifd":
            item["scores"] = [of_item[i, "asked"] / of_item[i, "alone"] for i in count]
        else:
            item["scores"] = [of_item[i, "asked"] if of_item else len(item["answers"][i]) * (by == "length") for i in count]
        for i, said_by_rules in enumerate(item.get("rules", [])):
            item["scores"][i] += sum(judges[name][0] * value for name, value in said_by_rules.items())
    return {"order_flips": flipped, "order_pairs": pairs} if by == "judge" else {}


def asked_of(item: dict, by: str, difficulty: bool) -> dict[tuple, tuple]:
    """{key: (where, messages, answer and whether it is finished)} of what a model is asked about an item; a judge is asked for the answer itself."""
    answers, where = list(zip(item["answers"], item["finished"])), item["where"]
    if by != "judge":
        return {(i, name): (where, item["messages"], *answer) for i, answer in enumerate(answers) for name in ("asked", "alone")[: 1 + (by == "ifd")]}
    question = item["messages"][0]["content"] if len(item["messages"]) == 1 else "\n".join(f"{m['role']}: {m['content']}" for m in item["messages"])
    form, choices = (COMPARE, item["answers"]) if len(answers) > 1 else DIFFICULTY if difficulty else GRADE
    text = lambda a, b: form.format(question=question, answer=answers[0][0], a=choices[a], b=choices[b])
    return {(a, b): (where, [{"role": "user", "content": text(a, b)}]) for a, b in itertools.permutations(range(len(choices)), 2)}


def cached(asked: dict[tuple, tuple], flags: dict) -> dict[tuple, float | None]:
    """{key: what the model says} of all that is asked; each stands in the cache as soon as it is known, for the same data, model and way of asking."""
    from tqdm import tqdm

    folders = [flags[name] for name in ("model_name_or_path", "lora_path", "reward_model") if flags[name]]
    files = [str(file) for folder in folders for file in sorted(Path(folder).glob("*"))
             if file.suffix in (".json", ".jinja") or file.name.startswith("adapter_model")]
    facts = [flags[name] for name in ("by", "template", "bits", "precision")] + folders + [fingerprint(folder) for folder in folders]
    facts += [flags["buckets"] > 0, *map(file_hash, (*files, flags["data_path"], __file__, inspect.getfile(Chat)))]
    file = cache_folder() / "scores" / f"{hashlib.sha256(repr(facts).encode()).hexdigest()[:40]}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    said = {}
    for line in file.read_text("utf-8").splitlines() if file.exists() else []:
        with contextlib.suppress(ValueError):  # a line that was cut off
            key, value = json.loads(line)
            said[tuple(key)] = value
    if left := [key for key in asked if key not in said]:
        with open(file, "a", encoding="utf-8") as stream:
            stream.write("\n")  # behind a line that was cut off
            for number, value in tqdm(ask_model([asked[key] for key in left], [key[-1] for key in left], flags), "scoring", len(left)):
                said[left[number]] = value
                stream.write(json.dumps([left[number], value]) + "\n")
                stream.flush()
    return said


def ask_model(asked: list[tuple], names: list, flags: dict):
    """Yield (number of what is asked, what the model says), the longest first; None for what is longer than its context, or without a token to read.

    `names`: "alone" where an answer is to be read without its question, behind the token that begins a text.
    """
    by, size = flags["by"], flags["per_device_eval_batch_size"]
    model, chat = load_scorer(flags)
    start = chat.tokenizer.eos_token_id if chat.tokenizer.bos_token_id is None else chat.tokenizer.bos_token_id
    rows, begins = [], []  # ids, and where the answer begins in them
    lead, *letters = letter_ids(chat) if by == "judge" else ([],)
    for (_, messages, *answer), name in zip(asked, names):
        ids, begin = [i for part, _ in chat.encode(messages, add_generation_prompt=True) for i in part] + lead, 0
        if by != "judge":
            ids, begin = reward_ids(chat, messages, *answer), len(ids)
        if name == "alone":
            ids, begin = [start] + ids[begin:], 1
        rows.append(ids)
        begins.append(begin)
    room = getattr(model.config, "max_position_embeddings", None) or sys.maxsize
    fitting = [number for number, row in enumerate(rows) if begins[number] < len(row) <= room]
    yield from ((number, None) for number in sorted({*range(len(rows))} - {*fitting}))
    rows, begins = [rows[number] for number in fitting], [begins[number] for number in fitting]
    read = (read_rewards(model, rows, size) if by == "reward" else read_choices(model, rows, size, *letters) if by == "judge"
            else read_losses(model, rows, size, begins))
    yield from ((fitting[number], value) for number, value in read)


def letter_ids(chat: Chat) -> tuple[list[int], int, int]:
    """(what stands before them, A, B): the ids with which a model begins the answers A and B."""
    a, b = (chat.encode([{"role": "user", "content": "?"}, {"role": "assistant", "content": letter}])[1][0] for letter in "AB")
    at = next(i for i, (one, other) in enumerate(zip(a, b)) if one != other)
    return a[:at], a[at], b[at]


def read_choices(model, rows: list[list[int]], batch_size: int, first: int, second: int):
    """Yield (number of the row, probability that the token `first` follows it, where `first` or `second` does)."""
    def value_of(batch, hidden, last):
        logits = model.get_output_embeddings()(hidden[range(len(batch)), last])[:, [first, second]]
        return logits.float().softmax(dim=-1)[:, 0].tolist()

    return read_batches(model.base_model, rows, batch_size, value_of)


def read_losses(model, rows: list[list[int]], batch_size: int, begins: list[int]):
    """Yield (number of the row, mean loss of its tokens from begins[number] on)."""
    import torch

    def value_of(batch, hidden, last):
        for number, states, end in zip(batch, hidden, last):  # one at a time: the logits of a whole batch are large
            logits = model.get_output_embeddings()(states[begins[number] - 1 : end]).float()
            yield torch.nn.functional.cross_entropy(logits, torch.tensor(rows[number][begins[number]:], device=logits.device)).item()

    return read_batches(model.base_model, rows, batch_size, lambda *batch: list(value_of(*batch)))


# ---- what is written ----
def kept_rows(item: dict, keep: str, min_gap: float, output_file: str) -> list[dict]:
    """What output_file gets of an item; nothing where `keep` asks for two answers that differ, and it has none.

    A cut answer is never kept as something to learn from: written as a record, it would be closed with the stop token that it lacks.
    """
    row, scores, messages = item["row"], item.get("scores"), [{"role": m["role"], "content": m["content"]} for m in item["messages"]]
    if keep == "prompts":
        rest = {name: value for name, value in row.items() if name not in OF_A_DIALOGUE}  # what rules may ask for
        truth = str(row.get("ground_truth", ""))
        verl = {"data_source": "yangtuo", "prompt": messages, "ability": "chat", "extra_info": {"split": "train", "index": item["number"]},
                "reward_model": {"style": "rule" if truth else "model", "ground_truth": truth}}
        return [verl if output_file.endswith(".parquet") else {"messages": messages} | rest]
    if keep == "all":
        by_rule = {name: [said[name] for said in item["rules"]] for name in item["rules"][0]} if "rules" in item else {}
        if item["kind"] == "one":
            return [row | {"score": scores[0]} | ({"rules": {name: values[0] for name, values in by_rule.items()}} if by_rule else {})]
        named = {"scores": scores} if item["kind"] == "answers" else {"score_chosen": scores[0], "score_rejected": scores[1]}
        return [row | named | ({"rules": by_rule} if by_rule else {})]
    ranked = sorted((i for i, ended in enumerate(item["finished"]) if ended), key=lambda i: -scores[i])
    same = len({item["answers"][i] for i in ranked}) < 2  # which a batch's padding may give two rewards
    if not ranked or keep != "best" and (same or not scores[ranked[0]] - scores[ranked[-1]] > min_gap):
        return []
    (best, high), (worst, low) = ((item["answers"][i], scores[i]) for i in (ranked[0], ranked[-1]))
    asked = {name: row[name] for name in ("system", "instruction", "input", "history") if name in row} if "instruction" in row else {"messages": messages}
    answered = lambda *texts: [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts)]
    if keep == "best":
        return [asked | {"output": best} if "instruction" in row else {"messages": [*messages, {"role": "assistant", "content": best}]}]
    if keep == "pairs":
        return [asked | {"chosen": best, "rejected": worst, "score_chosen": high, "score_rejected": low}]
    turns = [(GOOD, best), (BAD, worst)][:: -1 if item["number"] % 2 else 1]  # either may come first, so that neither is a matter of place
    (first, answer), (then, other) = turns
    return [{"messages": messages[:-1] + answered(f"{messages[-1]['content']}\n\n{first}", answer, then, other)}]


def in_buckets(items: list[dict], flags: dict) -> list[dict]:
    """The rows from easy to hard, with how difficult they are, by what, and in which of as many buckets of one size."""
    how = {"formula": flags["by"]} | {name: flags[name] for name in ("model_name_or_path", "lora_path", "template") if flags["by"] != "length"}
    ordered = sorted(items, key=lambda item: item["scores"][0])
    return [item["row"] | {"difficulty": item["scores"][0], "difficulty_by": how, "bucket": place * flags["buckets"] // len(ordered)}
            for place, item in enumerate(ordered)]


def bucket_file(output_file: str, number: int) -> str:
    """out.jsonl's bucket 0 is out.bucket0.jsonl."""
    return str(Path(output_file).with_suffix(f".bucket{number}{Path(output_file).suffix}"))


def write_rows(files: dict[str, list[dict]]) -> None:
    """Write {file: rows}, all files whole or none: Parquet by their names, else an object a line."""
    import pyarrow
    import pyarrow.parquet

    unfinished = {file: Path(file).with_name(f".{Path(file).name}.new") for file in files}
    try:
        for file, rows in files.items():
            if file.endswith(".parquet"):
                pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), unfinished[file])
            else:
                unfinished[file].write_text("".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows), "utf-8")
        for file, written in unfinished.items():
            written.replace(file)
    finally:
        for written in unfinished.values():
            written.unlink(missing_ok=True)


def summary_of(items: list[dict], judges: dict) -> dict:
    """What a run says of its file: means over all answers, and of preferences the share that is scored right (ties count half)."""
    answers = [(item, i) for item in items for i in range(len(item["answers"]))]
    mean = lambda values: sum(values) / len(values) if values else None
    found = {"records": len(items), "answers": len(answers), "characters": mean([len(item["answers"][i]) for item, i in answers]),
             "finished": mean([item["finished"][i] for item, i in answers]), "score": mean([score for item in items for score in item.get("scores", [])])}
    if judges:
        found["rules"] = {name: mean([item["rules"][i][name] for item, i in answers]) for name in judges}
    if pairs := [item for item in items if item["kind"] == "preference" and "scores" in item]:
        right = lambda a, b: (a > b) + (a == b) / 2
        found |= {"accuracy": mean([right(*item["scores"]) for item in pairs]), "length_baseline": mean([right(*map(len, item["answers"])) for item in pairs])}
    return found


# ---- loading ----
def load_scorer(flags: dict):
    """(model, Chat) that scores: the reward model, or the model that judges or whose loss is wanted."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    name, lora_path, bits, precision, cuda = *(flags[name] for name in ("model_name_or_path", "lora_path", "bits", "precision")), torch.cuda.is_available()
    if precision != "fp32" and not cuda:
        if precision != "auto":
            raise BadInput(f"--precision={precision} needs a GPU: leave it at auto")
        precision = "fp32"
    if precision == "auto":  # where bf16 is only emulated, fp16 is faster
        precision = "bf16" if torch.cuda.get_device_capability()[0] >= 8 else "fp16"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    given = dict(dtype=dtype, device_map={"": "cuda" if cuda else "cpu"}, trust_remote_code=flags["trust_remote_code"],
                 use_safetensors=None if flags["allow_pickle"] else True)
    if bits < 16:  # 8: LLM.int8, arXiv:2208.07339; 4: NF4 with double quantization, QLoRA, arXiv:2305.14314
        given["quantization_config"] = BitsAndBytesConfig(
            load_in_8bit=bits == 8, load_in_4bit=bits == 4, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)
    if flags["by"] == "reward":
        return load_reward(flags["reward_model"], name, **given)
    chat = load_chat(name, lora_path, flags["template"], flags["trust_remote_code"])
    chat.last_round_only = True
    model = load(AutoModelForCausalLM, name, output_loading_info=True, **given)
    can_pack(model.config, 1)  # refuses models that change their logits behind the head
    if not lora_path:
        check_tokenizer(chat, model.config)
        if chat.new_tokens:
            raise BadInput(f"--template={flags['template']} needs {chat.new_tokens[0]}, which {name} never learned: give the template that it was trained with")
    elif len(chat.tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(chat.tokenizer), mean_resizing=False)  # the adapter brings the rows
    model = load_adapter(model, lora_path, name, flags["allow_pickle"]).get_base_model() if lora_path else model
    return model.eval(), chat


def load_chat(model_name_or_path: str, lora_path: str | None, template: str, trust_remote_code: bool) -> Chat:
    """The tokenizer and template of the adapter if it brings its own, else of the base."""
    from transformers import AutoTokenizer

    folder = lora_path if lora_path and Path(lora_path, "tokenizer_config.json").is_file() else model_name_or_path
    return Chat(load(AutoTokenizer, folder, trust_remote_code=trust_remote_code), template)


def check_reward(reward_model: str, allow_pickle: bool = False) -> None:
    """BadInput, without torch, if a folder is no reward model: neither ...ForSequenceClassification with one label nor an adapter of that."""
    folder = Path(reward_model)
    if (folder / "adapter_config.json").is_file():
        check_adapter(reward_model)
        if (task := read_json(folder / "adapter_config.json").get("task_type")) != "SEQ_CLS":
            raise BadInput(f"--reward_model={reward_model} is an adapter of the kind {task}, which gives no rewards: train one with train_reward.py")
        return
    check_model(reward_model, allow_pickle)
    kinds = read_json(folder / "config.json").get("architectures") or ["nothing known"] if folder.is_dir() else []
    if kinds and not kinds[0].endswith("ForSequenceClassification"):
        raise BadInput(f"--reward_model={reward_model} is a {kinds[0]}, which gives no rewards: train one from it with train_reward.py")


def load_reward(reward_model: str, base: str | None = None, **given):
    """(model, Chat) of a folder that check_reward takes; `base`: of an adapter, where it is not what its adapter_config.json says.

    `given` goes to from_pretrained. Each model writes a dialogue in its own template and ids: text goes from one to the other, never ids.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, logging

    is_adapter = Path(reward_model, "adapter_config.json").is_file()
    base = reward_model if not is_adapter else base or read_json(Path(reward_model, "adapter_config.json"))["base_model_name_or_path"]
    tokenizer = load(AutoTokenizer, reward_model, trust_remote_code=given.get("trust_remote_code", False))
    chat = Chat(tokenizer, last_round_only=True)  # of a dialogue the last answer is judged
    verbosity = logging.get_verbosity()
    if is_adapter:
        given["num_labels"] = 1
        logging.set_verbosity_error()  # the head that the base lacks comes with the adapter
    model = load(AutoModelForSequenceClassification, base, may_lack=("score.weight",) * is_adapter, output_loading_info=True, **given)
    logging.set_verbosity(verbosity)
    if model.config.num_labels != 1 or not hasattr(model, "score"):
        raise BadInput(f"--reward_model={reward_model} gives {model.config.num_labels} labels, one reward is wanted: train one with train_reward.py")
    if is_adapter:
        if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:  # rows of its template's tokens, which the adapter brings
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        model = load_adapter(model, reward_model, base).get_base_model()
    model.score.float()  # in 16 bit two good answers would often get one reward
    return model.eval(), chat


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


# ==== rules ====
def load_rules(rules: str) -> dict[str, tuple[float, Callable]]:
    """{name: (weight, function)} of FILE:name=weight,name=weight, a Python file of the user's; sample/rules.py says what a rule is.

    A weight of 0 reports a rule without paying for it.
    """
    path, _, chosen = rules.rpartition(":")
    if not path.endswith(".py") or not chosen:
        raise BadInput(f"--rules={rules}: write FILE.py:name=weight,name=weight, such as sample/rules.py:finished=1,chinese=0.5")
    check_file("rules", path)
    spec = importlib.util.spec_from_file_location("rules", path)
    module = sys.modules["rules"] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as problem:
        raise BadInput(f"--rules: {path} cannot be run: {type(problem).__name__}: {' '.join(str(problem).split())[:200]}") from None
    known, loaded = {name: rule for name, rule in vars(module).items() if inspect.isfunction(rule) and not name.startswith("_")}, {}
    for name, _, weight in (part.strip().partition("=") for part in chosen.split(",")):
        if name not in known:
            near = "".join(f": did you mean {name}?" for name in difflib.get_close_matches(name, known, n=1))
            raise BadInput(f"--rules: {path} has no rule {name!r}{near or ', it has ' + ', '.join(known)}")
        try:
            loaded[name] = float(weight), known[name]
            inspect.signature(known[name]).bind("", "", True, {})
        except (ValueError, TypeError) as problem:
            what = "must take (prompt, answer, finished, record)" if isinstance(problem, TypeError) else f"needs a weight, such as {name}=1"
            raise BadInput(f"--rules: the rule {name} {what}") from None
        if not math.isfinite(loaded[name][0]):
            raise BadInput(f"--rules: the weight of {name} is {weight}, a finite number belongs there")
    return loaded


def run_rules(rules: dict, messages: list[dict], answer: str, finished: bool, record: dict, where: str) -> dict[str, float]:
    """{rule: what it says of an answer to messages}, before the weights; BadInput names rule and record (`where`) if one raises or gives no number."""
    said = {}
    for name, (_, rule) in rules.items():
        try:
            said[name] = float(rule(messages[-1]["content"], answer, finished, record))
        except Exception as problem:
            line = traceback.extract_tb(problem.__traceback__)[-1].lineno
            raise BadInput(f"{where}: the rule {name} raised {type(problem).__name__} in line {line}: {' '.join(str(problem).split())[:200]}") from None
        if not math.isfinite(said[name]):
            raise BadInput(f"{where}: the rule {name} gives {said[name]}, a finite number belongs there")
    return said


# ==== read rewards ====
def reward_ids(chat: Chat, messages: list[dict], answer: str, finished: bool) -> list[int]:
    """What a reward model reads: the dialogue up to the answer's stop token; of a cut answer up to its last token, and nothing behind it."""
    *prompt, (ids, _), _ = chat.encode([*messages, {"role": "assistant", "content": answer}])
    if not finished:
        ids = ids[:-1]  # the stop token; before it a template may have a blank or a line break of its own
        decoded = lambda ids: chat.tokenizer.decode(ids, skip_special_tokens=True)
        said = answer if answer in decoded(ids) else answer.strip()  # ziya strips it
        before = decoded(ids).rpartition(said)[0] if said else ""
        ids = ids if said else []  # cut before it said anything
        while said and decoded(ids[:-1]).startswith(before + said):
            ids = ids[:-1]
    return [i for part, _ in prompt for i in part] + ids


def read_batches(backbone, rows: list[list[int]], batch_size: int, value_of):
    """Yield (number of a row of token ids, its value), the longest first: value_of(numbers, hidden states (B, T, d), places of the last tokens) gives B."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    order = sorted(range(len(rows)), key=lambda number: -len(rows[number]))  # rows of like length go together: little padding
    for begin in range(0, len(rows), batch_size):
        batch = order[begin : begin + batch_size]
        ids = pad_sequence([torch.tensor(rows[number]) for number in batch], batch_first=True).to(backbone.device)  # (B, T), padded right with 0
        last = [len(rows[number]) - 1 for number in batch]
        mask = torch.arange(ids.shape[1]) <= torch.tensor(last)[:, None]  # from the lengths: an id that pads may also stand in a text
        with torch.inference_mode():
            hidden = backbone(input_ids=ids, attention_mask=mask.long().to(ids.device), use_cache=False).last_hidden_state
            values = value_of(batch, hidden, last)
        yield from zip(batch, values)


def read_rewards(model, rows: list[list[int]], batch_size: int):
    """Yield (number of the row, its reward), the longest first: each is read at its last token.

    `model` needs base_model (ids to hidden states) and score (hidden states to rewards). transformers reads at the last id that is no padding:
    where the stop token is the padding as well, a finished answer would get the reward of a cut one.
    """
    return read_batches(model.base_model, rows, batch_size, lambda batch, hidden, last: model.score(hidden[range(len(batch)), last].float())[:, 0].tolist())


# ==== adapter ====
def load_adapter(model, lora_path: str, model_name_or_path: str, allow_pickle: bool = False, name: str = "default"):
    """`model` with the LoRA adapter in a folder; BadInput if it was trained on another base or lacks a tensor."""
    import torch
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors.torch import load_file, save_file

    folder = Path(lora_path)
    file = folder / "adapter_model.safetensors"
    if not file.is_file():  # old Chinese-Vicuna checkpoints
        pickles = [folder / name for name in ("adapter_model.bin", "pytorch_model.bin") if (folder / name).is_file()]
        if not pickles or not allow_pickle:
            but = f" but a pickle, {pickles[0].name}, which can run code when it is loaded: if you trust it, --allow_pickle True converts it" if pickles else ""
            raise BadInput(f"{lora_path} holds no adapter_model.safetensors{but}")
    base = read_json(folder / "yangtuo.json").get("base_fingerprint") if (folder / "yangtuo.json").is_file() else None
    if base and base != (found := fingerprint(model_name_or_path)):
        raise BadInput(f"{lora_path} was trained on another base than {model_name_or_path} (fingerprint {str(base)[:12]}, this one has {str(found)[:12]})")
    try:
        if not file.is_file():
            weights = torch.load(pickles[0], map_location="cpu", weights_only=True)
            save_file({key.replace(".default.", "."): tensor.contiguous() for key, tensor in weights.items() if "lora_" in key}, file)
            print(f"converted {pickles[0]} to {file}", file=sys.stderr)
        given = set(load_file(file))
        if hasattr(model, "peft_config"):
            model.load_adapter(folder, adapter_name=name)
        else:
            model = PeftModel.from_pretrained(model, folder, adapter_name=name)
    except Exception as problem:  # peft raises RuntimeError, ValueError or KeyError, safetensors and pickle their own
        raise BadInput(f"{lora_path} does not fit {model_name_or_path}: of another base, or cut off? {str(problem)[:200]}") from None
    if missing := set(get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)) - given:
        raise BadInput(f"{lora_path} lacks {len(missing)} tensors, {min(missing)} for one")
    return model


if __name__ == "__main__":
    cli(main)
