"""The forgetting probe: general questions answered before and after tuning."""

from dataclasses import dataclass, field
from pathlib import Path

from ptuning.report.lines import Lines, number
from ptuning.report.predictions import as_text

SHOWN_OF_A_KIND = 8
SHOWN_KINDS = 20


@dataclass
class ProbeKind:
    """All questions of one kind."""

    name: str
    rows: int = 0
    same: int = 0  # the tuned model answers word for word as the base did
    losses: list[tuple[float, float]] = field(default_factory=list)  # of the base's answer: (before, after)
    examples: list[dict] = field(default_factory=list)  # the first rows: prompt, base, tuned, base_loss, tuned_loss

    @property
    def base_loss(self) -> float | None:
        """Mean loss of the base's own answers under the base."""
        return sum(before for before, _ in self.losses) / len(self.losses) if self.losses else None

    @property
    def tuned_loss(self) -> float | None:
        """The same answers' mean loss under the tuned model."""
        return sum(after for _, after in self.losses) / len(self.losses) if self.losses else None

    @property
    def change(self) -> float | None:
        """How much less likely the base's answers have become."""
        return self.tuned_loss - self.base_loss if self.losses else None


@dataclass
class Probe:
    """The probe by kind, with all of them together as `total`."""

    kinds: list[ProbeKind] = field(default_factory=list)
    total: ProbeKind = field(default_factory=lambda: ProbeKind("all"))
    more_kinds: int = 0
    bad: int = 0
    only_base: int = 0  # questions that the base has answered, where the tuned model's answers are missing


def read_probe(folder: Path) -> Probe:
    """A run folder's probe.jsonl, grouped by kind; empty where it is missing."""
    kinds: dict[str, ProbeKind] = {}
    probe, lines = Probe(), Lines(folder / "probe.jsonl")
    for _, line in lines:
        name = as_text(line.get("kind"))[:60] or "other"
        kind = kinds.setdefault(name, ProbeKind(name))
        base, tuned = as_text(line.get("base")), as_text(line.get("tuned"))
        before, after = number(line.get("base_loss")), number(line.get("tuned_loss"))
        for group in (kind, probe.total):
            group.rows += 1
            group.same += base == tuned
            if before is not None and after is not None:
                group.losses.append((before, after))
        if len(kind.examples) < SHOWN_OF_A_KIND:
            prompt = as_text(line.get("prompt"))
            kind.examples.append(
                {"prompt": prompt, "base": base, "tuned": tuned, "base_loss": before, "tuned_loss": after}
            )
    if not kinds:
        probe.only_base = sum(1 for _ in Lines(folder / "probe_base.jsonl"))
    probe.bad = lines.bad
    probe.kinds = list(kinds.values())[:SHOWN_KINDS]
    probe.more_kinds = max(0, len(kinds) - SHOWN_KINDS)
    return probe
