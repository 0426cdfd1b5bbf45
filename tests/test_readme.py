"""Both READMEs say the same, and nothing that is not there."""
import re

import pytest
from conftest import ROOT

READMES = ["README.md", "README_EN.md"]


def read(name):
    return (ROOT / name).read_text("utf-8")


def blocks(name):
    return re.findall(r"^```(\w*)\n(.*?)^```", read(name), re.M | re.S)


def test_both_readmes_have_the_same_code_blocks_and_sections():
    chinese, english = (blocks(name) for name in READMES)
    assert chinese == english
    assert [len(re.findall("^#+ ", read(name), re.M)) for name in READMES][0] == len(re.findall("^#+ ", read("README_EN.md"), re.M))


@pytest.mark.parametrize("name", READMES)
def test_every_file_that_is_named_exists(name):
    named = set(re.findall(r"(?:scripts|sample|benchmarks|tests|ds_configs|notebooks)/[\w.]+|\b\w+\.py\b", read(name)))
    assert named and not [path for path in named if not (ROOT / path.rstrip(".")).exists()]


@pytest.mark.parametrize("name", READMES)
def test_every_flag_in_a_command_is_one_of_its_script(name):
    from test_consistency import flags_of

    from utils import training_argument_kinds

    for _, block in blocks(name):
        for command in re.findall(r"(?:scripts/(\w+)\.sh|python (\w+)\.py)(.*)", block):
            script = "generate.py" if command[0] == "web" else f"{command[0] or command[1]}.py"
            if (ROOT / script).is_file():
                known = flags_of(script)
                given = re.findall(r"--(\w+)", command[2])
                assert all(flag in known or ("training_arguments" in known and flag in training_argument_kinds()) for flag in given), command


def test_every_stage_stands_in_the_table():
    from test_consistency import SCRIPTS

    for name in READMES:
        for script in SCRIPTS:
            assert f"`{script}`" in read(name), f"{script} in {name}"
