"""Tensors of a model folder by name, without loading the rest: a 12 GB checkpoint is only mapped into memory."""

import json
import pickle
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch.serialization import safe_globals

from ptuning.errors import PTuningError

# In transformers' own order of preference.
LAYOUTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")

DTYPES = {  # safetensors' names
    **{torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"},
    **{torch.int8: "I8", torch.int32: "I32", torch.int64: "I64"},
}

_LFS_POINTER = b"version https://git-lfs"


class TensorFiles:
    """The weight files of a folder, whichever of the four layouts it has.

    Args:
        files: tensor name → file.
        error: class of the errors raised, because the same damage is a ModelError in a base and a CheckpointError in a
            tuned checkpoint.
    """

    def __init__(self, files: dict[str, Path], error: type[PTuningError]):
        self.files = files
        self._error = error
        self._mapped: dict[Path, dict[str, torch.Tensor]] = {}

    @classmethod
    def find(cls, folder: Path, error: type[PTuningError]) -> "TensorFiles | None":
        """The weights in `folder`, None where it has none.

        Raises:
            PTuningError: (of class `error`) a file is damaged, missing or only a git-lfs pointer.
        """
        layout = next((name for name in LAYOUTS if (folder / name).is_file()), None)
        if layout is None:
            return None
        path = folder / layout
        return cls(_read_index(path, error), error) if path.suffix == ".json" else cls.of_file(path, error)

    @classmethod
    def of_file(cls, path: Path, error: type[PTuningError]) -> "TensorFiles":
        """The tensors of one .bin or .safetensors file; errors as in `find`."""
        found = cls({}, error)
        found.files = dict.fromkeys(found._names(path), path)
        return found

    def read(self, name: str) -> torch.Tensor:
        """A copy of one tensor."""
        file = self.files[name]
        if file.suffix == ".bin":
            return self._bin(file)[name].clone()
        with _open_safetensors(file, self._error) as opened:
            return opened.get_tensor(name)

    def unread(self) -> dict[str, "UnreadTensor"]:
        """Every tensor, to be read when it is needed and from a file that isn't kept in memory: what transformers takes as
        `state_dict`, where it would map all files at once."""
        return {name: UnreadTensor(self, name) for name in self.files}

    def read_rows(self, name: str, rows: Sequence[int]) -> torch.Tensor:
        """Some rows of a matrix, (len(rows), columns)."""
        file = self.files[name]
        if file.suffix == ".bin":
            return self._bin(file)[name][list(rows)]
        with _open_safetensors(file, self._error) as opened:
            matrix = opened.get_slice(name)
            return torch.cat([matrix[row : row + 1] for row in rows])

    def shape(self, name: str) -> tuple[int, ...]:
        file = self.files[name]
        if file.suffix == ".bin":
            return tuple(self._bin(file)[name].shape)
        with _open_safetensors(file, self._error) as opened:
            return tuple(opened.get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        file = self.files[name]
        if file.suffix == ".bin":
            return self._bin(file)[name].dtype
        with _open_safetensors(file, self._error) as opened:
            return opened.get_slice(name)[:1].dtype

    def _names(self, path: Path) -> list[str]:
        if path.suffix == ".bin":
            return list(self._bin(path))
        with _open_safetensors(path, self._error) as opened:
            return list(opened.keys())

    def _bin(self, path: Path) -> dict[str, torch.Tensor]:
        mapped = self._mapped.get(path)
        if mapped is None:
            mapped = _load_bin(path, self._error)
            self._mapped = {path: mapped}  # an earlier file's pages leave memory
        return mapped


class UnreadTensor:
    """Stands for a tensor until `[...]` reads it, as the slices of safetensors do.

    Args:
        rows: first and last of those that it stands for; default: all.
    """

    def __init__(self, files: TensorFiles, name: str, rows: tuple[int, int] | None = None):
        self._files, self._name, self._rows = files, name, slice(*rows) if rows else slice(None)

    def __getitem__(self, where: Any) -> torch.Tensor:
        return self._files.read(self._name)[self._rows][where]

    def get_shape(self) -> list[int]:
        first, *others = self._files.shape(self._name)
        return [len(range(first)[self._rows]), *others]

    def get_dtype(self) -> str:
        return DTYPES[self._files.dtype(self._name)]


def require_whole(path: Path, error: type[PTuningError]) -> None:
    """Raises `error` where the file is missing, empty or the pointer that `git clone` leaves without git-lfs."""
    if not path.is_file():
        raise error(f"{path.parent}: {path.name} is missing; copy or download the folder again, it is incomplete.")
    with path.open("rb") as file:
        head = file.read(len(_LFS_POINTER))
    if head == _LFS_POINTER:
        raise error(
            f"{path}: this is a git-lfs pointer of {path.stat().st_size} bytes, not the file itself. Run `git lfs install && "
            "git lfs pull` in that folder, or download it from the hub."
        )
    if not head:
        raise error(f"{path}: the file is empty (0 bytes); download it again.")


def read_object(path: Path, error: type[PTuningError], fix: str) -> dict[str, Any]:
    """The JSON object in one of a model's or checkpoint's files.

    Args:
        error: what is raised where it holds none.
        fix: what to do then, or what it means.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as cause:
        raise error(f"{path}: not valid JSON ({cause}); {fix}.") from cause
    if not isinstance(values, dict):
        raise error(f"{path}: holds a {type(values).__name__}, expected an object; {fix}.")
    return values


def _read_index(path: Path, error: type[PTuningError]) -> dict[str, Path]:
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as cause:
        raise error(f"{path}: not a weight index ({cause!r}); download it again.") from cause
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file:
            raise error(f"{path}: names the file {file!r}, which is outside its own folder.")
        require_whole(path.parent / file, error)
    return {name: path.parent / file for name, file in weight_map.items()}


def load_pickled(path: Path, error: type[PTuningError], allowed: Sequence[type] = ()) -> Any:
    """What a file of torch.save holds, mapped into memory: tensors, plain values and objects of the allowed classes.

    Raises:
        error: the file is damaged, a git-lfs pointer, or holds other objects.
    """
    require_whole(path, error)
    try:
        with safe_globals(list(allowed)):
            # Files from before torch 1.6 aren't zip files and can't be mapped.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as cause:
        raise error(
            f"{path}: damaged, or it holds other objects than tensors, which are not loaded because they could run code "
            f"({str(cause).splitlines()[0]})."
        ) from cause
    except (RuntimeError, EOFError, ValueError, OSError, KeyError) as cause:
        raise error(f"{path}: damaged, can't be read ({str(cause).splitlines()[0]}); copy it again.") from cause


def _load_bin(path: Path, error: type[PTuningError]) -> dict[str, torch.Tensor]:
    state = load_pickled(path, error)
    if not isinstance(state, dict):
        raise error(f"{path}: holds a {type(state).__name__}, expected a dictionary of tensors.")
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}


def _open_safetensors(path: Path, error: type[PTuningError]):
    require_whole(path, error)
    try:
        return safe_open(path, framework="pt", device="cpu")
    except SafetensorError as cause:
        raise error(f"{path}: damaged, can't be read ({cause}); copy it again.") from cause
