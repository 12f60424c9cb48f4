"""Models cut into fused operations: they compute what the model's forward pass does, and each fuses all that it can.

Whole networks in integers are in ``test_quantize.py``; these are small ones with one difficulty each.
"""

import dataclasses
import math
from typing import get_args

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import adderkit
from adderkit.adder_layers.integer.plan import Step
from adderkit.convert.errors import AdderkitError
from adderkit.convert.quantization.config import QuantizeConfig
from adderkit.convert.quantization.fake_quantize import compute_op, fake_quantize_
from adderkit.convert.quantization.fold import _PlanBuilder
from adderkit.convert.quantization.fused_ops import OpKind
from adderkit.convert.quantization.fusion import fuse

IMAGE = (3, 9, 7)
INFINITE = math.inf


class Net(nn.Module):
    """Two convolutions with their BatchNorms, and a classifier; ``body`` says what is done with them."""

    def __init__(self, body):
        super().__init__()
        self.one, self.norm1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.two, self.norm2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.relu, self.relu6, self.tanh = nn.ReLU(inplace=True), nn.ReLU6(), nn.Hardtanh(-0.5, 0.75)
        self.silu, self.dropout, self.drop_path = nn.SiLU(), nn.Dropout(0.5), timm.layers.DropPath(0.5)
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
def computed(model, graph, images):
    def visit(op, values):
        result = compute_op(model, op, values)
        assert tuple(result.shape[1:]) == graph.shapes[op.output]
        return result

    return graph.run(images, visit).flatten(1)


def same_as_forward(model, image=IMAGE):
    """The fused operations, after a comparison with what the model gives."""
    images, graph = torch.randn(3, *image), fuse(model, image)
    with torch.no_grad():
        expected = model(images)
    torch.testing.assert_close(computed(model, graph, images), expected)
    return graph


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


def stochastic_depth(net, x):
    x = net.first(x).relu()
    return net.drop_path(net.second(x)) + x


def padded_to_the_same_size(net, x):
    return net.odd(x).relu()


FUSED = {  # kind, module, input, residual, low, high of each operation between the image and the mean
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
    stochastic_depth: [
        ("convolution", "one", 0, None, 0, INFINITE),
        ("convolution", "two", 1, 1, -INFINITE, INFINITE),
    ],
    padded_to_the_same_size: [("convolution", "odd", 0, None, 0, INFINITE)],
}


@pytest.mark.parametrize("body", FUSED, ids=lambda body: body.__name__)
def test_operations_are_what_the_formulas_allow(body):
    ops = same_as_forward(drawn(Net(body))).ops
    found = [(op.kind, op.path, op.input, op.residual, op.low, op.high) for op in ops]
    assert found[:-2] == FUSED[body]
    assert [kind for kind, *_ in found[-2:]] == ["average_pool", "linear"]


@pytest.mark.parametrize("body", [clamped_in_place_by_function, clamped_in_place_by_method, added_in_place])
def test_what_changes_in_place_changes_for_all(body):
    same_as_forward(drawn(Net(body)))


def test_norms_stand_in_order():
    graph = fuse(drawn(Net(two_norms_and_two_clamps)), IMAGE)
    assert graph.ops[0].norms == ("norm1", "norm2")


@pytest.mark.parametrize(
    "name",
    ["resnet18", "resnet26d", "mobilenetv2_035", "efficientnet_lite0", "repvgg_a0", "cifar_resnet20"],
)
def test_networks_of_timm(name):
    image = (3, 32, 32)
    model = drawn(timm.create_model(name, num_classes=3))
    layers = [path for path, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    found = [op.path for op in same_as_forward(model, image).ops if op.kind not in ("rescale", "max_pool")]
    assert [path for path in found if path in layers] == sorted(layers, key=found.index)


def test_depthwise_adder_layers_with_their_norms():
    model = drawn(timm.create_model("mobilenetv2_035", num_classes=3))
    adderkit.convert_(model, example_input=torch.randn(1, 3, 32, 32))
    ops = same_as_forward(model, (3, 32, 32)).ops
    depthwise = [op for op in ops if op.path.endswith("conv_dw")]
    assert len(depthwise) == 17
    assert {(op.kind, op.low, op.high) for op in depthwise} == {("adder", 0, 6)}
    assert all(op.groups == model.get_submodule(op.path).groups for op in depthwise)
    assert {op.window.stride for op in depthwise} == {(1, 1), (2, 2)}
    linear = [op for op in ops if op.path.endswith("conv_pwl")]
    assert all((op.low, op.high) == (-INFINITE, INFINITE) for op in linear)
    assert sum(op.residual is not None for op in linear) == 10  # all other blocks change size or width


def test_consumers_are_found_behind_max_pooling():
    graph = fuse(drawn(Net(pooled)), IMAGE)
    assert [op.path for op in graph.consumers(1)] == ["two"]
    assert [op.path for op in graph.consumers(4)] == []


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

    last = same_as_forward(Flat().eval()).ops[-1]
    assert (last.window.kernel, last.input) == ((7, 5), 1)


def test_terms_of_a_layer_on_flattened_pixels():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.point, self.norm = (
                nn.Conv2d(3, 2, 3),
                adderkit.AdderConv2d(70, 4, 1, terms=3),
                nn.BatchNorm2d(4),
            )

        def forward(self, x):
            return self.norm(self.point(self.conv(x).relu().flatten(1)[:, :, None, None])).flatten(1)

    layer = same_as_forward(Flat().eval()).ops[1]
    assert (layer.kind, layer.window.kernel) == ("adder", (7, 5))


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

    ops = same_as_forward(Pooled().eval()).ops
    assert [op.kind for op in ops] == ["convolution", "average_pool", "linear"]
    assert ops[1].window.kernel == (7, 5)


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
    "adds something other than one activation": lambda net, x: net.first(x) + 1,
    "add adds something other": lambda net, x: torch.add(net.first(x), net.one(x), alpha=2),
    "add adds something": lambda net, x: net.first(x) + net.one(x).mean((2, 3), keepdim=True),
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
        fuse(drawn(Net(REFUSED[line])), IMAGE)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("result", "line"),
    [
        (lambda x, y: (x, y), "returns something other than logits"),
        (lambda x, y: x.flatten(1) + x.flatten(1), "flattened pixels are used by something other than a layer"),
        (lambda x, y: {"logits": y}, "returns something other than logits"),
        (lambda x, y: (y + y, x)[1], "returns something other than what its last layer writes"),
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
        fuse(Two().eval(), IMAGE)


def test_attributes_of_a_model_keep_their_names():
    """timm's networks have stages of their own, for example."""
    model = timm.create_model("repvgg_a0", num_classes=3).eval()
    before = model.stages
    fake_quantize_(model, QuantizeConfig(), (3, 32, 32))
    assert model.stages is before


def test_every_operation_becomes_a_step():
    assert set(get_args(OpKind)) == {cls.kind for cls in get_args(Step)}


def test_operations_of_unknown_kinds_fail():
    model = drawn(Net(pooled))
    op = dataclasses.replace(fuse(model, IMAGE).ops[0], kind="gate")
    with pytest.raises(AssertionError, match="unreachable"):
        compute_op(model, op, {0: torch.zeros(1, *IMAGE)})
    fake_quantize_(model, QuantizeConfig(), IMAGE)
    with pytest.raises(AssertionError, match="unreachable"):
        _PlanBuilder(model).add(op)
