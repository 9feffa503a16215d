"""The fingerprint: equal for copies of the same weights, different for other weights."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file

from ptuning.checkpoint.base import base_fingerprint
from ptuning.errors import ModelError

EMBEDDING = "transformer.embedding.word_embeddings.weight"
OUTPUT = "transformer.output_layer.weight"
BIAS = "transformer.encoder.layers.2.self_attention.query_key_value.bias"


@pytest.fixture(scope="session")
def state(base_dir) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for shard in sorted(base_dir.glob("*.bin"))
        for name, tensor in torch.load(shard, weights_only=True).items()
    }


@pytest.fixture(scope="session")
def expected(base_dir) -> str:
    return base_fingerprint(base_dir)


def test_form_and_constancy(expected):
    assert re.fullmatch("[0-9a-f]{16}", expected)
    assert expected == "df0c8249201158ea", "a changed fingerprint makes every saved prefix refuse its base"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
def test_copies_agree(tmp_path, state, expected, dtype, file):
    copy = {name: tensor.to(dtype) for name, tensor in state.items()}
    (torch.save if file.endswith(".bin") else save_file)(copy, tmp_path / file)
    assert base_fingerprint(tmp_path) == expected


def test_what_save_pretrained_writes_agrees(tmp_path, load_tiny, expected):
    load_tiny(dtype=torch.bfloat16).save_pretrained(tmp_path, max_shard_size="100KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert base_fingerprint(tmp_path) == expected


@pytest.mark.parametrize("bits", [4, 8])
def test_official_quantised_checkpoints_agree(golden_dir, expected, bits):
    assert base_fingerprint(golden_dir / f"chatglm2-tiny-int{bits}") == expected


@pytest.mark.parametrize(("name", "change"), [(EMBEDDING, 0.001), (OUTPUT, 0.001), (BIAS, 0.2)])
def test_other_weights_differ(tmp_path, state, expected, name, change):
    torch.manual_seed(0)
    spread = change * state[name].std()  # the first two as after a very short training
    save_file(state | {name: state[name] + spread * torch.randn_like(state[name])}, tmp_path / "model.safetensors")
    assert base_fingerprint(tmp_path) != expected


def test_a_cut_vocabulary_differs(tmp_path, state, expected):
    save_file(state | {OUTPUT: state[OUTPUT][:-1].clone()}, tmp_path / "model.safetensors")
    assert base_fingerprint(tmp_path) != expected


def test_missing_shard_and_missing_weights(tmp_path):
    with pytest.raises(ModelError, match="no fingerprint can be computed"):
        base_fingerprint(tmp_path)
    index = {"weight_map": {EMBEDDING: "pytorch_model-00001-of-00002.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"pytorch_model-00001-of-00002\.bin is missing"):
        base_fingerprint(tmp_path)
    index = {"weight_map": {EMBEDDING: "../../etc/passwd"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="outside its own folder"):
        base_fingerprint(tmp_path)


def test_no_such_base(tmp_path):
    with pytest.raises(ModelError, match=r"no such folder \(looked for .*nowhere\)"):
        base_fingerprint(tmp_path / "nowhere")
