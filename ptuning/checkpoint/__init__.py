"""Checkpoints of a prefix or of all weights: reading, writing, exporting, and the fingerprint that ties one to its base."""

from ptuning.checkpoint.describe import describe_prefix
from ptuning.checkpoint.description import BaseDescription, PrefixDescription
from ptuning.checkpoint.export import export_official, export_peft
from ptuning.checkpoint.fingerprint import base_fingerprint
from ptuning.checkpoint.full import FullDescription, describe_full, read_full
from ptuning.checkpoint.prefix import PrefixCheckpoint, for_base
from ptuning.checkpoint.read import read_prefix
from ptuning.checkpoint.save import save_prefix

__all__ = [
    "BaseDescription",
    "FullDescription",
    "PrefixCheckpoint",
    "PrefixDescription",
    "base_fingerprint",
    "describe_full",
    "describe_prefix",
    "export_official",
    "export_peft",
    "for_base",
    "read_full",
    "read_prefix",
    "save_prefix",
]
