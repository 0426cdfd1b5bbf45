"""Scripts may repeat one another, but not drift apart. Read from the source text, without torch."""
import ast
import difflib
import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

SCRIPTS = sorted(path.name for path in ROOT.glob("*.py") if path.name != "utils.py")
TRAINING = [name for name in SCRIPTS if name.startswith(("finetune", "pretrain", "train"))]
SOURCES = {path.name: path.read_text("utf-8") for path in [*(ROOT / "scripts").glob("*.py"), *(ROOT / "benchmarks").glob("*.py"), *ROOT.glob("*.py")]}
HEAVY = {"torch", "transformers", "peft", "datasets", "gradio", "accelerate", "deepspeed", "safetensors", "matplotlib", "pandas"}
MEANT_OTHERWISE = {("quantize_gptq.py", "bits"),  # of what it writes, not of what it loads
                   ("pretrain_clm.py", "train"),  # with embeddings
                   *((script, flag) for script in ("train_reward.py", "train_dpo.py") for flag in ("max_length", "packing")),  # of pairs, which are never cut
                   ("train_ppo.py", "max_length"),  # of prompts and their answers, which are not cut either
                   ("train_ppo.py", "lr_scheduler_type"),  # its loop is its own, and takes three
                   ("train_ppo.py", "precision"), ("score_records.py", "precision"), ("evaluate.py", "precision"),  # fp32 on every CPU: scores are compared
                   ("score_records.py", "data_path"), ("score_records.py", "output_file"),  # not to train on; not answers alone
                   ("evaluate.py", "template"),  # none is a choice there
                   ("clean_corpus.py", "data_path"),  # not trained on yet, and always a file or a folder
                   ("export_gguf.py", "output_file")}  # a model, not answers


def main_of(script):
    return next(node for node in ast.parse(SOURCES[script]).body if isinstance(node, ast.FunctionDef) and node.name == "main")


def flags_of(script) -> dict[str, str]:
    """{flag: its line under Args} in the order of the signature."""
    main = main_of(script)
    about = dict(re.findall(r"^ {4,8}(\w+): (.*)$", ast.get_docstring(main).partition("Args:")[2], re.M))
    names = [argument.arg for argument in main.args.kwonlyargs + ([main.args.kwarg] if main.args.kwarg else [])]
    assert list(about) == names, f"{script}: the lines under Args are not those of the flags"
    return about


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_typed_keyword_only_and_explained(script):
    main = main_of(script)
    assert not main.args.args and all(argument.annotation for argument in main.args.kwonlyargs)
    assert all(line.endswith(".") or line.endswith("?") for line in flags_of(script).values())


@pytest.mark.parametrize("a, b", list(itertools.combinations(SCRIPTS, 2)))
def test_a_flag_means_and_stands_the_same_in_every_script(a, b):
    in_a, in_b = ({flag: line for flag, line in flags_of(script).items() if (script, flag) not in MEANT_OTHERWISE} for script in (a, b))
    assert {flag: in_a[flag] for flag in in_a if flag in in_b} == {flag: in_b[flag] for flag in in_b if flag in in_a}
    assert [flag for flag in in_a if flag in in_b] == [flag for flag in in_b if flag in in_a]


@pytest.mark.parametrize("script", SCRIPTS)
def test_headings_come_in_order(script):
    headings = re.findall(r"^    # ---- (\w+) ----$", SOURCES[script], re.M)
    assert headings[0] == "load" and headings == [h for h in ("load", "prepare", "train", "answer", "export", "look", "apply", "merge", "quantize", "extend", "estimate", "score", "measure", "clean", "save") if h in headings]


def test_two_functions_of_one_name_have_one_body():
    bodies = {}
    for name in ["utils.py", *SCRIPTS]:
        for node in ast.parse(SOURCES[name]).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name != "main":
                assert ast.unparse(node) == bodies.setdefault(node.name, ast.unparse(node)), f"{node.name} in {name} differs from another of that name"


# ---- the house: one file per stage, and utils.py ----
def test_at_the_top_level_stand_utils_and_scripts_and_nothing_else():
    for script in SCRIPTS:
        assert SOURCES[script].endswith('\n\n\nif __name__ == "__main__":\n    cli(main)\n'), f"{script} is no script: it does not end in cli(main)"
    assert not list(ROOT.glob("*/__init__.py"))


def test_a_script_imports_utils_and_no_other_script():
    for script in ["utils.py", *SCRIPTS]:
        allowed = {"utils"} | ({"generate"} if script == "webui.py" else set()) if script != "utils.py" else set()
        for node in ast.walk(ast.parse(SOURCES[script])):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) else []
            local = {name for name in names if (ROOT / f"{name.split('.')[0]}.py").is_file()}
            assert local <= allowed, f"{script} imports {local - allowed}"


def blocks_of(script) -> dict[str, str]:
    """{name: text} of the blocks that begin with `# ==== name ====` and run to the next one or to the end of the file."""
    parts = re.split(r"^# ==== (.+) ====$", SOURCES[script].partition('\n\n\nif __name__ == "__main__"')[0], flags=re.M)
    return {name: text.strip() for name, text in zip(parts[1::2], parts[2::2])}


@pytest.mark.parametrize("a, b", list(itertools.combinations(SCRIPTS, 2)))
def test_a_block_is_the_same_text_wherever_it_stands(a, b):
    for name in blocks_of(a).keys() & blocks_of(b).keys():
        for ours, theirs in itertools.zip_longest(blocks_of(a)[name].splitlines(), blocks_of(b)[name].splitlines()):
            assert ours == theirs, f"block {name}: {a} and {b} part here"


def test_utils_and_the_training_scripts_stay_as_long_as_a_reader_can_stand():
    lines = {name: len(SOURCES[name].splitlines()) for name in ["utils.py", *SCRIPTS]}
    assert lines["utils.py"] <= 1219 and not re.search(r"from_pretrained|import .*Trainer|\(Trainer", SOURCES["utils.py"])
    longest = {"train_ppo.py": 860, "train_reward.py": 498, "train_dpo.py": 593}  # a loop of its own; a loss of pairs; besides the blocks that all have
    assert all(lines[name] <= longest.get(name, 480) for name in TRAINING), lines


def test_the_diff_of_two_stages_is_the_lesson():
    for a, b, most in (("finetune.py", "finetune_multi_rounds.py", 30), ("finetune.py", "finetune_lora.py", 120), ("finetune_lora.py", "pretrain_clm.py", 160)):
        changed = [line for line in difflib.ndiff(SOURCES[a].splitlines(), SOURCES[b].splitlines()) if line[0] in "-+"]
        assert len(changed) <= most, f"{a} and {b} differ in {len(changed)} lines"


@pytest.mark.parametrize("script", TRAINING)
def test_no_more_of_trainer_is_overridden_than_these(script):
    """Each has its test: tokens are counted and a NaN stops the run, evaluation counts each token once, a checkpoint can be talked to."""
    for node in ast.walk(ast.parse(SOURCES[script])):
        if isinstance(node, ast.ClassDef) and "Trainer" in map(ast.unparse, node.bases):
            assert {method.name for method in node.body} <= {"training_step", "_get_grad_norm", "evaluate", "_save"}


def test_importing_a_script_does_nothing_and_takes_no_torch():
    for script in ["utils.py", *SCRIPTS]:
        for node in ast.parse(SOURCES[script]).body:
            assert isinstance(node, (ast.Expr, ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.If, ast.Assign)), ast.unparse(node)[:60]
            assert not isinstance(node, ast.Import) or not HEAVY & {alias.name.split(".")[0] for alias in node.names}
            assert not isinstance(node, ast.ImportFrom) or node.module.split(".")[0] not in HEAVY


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_and_utils_alone_are_a_fork_that_runs(script, tmp_path):
    for name in {script, "utils.py"} | ({"generate.py"} if script == "webui.py" else set()):
        shutil.copy(ROOT / name, tmp_path)
    shown = subprocess.run([sys.executable, script, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert shown.returncode == 0 and "FLAGS" in shown.stdout, shown.stderr


@pytest.mark.parametrize("script", TRAINING)
def test_a_copied_training_script_makes_two_steps(script, tmp_path, model_folder):
    for name in (script, "utils.py"):
        shutil.copy(ROOT / name, tmp_path)
    data = {"pretrain_clm.py": "corpus.txt", "train_reward.py": "preference.json", "train_dpo.py": "preference.json", "train_ppo.py": "prompts.jsonl"}.get(script, "conversation.json")
    flags = ["--model_name_or_path", model_folder, "--data_path", ROOT / "sample" / data, "--output_dir", "out", "--max_steps", "2", "--max_length", "128"]
    if script == "train_ppo.py":
        flags += ["--rules", ROOT / "sample" / "rules.py:chinese=1", "--max_new_tokens", "16", "--rollout_batch_size", "2", "--template", "ziya"]
    done = subprocess.run([sys.executable, script, *map(str, flags)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and json.loads(done.stdout.splitlines()[-1])["supervised_tokens"] > 0, done.stderr[-2000:]


def test_the_state_is_the_last_file_of_a_checkpoint(tmp_path, monkeypatch):
    """What resume_point leans on: transformers writes trainer_state.json behind everything else."""
    from transformers import Trainer

    source = ast.unparse(next(node for node in ast.walk(ast.parse(Path(sys.modules[Trainer.__module__].__file__).read_text("utf-8")))
                              if isinstance(node, ast.FunctionDef) and node.name == "_save_checkpoint"))
    order = [source.index(call) for call in ("self.save_model(", "self._save_optimizer_and_scheduler(", "self._save_scaler(", "self._save_rng_state(", "self.state.save_to_json(")]
    assert order == sorted(order)


def test_every_script_has_a_wrapper():
    for script in SCRIPTS:
        assert (ROOT / "scripts" / script.replace(".py", ".sh")).is_file(), script


def test_nothing_in_the_repository_depends_on_this_machine():
    import subprocess

    for name in subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines():
        if (ROOT / name).suffix in (".py", ".sh", ".md", ".txt", ".json", ".ipynb", "") and (ROOT / name).is_file():
            text = (ROOT / name).read_text("utf-8")
            assert not re.search(r"/(home|root|Users|work)/\w|index-url|find-links", text.replace("test_consistency", "") if name != "tests/test_consistency.py" else ""), name
