"""A base's matrices in fewer bits: as the official `--quantization_bit` and the official int8 and int4 checkpoints have them, or
NF4 by bitsandbytes.

Importing it makes transformers read and write them. A precision is one class; `choice.py` decides which one it is, and no other
module asks.
"""

from ptuning.quantization.choice import asked_precision, chosen, precision_in
from ptuning.quantization.cpu_kernels import choose_kernels
from ptuning.quantization.linear import SCALE, QuantizedLinear
from ptuning.quantization.precision import (
    METHOD,
    Precision,
    QuantizationConfig,
    RowWise,
    precision_of,
    precisions,
)
from ptuning.quantization.quantizer import convert_rest, quantize_linears

__all__ = [
    "METHOD",
    "SCALE",
    "Precision",
    "QuantizationConfig",
    "QuantizedLinear",
    "RowWise",
    "asked_precision",
    "choose_kernels",
    "chosen",
    "convert_rest",
    "precision_in",
    "precision_of",
    "precisions",
    "quantize_linears",
]
