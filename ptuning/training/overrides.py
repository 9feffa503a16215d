"""Which of transformers' own methods `trainer.py` and `run.py` rely on, and the state they were compared with.

The trainer overrides private methods, which may change in any release, so pyproject.toml allows the tested one alone.
tests/training/test_overrides.py names what has changed: compare it with trainer.py, then write down its new hash here.
"""

import hashlib
import inspect
from collections.abc import Callable

from transformers import Trainer
from transformers import trainer as module

TESTED = "5.23.0"

# Overridden in TuningTrainer → the first digits of its source's sha256.
OVERRIDDEN = {
    "_get_train_sampler": "1580d7493244",
    "get_train_dataloader": "205a99685f8f",
    "get_total_train_batch_size": "2832434815e1",
    "_get_num_items_in_batch": "a31fa106f70d",
    "_get_learning_rate": "158d12f9b950",
    "_clip_grad_norm": "ebfa9dc91d30",
    "_save_checkpoint": "a9111e30faa9",
    "_save_optimizer_and_scheduler": "c5ef974db69a",
    "_get_output_dir": "97172085342a",
    "_load_from_checkpoint": "a2804e8d93a2",
    "_load_best_model": "0e183d55a9db",
    "__init__": "1521f8623d38",
    "compute_loss": "160dea726d2f",
    "training_step": "e9760c8ee103",
    "log": "73b8e3acd21a",
    "evaluate": "47001f3acc99",
    "save_model": "705727ee10c8",
}

# They call those, and where they do decides what training, saving and resuming do.
CALLERS = {
    "train": "9a3c2bcd066d",
    "_prepare_for_training": "f55950593d7e",
    "get_batch_samples": "0b3727386f73",
    "_get_dataloader": "d1296dbd4dcb",
    "set_initial_training_values": "81697f5f3100",
    "prediction_step": "d12d7a1d2f99",
    "_run_epoch": "31aff00f34c3",
    "_finalize_training": "6d6d83d6a271",
    "_maybe_log_save_evaluate": "af101534f0f7",
    "_evaluate": "64dfb995ce20",
}

# Replaced while a run with --deepspeed trains.
REPLACED = {
    "deepspeed_load_checkpoint": "c726e2c57f17",
}


def changed() -> list[str]:
    """One sentence for each that is no longer what it was."""
    named: list[tuple[str, Callable | None, str]] = [
        *((f"Trainer.{name}", getattr(Trainer, name, None), digits) for name, digits in (OVERRIDDEN | CALLERS).items()),
        *((name, getattr(module, name, None), digits) for name, digits in REPLACED.items()),
    ]
    return [
        f"{name} {'is gone' if function is None else 'changed'}: compare ptuning/training/trainer.py with "
        f"transformers/trainer.py, then update its hash in ptuning/training/overrides.py"
        + ("" if function is None else f" to {digits_of(function)}")
        for name, function, digits in named
        if function is None or digits_of(function) != digits
    ]


def digits_of(function: Callable) -> str:
    """The first digits of its source's sha256."""
    return hashlib.sha256(inspect.getsource(function).encode()).hexdigest()[:12]
