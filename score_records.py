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
