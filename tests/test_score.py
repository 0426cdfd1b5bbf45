"""score_records.py: each score is what it is said to be, and each file that is written can be learned from."""
import itertools
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from test_consistency import flags_of
from test_records import write

import score_records
from score_records import BAD, GOOD, load_reward, read_rewards, reward_ids
from utils import TEMPLATES, BadInput, Chat, numbered_records, tokenize_records

RULES = str(ROOT / "sample" / "rules.py") + ":finished=1,repetition=1,chinese=0.5"
ASKED = [{"role": "user", "content": "羊驼吃什么？"}]
CANDIDATES = [
    {"prompt": "羊驼吃什么？", "answers": ["羊驼吃草。", "grass", "羊驼吃羊驼吃羊驼吃羊驼吃"], "finished": [True, True, True]},
    {"instruction": "翻译成英文。", "input": "山上的雪", "answers": ["山上的雪", "snow", "雪"], "finished": [True, True, False]},
    {"messages": [{"role": "user", "content": "在吗"}, {"role": "assistant", "content": "在"}, {"role": "user", "content": "再见"}], "answers": ["bye", "bye"], "finished": [True, True]},
    {"prompt": "只有一个答完了", "answers": ["好的，马上。", "好"], "finished": [False, True]}]


@pytest.fixture(scope="module")
def reward_folder(model_folder, tmp_path_factory) -> Path:
    """A reward model as train_reward.py writes it, but of random weights, and with the default model's trap: the stop token is the padding."""
    from transformers import AutoTokenizer, LlamaForSequenceClassification

    folder, tokenizer = tmp_path_factory.mktemp("reward"), AutoTokenizer.from_pretrained(model_folder)
    torch.manual_seed(1)
    model = LlamaForSequenceClassification.from_pretrained(model_folder, num_labels=1)
    Chat(tokenizer, "ziya")  # another template than the policy's
    model.config.pad_token_id = tokenizer.pad_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reward_adapter(model_folder, reward_folder, tmp_path_factory) -> Path:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForSequenceClassification

    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(2)
    model = LlamaForSequenceClassification.from_pretrained(reward_folder)
    model.config._name_or_path = str(model_folder)
    model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=4, target_modules="all-linear"))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    model.peft_config["default"].base_model_name_or_path = str(model_folder)
    model.save_pretrained(folder)
    for file in reward_folder.glob("tokenizer*"):
        shutil.copy(file, folder)
    shutil.copy(reward_folder / "chat_template.jinja", folder)
    return folder


def scored(tmp_path, *rows, name: str = "out.jsonl", **flags) -> list[dict]:
    """What score_records.py makes of these rows."""
    score_records.main(data_path=write(tmp_path, *rows), output_file=str(tmp_path / name), **flags)
    return [json.loads(line) for line in (tmp_path / name).read_text("utf-8").splitlines()]


# ---- reward ----
def test_a_reward_is_that_of_plain_transformers_alone_and_in_a_batch(reward_folder):
    from transformers import AutoModelForSequenceClassification

    model, chat = load_reward(str(reward_folder))
    rows = [reward_ids(chat, ASKED, answer, True) for answer in ("好", "羊驼吃草，也吃树叶。" * 9, "grass", "草")]
    together = dict(read_rewards(model, rows, 3))
    plain = AutoModelForSequenceClassification.from_pretrained(reward_folder, pad_token_id=0).eval()
    for number, row in enumerate(rows):
        assert together[number] == pytest.approx(dict(read_rewards(model, [row], 1))[0], abs=1e-5)
        assert together[number] == pytest.approx(plain(torch.tensor([row])).logits.item(), abs=1e-5)


def test_the_stop_token_counts_even_where_it_is_the_padding(reward_folder):
    model, chat = load_reward(str(reward_folder))
    rows = [reward_ids(chat, ASKED, "羊驼吃草。", finished) for finished in (True, False)]
    assert rows[0][:-1] == rows[1] and rows[0][-1] == model.config.pad_token_id
    ended, cut = (dict(read_rewards(model, rows, 2))[number] for number in (0, 1))
    assert abs(ended - cut) > 1e-3


@pytest.mark.parametrize("template", TEMPLATES)
def test_nothing_is_appended_to_a_cut_answer(tokenizer, template):
    chat = Chat(tokenizer, template, last_round_only=True)
    for answer in ("羊驼吃草。", "龘", "a b", "列表：\n- 一"):
        prompt = [i for ids, _ in chat.encode(ASKED, add_generation_prompt=True) for i in ids]
        whole, cut = (reward_ids(chat, ASKED, answer, finished) for finished in (True, False))
        assert whole[-1] in chat.stop_ids and cut == whole[: len(cut)] and cut[: len(prompt)] == prompt
        assert chat.tokenizer.decode(cut[len(prompt):]).strip() == answer and chat.tokenizer.decode(cut).endswith(answer)


def test_a_reward_model_reads_a_dialogue_in_its_own_template(reward_folder, model_folder):
    _, chat = load_reward(str(reward_folder))
    ids = reward_ids(chat, [{"role": "user", "content": "一"}, {"role": "assistant", "content": "二"}, *ASKED], "草", True)
    assert chat.tokenizer.decode(ids) == "<|begin|><human>:一\n<bot>:二<|end|><human>:羊驼吃什么？\n<bot>:草<|end|>"


def test_an_adapter_gives_the_rewards_it_was_saved_with_its_head_included(reward_adapter, model_folder):
    from peft import AutoPeftModelForSequenceClassification

    model, chat = load_reward(str(reward_adapter))
    rows = [reward_ids(chat, ASKED, answer, True) for answer in ("草", "grass grass")]
    plain = AutoPeftModelForSequenceClassification.from_pretrained(reward_adapter, num_labels=1, pad_token_id=0).eval()
    found = dict(read_rewards(model, rows, 2))
    assert [found[0], found[1]] == pytest.approx([plain(torch.tensor([row])).logits.item() for row in rows], abs=1e-5)
    other, _ = load_reward(str(reward_adapter), str(model_folder))
    assert dict(read_rewards(other, rows, 2)) == found


def test_rules_are_added_to_the_reward_by_their_weights(tmp_path, reward_folder):
    flags = dict(by="reward", reward_model=str(reward_folder))
    alone = scored(tmp_path, *CANDIDATES, name="alone.jsonl", **flags)
    both = scored(tmp_path, *CANDIDATES, name="both.jsonl", **flags, rules=RULES)
    only = scored(tmp_path, *CANDIDATES, name="only.jsonl", by="rules", rules=RULES)
    for a, b, c in zip(alone, both, only):
        assert b["scores"] == pytest.approx([x + y for x, y in zip(a["scores"], c["scores"])], abs=1e-5) and b["rules"] == c["rules"] and "rules" not in a
    assert only[0]["rules"]["chinese"] == [1, 0, 1] and only[0]["scores"][0] == 2.5 and only[1]["rules"]["finished"] == [1, 1, 0]


# ---- loss, IFD, judge ----
def losses(folder, rows: list[tuple[list[int], int]]) -> list[float]:
    """Mean loss of the ids from a place on, one row at a time, by plain transformers."""
    from transformers import AutoModelForCausalLM

    model, found = AutoModelForCausalLM.from_pretrained(folder).eval(), []
    for ids, begin in rows:
        logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        found.append(-sum(logits[place - 1, ids[place]].item() for place in range(begin, len(ids))) / (len(ids) - begin))
    return found


def test_loss_and_ifd_are_those_of_the_last_answer_with_its_stop_token(tmp_path, model_folder):
    from transformers import AutoTokenizer

    rows = [{"instruction": "羊驼吃什么？", "output": "草。"}, {"messages": [{"role": role, "content": text} for role, text in
            (("user", "一"), ("assistant", "二"), ("user", "三"), ("assistant", "四四四四"))]}]
    chat, wanted = Chat(AutoTokenizer.from_pretrained(model_folder), "ziya"), []
    for messages, answer in (([{"role": "user", "content": "羊驼吃什么？"}], "草。"), (rows[1]["messages"][:3], "四四四四")):
        prompt = [i for ids, _ in chat.encode(messages, add_generation_prompt=True) for i in ids]
        ids = chat.tokenizer(answer, add_special_tokens=False).input_ids + [chat.tokenizer.eos_token_id]
        wanted += losses(model_folder, [(prompt + ids, len(prompt)), ([chat.tokenizer.bos_token_id] + ids, 1)])
    flags = dict(model_name_or_path=str(model_folder), template="ziya", per_device_eval_batch_size=2)
    assert [row["score"] for row in scored(tmp_path, *rows, name="loss.jsonl", by="loss", **flags)] == pytest.approx(wanted[::2], rel=1e-4)
    assert [row["score"] for row in scored(tmp_path, *rows, name="ifd.jsonl", by="ifd", **flags)] == pytest.approx([wanted[0] / wanted[1], wanted[2] / wanted[3]], rel=1e-4)


def test_a_judge_is_asked_in_both_orders_and_its_flips_are_counted(tmp_path, model_folder, monkeypatch, capsys):
    flags = dict(by="judge", model_name_or_path=str(model_folder), template="ziya")
    rows = scored(tmp_path, *CANDIDATES, {"instruction": "你好", "chosen": "你好！", "rejected": "再见"}, {"instruction": "问", "output": "答"}, **flags)
    for row in rows[:-2]:
        count = len(row["answers"])
        assert sum(row["scores"]) == pytest.approx(count / 2) and all(0 < score < 1 for score in row["scores"])
    assert rows[-2]["score_chosen"] + rows[-2]["score_rejected"] == pytest.approx(1) and 0 < rows[-1]["score"] < 1
    assert rows[2]["scores"] == pytest.approx([0.5, 0.5])  # the same text twice
    capsys.readouterr()

    def always_the_first(asked, *_):
        yield from ((number, 0.9) for number in range(len(asked)))

    monkeypatch.setattr(score_records, "ask_model", always_the_first)
    rows = scored(tmp_path, *CANDIDATES[:2], name="flips.jsonl", **flags)
    said = json.loads(capsys.readouterr().out)
    assert said["order_flips"] == said["order_pairs"] == 6 and all(score == pytest.approx(0.5) for row in rows for score in row["scores"])


def test_the_letters_that_a_judge_chooses_between_are_those_it_would_write(tokenizer):
    for template in TEMPLATES:
        chat = Chat(tokenizer, template)
        lead, a, b = score_records.letter_ids(chat)
        said = [i for ids, _ in chat.encode([*ASKED, {"role": "assistant", "content": "B"}]) for i in ids]
        prompt = [i for ids, _ in chat.encode(ASKED, add_generation_prompt=True) for i in ids]
        assert said[: len(prompt) + len(lead) + 1] == [*prompt, *lead, b] and a != b


# ---- what is written ----
def test_the_best_of_several_answers_is_a_record_to_tune_on(tmp_path):
    rows = scored(tmp_path, *CANDIDATES, by="rules", rules=RULES, keep="best")
    read = [record["messages"] for _, record in numbered_records(str(tmp_path / "out.jsonl"))]
    assert [messages[-1]["content"] for messages in read] == ["羊驼吃草。", "山上的雪", "bye", "好"]  # the better answer of the last was cut
    assert [message["content"] for message in read[2][:3]] == ["在吗", "在", "再见"]
    assert rows[1] == {"instruction": "翻译成英文。", "input": "山上的雪", "output": "山上的雪"}


def test_pairs_are_best_and_worst_of_what_the_model_ended_and_ties_are_none(tmp_path):
    rows = scored(tmp_path, *CANDIDATES, by="rules", rules=RULES, keep="pairs")
    read = [record for _, record in numbered_records(str(tmp_path / "out.jsonl"), preference=True)]
    assert [(record["chosen"], record["rejected"]) for record in read] == [("羊驼吃草。", "羊驼吃羊驼吃羊驼吃羊驼吃"), ("山上的雪", "snow")]
    assert rows[0]["score_chosen"] - rows[0]["score_rejected"] == pytest.approx(2 / 3)
    assert rows[1] == {"instruction": "翻译成英文。", "input": "山上的雪", "chosen": "山上的雪", "rejected": "snow", "score_chosen": 2.5, "score_rejected": 2.0}
    flags = dict(by="rules", rules=RULES, keep="pairs", min_gap=0.7)
    with pytest.raises(BadInput, match="none has two answers .* more than 0.7 apart"):
        scored(tmp_path, *CANDIDATES, name="far.jsonl", **flags)
    assert not (tmp_path / "far.jsonl").exists()


def test_hindsight_trains_the_answers_alone_and_a_prompt_at_use_is_one_of_training(tmp_path, model_folder):
    from transformers import AutoTokenizer

    scored(tmp_path, *CANDIDATES, by="rules", rules=RULES, keep="hindsight")
    chat = Chat(AutoTokenizer.from_pretrained(model_folder), "ziya")
    examples, _ = tokenize_records(str(tmp_path / "out.jsonl"), chat, 512)
    first, second = ([i for i in row["labels"] if i != -100] for row in examples)
    assert chat.tokenizer.decode(first) == "羊驼吃草。<|end|>羊驼吃羊驼吃羊驼吃羊驼吃<|end|>" and chat.tokenizer.decode(second) == "snow<|end|>山上的雪<|end|>"
    use = [{"role": "user", "content": f"羊驼吃什么？\n\n{GOOD}"}]
    prompt = [i for ids, _ in chat.encode(use, add_generation_prompt=True) for i in ids]
    assert examples[0]["input_ids"][: len(prompt)] == prompt and BAD in chat.tokenizer.decode(examples[0]["input_ids"][len(prompt):])


def test_what_people_chose_is_a_verdict_too(tmp_path):
    pair = {"question": "你好", "response_chosen": "你好！", "response_rejected": "再见"}
    assert [message["content"] for message in scored(tmp_path, pair, keep="hindsight")[0]["messages"]] == [f"你好\n\n{GOOD}", "你好！", BAD, "再见"]
    assert scored(tmp_path, pair, name="best.jsonl", keep="best")[0]["messages"][-1]["content"] == "你好！"


def test_prompts_are_what_the_engines_for_several_machines_read(tmp_path):
    import pyarrow.parquet

    row = {"system": "简短。", "prompt": "三加五？", "ground_truth": 8, "output": "旧"}
    assert scored(tmp_path, row, keep="prompts") == [{"messages": [{"role": "system", "content": "简短。"}, {"role": "user", "content": "三加五？"}], "ground_truth": 8}]
    score_records.main(data_path=str(ROOT / "sample" / "prompts.jsonl"), output_file=str(tmp_path / "p.parquet"), keep="prompts")
    first, *_, third = pyarrow.parquet.read_table(tmp_path / "p.parquet").to_pylist()[:3]
    assert first["prompt"] == [{"role": "user", "content": "用一句话介绍羊驼。"}] and first["reward_model"] == {"style": "model", "ground_truth": ""}
    assert third["reward_model"] == {"style": "rule", "ground_truth": "8"} and third["extra_info"] == {"split": "train", "index": 2} and third["data_source"]


def test_buckets_hold_the_records_from_easy_to_hard(tmp_path):
    texts = ["好" * count for count in (7, 1, 5, 3, 9, 2, 8)]
    rows = scored(tmp_path, *({"instruction": "问", "output": text, "id": number} for number, text in enumerate(texts)), by="length", buckets=3)
    assert [row["difficulty"] for row in rows] == [1, 2, 3, 5, 7, 8, 9] and [row["bucket"] for row in rows] == [0, 0, 0, 1, 1, 2, 2]
    assert rows[0] == {"instruction": "问", "output": "好", "id": 1, "difficulty": 1, "difficulty_by": {"formula": "length"}, "bucket": 0}
    for number in range(3):
        assert [json.loads(line) for line in (tmp_path / f"out.bucket{number}.jsonl").read_text().splitlines()] == [row for row in rows if row["bucket"] == number]


@pytest.mark.parametrize("full_at", [0, 1, 2])
def test_a_full_disk_leaves_all_files_or_none(tmp_path, monkeypatch, full_at):
    write_text, written = Path.write_text, []

    def full_disk(path, *args):
        written.append(path)
        write_text(path, "half")
        if len(written) > full_at:
            raise OSError(28, "No space left on device")

    files = {str(tmp_path / name): [{"a": 1}] for name in ("out.bucket0.jsonl", "out.bucket1.jsonl", "out.jsonl")}
    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(OSError, match="No space"):
        score_records.write_rows(files)
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    score_records.write_rows(files)
    assert {str(path) for path in tmp_path.iterdir()} == {*files}


def test_preferences_are_scored_on_both_sides_and_ties_count_half(tmp_path, capsys):
    rows = [{"instruction": "问", "chosen": "好好", "rejected": "a"}, {"question": "问", "response_chosen": "a", "response_rejected": "bc"}, {"instruction": "问", "chosen": "a", "rejected": "b"}]
    found = scored(tmp_path, *rows, by="rules", rules=f"{RULES.split(':')[0]}:chinese=1")
    said = json.loads(capsys.readouterr().out)
    assert [(row["score_chosen"], row["score_rejected"]) for row in found] == [(1, 0), (0, 0), (0, 0)]
    assert said["accuracy"] == pytest.approx((1 + 0.5 + 0.5) / 3) and said["length_baseline"] == pytest.approx((1 + 0 + 0.5) / 3)


def test_the_scores_of_a_file_are_used_again_without_a_model(tmp_path, capsys):
    scored(tmp_path, *CANDIDATES, by="rules", rules=RULES)
    first = json.loads(capsys.readouterr().out)
    assert first["answers"] == 10 and first["rules"]["finished"] == 0.8 and first["finished"] == 0.8 and first["written"] == 4
    score_records.main(data_path=str(tmp_path / "out.jsonl"), output_file=str(tmp_path / "again.jsonl"), keep="pairs")
    direct = scored(tmp_path, *CANDIDATES, name="direct.jsonl", by="rules", rules=RULES, keep="pairs")
    assert [json.loads(line) for line in (tmp_path / "again.jsonl").read_text().splitlines()] == direct


def test_a_run_that_was_killed_asks_only_for_what_it_lacks_and_other_data_is_asked_anew(tmp_path, model_folder, monkeypatch):
    flags, asked = dict(by="loss", model_name_or_path=str(model_folder), template="ziya", per_device_eval_batch_size=1), []
    rows, real = [{"instruction": f"问{number}", "output": "答" * (number + 1)} for number in range(5)], score_records.ask_model

    def killed(what, *rest, after: int = 2):
        asked.append(len(what))
        for count, found in enumerate(real(what, *rest)):
            if count == after:
                raise KeyboardInterrupt
            yield found

    monkeypatch.setattr(score_records, "ask_model", killed)
    with pytest.raises(KeyboardInterrupt):
        scored(tmp_path, *rows, **flags)
    assert not (tmp_path / "out.jsonl").exists()
    monkeypatch.setattr(score_records, "ask_model", lambda *what: killed(*what, after=9))
    file = max((Path(score_records.cache_folder()) / "scores").glob("*"), key=lambda path: path.stat().st_mtime)
    file.write_bytes(file.read_bytes()[:-3])  # the last line was cut off
    broken = scored(tmp_path, *rows, **flags)
    whole = scored(tmp_path, *rows, name="whole.jsonl", **flags, precision="fp32")
    assert broken == whole and scored(tmp_path, *rows, name="third.jsonl", **flags) == whole and asked == [5, 4, 5]
    scored(tmp_path, *rows[::-1], name="other.jsonl", **flags)
    assert asked == [5, 4, 5, 5]


# ---- what is refused ----
@pytest.mark.parametrize("flags, reason", [
    ({}, "--by is missing"), ({"by": "rules"}, "--by=rules needs --rules"), ({"by": "reward"}, "needs --reward_model"), ({"by": "ifd"}, "needs --model_name_or_path"),
    ({"by": "length", "keep": "best"}, "does not say which answer is better"), ({"by": "length", "buckets": -1}, "zero or more"), ({"by": "rules", "rules": RULES, "buckets": 2}, "--buckets goes with"),
    ({"by": "length", "min_gap": math.nan}, "zero or more"), ({"by": "length", "rules": RULES}, "--rules goes with"), ({"by": "length", "keep": "prompts"}, "takes no --by"),
    ({"keep": "pairs"}, "has no score for each of its answers"), ({"by": "length", "buckets": 2}, "record 0 has several answers"),
    ({"by": "reward", "reward_model": "POLICY"}, "is a LlamaForCausalLM, which gives no rewards"), ({"by": "loss", "model_name_or_path": "REWARD"}, "is a reward model, which writes no text"),
    ({"by": "reward", "reward_model": "no/where/at"}, "does not exist"), ({"by": "rules", "rules": RULES, "output_file": "no/where.jsonl"}, "give the path of a new file"),
    ({"by": "loss", "model_name_or_path": "POLICY", "template": "chatml"}, "needs .*, which .* never learned"), ({"by": "loss", "model_name_or_path": "POLICY", "precision": "bf16"}, "needs a GPU")],
    ids=str)
def test_flags_that_make_no_sense_are_refused_in_one_line(tmp_path, model_folder, reward_folder, flags, reason):
    flags = {name: {"POLICY": str(model_folder), "REWARD": str(reward_folder)}.get(value, value) for name, value in flags.items()}
    with pytest.raises(BadInput, match=reason) as refusal:
        score_records.main(**dict(data_path=write(tmp_path, *CANDIDATES), output_file=str(tmp_path / "out.jsonl")) | flags)
    assert "\n" not in str(refusal.value) and [file.name for file in tmp_path.iterdir()] == ["data.jsonl"]


@pytest.mark.parametrize("row, reason", [
    ({"prompt": "问"}, "no answer to score"), ({"prompt": "问", "answers": []}, "holds 0 answers"), ({"prompt": "问", "answers": ["a", 7]}, "is a int, a string"),
    ({"prompt": "问", "answers": ["a", "b"], "finished": [True]}, "needs a true or false for each"), ({"prompt": "问", "answer": "a", "finished": "yes"}, "needs a true or false"),
    ({"instruction": "问", "chosen": "a", "rejected": "a"}, "the same text"), ({"prompt": ""}, "no answer"), (["问"], "a list where an object")], ids=str)
def test_a_bad_record_is_named_and_dropped_on_request(tmp_path, row, reason, capsys):
    with pytest.raises(BadInput, match=f"data.jsonl, record 1: .*{reason}"):
        scored(tmp_path, CANDIDATES[0], row, by="length")
    assert len(scored(tmp_path, CANDIDATES[0], row, by="length", skip_bad_records=True)) == 1
    assert "dropped 1 bad records of 2" in capsys.readouterr().err


def test_what_the_model_cannot_read_is_dropped_and_said(tmp_path, model_folder, capsys):
    rows = scored(tmp_path, {"instruction": "问", "output": "长" * 3000}, {"instruction": "问", "output": "短"}, by="ifd", model_name_or_path=str(model_folder), template="ziya")
    assert [row["output"] for row in rows] == ["短"] and "dropped 1 records that are empty or longer than the model's context, " in capsys.readouterr().err


def test_a_policy_adapter_is_no_reward_model(tmp_path, reward_adapter, model_folder):
    folder = tmp_path / "policy"
    shutil.copytree(reward_adapter, folder)
    about = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(about | {"task_type": "CAUSAL_LM"}))
    with pytest.raises(BadInput, match="is an adapter of the kind CAUSAL_LM, which gives no rewards"):
        scored(tmp_path, *CANDIDATES, by="reward", reward_model=str(folder))
    (reward_adapter / "yangtuo.json").write_text(json.dumps({"base_fingerprint": "of another"}))
    with pytest.raises(BadInput, match="was trained on another base"):
        load_reward(str(reward_adapter))
    (reward_adapter / "yangtuo.json").unlink()


# ---- the whole stage as one command ----
def test_every_step_of_human_feedback_gives_flags_that_its_script_has_and_is_skipped_when_done(calls, tmp_path):
    steps = [words[1:] for words in calls("bash", "scripts/human_feedback.sh", OUT="out", PROMPTS="my prompts.jsonl") if words[1].endswith(".py") and "/" not in words[1]]
    for script, *words in steps:
        assert {word.removeprefix("--") for word in words if word.startswith("--")} <= flags_of(script).keys(), (script, words)
    order = ["finetune_lora.py", "merge_lora.py", "generate.py", "score_records.py", "train_reward.py", "score_records.py", "finetune_lora.py", "train_dpo.py", "train_ppo.py", "generate.py"]
    found = [script for script, _ in itertools.groupby(step[0] for step in steps)]
    assert found[: len(order)] == order and [step[0] for step in steps].count("finetune_lora.py") == 3
    for name in ("sft", "reward", "hfft", "cohft", "dpo", "ppo"):
        (tmp_path / "out" / name).mkdir(parents=True)
        (tmp_path / "out" / name / "adapter_config.json").write_text("{}")
    left = [words[1] for words in calls("bash", "scripts/human_feedback.sh", OUT="out")]
    assert not {"finetune_lora.py", "train_reward.py", "train_dpo.py", "train_ppo.py"} & {*left} and "generate.py" in left
