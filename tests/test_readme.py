"""Both READMEs say the same, nothing that is not there, and no command that does not work."""
import functools
import importlib
import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT
from test_consistency import SCRIPTS

from utils import BadInput, cli, numbered_records

READMES = ["README.md", "README_EN.md"]
ELSEWHERE = {  # commands that are run, but not here
    "bash scripts/test.sh": "by .ci/run, in a fresh environment",
    "bash benchmarks/gpu.sh": "by hand, where there is a GPU",
    "bash benchmarks/gpu.sh --rehearse True": "by hand, ten minutes",
}
FOREIGN = ("vllm", "llama-server", "ollama", "python -m openrlhf", "python -m verl")  # programs of others, which the README shows how to begin


def read(name):
    return (ROOT / name).read_text("utf-8")


def blocks(name):
    return re.findall(r"^```(\w*)\n(.*?)^```", read(name), re.M | re.S)


def commands() -> list[str]:
    """Each command of README.md once: the lines of its bash blocks, and what stands in the text as `bash ...` or `python ...`."""
    lines = [line for kind, block in blocks("README.md") if kind == "bash" for line in block.splitlines() if not line.startswith("#")]
    text = re.sub(r"^```.*?^```", "", "".join(read(name) for name in READMES), flags=re.M | re.S)
    return list(dict.fromkeys(lines + re.findall(r"`((?:bash|python) [^`]+)`", text)))


def test_both_readmes_have_the_same_code_blocks_and_sections():
    chinese, english = (blocks(name) for name in READMES)
    assert chinese == english and {kind for kind, _ in chinese} == {"bash", "python", "text"}
    assert [re.findall("^#+ ", text, re.M) for text in map(read, READMES[:1])] == [re.findall("^#+ ", text, re.M) for text in map(read, READMES[1:])]
    assert ELSEWHERE.keys() <= set(commands())
    rows = [[line.count("|") for line in read(name).splitlines() if line.startswith("|")] for name in READMES]
    assert rows[0] == rows[1]  # the same tables


@pytest.mark.parametrize("name", READMES)
def test_every_file_that_is_named_exists(name):
    named = set(re.findall(r"(?:scripts|sample|benchmarks|tests|ds_configs|notebooks)/[\w.]+|\b\w+\.py\b", read(name)))
    assert named and not [path for path in named if not (ROOT / path.rstrip(".")).exists()]


def check_flags(words: list[str], monkeypatch) -> None:
    """Hand a call to the script's own command line, up to where main would begin: the estimator, which loads nothing, begins."""
    script = next(place for place, word in enumerate(words) if word in SCRIPTS or f"{word}.py" in SCRIPTS)
    module = importlib.import_module(words[script].removesuffix(".py"))
    seen = []
    main = module.main if words[script] == "estimate_memory.py" else functools.wraps(module.main)(lambda **flags: seen.append(flags))
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", words[script:])
        cli(main)
    assert seen or main is module.main


@pytest.mark.parametrize("command", commands())
def test_every_command_works(calls, command, monkeypatch, capfd, tmp_path):
    if command in ELSEWHERE or command.startswith(FOREIGN):
        wrapper = re.match(r"bash (\S+\.sh)", command)
        assert not wrapper or subprocess.run(["bash", "-n", wrapper[1]], cwd=ROOT).returncode == 0
        return
    for name, text in (("my/Llama-2-7b-hf/config.json", "{}"), ("output/mine/adapter_model.safetensors", ""), ("my.json", "你好"),  # serve.sh and iconv read them
                       *((f"output/{name}/adapter_config.json", "{}") for name in ("quickstart/adapter", "finetune_lora"))):  # and report.sh
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, "gb18030")
    assert re.match(r"(\w+=\S+ )*(bash scripts/|python |pip install |curl |iconv )", command), f"no test knows how to run {command}"
    for names, wrapper in re.findall(r"^((?:\w+=\S+ )+)bash (scripts/\w+\.sh)", command):
        assert all(re.search(rf"\b{name}=\$\{{{name}", read(wrapper)) for name in re.findall(r"(\w+)=", re.sub(r"'[^']*'", "", names))), command
    made = calls("bash", "-c", command)
    if command.startswith("iconv"):
        assert not made and (tmp_path / "my_utf8.json").read_text("utf-8") == "你好"
        return
    assert made
    for program, *words in made:
        if "--help" in words:
            with pytest.raises(SystemExit) as ended:
                check_flags(words, monkeypatch)
            assert not ended.value.code
        elif program == "pip":
            assert words[:2] == ["install", "-r"] and len(words) == 3
            lines = [line.split("#")[0].strip() for file in {ROOT / words[2], *ROOT.glob("requirements*.txt")} for line in file.read_text("utf-8").splitlines()]
            assert all(re.fullmatch(r"-r requirements[\w-]*\.txt|[\w\[\]-]+==[\w.]+", line) for line in lines)  # pinned
        elif program in ("curl", "transformers"):  # tests/test_serve.py sends this request, and starts this server
            assert command.startswith("curl http://127.0.0.1:8000/v1/chat/completions ") or words[:2] == ["serve", "yangtuo"]
        elif words[:1] not in (["scripts/default_model.py"], ["-"]) and words[:2] != ["-m", "pip"]:  # of quickstart.sh and chinese_base.sh
            try:
                check_flags(words, monkeypatch)
            except SystemExit as ended:
                if ended.code != 3:  # the estimate's verdict that this machine is too small
                    pytest.fail(capfd.readouterr().err)


@pytest.mark.parametrize("name", READMES)
def test_it_is_read_in_one_sitting(name):
    assert len(read(name).splitlines()) <= 300


def test_every_stage_stands_in_the_table():
    for name in READMES:
        for script in SCRIPTS:
            assert f"`{script}`" in read(name), f"{script} in {name}"


@pytest.mark.parametrize("name", READMES)
def test_every_record_that_is_shown_can_be_read(name, tmp_path):
    shown = re.findall(r"`(\{\"[^`]+\}|<s>Human[^`]+)`", read(name))
    assert len(shown) == 9
    for text in shown:
        file = tmp_path / ("shown.jsonl" if text.startswith("{") else "shown.csv")
        file.write_text(text if text.startswith("{") else 'text\n"' + text.replace("\\n", "\n") + '"\n', "utf-8")
        document = "completion" in text or '"text"' in text
        (number, record), = numbered_records(str(file), document_separator="line" if document else None, preference="chosen" in text)
        assert "chosen" in record or record["messages"][-1]["role"] == "assistant" and record["messages"][-1]["content"]


@pytest.mark.parametrize("name", ["README.md", "README_EN.md", "sample/README.md"])
def test_mojibake_that_is_shown_is_refused(name, tmp_path):
    shown = re.search(r"`(ç[^`]+)`[,、] ?`([^`]+)`", read(name)).groups()
    for text in shown:
        (tmp_path / "shown.jsonl").write_text(json.dumps({"instruction": "?", "output": text}))
        with pytest.raises(BadInput, match="mojibake"):
            list(numbered_records(str(tmp_path / "shown.jsonl")))
