"""The OpenAI-compatible server that scripts/serve.sh starts, asked by the clients that people use."""
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from conftest import ROOT
from test_webui import DATA, free_port

import finetune_lora
import generate

TALK = [{"role": "system", "content": "你是小驼。"}, {"role": "user", "content": " 你好\n\n🐪 "}, {"role": "assistant", "content": "你好！"}, {"role": "user", "content": "再见"}]
SETTINGS = dict(max_new_tokens=20, temperature=0, top_p=1.0, top_k=0, repetition_penalty=1.0)


class Server:
    """`transformers serve` on a tiny model that was tuned and merged; `prompts` holds the ids of every prompt it read."""

    def __init__(self, folder):
        from transformers.cli.serve import Serve

        self.folder, self.prompts, port = folder, [], free_port()
        self.serve = Serve(force_model=str(folder), host="127.0.0.1", port=port, non_blocking=True)
        model = next(iter(self.serve._model_manager.loaded_models.values())).model
        model.register_forward_pre_hook(self.watch, with_kwargs=True)
        self.client = dict(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")

    def watch(self, model, arguments, named):
        if named["input_ids"].shape[1] > 1:
            self.prompts.append(named["input_ids"][0].tolist())


@pytest.fixture(scope="module")
def wrapper(model_folder, tmp_path_factory):
    """Run scripts/serve.sh with stubs for the servers; returns (words the server was called with, standard error, folder it would serve)."""
    folder = tmp_path_factory.mktemp("wrapper")
    for name in ("transformers", "vllm", "nvidia-smi"):
        (folder / name).write_text(f'#!/bin/sh\n[ {name} = nvidia-smi ] && exit $NO_GPU\nfor word in {name} "$@"; do echo "$word"; done\n')
        (folder / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}", "OUTPUT_PATH": str(folder / "serve"), "PORT": "8123",
                                "BASE_MODEL": str(model_folder), "NO_GPU": "1"}

    def run(*flags, **more):
        done = subprocess.run(["bash", "scripts/serve.sh", *flags], cwd=ROOT, env=environment | more, capture_output=True, text=True)
        return done.stdout.splitlines(), done.stderr, (folder / "serve" / "8123" / "yangtuo").resolve()

    return run


@pytest.fixture(scope="module")
def server(model_folder, wrapper, tmp_path_factory):
    adapter = tmp_path_factory.mktemp("served") / "an adapter"
    finetune_lora.main(model_name_or_path=str(model_folder), data_path=DATA, output_dir=str(adapter), template="yayi", max_length=256,
                       gradient_accumulation_steps=1, max_steps=4, learning_rate=1e-2, gradient_checkpointing=False)
    words, said, folder = wrapper(LORA_PATH=str(adapter))
    assert words[:3] == ["transformers", "serve", "yangtuo"] and folder != model_folder, said
    server = Server(folder)
    deadline = time.monotonic() + 30
    while not server.serve.server.started and time.monotonic() < deadline:
        time.sleep(0.05)
    yield server
    server.serve.kill_server()


@pytest.fixture(scope="module")
def expected(server):
    """(ids of the prompt, answer) of generate.py for the same conversation."""
    model, chat = generate.load_model(str(server.folder))
    ids = [i for piece, _ in chat.encode(TALK, add_generation_prompt=True) for i in piece]
    return ids, generate.answer_batch(model, chat, [TALK], **SETTINGS)[0][0]


def check(server, expected, answer):
    assert server.prompts.pop() == expected[0]
    assert answer and answer.rstrip().rstrip("\ufffd") == expected[1].rstrip()


def test_the_openai_client_is_answered_from_the_prompt_of_training(server, expected):
    from openai import OpenAI

    asked = dict(model=str(server.folder), messages=TALK, max_tokens=20, temperature=0)
    client = OpenAI(**server.client)
    answer = client.chat.completions.create(**asked)
    assert answer.usage.prompt_tokens == len(expected[0])
    check(server, expected, answer.choices[0].message.content)
    pieces = [chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**asked, stream=True)]
    check(server, expected, "".join(pieces))
    assert len(pieces) > 3


def test_langchain_is_answered_from_the_prompt_of_training(server, expected):
    from langchain_openai import ChatOpenAI

    llm = ChatOpenAI(**server.client, model=str(server.folder), temperature=0, max_tokens=20)
    check(server, expected, llm.invoke(TALK).content)
    pieces = [chunk.content for chunk in llm.stream(TALK)]
    check(server, expected, "".join(pieces))
    assert len(pieces) > 3


def of_readme(server, pattern):
    """What the README has at `pattern`, for the port and the model of this server."""
    found = re.search(pattern, (ROOT / "README.md").read_text("utf-8"), re.M | re.S)[0]
    return found.replace("http://127.0.0.1:8000/v1", server.client["base_url"]).replace('"yangtuo"', f'"{server.folder}"')


def test_the_python_of_the_readme_is_answered(server, capsys):
    block = of_readme(server, r"(?<=^```python\n)from openai.*?(?=^```)")
    exec(compile(block, "README.md", "exec"), {})
    asked, = server.prompts
    server.prompts.clear()
    model, chat = generate.load_model(str(server.folder))
    assert asked == [i for piece, _ in chat.encode([{"role": "user", "content": "你好"}], add_generation_prompt=True) for i in piece]
    assert capsys.readouterr().out.strip()


def test_the_curl_of_the_readme_is_answered(server):
    curl, url, _, header, _, body = shlex.split(of_readme(server, r"^curl http.*?$"))
    with urllib.request.urlopen(urllib.request.Request(url, body.encode(), dict([header.split(": ")]))) as answer:
        lines = [line.decode().strip() for line in answer if line.strip()]
    server.prompts.clear()
    assert len(lines) > 3 and json.loads(lines[0].removeprefix("data: "))["object"] == "chat.completion.chunk" and json.loads(body)["stream"]


def test_the_wrapper_serves_to_this_machine_alone(wrapper, model_folder):
    from transformers.cli.serve import Serve

    words, _, folder = wrapper("--log-level", "error")
    assert words == ["transformers", "serve", "yangtuo", "--host", "127.0.0.1", "--port", "8123", "--log-level", "error"] and folder == model_folder
    assert {word[2:].replace("-", "_") for word in words if word.startswith("--")} <= set(inspect.signature(Serve.__init__).parameters)
    words, _, _ = wrapper(NO_GPU="0", TOT_CUDA="0,1")
    assert words[:5] == ["vllm", "serve", "yangtuo", "--host", "127.0.0.1"] and words[-1] == "2"
    words, said, _ = wrapper(BASE_MODEL="no/model")
    assert not words and said.startswith("error: BASE_MODEL=no/model is no model folder") and len(said.splitlines()) == 1
