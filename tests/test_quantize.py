"""quantize_gptq.py and its file format: what is promised of the numbers, of the files, of a run that is stopped."""
import json
import shutil
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ROOT, make_model
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, BloomConfig, BloomForCausalLM, LlamaForCausalLM

import generate
import quantize_gptq as gptq
from utils import BadInput, cut_dialogue, numbered_records

SIZES = dict(hidden_size=64, intermediate_size=128, num_attention_heads=2, num_key_value_heads=1, head_dim=32)
CONVERSATIONS = str(ROOT / "sample" / "conversation.json")
run = partial(gptq.main, calibration_path=str(ROOT / "sample" / "corpus.txt"), max_length=64, calibration_size=8, group_size=32)


@pytest.fixture
def tokenizer(bytelevel_folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(bytelevel_folder)


@pytest.fixture
def base(tmp_path, tokenizer) -> Path:
    return make_model(tmp_path / "base", tokenizer, **SIZES)


def report(capsys) -> dict:
    return json.loads(capsys.readouterr().out.strip().split("\n")[-1])


def correlated(samples: int, width: int) -> torch.Tensor:
    """Inputs that go together, as those of a real layer do."""
    torch.manual_seed(0)
    return torch.randn(samples, width // 4) @ torch.randn(width // 4, width) + 0.3 * torch.randn(samples, width)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packing_gives_the_codes_back_and_is_one_stream_of_bits(bits):
    codes = torch.randint(2**bits, (96, 5), dtype=torch.uint8)
    words = gptq.pack_codes(codes, bits)
    assert words.shape == (3 * bits, 5) and words.dtype == torch.int32
    assert torch.equal(gptq.unpack_codes(words, bits), codes)
    stream = sum(int(code) << bits * i for i, code in enumerate(codes[:, 2]))  # by the definition, in Python's long integers
    assert [int(word) & 0xFFFFFFFF for word in words[:, 2]] == [stream >> 32 * k & 0xFFFFFFFF for k in range(3 * bits)]


def by_the_paper(weight: torch.Tensor, inputs: torch.Tensor, bits: int, damp: float) -> torch.Tensor:
    """Algorithm 1 of arXiv:2210.17323 column by column with the explicit inverse Hessian, symmetric, one group, in the columns' order."""
    weight, hessian = weight.double().clone(), (inputs.T @ inputs).double() / len(inputs)
    hessian += torch.eye(len(hessian)) * damp * hessian.diagonal().mean()
    scale = (weight.abs().amax(dim=1) * 2 / (2**bits - 1)).half().double()
    result, left = torch.zeros_like(weight), list(range(weight.shape[1]))
    while left:
        inverse = torch.linalg.inv(hessian[left][:, left])
        column = left[0]
        code = (weight[:, column] / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        result[:, column] = code * scale
        error = (weight[:, column] - result[:, column]) / inverse[0, 0]
        weight[:, left] -= error[:, None] * inverse[0][None]
        left = left[1:]
    return result


@pytest.mark.parametrize("bits", [3, 4])
def test_the_numbers_are_those_of_the_paper_s_algorithm(bits):
    inputs, weight = correlated(512, 64), torch.randn(32, 64)
    facts = dict(bits=bits, group_size=64, desc_act=False, sym=True, damp_percent=0.01, checkpoint_format="gptq")
    hessian = gptq.hessian(inputs)
    torch.testing.assert_close(hessian, inputs.T @ inputs / 512)
    factor, order = gptq.inverse_factor(hessian, facts)
    parts = gptq.to_parts(*gptq.quantize(weight, factor, order, facts), facts)
    wanted = by_the_paper(weight[:, order], inputs[:, order], bits, 0.01)
    found = gptq.dequantize(parts, facts)[:, order]
    assert (found - wanted).abs().lt(1e-3).float().mean() > 0.995  # a tie may round to the other side


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("desc_act", [True, False])
@pytest.mark.parametrize("bits, group_size", [(2, 32), (3, 32), (4, 64), (8, -1)])
def test_the_layer_s_output_is_nearer_than_by_plain_rounding(bits, group_size, desc_act, sym):
    inputs, weight = correlated(1024, 128), torch.randn(64, 128) + 0.2
    facts = dict(bits=bits, group_size=group_size, desc_act=desc_act, sym=sym, damp_percent=0.01, checkpoint_format="gptq" if sym else "gptq_v2")
    codes, scales, zeros, g_idx = gptq.quantize(weight, *gptq.inverse_factor(gptq.hessian(inputs), facts), facts)
    assert sorted(set(g_idx.tolist())) == list(range(128 // group_size if group_size > 0 else 1))
    assert desc_act or group_size < 0 or g_idx.tolist() == [i // group_size for i in range(128)]  # what fast kernels want
    found = gptq.dequantize(gptq.to_parts(codes, scales, zeros, g_idx, facts), facts)
    error = lambda matrix: float((inputs @ (matrix - weight).T).square().sum())
    assert error(found) < 0.75 * error(gptq.round_to_nearest(weight, facts))


def test_groups_without_negative_weights_survive_the_format():
    weight = torch.rand(32, 64) + 0.1  # their zero point is 0, which the first version of the format cannot hold
    facts = dict(bits=4, group_size=32, desc_act=False, sym=False, damp_percent=0.01, checkpoint_format="gptq_v2")
    parts = gptq.to_parts(*gptq.quantize(weight, *gptq.inverse_factor(torch.eye(64), facts), facts), facts)
    assert (gptq.dequantize(parts, facts) - weight).abs().max() < 1.1 / 15 / 2 + 1e-3


def test_the_folder_holds_the_format_and_the_model_that_was_evaluated(base, tmp_path, capsys):
    run(model_name_or_path=str(base), output_dir=str(tmp_path / "q"), eval_path=CONVERSATIONS, max_length=512, calibration_size=64)
    said = report(capsys)
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    settings = json.loads((tmp_path / "q" / "quantize_config.json").read_text())
    assert config["quantization_config"] == settings and settings["quant_method"] == "gptq" and settings["bits"] == 4 and settings["group_size"] == 32
    stored = load_file(tmp_path / "q" / "model.safetensors")
    layer = "model.layers.0.mlp.down_proj"  # (64, 128)
    shapes = {part: list(stored[f"{layer}.{part}"].shape) for part in gptq.PARTS}
    assert shapes == {"qweight": [16, 64], "qzeros": [4, 8], "scales": [4, 64], "g_idx": [128]} and f"{layer}.weight" not in stored
    assert all(tensor.dtype in (torch.float16, torch.int32) for tensor in stored.values())
    assert said["bytes"] < 0.75 * said["bytes_before"] and {file.name for file in base.iterdir()} <= {file.name for file in (tmp_path / "q").iterdir()}
    model, chat = generate.load_model(str(tmp_path / "q"))
    assert not hasattr(model.config, "quantization_config")
    total = count = 0
    for _, record in numbered_records(CONVERSATIONS):  # the evaluation's perplexity, from the folder, one dialogue at a time
        for ids, trained in cut_dialogue(chat, record["messages"], 512, Counter()):
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, :-1]
            losses = F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")[torch.tensor(trained[1:])]
            total, count = total + float(losses.sum()), count + len(losses)
    wanted = torch.tensor(total / count).exp()
    assert abs(said["perplexity"]["gptq"] / wanted - 1) < 2e-3, (said, wanted)


@pytest.mark.parametrize("tied", [True, False])
def test_it_answers_after_it_was_quantized_to_8_bits_as_before(base, tokenizer, tied, tmp_path):
    model = make_model(tmp_path / "model", tokenizer, tie_word_embeddings=tied, attention_bias=True, **SIZES)
    run(model_name_or_path=str(model), output_dir=str(tmp_path / "q"), bits=8)
    ids = torch.tensor([tokenizer("羊驼是什么动物？").input_ids])
    with torch.no_grad():
        before = AutoModelForCausalLM.from_pretrained(model)(ids).logits
        after = generate.load_model(str(tmp_path / "q"))[0](ids).logits
    assert (before - after).abs().mean() < 0.03 * before.std()


def test_a_model_of_shards_in_bf16_gives_the_same_as_one_file(base, tmp_path, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(base).bfloat16()
    for name, size in (("one", "1GB"), ("many", "100KB")):
        shutil.copytree(base, tmp_path / name, ignore=shutil.ignore_patterns("*.safetensors"))
        model.save_pretrained(tmp_path / name, max_shard_size=size)
        run(model_name_or_path=str(tmp_path / name), output_dir=str(tmp_path / f"{name}-q"))
        monkeypatch.setattr(gptq, "SHARD", 100_000)
    one, many = (generate.dequantized_state(str(tmp_path / f"{name}-q"), dict(bits=4, checkpoint_format="gptq"), torch.float32) for name in ("one", "many"))
    assert len(list((tmp_path / "many-q").glob("*.safetensors"))) > 1 and one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)
    assert load_file(tmp_path / "one-q" / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(*(generate.load_model(str(tmp_path / f"{name}-q"))[0](ids).logits for name in ("one", "many")))


def test_a_pickle_is_quantized_as_a_safetensors_file_is(tokenizer, tmp_path):
    base = make_model(tmp_path / "base", tokenizer, tie_word_embeddings=True, **SIZES)
    shutil.copytree(base, tmp_path / "pickle", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(load_file(base / "model.safetensors"), tmp_path / "pickle" / "pytorch_model.bin")
    with pytest.raises(BadInput, match="--allow_pickle True"):
        run(model_name_or_path=str(tmp_path / "pickle"), output_dir=str(tmp_path / "p"))
    run(model_name_or_path=str(tmp_path / "pickle"), output_dir=str(tmp_path / "p"), allow_pickle=True)
    run(model_name_or_path=str(base), output_dir=str(tmp_path / "q"))
    assert (tmp_path / "p" / "model.safetensors").read_bytes() == (tmp_path / "q" / "model.safetensors").read_bytes()


def test_a_run_that_is_killed_goes_on_behind_its_last_matrix_bit_for_bit(base, tmp_path, monkeypatch):
    run(model_name_or_path=str(base), output_dir=str(tmp_path / "whole"))
    begun, quantize = [], gptq.quantize

    def stop_at_the_sixth(*args):
        begun.append(1)
        if len(begun) == 6:
            raise KeyboardInterrupt
        return quantize(*args)

    monkeypatch.setattr(gptq, "quantize", stop_at_the_sixth)
    with pytest.raises(KeyboardInterrupt):
        run(model_name_or_path=str(base), output_dir=str(tmp_path / "q"))
    assert not (tmp_path / "q").exists()
    with pytest.raises(BadInput, match="was begun with bits = 4, now it is 3"):
        run(model_name_or_path=str(base), output_dir=str(tmp_path / "q"), bits=3)
    run(model_name_or_path=str(base), output_dir=str(tmp_path / "q"))
    assert len(begun) == 6 + 9  # five of the fourteen are taken as they are
    assert (tmp_path / "q" / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert {file.name for file in (tmp_path / "q").iterdir()} == {file.name for file in (tmp_path / "whole").iterdir()}


def test_models_that_take_no_packed_rows_are_quantized_on_padded_ones(tmp_path, monkeypatch, base, capsys):
    flags = dict(model_name_or_path=str(base), eval_path=CONVERSATIONS)
    run(**flags, output_dir=str(tmp_path / "packed"))
    packed = report(capsys)["perplexity"]
    monkeypatch.setattr(LlamaForCausalLM, "_supports_attention_backend", False)
    run(**flags, output_dir=str(tmp_path / "padded"))
    padded = report(capsys)["perplexity"]
    assert all(abs(packed[name] / padded[name] - 1) < 2e-3 for name in packed)


def test_bloom_is_quantized(tokenizer, tmp_path, capsys):  # YaYi-7B
    torch.manual_seed(0)
    BloomForCausalLM(BloomConfig(vocab_size=len(tokenizer), hidden_size=64, n_layer=2, n_head=2, initializer_range=0.2)).save_pretrained(tmp_path / "bloom")
    tokenizer.save_pretrained(tmp_path / "bloom")
    run(model_name_or_path=str(tmp_path / "bloom"), output_dir=str(tmp_path / "q"), bits=8)
    perplexity = report(capsys)["perplexity"]
    assert abs(perplexity["gptq"] / perplexity["original"] - 1) < 0.05
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        before, after = AutoModelForCausalLM.from_pretrained(tmp_path / "bloom")(ids).logits, generate.load_model(str(tmp_path / "q"))[0](ids).logits
    assert (before - after).abs().mean() < 0.03 * before.std()


def test_calibration_takes_records_through_the_template_and_text_as_it_is(tokenizer, tmp_path):
    choose = lambda path, template="auto": gptq.choose_examples(tokenizer, template, str(path), None, 512, 64, 42)
    text = lambda examples: tokenizer.decode(examples[0]["input_ids"])
    records = choose(CONVERSATIONS, "llama2_chinese")[0]
    assert "Human: " in text(records) and "Assistant: " in text(records)
    for number in range(2):
        (tmp_path / f"{number}.txt").write_text("山高水长\n" * 20, "utf-8")
    assert text(choose(tmp_path)[0]).startswith("山高水长")
    (tmp_path / "with_text.json").write_text(json.dumps([{"instruction": "问", "output": "答", "text": "全文"}] * 4), "utf-8")
    assert "全文" not in text(choose(tmp_path / "with_text.json", "llama2_chinese")[0])


def test_a_hessian_without_inverse_is_damped_more_and_that_is_said(capsys):
    settings = dict(bits=4, group_size=32, desc_act=False, sym=True, damp_percent=0.01, checkpoint_format="gptq")
    indefinite = torch.eye(32) + torch.diag_embed(torch.full((31,), 0.6), 1) + torch.diag_embed(torch.full((31,), 0.6), -1)  # least eigenvalue about -0.2
    factor, order = gptq.inverse_factor(indefinite, settings)
    assert "--damp_percent 0.01: 0.1 is tried" in capsys.readouterr().err
    damped = indefinite[order][:, order] + torch.eye(32)  # 0.01 and 0.1 are too little, 1 is enough
    torch.testing.assert_close(factor.T @ factor, torch.linalg.inv(damped), atol=1e-4, rtol=1e-4)


def test_a_folder_that_a_run_has_begun_in_is_refused_before_anything_is_done(base, tmp_path):
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "run.json").write_text("{}")  # of a training run: the result could not take the folder's place
    with pytest.raises(BadInput, match="holds another run"):
        run(model_name_or_path=str(base), output_dir=str(tmp_path / "q"))


@pytest.mark.parametrize("flags, message", [
    (dict(group_size=100), "--group_size=100 is no multiple of 32"),
    (dict(group_size=128), "take 64"),
    (dict(calibration_path="nowhere.txt"), "nowhere.txt does not exist"),
    (dict(calibration_path=CONVERSATIONS, template="yayi", max_length=256), "--template=yayi writes tokens that this model does not have"),
    (dict(damp_percent=0.0), "--damp_percent=0.0 must be above zero"),
])
def test_bad_input_is_said_before_anything_is_written(flags, message, base, tmp_path):
    with pytest.raises(BadInput, match=message):
        run(**dict(model_name_or_path=str(base), output_dir=str(tmp_path / "q")) | flags)
    assert {path.name for path in tmp_path.iterdir()} == {"base"}


def test_the_quantized_folder_is_refused_where_a_16_bit_one_belongs(base, tmp_path):
    run(model_name_or_path=str(base), output_dir=str(tmp_path / "q"))
    command = [sys.executable, "finetune_lora.py", "--model_name_or_path", str(tmp_path / "q"), "--data_path", CONVERSATIONS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "is quantized, to be used alone" in done.stderr
    with pytest.raises(BadInput, match="is quantized, to be used alone"):
        run(model_name_or_path=str(tmp_path / "q"), output_dir=str(tmp_path / "again"))
    with pytest.raises(BadInput, match="quantized already, to 4 bits"):
        generate.load_model(str(tmp_path / "q"), bits=8)


def test_a_quantized_folder_that_is_not_whole_is_refused(base, tmp_path):
    run(model_name_or_path=str(base), output_dir=str(tmp_path / "q"))
    file = tmp_path / "q" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(BadInput, match="cut off"):
        generate.load_model(str(tmp_path / "q"))
