"""Every option of a run: declared in options.py, read in parse.py, checked against each other in checks.py."""

from ptuning.config.options import (
    Config,
    DataArguments,
    GenerationArguments,
    ModelArguments,
    TuningArguments,
)
from ptuning.config.parse import expand_config, parse, with_config

__all__ = [
    "Config",
    "DataArguments",
    "GenerationArguments",
    "ModelArguments",
    "TuningArguments",
    "expand_config",
    "parse",
    "with_config",
]
