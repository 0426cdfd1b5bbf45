"""evaluate.py: the numbers of lm-evaluation-harness, prompts as they are written, and no claim beyond the error."""
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import evaluate
from benchmarks.record_lm_eval import TEXTS, make_model, write_sets
from utils import BadInput, RunStopped

RECORDED = json.loads((ROOT / "tests" / "lm_eval.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    write_sets(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """The model that was recorded, with a tokenizer that begins each text with a BOS, and with one that does not."""
    folders = {side: tmp_path_factory.mktemp("models") / side.replace(" ", "-") for side in ("bos", "no bos")}
    for side, folder in folders.items():
        make_model(folder, side == "bos")
    return folders


def measure(model: Path, output_dir: Path, **flags) -> tuple[dict, list[dict]]:
    evaluate.main(model_name_or_path=str(model), output_dir=str(output_dir), **flags)
    return json.loads((output_dir / "results.json").read_text("utf-8")), [json.loads(line) for line in (output_dir / "samples.jsonl").read_text("utf-8").splitlines()]


@pytest.mark.parametrize("side", ["bos", "no bos", "chat"])
def test_every_log_likelihood_and_score_is_that_of_lm_evaluation_harness(sets, models, tmp_path, side):
    tasks = "ceval,cmmlu,mmlu,arc,hellaswag" + ",truthfulqa,gsm8k,perplexity" * (side != "chat")
    results, lines = measure(models["no bos" if side == "chat" else side], tmp_path / "out", data_dir=str(sets), tasks=tasks, max_new_tokens=40,
                             template="auto" if side == "chat" else "none")
    for task, recorded in RECORDED[side].items():
        found = [line for line in lines if line["task"] == {"mc1": "truthfulqa", "mc2": "truthfulqa", "perplexity": "perplexity/texts"}.get(task, task)]
        for line, theirs in zip(found, recorded["samples"], strict=True):
            if task == "gsm8k":
                assert line["output"] == theirs
            elif task == "perplexity":
                assert line["bits"] == pytest.approx(theirs, abs=1e-3)
            elif task in ("mc1", "mc2"):
                assert {round(value, 3) for value in line["loglikelihoods"]} >= {round(value, 3) for value in theirs}
            else:  # in a chat the harness counts the line break that the template puts before the answer as a part of each choice
                offset = line["loglikelihoods"][0] - theirs[0] if side == "chat" else 0
                assert [value - offset for value in line["loglikelihoods"]] == pytest.approx(theirs, abs=1e-4) and offset >= 0
        for name, score in recorded.get("scores", {}).items():
            if task in ("mc1", "mc2"):
                assert results["results"]["truthfulqa"][task] == pytest.approx(score, abs=1e-4)
            elif name in ("acc", "acc_norm")[: 1 if side == "chat" else 2]:
                assert results["results"][task][name] == pytest.approx(score, abs=1e-6)
