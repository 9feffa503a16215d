"""Reads a DeepSpeed JSON file before transformers does, whose own errors name neither file, line nor fix."""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptuning.config import shipped
from ptuning.errors import ConfigError
from ptuning.packages import require

DEFAULT_LIVE_PARAMETERS = 1_000_000_000  # DeepSpeed's own default of stage3_max_live_parameters
DEFAULT_SUB_GROUP = 1_000_000_000  # DeepSpeed's own default of sub_group_size
DEFAULT_BUCKET = 500_000_000  # DeepSpeed's own default of reduce_bucket_size, in numbers


@dataclass(frozen=True)
class ZeroSettings:
    """What of a DeepSpeed config decides about memory.

    Args:
        stage: 0 to 3.
        offload_optimizer: none, cpu or nvme.
        offload_param: none, cpu or nvme.
        bucket: numbers in a gradient bucket; None = "auto", hidden size squared.
        live_parameters: stage 3: numbers of gathered parameters that may be alive at once.
        sub_group: stage 3: numbers that one optimizer step handles at a time.
        torch_adam: torch's AdamW instead of DeepSpeed's kernels.
    """

    stage: int = 0
    offload_optimizer: str = "none"
    offload_param: str = "none"
    bucket: int | None = None
    live_parameters: int = DEFAULT_LIVE_PARAMETERS
    sub_group: int = DEFAULT_SUB_GROUP
    torch_adam: bool = False

    @classmethod
    def of(cls, values: dict[str, Any]) -> "ZeroSettings":
        """From a checked DeepSpeed config; "auto" counts as transformers fills it in."""
        zero = values.get("zero_optimization") or {}
        bucket, live = zero.get("reduce_bucket_size", DEFAULT_BUCKET), zero.get("stage3_max_live_parameters", "auto")
        return cls(
            stage=zero["stage"] if isinstance(zero.get("stage"), int) else 0,
            offload_optimizer=(zero.get("offload_optimizer") or {}).get("device") or "none",
            offload_param=(zero.get("offload_param") or {}).get("device") or "none",
            bucket=None if bucket == "auto" else int(bucket),
            live_parameters=DEFAULT_LIVE_PARAMETERS if live == "auto" else int(live),
            sub_group=int(zero.get("sub_group_size", DEFAULT_SUB_GROUP)),
            torch_adam=bool(((values.get("optimizer") or {}).get("params") or {}).get("torch_adam")),
        )


def read_deepspeed(source: str | dict[str, Any] | None) -> dict[str, Any] | None:
    """The DeepSpeed config that --deepspeed names; None for None.

    Args:
        source: path of a JSON file, JSON text, or the values themselves.

    Raises:
        ConfigError: no such file; not JSON; not an object.
    """
    if source is None:
        return None
    if isinstance(source, dict):
        return source
    name = "--deepspeed" if source.lstrip().startswith("{") else f"--deepspeed {source}"
    try:
        values = json.loads(source if name == "--deepspeed" else _text(Path(shipped.find(source)).expanduser()))
    except ValueError as error:
        raise ConfigError(
            f"{name}: not valid JSON ({error}); JSON knows no comments and no comma after the last entry"
        ) from error
    if not isinstance(values, dict):
        raise ConfigError(f"{name}: expected an object {{…}}, found {type(values).__name__}")
    zero = values.get("zero_optimization")
    if zero is not None and not isinstance(zero, dict):
        raise ConfigError(f'{name}: zero_optimization is {zero!r}; write "zero_optimization": {{"stage": 3, …}}')
    return values


def check_deepspeed_file(argv: Sequence[str]) -> None:
    """Holds that DeepSpeed is there, and reads the file that --deepspeed names, before TrainingArguments do.

    Args:
        argv: all options, those of a --config file included.

    Raises:
        ConfigError: DeepSpeed isn't installed; else as `read_deepspeed`.
    """
    given = [value for option, value in itertools.pairwise(argv) if option == "--deepspeed"]
    if given:
        without = "leave --deepspeed out and start with torchrun, which keeps all weights on every GPU"
        require("--deepspeed", "deepspeed", "ptuning[full]", instead=without)
        read_deepspeed(given[-1])


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"--deepspeed {path}: not UTF-8 text ({error.reason})") from error
    except OSError as error:
        raise ConfigError(f"--deepspeed {shipped.no_such_file(path)}") from error
