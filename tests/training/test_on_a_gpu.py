"""A few steps on a GPU: what is there by default, and each feature that has never run on one here."""

import json

import pytest
import torch

from ptuning.main import main
from tests.conftest import REPO

MODEL = REPO / "models" / "chatglm2-tiny"

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Options of a run of four steps → the losses and the record."""
    folder = tmp_path_factory.mktemp("gpu")
    rows = folder / "train.json"
    texts = ["类型#裙*" + "长袖*" * n for n in range(1, 13)]
    rows.write_text("\n".join(json.dumps({"q": text, "a": text[::-1]}) for text in texts), encoding="utf-8")

    def of(name: str, *options: str) -> tuple[list[float], dict]:
        given = f"--model_name_or_path {MODEL} --train_file {rows} --output_dir {folder / name} --report_to none"
        given += (
            " --prompt_column q --response_column a --pre_seq_len 8 --prefix_dropout 0 --max_steps 4 --logging_steps 1"
        )
        given += " --per_device_train_batch_size 4 --lr_scheduler_type constant --overwrite_output_dir true"
        assert main(["--do_train", *given.split(), *options]) == 0
        log = map(json.loads, (folder / name / "log.jsonl").read_text(encoding="utf-8").splitlines())
        losses = [entry["loss"] for entry in log if "loss" in entry]
        return losses, json.loads((folder / name / "run.json").read_text(encoding="utf-8"))

    return of


@pytest.fixture(scope="module")
def plain(run):
    """In fp32 by transformers' own modules."""
    return run("plain", "--dtype", "float32", "--kernels", "plain")[0]


def test_by_default(run, plain):
    losses, record = run("default")
    assert not record["config"]["gradient_checkpointing"]  # there is memory enough
    assert record["kernels"]["kernels"] == "plain" and record["kernels"]["gpu_loss"] in ("liger", "chunks")
    assert losses == pytest.approx(plain, rel=0.05)  # in 16 bit


@pytest.mark.parametrize(
    "options",
    [
        [],  # the loss without logits
        ["--gradient_checkpointing", "true"],
        ["--torch_compile", "true"],
        ["--attn_implementation", "eager"],
    ],
)
def test_in_fp32_it_is_the_same(run, plain, options):
    assert run("other", "--dtype", "float32", *options)[0] == pytest.approx(plain, abs=1e-3)


def test_a_compiled_run_goes_on(run):
    options = ("--torch_compile", "true", "--dtype", "float32", "--save_steps", "2")
    whole, _ = run("compiled", *options)
    parts, _ = run("parts", *options, "--max_steps", "2")
    more, _ = run("parts", *options, "--overwrite_output_dir", "false", "--resume_from_checkpoint", "true")
    assert parts + more[-2:] == pytest.approx(whole, abs=1e-4)
