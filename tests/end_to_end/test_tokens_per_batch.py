"""--tokens_per_batch on two processes under ZeRO-3: as many steps on both, and a resumed run is the same."""

import shutil

import pytest
import torch

from tests.end_to_end.conftest import ROOT, full_flags, losses
from tests.end_to_end.test_full import weights


@pytest.mark.slow
def test_two_processes_train_and_resume_exactly(tmp_path, run_main, two_processes):
    options = {"deepspeed": ROOT / "configs" / "zero3.json", "tokens_per_batch": 128, "max_train_samples": 9}
    options |= {
        "per_device_train_batch_size": None,
        "train_sampling_strategy": None,
        "max_steps": None,
        "save_steps": 3,
    }
    flags = full_flags(tmp_path / "run", num_train_epochs=2, gradient_accumulation_steps=2, **options)
    said = run_main(*flags, launcher=two_processes).stdout
    assert "(at most 128 tokens a batch, " in said and "× 2 accumulation steps × 2 processes" in said
    whole, tuned = losses(tmp_path / "run"), weights(tmp_path / "run")
    steps = len(whole)
    assert f"; {steps} steps = 2.00 epochs" in said and steps >= 4
    for path in (tmp_path / "run").glob("checkpoint-*"):
        if path.name != "checkpoint-3":
            shutil.rmtree(path)
    run_main(*flags, "--resume_from_checkpoint", "true", launcher=two_processes)
    assert losses(tmp_path / "run") == whole
    assert all(torch.equal(tensor, tuned[name]) for name, tensor in weights(tmp_path / "run").items())
