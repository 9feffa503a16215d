"""Gradient checkpointing where nobody has said whether: on where the run would not fit without it, off where it does."""

from collections.abc import Callable
from dataclasses import replace

from ptuning.config import TuningArguments
from ptuning.distributed import most_anywhere
from ptuning.messages import message
from ptuning.runs import RunRecord
from ptuning.training.estimate import Estimate


def choose_checkpointing(
    training: TuningArguments, before: RunRecord | None, estimate: Estimate, say: Callable[[str], None]
) -> Estimate:
    """Settles --gradient_checkpointing in the options, so that the run's record holds what was done.

    What was said is obeyed, and a resumed run goes on as it began. Else it is on where any process's memory is tight or too small
    without it and not with it; where neither fits the estimate gives better advice.

    Args:
        training: the options; changed where nothing was said.
        before: the run that is continued.
        estimate: of the run as the options have it.
        say: gets a line where it is switched on.

    Returns:
        The estimate of the run as it will be.
    """
    if training.checkpointing_given:
        return estimate
    other = estimate.with_work(replace(estimate.work, checkpointing=True))
    kept = None if before is None else before.config.get("gradient_checkpointing")
    needed = bool(most_anywhere(int(_helps(estimate, other)))) if kept is None else kept
    training.gradient_checkpointing = training.activation_checkpointing = needed
    if not needed:
        return estimate
    if kept is None:
        say(message("checkpointing_on"))
    return other


def _helps(without: Estimate, checkpointed: Estimate) -> bool:
    if without.short:
        return not checkpointed.short
    return without.tight and not checkpointed.tight
