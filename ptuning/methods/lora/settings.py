"""The settings of a LoRA, and peft's words for them."""

import math
from dataclasses import dataclass, replace
from typing import Any

from ptuning.errors import CheckpointError, ConfigError

RANK, ALPHA, DROPOUT, TARGET = 8, 32, 0.1, "all"
# What leaves the base as it is. The others of peft (pissa, olora, corda, eva, loftq) take something out of its weights, or
# need data first: without the adapter the model would no longer be the base.
INITS = {"default": True, "gaussian": "gaussian", "orthogonal": "orthogonal"}
_NAMES = ("lora_rank", "lora_alpha", "lora_dropout", "use_dora", "use_rslora")


@dataclass(frozen=True)
class LoraSettings:
    """Of one LoRA; where layers differ (an adapter of another program), those of most.

    Args:
        lora_rank: r, width of the factors.
        lora_alpha: the product is scaled by alpha / r, with rslora by alpha / √r.
        lora_dropout: on what goes into the factors while training.
        use_dora: a learned length for each output besides (DoRA).
        use_rslora: see lora_alpha.
        lora_init: how the first factor starts; the second starts with zeros.

    Raises:
        ConfigError: a value out of its range.
    """

    lora_rank: int = RANK
    lora_alpha: float = ALPHA
    lora_dropout: float = DROPOUT
    use_dora: bool = False
    use_rslora: bool = False
    lora_init: str = "default"

    def __post_init__(self):
        if self.lora_rank < 1:
            raise ConfigError(f"--lora_rank is {self.lora_rank}; use at least 1 (usual: 8 to 64)")
        if not (self.lora_alpha > 0 and math.isfinite(self.lora_alpha)):
            raise ConfigError(f"--lora_alpha is {self.lora_alpha:g}; use more than 0 (usual: 2 to 4 times --lora_rank)")
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError(
                f"--lora_dropout is {self.lora_dropout:g}; use 0 up to, not including, 1 (usual: 0 to 0.1)"
            )
        if self.lora_init not in INITS:
            raise ConfigError(
                f"--lora_init {self.lora_init}: use one of {', '.join(INITS)} (pissa and others of peft change the base's own "
                "weights, so that the untuned model and other adapters could no longer be answered with)"
            )

    @classmethod
    def of_options(cls, options: Any) -> "LoraSettings":
        """From config.ModelArguments; what isn't given is this class's default."""
        given = {name: getattr(options, name) for name in (*_NAMES, "lora_init")}
        return cls(**{name: value for name, value in given.items() if value is not None})

    @classmethod
    def of_peft(cls, values: dict[str, Any], folder: Any) -> "LoraSettings":
        """From adapter_config.json.

        Raises:
            CheckpointError: a number is missing or can't be one.
        """
        try:
            rank, alpha, dropout = int(values["r"]), float(values["lora_alpha"]), float(values.get("lora_dropout", 0))
            return cls(rank, alpha, dropout, bool(values.get("use_dora")), bool(values.get("use_rslora")))
        except (KeyError, TypeError, ValueError, ConfigError) as cause:
            raise CheckpointError(
                f"{folder}: adapter_config.json has no usable r, lora_alpha and lora_dropout ({cause}); copy the folder again."
            ) from cause

    def continued(self, options: Any, folder: Any) -> "LoraSettings":
        """Those of a checkpoint, held against the options given with it; the dropout may be another one.

        Raises:
            CheckpointError: an option says something else than the checkpoint.
            ConfigError: an option that is only for a new one, or out of its range.
        """
        if options.lora_init is not None:
            raise ConfigError("--lora_init is for a new LoRA, and --ptuning_checkpoint goes on from one; leave one out")
        for name in ("lora_rank", "lora_alpha", "use_dora", "use_rslora"):
            expected, found = getattr(options, name), getattr(self, name)
            if expected not in (None, False) and expected != found:
                raise CheckpointError(
                    f"{folder}: {name} is {_plain(found)} in the checkpoint and {_plain(expected)} was asked for; leave {name} "
                    "out, it is read from the checkpoint."
                )
        return self if options.lora_dropout is None else replace(self, lora_dropout=options.lora_dropout)

    def to_dict(self) -> dict[str, Any]:
        """For the manifest."""
        return {name: getattr(self, name) for name in (*_NAMES, "lora_init")}

    def to_peft(self) -> dict[str, Any]:
        """For peft.LoraConfig."""
        return {
            "task_type": "CAUSAL_LM",
            "r": self.lora_rank,
            "lora_alpha": int(self.lora_alpha) if float(self.lora_alpha).is_integer() else self.lora_alpha,
            "lora_dropout": self.lora_dropout,
            "use_dora": self.use_dora,
            "use_rslora": self.use_rslora,
            "init_lora_weights": INITS[self.lora_init],
        }


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
