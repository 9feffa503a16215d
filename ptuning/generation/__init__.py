"""Answers to many requests at once, behind one protocol: the engine's running batch, or transformers' beam search.

Evaluation and serving stand on the same engine, so that a served answer is the answer that was scored.
"""

from ptuning.generation.beams import BeamSearch
from ptuning.generation.engine import Engine
from ptuning.generation.protocol import (
    GREEDY,
    OFFICIAL,
    GenerationRequest,
    Generator,
    SamplingParams,
    Token,
)
from ptuning.methods.prefix.encoder import Prefix

__all__ = [
    "GREEDY",
    "OFFICIAL",
    "BeamSearch",
    "Engine",
    "GenerationRequest",
    "Generator",
    "Prefix",
    "SamplingParams",
    "Token",
]
