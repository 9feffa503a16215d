"""Forward calls without gradients, and what to do where there is too little memory for one; shared by engine and beam search."""

from contextlib import AbstractContextManager

import torch
from transformers.integrations import is_deepspeed_zero3_enabled


def inference() -> AbstractContextManager:
    """Inside, no gradients are kept. ZeRO-3 keeps gathered weights for training, where inference tensors can't be used."""
    return torch.no_grad() if is_deepspeed_zero3_enabled() else torch.inference_mode()


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error of a forward call says that memory ran out, on an accelerator or on the CPU."""
    text = str(error)
    return (
        isinstance(error, (MemoryError, torch.OutOfMemoryError))
        or "can't allocate memory" in text
        or "out of memory" in text
    )


def ran_out(rows: int, batch_tokens: int) -> str:
    """The sentence for the user: with how many rows it happened, and the new bound."""
    return f"memory ran out with {rows} rows; the batch is now at most {batch_tokens} tokens, and goes on"
