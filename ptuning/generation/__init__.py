"""Decoding many requests at once: rows join and leave the running batch between steps.

Evaluation and serving stand on the same engine, so that a served answer is the answer that was scored.
"""

from ptuning.generation.engine import Engine
from ptuning.generation.request import GREEDY, OFFICIAL, Prefix, Request, Sampling, Token

__all__ = ["GREEDY", "OFFICIAL", "Engine", "Prefix", "Request", "Sampling", "Token"]
