"""A LoRA in peft's own folder: reading, what belongs to which layer, and saving with a manifest beside it."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedConfig

from ptuning.checkpoint.finite import refuse_diverged
from ptuning.checkpoint.manifest import Manifest, read_manifest
from ptuning.checkpoint.tensors import TensorFiles, read_object, require_whole
from ptuning.errors import CheckpointError
from ptuning.methods.lora.settings import LoraSettings
from ptuning.methods.lora.targets import shortened, sources
from ptuning.runs.files import TEMPORARY, publish, sha256_of, temporary_in
from ptuning.runs.folder import MANIFEST

LORA = "lora"  # of --method, and in manifests
CONFIG, WEIGHTS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")

PEFT = "base_model.model."  # in front of every name in a file of peft's
FACTOR_A, FACTOR_B, MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
_PARTS = (FACTOR_A, FACTOR_B, MAGNITUDE)
# Settings of peft with which an adapter is another function than the base with factors beside its layers → the usual value.
_USUAL: dict[str, tuple[Any, ...]] = {
    "bias": (None, "none"),
    "init_lora_weights": (None, True, False, "gaussian", "orthogonal"),  # the rest have changed the base
    **dict.fromkeys(
        (
            *("modules_to_save", "layer_replication", "trainable_token_indices", "target_parameters", "lora_bias"),
            *(
                "fan_in_fan_out",
                "megatron_config",
                "alora_invocation_tokens",
                "arrow_config",
                "use_qalora",
                "use_bdlora",
            ),
            *("velora_config", "monteclora_config", "mica", "kasa_config"),
        ),
        (None, False, [], {}),
    ),
}


@dataclass(frozen=True)
class LoraCheckpoint:
    """A LoRA that was read.

    Args:
        folder: where.
        config: adapter_config.json.
        tensors: by name in the file, without what peft puts in front.
        manifest: None in folders of other programs.
    """

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    manifest: Manifest | None = None

    @property
    def settings(self) -> LoraSettings:
        return LoraSettings.of_peft(self.config, self.folder)

    @property
    def layers(self) -> list[str]:
        """Names of the layers that it changes, as in the file."""
        return sorted({_layer(name) for name in self.tensors})


def is_lora(folder: Path) -> bool:
    """Whether a folder without manifest is a LoRA of another program."""
    path = folder / CONFIG
    return path.is_file() and read_object(path, CheckpointError, "copy the folder again").get("peft_type") == "LORA"


def read_lora(folder: str | Path) -> LoraCheckpoint:
    """Reads a LoRA of ours or of peft; no object other than a tensor is ever unpickled.

    Raises:
        CheckpointError: it is none, damaged, or of a kind that computes something else; the message says which.
    """
    folder = Path(folder).expanduser()
    manifest = read_manifest(folder) if folder.is_dir() else None
    if manifest is not None and manifest.method != LORA:
        raise CheckpointError(f"{folder / MANIFEST}: method is {manifest.method!r}, so it is not a LoRA.")
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder}: not a LoRA, {CONFIG} (peft's) is missing; copy the whole folder.")
    config = read_object(folder / CONFIG, CheckpointError, "copy the folder again")
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{folder / CONFIG}: peft_type is {config.get('peft_type')!r}, expected 'LORA'.")
    for name, usual in _USUAL.items():
        if (found := config.get(name)) not in usual:
            raise CheckpointError(
                f"{folder / CONFIG}: {name} is {found!r}, which isn't supported: only factors beside a base that stays as it is "
                "(LoRA, rsLoRA, DoRA). Merge the adapter into its base with peft and tune or serve the result."
            )
    file = next((folder / name for name in WEIGHTS if (folder / name).is_file()), folder / WEIGHTS[0])
    require_whole(file, CheckpointError)
    if manifest is not None:
        manifest.require_same(file)
    files = TensorFiles.of_file(file, CheckpointError)
    checkpoint = LoraCheckpoint(
        folder, config, {name.removeprefix(PEFT): files.read(name).float() for name in files.files}, manifest
    )
    _check(checkpoint, file)
    assert checkpoint.settings  # raises where they can't be read
    return checkpoint


def for_base(
    checkpoint: LoraCheckpoint, layers: dict[str, nn.Linear], config: PreTrainedConfig
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """peft's settings and tensors of the same LoRA under the names of the model's own layers.

    An adapter that was made on the family's own code has the names of its files, where several layers of the model are one:
    each gets the first factor as it is and its rows of the second, and computes what the one computed.

    Args:
        layers: of `linears`.
        config: of the base.

    Returns:
        Arguments for peft.LoraConfig, and tensors by name.

    Raises:
        CheckpointError: the adapter belongs to another base.
    """
    placed: dict[str, tuple[str, ...]]
    if all(name in layers for name in checkpoint.layers):
        placed = {name: (name,) for name in checkpoint.layers}
    else:
        placed = sources(layers, config)
        for name in ("rank_pattern", "alpha_pattern"):
            if checkpoint.config.get(name):
                raise CheckpointError(
                    f"{checkpoint.folder / CONFIG}: {name} with the layer names of the official code isn't supported."
                )
    unknown = [name for name in checkpoint.layers if name not in placed]
    if unknown:
        raise CheckpointError(
            f"{checkpoint.folder}: belongs to another base model, which has a layer {unknown[0]}; this one has none. Give the "
            "base it was trained on."
        )
    tensors = {}
    for name, tensor in checkpoint.tensors.items():
        parts = placed[_layer(name)]
        widths = [layers[part].out_features for part in parts]
        width, total = tensor.shape[0], sum(widths)
        if name.endswith(FACTOR_A):
            width, total = tensor.shape[1], layers[parts[0]].in_features
        if width != total:
            raise CheckpointError(
                f"{checkpoint.folder}: belongs to another base model: {name} has {width} numbers where this one needs {total}. "
                "Give the base it was trained on."
            )
        pieces = [tensor] * len(parts) if name.endswith(FACTOR_A) else tensor.split(widths)
        for part, piece in zip(parts, pieces, strict=True):
            tensors[part + name.removeprefix(_layer(name))] = piece
    arguments = checkpoint.settings.to_peft() | {
        "target_modules": shortened([part for name in checkpoint.layers for part in placed[name]], layers),
        "rank_pattern": checkpoint.config.get("rank_pattern") or {},
        "alpha_pattern": checkpoint.config.get("alpha_pattern") or {},
    }
    return arguments, tensors


def save_lora(folder: Path, config: Any, tensors: dict[str, torch.Tensor], manifest: Manifest) -> Path:
    """Saves peft's adapter_config.json and adapter_model.safetensors, and the manifest, which has the latter's sha256.

    All is written under other names first and then renamed, the manifest last: a folder in which a kill left files of two
    saves is refused when it is read.

    Args:
        config: peft.LoraConfig.
        tensors: by name in the model.

    Raises:
        CheckpointError: a tensor isn't finite, or the folder can't be written.
    """
    named = {PEFT + name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in tensors.items()}
    refuse_diverged(named, folder)
    values = {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}
    values |= {"inference_mode": True, "base_model_name_or_path": manifest.base.name_or_path}
    text = json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        written, described = temporary_in(folder), temporary_in(folder)
        save_file(named, written, metadata={"format": "pt"})
        described.write_text(text, encoding="utf-8")
        sha256 = sha256_of(written)
        publish(described, folder / CONFIG)
        publish(written, folder / WEIGHTS[0])
        replace(manifest, file=WEIGHTS[0], sha256=sha256).write(folder)
        for old in folder.glob(TEMPORARY):
            old.unlink(missing_ok=True)
    except OSError as cause:
        raise CheckpointError(
            f"{folder}: the LoRA can't be written ({cause}). Earlier checkpoints are intact."
        ) from cause
    return folder


def _layer(name: str) -> str:
    return next(name.removesuffix(part) for part in (*_PARTS, name) if name.endswith(part))


def _check(checkpoint: LoraCheckpoint, file: Path) -> None:
    others = [name for name in checkpoint.tensors if not name.endswith(_PARTS)]
    if others or not checkpoint.tensors:
        raise CheckpointError(
            f"{file}: found {others[0] if others else 'no tensor'}, expected factors named ….lora_A.weight."
        )
    for layer in checkpoint.layers:
        factors = [checkpoint.tensors[layer + part] for part in _PARTS[:2] if layer + part in checkpoint.tensors]
        if len(factors) < 2 or any(factor.ndim != 2 for factor in factors):
            raise CheckpointError(f"{file}: the factors of {layer} are incomplete; copy the folder again.")
        if factors[0].shape[0] != factors[1].shape[1]:
            raise CheckpointError(f"{file}: the factors of {layer} have different ranks; the file is damaged.")
    refuse_diverged(checkpoint.tensors, checkpoint.folder)
