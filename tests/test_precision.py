"""bf16 on a CPU that has it: auto takes it, elsewhere it is refused, and what the optimizer changes stays fp32."""
import json

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

import finetune
import finetune_lora
import generate
from utils import BadInput

RUN = dict(data_path=str(ROOT / "sample" / "instruction.json"), template="chatml", max_length=256, max_steps=3, save_steps=2, gradient_accumulation_steps=1,
           learning_rate=1e-2)


@pytest.fixture
def cpu(monkeypatch):
    """Let torch say of this CPU that it has AVX512-BF16, or not; where it has not, torch emulates bf16."""
    def has(bf16: bool):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    return has


@pytest.mark.parametrize("script, trained", [(finetune, torch.bfloat16), (finetune_lora, torch.float32)])
def test_bf16_on_a_cpu_trains_fp32_masters(cpu, script, trained, model_folder, tmp_path, capfd):
    losses = {}
    for name in ("bf16", "auto", "fp32"):
        cpu(bf16=True)
        script.main(model_name_or_path=str(model_folder), output_dir=str(tmp_path / name), precision=name, **RUN)
        losses[name] = json.loads(capfd.readouterr().out.splitlines()[-1])["train_loss"]
    assert losses["auto"] == losses["bf16"] and 0 < abs(losses["bf16"] - losses["fp32"]) < 0.02 * losses["fp32"]  # another arithmetic, the same training
    kept = {file.parent: {tensor.dtype for tensor in load_file(file).values()} for file in (tmp_path / "bf16").glob("**/*model.safetensors")}
    assert kept == {tmp_path / "bf16": {trained}, tmp_path / "bf16" / "checkpoint-2": {torch.float32}, tmp_path / "bf16" / "checkpoint-3": {torch.float32}}
    moments = torch.load(tmp_path / "bf16" / "checkpoint-2" / "optimizer.pt", weights_only=True)["state"][0]
    assert {moment.dtype for moment in moments.values()} == {torch.float32}


@pytest.mark.parametrize("bf16, asked, taken", [(True, "auto", torch.bfloat16), (True, "bf16", torch.bfloat16), (True, "fp32", torch.float32),
                                                (False, "auto", torch.float32)])
def test_a_model_is_read_in_the_precision_of_the_cpu(cpu, bf16, asked, taken, model_folder):
    cpu(bf16)
    assert generate.load_base(str(model_folder), 0, 16, asked, False, False).dtype == taken


@pytest.mark.parametrize("bf16, asked, said", [(False, "bf16", "or a CPU with AVX512-BF16"), (True, "fp16", "needs a GPU: leave"), (False, "fp16", "needs a GPU: leave")])
def test_what_a_cpu_cannot_do_is_refused(cpu, bf16, asked, said, model_folder, tmp_path):
    cpu(bf16)
    with pytest.raises(BadInput, match=said):
        generate.load_base(str(model_folder), 0, 16, asked, False, False)
    with pytest.raises(BadInput, match=said):
        finetune_lora.main(model_name_or_path=str(model_folder), output_dir=str(tmp_path), precision=asked, **RUN)


@pytest.mark.parametrize("autocast", [False, True])
def test_attention_in_bf16_is_that_of_each_document_alone_whatever_its_length(autocast):
    """Short documents are attended in fp32 on a CPU, long ones in bf16: both give bf16, and neither sees the other."""
    lengths = [40, 300, 7]
    query, key, value = torch.randn(3, 1, 2, sum(lengths), 16).bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):  # where rotations are in fp32, query and key are
        given = (query.float(), key.float(), value) if autocast else (query, key, value)
        found, _ = finetune_lora.document_attention(None, *given, None, document_lengths=lengths)
    assert found.dtype == torch.bfloat16 and found.shape == (1, sum(lengths), 2, 16)
    parts = zip(*(states.float().split(lengths, dim=2) for states in (query, key, value)))
    alone = torch.cat([torch.nn.functional.scaled_dot_product_attention(*part, is_causal=True) for part in parts], dim=2).transpose(1, 2)
    off = [(mine - other).abs().max() for mine, other in zip(found.float().split(lengths, dim=1), alone.split(lengths, dim=1))]
    rounded = [float((other.bfloat16().float() - other).abs().max()) for other in alone.split(lengths, dim=1)]
    assert max(off) < 0.05 and off[0] == rounded[0] and off[2] == rounded[2]  # of a short one only the result is rounded
