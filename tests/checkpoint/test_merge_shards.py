"""`ptuning merge-shards`: official divided checkpoints merged, divided anew, quantised as the official code does, or refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ptuning.checkpoint import mp_ranks
from ptuning.checkpoint.merge_shards import divide_again, merge_shards
from ptuning.cli import main
from ptuning.quantization import QuantizedLinear, precision_of
from tests.tiny_glm130b import GOLDEN

CHECKPOINT, CONFIG = GOLDEN / "ckpt", GOLDEN / "config.json"
WORD = "transformer.word_embeddings.weight"
GIVEN = ["--checkpoint", str(CHECKPOINT), "--config", str(CONFIG)]


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("merged") / "base"
    merge_shards(CHECKPOINT, folder, CONFIG, max_shard_bytes=100_000)
    return folder


def tensors(folder) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def copied(tmp_path, change=None):
    """The golden checkpoint, the second file of it changed."""
    folder = tmp_path / "ckpt"
    shutil.copytree(CHECKPOINT, folder)
    if change is not None:
        file = folder / "49300" / "mp_rank_01_model_states.pt"
        state = torch.load(file, weights_only=True)
        change(state)
        torch.save(state, file)
    return folder


@pytest.mark.parametrize("count", [1, 4])
def test_divided_anew_it_is_the_same_model(merged, tmp_path, count, capsys):
    """1 and 4 parts of 2, in the official layout, and back."""
    assert main(["merge-shards", *GIVEN, "--output_dir", str(tmp_path / "again"), "--shards", str(count)]) == 0
    assert f"in the official format, {count} parts" in capsys.readouterr().out
    assert (tmp_path / "again" / "latest").read_text() == "49300"
    files = sorted((tmp_path / "again" / "49300").iterdir())
    parts = [torch.load(file, weights_only=True)["module"] for file in files]  # as the official code reads them
    whole, glu = tensors(merged), "transformer.layers.1.mlp.dense_h_to_4h.bias"
    rows = whole[glu].shape[0] // 2 // count
    assert len(parts) == count and parts[0].keys() == whole.keys() | {"mixins.rotary-embedding.rotary_emb.inv_freq"}
    assert torch.equal(parts[-1][glu], torch.cat([half[-rows:] for half in whole[glu].chunk(2)]))
    merge_shards(tmp_path / "again", tmp_path / "back", CONFIG)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in tensors(tmp_path / "back").items())


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_as_the_official_code_does(merged, tmp_path, bits, capsys):
    """THUDM/GLM-130B `quantization/layers.py`: the scale goes to fp16 before the division, also of fp32 weights."""
    folder = tmp_path / "quantised"
    assert main(["merge-shards", *GIVEN, "--output_dir", str(folder), "--quantization_bit", str(bits)]) == 0
    found, whole = tensors(folder), tensors(merged)
    scaled = [name for name in whole if whole[name].dim() == 2 and name != WORD]
    assert {name for name in found if name.endswith("_scale")} == {f"{name}_scale" for name in scaled}
    differs = 0
    for name in scaled:
        scale = (whole[name].abs().max(dim=-1).values / (2 ** (bits - 1) - 1)).half()
        numbers = torch.round(whole[name] / scale[:, None]).to(torch.int8)
        assert found[f"{name}_scale"].dtype == torch.float16 and torch.equal(found[f"{name}_scale"], scale)
        assert torch.equal(precision_of(bits).unpack(found[name]), numbers)
        differs += int((precision_of(bits).quantize(whole[name])[0] != found[name]).sum())
    assert differs  # an unrounded scale gives other numbers
    model = AutoModelForCausalLM.from_pretrained(folder)
    layer = model.transformer.layers[0].attention.dense
    assert isinstance(layer, QuantizedLinear) and model.dtype == torch.float32
    with torch.no_grad():
        exact = AutoModelForCausalLM.from_pretrained(merged)(torch.tensor([[5, 6, 315, 317]])).logits
        near = model(torch.tensor([[5, 6, 315, 317]])).logits
    assert 0 < (near - exact).norm() / exact.norm() < {8: 0.1, 4: 0.6}[bits]


def test_half_precision_stays(tmp_path):
    """16-bit parts give a 16-bit folder, which is loaded as such."""
    source = tmp_path / "half"
    divide_again(CHECKPOINT, source, 2, CONFIG)
    for file in (source / "49300").iterdir():
        state = torch.load(file, weights_only=True)
        torch.save({"module": {name: tensor.half() for name, tensor in state["module"].items()}}, file)
    merge_shards(source, tmp_path / "base", CONFIG)
    assert json.loads((tmp_path / "base" / "config.json").read_text())["torch_dtype"] == "float16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "base").dtype == torch.float16


def test_one_tensor_and_its_parts_are_in_memory(tmp_path, monkeypatch):
    """Parts are asked for tensor by tensor, in the order of writing, and mapped, not read."""
    asked, parts = [], mp_ranks.DividedCheckpoint.parts
    monkeypatch.setattr(mp_ranks.DividedCheckpoint, "parts", lambda self, name: asked.append(name) or parts(self, name))
    loaded, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: loaded.append(kwargs) or load(*args, **kwargs))
    merge_shards(CHECKPOINT, tmp_path / "base", CONFIG)
    names = list(json.loads((tmp_path / "base" / "model.safetensors.index.json").read_text())["weight_map"])
    assert asked[-len(names) :] == names and all(each["mmap"] and each["weights_only"] for each in loaded)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--shards", "0"], "--shards is 0; use 1 or more, or leave it out for a model folder"),
        (["--shards", "3"], "--shards 3: the model has 4 heads, which so many processes can't share"),
        (["--shards", "2", "--quantization_bit", "8"], "leave --shards or --quantization_bit out"),
        (["--quantization_bit", "3"], "quantization_bit is 3; use 8 or 4"),
        (["--config", "no.json"], "no.json: no such file; give --config a JSON file with the network's numbers"),
        (
            ["--checkpoint", str(GOLDEN)],
            "not an official divided checkpoint, latest is missing; give the folder in which",
        ),
    ],
)
def test_options_that_cannot_be(options, text, tmp_path, capsys):
    assert main(["merge-shards", *GIVEN, "--output_dir", str(tmp_path / "out"), *options]) == 2
    assert text in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_without_config_it_is_taken_for_the_130b_model(tmp_path, capsys):
    assert main(["merge-shards", "--checkpoint", str(CHECKPOINT), "--output_dir", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert (
        f"{WORD} is (320, 64) in 2 parts together, and (150528, 12288) by the numbers of glm130b (no --config is given)"
        in error
    )
    assert "Give --config the numbers of this checkpoint" in error


def _scale(state):
    state["module"]["transformer.layers.0.attention.dense.weight_scale"] = torch.ones(64)


def _nan(state):
    state["module"][WORD][0, 0] = float("nan")


def _shape(state):
    state["module"][WORD] = state["module"][WORD][:, :32].clone()


def merge(source, output) -> int:
    """The command's exit status."""
    return main(["merge-shards", "--checkpoint", str(source), "--config", str(CONFIG), "--output_dir", str(output)])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda state: state["module"].pop(WORD), f"has other tensors than mp_rank_00_model_states.pt: {WORD}"),
        (lambda state: state.pop("module"), "has no 'module', in which the weights lie"),
        (_nan, f"{WORD} holds NaN or infinity 1 times"),
        (_shape, f"{WORD} is (160, 64), (160, 32), which can't be put together; copy the checkpoint again"),
    ],
)
def test_damaged_parts(change, text, tmp_path, capsys):
    source = copied(tmp_path, change)
    assert merge(source, tmp_path / "out") == 2
    assert text in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_files_that_are_missing_cut_or_could_run_code(tmp_path, capsys):
    source = copied(tmp_path)
    first, second = sorted((source / "49300").iterdir())

    def said() -> str:
        assert main(["merge-shards", "--checkpoint", str(source), "--output_dir", str(tmp_path / "out")]) == 2
        return capsys.readouterr().err

    second.write_bytes(second.read_bytes()[:1000])
    assert f"{second}: damaged" in said()
    torch.save({"module": {}, "hook": print}, second)
    assert "holds other objects than tensors, which are not loaded because they could run code" in said()
    second.unlink()
    first.rename(second)
    assert "expected mp_rank_00_model_states.pt, mp_rank_01_model_states.pt, … without a gap" in said()
    (source / "latest").write_text("../49300")
    assert "says '../49300', expected the name of a folder beside it" in said()


def test_quantised_parts_are_refused(tmp_path, capsys):
    source = copied(tmp_path, _scale)
    first = source / "49300" / "mp_rank_00_model_states.pt"
    state = torch.load(first, weights_only=True)
    _scale(state)
    torch.save(state, first)
    assert merge(source, tmp_path / "out") == 2
    assert "the parts are quantised, each with its own scales" in capsys.readouterr().err


def test_a_folder_with_something_in_it_stays(tmp_path, capsys):
    (tmp_path / "mine").write_text("x")
    assert main(["merge-shards", *GIVEN, "--output_dir", str(tmp_path)]) == 2
    assert "exists and isn't empty; give a new folder" in capsys.readouterr().err
