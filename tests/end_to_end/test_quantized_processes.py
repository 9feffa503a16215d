"""Two processes on a quantised base, each with a copy of it."""

import pytest
import torch

from ptuning.main import main
from tests.end_to_end.conftest import ROOT, full_flags, losses
from tests.end_to_end.test_lora import tuned


@pytest.mark.slow
def test_ddp_and_zero2_equal_one_process(tmp_path, run_main, two_processes):
    flags = {
        "method": "lora",
        "lora_dropout": 0,
        "save_steps": 100,
        "learning_rate": 5e-3,
        "max_steps": 2,
        "quantization_bit": 4,
    }
    assert main([str(flag) for flag in full_flags(tmp_path / "one", per_device_train_batch_size=4, **flags)]) == 0
    for name in ("ddp", "zero2"):
        deepspeed = None if name == "ddp" else ROOT / "configs" / "zero2.json"
        run_main(*full_flags(tmp_path / name, deepspeed=deepspeed, **flags), launcher=two_processes)
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
        found, expected = tuned(tmp_path / name), tuned(tmp_path / "one")
        # Adam divides by gradients near 0, so rounding shows in single weights.
        assert torch.cat([(found[key] - expected[key]).abs().flatten() for key in expected]).mean() < 1e-5
