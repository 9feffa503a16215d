"""A small GLM-4 in its original format: tuned, evaluated, loaded, served."""

import pytest

from tests.end_to_end.small_family import ASKED, METHODS, answer, check_and_load, generated, serving, tune
from tests.tiny_chatglm4 import write_folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("original"))


@pytest.fixture(scope="module")
def tuned(base, tmp_path_factory):
    return tune(base, tmp_path_factory, steps=12)


@pytest.mark.works("chatglm4", "prefix", "LoRA")
@pytest.mark.parametrize("method", METHODS)
def test_train_evaluate_and_load(tuned, base, method):
    model = check_and_load(tuned[method], base, method, "chatglm4", "glm4")
    assert model.config.rope_parameters["rope_theta"] == 5e6


@pytest.mark.works("chatglm4", "engine")
def test_serving(base, tuned):
    with serving(base, tuned["prefix"]) as client:
        found = {name: answer(client, name, ASKED) for name in ("base", "p")}
    assert found == {"base": generated(base, None), "p": generated(base, tuned["prefix"])}
    assert found["base"] != found["p"]
