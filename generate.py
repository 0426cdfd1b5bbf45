"""Talk to a model: one prompt, a file of them, a chat in the terminal or in the browser.

Reads   a model folder, and an adapter from finetune_lora.py if there is one
Writes  answers to the terminal, to output_file or to a web page

    python generate.py --model_name_or_path M                                             # chat
    python generate.py --model_name_or_path M --lora_path A --prompt '你好'                # one answer
    python generate.py --model_name_or_path M --input_file in.jsonl --output_file out.jsonl
    python generate.py --model_name_or_path M --lora_path A,B --web True                  # a page, to compare them on

The prompt is the one the model was trained with: template and stop tokens come with the model or adapter.
"""
import bisect
import json
import os
import queue
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Literal

from terminal import chat_in_terminal
from utils import BadInput, Chat, check_adapter, check_file, check_model, check_positive, cli, prompt_messages, read_rows
from web import check_page, name_choices, serve_page


def main(
    *,
    # model
    model_name_or_path: str,
    lora_path: str | None = None,
    template: str = "auto",
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    bits: Literal[16, 8, 4] = 16,
    load_in_8bit: bool = False,
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto",
    # what to answer
    prompt: str | None = None,
    system: str | None = None,
    input_file: str | None = None,
    output_file: str | None = None,
    per_device_eval_batch_size: int = 8,
    # the page
    web: bool = False,
    server_name: str = "127.0.0.1",
    server_port: int = 7860,
    auth: str | None = None,
    share: bool = False,
    # how
    max_new_tokens: int = 512,
    temperature: float = 0.7,
    top_p: float = 0.9,
    top_k: int = 50,
    repetition_penalty: float = 1.0,
    seed: int = 42,
):
    """Answer a prompt, a file of prompts, or a person in the terminal or, with --web True, in the browser; lora_path then takes several folders with commas.

    Args:
        model_name_or_path: Folder or hub name of the base model.
        lora_path: Folder of an adapter for this base.
        template: Prompt format: auto (the model's own), alpaca, vicuna_chat, yayi, chatml, ziya, llama2_chinese, llama2 or plain.
        trust_remote_code: Run Python code that comes with the model.
        allow_pickle: Load weights that are pickles, which can run code.
        bits: Of the base model's weights: 16 as they are, 8 (int8) or 4 (NF4).
        load_in_8bit: Another name for --bits 8.
        precision: Arithmetic: auto (bf16 where the GPU has it, else fp16; fp32 on a CPU), bf16, fp16 or fp32.
        prompt: One question to answer.
        system: System text of the prompt or of the chat.
        input_file: Records or {"prompt": ...} lines to answer.
        output_file: Where their lines go, each with its answer added; a run that was killed goes on where it was.
        per_device_eval_batch_size: Prompts of input_file that are answered together.
        web: Serve a chat page; several adapters can be chosen from and compared there.
        server_name: Address that the page listens on; another than this machine's own needs auth.
        server_port: Port of the page.
        auth: Who may use the page, as user:password.
        share: Open the page to the internet too, through a tunnel of Gradio's; needs auth.
        max_new_tokens: Longest answer, in tokens.
        temperature: 0 takes the likeliest token each time; higher is more varied.
        top_p: Sample among the likeliest tokens that together have this probability.
        top_k: Sample among this many likeliest tokens; 0 among all.
        repetition_penalty: Above 1 makes tokens that were said already less likely.
        seed: Of everything random.
    """
    check_model(model_name_or_path, allow_pickle, quantized=True)
    check_file("input_file", input_file)
    if bool(input_file) != bool(output_file):
        raise BadInput("--input_file and --output_file go together")
    adapters = [folder.strip() for folder in (lora_path or "").split(",") if folder.strip()]
    for folder in adapters:
        check_adapter(folder)
    check_positive(per_device_eval_batch_size=per_device_eval_batch_size, max_new_tokens=max_new_tokens, repetition_penalty=repetition_penalty)
    if temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise BadInput(f"--temperature={temperature} --top_k={top_k} --top_p={top_p}: the first two are at least 0, top_p is above 0 and at most 1")
    if load_in_8bit and bits == 4:
        raise BadInput("--load_in_8bit True and --bits 4: give one of them")
    if web and (prompt or input_file):
        raise BadInput("--web True answers on the page: leave out --prompt and --input_file")
    if web:
        check_page(server_name, server_port, auth, share)
    elif len(adapters) > 1:
        raise BadInput(f"--lora_path={lora_path}: several adapters are for the page, add --web True; here give one")
    settings = dict(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k, repetition_penalty=repetition_penalty)
    facts = settings | dict(model_name_or_path=model_name_or_path, lora_path=lora_path, template=template, bits=bits, system=system, seed=seed,
                            per_device_eval_batch_size=per_device_eval_batch_size)
    rows, lines = unanswered(input_file, output_file, facts) if input_file else ([], [])
    if input_file and len(lines) == len(rows):
        return print(f"all {len(rows)} records are answered in {output_file} already", file=sys.stderr)

    # ---- load ----
    import torch

    from models import load_choices

    folders = name_choices(adapters) if web else {"": adapters[0] if adapters else None}
    model, choices = load_choices(model_name_or_path, folders, template, 8 if load_in_8bit else bits, precision, trust_remote_code, allow_pickle)
    chat = next(chat for chat, _ in choices.values())
    torch.manual_seed(seed)

    # ---- answer ----
    if web:
        return serve_page(model, choices, settings, system, server_name, server_port, auth, share)
    start = [{"role": "system", "content": system}] if system else []
    if input_file:
        answer_file(model, chat, rows, lines, output_file, start, per_device_eval_batch_size, seed, settings)
    elif prompt is not None:
        for piece in stream(model, chat, fit(model, chat, start + [{"role": "user", "content": prompt}], max_new_tokens), **settings):
            print(piece, end="", flush=True)
        print()
    else:
        chat_in_terminal(model, chat, start, settings)


def load(model_name_or_path, lora_path=None, template="auto", bits=16, precision="auto", trust_remote_code=False, allow_pickle=False):
    """(model, Chat) ready to generate: the tokenizer and template of the adapter if it brings its own, else of the base."""
    from models import load_choices

    model, choices = load_choices(model_name_or_path, {"": lora_path}, template, bits, precision, trust_remote_code, allow_pickle)
    return model, choices[""][0]


def generation_arguments(model, chat, max_new_tokens, temperature, top_p, top_k, repetition_penalty) -> dict:
    """What model.generate takes; temperature 0 is greedy."""
    sampling = dict(do_sample=False, temperature=None, top_p=None, top_k=None)
    if temperature > 0:
        sampling = dict(do_sample=True, temperature=temperature, top_p=top_p, top_k=top_k)
    rows = model.get_input_embeddings().weight.shape[0]
    if rows > len(chat.tokenizer):  # padding, or tokens that another adapter added
        sampling["suppress_tokens"] = list(range(len(chat.tokenizer), rows))
    return sampling | dict(max_new_tokens=max_new_tokens, repetition_penalty=repetition_penalty, eos_token_id=chat.stop_ids, pad_token_id=chat.stop_ids[0])


def stream(model, chat: Chat, messages: list[dict], **settings):
    """Yield the answer to a conversation piece by piece, never half a character; closing the generator stops the model."""
    import torch
    from tokenizers.decoders import DecodeStream
    from transformers import StoppingCriteria, StoppingCriteriaList
    from transformers.generation.streamers import BaseStreamer

    ids = torch.tensor([[i for piece, _ in chat.encode(messages, add_generation_prompt=True) for i in piece]], device=model.device)
    tokens, closed = queue.Queue(), threading.Event()

    class Tokens(BaseStreamer):
        prompt = True

        def put(self, value):
            if not self.prompt:
                tokens.put(int(value))
            self.prompt = False

        def end(self):
            pass

    class Closed(StoppingCriteria):
        def __call__(self, input_ids, scores, **_):
            return torch.full((len(input_ids),), closed.is_set(), device=input_ids.device)

    def run():
        try:
            with torch.inference_mode():
                model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), streamer=Tokens(), stopping_criteria=StoppingCriteriaList([Closed()]),
                               **generation_arguments(model, chat, **settings))
            tokens.put(None)
        except BaseException as problem:  # out of memory, say: raised again where the answer is read
            tokens.put(problem)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    decoder, held = DecodeStream(skip_special_tokens=True), ""
    try:
        while (token := tokens.get()) is not None:
            if isinstance(token, BaseException):
                raise token
            held += decoder.step(chat.tokenizer.backend_tokenizer, token) or ""
            ready = held.rstrip()  # the line break that a template writes before its stop token is no part of the answer
            yield held[: len(ready)]  # may be nothing, so that who reads can stop at any token
            held = held[len(ready):]
    finally:
        closed.set()
        thread.join()


def fit(model, chat: Chat, messages: list[dict], max_new_tokens: int) -> list[dict]:
    """The conversation, or as many of its last rounds as leave room for the answer; says so when it drops some."""
    context = getattr(model.config, "max_position_embeddings", None) or sys.maxsize
    system, rounds = messages[: messages[0]["role"] == "system"], messages[messages[0]["role"] == "system":]
    starts = [i for i, message in enumerate(rounds) if message["role"] == "user"]
    if not starts:
        raise BadInput("the conversation asks nothing: it has no user's turn")
    length = lambda start: sum(len(ids) for ids, _ in chat.encode(system + rounds[start:], add_generation_prompt=True))
    fits = lambda start: length(start) + max_new_tokens <= context
    dropped = 0 if fits(starts[0]) else bisect.bisect_left(starts, True, key=fits)  # the fewer rounds, the shorter
    if dropped == len(starts):
        raise BadInput(f"the prompt has {length(starts[-1])} tokens; with --max_new_tokens {max_new_tokens} that is more than the model's context of {context}")
    if dropped:
        print(f"[the context of {context} tokens is full: the first {dropped} rounds are no longer read]", file=sys.stderr)
    return system + rounds[starts[dropped]:]


def answer_batch(model, chat: Chat, conversations: list[list[dict]], **settings) -> list[str]:
    """Answers to several conversations at once."""
    import torch

    prompts = [[i for piece, _ in chat.encode(messages, add_generation_prompt=True) for i in piece] for messages in conversations]
    width = max(map(len, prompts))
    ids = torch.tensor([[chat.stop_ids[0]] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)  # (B, width), padded left
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    with torch.inference_mode():
        rows = model.generate(input_ids=ids, attention_mask=mask, **generation_arguments(model, chat, **settings))[:, width:].tolist()
    texts = (chat.tokenizer.decode(row, skip_special_tokens=True, clean_up_tokenization_spaces=False) for row in rows)
    return [text.rstrip().rstrip("\ufffd") for text in texts]  # max_new_tokens may end in the middle of a character


def unanswered(input_file: str, output_file: str, facts: dict) -> tuple[list[dict], list[bytes]]:
    """(rows of input_file, whole lines of output_file); BadInput if those lines do not answer these rows, or were begun with other facts.

    The facts are noted in output_file.run.json, for a run that goes on.
    """
    rows = list(read_rows(input_file, Counter()))
    lines = Path(output_file).read_bytes().split(b"\n")[:-1] if Path(output_file).is_file() else []  # what has no line end was cut off
    for number, line in enumerate(lines):
        try:
            answered = json.loads(line)
        except ValueError:
            answered = None
        if number >= len(rows) or not isinstance(answered, dict) or answered | {"answer": ""} != rows[number] | {"answer": ""}:
            raise BadInput(f"{output_file}, line {number + 1} does not answer record {number} of {input_file}: give another --output_file")
    for number, row in enumerate(rows):
        try:
            prompt_messages(row)
        except BadInput as problem:
            raise BadInput(f"{input_file}, record {number}: {problem}") from None
    about = Path(f"{output_file}.run.json")
    before = json.loads(about.read_text("utf-8")) if lines and about.is_file() else facts
    if changed := [name for name in facts if before.get(name) != facts[name]]:
        name = changed[0]
        raise BadInput(f"{output_file} was begun with {name} = {before.get(name)}, now it is {facts[name]}: give the same, or another --output_file")
    about.write_text(json.dumps(facts, ensure_ascii=False), "utf-8")
    return rows, lines


def answer_file(model, chat: Chat, rows: list[dict], lines: list[bytes], output_file: str, start: list[dict], batch_size: int,
                seed: int, settings: dict) -> None:
    """Answer the rows into output_file, in order, after the lines that are there already.

    Each batch has a seed of its own, so that a run that goes on gives the answers of an unbroken one.
    """
    import torch
    from tqdm import tqdm

    begin = len(lines) // batch_size * batch_size  # a batch that was cut off is answered again
    with open(output_file, "rb+" if lines else "wb") as file:
        file.truncate(sum(len(line) + 1 for line in lines[:begin]))
        file.seek(0, os.SEEK_END)
        for first in tqdm(range(begin, len(rows), batch_size), "answering", unit=" batches", initial=begin // batch_size,
                          total=-(-len(rows) // batch_size)):
            batch, conversations = rows[first : first + batch_size], []
            for row in batch:
                messages = prompt_messages(row)
                messages = messages if messages[0]["role"] == "system" else start + messages
                conversations.append(fit(model, chat, messages, settings["max_new_tokens"]))
            torch.manual_seed(seed + first)
            for row, answer in zip(batch, answer_batch(model, chat, conversations, **settings)):
                file.write((json.dumps(row | {"answer": answer}, ensure_ascii=False) + "\n").encode())
            file.flush()


if __name__ == "__main__":
    cli(main)
