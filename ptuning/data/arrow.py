"""Rows of Arrow tables: Parquet and Arrow files, folders that `save_to_disk` wrote, datasets of the hub. Their numbers count
rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from ptuning.config.options import DATASET
from ptuning.data.files import readable
from ptuning.data.source import Progress, Rows
from ptuning.errors import DataError

if TYPE_CHECKING:  # slow to import, and serving needs the rest of data/ without it
    from datasets import Dataset

_BATCH = 1000  # rows that are Python objects at once
_FILE_FORMAT = b"ARROW1"  # the first bytes of an Arrow file with an index; `datasets` writes the other kind, a stream


def parquet_rows(file: str, json_columns: Mapping[str, str], progress: Progress) -> Rows:
    """See Source. Mapped into memory: Arrow's readers of open files allocate as much as the file has."""
    with readable(file), _whole(file, "Parquet"), pq.ParquetFile(file, memory_map=True) as parquet:
        size, total = Path(file).stat().st_size, parquet.metadata.num_rows
        yield from _numbered(parquet.iter_batches(_BATCH), total, size, progress)


def arrow_rows(file: str, json_columns: Mapping[str, str], progress: Progress) -> Rows:
    """See Source. Mapped into memory."""
    with readable(file), _whole(file, "Arrow"):
        with Path(file).open("rb") as start:
            indexed = start.read(len(_FILE_FORMAT)) == _FILE_FORMAT
        with pa.memory_map(file) as mapped:
            if indexed:
                reader = pa.ipc.open_file(mapped)
                batches: Iterable[pa.RecordBatch] = map(reader.get_batch, range(reader.num_record_batches))
            else:
                batches = pa.ipc.open_stream(mapped)
            pieces = (batch.slice(start, _BATCH) for batch in batches for start in range(0, batch.num_rows, _BATCH))
            yield from _numbered(pieces, None, 0, progress)


def saved_rows(folder: str, json_columns: Mapping[str, str], progress: Progress) -> Rows:
    """See Source."""
    with _whole(folder, "a folder of save_to_disk"):
        yield from _dataset_rows(_saved(folder), progress)


def saved_files(folder: str) -> list[Path]:
    """Of a folder that `save_to_disk` wrote."""
    with _whole(folder, "a folder of save_to_disk"):
        return _files(_saved(folder))


def hub_rows(name: str, json_columns: Mapping[str, str], progress: Progress) -> Rows:
    """See Source."""
    yield from _dataset_rows(_from_hub(name), progress)


def hub_files(name: str) -> list[Path]:
    """The Arrow files that `datasets` makes of the dataset's own, in its cache."""
    return _files(_from_hub(name))


def _dataset_rows(dataset: Dataset, progress: Progress) -> Rows:
    size = sum(file.stat().st_size for file in _files(dataset))
    yield from _numbered(dataset.with_format("arrow").iter(_BATCH), len(dataset), size, progress)


def _files(dataset: Dataset) -> list[Path]:
    return [Path(file["filename"]) for file in dataset.cache_files]


def _numbered(tables: Iterable[pa.Table | pa.RecordBatch], total: int | None, size: int, progress: Progress) -> Rows:
    number = 0
    for table in tables:
        for row in table.to_pylist():
            number += 1
            yield number, row
        if total:
            progress(size * number // total)


@contextmanager
def _whole(name: str, what: str) -> Iterator[None]:
    """Arrow says of damaged files what it stumbles over, partly as an OSError that no system raised."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DataError(f"{name}: can't be read as {what} ({_short(error)}): make or download it again") from error


def _saved(folder: str) -> Dataset:
    from datasets import load_from_disk

    try:
        return load_from_disk(folder)
    except (ValueError, KeyError, TypeError, OSError) as error:  # a file that is missing or not what it was
        raise DataError(
            f"{folder}: can't be read as a folder of save_to_disk ({_short(error)}): make or download it again"
        ) from error


def _from_hub(name: str) -> Dataset:
    """`dataset:NAME:SPLIT` or `dataset:NAME:CONFIG:SPLIT`, NAME a hub id or a folder of data files. No code of a dataset is
    run: `datasets` only knows such that consist of data files."""
    from datasets import load_dataset

    parts = name.removeprefix(DATASET).split(":")
    if not 2 <= len(parts) <= 3 or not all(parts):
        raise DataError(
            f"{name}: expected dataset:NAME:SPLIT or dataset:NAME:CONFIG:SPLIT, e.g. dataset:owner/name:train"
        )
    path, config, split = parts[0], parts[1] if len(parts) == 3 else None, parts[-1]
    if not Path(path).is_dir() and (path.count("/") > 1 or path.startswith((".", "/", "~"))):
        raise DataError(f"{name}: no such folder {path}, and no id of a dataset (owner/name): correct it")
    try:
        return load_dataset(path, config, split=split)
    except (ConnectionError, FileNotFoundError) as error:
        raise DataError(
            f"{name}: {_short(error)}: correct the name, or download it where there is network (hf download --repo-type "
            f"dataset {path} --local-dir DIR), and give DIR in its place (--dataset_name DIR)"
        ) from error
    except Exception as error:  # whatever the reader of the dataset's files raises
        raise DataError(f"{name}: can't be read: {_short(error.__cause__ or error)}{_hint(error, path)}") from error


def _hint(error: Exception, path: str) -> str:
    text = str(error)
    if "split" in text:
        return f": name one of them where a file is asked for (--test_file {DATASET}{path}:SPLIT)"
    if "onfig" in text:
        return ": give one of them with --dataset_config_name"
    return ": give its files instead (--train_file FILE …), whose faults are named by line"


def _short(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
