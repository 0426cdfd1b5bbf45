"""What reward model and DPO learn of faults that are made: pairs of a good answer and one that repeats itself, breaks off, answers something else, or does so in English.

    python benchmarks/preferences.py --model_name_or_path M --data_dir ../shared/data --output_dir output/preferences      # CPU

Pairs are made of alpaca_zh_demo.json, two faults a question in training, all four for the questions held out. A faulty answer is about as long as the good one,
unless it breaks off, so that length tells little. Prints accuracy by fault beside that of "the longer answer is better"; for DPO also the log-probability of the
good answers before and after, and how often sampled answers repeat four tokens in a row that they had before.
"""
import json
import random
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils import Chat, cli, tokenize_records

ROOT = Path(__file__).resolve().parent.parent
FAULTS = ("repeated", "cut", "other question", "English")


def main(
    *,
    model_name_or_path: str,
    data_dir: str = "../shared/data",
    output_dir: str = "output/preferences",
    pairs: int = 400,
    held_out: int = 100,
    longest: int = 100,
    only: str = "reward,dpo,dpo with sft_weight",
    sampled: int = 40,
):
    """Make the pairs, train, and print the figures.

    Args:
        model_name_or_path: Folder of the base model.
        data_dir: Folder with the data; see its README for what it is.
        output_dir: Folder for pairs and results.
        pairs: Number of pairs to train on.
        held_out: Number of questions to measure on.
        longest: Characters of the longest answer.
        only: What to train, with commas.
        sampled: Number of answers to sample before and after DPO.
    """
    folder = Path(output_dir)
    make_pairs(Path(data_dir), folder, pairs, held_out, longest)
    flags = ["--model_name_or_path", model_name_or_path, "--data_path", folder / "train.jsonl", "--eval_path", folder / "held_out.jsonl", "--max_length", 320,
             "--logging_steps", 5, "--eval_strategy", "no", "--gradient_checkpointing", False, "--gradient_accumulation_steps", 4, "--save_strategy", "no"]
    ways = {"reward": ["train_reward.py", "--learning_rate", 3e-4], "dpo": ["train_dpo.py", "--learning_rate", 1e-4],
            "dpo with sft_weight": ["train_dpo.py", "--learning_rate", 1e-4, "--sft_weight", 1]}
    for name in (name.strip() for name in only.split(",")):
        out, (script, *more) = folder / name.replace(" ", "_"), ways[name]
        if not (out / "report.json").is_file():
            command = [sys.executable, ROOT / script, *flags, "--output_dir", out, *more]
            report = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT).stdout.splitlines()[-1]
            (out / "report.json").write_text(report)
        print(f"{name}: {(out / 'report.json').read_text()}", flush=True)
        if name == "reward":
            accuracy_by_fault(model_name_or_path, out, folder)
        else:
            compare_samples(model_name_or_path, out, folder, sampled)


def make_pairs(data_dir: Path, folder: Path, pairs: int, held_out: int, longest: int) -> None:
    """train.jsonl, with two faults a question, and held_out.jsonl, with all of them."""
    read = lambda name: json.loads((data_dir / "sft" / name).read_text("utf-8"))
    good = [row for row in read("alpaca_zh_demo.json") if 16 <= len(row["output"]) <= longest and len(row["instruction"]) + len(row["input"]) <= 60]
    english, dice = [row["output"] for row in read("alpaca_en_demo.json")], random.Random(0)
    dice.shuffle(good)
    if len(good) < pairs // 2 + held_out:
        raise SystemExit(f"only {len(good)} records are short enough: raise --longest")

    def spoil(row: dict, fault: str) -> dict:
        answer = row["output"]
        worse = {"repeated": lambda: (answer[: max(4, len(answer) // 5)] * 6)[: len(answer)], "cut": lambda: answer[: int(len(answer) * dice.uniform(0.4, 0.7))],
                 "other question": lambda: min((other["output"] for other in dice.sample(good, 30) if other["output"] != answer), key=lambda text: abs(len(text) - len(answer))),
                 "English": lambda: min(dice.sample(english, 30), key=lambda text: abs(len(text) - 3 * len(answer)))[: 4 * len(answer)]}[fault]()
        return {"instruction": row["instruction"], "input": row["input"], "chosen": answer, "rejected": worse}

    folder.mkdir(parents=True, exist_ok=True)
    held = [spoil(row, fault) for row in good[:held_out] for fault in FAULTS]
    train = [spoil(row, FAULTS[(n + more) % len(FAULTS)]) for n, row in enumerate(good[held_out : held_out + pairs // 2]) for more in (0, 2)]
    for name, rows in (("train.jsonl", train), ("held_out.jsonl", held)):
        (folder / name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


def accuracy_by_fault(base: str, out: Path, folder: Path) -> None:
    """Rewards as plain transformers and peft give them."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(out)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, pad_token_id=tokenizer.pad_token_id)
    model = PeftModel.from_pretrained(model, str(out)).merge_and_unload().eval()
    examples, _ = tokenize_records(str(folder / "held_out.jsonl"), Chat(tokenizer, last_round_only=True), 320, preference=True)
    with torch.inference_mode():
        rewards = [float(model(torch.tensor([ids])).logits) for ids in examples["input_ids"]]
    print("| fault | pairs | reward model | the longer answer |\n|---|---|---|---|")
    right = lambda a, b: (a > b) + (a == b) / 2
    for n, fault in enumerate(FAULTS):
        chosen = [e for e in range(0, len(examples), 2) if examples[e]["record"] % len(FAULTS) == n]
        by_reward = sum(right(rewards[e], rewards[e + 1]) for e in chosen) / len(chosen)
        by_length = sum(right(examples[e]["length"], examples[e + 1]["length"]) for e in chosen) / len(chosen)
        print(f"| {fault} | {len(chosen)} | {by_reward:.1%} | {by_length:.1%} |", flush=True)


def compare_samples(base: str, out: Path, folder: Path, sampled: int) -> None:
    """Share of repeated 4-grams in answers of base and of adapter to the same held-out questions, at temperature 0.7."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(out)).eval()
    questions = list(dict.fromkeys(json.loads(line)["instruction"] + "\n" * bool(json.loads(line)["input"]) + json.loads(line)["input"]
                                   for line in (folder / "held_out.jsonl").read_text("utf-8").splitlines()))[:sampled]
    prompts = tokenizer.apply_chat_template([[{"role": "user", "content": text}] for text in questions], add_generation_prompt=True, padding=True,
                                            return_tensors="pt", return_dict=True)

    def repeated() -> float:
        torch.manual_seed(0)
        made = model.generate(**prompts, do_sample=True, temperature=0.7, top_p=1.0, top_k=0, max_new_tokens=64)[:, prompts["input_ids"].shape[1]:].tolist()
        grams = [[tuple(ids[i : i + 4]) for i in range(len(ids) - 3)] for ids in ([i for i in ids if i != tokenizer.pad_token_id] for ids in made)]
        return sum(len(of) - len(set(of)) for of in grams) / max(1, sum(map(len, grams)))

    with torch.inference_mode():
        after = repeated()
        with model.disable_adapter():
            before = repeated()
    print(f"repeated 4-grams in {len(questions)} sampled answers of 64 tokens: {before:.1%} before, {after:.1%} after", flush=True)


if __name__ == "__main__":
    cli(main)
