"""Which language people are spoken to in, and the tables of texts."""

import string

import pytest

from ptuning.config.names import WHY_WITHOUT, WITHOUT_EFFECT
from ptuning.errors import ConfigError
from ptuning.evaluation.metrics import METRICS, scores_table
from ptuning.language import columns, language, padded, speaking
from ptuning.messages import message
from ptuning.report.words import words
from ptuning.serving.words import words as serving
from ptuning.validation.words import words as validation
from tests.report.conftest import scores

PLACES = ("PTUNING_LANG", "LC_ALL", "LC_MESSAGES", "LANG")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "en"),
        ({"LANG": "zh_CN.UTF-8"}, "zh"),
        ({"LANG": "zh_TW"}, "zh"),
        ({"LANG": "de_DE.UTF-8"}, "en"),
        ({"LANG": "zh_CN.UTF-8", "LC_ALL": "C.UTF-8"}, "en"),
        ({"LANG": "en_US.UTF-8", "LC_MESSAGES": "zh_CN.UTF-8"}, "zh"),
        ({"LANG": "zh_CN.UTF-8", "LC_ALL": ""}, "zh"),
        ({"LANG": "zh_CN.UTF-8", "PTUNING_LANG": "en"}, "en"),
        ({"LANG": "C", "PTUNING_LANG": "zh"}, "zh"),
    ],
)
def test_the_environment_chooses(monkeypatch, environment, expected):
    for name in PLACES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert language() == expected


def test_a_language_that_is_not_there(monkeypatch):
    monkeypatch.setenv("PTUNING_LANG", "fr")
    with pytest.raises(ConfigError, match="PTUNING_LANG is 'fr' in the environment; there are zh and en"):
        message("report", file="x")


def test_a_block_chooses_and_gives_back():
    with speaking("zh"):
        assert message("report", file="x") == "报告：x"
        with speaking(None):
            assert language() == "zh"
    assert message("report", file="x") == "Report: x"


@pytest.mark.parametrize(
    "texts",
    [message, words, serving, validation, WHY_WITHOUT],
    ids=["messages", "report", "serving", "validation", "names"],
)
def test_both_languages_say_the_same(texts):
    def fields(text):
        return {name for _, name, _, _ in string.Formatter().parse(text) if name}

    for name, (chinese, english) in texts.table.items():
        assert chinese.strip() and english.strip(), name
        # English has a plural to form.
        assert fields(chinese) == fields(english) - {"es"}, name
        assert not any("\u3000" <= character <= "\u9fff" or "\uff00" <= character <= "\uffef" for character in english)


def test_each_flag_without_effect_has_its_reason():
    assert WHY_WITHOUT.table.keys() == WITHOUT_EFFECT.keys()


def test_columns_of_a_terminal():
    assert columns("损失 a") == 6
    assert padded("损失", 6) == "损失  " and padded("ab", 4, ">") == "  ab" and padded("损失", 2) == "损失"
    with speaking("zh"):
        table = scores_table({"base": scores(8, 40), "tuned": scores(44, 40)}).splitlines()
        assert table[0].split()[-1] == "条数" and table[1].startswith("基座")
    assert len({columns(line) for line in table}) == 1


def test_a_metric_without_a_chinese_label_keeps_its_own():
    with speaking("zh"):
        assert METRICS["cut"].title == "截断 %" and METRICS["bleu-4"].title == "BLEU-4"
    assert METRICS["cut"].title == "cut %"
