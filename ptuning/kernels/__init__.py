"""How a frozen base is computed while something beside it is trained on a CPU: the same function, faster and keeping less.

Each replacement is a named autograd function with its formulas, held to plain torch by tests/kernels. They work in training mode
alone: in evaluation mode every module computes as transformers wrote it, so that what a run's answers and losses are measured
with is what serves later.
"""

from ptuning.kernels.product import ONEDNN, TORCH, fastest_product, products
from ptuning.kernels.swap import swap

__all__ = ["ONEDNN", "TORCH", "fastest_product", "products", "swap"]
