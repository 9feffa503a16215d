"""What lies between a packed base's products, compiled: near the exact function, and each row by itself."""

import math

import pytest
import torch
from transformers.models.glm.modeling_glm import GlmRMSNorm, apply_rotary_pos_emb

from ptuning.kernels.operations import Operations
from ptuning.quantization.int_product import runs_on
from ptuning.quantization.int_tile import SETS

LANES = sorted({its.lanes for its in SETS if runs_on(its) or runs_on(SETS[0])})
ROUNDING = 2**-8  # the most that rounding to bf16 changes, relative


@pytest.fixture(params=LANES)
def operations(request):
    return Operations(request.param)


@pytest.fixture(autouse=True)
def _no_gradients():
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


def near(found: torch.Tensor, exact: torch.Tensor, roundings: float = 2.1) -> bool:
    return bool(((found.double() - exact).abs() <= roundings * ROUNDING * exact.abs() + 1e-12).all())


@pytest.mark.parametrize("shape", [(1, 64), (3, 5, 192), (37, 4096)])
def test_norm(operations, shape):
    norm = GlmRMSNorm(shape[-1], eps=1e-5).bfloat16()
    norm.weight.copy_(torch.randn(shape[-1]))
    x = (torch.randn(shape) * torch.logspace(-3, 3, shape[0]).view(-1, *[1] * (len(shape) - 1))).bfloat16()
    found, wide = operations.norm(x, norm.weight, 1e-5), x.double()
    exact = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight.double()
    assert near(found, exact) and near(found, norm(x).double(), 4)
    assert all(torch.equal(operations.norm(row, norm.weight, 1e-5), found[n]) for n, row in enumerate(x))
    transposed = operations.norm(x.transpose(0, -1).contiguous().transpose(0, -1), norm.weight, 1e-5)
    assert torch.equal(transposed, found)


def test_norm_adds_what_a_layer_gave(operations):
    x, added, weight = (torch.randn(shape).bfloat16() for shape in ((5, 96), (5, 96), (96,)))
    stream, out = x.clone(), torch.empty_like(x)
    record = operations.record("norm", stream.data_ptr(), added.data_ptr(), weight.data_ptr(), out.data_ptr(), 5, 96, 0)
    operations.run(operations.program([record], 1))
    assert torch.equal(stream, x + added) and torch.equal(out, operations.norm(x + added, weight, 0.0))


@pytest.mark.parametrize("shape", [(1, 32), (2, 3, 192), (5, 2 * 13696)])
def test_gate(operations, shape):
    x = (torch.randn(shape) * 8).bfloat16()
    x[0, ..., 0], x[0, ..., 1], x[0, ..., 2] = 300, -300, 0
    found, (gate, up) = operations.gate(x), x.double().chunk(2, -1)
    exact = gate / (1 + (-gate).exp()) * up
    small = exact.abs() < 1e-30  # silu(-300) is 0 in fp32
    assert near(found[~small], exact[~small]) and found[small].abs().max() < 1e-30
    assert all(torch.equal(operations.gate(row), found[n]) for n, row in enumerate(x))
    x[-1, ..., 5] = math.nan
    wrong = operations.gate(x)
    assert wrong[-1, ..., 5].isnan().all() and wrong.isnan().sum() == wrong[-1, ..., 5].numel()


@pytest.mark.parametrize(
    ("rows", "groups", "heads", "head_dim", "columns"),
    [(1, 2, 16, 128, 300), (5, 2, 16, 32, 521), (3, 2, 2, 48, 7), (2, 1, 20, 64, 1), (4, 4, 1, 16, 130)],
)
def test_attention_of_single_tokens(operations, rows, groups, heads, head_dim, columns):
    """Every number of heads, columns that aren't in use, and rows of other lengths."""
    store = torch.randn(2, rows + 1, groups, columns + 9, head_dim).bfloat16()
    query = (torch.randn(rows, groups * heads, 1, head_dim) * 3).bfloat16()
    lengths, scaling = torch.randint(1, columns + 1, (rows,)), head_dim**-0.5
    lengths[0] = columns
    unused = torch.arange(columns + 9) >= torch.cat([lengths, torch.tensor([0])])[:, None]
    store[:, unused[:, None].expand(-1, groups, -1)] = math.nan
    key, value = store[:, :rows, :, : columns + 4]
    found = operations.attend(query, key, value, lengths, scaling)
    for row, length in enumerate(lengths.tolist()):
        keys, values = (each[row, :, :length].double().repeat_interleave(heads, 0) for each in (key, value))
        weights = (query[row].double() @ keys.transpose(1, 2) * scaling).softmax(-1)
        exact = (weights @ values)[:, 0]
        assert (found[row, 0] - exact).norm() / exact.norm() < ROUNDING
        alone = operations.attend(query[row : row + 1], *store[:, row : row + 1], lengths[row : row + 1], scaling)
        assert torch.equal(alone[0], found[row])
    query[-1] = math.nan
    again = operations.attend(query, key, value, lengths, scaling)
    assert torch.equal(again[:-1], found[:-1]) and again[-1].isnan().all()


@pytest.mark.parametrize("rotary", [16, 32])
def test_rotary_and_the_slot_that_is_written(operations, rotary):
    """To the last bit what transformers' function gives, in each row's own column."""
    rows, groups, heads, head_dim = 3, 2, 4, 32
    query, key, value = (torch.randn(rows, n, head_dim).bfloat16() for n in (heads, groups, groups))
    angles = torch.randn(rows, 1, rotary // 2).repeat(1, 1, 2)
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    turned, turned_key = apply_rotary_pos_emb(query[:, :, None], key[:, :, None], cos, sin)
    store, columns = torch.zeros(2, rows, groups, 9, head_dim).bfloat16(), torch.tensor([0, 8, 3])
    twice = [each[:, 0, : rotary // 2].repeat_interleave(2, -1).contiguous() for each in (cos, sin)]
    tensors = (query, key, value, *twice, store[0], store[1], columns)
    distances = (2 * store.stride(1), 2 * store.stride(2))
    sizes = (*distances, rows, groups, heads, head_dim, rotary)
    record = operations.record("rotate", *(each.data_ptr() for each in tensors), *sizes)
    operations.run(operations.program([record], torch.get_num_threads()))
    assert torch.equal(query, turned[:, :, 0])
    expected = torch.zeros_like(store)
    for row, column in enumerate(columns.tolist()):
        expected[:, row, :, column] = torch.stack([turned_key[row, :, 0], value[row]])
    assert torch.equal(store, expected)
