"""export_gguf.py: what is promised of the file, read by gguf and by transformers' own reader, and by llama.cpp where it is installed."""
import errno
import json
import re
import shutil
from functools import partial
from pathlib import Path

import gguf
import jinja2
import pytest
import torch
from conftest import ROOT, make_model
from gguf.quants import dequantize
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, MistralConfig, Qwen2Config, Qwen3Config

import export_gguf
import extend_vocab
from utils import SHORTEST, TEMPLATES, BadInput, Chat, RunStopped

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
SIZES = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
             initializer_range=0.2, rope_parameters={"rope_type": "default", "rope_theta": 20000.0})
FAMILIES = {  # what makes each another model for llama.cpp
    "llama": dict(model_type="llama"),
    "llama, tied": dict(model_type="llama", tie_word_embeddings=True),
    "llama, biased": dict(model_type="llama", attention_bias=True, mlp_bias=True),
    "llama 3": dict(model_type="llama", rope_parameters=LLAMA3 | {"rope_theta": 50000.0}),
    "llama, linear": dict(model_type="llama", rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}),
    "mistral": dict(model_type="mistral", head_dim=32, sliding_window=512),
    "qwen2": dict(model_type="qwen2"),
    "qwen2, yarn": dict(model_type="qwen2", rope_parameters={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}),
    "qwen3": dict(model_type="qwen3", head_dim=128, tie_word_embeddings=True),
}
READ_BY_TRANSFORMERS = ["llama", "llama, tied", "mistral", "qwen2", "qwen3"]  # its reader knows no biases of LLaMA, and no scaled positions
PIECES = ["羊驼", "大模型", "模型", "中文词表", "词表", "。”", "你好", "训练"]


def make(folder: Path, tokenizer, **config) -> Path:
    """A random model in f16, so that f16 loses nothing; biases and norms are random too."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(**SIZES | config, vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.2 * torch.randn_like(parameter)
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def export(folder: Path, **flags) -> Path:
    file = folder.parent / f"{folder.name}-{flags.get('type', 'f16')}.gguf"
    export_gguf.main(model_name_or_path=str(folder), output_file=str(file), **flags)
    return file


def fields(file: Path) -> dict:
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


def extended(base: Path, folder: Path, **flags) -> Path:
    (folder.parent / "pieces.txt").write_text("\n".join(PIECES), "utf-8")
    extend_vocab.main(model_name_or_path=str(base), pieces=str(folder.parent / "pieces.txt"), output_dir=str(folder), **flags)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory, bytelevel_folder, sentencepiece_folder) -> dict[str, Path]:
    """A random LLaMA with each kind of vocabulary, its own and a longer one."""
    above, found = tmp_path_factory.mktemp("models"), {}
    for kind, source in (("bytelevel", bytelevel_folder), ("sentencepiece", sentencepiece_folder)):
        found[kind] = make(above / kind, AutoTokenizer.from_pretrained(source), model_type="llama")
        found[f"{kind}, longer"] = extended(found[kind], above / f"{kind}-longer")
    return found


@pytest.fixture(scope="module")
def files(models) -> dict[str, Path]:
    return {kind: export(folder) for kind, folder in models.items()}


# ---- vocabulary ----
@pytest.mark.parametrize("kind", ["bytelevel", "bytelevel, longer", "sentencepiece", "sentencepiece, longer"])
def test_a_vocabulary_read_back_gives_every_line_the_same_ids(kind, models, files, corpus):
    ours, theirs = AutoTokenizer.from_pretrained(models[kind]), AutoTokenizer.from_pretrained(files[kind].parent, gguf_file=files[kind].name)
    encode = lambda tokenizer: [encoding.ids for encoding in tokenizer.backend_tokenizer.encode_batch([line.strip() for line in corpus + PIECES], add_special_tokens=False)]
    assert encode(ours) == encode(theirs)
    assert not kind.endswith("longer") or any(i >= 1000 for ids in encode(ours) for i in ids)
