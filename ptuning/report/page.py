"""The page: one HTML file that needs nothing else, put into place in one step."""

import os
import tempfile
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from ptuning.report import compare, figures, lengths, overview, text
from ptuning.report.metrics import metric_name
from ptuning.report.read import Run, read_run

REPORT = "report.html"
SHOWN_SCORES = ("bleu-4", "rouge-1", "rouge-2", "rouge-l")  # beside an answer


def write_report(folder: str | Path, output: str | Path | None = None) -> Path:
    """Writes the page of one run, from what is there: also during a run, and after one that failed.

    Args:
        output: default: report.html in the folder.

    Returns:
        The file.

    Raises:
        ConfigError: there is no run in `folder`.
    """
    run = read_run(folder)
    return _write(Path(folder) / REPORT if output is None else Path(output), render_run(run))


def write_comparison(folders: Sequence[str | Path], output: str | Path = REPORT) -> Path:
    """Writes one page over several runs.

    Raises:
        ConfigError: one of the folders has no run in it.
    """
    paths = [Path(folder) for folder in folders]
    runs = [read_run(path, name, texts=False) for path, name in zip(paths, compare.run_names(paths), strict=True)]
    return _write(Path(output), render_comparison(runs))


def render_run(run: Run) -> str:
    """The page of one run."""
    base, tuned = run.metrics.get("base", {}), run.metrics.get("tuned", {})
    predictions = run.predictions
    return (
        _environment()
        .get_template("run.html.jinja")
        .render(
            run=run,
            written=_now(),
            cards=overview.cards(run),
            main_options=overview.main_options(run),
            curves=figures.curve_figures(run),
            undrawn=[(key, curve) for key, curve in run.curves.items() if curve.lost and not len(curve)],
            scores=overview.score_rows(base, tuned),
            score_figure=figures.score_figure(base, tuned),
            spread=figures.distribution_figure(predictions.scores, predictions.metric) if predictions.scores else None,
            data=lengths.data_table(run),
            length_figures=lengths.length_figures(run),
        )
    )


def render_comparison(runs: Sequence[Run]) -> str:
    """The page over several runs."""
    metrics, rows = compare.score_table(runs)
    return (
        _environment()
        .get_template("comparison.html.jinja")
        .render(
            runs=runs,
            written=_now(),
            options=compare.differing_options(runs),
            metrics=metrics,
            rows=rows,
            figures=compare.comparison_figures(runs),
        )
    )


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("ptuning.report"),
        autoescape=True,  # everything a user wrote is text, never markup
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": text.show_number,
        "change": text.show_change,
        "score": text.show_score,
        "value": text.show_value,
        "cut": text.cut,
        "metric": metric_name,
        "span": lambda scores: figures.pair(scores.get("interval")) if isinstance(scores, dict) else None,
        "seconds": text.duration,
    }
    environment.globals |= {"series": compare.series, "LONGEST_ERROR": text.LONGEST_ERROR, "SHOWN_SCORES": SHOWN_SCORES}
    return environment


def _now() -> str:
    return datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")


def _write(path: Path, page: str) -> Path:
    """In one step: a browser never finds half a page, and a crash leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", errors="replace") as file:
            file.write(page)
        Path(temporary).chmod(0o666 & ~_umask())  # mkstemp makes it private
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
