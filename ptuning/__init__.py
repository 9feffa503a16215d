"""Fine-tuning for ChatGLM2-6B: P-Tuning v2 and full parameters, on transformers' own model.

Imports point one way, from right to left (tests/test_imports.py holds it):

    threads ← errors ← packages ← language ← messages ← distributed ← runs ← quantization ← families ← kernels ← config ←
    data ← checkpoint ← methods ← loading ← validation ← generation ← training ← evaluation ← report ← serving ← main ← export ←
    cli ← completion

`from ptuning import load_model`, or `import ptuning.families`, makes transformers' Auto classes read official ChatGLM2 and
Baichuan directories. Nothing heavy is imported before it is asked for, so that `ptuning --help` answers at once.
"""

from typing import TYPE_CHECKING, Any

from ptuning.packages import hush
from ptuning.threads import bound_spinning

if TYPE_CHECKING:
    from ptuning.loading import load_model

bound_spinning()  # before the first import of torch
hush()  # before that of transformers

__all__ = ["load_model"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "load_model":
        from ptuning.loading import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
