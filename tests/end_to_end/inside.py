"""Runs ptuning/main.py's main and looks inside: LOOK in the environment says at what, FOUND is a folder for what is found."""

import atexit
import ctypes
import os
import shutil
import sys
import time
import types
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

import ptuning.main as entry  # noqa: E402
from ptuning.checkpoint import model_folder  # noqa: E402
from ptuning.methods import full  # noqa: E402
from ptuning.training.trainer import TuningTrainer  # noqa: E402

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
RANK = int(os.environ.get("RANK", "0"))
IDS = torch.arange(3, 43).view(2, 20)


def memory(*names: str) -> dict[str, int]:
    """Lines of /proc/self/status in bytes, such as RssAnon (now) and VmHWM (peak since `reset_peak`)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    values = dict(line.split(":", 1) for line in lines)
    return {name: int(values[name].split()[0]) * 1024 for name in names}


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def logits(folder: Path) -> None:
    """What the model in training computes at the moment of the last save."""
    original = TuningTrainer.save_model

    def save_model(self, output_dir=None, _internal_call=False):
        original(self, output_dir, _internal_call)
        if output_dir is None:
            self.model.eval()
            with torch.no_grad():
                found = self.model_wrapped(input_ids=IDS).logits
            if RANK == 0:
                save_file({"logits": found.contiguous()}, folder / "logits.safetensors")

    TuningTrainer.save_model = save_model


def poison(folder: Path) -> None:
    """The loss of process 1 alone is NaN in step 2. The first that ends waits: torchrun stops the other one with it."""
    from transformers import Trainer

    def wait():
        (folder / f"ends-{RANK}").touch()
        while not (folder / f"ends-{1 - RANK}").exists():
            time.sleep(0.01)

    atexit.register(wait)

    original = Trainer.compute_loss

    def compute_loss(self, *args, **kwargs):
        loss = original(self, *args, **kwargs)
        return loss * float("nan") if RANK == 1 and self.state.global_step == 1 else loss

    Trainer.compute_loss = compute_loss


def full_disk(folder: Path) -> None:
    """The disk has filled up since the estimate: nothing is free when a checkpoint is due."""
    usage = shutil.disk_usage(folder)
    model_folder.shutil = types.SimpleNamespace(disk_usage=lambda path: usage._replace(free=1000))


def measure(folder: Path) -> None:
    """Anonymous memory before and after loading, its peak, and the peak while saving: one line a process."""
    # glibc keeps freed blocks of up to 32 MB, which here are all tensors; so it gives them back, as it does those of 6B.
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, 65536)
    libc.mallopt(M_TRIM_THRESHOLD, 0)
    load, save = entry.load_base, full.save_model_folder
    figures = {}

    def load_base(*args, **kwargs):
        before = memory("VmRSS")["VmRSS"]
        reset_peak()
        model = load(*args, **kwargs)
        figures["load_peak"] = memory("VmHWM")["VmHWM"] - before
        figures["load_after"] = memory("VmRSS")["VmRSS"] - before
        return model

    def save_model_folder(*args, **kwargs):
        before = memory("VmRSS")["VmRSS"]
        reset_peak()
        save(*args, **kwargs, max_shard_bytes=16 * 2**20)
        figures["save_peak"] = max(figures.get("save_peak", 0), memory("VmHWM")["VmHWM"] - before)
        (folder / f"memory-{RANK}.txt").write_text(" ".join(f"{k}={v}" for k, v in figures.items()))

    entry.load_base = load_base
    full.save_model_folder = save_model_folder


if __name__ == "__main__":
    globals()[os.environ["LOOK"]](Path(os.environ["FOUND"]))
    sys.exit(entry.main())
