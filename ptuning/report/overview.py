"""The tables of the page: the run in a few figures, its scores, its data, and the options that matter most."""

from datetime import datetime
from typing import Any

from ptuning.evaluation.compare import MORE
from ptuning.report.figures import FEWEST_POINTS, SPLITS, best_point, curve_name, interval, pair, shown_curves
from ptuning.report.read import Run
from ptuning.report.text import better, duration, in_order, metric_name, names_in, number, show_number
from ptuning.report.words import words

MAIN_OPTIONS = (
    "model_name_or_path",
    "ptuning_checkpoint",
    "pre_seq_len",
    "prefix_projection",
    "lora_rank",
    "lora_alpha",
    "lora_dropout",
    "lora_target",
    "use_dora",
    "use_rslora",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "tokens_per_batch",
    "gradient_accumulation_steps",
    "max_source_length",
    "max_target_length",
    "loss_on",
    "mix",
    "seed",
    "dtype",
    "bf16",
    "fp16",
    "quantization_bit",
    "quantization",
    "double_quantization",
    "gradient_checkpointing",
    "deepspeed",
    "early_stopping_patience",
    "generation_mode",
    "num_beams",
    "val_max_target_length",
)


def cards(run: Run) -> list[tuple[str, str, str]]:
    """Label, figure and small print of each headline."""
    found: list[tuple[str, str, str]] = []
    base, tuned = run.metrics.get("base", {}), run.metrics.get("tuned", {})
    scored = [m for m in (*names_in("headline"), *names_in("quality")) if number({**base, **tuned}.get(m)) is not None]
    for metric in list(dict.fromkeys(scored))[:2]:
        found.append(_score_card(base, tuned, metric))
    if point := best_point(run):
        curve = run.curves.get("eval_loss")
        small = words("best_at", step=point[0])
        if curve and curve.steps[-1] > point[0]:
            small += words("last_is", value=show_number(curve.values[-1]))
        found.append((words("eval_loss_card"), show_number(point[1]), small))
    elif (loss := number(run.metrics.get("validation", {}).get("eval_loss"))) is not None:
        found.append((words("eval_loss_card"), show_number(loss), words("on_validation")))
    elif (loss := run.last.get("loss")) is not None:
        found.append((words("training_loss_card"), show_number(loss), words("last_logged")))
    if (step := run.last.get("step")) is not None:
        planned, epoch = number(run.config.get("max_steps")), run.last.get("epoch")
        parts = [words("of_steps", steps=planned)] if planned and planned > 0 else []
        parts += [] if epoch is None else [words("epochs", epochs=epoch)]
        found.append((words("steps_card"), show_number(step), words("comma").join(parts)))
    if (seconds := run_seconds(run)) is not None:
        speed = run.curves.get("tokens_per_second")
        small = words("training_rate", rate=sum(speed.values) / len(speed)) if speed else ""
        found.append((words("time_card"), duration(seconds), small))
    if memory := run.curves.get("memory_gib"):
        found.append((words("memory_card"), f"{max(memory.values):.1f} GiB", ""))
    return found


def _score_card(base: dict, tuned: dict, metric: str) -> tuple[str, str, str]:
    values = [number(scores.get(metric)) for scores in (base, tuned)]
    figure = " → ".join(show_number(value, 2) for value in values if value is not None)
    owner, name = (tuned, "tuned") if values[1] is not None else (base, "base")
    span, small = interval(owner, metric), [words("base_tuned" if None not in values else name)]
    if span:
        small.append(words("interval_95", low=span[0], high=span[1]))
    return metric_name(metric), figure, words("comma").join(small)


def run_seconds(run: Run) -> float | None:
    """From start to end, or until now, where they are recorded; else the training's time."""
    try:
        if run.status == "running":
            return (datetime.now().astimezone() - datetime.fromisoformat(str(run.outcome["started"]))).total_seconds()
        times = [datetime.fromisoformat(str(run.outcome[key])) for key in ("started", "ended")]
        return (times[1] - times[0]).total_seconds()
    except (KeyError, ValueError, TypeError):
        return run.last.get("train_runtime")


def main_options(run: Run) -> list[tuple[str, object]]:
    """The options that matter most, those that are set, with the effective batch."""
    config = run.config
    if config.get("tokens_per_batch") is not None:  # no batch is a number of rows
        config = {key: value for key, value in config.items() if key != "per_device_train_batch_size"}
    rows = [(key, config[key]) for key in MAIN_OPTIONS if config.get(key) not in (None, False, -1)]
    world = number(run.record.get("world_size"))
    if world is not None:
        rows.append(("world_size", world))
    batch, steps = (number(config.get(key)) for key in ("per_device_train_batch_size", "gradient_accumulation_steps"))
    if world is not None and batch is not None and steps is not None:
        rows.append((words("effective_batch"), batch * steps * world))
    return rows


def few_values(run: Run) -> tuple[list[float], list[tuple[str, list[float | None]]]]:
    """What was logged at so few steps that it is no curve yet: the steps, and name and values of each."""
    few = {key: curve for key in shown_curves(run) if 0 < len(curve := run.curves[key]) < FEWEST_POINTS}
    steps = sorted({step for curve in few.values() for step in curve.steps})
    rows = []
    for key, curve in few.items():
        values = dict(zip(curve.steps, curve.values, strict=True))
        rows.append((curve_name(key), [values.get(step) for step in steps]))
    return steps, rows


def score_rows(base: dict, tuned: dict, changes: dict) -> list[dict]:
    """The score table: one row a metric, with both values, intervals, the change and whether it is for the better (1), for the
    worse (-1), or nothing can be said (0).

    Args:
        changes: metric → what `ptuning compare` says of it, where the evaluation knows.
    """
    keys = in_order(key for scores in (base, tuned) for key in scores if number(scores[key]) is not None)
    rows = []
    for key in keys:
        before, after = number(base.get(key)), number(tuned.get(key))
        values = {"base": before, "tuned": after}
        change = None if before is None or after is None else after - before
        about: Any = changes.get(key)
        about = about if isinstance(about, dict) else {}
        of_base, of_tuned, span = interval(base, key), interval(tuned, key), pair(about.get("interval"))
        sure = True
        if span is not None:
            sure = about.get("verdict") == MORE
        elif of_base is not None and of_tuned is not None:
            # An older evaluation: intervals that overlap leave it open.
            sure = of_tuned[0] > of_base[1] or of_tuned[1] < of_base[0]
        spans = {"base": of_base, "tuned": of_tuned, "change": span}
        verdict = better(key) * (1 if change > 0 else -1) if change and sure else 0
        grey = change is not None and not sure
        rows.append({"key": key, "values": values, "spans": spans, "change": change, "verdict": verdict, "grey": grey})
    return rows


def data_table(run: Run) -> list[dict]:
    """What is known of each split: from data.json, else file and fingerprint from the configuration."""
    prints = run.record.get("data_sha256")
    prints = prints if isinstance(prints, dict) else {}
    names = [split for split in SPLITS if split in run.data or split in prints]
    names += [split for split in run.data if split not in names]
    return [
        {"split": split, "file": run.config.get(f"{split}_file"), "sha256": prints.get(split)}
        | {key: value for key, value in run.data.get(split, {}).items() if value is not None}
        for split in names
    ]
