"""A prefix trains on a quantised base as on any other: same gradients, exact resume, and its manifest says what it trained on."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from ptuning import load_model
from ptuning.checkpoint.manifest import read_manifest
from ptuning.families.logits import loss_of
from ptuning.loading import load_base
from ptuning.main import main
from ptuning.methods.prefix.attach import attach_prefix, prefix_of
from ptuning.methods.prefix.read import read_prefix
from ptuning.quantization import QuantizedLinear, precisions
from tests.conftest import REPO

BASE = REPO / "models" / "chatglm2-tiny"
BITS = [precision.bits for precision in precisions()]


def dequantized(model):
    """The same model with its matrices in full."""
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantizedLinear):
            full = torch.nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            full.weight.data = module.precision.dequantize(module.weight, module.weight_scale, torch.float32)
            full.bias = module.bias
            model.set_submodule(name, full)
    return model


def prefix_gradient(model, golden, checkpointing=False, autocast=False):
    torch.manual_seed(0)
    attach_prefix(model, 8).eval()  # dropout off
    model.train()
    prefix_of(model).eval()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss_of(model, golden["train.input_ids"], golden["train.labels"]).backward()
    return prefix_of(model).embedding.weight.grad


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_gradients_are_those_of_the_matrices_in_full(golden_dir, golden, bits, checkpointing):
    def load():
        return load_base(golden_dir / f"chatglm2-tiny-int{bits}", device="cpu")

    expected = prefix_gradient(dequantized(load()), golden)
    assert expected.abs().max() > 1e-4
    found = prefix_gradient(load(), golden, checkpointing)
    assert (found - expected).abs().max() <= 1e-7


@pytest.mark.parametrize("bits", BITS)
def test_gradients_under_autocast(golden_dir, golden, bits):
    def load():
        return load_base(golden_dir / f"chatglm2-tiny-int{bits}", device="cpu")

    exact = prefix_gradient(load(), golden)
    for found in (prefix_gradient(load(), golden, autocast=True), prefix_gradient(load(), golden, True, autocast=True)):
        assert found.dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(found.flatten(), exact.flatten(), dim=0) > 0.99


def train(folder: Path, bits: int, *more) -> int:
    options = ["--do_train", "--model_name_or_path", BASE, "--quantization_bit", bits, "--output_dir", folder]
    options += ["--train_file", REPO / "data" / "advertise" / "train.json", "--max_train_samples", 16]
    options += ["--prompt_column", "content", "--response_column", "summary", "--pre_seq_len", 8]
    options += ["--max_source_length", 32, "--max_target_length", 32, "--per_device_train_batch_size", 4]
    options += ["--max_steps", 4, "--save_steps", 2, "--logging_steps", 1, "--report_to", "none", "--use_cpu", "true"]
    return main([str(option) for option in [*options, *more]])


def losses(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture(scope="module", params=BITS)
def run(request, tmp_path_factory):
    """(bits, folder) of a finished run."""
    folder = tmp_path_factory.mktemp(f"int{request.param}") / "run"
    assert train(folder, request.param) == 0
    return request.param, folder


def test_the_manifest_says_the_precision(run):
    bits, folder = run
    assert read_manifest(folder).base.precision == f"int{bits}"
    assert read_manifest(folder / "checkpoint-2").base.precision == f"int{bits}"


def test_checkpointing_trains_the_same(run, tmp_path):
    bits, folder = run
    assert train(tmp_path / "run", bits, "--gradient_checkpointing", "true") == 0
    assert losses(tmp_path / "run") == losses(folder)
    found, expected = read_prefix(tmp_path / "run").tensors, read_prefix(folder).tensors
    assert all((found[name] - expected[name]).abs().max() <= 1e-6 for name in expected)


def test_resume_is_exact(run, tmp_path):
    bits, folder = run
    shutil.copytree(folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")  # as if killed before it
    assert train(tmp_path / "run", bits, "--resume_from_checkpoint", "true") == 0
    found, expected = read_prefix(tmp_path / "run").tensors, read_prefix(folder).tensors
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_it_resumes_on_no_other_precision(run, tmp_path, capsys):
    bits, folder = run
    shutil.copytree(folder, tmp_path / "run")
    other = next(each for each in BITS if each != bits)
    assert train(tmp_path / "run", other, "--resume_from_checkpoint", "true") == 2
    assert f"quantization_bit was {bits}, now {other}" in capsys.readouterr().err


def test_another_precision_is_noted_in_one_line(run, caplog):
    bits, folder = run
    load_model(BASE, folder, device="cpu", quantization_bit=bits)
    assert not caplog.records
    load_model(BASE, folder, device="cpu")
    (record,) = caplog.records
    assert (
        f"was trained on a base in int{bits}, and this one is in 16 bit; measured: 0.06 to 0.13" in record.getMessage()
    )
    assert "\n" not in record.getMessage()


def test_evaluation_loads_it(run, tmp_path, capsys):
    bits, folder = run
    options = ["--do_predict", "--model_name_or_path", BASE, "--ptuning_checkpoint", folder, "--max_predict_samples", 3]
    options += ["--test_file", REPO / "data" / "advertise" / "dev.json", "--prompt_column", "content"]
    options += ["--response_column", "summary", "--max_target_length", 8, "--report_to", "none", "--use_cpu", "true"]

    def evaluate(name, *more) -> str:
        assert main([str(option) for option in [*options, "--output_dir", tmp_path / name, *more]]) == 0
        return capsys.readouterr().out

    assert "was trained on a base in" not in evaluate("same", "--quantization_bit", bits, "--baseline")
    assert len((tmp_path / "same" / "predictions_base.jsonl").read_text().splitlines()) == 3
    assert evaluate("other").count("was trained on a base in") == 1
