"""A split's rows as ids and labels on disk: encoded once, mapped into memory, in the same order and with the same ids each time."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import overload

import datasets
import numpy as np
from datasets import Dataset, Features, List, Value

from ptuning.data.cache import cached, key_of
from ptuning.data.encode import IGNORE, Changes, EncodedRow, Encoder, EncodingReport
from ptuning.data.files import data_fingerprint
from ptuning.data.splits import Split, records_of
from ptuning.families import Dialogue, Template
from ptuning.language import speaking

_FEATURES = Features(
    {
        "input_ids": List(Value("int32")),
        "labels": List(Value("int32")),
        "source": Value("string"),
        "prompt_length": Value("int32"),
        "length": Value("int32"),
        "label_count": Value("int32"),
        "turns": Value("int32"),
        **{field.name: Value("int32") for field in fields(Changes)},
    }
)
_BATCH = 1000  # rows encoded at once
_BIG = 20_000  # rows that are encoded with a progress bar
_BINS = 30


class EncodedRows(Sequence[EncodedRow]):
    """Rows that are read from disk when they are used; what was cut stands in the split's report, not in them.

    Args:
        dataset: as `encode_split` makes it.
        sha256: of ids and labels in order; equal hashes are equal training.
        part: "row" for training; "prompt" to generate from, without labels; "answer" for the loss of the reference answer alone,
            also where training counts those in the history.
    """

    def __init__(self, dataset: Dataset, sha256: str, part: str = "row"):
        self._dataset = dataset.select_columns(["input_ids", "labels", "source", "prompt_length"]).with_format("arrow")
        self.dataset, self.sha256, self._part = dataset, sha256, part
        prompts, whole = _column(dataset, "prompt_length"), _column(dataset, "length")
        self.lengths = prompts if part == "prompt" else whole  # (rows,), tokens
        self.label_counts = _column(dataset, "label_count") if part == "row" else self.lengths - prompts  # (rows,)

    def __len__(self) -> int:
        return len(self._dataset)

    @overload
    def __getitem__(self, index: int) -> EncodedRow: ...
    @overload
    def __getitem__(self, index: slice) -> list[EncodedRow]: ...
    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        values = self._dataset[int(index)]
        ids, labels = (values[name][0].values.to_numpy().tolist() for name in ("input_ids", "labels"))
        prompt = values["prompt_length"][0].as_py()
        if self._part == "prompt":
            ids, labels = ids[:prompt], []
        elif self._part == "answer":
            labels = [IGNORE] * prompt + ids[prompt:]
        return EncodedRow(ids, labels, values["source"][0].as_py(), prompt)

    def as_part(self, part: str) -> EncodedRows:
        """The same rows for another use, see `part`."""
        return EncodedRows(self.dataset, self.sha256, part)


@dataclass(frozen=True)
class EncodedSplit:
    """A split, ready to train on or to evaluate.

    Args:
        rows: in the split's order.
        report: what was cut.
        summary: counts, and lengths after cutting, for the run's record and its report.
    """

    rows: EncodedRows
    report: EncodingReport
    summary: dict


def encode_split(split: Split, encoder: Encoder, workers: int | None = None, overwrite: bool = False) -> EncodedSplit:
    """Encodes a split for training or for the loss of its references, or takes its rows from the cache.

    Args:
        split: its records must have a response.
        workers: processes that encode; None: this one.
        overwrite: encode also where the rows are in the cache.

    Raises:
        ConfigError: the tokenizer can't say where answers lie (loss_on), or the cache can't be written.
    """

    def build(folder: Path) -> dict:
        source = split.records.dataset
        if len(source) >= _BIG and sys.stderr.isatty():
            datasets.enable_progress_bars()
        encoded = source.map(
            partial(_encode, encoder=encoder),
            batched=True,
            batch_size=_BATCH,
            num_proc=workers if workers and workers > 1 else None,
            remove_columns=source.column_names,
            features=_FEATURES,
            cache_file_name=str(folder / "rows.arrow"),
            new_fingerprint=key,  # else all arguments are pickled and hashed
            desc=f"Encoding {split.name}",
        )
        return {"report": asdict(_report(encoded)), "rows_sha256": rows_sha256(encoded)}

    key = key_of(
        split.key,
        _template_key(encoder.template),
        asdict(encoder.lengths),
        encoder.source_prefix,
        encoder.loss_on,
    )
    dataset, about = cached(f"rows-{key}", build, overwrite)
    report = EncodingReport(**about["report"])
    rows = EncodedRows(dataset, about["rows_sha256"])
    return EncodedSplit(rows, report, split_summary(split, dataset, report))


def rows_sha256(dataset: Dataset) -> str:
    """SHA-256 of the ids and labels of all rows in their order, whatever pieces they are stored in; 64 hex digits."""
    hashes = {name: hashlib.sha256() for name in ("length", "input_ids", "labels")}
    for table in dataset.select_columns([*hashes]).with_format("arrow").iter(_BATCH):
        for name, found in hashes.items():
            column = table[name].combine_chunks()
            values = column if name == "length" else column.flatten()
            found.update(values.to_numpy().astype("<i4").tobytes())
    return hashlib.sha256("".join(found.hexdigest() for found in hashes.values()).encode()).hexdigest()


def split_summary(split: Split, dataset: Dataset, report: EncodingReport) -> dict:
    """Counts, and lengths after cutting.

    Args:
        split: of these rows.
        dataset: its rows, encoded.
        report: of their encoding.
    """
    answers = _column(dataset, "label_count")
    return {
        "file": split.file,
        "sha256": split.sha256,
        "rows": len(split.records),
        "skipped": split.skipped,
        **_in_words(split),
        "turns": int(_column(dataset, "turns").sum()),
        "prompt_tokens": _lengths(_column(dataset, "length") - answers),
        "answer_tokens": _lengths(answers),
        "cut_prompts": report.dropped_systems + report.dropped_turns + report.cut_questions,
        "cut_answers": report.cut_answers,
    }


def _in_words(split: Split) -> dict:
    with speaking("en"):  # a file that programs read
        return {"format": split.format, "mixed_in": [str(mixed) for mixed in split.mixed_in]}


def _encode(batch: dict[str, list], encoder: Encoder) -> dict[str, list]:
    """Columns of records → columns of rows."""
    records = list(records_of(batch))
    rows, _ = encoder.training_rows(records)
    return {
        "input_ids": [row.input_ids for row in rows],
        "labels": [row.labels for row in rows],
        "source": [row.source for row in rows],
        "prompt_length": [row.prompt_length for row in rows],
        "length": [len(row.input_ids) for row in rows],
        "label_count": [len(row.labels) - row.labels.count(IGNORE) for row in rows],
        "turns": [len(record.history) + 1 for record in records],
        **{field.name: [int(getattr(row.changes, field.name)) for row in rows] for field in fields(Changes)},
    }


def _report(dataset: Dataset) -> EncodingReport:
    lengths = _column(dataset, "length")
    changes = [_column(dataset, field.name) for field in fields(Changes)]
    systems, turns, questions, answers = (int(np.count_nonzero(values)) for values in changes)
    total, longest = int(lengths.sum()), int(lengths.max())
    report = EncodingReport(len(lengths), systems, turns, questions, answers, total, longest)
    for index in np.flatnonzero(sum(changes))[:3].tolist():
        report.note_all(dataset[index]["source"], Changes(*(values[index].item() for values in changes)))
    return report


def _column(dataset: Dataset, name: str) -> np.ndarray:
    """A column of numbers. Encoded rows have no index between them and their file."""
    return dataset.data.column(name).to_numpy()


def _template_key(template: Template) -> list:
    """What its ids depend on: the tokenizer's file or vocabulary, and how a dialogue comes out."""
    tokenizer = template.tokenizer
    file, fast = getattr(tokenizer, "vocab_file", None), getattr(tokenizer, "backend_tokenizer", None)
    if fast is not None:
        words = hashlib.sha256(fast.to_str().encode()).hexdigest()
    elif file is not None and Path(file).is_file():
        words = data_fingerprint(file)
    else:
        words = hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()
    probe = Dialogue("问 one", (("早 two", "早！\n"),), "system", "prefix", "答 three")
    (encoded,) = template.encode([template.render(probe)])
    return [template.name, words, encoded.ids, template.end_id]


def _lengths(array: np.ndarray) -> dict:
    top = int(array.max())
    width = max(-(-(top + 1) // _BINS), 1)
    counts = np.bincount(array // width)
    return {
        "mean": round(float(array.mean()), 1),
        **{f"p{q}": int(np.percentile(array, q, method="higher")) for q in (50, 90, 99)},
        "max": top,
        "histogram": [[i * width, (i + 1) * width, int(count)] for i, count in enumerate(counts)],
    }
