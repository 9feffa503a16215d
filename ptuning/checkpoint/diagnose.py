"""Says what a folder is when it isn't a prefix checkpoint, because "not found" helps nobody."""

import re
from pathlib import Path

from ptuning.checkpoint.tensors import TensorFiles

EXPECTED = (
    "a folder with ptuning_config.json (this package), pytorch_model.bin holding transformer.prefix_encoder.* (official "
    "trainer) or adapter_config.json of type PREFIX_TUNING (peft)"
)

_STEP = re.compile(r"checkpoint-(\d+)")


def what_it_is(folder: Path, tensors: TensorFiles | None) -> str:
    """One or two sentences on a folder in which no prefix was found.

    Args:
        tensors: the weights in it, if any.
    """
    if folder.is_file():
        return f"is a file; give the folder it lies in, {folder.parent}."
    if not folder.is_dir():
        return f"no such folder (looked for {folder.absolute()})."
    newest = _newest_checkpoint(folder)
    if newest is not None and tensors is None:
        return f"is the folder of a run, without a prefix of its own; its newest checkpoint is {newest}: give that one."
    if any(folder.glob("prefix-*.safetensors")):
        return "looks like a save that was interrupted before ptuning_config.json was written; save again."
    if tensors is not None:
        layers = {name for name in tensors.files if ".layers." in name}
        if layers and any("lora_" in name for name in tensors.files):
            return "looks like a LoRA adapter, which is not a prefix."
        if layers:
            return (
                "looks like a base model or a checkpoint with all weights tuned: it has no prefix. Give it as "
                "model_name_or_path."
            )
        return f"has weights, but none of a prefix (found {', '.join(sorted(tensors.files)[:3]) or 'no tensor'})."
    names = sorted(path.name for path in folder.iterdir())
    if not names:
        return "is an empty folder."
    return f"has no weights (found {', '.join(names[:5])})."


def _newest_checkpoint(folder: Path) -> Path | None:
    steps = [
        (int(m.group(1)), path) for path in folder.iterdir() if path.is_dir() and (m := _STEP.fullmatch(path.name))
    ]
    return max(steps)[1] if steps else None
