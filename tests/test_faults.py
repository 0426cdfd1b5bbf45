"""What an attack broke: each would have cost a user a night, a file, or the truth of a figure."""
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, make_model
from test_records import read_records, write
from test_stages import DATA, QUICK, same, tune, weights  # noqa: F401 (tune is a fixture)

import apply_delta
import finetune
import inspect_labels
import merge_lora
import utils
from quantize_gptq import begin_or_go_on
from utils import TEMPLATES, BadInput, Chat, RunStopped, check_model, check_numbers, convert_flags, fingerprint, make_blocks, pack, resume_point, tokenize_records, write_facts


# ---- what a run goes on from ----
@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.safetensors", "trainer_state.json"])
@pytest.mark.parametrize("damage", ["gone", "empty"])
def test_a_checkpoint_that_lacks_something_is_passed_over_for_the_one_before(tune, capsys, file, damage):  # noqa: F811
    out = Path(tune(max_steps=4, save_steps=2, save_total_limit=9)["output_dir"])
    facts = json.loads((out / "run.json").read_text("utf-8"))
    assert resume_point(str(out), facts) == str(out / "checkpoint-4")
    (out / "checkpoint-4" / file).unlink() if damage == "gone" and file != "adapter_model.safetensors" else (out / "checkpoint-4" / file).write_bytes(b"")
    assert resume_point(str(out), facts) == str(out / "checkpoint-2") and "checkpoint-4 is not whole" in capsys.readouterr().err


@pytest.mark.parametrize("field, value", [("global_step", None), ("global_step", []), ("total_flos", []), ("max_steps", "x"), ("unknown", 1)])
def test_a_state_that_no_trainer_wrote_is_passed_over(tune, field, value):  # noqa: F811
    out = Path(tune(max_steps=4, save_steps=2, save_total_limit=9)["output_dir"])
    file = out / "checkpoint-4" / "trainer_state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    assert resume_point(str(out), json.loads((out / "run.json").read_text("utf-8"))) == str(out / "checkpoint-2")


def test_the_best_weights_are_found_in_a_folder_that_was_renamed(tune, tmp_path):  # noqa: F811
    flags = dict(eval_path=DATA, eval_steps=1, save_steps=1, max_steps=3, early_stopping_patience=5)
    out = Path(tune(**flags)["output_dir"])
    facts = json.loads((out / "run.json").read_text("utf-8"))
    out.rename(tmp_path / "moved")
    checkpoint = Path(resume_point(str(tmp_path / "moved"), facts))
    best = json.loads((checkpoint / "trainer_state.json").read_text("utf-8"))["best_model_checkpoint"]
    assert Path(best).parent == tmp_path / "moved" and Path(best).is_dir()


@pytest.mark.parametrize("flags, named", [({"weight_decay": 0.1}, "training_arguments"), ({"data_seed": 5}, "training_arguments"), ({"shuffle": False}, "shuffle")], ids=str)
def test_what_makes_other_weights_is_no_resume(tune, flags, named):  # noqa: F811
    tune(max_steps=2, save_steps=1)
    with pytest.raises(BadInput, match=f"was begun with {named}"):
        tune(max_steps=2, resume=True, **flags)
    with pytest.raises(BadInput, match="--save_only_model is not taken here"):
        tune(max_steps=2, resume=True, save_only_model=True)


def test_two_runs_do_not_share_a_folder(tmp_path):
    half = tmp_path.with_name(f".{tmp_path.name}-unfinished")  # quantize_gptq.py's, until it is whole
    holder = subprocess.Popen([sys.executable, "-c", f"from utils import *; write_facts({str(tmp_path)!r}, {{}}); lock_folder({str(half)!r}); print('held', flush=True); input()"],
                              cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(BadInput, match="is in use by another run"):
        write_facts(str(tmp_path), {"seed": 2})
    with pytest.raises(BadInput, match="is in use by another run"):
        begin_or_go_on(tmp_path, {}, 0)
    assert json.loads((tmp_path / "run.json").read_text()) == {}
    holder.communicate("\n")
    write_facts(str(tmp_path), {"seed": 2})


# ---- what is not overwritten ----
def test_resume_opens_no_folder_that_is_no_run_of_ours(tmp_path, model_folder):
    shutil.copytree(model_folder, tmp_path / "base")
    before = weights(tmp_path / "base")
    flags = dict(data_path=DATA, **QUICK) | {"max_steps": 1}
    with pytest.raises(BadInput, match="is the base model's own folder"):
        finetune.main(model_name_or_path=str(tmp_path / "base"), output_dir=str(tmp_path / "base"), resume=True, **flags)
    with pytest.raises(BadInput, match="holds no run that could go on"):
        finetune.main(model_name_or_path=str(model_folder), output_dir=str(tmp_path / "base"), resume=True, **flags)
    assert same(weights(tmp_path / "base"), before) and not (tmp_path / "base" / "run.json").exists()


# ---- data ----
@pytest.mark.parametrize("row, reason", [
    ({"instruction": "a\U000f1000b", "output": "c"}, "U\\+F1000"), ({"instruction": "a", "output": "c\U000f1001"}, "U\\+F1001"), ({"instruction": "a\ud83d", "output": "b"}, "surrogate"),
    ({"instruction": "a", "input": 0, "output": "b"}, "is a int"), ({"instruction": "a", "input": False, "output": "b"}, "is a bool"), ({"instruction": "a", "history": 5, "output": "b"}, "history"),
    ({"instruction": "a", "history": 0, "output": "b"}, "history"), ({"system": 0, "instruction": "a", "output": "b"}, "is a int"), ({"conversations": [{"from": ["human"], "value": "x"}]}, "unknown role"),
    ({"conversations": [{"from": {"a": 1}, "value": "x"}]}, "unknown role")], ids=str)
def test_a_record_that_cannot_be_meant_is_refused_or_dropped(tmp_path, row, reason):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"instruction": "good", "output": "good"}, row]), "utf-8")
    with pytest.raises(BadInput, match=f"record 1: .*{reason}"):
        list(read_records(str(path)))
    assert len(list(read_records(str(path), skip_bad_records=True))) == 1


@pytest.mark.parametrize("text", ["[" * 100_000 + "]" * 100_000, '{"instruction": ' + "9" * 5000 + ', "output": "b"}', '{"instruction": "a"'], ids=["nested", "digits", "cut"])
def test_json_that_python_cannot_take_is_one_line(tmp_path, text):
    (tmp_path / "data.jsonl").write_text(text)
    with pytest.raises(BadInput, match="data.jsonl, line 1: not whole JSON"):
        list(read_records(str(tmp_path / "data.jsonl")))


def test_the_question_of_a_dialogue_in_lists_is_that_of_the_list(tmp_path):
    assert list(read_records(write(tmp_path, {"prompt": ["问题"], "input": "x", "output": ["答"]})))[0]["messages"][0]["content"] == "问题"


@pytest.mark.parametrize("damage", ["counts.json empty", "counts.json gone", "arrow cut", "arrow zeros"])
def test_a_damaged_cache_is_made_anew(tmp_path, bytelevel_folder, monkeypatch, damage):
    from transformers import AutoTokenizer

    monkeypatch.setenv("YANGTUO_CACHE", str(tmp_path))
    chat = Chat(AutoTokenizer.from_pretrained(bytelevel_folder), "ziya")
    before = list(tokenize_records(DATA, chat, 128)[0])
    name, what = damage.split()
    file = next((tmp_path / "examples").glob(f"*/*{name}"))
    data = file.read_bytes()
    file.unlink()  # the old one stays mapped where it is
    if what != "gone":
        file.write_bytes({"empty": b"", "cut": data[: len(data) // 2], "zeros": data[:-600] + bytes(600)}[what])
    assert list(tokenize_records(DATA, chat, 128)[0]) == before


# ---- side files and headers ----
@pytest.mark.parametrize("text", ["", "{", "[]", "null", "5"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "generation_config.json", "tokenizer_config.json"])
def test_a_side_file_that_is_no_json_object_is_named(tmp_path, model_folder, name, text):
    shutil.copytree(model_folder, tmp_path / "base")
    (tmp_path / "base" / name).write_text(text)
    with pytest.raises(BadInput, match=f"{name} (is no whole JSON|holds a)"):
        check_model(str(tmp_path / "base"))


def test_an_index_of_safetensors_that_names_a_pickle_is_refused(tmp_path, model_folder):
    shutil.copytree(model_folder, tmp_path / "base")
    (tmp_path / "base" / "w.bin").write_bytes(b"x")
    (tmp_path / "base" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "w.bin"}}')
    with pytest.raises(BadInput, match="an index of safetensors that names a pickle"):
        check_model(str(tmp_path / "base"), allow_pickle=True)


@pytest.mark.parametrize("data", [b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", b"", b"\xff" * 200, (20).to_bytes(8, "little") + b'{"a": {"dtype": 5}}  ',
                                  (20).to_bytes(8, "little") + b"[1, 2, 3]           "], ids=["LFS", "empty", "size", "fields", "list"])
def test_a_damaged_header_is_named(tmp_path, model_folder, data):
    shutil.copytree(model_folder, tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").write_bytes(data)
    with pytest.raises(BadInput, match="has no whole header: .* Git LFS"):
        fingerprint(str(tmp_path / "base"))


def test_a_tokenizer_of_more_tokens_than_the_model_has_rows_is_refused_before_a_step(tune, tmp_path, bytelevel_folder):  # noqa: F811
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bytelevel_folder)
    make_model(tmp_path / "base", tokenizer)
    tokenizer.add_tokens(["新词"])
    tokenizer.save_pretrained(tmp_path / "base")
    with pytest.raises(BadInput, match="its tokenizer has 1,001 tokens, its model 1,000 rows"):
        tune(model_name_or_path=str(tmp_path / "base"))


@pytest.mark.parametrize("key, value", [("dtypes", "I32"), ("dtypes", "X"), ("dtypes", 5), ("target", "0" * 64), ("format", 3), ("base", [])], ids=str)
def test_a_damaged_delta_json_gives_no_model(tmp_path, model_folder, key, value):
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(model_folder, tmp_path / "tuned")
    changed = {name: tensor + torch.randn_like(tensor) for name, tensor in load_file(tmp_path / "tuned" / "model.safetensors").items()}
    save_file(changed, tmp_path / "tuned" / "model.safetensors", {"format": "pt"})
    apply_delta.main(base=str(model_folder), target=str(tmp_path / "tuned"), delta=str(tmp_path / "delta"), make=True)
    file = tmp_path / "delta" / "delta.json"
    facts = json.loads(file.read_text())
    facts[key] = value if key in ("format", "base") else facts[key] | {"model.layers.0.self_attn.q_proj.weight": value}
    file.write_text(json.dumps(facts))
    with pytest.raises(BadInput, match="delta.json is not as apply_delta.py writes it"):
        apply_delta.main(base=str(model_folder), target=str(tmp_path / "made"), delta=str(tmp_path / "delta"))
    assert not (tmp_path / "made").exists()


def test_a_result_goes_into_an_empty_folder_behind_a_link(tune, tmp_path, model_folder):  # noqa: F811
    adapter = tune(max_steps=1)["output_dir"]
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    merge_lora.main(model_name_or_path=str(model_folder), lora_path=adapter, output_dir=str(tmp_path / "link"))
    assert (tmp_path / "real" / "config.json").is_file() and (tmp_path / "link").is_symlink()
    with pytest.raises(BadInput, match="is a mount point"):
        merge_lora.main(model_name_or_path=str(model_folder), lora_path=adapter, output_dir="/proc")


def test_a_side_file_of_an_adapter_that_is_not_what_it_should_be_is_named(tune, tmp_path, model_folder):  # noqa: F811
    whole = Path(tune(max_steps=1)["output_dir"])
    damages = [(name, text) for name in ("adapter_config.json", "yangtuo.json", "tokenizer_config.json") for text in ("", "{", "[]", "null")]
    for number, (name, text) in enumerate([*damages, ("tokenizer.json", "{}"), ("adapter_config.json", '{"peft_type": "LORA", "target_modules": [["q_proj"]]}')]):
        shutil.copytree(whole, adapter := tmp_path / str(number))
        (adapter / name).write_text(text)
        with pytest.raises(BadInput, match=str(adapter)):
            merge_lora.main(model_name_or_path=str(model_folder), lora_path=str(adapter), output_dir=str(tmp_path / "merged"))
        assert not (tmp_path / "merged").exists()


def test_what_a_message_quotes_stays_one_line():
    assert str(BadInput("a turn lacks 'role':\n  ```bash\r\ngit\n")) == "a turn lacks 'role': ```bash git"


# ---- numbers ----
@pytest.mark.parametrize("flag, text", [
    *((flag, text) for flag in ("learning_rate", "warmup_steps", "eval_size", "lora_dropout", "max_grad_norm", "weight_decay") for text in ("nan", "inf", "-1")), ("lora_dropout", "2"), ("seed", "-1"),
    ("seed", "4294967296"), ("adam_beta1", "2"), ("adam_beta1", "1"), ("adam_epsilon", "-1"), ("dataloader_num_workers", "-1"), ("dataloader_num_workers", "4294967296"), ("neftune_noise_alpha", "-1"), ("neftune_noise_alpha", "10000000"), ("num_train_epochs", "0"), ("lora_alpha", "nan"), ("max_length", "0")])
def test_a_number_that_cannot_be_meant_is_refused_before_anything_runs(flag, text):
    import finetune_lora

    with pytest.raises(BadInput, match=f"--{flag}={text}"):
        convert_flags(finetune_lora.main, {"model_name_or_path": "m", "data_path": "d", flag: text})


def test_the_flags_of_a_notebook_are_checked_as_well(tune):  # noqa: F811
    for flags in ({"lora_dropout": float("nan")}, {"learning_rate": -1.0}, {"seed": -1}, {"report_to": "foo.bar"}):
        with pytest.raises(BadInput, match=f"--{next(iter(flags))}="):
            tune(**flags)
    check_numbers({"learning_rate": 0.0, "seed": 0, "template": "alpaca", "eval_size": 100})


def test_what_peft_and_bitsandbytes_cannot_train_is_refused(tune):  # noqa: F811
    with pytest.raises(BadInput, match="--use_dora with --bits 8"):
        tune(bits=8, use_dora=True)


def test_a_global_batch_without_end_is_refused():
    with pytest.raises(BadInput, match="a global batch of"):
        make_blocks([3, 2], range(2), 8, True, True, 10**13)


def test_packing_takes_no_memory_for_a_length_that_nothing_has():
    assert pack([3, 2, 5], 99_999_999_999) == [[2, 0, 1]]


# ---- a model's own template ----
@pytest.mark.parametrize("marks", [True, False])
def test_a_long_dialogue_is_masked_as_short_ones_are_in_linear_time(bytelevel_folder, marks):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bytelevel_folder)
    tokenizer.chat_template = TEMPLATES["chatml"] if marks else re.sub(r"{% (end)?generation %}", "", TEMPLATES["chatml"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    chat, rounds = Chat(tokenizer), lambda n: [{"role": role, "content": f" {role} {i} \n"} for i in range(n) for role in ("user", "assistant")]
    for n in (3, 16, 17, 40):
        pieces = chat.encode(rounds(n))
        assert [tokenizer.decode(ids) for ids, trained in pieces if trained] == [f" assistant {i} \n<|im_end|>" for i in range(n)]
    assert len(chat.encode(rounds(5000))) == 10_001  # took about 20 minutes when each answer was rendered with all before it


@pytest.mark.parametrize("template", ["{{ 1/0 }}", "{{ 'a' + 1 }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"])
def test_a_template_that_fails_is_one_line(tmp_path, bytelevel_folder, template):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bytelevel_folder)
    tokenizer.chat_template = template
    make_model(tmp_path / "base", tokenizer)
    with pytest.raises(BadInput, match="template"):
        inspect_labels.main(model_name_or_path=str(tmp_path / "base"), data_path=DATA)


@pytest.mark.parametrize("template, said", [("{% for i in range(10**12) %}{% endfor %}", "Range too big"), ("{{ 'a' * 10**15 }}", "MemoryError"),
                                            ("{% for i in range(10**5) %}{% for j in range(10**5) %}{% endfor %}{% endfor %}", "no end after 1 s")])
def test_a_template_without_end_is_given_up(bytelevel_folder, monkeypatch, template, said):
    from transformers import AutoTokenizer

    monkeypatch.setattr(utils, "RENDERING", 1)
    tokenizer = AutoTokenizer.from_pretrained(bytelevel_folder)
    tokenizer.chat_template = template
    handler = signal.getsignal(signal.SIGVTALRM)
    with pytest.raises(BadInput if "Range" in said else RunStopped, match=f"template auto: .*{said}") as stopped:
        Chat(tokenizer)
    assert getattr(stopped.value, "status", 2) == 2 and signal.getsignal(signal.SIGVTALRM) == handler and not signal.getitimer(signal.ITIMER_VIRTUAL)[0]


def test_a_damaged_tokenizer_is_named(bytelevel_folder, monkeypatch):
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    def to_str(core):
        state = json.loads(whole(core))
        state["model"]["vocab"].pop("".join(state["model"]["merges"][0]))  # as a flipped byte in its name does
        return json.dumps(state)

    whole = Tokenizer.to_str
    tokenizer = AutoTokenizer.from_pretrained(bytelevel_folder)
    core = type("Core", (), {"to_str": lambda self, found=tokenizer.backend_tokenizer: to_str(found)})()
    monkeypatch.setattr(type(tokenizer), "backend_tokenizer", property(lambda self: core))
    with pytest.raises(BadInput, match="tokenizer.json in .* is damaged"):
        Chat(tokenizer, "alpaca")
