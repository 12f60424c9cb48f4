"""The record of transforms: kept apart from callers, read for the form of a model, and a reason to refuse a verb."""

import pytest
from torch import nn

from adderkit.convert.errors import AdderkitError, CheckpointError
from adderkit.convert.record import (
    check_version,
    forget_,
    model_form,
    record_,
    require_float,
    require_float_weights,
    transforms_of,
)


def recorded(*kinds):
    model = nn.Identity()
    for kind in kinds:
        record_(model, {"kind": kind, "version": 1})
    return model


def test_a_model_without_a_record():
    assert transforms_of(nn.Identity()) == []


def test_the_record_cannot_be_changed_from_outside():
    model = nn.Identity()
    record_(model, {"kind": "adder", "version": 1, "modules": ["a"]})
    transforms_of(model)[0]["modules"].clear()
    assert transforms_of(model) == [{"kind": "adder", "version": 1, "modules": ["a"]}]


def test_forgetting_touches_only_the_kinds_that_are_named():
    model = nn.Identity()
    record_(model, {"kind": "plain", "modules": ["a"]})
    record_(model, {"kind": "adder", "modules": ["a", "b"], "folded": ["a"], "normalized": ["b"]})
    record_(model, {"kind": "adder", "modules": ["c"]})
    record_(model, {"kind": "prune", "shapes": {"a": [1]}})
    assert forget_(model, {"a", "c"}, ("adder",)) == ["a"]
    assert transforms_of(model) == [
        {"kind": "plain", "modules": ["a"]},
        {"kind": "adder", "modules": ["b"], "normalized": ["b"]},
        {"kind": "prune", "shapes": {"a": [1]}},
    ]


@pytest.mark.parametrize(
    ("kinds", "form"),
    [
        ((), "float"),
        (("prune", "adder"), "float"),
        (("adder", "fake_quantize"), "fake_quantized"),
        (("adder", "quantize"), "integer"),
    ],
)
def test_form(kinds, form):
    assert model_form(recorded(*kinds)) == form


def test_require_float():
    require_float(recorded("adder"), "pruned", "prune the other")
    with pytest.raises(AdderkitError, match="the model is quantized and cannot be pruned: prune the other"):
        require_float(recorded("quantize"), "pruned", "prune the other")
    with pytest.raises(AdderkitError, match="quantization-aware training and cannot be pruned: prune the other"):
        require_float(recorded("fake_quantize"), "pruned", "prune the other")


def test_require_float_weights():
    require_float_weights(recorded("fake_quantize"), "trained", "train the other")
    with pytest.raises(AdderkitError, match="the model is quantized and cannot be trained: train the other"):
        require_float_weights(recorded("quantize"), "trained", "train the other")


@pytest.mark.parametrize("version", [None, 2, "1"])
def test_another_version_is_refused(version):
    with pytest.raises(CheckpointError, match=r"the 'adder' transform has version .*, expected 1: install a newer"):
        check_version({"kind": "adder", "version": version}, 1)
