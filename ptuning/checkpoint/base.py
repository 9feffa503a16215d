"""A base model's folder: found, refused before anything is loaded where it can't be a base, and told apart from others."""

import contextlib
import hashlib
from pathlib import Path
from typing import Any

import torch

from ptuning.checkpoint.downloads import MODELSCOPE, hub_folder, is_hub_id, modelscope_folder
from ptuning.checkpoint.tensors import LAYOUTS, TensorFiles, read_object, require_whole
from ptuning.errors import ConfigError, ModelError
from ptuning.families import Family, families, family_of
from ptuning.quantization import SCALE, Precision, precision_of
from ptuning.runs.folder import MANIFEST

ROWS = 256  # of each large matrix that the fingerprint reads, spread evenly
DIGITS = 16


def whole_folder(model_name_or_path: str | Path) -> Path:
    """The folder with all files of a base: the path itself, or the copy of a hub id or of ModelScope's, which is downloaded first.

    Raises:
        ModelError: no such folder, or the download can't be had.
    """
    return _folder(model_name_or_path, weights=True)


def resolve_base(model_name_or_path: str | Path) -> Path:
    """The same folder, in which the weights of a hub id may be missing: nobody waits for 12 GB to be told what is in config.json.
    Errors as `whole_folder`."""
    return _folder(model_name_or_path, weights=False)


def _folder(model_name_or_path: str | Path, weights: bool) -> Path:
    name, folder = str(model_name_or_path), Path(model_name_or_path).expanduser()
    if name.startswith(MODELSCOPE):
        return modelscope_folder(name)
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise ModelError(f"{name}: is a file; give the folder it lies in.")
    if not is_hub_id(name):
        raise ModelError(f"{name}: no such folder (looked for {folder.absolute()}). Give the folder of a model.")
    return hub_folder(name, weights)


def read_base_config(folder: Path) -> dict[str, Any]:
    """config.json as it is written, checked as far as the small files can tell; only its `model_type` is the family's own, so
    that `family_of` needs no folder.

    Raises:
        ModelError: no config.json, not JSON, another architecture, or a precision that there isn't.
    """
    values, path = _read_config(folder), folder / "config.json"
    try:
        family = family_of(values, folder)
    except ModelError as cause:
        raise ModelError(f"{path}: {cause}") from None
    family.check(values, folder)
    if bits := family.quantized_bits(values):
        try:
            precision_of(bits)
        except ConfigError as cause:
            raise ModelError(f"{path}: {cause}") from None
    return values | {"model_type": family.model_type}


def base_precision(model_name_or_path: str | Path, asked: Precision | None = None) -> Precision | None:
    """How the matrices of a base are stored in memory: as its files are, else as asked for. None: not quantised.

    Args:
        asked: what is asked for.

    Raises:
        ModelError: the files are quantised otherwise, or the base can't be used.
    """
    folder = resolve_base(model_name_or_path)
    values = read_base_config(folder)
    bits = family_of(values).quantized_bits(values)
    stored = precision_of(bits) if bits else None
    if stored is not None and asked is not None and asked.name != stored.name:
        raise ModelError(
            f"{folder}: is quantised to {stored.name}, and {asked.option} asks for {asked.name}; leave it out, or give the 16-bit "
            "base"
        )
    return stored or asked


def require_16_bit(model_name_or_path: str | Path, purpose: str, asked: Precision | None = None) -> None:
    """Refuses a quantised base.

    Args:
        purpose: what it can't be used for, as a sentence: "ZeRO stage 3 can't divide quantised weights".
        asked: as of `base_precision`.

    Raises:
        ModelError: the base is quantised, in its files or as asked for.
    """
    precision = base_precision(model_name_or_path, asked)
    if precision is not None:
        example = family_of(read_base_config(resolve_base(model_name_or_path))).example
        raise ModelError(
            f"{model_name_or_path}: {purpose}, and this base is quantised to {precision.name}; use the 16-bit base"
            f"{example and f' ({example})'}{'' if asked is None else f' without {asked.option}'}"
        )


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        hint = "; it holds a tuned prefix: give it as ptuning_checkpoint" if _is_prefix_folder(folder) else ""
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:5]) or "nothing"
        raise ModelError(
            f"{folder}: not a model folder, config.json is missing (found: {found}){hint}. Supported: {_supported()}."
        )
    return read_object(path, ModelError, "download it again")


def check_weights(folder: Path) -> None:
    """Raises ModelError where the weights in `folder` are absent, incomplete, only a prefix, or not what config.json says."""
    family = _family(folder)
    tensors = TensorFiles.find(folder, ModelError)
    if tensors is None:
        raise ModelError(f"{folder}: no weights; looked for {', '.join(LAYOUTS)}.")
    if family.embedding not in tensors.files:
        if any("prefix_encoder." in name for name in tensors.files):
            raise ModelError(
                f"{folder}: holds only a tuned prefix, not a base model; give it as ptuning_checkpoint, and the base model "
                "as model_name_or_path."
            )
        raise ModelError(
            f"{folder}: has no tensor {family.embedding}, so it is not in the official format. Supported: {_supported()}."
        )
    stored, bits = (
        any(name.endswith(f".weight{SCALE}") for name in tensors.files),
        family.quantized_bits(_read_config(folder)),
    )
    if stored and not bits:
        raise ModelError(
            f"{folder}: has quantised weights (….weight{SCALE}), and config.json doesn't say of how many bits; copy the "
            "config.json of the same checkpoint into this folder."
        )
    if bits and not stored:
        raise ModelError(
            f"{folder}: config.json says quantised to {bits} bit, and the weights are not (no ….weight{SCALE}); copy the "
            "config.json of the same checkpoint into this folder."
        )


def check_tokenizer(folder: Path) -> None:
    """Raises ModelError where a file that the tokenizer is made of is missing or only a git-lfs pointer."""
    for name in _family(folder).tokenizer_files:
        if not (folder / name).is_file():
            raise ModelError(f"{folder}: {name} is missing; copy it from the official model into this folder.")
        require_whole(folder / name, ModelError)


def _is_prefix_folder(folder: Path) -> bool:
    return (folder / MANIFEST).is_file() or (folder / "adapter_config.json").is_file()


def _family(folder: Path) -> Family:
    return family_of(read_base_config(folder))


def _supported() -> str:
    return "; ".join(family.supported for family in families())


def base_fingerprint(model_dir: str | Path) -> str:
    """16 hex digits that agree for copies of the same weights and differ for other weights.

    Hashed are the signs of 256 rows of the embedding and of the output layer, of the query/key/value biases of the first
    and last layer, and their shapes. A sign survives every rounding (also to zero, which keeps its sign bit), so fp32,
    fp16 and bf16 copies agree; rounded values would not, because fp32 → fp16 → bf16 and fp32 → bf16 differ in one number
    of 16. Official int8 and int4 checkpoints keep these tensors in 16 bit and so agree with their 16-bit original. Any
    training of all weights flips some of the two million signs; merging a LoRA into the attention alone does not show.

    Args:
        model_dir: folder in its family's format, with or without a config.json; or a hub id, whose weights are downloaded.

    Raises:
        ModelError: no such folder, or no weights in the official format there.
    """
    folder = whole_folder(model_dir)
    tensors = TensorFiles.find(folder, ModelError)
    family = None if tensors is None else _family_of_weights(folder, tensors)
    if tensors is None or family is None:
        names = " or ".join(dict.fromkeys(family.embedding for family in families()))
        raise ModelError(f"{folder}: no fingerprint can be computed, {names} was not found.")
    digest = hashlib.sha256()
    for name in _hashed_names(family, tensors):
        shape = tensors.shape(name)
        part = tensors.read(name) if len(shape) == 1 else tensors.read_rows(name, _spread(shape[0]))
        digest.update(f"{name}{shape}".encode())
        digest.update(_pack_signs(part))
    return digest.hexdigest()[:DIGITS]


def _family_of_weights(folder: Path, tensors: TensorFiles) -> Family | None:
    """By config.json; by the tensors' names where there is none."""
    known = families()
    with contextlib.suppress(ModelError):
        known = [family_of(_read_config(folder), folder)]
    return next((family for family in known if family.embedding in tensors.files), None)


def _hashed_names(family: Family, tensors: TensorFiles) -> list[str]:
    prefix = family.layer_prefix
    layers = {int(name[len(prefix) :].split(".")[0]) for name in tensors.files if name.startswith(prefix)}
    ends = [f"{prefix}{layer}{family.layer_bias}" for layer in sorted({min(layers), max(layers)})] if layers else []
    # A tied output layer or absent biases are no reason to fail.
    return [family.embedding, *(name for name in (family.output, *ends) if name in tensors.files)]


def _spread(length: int) -> list[int]:
    return sorted({i * length // ROWS for i in range(ROWS)})


def _pack_signs(tensor: torch.Tensor) -> bytes:
    bits = torch.signbit(tensor.float()).flatten().to(torch.uint8)
    bits = torch.nn.functional.pad(bits, (0, -bits.numel() % 8)).view(-1, 8)
    weights = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8)
    return bytes((bits * weights).sum(-1, dtype=torch.uint8).tolist())
