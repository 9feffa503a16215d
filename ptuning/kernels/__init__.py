"""How a frozen base is computed while something beside it is trained on a CPU: the same function, faster and keeping less.

Each replacement is a named autograd function with its formulas, held to plain torch by tests/kernels. They work in training mode
alone: in evaluation mode every module computes as transformers wrote it, so that what a run's answers and losses are measured
with is what serves later. Only the library that multiplies may be another one there too, in evaluation and in serving alike.

And how a packed base, which only answers, computes what lies between its products (step.py, operations.py).
"""

from ptuning.kernels.loss import CHUNKS, LIGER, gpu_loss, momentary_bytes
from ptuning.kernels.narrow import BF16, narrow_refusal, packed_bytes
from ptuning.kernels.product import ONEDNN, TORCH, fastest_product, fastest_to_answer, products
from ptuning.kernels.sequence import divide_positions
from ptuning.kernels.step import StepProgram, step_program
from ptuning.kernels.swap import FAST, PLAIN, answer_with, compile_layers, give_loss, swap, swap_to_answer

__all__ = [
    "BF16",
    "CHUNKS",
    "FAST",
    "LIGER",
    "ONEDNN",
    "PLAIN",
    "TORCH",
    "StepProgram",
    "answer_with",
    "compile_layers",
    "divide_positions",
    "fastest_product",
    "fastest_to_answer",
    "give_loss",
    "gpu_loss",
    "momentary_bytes",
    "narrow_refusal",
    "packed_bytes",
    "products",
    "step_program",
    "swap",
    "swap_to_answer",
]
