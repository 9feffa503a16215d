"""A base's matrices in fewer bits, as the official `--quantization_bit` and the official int8 and int4 checkpoints have them.

Importing it makes transformers read and write them. A precision is one class in `precision.py`; no other module asks which
one it is.
"""

from ptuning.quantization.cpu_kernels import choose_kernels, is_packed
from ptuning.quantization.linear import SCALE, QuantizedLinear
from ptuning.quantization.precision import Precision, precision_of, precisions
from ptuning.quantization.quantizer import METHOD, QuantizationConfig, convert_rest, precision_in, quantize_linears

__all__ = [
    "METHOD",
    "SCALE",
    "Precision",
    "QuantizationConfig",
    "QuantizedLinear",
    "choose_kernels",
    "convert_rest",
    "is_packed",
    "precision_in",
    "precision_of",
    "precisions",
    "quantize_linears",
]
