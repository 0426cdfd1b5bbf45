"""The rules of sample/rules.py, and how a file of rules is read and run: each says what is wrong, where, and with which record."""
import sys

import pytest
from conftest import ROOT

from score_records import load_rules, run_rules
from utils import BadInput

sys.path.insert(0, str(ROOT / "sample"))
import rules  # noqa: E402

RULES = str(ROOT / "sample" / "rules.py")
ASKED = [{"role": "user", "content": "问"}]


@pytest.mark.parametrize("rule, answer, record, expected", [
    ("finished", "好", {}, 1), ("length", "好", {}, 1), ("length", " \n ", {}, 0), ("length", "", {}, 0), ("length", "好" * 300, {}, 0.5), ("length", "好" * 400, {}, 0),
    ("length", "好" * 30, {"max_characters": 20}, 0.5), ("length", "好" * 20, {"max_characters": 20}, 1),
    ("repetition", "羊驼是羊驼是羊驼是羊驼是", {}, 3 / 9), ("repetition", "好" * 100, {}, 1 / 97), ("repetition", "春天来了，山坡上开满了花。", {}, 1), ("repetition", "好", {}, 1),
    ("repetition", "", {}, 1), ("repetition", "a\n\nb\n\nc d e", {}, 1),
    ("chinese", "羊驼 alpaca", {}, 2 / 8), ("chinese", "今天 12:30，😀！", {}, 1), ("chinese", "hello", {}, 0), ("chinese", "123", {}, 0), ("chinese", "", {}, 0),
    ("chinese", "如下：\n```python\ndef f(): pass\n```\n完", {}, 1), ("chinese", "如下：```\nabc", {}, 1), ("chinese", "hello", {"language": "en"}, 1),
    ("format", "一\n二\n三", {"format": "[^\n]+\n[^\n]+\n[^\n]+"}, 1), ("format", " {\n}\n", {"format": r"\{.*\}"}, 1), ("format", "好的：{}", {"format": r"\{.*\}"}, 0),
    ("format", "怎样都行", {}, 1),
    ("number", "3+5=8", {"ground_truth": "8"}, 1), ("number", "8 是 3+5", {"ground_truth": "8"}, 0), ("number", "共 1,234.50 元", {"ground_truth": 1234.5}, 1),
    ("number", "10-20", {"ground_truth": 20}, 1), ("number", "等于 -5", {"ground_truth": -5}, 1), ("number", "８", {"ground_truth": "8"}, 1), ("number", "八", {"ground_truth": "8"}, 0),
    ("number", "", {"ground_truth": 0}, 0), ("number", "0", {"ground_truth": 0}, 1), ("number", "没有", {}, 1), ("number", "#### 72。", {"ground_truth": "算式 #### 72"}, 1),
    ("banned_words", "作为AI语言模型，我", {}, 0), ("banned_words", "as an ai language model", {}, 0), ("banned_words", "我是羊驼", {}, 1),
    ("banned_words", "我是AI", {"banned_words": ["ai"]}, 0)], ids=str)
def test_each_rule_says_what_its_first_line_says(rule, answer, record, expected):
    assert getattr(rules, rule)("问", answer, True, record) == pytest.approx(expected)


def test_only_finished_asks_whether_the_model_came_to_its_stop_token():
    loaded = load_rules(f"{RULES}:finished=1,length=1,repetition=1,chinese=0.5,format=1,number=1,banned_words=1")
    ended, cut = (run_rules(loaded, ASKED, "好", finished, {}, "here") for finished in (True, False))
    assert [name for name in loaded if ended[name] != cut[name]] == ["finished"] and cut["finished"] == 0
    assert loaded["chinese"][0] == 0.5 and loaded["finished"][1]("", "", True, {}) == 1


def test_a_truth_that_holds_no_number_is_named():
    with pytest.raises(BadInput, match="f.jsonl, record 3: the rule number raised ValueError in line .*'无'"):
        run_rules(load_rules(f"{RULES}:number=1"), ASKED, "1", True, {"ground_truth": "无"}, "f.jsonl, record 3")


@pytest.mark.parametrize("flag, reason", [
    ("FILE:chinees=1", "no rule 'chinees': did you mean chinese"), ("FILE:xyz=1", "no rule 'xyz', it has finished, length"), ("FILE:finished", "needs a weight"),
    ("FILE:finished=much", "needs a weight"), ("FILE:finished=nan", "is nan, a finite number"), ("FILE:finished=inf", "is inf"), ("FILE:", "write FILE.py:name=weight"),
    ("finished=1", "write FILE.py:name=weight"), ("FILE:CHINESE=1", "no rule 'CHINESE'"), ("none.py:finished=1", "none.py does not exist"), ("BAD:short=1", "must take .prompt, answer, finished, record"),
    ("BROKEN:rule=1", "broken.py cannot be run: SyntaxError")], ids=str)
def test_a_rule_that_is_not_there_is_named_before_anything_runs(tmp_path, flag, reason):
    (tmp_path / "bad.py").write_text("def short(answer):\n    return 1\n")
    (tmp_path / "broken.py").write_text("def rule(:\n")
    for name, path in (("FILE", RULES), ("BAD", tmp_path / "bad.py"), ("BROKEN", tmp_path / "broken.py")):
        flag = flag.replace(name + ":", f"{path}:")
    with pytest.raises(BadInput, match=reason) as refusal:
        load_rules(flag)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("body, reason", [("return float('nan')", "the rule mine gives nan"), ("return float('inf')", "gives inf"), ("return None", "raised TypeError in line"),
                                          ("return {}[answer]", "raised KeyError in line 4: '答'"), ("raise RuntimeError", "raised RuntimeError in line 4"),
                                          ("raise ValueError('two\\nlines')", "two lines")], ids=str)
def test_a_rule_that_raises_or_gives_no_number_is_named_with_the_record(tmp_path, body, reason):
    (tmp_path / "mine.py").write_text(f"import re\n\ndef mine(prompt, answer, finished, record):\n    {body}\n")
    with pytest.raises(BadInput, match=reason) as refusal:
        run_rules(load_rules(f"{tmp_path / 'mine.py'}:mine=1"), ASKED, "答", True, {}, "data.jsonl, record 7")
    assert str(refusal.value).startswith("data.jsonl, record 7: the rule mine") and "\n" not in str(refusal.value)


def test_a_rule_is_asked_with_the_last_question_and_the_row_of_the_file(tmp_path):
    (tmp_path / "mine.py").write_text("def mine(prompt, answer, finished, record):\n    return (prompt, answer, finished, record) == ('二', '答', False, {'id': 7})\n")
    messages = [{"role": "user", "content": "一"}, {"role": "assistant", "content": "好"}, {"role": "user", "content": "二"}]
    assert run_rules(load_rules(f"{tmp_path / 'mine.py'}:mine=3"), messages, "答", False, {"id": 7}, "here") == {"mine": 1.0}


def test_a_column_that_is_empty_asks_for_nothing_else_and_a_tiny_number_is_itself():
    for empty in (None, ""):
        assert rules.chinese("?", "hello world", True, {"language": empty}) == 0.0
    assert rules.number("?", "0.00001", True, {"ground_truth": 0.00001}) == 1.0
