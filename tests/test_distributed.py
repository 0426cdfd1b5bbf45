"""One rank or two, plain or ZeRO-2 or ZeRO-3: the same training, whole checkpoints, and a resume that can be trusted."""
import json
import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import ROOT
from test_stages import same, weights

DATA = str(ROOT / "sample" / "conversation.json")
FLAGS = ["--data_path", DATA, "--template", "chatml", "--max_length", "128", "--learning_rate", "2e-3", "--lr_scheduler_type", "constant", "--warmup_steps", "0",
         "--logging_steps", "1", "--save_steps", "2", "--save_total_limit", "9", "--num_train_epochs", "3"]


def start(script, folder, out, ranks, *flags):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", str(port)] if ranks > 1 else []
    return subprocess.Popen([sys.executable, *command, script, "--model_name_or_path", str(folder), "--output_dir", str(out), *FLAGS, *flags], cwd=ROOT,
                            env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, start_new_session=True)


def finish(process) -> dict:
    out, error = process.communicate()
    assert process.returncode == 0, error[-3000:]
    return json.loads(out.splitlines()[-1])


def losses(out):
    last = max(Path(out).glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    history = json.loads((last / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry], [entry["eval_loss"] for entry in history if "eval_loss" in entry]


@pytest.fixture(scope="module")
def one_rank(model_folder, tmp_path_factory):
    """What every way to spread the work must give: (output folder, report)."""
    out = tmp_path_factory.mktemp("one") / "out"
    return out, finish(start("finetune.py", model_folder, out, 1, "--gradient_accumulation_steps", "8", "--eval_path", DATA))


@pytest.mark.parametrize("ranks, batch, flags", [
    (2, 4, []), (2, 2, ["--deepspeed", "ds_configs/zero2.json"]), (2, 1, ["--deepspeed", "ds_configs/zero3.json"]),
], ids=["two ranks", "ZeRO-2", "ZeRO-3"])
def test_every_way_to_spread_the_work_gives_the_same_training(one_rank, model_folder, tmp_path, ranks, batch, flags):
    """8 blocks a step: as 1 x 8 on one rank, and as 2 ranks with other batches, some of them empty at the end of an epoch."""
    out, expected = one_rank
    report = finish(start("finetune.py", model_folder, tmp_path / "out", ranks, "--eval_path", DATA, "--per_device_train_batch_size", str(batch),
                          "--gradient_accumulation_steps", str(8 // ranks // batch), *flags))
    for ours, theirs in zip(losses(tmp_path / "out"), losses(out)):
        assert len(ours) == len(theirs) > 0 and max(abs(a - b) for a, b in zip(ours, theirs)) < 1e-4
    assert abs(report["eval_loss"] - expected["eval_loss"]) < 1e-4
    assert (report["tokens"], report["supervised_tokens"]) == (expected["tokens"], expected["supervised_tokens"])
    for folder in (".", "checkpoint-2"):  # whole models, in the middle of the run as well
        assert same(weights(tmp_path / "out" / folder), weights(out / folder), within=1e-3)


def test_the_order_of_ranks_and_accumulation_does_not_matter_for_an_odd_number_of_ranks(model_folder, tmp_path):
    reports = [finish(start("finetune.py", model_folder, tmp_path / str(ranks), ranks, "--gradient_accumulation_steps", str(3 // ranks), "--max_steps", "4"))
               for ranks in (1, 3)]
    assert abs(reports[0]["train_loss"] - reports[1]["train_loss"]) < 1e-4
    assert same(weights(tmp_path / "1"), weights(tmp_path / "3"), within=1e-3)


@pytest.mark.parametrize("flags", [[], ["--deepspeed", "ds_configs/zero2.json"]], ids=["plain", "ZeRO-2"])
def test_two_ranks_killed_at_any_moment_resume_bit_for_bit(model_folder, tmp_path, flags):
    flags = ["--gradient_accumulation_steps", "1", "--num_train_epochs", "8", "--lora_dropout", "0.1", *flags]  # dropout: the random state is resumed as well
    finish(start("finetune_lora.py", model_folder, tmp_path / "whole", 2, *flags))
    out = tmp_path / "killed"
    process = start("finetune_lora.py", model_folder, out, 2, *flags)
    while process.poll() is None and len(list(out.glob("checkpoint-*"))) < 2:
        time.sleep(0.02)
    time.sleep(random.Random(time.time()).random() / 2)
    for one in (*psutil.Process(process.pid).children(recursive=True), process):  # torchrun gives each rank a session of its own
        one.kill()
    process.communicate()
    assert not (out / "adapter_model.safetensors").exists()
    finish(start("finetune_lora.py", model_folder, out, 2, "--resume", "True", *flags))
    assert same(weights(tmp_path / "whole"), weights(out))


def test_lora_under_zero3_saves_a_whole_adapter(model_folder, tmp_path):
    flags = ["--template", "alpaca", "--max_length", "256", "--lora_dropout", "0"]
    for ranks, more in ((1, ["--gradient_accumulation_steps", "4"]), (2, ["--gradient_accumulation_steps", "2", "--deepspeed", "ds_configs/zero3.json"])):
        finish(start("finetune_lora.py", model_folder, tmp_path / str(ranks), ranks, *flags, *more))
    assert same(weights(tmp_path / "1"), weights(tmp_path / "2"), within=1e-3)


def test_ranks_that_read_other_data_are_refused(model_folder, tmp_path):
    (tmp_path / "other.py").write_text(
        "import os, sys\nsys.path.insert(0, '.')\nfrom finetune import main\nfrom utils import cli\n"
        "if os.environ['RANK'] == '1': sys.argv[sys.argv.index('--data_path') + 1] = 'sample/instruction.json'\ncli(main)\n")
    process = start(str(tmp_path / "other.py"), model_folder, tmp_path / "out", 2)
    _, error = process.communicate()
    assert process.returncode and "rank 1 has another data_path than rank 0" in error


def test_another_number_of_ranks_is_refused_on_resume(one_rank, model_folder):
    out, _ = one_rank
    process = start("finetune.py", model_folder, out, 2, "--gradient_accumulation_steps", "8", "--eval_path", DATA, "--resume", "True")
    _, error = process.communicate()
    assert process.returncode and "was begun with world_size = 1, now it is 2" in error
