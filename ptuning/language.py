"""The language that people are spoken to in, and tables of texts in Chinese and English.

Errors stay English, as do files that programs read: they are searched for, and compared.
"""

import contextlib
import os
import unicodedata
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Literal

from ptuning.errors import ConfigError

Language = Literal["zh", "en"]
LANGUAGES: tuple[Language, ...] = ("zh", "en")
VARIABLE = "PTUNING_LANG"
_LOCALE = ("LC_ALL", "LC_MESSAGES", "LANG")  # the first that is set counts, as in POSIX

_chosen: ContextVar[Language | None] = ContextVar("language", default=None)


def language() -> Language:
    """That of the block of `speaking`, else of PTUNING_LANG, else Chinese where the system's locale is, else English.

    Raises:
        ConfigError: PTUNING_LANG is no language of ours.
    """
    if chosen := _chosen.get():
        return chosen
    if wish := os.environ.get(VARIABLE):
        if wish not in LANGUAGES:
            raise ConfigError(f"{VARIABLE} is {wish!r} in the environment; there are {' and '.join(LANGUAGES)}")
        return wish
    locale = next((value for name in _LOCALE if (value := os.environ.get(name))), "")
    return "zh" if locale.lower().startswith("zh") else "en"


@contextlib.contextmanager
def speaking(wish: Language | None) -> Iterator[None]:
    """Inside, texts are in this language; None leaves it as it is."""
    before = _chosen.set(wish or _chosen.get())
    try:
        yield
    finally:
        _chosen.reset(before)


class Texts:
    """Texts by name, each in both languages, with the same {fields}.

    Args:
        table: name → (Chinese, English).
    """

    def __init__(self, table: Mapping[str, tuple[str, str]]):
        self.table = table

    def __call__(self, name: str, /, **fields: object) -> str:
        """The text in the language of now, with its fields filled in."""
        return self.table[name][LANGUAGES.index(language())].format(**fields)


def columns(text: str) -> int:
    """How many columns of a terminal it takes: two for a Chinese character."""
    return len(text) + sum(unicodedata.east_asian_width(character) in "WF" for character in text)


def padded(text: str, width: int, align: Literal["<", ">", "^"] = "<") -> str:
    """The text filled up to a width in columns."""
    return f"{text:{align}{max(width - columns(text) + len(text), 0)}}"
