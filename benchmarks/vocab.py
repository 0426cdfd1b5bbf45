"""What 20,000 new pieces do: tokens, minutes, memory, and whether sentencepiece agrees; beside public Chinese vocabularies.

    python benchmarks/vocab.py --data_dir ../shared/data      # two CPU threads, three minutes, 4 GB of disk

The base is LLaMA's tokenizer with random weights, two layers as wide as a 7B model's (1.3 GB in fp16), and then the small
default model. Pieces are learned from 33 MB: novels, statutes, recipes, manuals, poems, dialogues. One line in 50 is held
out, by its bytes, so that the public vocabularies are measured on the same lines; FLORES is another kind of text.
"""
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.report import add
from extend_vocab import parse_sentencepiece, read_corpus
from utils import BadInput, cli

CORPUS = ("text/*.txt", "dialogue/sharegpt_zh_1K.jsonl", "sft/huatuo_llama_data.jsonl")
PUBLIC = {"Chinese-LLaMA-2, 55,296": "ymcui/chinese-llama-2.tokenizer.model", "YuRen, 36,843": "yuren-han/tokenizer.model"}
SEED = 42


def main(
    *,
    data_dir: str = "../shared/data",
    num_pieces: int = 20000,
    default_model: str = "",
    threads: int = 2,
):
    """Print the figures of two runs of extend_vocab.py, and those of public vocabularies.

    Args:
        data_dir: Folder with the data; see its README for what it is.
        num_pieces: Pieces to learn.
        default_model: Folder of the byte-level base; empty: what scripts/default_model.py prints.
        threads: Of the CPU.
    """
    import sentencepiece
    from transformers import AutoTokenizer, LlamaTokenizer

    data, root = Path(data_dir).resolve(), Path(__file__).resolve().parent.parent
    if not (data / "tokenizer" / "llama" / "tokenizer.model").is_file():
        raise BadInput(f"--data_dir={data_dir} has no tokenizer/llama/tokenizer.model: this benchmark needs the data beside the project")
    default_model = default_model or subprocess.run([sys.executable, root / "scripts" / "default_model.py"], stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "corpus").mkdir()
        for file in (file for pattern in CORPUS for file in sorted(data.glob(pattern))):
            (folder / "corpus" / file.name).symlink_to(file)
        llama = random_llama(folder / "llama", data / "tokenizer" / "llama" / "tokenizer.model")
        held_out, _ = read_corpus(str(folder / "corpus"), 1e9, SEED)
        lines = {kind: [line.strip() for line in kept] for kind, kept in held_out.items()}
        for name in ("zho_Hans", "eng_Latn"):
            lines[f"FLORES {name}"] = (data / "eval" / f"flores_{name}.devtest").read_text("utf-8").split("\n")[:-1]
        chinese = [line for kind in held_out for line in lines[kind]]

        columns, notes = {}, []
        for title, base in (("LLaMA", llama), ("SmolLM2", default_model)):
            report = extend(base, folder / "corpus", folder / title, num_pieces, threads)
            old, new = AutoTokenizer.from_pretrained(base), AutoTokenizer.from_pretrained(folder / title)
            columns[f"{title} + {num_pieces:,}"] = {kind: tokens(old, kept) / tokens(new, kept) for kind, kept in lines.items()}
            columns[f"{title} + {num_pieces:,}"]["all held out"] = tokens(old, chinese) / tokens(new, chinese)
            weights = sum(file.stat().st_size for file in Path(base).glob("model*.safetensors"))
            notes += [f"{title}: {report['wall_seconds'] / 60:.1f} minutes in all, {report['peak_memory_bytes'] / 2**30:.2f} GiB at most ({weights / 2**30:.2f} GiB of weights), "
                      f"{report['new_pieces']:,} new pieces, {report['pieces_unreached']} never reached, {report['pieces_used']:,} used in the held-out text",
                      f"{title}: English and code, lines with the same ids: {report['lines_unchanged']:.2%}; FLORES eng: {same(old, new, lines['FLORES eng_Latn']):.2%}; "
                      f"held-out lines that come back as they were: {sum(new.decode(ids) == line for ids, line in zip(encode(new, chinese), chinese)) / len(chinese):.2%}"]
        sp = sentencepiece.SentencePieceProcessor
        model = folder / "LLaMA" / "tokenizer.model"
        new, merged, before = AutoTokenizer.from_pretrained(folder / "LLaMA"), sp(str(model)), sp(str(llama / "tokenizer.model"))
        notes.append(f"sentencepiece gives transformers' ids on {agree(new, merged, chinese):.2%} of the held-out lines, {agree(new, merged, lines['FLORES zho_Hans']):.2%} of FLORES; "
                     f"of the old model's on English FLORES {sum(a == b for a, b in zip(merged.encode(lines['FLORES eng_Latn']), before.encode(lines['FLORES eng_Latn']))) / len(lines['FLORES eng_Latn']):.2%}")
        usual = parse_sentencepiece(model.read_bytes(), str(model))
        for i, piece in enumerate(parse_sentencepiece((llama / "tokenizer.model").read_bytes(), "").pieces):
            usual.pieces[i].score = piece.score
        for piece in usual.pieces[32000:]:
            piece.score = 0
        (folder / "usual").mkdir()
        (folder / "usual" / "tokenizer.model").write_bytes(usual.SerializeToString())
        (folder / "usual" / "config.json").write_text('{"model_type": "llama"}')
        notes.append(f"the usual merge, new pieces with score 0: {agree(LlamaTokenizer.from_pretrained(folder / 'usual'), sp(str(folder / 'usual' / 'tokenizer.model')), chinese):.2%}")
        for title, file in PUBLIC.items():
            public = sp(str(data / "tokenizer" / file))
            columns[title] = {kind: sum(map(len, before.encode(kept))) / sum(map(len, public.encode(kept))) for kind, kept in (lines | {"all held out": chinese}).items()}
    print(f"| times fewer tokens | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    peer = next(iter(PUBLIC))
    for kind in [*lines, "all held out"]:
        print(f"| {kind} | {' | '.join(f'{column[kind]:.2f}' for column in columns.values())} |")
        if kind.startswith(("FLORES", "all")):
            add(f"extend_vocab.py, {num_pieces:,} pieces, {kind}", "times fewer tokens", [columns[f"LLaMA + {num_pieces:,}"][kind]], peer, [columns[peer][kind]])
    print("", *notes, sep="\n")


def random_llama(folder: Path, model_file: Path) -> Path:
    """Random weights with LLaMA's tokenizer, and the width of 7B."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaTokenizer

    torch.set_default_dtype(torch.float16)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=2, num_attention_heads=32, tie_word_embeddings=False))
    model.save_pretrained(folder, max_shard_size="500MB")
    torch.set_default_dtype(torch.float32)
    (folder / "tokenizer.model").write_bytes(model_file.read_bytes())
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True, "legacy": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert LlamaTokenizer.from_pretrained(folder)("a").input_ids[0] == 1
    return folder


def extend(base, corpus: Path, output: Path, num_pieces: int, threads: int) -> dict:
    """The last line of a run of extend_vocab.py in a process of its own, with the seconds of the whole process."""
    start = time.perf_counter()
    command = [sys.executable, "extend_vocab.py", "--model_name_or_path", base, "--corpus_path", corpus, "--output_dir", output, "--num_pieces", str(num_pieces), "--seed", str(SEED)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "RAYON_NUM_THREADS": str(threads)}
    run = subprocess.run(command, cwd=Path(__file__).resolve().parent.parent, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1]) | {"wall_seconds": time.perf_counter() - start}


def encode(tokenizer, lines: list[str]) -> list[list[int]]:
    return tokenizer(lines, add_special_tokens=False).input_ids


def tokens(tokenizer, lines: list[str]) -> int:
    return sum(map(len, encode(tokenizer, lines)))


def same(old, new, lines: list[str]) -> float:
    return sum(a == b for a, b in zip(encode(old, lines), encode(new, lines))) / len(lines)


def agree(tokenizer, model, lines: list[str]) -> float:
    return sum(a == b for a, b in zip(encode(tokenizer, lines), model.encode(lines))) / len(lines)


if __name__ == "__main__":
    cli(main)
