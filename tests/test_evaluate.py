"""evaluate.py: the numbers of lm-evaluation-harness, prompts as they are written, and no claim beyond the error."""
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import evaluate
from benchmarks.record_lm_eval import make_model, write_sets
from utils import BadInput, RunStopped

RECORDED = json.loads((ROOT / "tests" / "lm_eval.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    write_sets(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """The model that was recorded, with a tokenizer that begins each text with a BOS, and with one that does not."""
    folders = {side: tmp_path_factory.mktemp("models") / side.replace(" ", "-") for side in ("bos", "no bos")}
    for side, folder in folders.items():
        make_model(folder, side == "bos")
    return folders


def measure(model: Path, output_dir: Path, **flags) -> tuple[dict, list[dict]]:
    evaluate.main(model_name_or_path=str(model), output_dir=str(output_dir), **flags)
    return json.loads((output_dir / "results.json").read_text("utf-8")), [json.loads(line) for line in (output_dir / "samples.jsonl").read_text("utf-8").splitlines()]


@pytest.mark.parametrize("side", ["bos", "no bos", "chat"])
def test_every_log_likelihood_and_score_is_that_of_lm_evaluation_harness(sets, models, tmp_path, side):
    tasks = "ceval,cmmlu,mmlu,arc,hellaswag" + ",truthfulqa,gsm8k,perplexity" * (side != "chat")
    results, lines = measure(models["no bos" if side == "chat" else side], tmp_path / "out", data_dir=str(sets), tasks=tasks, max_new_tokens=40,
                             template="auto" if side == "chat" else "none")
    for task, recorded in RECORDED[side].items():
        found = [line for line in lines if line["task"] == {"mc1": "truthfulqa", "mc2": "truthfulqa", "perplexity": "perplexity/texts"}.get(task, task)]
        for line, theirs in zip(found, recorded["samples"], strict=True):
            if task == "gsm8k":
                assert line["output"] == theirs
            elif task == "perplexity":
                assert line["bits"] == pytest.approx(theirs, abs=1e-3)
            elif task in ("mc1", "mc2"):
                assert {round(value, 3) for value in line["loglikelihoods"]} >= {round(value, 3) for value in theirs}
            else:  # in a chat the harness counts the line break that the template puts before the answer as a part of each choice
                offset = line["loglikelihoods"][0] - theirs[0] if side == "chat" else 0
                assert [value - offset for value in line["loglikelihoods"]] == pytest.approx(theirs, abs=1e-4) and offset >= 0
        for name, score in recorded.get("scores", {}).items():
            if task in ("mc1", "mc2"):
                assert results["results"]["truthfulqa"][task] == pytest.approx(score, abs=1e-4)
            elif name in ("acc", "acc_norm")[: 1 if side == "chat" else 2]:
                assert results["results"][task][name] == pytest.approx(score, abs=1e-6)


def rows(model: Path, *prompts: tuple[str, list[str]]):
    """(model, Chat, rows of each prompt with its choices)."""
    loaded, chat = evaluate.load_model(str(model))
    asked = [dict(head="", question=prompt, choices=choices) for prompt, choices in prompts]
    return loaded, chat, [evaluate.rows_of(chat, True, question, []) for question in asked]


PROMPTS = [("羊驼吃什么？答案：", ["草", "石头和沙子", "no one knows"]), ("羊驼吃", ["什么都吃", "什么"]), ("羊驼吃什么？它住在山上，那里有雪。答案：", list("ABCD"))]


@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.parametrize("side", ["bos", "no bos"])
def test_a_prefix_that_is_shared_gives_what_each_prompt_gives_alone(models, side, batch_size):
    model, _, questions = rows(models[side], *PROMPTS)
    with torch.inference_mode():
        alone = [[sum(float(torch.log_softmax(model(torch.tensor([ids])).logits[0, i - 1], -1)[ids[i]]) for i in range(len(ids) - count, len(ids))) for ids, count in question]
                 for question in questions]
        for length in (0, 3, 6):
            prefix = questions[0][0][0][:length]
            found = evaluate.log_likelihoods(model, questions, prefix, evaluate.prefill(model, prefix), batch_size)
            for ours, theirs in zip(found, alone):
                assert ours == pytest.approx(theirs, abs=1e-4)


def test_each_prompt_has_one_bos_where_the_tokenizer_writes_one(models):
    for side, count in (("bos", 1), ("no bos", 0)):
        _, chat, questions = rows(models[side], *PROMPTS)
        assert {ids.count(0) for question in questions for ids, _ in question} == {count}
        text = dict(document=True, messages=[{"role": "assistant", "content": "羊驼" * 50}])
        found = evaluate.windows(chat, text, 40)
        assert len(found) > 3 and all(ids.count(0) == 1 and ids[0] == 0 and len(ids) <= 40 for ids, _ in found)  # a text has one in any case


def test_each_token_of_a_text_counts_once_and_windows_change_little(models, tmp_path):
    _, chat, _ = rows(models["no bos"])
    for length in (8, 9, 40, 1000):
        for context in ([], [{"role": "user", "content": "你好，"}]):
            text = dict(document=True, messages=[*context, {"role": "assistant", "content": "羊驼住在山上。" * 9}])
            scored = [ids[place] for ids, places in evaluate.windows(chat, text, length) for place in places]
            assert scored == chat.tokenizer(text["messages"][-1]["content"]).input_ids
    (tmp_path / "a.txt").write_text("羊驼住在山上。\n\nhello\n", "utf-8")
    results, lines = measure(models["no bos"], tmp_path / "out", eval_path=str(tmp_path / "a.txt"))
    found = results["results"]["perplexity"]
    assert found["score"] == pytest.approx(sum(line["bits"] for line in lines) / 12) and found["n"] == 2 and found["characters"] == 12
    assert found["loss"] == pytest.approx(sum(line["bits"] for line in lines) * math.log(2) / found["tokens"])


def test_records_are_scored_on_their_answers_as_training_sees_them(models, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"instruction": "你好", "output": "好！"}) + "\n" + json.dumps({"instruction": "x", "output": "长" * 99}) + "\n", "utf-8")
    results, (first, second, *answers) = measure(models["no bos"], tmp_path / "out", eval_path=str(tmp_path / "a.jsonl"), num_answers=1, max_new_tokens=4, max_length=64)
    model, chat = evaluate.load_model(str(models["no bos"]))
    (prompt, _), (answer, _), *_ = chat.encode([{"role": "user", "content": "你好"}, {"role": "assistant", "content": "好！"}])
    with torch.inference_mode():
        losses = torch.nn.functional.cross_entropy(model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1], torch.tensor(answer), reduction="sum")
    assert first["bits"] == pytest.approx(float(losses) / math.log(2), abs=1e-3) and first["tokens"] == len(answer) and first["characters"] == 2
    assert second["dropped"] and results["results"]["perplexity"]["dropped"] == 1  # an answer that is cut has no bits per character
    assert [line["question"] for line in answers] == ["你好"] and answers[0]["answer"] == "好！"


@pytest.mark.parametrize("file, text", [("results.json", "{}"), ("results.json", '{"results": 5}'), ("results.json", '{"results": {"arc": 5}}'), ("samples.jsonl", "null\n"),
                                        ("samples.jsonl", '{"task": "arc"}\n'), ("samples.jsonl", '{"task": "arc", "subject": null, "id": [], "hash": 5}\n')])
def test_a_damaged_measurement_is_named_and_not_gone_on_from(tmp_path, file, text):
    question = dict(task="arc", subject=None, id=0, question="x", choices=["a", "b"], answer=0)
    line, whole = evaluate.choice_line(question, [-1.0, -2.0], 0, False), {"results": {"arc": {"score": 1.0}}, "flags": {}, "warnings": []}
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "results.json").write_text(json.dumps(whole))
        (tmp_path / folder / "samples.jsonl").write_text(json.dumps(line) + "\n")
    evaluate.check_lines([line], [question])
    (tmp_path / "b" / file).write_text(text)
    with pytest.raises(BadInput, match="is damaged, or of another version"):
        evaluate.main(compare=f"{tmp_path / 'a'},{tmp_path / 'b'}", output_dir=str(tmp_path / "out"))
    if file == "samples.jsonl":
        with pytest.raises(BadInput, match="measure again, into a new folder"), evaluate.as_written("b"):
            evaluate.check_lines([json.loads(text)], [question])


def test_bad_records_end_the_measurement_or_are_left_out(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"instruction": "x", "output": 5}\n{"instruction": "你好", "output": "好！"}\n', "utf-8")
    with pytest.raises(BadInput, match="record 0: .* drop bad records with --skip_bad_records True"):
        evaluate.read_tasks(["perplexity"], None, None, 0, None, str(tmp_path / "a.jsonl"), 0)
    (question,) = evaluate.read_tasks(["perplexity"], None, None, 0, None, str(tmp_path / "a.jsonl"), 0, skip_bad_records=True)
    assert question["id"] == 1 and "dropped 1 bad records of 2" in capsys.readouterr().err
    (tmp_path / "b.jsonl").write_text('{"foo": 1}\n{"text": "一段文字。"}\n', "utf-8")  # what the file holds is told from the first record that says it
    (question,) = evaluate.read_tasks(["perplexity"], None, None, 0, None, str(tmp_path / "b.jsonl"), 0, skip_bad_records=True)
    assert question["document"] and question["id"] == 1


def test_whole_shots_are_dropped_where_the_context_is_too_short_and_the_question_stays(models):
    _, chat = evaluate.load_model(str(models["bos"]))
    question = dict(head="HEAD\n\n", shots=[(f"shot {i}?", "A") for i in range(5)], question="最后的问题？", choices=list("AB"))
    everything = len(evaluate.rows_of(chat, True, question, question["shots"])[0][0]) - 1
    for context, shots in ((everything, 5), (everything - 1, 4), (everything - 20, 3), (30, 0)):
        asked, kept, cut = evaluate.fitted_rows(chat, dict(plain=True, context=context), question)
        text = chat.tokenizer.decode(asked[0][0], skip_special_tokens=True)
        assert (kept, cut) == (shots, False) and text.startswith("HEAD") and text.endswith("最后的问题？ A") and text.count("shot") == shots
        assert len(asked[0][0]) - 1 <= context and asked[0][0][0] == 0 and ("shot 4?" in text) == (shots > 0)  # the first go first
    asked, kept, cut = evaluate.fitted_rows(chat, dict(plain=True, context=12), question)
    assert (kept, cut) == (0, True) and len(asked[0][0]) == 13 and asked[0][0][0] == 0


def test_cells_reach_the_prompt_as_they_are_written(sets):
    questions = evaluate.read_tasks(["ceval", "cmmlu", "mmlu"], str(sets), None, 5, None, None, 0)
    prompts = "\n".join(evaluate.plain_prompt(question, question["shots"]) for question in questions)
    assert "C. None\n" in prompts and "C. 007\n" in prompts and "D. 1.0\n" in prompts and "nan" not in prompts
    assert "以下是中国关于注册会计师的单项选择题" in prompts and "以下是关于农学的单项选择题" in prompts and "about abstract algebra." in prompts


def test_shots_are_never_the_question_and_the_same_for_any_limit(sets, tmp_path):
    shutil.copytree(sets, tmp_path / "sets")
    dev, test = (tmp_path / "sets" / "cmmlu" / part / "agronomy.csv" for part in ("dev", "test"))
    shutil.copy(dev, test)
    whole = evaluate.read_tasks(["cmmlu"], str(tmp_path / "sets"), None, 3, None, None, 0)
    assert all(question["question"] not in [asked for asked, _ in question["shots"]] and len(question["shots"]) == 3 for question in whole)
    assert evaluate.read_tasks(["cmmlu"], str(tmp_path / "sets"), None, 3, 2, None, 0) == whole[:2]


def test_a_log_likelihood_that_is_no_number_is_an_error(sets, models, tmp_path):
    shutil.copytree(models["bos"], tmp_path / "broken")
    model, _ = evaluate.load_model(str(models["bos"]))
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    model.save_pretrained(tmp_path / "broken")
    for tasks in ("truthfulqa", "perplexity"):
        with pytest.raises(RunStopped, match="weights are broken"):
            measure(tmp_path / "broken", tmp_path / tasks, data_dir=str(sets), tasks=tasks)


def test_a_model_no_better_than_guessing_is_called_out(models, tmp_path, monkeypatch, capfd):
    (tmp_path / "a.txt").write_text("羊驼住在山上。\n", "utf-8")
    results, _ = measure(models["bos"], tmp_path / "random", eval_path=str(tmp_path / "a.txt"))
    assert "apply_delta.py" in results["warnings"][0] and "apply_delta.py" in capfd.readouterr().err
    assert "**Warning:**" in (tmp_path / "random" / "report.md").read_text("utf-8")
    model, chat = evaluate.load_model(str(models["bos"]))
    for loss, warned in ((3.0, False), (5.57, True)):  # of ln 265 = 5.58
        monkeypatch.setattr(evaluate, "token_losses", lambda *_, loss=loss: ([loss], [True]))
        assert bool(evaluate.look(model, chat, [{"question": "羊驼"}])) == warned


def test_a_killed_run_goes_on_and_ends_in_the_same_file(sets, models, tmp_path):
    flags = dict(data_dir=str(sets), tasks="hellaswag,cmmlu,gsm8k", per_device_eval_batch_size=1, max_new_tokens=5)
    measure(models["bos"], tmp_path / "whole", **flags)
    whole = (tmp_path / "whole" / "samples.jsonl").read_bytes()
    five = sum(len(line) + 1 for line in whole.split(b"\n")[:5])  # in the middle of a chunk of four, behind one of two
    for size in (0, five, five + 9, len(whole) - 1):
        shutil.copytree(tmp_path / "whole", tmp_path / "killed", dirs_exist_ok=True)
        (tmp_path / "killed" / "results.json").unlink()
        (tmp_path / "killed" / "samples.jsonl").write_bytes(whole[:size])
        measure(models["bos"], tmp_path / "killed", **flags)
        assert (tmp_path / "killed" / "samples.jsonl").read_bytes() == whole
    with pytest.raises(BadInput, match="was begun with max_new_tokens = 5, now it is 6"):
        measure(models["bos"], tmp_path / "whole", **flags | dict(max_new_tokens=6))


def test_a_chunk_that_was_cut_off_is_measured_again_as_a_whole(tmp_path):
    """So that each batch holds the same questions as in a run that was not killed."""
    (tmp_path / "run.json").write_text("{}")
    groups = [[None] * 2, [None] * 6, [None] * 1]
    for lines, kept in ((0, 0), (1, 0), (2, 2), (5, 2), (6, 6), (7, 6), (8, 8), (9, 9)):
        (tmp_path / "samples.jsonl").write_text("{}\n" * lines + '{"cut')
        assert len(evaluate.lines_so_far(str(tmp_path), {}, groups, 4)) == kept


# ---- results ----
def test_choices_are_scored_by_character_and_by_byte_under_their_own_names():
    question = dict(task="arc", subject=None, id=0, choices=["草", "abc", "a"], answer=0)
    line = evaluate.choice_line(question, [-4.0, -6.0, -3.0], 0, False)
    assert line["pick"] == 2 and line["scores"] == {"acc": 0.0, "acc_norm": 0.0, "acc_bytes": 1.0}
    assert evaluate.choice_line(question | dict(choices=list("ABC")), [-1.0, -6.0, -3.0], 0, False)["scores"] == {"acc": 1.0, "acc_norm": 1.0, "acc_bytes": 1.0}


@pytest.mark.parametrize("output, strict, flexible", [(" 1 + 1\n#### 1,200.", 1, 1), ("so it is $1,200", 0, 1), ("#### 12\nQ", 0, 0), ("1200 or 7", 0, 0), ("", 0, 0)])
def test_the_answer_of_a_problem_is_its_last_number(output, strict, flexible):
    scores = evaluate.answer_line(dict(task="gsm8k", subject=None, id=0, answer="4 * 300\n#### 1,200"), output)["scores"]
    assert scores == {"exact_match": strict, "exact_match_flexible": flexible}


def test_the_mean_over_questions_and_that_over_subjects_are_both_told():
    lines = [dict(task="ceval", subject=subject, id=i, scores={"acc": float(right)}, loglikelihoods=[0] * 4) for i, (subject, right) in enumerate([("a", 1), ("a", 1), ("a", 0), ("b", 0)])]
    found = evaluate.task_result(lines)
    assert found["score"] == 0.5 and found["macro"] == pytest.approx(1 / 3) and found["n"] == 4 and found["stderr"] == pytest.approx(0.5 / math.sqrt(3)) and found["chance"] == 0.25


def made_run(folder: Path, name: str, values: list[float], task: str = "ceval") -> Path:
    """The result of a run with these scores, question by question."""
    (folder / name).mkdir()
    if task == "perplexity":
        lines = [dict(task=task, subject=None, id=i, hash="", characters=10, bytes=30, bits=value, tokens=5, correct=2) for i, value in enumerate(values)]
    else:
        lines = [dict(task=task, subject=None, id=i, hash="", scores={"acc": float(value)}, loglikelihoods=[0] * 4) for i, value in enumerate(values)]
    about = dict(results={task: evaluate.task_result(lines)}, flags=dict(model_name_or_path=name, lora_path=None, template="none"), warnings=[], prompts={task: "x"})
    (folder / name / "results.json").write_text(json.dumps(about))
    (folder / name / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / name


@pytest.mark.parametrize("before, after, verdict", [
    ([0] * 40, [1] * 10 + [0] * 30, "better"), ([1] * 40, [0] * 10 + [1] * 30, "worse"), ([0] * 5, [1] * 5, "open"), ([0, 1] * 20, [0, 1] * 20, "open"),
    ([0] * 40, [1] * 5 + [0] * 35, "open"), ([1] + [0] * 39, [0] + [1] * 7 + [0] * 32, "open")])
def test_the_verdict_claims_no_more_than_the_error_allows(tmp_path, before, after, verdict):
    """As an exact test of the pairs: 10 that turned are enough, 5 are not, however small the variance."""
    a, b = made_run(tmp_path, "before", before), made_run(tmp_path, "after", after)
    evaluate.main(compare=f"{a},{b}", output_dir=str(tmp_path / "report"))
    change = json.loads((tmp_path / "report" / "results.json").read_text())["changes"]["ceval"]
    report = (tmp_path / "report" / "report.md").read_text("utf-8")
    assert change["verdict"] == verdict and (tmp_path / "report" / "report.png").stat().st_size > 10000
    assert ("**Better**" in report, "**Worse**" in report, "No difference can be told" in report) == (verdict == "better", verdict == "worse", verdict == "open")


def test_two_perfect_models_are_not_called_at_chance_and_a_comparison_cut_short_is_written_anew(tmp_path):
    a, b = made_run(tmp_path, "before", [1] * 20), made_run(tmp_path, "after", [1] * 20)
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.png").write_bytes(b"half")
    evaluate.main(compare=f"{a},{b}", output_dir=str(tmp_path / "report"))
    assert "at chance" not in (tmp_path / "report" / "report.md").read_text("utf-8")
    about = json.loads((b / "results.json").read_text())
    (b / "results.json").write_text(json.dumps(about | {"flags": about["flags"] | {"max_length": 64}}))
    evaluate.main(compare=f"{a},{b}", output_dir=str(tmp_path / "report"))
    assert "measured with another --max_length" in (tmp_path / "report" / "report.md").read_text("utf-8")


def test_fewer_bits_are_better_and_the_error_is_that_of_the_pairs(tmp_path):
    before, after = [20.0, 40.0, 60.0, 30.0, 50.0, 20.0, 70.0, 10.0], [19.0, 39.0, 58.0, 29.0, 49.0, 19.0, 68.0, 9.0]
    a, b = (made_run(tmp_path, name, values, "perplexity") for name, values in (("before", before), ("after", after)))
    evaluate.main(compare=f"{a},{b}", output_dir=str(tmp_path / "report"))
    change = json.loads((tmp_path / "report" / "results.json").read_text())["changes"]["perplexity"]
    assert change["verdict"] == "better" and change["difference"] == pytest.approx(-10 / 80) and change["stderr"] < 0.02 and change["p"] == pytest.approx(2 / 256)


def test_other_questions_of_the_same_number_are_not_compared(tmp_path):
    a, b = made_run(tmp_path, "before", [0] * 40), made_run(tmp_path, "after", [1] * 40)
    lines = [json.loads(line) for line in (b / "samples.jsonl").read_text().splitlines()]
    for changed, left in ((39, 1), (40, None)):
        (b / "samples.jsonl").write_text("".join(json.dumps(line | {"hash": "other" * (i < changed)}) + "\n" for i, line in enumerate(lines)))
        if left:
            evaluate.main(compare=f"{a},{b}", output_dir=str(tmp_path / "report"))
            assert json.loads((tmp_path / "report" / "results.json").read_text())["changes"]["ceval"]["n"] == left
            continue
        with pytest.raises(BadInput, match="no question in common"):
            evaluate.main(compare=f"{a},{b}", output_dir=str(tmp_path / "report"))


def test_one_of_many_tasks_is_not_believed_for_a_chance_hit(tmp_path):
    p = evaluate.sign_flip_p([1.0] * 6)
    assert p == pytest.approx(2 / 64)  # alone it would count
    runs = []
    for name, hit in (("before", 0), ("after", 1)):
        folder = made_run(tmp_path, name, [hit] * 6 + [0] * 30)
        about, lines = json.loads((folder / "results.json").read_text()), (folder / "samples.jsonl").read_text()
        about["results"]["cmmlu"] = about["results"]["ceval"]
        (folder / "results.json").write_text(json.dumps(about))
        (folder / "samples.jsonl").write_text(lines + lines.replace('"ceval"', '"cmmlu"').replace('"acc": 1.0', '"acc": 0.0'))
        runs.append(str(folder))
    evaluate.main(compare=",".join(runs), output_dir=str(tmp_path / "report"))
    changes = json.loads((tmp_path / "report" / "results.json").read_text())["changes"]
    assert {task: change["verdict"] for task, change in changes.items()} == {"ceval": "open", "cmmlu": "open"} and changes["ceval"]["p_holm"] == pytest.approx(2 * p)


# ---- bad input ----
@pytest.mark.parametrize("flags, reason", [
    (dict(tasks="cmlu"), "did you mean cmmlu"), (dict(limit=0), "--limit=0 must be 1 at least"), (dict(shots=-1), "must be 0 at least"), (dict(subjects="agronmy"), "did you mean agronomy"),
    (dict(data_dir="nowhere"), "is no folder"), (dict(tasks="perplexity,gsm8k", data_dir="sample"), "holds no perplexity"), (dict(data_dir=None), "nothing is downloaded"),
    (dict(compare="a"), "give two output folders"), (dict(compare="a,b"), "no finished measurement"), (dict(eval_path="no.jsonl"), "does not exist"), (dict(lora_path="nobody"), "does not exist"),
    (dict(template="auto"), "has no chat template")], ids=str)
def test_bad_input_is_refused_in_one_line(sets, model_folder, tmp_path, monkeypatch, flags, reason):
    monkeypatch.chdir(ROOT)
    with pytest.raises(BadInput, match=reason) as refusal:
        evaluate.main(**dict(model_name_or_path=str(model_folder), data_dir=str(sets), output_dir=str(tmp_path / "out")) | flags)
    assert "\n" not in str(refusal.value) and not (tmp_path / "out" / "samples.jsonl").exists()


@pytest.mark.parametrize("file, text, reason", [
    ("cmmlu/test/agronomy.csv", "frage,A,B,C,D,antwort\nx,1,2,3,4,A\n", "has the columns frage, a, b, c, d, antwort"), ("cmmlu/test/agronomy.csv", "Question,A,B,C,D,Answer\nx,1,2,3,4,E\n", "answer is 'E'"),
    ("gsm8k_test.jsonl", '{"question": "x", "answer": [1]}\n', "a choice or an answer is no text"), ("gsm8k_test.jsonl", '{"question": [1], "answer": "1"}\n', "with its answer"),
    ("gsm8k_test.jsonl", '{"question": "x\\ud83d", "answer": "1"}\n', "surrogates"), ("TruthfulQA.csv", "Question,Best Answer,Correct Answers,Incorrect Answers\nx\n", "record 0: no 'Best Answer'"),
    ("hellaswag_val.jsonl", json.dumps(dict(activity_label="a", ctx_a="b", ctx_b="c", endings=["d", "e"], label=2)), "2 is not in range"),
    ("cmmlu/dev/agronomy.csv", None, "dev/agronomy.csv is missing"), ("mmlu/test/abstract_algebra_test.csv", '"x,1,2\n', "not whole CSV"),
    ("hellaswag_val.jsonl", '{"ctx_a": "x"}\n', "no 'activity_label'"), ("hellaswag_val.jsonl", json.dumps(dict(activity_label="", ctx_a="", ctx_b="", endings=[], label="")), "with its answer"), ("TruthfulQA.csv", "Question\nx\n", "no 'Best Answer'"), ("gsm8k_test.jsonl", '{"question": ', "not whole JSON")])
def test_a_set_that_is_not_as_published_is_named(sets, model_folder, tmp_path, monkeypatch, file, text, reason):
    shutil.copytree(sets, tmp_path / "sets")
    (tmp_path / "sets" / file).unlink()
    if text:
        (tmp_path / "sets" / file).write_text(text, "utf-8")
    monkeypatch.setitem(__import__("sys").modules, "torch", None)  # found before it is imported
    with pytest.raises(BadInput, match=reason):
        evaluate.main(model_name_or_path=str(model_folder), data_dir=str(tmp_path / "sets"), output_dir=str(tmp_path / "out"))
