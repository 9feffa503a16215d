"""The data files of a run, read and checked before any model is loaded; their records lie on disk."""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import overload

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, List, Value, concatenate_datasets
from tqdm import tqdm

from ptuning.config.checks import parse_mix
from ptuning.data.cache import cached, key_of
from ptuning.data.formats import Columns, Record
from ptuning.data.guess import FormatOptions, find_format, has_columns
from ptuning.data.records import Skipped, valid_records
from ptuning.data.rows import fingerprint, size
from ptuning.messages import message

_FEATURES = Features(
    {
        "prompt": Value("string"),
        "response": Value("string"),
        "history": List(List(Value("string"))),
        "source": Value("string"),
        "system": Value("string"),
    }
)
_BATCH = 1000  # rows written or read at once
_BIG = 20_000_000  # bytes of a file that is read with a progress bar


class Records(Sequence[Record]):
    """Records that are read from disk when they are used.

    Args:
        dataset: with the columns of a Record.
    """

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> Records: ...
    def __getitem__(self, index):
        if isinstance(index, slice):
            return Records(self.dataset.select(range(*index.indices(len(self))), keep_in_memory=True))
        return record_of(self.dataset[int(index)])

    def __iter__(self) -> Iterator[Record]:
        for batch in self.dataset.iter(_BATCH):
            yield from records_of(batch)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, (Records, list)):
            return NotImplemented
        return len(self) == len(other) and all(one == two for one, two in zip(self, other, strict=True))


def record_of(values: dict) -> Record:
    """A record from the values of its columns."""
    history = tuple((question, answer) for question, answer in values["history"])
    return Record(values["prompt"], values["response"], history, values["source"], values["system"])


def records_of(batch: dict[str, list]) -> Iterator[Record]:
    """Records from columns."""
    for values in zip(*batch.values(), strict=True):
        yield record_of(dict(zip(batch, values, strict=True)))


@dataclasses.dataclass(frozen=True)
class MixedIn:
    """Rows of another file among the training rows.

    Args:
        source: the file's own rows.
        rows: how many there are of them.
        ratio: what was asked for, for each training row.
    """

    source: Split
    rows: int
    ratio: float

    def __str__(self) -> str:
        there, skipped = len(self.source.records), self.source.skipped
        return message(
            "mixed_in",
            rows=self.rows,
            there=there,
            file=self.source.file,
            format=_in_brackets(self.source.format),
            ratio=self.ratio,
            repeated=message("mixed_repeatedly", times=self.rows / there) if self.rows > there else "",
            skipped=message("skipped", rows=skipped) if skipped else "",
        )


@dataclasses.dataclass(frozen=True)
class Split:
    """Records of a file or of several, maybe with others mixed in, and what to call them in the run's record.

    Args:
        name: train, validation or test.
        file: its name; of several, all of them with commas between.
        sha256: of the file; of several, of all of them; with rows mixed in, of all files and shares.
        skipped: rows left out because they had problems.
        key: fingerprint of the records in this order.
        guessed: the format, where the flags left it open; of several files, each one's.
        mixed_in: the rows from other files.
    """

    name: str
    file: str
    records: Records
    sha256: str
    skipped: int
    key: str
    guessed: tuple[str, ...] = ()
    mixed_in: tuple[MixedIn, ...] = ()

    @property
    def format(self) -> str | None:
        """What was guessed, in the language of now."""
        return message("then").join(message("guessed", format=each) for each in self.guessed) or None

    def __str__(self) -> str:
        own = len(self.records) - sum(mixed.rows for mixed in self.mixed_in)
        return message(
            "split",
            name=self.name,
            rows=own,
            file=self.file,
            guessed=_in_brackets(self.format),
            skipped=message("skipped", rows=self.skipped) if self.skipped else "",
            mixed_in="".join(f" + {mixed}" for mixed in self.mixed_in),
        )


def _in_brackets(text: str | None) -> str:
    return message("in_brackets", text=text) if text else ""


def load_split(
    name: str,
    files: str | Sequence[str],
    columns: Columns | FormatOptions,
    max_samples: int | None = None,
    skip_invalid: bool = False,
    overwrite: bool = False,
) -> Split:
    """Reads files one after the other, or takes their records from the cache.

    Args:
        name: train, validation or test.
        files: each is a source as in `iterate_rows`, with a format and a place in the cache of its own.
        columns: of their rows.
        max_samples: as in `read_records`, of all files together; as is skip_invalid.
        overwrite: read the files also where their records are in the cache.

    Raises:
        DataError: a file or its rows are unusable; the message names file, line, field and fix.
    """
    files = [files] if isinstance(files, str) else list(files)
    parts: list[Split] = []
    left, hashes = max_samples, []
    for file in files:
        sha256 = fingerprint(file)  # also of a file that max_samples leaves nothing of
        hashes.append(sha256)
        if left is None or left > 0 or not parts:
            parts.append(_load_file(name, file, sha256, columns, left, skip_invalid, overwrite))
            left = None if left is None else left - len(parts[-1].records)
    if len(files) == 1:
        return parts[0]
    guessed = tuple(f"{part.file}: {format}" for part in parts for format in part.guessed)
    if len(guessed) == len(parts) and len({part.guessed for part in parts}) == 1:
        guessed = parts[0].guessed
    return Split(
        name,
        ", ".join(files),
        Records(concatenate_datasets([part.records.dataset for part in parts])),
        hashlib.sha256(" ".join(hashes).encode()).hexdigest(),
        sum(part.skipped for part in parts),
        key_of(*(part.key for part in parts)),
        guessed,
    )


def _load_file(
    name: str,
    file: str,
    sha256: str,
    columns: Columns | FormatOptions,
    max_samples: int | None,
    skip_invalid: bool,
    overwrite: bool,
) -> Split:
    key = key_of(sha256, file, type(columns).__name__, dataclasses.astuple(columns), max_samples, skip_invalid)

    def build(folder: Path) -> dict:
        found, skipped, total = find_format(file, columns), Skipped(), size(file)
        bar = tqdm(
            total=total,
            desc=f"Reading {Path(file).name}",
            unit="B",
            unit_scale=True,
            leave=False,
            disable=None if total >= _BIG else True,  # None: shown on a terminal only
        )
        with bar:
            records = valid_records(
                file,
                found.shape,
                skipped,
                max_samples=max_samples,
                skip_invalid=skip_invalid,
                progress=lambda position: bar.update(position - bar.n),
            )
            _write(folder / "records.arrow", records)
        return {"file": file, "skipped": skipped.rows, "guessed": [found.format] if found.guessed else []}

    dataset, about = cached(f"records-{key}", build, overwrite)
    return Split(name, file, Records(dataset), sha256, about["skipped"], key, tuple(about["guessed"]))


def mixed(
    train: Split,
    mixes: Sequence[str],
    seed: int,
    options: FormatOptions,
    skip_invalid: bool = False,
    overwrite: bool = False,
) -> Split:
    """General data mixed into training, so that the model doesn't forget what it could do: the training rows in their order,
    with rows of other files at random places between them.

    The rows of a file are drawn without repetition as long as it has enough; else each row comes about equally often. The
    draw depends on the seed, the files and the ratios alone.

    Args:
        train: the split of the training file.
        mixes: FILE:RATIO each; RATIO rows for each training row.
        seed: of the draw and of the places.
        options: the training file's; a file that has not the same columns is guessed by itself.
        skip_invalid: leave rows with problems out.
        overwrite: as in `load_split`.

    Raises:
        ConfigError: a mix that isn't FILE:RATIO.
        DataError: a file or its rows are unusable.
    """
    if not mixes:
        return train
    own = len(train.records)
    files, drawn, counts = [train.records.dataset], [], []
    keys, digest = [train.key], hashlib.sha256(train.sha256.encode())
    for number, mix in enumerate(mixes):
        file, ratio = parse_mix(mix)
        columns = options if has_columns(file, options) else FormatOptions()
        other = load_split("mix", file, columns, skip_invalid=skip_invalid, overwrite=overwrite)
        wanted, there = max(round(ratio * own), 1), len(other.records)
        start = sum(map(len, files))
        drawn += [start + index for index in _draw(there, wanted, random.Random(f"{seed} draw {number}"))]
        files.append(other.records.dataset)
        keys.append(other.key)
        counts.append(MixedIn(other, wanted, ratio))
        digest.update(f" {other.sha256} {ratio!r}".encode())
    order = _interleaved(own, np.array(drawn), random.Random(f"{seed} places"))
    records = Records(concatenate_datasets(files).select(order, keep_in_memory=True))
    key = key_of(*keys, hashlib.sha256(order.tobytes()).hexdigest())
    return dataclasses.replace(train, records=records, sha256=digest.hexdigest(), key=key, mixed_in=tuple(counts))


def _write(path: Path, records: Iterable[Record]) -> None:
    names, records = list(_FEATURES), iter(records)
    with pa.ipc.new_stream(str(path), _FEATURES.arrow_schema) as writer:
        while batch := list(islice(records, _BATCH)):
            columns = {name: [getattr(record, name) for record in batch] for name in names}
            writer.write_batch(pa.RecordBatch.from_pydict(columns, schema=_FEATURES.arrow_schema))


def _draw(there: int, count: int, rng: random.Random) -> list[int]:
    """Numbers of rows."""
    whole, rest = divmod(count, there)
    drawn = list(range(there)) * whole + rng.sample(range(there), rest)
    rng.shuffle(drawn)
    return drawn


def _interleaved(own: int, others: np.ndarray, rng: random.Random) -> np.ndarray:
    """The rows 0 … own - 1 and the others, both in their order; which places are the others' is random."""
    total = own + len(others)
    theirs = np.zeros(total, dtype=bool)
    theirs[rng.sample(range(total), len(others))] = True
    order = np.empty(total, dtype=np.int64)
    order[theirs], order[~theirs] = others, np.arange(own)
    return order
