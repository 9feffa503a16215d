"""Behind a causal bias, which only GPUs are given, keys stay grouped: transformers would repeat them for every query head."""

import types

import pytest
import torch
from torch.nn.attention.bias import CausalBias, causal_lower_right

from ptuning.kernels.attention import takes_groups
from ptuning.methods.prefix import attention
from tests.kernels.test_split_attention import reference, tensors


def given(dtype, device="cpu", length=9, prefix=5):
    tensors_of = tensors(dtype, heads=8, groups=2, length=length, prefix=prefix)
    return [each.detach().to(device).requires_grad_(True) for each in tensors_of]


def as_on_a_gpu(query, key, value, prefix_key, prefix_value, scale):
    """Through `prefix_sdpa`, with the mask that a GPU has."""
    module = types.SimpleNamespace(num_key_value_groups=4, layer_idx=0, training=True)
    prefix = [(prefix_key, prefix_value)]
    kernel = attention._with_prefix(attention._sdpa)
    return kernel(module, query, key, value, None, prefix=prefix, scaling=scale)[0].transpose(1, 2)


@pytest.fixture
def bias(monkeypatch):
    """The causal bias of a GPU, and what torch's attention is called with."""
    shapes, own = [], CausalBias._dispatch

    def padded(mask, query, prefix_length, key_length):
        return causal_lower_right(query.shape[2], prefix_length + key_length)

    def called(query, key, *more, **options):
        shapes.append((query.shape[1], key.shape[1]))
        return own(query, key, *more, **options)

    monkeypatch.setattr(attention, "_pad_mask", padded)
    monkeypatch.setattr(CausalBias, "_dispatch", staticmethod(called))
    return shapes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("takes", "groups"), [(True, 2), (False, 8)])
def test_values_and_gradients(monkeypatch, bias, dtype, takes, groups):
    monkeypatch.setattr(attention, "takes_groups", lambda *a: takes)
    for name in ("can_use_flash_attention", "can_use_efficient_attention"):  # a CPU has neither
        monkeypatch.setattr(f"torch.nn.attention.bias.{name}", lambda params: False)
    monkeypatch.setattr("torch.nn.attention.bias._raise_kernel_warnings", lambda params: None)
    own = given(dtype)
    found, expected = as_on_a_gpu(*own, 0.3), reference(*own, 0.3)
    assert bias[0] == (8, groups)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    weights = torch.randn(expected.shape, dtype=dtype)
    pairs = zip(torch.autograd.grad(found, own, weights), torch.autograd.grad(expected, own, weights), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=10 * tolerance, atol=10 * tolerance)


def test_not_on_a_cpu():
    query, key, value = given(torch.bfloat16)[:3]
    assert not takes_groups(query, key, value, 0.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu(monkeypatch):
    """torch's flash kernel takes keys of two groups for eight heads, with values and gradients of one softmax."""
    own = given(torch.bfloat16, "cuda", length=200, prefix=128)
    assert takes_groups(*own[:3], 0.0)
    monkeypatch.setattr(attention, "sdpa_attention_forward", lambda *a, **k: pytest.fail("keys are repeated"))
    found = as_on_a_gpu(*own, 0.25)
    wide = [each.detach().double().cpu().requires_grad_(True) for each in own]
    expected = reference(*wide, 0.25)
    assert (found.double().cpu() - expected).norm() <= 0.01 * expected.norm()
    weights = torch.randn(expected.shape)
    ours = torch.autograd.grad(found, own, weights.cuda().bfloat16())
    for one, other in zip(ours, torch.autograd.grad(expected, wide, weights.double()), strict=True):
        assert (one.double().cpu() - other).norm() <= 0.02 * other.norm()
