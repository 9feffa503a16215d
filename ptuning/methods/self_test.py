"""Does what is attached to a model change its answers at all?"""

import torch
from transformers import PreTrainedModel

from ptuning.errors import CheckpointError, ModelError
from ptuning.methods.registry import attached, bare


def self_test(model: PreTrainedModel) -> float:
    """Runs a few tokens with what is attached and without it: a prefix that "loads" and is ignored looks like a bad model.

    Returns:
        The largest logit difference.

    Raises:
        CheckpointError: nothing is attached, it has no effect, or makes the logits NaN or infinite.
        ModelError: the base alone gives NaN or infinite logits.
    """
    method = attached(model)
    if method is None:
        raise CheckpointError("the checkpoint has no effect: nothing is attached to this model.")
    training = model.training
    ids = torch.arange(3, 11, device=model.device).remainder(model.config.vocab_size).unsqueeze(0)
    model.eval()
    try:
        with torch.no_grad():
            tuned = model(input_ids=ids, use_cache=False).logits.float()
            with bare(model):
                base = model(input_ids=ids, use_cache=False).logits.float()
    finally:
        model.train(training)
    if not torch.isfinite(base).all():
        raise ModelError(
            f"the base model gives NaN or infinite logits in {model.dtype}; try dtype float32 or bfloat16."
        )
    if not torch.isfinite(tuned).all():
        raise CheckpointError(
            f"with the {method.noun} the logits are NaN or infinite in {model.dtype}, without it they are finite; try dtype "
            "float32 or bfloat16, or an earlier checkpoint."
        )
    difference = float((tuned - base).abs().max())
    if difference == 0.0:
        raise CheckpointError(
            f"the {method.noun} has no effect: the logits with and without it are equal. The checkpoint's numbers are wrong, or "
            f"the attention implementation {model.config._attn_implementation!r} leaves the {method.noun} out."
        )
    return difference
