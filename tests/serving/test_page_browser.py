"""The page as a person meets it: a real Streamlit process in headless Chromium, against an API whose answers the test
lets out piece by piece. No test sleeps: each waits for something to be on the screen.

Screenshots for the eye lie in the temporary folder of each test; `--basetemp DIR` says where.
"""

import json
import os
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from ptuning.serving.server import page_command
from tests.serving.page_fake_api import FakeApi

ADVERT = "类型#上衣*材质#牛仔布*颜色#白色*风格#简约"
CHUNKS = ["这件外套简约而不简单，", "白色的衣身十分百搭，", "彰显别样时尚。"]
ANSWER = "".join(CHUNKS)
WIDE, NARROW = {"width": 1280, "height": 800}, {"width": 390, "height": 844}

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
pytestmark = pytest.mark.timeout(1200)
expect = sync_api.expect


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[tuple[FakeApi, str]]:
    """The fake API and the address of a page that uses it."""
    with FakeApi() as api, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        log = tmp_path_factory.mktemp("page") / "log.txt"
        with log.open("w") as out:
            environment = os.environ | {"PTUNING_API": api.url, "PTUNING_API_KEY": "", "PTUNING_LANG": "zh"}
            process = subprocess.Popen(page_command(port=port), stdout=out, stderr=out, env=environment)
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_for(f"{url}/_stcore/health", process, log)
            yield api, url
            assert "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text()  # it holds no model
        finally:
            process.terminate()
            process.wait(10)
        assert "Traceback" not in log.read_text()


@pytest.fixture
def api(server) -> FakeApi:
    """The API in its first state, with an answer for each model."""
    fake = server[0]
    fake.reset()
    fake.answers = {"chatglm2-6b": CHUNKS, "adgen": ["<b>adgen</b> **says**"], "faq": ["好的。"]}
    return fake


@pytest.fixture
def page(server, api, browser):
    """A page in a fresh browser session, which speaks Chinese, ready for a question. It asks only this machine."""
    context = browser.new_context(viewport=WIDE, locale="en-GB", color_scheme="light")
    context.set_default_timeout(15_000)
    tab = context.new_page()
    asked = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(server[1])
    expect(tab.get_by_test_id("stChatInputTextArea")).to_be_enabled()
    yield tab
    context.close()
    away = [url for url in asked if not re.match(r"(http://127\.0\.0\.1:|data:|blob:)", url)]
    assert not away


def _wait_for(url: str, process: subprocess.Popen, log: Path) -> None:
    for _ in range(200):
        assert process.poll() is None, log.read_text()
        try:
            if httpx.get(url, trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.1)  # nothing there to wait on before it listens
    raise AssertionError(f"{url} did not come up:\n{log.read_text()}")


def ask(page, question: str) -> None:
    page.get_by_test_id("stChatInputTextArea").fill(question)
    page.keyboard.press("Enter")


def answers(page):
    """The bubbles of the assistant."""
    return page.get_by_test_id("stChatMessage").filter(has=page.get_by_test_id("stChatMessageAvatarAssistant"))


def settled(page) -> None:
    expect(page.get_by_role("button", name="停止")).to_have_count(0)
    expect(page.get_by_test_id("stChatInputTextArea")).to_be_enabled()


def choose(page, label: str, option: str) -> None:
    page.get_by_test_id("stSelectbox").filter(has_text=label).first.get_by_role("combobox").click()
    page.get_by_role("option", name=option, exact=True).click()


def shoot(page, folder: Path, name: str) -> None:
    """Screenshots at two widths, and a check that nothing is wider than the screen. Comes last in a test: the sidebar
    stays closed after the narrow one."""
    for size in (WIDE, NARROW):
        page.set_viewport_size(size)
        page.wait_for_function("width => document.documentElement.clientWidth == width", arg=size["width"])
        page.screenshot(path=folder / f"{name}-{size['width']}.png", animations="disabled")
        cut = page.evaluate("""() => [document.documentElement, ...document.querySelectorAll("[data-testid=stMain] *")]
            .filter(e => e.scrollWidth > e.clientWidth + 1 && e.clientWidth && getComputedStyle(e).display != "inline")
            .map(e => `${e.tagName} ${e.dataset.testid}: ${e.innerText?.slice(0, 40)}`)""")
        assert not cut


def test_an_answer_streams_in(page, api, tmp_path):
    api.hold("chatglm2-6b")
    ask(page, ADVERT)
    expect(page.get_by_text("等待回答")).to_be_visible()
    expect(page.get_by_text(ADVERT, exact=True)).to_be_visible()
    api.release("chatglm2-6b")
    expect(answers(page)).to_contain_text(CHUNKS[0])
    expect(page.get_by_text("正在回答")).to_be_visible()
    assert CHUNKS[1] not in answers(page).inner_text()
    page.screenshot(path=tmp_path / "streaming.png", animations="disabled")
    api.release("chatglm2-6b", 2)
    expect(answers(page)).to_contain_text(ANSWER)
    settled(page)
    assert [m["content"] for m in api.requests[0]["messages"]] == [ADVERT]
    ask(page, "再短一些")
    expect(page.get_by_text("等待回答")).to_be_visible()
    api.release("chatglm2-6b", 3)
    settled(page)
    assert [m["content"] for m in api.requests[1]["messages"]] == [ADVERT, ANSWER, "再短一些"]
    shoot(page, tmp_path, "answered")


def test_stop_closes_the_connection_and_keeps_the_part(page, api, tmp_path):
    api.hold("chatglm2-6b")
    ask(page, "介绍一下这件外套")
    api.release("chatglm2-6b")
    expect(answers(page)).to_contain_text(CHUNKS[0])
    page.get_by_role("button", name="停止").click()
    assert api.hung_up.wait(10)
    settled(page)
    expect(answers(page)).to_contain_text("已停止")
    assert CHUNKS[0] in answers(page).inner_text()
    shoot(page, tmp_path, "stopped")


def test_a_page_that_is_loaded_anew_while_it_is_answered(page, api):
    choose(page, "模型", "adgen")
    api.answers["adgen"] = CHUNKS
    api.hold("adgen")
    ask(page, "你好")
    api.release("adgen")
    expect(answers(page)).to_contain_text(CHUNKS[0])
    page.reload()
    expect(answers(page)).to_contain_text(CHUNKS[0])
    expect(page.get_by_text("正在回答")).to_be_visible()
    api.release("adgen", 2)
    expect(answers(page)).to_contain_text(ANSWER)
    settled(page)
    assert len(api.requests) == 1 and not api.hung_up.is_set()
    page.reload()
    expect(answers(page)).to_contain_text(ANSWER)
    expect(page.get_by_text("你好", exact=True)).to_be_visible()
    expect(page.get_by_test_id("stSelectbox").first.get_by_role("combobox")).to_have_value("adgen")


def test_stop_does_not_ask_a_server_that_hangs(page, api):
    api.hold("chatglm2-6b")
    ask(page, "你好")
    expect(page.get_by_text("等待回答")).to_be_visible()
    before = api.listed
    page.get_by_role("button", name="停止").click()
    settled(page)
    assert api.listed == before  # it would be waited for


def test_stop_before_the_first_token(page, api):
    api.hold("chatglm2-6b")
    ask(page, "你好")
    expect(page.get_by_text("等待回答")).to_be_visible()
    page.get_by_role("button", name="停止").click()
    assert api.hung_up.wait(10)
    settled(page)
    expect(answers(page)).to_contain_text("没有回答")


def test_a_slider_touched_meanwhile_does_not_end_the_answer(page, api):
    api.hold("chatglm2-6b")
    ask(page, "你好")
    api.release("chatglm2-6b")
    expect(answers(page)).to_contain_text(CHUNKS[0])
    page.get_by_test_id("stRadio").get_by_text("English").click()
    expect(page.get_by_text("Answering")).to_be_visible()
    api.release("chatglm2-6b", 2)
    expect(answers(page)).to_contain_text(ANSWER)
    assert len(api.requests) == 1
    assert not api.hung_up.is_set()


def test_a_closed_tab_frees_the_server(page, api):
    api.hold("chatglm2-6b")
    ask(page, "你好")
    expect(page.get_by_text("等待回答")).to_be_visible()
    page.close()
    assert api.hung_up.wait(20)


def test_another_model_and_no_html(page, api, tmp_path):
    choose(page, "模型", "adgen")
    ask(page, "<i>你好</i> *星*")
    settled(page)
    expect(answers(page)).to_contain_text("<b>adgen</b> **says**")  # neither HTML nor Markdown
    expect(page.get_by_text("<i>你好</i> *星*", exact=True)).to_be_visible()
    assert api.requests[0]["model"] == "adgen"
    page.get_by_text("按 Markdown 显示回答").click()
    expect(answers(page).locator("strong")).to_have_text("says")
    expect(answers(page)).to_contain_text("<b>adgen</b> says")
    shoot(page, tmp_path, "markdown")


def test_two_models_side_by_side(page, api, tmp_path):
    api.hold("chatglm2-6b")
    api.hold("adgen")
    page.get_by_text("并排对比两个模型").click()
    expect(page.get_by_test_id("stSelectbox").nth(1).get_by_role("combobox")).to_be_enabled()
    ask(page, ADVERT)
    expect(answers(page)).to_have_count(2)
    api.release("chatglm2-6b")
    expect(answers(page).first).to_contain_text(CHUNKS[0])
    api.release("adgen")  # the right one ends first, though the left one began first
    expect(answers(page).last).to_contain_text("adgen")
    page.screenshot(path=tmp_path / "compare-streaming.png", animations="disabled")
    api.release("chatglm2-6b", 2)
    settled(page)
    expect(answers(page).first).to_contain_text(ANSWER)
    left, right = answers(page).first.bounding_box(), answers(page).last.bounding_box()
    assert left["x"] + left["width"] <= right["x"]
    with page.expect_download() as caught:
        page.get_by_role("button", name="下载对比模型的训练数据").click()
    row = json.loads(Path(caught.value.path()).read_text(encoding="utf-8"))
    assert row == {"prompt": ADVERT, "response": "<b>adgen</b> **says**", "history": []}
    shoot(page, tmp_path, "compare")


def test_an_error_can_be_read(page, api, tmp_path):
    api.refusal = (429, {"error": {"message": "32 requests wait"}}, {"Retry-After": "7"})
    ask(page, "你好")
    expect(page.get_by_role("alert")).to_contain_text("请 7 秒后重试")
    expect(page.get_by_role("alert")).to_contain_text("32 requests wait")
    settled(page)
    page.screenshot(path=tmp_path / "error.png", animations="disabled")
    api.refusal = None
    page.get_by_role("button", name="重新回答").click()
    expect(answers(page)).to_contain_text(ANSWER)
    expect(page.get_by_role("alert")).to_have_count(0)


def test_a_turn_is_edited(page, api, tmp_path):
    ask(page, "你好")
    settled(page)
    page.get_by_role("button", name="修改").click()
    box = page.get_by_label("chatglm2-6b 的回答")
    expect(box).to_have_value(ANSWER)
    box.fill("短些。")
    page.screenshot(path=tmp_path / "editing.png", animations="disabled")
    page.get_by_role("button", name="保存", exact=True).click()
    expect(answers(page)).to_contain_text("短些。")
    expect(answers(page)).to_contain_text("已修改")
    page.get_by_role("button", name="修改").click()
    shoot(page, tmp_path, "edited")


def test_long_text_is_not_cut(page, api, tmp_path):
    api.answers["chatglm2-6b"] = ["https://example.org/" + "long" * 80, "\n\n  缩进  两个空格\n" + "很长的一行，" * 60]
    ask(page, ADVERT * 12)
    settled(page)
    expect(answers(page)).to_contain_text("  缩进  两个空格", use_inner_text=True)
    shoot(page, tmp_path, "long")


def test_the_page_scrolls_along(page, api, tmp_path):
    api.answers["chatglm2-6b"] = [f"第 {number} 行\n" for number in range(1, 81)]
    api.hold("chatglm2-6b")
    ask(page, "数到八十")
    for seen in (20, 40, 60):
        api.release("chatglm2-6b", 20)
        expect(answers(page)).to_contain_text(f"第 {seen} 行")
        expect(answers(page).get_by_test_id("stCaptionContainer")).to_be_in_viewport()  # below the last line
    page.screenshot(path=tmp_path / "scrolled.png")
    api.release("chatglm2-6b", 20)
    settled(page)
    expect(page.get_by_role("button", name="修改")).to_be_in_viewport()
    expect(page.get_by_test_id("stStatusWidget")).to_be_hidden()


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [
        ("{own}", "http://{own}", 101),
        ("localhost", None, 101),
        ("evil.example.com", None, 403),  # whose name was made to point to this machine
        ("{own}", "http://evil.example.com", 403),
    ],
)
def test_the_websocket_is_for_names_and_pages_of_its_own(server, host, origin, status):
    own = server[1].removeprefix("http://")
    headers = {"Host": host.format(own=own), "Upgrade": "websocket", "Connection": "Upgrade"}
    headers |= {"Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ=="}
    headers |= {"Origin": origin.format(own=own)} if origin else {}
    with httpx.stream("GET", f"{server[1]}/_stcore/stream", headers=headers, timeout=60) as answer:
        assert answer.status_code == status


def test_the_sidebar_on_a_small_screen_in_english(page, tmp_path):
    page.get_by_test_id("stRadio").get_by_text("English").click()
    sidebar = page.get_by_test_id("stSidebar")
    expect(sidebar.get_by_role("button", name="Clear")).to_be_disabled()
    sidebar.get_by_text("More", exact=True).click()
    expect(sidebar.get_by_text("Presence penalty")).to_be_visible()
    page.set_viewport_size({"width": 1280, "height": 1500})
    page.screenshot(path=tmp_path / "sidebar-1280.png", animations="disabled")
    page.set_viewport_size({"width": 390, "height": 1500})
    page.get_by_test_id("stExpandSidebarButton").click()
    expect(sidebar).to_be_in_viewport(ratio=0.99)
    page.screenshot(path=tmp_path / "sidebar-390.png", animations="disabled")
