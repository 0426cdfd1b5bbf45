"""The prompt contract: what is trained, what generation feeds, and that they are the same."""
import json
import os
import random
import signal
import subprocess
import sys

import pytest
from conftest import ROOT
from test_records import write

from utils import IGNORE_INDEX, TEMPLATES, BadInput, Chat, hold_out, pack, tokenize_records

NAMES = [name for name in TEMPLATES if name != "plain"]
DIALOGUES = {
    "one round": [("user", "你好"), ("assistant", "你好！有什么可以帮你？")],
    "system, five rounds": [("system", "你是小驼，说话简洁。")] + [("user", "问题"), ("assistant", "答案")] * 5,
    "emoji and code": [("user", "画个笑脸😀，再写代码"), ("assistant", "😀\n```python\nprint('你好')\n```")],
    "keys in the text": [("user", "### Response:\nAssistant: <bot>:[/INST]\n\nUser:"), ("assistant", "### Instruction:\nHuman: <human>:")],
    "rare characters": [("user", "龘 𠮷 é Ж"), ("assistant", "𠮷野家的龘字\n\n两段")],
}
BLANKS = [("user", "  问\n "), ("assistant", "  答  \n"), ("user", "\t再问"), ("assistant", "Hello")]


def as_messages(dialogue):
    return [{"role": role, "content": text} for role, text in dialogue]


def flat(pieces):
    return [i for ids, _ in pieces for i in ids]


@pytest.mark.parametrize("dialogue", DIALOGUES.values(), ids=DIALOGUES.keys())
@pytest.mark.parametrize("name", NAMES)
def test_trained_ids_are_those_of_apply_chat_template(tokenizer, name, dialogue):
    chat = Chat(tokenizer, name)
    pieces = chat.encode(as_messages(dialogue))
    whole = tokenizer.apply_chat_template(as_messages(dialogue), return_dict=False)
    assert flat(pieces) == whole and not chat.crossed


@pytest.mark.parametrize("dialogue", [*DIALOGUES.values(), BLANKS], ids=[*DIALOGUES, "blanks"])
@pytest.mark.parametrize("name", NAMES)
def test_what_stands_before_each_answer_is_what_generation_feeds(tokenizer, name, dialogue):
    chat, messages = Chat(tokenizer, name), as_messages(dialogue)
    pieces, before = chat.encode(messages), []
    answers = [i for i, (role, _) in enumerate(dialogue) if role == "assistant"]
    for ids, trained in pieces:
        if trained:
            i = answers.pop(0)
            assert flat(chat.encode(messages[:i], add_generation_prompt=True)) == before
            text = tokenizer.apply_chat_template(messages[:i], add_generation_prompt=True, tokenize=False)
            if i < 3 and not chat.crossed:  # what vLLM would feed
                assert tokenizer(text, add_special_tokens=False).input_ids == before
            bos = tokenizer.bos_token_id
            assert [bos, bos] not in [before[j : j + 2] for j in range(len(before))]
        before += ids
    assert not answers


@pytest.mark.parametrize("dialogue", DIALOGUES.values(), ids=DIALOGUES.keys())
@pytest.mark.parametrize("name", NAMES)
def test_the_label_mask_is_the_one_that_character_offsets_give(tokenizer, name, dialogue):
    """Made without the template's generation marks: find each answer in the text, take the tokens that overlap it."""
    chat, messages = Chat(tokenizer, name), as_messages(dialogue)
    pieces = chat.encode(messages)
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    assert encoding.input_ids == flat(pieces)
    prefix = " " if name in ("llama2_chinese", "llama2") else ""
    suffix = {"yayi": "\n\n", "llama2_chinese": "\n", "llama2": " "}.get(name, "")
    stop_token = {"yayi": "<|End|>", "chatml": "<|im_end|>"}.get(name, tokenizer.eos_token)
    expected, place = [False] * len(encoding.input_ids), 0
    for role, content in dialogue:
        start = text.index(content, place)
        place = start + len(content)
        if role == "assistant":
            start, stop = start - len(prefix), place + len(suffix) + len(stop_token)
            expected = [e or (a < stop and b > start) for e, (a, b) in zip(expected, encoding.offset_mapping)]
    assert [trained for ids, trained in pieces for _ in ids] == expected


def test_a_merge_across_the_border_is_not_made(bytelevel_folder):
    """After a prompt that ends in a line break, an answer that begins with one is not merged into the prompt's."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    state = json.loads((bytelevel_folder / "tokenizer.json").read_text("utf-8"))
    state["model"]["vocab"]["ĊĊ"], state["model"]["merges"] = 1000, [["Ċ", "Ċ"], *state["model"]["merges"]]
    chat = Chat(PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), bos_token="<|begin|>", eos_token="<|end|>"), "alpaca")
    (prompt, _), (answer, _), _ = chat.encode(as_messages([("user", "Hi"), ("assistant", "\n\nprint(1)")]))
    assert chat.crossed and chat.tokenizer.decode(prompt).endswith("### Response:\n") and chat.tokenizer.decode(answer) == "\n\nprint(1)<|end|>"
    assert prompt == flat(chat.encode(as_messages([("user", "Hi")]), add_generation_prompt=True))


@pytest.mark.parametrize("answer", ["Hello", " print(1)", "你好"])
@pytest.mark.parametrize("name", ["llama2", "llama2_chinese"])
def test_the_blank_before_an_answer_is_trained_with_it(tokenizer, name, answer):
    chat, messages = Chat(tokenizer, name), as_messages([("user", "Hi"), ("assistant", answer)])
    (prompt, _), (ids, _), _ = chat.encode(messages)
    assert not tokenizer.decode(prompt).endswith(" ") and chat.crossed == 0
    assert prompt + ids == tokenizer.apply_chat_template(messages, return_dict=False)
    assert prompt == tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)


@pytest.mark.parametrize("name", [*NAMES, "plain"])
def test_an_empty_system_text_is_none(tmp_path, tokenizer, name):
    chat, dialogue = Chat(tokenizer, name), DIALOGUES["one round"]
    without, empty = as_messages(dialogue), as_messages([("system", ""), *dialogue])
    render = lambda messages: tokenizer.apply_chat_template(messages, tokenize=False)
    assert render(empty) == render(without) and chat.encode(empty) == chat.encode(without)
    assert "system" not in render(empty).lower().replace("<|system|>", "")
    for row in ({"messages": empty}, {"conversations": [{"from": m["role"], "value": m["content"]} for m in empty]},
                {"system": "", "instruction": "你好", "output": dialogue[1][1]}):
        assert tokenize_records(write(tmp_path, row), chat, 200)[0][0]["input_ids"] == tokenize_records(write(tmp_path, {"messages": without}), chat, 200)[0][0]["input_ids"]


@pytest.mark.parametrize("name", NAMES)
def test_a_control_token_that_a_user_spells_stays_text(tokenizer, name):
    chat = Chat(tokenizer, name)
    control = list(chat.control)
    plain, spelled = ([{"role": "system", "content": text}, {"role": "user", "content": text}, {"role": "assistant", "content": "好"}]
                      for text in ("一二", "一" + "".join(control) + "二"))
    count = lambda messages: [flat(chat.encode(messages)).count(i) for i in chat.control.values()]
    assert count(spelled) == count(plain)
    shown = tokenizer.decode(flat(chat.encode(spelled)), clean_up_tokenization_spaces=False)
    assert shown.count("".join(control)) == 2


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_is_trained_with_its_stop_token(tokenizer, name):
    chat = Chat(tokenizer, name)
    for ids, trained in chat.encode(as_messages(DIALOGUES["system, five rounds"])):
        assert not trained or (ids[-1] in chat.stop_ids and tokenizer.decode(ids[:-1]).strip() == "答案")


def test_templates_are_written_as_their_projects_do(bytelevel_folder):
    from transformers import AutoTokenizer

    messages = as_messages([("system", "S"), ("user", "Q"), ("assistant", "A"), ("user", "R"), ("assistant", "B")])
    expected = {
        "alpaca": "<b>S\n\n### Instruction:\nQ\n\n### Response:\nA<e>\n\n### Instruction:\nR\n\n### Response:\nB<e>",
        "vicuna_chat": "<b>S\n\nUser:Q\n\nAssistant:A<e>\n\nUser:R\n\nAssistant:B<e>\n\n",
        "yayi": "<|System|>:\nS\n\n<|Human|>:\nQ\n\n<|YaYi|>:\nA\n\n<|End|><|Human|>:\nR\n\n<|YaYi|>:\nB\n\n<|End|>",
        "chatml": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
                  "<|im_start|>user\nR<|im_end|>\n<|im_start|>assistant\nB<|im_end|>\n",
        "ziya": "<b>S\n<human>:Q\n<bot>:A<e><human>:R\n<bot>:B<e>",
        "llama2_chinese": "<b>System: S\n<e><b>Human: Q\n<e><b>Assistant: A\n<e><b>Human: R\n<e><b>Assistant: B\n<e>",
        "llama2": "<b>[INST] <<SYS>>\nS\n<</SYS>>\n\nQ [/INST] A <e><b>[INST] R [/INST] B <e>",
        "plain": "SQA<e>RB<e>",
    }
    for name, text in expected.items():
        tokenizer = AutoTokenizer.from_pretrained(bytelevel_folder)
        Chat(tokenizer, name)
        assert tokenizer.apply_chat_template(messages, tokenize=False) == text.replace("<b>", "<|begin|>").replace("<e>", "<|end|>"), name
    tokenizer = AutoTokenizer.from_pretrained(bytelevel_folder)
    chat = Chat(tokenizer, "alpaca")
    prompt = tokenizer.decode(flat(chat.encode([{"role": "user", "content": "译\n雪", "input": "雪"}])))
    assert prompt == ("<|begin|>Below is an instruction that describes a task, paired with an input that provides further context. Write a response "
                      "that appropriately completes the request.\n\n### Instruction:\n译\n\n### Input:\n雪\n\n### Response:\n")


def test_a_tool_result_is_refused_where_the_template_has_no_place_for_it(tmp_path, bytelevel_folder):
    from transformers import AutoTokenizer

    path = write(tmp_path, {"messages": as_messages([("user", "几度"), ("assistant", "查"), ("tool", "19"), ("assistant", "19度")])})
    chatml = Chat(AutoTokenizer.from_pretrained(bytelevel_folder), "chatml")
    assert "<|im_start|>function\n19<|im_end|>" in chatml.tokenizer.decode(tokenize_records(path, chatml, 128)[0][0]["input_ids"])
    with pytest.raises(BadInput, match="record 0: template alpaca: .*tool"):
        tokenize_records(path, Chat(AutoTokenizer.from_pretrained(bytelevel_folder), "alpaca"), 512)


# ---- a model's own template ----
QWEN = ("{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
MARKED = ("{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}{% generation %}{{ m.content }}{% endgeneration %}"
          "{{ '<|im_end|>\n' }}{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
THINKING = ("{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + ('<think></think>' if m.role == 'assistant' and loop.last else '')"
            " + m.content + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


def own(folder, jinja):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.chat_template = jinja
    return tokenizer


@pytest.mark.parametrize("jinja", [QWEN, MARKED], ids=["prefix method", "generation marks"])
def test_auto_trains_the_answers_of_the_models_own_template_with_their_stop_token(bytelevel_folder, jinja):
    tokenizer = own(bytelevel_folder, jinja)
    pieces = Chat(tokenizer).encode(as_messages(DIALOGUES["system, five rounds"]))
    assert [tokenizer.decode(ids) for ids, trained in pieces if trained] == ["答案<|im_end|>"] * 5
    assert flat(pieces) == tokenizer.apply_chat_template(as_messages(DIALOGUES["system, five rounds"]), return_dict=False)


def test_a_template_that_rewrites_history_is_refused_but_for_its_last_round(bytelevel_folder):
    messages = as_messages([("user", "问"), ("assistant", "答"), ("user", "再问"), ("assistant", "再答")])
    chat = Chat(own(bytelevel_folder, THINKING))
    with pytest.raises(BadInput, match="rewrites earlier rounds.*--last_round_only True"):
        chat.encode(messages)
    assert flat(chat.encode(messages[:3], add_generation_prompt=True))  # talking to such a model is no problem
    pieces = Chat(own(bytelevel_folder, THINKING), last_round_only=True).encode(messages)
    assert [chat.tokenizer.decode(ids) for ids, trained in pieces if trained] == ["<think></think>再答<|im_end|>"]


def test_a_template_whose_answers_never_stop_is_refused_where_it_is_trained_and_can_be_used(tmp_path, bytelevel_folder):
    jinja = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    chat = Chat(own(bytelevel_folder, jinja))
    assert chat.tokenizer.decode(flat(chat.encode(as_messages([("user", "问")]), True))) == "user: 问\nassistant: " and chat.stop_ids == [chat.tokenizer.eos_token_id]
    with pytest.raises(BadInput, match="would never stop"):
        tokenize_records(write(tmp_path, {"instruction": "问", "output": "答"}), chat, 100)


def test_without_a_template_of_its_own_a_model_gets_llama2_chinese(tokenizer):
    assert Chat(tokenizer).template == "llama2_chinese"
    with pytest.raises(BadInput, match="did you mean alpaca"):
        Chat(tokenizer, "alpacca")


# ---- examples ----
def test_a_long_dialogue_becomes_windows_that_train_each_answer_once(tmp_path, tokenizer):
    generator = random.Random(0)
    rows = []
    for _ in range(30):
        rounds = [t for n in range(generator.randint(1, 12)) for t in ({"role": "user", "content": f"问{n}" + "长" * generator.randint(0, 40)},
                                                                       {"role": "assistant", "content": f"答{n}号" + "文" * generator.randint(0, 40)})]
        rows.append({"messages": as_messages([("system", "系统文")]) + rounds})
    chat = Chat(tokenizer, "chatml")
    examples, counts = tokenize_records(write(tmp_path, *rows), chat, 300)
    assert counts["windows"] > 10 and not counts["answers_cut"] and not counts["prompts_cut"]
    assert counts["supervised_tokens"] == counts["answer_tokens"]
    trained = [[] for _ in rows]
    for example in examples:
        assert len(example["input_ids"]) <= 300
        assert tokenizer.decode(example["input_ids"]).startswith("<|im_start|>system\n系统文<|im_end|>") or "系统文" in tokenizer.decode(example["input_ids"])
        answer = []
        for label in example["labels"]:
            answer += [label] if label != IGNORE_INDEX else []
            if label in chat.stop_ids:
                trained[example["record"]].append(tokenizer.decode(answer, skip_special_tokens=True))
                answer = []
        assert not answer
    assert trained == [[m["content"] for m in row["messages"] if m["role"] == "assistant"] for row in rows]


def test_a_window_reads_as_many_earlier_rounds_as_fit(tmp_path, bytelevel_folder):
    from transformers import AutoTokenizer

    chat = Chat(AutoTokenizer.from_pretrained(bytelevel_folder), "chatml")
    rows = [{"messages": as_messages([(role, f"{role[0]}{n}") for n in range(10) for role in ("user", "assistant")])}]
    one = sum(len(ids) for ids, _ in chat.encode(rows[0]["messages"][:2]))
    texts = [chat.tokenizer.decode(e["input_ids"]) for e in tokenize_records(write(tmp_path, *rows), chat, one * 4)[0]]
    assert [text.count("<|im_start|>user") for text in texts] == [4, 4, 4]
    assert "u6" in texts[2] and "u5" not in texts[2]  # rounds 8 and 9 are trained, 6 and 7 are read


def test_an_answer_longer_than_the_window_is_cut_without_a_stop_token(tmp_path, tokenizer):
    chat = Chat(tokenizer, "chatml")
    path = write(tmp_path, {"instruction": "短问", "output": "长" * 500}, {"instruction": "长" * 500, "output": "短答"})
    (cut, whole), counts = tokenize_records(path, chat, 100)
    assert counts["answers_cut"] == counts["prompts_cut"] == 1
    assert len(cut["input_ids"]) == 100 and cut["labels"][-1] not in (*chat.stop_ids, IGNORE_INDEX)
    assert "短问" in tokenizer.decode(cut["input_ids"])
    assert "短答" in tokenizer.decode([i for i in whole["labels"] if i != IGNORE_INDEX]) and whole["labels"].count(chat.stop_ids[-1]) + whole["labels"].count(chat.stop_ids[0]) == 1
    assert tokenizer.decode(whole["input_ids"]).rstrip().endswith("<|im_end|>") and "assistant" in tokenizer.decode(whole["input_ids"])


def test_max_length_below_the_frame_of_the_template_is_refused(tmp_path, tokenizer):
    with pytest.raises(BadInput, match="--max_length=20 is below the .* tokens"):
        tokenize_records(write(tmp_path, {"instruction": "问", "output": "答"}), Chat(tokenizer, "yayi"), 20)


# ---- cache ----
def test_tokenized_data_is_reused_only_when_nothing_changed(tmp_path, bytelevel_folder, monkeypatch):
    from transformers import AutoTokenizer

    import utils as module

    made = []
    monkeypatch.setattr(module, "whole_folder", lambda folder, real=module.whole_folder: (made.append(folder), real(folder))[1])
    path = write(tmp_path, *[{"instruction": f"问{n}", "output": "答\\n案"} for n in range(600)])
    new = lambda name="chatml", **flags: Chat(AutoTokenizer.from_pretrained(bytelevel_folder), name, **flags)
    runs = [lambda: tokenize_records(path, new(), 128), lambda: tokenize_records(path, new("ziya"), 128), lambda: tokenize_records(path, new(), 64),
            lambda: tokenize_records(path, new(last_round_only=True), 128), lambda: tokenize_records(path, new(), 128, unescape_newlines=True)]
    ids = lambda run: (run()[0]["input_ids"][:], run()[1])
    first = [ids(run) for run in runs]
    assert len(made) == 5 and all(len(examples) == counts["records"] == 600 for examples, counts in first)
    assert [ids(run) for run in runs] == first and len(made) == 5
    before = os.stat(path)
    write(tmp_path, *[{"instruction": f"问{n}", "output": "改\\n案"} for n in range(600)])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert os.stat(path).st_size == before.st_size  # path, size and time are the same, the content is another
    assert ids(runs[0])[0] != first[0][0] and len(made) == 6
    other = AutoTokenizer.from_pretrained(bytelevel_folder, eos_token="!")  # stands in tokenizer_config.json alone
    assert tokenize_records(path, Chat(other, "alpaca"), 128)[0][0] != tokenize_records(path, new("alpaca"), 128)[0][0]


def test_what_was_killed_while_it_tokenized_is_made_anew_and_whole(tmp_path, bytelevel_folder):
    path = write(tmp_path, *[{"instruction": f"问{n}", "output": "答"} for n in range(6000)])
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import utils
from transformers import AutoTokenizer
real, calls = utils.cut_dialogue, []
def cut(*arguments):
    calls.append(0)
    if sys.argv[1] == "kill" and len(calls) > 700:
        os.killpg(0, signal.SIGKILL)  # the parent and all its workers
    return real(*arguments)
utils.cut_dialogue = cut
os.sched_getaffinity = lambda _: range(int(sys.argv[2]))
examples, counts = utils.tokenize_records({path!r}, utils.Chat(AutoTokenizer.from_pretrained({str(bytelevel_folder)!r}), "ziya"), 100)
print(len(examples), counts["records"], examples["record"][:] == list(range(6000)))
"""
    run = lambda *words: subprocess.run([sys.executable, "-c", code, *words], env=os.environ | {"YANGTUO_CACHE": str(tmp_path)}, capture_output=True, text=True, start_new_session=True)
    for cores in "12":
        assert run("kill", cores).returncode == -signal.SIGKILL
        assert not [folder for folder in (tmp_path / "examples").iterdir() if not folder.name.startswith(".")]
    for _ in range(2):
        done = run("whole", "2")
        assert done.stdout == "6000 6000 True\n", done.stderr


def test_the_second_rank_of_a_machine_waits_for_the_first(tmp_path, bytelevel_folder, monkeypatch):
    from transformers import AutoTokenizer

    path, waits = write(tmp_path, {"instruction": "问", "output": "等"}), []

    def first_rank(_):
        waits.append(0)
        monkeypatch.setenv("LOCAL_RANK", "0")
        tokenize_records(path, chat, 100)
        monkeypatch.setenv("LOCAL_RANK", "1")

    chat = Chat(AutoTokenizer.from_pretrained(bytelevel_folder), "ziya")
    monkeypatch.setattr("time.sleep", first_rank)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert len(tokenize_records(path, chat, 100)[0]) == 1 and len(waits) == 1


def test_packing_is_whole_and_tight():
    generator = random.Random(0)
    for capacity in (7, 256, 2048):
        lengths = [generator.randint(1, capacity) for _ in range(3000)]
        blocks = pack(lengths, capacity)
        assert sorted(e for block in blocks for e in block) == list(range(3000))
        assert all(sum(lengths[e] for e in block) <= capacity for block in blocks)
        assert len(blocks) <= 1.05 * sum(lengths) / capacity + 1


def test_held_out_records_are_not_trained(tmp_path, tokenizer):
    rows = [{"input": ["问" * 20] * n, "output": ["答" * 20] * n} for n in range(1, 11)]
    examples, _ = tokenize_records(write(tmp_path, *rows), Chat(tokenizer, "ziya"), 200)
    train, held = hold_out(examples, 0.3, seed=1)
    records = lambda chosen: {examples[int(e)]["record"] for e in chosen}
    assert len(records(held)) == 3 and not records(held) & records(train) and len(train) + len(held) == len(examples)
    assert all((a == b).all() for a, b in zip(hold_out(examples, 0.3, seed=1), (train, held))) and not len(hold_out(examples, 0, seed=1)[1])
    with pytest.raises(BadInput, match="leaves nothing"):
        hold_out(examples, 10, seed=1)


def test_a_broken_record_is_named_also_when_many_processes_tokenize(tmp_path, tokenizer, monkeypatch, capfd):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(2))
    rows = [{"instruction": "问", "output": "答"}] * 5000 + [json.dumps({"instruction": "问"}) + "\n"]
    with pytest.raises(BadInput, match="record 5000: it has no answer"):
        tokenize_records(write(tmp_path, *rows), Chat(tokenizer, "ziya"), 100)
    examples, counts = tokenize_records(write(tmp_path, *rows), Chat(tokenizer, "ziya"), 100, skip_bad_records=True)
    assert len(examples) == counts["records"] == 5000 and counts["bad record (dropped)"] == 1 and examples["record"][:] == list(range(5000))
    rows[4500:] = [{"messages": as_messages([("user", "几度"), ("assistant", "查"), ("tool", "19"), ("assistant", "19度")])}]
    with pytest.raises(BadInput, match="data.jsonl, record 4500: template ziya: "):  # found by a worker
        tokenize_records(write(tmp_path, *rows), Chat(tokenizer, "ziya"), 100, skip_bad_records=False)
    assert tokenize_records(write(tmp_path, *rows), Chat(tokenizer, "ziya"), 100, skip_bad_records=True)[1]["refused"] == 1
    with pytest.raises(BadInput, match="all its records were dropped"):
        tokenize_records(write(tmp_path, {"instruction": "问"}), Chat(tokenizer, "ziya"), 100, skip_bad_records=True)
    assert not capfd.readouterr().out


@pytest.mark.parametrize("template", sorted(TEMPLATES))
def test_a_tokenizer_that_merges_the_very_first_question_and_answer_is_taken(template):
    """SmolLM2 merges "?!": the shortest dialogue, by which the stop token is found, crosses its own border in the template plain."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({letter: i for i, letter in enumerate([*letters, "?!", "<|end|>"])}, [("?", "!")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    chat = Chat(PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", bos_token="<|end|>"), template)
    assert chat.stops and chat.crossed == 0
