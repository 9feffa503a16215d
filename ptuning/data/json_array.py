"""The rows of a JSON array, decoded one by one from a stream: a file of any size needs the memory of its longest row."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import TextIO

from ptuning.data.problems import bad_json, decoder, too_deep
from ptuning.errors import DataError

_SPACE = re.compile(r"[ \t\r\n]*")
_CHUNK = 1 << 18  # characters read at a time
_AROUND = 80  # characters needed on both sides of a fault, which its message quotes


def array_values(file: str, stream: TextIO) -> Iterator[tuple[int, object]]:
    """Yield each value of the array that the stream begins with as (line from 1, value).

    Raises:
        DataError: a syntax error, with line, column and fix.
    """
    window = _Window(file, stream)
    window.skip_space()
    window.at += 1  # the bracket, which made the caller take this for an array
    window.skip_space()
    if window.here() == "]":
        window.at += 1
    else:
        while True:
            yield window.line(), window.value()
            window.skip_space()
            closing = window.here() == "]"
            if not closing and window.here() != ",":
                raise window.fault("Expecting ',' delimiter")
            window.at += 1
            window.skip_space()
            if closing:
                break
    window.skip_space()
    if window.here():
        raise window.fault("Extra data after the array's ]")


class _Window:
    """The part of the text that is being decoded, and where it stands in the file."""

    def __init__(self, file: str, stream: TextIO):
        self.file = file
        self.stream = stream
        self.text = ""
        self.at = 0  # the next character to decode
        self.ended = False  # the text reaches to the end of the file
        self.size = _CHUNK
        self.first_line, self.columns_before = 1, 0  # of text[0]
        self._counted, self._lines = 0, 0  # line breaks before text[_counted]
        self._decode = decoder().raw_decode

    def value(self) -> object:
        """The value at `at`, which moves behind it."""
        self.size = _CHUNK
        while True:
            try:
                value, end = self._decode(self.text, self.at)
            except json.JSONDecodeError as error:
                if self.ended or not self._may_be_cut(error):
                    raise self._error(error.msg, error.pos) from None
            except RecursionError:
                raise DataError(str(too_deep(self.file, self.line()))) from None
            else:
                # Of a number at the window's end ("-1", "-1.", "-1.5e") the rest may follow.
                if end <= len(self.text) - _AROUND or self.ended or isinstance(value, (dict, list, str)):
                    self.at = end
                    return value
            self._read_on()

    def skip_space(self) -> None:
        """Moves to the next character that is no white space, or to the end of the file."""
        self.size = _CHUNK
        while True:
            match = _SPACE.match(self.text, self.at)
            self.at = match.end() if match else self.at
            if self.at < len(self.text) or self.ended:
                return
            self._read_on()

    def here(self) -> str:
        """The character at `at`; empty at the end of the file."""
        return self.text[self.at : self.at + 1]

    def line(self) -> int:
        """The line of `at`, from 1."""
        self._lines += self.text.count("\n", self._counted, self.at)
        self._counted = self.at
        return self.first_line + self._lines

    def fault(self, message: str) -> DataError:
        """A syntax error at `at`."""
        while not self.ended and self.at >= len(self.text) - _AROUND:
            self._read_on()
        return self._error(message, self.at)

    def _error(self, message: str, position: int) -> DataError:
        error = json.JSONDecodeError(message, self.text, position)
        return DataError(str(bad_json(self.file, error, self.first_line, self.columns_before)))

    def _may_be_cut(self, error: json.JSONDecodeError) -> bool:
        """Whether the decoder only ran into the window's end. An open string does, wherever it began: a line break in it
        would have been the fault instead."""
        return error.msg.startswith("Unterminated string") or error.pos >= len(self.text) - _AROUND

    def _read_on(self) -> None:
        """Drops what was decoded and reads as much again as was read for this value so far, so that a long one costs no
        more than twice its length."""
        drop = max(self.at - _AROUND, 0)
        dropped = self.text[:drop]
        breaks = dropped.count("\n")
        self.first_line += breaks
        self.columns_before = len(dropped) - dropped.rfind("\n") - 1 if breaks else self.columns_before + drop
        more = self.stream.read(self.size)
        self.ended = len(more) < self.size
        self.size *= 2
        self.text = self.text[drop:] + more
        self.at -= drop
        self._counted = min(self.at, max(self._counted - drop, 0))
        self._lines = self.text.count("\n", 0, self._counted)
