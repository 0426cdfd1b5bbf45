"""Cleaning and near de-duplication against datatrove and datasketch, which pairs each of them finds, and the memory by size.

    python -m venv peer && peer/bin/pip install "datatrove==0.10.1" "xxhash<4" "datasketch==2.0.0" tokenizers regex orjson
    python benchmarks/corpus.py --peer peer/bin/python --data_dir ../shared/data                       # about 10 minutes on two CPU threads
    python benchmarks/corpus.py --peer peer/bin/python --data_dir ../shared/data --sizes 250,500,1000  # and the memory, 15 minutes and 4 GB of disk more
    python benchmarks/corpus.py --data_dir ../shared/data --pretrain True                              # does cleaning pay? a quarter of an hour on two

The texts are parts of some 880 characters of text/*.txt, in their order, with planted near duplicates: copies with a share of their
characters replaced. All take 5-character shingles (ours: 5 units), 112 hashes, 14 bands of 8. datatrove gets a tokenizer that gives
characters, since it has none that Chinese could be compared by without jieba; datasketch gets a set of 5-character strings. Each runs
in a process of its own, with two of its children where it takes more than one, in turns. As the machine may have other work, processor
seconds (user and system, children with them) are given beside the seconds on the clock.

--pretrain makes the texts as dirty as a crawl (`crawl` says how), cleans them with the default flags, and trains the default model for as many tokens on
either: bits per character of texts that are in neither, and like none that is.
"""
import json
import os
import random
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # not this folder
from benchmarks.report import add
from utils import BadInput, check_file, cli

DATATROVE = """
import sys
from datatrove.executor import LocalPipelineExecutor as Run
from datatrove.pipeline.dedup import MinhashConfig, MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupFilter, MinhashDedupSignature
from datatrove.pipeline.filters import FineWebQualityFilter, GopherQualityFilter, GopherRepetitionFilter
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter
from datatrove.utils.hashing import HashConfig
from datatrove.utils.word_tokenizers import WordTokenizer
from loguru import logger

class Characters(WordTokenizer):
    def word_tokenize(self, text): return [letter for letter in text if not letter.isspace()]
    def sent_tokenize(self, text): return [text]
    def span_tokenize(self, text): return [(0, len(text))]

if __name__ == "__main__":
    logger.remove()
    source, out, filters = sys.argv[1:]
    characters, config = Characters(), MinhashConfig(n_grams=5, num_buckets=14, hashes_per_bucket=8, hash_config=HashConfig(precision=64))
    run = lambda pipeline, tasks, name: Run(pipeline, tasks=tasks, workers=2, logging_dir=f"{out}/logs/{name}", start_method="fork").run()
    if filters == "True":  # with limits that no text breaks, so that every filter sees every text
        loose = dict(dup_line_frac=1, dup_para_frac=1, dup_line_char_frac=1, dup_para_char_frac=1, top_n_grams=((2, 1), (3, 1), (4, 1)), dup_n_grams=tuple((n, 1) for n in range(5, 11)))
        run([JsonlReader(source), GopherRepetitionFilter(language=characters, **loose), GopherQualityFilter(
                language=characters, min_doc_words=1, max_doc_words=10**9, min_avg_word_length=0, max_avg_word_length=99, max_symbol_word_ratio=9, max_bullet_lines_ratio=1,
                max_ellipsis_lines_ratio=1, max_non_alpha_words_ratio=0, min_stop_words=0),
             FineWebQualityFilter(language=characters, line_punct_thr=0, short_line_thr=1, char_duplicates_ratio=1, new_line_ratio=9), JsonlWriter(f"{out}/filtered", compression=None)], 2, "filters")
        source = f"{out}/filtered"
    run([JsonlReader(source), MinhashDedupSignature(f"{out}/signatures", config, language=characters)], 2, "signatures")
    run([MinhashDedupBuckets(f"{out}/signatures", f"{out}/buckets", config=config)], 14, "buckets")
    run([MinhashDedupCluster(f"{out}/buckets", f"{out}/remove", config=config)], 1, "cluster")
    run([JsonlReader(source), MinhashDedupFilter(f"{out}/remove"), JsonlWriter(f"{out}/kept", compression=None)], 2, "filter")
"""
DATASKETCH = """
import glob, json, sys
from concurrent.futures import ProcessPoolExecutor
from datasketch import MinHash, MinHashLSH

def sketch(line):
    text = "".join(letter for letter in json.loads(line)["text"].lower() if letter.isalnum())
    one = MinHash(num_perm=112)
    one.update_batch([gram.encode() for gram in {text[i : i + 5] for i in range(len(text) - 4)}])
    return one

if __name__ == "__main__":
    source, out, _ = sys.argv[1:]
    lines = [line for file in sorted(glob.glob(source + "/*.jsonl")) for line in open(file, encoding="utf-8")]
    lsh = MinHashLSH(num_perm=112, params=(14, 8))
    with ProcessPoolExecutor(2) as pool, open(out + "/kept.jsonl", "w", encoding="utf-8") as kept:
        for i, one in enumerate(pool.map(sketch, lines, chunksize=100)):
            if not lsh.query(one):
                lsh.insert(i, one)
                kept.write(lines[i])
"""


def main(
    *,
    peer: str | None = None,
    data_dir: str,
    megabytes: int = 30,
    rules: bool = True,
    sizes: str = "",
    repeats: int = 3,
    pretrain: bool = False,
    steps: int = 120,
    seed: int = 0,
):
    """Print tables of speed, of pairs found, and of memory, or what cleaning does for pretraining.

    Args:
        peer: The Python of an environment that has datatrove and datasketch.
        data_dir: Folder of Chinese texts, which has text/*.txt.
        megabytes: Of text that is cleaned, a sixth of it planted near duplicates; beyond what data_dir has, its sentences are shuffled.
        rules: Measure rules and duplicates together as well, not near duplicates alone.
        sizes: Megabytes of corpora to measure the memory with, with commas, as 250,500,1000; empty: none.
        repeats: Runs of each, taking turns; the tables have their medians and spread. 0: only the memory.
        pretrain: Train on raw and on cleaned text instead.
        steps: Of that, with 512 tokens each.
        seed: Of the texts' order and of what is planted.
    """
    if not (files := sorted(Path(data_dir, "text").glob("*.txt"))):
        raise BadInput(f"--data_dir={data_dir} has no text/*.txt")
    if not peer and repeats and not pretrain:
        raise BadInput("--peer is missing: the Python of an environment with datatrove and datasketch (the first lines of this file say how to make one)")
    if peer:
        check_file("peer", peer)
        peer = os.path.abspath(peer)
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        if pretrain:
            judge_pretraining(files, work, steps, seed)
            return
        texts, pairs = plant(files, megabytes * 1e6, seed)
        (work / "in").mkdir()
        for half in range(2):  # datatrove gives a process whole files
            (work / "in" / f"{half}.jsonl").write_text("".join(json.dumps({"id": f"t{i}", "text": text}, ensure_ascii=False) + "\n" for i, text in enumerate(texts)
                                                               if i * 2 // len(texts) == half), "utf-8")
        size = sum(len(text.encode()) for text in texts) / 1e6
        print(f"{len(texts):,} texts, {size:.1f} MB, {len(pairs):,} of them planted", file=sys.stderr)
        ours = lambda steps: lambda out: [sys.executable, ROOT / "clean_corpus.py", "--data_path", work / "in", "--output_dir", out, "--steps", steps, "--workers", "2"]
        theirs = lambda source, filters: lambda out: [peer, "-c", source, work / "in", out, filters]
        commands = {"near duplicates": {"clean_corpus.py": ours("near"), "datatrove": theirs(DATATROVE, "False"), "datasketch": theirs(DATASKETCH, "False")},
                    "rules and duplicates": {"clean_corpus.py": ours("normalize,rules,exact,near"), "datatrove": theirs(DATATROVE, "True")}}
        if not rules:
            del commands["rules and duplicates"]
        clock, processor, kept = {}, {}, {}
        for run in range(repeats):
            for what, ways in commands.items():
                for name, command in ways.items():
                    out = work / f"{what} {name} {run}"
                    (out if name != "clean_corpus.py" else work).mkdir(exist_ok=True)
                    took, spent, _ = measure(command(out), work / "log")
                    clock.setdefault((what, name), []).append(took)
                    processor.setdefault((what, name), []).append(spent)
                    print(f"{what}, {name}: {took:.1f} s, {spent:.1f} processor seconds", file=sys.stderr)
                    if what == "near duplicates" and run == 0:
                        found = [json.loads(line) for file in sorted({*out.glob("kept*.jsonl"), *out.glob("kept/*.jsonl")}) for line in open(file, encoding="utf-8")]
                        kept[name] = {int(row["id"][1:]) for row in found}
        print("\n| what | with | MB/s on the clock | MB per processor second | ours is faster by (processor) |\n|---|---|---|---|---|")
        for (what, name), spent in processor.items():
            speeds, per_second = ([size / value for value in values] for values in (clock[what, name], spent))
            factor = statistics.median(spent) / statistics.median(processor[what, "clean_corpus.py"])
            print(f"| {what} | {name} | {spread(speeds)} | {spread(per_second)} | {factor:.1f} |")
            if name != "clean_corpus.py":
                add(f"clean_corpus.py, {what}", "MB per processor second", [size / value for value in processor[what, "clean_corpus.py"]], name, per_second)
        if kept:
            judge_pairs(texts, pairs, kept)
        if sizes:
            judge_memory([int(value) for value in sizes.split(",")], files, work, seed)


def parts_of(files: list[Path], generator: random.Random) -> list[str]:
    """Whole lines of some 880 characters together, in random order."""
    texts = []
    for file in files:
        part = ""
        for line in file.read_text("utf-8").splitlines():
            part += line + "\n"
            if len(part) >= 880:
                texts.append(part)
                part = ""
    generator.shuffle(texts)
    return texts


def plant(files: list[Path], size: float, seed: int) -> tuple[list[str], list[tuple[int, int]]]:
    """(texts, pairs of an original and its planted copy): parts of some 880 characters, a fifth of them copied with characters replaced."""
    generator = random.Random(seed)
    texts = parts_of(files, generator)
    sentences = [part for text in texts for part in re.findall(r"[^。！？\n]+[。！？\n]?", text) if part.strip()]
    missing = size / 1.2 - sum(len(text.encode()) for text in texts)
    while missing > 0:
        texts.append("")
        while len(texts[-1]) < 880:
            texts[-1] += generator.choice(sentences)
        missing -= len(texts[-1].encode())
    letters, total, chosen = [letter for text in texts[:100] for letter in text if letter.isalnum()], 0, []
    for text in texts:
        total += 1.2 * len(text.encode())
        if total > size:
            break
        chosen.append(text)
    originals, copies = generator.sample(range(len(chosen)), len(chosen) // 5), []
    for i in originals:
        copy = list(chosen[i])
        for place in generator.sample(range(len(copy)), int(len(copy) * generator.choice((0.002, 0.01, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1)))):
            copy[place] = generator.choice(letters)
        copies.append("".join(copy))
    order = [*range(len(chosen) + len(copies))]
    generator.shuffle(order)
    place, texts = {old: new for new, old in enumerate(order)}, chosen + copies
    return [texts[old] for old in order], [(place[i], place[len(chosen) + j]) for j, i in enumerate(originals)]


def shingles(text: str) -> set[str]:
    """Of five letters and digits in a row, as a judge of all three."""
    text = re.sub(r"[\W_]", "", text.lower())
    return {text[i : i + 5] for i in range(len(text) - 4)}


def jaccard(a: str, b: str) -> float:
    a, b = shingles(a), shingles(b)
    return len(a & b) / max(1, len(a | b))


def judge_pairs(texts: list[str], pairs: list[tuple[int, int]], kept: dict[str, set[int]]) -> None:
    """Print by Jaccard index the share of planted pairs of which one text went; and the texts that went although none like them is left."""
    bins = [0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1.01]
    of_bin = Counter()
    found = {name: Counter() for name in kept}
    for a, b in pairs:
        place = sum(jaccard(texts[a], texts[b]) >= edge for edge in bins)
        of_bin[place] += 1
        for name in kept:
            found[name][place] += not (a in kept[name] and b in kept[name])
    names = [f"{low:.1f} to {high:.1f}" for low, high in zip([0, *bins], [*bins[:-1], 1.0])]
    print(f"\n| Jaccard index of a planted pair | pairs | {' | '.join(kept)} |\n|---|---|{'---|' * len(kept)}")
    for place, name in enumerate(names):
        if of_bin[place]:
            print(f"| {name} | {of_bin[place]} | {' | '.join(f'{found[way][place] / of_bin[place]:.2f}' for way in kept)} |")
    rare = {}  # one in eight shingles tells which texts may be alike
    for i, text in enumerate(texts):
        for gram in shingles(text):
            if hash(gram) % 8 == 0:
                rare.setdefault(gram, []).append(i)
    nearest = {}
    for i in set(range(len(texts))) - set.intersection(*kept.values()):
        others = Counter(other for gram in shingles(texts[i]) if hash(gram) % 8 == 0 and len(rare[gram]) < 200 for other in rare[gram] if other != i)
        nearest[i] = [(other, jaccard(texts[i], texts[other])) for other, _ in others.most_common(20)]
    print("\n| | texts dropped | like one that is left (0.7) | like none that is left |\n|---|---|---|---|")
    for name, left in kept.items():
        dropped = [i for i in range(len(texts)) if i not in left]
        right = sum(any(other in left and index >= 0.7 for other, index in nearest[i]) for i in dropped)
        print(f"| {name} | {len(dropped)} | {right} ({right / max(1, len(dropped)):.1%}) | {len(dropped) - right} |")


def judge_memory(sizes: list[int], files: list[Path], work: Path, seed: int) -> None:
    """Print peak memory and time of the whole pipeline on corpora made by shuffling sentences, and draw them."""
    generator = random.Random(seed)
    sentences = [part for file in files for part in re.findall(r"[^。！？\n]+[。！？\n]?", file.read_text("utf-8")) if part.strip()]
    found = []
    print("\n| corpus | texts | peak memory of all processes | processor seconds | on the clock |\n|---|---|---|---|---|")
    for size in sizes:
        written, count = 0, 0
        with open(work / "corpus.jsonl", "w", encoding="utf-8") as stream:
            while written < size * 1e6:
                text = ""
                while len(text) < 880:
                    text += generator.choice(sentences)
                written += stream.write(json.dumps({"text": text}, ensure_ascii=False) + "\n") and len(text.encode())
                count += 1
        command = [sys.executable, ROOT / "clean_corpus.py", "--data_path", work / "corpus.jsonl", "--output_dir", work / f"cleaned {size}", "--good_text", files[0], "--workers", "2"]
        took, spent, peak = measure(command, work / "log")
        found.append((size, peak / 1e9))
        print(f"| {size / 1000} GB | {count:,} | {peak / 1e9:.2f} GB | {spent:.0f} | {took:.0f} s |", flush=True)
        subprocess.run(["rm", "-r", work / f"cleaned {size}"], check=True)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(5, 3.5))
    axis.plot([size / 1000 for size, _ in found], [peak for _, peak in found], "o-")
    axis.set(xlabel="corpus, GB of text", ylabel="peak memory, GB", ylim=(0, None), xlim=(0, None), title="clean_corpus.py, two processes")
    figure.tight_layout()
    figure.savefig("corpus_memory.png", dpi=100)


def crawl(texts: list[str], generator: random.Random) -> list[str]:
    """Texts as a crawler meets them: three in ten are copies of few popular ones, with some characters changed; half have lines that only a page
    needs; one in eight is a menu or an advertisement that repeats itself. Mojibake is not among them: training would refuse it."""
    lines = ("版权所有，未经授权不得转载。", "关注我们的公众号，每天都有新内容", "上一篇：昨天的故事", "下一篇：明天的故事", "点击查看全文", "责任编辑：王五", "扫码下载客户端")
    popular, found = generator.sample(texts, max(1, len(texts) // 60)), list(texts)
    for _ in range(len(texts) * 3 // 7):
        copy = list(generator.choice(popular))
        for place in generator.sample(range(len(copy)), generator.choice((0, 0, len(copy) // 100))):
            copy[place] = generator.choice(copy)
        found.append("".join(copy))
    found = [text if generator.random() < 0.5 else "\n".join([generator.choice(lines), text.strip(), *generator.sample(lines, 3)]) for text in found]
    for _ in range(len(found) // 7):
        menu = "\n".join(generator.choices("首页 新闻 图片 视频 论坛 博客 招聘 帮助 登录 注册 更多".split(), k=200))
        found.append(generator.choice((menu, "买面粉送面袋，" * 120)))
    generator.shuffle(found)
    return found


def judge_pretraining(files: list[Path], work: Path, steps: int, seed: int) -> None:
    """Print the bits per character of held-out text, before and after training on raw and on cleaned text."""
    def write(name: str, texts: list[str]) -> Path:
        path = work / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), "utf-8")
        return path

    def run(*command, log: str = "log") -> str:
        with open(work / log, "w+", encoding="utf-8") as log:
            status = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, stdout=log, stderr=log, env=os.environ | {"OMP_WAIT_POLICY": "passive"}).returncode
            log.seek(0)
            said = log.read()
        if status:
            raise BadInput(f"{command[0]} failed:\n{said[-2000:]}")
        return said

    generator = random.Random(seed)
    texts = [text for text in parts_of(files, generator) if len(text) < 1500]
    held_out, corpus = write("held_out", texts[:4]), write("corpus", texts[4:1004])
    run("clean_corpus.py", "--data_path", corpus, "--against", held_out, "--output_dir", work / "unlike", "--steps", "exact,near")
    raw = write("raw", crawl([json.loads(line)["text"] for line in open(work / "unlike" / "kept.jsonl", encoding="utf-8")], generator))
    report = json.loads(run("clean_corpus.py", "--data_path", raw, "--output_dir", work / "cleaned").splitlines()[-1])
    print(f"{report['read']} records, {report['bytes_read'] / 1e6:.2f} MB; cleaned {report['kept']}, {report['bytes_kept'] / 1e6:.2f} MB: {report['reasons']}", flush=True)
    base = run("scripts/default_model.py").splitlines()[-1]

    def train(name: str, path: Path) -> list[str]:
        said = run("pretrain_clm.py", "--model_name_or_path", base, "--data_path", path, "--eval_path", held_out, "--train", "lora", "--lora_r", 32, "--lora_alpha", 64,
                   "--max_length", 512, "--max_steps", steps, "--learning_rate", 1e-3, "--gradient_accumulation_steps", 1, "--gradient_checkpointing", False,
                   "--eval_on_start", path == raw, "--eval_strategy", "steps", "--eval_steps", steps, "--save_steps", steps, "--output_dir", work / f"on {name}", log=f"{name}.log")
        return re.findall(r"'eval_bits_per_character': '?([\d.]+)", said)

    with ThreadPoolExecutor(2) as pool:
        on_raw, on_cleaned = pool.map(train, ("raw", "cleaned"), (raw, work / "cleaned" / "kept.jsonl"))
    print(f"\n| trained on {steps * 512:,} tokens of | bits per character of 4 other texts |\n|---|---|")
    print(f"| nothing | {on_raw[0]} |\n| raw text | {on_raw[-1]} |\n| cleaned text | {on_cleaned[-1]} |")


def measure(command: list, log: Path) -> tuple[float, float, int]:
    """(seconds, processor seconds, peak of the memory, shared pages counted once) of a process and all that it starts."""
    before, started, peak, ended = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic(), [0], threading.Event()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with open(log, "wb") as stream:
        process = subprocess.Popen(list(map(str, command)), cwd=log.parent, env=environment, stdout=stream, stderr=stream, start_new_session=True)

    def watch():
        while not ended.wait(0.25):
            total = 0
            for folder in Path("/proc").glob("[0-9]*"):
                try:
                    if os.getsid(int(folder.name)) == process.pid:
                        total += int(re.search(r"^Pss:\s+(\d+)", (folder / "smaps_rollup").read_text(), re.M)[1]) * 1024
                except (OSError, TypeError):
                    pass  # it has ended
            peak[0] = max(peak[0], total)

    watcher = threading.Thread(target=watch)
    watcher.start()
    status = process.wait()
    took = time.monotonic() - started
    ended.set()
    watcher.join()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if status:
        raise BadInput(f"{command[0]} failed:\n{log.read_text('utf-8', 'replace')[-2000:]}")
    return took, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, peak[0]


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    cli(main)
