"""Whole numbers, scales and packing."""

import pytest
import torch

from ptuning.errors import ConfigError
from ptuning.quantization import precision_of, precisions

BITS = [precision.bits for precision in precisions()]


@pytest.mark.parametrize("bits", BITS)
def test_packing_has_a_way_back(bits):
    precision = precision_of(bits)
    numbers = torch.arange(-precision.top, precision.top + 1, dtype=torch.int8)
    whole = torch.stack((numbers.roll(1), numbers))[:, : len(numbers) // 2 * 2].contiguous()
    stored = precision.pack(whole)
    assert stored.dtype == torch.int8 and stored.shape == (2, precision.stored_columns(whole.shape[1]))
    assert torch.equal(precision.unpack(stored), whole)


@pytest.mark.parametrize("bits", BITS)
def test_counted_from_zero(bits):
    """Bits of the first column first, as one large number for each row."""
    precision = precision_of(bits)
    whole = torch.randint(-precision.top - 1, precision.top + 1, (3, 16), dtype=torch.int8)
    rows = precision.shifted(precision.pack(whole)).view(torch.uint8).tolist()
    expected = [sum((number + precision.top + 1) << bits * i for i, number in enumerate(row)) for row in whole.tolist()]
    assert [int.from_bytes(bytes(row), "little") for row in rows] == expected


def test_the_even_column_is_in_the_high_half():
    assert precision_of(4).pack(torch.tensor([[1, -2]], dtype=torch.int8)).tolist() == [[0x1E]]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_off_by_half_a_step_at_most(bits, dtype):
    torch.manual_seed(0)
    weight, precision = torch.randn(16, 64).to(dtype), precision_of(bits)
    stored, scale = precision.quantize(weight)
    assert scale.dtype == dtype
    error = (precision.dequantize(stored, scale, torch.float32) - weight.float()).abs()
    assert (error <= scale.float()[:, None] * (0.5 + 128 * torch.finfo(dtype).eps)).all()


def test_fp16_weights_are_quantized_in_fp16():
    torch.manual_seed(0)
    weight = torch.randn(64, 256).half()
    stored, scale = precision_of(8).quantize(weight)
    assert torch.equal(scale, weight.abs().amax(-1) / 127)
    assert torch.equal(stored, torch.round(weight / scale[:, None]).to(torch.int8))
    assert not torch.equal(stored, precision_of(8).quantize(weight.float())[0])


@pytest.mark.parametrize("bits", BITS)
def test_rows_of_zeros_and_of_tiny_numbers(bits):
    precision = precision_of(bits)
    weight = torch.zeros(3, 4, dtype=torch.float16)
    weight[1] = torch.tensor([6e-4, -6e-4, 3e-4, 0])  # the scale is a subnormal number
    weight[2] = torch.tensor([6e-8, -6e-8, 0, 6e-8])  # the scale is 0
    back = precision.dequantize(*precision.quantize(weight), torch.float32)
    assert torch.isfinite(back).all() and (back[0] == 0).all()
    assert torch.equal(back[1].sign(), weight[1].float().sign()), "a number has overflown to the other sign"


def test_nan_is_seen_in_the_scale():
    weight = torch.ones(2, 4)
    weight[1, 2] = torch.nan
    assert precision_of(4).quantize(weight)[1].isnan().tolist() == [False, True]


@pytest.mark.parametrize("bits", BITS)
def test_a_16_bit_scale_is_rounded_once(bits):
    torch.manual_seed(0)
    precision = precision_of(bits)
    stored, scale = precision.quantize(torch.randn(8, 32).half())
    exact = precision.unpack(stored).double() * scale.double()[:, None]
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(precision.dequantize(stored, scale, dtype), exact.to(dtype))


def test_what_there_is_not():
    with pytest.raises(ConfigError, match="quantization_bit is 5; use 8 or 4, or leave it out"):
        precision_of(5)
    with pytest.raises(ConfigError, match="63 columns can't be packed two numbers a byte; use --quantization_bit 8"):
        precision_of(4).stored_columns(63)
