"""Bits per character against tokens trained, with and without the vocabulary step, in one plot.

    python benchmarks/vocabulary_step.py --data_dir ../shared/data      # hours on two CPU threads; run again, it goes on

The default model reads novels, statutes and recipes by LoRA, with embedding and head: once as it is, once with new pieces, whose rows
are trained alone first. Both see as many tokens; held out are the last 3 % of each file, of which 24 excerpts of 200 characters count.
"""
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from utils import BadInput, cli

KINDS = {"novel": ("三国演义.txt", "西游记.txt", "水浒传.txt"), "law": ("中国法律_core.txt",), "recipe": ("做菜HowToCook.txt",)}


def main(
    *,
    data_dir: str = "../shared/data",
    work_dir: str = "output/vocabulary_step",
    num_pieces: int = 4000,
    embedding_steps: int = 100,
    steps: int = 400,
    max_length: int = 512,
    eval_steps: int = 40,
):
    """Train the two, and plot them.

    Args:
        data_dir: Folder with the data; see its README for what it is.
        work_dir: Where models, logs and curves.png go; what is there already is not done again.
        num_pieces: New pieces.
        embedding_steps: Steps that train the new rows alone.
        steps: In all, for each of the two.
        max_length: Tokens of a step.
        eval_steps: Steps between evaluations.
    """
    for name in (name for names in KINDS.values() for name in names):
        if not Path(data_dir, "text", name).is_file():
            raise BadInput(f"--data_dir={data_dir} has no text/{name}: this benchmark needs the data beside the project")
    work = Path(work_dir).resolve()
    work.mkdir(parents=True, exist_ok=True)
    write_data(Path(data_dir, "text"), work)
    environment = os.environ | {"OMP_WAIT_POLICY": "passive"}
    base = subprocess.run([sys.executable, "scripts/default_model.py"], cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout.strip()

    def run(name: str, *flags) -> None:
        """Run a stage, if it is not done; one that was stopped goes on."""
        if not (work / name / "config.json").is_file() and not (work / name / "adapter_config.json").is_file():
            with open(work / f"{name}.log", "a") as log:
                begun = ["--resume", "True"] if (work / name).is_dir() and flags[0] == "pretrain_clm.py" else []
                subprocess.run([sys.executable, *map(str, flags), "--output_dir", str(work / name), *begun], cwd=ROOT, env=environment, stdout=log, stderr=log, check=True)

    def pretrain(name: str, model, train: str, begin: int, end: int, learning_rate: float) -> list[tuple[int, float]]:
        """(tokens, bits per character) at each evaluation of the steps from begin to end."""
        run(name, "pretrain_clm.py", "--model_name_or_path", model, "--data_path", work / "corpus.jsonl", "--eval_path", work / "held_out.jsonl",
            "--train", train, "--max_length", max_length, "--max_steps", end - begin, "--learning_rate", learning_rate, "--lora_r", 32, "--lora_alpha", 64,
            "--gradient_accumulation_steps", 1, "--gradient_checkpointing", False, "--eval_on_start", True, "--eval_strategy", "steps",
            "--eval_steps", eval_steps, "--save_steps", eval_steps, "--save_total_limit", 1)
        found = re.findall(r"'eval_bits_per_character': '([\d.]+)', 'epoch': '?([\d.e-]+)", (work / f"{name}.log").read_text("utf-8"))
        bits = {float(epoch): float(value) for value, epoch in found}  # a run that went on has evaluated a step twice
        return [(round(begin + (end - begin) * epoch / max(bits)) * max_length, value) for epoch, value in sorted(bits.items())]

    run("vocabulary", "extend_vocab.py", "--model_name_or_path", base, "--corpus_path", work / "corpus.jsonl", "--num_pieces", num_pieces)
    first = pretrain("embeddings", work / "vocabulary", "embeddings", 0, embedding_steps, 2e-3)
    then = pretrain("with", work / "embeddings", "lora", embedding_steps, steps, 1e-3)
    curves = {"without": pretrain("without", base, "lora", 0, steps, 5e-4), "with": first + then[1:]}
    plot(curves, work / "curves.png")
    for name, points in curves.items():
        print(f"{name} the vocabulary step: " + ", ".join(f"{bits:.2f} at {tokens // 1000}k" for tokens, bits in points))


def write_data(texts: Path, work: Path) -> None:
    """corpus.jsonl, in pieces of 1,500 characters, and held_out.jsonl."""
    draw, corpus, held_out = random.Random(0), [], []
    for names in KINDS.values():
        ends = []
        for name in names:
            text = "\n".join(line.strip() for line in (texts / name).read_text("utf-8").split("\n") if line.strip())
            cut = int(len(text) * 0.97)
            corpus += [text[i : min(i + 1500, cut)] for i in range(0, cut, 1500)]
            ends.append(text[cut:])
        end = "\n".join(ends)
        held_out += [end[i : i + 200] for i in (draw.randrange(len(end) - 200) for _ in range(8))]
    draw.shuffle(corpus)
    for name, documents in (("corpus", corpus), ("held_out", held_out)):
        (work / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents), "utf-8")


def plot(curves: dict[str, list[tuple[int, float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, points in curves.items():
        axes.plot(*zip(*points), marker="o", label=f"{name} the vocabulary step")
    axes.set(xlabel="tokens trained", ylabel="bits per character, held out", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    cli(main)
