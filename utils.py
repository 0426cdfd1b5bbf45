"""What must not differ between the scripts: prompt text, label mask, windows and packing; data formats; the command line.

In the order in which a reader of a training step asks for it: templates, Chat (messages to token ids and mask), windows,
examples and packing; then records, what a row of a file becomes; then the command line and what is checked before anything
expensive. Nothing here imports torch or transformers at its head, so that a mistyped flag is refused before the seconds
that those take.
"""
import ast
import contextlib
import csv
import dataclasses
import difflib
import functools
import hashlib
import importlib.util
import inspect
import itertools
import json
import logging
import multiprocessing
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
from array import array
from collections import Counter
from pathlib import Path

import fire
import numpy


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
        "{% for message in messages %}{{ '<|im_start|>' ~ ('function' if message.role == 'tool' else message.role) ~ '\\n' }}"
        "{% if message.role == 'assistant' %}{% generation %}{{ message.content ~ '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ message.content ~ '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
        stop="<|im_end|>", special_tokens=("<|im_start|>", "<|im_end|>")),
    "ziya": Template(  # IDEA-CCNL/Ziya-LLaMA
        _BEGIN + "{{ system ~ '\\n' if system }}{% for message in messages %}"
        "{% if message.role == 'user' %}{{ '<human>:' ~ message.content.strip() ~ '\\n<bot>:' }}"
        "{% elif message.role == 'assistant' %}{% generation %}{{ message.content.strip() ~ eos_token }}{% endgeneration %}" + _OTHER_ROLE),
    "llama2_chinese": Template(  # LlamaFamily/Llama-Chinese
        "{% for message in messages %}"
        "{% if message.role in ('system', 'user') %}"
        "{{ bos_token ~ ('Human' if message.role == 'user' else 'System') ~ ': ' ~ message.content ~ '\\n' ~ eos_token }}"
        "{% elif message.role == 'assistant' %}{{ bos_token ~ 'Assistant: ' }}"
        "{% generation %}{{ message.content ~ '\\n' ~ eos_token }}{% endgeneration %}" + _OTHER_ROLE +
        "{% if add_generation_prompt %}{{ bos_token ~ 'Assistant: ' }}{% endif %}"),
    "llama2": Template(  # meta-llama/llama
        _BEGIN.removeprefix("{{ bos_token }}") + "{% for message in messages %}"
        "{% if message.role == 'user' %}"
        "{{ bos_token ~ '[INST] ' ~ ('<<SYS>>\\n' ~ system ~ '\\n<</SYS>>\\n\\n' if system and loop.first else '') ~ message.content ~ ' [/INST] ' }}"
        "{% elif message.role == 'assistant' %}{% generation %}{{ message.content ~ ' ' ~ eos_token }}{% endgeneration %}" + _OTHER_ROLE),
    "plain": Template(  # the text itself, for a base model
        "{% for message in messages %}{% if message.role == 'assistant' %}{% generation %}{{ message.content ~ eos_token }}{% endgeneration %}"
        "{% else %}{{ message.content }}{% endif %}{% endfor %}"),
}
_ANCHOR = "\U000f1000"  # private use: a control token that no text spells, to tokenize what follows a control token
_SPLIT = "\U000f1001"  # put inside a control token that a text spells, so that the text stays text


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
        self.ids_of: dict[str, list[int]] = {}
        self.crossed = 0
        answer = self.encode([{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}])[1][0]
        if answer[-1] not in self.control.values():
            raise BadInput(f"the chat template of {name} ends an answer with no special token, so a model tuned with it "
                           f"would never stop: choose one with --template")
        self.stop_ids = sorted({answer[-1], tokenizer.eos_token_id})
        self.crossed = 0

    def encode(self, messages: list[dict], add_generation_prompt: bool = False) -> list[tuple[list[int], bool]]:
        """Token ids in pieces (ids, are they trained): prompt, answer, prompt, answer, ..., what follows the last."""
        return self._ids(self._plan(self._segments(messages, add_generation_prompt)))

    def encode_batch(self, conversations: list[list[dict]]) -> list[list[tuple[list[int], bool]]]:
        """encode() of many conversations: their texts are tokenized in parallel, by the threads of `tokenizers`."""
        plans = [self._plan(self._segments(messages)) for messages in conversations]
        texts = list({t for plan in plans for steps, _ in plan for step in steps if not isinstance(step, int)
                      for t in (step[0], step[0] + step[1])})
        encodings = self.text_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        self.ids_of = {text: encoding.ids for text, encoding in zip(texts, encodings)}
        return [self._ids(plan) for plan in plans]

    def render(self, messages: list[dict], add_generation_prompt: bool = False) -> tuple[str, list[tuple[int, int]]]:
        """The text of a conversation and the character spans of its {% generation %} blocks."""
        import jinja2
        from transformers.utils.chat_template_utils import render_jinja_template

        guard = functools.partial(self.control_pattern.sub, lambda match: match[0][0] + _SPLIT + match[0][1:])
        guarded = [{key: text if key == "role" else guard(text) for key, text in message.items()} for message in messages]
        try:
            texts, spans = render_jinja_template([guarded], chat_template=self.jinja, return_assistant_tokens_mask=self.marked,
                                                 add_generation_prompt=add_generation_prompt, **self.tokenizer.special_tokens_map)
        except jinja2.TemplateError as problem:
            raise BadInput(f"template {self.template}: {problem}") from None
        return texts[0], spans[0] if spans else []

    def _segments(self, messages: list[dict], add_generation_prompt: bool = False) -> list[tuple[str, bool]]:
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

    def _plan(self, segments: list[tuple[str, bool]]) -> list[tuple[list, bool]]:
        """Each segment as steps: the id of a control token, or (text since the last control token, text to add)."""
        plan, before = [], ""
        for text, trained in segments:
            steps = []
            for i, piece in enumerate(self.control_pattern.split(text)):
                if i % 2:
                    steps.append(self.control[piece])
                    before = _ANCHOR
                elif piece:
                    piece = piece.replace(_SPLIT, "")
                    steps.append((before, piece))
                    before += piece
            plan.append((steps, trained))
        return plan

    def _ids(self, plan: list[tuple[list, bool]]) -> list[tuple[list[int], bool]]:
        return [([i for step in steps for i in ([step] if isinstance(step, int) else self._continue(*step))], trained)
                for steps, trained in plan]

    def _continue(self, before: str, text: str) -> list[int]:
        """Ids of `text` where it continues `before`, whose ids are given: no merge across the border, no blank before it."""
        for context in (before, _ANCHOR + "\n", _ANCHOR + "。"):
            start, whole = self._text_ids(context), self._text_ids(context + text)
            if whole[: len(start)] == start:
                return whole[len(start):]
            self.crossed += context == before
        raise BadInput(f"the tokenizer in {self.tokenizer.name_or_path} cannot tokenize {text[:20]!r} apart from what precedes it")

    def _text_ids(self, text: str) -> list[int]:
        if len(self.ids_of) > 20_000:
            self.ids_of.clear()
        if text not in self.ids_of:
            self.ids_of[text] = self.text_tokenizer.encode(text, add_special_tokens=False).ids if text else []
        return self.ids_of[text]


def _text_tokenizer(tokenizer):
    """`tokenizer` as a tokenizers.Tokenizer that knows one control token, _ANCHOR: any other that a text spells is text."""
    from tokenizers import Tokenizer

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if not token["special"]]
    state["added_tokens"].append({"id": len(tokenizer) + 1, "content": _ANCHOR, "special": True, "normalized": False,
                                  "single_word": False, "lstrip": False, "rstrip": False})
    return Tokenizer.from_str(json.dumps(state | {"post_processor": None, "truncation": None, "padding": None}))


# ---- examples ----
@dataclasses.dataclass
class Examples:
    """Tokenized examples, end to end in flat arrays (memory-mapped from the cache) with what was found on the way."""

    input_ids: numpy.ndarray  # (N,) int32, N tokens in all
    supervised: numpy.ndarray  # (N,) bool: is the token trained
    starts: numpy.ndarray  # (E + 1,) int64: example e is [starts[e], starts[e + 1])
    records: numpy.ndarray  # (E,) int64: number of the record that example e comes from
    counts: dict

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, e: int) -> dict[str, list[int]]:
        span = slice(self.starts[e], self.starts[e + 1])
        ids, supervised = self.input_ids[span].tolist(), self.supervised[span].tolist()
        labels = [i if trained else IGNORE_INDEX for i, trained in zip(ids, supervised)]
        return {"input_ids": ids, "labels": labels, "record": int(self.records[e])}

    @property
    def lengths(self) -> numpy.ndarray:
        return self.starts[1:] - self.starts[:-1]


class JoinedExamples:
    """The examples of several files as if they were one; records are numbered on."""

    def __init__(self, parts: list[Examples]):
        self.parts = parts
        self.firsts = numpy.cumsum([0] + [len(part) for part in parts])  # first example of each part
        self.lengths = numpy.concatenate([part.lengths for part in parts])
        before = numpy.cumsum([0] + [int(part.records[-1]) + 1 for part in parts])
        self.records = numpy.concatenate([part.records + first for part, first in zip(parts, before)])
        notes = sum((Counter(part.counts["notes"]) for part in parts), Counter())
        self.counts = {key: sum(part.counts[key] for part in parts) for key in parts[0].counts if key != "notes"} | {"notes": dict(notes)}

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, e: int) -> dict[str, list[int]]:
        part = int(numpy.searchsorted(self.firsts, e, "right")) - 1
        return self.parts[part][e - int(self.firsts[part])] | {"record": int(self.records[e])}


def tokenize_records(data_path: str, chat: Chat, max_length: int, skip_bad_records: bool = False,
                     unescape_newlines: bool = False, document_separator: str | None = None) -> Examples:
    """The examples of a file in file order, each of at most max_length tokens; from the cache where nothing changed.

    The cache is keyed by content: the bytes of data and tokenizer, the template, the flags above and our code. It is
    written as it is made and read through the page cache, so a corpus may be larger than the memory.

    Args:
        document_separator: The file holds documents for pretraining; see numbered_records.
    """
    from tqdm import tqdm

    shortest = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    if (frame := sum(len(ids) for ids, _ in chat.encode(shortest))) > max_length:
        raise BadInput(f"--max_length={max_length} is below the {frame} tokens of the shortest dialogue in template {chat.template}")
    flags = repr((chat.jinja, chat.last_round_only, max_length, skip_bad_records, unescape_newlines, document_separator))
    tokenizer = chat.tokenizer.backend_tokenizer.to_str() + repr(chat.tokenizer.special_tokens_map)
    parts = file_hash(data_path), Path(data_path).suffix, file_hash(__file__), tokenizer, flags
    folder = cache_folder() / "examples" / hashlib.sha256("\n".join(parts).encode()).hexdigest()
    while int(os.environ.get("LOCAL_RANK", 0)) and not folder.is_dir():  # the first rank of the machine makes it; torchrun ends us if it cannot
        time.sleep(0.2)
    if not folder.is_dir():
        lengths, numbers, counts, notes = array("q", [0]), array("q"), Counter(), Counter()
        rows = numbered_records(data_path, skip_bad_records, unescape_newlines, notes, document_separator)
        rows = iter(tqdm(rows, f"tokenizing {Path(data_path).name}", unit=" records"))
        batches = iter(lambda: list(itertools.islice(rows, 250)), [])
        global _job  # what the forked workers inherit, rather than a pickled tokenizer with every batch
        cut = cut_document if document_separator else cut_dialogue
        _job = functools.partial(_tokenize_batch, chat, cut, max_length, skip_bad_records, data_path)
        with (whole_folder(folder) as unfinished, open(unfinished / "input_ids", "wb") as input_ids, open(unfinished / "supervised", "wb") as supervised,
              multiprocessing.get_context("fork").Pool(len(os.sched_getaffinity(0))) as pool):
            for batch in pool.imap(_run_job, batches):
                batch[0].tofile(input_ids)
                supervised.write(batch[1])
                counts.update(batch[4] | {"supervised_tokens": sum(batch[1])})
                lengths.extend(batch[2])
                numbers.extend(batch[3])
            starts = numpy.cumsum(lengths, dtype="int64")
            starts.tofile(unfinished / "starts")
            numpy.array(numbers).tofile(unfinished / "records")
            counts = dict(counts) | {"examples": len(numbers), "tokens": int(starts[-1]), "notes": +notes}
            (unfinished / "counts.json").write_text(json.dumps(counts), "utf-8")
    counts = json.loads((folder / "counts.json").read_text("utf-8"))
    if not counts["examples"]:
        raise BadInput(f"{data_path} holds nothing to train on: all {counts['records']} records were dropped")
    kinds = {"input_ids": "int32", "supervised": "bool", "starts": "int64", "records": "int64"}
    return Examples(*(numpy.memmap(folder / name, kind, "r") for name, kind in kinds.items()), counts)


def tokenize_documents(path: str, chat: Chat, max_length: int, skip_bad_records: bool = False, document_separator: str = "line"):
    """The examples of a file of documents, or of all files of a folder as one: what is tokenized once is kept file by file."""
    parts = [tokenize_records(file, chat, max_length, skip_bad_records, False, document_separator) for file in document_files(path)]
    return parts[0] if len(parts) == 1 else JoinedExamples(parts)


def _run_job(batch):
    return _job(batch)


def _tokenize_batch(chat: Chat, cut, max_length: int, skip_bad_records: bool, data_path: str, batch: list[tuple[int, dict]]):
    """(input_ids, supervised, lengths, record numbers, counts) of a batch of numbered records."""
    input_ids, supervised, lengths, numbers = array("i"), bytearray(), array("q"), array("q")
    counts = Counter({key: 0 for key in ("records", "refused", "dropped", "windows", "answers", "answers_cut", "prompts_cut", "answer_tokens")})
    try:
        encoded = chat.encode_batch([record["messages"] for _, record in batch])
    except BadInput:
        encoded = [None] * len(batch)  # the template refuses one of them: look which
    for (number, record), pieces in zip(batch, encoded):
        try:
            examples = list(cut(chat, record["messages"], pieces or chat.encode(record["messages"]), max_length, counts))
        except BadInput as problem:
            if not skip_bad_records:
                raise BadInput(f"{data_path}, record {number}: {problem}") from None
            print(f"dropped {data_path}, record {number}: {problem}", file=sys.stderr)
            counts["refused"] += 1
            continue
        counts["records"] += 1
        for ids, trained in examples:
            if any(trained):
                input_ids.extend(ids)
                supervised.extend(trained)
                lengths.append(len(ids))
                numbers.append(number)
            else:
                counts["dropped"] += 1
    return input_ids, supervised, lengths, numbers, counts


def cut_dialogue(chat: Chat, messages: list[dict], pieces: list, max_length: int, counts: Counter):
    """Yield (ids, trained) of a dialogue: itself where it fits, else windows of whole rounds.

    Each window holds the system text, as many untrained rounds as fit, and before them as many earlier rounds as still
    fit for context, so that every answer is trained once. Where one round alone is too long its prompt gives way, down
    to a quarter of the window and from its middle, and then the answer is cut, without a stop token.

    Args:
        pieces: What chat.encode(messages) gives.
    """
    counts["answers"] += sum(trained for _, trained in pieces)
    counts["answer_tokens"] += sum(len(ids) for ids, trained in pieces if trained)
    if _size(pieces) <= max_length:
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
        while last < end and _size(longer := encode(first, last + 1)) <= max_length:
            last, pieces = last + 1, longer
        while first > 0 and _size(longer := encode(first - 1, last)) <= max_length:
            first, pieces = first - 1, longer
        if _size(pieces) > max_length:
            (prompt, _), (answer, _), *_ = pieces
            room = min(len(prompt), max(max_length - len(answer), max_length // 4))
            counts["prompts_cut"] += room < len(prompt)
            counts["answers_cut"] += room + len(answer) > max_length
            pieces = [(prompt[: room - room // 2] + prompt[len(prompt) - room // 2:], False), (answer[: max_length - room], True)]
        counts["windows"] += begin > 0
        yield _join(pieces, max_length, context=0 if chat.last_round_only else begin - first)
        begin = last


def cut_document(chat: Chat, messages: list[dict], pieces: list, max_length: int, counts: Counter):
    """Yield (ids, trained) of a document for pretraining: itself where it fits, else windows that train each token once.

    The first token of an example is never a label, so a window begins with the last token of the one before.
    """
    counts["answers"] += 1
    counts["answer_tokens"] += sum(len(ids) for ids, trained in pieces if trained)
    ids = [i for piece, _ in pieces for i in piece]
    trained = [answer for piece, answer in pieces for _ in piece]
    for begin in range(0, max(1, len(ids) - 1), max_length - 1):
        counts["windows"] += begin > 0
        window = trained[begin : begin + max_length]
        yield ids[begin : begin + max_length], [answer and (place > 0 or begin == 0) for place, answer in enumerate(window)]


def _size(pieces: list) -> int:
    """Tokens up to the end of the last answer: the line break that some templates write behind it may be cut off."""
    return sum(len(ids) for ids, _ in pieces[:-1])


def _join(pieces: list, max_length: int, context: int = 0) -> tuple[list[int], list[bool]]:
    """Pieces as one example; the first `context` answers are only read."""
    ids, trained = [], []
    for piece, answer in pieces:
        ids += piece
        trained += [answer and context <= 0] * len(piece)
        context -= answer
    return ids[:max_length], trained[:max_length]


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


def fill(lengths: list[int], capacity: int) -> list[list[int]]:
    """Examples by block as `pack`, but in their order: a block ends where the next example does not fit."""
    blocks, room = [], 0
    for e, length in enumerate(lengths):
        if length > room:
            blocks.append([])
            room = capacity
        blocks[-1].append(e)
        room -= length
    return blocks


def summarize(counts: dict) -> str:
    """The line that a run prints before training, and the lines of what is odd in the data."""
    kept = counts["supervised_tokens"] / max(1, counts["answer_tokens"])
    lines = [f"{counts['records']:,} records, {counts['examples']:,} examples, {counts['tokens']:,} tokens, "
             f"{counts['supervised_tokens']:,} supervised ({kept:.1%} of all answer tokens), {counts['answers_cut']:,} answers "
             f"and {counts['prompts_cut']:,} prompts cut, {counts['dropped']:,} examples with nothing to train and "
             f"{counts['refused'] + counts['notes'].get('bad record (dropped)', 0):,} bad records dropped"]
    return "\n".join(lines + [f"  {count:,} x {note}" for note, count in sorted(counts["notes"].items())])


def hold_out(examples: Examples, eval_size: float, seed: int) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Examples to train on and to evaluate on; all examples of one record go to one side.

    Args:
        eval_size: Records to hold out: a number, or a share below 1.
    """
    records = numpy.unique(examples.records)
    count = round(eval_size * len(records)) if 0 < eval_size < 1 else int(eval_size)
    if eval_size and not count:
        raise BadInput(f"--eval_size={eval_size} holds out no record of {len(records)}: give a larger share, or a number")
    if count < 0 or count >= len(records):
        raise BadInput(f"--eval_size={eval_size} leaves nothing to train on: the data has {len(records)} records")
    held = numpy.isin(examples.records, records[sorted(random.Random(seed).sample(range(len(records)), count))])
    return numpy.flatnonzero(~held), numpy.flatnonzero(held)


# ---- records ----
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
