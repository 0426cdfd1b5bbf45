"""The reward model: what it reads and where, what it learns, what it leaves behind."""
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from test_records import write
from test_stages import same, weights

import train_reward
from train_reward import choose_attention, collate_pairs, reward_forward, sum_pairs
from utils import BadInput, Chat, cut_pair, make_pair_blocks, numbered_records, tokenize_records

DATA = str(ROOT / "sample" / "preference.json")
QUICK = dict(max_length=256, gradient_accumulation_steps=1, num_train_epochs=1, learning_rate=1e-2, gradient_checkpointing=False, lora_r=4)


@pytest.fixture
def tune(model_folder, tmp_path, capsys):
    """Run train_reward on the tiny model; returns its report, the last line of the standard output."""
    def run(**flags):
        flags = dict(model_name_or_path=str(model_folder), data_path=DATA, output_dir=str(tmp_path / "out"), **QUICK) | flags
        capsys.readouterr()
        train_reward.main(**flags)
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


def dialogues() -> list[list[dict]]:
    return [[*record["messages"], {"role": "assistant", "content": record[answer]}] for _, record in numbered_records(DATA, preference=True)
            for answer in ("chosen", "rejected")]


def load_reward(folder: str, base: str | None = None):
    """A reward model as a user of plain transformers and peft loads it: (model, tokenizer)."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not base:
        return AutoModelForSequenceClassification.from_pretrained(folder).eval(), tokenizer
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, pad_token_id=tokenizer.pad_token_id)
    return PeftModel.from_pretrained(model, folder).eval(), tokenizer


@torch.no_grad()
def rewards_of(model, rows: list[list[int]], tokenizer, side: str | None = None) -> torch.Tensor:
    if side is None:
        return torch.cat([model(torch.tensor([ids])).logits[0] for ids in rows])
    batch = tokenizer.pad({"input_ids": rows}, padding_side=side, return_tensors="pt")
    return model(**batch).logits[:, 0]


# ---- what it reads ----
@pytest.mark.parametrize("template", ["alpaca", "ziya", "llama2_chinese", "llama2", "vicuna_chat"])
def test_a_pair_is_one_prompt_of_generation_and_two_answers_up_to_their_stop_tokens(tokenizer, template):
    chat = Chat(tokenizer, template, last_round_only=True)
    for _, record in numbered_records(DATA, preference=True):
        if template == "ziya" and record["messages"][-1]["content"] != record["messages"][-1]["content"].strip():
            continue
        prompt = [i for ids, _ in chat.encode(record["messages"], add_generation_prompt=True) for i in ids]
        for (ids, trained), answer in zip(list(cut_pair(chat, **record, max_length=2000, counts=Counter())), ("chosen", "rejected")):
            assert ids[: len(prompt)] == prompt and trained == [False] * len(prompt) + [True] * (len(ids) - len(prompt))
            assert ids[-1] in chat.stop_ids and record[answer].strip() in tokenizer.decode(ids[len(prompt):])


def test_a_pair_that_is_too_long_loses_its_earliest_rounds_or_is_dropped_and_is_never_cut(tokenizer, tmp_path):
    chat, long = Chat(tokenizer, "ziya", last_round_only=True), "很长的话。" * 60
    rounds = [{"from": who, "value": f"{who}{n}" * 10} for n in range(4) for who in ("human", "gpt")] + [{"from": "human", "value": "最后一问"}]
    rows = [{"system": "系统", "conversations": rounds, "chosen": "好", "rejected": "不好也不坏"}, {"instruction": "问", "chosen": long, "rejected": "短"},
            {"instruction": "问", "chosen": "短", "rejected": long}, {"instruction": "问", "chosen": "甲", "rejected": "乙"}]
    whole = [len(row["input_ids"]) for row in tokenize_records(write(tmp_path, rows[0]), chat, 2000, preference=True)[0]]
    examples, counts = tokenize_records(write(tmp_path, *rows), chat, max(whole) - 1, preference=True)
    assert examples["record"][:] == [0, 0, 3, 3] and counts["pair longer than max_length (dropped)"] == 2 and counts["pair without its earliest rounds"] == 1
    texts = [tokenizer.decode(row["input_ids"]) for row in examples]
    assert texts[0].startswith(texts[1][: texts[1].index("<bot>:不好")]) and "系统" in texts[0] and "human0" not in texts[0] and "human1" in texts[0]
    assert all(row["input_ids"][-1] in chat.stop_ids and sum(i in chat.stop_ids for i in row["input_ids"]) == text.count("<bot>") for row, text in zip(examples, texts))
    with pytest.raises(BadInput, match=r"all its records were dropped, 2 x pair longer than max_length \(dropped\)"):
        tokenize_records(write(tmp_path, *rows[1:3]), chat, 100, preference=True)


def test_both_answers_of_a_pair_are_in_one_block():
    lengths = [3, 4, 5, 5, 2, 2, 6, 1]
    import numpy

    blocks = make_pair_blocks(lengths, numpy.array([0, 1, 4, 5, 6, 7]), 6, True, True, 1)
    assert sorted(sum(blocks, [])) == [0, 1, 4, 5, 6, 7] and all(b % 2 == 0 and block[n + 1] == b + 1 for block in blocks for n, b in list(enumerate(block))[::2])
    assert all(sum(lengths[e] for e in block) <= 12 for block in blocks)


# ---- what it leaves behind ----
@pytest.mark.parametrize("train", ["full", "lora"])
def test_plain_transformers_reads_the_rewards_of_training_alone_padded_and_packed(tune, model_folder, train):
    from transformers import AutoConfig, AutoModelForSequenceClassification

    report = tune(train=train, eval_path=DATA)
    model, tokenizer = load_reward(report["output_dir"], str(model_folder) if train == "lora" else None)
    chat = Chat(tokenizer, last_round_only=True)
    examples, _ = tokenize_records(DATA, chat, 256, preference=True)
    rows = [tokenizer.apply_chat_template(messages)["input_ids"] for messages in dialogues()]
    assert rows == examples["input_ids"][:]  # what stands behind a stop token is not rendered: the last id is the one that is read
    assert tokenizer.pad_token_id not in (*chat.stop_ids, tokenizer.eos_token_id)
    alone = rewards_of(model, rows, tokenizer)
    assert alone.std() > 0.1
    for answers, name in ((alone[::2], "eval_reward_chosen"), (alone[1::2], "eval_reward_rejected")):  # as the run itself found, so the head was saved
        assert abs(float(answers.mean()) - report[name]) < 1e-4
    for side in ("left", "right"):
        assert (rewards_of(model, rows, tokenizer, side) - alone).abs().max() < 1e-5
    unfinished = rewards_of(model, [ids[:-1] for ids in rows], tokenizer, "right")
    assert (unfinished - alone).abs().min() > 1e-4  # a cut answer is not a finished one
    if train == "lora":
        model = model.merge_and_unload()
        assert (rewards_of(model, rows, tokenizer, "left") - alone).abs().max() < 1e-5
    config = AutoConfig.from_pretrained(model_folder, num_labels=1)
    with torch.device("meta"):
        attention = choose_attention(AutoModelForSequenceClassification.from_config(config), "fp32", 256)
    model.config._attn_implementation, seen = attention, []
    model.score.register_forward_hook(lambda module, given, made: seen.append(made[:, 0]))
    with torch.no_grad():
        reward_forward(model, **{name: value for name, value in collate_pairs([list(range(len(rows)))], examples, padded=False).items()})
    assert (seen[0] - alone).abs().max() < 1e-5  # as in training


def test_training_tells_better_from_worse_and_says_how_well_length_alone_does(tune):
    report = tune(num_train_epochs=12, eval_path=DATA, train="full", learning_rate=2e-3, eval_strategy="no", logging_steps=1)
    assert report["eval_accuracy"] == 1 and report["eval_margin"] > 1
    longer = [len(rows[0]) > len(rows[1]) for rows in zip(*[iter(tokenize_records(DATA, Chat(load_reward(report["output_dir"])[1]), 256, preference=True)[0]["input_ids"])] * 2)]
    assert report["length_baseline"] == sum(longer) / len(longer)
    assert Path(report["output_dir"], "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_reward_model_no_better_than_length_says_so(model_folder, tmp_path, capsys):
    data = write(tmp_path, *({"instruction": f"问{n}", "chosen": "长的回答" * 3, "rejected": "短"} for n in range(6)))
    train_reward.main(model_name_or_path=str(model_folder), data_path=data, output_dir=str(tmp_path / "out"), eval_size=2, **QUICK | {"learning_rate": 1e-9})
    shown = capsys.readouterr()
    assert json.loads(shown.out.splitlines()[-1])["length_baseline"] == 1 and "it has learned nothing that would be of use" in shown.err


def test_eight_blocks_at_once_train_as_one_block_eight_times(tune, tmp_path):
    flags = dict(packing=False, num_train_epochs=2, learning_rate=1e-3, train="full")
    reports = [tune(output_dir=str(tmp_path / str(batch)), per_device_train_batch_size=batch, gradient_accumulation_steps=4 // batch, **flags) for batch in (4, 1)]
    assert abs(reports[0]["train_loss"] - reports[1]["train_loss"]) < 1e-5
    assert same(weights(reports[0]["output_dir"]), weights(reports[1]["output_dir"]), within=1e-5)


def test_ties_count_half_and_swapping_a_pair_turns_its_margin():
    model, rewards = torch.nn.Linear(1, 1).eval(), torch.tensor([1.0, 2.0, 3.0])
    sums = sum_pairs(model, rewards, torch.tensor([1.0, 1.0, 5.0]))
    assert (float(sums["accuracy"]), float(sums["margin"]), sums["count"]) == (1.5, -1.0, 3)
    assert float(sum_pairs(model, rewards, rewards)["accuracy"]) == 1.5  # a constant model is right in half of the pairs
