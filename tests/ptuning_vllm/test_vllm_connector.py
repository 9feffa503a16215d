"""The connector between stand-ins of vLLM's classes: what is called when, and that errors stay with their request."""

import importlib
import sys
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace

import pytest
import torch

from tests.ptuning_vllm.test_vllm_store import stored

SIZE = 16  # of a block


class Attention:
    """One layer with a cache of 8 blocks; writes as vLLM's kernels do, by slot."""

    num_kv_heads, head_size = 2, 8

    def __init__(self):
        self.kv_cache = torch.zeros(2, 8 * SIZE, 2, 8)
        self.impl = SimpleNamespace(do_kv_cache_update=self._update)

    def _update(self, layer, keys, values, cache, slots):
        assert layer is self
        cache[0, slots], cache[1, slots] = keys, values


class Base:
    def __init__(self, vllm_config, role, kv_cache_config=None):
        self._vllm_config, self._kv_transfer_config = vllm_config, vllm_config.kv_transfer_config
        self.metadata = None

    def _get_connector_metadata(self):
        return self.metadata


@pytest.fixture
def connector(monkeypatch):
    """The module, imported over stand-ins."""
    parts = {
        "vllm": {},
        "vllm.distributed": {
            "get_tensor_model_parallel_rank": lambda: 0,
            "get_tensor_model_parallel_world_size": lambda: 1,
        },
        "vllm.distributed.kv_transfer.kv_connector.v1.base": {
            "KVConnectorBase_V1": Base,
            "KVConnectorMetadata": type("KVConnectorMetadata", (), {}),
        },
        "vllm.model_executor.layers.attention": {"Attention": Attention},
        "vllm.model_executor.models.utils": {"extract_layer_index": lambda name: int(name.split(".")[2])},
    }
    for name, content in parts.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "ptuning_vllm.connector", raising=False)
    yield importlib.import_module("ptuning_vllm.connector")
    sys.modules.pop("ptuning_vllm.connector", None)


def config(policy="fail", **options):
    return SimpleNamespace(
        kv_transfer_config=SimpleNamespace(kv_load_failure_policy=policy, kv_connector_extra_config=options),
        cache_config=SimpleNamespace(block_size=SIZE),
        model_config=SimpleNamespace(dtype=torch.float32),
    )


@dataclass
class Request:
    kv_transfer_params: dict | None = None
    cache_salt: str | None = None
    num_prompt_tokens: int = 40
    skip_reading_prefix_cache: bool = True
    blocks: list[int] = field(default_factory=lambda: [5, 2, 7])

    def get_block_ids(self):
        return (self.blocks,)


def scheduled(made, requests, computed=0):
    """One step's metadata, as the scheduler makes it."""
    for request in requests:
        count, later = made.get_num_new_matched_tokens(request, computed)
        assert later is False
        made.update_state_after_alloc(request, request, count)
    return made.build_connector_meta(None)


def test_a_prefix_lies_in_the_first_positions_and_a_bad_one_fails_alone(connector, tmp_path):
    digest, keys, values = stored(tmp_path, length=20)
    made = connector.PrefixConnector(config(prefix_store=str(tmp_path)), "role")
    good = Request({"prefix": digest, "length": 20}, digest)
    missing = Request({"prefix": "0" * 32, "length": 20}, "0" * 32, blocks=[1])
    salted = Request({"prefix": digest, "length": 20}, "mine", blocks=[3])
    base = Request(None, blocks=[4])
    layers = {f"model.layers.{index}.self_attn.attn": Attention() for index in range(3)}
    context = SimpleNamespace(no_compile_layers=layers | {"model.layers.0.other": object()})
    made.metadata = scheduled(made, [good, missing, salted, base])
    made.start_load_kv(context)
    assert made.get_block_ids_with_load_errors() == {1, 3} and made.get_block_ids_with_load_errors() == set()
    slots = [5 * SIZE + place for place in range(SIZE)] + [2 * SIZE + place for place in range(4)]
    for index, layer in enumerate(layers.values()):
        assert torch.equal(layer.kv_cache[0, slots], keys[index]) and torch.equal(
            layer.kv_cache[1, slots], values[index]
        )
        assert layer.kv_cache.count_nonzero() == 2 * 20 * 2 * 8, "and nowhere else"
    assert not good.skip_reading_prefix_cache, "prompt_logprobs would leave the prefix out"
    assert base.skip_reading_prefix_cache
    made.metadata = scheduled(made, [])
    made.start_load_kv(context)
    assert made.get_block_ids_with_load_errors() == set()


def test_only_what_the_cache_lacks_is_written(connector, tmp_path):
    digest, keys, _ = stored(tmp_path, length=20)
    made = connector.PrefixConnector(config(prefix_store=str(tmp_path)), "role")
    layer = Attention()
    made.metadata = scheduled(made, [Request({"prefix": digest, "length": 20}, digest)], computed=SIZE)
    made.start_load_kv(SimpleNamespace(no_compile_layers={"model.layers.0.self_attn.attn": layer}))
    assert torch.equal(layer.kv_cache[0, 2 * SIZE : 2 * SIZE + 4], keys[0, 16:])
    assert layer.kv_cache[:, 5 * SIZE : 6 * SIZE].count_nonzero() == 0


@pytest.mark.parametrize("number", [3, 4])
def test_a_prefix_of_another_base(connector, tmp_path, number):
    digest, *_ = stored(tmp_path, length=20)
    made = connector.PrefixConnector(config(prefix_store=str(tmp_path)), "role")
    layers = {f"model.layers.{index}.self_attn.attn": Attention() for index in range(number)}
    if number == 3:
        for layer in layers.values():
            layer.num_kv_heads = 4
    made.metadata = scheduled(made, [Request({"prefix": digest, "length": 20}, digest)])
    made.start_load_kv(SimpleNamespace(no_compile_layers=layers))
    assert made.get_block_ids_with_load_errors() == {5, 2, 7}


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (config("recompute", prefix_store="x"), 'kv_load_failure_policy must be "fail"'),
        (config(), 'needs "prefix_store"'),
        (config(prefix_store="x", folder="y"), "has no folder: prefix_store, max_prefixes"),
        (config(prefix_store="x", max_prefixes=0), "max_prefixes is 0; use a whole number from 1 on"),
    ],
)
def test_configurations_that_would_answer_wrong(connector, made, said):
    with pytest.raises(ValueError, match=said):
        connector.PrefixConnector(made, "role")
