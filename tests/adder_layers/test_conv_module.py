"""``AdderConv2d`` in the place of ``nn.Conv2d``: construction, padding, saving, compiling, exporting."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from adderkit.adder_layers.conv import AdderConv2d
from adderkit.adder_layers.modules import AdderConv2dSame, NormalizedAdderConv2d, NormalizedAdderConv2dSame
from adderkit.adder_layers.reference import adder_conv2d_reference


def settings_of_conv2d():
    """Argument sets that ``nn.Conv2d`` accepts."""
    kernels, strides, dilations = [2, 3, (3, 5)], [1, (2, 3)], [1, (2, 1)]
    paddings, modes, groups = [0, 2, (0, 1), "same", "valid"], ["zeros", "circular"], [1, 2]
    for kernel, stride, dilation, padding, mode, group in itertools.product(
        kernels, strides, dilations, paddings, modes, groups
    ):
        if padding == "same" and stride != 1:
            continue
        yield {
            "kernel_size": kernel,
            "stride": stride,
            "dilation": dilation,
            "padding": padding,
            "padding_mode": mode,
            "groups": group,
        }


def readable(arguments):
    return "-".join(f"{name}={value}" for name, value in arguments.items())


def small_model():
    return nn.Sequential(
        AdderConv2d(4, 8, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        AdderConv2d(8, 8, 2, padding="same", groups=8),
        nn.BatchNorm2d(8),
        AdderConv2d(8, 4, 3, padding=1, padding_mode="circular"),
    )


def randomized(layer):
    """Biases start at zero; draw them too, so that a lost bias shows."""
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


# Construction


def test_is_a_conv2d_with_the_same_parameters():
    arguments = {"kernel_size": (3, 2), "groups": 2}
    layer, convolution = AdderConv2d(4, 6, **arguments), nn.Conv2d(4, 6, **arguments)
    assert isinstance(layer, nn.Conv2d)
    assert {name: value.shape for name, value in layer.state_dict().items()} == {
        name: value.shape for name, value in convolution.state_dict().items()
    }
    assert AdderConv2d(4, 6, 3, bias=False).bias is None


def test_loads_the_weights_of_a_conv2d():
    layer, convolution = AdderConv2d(4, 6, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)
    layer.load_state_dict(convolution.state_dict())
    input = torch.randn(2, 4, 5, 5)
    expected = adder_conv2d_reference(input, convolution.weight, convolution.bias, padding=1)
    torch.testing.assert_close(layer(input), expected)


def test_fresh_weights_are_standard_normal_and_bias_is_zero():
    layer = AdderConv2d(64, 64, 3)
    weight = layer.weight.detach()
    # Five standard errors of 36,864 draws; a convolution's own start has a deviation of 0.024.
    assert abs(weight.mean()) < 5 / weight.numel() ** 0.5
    assert abs(weight.std() - 1) < 5 / (2 * weight.numel()) ** 0.5
    assert torch.equal(layer.bias, torch.zeros(64))


def test_reset_parameters_draws_again():
    layer = AdderConv2d(16, 16, 3)
    before = layer.weight.detach().clone()
    nn.init.ones_(layer.bias)
    layer.reset_parameters()
    assert not torch.equal(layer.weight, before)
    assert torch.equal(layer.bias, torch.zeros(16))


def test_dtype_argument():
    layer = AdderConv2d(3, 4, 3, dtype=torch.float64)
    assert layer.weight.dtype == layer.bias.dtype == torch.float64
    assert layer(torch.randn(1, 3, 5, 5, dtype=torch.float64)).dtype == torch.float64


def test_device_argument():
    layer = AdderConv2d(3, 4, 3, device="meta")
    assert layer.weight.is_meta
    assert layer.bias.is_meta
    assert layer(torch.empty(2, 3, 5, 5, device="meta")).shape == (2, 4, 3, 3)


def test_repr():
    assert repr(AdderConv2d(3, 8, 3, stride=2, padding=1, bias=False)) == (
        "AdderConv2d(3, 8, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), bias=False)"
    )


# Shapes and padding modes


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize("arguments", list(settings_of_conv2d()), ids=readable)
def test_output_has_the_shape_of_conv2d(arguments):
    input = torch.randn(1, 2, 7, 8)
    expected = nn.Conv2d(2, 2, **arguments)(input).shape
    assert AdderConv2d(2, 2, **arguments)(input).shape == expected


@pytest.mark.parametrize("mode", ["reflect", "circular", "replicate"])
@pytest.mark.parametrize(
    ("padding", "kernel", "sides"),
    [
        (2, 3, (2, 2, 2, 2)),
        ((1, 3), 3, (3, 3, 1, 1)),
        ("same", 3, (1, 1, 1, 1)),
        ("same", (2, 4), (1, 2, 0, 1)),
        ("valid", 3, (0, 0, 0, 0)),
    ],
    ids=["number", "pair", "same-odd", "same-even", "valid"],
)
def test_padding_modes_pad_before_the_layer(results, assert_close, mode, padding, kernel, sides):
    layer = randomized(AdderConv2d(3, 4, kernel, padding=padding, padding_mode=mode, dtype=torch.float64))
    input = torch.randn(2, 3, 6, 7, dtype=torch.float64)

    def ours(input, weight, bias):
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, input)

    def reference(input, weight, bias):
        return adder_conv2d_reference(F.pad(input, sides, mode=mode), weight, bias)

    tensors = input, layer.weight, layer.bias
    for actual, expected in zip(results(ours, *tensors), results(reference, *tensors), strict=True):
        assert_close(actual, expected)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular", "replicate"])
def test_unbatched_input(mode):
    layer = randomized(AdderConv2d(3, 4, 3, padding=1, padding_mode=mode))
    input = torch.randn(3, 6, 5)
    assert torch.equal(layer(input), layer(input[None])[0])


def test_wrong_channels_are_named():
    with pytest.raises(ValueError, match=r"input has 5 channels .*expected 3"):
        AdderConv2d(3, 4, 3)(torch.zeros(1, 5, 6, 6))


# Copying, saving, compiling, exporting


def test_state_dict_round_trip(tmp_path):
    layer, other = randomized(AdderConv2d(3, 4, 3)), AdderConv2d(3, 4, 3)
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    other.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True))
    input = torch.randn(1, 3, 5, 5)
    assert torch.equal(layer(input), other(input))


def test_deepcopy_is_equal_and_independent():
    layer = randomized(AdderConv2d(3, 4, 3))
    duplicate = copy.deepcopy(layer)
    input = torch.randn(1, 3, 5, 5)
    expected = layer(input)
    nn.init.zeros_(layer.weight)
    assert torch.equal(duplicate(input), expected)


def output_and_gradients(model, runner, input):
    leaf = input.clone().requires_grad_()
    output = runner(leaf)
    grads = torch.autograd.grad(output.square().sum(), [leaf, *model.parameters()])
    return [output, *grads]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_in_one_graph_gives_equal_outputs_and_gradients(dynamic):
    torch._dynamo.reset()
    model = randomized(small_model()).eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for batch in (2, 3):
        input = torch.randn(batch, 4, 8, 8)
        expected = output_and_gradients(model, model, input)
        torch.testing.assert_close(output_and_gradients(model, compiled, input), expected)


def test_compile_under_autocast():
    torch._dynamo.reset()
    layer = randomized(AdderConv2d(3, 4, 3, padding=1))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    input = torch.randn(2, 3, 6, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = compiled(input.bfloat16())
    assert output.dtype == torch.float32
    torch.testing.assert_close(output, layer(input.bfloat16().float()))


def test_export_with_a_free_batch_size():
    model = randomized(small_model()).eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (torch.randn(2, 4, 8, 8),), dynamic_shapes=({0: batch},))
    operators = {node.target for node in program.graph.nodes if node.op == "call_function"}
    assert torch.ops.adderkit.adder_conv2d.default in operators
    input = torch.randn(5, 4, 8, 8)
    torch.testing.assert_close(program.module()(input), model(input))


def test_sharpness_changes_the_input_gradient_and_nothing_else():
    layer = AdderConv2d(3, 4, 3, padding=1, dtype=torch.float64)
    input = torch.randn(2, 3, 6, 6, dtype=torch.float64, requires_grad=True)
    plain = layer(input)
    (plain_grad,) = torch.autograd.grad(plain.sum(), layer.weight)
    layer.sharpness = 1024.0
    sharp = layer(input)
    input_grad, weight_grad = torch.autograd.grad(sharp.sum(), (input, layer.weight))
    assert torch.equal(sharp, plain)
    torch.testing.assert_close(weight_grad, 1024 * plain_grad)
    columns = torch.nn.functional.unfold(input, 3, padding=1)[:, None]
    slopes = (1024 * (layer.weight.reshape(1, 4, -1, 1) - columns)).clamp(-1, 1).sum(1)
    torch.testing.assert_close(input_grad, torch.nn.functional.fold(slopes, (6, 6), 3, padding=1))
    assert torch.equal(layer.eval()(input), plain)


@pytest.mark.parametrize("mixed", [True, False], ids=["autocast", "float16"])
def test_sharpness_has_room_in_float16(mixed):
    """100 times 1024 is beyond float16, and so is the sum of such distances."""
    layer = AdderConv2d(3, 4, 3, padding=1, dtype=None if mixed else torch.float16)
    input = (100 * torch.randn(2, 3, 6, 6)).half().requires_grad_()
    grad = torch.randn(2, 4, 6, 6)
    with torch.autocast("cpu", dtype=torch.float16, enabled=mixed):
        plain = layer(input)
        layer.sharpness = 1024.0
        sharp = layer(input)
    sharp.backward(grad.to(sharp.dtype))
    assert sharp.dtype == plain.dtype
    assert torch.equal(sharp, plain)
    assert input.grad.isfinite().all()


# torch.fx


@pytest.fixture
def traceable():
    """A network of every kind of adder layer."""
    model = nn.Sequential(
        AdderConv2d(3, 4, 3, padding=1, bias=True),
        AdderConv2dSame(4, 4, 3, stride=2),
        NormalizedAdderConv2d(4, 4, 3, padding="same", padding_mode="reflect"),
        NormalizedAdderConv2dSame(4, 4, 3, stride=2),
    )
    model[2].insert_normalization_()
    model[3].insert_normalization_()
    return model.eval()


@pytest.mark.parametrize("training", [False, True])
def test_the_default_tracer_keeps_layers_whole(traceable, training):
    traceable.train(training)
    for layer in traceable:
        layer.sharpness = 4.0
    images = torch.randn(2, 3, 9, 9)
    traced = torch.fx.symbolic_trace(traceable)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["0", "1", "2", "3"]
    assert all(traced.get_submodule(str(index)) is traceable[index] for index in range(4))
    assert torch.equal(traced(images), traceable(images))
