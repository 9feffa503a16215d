"""matplotlib figures as inline SVG that follows the page's colours, light and dark.

matplotlib draws (ticks, scales, clipping are its business), with text left as text (`svg.fonttype: none`), so the browser
sets it in the page's font. Colours are the one thing it can't leave open: each is drawn as a stand-in, a hex value used for
nothing else, which becomes `var(--…)` in the SVG. User text never enters a figure: it could be markup to matplotlib ($…$).
Legends are HTML.
"""

import io
import itertools
import re
import unicodedata
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

SERIES = 8  # colours of series, --s1 … --s8 in style.css
# Stand-in → CSS variable. matplotlib writes hex in lower case.
_VARIABLES = {"ink": "#0101f0", "muted": "#0101f1", "grid": "#0101f2", "base": "#0101f3", "best": "#0101f4"}
_VARIABLES |= {f"s{i + 1}": f"#0101a{i}" for i in range(SERIES)}
_NAMES = {stand_in: name for name, stand_in in _VARIABLES.items()}

_RC: "dict[RcKeyType, Any]" = {
    "svg.fonttype": "none",
    "font.size": 10,
    "axes.linewidth": 0.8,
    "axes.edgecolor": _VARIABLES["grid"],
    "axes.labelcolor": _VARIABLES["muted"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.limits": (-3, 5),
    "axes.formatter.useoffset": False,
    "axes.formatter.use_mathtext": False,
    "grid.color": _VARIABLES["grid"],
    "grid.linewidth": 0.8,
    "text.color": _VARIABLES["ink"],
    "text.parse_math": False,
    "xtick.color": _VARIABLES["grid"],
    "ytick.color": _VARIABLES["grid"],
    "xtick.labelcolor": _VARIABLES["muted"],
    "ytick.labelcolor": _VARIABLES["muted"],
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
}


def color(name: str) -> str:
    """The stand-in to draw with for a colour of the page: ink, muted, grid, base, best, s1 … s8."""
    return _VARIABLES[name]


@dataclass(frozen=True)
class Key:
    """One entry of a legend.

    Attributes:
        color: name of the page's colour.
        shape: line, dashed, faint, bar, dot or ring.
    """

    label: str
    color: str
    shape: str = "line"


@dataclass
class Drawing:
    """A figure of the page."""

    title: str
    svg: Markup
    keys: list[Key] = field(default_factory=list)
    note: str = ""
    wide: bool = False


# Points, at the font's size of 10.
_LETTER, _WIDE, _LINE, _PAD = 6.4, 10.2, 16.0, 8.0

_numbers = itertools.count(1)


def draw_wide(plot: Callable, height: float = 3.3) -> Markup:
    """Two SVGs of what `plot(axes)` draws: one over both columns, and one for narrow screens, where the wide one's text would
    be too small to read. style.css shows one of them.
    """
    wide, narrow = draw(plot, (8.6, height)), draw(plot, (5.4, max(2.6, height)))
    return Markup('<div class="roomy">{}</div><div class="tight">{}</div>').format(wide, narrow)


def draw(plot: Callable, size: tuple[float, float] = (5.4, 3.0)) -> Markup:
    """The SVG of what `plot(axes)` draws.

    Args:
        size: inches.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_RC), warnings.catch_warnings():
        # Its fonts have no Chinese, which the page's font writes.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from")
        figure = Figure(figsize=size)
        axes = figure.subplots()
        plot(axes)
        _plain_powers(axes)
        _make_room(axes, size)
        text = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(text, format="svg", transparent=True, metadata=nothing)
    return Markup(_inline(text.getvalue(), f"f{next(_numbers)}-"))


def _plain_powers(axes) -> None:
    """Numbers on logarithmic axes as on all others: matplotlib writes them as formulas."""
    for axis in (axes.xaxis, axes.yaxis):
        if axis.get_scale() == "log":
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter("")


def _make_room(axes, size: tuple[float, float]) -> None:
    """Margins for the texts beside the axes, from their numbers of letters.

    matplotlib's layout engines measure each text in a font that the page doesn't use, which takes as long as drawing all.
    """
    width, height = 72 * size[0], 72 * size[1]
    labels = axes.yaxis.get_major_formatter().format_ticks(axes.yaxis.get_majorticklocs())
    left = _PAD + max(map(_points, labels), default=0) + (_LINE if axes.get_ylabel() else 0)
    bottom = _PAD + _LINE + (_LINE if axes.get_xlabel() else 0)
    right, top = 2 * _PAD + _LETTER, _PAD  # half of the last number stands out
    axes.figure.subplots_adjust(left / width, bottom / height, 1 - right / width, 1 - top / height)


def _points(text: str) -> float:
    return sum(_WIDE if unicodedata.east_asian_width(letter) in "WF" else _LETTER for letter in text)


def _inline(svg: str, prefix: str) -> str:
    """One SVG of several in a page: no prolog, no style for the whole page, ids of its own, the page's colours and font."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r'\1 aria-hidden="true"', svg, count=1)
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
    svg = re.sub(r' id="([^"]+)"', lambda m: f' id="{prefix}{m[1]}"' if m[1] in used else "", svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\1{prefix}", svg)
    svg = re.sub(r" font-family: [^;\"]*;?", "", svg)
    svg = re.sub(r' transform="rotate\(-0 [^"]*\)"', "", svg)
    # A hundredth of a point is enough and halves the paths. Only inside tags: text is the axes' numbers.
    svg = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\d\.\d\d)\d+", r"\1", tag[0]), svg)
    svg = re.sub(r"\s*\n\s*", "\n", svg)
    return re.sub(r"#0101[af][0-9]", lambda m: f"var(--{_NAMES[m[0]]})" if m[0] in _NAMES else m[0], svg)
