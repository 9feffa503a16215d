"""NF4 by bitsandbytes: what it stores, that evaluating spoils nothing, and what is refused."""

import sys

import bitsandbytes
import pytest
import torch
from peft.utils.integrations import dequantize_module_weight
from safetensors.torch import load_file, save_file

from ptuning.config import parse
from ptuning.errors import ConfigError, ModelError
from ptuning.families.logits import loss_of
from ptuning.loading import load_base
from ptuning.methods import method_of, self_test
from ptuning.methods.lora.attach import lora_parameters
from ptuning.methods.prefix.attach import attach_prefix, prefix_of
from ptuning.quantization import chosen, precision_in
from tests.conftest import REPO

BASE = REPO / "models" / "chatglm2-tiny"
IDS = torch.arange(3, 43).view(2, 20)


@pytest.fixture(params=[False, True], ids=["single", "double"])
def precision(request):
    return chosen(None, "nf4", request.param)


def linears(model) -> list:
    return [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]


def test_every_matrix_but_the_output_layer_is_packed(precision):
    model = load_base(BASE, device="cpu", dtype="bfloat16", precision=precision)
    assert len(linears(model)) == 6 * model.config.num_hidden_layers
    assert type(model.get_output_embeddings()) is torch.nn.Linear and precision_in(model.config).name == precision.name
    for linear in linears(model):
        state = linear.weight.quant_state
        assert (state.quant_type, state.blocksize, state.nested, state.dtype) == (
            "nf4",
            64,
            precision.double,
            torch.bfloat16,
        )
        stored = linear.weight.numel() + state.absmax.numel() * state.absmax.element_size()
        stored += 4 * state.state2.absmax.numel() if state.nested else 0
        assert stored == precision.bytes_of(linear.out_features, linear.in_features, 2)
    assert model(IDS).logits.dtype == torch.bfloat16


def test_16_bit_files_are_quantized_as_they_are(precision):
    """Whatever dtype the model computes in, the numbers are those of the files, and unpacked without a detour by fp16."""
    weight = dequantize_module_weight(load_base(BASE, device="cpu", precision=precision).model.layers[1].mlp.down_proj)
    exact = load_base(BASE, device="cpu", dtype="float32").model.layers[1].mlp.down_proj.weight
    expected, state = bitsandbytes.functional.quantize_4bit(
        exact.data, quant_type="nf4", compress_statistics=precision.double
    )
    assert torch.equal(weight, bitsandbytes.functional.dequantize_4bit(expected, state))
    assert 0.05 < (weight - exact).norm() / exact.norm() < 0.15


@pytest.mark.works("chatglm2", "NF4")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_arrive_after_an_evaluation(monkeypatch, checkpointing):
    """On a CPU with AVX512-BF16 bitsandbytes packs the weights anew in the first pass without gradients; here every CPU has it."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)

    def gradient(evaluates: bool) -> torch.Tensor:
        model = load_base(BASE, device="cpu", precision=chosen(None, "nf4", False))
        if evaluates:
            with torch.no_grad():
                model(IDS)
        torch.manual_seed(0)
        attach_prefix(model, 8)
        model.train()
        prefix_of(model).eval()  # dropout off
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        loss_of(model, IDS, IDS).backward()
        return prefix_of(model).embedding.weight.grad

    expected = gradient(evaluates=False)
    assert expected.abs().max() > 1e-4 and torch.equal(gradient(evaluates=True), expected)


def config_of(*flags):
    required = [
        "--do_train",
        "--model_name_or_path",
        BASE,
        "--train_file",
        "x",
        "--output_dir",
        "out",
        "--report_to",
        "none",
    ]
    columns = ["--prompt_column", "a", "--response_column", "b"]
    return parse([str(flag) for flag in [*required, *columns, *flags]])[0]


def test_dora_trains_on_it_and_is_served(precision):
    """peft sees the matrices in full."""
    config = config_of("--method", "lora", "--use_dora", "true", "--lora_dropout", 0, *precision.option.split())
    model, method = load_base(BASE, device="cpu", precision=precision), method_of(config.model, trains=True)
    assert method.refusal(precision) is None
    method.start(model)
    model.train()
    loss_of(model, IDS, IDS).backward()
    assert any(parameter.grad.abs().max() > 0 for parameter in lora_parameters(model).values())
    with torch.no_grad():
        for name, parameter in lora_parameters(model).items():
            parameter.mul_(1.2) if "magnitude" in name else parameter.normal_(std=0.02)
    model.eval()
    self_test(model)
    expected = model(IDS).logits
    served = method.served(model, "dora")
    method.detach(model)
    with served.on(model, [0, 1]):
        assert (model(IDS).logits - expected).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ("--quantization", "nf4", "--quantization_bit", 4),
            "--quantization nf4 and --quantization_bit 4 are two ways to store the same matrices; leave one out",
        ),
        (("--quantization", "int4"), "--quantization int4: use nf4, or --quantization_bit 8 or 4"),
        (
            ("--double_quantization", "true"),
            "--double_quantization is for --quantization nf4, whose scales it stores in 8 bit",
        ),
        (("--double_quantization", "true", "--quantization_bit", 4), "--double_quantization is for --quantization nf4"),
        (("--bnb_4bit_quant_type", "nf4"), "--quantization nf4"),
    ],
)
def test_refused_options(flags, said):
    with pytest.raises(ConfigError) as error:
        config_of(*flags)
    assert said in str(error.value)


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError) as error:
        chosen(None, "nf4", False)
    assert str(error.value) == (
        "--quantization nf4: bitsandbytes is not installed; pip install 'ptuning[bnb]', or give --quantization_bit 4"
    )


def test_a_base_in_whole_numbers_already(golden_dir):
    with pytest.raises(ModelError, match="is quantised to int8, and --quantization nf4 asks for nf4; leave it out"):
        load_base(golden_dir / "chatglm2-tiny-int8", device="cpu", precision=chosen(None, "nf4", False))


def test_nan_in_a_matrix_is_named(tmp_path):
    tensors = load_file(BASE / "model.safetensors")
    name = "transformer.encoder.layers.2.self_attention.dense.weight"
    tensors[name][3, 4] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((BASE / "config.json").read_text())
    with pytest.raises(ModelError, match=r"layers\.2\.self_attn\.o_proj\.weight holds NaN or infinity"):
        load_base(tmp_path, device="cpu", precision=chosen(None, "nf4", False))


def test_no_file_holds_it(tmp_path):
    model = load_base(BASE, device="cpu", precision=chosen(None, "nf4", False))
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path)
