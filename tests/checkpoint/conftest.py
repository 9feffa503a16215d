"""Prefix checkpoints made from the golden prefixes."""

import dataclasses

import pytest
import torch

from ptuning.checkpoint.manifest import Manifest, describe
from ptuning.methods.prefix.checkpoint import PrefixCheckpoint
from ptuning.methods.prefix.read import read_prefix


@pytest.fixture(scope="session")
def base_dir(golden_dir):
    return golden_dir / "chatglm2-tiny"


@pytest.fixture(params=["embedding", "projection"])
def variant(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def base_config(load_tiny):
    return load_tiny().config


@pytest.fixture
def official(golden_dir, variant) -> PrefixCheckpoint:
    """The golden prefix as the official trainer saved it."""
    return read_prefix(golden_dir / f"prefix-{variant}")


@pytest.fixture(scope="session")
def manifest(base_dir) -> Manifest:
    """Of the golden prefix without projection."""
    return describe(
        base_dir,
        "prefix",
        {"pre_seq_len": 8, "prefix_projection": False},
        max_source_length=64,
        max_target_length=32,
        source_prefix="写广告：",
        loss_on="all",
    )


@pytest.fixture
def described(manifest, official) -> Manifest:
    """Of the variant under test."""
    settings = manifest.settings | {"prefix_projection": official.prefix_projection}
    return dataclasses.replace(manifest, settings=settings)


@pytest.fixture
def other_tensors(official) -> dict[str, torch.Tensor]:
    """A later state of the same prefix."""
    return {name: tensor + 1 for name, tensor in official.tensors.items()}
