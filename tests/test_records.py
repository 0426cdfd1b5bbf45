"""What a file may hold, what is mended, and what is refused with its place and reason."""
import json
import random
from collections import Counter

import pytest
from conftest import ROOT

from utils import BadInput, clean_text, numbered_records

DIALOGUE = [("user", "你好"), ("assistant", "你好！"), ("user", "再见"), ("assistant", "再见！")]


def read_records(path, **how):
    return (record for _, record in numbered_records(path, **how))


def turns(record):
    return [(message["role"], message["content"]) for message in record["messages"]]


def write(folder, *rows, name="data.jsonl"):
    path = folder / name
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return str(path)


@pytest.mark.parametrize("row", [
    {"instruction": "再见", "output": "再见！", "history": [["你好", "你好！"]]},
    {"conversations": [{"from": "human", "value": "你好"}, {"from": "gpt", "value": "你好！"}, {"from": "user", "value": "再见"}, {"from": "yayi", "value": "再见！"}]},
    {"messages": [{"role": role, "content": text} for role, text in DIALOGUE]},
    {"input": ["你好", "再见"], "output": ["你好！", "再见！"]},
    {"prompt": ["你好", "再见"], "output": ["你好！", "再见！"], "task": "chat"},
    {"text": "<s>Human: 你好\n</s><s>Assistant: 你好！\n</s><s>Human: 再见\n</s><s>Assistant: 再见！\n</s>"},
])
def test_every_schema_gives_the_same_messages(tmp_path, row):
    assert [turns(record) for record in read_records(write(tmp_path, row))] == [DIALOGUE]


def test_json_array_csv_and_parquet_read_as_jsonl_does(tmp_path):
    import csv

    import pyarrow
    import pyarrow.parquet

    rows = [{"input": "问，\n“一”", "target": "答😀"}, {"input": "", "target": "空"}]
    with open(tmp_path / "data.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["input", "target"])
        writer.writeheader()
        writer.writerows(rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "data.parquet")
    (tmp_path / "data.json").write_text(json.dumps(rows, indent=2), "utf-8")
    expected = [turns(record) for record in read_records(write(tmp_path, *rows))]
    assert expected[0] == [("user", "问，\n“一”"), ("assistant", "答😀")]
    for name in ("data.csv", "data.parquet", "data.json"):
        assert [turns(record) for record in read_records(str(tmp_path / name))] == expected


@pytest.mark.parametrize("path", sorted((ROOT / "sample").glob("*.*")), ids=lambda path: path.name)
def test_every_sample_is_read_without_a_complaint(path):
    if path.suffix not in (".md", ".py") and path.stem != "prompts":
        notes = Counter()
        documents = "line" if path.stem in ("corpus", "completion") else None
        assert len(list(numbered_records(str(path), notes=notes, document_separator=documents, preference=path.stem == "preference"))) >= (4 if documents else 10)
        assert not +notes


def test_an_input_is_joined_to_the_instruction_and_kept_apart_as_well(tmp_path):
    record = next(read_records(write(tmp_path, {"instruction": "翻译", "input": "雪", "output": "snow", "system": "简洁"})))
    assert record["messages"][:2] == [{"role": "system", "content": "简洁"}, {"role": "user", "content": "翻译\n雪", "input": "雪"}]


def test_what_is_odd_is_mended_and_counted(tmp_path):
    notes = Counter()
    path = write(tmp_path, "\ufeff", {"conversations": [
        {"from": "gpt", "value": "欢迎"}, {"from": "human", "value": "一"}, {"from": "human", "value": "二\\n三"}, {"from": "gpt", "value": ""},
        {"from": "human", "value": "走了\ufffd"}], "id": 7})
    record = next(read_records(path, notes=notes, unescape_newlines=True))
    assert turns(record) == [("user", "一\n二\n三"), ("assistant", "")]
    for what in ("byte order mark", "two user turns", "answer before", "trailing user turn", "empty answer", "U+FFFD", "literal \\n", "column 'id'"):
        assert any(what in note for note in +notes), what


@pytest.mark.parametrize("row, reason", [
    ({"instruction": "问"}, "no answer"),
    ({"instruction": "问", "output": ["答"]}, "a list"),
    ({"instruction": "问", "output": 3}, "an? int"),
    ({"messages": [{"role": "user", "content": "问"}, {"role": "boss", "content": "答"}]}, "unknown role 'boss'"),
    ({"conversations": [{"from": "human"}, {"from": "gpt", "value": "答"}]}, "lacks 'from' or 'value'"),
    ({"conversations": "问"}, "a str, a list"),
    ({"input": ["问", "问"], "output": ["答"]}, "as many answers"),
    ({"question": "问", "answer": "答"}, "keys question, answer"),
    ({"text": "<s>Human: 问\n</s> 答"}, "breaks the pattern"),
    ({"instruction": "你好世界".encode().decode("latin-1"), "output": "答"}, "mojibake"),
    ({"instruction": "你好，世界，今天天气很好".encode().decode("gb18030", "replace"), "output": "答"}, "mojibake"),
    ({"instruction": "把下面这一句话翻译成英文：" + "我们去公园散步，然后回家吃饭".encode().decode("gb18030", "replace"), "output": "答"}, "mojibake"),
    ('{"instruction": "\\ud83d", "output": "答"}\n', "half a character"),
    (["问", "答"], "a list where an object"),
    ({"messages": [{"role": "user", "content": "问"}, {"role": "system", "content": "x"}, {"role": "assistant", "content": "答"}]}, "does not stand first"),
])
def test_a_bad_record_is_refused_with_its_number_and_reason(tmp_path, row, reason):
    path = write(tmp_path, {"instruction": "问", "output": "答"}, row)
    with pytest.raises(BadInput, match=f"record 1: .*{reason}"):
        list(read_records(path))


def test_bad_records_can_be_dropped_and_are_counted(tmp_path, capsys):
    path = write(tmp_path, *[{"instruction": "问", "output": "答"}, {"instruction": "问"}] * 5)
    assert len(list(read_records(path, skip_bad_records=True))) == 5
    assert "dropped 5 bad records of 10" in (error := capsys.readouterr().err) and error.count("no answer") == 3


@pytest.mark.parametrize("data, reason", [
    (b"", "empty"),
    (b'[{"instruction": "a", "output": "b"}, {"instr', "line 1: not whole JSON"),
    (b'{"instruction": "a", "output": "b"}\n{"instruction": "a"', "line 2: not whole JSON"),
    ('{"instruction": "问", "output": "答"}'.encode("gb18030"), "looks like GBK.*iconv"),
    ('{"instruction": "问", "output": "答"}'.encode("utf-16-le"), "looks like UTF-16.*iconv"),
    (b'{"instruction": "\xff\xfe\xfd"}', "byte 17 is not UTF-8"),
])
def test_a_file_that_cannot_be_read_is_refused(tmp_path, data, reason):
    (tmp_path / "data.json").write_bytes(data)
    with pytest.raises(BadInput, match=reason):
        list(read_records(str(tmp_path / "data.json")))


def test_parquet_cut_in_the_middle_is_refused(tmp_path):
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"instruction": "问", "output": "答"}]), tmp_path / "data.parquet")
    whole = (tmp_path / "data.parquet").read_bytes()
    for size in (0, 20, len(whole) - 9):
        (tmp_path / "data.parquet").write_bytes(whole[:size])
        with pytest.raises(BadInput, match="not whole Parquet"):
            list(read_records(str(tmp_path / "data.parquet")))


def test_a_csv_cut_off_or_misquoted_is_refused(tmp_path):
    for text in ('input,target\n一,"二\n', 'input,target\n一,"二" 三\n'):
        with pytest.raises(BadInput, match="not whole CSV"):
            list(read_records(write(tmp_path, text, name="data.csv")))


def test_a_csv_without_the_columns_is_refused(tmp_path):
    with pytest.raises(BadInput, match="keys 问题, 回答"):
        list(read_records(write(tmp_path, "问题,回答\n一,二\n", name="data.csv")))


def test_real_chinese_is_never_taken_for_mojibake():
    """Random common characters, in millions of runs a day of somebody's data, must not be refused."""
    common = [bytes([high, low]).decode("gb2312") for high in range(0xB0, 0xD8) for low in range(0xA1, 0xFA)]
    generator = random.Random(0)
    for _ in range(20000):
        clean_text("".join(generator.choices(common, k=generator.randint(6, 20))), "user", False, Counter())
    clean_text("café naïve Müller Ænima ½ €", "user", False, Counter())


def test_every_format_of_preferences_gives_one_shape(tmp_path):
    """LLaMA-Factory's pairs as text or turn, MedicalGPT's, trl's prompt, whole dialogues."""
    record = {"messages": [{"role": "user", "content": "问"}], "chosen": "好", "rejected": "坏"}
    turn = lambda text: {"from": "gpt", "value": text}
    dialogue = lambda text: [{"role": "user", "content": "问"}, {"role": "assistant", "content": text}]
    rows = [{"instruction": "问", "input": "", "chosen": "好", "rejected": "坏"}, {"conversations": [{"from": "human", "value": "问"}], "chosen": turn("好"), "rejected": turn("坏")},
            {"question": "问", "response_chosen": "好", "response_rejected": "坏"}, {"prompt": "问", "chosen": "好", "rejected": "坏"},
            {"chosen": dialogue("好"), "rejected": dialogue("坏")}, {"prompt": "问", "chosen": dialogue("好"), "rejected": dialogue("坏")},
            {"prompt": dialogue("")[:1], "chosen": dialogue("好")[1:], "rejected": dialogue("坏")[1:]}]
    for row in rows:
        (tmp_path / "pair.jsonl").write_text(json.dumps(row), "utf-8")
        assert list(numbered_records(str(tmp_path / "pair.jsonl"), preference=True)) == [(0, record)], row


@pytest.mark.parametrize("row, said", [
    ({"instruction": "问", "chosen": "好"}, "'rejected'"),
    ({"instruction": "问", "chosen": "好", "rejected": "好"}, "same text"),
    ({"conversations": [{"from": "gpt", "value": "问"}], "chosen": "好", "rejected": "坏"}, "user's turn"),
    ({"chosen": [{"role": "user", "content": "一"}, {"role": "assistant", "content": "好"}], "rejected": [{"role": "user", "content": "二"}, {"role": "assistant", "content": "坏"}]}, "different questions"),
    ({"instruction": "问", "chosen": ["好"], "rejected": "坏"}, "a string"),
])
def test_a_preference_without_two_answers_to_one_question_is_refused(tmp_path, row, said):
    (tmp_path / "pair.jsonl").write_text(json.dumps(row), "utf-8")
    with pytest.raises(BadInput, match=said):
        list(numbered_records(str(tmp_path / "pair.jsonl"), preference=True))


def test_a_row_with_two_names_for_its_question_is_read_the_same_way_each_time(tmp_path):
    (tmp_path / "pair.jsonl").write_text(json.dumps({"prompt": "乙", "question": "甲", "chosen": "好", "rejected": "坏"}), "utf-8")
    assert next(numbered_records(str(tmp_path / "pair.jsonl"), preference=True))[1]["messages"][0]["content"] == "甲"
