"""Bases of ModelScope: `modelscope:OWNER/NAME` is downloaded once, and is a folder from then on."""

from functools import cache
from pathlib import Path

from ptuning.errors import ModelError

MODELSCOPE = "modelscope:"


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
