"""What must not differ between the scripts: prompt text, label mask, windows and packing; data formats; the command line.

In the order in which a reader of a training step asks for it: templates, Chat (messages to token ids and mask), windows,
examples and packing; then records, what a row of a file becomes; then the command line and what is checked before anything
expensive. Nothing here imports torch, transformers or datasets at its head, so that a mistyped flag is refused before the
seconds that those take.
"""
import ast
import contextlib
import csv
import difflib
import functools
import hashlib
import importlib.util
import inspect
import itertools
import json
import logging
import os
import pprint
import random
import re
import shutil
import sys
import tempfile
import time
import typing
import warnings
from collections import Counter
from pathlib import Path

import fire


class BadInput(ValueError):
    """What the user gave cannot be used: one line that says what, where and how to mend it."""


class RunStopped(RuntimeError):
    """A run that had begun cannot go on, or ends early; `status` is the exit status."""

    def __init__(self, message: str, status: int = 1):
        super().__init__(message)
        self.status = status


IGNORE_INDEX = -100  # torch.nn.CrossEntropyLoss skips these positions


# ---- templates ----
class Template(typing.NamedTuple):
    """How a conversation is written: a Jinja chat template, whose {% generation %} blocks are what is trained."""

    jinja: str
    stop: str | None = None  # the token that ends an answer; None: the tokenizer's eos
    special_tokens: tuple[str, ...] = ()


_BEGIN = "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system, messages = messages[0].content, messages[1:] %}{% endif %}"
_OTHER_ROLE = "{% else %}{{ raise_exception('this template has no place for the role ' ~ message.role) }}{% endif %}{% endfor %}"
TEMPLATES = {
    "alpaca": Template(  # tatsu-lab/stanford_alpaca, with a line break after "### Response:" and many rounds
        _BEGIN + "{{ system or 'Below is an instruction that describes a task' ~ (', paired with an input that provides further "
        "context' if messages[0].input else '') ~ '. Write a response that appropriately completes the request.' }}"
        "{% for message in messages %}"
        "{% if message.role == 'user' and message.input and loop.first %}"
        "{{ '\\n\\n### Instruction:\\n' ~ message.content[:-(message.input | length) - 1] ~ '\\n\\n### Input:\\n' ~ message.input ~ '\\n\\n### Response:\\n' }}"
        "{% elif message.role == 'user' %}{{ '\\n\\n### Instruction:\\n' ~ message.content ~ '\\n\\n### Response:\\n' }}"
        "{% elif message.role == 'assistant' %}{% generation %}{{ message.content ~ eos_token }}{% endgeneration %}" + _OTHER_ROLE),
    "vicuna_chat": Template(  # Facico/Chinese-Vicuna, chat
        _BEGIN + "{{ (system or 'The following is a conversation between an AI assistant called Assistant and a human user called "
        "User. The assistant is intelligent, knowledgeable and polite to answer questions of user.') ~ '\\n\\n' }}"
        "{% for message in messages %}"
        "{% if message.role == 'user' %}{{ 'User:' ~ message.content ~ '\\n\\nAssistant:' }}"
        "{% elif message.role == 'assistant' %}{% generation %}{{ message.content ~ eos_token }}{% endgeneration %}{{ '\\n\\n' }}" + _OTHER_ROLE),
    "yayi": Template(  # wenge-research/YaYi
        _BEGIN.removeprefix("{{ bos_token }}") + "{{ '<|System|>:\\n' ~ (system or 'A chat between a human and an AI assistant named "
        "YaYi.\\nYaYi is a helpful and harmless language model developed by Beijing Wenge Technology Co.,Ltd.') ~ '\\n\\n' }}"
        "{% for message in messages %}"
        "{% if message.role == 'user' %}{{ '<|Human|>:\\n' ~ message.content ~ '\\n\\n<|YaYi|>:\\n' }}"
        "{% elif message.role == 'assistant' %}{% generation %}{{ message.content ~ '\\n\\n<|End|>' }}{% endgeneration %}" + _OTHER_ROLE,
        stop="<|End|>", special_tokens=("<|System|>", "<|Human|>", "<|YaYi|>", "<|End|>")),
    "chatml": Template(
        "{% for message in messages if message.content or message.role != 'system' %}{{ '<|im_start|>' ~ ('function' if message.role == 'tool' else message.role) ~ '\\n' }}"
        "{% if message.role == 'assistant' %}{% generation %}{{ message.content ~ '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ message.content ~ '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
        stop="<|im_end|>", special_tokens=("<|im_start|>", "<|im_end|>")),
    "ziya": Template(  # IDEA-CCNL/Ziya-LLaMA
        _BEGIN + "{{ system ~ '\\n' if system }}{% for message in messages %}"
        "{% if message.role == 'user' %}{{ '<human>:' ~ message.content.strip() ~ '\\n<bot>:' }}"
        "{% elif message.role == 'assistant' %}{% generation %}{{ message.content.strip() ~ eos_token }}{% endgeneration %}" + _OTHER_ROLE),
    "llama2_chinese": Template(  # LlamaFamily/Llama-Chinese; the blank before an answer is the answer's, as in llama2
        "{% for message in messages if message.content or message.role != 'system' %}"
        "{% if message.role in ('system', 'user') %}"
        "{{ bos_token ~ ('Human' if message.role == 'user' else 'System') ~ ': ' ~ message.content ~ '\\n' ~ eos_token }}"
        "{% elif message.role == 'assistant' %}{{ bos_token ~ 'Assistant:' }}"
        "{% generation %}{{ ' ' ~ message.content ~ '\\n' ~ eos_token }}{% endgeneration %}" + _OTHER_ROLE +
        "{% if add_generation_prompt %}{{ bos_token ~ 'Assistant:' }}{% endif %}"),
    "llama2": Template(  # meta-llama/llama
        _BEGIN.removeprefix("{{ bos_token }}") + "{% for message in messages %}"
        "{% if message.role == 'user' %}"
        "{{ bos_token ~ '[INST] ' ~ ('<<SYS>>\\n' ~ system ~ '\\n<</SYS>>\\n\\n' if system and loop.first else '') ~ message.content ~ ' [/INST]' }}"
        "{% elif message.role == 'assistant' %}{% generation %}{{ ' ' ~ message.content ~ ' ' ~ eos_token }}{% endgeneration %}" + _OTHER_ROLE),
    "plain": Template(  # the text itself, for a base model
        "{% for message in messages %}{% if message.role == 'assistant' %}{% generation %}{{ message.content ~ eos_token }}{% endgeneration %}"
        "{% else %}{{ message.content }}{% endif %}{% endfor %}"),
}
_ANCHOR = "\U000f1000"  # private use: a control token that no text spells, to tokenize what follows a control token
_SPLIT = "\U000f1001"  # put inside a control token that a text spells, so that the text stays text
SHORTEST = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]  # dialogue


class Chat:
    """A tokenizer with a template: messages to token ids, for training and for generation alike.

    Both read one Jinja text. A prompt is tokenized as it stands when the model is used, and the answer continues it:
    the ids of the whole text, except where a merge would cross the border (counted in `crossed`).
    """

    def __init__(self, tokenizer, template: str = "auto", last_round_only: bool = False):
        """Add the template's special tokens to `tokenizer` (`new_tokens` are those it lacked) and set its chat template.

        Args:
            tokenizer: A fast tokenizer of transformers.
            template: A name of TEMPLATES, or auto: the tokenizer's own chat template, else llama2_chinese.
            last_round_only: Train the last answer alone, for templates that rewrite earlier ones.
        """
        name = tokenizer.name_or_path
        if template == "auto" and not tokenizer.chat_template:
            template = "llama2_chinese"
        if template not in ("auto", *TEMPLATES):
            near = difflib.get_close_matches(template, TEMPLATES, n=1)
            raise BadInput(f"--template={template} is none of auto, {', '.join(TEMPLATES)}" + (f": did you mean {near[0]}?" if near else ""))
        if not tokenizer.is_fast or not tokenizer.eos_token:
            raise BadInput(f"the tokenizer in {name} lacks {'an eos_token' if tokenizer.is_fast else 'a fast version (tokenizer.json)'}")
        self.tokenizer, self.template, self.last_round_only = tokenizer, template, last_round_only
        self.new_tokens = []
        if template != "auto":
            special_tokens = list(TEMPLATES[template].special_tokens)
            self.new_tokens = [token for token in special_tokens if token not in tokenizer.get_vocab()]
            tokenizer.add_tokens(special_tokens, special_tokens=True)
            tokenizer.chat_template = TEMPLATES[template].jinja
            if template == "plain" and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]:  # a LLaMA begins every text with it
                tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
        self.jinja = tokenizer.get_chat_template()
        self.marked = re.search(r"{%-?\s*generation\b", self.jinja) is not None
        self.control = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.control_pattern = re.compile("(" + "|".join(map(re.escape, sorted(self.control, key=len, reverse=True))) + ")")
        self.text_tokenizer = _text_tokenizer(tokenizer)
        answer = self.encode(SHORTEST)[1][0]
        self.stops = answer[-1] in self.control.values()
        self.stop_ids = sorted({answer[-1] if self.stops else tokenizer.eos_token_id, tokenizer.eos_token_id})
        self.crossed = 0

    def encode(self, messages: list[dict], add_generation_prompt: bool = False) -> list[tuple[list[int], bool]]:
        """Token ids in pieces (ids, are they trained): prompt, answer, prompt, answer, ..., what follows the last."""
        pieces, before, start = [], "", []  # the text since the last control token, and its ids
        for text, trained in self._segments(messages, add_generation_prompt):
            ids = []
            for i, part in enumerate(self.control_pattern.split(text)):
                if i % 2:
                    ids.append(self.control[part])
                    before, start = _ANCHOR, self._text_ids(_ANCHOR)
                elif part:
                    part = part.replace(_SPLIT, "")
                    before, whole = before + part, self._text_ids(before + part)
                    ids += whole[len(start):] if whole[: len(start)] == start else self._apart(part)
                    start = whole
            pieces.append((ids, trained))
        return pieces

    def render(self, messages: list[dict], add_generation_prompt: bool = False) -> tuple[str, list[tuple[int, int]]]:
        """The text of a conversation and the character spans of its {% generation %} blocks."""
        import jinja2
        from transformers.utils.chat_template_utils import render_jinja_template

        guard = functools.partial(self.control_pattern.sub, lambda match: match[0][0] + _SPLIT + match[0][1:])
        guarded = [{key: text if key == "role" else guard(text) for key, text in message.items()} for message in messages
                   if message["role"] != "system" or message["content"]]
        try:
            texts, spans = render_jinja_template([guarded], chat_template=self.jinja, return_assistant_tokens_mask=self.marked,
                                                 add_generation_prompt=add_generation_prompt, **self.tokenizer.special_tokens_map)
        except jinja2.TemplateError as problem:
            raise BadInput(f"template {self.template}: {problem}") from None
        return texts[0], spans[0] if spans else []

    def _segments(self, messages: list[dict], add_generation_prompt: bool) -> list[tuple[str, bool]]:
        """The rendered text in pieces (text, is it trained), cut before each answer and behind its stop token."""
        text, spans = self.render(messages, add_generation_prompt)
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if self.last_round_only:
            answers, spans = answers[-1:], spans[-1:]
        if self.template == "auto":
            try:
                spans = self._spans_of_own_template(messages, text, spans, answers)
            except BadInput:
                if not add_generation_prompt:
                    raise
                spans = []  # a prompt may rewrite its history: it is not trained
        segments, end = [], 0
        for start, stop in spans:
            # Some templates leave the stop token outside of the block, others have a line break behind it inside
            stop = start + len(text[start:stop].rstrip()) if text[start:stop].rstrip().endswith(tuple(self.control)) else stop
            behind = self.control_pattern.match(text, stop)
            stop = behind.end() if behind and not text[start:stop].endswith(tuple(self.control)) else stop
            segments += [(text[end:start], False), (text[start:stop], True)]
            end = stop
        return segments + [(text[end:], False)]

    def _spans_of_own_template(self, messages, text, spans, answers) -> list[tuple[int, int]]:
        """Character spans of the answers: the template's generation blocks, else what each answer adds to the text.

        Either way the text before an answer must be the prompt that generation uses. Templates of thinking models drop
        the reasoning of earlier rounds; those cannot be trained on every round of one text.
        """
        added = []
        for i in answers:
            prompt, until = self.render(messages[:i], True)[0], self.render(messages[: i + 1])[0]
            if not text.startswith(prompt) or not text.startswith(until):
                raise BadInput(f"the chat template of {self.tokenizer.name_or_path} rewrites earlier rounds, so their answers "
                               f"cannot be trained in one text: add --last_round_only True, or choose a --template")
            added.append((len(prompt), len(until)))
        if len(spans) == len(added):
            return [(max(start, prompt), stop) for (start, stop), (prompt, _) in zip(spans, added)]
        return added

    def _apart(self, text: str) -> list[int]:
        """Ids of a text that would merge with what precedes it: tokenized behind something that it does not merge with."""
        self.crossed += 1
        for context in (_ANCHOR + "\n", _ANCHOR + "。"):
            start, whole = self._text_ids(context), self._text_ids(context + text)
            if whole[: len(start)] == start:
                return whole[len(start):]
        raise BadInput(f"the tokenizer in {self.tokenizer.name_or_path} cannot tokenize {text[:20]!r} apart from what precedes it")

    def _text_ids(self, text: str) -> list[int]:
        return self.text_tokenizer.encode(text, add_special_tokens=False).ids


def _text_tokenizer(tokenizer):
    """`tokenizer` as a tokenizers.Tokenizer that knows one control token, _ANCHOR: any other that a text spells is text."""
    from tokenizers import Tokenizer

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if not token["special"]]
    state["added_tokens"].append({"id": len(tokenizer) + 1, "content": _ANCHOR, "special": True, "normalized": False,
                                  "single_word": False, "lstrip": False, "rstrip": False})
    return Tokenizer.from_str(json.dumps(state | {"post_processor": None, "truncation": None, "padding": None}))


# ---- windows ----
def cut_dialogue(chat: Chat, messages: list[dict], max_length: int, counts: Counter):
    """Yield (ids, trained) of a dialogue: itself where it fits, else windows of whole rounds.

    Each window holds the system text, as many untrained rounds as fit, and before them as many earlier rounds as still
    fit for context, so that every answer is trained once. Where one round alone is too long its prompt gives way, down
    to a quarter of the window and from its middle, and then the answer is cut, without a stop token.
    """
    pieces = chat.encode(messages)
    counts["answers"] += sum(trained for _, trained in pieces)
    counts["answer_tokens"] += sum(len(ids) for ids, trained in pieces if trained)
    # what a template writes behind the last answer, a line break, may be cut off
    fits = lambda pieces: sum(len(ids) for ids, _ in pieces[:-1]) <= max_length
    if fits(pieces):
        yield _join(pieces, max_length)
        return
    system, rounds = messages[: messages[0]["role"] == "system"], [[]]
    for message in messages[len(system):]:
        rounds[-1].append(message)
        if message["role"] == "assistant":
            rounds.append([])
    encode = lambda first, last: chat.encode(system + [message for turn in rounds[first:last] for message in turn])
    end = len(rounds) - 1  # behind the last answer nothing stands
    begin = end - 1 if chat.last_round_only else 0
    while begin < end:
        first, last, pieces = begin, begin + 1, encode(begin, begin + 1)
        while last < end and fits(longer := encode(first, last + 1)):
            last, pieces = last + 1, longer
        while first > 0 and fits(longer := encode(first - 1, last)):
            first, pieces = first - 1, longer
        if not fits(pieces):
            (prompt, _), (answer, _), *_ = pieces
            room = min(len(prompt), max(max_length - len(answer), max_length // 4))
            counts["prompts_cut"] += room < len(prompt)
            counts["answers_cut"] += room + len(answer) > max_length
            pieces = [(prompt[: room - room // 2] + prompt[len(prompt) - room // 2:], False), (answer[: max_length - room], True)]
        counts["windows"] += begin > 0
        yield _join(pieces, max_length, context=0 if chat.last_round_only else begin - first)
        begin = last


def cut_document(chat: Chat, messages: list[dict], max_length: int, counts: Counter):
    """Yield (ids, trained) of a document for pretraining: itself where it fits, else windows that train each token once.

    The first token of an example is never a label, so a window begins with the last token of the one before.
    """
    ids, trained = _join(chat.encode(messages))
    counts["answers"] += 1
    counts["answer_tokens"] += sum(trained)
    for begin in range(0, max(1, len(ids) - 1), max_length - 1):
        counts["windows"] += begin > 0
        window = trained[begin : begin + max_length]
        yield ids[begin : begin + max_length], [answer and (place > 0 or begin == 0) for place, answer in enumerate(window)]


def _join(pieces: list, max_length: int | None = None, context: int = 0) -> tuple[list[int], list[bool]]:
    """Pieces as one example; the first `context` answers are only read."""
    ids, trained = [], []
    for piece, answer in pieces:
        ids += piece
        trained += [answer and context <= 0] * len(piece)
        context -= answer
    return ids[:max_length], trained[:max_length]


# ---- examples ----
def tokenize_records(data_path: str, chat: Chat, max_length: int, skip_bad_records: bool = False, unescape_newlines: bool = False,
                     document_separator: str | None = None):
    """(examples, counts) of a file, in file order, each of at most max_length tokens; from the cache where nothing changed.

    `examples` is a datasets.Dataset, mapped from the disk, so that a corpus may be larger than the memory. Its columns are
    input_ids, labels (IGNORE_INDEX where nothing is trained), record (number of the record in the file) and length. The cache
    is keyed by content: the bytes of data and tokenizer, the template, the flags above and our code.

    Args:
        document_separator: The file holds documents for pretraining; see numbered_records.
    """
    frame = sum(len(ids) for ids, _ in chat.encode(SHORTEST))
    if frame > max_length:
        raise BadInput(f"--max_length={max_length} is below the {frame} tokens of the shortest dialogue in template {chat.template}")
    if not chat.stops:
        raise BadInput(f"the chat template of {chat.tokenizer.name_or_path} ends an answer with no special token, so a model tuned with it "
                       f"would never stop: choose one with --template")
    from datasets import Dataset, Features, List, Value
    from datasets.exceptions import DatasetGenerationError
    from filelock import FileLock

    def read():
        notes = Counter()
        for number, record in numbered_records(data_path, skip_bad_records, unescape_newlines, notes, document_separator):
            yield {"number": number, "record": json.dumps(record), "counts": json.dumps(notes)}
            notes.clear()
        yield {"number": -1, "record": "", "counts": json.dumps(notes)}  # what was noted behind the last record

    flags = repr((chat.jinja, chat.last_round_only, max_length, skip_bad_records, unescape_newlines, document_separator))
    tokenizer = chat.tokenizer.backend_tokenizer.to_str() + repr(chat.tokenizer.special_tokens_map)
    parts = file_hash(data_path), Path(data_path).suffix, file_hash(__file__), tokenizer, flags
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:40]  # datasets adds to it and takes 64 at most
    folder = cache_folder() / "examples" / key
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):  # of several ranks one works, the others find it done
        try:
            records = Dataset.from_generator(read, Features(number=Value("int64"), record=Value("string"), counts=Value("string")),
                                             cache_dir=str(folder), fingerprint=key)
        except DatasetGenerationError as problem:
            raise problem.__cause__ from None
        workers = min(len(os.sched_getaffinity(0)), len(records) // 250)
        examples = records.map(
            functools.partial(_tokenize_batch, chat, cut_document if document_separator else cut_dialogue, max_length, skip_bad_records, data_path),
            batched=True, batch_size=250, num_proc=workers if workers > 1 else None, remove_columns=["number"], new_fingerprint=key,
            features=Features(input_ids=List(Value("int32")), labels=List(Value("int32")), record=Value("int64"), length=Value("int32"),
                              counts=Value("string")), desc=f"tokenizing {Path(data_path).name}")
    counts = sum((Counter(json.loads(text)) for text in examples["counts"] if text), Counter())
    if not counts["examples"]:
        raise BadInput(f"{data_path} holds nothing to train on: all its records were dropped")
    return examples.remove_columns("counts").select([e for e, length in enumerate(examples["length"]) if length]), counts


def _tokenize_batch(chat: Chat, cut, max_length: int, skip_bad_records: bool, data_path: str, batch: dict) -> dict[str, list]:
    """The examples of a batch of records, and an empty one behind them that holds what was counted on the way."""
    examples, counts = [], sum((Counter(json.loads(text)) for text in batch["counts"]), Counter())
    for number, record in zip(batch["number"], batch["record"]):
        if not record:
            continue
        try:
            found = list(cut(chat, json.loads(record)["messages"], max_length, counts))
        except BadInput as problem:  # the template has no place for a role
            if not skip_bad_records:
                raise BadInput(f"{data_path}, record {number}: {problem}") from None
            print(f"dropped {data_path}, record {number}: {problem}", file=sys.stderr)
            counts["refused"] += 1
            continue
        trainable = [(ids, trained) for ids, trained in found if any(trained)]
        counts.update(records=1, examples=len(trainable), dropped=len(found) - len(trainable), tokens=sum(len(ids) for ids, _ in trainable),
                      supervised_tokens=sum(sum(trained) for _, trained in trainable))
        examples += [(ids, [i if answer else IGNORE_INDEX for i, answer in zip(ids, trained)], number, len(ids), "") for ids, trained in trainable]
    return dict(zip(("input_ids", "labels", "record", "length", "counts"), map(list, zip(*examples, ([], [], -1, 0, json.dumps(counts))))))


def tokenize_documents(path: str, chat: Chat, max_length: int, skip_bad_records: bool = False, document_separator: str = "line"):
    """(examples, counts) of a file of documents, or of all files of a folder as one, with its records numbered on.

    What is tokenized once is kept file by file.
    """
    import numpy
    from datasets import concatenate_datasets

    parts = [tokenize_records(file, chat, max_length, skip_bad_records, False, document_separator) for file in document_files(path)]
    records = [numpy.asarray(examples.with_format("numpy")["record"][:]) for examples, _ in parts]
    before = numpy.cumsum([0] + [numbers[-1] + 1 for numbers in records])
    records = numpy.concatenate([numbers + first for numbers, first in zip(records, before)])
    examples = concatenate_datasets([examples.remove_columns("record") for examples, _ in parts]).add_column("record", records)
    return examples, sum((counts for _, counts in parts), Counter())


def pack(lengths: list[int], capacity: int) -> list[list[int]]:
    """Examples by block, whole and at most `capacity` tokens together: best-fit decreasing.

    Each bit of `free` says that some open block has that much room, so the tightest fit is found by two operations on
    one long integer, and a million examples take seconds.
    """
    by_room: list[list[list[int]]] = [[] for _ in range(capacity + 1)]
    free, blocks = 0, []
    for e in sorted(range(len(lengths)), key=lambda e: -lengths[e]):
        fitting = free >> lengths[e]
        if fitting:
            room = lengths[e] + (fitting & -fitting).bit_length() - 1
            block = by_room[room].pop()
            free ^= (not by_room[room]) << room
        else:
            room, block = capacity, []
            blocks.append(block)
        block.append(e)
        by_room[room - lengths[e]].append(block)
        free |= 1 << (room - lengths[e])
    return blocks


def hold_out(examples, eval_size: float, seed: int):
    """Numbers of the examples to train on and of those to evaluate on; all examples of one record go to one side.

    Args:
        eval_size: Records to hold out: a number, or a share below 1.
    """
    import numpy

    of_example = numpy.asarray(examples.with_format("numpy")["record"][:])
    records = numpy.unique(of_example)
    count = round(eval_size * len(records)) if 0 < eval_size < 1 else int(eval_size)
    if eval_size and not count:
        raise BadInput(f"--eval_size={eval_size} holds out no record of {len(records)}: give a larger share, or a number")
    if count < 0 or count >= len(records):
        raise BadInput(f"--eval_size={eval_size} leaves nothing to train on: the data has {len(records)} records")
    held = numpy.isin(of_example, records[sorted(random.Random(seed).sample(range(len(records)), count))])
    return numpy.flatnonzero(~held), numpy.flatnonzero(held)


def summarize(counts: Counter) -> str:
    """The line that a run prints before training, and the lines of what is odd in the data: the notes, keys of several words."""
    kept = counts["supervised_tokens"] / max(1, counts["answer_tokens"])
    lines = [f"{counts['records']:,} records, {counts['examples']:,} examples, {counts['tokens']:,} tokens, "
             f"{counts['supervised_tokens']:,} supervised ({kept:.1%} of all answer tokens), {counts['answers_cut']:,} answers "
             f"and {counts['prompts_cut']:,} prompts cut, {counts['dropped']:,} examples with nothing to train and "
             f"{counts['refused'] + counts['bad record (dropped)']:,} bad records dropped"]
    return "\n".join(lines + [f"  {count:,} x {note}" for note, count in sorted(counts.items()) if " " in note])


# ---- records ----
ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
         "yayi": "assistant", "bot": "assistant", "function_call": "assistant",
         "function": "tool", "observation": "tool", "tool": "tool"}
# UTF-8 read as Latin-1 or cp1252: the three bytes of a Chinese character become a letter of ä-é and two odd signs.
LATIN_MOJIBAKE = re.compile("(?:[ä-é][\u0080-\u00bfŒœŠšŸŽžƒˆ˜–-›€™]{2}){2}")


def read_records(path: str, *, skip_bad_records: bool = False, unescape_newlines: bool = False, notes: Counter | None = None):
    """Yield {"messages": [{"role", "content"}, ...]} for every record of a JSON, JSONL, CSV or Parquet file; see numbered_records."""
    return (record for _, record in numbered_records(path, skip_bad_records, unescape_newlines, notes))


def numbered_records(path: str, skip_bad_records: bool = False, unescape_newlines: bool = False, notes: Counter | None = None,
                     document_separator: str | None = None):
    """Yield (number of the record in the file, from 0; {"messages": [{"role", "content"}, ...]}).

    The schema is told from the keys of each record (sample/README.md shows them all). The user turn of an alpaca record
    with an `input` holds "instruction\\ninput", and the input once more as "input", for templates that set it apart.

    Args:
        skip_bad_records: Drop bad records and print how many, why, and the first three; else BadInput names the first.
        unescape_newlines: Turn a literal backslash and n into a line break.
        notes: Counts here what was odd but can be trained on (joined turns, empty answers, unknown columns, ...).
        document_separator: Read documents for pretraining: line or blank_line is what parts them in a .txt file.
    """
    notes = Counter() if notes is None else notes
    turns_of = document_turns if document_separator else row_turns
    bad, number = [], -1
    for number, row in enumerate(read_rows(path, notes, document_separator)):
        try:
            messages = clean_messages(turns_of(row, notes), unescape_newlines, notes)
            while messages and messages[-1]["role"] != "assistant":
                notes[f"trailing {messages.pop()['role']} turn (dropped)"] += 1
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


def read_rows(path: str, notes: Counter, document_separator: str | None = None):
    """Yield the rows of a file as dictionaries, before anything is known of their schema."""
    if not os.path.isfile(path):
        raise BadInput(f"{path} " + ("is a folder, a file is wanted" if os.path.isdir(path) else "does not exist"))
    if path.endswith(".parquet"):
        import pyarrow.parquet

        try:
            for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
                yield from batch.to_pylist()
        except (pyarrow.ArrowInvalid, OSError) as problem:
            raise BadInput(f"{path} is not whole Parquet: {str(problem).splitlines()[0]}") from None
    elif path.endswith(".csv"):
        csv.field_size_limit(2**31 - 1)
        try:
            yield from csv.DictReader(read_lines(path, notes), strict=True)
        except csv.Error as problem:
            raise BadInput(f"{path} is not whole CSV ({problem}): is it cut off, or a quotation mark not doubled?") from None
    elif path.endswith(".txt") and document_separator:
        for blank, lines in itertools.groupby(read_lines(path, notes), key=lambda line: not line.strip()):
            if not blank:
                yield from ({"text": text.rstrip("\r\n")} for text in (lines if document_separator == "line" else ["".join(lines)]))
    else:
        lines, begun = enumerate(read_lines(path, notes), 1), False
        for number, line in lines:
            if not line.strip():
                continue
            array = not begun and line.lstrip().startswith("[")  # it is parsed as a whole
            text, begun = line + "".join(rest for _, rest in lines) if array else line, True
            try:
                found = json.loads(text)
            except json.JSONDecodeError as problem:
                raise BadInput(f"{path}, line {number + problem.lineno - 1}: not whole JSON ({problem.msg}): is it cut off? "
                               f"A .json or .jsonl file holds one array, or one object a line") from None
            yield from found if array else [found]


def read_lines(path: str, notes: Counter):
    """Yield a file's lines with their ends, one at a time; it must be UTF-8, and a byte order mark is dropped and noted."""
    with open(path, "rb") as file:
        for number, data in enumerate(file, 1):
            try:
                line = data.decode("utf-8")
            except UnicodeDecodeError as problem:
                if "\ufffd" in data.decode("gb18030", "replace"):
                    raise BadInput(f"{path}, line {number}: its byte {problem.start} is not UTF-8") from None
                raise BadInput(f"{path}, line {number}: this is not UTF-8 but looks like GBK: mend it with "
                               f"iconv -f GB18030 -t UTF-8 {path} > new_file") from None
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
    notes.update(f"unknown column {key!r} (not used)" for key in row.keys() - {text, "context"})
    return [("user", row.get("context") or ""), ("assistant", row[text])]


def row_turns(row: dict, notes: Counter) -> list[tuple]:
    """The turns of one row as (role, text), or (role, instruction, input); the keys tell the schema."""
    if not isinstance(row, dict):
        raise BadInput(f"a {type(row).__name__} where an object {{...}} belongs")
    row = {key: value for key, value in row.items() if value is not None}
    turns = [("system", row["system"])] if row.get("system") else []
    if "messages" in row or "conversations" in row:
        name, role, text = known = ("messages", "role", "content") if "messages" in row else ("conversations", "from", "value")
        if not isinstance(row[name], list):
            raise BadInput(f"{name!r} is a {type(row[name]).__name__}, a list of turns belongs there")
        for turn in row[name]:
            if not isinstance(turn, dict) or turn.get(role) is None or turn.get(text) is None:
                raise BadInput(f"a turn of {name!r} lacks {role!r} or {text!r}: {str(turn)[:60]}")
            if turn[role] not in ROLES:
                raise BadInput(f"unknown role {turn[role]!r}; known are {', '.join(ROLES)}")
            turns.append((ROLES[turn[role]], turn[text]))
    elif isinstance(row.get("input"), list) or isinstance(row.get("prompt"), list):  # Chinese-Vicuna chat, Ziya
        name, *_ = known = ("input" if "input" in row else "prompt", "output", "task")
        if not isinstance(row.get("output"), list) or len(row["output"]) != len(row[name]):
            raise BadInput(f"{name!r} is a list of {len(row[name])} turns, so 'output' must be a list of as many answers")
        turns += [turn for user, answer in zip(row[name], row["output"]) for turn in (("user", user), ("assistant", answer))]
    elif "instruction" in row:
        known = ("instruction", "input", "output", "history")
        for pair in row.get("history") or []:
            if not isinstance(pair, list) or len(pair) != 2:
                raise BadInput("'history' must be a list of [user, answer] pairs")
            turns += [("user", pair[0]), ("assistant", pair[1])]
        turns.append(("user", row["instruction"], row["input"]) if row.get("input") else ("user", row["instruction"]))
        turns += [("assistant", row["output"])] if "output" in row else []
    elif "input" in row and "target" in row:  # Llama2-Chinese, two columns
        known = ("input", "target")
        turns += [("user", row["input"]), ("assistant", row["target"])]
    elif str(row.get("text", "")).lstrip().startswith("<s>"):  # Llama2-Chinese, one column
        known = ("text",)
        end = 0
        while match := re.compile(r"\s*<s>(Human|Assistant|System): (.*?)\n?</s>", re.S).match(row["text"], end):
            turns.append(({"Human": "user"}.get(match[1], match[1].lower()), match[2]))
            end = match.end()
        if row["text"][end:].strip():
            raise BadInput(f"'text' breaks the pattern <s>Human: ...\\n</s><s>Assistant: ...\\n</s> at {row['text'][end:end + 30]!r}")
    else:
        raise BadInput(f"no known schema: it has the keys {', '.join(map(str, row))}")
    notes.update(f"unknown column {key!r} (not used)" for key in row.keys() - {"system", *known})
    return turns


def clean_messages(turns: list[tuple], unescape_newlines: bool, notes: Counter) -> list[dict]:
    """Check the turns' texts and their order; what can be mended is mended and noted, the rest is BadInput."""
    messages: list[dict] = []
    for role, *texts in turns:
        texts = [clean_text(text, role, unescape_newlines, notes) for text in texts]
        message = {"role": role, "content": "\n".join(texts)} | ({"input": texts[1]} if len(texts) == 2 else {})
        if role == "system" and messages:
            raise BadInput("a system text that does not stand first")
        if role == "assistant" and not any(m["role"] != "system" for m in messages):
            notes["answer before any question (dropped)"] += 1
        elif messages and messages[-1]["role"] == role != "tool":
            notes[f"two {role} turns in a row (joined)"] += 1
            messages[-1] = {"role": role, "content": messages[-1]["content"] + "\n" + message["content"]}
        elif role != "system" or texts[0]:  # an empty system text is none
            messages.append(message)
        notes["empty answer"] += role == "assistant" and not texts[0].strip()
    return messages


def clean_text(text, role: str, unescape_newlines: bool, notes: Counter) -> str:
    """Check one text; BadInput if it is not a string or is mojibake, notes for what is only odd."""
    if not isinstance(text, str):
        raise BadInput(f"the {role} text is a {type(text).__name__}, a string belongs there: {str(text)[:60]}")
    if LATIN_MOJIBAKE.search(text) or "锟斤拷" in text or gbk_mojibake(text):
        raise BadInput(f"the {role} text is UTF-8 that was read in another encoding (mojibake): {text[:40]!r}")
    notes["byte order mark (dropped)"] += "\ufeff" in text
    notes["U+FFFD, a character lost in an earlier conversion"] += "\ufffd" in text
    if "\\n" in text:
        notes["literal \\n in a text" + " (mended)" * unescape_newlines] += 1
        text = text.replace("\\r\\n", "\n").replace("\\n", "\n") if unescape_newlines else text
    return text.replace("\ufeff", "")


def gbk_mojibake(text: str) -> bool:
    """Whether a run of Chinese, taken back to GBK bytes, is UTF-8: UTF-8 read as GBK turns 你好 into 浣犲ソ."""
    for run in re.finditer("[\u4e00-\u9fff]{6,60}", text):
        for data in (run[0].encode("gb18030")[start:] for start in range(3)):  # the run may begin inside a character
            if re.fullmatch("[\u3000-\u9fff\uff00-\uffef]+", data[: len(data) // 3 * 3].decode("utf-8", "replace")):
                return True
    return False


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
    for name in texts.keys() - kinds.keys():
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
    for literal in (part for part in (kind, *typing.get_args(kind)) if typing.get_origin(part) is typing.Literal):
        choices = {str(choice): choice for choice in typing.get_args(literal)}
        if text not in choices:
            raise BadInput(f"--{name}={text} is not one of {', '.join(choices)}")
        return choices[text]
    words = re.findall(r"\w+", str(kind))  # "int | None", "<class 'float'>", "dict[str, Any] | str | None"
    if "None" in words and text == "None":
        return None
    if "bool" in words and text.lower() in ("true", "false"):
        return text.lower() == "true"
    for word, convert in (("int", int), ("float", float), ("str", str)):
        if word in words:
            with contextlib.suppress(ValueError):
                return convert(text)
    wanted = "True or False" if "bool" in words else "a whole number" if "int" in words else "a number"
    raise BadInput(f"--{name}={text} is not {wanted}")


def training_argument_kinds() -> dict[str, str]:
    """{field: source of its annotation} of transformers.TrainingArguments, read from the file: an import takes 5 s."""
    path = Path(importlib.util.find_spec("transformers").origin).with_name("training_args.py")
    classes = [node for node in ast.parse(path.read_text("utf-8")).body if isinstance(node, ast.ClassDef)]
    fields = next(c.body for c in classes if c.name == "TrainingArguments")
    return {f.target.id: ast.unparse(f.annotation) for f in fields if isinstance(f, ast.AnnAssign)}


def show(flags: dict) -> None:
    """Print what a run is started with, once for all ranks."""
    if os.environ.get("RANK", "0") == "0":
        pprint.pprint(flags, stream=sys.stderr)


# ---- checks ----
def check_positive(**flags: float) -> None:
    """BadInput if one of the flags is not above zero."""
    for name, value in flags.items():
        if value <= 0:
            raise BadInput(f"--{name}={value} must be above zero")


def check_file(flag: str, path: str | None) -> None:
    """BadInput if the path of a flag is given and is not that of a file with something in it."""
    if path is not None and not os.path.isfile(path):
        raise BadInput(f"--{flag}={path} " + ("is a folder, a file is wanted" if os.path.isdir(path) else "does not exist"))
    if path is not None and not os.path.getsize(path):
        raise BadInput(f"--{flag}={path} is empty")


def check_adapter(lora_path: str | None) -> None:
    """BadInput if a folder is given that is no adapter."""
    if lora_path and not Path(lora_path, "adapter_config.json").is_file():
        raise BadInput(f"--lora_path={lora_path} " + ("is no adapter: it has no adapter_config.json" if os.path.isdir(lora_path) else "does not exist"))


def check_model(model_name_or_path: str, allow_pickle: bool = False, quantized: bool = False) -> None:
    """BadInput if a folder cannot be loaded as a model, of quantize_gptq.py's too if `quantized`; a name that is no folder is left to the hub."""
    folder = Path(model_name_or_path)
    if not folder.is_dir():
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", model_name_or_path) or folder.parent.is_dir():
            raise BadInput(f"{model_name_or_path} does not exist: give a model folder, or a name on the hub such as Qwen/Qwen2.5-7B")
        return
    names = {file.name for file in folder.iterdir()}
    held = ", ".join(sorted(names)[:8]) or "nothing"
    if "config.json" not in names:
        what = "is a LoRA adapter: give its base as the model and this as --lora_path" if "adapter_config.json" in names else "has no config.json, so it is no model"
        raise BadInput(f"{folder} {what} (it holds {held})")
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
            raise BadInput(f"{folder} holds no weights (*.safetensors): it holds {held}")
        if not allow_pickle:
            raise BadInput(f"{folder} has its weights as a pickle ({pickles[0]}), which can run code when it is loaded: if you trust "
                           f"it, add --allow_pickle True")


def check_output_dir(output_dir: str, resume: bool | None = None) -> None:
    """BadInput if output_dir holds something and this run is not to go on with it; None: it is of a script that cannot."""
    folder = Path(output_dir)
    existing = next(parent for parent in (folder, *folder.resolve().parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise BadInput(f"--output_dir={output_dir}: {existing} is " + ("not a folder" if not existing.is_dir() else "not writable"))
    begun = {"run.json", ".saving", "runs"} if resume is not None else set()  # of a run that never came to its first checkpoint
    if not resume and folder.is_dir() and any(file.name not in begun for file in folder.iterdir()):
        raise BadInput(f"--output_dir={output_dir} holds another run: " + "go on with it by --resume True, or " * (resume is not None) + "give a new folder")


def write_facts(output_dir: str, facts: dict) -> None:
    """Note in run.json what the run that begins is made of, for resume_point."""
    if os.environ.get("RANK", "0") == "0":
        os.makedirs(output_dir, exist_ok=True)
        Path(output_dir, "run.json").write_text(json.dumps(facts, indent=2, ensure_ascii=False), "utf-8")


def resume_point(output_dir: str, facts: dict) -> str | None:
    """The last whole checkpoint in output_dir; BadInput if run.json says that the run there was begun with other facts.

    A checkpoint is whole if its trainer_state.json, which Trainer writes last, can be read, and the states of the random
    numbers of every rank are there, for which it does not wait.
    """
    folders = sorted(Path(output_dir).glob("checkpoint-*[0-9]"), key=lambda folder: -int(folder.name.rpartition("-")[2]))
    begun = json.loads(Path(output_dir, "run.json").read_text("utf-8")) if folders and Path(output_dir, "run.json").is_file() else {}
    for name in begun.keys() & facts.keys() - {"base"}:
        if begun[name] != facts[name]:
            raise BadInput(f"--resume: {output_dir} was begun with {name} = {begun[name]}, now it is {facts[name]}: give the same, or a new --output_dir")
    states = [f"rng_state_{rank}.pth" for rank in range(facts["world_size"])] if facts["world_size"] > 1 else ["rng_state.pth"]
    for folder in folders:
        with contextlib.suppress(OSError, ValueError):
            json.loads((folder / "trainer_state.json").read_text("utf-8"))
            if all((folder / state).is_file() for state in states):
                return str(folder)
        if os.environ.get("RANK", "0") == "0":
            print(f"{folder} is not whole: looking for the checkpoint before it", file=sys.stderr)


# ---- files ----
def cache_folder() -> Path:
    """Where tokenized data and the default model are kept: $YANGTUO_CACHE, else ~/.cache/yangtuo."""
    return Path(os.environ.get("YANGTUO_CACHE") or Path.home() / ".cache" / "yangtuo")


@contextlib.contextmanager
def whole_folder(folder: Path):
    """A folder that is there whole or not at all: write to the path this yields, it is renamed at the end."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name[:40]}-", dir=folder.parent) as unfinished:
        (whole := Path(unfinished, "whole")).mkdir()  # unfinished itself is closed to everyone else
        yield whole
        if not folder.is_dir():
            whole.rename(folder)


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


# ---- training: what needs no torch ----
def can_pack(config, max_length: int) -> bool:
    """Whether documents can be kept apart in one row of a model with this configuration (of transformers).

    Not where a sliding window is shorter than max_length or layers are of another kind; BadInput where the logits are
    changed behind the head, which our loss would leave out.
    """
    if changed := [name for name in ("final_logit_softcapping", "logit_scale", "logits_scaling") if getattr(config, name, None) not in (None, 1, 1.0)]:
        raise BadInput(f"models of the kind {config.model_type} change their logits ({changed[0]}), which the loss here would leave out")
    others = set(getattr(config, "layer_types", None) or []) - {"full_attention"} or getattr(config, "attn_logit_softcapping", None)
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    return (window or max_length) >= max_length and not (others and not window)


def read_examples(flags: dict, chat: Chat):
    """(examples, counts, numbers of those to train on, of those to evaluate on): of data_path, and of eval_path behind them."""
    from datasets import concatenate_datasets

    reading = {name: flags[name] for name in ("max_length", "skip_bad_records", "unescape_newlines", "document_separator") if name in flags}
    read = tokenize_documents if "document_separator" in flags else tokenize_records
    examples, counts = read(flags["data_path"], chat, **reading)
    train_on, evaluate_on = hold_out(examples, flags["eval_size"], flags["seed"])
    if flags["eval_path"]:
        examples = concatenate_datasets([examples, read(flags["eval_path"], chat, **reading)[0]])
        evaluate_on = range(len(train_on), len(examples))
    return examples, counts, train_on, evaluate_on


def run_facts(flags: dict, **found) -> dict:
    """What a run must have in common with the one it goes on from: its data and base, the flags that make the weights, and what was found."""
    may_change = {"output_dir", "resume", "num_train_epochs", "early_stopping_patience", "training_arguments", "trust_remote_code", "allow_pickle",
                  "model_name_or_path", "data_path", "eval_path", "per_device_train_batch_size", "gradient_accumulation_steps"}
    hashed = {name: [file_hash(file) for file in document_files(flags[name])] for name in ("data_path", "eval_path") if flags[name]}
    blocks = flags["per_device_train_batch_size"] * flags["gradient_accumulation_steps"]  # one can be traded for the other
    return {name: value for name, value in flags.items() if name not in may_change} | hashed | found | {
        "blocks_per_rank_and_step": blocks, "base": flags["model_name_or_path"], "base_fingerprint": fingerprint(flags["model_name_or_path"])}


def make_blocks(lengths: list[int], chosen, max_length: int, packing: bool, shuffle: bool, multiple_of: int) -> list[list[int]]:
    """The chosen examples by block of max_length tokens, and empty blocks up to a multiple of the global batch.

    Without those, accelerate would train some blocks twice to make the ranks even; with them batch, accumulation and ranks
    can be traded for one another. Where the order of the data is kept, a block ends where the next example does not fit.
    """
    chosen, blocks, room = list(map(int, chosen)), [], 0
    if packing and shuffle:
        blocks = [[chosen[i] for i in block] for block in pack([lengths[e] for e in chosen], max_length)]
    else:
        for e in chosen:
            if lengths[e] > room or not packing:
                blocks.append([])
                room = max_length
            blocks[-1].append(e)
            room -= lengths[e]
    return blocks + [[] for _ in range(-len(blocks) % multiple_of)]


def describe(blocks: list[list[int]], lengths: list[int], args) -> str:
    """What one step trains on; `args` are transformers' TrainingArguments."""
    batch, accumulation, ranks = args.per_device_train_batch_size, args.gradient_accumulation_steps, args.world_size
    steps = len(blocks) // (batch * accumulation * ranks)
    tokens = sum(lengths[e] for block in blocks for e in block)
    return (f"global batch = {batch} blocks x {accumulation} accumulation x {ranks} ranks = {batch * accumulation * ranks} blocks, about "
            f"{sum(map(len, blocks)) / steps:.0f} examples and {tokens / steps:,.0f} tokens; {steps} steps an epoch")


def check_run(flags: dict) -> dict:
    """What can be refused before torch is imported; then the flags are shown. Returns what transformers.TrainingArguments takes."""
    given, evaluates = dict(flags["training_arguments"]), bool(flags["eval_path"] or flags["eval_size"])
    for flag in ("data_path", "eval_path"):
        if "document_separator" not in flags or not os.path.isdir(flags[flag] or ""):  # documents may be a folder of files
            check_file(flag, flags[flag])
    check_model(flags["model_name_or_path"], flags["allow_pickle"])
    check_output_dir(flags["output_dir"], flags["resume"])
    check_positive(**{name: flags[name] for name in ("max_length", "per_device_train_batch_size", "gradient_accumulation_steps", "lora_r") if name in flags})
    ours = {"bf16": "precision", "fp16": "precision", "activation_checkpointing": "gradient_checkpointing", "resume_from_checkpoint": "resume",
            "train_sampling_strategy": "shuffle"} | dict.fromkeys(("auto_find_batch_size", "label_smoothing_factor", "use_liger_kernel", "torch_compile",
                                                                   "remove_unused_columns", "do_train"))
    for name in given.keys() & ours:
        raise BadInput(f"--{name} is not taken here" + (f": use --{ours[name]}" if ours[name] else ": the loss and the batches are our own"))
    if flags["eval_path"] and flags["eval_size"]:
        raise BadInput("--eval_path and --eval_size are two ways to say what to evaluate on: give one")
    for name, value in (("eval_strategy", given.get("eval_strategy", "no")), ("early_stopping_patience", flags["early_stopping_patience"])):
        if value not in ("no", 0) and not evaluates:
            raise BadInput(f"--{name}={value} needs something to evaluate on: add --eval_path or --eval_size")
    trackers = str(given.get("report_to") or "none").split(",")
    for tracker in set(trackers) - {"none", "all"}:
        if importlib.util.find_spec(tracker) is None:
            raise BadInput(f"--report_to={tracker} needs a package that is missing: pip install {tracker}")
    if "deepspeed" in given:
        check_deepspeed(given["deepspeed"])
    show(flags)
    settings = {name: flags[name] for name in ("output_dir", "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs",
                                               "learning_rate", "lr_scheduler_type", "warmup_steps", "seed")}
    settings |= {"logging_steps": 10, "logging_first_step": True, "save_steps": 200, "save_total_limit": 2, "eval_strategy": "steps" if evaluates else "no",
                 "eval_steps": given.get("save_steps", 200), "per_device_eval_batch_size": flags["per_device_train_batch_size"],
                 "ddp_find_unused_parameters": False, "remove_unused_columns": False, "logging_nan_inf_filter": False,
                 "train_sampling_strategy": "random" if flags["shuffle"] else "sequential"}
    if flags["early_stopping_patience"]:
        settings |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "restore_callback_states_from_checkpoint": True}
    if flags["gradient_checkpointing"]:
        settings |= {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}}
    return settings | given | {"report_to": trackers}


def check_deepspeed(path: str) -> None:
    """BadInput if a DeepSpeed file would overrule the flags in silence, or cannot be read."""
    check_file("deepspeed", path)
    if "LOCAL_RANK" not in os.environ:
        raise BadInput("--deepspeed needs torchrun: use the wrapper in scripts/, or put torchrun --nproc_per_node 1 in front of the script")
    try:
        sections = json.loads(Path(path).read_text("utf-8"))
    except json.JSONDecodeError as problem:
        raise BadInput(f"--deepspeed={path}, line {problem.lineno}: not JSON ({problem.msg})") from None
    for section in {"optimizer", "scheduler"} & sections.keys():
        raise BadInput(f"--deepspeed={path} has a section {section!r}, which would overrule the flags (--learning_rate, --optim, --lr_scheduler_type, "
                       f"--warmup_steps): remove it, the flags say it all")


def check_disk(output_dir, needed: float) -> None:
    """BadInput if the disk of output_dir has fewer than `needed` bytes free."""
    free = shutil.disk_usage(next(folder for folder in (Path(output_dir), *Path(output_dir).resolve().parents) if folder.exists())).free
    if free < needed:
        raise BadInput(f"--output_dir={output_dir} has {free / 1e9:.1f} GB free, checkpoints and result need {needed / 1e9:.1f} GB: free some space, "
                       f"or lower --save_total_limit")


def explain(problem: BaseException, args, step: int) -> RunStopped | None:
    """What to do about a lack of memory or a lost machine, in the order of what costs least, or after Ctrl-C; None for anything else."""
    if isinstance(problem, KeyboardInterrupt):
        return RunStopped(f"stopped in step {step}; the last checkpoint in {args.output_dir} stays: go on with --resume True", status=130)
    said, batch = str(problem).split("\n")[0][:150], args.per_device_train_batch_size
    if "out of memory" in said or "can't allocate memory" in said:
        remedies = [f"--per_device_train_batch_size {batch // 2} --gradient_accumulation_steps {args.gradient_accumulation_steps * 2}"] * (batch > 1)
        remedies += ["--gradient_checkpointing True"] * (not args.activation_checkpointing)
        remedies += ["a smaller --max_length", "--optim adamw_8bit", "with several GPUs --deepspeed ds_configs/zero3.json, with much RAM "
                     "ds_configs/zero3_offload.json"] * (not args.deepspeed) + ["finetune_lora.py, with --bits 4 at the last"]
        return RunStopped(f"out of memory in step {step} ({said}). What to change, cheapest first: {'; '.join(remedies)}")
    if args.world_size > 1 and re.search("timed out|connection (closed|reset)|broken pipe|peer", str(problem), re.IGNORECASE):
        return RunStopped(f"another rank has died or cannot be reached ({said}): look at its messages, then start all of them again with --resume True; "
                          f"--ddp_timeout sets how many seconds to wait ({args.ddp_timeout} now)")


def check_ranks(args, facts: dict) -> None:
    """BadInput if another rank trains on something else."""
    import torch

    everyone = [facts] * args.world_size
    if args.world_size > 1:
        torch.distributed.all_gather_object(everyone, facts)
    for rank, name in ((rank, name) for rank in range(args.world_size) for name in facts if everyone[rank][name] != everyone[0][name]):
        raise BadInput(f"rank {rank} has another {name} than rank 0 ({everyone[rank][name]}, not {everyone[0][name]}): give every machine the same files")


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


