"""Bases of Hugging Face's hub (OWNER/NAME) and of ModelScope (modelscope:OWNER/NAME): downloaded once, and folders from then on."""

import re
from functools import cache
from pathlib import Path

from huggingface_hub import snapshot_download

from ptuning.errors import ModelError

MODELSCOPE = "modelscope:"

_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
_SMALL = ["*.json", "*.jinja", "*.model", "*.py", "*.txt"]  # config, tokenizer, and the code that auto_map names
_WEIGHTS = ("*.safetensors", "*.bin")  # many a hub id has both


def is_hub_id(name: str) -> bool:
    """Whether a name that is no folder can be one of the hub's."""
    return _HUB_ID.fullmatch(name) is not None


@cache  # asked for several times in a run, and each time would ask the network
def hub_folder(name: str, weights: bool) -> Path:
    """The folder in the hub's cache (HF_HOME moves it), which is downloaded or completed first; HF_HUB_OFFLINE: only looked for.
    Processes of one machine wait for each other's downloads.

    Args:
        name: OWNER/NAME.
        weights: also the weights, and not only what is read before them.

    Raises:
        ModelError: the model can't be had.
    """
    try:
        folder = Path(snapshot_download(name, allow_patterns=_SMALL, ignore_patterns="*/*"))
        for pattern in _WEIGHTS if weights else ():
            snapshot_download(name, revision=folder.name, allow_patterns=pattern, ignore_patterns="*/*")
            if any(folder.glob(pattern)):
                break
    except Exception as cause:  # whatever its network and its cache raise
        lines = str(cause).strip().splitlines() or [type(cause).__name__]
        raise ModelError(
            f"{name}: there is no folder {Path(name).absolute()}, and as a hub id it can't be fetched: that needs network, or a "
            f"copy in the Hugging Face cache ({lines[0]})"
        ) from cause
    return folder


@cache  # asked for several times in a run, and each time would ask the network
def modelscope_folder(name: str) -> Path:
    """The folder in ModelScope's cache (MODELSCOPE_CACHE moves it), which is downloaded or completed first.

    Args:
        name: modelscope:OWNER/NAME.

    Raises:
        ModelError: the package is missing, or the model can't be had.
    """
    try:
        from modelscope import snapshot_download
    except ImportError:
        raise ModelError(
            f"{name}: downloading from ModelScope needs its package: .venv/bin/python -m pip install modelscope"
        ) from None
    model = name.removeprefix(MODELSCOPE)
    try:
        return Path(snapshot_download(model))
    except Exception as error:  # whatever its network and its cache raise
        cause = error
    try:
        return Path(snapshot_download(model, local_files_only=True))
    except Exception:
        lines = str(cause).strip().splitlines() or [type(cause).__name__]
        raise ModelError(
            f"{name}: can't be downloaded ({lines[0]}): correct the name, or download it where there is network (modelscope "
            f"download --model {model} --local_dir DIR) and give DIR"
        ) from cause
