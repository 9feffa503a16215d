"""oneDNN's product: values and gradients of torch's, and the choice between the two."""

import pytest
import torch
from torch import nn

from ptuning.kernels import ONEDNN, TORCH, fastest_product, product, products

needs_onednn = pytest.mark.skipif(ONEDNN not in products(), reason="this torch has no oneDNN")


@needs_onednn
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(2, 5, 24), (1, 24), (3, 1, 24)])
def test_equals_torchs(shape, bias):
    torch.manual_seed(0)
    plain = nn.Linear(24, 40, bias=bias).requires_grad_(False)
    fast = nn.Linear(24, 40, bias=bias).requires_grad_(False)
    fast.load_state_dict(plain.state_dict())
    fast.__class__ = product.FrozenLinear
    x = torch.randn(shape)
    found = []
    for layer in (fast, plain):
        own = x.clone().requires_grad_(True)
        value = layer(own)
        (gradient,) = torch.autograd.grad(value.square().sum(), own)
        found.append((value, gradient))
    assert type(found[0][0].grad_fn).__name__ == "FrozenProductBackward"
    torch.testing.assert_close(found[0], found[1], rtol=2e-6, atol=2e-5)


@needs_onednn
def test_a_gradient_that_lies_otherwise_in_memory():
    layer = nn.Linear(8, 6, bias=False).requires_grad_(False)
    x, dy = torch.randn(4, 8, requires_grad=True), torch.randn(6, 4).t()
    (found,) = torch.autograd.grad(product.FrozenProduct.apply(x, layer.weight, None), x, dy)
    torch.testing.assert_close(found, dy @ layer.weight)


@needs_onednn
@pytest.mark.parametrize("why", ["evaluates", "trains", "double", "autocast"])
def test_leaves_to_torch_what_it_isnt_for(monkeypatch, why):
    monkeypatch.setattr(product, "_onednn", lambda *a: pytest.fail("used"))
    layer = nn.Linear(8, 6).requires_grad_(why == "trains").train(why != "evaluates")
    layer.__class__ = product.FrozenLinear
    if why == "double":
        layer.double()
    x = torch.randn(2, 8, dtype=layer.weight.dtype, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=why == "autocast"):
        value = layer(x)
    assert "FrozenProduct" not in type(value.grad_fn).__name__


@pytest.mark.parametrize(("faster", "expected"), [(2.0, ONEDNN), (1.35, ONEDNN), (1.2, TORCH), (0.8, TORCH)])
def test_the_probe_takes_what_is_clearly_faster(monkeypatch, faster, expected):
    """On a clock that only the products move."""
    now = [0.0]

    def product_taking(seconds):
        def multiply(*args):
            now[0] += seconds
            return torch.zeros(1)

        return multiply

    monkeypatch.setattr(product, "_has_onednn", lambda: True)
    monkeypatch.setattr(product, "_onednn", product_taking(1.0))
    monkeypatch.setattr(product.nn.functional, "linear", product_taking(2 * faster))
    monkeypatch.setattr(product.time, "perf_counter", lambda: now[0])
    assert fastest_product() == expected


@pytest.mark.parametrize(
    ("plain", "other", "expected"),
    [
        ([2.0, 2.1, 2.0], [1.0, 1.1, 1.0], True),
        ([1.2, 1.1, 1.2], [1.0, 1.0, 1.1], False),
        ([2.0, 9.0, 8.0], [1.0, 1.0, 1.0], None),  # the one was interrupted
        ([2.0, 2.0, 2.0], [0.5, 1.0, 1.0], None),  # the other was
        ([1.31, 1.5, 1.5], [1.1, 1.1, 1.1], False),  # by the median alone
    ],
)
def test_times_that_vary_say_nothing(plain, other, expected):
    assert product._is_clearly_faster({TORCH: plain, ONEDNN: other}) is expected


@needs_onednn
@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ([True, True], ONEDNN),
        ([True, False], TORCH),  # one of two isn't enough
        ([None, True, None, None, True], ONEDNN),  # what isn't steady is measured again
        ([None, None, None, None, None, True], TORCH),
        ([None] * 6, TORCH),  # a busy machine
    ],
)
def test_two_steady_measurements_have_to_agree(monkeypatch, said, expected):
    rest = iter(said)
    monkeypatch.setattr(product, "_is_clearly_faster", lambda seconds: next(rest))
    assert fastest_product() == expected
    assert list(rest) == []


def test_without_the_operator_it_is_torchs(monkeypatch):
    def missing(*args):
        raise AttributeError("no such operator")

    monkeypatch.setattr(product, "_onednn", missing)
    assert products() == (TORCH,)
    assert fastest_product() == TORCH


@needs_onednn
def test_an_operator_that_means_something_else_by_now_isnt_used(monkeypatch):
    monkeypatch.setattr(product, "_onednn", lambda x, weight, bias: x @ weight.t())  # forgets the bias
    assert products() == (TORCH,)
