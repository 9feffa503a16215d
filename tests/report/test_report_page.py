"""The page as text, and the command."""

import json
import math
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from matplotlib.figure import Figure

from ptuning.errors import ConfigError
from ptuning.report import figures, report_command, write_comparison, write_report
from ptuning.report import page as page_module
from ptuning.report.compare import comparison_figures, differing_options, run_names, score_table, sweep_figures
from ptuning.report.figures import curve_figures
from ptuning.report.overview import few_values
from ptuning.report.read import read_run
from ptuning.report.svg import draw
from ptuning.report.text import duration, show_number, show_value
from ptuning.runs.lifetime import now
from tests.report.conftest import log_entries, make_run, write_json, write_lines

EVIL = "<script>alert(1)</script>"
AS_TEXT = "&lt;script&gt;alert(1)&lt;/script&gt;"


@pytest.fixture
def drawn() -> None:
    """The figures of this test are drawn."""


@pytest.fixture(autouse=True)
def quick_figures(request, monkeypatch) -> Iterator[None]:
    """Elsewhere they are plotted only: drawing takes nine tenths of the time."""
    kept = (figures._loss_svg, figures._line_svg, figures._histogram)
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr(Figure, "savefig", lambda self, file, **_: file.write("<svg></svg>"))
    for each in kept:
        each.cache_clear()
    yield
    for each in kept:
        each.cache_clear()


def test_text_of_others_is_never_markup(tmp_path, drawn):
    folder = make_run(tmp_path / 'run<img src=x onerror="alert(1)">', train_file=f"{EVIL}.json", evil_option=EVIL)
    for name in ("predictions.jsonl", "predictions_base.jsonl", "probe.jsonl"):
        lines = [json.loads(line) for line in (folder / name).read_text().splitlines()]
        fields = ("prompt", "labels", "predict", "base", "tuned", "kind")
        lines = [{key: EVIL if key in fields else value for key, value in line.items()} for line in lines]
        write_lines(
            folder / name, [line | {"history": [[EVIL, EVIL]], "scores": {EVIL: 1, "rouge-l": 1}} for line in lines]
        )
    write_json(folder / "outcome.json", {"status": "failed", "error": EVIL})
    metrics = json.loads((folder / "metrics.json").read_text())
    write_json(folder / "metrics.json", metrics | {"tuned": {**metrics["tuned"], EVIL: 1}})
    entries = [{**entry, f"eval_{EVIL}": 1} for entry in log_entries(10, 0.1, 0)]
    write_lines(folder / "log.jsonl", entries)
    text = write_report(folder).read_text(encoding="utf-8")
    assert EVIL not in text and "<img" not in text
    assert text.count(AS_TEXT) > 50
    assert text.count("<script") == 1
    other = make_run(tmp_path / f"other{EVIL.replace('/', '')}")
    text = write_comparison([folder, other], tmp_path / "both.html").read_text(encoding="utf-8")
    assert text.count("<script") == 1 and "<img" not in text


def test_ids_are_unique_and_links_go_somewhere(tmp_path, drawn):
    text = write_report(make_run(tmp_path)).read_text(encoding="utf-8")
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    targets = re.findall(r'href="#([^"]+)"', text) + re.findall(r"url\(#([^)]+)\)", text)
    assert set(targets) <= set(ids)
    assert "#0101" not in text  # every stand-in colour has become a variable


def test_nothing_from_elsewhere(tmp_path, drawn):
    text = write_report(make_run(tmp_path)).read_text(encoding="utf-8")
    assert "default-src 'none'" in text
    assert not re.search(r"""(?:src|href)=["'](?!#)""", text)
    assert set(re.findall(r"https?://[^\"' )]+", text)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }


def start(folder: Path, pid: int | None = None, host: str | None = None) -> Path:
    """A run that goes on: no results, and the lock of this process."""
    for name in ("predictions.jsonl", "predictions_base.jsonl", "metrics.json", "probe.jsonl", "best.json"):
        (folder / name).unlink()
    about = {"pid": pid or os.getpid(), "host": host or socket.gethostname(), "started": now()}
    write_json(folder / "run.lock", about | {"create_time": psutil.Process().create_time()})
    return folder


def test_a_run_that_goes_on(tmp_path):
    folder = start(make_run(tmp_path))
    (folder / "outcome.json").unlink()
    text = write_report(folder).read_text(encoding="utf-8")
    assert re.search(r"running, last written \d\d:\d\d:\d\d\.", text)
    assert '<meta http-equiv="refresh" content="10">' in text and "location.reload()" in text
    assert not re.search(r"No end of this run", text)
    assert text.count("<script") == 1


def test_only_the_page_that_is_written_again_loads_itself(tmp_path):
    folder = start(make_run(tmp_path))
    (folder / "outcome.json").unlink()
    text = write_report(folder, tmp_path / "copy.html").read_text(encoding="utf-8")
    assert "The run was going on when this page was written" in text and "location.reload()" not in text
    text = write_comparison([folder, folder], tmp_path / "two.html").read_text(encoding="utf-8")
    assert ">running<" in text and "location.reload()" not in text


def test_a_run_that_has_ended_does_not_load_itself(tmp_path):
    folder = start(make_run(tmp_path))
    write_json(folder / "outcome.json", {"status": "finished"})  # the run's own: it still has the lock
    text = write_report(folder).read_text(encoding="utf-8")
    assert ">finished<" in text and "refresh" not in text and "location.reload()" not in text


def test_the_outcome_of_an_earlier_run_is_not_that_of_the_one_that_goes_on(tmp_path):
    make_run(tmp_path)
    write_json(tmp_path / "outcome.json", {"status": "failed", "error": "the earlier one's"})
    os.utime(tmp_path / "outcome.json", (1, 1))
    text = write_report(start(tmp_path)).read_text(encoding="utf-8")
    assert ">running<" in text and "the earlier one" not in text


@pytest.mark.parametrize("whose", [{"pid": 2**22 + 1}, {"host": "elsewhere"}])
def test_a_killed_run_left_its_lock(tmp_path, whose):
    folder = start(make_run(tmp_path), **whose)
    (folder / "outcome.json").unlink()
    text = write_report(folder).read_text(encoding="utf-8")
    assert "No end of this run is recorded" in text and "location.reload()" not in text


def test_few_values_are_a_table_and_no_figures(tmp_path):
    make_run(tmp_path)
    entries = [entry for entry in log_entries(200, 0.1, 0) if "eval_loss" not in entry]
    evaluated = [entry for entry in log_entries(200, 0.1, 0) if "eval_loss" in entry]
    write_lines(tmp_path / "log.jsonl", entries + evaluated[-2:])
    run = read_run(tmp_path)
    steps, rows = few_values(run)
    assert steps == [175, 200]
    assert [name for name, _ in rows] == ["eval loss", "Eval perplexity", "Eval BLEU-4", "Eval ROUGE-L"]
    assert rows[0][1] == [evaluated[-2]["eval_loss"], evaluated[-1]["eval_loss"]]
    titles = [figure.title for figure in curve_figures(run)]
    assert titles[0] == "Loss" and not any(title.startswith("Eval") for title in titles)
    write_lines(tmp_path / "log.jsonl", entries[:2] + evaluated[:1])
    assert curve_figures(read_run(tmp_path)) == []
    assert "No steps were logged" not in write_report(tmp_path).read_text(encoding="utf-8")


def test_a_change_that_may_be_chance_is_grey(tmp_path):
    make_run(tmp_path)

    def classes() -> dict[str, str]:
        text = write_report(tmp_path).read_text(encoding="utf-8")
        table = text[text.index('<section id="scores">') : text.index('<section id="answers">')]
        rows = re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)
        cells = [re.findall(r'<t[hd][^>]*?(?:class="n([^"]*)")?>([^<]*)', row) for row in rows]
        return {row[0][1]: row[-1][0].strip() for row in cells}

    look = classes()
    assert (look["BLEU-4"], look["exact match %"], look["empty %"]) == ("good", "muted", "")
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    metrics["change"]["bleu-4"]["verdict"] = "too few rows"
    write_json(tmp_path / "metrics.json", metrics)
    assert classes()["BLEU-4"] == "muted"
    del metrics["change"]  # an older evaluation: the intervals of base and tuned decide
    metrics["base"]["intervals"]["rouge-l"] = [0, 99]
    write_json(tmp_path / "metrics.json", metrics)
    assert (classes()["BLEU-4"], classes()["ROUGE-L"]) == ("good", "muted")


def test_a_change_of_the_probe_that_may_be_chance_is_grey(tmp_path):
    make_run(tmp_path)
    assert 'class="n">+0.3000<' in write_report(tmp_path).read_text(encoding="utf-8")
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    metrics["probe"]["interval"] = [-0.1, 0.4]
    write_json(tmp_path / "metrics.json", metrics)
    assert write_report(tmp_path).read_text(encoding="utf-8").count('class="n muted">+0.3000<') == 1


def test_differences_leave_out_spellings_and_logging(tmp_path, monkeypatch):
    file = tmp_path / "data" / "train.json"
    file.parent.mkdir()
    file.write_text("[]")
    spellings = ("data/train.json", "./data/train.json", str(file), "../data/train.json")
    mixes = [[f"{spelling}:0.1"] for spelling in spellings]
    folders = []
    for i, spelling in enumerate(spellings):
        beside = {"logging_steps": i, "report_to": [str(i)], "save_steps": i, "run_name": str(i), "output_dir": str(i)}
        same = {"model_name_or_path": ("a/model", "./a/model", f"{tmp_path}/a/model", "a/model")[i]}  # which is gone
        folder = make_run(tmp_path / f"run{i}", train_file=spelling, mix=mixes[i], pre_seq_len=64 * i, **beside, **same)
        record = json.loads((folder / "run.json").read_text())
        write_json(folder / "run.json", record | {"cwd": str(tmp_path / "data" if i == 3 else tmp_path)})
        folders.append(folder)
    assert [key for key, _ in differing_options([read_run(folder) for folder in folders])] == ["pre_seq_len"]
    other = make_run(tmp_path / "other", train_file="data/other.json", mix=mixes[0], pre_seq_len=0)
    found = dict(differing_options([read_run(folders[0]), read_run(other)]))
    assert found["train_file"] == ["data/train.json", "data/other.json"]


def test_two_evaluations_of_each_run_are_a_small_figure(tmp_path):
    folders = [make_run(tmp_path / str(i), steps=200, seed=i) for i in range(2)]
    for folder in folders:
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        evaluated = [line for line in lines if "eval_loss" in line]
        write_lines(folder / "log.jsonl", [line for line in lines if "eval_loss" not in line] + evaluated[:2])
    wide = {figure.title: figure.wide for figure in comparison_figures([read_run(folder) for folder in folders])}
    assert wide["Training loss"] and not wide["Eval loss"] and not wide["Eval BLEU-4"]


def test_a_page_in_chinese(tmp_path, capsys, drawn):
    folder = make_run(tmp_path / "demo")
    assert report_command([str(folder), "--lang", "zh"]) == 0
    assert capsys.readouterr().out == f"已写入 {folder / 'report.html'}\n"
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert '<html lang="zh-CN">' in text and "遗忘探测" in text and "完全相同 %" in text
    english = {"Curves", "Answers", "finished", "tuned", "metric", "Light / dark", "Best", "reference", "rows", "step"}
    said = set(re.findall(r">\s*([^<>]+?)\s*<", re.sub(r"<script.*?</script>", "", text, flags=re.S)))
    assert not said & english
    text = write_comparison([folder, folder], tmp_path / "two.html").read_text(encoding="utf-8")
    assert "2 runs compared" in text  # the command's language ended with it


def test_a_run_that_failed_early(tmp_path):
    write_json(tmp_path / "outcome.json", {"status": "failed", "error": "TrainingError: the loss is NaN at step 3"})
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert "the loss is NaN at step 3" in text and "No predictions were written." in text


@pytest.mark.parametrize(("outcome", "words"), [({"status": "interrupted"}, "interrupted"), ({}, "No end of this run")])
def test_how_it_ended(tmp_path, outcome, words):
    make_run(tmp_path)
    (tmp_path / "outcome.json").unlink()
    if outcome:
        write_json(tmp_path / "outcome.json", outcome)
    assert words in write_report(tmp_path).read_text(encoding="utf-8")


def test_nan_in_every_place(tmp_path):
    make_run(tmp_path)
    entries = [{key: value if key == "step" else math.nan for key, value in e.items()} for e in log_entries(50, 0.1, 0)]
    write_lines(tmp_path / "log.jsonl", entries)
    scores = {"bleu-4": math.nan, "rouge-l": math.inf, "intervals": {"bleu-4": [math.nan, 1], "rouge-l": "x"}}
    write_json(tmp_path / "metrics.json", {"tuned": scores, "base": scores, "probe": {"rows": math.nan}})
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert "loss was never finite: all 50 values from step 1 on" in text


def test_some_nan_is_noted_under_the_figure(tmp_path):
    entries = list(log_entries(50, 0.1, 0))
    entries[30]["loss"] = math.inf
    write_lines(tmp_path / "log.jsonl", entries)
    assert "1 value is NaN or infinite" in write_report(tmp_path).read_text(encoding="utf-8")


@pytest.mark.usefixtures("drawn")
def test_numbers_of_a_logarithmic_axis_are_no_formulas(tmp_path):
    entries = list(log_entries(50, 0.1, 0))
    entries[30]["loss"] = 1e5
    write_lines(tmp_path / "log.jsonl", entries)
    loss = curve_figures(read_run(tmp_path))[0].svg
    numbers = re.findall(r"<text[^>]*>([^<]*)</text>", loss)
    assert {"1", "100000"} <= set(numbers) and not [number for number in numbers if "$" in number]


@pytest.mark.usefixtures("drawn")
def test_what_is_written_beside_the_axes_has_room():
    """Also in Chinese, whose letters are wider, and where it is long."""
    for label in ("0", "1,234,567,890", "训练与验证"):

        def plot(axes, label=label):
            axes.plot([0, 1], [0, 1])
            axes.set_yticks([0, 1], [label, label])
            axes.set_ylabel("rows")
            axes.set_xlabel("step")

        svg = draw(plot)
        width, height = map(float, re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg).groups())
        points = re.findall(r'<path d="M ([\d.]+) ([\d.]+)', svg)
        points = [(x, y) for x, y in points if float(x) > 0]  # without the background's
        left, bottom = min(float(x) for x, _ in points), height - max(float(y) for _, y in points)
        letters = 10 * len(label) if label > "a" else 6.3 * len(label)
        assert letters + 14 < left < letters + 40 < width and 28 < bottom < 50


def test_the_size_is_bounded(tmp_path, drawn):
    make_run(tmp_path, steps=30_000, another="x" * 100_000)
    for name in ("predictions.jsonl", "probe.jsonl"):
        lines = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        long = {
            "prompt": "长" * 50_000,
            "predict": "长" * 50_000,
            "tuned": "长" * 50_000,
            "history": [["长" * 9999] * 2] * 9,
        }
        write_lines(tmp_path / name, [line | long for line in lines])
    write_json(tmp_path / "outcome.json", {"status": "failed", "error": "e" * 1_000_000})
    path = write_report(tmp_path)
    assert path.stat().st_size < 2_000_000
    assert "48,800 more characters" in path.read_text(encoding="utf-8")


def test_a_lone_surrogate(tmp_path):
    make_run(tmp_path, rows=1)
    line = (tmp_path / "predictions.jsonl").read_text().replace("编号", "\\ud83d")
    (tmp_path / "predictions.jsonl").write_text(line)
    assert "</html>" in write_report(tmp_path).read_text(encoding="utf-8")


def test_the_old_page_stays_when_writing_fails(tmp_path, monkeypatch):
    path = write_report(make_run(tmp_path))
    before = path.read_bytes()

    def no_space(self, target):
        raise OSError("No space left on device")

    monkeypatch.setattr(page_module.Path, "replace", no_space)
    with pytest.raises(ConfigError, match="No space left"):
        report_command([str(tmp_path)])
    assert path.read_bytes() == before
    assert not list(tmp_path.glob(".report*"))


def test_several_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [make_run(tmp_path / f"lr-{rate}", rate=rate, seed=i) for i, rate in enumerate((0.01, 0.05, 0.2))]
    runs = [read_run(folder) for folder in folders]
    assert [key for key, _ in differing_options(runs)] == ["learning_rate"]
    metrics, rows = score_table(runs)
    assert metrics[:2] == ["eval_loss", "bleu-4"]
    assert [row["model"] for row in rows] == ["base", "tuned", "tuned", "tuned"]  # the base is the same for all
    assert [row["run"].name for row in rows if "bleu-4" in row["best"]] == ["lr-0.05"]
    assert [figure.title for figure in sweep_figures(runs)] == ["eval loss by learning_rate", "BLEU-4 by learning_rate"]
    assert report_command([str(folder) for folder in folders]) == 0
    assert capsys.readouterr().out == "Wrote report.html\n"
    text = Path("report.html").read_text(encoding="utf-8")
    assert all(f"lr-{rate}" in text for rate in ("0.01", "0.05", "0.2")) and text.count("<figure") == 6


def test_runs_with_little_in_common(tmp_path):
    whole, empty = make_run(tmp_path / "a"), tmp_path / "b"
    empty.mkdir()
    write_json(empty / "outcome.json", {"status": "failed"})
    text = write_comparison([whole, empty, whole], tmp_path / "out" / "page.html").read_text(encoding="utf-8")
    assert "3 runs compared" in text
    assert "None of the runs has scores yet" in write_comparison([empty] * 2, tmp_path / "x.html").read_text()


def test_names_tell_runs_apart(tmp_path):
    folders = [tmp_path / "a" / "run", tmp_path / "b" / "run"]
    assert run_names(folders) == ["a/run", "b/run"]
    assert run_names([tmp_path / "x", tmp_path / "y"]) == ["x", "y"]
    assert len(set(run_names([tmp_path, tmp_path]))) == 2


def test_the_command_on_one_run(tmp_path, capsys):
    folder = make_run(tmp_path / "demo")
    assert report_command([str(folder)]) == 0
    assert capsys.readouterr().out == f"Wrote {folder / 'report.html'}\n"
    assert report_command([str(folder), "--output", str(tmp_path / "elsewhere.html")]) == 0
    assert (tmp_path / "elsewhere.html").is_file()


def test_what_the_command_refuses(tmp_path):
    with pytest.raises(ConfigError, match="not a folder"):
        report_command([str(tmp_path / "none")])
    with pytest.raises(ConfigError, match="no run in it"):
        report_command([str(tmp_path)])
    make_run(tmp_path)
    with pytest.raises(ConfigError, match="is a folder; give a file name"):
        report_command([str(tmp_path), "--output", str(tmp_path)])


def test_values_as_text():
    assert [show_number(value) for value in (None, 12345, 0.000012345, 0.91234, 12.3456, -1.5, math.nan, 0.0)] == [
        *("–", "12,345", "1.234e-05", "0.9123", "12.35", "−1.500", "NaN", "0")
    ]
    assert [show_value(value) for value in (None, True, "", " a", ["x", "y"], {"中": 1}, 2e-5)] == [
        *("–", "true", '""', '" a"', "x y", '{"中": 1}', "2e-05")
    ]
    assert [duration(seconds) for seconds in (5, 65, 3700, 200_000)] == ["5.0 s", "1 min 5 s", "1 h 1 min", "2 d 7 h"]


def test_several_runs_show_what_each_costs_and_what_it_forgot(tmp_path):
    one, other = make_run(tmp_path / "one"), make_run(tmp_path / "other")
    write_json(one / "run.json", json.loads((one / "run.json").read_text()) | {"method": "LoRA", "trained": 104448})
    (other / "metrics.json").unlink()
    text = write_comparison([one, other], tmp_path / "both.html").read_text(encoding="utf-8")
    first, second = (
        [re.sub(r"<[^>]+>", "", cell).strip() for cell in re.findall(r"<td.*?</td>", row, re.DOTALL)]
        for row in re.findall(r"<tr>.*?</tr>", text.split('<section id="runs">')[1], re.DOTALL)[1:]
    )
    assert first[1:3] == ["LoRA", "104,448"] and first[4:8] == ["50.0", "13.60", "33 %", "0.60 → 0.90"]
    assert second[2] == "–" and second[6:8] == ["", ""]
    assert "The last two figures are the forgetting probe" in text
