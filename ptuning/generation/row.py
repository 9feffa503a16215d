"""A request while it runs or waits, with what it has said so far."""

from ptuning.generation.protocol import GenerationRequest
from ptuning.generation.sampling import Chooser

STEP = 128  # columns that a row is given beyond what it has


class Row:
    """A request's tokens, and how many of them are in the cache.

    A row that leaves the batch before its end keeps its tokens and the state of its chooser; when it comes back its tokens are
    computed like a prompt, and it goes on as if nothing had been.

    Args:
        request: what is asked.
        number: of its arrival.
    """

    def __init__(self, request: GenerationRequest, number: int):
        self.request, self.number, self.chooser = request, number, Chooser(request.sampling, request.ids)
        self.ids = list(request.ids)  # prompt and answer so far
        self.cached = 0  # of these, how many have their keys and values in the cache
        self.reused: int | None = None  # of the prompt, how many were there already when it began

    @property
    def begun(self) -> bool:
        """Whether it has said something."""
        return len(self.ids) > len(self.request.ids)

    @property
    def columns(self) -> int:
        """Of the cache, that its tokens so far take, those that aren't computed yet included."""
        return self.request.before + len(self.ids)

    @property
    def start(self) -> int:
        """Columns in use."""
        return self.request.before + self.cached

    @property
    def reach(self) -> int:
        """Columns that it is given when it joins: what it has and a step more, never more than it can need."""
        return min(self.columns + STEP, self.request.room)
