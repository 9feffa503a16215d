"""All weights: the tuned model is a complete folder in the family's own format."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ptuning.checkpoint.manifest import Manifest
from ptuning.checkpoint.model_folder import model_bytes, save_model_folder
from ptuning.errors import ConfigError
from ptuning.families import Dimensions
from ptuning.messages import message
from ptuning.methods.method import MemoryTerms, Method, SaveTarget
from ptuning.methods.registry import add_method
from ptuning.quantization import Precision


@add_method
class FullMethod(Method):
    """Trains every parameter of the base, so that afterwards the untuned one is gone."""

    name = "full"
    noun = "model"
    learning_rate = 1e-4
    keeps_base = False

    @classmethod
    def from_options(cls, options: Any) -> "FullMethod":
        if options.ptuning_checkpoint is not None:
            raise ConfigError(
                f"--ptuning_checkpoint with --method {cls.name}: what is tuned is the model itself; give it as "
                "--model_name_or_path alone"
            )
        return cls()

    def describe(self) -> str:
        return message("all weights")

    def settings(self) -> dict[str, Any]:
        return {}

    def refusal(self, precision: Precision) -> str:
        return (
            f"all weights can't be tuned on a base quantised to {precision.name}: rounded weights can't take small updates. Tune a "
            f"prefix or a LoRA (--method prefix, --method lora), or use the 16-bit base as it is"
        )

    def start(self, model: PreTrainedModel) -> None:
        model.requires_grad_(True)

    def memory(self, base: Dimensions) -> MemoryTerms:
        return MemoryTerms(base.parameters, frozen_base=False)

    def save(self, model: PreTrainedModel, tokenizer, manifest: Manifest | None, target: SaveTarget) -> None:
        about = None if manifest is None else replace(manifest, step=target.step)
        save_model_folder(model, tokenizer, about, target.folder, writes=target.writes, device=target.device)

    def restore(self, model: PreTrainedModel, folder: Path) -> None:
        saved = type(model).from_pretrained(folder, dtype=model.dtype)
        model.load_state_dict(saved.state_dict())

    def saved_bytes(self, model: PreTrainedModel) -> int:
        return model_bytes(model)
