"""What a tuned checkpoint says of itself: `ptuning_config.json`, the same for every method."""

from __future__ import annotations

import json
import typing
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ptuning.checkpoint.base import base_fingerprint, base_precision, resolve_base
from ptuning.errors import CheckpointError
from ptuning.families import Dimensions, family_of, read_config
from ptuning.quantization import Precision
from ptuning.runs.files import sha256_of, version_of, versions, write_text
from ptuning.runs.folder import MANIFEST, MANIFEST_1

FORMAT = "ptuning"
FORMAT_VERSION = 2
# Version 1 had a format for each method, and only ChatGLM2's names; `_upgraded` reads both.
_FORMATS_1 = {"ptuning-prefix": "prefix", "ptuning-full": "full"}
_SIZES_1 = {
    "num_layers": "layers",
    "multi_query_group_num": "groups",
    "kv_channels": "head_dim",
    "hidden_size": "hidden",
}


@dataclass(frozen=True)
class BaseModel:
    """The base that was tuned.

    Args:
        name_or_path: where it was loaded from; absolute for a folder, so that it is found from any working directory.
        fingerprint: of its weights.
        family: its family's name.
        layers: L; this and the next three are 0 where they aren't known.
        groups: key/value groups G.
        head_dim: D.
        hidden: width of the hidden states.
        dtype: that it computed in while training.
        precision: of its matrices while training; empty: not quantised.
    """

    name_or_path: str
    fingerprint: str
    family: str
    layers: int
    groups: int
    head_dim: int
    hidden: int
    dtype: str = "float32"
    precision: str = ""


@dataclass(frozen=True)
class Manifest:
    """Everything needed to use a checkpoint as it was trained.

    Args:
        method: how it was tuned.
        base: the base model.
        template: name of the prompt template it was trained with.
        settings: of the method, such as pre_seq_len.
        max_source_length: tokens of the prompt in training, None = unknown.
        max_target_length: tokens of the answer in training, None = unknown.
        source_prefix: text in front of every prompt.
        loss_on: `last` answer or `all`.
        step: optimizer steps taken, None = unknown.
        versions: of ptuning, torch, transformers, python and others.
        file: name of the tensors' file beside the manifest, where there is one of the method's own.
        sha256: of that file.
    """

    method: str
    base: BaseModel
    template: str
    settings: dict[str, Any] = field(default_factory=dict)
    max_source_length: int | None = None
    max_target_length: int | None = None
    source_prefix: str = ""
    loss_on: str = "last"
    step: int | None = None
    versions: dict[str, str] = field(default_factory=dict)
    file: str = ""
    sha256: str = ""

    def require_same(self, file: Path) -> None:
        """Raises CheckpointError where the file's bytes are not those that were saved with this manifest."""
        if (sha256 := sha256_of(file)) != self.sha256:
            raise CheckpointError(
                f"{file}: damaged, its sha256 is {sha256[:16]}… and {MANIFEST} says {self.sha256[:16]}…; copy the folder "
                "again."
            )

    def to_json(self) -> str:
        values = {"format": FORMAT, "format_version": FORMAT_VERSION} | asdict(self)
        return json.dumps(values, indent=2, ensure_ascii=False) + "\n"

    def write(self, folder: Path) -> None:
        """Replaces the folder's manifest in one step."""
        write_text(folder / MANIFEST, self.to_json())

    @classmethod
    def from_json(cls, text: str, path: Path) -> Manifest:
        """Reads what `to_json` wrote, or an earlier version's; unknown keys are ignored.

        Args:
            path: of the file, for messages.

        Raises:
            CheckpointError: not JSON, another format, a newer version of it, a missing key or one of another type.
        """
        try:
            values = json.loads(text)
        except ValueError as cause:
            raise CheckpointError(f"{path}: not valid JSON ({cause}); the checkpoint is damaged.") from cause
        found = values.get("format") if isinstance(values, dict) else type(values).__name__
        if not isinstance(values, dict) or found not in (FORMAT, *_FORMATS_1):
            raise CheckpointError(f"{path}: format is {found!r}, expected {FORMAT!r}.")
        _check_version(values, path)
        if found in _FORMATS_1:
            values = _upgraded(values, path)
        values["base"] = _read(BaseModel, values.get("base"), path, "base.")
        return _read(cls, values, path)


def describe(
    base: str | Path,
    method: str,
    settings: dict[str, Any],
    *,
    dtype: str = "float32",
    precision: Precision | None = None,
    max_source_length: int | None = None,
    max_target_length: int | None = None,
    source_prefix: str = "",
    loss_on: str = "last",
) -> Manifest:
    """The manifest of a run on a base, whose fingerprint and widths are read from its files.

    Args:
        base: folder or hub id.
        method: name of the method.
        settings: of the method.
        dtype: that the base computes in.
        precision: what the run asks for, as in `base_precision`.

    Raises:
        ModelError: the base's files can't be read.
    """
    local = Path(base).expanduser()
    config = read_config(resolve_base(base))
    family = family_of(config)
    sizes: Dimensions = family.dimensions(config)
    precision = base_precision(base, precision)
    return Manifest(
        method=method,
        base=BaseModel(
            name_or_path=str(local.resolve() if local.is_dir() else base),
            fingerprint=base_fingerprint(base),
            family=family.name,
            layers=sizes.layers,
            groups=sizes.groups,
            head_dim=sizes.head_dim,
            hidden=sizes.hidden,
            dtype=dtype,
            precision="" if precision is None else precision.name,
        ),
        template=family.template_name,
        settings=settings,
        max_source_length=max_source_length,
        max_target_length=max_target_length,
        source_prefix=source_prefix,
        loss_on=loss_on,
        versions=versions(),
    )


def read_manifest(folder: str | Path) -> Manifest | None:
    """The manifest in a folder, None where it has none (a base, or a checkpoint of another program).

    Raises:
        CheckpointError: as `Manifest.from_json`.
    """
    path = manifest_file(Path(folder))
    if path is None:
        return None
    try:
        return Manifest.from_json(path.read_text(encoding="utf-8"), path)
    except (OSError, UnicodeDecodeError) as cause:
        raise CheckpointError(f"{path}: can't be read ({cause}); the checkpoint is damaged.") from cause


def manifest_file(folder: Path) -> Path | None:
    """Where a folder's manifest is, None where it has none."""
    return next((path for name in (MANIFEST, MANIFEST_1) if (path := folder / name).is_file()), None)


def _upgraded(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """Version 1 as version 2."""
    method, base = _FORMATS_1[values["format"]], values.get("base")
    known = {"family": "chatglm2"} | dict.fromkeys(_SIZES_1.values(), 0)
    if "base_name_or_path" in values:
        base = known | {"name_or_path": values.get("base_name_or_path"), "fingerprint": values.get("base_fingerprint")}
    elif isinstance(base, dict):
        if missing := [name for name in _SIZES_1 if name not in base]:
            raise CheckpointError(f"{path}: base.{missing[0]} is missing; the checkpoint is damaged.")
        base = known | {_SIZES_1.get(name, name): value for name, value in base.items()}
        base["dtype"] = values.get("base_dtype", "float32")
    settings = {name: values[name] for name in ("pre_seq_len", "prefix_projection") if name in values}
    return values | {"method": method, "base": base, "settings": settings}


def _check_version(values: dict[str, Any], path: Path) -> None:
    number, highest = values.get("format_version"), FORMAT_VERSION if values["format"] == FORMAT else 1
    if not isinstance(number, int) or number < 1:
        raise CheckpointError(f"{path}: format_version is {number!r}, expected a number from 1 to {highest}.")
    if number > highest:
        written = values.get("versions")
        writer = written.get("ptuning", "unknown") if isinstance(written, dict) else "unknown"
        raise CheckpointError(
            f"{path}: format_version is {number}, and this ptuning ({version_of('ptuning')}) reads up to {highest}. It was "
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
