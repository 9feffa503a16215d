"""The official code beside a base. `auto_map` in a folder's JSON files names classes in .py files: the files go where the model
goes, and where the base has none, the name is left out, because whoever follows it finds nothing."""

import shutil
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_import_files

from ptuning.checkpoint.base import resolve_base
from ptuning.errors import ModelError
from ptuning.runs.files import read_json_if_possible, write_json

_NAMING = ("config.json", "tokenizer_config.json")


def carry_code(base: str | Path, folder: Path) -> None:
    """Completes a written model folder: with the base's files that its auto_map names, or without the names.

    Args:
        base: folder or hub id of the model that was tuned; it may be gone, or empty for a model that came from no folder.

    Raises:
        OSError: `folder` can't be written.
    """
    try:
        source = resolve_base(base) if str(base) else None
    except ModelError:
        source = None
    for path in (folder / name for name in _NAMING):
        values = read_json_if_possible(path)
        named = values.get("auto_map")
        if not isinstance(named, dict):
            continue
        kept = {auto: classes for auto, classes in named.items() if _carried(classes, source, folder)}
        if kept != named:
            rest = {key: value for key, value in values.items() if key != "auto_map"}
            write_json(path, rest | ({"auto_map": kept} if kept else {}))


def _carried(classes: Any, source: Path | None, folder: Path) -> bool:
    """Whether the files of `module.Class`, or of a tokenizer's [slow, fast], are in the folder now."""
    modules = {str(name).rpartition(".")[0] for name in (classes if isinstance(classes, list) else [classes]) if name}
    files = [] if source is None else [source / f"{module}.py" for module in modules]
    if not files or not all(file.is_file() for file in files):
        return False
    for file in files:
        for needed in (file, *map(Path, get_relative_import_files(file))):
            if needed.is_file() and needed.parent.resolve() != folder.resolve():
                shutil.copyfile(needed, folder / needed.name)
    return True
