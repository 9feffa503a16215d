"""Fine-tuning for ChatGLM2-6B: P-Tuning v2 and full parameters, on transformers' own model.

Imports point one way, from right to left (tests/test_imports.py holds it):

    errors ← language ← messages ← distributed ← runs ← families ← config ← data ← checkpoint ← methods ← loading ←
    validation ← generation ← training ← evaluation ← report ← serving ← main ← cli

Importing the package makes transformers' Auto classes read official ChatGLM2 directories.
"""

from ptuning import families as _families  # noqa: F401  registers every family with transformers
from ptuning.loading import load_model

__all__ = ["load_model"]
__version__ = "0.1.0"
