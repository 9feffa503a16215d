"""RMSNorm and SwiGLU: values and gradients of plain torch, and what is kept for the backward pass."""

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn.functional import silu
from transformers import GlmConfig
from transformers.models.glm.modeling_glm import GlmRMSNorm

from ptuning.kernels.elementwise import LeanNorm, RMSNorm, SwiGLU

EPSILON = 1e-5
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-14}


def normed(x, weight):
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPSILON))


def gated(gate_up):
    gate, up = gate_up.chunk(2, -1)
    return up * silu(gate)


def both(function, plain, x):
    """(values, gradient of x) of one and the other, for the same gradient of the result."""
    found = []
    for way in (function, plain):
        own = x.clone().requires_grad_(True)
        value = way(own)
        torch.manual_seed(1)
        (gradient,) = torch.autograd.grad(value, own, torch.randn_like(value))
        found.append((value.detach(), gradient))
    return found


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_rms_norm(dtype, scale):
    torch.manual_seed(0)
    x, weight = scale * torch.randn(3, 7, 64, dtype=dtype), torch.rand(64, dtype=dtype) + 0.5
    (ours, our_gradient), (value, gradient) = both(
        lambda x: RMSNorm.apply(x, weight, EPSILON), lambda x: normed(x, weight), x
    )
    torch.testing.assert_close(ours, value, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert (our_gradient - gradient).norm() <= TOLERANCE[dtype] * gradient.norm()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_swiglu(dtype):
    torch.manual_seed(0)
    (ours, our_gradient), (value, gradient) = both(SwiGLU.apply, gated, 3 * torch.randn(3, 7, 64, dtype=dtype))
    assert torch.equal(ours, value)
    assert (our_gradient - gradient).norm() <= TOLERANCE[dtype] * gradient.norm()


def test_gradients_by_differences():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(8, dtype=torch.float64)
    assert gradcheck(lambda x: RMSNorm.apply(x, weight, EPSILON), (x,))
    assert gradcheck(SwiGLU.apply, (x,))


def test_in_16_bit_it_rounds_where_transformers_does():
    """Forward equal to the bit; sums in fp32."""
    torch.manual_seed(0)
    norm = GlmRMSNorm(64, EPSILON).to(torch.bfloat16).requires_grad_(False)
    norm.weight.copy_(torch.rand(64))
    x = torch.randn(2, 5, 64, dtype=torch.bfloat16)
    (ours, our_gradient), (value, gradient) = both(lambda x: RMSNorm.apply(x, norm.weight, EPSILON), norm, x)
    assert torch.equal(ours, value)
    assert (our_gradient.float() - gradient.float()).norm() <= 0.01 * gradient.float().norm()


def kept(function, x):
    """Bytes kept for the backward pass."""
    sizes = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: sizes.update({t.untyped_storage().data_ptr(): (t.untyped_storage().nbytes(), t)}) or t, lambda t: t
    ):
        function(x)
    return sum(size for size, _ in sizes.values())


def test_what_is_kept():
    x = torch.randn(4, 64, requires_grad=True)
    assert kept(SwiGLU.apply, x) == 4 * 64 * 4
    assert kept(gated, x) == 4 * (64 + 32) * 4
    half = torch.randn(4, 64, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.ones(64, dtype=torch.bfloat16)
    assert kept(lambda x: RMSNorm.apply(x, weight, EPSILON), half) == 4 * 64 * 2 + 4 * 4 + 64 * 2


def test_a_norm_that_trains_or_evaluates_is_transformers_own(monkeypatch):
    monkeypatch.setattr(RMSNorm, "forward", lambda *a: pytest.fail("used"))
    norm = type("Norm", (LeanNorm, GlmRMSNorm), {})(GlmConfig().hidden_size)
    norm(torch.randn(1, GlmConfig().hidden_size))  # its weight requires a gradient
    norm.requires_grad_(False).eval()(torch.randn(1, GlmConfig().hidden_size))
