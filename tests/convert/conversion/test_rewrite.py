"""Conversion in place and back again: what changes, and all that must not."""

import contextlib
import copy
import json

import pytest
import torch
from torch import nn

from adderkit.adder_layers.conv import AdderConv2d
from adderkit.adder_layers.modules import adder_layers
from adderkit.convert.conversion.config import AdderConfig
from adderkit.convert.conversion.plan import plan
from adderkit.convert.conversion.rewrite import convert_, revert_
from adderkit.convert.conversion.targets import is_converted
from adderkit.convert.errors import AdderkitError, NoModuleMatchedError
from adderkit.convert.record import transforms_of

IMAGE = torch.zeros(1, 3, 8, 8)


def converted(model, config=AdderConfig()):  # noqa: B008 - frozen
    convert_(model, config, example_input=IMAGE)
    return model


def shared_net():
    """One convolution under two names, called twice."""
    conv = nn.Conv2d(4, 4, 3, padding=1)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        conv,
        nn.BatchNorm2d(4),
        conv,
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.Linear(256, 2),
    ).eval()


# What a conversion does


def test_outputs_are_those_of_the_formula(tiny, tiny_adders, images, by_reference):
    model = tiny().double()
    expected = by_reference(model, tiny_adders)(images.double())
    assert not torch.allclose(model(images.double()), expected)
    torch.testing.assert_close(converted(model)(images.double()), expected, rtol=1e-12, atol=1e-12)


def test_outputs_of_a_timm_model(resnet20, gray_images, by_reference):
    model = resnet20().double()
    paths = plan(model).paths("convert")
    expected = by_reference(model, paths)(gray_images.double())
    convert_(model)
    torch.testing.assert_close(model(gray_images.double()), expected, rtol=1e-10, atol=1e-10)


def test_returns_the_plan_and_keeps_a_record(tiny, tiny_adders):
    model, config = tiny(), AdderConfig(exclude=("stem",))
    expected = plan(model, config, example_input=IMAGE)
    assert convert_(model, config, example_input=IMAGE) == expected
    assert is_converted(model)
    assert list(adder_layers(model)) == tiny_adders
    assert transforms_of(model) == [{"kind": "adder", "version": 1, "modules": tiny_adders, "config": config.to_dict()}]
    assert json.loads(json.dumps(transforms_of(model))) == transforms_of(model)


def test_a_plan_is_carried_out_as_it_is(tiny):
    model = tiny()
    todo = plan(model, filter_fn=lambda _, path: path == "pointwise", example_input=IMAGE)
    assert convert_(model, todo) is todo
    assert list(adder_layers(model)) == ["pointwise"]


def test_filter_is_heard_without_a_plan(tiny):
    model = tiny()
    convert_(model, filter_fn=lambda _, path: path == "grouped", example_input=IMAGE)
    assert list(adder_layers(model)) == ["grouped"]


def test_converting_again_changes_nothing(tiny, snapshot):
    model = converted(tiny())
    before = snapshot(model)
    converted(model)
    assert snapshot(model) == before


def test_the_same_plan_twice_leaves_one_record(tiny, snapshot):
    model = tiny()
    todo = convert_(model, example_input=IMAGE)
    before = snapshot(model)
    with contextlib.suppress(AdderkitError):
        convert_(model, todo)
    assert snapshot(model) == before


def test_second_conversion_takes_what_is_left(tiny, tiny_adders):
    model = converted(tiny(), AdderConfig(include=("grouped",)))
    converted(model)
    assert [transform["modules"] for transform in transforms_of(model)] == [["grouped"], ["depthwise", "pointwise"]]
    assert list(adder_layers(model)) == tiny_adders


def test_record_cannot_be_changed_from_outside(tiny):
    model = converted(tiny())
    transforms_of(model)[0]["modules"].clear()
    assert len(transforms_of(model)[0]["modules"]) == 3


# What must survive


def test_modules_and_parameters_are_the_same_objects(tiny):
    model = tiny()
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    converted(model)
    assert dict(model.named_modules()) == modules
    assert all(parameters[name] is value for name, value in model.named_parameters())


def test_optimizer_keeps_working(tiny, images):
    model = tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    converted(model)
    before = model.depthwise.weight.detach().clone()
    model(images).sum().backward()
    optimizer.step()
    assert not torch.equal(model.depthwise.weight, before)


def test_state_dict_keeps_keys_and_values(tiny):
    model = tiny()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    after = converted(model).state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_modes_of_each_module(tiny, training):
    model = tiny().train(training)
    model.grouped.train(not training)
    model.norm2.train(not training)
    before = {path: module.training for path, module in model.named_modules()}
    converted(model)
    assert {path: module.training for path, module in model.named_modules()} == before


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_dtype(tiny, images, dtype):
    model = converted(tiny().to(dtype))
    assert model.grouped.weight.dtype == dtype
    assert model(images.to(dtype)).dtype == dtype


def test_device(tiny, images):
    model = converted(tiny().to("meta"))
    assert model.grouped.weight.is_meta
    assert model(images.to("meta")).shape == (4, 5)


def test_frozen_parameters_stay_frozen(tiny):
    model = tiny()
    model.grouped.weight.requires_grad_(False)
    converted(model)
    assert {name for name, value in model.named_parameters() if not value.requires_grad} == {"grouped.weight"}


def test_hooks_are_still_called(tiny, images):
    model, calls = tiny(), []
    model.grouped.register_forward_pre_hook(lambda *_: calls.append("before"))
    model.grouped.register_forward_hook(lambda *_: calls.append("after"))
    converted(model)
    assert calls == []
    model(images)
    assert calls == ["before", "after"]


def test_buffers_of_a_convolution_survive(tiny):
    model = tiny()
    model.grouped.register_buffer("mask", torch.arange(3.0))
    converted(model)
    assert torch.equal(model.grouped.mask, torch.arange(3.0))
    assert "grouped.mask" in model.state_dict()


def test_memory_format(tiny):
    model = converted(tiny().to(memory_format=torch.channels_last))
    assert model.grouped.weight.is_contiguous(memory_format=torch.channels_last)


def test_shared_modules_stay_shared(images, by_reference):
    model = shared_net()
    expected = by_reference(model, ["2"])(images)
    convert_(model, example_input=IMAGE)
    assert model[2] is model[4]
    assert isinstance(model[4], AdderConv2d)
    assert transforms_of(model)[0]["modules"] == ["2"]
    torch.testing.assert_close(model(images), expected)


def test_deepcopy_keeps_layers_and_record(tiny, images):
    model = converted(tiny())
    twin = copy.deepcopy(model)
    assert transforms_of(twin) == transforms_of(model)
    assert torch.equal(twin(images), model(images))
    revert_(twin)
    assert is_converted(model)
    assert len(transforms_of(model)) == 1


def test_root_convolution_has_no_normalization(snapshot):
    model = nn.Conv2d(3, 4, 3)
    before = snapshot(model)
    with pytest.raises(NoModuleMatchedError, match="no normalization follows"):
        convert_(model, AdderConfig(skip_first=False, skip_last=False, norm="skip"), example_input=IMAGE)
    assert snapshot(model) == before


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model, "pointwise", nn.Linear(8, 6)),
        lambda model: delattr(model, "pointwise"),
    ],
    ids=["another-class", "missing"],
)
def test_plan_for_another_model_is_refused_whole(tiny, snapshot, change):
    todo, other = plan(tiny(), example_input=IMAGE), tiny()
    change(other)
    before = snapshot(other)
    with pytest.raises(AdderkitError, match=r"'pointwise' .*not for this model"):
        convert_(other, todo)
    assert snapshot(other) == before


# Back again


def test_revert_gives_back_the_convolutional_network(tiny, images, snapshot):
    model = tiny()
    expected, before = model(images), snapshot(model)
    converted(model)
    assert revert_(model) == 3
    assert torch.equal(model(images), expected)
    assert not is_converted(model)
    assert transforms_of(model) == []
    assert snapshot(model)["classes"] == before["classes"]


def test_revert_keeps_the_weights_of_now(tiny):
    model = converted(tiny())
    nn.init.constant_(model.pointwise.weight, 0.5)
    revert_(model)
    assert torch.equal(model.pointwise.weight, torch.full((6, 8, 1, 1), 0.5))


def test_revert_by_pattern(tiny):
    model = converted(tiny())
    assert revert_(model, ("re:(group|depth).*",)) == 2
    assert type(model.grouped) is type(model.depthwise) is nn.Conv2d
    assert list(adder_layers(model)) == ["pointwise"]
    assert [transform["modules"] for transform in transforms_of(model)] == [["pointwise"]]


def test_revert_drops_a_record_that_is_empty(tiny):
    model = converted(converted(tiny(), AdderConfig(include=("grouped",))))
    revert_(model, ("grouped",))
    assert [transform["modules"] for transform in transforms_of(model)] == [["depthwise", "pointwise"]]


def test_revert_shared_module():
    model = shared_net()
    convert_(model, example_input=IMAGE)
    assert revert_(model) == 1
    assert type(model[4]) is nn.Conv2d
    assert transforms_of(model) == []


def test_revert_of_what_is_not_converted(tiny):
    with pytest.raises(NoModuleMatchedError, match="not converted"):
        revert_(tiny())


def test_revert_without_a_match(tiny, snapshot):
    model = converted(tiny())
    before = snapshot(model)
    with pytest.raises(NoModuleMatchedError, match="'stem' matches none of 3 converted layers"):
        revert_(model, ("stem",))
    assert snapshot(model) == before


def test_plan_for_other_shapes_is_refused(tiny, snapshot):
    narrow, wide = (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, out, 3), nn.Conv2d(out, 4, 3)) for out in (4, 6))
    made, before = plan(narrow, example_input=IMAGE), snapshot(wide)
    with pytest.raises(NoModuleMatchedError, match=r"'1' has 4 to 6 channels .*expected 4 to 4 .*not for this model"):
        convert_(wide, made)
    assert snapshot(wide) == before
