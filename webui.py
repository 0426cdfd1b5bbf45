"""A chat page in the browser: Gradio on top of generate.py's stream(), one model in memory, one answer at a time.

Reads   a model folder, and adapters from finetune_lora.py if there are some
Writes  nothing: a conversation lives in the browser's tab, which can save it as a record for training

    python webui.py --model_name_or_path M
    python webui.py --model_name_or_path M --lora_path A,B                                # to choose from, and to compare
    python webui.py --model_name_or_path M --server_name 0.0.0.0 --auth user:password     # for others too
"""
import contextlib
import ipaddress
import json
import os
import queue
import re
import resource
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Literal

from generate import check_flags, check_text, fit, load_adapter, load_base, load_chat, stream
from utils import BadInput, cli, numbered_records

BASE = "底座 base"
SLIDERS = ("temperature", "top_p", "top_k", "repetition_penalty", "max_new_tokens")
MAX_WAITING = 16  # questions in the queue, besides the one that is being answered
LARGEST = 2_000_000  # bytes of a request, which holds the conversation; an upload may have more
PATIENCE = 30  # seconds for which a connection may say nothing, up to twice
NOTICE = "⚠️ 提示 Notice"
FENCED = re.compile(r"^ {0,3}(?:(`{3,}+)(?=[^`\n]*$).*?(?:^ {0,3}\1`*[ \t]*$|\Z)|(~{3,}+).*?(?:^ {0,3}\2~*[ \t]*$|\Z))", re.M | re.S)  # as CommonMark has it
MARKUP = re.compile(r"<(?=[A-Za-z/!?])|&(?=#?\w+;)|!(?=\[)")
MATH = re.compile(r"(`+)[^`\n]+\1|(?<![\\$\w])\$(?=[^\s$])[^$\n]*[^\s\\$]\$(?![\d$])")
POLICY = (b"img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; "
          b"frame-src 'none'; object-src 'none'; form-action 'self'; base-uri 'none'")
HEAD = """<style>
footer, .top-panel, .wrap:has(> .error) {display: none !important}
.message .prose :is(form, input:not([type=checkbox]), select, textarea) {display: none !important}
.gradio-container {width: 100%; max-width: 1280px !important; margin: 0 auto !important}
#title h1 {font-size: 1.25rem; margin: 0}
.message-row, .message, .message .prose {min-width: 0; max-width: 100%; overflow-wrap: anywhere}
.tools button {min-width: 0; padding: .4rem .2rem; font-size: .85rem; white-space: nowrap}
@media (max-width: 640px) {
    .gradio-container .main.fillable {padding: 8px !important}
    .gradio-container .one {height: 50vh !important}
    .gradio-container .two {height: 40vh !important}
    .tools {gap: 6px !important}
}
</style>
<script>
document.addEventListener("copy", event => {  // without the invisible characters of show_text
    if (event.target.closest?.("textarea, input")) return;
    event.clipboardData.setData("text/plain", String(getSelection()).replace(/[\u2060\u2061]/g, ""));
    event.preventDefault();
});
</script>"""
SAVE = """text => {
    if (!text) return;
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], {type: "application/json"}));
    link.download = `conversation-${new Date().toISOString().slice(0, 19).replace(/[T:]/g, "-")}.jsonl`;
    link.click();
    URL.revokeObjectURL(link.href);
}"""


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
    system: str | None = None,
    # the page
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
    """Serve a chat page until Ctrl-C; lora_path takes several folders with commas, to choose from and to compare.

    Args:
        model_name_or_path: Folder or hub name of the base model.
        lora_path: Folder of an adapter for this base.
        template: Prompt format: auto (the model's own), alpaca, vicuna_chat, yayi, chatml, ziya, llama2_chinese, llama2 or plain.
        trust_remote_code: Run Python code that comes with the model.
        allow_pickle: Load weights that are pickles, which can run code.
        bits: Of the base model's weights: 16 as they are, 8 (int8) or 4 (NF4).
        load_in_8bit: Another name for --bits 8.
        precision: Arithmetic: auto (bf16 where the GPU or CPU computes in it, else fp16 on a GPU and fp32 on a CPU), bf16, fp16 or fp32.
        system: System text of the prompt or of the chat.
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
    settings = dict(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k, repetition_penalty=repetition_penalty)
    adapters = check_flags(model_name_or_path, lora_path, allow_pickle, bits, load_in_8bit, settings | {"seed": seed})
    check_text("--system", system)
    check_page(server_name, server_port, auth, share)

    # ---- load ----
    import torch

    model, choices = load_choices(model_name_or_path, adapters, template, 8 if load_in_8bit else bits, precision, trust_remote_code, allow_pickle)
    torch.manual_seed(seed)

    # ---- answer ----
    serve_page(model, choices, settings, system, server_name, server_port, auth, share).block_thread()


def check_page(server_name: str, server_port: int, auth: str | None, share: bool) -> None:
    """BadInput if the page would be open to others without a password, or cannot listen where it should."""
    if auth is not None and not all(auth.partition(":")):
        raise BadInput("--auth must be user:password")
    try:
        local = server_name == "localhost" or ipaddress.ip_address(server_name).is_loopback
    except ValueError:
        local = False
    if auth is None and (share or not local):
        raise BadInput(f"{'--share True' if share else f'--server_name={server_name}'} opens the page to others: add --auth user:password")
    if not 0 < server_port < 65536:
        raise BadInput(f"--server_port={server_port} is no port: give one from 1024 to 65535")
    try:
        family, *_, address = socket.getaddrinfo(server_name, server_port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as problem:
        raise BadInput(f"--server_name={server_name} --server_port={server_port} cannot be listened on ({problem}): give another --server_port") from None


def load_choices(model_name_or_path, adapters: list[str], template="auto", bits=16, precision="auto", trust_remote_code=False, allow_pickle=False):
    """(model, {name on the page: (Chat, name of the adapter or None)}): the adapters by their folders' names, and the base itself."""
    names = [Path(folder).resolve().name for folder in adapters]
    folders = {name if names.count(name) == 1 else folder: folder for name, folder in zip(names, adapters)} | {BASE: None}
    choices = {name: (load_chat(model_name_or_path, folder, template, trust_remote_code), f"adapter{number}" if folder else None)
               for number, (name, folder) in enumerate(folders.items())}
    model = load_base(model_name_or_path, max(len(chat.tokenizer) for chat, _ in choices.values()), bits, precision, trust_remote_code, allow_pickle)
    for name, (_, adapter) in choices.items():
        if adapter:
            model = load_adapter(model, folders[name], model_name_or_path, allow_pickle, adapter)
    return model.eval(), choices


# ---- what is said, and what is shown ----
def show_text(text: str) -> str:
    """Markdown that shows a text as it is: HTML as characters, no images from elsewhere, $x$ as a formula but $5 as a price.

    An invisible character breaks what would be markup (U+2060) and marks what is a formula (U+2061); say_text takes it out.
    """
    shown, end = "", 0
    for code in [*FENCED.finditer(text), None]:  # a block of code is shown as it stands anyway, and is there to be copied
        plain = text[end : code.start() if code else None]
        shown += MATH.sub(lambda found: found[0] if found[1] else f"\u2061{found[0]}\u2061", MARKUP.sub("\\g<0>\u2060", plain)) + (code[0] if code else "")
        end = code and code.end()
    return shown


def say_text(message: dict) -> str:
    """The text of a message of the page, as it was before show_text."""
    content = message["content"] if isinstance(message["content"], list) else [{"text": message["content"]}]
    return re.sub("(?<=[<&!])\u2060|\u2061", "", "".join(part.get("text") or "" for part in content))


def conversation(shown: list[dict], system: str | None = None) -> list[dict]:
    """The messages behind what a page shows, less our notices and the questions that got no answer."""
    messages = [{"role": "system", "content": system}] if system else []
    for message in shown:
        if message["role"] == "user" and messages and messages[-1]["role"] == "user":
            messages.pop()
        if not (message.get("metadata") or {}).get("title"):
            messages.append({"role": message["role"], "content": say_text(message)})
    return messages


def last_question(shown: list[dict]) -> int:
    """Where the last round begins; None where there is none."""
    return max((i for i, message in enumerate(shown) if message["role"] == "user"), default=None)


def record(shown: list[dict], system: str) -> str:
    """The conversation as a line of the JSON that finetune_multi_rounds.py reads; empty if it has no answer."""
    messages = conversation(shown, system)
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    return json.dumps({"messages": messages}, ensure_ascii=False) + "\n" if messages else ""


def read_conversation(path: str) -> tuple[list[dict], str]:
    """(what the page shows, system text) of the first record in a file."""
    messages = next(numbered_records(path))[1]["messages"]
    if any(message["role"] == "tool" for message in messages):
        raise BadInput("the record has tool results, which this page cannot show")
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    return [{"role": m["role"], "content": show_text(m["content"])} for m in messages if m["role"] != "system"], system


# ---- answering ----
@contextlib.contextmanager
def adapted(model, adapter: str | None):
    """The model with this adapter on, or with none."""
    with contextlib.nullcontext() if adapter or not hasattr(model, "peft_config") else model.disable_adapter():
        if adapter:
            model.set_adapter(adapter, inference_mode=True)
        yield


def answer_pieces(answer, lock: threading.Lock):
    """Yield what the generator `answer` does, from a thread that holds the lock, and "" while there is nothing new.

    Closing this sets the model off at its next token and does not wait for that: Gradio closes it in its event loop, which
    all tabs share. It notices a closed tab between two of our yields only, so there must be some during a long prompt too.
    """
    found, closed = queue.Queue(), threading.Event()

    def run():
        try:
            with lock, contextlib.closing(answer):
                while not closed.is_set() and (piece := next(answer, None)) is not None:
                    found.put(piece)
            found.put(None)
        except Exception as problem:  # raised again where the answer is read
            found.put(problem)

    threading.Thread(target=run, daemon=True).start()
    try:
        held, last = "", 0.0
        while True:
            wait = last + 0.2 - time.monotonic() if held else 0.5  # each update of the page takes the model's processor for milliseconds
            try:
                piece = found.get(timeout=max(wait, 0)) if wait > 0 else found.get_nowait()
            except queue.Empty:
                yield held
                held, last = "", time.monotonic()
                continue
            if piece is None or isinstance(piece, Exception):
                if held:
                    yield held
                if piece:
                    raise piece
                return
            held += piece
    finally:
        closed.set()


def excuse(problem: Exception) -> str:
    """What a person who asked is told when there is no answer."""
    text = str(problem)
    if isinstance(problem, BadInput):
        return f"不能这样提问：请缩短问题、清空对话，或减小“最大长度”。\nShorten it, clear the conversation or lower the maximum length.\n\n{text}"
    traceback.print_exception(problem, file=sys.stderr)
    if isinstance(problem, MemoryError) or re.search("out of memory|can't allocate memory|not enough memory", text):
        import torch

        torch.cuda.empty_cache()
        return "内存不够，没有回答：请缩短对话或减小“最大长度”。\nOut of memory: shorten the conversation or lower the maximum length."
    return f"出错了，请重试。\nSomething went wrong, please try again. ({type(problem).__name__})"


def answer_last(model, chat, adapter: str | None, shown: list[dict], system: str, settings: dict, lock: threading.Lock):
    """Yield what the page shows while this adapter, or the base, answers the last question."""
    import gradio as gr

    def answer():  # runs under the lock: one adapter from the first token to the last
        with adapted(model, adapter):
            yield from stream(model, chat, asked, **settings)

    text, messages = "", conversation(shown, system)
    try:
        asked = fit(model.config, chat, messages, settings["max_new_tokens"])
        if len(asked) < len(messages):
            gr.Info("上文已满，最早的几轮不再读入。The context is full: the first rounds are no longer read.")
        for piece in answer_pieces(answer(), lock):
            text += piece
            yield shown + [{"role": "assistant", "content": show_text(text)}] if text else shown
        notice = "" if text else "模型什么也没有回答。The model answered nothing."
    except Exception as problem:
        notice = excuse(problem)
    if notice:
        said = [{"role": "assistant", "content": show_text(text)}] if text else []
        yield shown + said + [{"role": "assistant", "content": show_text(notice), "metadata": {"title": NOTICE}}]


# ---- the page ----
class Guard:
    """ASGI middleware: no request is larger than LARGEST, and the page loads from and talks to its own server alone, whatever a message holds (POLICY)."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        given = dict(scope["headers"])  # the server sees to it that a body is as long as they say
        upload = scope["path"].removeprefix(scope.get("root_path", "")) == "/gradio_api/upload"  # which goes to the disk, up to what gradio allows
        if not upload and (int(given.get(b"content-length", 0)) > LARGEST or b"transfer-encoding" in given):
            await send({"type": "http.response.start", "status": 411 if b"transfer-encoding" in given else 413, "headers": [(b"connection", b"close")]})
            return await send({"type": "http.response.body", "body": f"the conversation has more than {LARGEST:,} bytes: clear it".encode()})

        async def send_with_policy(message):
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), (b"content-security-policy", POLICY)]
            await send(message)

        await self.app(scope, receive, send_with_policy)


def drop_silent(server) -> None:
    """Close, every PATIENCE seconds, connections that were there the last time and have asked nothing: uvicorn would keep them until it has no more files."""
    before = set()
    while not server.should_exit:
        time.sleep(PATIENCE)
        silent = {each for each in list(server.server_state.connections) if getattr(each, "scope", True) is None}
        for connection in silent & before:
            connection.loop.call_soon_threadsafe(connection.transport.close)
        before = silent


def serve_page(model, choices: dict, settings: dict, system: str | None = None, server_name: str = "127.0.0.1", server_port: int = 7860,
               auth: str | None = None, share: bool = False):
    """Serve the page from threads of its own, and return it once it is up.

    Args:
        choices: {name: (Chat, adapter)} of load_choices.
        settings: What the sliders stand at: max_new_tokens, temperature, top_p, top_k, repetition_penalty.
    """
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= now < 65536 and not 0 <= most <= now:  # each connection is an open file, each upload two
        resource.setrlimit(resource.RLIMIT_NOFILE, (65536 if most < 0 else min(most, 65536), most))
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1", GRADIO_ANALYTICS_MAX_EVENTS="100")
    import gradio as gr
    from starlette.middleware import Middleware

    lock = threading.Lock()
    names = list(choices)
    context = getattr(model.config, "max_position_embeddings", None) or 4096

    def given(values):
        return settings | dict(zip(SLIDERS, values))

    def answer_one(shown, name, system, *values):
        yield from answer_last(model, *choices[name], shown, system, given(values), lock)

    def answer_two(left, right, name, other, system, *values):
        for shown in answer_last(model, *choices[name], left, system, given(values), lock):
            yield shown, gr.skip()
        for shown in answer_last(model, *choices[other], right, system, given(values), lock):
            yield gr.skip(), shown

    def ask(text, *shown):
        if not text.strip():
            raise gr.Error("请先输入问题。Type a question first.", print_exception=False)
        if len(page._queue) >= MAX_WAITING:
            raise gr.Error("排队的人太多了，请稍后再试。Too many people are waiting, please try again later.", print_exception=False)
        return *([*one, {"role": "user", "content": show_text(text)}] for one in shown), busy()

    def again(*shown):
        if not all(shown):
            raise gr.Error("还没有问题。There is no question yet.", print_exception=False)
        return *(one[: last_question(one) + 1] for one in shown), busy()

    def busy():
        return gr.Textbox(value="", interactive=False, submit_btn=False, stop_btn="停止 Stop")

    def ready(text=""):
        return gr.Textbox(value=text, interactive=True, submit_btn="发送 Send", stop_btn=False)

    def edit(shown):
        last = last_question(shown)
        return (shown, ready()) if last is None else (shown[:last], ready(say_text(shown[last])))

    def save(shown, system):
        text = record(shown, system)
        if not text:
            gr.Warning("还没有可以保存的回答。There is no answer to save yet.")
        return text

    def load(path):
        try:
            return *read_conversation(path), ready()
        except BadInput as problem:
            raise gr.Error(f"不能读取 Cannot be read: {str(problem).replace(path, Path(path).name)}", print_exception=False) from None

    def bot(label, kind):
        formulas = [("$$", "$$", True), ("\\[", "\\]", True), ("\\(", "\\)", False), ("\u2061$", "$\u2061", False)]
        return gr.Chatbot(label=label, show_label=False, elem_classes=kind, height="60vh", buttons=["copy"], feedback_options=None, allow_tags=False,
                          latex_delimiters=[{"left": left, "right": right, "display": display} for left, right, display in formulas])

    def input_box():
        return gr.Textbox(show_label=False, placeholder="输入问题，回车发送，Shift+回车换行 Enter sends", lines=1, max_lines=8, max_length=200_000,
                          submit_btn="发送 Send", autofocus=True)

    def connect(asked, retried, box, bots, answer, chosen):
        """The chain of a question: show it, answer it, open the box again. Returns what a stop has to cancel."""
        shown = [asked(ask, [box, *bots], [*bots, box], **aside), retried(again, bots, [*bots, box], **aside)]
        answers = [event.success(answer, [*bots, *chosen, system_box, *sliders], bots, concurrency_limit=1, concurrency_id="model", show_progress="minimal",
                                 api_name=answer.__name__ if event is shown[0] else None, api_visibility="public" if event is shown[0] else "private")
                   for event in shown]
        for event in answers:
            event.then(ready, None, box, **at_once)
        box.stop(ready, None, box, cancels=answers, **at_once)
        return answers

    at_once = dict(queue=False, api_visibility="private")
    aside = dict(concurrency_limit=None, show_progress="hidden", api_visibility="private")  # Gradio shows messages of queued events only

    with gr.Blocks(title="羊驼 Yangtuo", analytics_enabled=False, delete_cache=(3600, 3600), fill_width=True) as page:
        gr.Markdown("# 羊驼 Yangtuo", elem_id="title")
        with gr.Row():
            with gr.Column(scale=3, min_width=320):
                with gr.Tab("对话 Chat"):
                    choice = gr.Dropdown(names, value=names[0], label="模型 Model", visible=len(names) > 1)
                    chatbot = bot("对话 Chat", "one")
                    box = input_box()
                    with gr.Row(elem_classes="tools"):
                        buttons = [gr.Button(label, size="sm", min_width=100) for label in ("重试 Retry", "撤销 Undo", "编辑 Edit", "清空 Clear")]
                        save_button = gr.Button("保存 Save", size="sm", min_width=100)
                        load_button = gr.UploadButton("读入 Load", size="sm", min_width=100, file_types=[".json", ".jsonl"])
                with gr.Tab("对比 Compare", visible=len(names) > 1):
                    with gr.Row():
                        with gr.Column(min_width=300):
                            left_choice = gr.Dropdown(names, value=names[-1], label="左 Left")
                            left = bot("左 Left", "two")
                        with gr.Column(min_width=300):
                            right_choice = gr.Dropdown(names, value=names[0], label="右 Right")
                            right = bot("右 Right", "two")
                    compare_box = input_box()
                    with gr.Row(elem_classes="tools"):
                        compare_retry = gr.Button("重试 Retry", size="sm", min_width=100)
                        compare_clear = gr.Button("清空 Clear", size="sm", min_width=100)
            with gr.Column(scale=1, min_width=280):
                system_box = gr.Textbox(system or "", label="系统提示 System prompt", lines=2, max_lines=6, max_length=20_000)
                longest = max(min(context, 4096), settings["max_new_tokens"])
                at, penalty = settings, settings["repetition_penalty"]  # what the command line asked for is within the bounds
                sliders = [gr.Slider(0, max(2, at["temperature"]), at["temperature"], step=0.05, label="温度 Temperature",
                                     info="0：总取最可能的词 always the likeliest"),
                           gr.Slider(min(0.05, at["top_p"]), 1, at["top_p"], step=0.05, label="Top-p"),
                           gr.Slider(0, max(200, at["top_k"]), at["top_k"], step=1, label="Top-k", info="0：不限 no limit"),
                           gr.Slider(min(1, penalty), max(2, penalty), penalty, step=0.05, label="重复惩罚 Repetition penalty"),
                           gr.Slider(1, longest, at["max_new_tokens"], step=1, label="最大长度 Max new tokens")]
        saved = gr.Textbox(visible=False)

        retry, undo, change, clear = buttons
        answers = connect(box.submit, retry.click, box, [chatbot], answer_one, [choice])
        undo.click(lambda shown: (shown[: last_question(shown) or 0], ready()), chatbot, [chatbot, box], cancels=answers, **at_once)
        change.click(edit, chatbot, [chatbot, box], cancels=answers, **at_once)
        clear.click(lambda: ([], ready()), None, [chatbot, box], cancels=answers, **at_once)
        save_button.click(save, [chatbot, system_box], saved, **aside).then(None, saved, None, js=SAVE)
        load_button.upload(load, load_button, [chatbot, system_box, box], cancels=answers, **aside)
        answers = connect(compare_box.submit, compare_retry.click, compare_box, [left, right], answer_two, [left_choice, right_choice])
        compare_clear.click(lambda: ([], [], ready()), None, [left, right, compare_box], cancels=answers, **at_once)

    page.queue(max_size=2 * MAX_WAITING)  # ask() refuses earlier, and in two languages
    page.launch(server_name=server_name, server_port=server_port, auth=tuple(auth.split(":", 1)) if auth else None, share=share,
                theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]), head=HEAD, footer_links=[],
                app_kwargs={"middleware": [Middleware(Guard)]}, run_history=False, ssr_mode=False, max_file_size="20mb", enable_monitoring=False,
                quiet=True, prevent_thread_lock=True)
    threading.Thread(target=drop_silent, args=(page.server,), daemon=True).start()
    print(f"the page is at {page.local_url}" + (f" and {page.share_url}" if page.share_url else ""), file=sys.stderr)
    return page


if __name__ == "__main__":
    cli(main)
