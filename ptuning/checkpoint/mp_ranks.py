"""Checkpoints that an official trainer has divided among processes: `latest` names a folder with one
`mp_rank_NN_model_states.pt` a process. Read and written tensor by tensor.

Source of the layout: SwissArmyTransformer 0.2.12, as DeepSpeed writes it.
"""

import argparse
import mmap
from collections.abc import Mapping
from pathlib import Path

import torch
from torch.serialization import set_crc32_options, set_default_mmap_options, skip_data

from ptuning.checkpoint.tensors import load_pickled
from ptuning.errors import ModelError

LATEST, FILE, MODULE = "latest", "mp_rank_{:02d}_model_states.pt", "module"


class DividedCheckpoint:
    """The parts of an official checkpoint, mapped into memory, not read.

    Args:
        folder: with `latest` in it.

    Raises:
        ModelError: a file is missing or damaged, holds objects that could run code, or the parts have different tensors.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).expanduser()
        latest = self.folder / LATEST
        if not latest.is_file():
            raise ModelError(
                f"{self.folder}: not an official divided checkpoint, {LATEST} is missing; give the folder in which {LATEST} and "
                f"the folder that it names lie"
            )
        self.iteration = latest.read_text(encoding="utf-8").strip()
        if not self.iteration or Path(self.iteration).name != self.iteration:
            raise ModelError(f"{latest}: says {self.iteration!r}, expected the name of a folder beside it")
        files = sorted((self.folder / self.iteration).glob("mp_rank_*_model_states.pt"))
        expected = [FILE.format(index) for index in range(len(files))]
        if not files or [file.name for file in files] != expected:
            found = ", ".join(file.name for file in files) or "nothing"
            raise ModelError(
                f"{self.folder / self.iteration}: expected {FILE.format(0)}, {FILE.format(1)}, … without a gap, found {found}; "
                "copy or extract the checkpoint again"
            )
        self.files = files
        self._parts = [_mapped(file) for file in files]
        for file, part in zip(files, self._parts, strict=True):
            if different := sorted(part.keys() ^ self._parts[0].keys()):
                raise ModelError(f"{file}: has other tensors than {files[0].name}: {', '.join(different[:5])}")

    @property
    def names(self) -> list[str]:
        return list(self._parts[0])

    def parts(self, name: str) -> list[torch.Tensor]:
        """Of one tensor, in the processes' order. Nothing is read before it is used."""
        return [part[name] for part in self._parts]


class DividedWriter:
    """Writes such a checkpoint: files of the right size first, then every tensor into its place, in any order.

    Args:
        folder: new or empty.
        iteration: the name that `latest` gets.
        layouts: of each process: tensor name → shape and dtype.
    """

    def __init__(self, folder: Path, iteration: str, layouts: list[Mapping[str, tuple[tuple[int, ...], torch.dtype]]]):
        self.folder, self.iteration = folder, iteration
        (folder / iteration).mkdir(parents=True)
        self._parts = []
        for index, layout in enumerate(layouts):
            file = folder / iteration / FILE.format(index)
            # Memory that nothing is written to is never there, and `skip_data` leaves room in the file instead of reading it.
            empty = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in layout.items()}
            before = torch.serialization.get_crc32_options()
            set_crc32_options(False)  # of bytes that aren't there yet
            try:
                with skip_data():
                    torch.save({MODULE: empty}, file)
            finally:
                set_crc32_options(before)
            with set_default_mmap_options(mmap.MAP_SHARED):
                self._parts.append(torch.load(file, mmap=True, weights_only=True, map_location="cpu")[MODULE])

    def write(self, index: int, name: str, tensor: torch.Tensor) -> None:
        """Fills in a tensor of one process."""
        self._parts[index][name].copy_(tensor)

    def finish(self) -> None:
        """The checkpoint is one once this has returned."""
        self._parts.clear()
        (self.folder / LATEST).write_text(self.iteration, encoding="utf-8")


def _mapped(file: Path) -> dict[str, torch.Tensor]:
    # the command line of the trainer, which such files may hold
    state = load_pickled(file, ModelError, allowed=[argparse.Namespace])
    tensors = state.get(MODULE) if isinstance(state, dict) else None
    if not isinstance(tensors, dict):
        raise ModelError(
            f"{file}: has no {MODULE!r}, in which the weights lie; it is not a file of an official divided checkpoint"
        )
    return {name: tensor for name, tensor in tensors.items() if isinstance(tensor, torch.Tensor)}
