"""`ptuning report RUN…` and the page it writes: one HTML file that needs nothing else."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from ptuning.config.commands import language_option, option, parse_options
from ptuning.errors import ConfigError
from ptuning.language import Language, speaking
from ptuning.messages import message
from ptuning.report import compare, figures, overview, text
from ptuning.report.read import Run, read_run
from ptuning.report.words import words
from ptuning.runs.files import write_text
from ptuning.runs.folder import REPORT

RELOAD_SECONDS = 10  # after which the page of a run that goes on loads itself again


@dataclass(frozen=True)
class ReportOptions:
    """Of which runs, and where to."""

    runs: tuple[str, ...] = option(..., "the --output_dir of a run", positional=True)
    output: str | None = option(None, f"default: RUN/{REPORT}; ./{REPORT} where several runs are compared")
    lang: Language | None = language_option("page")


def report_command(argv: list[str]) -> int:
    """Writes the report of one run again, or one page over several runs. Prints the path written.

    Raises:
        ConfigError: a folder has no run in it, or the page can't be written.
    """
    about = "Write report.html of a run again, or compare several runs in one page."
    args = parse_options(ReportOptions, argv, "ptuning report", about)
    output = None if args.output is None else Path(args.output)
    if output is not None and output.is_dir():
        raise ConfigError(f"--output {output} is a folder; give a file name, e.g. {output / REPORT}")
    with speaking(args.lang):
        try:
            several = len(args.runs) > 1
            path = write_comparison(args.runs, output or REPORT) if several else write_report(args.runs[0], output)
        except OSError as error:
            raise ConfigError(f"can't write the report: {error}") from error
        print(message("wrote", file=path))
    return 0


def write_report(folder: str | Path, output: str | Path | None = None) -> Path:
    """Writes the page of one run, from what is there: also during a run, and after one that failed.

    In its folder, the page of a run that is going on loads itself again, as the run goes on writing it.

    Args:
        output: default: report.html in the folder.

    Returns:
        The file.

    Raises:
        ConfigError: there is no run in `folder`.
    """
    run = read_run(folder)
    return write_text(
        Path(folder) / REPORT if output is None else Path(output), render_run(run, stays=output is not None)
    )


def write_comparison(folders: Sequence[str | Path], output: str | Path = REPORT) -> Path:
    """Writes one page over several runs.

    Raises:
        ConfigError: one of the folders has no run in it.
    """
    paths = [Path(folder) for folder in folders]
    runs = [read_run(path, name, texts=False) for path, name in zip(paths, compare.run_names(paths), strict=True)]
    return write_text(Path(output), render_comparison(runs))


def render_run(run: Run, stays: bool = False) -> str:
    """The page of one run.

    Args:
        stays: nobody writes the page again while the run goes on.
    """
    base, tuned = run.metrics.get("base", {}), run.metrics.get("tuned", {})
    predictions = run.predictions
    return (
        templates()
        .get_template("run.html.jinja")
        .render(
            run=run,
            live=run.running and not stays,
            cards=overview.cards(run),
            main_options=overview.main_options(run),
            curves=figures.curve_figures(run),
            undrawn=[(key, curve) for key, curve in run.curves.items() if curve.lost and not len(curve)],
            few=overview.few_values(run),
            scores=overview.score_rows(base, tuned, run.metrics.get("change", {})),
            score_figure=figures.score_figure(base, tuned),
            spread=figures.distribution_figure(predictions.scores, predictions.metric) if predictions.metric else None,
            data=overview.data_table(run),
            length_figures=figures.length_figures(run),
        )
    )


def render_comparison(runs: Sequence[Run]) -> str:
    """The page over several runs."""
    metrics, rows = compare.score_table(runs)
    return (
        templates()
        .get_template("comparison.html.jinja")
        .render(
            runs=runs,
            costs=[compare.costs(run) for run in runs],
            live=False,
            options=compare.differing_options(runs),
            metrics=metrics,
            rows=rows,
            figures=compare.comparison_figures(runs),
        )
    )


@cache
def templates() -> Environment:
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
        "metric": text.metric_name,
        "span": lambda scores: figures.pair(scores.get("interval")) if isinstance(scores, dict) else None,
        "seconds": text.duration,
    }
    environment.globals |= {
        "series": compare.series,
        "is_dashed": compare.is_dashed,
        "LONGEST_ERROR": text.LONGEST_ERROR,
        "t": words,
        "now": lambda: datetime.now().astimezone(),
        "RELOAD_SECONDS": RELOAD_SECONDS,
        "answer_scores": lambda: text.names_in("answer"),
    }
    return environment
