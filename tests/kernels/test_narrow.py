"""Products in bf16: what is rounded and what isn't, where they are used, and where they are refused."""

import pytest
import torch
from peft import LoraConfig
from torch import nn

from ptuning.errors import ConfigError
from ptuning.families.logits import loss_of
from ptuning.kernels import BF16, TORCH, narrow, narrow_refusal, swap
from ptuning.kernels.narrow import NarrowLinear, multiply_narrow, packed_bytes
from ptuning.methods.lora.attach import attach_lora, lora_parameters
from ptuning.methods.prefix.attach import prefix_of
from ptuning.quantization import QuantizationConfig

needs_bf16 = pytest.mark.skipif(narrow_refusal() is not None, reason=str(narrow_refusal()))


@needs_bf16
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(2, 5, 24), (1, 24), (700, 24)])
def test_products_of_rounded_numbers(shape, bias):
    """Of small whole numbers nothing is rounded; of others each factor and the result to 8 bits."""
    torch.manual_seed(0)
    for whole in (True, False):
        layer = nn.Linear(24, 40, bias=bias).requires_grad_(False)
        x, dy = torch.randn(shape, requires_grad=True), torch.randn(*shape[:-1], 40)
        if whole:
            x, dy = torch.randint(-2, 3, shape).float().requires_grad_(True), dy.sign()
            layer.weight.copy_(torch.randint(-2, 3, (40, 24)))
        expected = nn.functional.linear(x, layer.weight, layer.bias)
        (gradient,) = torch.autograd.grad(expected, x, dy)
        multiply_narrow(layer)
        found = layer(x)
        (ours,) = torch.autograd.grad(found, x, dy)
        assert found.dtype == ours.dtype == torch.float32
        for mine, exact in ((found, expected), (ours, gradient)):
            difference = (mine - exact).norm() / exact.norm()
            assert difference <= (1e-7 if whole else 2**-7) and (whole or difference > 1e-4)


@needs_bf16
def test_a_model(golden, load_tiny):
    """The layers' matrices while training; the output layer, and evaluation, as before."""
    model, plain = load_tiny("embedding"), load_tiny("embedding")
    ids, labels = golden["train.input_ids"], golden["train.labels"]
    swap(model, BF16)
    swap(plain, TORCH)
    assert {name.rpartition(".")[2] for name, part in model.named_modules() if isinstance(part, NarrowLinear)} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj")
    }
    found = []
    for each in (model, plain):
        each.train()
        prefix_of(each).eval()  # dropout off
        loss = loss_of(each, ids, labels)
        loss.backward()
        found.append((float(loss.detach()), prefix_of(each).embedding.weight.grad))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-3) and found[0][0] != found[1][0]
    assert (found[0][1] - found[1][1]).norm() <= 0.05 * found[1][1].norm()
    for each in (model, plain):
        each.eval()
    assert torch.equal(model(golden["full.input_ids"]).logits, plain(golden["full.input_ids"]).logits)
    assert set(model.state_dict()) == set(plain.state_dict())


@needs_bf16
def test_beside_a_lora(golden, load_tiny):
    """The base's part of each layer; the factors stay as they are."""
    losses = []
    for product in (BF16, TORCH):
        model = load_tiny()
        attach_lora(model, LoraConfig(r=4, lora_dropout=0.0, target_modules="all-linear"))
        swap(model.train(), product)
        loss = loss_of(model, golden["train.input_ids"], golden["train.labels"])
        loss.backward()
        losses.append(float(loss.detach()))
        assert all(factor.grad is not None for factor in lora_parameters(model).values())
    assert sum(isinstance(part, NarrowLinear) for part in model.modules()) == 0
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and losses[0] != losses[1]


@needs_bf16
def test_what_it_takes(load_tiny):
    model = load_tiny("embedding")
    swap(model, BF16)
    parts = [part for part in model.modules() if isinstance(part, NarrowLinear)]
    numbers = sum(part.weight.numel() for part in parts)
    assert packed_bytes(numbers) == sum(2 * (part.packed.numel() + part.transposed.numel()) for part in parts)


@pytest.mark.parametrize(
    ("precision", "dtype", "said"),
    [
        (4, torch.float32, "this base is quantised, and they are for the matrices of one in float32"),
        (None, torch.bfloat16, "they are for a base in float32, and this one is in bfloat16"),
    ],
)
def test_another_base_refuses(load_tiny, precision, dtype, said):
    model = load_tiny("embedding").to(dtype)
    if precision is not None:
        model.config.quantization_config = QuantizationConfig(precision)
    with pytest.raises(ConfigError, match=f"--kernels bf16: {said}; leave it out"):
        swap(model, BF16)


def test_a_processor_without_it(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True}, raising=False)
    assert (
        narrow_refusal()
        == "torch knows of no bf16 products of this processor (AVX512-BF16 or AMX), so it would be slower"
    )
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    monkeypatch.setattr(narrow, "_multiply", lambda x, packed: x)  # an operator that means something else
    assert narrow_refusal() == "this torch has no oneDNN products of bf16"
