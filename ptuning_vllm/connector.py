"""vLLM's side: the connector that its scheduler and its workers call (vllm 0.32.0; vLLM calls the interface experimental)."""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
)
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index

from ptuning_vllm.plan import Load, Plan, wanted
from ptuning_vllm.store import BadPrefix, Prefixes, own_groups

log = logging.getLogger("vllm.ptuning")


@dataclass
class Loads(KVConnectorMetadata):
    """From the scheduler to the workers, with each step."""

    loads: list[Load] = field(default_factory=list)


class PrefixConnector(KVConnectorBase_V1):
    """Puts the keys and values of a prefix into the first positions of a request's cache.

    Options (kv_connector_extra_config): `prefix_store`, the folder; `max_prefixes`, kept in a worker's memory (128).

    Raises:
        ValueError: at the start, a configuration with which answers would be wrong.
    """

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any = None):
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        transfer = self._kv_transfer_config
        if getattr(transfer, "kv_load_failure_policy", "fail") != "fail":
            raise ValueError(
                'kv_load_failure_policy must be "fail": else placeholders would be computed in a prefix\'s place'
            )
        options = transfer.kv_connector_extra_config
        if unknown := options.keys() - {"prefix_store", "max_prefixes"}:
            raise ValueError(
                f"kv_connector_extra_config has no {', '.join(sorted(unknown))}: prefix_store, max_prefixes"
            )
        if "prefix_store" not in options:
            raise ValueError(
                'kv_connector_extra_config needs "prefix_store", the folder that prefixes are exported into'
            )
        most = options.get("max_prefixes", 128)
        if type(most) is not int or most < 1:
            raise ValueError(f"max_prefixes is {most!r}; use a whole number from 1 on")
        self.prefixes = Prefixes(Path(options["prefix_store"]), most, self._share)
        self.plan = Plan()
        self.failed: set[int] = set()
        self._layers: dict[int, Any] = {}

    # --- in the scheduler -------------------------------------------------------------------------------------------------

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        asked = self._asked(request)
        if asked is not None:
            # Set where log probabilities of the prompt are asked for; vLLM would leave the prefix out without a word.
            request.skip_reading_prefix_cache = False
        return self.plan.missing(asked, num_computed_tokens, request.num_prompt_tokens), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if num_external_tokens:
            self.plan.add(self._asked(request), num_external_tokens, list(blocks.get_block_ids()[0]))

    def build_connector_meta(self, scheduler_output: Any) -> Loads:
        return Loads(self.plan.take())

    @staticmethod
    def _asked(request: Any) -> tuple[str, int] | None:
        return wanted(request.kv_transfer_params, getattr(request, "cache_salt", None), request.num_prompt_tokens)

    # --- in a worker ------------------------------------------------------------------------------------------------------

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        loads = self._get_connector_metadata().loads
        if loads and not self._layers:
            layers = forward_context.no_compile_layers.items()
            self._layers = {extract_layer_index(name): layer for name, layer in layers if isinstance(layer, Attention)}
        for load in loads:
            try:
                self._write(load)
            except Exception as error:  # whatever it is, the other requests go on
                log.log(logging.ERROR, "prefix %s: %s", load.prefix, error, exc_info=not isinstance(error, BadPrefix))
                self.failed.update(load.blocks)

    def get_block_ids_with_load_errors(self) -> set[int]:
        failed, self.failed = self.failed, set()
        return failed

    def _write(self, load: Load) -> None:
        keys, values = self.prefixes.get(load.prefix, load.length)
        if keys.shape[0] <= max(self._layers):
            raise BadPrefix(f"{load.prefix} has {keys.shape[0]} layers, and the model more: it belongs to another base")
        size = self._vllm_config.cache_config.block_size
        positions = torch.arange(load.first, load.length)
        blocks = torch.tensor(load.blocks)
        slots = (blocks[positions // size] * size + positions % size).to(keys.device)
        for index, layer in self._layers.items():
            # The layer's own way to write: how its cache lies in memory is the attention kernel's.
            layer.impl.do_kv_cache_update(
                layer, keys[index, load.first :], values[index, load.first :], layer.kv_cache, slots
            )

    def _share(self, whole_LTGD: torch.Tensor) -> torch.Tensor:
        layer = next(iter(self._layers.values()))
        rank, size = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        groups = own_groups(whole_LTGD.shape[2], rank, size, layer.num_kv_heads)
        own = whole_LTGD[:, :, groups]
        if own.shape[2:] != (layer.num_kv_heads, layer.head_size):
            raise BadPrefix(
                f"heads of {tuple(whole_LTGD.shape[2:])} (groups, width) aren't the model's: it is of another base"
            )
        return own.contiguous().to(layer.kv_cache.device, self._vllm_config.model_config.dtype)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Everything is there once `start_load_kv` has returned."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing is saved."""

    def wait_for_save(self) -> None:
        """Nothing is saved."""
