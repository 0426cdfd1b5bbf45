"""From text to pieces and merges: learning Chinese pieces, and growing a BPE tokenizer by them, byte-level or SentencePiece.

Importing this file imports neither torch nor transformers.
"""
import io
import json
import math
import re
import tempfile
import zlib
from collections import Counter
from pathlib import Path

from tokenizers import Tokenizer, decoders, pre_tokenizers

from utils import BadInput, read_rows, read_text

# Radicals, punctuation, kana, Han characters; compatibility and full-width forms; the rare characters of planes 2 and 3
CHINESE = re.compile("[\u2e80-\u9fff\uf900-\ufaff\ufe30-\ufe4f\uff00-\uffef\U00020000-\U0003ffff]")
RUN = re.compile(f" ?[{CHINESE.pattern[1:-1]}·—‘’“”…]+")  # what pieces are learned from; the blank before may belong to them
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # spells a text with a letter for each byte


# ---- text ----
def corpus_files(path: str) -> list[Path]:
    """The files of a corpus in the order of their names; BadInput if there are none."""
    formats = (".txt", ".jsonl", ".json", ".csv", ".parquet")
    if not Path(path).exists():
        raise BadInput(f"{path} does not exist: give a file or folder of text ({', '.join(formats)})")
    files = [file for file in (sorted(Path(path).rglob("*")) if Path(path).is_dir() else [Path(path)]) if file.suffix in formats and file.is_file()]
    if not any(file.stat().st_size for file in files):
        raise BadInput(f"{path} holds no text: files that end in {', '.join(formats)} are read, and none or only empty ones are there")
    return files


def corpus_lines(file: Path):
    """Yield the lines of a file; .txt and .jsonl are read one at a time and may be larger than memory."""
    if file.suffix not in (".txt", ".jsonl"):
        for row in read_rows(str(file), Counter()):
            yield from text_lines(row)
        return
    with open(file, "rb") as stream:
        for number, data in enumerate(stream, 1):
            try:
                line = data.decode().strip("\ufeff\r\n")
                yield from text_lines(json.loads(line) if file.suffix == ".jsonl" and line.strip() else line)
            except UnicodeDecodeError:
                read_text(str(file), Counter())  # names the line, and the way to mend it
            except json.JSONDecodeError as problem:
                raise BadInput(f"{file}, line {number}: not JSON ({problem.msg}): a .jsonl file holds one object a line") from None


def text_lines(value):
    """Yield the lines of every text in a record, whatever its schema."""
    if isinstance(value, str):
        yield from value.split("\n")
    elif isinstance(value, (dict, list)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from text_lines(part)


def read_corpus(path: str, max_corpus_mb: float, seed: int, held_out: int = 50) -> tuple[dict[str, list[str]], Counter]:
    """({kind of text: lines held out}, runs of Chinese in the other lines with their counts); a kind is a file.

    Whether a line is drawn, or is one of `held_out` that are held out, hangs on its bytes alone: every machine draws the
    same, and a line that stands twice is not on both sides.
    """
    files, texts, runs = corpus_files(path), {}, Counter()
    share = max_corpus_mb * 1e6 / sum(file.stat().st_size for file in files)
    for file in files:
        kept = texts.setdefault(file.stem if len(files) <= 20 else "all files", [])
        for line in filter(str.strip, corpus_lines(file)):
            draw = zlib.crc32(line.strip().encode(), seed)
            if draw % held_out == 0 and len(kept) < 20_000:  # that many are enough for a report
                kept.append(line)
            elif draw % held_out and draw < share * 2**32:
                runs.update(RUN.findall(line))
    return {kind: lines for kind, lines in texts.items() if lines}, runs


# ---- pieces ----
def learn_pieces(runs: Counter, size: int, model_type: str, character_coverage: float) -> list[str]:
    """The characters and then the words that SentencePiece finds in runs of Chinese, in the order to add them.

    It reads each run once, with its count, so that BPE learns from 30 MB of text in seconds.
    """
    import sentencepiece

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
        except RuntimeError as problem:
            reason = str(problem).strip().splitlines()[-1]
            raise BadInput(f"SentencePiece cannot learn {size:,} pieces from this text: {reason}") from None
    found = model_pieces(model.getvalue(), "what SentencePiece learned")
    return [piece for piece in found if len(piece) == 1] + [piece for piece in found if len(piece) > 1]


def read_pieces(path: str) -> list[str]:
    """The pieces of a SentencePiece model, or of a text file with one a line, in the order to add them."""
    if path.endswith(".model"):
        return model_pieces(Path(path).read_bytes(), path)
    lines = [line.split("\t")[0].strip() for line in read_text(path, Counter()).split("\n")]
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
    from google.protobuf.message import DecodeError
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    try:
        model = ModelProto.FromString(data)
    except DecodeError:
        model = ModelProto()
    if not model.pieces:
        raise BadInput(f"{name} is not a SentencePiece model")
    return model


# ---- merges ----
def load_base_tokenizer(folder: Path):
    """The tokenizer of a model folder. From tokenizer.model alone AutoTokenizer would make one without BOS and first blank."""
    from transformers import LlamaTokenizer

    from models import load_tokenizer

    model_file = folder / "tokenizer.model"
    if not model_file.is_file() or (folder / "tokenizer_config.json").is_file() or (folder / "tokenizer.json").is_file():
        return load_tokenizer(str(folder))
    parse_sentencepiece(model_file.read_bytes(), str(model_file))
    return LlamaTokenizer.from_pretrained(folder, add_bos_token=True)


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
