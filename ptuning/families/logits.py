"""Logits where they are needed, and the loss on labels, for any causal language model of transformers.

On ADGEN labels cover about 60 % of the positions, so that 40 % of the largest matrix product is saved, and logits of the
prompt are never held in memory. One hook on the output layer selects the positions; the model's own forward does the rest. An
output layer that is told the labels may give their summed loss instead of logits (ptuning/kernels/loss.py).

Shapes: B rows, S positions, N selected positions, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn
from transformers import PreTrainedModel

IGNORE = -100  # label of a position without loss

_SELECTED = "_selected_positions"
TARGETS = "_targets"  # of an output layer: the labels (N,) of the selected positions, while a loss is wanted


def _select(head: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    selected = getattr(head, _SELECTED, None)
    if selected is None:
        return None
    # Labels of a part of the row reach one further, where nothing is selected.
    return (args[0][selected[:, : args[0].shape[1]].to(args[0].device)], *args[1:]), kwargs


@contextmanager
def logits_at(model: nn.Module, positions_BS: torch.Tensor) -> Iterator[None]:
    """Inside, a forward call of the model, or of what wraps it, returns logits (N, V) of these positions alone.

    Args:
        model: a causal language model with output embeddings, or what wraps it for several processes.
        positions_BS: true where logits are wanted.
    """
    head = _head(model)
    if not hasattr(head, _SELECTED):
        # Registered once: a hook that comes and goes would make a compiled model compile again.
        head.register_forward_pre_hook(_select, with_kwargs=True)
    setattr(head, _SELECTED, positions_BS)
    try:
        yield
    finally:
        setattr(head, _SELECTED, None)


@contextmanager
def logits_of_labels(model: nn.Module, labels_BS: torch.Tensor) -> Iterator[None]:
    """Inside, a forward call returns what `label_loss` takes: logits (N, V) of the labels, or their summed loss.

    Args:
        model: as in `logits_at`.
        labels_BS: IGNORE where there is no loss.
    """
    head = _head(model)
    setattr(head, TARGETS, _targets(labels_BS))
    try:
        with logits_at(model, label_positions(labels_BS)):
            yield
    finally:
        setattr(head, TARGETS, None)


def _head(model: nn.Module) -> nn.Module:
    # Asked of a plain model, accelerate would import DeepSpeed first.
    plain = model if isinstance(model, PreTrainedModel) else extract_model_from_parallel(model)
    return plain.get_output_embeddings()


def label_positions(labels_BS: torch.Tensor) -> torch.Tensor:
    """The positions whose logits predict a label: one before each. Labels (B, S + 1) may go with S positions: the last one's logits
    then predict a label too."""
    return nn.functional.pad(labels_BS[:, 1:] != IGNORE, (0, 1))


def label_loss(
    logits_NV: torch.Tensor, labels_BS: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Cross entropy in fp32, summed over the labels and divided.

    Args:
        logits_NV: of `label_positions(labels_BS)`; or, without dimensions, the sum over the labels already.
        labels_BS: IGNORE where there is no loss.
        num_items_in_batch: what to divide by (the labels of a whole accumulated batch); default: this batch's labels.
            A batch without labels has loss 0 and zero gradients instead of NaN.
    """
    targets_N = _targets(labels_BS)
    if num_items_in_batch is None:
        num_items_in_batch = max(targets_N.numel(), 1)
    if logits_NV.ndim == 0:
        return logits_NV / num_items_in_batch
    return nn.functional.cross_entropy(logits_NV.float(), targets_N, reduction="sum") / num_items_in_batch


def row_losses(logits_NV: torch.Tensor, labels_BS: torch.Tensor) -> torch.Tensor:
    """(B,) each row's cross entropy summed over its labels; arguments as `label_loss`."""
    shifted = labels_BS[:, 1:]
    losses_N = nn.functional.cross_entropy(logits_NV.float(), _targets(labels_BS), reduction="none")
    return losses_N.new_zeros(shifted.shape).masked_scatter(shifted != IGNORE, losses_N).sum(1)


def loss_of(
    model: nn.Module,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """The loss of a batch (B, S); arguments as `label_loss`."""
    with logits_of_labels(model, labels):
        logits_NV = model(input_ids=input_ids, use_cache=False).logits
    return label_loss(logits_NV, labels, num_items_in_batch)


def _targets(labels_BS: torch.Tensor) -> torch.Tensor:
    shifted = labels_BS[:, 1:]
    return shifted[shifted != IGNORE]
