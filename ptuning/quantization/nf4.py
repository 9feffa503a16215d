"""NF4 by bitsandbytes, as QLoRA has it: 4-bit normal floats with one scale for each 64 numbers. Quantised at load alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from ptuning.errors import ModelError
from ptuning.quantization.precision import Precision

NAME = "nf4"  # of --quantization
METHOD = "ptuning-nf4"  # quant_method inside transformers; under bitsandbytes' own Trainer asks for a peft adapter
_BLOCK, _OUTER = 64, 256  # numbers of a scale, and scales of a scale of scales: bitsandbytes' own


class Nf4(Precision):
    """One precision.

    Args:
        double: the scales are stored in 8 bit, with one fp32 scale for each 256 of them.
    """

    readable = True

    def __init__(self, double: bool = False):
        self.double = double
        self.name = f"{NAME}-double" if double else NAME
        self.option = f"--quantization {NAME}" + " --double_quantization" * double

    def config(self, dtype: torch.dtype) -> Nf4Config:
        return Nf4Config(self.double, dtype)

    def bytes_of(self, rows: int, columns: int, scale_bytes: int) -> int:
        numbers = rows * columns
        scales = -(-numbers // _BLOCK)
        return -(-numbers // 2) + (scales + 4 * -(-scales // _OUTER) if self.double else 4 * scales)


@register_quantization_config(METHOD)
class Nf4Config(BitsAndBytesConfig):
    """What `from_pretrained(quantization_config=…)` takes.

    Args:
        double: as of `Nf4`.
        dtype: that the model computes in.
    """

    def __init__(self, double: bool, dtype: torch.dtype, **_: Any):
        super().__init__(
            load_in_4bit=True,
            bnb_4bit_quant_type=NAME,
            bnb_4bit_use_double_quant=double,
            bnb_4bit_compute_dtype=dtype,
        )
        self.quant_method = METHOD


class _Quantize(ConversionOps):
    """transformers' own, which doesn't see NaN: bitsandbytes makes ordinary numbers of it."""

    def __init__(self, quantizer: Quantizer):
        self.quantizer, self.inner = quantizer, Bnb4BitHfQuantizer.get_quantize_ops(quantizer)

    def convert(self, input_dict: dict[str, Any], **given: Any) -> dict[str, torch.Tensor]:
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            if not all(torch.isfinite(limit) for limit in torch.aminmax(weight)):
                self.quantizer.broken.append(name)
        return self.inner.convert(input_dict, **given)


@register_quantizer(METHOD)
class Quantizer(Bnb4BitHfQuantizer):
    """transformers' own for bitsandbytes, under which a prefix trains too, and exactly."""

    is_qat_trainable = True  # else Trainer asks for a peft adapter

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.broken: list[str] = []

    def update_device_map(self, device_map: Any) -> Any:
        return device_map  # as it was given: the base's own loader decides

    def _process_model_before_weight_loading(self, model: PreTrainedModel, device_map: Any = None, **_: Any) -> None:
        super()._process_model_before_weight_loading(model, device_map)
        for layer in _layers(model):
            # On a CPU with AVX512-BF16 the first forward pass without gradients would pack the weights anew, for good, in a
            # form that computes in bf16 and has no gradients.
            layer.support_avx512bf16_for_cpu = False

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if self.broken:
            raise ModelError(
                f"{self.broken[0]} holds NaN or infinity, and {len(self.broken) - 1} more tensors do. The file is damaged, or the "
                "model broke before it was saved; copy or download it again."
            )
        for layer in _layers(model):
            # Unpacked to the dtype that is computed in, not first to the files'.
            layer.weight.quant_state.dtype = self.quantization_config.bnb_4bit_compute_dtype
        return super()._process_model_after_weight_loading(model, **kwargs)

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self)

    def is_serializable(self) -> bool:
        return False  # no family's files hold it


def _layers(model: nn.Module) -> list[Any]:
    from bitsandbytes.nn import Linear4bit  # here, because only this precision needs it

    return [module for module in model.modules() if isinstance(module, Linear4bit)]
