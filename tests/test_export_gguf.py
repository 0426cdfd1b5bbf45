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
from conftest import ROOT
from gguf.quants import dequantize
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

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


def test_pieces_are_told_by_type_and_rows_without_a_token_are_unused(models, files):
    tokenizer, found = AutoTokenizer.from_pretrained(models["sentencepiece, longer"]), fields(files["sentencepiece, longer"])
    kinds = dict(zip(found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]))
    rows = AutoConfig.from_pretrained(models["sentencepiece, longer"]).vocab_size
    assert len(found["tokenizer.ggml.tokens"]) == len(kinds) == rows > len(tokenizer)
    assert (kinds["<unk>"], kinds["<s>"], kinds["<0x0A>"], kinds["羊驼"]) == (gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.BYTE, gguf.TokenType.NORMAL)
    assert set(found["tokenizer.ggml.token_type"][len(tokenizer):]) == {gguf.TokenType.UNUSED}


@pytest.mark.parametrize("steps, ignore_merges, name", [
    ([{"Digits": True}, {"ByteLevel": True}], False, "smollm"),
    ([{"ByteLevel": True}], False, "gpt-2"),
    ([{"Split": export_gguf.WORDS % r"\p{N}"}, {"ByteLevel": False}], False, "qwen2"),
    ([{"Split": export_gguf.WORDS % r"\p{N}{1,3}"}, {"ByteLevel": False}], True, "llama-bpe"),
    ([{"Split": export_gguf.WORDS % r"\p{N}{1,3}"}, {"ByteLevel": False}], False, "llama-bpe"),  # the merges make every piece
    ([{"Split": export_gguf.WORDS % r"\p{N}"}, {"ByteLevel": False}], True, None),
    ([{"Split": r"\s+"}, {"ByteLevel": False}], False, None),
])
def test_what_cuts_a_text_is_named_or_refused(steps, ignore_merges, name, bytelevel_folder, tmp_path):
    tokenizer = cutting(bytelevel_folder, tmp_path / "tokenizer", steps, ignore_merges)
    find = lambda: export_gguf.pre_tokenizer(json.loads(tokenizer.backend_tokenizer.to_str()), tokenizer)
    if name:
        assert find() == name
    else:
        with pytest.raises(BadInput, match="cuts a text by .* start from a base|ignore_merges"):
            find()


def cutting(source: Path, folder: Path, steps: list[dict], ignore_merges: bool):
    """A byte-level tokenizer with other cuts before it merges."""
    from tokenizers import Regex, pre_tokenizers

    make_step = {"Digits": lambda each: pre_tokenizers.Digits(individual_digits=each), "Split": lambda pattern: pre_tokenizers.Split(Regex(pattern), "isolated"),
                 "ByteLevel": lambda regex: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)}
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([make_step[kind](how) for step in steps for kind, how in step.items()])
    tokenizer.backend_tokenizer.model.ignore_merges = ignore_merges
    tokenizer.save_pretrained(folder)
    return tokenizer


def test_sentencepiece_merges_come_back_as_scores_even_where_a_short_piece_came_late(sentencepiece_folder):
    """羊驼's second character with the third becomes a piece after the whole: then no merge joins the first with the other two."""
    usual = {"羊": 0, "驼": 1, "毛": 2, "羊驼": 3, "羊驼毛": 4, "驼毛": 5}
    merges = [("羊", "驼"), ("羊驼", "毛"), ("驼", "毛")]
    assert export_gguf.merge_scores([*usual], usual, merges, "x")[3:] == [0.0, -1.0, -2.0]
    with pytest.raises(BadInput, match="no merge makes the piece '羊驼毛' of '羊驼' and '毛'"):
        export_gguf.merge_scores([*usual], usual, [("羊", "驼"), ("驼", "毛")], "x")


# ---- chat ----
@pytest.mark.parametrize("template", [name for name in TEMPLATES if name != "plain"])
@pytest.mark.parametrize("kind", ["bytelevel", "sentencepiece"])
def test_a_chat_model_brings_template_and_stop_tokens(template, kind, models, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(models[kind])
    chat = Chat(tokenizer, template)
    found = export_gguf.read_vocabulary(tokenizer, Chat(tokenizer), len(tokenizer))
    stop = "<|im_end|>" if template == "chatml" else "<|End|>" if template == "yayi" else tokenizer.eos_token
    assert tokenizer.convert_tokens_to_ids(stop) in (found["special_ids"].get("eot"), found["special_ids"]["eos"])
    # llama.cpp puts BOS before the prompt, and takes away the template's own: the prompt is to begin as in training
    prompt, ids = chat.render(SHORTEST[:1], True)[0], [i for ids, _ in chat.encode(SHORTEST[:1], True) for i in ids]
    assert not found["add_bos_token"] or prompt.startswith(tokenizer.bos_token)
    assert not found["add_space_prefix"] and ids[0] in chat.control.values()
    go = export_gguf.ollama_template(chat, found["add_bos_token"])
    for words, tag in (("{{ if .System }}", "{% if system %}"), ("{{ else }}", "{% else %}"), ("{{ range .Messages }}", "{% for m in messages %}"),
                       ('{{ if eq .Role "user" }}', "{% if m.role == 'user' %}"), ('{{ else if eq .Role "assistant" }}', "{% elif m.role == 'assistant' %}"),
                       ("{{ end }}{{ end }}", "{% endif %}{% endfor %}"), ("{{ end }}", "{% endif %}"), (".System", "system"), (".Content", "m.content")):
        go = go.replace(words, tag)
    rounds = [{"role": role, "content": text} for role, text in (("user", "你好"), ("assistant", "好\n好"), ("user", "1 + 1"), ("assistant", "2"), ("user", "谢谢"))]
    for system in [[], [{"role": "system", "content": "一句话"}]]:
        text = jinja2.Environment(keep_trailing_newline=True).from_string(go).render(system=system[0]["content"] if system else "", messages=system + rounds)
        wanted = chat.render(system + rounds, True)[0]
        assert tokenizer.bos_token * found["add_bos_token"] + text == wanted


def test_the_template_in_the_file_is_one_that_any_jinja_reads(models, tmp_path):
    shutil.copytree(models["sentencepiece"], tmp_path / "chat")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "chat")
    chat = Chat(tokenizer, "llama2_chinese")
    tokenizer.save_pretrained(tmp_path / "chat")
    found = fields(export(tmp_path / "chat"))
    assert "generation %}" in tokenizer.chat_template and found["tokenizer.ggml.add_bos_token"] is True
    text = jinja2.Environment().from_string(found["tokenizer.chat_template"]).render(messages=SHORTEST, bos_token="<s>", eos_token="</s>")
    assert text == chat.render(SHORTEST)[0]
    modelfile = (tmp_path / "chat-f16.Modelfile").read_text("utf-8")
    assert modelfile.startswith("FROM ./chat-f16.gguf\nTEMPLATE") and 'PARAMETER stop "</s>"' in modelfile


# ---- weights ----
@pytest.mark.parametrize("family", READ_BY_TRANSFORMERS)
def test_a_model_read_back_answers_as_before(family, tmp_path, bytelevel_folder):
    folder = make(tmp_path / "model", AutoTokenizer.from_pretrained(bytelevel_folder), **FAMILIES[family])
    file, ids = export(folder), torch.tensor([[5, 6, 7, 600, 9, 10, 11]])
    with torch.no_grad():
        before = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
        after = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)(ids).logits
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)
    assert ("output.weight" in {tensor.name for tensor in gguf.GGUFReader(file).tensors}) == ("tie" not in str(FAMILIES[family]))


@pytest.mark.parametrize("type, bits, error", [("bf16", 16, 2**-8), ("q8_0", 8.5, 1 / 127), ("q4_1", 5, 1 / 15), ("q4_0", 4.5, 1 / 8)])
def test_a_weight_takes_the_bits_of_its_type_and_is_as_near_as_they_allow(type, bits, error, models):
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(export(models["bytelevel"], type=type)).tensors}
    weight = load_file(models["bytelevel"] / "model.safetensors")["model.layers.1.mlp.down_proj.weight"].float()
    down, table, norm = tensors["blk.1.ffn_down.weight"], tensors["token_embd.weight"], tensors["output_norm.weight"]
    assert down.n_bytes * 8 / down.n_elements == bits and norm.tensor_type == gguf.GGMLQuantizationType.F32
    assert table.tensor_type.name == ("Q8_0" if type.startswith("q") else type.upper())
    blocks = lambda tensor: tensor.reshape(-1, 32)
    spread = blocks(weight).amax(1, keepdim=True).clamp(min=0) - blocks(weight).amin(1, keepdim=True).clamp(max=0)
    assert ((blocks(torch.from_numpy(dequantize(down.data, down.tensor_type)) - weight)).abs() <= error * spread).all()


def test_rows_that_are_no_whole_blocks_stay_in_16_bit(tmp_path, bytelevel_folder):
    folder = make(tmp_path / "model", AutoTokenizer.from_pretrained(bytelevel_folder), model_type="llama", intermediate_size=100)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(export(folder, type="q4_0")).tensors}
    assert (kinds["blk.0.ffn_down.weight"], kinds["blk.0.ffn_up.weight"]) == ("F16", "Q4_0")


def test_a_weight_is_the_same_whether_it_goes_in_one_piece_or_in_many(models, tmp_path, monkeypatch):
    shutil.copytree(models["bytelevel"], tmp_path / "model")
    whole = export(tmp_path / "model", type="q8_0").read_bytes()
    for file in tmp_path.glob("*8_0*"):
        file.unlink()
    monkeypatch.setattr(export_gguf, "ROWS_AT_ONCE", 16 * 64)
    assert export(tmp_path / "model", type="q8_0").read_bytes() == whole


def test_positions_that_are_scaled_are_described(tmp_path, bytelevel_folder):
    tokenizer = AutoTokenizer.from_pretrained(bytelevel_folder)
    file = export(make(tmp_path / "llama3", tokenizer, **FAMILIES["llama 3"]))
    factors = next(tensor.data for tensor in gguf.GGUFReader(file).tensors if tensor.name == "rope_freqs.weight")
    assert len(factors) == 8 and factors[0] == 1 and abs(factors[-1] - 8) < 1e-4  # the fastest turn as they did, the slowest 8 times as slowly
    yarn = fields(export(make(tmp_path / "yarn", tokenizer, **FAMILIES["qwen2, yarn"])))
    assert [yarn[f"qwen2.rope.scaling.{name}"] for name in ("type", "factor", "original_context_length")] == ["yarn", 4.0, 64]
    mistral = fields(export(make(tmp_path / "mistral", tokenizer, **FAMILIES["mistral"])))
    assert (mistral["general.architecture"], mistral["llama.context_length"], mistral["llama.attention.key_length"]) == ("llama", 512, 32)


# ---- a whole file or none ----
def test_a_run_that_ends_early_leaves_nothing_and_the_next_one_is_whole(models, tmp_path, monkeypatch):
    shutil.copytree(models["bytelevel"], tmp_path / "model")
    parts_of, begun = export_gguf.parts_of, []

    def full_disk(*args):
        begun.append(args)
        if len(begun) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        return parts_of(*args)

    monkeypatch.setattr(export_gguf, "parts_of", full_disk)
    with pytest.raises(OSError, match="No space left"):
        export(tmp_path / "model")
    assert {path.name for path in tmp_path.iterdir()} == {"model"}
    assert export(tmp_path / "model").is_file()


def test_a_full_disk_leaves_no_model_without_its_modelfile(models, tmp_path, monkeypatch):
    shutil.copytree(models["bytelevel"], tmp_path / "model")
    write_text = Path.write_text

    def full_disk(path, *args):
        if "Modelfile" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_text(path, *args)

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(OSError, match="No space left"):
        export(tmp_path / "model")
    monkeypatch.undo()
    assert {path.name for path in tmp_path.iterdir()} == {"model"}
    assert export(tmp_path / "model").with_suffix(".Modelfile").is_file()


def test_weights_beyond_f16_are_not_written_as_infinite(models, tmp_path):
    shutil.copytree(models["bytelevel"], tmp_path / "model")
    state = {name: tensor.float() for name, tensor in load_file(tmp_path / "model" / "model.safetensors").items()}
    state["model.layers.0.mlp.up_proj.weight"][3, 3] = 1e5
    save_file(state, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    with pytest.raises(RunStopped, match="take --type bf16"):
        export(tmp_path / "model")
    assert export(tmp_path / "model", type="bf16").is_file()


def break_nothing(folder: Path) -> None:
    pass


def change_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def make_adapter(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "my/base"}')


def add_token(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["一百零一"])
    tokenizer.save_pretrained(folder)


def drop_weight(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    del state["model.norm.weight"]
    save_file(state, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("spoil, flags, message", [
    (partial(change_config, model_type="bloom"), {}, "is a model of the kind bloom, which is not known here"),
    (partial(change_config, quantization_config={"bits": 4}), {}, "is quantized: give the 16-bit model"),
    (make_adapter, {}, "python merge_lora.py --model_name_or_path my/base --lora_path"),
    (break_nothing, {"output_file": "there.gguf"}, "there.gguf exists"),
    (break_nothing, {"output_file": "model.bin"}, "must end in .gguf"),
    (break_nothing, {"output_file": "there.gguf/x.gguf"}, "not a folder that can be written to"),
    (break_nothing, {"eval_path": "nowhere.txt"}, "--eval_path=nowhere.txt does not exist"),
    (add_token, {}, "its tokenizer has 1,001 tokens, the model 1,000 rows, so '一百零一' has none"),
    (drop_weight, {}, "lacks model.norm.weight"),
    (partial(change_config, hidden_act="gelu"), {}, "silu"),
    (partial(change_config, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}), {}, "scaled by dynamic"),
])
def test_bad_input_is_said_and_nothing_is_written(spoil, flags, message, models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(models["bytelevel"], tmp_path / "model")
    Path("there.gguf").write_text("mine")
    spoil(tmp_path / "model")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(BadInput, match=re.escape(message)):
        export_gguf.main(**{"model_name_or_path": "model", "output_file": "new.gguf"} | flags)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_disk_too_small_is_said_before_anything_is_written(models, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 0, 200_000))
    with pytest.raises(BadInput, match="0.0 GB are free, .* or take a smaller --type"):
        export_gguf.main(model_name_or_path=str(models["bytelevel"]), output_file=str(tmp_path / "new.gguf"))
    assert not list(tmp_path.iterdir())


# ---- llama.cpp itself: compiled for minutes, so where it is installed already ----
@pytest.fixture
def llama_cpp(monkeypatch):
    monkeypatch.setattr(export_gguf, "COMPARED", 100)
    return pytest.importorskip("llama_cpp", reason="pip install llama-cpp-python==0.3.36 takes minutes")


@pytest.mark.parametrize("kind", ["bytelevel", "bytelevel, longer", "sentencepiece", "sentencepiece, longer"])
@pytest.mark.parametrize("template", [None, "chatml", "llama2_chinese"])
def test_llama_cpp_gives_every_line_the_same_ids(kind, template, llama_cpp, models, files, tmp_path, capsys):
    folder = models[kind]
    if template:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        new = Chat(tokenizer, template).new_tokens
        shutil.copytree(folder, folder := tmp_path / "model")
        if new:
            model = AutoModelForCausalLM.from_pretrained(folder)
            model.resize_token_embeddings(max(len(tokenizer), model.config.vocab_size))
            model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    else:
        shutil.copytree(folder, folder := tmp_path / "model")
    export(folder, eval_path=str(ROOT / "sample" / "corpus.txt"))
    equal = json.loads(capsys.readouterr().out.splitlines()[-1])["ids_equal"]
    assert set(equal) == {"the vocabulary", "English", "code", "corpus"} and set(equal.values()) == {1.0}


@pytest.mark.parametrize("steps, ignore_merges", [
    ([{"Digits": True}, {"ByteLevel": True}], False), ([{"Split": export_gguf.WORDS % r"\p{N}"}, {"ByteLevel": False}], False),
    ([{"Split": export_gguf.WORDS % r"\p{N}{1,3}"}, {"ByteLevel": False}], True), ([{"Split": [*export_gguf.PRE_TOKENIZERS][-1][0]}, {"ByteLevel": False}], True)])
def test_llama_cpp_cuts_a_text_as_the_name_says(steps, ignore_merges, llama_cpp, bytelevel_folder, tmp_path, capsys):
    export(make(tmp_path / "model", cutting(bytelevel_folder, tmp_path / "tokenizer", steps, ignore_merges), model_type="llama"), eval_path=str(ROOT / "sample" / "corpus.txt"))
    assert set(json.loads(capsys.readouterr().out.splitlines()[-1])["ids_equal"].values()) == {1.0}


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_says_the_same_greedy_tokens(family, llama_cpp, tmp_path, bytelevel_folder):
    folder = make(tmp_path / "model", AutoTokenizer.from_pretrained(bytelevel_folder), **FAMILIES[family])
    ids = torch.randint(1000, (1, 100), generator=torch.Generator().manual_seed(0))  # beyond what positions are scaled from
    peer = llama_cpp.Llama(str(export(folder)), n_ctx=256, n_threads=1, verbose=False, logits_all=True)
    peer.eval(ids[0].tolist())
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits[0]
    found = torch.from_numpy(peer.scores[:100].copy())
    assert (found - wanted).abs().max() < 0.02 * wanted.std()  # it multiplies by f16, and keeps keys and values in it
    assert (found.argmax(-1) == wanted.argmax(-1)).float().mean() > 0.97
