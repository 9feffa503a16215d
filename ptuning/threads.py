"""How torch's threads wait for each other. Imported before torch, because its OpenMP library reads this once, when it is loaded."""

import os

# Turns of its waiting loop that a thread takes before it sleeps; libgomp's own 300,000 are several milliseconds. On a busy
# machine the thread that is waited for may not be running, and every turn is taken from it (docs/benchmarks.md).
SPINS = 1_000


def bound_spinning() -> None:
    """Sets GOMP_SPINCOUNT, for this process and those it starts, where the environment doesn't say how to wait."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))
