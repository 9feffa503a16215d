"""Which checkpoint is the best: by the eval loss or by any score."""

import difflib
from pathlib import Path

from ptuning.config import TuningArguments
from ptuning.errors import ConfigError
from ptuning.evaluation.metrics import METRICS
from ptuning.messages import message
from ptuning.runs.files import write_json
from ptuning.runs.folder import BEST

LOSS = "eval_loss"


def resolve_best_metric(args: TuningArguments) -> bool:
    """Turns --metric_for_best_model and --early_stopping_patience into the trainer's own options.

    Args:
        args: of the training; changed in place.

    Returns:
        Whether answers must be generated and scored in every evaluation.

    Raises:
        ConfigError: no such score, or no checkpoint would be there for the best evaluation.
    """
    if args.early_stopping_patience is None and args.metric_for_best_model is None and not args.load_best_model_at_end:
        return False
    name = (args.metric_for_best_model or LOSS).removeprefix("eval_")
    better = {"loss": "lower", "perplexity": "lower"}
    better |= {name: metric.better for name, metric in METRICS.items() if not metric.from_losses}
    if name not in better:
        near = difflib.get_close_matches(name, better, n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(better)}"
        raise ConfigError(f"--metric_for_best_model {args.metric_for_best_model}: no such score{hint}")
    if better[name] not in ("lower", "higher"):
        raise ConfigError(
            f"--metric_for_best_model {name}: neither more nor less of it is better; choose another score"
        )
    if args.eval_strategy != args.save_strategy or args.eval_steps != args.save_steps:
        raise ConfigError(
            f"--eval_steps {args.eval_steps} ({args.eval_strategy.value}) and --save_steps {args.save_steps} "
            f"({args.save_strategy.value}) differ, so the best model may not have been saved; give both the same value"
        )
    args.metric_for_best_model, args.greater_is_better = f"eval_{name}", better[name] == "higher"
    args.load_best_model_at_end = True
    return name not in ("loss", "perplexity")


def write_best(folder: Path, state, metric: str) -> str | None:
    """Names the best checkpoint in best.json.

    Args:
        state: the trainer's.
        metric: it was chosen by.

    Returns:
        A sentence for the user; None where no evaluation was made.
    """
    if state.best_model_checkpoint is None:
        return None
    name = Path(state.best_model_checkpoint).name
    best = {"checkpoint": name, "step": state.best_global_step, "metric": metric, "value": state.best_metric}
    write_json(folder / BEST, best)
    return message("best", checkpoint=name, metric=metric, value=state.best_metric)
