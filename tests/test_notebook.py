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


def test_the_notebook_runs_from_top_to_bottom(model_folder, tmp_path):
    """As a kernel would run it, in a process of its own that starts in notebooks/; on a tiny model, which can only learn by heart."""
    environment = os.environ | {"MODEL_PATH": str(model_folder), "OUTPUT_PATH": str(tmp_path / "out"), "EPOCHS": "12"}
    run = subprocess.run([sys.executable, "-c", RUN, str(NOTEBOOK)], cwd=NOTEBOOK.parent, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    before, after = ([json.loads(line)["answer"] for line in open(tmp_path / "out" / "notebook" / f"{name}.jsonl", encoding="utf-8")] for name in ("before", "after"))
    assert before != after and after[0].startswith("我是小驼")
    assert (tmp_path / "out" / "notebook" / "merged" / "model.safetensors").is_file() and run.stdout.rstrip().endswith(after[0].rstrip())


def test_each_cell_calls_a_script_and_is_explained_in_both_languages():
    imported = {node.module for cell in cells("code") for node in ast.walk(ast.parse(cell)) if isinstance(node, ast.ImportFrom)}
    assert {"inspect_labels", "estimate_memory", "finetune_lora", "generate", "merge_lora"} <= imported
    for text in cells("markdown"):
        assert any("\u4e00" <= letter <= "\u9fff" for letter in text) and re.search("[a-z]{3,} [a-z]{2,}", text)
    notebook = json.loads(NOTEBOOK.read_text("utf-8"))
    assert notebook["nbformat"] == 4 and not any(cell.get("outputs") for cell in notebook["cells"])
