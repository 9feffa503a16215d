"""Under ZeRO-3 no process ever holds the whole model, neither while loading nor while saving."""

import shutil

import pytest
import torch

from ptuning.families.chatglm2.config import ChatGLMConfig
from ptuning.families.chatglm2.model import ChatGLMForConditionalGeneration
from tests.end_to_end.conftest import MODEL, ROOT, full_flags

SHARD = 16 * 2**20  # what tests/end_to_end/inside.py passes
OVERHEAD = 32 * 2**20  # buffers of gloo and DeepSpeed, code imported on first use; measured: 17 MB on the small model


@pytest.fixture(scope="module")
def twelve_layers(tmp_path_factory):
    """A model of 12 layers and 44 million weights with the small model's tokenizer. Returns folder and bytes in fp32."""
    folder = tmp_path_factory.mktemp("model")
    config = ChatGLMConfig.from_pretrained(MODEL)
    config.num_hidden_layers, config.hidden_size, config.intermediate_size = 12, 512, 1536
    config.num_attention_heads = 8
    torch.manual_seed(0)
    model = ChatGLMForConditionalGeneration(config)
    model.save_pretrained(folder)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(MODEL / name, folder / name)
    return folder, sum(parameter.numel() * 4 for parameter in model.parameters())


@pytest.mark.slow
def test_memory_of_two_processes(tmp_path, run_main, two_processes, twelve_layers):
    folder, whole = twelve_layers
    flags = full_flags(
        tmp_path / "run",
        deepspeed=ROOT / "configs" / "zero3.json",
        model_name_or_path=folder,
        max_steps=1,
        per_device_train_batch_size=1,
        max_source_length=32,
        max_target_length=8,
        save_steps=1,
    )
    look = {"LOOK": "measure", "FOUND": str(tmp_path)}
    run_main(*flags, launcher=two_processes, script="tests/end_to_end/inside.py", **look)
    figures = []
    for rank in (0, 1):
        pairs = (pair.split("=") for pair in (tmp_path / f"memory-{rank}.txt").read_text().split())
        figures.append({name: int(value) for name, value in pairs})
    print({"whole": whole, "figures": figures})
    assert whole > 4 * OVERHEAD
    for figure in figures:
        assert figure["load_peak"] < whole / 2 + OVERHEAD  # its half; the tensor in hand is part of the overhead
        assert figure["save_peak"] < 2 * SHARD
    assert sum(figure["load_after"] for figure in figures) < whole + 2 * OVERHEAD
    assert len(list((tmp_path / "run").glob("model-*.safetensors"))) > 8
