"""One table out of the figures of several benchmarks: each adds its rows to the file that $REPORT names.

    REPORT=figures.jsonl python benchmarks/sft.py && python benchmarks/report.py figures.jsonl
"""
import importlib.metadata
import json
import os
import platform
import statistics
import sys
from pathlib import Path


def add(what: str, unit: str, ours: list[float], peer: str, theirs: list[float]) -> None:
    """Note a figure of ours and a peer's, each measured once or several times."""
    if file := os.environ.get("REPORT"):
        with open(file, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(dict(what=what, unit=unit, ours=ours, peer=peer, theirs=theirs), ensure_ascii=False) + "\n")


def pairwise(ours: list[float], theirs: list[float]) -> list[float]:
    """The ratios of runs that took turns, so that an hour in which the machine was slower tells nothing; else that of the medians."""
    if len(ours) == len(theirs):
        return [mine / other for mine, other in zip(ours, theirs)]
    return [statistics.median(ours) / statistics.median(theirs)]


def machine() -> str:
    """What the figures were measured on."""
    read = lambda file, key: next((line.split(":")[1].strip() for line in open(file) if line.startswith(key)), "?")
    memory = int(read("/proc/meminfo", "MemTotal").split()[0]) / 2**20
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "peft"))
    return f"{read('/proc/cpuinfo', 'model name')}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB; Python {platform.python_version()}, {versions}"


def main(*files: str) -> None:
    show = lambda values, digits=4: f"{statistics.median(values):,.{digits}g}" + f" ({min(values):,.{digits}g} to {max(values):,.{digits}g})" * (len(values) > 1)
    print(f"{machine()}\n\n| figure | unit | ours: median (spread) | peer | theirs: median (spread) | ours / theirs, pair by pair |\n|---|---|---|---|---|---|")
    for row in (json.loads(line) for file in files for line in Path(file).read_text("utf-8").splitlines()):
        print(f"| {row['what']} | {row['unit']} | {show(row['ours'])} | {row['peer']} | {show(row['theirs'])} | {show(pairwise(row['ours'], row['theirs']), 3)} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
