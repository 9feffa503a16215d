"""However the program starts, torch's OpenMP library is loaded with a bounded spin count, or as the user's environment says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ptuning.threads import SPINS

ROOT = Path(__file__).resolve().parents[1]
WAYS = {
    "package": ["-c", "import ptuning, torch"],
    "script": [str(ROOT / "ptuning" / "main.py")],
}


def spin_counts(way: str, **given: str) -> set[str]:
    """What the library says that it has read."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    }
    environment |= {"OMP_DISPLAY_ENV": "VERBOSE", "PYTHONPATH": str(ROOT)} | given
    done = subprocess.run([sys.executable, *WAYS[way]], env=environment, text=True, capture_output=True)
    return set(re.findall(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr))


@pytest.mark.parametrize("way", WAYS)
def test_spinning_is_bounded(way):
    assert spin_counts(way) == {str(SPINS)}


@pytest.mark.parametrize(("given", "found"), [({"GOMP_SPINCOUNT": "77"}, "77"), ({"OMP_WAIT_POLICY": "passive"}, "0")])
def test_a_setting_of_the_users_own_stays(given, found):
    assert spin_counts("package", **given) == {found}
