"""A longer vocabulary: ids that never move, merges that reach every new piece, rows that disturb nothing."""
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import ROOT, make_model
from test_stages import weights

import extend_vocab
from utils import BadInput

ENGLISH = ["The quick brown fox jumps over 13 lazy dogs.", "  indented,\ttabbed  and spaced   out ", "naïve café — “quoted” … 100 %", "def main(x: int = 2):", "    return {'a': x[1:]}  # ok", ""]
AWKWARD = ["你好，世界！🐪👩‍👩‍👧", "龘靐𠀀𪚥 rare", "tab\t换行\n\n回车\r\n 两边 ", "ａｂｃ①②〇々", "\u200b\ufeff\u0301零宽", "한국어 русский العربية ไทย", "�\x00\x1f", "<s> 不是 </s> <|im_start|> 控制符", "a▁b Ġ的"]
RUN = dict(num_pieces=1200, character_coverage=0.98)
CONTROL = ["<|im_start|>", "<|im_end|>", "<pad>"]


@pytest.fixture(scope="module")
def text_file(tmp_path_factory, corpus) -> Path:
    """A corpus that repeats itself, so that words can be learned from it."""
    file = tmp_path_factory.mktemp("text") / "novel.txt"
    generator = random.Random(0)
    file.write_text("\n".join(" ".join(generator.sample(corpus, 3)) for _ in range(200)), "utf-8")
    return file


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    """Models that know no Chinese: a SentencePiece one in several files with a head of its own, and a byte-level one."""
    import sentencepiece
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("bases")
    english = [line for name in ("LICENSE", "utils.py") for line in (ROOT / name).read_text("utf-8").split("\n")]
    (folder / "english.txt").write_text("\n".join(english), "utf-8")
    for kind in ("sentencepiece", "bytelevel"):
        (folder / kind).mkdir()
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "english.txt"), model_prefix=str(folder / "sentencepiece" / "tokenizer"), vocab_size=800, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, minloglevel=2)
    (folder / "sentencepiece" / "tokenizer.vocab").unlink()
    (folder / "sentencepiece" / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True, "legacy": False}))
    (folder / "sentencepiece" / "config.json").write_text('{"model_type": "llama"}')
    make_model(folder / "sentencepiece", AutoTokenizer.from_pretrained(folder / "sentencepiece"))
    model = LlamaForCausalLM.from_pretrained(folder / "sentencepiece").to(torch.bfloat16)
    (folder / "sentencepiece" / "model.safetensors").unlink()
    model.save_pretrained(folder / "sentencepiece", max_shard_size="100KB")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.train_from_iterator(english + [" 中 中 中 的的的的"] * 9, trainers.BpeTrainer(
        vocab_size=800, special_tokens=["<|begin|>", "<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    make_model(folder / "bytelevel", PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token="<|end|>"), tie_word_embeddings=True)
    return {kind: folder / kind for kind in ("sentencepiece", "bytelevel")}


@pytest.fixture(scope="module")
def results(tmp_path_factory, bases, text_file) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("results")
    for kind, base in bases.items():
        extend_vocab.main(model_name_or_path=str(base), corpus_path=str(text_file), output_dir=str(folder / kind), add_tokens=",".join(CONTROL), **RUN)
    return {kind: folder / kind for kind in bases}


@pytest.fixture(params=["sentencepiece", "bytelevel"])
def kind(request):
    return request.param


def resized(folder, rows):
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(rows, mean_resizing=False)
    model.save_pretrained(folder)
    return folder


def load(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def ids(tokenizer, lines):
    return [tokenizer(line, add_special_tokens=False).input_ids for line in lines]


@pytest.fixture
def extend(bases, text_file, tmp_path, capsys):
    """Run extend_vocab; returns its last line."""
    def run(kind="bytelevel", **flags):
        capsys.readouterr()
        extend_vocab.main(**dict(model_name_or_path=str(bases[kind]), corpus_path=str(text_file), output_dir=str(tmp_path / "out")) | RUN | flags)
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


# ---- ids ----
def test_old_ids_never_move_and_new_ones_follow(bases, results, kind):
    old, new = load(bases[kind]).get_vocab(), load(results[kind]).get_vocab()
    assert {piece: new[piece] for piece in old} == old
    assert sorted(i for piece, i in new.items() if piece not in old) == list(range(len(old), len(old) + 1203))
    assert [load(results[kind]).convert_ids_to_tokens(len(old) + 1200 + n) for n in range(3)] == CONTROL


def test_english_and_code_keep_their_ids(bases, results, kind):
    lines = ENGLISH + [line for line in (ROOT / "utils.py").read_text("utf-8").split("\n") if line.isascii() and not any(token in line for token in CONTROL)]
    assert ids(load(results[kind]), lines) == ids(load(bases[kind]), lines)


def test_chinese_takes_fewer_tokens_and_every_new_piece_can_come_up(bases, results, kind, text_file):
    lines = text_file.read_text("utf-8").split("\n")
    old, new = load(bases[kind]), load(results[kind])
    assert sum(map(len, ids(new, lines))) < 0.9 * sum(map(len, ids(old, lines)))
    pieces = new.convert_ids_to_tokens(range(len(old), len(old) + 1200))
    assert all([token.id for token in new.backend_tokenizer.model.tokenize(piece)] == [len(old) + n] for n, piece in enumerate(pieces))


def test_any_text_comes_back_as_it_was(results, kind, corpus):
    tokenizer = load(results[kind])
    assert [tokenizer.decode(i) for i in ids(tokenizer, AWKWARD[:-2] + corpus)] == AWKWARD[:-2] + corpus
    if kind == "bytelevel":
        assert [tokenizer.decode(i) for i in ids(tokenizer, ["  两个空格开头", *AWKWARD[-1:]])] == ["  两个空格开头", *AWKWARD[-1:]]


def test_auto_llama_and_sentencepiece_give_the_same_ids(results, corpus):
    import sentencepiece
    from transformers import LlamaTokenizer

    folder = results["sentencepiece"]
    auto, llama, model = load(folder), LlamaTokenizer.from_pretrained(folder), sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
    lines = [line.strip() for line in corpus + ENGLISH + AWKWARD if "s>" not in line and "|>" not in line and "▁" not in line]
    assert ids(auto, lines) == ids(llama, lines) == model.encode(lines)
    assert auto("你好").input_ids == llama("你好").input_ids == [auto.bos_token_id] + model.encode("你好")
    assert len(model) == len(auto) == len(llama) and model.is_control(auto.convert_tokens_to_ids("<pad>"))
    raw = ["  两个空格开头", " ", "", *AWKWARD]  # transformers drops a blank at the beginning, in the base too; sentencepiece keeps it
    assert model.decode(model.encode(raw)) == [line.replace("▁", " ") for line in raw]


def test_a_double_blank_is_merged_alike_by_sentencepiece_and_transformers(bases, tmp_path, extend):
    """LLaMA scores it below all else, and transformers goes by ids where there is no tokenizer.json."""
    import sentencepiece
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    base = tmp_path / "base"
    shutil.copytree(bases["sentencepiece"], base)
    (base / "tokenizer.json").unlink()
    model = ModelProto.FromString((base / "tokenizer.model").read_bytes())
    place = next(i for i, piece in enumerate(model.pieces) if len(piece.piece) == 2)
    model.pieces[place].piece, model.pieces[place].score = "▁▁", -1e9
    (base / "tokenizer.model").write_bytes(model.SerializeToString())
    extend(model_name_or_path=str(base))
    lines = ["a  b", "x =  1   # 你好    世界", "你  好  啊"]
    assert ids(load(tmp_path / "out"), lines) == sentencepiece.SentencePieceProcessor(str(tmp_path / "out" / "tokenizer.model")).encode(lines)
    assert ids(load(tmp_path / "out"), ENGLISH) == ids(load(base), ENGLISH)


def test_control_tokens_are_control_tokens(results, kind):
    tokenizer = load(results[kind])
    first = tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert ids(tokenizer, ["<|im_start|>"]) == [[first]] and tokenizer.pad_token == "<pad>"
    assert tokenizer.decode([first, *ids(tokenizer, ["你好"])[0], first + 2], skip_special_tokens=True) == "你好"
    assert json.loads((results[kind] / "config.json").read_text())["pad_token_id"] == first + 2


def test_a_folder_with_tokenizer_model_alone_gets_bos_and_blank(bases, tmp_path, extend):
    base = tmp_path / "base"
    shutil.copytree(bases["sentencepiece"], base, ignore=shutil.ignore_patterns("tokenizer*.json", "special*"))
    extend(model_name_or_path=str(base))
    assert load(tmp_path / "out")("hello").input_ids == load(bases["sentencepiece"])("hello").input_ids
    assert load(tmp_path / "out")("hello").input_ids[0] == load(tmp_path / "out").bos_token_id


def test_the_same_input_gives_the_same_bytes_in_another_process(bases, results, text_file, tmp_path):
    calls = [dict(model_name_or_path=str(base), corpus_path=str(text_file), output_dir=str(tmp_path / kind), add_tokens=",".join(CONTROL), **RUN) for kind, base in bases.items()]
    subprocess.run([sys.executable, "-c", f"import extend_vocab\nfor flags in {calls}: extend_vocab.main(**flags)"], cwd=ROOT, check=True, capture_output=True,
                   env=os.environ | {"PYTHONHASHSEED": "77", "OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"})
    for kind, folder in results.items():
        assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in (tmp_path / kind).iterdir())
        assert all(path.read_bytes() == (tmp_path / kind / path.name).read_bytes() for path in folder.iterdir())


def test_control_tokens_behind_the_pieces_keep_their_ids_and_unused_rows_are_used(bases, tmp_path, extend):
    """As in LLaMA 3 and Qwen: control tokens have the last ids, and the matrix has more rows than there are tokens."""
    tokenizer = load(bases["bytelevel"])
    tokenizer.add_tokens(["<|eot|>", "<|tool|>"], special_tokens=True)
    base = resized(make_model(tmp_path / "base", tokenizer), 1000)
    report = extend(model_name_or_path=str(base), num_pieces=1000)
    result = load(tmp_path / "out")
    assert ids(result, ["<|eot|>你<|tool|>"])[0][0] == 800 and result.convert_tokens_to_ids("<|tool|>") == 801
    assert min(i for piece, i in result.get_vocab().items() if piece not in tokenizer.get_vocab()) == 802
    old, new = weights(base)["model.embed_tokens.weight"], weights(tmp_path / "out")["model.embed_tokens.weight"]
    assert report["vocab_size"] == len(new) == 1920 and torch.equal(new[:802], old[:802])


# ---- pieces ----
def test_pieces_that_are_there_are_skipped_and_counted_and_words_are_reached(bases, tmp_path, extend, capsys, kind):
    old = load(bases[kind])
    listed = ["羊驼训练师", "羊驼", "𠮷野家", "羊驼", "er", "的", "A股", "龘"]
    (tmp_path / "pieces.txt").write_text("\n".join(listed) + "\n", "utf-8")
    extend_vocab.main(model_name_or_path=str(bases[kind]), pieces=str(tmp_path / "pieces.txt"), output_dir=str(tmp_path / "out"))
    said = capsys.readouterr()
    new = load(tmp_path / "out")
    prefix = ids(new, ["。"])[0]  # so that SentencePiece's first blank is not in the way
    for word in ("羊驼训练师", "羊驼", "𠮷野家", "A股", "龘"):
        assert ids(new, [f"。{word}"])[0] == prefix + ids(new, [f"。{word}"])[0][-1:] and len(ids(old, [f"。{word}"])[0]) > len(prefix) + 1
    there = 1 + (kind == "bytelevel")  # er, 的
    assert f" {there} already there" in said.err and f" {7 - there} added" in said.err and "of 7 pieces given" in said.err
    assert ids(new, ENGLISH) == ids(old, ENGLISH) and json.loads(said.out.splitlines()[-1])["pieces_unreached"] == 0


def test_a_piece_whose_merging_would_change_english_is_skipped(bases, tmp_path, capsys, kind):
    (tmp_path / "pieces.txt").write_text("qzxj股\n羊驼\n", "utf-8")
    extend_vocab.main(model_name_or_path=str(bases[kind]), pieces=str(tmp_path / "pieces.txt"), output_dir=str(tmp_path / "out"))
    assert "1 that bring some without Chinese" in capsys.readouterr().err
    assert ids(load(tmp_path / "out"), ["qzxj qz"]) == ids(load(bases[kind]), ["qzxj qz"])


def test_a_piece_that_byte_level_bpe_would_cut_apart_is_skipped(bases, tmp_path, capsys):
    (tmp_path / "pieces.txt").write_text("好。好\n羊驼\n", "utf-8")
    extend_vocab.main(model_name_or_path=str(bases["bytelevel"]), pieces=str(tmp_path / "pieces.txt"), output_dir=str(tmp_path / "out"))
    said = capsys.readouterr()
    assert "1 cut apart before any merge" in said.err and json.loads(said.out.splitlines()[-1])["pieces_unreached"] == 0


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_a_ready_sentencepiece_model_is_merged(tmp_path, text_file, extend, kind, model_type):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(input=str(text_file), model_prefix=str(tmp_path / "ready"), vocab_size=1200, hard_vocab_limit=False, model_type=model_type, minloglevel=2)
    report = extend(kind, pieces=str(tmp_path / "ready.model"), corpus_path=None, eval_path=str(text_file))
    assert report["new_pieces"] > 200 and report["pieces_unreached"] == 0 and report["lines_unchanged"] == 1 and report["times_fewer_tokens"] > 1.2


def test_unigram_pieces_are_learned_and_reached(extend, kind):
    report = extend(kind, model_type="unigram", num_pieces=420)
    assert report["new_pieces"] == 420 and report["pieces_unreached"] == 0 and report["times_fewer_tokens"] > 1.05


def test_a_large_corpus_is_sampled_alike_whatever_its_order(text_file, tmp_path):
    lines = text_file.read_text("utf-8").split("\n")
    (tmp_path / "turned.txt").write_text("\n".join(reversed(lines)), "utf-8")
    half = text_file.stat().st_size / 2e6
    texts, runs = extend_vocab.read_corpus(str(text_file), half, 42)
    turned_texts, turned_runs = extend_vocab.read_corpus(str(tmp_path / "turned.txt"), half, 42)
    assert runs == turned_runs and sorted(texts["novel"]) == sorted(turned_texts["turned"])
    assert 0.3 < sum(runs.values()) / sum(extend_vocab.read_corpus(str(text_file), 64, 42)[1].values()) < 0.7
    assert extend_vocab.read_corpus(str(text_file), half, 43)[1] != runs
    learned = [extend_vocab.learn_pieces(found, 1500, "bpe", 0.98) for found in (runs, turned_runs)]
    assert learned[0] == learned[1] and list(runs) != list(turned_runs)


def test_records_of_any_schema_are_text(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "一问\n二问"}], "n": 3}) + "\n\n" + json.dumps({"text": "三"}) + "\n", "utf-8")
    (tmp_path / "b.json").write_text(json.dumps([{"instruction": "四", "output": None}]), "utf-8")
    (tmp_path / "c.md").write_text("不读", "utf-8")
    _, runs = extend_vocab.read_corpus(str(tmp_path), 64, 1, held_out=10**9)
    assert sorted(runs) == sorted(["一问", "二问", "三", "四"])


# ---- rows ----
@pytest.mark.parametrize("init", ["mean_of_pieces", "mean"])
def test_new_rows_are_means_of_old_rows_which_stay(bases, extend, tmp_path, kind, init):
    report = extend(kind, init=init, pad_to_multiple_of=64)
    old, new = weights(bases[kind]), weights(tmp_path / "out")
    before, tokenizer = load(bases[kind]), load(tmp_path / "out")
    grown = {"model.embed_tokens.weight"} | ({"lm_head.weight"} if kind == "sentencepiece" else set())
    assert old.keys() == new.keys() and {name for name in old if old[name].shape != new[name].shape} == grown
    assert all(torch.equal(old[name], new[name]) for name in old.keys() - grown)
    for name in grown:
        n = len(before)
        assert new[name].dtype == old[name].dtype and len(new[name]) == report["vocab_size"] == -(-(n + 1200) // 64) * 64
        assert torch.equal(new[name][:n], old[name])
        mean = old[name].float().mean(0)
        for i in (n, n + 600, n + 1199):
            text = tokenizer.convert_ids_to_tokens(i)
            was = [token.id for token in before.backend_tokenizer.model.tokenize(text)]
            torch.testing.assert_close(new[name][i].float(), old[name][was].float().mean(0) if init == "mean_of_pieces" else mean, atol=2e-3, rtol=1e-2)
        torch.testing.assert_close(new[name][n + 1200:].float(), mean.expand(report["vocab_size"] - n - 1200, -1), atol=2e-3, rtol=1e-2)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == report["vocab_size"]
    settings = "generation_config.json"
    assert (tmp_path / "out" / settings).read_bytes() == (bases[kind] / settings).read_bytes()


def test_the_result_loads_and_answers_english_as_its_base(bases, results, kind):
    from transformers import AutoModelForCausalLM

    old, (new, loaded) = AutoModelForCausalLM.from_pretrained(bases[kind]), AutoModelForCausalLM.from_pretrained(results[kind], output_loading_info=True)
    assert not loaded["missing_keys"] and not loaded["mismatched_keys"] and not loaded["unexpected_keys"]
    text = torch.tensor(ids(load(bases[kind]), ["The quick brown fox"]))
    count = old.config.vocab_size
    assert torch.equal(old(text).logits, new(text).logits[..., :count])
    chinese = new(torch.tensor(ids(load(results[kind]), ["你好，公司在哪里"]))).logits.softmax(-1)
    padding = chinese[..., len(load(results[kind])):]
    assert padding.numel() and padding.max() < 1.1 / count and (padding < chinese.max(-1, keepdim=True).values).all()


def test_padding_rows_never_win_even_where_all_logits_are_negative(bases, tmp_path, extend):
    from transformers import LlamaForCausalLM

    base = make_model(tmp_path / "base", load(bases["bytelevel"]), tie_word_embeddings=False)
    model = LlamaForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.model.norm.weight.zero_()
        model.model.norm.weight[0] = 1  # the hidden state's first number alone counts, and by it every logit is far below 0
        model.lm_head.weight[:, 0] = -5 - torch.rand(800)
        model.model.embed_tokens.weight[:, 0] = 50
    model.save_pretrained(base)
    extend(model_name_or_path=str(base))
    logits = LlamaForCausalLM.from_pretrained(tmp_path / "out")(torch.tensor([[5, 6, 7]])).logits
    assert logits.max() < 0 and (logits.argmax(-1) < 2000).all() and logits.shape[-1] > 2000


@pytest.fixture(scope="module")
def steady(tmp_path_factory, bases) -> dict[str, Path]:
    """The bases with a number in their states that hardly changes, as trained models have one: random ones do not."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("steady")
    for kind, base in bases.items():
        model = AutoModelForCausalLM.from_pretrained(base)
        with torch.no_grad():
            model.model.embed_tokens.weight[:, 0] = 4
        shutil.copytree(base, folder / kind, ignore=shutil.ignore_patterns("*.safetensors*"))
        model.save_pretrained(folder / kind, max_shard_size="100KB")
    return {kind: folder / kind for kind in bases}


@pytest.fixture(scope="module")
def shared(tmp_path_factory, steady, text_file) -> dict[str, Path]:
    """As results, with --init share and without control tokens."""
    folder = tmp_path_factory.mktemp("shared")
    for kind, base in steady.items():
        extend_vocab.main(model_name_or_path=str(base), corpus_path=str(text_file), output_dir=str(folder / kind), init="share", **RUN)
    return {kind: folder / kind for kind in steady}


def beginnings(before, after, pieces) -> dict[int, int]:
    """{id of a new piece: the first of its old tokens that holds a part of a Chinese character}"""
    old = {after.convert_tokens_to_ids(piece): [token.id for token in before.backend_tokenizer.model.tokenize(piece)] for piece in pieces}
    chinese = lambda i: before.convert_ids_to_tokens(i).startswith("<0x") or not before.decode([i]).strip().isascii()
    return {new: next(i for i in was if chinese(i)) for new, was in old.items()}


def test_the_pieces_of_a_first_token_share_its_probability_on_chinese(steady, shared, text_file, kind):
    """What begins with an old token has, all together, that token's logit; each piece by how often it stands in the corpus."""
    from transformers import AutoModelForCausalLM

    before, after = load(steady[kind]), load(shared[kind])
    count = len(before)
    first = beginnings(before, after, after.convert_ids_to_tokens(range(count, count + 1200)))
    groups = {token: [token, *(piece for piece, begins in first.items() if begins == token)] for token in set(first.values())}
    lines = text_file.read_text("utf-8").split("\n")[:40]
    old, new = AutoModelForCausalLM.from_pretrained(steady[kind]).float(), AutoModelForCausalLM.from_pretrained(shared[kind]).float()
    text = before("\n".join(lines), return_tensors="pt").input_ids[:, :400]
    with torch.no_grad():
        hidden = old.model(text)[0][0, 50:]
        was, now = (model.lm_head(hidden).log_softmax(-1) for model in (old, new))
    largest = sorted(groups, key=lambda token: -len(groups[token]))[:5]
    for token in largest:
        change = now[:, groups[token]].logsumexp(-1) - was[:, token]
        assert change.mean().abs() < 0.15 and change.std() < 0.4, change
    seen = [i for line in lines for i in ids(after, [line])[0]]
    token = largest[0]
    rare, often = (pick(groups[token][1:], key=seen.count) for pick in (min, max))
    assert seen.count(often) > 5 and (now[:, often] - now[:, rare]).mean() > 1


def test_no_other_row_is_changed_by_shares_and_new_rows_of_the_embedding_are_means(steady, shared, kind):
    before, after = load(steady[kind]), load(shared[kind])
    old, new, table, head = weights(steady[kind]), weights(shared[kind]), "model.embed_tokens.weight", "lm_head.weight"
    pieces, count = after.convert_ids_to_tokens(range(len(before), len(before) + 1200)), len(before)
    first = set(beginnings(before, after, pieces).values())
    changed = (new[head][:count] != old[head if kind == "sentencepiece" else table]).any(1)
    assert {i for i in range(count) if changed[i]} == first and len(first) < 100
    assert torch.equal(new[table][:count], old[table]) and all(torch.equal(new[name], old[name]) for name in old if name not in (head, table))
    was = [token.id for token in before.backend_tokenizer.model.tokenize(pieces[-1])]
    torch.testing.assert_close(new[table][count + 1199].float(), old[table][was].float().mean(0), atol=2e-3, rtol=1e-2)


def test_a_tied_head_gets_rows_of_its_own_and_that_is_said(bases, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    extend_vocab.main(model_name_or_path=str(bases["bytelevel"]), corpus_path=str(ROOT / "sample"),
                      output_dir=str(tmp_path / "out"), init="share", num_pieces=300)
    assert "the head was the embedding, and is a table of its own now" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    model, loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not loaded["missing_keys"] and not loaded["mismatched_keys"] and not loaded["unexpected_keys"]
    assert torch.equal(model.lm_head.weight, weights(tmp_path / "out")["lm_head.weight"]) and not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_a_blank_before_chinese_keeps_its_probability(bases):
    """It begins a new piece, and every word of English: the piece takes its share from the first Chinese token."""
    from collections import Counter

    before = load(bases["sentencepiece"])
    vocabulary = extend_vocab.Vocabulary(before.backend_tokenizer)
    vocabulary.add(["好", "坏", " 好"], 9)
    was = [[token.id for token in vocabulary.base.model.tokenize(piece)] for piece in vocabulary.new]
    shares = extend_vocab.log_shares(vocabulary, vocabulary.tokenizer(), was, Counter({" 好": 3, "坏好": 4}))
    blank, byte = before.convert_tokens_to_ids(["▁", "<0xE5>"])
    assert was[vocabulary.new.index("▁好")][0] == blank and blank not in shares
    found = {piece: round(2.718281828 ** shares[vocabulary.vocab[piece]][1] * 13, 3) for piece in ("好", "坏", "▁好", "<0xE5>")}
    assert found == {"好": 4.5, "坏": 4.5, "▁好": 3.5, "<0xE5>": 0.5} and {begins for begins, _ in shares.values()} == {byte}


def test_a_pickled_base_is_converted_when_allowed(bases, tmp_path, extend):
    base = tmp_path / "base"
    shutil.copytree(bases["bytelevel"], base, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(weights(bases["bytelevel"]), base / "pytorch_model.bin")
    with pytest.raises(BadInput, match="allow_pickle"):
        extend(model_name_or_path=str(base))
    extend(model_name_or_path=str(base), allow_pickle=True)
    assert weights(tmp_path / "out").keys() == weights(bases["bytelevel"]).keys() and not (tmp_path / "out" / "pytorch_model.bin").exists()


def test_the_output_is_whole_or_not_there(extend, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()  # empty: it is taken
    save_file = safetensors.torch.save_file
    monkeypatch.setattr(safetensors.torch, "save_file", lambda tensors, path, about: (save_file(tensors, path, about), path.write_bytes(path.read_bytes()[:-9])))
    with pytest.raises(BadInput, match="cut off"):
        extend()
    assert not any((tmp_path / "out").iterdir()) and not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    monkeypatch.undo()
    extend()
    assert load(tmp_path / "out")
    with pytest.raises(BadInput, match="holds another run"):
        extend()


# ---- bad input ----
def write(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    return str(tmp_path / name)


@pytest.mark.parametrize("flag, name, data, reason", [
    ("corpus_path", "gbk.txt", "第一行\n第二行：中文".encode("gb18030"), r"gbk\.txt, line 1: .*looks like GBK.*iconv"),
    ("corpus_path", "broken.txt", "好\n好\n".encode() + b"\xff\xfe\xe4\n", r"broken\.txt, line 3: its byte \d+ is not UTF-8"),
    ("corpus_path", "broken.jsonl", '{"text": "好"}\n{"text": '.encode(), r"broken\.jsonl, line 2: not whole JSON"),
    ("corpus_path", "short.txt", "很短的一段文字。\n".encode(), "gives .* new pieces, not 1,200"),
    ("corpus_path", "english.txt", b"no word of it\n", "no Chinese"),
    ("corpus_path", "empty.txt", b"", "empty.txt is empty"),
    ("corpus_path", "corpus.pdf", b"%PDF", "corpus.pdf, line 1: not whole JSON"),
    ("pieces", "other.model", b"\x80\x02}q\x00.", "other.model is not a SentencePiece model"),
    ("pieces", "empty.model", b"", "is empty"),
    ("pieces", "prose.txt", ("羊驼\n" + "这不是一个词而是很长很长的一句话" * 4).encode(), r"prose\.txt, line 2: too long for a piece"),
    ("pieces", "gbk.txt", "羊驼".encode("gb18030"), "GBK"),
])
def test_bad_text_is_refused_by_file_and_line(extend, tmp_path, flag, name, data, reason):
    with pytest.raises(BadInput, match=reason) as refusal:
        extend(**{flag: write(tmp_path, name, data)})
    assert "\n" not in str(refusal.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags, reason", [
    ({"corpus_path": "nowhere.txt"}, "nowhere.txt does not exist"), ({"eval_path": "nowhere.txt"}, "nowhere.txt does not exist"), ({"corpus_path": None}, "give --corpus_path"),
    ({"pieces": "nowhere.model"}, "--pieces=nowhere.model does not exist"), ({"model_name_or_path": "nowhere"}, "nowhere does not exist"),
    ({"corpus_path": None, "pieces": __file__, "init": "share"}, "counts the pieces in a text: add a --corpus_path"), ({"num_pieces": 0}, "must be above zero"), ({"character_coverage": 0.5}, "between 0.98 and 1"), ({"pad_to_multiple_of": 0}, "must be above zero"),
], ids=str)
def test_bad_flags_are_refused_in_one_line(extend, tmp_path, flags, reason):
    with pytest.raises(BadInput, match=reason) as refusal:
        extend(**flags)
    assert "\n" not in str(refusal.value) and not (tmp_path / "out").exists()


def test_shares_need_chinese_to_count_and_a_head_without_caps(bases, extend, tmp_path):
    listed = write(tmp_path, "pieces.txt", "羊驼\n".encode())
    with pytest.raises(BadInput, match="holds 1 runs of Chinese"):
        extend(init="share", pieces=listed, corpus_path=write(tmp_path, "short.txt", "很短的一段文字。\n".encode()))
    base = tmp_path / "base"
    shutil.copytree(bases["bytelevel"], base)
    (base / "config.json").write_text(json.dumps(json.loads((base / "config.json").read_text()) | {"logit_scale": 0.5}))
    with pytest.raises(BadInput, match="does not know heads with logit_scale"):
        extend(init="share", pieces=listed, model_name_or_path=str(base))
    assert not (tmp_path / "out").exists()


def test_a_base_that_is_not_whole_is_refused(bases, tmp_path, extend):
    from safetensors.torch import save_file

    base = tmp_path / "base"
    shutil.copytree(bases["bytelevel"], base)
    file, tensors = base / "model.safetensors", weights(bases["bytelevel"])
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(BadInput, match="cut off"):
        extend(model_name_or_path=str(base))
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(BadInput, match="only points to the real one"):
        extend(model_name_or_path=str(base))
    file.unlink()
    with pytest.raises(BadInput, match="holds no weights"):
        extend(model_name_or_path=str(base))
    save_file({name: tensor for name, tensor in tensors.items() if "embed" not in name}, file)
    with pytest.raises(BadInput, match="has no embed_tokens.weight or .* in its weights"):
        extend(model_name_or_path=str(base))
    save_file(tensors | {"lm_head.bias": tensors["model.embed_tokens.weight"][:, 0].clone()}, file)
    with pytest.raises(BadInput, match="has a bias in its head .lm_head.bias., as no LLaMA has"):
        extend(model_name_or_path=str(base))
    save_file(tensors | {"model.embed_tokens.weight": tensors["model.embed_tokens.weight"][:700].clone()}, file)
    with pytest.raises(BadInput, match="700 rows, config.json says 800"):
        extend(model_name_or_path=str(base))
    tokenizer = load(bases["bytelevel"])
    tokenizer.add_tokens(["新词"])
    with pytest.raises(BadInput, match="tokenizer has 801 tokens, the model 800 rows"):
        extend(model_name_or_path=str(resized(make_model(tmp_path / "fewer", tokenizer), 800)))
    with pytest.raises(BadInput, match="they do not belong together"):
        extend(model_name_or_path=str(resized(make_model(tmp_path / "more", tokenizer), 5000)))
    other = tmp_path / "other"
    shutil.copytree(bases["sentencepiece"], other)
    (other / "tokenizer.model").write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(BadInput, match="is not a SentencePiece model"):
        extend(model_name_or_path=str(other))


def test_a_unigram_base_is_refused(tmp_path, extend, corpus):
    from tokenizers import Tokenizer, models, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.train_from_iterator(corpus, trainers.UnigramTrainer(vocab_size=900, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False))
    base = make_model(tmp_path / "base", PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"))
    with pytest.raises(BadInput, match="is Unigram"):
        extend(model_name_or_path=str(base))
