"""Extend the vocabulary of a base model with Chinese: new pieces, the merges that reach them, and a row for each.

Reads   a base model whose tokenizer is BPE (SentencePiece as in LLaMA 1 and 2, or byte-level as in LLaMA 3, Qwen, SmolLM2),
        and text to learn pieces from, or the pieces: a SentencePiece .model, or a list of characters and words
Writes  output_dir/, the base with the longer vocabulary. Next: pretrain_clm.py, since the new rows know nothing yet

    bash scripts/extend_vocab.sh                                             # a small vocabulary from sample/
    python extend_vocab.py --model_name_or_path M --corpus_path corpus/      # from your own text
    python extend_vocab.py --model_name_or_path M --pieces chinese_sp.model  # pieces that are there already

Every new piece holds a Chinese character, or begins one, so English and code keep their ids. Weights go from file to
file: only embedding and head, 0.26 GB each in a 7B model, are ever in memory. Measured on two CPU cores in November 2026,
with 20,000 pieces from 33 MB of text (benchmarks/vocab.py):

| base                              | time    | memory at most | tokens for held-out Chinese |
|-----------------------------------|---------|----------------|-----------------------------|
| LLaMA's tokenizer, 7B's embedding | 0.4 min | 1.6 GiB        | 2.24 times fewer            |
| SmolLM2-135M, byte-level          | 0.3 min | 1.6 GiB        | 2.66 times fewer            |
"""
import json
import resource
import shutil
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Literal

from tensors import Shards, Weights, local_folder, open_model, torch_dtype, unfinished_folder
from utils import BadInput, RunStopped, check_file, check_model, check_output_dir, cli, show
from vocabulary import CHINESE, Vocabulary, corpus_files, learn_pieces, load_base_tokenizer, read_corpus, read_pieces


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
    init: Literal["mean_of_pieces", "mean"] = "mean_of_pieces",
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
        init: A new piece's row: the mean of the rows of the tokens that it was before, or of all rows.
        pad_to_multiple_of: The number of rows becomes a multiple of this, which GPUs multiply faster.
        seed: Of everything random.
    """
    show(locals())
    started = time.perf_counter()
    check_model(model_name_or_path, allow_pickle)
    check_file("pieces", pieces)
    check_output_dir(output_dir)
    if not corpus_path and not pieces:
        raise BadInput("give --corpus_path to learn pieces from, or the --pieces to add")
    if min(num_pieces, max_corpus_mb, pad_to_multiple_of) <= 0 or not 0.98 <= character_coverage <= 1:
        raise BadInput("--num_pieces, --max_corpus_mb and --pad_to_multiple_of must be above 0, --character_coverage between 0.98 and 1")
    for path in filter(None, (corpus_path, eval_path)):
        corpus_files(path)  # are they there?
    wanted = read_pieces(pieces) if pieces else []

    # ---- load ----
    # these imports take seconds: they wait until the flags are understood
    from models import load_skeleton

    folder = local_folder(model_name_or_path, allow_pickle)
    skeleton, tokenizer = load_skeleton(str(folder)), load_base_tokenizer(folder)
    vocabulary = Vocabulary(tokenizer.backend_tokenizer)
    old_tokens, model_file = vocabulary.next_id, folder / "tokenizer.model"
    base = open_model(folder, allow_pickle)
    matrices = find_matrices(base, skeleton, old_tokens)
    texts, runs = read_corpus(corpus_path, max_corpus_mb, seed) if corpus_path else ({}, Counter())
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
    rows = -(-max(vocabulary.next_id, skeleton.config.vocab_size) // pad_to_multiple_of) * pad_to_multiple_of
    config = json.loads((folder / "config.json").read_text("utf-8")) | {"vocab_size": rows}
    if "<pad>" in vocabulary.vocab and tokenizer.pad_token is None:
        tokenizer.pad_token, config["pad_token_id"] = "<pad>", vocabulary.vocab["<pad>"]
    tensors = dict(base.tensors)
    for name in matrices:
        old = tensors[name]
        tensors[name] = old._replace(shape=(rows, *old.shape[1:]), size=old.size // old.shape[0] * rows)
    with unfinished_folder(Path(output_dir), sum(tensor.size for tensor in tensors.values()), "output_dir") as unfinished:
        shards = Shards(unfinished, "model", tensors)
        for name in tensors:
            if name in matrices:
                write_matrix(base, shards, name, old_tokens, was, init)
            else:
                shards.copy(base, name)
        left = ("tokenizer", "special_tokens", "added_tokens", "vocab.", "merges.", "model", "pytorch_model", ".")  # written anew, or not at all
        for file in folder.iterdir():
            if file.is_file() and file.suffix in (".json", ".jinja", ".md", ".txt", ".py", "") and not file.name.startswith(left):
                shutil.copyfile(file, unfinished / file.name)
        (unfinished / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")
        tokenizer.save_pretrained(unfinished)
        extended.save(str(unfinished / "tokenizer.json"))
        if merged:
            (unfinished / model_file.name).write_bytes(merged)
        check_result(unfinished, tensors, tokenizer, extended, texts)
    print(json.dumps(figures | {"vocab_size": rows, "seconds": round(time.perf_counter() - started, 1),
                                "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "output_dir": output_dir}, ensure_ascii=False))


def report(vocabulary: Vocabulary, extended, was: list[list[int]], texts: dict[str, list[str]], merged: bytes | None) -> dict:
    """Print what the new pieces do for text that they were not learned from; the figures for the last line."""
    import argparse
    import inspect
    from pydoc_data.topics import topics

    import sentencepiece

    latin = {"English (Python's manual)": "\n".join(topics.values())[:200_000].split("\n"), "code (argparse)": inspect.getsource(argparse).split("\n")}
    figures, used, tokens, same = {}, Counter(), Counter(), []
    print("characters   per token: before   after   fewer tokens", file=sys.stderr)
    for kind, lines in (texts | latin).items():
        old, new = encode_lines(vocabulary.base, lines), encode_lines(extended, lines)
        characters, before, after = sum(map(len, lines)), sum(map(len, old)), sum(map(len, new))
        print(f"{characters:>10,}{characters / before:>20.2f}{characters / after:>8.2f}{before / after:>13.2f} x   {kind}", file=sys.stderr)
        figures[kind] = [round(characters / before, 3), round(characters / after, 3)]
        if kind in latin:
            same += [a == b for a, b in zip(old, new)]
        else:
            tokens.update(before=before, after=after)
            used.update(i for ids in new for i in ids)
    kept = sum(same) / len(same)
    print(f"English and code: {kept:.2%} of {len(same):,} lines keep their ids", file=sys.stderr)
    saved = {piece: used[vocabulary.vocab[piece]] * (len(ids) - 1) for piece, ids in zip(vocabulary.new, was)}
    count = sum(used[vocabulary.vocab[piece]] > 0 for piece in saved)
    unreached = [piece for piece in saved if len(extended.model.tokenize(piece)) > 1]
    best = ", ".join(f"{vocabulary.text(piece)} {saved[piece]:,}" for piece in sorted(saved, key=saved.get, reverse=True)[:10])
    print(f"of {len(saved):,} new pieces {len(unreached):,} can never come up, {count:,} do in the held-out text"
          + f"; most tokens are saved there by {best}" * bool(count), file=sys.stderr)
    agreement = None
    if merged and texts:
        # without first blanks: before these sentencepiece puts another, and transformers does not
        lines = [line.strip() for kind in texts.values() for line in kind]
        theirs = sentencepiece.SentencePieceProcessor(model_proto=merged).encode(lines)
        agreement = sum(a == b for a, b in zip(encode_lines(extended, lines), theirs)) / len(lines)
        print(f"sentencepiece gives the ids of transformers on {agreement:.2%} of the held-out lines", file=sys.stderr)
    return {"new_pieces": len(saved), "pieces_used": count, "pieces_unreached": len(unreached), "lines_unchanged": round(kept, 5),
            "sentencepiece_agreement": agreement and round(agreement, 5), "characters_per_token": figures,
            "times_fewer_tokens": round(tokens["before"] / tokens["after"], 3) if texts else None}


def encode_lines(tokenizer, lines: list[str]) -> list[list[int]]:
    return [encoding.ids for encoding in tokenizer.encode_batch_fast(lines, add_special_tokens=False)]


# ---- weights ----
def find_matrices(base: Weights, skeleton, tokens: int) -> list[str]:
    """The names of embedding and head in the files; BadInput if they are not there, or the tokenizer is of another model."""
    names = {f"{name}.weight" for name, module in skeleton.named_modules() if module in (skeleton.get_input_embeddings(), skeleton.get_output_embeddings())}
    found, rows = sorted(names & base.tensors.keys()), skeleton.config.vocab_size
    if not found or (len(found) < len(names) and not skeleton.config.tie_word_embeddings):
        raise BadInput(f"{base.folder} has no {min(names - set(found))} in its weights: they are not those of its config.json")
    if any(base.tensors[name].shape[0] != rows for name in found):
        raise BadInput(f"{base.folder}: {found[0]} has {base.tensors[found[0]].shape[0]:,} rows, config.json says {rows:,}")
    if not tokens <= rows < tokens + 1024:  # some models have a few hundred rows that no token uses
        raise BadInput(f"{base.folder}: its tokenizer has {tokens:,} tokens, the model {rows:,} rows, so they do not belong together")
    return found


def write_matrix(base: Weights, shards: Shards, name: str, kept: int, was: list[list[int]], init: str) -> None:
    """The first `kept` rows of a matrix as they are, below them a row for each new piece, and the mean of all for the rest.

    A padding row of zeros has the logit 0, which can be the highest. The mean row's logit is the mean of all logits: never
    above the highest, and its probability, by the inequality of the means, never above 1 / kept.
    """
    import torch

    tensor = base.tensors[name]
    old = torch.from_numpy(base.read(name)).view(torch_dtype(tensor.dtype)).view(tensor.shape)[:kept]  # (kept, D)
    mean = sum(part.sum(0, dtype=torch.float64) for part in old.split(1024)) / kept
    new = mean.to(old.dtype).repeat(shards.tensors[name].shape[0] - kept, 1)  # (rows - kept, D)
    if init == "mean_of_pieces":
        for row, ids in zip(new, was):
            row.copy_(old[ids].float().mean(0))
    shards.write(name, 0, old.contiguous().view(torch.uint8).numpy())
    shards.write(name, old.numel() * old.itemsize, new.view(torch.uint8).numpy())


def check_result(unfinished: Path, tensors: dict, tokenizer, extended, texts: dict[str, list[str]]) -> None:
    """Read the result back: every tensor has its shape, and the tokenizer gives the ids that it gave before it was saved."""
    from models import load_tokenizer

    if {name: tensor.shape for name, tensor in Weights(unfinished).tensors.items()} != {name: tensor.shape for name, tensor in tensors.items()}:
        raise RunStopped("the weights were written, but read back with other tensors")
    result, lines = load_tokenizer(str(unfinished)), [line for kind in texts.values() for line in kind[:500]]
    if encode_lines(result.backend_tokenizer, lines) != encode_lines(extended, lines) or result("a").input_ids != tokenizer("a").input_ids:
        raise RunStopped("the tokenizer was written, but reads back with other ids")


if __name__ == "__main__":
    cli(main)
