"""Puts a prefix on a causal language model of transformers whose attention goes through the registry, and takes it off.

While a prefix is attached every forward call and `generate` sees it: a hook hands its keys and values to the attention
layers, and the attention implementation is the one that puts them in front (attention.py).
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedModel

from ptuning.methods.prefix.attention import PREFIXED, prefixed_name, register, seeing_prefix
from ptuning.methods.prefix.encoder import PrefixEncoder, PrefixShape

NAME = "prefix_encoder"  # of the submodule, as in the official code

_HOOK = "_prefix_hook"

register()


def attach_prefix(model: PreTrainedModel, pre_seq_len: int, prefix_projection: bool = False) -> PrefixEncoder:
    """Gives the model a freshly initialised prefix on the model's device and freezes everything else.

    Args:
        pre_seq_len: T.
        prefix_projection: the reparametrised variant.
    """
    return attach_encoder(model, PrefixEncoder(PrefixShape.of(model.config), pre_seq_len, prefix_projection))


def attach_encoder(model: PreTrainedModel, encoder: PrefixEncoder) -> PrefixEncoder:
    """Attaches an existing prefix, such as one that `detach_prefix` returned, and freezes everything else."""
    detach_prefix(model)
    model.requires_grad_(False)
    setattr(model, NAME, encoder.to(model.device).train(model.training).requires_grad_(True))
    model.config._attn_implementation = seeing_prefix(model.config._attn_implementation)
    # A left-over prefix tensor in a base's folder would make vLLM and the official loader stumble.
    model._keys_to_ignore_on_save = {
        *(model._keys_to_ignore_on_save or ()),
        *(f"{NAME}.{name}" for name in encoder.state_dict()),
    }
    setattr(model, _HOOK, model.register_forward_pre_hook(_hand_over, with_kwargs=True))
    return encoder


def detach_prefix(model: PreTrainedModel) -> PrefixEncoder | None:
    """Takes the prefix off and returns it, None where there is none; the model is then the bare base."""
    encoder = prefix_of(model)
    if encoder is not None:
        delattr(model, NAME)
        getattr(model, _HOOK).remove()
        model.config._attn_implementation = model.config._attn_implementation.removeprefix(PREFIXED)
    return encoder


def prefix_of(model: nn.Module) -> PrefixEncoder | None:
    """The attached prefix, None where there is none."""
    return getattr(model, NAME, None)


def attached_prefix(model: nn.Module) -> PrefixEncoder:
    """The prefix of a model that has one."""
    encoder = prefix_of(model)
    if encoder is None:
        raise RuntimeError("no prefix is attached")
    return encoder


@contextmanager
def without_prefix(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model is the bare base."""
    encoder = detach_prefix(model)
    try:
        yield
    finally:
        if encoder is not None:
            attach_encoder(model, encoder)


def _hand_over(model: PreTrainedModel, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    if kwargs.get("prefix") is None:
        inputs = next(x for x in (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if x is not None)
        kwargs["prefix"] = attached_prefix(model)(inputs.shape[0], model.dtype)
    if not model.config._attn_implementation.startswith(PREFIXED):
        raise RuntimeError(
            f"attention implementation '{model.config._attn_implementation}' would ignore the prefix; "
            f"set it to '{prefixed_name(model.config._attn_implementation)}'"
        )
    return args, kwargs
