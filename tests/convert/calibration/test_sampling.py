"""Samples of a layer's windows and outputs, against ``F.unfold`` and whole forward passes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from adderkit.convert.calibration.sampling import (
    draw_positions,
    layer_inputs,
    layer_outputs,
    sample_windows,
    windows_at,
)

LAYERS = {
    "1x1": {"kernel_size": 1},
    "3x3-padding1": {"kernel_size": 3, "padding": 1},
    "stride": {"kernel_size": 3, "stride": (2, 3), "padding": (1, 2)},
    "dilation": {"kernel_size": 3, "dilation": (2, 1), "padding": 2},
    "non-square": {"kernel_size": (2, 5), "stride": (1, 2)},
    "groups2": {"kernel_size": 3, "groups": 2, "padding": 1},
    "depthwise": {"kernel_size": 3, "groups": 4, "stride": 2},
    "same": {"kernel_size": 3, "padding": "same", "dilation": 2},
    "same-even": {"kernel_size": (2, 4), "padding": "same"},
    "valid": {"kernel_size": 3, "padding": "valid"},
    "reflect": {"kernel_size": 3, "padding": (1, 2), "padding_mode": "reflect"},
    "circular-same": {"kernel_size": 3, "padding": "same", "padding_mode": "circular"},
    "replicate": {"kernel_size": 3, "padding": 1, "padding_mode": "replicate", "groups": 2},
}

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")


@pytest.fixture(params=LAYERS.values(), ids=LAYERS.keys())
def layer(request):
    return nn.Conv2d(4, 8, bias=False, dtype=torch.float64, **request.param)


def unfolded(layer, input):
    """``[N, C · kh · kw, L]``: torch's own windows of the padded input."""
    padding, (height, width) = layer.padding, layer.kernel_size
    if padding == "valid":
        sides = (0, 0, 0, 0)
    elif padding == "same":
        down, right = layer.dilation[0] * (height - 1), layer.dilation[1] * (width - 1)
        sides = (right // 2, right - right // 2, down // 2, down - down // 2)
    else:
        sides = (padding[1], padding[1], padding[0], padding[0])
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return F.unfold(F.pad(input, sides, mode=mode), (height, width), layer.dilation, 0, layer.stride)


def test_windows_are_the_columns_of_unfold(layer):
    input = torch.randn(3, 4, 9, 10, dtype=torch.float64)
    columns = unfolded(layer, input)
    positions = torch.randint(columns.shape[2], (3, 7))
    actual = windows_at(input, layer, positions)
    assert actual.shape == (layer.groups, 21, 4 // layer.groups * layer.weight[0, 0].numel())
    for image in range(3):
        for sample in range(7):
            expected = columns[image, :, positions[image, sample]].reshape(layer.groups, -1)
            assert torch.equal(actual[:, image * 7 + sample], expected)


@torch.no_grad()
def test_windows_times_weights_are_the_outputs(layer):
    input = torch.randn(3, 4, 9, 10, dtype=torch.float64)
    output = layer(input)
    positions = torch.randint(output[0, 0].numel(), (3, 7))
    weight = layer.weight.reshape(layer.groups, 8 // layer.groups, -1)
    products = windows_at(input, layer, positions) @ weight.transpose(1, 2)  # [G, S, O / G]
    outputs = layer_outputs(nn.Sequential(layer), {"0": positions}, list(input.split(2)))["0"]
    torch.testing.assert_close(products, outputs)


@torch.no_grad()
def test_outputs_are_gathered_from_a_whole_pass(tiny):
    model, images = tiny(), torch.randn(5, 3, 8, 8)
    positions = {path: torch.randint(16, (5, 3)) for path in ("grouped", "pointwise")}
    whole = {}
    for path in positions:
        model.get_submodule(path).register_forward_hook(lambda _, __, y, path=path: whole.update({path: y}))
    model(images)
    expected = dict(whole)
    actual = layer_outputs(model, positions, list(images.split(2)))
    for path, groups in (("grouped", 2), ("pointwise", 1)):
        for image in range(5):
            for sample in range(3):
                pixel = expected[path][image].flatten(1)[:, positions[path][image, sample]]
                torch.testing.assert_close(actual[path][:, 3 * image + sample].flatten(), pixel)
        assert actual[path].shape[:2] == (groups, 15)


def layer_windows(model, path, batches, positions):
    return sample_windows(model.get_submodule(path), layer_inputs(model, path, batches), positions)


@torch.no_grad()
def test_layer_windows_are_those_of_the_real_input(tiny):
    model, images = tiny(), torch.randn(5, 3, 8, 8)
    positions = torch.randint(16, (5, 3))
    input = model.norm1(model.grouped(model.norm0(model.stem(images)).relu())).relu()
    expected = windows_at(input, model.depthwise, positions)
    actual = layer_windows(model, "depthwise", list(images.split(2)), positions)
    torch.testing.assert_close(actual, expected)


def test_layer_windows_run_the_model_no_further(tiny, images):
    model, called = tiny(), []
    for path in ("stem", "grouped", "depthwise", "head"):
        model.get_submodule(path).register_forward_hook(lambda *_, path=path: called.append(path))
    layer_windows(model, "depthwise", [images], torch.zeros(4, 1, dtype=torch.long))
    assert called == ["stem", "grouped"]


def test_hooks_are_gone_afterwards(tiny, images, snapshot):
    model = tiny()
    before = snapshot(model)
    positions = torch.zeros(4, 1, dtype=torch.long)
    layer_windows(model, "grouped", [images], positions)
    layer_outputs(model, {"grouped": positions}, [images])
    with pytest.raises(RuntimeError):
        layer_windows(model, "grouped", [images[:, :2]], positions)
    with pytest.raises(RuntimeError):
        layer_outputs(model, {"grouped": positions}, [images[:, :2]])
    assert snapshot(model) == before


def test_positions_lie_in_the_output_and_follow_the_seed():
    positions = draw_positions((1, 8, 3, 5), 200, 4, torch.Generator().manual_seed(1))
    assert positions.shape == (200, 4)
    assert sorted(set(positions.flatten().tolist())) == list(range(15))
    assert torch.equal(positions, draw_positions((1, 8, 3, 5), 200, 4, torch.Generator().manual_seed(1)))
