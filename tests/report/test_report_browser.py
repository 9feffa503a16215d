"""The page in headless chromium: it renders, asks for nothing, and fits the screen in light and dark."""

import os
import re
import socket
import time

import psutil
import pytest

from ptuning.language import speaking
from ptuning.report import write_comparison, write_report
from ptuning.runs.lifetime import now
from tests.report.conftest import make_run, write_json

BOXES = (
    "nodes => nodes.map(n => n.getBoundingClientRect()).filter(b => b.width || b.height).map(b => [b.width, b.height])"
)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Name → path of a page."""
    folder = tmp_path_factory.mktemp("runs")
    failed = folder / "failed"
    failed.mkdir()
    write_json(failed / "outcome.json", {"status": "failed", "error": "word" * 300})
    runs = [make_run(folder / f"运行-{rate}", rate=rate, seed=i) for i, rate in enumerate((0.01, 0.05))]
    long = make_run(folder / ("很长的名字" * 16), long_option="y" * 3000)
    live = make_run(folder / "live")
    (live / "outcome.json").unlink()
    write_json(
        live / "run.lock",
        {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "started": now(),
            "create_time": psutil.Process().create_time(),
        },
    )
    with speaking("zh"):
        chinese = write_report(runs[1]).rename(folder / "chinese.html")
        many = write_comparison([*runs, *runs, *runs, long], folder / "many.html")
    return {
        "live": write_report(live),
        "chinese": chinese,
        "many": many,
        "run": write_report(runs[0]),
        "failed": write_report(failed),
        "long": write_report(long),
        "several": write_comparison([*runs, long], folder / "several.html"),
    }


@pytest.fixture
def open_page(browser, pages):
    """`open_page(name, width, scheme)` → the page, which at the end must have had no errors and no requests."""
    opened, wrong, requests = [], [], []

    def open_one(name: str, width: int = 1280, scheme: str = "light", before=lambda page: None):
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        before(page)
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(pages[name].as_uri())
        opened.append(page)
        return page

    yield open_one
    for page in opened:
        page.close()
    assert not wrong
    own = {path.as_uri() for path in pages.values()}
    assert set(requests) <= own and len(requests) >= len(opened)


def rgb(page, selector: str, what: str) -> tuple[float, ...]:
    text = page.eval_on_selector(selector, f"node => getComputedStyle(node)['{what}']")
    return tuple(float(part) for part in re.findall(r"[\d.]+", text)[:3])


def contrast(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    """WCAG 2's contrast ratio."""

    def light(color):
        parts = [c / 255 for c in color]
        parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    bright, dark = sorted((light(one), light(other)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", ["run", "failed", "long", "several", "chinese", "many"])
def test_it_fits_the_screen(open_page, name, width):
    page = open_page(name, width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    boxes = page.eval_on_selector_all("figure svg", BOXES)
    assert len(boxes) == {"run": 11, "failed": 0, "long": 11, "several": 4, "chinese": 11, "many": 4}[name]
    assert all(w > 200 and h > 80 for w, h in boxes)


def test_chinese_is_there(open_page):
    page = open_page("run")
    assert "运行-0.01" in page.inner_text("h1")
    assert "类型#上衣*材质#牛仔布" in page.inner_text("#answers")
    assert page.evaluate("document.fonts.check('16px \"Noto Sans CJK SC\"', '衬')")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read(open_page, scheme):
    page = open_page("run", scheme=scheme)
    ground = rgb(page, "body", "backgroundColor")
    assert (sum(ground) < 150) == (scheme == "dark")
    for selector in ("body", ".note", "td.good", ".label.tuned", "nav a", ".chip"):
        assert contrast(rgb(page, selector, "color"), ground) >= 4.5, selector
    # The figures follow: the text of their axes, and the curves.
    assert contrast(rgb(page, "figure svg text", "fill"), ground) >= 4.5
    strokes = page.eval_on_selector_all(
        ".roomy path[clip-path], figure > svg path[clip-path]", "nodes => nodes.map(n => getComputedStyle(n).stroke)"
    )
    assert strokes and not any(stroke.startswith("rgb(1, 1, ") for stroke in strokes)


def test_the_button_turns_it_dark_and_back(open_page):
    page = open_page("run")
    before = rgb(page, "body", "backgroundColor")
    page.click(".theme")
    assert sum(rgb(page, "body", "backgroundColor")) < 150 < sum(before)
    page.click(".theme")
    assert rgb(page, "body", "backgroundColor") == before


def test_it_prints(open_page):
    page = open_page("run", scheme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert sum(rgb(page, "body", "backgroundColor")) > 600
    assert not page.is_visible("nav")


def test_contents_lead_to_the_sections(open_page):
    page = open_page("run")
    for link in page.query_selector_all("nav a"):
        link.click()
        target = page.evaluate("location.hash")
        assert page.is_visible(f"{target} h2")


def test_a_wide_table_says_that_it_scrolls(open_page):
    page = open_page("many", 390)
    table = page.locator("#scores .scroll")
    hint = page.locator("#scores .hint")
    assert hint.is_visible() and "滑动" in hint.inner_text()
    assert "more" in table.get_attribute("class") and table.get_attribute("tabindex") == "0"
    name = page.locator("#scores tbody th").nth(1)
    before = name.bounding_box()["x"]
    table.evaluate("node => { node.scrollLeft = node.scrollWidth; }")
    hint.wait_for(state="hidden")
    assert "more" not in table.get_attribute("class")
    assert name.bounding_box()["x"] == before  # the name of the run stays in view


def test_a_table_that_fits_says_nothing(open_page):
    page = open_page("run")
    assert page.locator("#scores .hint").first.is_hidden()
    assert page.locator("#scores .scroll").first.get_attribute("tabindex") is None


def test_a_live_page_loads_itself_and_stays_where_it_was(open_page):
    page = open_page("live", before=lambda page: page.clock.install())
    assert page.locator(".live").is_visible() and page.locator("#silent").is_hidden()
    page.locator("#configuration summary").click()
    page.evaluate("scrollTo(0, 1500)")
    page.evaluate("window.before = true")
    with page.expect_navigation():
        page.clock.run_for(11_000)
    assert page.evaluate("window.before") is None
    page.wait_for_function("scrollY === 1500")
    assert page.locator("#configuration details").evaluate("node => node.open")


def test_a_live_page_that_is_read_stays(open_page):
    page = open_page("live", before=lambda page: page.clock.install())
    page.locator("h1").select_text()
    page.evaluate("window.before = true")
    page.clock.run_for(31_000)
    assert page.evaluate("window.before")


def test_a_live_page_that_went_silent_says_so(open_page):
    later = time.time() + 25 * 60
    page = open_page("live", before=lambda page: page.clock.install(time=later))
    # The page was written by another test's fixture, perhaps minutes ago.
    minutes = re.search(r"Not written for (\d+) minutes", page.locator("#silent").inner_text())
    assert minutes and 25 <= int(minutes[1]) < 60
    assert "may have stopped" in page.locator("#silent").inner_text()
