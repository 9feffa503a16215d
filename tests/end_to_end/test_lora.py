"""`--method lora` as a user runs it: resume, best checkpoint, scores beside the base, two processes, DeepSpeed."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from ptuning.checkpoint.manifest import read_manifest
from ptuning.main import main
from ptuning.report import write_report
from tests.end_to_end.conftest import BIN, MODEL, ROOT, full_flags, losses

CONFIGS = ROOT / "configs"
DEV = ROOT / "data" / "advertise" / "dev.json"
LORA = {"method": "lora", "lora_dropout": 0, "learning_rate": 5e-3}


def tuned(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def run(*flags) -> int:
    return main([str(flag) for flag in flags])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was never interrupted, and its options."""
    folder = tmp_path_factory.mktemp("lora") / "run"
    flags = {"method": "lora", "learning_rate": 5e-3, "max_steps": 6, "train_sampling_strategy": "group_by_length"}
    flags |= {"validation_file": DEV, "max_eval_samples": 6, "max_predict_samples": 4, "do_predict": True}
    flags |= {"baseline": True, "probe": True, "metric_for_best_model": "eval_loss", "per_device_train_batch_size": 4}
    assert run(*full_flags(folder, **flags)) == 0
    return folder, flags


@pytest.mark.works("chatglm2", "LoRA")
def test_everything_of_a_run_is_there(whole, capsys):
    folder, _ = whole
    manifest = read_manifest(folder)
    assert (manifest.method, manifest.settings["lora_rank"], manifest.base.name_or_path) == ("lora", 8, str(MODEL))
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["base"]["answer_loss"] != metrics["tuned"]["answer_loss"] and metrics["probe"]
    page = write_report(folder).read_text(encoding="utf-8")
    assert "LoRA of rank 8 on all" in page
    first, *_, last = losses(folder).values()
    assert last < first


def test_resume_is_bit_identical(whole, tmp_path):
    folder, flags = whole
    flags = flags | {"do_predict": None, "baseline": None, "probe": None}
    half = tmp_path / "run"
    assert run(*full_flags(half, **flags)) == 0
    for late in ("checkpoint-6", "checkpoint-4"):
        shutil.rmtree(half / late)  # as if killed before them
    assert run(*full_flags(half, **flags), "--resume_from_checkpoint", "true") == 0
    again, once = tuned(half), tuned(folder)
    assert again.keys() == once.keys() and all(torch.equal(again[name], once[name]) for name in once)
    assert losses(half) == losses(folder)
    refused = [*full_flags(half, **flags | {"lora_rank": 4}), "--resume_from_checkpoint", str(half / "checkpoint-2")]
    assert run(*refused) == 2


def test_a_run_is_evaluated_and_gone_on_from(whole, tmp_path, capsys):
    folder, _ = whole
    where = ["--test_file", DEV, "--prompt_column", "content", "--response_column", "summary", "--report_to", "none"]
    evaluate = ["--do_predict", "--ptuning_checkpoint", folder, *where, "--max_predict_samples", 4, "--num_beams", 2]
    assert run(*evaluate, "--baseline", "--output_dir", tmp_path / "beams") == 0
    scores = json.loads((tmp_path / "beams" / "metrics.json").read_text())
    expected = json.loads((folder / "metrics.json").read_text())
    for group in ("base", "tuned"):
        assert scores[group]["answer_loss"] == pytest.approx(expected[group]["answer_loss"], rel=1e-5)
    more = full_flags(tmp_path / "more", ptuning_checkpoint=folder, method=None, max_steps=1, learning_rate=1e-4)
    assert run(*more) == 0  # by the method of the checkpoint
    assert "Starting a new run from the LoRA in" in capsys.readouterr().out
    assert read_manifest(tmp_path / "more").method == "lora"
    wrong = full_flags(tmp_path / "wrong", ptuning_checkpoint=folder, method="lora", lora_rank=4)
    assert run(*wrong) == 2
    assert "lora_rank is 8 in the checkpoint and 4 was asked for" in capsys.readouterr().err
    assert run(*full_flags(tmp_path / "wrong", ptuning_checkpoint=folder, method="prefix")) == 2
    assert "method is 'lora', so it is not a prefix" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "ways"),
    [({}, ["ddp", "zero3"]), ({"gradient_checkpointing": True}, ["zero2"]), ({"use_dora": True}, ["zero3"])],
)
def test_two_processes_and_deepspeed_equal_one_process(tmp_path, run_main, free_port, settings, ways):
    flags = LORA | settings | {"save_steps": 100}
    run_main(*full_flags(tmp_path / "one", per_device_train_batch_size=4, **flags))
    launcher = (BIN / "torchrun", "--nnodes=1", "--nproc-per-node=2", f"--master-port={free_port}")
    for name in ways:
        deepspeed = None if name == "ddp" else CONFIGS / f"{name}.json"
        run_main(*full_flags(tmp_path / name, deepspeed=deepspeed, **flags), launcher=launcher)
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
        found, expected = tuned(tmp_path / name), tuned(tmp_path / "one")
        assert found.keys() == expected.keys()
        # Adam divides by gradients near 0, so rounding shows in single weights.
        assert torch.cat([(found[key] - expected[key]).abs().flatten() for key in expected]).mean() < 1e-5


@pytest.mark.slow
def test_two_processes_resume_and_evaluate(tmp_path, run_main, two_processes):
    flags = LORA | {
        "lora_dropout": 0.1,
        "use_dora": True,
        "do_predict": True,
        "validation_file": DEV,
        "max_predict_samples": 3,
        "max_target_length": 16,
    }
    flags |= {"max_eval_samples": 3, "baseline": True, "deepspeed": CONFIGS / "zero3.json"}
    run_main(*full_flags(tmp_path / "whole", **flags), launcher=two_processes)
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "checkpoint-4")
    done = run_main(*full_flags(tmp_path / "half", **flags), "--resume_from_checkpoint", "true", launcher=two_processes)
    assert "ontinuing" in done.stdout
    again, once = tuned(tmp_path / "half"), tuned(tmp_path / "whole")
    assert all(torch.equal(again[name], once[name]) for name in once)
    evaluate = ["--do_predict", "--ptuning_checkpoint", tmp_path / "whole", "--baseline", "--max_predict_samples", 3]
    evaluate += [
        "--test_file",
        DEV,
        "--prompt_column",
        "content",
        "--response_column",
        "summary",
        "--report_to",
        "none",
    ]
    run_main(*evaluate, "--output_dir", tmp_path / "alone")
    alone, together = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("alone", "whole"))
    for group in ("base", "tuned"):
        assert together[group]["answer_loss"] == pytest.approx(alone[group]["answer_loss"], rel=1e-4)
