"""Packages that not every installation has. What needs one says so before it starts, with the pip line."""

import importlib.util
import logging
import shlex

from ptuning.errors import ConfigError


def hush() -> None:
    """Where bitsandbytes is installed, transformers and peft import it into every process, and on a CPU with AVX512-BF16 it warns
    of a kernel that isn't there and that nothing here would use."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def require(what: str, module: str, install: str, instead: str = "") -> None:
    """Refuses to go on without a package.

    Args:
        what: what needs it, e.g. the option.
        module: its name for `import`.
        install: its name for pip; `ptuning[full]` and the like are this package's own extras.
        instead: what can be done without it.

    Raises:
        ConfigError: it isn't there.
    """
    if importlib.util.find_spec(module) is None:
        raise missing(what, module if "[" in install else install, install, instead)


def missing(what: str, name: str, install: str, instead: str = "") -> ConfigError:
    """The error of a package that isn't there; arguments as `require`, and the package's name for people."""
    way_out = f", or {instead}" if instead else ""
    return ConfigError(f"{what}: {name} is not installed; pip install {shlex.quote(install)}{way_out}")
