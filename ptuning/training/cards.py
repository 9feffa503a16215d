"""What could be trained on GPUs of common sizes: for each method the best precision of the base that fits. No weight is read."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from ptuning.config import Config
from ptuning.language import columns, padded
from ptuning.messages import message
from ptuning.methods import Method, methods
from ptuning.quantization import precisions
from ptuning.training.memory import need
from ptuning.training.workload import Workload

SIZES = (6, 8, 12, 16, 24, 48, 80)  # GB, 10^9 bytes


def cards_table(config: Config, sizes: Sequence[float] = SIZES) -> str:
    """A line a card, a column a method: the base's precision and the peak in GB, one process without DeepSpeed.

    Where the run fits only with gradient checkpointing, or with it and one row at a time, the cell says so; a dash: not at all.

    Args:
        config: rows, lengths and the base; the method's own options are their defaults.
    """
    found: dict[str, list[tuple[str, float]]] = {}
    batch = 0
    for method in _methods(config):
        ways = list(_ways(config, method))
        batch = ways[0][1].batch
        found[method.name] = [(words, need(work, 0).device_peak / 1e9) for words, work in ways]
    lines = [[message("card"), *found]]
    for size in sizes:
        cells = (next((f"{words} {gb:.1f}" for words, gb in each if gb <= size), "–") for each in found.values())
        lines.append([f"{size:g} GB", *cells])
    widths = [max(map(columns, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(padded(cell, width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([message("cards", batch=batch), *text])


def _methods(config: Config) -> Iterator[Method]:
    fresh = type(config.model)(config.model.model_name_or_path, dtype=config.model.dtype)
    for method in methods():
        yield method.from_options(replace(fresh, method=method.name, **method.defaults))


def _ways(config: Config, method: Method) -> Iterator[tuple[str, Workload]]:
    """The best first: 16 bit before 8 before 4, each as it is asked for, then slower."""
    plain = Workload.of(config, method, processes=(1, 1), device_type="cuda")
    if not plain.frozen:
        plain = replace(plain, compute_bytes=2, autocast=plain.weight_bytes == 4)
    for precision in [plain.precision] if plain.precision is not None else [None, *precisions()]:
        if precision is not None and method.refusal(precision) is not None:
            continue
        name = message("16 bit") if precision is None else precision.name
        work = replace(plain, precision=precision, zero=None)
        yield name, work
        yield f"{name}*", replace(work, checkpointing=True)
        yield f"{name}**", replace(work.with_batch(1), checkpointing=True)
