"""Scripts may repeat one another, but not drift apart. Read from the source text, without torch."""
import ast
import itertools
import re

import pytest
from conftest import ROOT

SCRIPTS = sorted(path.name for path in ROOT.glob("*.py") if path.read_text("utf-8").endswith('if __name__ == "__main__":\n    cli(main)\n'))
SOURCES = {path.name: path.read_text("utf-8") for path in [*(ROOT / "scripts").glob("*.py"), *(ROOT / "benchmarks").glob("*.py"), *ROOT.glob("*.py")]}
SHARED = {"utils.py", "models.py", "training.py", "vocabulary.py", "tensors.py", "layerwise.py", "gptq.py", "memory.py", "terminal.py", "web.py"}
MEANT_OTHERWISE = {("quantize_gptq.py", "bits")}  # of what it writes, not of what it loads


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
    assert headings[0] == "load" and headings == [h for h in ("load", "prepare", "train", "answer", "look", "apply", "merge", "quantize", "extend", "estimate", "save") if h in headings]


def test_two_functions_of_one_name_have_one_body():
    bodies = {}
    for name in [*SCRIPTS, *SHARED]:
        for node in ast.parse(SOURCES[name]).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name != "main":
                assert ast.unparse(node) == bodies.setdefault(node.name, ast.unparse(node)), f"{node.name} in {name} differs from another of that name"


def test_importing_a_script_does_nothing_and_takes_no_torch():
    for script in SCRIPTS:
        for node in ast.parse(SOURCES[script]).body:
            assert isinstance(node, (ast.Expr, ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.If, ast.Assign)), ast.unparse(node)[:60]
            heavy = {"torch", "transformers", "peft", "datasets", "models", "training", "layerwise", "gradio"}
            assert not isinstance(node, ast.Import) or not heavy & {alias.name.split(".")[0] for alias in node.names}
            assert not isinstance(node, ast.ImportFrom) or node.module.split(".")[0] not in heavy


def test_a_reader_of_one_script_has_few_lines_to_read():
    lines = {name: len(SOURCES[name].splitlines()) for name in [*SCRIPTS, *SHARED]}
    assert lines["utils.py"] < 1100, lines


def test_every_script_has_a_wrapper():
    for script in SCRIPTS:
        assert (ROOT / "scripts" / script.replace(".py", ".sh")).is_file(), script


def test_nothing_in_the_repository_depends_on_this_machine():
    import subprocess

    for name in subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines():
        if (ROOT / name).suffix in (".py", ".sh", ".md", ".txt", ".json", ".ipynb", "") and (ROOT / name).is_file():
            text = (ROOT / name).read_text("utf-8")
            assert not re.search(r"/(home|root|Users|work)/\w|index-url|find-links", text.replace("test_consistency", "") if name != "tests/test_consistency.py" else ""), name
