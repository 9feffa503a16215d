"""The log of a run as it grows, and its curve as a picture."""

from collections.abc import Sequence
from pathlib import Path

from transformers import TrainerCallback

from ptuning.runs import RunFolder
from ptuning.runs.files import write_atomically
from ptuning.runs.folder import CURVE


class LossCurve(TrainerCallback):
    """Writes the log as JSON lines while training runs and draws loss_curve.png at the end, also after an error."""

    def __init__(self, folder: RunFolder):
        self.folder = folder

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero:
            self.folder.write_log(state.log_history)

    def on_train_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            draw_curve(self.folder / CURVE, state.log_history)


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
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=120, format="png"))
    pyplot.close(figure)
