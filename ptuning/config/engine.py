"""Which options go with which engine: vLLM is another process, which was told how to compute when it was started."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from ptuning.config.commands import require_address
from ptuning.errors import ConfigError

VLLM = "vllm"
VLLM_KEY = "PTUNING_VLLM_KEY"  # in the environment
# What says how this process computes.
_OWN_ENGINE = (
    *(
        "dtype",
        "attn_implementation",
        "quantization_bit",
        "quantization",
        "double_quantization",
        "cpu_kernels",
        "kernels",
    ),
    *("device_map", "tensor_parallel", "batch_tokens", "generation_batch_tokens", "num_beams", "step_timeout"),
)


def check_engine(engine: str, groups: Sequence[Any], needs_store: bool) -> None:
    """Raises ConfigError for options of the other engine, and for those of vLLM that are missing or wrong.

    Args:
        engine: as given.
        groups: instances of the dataclasses that declare the options.
        needs_store: something tuned is put where vLLM finds it.
    """
    given = {field.name: (getattr(group, field.name), field.default) for group in groups for field in fields(group)}
    if engine != VLLM:
        for name in ("vllm_url", "prefix_store"):  # a key may lie in the environment for another server
            if given[name][0]:
                raise ConfigError(f"--{name} is for --engine vllm; give that too, or leave it out")
        return
    for name in ("vllm_url", "prefix_store") if needs_store else ("vllm_url",):
        if not given[name][0]:
            raise ConfigError(f"--engine vllm needs --{name}; bash scripts/serve_vllm.sh starts vLLM with both")
    for url in given["vllm_url"][0]:
        require_address("vllm_url", url, "http://127.0.0.1:8000")
    for name in _OWN_ENGINE:
        if name in given and given[name][0] != given[name][1]:
            raise ConfigError(f"--{name} is for this package's own engine; vLLM is told when it is started")
