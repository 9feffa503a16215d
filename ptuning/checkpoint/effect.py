"""Proves that an attached prefix does something: a prefix that "loads" and is ignored looks exactly like a bad model."""

import torch

from ptuning.methods.prefix.attention import prefixed_name
from ptuning.families.chatglm2.model import ChatGLMForConditionalGeneration
from ptuning.errors import CheckpointError, ModelError


def check_prefix_changes_logits(model: ChatGLMForConditionalGeneration) -> float:
    """Runs a few tokens with the attached prefix and without it.

    Returns:
        The largest logit difference.

    Raises:
        CheckpointError: no prefix is attached, it has no effect, or makes the logits NaN or infinite.
        ModelError: the base alone gives NaN or infinite logits.
    """
    encoder = model.prefix_encoder
    if encoder is None:
        raise CheckpointError("the prefix has no effect: none is attached to this model.")
    training = model.training
    ids = torch.arange(3, 11, device=model.device).remainder(model.config.vocab_size).unsqueeze(0)
    model.eval()
    try:
        with torch.no_grad():
            tuned = model(input_ids=ids, use_cache=False).logits.float()
            model.detach_prefix()
            bare = model(input_ids=ids, use_cache=False).logits.float()
    finally:
        model.prefix_encoder = encoder
        model.config._attn_implementation = prefixed_name(model.config._attn_implementation)
        model.train(training)
    if not torch.isfinite(bare).all():
        raise ModelError(
            f"the base model gives NaN or infinite logits in {model.dtype}; try dtype float32 or bfloat16."
        )
    if not torch.isfinite(tuned).all():
        raise CheckpointError(
            f"with the prefix the logits are NaN or infinite in {model.dtype}, without it they are finite; try dtype float32 or "
            "bfloat16, or an earlier checkpoint."
        )
    difference = float((tuned - bare).abs().max())
    if difference == 0.0:
        raise CheckpointError(
            "the prefix has no effect: the logits with and without it are equal. The checkpoint's numbers are wrong, or the "
            f"attention implementation {model.config._attn_implementation!r} leaves the prefix out."
        )
    return difference
