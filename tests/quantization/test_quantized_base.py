"""Official int8 and int4 folders, and quantising at load: logits, tensors and files are the official ones."""

import gc
import json
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from ptuning.checkpoint.model_folder import model_bytes, save_model_folder
from ptuning.checkpoint.tensors import TensorFiles
from ptuning.errors import ModelError
from ptuning.loading import load_base
from ptuning.quantization import QuantizationConfig, QuantizedLinear, precision_of, precisions
from ptuning.quantization.quantizer import _Quantize

BITS = [precision.bits for precision in precisions()]
INV_FREQ = "transformer.rotary_pos_emb.inv_freq"  # of no use, and transformers doesn't write it


@pytest.fixture(params=BITS)
def bits(request) -> int:
    return request.param


@pytest.fixture(params=["official files", "at load"])
def quantized(request, golden_dir, bits):
    """The golden model, quantised in its files or while it is read."""
    if request.param == "at load":
        return load_base(golden_dir / "chatglm2-tiny", device="cpu", precision=precision_of(bits))
    return load_base(golden_dir / f"chatglm2-tiny-int{bits}", device="cpu")


def official(golden_dir, bits) -> TensorFiles:
    return tensors_of(golden_dir / f"chatglm2-tiny-int{bits}")


def tensors_of(folder: Path) -> TensorFiles:
    found = TensorFiles.find(folder, ModelError)
    assert found is not None
    return found


def require_same(found: TensorFiles, expected: TensorFiles) -> None:
    assert found.files.keys() - {INV_FREQ} == expected.files.keys() - {INV_FREQ}
    for name in found.files.keys() & expected.files.keys():
        assert found.dtype(name) == expected.dtype(name) and torch.equal(found.read(name), expected.read(name)), name


@pytest.mark.works("chatglm2", "int8", "int4")
@torch.no_grad()
def test_logits(quantized, golden, bits):
    assert (quantized(golden["full.input_ids"]).logits - golden[f"int{bits}.full.logits"]).abs().max() == 0


def test_it_stays_packed_and_the_rest_in_its_dtype(quantized, bits):
    linears = [module for module in quantized.modules() if isinstance(module, QuantizedLinear)]
    assert len(linears) == 6 * 3
    for linear in linears:
        assert linear.weight.dtype == torch.int8 and linear.weight.shape[1] == linear.in_features * bits // 8
        assert not linear.weight.requires_grad and not linear.weight_scale.requires_grad
    assert type(quantized.get_output_embeddings()) is torch.nn.Linear
    assert {p.dtype for p in quantized.parameters()} == {torch.int8, torch.float32}


def test_transformers_saves_the_official_names_and_bytes(quantized, golden_dir, bits, tmp_path):
    quantized.save_pretrained(tmp_path)
    require_same(tensors_of(tmp_path), official(golden_dir, bits))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_bit"] == bits and "quantization_config" not in config


def test_the_model_folder_has_the_official_names_and_bytes(quantized, golden_dir, bits, tmp_path, tiny_tokenizer):
    save_model_folder(quantized, tiny_tokenizer, None, tmp_path, writes=True, device=torch.device("cpu"))
    require_same(tensors_of(tmp_path), official(golden_dir, bits))
    assert json.loads((tmp_path / "config.json").read_text())["quantization_bit"] == bits
    assert model_bytes(quantized) >= sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    again = load_base(tmp_path, device="cpu").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in quantized.state_dict().items())


def test_plain_transformers_reads_and_quantizes(golden_dir, golden, bits):
    wanted = golden[f"int{bits}.full.logits"]
    stored = AutoModelForCausalLM.from_pretrained(golden_dir / f"chatglm2-tiny-int{bits}")
    made = AutoModelForCausalLM.from_pretrained(
        golden_dir / "chatglm2-tiny", quantization_config=QuantizationConfig(bits)
    )
    with torch.no_grad():
        for model in (stored, made):
            assert torch.equal(model(golden["full.input_ids"]).logits, wanted)


@pytest.fixture
def half(golden_dir, tmp_path) -> Path:
    """The golden base in fp16 files."""
    base, folder = golden_dir / "chatglm2-tiny", tmp_path / "half"
    folder.mkdir()
    files = tensors_of(base)
    save_file({name: files.read(name).half() for name in files.files}, folder / "model.safetensors")
    config = json.loads((base / "config.json").read_text()) | {"torch_dtype": "float16"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_16_bit_files_are_quantized_as_they_are(half, bits, dtype):
    """Whatever dtype the model computes in: fp16 → bf16 → int8 is another model than fp16 → int8."""
    model = load_base(half, device="cpu", dtype=dtype, precision=precision_of(bits))
    weight = tensors_of(half).read("transformer.encoder.layers.1.mlp.dense_4h_to_h.weight")
    scale = weight.abs().amax(-1) / (2 ** (bits - 1) - 1)
    layer = model.model.layers[1].mlp.down_proj
    assert torch.equal(layer.weight_scale, scale) and layer.weight_scale.dtype == torch.float16
    assert torch.equal(layer.precision.unpack(layer.weight), torch.round(weight / scale[:, None]).to(torch.int8))
    computes_in = getattr(torch, dtype)
    assert model.dtype == computes_in and model.model.layers[0].self_attn.q_proj.bias.dtype == computes_in
    assert model(torch.arange(3, 9)[None]).logits.dtype == computes_in


def test_a_cast_of_the_model_leaves_the_scales(half, bits):
    model = load_base(half, device="cpu", precision=precision_of(bits))
    layer = model.model.layers[0].mlp.gate_up_proj
    before = layer.weight_scale.clone()
    model.to(torch.bfloat16)
    assert torch.equal(layer.weight_scale, before) and layer.weight_scale.dtype == before.dtype
    assert model.model.norm.weight.dtype == torch.bfloat16


def test_one_matrix_at_a_time_is_whole_in_memory(half, bits, monkeypatch, new_objects_only):
    """Quantising at load never holds the 16-bit model: each matrix is gone before the next is quantised."""
    seen: list[weakref.ref] = []
    convert = _Quantize.convert

    def watched(self, input_dict, **kwargs):
        gc.collect()
        # q, k and v are parts of one tensor in the file and come together
        mine = [each for value in input_dict.values() for each in (value if isinstance(value, list) else [value])]
        alive = [ref() for ref in seen if ref() is not None and not any(ref() is tensor for tensor in mine)]
        assert not alive, [tuple(tensor.shape) for tensor in alive]
        seen.extend(weakref.ref(tensor) for tensor in mine)
        return convert(self, input_dict, **kwargs)

    monkeypatch.setattr(_Quantize, "convert", watched)
    load_base(half, device="cpu", precision=precision_of(bits))
    assert len(seen) == 6 * 3


def test_nan_in_a_matrix_is_named(half, bits):
    files = tensors_of(half)
    tensors = {name: files.read(name) for name in files.files}
    tensors["transformer.encoder.layers.2.self_attention.dense.weight"][3, 4] = torch.nan
    save_file(tensors, half / "model.safetensors")
    with pytest.raises(ModelError, match=r"layers\.2\.self_attention\.dense\.weight.* NaN or infinity 1 times"):
        load_base(half, device="cpu", precision=precision_of(bits))
