"""Record what lm-evaluation-harness 0.4.13 finds on a tiny model, for tests/test_evaluate.py: tests/lm_eval.json.

    python -m venv peer && peer/bin/pip install lm_eval==0.4.13 torch==2.13.0 transformers==5.23.0 peft==0.21.2 datasets==5.2.0 accelerate==1.15.0
    peer/bin/python benchmarks/record_lm_eval.py

The model and the sets are made here, without random numbers, so that both sides have the same ones. The harness asks its own task files,
pointed at the sets as JSON (it cannot read them as they are published), with the first examples as shots.
"""
import csv
import json
import math
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "tests" / "lm_eval.json"
CHATML = ("{% for message in messages %}{{ '<|im_start|>' ~ message.role ~ '\n' ~ message.content ~ '<|im_end|>\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")

EXAM = [  # question, four choices, answer; written for this project
    ("羊驼吃什么？", "草", "石头", "None", "肉", "A"), (" 昆明在哪个省？ ", "四川", "云南", "007", "贵州", "B"), ("一天有几个小时？", "12", "20", "24", "1.0", "C"),
    ("水在多少度结冰（标准大气压）？", "100", "50", "10", "0", "D"), ("\"围巾\"是用来做什么的？", "保暖，也好看", "吃", "飞", "None", "A"), ("2 + 3 = ?", "4", "5", "6", "7", "B"),
    ("What is wool made of?", "iron", "sand", "hair", "None", "C"), ("哪一个是水果？", "桌子", "苹果", "椅子", "铁", "B"), ("一年有几个月？", "12", "10", "9", "13", "A"),
]
ARC = [("Which animal gives wool?", ["a sheep", "a fish", "a frog", "a very long snake of the sea"], "A"), ("What melts first?", ["iron", "ice", "stone"], "2"),
       ("Why do alpacas hum?", ["They are engines.", "They talk to each other.", "They cannot.", "No one hums."], "B"),
       ("Where does the sun rise?", ["in the east", "in the west", "in the north", "nowhere"], "A"), ("What is 7 x 8?", ["54", "56", "58", "fifty"], "B")]
HELLASWAG = [("Knitting", "A woman holds two needles. [header] How to knit [title] Begin.", "she  [step] pulls the", ["wool through a loop.", "car out of the mud.", "needle", "sun down [title] at night."], 0),
             ("Feeding alpacas", "A man opens the gate.", "the animals", ["run to him.", "fly away over the hill.", "read.", "are painted on the wall of the house."], 0),
             ("Washing", "He fills the tub.", "then he", ["sleeps", "washes the wool and hangs it up.", "eats it.", "is wool."], 1)]
TRUTHFULQA = [("Do alpacas spit?", "Yes, when they are annoyed", "Yes, when they are annoyed; They spit at each other", "No; Never; They only sing; Alpacas have no mouth"),
              ("Can wool be eaten?", "No", "No; It cannot be digested; You should not eat wool", "Yes, it tastes like bread; Yes")]
GSM8K = [("An alpaca gives 3 kg of wool a year. How much in 2 years?", "3 * 2 = 6\n#### 6"), ("One scarf is 300 yuan. What are 4?", "4 * 300 = 1,200\n#### 1,200"),
         ("There are 5 brown and 4 white alpacas. How many?", "5 + 4 = 9\n#### 9"), ("He sells 2 of 10 scarves. How many are left?", "10 - 2 = 8\n#### 8")]
TEXTS = ["羊驼是一种温和的动物，住在山上。", "The scarf is made of wool; it is warm, and it costs 300 yuan.", "云岭 🦙 2016"]


def make_model(folder: Path, bos: bool) -> None:
    """A LLaMA of two layers whose weights are sines, over bytes: the same on every machine and with every version. With `bos`, each text begins with one."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    specials = ["<|begin|>", "<|end|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*specials, *alphabet, "Ġt", "he", "Ġthe", "Ġa", "åĽ"])},
                                merges=[("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("Ġ", "a"), ("å", "Ľ")]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.add_special_tokens(specials)
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<|begin|> $A", pair="<|begin|> $A $B", special_tokens=[("<|begin|>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<|begin|>", eos_token="<|end|>", chat_template=CHATML).save_pretrained(folder)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=core.get_vocab_size(), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                                         num_key_value_heads=2, max_position_embeddings=2048, bos_token_id=0, eos_token_id=1))
    with torch.no_grad():
        for number, (name, weight) in enumerate(sorted(model.named_parameters())):
            if "norm" not in name:
                places = torch.arange(weight.numel(), dtype=torch.float64)
                weight.copy_((torch.sin(places * 1.61803 + places**2 * 0.00137 + number) * (1.5 if "embed" in name else 0.3)).reshape(weight.shape))
    model.save_pretrained(folder)


def write_sets(folder: Path) -> None:
    """The sets as they are published."""
    def table(path, head, rows):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        with open(folder / path, "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([*head, *rows])

    lines = lambda path, rows: (folder / path).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    arc = lambda i, question, texts, key: {"id": f"q{i}", "question": {"stem": question, "choices": [
        {"text": text, "label": label} for text, label in zip(texts, "123" if key.isdigit() else "ABCD")]}, "answerKey": key}
    swag = lambda i, row: dict(zip(("activity_label", "ctx_a", "ctx_b", "endings", "label"), row)) | {"ind": i}
    table("ceval/dev/accountant_dev.csv", [("id", "question", *"ABCD", "answer", "explanation")], [(i, *row, "因为。") for i, row in enumerate(EXAM[:5])])
    table("ceval/val/accountant_val.csv", [("id", "question", *"ABCD", "answer")], [(i, *row) for i, row in enumerate(EXAM[5:])])
    table("cmmlu/dev/agronomy.csv", [("", "Question", *"ABCD", "Answer")], [(i, *row) for i, row in enumerate(EXAM[4:])])
    table("cmmlu/test/agronomy.csv", [("", "Question", *"ABCD", "Answer")], [(i, *row) for i, row in enumerate(EXAM[:4])])
    table("mmlu/dev/abstract_algebra_dev.csv", [], EXAM[4:])
    table("mmlu/test/abstract_algebra_test.csv", [("question", *(f"choice{i}" for i in range(4)), "answer")], [(*row[:5], "ABCD".index(row[5])) for row in EXAM[:4]])
    lines("ARC-Challenge-Dev.jsonl", [arc(i, *row) for i, row in enumerate(ARC[:2])])
    lines("ARC-Challenge-Test.jsonl", [arc(i, *row) for i, row in enumerate(ARC[2:], 2)])
    lines("hellaswag_train.jsonl", [swag(0, HELLASWAG[0])])
    lines("hellaswag_val.jsonl", [swag(i, row) for i, row in enumerate(HELLASWAG[1:], 1)])
    table("TruthfulQA.csv", [("Type", "Category", "Question", "Best Answer", "Correct Answers", "Incorrect Answers", "Source")], [("", "", *row, "") for row in TRUTHFULQA])
    lines("gsm8k_train.jsonl", [{"question": question, "answer": answer} for question, answer in GSM8K[:2]])
    lines("gsm8k_test.jsonl", [{"question": question, "answer": answer} for question, answer in GSM8K[2:]])
    (folder / "perplexity").mkdir()
    (folder / "perplexity" / "texts.txt").write_text("\n".join(TEXTS) + "\n", "utf-8")


def write_tasks(folder: Path) -> list[str]:
    """Task files of the harness's own tasks, with their data from JSON; their names."""
    exam = lambda rows: [dict(zip(("question", *"ABCD", "answer"), row)) for row in rows]
    arc = lambda rows: [{"question": question, "choices": {"text": texts, "label": [*("123" if key.isdigit() else "ABCD")][: len(texts)]}, "answerKey": key} for question, texts, key in rows]
    swag = [dict(zip(("activity_label", "ctx_a", "ctx_b", "endings", "label"), row)) for row in HELLASWAG]
    split = lambda text: [part.strip() for part in text.split(";")]
    truth = [{"question": question, "mc1_targets": {"choices": [best, *split(wrong)]},
              "mc2_targets": {"choices": [*split(right), *split(wrong)], "labels": [1] * len(split(right)) + [0] * len(split(wrong))}} for question, best, right, wrong in TRUTHFULQA]
    problems = [{"question": question, "answer": answer} for question, answer in GSM8K]
    mmlu = lambda rows: [{"question": row[0], "choices": list(row[1:5]), "answer": "ABCD".index(row[5])} for row in rows]
    upper = lambda rows: [{"Question" if key == "question" else "Answer" if key == "answer" else key: value for key, value in row.items()} for row in exam(rows)]
    sets = {  # name: (file of the harness, questions, shots, its split of questions, how many shots)
        "ceval": ("ceval/ceval-valid_accountant.yaml", exam(EXAM[5:]), exam(EXAM[:5]), "validation_split", 5),
        "cmmlu": ("cmmlu/cmmlu_agronomy.yaml", upper(EXAM[:4]), upper(EXAM[4:]), "test_split", 5),
        "mmlu": ("mmlu/default/mmlu_abstract_algebra.yaml", mmlu(EXAM[:4]), mmlu(EXAM[4:]), "test_split", 5),
        "arc": ("arc/arc_challenge.yaml", arc(ARC[2:]), arc(ARC[:2]), "test_split", 2),
        "hellaswag": ("hellaswag/hellaswag.yaml", swag[1:], swag[:1], "validation_split", 1),
        "mc1": ("truthfulqa/truthfulqa_mc1.yaml", truth, [], "validation_split", 0),
        "mc2": ("truthfulqa/truthfulqa_mc2.yaml", truth, [], "validation_split", 0),
        "gsm8k": ("gsm8k/gsm8k.yaml", problems[2:], problems[:2], "test_split", 2),
    }
    import lm_eval

    for name, (file, questions, shots, split_name, count) in sets.items():
        files = {"asked": questions, "shots": shots} if shots else {"asked": questions}
        for part, rows in files.items():
            (folder / f"{name}-{part}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
        text = [f"include: {Path(lm_eval.__file__).parent / 'tasks' / file}", f"task: our_{name}", "dataset_path: json", "dataset_name: null", "tag: null",
                "dataset_kwargs:", "  data_files:", *(f"    {part}: {folder}/{name}-{part}.jsonl" for part in files), "training_split: null", "validation_split: null",
                "test_split: null", f"{split_name}: asked", f"num_fewshot: {count}"]
        text += ["fewshot_split: shots", "fewshot_config:", "  sampler: first_n"] if shots else []
        text += ["generation_kwargs:", "  until: ['Question:', '</s>', '<|im_end|>']", "  do_sample: false", "  temperature: 0.0", "  max_gen_toks: 40"] if name == "gsm8k" else []
        (folder / f"our_{name}.yaml").write_text("\n".join(text) + "\n", "utf-8")
    return [f"our_{name}" for name in sets]


def record(model: Path, tasks: Path, names: list[str], chat: bool) -> dict:
    """{task: its scores, and for each question the log-likelihoods or what was generated}."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    found = lm_eval.simple_evaluate(model="hf", model_args=f"pretrained={model},dtype=float32", tasks=names, task_manager=TaskManager(include_path=str(tasks)), batch_size=2,
                                    device="cpu", log_samples=True, apply_chat_template=chat, fewshot_as_multiturn=True, bootstrap_iters=0)
    show = lambda answer: answer[0] if isinstance(answer[0], str) else [round(float(value), 6) for value, _ in answer]
    return {name.removeprefix("our_"): {
        "scores": {key.removesuffix(",none"): value for key, value in found["results"][name].items() if isinstance(value, float)},
        "samples": [show(sample["filtered_resps"] if "loglikelihood" in sample["arguments"] or len(sample["resps"]) > 1 else sample["resps"][0])
                    for sample in sorted(found["samples"][name], key=lambda sample: sample["doc_id"]) if sample.get("filter") in (None, "none", "strict-match")]} for name in names}


def main() -> None:
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    result = {}
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        (work / "tasks").mkdir()
        names = write_tasks(work / "tasks")
        for bos in (False, True):
            model = work / f"model-{bos}"
            make_model(model, bos)
            side = "bos" if bos else "no bos"
            result[side] = record(model, work / "tasks", names, chat=False)
            # told to add no BOS of its own, since for perplexity it puts one before each text, and would count the second one as text
            texts = HFLM(str(model), dtype="float32", device="cpu", batch_size=1, add_bos_token=False)
            requests = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(TEXTS)]
            result[side]["perplexity"] = {"samples": [round(-float(value) / math.log(2), 6) for value in texts.loglikelihood_rolling(requests)]}
        result["chat"] = record(work / "model-False", work / "tasks", [name for name in names if name not in ("our_gsm8k", "our_mc1", "our_mc2")], chat=True)
    TARGET.write_text(json.dumps(result, ensure_ascii=False) + "\n", "utf-8")
    print(f"wrote {TARGET}", file=sys.stderr)


if __name__ == "__main__":
    main()
