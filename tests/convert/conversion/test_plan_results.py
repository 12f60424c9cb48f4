"""A plan as a result: its text and JSON, and that planning changes nothing."""

import json

import pytest
import torch
from torch import nn

import adderkit
from adderkit.convert.conversion.config import AdderConfig
from adderkit.convert.conversion.plan import plan

IMAGE = torch.zeros(1, 3, 8, 8)


def test_to_dict_is_json(tiny, tiny_adders):
    result = plan(tiny(), example_input=IMAGE)
    mapping = json.loads(json.dumps(result.to_dict()))
    assert (mapping["converted"], mapping["skipped"], mapping["already_converted"]) == (3, 1, 0)
    assert [row["path"] for row in mapping["rows"]] == ["stem", *tiny_adders]
    assert AdderConfig.from_dict(mapping["config"]) == result.config


def test_text_has_a_line_for_each_row_and_a_sum(tiny):
    lines = str(plan(tiny(), example_input=IMAGE)).splitlines()
    assert len(lines) == 5
    assert lines[0].split() == ["stem", "skip", "first", "convolution"]
    assert lines[-1] == "3 of 4 convolutions become adder layers"


def test_converted_model_is_planned_on_shapes_alone(tiny):
    model, calls = tiny(), []
    adderkit.convert_(model, example_input=IMAGE)
    model.register_forward_hook(lambda *_: calls.append(1))
    plan(model, example_input=IMAGE)
    assert calls == []


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_model_is_left_untouched(tiny, images, snapshot, training):
    model, calls = tiny().train(training), []
    model.register_forward_hook(lambda *_: calls.append(1))
    before = snapshot(model)
    plan(model, example_input=images)
    assert snapshot(model) == before
    assert calls == []


def test_several_classifiers_are_kept():
    class TwoHeads(nn.Sequential):
        def get_classifier(self):
            return self[2], self[3]

    model = TwoHeads(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
    assert [row.reason for row in plan(model, example_input=IMAGE).rows[2:]] == ["classifier", "classifier"]
