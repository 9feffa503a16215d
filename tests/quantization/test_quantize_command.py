"""`ptuning quantize`: the official tensors, one at a time."""

import gc
import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ptuning import cli
from ptuning.checkpoint.base import base_fingerprint
from ptuning.checkpoint.quantize import quantize_folder
from ptuning.checkpoint.tensors import TensorFiles
from ptuning.errors import ModelError
from ptuning.loading import load_base, load_model
from ptuning.quantization import precision_of, precisions
from tests.conftest import REPO

SMALL = REPO / "models" / "chatglm2-tiny"  # fp16 files
BITS = [precision.bits for precision in precisions()]


@pytest.fixture
def golden_base(golden_dir, tmp_path, tiny_tokenizer) -> Path:
    """The golden base with a tokenizer beside it."""
    folder = tmp_path / "base"
    shutil.copytree(golden_dir / "chatglm2-tiny", folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("bits", BITS)
def test_the_official_tensors(golden_base, golden_dir, golden, tmp_path, bits, capsys):
    argv = ["quantize", "--model", golden_base, "--bits", bits, "--output_dir", tmp_path / "out"]
    assert cli.main([str(token) for token in argv]) == 0
    assert f"Wrote {tmp_path / 'out'} in the official int{bits} format" in capsys.readouterr().out
    official = torch.load(golden_dir / f"chatglm2-tiny-int{bits}" / "pytorch_model.bin", weights_only=True)
    written = {
        name: tensor for file in (tmp_path / "out").glob("*.safetensors") for name, tensor in load_file(file).items()
    }
    assert written.keys() == official.keys()
    assert all(
        written[name].dtype == tensor.dtype and torch.equal(written[name], tensor) for name, tensor in official.items()
    )
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_bit"] == bits
    assert (tmp_path / "out" / "tokenizer.model").is_file()
    with torch.no_grad():
        logits = load_base(tmp_path / "out", device="cpu")(golden["full.input_ids"]).logits
    assert torch.equal(logits, golden[f"int{bits}.full.logits"])


@pytest.mark.parametrize("bits", BITS)
def test_it_is_what_quantizing_at_load_makes(tmp_path, bits):
    folder = quantize_folder(SMALL, precision_of(bits), tmp_path / "out", max_shard_bytes=200_000)
    assert len(list(folder.glob("*.safetensors"))) > 3 and base_fingerprint(folder) == base_fingerprint(SMALL)
    written, tokenizer = load_model(folder, device="cpu")
    made = load_base(SMALL, device="cpu", precision=precision_of(bits)).state_dict()
    found = written.state_dict()
    assert found.keys() == made.keys()
    assert all(found[name].dtype == made[name].dtype and torch.equal(found[name], made[name]) for name in made)
    assert len(tokenizer) <= written.config.vocab_size


def test_one_tensor_is_in_memory_at_a_time(tmp_path, monkeypatch, new_objects_only):
    seen: list[weakref.ref] = []
    read, quantize = TensorFiles.read, type(precision_of(4)).quantize

    def watched_read(self, name):
        gc.collect()
        alive = [tuple(tensor.shape) for ref in seen if (tensor := ref()) is not None and tensor.dim() > 1]
        assert not alive, alive
        tensor = read(self, name)
        seen.append(weakref.ref(tensor))
        return tensor

    def watched_quantize(self, weight):
        stored, scale = quantize(self, weight)
        seen.append(weakref.ref(stored))
        return stored, scale

    monkeypatch.setattr(TensorFiles, "read", watched_read)
    monkeypatch.setattr(type(precision_of(4)), "quantize", watched_quantize)
    quantize_folder(SMALL, precision_of(4), tmp_path / "out")
    assert len(seen) > 40


def test_refused_before_anything_is_written(golden_dir, golden_base, tmp_path, capsys):
    def refused(*argv) -> str:
        assert cli.main(["quantize", *map(str, argv), "--output_dir", str(tmp_path / "out")]) == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    assert "quantization_bit is 3; use 8 or 4" in refused("--model", golden_base, "--bits", 3)
    again = refused("--model", golden_dir / "chatglm2-tiny-int8", "--bits", 4)
    assert "rounding a second time loses more, and this base is quantised to int8; use the 16-bit base" in again
    assert "THUDM/chatglm2-6b: there is no folder" in refused("--model", "THUDM/chatglm2-6b", "--bits", 4)
    (golden_base / "tokenizer.model").unlink()
    assert "tokenizer.model is missing" in refused("--model", golden_base, "--bits", 4)


def test_a_folder_with_something_in_it_stays(golden_base, tmp_path, capsys):
    argv = ["--model", str(golden_base), "--bits", "8", "--output_dir", str(tmp_path)]
    assert cli.main(["quantize", *argv]) == 2
    assert "exists and isn't empty; give a new folder" in capsys.readouterr().err
    assert (golden_base / "config.json").is_file()


def test_half_a_model_is_not_left(golden_base, tmp_path):
    shard = next(golden_base.glob("pytorch_model-00002*.bin"))
    tensors = torch.load(shard, weights_only=True)
    name = next(name for name in tensors if name.endswith("dense_4h_to_h.weight"))
    tensors[name][0, 0] = torch.inf
    torch.save(tensors, shard)
    with pytest.raises(ModelError, match=f"{name} holds NaN or infinity 1 times"):
        quantize_folder(golden_base, precision_of(8), tmp_path / "out")
    assert not (tmp_path / "out").exists()
