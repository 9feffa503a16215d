"""ALiBi (Press et al. 2021, arXiv:2108.12409) as Baichuan-13B computes it, as named implementations in transformers' registry.

Each head adds slope · position of the key to its scores. A key's position is the number of keys before it that any query
sees: padding is none of them, on whichever side, and a prefix in front of a row counts as so many tokens.

Shapes: B rows, H heads, S query positions, K key positions, D head dimension.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.llama.modeling_llama import eager_attention_forward

from ptuning.errors import ConfigError

ALIBI = "alibi_"
KERNELS = {"sdpa": sdpa_attention_forward, "eager": eager_attention_forward}


def alibi_name(implementation: str) -> str:
    """The registered name of an attention implementation with ALiBi, e.g. `sdpa` → `alibi_sdpa`; one that has it stays.

    Raises:
        ConfigError: there is none.
    """
    if ALIBI in implementation:
        return implementation
    if implementation not in KERNELS:
        raise ConfigError(
            f"attn_implementation is {implementation!r}, and the ALiBi of this model is computed by {' or '.join(KERNELS)} alone; "
            "leave it out"
        )
    return ALIBI + implementation


@cache
def slopes(heads: int) -> tuple[float, ...]:
    """Of each head; a number of heads that isn't a power of two takes every second slope of the next power."""
    power = 2 ** math.floor(math.log2(heads))
    start = 2 ** (-(2 ** -(math.log2(power) - 3)))
    found = tuple(start * start**i for i in range(power))
    return found if power == heads else found + slopes(2 * power)[0::2][: heads - power]


def bias(visible: torch.Tensor, heads: int, dtype: torch.dtype) -> torch.Tensor:
    """What is added to the scores: (B or 1, H, S, K), the least number where a query doesn't see a key.

    Args:
        visible: (B or 1, 1, S, K), true where it does.
        heads: H.
        dtype: of the scores.
    """
    slope = torch.tensor(slopes(heads), device=visible.device)[:, None, None]
    position = (visible.any(-2, keepdim=True).long().cumsum(-1) - 1).clamp(min=0)
    if dtype != torch.float32:
        # Softmax doesn't see what a whole row has in common. At position 4000 numbers of 16 bit are up to 16 apart; counted
        # from the query itself, near keys have small ones.
        position = position - (visible.sum(-1, keepdim=True) - 1)
    return torch.where(visible, (slope * position).to(dtype), torch.finfo(dtype).min)


def _with_alibi(kernel: Callable) -> Callable:
    def attention(
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        is_causal: bool | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """query (B, H, S, D), key and value (B, H, K, D); a mask of true and false, or of 0 and least numbers."""
        heads, length = query.shape[1], query.shape[2]
        if heads != module.config.num_attention_heads:
            raise ConfigError(
                f"{heads} of {module.config.num_attention_heads} heads are here: a model with ALiBi can't be divided by heads "
                "among processes; divide it by layers (device_map) instead"
            )
        mask = getattr(attention_mask, "_with_alibi", None)  # all layers have one mask, so this is made once
        if mask is None or (mask.dtype, mask.device) != (query.dtype, query.device):
            visible = _visible(attention_mask, length, key)
            mask = bias(visible, heads, query.dtype)
            if attention_mask is not None and not torch.compiler.is_compiling():
                attention_mask._with_alibi = mask  # type: ignore[attr-defined]  # kept on the mask, so that it lives as long
        if kernel is sdpa_attention_forward:
            kwargs["is_causal"] = False
        return kernel(module, query, key, value, mask, **kwargs)

    return attention


def _visible(mask: torch.Tensor | None, length: int, key: torch.Tensor) -> torch.Tensor:
    """(B or 1, 1, S, K): which keys a query sees."""
    if mask is None:  # a caller's own; those that transformers makes are never left out, see _mask
        ones = torch.ones(1, 1, length, key.shape[2], dtype=torch.bool, device=key.device)
        return ones.tril(key.shape[2] - length)
    visible = mask if mask.dtype == torch.bool else mask >= 0
    if visible.ndim == 2:
        return visible[None, None]
    return visible[:1] if visible.stride(0) == 0 else visible  # rows that share one


def _mask(**kwargs: Any) -> torch.Tensor | None:
    """transformers' own of true and false, also where a kernel without ALiBi would need none."""
    return sdpa_mask(**kwargs | {"allow_is_causal_skip": False})


def register() -> None:
    """Adds `alibi_sdpa` and `alibi_eager` to transformers."""
    for name, kernel in KERNELS.items():
        AttentionInterface.register(ALIBI + name, _with_alibi(kernel))
        AttentionMaskInterface.register(ALIBI + name, _mask)
