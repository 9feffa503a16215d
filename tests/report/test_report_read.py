"""A run folder read back: whole, in part, damaged, huge."""

import json
import math
import os

import pytest
from matplotlib.figure import Figure

from ptuning.errors import ConfigError
from ptuning.report.answers import SHOWN
from ptuning.report.answers import read_predictions as read_predictions_of
from ptuning.report.page import render_run
from ptuning.report.read import MAX_POINTS, Curve, curves_of, read_run
from ptuning.report.text import number
from ptuning.runs import RunFolder
from ptuning.runs.lines import Lines
from tests.report.conftest import make_run, prediction, write_json, write_lines


def read_predictions(folder):
    return read_predictions_of(RunFolder(folder))


def test_a_whole_run(tmp_path):
    run = read_run(make_run(tmp_path / "demo"))
    assert (run.name, run.status, run.method, run.problems) == ("demo", "finished", "prefix of 128", [])
    assert len(run.curves["loss"]) == 200 and len(run.curves["eval_loss"]) == 8
    assert run.predictions.rows == {"tuned": 40, "base": 40}
    assert [len(rows) for rows in run.predictions.groups.values()] == [SHOWN] * 3
    assert [kind.name for kind in run.probe.kinds] == ["常识", "数学", "写作"]
    assert run.probe.total.rows == 12 and run.probe.total.change == pytest.approx(0.3)


def test_the_method_is_the_records_own_word(tmp_path):
    folder = make_run(tmp_path)
    record = json.loads((folder / "run.json").read_text())
    for words, shown in (("LoRA of rank 8", "LoRA of rank 8"), ("", "prefix of 128"), ([1], "prefix of 128")):
        write_json(folder / "run.json", record | {"method": words})
        assert read_run(folder).method == shown


def test_best_and_worst_are_by_the_tuned_rouge_l(tmp_path):
    found = read_predictions(make_run(tmp_path))
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    order = sorted(lines, key=lambda line: -line["scores"]["rouge-l"])
    assert [row.index for row in found.groups["Best"]] == [line["index"] for line in order[:SHOWN]]
    assert [row.index for row in found.groups["Worst"]] == [line["index"] for line in order[::-1][:SHOWN]]
    shown = [row.index for rows in found.groups.values() for row in rows]
    assert len(set(shown)) == len(shown)
    assert found.groups["Best"][0].base is not None and found.groups["Best"][0].tuned.loss == pytest.approx(1.2)
    again = read_predictions(tmp_path)
    assert again.groups["Random"] == found.groups["Random"]


@pytest.mark.parametrize("left", [0, 1, 3, 7])
def test_few_rows_are_shown_once(tmp_path, left):
    found = read_predictions(make_run(tmp_path, rows=left)) if left else read_predictions(tmp_path)
    assert sum(len(rows) for rows in found.groups.values()) == left


@pytest.mark.parametrize("only", ["predictions.jsonl", "predictions_base.jsonl"])
def test_one_model_alone(tmp_path, only):
    make_run(tmp_path)
    for name in {"predictions.jsonl", "predictions_base.jsonl"} - {only}:
        (tmp_path / name).unlink()
    found = read_predictions(tmp_path)
    model = "tuned" if only == "predictions.jsonl" else "base"
    assert found.rows == {model: 40} and found.ranked_by == model
    assert getattr(found.groups["Best"][0], "base" if model == "tuned" else "tuned") is None


def test_an_evaluation_that_was_cut_off(tmp_path, tmp_path_factory):
    make_run(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    (tmp_path / "predictions.jsonl").unlink()
    for process in (0, 1):
        head = {"key": "0123456789abcdef"}  # ResumableLines writes it
        write_lines(tmp_path / f"predictions.part{process}.jsonl", [head, *lines[process:10:2]])
    found = read_predictions(tmp_path)
    assert found.partial and found.rows["tuned"] == 10 and found.bad == 0


def test_part_files_count_only_where_they_are_newer(tmp_path):
    make_run(tmp_path)
    part = tmp_path / "predictions.part0.jsonl"
    write_lines(part, [{"key": "0"}])
    os.utime(part, (1, 1))
    assert read_predictions(tmp_path).rows["tuned"] == 40


@pytest.mark.parametrize(
    "file",
    ["run.json", "log.jsonl", "data.json", "metrics.json", "predictions.jsonl", "probe.jsonl", "outcome.json"],
)
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "bytes", "a list", "wrong types", "a folder"])
def test_any_file_may_be_damaged(tmp_path, monkeypatch, file, damage):
    # Laying out the axes is most of a page's time and doesn't depend on what is damaged.
    monkeypatch.setattr(Figure, "savefig", lambda self, file, **_: file.write("<svg></svg>"))
    path = make_run(tmp_path, steps=60, rows=12) / file
    whole = path.read_bytes()
    wrong = json.dumps({key: {"x": [None, math.nan]} for key in json.loads(whole.splitlines()[0])})
    path.unlink()
    if damage == "a folder":
        path.mkdir()
    elif damage != "missing":
        damaged = {"empty": b"", "cut": whole[: len(whole) * 2 // 3], "bytes": b"\xff\x00\n" * 9, "a list": b"[1]\n"}
        path.write_bytes(damaged.get(damage, wrong.encode()))
    run = read_run(tmp_path)
    assert "</html>" in render_run(run)
    if damage == "missing":
        assert not run.problems
    if damage == "bytes":
        assert any(file in problem or "predictions" in problem for problem in run.problems)


def test_an_unfinished_last_line_is_no_problem(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1, "loss": 2}\n{"step": 2, "lo')
    lines = Lines(path)
    assert [value for _, value in lines] == [{"step": 1, "loss": 2}] and lines.bad == 0
    path.write_text('{"step": 1, "lo\n{"step": 2, "loss": 2}\n')
    assert [value for _, value in lines] == [{"step": 2, "loss": 2}] and lines.bad == 1


def test_a_resumed_run_shows_its_last_record(tmp_path):
    make_run(tmp_path)
    record = json.loads((tmp_path / "run.json").read_text())
    for step in (90, 100):
        write_json(tmp_path / f"run-resumed-{step}.json", {**record, "config": {"seed": step, "do_train": True}})
    run = read_run(tmp_path)
    assert run.resumes == [90, 100] and run.config["seed"] == 100


def test_an_evaluation_alone_has_its_own_record(tmp_path):
    make_run(tmp_path)
    (tmp_path / "run.json").rename(tmp_path / "evaluation.json")
    assert read_run(tmp_path).config["pre_seq_len"] == 128


def test_no_run(tmp_path):
    with pytest.raises(ConfigError, match="not a folder"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"run\.json"):
        read_run(tmp_path)


def test_values_that_are_no_numbers():
    assert [number(value) for value in (True, "1", None, math.nan, math.inf, 10**400, [], 2, 0.5)] == [None] * 7 + [
        2,
        0.5,
    ]


def test_nan_is_counted_and_left_out():
    entries = [{"step": step, "loss": math.nan if step in (3, 4) else 1.0} for step in range(1, 6)]
    curve = curves_of(entries)["loss"]
    assert (len(curve), curve.lost, curve.first_lost) == (3, 2, 3)


def test_thinning_keeps_spikes():
    values = [1.0] * 100_000
    values[54_321] = 99.0
    thin = Curve(list(range(100_000)), values).thin()
    assert len(thin) <= MAX_POINTS + 2 and 99.0 in thin.values
    assert thin.steps == sorted(thin.steps)


def test_smoothing_keeps_level_and_start():
    curve = Curve(list(range(100)), [10.0 / (1 + step) for step in range(100)])
    smooth = curve.smooth()
    assert smooth.values[0] == curve.values[0]
    assert max(abs(a - b) for a, b in zip(smooth.values[20:], curve.values[20:], strict=True)) < 0.05
    assert Curve([1, 2], [1, 2]).smooth() is None


def test_many_predictions_are_streamed(tmp_path):
    import random
    import tracemalloc

    drawn = random.Random(0)
    with (tmp_path / "predictions.jsonl").open("w", encoding="utf-8") as file:
        for i in range(20_000):
            line = prediction(i, 50, drawn)
            line["predict"] *= 20
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    tracemalloc.start()
    found = read_predictions(tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.rows == {"tuned": 20_000}
    assert peak < 12_000_000 < (tmp_path / "predictions.jsonl").stat().st_size
