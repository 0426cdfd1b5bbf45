"""Each wrapper starts the script of its name, with flags that the script has, and a wrapper of training says first what the run will take."""
import contextlib
import json
import os
import re
import subprocess

import pytest
from conftest import ROOT
from test_consistency import flags_of

WRAPPERS = [path for path in sorted((ROOT / "scripts").glob("*.sh")) if (ROOT / f"{path.stem}.py").is_file() or path.stem == "web"]
TRAINING = [path for path in WRAPPERS if "torchrun" in path.read_text()]
AWKWARD = "a b;\"c' $(touch broken) *\\"


@pytest.mark.parametrize("wrapper", WRAPPERS, ids=lambda path: path.name)
def test_a_wrapper_passes_only_flags_that_its_script_has(calls, wrapper):
    words = calls("bash", wrapper, "--seed", "7", MODEL_PATH="my/model", BASE_MODEL="my/model", LORA_PATH="my adapter", DELTA_PATH="my delta", DATA_PATH="my data.json")[-1]
    script = "webui.py" if wrapper.stem == "web" else f"{wrapper.stem}.py"
    own = words[words.index(script) + 1:]
    given = [word.removeprefix("--") for word in own if word.startswith("--")]
    known = flags_of(script) | (flags_of("finetune_lora.py") if wrapper.stem == "estimate_memory" else {})
    assert set(given) - {"seed"} <= known.keys() and given[-1] == "seed"  # last, so that the caller's flags win
    assert "my/model" in own and {"my data.json", "my adapter", "my delta"} & set(own)  # blanks survive


@pytest.mark.parametrize("wrapper", TRAINING, ids=lambda path: path.name)
def test_a_training_wrapper_counts_gpus_and_reaches_other_machines(calls, wrapper):
    words = calls("bash", wrapper, MODEL_PATH="m", TOT_CUDA="0,3,5", PORT="29511", NNODES="2", NODE_RANK="1", MASTER_ADDR="10.0.0.1")[-1]
    options = dict(zip(words[1::2], words[2::2]))
    assert (options["--nproc_per_node"], options["--nnodes"], options["--node_rank"]) == ("3", "2", "1")
    assert (options["--master_addr"], options["--master_port"]) == ("10.0.0.1", "29511")
    assert dict(zip(words[1::2], calls("bash", wrapper, MODEL_PATH="m")[-1][2::2]))["--nproc_per_node"] == "1"


@pytest.mark.parametrize("wrapper", TRAINING, ids=lambda path: path.name)
def test_the_estimate_is_asked_for_the_very_run_whatever_stands_in_the_variables(calls, wrapper, tmp_path):
    names = ("MODEL_PATH", "DATA_PATH", "OUTPUT_PATH", "TOT_CUDA", "BITS", "DS_CONFIG", "MASTER_ADDR", "PORT", "RULES", "REWARD_MODEL")
    given = {name: f"{AWKWARD} {name}" for name in names}
    estimate, run = calls("bash", wrapper, "--report_to", AWKWARD, **given)[-2:]
    assert estimate[:4] == ["python", "estimate_memory.py", "--stage", wrapper.stem] and estimate[4:10] == ["--ranks", "1", "--nnodes", "1", "--verdict", "warn"]
    assert run[run.index(f"{wrapper.stem}.py") + 1:] == estimate[10:] and estimate[-2:] == ["--report_to", AWKWARD]
    assert {given[name] for name in names if f"{name}=" in wrapper.read_text() and name != "TOT_CUDA"} <= {*run}
    assert calls("bash", wrapper, MODEL_PATH="m", NODE_RANK=AWKWARD, NNODES=AWKWARD)[-1].count(AWKWARD) == 2 and not list(tmp_path.glob("broken"))
    for changes in (["--help"], {}), ([], {"NODE_RANK": "1"}), ([], {"CHECK_MEMORY": "off"}):  # nothing is asked
        assert [call[0] for call in calls("bash", wrapper, *changes[0], MODEL_PATH="m", **changes[1]) if call[1:2] != ["-c"]] == ["torchrun"]


@pytest.mark.parametrize("wrapper", sorted(set(WRAPPERS) - set(TRAINING)), ids=lambda path: path.name)
def test_whatever_stands_in_a_variable_reaches_the_script_as_it_is(calls, wrapper, tmp_path):
    names = set(re.findall(r"^([A-Z_]+)=\$\{\1:-", wrapper.read_text("utf-8"), re.M)) - {"TOT_CUDA"}
    names -= {"BY", "REWARD_MODEL"} if wrapper.stem == "score_records" else set()  # by rules, it takes no reward model
    words = calls("bash", wrapper, **{name: f"{AWKWARD} {name}" for name in names})[-1]
    assert {f"{AWKWARD} {name}" for name in names} <= set(words) and not list(tmp_path.rglob("broken"))


@pytest.mark.parametrize("wrapper", sorted({*(ROOT / "scripts").glob("*.sh")} - {ROOT / "scripts/test.sh", ROOT / "scripts/install.sh"}), ids=lambda path: path.name)
def test_nothing_that_stands_in_a_variable_is_run(calls, wrapper, tmp_path):
    for name in set(re.findall(r"\b([A-Z_]+)=\$\{\1:?-", wrapper.read_text("utf-8"))) - {"OMP_WAIT_POLICY", "CUDA_VISIBLE_DEVICES"}:
        with contextlib.suppress(AssertionError):  # some look first whether there is such a folder
            calls("bash", f"scripts/{wrapper.name}", **{name: AWKWARD})
    assert not list(tmp_path.rglob("broken"))


def start(tmp_path, wrapper, *flags, cards: str = "", **environment) -> tuple[int, list[str], bool]:
    """Run a wrapper with a stub for torchrun and nvidia-smi, and all else as it is: exit status, lines on stderr, did torchrun start."""
    for name, text in (("torchrun", "touch $STARTED"), ("nvidia-smi", '[ "$1" = --list-gpus ] && echo "$CARDS" && exit; echo "$*" > $STARTED.asked; echo "$CARDS"')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n" if name == "torchrun" or cards else "#!/bin/sh\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    started = tmp_path / "started"
    started.unlink(missing_ok=True)
    named = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "STARTED": str(started), "CARDS": cards, "DATA_PATH": "no data", "OUTPUT_PATH": str(tmp_path / "out")}
    inherited = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    done = subprocess.run(["bash", wrapper, *flags], env=inherited | named | environment, capture_output=True, text=True)
    assert not done.stdout
    return done.returncode, done.stderr.splitlines(), started.exists()


def folder_of(tmp_path, name: str, **config) -> str:
    import estimate_memory

    (tmp_path / name).mkdir()
    sizes = dict(zip(estimate_memory.FIELDS, estimate_memory.SIZES[name]))
    (tmp_path / name / "config.json").write_text(json.dumps({"model_type": "llama"} | sizes | config))
    return str(tmp_path / name)


@pytest.mark.parametrize("wrapper", TRAINING, ids=lambda path: path.name)
def test_a_training_wrapper_prints_the_verdict_and_stops_on_request_alone(tmp_path, wrapper):
    small, large = folder_of(tmp_path, "smollm2-135m", num_hidden_layers=1), folder_of(tmp_path, "llama-2-70b", num_hidden_layers=8000)
    status, lines, started = start(tmp_path, wrapper, "--max_length", "256", "--seed", "7", "--max_steps", "2", MODEL_PATH=small)
    assert status == 0 and started and len(lines) == 1 and "GB free on this machine, which has no GPU, for 1 x 256 tokens" in lines[0]
    status, lines, started = start(tmp_path, wrapper, MODEL_PATH=large)
    assert status == 0 and started and len(lines) == 2 and "this will hardly fit" in lines[1]
    status, lines, started = start(tmp_path, wrapper, MODEL_PATH=large, CHECK_MEMORY="stop")
    assert status == 2 and not started and len(lines) == 2
    status, lines, started = start(tmp_path, wrapper, MODEL_PATH=small, CHECK_MEMORY="Stop")
    assert status == 2 and not started and lines == ["error: CHECK_MEMORY=Stop is none of warn, stop, off"]


def test_the_verdict_is_of_the_fullest_card_that_the_run_sees(tmp_path):
    wrapper, model = ROOT / "scripts" / "finetune_lora.sh", folder_of(tmp_path, "llama-2-7b")
    status, lines, started = start(tmp_path, wrapper, cards="24000\n10000\n24000", MODEL_PATH=model, CHECK_MEMORY="stop")
    assert started and len(lines) == 1 and "of 10.49 GB free on each GPU" in lines[0]  # 4 bit, as the wrapper asks for on a GPU
    status, lines, started = start(tmp_path, wrapper, "--bits", "16", cards="10000", TOT_CUDA="3,1", MODEL_PATH=model, CHECK_MEMORY="stop")
    assert status == 2 and lines[1].startswith("memory: this will hardly fit; what costs least to change is --bits 4 (")
    assert (tmp_path / "started.asked").read_text().split()[-1] == "--id=3,1"


@pytest.mark.parametrize("flags, environment, shown", [
    ([], {"MODEL_PATH": "nobody/nothing"}, "memory: no estimate, nobody/nothing holds no config.json"),
    ([], {"TOT_CUDA": "GPU-x", "MODEL_PATH": "llama-2-7b"}, "memory: no estimate, nvidia-smi does not say what is free on GPU GPU-x"),
    (["--lerning_rate", "1"], {"MODEL_PATH": "llama-2-7b"}, None), (["stray"], {"MODEL_PATH": "llama-2-7b"}, None)], ids=str)
def test_an_estimate_that_fails_stops_nothing_and_says_little(tmp_path, flags, environment, shown):
    status, lines, started = start(tmp_path, ROOT / "scripts" / "finetune.sh", *flags, CHECK_MEMORY="stop", **environment)
    assert status == 0 and started and len(lines) == (shown is not None) and all(line.startswith(shown) for line in lines)
