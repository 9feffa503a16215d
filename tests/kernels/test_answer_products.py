"""oneDNN's product in evaluation and in serving: where it is used, and what refuses."""

import sys

import pytest
import torch
from torch import nn

from ptuning.errors import ConfigError
from ptuning.generation import Engine, GenerationRequest
from ptuning.kernels import ONEDNN, TORCH, answer_with, product, products, swap, swap_to_answer
from ptuning.kernels.product import LEAST_ROWS, FrozenLinear, fastest_to_answer
from ptuning.loading import load_base
from ptuning.quantization import precision_of
from tests.conftest import REPO

needs_onednn = pytest.mark.skipif(ONEDNN not in products(), reason="this torch has no oneDNN")
MODULE = "ptuning.kernels.swap"


@pytest.fixture
def chosen(monkeypatch):
    """Sets what the measurement finds."""

    def choose(library):
        monkeypatch.setattr(sys.modules[MODULE], "fastest_to_answer", lambda: library)

    return choose


@needs_onednn
@pytest.mark.parametrize("rows", [1, LEAST_ROWS - 1, LEAST_ROWS, 40])
def test_few_rows_are_torchs(monkeypatch, rows):
    torch.manual_seed(0)
    layer, used = nn.Linear(24, 40).eval(), []
    own = product._onednn
    monkeypatch.setattr(product, "_onednn", lambda *given: used.append(1) or own(*given))
    x = torch.randn(rows, 1, 24)
    with torch.no_grad():
        expected = layer(x)
        answer_with(nn.Sequential(layer), ONEDNN)
        found = layer(x)
    assert bool(used) == (rows >= LEAST_ROWS)
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-6)
    used.clear()
    layer(x)  # with gradients
    layer.train()(x)  # what it doesn't train with
    assert not used
    answer_with(nn.Sequential(layer), TORCH)
    assert type(layer) is nn.Linear


@needs_onednn
def test_the_logits_are_the_official_ones_up_to_rounding(golden, load_tiny, chosen, monkeypatch):
    model, said = load_tiny("embedding"), []
    chosen(ONEDNN)
    swap_to_answer(model, None, said.append)
    assert said == ["Answers: products by oneDNN (measured: faster; --kernels plain: by torch's default library)"]
    assert isinstance(model.model.layers[0].self_attn.q_proj, FrozenLinear)
    used, own = [], product._onednn
    monkeypatch.setattr(product, "_onednn", lambda *given: used.append(1) or own(*given))
    with torch.no_grad():
        found = model(golden["full.input_ids"]).logits
    assert len(used) == 6 * len(model.model.layers) + 1
    assert (found - load_tiny("embedding")(golden["full.input_ids"]).logits).abs().max() <= 1e-5


@needs_onednn
def test_a_run_that_trains_evaluates_with_what_it_has_measured(golden, load_tiny):
    model, plain = load_tiny("embedding"), load_tiny("embedding")
    swap(model, TORCH, ONEDNN)
    layer = model.model.layers[0].self_attn.q_proj
    assert (layer.trains, layer.answers) == (False, True)
    swap(plain, ONEDNN)
    layer = plain.model.layers[0].self_attn.q_proj
    assert (layer.trains, layer.answers) == (True, False)


@pytest.mark.parametrize(("asked", "library"), [("plain", ONEDNN), (None, TORCH), ("fast", TORCH)])
def test_else_nothing_changes(load_tiny, chosen, asked, library):
    model = load_tiny()
    chosen(library)
    swap_to_answer(model, asked, lambda line: pytest.fail(line))
    assert not any(isinstance(part, FrozenLinear) for part in model.modules())


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (
            lambda: load_base(REPO / "models" / "chatglm2-tiny", device="cpu", dtype="bfloat16"),
            "they are for a base in float32 on a CPU, and this one is in bfloat16 on cpu",
        ),
        (
            lambda: load_base(REPO / "models" / "chatglm2-tiny", device="cpu", precision=precision_of(8)),
            "this base is quantised, which --cpu_kernels is for",
        ),
    ],
)
def test_fast_is_refused_with_the_reason(change, why):
    model = change()
    with pytest.raises(ConfigError) as error:
        swap_to_answer(model, "fast", print)
    assert str(error.value) == f"--kernels fast: {why}; leave it out"
    swap_to_answer(model, None, lambda line: pytest.fail(line))


@needs_onednn
def test_the_engine_answers_the_same(load_tiny, chosen):
    answers = []
    for library in (TORCH, ONEDNN):
        model = load_tiny()
        answer_with(model, library)
        with Engine(model, []) as engine:
            requests = [GenerationRequest(row, [5 + row, 9, 11 + row], 8) for row in range(6)]
            answers.append(sorted((event.id, event.token) for event in engine.submit(requests)))
    assert answers[0] == answers[1]


def test_the_measurement_is_of_few_rows(monkeypatch):
    shapes = set()

    def linear(x, weight, bias=None):
        shapes.add(tuple(x.shape))
        return x

    monkeypatch.setattr(product, "_has_onednn", lambda: True)
    monkeypatch.setattr(product.nn.functional, "linear", linear)
    monkeypatch.setattr(product, "_onednn", linear)
    assert fastest_to_answer() in (TORCH, ONEDNN)
    assert shapes == {(16, 512)}
