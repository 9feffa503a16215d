"""Prefix and causal part as two attentions: values and gradients of one attention with a mask."""

import pytest
import torch

from ptuning.kernels.attention import split_attention, splits

NAMES = ("query", "key", "value", "prefix_key", "prefix_value")


def reference(query, key, value, prefix_key, prefix_value, scale):
    """By one softmax over the prefix and the row, in the tensors' own dtype."""
    heads = query.shape[1] // key.shape[1]
    keys, values = (
        torch.cat(pair, 2).repeat_interleave(heads, 1) for pair in ((prefix_key, key), (prefix_value, value))
    )
    rows, behind = query.shape[2], prefix_key.shape[2]
    mask = torch.ones(rows, behind + rows, dtype=torch.bool).tril(behind)
    scores = (query @ keys.transpose(2, 3) * scale).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ values


def tensors(dtype, rows=2, heads=4, groups=2, length=37, prefix=5, width=16, large=1.0):
    torch.manual_seed(0)
    sizes = [(rows, heads, length, width), *[(rows, groups, length, width)] * 2, *[(rows, groups, prefix, width)] * 2]
    return [(large * torch.randn(size, dtype=dtype)).requires_grad_(True) for size in sizes]


def values_and_gradients(function, given, scale):
    out = function(*given, scale)
    torch.manual_seed(1)
    return out.detach(), torch.autograd.grad(out, given, torch.randn(out.shape).to(out.dtype))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"groups": 4},
        {"groups": 1, "heads": 8},
        {"length": 700, "prefix": 130},  # several blocks of the kernel
        {"length": 2, "prefix": 1, "rows": 1},
        {"large": 6.0},  # sharp softmaxes: one part is all, the other nothing
    ],
)
def test_equals_one_attention(dtype, tolerance, shape):
    given = tensors(dtype, **shape)
    ours, our_gradients = values_and_gradients(split_attention, given, 0.3)
    value, gradients = values_and_gradients(reference, given, 0.3)
    assert (ours - value).norm() <= tolerance * value.norm()
    for name, found, expected in zip(NAMES, our_gradients, gradients, strict=True):
        assert (found - expected).norm() <= 10 * tolerance * max(expected.norm(), 1e-3), name


def test_near_torchs_own_with_a_mask_in_bfloat16():
    given = tensors(torch.bfloat16, length=64)
    ours, our_gradients = values_and_gradients(split_attention, given, 0.25)
    wide = [each.detach().float().requires_grad_(True) for each in given]
    value, gradients = values_and_gradients(reference, wide, 0.25)
    assert ours.dtype == torch.bfloat16
    assert (ours.float() - value).norm() <= 0.01 * value.norm()
    for found, expected in zip(our_gradients, gradients, strict=True):
        assert (found.float() - expected).norm() <= 0.02 * expected.norm()


def test_a_prefix_that_all_rows_share():
    given = tensors(torch.float64)
    shared = [each.detach()[:1].requires_grad_(True) for each in given[3:]]
    out = split_attention(*given[:3], *(each.expand(2, -1, -1, -1) for each in shared))
    value = reference(*given[:3], *(each.expand(2, -1, -1, -1) for each in shared), 0.25)
    for found, expected in zip(
        torch.autograd.grad(out.sum(), shared), torch.autograd.grad(value.sum(), shared), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_the_first_layer_of_a_frozen_base():
    """Only the prefix needs gradients there."""
    given = [each.detach() for each in tensors(torch.float64)]
    for each in given[3:]:
        each.requires_grad_(True)
    found = torch.autograd.grad(split_attention(*given, 0.3).square().sum(), given[3:])
    expected = torch.autograd.grad(reference(*given, 0.3).square().sum(), given[3:])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_what_is_kept_grows_with_the_length_and_not_its_square():
    def kept(length):
        given, sizes = tensors(torch.float32, length=length), {}

        def pack(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            split_attention(*given)
        return sum(size for size, _ in sizes.values())

    short, middle, long = (kept(length) for length in (100, 200, 400))
    assert long - middle == 2 * (middle - short)


def test_where_a_mask_is_needed_it_doesnt_apply():
    query, key = torch.randn(1, 4, 8, 16), torch.randn(1, 2, 8, 16)
    assert splits(query, key, key, None, 0.0)
    assert not splits(query, key, key, torch.ones(1, 1, 8, 8, dtype=torch.bool), 0.0)
    assert not splits(query, key, key, None, 0.1)
    assert not splits(query[:, :, :1], key, key, None, 0.0)  # a token behind a cache
    assert not splits(query, key, key.bfloat16(), None, 0.0)
    assert not splits(*[query.half()] * 3, None, 0.0)
    assert not splits(*[query.to("meta")] * 3, None, 0.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert not splits(query, key, key, None, 0.0)
