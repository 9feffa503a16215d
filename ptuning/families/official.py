"""What families share whose config.json has official names outside and a configuration of transformers' own inside."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedConfig

from ptuning.errors import ModelError

Parent = TypeVar("Parent", bound=PreTrainedConfig)


def as_parent(config: PreTrainedConfig, parent: type[Parent], architecture: str) -> Parent:
    """The same as transformers' own configuration, for a folder that is read without this package.

    Args:
        config: of a subclass of `parent`.
        architecture: transformers' class that computes it.
    """
    own = parent().to_dict().keys() - {"model_type", "transformers_version"}
    values = {name: getattr(config, name) for name in own} | {"architectures": [architecture]}
    return parent(**values)


def check_sizes(values: Mapping[str, Any], names: Iterable[str], where: str | Path) -> None:
    """Refuses sizes that are none.

    Args:
        values: of config.json.
        names: of the sizes; one that isn't there is left to the default.
        where: it was read, for the message.

    Raises:
        ModelError: with the value and the fix.
    """
    for name in names:
        size = values.get(name, 1)
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ModelError(
                f"{where}: {name} is {json.dumps(size)} in config.json and must be a whole number of at least 1; copy "
                "config.json again from the official model"
            )
