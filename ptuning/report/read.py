"""A run folder as a `Run`: whatever is there. Nothing here raises for a damaged file."""

from dataclasses import dataclass, field
from pathlib import Path

from ptuning.errors import ConfigError
from ptuning.report.curves import Curve, curves_of
from ptuning.report.lines import Lines, number, read_object
from ptuning.report.predictions import Predictions, read_predictions
from ptuning.report.probe import Probe, read_probe

FILES = ("run.json", "evaluation.json", "log.jsonl", "data.json", "metrics.json", "predictions.jsonl")
PATTERNS = (
    *FILES,
    "probe*.jsonl",
    "outcome.json",
    "run-resumed-*.json",
    "predictions_base.jsonl",
    "predictions*.part*",
)
STATUSES = ("finished", "failed", "interrupted")


@dataclass
class Run:
    """What a run folder says about its run. Every field may be empty."""

    folder: Path
    name: str
    record: dict = field(default_factory=dict)  # the latest run*.json; where nothing was trained, evaluation.json
    evaluation: dict = field(default_factory=dict)  # evaluation.json of a later evaluation in the folder of a training
    resumes: list[int] = field(default_factory=list)  # steps that the run was resumed at
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
        """finished, failed, interrupted, or "no end recorded" where the run is still going on or was killed."""
        status = self.outcome.get("status")
        return status if status in STATUSES else "no end recorded"

    @property
    def method(self) -> str:
        """How it was tuned, in words."""
        config = self.config
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
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder; give the --output_dir of a run")
    if not any(path.is_file() for pattern in PATTERNS for path in folder.glob(pattern)):
        raise ConfigError(f"{folder} has no run in it: expected {', '.join(FILES[:-1])} or {FILES[-1]} there")
    run = Run(folder=folder, name=name or folder.resolve().name)
    run.record, run.resumes = _records(folder)
    run.evaluation = read_object(folder / "evaluation.json")
    if not run.record:
        run.record, run.evaluation = run.evaluation, {}
    run.outcome = read_object(folder / "outcome.json")
    run.best = read_object(folder / "best.json")
    run.data = _dicts(read_object(folder / "data.json"))
    run.metrics = _dicts(read_object(folder / "metrics.json"))
    log = Lines(folder / "log.jsonl")
    entries = [entry for _, entry in log]
    run.curves = curves_of(entries)
    run.last = {key: value for entry in entries for key in entry if (value := number(entry[key])) is not None}
    _note_bad(run, "log.jsonl", log.bad)
    if texts:
        run.predictions = read_predictions(folder)
        run.probe = read_probe(folder)
        _note_bad(run, "the predictions", run.predictions.bad)
        _note_bad(run, "probe.jsonl", run.probe.bad)
    for file in ("run.json", "evaluation.json", "data.json", "metrics.json", "outcome.json", "best.json"):
        if (folder / file).exists() and not read_object(folder / file):
            run.problems.append(f"{file} is not readable")
    return run


def _records(folder: Path) -> tuple[dict, list[int]]:
    resumed = {
        int(number): path
        for path in folder.glob("run-resumed-*.json")
        if (number := path.stem.removeprefix("run-resumed-")).isdecimal()
    }
    steps = sorted(resumed)
    for path in [*(resumed[step] for step in reversed(steps)), folder / "run.json"]:
        if record := read_object(path):
            return record, steps
    return {}, steps


def _note_bad(run: Run, file: str, bad: int) -> None:
    if bad:
        run.problems.append(f"{bad} line{'s' if bad > 1 else ''} of {file} could not be read")


def _dict(value) -> dict:
    return value if isinstance(value, dict) else {}


def _dicts(values: dict) -> dict[str, dict]:
    return {str(key): value for key, value in values.items() if isinstance(value, dict)}
