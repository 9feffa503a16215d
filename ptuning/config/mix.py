"""The `--mix FILE:RATIO` option, taken apart."""

import math

from ptuning.errors import ConfigError


def parse_mix(text: str) -> tuple[str, float]:
    """FILE:RATIO → (file, ratio): so many of the file's rows for each row of the training file.

    Raises:
        ConfigError: no ratio, or none above 0.
    """
    file, colon, number = text.rpartition(":")
    try:
        ratio = float(number) if colon else math.nan
    except ValueError:
        ratio = math.nan
    if math.isnan(ratio) or not file:
        raise ConfigError(f"--mix {text}: expected FILE:RATIO, e.g. --mix {file or text or 'general.json'}:0.1")
    if not 0 < ratio < math.inf:
        raise ConfigError(
            f"--mix {text}: the ratio is {number}; use a number above 0 (rows of {file} for each row of --train_file), e.g. 0.1"
        )
    return file, ratio
