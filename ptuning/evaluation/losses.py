"""How likely a model finds answers that are given, starting with the longest rows, so that a batch that doesn't fit fails at once.

Shapes: B rows of a batch, S its longest row.
"""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from ptuning.data.batch import PadRight
from ptuning.data.encode import IGNORE, EncodedRow
from ptuning.families.logits import label_positions, logits_at, row_losses


def answer_losses(
    model: PreTrainedModel,
    rows: Sequence[EncodedRow],
    pad_id: int,
    batch_tokens: int,
    calls: int = 0,
    filler: EncodedRow | None = None,
) -> list[tuple[float, int]]:
    """Each row's negative log likelihood, summed over its labels, and their number; (0.0, 0) for a row without labels.

    Logits are computed at the labels only, and the logarithm in fp32.

    Args:
        model: or what wraps it under DeepSpeed; its mode is put back afterwards.
        rows: with labels, as `Encoder.training_rows` makes them.
        pad_id: the template's.
        batch_tokens: B * S is at most this, except for a single longer row.
        calls: the model is called at least so often, because under ZeRO-3 all processes gather each layer together.
            Take the most that any process has of `number_of_batches`.
        filler: the row of calls that have no rows left.

    Raises:
        ValueError: calls are left over and there is no filler.
    """
    batches, collate = _batches(rows, batch_tokens), PadRight(pad_id)
    if calls > len(batches) and filler is None:
        raise ValueError(f"{calls} calls for {len(batches)} batches need a filler row")
    results: list[tuple[float, int]] = [(0.0, 0)] * len(rows)
    was_training = model.training
    model.eval()
    try:
        # ZeRO-3 keeps gathered weights for training, where inference tensors can't be used.
        with torch.no_grad():
            for batch in batches:
                losses = _batch_losses(model, collate([_item(rows[index]) for index in batch]))
                for index, loss in zip(batch, losses, strict=True):
                    results[index] = (loss, sum(label != IGNORE for label in rows[index].labels[1:]))
            for _ in range(len(batches), calls):
                assert filler is not None
                _batch_losses(model, collate([_item(filler)]))
    finally:
        model.train(was_training)
    return results


def number_of_batches(rows: Sequence[EncodedRow], batch_tokens: int) -> int:
    """How often `answer_losses` calls the model for these rows."""
    return len(_batches(rows, batch_tokens))


def _batches(rows: Sequence[EncodedRow], batch_tokens: int) -> list[list[int]]:
    """Row numbers. A batch is as wide as its first row, so its size is known beforehand."""
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index].input_ids))
    batches, start = [], 0
    while start < len(order):
        size = max(batch_tokens // max(len(rows[order[start]].input_ids), 1), 1)
        batches.append(order[start : start + size])
        start += size
    return batches


def _item(row: EncodedRow) -> dict:
    return {"input_ids": row.input_ids, "labels": row.labels, "row": 0}


def _batch_losses(model, batch: dict[str, torch.Tensor]) -> list[float]:
    """→ B sums."""
    ids, labels = batch["input_ids"].to(model.device), batch["labels"].to(model.device)
    with logits_at(model, label_positions(labels)):
        logits_NV = model(input_ids=ids, use_cache=False).logits
    return row_losses(logits_NV, labels).tolist()
