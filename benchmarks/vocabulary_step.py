"""Does the vocabulary step pay? Bits per character with and without it, at equal tokens and at equal characters, and characters a second.

    python benchmarks/vocabulary_step.py --data_dir ../shared/data             # a night on two CPU threads; run again, it goes on
    python benchmarks/vocabulary_step.py --data_dir ../shared/data --steps 0   # where both begin, in a quarter of an hour

The default model reads novels, statutes and recipes by LoRA, with embedding and head: once as it is, once with new pieces (extend_vocab.py --init share).
Held out are the last 3 % of each file, of which three draws of excerpts of 200 characters count; the 3 % before them choose the learning rate of each.
"""
import inspect
import json
import math
import os
import random
import re
import statistics
import subprocess
import sys
import textwrap
import time
from itertools import accumulate
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from utils import BadInput, check_positive, cli

KINDS = {"novel": ("三国演义.txt", "西游记.txt", "水浒传.txt"), "law": ("中国法律_core.txt",), "recipe": ("做菜HowToCook.txt",)}
DRAWS = 3  # of excerpts from what is held out


def main(
    *,
    data_dir: str = "../shared/data",
    work_dir: str = "output/vocabulary_step",
    num_pieces: int = 4000,
    steps: int = 400,
    max_length: int = 512,
    eval_steps: int = 40,
    learning_rates: str = "3e-4,1e-3,3e-3",
    tune_steps: int = 40,
    excerpts: int = 8,
    precision: Literal["auto", "bf16", "fp32"] = "auto",
):
    """Print where the two begin, train them, and plot them.

    Args:
        data_dir: Folder with the data; see its README for what it is.
        work_dir: Where models, logs, figures.json and curves.png go; what is there already is not done again.
        num_pieces: New pieces.
        steps: For each of the two; 0 ends behind the figures that need no training.
        max_length: Tokens of a step.
        eval_steps: Steps between evaluations.
        learning_rates: To choose from, with commas between them; one is taken as it is.
        tune_steps: Steps for each of them.
        excerpts: Of each kind of text, in each draw.
        precision: Of the training.
    """
    for name in (name for names in KINDS.values() for name in names):
        if not Path(data_dir, "text", name).is_file():
            raise BadInput(f"--data_dir={data_dir} has no text/{name}: this benchmark needs the data beside the project")
    check_positive(num_pieces=num_pieces, max_length=max_length, eval_steps=eval_steps, tune_steps=tune_steps, excerpts=excerpts)
    try:
        rates = [float(rate) for rate in str(learning_rates).strip("()").split(",")]
    except ValueError:
        raise BadInput(f"--learning_rates={learning_rates} is no list such as 3e-4,1e-3") from None
    work = Path(work_dir).resolve()
    work.mkdir(parents=True, exist_ok=True)
    write_data(Path(data_dir, "text"), work, excerpts)
    environment = os.environ | {"OMP_WAIT_POLICY": "passive"}
    base = Path(subprocess.run([sys.executable, "scripts/default_model.py"], cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout.strip())
    figures_file = work / "figures.json"
    figures = json.loads(figures_file.read_text("utf-8")) if figures_file.is_file() else {}

    def measured(name: str, function, *arguments):
        """A figure of the file, or measured and put there."""
        if name not in figures:
            figures[name] = function(*arguments)
            figures_file.write_text(json.dumps(figures, indent=2, ensure_ascii=False), "utf-8")
        return figures[name]

    def run(name: str, *flags) -> Path:
        """The folder that a stage makes, made if it is not there; a run that was stopped goes on."""
        if not (work / name / "config.json").is_file() and not (work / name / "adapter_config.json").is_file():
            with open(work / f"{name}.log", "a") as log:
                begun = ["--resume", "True"] if (work / name).is_dir() and flags[0] == "pretrain_clm.py" else []
                subprocess.run([sys.executable, *map(str, flags), "--output_dir", str(work / name), *begun], cwd=ROOT, env=environment, stdout=log, stderr=log, check=True)
        return work / name

    def pretrain(name: str, model: Path, steps: int, learning_rate: float, eval_path: Path) -> tuple[Path, list[tuple[int, float]]]:
        """The adapter, and (step, bits per character) of each evaluation."""
        made = run(name, "pretrain_clm.py", "--model_name_or_path", model, "--data_path", work / "corpus.jsonl", "--eval_path", eval_path, "--train", "lora",
                   "--max_length", max_length, "--max_steps", steps, "--learning_rate", learning_rate, "--precision", precision, "--lora_r", 32, "--lora_alpha", 64,
                   "--gradient_accumulation_steps", 1, "--gradient_checkpointing", False, "--eval_on_start", eval_path.stem != "tune", "--eval_strategy", "steps",
                   "--eval_steps", min(eval_steps, steps), "--save_steps", min(eval_steps, steps), "--save_total_limit", 1)
        found = re.findall(r"'eval_bits_per_character': '([\d.]+)', 'epoch': '?([\d.e-]+)", (work / f"{name}.log").read_text("utf-8"))
        bits = {float(epoch): float(value) for value, epoch in found}  # a run that went on has evaluated a step twice
        return made, [(round(steps * epoch / max(bits)), value) for epoch, value in sorted(bits.items())]

    # Where the two begin
    held_out = [work / f"held_out_{draw}.jsonl" for draw in range(DRAWS)]
    extend = ["extend_vocab.py", "--model_name_or_path", base, "--corpus_path", work / "corpus.jsonl", "--num_pieces", num_pieces]
    models = {"without": base} | {f"with, {init}": run(f"vocabulary_{init}", *extend, "--init", init) for init in ("mean_of_pieces", "share")}
    print("| bits per character, untrained | " + " | ".join(KINDS) + " | all |" + "\n|---|" + "---|" * (len(KINDS) + 1))
    for name, model in models.items():
        print(row(name, measured(f"{name}, start", bits_per_character, model, model, held_out)), flush=True)
        if name != "without":
            print(row(f"{name}, output side alone", measured(f"{name}, output side", bits_per_character, base, model, held_out)), flush=True)
    latin = {name: measured(f"{name}, English and code", bits_of_english_and_code, models[name]) for name in ("without", "with, share")}
    print("\nbits per token, before and after: " + "; ".join(f"{kind} {bits:.4f}, {latin['with, share'][kind]:.4f}" for kind, bits in latin["without"].items()), flush=True)
    if not steps:
        return

    # Both are trained, at the rate that is best for each on other text
    curves, merged = {}, {}
    for name, model in {"without": base, "with": models["with, share"]}.items():
        tuned = {rate: pretrain(f"{name}_{rate:g}", model, tune_steps, rate, work / "tune.jsonl")[1][-1][1] for rate in rates if len(rates) > 1}
        rate = min(tuned, key=tuned.get, default=rates[0])
        print(f"\n{name} the vocabulary step: learning rate {rate:g}" + "".join(f"; {other:g} gives {bits:.3f}" for other, bits in tuned.items()), flush=True)
        adapter, curves[name] = pretrain(name, model, steps, rate, held_out[0])
        merged[name] = run(f"{name}_merged", "merge_lora.py", "--model_name_or_path", model, "--lora_path", adapter)
    per_token = {name: measured(f"{name}, characters per token", characters_per_token, merged[name], work / "corpus.jsonl") for name in curves}
    print(f"\n| bits per character after {steps * max_length:,} tokens | " + " | ".join(KINDS) + " | all |" + "\n|---|" + "---|" * (len(KINDS) + 1))
    for name, model in merged.items():
        print(row(name, measured(f"{name}, end", bits_per_character, model, model, held_out)))
    for what, unit in (("tokens", dict.fromkeys(curves, max_length)), ("characters", {name: max_length * ratio for name, ratio in per_token.items()})):
        most = min(steps * unit[name] for name in curves)
        print(f"at {most:,.0f} {what} of training, first draw: " + ", ".join(f"{at(points, most / unit[name]):.2f} {name}" for name, points in curves.items()))
    print("\n| characters a second | training | generation |\n|---|---|---|")
    speeds = measured("generation", generation, merged, held_out[0])
    for name in curves:
        told = json.loads((work / f"{name}.log").read_text("utf-8").strip().splitlines()[-1])
        print(f"| {name} | {told['tokens_per_second'] * per_token[name]:.1f} | {statistics.median(speeds[name]):.1f} ({min(speeds[name]):.1f} to {max(speeds[name]):.1f}) |")
    plot(curves, per_token, max_length, work / "curves.png")


# ---- text ----
def write_data(texts: Path, work: Path, excerpts: int) -> None:
    """corpus.jsonl, in pieces of 1,500 characters; tune.jsonl and held_out_N.jsonl, excerpts of what stands behind it."""
    corpus, kept = [], {f"held_out_{number}": [] for number in range(DRAWS)} | {"tune": []}
    draws = [random.Random(number) for number in range(len(kept))]
    for kind, names in KINDS.items():
        whole = ["\n".join(line.strip() for line in (texts / name).read_text("utf-8").split("\n") if line.strip()) for name in names]
        corpus += [text[i : min(i + 1500, int(len(text) * 0.94))] for text in whole for i in range(0, int(len(text) * 0.94), 1500)]
        ends = {"tune": "\n".join(text[int(len(text) * 0.94) : int(len(text) * 0.97)] for text in whole)}
        for draw, (name, records) in zip(draws, kept.items()):
            end = ends.get(name) or "\n".join(text[int(len(text) * 0.97) :] for text in whole)
            starts = [draw.randrange(len(end) - 200) for _ in range(excerpts)]
            records += [{"kind": kind, "text": end[start : start + 200]} for start in starts]
    random.Random(0).shuffle(corpus)
    for name, records in (kept | {"corpus": [{"text": text} for text in corpus]}).items():
        (work / f"{name}.jsonl").write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8")


def characters_per_token(model: Path, file: Path) -> float:
    """In training text, with an end-of-text token for each document."""
    from transformers import AutoTokenizer

    texts = [json.loads(line)["text"] for line in file.read_text("utf-8").splitlines()[:500]]
    return sum(map(len, texts)) / sum(len(ids) + 1 for ids in AutoTokenizer.from_pretrained(model)(texts).input_ids)


# ---- figures ----
def bits_per_character(reader: Path, model: Path, files: list[Path]) -> dict[str, list[float]]:
    """{kind, or all: bits per character in each file}, as pretrain_clm.py counts them: of all tokens but a text's first, the last one ends it.

    Where the reader is another model than the one whose head is asked, the reader reads its own tokens, of which each token of the other is a
    group, and the other's head predicts the next of these from the reader's state behind each group: the loss of the output side alone.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, old = AutoTokenizer.from_pretrained(model), AutoTokenizer.from_pretrained(reader)
    asked = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    body = asked.model if reader == model else AutoModelForCausalLM.from_pretrained(reader, dtype=torch.float32).model
    found = {kind: [] for kind in (*KINDS, "all")}
    for file in files:
        sums = {kind: [0.0, 0] for kind in found}
        for record in map(json.loads, file.read_text("utf-8").splitlines()):
            ids, read = (of(record["text"], add_special_tokens=False).input_ids for of in (tokenizer, old))
            ends = list(accumulate(len(old.backend_tokenizer.model.tokenize(piece)) for piece in tokenizer.convert_ids_to_tokens(ids)))
            assert ends[-1] == len(read), "a new token is not a group of old ones"
            with torch.inference_mode():
                hidden = body(torch.tensor([read]), use_cache=False)[0][0][torch.tensor(ends) - 1]
                loss = torch.nn.functional.cross_entropy(asked.lm_head(hidden), torch.tensor([*ids[1:], tokenizer.eos_token_id]), reduction="sum")
            for kind in (record["kind"], "all"):
                sums[kind][0] += float(loss) / math.log(2)
                sums[kind][1] += len(tokenizer.decode(ids[1:], clean_up_tokenization_spaces=False))
        for kind, (bits, characters) in sums.items():
            found[kind].append(bits / characters)
    return found


def bits_of_english_and_code(model: Path) -> dict[str, float]:
    """Bits per token of a page of English and of a page of code, which every Python brings along."""
    import torch
    from pydoc_data.topics import topics
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, loaded = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    found = {}
    for kind, text in (("English", topics["class"]), ("code", inspect.getsource(textwrap))):
        ids = tokenizer(text, return_tensors="pt").input_ids[:, :1024]
        with torch.inference_mode():
            found[kind] = float(loaded(ids, labels=ids).loss) / math.log(2)
    return found


def generation(models: dict[str, Path], file: Path) -> dict[str, list[float]]:
    """Characters a second of each model, in turns, greedy, behind the beginning of three held-out texts."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = {name: (AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)) for name, model in models.items()}
    texts, speeds = [json.loads(line)["text"][:50] for line in file.read_text("utf-8").splitlines()[:3]], {name: [] for name in models}
    for text in texts:
        for name, (tokenizer, model) in loaded.items():
            ids, started = tokenizer(text, return_tensors="pt").input_ids, time.perf_counter()
            made = model.generate(ids, max_new_tokens=64, min_new_tokens=64, do_sample=False, pad_token_id=tokenizer.eos_token_id)[0, ids.shape[1] :]
            speeds[name].append(len(tokenizer.decode(made)) / (time.perf_counter() - started))
    return speeds


def row(name: str, found: dict[str, list[float]]) -> str:
    """Mean of the draws, and how far the outermost lie apart."""
    return f"| {name} | " + " | ".join(f"{statistics.mean(bits):.3f} ({min(bits):.2f} to {max(bits):.2f})" for bits in found.values()) + " |"


def at(points: list[tuple[int, float]], step: float) -> float:
    """Bits at a step, on the line between the evaluations before and behind it."""
    for (begin, before), (end, behind) in zip(points, points[1:]):
        if begin <= step <= end:
            return before + (behind - before) * (step - begin) / (end - begin)
    return points[-1][1]


def plot(curves: dict[str, list[tuple[int, float]]], per_token: dict[str, float], max_length: int, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for axes, what, ratios in zip(panels, ("tokens", "characters"), (dict.fromkeys(curves, 1), per_token)):
        for name, points in curves.items():
            axes.plot([step * max_length * ratios[name] for step, _ in points], [bits for _, bits in points], marker="o", label=f"{name} the vocabulary step")
        axes.set(xlabel=f"{what} trained", ylim=(0, None))
        axes.grid(alpha=0.3)
    panels[0].set(ylabel="bits per character, held out")
    panels[0].legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    cli(main)
