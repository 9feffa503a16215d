"""The tables of the page: the run in a few figures, its scores, its data, and the options that matter most."""

from datetime import datetime

from ptuning.report.figures import SPLITS, best_point, interval
from ptuning.report.read import Run
from ptuning.report.text import better, duration, in_order, metric_name, names_in, number, show_number

MAIN_OPTIONS = (
    "model_name_or_path",
    "ptuning_checkpoint",
    "pre_seq_len",
    "prefix_projection",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
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
        words = f"best, at step {point[0]:g}"
        if curve and curve.steps[-1] > point[0]:
            words += f"; last {show_number(curve.values[-1])}"
        found.append(("Eval loss", show_number(point[1]), words))
    elif (loss := number(run.metrics.get("validation", {}).get("eval_loss"))) is not None:
        found.append(("Eval loss", show_number(loss), "on the validation rows"))
    elif (loss := run.last.get("loss")) is not None:
        found.append(("Training loss", show_number(loss), "the last logged"))
    if (step := run.last.get("step")) is not None:
        planned, epoch = number(run.config.get("max_steps")), run.last.get("epoch")
        parts = [f"of {planned:g}" if planned and planned > 0 else "", "" if epoch is None else f"{epoch:.2f} epochs"]
        found.append(("Steps", show_number(step), ", ".join(part for part in parts if part)))
    if (seconds := run_seconds(run)) is not None:
        speed = run.curves.get("tokens_per_second")
        words = f"{sum(speed.values) / len(speed):,.0f} training tokens a second" if speed else ""
        found.append(("Time", duration(seconds), words))
    if memory := run.curves.get("memory_gib"):
        found.append(("Peak memory", f"{max(memory.values):.1f} GiB", ""))
    return found


def _score_card(base: dict, tuned: dict, metric: str) -> tuple[str, str, str]:
    values = [number(scores.get(metric)) for scores in (base, tuned)]
    figure = " → ".join(show_number(value, 2) for value in values if value is not None)
    owner, name = (tuned, "tuned") if values[1] is not None else (base, "base")
    span, words = interval(owner, metric), []
    words.append("base → tuned" if None not in values else name)
    if span:
        words.append(f"95 % interval {span[0]:.2f} – {span[1]:.2f}")
    return metric_name(metric), figure, ", ".join(words)


def run_seconds(run: Run) -> float | None:
    """From start to end, where both are recorded; else the training's time."""
    try:
        times = [datetime.fromisoformat(str(run.outcome[key])) for key in ("started", "ended")]
        return (times[1] - times[0]).total_seconds()
    except (KeyError, ValueError, TypeError):
        return run.last.get("train_runtime")


def main_options(run: Run) -> list[tuple[str, object]]:
    """The options that matter most, those that are set, with the effective batch."""
    config = run.config
    rows = [(key, config[key]) for key in MAIN_OPTIONS if config.get(key) not in (None, False, -1)]
    world = number(run.record.get("world_size"))
    if world is not None:
        rows.append(("world_size", world))
    batch, steps = (number(config.get(key)) for key in ("per_device_train_batch_size", "gradient_accumulation_steps"))
    if world is not None and batch is not None and steps is not None:
        rows.append(("effective batch", batch * steps * world))
    return rows


def score_rows(base: dict, tuned: dict) -> list[dict]:
    """The score table: one row a metric, with both values, intervals, the change and whether it is for the better."""
    keys = in_order(key for scores in (base, tuned) for key in scores if number(scores[key]) is not None)
    rows = []
    for key in keys:
        before, after = number(base.get(key)), number(tuned.get(key))
        values = {"base": before, "tuned": after}
        change = None if before is None or after is None else after - before
        verdict = 0 if not change else better(key) * (1 if change > 0 else -1)
        spans = {"base": interval(base, key), "tuned": interval(tuned, key)}
        rows.append({"key": key, "values": values, "spans": spans, "change": change, "verdict": verdict})
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
