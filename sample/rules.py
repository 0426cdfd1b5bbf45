"""Rules that score an answer (rule-based rewards). Take this file, add a function, name it behind --rules:

    python score_records.py --by rules --rules sample/rules.py:finished=1,repetition=1,chinese=0.5 ...

A rule is name(prompt, answer, finished, record) -> float. `prompt` is the last question, `answer` the text up to the first stop token,
`finished` whether the model came to that token, `record` the row of the data file, for what only the row can know. These give 1 for an
answer that is as it should be, 0 for one that is not; whatever else a rule of yours gives is multiplied by its weight and added up as well.
A rule about something that the record does not ask for gives 1: there is nothing to break. A model that is paid for one rule alone finds
the answer that satisfies nothing else, so pay for several: `chinese` without `repetition` is won by one character over and over.
"""
import re

BANNED_WORDS = ("作为一个人工智能", "作为人工智能语言模型", "作为AI语言模型", "As an AI language model")
NGRAM = 4  # characters; common phrases repeat fewer of them
LONGEST = 200  # characters
CHINESE = re.compile("[\u3400-\u4dbf\u4e00-\u9fff]")
LETTER = re.compile(r"[^\W\d_]")  # of any script: digits, punctuation, blanks and emoji are no language


def finished(prompt: str, answer: str, finished: bool, record: dict) -> float:
    """1 where the model ended the answer itself; 0 where it was cut at the limit."""
    return float(finished)


def length(prompt: str, answer: str, finished: bool, record: dict) -> float:
    """1 from one character to the record's `max_characters` (else LONGEST), falling to 0 at twice that; 0 for nothing but blanks."""
    most, count = record.get("max_characters") or LONGEST, len(answer.strip())
    return min(1.0, max(0.0, 2 - count / most)) if count else 0.0


def repetition(prompt: str, answer: str, finished: bool, record: dict) -> float:
    """Share of the answer's 4-grams of characters that are new where they stand: 1 without repetition, near 0 for a loop."""
    text = re.sub(r"\s+", " ", answer.strip())
    grams = [text[i : i + NGRAM] for i in range(len(text) - NGRAM + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def chinese(prompt: str, answer: str, finished: bool, record: dict) -> float:
    """Share of Chinese among the letters, code between ``` aside; 0 where there is no letter at all, 1 where the record's `language` is not zh."""
    if (record.get("language") or "zh") != "zh":
        return 1.0
    text = re.sub(r"```.*?(```|\Z)", "", answer, flags=re.DOTALL)
    letters = LETTER.findall(text)
    return sum(CHINESE.match(letter) is not None for letter in letters) / len(letters) if letters else 0.0


def format(prompt: str, answer: str, finished: bool, record: dict) -> float:
    """1 where the whole answer, blanks around it aside, matches the record's `format`, a regular expression in which . is any character."""
    return float(re.fullmatch(record["format"], answer.strip(), re.DOTALL) is not None) if record.get("format") else 1.0


def number(prompt: str, answer: str, finished: bool, record: dict) -> float:
    """1 where the last number of the answer is the record's `ground_truth`: 1,234.50 is 1234.5, and 50% is 50."""
    if record.get("ground_truth") in (None, ""):
        return 1.0
    value = lambda text: [float(found.replace(",", "")) for found in re.findall(r"(?:(?<!\d)-)?\d[\d,]*(?:\.\d+)?", text)]
    truth = record["ground_truth"]
    said, true = value(answer), [float(truth)] if isinstance(truth, (int, float)) else value(truth)
    if not true:
        raise ValueError(f"ground_truth holds no number: {record['ground_truth']!r}")
    return float(bool(said) and abs(said[-1] - true[-1]) <= 1e-6 * max(1, abs(true[-1])))


def banned_words(prompt: str, answer: str, finished: bool, record: dict) -> float:
    """1 where the answer holds none of BANNED_WORDS and of the record's `banned_words`, a list, in whatever case."""
    said = answer.lower()
    return float(not any(word.lower() in said for word in (*BANNED_WORDS, *(record.get("banned_words") or ()))))
