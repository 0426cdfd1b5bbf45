"""Questions a second of evaluate.py against lm-evaluation-harness, on the same questions, with equal picks.

    python -m venv peer && peer/bin/pip install lm_eval==0.4.13 torch==2.13.0 transformers==5.23.0 peft==0.21.2 datasets==5.2.0 accelerate==1.15.0
    python benchmarks/evaluate.py --peer peer/bin/python --data_dir ../shared/data/eval         # about 20 minutes on two CPU threads

Some subjects of CMMLU and MMLU with five shots, and HellaSwag without. Both sides score in fp32 in a process of their own and take turns; what
counts is the time from the questions' text to their scores, without the loading of the model. It is given in CPU seconds of all threads, since
other programs on the machine hardly change those, and in seconds on the clock.
"""
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # not this folder
from benchmarks.report import add
from utils import check_file, cli

TASKS = {"cmmlu, 5 shots": ("cmmlu", 5), "mmlu, 5 shots": ("mmlu", 5), "hellaswag, 0 shots": ("hellaswag", 0)}
PEER = """
import json, sys, time
import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
model, folder, batch_size = sys.argv[1:]
lm = HFLM(model, dtype="float32", device="cpu", batch_size=int(batch_size))
score, took = lm.loglikelihood, []
def timed(*arguments, **more):
    clock, cpu = time.perf_counter(), time.process_time()
    found = score(*arguments, **more)
    took.append((time.perf_counter() - clock, time.process_time() - cpu))
    return found
lm.loglikelihood = timed
found = lm_eval.simple_evaluate(model=lm, tasks=["asked"], task_manager=TaskManager(include_path=folder), log_samples=True, bootstrap_iters=0)
values = [[value for value, _ in sample["filtered_resps"]] for sample in sorted(found["samples"]["asked"], key=lambda sample: sample["doc_id"])]
print(json.dumps({"seconds": sum(clock for clock, _ in took), "cpu_seconds": sum(cpu for _, cpu in took), "values": values}))
"""


def main(
    *,
    peer: str,
    data_dir: str,
    model_name_or_path: str = "",
    subjects: str = "agronomy,anatomy,astronomy",
    limit: int = 16,
    repeats: int = 3,
    per_device_eval_batch_size: int = 8,
    threads: int = 2,
    only: str = "",
    side: Literal["both", "ours"] = "both",
):
    """Print a table of questions a second, ours and theirs.

    Args:
        peer: The Python of an environment that has lm_eval.
        data_dir: Folder of the sets, as evaluate.py reads them.
        model_name_or_path: Folder of the model; empty: the default model.
        subjects: Of cmmlu and mmlu, as many as there are.
        limit: Questions of each subject; of hellaswag as many as of all subjects.
        repeats: Runs of each, taking turns; the table has their medians and spread.
        per_device_eval_batch_size: Prompts that go through the model together, on both sides.
        threads: Of the CPU.
        only: Part of the names of the rows to run; else all.
        side: Which side this process runs; both starts a process for each run.
    """
    if side == "ours":
        return print(json.dumps(ours(model_name_or_path, data_dir, only, subjects, limit, per_device_eval_batch_size)))
    check_file("peer", peer)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1",
                                "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
    run = lambda command: subprocess.run(list(map(str, command)), env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True, cwd=ROOT)
    model = model_name_or_path or run([sys.executable, "scripts/default_model.py"]).stdout.strip()
    print("| set | questions | side | questions per CPU second | spread | questions a second | ours / lm-eval | other picks | log-likelihoods differ by |\n|---|---|---|---|---|---|---|---|---|")
    for row in [row for row in TASKS if only in row]:
        with tempfile.TemporaryDirectory() as work:
            write_task(Path(work), questions_of(data_dir, row, subjects, limit))
            commands = {"ours": [sys.executable, __file__, "--side", "ours", "--only", row, "--model_name_or_path", model, "--data_dir", data_dir, "--peer", peer,
                                 "--subjects", subjects, "--limit", limit, "--per_device_eval_batch_size", per_device_eval_batch_size],
                        "lm-eval": [os.path.abspath(peer), "-c", PEER, model, work, per_device_eval_batch_size]}
            found = {who: [] for who in commands}
            for _ in range(repeats):
                for who, command in commands.items():
                    found[who].append(json.loads(run(command).stdout.splitlines()[-1]))
                    print(f"{row}, {who}: {found[who][-1]['cpu_seconds']:.1f} CPU seconds, {found[who][-1]['seconds']:.1f} on the clock", file=sys.stderr)
        mine, theirs = (side[0]["values"] for side in found.values())
        best = lambda values: max(range(len(values)), key=lambda i: values[i])
        other = sum(best(a) != best(b) for a, b in zip(mine, theirs, strict=True))
        furthest = max(abs(x - y) for a, b in zip(mine, theirs) for x, y in zip(a, b))
        speed = {who: {unit: [len(mine) / one[unit] for one in runs] for unit in ("cpu_seconds", "seconds")} for who, runs in found.items()}
        ratio = statistics.median(speed["ours"]["cpu_seconds"]) / statistics.median(speed["lm-eval"]["cpu_seconds"])
        for who, units in speed.items():
            cpu = units["cpu_seconds"]
            print(f"| {row} | {len(mine)} | {who} | {statistics.median(cpu):.2f} | {min(cpu):.2f} to {max(cpu):.2f} | {statistics.median(units['seconds']):.2f} "
                  f"| {f'{ratio:.2f} | {other} | {furthest:.1g}' if who == 'ours' else '| | '} |", flush=True)
        add(f"evaluate.py, {row}", "questions per CPU second", speed["ours"]["cpu_seconds"], "lm-eval", speed["lm-eval"]["cpu_seconds"])


def questions_of(data_dir: str, row: str, subjects: str, limit: int) -> list[dict]:
    """The questions of a row of the table, as evaluate.py reads them."""
    import evaluate

    task, shots = TASKS[row]
    there = {evaluate.subject_of(file) for file in evaluate.files_of(task, data_dir)}
    wanted = [name for name in subjects.split(",") if name in there]
    exam = task != "hellaswag"
    return evaluate.read_tasks([task], data_dir, ",".join(wanted) if exam else None, shots, limit if exam else limit * len(subjects.split(",")), None, 0)


def ours(model_name_or_path: str, data_dir: str, row: str, subjects: str, limit: int, batch_size: int) -> dict:
    """Seconds, and the log-likelihoods in the order of the questions."""
    import itertools
    import time

    import evaluate

    questions = questions_of(data_dir, row, subjects, limit)
    model, chat = evaluate.load_model(model_name_or_path, precision="fp32")
    how = dict(plain=True, context=model.config.max_position_embeddings, batch_size=batch_size)
    clock, cpu, values = time.perf_counter(), time.process_time(), []
    for _, group in itertools.groupby(questions, key=lambda question: question["subject"]):
        group = list(group)
        for lines in evaluate.measure_choices(model, chat, how, group, range(0, len(group), 4 * batch_size)):
            values += [line["loglikelihoods"] for line in lines]
    return {"seconds": time.perf_counter() - clock, "cpu_seconds": time.process_time() - cpu, "values": values}


def write_task(folder: Path, questions: list[dict]) -> None:
    """A task file of the harness for these questions, each with its whole prompt, so that both sides ask the same: its own formats are compared by tests/test_evaluate.py."""
    import evaluate

    rows = "".join(json.dumps({"prompt": evaluate.plain_prompt(question, question["shots"]), "choices": question["choices"], "answer": question["answer"]},
                              ensure_ascii=False) + "\n" for question in questions)
    (folder / "asked.jsonl").write_text(rows, "utf-8")
    (folder / "asked.yaml").write_text("\n".join((
        "task: asked", "dataset_path: json", "dataset_kwargs:", "  data_files:", f"    asked: {folder}/asked.jsonl", "test_split: asked", "output_type: multiple_choice",
        'doc_to_text: "{{prompt}}"', 'doc_to_choice: "{{choices}}"', "doc_to_target: answer", "num_fewshot: 0", "metric_list:", "  - metric: acc")) + "\n", "utf-8")


if __name__ == "__main__":
    cli(main)
