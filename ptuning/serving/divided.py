"""One model in several processes: the first one serves, the others do what its engine does, each with its share of the matrices.

Every call of the engine in the first process is told to the others before it is made. What it makes of them depends on nothing
else: seeds are drawn by the first process, and prompts go first, because turns by measured time would differ (pace.py).
"""

import logging
import secrets
import signal
from collections.abc import Hashable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

from ptuning import distributed
from ptuning.errors import GenerationError, PTuningError
from ptuning.generation import Engine, GenerationRequest, Token
from ptuning.methods import Companion
from ptuning.serving.backend import Served
from ptuning.serving.models import LoadedModel

log = logging.getLogger("ptuning.serving")


def join() -> bool:
    """Makes the process group. Returns whether this is the first process."""
    if distributed.join():
        return True
    # A launcher tells all at once to stop; the first one finishes its answers, and ends the others.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    return False


def _tell(name: str, *values: Any) -> None:
    broadcast_object_list([(name, *values)])


@dataclass(frozen=True)
class LeadingModel(LoadedModel):
    """The first process's share; what it reads for requests the others read too."""

    companions: dict[Companion, int] = field(default_factory=dict)  # by which numbers the others know them

    def read_prefix(self, name: str, folder: str | Path) -> Served:
        _tell("read", len(self.companions), name, str(folder))
        served = super().read_prefix(name, folder)
        assert served.prefix is not None  # of what was read
        self.companions[served.prefix] = len(self.companions)
        return served


class LeadingEngine(Engine):
    """The first process's engine.

    Args:
        companions: of its LeadingModel.
    """

    def __init__(self, *args: Any, companions: dict[Companion, int], **options: Any):
        super().__init__(*args, **options)
        self._companions = companions

    def __exit__(self, *exc: object) -> None:
        _tell("stop")
        super().__exit__(*exc)

    def add(self, request: GenerationRequest) -> None:
        if request.sampling.constraint is not None:
            raise ValueError(
                "an answer's form (response_format, guided_choice) isn't kept by --tensor_parallel; leave it out"
            )
        if request.sampling.seed is None:
            request = replace(request, sampling=replace(request.sampling, seed=secrets.randbits(63)))
        super().add(request)
        number = None if request.prefix is None else self._companions[request.prefix]
        _tell("add", replace(request, prefix=None), number)

    def cancel(self, id: Hashable) -> bool:
        _tell("cancel", id)
        return super().cancel(id)

    def forget(self, prefix: Companion) -> None:
        _tell("forget", self._companions[prefix])
        super().forget(prefix)

    def step(self) -> list[Token]:
        _tell("step")
        return super().step()


def repeat(loaded: LoadedModel, engine: Engine) -> None:
    """Does in another process what the first one tells, until it stops.

    Args:
        engine: with the options of the first one's; not yet entered.
    """
    companions: dict[int, Companion] = {}
    with engine:
        while True:
            (told,) = broadcast_object_list([None])
            name, *values = told
            if name == "stop":
                return
            if name == "read":
                number, *place = values
                with suppress(PTuningError, OSError, ValueError):  # which the first process says
                    served = loaded.read_prefix(*place)
                    assert served.prefix is not None  # of what was read
                    companions[number] = served.prefix
            elif name == "add":
                request, number = values
                engine.add(replace(request, prefix=None if number is None else companions[number]))
            elif name == "forget":
                engine.forget(companions[values[0]])
            elif name == "cancel":
                engine.cancel(values[0])
            else:
                with suppress(GenerationError):  # of one request, which the first process ends
                    engine.step()
