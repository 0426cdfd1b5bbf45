"""Learning from pairs without a reward model: the log-probabilities, the losses, the reference, and what is left behind."""
import json
import math
from pathlib import Path
from types import MethodType

import numpy
import pytest
import torch
from conftest import ROOT
from test_records import write
from test_stages import same, weights
from test_training import llama
from torch.nn import functional as F

import train_dpo
from train_dpo import BETA, answer_log_probs, collate_pairs, log_probs, preference_forward, preference_loss
from utils import IGNORE_INDEX, BadInput, RunStopped

DATA = str(ROOT / "sample" / "preference.json")
QUICK = dict(max_length=256, gradient_accumulation_steps=1, num_train_epochs=1, learning_rate=1e-2, gradient_checkpointing=False, lora_r=4, logging_steps=1)
RECORDED = [("sigmoid", 0.1, 0.6849711736), ("ipo", 0.1, 24.7922420502), ("sigmoid_norm", 5.0, 0.6600094338)]
NEW = {"eval_accuracy", "eval_margin", "eval_logps_chosen", "eval_logps_rejected"}


@pytest.fixture
def tune(model_folder, tmp_path, capsys):
    """Run train_dpo on the tiny model; returns its report, the last line of the standard output."""
    def run(**flags):
        flags = dict(model_name_or_path=str(model_folder), data_path=DATA, output_dir=str(tmp_path / "out"), **QUICK) | flags
        capsys.readouterr()
        train_dpo.main(**flags)
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


def log_of(report) -> list[dict]:
    last = max(Path(report["output_dir"]).glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    return [entry for entry in json.loads((last / "trainer_state.json").read_text())["log_history"] if "loss" in entry]


def answers(count=6, seed=0) -> list[dict]:
    generator, made = torch.Generator().manual_seed(seed), []
    for n in range(count):
        ids = torch.randint(3, 97, (int(torch.randint(6, 40, (1,), generator=generator)),), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [IGNORE_INDEX] * 4 + ids[4:], "record": n // 2})
    return made


def plain_log_prob(model, example) -> float:
    logits = model(torch.tensor([example["input_ids"]])).logits[0, :-1]
    return -F.cross_entropy(logits, torch.tensor(example["labels"][1:]), reduction="sum")


# ---- log-probabilities ----
@pytest.mark.parametrize("attention, padded", [("documents", False), ("sdpa", True)])
def test_the_log_probability_of_an_answer_is_the_sum_over_its_tokens_packed_or_padded(attention, padded):
    examples, plain, ours = answers(), llama("eager"), llama(attention)
    batch = collate_pairs([[0, 1, 2, 3], [4, 5]], examples, padded)
    sums, tokens = answer_log_probs(ours, **batch)
    for example, found, count in zip(examples, sums, tokens):
        assert abs(float(found) - float(plain_log_prob(plain, example))) < 1e-4 and int(count) == len(example["input_ids"]) - 4
    assert len(batch["shift_labels"]) == 3


def test_logits_in_chunks_give_the_gradients_of_all_at_once(monkeypatch):
    monkeypatch.setattr(train_dpo, "LOGITS_AT_ONCE", 97 * 3)
    torch.manual_seed(0)
    hidden, targets, weights_of = torch.randn(20, 32, requires_grad=True), torch.randint(0, 97, (20,)), torch.randn(20)
    head = torch.nn.Linear(32, 97)
    expected = torch.autograd.grad((-F.cross_entropy(head(hidden), targets, reduction="none") * weights_of).sum(), [hidden, *head.parameters()])
    shapes = []
    head.register_forward_hook(lambda module, given, made: shapes.append(len(made)))
    found = torch.autograd.grad((log_probs(hidden, targets, head) * weights_of).sum(), [hidden, *head.parameters()])
    assert max((a - b).abs().max() for a, b in zip(found, expected)) < 1e-5
    assert max(shapes) <= 3  # logits are never whole, not in the backward pass either


# ---- losses ----
def test_losses_are_those_of_the_papers():
    logps, tokens, reference = [-30.0, -42.0, -12.5, -9.0], [20, 24, 5, 9], [-33.0, -41.0, -12.0, -9.5]
    log_sigmoid = lambda x: -math.log(1 + math.exp(-x))
    odds = lambda mean: mean - math.log(1 - math.exp(mean))
    for pair, (w, r) in enumerate(((0, 1), (2, 3))):
        h = logps[w] - reference[w] - logps[r] + reference[r]
        h_of_means = (logps[w] - reference[w]) / tokens[w] - (logps[r] - reference[r]) / tokens[r]
        mean_w, mean_r = logps[w] / tokens[w], logps[r] / tokens[r]
        for loss_type, expected in (("sigmoid", -log_sigmoid(0.1 * h)), ("ipo", (h_of_means - 1 / 0.2) ** 2), ("sigmoid_norm", -log_sigmoid(5 * h_of_means)),
                                    ("simpo", -log_sigmoid(2 * (mean_w - mean_r) - 1.5)), ("orpo", -mean_w - 0.1 * log_sigmoid(odds(mean_w) - odds(mean_r)))):
            losses, _ = preference_loss(torch.tensor(logps), torch.tensor(tokens), torch.tensor(reference), loss_type, BETA[loss_type], simpo_gamma=1.5)
            assert abs(float(losses[pair]) - expected) < 1e-5, loss_type


@pytest.mark.parametrize("loss_type, beta, recorded", RECORDED)
def test_losses_are_those_that_trl_gives_for_the_same_batch(loss_type, beta, recorded):
    """Recorded from DPOTrainer of trl 1.16.0, with these two models as policy and reference; benchmarks/dpo.py --check True compares anew."""
    examples, policy, reference = answers(), llama(), llama(tie_word_embeddings=True)
    batch = collate_pairs([list(range(len(examples)))], examples, padded=False)
    (logps, tokens), (of_reference, _) = (answer_log_probs(model, **batch) for model in (policy, reference))
    assert abs(float(preference_loss(logps, tokens, of_reference, loss_type, beta)[0].mean()) - recorded) < 1e-5


@pytest.mark.parametrize("loss_type", BETA)
def test_equal_answers_pull_nowhere_and_swapped_ones_pull_the_other_way(loss_type):
    def gradient(chosen, rejected):
        logps = torch.tensor([chosen, rejected], requires_grad=True)
        losses, rewards = preference_loss(logps, torch.tensor([10, 10]), torch.tensor([-7.0, -7.0]), loss_type, 1.0)
        return torch.autograd.grad(losses.sum(), logps)[0], float(rewards[0] - rewards[1])

    (same_, _), (_, margin), (_, turned) = gradient(-5.0, -5.0), gradient(-5.0, -8.0), gradient(-8.0, -5.0)
    assert margin == -turned > 0
    if loss_type != "orpo":  # whose first term is the likelihood of the chosen answer
        assert abs(float(same_.sum())) < 1e-6 and same_[0] < 0 < same_[1]


def test_label_smoothing_and_sft_weight_do_what_they_say():
    logps, tokens, reference = torch.tensor([-3.0, -9.0]), torch.tensor([4, 6]), torch.tensor([-5.0, -5.0])
    loss = lambda logps, **more: float(preference_loss(logps, tokens, reference, "sigmoid", 0.5, **more)[0])
    turned = loss(logps.flip(0))
    assert math.isclose(loss(logps, label_smoothing=0.2), 0.8 * loss(logps) + 0.2 * turned, rel_tol=1e-6)
    assert math.isclose(loss(logps, sft_weight=2.0), loss(logps) + 2 * 3 / 4, rel_tol=1e-6)


# ---- the reference ----
@pytest.mark.parametrize("flags", [{}, {"train": "full", "learning_rate": 1e-3}, {"loss_type": "sigmoid_norm"}, {"loss_type": "ipo"}, {"bits": 4}], ids=str)
def test_the_first_loss_is_that_of_a_margin_of_zero(tune, flags):
    report = tune(eval_size=3, num_train_epochs=4, **flags)
    first, *_, last = log_of(report)
    assert first["margin"] == 0 and first["accuracy"] == 0.5 and first["grad_norm"] > 0
    assert math.isclose(first["loss"], 25 if "loss_type" in flags and flags["loss_type"] == "ipo" else math.log(2), rel_tol=1e-4)
    assert last["margin"] > 0 and last["accuracy"] > 0.5 and NEW <= report.keys()


def test_the_cached_reference_is_that_of_the_adapter_switched_off_and_follows_data_and_model(tune, tmp_path, monkeypatch, cache):
    monkeypatch.setenv("YANGTUO_CACHE", str(tmp_path / "cache"))
    made = lambda: sorted((tmp_path / "cache" / "reference").glob("*.npy"))
    flags = dict(learning_rate=1e-12, eval_path=DATA, logging_steps=1, train="full")
    full = tune(**flags)
    assert len(made()) == 1
    online = tune(output_dir=str(tmp_path / "lora"), **flags | {"train": "lora"})
    assert abs(full["eval_logps_chosen"] - online["eval_logps_chosen"]) < 1e-3 and abs(full["eval_margin"] - online["eval_margin"]) < 1e-4
    tune(output_dir=str(tmp_path / "again"), **flags)
    assert len(made()) == 1  # read, not made
    other = write(tmp_path, {"instruction": "问", "chosen": "甲", "rejected": "乙"}, {"instruction": "问", "chosen": "丙", "rejected": "丁"})
    tune(output_dir=str(tmp_path / "other"), **flags | {"data_path": other, "eval_path": None})
    assert len(made()) == 2
    numpy.save(made()[0], numpy.load(made()[0]) - 1), numpy.save(made()[1], numpy.load(made()[1]) - 1)  # a stale cache
    with pytest.raises(RunStopped, match="away from the reference's, so every margin would be wrong"):
        tune(output_dir=str(tmp_path / "stale"), **flags)


# ---- whole runs ----
def test_a_dpo_adapter_changes_the_answers_of_its_base_and_prefers_the_chosen_ones(tune, model_folder):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    report = tune(num_train_epochs=6, eval_path=DATA, eval_strategy="no")
    assert report["eval_accuracy"] > 0.9 and report["eval_margin"] > 0.5
    assert Path(report["output_dir"], "loss.png").read_bytes().startswith(b"\x89PNG")
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    before = base(torch.tensor([[5, 6, 7]])).logits
    tuned = PeftModel.from_pretrained(base, report["output_dir"])
    assert (tuned(torch.tensor([[5, 6, 7]])).logits - before).abs().max() > 0.01


def test_eight_blocks_at_once_train_as_one_block_eight_times(tune, tmp_path):
    flags = dict(packing=False, num_train_epochs=2, learning_rate=1e-3, sft_weight=0.5)
    reports = [tune(output_dir=str(tmp_path / str(batch)), per_device_train_batch_size=batch, gradient_accumulation_steps=4 // batch, **flags) for batch in (4, 1)]
    assert abs(reports[0]["train_loss"] - reports[1]["train_loss"]) < 1e-5
    assert same(weights(reports[0]["output_dir"]), weights(reports[1]["output_dir"]), within=1e-5)


def test_packing_pairs_changes_nothing_but_the_time(tune, tmp_path):
    reports = [tune(output_dir=str(tmp_path / str(packing)), packing=packing, gradient_accumulation_steps=12, learning_rate=1e-3) for packing in (True, False)]
    assert abs(reports[0]["train_loss"] - reports[1]["train_loss"]) < 1e-5
    assert same(weights(reports[0]["output_dir"]), weights(reports[1]["output_dir"]), within=1e-5)


def test_a_run_that_was_killed_goes_on_to_the_same_weights(tune, tmp_path):
    import shutil

    flags = dict(num_train_epochs=2, save_steps=2)
    whole = tune(output_dir=str(tmp_path / "whole"), **flags)
    killed = tmp_path / "killed"
    shutil.copytree(tmp_path / "whole", killed)
    for path in [*killed.glob("adapter*"), *sorted(killed.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))[1:]]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    tune(output_dir=str(killed), resume=True, **flags)
    assert same(weights(whole["output_dir"]), weights(killed))


def test_an_empty_block_trains_nothing():
    model = llama()
    model.may_be_off = None
    model.forward = MethodType(preference_forward, model)
    made = model(**collate_pairs([[]], [], padded=False), loss=lambda logps, tokens, reference: preference_loss(logps, tokens, reference, "simpo", 2.0))
    made["loss"].backward()
    assert float(made["loss"].detach()) == 0 and all(not p.grad.any() for p in model.parameters() if p.grad is not None) and made["count"] == 0


@pytest.mark.parametrize("flags, said", [
    ({"beta": 0.0}, "--beta=0.0 must be above zero"), ({"label_smoothing": 0.5}, "below 0.5"), ({"loss_type": "ipo", "label_smoothing": 0.1}, "is for --loss_type"),
    ({"bits": 4, "train": "full"}, "needs --train lora"), ({"template": "chatml"}, "does not know"), ({"sft_weight": -1.0}, "--sft_weight=-1.0 must be zero or more"),
    ({"max_length": 40}, "pair longer than max_length")], ids=str)
def test_what_cannot_be_is_refused(tune, flags, said):
    with pytest.raises(BadInput, match=said):
        tune(**flags)


def test_a_reward_model_is_no_policy(tune, tmp_path, model_folder):
    import shutil

    shutil.copytree(model_folder, tmp_path / "reward")
    config = json.loads((tmp_path / "reward" / "config.json").read_text()) | {"architectures": ["LlamaForSequenceClassification"]}
    (tmp_path / "reward" / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match="is a reward model, which writes no answers"):
        tune(model_name_or_path=str(tmp_path / "reward"))
