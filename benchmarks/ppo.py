"""What rewards do to the default model: Chinese answers by rules (GRPO, PPO, and without the rule against repetition), sums with a true answer,
and a reward model as the only reward, with rules that it never saw as the judge of what comes of that.

    python benchmarks/ppo.py --data_dir ../shared/data --work_dir output/bench_ppo      # two CPU threads, hours; each run goes on where it was

First a short SFT (finetune_lora.py, merge_lora.py) on short answers, in English and Chinese, so that the model stops by itself; then train_ppo.py
with each way. The pictures are made of their log.jsonl and may be looked at while a run goes on; where an update's time goes stands there as well.
`--only speed` compares the sampling with plain model.generate of the same batch. The reward model is one of benchmarks/preferences.py.
"""
import json
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from utils import cli

RULES = f"{ROOT / 'sample' / 'rules.py'}:"
CHINESE = {  # run: its flags
    "GRPO": {"advantage": "grpo", "rules": RULES + "finished=1,chinese=1,repetition=1"},
    "GRPO, repetition unpaid": {"advantage": "grpo", "rules": RULES + "finished=1,chinese=1,repetition=0"},
    "PPO": {"advantage": "gae", "rules": RULES + "finished=1,chinese=1,repetition=1",
            "learning_rate": 2e-4, "num_mini_batches": 3},  # at 1e-3 its critic overshoots
}
SUMS = {"GRPO, sums": {"advantage": "grpo", "rules": RULES + "number=1"}}
JUDGED = {"advantage": "grpo", "rules": RULES + "finished=0,chinese=0,repetition=0", "missing_eos_penalty": 0}  # rules without weight only look on
REWARD_MODEL = {f"reward model, beta {beta}": JUDGED | {"kl_coef": beta} for beta in (0, 0.1)}


def main(
    *,
    data_dir: str = "../shared/data",
    work_dir: str = "output/bench_ppo",
    reward_model: str = "",
    only: str = "",
    max_steps: int = 30,
    rollout_batch_size: int = 4,
    num_generations: int = 8,
    max_new_tokens: int = 48,
    draw: bool = False,
):
    """Train, and draw ppo_chinese.png, ppo_sums.png and ppo_reward_model.png in benchmarks/.

    Args:
        data_dir: Folder with the data; see its README for what it is.
        work_dir: Folder for models and runs.
        reward_model: Folder of a reward model; without it its runs are left out.
        only: Name of the one run to make; speed compares the sampling alone.
        max_steps: Updates of each run.
        rollout_batch_size: Prompts of an update.
        num_generations: Answers to each prompt.
        max_new_tokens: Longest answer, in tokens; that of a sum has 4.
        draw: Draw what is there, and train nothing.
    """
    work, sizes = Path(work_dir), dict(max_steps=max_steps, rollout_batch_size=rollout_batch_size, num_generations=num_generations)
    work.mkdir(parents=True, exist_ok=True)
    if only == "speed":
        return speed(str(tuned(work, "chinese", chinese_data, data_dir)), rollout_batch_size * num_generations, max_new_tokens)
    for task, runs in (("chinese", CHINESE), ("sums", SUMS), ("reward_model", REWARD_MODEL)):
        for name in [name for name in runs if only in ("", name) and not draw and (task != "reward_model" or reward_model)]:
            asked, make = ("sums", sums_data) if task == "sums" else ("chinese", chinese_data)
            model, out = tuned(work, asked, make, data_dir), work / name.replace(", ", "-").replace(" ", "-")
            if task == "sums":
                accuracy(model, None, work)
            if not (out / "adapter_model.safetensors").exists():
                flags = {"kl_coef": 0.02, "learning_rate": 1e-3} | runs[name] | ({"reward_model": Path(reward_model).resolve()} if task == "reward_model" else {})
                run("train_ppo.py", model_name_or_path=model, data_path=work / f"{asked}_prompts.jsonl", output_dir=out, save_steps=2,
                    template="chatml",  # its own adds a system text
                    max_length=128, max_new_tokens=4 if task == "sums" else max_new_tokens, gradient_checkpointing=False,
                    per_device_rollout_batch_size=rollout_batch_size * num_generations, resume=(out / "run.json").exists(), **sizes, **flags)
            if task == "sums":
                accuracy(model, out, work)
        plot(task, {name: work / name.replace(", ", "-").replace(" ", "-") / "log.jsonl" for name in runs})


def run(script: str, **flags) -> None:
    print(f"-> {script} {flags.get('output_dir', flags.get('output_file'))}", file=sys.stderr)
    subprocess.run([sys.executable, script, *(word for name, value in flags.items() for word in (f"--{name}", str(value)))], cwd=ROOT, check=True,
                   stdout=subprocess.DEVNULL)


def tuned(work: Path, task: str, make, data_dir: str) -> Path:
    """The default model after a short SFT on the records that `make` gives; beside it the prompts."""
    folder, adapter = work / f"{task}_tuned", work / f"{task}_sft"
    base = subprocess.run([sys.executable, "scripts/default_model.py"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    if not (work / f"{task}_prompts.jsonl").exists():
        records, prompts = make(Path(data_dir), work)
        (work / f"{task}_sft.json").write_text(json.dumps(records, ensure_ascii=False), "utf-8")
        (work / f"{task}_prompts.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in prompts), "utf-8")
    if not (adapter / "adapter_model.safetensors").exists():
        run("finetune_lora.py", model_name_or_path=base, data_path=work / f"{task}_sft.json", output_dir=adapter, num_train_epochs=1,
            max_length=512, gradient_accumulation_steps=1, gradient_checkpointing=False, lora_dropout=0, learning_rate=4e-4)
    if not folder.exists():
        run("merge_lora.py", model_name_or_path=base, lora_path=adapter, output_dir=folder)
    return folder


def chinese_data(data_dir: Path, work: Path) -> tuple[list[dict], list[dict]]:
    """Short answers, five in six of them English, and short Chinese questions that are none of theirs."""
    chinese, english = (json.loads((data_dir / "sft" / f"alpaca_{language}_demo.json").read_text("utf-8")) for language in ("zh", "en"))
    han = lambda text: sum("\u4e00" <= letter <= "\u9fff" for letter in text) / max(1, sum(map(str.isalpha, text)))
    asked = lambda row: row["instruction"] + row.get("input", "")
    records = [row for row in chinese if 4 <= len(row["output"]) <= 24 and han(row["output"]) > 0.9 and len(asked(row)) < 40][:40]
    records += [row for row in english if 4 <= len(row["output"].split()) <= 12 and len(asked(row).split()) < 25][:200]
    random.Random(0).shuffle(records)
    known = {row["instruction"] for row in records}
    asks = [row["instruction"] for row in chinese if not row.get("input") and row["instruction"] not in known and 5 <= len(row["instruction"]) <= 11]
    return [{name: row.get(name, "") for name in ("instruction", "input", "output")} for row in records], [{"prompt": text} for text in asks[:60]]


def sums_data(data_dir: Path, work: Path) -> tuple[list[dict], list[dict]]:
    """One-digit sums: most to learn from, both ways, and every fourth held out (work/sums_held_out.jsonl)."""
    pairs = [(a, b) for a in range(1, 10) for b in range(1, 10)]
    random.Random(0).shuffle(pairs)
    rows = [{"instruction": f"{a}加{b}等于几？", "output": str(a + b), "ground_truth": a + b} for a, b in pairs]
    (work / "sums_held_out.jsonl").write_text("".join(json.dumps({name: row[name] for name in ("instruction", "ground_truth")}) + "\n" for row in rows[:20]), "utf-8")
    return rows[20:] * 6, [{"prompt": row["instruction"], "ground_truth": row["ground_truth"]} for row in rows[20:]]


def accuracy(model: Path, adapter: Path | None, work: Path) -> None:
    """Print the share of the held-out sums that greedy answers get right; generate.py writes them beside."""
    answers = work / f"sums_{adapter.name if adapter else 'before'}.jsonl"
    if not answers.exists():
        run("generate.py", model_name_or_path=model, **{"lora_path": adapter} if adapter else {}, input_file=work / "sums_held_out.jsonl", output_file=answers,
            max_new_tokens=4, temperature=0)
    rows = [json.loads(line) for line in answers.read_text("utf-8").splitlines()]
    print(f"sums, {adapter.name if adapter else 'before'}: {sum(row['answer'].strip() == str(row['ground_truth']) for row in rows)} of {len(rows)} right", flush=True)


def plot(task: str, logs: dict[str, Path]) -> None:
    """A curve for each run, and a line of the table that they give."""
    from matplotlib.figure import Figure

    found = {name: [json.loads(line) for line in path.read_text("utf-8").splitlines()] for name, path in logs.items() if path.is_file()}
    curves = {"reward model": lambda entry: entry.get("reward_model"),
              **{name: lambda entry, name=name: entry["rules"].get(name) for name in ("chinese", "repetition", "number")},
              "finished": lambda entry: entry["finished"], "length": lambda entry: entry["length"], "KL, nats a token": lambda entry: entry["kl"],
              "explained variance": lambda entry: entry.get("explained_variance")}
    curves = {label: of for label, of in curves.items() if any(of(entry) is not None for entries in found.values() for entry in entries)}
    if not found:
        return
    figure = Figure(figsize=(12, 7), layout="constrained")
    panels = list(figure.subplots(2, 3).flat)
    for axes in panels[len(curves):]:
        axes.axis("off")
    for axes, (label, of) in zip(panels, curves.items()):
        for name, entries in found.items():
            axes.plot([entry["step"] for entry in entries], [of(entry) for entry in entries], marker=".", label=name)
        axes.set(xlabel="update", ylabel=label, **{"ylim": (-1, 1)} if label == "explained variance" else {})
        axes.grid(True)
    figure.axes[0].legend()
    figure.savefig(ROOT / "benchmarks" / f"ppo_{task}.png", dpi=110)
    for name, entries in found.items():
        mean = lambda label, part: statistics.mean(curves[label](entry) or 0 for entry in part)
        spent = {part: sum(entry["seconds"][part] for entry in entries) for part in entries[0]["seconds"]}
        print(f"| {name} | {len(entries)} updates | " + " | ".join(f"{label} {mean(label, entries[:3]):.2f} -> {mean(label, entries[-3:]):.2f}" for label in curves)
              + " | " + ", ".join(f"{part} {seconds / sum(spent.values()):.0%}" for part, seconds in spent.items()) + " of the time |")


def speed(model: str, answers: int, new_tokens: int, repeats: int = 3) -> None:
    """Tokens a second of train_ppo.py's sampling and of model.generate on the same prompts, taking turns, each with a LoRA adapter that is on."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    from train_ppo import sample, speed_up_lora
    from utils import Chat

    chat = Chat(AutoTokenizer.from_pretrained(model))
    prompt = [i for ids, _ in chat.encode([{"role": "user", "content": "天空为什么是蓝色的？"}], add_generation_prompt=True) for i in ids]
    rates = {"train_ppo.py": [], "model.generate": []}
    sides = {}
    for name in rates:
        base = AutoModelForCausalLM.from_pretrained(model)
        base.generation_config = GenerationConfig(do_sample=True, top_k=0, top_p=1.0, max_new_tokens=new_tokens, min_new_tokens=new_tokens,
                                                  eos_token_id=chat.stop_ids, pad_token_id=chat.stop_ids[0])
        sides[name] = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear")).eval()
    speed_up_lora(sides["train_ppo.py"])
    for _ in range(repeats):
        for name, side in sides.items():
            start = time.process_time()
            if name == "train_ppo.py":
                sample(side.get_base_model(), chat, [{"prompt": prompt} for _ in range(answers)], answers)
            else:
                with torch.inference_mode():
                    side.generate(input_ids=torch.tensor([prompt] * answers), attention_mask=torch.ones(answers, len(prompt), dtype=torch.long))
            rates[name].append(answers * new_tokens / (time.process_time() - start))
    for name, found in rates.items():
        print(f"{name}: {statistics.median(found):.1f} new tokens a CPU second ({min(found):.1f} to {max(found):.1f})")
    print(f"ratio {statistics.median(rates['train_ppo.py']) / statistics.median(rates['model.generate']):.2f}")


if __name__ == "__main__":
    cli(main)
