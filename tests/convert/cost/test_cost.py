"""Operations of a network, against torch's own counter, by hand and against the papers."""

import json

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from adderkit.adder_layers.conv import AdderConv2d
from adderkit.convert.conversion.config import AdderConfig
from adderkit.convert.conversion.rewrite import convert_, revert_
from adderkit.convert.cost.cost import cost
from adderkit.convert.cost.energy import PRECISIONS
from adderkit.convert.cost.formulas import Call, tally
from adderkit.convert.cost.operations import Operations
from adderkit.convert.errors import AdderkitError

IMAGE = torch.zeros(1, 3, 32, 32)
SIZE = (3, 32, 32)


class Net(nn.Module):
    """A function of the image as a model."""

    def __init__(self, function, *modules):
        super().__init__()
        self.function = function
        self.layers = nn.ModuleList(modules)

    def forward(self, x):
        return self.function(x, *self.layers)


def flops(model, image):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(image)
    return counter.get_total_flops()


def rows(model, kind, size=SIZE):
    return {row.path: row for row in cost(model, size).layers if row.kind == kind}


@pytest.mark.parametrize(
    "name", ["cifar_resnet20", "cifar_vgg_small", "test_resnet", "test_efficientnet", "test_nfnet", "test_convnext2"]
)
def test_products_of_a_cnn_are_half_its_flops(name):
    model = timm.create_model(name)
    result = cost(model, IMAGE)
    assert result.headline.multiplications == result.headline.additions == flops(model, IMAGE) // 2
    assert result.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert result.uncounted == ()


def test_matrix_products_of_a_transformer_are_half_its_flops():
    model = timm.create_model("test_vit")
    with sdpa_kernel(SDPBackend.MATH):  # torch's counter knows the CPU's fused attention in some versions only
        expected = flops(model, torch.zeros(1, 3, 160, 160)) // 2
    assert cost(model).honest.products == expected


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.Conv2d(3, 6, (3, 1), dilation=2, groups=3),
        nn.ConvTranspose2d(3, 8, 3, stride=2),
    ],
    ids=str,
)
def test_convolutions_of_every_kind(layer):
    assert cost(layer, SIZE).honest.products == flops(layer, IMAGE) // 2


def test_linear_layer_on_tokens():
    model = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.Flatten(2), nn.Linear(64, 5))
    result = cost(model, IMAGE)
    assert result.multiplications == flops(model, IMAGE) // 2
    assert [layer.output_shape for layer in result.layers] == [(8, 8, 8), (8, 5)]


def test_adder_layers_multiply_nothing_and_add_twice_a_term(tiny, tiny_adders):
    model = tiny()
    before = {layer.path: layer for layer in cost(model, IMAGE).weight_layers}
    convert_(model, example_input=IMAGE)
    result = cost(model, IMAGE)
    after = {layer.path: layer for layer in result.weight_layers}
    for path in tiny_adders:
        assert (after[path].cls, after[path].kind) == ("AdderConv2d", "adder")
        assert after[path].multiplications == 0
        assert after[path].additions == 2 * before[path].multiplications
        assert after[path].before == before[path].operations
    assert {path: after[path] for path in ("stem", "head")} == {path: before[path] for path in ("stem", "head")}


class TestThePapers:
    """AdderNet, tables 2 and 3, and the recount of SLAC (NeurIPS 2021, tables 1 and 2)."""

    @pytest.mark.parametrize(
        ("name", "terms", "tolerance"),
        [
            ("cifar_resnet32", 69.12e6, 1e-4),
            # 41.17 M in the paper; but 12 of the 3x3 convolutions fewer than ResNet-32's 69.12 M are 40.81 M.
            ("cifar_resnet20", 41.17e6, 0.009),
            ("cifar_resnet20", 69.124736e6 - 12 * 16 * 16 * 9 * 32 * 32, 0),
            # 0.65 G in the paper, for a VGG-small whose classifier it does not give; see the converted layers below.
            ("cifar_vgg_small", 0.65e9, 0.07),
            ("resnet18", 1.8e9, 0.01),
        ],
    )
    def test_headline(self, name, terms, tolerance):
        model = timm.create_model(name)
        plain = cost(model).headline
        assert plain.multiplications == plain.additions == pytest.approx(terms, rel=tolerance)
        convert_(model)
        result = cost(model)
        assert result.headline_before == plain
        assert result.headline.multiplications == 0
        assert result.headline.additions == pytest.approx(2 * terms, rel=tolerance)

    def test_headline_of_resnet50(self):
        """The papers count the first version, whose 1x1 convolution has the stride; timm has the second."""
        model = timm.create_model("resnet50")
        assert cost(model).headline.multiplications == pytest.approx(4.09e9, rel=1e-3)
        for block in (model.layer2[0], model.layer3[0], model.layer4[0]):
            block.conv1.stride, block.conv2.stride = (2, 2), (1, 1)
        convert_(model)
        result = cost(model)
        assert result.headline_before.multiplications == pytest.approx(3.9e9, rel=0.02)
        assert result.headline.multiplications == 0
        assert result.headline.additions == pytest.approx(7.7e9, rel=0.005)

    @pytest.mark.parametrize(
        ("name", "multiplications", "additions", "tolerance"),
        [
            ("cifar_resnet20", 0.45e6, 81.89e6, 0.02),
            ("cifar_resnet32", 0.45e6, 137.79e6, 0.02),
            ("resnet18", 0.1e9, 3.5e9, 0.2),  # one digit is given
        ],
    )
    def test_recount_with_first_and_last_layer(self, name, multiplications, additions, tolerance):
        model = timm.create_model(name)
        convert_(model)
        layers = cost(model).weight_layers
        assert sum(row.multiplications for row in layers) == pytest.approx(multiplications, rel=tolerance)
        assert sum(row.additions for row in layers) == pytest.approx(additions, rel=min(tolerance, 0.01))

    def test_recount_of_the_adder_layers_of_vgg_small(self):
        model = timm.create_model("cifar_vgg_small")
        convert_(model)
        assert cost(model).honest.distances == pytest.approx((1.25e9 - 0.05e9) / 2, rel=0.01)


class TestHonest:
    """What the papers leave out, counted by hand."""

    def test_resnet20(self):
        model = timm.create_model("cifar_resnet20")
        stem, head = 16 * 3 * 9 * 32 * 32, 64 * 10
        norms = 6 * 16 * 32 * 32 + 7 * 32 * 16 * 16 + 7 * 64 * 8 * 8  # after the 20 adder layers
        residuals = 3 * (16 * 32 * 32 + 32 * 16 * 16 + 64 * 8 * 8)
        terms = cost(model).headline.multiplications
        convert_(model)
        result = cost(model)
        assert result.multiplications == stem + head + norms + 64  # the mean of 64 maps
        assert result.additions == 2 * (terms - stem - head) + stem + head + norms + residuals + 64 * 8 * 8
        assert result.honest_before.multiplications == terms + 64
        assert result.honest_before.additions == terms + residuals + 64 * 8 * 8

    def test_before_is_the_cnn(self, tiny):
        model = tiny()
        plain = cost(model, IMAGE)
        convert_(model, example_input=IMAGE)
        result = cost(model, IMAGE)
        assert (result.honest_before, result.headline_before) == (plain.honest, plain.headline)
        assert plain.honest == plain.honest_before
        revert_(model)
        assert cost(model, IMAGE) == plain

    def test_fully_converted_network_multiplies_in_norms_mean_and_head(self, tiny):
        model = tiny()
        convert_(model, AdderConfig(skip_first=False), example_input=IMAGE)
        norms = 8 * 32 * 32 + (8 + 8 + 6) * 16 * 16
        assert cost(model, IMAGE).multiplications == norms + 6 + 6 * 5

    @pytest.mark.parametrize(
        ("function", "folds"),
        [
            (lambda x, conv, norm: norm(conv(x)), True),
            (lambda x, conv, norm: norm(conv(x).relu()), False),
            (lambda x, conv, norm: norm(x) + conv(x), False),
            (lambda x, conv, norm: norm(y := conv(x)) + y, False),
            (lambda x, conv, norm: norm(conv(x).relu_()), False),
            (lambda x, conv, norm: F.batch_norm(conv(x), norm.running_mean, norm.running_var), True),
        ],
        ids=["directly after", "after an activation", "beside", "output used twice", "in-place activation", "function"],
    )
    def test_batch_norm_folds_right_behind_a_convolution(self, function, folds):
        size = 0 if folds else 3 * 8 * 8
        operations = cost(Net(function, nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)).eval(), (3, 8, 8)).honest
        assert operations.scalings == size

    def test_batch_norm_behind_an_adder_layer_does_not_fold(self):
        model = nn.Sequential(AdderConv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)).eval()
        result = cost(model, (3, 8, 8))
        assert (result.honest.scalings, result.honest.sums) == (4 * 8 * 8, 4 * 8 * 8)
        assert (result.honest_before.scalings, result.honest_before.sums) == (0, 0)

    def test_gates_and_residuals_of_squeeze_and_excitation(self):
        model = Net(lambda x, conv: x + x * conv(F.adaptive_avg_pool2d(x, 1)).sigmoid(), nn.Conv2d(3, 3, 1))
        size = 3 * 32 * 32
        kinds = {row.kind: row.operations for row in cost(model, SIZE).layers}
        assert kinds == {
            "pooling": Operations(scalings=3, sums=size),
            "convolution": Operations(products=9),
            "activation": Operations(functions=3),
            "gate": Operations(scalings=size),
            "residual": Operations(sums=size),
        }

    def test_what_depends_on_weights_alone_is_done_once(self):
        class Standardized(nn.Conv2d):
            def forward(self, x):
                weight = (self.weight - self.weight.mean()) * self.weight.std()
                return F.conv2d(x, weight)

        assert cost(Standardized(3, 4, 3), SIZE).honest == Operations(products=4 * 27 * 30 * 30)

    @pytest.mark.parametrize(
        ("function", "scalings", "sums", "functions"),
        [
            (F.relu, 0, 0, 0),
            (F.relu6, 0, 1, 0),
            (F.hardswish, 2, 2, 0),
            (F.silu, 1, 0, 1),
            (lambda x: x / 3, 1, 0, 0),
            (lambda x: x - 1, 0, 1, 0),
            (lambda x: x**2, 1, 0, 0),
            (lambda x: x.clamp(-1, 1), 0, 2, 0),
            (lambda x: x.flatten().view(3, -1).t(), 0, 0, 0),
            (lambda x: F.max_pool2d(x, 1), 0, 0, 0),
            (lambda x: torch.cat([x, x], 1)[:, :3], 0, 0, 0),
        ],
    )
    def test_operations_of_one_value(self, function, scalings, sums, functions):
        size = 3 * 32 * 32
        expected = Operations(scalings=scalings * size, sums=sums * size, functions=functions * size)
        assert cost(Net(function), SIZE).honest == expected

    def test_pooling_windows(self):
        assert cost(nn.MaxPool2d(3, 2, 1), SIZE).honest.sums == 3 * 16 * 16 * (9 - 1)
        assert cost(nn.AvgPool2d((2, 4)), SIZE).honest == Operations(scalings=3 * 16 * 8, sums=3 * 32 * 32)

    def test_an_operator_without_a_formula_is_named(self):
        assert cost(Net(lambda x: torch.fft.fft(x).real), SIZE).uncounted != ()


def test_hybrid_keeps_its_middle_convolutions_in_the_headline(tiny):
    model = tiny()
    convert_(model, AdderConfig(exclude=("pointwise",)), example_input=IMAGE)
    assert cost(model, IMAGE).headline.multiplications == 6 * 8 * 16 * 16


def test_layer_called_twice_costs_twice_and_is_stored_once():
    conv = nn.Conv2d(3, 3, 3, padding=1)
    result = cost(nn.Sequential(conv, nn.ReLU(), conv), IMAGE)
    assert result.multiplications == 2 * 32 * 32 * 3 * 3 * 9
    assert result.parameters == result.layers[0].parameters == 3 * 3 * 9 + 3


def test_rows_are_in_order_of_execution(tiny):
    result = cost(tiny(), IMAGE)
    assert [row.path for row in result.weight_layers] == ["stem", "grouped", "depthwise", "pointwise", "head"]


def test_a_depthwise_layer_saves_energy_in_fp32_alone(tiny):
    """Its BatchNorm, which a convolution folds, costs more than its nine products saved in int8."""
    model = tiny()
    convert_(model, example_input=IMAGE)
    found = {row.path: row.to_dict()["energy_pj"] for row in cost(model, IMAGE).layers}
    layer, norm = found["depthwise"], found["norm2"]
    after = {name: layer[name]["after"] + norm[name]["after"] for name in PRECISIONS}
    values = 8 * 16 * 16
    assert layer["int8"]["before"] == pytest.approx(values * 9 * 0.3)
    assert after["int8"] == pytest.approx(values * (9 * 0.13 + 3.2))
    assert [after[name] < layer[name]["before"] for name in PRECISIONS] == [True, True, False]


def test_bytes(tiny):
    model = tiny()
    result = cost(model, SIZE)
    stem = result.layers[0]
    assert stem.weight_bytes(PRECISIONS["fp16"]) == 2 * 8 * 3 * 9
    assert stem.activation_bytes(PRECISIONS["fp16"]) == 2 * (3 + 8) * 32 * 32
    assert result.weight_bytes(PRECISIONS["fp32"]) == 4 * sum(each.numel() for each in model.parameters())
    weights = sum(each.numel() for each in model.parameters() if each.ndim > 1)
    # biases and factors of the normalizations are kept in the format of the sums, int32
    assert result.weight_bytes(PRECISIONS["int8"]) == weights + 4 * (result.parameters - weights)
    convert_(model, example_input=IMAGE)
    assert cost(model, SIZE).activation_bytes(PRECISIONS["int8"]) == result.activation_bytes(PRECISIONS["int8"])


def test_one_image_is_counted_of_a_batch(tiny):
    assert cost(tiny(), torch.zeros(4, 3, 8, 8)) == cost(tiny(), torch.zeros(1, 3, 8, 8)) == cost(tiny(), (3, 8, 8))


def test_to_dict_is_json(tiny):
    model = tiny()
    convert_(model, example_input=IMAGE)
    result = cost(model, IMAGE)
    mapping = json.loads(json.dumps(result.to_dict()))
    for name in ("multiplications", "additions"):
        assert mapping[name] == mapping["honest"]["after"][name] == sum(layer[name] for layer in mapping["layers"])
    for name in PRECISIONS:
        energies = mapping["energy_pj"][name]
        assert energies["after"] == pytest.approx(sum(row["energy_pj"][name]["after"] for row in mapping["layers"]))
    assert mapping["energy_pj"]["fp32"]["after"] < mapping["energy_pj"]["fp32"]["before"]
    assert mapping["parameters"] == result.parameters
    assert mapping["layers"][0]["output_shape"] == [8, 32, 32]


def test_a_model_that_cannot_run_on_meta_runs_for_real(tiny):
    def counted(x, inner):
        return inner(x * (2 if x.sum().item() >= 0 else 1))

    model = Net(counted, tiny()).train()
    result = cost(model, IMAGE)
    assert result.honest.products == cost(tiny(), IMAGE).honest.products
    assert model.training


def test_model_outside_timm_needs_an_example(tiny):
    with pytest.raises(AdderkitError, match="example_input"):
        cost(tiny())


def test_size_that_does_not_fit(tiny):
    with pytest.raises(AdderkitError, match=r"TinyNet cannot run on an input of shape \(1, 4, 8, 8\)"):
        cost(tiny(), (4, 8, 8))


def test_model_is_left_untouched(tiny, images, snapshot):
    model = tiny().train()
    before = snapshot(model)
    cost(model, images)
    assert snapshot(model) == before


def test_torch_counts_an_adder_layer_like_its_convolution():
    adder = AdderConv2d(4, 6, 3, stride=2, padding=1, groups=2)
    image = torch.zeros(2, 4, 9, 8)
    assert flops(adder, image) == flops(nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), image) > 0


@pytest.mark.parametrize("terms", [1, 2, 3])
def test_terms_are_distances_of_their_own(terms):
    """6 filters of 8 x 3 x 3 weights, on 4 x 5 pixels; the sums of the terms are added for each output."""
    x, y = torch.zeros(1, 8, 6, 7), torch.zeros(1, 6, 4, 5)
    weight = torch.zeros(6, 8, 3, 3) if terms == 1 else torch.zeros(6, 8, terms, 3, 3)
    found = tally(Call("adder_conv2d", (x, weight), {}, y, [x]))
    assert found.operations == Operations(distances=120 * 72 * terms, sums=120 * (terms - 1))
    assert found.before == Operations(products=120 * 72)
    assert found.weights == 6 * 72 * terms
