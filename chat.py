"""From messages to what is trained: chat templates, token ids, label masks, windows, packing.

The prompt of a training example and the prompt that generate.py feeds come out of the same lines, so that they cannot
differ. Importing this file imports neither torch nor transformers.
"""
import dataclasses
import difflib
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import random
import re
import sys
import time
import typing
from array import array
from collections import Counter
from pathlib import Path

import numpy

import records
from records import document_files, numbered_records
from utils import BadInput, cache_folder, file_hash, whole_folder

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
    parts = file_hash(data_path), Path(data_path).suffix, file_hash(__file__), file_hash(records.__file__), tokenizer, flags
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
