"""Talk to a model: one prompt, a file of them, or a chat in the terminal. webui.py has the same in the browser.

Reads   a model folder, and an adapter from finetune_lora.py if there is one
Writes  answers to the terminal, or to output_file

    python generate.py --model_name_or_path M                                             # chat
    python generate.py --model_name_or_path M --lora_path A --prompt '你好'                # one answer
    python generate.py --model_name_or_path M --input_file in.jsonl --output_file out.jsonl

The prompt is the one the model was trained with: template and stop tokens come with the model or adapter.
"""
import bisect
import importlib.util
import json
import os
import queue
import re
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Literal

from utils import (BadInput, Chat, check_adapter, check_file, check_model, clean_messages, cli, fingerprint, read_json,
                   read_rows, row_turns)

RANGES = dict(max_new_tokens=(1, 2**31 - 1), temperature=(0, 100), top_p=(1e-6, 1), top_k=(0, 2**31 - 1), repetition_penalty=(0.01, 100), seed=(0, 2**32 - 1),
              num_return_sequences=(1, 2**31 - 1), per_device_eval_batch_size=(1, 2**31 - 1))  # beyond, torch fails, or the answer is nonsense
# How a whole line of output_file ends: with a string of JSON, or a list of them, and whether the model ended it
TEXT, SAID = rb'"(?:[^"\\]|\\.)*+"', b"(?:true|false)"
ANSWER = re.compile(rb'(?:%b|\[%b(?:, %b)*+\]), "finished": (?:%b|\[%b(?:, %b)*+\])}' % (*[TEXT] * 3, *[SAID] * 3))


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
    num_return_sequences: int = 1,
    per_device_eval_batch_size: int = 8,
    # how
    max_new_tokens: int = 512,
    temperature: float = 0.7,
    top_p: float = 0.9,
    top_k: int = 50,
    repetition_penalty: float = 1.0,
    seed: int = 42,
):
    """Answer a prompt, a file of prompts, or a person in the terminal.

    Args:
        model_name_or_path: Folder or hub name of the base model.
        lora_path: Folder of an adapter for this base.
        template: Prompt format: auto (the model's own), alpaca, vicuna_chat, yayi, chatml, ziya, llama2_chinese, llama2 or plain.
        trust_remote_code: Run Python code that comes with the model.
        allow_pickle: Load weights that are pickles, which can run code.
        bits: Of the base model's weights: 16 as they are, 8 (int8) or 4 (NF4).
        load_in_8bit: Another name for --bits 8.
        precision: Arithmetic: auto (bf16 where the GPU or CPU computes in it, else fp16 on a GPU and fp32 on a CPU), bf16, fp16 or fp32.
        prompt: One question to answer.
        system: System text of the prompt or of the chat.
        input_file: Records or {"prompt": ...} lines to answer.
        output_file: Where their lines go, each with its answer added, and whether the model ended it; a run that was killed goes on where it was.
        num_return_sequences: Answers to each prompt of input_file; several are sampled apart, for score_records.py to compare.
        per_device_eval_batch_size: Prompts that go through the model together.
        max_new_tokens: Longest answer, in tokens.
        temperature: 0 takes the likeliest token each time; higher is more varied.
        top_p: Sample among the likeliest tokens that together have this probability.
        top_k: Sample among this many likeliest tokens; 0 among all.
        repetition_penalty: Above 1 makes tokens that were said already less likely.
        seed: Of everything random.
    """
    settings = dict(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k, repetition_penalty=repetition_penalty)
    numbers = settings | dict(seed=seed, per_device_eval_batch_size=per_device_eval_batch_size, num_return_sequences=num_return_sequences)
    adapters = check_flags(model_name_or_path, lora_path, allow_pickle, bits, load_in_8bit, numbers)
    if len(adapters) > 1:
        raise BadInput(f"--lora_path={lora_path}: several adapters are for webui.py; here give one")
    check_file("input_file", input_file)
    if bool(input_file) != bool(output_file):
        raise BadInput("--input_file and --output_file go together")
    if num_return_sequences > 1 and (temperature < 1e-5 or not input_file):
        raise BadInput(f"--num_return_sequences={num_return_sequences} " + ("needs a --temperature above 0: greedy answers are all the same" if input_file
                       else "goes with --input_file and --output_file"))
    check_text("--prompt", prompt)
    check_text("--system", system)
    start = [{"role": "system", "content": system}] if system else []
    facts = numbers | dict(model_name_or_path=model_name_or_path, lora_path=lora_path, template=template, bits=bits, system=system)
    asked, lines = read_file(input_file, output_file, start, facts, "answers" if num_return_sequences > 1 else "answer") if input_file else ([], [])
    if input_file and len(lines) == len(asked):
        return print(f"all {len(asked)} records are answered in {output_file} already", file=sys.stderr)

    # ---- load ----
    import torch
    from tqdm import tqdm
    from transformers import AutoConfig

    adapter = adapters[0] if adapters else None
    chat = load_chat(model_name_or_path, adapter, template, trust_remote_code)
    config = load(AutoConfig, model_name_or_path, trust_remote_code=trust_remote_code)
    question = fit(config, chat, start + [{"role": "user", "content": prompt}], max_new_tokens) if prompt is not None else None
    for number, (messages, begun) in enumerate(asked):  # before the weights are read, which may take minutes
        try:
            asked[number] = fit(config, chat, messages, max_new_tokens), begun
        except BadInput as problem:
            raise BadInput(f"{input_file}, record {number}: {problem}") from None
    model, _ = load_model(model_name_or_path, adapter, template, 8 if load_in_8bit else bits, precision, trust_remote_code, allow_pickle, chat)
    torch.manual_seed(seed)

    # ---- answer ----
    if input_file:
        batch_size = per_device_eval_batch_size
        begin = len(lines) // batch_size * batch_size  # a batch that was cut off is answered again
        with open(output_file, "rb+" if lines else "wb") as file:
            file.truncate(sum(len(line) + 1 for line in lines[:begin]))
            file.seek(0, os.SEEK_END)
            for first in tqdm(range(begin, len(asked), batch_size), "answering", unit=" batches"):
                torch.manual_seed(seed + first)  # each batch has its own, so that a run that goes on gives the answers of an unbroken one
                batch, many = asked[first : first + batch_size], num_return_sequences
                answers = answer_batch(model, chat, [messages for messages, _ in batch], many, **settings)
                for i, (_, begun) in enumerate(batch):
                    texts, finished = map(list, zip(*answers[i * many : (i + 1) * many]))
                    texts, finished = (texts, finished) if many > 1 else (texts[0], finished[0])
                    file.write(begun + f'{json.dumps(texts, ensure_ascii=False)}, "finished": {json.dumps(finished)}}}\n'.encode())
                file.flush()
    elif prompt is not None:
        for piece in stream(model, chat, question, **settings):
            print(piece, end="", flush=True)
        print()
    else:
        chat_in_terminal(model, chat, start, settings)


def check_flags(model_name_or_path: str, lora_path: str | None, allow_pickle: bool, bits: int, load_in_8bit: bool, settings: dict) -> list[str]:
    """The folders that lora_path names; BadInput if a flag of the model or of sampling cannot be what it is."""
    check_model(model_name_or_path, allow_pickle, quantized=True)
    adapters = [folder.strip() for folder in (lora_path or "").split(",") if folder.strip()]
    for folder in adapters:
        check_adapter(folder)
    for name, value in settings.items():
        if not RANGES[name][0] <= value <= RANGES[name][1]:  # nan is in no range
            raise BadInput(f"--{name}={value} must be from {RANGES[name][0]} to {RANGES[name][1]}")
    if load_in_8bit and bits == 4:
        raise BadInput("--load_in_8bit True and --bits 4: give one of them")
    return adapters


def check_text(what: str, text: str | None) -> None:
    """BadInput if a text that was typed is not UTF-8: Python makes half a character of such a byte, which no tokenizer takes."""
    if text and re.search("[\ud800-\udfff]", text):
        raise BadInput(f"{what} is not UTF-8, or holds half a character: {text[:40]!r}")


# ---- one answer ----
def prompt_ids(chat: Chat, messages: list[dict]) -> list[int]:
    """What the model reads before it answers."""
    return [i for ids, _ in chat.encode(messages, add_generation_prompt=True) for i in ids]


def fit(config, chat: Chat, messages: list[dict], max_new_tokens: int) -> list[dict]:
    """The conversation, or as many of its last rounds as leave room for the answer in the context of a model with this config; says so when it drops some."""
    context = getattr(config, "max_position_embeddings", None) or sys.maxsize
    system, rounds = messages[: messages[0]["role"] == "system"], messages[messages[0]["role"] == "system":]
    starts = [i for i, message in enumerate(rounds) if message["role"] == "user"]
    if not starts:
        raise BadInput("the conversation asks nothing: it has no user's turn")
    length = lambda start: len(prompt_ids(chat, system + rounds[start:]))
    fits = lambda start: length(start) + max_new_tokens <= context
    dropped = 0 if fits(starts[0]) else bisect.bisect_left(starts, True, key=fits)  # the fewer rounds, the shorter
    if dropped == len(starts):
        raise BadInput(f"the prompt {rounds[-1]['content'][:20]!r} has {length(starts[-1])} tokens; with --max_new_tokens {max_new_tokens} that is more than "
                       f"the model's context of {context}")
    if dropped:
        print(f"[the context of {context} tokens is full: the first {dropped} rounds are no longer read]", file=sys.stderr)
    return system + rounds[starts[dropped]:]


def generation_arguments(model, chat: Chat, max_new_tokens, temperature, top_p, top_k, repetition_penalty) -> dict:
    """What model.generate takes; temperature 0 is greedy, as is one so small that logits divided by it overflow."""
    greedy = dict(do_sample=False, temperature=None, top_p=None, top_k=None)
    sampling = dict(do_sample=True, temperature=temperature, top_p=top_p, top_k=top_k) if temperature >= 1e-5 else greedy
    rows = model.get_input_embeddings().weight.shape[0]
    if rows > len(chat.tokenizer):  # padding, or tokens that another adapter added
        sampling["suppress_tokens"] = list(range(len(chat.tokenizer), rows))
    return sampling | dict(max_new_tokens=max_new_tokens, repetition_penalty=repetition_penalty, eos_token_id=chat.stop_ids, pad_token_id=chat.stop_ids[0])


def text_of(chat: Chat, token_ids):
    """Yield the text of an answer as its tokens come, never half a character, without what its template writes around it.

    llama2_chinese writes "Assistant: {answer}\\n": its blank and line break are no part of the answer, any others are.
    """
    from tokenizers.decoders import DecodeStream

    def decoded(token_ids):  # behind another token, since SentencePiece takes away the blank that a text begins with
        decoder = DecodeStream(ids=chat.tokenizer.encode("。", add_special_tokens=False)[-1:], skip_special_tokens=True)
        return (decoder.step(chat.tokenizer.backend_tokenizer, token) or "" for token in token_ids)

    *_, (sample, _), _ = chat.encode([{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}])
    before, _, behind = (part if part.isspace() else "" for part in "".join(decoded(sample)).partition("!"))
    held = ""
    for piece in decoded(token_ids):
        held += piece
        if piece and before:
            held, before = held.removeprefix(before), ""
        ready = len(held.rstrip())  # what is behind may be the template's
        yield held[:ready]  # may be nothing, so that who reads can stop at any token
        held = held[ready:]
    yield held.removesuffix(behind)


def stream(model, chat: Chat, messages: list[dict], **settings):
    """Yield the answer to a conversation piece by piece; closing the generator stops the model."""
    import torch
    from transformers import StoppingCriteriaList

    prompt = torch.tensor([prompt_ids(chat, messages)], device=model.device)
    tokens, problems, closed = queue.Queue(), [], threading.Event()

    def watch(ids, scores, **_):  # called after every token
        tokens.put(int(ids[0, -1]))
        return torch.full((len(ids),), closed.is_set(), device=ids.device)

    def run():
        try:
            with torch.inference_mode():
                model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), stopping_criteria=StoppingCriteriaList([watch]),
                               **generation_arguments(model, chat, **settings))
        except BaseException as problem:  # out of memory, say: raised again where the answer is read
            problems.append(problem)
        tokens.put(None)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield from text_of(chat, iter(tokens.get, None))
    finally:
        closed.set()
        thread.join()
    if problems:
        raise problems[0]


def answer_batch(model, chat: Chat, conversations: list[list[dict]], num_return_sequences: int = 1, **settings) -> list[tuple[str, bool]]:
    """(answer, did the model end it), num_return_sequences in a row for each of several conversations at once."""
    import torch

    prompts = [prompt_ids(chat, messages) for messages in conversations]
    width = max(map(len, prompts))
    ids = torch.tensor([[chat.stop_ids[0]] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)  # (B, width), padded left
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    with torch.inference_mode():
        rows = model.generate(input_ids=ids, attention_mask=mask, num_return_sequences=num_return_sequences,
                              **generation_arguments(model, chat, **settings))[:, width:].tolist()
    return [("".join(text_of(chat, row)), not set(chat.stop_ids).isdisjoint(row)) for row in rows]


# ---- a file ----
def prompt_messages(row: dict) -> list[dict]:
    """The messages of a record or of {"prompt": ...} up to the last question: what a model is asked for an answer to."""
    if isinstance(row, dict) and isinstance(row.get("prompt"), str):
        row = {"instruction": row["prompt"]} | ({"system": row["system"]} if "system" in row else {})
    messages = clean_messages(row_turns(row, Counter()), False, Counter())
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages or messages[-1]["role"] == "system":
        raise BadInput("it asks nothing")
    return messages


def read_file(input_file: str, output_file: str, start: list[dict], facts: dict, name: str) -> tuple[list[tuple], list[bytes]]:
    """([(conversation, its line in output_file up to the answer, which is called `name`)], whole lines of output_file).

    BadInput if output_file holds what this program did not write for these records, with these facts (in output_file.run.json).
    """
    output, about = Path(output_file).resolve(), Path(f"{output_file}.run.json")
    if not os.access(output.parent, os.W_OK | os.X_OK) or output.exists() and not (output.is_file() and os.access(output, os.R_OK | os.W_OK)):
        raise BadInput(f"--output_file={output_file} is a folder, or in one that does not exist or cannot be written: give the path of a file")
    if output.exists() and output.samefile(input_file):
        raise BadInput(f"--output_file={output_file} is --input_file itself, which would be lost: give another --output_file")
    written, before = output.read_bytes() if output.exists() else b"", read_json(about) if about.exists() else {}
    if written and not before or before and before.keys() != facts.keys():
        raise BadInput(f"{output if written else about} is there already, and not from a run of generate.py that can go on: give another --output_file")
    if written and (changed := [name for name in facts if before[name] != facts[name]]):
        raise BadInput(f"{output_file} was begun with {changed[0]} = {before[changed[0]]}, now it is {facts[changed[0]]}: give the same, or another file")
    asked = []
    for row in read_rows(input_file, Counter()):
        try:
            messages = prompt_messages(row)
            line = json.dumps({key: value for key, value in row.items() if key not in ("answer", "answers", "finished")}, ensure_ascii=False, default=str)
            asked.append((start * (messages[0]["role"] != "system") + messages, f'{line[:-1]}, "{name}": '.encode()))
        except (BadInput, UnicodeEncodeError) as problem:
            raise BadInput(f"{input_file}, record {len(asked)}: {problem}") from None
    *lines, cut = written.split(b"\n")  # what has no line end was cut off
    for number, line in enumerate([*lines, cut] if cut else lines):
        begun = asked[number][1] if number < len(asked) else b"\n"
        if not line.startswith(begun[: len(line)]) or number < len(lines) and not ANSWER.fullmatch(line, len(begun)):
            raise BadInput(f"{output_file}, line {number + 1} does not answer record {number} of {input_file}: give another --output_file")
    if before != facts:
        about.write_text(json.dumps(facts, ensure_ascii=False), "utf-8")
    return asked, lines


# ---- a person ----
def chat_in_terminal(model, chat: Chat, start: list[dict], settings: dict) -> None:
    """/clear forgets the conversation, /undo the last round, /system TEXT sets the system text, /save FILE keeps the
    conversation as a training record; Ctrl-C stops an answer, Ctrl-D ends."""
    import readline  # noqa: F401  (lets input() edit Chinese characters)

    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")  # what is not UTF-8 is found by check_text, and the lines behind it are read
    print(chat_in_terminal.__doc__, file=sys.stderr)
    system, messages = start, []
    while True:
        try:
            text = input("\nUser: ").strip()
        except EOFError:
            return print()
        command, _, argument = text.partition(" ")
        try:
            check_text("what was typed", text)
            if command == "/clear":
                messages = []
            elif command == "/undo":
                messages = messages[:-2]
            elif command == "/system":
                system = [{"role": "system", "content": argument}] if argument else []
            elif command == "/save" and argument:
                with open(argument, "a", encoding="utf-8") as file:
                    file.write(json.dumps({"messages": system + messages}, ensure_ascii=False) + "\n")
                print(f"[saved to {argument}]", file=sys.stderr)
            elif command in ("/save", "/help", "/exit", "/quit"):
                print(chat_in_terminal.__doc__, file=sys.stderr)
            elif text:
                asked = fit(model.config, chat, [*system, *messages, {"role": "user", "content": text}], settings["max_new_tokens"])
                messages += [asked[-1], {"role": "assistant", "content": ""}]
                print("Assistant: ", end="", flush=True)
                for piece in stream(model, chat, asked, **settings):
                    messages[-1]["content"] += piece
                    print(piece, end="", flush=True)
                print()
        except KeyboardInterrupt:
            print(" [stopped]")
        except Exception as problem:  # whatever it is, the conversation is not lost
            print("[" + (f"{problem}" if isinstance(problem, BadInput) else f"{type(problem).__name__}: {problem}").split("\n")[0] + "]", file=sys.stderr)
        if messages and not messages[-1]["content"]:  # a question that got no answer is no round
            messages = messages[:-2]


# ==== load a model ====
def load_model(model_name_or_path, lora_path=None, template="auto", bits=16, precision="auto", trust_remote_code=False, allow_pickle=False,
               chat: Chat | None = None):
    """(model, Chat), ready to generate; with a Chat that is loaded already, `template` is not used."""
    chat = chat or load_chat(model_name_or_path, lora_path, template, trust_remote_code)
    model = load_base(model_name_or_path, len(chat.tokenizer), bits, precision, trust_remote_code, allow_pickle)
    return (load_adapter(model, lora_path, model_name_or_path, allow_pickle) if lora_path else model).eval(), chat


def load_chat(model_name_or_path: str, lora_path: str | None, template: str, trust_remote_code: bool) -> Chat:
    """The tokenizer and template of the adapter if it brings its own, else of the base."""
    from transformers import AutoTokenizer

    folder = lora_path if lora_path and Path(lora_path, "tokenizer_config.json").is_file() else model_name_or_path
    return Chat(load(AutoTokenizer, folder, trust_remote_code=trust_remote_code), template)


def load_base(model_name_or_path: str, tokens: int, bits: int, precision: str, trust_remote_code: bool, allow_pickle: bool):
    """The base: as it is, in LLM.int8 (arXiv:2208.07339), or in NF4 with double quantization (QLoRA, arXiv:2305.14314); with `tokens` rows at least.

    A GPTQ folder has bits of its own, and is made 16 bit again where gptqmodel is not installed.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    config = load(AutoConfig, model_name_or_path, trust_remote_code=trust_remote_code)
    cuda, cpu = torch.cuda.is_available(), torch.backends.cpu.get_cpu_capability()
    gptq = getattr(config, "quantization_config", None) or {}
    gptq = gptq if gptq.get("quant_method") == "gptq" else None
    has_bf16 = torch.cuda.get_device_capability()[0] >= 8 if cuda else cpu == "AVX512" and torch.cpu._is_avx512_bf16_supported()
    if precision == "auto":  # where bf16 is only emulated, fp16 is faster
        precision = "bf16" if has_bf16 else "fp16" if cuda else "fp32"
    if not cuda and (precision == "fp16" or precision == "bf16" and not has_bf16):
        raise BadInput(f"--precision={precision} needs a GPU{', or a CPU with AVX512-BF16' * (precision == 'bf16')}: leave it at auto")
    if gptq and bits < 16:
        raise BadInput(f"--bits={bits}: {model_name_or_path} is quantized already, to {gptq['bits']} bits by GPTQ: leave --bits at 16")
    dtype, kind = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision], AutoModelForCausalLM
    given = dict(dtype=dtype, device_map={"": "cuda" if cuda else "cpu"}, trust_remote_code=trust_remote_code, use_safetensors=None if allow_pickle else True)
    if bits < 16:
        given["quantization_config"] = BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4, bnb_4bit_quant_type="nf4",
                                                          bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)
    if gptq and not (importlib.util.find_spec("gptqmodel") and importlib.util.find_spec("optimum")):
        del config.quantization_config
        try:
            with torch.device("meta"):
                kind = type(AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code))
        except Exception as problem:  # the libraries raise whatever a damaged file makes of them
            raise BadInput(f"the config.json in {model_name_or_path} makes no model: {str(problem)[:200]}") from None
        given |= dict(config=config, state_dict=dequantized_state(model_name_or_path, gptq, dtype))
    model = load(kind, None if "state_dict" in given else model_name_or_path, output_loading_info=True, **given)
    rows = model.get_input_embeddings().weight.shape[0]
    if tokens > rows:  # of a template: each is the mean of the old rows, since a random one is farther from them than they are from one another
        model.resize_token_embeddings(tokens, mean_resizing=False)
        with torch.no_grad():
            for table in (model.get_input_embeddings(), model.get_output_embeddings()):
                table.weight[rows:] = table.weight[:rows].float().mean(dim=0).to(table.weight)
    return model


def load(auto_class, name: str, may_lack: tuple = (), **arguments):
    """auto_class.from_pretrained(name); BadInput where a file is absent or cut off, or a weight is missing: transformers would take random ones."""
    try:
        loaded = auto_class.from_pretrained(name, **arguments)
    except Exception as problem:  # a cut-off file raises SafetensorError, RuntimeError or OSError, by where it was cut
        raise problem if "out of memory" in str(problem) else BadInput(f"{name} could not be loaded ({auto_class.__name__}): {str(problem)[:300]}") from None
    if arguments.get("output_loading_info"):
        loaded, found = loaded
        if missing := sorted({*found["missing_keys"]} - {*may_lack}) + sorted(str(key) for key in found["mismatched_keys"]):
            raise BadInput(f"{name} lacks {len(missing)} of its weights, {missing[0]} for one: the files do not belong to its config.json")
    return loaded


def dequantized_state(folder: str, settings: dict, dtype) -> dict:
    """All weights of a GPTQ folder by name, each layer as a plain matrix; BadInput if some are missing or cut off."""
    from safetensors import SafetensorError, safe_open

    settings.setdefault("checkpoint_format", "gptq")
    if settings["checkpoint_format"] not in ("gptq", "gptq_v2") or settings.get("bits") not in (2, 3, 4, 8):
        raise BadInput(f"{folder} is of the GPTQ format {settings['checkpoint_format']} with {settings.get('bits')} bits, which only gptqmodel reads: "
                       f"pip install gptqmodel optimum")
    index = Path(folder) / "model.safetensors.index.json"
    files = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    layers, state = {}, {}
    for file in files:
        try:
            with safe_open(Path(folder) / file, "pt") as tensors:
                for name in tensors.keys():
                    layer, _, part = name.rpartition(".")
                    if part not in PARTS:
                        state[name] = tensors.get_tensor(name).to(dtype)
                        continue
                    parts = layers.setdefault(layer, {})
                    parts[part] = tensors.get_tensor(name)
                    if len(parts) == len(PARTS):  # they may lie in two files
                        state[f"{layer}.weight"] = dequantize(layers.pop(layer), settings).to(dtype)
        except (OSError, SafetensorError) as problem:
            raise BadInput(f"{folder}: {file} is missing, cut off or damaged, download it again ({problem})") from None
    for layer, parts in layers.items():
        raise BadInput(f"{folder} lacks {layer}.{min(set(PARTS) - set(parts))}: finish the download")
    return state


# ==== adapter ====
def load_adapter(model, lora_path: str, model_name_or_path: str, allow_pickle: bool = False, name: str = "default"):
    """`model` with the LoRA adapter in a folder; BadInput if it was trained on another base or lacks a tensor."""
    import torch
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors.torch import load_file, save_file

    folder = Path(lora_path)
    file = folder / "adapter_model.safetensors"
    if not file.is_file():  # old Chinese-Vicuna checkpoints
        pickles = [folder / name for name in ("adapter_model.bin", "pytorch_model.bin") if (folder / name).is_file()]
        if not pickles or not allow_pickle:
            but = f" but a pickle, {pickles[0].name}, which can run code when it is loaded: if you trust it, --allow_pickle True converts it" if pickles else ""
            raise BadInput(f"{lora_path} holds no adapter_model.safetensors{but}")
    base = read_json(folder / "yangtuo.json").get("base_fingerprint") if (folder / "yangtuo.json").is_file() else None
    if base and base != (found := fingerprint(model_name_or_path)):
        raise BadInput(f"{lora_path} was trained on another base than {model_name_or_path} (fingerprint {str(base)[:12]}, this one has {str(found)[:12]})")
    try:
        if not file.is_file():
            weights = torch.load(pickles[0], map_location="cpu", weights_only=True)
            save_file({key.replace(".default.", "."): tensor.contiguous() for key, tensor in weights.items() if "lora_" in key}, file)
            print(f"converted {pickles[0]} to {file}", file=sys.stderr)
        given = set(load_file(file))
        if hasattr(model, "peft_config"):
            model.load_adapter(folder, adapter_name=name)
        else:
            model = PeftModel.from_pretrained(model, folder, adapter_name=name)
    except Exception as problem:  # peft raises RuntimeError, ValueError or KeyError, safetensors and pickle their own
        raise BadInput(f"{lora_path} does not fit {model_name_or_path}: of another base, or cut off? {str(problem)[:200]}") from None
    if missing := set(get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)) - given:
        raise BadInput(f"{lora_path} lacks {len(missing)} tensors, {min(missing)} for one")
    return model


# ==== gptq ====
# The format: a linear layer of shape (out, in) has four tensors in the place of `weight`:
#
#     qweight  int32 (in * bits / 32, out)       codes of 0 to 2^bits - 1, packed along `in`, lowest bits first
#     qzeros   int32 (groups, out * bits / 32)   zero points, packed along `out`
#     scales   fp16  (groups, out)
#     g_idx    int32 (in,)                       the group of each input
#
# and weight[o, i] = scales[g, o] * (code[i, o] - zero[g, o]) with g = g_idx[i]. The first version of the format, "gptq", holds the zero
# points less one, so that none can be 0: all readers know it, but it is kept to symmetric codes. Others go into "gptq_v2", which holds them as they are.
PARTS = ("qweight", "qzeros", "scales", "g_idx")


def unpack_codes(words, bits: int):
    """The codes (n, m) in int32 words (n * bits / 32, m), as uint8."""
    import torch

    words = words.view(-1, bits, words.shape[1]).long() & 0xFFFFFFFF
    codes = torch.empty(len(words), 32, words.shape[2], dtype=torch.uint8, device=words.device)
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        code = words[:, word] >> shift
        if shift + bits > 32:
            code |= words[:, word + 1] << 32 - shift
        codes[:, i] = code & 2**bits - 1
    return codes.view(-1, words.shape[2])


def dequantize(parts: dict, settings: dict):
    """The weight (out, in), in fp32, that the four tensors of a layer stand for."""
    bits, less = settings["bits"], int(settings["checkpoint_format"] == "gptq")
    zeros = unpack_codes(parts["qzeros"].T.contiguous(), bits).T.float() + less
    codes, g_idx = unpack_codes(parts["qweight"], bits), parts["g_idx"].long()
    return ((codes - zeros[g_idx]) * parts["scales"].float()[g_idx]).T.contiguous()


if __name__ == "__main__":
    cli(main)
