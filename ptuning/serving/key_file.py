"""Keys with names, and the file that holds them. Nothing of HTTP's: options are read before its packages are asked for."""

from dataclasses import dataclass
from pathlib import Path

from ptuning.errors import ConfigError


@dataclass(frozen=True)
class Key:
    """What a client sends.

    Args:
        name: for logs and messages.
        secret: the key itself.
        answers: that may run or wait at a time; None: no limit of its own.
    """

    name: str
    secret: str
    answers: int | None = None


def read_keys(path: str) -> tuple[Key, ...]:
    """The keys of a file: `NAME KEY [ANSWERS]` a line, and comments that begin with #.

    Raises:
        ConfigError: the file can't be read, or one of its lines can't be used.
    """
    try:
        lines = Path(path).expanduser().read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as cause:
        raise ConfigError(f"--api_keys {path}: can't be read ({cause})") from cause
    keys: list[Key] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        key = _key(line.split(), f"{path}, line {number}")
        for other in keys:
            if key.name == other.name or key.secret == other.secret:
                what = "name" if key.name == other.name else "key"
                raise ConfigError(f"{path}, line {number}: the {what} of {key.name!r} is also that of {other.name!r}")
        keys.append(key)
    if not keys:
        raise ConfigError(f"--api_keys {path}: has no key; write `NAME KEY` or `NAME KEY ANSWERS`, one a line")
    return tuple(keys)


def _key(words: list[str], place: str) -> Key:
    if len(words) not in (2, 3):
        raise ConfigError(f"{place}: has {len(words)} words; write `NAME KEY` or `NAME KEY ANSWERS`")
    if not words[1].isascii():
        raise ConfigError(f"{place}: the key isn't ASCII; HTTP headers can't carry it")
    if len(words) == 2:
        return Key(words[0], words[1])
    if not words[2].isdecimal() or int(words[2]) < 1:
        raise ConfigError(f"{place}: answers is {words[2]!r}; use a number from 1, or leave it out")
    return Key(words[0], words[1], int(words[2]))
