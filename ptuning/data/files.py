"""Data files as text: found, unpacked, decoded as UTF-8, and identified by a hash. What is not UTF-8 text is refused by name."""

from __future__ import annotations

import codecs
import difflib
import gzip
import hashlib
import io
import os
import shlex
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from ptuning.data.problems import listed
from ptuning.errors import DataError

GZIP = ".gz"

_BYTE_ORDER_MARKS = (  # UTF-32 first: its little-endian mark starts with that of UTF-16
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
_NOT_TEXT = (
    (b"\x1f\x8b", "a gzip archive", "let its name end in .gz (train.json.gz), or unpack it with gunzip"),
    (b"PK\x03\x04", "a zip archive or an Excel workbook", "unpack it, or let a workbook's name end in .xlsx"),
    (b"\xd0\xcf\x11\xe0", "an old Excel workbook", "save it as .xlsx, or export the sheet as CSV in UTF-8"),
    (b"PAR1", "a Parquet file", "let its name end in .parquet"),
    (b"ARROW1", "an Arrow file", "let its name end in .arrow"),
)
# Codec, iconv's name, and the least number of bytes above 0x7F for each character that is not ASCII. Common characters
# have two such bytes in GBK, about 1.6 in Big5 (nearly all of which decodes as GBK, to nonsense), and one in Latin-1.
_CHINESE_ENCODINGS = (("gbk", "GBK", 1.8), ("gb18030", "GB18030", 1.8), ("big5", "BIG5", 1.3))
_ASCII = bytes(range(128))
_REPLACED = "\N{REPLACEMENT CHARACTER}"


@contextmanager
def opened_text(path: str | os.PathLike[str], newline: str | None) -> Iterator[TextIO]:
    """The file as a stream of UTF-8 text, without a byte order mark, decoded as it is read.

    Args:
        path: the file.
        newline: as in `open()`: "" keeps each kind of line end, "\\n" knows only that one; neither changes them.

    Raises:
        DataError: the file is missing, a directory, unreadable, no text, or in another encoding; also while it is read.
    """
    try:
        with _opened(path) as unpacked, io.TextIOWrapper(unpacked, encoding="utf-8-sig", newline=newline) as file:
            _refuse_by_first_bytes(path, unpacked.peek(8))
            yield file
    except UnicodeDecodeError:
        raise _not_utf8(path) from None


def bytes_read(stream: TextIO) -> int:
    """Of the file under a stream of `opened_text`, packed as it is."""
    return getattr(stream.buffer, "fileobj", stream.buffer).tell()


@contextmanager
def readable(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns what the system says of a file that is read in here into a DataError."""
    try:
        _refuse_pipe(path)
        yield
    except OSError as error:
        raise DataError(_why_unreadable(Path(path), error)) from error


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Also of a path that the system refuses."""
    try:
        return Path(path).is_dir()
    except OSError:
        return False


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[io.BufferedReader | gzip.GzipFile]:
    """The file's bytes, unpacked where its name ends in .gz."""
    with readable(path), Path(path).open("rb") as file:
        if not _is_packed(path):
            yield file
            return
        try:
            yield gzip.GzipFile(fileobj=file)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(
                f"{path}: the gzip archive is damaged or cut off ({error}): make or download it again"
            ) from error


def _is_packed(path: str | os.PathLike[str]) -> bool:
    return os.fspath(path).lower().endswith(GZIP)


def first_character(path: str | os.PathLike[str]) -> str:
    """The first character that is no white space.

    Raises:
        DataError: there is none, or the file can't be read as text.
    """
    with opened_text(path, "") as file:
        while part := file.read(4096):
            if part := part.lstrip():
                return part[0]
        size = file.buffer.tell()
    raise DataError(f"{path}: the file is empty ({size} bytes): write at least 1 row into it")


def data_fingerprint(*paths: str | os.PathLike[str]) -> str:
    """SHA-256 of the bytes of a file, or of several one after the other, in 64 hex digits.

    Raises:
        DataError: a file is missing, a directory or unreadable.
    """
    digest = hashlib.sha256()
    for path in paths:
        with readable(path), Path(path).open("rb") as file:
            for chunk in _chunks(file):
                digest.update(chunk)
    return digest.hexdigest()


def _chunks(file: io.BufferedReader | gzip.GzipFile) -> Iterator[bytes]:
    while chunk := file.read(1 << 20):
        yield chunk


def _to_the_end(path: str | os.PathLike[str]) -> Iterator[bytes]:
    """The unpacked file's chunks, and an empty one."""
    with _opened(path) as file:
        yield from _chunks(file)
    yield b""


def _refuse_pipe(path: str | os.PathLike[str]) -> None:
    """A pipe gives its bytes once, and files are read several times; without a writer it never answers."""
    place = Path(path)
    if place.exists() and not place.is_file() and not place.is_dir():
        raise DataError(f"{path}: this is a pipe or a device, not a file: write the rows into a file first")


def _refuse_by_first_bytes(path: str | os.PathLike[str], head: bytes) -> None:
    for magic, what, fix in _NOT_TEXT:
        if head.startswith(magic):
            raise DataError(f"{path}: this is {what}, not JSON, JSON lines or CSV: {fix}")
    for mark, encoding in _BYTE_ORDER_MARKS:
        if head.startswith(mark):
            raise _wrong_encoding(path, encoding, "by its byte order mark")
    if b"\0" in head[:2]:  # data files start with an ASCII character, of which UTF-16 makes a pair with a zero
        raise _wrong_encoding(path, "UTF-16BE" if head[0] == 0 else "UTF-16LE", "by the zero bytes at its start")


def _why_unreadable(path: Path, error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        if not path.parent.is_dir():
            return f"{path}: no such file, nor a folder {path.parent} in {Path.cwd()}: correct the path"
        near = difflib.get_close_matches(path.name, _file_names(path.parent), n=3, cutoff=0.5)
        hint = f"did you mean {listed(near)}?" if near else "correct the path"
        return f"{path}: no such file in {path.parent.resolve()}: {hint}"
    # Asked of the path, because Windows reports an opened directory as a lack of permission.
    if isinstance(error, (IsADirectoryError, PermissionError)) and path.is_dir():
        return f"{path}: this is a directory, not a data file: name a file in it"
    return f"{path}: can't be read ({error.strerror}): check the path and the permissions"


def _file_names(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in folder.iterdir() if entry.is_file())
    except OSError:  # a folder that can be entered but not listed: then there are no names to propose
        return []


def _wrong_encoding(path: str | os.PathLike[str], encoding: str, evidence: str) -> DataError:
    name = Path(path)
    plain = name.with_suffix("") if _is_packed(path) else name
    target = shlex.quote(str(plain.with_name(f"{plain.stem}.utf8{plain.suffix}")))
    source = shlex.quote(str(name))
    convert = f"iconv -f {encoding} -t UTF-8"
    command = f"gunzip -c {source} | {convert} > {target}" if _is_packed(path) else f"{convert} {source} > {target}"
    return DataError(
        f"{path}: the encoding is {encoding} ({evidence}), only UTF-8 is read: convert it with `{command}`"
    )


def _not_utf8(path: str | os.PathLike[str]) -> DataError:
    """Tells a file in another encoding from a UTF-8 file with a few damaged bytes, and places the first bad byte."""
    lenient = codecs.getincrementaldecoder("utf-8-sig")(errors="replace")
    guesses = [_Guess(codecs.getincrementaldecoder(codec)(), name, least) for codec, name, least in _CHINESE_ENCODINGS]
    high_bytes = damaged = intact = 0
    line, column, placed = 1, 1, False
    for chunk in _to_the_end(path):
        high_bytes += len(chunk.translate(None, delete=_ASCII))
        text = lenient.decode(chunk, final=not chunk)
        bad = text.count(_REPLACED)
        damaged += bad
        intact += sum(character > "\x7f" for character in text) - bad
        for guess in guesses:
            guess.feed(chunk)
        if not placed:
            before, found, _ = text.partition(_REPLACED)
            breaks = before.count("\n")
            line += breaks
            column = len(before) - before.rfind("\n") if breaks else column + len(before)
            placed = bool(found)
    if intact <= damaged:
        for guess in guesses:
            if guess.fits and high_bytes >= guess.least * guess.characters:
                return _wrong_encoding(path, guess.name, "a guess: the bytes are not UTF-8 and fit this one")
    count = "1 place" if damaged == 1 else f"{damaged} places"
    return DataError(
        f"{path}:{line}: the text is not UTF-8 in {count}, the first at column {column}: "
        f"correct it there, or save the file again as UTF-8"
    )


@dataclass
class _Guess:
    """Another encoding, tried on the file piece by piece."""

    decoder: codecs.IncrementalDecoder
    name: str
    least: float
    fits: bool = True
    characters: int = 0

    def feed(self, chunk: bytes) -> None:
        if self.fits:
            try:
                text = self.decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError:
                self.fits = False
            else:
                self.characters += sum(character > "\x7f" for character in text)
