"""Compiled layers: their graphs are made once, and what they compute is the same. No compiler runs here: a backend counts."""

import pytest
import torch

from ptuning.families.logits import loss_of
from ptuning.kernels import compile_layers
from ptuning.kernels.compiled import CompiledLayer
from tests.kernels.test_swap import close, step, training


@pytest.fixture
def graphs():
    """A backend that leaves graphs as they are, and the ones that it was given."""
    torch._dynamo.reset()
    seen = []

    def backend(graph, inputs):
        seen.append(graph)
        return graph.forward

    yield seen, backend
    torch._dynamo.reset()


def test_layers_and_lengths_share_their_graphs(golden, load_tiny, graphs):
    seen, backend = graphs
    model = training(load_tiny("embedding"))
    first, *others = model.model.layers
    assert len(others) > 1
    expected = step(model, golden)
    compile_layers(model, backend)
    close(step(model, golden), expected)
    made = len(seen)
    assert 0 < made <= 4  # what is before attention, its products, the output's, and the rest: once for all layers
    ids = golden["train.input_ids"][:1, :9].repeat(3, 1)
    loss_of(model, ids, ids).backward()
    with torch.no_grad():
        model.eval()(input_ids=ids)
    assert len(seen) == made
    assert all(isinstance(layer, CompiledLayer) for layer in (first, *others))
