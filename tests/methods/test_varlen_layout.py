"""Flash attention of rows of different lengths: keys lie as [prefix, row 1, prefix, row 2, …], each row by itself.

transformers' own way to it runs here, down to the kernel, which is one softmax a row.
"""

import itertools
import types

import pytest
import torch
from transformers import modeling_flash_attention_utils as flash
from transformers.utils import is_flash_attn_2_available

from ptuning.methods.prefix import attention
from tests.kernels.test_split_attention import reference, tensors

PREFIX, LENGTH = 5, 9


@pytest.fixture
def starts(monkeypatch):
    """Where the kernel's rows begin, of queries and keys."""
    seen = []

    def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, causal=False, softmax_scale=None, **more):
        assert causal
        seen.append((cu_seqlens_q.tolist(), cu_seqlens_k.tolist()))
        rows = []
        for (start, end), (first, last) in zip(*(itertools.pairwise(each) for each in seen[-1]), strict=True):
            query, key, value = (
                q[start:end].transpose(0, 1),
                k[first:last].transpose(0, 1),
                v[first:last].transpose(0, 1),
            )
            key, value = (each.repeat_interleave(len(query) // len(key), 0) for each in (key, value))
            scores = query @ key.mT * softmax_scale
            seen_by = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(scores.shape[-1] - scores.shape[-2])
            rows.append((scores.masked_fill(~seen_by, -torch.inf).softmax(-1) @ value).transpose(0, 1))
        return torch.cat(rows)

    def of_this_machine(implementation, *more, **options):
        return None, varlen, None, flash._pad_input, flash._unpad_input

    monkeypatch.setattr(flash, "_lazy_imports", of_this_machine)
    for name in ("_loaded_implementation", "_flash_fn", "_flash_varlen_fn", "_process_flash_kwargs_fn"):
        monkeypatch.setattr(flash, name, None)
    return seen


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("lengths", [(9, 4), (1, 9)])
def test_each_row_behind_its_own_prefix(starts, lengths, left):
    query, key, value, *shared = tensors(torch.float64, heads=4, groups=2, length=LENGTH, prefix=PREFIX)
    mask = torch.zeros(2, LENGTH, dtype=torch.long)
    spans = [slice(LENGTH - n, LENGTH) if left else slice(0, n) for n in lengths]
    for row, span in enumerate(spans):
        mask[row, span] = 1
    kernel = attention._with_prefix(attention._flash_attention("flash_attention_2"), mask_is_2d=True)
    module = types.SimpleNamespace(layer_idx=0)
    found = kernel(module, query, key, value, mask, prefix=[tuple(shared)], scaling=0.3)[0].transpose(1, 2)
    ends = [0, lengths[0], sum(lengths)]
    assert starts == [(ends, [end + PREFIX * row for row, end in enumerate(ends)])]
    given = (query, key, value, *shared)
    for row, span in enumerate(spans):
        one = slice(row, row + 1)
        alone = (*(each[one, :, span] for each in given[:3]), *(each[one] for each in shared))
        expected, ours = reference(*alone, 0.3), found[one, :, span]
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
        weights = torch.randn(expected.shape, dtype=torch.float64)
        gradients = (torch.autograd.grad(each, given, weights, retain_graph=True) for each in (ours, expected))
        for one_of_them, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one_of_them, other, rtol=1e-10, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu():
    """flash-attn's own kernel: the rows' values and gradients of one softmax, by the norm, because it computes in 16 bit."""
    if not is_flash_attn_2_available():
        pytest.skip("flash-attn is not installed")
    lengths = (200, 77)
    wide = tensors(torch.float64, heads=8, groups=2, length=lengths[0], prefix=128)
    given = [each.detach().to("cuda", torch.bfloat16).requires_grad_(True) for each in wide]
    query, key, value, *shared = given
    mask = torch.zeros(2, lengths[0], dtype=torch.long, device="cuda")
    for row, length in enumerate(lengths):
        mask[row, :length] = 1
    kernel = attention._with_prefix(attention._flash_attention("flash_attention_2"), mask_is_2d=True)
    module = types.SimpleNamespace(layer_idx=0)
    found = kernel(module, query, key, value, mask, prefix=[tuple(shared)], scaling=0.25)[0].transpose(1, 2)
    wide = [each.detach().double().cpu().requires_grad_(True) for each in given]
    for row, length in enumerate(lengths):
        one = slice(row, row + 1)
        alone = (*(each[one, :, :length] for each in wide[:3]), *(each[one] for each in wide[3:]))
        expected, ours = reference(*alone, 0.25), found[one, :, :length]
        assert (ours.double().cpu() - expected).norm() <= 0.01 * expected.norm()
        weights = torch.randn(expected.shape)
        gradients = torch.autograd.grad(ours, given, weights.cuda().bfloat16(), retain_graph=True)
        for one_of_them, other in zip(gradients, torch.autograd.grad(expected, wide, weights.double()), strict=True):
            assert (one_of_them.double().cpu() - other).norm() <= 0.02 * other.norm()
