"""Extend the vocabulary of a base model with Chinese: new pieces, the merges that reach them, and a row for each.

Reads   a base model whose tokenizer is BPE (SentencePiece as in LLaMA 1 and 2, or byte-level as in LLaMA 3, Qwen, SmolLM2),
        and text to learn pieces from, or the pieces: a SentencePiece .model, or a list of characters and words
Writes  output_dir/, the base with the longer vocabulary. Next: pretrain_clm.py, since the new rows know nothing yet

    bash scripts/extend_vocab.sh                                             # a small vocabulary from sample/
    python extend_vocab.py --model_name_or_path M --corpus_path corpus/      # from your own text
    python extend_vocab.py --model_name_or_path M --pieces chinese_sp.model  # pieces that are there already

Every new piece holds a Chinese character, or begins one, so English and code keep their ids. With --init share the head
needs no training: a piece has the probability that the base gives its first old token, times the piece's share of what begins
so in the corpus. The base reads 4,096 tokens for that, layer by layer, and a head that was the embedding becomes a table of its own.
4,000 pieces then cost SmolLM2 2.5 bits a character of held-out Chinese instead of 3.3 (benchmarks/vocabulary_step.py).

Weights go from file to file, a few tensors at a time. Measured on two CPU cores in November 2026, with 20,000 pieces from 33 MB of text (benchmarks/vocab.py):

| base                              | time    | memory at most | tokens for held-out Chinese |
|-----------------------------------|---------|----------------|-----------------------------|
| LLaMA's tokenizer, 7B's embedding | 0.4 min | 1.8 GiB        | 2.24 times fewer            |
| SmolLM2-135M, byte-level          | 0.3 min | 1.6 GiB        | 2.66 times fewer            |
"""
import contextlib
import ctypes
import fcntl
import io
import itertools
import json
import logging
import math
import os
import random
import re
import resource
import shutil
import sys
import tempfile
import time
import zipfile
import zlib
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Literal

import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import Tokenizer, decoders, pre_tokenizers

from utils import BadInput, RunStopped, check_file, check_model, check_output_dir, check_positive, cli, document_files, read_lines, read_rows, show

# Radicals, punctuation, kana, Han characters; compatibility and full-width forms; the rare characters of planes 2 and 3
CHINESE = re.compile("[\u2e80-\u9fff\uf900-\ufaff\ufe30-\ufe4f\uff00-\uffef\U00020000-\U0003ffff]")
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # spells a text with a letter for each byte
RUN = re.compile(f" ?[{CHINESE.pattern[1:-1]}·—‘’“”…]+")  # what pieces are learned from; the blank before may belong to them
EMBEDDINGS = ("embed_tokens.weight", "word_embeddings.weight", "wte.weight", "embed_in.weight")  # how the names of these tables end
HEADS = ("lm_head.weight", "embed_out.weight")


def main(
    *,
    # model and data
    model_name_or_path: str,
    corpus_path: str | None = None,
    pieces: str | None = None,
    eval_path: str | None = None,
    output_dir: str = "output/extend_vocab",
    allow_pickle: bool = False,
    # pieces
    num_pieces: int = 20000,
    model_type: Literal["bpe", "unigram"] = "bpe",
    character_coverage: float = 0.9995,
    max_corpus_mb: float = 64,
    add_tokens: str | None = None,
    # rows
    init: Literal["mean_of_pieces", "mean", "share"] = "mean_of_pieces",
    pad_to_multiple_of: int = 128,
    seed: int = 42,
):
    """Extend the vocabulary of a base model with Chinese.

    Args:
        model_name_or_path: Folder or hub name of the base model.
        corpus_path: Text to learn pieces from: a file or folder of .txt, .jsonl, .json, .csv or .parquet.
        pieces: Pieces to add instead of learned ones: a SentencePiece .model, or a text file with one a line.
        eval_path: File of records to evaluate on.
        output_dir: Folder for checkpoints and the result.
        allow_pickle: Load weights that are pickles, which can run code.
        num_pieces: Pieces to learn from the corpus.
        model_type: How SentencePiece learns them: bpe, or unigram, which takes five times as long.
        character_coverage: Share of the corpus, 0.98 to 1, whose characters become pieces; the rarer ones stay bytes.
        max_corpus_mb: Text to learn from, in MB; of a larger corpus lines are drawn evenly.
        add_tokens: Control tokens to add, with commas between them, as in "<|im_start|>,<|im_end|>,<pad>".
        init: A new piece's row: mean_of_pieces (of the tokens it was), mean (of all), or share: the first, and a head that knows how often each piece comes.
        pad_to_multiple_of: The number of rows becomes a multiple of this, which GPUs multiply faster.
        seed: Of everything random.
    """
    flags, started = dict(locals()), time.perf_counter()
    check_file("pieces", pieces)
    for flag, path in (("corpus_path", corpus_path), ("eval_path", eval_path)):
        document_files(path) if os.path.isdir(path or "") else check_file(flag, path)
    check_model(model_name_or_path, allow_pickle)
    check_output_dir(output_dir)
    if not corpus_path and not pieces:
        raise BadInput("give --corpus_path to learn pieces from, or the --pieces to add")
    if init == "share" and not corpus_path:
        raise BadInput("--init=share counts the pieces in a text: add a --corpus_path, or take --init mean_of_pieces")
    check_positive(num_pieces=num_pieces, max_corpus_mb=max_corpus_mb, pad_to_multiple_of=pad_to_multiple_of)
    if not 0.98 <= character_coverage <= 1:
        raise BadInput(f"--character_coverage={character_coverage} must be between 0.98 and 1")
    wanted = read_pieces(pieces) if pieces else []
    show(flags)

    # ---- load ----
    folder = local_folder(model_name_or_path, allow_pickle)
    base, tokenizer = Weights(folder, allow_pickle=allow_pickle), load_base_tokenizer(folder)
    vocabulary = Vocabulary(tokenizer.backend_tokenizer)
    old_tokens, model_file = vocabulary.next_id, folder / "tokenizer.model"
    tables, old_rows = find_tables(base, old_tokens)
    texts, runs = read_corpus(corpus_path, max_corpus_mb, seed) if corpus_path else ({}, Counter())
    if init == "share" and len(runs) < 64:
        raise BadInput(f"{corpus_path} holds {len(runs)} runs of Chinese, --init=share needs 64 or more: give more text, or take --init mean_of_pieces")
    texts = read_corpus(eval_path, max_corpus_mb, seed, held_out=1)[0] if eval_path else texts

    # ---- extend ----
    if not pieces:
        known = sum(CHINESE.search(vocabulary.text(piece)) is not None for piece in vocabulary.vocab)  # some are found again
        wanted = learn_pieces(runs, num_pieces + known + 1000, model_type, character_coverage)
    counts = vocabulary.add(wanted, sys.maxsize if pieces else num_pieces)
    if not pieces and len(vocabulary.new) < num_pieces:
        raise BadInput(f"{corpus_path} gives {len(vocabulary.new):,} new pieces, not {num_pieces:,}: give more text, or a smaller --num_pieces")
    print(f"of {len(wanted):,} pieces {'given' if pieces else 'found'}: " + ", ".join(f"{count:,} {what}" for what, count in counts.items())
          + f"; with those that they are merged from: {len(vocabulary.new):,} new", file=sys.stderr)
    vocabulary.add_control([token.strip() for token in (add_tokens or "").split(",") if token.strip()])
    extended = vocabulary.tokenizer()
    was = [[token.id for token in vocabulary.base.model.tokenize(piece)] for piece in vocabulary.new]  # each new piece in old ids
    merged = vocabulary.sentencepiece_model(model_file) if vocabulary.sentencepiece and model_file.is_file() else None
    figures = report(vocabulary, extended, was, texts, merged)

    # ---- save ----
    rows = -(-max(vocabulary.next_id, old_rows) // pad_to_multiple_of) * pad_to_multiple_of
    config = json.loads((folder / "config.json").read_text("utf-8")) | {"vocab_size": rows}
    grown = {name: partial(longer_table, rows=rows, kept=old_tokens, was=[] if init == "mean" else was) for name in tables}  # {name: what makes it longer}
    sources = {name: name for name in base.tensors}  # {name: the tensor that it is made from}
    if init == "share":
        direction, head = bias_direction(folder, tokenizer, runs, seed, allow_pickle)
        head, config["tie_word_embeddings"] = next((name for name in tables if name.endswith(HEADS)), head), False
        if head not in tables:
            print(f"the head was the embedding, and is a table of its own now: {rows * len(direction) / 1e6:.1f} million weights more", file=sys.stderr)
        sources[head] = head if head in tables else tables[0]
        grown[head] = partial(head_by_shares, rows=rows, kept=old_tokens, shares=log_shares(vocabulary, extended, was, runs), direction=direction)
    if "<pad>" in vocabulary.vocab and tokenizer.pad_token is None:
        tokenizer.pad_token, config["pad_token_id"] = "<pad>", vocabulary.vocab["<pad>"]
    size = sum(base.tensors[source].nbytes * (rows if name in grown else old_rows) // old_rows for name, source in sources.items())
    with unfinished_folder(Path(output_dir), size, "output_dir") as unfinished:
        write_shards(unfinished, ((name, grown.get(name, lambda tensor: tensor)(base.read(source))) for name, source in sources.items()))
        left = ("tokenizer", "special_tokens", "added_tokens", "vocab.", "merges.", "model", "pytorch_model", ".")  # written anew, or not at all
        for file in folder.iterdir():
            if file.is_file() and file.suffix in (".json", ".jinja", ".md", ".txt", ".py", "") and not file.name.startswith(left):
                shutil.copyfile(file, unfinished / file.name)
        (unfinished / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")
        tokenizer.save_pretrained(unfinished)
        extended.save(str(unfinished / "tokenizer.json"))
        if merged:
            (unfinished / model_file.name).write_bytes(merged)
        result, lines = load_base_tokenizer(unfinished), [line for kind in texts.values() for line in kind[:500]]
        if encode_lines(result.backend_tokenizer, lines) != encode_lines(extended, lines) or result("a").input_ids != tokenizer("a").input_ids:
            raise RunStopped("the tokenizer was written, but reads back with other ids")
    print(json.dumps(figures | {"vocab_size": rows, "seconds": round(time.perf_counter() - started, 1),
                                "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "output_dir": output_dir}, ensure_ascii=False))


# ---- text ----
def read_corpus(path: str, max_corpus_mb: float, seed: int, held_out: int = 50) -> tuple[dict[str, list[str]], Counter]:
    """({kind of text: lines held out}, runs of Chinese in the other lines with their counts); a kind is a file.

    Whether a line is drawn, or is one of `held_out` that are held out, hangs on its bytes alone: every machine draws the
    same, and a line that stands twice is not on both sides.
    """
    files, texts, runs = list(map(Path, document_files(path))), {}, Counter()
    share = max_corpus_mb * 1e6 / sum(file.stat().st_size for file in files)
    for file in files:
        kept = texts.setdefault(file.stem if len(files) <= 20 else "all files", [])
        for row in (read_lines if file.suffix == ".txt" else read_rows)(str(file), Counter()):
            for line in filter(str.strip, text_lines(row)):
                draw = zlib.crc32(line.strip().encode(), seed)
                if draw % held_out == 0 and len(kept) < 20_000:  # that many are enough for a report
                    kept.append(line)
                elif draw % held_out and draw < share * 2**32:
                    runs.update(RUN.findall(line))
    return {kind: lines for kind, lines in texts.items() if lines}, runs


def text_lines(value):
    """Yield the lines of every text in a record, whatever its schema."""
    if isinstance(value, str):
        yield from value.strip("\r\n").split("\n")
    elif isinstance(value, (dict, list)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from text_lines(part)


# ---- pieces ----
def learn_pieces(runs: Counter, size: int, model_type: str, character_coverage: float) -> list[str]:
    """The characters and then the words that SentencePiece finds in runs of Chinese; with counts, so that 30 MB of text take seconds."""
    if not runs:
        raise BadInput("there is no Chinese in the text to learn pieces from")
    with tempfile.TemporaryDirectory() as folder:
        file, model = Path(folder, "runs.tsv"), io.BytesIO()
        file.write_text("".join(f"{run}\t{count}\n" for run, count in sorted(runs.items())), "utf-8")
        try:
            sentencepiece.SentencePieceTrainer.train(
                input=str(file), input_format="tsv", model_writer=model, model_type=model_type, vocab_size=size, hard_vocab_limit=False,
                character_coverage=character_coverage, normalization_rule_name="identity", remove_extra_whitespaces=False,
                add_dummy_prefix=False, shuffle_input_sentence=False, max_sentence_length=2**20, seed_sentencepiece_size=10 * size,
                num_threads=2, minloglevel=2)  # unigram adds up by thread: with another number it would find other pieces
        except (RuntimeError, ValueError) as problem:  # the latter of a number that is too large for it
            raise BadInput(f"SentencePiece cannot learn {size:,} pieces from this text: {str(problem).strip().splitlines()[-1]}") from None
    found = model_pieces(model.getvalue(), "what SentencePiece learned")
    return [piece for piece in found if len(piece) == 1] + [piece for piece in found if len(piece) > 1]


def read_pieces(path: str) -> list[str]:
    """The pieces of a SentencePiece model, or of a text file with one a line, in the order to add them."""
    if path.endswith(".model"):
        return model_pieces(Path(path).read_bytes(), path)
    lines = [line.split("\t")[0].strip() for line in read_lines(path, Counter())]
    for number, piece in enumerate(lines, 1):
        if len(piece) > 32:
            raise BadInput(f"{path}, line {number}: too long for a piece ({piece[:20]}...): give one character or word a line")
    return sorted(dict.fromkeys(filter(None, lines)), key=len)  # long words are merged from short ones


def model_pieces(data: bytes, name: str) -> list[str]:
    model = parse_sentencepiece(data, name)
    found = [piece.piece.replace("▁", " ") for piece in model.pieces if piece.type == piece.NORMAL and piece.piece != "▁"]
    return found if model.trainer_spec.model_type == model.trainer_spec.BPE else sorted(found, key=len)  # BPE's are in merging order


def parse_sentencepiece(data: bytes, name: str):
    """A SentencePiece model as its protocol buffer, which sentencepiece brings along."""
    with contextlib.suppress(DecodeError):
        if (model := ModelProto.FromString(data)).pieces:
            return model
    raise BadInput(f"{name} is not a SentencePiece model")


# ---- tokenizer ----
def load_base_tokenizer(folder: Path):
    """The tokenizer of a model folder. From tokenizer.model alone AutoTokenizer would make one without BOS and first blank."""
    from transformers import AutoTokenizer, LlamaTokenizer

    file = folder / "tokenizer.model"
    if file.is_file() and not (folder / "tokenizer_config.json").is_file() and not (folder / "tokenizer.json").is_file():
        parse_sentencepiece(file.read_bytes(), str(file))
        return LlamaTokenizer.from_pretrained(folder, add_bos_token=True)
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as problem:  # the libraries raise whatever a damaged file makes of them
        raise BadInput(f"no tokenizer could be loaded from {folder}: {str(problem)[:200]}") from None


def encode_lines(tokenizer, lines: list[str]) -> list[list[int]]:
    return [encoding.ids for encoding in tokenizer.encode_batch_fast(lines, add_special_tokens=False)]


class Vocabulary:
    """A BPE tokenizer whose vocabulary grows: each new piece gets the merges that reach it, behind all older ones.

    As in SentencePiece, any two neighbours may be merged that make a piece.
    """

    def __init__(self, base: Tokenizer):
        self.base, self.state = base, json.loads(base.to_str())
        model, control = self.state["model"], self.state["added_tokens"]
        self.sentencepiece = bool(model.get("byte_fallback"))
        if model["type"] != "BPE" or not (self.sentencepiece or "ByteLevel" in json.dumps(self.state["pre_tokenizer"])):
            raise BadInput(f"the base's tokenizer is {model['type']}, it can be extended if it is byte-level BPE, or SentencePiece BPE with byte fallback")
        # Control tokens stand in the vocabulary too, or `tokenizers` would number them anew, behind the new pieces
        self.vocab: dict[str, int] = model["vocab"] | {token["content"]: token["id"] for token in control}
        self.rank: dict[tuple[str, str], int] = {tuple(pair): rank for rank, pair in enumerate(model["merges"])}
        self.new: list[str] = []
        self.next_id = max(self.vocab.values()) + 1

    def spell(self, text: str) -> str:
        """A text in the tokenizer's letters: with ▁ for blanks, or one for each byte."""
        return text.replace(" ", "▁") if self.sentencepiece else BYTES.pre_tokenize_str(text)[0][0]

    def text(self, spelled: str) -> str:
        return spelled.replace("▁", " ") if self.sentencepiece else decoders.ByteLevel().decode([spelled])

    def words(self, text: str) -> list[str]:
        """What byte-level BPE cuts a text into before it merges; no merge goes across such a cut."""
        text = self.base.normalizer.normalize_str(text) if self.base.normalizer else text
        return [word for word, _ in self.base.pre_tokenizer.pre_tokenize_str(text)]

    def split(self, spelled: str) -> list[str]:
        """What the merges so far make of a piece's letters."""
        parts = list(spelled)
        while len(parts) > 1:
            rank, place = min((self.rank.get(pair, math.inf), place) for place, pair in enumerate(zip(parts, parts[1:])))
            if rank == math.inf:
                break
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        return parts

    def add(self, texts: list[str], limit: int) -> Counter:
        """Add texts as pieces until there are `limit` new ones; returns how many were added, or skipped for what reason.

        A piece is merged from left to right out of what it is now; its Chinese characters, and the beginnings on that way,
        become pieces before it. Where that would make a piece without Chinese the text is skipped: with " 2、" comes " 2".
        """
        counts = Counter()
        for text in texts:
            spelled = self.spell(text)
            if len(self.new) == limit:
                break
            if spelled in self.vocab:
                counts["already there"] += 1
            elif not CHINESE.search(text):
                counts["without Chinese"] += 1
            elif not self.sentencepiece and self.words(text) != [spelled]:
                counts["cut apart before any merge"] += 1
            else:
                for character in filter(CHINESE.match, text):
                    self._put(self._beginnings(self.spell(character)), limit)
                beginnings = self._beginnings(spelled)
                fit = all(CHINESE.search(self.text(piece)) or "\ufffd" in self.text(piece) for piece in beginnings)  # � is part of a character
                fit = fit and all(self.spell(character) in self.vocab for character in text)
                if fit:
                    self._put(beginnings, limit)
                counts["added" if fit else "that bring some without Chinese"] += 1
        return counts

    def _beginnings(self, spelled: str) -> list[str]:
        """The pieces that are missing on the way to a piece, and the piece itself."""
        parts = self.split(spelled)
        return [piece for end in range(1, len(parts) + 1) if (piece := "".join(parts[:end])) not in self.vocab]

    def _put(self, pieces: list[str], limit: int) -> None:
        for piece in pieces[: limit - len(self.new)]:
            self.vocab[piece] = self.next_id
            self.next_id += 1
            self.new.append(piece)
            for cut in range(1, len(piece)):
                if piece[:cut] in self.vocab and piece[cut:] in self.vocab:
                    self.rank.setdefault((piece[:cut], piece[cut:]), len(self.rank))

    def add_control(self, tokens: list[str]) -> None:
        """Add control tokens, which no text is merged to."""
        for token in tokens:
            if token not in self.vocab:
                self.state["added_tokens"].append({"id": self.next_id, "content": token, "special": True, "normalized": False,
                                                   "single_word": False, "lstrip": False, "rstrip": False})
                self.vocab[token] = self.next_id
                self.next_id += 1

    def tokenizer(self) -> Tokenizer:
        merges = [list(pair) for pair in self.rank]
        return Tokenizer.from_str(json.dumps(self.state | {"model": self.state["model"] | {"vocab": self.vocab, "merges": merges}}))

    def sentencepiece_model(self, file: Path) -> bytes:
        """The base's tokenizer.model with the same pieces, ids and order of merges.

        Scores are restated from that order, each another. New pieces that all score 0 are merged by sentencepiece from left
        to right, by transformers by id, and a third of all Chinese lines differ. LLaMA scores its double blank below all
        else; transformers, where there is no tokenizer.json, goes by ids and merges it before all else.
        """
        model, spelled, new = parse_sentencepiece(file.read_bytes(), str(file)), {i: piece for piece, i in self.vocab.items()}, set(self.new)
        for i, piece in enumerate(model.pieces):
            if piece.type == piece.NORMAL and spelled.get(i) != piece.piece:
                raise BadInput(f"{file} and the tokenizer.json beside it are of two tokenizers: id {i} is {piece.piece!r} and {spelled.get(i)!r}")
        for i in range(len(model.pieces), self.next_id):
            piece = spelled.get(i, f"<unused {i}>")
            model.pieces.add(piece=piece, type=model.SentencePiece.NORMAL if piece in new else model.SentencePiece.CONTROL)
        rank = {}
        for pair, place in self.rank.items():
            rank.setdefault("".join(pair), place)
        for piece in model.pieces:
            if piece.type == piece.NORMAL:
                piece.score = -rank.get(piece.piece, len(self.rank))
        model.trainer_spec.vocab_size = len(model.pieces)
        return model.SerializeToString()


def report(vocabulary: Vocabulary, extended, was: list[list[int]], texts: dict[str, list[str]], merged: bytes | None) -> dict:
    """Print what the new pieces do for text that they were not learned from; the figures for the last line."""
    import argparse
    import inspect
    from pydoc_data.topics import topics

    latin = {"English (Python's manual)": "\n".join(topics.values())[:200_000].split("\n"), "code (argparse)": inspect.getsource(argparse).split("\n")}
    figures, used, tokens, same = {}, Counter(), Counter(), []
    print("characters   per token: before   after   fewer tokens", file=sys.stderr)
    for kind, lines in (texts | latin).items():
        old, new = encode_lines(vocabulary.base, lines), encode_lines(extended, lines)
        characters, before, after = (sum(map(len, each)) for each in (lines, old, new))
        print(f"{characters:>10,}{characters / before:>20.2f}{characters / after:>8.2f}{before / after:>13.2f} x   {kind}", file=sys.stderr)
        figures[kind] = [round(characters / before, 3), round(characters / after, 3)]
        if kind in latin:
            same += [a == b for a, b in zip(old, new)]
        else:
            tokens.update(before=before, after=after)
            used.update(i for ids in new for i in ids)
    saved = {piece: used[vocabulary.vocab[piece]] * (len(ids) - 1) for piece, ids in zip(vocabulary.new, was)}
    count = sum(used[vocabulary.vocab[piece]] > 0 for piece in saved)
    unreached = sum(len(extended.model.tokenize(piece)) > 1 for piece in saved)
    best = ", ".join(f"{vocabulary.text(piece)} {saved[piece]:,}" for piece in sorted(saved, key=saved.get, reverse=True)[:10])
    print(f"English and code: {sum(same) / len(same):.2%} of {len(same):,} lines keep their ids\n"
          f"of {len(saved):,} new pieces {unreached:,} can never come up, {count:,} do in the held-out text"
          + f"; most tokens are saved there by {best}" * bool(count), file=sys.stderr)
    agreement = None
    if merged and texts:
        # without first blanks: before these sentencepiece puts another, and transformers does not
        lines = [line.strip() for kind in texts.values() for line in kind]
        theirs = sentencepiece.SentencePieceProcessor(model_proto=merged).encode(lines)
        agreement = round(sum(a == b for a, b in zip(encode_lines(extended, lines), theirs)) / len(lines), 5)
        print(f"sentencepiece gives the ids of transformers on {agreement:.2%} of the held-out lines", file=sys.stderr)
    return {"new_pieces": len(saved), "pieces_used": count, "pieces_unreached": unreached, "lines_unchanged": round(sum(same) / len(same), 5),
            "sentencepiece_agreement": agreement, "characters_per_token": figures,
            "times_fewer_tokens": round(tokens["before"] / tokens["after"], 3) if texts else None}


# ---- rows ----
def find_tables(base: "Weights", tokens: int) -> tuple[list[str], int]:
    """The names of embedding and head in the files, and their rows; BadInput if they are not there, or the tokenizer is of another model."""
    from transformers import AutoConfig

    try:
        config, found = AutoConfig.from_pretrained(base.folder), [name for name in base.tensors if name.endswith(EMBEDDINGS + HEADS)]
    except Exception as problem:  # the libraries raise whatever a damaged file makes of them
        raise BadInput(f"{base.folder} is no model that transformers knows: {str(problem)[:200]}") from None
    for endings, needed in ((EMBEDDINGS, True), (HEADS, not config.tie_word_embeddings)):
        if needed and not any(name.endswith(endings) for name in found):
            raise BadInput(f"{base.folder} has no {' or '.join(endings)} in its weights: they are not those of its config.json")
    if biases := [name for name in base.tensors if name.endswith(tuple(head.replace("weight", "bias") for head in HEADS))]:
        raise BadInput(f"{base.folder} has a bias in its head ({biases[0]}), as no LLaMA has: its new pieces would have none")
    for name in [name for name in found if len(base.tensors[name]) != config.vocab_size]:
        raise BadInput(f"{base.folder}: {name} has {len(base.tensors[name]):,} rows, config.json says {config.vocab_size:,}")
    if not tokens <= config.vocab_size < tokens + 1024:  # some models have a few hundred rows that no token uses
        raise BadInput(f"{base.folder}: its tokenizer has {tokens:,} tokens, the model {config.vocab_size:,} rows, so they do not belong together")
    return found, config.vocab_size


def longer_table(old, rows: int, kept: int, was: list[list[int]]):
    """The first `kept` rows of a table as they are, below them the mean of what each new piece was, and the mean of all for the rest.

    A padding row of zeros has the logit 0, which can be the highest. The mean row's logit is the mean of all logits: never
    above the highest, and its probability, by the inequality of the means, never above 1 / kept.
    """
    import torch

    table = old.new_empty(rows, *old.shape[1:])  # (rows, D)
    table[:kept] = old[:kept]
    table[kept:] = sum(part.sum(0, dtype=torch.float64) for part in old[:kept].split(1024)) / kept
    for row, ids in zip(table[kept:], was):
        row.copy_(old[ids].float().mean(0))
    return table


def log_shares(vocabulary: Vocabulary, extended, was: list[list[int]], runs: Counter) -> dict[int, tuple[int, float]]:
    """{token: (old token that it begins with, logarithm of the share of that one's probability that it takes)}: for new pieces, and such old tokens.

    A blank or Latin letters before are passed over: English needs their probability whole.
    """
    beginning = lambda piece: CHINESE.search(vocabulary.text(piece)) or "\ufffd" in vocabulary.text(piece) or piece.startswith("<0x")
    first = {vocabulary.vocab[piece]: next(i for i in ids if beginning(vocabulary.base.id_to_token(i))) for piece, ids in zip(vocabulary.new, was)}
    first |= {token: token for token in first.values()}
    counts = dict.fromkeys(first, 0.5)  # a piece that the corpus lacks is rare, not impossible
    for run, count in runs.items():
        for word in [vocabulary.spell(run)] if vocabulary.sentencepiece else vocabulary.words(run):
            for token in extended.model.tokenize(word):
                if token.id in counts:
                    counts[token.id] += count
    totals = Counter()
    for token, begins_with in first.items():
        totals[begins_with] += counts[token]
    return {token: (begins_with, math.log(counts[token] / totals[begins_with])) for token, begins_with in first.items()}


def bias_direction(folder: Path, tokenizer, runs: Counter, seed: int, allow_pickle: bool):
    """(direction (D,), name of the head): what adds the same to every logit of a row on Chinese text, as a bias would, which a head does not have.

    Ridge regression of the number 1 on the base's last hidden states h: u = (H'H / n + l I)^-1 mean(h), with l a hundredth of the mean diagonal.
    One layer's weights are in memory at a time (accelerate's disk offload).
    """
    import torch
    from transformers import AutoModelForCausalLM

    logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)  # it warns of what is asked for here
    with contextlib.suppress(AttributeError, OSError):  # glibc alone: as in write_shards; else the layers' memory would add up
        ctypes.CDLL(None).mallopt(-3, 2**20)
    with tempfile.TemporaryDirectory() as copied:  # stays empty but for pickles, which cannot be read tensor by tensor
        model, loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map={"": "disk"}, offload_folder=copied,
                                                             use_safetensors=None if allow_pickle else True, output_loading_info=True)
        if missing := sorted(loaded["missing_keys"]):
            raise BadInput(f"{folder} lacks {len(missing)} of its weights, {missing[0]} for one: the files do not belong to its config.json")
        for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
            if getattr(model.config, name, None) not in (None, 1, 1.0):
                raise BadInput(f"--init=share does not know heads with {name}, as {folder} has one: take --init mean_of_pieces")
        drawn = random.Random(seed).sample(sorted(runs), min(len(runs), 8 * 512))
        texts = [tokenizer("\n".join(drawn[i::8]), truncation=True, max_length=512).input_ids for i in range(8)]
        ids = torch.nn.utils.rnn.pad_sequence(list(map(torch.tensor, texts)), batch_first=True)  # (8, T)
        with torch.inference_mode():
            hidden = model.eval().base_model(input_ids=ids, use_cache=False)[0].double()  # (8, T, D)
        head = next(f"{name}.weight" for name, module in model.named_modules() if module is model.get_output_embeddings())
    hidden = [states[1:len(text)] for states, text in zip(hidden, texts)]  # the first token of a text has a state unlike all others

    def solve(states):
        """(N, D) -> (D,)"""
        gram = states.T @ states / len(states)
        return torch.linalg.solve(gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype), states.mean(0))

    seen = torch.cat(hidden[6:]) @ solve(torch.cat(hidden[:6]))
    print(f"a bias of 1 is {seen.mean():.2f} +- {seen.std():.2f} on {len(seen):,} Chinese tokens apart from those it was fitted to", file=sys.stderr)
    return solve(torch.cat(hidden)).float(), head


def head_by_shares(old, rows: int, kept: int, shares: dict[int, tuple[int, float]], direction):
    """A head (rows, D) in which each piece has the probability of the old token that it begins with, times its share; the rest as in longer_table."""
    table = longer_table(old, rows, kept, [])
    for token, (begins_with, log_share) in shares.items():
        table[token] = (old[begins_with].float() + log_share * direction).to(table.dtype)
    return table


# ==== tensors ====
# Weights as they lie in a folder, read one by one: a converter takes the memory of a few tensors, whatever the model.
BESIDE = (".json", ".jinja", ".model", ".py", ".tiktoken", ".txt")  # endings of what a model needs besides its weights


def local_folder(model_name_or_path: str, allow_pickle: bool = False) -> Path:
    """The folder of a model or a delta, fetched if it is a name on the hub; BadInput if a model is not whole, or quantized."""
    folder = Path(model_name_or_path)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(model_name_or_path, allow_patterns=[f"*{end}" for end in (*BESIDE, ".safetensors", *[".bin"] * allow_pickle)]))
        except (OSError, ValueError) as problem:
            raise BadInput(f"{folder} is no folder, and could not be fetched from the hub: {str(problem)[:200]}") from None
    if not (folder / "delta.json").is_file():
        check_model(str(folder), allow_pickle)
        if "quantization_config" in json.loads((folder / "config.json").read_text("utf-8")):
            raise BadInput(f"{folder} is quantized: give the 16-bit model that it was made from")
    return folder


class Weights:
    """The tensors in a folder, each read when it is asked for. `tensors` has type and shape of each, as a tensor on torch's meta device.

    Args:
        stem: The folder holds stem.safetensors, or shards with an index; or, with allow_pickle, one of the pickles.
    """

    def __init__(self, folder: Path, stem: str = "model", allow_pickle: bool = False):
        self.folder, self.tensors, self.paths, pickles = folder, {}, {}, (f"{stem}.bin", "pytorch_model.bin")
        candidates = [name for file in (f"{stem}.safetensors", *pickles * allow_pickle) for name in (file, f"{file}.index.json")]
        found = next((name for name in candidates if (self.folder / name).is_file()), None)
        if found is None:
            waiting = next((pickle for pickle in pickles if (self.folder / pickle).is_file()), None)
            why = f" but a pickle, {waiting}, which can run code when it is loaded: if you trust it, add --allow_pickle True" if waiting else ""
            raise BadInput(f"{folder} holds no {stem}.safetensors{why}")
        mapped = json.loads((self.folder / found).read_text("utf-8"))["weight_map"] if found.endswith(".json") else {}
        for path in [self.folder / file for file in sorted(set(mapped.values())) or [found]]:
            try:
                names, get, _ = self._open(path)
                self.tensors.update({name: get(name).to("meta") for name in names})
            except Exception as problem:  # safetensors, zip and pickle have their own for a file that is cut off
                raise BadInput(f"{path} could not be read ({str(problem)[:200]}): it is missing, cut off or damaged, "
                               f"or only points to the real one (git-lfs). Download it again") from None
            self.paths.update(dict.fromkeys(names, path))
        if missing := mapped.keys() - self.tensors.keys():
            raise BadInput(f"{folder} lacks {len(missing)} tensors that its {found} names, {min(missing)} for one")

    def read(self, name: str, rows: slice | None = None):
        """A tensor, or some of its rows, that may be changed; mapped anew, since pages that were read count as memory as long as a mapping lives."""
        _, get, get_slice = self._open(self.paths[name])
        return get(name) if rows is None else get_slice(name)[rows]

    def _open(self, path: Path):
        """The names in a file, and functions that map the tensor of one, whole or in part."""
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            opened = safe_open(path, "pt")
            return opened.offset_keys(), opened.get_tensor, opened.get_slice
        import torch

        held = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))  # files of torch before 1.6 are no zip
        return list(held), held.__getitem__, held.__getitem__


# ==== shards ====
# A folder written tensor by tensor, as they come, with what a model needs besides.
SHARD = 200e6  # bytes of tensors that are held, and then written as one file


def files_beside(folder: Path) -> dict[str, Path]:
    """What a model needs besides its weights, by name: configuration, tokenizer, chat template."""
    return {file.name: file for file in sorted(folder.iterdir()) if file.suffix in BESIDE and not file.name.endswith((".index.json", "delta.json"))}


def write_shards(folder: Path, tensors, stem: str = "model") -> None:
    """Write pairs of name and tensor as they come, in files of about 200 MB with an index, and read back what is in them."""
    from safetensors.torch import save_file

    with contextlib.suppress(AttributeError, OSError):  # glibc alone: what is freed between tensors that are held goes back to the system (M_MMAP_THRESHOLD)
        ctypes.CDLL(None).mallopt(-3, 2**20)
    parts, part, size, wanted = [], {}, 0, {}
    for name, tensor in itertools.chain(tensors, [(None, None)]):
        if part and (name is None or size + tensor.nbytes > SHARD):
            save_file(part, folder / f"{len(parts)}.part", {"format": "pt"})
            parts, part, size = [*parts, list(part)], {}, 0
        if name is not None:
            part[name], wanted[name], size = tensor.contiguous(), (tensor.dtype, tensor.shape), size + tensor.nbytes
        del tensor  # or it would live on while the next one is made
    files = [f"{stem}-{number:05}-of-{len(parts):05}.safetensors" for number in range(1, len(parts) + 1)] if len(parts) > 1 else [f"{stem}.safetensors"]
    for number, file in enumerate(files):
        (folder / f"{number}.part").rename(folder / file)
    if len(files) > 1:
        size = sum((folder / file).stat().st_size for file in files)
        index = {"metadata": {"total_size": size}, "weight_map": {name: file for file, names in zip(files, parts) for name in names}}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2), "utf-8")
    if {name: (tensor.dtype, tensor.shape) for name, tensor in Weights(folder, stem).tensors.items()} != wanted:
        raise RunStopped("the weights were written, but read back with other tensors: is the disk failing?")


@contextlib.contextmanager
def unfinished_folder(folder: Path, size: int, flag: str):
    """A folder, which --flag gave, that is there whole or not at all: write `size` bytes to the path this yields, it is renamed at the end."""
    folder = folder.resolve()  # a link cannot be renamed onto
    unfinished = folder.parent / f".{folder.name}-unfinished"  # a fixed name: the next run clears away what a killed one left
    try:
        unfinished.mkdir(parents=True, exist_ok=True)
    except OSError as problem:  # a name that is too long, a file system that takes no folders
        raise BadInput(f"--{flag}={str(folder)[:60]} cannot be written: {problem.strerror}") from None
    lock = os.open(unfinished, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BadInput(f"--{flag}={folder} is being written by another run") from None
    try:
        for left in unfinished.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        if (free := shutil.disk_usage(unfinished).free) < size:
            raise BadInput(f"--{flag}={folder} has {free / 1e9:.1f} GB free, {size / 1e9:.1f} GB are to be written: free some space")
        yield unfinished
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        os.close(lock)


if __name__ == "__main__":
    cli(main)
