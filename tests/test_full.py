"""Tuning of all weights: what is trained and what is not, when a run ends early, and what it says when it does not fit."""
import json
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from test_stages import DATA, QUICK, same, weights

import finetune
import finetune_multi_rounds
import generate
from utils import BadInput, RunStopped


@pytest.fixture
def tune(model_folder, tmp_path, capsys):
    """Run finetune on the tiny model; returns its report."""
    def run(script=finetune, **flags):
        flags = dict(model_name_or_path=str(model_folder), data_path=DATA, output_dir=str(tmp_path / "out"), **QUICK) | {"learning_rate": 2e-3} | flags
        script.main(**flags)
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


@pytest.mark.parametrize("script", [finetune, finetune_multi_rounds], ids=["finetune", "finetune_multi_rounds"])
def test_a_tuned_model_is_one_that_transformers_loads_with_template_and_stop_token(tune, model_folder, script):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tune(script, num_train_epochs=2)["output_dir"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    old = weights(model_folder)
    changed = [name for name, tensor in weights(out).items() if name in old and tensor.shape == old[name].shape and not torch.equal(tensor, old[name])]
    assert len(changed) == len(old) - 2  # all but the embedding and the head, whose shapes have grown
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size == len(tokenizer) == len(old["lm_head.weight"]) + 2
    assert tokenizer.chat_template and tokenizer.convert_tokens_to_ids("<|im_end|>") in model.generation_config.eos_token_id
    assert generate.answer_batch(*generate.load_model(out), [[{"role": "user", "content": "你好"}]], max_new_tokens=3, temperature=0, top_p=1, top_k=0, repetition_penalty=1.0)


def test_frozen_layers_keep_their_weights(tune, model_folder):
    before, after = weights(model_folder), weights(tune(freeze_layers=1, template="ziya")["output_dir"])
    same_as_before = {name for name in before if torch.equal(before[name], after[name])}
    assert same_as_before == {name for name in before if "embed_tokens" in name or ".layers.0." in name}
    with pytest.raises(BadInput, match="has 2 layers, leave one"):
        tune(freeze_layers=2, template="ziya", output_dir=str(Path(model_folder).parent / "none"))
    with pytest.raises(BadInput, match="leave the template's new tokens .* all alike"):
        tune(freeze_layers=1, template="chatml", output_dir=str(Path(model_folder).parent / "none"))


def test_every_answer_of_a_long_dialogue_is_trained_once(tune, tmp_path):
    rounds = [{"role": role, "content": f"{role} 第{n}轮说的话"} for n in range(20) for role in ("user", "assistant")]
    (tmp_path / "long.json").write_text(json.dumps([{"messages": rounds}], ensure_ascii=False), "utf-8")
    long = tune(finetune_multi_rounds, data_path=str(tmp_path / "long.json"), max_length=128, output_dir=str(tmp_path / "a"))
    whole = tune(finetune_multi_rounds, data_path=str(tmp_path / "long.json"), max_length=2048, output_dir=str(tmp_path / "b"))
    assert long["supervised_tokens"] == whole["supervised_tokens"] > 0 and long["tokens"] >= whole["tokens"]


def test_a_run_that_gets_no_better_ends_early_with_its_best_weights(tune, tmp_path):
    flags = dict(eval_path=str(ROOT / "sample" / "instruction.json"), eval_steps=1, save_steps=1, learning_rate=5e-2, lr_scheduler_type="constant", warmup_steps=0)
    report = tune(num_train_epochs=40, early_stopping_patience=2, **flags)
    history = json.loads((max((tmp_path / "out").glob("checkpoint-*"), key=lambda p: int(p.name[11:])) / "trainer_state.json").read_text())["log_history"]
    evaluated = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert 3 <= len(evaluated) < 40 and min(evaluated) == pytest.approx(report["eval_loss"]) and min(evaluated) < min(evaluated[-2:])
    with pytest.raises(BadInput, match="--early_stopping_patience=2 needs something to evaluate"):
        tune(early_stopping_patience=2, output_dir=str(tmp_path / "none"))


def test_a_lack_of_memory_says_what_to_change_in_order(tune, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(finetune, "supervised_forward", full)
    with pytest.raises(RunStopped, match="out of memory in step 1 .*--per_device_train_batch_size 2 --gradient_accumulation_steps 2; --gradient_checkpointing True; "
                                         "a smaller --max_length; .*zero3"):
        tune(per_device_train_batch_size=4)


# ---- DeepSpeed ----
@pytest.mark.parametrize("section", ["scheduler", "optimizer"])
def test_a_deepspeed_file_that_would_overrule_the_flags_is_refused(tune, tmp_path, monkeypatch, section):
    monkeypatch.setenv("LOCAL_RANK", "0")
    (tmp_path / "ds.json").write_text(json.dumps({section: {"type": "AdamW"}}))
    with pytest.raises(BadInput, match=f"section '{section}', which would overrule the flags"):
        tune(deepspeed=str(tmp_path / "ds.json"))
    with pytest.raises(BadInput, match="--deepspeed=nowhere.json does not exist"):
        tune(deepspeed="nowhere.json")
    (tmp_path / "ds.json").write_text('{"zero_optimization": {')
    with pytest.raises(BadInput, match="is no whole JSON .*line 1 column"):
        tune(deepspeed=str(tmp_path / "ds.json"))


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda path: path.stem)
def test_our_own_files_leave_to_the_flags_what_they_say(path):
    sections = json.loads(path.read_text())
    assert not {"optimizer", "scheduler"} & sections.keys()
    for name in ("gradient_accumulation_steps", "gradient_clipping", "train_batch_size", "train_micro_batch_size_per_gpu"):
        assert sections[name] == "auto"
    assert sections["bf16"]["enabled"] == sections["fp16"]["enabled"] == "auto"
    zero = sections["zero_optimization"]
    assert path.stem == f"zero{zero['stage']}" + "_offload" * ("offload_optimizer" in zero)
    assert zero.get("stage3_gather_16bit_weights_on_model_save", False) == (zero["stage"] == 3)


def test_seed_and_order_make_two_runs_the_same(tune, tmp_path):
    folders = [tune(output_dir=str(tmp_path / name), num_train_epochs=2)["output_dir"] for name in "ab"]
    assert same(weights(folders[0]), weights(folders[1]))
