"""The record of a model replayed on a freshly built base: the same network, or a refusal with its cause."""

import json

import pytest
import torch
from torch import nn

from adderkit.adder_layers.conv import AdderConv2d
from adderkit.adder_layers.modules import adder_layers
from adderkit.convert.checkpoint.replay import replay
from adderkit.convert.conversion.config import AdderConfig
from adderkit.convert.conversion.rewrite import convert_, revert_
from adderkit.convert.conversion.targets import is_converted
from adderkit.convert.errors import CheckpointError
from adderkit.convert.record import transforms_of

IMAGE = torch.zeros(1, 3, 8, 8)


def converted(model, config=AdderConfig()):  # noqa: B008 - frozen
    convert_(model, config, example_input=IMAGE)
    return model


def test_replay_makes_the_same_network(tiny, images):
    model, fresh = converted(tiny()), tiny()
    replay(json.loads(json.dumps(transforms_of(model))), lambda: fresh)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(images), model(images))
    assert transforms_of(fresh) == transforms_of(model)


def test_replay_after_partial_revert(tiny):
    model, fresh = converted(converted(tiny(), AdderConfig(include=("grouped",)))), tiny()
    revert_(model, ("depthwise",))
    replay(transforms_of(model), lambda: fresh)
    assert list(adder_layers(fresh)) == ["grouped", "pointwise"]


def test_replay_of_nothing(tiny):
    model = tiny()
    replay([], lambda: model)
    assert not is_converted(model)


def test_replay_on_a_root_convolution():
    model = nn.Conv2d(3, 4, 3)
    replay([{"kind": "adder", "version": 1, "modules": [""]}], lambda: model)
    assert isinstance(model, AdderConv2d)


GOOD = {"kind": "adder", "version": 1, "modules": ["grouped"]}


@pytest.mark.parametrize(
    ("transforms", "message"),
    [
        ([{"kind": "nonsense", "version": 1}], "unknown transform"),
        ([{}], "unknown transform"),
        (["adder"], "unknown transform"),
        ([None], "unknown transform"),
        ({"kind": "adder"}, "unknown transform"),
        (7, "transforms"),
        (None, "transforms"),
        ([{**GOOD, "version": 2}], "version 2, expected 1"),
        ([{"kind": "adder", "modules": ["grouped"]}], "version None"),
        ([{**GOOD, "modules": "grouped"}], "expected a list of module paths"),
        ([{**GOOD, "modules": [1]}], "expected a list of module paths"),
        ([{**GOOD, "modules": None}], "expected a list of module paths"),
        ([{**GOOD, "modules": {"grouped": 1}}], "expected a list of module paths"),
        ([{**GOOD, "modules": ["grouped", "nowhere"]}], "'nowhere' does not exist"),
        ([{**GOOD, "modules": ["grouped", "norm1"]}], "'norm1' is a BatchNorm2d"),
        ([{**GOOD, "modules": [""]}], "is a TinyNet"),
        ([GOOD, {"kind": "nonsense"}], "unknown transform"),
    ],
    ids=[
        "unknown",
        "empty",
        "string",
        "none",
        "mapping-for-list",
        "transforms-number",
        "transforms-none",
        "version",
        "no-version",
        "modules-string",
        "modules-numbers",
        "modules-none",
        "modules-mapping",
        "missing-path",
        "no-convolution",
        "root",
        "good-then-unknown",
    ],
)
def test_replay_refuses_and_changes_nothing(tiny, snapshot, transforms, message):
    model = tiny()
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=message):
        replay(transforms, lambda: model)
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("second", "message"),
    [(["grouped"], "'grouped' is converted twice"), (["nowhere"], "'nowhere' does not exist")],
    ids=["twice", "missing-path"],
)
def test_replay_refuses_a_later_transform_that_does_not_fit(tiny, second, message):
    with pytest.raises(CheckpointError, match=message):
        replay([GOOD, {**GOOD, "modules": second}], tiny)


@pytest.mark.parametrize("kind", ["fake_quantize", "quantize"])
def test_nothing_follows_a_quantization(tiny, kind):
    last = {"kind": kind, "version": 1, "image": [3, 8, 8], "config": {}}
    with pytest.raises(CheckpointError, match=f"the '{kind}' transform is not the last"):
        replay([last, GOOD], tiny)
