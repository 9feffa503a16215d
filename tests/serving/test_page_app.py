"""The page under Streamlit's AppTest: the script runs for real, without a browser, against a small API."""

import json
import re
import socket
import sys
from pathlib import Path

import pytest

from tests.conftest import REPO
from tests.serving.conftest import running
from tests.serving.page_fake_api import FakeApi
from tests.serving.page_modules import FOLDER

st = pytest.importorskip("streamlit", reason="streamlit is not installed")
from streamlit.testing.v1 import AppTest  # noqa: E402

ADVERT = "类型#上衣*材质#牛仔布"


@pytest.fixture
def api(monkeypatch):
    with FakeApi() as fake:
        monkeypatch.setenv("PTUNING_API", fake.url)
        monkeypatch.delenv("PTUNING_API_KEY", raising=False)
        monkeypatch.setenv("PTUNING_LANG", "zh")
        yield fake


@pytest.fixture
def page(api):
    """A new session in Chinese."""
    return opened()


def opened(**address):
    at = AppTest.from_file(FOLDER / "page.py", default_timeout=120)
    at.query_params.update(address)
    at.run()
    assert not at.exception
    return at


def client_module():
    """The client that the page under AppTest uses."""
    return sys.modules["page_client"]


def ask(at, question: str):
    at.chat_input[0].set_value(question).run()
    assert not at.exception
    return at


def click(at, key: str):
    at.button(key=key).click().run()
    assert not at.exception
    return at


def texts(at) -> list[str]:
    """The questions and answers, from top to bottom."""
    return [element.value for element in at.text]


def captions(at) -> str:
    return re.sub(r"\\(.)", r"\1", " / ".join(element.value for element in at.caption))


def errors(at) -> str:
    return re.sub(r"\\(.)", r"\1", " / ".join(element.value for element in at.error))


@pytest.fixture
def files(monkeypatch) -> dict[str, str]:
    """What each download button holds, by its key. AppTest keeps no files."""
    held = {}
    real = st.download_button

    def noted(label, data, *args, **kwargs):
        held[kwargs["key"]] = data
        return real(label, data, *args, **kwargs)

    monkeypatch.setattr(st, "download_button", noted)
    return held


def rows(data: str) -> list[dict]:
    return [json.loads(line) for line in data.splitlines()]


def test_a_question_is_answered(page, api):
    assert "输入问题" in captions(page)
    ask(page, ADVERT)
    assert texts(page) == [ADVERT, f"chatglm2-6b: {ADVERT}"]
    ask(page, "再短一些")
    sent = [message["content"] for message in api.requests[1]["messages"]]
    assert sent == [ADVERT, f"chatglm2-6b: {ADVERT}", "再短一些"]


def test_blank_is_no_question(page, api):
    ask(page, " \n ")
    assert not texts(page)
    assert not api.requests


def test_settings_reach_the_api(page, api):
    page.slider(key="temperature").set_value(0.0)
    page.slider(key="top_p").set_value(0.5)
    page.slider(key="frequency_penalty").set_value(0.5)
    page.number_input(key="max_tokens").set_value(33)
    page.number_input(key="seed").set_value(7)
    page.text_area(key="system").set_value("只用中文回答。")
    page.selectbox(key="model_a").set_value("faq")
    ask(page, "你好")
    sent = api.requests[0]
    assert sent.pop("messages")[0] == {"role": "system", "content": "只用中文回答。"}
    assert sent == {
        "model": "faq",
        "stream": True,
        "temperature": 0.0,
        "top_p": 0.5,
        "max_tokens": 33,
        "seed": 7,
        "frequency_penalty": 0.5,
    }
    assert [type(sent[name]) for name in ("temperature", "max_tokens", "seed")] == [float, int, int]


@pytest.mark.parametrize(("setting", "label"), [("zh", "模型"), ("en", "Model")])
def test_the_language_is_that_of_the_terminal(api, monkeypatch, setting, label):
    monkeypatch.setenv("PTUNING_LANG", setting)
    assert opened().selectbox(key="model_a").label == label
    monkeypatch.delenv("PTUNING_LANG")
    monkeypatch.setenv("LC_ALL", {"zh": "zh_CN.UTF-8", "en": "C.UTF-8"}[setting])
    assert opened().selectbox(key="model_a").label == label


def test_a_language_that_is_not_there(api, monkeypatch):
    monkeypatch.setenv("PTUNING_LANG", "fr")
    assert "PTUNING_LANG is 'fr' in the environment; there are zh and en" in errors(opened())


def test_another_language_loses_nothing(page, api):
    ask(page, "你好")
    page.slider(key="temperature").set_value(0.3)
    page.selectbox(key="model_a").set_value("adgen").run()
    page.text_area(key="system").set_value("Be brief.").run()
    page.radio(key="language").set_value("en").run()
    assert page.button(key="edit_0").label == "Edit"
    assert page.selectbox(key="model_a").label == "Model"
    assert page.selectbox(key="model_a").value == "adgen"
    assert page.slider(key="temperature").value == 0.3
    assert page.text_area(key="system").value == "Be brief."
    assert texts(page) == ["你好", "chatglm2-6b: 你好"]
    page.radio(key="language").set_value("zh").run()
    assert page.button(key="edit_0").label == "修改"
    assert page.selectbox(key="model_a").value == "adgen"


def test_another_model_answers_with_the_same_history(page, api):
    ask(page, "一")
    page.selectbox(key="model_a").set_value("adgen").run()
    ask(page, "二")
    assert [request["model"] for request in api.requests] == ["chatglm2-6b", "adgen"]
    assert "chatglm2-6b: 一" in [message["content"] for message in api.requests[1]["messages"]]
    assert "chatglm2-6b / adgen" in captions(page)


def test_it_opens_on_the_newest_prefix(api):
    api.saved = {"adgen": 1_600_000_000, "faq": 1_700_000_000}
    at = opened()
    assert (at.selectbox(key="model_a").value, at.selectbox(key="model_b").value) == ("faq", "chatglm2-6b")
    assert at.selectbox(key="model_a").options == ["chatglm2-6b", "adgen", "faq"]


def test_a_page_that_is_loaded_anew_goes_on(page, api):
    page.slider(key="temperature").set_value(0.3)
    page.selectbox(key="model_a").set_value("adgen").run()
    ask(page, "你好")
    again = opened(chat=page.query_params["chat"])
    assert texts(again) == ["你好", "adgen: 你好"]
    assert again.slider(key="temperature").value == 0.3 and again.selectbox(key="model_a").value == "adgen"
    ask(again, "再见")
    assert [m["content"] for m in api.requests[1]["messages"]] == ["你好", "adgen: 你好", "再见"]
    other = opened(chat="a-name-of-my-own")  # nobody's: a conversation of its own, under another name
    assert not texts(other) and other.query_params["chat"] not in (page.query_params["chat"], "a-name-of-my-own")


def test_no_deploy_button_however_started(page):
    """Streamlit has the button under this name, and the page hides it."""
    (style,) = [element.proto.body for element in page.get("html")]
    assert "[data-testid=stAppDeployButton]" in style and "display: none" in style
    static = Path(st.__file__).parent / "static" / "static" / "js"
    assert any("stAppDeployButton" in file.read_text(encoding="utf-8") for file in static.glob("*.js"))


def test_a_server_that_hangs_is_not_waited_for_at_each_click(page, api, monkeypatch):
    silent = socket.create_server(("127.0.0.1", 0))
    monkeypatch.setattr(client_module(), "CONNECT_S", 0.2)
    monkeypatch.setenv("PTUNING_API", f"http://127.0.0.1:{silent.getsockname()[1]}")
    page.run()
    assert "太久没有回应" in errors(page)
    monkeypatch.setenv("PTUNING_API", api.url)
    before = api.listed
    page.slider(key="temperature").set_value(0.3).run()
    assert api.listed == before and "太久没有回应" in errors(page)
    click(page, "reload")
    assert api.listed == before + 1 and not page.error
    silent.close()


def test_a_model_that_was_removed(page, api):
    page.selectbox(key="model_a").set_value("faq").run()
    api.models.remove("faq")
    ask(page, "你好")
    assert "没有这个模型" in errors(page)
    assert "there are chatglm2-6b, adgen" in errors(page)
    assert page.selectbox(key="model_a").options == ["chatglm2-6b", "adgen"]
    click(page, "again_0")
    assert not page.error
    assert texts(page) == ["你好", "chatglm2-6b: 你好"]


def test_two_models(page, api, files):
    ask(page, "一")
    page.toggle(key="compare").set_value(True).run()
    page.selectbox(key="model_b").set_value("faq").run()
    ask(page, "二")
    ask(page, "三")
    assert texts(page) == [
        "一",
        "chatglm2-6b: 一",
        "二",
        "chatglm2-6b: 二",
        "faq: 二",
        "三",
        "chatglm2-6b: 三",
        "faq: 三",
    ]
    last = {request["model"]: [m["content"] for m in request["messages"]] for request in api.requests[-2:]}
    assert last == {
        "chatglm2-6b": ["一", "chatglm2-6b: 一", "二", "chatglm2-6b: 二", "三"],
        "faq": ["一", "chatglm2-6b: 一", "二", "faq: 二", "三"],  # the first turn had only one answer
    }
    assert [row["response"] for row in rows(files["download_rows_b"])] == ["faq: 二", "faq: 三"]
    assert len(rows(files["download_rows_a"])) == 3


def test_one_of_two_models_fails(page, api):
    page.toggle(key="compare").set_value(True).run()
    api.models.remove("adgen")  # after it was chosen
    ask(page, "你好")
    assert texts(page) == ["你好", "chatglm2-6b: 你好"]
    assert "没有这个模型" in errors(page)


def test_clear(page, api, files):
    page.text_area(key="system").set_value("短").run()
    ask(page, "你好")
    click(page, "clear")
    assert not texts(page)
    assert page.button(key="clear").disabled
    assert page.text_area(key="system").value == "短"
    ask(page, "再见")
    assert [m["role"] for m in api.requests[1]["messages"]] == ["system", "user"]


def test_an_answer_is_edited(page, api, files):
    ask(page, "你好")
    click(page, "edit_0")
    page.text_area(key="answer_0_a").set_value("你好！")
    page.text_area(key="question_0").set_value("您好")
    click(page, "save_0")
    assert texts(page) == ["您好", "你好！"]
    assert "已修改" in captions(page)
    assert len(api.requests) == 1
    assert rows(files["download_rows_a"]) == [{"prompt": "您好", "response": "你好！", "history": []}]
    ask(page, "再见")
    assert [m["content"] for m in api.requests[1]["messages"]] == ["您好", "你好！", "再见"]


def test_a_question_is_edited_and_asked_again(page, api):
    for question in ("一", "二", "三"):
        ask(page, question)
    click(page, "edit_1")
    page.text_area(key="question_1").set_value("贰")
    click(page, "ask_1")
    assert texts(page) == ["一", "chatglm2-6b: 一", "贰", "chatglm2-6b: 贰"]
    assert [m["content"] for m in api.requests[-1]["messages"]] == ["一", "chatglm2-6b: 一", "贰"]


def test_an_edit_is_cancelled_or_refused(page, api):
    ask(page, "你好")
    click(page, "edit_0")
    page.text_area(key="question_0").set_value(" ")
    click(page, "save_0")
    assert "问题不能为空" in errors(page)
    click(page, "cancel_0")
    assert texts(page) == ["你好", "chatglm2-6b: 你好"]
    click(page, "edit_0")
    assert page.text_area(key="question_0").value == "你好"
    assert not page.error


def test_delete_and_again(page, api):
    ask(page, "一")
    ask(page, "二")
    api.answers["chatglm2-6b"] = ["新的"]
    click(page, "again_1")
    assert texts(page) == ["一", "chatglm2-6b: 一", "二", "新的"]
    click(page, "delete_0")
    assert texts(page) == ["二", "新的"]


def test_downloads(page, api, files):
    ask(page, ADVERT)
    api.finish = "length"
    ask(page, "再长一些")
    assert "达到 token 数上限" in captions(page)
    api.finish = "stop"
    ask(page, "谢谢")
    first, third = rows(files["download_rows_a"])  # the one that was cut off would teach to break off
    assert first == {"prompt": ADVERT, "response": f"chatglm2-6b: {ADVERT}", "history": []}
    assert third["prompt"] == "谢谢"
    assert third["history"] == [[ADVERT, f"chatglm2-6b: {ADVERT}"], ["再长一些", "chatglm2-6b: 再长一些"]]
    told = json.loads(files["download_chat"])
    assert [turn["question"] for turn in told["turns"]] == [ADVERT, "再长一些", "谢谢"]
    assert told["turns"][1]["answers"][0]["state"] == "length"
    assert told["settings"]["model_a"] == "chatglm2-6b"


def test_dropped_turns_are_told(page, api):
    api.headers = {"X-History-Dropped": "3"}
    ask(page, "你好")
    assert "最早的 3 轮" in captions(page)


def test_an_answer_that_breaks_off(page, api, files):
    api.broken = True
    ask(page, "你好")
    assert texts(page) == ["你好", "chatglm2-6b: 你好"]
    assert "连接就断开了" in errors(page)
    assert "未完" in captions(page)
    assert not rows(files["download_rows_a"])


def test_busy(page, api):
    api.refusal = (429, {"error": {"message": "32 *requests* wait <b>"}}, {"Retry-After": "7"})
    ask(page, "你好")
    assert "请 7 秒后重试" in errors(page)
    assert "32 \\*requests\\* wait \\<b\\>" in page.error[0].value  # shown as it is, not as Markdown
    assert texts(page) == ["你好"]
    api.refusal = None
    ask(page, "在吗")
    assert [m["content"] for m in api.requests[1]["messages"]] == ["在吗"]  # no turn without an answer


def test_keys(api, monkeypatch):
    api.key = "secret"
    at = opened()
    assert "PTUNING_API_KEY" in errors(at)
    assert at.chat_input[0].disabled
    monkeypatch.setenv("PTUNING_API_KEY", "wrong")
    click(at, "reload")
    assert "不接受这个密钥" in errors(at)
    monkeypatch.setenv("PTUNING_API_KEY", "secret")
    click(at, "reload")
    assert not at.error
    assert texts(ask(at, "你好")) == ["你好", "chatglm2-6b: 你好"]


def test_the_server_is_down(api, monkeypatch, free_port):
    down = f"http://127.0.0.1:{free_port}"
    monkeypatch.setenv("PTUNING_API", down)
    at = opened()
    assert down in errors(at)
    assert "bash scripts/serve.sh" in errors(at)
    at.radio(key="language").set_value("en").run()
    assert "Can't reach the API" in errors(at)
    monkeypatch.setenv("PTUNING_API", api.url)
    click(at, "reload")
    ask(at, "你好")
    monkeypatch.setenv("PTUNING_API", down)
    ask(at, "还在吗")  # what was said stays on the screen
    assert texts(at) == ["你好", "chatglm2-6b: 你好", "还在吗"]
    assert "Can't reach the API" in errors(at)


def test_no_models(api):
    api.models = []
    at = opened()
    assert "没有任何模型" in at.warning[0].value
    assert at.chat_input[0].disabled


def test_one_model(api):
    api.models = ["only"]
    at = opened()
    at.toggle(key="compare").set_value(True).run()
    ask(at, "你好")
    assert texts(at) == ["你好", "only: 你好", "only: 你好"]


@pytest.mark.parametrize("prefix", ["chatglm2-tiny", "ads"])
def test_the_real_server(server, monkeypatch, prefix):
    monkeypatch.setenv("PTUNING_API", server.url)
    at = opened()
    assert set(at.selectbox(key="model_a").options) == {"chatglm2-tiny", "ads", "talk", "proj"}
    at.slider(key="temperature").set_value(0.0)
    at.number_input(key="max_tokens").set_value(8)
    at.selectbox(key="model_a").set_value(prefix).run()
    ask(at, "你好")
    assert not at.error
    expected = server.chat(model=prefix).json()["choices"][0]["message"]["content"]
    assert texts(at) == ["你好", *([expected] if expected else [])]
    at.slider(key="frequency_penalty").set_value(0.5)
    at.slider(key="presence_penalty").set_value(-0.5)
    at.number_input(key="seed").set_value(3)
    ask(at, "再见")
    assert not at.error  # every field is one that the server knows


def test_a_server_of_another_family(monkeypatch):
    with running({}, model=str(REPO / "models" / "baichuan-tiny")) as server:
        monkeypatch.setenv("PTUNING_API", server.url)
        at = opened()
        assert at.selectbox(key="model_a").options == ["baichuan-tiny"]
        at.slider(key="temperature").set_value(0.0)
        at.number_input(key="max_tokens").set_value(8)
        at.text_area(key="system").set_value("只用中文回答。")
        ask(ask(at, "你好"), "再见")
        assert not at.error
        said = [{"role": "system", "content": "只用中文回答。"}]
        for question in ("你好", "再见"):
            said.append({"role": "user", "content": question})
            body = {"model": "base", "messages": said, "temperature": 0, "max_tokens": 8}
            answer = server.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"]
            said.append({"role": "assistant", "content": answer})
        assert texts(at) == [message["content"] for message in said[1:]] and all(texts(at))
