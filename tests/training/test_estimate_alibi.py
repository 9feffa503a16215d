"""The estimate of a base with ALiBi, whose mask has numbers for each head: it is one for all rows and layers."""

from dataclasses import replace

import pytest
import torch

from ptuning.families.baichuan.config import BaichuanConfig
from ptuning.families.baichuan.model import BaichuanForCausalLM
from ptuning.kernels import CHUNKS, products, swap
from ptuning.methods.prefix.attach import attach_prefix
from ptuning.training.memory import activations
from tests.training.test_estimate import saved_by_autograd, small_work

# So small that the mask is a fifth of what is kept.
SIZES = {
    "num_hidden_layers": 3,
    "hidden_size": 128,
    "num_attention_heads": 16,
    "intermediate_size": 192,
    "vocab_size": 3072,
}


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("norm_head", [False, True])
def test_activations_are_what_autograd_saves(fast, norm_head):
    torch.manual_seed(0)
    model = BaichuanForCausalLM(BaichuanConfig(**SIZES, norm_head=norm_head))
    attach_prefix(model, 16)
    if fast:
        swap(model, products()[-1])
    measured = saved_by_autograd(model.train())
    work = replace(small_work(model.config, 16), batch=2, length=100, labels=60, lean=fast)
    work = replace(work, loss_by=CHUNKS if fast else None)
    assert activations(work) == pytest.approx(measured, rel=0.02)
