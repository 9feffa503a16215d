"""What a run leaves behind besides weights: its full configuration, versions, data fingerprints and loss curve."""

import contextlib
import json
import platform
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from transformers import TrainerCallback

from ptuning.training.resume import batch_conflicts

PACKAGES = ("ptuning", "torch", "transformers", "accelerate", "deepspeed", "peft", "sentencepiece", "safetensors")

# Options whose change would make a resumed run see other rows, or rows in another order, than the run it continues.
_FIXED_BY_RESUME = (
    "seed",
    "data_seed",
    "max_source_length",
    "max_target_length",
    "loss_on",
    "source_prefix",
    "train_sampling_strategy",
    "pre_seq_len",
    "prefix_projection",
)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a figure."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def write_run(
    folder: Path, config: dict, data: dict[str, str], world_size: int, resumed_from: str | None, trains: bool = True
) -> Path:
    """Writes run.json, or run-resumed-N.json beside it when a run is continued, or evaluation.json.

    Args:
        config: every option.
        data: file → sha256.
        world_size: number of processes.
        resumed_from: the checkpoint, if any.
        trains: False for a run that only evaluates, perhaps in the folder of the one that trained.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = "run.json" if trains else "evaluation.json"
    if resumed_from is not None:
        name = f"run-resumed-{Path(resumed_from).name.removeprefix('checkpoint-')}.json"
    values = {
        "command": sys.argv,
        "config": config,
        "data_sha256": data,
        "world_size": world_size,
        "resumed_from": resumed_from,
        "versions": versions(),
        "platform": platform.platform(),
    }
    path = folder / name
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
    return path


def write_data(folder: Path, summaries: dict[str, dict]) -> None:
    """Writes data.json; splits that an earlier command saw stay.

    Args:
        summaries: split → what `split_summary` returned.
    """
    path = folder / "data.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    path.write_text(json.dumps(before | summaries, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def outcome(folder: Path) -> Iterator[None]:
    """Writes outcome.json when the block ends: finished, failed with the error, or interrupted; and when."""
    started = _now()
    status, error = "finished", None
    try:
        yield
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    except BaseException as cause:
        status, error = "failed", f"{type(cause).__name__}: {cause}"
        raise
    finally:
        values = {"status": status, "error": error, "started": started, "ended": _now()}
        (folder / "outcome.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _now() -> str:
    return datetime.now(UTC).astimezone().isoformat(timespec="seconds")


def resume_conflicts(checkpoint: Path, config: dict, data: dict[str, str], world_size: int) -> list[str]:
    """What differs from the run that wrote `checkpoint` so that resuming would not be exact: one line each, both values."""
    path = _record_of(checkpoint)
    if path is None:
        return []
    before = json.loads(path.read_text(encoding="utf-8"))
    conflicts = [
        f"{key} was {before['config'].get(key)!r}, now {config.get(key)!r}"
        for key in _FIXED_BY_RESUME
        if before["config"].get(key) != config.get(key)
    ]
    conflicts += batch_conflicts(before["config"], config, (before["world_size"], world_size), checkpoint)
    was, now = before["data_sha256"].get("train"), data.get("train")
    if was != now:
        conflicts.append(f"the training data has changed (sha256 {str(was)[:12]}…, now {str(now)[:12]}…)")
    return conflicts


def _record_of(checkpoint: Path) -> Path | None:
    """The record of the run that wrote `checkpoint`: the latest one that was resumed before it, else the first run's."""
    step = checkpoint.name.removeprefix("checkpoint-")
    resumed = {
        int(number): path
        for path in checkpoint.parent.glob("run-resumed-*.json")
        if (number := path.stem.removeprefix("run-resumed-")).isdigit() and step.isdigit() and int(number) < int(step)
    }
    path = resumed[max(resumed)] if resumed else checkpoint.parent / "run.json"
    return path if path.is_file() else None


class LossCurve(TrainerCallback):
    """Writes the log as JSON lines while training runs and draws loss_curve.png at the end, also after an error."""

    def __init__(self, folder: Path):
        self.folder = folder

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.folder.mkdir(parents=True, exist_ok=True)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero:
            write_log(self.folder, state.log_history)

    def on_train_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            draw_curve(self.folder / "loss_curve.png", state.log_history)


def write_log(folder: Path, history: Sequence[dict]) -> None:
    """The whole history each time: it is small, and so a resumed run's file has no gap and no double."""
    text = "".join(json.dumps(entry) + "\n" for entry in history)
    (folder / "log.jsonl").write_text(text, encoding="utf-8")


def draw_curve(path: Path, history: Sequence[dict]) -> None:
    """Training loss, eval loss and learning rate over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for key, label in (("loss", "training loss"), ("eval_loss", "eval loss")):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        if points:
            axis.plot(*zip(*points, strict=True), label=label, marker="o" if len(points) < 20 else None)
    rates = [(entry["step"], entry["learning_rate"]) for entry in history if "learning_rate" in entry]
    if rates:
        right = axis.twinx()
        right.plot(*zip(*rates, strict=True), color="grey", alpha=0.5, linestyle="--")
        right.set_ylabel("learning rate (dashed)")
    axis.set_xlabel("step")
    axis.set_ylabel("loss")
    axis.grid(alpha=0.3)
    if axis.has_data():
        axis.legend(loc="upper right")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
