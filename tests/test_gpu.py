"""What must be exact on a GPU: documents keep apart, labels, one loss for 8x1 and 1x8, a resumed run, an adapter read back.

    TEST_DEVICE=cuda pytest tests/test_gpu.py      # benchmarks/gpu.sh does it; TEST_DEVICE=cpu rehearses on the CPU, all else hides the GPUs
"""
import json
import os
import shutil
from types import MethodType

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from test_consistency import flags_of
from transformers.utils import is_flash_attn_2_available

import finetune_lora
import generate
from benchmarks.gpu import ROWS, TRAIN
from finetune_lora import collate, supervised_forward
from utils import IGNORE_INDEX

DEVICE = os.environ.get("TEST_DEVICE", "")
on_the_device = pytest.mark.skipif(DEVICE != "cpu" and not (DEVICE == "cuda" and torch.cuda.is_available()), reason="TEST_DEVICE=cuda on a machine with CUDA")
HALF = torch.bfloat16 if DEVICE != "cuda" or torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 8 else torch.float16
FLASH = [("flash_attention_2", HALF)] * bool(DEVICE == "cuda" and is_flash_attn_2_available() and torch.cuda.get_device_capability()[0] >= 8)
KERNELS = pytest.mark.parametrize("attention, dtype", [("documents", torch.float32), ("documents", HALF), *FLASH])
RUN = dict(data_path=str(ROOT / "sample" / "instruction.json"), template="alpaca", max_length=256, lora_dropout=0.0, learning_rate=1e-2)


@pytest.mark.parametrize("name", ROWS)
def test_a_row_of_the_benchmark_has_flags_of_its_script(name):
    row = ROWS[name]
    if not (ROOT / row.script).is_file():
        pytest.skip(f"{row.script} is not there yet")
    known = flags_of(row.script)
    assert row.flags.keys() <= known.keys()
    assert not row.factor or TRAIN.keys() - known.keys() <= {"logging_steps"} and "training_arguments" in known


def llama(attention: str, dtype):
    from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

    AttentionInterface.register("documents", finetune_lora.document_attention)
    torch.manual_seed(1)
    config = LlamaConfig(vocab_size=97, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.1)
    return LlamaForCausalLM._from_config(config, attn_implementation=attention).to(DEVICE, dtype)


def documents() -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 97, (length,), generator=generator).tolist() for length in (40, 7, 129, 64, 1, 90)]
    return [{"input_ids": ids, "labels": [IGNORE_INDEX] * (len(ids) // 3) + ids[len(ids) // 3:], "record": n} for n, ids in enumerate(rows)]


def packed(examples: list[dict]) -> dict:
    batch = collate([list(range(len(examples)))], examples, padded=False)
    return {key: value.to(DEVICE) if torch.is_tensor(value) else value for key, value in batch.items()}


def logits_of(model, batch: dict):
    lengths = {"document_lengths": batch["document_lengths"]} if model.config._attn_implementation == "documents" else {}
    return model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False, **lengths).logits[0].detach()


@on_the_device
@KERNELS
def test_a_document_does_not_see_its_neighbours(attention, dtype):
    """Bit for bit: other tokens in the first and the last document change no logit of those between."""
    model, examples = llama(attention, dtype), documents()
    before = logits_of(model, packed(examples))
    for changed in (0, len(examples) - 1):
        examples[changed]["input_ids"] = [token + 1 if token < 96 else 3 for token in examples[changed]["input_ids"]]
    after = logits_of(model, packed(examples))
    first, last = len(examples[0]["input_ids"]), len(examples[-1]["input_ids"])
    assert torch.equal(before[first:-last], after[first:-last]) and not torch.equal(before[:first], after[:first])


@on_the_device
@KERNELS
def test_a_packed_document_has_the_logits_it_has_alone(attention, dtype):
    model, begin = llama(attention, dtype), 0
    examples = documents()
    row = logits_of(model, packed(examples))
    for example in examples:
        alone = logits_of(model, packed([example]))
        assert (row[begin : begin + len(alone)] - alone).abs().max() < (1e-4 if dtype == torch.float32 else 0.03) * alone.abs().max()
        begin += len(alone)


@on_the_device
@KERNELS
def test_loss_and_gradients_are_those_of_plain_transformers_on_the_supervised_tokens(attention, dtype):
    model, plain, examples = llama(attention, dtype), llama("eager", torch.float32), documents()
    total, expected = sum(label != IGNORE_INDEX for example in examples for label in example["labels"][1:]), 0
    for example in examples[:4] + examples[5:]:  # one token alone has nothing to predict
        logits = plain(torch.tensor([example["input_ids"]], device=DEVICE)).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(example["labels"][1:], device=DEVICE), reduction="sum") / total
        loss.backward()
        expected += loss.item()
    model.forward = MethodType(supervised_forward, model)
    batch = packed(examples)
    assert batch["supervised"] == total
    loss = model(**{key: batch[key] for key in ("input_ids", "labels", "position_ids", "document_lengths")}, num_items_in_batch=torch.tensor(total, device=DEVICE))["loss"]
    loss.backward()
    bound = 1e-4 if dtype == torch.float32 else 0.05
    assert abs(loss.item() - expected) < bound * expected
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters()):
        assert (ours.grad.float() - theirs.grad).norm() < bound * theirs.grad.norm(), name


def run(model_folder, folder, capfd, **flags) -> tuple[dict, dict]:
    """(last line, adapter) of a run."""
    capfd.readouterr()
    finetune_lora.main(model_name_or_path=str(model_folder), output_dir=str(folder), **RUN | flags)
    return json.loads(capfd.readouterr().out.splitlines()[-1]), load_file(folder / "adapter_model.safetensors")


@on_the_device
@pytest.mark.parametrize("precision, bound", [("fp32", 1e-4), ("auto", 0.05)])
def test_eight_times_one_is_one_times_eight(model_folder, tmp_path, capfd, precision, bound):
    flags = dict(precision=precision, max_steps=3, lr_scheduler_type="constant")
    (one, a), (other, b) = (run(model_folder, tmp_path / str(batch), capfd, per_device_train_batch_size=batch, gradient_accumulation_steps=8 // batch, **flags)
                            for batch in (8, 1))
    assert abs(one["train_loss"] - other["train_loss"]) < bound and one["supervised_tokens"] == other["supervised_tokens"]
    assert all((a[name] - b[name]).norm() < 10 * bound * a[name].norm() for name in a if "lora_A" in name)


@on_the_device
def test_a_resumed_run_ends_in_the_weights_of_an_unbroken_one(model_folder, tmp_path, capfd):
    flags = dict(precision="fp32", max_steps=4, save_steps=2, gradient_accumulation_steps=1, lora_dropout=0.05)
    _, whole = run(model_folder, tmp_path / "whole", capfd, **flags)
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
    shutil.copy(tmp_path / "whole" / "run.json", tmp_path / "again")
    _, again = run(model_folder, tmp_path / "again", capfd, resume=True, **flags)
    assert all((whole[name] - again[name]).abs().max() < 1e-6 for name in whole)


@on_the_device
def test_an_adapter_that_is_read_back_changes_the_answer_as_its_matrices_say(model_folder, tmp_path, capfd):
    _, adapter = run(model_folder, tmp_path / "adapter", capfd, precision="fp32", max_steps=4, gradient_accumulation_steps=1)
    tuned, chat = generate.load_model(str(model_folder), str(tmp_path / "adapter"), precision="fp32")
    base = generate.load_base(str(model_folder), len(chat.tokenizer), 16, "fp32", False, False)
    ids = torch.tensor([generate.prompt_ids(chat, [{"role": "user", "content": "你好"}])], device=tuned.device)
    with torch.no_grad():
        before = base(ids).logits
        for name, a in adapter.items():
            if "lora_A" in name:
                weight = base.get_parameter(name.removeprefix("base_model.model.").replace("lora_A.weight", "weight"))
                weight += 2 * (adapter[name.replace("lora_A", "lora_B")] @ a).to(weight)  # alpha 16, r 8
        after = base(ids).logits
        assert (tuned(ids).logits - after).abs().max() < 1e-3 < (before - after).abs().max()
