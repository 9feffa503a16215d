"""Which precision a base has: as its options ask, or as a model in memory is. Nothing else decides it."""

from __future__ import annotations

from typing import Any, Protocol

from transformers import PreTrainedConfig

from ptuning.errors import ConfigError
from ptuning.packages import require
from ptuning.quantization import nf4
from ptuning.quantization.precision import METHOD, Precision, precision_of


class Asking(Protocol):
    """The options of every command that loads a base."""

    @property
    def quantization_bit(self) -> int | None: ...
    @property
    def quantization(self) -> str | None: ...
    @property
    def double_quantization(self) -> bool: ...


def asked_precision(options: Asking) -> Precision | None:
    """The precision that options ask for; None: none. Errors as `chosen`."""
    return chosen(options.quantization_bit, options.quantization, options.double_quantization)


def chosen(quantization_bit: int | None, quantization: str | None, double_quantization: bool) -> Precision | None:
    """The precision that is asked for; None: none.

    Raises:
        ConfigError: there is no such precision, they contradict each other, or a package is missing.
    """
    if double_quantization and quantization != nf4.NAME:
        raise ConfigError(
            f"--double_quantization is for --quantization {nf4.NAME}, whose scales it stores in 8 bit; leave it out"
        )
    if quantization is None:
        return None if quantization_bit is None else precision_of(quantization_bit)
    if quantization != nf4.NAME:
        raise ConfigError(f"--quantization {quantization}: use {nf4.NAME}, or --quantization_bit 8 or 4")
    if quantization_bit is not None:
        raise ConfigError(
            f"--quantization {quantization} and --quantization_bit {quantization_bit} are two ways to store the same matrices; "
            "leave one out"
        )
    require(f"--quantization {nf4.NAME}", "bitsandbytes", "ptuning[bnb]", instead="give --quantization_bit 4")
    return nf4.Nf4(double_quantization)


def precision_in(config: PreTrainedConfig) -> Precision | None:
    """How a model's matrices are stored, by its configuration; None: not quantised."""
    found: Any = getattr(config, "quantization_config", None)
    values = found if isinstance(found, dict) or found is None else found.to_dict()
    if values is None:
        return None
    if values.get("quant_method") == nf4.METHOD:
        return nf4.Nf4(values["bnb_4bit_use_double_quant"])
    return precision_of(values["bits"]) if values.get("quant_method") == METHOD else None
