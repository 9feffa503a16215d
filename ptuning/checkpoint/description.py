"""What a prefix checkpoint says of itself: `ptuning_config.json`."""

import json
import typing
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ptuning.methods.prefix.encoder import PrefixShape
from ptuning.errors import CheckpointError
from ptuning.runs.files import version_of

FILE = "ptuning_config.json"
FORMAT = "ptuning-prefix"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class BaseDescription:
    """The base a prefix was trained on. The numbers have their names in the official config.json."""

    name_or_path: str
    fingerprint: str
    num_layers: int
    multi_query_group_num: int
    kv_channels: int
    hidden_size: int

    @property
    def shape(self) -> PrefixShape:
        return PrefixShape(self.num_layers, self.multi_query_group_num, self.kv_channels, self.hidden_size)


@dataclass(frozen=True)
class PrefixDescription:
    """Everything needed to use the prefix as it was trained.

    Args:
        pre_seq_len: T.
        prefix_projection: the reparametrised variant.
        base: the base model.
        template: ptuning.families.chatglm2.template.NAME when it was trained.
        max_source_length: tokens of the prompt in training, None = unknown.
        max_target_length: tokens of the answer in training, None = unknown.
        source_prefix: text in front of every prompt.
        loss_on: `last` answer or `all`.
        dtype: of the prefix.
        base_dtype: of the base while training.
        versions: of ptuning, torch, transformers and python.
        file: name of the safetensors file beside the description; set by `save_prefix`.
        sha256: of that file; set by `save_prefix`.
    """

    pre_seq_len: int
    prefix_projection: bool
    base: BaseDescription
    template: str
    max_source_length: int | None = None
    max_target_length: int | None = None
    source_prefix: str = ""
    loss_on: str = "last"
    dtype: str = "float32"
    base_dtype: str = "float32"
    versions: dict[str, str] = field(default_factory=dict)
    file: str = ""
    sha256: str = ""

    def to_json(self) -> str:
        values = {"format": FORMAT, "format_version": FORMAT_VERSION} | asdict(self)
        return json.dumps(values, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, path: Path) -> "PrefixDescription":
        """Reads what `to_json` wrote; unknown keys are ignored.

        Args:
            path: of the file, for messages.

        Raises:
            CheckpointError: not JSON, another format, a newer version of it, a missing key or one of another type.
        """
        try:
            values = json.loads(text)
        except ValueError as cause:
            raise CheckpointError(f"{path}: not valid JSON ({cause}); the checkpoint is damaged.") from cause
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            found = values.get("format") if isinstance(values, dict) else type(values).__name__
            raise CheckpointError(f"{path}: format is {found!r}, expected {FORMAT!r}.")
        _check_version(values, path)
        values["base"] = _read(BaseDescription, values.get("base"), path, "base.")
        return _read(cls, values, path)


def _check_version(values: dict[str, Any], path: Path) -> None:
    number = values.get("format_version")
    if not isinstance(number, int) or number < 1:
        raise CheckpointError(f"{path}: format_version is {number!r}, expected a number from 1 to {FORMAT_VERSION}.")
    if number > FORMAT_VERSION:
        versions = values.get("versions")
        writer = versions.get("ptuning", "unknown") if isinstance(versions, dict) else "unknown"
        raise CheckpointError(
            f"{path}: format_version is {number}, and this ptuning ({version_of('ptuning')}) reads up to {FORMAT_VERSION}. It was "
            f"written by ptuning {writer}; install that version or a newer one."
        )


def _read(cls: type, values: Any, path: Path, prefix: str = "") -> Any:
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: {prefix.rstrip('.')} is {values!r}, expected an object.")
    hints, known = typing.get_type_hints(cls), {}
    for item in fields(cls):
        name, hint = item.name, hints[item.name]
        if name not in values:
            if item.default is MISSING and item.default_factory is MISSING:
                raise CheckpointError(f"{path}: {prefix}{name} is missing; the checkpoint is damaged.")
            continue
        plain = typing.get_origin(hint) if typing.get_origin(hint) is dict else hint
        if not isinstance(values[name], plain):
            expected = getattr(plain, "__name__", str(plain))
            raise CheckpointError(f"{path}: {prefix}{name} is {values[name]!r}, expected {expected}.")
        known[name] = values[name]
    return cls(**known)
