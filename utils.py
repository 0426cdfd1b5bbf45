"""What must not differ between the scripts: prompt text, label mask, windows and packing; data formats; the command line.

In the order in which a reader of a training step asks for it: templates, Chat (messages to token ids and mask), windows, examples and packing;
then records, what a row of a file becomes; then the command line and what is checked before anything expensive. Nothing here imports torch,
transformers or datasets before the flags are understood: those take seconds.
"""
import ast
import bisect
import contextlib
import copy
import csv
import difflib
import fcntl
import functools
import hashlib
import importlib.util
import inspect
import itertools
import json
import logging
import math
import os
import pprint
import random
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import typing
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import fire

IGNORE_INDEX = -100  # torch.nn.CrossEntropyLoss skips these positions


class BadInput(ValueError):
    """What the user gave cannot be used: one line that says what, where and how to mend it."""

    def __init__(self, message: str):
        super().__init__(re.sub(r"\s*[\r\n]\s*", " ", message).strip())  # what is quoted from a file may hold line breaks


class RunStopped(RuntimeError):
    """A run that had begun cannot go on, or ends early; `status` is the exit status."""

    def __init__(self, message: str, status: int = 1):
        super().__init__(message)
        self.status = status


# ---- templates ----
def _by_round(head: str, user: str, answer: str, behind: str = "''") -> str:
    """A chat template of Jinja expressions: head, in which `system` is the system text, then for each round user, answer, behind."""
    return ("{% if messages[0].role == 'system' %}{% set system, messages = messages[0].content, messages[1:] %}{% endif %}{{ " + head + " }}"
            "{% for message in messages %}{% if message.role == 'user' %}{{ " + user + " }}{% elif message.role == 'assistant' %}"
            "{% generation %}{{ " + answer + " }}{% endgeneration %}{{ " + behind + " }}"
            "{% else %}{{ raise_exception('this template has no place for the role ' ~ message.role) }}{% endif %}{% endfor %}")


# How a conversation is written: {name: Jinja chat template}. What stands in {% generation %} is trained; <|...|> are special tokens
TEMPLATES = {
    "alpaca": _by_round(  # tatsu-lab/stanford_alpaca, with a line break after "### Response:" and many rounds
        head="bos_token ~ (system or 'Below is an instruction that describes a task' ~ (', paired with an input that provides further context' "
             "if messages[0].input else '') ~ '. Write a response that appropriately completes the request.')",
        user="'\\n\\n### Instruction:\\n' ~ (message.content[:-(message.input | length) - 1] ~ '\\n\\n### Input:\\n' ~ message.input "
             "if message.input and loop.first else message.content) ~ '\\n\\n### Response:\\n'",
        answer="message.content ~ eos_token"),
    "vicuna_chat": _by_round(  # Facico/Chinese-Vicuna, chat
        head="bos_token ~ (system or 'The following is a conversation between an AI assistant called Assistant and a human user called User. "
             "The assistant is intelligent, knowledgeable and polite to answer questions of user.') ~ '\\n\\n'",
        user="'User:' ~ message.content ~ '\\n\\nAssistant:'", answer="message.content ~ eos_token", behind="'\\n\\n'"),
    "yayi": _by_round(  # wenge-research/YaYi
        head="'<|System|>:\\n' ~ (system or 'A chat between a human and an AI assistant named YaYi.\\n"
             "YaYi is a helpful and harmless language model developed by Beijing Wenge Technology Co.,Ltd.') ~ '\\n\\n'",
        user="'<|Human|>:\\n' ~ message.content ~ '\\n\\n<|YaYi|>:\\n'",
        answer="message.content ~ '\\n\\n<|End|>'"),
    "chatml":
        "{% for message in messages if message.content or message.role != 'system' %}"
        "{{ '<|im_start|>' ~ ('function' if message.role == 'tool' else message.role) ~ '\\n' }}"
        "{% if message.role == 'assistant' %}{% generation %}{{ message.content ~ '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ message.content ~ '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    "ziya": _by_round(  # IDEA-CCNL/Ziya-LLaMA
        head="bos_token ~ (system ~ '\\n' if system else '')", user="'<human>:' ~ message.content.strip() ~ '\\n<bot>:'",
        answer="message.content.strip() ~ eos_token"),
    "llama2_chinese": _by_round(  # LlamaFamily/Llama-Chinese; the blank before an answer belongs to it, as in llama2
        head="bos_token ~ 'System: ' ~ system ~ '\\n' ~ eos_token if system else ''",
        user="bos_token ~ 'Human: ' ~ message.content ~ '\\n' ~ eos_token ~ bos_token ~ 'Assistant:'",
        answer="' ' ~ message.content ~ '\\n' ~ eos_token"),
    "llama2": _by_round(  # meta-llama/llama
        head="''", user="bos_token ~ '[INST] ' ~ ('<<SYS>>\\n' ~ system ~ '\\n<</SYS>>\\n\\n' if system and loop.first else '') "
                        "~ message.content ~ ' [/INST]'",
        answer="' ' ~ message.content ~ ' ' ~ eos_token"),
    "plain": _by_round(head="system or ''", user="message.content", answer="message.content ~ eos_token"),  # the text itself, for a base model
}
RENDERING = 20  # seconds of computing, of all threads together, for one text: more would be a template without end
_OPEN, _CLOSE = "\U000f1002", "\U000f1003"  # put around answers, to find them in what a template makes of them
SHORTEST = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
_ANCHOR = "\U000f1000"  # private use: a control token that no text spells, to tokenize what follows a control token
_SPLIT = "\U000f1001"  # put inside a control token that a text spells, so that the text stays text


class Chat:
    """A tokenizer with a template: messages to token ids, for training and for generation alike.

    Both read one Jinja text. A prompt is tokenized as it stands when the model is used, and the answer continues it:
    the ids of the whole text, except where a merge would cross the border (counted in `crossed`).
    """

    def __init__(self, tokenizer, template: str = "auto", last_round_only: bool = False):
        """Give `tokenizer` the chat template and its special tokens (`new_tokens` are those it lacked).

        `template` is a name of TEMPLATES, or auto: the tokenizer's own chat template, else llama2_chinese.
        With last_round_only the last answer alone is trained, for templates that rewrite earlier ones.
        """
        from tokenizers import Tokenizer

        if template == "auto" and not tokenizer.chat_template:
            template = "llama2_chinese"
        if template not in ("auto", *TEMPLATES):
            near = "".join(f": did you mean {name}?" for name in difflib.get_close_matches(template, TEMPLATES, n=1))
            raise BadInput(f"--template={template} is none of auto, {', '.join(TEMPLATES)}{near}")
        if not tokenizer.is_fast or not tokenizer.eos_token:
            raise BadInput(f"the tokenizer in {tokenizer.name_or_path} lacks {'an eos_token' if tokenizer.is_fast else 'a fast version (tokenizer.json)'}")
        if not isinstance(tokenizer.model_max_length, (int, float)):
            raise BadInput(f"the tokenizer_config.json in {tokenizer.name_or_path} has model_max_length {tokenizer.model_max_length!r}: a number belongs there")
        self.tokenizer, self.name, self.template, self.last_round_only, self.new_tokens = tokenizer, tokenizer.name_or_path, template, last_round_only, []
        if template != "auto":
            special_tokens = list(dict.fromkeys(re.findall(r"<\|\w+\|>", TEMPLATES[template])))
            self.new_tokens = [token for token in special_tokens if token not in tokenizer.get_vocab()]
            tokenizer.add_tokens(special_tokens, special_tokens=True)
            begins = template == "plain" and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]  # a LLaMA begins every text with it
            tokenizer.chat_template = "{{ bos_token }}" * begins + TEMPLATES[template]
        self.jinja, self.special_tokens = tokenizer.get_chat_template(), tokenizer.special_tokens_map
        self.control = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.control_pattern = re.compile("(" + "|".join(map(re.escape, sorted(self.control, key=len, reverse=True))) + ")")
        # To tokenize text there is a copy that knows one control token, _ANCHOR: any other that a text spells is text
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        anchor = dict.fromkeys(("normalized", "single_word", "lstrip", "rstrip"), False) | {"id": len(tokenizer) + 1, "content": _ANCHOR, "special": True}
        state["added_tokens"] = [token for token in state["added_tokens"] if not token["special"]] + [anchor]
        try:
            self.text_tokenizer = Tokenizer.from_str(json.dumps(state | {"post_processor": None, "truncation": None, "padding": None}))
        except Exception as problem:  # tokenizers raises no class of its own: merges of tokens that are not in the vocabulary, say
            raise BadInput(f"the tokenizer.json in {tokenizer.name_or_path} is damaged ({problem}): copy it again") from None
        self.anchor_ids = self._text_ids(_ANCHOR)
        self.crossed = 0
        pieces = self.encode(SHORTEST)
        if len(pieces) < 2 or not pieces[1][0]:
            raise BadInput(f"the chat template of {self.name} shows no answer: choose one with --template")
        last = pieces[1][0][-1]
        self.stops = last in self.control.values()
        self.stop_ids = sorted({last, tokenizer.eos_token_id} & {*self.control.values()})
        self.crossed = 0

    def encode(self, messages: list[dict], add_generation_prompt: bool = False) -> list[tuple[list[int], bool]]:
        """Token ids in pieces (ids, are they trained): prompt, answer, prompt, answer, ..., what follows the last."""
        pieces, before, start = [], "", []  # the text since the last control token, and its ids
        for text, trained in self._segments(messages, add_generation_prompt):
            ids = []
            for i, part in enumerate(self.control_pattern.split(text)):
                if i % 2:
                    ids.append(self.control[part])
                    before, start = _ANCHOR, self.anchor_ids
                elif part:
                    part = part.replace(_SPLIT, "")
                    before, whole = before + part, self._text_ids(before + part)
                    ids += whole[len(start):] if whole[: len(start)] == start else self._apart(part)
                    start = whole
            pieces.append((ids, trained))
        return pieces

    def save(self, folder: str | Path, generation_config=None) -> None:
        """Write the tokenizer with its chat template, and how a model generates with the stop tokens, so that other programs end an answer here as well."""
        self.tokenizer.save_pretrained(folder)
        if generation_config:  # a reward model has none
            old = generation_config.to_dict()
            samples = any(old.get(name) for name in ("do_sample", "temperature", "top_p", "top_k"))  # older chat models give a temperature without do_sample
            padding = self.tokenizer.eos_token_id if old.get("pad_token_id") is None else old["pad_token_id"]
            new = type(generation_config).from_dict(old | {"eos_token_id": self.stop_ids, "do_sample": samples, "pad_token_id": padding})
            new.save_pretrained(folder)  # one that was changed behind from_dict is checked more strictly

    def _text_ids(self, text: str) -> list[int]:
        return self.text_tokenizer.encode(text, add_special_tokens=False).ids

    def _apart(self, text: str) -> list[int]:
        """Ids of a text that would merge with what precedes it: tokenized behind something that it does not merge with."""
        self.crossed += 1
        for context in (_ANCHOR + "\n", _ANCHOR + "。"):
            start, whole = self._text_ids(context), self._text_ids(context + text)
            if whole[: len(start)] == start:
                return whole[len(start):]
        raise BadInput(f"the tokenizer in {self.name} cannot tokenize {text[:20]!r} apart from what precedes it")

    def _segments(self, messages: list[dict], add_generation_prompt: bool) -> list[tuple[str, bool]]:
        """The rendered text in pieces (text, is it trained), cut before each answer and behind its stop token."""
        text, spans = self.render(messages, add_generation_prompt)
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if self.last_round_only:
            answers, spans = answers[-1:], spans[-1:]
        if self.template == "auto":
            spans = self._spans_of_own_template(messages, text, spans, answers, add_generation_prompt)
        borders = [0, *itertools.chain.from_iterable(spans), len(text)]
        return [(text[begin:end], i % 2 == 1) for i, (begin, end) in enumerate(itertools.pairwise(borders))]

    def render(self, messages: list[dict], add_generation_prompt: bool = False) -> tuple[str, list[tuple[int, int]]]:
        """The text of a conversation and the character spans of its {% generation %} blocks."""
        from transformers.utils.chat_template_utils import render_jinja_template

        guard = functools.partial(self.control_pattern.sub, lambda match: match[0][0] + _SPLIT + match[0][1:])
        guarded = [{key: text if key == "role" else guard(text) for key, text in message.items()} for message in messages
                   if message["content"] or message["role"] != "system"]
        def give_up(*_):
            raise TimeoutError(f"it has no end after {RENDERING} s")

        if limited := threading.current_thread() is threading.main_thread():  # signals reach no other: those of the page, whose Chats are made before
            before = signal.signal(signal.SIGVTALRM, give_up)
            signal.setitimer(signal.ITIMER_VIRTUAL, RENDERING)
        try:
            texts, spans = render_jinja_template(
                [guarded], chat_template=self.jinja, return_assistant_tokens_mask=re.search(r"{%-?\s*generation\b", self.jinja) is not None,
                add_generation_prompt=add_generation_prompt, **self.special_tokens)
        except Exception as problem:  # a model's own template may do anything: divide by zero, call itself without end, want all memory
            fault = f"template {self.template}: {str(problem) or type(problem).__name__}"  # without end it is no record that could be dropped
            raise RunStopped(fault, status=2) if isinstance(problem, (TimeoutError, MemoryError)) else BadInput(fault) from None
        finally:
            if limited:
                signal.setitimer(signal.ITIMER_VIRTUAL, 0)
                signal.signal(signal.SIGVTALRM, before)
        return texts[0], spans[0] if spans else []

    def _spans_of_own_template(self, messages, text, marked, answers, add_generation_prompt) -> list[tuple[int, int]]:
        """Character spans of the answers: the template's generation blocks (`marked`), else what each answer adds to the text.

        Either way the text before an answer must be the prompt that generation uses. Templates of thinking models drop
        the reasoning of earlier rounds; those cannot be trained on every round of one text.
        """
        def ends(answer: int) -> tuple[int, int] | None:
            """Where the prompt of an answer ends, and the answer; None if the text does not begin with the two."""
            prompt, until = self.render(messages[:answer], True)[0], self.render(messages[: answer + 1])[0]
            return (len(prompt), len(until)) if text.startswith(prompt) and text.startswith(until) else None

        borders = None
        if len(answers) > 16:  # two renderings an answer would take the square of a dialogue's length: one with the answers between signs tells as much
            signed = [m | {"content": f"{_OPEN}{m['content']}{_CLOSE}"} if m["role"] == "assistant" else m for m in messages]
            parts = re.split(f"[{_OPEN}{_CLOSE}]", self.render(signed, add_generation_prompt)[0])
            lengths, first, last = [0, *itertools.accumulate(map(len, parts))], ends(answers[0]), ends(answers[-1])
            if "".join(parts) == text and len(parts) == 2 * len(answers) + 1 and first and last:
                borders = [(begin - lengths[1] + first[0], end - lengths[2] + first[1]) for begin, end in zip(lengths[1::2], lengths[2::2])]
                borders = borders if borders[-1] == last else None
        borders, spans = borders or [ends(answer) for answer in answers], []
        if None in borders:
            if add_generation_prompt:
                return []  # a prompt may rewrite its history: it is not trained
            raise BadInput(f"the chat template of {self.name} rewrites earlier rounds, so their answers cannot be trained in one text: "
                           f"add --last_round_only True, or choose a --template")
        for i, (start, stop) in enumerate(borders):
            start, stop = (max(marked[i][0], start), marked[i][1]) if len(marked) == len(answers) else (start, stop)
            # Some templates have a line break behind the stop token inside of the block, others leave the token outside
            trained = text[start:stop].rstrip()
            behind = self.control_pattern.match(text, stop)
            stop = start + len(trained) if trained.endswith(tuple(self.control)) else behind.end() if behind else stop
            spans.append((start, stop))
        return spans


# ---- windows ----
def cut_dialogue(chat: Chat, messages: list[dict], max_length: int, counts: Counter):
    """Yield (ids, trained) of a dialogue: itself where it fits, else windows of whole rounds.

    Each window holds the system text, as many rounds as fit of those that no window has trained yet, and before them as many
    earlier rounds as still fit for context, so that every answer is trained once. Only a single round can be too long: its prompt
    gives way, down to a quarter of the window and from its middle, and then the answer is cut, without a stop token.
    """
    pieces = chat.encode(messages)
    counts.update(answers=sum(trained for _, trained in pieces), answer_tokens=sum(len(ids) for ids, trained in pieces if trained))
    fits = lambda pieces: sum(len(ids) for ids, _ in pieces[:-1]) <= max_length  # what stands behind the last answer may be cut off
    if fits(pieces):
        yield _join(pieces, max_length)
        return
    system, rounds = messages[: messages[0]["role"] == "system"], [[]]
    for message in messages[len(system):]:
        rounds[-1].append(message)
        if message["role"] == "assistant":
            rounds.append([])
    encode = lambda first, last: chat.encode(system + list(itertools.chain.from_iterable(rounds[first:last])))
    end = len(rounds) - 1  # behind the last answer nothing stands
    begin = end - 1 if chat.last_round_only else 0
    while begin < end:
        first, last, pieces = begin, begin + 1, encode(begin, begin + 1) if end > 1 else pieces
        while last < end and fits(longer := encode(first, last + 1)):
            last, pieces = last + 1, longer
        while first > 0 and fits(longer := encode(first - 1, last)):
            first, pieces = first - 1, longer
        if not fits(pieces):
            (prompt, _), (answer, _), *_ = pieces
            room = min(len(prompt), max(max_length - len(answer), max_length // 4))
            counts.update(prompts_cut=room < len(prompt), answers_cut=room + len(answer) > max_length)
            pieces = [(prompt[: room - room // 2] + prompt[len(prompt) - room // 2:], False), (answer[: max_length - room], True)]
        counts["windows"] += begin > 0
        yield _join(pieces, max_length, context=0 if chat.last_round_only else begin - first)
        begin = last


def cut_document(chat: Chat, messages: list[dict], max_length: int, counts: Counter):
    """Yield (ids, trained) of a document for pretraining: itself where it fits, else windows that train each token once.

    The first token of an example is never a label, so a window begins with the last token of the one before.
    """
    ids, trained = _join(chat.encode(messages))
    counts.update(answers=1, answer_tokens=sum(trained))
    for begin in range(0, max(1, len(ids) - 1), max_length - 1):
        trained[begin] &= begin == 0
        counts["windows"] += begin > 0
        yield ids[begin : begin + max_length], trained[begin : begin + max_length]


def cut_pair(chat: Chat, messages: list[dict], chosen: str, rejected: str, max_length: int, counts: Counter):
    """Yield (ids, trained) of the better answer behind its question, then of the worse: each ends at its stop token, where its reward is read.

    Both begin with one prompt, that of generation, and only the answers are trained. Where one of them is longer than max_length the
    earliest rounds are left out, and if the last round alone is too long the pair is: no answer is cut.
    """
    system = messages[: messages[0]["role"] == "system"]
    begins = [len(system), *(i for i, message in enumerate(messages) if i > len(system) and message["role"] == "user")]
    for begin in begins:
        asked, pair = system + messages[begin:], []
        for text in (chosen, rejected):
            *before, (answer, _), _ = chat.encode([*asked, {"role": "assistant", "content": text}])
            pair.append(([i for ids, _ in before for i in ids], answer))
        (prompt, better), (other, worse) = pair
        if prompt != other or not prompt:
            raise BadInput(f"template {chat.template} has " + ("no question before the answers" if prompt == other else "another question before each answer"))
        if begin == begins[0]:
            counts.update(answers=2, answer_tokens=len(better) + len(worse))
        if len(prompt) + max(len(better), len(worse)) <= max_length:
            counts["pair without its earliest rounds"] += begin > begins[0]
            yield from ((prompt + answer, [False] * len(prompt) + [True] * len(answer)) for answer in (better, worse))
            return
    counts["pair longer than max_length (dropped)"] += 1


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
                     document_separator: str | None = None, preference: bool = False):
    """(examples, counts) of a file, in file order; from the cache where data, tokenizer, template, flags and our code are the same.

    `examples` is a datasets.Dataset that stays on the disk, so a corpus may be larger than the memory. Its columns: input_ids and labels (at
    most max_length; IGNORE_INDEX where nothing is trained), record (its number in the file), length. `counts` is for summarize(). With a
    document_separator the file holds documents for pretraining, with `preference` pairs, each two examples in a row; see numbered_records.
    """
    frame = sum(len(ids) for ids, _ in chat.encode(SHORTEST))
    if frame > max_length:
        raise BadInput(f"--max_length={max_length} is below the {frame} tokens of the shortest dialogue in template {chat.template}")
    if not chat.stops:
        raise BadInput(f"the chat template of {chat.name} ends an answer with no special token, so a model tuned with it would never stop: "
                       f"choose one with --template")
    from datasets import Dataset, Features, List, Value, concatenate_datasets
    from datasets.exceptions import DatasetGenerationError

    how = chat.jinja, chat.last_round_only, max_length, skip_bad_records, unescape_newlines, document_separator, preference, chat.special_tokens
    parts = file_hash(data_path), Path(data_path).suffix, file_hash(__file__), chat.tokenizer.backend_tokenizer.to_str(), repr(how)
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:40]  # datasets adds to it, and takes 64 at most
    folder, name = cache_folder() / "examples" / key, Path(data_path).name
    while int(os.environ.get("LOCAL_RANK", 0)) and not _undamaged(folder):  # the first rank of the machine makes it; torchrun ends us if it cannot
        time.sleep(0.2)
    if not _undamaged(folder):
        shutil.rmtree(folder, ignore_errors=True)
        with whole_folder(folder) as unfinished, tempfile.TemporaryDirectory(dir=unfinished) as scratch:
            counts, worker = Counter(), copy.copy(chat)
            worker.tokenizer = None  # the other processes do without: it takes half a second to send
            read = lambda: ({"number": number, "record": json.dumps(record)} for number, record in numbered_records(
                data_path, skip_bad_records, unescape_newlines, counts, document_separator, preference))
            try:
                records = Dataset.from_generator(read, Features(number=Value("int64"), record=Value("string")), cache_dir=scratch, fingerprint=key)
            except DatasetGenerationError as problem:
                raise problem.__cause__ from None
            cut = cut_document if document_separator else cut_pair if preference else cut_dialogue
            processes = min(len(os.sched_getaffinity(0)), len(records) // 2000)
            records.map(
                functools.partial(_tokenize_batch, worker, cut, max_length, skip_bad_records, data_path, scratch),
                batched=True, batch_size=250, num_proc=processes if processes > 1 else None, remove_columns=["number"], desc=f"tokenizing {name}",
                features=Features(input_ids=List(Value("int32")), labels=List(Value("int32")), record=Value("int64"), length=Value("int32")),
                cache_file_name=str(unfinished / "examples.arrow"), new_fingerprint=key)
            for file in Path(scratch).glob("counts-*"):
                counts = sum((Counter(json.loads(line)) for line in file.read_text("utf-8").splitlines()), counts)
            if not counts["examples"]:
                why = "".join(f", {count:,} x {note}" for note, count in counts.items() if count and "(dropped)" in note)
                raise BadInput(f"{data_path} holds nothing to train on: all its records were dropped{why}")
            replace_json(unfinished / "counts.json", {"counts": counts, "files": {file.name: file_hash(file) for file in unfinished.glob("*.arrow")}})
    examples = concatenate_datasets([Dataset.from_file(str(file)) for file in sorted(folder.glob("*.arrow"))])
    return examples, Counter(read_json(folder / "counts.json")["counts"])


def _undamaged(folder: Path) -> bool:
    """Whether a folder of the cache is there, and its files are as they were written: a power loss can leave others."""
    with contextlib.suppress(BadInput, OSError, KeyError, AttributeError):
        return all(file_hash(folder / name) == digest for name, digest in read_json(folder / "counts.json")["files"].items())
    return False


def _tokenize_batch(chat: Chat, cut, max_length: int, skip_bad_records: bool, data_path: str, scratch: str, batch: dict) -> dict[str, list]:
    """The examples of a batch of records; what was counted on the way goes into a file of this process in `scratch`."""
    examples, counts = {"input_ids": [], "labels": [], "record": [], "length": []}, Counter()
    for number, record in zip(batch["number"], batch["record"]):
        try:
            found = list(cut(chat, *json.loads(record).values(), max_length, counts))
        except BadInput as problem:  # the template has no place for a role
            problem = f"{data_path}, record {number}: {problem}"
            if not skip_bad_records:
                raise BadInput(problem) from None
            print(f"dropped {problem}", file=sys.stderr)
            counts["refused"] += 1
            continue
        kept = [(ids, trained) for ids, trained in found if any(trained[1:])]  # nothing precedes the first token: it is never a label
        counts.update(records=1, dropped=len(found) - len(kept), examples=len(kept))
        for ids, trained in kept:
            counts.update(tokens=len(ids), supervised_tokens=sum(trained))
            labels = [i if answer else IGNORE_INDEX for i, answer in zip(ids, trained)]
            for column, value in zip(examples.values(), (ids, labels, number, len(ids))):
                column.append(value)
    with open(Path(scratch, f"counts-{os.getpid()}"), "a", encoding="utf-8") as file:
        file.write(json.dumps(counts) + "\n")
    return examples


def tokenize_documents(path: str, chat: Chat, max_length: int, skip_bad_records: bool = False, document_separator: str = "line"):
    """(examples, counts) of a file of documents, or of the files of a folder as one, each cached apart; records are numbered on."""
    import numpy
    from datasets import concatenate_datasets

    parts = [tokenize_records(file, chat, max_length, skip_bad_records, False, document_separator) for file in document_files(path)]
    records = [examples.with_format("numpy")["record"][:] for examples, _ in parts]
    before = numpy.cumsum([0] + [numbers[-1] + 1 for numbers in records])
    examples = concatenate_datasets([examples.remove_columns("record") for examples, _ in parts])
    examples = examples.add_column("record", numpy.concatenate([numbers + first for numbers, first in zip(records, before)]))
    return examples, sum((counts for _, counts in parts), Counter())


def hold_out(examples, eval_size: float, seed: int):
    """Numbers of the examples to train on and of those to evaluate on, eval_size records (a number, or a share below 1) as a whole."""
    import numpy

    of_example = examples.with_format("numpy")["record"][:]
    records = numpy.unique(of_example)
    count = round(eval_size * len(records)) if 0 < eval_size < 1 else int(eval_size)
    if eval_size and not count:
        raise BadInput(f"--eval_size={eval_size} holds out no record of {len(records)}: give a larger share, or a number")
    if count < 0 or count >= len(records):
        raise BadInput(f"--eval_size={eval_size} leaves nothing to train on: the data has {len(records)} records")
    held = numpy.isin(of_example, random.Random(seed).sample(records.tolist(), count))
    return numpy.flatnonzero(~held), numpy.flatnonzero(held)


def pack(lengths: list[int], capacity: int) -> list[list[int]]:
    """Examples by block, whole and at most `capacity` tokens together: best-fit decreasing."""
    by_room = defaultdict(list)  # the open blocks
    rooms, blocks = [], []  # rooms that some open block has, sorted
    for e in sorted(range(len(lengths)), key=lambda e: -lengths[e]):
        place = bisect.bisect_left(rooms, lengths[e])  # the tightest fit
        if place == len(rooms):
            room, block = capacity, []
            blocks.append(block)
        else:
            room = rooms[place]
            block = by_room[room].pop()
            if not by_room[room]:
                del rooms[place]
        block.append(e)
        if not by_room[room - lengths[e]]:
            bisect.insort(rooms, room - lengths[e])
        by_room[room - lengths[e]].append(block)
    return blocks


def summarize(counts: Counter) -> str:
    """The line that a run prints before training, and the lines of what is odd in the data: the notes, keys of several words."""
    kept = counts["supervised_tokens"] / max(1, counts["answer_tokens"])
    lines = [f"{counts['records']:,} records, {counts['examples']:,} examples, {counts['tokens']:,} tokens, "
             f"{counts['supervised_tokens']:,} supervised ({kept:.1%} of all answer tokens), {counts['answers_cut']:,} answers "
             f"and {counts['prompts_cut']:,} prompts cut, {counts['dropped']:,} examples with nothing to train and "
             f"{counts['refused'] + counts['bad record (dropped)']:,} bad records dropped"]
    return "\n".join(lines + [f"  {count:,} x {note}" for note, count in sorted(counts.items()) if " " in note])


# ---- records ----
ROLES = {"system": "system"} | dict.fromkeys(("human", "user"), "user") | dict.fromkeys(("function", "observation", "tool"), "tool") | dict.fromkeys(
    ("gpt", "assistant", "yayi", "bot", "function_call"), "assistant")
# UTF-8 read as Latin-1 or cp1252: the three bytes of a Chinese character become a letter of ä-é and two odd signs
LATIN_MOJIBAKE = re.compile("(?:[ä-é][\u0080-\u00bfŒœŠšŸŽžƒˆ˜–-›€™]{2}){2}")
# UTF-8 read as GBK turns 你好 into 浣犲ソ: a run of Chinese whose GBK bytes are whole UTF-8 of Chinese
UTF8_CHINESE = re.compile(rb"(?:[\xe3-\xe9][\x80-\xbf]{2}|\xef[\xbc-\xbf][\x80-\xbf])+")


def numbered_records(path: str, skip_bad_records: bool = False, unescape_newlines: bool = False, notes: Counter | None = None,
                     document_separator: str | None = None, preference: bool = False, read: Callable | None = None):
    """Yield (number of the record in the file, from 0; {"messages": [{"role", "content"}, ...]}) of a JSON, JSONL, CSV or Parquet file.

    The schema is told from the keys of each record (sample/README.md shows them all). The user turn of an alpaca record
    with an `input` holds "instruction\\ninput", and the input once more as "input", for templates that set it apart.
    Bad records are dropped, with a word on how many and why, or BadInput names the first. `notes` counts what is odd but can be trained on
    (joined turns, unknown columns, ...). A document_separator says that these are documents for pretraining, parted in a .txt file by line or
    by blank_line; with `preference` they are those of preference_record; another `read` makes of a row what it likes, or raises BadInput.
    """
    notes, bad, number = Counter() if notes is None else notes, [], -1
    for number, row in enumerate(read_rows(path, notes, document_separator)):
        try:
            if not isinstance(row, dict):
                raise BadInput(f"a {type(row).__name__} where an object {{...}} belongs")
            if read or preference:
                yield number, read(row) if read else preference_record(row, unescape_newlines, notes)
                continue
            turns = (document_turns if document_separator else row_turns)(row, notes)
            messages = clean_messages(turns, unescape_newlines, notes)
            while messages and messages[-1]["role"] != "assistant":
                notes[f"trailing {messages.pop()['role']} turn (dropped)"] += 1
            if not messages:
                raise BadInput("it has no answer to train on")
            yield number, {"messages": messages}
        except BadInput as problem:
            bad.append(f"{path}, record {number}: {problem}")
            notes["bad record (dropped)"] += 1
            if not skip_bad_records:
                raise BadInput(f"{bad[0]}. See sample/README.md, or drop bad records with --skip_bad_records True") from None
    if bad:
        print(f"dropped {len(bad)} bad records of {number + 1}:", *bad[:3], sep="\n  ", file=sys.stderr)
    if len(bad) == number + 1:
        raise BadInput(f"{path} " + ("holds nothing of use: all its records were dropped" if bad else "is empty: it should hold records"))


def read_rows(path: str, notes: Counter, document_separator: str | None = None):
    """Yield the rows of a file as dictionaries, before anything is known of their schema."""
    ending = Path(path).suffix.lower()
    if ending == ".parquet":
        import pyarrow.parquet

        try:
            for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
                yield from batch.to_pylist()
        except (ValueError, OverflowError, OSError) as problem:  # ArrowInvalid is a ValueError; a time beyond Python's years overflows
            raise BadInput(f"{path} is not whole Parquet: {str(problem).splitlines()[0]}") from None
    elif ending == ".csv":
        csv.field_size_limit(2**31 - 1)
        try:
            yield from csv.DictReader(read_lines(path, notes), strict=True)
        except csv.Error as problem:
            raise BadInput(f"{path} is not whole CSV ({problem}): is it cut off, or a quotation mark not doubled?") from None
    elif ending == ".txt" and document_separator:
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
            except (ValueError, RecursionError) as problem:  # not JSON; a number of more digits than Python takes; a nesting without end
                at, what = number + getattr(problem, "lineno", 1) - 1, getattr(problem, "msg", str(problem)[:60])
                raise BadInput(f"{path}, line {at}: not whole JSON ({what}): is it cut off? A .json or .jsonl file "
                               f"holds one array, or one object a line") from None
            yield from found if array else [found]


def read_lines(path: str, notes: Counter):
    """Yield a file's lines with their ends, one at a time; it must be UTF-8, and a byte order mark is dropped and noted."""
    with open(path, "rb") as file:
        for number, data in enumerate(file, 1):
            try:
                line = data.decode("utf-8")
            except UnicodeDecodeError as problem:
                what = f"its byte {problem.start} is not UTF-8"
                if b"\0" in data:
                    what = f"this is not UTF-8 but looks like UTF-16: mend it with iconv -f UTF-16 -t UTF-8 {path} > new_file"
                elif "\ufffd" not in data.decode("gb18030", "replace"):
                    what = f"this is not UTF-8 but looks like GBK: mend it with iconv -f GB18030 -t UTF-8 {path} > new_file"
                raise BadInput(f"{path}, line {number}: {what}") from None
            notes["byte order mark (dropped)"] += number == 1 and line.startswith("\ufeff")
            yield line.removeprefix("\ufeff") if number == 1 else line


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
    turns = [("system", row["system"])] if row.get("system", "") != "" else []
    if "messages" in row or "conversations" in row:
        name, role, text = known = ("messages", "role", "content") if "messages" in row else ("conversations", "from", "value")
        if not isinstance(row[name], list):
            raise BadInput(f"{name!r} is a {type(row[name]).__name__}, a list of turns belongs there")
        for turn in row[name]:
            if not isinstance(turn, dict) or turn.get(role) is None or turn.get(text) is None:
                raise BadInput(f"a turn of {name!r} lacks {role!r} or {text!r}: {str(turn)[:60]}")
            if str(turn[role]) not in ROLES:
                raise BadInput(f"unknown role {turn[role]!r}; known are {', '.join(ROLES)}")
            turns.append((ROLES[turn[role]], turn[text]))
    elif isinstance(row.get("input"), list) or isinstance(row.get("prompt"), list):  # Chinese-Vicuna chat, Ziya
        name, *_ = known = ("input" if isinstance(row.get("input"), list) else "prompt", "output", "task")
        if not isinstance(row.get("output"), list) or len(row["output"]) != len(row[name]):
            raise BadInput(f"{name!r} is a list of {len(row[name])} turns, so 'output' must be a list of as many answers")
        turns += [turn for user, answer in zip(row[name], row["output"]) for turn in (("user", user), ("assistant", answer))]
    elif "instruction" in row:
        known = ("instruction", "input", "output", "history")
        for pair in row.get("history", []) if isinstance(row.get("history", []), list) else [row["history"]]:
            if not isinstance(pair, list) or len(pair) != 2:
                raise BadInput("'history' must be a list of [user, answer] pairs")
            turns += [("user", pair[0]), ("assistant", pair[1])]
        turns.append(("user", row["instruction"], row["input"]) if row.get("input", "") != "" else ("user", row["instruction"]))
        turns += [("assistant", row["output"])] if "output" in row else []
    elif "input" in row and "target" in row:  # Llama2-Chinese, two columns
        known = ("input", "target")
        turns += [("user", row["input"]), ("assistant", row["target"])]
    elif str(row.get("text", "")).lstrip().startswith("<s>"):  # Llama2-Chinese, one column
        known, end = ("text",), 0
        while match := re.compile(r"\s*<s>(Human|Assistant|System): (.*?)\n?</s>", re.S).match(row["text"], end):
            turns.append((ROLES[match[1].lower()], match[2]))
            end = match.end()
        if row["text"][end:].strip():
            raise BadInput(f"'text' breaks the pattern <s>Human: ...\\n</s><s>Assistant: ...\\n</s> at {row['text'][end:end + 30]!r}")
    else:
        raise BadInput(f"no known schema: it has the keys {', '.join(map(str, row))}")
    notes.update(f"unknown column {key!r} (not used)" for key in row.keys() - {"system", *known})
    return turns


def preference_record(row: dict, unescape_newlines: bool, notes: Counter) -> dict:
    """{"messages": up to the question, "chosen": the better answer, "rejected": the worse} of a row of any preference format."""
    names, answers = [("chosen", "rejected"), ("response_chosen", "response_rejected")]["response_chosen" in row], {}
    asked = {key: value for key, value in row.items() if key not in names}
    for name, answer in zip(("chosen", "rejected"), names):
        text = row.get(answer)
        if isinstance(text, list) and text and isinstance(text[-1], dict):  # turns: the last one, or the whole dialogue
            if text[:-1] and asked.setdefault("messages", text[:-1]) != text[:-1]:
                raise BadInput("chosen and rejected answer different questions: all turns but the last must be the same")
            text = text[-1]
        if isinstance(text, dict):  # one turn, of sharegpt or OpenAI
            text = text.get("value", text.get("content"))
        if text is None:
            raise BadInput(f"no preference: it needs a question and the answers {' and '.join(map(repr, names))} (it has {', '.join(map(str, row))})")
        answers[name] = clean_text(text, "assistant", unescape_newlines, notes)
        notes["empty answer"] += not answers[name].strip()
    if answers["chosen"] == answers["rejected"]:
        raise BadInput("chosen and rejected are the same text: nothing can be learned from them")
    for name in ("question", "prompt"):  # MedicalGPT, trl
        if name in asked:
            asked.setdefault("messages" if isinstance(asked[name], list) else "instruction", asked.pop(name))
    messages = clean_messages(row_turns(asked, notes), unescape_newlines, notes)
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        raise BadInput("its question does not end with a user's turn, so chosen and rejected answer nothing")
    return {"messages": messages} | answers


def clean_messages(turns: list[tuple], unescape_newlines: bool, notes: Counter) -> list[dict]:
    """Check the turns' texts and their order; what can be mended is mended and noted, the rest is BadInput."""
    messages: list[dict] = []
    for role, *texts in turns:
        texts = [clean_text(text, role, unescape_newlines, notes) for text in texts]
        if role == "system" and not texts[0]:  # an empty system text is none
            continue
        message = {"role": role, "content": "\n".join(texts)} | ({"input": texts[1]} if len(texts) == 2 else {})
        notes["empty answer"] += role == "assistant" and not texts[0].strip()
        if role == "system" and messages:
            raise BadInput("a system text that does not stand first")
        if role == "assistant" and not any(m["role"] != "system" for m in messages):
            notes["answer before any question (dropped)"] += 1
        elif messages and messages[-1]["role"] == role != "tool":
            notes[f"two {role} turns in a row (joined)"] += 1
            messages[-1] = {"role": role, "content": messages[-1]["content"] + "\n" + message["content"]}
        else:
            messages.append(message)
    return messages


def clean_text(text, role: str, unescape_newlines: bool, notes: Counter) -> str:
    """Check one text; BadInput if it is not a string or is mojibake, notes for what is only odd."""
    if not isinstance(text, str):
        raise BadInput(f"the {role} text is a {type(text).__name__}, a string belongs there: {str(text)[:60]}")
    runs = [run.encode("gb18030") for run in re.findall("[\u4e00-\u9fff]{6,60}", text)]  # one may begin inside a character
    gbk = any(UTF8_CHINESE.fullmatch(run, start, start + (len(run) - start) // 3 * 3) for run in runs for start in range(3))
    if _ANCHOR in text or _SPLIT in text:
        raise BadInput(f"the {role} text holds U+F1000 or U+F1001, characters for private use that this program uses itself: {text[:40]!r}")
    if re.search("[\ud800-\udfff]", text):
        raise BadInput(f"the {role} text holds half a character (a surrogate, such as a cut emoji leaves): {text[:40]!r}")
    if gbk or LATIN_MOJIBAKE.search(text) or "锟斤拷" in text:
        raise BadInput(f"the {role} text is UTF-8 that was read in another encoding (mojibake): {text[:40]!r}")
    notes["byte order mark (dropped)"] += "\ufeff" in text
    notes["U+FFFD, a character lost in an earlier conversion"] += "\ufffd" in text
    if "\\n" in text:
        notes["literal \\n in a text" + " (mended)" * unescape_newlines] += 1
        text = text.replace("\\r\\n", "\n").replace("\\n", "\n") if unescape_newlines else text
    return text.replace("\ufeff", "")


# ---- command line ----
def cli(main) -> None:
    """fire.Fire(main), except that main starts only once the whole command line is understood.

    fire calls the function first and reports unknown flags afterwards (google/python-fire#168), and it guesses types: "a, b"
    becomes a tuple. Here it hands over text, which main's annotations convert. Exit status: 2 for bad input, 130 after Ctrl-C.
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
    given = []
    fire.Fire(fire.decorators.SetParseFn(str)(lambda *strays, **texts: given.extend((strays, texts))))
    try:
        if given[0]:
            raise BadInput(f"{given[0][0]!r} belongs to no flag: write --name value, with quotes around text that has blanks")
        main(**convert_flags(main, given[1]))
        if "LOCAL_RANK" in os.environ and (group := importlib.import_module("torch.distributed")).is_initialized():
            group.destroy_process_group()  # a thread of gloo that is left at the end may abort the process, whose work is done
    except (BadInput, RunStopped) as problem:
        if isinstance(problem, RunStopped) or os.environ.get("LOCAL_RANK", "0") == "0":  # bad input is found by every rank of a machine: say it once
            print(f"error: {problem}", file=sys.stderr)
        sys.exit(getattr(problem, "status", 2))
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as problem:  # torch raises RuntimeError, safetensors its own error, Python OSError
        if re.search("out of memory|[Cc]an(not|'t) allocate memory", str(problem)) or isinstance(problem, MemoryError):
            lower = [f"--{name}" for name in inspect.signature(main).parameters if re.fullmatch("max_length|max_new_tokens|bits|.*batch_size", name)]
            said = (str(problem) or "MemoryError").splitlines()[0][:150]
            print(f"error: out of memory ({said}): lower {', '.join(lower) or 'what is loaded'}; estimate_memory.py says what a card holds", file=sys.stderr)
            sys.exit(1)
        if not re.search(r"No space left|write failed|unexpected pos|requested and \d+ written|name too long", str(problem)):  # of Python, torch and numpy
            raise
        print("error: " + (str(problem)[:200] if "name too long" in str(problem) else f"the disk is full ({problem.__class__.__name__}); what was whole "
              f"before is kept: free some space, then --resume True or the same command again"), file=sys.stderr)
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
        raise BadInput(f"--{name} is not a flag of {Path(sys.argv[0]).name}: " + (f"did you mean --{near[0]}?" if near else "--help lists the flags"))
    for name, p in parameters.items():
        if p.kind is p.KEYWORD_ONLY and p.default is p.empty and name not in texts:
            about = re.search(rf"^ +{name}: (.*)", main.__doc__, re.M)
            raise BadInput(f"--{name} is missing: {about[1] if about else 'it has no default'}")
    flags = {name: convert_flag(name, text, kinds[name]) for name, text in texts.items()}
    check_numbers(flags)
    return flags


def training_argument_kinds() -> dict[str, str]:
    """{field: source of its annotation} of transformers.TrainingArguments, read from the file: an import takes 5 s."""
    source = Path(importlib.util.find_spec("transformers").origin).with_name("training_args.py").read_text("utf-8")
    fields = next(node.body for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments")
    return {field.target.id: ast.unparse(field.annotation) for field in fields if isinstance(field, ast.AnnAssign)}


def convert_flag(name: str, text: str, kind):
    """`text` as the type that `kind`, an annotation or its source, asks for; BadInput if it cannot be."""
    for literal in (part for part in (kind, *typing.get_args(kind)) if typing.get_origin(part) is typing.Literal):
        choices = {str(choice): choice for choice in typing.get_args(literal)}
        if text not in choices:
            raise BadInput(f"--{name}={text} is not one of {', '.join(choices)}")
        return choices[text]
    if re.search("[\ud800-\udfff]", text):
        raise BadInput(f"--{name}={text!r} is not UTF-8")
    words = re.findall(r"\w+", str(kind))  # "int | None", "<class 'float'>", "dict[str, Any] | str | None"
    if "None" in words and text == "None":
        return None
    if "bool" in words and text.lower() in ("true", "false"):
        return text.lower() == "true"
    for word, convert in (("int", int), ("float", float), ("str", str)):
        with contextlib.suppress(ValueError):
            if word in words and (word == "str" or math.isfinite(float(text))):  # nan and inf are no numbers to train with
                return convert(text)
    raise BadInput(f"--{name}={text} is not " + ("True or False" if "bool" in words else "a whole number" if "int" in words else "a number"))


# ---- checks ----
def show(flags: dict) -> None:
    """Print what a run is started with, once for all ranks, behind the checks."""
    if os.environ.get("RANK", "0") == "0":
        pprint.pprint(flags, stream=sys.stderr)


_COUNTS = ("max_length", "per_device_train_batch_size", "gradient_accumulation_steps", "lora_r", "num_train_epochs", "max_new_tokens", "beta",
           "per_device_eval_batch_size", "ranks", "num_pieces", "repetition_penalty", "logging_steps", "save_steps", "eval_steps", "lora_alpha")
_MOST = dict.fromkeys(("learning_rate", "warmup_steps", "eval_size", "temperature", "top_k", "max_grad_norm", "weight_decay", "adam_epsilon",
                       "early_stopping_patience", "freeze_layers", "sft_weight", "simpo_gamma", "center_rewards_coefficient"), math.inf) | {
    "lora_dropout": 1, "top_p": 1, "label_smoothing": 1, "damp_percent": 1, "adam_beta1": math.nextafter(1, 0), "adam_beta2": math.nextafter(1, 0),
    "neftune_noise_alpha": 1e6, "seed": 2**32 - 1, "data_seed": 2**32 - 1, "dataloader_num_workers": 256, "workers": 256}  # each is a process


def check_positive(**flags: float) -> None:
    """BadInput if one of the flags is not above zero."""
    for name, value in flags.items():
        if not 0 < value < math.inf:
            raise BadInput(f"--{name}={value} must be above zero")


def check_numbers(flags: dict) -> None:
    """BadInput where a flag holds a number, but not a possible one."""
    numbers = {name: value for name, value in flags.items() if isinstance(value, (int, float))}
    check_positive(**{name: value for name, value in numbers.items() if name in _COUNTS})
    for name, most in _MOST.items():
        if name in numbers and (not 0 <= numbers[name] <= most or numbers[name] == math.inf):
            raise BadInput(f"--{name}={numbers[name]} must be " + ("zero or more" if most == math.inf else f"from 0 to {most}"))


def check_file(flag: str, path: str | None) -> None:
    """BadInput if the path of a flag is given and is not that of a file with something in it."""
    if path is not None and (not os.path.isfile(path) or not os.path.getsize(path)):
        what = "is empty" if os.path.isfile(path) else "is a folder, a file is wanted" if os.path.isdir(path) else "does not exist"
        raise BadInput(f"--{flag}={path} {what}")


def read_json(path) -> dict:
    """The object in a JSON file; BadInput where it is missing, cut off, or holds something else."""
    try:
        found = json.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as problem:
        raise BadInput(f"{path} is no whole JSON ({problem}): is it cut off, or a pointer of Git LFS?") from None
    if not isinstance(found, dict):
        raise BadInput(f"{path} holds a {type(found).__name__} where an object {{...}} belongs")
    return found


def check_adapter(lora_path: str) -> None:
    """BadInput, without torch and before the base is read, if a folder is no adapter, or a file of it is cut off or a pointer of Git LFS."""
    from safetensors import SafetensorError, safe_open

    folder = Path(lora_path)
    if not (folder / "adapter_config.json").is_file():
        raise BadInput(f"--lora_path={lora_path} " + ("is no adapter: it has no adapter_config.json" if folder.is_dir() else "does not exist"))
    for name in {"adapter_config.json", "yangtuo.json", "tokenizer_config.json", "generation_config.json"} & set(os.listdir(folder)):
        read_json(folder / name)
    try:
        with contextlib.suppress(FileNotFoundError):  # it may be a pickle: load_adapter's matter
            safe_open(folder / "adapter_model.safetensors", "np")  # compares its size with what its header says
    except (OSError, SafetensorError) as problem:
        raise BadInput(f"{folder}: adapter_model.safetensors is cut off, damaged or a pointer of Git LFS, copy it again ({problem})") from None


def check_model(model_name_or_path: str, allow_pickle: bool = False, quantized: bool = False) -> None:
    """BadInput if a folder cannot be loaded as a model, of quantize_gptq.py's too if `quantized`; a name that is no folder is left to the hub."""
    folder = Path(model_name_or_path)
    if not folder.is_dir():
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", model_name_or_path) or folder.parent.is_dir():
            raise BadInput(f"{folder} does not exist: give a model folder, or a name on the hub such as Qwen/Qwen2.5-7B")
        return
    names = {file.name for file in folder.iterdir()}
    held = f"it holds {', '.join(sorted(names)[:8]) or 'nothing'}"
    tensors, pickles = ({name for name in names if name.endswith(ends)} for ends in (".safetensors", (".bin", ".pt", ".pth")))
    indices = sorted(names & {"model.safetensors.index.json", "pytorch_model.bin.index.json"})
    named = {str(file) for index in indices for file in (read_json(folder / index).get("weight_map") or {"": "any file"}).values()}
    missing = sorted(named - names)
    for file in {"config.json", "tokenizer_config.json", "generation_config.json", "yangtuo.json", "quantize_config.json"} & names:
        read_json(folder / file)
    for wrong, what in (
            ("config.json" not in names and "adapter_config.json" in names,
             f"is a LoRA adapter: merge it with its base by merge_lora.py to train on, or give its base as the model and this as --lora_path ({held})"),
            ("config.json" not in names, f"has no config.json, so it is no model ({held})"),
            ("delta.json" in names, "is a delta, which only babbles by itself: make the model of it with apply_delta.py"),
            ("quantize_config.json" in names and not quantized,
             "is quantized, to be used alone (generate.py, webui.py, evaluate.py): give the 16-bit model that it was made from"),
            ("model.safetensors.index.json" in indices and named & pickles, "has an index of safetensors that names a pickle: download it again"),
            (missing, f"lacks {', '.join(missing[:3])}, which {', '.join(indices)} names ({len(missing)} missing): finish the download"),
            (not tensors and not pickles, f"holds no weights (*.safetensors): {held}"),
            (not tensors and not allow_pickle, f"has its weights as a pickle ({', '.join(sorted(pickles)[:1])}), which can run code when it is loaded: "
                                               f"if you trust it, add --allow_pickle True")):
        if wrong:
            raise BadInput(f"{folder} {what}")


def check_output_dir(output_dir: str, resume: bool | None = None, model_name_or_path: str = "") -> None:
    """BadInput if output_dir holds something and this run is not to go on with it; None: it is of a script that cannot."""
    folder = Path(output_dir)
    if resume is None and os.path.ismount(folder):
        raise BadInput(f"--output_dir={output_dir} is a mount point, onto which no result can be renamed: give a folder inside it")
    try:
        existing = next(parent for parent in (folder, *folder.resolve().parents) if parent.exists())
        tempfile.TemporaryFile(dir=existing).close() if existing.is_dir() and os.access(existing, os.W_OK) else None
    except OSError as problem:  # a name that is too long, a loop of links, a file system that takes no files or is full
        raise BadInput(f"--output_dir={output_dir[:60]}: {problem.strerror}") from None
    if not output_dir or not existing.is_dir() or not os.access(existing, os.W_OK) or (folder.is_symlink() and not folder.exists()):
        raise BadInput(f"--output_dir={output_dir}: {existing} is " + ("not a folder that can be written to: give another"))
    if model_name_or_path and Path(model_name_or_path).is_dir() and folder.is_dir() and folder.samefile(model_name_or_path):
        raise BadInput(f"--output_dir={output_dir} is the base model's own folder, which would be overwritten: give a new folder")
    names = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
    begun = {"run.json", "run.lock", ".saving", "runs"} if resume is not None else set()  # of a run that never came to its first checkpoint
    if resume and names - begun and "run.json" not in names:
        raise BadInput(f"--output_dir={output_dir} holds no run that could go on (no run.json): give the run's own folder, or a new one")
    if not resume and names - begun:
        raise BadInput(f"--output_dir={output_dir} holds another run: " + "go on with it by --resume True, or " * (resume is not None) + "give a new folder")


_LOCKS = {}  # file descriptors of this process, by output folder


def lock_folder(output_dir: str) -> None:
    """Make a folder, and keep other runs out of it until this process ends."""
    os.makedirs(output_dir, exist_ok=True)
    if (name := str(Path(output_dir).resolve())) in _LOCKS:  # a notebook runs the next cell in the same process
        os.close(_LOCKS.pop(name))
    lock = _LOCKS[name] = os.open(Path(output_dir, "run.lock"), os.O_CREAT | os.O_RDWR)  # open until the process ends, however it does
    with contextlib.suppress(OSError):  # of a file system without locks
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput(f"--output_dir={output_dir} is in use by another run: wait for its end, or give another folder") from None


def write_facts(output_dir: str, facts: dict) -> None:
    """Note in run.json what the run that begins is made of, for resume_point, and lock the folder."""
    if os.environ.get("RANK", "0") == "0":
        lock_folder(output_dir)
        replace_json(Path(output_dir, "run.json"), facts)


def replace_json(path: Path, content: dict) -> None:
    """Write a JSON file that is there whole or as it was before."""
    unfinished = path.with_name(f".{path.name}.new")
    unfinished.write_text(json.dumps(content, indent=2, ensure_ascii=False), "utf-8")
    unfinished.replace(path)


def resume_point(output_dir: str, facts: dict) -> str | None:
    """The last whole checkpoint in output_dir; BadInput if run.json says that the run there was begun with other facts.

    A checkpoint is whole if trainer_state.json, which Trainer writes last, can be read, if the states of optimizer and schedule are
    there (DeepSpeed has both in global_step*), and those of the random numbers of every rank, for which it does not wait.
    """
    folders = sorted(Path(output_dir).glob("checkpoint-*[0-9]"), key=lambda folder: -int(folder.name.rpartition("-")[2]))
    begun = read_json(Path(output_dir, "run.json")) if folders and Path(output_dir, "run.json").is_file() else {}
    for name in sorted(begun.keys() & facts.keys() - ({"base"} if facts.get("base_fingerprint") else set())):  # the folder of a base may move
        if begun[name] != facts[name]:
            raise BadInput(f"--resume: {output_dir} was begun with {name} = {begun[name]}, now it is {facts[name]}: give the same, or a new --output_dir")
    states = [f"rng_state_{rank}.pth" for rank in range(facts["world_size"])] if facts["world_size"] > 1 else ["rng_state.pth"]
    for folder in folders:
        needed = [*folder.glob("*.safetensors"), *(folder / name for name in states + ["optimizer.pt", "scheduler.pt"] * (not [*folder.glob("global_step*")]))]
        with contextlib.suppress(BadInput, TypeError):
            state = read_json(folder / "trainer_state.json")
            known = importlib.import_module("transformers.trainer_callback").TrainerState(**state)
            numbers = [value for name, value in vars(known).items() if isinstance(getattr(type(known), name, None), int)]  # by their defaults
            if all(isinstance(n, int | float) for n in numbers) and known.global_step and all(file.is_file() and file.stat().st_size for file in needed):
                best = str(Path(output_dir, Path(known.best_model_checkpoint or "").name))  # the folder may have another name since
                if known.best_model_checkpoint not in (None, best) and os.environ.get("RANK", "0") == "0":
                    replace_json(folder / "trainer_state.json", state | {"best_model_checkpoint": best})
                return str(folder)
        if os.environ.get("RANK", "0") == "0":
            print(f"{folder} is not whole: looking for the checkpoint before it", file=sys.stderr)
    if os.environ.get("RANK", "0") == "0":
        print(f"no checkpoint in {output_dir}: the run begins at its first step", file=sys.stderr)


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
    """SHA-256 over names, shapes and the first 4 KiB of every tensor of a safetensors folder, for a second; None where there is none."""
    digest, files = hashlib.sha256(), sorted(Path(model_name_or_path).glob("model*.safetensors"))
    for file in files:
        with open(file, "rb") as stream:
            try:
                size = int.from_bytes(stream.read(8), "little")
                header = json.loads(stream.read(size if size < os.path.getsize(file) else 0))
                header.pop("__metadata__", None)
                for name, tensor in sorted(header.items()):
                    begin, end = tensor["data_offsets"]
                    stream.seek(8 + size + begin)
                    digest.update(f"{name}{tensor['dtype']}{tensor['shape']}".encode() + stream.read(min(4096, end - begin)))
            except (ValueError, TypeError, KeyError, AttributeError, OverflowError, OSError):
                raise BadInput(f"{file} has no whole header: is it cut off, damaged, or a pointer of Git LFS? Download it again") from None
    return digest.hexdigest() if files else None


# ---- training: what stands around the steps ----
def can_pack(config, max_length: int) -> bool:
    """Whether documents can be kept apart in one row of a model with this configuration (of transformers).

    Not where a sliding window is shorter than max_length or layers are of another kind; BadInput where the logits are
    changed behind the head, which our loss would leave out.
    """
    if changed := [name for name in ("final_logit_softcapping", "logit_scale", "logits_scaling") if getattr(config, name, None) not in (None, 1, 1.0)]:
        raise BadInput(f"models of the kind {config.model_type} change their logits ({changed[0]}), which the loss here would leave out")
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    others = set(getattr(config, "layer_types", None) or []) - {"full_attention"} - ({"sliding_attention"} if window else set())
    return (window or max_length) >= max_length and not others and not getattr(config, "attn_logit_softcapping", None)


def check_tokenizer(chat: Chat, config) -> None:
    """BadInput if the tokenizer has more tokens than the model has rows, besides those that the template brings: they would end the run in a step."""
    tokens, shown = len(chat.tokenizer) - len(chat.new_tokens), f"{chat.jinja}{chat.tokenizer.bos_token}{chat.tokenizer.eos_token}"
    beyond = {token for token, i in chat.tokenizer.get_vocab().items() if i >= config.vocab_size} - {*chat.new_tokens}
    if any(token not in chat.control or token in shown for token in beyond):  # a control token that nothing writes never comes up
        raise BadInput(f"{chat.name}: its tokenizer has {tokens:,} tokens, its model {config.vocab_size:,} rows: they do not belong together, or the "
                       f"model was not resized (extend_vocab.py does both)")


def read_examples(flags: dict, chat: Chat):
    """(examples, counts, numbers of those to train on, of those to evaluate on): of data_path, and of eval_path behind them."""
    from datasets import concatenate_datasets

    reading = {name: flags[name] for name in ("max_length", "skip_bad_records", "unescape_newlines", "document_separator", "preference") if name in flags}
    read = tokenize_documents if "document_separator" in flags else tokenize_records
    examples, counts = read(flags["data_path"], chat, **reading)
    train_on, evaluate_on = hold_out(examples, flags["eval_size"], flags["seed"])
    if flags["eval_path"]:
        examples = concatenate_datasets([examples, read(flags["eval_path"], chat, **reading)[0]])
        evaluate_on = range(len(train_on), len(examples))  # with eval_path nothing was held out
    return examples, counts, train_on, evaluate_on


def run_facts(flags: dict, **found) -> dict:
    """What a run must have in common with the one it goes on from: its data and base, the flags that make the weights, and what was found."""
    may_change = {"output_dir", "resume", "num_train_epochs", "early_stopping_patience", "training_arguments", "trust_remote_code", "allow_pickle",
                  "model_name_or_path", "data_path", "eval_path", "per_device_train_batch_size", "gradient_accumulation_steps",
                  "max_steps", "max_kl", "logging_steps", "save_steps"}  # flags of train_ppo.py, which takes no other training arguments
    hashed = {name: [file_hash(file) for file in document_files(flags[name])] for name in ("data_path", "eval_path") if flags.get(name)}
    blocks = flags["per_device_train_batch_size"] * flags.get("gradient_accumulation_steps", 1)  # one can be traded for the other
    free = re.compile("log|save|eval|report|max_steps|disable|dataloader|ddp")
    other = {name: value for name, value in flags.get("training_arguments", {}).items() if not free.match(name)}
    return {name: value for name, value in flags.items() if name not in may_change} | hashed | found | {
        "training_arguments": json.loads(json.dumps(other, default=str)), "blocks_per_rank_and_step": blocks,
        "base": flags["model_name_or_path"], "base_fingerprint": fingerprint(flags["model_name_or_path"])}


def make_blocks(lengths: list[int], chosen, max_length: int, packing: bool, shuffle: bool, multiple_of: int) -> list[list[int]]:
    """The chosen examples by block of max_length tokens, and empty blocks up to a multiple of the global batch.

    Without those, accelerate would train some blocks twice to make the ranks even; with them batch, accumulation and ranks
    can be traded for one another. Where the order of the data is kept, a block ends where the next example does not fit.
    """
    if multiple_of > 10**7:
        raise BadInput(f"a global batch of {multiple_of:,} blocks: lower --per_device_train_batch_size or --gradient_accumulation_steps")
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


def make_pair_blocks(lengths: list[int], chosen, max_length: int, *how) -> list[list[int]]:
    """make_blocks for pairs, whose two examples stand side by side in one block of 2 * max_length tokens."""
    pairs = [better + worse for better, worse in zip(lengths[::2], lengths[1::2])]
    return [[e for pair in block for e in (2 * pair, 2 * pair + 1)] for block in make_blocks(pairs, [e // 2 for e in chosen[::2]], 2 * max_length, *how)]


def draw_curves(history: list[dict], panels: dict[str, list[str]], file: Path) -> None:
    """A picture of what a Trainer has logged: below one another {label of the axis: names of its curves}."""
    import pandas
    from matplotlib.figure import Figure

    by_step, figure = pandas.DataFrame(history).groupby("step").last(), Figure(figsize=(7, 1 + 3 * len(panels)), layout="constrained")
    for axes, (label, names) in zip(figure.subplots(len(panels), squeeze=False).flat, panels.items()):
        if not (curves := by_step.filter(names).apply(pandas.to_numeric, errors="coerce")).empty:
            curves.interpolate().plot(ax=axes, marker=".", grid=True, ylabel=label)
    figure.savefig(file, dpi=120)


def describe(counts: Counter, blocks: list[list[int]], lengths: list[int], args) -> None:
    """Say what was read and what one step trains on, once for all ranks; `args` are transformers' TrainingArguments."""
    batch, accumulation, ranks = args.per_device_train_batch_size, args.gradient_accumulation_steps, args.world_size
    steps = len(blocks) // (batch * accumulation * ranks)
    tokens = sum(lengths[e] for block in blocks for e in block)
    if args.process_index == 0:
        print(f"{summarize(counts)}\nglobal batch = {batch} blocks x {accumulation} accumulation x {ranks} ranks = {batch * accumulation * ranks} blocks, "
              f"about {sum(map(len, blocks)) / steps:.0f} examples and {tokens / steps:,.0f} tokens; {steps} steps an epoch", file=sys.stderr)


def check_run(flags: dict) -> dict:
    """What can be refused before torch is imported; then the flags are shown. Returns what transformers.TrainingArguments takes."""
    given, evaluates = dict(flags["training_arguments"]), bool(flags["eval_path"] or flags["eval_size"])
    for flag in ("data_path", "eval_path"):
        if "document_separator" not in flags or not os.path.isdir(flags[flag] or ""):  # documents may be a folder of files
            check_file(flag, flags[flag])
    check_model(flags["model_name_or_path"], flags["allow_pickle"])
    check_output_dir(flags["output_dir"], flags["resume"], flags["model_name_or_path"])
    check_numbers(flags | given)
    ours = {"bf16": "precision", "fp16": "precision", "activation_checkpointing": "gradient_checkpointing", "resume_from_checkpoint": "resume",
            "train_sampling_strategy": "shuffle"} | dict.fromkeys(("auto_find_batch_size", "label_smoothing_factor", "use_liger_kernel", "torch_compile",
                                                                   "remove_unused_columns", "do_train", "save_only_model", "average_tokens_across_devices"))
    for name in given.keys() & ours:
        raise BadInput(f"--{name} is not taken here" + (f": use --{ours[name]}" if ours[name] else ": the loss, the batches and the checkpoints are our own"))
    if flags["eval_path"] and flags["eval_size"]:
        raise BadInput("--eval_path and --eval_size are two ways to say what to evaluate on: give one")
    if flags.get("use_dora") and flags.get("bits") == 8:
        raise BadInput("--use_dora with --bits 8: peft and bitsandbytes lose the scales of such weights, and the first step would fail: take --bits 4 or 16")
    for name, value in (("eval_strategy", given.get("eval_strategy", "no")), ("early_stopping_patience", flags["early_stopping_patience"])):
        if value not in ("no", 0) and not evaluates:
            raise BadInput(f"--{name}={value} needs something to evaluate on: add --eval_path or --eval_size")
    trackers = str(given.get("report_to") or "none").split(",")
    for tracker in set(trackers) - {"none", "all"}:
        if not tracker.isidentifier() or importlib.util.find_spec(tracker) is None:
            raise BadInput(f"--report_to={tracker} needs a package that is missing: pip install {tracker}")
    for name in ("deepspeed", "fsdp"):
        if given.get(name) and "LOCAL_RANK" not in os.environ:
            raise BadInput(f"--{name} needs torchrun: use the wrapper in scripts/, or put torchrun --nproc_per_node 1 in front of the script")
    if given.get("deepspeed"):
        check_file("deepspeed", given["deepspeed"])
        for section in {"optimizer", "scheduler"} & read_json(given["deepspeed"]).keys():
            raise BadInput(f"--deepspeed={given['deepspeed']} has a section {section!r}, which would overrule the flags (--learning_rate, --optim, "
                           f"--lr_scheduler_type, --warmup_steps): remove it, the flags say it all")
    show(flags)
    settings = {name: flags[name] for name in ("output_dir", "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs",
                                               "learning_rate", "lr_scheduler_type", "warmup_steps", "seed")}
    settings |= {"logging_steps": 10, "logging_first_step": True, "save_steps": 200, "save_total_limit": 2, "eval_strategy": "steps" if evaluates else "no",
                 "eval_steps": given.get("save_steps", 200), "per_device_eval_batch_size": flags["per_device_train_batch_size"],
                 "ddp_find_unused_parameters": False, "remove_unused_columns": False, "logging_nan_inf_filter": False,
                 "activation_checkpointing": flags["gradient_checkpointing"], "train_sampling_strategy": "random" if flags["shuffle"] else "sequential",
                 "activation_checkpointing_kwargs": {"use_reentrant": False} if flags["gradient_checkpointing"] else None}  # else LoRA has no gradient
    if flags["early_stopping_patience"]:
        settings |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "restore_callback_states_from_checkpoint": True}
    return settings | given | {"report_to": trackers}


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


def check_ranks(facts: dict) -> None:
    """BadInput if another rank trains on something else."""
    from accelerate.utils import gather_object

    for rank, other in enumerate(everyone := gather_object([facts])):
        for name in (name for name, first in everyone[0].items() if other[name] != first):
            raise BadInput(f"rank {rank} has another {name} than rank 0 ({other[name]}, not {everyone[0][name]}): give every machine the same files")
