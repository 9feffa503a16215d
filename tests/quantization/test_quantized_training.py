"""A prefix and a LoRA train on a quantised base as on any other: same gradients, exact resume, and the manifest says what on."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from ptuning import load_model
from ptuning.checkpoint.manifest import read_manifest
from ptuning.checkpoint.tensors import TensorFiles
from ptuning.errors import CheckpointError
from ptuning.families.logits import loss_of
from ptuning.loading import load_base
from ptuning.main import evaluate_command, main
from ptuning.methods.prefix.attach import attach_prefix, prefix_of
from ptuning.quantization import QuantizedLinear, chosen, precisions
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


METHODS = {
    "prefix": ["--method", "prefix", "--pre_seq_len", 8],
    "lora": ["--method", "lora", "--lora_rank", 4],
}
INT8, INT4, NF4, DOUBLE = (
    chosen(8, None, False),
    chosen(4, None, False),
    chosen(None, "nf4", False),
    chosen(None, "nf4", True),
)
TRAINED = [*(("prefix", each) for each in (INT8, INT4, NF4)), *(("lora", each) for each in (INT8, INT4, DOUBLE))]


def train(folder: Path, method: str, precision, *more) -> int:
    options = ["--do_train", "--model_name_or_path", BASE, *precision.option.split(), "--output_dir", folder]
    options += ["--train_file", REPO / "data" / "advertise" / "train.json", "--max_train_samples", 8, *METHODS[method]]
    options += ["--prompt_column", "content", "--response_column", "summary", "--learning_rate", "1e-2"]
    options += ["--max_source_length", 32, "--max_target_length", 32, "--per_device_train_batch_size", 4]
    options += ["--max_steps", 2, "--save_steps", 1, "--logging_steps", 1, "--report_to", "none", "--use_cpu", "true"]
    return main([str(option) for option in [*options, *more]])


def losses(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def tuned(folder: Path) -> dict[str, torch.Tensor]:
    files = TensorFiles.of_file(next(folder.glob("*.safetensors")), CheckpointError)
    return {name: files.read(name) for name in files.files}


@pytest.fixture(scope="module", params=TRAINED, ids=lambda trained: f"{trained[0]}-{trained[1].name}")
def run(request, tmp_path_factory):
    """(method, precision, folder) of a finished run."""
    method, precision = request.param
    folder = tmp_path_factory.mktemp("run") / "run"
    assert train(folder, method, precision) == 0
    return method, precision, folder


def test_the_manifest_says_the_precision(run):
    method, precision, folder = run
    for each in (folder, folder / "checkpoint-1"):
        manifest = read_manifest(each)
        assert (manifest.method, manifest.base.precision) == (method, precision.name)


def test_checkpointing_trains_the_same(run, tmp_path):
    method, precision, folder = run
    assert train(tmp_path / "run", method, precision, "--gradient_checkpointing", "true") == 0
    assert losses(tmp_path / "run") == losses(folder)
    found, expected = tuned(tmp_path / "run"), tuned(folder)
    assert all((found[name] - expected[name]).abs().max() <= 1e-6 for name in expected)


def test_resume_is_exact(run, tmp_path):
    method, precision, folder = run
    shutil.copytree(folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-2")  # as if killed before it
    assert train(tmp_path / "run", method, precision, "--resume_from_checkpoint", "true") == 0
    found, expected, before = tuned(tmp_path / "run"), tuned(folder), tuned(folder / "checkpoint-1")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert any(not torch.equal(before[name], expected[name]) for name in expected)


def test_it_resumes_on_no_other_precision(run, tmp_path, capsys):
    method, precision, folder = run
    shutil.copytree(folder, tmp_path / "run")
    other = NF4 if precision is not NF4 else INT4
    assert train(tmp_path / "run", method, other, "--resume_from_checkpoint", "true") == 2
    said = {NF4: "quantization was 'nf4', now None", DOUBLE: "double_quantization was True, now False"}
    assert said.get(precision, "quantization was None, now 'nf4'") in capsys.readouterr().err


def test_another_precision_is_noted_in_one_line(run, caplog):
    _, precision, folder = run
    load_model(BASE, folder, device="cpu", **asked(precision))
    assert not caplog.records
    load_model(BASE, folder, device="cpu")
    (record,) = caplog.records
    said = f"was trained on a base in {precision.name}, and this one is in 16 bit; measured: 0.06 to 0.13"
    assert said in record.getMessage() and "\n" not in record.getMessage()


def asked(precision) -> dict:
    """For `load_model`."""
    words = precision.option.removeprefix("--").split(maxsplit=1)
    return (
        {"quantization_bit": precision.bits}
        if precision.bits
        else {words[0]: "nf4", "double_quantization": precision is DOUBLE}
    )


def test_evaluating_a_run_takes_its_precision(run, tmp_path, capsys):
    _, _, folder = run
    options = ["--test_file", REPO / "data" / "advertise" / "dev.json", "--max_predict_samples", 2, "--baseline"]
    options += ["--max_target_length", 8, "--report_to", "none", "--output_dir", tmp_path / "out"]
    assert evaluate_command([str(option) for option in [folder, *options]]) == 0
    assert "was trained on a base in" not in capsys.readouterr().out
    scores = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert scores["base"]["answer_loss"] != scores["tuned"]["answer_loss"]
