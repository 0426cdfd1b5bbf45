"""Score answers: by rules, a reward model, a judge, or how hard they are for a model."""
import difflib
import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from utils import BadInput, Chat, check_adapter, check_file, check_model, read_json


# ==== rules ====
def load_rules(rules: str) -> dict[str, tuple[float, Callable]]:
    """{name: (weight, function)} of FILE:name=weight,name=weight, a Python file of the user's; sample/rules.py says what a rule is.

    A weight of 0 reports a rule without paying for it.
    """
    path, _, chosen = rules.rpartition(":")
    if not path.endswith(".py") or not chosen:
        raise BadInput(f"--rules={rules}: write FILE.py:name=weight,name=weight, such as sample/rules.py:finished=1,chinese=0.5")
    check_file("rules", path)
    spec = importlib.util.spec_from_file_location("rules", path)
    module = sys.modules["rules"] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as problem:
        raise BadInput(f"--rules: {path} cannot be run: {type(problem).__name__}: {' '.join(str(problem).split())[:200]}") from None
    known, loaded = {name: rule for name, rule in vars(module).items() if inspect.isfunction(rule) and not name.startswith("_")}, {}
    for name, _, weight in (part.strip().partition("=") for part in chosen.split(",")):
        if name not in known:
            near = "".join(f": did you mean {name}?" for name in difflib.get_close_matches(name, known, n=1))
            raise BadInput(f"--rules: {path} has no rule {name!r}{near or ', it has ' + ', '.join(known)}")
        try:
            loaded[name] = float(weight), known[name]
            inspect.signature(known[name]).bind("", "", True, {})
        except (ValueError, TypeError) as problem:
            what = "must take (prompt, answer, finished, record)" if isinstance(problem, TypeError) else f"needs a weight, such as {name}=1"
            raise BadInput(f"--rules: the rule {name} {what}") from None
        if not math.isfinite(loaded[name][0]):
            raise BadInput(f"--rules: the weight of {name} is {weight}, a finite number belongs there")
    return loaded


def run_rules(rules: dict, messages: list[dict], answer: str, finished: bool, record: dict, where: str) -> dict[str, float]:
    """{rule: what it says of an answer to messages}, before the weights; BadInput names rule and record (`where`) if one raises or gives no number."""
    said = {}
    for name, (_, rule) in rules.items():
        try:
            said[name] = float(rule(messages[-1]["content"], answer, finished, record))
        except Exception as problem:
            line = traceback.extract_tb(problem.__traceback__)[-1].lineno
            raise BadInput(f"{where}: the rule {name} raised {type(problem).__name__} in line {line}: {' '.join(str(problem).split())[:200]}") from None
        if not math.isfinite(said[name]):
            raise BadInput(f"{where}: the rule {name} gives {said[name]}, a finite number belongs there")
    return said


# ==== reward ====
def check_reward(reward_model: str, allow_pickle: bool = False) -> None:
    """BadInput, without torch, if a folder is no reward model: neither ...ForSequenceClassification with one label nor an adapter of that."""
    folder = Path(reward_model)
    if (folder / "adapter_config.json").is_file():
        check_whole(folder)
        if (task := read_json(folder / "adapter_config.json").get("task_type")) != "SEQ_CLS":
            raise BadInput(f"--reward_model={reward_model} is an adapter of the kind {task}, which gives no rewards: train one with train_reward.py")
        return
    check_model(reward_model, allow_pickle)
    kinds = read_json(folder / "config.json").get("architectures") or ["nothing known"] if folder.is_dir() else []
    if kinds and not kinds[0].endswith("ForSequenceClassification"):
        raise BadInput(f"--reward_model={reward_model} is a {kinds[0]}, which gives no rewards: train one from it with train_reward.py")


def load_reward(reward_model: str, base: str | None = None, **given):
    """(model, Chat) of a folder that check_reward takes; `base`: of an adapter, where it is not what its adapter_config.json says.

    `given` goes to from_pretrained. Each model writes a dialogue in its own template and ids: text goes from one to the other, never ids.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, logging

    is_adapter = Path(reward_model, "adapter_config.json").is_file()
    base = reward_model if not is_adapter else base or read_json(Path(reward_model, "adapter_config.json"))["base_model_name_or_path"]
    tokenizer = load(AutoTokenizer, reward_model, trust_remote_code=given.get("trust_remote_code", False))
    chat = Chat(tokenizer, last_round_only=True)  # of a dialogue the last answer is judged
    verbosity = logging.get_verbosity()
    if is_adapter:
        given["num_labels"] = 1
        logging.set_verbosity_error()  # the head that the base lacks comes with the adapter
    model = load(AutoModelForSequenceClassification, base, output_loading_info=not is_adapter, **given)
    logging.set_verbosity(verbosity)
    if model.config.num_labels != 1 or not hasattr(model, "score"):
        raise BadInput(f"--reward_model={reward_model} gives {model.config.num_labels} labels, one reward is wanted: train one with train_reward.py")
    if is_adapter:
        if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:  # rows of its template's tokens, which the adapter brings
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        model = load_adapter(model, reward_model, base).get_base_model()
    model.score.float()  # in 16 bit two good answers would often get one reward
    return model.eval(), chat


def reward_ids(chat: Chat, messages: list[dict], answer: str, finished: bool) -> list[int]:
    """What a reward model reads: the dialogue up to the answer's stop token; of a cut answer up to its last token, and nothing behind it."""
    *prompt, (ids, _), _ = chat.encode([*messages, {"role": "assistant", "content": answer}])
    if not finished:
        ids = ids[:-1]  # the stop token; before it a template may have a blank or a line break of its own
        decoded = lambda ids: chat.tokenizer.decode(ids, skip_special_tokens=True)
        before, said, _ = decoded(ids).rpartition(answer if answer in decoded(ids) else answer.strip())  # ziya strips it
        while said and decoded(ids[:-1]).startswith(before + said):
            ids = ids[:-1]
    return [i for part, _ in prompt for i in part] + ids


def read_rewards(model, rows: list[list[int]], batch_size: int):
    """Yield (number of the row, its reward), the longest rows first: each is read at its last token, batch_size rows of like length together.

    `model` needs base_model (ids to hidden states) and score (hidden states to rewards). Reading at the last id that is no padding, as
    transformers does, would miss a stop token that is the padding as well: then a cut answer would get the reward of a finished one.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    order = sorted(range(len(rows)), key=lambda number: -len(rows[number]))
    for begin in range(0, len(rows), batch_size):
        batch = order[begin : begin + batch_size]
        ids = pad_sequence([torch.tensor(rows[number]) for number in batch], batch_first=True).to(model.device)  # (B, T), padded right with 0
        last = torch.tensor([len(rows[number]) - 1 for number in batch], device=model.device)
        with torch.inference_mode():
            mask = (torch.arange(ids.shape[1], device=model.device) <= last[:, None]).long()
            hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state  # (B, T, d)
            rewards = model.score(hidden[torch.arange(len(batch), device=model.device), last].float())[:, 0]
        yield from zip(batch, rewards.tolist())
