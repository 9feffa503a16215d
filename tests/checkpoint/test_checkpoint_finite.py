"""A base with values that are no numbers is refused when it is loaded, with file, tensor and count."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from ptuning.checkpoint.finite import not_finite
from ptuning.errors import ModelError
from ptuning.loading import load_base
from tests.conftest import REPO

QKV = "transformer.encoder.layers.1.self_attention.query_key_value.weight"
NORM = "transformer.encoder.final_layernorm.weight"


@pytest.fixture
def broken(tmp_path, golden_dir):
    """{tensor: values put at its beginning} and the layout → a damaged base"""

    def make(changes, safetensors):
        folder = tmp_path / "base"
        shutil.copytree(REPO / "models" / "chatglm2-tiny" if safetensors else golden_dir / "chatglm2-tiny", folder)
        for file in [*folder.glob("*.safetensors"), *folder.glob("*.bin")]:
            tensors = load_file(file) if safetensors else torch.load(file, weights_only=True)
            for name in changes.keys() & tensors.keys():
                tensors[name] = tensors[name].float()
                tensors[name].view(-1)[: len(changes[name])] = torch.tensor(changes[name])
            save_file(tensors, file, {"format": "pt"}) if safetensors else torch.save(tensors, file)
        return folder

    return make


@pytest.mark.parametrize("safetensors", [True, False])
def test_file_tensor_and_count_are_named(broken, safetensors):
    folder = broken({QKV: [float("nan"), float("-inf"), 1.0], NORM: [float("inf")]}, safetensors)
    pattern = (
        rf"{folder}/\S+\.(safetensors|bin): {QKV} holds NaN or infinity 2 times, and 1 more tensors do\. The file is"
    )
    with pytest.raises(ModelError, match=pattern):
        load_base(folder)


def test_too_large_for_float16_is_no_damage(broken):
    folder = broken({NORM: [1e6]}, True)
    with pytest.raises(
        ModelError, match=rf"model\.safetensors: 1 values of {NORM} don't fit into float16; give --dtype bfloat"
    ):
        load_base(folder, dtype="float16")
    load_base(folder, dtype="bfloat16")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8])
def test_numbers_are_numbers(dtype):
    tensor = torch.arange(-60, 60).to(dtype)
    assert not_finite(tensor) == not_finite(tensor[:0]) == 0
    if dtype.is_floating_point:
        tensor[3], tensor[5] = float("nan"), float("inf")
        assert not_finite(tensor) == 2
