"""Whether a vLLM has loaded what it is asked to answer for."""

import json
import logging
from pathlib import Path
from typing import Any

from ptuning.checkpoint.base import base_fingerprint, read_base_config
from ptuning.checkpoint.native import FINGERPRINT
from ptuning.errors import ConfigError
from ptuning.families import family_of, read_config

log = logging.getLogger("ptuning.serving.vllm")


def check_folder(root: Any, fingerprint: str) -> None:
    """Refuses what vLLM would answer wrong with, as far as its folder can be seen from here.

    Args:
        root: the folder that vLLM says it has loaded.
        fingerprint: of --model.

    Raises:
        ConfigError: other weights, or a format that vLLM reads wrong without a word.
    """
    path = Path(root or "") / "config.json"
    if not path.is_file():
        log.warning(
            "vLLM's model can't be seen from here, so it isn't compared with --model", extra={"fields": {"root": root}}
        )
        return
    values = json.loads(path.read_text(encoding="utf-8"))
    found = values.get(FINGERPRINT)
    if found is None:
        read_base_config(path.parent)
        config = read_config(path.parent)
        if (why := family_of(config).vllm_refusal(config)) is not None:
            raise ConfigError(
                f"vLLM has loaded {root}, and {why}; give it what ptuning export --format vllm makes of it"
            )
        found = base_fingerprint(path.parent)
    if found != fingerprint:
        raise ConfigError(
            f"vLLM has loaded {root} (fingerprint {found}), and --model has other weights (fingerprint {fingerprint}); give both "
            "the same model"
        )
