"""Each wrapper starts the script of its name, with flags that the script has."""
import pytest
from conftest import ROOT
from test_consistency import flags_of

WRAPPERS = [path for path in sorted((ROOT / "scripts").glob("*.sh")) if (ROOT / f"{path.stem}.py").is_file()]


@pytest.mark.parametrize("wrapper", WRAPPERS, ids=lambda path: path.name)
def test_a_wrapper_passes_only_flags_that_its_script_has(calls, wrapper):
    words = calls("bash", wrapper, "--seed", "7", MODEL_PATH="my/model", BASE_MODEL="my/model", LORA_PATH="my adapter", DELTA_PATH="my delta", DATA_PATH="my data.json")[-1]
    script = "generate.py" if wrapper.stem == "web" else f"{wrapper.stem}.py"
    own = words[words.index(script) + 1:]
    given = [word.removeprefix("--") for word in own if word.startswith("--")]
    assert set(given) - {"seed"} <= set(flags_of(script)) and given[-1] == "seed"  # last, so that the caller's flags win
    assert "my/model" in own and {"my data.json", "my adapter", "my delta"} & set(own)  # blanks survive


@pytest.mark.parametrize("wrapper", [path for path in WRAPPERS if "torchrun" in path.read_text()], ids=lambda path: path.name)
def test_a_training_wrapper_counts_gpus_and_reaches_other_machines(calls, wrapper):
    words = calls("bash", wrapper, MODEL_PATH="m", TOT_CUDA="0,3,5", PORT="29511", NNODES="2", NODE_RANK="1", MASTER_ADDR="10.0.0.1")[-1]
    options = dict(zip(words[1::2], words[2::2]))
    assert (options["--nproc_per_node"], options["--nnodes"], options["--node_rank"]) == ("3", "2", "1")
    assert (options["--master_addr"], options["--master_port"]) == ("10.0.0.1", "29511")
    assert dict(zip(words[1::2], calls("bash", wrapper, MODEL_PATH="m")[-1][2::2]))["--nproc_per_node"] == "1"


@pytest.mark.parametrize("wrapper", [path for path in WRAPPERS if "torchrun" in path.read_text()], ids=lambda path: path.name)
def test_a_training_wrapper_asks_for_the_memory_first_and_takes_any_character(calls, wrapper):
    odd = "a b;'c\"$(touch never)"
    estimate, run = calls("bash", wrapper, "--seed", odd, MODEL_PATH=odd, DATA_PATH=odd, OUTPUT_PATH=odd)[-2:]
    flags = run[run.index(f"{wrapper.stem}.py") + 1:]
    assert flags.count(odd) == 4 and estimate[1:4] == ["estimate_memory.py", "--stage", wrapper.stem] and estimate[-1].removeprefix("--run=").split("\n") == flags
    assert len(calls("bash", wrapper, MODEL_PATH="m", NODE_RANK="1", NNODES="2", PORT="1")) == 1  # said once
