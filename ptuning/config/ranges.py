"""What each numeric option may be, but for those of a method, which checks its own. Checked before anything is made of them."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

from ptuning.errors import ConfigError

LARGEST_BATCH = (
    65_536  # rows; above that it is a slip of the finger, which torch answers after a long search for memory
)
LARGEST_SEED = 2**32 - 1  # numpy's


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included where not `above` or `below` says otherwise.

    Attributes:
        advice: what to use instead; by default follows from the limits.
        also: one more value that is allowed, with a meaning of its own.
    """

    low: float
    high: float = math.inf
    above: bool = False
    below: bool = False
    advice: str = ""
    also: float | None = None

    def holds(self, value: float) -> bool:
        """Not for nan and infinity."""
        if value == self.also:
            return True
        reaches = value > self.low if self.above else value >= self.low
        stays = value < self.high if self.below else value <= self.high
        return math.isfinite(value) and reaches and stays

    def __str__(self) -> str:
        if self.advice:
            return self.advice
        low = f"more than {self.low:g}" if self.above else f"at least {self.low:g}"
        if self.high == math.inf:
            return low
        return f"{low} and {'less than' if self.below else 'at most'} {self.high:g}"


ONE, ZERO, POSITIVE, SHARE = Range(1), Range(0), Range(0, above=True), Range(0, 1, below=True)
SEED = Range(0, LARGEST_SEED, advice=f"a number from 0 to {LARGEST_SEED}")
BATCH = Range(1, LARGEST_BATCH)

RANGES = {
    "max_source_length": ONE,
    "max_target_length": ONE,
    "val_max_target_length": ONE,
    "max_train_samples": ONE,
    "max_eval_samples": ONE,
    "max_predict_samples": ONE,
    "preprocessing_num_workers": Range(1, advice="at least 1, or leave it out"),
    "num_beams": ONE,
    "tensor_parallel": Range(2, advice="at least 2 (the processes of torchrun), or leave it out"),
    "generation_batch_tokens": Range(1, advice="at least 1024"),
    "per_device_train_batch_size": BATCH,
    "tokens_per_batch": Range(1, advice="at least 1 (e.g. 4096), or leave it out for --per_device_train_batch_size"),
    "sequence_parallel": Range(2, advice="at least 2 (the processes of torchrun), or leave it out"),
    "per_device_eval_batch_size": BATCH,
    "gradient_accumulation_steps": BATCH,
    "micro_batch_tokens": Range(0, advice="at least 1 (0: no pieces)"),
    "eval_accumulation_steps": ONE,
    "num_train_epochs": POSITIVE,
    "max_steps": Range(1, also=-1, advice="at least 1, or leave it out for --num_train_epochs"),
    "learning_rate": Range(0, above=True, advice="more than 0 (a prefix: 2e-2, a LoRA: 1e-3, all weights: 1e-4)"),
    "warmup_steps": Range(0, advice="at least 0 (below 1: a share of all steps)"),
    "weight_decay": ZERO,
    "adam_beta1": SHARE,
    "adam_beta2": SHARE,
    "adam_epsilon": POSITIVE,
    "max_grad_norm": Range(0, advice="at least 0 (0: no clipping)"),
    "neftune_noise_alpha": POSITIVE,
    "torch_empty_cache_steps": ONE,
    "logging_steps": Range(0, above=True, advice="at least 1 (below 1: a share of all steps)"),
    "eval_steps": Range(0, above=True, advice="at least 1 (below 1: a share of all steps)"),
    "save_steps": Range(0, above=True, advice="at least 1 (below 1: a share of all steps)"),
    "eval_delay": ZERO,
    "save_total_limit": Range(1, advice="at least 1, or leave it out to keep all"),
    "early_stopping_patience": ONE,
    "seed": SEED,
    "data_seed": SEED,
    "dataloader_num_workers": Range(0, 256),
    "dataloader_prefetch_factor": ONE,
    "ddp_bucket_cap_mb": ONE,
    "ddp_timeout": Range(1, advice="at least 1 (seconds)"),
}


def check_ranges(argv: list[str]) -> None:
    """Every numeric option of a command line (`--name value`).

    Raises:
        ConfigError: the value, the limit and what to use. What is no number is left to the parser.
    """
    for token, text in itertools.pairwise(argv):
        if not token.startswith("--") or token.removeprefix("--") not in RANGES:
            continue
        try:
            value = float(text)
        except ValueError:
            continue
        _hold(token.removeprefix("--"), value, text)


def check_values(values: Mapping[str, object]) -> None:
    """The same of options that have been read: name → value. What isn't given (None) and what is no number is left out."""
    for name, value in values.items():
        if name in RANGES and isinstance(value, int | float):
            _hold(name, value, str(value))


def _hold(name: str, value: float, text: str) -> None:
    if not RANGES[name].holds(value):
        raise ConfigError(f"--{name} is {text}; use {RANGES[name]}")
