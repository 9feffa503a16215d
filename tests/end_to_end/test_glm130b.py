"""GLM-130B divided among two processes by transformers' tensor parallelism answers as one process does."""

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny_glm130b import GOLDEN, make_folder


@pytest.mark.slow
def test_two_processes_answer_as_one(tmp_path, run_main, two_processes):
    folder, result = make_folder(tmp_path / "base"), tmp_path / "result.safetensors"
    run_main(folder, result, launcher=two_processes, script="tests/end_to_end/answer_glm130b.py")
    found, expected = load_file(result), load_file(GOLDEN / "expected.safetensors")
    assert found["share"] == 0.5
    for kind in ("gmask", "mask"):
        assert (found[f"{kind}.logits"] - expected[f"{kind}.logits"]).abs().max() <= 2e-4  # sums in another order
        assert torch.equal(found[f"{kind}.greedy"], expected[f"{kind}.greedy"])
