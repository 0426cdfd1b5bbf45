"""Whole stages on a tiny model: what a user would find out too late."""
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import ROOT, make_model
from test_records import write

import finetune_lora
import generate
import inspect_labels
from utils import BadInput, Chat, RunStopped, tokenize_records

DATA = str(ROOT / "sample" / "conversation.json")
QUICK = dict(template="chatml", max_length=256, gradient_accumulation_steps=1, num_train_epochs=1, learning_rate=1e-2, gradient_checkpointing=False)


@pytest.fixture
def tune(model_folder, tmp_path, capsys):
    """Run finetune_lora on the tiny model; returns its report, the last line of the standard output."""
    def run(**flags):
        flags = dict(model_name_or_path=str(model_folder), data_path=DATA, output_dir=str(tmp_path / "out"), **QUICK) | flags
        capsys.readouterr()
        finetune_lora.main(**flags)
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


def weights(folder):
    from safetensors.torch import load_file

    return {name: tensor for file in Path(folder).glob("*.safetensors") for name, tensor in load_file(file).items()}


def same(a, b, within=0.0):
    return a.keys() == b.keys() and all((a[name] - b[name]).abs().max() <= within for name in a)


# ---- tuning ----
def test_a_saved_adapter_changes_the_answers_of_its_base(tune, model_folder):
    report = tune(num_train_epochs=3)
    assert report.keys() == {"tokens", "supervised_tokens", "seconds", "tokens_per_second", "train_loss", "eval_loss", "peak_memory_bytes", "output_dir"}
    base, chat = generate.load_model(str(model_folder), template="chatml")
    tuned, tuned_chat = generate.load_model(str(model_folder), report["output_dir"])
    ids = torch.tensor([[i for piece, _ in chat.encode([{"role": "user", "content": "你好"}], True) for i in piece]])
    assert (base(ids).logits - tuned(ids).logits).abs().max() > 0.1
    assert tuned_chat.jinja == chat.jinja and tuned_chat.stop_ids == chat.stop_ids
    stop = json.loads(Path(report["output_dir"], "generation_config.json").read_text())["eos_token_id"]
    assert stop == chat.stop_ids
    assert Path(report["output_dir"], "loss.png").read_bytes().startswith(b"\x89PNG")


def test_tuning_learns_and_counts_its_tokens(tune, model_folder):
    report = tune(num_train_epochs=6, eval_path=DATA, eval_steps=5, save_steps=5)
    chat = Chat(generate.load_model(str(model_folder))[1].tokenizer, "chatml")
    _, counts = tokenize_records(DATA, chat, 256)
    history = json.loads(sorted(Path(report["output_dir"]).glob("checkpoint-*"), key=lambda p: int(p.name[11:]))[-1].joinpath("trainer_state.json").read_text())["log_history"]
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert losses[-1] < losses[0] - 0.3 and math.isclose(losses[-1], report["eval_loss"])
    assert (report["tokens"], report["supervised_tokens"]) == (6 * counts["tokens"], 6 * counts["supervised_tokens"])
    assert {"eval_perplexity", "eval_token_accuracy"} <= history[-1].keys() | history[-2].keys()
    held = tune(output_dir=str(Path(report["output_dir"]) / "held"), num_train_epochs=2, eval_size=0.2)
    assert 0 < held["tokens"] < 2 * counts["tokens"] and held["eval_loss"] > 0


def test_eight_blocks_at_once_train_as_one_block_eight_times(tune, tmp_path):
    for packing in (True, False):
        flags = dict(packing=packing, max_length=128, lora_dropout=0.0, learning_rate=1e-3, num_train_epochs=2)
        reports = [tune(output_dir=str(tmp_path / f"{packing}{batch}"), per_device_train_batch_size=batch, gradient_accumulation_steps=8 // batch, **flags) for batch in (8, 1)]
        assert abs(reports[0]["train_loss"] - reports[1]["train_loss"]) < 1e-5
        assert same(weights(reports[0]["output_dir"]), weights(reports[1]["output_dir"]), within=1e-5)


@pytest.mark.parametrize("flags", [{"bits": 4}, {"bits": 8}, {"use_dora": True}, {"use_rslora": True}, {"lora_target_modules": "q_proj,v_proj"},
                                   {"gradient_checkpointing": True}, {"gradient_checkpointing": True, "bits": 4}, {"gradient_checkpointing": True, "bits": 8}, {"neftune_noise_alpha": 5.0}, {"report_to": "tensorboard"}], ids=str)
def test_every_way_to_tune_gives_an_adapter_that_loads(tune, model_folder, flags):
    report = tune(**flags)
    model, chat = generate.load_model(str(model_folder), report["output_dir"], bits=flags.get("bits", 16))
    assert isinstance("".join(generate.stream(model, chat, [{"role": "user", "content": "你好"}], max_new_tokens=5, temperature=0, top_p=1, top_k=0, repetition_penalty=1.0)), str)
    names = {name.split(".")[-3] for name in weights(report["output_dir"]) if "lora_A" in name}
    assert names == ({"q_proj", "v_proj"} if "lora_target_modules" in flags else {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"})


def test_gradient_checkpointing_changes_nothing_but_memory(tune, tmp_path):
    folders = [tune(output_dir=str(tmp_path / str(on)), gradient_checkpointing=on)["output_dir"] for on in (True, False)]
    assert same(weights(folders[0]), weights(folders[1]), within=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_new_control_tokens_start_as_the_mean_and_are_saved_without_the_rest_of_the_table(tmp_path, tune, bytelevel_folder, tied):
    from transformers import AutoTokenizer, LlamaForCausalLM

    folder = make_model(tmp_path / "base", AutoTokenizer.from_pretrained(bytelevel_folder), tie_word_embeddings=tied)
    model, chat = LlamaForCausalLM.from_pretrained(folder), Chat(AutoTokenizer.from_pretrained(folder), "yayi")
    old = model.get_output_embeddings().weight.detach().clone()
    rows = finetune_lora.add_token_rows(model, chat.tokenizer, chat.new_tokens)
    assert list(rows) == (["embed_tokens"] if tied else ["embed_tokens", "lm_head"]) and len(rows["embed_tokens"]) == 4
    assert torch.allclose(model.get_output_embeddings().weight[len(old):], old.mean(0).expand(4, -1), atol=1e-6)

    report = tune(model_name_or_path=str(folder), template="yayi", num_train_epochs=3, max_length=512)
    saved = weights(report["output_dir"])
    assert not any(tensor.shape[0] > 500 and "embed" in name for name, tensor in saved.items())
    trained = [tensor for name, tensor in saved.items() if "trainable_tokens" in name]
    assert len(trained) == (1 if tied else 2) and all(tensor.shape == (4, 64) for tensor in trained)
    tuned, tuned_chat = generate.load_model(str(folder), report["output_dir"])
    assert tuned_chat.stop_ids[-1] == tuned_chat.tokenizer.convert_tokens_to_ids("<|End|>")
    row = tuned.get_input_embeddings()(torch.tensor([tuned_chat.stop_ids[-1]]))
    assert (row - old.mean(0)).abs().max() > 1e-3  # it was trained


@pytest.mark.parametrize("family", ["qwen2", "bloom"])
def test_other_families_are_tuned_too(tmp_path, tune, bytelevel_folder, family):
    from transformers import AutoTokenizer, BloomConfig, BloomForCausalLM, Qwen2Config, Qwen2ForCausalLM

    tokenizer, folder = AutoTokenizer.from_pretrained(bytelevel_folder), tmp_path / family
    if family == "bloom":
        model = BloomForCausalLM(BloomConfig(vocab_size=len(tokenizer), hidden_size=64, n_layer=2, n_head=4))
    else:
        model = Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    report = tune(model_name_or_path=str(folder), eval_size=2, template="ziya")
    assert report["train_loss"] > 0 and report["eval_loss"] > 0


def test_a_checkpoint_answers_with_the_template_it_is_trained_with(tune, model_folder):
    out = Path(tune(template="ziya", save_steps=1, max_steps=2)["output_dir"])
    assert generate.load_model(str(model_folder), str(out / "checkpoint-1"))[1].jinja == generate.load_model(str(model_folder), str(out))[1].jinja
    assert not list(out.rglob("training_args.bin"))


def test_a_base_whose_generation_config_contradicts_itself_is_tuned_all_the_same(tune, tmp_path, model_folder):
    shutil.copytree(model_folder, tmp_path / "base")
    (tmp_path / "base" / "generation_config.json").write_text('{"temperature": 0.9, "top_p": 0.6, "pad_token_id": 0}')
    saved = json.loads(Path(tune(model_name_or_path=str(tmp_path / "base"))["output_dir"], "generation_config.json").read_text())
    assert saved["temperature"] == 0.9 and saved["do_sample"] and saved["pad_token_id"] == 0


def test_the_only_step_of_a_short_run_is_not_spent_on_warming_up(tune):
    assert any(tensor.any() for name, tensor in weights(tune(max_steps=1)["output_dir"]).items() if "lora_B" in name)


# ---- what ends a run, and what is left of it ----
def test_a_run_that_failed_before_its_first_checkpoint_begins_anew_with_other_flags(tune, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(finetune_lora, "supervised_forward", full)
    with pytest.raises(RunStopped):
        tune(per_device_train_batch_size=2)
    monkeypatch.undo()
    assert tune(per_device_train_batch_size=1)["train_loss"] > 0


def command(folder, out, *flags):
    return [sys.executable, "finetune_lora.py", "--model_name_or_path", str(folder), "--data_path", DATA, "--output_dir", str(out), "--template", "chatml",
            "--max_length", "128", "--gradient_accumulation_steps", "2", "--num_train_epochs", "8", "--gradient_checkpointing", "False", "--save_steps", "3",
            "--save_total_limit", "3", *flags]


def test_a_run_killed_at_any_moment_resumes_to_the_same_weights(tmp_path, model_folder):
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    whole = subprocess.run(command(model_folder, tmp_path / "whole"), cwd=ROOT, env=environment, capture_output=True, text=True)
    assert whole.returncode == 0, whole.stderr[-2000:]
    generator = random.Random(time.time())
    out = tmp_path / "killed"
    for kill in range(2):
        process = subprocess.Popen(command(model_folder, out, "--resume", str(kill > 0)), cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
        seen = len(list(out.glob("checkpoint-*")))
        while process.poll() is None and len(list(out.glob("checkpoint-*"))) <= seen:
            time.sleep(0.02)
        time.sleep(generator.random())
        os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
        process.communicate()
    resumed = subprocess.run(command(model_folder, out, "--resume", "True"), cwd=ROOT, env=environment, capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    assert same(weights(tmp_path / "whole"), weights(out))
    assert not list(out.glob(".saving"))


@pytest.mark.parametrize("length", [{"max_steps": 4}, {"num_train_epochs": 0.8}], ids=str)
def test_a_run_killed_behind_its_last_step_trains_no_step_more(tune, monkeypatch, length):
    flags = dict(max_length=128, save_steps=2, save_total_limit=9, lr_scheduler_type="constant", **length)
    whole = Path(tune(**flags)["output_dir"])
    finished, steps = weights(whole), sorted(path.name for path in whole.glob("checkpoint-*"))
    (whole / "adapter_model.safetensors").unlink()  # killed before the result was written
    again = tune(**flags, resume=True)
    assert same(weights(whole), finished) and sorted(path.name for path in whole.glob("checkpoint-*")) == steps and again["tokens"] == 0


def test_ctrl_c_exits_with_130_and_says_how_to_go_on(tmp_path, model_folder):
    process = subprocess.Popen(command(model_folder, tmp_path / "out", "--num_train_epochs", "500", "--logging_steps", "1"), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a shell's background jobs ignore it
    for line in process.stderr:
        if list((tmp_path / "out").glob("checkpoint-*/trainer_state.json")):
            break
    process.send_signal(signal.SIGINT)
    error = process.stderr.read()
    assert process.wait() == 130 and "go on with --resume True" in error and "Traceback" not in error
    assert list((tmp_path / "out").glob("checkpoint-*/adapter_model.safetensors"))


def test_a_checkpoint_cut_short_by_a_full_disk_is_not_taken_for_a_whole_one(tune, tmp_path, monkeypatch):
    save = torch.save

    def fill(object, path, *rest, **more):
        if "checkpoint-6" in str(path) and str(path).endswith("optimizer.pt"):
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        return save(object, path, *rest, **more)

    flags = dict(max_length=128, num_train_epochs=3, save_steps=3, save_total_limit=5)
    whole = tune(output_dir=str(tmp_path / "whole"), **flags)
    monkeypatch.setattr(torch, "save", fill)
    with pytest.raises(OSError, match="No space"):
        tune(**flags)
    monkeypatch.undo()
    assert not (tmp_path / "out" / "checkpoint-6" / "trainer_state.json").exists()
    resumed = tune(**flags, resume=True)
    assert same(weights(whole["output_dir"]), weights(resumed["output_dir"]))


def test_too_little_disk_is_said_before_training(tune, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(BadInput, match="GB free.*need"):
        tune()


@pytest.mark.parametrize("flags, named", [({"template": "alpaca"}, "template"), ({"max_length": 128}, "max_length"), ({"seed": 7}, "seed"), ({"lora_r": 4}, "lora_r"),
                                          ({"data_path": str(ROOT / "sample" / "ziya.jsonl")}, "data_path"), ({"gradient_accumulation_steps": 2}, "blocks_per_rank_and_step"),
                                          ({"lora_alpha": 4.0}, "lora_alpha"), ({"lora_target_modules": "q_proj"}, "lora_target_modules"), ({"use_dora": True}, "use_dora"),
                                          ({"last_round_only": True}, "last_round_only"), ({"learning_rate": 1e-5}, "learning_rate")], ids=str)
def test_resuming_another_run_is_refused_and_the_difference_named(tune, flags, named):
    tune(max_steps=2, save_steps=1)
    with pytest.raises(BadInput, match=f"was begun with {named} = "):
        tune(max_steps=2, resume=True, **flags)


def test_another_run_in_the_folder_is_not_overwritten(tune):
    tune(max_steps=2)
    with pytest.raises(BadInput, match="holds another run"):
        tune(max_steps=2)


def test_a_loss_of_nan_stops_with_step_and_records(tune, tmp_path, bytelevel_folder):
    from transformers import AutoTokenizer, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(bytelevel_folder)
    folder = make_model(tmp_path / "base", tokenizer)
    model = LlamaForCausalLM.from_pretrained(folder)
    held_by = Counter((i, example["record"]) for example in tokenize_records(DATA, Chat(tokenizer, "ziya"), 256)[0] for i in set(example["input_ids"]))
    only_in_9 = {i for i, record in held_by if record == 9} - {i for i, record in held_by if record != 9}
    with torch.no_grad():
        model.model.embed_tokens.weight[min(only_in_9)] = math.nan
    model.save_pretrained(folder)
    with pytest.raises(RunStopped, match=r"in step \d+ the loss is nan.*the records \[9\]"):
        tune(model_name_or_path=str(folder), template="ziya", packing=False, save_steps=1)
    kept = sorted((tmp_path / "out").glob("checkpoint-*"))
    assert all(torch.isfinite(tensor).all() for path in kept for tensor in weights(path).values())


def test_an_adapter_that_changes_nothing_is_an_error_not_a_file(tune, tmp_path):
    with pytest.raises(RunStopped, match="changes nothing"):
        tune(learning_rate=0.0)
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


# ---- bad input ----
@pytest.mark.parametrize("flags, reason", [
    ({"lora_target_modules": "query_key_value"}, "no linear layer 'query_key_value', it has .*q_proj"),
    ({"template": "alpacca"}, "did you mean alpaca"), ({"max_length": 8}, "below the"), ({"precision": "fp16"}, "needs a GPU"),
    ({"report_to": "swanlabb"}, "pip install swanlabb"), ({"bf16": True}, "use --precision"), ({"eval_size": 10}, "leaves nothing to train on"), ({"eval_size": 0.01}, "holds out no record"),
    ({"eval_size": 2, "eval_path": DATA}, "give one"), ({"eval_strategy": "steps"}, "needs something to evaluate on"), ({"lora_r": 0}, "--lora_r=0 must be above zero"),
    ({"gradient_accumulation_steps": 0}, "must be above zero"), ({"deepspeed": "ds_configs/zero2.json"}, "needs torchrun"), ({"fsdp": "full_shard"}, "--fsdp needs torchrun"),
    ({"auto_find_batch_size": True}, "is not taken here"),
    ({"data_path": "nowhere.json"}, "--data_path=nowhere.json does not exist"), ({"data_path": str(ROOT)}, "is a folder"), ({"eval_path": "nowhere.json"}, "--eval_path"),
    ({"model_name_or_path": "nowhere"}, "nowhere does not exist"), ({"model_name_or_path": str(ROOT)}, "has no config.json"),
], ids=lambda value: str(value)[:40])
def test_bad_input_is_refused_in_one_line(tune, tmp_path, flags, reason):
    with pytest.raises(BadInput, match=reason) as refusal:
        tune(**flags)
    assert "\n" not in str(refusal.value) and not (tmp_path / "out").exists()


def test_a_model_folder_that_lacks_weights_is_refused(tune, tmp_path, model_folder):
    folder = tmp_path / "base"
    shutil.copytree(model_folder, folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(BadInput, match="pickle.*--allow_pickle True"):
        tune(model_name_or_path=str(folder))
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(BadInput, match="holds no weights"):
        tune(model_name_or_path=str(folder))
    data = (model_folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(BadInput, match="could not be loaded"):
        tune(model_name_or_path=str(folder))
    from safetensors.torch import save_file

    save_file({name: tensor for name, tensor in weights(model_folder).items() if "layers.1" not in name}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadInput, match="lacks 9 of its weights"):
        tune(model_name_or_path=str(folder))


# ---- looking ----
def test_the_dump_is_what_is_trained_in_file_order(model_folder, tmp_path, capsys):
    flags = dict(model_name_or_path=str(model_folder), data_path=DATA, template="alpaca", max_length=128)
    inspect_labels.main(**flags, record=5, dump=str(tmp_path / "dump.jsonl"), html=str(tmp_path / "record.html"))
    dumped = [json.loads(line) for line in (tmp_path / "dump.jsonl").read_text().splitlines()]
    chat = Chat(generate.load_model(str(model_folder))[1].tokenizer, "alpaca")
    assert dumped == list(tokenize_records(DATA, chat, 128)[0].remove_columns("length")) and [d["record"] for d in dumped] == sorted(d["record"] for d in dumped)
    out = capsys.readouterr().out
    assert "«听到这个消息我也替你可惜。" in out and "10 records" in out and "█" in out
    assert '<span class="trained"' in (tmp_path / "record.html").read_text()
    with pytest.raises(BadInput, match="--record=10 is not in"):
        inspect_labels.main(**flags, record=10)


def test_the_audit_finds_what_is_wrong(model_folder, tmp_path, capsys):
    path = write(tmp_path, *[{"instruction": "问", "output": "答"}] * 3, {"instruction": "问", "output": "长" * 300}, {"instruction": "问\ufffd", "output": "the snow print or return", "x": 1},
                 *[{"instruction": "Q " + word[0], "output": word[1:] + " A"} for word in ("the", "and", "print", "of")])
    inspect_labels.main(model_name_or_path=str(model_folder), data_path=path, template="plain", max_length=128)
    out = capsys.readouterr().out
    for line in ("1 x answers without a stop token", "3 x examples that stand more than once", "1 answers and", "1 x U+FFFD", "1 x unknown column 'x'", "places where a merge"):
        assert line in out, line
