"""Gives a model these kernels. The one place that changes what modules of transformers compute.

A module's class is changed to a subclass of it: weights, names, hooks and the `isinstance` questions of peft and transformers stay
as they were, and so does what is computed in evaluation mode, up to the library that multiplies. A registry of transformers offers
that for attention alone.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_layers import GradientCheckpointingLayer

from ptuning.distributed import is_divided, of_main_process
from ptuning.errors import ConfigError
from ptuning.families import family_of
from ptuning.kernels.compiled import CompiledLayer, compiled_forward, leave_attention_apart
from ptuning.kernels.elementwise import LeanFeedForward, LeanNorm
from ptuning.kernels.loss import CHUNKS, LIGER, LossHead, liger_loss
from ptuning.kernels.narrow import BF16, multiply_narrow
from ptuning.kernels.operations import CompiledFeedForward, CompiledNorm, Operations
from ptuning.kernels.product import ONEDNN, TORCH, FrozenLinear, fastest_to_answer
from ptuning.messages import message
from ptuning.quantization import precision_in

# Behind the name of the attention implementation. `sdpa_split` is sdpa itself, which without a prefix needs no mask; a prefix
# registers its own form (methods/prefix/attention.py).
SPLIT = "_split"
FAST, PLAIN = "fast", "plain"  # --kernels, beside BF16: fast with products in bf16
AttentionInterface.register("sdpa" + SPLIT, sdpa_attention_forward)
AttentionMaskInterface.register("sdpa" + SPLIT, sdpa_mask)


def swap(model: PreTrainedModel, product: str, answers: str = TORCH) -> None:
    """Makes a model whose base is frozen compute with these kernels while it trains.

    Args:
        model: with what trains already on it; what comes later keeps its own classes.
        product: of `products()`, or `BF16`, for the frozen linear layers. The output layer stays in fp32 with `BF16`.
        answers: of `products()`, in evaluation mode.

    Raises:
        ConfigError: `BF16` on a base that isn't in fp32.
    """
    family, head = family_of(model.config), model.get_output_embeddings()
    if product == BF16 and (why := _why_not_narrow(model)) is not None:
        raise ConfigError(f"--kernels bf16: {why}; leave it out")
    for module in model.modules():
        kind = type(module)
        if kind is family.norm:
            module.__class__ = _lean(LeanNorm, kind)
        elif kind is family.feed_forward and family.gates_with_silu(model.config):
            module.__class__ = _lean(LeanFeedForward, kind)
        elif kind is nn.Linear and not any(p.requires_grad for p in module.parameters()):
            _give(module, product == ONEDNN, answers == ONEDNN)
            if product == BF16 and module is not head:
                multiply_narrow(module)
    give_loss(model, CHUNKS)
    attention = model.config._attn_implementation
    if attention + SPLIT in AttentionInterface().valid_keys():  # not where a family brings an attention of its own
        model.config._attn_implementation = attention + SPLIT


def _why_not_narrow(model: PreTrainedModel) -> str | None:
    if precision_in(model.config) is not None:
        return "this base is quantised, and they are for the matrices of one in float32"
    dtype = next(model.parameters()).dtype
    return None if dtype == torch.float32 else f"they are for a base in float32, and this one is in {str(dtype)[6:]}"


def give_loss(model: PreTrainedModel, by: str) -> None:
    """Makes a model whose output layer is frozen give the loss of labels without their logits while it trains.

    Args:
        by: `CHUNKS`, or `LIGER` where it is installed and the model on a GPU.
    """
    head: Any = model.get_output_embeddings()
    if type(head) not in (nn.Linear, FrozenLinear) or any(p.requires_grad for p in head.parameters()):
        return
    head.__class__ = _lean(LossHead, type(head))
    if by == LIGER:
        head.liger = liger_loss()


def compile_layers(model: PreTrainedModel, backend: str | Callable = "inductor", mode: str | None = None) -> None:
    """Makes a model compute its layers compiled while it trains; loss, embeddings and answers as they are.

    Args:
        model: with what trains already on it.
        backend: of `torch.compile`, as `mode`.
    """
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and not isinstance(module, CompiledLayer):
            layer: Any = module
            layer.compiled = compiled_forward(type(layer), backend, mode)
            layer.__class__ = _lean(CompiledLayer, type(layer))
    leave_attention_apart(model)


def swap_to_answer(model: PreTrainedModel, asked: str | None, say: Callable[[str], object]) -> None:
    """Gives a bare base that only answers oneDNN's product where that is clearly faster on this machine.

    Args:
        asked: fast or plain (torch's own product); None: fast where it can be.
        say: gets a line where it is oneDNN's.

    Raises:
        ConfigError: fast is asked for, and can't be.
    """
    weight = next(model.parameters())
    if precision_in(model.config) is not None:
        why = "this base is quantised, which --cpu_kernels is for"
    elif is_deepspeed_zero3_enabled():
        why = "ZeRO stage 3 gathers weights in its own way"
    elif is_divided():
        why = "the matrices are divided among processes (--tensor_parallel)"
    elif weight.device.type != "cpu" or weight.dtype != torch.float32:
        why = f"they are for a base in float32 on a CPU, and this one is in {str(weight.dtype)[6:]} on {weight.device.type}"
    else:
        why = None
    if asked == FAST and why is not None:
        raise ConfigError(f"--kernels fast: {why}; leave it out")
    if asked == PLAIN or why is not None or of_main_process(fastest_to_answer()) != ONEDNN:
        return
    answer_with(model, ONEDNN)
    say(message("answers_by_onednn"))


def answer_with(model: PreTrainedModel, product: str) -> None:
    """Makes the linear layers of a model compute answers by one of `products()`."""
    for module in model.modules():
        if type(module) in (nn.Linear, FrozenLinear):
            _give(module, isinstance(module, FrozenLinear) and module.trains, product == ONEDNN)


def answer_by_operations(model: PreTrainedModel, operations: Operations) -> None:
    """Makes the norms and feed-forward parts of a base that only answers compute with compiled functions."""
    family = family_of(model.config)
    for module in model.modules():
        if type(module) is family.norm:
            _equip(module, CompiledNorm, operations)
        elif type(module) is family.feed_forward:
            _equip(module, CompiledFeedForward, operations)


def _equip(module: Any, kernel: type, operations: Operations) -> None:
    module.__class__, module.operations = _lean(kernel, type(module)), operations


def _give(linear: Any, trains: bool, answers: bool) -> None:
    linear.__class__ = FrozenLinear if trains or answers else nn.Linear
    if trains or answers:
        linear.trains, linear.answers = trains, answers


_made: dict[tuple[type, type], Any] = {}


def _lean(kernel: type, kind: type) -> Any:
    """The class `kind` that computes with `kernel` while training."""
    if (kernel, kind) not in _made:
        _made[kernel, kind] = type(f"Lean{kind.__name__}", (kernel, kind), {"__doc__": kernel.__doc__})
    return _made[kernel, kind]
