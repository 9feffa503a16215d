"""General data mixed into training, so that the model doesn't forget what it could do."""

import dataclasses
import hashlib
import random
from collections.abc import Sequence

from ptuning.config.mix import parse_mix
from ptuning.data.formats import Layout, has_columns
from ptuning.data.load import Split, read_split
from ptuning.data.record import Record


def mixed(train: Split, mixes: Sequence[str], seed: int, layout: Layout, skip_invalid: bool = False) -> Split:
    """The training rows in their order, with rows of other files at random places between them.

    The rows of a file are drawn without repetition as long as it has enough; else each row comes about equally often. The
    draw depends on the seed, the files and the ratios alone.

    Args:
        train: the split of the training file.
        mixes: FILE:RATIO each; RATIO rows for each training row.
        seed: of the draw and of the places.
        layout: the training file's; a file that has not the same columns is guessed by itself.
        skip_invalid: leave rows with problems out.

    Raises:
        ConfigError: a mix that isn't FILE:RATIO.
        DataError: a file or its rows are unusable.
    """
    if not mixes:
        return train
    drawn: list[Record] = []
    counts, digest = [], hashlib.sha256(train.sha256.encode())
    for number, mix in enumerate(mixes):
        file, ratio = parse_mix(mix)
        other = read_split("mix", file, layout if has_columns(file, layout) else Layout(), skip_invalid=skip_invalid)
        wanted, there = max(round(ratio * len(train.records)), 1), len(other.records)
        drawn += _draw(other.records, wanted, random.Random(f"{seed} draw {number}"))
        repeated = f", each about {wanted / there:.1f} times" if wanted > there else ""
        guessed = f" ({other.guessed})" if other.guessed else ""
        skipped = f", {other.skipped} invalid rows skipped" if other.skipped else ""
        counts.append((wanted, f"{wanted} of {there} rows of {file}{guessed} (ratio {ratio:g}{repeated}){skipped}"))
        digest.update(f" {other.sha256} {ratio!r}".encode())
    records = _interleaved(train.records, drawn, random.Random(f"{seed} places"))
    return dataclasses.replace(train, records=records, sha256=digest.hexdigest(), mixed_in=tuple(counts))


def _draw(records: list[Record], count: int, rng: random.Random) -> list[Record]:
    whole, rest = divmod(count, len(records))
    drawn = records * whole + rng.sample(records, rest)
    rng.shuffle(drawn)
    return drawn


def _interleaved(own: list[Record], others: list[Record], rng: random.Random) -> list[Record]:
    """Both in their order; which places are the others' is random."""
    total = len(own) + len(others)
    places = set(rng.sample(range(total), len(others)))
    mine, theirs = iter(own), iter(others)
    return [next(theirs) if place in places else next(mine) for place in range(total)]
