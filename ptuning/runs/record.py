"""The record of a run: everything it was given, without secrets."""

import hashlib
import json
import platform
import re
import sys
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ptuning.runs.files import sha256_of, versions

_SECRET_WORDS = {"token", "key", "password", "passwd", "secret", "credential", "credentials"}
_NAMED_VALUE = re.compile(r"([\w.-]+)=(.+)", re.DOTALL)
_QUOTED_VALUE = re.compile(r"""(["'])([\w.-]+)\1(\s*:\s*)(["'])(?:\\.|(?!\4).)*\4""")  # in JSON given as one argument
_LOGIN = re.compile(r"(://[^/\s:@]*:)[^/\s@]+@")  # https://name:password@host
HIDDEN = "***"


@dataclass(frozen=True)
class RunRecord:
    """What run.json holds.

    Args:
        config: every option with its value.
        command: the command line.
        cwd: the working directory, which relative paths among the options start from.
        method: how it is tuned, in words; empty where the writer didn't say.
        trained: numbers that are trained; None where the writer didn't say.
        world_size: number of processes.
        data_sha256: split → hash of its file.
        rows_sha256: hash of the encoded training rows, ids and labels, in order.
        base_fingerprint: of the base's weights.
        deepspeed_sha256: hash of the --deepspeed file.
        kernels: what the training computes with (ptuning.training.kernels.Kernels); empty: as transformers does.
        resumed_from: the checkpoint that the run goes on from.
        versions: of Python and the packages.
        platform: operating system and processor.
    """

    config: dict[str, Any] = field(default_factory=dict)
    command: list[str] = field(default_factory=list)
    cwd: str | None = None
    method: str = ""
    trained: int | None = None
    world_size: int = 1
    data_sha256: dict[str, str] = field(default_factory=dict)
    rows_sha256: str | None = None
    base_fingerprint: str | None = None
    deepspeed_sha256: str | None = None
    kernels: dict[str, Any] = field(default_factory=dict)
    resumed_from: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    platform: str = ""

    @classmethod
    def of_this_process(cls, config: Mapping[str, Any], **known) -> "RunRecord":
        """The record of the run that this process is, without secrets.

        Args:
            config: every option with its value.
            **known: further fields.
        """
        plain = json.loads(json.dumps(dict(config), default=str))  # as it will be read back: no tuples, no enums
        deepspeed = plain.get("deepspeed")
        is_file = isinstance(deepspeed, str) and Path(deepspeed).is_file()
        here = {
            "command": hide_in_command(sys.argv),
            "cwd": str(Path.cwd()),
            "versions": versions(),
            "platform": platform.platform(),
        }
        return cls(
            config=hide_secrets(plain), deepspeed_sha256=sha256_of(deepspeed) if is_file else None, **here | known
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "RunRecord":
        """Of what run.json holds; fields that an older version didn't write have their defaults."""
        return cls(**{item.name: values[item.name] for item in fields(cls) if item.name in values})

    def to_dict(self) -> dict[str, Any]:
        """What `from_dict` reads."""
        return asdict(self)


def sha256_of_rows(rows: Iterable[tuple[Sequence[int], Sequence[int]]]) -> str:
    """The same 64 hex digits for the same rows in the same order.

    Args:
        rows: (ids, labels) of each, equally long.
    """
    digest = hashlib.sha256()
    for ids, labels in rows:
        digest.update(array("q", (len(ids), *ids, *labels)).tobytes())
    return digest.hexdigest()


def hide_secrets(value: Any, name: str = "") -> Any:
    """The same value with HIDDEN in place of passwords and keys, known by the names they stand under."""
    if isinstance(value, Mapping):
        return {key: hide_secrets(each, str(key)) for key, each in value.items()}
    if _is_secret(name) and isinstance(value, str) and value:
        return HIDDEN
    if isinstance(value, list):
        return [hide_secrets(each, name) for each in value]
    return _without_secrets(value) if isinstance(value, str) else value


def hide_in_command(command: list[str]) -> list[str]:
    """A command line with HIDDEN in place of secrets: `--hub_token X`, `--hub_token=X`, `API_KEY=X`, `https://name:X@host`."""
    shown, hide = [], False
    for token in command:
        if token.startswith("--") or not hide:
            match = _NAMED_VALUE.fullmatch(token)
            secret = match is not None and _is_secret(match[1])
            shown.append(f"{match[1]}={HIDDEN}" if match and secret else _without_secrets(token))
        else:
            shown.append(HIDDEN)
        hide = token.startswith("--") and "=" not in token and _is_secret(token)
    return shown


def _is_secret(name: str) -> bool:
    """By whole words: max_target_length and generation_batch_tokens are none."""
    words = re.findall(r"[a-z]+", re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower())
    return bool(_SECRET_WORDS & set(words)) or "apikey" in words


def _without_secrets(text: str) -> str:
    """Of a text that is none itself: logins in addresses, and values in JSON under a secret's name."""

    def hidden(match: re.Match) -> str:
        quote, name, colon, other = match.groups()
        return f"{quote}{name}{quote}{colon}{other}{HIDDEN}{other}" if _is_secret(name) else match[0]

    return _QUOTED_VALUE.sub(hidden, _LOGIN.sub(rf"\1{HIDDEN}@", text))
