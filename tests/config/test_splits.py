"""Splits as given on the command line."""

import pytest

from speechllm.config.splits import parse_splits
from speechllm.errors import ConfigError


def test_names_and_patterns_keep_their_order():
    assert list(parse_splits(["b=data/b", "a=x=y/*.tar"]).items()) == [
        ("b", "data/b"),
        ("a", "x=y/*.tar"),
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["test"], "'test': write it as NAME=DIR_OR_GLOB"),
        (["test="], "write it as NAME=DIR_OR_GLOB"),
        (["=data"], "'': a split's name"),
        (["a/b=data"], "'a/b': a split's name is a plain name"),
        ([".a=data"], "'.a': a split's name is a plain name"),
        (["a=x", "b=y", "a=z"], "'a' is given twice"),
    ],
)
def test_others_are_refused(words, said):
    with pytest.raises(ConfigError) as refused:
        parse_splits(words)
    assert said in str(refused.value)
