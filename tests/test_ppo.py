"""PPO, RLOO and GRPO do what their formulas say, on answer tokens alone; the figures of the log are of what was sampled; a killed run goes on bit for bit."""
import json
import os
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, make_model
from test_stages import same, weights
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig

import train_ppo
import train_reward
from train_ppo import answer_states, compare_group, gae, policy_loss, token_log_probs, value_loss, whiten
from utils import BadInput, Chat, RunStopped

ALONE = SimpleNamespace(num_processes=1, process_index=0, device=torch.device("cpu"))
RULES = """
def finished(prompt, answer, finished, record):
    return float(finished)

def short(prompt, answer, finished, record):
    return 1 / (1 + len(answer))

def seen(prompt, answer, finished, record):
    assert "<|end|>" not in answer and record["instruction"]
    return 0.0

def broken(prompt, answer, finished, record):
    return float("nan")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model_folder):
    """A tuned model: about every tenth token of its answers is a stop token, prompts hold some too; its folder asks for dropout and for other sampling."""
    folder = tmp_path_factory.mktemp("tuned")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_folder), AutoTokenizer.from_pretrained(model_folder)
    model.resize_token_embeddings(len(tokenizer) + 24, mean_resizing=False)  # rows that no token has
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 0] = 2.0  # something that every hidden state has in common
        model.get_output_embeddings().weight[tokenizer.eos_token_id] = 0.0
        model.get_output_embeddings().weight[tokenizer.eos_token_id, 0] = 2.2
    model.config.attention_dropout = 0.5
    model.generation_config = GenerationConfig(do_sample=True, top_k=3, top_p=0.5, temperature=0.3, repetition_penalty=1.5)
    model.save_pretrained(folder)
    Chat(tokenizer, "alpaca").tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def files(tmp_path):
    """(prompts, rules): one of the prompts is a dialogue, which has a stop token within."""
    (tmp_path / "rules.py").write_text(RULES)
    rows = [{"instruction": "你好"}, {"instruction": "山上的雪什么时候化？"}, {"instruction": "再说一遍", "history": [["什么是羊驼？", "一种驼科动物。"]]}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return str(tmp_path / "prompts.jsonl"), str(tmp_path / "rules.py")


@pytest.fixture
def ppo(folder, files, tmp_path, monkeypatch, capsys):
    """Run train_ppo.py; returns (its report, its log, the answers of each update)."""
    updates, figures = [], train_ppo.figures
    monkeypatch.setattr(train_ppo, "figures", lambda answers, *rest: updates.append(answers) or figures(answers, *rest))

    def run(out="out", **flags):
        updates.clear()
        given = dict(model_name_or_path=str(folder), data_path=files[0], rules=f"{files[1]}:finished=1,short=1,seen=1", output_dir=str(tmp_path / out), max_steps=1,
                     rollout_batch_size=3, num_generations=4, max_new_tokens=12, max_length=256, learning_rate=1e-2, gradient_checkpointing=False)
        train_ppo.main(**given | flags)
        log = [json.loads(line) for line in (tmp_path / out / "log.jsonl").read_text("utf-8").splitlines()]
        return json.loads(capsys.readouterr().out.splitlines()[-1]), log, list(updates)

    return run


# ---- formulas ----
@pytest.mark.parametrize("gamma, gae_lambda", [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (1.0, 0.0)])
def test_gae_is_the_sum_that_it_stands_for(gamma, gae_lambda):
    for length in (1, 2, 9):
        rewards, values = torch.randn(2, length, dtype=torch.float64)
        behind = torch.cat([values[1:], values.new_zeros(1)])
        delta = rewards + gamma * behind - values
        expected = torch.stack([sum((gamma * gae_lambda) ** k * delta[t + k] for k in range(length - t)) for t in range(length)])
        advantages, returns = gae(rewards, values, gamma, gae_lambda)
        assert_close(advantages, expected)
        assert_close(returns, expected + values)
        if gamma == gae_lambda == 1:
            assert_close(advantages, rewards.flip(0).cumsum(0).flip(0) - values)


def test_at_ratio_1_the_gradient_is_that_of_the_policy_gradient():
    new, advantages = torch.randn(20, requires_grad=True), torch.randn(20)
    loss, clipped = policy_loss(new, new.detach(), advantages, 0.2)
    assert not clipped and torch.equal(torch.autograd.grad(loss, new)[0], -advantages)


def test_beyond_the_clip_a_token_counts_only_where_that_is_worse():
    new, advantages = torch.tensor([0.5, 0.5, -0.5, -0.5, 0.1], requires_grad=True), torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    loss, clipped = policy_loss(new, torch.zeros(5), advantages, 0.2)
    assert clipped == 4 and [bool(g) for g in torch.autograd.grad(loss, new)[0]] == [False, True, True, False, True]
    value = torch.tensor([0.5, 0.1], requires_grad=True)
    assert_close(value_loss(value, torch.zeros(2), torch.tensor([1.0, 0.0]), 0.2), torch.tensor((0.8**2 + 0.1**2) / 2))


def test_a_group_is_compared_with_itself_and_equal_rewards_are_worth_nothing():
    def advantages(advantage, *totals):
        group = [{"rewards": torch.tensor([0.0, total]), "ids": [1, 2]} for total in totals]
        compare_group(group, advantage)
        assert all(torch.equal(answer["advantages"][:1], answer["advantages"][1:]) for answer in group)
        return torch.stack([answer["advantages"][0] for answer in group])

    assert_close(advantages("rloo", 1.0, 2.0, 6.0), torch.tensor([-3.0, -1.5, 4.5]))
    assert_close(advantages("grpo", 1.0, 2.0, 6.0), torch.tensor([-2.0, -1.0, 3.0]) / (7**0.5 + 1e-4))
    for advantage in ("rloo", "grpo"):
        assert advantages(advantage, *torch.randn(7).tolist()).sum().abs() < 1e-5
        assert not advantages(advantage, *[0.3] * 7).any()  # whose mean in fp32 is another number


def test_whitening_is_over_the_answer_tokens_of_all_ranks(monkeypatch):
    answers = [{"advantages": torch.randn(length) * 3 + 5} for length in (1, 9, 4, 2)]
    copies, meeting, shared = [dict(answer) for answer in answers], threading.Barrier(2), []

    def add_up(_, numbers):
        shared.append(numbers)
        meeting.wait()
        return [sum(both) for both in zip(*shared)]

    whiten(answers, ALONE)
    everything = torch.cat([answer["advantages"] for answer in answers])
    assert_close((everything.mean(), everything.var(correction=0)), (torch.tensor(0.0), torch.tensor(1.0)), atol=1e-5, rtol=0)
    monkeypatch.setattr(train_ppo, "add_up", add_up)
    ranks = [threading.Thread(target=whiten, args=(part, ALONE)) for part in (copies[:1], copies[1:])]
    [rank.start() for rank in ranks], [rank.join() for rank in ranks]
    assert all(torch.equal(a["advantages"], b["advantages"]) for a, b in zip(answers, copies))


# ---- what is sampled, and what is scored ----
def test_what_is_scored_is_what_was_sampled(ppo, monkeypatch):
    """Property 15, whatever the model's folder says of top_k and the like: each token's log-probability is that under the scores it was drawn from."""
    drawn, plainly = [], train_ppo.sample

    def sample(model, chat, answers, batch_size):
        generate = model.generate

        def with_scores(**given):
            found = generate(**given, return_dict_in_generate=True, output_scores=True)
            for row, scores in zip(found.sequences[:, given["input_ids"].shape[1]:].tolist(), torch.stack(found.scores, 1)):
                drawn.append((row, scores.log_softmax(-1)))
            return found.sequences

        model.generate = with_scores
        plainly(model, chat, answers, batch_size)
        del model.generate

    monkeypatch.setattr(train_ppo, "sample", sample)
    _, _, (answers,) = ppo(temperature=0.7, advantage="grpo", per_device_rollout_batch_size=5)
    for answer, (row, scores) in zip(sorted(answers, key=lambda answer: len(answer["prompt"])), drawn, strict=True):
        assert answer["ids"] == row[: len(answer["ids"])]
        assert_close(answer["old"], scores[range(len(answer["ids"])), answer["ids"]], atol=1e-4, rtol=0)


def test_log_probabilities_and_gradient_are_those_of_a_plain_model_one_answer_at_a_time(folder):
    train_ppo.choose_attention(AutoModelForCausalLM.from_pretrained(folder), "fp32", 128)  # registers the attention by document
    batch = [{"prompt": [5, 6, 7, 1, 8], "ids": [9, 10, 11]}, {"prompt": [3], "ids": [4]}, {"prompt": [20] * 9, "ids": [21, 22]}]
    model = AutoModelForCausalLM.from_pretrained(folder)
    expected = []
    for answer in batch:
        logits = model(torch.tensor([answer["prompt"] + answer["ids"]])).logits[0, len(answer["prompt"]) - 1 : -1, :1000] / 0.7
        expected.append(logits.log_softmax(-1)[range(len(answer["ids"])), answer["ids"]])
    expected, advantages = torch.cat(expected), torch.randn(6)
    (-advantages * expected).sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    for packed in (True, False):
        model.zero_grad()
        model.set_attn_implementation("documents" if packed else "sdpa")
        hidden, targets = answer_states(model, batch, packed)
        assert targets.tolist() == sum((answer["ids"] for answer in batch), [])
        found = token_log_probs(hidden, targets, model.get_output_embeddings(), 0.7, 1000)
        assert_close(found, expected, atol=1e-5, rtol=0)
        policy_loss(found, found.detach(), advantages, 0.2)[0].backward()
        assert_close([p.grad for p in model.parameters()], gradients, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("advantage", ["gae", "grpo"])
def test_the_first_ratios_are_exactly_1_and_the_kl_exactly_0(ppo, monkeypatch, advantage):
    seen, loss = [], policy_loss
    monkeypatch.setattr(train_ppo, "policy_loss", lambda new, old, *rest: seen.append((new.detach(), old)) or loss(new, old, *rest))
    _, log, updates = ppo(advantage=advantage, temperature=0.7, num_mini_batches=2, ppo_epochs=2, max_steps=2, max_length=220)
    assert torch.equal(*seen[0]) and not all(torch.equal(new, old) for new, old in seen)
    assert log[0]["kl"] == 0 and all(not answer["k1"].any() for answer in updates[0])
    assert log[1]["kl"] != 0 and any(answer["k1"].any() for answer in updates[1])  # the start is still there when the policy has moved


def test_rewards_stand_where_they_belong(ppo, folder):
    """Properties 16, 19, 21 and 22."""
    _, log, updates = ppo(max_steps=2, kl_coef=0.3, missing_eos_penalty=2.0, num_generations=16, learning_rate=1e-3)
    stop = AutoTokenizer.from_pretrained(folder).eos_token_id
    assert any(stop in answer["prompt"] for answer in updates[0])  # the dialogue
    for answers, entry in zip(updates, log):
        assert 0 < entry["finished"] < 1 and entry["finished"] == sum(answer["finished"] for answer in answers) / len(answers)
        for i, answer in enumerate(answers):
            assert answer["finished"] == (stop in answer["ids"]) == (answer["ids"][-1] == stop) and answer["ids"].count(stop) <= 1
            assert answer["where"] == answers[i // 16 * 16]["where"]
            assert answer["score"] == pytest.approx(sum(answer["rules"].values()) - 2.0 * (not answer["finished"]))
            assert len(answer["rewards"]) == len(answer["ids"]) == len(answer["advantages"])
            assert_close(answer["rewards"], -0.3 * answer["k1"] + torch.tensor([0.0] * (len(answer["ids"]) - 1) + [answer["score"]]))
        assert len({tuple(answer["ids"]) for answer in answers}) > len(answers) / 2
    assert {tuple(answer["ids"]) for answer in updates[0]} != {tuple(answer["ids"]) for answer in updates[1]}


def test_an_answer_ends_at_its_first_stop_token(folder):
    chat = Chat(AutoTokenizer.from_pretrained(folder))
    ids, stop = chat.tokenizer.encode("好的", add_special_tokens=False), chat.stop_ids[0]
    model = SimpleNamespace(device="cpu", generate=lambda input_ids, **_: torch.cat([input_ids, torch.tensor([[*ids, stop, *ids, stop]] * len(input_ids))], 1))
    train_ppo.sample(model, chat, answers := [{"prompt": [3, stop, 4]}, {"prompt": [3]}], 2)
    assert [(answer["ids"], answer["text"], answer["finished"]) for answer in answers] == [([*ids, stop], "好的", True)] * 2
    model.generate = lambda input_ids, **_: torch.cat([input_ids, torch.tensor([ids[:-1]])], 1)
    train_ppo.sample(model, chat, answers := [{"prompt": [3, stop, 4]}], 2)
    assert not answers[0]["finished"] and "\ufffd" not in answers[0]["text"]


# ---- reward models ----
@pytest.fixture(scope="module")
def reward_folders(tmp_path_factory, folder, sentencepiece_folder):
    """(adapter of the policy's base, as train_reward.py leaves it; whole model with another tokenizer and template)."""
    adapter, whole = str(tmp_path_factory.mktemp("reward") / "adapter"), tmp_path_factory.mktemp("whole")
    train_reward.main(model_name_or_path=str(folder), data_path=str(ROOT / "sample" / "preference.json"), output_dir=adapter, max_length=512, learning_rate=1e-2,
                      max_steps=2, gradient_accumulation_steps=1, report_to="none")
    tokenizer = Chat(AutoTokenizer.from_pretrained(sentencepiece_folder), "ziya").tokenizer
    AutoModelForSequenceClassification.from_pretrained(make_model(whole, tokenizer), num_labels=1).save_pretrained(whole)
    return adapter, str(whole)


@pytest.mark.parametrize("kind", ["adapter", "whole"])
def test_a_reward_model_gives_what_it_gives_by_itself_at_the_last_token_of_its_own_text(ppo, reward_folders, kind):
    from peft import AutoPeftModelForSequenceClassification

    judge = reward_folders[kind == "whole"]
    _, log, (answers,) = ppo(reward_model=judge, advantage="gae" if kind == "adapter" else "rloo", kl_coef=0.0, learning_rate=1e-4)
    load = AutoPeftModelForSequenceClassification if kind == "adapter" else AutoModelForSequenceClassification
    alone, chat = load.from_pretrained(judge, num_labels=1).eval(), Chat(AutoTokenizer.from_pretrained(judge))
    alone.config.pad_token_id = None  # then transformers reads at the last token
    for answer in answers:
        pieces = chat.encode([*answer["messages"], {"role": "assistant", "content": answer["text"]}])[:-1]
        ids = [i for part, _ in pieces for i in part]
        ids = ids if answer["finished"] else ids[:-1]
        with torch.no_grad():
            assert answer["reward_model"] == pytest.approx(alone(input_ids=torch.tensor([ids])).logits.item(), abs=1e-4)
        assert answer["score"] == pytest.approx(sum(answer["rules"].values()) + answer["reward_model"] - (not answer["finished"]))
        if kind == "adapter" and answer["finished"]:  # the critic begins as the reward model; what it expects before the stop token is no reward yet
            prompt = answer["prompt"] + answer["ids"][:-1]
            with torch.no_grad():
                assert float(answer["values"][-1]) == pytest.approx(alone(input_ids=torch.tensor([prompt])).logits.item(), abs=1e-4)
    assert log[0]["reward_model"] == pytest.approx(sum(answer["reward_model"] for answer in answers) / len(answers))


# ---- the run ----
@pytest.mark.parametrize("advantage", ["gae", "rloo", "grpo"])
def test_what_is_rewarded_becomes_likelier(ppo, advantage):
    report, log, _ = ppo(advantage=advantage, max_steps=6, learning_rate=5e-3, num_generations=12)
    assert log[-1]["reward"] > log[0]["reward"] + 0.3 and log[-1]["rules"]["finished"] > log[0]["rules"]["finished"]
    assert report["reward"] == log[-1]["reward"] and report["supervised_tokens"] == round(sum(entry["length"] * 36 for entry in log))


def test_the_gradient_does_not_depend_on_how_answers_share_blocks(ppo):
    runs = [ppo(out=str(batch), per_device_train_batch_size=batch, max_length=160)[1][0] for batch in (1, 8)]
    assert runs[0]["grad_norm"] == pytest.approx(runs[1]["grad_norm"], rel=1e-4) and runs[0]["loss"] == pytest.approx(runs[1]["loss"], abs=1e-5)


@pytest.mark.parametrize("advantage, moment", [("gae", "figures"), ("grpo", "replace_json")])
def test_a_run_that_was_cut_goes_on_bit_for_bit(ppo, tmp_path, monkeypatch, advantage, moment):
    """In the middle of an update, and in the middle of a checkpoint."""
    flags = dict(advantage=advantage, max_steps=5, save_steps=2, learning_rate=1e-3, num_mini_batches=2)
    _, whole, _ = ppo(out="whole", **flags)
    plainly, calls = getattr(train_ppo, moment), []

    def cut(*given):
        calls.append(given)
        if len(calls) == 4:  # the fourth update; or the last file of the second checkpoint
            raise MemoryError
        return plainly(*given)

    monkeypatch.setattr(train_ppo, moment, cut)
    with pytest.raises(MemoryError):
        ppo(out="cut", **flags)
    monkeypatch.setattr(train_ppo, moment, plainly)
    assert [path.name for path in (tmp_path / "cut").glob("checkpoint-*")] == ["checkpoint-2"]
    _, log, _ = ppo(out="cut", resume=True, **flags)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert [entry | {"seconds": 0} for entry in log] == [entry | {"seconds": 0} for entry in whole]
    with pytest.raises(BadInput, match="was begun with kl_coef"):
        ppo(out="cut", resume=True, **flags | {"kl_coef": 0.5})
    for checkpoint in (tmp_path / "cut").glob("checkpoint-*"):
        (checkpoint / "trainer_state.json").write_text((checkpoint / "trainer_state.json").read_text().replace('"kl":', '"lk":'))
    with pytest.raises(BadInput, match="damaged"):
        ppo(out="cut", resume=True, **flags)


def test_the_result_is_an_adapter_that_generate_takes(ppo, folder, tmp_path, capsys):
    import generate

    ppo(advantage="grpo", max_steps=2)
    generate.main(model_name_or_path=str(folder), lora_path=str(tmp_path / "out"), prompt="你好", max_new_tokens=4)
    assert (tmp_path / "out" / "curves.png").is_file() and not list((tmp_path / "out").glob(".*"))


def test_runs_that_make_no_sense_stop_with_a_sentence(ppo):
    with pytest.raises(RunStopped, match="above --max_kl=1e-05"):
        ppo(out="far", max_steps=5, max_kl=1e-5)
    entry = {"step": 2, "kl": -0.2, "kl_error": 0.01, "finished": 1.0, "answers": 64}
    with pytest.raises(RunStopped, match="below 0 by more than chance"):
        train_ppo.stop_if_lost([entry], 5.0, 9)
    train_ppo.stop_if_lost([entry | {"kl_error": 0.1}], 5.0, 9)
    train_ppo.stop_if_lost([entry | {"answers": 2}] * 7, 5.0, 9)  # two answers that happen to be alike say little of the error
    with pytest.raises(RunStopped, match="below 0 by more than chance"):
        train_ppo.stop_if_lost([entry | {"answers": 2}] * 8, 5.0, 9)
    cut = entry | {"kl": 0.1, "finished": 0.0}
    train_ppo.stop_if_lost([entry, cut, cut], 5.0, 9)
    with pytest.raises(RunStopped, match="every answer of three updates was cut: raise --max_new_tokens=9,"):
        train_ppo.stop_if_lost([cut] * 3, 5.0, 9)


@pytest.mark.parametrize("flags, said", [
    (dict(advantage="grpo", num_generations=1), "compares answers to one prompt"), (dict(rules=None), "nothing judges the answers"),
    (dict(temperature=0), "--temperature=0 must be above zero"), (dict(lr_scheduler_type="polynomial"), "is not one of constant, linear, cosine"), (dict(max_new_tokens=256), "leaves no room for a prompt"),
    (dict(deepspeed="ds_configs/zero3.json"), "ZeRO-3 would gather every layer"), (dict(max_length=120, max_new_tokens=60), "the prompt has \\d+ tokens"),
    (dict(template="chatml"), "never learned"), (dict(max_length=4096), "more than the model's context of 2048"), (dict(gamma=1.5), "from 0 to 1"),
    (dict(reward_model="base"), "gives no rewards"), (dict(rules="RULES:broken=1"), "the rule broken gives nan"), (dict(model_name_or_path="adapter"), "is a LoRA adapter: .*merge_lora.py"),
    (dict(data_path="answers"), "record 0: it ends in an answer"), (dict(rollout_batch_size=0), "must be above zero"),
    (dict(lora_target_modules="q_proj,k_prj"), "no linear layer 'k_prj'")], ids=str)
def test_bad_input_is_named(ppo, folder, files, tmp_path, flags, said):
    (tmp_path / "answers.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    paths = {"base": str(folder), "adapter": str(tmp_path / "adapter"), "answers": str(tmp_path / "answers.jsonl"), "RULES:broken=1": f"{files[1]}:broken=1"}
    with pytest.raises((BadInput, RunStopped), match=said):
        ppo(**{name: paths.get(value, value) for name, value in flags.items()})


# ---- several ranks ----
def test_two_ranks_sample_apart_and_stay_one_model_and_go_on_bit_for_bit(folder, files, tmp_path):
    """One launch, since torch takes seconds to import: a whole run, one that is cut, and its resume, on both ranks."""
    (tmp_path / "one.jsonl").write_text(json.dumps({"instruction": "你好"}))  # for both: only chance can tell their answers apart
    (tmp_path / "driver.py").write_text(f"""
import json, os, sys
sys.path.insert(0, {str(ROOT)!r})
import train_ppo

flags = dict(model_name_or_path={str(folder)!r}, data_path={str(tmp_path / 'one.jsonl')!r}, rules={files[1]!r} + ":finished=1,short=1", max_steps=4, save_steps=2, rollout_batch_size=4,
             num_generations=3, max_new_tokens=8, max_length=256, learning_rate=1e-3, gradient_checkpointing=False)
figures, change, seen = train_ppo.figures, train_ppo.change, []

def look(answers, *rest):
    seen[-1]["answers"].append([answer["ids"] for answer in answers])
    if seen[-1]["cut"] == len(seen[-1]["answers"]):
        raise MemoryError
    return figures(answers, *rest)

def step(trained, *rest):
    norm = change(trained, *rest)
    seen[-1]["weights"].append(sum(float(p.detach().double().abs().sum()) for p in trained))
    return norm

train_ppo.figures, train_ppo.change = look, step
for out, cut, resume in (("whole", 0, False), ("cut", 3, False), ("cut", 0, True)):
    seen.append(dict(answers=[], weights=[], cut=cut))
    try:
        train_ppo.main(**flags, output_dir=os.path.join({str(tmp_path)!r}, out), resume=resume)
    except MemoryError:
        pass
json.dump(seen, open(os.path.join({str(tmp_path)!r}, "rank" + os.environ["RANK"]), "w"))
""")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(20000 + os.getpid() % 20000), str(tmp_path / "driver.py")]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"rank{rank}").read_text()) for rank in (0, 1)]
    for (whole, cut, rest), (other, _, _) in (ranks, ranks[::-1]):
        assert whole["answers"] != other["answers"] and whole["weights"] == other["weights"] and len(set(whole["weights"])) == 4
        assert cut["answers"] == whole["answers"][:3] and rest["answers"] == whole["answers"][2:] and rest["weights"] == whole["weights"][2:]
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    finished = [sum(ids[-1] == 1 for rank in ranks for ids in rank[0]["answers"][i]) / 12 for i in range(4)]
    assert [json.loads(line)["finished"] for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()] == pytest.approx(finished)


# ---- beyond one machine ----
@pytest.mark.parametrize("kind, column", [("jsonl", "messages"), ("parquet", "prompt")], ids=["OpenRLHF", "verl"])
def test_prompt_files_give_other_engines_the_ids_that_are_trained_on_here(folder, tmp_path, kind, column):
    """Both loaders read them with datasets and render with the tokenizer's chat template."""
    import datasets

    import score_records

    file, tokenizer = str(tmp_path / f"prompts.{kind}"), AutoTokenizer.from_pretrained(folder)
    score_records.main(keep="prompts", data_path=str(ROOT / "sample" / "prompts.jsonl"), output_file=file)
    rows = datasets.load_dataset(kind.replace("jsonl", "json"), data_files=file, cache_dir=str(tmp_path))["train"]
    theirs = [tokenizer(tokenizer.apply_chat_template(row[column], tokenize=False, add_generation_prompt=True), add_special_tokens=False).input_ids for row in rows]
    assert [prompt["prompt"] for prompt in train_ppo.read_prompts(file, Chat(tokenizer), 2048, False)] == theirs
