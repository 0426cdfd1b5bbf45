"""The command line: understood as a whole before anything runs; and the checks of files and folders."""
import contextlib
import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
from conftest import ROOT

from utils import BadInput, check_adapter, check_model, check_output_dir, cli, convert_flags, fingerprint, resume_point, whole_folder, write_facts


def main(*, prompt: str, count: int = 1, rate: float = 0.5, packing: bool = True, bits: Literal[16, 8, 4] = 16, path: str | None = None):
    """Do nothing.

    Args:
        prompt: What to say.
    """


def tune(*, learning_rate: float = 1e-4, **training_arguments):
    pass


@pytest.fixture
def run(monkeypatch, capsys):
    """Run cli on a main that notes what it was given, or fails; returns (exit status, flags, standard error)."""
    def run(*words, fails=None):
        given = {}

        def main(*, prompt: str = "", count: int = 1, packing: bool = True):
            given.update(prompt=prompt, count=count, packing=packing)
            if fails:
                raise fails

        monkeypatch.setattr(sys, "argv", ["stage.py", *words])
        try:
            cli(main)
            status = 0
        except SystemExit as stop:
            status = stop.code
        return status, given, capsys.readouterr().err

    return run


def test_text_stays_text(run):
    assert run("--prompt", "hello, world", "--count=3", "--packing", "false")[1] == {"prompt": "hello, world", "count": 3, "packing": False}
    for text in ("[1, 2]", "None", "1e5", "{'a': 1}", "True"):
        assert run("--prompt", text)[1]["prompt"] == text


@pytest.mark.parametrize("flags, reason", [
    ({"prompt": "a", "cuont": "3"}, "--cuont is not a flag of .*did you mean --count?"), ({"prompt": "a", "count": "3.5"}, "--count=3.5 is not a whole number"),
    ({"prompt": "a", "rate": "fast"}, "--rate=fast is not a number"), ({"prompt": "a", "packing": "yes"}, "--packing=yes is not True or False"),
    ({"prompt": "a", "bits": "5"}, "--bits=5 is not one of 16, 8, 4"), ({}, "--prompt is missing: What to say"),
])
def test_a_flag_that_cannot_be_understood_is_named_with_the_remedy(flags, reason):
    with pytest.raises(BadInput, match=reason):
        convert_flags(main, flags)


def test_every_flag_has_the_type_of_its_annotation():
    assert convert_flags(main, {"prompt": "7", "rate": "2", "bits": "4", "path": "None"}) == {"prompt": "7", "rate": 2.0, "bits": 4, "path": None}
    assert convert_flags(tune, {"learning_rate": "1e-5", "max_steps": "30", "report_to": "tensorboard", "optim": "adafactor"}) == {
        "learning_rate": 1e-5, "max_steps": 30, "report_to": "tensorboard", "optim": "adafactor"}
    with pytest.raises(BadInput, match="did you mean --max_steps"):
        convert_flags(tune, {"max_step": "30"})


def test_nothing_runs_before_the_line_is_understood(run):
    for words in (("--prompt", "a", "--cuont", "3"), ("--prompt", "a", "stray"), ("--count", "many")):
        status, given, error = run(*words)
        assert status == 2 and not given and error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize("problem, status, said", [
    (BadInput("what, where"), 2, "error: what, where"), (OSError(errno.ENOSPC, "No space left on device"), 2, "the disk is full"),
    (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), 2, "the disk is full"), (KeyboardInterrupt(), 130, ""),
    (OSError(errno.ENAMETOOLONG, "File name too long", "aaa"), 2, "error: [Errno 36] File name too long: 'aaa'"),
    (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore"), 1, "out of memory (CUDA out of memory. Tried to allocate 2.00 GiB): lower "),
], ids=str)
def test_what_ends_a_run_is_one_line_and_a_status(run, problem, status, said):
    got, _, error = run("--prompt", "a", fails=problem)
    assert got == status and said in error and error.count("\n") <= 1


@pytest.mark.parametrize("library", ["torch", "numpy", "Python"])
def test_what_a_library_says_of_a_full_disk_is_understood(run, library):
    import numpy
    import torch

    def write(path):
        with open(path, "wb") as file:
            file.write(bytes(10**5))

    with pytest.raises(Exception) as full:  # /dev/full is a disk without room
        {"torch": lambda path: torch.save(torch.zeros(10**5), path), "numpy": numpy.zeros(10**5).tofile, "Python": write}[library]("/dev/full")
    status, _, error = run("--prompt", "a", fails=full.value)
    assert status == 2 and "the disk is full" in error and error.count("\n") == 1


def test_a_mistyped_flag_and_help_load_no_torch():
    code = "import sys; sys.argv = ['finetune_lora.py', {!r}]; import finetune_lora, utils\ntry: utils.cli(finetune_lora.main)\nfinally: print('torch' in sys.modules)"
    for flag, status in (("--learning_rat=1", 2), ("--help", 0)):
        done = subprocess.run([sys.executable, "-c", code.format(flag)], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == status and done.stdout.endswith("False\n"), done.stderr
    assert "--lora_r=LORA_R" in done.stdout and "Rank of the update" in done.stdout  # on the standard output


def test_importing_utils_loads_nothing_that_takes_seconds(tmp_path):
    for name in ("torch", "transformers", "datasets", "tokenizers", "numpy", "pyarrow"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(f'{__name__} was imported')")
    done = subprocess.run([sys.executable, "-c", "import utils"], env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- files ----
def test_a_folder_is_there_whole_or_not_at_all(tmp_path):
    with pytest.raises(ZeroDivisionError), whole_folder(tmp_path / "a") as unfinished:
        (unfinished / "half").write_text("x")
        1 / 0
    assert not list(tmp_path.iterdir())
    with whole_folder(tmp_path / "a") as unfinished:
        (unfinished / "file").write_text("x")
        assert not (tmp_path / "a").exists()
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "file"]


def test_a_folder_that_is_no_model_is_told_apart(tmp_path):
    for names, reason in (((), "holds nothing"), (("adapter_config.json",), "is a LoRA adapter: .*merge_lora.py.*give its base"), (("config.json", "pytorch_model.bin"), "pickle.*--allow_pickle"),
                          (("config.json", "delta.json"), "is a delta.*apply_delta.py"),
                          (("config.json",), "holds no weights")):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        for name in names:
            (folder / name).write_text("{}")
        with pytest.raises(BadInput, match=reason):
            check_model(str(folder))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}))
    (folder / "model-00001-of-00002.safetensors").write_text("")
    with pytest.raises(BadInput, match="lacks model-00002-of-00002.safetensors"):
        check_model(str(folder))
    with pytest.raises(BadInput, match="is no adapter"):
        check_adapter(str(folder))
    check_model("Qwen/Qwen2.5-7B")


def test_an_output_folder_in_use_is_refused_and_resumed_only_by_the_same_run(tmp_path):
    check_output_dir(str(tmp_path / "new"), resume=False)
    (tmp_path / "a").write_text("")
    for path in (tmp_path / "a", tmp_path / "a" / "b"):
        with pytest.raises(BadInput, match="a is not a folder"):
            check_output_dir(str(path), resume=False)
    (tmp_path / "a").unlink()
    facts = {"seed": 1, "data": "abc", "world_size": 1}
    write_facts(str(tmp_path), facts)
    check_output_dir(str(tmp_path), resume=False)  # nothing is lost: it failed before its first checkpoint
    assert resume_point(str(tmp_path), facts | {"seed": 2}) is None
    checkpoint(tmp_path, 9, '{"global_step": 9}', "rng_state.pth", "optimizer.pt", "scheduler.pt")
    with pytest.raises(BadInput, match="holds another run"):
        check_output_dir(str(tmp_path), resume=False)
    for other, reason in (({"seed": 2}, "was begun with seed = 1, now it is 2"), ({"world_size": 2}, "world_size = 1, now it is 2")):
        with pytest.raises(BadInput, match=reason):
            resume_point(str(tmp_path), facts | other)
    assert Path(resume_point(str(tmp_path), facts)).name == "checkpoint-9"


def checkpoint(folder, step, state, *files):
    (folder / f"checkpoint-{step}").mkdir()
    for name, text in (("trainer_state.json", state), *((name, "x") for name in files)):
        if text is not None:
            (folder / f"checkpoint-{step}" / name).write_text(text)


@pytest.mark.parametrize("ranks", [1, 2])
def test_only_a_whole_checkpoint_is_gone_on_from(tmp_path, capsys, monkeypatch, ranks):
    states = ["optimizer.pt", "scheduler.pt"] + (["rng_state.pth"] if ranks == 1 else ["rng_state_0.pth", "rng_state_1.pth"])
    checkpoint(tmp_path, "best", "{}", *states)
    checkpoint(tmp_path, 9, '{"global_step": 9}', *states)
    assert Path(resume_point(str(tmp_path), {"world_size": ranks})).name == "checkpoint-9" and not capsys.readouterr().err
    checkpoint(tmp_path, 10, '{"epoch": 1', *states)
    checkpoint(tmp_path, 11, None, *states)
    checkpoint(tmp_path, 100, '{"global_step": 100}', *states[:-1])  # the last rank was killed before it wrote
    assert Path(resume_point(str(tmp_path), {"world_size": ranks})).name == "checkpoint-9"
    error = capsys.readouterr().err
    assert error.count("is not whole") == 3 and all(f"checkpoint-{step} " in error for step in (100, 11, 10))
    for rank in range(ranks):  # all of them pass over the same ones, though one alone writes
        monkeypatch.setenv("RANK", str(rank))
        (tmp_path / "checkpoint-9" / "trainer_state.json").write_text('{"global_step": 9, "best_model_checkpoint": 5}')
        assert resume_point(str(tmp_path), {"world_size": ranks}) is None
    for folder in tmp_path.glob("checkpoint-9"):
        shutil.rmtree(folder)
    assert resume_point(str(tmp_path), {"world_size": ranks}) is None


def test_a_fingerprint_tells_one_base_from_another(tmp_path):
    import numpy
    from safetensors.numpy import save_file

    found = set()
    for name, value in (("a", 1.0), ("b", 2.0), ("c", 1.0)):
        (tmp_path / name).mkdir()
        save_file({"weight": numpy.full((3, 4), value, "float32")}, tmp_path / name / "model.safetensors")
        found.add(fingerprint(str(tmp_path / name)))
    assert len(found) == 2 and fingerprint(str(tmp_path)) is None


def test_a_run_goes_on_from_another_folder_with_the_same_base_and_from_no_other_name_on_the_hub(tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    for begun, now, refused in (("a", "b", False), (None, None, True)):  # fingerprints: a model on the hub has none
        (tmp_path / "run.json").write_text(json.dumps({"base": "x/one", "base_fingerprint": begun and "same", "world_size": 1}))
        facts = {"base": "x/two", "base_fingerprint": now and "same", "world_size": 1}
        with pytest.raises(BadInput, match="was begun with base = x/one, now it is x/two") if refused else contextlib.nullcontext():
            assert resume_point(str(tmp_path), facts) is None


def test_ranks_end_their_group_before_their_process(monkeypatch, tmp_path):
    """A thread of gloo that is left over can abort a process whose work is done and saved."""
    import torch

    def work():
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1)

    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(sys, "argv", ["script.py"])
    cli(work)
    assert not torch.distributed.is_initialized()
