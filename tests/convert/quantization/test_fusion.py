"""Models cut into stages: what the stages compute is what the model's own forward does, and each is as wide as it can.

Whole networks in integers are in ``test_quantize.py``; these are small ones with one difficulty each.
"""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import adderkit
from adderkit.convert.errors import AdderkitError
from adderkit.convert.quantization.fake_quantize import carry_out
from adderkit.convert.quantization.fusion import Stages, stages_of

IMAGE = (3, 9, 7)
INFINITE = math.inf


class Net(nn.Module):
    """Two convolutions with their BatchNorms, and a classifier; ``body`` says what is done with them."""

    def __init__(self, body):
        super().__init__()
        self.one, self.norm1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.two, self.norm2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.relu, self.relu6, self.tanh = nn.ReLU(inplace=True), nn.ReLU6(), nn.Hardtanh(-0.5, 0.75)
        self.silu, self.dropout = nn.SiLU(), nn.Dropout(0.5)
        self.max_pool = nn.MaxPool2d(3, 2, 1, ceil_mode=True)
        self.average_pool, self.padded_pool = nn.AvgPool2d(3, 2), nn.AvgPool2d(3, 2, 1)
        self.rounded_pool = nn.AvgPool2d(2, ceil_mode=True)
        self.even, self.circular = nn.Conv2d(3, 4, 4, padding="same"), nn.Conv2d(3, 4, 3, padding_mode="circular")
        self.odd = nn.Conv2d(3, 4, (3, 5), padding="same", dilation=(1, 2))
        self.rows, self.head = nn.Linear(7, 2), nn.Linear(4, 5)
        self.body = body

    def first(self, x):
        return self.norm1(self.one(x))

    def second(self, x):
        return self.norm2(self.two(x))

    def forward(self, x):
        return self.head(self.body(self, x).mean((2, 3)))


def drawn(model):
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.running_mean)
            nn.init.normal_(norm.bias)
            nn.init.uniform_(norm.running_var, 0.5, 2)
            nn.init.uniform_(norm.weight, 0.5, 2)
    return model.eval()


@torch.no_grad()
def computed(model, stages, images):
    values = {0: images}
    for stage in stages.stages:
        values[stage.output] = carry_out(model, stage, values)
        assert tuple(values[stage.output].shape[1:]) == stages.shapes[stage.output]
    return values[stages.stages[-1].output].flatten(1)


def same_as_forward(model, image=IMAGE):
    """The stages, after a comparison with what the model gives."""
    images, stages = torch.randn(3, *image), stages_of(model, image)
    with torch.no_grad():
        expected = model(images)
    torch.testing.assert_close(computed(model, stages, images), expected)
    return stages


def bottleneck(net, x):
    x = net.relu6(net.first(x))
    return net.second(x) + x


def residual_in_place(net, x):
    x = net.relu(net.first(x))
    y = net.second(x)
    y += x
    return net.relu(y)


def residual_of_a_sum(net, x):
    x = net.first(x)
    x = net.second(x) + x
    return net.two(x.relu()) + x


def both_branches_clamped(net, x):
    x = net.first(x).relu()
    return F.relu6(net.second(x).relu() + x)


def twice_itself(net, x):
    x = net.first(x).relu()
    return x + x


def norm_behind_a_sum(net, x):
    x = net.first(x).relu()
    return net.norm2(net.two(x) + x).relu()


def norm_before_the_layer(net, x):
    return net.two(net.norm2(net.one(x).relu()).relu())


def two_norms_and_two_clamps(net, x):
    return net.tanh(net.relu6(net.dropout(net.norm2(net.first(x)))))


def clamped_in_place(net, x):
    x = net.first(x)
    return net.two(net.relu(x)) + x


def clamped_in_place_by_function(net, x):
    x = net.first(x)
    return net.two(F.relu(x, inplace=True)) + x


def clamped_in_place_by_method(net, x):
    x = net.first(x)
    return net.two(x.relu_()) + x


def added_in_place(net, x):
    x, y = net.first(x).relu(), net.one(x)
    z = y
    y.add_(x)
    return y.relu() + z


def a_layer_twice(net, x):
    return net.two(net.two(net.first(x).relu()))


def pooled(net, x):
    return net.average_pool(net.two(net.max_pool(net.first(x).relu())))


def padded_to_the_same_size(net, x):
    return net.odd(x).relu()


STAGES = {  # kind, module, input, residual, low, high of each stage between the image and the mean
    bottleneck: [("convolution", "one", 0, None, 0, 6), ("convolution", "two", 1, 1, -INFINITE, INFINITE)],
    residual_in_place: [("convolution", "one", 0, None, 0, INFINITE), ("convolution", "two", 1, 1, 0, INFINITE)],
    residual_of_a_sum: [
        ("convolution", "one", 0, None, -INFINITE, INFINITE),
        ("convolution", "two", 1, 1, -INFINITE, INFINITE),
        ("rescale", "relu", 2, None, 0, INFINITE),
        ("convolution", "two", 3, 2, -INFINITE, INFINITE),
    ],
    both_branches_clamped: [
        ("convolution", "one", 0, None, 0, INFINITE),
        ("convolution", "two", 1, None, 0, INFINITE),
        ("rescale", "add", 2, 1, 0, 6),
    ],
    twice_itself: [("convolution", "one", 0, None, 0, INFINITE), ("rescale", "add", 1, 1, -INFINITE, INFINITE)],
    norm_behind_a_sum: [
        ("convolution", "one", 0, None, 0, INFINITE),
        ("convolution", "two", 1, 1, -INFINITE, INFINITE),
        ("rescale", "norm2", 2, None, 0, INFINITE),
    ],
    norm_before_the_layer: [
        ("convolution", "one", 0, None, 0, INFINITE),
        ("rescale", "norm2", 1, None, 0, INFINITE),
        ("convolution", "two", 2, None, -INFINITE, INFINITE),
    ],
    two_norms_and_two_clamps: [("convolution", "one", 0, None, 0, 0.75)],
    clamped_in_place: [
        ("convolution", "one", 0, None, -INFINITE, INFINITE),
        ("rescale", "relu", 1, None, 0, INFINITE),
        ("convolution", "two", 2, 2, -INFINITE, INFINITE),
    ],
    a_layer_twice: [
        ("convolution", "one", 0, None, 0, INFINITE),
        ("convolution", "two", 1, None, -INFINITE, INFINITE),
        ("convolution", "two", 2, None, -INFINITE, INFINITE),
    ],
    pooled: [
        ("convolution", "one", 0, None, 0, INFINITE),
        ("max_pool", "max_pool", 1, None, -INFINITE, INFINITE),
        ("convolution", "two", 2, None, -INFINITE, INFINITE),
        ("average_pool", "average_pool", 3, None, -INFINITE, INFINITE),
    ],
    padded_to_the_same_size: [("convolution", "odd", 0, None, 0, INFINITE)],
}


@pytest.mark.parametrize("body", STAGES, ids=lambda body: body.__name__)
def test_stages_are_what_the_formulas_allow(body):
    stages = same_as_forward(drawn(Net(body))).stages
    found = [(stage.kind, stage.path, stage.input, stage.residual, stage.low, stage.high) for stage in stages]
    assert found[:-2] == STAGES[body]
    assert [kind for kind, *_ in found[-2:]] == ["average_pool", "linear"]


@pytest.mark.parametrize("body", [clamped_in_place_by_function, clamped_in_place_by_method, added_in_place])
def test_what_changes_in_place_changes_for_all(body):
    same_as_forward(drawn(Net(body)))


def test_norms_stand_in_order():
    stages = stages_of(drawn(Net(two_norms_and_two_clamps)), IMAGE)
    assert stages.stages[0].norms == ("norm1", "norm2")


@pytest.mark.parametrize(
    "name",
    ["resnet18", "resnet26d", "mobilenetv2_035", "efficientnet_lite0", "repvgg_a0", "cifar_resnet20"],
)
def test_networks_of_timm(name):
    image = (3, 32, 32)
    model = drawn(timm.create_model(name, num_classes=3))
    layers = [path for path, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    found = [stage.path for stage in same_as_forward(model, image).stages if stage.kind not in ("rescale", "max_pool")]
    assert [path for path in found if path in layers] == sorted(layers, key=found.index)


def test_depthwise_adder_layers_with_their_norms():
    model = drawn(timm.create_model("mobilenetv2_035", num_classes=3))
    adderkit.convert_(model, example_input=torch.randn(1, 3, 32, 32))
    stages = same_as_forward(model, (3, 32, 32)).stages
    depthwise = [stage for stage in stages if stage.path.endswith("conv_dw")]
    assert len(depthwise) == 17
    assert {(stage.kind, stage.low, stage.high) for stage in depthwise} == {("adder", 0, 6)}
    assert all(stage.groups == model.get_submodule(stage.path).groups for stage in depthwise)
    assert {stage.window.stride for stage in depthwise} == {(1, 1), (2, 2)}
    linear = [stage for stage in stages if stage.path.endswith("conv_pwl")]
    assert all((stage.low, stage.high) == (-INFINITE, INFINITE) for stage in linear)
    assert sum(stage.residual is not None for stage in linear) == 10  # all other blocks change size or width


def test_consumers_are_found_behind_max_pooling():
    stages = stages_of(drawn(Net(pooled)), IMAGE)
    assert [stage.path for stage in stages.consumers(1)] == ["two"]
    assert [stage.path for stage in stages.consumers(4)] == []
    assert isinstance(stages, Stages)


@pytest.mark.parametrize(
    "flatten", [lambda x: x.flatten(1), lambda x: torch.reshape(x, (x.shape[0], -1)), nn.Flatten()]
)
def test_flattened_pixels_are_a_window_as_large_as_the_image(flatten):
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.flat, self.head = nn.Conv2d(3, 2, 3), flatten, nn.Linear(2 * 7 * 5, 4)

        def forward(self, x):
            return self.head(self.flat(self.conv(x).relu()))

    last = same_as_forward(Flat().eval()).stages[-1]
    assert (last.window.kernel, last.input) == ((7, 5), 1)


@pytest.mark.parametrize("pool", ["module", "function", "mean", "kept", "timm"])
def test_every_way_to_pool_the_whole_image(pool):
    ways = {
        "module": nn.AdaptiveAvgPool2d(1),
        "function": lambda x: F.adaptive_avg_pool2d(x, (1, 1)),
        "mean": lambda x: x.mean((-2, -1)),
        "kept": lambda x: x.mean(dim=[2, 3], keepdim=True),
        "timm": timm.layers.adaptive_avgmax_pool.FastAdaptiveAvgPool(flatten=True),
    }

    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.pool, self.head = nn.Conv2d(3, 2, 3), ways[pool], nn.Conv2d(2, 4, 1)

        def forward(self, x):
            return self.head(self.pool(self.conv(x)).flatten(1)[:, :, None, None]).flatten(1)

    stages = same_as_forward(Pooled().eval()).stages
    assert [stage.kind for stage in stages] == ["convolution", "average_pool", "linear"]
    assert stages[1].window.kernel == (7, 5)


def chosen_by_values(net, x):
    return net.one(x) if x.sum() > 0 else net.even(x)


REFUSED = {
    "silu is a SiLU": lambda net, x: net.silu(net.first(x)),
    "calls sigmoid": lambda net, x: net.first(x).sigmoid(),
    "calls hardswish": lambda net, x: F.hardswish(net.first(x)),
    "calls mul": lambda net, x: net.first(x) * net.one(x).mean((2, 3), keepdim=True),
    "calls cat": lambda net, x: torch.cat([net.first(x), net.one(x)], 1)[:, :4],
    "calls getitem": lambda net, x: net.two(net.first(x).relu()[:, :, ::2, 1:]),
    "calls max_pool2d": lambda net, x: F.max_pool2d(net.first(x), 2),
    "calls mean": lambda net, x: net.first(x).mean(1, keepdim=True).expand(-1, 4, -1, -1),
    "adds what is not just another activation": lambda net, x: net.first(x) + 1,
    "add adds what is not": lambda net, x: torch.add(net.first(x), net.one(x), alpha=2),
    "add adds what": lambda net, x: net.first(x) + net.one(x).mean((2, 3), keepdim=True),
    "padded_pool pads": lambda net, x: net.padded_pool(net.first(x)),
    "rounded_pool pads or rounds its size up": lambda net, x: net.rounded_pool(net.first(x)),
    "even pads more on one side": lambda net, x: net.even(x),
    "circular pads": lambda net, x: net.circular(x),
    "rows reads rows of pixels": lambda net, x: net.rows(net.first(x)).mean((2, 3))[:, :, None, None],
    "Net cannot be cut into integer layers": chosen_by_values,
}


@pytest.mark.parametrize("line", REFUSED)
def test_what_integers_cannot_express_is_named(line):
    with pytest.raises(AdderkitError) as caught:
        stages_of(drawn(Net(REFUSED[line])), IMAGE)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("result", "line"),
    [
        (lambda x, y: (x, y), "returns something else than logits"),
        (lambda x, y: x.flatten(1) + x.flatten(1), "flattened pixels are used by something else than a layer"),
        (lambda x, y: {"logits": y}, "returns something else than logits"),
        (lambda x, y: (y + y, x)[1], "returns something else than what its last layer writes"),
    ],
)
def test_models_that_return_no_logits(result, line):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)

        def forward(self, x):
            x = self.one(x).relu()
            return result(x, self.two(x))

    with pytest.raises(AdderkitError, match=line):
        stages_of(Two().eval(), IMAGE)
