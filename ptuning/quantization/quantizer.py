"""Quantised bases through transformers' own quantizer API: loaded as they are stored, or quantised tensor by tensor at load."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from ptuning.quantization.linear import SCALE, QuantizedLinear
from ptuning.quantization.precision import METHOD, QuantizationConfig, RowWise, precision_of


class _Quantize(ConversionOps):
    """Weights as they are read → stored numbers, and their scales beside them."""

    def __init__(self, precision: RowWise):
        self.precision = precision

    def convert(self, input_dict: dict[str, Any], **_: Any) -> dict[str, torch.Tensor]:
        found = {}
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            found[name], found[name + SCALE] = self.precision.quantize(weight)
        return found


@register_quantizer(METHOD)
class Quantizer(HfQuantizer):
    """Every linear layer but the output layer; what trains is put beside them, so transformers may train such a model."""

    quantization_config: QuantizationConfig
    is_trainable = True
    is_qat_trainable = True  # else Trainer asks for a peft adapter

    @property
    def precision(self) -> RowWise:
        return precision_of(self.quantization_config.bits)

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        quantize_linears(model, self.precision)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        for module in model.modules():
            if isinstance(module, QuantizedLinear):
                module.weight_scale.requires_grad_(False)  # transformers turns it on for all that isn't whole numbers
        return model

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **_: Any) -> bool:
        module, _dot, name = param_name.rpartition(".")
        quantized = name == "weight" and isinstance(model.get_submodule(module), QuantizedLinear)
        return quantized and not self.pre_quantized

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self.precision)

    def is_serializable(self) -> bool:
        return True


def quantize_linears(model: PreTrainedModel, precision: RowWise) -> None:
    """Replaces the linear layers of a model without weights (on the meta device).

    Raises:
        ConfigError: one of them can't be stored so.
    """
    kept = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and should_convert_module(name, kept):
            model.set_submodule(name, QuantizedLinear(module, precision))


def convert_rest(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Casts all that isn't quantised, one tensor at a time; scales stay as they are."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not name.endswith(f".weight{SCALE}"):
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
