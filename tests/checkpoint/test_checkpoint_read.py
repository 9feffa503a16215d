"""Reading folders of other programs, and saying what a folder is that has no prefix."""

import json
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

from ptuning.errors import CheckpointError
from ptuning.families.chatglm2.config import ChatGLMConfig
from ptuning.methods.prefix.checkpoint import for_base
from ptuning.methods.prefix.read import read_prefix

NAME = "transformer.prefix_encoder.embedding.weight"


def test_official_folder(official, variant, golden_dir):
    saved = torch.load(golden_dir / f"prefix-{variant}" / "pytorch_model.bin", weights_only=True)
    assert official.kind == "official"
    assert official.manifest is None
    assert official.pre_seq_len == 8
    assert official.prefix_projection == (variant == "projection")
    assert len(official.tensors) == len(saved)
    assert all(torch.equal(tensor, official.tensors[name.split("encoder.")[1]]) for name, tensor in saved.items())


def test_official_prefix_among_other_tensors_in_16_bit_safetensors(tmp_path):
    prefix = torch.randn(5, 192).half()
    save_file(
        {NAME: prefix, "transformer.encoder.layers.0.input_layernorm.weight": torch.ones(4)},
        tmp_path / "model.safetensors",
    )
    checkpoint = read_prefix(tmp_path)
    assert checkpoint.pre_seq_len == 5
    assert torch.equal(checkpoint.tensors["embedding.weight"], prefix.float())


def test_official_prefix_in_a_sharded_checkpoint(tmp_path):
    torch.save({"transformer.output_layer.weight": torch.ones(2, 2)}, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save({NAME: torch.ones(4, 192)}, tmp_path / "pytorch_model-00002-of-00002.bin")
    weight_map = {
        "transformer.output_layer.weight": "pytorch_model-00001-of-00002.bin",
        NAME: "pytorch_model-00002-of-00002.bin",
    }
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert read_prefix(tmp_path).pre_seq_len == 4


def test_official_file_from_before_torch_1_6(tmp_path):
    torch.save({NAME: torch.ones(4, 192)}, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert read_prefix(tmp_path).pre_seq_len == 4


class Attack:
    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_nothing_but_tensors_is_unpickled(tmp_path):
    attack = Attack()
    attack.target = str(tmp_path / "was-run")
    torch.save({NAME: torch.ones(4, 192), "x": attack}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="other objects than tensors, which are not loaded"):
        read_prefix(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(attack))
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: damaged"):
        read_prefix(tmp_path)
    assert not (tmp_path / "was-run").exists()


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("keep", [0, 1, 200, 700])
def test_truncated_files(tmp_path, file, keep):
    tensors = {NAME: torch.ones(4, 192)}
    (torch.save if file.endswith(".bin") else save_file)(tensors, tmp_path / file)
    (tmp_path / file).write_bytes((tmp_path / file).read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"damaged|is empty"):
        read_prefix(tmp_path)


def test_git_lfs_pointer(tmp_path):
    (tmp_path / "pytorch_model.bin").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n")
    with pytest.raises(CheckpointError, match=r"git-lfs pointer of .* bytes, not the file itself"):
        read_prefix(tmp_path)


def test_diverged_prefix(tmp_path):
    torch.save({NAME: torch.full((4, 192), float("inf"))}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="768 of 768 numbers that are NaN or infinite: the run had diverged"):
        read_prefix(tmp_path)


def test_incomplete_projection(tmp_path, golden_dir):
    saved = torch.load(golden_dir / "prefix-projection" / "pytorch_model.bin", weights_only=True)
    del saved["transformer.prefix_encoder.trans.2.bias"]
    torch.save(saved, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"missing: trans\.2\.bias; unknown: none"):
        read_prefix(tmp_path)


def test_run_folder_names_its_newest_checkpoint(tmp_path):
    for step in (20, 100, 3):
        (tmp_path / f"checkpoint-{step}").mkdir()
    with pytest.raises(
        CheckpointError, match=r"folder of a run, .* newest checkpoint is .*checkpoint-100: give that one"
    ):
        read_prefix(tmp_path)


def test_base_model(base_dir):
    with pytest.raises(CheckpointError, match="looks like a base model or a checkpoint with all weights tuned"):
        read_prefix(base_dir)


def test_lora_adapter(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(
        CheckpointError, match=r"peft adapter of type 'LORA', which is not a prefix. Expected a folder with"
    ):
        read_prefix(tmp_path)


def test_other_weights(tmp_path):
    save_file({"classifier.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"none of a prefix \(found classifier\.weight\)"):
        read_prefix(tmp_path)


def test_empty_missing_and_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"is an empty folder. Expected a folder with"):
        read_prefix(tmp_path)
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        read_prefix(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(CheckpointError, match=r"has no weights \(found notes\.txt\)"):
        read_prefix(tmp_path)
    with pytest.raises(CheckpointError, match="is a file; give the folder it lies in"):
        read_prefix(tmp_path / "notes.txt")


def test_prefix_of_another_shape_is_refused(official):
    deeper = ChatGLMConfig(num_layers=4, multi_query_group_num=2, kv_channels=16, hidden_size=64, num_attention_heads=4)
    with pytest.raises(
        CheckpointError, match=r"num_layers 3 in the checkpoint, 4 in the base; 192 numbers .*, 256 in the base"
    ):
        for_base(official, deeper)
    # The same width, cut up differently: only the folder's config.json can tell.
    other = ChatGLMConfig(num_layers=3, multi_query_group_num=4, kv_channels=8, hidden_size=64, num_attention_heads=8)
    with pytest.raises(
        CheckpointError, match=r"num_key_value_heads 2 in the checkpoint, 4 in the base; head_dim 16 .*, 8 in"
    ):
        for_base(official, other)


def test_projection_of_another_width_is_refused(golden_dir, tmp_path):
    saved = torch.load(golden_dir / "prefix-projection" / "pytorch_model.bin", weights_only=True)
    torch.save(saved, tmp_path / "pytorch_model.bin")
    wider = ChatGLMConfig(num_layers=3, multi_query_group_num=2, kv_channels=16, hidden_size=128, num_attention_heads=8)
    with pytest.raises(CheckpointError, match="projection of width 64 in the checkpoint, hidden size 128 in the base"):
        for_base(read_prefix(tmp_path), wider)
