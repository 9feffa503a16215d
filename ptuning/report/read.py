"""A run folder as a `Run`: whatever is there, the log as curves. Nothing here raises for a damaged file."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ptuning.errors import ConfigError
from ptuning.report.answers import Predictions, Probe, read_predictions, read_probe
from ptuning.report.text import number
from ptuning.report.words import words
from ptuning.runs import RunFolder, running_since
from ptuning.runs.files import read_json_if_possible
from ptuning.runs.folder import BEST, DATA, EVALUATION, LOG, METRICS, OUTCOME, PROBE, RECORD, TUNED
from ptuning.runs.lines import Lines

FILES = (RECORD, EVALUATION, LOG, DATA, METRICS, TUNED)  # what a run folder usually has, for messages
MAX_POINTS = 2000
SMOOTH_FROM = 40  # points: fewer are shown as they are
STATUSES = ("finished", "failed", "interrupted")


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

    def __hash__(self) -> int:
        """Of its points, for figures that are kept: a curve that has been read stays as it is."""
        return hash((tuple(self.steps), tuple(self.values)))

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


@dataclass
class Run:
    """What a run folder says about its run. Every field may be empty."""

    folder: Path
    name: str
    record: dict = field(default_factory=dict)  # the latest run*.json; where nothing was trained, evaluation.json
    evaluation: dict = field(default_factory=dict)  # evaluation.json of a later evaluation in the folder of a training
    resumes: list[int] = field(default_factory=list)  # steps that the run was resumed at
    running: bool = False  # a process of this machine is at work in the folder
    outcome: dict = field(default_factory=dict)
    data: dict[str, dict] = field(default_factory=dict)
    metrics: dict[str, dict] = field(default_factory=dict)
    curves: dict[str, Curve] = field(default_factory=dict)  # log key → curve
    last: dict[str, float] = field(default_factory=dict)  # log key → its last value
    best: dict = field(default_factory=dict)  # best.json
    predictions: Predictions = field(default_factory=Predictions)
    probe: Probe = field(default_factory=Probe)
    problems: list[str] = field(default_factory=list)  # what could not be read

    @property
    def config(self) -> dict:
        """Every option."""
        return _dict(self.record.get("config"))

    @property
    def status(self) -> str:
        """running, finished, failed, interrupted, or "no end recorded" where it was killed, or runs on another machine."""
        if self.running:
            return "running"
        status = self.outcome.get("status")
        return status if status in STATUSES else "no end recorded"

    @property
    def method(self) -> str:
        """How it was tuned, in words: those of the record, or of an older record's options."""
        config = self.config
        if isinstance(words := self.record.get("method"), str) and words:
            return words
        length = config.get("pre_seq_len")
        if length is not None:
            return f"prefix of {length}" + (" with projection" if config.get("prefix_projection") else "")
        if config.get("ptuning_checkpoint") is not None:
            return f"prefix {config['ptuning_checkpoint']}"
        if not config:
            return "unknown"
        return "all weights" if config.get("do_train") else "no tuning"


def read_run(folder: str | Path, name: str | None = None, texts: bool = True) -> Run:
    """Reads a run folder.

    Args:
        name: of the run; default: the folder's.
        texts: also read the predictions and the probe, which can be large.

    Raises:
        ConfigError: `folder` is no folder, or has none of the files of a run.
    """
    files = RunFolder(folder)
    if not files.path.is_dir():
        raise ConfigError(f"{folder} is not a folder; give the --output_dir of a run")
    if not files.says_something():
        raise ConfigError(f"{folder} has no run in it: expected {', '.join(FILES[:-1])} or {FILES[-1]} there")
    run = Run(folder=files.path, name=name or files.path.resolve().name)

    def read_or_note(file: str) -> dict:
        found = read_json_if_possible(files / file)
        if not found and (files / file).exists():
            run.problems.append(words("unreadable", file=file))
        return found

    run.resumes, run.record = files.resumes(), files.latest_record()
    if not run.record and (files / RECORD).exists():
        run.problems.append(words("unreadable", file=RECORD))
    run.evaluation = read_or_note(EVALUATION)
    if not run.record:
        run.record, run.evaluation = run.evaluation, {}
    run.data, run.metrics = _dicts(read_or_note(DATA)), _dicts(read_or_note(METRICS))
    run.outcome, run.best = read_or_note(OUTCOME), read_or_note(BEST)
    if since := running_since(files):
        run.running, run.outcome = True, {"started": since}  # an outcome there is that of an earlier run
    log = Lines(files / LOG)
    entries = [entry for _, entry in log]
    run.curves = curves_of(entries)
    run.last = {key: value for entry in entries for key in entry if (value := number(entry[key])) is not None}
    _note_bad(run, LOG, log.bad)
    if texts:
        run.predictions, run.probe = read_predictions(files), read_probe(files)
        _note_bad(run, words("the_predictions"), run.predictions.bad)
        _note_bad(run, PROBE, run.probe.bad)
    return run


def _note_bad(run: Run, file: str, bad: int) -> None:
    if bad:
        run.problems.append(words("bad_lines" if bad > 1 else "bad_line", file=file, count=bad))


def _dict(value) -> dict:
    return value if isinstance(value, dict) else {}


def _dicts(values: dict) -> dict[str, dict]:
    return {str(key): value for key, value in values.items() if isinstance(value, dict)}
