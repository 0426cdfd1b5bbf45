"""generate.py: loading what is there and refusing what is not, answers to one, to many and to a person."""
import json
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, make_model
from test_records import write

import finetune_lora
import generate
from utils import BadInput

DATA = str(ROOT / "sample" / "conversation.json")
QUICK = dict(template="chatml", max_length=256, gradient_accumulation_steps=1, num_train_epochs=1, learning_rate=1e-2, gradient_checkpointing=False)


@pytest.fixture
def adapter(model_folder, tmp_path) -> Path:
    """An adapter of the tiny model."""
    finetune_lora.main(model_name_or_path=str(model_folder), data_path=DATA, output_dir=str(tmp_path / "out"), **QUICK | dict(template="ziya", max_steps=3))
    return tmp_path / "out"


def weights(folder):
    from safetensors.torch import load_file

    return {name: tensor for file in Path(folder).glob("*.safetensors") for name, tensor in load_file(file).items()}


# ---- loading ----
def test_an_adapter_of_another_base_is_refused(adapter, tmp_path, bytelevel_folder, model_folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bytelevel_folder)
    with pytest.raises(BadInput, match="another base"):
        generate.load(str(make_model(tmp_path / "other", tokenizer, initializer_range=0.3)), adapter)
    Path(adapter, "yangtuo.json").unlink()
    with pytest.raises(BadInput, match="does not fit"):
        generate.load(str(make_model(tmp_path / "wider", tokenizer, hidden_size=32)), adapter)
    from safetensors.torch import save_file

    file = Path(adapter, "adapter_model.safetensors")
    save_file({name: tensor for name, tensor in weights(adapter).items() if "layers.1.mlp.up_proj.lora_B" not in name}, file)
    with pytest.raises(BadInput, match="lacks 1 tensors"):
        generate.load(str(model_folder), adapter)


def test_old_pickled_adapters_load_when_allowed_and_are_converted(adapter, model_folder):
    saved = weights(adapter)
    torch.save(saved, adapter / "pytorch_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(BadInput, match="pickle"):
        generate.load(str(model_folder), str(adapter))
    generate.load(str(model_folder), str(adapter), allow_pickle=True)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in weights(adapter).items()) and len(weights(adapter)) == len(saved)


# ---- generation ----
SETTINGS = dict(max_new_tokens=12, temperature=0, top_p=1.0, top_k=0, repetition_penalty=1.0)


@pytest.fixture(scope="module")
def talker(model_folder, tmp_path_factory):
    """A model that has learned its sample by heart: (model, chat, messages of one of its dialogues)."""
    out = tmp_path_factory.mktemp("talker") / "out"
    rows = [{"instruction": "你是谁？", "output": "我是小驼🐪，你好龘！"}, {"instruction": "再见", "output": "再见！"}]
    flags = QUICK | dict(num_train_epochs=60, packing=False, learning_rate=2e-2, lora_dropout=0.0, max_length=128)
    finetune_lora.main(model_name_or_path=str(model_folder), data_path=write(out.parent, *rows), output_dir=str(out), lora_r=16, lora_alpha=32, **flags)
    return *generate.load(str(model_folder), str(out)), out


def test_a_streamed_answer_is_whole_characters_without_control_tokens_and_stops(talker):
    model, chat, _ = talker
    pieces = list(generate.stream(model, chat, [{"role": "user", "content": "你是谁？"}], **SETTINGS | {"max_new_tokens": 100}))
    assert "".join(pieces) == "我是小驼🐪，你好龘！" and len(pieces) > 3 and not any("\ufffd" in piece for piece in pieces)


def test_batched_answers_are_those_of_one_at_a_time(talker):
    model, chat, _ = talker
    asked = [[{"role": "user", "content": text}] for text in ("你是谁？", "再见", "一个很长的问题，前面要补齐很多位置才行")]
    together = generate.answer_batch(model, chat, asked, **SETTINGS)
    assert together == [generate.answer_batch(model, chat, [messages], **SETTINGS)[0] for messages in asked]
    assert together[1] == "再见！"


def test_closing_a_stream_stops_the_model(talker):
    model, chat, _ = talker
    stream = generate.stream(model, chat, [{"role": "user", "content": "你是谁？"}], **SETTINGS | {"max_new_tokens": 1500, "repetition_penalty": 5.0})
    next(stream)
    started = time.perf_counter()
    stream.close()
    assert time.perf_counter() - started < 5


def test_a_failure_while_generating_reaches_the_reader(talker):
    model, chat, _ = talker
    with pytest.raises(ValueError, match="penalty"):
        list(generate.stream(model, chat, [{"role": "user", "content": "你是谁？"}], **SETTINGS | {"repetition_penalty": -1.0}))


def test_history_is_dropped_by_whole_rounds_and_said(talker, capsys, monkeypatch):
    model, chat, _ = talker
    monkeypatch.setattr(model.config, "max_position_embeddings", 150)
    messages = [{"role": "system", "content": "系统"}] + [{"role": role, "content": f"{role}{n}"} for n in range(9) for role in ("user", "assistant")][:-1]
    kept = generate.fit(model, chat, messages, 20)
    assert kept[0] == messages[0] and kept[1]["role"] == "user" and kept[1:] == messages[-len(kept) + 1:] and 2 < len(kept) < len(messages)
    assert "no longer read" in capsys.readouterr().err
    with pytest.raises(BadInput, match="more than the model's context"):
        generate.fit(model, chat, [{"role": "user", "content": "长" * 500}], 20)


def test_a_file_is_answered_in_order_and_goes_on_after_a_kill(talker, model_folder, tmp_path, capsys):
    _, _, adapter = talker
    rows = [{"prompt": "你是谁？"}, {"instruction": "再见", "output": "旧答案", "id": 7}, {"input": ["再见", "你是谁？"], "output": ["再见！", ""]}, {"prompt": "再见"}, {"prompt": "谁"}]
    source = write(tmp_path, *rows)
    answer = lambda out, **more: generate.main(model_name_or_path=str(model_folder), lora_path=str(adapter), input_file=source, output_file=str(out), per_device_eval_batch_size=2,
                                       max_new_tokens=12, temperature=0.9, **more)
    answer(tmp_path / "whole.jsonl")
    whole = (tmp_path / "whole.jsonl").read_bytes()
    lines = [json.loads(line) for line in whole.splitlines()]
    assert [{key: value for key, value in line.items() if key != "answer"} for line in lines] == rows
    for cut in (0, 10, len(whole) // 2, len(whole) - 5):
        (tmp_path / "cut.jsonl").write_bytes(whole[:cut])
        answer(tmp_path / "cut.jsonl")
        assert (tmp_path / "cut.jsonl").read_bytes() == whole
    answer(tmp_path / "cut.jsonl")
    assert "answered in" in capsys.readouterr().err
    with pytest.raises(BadInput, match="was begun with seed = .*, now it is 7"):
        answer(tmp_path / "whole.jsonl", seed=7)
    write(tmp_path, {"prompt": "别的"}, name="data.jsonl")
    with pytest.raises(BadInput, match="line 1 does not answer record 0"):
        answer(tmp_path / "whole.jsonl")
    (tmp_path / "text.txt").write_text("no JSON\n")
    with pytest.raises(BadInput, match="line 1 does not answer record 0"):
        answer(tmp_path / "text.txt")
    write(tmp_path, {"prompt": "你好", "answer": "旧"}, name="data.jsonl")
    answer(tmp_path / "again.jsonl")
    answer(tmp_path / "again.jsonl")


def test_the_terminal_chat_keeps_history_and_obeys_its_commands(talker, tmp_path, monkeypatch, capsys):
    model, chat, _ = talker
    typed = iter(["你是谁？", "再见", "/undo", "/system 新的", f"/save {tmp_path / 'kept.jsonl'}", "/clear", "再见", f"/save {tmp_path / 'kept.jsonl'}"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed, None) or (_ for _ in ()).throw(EOFError))
    generate.chat_in_terminal(model, chat, [], SETTINGS)
    first, second = [[(m["role"], m["content"]) for m in json.loads(line)["messages"]] for line in (tmp_path / "kept.jsonl").read_text().splitlines()]
    assert first[0] == ("system", "新的") and first[1] == ("user", "你是谁？") and first[2][0] == "assistant" and len(first) == 3
    assert second[0] == ("system", "新的") and second[1] == ("user", "再见") and len(second) == 3
