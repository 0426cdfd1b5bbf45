"""Seconds, peak memory and perplexity of quantize_gptq.py against gptqmodel, on the default model or one of yours.

    python -m venv peer && peer/bin/pip install torch==2.14.1 gptqmodel==7.7
    python benchmarks/gptq.py --peer peer/bin/python --data_dir ../shared/data       # about 15 minutes on two CPU threads

Both quantize the same weights with the same bits, groups and calibration texts, half Chinese, half English, and take turns, each in
a process of its own, whose wall time and peak resident memory are measured from start to end. The perplexities, on other texts of
both kinds, are of one evaluation for both folders: ours, which makes them 16 bit again. At the end gptqmodel reads our folder, and its
logits are compared with those of our own reading.
"""
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # not this folder
from benchmarks.report import add
from utils import BadInput, check_file, cli

PEER = """
import json, sys, torch
from gptqmodel import GPTQModel, QuantizeConfig
base, out, bits, size, sym, act, texts = sys.argv[1:]
model = GPTQModel.load(base, QuantizeConfig(bits=int(bits), group_size=int(size), sym=sym == "True", desc_act=act == "True"), device="cpu")
rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in json.load(open(texts))]
model.quantize(rows, batch_size=1)
model.save(out)
"""
READER = """
import sys, torch
from gptqmodel import GPTQModel
model = GPTQModel.load(sys.argv[1], device="cpu", backend="gptq_torch", dtype=torch.float16).model
weights = {name: module.dequantize_weight().T.float() for name, module in model.named_modules() if hasattr(module, "dequantize_weight")}
with torch.inference_mode():
    torch.save((weights, model(torch.load(sys.argv[2])).logits.float()), sys.argv[3])
"""


def main(
    *,
    peer: str,
    data_dir: str,
    model_name_or_path: str = "",
    bits: int = 4,
    group_size: int = 64,
    desc_act: bool = False,
    sym: bool = True,
    texts: int = 16,
    max_length: int = 512,
    repeats: int = 3,
    threads: int = 2,
):
    """Print a table of seconds, peak memory and perplexity, ours and theirs.

    Args:
        peer: The Python of an environment that has gptqmodel.
        data_dir: Folder of Chinese texts, which has text/*.txt.
        model_name_or_path: Folder of the model; empty: the default model.
        bits: Of a quantized weight.
        group_size: Inputs that share a scale.
        desc_act: Sort all inputs by size before they are grouped.
        sym: Put the zero in the middle of the codes.
        texts: To calibrate on; as many others are evaluated on.
        max_length: Tokens of each.
        repeats: Runs of each, taking turns; the table has their medians and spread.
        threads: Of the CPU.
    """
    check_file("peer", peer)
    peer = os.path.abspath(peer)
    if not (novels := sorted(Path(data_dir, "text").glob("*.txt"))):
        raise BadInput(f"--data_dir={data_dir} has no text/*.txt")
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "",
                                "GPTQMODEL_CPU_WORKERS": str(max(2, threads))}  # it starts with no fewer
    model = model_name_or_path or subprocess.run([sys.executable, "scripts/default_model.py"], cwd=ROOT, env=environment, capture_output=True,
                                                 text=True, check=True).stdout.strip()
    import torch
    from transformers import AutoTokenizer

    import generate

    torch.set_num_threads(threads)
    load_model = lambda folder: generate.load_model(folder, precision="fp32")[0]
    with tempfile.TemporaryDirectory() as work:
        work, tokenizer = Path(work), AutoTokenizer.from_pretrained(model)
        kinds = {"Chinese": [file.read_text("utf-8") for file in novels], "English": [english()]}
        rows = {kind: [row for text in those for row in cut(tokenizer, text, 2 * texts // len(those) + 1, max_length)] for kind, those in kinds.items()}
        calibration = [row for those in rows.values() for row in those[0::2][: texts // 2]]
        held_out = {kind: those[1::2][: texts // 2] for kind, those in rows.items()}
        (work / "ids.json").write_text(json.dumps(calibration))
        (work / "texts.jsonl").write_text("".join(json.dumps({"text": tokenizer.decode(row)}) + "\n" for row in calibration), "utf-8")
        (work / "one.jsonl").write_text(json.dumps({"text": tokenizer.decode(held_out["Chinese"][0])}), "utf-8")
        about = [str(bits), str(group_size), str(sym), str(desc_act)]
        commands = {
            "quantize_gptq.py": lambda out: [sys.executable, ROOT / "quantize_gptq.py", "--model_name_or_path", model, "--output_dir", out, "--calibration_path",
                                             work / "texts.jsonl", "--eval_path", work / "one.jsonl", "--max_length", str(max_length + 8), "--calibration_size",
                                             str(texts), "--bits", about[0], "--group_size", about[1], "--sym", about[2], "--desc_act", about[3]],
            "gptqmodel": lambda out: [peer, "-c", PEER, model, out, *about, work / "ids.json"],
        }
        seconds, memory, perplexity = ({name: [] for name in commands} for _ in range(3))
        for run in range(repeats):
            for name, command in commands.items():
                out = str(work / f"{name}-{run}")
                took, peak = measure(command(out), environment, work / "log")
                seconds[name].append(took)
                memory[name].append(peak)
                print(f"{name}: {took:.1f} s, {peak / 1e9:.2f} GB", file=sys.stderr)
                if run == 0:
                    perplexity[name] = {kind: evaluate(load_model(out), those) for kind, those in held_out.items()}
        original = {kind: evaluate(load_model(model), those) for kind, those in held_out.items()}
        rounded = {kind: evaluate(round_model(load_model(model), bits, group_size, sym), those) for kind, those in held_out.items()}
        print(f"\n| way | seconds, median | spread | peak memory | {' | '.join(f'perplexity, {kind}' for kind in held_out)} |\n|---|---|---|---|---|---|")
        for name, figures in (("original", original), ("plain rounding", rounded), *perplexity.items()):
            took = f"{statistics.median(seconds[name]):.1f} | {min(seconds[name]):.1f} to {max(seconds[name]):.1f} | {max(memory[name]) / 1e9:.2f} GB" \
                if name in seconds else "| |"
            print(f"| {name} | {took} | {' | '.join(f'{value:.3f}' for value in figures.values())} |")
        ours, theirs = (statistics.median(values) for values in seconds.values())
        print(f"\n{theirs / ours:.2f} times as fast")
        for unit, values in (("seconds", seconds), ("peak memory, GB", {name: [peak / 1e9 for peak in peaks] for name, peaks in memory.items()}),
                             *((f"perplexity, {kind}", {name: [figures[kind]] for name, figures in perplexity.items()}) for kind in held_out)):
            add(f"quantize_gptq.py, {bits} bit, groups of {group_size}", unit, values["quantize_gptq.py"], "gptqmodel", values["gptqmodel"])
        ids = torch.tensor([held_out["Chinese"][0]])
        torch.save(ids, work / "ids.pt")
        mine = str(work / "quantize_gptq.py-0")
        subprocess.run([peer, "-c", READER, mine, work / "ids.pt", work / "logits.pt"], cwd=work, env=environment, capture_output=True, check=True)
        weights, logits = torch.load(work / "logits.pt")
        exact, half = load_model(mine), load_model(mine)
        for parameter in half.parameters():  # and not what is computed, as rotary frequencies
            parameter.data = parameter.data.half()
        furthest = max(float((exact.get_submodule(name).weight - matrix).abs().max() / matrix.abs().max()) for name, matrix in weights.items())
        with torch.inference_mode():
            exact, half = exact(ids).logits, half(ids).logits.float()
        print(f"our folder read by gptqmodel in fp16: {len(weights)} matrices differ from ours by {furthest:.2g} of their greatest number at most (fp16 rounds by "
              f"4.9e-4); logits by {(half - logits).abs().mean():.2g} on average from ours in fp16, which differ by {(half - exact).abs().mean():.2g} from fp32")


def english() -> str:
    """Text that every Python has: its manual."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def cut(tokenizer, text: str, count: int, length: int) -> list[list[int]]:
    """`count` pieces of `length` tokens from all over a text."""
    span = len(text) // count
    return [tokenizer(text[i * span : i * span + 6 * length], add_special_tokens=False).input_ids[:length] for i in range(count)]


def measure(command: list, environment: dict, log: Path) -> tuple[float, int]:
    """(seconds, peak resident bytes) of a process. A small one starts it: Linux counts what the starting one holds at the fork."""
    starter = ("import os, subprocess, sys; _, status, usage = os.wait4(subprocess.Popen(sys.argv[2:]).pid, 0); "
               "open(sys.argv[1], 'w').write(str(usage.ru_maxrss)); sys.exit(status != 0)")
    before, peak = time.monotonic(), log.with_name("peak")
    with open(log, "wb") as stream:
        failed = subprocess.call([sys.executable, "-c", starter, peak, *map(str, command)], cwd=log.parent, env=environment, stdout=stream, stderr=stream)
    if failed:
        raise BadInput(f"{command[0]} failed:\n{log.read_text('utf-8', 'replace')[-2000:]}")
    return time.monotonic() - before, int(peak.read_text()) * 1024


def evaluate(model, rows: list[list[int]]) -> float:
    """Perplexity of a model on rows of ids."""
    import torch

    with torch.inference_mode():
        losses = [torch.nn.functional.cross_entropy(model(torch.tensor([row])).logits[0, :-1], torch.tensor(row[1:])) for row in rows]
    return math.exp(sum(map(float, losses)) / len(losses))


def round_model(model, bits: int, group_size: int, sym: bool):
    """The model with the layers that GPTQ quantizes rounded to the nearest code."""
    import torch

    from quantize_gptq import round_to_nearest

    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings():
                module.weight.copy_(round_to_nearest(module.weight, dict(bits=bits, group_size=group_size, sym=sym)))
    return model


if __name__ == "__main__":
    cli(main)
