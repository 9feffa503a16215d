"""Curves out of the log: finite points, fewer where there are many, smoothed where they are noisy."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from ptuning.report.lines import number

MAX_POINTS = 2000
SMOOTH_FROM = 40  # points: fewer are shown as they are


@dataclass
class Curve:
    """A logged value over the steps.

    Attributes:
        lost: values that were NaN or infinite, which can't be drawn; `first_lost` is the step of the first.
    """

    steps: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    lost: int = 0
    first_lost: float | None = None

    def __len__(self) -> int:
        return len(self.steps)

    def thin(self) -> "Curve":
        """At most about MAX_POINTS points: of each stretch the lowest and the highest, so that no spike disappears."""
        if len(self) <= MAX_POINTS:
            return self
        stretch = -(-len(self) * 2 // MAX_POINTS)
        kept = []
        for start in range(0, len(self), stretch):
            part = range(start, min(start + stretch, len(self)))
            kept += sorted({min(part, key=self.values.__getitem__), max(part, key=self.values.__getitem__)})
        return Curve([self.steps[i] for i in kept], [self.values[i] for i in kept], self.lost, self.first_lost)

    def smooth(self) -> "Curve | None":
        """The mean over a window of about a fortieth of the points; None where there are too few to need it."""
        if len(self) < SMOOTH_FROM:
            return None
        half = max(2, len(self) // 80)
        sums = [0.0]
        for value in self.values:
            sums.append(sums[-1] + value)
        means = []
        for i in range(len(self)):
            # At the steep start the window shrinks but stays centred, else it would be flattened. At the end it doesn't:
            # one noisy last value would look like the result.
            before = min(half, i)
            low, high = i - before, min(i + before, len(self) - 1) + 1
            means.append((sums[high] - sums[low]) / (high - low))
        return Curve(list(self.steps), means)


def curves_of(entries: Iterable[dict]) -> dict[str, Curve]:
    """Log key → curve over the steps; a step that is logged twice (resumed, evaluated again) counts once, the later."""
    points: dict[str, dict[float, object]] = {}
    for entry in entries:
        step = number(entry.get("step"))
        if step is None:
            continue
        for key, value in entry.items():
            if key not in ("step", "epoch") and isinstance(value, int | float) and not isinstance(value, bool):
                points.setdefault(key, {})[step] = value
    curves = {}
    for key, by_step in points.items():
        curve = curves[key] = Curve()
        for step in sorted(by_step):
            value = number(by_step[step])
            if value is None or abs(value) > 1e100:  # matplotlib's axes overflow far above
                curve.lost += 1
                curve.first_lost = step if curve.first_lost is None else curve.first_lost
            else:
                curve.steps.append(step)
                curve.values.append(value)
    return curves
