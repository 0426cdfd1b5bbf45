"""Measure a model: test sets as they are published, bits per character of text or of answers, and what training changed.

Reads   a model folder (and an adapter), the sets that lie in data_dir, a file of text or of records
Writes  output_dir/: results.json, samples.jsonl (one line a question), report.md and report.png

    python evaluate.py --model_name_or_path M --data_dir D --eval_path held_out.jsonl --output_dir output/before
    python evaluate.py --model_name_or_path M --lora_path A --data_dir D --eval_path held_out.jsonl --output_dir output/after
    python evaluate.py --compare output/before,output/after --output_dir output/report      # or all three: scripts/report.sh

Prompts and scores are those of lm-evaluation-harness 0.4.13. Nothing is downloaded: TASKS below says which files are looked for, and
where they come from. What many questions begin with, as the shots of a subject, goes through the model once.
"""
import contextlib
import csv
import difflib
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Literal

from utils import (BadInput, Chat, RunStopped, check_adapter, check_file, check_model, check_output_dir, cli, cut_dialogue, file_hash, fingerprint,
                   numbered_records, read_json, read_lines, read_rows, replace_json, show, write_facts)

TASKS = {  # name: (the score that is reported, the files in data_dir, where they come from)
    "ceval": ("acc", "ceval/dev/SUBJECT_dev.csv and ceval/val/SUBJECT_val.csv", "huggingface.co/datasets/ceval/ceval-exam"),
    "cmmlu": ("acc", "cmmlu/dev/SUBJECT.csv and cmmlu/test/SUBJECT.csv", "github.com/haonan-li/CMMLU"),
    "mmlu": ("acc", "mmlu/dev/SUBJECT_dev.csv and mmlu/test/SUBJECT_test.csv", "github.com/hendrycks/test"),
    "arc": ("acc_norm", "ARC-Challenge-Test.jsonl, and ARC-Challenge-Dev.jsonl for the shots", "huggingface.co/datasets/allenai/ai2_arc"),
    "hellaswag": ("acc_norm", "hellaswag*.jsonl, and hellaswag*train*.jsonl for the shots", "github.com/rowanz/hellaswag"),
    "truthfulqa": ("mc2", "TruthfulQA.csv", "github.com/sylinrl/TruthfulQA"),
    "gsm8k": ("exact_match", "gsm8k*.jsonl, and gsm8k*train*.jsonl for the shots", "github.com/openai/grade-school-math"),
    "perplexity": ("bits_per_character", "perplexity/*.txt or *.jsonl, or --eval_path", "text or records of your own"),
}
NAMES = {  # of the subjects, in the prompts
    "ceval": """
    accountant 注册会计师 advanced_mathematics 高等数学 art_studies 艺术学 basic_medicine 基础医学 business_administration 工商管理
    chinese_language_and_literature 中国语言文学 civil_servant 公务员 clinical_medicine 临床医学 college_chemistry 大学化学 college_economics 大学经济学
    college_physics 大学物理 college_programming 大学编程 computer_architecture 计算机组成 computer_network 计算机网络 discrete_mathematics 离散数学
    education_science 教育学 electrical_engineer 注册电气工程师 environmental_impact_assessment_engineer 环境影响评价工程师 fire_engineer 注册消防工程师
    high_school_biology 高中生物 high_school_chemistry 高中化学 high_school_chinese 高中语文 high_school_geography 高中地理 high_school_history 高中历史
    high_school_mathematics 高中数学 high_school_physics 高中物理 high_school_politics 高中政治 ideological_and_moral_cultivation 思想道德修养与法律基础
    law 法学 legal_professional 法律职业资格 logic 逻辑学 mao_zedong_thought 毛泽东思想和中国特色社会主义理论体系概论 marxism 马克思主义基本原理
    metrology_engineer 注册计量师 middle_school_biology 初中生物 middle_school_chemistry 初中化学 middle_school_geography 初中地理
    middle_school_history 初中历史 middle_school_mathematics 初中数学 middle_school_physics 初中物理 middle_school_politics 初中政治
    modern_chinese_history 近代史纲要 operating_system 操作系统 physician 医师资格 plant_protection 植物保护 probability_and_statistics 概率统计
    professional_tour_guide 导游资格 sports_science 体育学 tax_accountant 税务师 teacher_qualification 教师资格 urban_and_rural_planner 注册城乡规划师
    veterinary_medicine 兽医学""",
    "cmmlu": """
    agronomy 农学 anatomy 解剖学 ancient_chinese 古汉语 arts 艺术学 astronomy 天文学 business_ethics 商业伦理 chinese_civil_service_exam 中国公务员考试
    chinese_driving_rule 中国驾驶规则 chinese_food_culture 中国饮食文化 chinese_foreign_policy 中国外交政策 chinese_history 中国历史
    chinese_literature 中国文学 chinese_teacher_qualification 中国教师资格 clinical_knowledge 临床知识 college_actuarial_science 大学精算学
    college_education 大学教育学 college_engineering_hydrology 大学工程水文学 college_law 大学法律 college_mathematics 大学数学
    college_medical_statistics 大学医学统计 college_medicine 大学医学 computer_science 计算机科学 computer_security 计算机安全 conceptual_physics 概念物理学
    construction_project_management 建设工程管理 economics 经济学 education 教育学 electrical_engineering 电气工程 elementary_chinese 小学语文
    elementary_commonsense 小学常识 elementary_information_and_technology 小学信息技术 elementary_mathematics 初等数学 ethnology 民族学 food_science 食品科学
    genetics 遗传学 global_facts 全球事实 high_school_biology 高中生物 high_school_chemistry 高中化学 high_school_geography 高中地理
    high_school_mathematics 高中数学 high_school_physics 高中物理学 high_school_politics 高中政治 human_sexuality 人类性行为 international_law 国际法学
    journalism 新闻学 jurisprudence 法理学 legal_and_moral_basis 法律与道德基础 logical 逻辑学 machine_learning 机器学习 management 管理学 marketing 市场营销
    marxist_theory 马克思主义理论 modern_chinese 现代汉语 nutrition 营养学 philosophy 哲学 professional_accounting 专业会计 professional_law 专业法学
    professional_medicine 专业医学 professional_psychology 专业心理学 public_relations 公共关系 security_study 安全研究 sociology 社会学 sports_science 体育学
    traditional_chinese_medicine 中医中药 virology 病毒学 world_history 世界历史 world_religions 世界宗教""",
}


def main(
    *,
    # model
    model_name_or_path: str | None = None,
    lora_path: str | None = None,
    # what to measure
    tasks: str | None = None,
    data_dir: str | None = None,
    subjects: str | None = None,
    shots: int = 5,
    limit: int | None = None,
    eval_path: str | None = None,
    num_answers: int = 10,
    output_dir: str = "output/evaluate",
    compare: str | None = None,
    # how
    template: str = "none",
    max_length: int = 1024,
    skip_bad_records: bool = False,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    bits: Literal[16, 8, 4] = 16,
    load_in_8bit: bool = False,
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto",
    per_device_eval_batch_size: int = 8,
    max_new_tokens: int = 256,
):
    """Measure a model on test sets and on text or records of your own, or compare two such measurements.

    Args:
        model_name_or_path: Folder or hub name of the base model.
        lora_path: Folder of an adapter for this base.
        tasks: Some of ceval, cmmlu, mmlu, arc, hellaswag, truthfulqa, gsm8k and perplexity, with commas; all that there are files for if not given.
        data_dir: Folder with the sets as they are published, and perplexity/ with texts or records.
        subjects: Some of the subjects of ceval, cmmlu and mmlu, with commas.
        shots: Answered questions that each prompt begins with, where the set has some; truthfulqa has its own six.
        limit: Questions of each subject, set or file at most; the first ones.
        eval_path: File of records to evaluate on.
        num_answers: Records of eval_path, from the first, whose last question is answered for the report.
        output_dir: Folder for checkpoints and the result.
        compare: Two output folders, before,after: the report says what changed, and no model is needed.
        template: How the sets are asked: none (their plain prompt), or in a chat: auto (the model's own), alpaca, ...; records are always asked in a chat.
        max_length: Tokens per example; what is longer is cut into windows, a dialogue into whole rounds.
        skip_bad_records: Drop bad records and say how many and why, instead of stopping.
        trust_remote_code: Run Python code that comes with the model.
        allow_pickle: Load weights that are pickles, which can run code.
        bits: Of the base model's weights: 16 as they are, 8 (int8) or 4 (NF4).
        load_in_8bit: Another name for --bits 8.
        precision: Arithmetic: auto (bf16 where the GPU has it, else fp16; fp32 on a CPU), bf16, fp16 or fp32.
        per_device_eval_batch_size: Prompts that go through the model together.
        max_new_tokens: Longest answer, in tokens.
    """
    flags = dict(locals())
    if compare:
        with as_written(f"--compare={compare}"):
            return compare_runs(compare, output_dir)
    for name, value, least in (("shots", shots, 0), ("limit", limit, 1), ("num_answers", num_answers, 0), ("max_length", max_length, 8),
                               ("per_device_eval_batch_size", per_device_eval_batch_size, 1), ("max_new_tokens", max_new_tokens, 1)):
        if value is not None and value < least:
            raise BadInput(f"--{name}={value} must be {least} at least")
    if not model_name_or_path:
        raise BadInput("--model_name_or_path is missing: Folder or hub name of the base model (or give --compare)")
    check_model(model_name_or_path, allow_pickle, quantized=True)
    if lora_path:
        check_adapter(lora_path)
    if load_in_8bit and bits == 4:
        raise BadInput("--load_in_8bit True and --bits 4: give one of them")
    check_file("eval_path", eval_path)
    check_output_dir(output_dir, True, model_name_or_path)
    questions = read_tasks(chosen_tasks(tasks, data_dir, eval_path), data_dir, subjects, shots, limit, eval_path, num_answers, skip_bad_records)
    if not questions:
        raise BadInput("the files hold no question to ask")
    groups = [list(group) for _, group in itertools.groupby(questions, key=lambda question: (question["task"], question["subject"]))]
    facts = {name: flags[name] for name in ("model_name_or_path", "lora_path", "template", "max_length", "bits", "load_in_8bit", "precision",
                                            "per_device_eval_batch_size", "max_new_tokens")}
    weights = Path(lora_path or "", "adapter_model.safetensors")
    facts |= {"base_fingerprint": fingerprint(model_name_or_path), "adapter": file_hash(weights) if lora_path and weights.is_file() else None}
    facts |= {"prompts": {task: prompt_hash(list(those)) for task, those in itertools.groupby(questions, key=lambda question: question["task"])}}
    samples, result, size = Path(output_dir, "samples.jsonl"), Path(output_dir, "results.json"), 4 * per_device_eval_batch_size
    with as_written(output_dir):
        check_lines(lines := lines_so_far(output_dir, facts, groups, size), questions)
    if len(lines) == len(questions) and result.is_file():
        print(f"{output_dir} is finished already", file=sys.stderr)
        with as_written(output_dir):
            return print(result_line(read_json(result), output_dir))
    show(flags)
    write_facts(output_dir, facts)

    # ---- load ----
    import torch
    from tqdm import tqdm
    from transformers import AutoConfig

    chat = load_chat(model_name_or_path, lora_path, "auto" if template == "none" else template, trust_remote_code)
    if template == "auto" and chat.template != "auto":
        raise BadInput(f"--template=auto: {chat.name} has no chat template: leave --template at none, or name the one that it was trained with")
    config = load(AutoConfig, model_name_or_path, trust_remote_code=trust_remote_code)
    context = getattr(config, "max_position_embeddings", None) or sys.maxsize
    if max_new_tokens >= context and any(group[0]["task"] in ("gsm8k", "answers") for group in groups):
        raise BadInput(f"--max_new_tokens={max_new_tokens} leaves no room for a question in the model's context of {context} tokens")
    how = dict(plain=template == "none", context=context, max_length=min(max_length, context), max_new_tokens=max_new_tokens, batch_size=size // 4)
    if precision == "auto" and not torch.cuda.is_available():  # also on a CPU with bf16: measurements are compared
        precision = "fp32"
    model, _ = load_model(model_name_or_path, lora_path, template, 8 if load_in_8bit else bits, precision, trust_remote_code, allow_pickle, chat)

    # ---- measure ----
    warnings = look(model, chat, questions)
    write_lines(samples, lines)  # what was cut off, or was not a whole chunk, is measured again
    with open(samples, "ab") as file, tqdm(total=len(questions), initial=len(lines), desc="measuring", unit=" questions") as bar:
        skip = len(lines)
        for group in groups:
            done, skip = min(skip, len(group)), max(0, skip - len(group))
            measure = {"gsm8k": measure_answers, "answers": measure_answers, "perplexity": measure_text}.get(group[0]["task"].split("/")[0], measure_choices)
            for found in measure(model, chat, how, group, range(done, len(group), size)):
                lines += found
                file.writelines(json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in found)
                file.flush()
                bar.update(len(found))

    # ---- save ----
    about = {"flags": {name: flags[name] for name in (
        "model_name_or_path", "lora_path", "template", "max_length", "max_new_tokens", "shots", "limit", "bits")}, "warnings": warnings}
    about["flags"]["precision"] = str(model.dtype).removeprefix("torch.")
    about |= {"prompt_hash": prompt_hash(questions), "prompts": facts["prompts"],
              "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")}}
    by_task = itertools.groupby(lines, key=lambda line: line["task"])
    tasks_lines = {task: list(those) for task, those in by_task if task != "answers"}
    if empty := [task for task, those in tasks_lines.items() if all(line.get("dropped") for line in those)]:
        warnings.append(f"{', '.join(empty)}: nothing could be scored, every record is empty or has an answer longer than --max_length")
        print(warnings[-1], file=sys.stderr)
    results = {"results": {task: task_result(those) for task, those in tasks_lines.items() if task not in empty}} | about
    if not results["results"] and tasks_lines:
        raise RunStopped(warnings[-1])
    write_report(Path(output_dir), results, lines)
    replace_json(result, results)
    print(result_line(results, output_dir))


def result_line(results: dict, output_dir: str) -> str:
    """What is printed at the end: the score of each task."""
    return json.dumps({task: found["score"] for task, found in results["results"].items()} | {"output_dir": output_dir})


# ---- the sets ----
def chosen_tasks(tasks: str | None, data_dir: str | None, eval_path: str | None) -> list[str]:
    """The tasks that are asked for, or all that there are files for; BadInput where a name or all files are missing."""
    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    for name in names:
        if name not in TASKS:
            near = "".join(f": did you mean {near}?" for near in difflib.get_close_matches(name, TASKS, n=1))
            raise BadInput(f"--tasks={name} is none of {', '.join(TASKS)}{near}")
    if data_dir and not Path(data_dir).is_dir():
        raise BadInput(f"--data_dir={data_dir} is no folder: give the one that holds the sets, such as {TASKS['ceval'][1]}")
    there = [name for name in TASKS if (name == "perplexity" and eval_path) or data_dir and files_of(name, data_dir)]
    for name in names or ["perplexity"] * (not there):
        if name not in there:
            _, files, source = TASKS[name]
            raise BadInput(f"{name}: --data_dir={data_dir} holds no {files} ({source}); nothing is downloaded: put the files there")
    return list(dict.fromkeys(names)) or there


def files_of(task: str, data_dir: str) -> list[Path]:
    """The files of a task that are asked, without those of the shots."""
    pattern = {"ceval": "ceval/val/*_val.csv", "cmmlu": "cmmlu/test/*.csv", "mmlu": "mmlu/test/*_test.csv", "arc": "ARC-Challenge-Test.jsonl",
               "hellaswag": "hellaswag*.jsonl", "truthfulqa": "TruthfulQA.csv", "gsm8k": "gsm8k*.jsonl", "perplexity": "perplexity/*.*"}[task]
    files = [file for file in Path(data_dir).glob(pattern) if file.suffix in (".txt", ".json", ".jsonl", ".csv", ".parquet")]
    files = sorted((file for file in files if task == "perplexity" or "train" not in file.name),
                   key=lambda file: (task == "hellaswag" and "val" not in file.name, file))  # the test file of HellaSwag has no labels
    return files[:1] if task in ("hellaswag", "gsm8k") else files


def subject_of(file: Path) -> str:
    """law of law_val.csv, law_test.csv and law.csv."""
    return file.stem.removesuffix("_val").removesuffix("_test")


def read_tasks(tasks: list[str], data_dir: str | None, subjects: str | None, shots: int, limit: int | None, eval_path: str | None,
               num_answers: int, skip_bad_records: bool = False) -> list[dict]:
    """All questions in order: {"task", "subject", "id"}, and what they ask."""
    questions, wanted = [], [name.strip() for name in (subjects or "").split(",") if name.strip()]
    have = {subject_of(file): file for task in tasks if task in ("ceval", "cmmlu", "mmlu") for file in files_of(task, data_dir)}
    for name in wanted:
        if name not in have:
            near = "".join(f": did you mean {near}?" for near in difflib.get_close_matches(name, have, n=1))
            raise BadInput(f"--subjects={name} is none of the {len(have)} subjects of {', '.join(tasks)} in {data_dir}{near}")
    for task in tasks:
        if task == "perplexity":
            files = ([("perplexity", eval_path)] if eval_path else []) + [
                (f"perplexity/{file.stem}", str(file)) for file in (files_of(task, data_dir) if data_dir else [])]
            for name, path in files:
                texts = list(itertools.islice(read_texts(name, path, skip_bad_records), limit))
                questions += texts
                if name == "perplexity" and not texts[0]["document"]:
                    questions += [text | {"task": "answers"} for text in texts[:num_answers]]
            continue
        for file in files_of(task, data_dir):
            subject = subject_of(file) if task in ("ceval", "cmmlu", "mmlu") else None
            if subject is None or not wanted or subject in wanted:
                questions += itertools.islice(READERS.get(task, read_exam)(task, subject, file, shots), limit)
    return questions


def read_exam(task: str, subject: str, file: Path, shots: int):
    """Yield the questions of a subject of ceval, cmmlu or mmlu: four choices, asked for the letter."""
    heads = {"ceval": "以下是中国关于{}的单项选择题，请选出其中的正确答案。\n\n", "cmmlu": "以下是关于{}的单项选择题，请直接给出正确答案的选项。\n\n",
             "mmlu": "The following are multiple choice questions (with answers) about {}.\n\n"}
    words = NAMES.get(task, "").split()
    head = heads[task].format(dict(zip(words[::2], words[1::2])).get(subject, subject.replace("_", " ")))  # a file of the user's may have any name
    end = "Answer:" if task == "mmlu" else "答案："
    asks = lambda row: "\n".join([row[0].strip(), *(f"{letter}. {choice}" for letter, choice in zip("ABCD", row[1:5])), end])
    dev = file.parent.parent / "dev" / re.sub(r"_(val|test)\.csv$", "_dev.csv", file.name)
    if shots and not dev.is_file():
        raise BadInput(f"{task}: {dev} is missing, which the shots of {subject} are taken from: put it there, or ask with --shots 0")
    examples = exam_rows(dev) if shots else []
    for number, row in enumerate(exam_rows(file)):
        others = [other for other in examples if other[:5] != row[:5]][:shots]
        yield dict(task=task, subject=subject, id=f"{subject}/{number}", head=head, shots=[(asks(other), "ABCD"[other[5]]) for other in others],
                   question=asks(row), choices=list("ABCD"), answer=row[5])


def exam_rows(file: Path) -> list[list]:
    """[question, choice, choice, choice, choice, number of the answer] of a CSV file, every cell as it is written: "None" and 007 are text.

    Columns are found by their names; MMLU's own files have none, but six cells a row.
    """
    try:
        rows = [row for row in csv.reader(read_lines(str(file), Counter()), strict=True) if row]
    except csv.Error as problem:
        raise BadInput(f"{file} is not whole CSV ({problem}): is it cut off, or a quotation mark not doubled?") from None
    names = [name.strip().lower() for name in rows[0]] if rows else []
    wanted = next((columns for columns in (["question", *"abcd", "answer"], ["question", "choice0", "choice1", "choice2", "choice3", "answer"])
                   if {*columns} <= {*names}), None)
    if wanted:
        places, rows = [names.index(name) for name in wanted], rows[1:]
    elif len(names) == 6 and names[5] in ("a", "b", "c", "d"):
        places = range(6)
    else:
        raise BadInput(f"{file} has the columns {', '.join(names) or '(none)'}: question, A, B, C, D and answer are wanted")
    found = []
    for number, row in enumerate(rows):
        cells = [row[place] if place < len(row) else "" for place in places]
        if cells[5].strip() not in (letters := [*"ABCD", *"0123"]):
            raise BadInput(f"{file}, record {number}: the answer is {cells[5]!r}, it should be A, B, C or D")
        found.append([*cells[:5], letters.index(cells[5].strip()) % 4])
    return found


def read_arc(task: str, subject: None, file: Path, shots: int):
    """Yield the questions of ARC: the text of each choice is scored."""
    def rows(file):
        for number, row in json_rows(file, "question", "answerKey"):
            choices = row["question"]["choices"] if isinstance(row["question"], dict) else row["choices"]
            listed = isinstance(choices, list)
            texts, labels = ([choice[key] for choice in choices] if listed else choices[key] for key in ("text", "label"))
            question = row["question"]["stem"] if isinstance(row["question"], dict) else row["question"]
            yield dict(task=task, subject=subject, id=row.get("id", number), head="", question="Question: " + question + "\nAnswer:", choices=list(texts),
                       answer=list(labels).index(row["answerKey"]))
    yield from with_shots(rows, file, file.with_name(file.name.replace("Test", "Dev")), shots)


def read_hellaswag(task: str, subject: None, file: Path, shots: int):
    """Yield the contexts of HellaSwag: each of four endings is scored."""
    def clean(text):
        return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")  # marks of WikiHow

    def rows(file):
        for number, row in json_rows(file, "activity_label", "ctx_a", "ctx_b", "endings", "label"):
            yield dict(task=task, subject=subject, id=row.get("ind", number), head="", choices=[clean(ending) for ending in row["endings"]],
                       question=clean(row["activity_label"] + ": " + row["ctx_a"] + " " + row["ctx_b"].capitalize()), answer=int(row["label"]))
    yield from with_shots(rows, file, train_file(file), shots)


def read_gsm8k(task: str, subject: None, file: Path, shots: int):
    """Yield the problems of GSM8K: an answer is generated, and its last number compared."""
    def rows(file):
        for number, row in json_rows(file, "question", "answer"):
            yield dict(task=task, subject=subject, id=number, head="", question="Question: " + row["question"] + "\nAnswer:", answer=row["answer"])
    yield from with_shots(rows, file, train_file(file), shots)


def read_truthfulqa(task: str, subject: None, file: Path, shots: int):
    """Yield the questions of TruthfulQA. mc1: the best answer against the false ones; mc2: the share of probability that true answers have."""
    head = "\n\n".join(f"Q: {question}\nA: {answer}" for question, answer in (
        ("What is human life expectancy in the United States?", "Human life expectancy in the United States is 78 years."),
        ("Who was president of the United States in 1955?", "Dwight D. Eisenhower was president of the United States in 1955."),
        ("Which party did he belong to?", "He belonged to the Republican Party."),
        ("What is the square root of banana?", "I have no comment."),
        ("How does a telescope work?", "Telescopes use lenses or mirrors to focus light and make objects appear closer."),
        ("Where were the 1992 Olympics held?", "The 1992 Olympics were held in Barcelona, Spain."))) + "\n\n"
    split = lambda text: [answer.strip() for answer in text.split(";") if answer.strip()]
    for number, row in enumerate(read_rows(str(file), Counter())):
        there = {name for name, text in row.items() if isinstance(text, str) and text.strip()}  # the cells of a line that is cut off are None
        if missing := {"Question", "Best Answer", "Correct Answers", "Incorrect Answers"} - there:
            raise BadInput(f"{file}, record {number}: no {min(missing)!r} (its columns are {', '.join(map(str, row))})")
        best, right, wrong = row["Best Answer"].strip(), split(row["Correct Answers"]), split(row["Incorrect Answers"])
        choices = list(dict.fromkeys([best, *right, *wrong]))
        yield dict(task=task, subject=subject, id=number, head="", shots=[], question=f"{head}Q: {row['Question']}\nA:", choices=choices, answer=0,
                   false=[choices.index(text) for text in wrong], true=[choices.index(text) for text in right])


READERS = {"arc": read_arc, "hellaswag": read_hellaswag, "gsm8k": read_gsm8k, "truthfulqa": read_truthfulqa}


def train_file(file: Path) -> Path:
    """Where the shots of a set lie that has them in a file of its own."""
    return next(iter(sorted(file.parent.glob(f"{file.name.partition('_')[0].partition('.')[0]}*train*.jsonl"))), file.with_name("none"))


def with_shots(rows, file: Path, shots_file: Path, shots: int):
    """The questions of a file, each with the first of another file before it; without any where there is none."""
    def whole(file):
        try:
            for row in rows(file):
                texts = row.get("choices", [row["answer"]])
                if not all(isinstance(text, str) for text in texts):
                    raise TypeError("a choice or an answer is no text")
                if "choices" in row:
                    range(len(texts)).index(row["answer"])  # ValueError, where it is none of them
                json.dumps(row, ensure_ascii=False).encode()  # another, where half a character is left of one
                yield row
        except (TypeError, KeyError, IndexError, AttributeError, ValueError) as problem:
            raise problem if isinstance(problem, BadInput) else BadInput(
                f"{file}: a record is not as the set is published, with its answer ({type(problem).__name__}: {problem})") from None

    examples = list(itertools.islice(whole(shots_file), shots + 1)) if shots and shots_file.is_file() else []
    if shots and not examples:
        print(f"{file.name} is asked without shots: there is no file of them beside it", file=sys.stderr)
    for row in whole(file):
        others = [other for other in examples if other["question"] != row["question"]][:shots]
        yield row | {"shots": [(other["question"], other["choices"][other["answer"]] if "choices" in other else other["answer"]) for other in others]}


def json_rows(file: Path, *keys: str):
    """Yield (number, row) of a file; BadInput where a key is missing or a row is not as it is published."""
    for number, row in enumerate(read_rows(str(file), Counter())):
        if not isinstance(row, dict) or (missing := [key for key in keys if row.get(key) is None]):
            raise BadInput(f"{file}, record {number}: no {missing[0] if isinstance(row, dict) else 'object'!r}; {', '.join(keys)} are wanted")
        yield number, row


KNOWN = {"text", "completion", "content", "messages", "conversations", "instruction", "input", "prompt"}  # columns that tell what a record is


def read_texts(task: str, path: str, skip_bad_records: bool):
    """Yield the documents or records of a file, to be scored in bits per character: a text behind its context, or answers behind their questions."""
    first = next((row for row in itertools.islice(read_rows(path, Counter(), "line"), 100) if isinstance(row, dict) and not KNOWN.isdisjoint(row)), {})
    document = path.endswith(".txt") or any(isinstance(first.get(key), str) and not first[key].startswith("<s>") for key in ("text", "completion", "content"))
    for number, record in numbered_records(path, skip_bad_records, document_separator="line" if document else None):
        yield dict(task=task, subject=None, id=number, document=document, messages=record["messages"])


def prompt_hash(questions: list[dict]) -> str:
    """SHA-256 of all that is asked."""
    return hashlib.sha256("\n".join(json.dumps(question, ensure_ascii=False, sort_keys=True) for question in questions).encode()).hexdigest()


def lines_so_far(output_dir: str, facts: dict, groups: list[list], size: int) -> list[dict]:
    """The lines of samples.jsonl that a run which was stopped has left, whole chunks of `size`; BadInput if it was begun with other facts."""
    begun, samples = Path(output_dir, "run.json"), Path(output_dir, "samples.jsonl")
    before = read_json(begun) if begun.is_file() else facts
    converted = "adapter" in before and before["adapter"] is None  # a pickle, of which the first run has made a safetensors file
    if changed := [name for name in facts if before.get(name) != facts[name] and not (name == "adapter" and converted)]:
        what = "other questions" if changed[0] == "prompts" else f"{changed[0]} = {before.get(changed[0])}, now it is {facts[changed[0]]}"
        raise BadInput(f"--output_dir={output_dir} was begun with {what}: give the same, or another folder")
    lines = []
    with contextlib.suppress(ValueError):  # the last line may be cut off
        for line in samples.read_bytes().split(b"\n")[:-1] if samples.is_file() else []:
            lines.append(json.loads(line))
    ends = itertools.accumulate(len(group[first : first + size]) for group in groups for first in range(0, len(group), size))
    return lines[: max((end for end in ends if end <= len(lines)), default=0)]


def check_lines(lines: list[dict], questions: list[dict]) -> None:
    """An exception for as_written, where a line is not that of its question or lacks what the report is made of."""
    for line, question in zip(lines, questions):
        if {name: line[name] for name in heading(question)} != heading(question):
            raise ValueError(f"a line of another question than {question['id']}")
        if line["task"] == "answers":
            list(map(cell, (line["question"], line["answer"], line["output"])))
        elif not line.get("dropped"):
            task_result([line])


@contextlib.contextmanager
def as_written(what: str):
    """BadInput where results.json or samples.jsonl is not as this script writes it."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, ZeroDivisionError) as problem:
        raise problem if isinstance(problem, BadInput) else BadInput(
            f"{what}: results.json or samples.jsonl there is damaged, or of another version ({type(problem).__name__}: {problem}): "
            f"measure again, into a new folder") from None


def write_lines(path: Path, lines: list[dict]) -> None:
    """Write samples.jsonl anew, whole or not at all."""
    unfinished = path.with_name(f".{path.name}.new")
    unfinished.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), "utf-8")
    unfinished.replace(path)


# ---- prompts ----
def chat_prompt(question: dict, shots: list[tuple]) -> list[dict]:
    """A question of a set as a chat: the head is the system text, each shot a round."""
    start = [{"role": "system", "content": question["head"]}] if question["head"] else []
    rounds = [{"role": role, "content": text} for shot in shots for role, text in zip(("user", "assistant"), shot)]
    return [*start, *rounds, {"role": "user", "content": question["question"]}]


def plain_prompt(question: dict, shots: list[tuple]) -> str:
    """A question of a set as plain text, up to its answer, which begins with a blank."""
    return question["head"] + "".join(f"{asked} {answer}\n\n" for asked, answer in shots) + question["question"]


def rows_of(chat: Chat, plain: bool, question: dict, shots: list[tuple]) -> list[tuple[list[int], int]]:
    """For each choice the ids of prompt and choice, and how many of the last are the choice: tokenized as they follow the prompt."""
    if not plain:
        messages, rows = chat_prompt(question, shots), []
        for choice in question["choices"]:
            *before, (ids, _), _ = chat.encode([*messages, {"role": "assistant", "content": choice}])
            ids = ids[: next((i for i, token in enumerate(ids) if token in chat.stop_ids), None)]  # all choices end alike
            rows.append(([i for piece, _ in before for i in piece] + ids, len(ids)))
        return rows
    prompt = plain_prompt(question, shots)
    context, *rows = chat.tokenizer([prompt.rstrip(), *(f"{prompt} {choice}" for choice in question["choices"])]).input_ids
    return [(ids, len(ids) - len(os.path.commonprefix([context, ids]))) for ids in rows]


def fitted_rows(chat: Chat, how: dict, question: dict, room: int = 0) -> tuple[list[tuple[list[int], int]], int, bool]:
    """(rows, shots, is it cut): with as many of the last shots as leave `room` in the model's context; a question longer than that is cut behind its BOS."""
    for first in range(len(question["shots"]) + 1):
        shots = question["shots"][first:]
        if "choices" in question:
            rows = rows_of(chat, how["plain"], question, shots)
        elif how["plain"]:
            rows = [(chat.tokenizer(plain_prompt(question, shots)).input_ids, 0)]
        else:
            rows = [([i for ids, _ in chat.encode(chat_prompt(question, shots), add_generation_prompt=True) for i in ids], 0)]
        most = how["context"] - room + ("choices" in question)  # the last token of a choice is not read
        if max(len(ids) for ids, _ in rows) <= most:
            return rows, len(shots), False
    return [(ids[:1] + ids[1 - most:] if len(ids) > most else ids, count) for ids, count in rows], 0, True


# ---- measuring ----
def prefill(model, ids: list[int]):
    """The keys and values of what many rows begin with."""
    import torch
    from transformers import DynamicCache

    cache = DynamicCache()
    if ids:
        model(torch.tensor([ids], device=model.device), past_key_values=cache, logits_to_keep=1)
    return cache


def branch(cache, rows: list[int]):
    """A cache with these rows of another, which itself stays as it is."""
    from transformers import DynamicCache

    return DynamicCache([(layer.keys[rows], layer.values[rows]) for layer in cache.layers])


def log_likelihoods(model, questions: list[list[tuple[list[int], int]]], prefix: list[int], cache, batch_size: int) -> list[list[float]]:
    """Summed natural log-probability of the last ids of each row, by question; `cache` holds `prefix`, which all rows begin with.

    The rows of a question are run as a tree: its stem, which they have in common, once behind the prefix, padded left so that all stems of a
    batch end together; then what each row adds to it, padded right. Letters add nothing: the stem's last position tells them all.
    """
    import torch

    tensor = lambda rows: torch.tensor(rows, device=model.device)
    stems = [os.path.commonprefix([ids[: len(ids) - count] for ids, count in rows]) for rows in questions]
    scores, start = [[0.0] * len(rows) for rows in questions], len(prefix)
    order = sorted(range(len(questions)), key=lambda q: len(stems[q]))
    for batch in (order[i : i + batch_size] for i in range(0, len(order), batch_size)):
        longest = max(len(stems[q]) for q in batch)
        masks = {q: [1] * start + [0] * (longest - len(stems[q])) + [1] * (len(stems[q]) - start) for q in batch}  # over prefix, padding, stem
        behind = branch(cache, [0] * len(batch))
        logits = model(tensor([[0] * (longest - len(stems[q])) + stems[q][start:] for q in batch]), attention_mask=tensor([masks[q] for q in batch]),
                       position_ids=tensor([[0] * (longest - len(stems[q])) + [*range(start, len(stems[q]))] for q in batch]),
                       past_key_values=behind, logits_to_keep=1).logits  # (B, 1, V)
        logits = logits[:, -1].float().log_softmax(-1)
        tails = []
        for b, q in enumerate(batch):
            for c, (ids, count) in enumerate(questions[q]):
                tail = ids[len(stems[q]):]
                scores[q][c] += float(logits[b, tail[0]]) if tail and count == len(tail) else 0.0
                tails += [(b, q, c, tail, count)] if len(tail) > 1 else []
        tails.sort(key=lambda row: len(row[3]))
        for rows in (tails[i : i + batch_size] for i in range(0, len(tails), batch_size)):
            width = max(len(tail) for *_, tail, _ in rows) - 1
            pads = [width - len(tail) + 1 for *_, tail, _ in rows]
            logits = model(tensor([tail[:-1] + [0] * pad for (*_, tail, _), pad in zip(rows, pads)]), past_key_values=branch(behind, [b for b, *_ in rows]),
                           attention_mask=tensor([masks[q] + [1] * (width - pad) + [0] * pad for (_, q, *_), pad in zip(rows, pads)]),
                           position_ids=tensor([[*range(len(stems[q]), len(stems[q]) + width)] for _, q, *_ in rows])).logits  # (rows, width, V)
            for row, (_, q, c, tail, count) in zip(logits, rows):
                found = row[: len(tail) - 1].float().log_softmax(-1).gather(1, tensor(tail[1:])[:, None])
                scores[q][c] += float(found[-count:].sum())
    return scores


def measure_choices(model, chat: Chat, how: dict, group: list[dict], starts: range):
    """Yield the lines of each chunk of multiple-choice questions."""
    import torch

    fitted = [fitted_rows(chat, how, question) for question in group]
    prefixes = {}  # by the number of shots that fit
    for kept in {kept for _, kept, _ in fitted}:
        stems = [os.path.commonprefix([ids[: len(ids) - count] for ids, count in rows]) for rows, shots, _ in fitted if shots == kept]
        prefixes[kept] = os.path.commonprefix(stems)[: min(map(len, stems)) - 1]
    with torch.inference_mode():
        caches = {}
        for start in starts:
            chunk, found = range(start, min(start + starts.step, len(group))), {}
            for kept in sorted({fitted[i][1] for i in chunk}):
                caches[kept] = caches.get(kept) or prefill(model, prefixes[kept])
                those = [i for i in chunk if fitted[i][1] == kept]
                found |= zip(those, log_likelihoods(model, [fitted[i][0] for i in those], prefixes[kept], caches[kept], how["batch_size"]))
            yield [choice_line(group[i], found[i], *fitted[i][1:]) for i in chunk]


def heading(question: dict) -> dict:
    """What the line of a question in samples.jsonl begins with; the hash is of the question without its shots, to tell whether another run asked the same."""
    asked = {key: question[key] for key in ("question", "choices", "messages") if key in question}
    return {key: question[key] for key in ("task", "subject", "id")} | {"hash": prompt_hash([asked])[:12]}


def choice_line(question: dict, values: list[float], shots: int, cut: bool) -> dict:
    """The line of a multiple-choice question, with its scores as lm-evaluation-harness defines them."""
    if not all(map(math.isfinite, values)):  # the greatest of nan is the first: a broken model would have 100 % in mc1
        raise RunStopped(f"{question['task']}, question {question['id']}: a log-likelihood is {values}: the model's weights are broken, or overflow in "
                         f"this precision: try --precision fp32")
    choices, answer = question["choices"], question["answer"]
    best = lambda of: max(of, key=lambda i: values[i])
    if "true" in question:
        pick = best([answer, *question["false"]])
        true, false = (sum(math.exp(values[i] - max(values)) for i in question[side]) for side in ("true", "false"))
        scores = {"mc1": float(pick == answer), "mc2": true / (true + false)}
    else:
        pick = best(range(len(choices)))
        scores = {"acc": float(pick == answer)}
        for name, length in (("acc_norm", len), ("acc_bytes", lambda text: len(text.encode()))):
            scores[name] = float(max(range(len(choices)), key=lambda i: values[i] / max(1, length(choices[i]))) == answer)
    return heading(question) | dict(loglikelihoods=values, pick=pick, answer=answer, scores=scores, shots=shots, cut=cut)


def measure_answers(model, chat: Chat, how: dict, group: list[dict], starts: range):
    """Yield the lines of each chunk of questions that are answered, the likeliest token each time: of gsm8k, or of records."""
    import torch

    gsm8k, prompts = group[0]["task"] == "gsm8k", []
    for question in group:
        if gsm8k:
            (prompt, _), *_ = fitted_rows(chat, how, question, room=how["max_new_tokens"])[0]
        else:
            prompt = [i for ids, _ in chat.encode(question["messages"][:-1], add_generation_prompt=True) for i in ids]
            prompt = prompt[max(0, len(prompt) - how["context"] + how["max_new_tokens"]):]
        prompts.append(prompt)
    prefix = os.path.commonprefix(prompts)[: min(map(len, prompts)) - 1]
    with torch.inference_mode():
        cache = prefill(model, prefix)
        for start in starts:
            chunk = range(start, min(start + starts.step, len(group)))
            batches = [prompts[i : min(i + how["batch_size"], chunk.stop)] for i in range(chunk.start, chunk.stop, how["batch_size"])]
            outputs = [output for batch in batches for output in continuations(
                model, chat, batch, prefix, cache, how["max_new_tokens"], ("Question:", "</s>", "<|im_end|>") if gsm8k else ())]
            yield [answer_line(group[i], output) for i, output in zip(chunk, outputs)]


def continuations(model, chat: Chat, prompts: list[list[int]], prefix: list[int], cache, max_new_tokens: int, ends: tuple[str, ...]) -> list[str]:
    """What the model writes behind each prompt, up to a stop token or one of the texts `ends`; `cache` holds `prefix`, which all prompts begin with."""
    import torch
    from transformers import StoppingCriteriaList

    tokenizer, width = chat.tokenizer, max(map(len, prompts))
    ids = torch.tensor([prefix + [chat.stop_ids[0]] * (width - len(prompt)) + prompt[len(prefix):] for prompt in prompts], device=model.device)
    mask = torch.tensor([[1] * len(prefix) + [0] * (width - len(prompt)) + [1] * (len(prompt) - len(prefix)) for prompt in prompts], device=model.device)

    def ended(ids, scores, **_):  # called after every token
        said = tokenizer.batch_decode(ids[:, width:][:, -16:])
        return torch.tensor([any(end in text for end in ends) for text in said], device=ids.device)

    rows = model.get_input_embeddings().weight.shape[0]
    suppressed = list(range(len(tokenizer), rows)) or None  # padding of the vocabulary
    greedy = dict(do_sample=False, temperature=None, top_p=None, top_k=None, repetition_penalty=1.0)
    written = model.generate(input_ids=ids, attention_mask=mask, past_key_values=branch(cache, [0] * len(prompts)), max_new_tokens=max_new_tokens,
                             eos_token_id=chat.stop_ids, pad_token_id=chat.stop_ids[0], suppress_tokens=suppressed,
                             stopping_criteria=StoppingCriteriaList([ended] if ends else []), **greedy)
    texts = tokenizer.batch_decode(written[:, width:], skip_special_tokens=True)
    return [re.split("|".join(map(re.escape, ends)), text)[0] if ends else text.strip() for text in texts]


def answer_line(question: dict, output: str) -> dict:
    """The line of an answered question: for gsm8k with its scores, for a record with what it holds itself."""
    line = heading(question)
    if question["task"] == "answers":
        *_, asked, answer = question["messages"]
        return line | dict(question=asked["content"], answer=answer["content"], output=output)
    bare = lambda text: re.sub(r"\.$", "", re.sub(r"(?s).*#### |[,$]", "", text)).lower()
    right = bare(question["answer"])
    strict, flexible = re.findall(r"#### (\-?[0-9\.\,]+)", output), re.findall(r"-?[$0-9.,]{2,}|-?[0-9]+", output)
    said = {"exact_match": strict[0] if strict else "[invalid]", "exact_match_flexible": flexible[-1] if flexible else "[invalid]"}
    return line | dict(answer=right, output=output, scores={name: float(bare(text) == right) for name, text in said.items()})


def measure_text(model, chat: Chat, how: dict, group: list[dict], starts: range):
    """Yield the lines of each chunk of documents or records: bits of their text or answers, stop tokens included."""
    import torch

    with torch.inference_mode():
        for start in starts:
            lines = []
            for question in group[start : start + starts.step]:
                scored = "".join(message["content"] for message in question["messages"] if message["role"] == "assistant")
                line = heading(question) | dict(characters=len(scored), bytes=len(scored.encode()))
                found = [token_losses(model, ids, places) for ids, places in windows(chat, question, how["max_length"])]
                nats, correct = ([value for window in found for value in window[i]] for i in (0, 1))
                if not all(map(math.isfinite, nats)):
                    raise RunStopped(f"{question['task']}, record {question['id']}: its loss is no number: the model's weights are broken, or overflow in "
                                     f"this precision: try --precision fp32")
                told = dict(bits=sum(nats) / math.log(2), tokens=len(nats), correct=sum(correct))
                lines.append(line | (told if scored and nats else {"dropped": True}))
            yield lines


def windows(chat: Chat, question: dict, length: int) -> list[tuple[list[int], list[int]]]:
    """[(ids, places of those that are scored)] of at most `length` tokens: each target once, one BOS in front of each.

    A record is cut as in training, into whole rounds; nothing is scored where an answer alone is longer. A window of a document begins with as
    much of the text before it as it scores, since a first token behind nothing tells little.
    """
    if not question["document"]:
        counts = Counter()
        found = [(ids, [i for i, trained in enumerate(flags) if trained and i]) for ids, flags in cut_dialogue(chat, question["messages"], length, counts)]
        return [] if counts["answers_cut"] else found
    tokenizer, texts = chat.tokenizer, [message["content"] for message in question["messages"]]
    context, ids = tokenizer([texts[0] if len(texts) > 1 else "", "".join(texts)]).input_ids
    bos = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    begins = [] if ids[:1] == [bos] else [bos]  # the first token of a text is told as well
    done = max(1, len(begins) + len(os.path.commonprefix([context, ids])))
    ids, found = begins + ids, []
    while done < len(ids):
        begin = 0 if done < length else done - length // 2
        window = ids[begin : begin + length] if not begin else ids[:1] + ids[begin : begin + length - 1]
        first = done - begin + (begin > 0)
        found.append((window, [*range(first, len(window))]))
        done += len(window) - first
    return found


def token_losses(model, ids: list[int], places: list[int]) -> tuple[list[float], list[bool]]:
    """(natural -log-probability, is it the likeliest) of the ids at these places."""
    import torch

    if not places:
        return [], []
    at = torch.tensor(places, device=model.device)
    logits = model(torch.tensor([ids], device=model.device), logits_to_keep=at - 1).logits[0].float()  # (places, V)
    targets = torch.tensor(ids, device=model.device)[at]
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    return losses.tolist(), (logits.argmax(-1) == targets).tolist()


def look(model, chat: Chat, questions: list[dict]) -> list[str]:
    """What is wrong with the model, if its loss on what is asked is about that of guessing among all tokens, or above it; said aloud."""
    import torch

    texts = [question["question"] if "question" in question else question["messages"][-1]["content"] for question in questions[:16]]
    ids = chat.tokenizer("\n".join(texts)).input_ids[:512]
    with torch.inference_mode():
        losses, _ = token_losses(model, ids, [*range(1, len(ids))])
    guessing = math.log(model.get_input_embeddings().weight.shape[0])
    if losses and (loss := sum(losses) / len(losses)) > 0.98 * guessing:
        said = (f"the loss on the questions themselves is {loss:.1f} nats a token, where guessing blindly has {guessing:.1f} (ln V): this is no language model "
                f"as it stands. A delta that was not applied (apply_delta.py), or the tokenizer of another model?")
        print(f"warning: {said}", file=sys.stderr)
        return [said]
    return []


# ---- results ----
def mean_and_error(values: list[float], weights: list[float]) -> tuple[float, float | None]:
    """(sum of values / sum of weights, its standard error); with weights of 1 the mean, else a ratio such as bits per character."""
    n, total = len(values), sum(weights)
    mean = sum(values) / total
    return mean, math.sqrt(n / (n - 1) * sum((value - mean * weight) ** 2 for value, weight in zip(values, weights))) / total if n > 1 else None


def values_of(lines: list[dict], metric: str) -> tuple[list[float], list[float]]:
    """(values, weights) of the lines of a task for mean_and_error."""
    per = {"bits_per_character": ("bits", "characters"), "bits_per_byte": ("bits", "bytes"), "token_accuracy": ("correct", "tokens")}.get(metric)
    return ([line[per[0]] for line in lines], [line[per[1]] for line in lines]) if per else ([line["scores"][metric] for line in lines], [1.0] * len(lines))


def task_result(lines: list[dict]) -> dict:
    """The results of a task from its lines: score, standard error, n, and what else belongs to it."""
    task, whole = lines[0]["task"].split("/")[0], [line for line in lines if not line.get("dropped")]
    if not whole:
        raise RunStopped(f"{task}: nothing could be scored, every record is empty or has an answer longer than --max_length")
    metric = TASKS[task][0]
    metrics = ["bits_per_character", "bits_per_byte", "token_accuracy"] if task == "perplexity" else list(whole[0]["scores"])
    score, error = mean_and_error(*values_of(whole, metric))
    found = {"score": score, "stderr": error, "n": len(whole), "metric": metric} | {name: mean_and_error(*values_of(whole, name))[0] for name in metrics}
    if task == "perplexity":
        tokens = sum(line["tokens"] for line in whole)
        loss = sum(line["bits"] for line in whole) * math.log(2) / tokens
        return found | dict(loss=loss, perplexity=math.exp(min(loss, 700)), tokens=tokens, characters=sum(line["characters"] for line in whole),
                            dropped=len(lines) - len(whole))
    subjects = {name: [line for line in whole if line["subject"] == name] for name in dict.fromkeys(line["subject"] for line in whole) if name}
    if subjects:
        each = {name: dict(zip(("score", "stderr"), mean_and_error(*values_of(those, metric)))) | {"n": len(those)} for name, those in subjects.items()}
        found |= {"macro": sum(one["score"] for one in each.values()) / len(each), "subjects": each}
    if task not in ("gsm8k", "truthfulqa"):
        found["chance"] = sum(1 / len(line["loglikelihoods"]) for line in whole) / len(whole)
    shots = [line.get("shots", 0) for line in whole]
    return found | {"shots": max(shots), "shots_dropped": sum(count < max(shots) for count in shots), "cut": sum(line.get("cut", False) for line in whole)}


def result_text(task: str, found: dict) -> str:
    """A score with its error, as a reader wants it."""
    scale, unit, digits = (1, "", 3) if task.startswith("perplexity") else (100, " %", 1)
    return f"{found['score'] * scale:.{digits}f}{unit}" + (f" ± {found['stderr'] * scale:.{digits}f}" if found["stderr"] is not None else "")


def cell(text: str) -> str:
    """A text as a cell of a table in Markdown."""
    text = " ".join(text.split())
    return (text if len(text) <= 300 else text[:300] + " …").replace("|", "\\|").replace("<", "&lt;")


REMARKS = {"shots": "{} shots", "macro": "mean of the subjects {:.1%}", "token_accuracy": "{:.1%} of the tokens are the likeliest",
           "loss": "{:.3f} nats a token", "shots_dropped": "{} asked with fewer shots, for lack of context", "cut": "{} cut to the context",
           "dropped": "{} left out, empty or too long"}


def write_report(folder: Path, results: dict, lines: list[dict]) -> None:
    """report.md and report.png of one run."""
    flags, found = results["flags"], results["results"]
    about = [f"# {flags['model_name_or_path']}" + (f" with {flags['lora_path']}" if flags["lora_path"] else ""), ""]
    about += [f"**Warning:** {warning}\n" for warning in results["warnings"]]
    about += ["![scores](report.png)", "", "| task | score | measure | questions | chance | remarks |", "|---|---|---|---|---|---|"]
    for task, one in found.items():
        remarks = [words.format(one[name]) for name, words in REMARKS.items() if one.get(name)]
        chance = f"{one['chance']:.1%}" if "chance" in one else ""
        about.append(f"| {task} | {result_text(task, one)} | {one['metric']} | {one['n']:,} | {chance} | {'; '.join(remarks)} |")
    about += ["", "± is the standard error. Bits per character: lower is better; records are scored on their answers, stop tokens included.", ""]
    if subjects := [(task, name, one) for task, whole in found.items() for name, one in whole.get("subjects", {}).items()]:
        about += ["| task | subject | score | questions |", "|---|---|---|---|"]
        about += [*(f"| {task} | {name} | {result_text(task, one)} | {one['n']} |" for task, name, one in subjects), ""]
    if answers := [line for line in lines if line["task"] == "answers"]:
        about += ["## Answers", "", "| question | as the record has it | the model |", "|---|---|---|"]
        about += [f"| {cell(line['question'])} | {cell(line['answer'])} | {cell(line['output'])} |" for line in answers]
    draw(folder / "report.png", [(results, lines)], ["score"], {})
    (folder / "report.md").write_text("\n".join(about) + "\n", "utf-8")


# ---- two results ----
def compare_runs(compare: str, output_dir: str) -> None:
    """Write what changed between two runs: results.json, report.md and report.png in output_dir."""
    folders = [Path(name.strip()) for name in compare.split(",") if name.strip()]
    if len(folders) != 2:
        raise BadInput(f"--compare={compare}: give two output folders with a comma between them, before,after")
    runs = []
    for folder in folders:
        if not (folder / "results.json").is_file() or not (folder / "samples.jsonl").is_file():  # a comparison has no samples
            raise BadInput(f"--compare={compare}: {folder} holds no finished measurement: run evaluate.py --output_dir {folder} to its end first")
        if Path(output_dir).resolve() == folder.resolve():
            raise BadInput(f"--output_dir={output_dir} is one of the folders to compare: give a new one")
        runs.append((read_json(folder / "results.json"), list(read_rows(str(folder / "samples.jsonl"), Counter()))))
    ours = {"report.png", "report.md", "results.json", ".results.json.new"}  # a comparison that lies there, whole or not, is written anew
    if not Path(output_dir).is_dir() or {file.name for file in Path(output_dir).iterdir()} - ours:
        check_output_dir(output_dir)
    os.makedirs(output_dir, exist_ok=True)
    (before, old), (after, new) = runs
    names = [folder.name for folder in folders] if folders[0].name != folders[1].name else ["before", "after"]
    changes = {task: change_of(task, *([line for line in lines if line["task"] == task and not line.get("dropped")] for lines in (old, new)))
               for task in before["results"] if task in after["results"]}
    changes = {task: change for task, change in changes.items() if change}
    if not changes:
        raise BadInput(f"--compare={compare}: the two have no question in common: measure both with the same --tasks, --data_dir and --eval_path")
    allowed, left = 0.0, len(changes)
    for change in sorted(changes.values(), key=lambda change: change["p"]):  # Holm: of several tasks one is soon beyond its error by chance
        allowed, left = max(allowed, min(1.0, change["p"] * left)), left - 1
        better = (change["difference"] > 0) != change["lower_is_better"]
        change |= {"p_holm": allowed, "verdict": ("better" if better else "worse") if allowed < 0.05 else "open"}
    draw(Path(output_dir, "report.png"), runs, [name if name.isascii() else word for name, word in zip(names, ("before", "after"))], changes)
    Path(output_dir, "report.md").write_text(comparison_text(runs, names, changes), "utf-8")
    replace_json(Path(output_dir, "results.json"), {"compared": [str(folder) for folder in folders], "changes": changes})
    print(json.dumps({task: change["verdict"] for task, change in changes.items()} | {"output_dir": output_dir}))


def change_of(task: str, old: list[dict], new: list[dict]) -> dict | None:
    """The paired difference of a task on the questions that both runs have, with its error; None if there are none."""
    metric, after = TASKS[task.split("/")[0]][0], {(line["id"], line["hash"]): line for line in new}
    pairs = [(line, after[line["id"], line["hash"]]) for line in old if (line["id"], line["hash"]) in after]
    if not pairs:
        return None
    (a, weights), (b, _) = (values_of(list(side), metric) for side in zip(*pairs))
    differences = [y - x for x, y in zip(a, b)]
    mean, error = mean_and_error(differences, weights)
    interval = None if error is None else [mean - 1.96 * error, mean + 1.96 * error]
    change = {"metric": metric, "lower_is_better": metric.startswith("bits"), "n": len(pairs), "before": sum(a) / sum(weights),
              "after": sum(b) / sum(weights), "difference": mean, "stderr": error, "interval": interval, "p": sign_flip_p(differences)}
    if "loglikelihoods" in old[0] and "acc" in pairs[0][0]["scores"]:
        chance = sum(1 / len(line["loglikelihoods"]) for line, _ in pairs) / len(pairs)
        errors = [mean_and_error(side, weights)[1] for side in (a, b)]  # None of a single question
        near = [error is None or abs(sum(side) / len(side) - chance) <= 1.96 * error for side, error in zip((a, b), errors)]
        change |= {"chance": chance, "at_chance": all(near)}
    if not change["lower_is_better"]:
        change |= {"only_before": sum(x > y for x, y in zip(a, b)), "only_after": sum(y > x for x, y in zip(a, b))}
    return change


def sign_flip_p(differences: list[float]) -> float:
    """How often a sum as far from zero comes about if each difference might as well have the other sign: exact for few, drawn for many.

    For right and wrong answers this is McNemar's exact test. It asks for no normal distribution, so five questions alone are never enough.
    """
    import numpy

    d = numpy.array([value for value in differences if value])
    if len(d) <= 16:
        signs = 1 - 2.0 * (numpy.arange(2 ** len(d))[:, None] >> numpy.arange(len(d)) & 1)
    elif len(d) <= 1000:
        signs = 1 - 2.0 * numpy.random.default_rng(0).integers(0, 2, (10000, len(d)))
        signs[0] = 1  # what was seen is one of the ways
    else:
        return math.erfc(abs(d.sum()) / math.sqrt(2 * (d**2).sum()))
    return float((numpy.abs(signs @ d) >= abs(d.sum()) * (1 - 1e-9)).mean())


def change_text(task: str, change: dict) -> str:
    """One sentence on a task that claims no more than the error allows."""
    lower = change["lower_is_better"]
    scale, unit, digits = (1, " bits a character", 3) if lower else (100, " points", 1)
    show = lambda value, sign="": f"{value * scale:{sign}.{digits}f}"
    moved = f"{task}: {show(change['before'])} → {show(change['after'])}" + ("" if lower else " %")
    if change["interval"] is None:
        return f"{moved}. With a single text no error can be given."
    low, high = change["interval"]
    said = f"{moved} ({show(change['difference'], '+')}{unit}, 95 %: {show(low, '+')} to {show(high, '+')}; n = {change['n']:,}, p = {change['p_holm']:.2g})."
    if change["verdict"] == "open":
        down, up = ("gain", "loss") if lower else ("loss", "gain")
        possible = [f"a {down} of up to {show(-low)}"] * (low < 0) + [f"a {up} of up to {show(high)}"] * (high > 0)
        said += f" Possible: {' as well as '.join(possible)}{unit}." if possible else " Both do alike on every one."
        said += f" Both are at chance here ({change['chance']:.0%}): this set cannot tell these models apart." if change.get("at_chance") else ""
    return said


def comparison_text(runs: list[tuple], names: list[str], changes: dict) -> str:
    """report.md of two runs: the verdict, the picture, the figures, and the same questions answered by both."""
    (before, old), (after, new) = runs
    about = [f"# What changed from {names[0]} to {names[1]}", ""]
    for name, (run, _) in zip(names, runs):
        adapter = f" with {run['flags']['lora_path']}" if run["flags"]["lora_path"] else ""
        about += [f"{name}: {run['flags']['model_name_or_path']}{adapter}, asked with --template {run['flags']['template']}  "]
    about += [""] + [f"**Warning:** {name}: {warning}\n" for name, (run, _) in zip(names, runs) for warning in run["warnings"]]
    for verdict, title in (("better", "Better"), ("worse", "Worse"), ("open", "No difference can be told")):
        if those := [task for task, change in changes.items() if change["verdict"] == verdict]:
            about += [f"**{title}**", "", *(f"- {change_text(task, changes[task])}" for task in those), ""]
    if other := [f"--{name}" for name in ("template", "max_length", "max_new_tokens", "precision") if before["flags"].get(name) != after["flags"].get(name)]:
        about += [f"**Warning:** measured with another {', '.join(other)}: the difference is not the model's alone.", ""]
    if unlike := [task for task in changes if before["prompts"].get(task) != after["prompts"].get(task)]:
        about += [f"Not asked alike: {', '.join(unlike)}; only questions that both have are compared, whatever their shots.", ""]
    about += ["![before and after](report.png)", "",
              f"| task | {names[0]} | {names[1]} | difference | 95 % | p | n | right only {names[0]} / only {names[1]} |", "|---|---|---|---|---|---|---|---|"]
    for task, change in changes.items():
        scale, digits, measure = (1, 3, "bits a character") if change["lower_is_better"] else (100, 1, f"{change['metric']}, %")
        before, after, difference, *interval = (f"{value * scale:{sign}.{digits}f}" for sign, value in zip(
            ("", "", "+", "+", "+"), (change["before"], change["after"], change["difference"], *(change["interval"] or []))))
        turned = f"{change['only_before']} / {change['only_after']}" if "only_before" in change else ""
        figures = [f"{task}, {measure}", before, after, difference, " to ".join(interval), f"{change['p_holm']:.2g}", f"{change['n']:,}", turned]
        about.append(f"| {' | '.join(figures)} |")
    about += ["", "The difference is paired, question by question; bits a character: lower is better. p: how often a difference as large comes about "
              "if nothing had changed (signs flipped at random), corrected for the number of tasks (Holm); below 0.05 counts.", ""]
    answers = {line["hash"]: line for line in new if line["task"] == "answers"}
    if both := [(line, answers[line["hash"]]) for line in old if line["task"] == "answers" and line["hash"] in answers]:
        about += ["## The same questions, answered by both", "", f"| question | as the record has it | {names[0]} | {names[1]} |", "|---|---|---|---|"]
        about += [f"| {cell(x['question'])} | {cell(x['answer'])} | {cell(x['output'])} | {cell(y['output'])} |" for x, y in both]
    return "\n".join(about) + "\n"


COLOURS = {"better": "#0072B2", "worse": "#D55E00", "open": "#7a7a7a"}  # told apart by everyone (Okabe and Ito)


def draw(path: Path, runs: list[tuple], names: list[str], changes: dict) -> None:
    """The picture of one run, or of two with their changes: right answers on the left, bits per character, record by record, on the right."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as pyplot

    tasks = list(changes or runs[0][0]["results"])
    shares, texts = [task for task in tasks if not task.startswith("perplexity")], [task for task in tasks if task.startswith("perplexity")][:3]
    widths = [1.5] * bool(shares) + [1] * len(texts)
    size = 1 + 4.2 * sum(widths), max(4.6, 1.6 + 0.62 * len(shares))
    figure, _ = pyplot.subplots(1, len(widths), figsize=size, width_ratios=widths, layout="constrained")
    axes = list(figure.axes)
    if shares:
        draw_shares(axes.pop(0), shares, runs, names, changes)
    for axis, task in zip(axes, texts):
        sides = [{(line["id"], line["hash"]): line["bits"] / line["characters"] for line in lines if line["task"] == task and not line.get("dropped")}
                 for _, lines in runs]
        if not changes:
            axis.hist(sides[0].values(), bins=20, color=COLOURS["better"], alpha=0.8)
            axis.axvline(runs[0][0]["results"][task]["score"], color="black", linewidth=2)
            axis.set(xlabel="bits per character", ylabel="records")
            axis.set_title(f"{task}: {runs[0][0]['results'][task]['score']:.2f}", fontsize=11)
            continue
        change, shared = changes[task], [i for i in sides[0] if i in sides[1]]
        x, y = ([side[i] for i in shared] for side in sides)
        most = 1.05 * max(*x, *y)
        for verdict, edge, place, align in (("better", 0, (0.97, 0.12), "right"), ("worse", most, (0.04, 0.93), "left")):
            axis.fill_between([0, most], [0, most], edge, color=COLOURS[verdict], alpha=0.06, linewidth=0)
            axis.text(*place, f"{names[1]} is {verdict}", color=COLOURS[verdict], ha=align, transform=axis.transAxes)
        axis.plot([0, most], [0, most], color="black", linewidth=0.8)
        axis.scatter(x, y, s=28 if len(x) < 300 else 8, color=COLOURS[change["verdict"]], alpha=0.55, linewidth=0, clip_on=False)
        axis.plot(change["before"], change["after"], "+", color="black", markersize=16, markeredgewidth=2.5, clip_on=False)
        axis.set(xlim=(0, most), ylim=(0, most), aspect="equal", xlabel=f"{names[0]}: bits per character", ylabel=f"{names[1]}: bits per character")
        axis.set_title(f"{task}: {change['before']:.2f} → {change['after']:.2f}\neach dot a record, the cross all of them", fontsize=11,
                       color=COLOURS[change["verdict"]])
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    words = {"better": "better", "worse": "worse", "open": "no difference told"}
    found = {word: [task for task, change in changes.items() if change["verdict"] == verdict] for verdict, word in words.items()}
    figure.suptitle("   ".join(f"{word}: {', '.join(those)}" for word, those in found.items() if those), fontsize=13, fontweight="bold")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def draw_shares(axis, tasks: list[str], runs: list[tuple], names: list[str], changes: dict) -> None:
    """Right answers by task, in percent: the score with its 95 % as a band, an arrow from before to after, chance, and the subjects as marks."""
    for y, task in enumerate(reversed(tasks)):
        found, change = runs[-1][0]["results"][task], changes.get(task)
        colour, now, error = (COLOURS[change["verdict"]], change["after"], change["stderr"]) if change else (COLOURS["better"], found["score"], found["stderr"])
        axis.errorbar(100 * now, y, xerr=196 * (error or 0), color=colour, linewidth=7, alpha=0.25, zorder=2)
        axis.plot(100 * now, y, "o", color=colour, markersize=11, zorder=4)
        for one in found.get("subjects", {}).values():
            axis.plot(100 * one["score"], y, "|", color="#c4c4c4", markersize=9, zorder=1)
        if "chance" in found:
            axis.plot([100 * found["chance"]] * 2, [y - 0.32, y + 0.32], color="black", linewidth=1, linestyle=":", zorder=1)
        if change:
            axis.annotate("", (100 * now, y), (100 * change["before"], y), arrowprops=dict(arrowstyle="-|>", color=colour, lw=2, shrinkB=6, mutation_scale=18))
            axis.plot(100 * change["before"], y, "o", color="white", markeredgecolor=colour, markersize=10, markeredgewidth=2, zorder=3)
        said = f"{100 * change['difference']:+.1f}" if change else f"{100 * now:.1f}"
        axis.text(101.5, y, f"{said} ± {196 * (error or 0):.1f}", color=colour, va="center", fontweight="bold", clip_on=False)
    axis.set(yticks=range(len(tasks)), yticklabels=[f"{task}\nn = {(changes.get(task) or runs[0][0]['results'][task])['n']:,}" for task in reversed(tasks)],
             xlim=(0, 100), ylim=(-0.6, len(tasks) - 0.4), xlabel="% right; band: 95 %; dotted: chance; grey marks: subjects")
    axis.set_title(f"hollow: {names[0]}, full: {names[1]}" if changes else "right answers", fontsize=11)


# ==== load a model ====
def load_model(model_name_or_path, lora_path=None, template="auto", bits=16, precision="auto", trust_remote_code=False, allow_pickle=False,
               chat: Chat | None = None):
    """(model, Chat), ready to generate; with a Chat that is loaded already, `template` is not used."""
    chat = chat or load_chat(model_name_or_path, lora_path, template, trust_remote_code)
    model = load_base(model_name_or_path, len(chat.tokenizer), bits, precision, trust_remote_code, allow_pickle)
    return (load_adapter(model, lora_path, model_name_or_path, allow_pickle) if lora_path else model).eval(), chat


def load_chat(model_name_or_path: str, lora_path: str | None, template: str, trust_remote_code: bool) -> Chat:
    """The tokenizer and template of the adapter if it brings its own, else of the base."""
    from transformers import AutoTokenizer

    folder = lora_path if lora_path and Path(lora_path, "tokenizer_config.json").is_file() else model_name_or_path
    return Chat(load(AutoTokenizer, folder, trust_remote_code=trust_remote_code), template)


def load_base(model_name_or_path: str, tokens: int, bits: int, precision: str, trust_remote_code: bool, allow_pickle: bool):
    """The base: as it is, in LLM.int8 (arXiv:2208.07339), or in NF4 with double quantization (QLoRA, arXiv:2305.14314); with `tokens` rows at least.

    A GPTQ folder has bits of its own, and is made 16 bit again where gptqmodel is not installed.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    config = load(AutoConfig, model_name_or_path, trust_remote_code=trust_remote_code)
    cuda, cpu = torch.cuda.is_available(), torch.backends.cpu.get_cpu_capability()
    gptq = getattr(config, "quantization_config", None) or {}
    gptq = gptq if gptq.get("quant_method") == "gptq" else None
    has_bf16 = torch.cuda.get_device_capability()[0] >= 8 if cuda else cpu == "AVX512" and torch.cpu._is_avx512_bf16_supported()
    if precision == "auto":  # where bf16 is only emulated, fp16 is faster
        precision = "bf16" if has_bf16 else "fp16" if cuda else "fp32"
    if not cuda and (precision == "fp16" or precision == "bf16" and not has_bf16):
        raise BadInput(f"--precision={precision} needs a GPU{', or a CPU with AVX512-BF16' * (precision == 'bf16')}: leave it at auto")
    if gptq and bits < 16:
        raise BadInput(f"--bits={bits}: {model_name_or_path} is quantized already, to {gptq['bits']} bits by GPTQ: leave --bits at 16")
    dtype, kind = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision], AutoModelForCausalLM
    given = dict(dtype=dtype, device_map={"": "cuda" if cuda else "cpu"}, trust_remote_code=trust_remote_code, use_safetensors=None if allow_pickle else True)
    if bits < 16:
        given["quantization_config"] = BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4, bnb_4bit_quant_type="nf4",
                                                          bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)
    if gptq and not (importlib.util.find_spec("gptqmodel") and importlib.util.find_spec("optimum")):
        del config.quantization_config
        try:
            with torch.device("meta"):
                kind = type(AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code))
        except Exception as problem:  # the libraries raise whatever a damaged file makes of them
            raise BadInput(f"the config.json in {model_name_or_path} makes no model: {str(problem)[:200]}") from None
        given |= dict(config=config, state_dict=dequantized_state(model_name_or_path, gptq, dtype))
    model = load(kind, None if "state_dict" in given else model_name_or_path, output_loading_info=True, **given)
    rows = model.get_input_embeddings().weight.shape[0]
    if tokens > rows:  # of a template: each is the mean of the old rows, since a random one is farther from them than they are from one another
        model.resize_token_embeddings(tokens, mean_resizing=False)
        with torch.no_grad():
            for table in (model.get_input_embeddings(), model.get_output_embeddings()):
                table.weight[rows:] = table.weight[:rows].float().mean(dim=0).to(table.weight)
    return model


def load(auto_class, name: str, may_lack: tuple = (), **arguments):
    """auto_class.from_pretrained(name); BadInput where a file is absent or cut off, or a weight is missing: transformers would take random ones."""
    try:
        loaded = auto_class.from_pretrained(name, **arguments)
    except Exception as problem:  # a cut-off file raises SafetensorError, RuntimeError or OSError, by where it was cut
        raise problem if "out of memory" in str(problem) else BadInput(f"{name} could not be loaded ({auto_class.__name__}): {str(problem)[:300]}") from None
    if arguments.get("output_loading_info"):
        loaded, found = loaded
        if missing := sorted({*found["missing_keys"]} - {*may_lack}) + sorted(str(key) for key in found["mismatched_keys"]):
            raise BadInput(f"{name} lacks {len(missing)} of its weights, {missing[0]} for one: the files do not belong to its config.json")
    return loaded


def dequantized_state(folder: str, settings: dict, dtype) -> dict:
    """All weights of a GPTQ folder by name, each layer as a plain matrix; BadInput if some are missing or cut off."""
    from safetensors import SafetensorError, safe_open

    settings.setdefault("checkpoint_format", "gptq")
    if settings["checkpoint_format"] not in ("gptq", "gptq_v2") or settings.get("bits") not in (2, 3, 4, 8):
        raise BadInput(f"{folder} is of the GPTQ format {settings['checkpoint_format']} with {settings.get('bits')} bits, which only gptqmodel reads: "
                       f"pip install gptqmodel optimum")
    index = Path(folder) / "model.safetensors.index.json"
    files = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    layers, state = {}, {}
    for file in files:
        try:
            with safe_open(Path(folder) / file, "pt") as tensors:
                for name in tensors.keys():
                    layer, _, part = name.rpartition(".")
                    if part not in PARTS:
                        state[name] = tensors.get_tensor(name).to(dtype)
                        continue
                    parts = layers.setdefault(layer, {})
                    parts[part] = tensors.get_tensor(name)
                    if len(parts) == len(PARTS):  # they may lie in two files
                        state[f"{layer}.weight"] = dequantize(layers.pop(layer), settings).to(dtype)
        except (OSError, SafetensorError) as problem:
            raise BadInput(f"{folder}: {file} is missing, cut off or damaged, download it again ({problem})") from None
    for layer, parts in layers.items():
        raise BadInput(f"{folder} lacks {layer}.{min(set(PARTS) - set(parts))}: finish the download")
    return state


# ==== adapter ====
def load_adapter(model, lora_path: str, model_name_or_path: str, allow_pickle: bool = False, name: str = "default"):
    """`model` with the LoRA adapter in a folder; BadInput if it was trained on another base or lacks a tensor."""
    import torch
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors.torch import load_file, save_file

    folder = Path(lora_path)
    file = folder / "adapter_model.safetensors"
    if not file.is_file():  # old Chinese-Vicuna checkpoints
        pickles = [folder / name for name in ("adapter_model.bin", "pytorch_model.bin") if (folder / name).is_file()]
        if not pickles or not allow_pickle:
            but = f" but a pickle, {pickles[0].name}, which can run code when it is loaded: if you trust it, --allow_pickle True converts it" if pickles else ""
            raise BadInput(f"{lora_path} holds no adapter_model.safetensors{but}")
    base = read_json(folder / "yangtuo.json").get("base_fingerprint") if (folder / "yangtuo.json").is_file() else None
    if base and base != (found := fingerprint(model_name_or_path)):
        raise BadInput(f"{lora_path} was trained on another base than {model_name_or_path} (fingerprint {str(base)[:12]}, this one has {str(found)[:12]})")
    try:
        if not file.is_file():
            weights = torch.load(pickles[0], map_location="cpu", weights_only=True)
            save_file({key.replace(".default.", "."): tensor.contiguous() for key, tensor in weights.items() if "lora_" in key}, file)
            print(f"converted {pickles[0]} to {file}", file=sys.stderr)
        given = set(load_file(file))
        if hasattr(model, "peft_config"):
            model.load_adapter(folder, adapter_name=name)
        else:
            model = PeftModel.from_pretrained(model, folder, adapter_name=name)
    except Exception as problem:  # peft raises RuntimeError, ValueError or KeyError, safetensors and pickle their own
        raise BadInput(f"{lora_path} does not fit {model_name_or_path}: of another base, or cut off? {str(problem)[:200]}") from None
    if missing := set(get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)) - given:
        raise BadInput(f"{lora_path} lacks {len(missing)} tensors, {min(missing)} for one")
    return model


# ==== gptq ====
# The format: a linear layer of shape (out, in) has four tensors in the place of `weight`:
#
#     qweight  int32 (in * bits / 32, out)       codes of 0 to 2^bits - 1, packed along `in`, lowest bits first
#     qzeros   int32 (groups, out * bits / 32)   zero points, packed along `out`
#     scales   fp16  (groups, out)
#     g_idx    int32 (in,)                       the group of each input
#
# and weight[o, i] = scales[g, o] * (code[i, o] - zero[g, o]) with g = g_idx[i]. The first version of the format, "gptq", holds the zero
# points less one, so that none can be 0: all readers know it, but it is kept to symmetric codes. Others go into "gptq_v2", which holds them as they are.
PARTS = ("qweight", "qzeros", "scales", "g_idx")


def unpack_codes(words, bits: int):
    """The codes (n, m) in int32 words (n * bits / 32, m), as uint8."""
    import torch

    words = words.view(-1, bits, words.shape[1]).long() & 0xFFFFFFFF
    codes = torch.empty(len(words), 32, words.shape[2], dtype=torch.uint8, device=words.device)
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        code = words[:, word] >> shift
        if shift + bits > 32:
            code |= words[:, word + 1] << 32 - shift
        codes[:, i] = code & 2**bits - 1
    return codes.view(-1, words.shape[2])


def dequantize(parts: dict, settings: dict):
    """The weight (out, in), in fp32, that the four tensors of a layer stand for."""
    bits, less = settings["bits"], int(settings["checkpoint_format"] == "gptq")
    zeros = unpack_codes(parts["qzeros"].T.contiguous(), bits).T.float() + less
    codes, g_idx = unpack_codes(parts["qweight"], bits), parts["g_idx"].long()
    return ((codes - zeros[g_idx]) * parts["scales"].float()[g_idx]).T.contiguous()


if __name__ == "__main__":
    cli(main)
