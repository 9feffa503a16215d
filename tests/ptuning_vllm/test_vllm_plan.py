"""The scheduler's half of the connector: it counts, and whatever a client sends it never raises."""

import ast

import pytest

from ptuning_vllm.plan import MALFORMED, Load, Plan, wanted
from tests.conftest import REPO

DIGEST = "0123456789abcdef" * 2


def test_a_prefix():
    asked = wanted({"prefix": DIGEST, "length": 20}, DIGEST, 50)
    assert asked == (DIGEST, 20)
    plan = Plan()
    assert plan.missing(asked, 0, 50) == 20
    plan.add(asked, 20, [7, 8])
    assert plan.missing(asked, 16, 50) == 4, "vLLM's cache has the first block"
    plan.add(asked, 4, [7, 9])
    assert plan.missing(asked, 32, 50) == 0
    plan.add(asked, 0, [7, 9, 10])
    assert plan.take() == [Load(DIGEST, 20, 0, [7, 8]), Load(DIGEST, 20, 16, [7, 9])]
    assert plan.take() == []


def test_a_salt_that_shares_no_blocks():
    assert wanted({"prefix": DIGEST, "length": 20}, f"{DIGEST}.1", 50) == (DIGEST, 20)


@pytest.mark.parametrize("params", [None, {}, {"prefix": None}, {"do_remote_prefill": True}, [], "text"])
def test_no_prefix(params):
    assert wanted(params, None, 50) is None
    assert Plan().missing(None, 0, 50) == 0


@pytest.mark.parametrize(
    ("params", "salt", "prompt"),
    [
        ({"prefix": DIGEST, "length": 20}, "other", 50),  # another prefix's blocks would be taken
        ({"prefix": DIGEST, "length": 20}, None, 50),
        ({"prefix": DIGEST, "length": 20}, f"{DIGEST}1", 50),
        ({"prefix": "x.y", "length": 20}, "x.y", 50),
        ({"prefix": DIGEST, "length": 50}, DIGEST, 50),  # nothing left to compute: vLLM's assertion would end it
        ({"prefix": DIGEST, "length": 0}, DIGEST, 50),
        ({"prefix": DIGEST, "length": -1}, DIGEST, 50),
        ({"prefix": DIGEST, "length": True}, DIGEST, 50),
        ({"prefix": DIGEST, "length": "20"}, DIGEST, 50),
        ({"prefix": DIGEST, "length": 10**30}, DIGEST, 50),
        ({"prefix": DIGEST}, DIGEST, 50),
        ({"prefix": ["a"], "length": 20}, ["a"], 50),
        ({"prefix": 7, "length": 20}, 7, 50),
    ],
)
def test_a_malformed_request_is_made_to_fail(params, salt, prompt):
    asked, plan = wanted(params, salt, prompt), Plan()
    assert asked is not None and asked[0] == MALFORMED
    for computed in (0, 16, 48):
        assert plan.missing(asked, computed, prompt) == 1, "one token that the worker can't bring"
    plan.add(asked, 1, [3])
    (load,) = plan.take()
    assert load.prefix == MALFORMED and load.blocks == [3]


@pytest.mark.parametrize(("computed", "prompt"), [(0, 1), (48, 49), (16, 17)])
def test_vllm_always_has_a_token_to_compute(computed, prompt):
    """0 new tokens end vLLM with an assertion."""
    for params in ({"prefix": "x", "length": -1}, {"prefix": DIGEST, "length": prompt - 1}):
        found = Plan().missing(wanted(params, DIGEST, prompt), computed, prompt)
        assert found >= 0 and computed + found < prompt


def test_nothing_but_the_connector_needs_vllm_and_nothing_ptuning():
    for file in (REPO / "ptuning_vllm").glob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        names = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        names += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        tops = {name.partition(".")[0] for name in names}
        assert "ptuning" not in tops and ("vllm" not in tops or file.name == "connector.py")
