"""Complete model folders: shards written tensor by tensor, and unknown objects in DeepSpeed files."""

import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from ptuning.checkpoint.model_folder import file_layout, file_tensors
from ptuning.checkpoint.shards import INDEX, ShardWriter
from ptuning.checkpoint.zero_files import known_objects_only, merge_zero, zero_folder
from ptuning.errors import CheckpointError
from ptuning.families import family_of


def save(model, folder, limit, stop_after=None, tag="", dtype=None) -> ShardWriter:
    parameters = {name: p if dtype is None else p.to(dtype) for name, p in model.named_parameters()}
    shapes = {name: (parameter.shape, parameter.dtype) for name, parameter in parameters.items()}
    writer = ShardWriter(folder, file_layout(shapes, model.config), limit, tag)
    for number, (name, tensor) in enumerate(file_tensors(parameters, model.config)):
        if number == stop_after:
            return writer
        writer.write(name, tensor)
    writer.finish()
    return writer


@pytest.mark.parametrize("limit", [1, 50_000, 10**9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_is_read_back(tmp_path, load_tiny, golden_dir, limit, dtype):
    model = load_tiny()
    save(model, tmp_path, limit, dtype=dtype)
    (tmp_path / "config.json").write_text((golden_dir / "chatglm2-tiny" / "config.json").read_text())
    files = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(files) == {1: len(json.loads((tmp_path / INDEX).read_text())["weight_map"]), 10**9: 1}.get(
        limit, len(files)
    )
    for file in files:
        with safe_open(file, framework="pt") as opened:
            assert len(list(opened.keys())) == 1 or file.stat().st_size < limit + 4096
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    expected = model.to(dtype).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())


def test_names_are_those_of_the_official_checkpoint(load_tiny, golden_dir):
    model = load_tiny()
    index = json.loads((golden_dir / "chatglm2-tiny" / "pytorch_model.bin.index.json").read_text())
    shapes = {name: (parameter.shape, parameter.dtype) for name, parameter in model.named_parameters()}
    layout = file_layout(shapes, model.config)
    written = dict(file_tensors(dict(model.named_parameters()), model.config))
    assert list(layout) == list(written) and set(layout) == set(index["weight_map"])
    assert layout == {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in written.items()}
    first = torch.load(golden_dir / "chatglm2-tiny" / "pytorch_model-00001-of-00002.bin", weights_only=True)
    (frequencies,) = family_of(model.config).extra_tensors(model.config).values()
    assert torch.equal(frequencies, first["transformer.rotary_pos_emb.inv_freq"])


def test_a_kill_while_saving_leaves_the_old_model_whole(tmp_path, load_tiny, golden_dir):
    old = load_tiny()
    save(old, tmp_path, 50_000)
    (tmp_path / "config.json").write_text((golden_dir / "chatglm2-tiny" / "config.json").read_text())
    new = load_tiny()
    with torch.no_grad():
        new.lm_head.weight.add_(1)
    save(new, tmp_path, 50_000, stop_after=12, tag="new")
    read = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(read.lm_head.weight, old.lm_head.weight)
    save(new, tmp_path, 50_000, tag="newer")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path).lm_head.weight, new.lm_head.weight)
    assert all("newer" in path.name for path in tmp_path.glob("model-*"))  # the half save's files are gone too


def test_the_writer_refuses_another_order_and_an_incomplete_model(tmp_path):
    layout = {"a": ((2,), torch.float32), "b": ((3,), torch.float32)}
    writer = ShardWriter(tmp_path, layout, 100)
    with pytest.raises(ValueError, match="expected a"):
        writer.write("b", torch.zeros(3))
    writer = ShardWriter(tmp_path, layout, 100)
    writer.write("a", torch.zeros(2))
    with pytest.raises(ValueError, match="1 tensors were not written, the first is b"):
        writer.finish()


class Evil:
    def __reduce__(self):
        return (print, ("code was run",))


def test_deepspeed_files_with_other_objects_are_refused(tmp_path, capsys):
    folder = tmp_path / "checkpoint-1" / "global_step1"
    folder.mkdir(parents=True)
    (folder.parent / "latest").write_text("global_step1")
    torch.save({"optimizer_state_dict": Evil()}, folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    assert zero_folder(folder.parent) == folder
    with pytest.raises(CheckpointError, match="holds other objects than tensors"), known_objects_only():
        torch.load(folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt", weights_only=False)
    assert "code was run" not in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="not a DeepSpeed checkpoint"):
        merge_zero(tmp_path, tmp_path / "out")
    (folder.parent / "latest").write_text("../elsewhere")
    with pytest.raises(CheckpointError, match="not a DeepSpeed checkpoint"):
        zero_folder(folder.parent)
