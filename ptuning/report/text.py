"""What the page calls things: names and directions of scores, and values as text."""

import json
import math
from collections.abc import Iterable
from typing import NamedTuple

from ptuning.evaluation.metrics import METRICS, Place, shown_in
from ptuning.report.words import words

LONGEST_TEXT = 1200  # characters of a prompt, a reference or an answer
LONGEST_VALUE = 400  # of an option's value
LONGEST_ERROR = 6000

# What evaluation logs besides scores.
BOOKKEEPING = ("rows", "seconds", "runtime", "samples_per_second", "steps_per_second", "model_preparation_time")

# Besides the metrics; "unfinished" is what "cut %" was before.
_NAMES = ("tokens", "rows", "seconds", "eval_loss", "eval_perplexity", "unfinished")
_DIRECTIONS = {"higher": 1, "lower": -1}
_LOGGED_LOWER = ("eval_loss", "eval_perplexity")


# --- scores ---------------------------------------------------------------------------------------------------------------


def metric_name(key: str) -> str:
    """How the page calls a metric; one it doesn't know keeps its key."""
    short = key.removeprefix("eval_")
    if short in METRICS:
        return METRICS[short].title
    return next((words(name) for name in (key, short) if name in _NAMES), short)


def names_in(place: Place) -> list[str]:
    """Names of the metrics that a part of the page shows, in the order of tables."""
    return [metric.name for metric in shown_in(place)]


def better(key: str) -> int:
    """1 where more is better, -1 where less is, 0 where neither."""
    if key in _LOGGED_LOWER:
        return -1
    metric = METRICS.get(key.removeprefix("eval_"))
    return _DIRECTIONS.get(metric.better, 0) if metric else 0


def decimals(key: str) -> int | None:
    """How many decimals a column of it is shown with; None: as many as the figure needs."""
    metric = METRICS.get(key.removeprefix("eval_"))
    return metric.decimals if metric else None


def in_order(keys: Iterable[str]) -> list[str]:
    """Known metrics in evaluation's order, others after them."""
    order = {key: i for i, key in enumerate([*METRICS, *_NAMES])}
    return sorted(dict.fromkeys(keys), key=lambda key: order.get(key, len(order)))


# --- values ---------------------------------------------------------------------------------------------------------------


def number(value) -> float | int | None:
    """`value` where it is a finite number, else None. true and false are no numbers."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return value if math.isfinite(value) else None
    except OverflowError:  # an integer beyond every float
        return None


class Cut(NamedTuple):
    """A text cut for the page, and how many characters are left out."""

    text: str
    more: int


def cut(text: object, longest: int = LONGEST_TEXT) -> Cut:
    """The beginning of a long text. A lone surrogate, which no file can hold, becomes U+FFFD."""
    text = ("" if text is None else str(text)).encode("utf-8", "replace").decode("utf-8")
    return Cut(text[:longest], max(0, len(text) - longest))


def show_number(value: object, digits: int | None = None) -> str:
    """A number for people: thousands separated, four significant digits, or `digits` decimals; a dash where there is none."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "∞" if value > 0 else "−∞"
    value = number(value)
    if value is None:
        return "–"
    if digits is not None:
        text = f"{value:,.{digits}f}"
    elif value == int(value) and abs(value) < 1e15:
        text = f"{int(value):,}"
    elif abs(value) >= 1e6 or 0 < abs(value) < 1e-3:
        text = f"{value:.3e}"
    else:
        text = f"{value:,.{max(0, 3 - math.floor(math.log10(abs(value))))}f}"
    return text.replace("-", "−") if value < 0 else text


def show_score(value: object, metric: str) -> str:
    """A score, with as many decimals in every row; counts and losses as other numbers."""
    return show_number(value, decimals(metric))


def show_change(value: float | None, metric: str = "") -> str:
    """A difference, with its sign."""
    return "–" if value is None else ("+" if value > 0 else "") + show_score(value, metric)


def show_value(value: object) -> str:
    """An option's value, as it would be written in a YAML file."""
    if value is None:
        return "–"
    if isinstance(value, str):
        text = value if value.strip() == value and value else json.dumps(value, ensure_ascii=False)
    elif isinstance(value, float):
        text = f"{value:g}"
    elif isinstance(value, list) and all(isinstance(each, str) for each in value):
        text = " ".join(value)
    else:
        text = json.dumps(value, ensure_ascii=False, default=str)
    shown, more = cut(text, LONGEST_VALUE)
    return shown + (words("more_text", more=f"{more:,}") if more else "")


def duration(seconds: float) -> str:
    """Seconds in the two largest units that say something."""
    if seconds < 60:
        return words("time_s", seconds=seconds)
    minutes, hours = seconds / 60, seconds / 3600
    if minutes < 60:
        return words("time_min", minutes=int(minutes), seconds=int(seconds % 60))
    if hours < 48:
        return words("time_h", hours=int(hours), minutes=int(minutes % 60))
    return words("time_d", days=int(hours // 24), hours=int(hours % 24))
