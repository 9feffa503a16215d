"""The figures of one run."""

from collections.abc import Sequence
from functools import lru_cache

from markupsafe import Markup

from ptuning.report.read import Curve, Run
from ptuning.report.svg import SERIES, Drawing, Key, color, draw, draw_wide
from ptuning.report.text import BOOKKEEPING, metric_name, names_in, number
from ptuning.report.words import words

MAX_OTHER = 6  # figures of eval_* values that this module doesn't know
SPLITS = ("train", "validation", "test")
_LENGTHS = {
    "prompt_tokens": ("s1", "max_source_length"),
    "answer_tokens": ("s3", None),
}
FEWEST_POINTS = 4  # of a curve; fewer stand in a table, where they don't fill a screen
# Log key → colour, lowest end of the axis, and whether it is noisy: smoothing would bend what is exact.
_SINGLE = {
    "learning_rate": ("s3", None, False),
    "grad_norm": ("s4", 0, True),
    "tokens_per_second": ("s5", 0, True),
    "samples_per_second": ("s5", 0, True),
    "memory_gib": ("s6", 0, False),
}


# --- curves and scores ----------------------------------------------------------------------------------------------------


def curve_figures(run: Run) -> list[Drawing]:
    """Loss, eval scores, learning rate, gradient norm, throughput, memory: those that were logged."""
    figures = [loss_figure(run), *_eval_figures(run)]
    for key in shown_curves(run):
        if key in _SINGLE:
            figures.append(_line_figure(curve_name(key), run.curves[key], *_SINGLE[key]))
    return [figure for figure in figures if figure is not None]


def shown_curves(run: Run) -> list[str]:
    """Log keys of what the page shows over the steps."""
    keys = [key for key in ("loss", "eval_loss") if key in run.curves] + _eval_keys(run)
    keys += [key for key in _SINGLE if key in run.curves]
    return [key for key in keys if key != "samples_per_second" or "tokens_per_second" not in run.curves]


def curve_name(key: str) -> str:
    """How the page calls a logged value."""
    if key == "loss":
        return words("training_loss")
    if key == "eval_loss" or key in _SINGLE:
        return words(key)
    return words("eval_other", name=metric_name(key).removeprefix("eval ").removeprefix("验证"))


def best_point(run: Run) -> tuple[float, float] | None:
    """Step and value of the best eval loss: from best.json where it is by eval loss, else the lowest logged."""
    curve = run.curves.get("eval_loss")
    if run.best.get("metric") in ("eval_loss", "loss"):
        step, value = number(run.best.get("step")), number(run.best.get("value"))
        if step is not None and value is not None:
            return step, value
    if not curve:
        return None
    i = min(range(len(curve)), key=curve.values.__getitem__)
    return curve.steps[i], curve.values[i]


def loss_figure(run: Run) -> Drawing | None:
    """Training loss, raw and smoothed, with the eval loss over it."""
    training, evaluation = run.curves.get("loss"), run.curves.get("eval_loss")
    if max(len(curve or ()) for curve in (training, evaluation)) < FEWEST_POINTS:
        return None
    svg, keys = _loss_svg(training, evaluation, best_point(run), tuple(run.resumes), words("step"))
    return Drawing(words("loss"), svg, list(keys), _lost(training, evaluation), wide=True)


@lru_cache(maxsize=8)  # as `_line_svg`; the word tells the languages apart
def _loss_svg(
    training: Curve | None,
    evaluation: Curve | None,
    best: tuple[float, float] | None,
    resumes: tuple[int, ...],
    across: str,
) -> tuple[Markup, tuple[Key, ...]]:
    keys: list[Key] = []

    def plot(axes):
        if training:
            keys.extend(_raw_and_smooth(axes, training, "s1", words("training_loss")))
        if evaluation:
            _line(axes, evaluation, color("s2"), marked=len(evaluation) <= 60)
            keys.append(Key(words("eval_loss"), "s2", "line"))
            if best:
                axes.plot(*best, "o", markersize=9, markerfacecolor="none", markeredgewidth=1.8, color=color("best"))
                keys.append(Key(words("best_eval_loss", value=best[1], step=best[0]), "best", "ring"))
        for step in resumes:
            axes.axvline(step, color=color("muted"), linestyle=":", linewidth=1)
        if resumes:
            keys.append(Key(words("resumed"), "muted", "dashed"))
        _scale(axes, [curve for curve in (training, evaluation) if curve])
        axes.set_xlabel(across)

    svg = draw_wide(plot)  # which draws twice
    return svg, tuple(dict.fromkeys(keys))


def _eval_keys(run: Run) -> list[str]:
    """Log keys of what evaluations found besides the loss."""
    names = [key for key in run.curves if key.startswith("eval_") and len(run.curves[key])]
    return [key for key in names if key.removeprefix("eval_") not in (*BOOKKEEPING, "loss")]


def _eval_figures(run: Run) -> list[Drawing]:
    names = [key for key in _eval_keys(run) if len(run.curves[key]) >= FEWEST_POINTS]
    scores = [key for key in names if key.removeprefix("eval_") in names_in("quality")]
    figures = []
    if scores:

        def plot(axes):
            for i, key in enumerate(scores):
                _line(axes, run.curves[key], color(_series(i)), marked=len(run.curves[key]) <= 60)
            axes.set_xlabel(words("step"))

        keys = [Key(metric_name(key), _series(i)) for i, key in enumerate(scores)]
        figures.append(Drawing(words("eval_scores"), draw(plot), keys, _lost(*(run.curves[key] for key in scores))))
    for key in [key for key in names if key not in scores][:MAX_OTHER]:
        figure = _line_figure(curve_name(key), run.curves[key], "s2", None)
        figures += [] if figure is None else [figure]
    return figures


def _line_figure(title: str, curve: Curve, name: str, bottom: float | None, noisy: bool = False) -> Drawing | None:
    if len(curve) < FEWEST_POINTS:
        return None
    return Drawing(title, _line_svg(curve, name, bottom, noisy, title, words("step")), [], _lost(curve))


@lru_cache(maxsize=32)  # once training has ended they stay the same, and the page is written twice more
def _line_svg(curve: Curve, name: str, bottom: float | None, noisy: bool, title: str, across: str) -> Markup:
    def plot(axes):
        if noisy:
            _raw_and_smooth(axes, curve, name, title)
        else:
            _line(axes, curve.thin(), color(name), marked=len(curve) <= 30)
        if bottom is not None and not _scale(axes, [curve]):
            axes.set_ylim(bottom=bottom)
        axes.set_xlabel(across)

    return draw(plot)


def score_figure(base: dict, tuned: dict) -> Drawing | None:
    """Base and tuned scores with their intervals, one line a metric."""
    metrics = [m for m in names_in("quality") if any(number(scores.get(m)) is not None for scores in (base, tuned))]
    if not metrics:
        return None

    def plot(axes):
        for shift, name, scores in ((0.14, "base", base), (-0.14, "s1", tuned)):
            for row, metric in enumerate(reversed(metrics)):
                value = number(scores.get(metric))
                if value is None:
                    continue
                span = interval(scores, metric)
                error = [[max(0, value - span[0])], [max(0, span[1] - value)]] if span else None
                style = {"color": color(name), "markersize": 6, "elinewidth": 2, "capsize": 3}
                axes.errorbar([value], [row + shift], xerr=error, fmt="o", **style)
        axes.set_yticks(range(len(metrics)), [metric_name(metric) for metric in reversed(metrics)])
        axes.tick_params(axis="y", labelcolor=color("ink"))
        axes.grid(axis="y", visible=False)
        axes.set_ylim(-0.6, len(metrics) - 0.4)
        axes.set_xlim(left=0)

    names = (("base", "base", base), ("tuned", "s1", tuned))
    keys = [Key(words(label), name, "dot") for label, name, scores in names if scores]
    note = words("intervals_note") if any("intervals" in scores for scores in (base, tuned)) else ""
    return Drawing(words("base_against_tuned"), draw_wide(plot, 0.9 + 0.36 * len(metrics)), keys, note, wide=True)


def interval(scores: dict, metric: str) -> tuple[float, float] | None:
    """Low and high of a metric's interval, where there is one."""
    spans = scores.get("intervals")
    return pair(spans.get(metric)) if isinstance(spans, dict) else None


def pair(span: object) -> tuple[float, float] | None:
    """An interval out of a file: low and high, where it is one."""
    if not isinstance(span, list | tuple) or len(span) != 2 or None in (number(span[0]), number(span[1])):
        return None
    return span[0], span[1]


def distribution_figure(scores: dict[str, list[float]], metric: str) -> Drawing | None:
    """How the rows' scores are spread, base against tuned."""
    if not any(len(values) >= 10 for values in scores.values()):
        return None
    edges = [top * i / 20 for top in [100 if max(map(max, scores.values())) > 1 else 1] for i in range(21)]

    def plot(axes):
        for model, name in (("base", "base"), ("tuned", "s1")):
            if values := scores.get(model):
                axes.hist(values, bins=edges, color=color(name), alpha=0.35)
                axes.hist(values, bins=edges, color=color(name), histtype="step", linewidth=1.6)
        axes.set_xlabel(words("of_a_row", metric=metric_name(metric)))
        axes.set_ylabel(words("rows"))
        axes.set_xlim(0, edges[-1])
        axes.grid(axis="x", visible=False)

    keys = [Key(words(model), name, "bar") for model, name in (("base", "base"), ("tuned", "s1")) if scores.get(model)]
    return Drawing(words("spread", metric=metric_name(metric)), draw_wide(plot, 2.6), keys, wide=True)


def _raw_and_smooth(axes, curve: Curve, name: str, label: str) -> list[Key]:
    smooth = curve.smooth()
    if smooth is None:
        _line(axes, curve, color(name), marked=len(curve) <= 30)
        return [Key(label, name)]
    _line(axes, curve.thin(), color(name), alpha=0.3, linewidth=1)
    _line(axes, smooth.thin(), color(name))
    return [Key(words("smoothed", name=label), name), Key(words("as_logged"), name, "faint")]


def _line(axes, curve: Curve, paint: str, marked: bool = False, **style) -> None:
    axes.plot(curve.steps, curve.values, color=paint, marker="o" if marked else None, markersize=3.5, **style)


def _scale(axes, curves: Sequence[Curve]) -> bool:
    """A logarithmic axis where the bulk would be squeezed flat by a few huge values. Returns whether it is."""
    values = sorted(value for curve in curves for value in curve.values)
    if values and values[0] > 0 and values[-1] > 30 * values[len(values) // 2]:
        axes.set_yscale("log")
        return True
    return False


def _lost(*curves: Curve | None) -> str:
    """A note on values that can't be drawn."""
    lost = [curve for curve in curves if curve is not None and curve.lost]
    if not lost:
        return ""
    count = sum(curve.lost for curve in lost)
    first = min(curve.first_lost for curve in lost if curve.first_lost is not None)
    return words("lost" if count > 1 else "one_lost", count=count, step=first)


def _series(i: int) -> str:
    return f"s{i % SERIES + 1}"


# --- lengths of rows ------------------------------------------------------------------------------------------------------


def length_figures(run: Run) -> list[Drawing]:
    """Histograms of the training rows' lengths; of another split where there was no training."""
    split = next((name for name in (*SPLITS, *run.data) if name in run.data), None)
    if split is None:
        return []
    figures = [_length_figure(run, split, part) for part in _LENGTHS]
    return [figure for figure in figures if figure is not None]


def _length_figure(run: Run, split: str, part: str) -> Drawing | None:
    name, option = _LENGTHS[part]
    bins = _bins(run.data[split].get(part))
    if not bins:
        return None
    option = option or _answer_limit(run, split)
    limit = number(run.config.get(option))
    end = bins[-1][1]
    near = limit if limit is not None and limit <= 3 * end else None  # a limit far away would squeeze the bars

    keys = [Key(words("split_rows", split=split), name, "bar")]
    if near:
        keys.append(Key(f"{option} {limit:g}", "best", "dashed"))
    note = "" if near or limit is None else words("far_right", option=option, limit=limit)
    return Drawing(words(part), _histogram(name, tuple(bins), near, words("token_axis"), words("rows")), keys, note)


@lru_cache(maxsize=8)  # a run's rows stay the same, and its page is written again and again
def _histogram(
    name: str, bins: tuple[tuple[float, float, float], ...], near: float | None, across: str, up: str
) -> Markup:
    def plot(axes):
        widths = [high - low for low, high, _ in bins]
        axes.bar([low for low, _, _ in bins], [count for *_, count in bins], widths, align="edge", color=color(name))
        if near is not None:
            axes.axvline(near, color=color("best"), linewidth=1.6, linestyle="--")
        axes.set_xlim(0, max(bins[-1][1], near or 0) * 1.03)
        axes.set_xlabel(across)
        axes.set_ylabel(up)
        axes.grid(axis="x", visible=False)

    return draw(plot)


def _answer_limit(run: Run, split: str) -> str:
    own = split != "train" and number(run.config.get("val_max_target_length")) is not None
    return "val_max_target_length" if own else "max_target_length"


def _bins(lengths) -> list[tuple[float, float, float]]:
    histogram = lengths.get("histogram") if isinstance(lengths, dict) else None
    if not isinstance(histogram, list):
        return []
    bins = [tuple(each) for each in histogram if isinstance(each, list | tuple) and len(each) == 3]
    bins = [each for each in bins if None not in map(number, each) and each[1] > each[0]]
    return sorted(bins)[:500]
