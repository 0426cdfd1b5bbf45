"""Tiny models and tokenizers, made on the spot from sample/: no network, no GPU, no downloaded weights."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ["HF_HUB_OFFLINE"] = "1"
if os.environ.get("TEST_DEVICE") != "cuda":  # of test_gpu.py
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same promises on every machine: on the CPU, in fp32
    os.environ["ATEN_CPU_CAPABILITY"] = "avx2"  # so that auto takes that on a CPU with bf16, too


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """A cache of the test run's own, for this process and those it starts."""
    os.environ["YANGTUO_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def corpus() -> list[str]:
    text = "".join(path.read_text("utf-8") for path in sorted((ROOT / "sample").glob("*.json*")) if path.stem not in ("preference", "prompts"))
    return [line for line in text.split("\n") if line]


@pytest.fixture(scope="session")
def sentencepiece_folder(tmp_path_factory, corpus) -> Path:
    """A LLaMA-class tokenizer: SentencePiece BPE with byte fallback and a blank put before the text."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("sentencepiece")
    (folder / "corpus.txt").write_text("\n".join(corpus), "utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"), model_prefix=str(folder / "tokenizer"), vocab_size=1000, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, character_coverage=0.98, minloglevel=2)
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True, "legacy": False}))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


@pytest.fixture(scope="session")
def bytelevel_folder(tmp_path_factory, corpus) -> Path:
    """A GPT-2-class tokenizer: byte-level BPE."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.train_from_iterator(corpus, trainers.BpeTrainer(
        vocab_size=1000, special_tokens=["<|begin|>", "<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    folder = tmp_path_factory.mktemp("bytelevel")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token="<|end|>").save_pretrained(folder)
    return folder


@pytest.fixture(params=["sentencepiece", "bytelevel"])
def tokenizer(request, sentencepiece_folder, bytelevel_folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained({"sentencepiece": sentencepiece_folder, "bytelevel": bytelevel_folder}[request.param])


def make_model(folder: Path, tokenizer, **config) -> Path:
    """A random LLaMA of two layers with a tokenizer, saved."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
                 initializer_range=0.2)  # a head of smaller rows could not be sure of anything
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, **sizes | config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, bytelevel_folder) -> Path:
    from transformers import AutoTokenizer

    return make_model(tmp_path_factory.mktemp("model"), AutoTokenizer.from_pretrained(bytelevel_folder))


@pytest.fixture
def calls(tmp_path):
    """Run a command in a folder that has scripts/, with stubs on PATH for all that is slow or far away; returns the words of each call of one."""
    stub = """#!/bin/sh
name=${0##*/}
[ $name = nvidia-smi ] && exit 1  # no GPU
[ "$1" = -c ] && exit 0  # is this installed?
[ "$1" = scripts/default_model.py ] && echo the/default/model
printf '%s\\0' $name "$@" >> "$CALLS" && printf '\\036' >> "$CALLS"
"""
    for name in ("torchrun", "python", "python3", "pip", "curl", "transformers", "vllm", "nvidia-smi"):
        (tmp_path / "stubs").mkdir(exist_ok=True)
        (tmp_path / "stubs" / name).write_text(stub)
        (tmp_path / "stubs" / name).chmod(0o755)
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    for file in ROOT.glob("requirements*.txt"):
        shutil.copy(file, tmp_path)
    (tmp_path / "venv").mkdir()  # for install.sh, which finds it up to date
    subprocess.run("cat requirements*.txt | sha256sum > venv/.installed-requirements.txt", shell=True, cwd=tmp_path, check=True)
    log = tmp_path / "calls"

    def run(*command, **environment) -> list[list[str]]:
        log.write_text("")
        named = {"PATH": f"{tmp_path / 'stubs'}:{os.environ['PATH']}", "CALLS": str(log), "HF_HUB_CACHE": str(tmp_path / "hub"), "VENV": str(tmp_path / "venv")}
        done = subprocess.run(command, env=os.environ | named | environment, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return [call.split("\0")[:-1] for call in log.read_text().split("\x1e")[:-1]]

    return run
