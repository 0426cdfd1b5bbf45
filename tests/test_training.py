"""The training step: documents do not see each other, the loss is that of the supervised tokens, however they are batched."""
import math
from types import MethodType

import pytest
import torch
from torch.nn import functional as F

import finetune_lora
from finetune_lora import choose_attention, chunks, collate, head_loss, supervised_forward
from utils import IGNORE_INDEX, BadInput, make_blocks

# The blocks "loading", "supervised", "logits" and "training" are the same text in every script that has them (test_consistency.py): here those of finetune_lora.py
CONFIG = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)


def llama(attention="documents", **config):
    from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    AttentionInterface.register("documents", finetune_lora.document_attention)
    model = LlamaForCausalLM._from_config(LlamaConfig(**CONFIG | config), attn_implementation=attention)
    return model


def documents(count=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for n in range(count):
        ids = torch.randint(3, 97, (int(torch.randint(4, 60, (1,), generator=generator)),), generator=generator).tolist()
        prompt = len(ids) // 3
        made.append({"input_ids": ids, "labels": [IGNORE_INDEX] * prompt + ids[prompt:], "record": n})
    return made


def batch_of(examples, padded=False) -> dict:
    return collate([list(range(len(examples)))], examples, padded)


def test_a_packed_document_has_the_logits_it_has_alone():
    model = llama()
    for example, others in ((example, documents()) for example in documents()):
        alone = model(torch.tensor([example["input_ids"]]), document_lengths=[len(example["input_ids"])]).logits[0]
        batch = batch_of(others)
        packed = model(batch["input_ids"], position_ids=batch["position_ids"], document_lengths=batch["document_lengths"]).logits[0]
        start = sum(len(other["input_ids"]) for other in others[: example["record"]])
        assert (packed[start : start + len(alone)] - alone).abs().max() < 1e-5
        reference = llama("eager")(torch.tensor([example["input_ids"]])).logits[0]
        assert (alone - reference).abs().max() < 1e-5


@pytest.mark.parametrize("attention, padded", [("documents", False), ("sdpa", True)])
@pytest.mark.parametrize("tied", [False, True])
def test_the_gradients_of_a_batch_are_those_of_its_documents_alone(attention, padded, tied):
    """Loss and gradients of the mean over the supervised tokens of all documents, against plain transformers, one document a time."""
    examples = documents()
    plain = llama("eager", tie_word_embeddings=tied)
    total = sum(label != IGNORE_INDEX for example in examples for label in example["labels"])
    expected = 0
    for example in examples:
        logits = plain(torch.tensor([example["input_ids"]])).logits[0, :-1]
        loss = F.cross_entropy(logits, torch.tensor(example["labels"][1:]), reduction="sum") / total
        loss.backward()
        expected += loss.item()
    ours = llama(attention, tie_word_embeddings=tied)
    ours.forward = MethodType(supervised_forward, ours)
    loss = ours(**collate([[0, 1, 2], list(range(3, len(examples)))], examples, padded), num_items_in_batch=torch.tensor(total))["loss"]
    loss.backward()
    assert abs(loss.item() - expected) < 1e-5
    for (name, ours_, ), theirs in zip(ours.named_parameters(), plain.parameters()):
        assert (ours_.grad - theirs.grad).abs().max() < 1e-5, name


def test_without_our_attention_documents_would_see_each_other():
    """The test above can fail: one row, no mask, positions from 0, and plain causal attention over all of it."""
    batch = batch_of(documents())
    model = llama("sdpa")
    seen = model(batch["input_ids"], position_ids=batch["position_ids"], attention_mask=torch.ones_like(batch["input_ids"])).logits
    ours = llama()(batch["input_ids"], position_ids=batch["position_ids"], document_lengths=batch["document_lengths"]).logits
    assert (seen - ours).abs().max() > 1e-2


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("at_once", [97 * 3, 97 * 1000])
def test_logits_in_chunks_give_the_loss_and_gradients_of_all_at_once(monkeypatch, at_once, frozen):
    monkeypatch.setattr(finetune_lora, "LOGITS_AT_ONCE", at_once)
    torch.manual_seed(0)
    hidden, targets = torch.randn(20, 32, requires_grad=True), torch.randint(0, 97, (20,))
    head = torch.nn.Linear(32, 97).requires_grad_(not frozen)
    parameters = [] if frozen else list(head.parameters())
    expected = torch.autograd.grad(F.cross_entropy(head(hidden), targets, reduction="sum") / 7, [hidden, *parameters])
    loss = head_loss(hidden, targets, head) / 7
    for ours, theirs in zip(torch.autograd.grad(loss, [hidden, *parameters]), expected):
        assert (ours - theirs).abs().max() < 1e-5
    assert chunks(head, 20, "cpu")[0] == (0, 3 if at_once < 1000 else 20)


def test_the_loss_is_a_number_where_the_hidden_states_sum_to_more_than_fp16_holds():
    model = llama().half()
    model.forward = MethodType(supervised_forward, model)
    model.base_model.norm.weight.data.fill_(300.0)
    with torch.no_grad():
        assert torch.isfinite(model(**batch_of(documents(30)))["loss"])


def test_models_that_change_their_logits_are_refused_and_other_layers_are_not_packed():
    from transformers import Gemma2Config, Gemma2ForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig

    with torch.device("meta"):
        with pytest.raises(BadInput, match="final_logit_softcapping"):
            choose_attention(Gemma2ForCausalLM(Gemma2Config(**CONFIG, head_dim=8)), "fp32", 64)
        gemma = Gemma3ForCausalLM(Gemma3TextConfig(**CONFIG, head_dim=8, sliding_window=32))
    assert choose_attention(gemma, "fp32", 64) is None


def test_no_token_is_predicted_from_the_document_before_it():
    batch = batch_of([{"input_ids": [1, 2], "labels": [1, 2], "record": 0}, {"input_ids": [3, 4], "labels": [3, 4], "record": 1}])
    assert batch["labels"].tolist() == [[IGNORE_INDEX, 2, IGNORE_INDEX, 4]] and batch["position_ids"].tolist() == [[0, 1, 0, 1]]
    assert batch["document_lengths"] == [2, 2] and (batch["tokens"], batch["supervised"]) == (4, 2)


def test_an_empty_block_trains_nothing():
    model = llama()
    model.forward = MethodType(supervised_forward, model)
    loss = model(**collate([[]], [], padded=False), num_items_in_batch=torch.tensor(5))["loss"]
    loss.backward()
    assert loss.item() == 0 and all(not p.grad.any() for p in model.parameters() if p.grad is not None)


def test_each_block_is_trained_once_an_epoch_on_any_number_of_ranks():
    """Empty blocks fill up the last global batch: else accelerate would train some blocks twice to make the ranks even."""
    from accelerate.data_loader import BatchSamplerShard

    blocks = make_blocks([1] * 13, range(13), 1, packing=True, shuffle=False, multiple_of=8)
    assert blocks == [[e] for e in range(13)] + [[]] * 3
    for ranks in (1, 2, 4):
        shards = [BatchSamplerShard(torch.utils.data.BatchSampler(range(len(blocks)), 2, drop_last=False), ranks, rank) for rank in range(ranks)]
        assert sorted(b for shard in shards for batch in shard for b in batch) == list(range(16))


def test_blocks_hold_the_chosen_examples_whole_and_keep_their_order_on_request():
    lengths, chosen = [len(example["input_ids"]) for example in documents(40)], list(range(0, 40, 2))
    packed, kept, alone = (make_blocks(lengths, chosen, 64, packing, shuffle, 1) for packing, shuffle in ((True, True), (True, False), (False, True)))
    assert sorted(sum(packed, [])) == sum(kept, []) == sum(alone, []) == chosen
    assert len(packed) <= len(kept) < len(alone) and all(sum(lengths[e] for e in block) <= 64 for block in packed + kept)
    assert make_blocks([3, 4, 5, 1], range(4), 8, True, False, 1) == [[0, 1], [2, 3]]


def test_models_that_cannot_pack_are_padded():
    from transformers import BloomConfig, BloomForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

    with torch.device("meta"):
        bloom = BloomForCausalLM(BloomConfig(vocab_size=97, hidden_size=32, n_layer=1, n_head=2))
        mistral = MistralForCausalLM(MistralConfig(**CONFIG, sliding_window=128))
        qwen = Qwen2ForCausalLM(Qwen2Config(**CONFIG, sliding_window=128, use_sliding_window=False))
    assert choose_attention(bloom, "fp32", 64) is None
    assert [choose_attention(mistral, "fp32", length) for length in (128, 129)] == ["documents", None]
    assert choose_attention(qwen, "fp32", 4096) == "documents"


def test_evaluation_counts_each_token_once():
    examples = documents(9)
    model = llama()
    model.forward = MethodType(supervised_forward, model)
    with torch.no_grad():
        whole = model(**batch_of(examples))
        parts = [model(**batch_of([example]), num_items_in_batch=1) for example in examples]
    count = batch_of(examples)["supervised"]
    assert math.isclose(float(whole["loss"]), float(sum(part["loss"] for part in parts)) / count, rel_tol=1e-5)
    assert int(whole["token_accuracy"]) == sum(int(part["token_accuracy"]) for part in parts)



def test_dropout_takes_its_share_anew_each_time_and_only_in_training():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(llama(), LoraConfig(r=32, lora_alpha=96, lora_dropout=0.25, target_modules=["up_proj"]))
    finetune_lora.speed_up_lora(model)
    layer, seen = next(module for name, module in model.named_modules() if name.endswith("up_proj")), []
    for matrix in (layer.lora_A["default"].weight, layer.lora_B["default"].weight):
        torch.nn.init.eye_(matrix)  # so that the update shows what was left of the input
    x = torch.randn(40, 50, 32) + 10
    for _ in range(2):
        seen.append((layer(x) - layer.base_layer(x))[..., :32] / 3 * 0.75)
        dropped = seen[-1].abs() < 1e-4
        assert abs(dropped.float().mean() - 0.25) < 0.005 and (seen[-1] - x)[~dropped].abs().max() < 1e-4
        assert (dropped.float().mean((0, 1)) - 0.25).abs().max() < 0.06 and (dropped[..., 1:] & dropped[..., :-1]).float().mean() < 0.07  # no stripes
    assert not torch.equal(*(drawn.abs() < 1e-4 for drawn in seen))
    assert ((layer.eval()(x) - layer.base_layer(x))[..., :32] / 3 - x).abs().max() < 1e-4
