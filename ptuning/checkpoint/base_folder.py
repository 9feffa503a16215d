"""Finds a base model's folder and refuses, before anything is loaded, what can't be a ChatGLM2 base."""

import json
import re
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from ptuning.families.chatglm2.config import SUPPORTED, ChatGLMConfig
from ptuning.checkpoint.tensors import LAYOUTS, TensorFiles, require_whole
from ptuning.errors import ModelError

EMBEDDING = "transformer.embedding.word_embeddings.weight"

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def resolve_base(model_name_or_path: str | Path) -> Path:
    """The local folder of a base: the path itself, or the cached snapshot of a hub id (config.json is fetched if needed).

    Raises:
        ModelError: no such folder, or the hub id can't be reached.
    """
    folder = Path(model_name_or_path).expanduser()
    if folder.is_dir():
        return folder
    name = str(model_name_or_path)
    if folder.is_file():
        raise ModelError(f"{name}: is a file; give the folder it lies in.")
    if not _HUB_ID.fullmatch(name) or name.startswith("."):
        raise ModelError(
            f"{name}: no such folder (looked for {folder.absolute()}). Give the folder of a ChatGLM2 model."
        )
    try:
        config = cached_file(name, "config.json")
    except (OSError, ValueError) as cause:
        raise ModelError(
            f"{name}: there is no folder {folder.absolute()}, and as a hub id it can't be fetched: that needs network, or a "
            f"copy in the Hugging Face cache ({str(cause).splitlines()[0]})"
        ) from cause
    return Path(config).parent


def read_base_config(folder: Path) -> dict[str, Any]:
    """config.json as it is written, checked as far as the file alone can tell.

    Raises:
        ModelError: no config.json, not JSON, another architecture, a quantised checkpoint.
    """
    path = folder / "config.json"
    if not path.is_file():
        hint = "; it holds a tuned prefix: give it as ptuning_checkpoint" if _is_prefix_folder(folder) else ""
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:5]) or "nothing"
        raise ModelError(
            f"{folder}: not a model folder, config.json is missing (found: {found}){hint}. Supported: {SUPPORTED}."
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as cause:
        raise ModelError(f"{path}: not valid JSON ({cause}); download it again.") from cause
    model_type = values.get("model_type") if isinstance(values, dict) else None
    if model_type != ChatGLMConfig.model_type:
        raise ModelError(
            f"{path}: model_type is {model_type!r}, expected {ChatGLMConfig.model_type!r}. Supported: {SUPPORTED}."
        )
    if values.get("quantization_bit"):
        raise ModelError(
            f"{path}: quantization_bit is {values['quantization_bit']}; quantised checkpoints aren't supported yet. Use the "
            "16-bit checkpoint of the same model (THUDM/chatglm2-6b)."
        )
    return values


def check_weights(folder: Path) -> None:
    """Raises ModelError where the weights in `folder` are absent, incomplete, quantised or only a prefix."""
    tensors = TensorFiles.find(folder, ModelError)
    if tensors is None:
        raise ModelError(f"{folder}: no weights; looked for {', '.join(LAYOUTS)}.")
    if EMBEDDING not in tensors.files:
        if any("prefix_encoder." in name for name in tensors.files):
            raise ModelError(
                f"{folder}: holds only a tuned prefix, not a base model; give it as ptuning_checkpoint, and the base model "
                "as model_name_or_path."
            )
        raise ModelError(
            f"{folder}: has no tensor {EMBEDDING}, so it is not in the official format. Supported: {SUPPORTED}."
        )
    if any(name.endswith(".weight_scale") for name in tensors.files):
        raise ModelError(
            f"{folder}: has quantised weights (….weight_scale); quantised checkpoints aren't supported yet."
        )


def check_tokenizer(folder: Path) -> None:
    """Raises ModelError where tokenizer.model is missing or only a git-lfs pointer."""
    if not (folder / "tokenizer.model").is_file():
        raise ModelError(f"{folder}: tokenizer.model is missing; copy it from the official model into this folder.")
    require_whole(folder / "tokenizer.model", ModelError)


def _is_prefix_folder(folder: Path) -> bool:
    return (folder / "ptuning_config.json").is_file() or (folder / "adapter_config.json").is_file()
