"""The loss of labels in chunks: values and gradients of the cross entropy of all logits, and what it keeps."""

import sys
import types

import pytest
import torch
from torch import nn

from ptuning.families.logits import label_loss, logits_of_labels, loss_of
from ptuning.kernels import CHUNKS, LIGER, ONEDNN, TORCH, give_loss, gpu_loss, products, swap
from ptuning.kernels.loss import CHUNK, LabelLoss, LossHead, liger_loss, momentary_bytes
from ptuning.kernels.product import _onednn

LABELS, HIDDEN, VOCABULARY = 13, 24, 50


def given(dtype, labels=LABELS, large=1.0):
    torch.manual_seed(0)
    hidden, weight = torch.randn(labels, HIDDEN, dtype=dtype), torch.randn(VOCABULARY, HIDDEN, dtype=dtype)
    return (large * hidden).requires_grad_(True), weight, torch.randn(VOCABULARY, dtype=dtype)


def reference(hidden, weight, bias, targets):
    logits = nn.functional.linear(hidden, weight, bias)
    return nn.functional.cross_entropy(
        logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="sum"
    )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("chunk", [1, 4 * VOCABULARY, 5 * VOCABULARY + 1, 10**9])  # 1, 4, 5 rows at a time, and all
@pytest.mark.parametrize(
    ("dtype", "tolerance", "large"),
    [
        (torch.float32, 2e-6, 1.0),
        (torch.float64, 1e-14, 1.0),
        (torch.float64, 1e-14, 40.0),
        (torch.bfloat16, 0.02, 1.0),
    ],
)
def test_equals_the_cross_entropy_of_all_logits(dtype, tolerance, large, chunk, bias):
    hidden, weight, offset = given(dtype, large=large)
    offset = offset if bias else None
    targets = torch.randint(0, VOCABULARY, (LABELS,))
    products = [nn.functional.linear] + ([_onednn] if dtype == torch.float32 and ONEDNN in products_here else [])
    expected = reference(hidden, weight, offset, targets)
    (gradient,) = torch.autograd.grad(expected / 7, hidden)
    for multiply in products:
        loss = LabelLoss.apply(hidden, weight, offset, targets, multiply, chunk)
        (found,) = torch.autograd.grad(loss / 7, hidden)
        assert loss.dtype == expected.dtype and found.dtype == dtype
        assert (loss - expected).abs() <= tolerance * expected.abs()
        assert (found - gradient).norm() <= tolerance * gradient.norm()


products_here = products()


def test_no_labels():
    hidden, weight, _ = given(torch.float32, labels=0)
    loss = LabelLoss.apply(hidden, weight, None, torch.zeros(0, dtype=torch.long), nn.functional.linear, 100)
    loss.backward()
    assert loss == 0 and hidden.grad.shape == (0, HIDDEN)


def test_it_keeps_the_gradient_alone():
    hidden, weight, _ = given(torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.shape) or tensor, lambda tensor: tensor
    ):
        LabelLoss.apply(hidden, weight, None, torch.zeros(LABELS, dtype=torch.long), nn.functional.linear, 100)
    assert kept == [(LABELS, HIDDEN)]


@pytest.mark.parametrize(("labels", "rows"), [(40, 32), (10, 10)])
def test_what_it_takes_for_a_moment_is_what_the_estimate_counts(labels, rows):
    hidden, weight = torch.randn(labels, 4, requires_grad=True), torch.randn(1 << 19, 4)
    targets, held, most = torch.zeros(labels, dtype=torch.long), 0, 0
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        LabelLoss.apply(hidden, weight, None, targets, nn.functional.linear, CHUNK)
    events = seen.profiler.kineto_results.events()
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes() if event.name() == "[memory]" else 0
        most = max(most, held)
    counted = momentary_bytes(CHUNKS, labels, 4, 1 << 19, 4)
    assert counted == rows * (1 << 19) * 8
    assert counted <= most <= 1.001 * counted


def test_what_liger_takes_for_a_moment():
    """Of ChatGLM2-6B 4,000 / ceil(65,024 / 4,096) labels at a time, as a power of two, and never more than there are."""
    assert momentary_bytes(LIGER, 4000, 4096, 65024, 2) == 256 * 65024 * 2
    assert momentary_bytes(LIGER, 4097, 4096, 65024, 2) == 512 * 65024 * 2
    assert momentary_bytes(LIGER, 3, 4096, 1000, 4) == 3 * 1000 * 4


@pytest.mark.parametrize("product", products())
def test_a_model_gives_the_sum_while_it_trains(golden, load_tiny, product):
    model, ids, labels = load_tiny("embedding"), golden["train.input_ids"], golden["train.labels"]
    expected = float(loss_of(model, ids, labels).detach())
    swap(model, product)
    assert isinstance(model.lm_head, LossHead)
    for trains in (False, True):
        model.train(trains)
        model.prefix_encoder.eval()  # dropout off
        with logits_of_labels(model, labels):
            found = model(input_ids=ids, use_cache=False).logits
        assert found.ndim == (0 if trains else 2)
        assert float(label_loss(found, labels).detach()) == pytest.approx(expected, abs=1e-6)
    assert model(input_ids=ids, use_cache=False).logits.ndim == 3  # nobody has told it the labels


def test_an_output_layer_that_trains_has_its_logits(load_tiny):
    model = load_tiny().requires_grad_(True)
    swap(model, TORCH)
    assert type(model.lm_head) is nn.Linear


# --- liger-kernel's, on a GPU ---------------------------------------------------------------------------------------------


@pytest.fixture
def liger(monkeypatch):
    """A package of that name, whose loss is torch's; what it was called with."""
    shapes = []

    class LigerFusedLinearCrossEntropyLoss:
        def __init__(self, reduction):
            assert reduction == "sum"

        def __call__(self, lin_weight, _input, target, bias=None):
            shapes.append((lin_weight.shape, _input.shape, target.shape))
            return reference(_input, lin_weight, bias, target)

    package = types.ModuleType("liger_kernel.transformers")
    package.LigerFusedLinearCrossEntropyLoss = LigerFusedLinearCrossEntropyLoss
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", package)
    return shapes


def test_it_is_chosen_on_a_gpu_where_it_is_installed(monkeypatch, liger):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_loss() is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert gpu_loss() == LIGER
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", None)
    assert gpu_loss() == CHUNKS


def test_a_model_that_is_given_it(golden, load_tiny, liger):
    model, ids, labels = load_tiny("embedding"), golden["train.input_ids"], golden["train.labels"]
    expected = float(loss_of(model, ids, labels).detach())
    give_loss(model, LIGER)
    assert float(loss_of(model, ids, labels).detach()) == expected and not liger  # in evaluation mode
    model.train()
    model.prefix_encoder.eval()  # dropout off
    found = loss_of(model, ids, labels)
    assert float(found.detach()) == pytest.approx(expected, abs=1e-6)
    count = int((labels[:, 1:] != -100).sum())
    assert liger == [(model.lm_head.weight.shape, (count, model.config.hidden_size), (count,))]
    assert loss_of(model, ids, torch.full_like(labels, -100)) == 0 and len(liger) == 1  # its kernels want a label


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("by", [CHUNKS, LIGER])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 0.02)]
)  # products may be in TF32
def test_on_a_gpu(by, dtype, tolerance):
    """The sizes of ChatGLM2-6B's output layer."""
    if by == LIGER and liger_loss() is None:
        pytest.skip("liger-kernel is not installed")
    torch.manual_seed(0)
    head = nn.Linear(4096, 65024, bias=False, device="cuda", dtype=dtype).requires_grad_(False)
    hidden = torch.randn(700, 4096, device="cuda", dtype=dtype, requires_grad=True)
    targets = torch.randint(0, 65024, (700,), device="cuda")
    wide = hidden.detach().float().requires_grad_(True)
    expected = reference(wide, head.weight.float(), None, targets)
    (gradient,) = torch.autograd.grad(expected / 7, wide)
    model = types.SimpleNamespace(get_output_embeddings=lambda: head)
    give_loss(model, by)
    head._targets = targets
    loss = head(hidden)
    (found,) = torch.autograd.grad(loss / 7, hidden)
    assert loss.ndim == 0 and found.dtype == dtype
    assert (loss - expected).abs() <= tolerance * expected
    assert (found.float() - gradient).norm() <= tolerance * gradient.norm()
