"""A corpus: what is dropped is dropped for its reason, what is kept is whole, in any order, with any number of processes, after any interruption."""
import errno
import json
import random
import re
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT

import clean_corpus as corpus
from utils import BadInput, cli, numbered_records, read_rows

PROSE = "羊驼产于南美洲的安第斯山区，毛长而软，一年剪一次。它们胆子小，喜欢成群站在山坡上，看见生人就竖起耳朵，发出细细的哼声。"
HAN = [chr(code) for code in range(0x4E00, 0x9000) if chr(code).encode("gb2312", "ignore")]


def text_of(seed: int, length: int = 120) -> str:
    """Chinese characters in random order, a mark behind each tenth."""
    generator = random.Random(seed)
    return "".join(generator.choice(HAN) + ("，" if i % 10 == 9 else "") for i in range(length)) + "。"


def changed(text: str, count: int, seed: int = 0) -> str:
    """A text with `count` characters of another."""
    generator, letters = random.Random(seed), list(text)
    for place in generator.sample([i for i, letter in enumerate(letters) if letter not in "，。"], count):
        letters[place] = generator.choice(HAN)
    return "".join(letters)


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": row} if isinstance(row, str) else row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return str(path)


@pytest.fixture
def clean(tmp_path, capsys):
    """Clean rows or a file: (kept records, dropped records, report)."""
    def run(*rows, data_path=None, **flags):
        number = len(list(tmp_path.glob("out*")))
        output = str(tmp_path / f"out{number}")
        flags = {"output_dir": output, "workers": 1} | flags
        corpus.main(data_path=data_path or write(tmp_path / f"in{number}.jsonl", *rows), **flags)
        output = flags["output_dir"]
        kept, dropped = ([json.loads(line) for line in open(f"{output}/{name}.jsonl", encoding="utf-8")] for name in ("kept", "dropped"))
        return kept, dropped, json.load(open(f"{output}/report.json", encoding="utf-8"))

    return run


def texts(rows) -> list[str]:
    return [row["text"] for row in rows]


# ---- what is kept, and what is dropped ----
def test_kept_and_dropped_together_are_what_was_read_and_every_loss_can_be_read(clean):
    rows = [{"text": text_of(i % 7), "id": i, "meta": {"url": "x"}, "quality": "mine"} for i in range(20)] + ["\ufeff短\r\n", "\ufffd" * 40]  # a loss is as it was read
    kept, dropped, report = clean(*rows)
    columns = [{name: value for name, value in row.items() if name not in ("reason", "read_from", "duplicate_of")} for row in kept + dropped]
    assert sorted(columns, key=str) == sorted(({"text": row} if isinstance(row, str) else row for row in rows), key=str)
    assert (report["read"], report["kept"], report["dropped"]) == (22, 7, 15) == (22, len(kept), len(dropped))
    assert {row["reason"] for row in dropped} == {"exact", "rule:least_characters", "rule:most_garbage"}
    assert report["bytes_read"] == report["bytes_kept"] + sum(found["bytes"] for found in report["reasons"].values())
    assert report["reasons"]["exact"]["records"] == 13 and len(report["reasons"]["exact"]["examples"]) == 3


def test_bytes_are_those_of_the_texts_as_they_were_read_and_as_they_are_kept(clean, tmp_path):
    rows = [f"{PROSE}\n赞助播出", f"\ufeff{text_of(1)}\r\n扫码关注公众号", "短\u200b", {"instruction": "问\x00", "output": text_of(2)}, text_of(3)]
    kept, dropped, report = clean(*rows, word_list=word_list(tmp_path, "广告\t赞助\tdrop_line"))
    size = lambda *rows: sum(len("\n".join([row] if isinstance(row, str) else row.values()).encode()) for row in rows)
    assert len(dropped) == 1 and texts(kept[:1]) == [PROSE] and report["reasons"]["rule:least_characters"]["bytes"] == size(rows[2])
    assert report["bytes_read"] == size(*rows) and report["bytes_kept"] == size(*kept)
    assert report["bytes_taken_out"] == size(*rows) - size(rows[2]) - size(*kept) > 0


def test_a_record_that_nothing_changes_is_kept_byte_by_byte_and_none_is_taken_for_two(clean, tmp_path):
    same = [f'{{"text":"{text_of(1)}", "n": 1.0e5, "id": 12345678901234567890123 }}', f'{{"id" : "\\/", "text": "{text_of(2)}"}}']
    others = [f'{{"text":\t"{text_of(3)}", "a": "b"}}', f'{{"text": "{text_of(4)}",\r"a": "b"}}', f'{{"\\u0071uality": "mine", "text": "{text_of(5)}"}}']
    (tmp_path / "source.jsonl").write_text("\n".join([*same, *others, '{"\\u0072eason": "mine", "text": "短"}']) + "\n", "utf-8")
    kept, dropped, _ = clean(data_path=str(tmp_path / "source.jsonl"), output_dir=str(tmp_path / "o"))
    lines = (tmp_path / "o" / "kept.jsonl").read_bytes().decode().split("\n")
    assert lines[:2] == same and kept == [json.loads(line) for line in same + others]
    assert len(dropped) == 1 and "mine" not in (tmp_path / "o" / "dropped.jsonl").read_text("utf-8")  # one column of a name
    kept, _, _ = clean(data_path=str(tmp_path / "source.jsonl"), good_text=str(ROOT / "sample" / "corpus.txt"))
    assert all(isinstance(row["quality"], float) and "bucket" in row for row in kept) and kept[0]["id"] == 12345678901234567890123


@pytest.mark.parametrize("path", sorted((ROOT / "sample").glob("*.*")), ids=lambda path: path.name)
def test_a_record_of_any_format_keeps_all_its_columns_and_stays_readable(clean, path):
    if path.suffix in (".md", ".py") or path.stem == "prompts":  # which hold nothing that is trained on
        return
    if path.stem == "preference":
        with pytest.raises(BadInput, match="none of its .* preference"):
            clean(data_path=str(path))
        return
    kept, dropped, _ = clean(data_path=str(path), limits=write(path_of(clean) / "limits.json", {"least_characters": 1, "least_record_characters": 1}))
    rows = list(read_rows(str(path), corpus.Counter(), "line"))
    assert kept == rows and not dropped
    documents = "line" if path.stem in ("corpus", "completion") else None
    assert len(list(numbered_records(str(path), document_separator=documents))) == len(kept)


def path_of(clean):
    return clean.__closure__[clean.__code__.co_freevars.index("tmp_path")].cell_contents


@pytest.mark.parametrize("text", [
    "溪邊\n水淺石頭白，\n山深鳥語閒。\n磨坊門半掩，\n輪影入雲間。", "秋夜\n月亮升起来\n村庄睡着了\n狗也睡着了\n只有磨坊的轮子\n还在转\n还在转\n像一个老人\n数着自己的年纪",
    "天地玄黃\n宇宙洪荒\n日月盈昃\n辰宿列張\n寒來暑往\n秋收冬藏\n閏餘成歲\n律呂調陽\n雲騰致雨\n露結為霜", "采采芣苢，薄言采之。采采芣苢，薄言有之。\n采采芣苢，薄言掇之。采采芣苢，薄言捋之。",
    "山頂的積雪到了五月纔漸漸化盡，溪水繞過磨坊，轉動木輪，發出隆隆的聲響；村裏的孩子們坐在橋上，聽老人講從前的故事。",
    "def total(levels):\n    result = 0\n    for level in levels:\n        result += level\n    return result\n\n\nif __name__ == '__main__':\n    print(total([1, 2, 3]))",
    "#include <stdio.h>\n\nint main(void)\n{\n    for (int i = 0; i < 3; i++) {\n        if (i) {\n            puts(\"x\");\n        }\n    }\n    return 0;\n}",
    "| 月份 | 水位 | 磨面 |\n|---|---|---|\n| 五月 | 42 | 310 |\n| 六月 | 57 | 455 |\n| 七月 | 38 | 290 |\n| 八月 | 38 | 290 |\n| 九月 | 38 | 290 |",
    "date,level,ground\n2026-05-01,42,310\n2026-06-01,57,455\n2026-07-01,38,290\n2026-08-01,38,290", "- 鳝丝\n- 大蒜\n- 姜末\n- 料酒\n- 生抽\n- 蚝油\n- 食用盐\n- 白糖\n- 胡椒粉\n- 淀粉",
    "今天的風很大👨‍👩‍👧，我們在河邊放風箏，一直放到太陽下山😀。", "The mill grinds wheat. Its wheel turns from May, when the snow melts, until the first frost."])
def test_traditional_text_poems_code_tables_and_lists_survive_the_default_rules(clean, text):
    kept, dropped, _ = clean(text)
    assert texts(kept) == [text], dropped


@pytest.mark.parametrize("rule, text", [
    ("least_characters", "关于我们"), ("most_garbage", PROSE + "\ufffd\ufffd\ue000"), ("most_garbage", PROSE + "□□□□□□□□"), ("most_rare_han", "㐀㐁㐂㐃㐄㐅㐆㐇㐈㐉㐊㐋㐌一二三四五六七八九十人口手"),
    ("most_mojibake", "锟斤拷" + PROSE), ("most_mojibake", "化雪的水从石缝里流下来，流到村口的磨坊里。".encode().decode("gb18030", "ignore")),
    ("most_mojibake", "羊驼产于南美洲的安第斯山区，毛长而软。".encode().decode("latin-1")), ("least_alphanumeric", "=-" * 40),
    ("least_line_characters", "首页\n新闻\n图片\n视频\n论坛\n博客\n招聘\n更多\n帮助\n关于\n登录\n注册"), ("least_ended_lines", "首页\n新闻中心\n图片\n视频频道\n论坛\n博客文章\n人才\n联系我们"),
    ("most_repeated_lines", "\n".join([PROSE, *["点这里看下一张图片啊"] * 9])), ("most_repeated_13grams", "买面粉送面袋送面袋送面袋送面袋，" * 9),
    ("most_word_letters", "pneumonoultramicroscopic incomprehensibilities " * 30), ("least_word_letters", " ".join(f"a {letter} by" for letter in "abcdefghijklmnopqrstuvwxyz"))])
def test_each_rule_drops_what_it_is_for_and_says_so(rule, text):
    measures = corpus.measure({"text": text})
    assert corpus.verdict(measures, {name: None for name in corpus.RULES if name != rule}) == f"rule:{rule}"
    assert corpus.verdict(measures, {name: None for name in corpus.RULES}) is None
    assert corpus.verdict(measures) is not None
    assert corpus.verdict(corpus.measure({"text": PROSE})) is None


def test_limits_and_the_language_change_what_is_dropped(clean, tmp_path):
    english = "The mill grinds wheat. Its wheel turns from May, when the snow melts, until the first frost of autumn."
    assert texts(clean(english, PROSE, language="zh")[0]) == [PROSE] and texts(clean(english, PROSE, language="en")[0]) == [english]
    (tmp_path / "limits.json").write_text('{"least_characters": 90, "most_garbage": null}')
    kept, dropped, report = clean(PROSE, text_of(1) + "\ufffd" * 20, limits=str(tmp_path / "limits.json"))
    assert len(kept) == 1 and dropped[0]["reason"] == "rule:least_characters" and report["limits"]["least_characters"] == 90
    assert [count for _, count in report["what_if"]["least_characters"]] == [0, 1, 2]  # at 45, 90 and 180 characters


def test_text_is_mended_and_boilerplate_lines_go_but_other_columns_stay(clean):
    row = {"text": f"\ufeff{PROSE}\r\n扫码关注公众号\r\n\u200b再见，ＡＢＣ①\x00", "title": "a\u200bb"}
    kept, _, _ = clean(row, long := text_of(1) + "，点击查看")  # a long line is no boilerplate
    assert kept == [{"text": f"{PROSE}\n再见，ＡＢＣ①", "title": "a\u200bb"}, {"text": long}]
    assert clean(row, steps="exact")[0] == [row]


# ---- duplicates ----
def test_one_of_each_cluster_stays_in_any_order_and_with_any_number_of_processes(clean, monkeypatch):
    monkeypatch.setattr(corpus, "BLOCK", 3000)  # many parts
    monkeypatch.setattr(corpus, "FEW", 0)
    rows = [{"text": changed(text_of(i, 300), n, i + n), "id": f"{i}.{n}"} for i in range(12) for n in (0, 1, 2)] + [{"text": text_of(3, 300), "id": "again"}, text_of(4, 300), text_of(4, 300)]
    sets = []
    for seed, workers in ((0, 1), (1, 2), (2, 1)):
        random.Random(seed).shuffle(rows)
        kept, dropped, _ = clean(*rows, workers=workers)
        sets.append(sorted(map(json.dumps, kept)))
        assert {row["reason"] for row in dropped} == {"exact", "near"} and all("duplicate_of" in row for row in dropped)
    assert len(sets[0]) == 12 and sets[0] == sets[1] == sets[2]


def test_what_is_alike_to_a_dropped_text_alone_stays(clean, monkeypatch):
    monkeypatch.setattr(corpus, "band_keys", lambda signatures: np.zeros((len(signatures), corpus.BANDS), np.uint64))  # all are candidates
    words = [text_of(i, 10) for i in range(60)]
    a, b, c = "".join(words[:52]), "".join(words[4:55]), "".join(words[10:60])
    assert jaccard(a, b) > 0.8 and jaccard(b, c) > 0.8 and jaccard(a, c) < 0.7
    for rows in ((a, b, c), (c, b, a), (b, c, a)):
        kept, dropped, _ = clean(*rows)
        assert set(texts(kept)) == {a, c} and texts(dropped) == [b]


def jaccard(a: str, b: str) -> float:
    a, b = (re.sub(r"\W", "", text) for text in (a, b))
    a, b = ({text[i : i + 5] for i in range(len(text) - 4)} for text in (a, b))
    return len(a & b) / len(a | b)


def test_texts_that_share_a_band_are_compared_and_clusters_are_not_merged(clean, monkeypatch):
    monkeypatch.setattr(corpus, "band_keys", lambda signatures: np.zeros((len(signatures), corpus.BANDS), np.uint64))
    rows = [changed(text_of(i, 300), n, i + n) for i in range(5) for n in (0, 2, 4)]
    assert len(clean(*rows)[0]) == 5


def test_short_texts_do_no_harm_and_go_as_exact_duplicates(clean):
    kept, dropped, _ = clean("你好", "你 好", "你好吗", "😀", "😀", "!", "1+1", "1-1", steps="exact,near")
    assert len(kept) == 6 and [row["reason"] for row in dropped] == ["exact", "exact"]
    for text in ("", "羊", "羊驼", "羊驼毛", "羊驼毛长"):
        assert (corpus.signature([text]) == 2**32 - 1).all() and corpus.verdict(corpus.measure({"text": text})) == "rule:least_characters"


def test_chinese_without_blanks_is_compared_by_characters(clean):
    sentence = "山上的雪到五月才化尽化雪的水从石缝里流下来流到村口的磨坊磨坊的轮子就转起来一直转到秋天老人坐在桥上讲从前的故事"
    kept, dropped, _ = clean(sentence, sentence + "呢", text_of(1))
    assert len(kept) == 2 and dropped[0]["reason"] == "near"


def test_texts_that_differ_in_numbers_alone_stay_unless_asked(clean, tmp_path):
    rows = [f"收据：今收到王五交来水磨坊五月份租金三百二十元整，经手人赵六，此据一式两份，双方各执一份为凭，编号 {number}，完。" for number in (20260511, 20260612)]
    rows += [f"{text_of(5)}计算下面这道题，写出每一步的过程和理由，最后把结果填在横线上：25 {sign} 13 等于多少？" for sign in "+-"]
    assert texts(clean(*rows)[0]) == rows
    assert len(clean(*rows, limits=write(tmp_path / "limits.json", {"same_but_numbers": 1}))[0]) == 2


def test_duplicates_are_found_across_files_and_against_older_data(clean, tmp_path):
    for name, rows in (("a", [text_of(1), text_of(2)]), ("b", [changed(text_of(1), 2), text_of(3)]), ("old", [text_of(3)[:-1], text_of(2)[:-4] + "。", "短"])):
        write(tmp_path / ("older" if name == "old" else "new") / f"{name}.jsonl", *rows)
    kept, dropped, _ = clean(data_path=str(tmp_path / "new"), against=str(tmp_path / "older"))
    assert len(kept) == 1 and jaccard(kept[0]["text"], text_of(1)) > 0.7
    older = {row["text"]: row["duplicate_of"] for row in dropped}
    assert older[text_of(3)].endswith("old.jsonl:0") and older[text_of(2)].endswith("old.jsonl:1")  # it stays, although it is the shorter one


def test_running_twice_changes_nothing_and_sources_are_left_alone(clean, tmp_path):
    rows = [changed(text_of(i), n, i + n) for i in range(9) for n in (0, 3)] + [f"{PROSE}\r\n扫码关注公众号", "短"]
    source = tmp_path / "source.jsonl"
    before = open(write(source, *rows), "rb").read()
    flags = dict(good_text=str(ROOT / "sample" / "corpus.txt"), word_list=word_list(tmp_path, "动物\t耳朵"), steps="normalize,private,rules,exact,near,score,words")
    first = clean(data_path=str(source), output_dir=str(tmp_path / "first"), **flags)
    again = clean(data_path=str(tmp_path / "first" / "kept.jsonl"), **flags)
    assert source.read_bytes() == before and again[0] == first[0] and not again[1] and "flagged" in again[0][-1]
    other = clean(data_path=str(tmp_path / "first" / "kept.jsonl"), word_list=word_list(tmp_path, "动物\t兀鹫"))
    assert "quality" in other[0][-1] and not any("flagged" in row for row in other[0])  # of another list


@pytest.mark.parametrize("length", [40, 400])  # of the short ones, most places have no shingle of their own
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_signatures_agree_in_the_share_of_the_jaccard_index(share, length):
    pairs = [(text_of(i, length), changed(text_of(i, length), int((1 - share) * 0.15 * length), i)) for i in range(60)]
    signatures = corpus.signature([text for pair in pairs for text in pair])
    agree, index = (signatures[0::2] == signatures[1::2]).mean(1), np.array([jaccard(*pair) for pair in pairs])
    assert abs(agree - index).mean() < 0.05 and abs((agree - index).mean()) < 0.02
    assert signatures.dtype == np.uint32 and signatures.shape == (120, 112)
    assert (signatures == np.concatenate([corpus.signature([text]) for pair in pairs for text in pair])).all()


def test_a_signature_is_the_same_on_every_machine_and_differs_by_seed():
    assert corpus.signature([PROSE, "a" * 9])[0, :3].tolist() == [35387710, 68514168, 789800096]
    assert (corpus.signature([PROSE], 1) != corpus.signature([PROSE], 2)).mean() > 0.9
    assert len({tuple(keys) for keys in corpus.band_keys(corpus.signature([PROSE + "a", PROSE + "a b", text_of(1)])).T.tolist()}) == corpus.BANDS


# ---- words, private data, test questions, quality ----
def word_list(tmp_path, *lines) -> str:
    (tmp_path / "words.tsv").write_text("\n".join(("# mine", *lines)) + "\n", "utf-8")
    return str(tmp_path / "words.tsv")


def test_words_flag_drop_a_line_drop_a_record_or_are_allowed(clean, tmp_path):
    rows = [f"{PROSE}{i}{more}" for i, more in enumerate(("缺斤短两", "缺 斤\u200b短两，ＳＥＸ", "凭良心", "\n赞助播出", "\n假秤砣", "sextant, essex", "缺斤少两"))]
    listed = word_list(tmp_path, "欺诈\t短两", "欺诈\t良心", "x\t凭良心\tallow", "广告\t赞助\tdrop_line", "欺诈\t假秤砣\tdrop", "x\tsex")
    kept, dropped, _ = clean(*rows, word_list=listed, limits=write(tmp_path / "limits.json", {"jaccard": 1}), steps="rules,exact,words")
    flagged = {row["text"][len(PROSE)]: row.get("flagged") for row in kept}
    assert flagged == {"0": {"欺诈": 1}, "1": {"欺诈": 1, "x": 1}, "2": None, "3": None, "5": None, "6": None}
    assert kept[3]["text"] == PROSE + "3" and texts(dropped) == [rows[4]] and dropped[0]["reason"] == "words" and dropped[0]["words"] == [["欺诈", "假秤砣", "drop"]]
    record = {"instruction": "问", "output": f"{PROSE}\n赞助播出"}
    assert clean(record, word_list=listed)[1][0]["reason"] == "words"  # an answer is not cut


def test_tags_hit_private_data_and_no_prices_dates_isbn_or_longer_numbers():
    for text, tagged in (("电话13912345678。", "电话<phone>。"), ("+86 139-1234-5678", "<phone>"), ("邮箱a.b+c@mail.example.com，", "邮箱<email>，"),
                         ("身份证11010519491231002X号", "身份证<identity>号"), ("QQ：123456789", "QQ：<account>"), ("微信号: li_si2026", "微信号: <account>"),
                         ("卡号 6222 0212 3456 7890 128", None), ("卡号4111111111111111", "卡号<card>"), ("服务器8.8.8.8在", "服务器<ip>在")):
        assert corpus.mask_private(text) == (tagged or text)
    same = ("价格13912345678元", "2026-05-11", "20260511123456789012", "ISBN 978-7-302-12345-6", "9787302123456", "订单号139123456789", "110105194912310021", "192.168.1.1 和 1.2.3.4.5",
            "3.14159265358979", "@someone", "圆周率3.13912345678", "13800000000.50")
    assert [corpus.mask_private(text) for text in same] == [*same]


def test_a_text_that_holds_half_of_a_test_question_goes_and_one_that_quotes_it_stays(clean, tmp_path):
    questions = [text_of(i, 40) for i in (1, 2, 3)]
    write(tmp_path / "eval" / "a.jsonl", *({"question": question, "choices": ["甲", "乙"]} for question in questions))
    (tmp_path / "eval" / "b.csv").write_text("Question,A,B,C,D,Answer\n雪化成什么,清清的水,黑石头,白沙子,红木头,A\n雪,水,石,沙,木,A\n", "utf-8")
    (tmp_path / "eval" / "broken.json").write_text('{"data": [\n', "utf-8")
    broken = "\n".join(questions[0][i : i + 9] for i in range(0, 44, 9))  # lines broken anywhere do not hide it
    rows = [PROSE + broken, text_of(7) + questions[1][:16], text_of(8) + "雪化成什么？A. 清清的水 B. 黑石头 C. 白沙子 D. 红木头", text_of(9) + "雪化成什么"]
    kept, dropped, report = clean(*rows, eval_data=str(tmp_path / "eval"))
    assert texts(kept) == rows[1:2] + rows[3:] and [row["reason"] for row in dropped] == ["contamination"] * 2
    assert [row["question"][0] for row in dropped] == ["a.jsonl:0", "b.csv:0"]
    found = report["contamination"]
    assert found["too_short"] == 1 and found["sets"]["a.jsonl"] == {"questions": 3, "any": 2, "half": 1, "most": 1} and "broken.json" in found["unread"][0]


def test_the_score_knows_text_like_the_good_one_and_buckets_have_their_shares(clean, tmp_path):
    sentences = (ROOT / "sample" / "corpus.txt").read_text("utf-8").split()
    good = [text for text in sentences if len(text) > 20]
    shuffled = ["".join(random.Random(i).sample(text, len(text))) for i, text in enumerate(good)]
    kept, _, _ = clean(*good, *shuffled, good_text=str(ROOT / "sample" / "corpus.txt"), limits=write(tmp_path / "limits.json", {"high": 0.5, "medium": 1}))
    quality = {row["text"]: row["quality"] for row in kept}
    assert min(quality[text] for text in good) > max(quality[text] for text in shuffled)
    assert {row["text"] for row in kept if row["bucket"] == "high"} == {*good} and {row["bucket"] for row in kept} == {"high", "medium"}


def test_the_score_of_a_model_is_its_bits_per_character(clean, model_folder):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    kept, _, _ = clean(PROSE, text_of(1), model_name_or_path=str(model_folder))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32), AutoTokenizer.from_pretrained(model_folder)
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(PROSE, add_special_tokens=False).input_ids]])
    bits = float(model(ids, labels=ids).loss) * (ids.shape[1] - 1) / np.log(2) / len(PROSE)
    assert kept[0]["quality"] == pytest.approx(-bits, abs=2e-3)


# ---- what goes wrong ----
def test_a_record_that_cannot_be_read_is_counted_and_named_and_the_others_go_on(clean, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "LONGEST", 5000)
    lines = [json.dumps({"text": text_of(i)}, ensure_ascii=False).encode() for i in range(3)]
    bad = {"not whole JSON": lines[0][:-2], "looks like GBK": '{"text": "羊驼产于南美洲"}'.encode("gb18030"), "is not UTF-8": b'{"text": "\xff\xfe"}', "no known schema": b'{"a": 1}',
           "a string belongs": b'{"text": ["x"]}', "half a character": b'{"text": "\\ud83d"}', "longer than": b'{"text": "' + b"x" * 9000 + b'"}', "a list where": b"[1]",
           "preference": b'{"instruction": "x", "chosen": "a", "rejected": "b"}', "no answer": b'{"instruction": "x", "output": " "}', "unhashable": b'{"messages": [{"role": [], "content": "x"}]}'}
    (tmp_path / "mixed.jsonl").write_bytes(b"\n".join([lines[0], *bad.values(), b"", lines[1], lines[2]]))
    kept, dropped, report = clean(data_path=str(tmp_path / "mixed.jsonl"))
    assert len(kept) == 3 and report["reasons"]["broken"]["records"] == len(bad) == len(dropped)
    assert [row["read_from"].rpartition(":")[2] for row in dropped] == [str(i) for i in range(1, len(bad) + 1)]
    for row, problem in zip(dropped, bad):
        assert row["reason"] == "broken" and (problem in row["problem"] or problem == "unhashable")
    (tmp_path / "text.txt").write_bytes(f"{PROSE}\x00\n".encode() + "羊驼".encode("gb18030") + f"\n{text_of(1)}\n".encode())
    kept, dropped, _ = clean(data_path=str(tmp_path / "text.txt"))
    assert texts(kept) == [PROSE, text_of(1)] and "GBK" in dropped[0]["problem"]


def test_paragraphs_are_documents_if_asked_and_a_long_one_is_no_accident_for_the_next(clean, tmp_path, monkeypatch):
    (tmp_path / "book.txt").write_text(f"\ufeff\n{PROSE}\n{PROSE[::-1]}\n \n\n{text_of(1)}\n" + "\n" + (text_of(2) + "\n") * 40 + "\n" + text_of(3), "utf-8")
    monkeypatch.setattr(corpus, "LONGEST", 5000)
    kept, dropped, _ = clean(data_path=str(tmp_path / "book.txt"), document_separator="blank_line")
    assert texts(kept) == [f"{PROSE}\n{PROSE[::-1]}", text_of(1), text_of(3)] and "longer than" in dropped[0]["problem"]


def test_a_run_that_was_killed_goes_on_and_ends_as_one_that_was_not(clean, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "BLOCK", 2000)
    source = write(tmp_path / "source.jsonl", *(changed(text_of(i % 9), 2, i) for i in range(40)))
    whole = clean(data_path=source)
    judge, judged = corpus.judge, []

    def failing(job, task):
        judged.append(task[0])
        if len(judged) == 4:
            raise KeyboardInterrupt
        return judge(job, task)

    monkeypatch.setattr(corpus, "judge", failing)
    output = str(tmp_path / "killed")
    with pytest.raises(KeyboardInterrupt):
        clean(data_path=source, output_dir=output)
    with pytest.raises(BadInput, match="holds another run"):
        clean(data_path=source, output_dir=output)
    with pytest.raises(BadInput, match="begun with another seed"):
        clean(data_path=source, output_dir=output, seed=7, resume=True)
    resumed = clean(data_path=source, output_dir=output, resume=True)
    assert resumed[:2] == whole[:2] and resumed[2]["reasons"] == whole[2]["reasons"] and judged[4:] == [*range(3, max(judged) + 1)]
    with pytest.raises(BadInput, match="is finished"):
        clean(data_path=source, output_dir=output, resume=True)


def test_a_full_disk_leaves_nothing_half_written(clean, tmp_path, monkeypatch):
    source, output = write(tmp_path / "source.jsonl", text_of(1)), tmp_path / "full"
    monkeypatch.setattr(corpus.shutil, "disk_usage", lambda path: SimpleNamespace(free=1))
    with pytest.raises(BadInput, match="GB free"):
        clean(data_path=source, output_dir=str(output))
    monkeypatch.undo()
    save = np.save
    monkeypatch.setattr(np, "save", lambda file, table: (save(file, table), file.flush(), (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device"))))
    monkeypatch.setattr("sys.argv", ["clean_corpus.py", "--data_path", source, "--output_dir", str(output), "--workers", "1"])
    with pytest.raises(SystemExit) as ended:
        cli(corpus.main)
    assert ended.value.code == 2 and not list(output.glob("parts/*.npy")) and not list(output.glob("*.jsonl"))


@pytest.mark.parametrize("flags, said", [
    ({"steps": "rules,nera"}, "did you mean near"), ({"workers": -1}, "workers"), ({"limits": '{"least_charcters": 9}'}, "did you mean least_characters"),
    ({"limits": '{"jaccard": "x"}'}, "a number belongs"), ({"limits": '{"jaccard": 0}'}, "jaccard must be"), ({"limits": "["}, "no whole JSON"), ({"data_path": "empty"}, "holds no .txt"),
    ({"data_path": "nowhere"}, "does not exist"), ({"data_path": "x.gz"}, "ends in none of"), ({"output_dir": "data/out"}, "is inside --data_path"), ({"word_list": "x\n"}, "line 1"),
    ({"word_list": "a\tb\tc\n"}, "line 1"), ({"good_text": "empty.txt"}, "is empty"), ({"data_path": "bad.jsonl"}, "none of its 1 records can be read: not whole JSON")])
def test_what_cannot_be_used_is_said_in_one_line_before_anything_is_written(tmp_path, monkeypatch, flags, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for name, text in (("data/a.txt", PROSE), ("x.gz", "x"), ("empty.txt", ""), ("bad.jsonl", "{")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, "utf-8")
    for flag in {"limits", "word_list"} & flags.keys():
        (tmp_path / flag).write_text(flags[flag], "utf-8")
        flags = flags | {flag: flag}
    with pytest.raises(BadInput, match=re.escape(said)):
        corpus.main(**{"data_path": "data", "workers": 1} | flags)
    assert not (tmp_path / "output" / "clean_corpus" / "kept.jsonl").exists()


# ---- the report, and other engines ----
def test_the_report_names_counts_limits_and_examples_and_shows_a_picture(clean, tmp_path):
    clean(data_path=str(ROOT / "sample" / "web" / "pages.txt"), document_separator="blank_line", output_dir=str(tmp_path / "o"), good_text=str(ROOT / "sample" / "corpus.txt"),
          word_list=str(ROOT / "sample" / "web" / "words.tsv"), eval_data=str(ROOT / "sample" / "web" / "questions.csv"))
    report, picture = (tmp_path / "o" / "report.md").read_text("utf-8"), (tmp_path / "o" / "histograms.svg").read_text("utf-8")
    histograms = json.loads((tmp_path / "o" / "report.json").read_text("utf-8"))["histograms"]
    assert picture.count("<g ") == len(histograms) > 9 and all(name.replace("_", " ") in picture for name in histograms)
    assert all(f"| {name} |" in report for name in corpus.DEFAULTS)
    for said in ("18 records read, 11 kept, 7 dropped", "| near | 1 |", "### contamination", "questions.csv", "Seed 42"):
        assert said in report
    assert not [path for path in (tmp_path / "o").iterdir() if path.name.startswith(".") or path.name == "parts"]


def test_datatrove_comes_to_the_same_verdicts(clean, tmp_path):
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.filters import LambdaFilter
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter

    rows = [PROSE, "短", "首页\n新闻\n图片\n视频\n论坛\n博客\n招聘\n更多\n帮助\n关于\n登录\n注册", PROSE + "\ufffd" * 3, text_of(1)]
    write(tmp_path / "in" / "a.jsonl", *rows)

    def keep(document):
        reason = corpus.verdict(corpus.measure({"text": document.text}))
        return reason is None or (False, reason)

    dropped = JsonlWriter(str(tmp_path / "dropped"), compression=None)
    LocalPipelineExecutor([JsonlReader(str(tmp_path / "in")), LambdaFilter(keep, dropped), JsonlWriter(str(tmp_path / "kept"), compression=None)],
                          logging_dir=str(tmp_path / "logs")).run()
    theirs = {name: [json.loads(line) for file in (tmp_path / name).glob("*.jsonl") for line in open(file, encoding="utf-8")] for name in ("kept", "dropped")}
    kept, lost, _ = clean(*rows, steps="rules")
    assert texts(theirs["kept"]) == texts(kept)
    assert [(row["text"], row["metadata"]["filter_reason"]) for row in theirs["dropped"]] == [(row["text"], row["reason"]) for row in lost]


def test_older_data_that_holds_the_new_is_refused_and_drops_nothing(clean, tmp_path):
    path = write(tmp_path / "corpus" / "new.jsonl", text_of(1), text_of(2))
    with pytest.raises(BadInput, match="a duplicate of itself"):
        clean(data_path=path, against=str(tmp_path / "corpus"))


def test_an_array_in_a_jsonl_file_is_read_as_training_reads_it(clean, tmp_path):
    (tmp_path / "array.jsonl").write_text(json.dumps([{"text": text_of(1)}, {"text": text_of(2)}], indent=1), "utf-8")
    kept, dropped, _ = clean(data_path=str(tmp_path / "array.jsonl"))
    assert len(kept) == 2 and not dropped


def test_scores_that_a_killed_run_left_are_no_part(clean, tmp_path):
    np.save(tmp_path / "000000.npy", np.zeros(3, corpus.DTYPE))
    np.save(tmp_path / "scores.npy", np.full(3, np.nan, np.float32))
    assert len(corpus.load_parts(tmp_path)["reason"]) == 3
