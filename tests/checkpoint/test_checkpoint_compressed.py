"""`ptuning export --format compressed-tensors`: the official whole numbers, as the package that vLLM reads them with has them."""

import json

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ptuning.checkpoint.compressed import save_compressed
from ptuning.cli import main
from ptuning.loading import load_base
from ptuning.quantization import QuantizedLinear, precision_of
from tests.conftest import REPO

SMALL = REPO / "models" / "chatglm2-tiny"  # fp16 files


def exported(folder, base, *more):
    options = ["--format", "compressed-tensors", "--model_name_or_path", base, *more, "--output_dir", folder]
    assert main(["export", *map(str, options)]) == 0
    return folder


@pytest.fixture(params=[8, 4])
def bits(request) -> int:
    return request.param


@pytest.mark.parametrize("where", ["official files", "at load"])
def test_transformers_computes_the_official_logits(golden_dir, golden, bits, where, tmp_path):
    base, more = golden_dir / f"chatglm2-tiny-int{bits}", ()
    if where == "at load":
        base, more = golden_dir / "chatglm2-tiny", ("--quantization_bit", bits)
    model = AutoModelForCausalLM.from_pretrained(exported(tmp_path / "out", base, *more)).eval()
    assert type(model).__name__ == "GlmForCausalLM"
    with torch.no_grad():
        logits = model(golden["full.input_ids"]).logits
    assert (logits - golden[f"int{bits}.full.logits"]).abs().max() == 0


def test_the_numbers_are_the_same(bits, tmp_path):
    folder = exported(tmp_path / "out", SMALL, "--quantization_bit", bits)
    tensors = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    model = load_base(SMALL, device="cpu", precision=precision_of(bits))
    layers = {name: part for name, part in model.named_modules() if isinstance(part, QuantizedLinear)}
    assert len(layers) == 6 * 4
    for name, layer in layers.items():
        packed, shape = tensors[f"{name}.weight_packed"], tensors[f"{name}.weight_shape"].tolist()
        assert torch.equal(unpack_from_int32(packed, bits, torch.Size(shape)), layer.precision.unpack(layer.weight))
        scale = tensors[f"{name}.weight_scale"]
        assert scale.dtype == torch.float16 and torch.equal(scale[:, 0], layer.weight_scale)
    values = json.loads((folder / "config.json").read_text())
    assert (values["model_type"], values["dtype"], values["quantization_config"]["ignore"]) == (
        "glm",
        "float16",
        ["lm_head"],
    )
    assert values["eos_token_id"] == 2 and not list(folder.glob("token*"))


def test_positions_of_a_long_base(bits, tmp_path, golden_dir):
    """rope_ratio becomes transformers' own words."""
    base = tmp_path / "base"
    base.mkdir()
    for file in (golden_dir / "chatglm2-tiny").iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    config = json.loads((base / "config.json").read_text()) | {"rope_ratio": 8}
    (base / "config.json").write_text(json.dumps(config))
    ours, ids = load_base(base, device="cpu", precision=precision_of(bits)), torch.arange(3, 43)[None]
    model = AutoModelForCausalLM.from_pretrained(
        save_compressed(ours, tmp_path / "out", max_shard_bytes=100_000)
    ).eval()
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    with torch.no_grad():
        assert torch.equal(model(ids).logits, ours(ids).logits)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--model_name_or_path", SMALL), "chatglm2-tiny is in 16 bit; give --quantization_bit 8 or 4"),
        (("--model_name_or_path", SMALL, "--quantization_bit", 3), "quantization_bit is 3; use 8 or 4"),
        (("--quantization_bit", 4), "--format compressed-tensors takes a model, --model_name_or_path alone"),
        (("--model_name_or_path", SMALL, "--ptuning_checkpoint", "x"), "a LoRA is merged first (--merge)"),
        (("--model_name_or_path", SMALL, "--dtype", "float16"), "in its files' own dtype"),
        (
            ("--format", "peft", "--ptuning_checkpoint", "x", "--quantization_bit", 4),
            "is for --format compressed-tensors; an",
        ),
    ],
)
def test_refused(flags, said, tmp_path, capsys):
    assert (
        main(["export", "--format", "compressed-tensors", *map(str, flags), "--output_dir", str(tmp_path / "out")]) == 2
    )
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
