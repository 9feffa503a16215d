"""transformers' own methods, on which the trainer is built, are those that it was compared with."""

import inspect
import tomllib
from pathlib import Path

import transformers
from packaging.specifiers import SpecifierSet
from transformers import Trainer

from ptuning.training import overrides
from ptuning.training.trainer import TuningTrainer
from tests.conftest import REPO


def test_nothing_has_changed():
    assert overrides.changed() == []


def test_a_change_is_named(monkeypatch):
    def _run_epoch(self):
        """Another one."""

    monkeypatch.setattr(Trainer, "_run_epoch", _run_epoch)
    monkeypatch.delattr(Trainer, "_load_best_model")
    assert overrides.changed() == [
        "Trainer._load_best_model is gone: compare ptuning/training/trainer.py with transformers/trainer.py, then update its "
        "hash in ptuning/training/overrides.py",
        "Trainer._run_epoch changed: compare ptuning/training/trainer.py with transformers/trainer.py, then update its hash in "
        f"ptuning/training/overrides.py to {overrides.digits_of(_run_epoch)}",
    ]


def test_every_overridden_method_is_listed():
    own = {name for name, value in vars(TuningTrainer).items() if inspect.isfunction(value) and hasattr(Trainer, name)}
    assert own == set(overrides.OVERRIDDEN)


def test_every_method_that_calls_an_overridden_private_one_is_listed():
    private = [name for name in overrides.OVERRIDDEN if name.startswith("_") and name != "__init__"]
    calling = {
        name
        for name, value in vars(Trainer).items()
        if inspect.isfunction(value) and any(f"self.{called}(" in inspect.getsource(value) for called in private)
    }
    assert calling <= set(overrides.OVERRIDDEN | overrides.CALLERS)


def test_the_pin_says_what_is_tested():
    project = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (pin,) = (text for text in project["dependencies"] if text.startswith("transformers"))
    allowed = SpecifierSet(pin.removeprefix("transformers"))
    major, minor, _ = overrides.TESTED.split(".")
    assert overrides.TESTED in allowed and f"{major}.{int(minor) + 1}.0" not in allowed
    assert f"transformers=={overrides.TESTED}\n" in Path(REPO / "requirements.lock").read_text(encoding="utf-8")
    assert transformers.__version__ == overrides.TESTED
