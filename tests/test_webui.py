"""The chat page in a real browser: headless Chromium, driven by Playwright, on a tiny model in this process."""
import json
import shutil
import socket
import threading
import time

import pytest
import torch
from conftest import ROOT

import finetune_lora
import generate
import webui
from utils import BadInput, numbered_records

DATA = str(ROOT / "sample" / "conversation.json")
GREEDY = dict(max_new_tokens=80, temperature=0, top_p=1.0, top_k=0, repetition_penalty=1.0)
SEND, STOP, RETRY, CLEAR, UNDO, EDIT = "发送 Send", "停止 Stop", "重试 Retry", "清空 Clear", "撤销 Undo", "编辑 Edit"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def adapters(model_folder, tmp_path_factory) -> dict[str, str]:
    """Two adapters whose templates differ; the second one's adds tokens to the base's vocabulary."""
    folders = {}
    for name in ("ziya", "yayi"):
        folders[name] = str(tmp_path_factory.mktemp("adapters") / name)
        finetune_lora.main(model_name_or_path=str(model_folder), data_path=DATA, output_dir=folders[name], template=name, max_length=256,
                           gradient_accumulation_steps=1, max_steps=8, learning_rate=1e-2, gradient_checkpointing=False)
    return folders


class Site:
    """The page with what its model is asked: `passes` holds the adapter of every forward pass, `prompts` the ids of every prompt."""

    def __init__(self, model_folder, adapters):
        self.model, self.choices = webui.load_choices(str(model_folder), list(adapters.values()))
        self.pause, self.problem, self.passes, self.prompts = 0.0, None, [], []
        self.model.get_base_model().register_forward_pre_hook(self.watch, with_kwargs=True)
        self.page = webui.serve_page(self.model, self.choices, GREEDY, server_port=free_port())

    def watch(self, model, arguments, named):
        self.passes.append(None if model.model.layers[0].self_attn.q_proj.disable_adapters else self.model.active_adapter)
        if named["input_ids"].shape[1] > 1:
            self.prompts.append(named["input_ids"][0].tolist())
        if self.problem:
            raise self.problem
        time.sleep(self.pause)

    def prompt(self, name, *turns):
        messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
        return [i for ids, _ in self.choices[name][0].encode(messages, add_generation_prompt=True) for i in ids]

    def idle(self):
        """Whether the model comes to a standstill within two seconds."""
        for _ in range(7):
            before = len(self.passes)
            time.sleep(0.3)
            if len(self.passes) == before:
                return True


@pytest.fixture(scope="module")
def site(model_folder, adapters):
    site = Site(model_folder, adapters)
    yield site
    site.page.close()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not chromium:
        pytest.fail("the page is tested in a browser: apt-get install -y chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser.new_context()
        browser.close()


class Tab:
    """A browser tab with the page, as a person uses it."""

    def __init__(self, browser, site, width=1280):
        self.page = browser.new_page()
        self.page.set_viewport_size({"width": width, "height": 900})
        self.page.set_default_timeout(15_000)
        self.foreign = []
        self.page.on("request", lambda request: None if request.url.startswith((site.page.local_url, "data:", "blob:")) else self.foreign.append(request.url))
        self.page.goto(site.page.local_url)
        self.button(SEND).wait_for()

    def button(self, name):
        return self.page.get_by_role("button", name=name).locator("visible=true")

    def ask(self, text):
        self.page.locator("textarea:visible").first.fill(text)
        self.button(SEND).click()

    def answered(self, count=1):
        """Wait until there are so many answers and the box is open again; returns them."""
        self.page.wait_for_function("n => [...document.querySelectorAll('.message.bot')].filter(e => e.offsetParent).length >= n", arg=count)
        self.button(SEND).wait_for()
        return self.said("bot")

    def said(self, role):
        return [text.replace("\u2060", "") for text in self.page.locator(f".message.{role}:visible").all_inner_texts()]

    def choose(self, label, name):
        self.page.get_by_label(label).locator("visible=true").click()
        self.page.get_by_role("option", name=name).click()

    def saved(self, path):
        with self.page.expect_download() as download:
            self.button("保存 Save").click()
        download.value.save_as(path)
        return next(numbered_records(str(path)))[1]["messages"]


@pytest.fixture
def tabs(browser, site):
    """open() gives a new tab; all are closed at the end, and the model stands still again."""
    opened = []

    def open(**how):
        opened.append(Tab(browser, site, **how))
        return opened[-1]

    site.passes.clear(), site.prompts.clear()
    yield open
    for tab in opened:
        assert not tab.foreign, f"the page asked another host: {tab.foreign}"
        tab.page.close()
    site.pause, site.problem = 0.0, None
    assert site.idle()


def alone(site, name, *turns, **settings):
    messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    chat, adapter = site.choices[name]
    with webui.adapted(site.model, adapter):
        return "".join(generate.stream(site.model, chat, messages, **GREEDY | settings))


# ---- before the model is loaded ----
@pytest.mark.parametrize("flags, said", [
    ({"server_name": "0.0.0.0"}, "--auth user:password"), ({"share": True}, "--auth user:password"), ({"server_name": "example.invalid", "auth": "a:b"}, "cannot be listened on"),
    ({"auth": "secret"}, "must be user:password"), ({"auth": ":secret"}, "must be user:password"), ({"server_port": 99999}, "--server_port")], ids=str)
def test_a_page_that_others_could_open_needs_a_password(model_folder, flags, said, monkeypatch):
    monkeypatch.setattr("webui.load_base", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(BadInput, match=said):
        webui.main(model_name_or_path=str(model_folder), **flags)


def test_several_adapters_are_for_the_page_alone(model_folder, adapters):
    with pytest.raises(BadInput, match="are for webui.py"):
        generate.main(model_name_or_path=str(model_folder), lora_path=f"{adapters['ziya']},{adapters['yayi']}", prompt="你好")


def test_a_password_is_asked_for(site):
    import httpx

    page = webui.serve_page(site.model, site.choices, GREEDY, server_port=free_port(), auth="yangtuo:a:b")
    try:
        assert httpx.get(f"{page.local_url}config").status_code == 401
        assert httpx.post(f"{page.local_url}login", data={"username": "yangtuo", "password": "a:b"}).status_code == 200
        assert httpx.post(f"{page.local_url}login", data={"username": "yangtuo", "password": "a"}).status_code == 400
        assert page.server_name == "127.0.0.1" == site.page.server_name
    finally:
        page.close()


# ---- adapters and texts ----
def test_every_choice_answers_as_if_it_were_loaded_alone(site, model_folder, adapters):
    assert len({alone(site, name, "你好") for name in site.choices}) == 3
    for name, folder in (adapters | {webui.BASE: None}).items():
        model, chat = generate.load_model(str(model_folder), folder)
        ids = torch.tensor([site.prompt(name, "你好", "嗯", "再见")])
        with torch.inference_mode(), webui.adapted(site.model, site.choices[name][1]):
            logits = site.model(input_ids=ids).logits
        assert torch.equal(logits[..., : len(chat.tokenizer)], model(ids).logits[..., : len(chat.tokenizer)])
        sampled = [list(generate.stream(site.model, site.choices[name][0], [{"role": "user", "content": "你好"}], **GREEDY | {"temperature": 2.0})) for _ in range(3)]
        assert all(sampled)
        arguments = generate.generation_arguments(site.model, site.choices[name][0], **GREEDY)
        rows = site.model.get_input_embeddings().weight.shape[0]
        assert arguments.get("suppress_tokens", []) == list(range(len(chat.tokenizer), rows))  # no token that another adapter added is ever drawn


@pytest.mark.parametrize("text", ["<script>x</script> & &lt; &amp; a<b", "`<b>` ``a ` <i>`` <u>", "```html\n<p>$1$</p>\n```\n<p>", "~~~\n<a>", "$x^2$ 和 $5、$6 \\(a\\) $$b$$ ![](http://a/b)", "", "<", "a `b\n\n<c> d`"])
def test_what_the_page_shows_can_be_taken_back(text):
    assert webui.say_text({"content": [{"type": "text", "text": webui.show_text(text)}]}) == text


def test_questions_without_answers_and_notices_are_not_read():
    shown = [{"role": "user", "content": "一"}, {"role": "assistant", "content": "太长", "metadata": {"title": webui.NOTICE}}, {"role": "user", "content": "二"},
             {"role": "assistant", "content": "2"}, {"role": "user", "content": "三"}]
    assert [message["content"] for message in webui.conversation(shown, "系统")] == ["系统", "二", "2", "三"]
    assert [message["content"] for message in json.loads(webui.record(shown, ""))["messages"]] == ["二", "2"]
    assert webui.record(shown[:2], "系统") == ""


# ---- in the browser ----
def test_the_first_answer_streams_and_is_the_models_own(tabs, site, tmp_path):
    tab = tabs()
    site.pause = 0.03
    text = max((f"讲{i}个故事" for i in range(3)), key=lambda text: len(alone(site, "ziya", text)))
    tab.ask(text)
    lengths = set()
    while tab.button(STOP).count() or not lengths:
        lengths.add(len((tab.said("bot") or [""])[-1]))
        time.sleep(0.05)
    site.pause = 0.0
    assert len(lengths) > 5 and tab.said("user") == [text]
    expected = alone(site, "ziya", text)
    assert tab.saved(tmp_path / "saved.jsonl") == [{"role": "user", "content": text}, {"role": "assistant", "content": expected}]
    tab.ask("然后呢")
    tab.answered(2)
    assert site.prompts[-1] == site.prompt("ziya", text, expected, "然后呢")


def test_stop_stops_the_model_and_leaves_what_was_said(tabs, site):
    tab = tabs()
    site.pause = 0.05
    tab.ask("讲个故事")
    tab.page.locator(".message.bot:visible .prose").wait_for()  # not the dots that stand there before the first token
    tab.button(STOP).click()
    tab.button(SEND).wait_for()
    assert site.idle() and len(site.passes) < 70
    partial = tab.said("bot")
    site.pause = 0.0
    tab.ask("你好")
    assert tab.answered(2)[:1] == partial


def test_retry_answers_again_with_the_adapter_that_is_chosen_now(tabs, site):
    tab = tabs()
    tab.ask("你好")
    tab.answered()
    for name in ("yayi", webui.BASE, "ziya"):
        tab.choose("模型 Model", name)
        tab.button(RETRY).click()
        tab.button(STOP).or_(tab.button(SEND)).first.wait_for()
        deadline = time.monotonic() + 10
        while site.prompts[-1] != site.prompt(name, "你好") and time.monotonic() < deadline:
            tab.page.wait_for_timeout(50)
        assert site.prompts[-1] == site.prompt(name, "你好") and site.passes[-1] == site.choices[name][1]
        assert len(tab.answered()) == 1 and tab.said("user") == ["你好"]


def test_undo_edit_and_clear(tabs, site):
    tab = tabs()
    for count, text in enumerate(("一 <b>", "二"), 1):
        tab.ask(text)
        tab.answered(count)
    tab.button(UNDO).click()
    tab.page.wait_for_function("() => [...document.querySelectorAll('.message.user')].filter(e => e.offsetParent).length == 1")
    box = tab.page.locator("textarea:visible").first
    tab.button(EDIT).click()
    tab.page.wait_for_function("() => document.querySelector('textarea').value == '一 <b>'")
    assert tab.said("user") == [] == tab.said("bot")
    box.fill("三")
    tab.button(SEND).click()
    tab.answered()
    assert site.prompts[-1] == site.prompt("ziya", "三") and tab.said("user") == ["三"]
    tab.button(CLEAR).click()
    tab.page.wait_for_function("() => !document.querySelector('.message.user')")
    tab.ask("四")
    tab.answered()
    assert site.prompts[-1] == site.prompt("ziya", "四")


def test_compare_asks_two_and_never_mixes_them(tabs, site):
    tab = tabs()
    tab.page.get_by_role("tab", name="对比 Compare").click()
    tab.choose("左 Left", "yayi")
    tab.ask("你好")
    assert len(tab.answered(2)) == 2 and tab.said("user") == ["你好", "你好"]
    assert site.prompts == [site.prompt("yayi", "你好"), site.prompt("ziya", "你好")]
    assert site.passes == sorted(site.passes, key=[site.choices["yayi"][1], site.choices["ziya"][1]].index)


def test_two_tabs_at_once_keep_apart_and_wait_for_each_other(tabs, site):
    first, second = tabs(), tabs()
    second.choose("模型 Model", webui.BASE)
    site.pause = 0.01
    first.ask("一")
    second.ask("二")
    assert len(first.answered()) == len(second.answered()) == 1
    assert (first.said("user"), second.said("user")) == (["一"], ["二"])
    assert sorted(site.prompts) == sorted([site.prompt("ziya", "一"), site.prompt(webui.BASE, "二")])
    switches = sum(a != b for a, b in zip(site.passes, site.passes[1:]))
    assert switches == 1  # one answer after the other


def test_a_reload_or_a_closed_tab_stops_its_own_answer_alone(tabs, site):
    staying, leaving, closing = tabs(), tabs(), tabs()
    site.pause = 0.1
    closing.choose("模型 Model", "yayi")
    closing.ask("关")
    closing.page.locator(".message.bot:visible").wait_for()
    staying.ask("留")
    leaving.ask("走")
    closing.page.close()
    staying.page.locator(".message.bot:visible").wait_for()
    site.pause = 0.01
    leaving.page.reload()
    leaving.button(SEND).wait_for()
    assert len(staying.answered()) == 1 and staying.said("user") == ["留"] and leaving.said("user") == []
    assert site.passes.count(site.choices["yayi"][1]) < 70


def test_a_text_that_is_too_long_and_no_memory_are_answered_on_the_page(tabs, site):
    tab = tabs()
    tab.ask("长" * 20_000)
    assert "max_new_tokens" in tab.answered()[-1] and not site.passes
    site.problem = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
    tab.ask("二")
    assert "Out of memory" in tab.answered(2)[-1]
    site.problem = ValueError("<b>odd</b>")
    tab.ask("三")
    assert "Something went wrong" in tab.answered(3)[-1]
    site.problem = None
    tab.ask("四")
    tab.answered(4)
    assert site.prompts[-1] == site.prompt("ziya", "四") and "Notice" not in tab.said("bot")[-1]


def test_html_is_shown_and_not_run(tabs, site, monkeypatch):
    attack = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'> ![](http://example.invalid/a.png)"
    monkeypatch.setattr(webui, "stream", lambda *_, **__: iter([attack[:9], attack[9:], "\n```html\n<b>code</b>\n```\n$x^2$ 花了 $5 和 $6"]))
    tab = tabs()
    tab.ask(attack)
    assert "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>" in tab.answered()[0] and "$5 和 $6" in tab.said("bot")[0]
    assert "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>" in tab.said("user")[0]
    copied = tab.page.evaluate("""() => {
        const said = document.querySelector(".message.user"), event = new ClipboardEvent("copy", {clipboardData: new DataTransfer(), bubbles: true});
        getSelection().selectAllChildren(said);
        said.dispatchEvent(event);
        return event.clipboardData.getData("text/plain");
    }""")
    assert attack.partition(" ![")[0] in copied  # with no character that was put in to show it
    assert tab.page.evaluate("window.hacked") is None and tab.page.locator(".message img").count() == 0
    assert tab.page.locator(".message.bot code").inner_text().strip() == "<b>code</b>" and tab.page.locator(".message.bot .katex").count() == 1


FORM = "<form action=http://example.invalid/><input name=p value=secret><button>Login</button></form>"


def test_no_fence_puts_a_live_form_on_the_page(tabs, tmp_path):
    shown = ["``` a`b\n" + FORM, "~~~\na\n```\n~~~\n" + FORM, "````\na\n```\nb\n  `````  \n" + FORM, "    ```\n" + FORM, "`a\nb` " + FORM + " `c`", "a `b | " + FORM + "`"]
    hidden = ["- ```\n  a\n  ```\n" + FORM, "$$\n```\n$$\n" + FORM, '[a]: /b "\n```\n"\n' + FORM]  # what only Markdown itself sees to be no code
    turns = [turn for text in shown + hidden for turn in ({"role": "user", "content": "?"}, {"role": "assistant", "content": text})]
    (tmp_path / "hostile.json").write_text(json.dumps([{"messages": turns}]), "utf-8")
    tab = tabs()
    tab.page.locator("input[type=file]").set_input_files(tmp_path / "hostile.json")
    said = tab.answered(len(shown + hidden))
    for text, source in zip(said, shown):
        assert FORM in text, source
    assert not tab.page.locator(".message form:visible, .message input:visible, .message form button:visible").count()
    blocked = tab.page.evaluate("""() => new Promise(done => {
        document.addEventListener("securitypolicyviolation", event => done(event.effectiveDirective));
        const form = document.body.appendChild(document.createElement("form"));
        form.action = "http://example.invalid/";
        form.submit();
        setTimeout(() => done("nothing"), 3000);
    })""")
    assert blocked == "form-action"


def test_a_conversation_is_saved_for_training_and_read_back(tabs, site, tmp_path):
    tab = tabs()
    said = [{"role": "system", "content": "你是<小驼>。"}, {"role": "user", "content": "一\n<b>二</b> &lt;"}, {"role": "assistant", "content": "# 三"}]
    (tmp_path / "mine.json").write_text(json.dumps([{"messages": said}, {"messages": said[1:]}], ensure_ascii=False), "utf-8")
    tab.page.locator("input[type=file]").set_input_files(tmp_path / "mine.json")
    tab.answered()
    assert tab.page.get_by_label("系统提示").input_value() == "你是<小驼>。"
    assert tab.saved(tmp_path / "saved.jsonl") == said
    (tmp_path / "bad.json").write_text("{", "utf-8")
    tab.page.locator("input[type=file]").set_input_files(tmp_path / "bad.json")
    tab.page.get_by_text("Cannot be read: bad.json").wait_for()
    finetune_lora.main(model_name_or_path=site.model.config._name_or_path, data_path=str(tmp_path / "saved.jsonl"), output_dir=str(tmp_path / "out"),
                       template="chatml", max_steps=1, gradient_checkpointing=False)


def test_whatever_a_message_holds_the_page_loads_from_nowhere_else(tabs):
    tab = tabs()
    blocked = tab.page.evaluate("""() => new Promise(done => {
        document.addEventListener("securitypolicyviolation", event => done(event.effectiveDirective));
        new Image().src = "http://example.invalid/a.png";
        setTimeout(() => done("nothing"), 3000);
    })""")
    assert blocked == "img-src"
    tab.foreign.clear()  # it was asked for, and never sent


def test_a_full_queue_is_said_politely(tabs, site, monkeypatch):
    tab = tabs()
    monkeypatch.setattr(webui, "MAX_WAITING", 0)
    tab.ask("你好")
    tab.page.get_by_text("Too many people are waiting").wait_for()
    assert tab.page.locator("textarea:visible").first.input_value() == "你好" and not site.passes


def test_a_phone_shows_all_of_it(tabs, site):
    tab = tabs(width=390)
    tab.ask("你好" * 30 + " https://example.invalid/" + "a" * 300)
    tab.answered()
    for name in ("对比 Compare", "对话 Chat"):
        tab.page.get_by_role("tab", name=name).click()
        assert tab.page.evaluate("document.documentElement.scrollWidth") <= 390
        for button in tab.page.locator("button:visible").all():
            box = button.bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= 390


# ---- clients that mean harm, or are slow ----
@pytest.mark.parametrize("path", ["gradio_api/queue/join", "gradio_api/run/upload", "gradio_api/call/upload", "login"])
@pytest.mark.parametrize("header", ["Content-Length: 50000000", "Transfer-Encoding: chunked"])
def test_a_request_that_is_larger_than_any_conversation_is_refused_unread(site, path, header):
    with socket.create_connection(("127.0.0.1", site.page.server_port), timeout=5) as client:  # 50 MB took 10 GB, and the page with them
        client.sendall(f"POST /{path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{header}\r\n\r\n".encode())
        assert client.recv(100).startswith(b"HTTP/1.1 411 " if "chunked" in header else b"HTTP/1.1 413 ")


def test_connections_that_ask_nothing_are_closed_and_those_that_do_are_not(site, monkeypatch):
    monkeypatch.setattr(webui, "PATIENCE", 0.3)
    silent, slow, asking = (socket.create_connection(("127.0.0.1", site.page.server_port), timeout=5) for _ in range(3))
    slow.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nX-slow: ")
    asking.sendall(b"POST /gradio_api/queue/join HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n")  # its body comes later
    threading.Thread(target=webui.drop_silent, args=(site.page.server,), daemon=True).start()
    assert silent.recv(9) == b"" and slow.recv(9) == b""
    asking.sendall(b"{\"x\": 12}")
    assert asking.recv(100).startswith(b"HTTP/1.1 4")  # an answer, if not a kind one
