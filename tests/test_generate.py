"""generate.py: loading what is there and refusing what is not, answers to one, to many and to a person."""
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, make_model
from test_records import write

import finetune_lora
import generate
import webui
from utils import TEMPLATES, BadInput, Chat

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
def test_a_model_folder_that_lacks_weights_is_refused(tmp_path, model_folder):
    from safetensors.torch import save_file

    folder = tmp_path / "base"
    shutil.copytree(model_folder, folder)
    file, data = folder / "model.safetensors", (model_folder / "model.safetensors").read_bytes()
    for size in (100, len(data) // 2):
        file.write_bytes(data[:size])
        with pytest.raises(BadInput, match="could not be loaded"):
            generate.load_model(str(folder))
    save_file({name: tensor for name, tensor in weights(model_folder).items() if "layers.1" not in name}, file, {"format": "pt"})
    with pytest.raises(BadInput, match="lacks 9 of its weights"):
        generate.load_model(str(folder))
    torch.save(weights(model_folder), folder / "pytorch_model.bin")
    file.unlink()
    asked = [sys.executable, "generate.py", "--model_name_or_path", str(folder), "--prompt", "你好", "--max_new_tokens", "3"]
    done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "pickle" in done.stderr and len(done.stderr.splitlines()) == 1 and not done.stdout
    done = subprocess.run([*asked, "--allow_pickle", "True"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout, done.stderr


@pytest.mark.parametrize("flags, reason", [
    ({"lora_path": "a,b"}, "a does not exist"), ({"input_file": "sample/ziya.jsonl"}, "go together"), ({"top_p": 0.0}, "top_p=0.0 must be from"), ({"max_new_tokens": 0}, "must be from 1 to"),
    ({"repetition_penalty": float("nan")}, "penalty=nan must be from"), ({"temperature": float("nan")}, "must be from 0"), ({"temperature": -0.1}, "must be from 0"),
    ({"seed": 10**23}, "from 0 to 4294967295"), ({"seed": -1}, "from 0 to"), ({"per_device_eval_batch_size": 0}, "must be from 1 to"),
    ({"prompt": "a\udcff"}, "--prompt is not UTF-8"), ({"system": "\ud83d"}, "--system is not UTF-8"),
    ({"bits": 4, "load_in_8bit": True}, "give one of them"), ({"precision": "bf16", "prompt": "?"}, "needs a GPU"), ({"template": "alpacca", "prompt": "?"}, "did you mean alpaca"),
    ({"input_file": "sample/ziya.jsonl", "output_file": "no/where.jsonl"}, "does not exist"), ({"input_file": "sample/ziya.jsonl", "output_file": "tests"}, "is a folder")], ids=str)
def test_bad_input_is_refused_in_one_line(model_folder, monkeypatch, flags, reason):
    monkeypatch.chdir(ROOT)
    with pytest.raises(BadInput, match=reason) as refusal:
        generate.main(model_name_or_path=str(model_folder), **flags)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("bits", [8, 4])
def test_fewer_bits_answer_nearly_alike(model_folder, bits):
    whole, chat = generate.load_model(str(model_folder))
    small, _ = generate.load_model(str(model_folder), bits=bits)
    ids = torch.tensor([generate.prompt_ids(chat, [{"role": "user", "content": "你好"}])])
    a, b = whole(ids).logits.flatten(), small(ids).logits.flatten()
    assert not torch.equal(a, b) and torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.9


def test_an_adapter_of_another_base_is_refused(adapter, tmp_path, bytelevel_folder, model_folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bytelevel_folder)
    with pytest.raises(BadInput, match="another base"):
        generate.load_model(str(make_model(tmp_path / "other", tokenizer, initializer_range=0.3)), adapter)
    Path(adapter, "yangtuo.json").unlink()
    with pytest.raises(BadInput, match="does not fit"):
        generate.load_model(str(make_model(tmp_path / "wider", tokenizer, hidden_size=32)), adapter)
    from safetensors.torch import save_file

    file = Path(adapter, "adapter_model.safetensors")
    save_file({name: tensor for name, tensor in weights(adapter).items() if "layers.1.mlp.up_proj.lora_B" not in name}, file)
    with pytest.raises(BadInput, match="lacks 1 tensors"):
        generate.load_model(str(model_folder), adapter)


@pytest.mark.parametrize("name, content", [("adapter_model.safetensors", b"version https://git-lfs.github.com/spec/v1\n"), ("adapter_model.safetensors", None),
                                           ("adapter_config.json", b"[]"), ("adapter_config.json", b"{"), ("yangtuo.json", b"version"), ("yangtuo.json", b"null")], ids=str)
def test_an_adapter_with_a_broken_file_is_named_before_torch(adapter, model_folder, monkeypatch, name, content):
    (adapter / name).write_bytes((adapter / name).read_bytes()[:-9] if content is None else content)
    monkeypatch.setitem(sys.modules, "torch", None)  # an import of it would raise ImportError
    for module in (generate, webui):
        with pytest.raises(BadInput, match=name) as refusal:
            module.main(model_name_or_path=str(model_folder), lora_path=str(adapter))
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("content", ["{", "[]", "null"])
def test_a_config_that_is_no_object_is_named_before_torch(model_folder, tmp_path, monkeypatch, content):
    shutil.copytree(model_folder, tmp_path / "base")
    (tmp_path / "base" / "config.json").write_text(content)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(BadInput, match="config.json"):
        generate.main(model_name_or_path=str(tmp_path / "base"))


def test_old_pickled_adapters_load_when_allowed_and_are_converted(adapter, model_folder):
    saved = weights(adapter)
    torch.save(saved, adapter / "pytorch_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(BadInput, match="pickle"):
        generate.load_model(str(model_folder), str(adapter))
    generate.load_model(str(model_folder), str(adapter), allow_pickle=True)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in weights(adapter).items()) and len(weights(adapter)) == len(saved)
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "pytorch_model.bin").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(BadInput, match="or cut off"):
        generate.load_model(str(model_folder), str(adapter), allow_pickle=True)


# ---- generation ----
SETTINGS = dict(max_new_tokens=12, temperature=0, top_p=1.0, top_k=0, repetition_penalty=1.0)


@pytest.fixture(scope="module")
def talker(model_folder, tmp_path_factory):
    """A model that has learned its sample by heart: (model, chat, messages of one of its dialogues)."""
    out = tmp_path_factory.mktemp("talker") / "out"
    rows = [{"instruction": "你是谁？", "output": "我是小驼🐪，你好龘！"}, {"instruction": "再见", "output": "再见！"}]
    flags = QUICK | dict(num_train_epochs=60, packing=False, learning_rate=2e-2, lora_dropout=0.0, max_length=128)
    finetune_lora.main(model_name_or_path=str(model_folder), data_path=write(out.parent, *rows), output_dir=str(out), lora_r=16, lora_alpha=32, **flags)
    return *generate.load_model(str(model_folder), str(out)), out


def test_a_streamed_answer_is_whole_characters_without_control_tokens_and_stops(talker):
    model, chat, _ = talker
    pieces = list(generate.stream(model, chat, [{"role": "user", "content": "你是谁？"}], **SETTINGS | {"max_new_tokens": 100}))
    assert "".join(pieces) == "我是小驼🐪，你好龘！" and len(pieces) > 3 and not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("template", TEMPLATES)
def test_what_is_shown_is_what_was_trained(tokenizer, template):
    chat = Chat(tokenizer, template)
    for answer in ("你好🐪龘", "好\n\n", "    缩进\n  a b\n", "a", "\n", " a\n \n"):
        answer = answer.strip() if template == "ziya" else answer
        (ids, trained) = chat.encode([{"role": "user", "content": "问"}, {"role": "assistant", "content": answer}])[1]
        pieces = list(generate.text_of(chat, ids))
        assert trained and "".join(pieces) == answer, (answer, ids)
    halves = chat.tokenizer("龘", add_special_tokens=False).input_ids[:-1]
    assert "\ufffd" not in "".join(generate.text_of(chat, halves))


def test_a_temperature_that_is_nearly_zero_is_zero(talker):
    model, chat, _ = talker
    asked = [[{"role": "user", "content": "随便说"}]]
    assert all(generate.answer_batch(model, chat, asked, **SETTINGS | {"temperature": small}) == generate.answer_batch(model, chat, asked, **SETTINGS) for small in (1e-320, 1e-6))


def test_batched_answers_are_those_of_one_at_a_time(talker):
    model, chat, _ = talker
    asked = [[{"role": "user", "content": text}] for text in ("你是谁？", "再见", "一个很长的问题，前面要补齐很多位置才行")]
    together = generate.answer_batch(model, chat, asked, **SETTINGS)
    assert together == [generate.answer_batch(model, chat, [messages], **SETTINGS)[0] for messages in asked]
    assert together[1] == ("再见！", True)


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
    kept = generate.fit(model.config, chat, messages, 20)
    assert kept[0] == messages[0] and kept[1]["role"] == "user" and kept[1:] == messages[-len(kept) + 1:] and 2 < len(kept) < len(messages)
    assert "no longer read" in capsys.readouterr().err
    with pytest.raises(BadInput, match="more than the model's context"):
        generate.fit(model.config, chat, [{"role": "user", "content": "长" * 500}], 20)


def test_a_file_is_answered_in_order_and_goes_on_after_a_kill(talker, model_folder, tmp_path, capsys):
    _, _, adapter = talker
    rows = [{"prompt": "你是谁？"}, {"instruction": "再见", "output": "旧答案", "id": 7}, {"input": ["再见", "你是谁？"], "output": ["再见！", ""]}, {"prompt": "再见"}, {"prompt": "谁"}]
    source = write(tmp_path, *rows)
    answer = lambda out, **more: generate.main(model_name_or_path=str(model_folder), lora_path=str(adapter), input_file=source, output_file=str(out), per_device_eval_batch_size=2,
                                       max_new_tokens=12, temperature=0.9, **more)
    answer(tmp_path / "whole.jsonl")
    whole = (tmp_path / "whole.jsonl").read_bytes()
    lines = [json.loads(line) for line in whole.splitlines()]
    assert [{key: value for key, value in line.items() if key not in ("answer", "finished")} for line in lines] == rows
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
    write(tmp_path, {"prompt": "你好", "answer": "旧"}, name="data.jsonl")
    answer(tmp_path / "again.jsonl")
    answer(tmp_path / "again.jsonl")


@pytest.mark.parametrize("kind", ["notes", "one array", "input", "link", "hard link", "copy", "notes beside run.json", "no answers", "its run.json"])
def test_what_the_program_did_not_write_is_never_overwritten(model_folder, tmp_path, monkeypatch, kind):
    source, out = Path(write(tmp_path, {"prompt": "你好", "answer": "旧"}, {"prompt": "再见"}, name="in.jsonl")), tmp_path / "out.jsonl"
    answer = lambda: generate.main(model_name_or_path=str(model_folder), input_file=str(source), output_file=str(out), max_new_tokens=3)
    if kind in ("notes beside run.json", "no answers"):
        answer()
    if kind == "one array":
        source.write_text('[{"prompt": "你好"}, {"prompt": "再见"}]', "utf-8")
    if kind in ("one array", "input"):
        out = source
    elif kind == "link":
        out.symlink_to(source)
    elif kind == "hard link":
        out.hardlink_to(source)
    else:
        Path(f"{out}.run.json" if kind == "its run.json" else out).write_text({
            "copy": source.read_text("utf-8"), "its run.json": '{"a": 1}',
            "no answers": '{"prompt": "你好", "answer": null, "finished": true}\n{"prompt": "再见", "answer": "", "finished": true}\n'}.get(kind, "my notes, one line without its end"), "utf-8")
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    monkeypatch.setattr(generate, "load_base", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(BadInput, match="which would be lost|not from a run of generate.py|does not answer record 0"):
        answer()
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_record_longer_than_the_context_is_named_before_the_weights_are_read(model_folder, tmp_path, monkeypatch):
    source = write(tmp_path, {"prompt": "你好"}, {"prompt": "再见"}, {"prompt": "长" * 3000})
    monkeypatch.setattr(generate, "load_base", lambda *_: pytest.fail("the weights were read"))
    for flags, reason in (({"input_file": source, "output_file": str(tmp_path / "out.jsonl")}, "data.jsonl, record 2: the prompt .* context of 2048"),
                          ({"prompt": "长" * 3000}, "context of 2048")):
        with pytest.raises(BadInput, match=reason):
            generate.main(model_name_or_path=str(model_folder), max_new_tokens=3, **flags)
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("row", [{"prompt": "a\ud83d"}, {"prompt": "好", "id": "\udcff"}, {"prompt": "好", "\ud83d": 1}], ids=["text", "column", "name"])
def test_half_a_character_anywhere_in_a_record_is_named_before_anything_runs(tmp_path, model_folder, row):
    source = write(tmp_path, {"prompt": "你好"}, json.dumps(row))
    with pytest.raises(BadInput, match="data.jsonl, record 1: .*surrogate"):
        generate.main(model_name_or_path=str(model_folder), input_file=source, output_file=str(tmp_path / "out.jsonl"))
    assert [file.name for file in tmp_path.iterdir()] == ["data.jsonl"]


def test_what_parquet_holds_and_json_does_not_is_written_as_text(tmp_path, model_folder):
    import pyarrow
    import pyarrow.parquet

    moments = pyarrow.array([1_700_000_000_000_000_001], pyarrow.timestamp("ns"))
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["你好"], "when": moments, "raw": [b"\xff"]}), tmp_path / "in.parquet")
    answer = lambda: generate.main(model_name_or_path=str(model_folder), input_file=str(tmp_path / "in.parquet"), output_file=str(tmp_path / "out.jsonl"), max_new_tokens=3)
    answer()
    answer()  # and it is known again
    line = json.loads((tmp_path / "out.jsonl").read_text("utf-8"))
    assert line["when"].startswith("2023-11-14 22:13:20") and isinstance(line["raw"], str) and isinstance(line["answer"], str)


def test_nothing_that_fails_in_the_terminal_loses_the_conversation(talker, model_folder, tmp_path, monkeypatch, capsys):
    model, chat, adapter = talker
    real, kept = generate.stream, tmp_path / "kept.jsonl"

    def stream(model, chat, messages, **settings):
        if messages[-1]["content"] == "坏":
            raise IndexError("index out of range\nin self")
        return real(model, chat, messages, **settings)

    monkeypatch.setattr(generate, "stream", stream)
    typed = iter(["你是谁？", "坏", f"/save {tmp_path / 'no' / 'x.jsonl'}", f"/save {tmp_path}", "\udcc4\udce3", f"/save {kept}"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed, None) or (_ for _ in ()).throw(EOFError))
    generate.chat_in_terminal(model, chat, [], SETTINGS)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("[") and "saved to" not in line]
    assert [line.split(":")[0] for line in said] == ["[IndexError", "[FileNotFoundError", "[IsADirectoryError", "[what was typed is not UTF-8, or holds half a character"]
    assert [message["content"] for message in json.loads(kept.read_text())["messages"]] == ["你是谁？", "我是小驼🐪，你好龘！"]
    kept.unlink()
    done = subprocess.run([sys.executable, "generate.py", "--model_name_or_path", str(model_folder), "--max_new_tokens", "3"], cwd=ROOT, capture_output=True,
                          input=b"\xc4\xe3\xba\xc3\n/system " + "系统\n".encode() + f"/save {kept}\n".encode())
    assert done.returncode == 0 and b"not UTF-8" in done.stderr and b"Traceback" not in done.stderr, done.stderr.decode()
    assert json.loads(kept.read_text()) == {"messages": [{"role": "system", "content": "系统"}]}


def test_the_terminal_chat_keeps_history_and_obeys_its_commands(talker, tmp_path, monkeypatch, capsys):
    model, chat, _ = talker
    typed = iter(["你是谁？", "再见", "/undo", "/system 新的", f"/save {tmp_path / 'kept.jsonl'}", "/clear", "再见", f"/save {tmp_path / 'kept.jsonl'}"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed, None) or (_ for _ in ()).throw(EOFError))
    generate.chat_in_terminal(model, chat, [], SETTINGS)
    first, second = [[(m["role"], m["content"]) for m in json.loads(line)["messages"]] for line in (tmp_path / "kept.jsonl").read_text().splitlines()]
    assert first[0] == ("system", "新的") and first[1] == ("user", "你是谁？") and first[2][0] == "assistant" and len(first) == 3
    assert second[0] == ("system", "新的") and second[1] == ("user", "再见") and len(second) == 3


def test_several_answers_to_a_prompt_are_sampled_apart_say_which_were_cut_and_go_on_after_a_kill(talker, model_folder, tmp_path):
    _, _, adapter = talker
    source = write(tmp_path, {"prompt": "你是谁？", "answers": ["旧"], "finished": [True]}, {"instruction": "再见", "output": "旧答案"}, {"prompt": "谁"})
    answer = lambda out, **more: generate.main(**dict(model_name_or_path=str(model_folder), lora_path=str(adapter), input_file=source, output_file=str(out),
                                                      per_device_eval_batch_size=2, num_return_sequences=3, max_new_tokens=12, temperature=2.0) | more)
    answer(tmp_path / "whole.jsonl")
    whole = (tmp_path / "whole.jsonl").read_bytes()
    lines = [json.loads(line) for line in whole.splitlines()]
    assert all(len(line["answers"]) == len(line["finished"]) == 3 and "answer" not in line for line in lines) and lines[1]["output"] == "旧答案"
    assert any(len(set(line["answers"])) > 1 for line in lines)
    for cut in (0, 10, len(whole) // 2, len(whole) - 5):
        (tmp_path / "cut.jsonl").write_bytes(whole[:cut])
        answer(tmp_path / "cut.jsonl")
        assert (tmp_path / "cut.jsonl").read_bytes() == whole
    answer(tmp_path / "sure.jsonl", num_return_sequences=2, max_new_tokens=40, temperature=0.01)
    assert [json.loads(line)["answers"] for line in (tmp_path / "sure.jsonl").read_text().splitlines()][:2] == [["我是小驼🐪，你好龘！"] * 2, ["再见！"] * 2]
    for most, ended in ((40, True), (2, False)):
        answer(tmp_path / f"{most}.jsonl", num_return_sequences=1, max_new_tokens=most, temperature=0)
        first = json.loads((tmp_path / f"{most}.jsonl").read_text().splitlines()[0])
        assert first["finished"] is ended and (first["answer"] == "我是小驼🐪，你好龘！") is ended
    for flags, reason in (({"temperature": 0}, "all the same"), ({"num_return_sequences": 2}, "num_return_sequences = 3, now it is 2"), ({"num_return_sequences": 0}, "from 1")):
        with pytest.raises(BadInput, match=reason):
            answer(tmp_path / "whole.jsonl", **flags)
