"""Pretraining: every token of every document is trained once, nothing else is, and what was to stay as it was stays."""
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, make_model
from test_records import write
from test_stages import same, weights

import generate
import pretrain_clm
from utils import IGNORE_INDEX, BadInput, Chat, tokenize_documents

CORPUS = str(ROOT / "sample" / "corpus.txt")
QUICK = dict(max_length=64, gradient_accumulation_steps=2, learning_rate=1e-3, gradient_checkpointing=False)


@pytest.fixture
def pretrain(model_folder, tmp_path, capsys):
    """Run pretrain_clm on the tiny model; returns its report."""
    def run(**flags):
        pretrain_clm.main(**dict(model_name_or_path=str(model_folder), data_path=CORPUS, output_dir=str(tmp_path / "out"), **QUICK) | flags)
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


# ---- documents ----
@pytest.mark.parametrize("max_length", [16, 17, 64, 4096])
def test_every_token_of_a_document_is_trained_once_with_its_end(tokenizer, tmp_path, max_length):
    texts = ["床前明月光，疑是地上霜。" * n + "🦙" for n in (1, 3, 9)] + ["短"]
    chat = Chat(tokenizer, "plain")
    examples = list(tokenize_documents(write(tmp_path, *({"text": text} for text in texts)), chat, max_length)[0])
    begin = tokenizer.bos_token if tokenizer("").input_ids else ""
    for number, text in enumerate(texts):
        whole = tokenizer(begin + text + tokenizer.eos_token, add_special_tokens=False).input_ids
        trained = [label for e in examples if e["record"] == number for label in e["labels"][1:] if label != IGNORE_INDEX]
        assert trained == whole[1:]  # no token is predicted from nothing: the first is not trained
        assert all(len(e["input_ids"]) <= max_length for e in examples)


def test_context_is_read_and_not_trained(model_folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    first = tokenize_documents(str(ROOT / "sample" / "completion.jsonl"), Chat(tokenizer, "plain"), 256)[0][0]
    assert tokenizer.decode([label for label in first["labels"] if label != IGNORE_INDEX]) == "是用三岁以下羊驼的第一茬毛织的，比别的围巾轻三分之一。<|end|>"
    assert tokenizer.decode(first["input_ids"]).startswith("问：雪线围巾是用什么织的？\n答：是用")


def test_txt_files_part_documents_by_line_or_by_blank_line(model_folder, tmp_path):
    from transformers import AutoTokenizer

    chat = Chat(AutoTokenizer.from_pretrained(model_folder), "plain")
    path = write(tmp_path, "一\n二\n\n\n三\n", name="a.txt")
    for separator, expected in (("line", ["一", "二", "三"]), ("blank_line", ["一\n二", "三"])):
        found, _ = tokenize_documents(path, chat, 64, document_separator=separator)
        assert [chat.tokenizer.decode(e["input_ids"], skip_special_tokens=True) for e in found] == expected


def test_a_folder_is_read_as_one_corpus_and_tokenized_file_by_file(model_folder, tmp_path, capfd):
    from transformers import AutoTokenizer

    chat = Chat(AutoTokenizer.from_pretrained(model_folder), "plain")
    write(tmp_path, "一\n二\n", name="b.txt")
    write(tmp_path, {"text": "三"}, {"context": "四", "completion": "五"}, name="c.jsonl")
    write(tmp_path, "text\n零\n", name="a.csv")
    examples, counts = tokenize_documents(str(tmp_path), chat, 64)
    assert [chat.tokenizer.decode(e["input_ids"], skip_special_tokens=True) for e in examples] == ["零", "一", "二", "三", "四五"]
    assert [e["record"] for e in examples] == [0, 1, 2, 3, 4] and counts["tokens"] == sum(len(e["input_ids"]) for e in examples)
    capfd.readouterr()
    write(tmp_path, "六\n", name="b.txt")
    tokenize_documents(str(tmp_path), chat, 64)
    said = capfd.readouterr().err
    assert "tokenizing b.txt" in said and "a.csv" not in said and "c.jsonl" not in said


@pytest.mark.parametrize("data, name, reason", [
    ("好".encode() + b"\n\xff\n", "a.txt", "a.txt, line 2: its byte 0 is not UTF-8"), ("好\n坏\n".encode("gb18030"), "a.txt", "a.txt, line 1: .*looks like GBK"),
    (b'{"txt": "a"}', "a.jsonl", "record 0: no document: it needs 'text'"), (b"", "a.md", "holds no .txt"),
])
def test_a_corpus_that_cannot_be_read_is_named_with_file_and_line(pretrain, tmp_path, data, name, reason):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / name).write_bytes(data)
    with pytest.raises(BadInput, match=reason):
        pretrain(data_path=str(tmp_path / "corpus"))


# ---- training ----
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_training_the_embeddings_leaves_the_layers_alone(pretrain, tmp_path, bytelevel_folder, tied):
    from transformers import AutoTokenizer

    folder = make_model(tmp_path / "base", AutoTokenizer.from_pretrained(bytelevel_folder), tie_word_embeddings=tied)
    before, after = weights(folder), weights(pretrain(model_name_or_path=str(folder), train="embeddings")["output_dir"])
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys() and changed == ({"model.embed_tokens.weight"} if tied else {"model.embed_tokens.weight", "lm_head.weight"})


@pytest.mark.parametrize("tied, bits", [(True, 16), (False, 16), (False, 4)])
def test_a_lora_pretrained_adapter_holds_embedding_and_head_and_loads(pretrain, tmp_path, bytelevel_folder, tied, bits):
    from transformers import AutoTokenizer

    folder = make_model(tmp_path / "base", AutoTokenizer.from_pretrained(bytelevel_folder), tie_word_embeddings=tied)
    out = pretrain(model_name_or_path=str(folder), train="lora", bits=bits)["output_dir"]
    names = weights(out)
    assert any("embed_tokens" in name for name in names) and any("lora_B" in name and tensor.any() for name, tensor in names.items())
    ids = torch.arange(1000)[None]
    base, tuned = (generate.load_model(str(folder), lora, bits=bits)[0] for lora in (None, out))
    assert (base(ids).logits - tuned(ids).logits).abs().max() > 1e-3
    table = base.get_input_embeddings().weight
    assert (tuned.get_input_embeddings()(ids) - table[ids]).abs().max() > 1e-4
    if tied:  # still one table
        assert torch.equal(tuned.get_input_embeddings()(ids)[0], tuned.get_output_embeddings().weight[ids[0]])


def test_a_model_from_scratch_has_the_rows_of_its_tokenizer(pretrain, model_folder, tmp_path):
    config = json.loads((Path(model_folder) / "config.json").read_text()) | {"vocab_size": 7, "hidden_size": 32}
    (tmp_path / "config.json").write_text(json.dumps(config))
    out = weights(pretrain(config_name=str(tmp_path / "config.json"))["output_dir"])
    assert out["model.embed_tokens.weight"].shape == (len(generate.load_model(str(model_folder))[1].tokenizer), 32)


def test_bits_per_character_are_those_of_plain_transformers(pretrain, model_folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    report = pretrain(eval_path=str(ROOT / "sample" / "completion.jsonl"), max_length=256)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(report["output_dir"]), AutoTokenizer.from_pretrained(report["output_dir"])
    nats = characters = 0
    examples, _ = tokenize_documents(str(ROOT / "sample" / "completion.jsonl"), Chat(AutoTokenizer.from_pretrained(model_folder), "plain"), 256)
    for example in examples:
        logits = model(torch.tensor([example["input_ids"]])).logits[0, :-1].log_softmax(-1)
        for row, label in zip(logits.detach(), example["labels"][1:]):
            nats -= float(row[label]) if label != IGNORE_INDEX else 0
        characters += len(tokenizer.decode([label for label in example["labels"][1:] if label != IGNORE_INDEX], skip_special_tokens=True))
    assert math.isclose(report["eval_bits_per_character"], nats / math.log(2) / characters, rel_tol=1e-4)


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_run_goes_on_at_its_very_block(pretrain, tmp_path, shuffle):
    whole = pretrain(num_train_epochs=2, save_steps=3, shuffle=shuffle, output_dir=str(tmp_path / "whole"))["output_dir"]
    begun = Path(pretrain(num_train_epochs=2, save_steps=3, shuffle=shuffle, save_total_limit=9)["output_dir"])
    for checkpoint in begun.glob("checkpoint-*"):
        shutil.rmtree(checkpoint) if checkpoint.name != "checkpoint-3" else None
    (begun / "model.safetensors").unlink()
    assert same(weights(pretrain(num_train_epochs=2, save_steps=3, shuffle=shuffle, resume=True)["output_dir"]), weights(whole))


def test_the_chat_template_of_a_base_survives(pretrain, tmp_path, model_folder):
    from transformers import AutoTokenizer

    shutil.copytree(model_folder, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(tmp_path / "base")
    assert AutoTokenizer.from_pretrained(pretrain(model_name_or_path=str(tmp_path / "base"))["output_dir"]).chat_template == tokenizer.chat_template


def test_a_tokenizer_of_more_tokens_than_rows_is_refused(pretrain, tmp_path, model_folder):
    from transformers import AutoTokenizer

    shutil.copytree(model_folder, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.add_tokens(["新词"])
    tokenizer.save_pretrained(tmp_path / "base")
    with pytest.raises(BadInput, match="its tokenizer has 1,001 tokens, its model 1,000 rows"):
        pretrain(model_name_or_path=str(tmp_path / "base"))
    for flags, reason in (({"bits": 4}, "needs --train lora"), ({"config_name": "x", "train": "lora"}, "begins from scratch")):
        with pytest.raises(BadInput, match=reason):
            pretrain(**flags)
