"""Several runs together: which options differ, whose curves and scores are better."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ptuning.evaluation.metrics import METRICS
from ptuning.report.figures import FEWEST_POINTS, best_point, interval
from ptuning.report.read import Run
from ptuning.report.svg import SERIES, Drawing, Key, color, draw, draw_wide
from ptuning.report.text import better, in_order, metric_name, names_in, number
from ptuning.report.words import words
from ptuning.runs.resume import PATH_OPTIONS, is_beside, places

_DASHES = ("-", "--", ":", "-.")


def run_names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell the runs apart."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(path[-length:]) for path in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{folder} ({i})" for i, folder in enumerate(folders, start=1)]


def differing_options(runs: Sequence[Run]) -> list[tuple[str, list]]:
    """Option → its value in each run, where they aren't all the same; number of processes, data and versions included.

    Options that say nothing about the result are left out, such as those of logging, and paths that lead to the same place.
    """
    tables = [_options(run) for run in runs]
    keys = dict.fromkeys(key for table in tables for key in table if not is_beside(key))
    rows = [(key, [table.get(key) for table in tables]) for key in keys]
    return [(key, values) for key, values in rows if _differ(key, values, runs)]


def _differ(option: str, values: list, runs: Sequence[Run]) -> bool:
    if all(value == values[0] for value in values):
        return False
    if option not in PATH_OPTIONS:
        return True
    # Where a run was started, its relative paths begin.
    found = [places(value, run.record.get("cwd")) for value, run in zip(values, runs, strict=True)]
    return any(place != found[0] for place in found)


def _options(run: Run) -> dict:
    found = dict(run.config)
    if "world_size" in run.record:
        found["world_size"] = run.record["world_size"]
    for title, key in (("data", "data_sha256"), ("version", "versions")):
        values = run.record.get(key)
        for name, value in (values if isinstance(values, dict) else {}).items():
            found[f"{title}: {name}"] = str(value)[:12]
    return found


def score_table(runs: Sequence[Run]) -> tuple[list[str], list[dict]]:
    """Metrics, and the values of each base that was scored and of each run; the best of each metric is marked."""
    rows: list[dict[str, Any]] = []
    for run in runs:
        best = best_point(run)
        validation = run.metrics.get("validation", {})
        loss = {"eval_loss": best[1]} if best else {"eval_loss": validation.get("eval_loss")}
        for model in ("base", "tuned"):
            scores = run.metrics.get(model, {}) | (loss if model == "tuned" else {})
            values = {key: number(scores.get(key)) for key in ("eval_loss", *METRICS)}
            if any(value is not None for value in values.values()):
                spans = {key: interval(scores, key) for key in METRICS}
                row: dict[str, Any] = {
                    "run": run,
                    "label": run.name,
                    "model": model,
                    "values": values,
                    "spans": spans,
                    "best": set(),
                }
                same = next((other for other in rows if model == other["model"] == "base" and _same(row, other)), None)
                if same is None:
                    rows.append(row)
                else:
                    same["label"] = words("several_runs")
    rows.sort(key=lambda row: row["model"] != "base")
    metrics = in_order(key for row in rows for key, value in row["values"].items() if value is not None)
    metrics.sort(key=lambda key: key != "eval_loss")
    for metric in metrics:
        direction = better(metric)
        there = [row for row in rows if row["values"][metric] is not None and row["model"] == "tuned"]
        if direction and len(there) > 1:
            top = max(direction * row["values"][metric] for row in there)
            for each in there:
                if direction * each["values"][metric] == top:
                    each["best"].add(metric)
    return metrics, rows


def _same(row: dict, other: dict) -> bool:
    """Whether two runs scored the same base on the same rows: one line is enough."""
    return row["values"] == other["values"] and row["spans"] == other["spans"]


def costs(run: Run) -> dict[str, float | None]:
    """What the run trained and took, and what was forgotten: trained, rows a second, GiB at the peak, percent of general answers
    left as they were, loss of the base's own answers before and after; None where it isn't known."""
    speed, memory = run.curves.get("samples_per_second"), run.curves.get("memory_gib")
    probe = run.metrics.get("probe", {})
    return {
        "trained": number(run.record.get("trained")),
        "speed": sum(speed.values) / len(speed) if speed else None,
        "memory": max(memory.values) if memory else None,
        **{key: number(probe.get(key)) for key in ("same", "base_loss", "tuned_loss")},
    }


def comparison_figures(runs: Sequence[Run]) -> list[Drawing]:
    """Loss, eval loss, eval BLEU-4 and throughput of all runs; the score against the option, where one number differs."""
    wanted = {
        "loss": "training_loss_card",
        "eval_loss": "eval_loss_card",
        "eval_bleu-4": "eval_bleu",
        "tokens_per_second": "tokens_a_second",
    }
    figures = [_overlay(runs, key, words(title)) for key, title in wanted.items()]
    return [figure for figure in (*sweep_figures(runs), *figures) if figure is not None]


def _overlay(runs: Sequence[Run], key: str, title: str) -> Drawing | None:
    there = [(i, run) for i, run in enumerate(runs) if run.curves.get(key)]
    if not there:
        return None
    smoothed = False

    def plot(axes):
        nonlocal smoothed
        for i, run in there:
            curve = run.curves[key]
            smooth = curve.smooth() if not key.startswith("eval_") else None
            smoothed |= smooth is not None
            curve, style = (smooth or curve).thin(), {"linestyle": _DASHES[i // SERIES % len(_DASHES)]}
            marker = "o" if len(curve) <= 20 else None
            axes.plot(curve.steps, curve.values, color=color(series(i)), marker=marker, markersize=3.5, **style)
        values = sorted(value for _, run in there for value in run.curves[key].values)
        if values[0] > 0 and values[-1] > 30 * values[len(values) // 2]:
            axes.set_yscale("log")
        axes.set_xlabel(words("step"))

    wide = max(len(run.curves[key]) for _, run in there) >= FEWEST_POINTS
    svg = draw_wide(plot) if wide else draw(plot, (5.4, 2.0))
    keys = [Key(run.name, series(i), "dashed" if is_dashed(i) else "line") for i, run in there]
    return Drawing(title, svg, keys, words("smoothed_note") if smoothed else "", wide=wide)


def sweep_figures(runs: Sequence[Run]) -> list[Drawing]:
    """Score and eval loss against the one option that was varied; none where several were, or it is no number."""
    varied = [(key, values) for key, values in differing_options(runs) if not key.startswith(("data: ", "version: "))]
    if len(varied) != 1 or any(number(value) is None for value in varied[0][1]):
        return []
    option, values = varied[0]
    rows = {row["run"].name: row for row in score_table(runs)[1] if row["model"] == "tuned"}
    metrics = [
        "eval_loss",
        next((m for m in names_in("quality") if any(row["values"][m] is not None for row in rows.values())), ""),
    ]
    figures = []
    for metric, name in zip(metrics, ("s2", "s1"), strict=True):
        points = sorted(
            (value, rows[run.name]["values"][metric], rows[run.name]["spans"].get(metric))
            for value, run in zip(values, runs, strict=True)
            if metric and run.name in rows and rows[run.name]["values"][metric] is not None
        )
        if len(points) > 1:
            svg = draw(lambda axes, points=points, name=name: _sweep(axes, points, option, name))
            figures.append(Drawing(words("by_option", metric=metric_name(metric), option=option), svg))
    return figures


def _sweep(axes, points: list, option: str, name: str) -> None:
    x, y = [point[0] for point in points], [point[1] for point in points]
    error = [[max(0, v - s[0]) if s else 0 for _, v, s in points], [max(0, s[1] - v) if s else 0 for _, v, s in points]]
    axes.errorbar(x, y, yerr=error, fmt="o-", color=color(name), markersize=5, capsize=3)
    if min(x) > 0 and max(x) >= 8 * min(x):
        axes.set_xscale("log")
    if len(set(x)) <= 8:
        axes.set_xticks(sorted(set(x)), [f"{value:g}" for value in sorted(set(x))])
        axes.set_xticks([], minor=True)
    axes.set_xlabel(option)


def is_dashed(i: int) -> bool:
    """Whether the i-th run's line is, because its colour is taken."""
    return i // SERIES % len(_DASHES) > 0


def series(i: int) -> str:
    """The colour of the i-th run."""
    return f"s{i % SERIES + 1}"
