"""What a pruning's configuration takes, refuses, writes and reads."""

import json

import pytest

from adderkit import PruneConfig
from adderkit.convert.errors import AdderkitError
from adderkit.convert.pruning.config import parse_target


def test_round_trip_through_json():
    config = PruneConfig(
        target="mults=40%", importance="taylor", global_pruning=True, round_to=8, iterative=3, ignore=("a.*",), seed=7
    )
    assert PruneConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "either a ratio"),
        ({"ratio": 0.5, "target": "adds=50%"}, "either a ratio"),
        ({"ratio": 0}, "ratio is 0"),
        ({"ratio": 1.0}, "ratio is 1.0"),
        ({"ratio": True}, "ratio is True"),
        ({"ratio": "0.5"}, "ratio is '0.5'"),
        ({"ratio": float("nan")}, "ratio is nan"),
        ({"target": "adds=0%"}, "target is 'adds=0%'"),
        ({"target": "adds=100%"}, "target is"),
        ({"target": "flops=50%"}, "target is"),
        ({"target": 5}, "target is 5"),
        ({"ratio": 0.5, "importance": "l1"}, "importance is 'l1'"),
        ({"ratio": 0.5, "round_to": 0}, "round_to is 0"),
        ({"ratio": 0.5, "iterative": 1.5}, "iterative is 1.5"),
        ({"ratio": 0.5, "seed": -1}, "seed is -1"),
        ({"ratio": 0.5, "global_pruning": 1}, "global_pruning is 1"),
        ({"ratio": 0.5, "ignore": "layer1"}, "ignore is 'layer1'"),
        ({"ratio": 0.5, "ignore": ("re:(",)}, "not a regular expression"),
    ],
)
def test_wrong_values_are_named(values, message):
    with pytest.raises(AdderkitError, match=message):
        PruneConfig(**values)


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"ratio": 0.5, "version": 99}, "version 99"),
        ({"ratio": 0.5, "rounds": 3}, "unknown key 'rounds'"),
        ({"ratio": 0.5, "ignore": 3}, "ignore is 3"),
    ],
)
def test_foreign_mappings_are_refused(mapping, message):
    with pytest.raises(AdderkitError, match=message):
        PruneConfig.from_dict(mapping)


def test_a_target_says_what_is_left():
    assert parse_target(" energy=12.5% ") == ("energy", 0.125)
