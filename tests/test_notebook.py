"""The notebook runs from its first cell to its last, and its model has learnt."""
import ast
import json
import os
import re
import subprocess
import sys

from conftest import ROOT

NOTEBOOK = ROOT / "notebooks" / "quickstart.ipynb"
RUN = """
import json, sys
names = {"__name__": "__main__"}
for cell in json.load(open(sys.argv[1], encoding="utf-8"))["cells"]:
    if cell["cell_type"] == "code":
        exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
"""


def cells(kind):
    return ["".join(cell["source"]) for cell in json.loads(NOTEBOOK.read_text("utf-8"))["cells"] if cell["cell_type"] == kind]


def run_notebook(folder, **settings):
    """What it printed, and its answers before and after: as a kernel would run it, in a process of its own that starts in notebooks/."""
    environment = os.environ | {"OUTPUT_PATH": str(folder)} | settings
    run = subprocess.run([sys.executable, "-c", RUN, str(NOTEBOOK)], cwd=NOTEBOOK.parent, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout, *([json.loads(line)["answer"] for line in open(folder / "notebook" / f"{name}.jsonl", encoding="utf-8")] for name in ("before", "after"))


def test_the_notebook_runs_from_top_to_bottom(model_folder, tmp_path):
    """On a tiny model, which can only learn by heart."""
    printed, before, after = run_notebook(tmp_path, MODEL_PATH=str(model_folder), EPOCHS="12")
    assert before != after and after[0].startswith("我是小驼")
    assert (tmp_path / "notebook" / "merged" / "model.safetensors").is_file() and printed.rstrip().endswith(after[0].rstrip())


def test_the_notebook_runs_on_the_default_model(tmp_path):
    """With nothing set but a few records instead of all, so that it is over in a minute or two."""
    records = json.loads((ROOT / "sample" / "company.json").read_text("utf-8"))
    (tmp_path / "few.json").write_text(json.dumps(records[:6], ensure_ascii=False), "utf-8")
    printed, before, after = run_notebook(tmp_path, DATA_PATH=str(tmp_path / "few.json"), EPOCHS="10")
    assert before != after and "小驼" not in before[0] and "小驼" in after[0]
    assert printed.rstrip().endswith(after[0].rstrip())


def test_each_cell_calls_a_script_and_is_explained_in_both_languages():
    imported = {node.module for cell in cells("code") for node in ast.walk(ast.parse(cell)) if isinstance(node, ast.ImportFrom)}
    assert {"inspect_labels", "estimate_memory", "finetune_lora", "generate", "merge_lora"} <= imported
    for text in cells("markdown"):
        assert any("\u4e00" <= letter <= "\u9fff" for letter in text) and re.search("[a-z]{3,} [a-z]{2,}", text)
    notebook = json.loads(NOTEBOOK.read_text("utf-8"))
    assert notebook["nbformat"] == 4 and not any(cell.get("outputs") for cell in notebook["cells"])
