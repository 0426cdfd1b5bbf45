"""Deltas and merged adapters: what comes out is what was promised, or nothing does."""
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, make_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import apply_delta
import finetune_lora
import generate
import merge_lora
from utils import BadInput, RunStopped

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@pytest.fixture
def tokenizer(bytelevel_folder):
    return AutoTokenizer.from_pretrained(bytelevel_folder)


def read(folder) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(Path(folder).glob("*.safetensors")) for name, tensor in load_file(file).items()}


def save(folder, weights: dict[str, torch.Tensor], shards: int = 1, like=None) -> Path:
    """A model folder of these weights, in shards, with the small files of another."""
    folder.mkdir(exist_ok=True)
    for file in Path(like).iterdir() if like else ():
        if file.suffix == ".json" and "index" not in file.name:
            shutil.copy(file, folder)
    names, mapped = list(weights), {}
    for number in range(shards):
        file = "model.safetensors" if shards == 1 else f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = {name: weights[name].contiguous() for name in names[number::shards]}
        save_file(part, folder / file, {"format": "pt"})
        mapped |= dict.fromkeys(part, file)
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": mapped}))
    return folder


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.dim() else tensor.numpy().tobytes()


def same_bits(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and a[name].shape == b[name].shape and bits(a[name]) == bits(b[name]) for name in a)


def tuned(weights: dict[str, torch.Tensor], seed: int = 1) -> dict[str, torch.Tensor]:
    """Weights a little off, as after tuning."""
    generator = torch.Generator().manual_seed(seed)
    return {name: (tensor.float() + 0.01 * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype) for name, tensor in weights.items()}


@pytest.fixture
def pair(model_folder, tmp_path):
    """A base of three shards and a model tuned from it, of two shards, in bf16."""
    weights = {name: tensor.bfloat16() for name, tensor in read(model_folder).items()}
    return save(tmp_path / "base", weights, 3, model_folder), save(tmp_path / "tuned", tuned(weights), 2, model_folder)


@pytest.fixture
def delta(pair, tmp_path):
    apply_delta.main(base=str(pair[0]), target=str(pair[1]), delta=str(tmp_path / "delta"), make=True)
    return tmp_path / "delta"


def restore(base, delta, target, **flags):
    apply_delta.main(base=str(base), target=str(target), delta=str(delta), **flags)
    return read(target)


def refused(folder: Path, match: str, act, kind=BadInput) -> None:
    """`act` fails in one line that matches, and leaves neither the folder nor anything beside it."""
    before = sorted(folder.parent.iterdir())
    with pytest.raises(kind, match=match) as refusal:
        act()
    assert "\n" not in str(refusal.value) and sorted(folder.parent.iterdir()) == before


def killed(script: str, shards: int, **flags) -> None:
    """Run a script in shards of 100 kB until it has written so many, then kill it."""
    code = f"""import os, signal, sys; sys.path.insert(0, {str(ROOT)!r})
import safetensors.torch, {script}
{script}.SHARD, save_file, count = 1e5, safetensors.torch.save_file, []
safetensors.torch.save_file = lambda *rest: (save_file(*rest), count.append(1), len(count) == {shards} and os.kill(os.getpid(), signal.SIGKILL))
{script}.main(**{flags!r})"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == -signal.SIGKILL


def names_in(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


# ---- exact deltas ----
@pytest.mark.parametrize("dtype", DTYPES)
def test_base_and_delta_give_the_target_back_bit_for_bit(dtype, model_folder, tmp_path):
    weights = {name: tensor.to(DTYPES[dtype]) for name, tensor in read(model_folder).items()}
    other = tuned(weights)
    odd = other["model.norm.weight"]
    odd[:6] = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, torch.finfo(odd.dtype).max, torch.finfo(odd.dtype).tiny])
    base, target = save(tmp_path / "base", weights, 3, model_folder), save(tmp_path / "tuned", other, 2, model_folder)
    apply_delta.main(base=str(base), target=str(target), delta=str(tmp_path / "delta"), make=True)
    assert same_bits(restore(base, tmp_path / "delta", tmp_path / "again"), other)
    size = lambda folder: sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert abs(size(tmp_path / "delta") - size(target)) < 100 and abs(size(tmp_path / "again") - size(target)) < 100
    assert set(names_in(tmp_path / "again")) == {name for name in names_in(target) if "model" not in name} | {"model.safetensors"}
    assert same_bits({name: p.data for name, p in AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=DTYPES[dtype]).named_parameters()}, other)


def test_a_delta_is_no_model_and_holds_the_hash_of_everything(pair, delta):
    facts = json.loads((delta / "delta.json").read_text())
    for key, folder in (("base", pair[0]), ("delta", delta), ("target", pair[1])):
        assert facts[key] == {name: hashlib.sha256(bits(tensor)).hexdigest() for name, tensor in read(folder).items()}
    assert {"tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json"} <= facts["files"].keys()
    assert all(hashlib.sha256((delta / name).read_bytes()).hexdigest() == found for name, found in facts["files"].items())
    with pytest.raises(OSError, match="no file named model"):
        AutoModelForCausalLM.from_pretrained(delta)


def test_a_grown_vocabulary_and_new_tensors_stand_whole_in_the_delta(pair, tmp_path):
    base, target = pair
    weights = read(target)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = torch.cat([weights[name], torch.randn(5, 64).bfloat16()])
    weights["model.layers.0.self_attn.q_proj.bias"] = torch.randn(64).bfloat16()
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.randn(8)
    grown = save(tmp_path / "grown", weights, 1, target)
    apply_delta.main(base=str(base), target=str(grown), delta=str(tmp_path / "delta"), make=True)
    held = read(tmp_path / "delta")
    for name, rows in (("lm_head.weight", slice(-5, None)), ("model.layers.0.self_attn.q_proj.bias", slice(None)), ("model.layers.0.self_attn.rotary_emb.inv_freq", slice(None))):
        assert bits(held[name][rows]) == bits(weights[name][rows])
    assert same_bits(restore(base, tmp_path / "delta", tmp_path / "again"), weights)


def flip(folder: Path, name: str) -> None:
    """Change one bit of a tensor where it lies: of its last number, so that a look at the beginning would not show it."""
    file = next(file for file in folder.glob("*.safetensors") if name in load_file(file))
    with open(file, "r+b") as stream:
        length = int.from_bytes(stream.read(8), "little")
        stream.seek(8 + length + json.loads(stream.read(length))[name]["data_offsets"][1] - 2)
        bit = bytes([stream.read(1)[0] ^ 1])
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bit)


def test_rotary_buffers_that_some_conversions_hold_do_not_make_another_base(pair, tmp_path):
    buffers = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.rand(8) for layer in range(2)}
    base, target = save(tmp_path / "old base", read(pair[0]) | buffers, 2, pair[0]), save(tmp_path / "old target", read(pair[1]) | buffers, 2, pair[1])
    for number, (made_from, made_for, applied_to) in enumerate([(base, pair[1], pair[0]), (pair[0], pair[1], base), (base, target, pair[0]), (base, target, base)]):
        apply_delta.main(base=str(made_from), target=str(made_for), delta=str(tmp_path / f"delta{number}"), make=True)
        assert same_bits(restore(applied_to, tmp_path / f"delta{number}", tmp_path / f"again{number}"), read(made_for))


def test_a_wrong_base_is_refused_by_its_first_tensor_before_anything_is_written(pair, delta, tmp_path, monkeypatch):
    monkeypatch.setattr(apply_delta, "write_shards", lambda *_: pytest.fail("something was written"))
    order = list(apply_delta.Weights(pair[0]).tensors)
    for name in order[9], order[4], order[0]:
        flip(pair[0], name)
        refused(tmp_path / "again", f"not the base that the delta was made from: {name} differs", lambda: restore(pair[0], delta, tmp_path / "again"))
    weights = read(pair[0])
    for change, match in ((lambda w: w.pop("lm_head.weight"), "lacks 1 tensors, lm_head.weight"), (lambda w: w.update(extra=torch.ones(3)), "has besides 1 tensors, extra")):
        changed = dict(weights)
        change(changed)
        save(tmp_path / "wrong", changed, 3, pair[0])
        refused(tmp_path / "again", match, lambda: restore(tmp_path / "wrong", delta, tmp_path / "again"))


def test_a_damaged_delta_gives_no_model_and_the_damage_is_named(pair, delta, tmp_path):
    name = list(read(delta))[-1]
    flip(delta, name)
    refused(tmp_path / "again", f"is damaged: its {name} is not as it was made", lambda: restore(pair[0], delta, tmp_path / "again"))
    flip(delta, name)  # downloaded again
    assert same_bits(restore(pair[0], delta, tmp_path / "again"), read(pair[1]))
    file = sorted(delta.glob("*.safetensors"))[-1]
    whole = file.read_bytes()
    for change, match in ((lambda: file.write_bytes(whole[:-100]), "could not be read.*cut off"), (lambda: file.write_bytes(whole[:50]), "could not be read.*only points to the real one"),
                          (lambda: file.write_bytes(b"\xff" * 100), "could not be read.*only points to the real one"), (lambda: (delta / "tokenizer.json").write_text("{}"), "tokenizer.json is missing or was changed"),
                          (lambda: (delta / "tokenizer.json").unlink(), "tokenizer.json is missing"), (lambda: (delta / "delta.json").write_text("{}"), "not as apply_delta.py writes it"),
                          (file.unlink, "holds no delta.safetensors")):
        copy = shutil.copytree(delta, tmp_path / "copy")
        change()
        refused(tmp_path / "new", match, lambda: restore(pair[0], delta, tmp_path / "new"))
        shutil.rmtree(delta)
        copy.rename(delta)


def test_a_base_that_changes_while_it_is_used_gives_no_model(pair, delta, tmp_path, monkeypatch):
    check = apply_delta.check_base
    monkeypatch.setattr(apply_delta, "check_base", lambda *rest: (check(*rest), flip(pair[0], "lm_head.weight")))
    with pytest.raises(RunStopped, match="lm_head.weight did not come out as it was made"):
        restore(pair[0], delta, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_base_that_is_cut_off_is_refused(pair, delta, tmp_path):
    file = sorted(pair[0].glob("*.safetensors"))[1]
    data = file.read_bytes()
    file.write_bytes(data[:-7])
    refused(tmp_path / "again", f"{file.name} could not be read.*cut off", lambda: restore(pair[0], delta, tmp_path / "again"))
    file.unlink()
    refused(tmp_path / "again", f"lacks {file.name}", lambda: restore(pair[0], delta, tmp_path / "again"))


def test_a_run_that_is_killed_shows_nothing_and_the_same_command_starts_over(pair, delta, tmp_path):
    killed("apply_delta", 2, base=str(pair[0]), target=str(tmp_path / "again"), delta=str(delta))
    assert not (tmp_path / "again").exists() and len(names_in(tmp_path / ".again-unfinished")) == 2
    assert same_bits(restore(pair[0], delta, tmp_path / "again"), read(pair[1]))
    assert not (tmp_path / ".again-unfinished").exists() and set(names_in(tmp_path / "again")) == {name for name in names_in(pair[1]) if "model" not in name} | {"model.safetensors"}


def test_one_run_at_a_time_writes_a_folder(tmp_path):
    with apply_delta.unfinished_folder(tmp_path / "out", 0, "target"):
        with pytest.raises(BadInput, match="being written by another run"), apply_delta.unfinished_folder(tmp_path / "out", 0, "target"):
            pass
    assert (tmp_path / "out").is_dir()


def test_the_command_line_is_that_of_ziya_and_ends_with_status_2_for_bad_input(pair, delta, tmp_path):
    command = [sys.executable, "-m", "apply_delta", "--base", str(pair[0]), "--target", str(tmp_path / "again"), "--delta", str(delta)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "every SHA-256" in done.stdout and same_bits(read(tmp_path / "again"), read(pair[1]))
    started = time.perf_counter()
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 2 and "exists already" in again.stderr.splitlines()[-1] and "Traceback" not in again.stderr and time.perf_counter() - started < 5


# ---- deltas of floating-point numbers ----
def bin_folder(folder: Path, weights: dict[str, torch.Tensor], like: Path) -> Path:
    """A folder of pickled shards, as deltas were published in 2023."""
    save(folder, {}, 1, like)
    (folder / "model.safetensors").unlink()
    names, mapped = list(weights), {}
    for number in range(2):
        mapped |= dict.fromkeys(names[number::2], file := f"pytorch_model-{number + 1:05}-of-00002.bin")
        torch.save({name: weights[name] for name in names[number::2]}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": mapped}))
    return folder


def test_pickled_models_have_exact_deltas_too(pair, tmp_path):
    base, target = bin_folder(tmp_path / "base bin", read(pair[0]), pair[0]), bin_folder(tmp_path / "target bin", read(pair[1]), pair[1])
    make = lambda **flags: apply_delta.main(base=str(base), target=str(target), delta=str(tmp_path / "delta"), make=True, **flags)
    refused(tmp_path / "delta", "pickle.*--allow_pickle True", make)
    make(allow_pickle=True)
    for number, applied_to in enumerate((base, pair[0])):
        assert same_bits(restore(applied_to, tmp_path / "delta", tmp_path / f"again{number}", allow_pickle=True), read(pair[1]))


@pytest.mark.parametrize("kind", ["FastChat", "Ziya"])
def test_published_deltas_of_floats_are_summed_as_their_scripts_do(kind, model_folder, tmp_path, capsys):
    base = {name: tensor.half() for name, tensor in read(model_folder).items()} | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(8)}
    target = tuned(base)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        target[name] = torch.cat([target[name], torch.randn(7, 64).half()])
    if kind == "FastChat":  # fastchat/model/make_delta.py: rows that the base lacks are zero there
        sums = {name: tensor - torch.cat([base[name], torch.zeros(len(tensor) - len(base[name]), *tensor.shape[1:])]).to(tensor.dtype) for name, tensor in target.items()}
    else:  # fengshen/utils/apply_delta.py: three kinds of tensors are taken from the delta
        sums = {name: tensor if "embed_tokens" in name or "lm_head" in name or "inv_freq" in name else tensor - base[name] for name, tensor in target.items()}
    folders = bin_folder(tmp_path / "base", base, model_folder), bin_folder(tmp_path / "delta", sums, model_folder)
    refused(tmp_path / "again", "pickle.*--allow_pickle True", lambda: restore(*folders, tmp_path / "again"))
    found = restore(*folders, tmp_path / "again", allow_pickle=True)
    error = capsys.readouterr().err
    assert "warning" in error and "right base from a wrong one" in error and f"lm_head.weight stands {'whole in the delta' if kind == 'Ziya' else 'in the delta as a diff'}" in error
    for name in found:
        rows = len(base[name])
        wanted = sums[name] if kind == "Ziya" and name in ("model.embed_tokens.weight", "lm_head.weight") else torch.cat([base[name] + sums[name][:rows], sums[name][rows:]])
        assert torch.equal(found[name], wanted), name
    assert found.keys() == target.keys() - {"model.layers.0.self_attn.rotary_emb.inv_freq"}  # transformers computes it
    config = json.loads((tmp_path / "again" / "config.json").read_text()) | {"vocab_size": len(found["lm_head.weight"])}
    (tmp_path / "again" / "config.json").write_text(json.dumps(config))
    AutoModelForCausalLM.from_pretrained(tmp_path / "again")


def test_what_is_no_delta_of_this_base_is_refused_by_name(pair, delta, tmp_path, model_folder):
    base, target = pair
    out = tmp_path / "again"
    difference = {name: read(target)[name] - tensor for name, tensor in read(base).items()}
    sums = save(tmp_path / "sums", difference, 1, base)
    refused(out, "is a delta", lambda: restore(delta, delta, out))
    refused(out, "is no delta but a whole model", lambda: restore(base, target, out))
    refused(out, "is no delta but a whole model", lambda: restore(base, base, out))
    refused(out, "is the delta given as the base", lambda: restore(sums, base, out))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    refused(out, "is a LoRA adapter, no delta", lambda: restore(base, tmp_path / "adapter", out))
    make = lambda weights: lambda: apply_delta.main(base=str(base), target=str(save(tmp_path / "other", weights, 1, base)), delta=str(out), make=True)
    (tmp_path / "other").mkdir()
    weights = read(target)
    refused(out, "lacks 1 tensors of the base, model.norm.weight", make({name: tensor for name, tensor in weights.items() if name != "model.norm.weight"}))
    refused(out, r"model.norm.weight is \[63\], in the base it is \[64\]", make(weights | {"model.norm.weight": weights["model.norm.weight"][:63]}))
    refused(out, "model.norm.weight is of type F32, in the base of BF16", make(weights | {"model.norm.weight": weights["model.norm.weight"].float()}))
    refused(out, r"lm_head.weight is \[", lambda: restore(base, save(tmp_path / "other", difference | {"lm_head.weight": torch.zeros(10, 64)}, 1, base), out))
    refused(out, "has 1 tensors that the base lacks, extra", lambda: restore(base, save(tmp_path / "other", difference | {"extra": torch.zeros(3)}, 1, base), out))
    spoiled = difference | {"model.norm.weight": torch.full((64,), float("nan")).bfloat16()}
    refused(out, "model.norm.weight becomes infinite or no number", lambda: restore(base, save(tmp_path / "other", spoiled, 1, base), out), RunStopped)


def test_too_little_disk_is_said_before_a_model_is_written(pair, delta, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    refused(tmp_path / "again", "0.0 GB free", lambda: restore(pair[0], delta, tmp_path / "again"))


# ---- merging ----
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS = {
    "plain": dict(target_modules=LINEAR),
    "rsLoRA": dict(target_modules=LINEAR, use_rslora=True),
    "DoRA": dict(target_modules=LINEAR, use_dora=True),
    "patterns": dict(target_modules=["q_proj", "down_proj"], rank_pattern={"layers.1.self_attn.q_proj": 2}, alpha_pattern={"down_proj": 3, "layers.0.*q_proj": 40}),
    "biases": dict(target_modules=["q_proj"], bias="all"),
    "modules_to_save": dict(target_modules=["q_proj"], modules_to_save=["lm_head", "norm"]),
    "table saved": dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
    "both tables saved": dict(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]),
    "tables saved, tied": dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    "embedding": dict(target_modules=["embed_tokens", "q_proj"]),
    "embedding, tied": dict(target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True),
    "head": dict(target_modules=["lm_head", "v_proj"]),
    "rows": dict(target_modules=["q_proj"], trainable_token_indices=[3, 999, 7]),
    "rows of both": dict(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [3, 9], "lm_head": [3, 9]}),
    "rows apart": dict(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [3, 9], "lm_head": [4]}),
}


def make_adapter(base, folder, seed: int = 0, rows: int = 0, **config):
    """A random adapter, made and saved by peft; returns base + adapter, by peft."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if rows:
        model.resize_token_embeddings(rows).weight.data[len(AutoTokenizer.from_pretrained(base)):] = torch.randn(64)
    adapted = get_peft_model(model, LoraConfig(**dict(task_type="CAUSAL_LM", r=4, lora_alpha=8) | config))
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn_like(p)
    adapted.eval().save_pretrained(folder)
    return adapted


def merge(base, adapters, out, **flags):
    merge_lora.main(model_name_or_path=str(base), lora_path=",".join(map(str, adapters)) if isinstance(adapters, list) else str(adapters), output_dir=str(out), **flags)
    return read(out)


def logits(model):
    with torch.no_grad():
        return model(torch.arange(1, 60)[None]).logits


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_merged_model_answers_as_base_and_adapter_do(kind, tied, tmp_path, tokenizer):
    base = make_model(tmp_path / "base", tokenizer, tie_word_embeddings=tied, attention_bias=True)
    adapted = make_adapter(base, tmp_path / "adapter", **ADAPTERS[kind])
    wanted = logits(adapted)
    merge(base, tmp_path / "adapter", tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert (logits(merged) - wanted).abs().max() < 1e-3 < (logits(AutoModelForCausalLM.from_pretrained(base)) - wanted).abs().max()
    apart = kind in ("modules_to_save", "table saved", "both tables saved", "embedding", "head", "rows apart")
    assert (merged.get_input_embeddings().weight is merged.get_output_embeddings().weight) == (tied and not apart)
    if not tied:  # peft adds to both where one is adapted alone
        theirs = {name: p.data for name, p in adapted.merge_and_unload(safe_merge=True).named_parameters()}
        assert same_bits(theirs, {name: p.data for name, p in merged.named_parameters()})


@pytest.mark.parametrize("family", ["bloom", "qwen2", "gpt2"])
def test_other_families_are_merged_too(family, tmp_path, tokenizer):
    from transformers import BloomConfig, GPT2Config, Qwen2Config

    sizes = dict(vocab_size=len(tokenizer), hidden_size=64, num_attention_heads=4)
    config = {"bloom": BloomConfig(**sizes, n_layer=2), "gpt2": GPT2Config(**sizes, n_layer=2), "qwen2": Qwen2Config(**sizes, intermediate_size=96, num_hidden_layers=2, num_key_value_heads=2)}[family]
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    adapted = make_adapter(tmp_path / "base", tmp_path / "adapter", target_modules="all-linear")
    if family == "bloom":  # as published: the files leave out "transformer."
        save(tmp_path / "base", {name.removeprefix("transformer."): tensor for name, tensor in read(tmp_path / "base").items()})
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert (logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")) - logits(adapted)).abs().max() < 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_are_in_fp32_and_rounded_once_into_the_type_of_the_base(dtype, tmp_path, model_folder):
    base = save(tmp_path / "base", {name: tensor.to(DTYPES[dtype]) for name, tensor in read(model_folder).items()}, 3, model_folder)
    for seed in (0, 1):
        make_adapter(base, tmp_path / f"adapter{seed}", seed, target_modules=LINEAR, r=3 + seed)
    merged = merge(base, [tmp_path / "adapter0", tmp_path / "adapter1"], tmp_path / "out")
    held = read(base)
    for seed in (0, 1):
        factors = read(tmp_path / f"adapter{seed}")
        for name in factors:
            if "lora_A" in name:
                target = name.removeprefix("base_model.model.").replace(".lora_A", "")
                held[target] = held[target].double() + 8 / (3 + seed) * factors[name.replace("lora_A", "lora_B")].double() @ factors[name].double()
    for name, tensor in held.items():
        rounded = tensor.to(DTYPES[dtype])
        assert merged[name].dtype == DTYPES[dtype] and (merged[name] != rounded).float().mean() < (0.5 if dtype == "fp32" else 0.001), name  # ties, and fp32 itself
        assert ((merged[name].double() - tensor.double()).abs() <= tensor.double().abs() * torch.finfo(DTYPES[dtype]).eps + 1e-6).all()


def answer(model_name_or_path, lora_path=None) -> list[str]:
    model, chat = generate.load_model(str(model_name_or_path), str(lora_path) if lora_path else None)
    settings = dict(max_new_tokens=12, temperature=0, top_p=1.0, top_k=0, repetition_penalty=1.0)
    return generate.answer_batch(model, chat, [[{"role": "user", "content": text}] for text in ("你好", "雪线围巾多少钱？")], **settings)


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("bits", [16, 4, 8])
def test_a_tuned_adapter_with_new_tokens_is_merged_with_tokenizer_template_and_stop_tokens(bits, tied, tmp_path, tokenizer):
    base = make_model(tmp_path / "base", tokenizer, tie_word_embeddings=tied)
    finetune_lora.main(model_name_or_path=str(base), data_path=str(ROOT / "sample" / "conversation.json"), output_dir=str(tmp_path / "adapter"), template="yayi", bits=bits,
                       max_length=256, gradient_accumulation_steps=1, num_train_epochs=2, learning_rate=1e-2, gradient_checkpointing=False)
    weights = merge(base, tmp_path / "adapter", tmp_path / "out")
    model, chat = generate.load_model(str(tmp_path / "out"))
    assert len(weights["model.embed_tokens.weight"]) == model.config.vocab_size == len(chat.tokenizer) == len(tokenizer) + 4
    assert chat.tokenizer.convert_tokens_to_ids("<|End|>") in chat.stop_ids and "<|YaYi|>" in chat.jinja
    assert model.generation_config.eos_token_id == chat.stop_ids
    assert answer(tmp_path / "out") == answer(base, tmp_path / "adapter")
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "adapter" / name).read_bytes()
    facts = json.loads((tmp_path / "out" / "yangtuo.json").read_text())
    assert facts["adapters"] == [str(tmp_path / "adapter")] and facts["base"] == str(base)


def test_tokens_that_were_added_and_not_trained_start_as_the_mean_as_generate_has_them(tmp_path, tokenizer, model_folder):
    make_adapter(model_folder, tmp_path / "adapter", target_modules=LINEAR)
    (tmp_path / "adapter" / "README.md").unlink()
    grown = AutoTokenizer.from_pretrained(model_folder)
    grown.add_tokens(["<a>", "<b>"])
    grown.chat_template = None
    grown.save_pretrained(tmp_path / "adapter")
    base = shutil.copytree(model_folder, tmp_path / "base")
    (base / "chat_template.jinja").write_text("{{ of the base }}")
    (base / "added_tokens.json").write_text("{}")
    weights = merge(base, tmp_path / "adapter", tmp_path / "out")
    assert len(weights["lm_head.weight"]) == len(tokenizer) + 2
    assert not {"chat_template.jinja", "added_tokens.json"} & {file.name for file in (tmp_path / "out").iterdir()}  # the tokenizer is the adapter's, whole
    model, _ = generate.load_model(str(base), str(tmp_path / "adapter"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.tensor([[5, len(tokenizer), 7, len(tokenizer) + 1, 9]])
    with torch.no_grad():
        assert (model(ids).logits - merged(ids).logits).abs().max() < 1e-3


def test_a_tied_head_that_is_stored_all_the_same_stays_equal_to_the_embedding(tmp_path, tokenizer):
    tied = make_model(tmp_path / "tied", tokenizer, tie_word_embeddings=True)
    weights = read(tied)
    base = save(tmp_path / "base", weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}, 2, tied)
    adapted = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"], trainable_token_indices=[3, 4])
    merged = merge(base, tmp_path / "adapter", tmp_path / "out")
    assert torch.equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"]) and not torch.equal(merged["lm_head.weight"], weights["model.embed_tokens.weight"])
    assert (logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")) - logits(adapted)).abs().max() < 1e-3
    make_adapter(base, tmp_path / "head", 1, target_modules=["lm_head"])
    refused(tmp_path / "both", "does one adapter add to what another one replaces", lambda: merge(base, [tmp_path / "adapter", tmp_path / "head"], tmp_path / "both"))


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
def test_a_vocabulary_that_grew_under_peft_is_merged_with_its_whole_tables(tied, tmp_path, tokenizer):
    base = make_model(tmp_path / "base", tokenizer, tie_word_embeddings=tied)
    adapted = make_adapter(base, tmp_path / "adapter", rows=len(tokenizer) + 9, target_modules=["q_proj"])  # peft saves the tables without being asked
    assert len(merge(base, tmp_path / "adapter", tmp_path / "out")["model.embed_tokens.weight"]) == len(tokenizer) + 9
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.config.vocab_size == len(tokenizer) + 9 and (logits(merged) - logits(adapted)).abs().max() < 1e-4
    if tied:  # other versions of peft save the table once
        save_file({name: tensor for name, tensor in read(tmp_path / "adapter").items() if "lm_head" not in name}, tmp_path / "adapter" / "adapter_model.safetensors")
        assert "lm_head.weight" not in merge(base, tmp_path / "adapter", tmp_path / "once")
        assert (logits(AutoModelForCausalLM.from_pretrained(tmp_path / "once")) - logits(adapted)).abs().max() < 1e-4


# ---- several adapters ----
@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("weights", [None, "0.7,0.3", "2,-0.5"])
def test_several_adapters_are_summed_and_what_they_replace_is_the_last_or_averaged(weights, tied, tmp_path, tokenizer):
    base = make_model(tmp_path / "base", tokenizer, tie_word_embeddings=tied)
    rows = [[3, 5], [5, 8]]
    for seed in (0, 1):
        make_adapter(base, tmp_path / f"adapter{seed}", seed, target_modules=["q_proj", "down_proj"], trainable_token_indices=rows[seed], modules_to_save=["norm"])
    merged = merge(base, [tmp_path / "adapter0", tmp_path / "adapter1"], tmp_path / "out", weights=weights)
    (a, b), old = (read(tmp_path / f"adapter{seed}") for seed in (0, 1)), read(base)
    shares = [float(share) for share in weights.split(",")] if weights else [1, 1]
    name, prefix = "model.layers.1.self_attn.q_proj", "base_model.model."
    products = [each[f"{prefix}{name}.lora_B.weight"] @ each[f"{prefix}{name}.lora_A.weight"] * 2 for each in (a, b)]
    assert (merged[f"{name}.weight"] - old[f"{name}.weight"] - shares[0] * products[0] - shares[1] * products[1]).abs().max() < 1e-5
    mixed = lambda x, y: y if weights is None else (shares[0] * x + shares[1] * y) / sum(shares)
    assert (merged["model.norm.weight"] - mixed(a[f"{prefix}model.norm.weight"], b[f"{prefix}model.norm.weight"])).abs().max() < 1e-5
    of_rows = [each[f"{prefix}model.embed_tokens.token_adapter.trainable_tokens_delta"] for each in (a, b)]
    table = merged["model.embed_tokens.weight"]
    for row, wanted in ((3, of_rows[0][0]), (5, mixed(of_rows[0][1], of_rows[1][0])), (8, of_rows[1][1]), (4, old["model.embed_tokens.weight"][4])):
        assert (table[row] - wanted).abs().max() < 1e-5


def test_an_adapter_with_rows_of_its_own_may_stand_before_one_without(tmp_path, model_folder):
    make_adapter(model_folder, tmp_path / "rows", target_modules=["q_proj"], trainable_token_indices=[3, 5])
    make_adapter(model_folder, tmp_path / "plain", 1, target_modules=["q_proj"])
    one, other = (merge(model_folder, [tmp_path / name for name in names], tmp_path / names[0][:1]) for names in (("rows", "plain"), ("plain", "rows")))
    assert all((one[name] - other[name]).abs().max() < 1e-5 for name in one)
    assert torch.equal(one["model.embed_tokens.weight"][3], read(tmp_path / "rows")["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"][0])


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
def test_tables_of_the_base_that_peft_saves_unasked_replace_nothing(tied, tmp_path, tokenizer):
    base = make_model(tmp_path / "base", tokenizer, tie_word_embeddings=tied)
    for seed in (0, 1):
        make_adapter(base, tmp_path / f"adapter{seed}", seed, target_modules=["embed_tokens"])
    assert "base_model.model.model.embed_tokens.base_layer.weight" in read(tmp_path / "adapter1")
    both = merge(base, [tmp_path / "adapter0", tmp_path / "adapter1"], tmp_path / "both")
    alone = [merge(base, tmp_path / f"adapter{seed}", tmp_path / f"alone{seed}") for seed in (0, 1)]
    name, old = "model.embed_tokens.weight", read(base)
    assert (both[name] - alone[0][name] - alone[1][name] + old[name]).abs().max() < 1e-5
    assert torch.equal(both["lm_head.weight"], old[name if tied else "lm_head.weight"])


def test_a_weight_of_one_adapter_scales_what_it_adds(tmp_path, model_folder):
    make_adapter(model_folder, tmp_path / "adapter", target_modules=LINEAR)
    whole, half = merge(model_folder, tmp_path / "adapter", tmp_path / "whole"), merge(model_folder, tmp_path / "adapter", tmp_path / "half", weights="0.5")
    base = read(model_folder)
    assert all(((whole[name] - base[name]) / 2 - (half[name] - base[name])).abs().max() < 1e-5 for name in base)


def test_adapters_whose_tokens_have_other_numbers_are_not_put_together(tmp_path, tokenizer, model_folder):
    for seed, tokens in enumerate((["<a>", "<b>"], ["<b>", "<a>"])):
        make_adapter(model_folder, tmp_path / f"adapter{seed}", seed, target_modules=LINEAR)
        grown = AutoTokenizer.from_pretrained(model_folder)
        grown.add_tokens(tokens)
        grown.save_pretrained(tmp_path / f"adapter{seed}")
    refused(tmp_path / "out", "do not go together: token '<[ab]>' is", lambda: merge(model_folder, [tmp_path / "adapter0", tmp_path / "adapter1"], tmp_path / "out"))


# ---- what is refused, and what is left of a run ----
@pytest.mark.parametrize("change, match", [
    ({"lora_bias": True}, "lora_bias = True .* not known here"), ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"), ({"use_qalora": True}, "use_qalora"),
    ({"layer_replication": [[0, 2]]}, "layer_replication"), ({"target_parameters": ["x"]}, "target_parameters"), ({"something_of_next_year": 1}, "something_of_next_year"),
    ({"kasa_config": {"beta": 1}}, "kasa_config"), ({"peft_type": "IA3"}, "of type IA3"), ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4 changed the base"),
    ({"use_dora": True}, "is not whole"),
], ids=str)
def test_an_adapter_of_a_kind_that_is_not_known_is_refused_by_name(change, match, tmp_path, model_folder):
    make_adapter(model_folder, tmp_path / "adapter", target_modules=["q_proj"])
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    refused(tmp_path / "out", match, lambda: merge(model_folder, tmp_path / "adapter", tmp_path / "out"))


def test_bad_input_is_refused_in_one_line_before_anything_is_written(tmp_path, model_folder, tokenizer):
    adapter, out = tmp_path / "adapter", tmp_path / "out"
    make_adapter(model_folder, adapter, target_modules=["q_proj"])
    dora = tmp_path / "dora"
    make_adapter(model_folder, dora, target_modules=["q_proj"], use_dora=True)
    refused(out, "nowhere does not exist", lambda: merge("nowhere", adapter, out))
    refused(out, "is no adapter", lambda: merge(model_folder, model_folder, out))
    refused(out, "give its base as the model", lambda: merge(adapter, adapter, out))
    refused(out, "names 2 adapters, give a number for each", lambda: merge(model_folder, [adapter, adapter], out, weights="1"))
    refused(out, "are not numbers", lambda: merge(model_folder, adapter, out, weights="half"))
    refused(out, "DoRA, which rescales", lambda: merge(model_folder, [adapter, dora], out))
    refused(out, "DoRA, which rescales", lambda: merge(model_folder, dora, out, weights="0.5"))
    refused(model_folder, "holds another run", lambda: merge(model_folder, adapter, model_folder))
    wide = make_model(tmp_path / "wide", tokenizer, hidden_size=128)
    refused(out, "does not fit this model: was it trained on another base", lambda: merge(wide, adapter, out))
    shallow = make_model(tmp_path / "shallow", tokenizer, num_hidden_layers=1)
    refused(out, r"layers.1.self_attn.q_proj.lora_.* belongs to no layer of this model", lambda: merge(shallow, adapter, out))
    (adapter / "yangtuo.json").write_text('{"base_fingerprint": "0123456789abcdef"}')
    refused(out, "was trained on another base than .*0123456789ab", lambda: merge(model_folder, adapter, out))
    (adapter / "yangtuo.json").unlink()
    weights = read(adapter)
    for left_out, match in (("lora_B", "lacks 2 tensors"), ("layers.1.", "lacks 2 tensors")):
        save_file({name: tensor for name, tensor in weights.items() if left_out not in name}, adapter / "adapter_model.safetensors")
        refused(out, match, lambda: merge(model_folder, adapter, out))
    save_file(weights | {"base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": torch.full((64, 4), float("nan"))}, adapter / "adapter_model.safetensors")
    refused(out, "q_proj.weight becomes infinite or no number", lambda: merge(model_folder, adapter, out), RunStopped)
    save_file({name: tensor * ("lora_A" in name) for name, tensor in weights.items()}, adapter / "adapter_model.safetensors")
    refused(out, "changes nothing, all its B matrices are zero", lambda: merge(model_folder, adapter, out))
    quantized = shutil.copytree(model_folder, tmp_path / "quantized")
    config = json.loads((quantized / "config.json").read_text())
    (quantized / "config.json").write_text(json.dumps(config | {"quantization_config": {"load_in_4bit": True}}))
    refused(out, "is quantized: give the 16-bit model", lambda: merge(quantized, adapter, out))


def test_weights_are_held_a_file_at_a_time(tmp_path, model_folder, monkeypatch):
    make_adapter(model_folder, tmp_path / "adapter", target_modules=LINEAR)
    whole = merge(model_folder, tmp_path / "adapter", tmp_path / "whole")
    monkeypatch.setattr(merge_lora, "SHARD", 1e5)
    assert same_bits(merge(model_folder, tmp_path / "adapter", tmp_path / "out"), whole)
    sizes = [sum(tensor.nbytes for tensor in load_file(file).values()) for file in (tmp_path / "out").glob("model-*")]
    assert len(sizes) > 3 and max(sizes) <= max(1e5, *(tensor.nbytes for tensor in whole.values()))
    assert same_bits({name: p.data for name, p in AutoModelForCausalLM.from_pretrained(tmp_path / "out").named_parameters()}, whole)


@pytest.mark.parametrize("file, infix", [("adapter_model.bin", ""), ("pytorch_model.bin", ".default")])
def test_old_pickled_adapters_and_bases_are_merged_with_the_flag(file, infix, tmp_path, model_folder):
    adapted = make_adapter(model_folder, tmp_path / "adapter", target_modules=["q_proj", "v_proj"])
    torch.save({name.replace(".weight", f"{infix}.weight"): tensor for name, tensor in read(tmp_path / "adapter").items()}, tmp_path / "adapter" / file)
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    base = bin_folder(tmp_path / "base", read(model_folder), model_folder)
    refused(tmp_path / "out", "pickle", lambda: merge(model_folder, tmp_path / "adapter", tmp_path / "out"))
    refused(tmp_path / "out", "pickle", lambda: merge(base, tmp_path / "adapter", tmp_path / "out"))
    merge(base, tmp_path / "adapter", tmp_path / "out", allow_pickle=True)
    assert (logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")) - logits(adapted)).abs().max() < 1e-4


def test_a_merge_that_is_killed_shows_nothing_and_the_next_one_is_whole(tmp_path, model_folder):
    make_adapter(model_folder, tmp_path / "adapter", target_modules=LINEAR)
    killed("merge_lora", 2, model_name_or_path=str(model_folder), lora_path=str(tmp_path / "adapter"), output_dir=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists() and len(list((tmp_path / ".out-unfinished").iterdir())) == 2
    assert same_bits(merge(model_folder, tmp_path / "adapter", tmp_path / "out"), merge(model_folder, tmp_path / "adapter", tmp_path / "other"))
    assert not (tmp_path / ".out-unfinished").exists() and names_in(tmp_path / "out") == names_in(tmp_path / "other")
