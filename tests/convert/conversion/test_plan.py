"""The dry run: which convolutions become adder layers, and what is said about the others."""

import pytest
import timm
import torch
import torchvision
from timm.layers import BatchNormAct2d, GroupNormAct, LayerNorm2d, StdConv2d
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode

import adderkit
from adderkit.convert.conversion.config import AdderConfig
from adderkit.convert.conversion.plan import plan
from adderkit.convert.errors import NoModuleMatchedError

IMAGE = torch.zeros(1, 3, 8, 8)
SKIP = AdderConfig(norm="skip")


class OwnConv2d(nn.Conv2d):
    """A user's subclass; what it adds is unknown to us."""


def followed_by(*modules, conv=nn.Conv2d):
    """A stem, and a convolution followed by some modules."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 4, 3, padding=1), *modules
    )


def rows(model, config=AdderConfig(), example_input=IMAGE, **kwargs):  # noqa: B008 - frozen
    return {row.path: row for row in plan(model, config, example_input=example_input, **kwargs).rows}


def decisions(*args, **kwargs):
    return {path: row.decision for path, row in rows(*args, **kwargs).items()}


# The default policy


def test_all_but_the_stem_of_a_network_with_a_linear_head(tiny, tiny_adders):
    result = plan(tiny(), example_input=IMAGE)
    assert result.paths("convert") == tiny_adders
    assert result.paths("skip") == ["stem"]
    assert result.rows[0].reason == "first convolution"


def test_convolutional_head_is_the_classifier(resnet20):
    result = plan(resnet20())
    assert [(row.path, row.reason) for row in result.rows if row.decision == "skip"] == [
        ("features.0.0", "first convolution"),
        ("fc", "classifier"),
    ]
    assert len(result.paths("convert")) == 20


def test_last_convolution_is_the_classifier_outside_timm():
    head = [nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2)]
    model = followed_by(nn.BatchNorm2d(4), nn.ReLU(), *head)
    assert rows(model)["7"].reason == "classifier"
    assert decisions(model, AdderConfig(skip_last=False))["7"] == "convert"
    assert rows(followed_by(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)))["6"].reason == "classifier"


def test_backbone_has_no_classifier():
    stages = followed_by(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    assert decisions(stages) == {"0": "skip", "3": "convert", "6": "convert"}


@pytest.mark.parametrize("feature_cls", ["list", "dict", "hook", "fx", "getter"])
def test_all_layers_but_the_first_of_a_feature_extractor(feature_cls):
    model = timm.create_model("test_resnet", features_only=True, feature_cls=feature_cls, out_indices=(1, 2))
    found = rows(model, example_input=torch.zeros(1, 3, 32, 32))
    assert [row.reason for row in found.values() if row.decision == "skip"] == ["first convolution"]


def test_skip_first_can_be_switched_off(tiny):
    assert set(decisions(tiny(), AdderConfig(skip_first=False)).values()) == {"convert"}


def test_first_is_the_first_that_runs():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.b, self.norm = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
            self.a, self.norm_a = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            self.head = nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.norm(self.b(self.norm_a(self.a(x)))).mean((2, 3)))

    assert decisions(Backwards()) == {"a": "skip", "b": "convert"}
    assert list(rows(Backwards())) == ["a", "b"]


def users_by_fx(model):
    """Convolutions whose only user is a BatchNorm, found by symbolic tracing."""
    modules, found = dict(model.named_modules()), []
    for node in fx.symbolic_trace(model).graph.nodes:
        if node.op == "call_module" and isinstance(modules[node.target], nn.Conv2d):
            users = [modules.get(user.target) for user in node.users if user.op == "call_module"]
            if len(users) == len(node.users) and all(isinstance(user, nn.BatchNorm2d) for user in users):
                found.append(node.target)
    return found


@pytest.mark.parametrize(
    "build",
    [
        lambda: timm.create_model("test_resnet"),
        lambda: timm.create_model("cifar_resnet20", num_classes=0),
        lambda: torchvision.models.mobilenet_v2(),
    ],
    ids=["test_resnet", "cifar_resnet20", "torchvision-mobilenet_v2"],
)
def test_choice_agrees_with_symbolic_tracing(build):
    model = build()
    result = plan(model, AdderConfig(skip_first=False), example_input=torch.zeros(1, 3, 32, 32))
    assert result.paths("convert") == users_by_fx(model)
    assert len(result.paths("convert")) > 10


# What follows the convolution


@pytest.mark.parametrize(
    "norm",
    [nn.BatchNorm2d, BatchNormAct2d, nn.InstanceNorm2d, lambda n: nn.GroupNorm(n, n)],
    ids=["BatchNorm2d", "BatchNormAct2d", "InstanceNorm2d", "GroupNorm-of-one-channel"],
)
def test_normalized_convolutions_convert(norm):
    model = followed_by(norm(4), nn.Flatten(), nn.Linear(256, 2))
    row = rows(model)["3"]
    assert (row.decision, row.normalization, row.inserted) == ("convert", "4", False)
    assert row.reason == f"followed by {type(model[4]).__name__}"


@pytest.mark.parametrize(
    "norm",
    [lambda n: nn.GroupNorm(2, n), lambda n: GroupNormAct(n, 2), LayerNorm2d],
    ids=["GroupNorm", "GroupNormAct", "LayerNorm2d"],
)
def test_what_normalizes_channels_together_gets_a_batchnorm_before_it(norm):
    model = followed_by(norm(4), nn.Flatten(), nn.Linear(256, 2))
    name = type(model[4]).__name__
    row = rows(model)["3"]
    assert (row.decision, row.normalization, row.inserted) == ("convert", "4", True)
    assert row.reason == f"{name} '4' normalizes channels together: BatchNorm2d inserted"
    for choice in ("skip", "error"):
        row = rows(model, AdderConfig(norm=choice))["3"]
        assert (row.decision, row.reason, row.inserted) == ("convert", f"followed by {name}", False)


def test_identity_before_the_normalization_does_not_matter():
    row = rows(followed_by(nn.Identity(), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(256, 2)))["3"]
    assert (row.decision, row.normalization) == ("convert", "5")


@pytest.mark.parametrize("norm", ["insert", "skip"])
@pytest.mark.parametrize(
    ("module", "named"),
    [(nn.ReLU(), "ReLU '4'"), (nn.ReLU(inplace=True), "ReLU '4'"), (nn.MaxPool2d(1), "MaxPool2d '4'")],
    ids=["ReLU", "ReLU-inplace", "MaxPool2d"],
)
def test_what_follows_instead_is_named(module, named, norm):
    model = followed_by(
        module, nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(256, 2)
    )
    row = rows(model, AdderConfig(norm=norm))["3"]
    reason = f"no normalization follows, but {named}"
    if norm == "skip":
        assert (row.decision, row.reason, row.inserted) == ("skip", reason, False)
    else:
        assert (row.decision, row.reason, row.inserted) == ("convert", f"{reason}: BatchNorm2d inserted", True)
    assert decisions(model)["6"] == "convert"


def test_nothing_follows():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3))
    row = rows(model, AdderConfig(skip_first=False, skip_last=False, norm="skip"))["2"]
    assert (row.decision, row.reason, row.normalization) == ("skip", "no normalization follows", "")


def test_one_consumer_of_two_is_no_normalization():
    class Forked(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.norm0 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            self.conv, self.norm, self.act = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()
            self.last, self.norm1 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
            self.head = nn.Linear(4, 2)

        def forward(self, x):
            y = self.conv(self.norm0(self.stem(x)))
            return self.head(self.norm1(self.last(self.norm(y) + self.act(y))).mean((2, 3)))

    assert decisions(Forked(), SKIP) == {"stem": "skip", "conv": "skip", "last": "convert"}
    assert rows(Forked(), SKIP)["conv"].reason == "no normalization follows, but ReLU 'act'"


def test_inplace_activation_by_function_keeps_the_convolution():
    class ActivatedFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.norm0 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
            self.last, self.norm1 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
            self.head = nn.Linear(4, 2)

        def forward(self, x):
            x = self.norm(self.conv(self.norm0(self.stem(x))).relu_())
            return self.head(self.norm1(self.last(x)).mean((2, 3)))

    # An adder layer's output is negative: after that ReLU nothing would be left of it.
    assert decisions(ActivatedFirst(), SKIP) == {"stem": "skip", "conv": "skip", "last": "convert"}


class OwnStdConv2d(StdConv2d):
    """A user's subclass of a class that has a handler."""


@pytest.mark.parametrize("conv", [OwnConv2d, OwnStdConv2d], ids=lambda cls: cls.__name__)
def test_unknown_subclasses_are_skipped(conv):
    tail = (nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(256, 2))
    row = rows(followed_by(*tail, conv=conv))["3"]
    assert row.decision == "skip"
    assert row.cls == conv.__name__
    assert row.reason == f"{conv.__name__} does more than a convolution"


def test_adder_layers_are_reported_as_such(tiny, tiny_adders):
    model = tiny()
    adderkit.convert_(model, example_input=IMAGE)
    result = plan(model, example_input=IMAGE)
    assert result.paths("converted") == tiny_adders
    assert result.paths("convert") == []


# Configuration


def test_include_and_exclude(tiny):
    config = AdderConfig(include=("grouped", "depthwise"), exclude=("re:depth.*",))
    found = rows(tiny(), config)
    assert {path: row.decision for path, row in found.items()} == {
        "stem": "skip",
        "grouped": "convert",
        "depthwise": "skip",
        "pointwise": "skip",
    }
    assert found["depthwise"].reason == "excluded by 're:depth.*'"
    assert found["pointwise"].reason == "matches no include pattern"


def test_glob_crosses_dots(resnet20):
    result = plan(resnet20(), AdderConfig(include=("features.4.*",)))
    assert result.paths("convert") == ["features.4.downsample.0", "features.4.conv1", "features.4.conv2"]


def test_single_include_without_a_match_names_the_nearest(resnet20):
    with pytest.raises(NoModuleMatchedError, match=r"'features\.4\.convl'.*features\.4\.conv1"):
        plan(resnet20(), AdderConfig(include=("features.4.convl",)))


def test_include_that_names_a_container(resnet20):
    with pytest.raises(NoModuleMatchedError, match=r"'features\.4' is a BasicBlock: write 'features\.4\.\*'"):
        plan(resnet20(), AdderConfig(include=("features.4",)))


@pytest.mark.parametrize(
    "config",
    [AdderConfig(include=("grouped", "deptwise")), AdderConfig(exclude=("deptwise",))],
    ids=["include", "exclude"],
)
def test_pattern_without_a_match_warns(tiny, config):
    with pytest.warns(UserWarning, match=r"pattern 'deptwise' matches no convolution; nearest: depthwise"):
        result = plan(tiny(), config, example_input=IMAGE)
    assert "grouped" in result.paths("convert")


def test_filter_has_the_last_word(tiny):
    asked = []

    def even_channels(module, path):
        asked.append(path)
        return module.out_channels == 6

    found = rows(tiny(), filter_fn=even_channels)
    assert found["grouped"].reason == "skipped by filter_fn"
    assert found["pointwise"].decision == "convert"
    assert asked == ["grouped", "depthwise", "pointwise"]


# Nothing to do


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (nn.Conv2d(3, 4, 3), "first convolution"),
        (followed_by(nn.ReLU(), nn.Flatten(), nn.Linear(256, 2)), "ReLU"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), "first convolution"),
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), "no Conv2d"),
    ],
    ids=["root", "activation", "only-one", "no-convolution"],
)
def test_nothing_to_convert_says_why(model, reason):
    with pytest.raises(NoModuleMatchedError, match=reason):
        plan(model, SKIP, example_input=IMAGE)


def test_include_of_nothing(tiny):
    with pytest.raises(NoModuleMatchedError, match="matches no include pattern"):
        plan(tiny(), AdderConfig(include=()), example_input=IMAGE)


def test_convnext_gets_normalizations():
    # It permutes between its depthwise convolutions and the LayerNorms, whose channels are then another dimension.
    with pytest.raises(NoModuleMatchedError, match=r"none of 13 convolutions.*no normalization follows"):
        plan(timm.create_model("test_convnext"), SKIP)
    assert sum(row.inserted for row in plan(timm.create_model("test_convnext")).rows) == 12


def test_densenet_converts_what_one_normalization_follows():
    found = rows(timm.create_model("densenet121"), SKIP, example_input=torch.zeros(1, 3, 32, 32))
    converted = [path for path, row in found.items() if row.decision == "convert"]
    # Second convolutions are concatenated first: what follows them also normalizes other layers' outputs.
    assert converted == [path for path in found if path.endswith("conv1") and "denselayer" in path]
    assert all(row.reason for row in found.values())


# The rows


def test_terms_by_formula(tiny):
    # O · H' · W' · C / groups · kh · kw
    assert {path: row.products for path, row in rows(tiny()).items()} == {
        "stem": 8 * 8 * 8 * 3 * 9,
        "grouped": 8 * 4 * 4 * 4 * 9,
        "depthwise": 8 * 4 * 4 * 1 * 9,
        "pointwise": 6 * 4 * 4 * 8,
    }


@pytest.mark.parametrize("name", ["cifar_resnet20", "test_resnet", "test_efficientnet"])
def test_terms_are_half_the_flops_of_the_convolutions(name):
    model = timm.create_model(name).eval()
    image = torch.zeros(1, 3, 32, 32)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    counted = {
        path.split(".", 1)[1]: sum(operators.values())
        for path, operators in counter.get_flop_counts().items()
        if "." in path
    }
    found = rows(model, example_input=image)
    assert {path: 2 * row.products for path, row in found.items()} == {path: counted[path] for path in found}


def test_terms_of_a_layer_called_twice():
    conv = nn.Conv2d(4, 4, 3, padding=1)
    model = followed_by(
        nn.BatchNorm2d(4), conv, nn.BatchNorm2d(4), conv, nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(256, 2)
    )
    row = rows(model)["5"]
    assert row.products == 2 * 4 * 8 * 8 * 4 * 9
    assert row.decision == "convert"


def test_facts_of_a_row(tiny):
    row = rows(tiny())["grouped"]
    assert (row.cls, row.kernel, row.stride, row.groups) == ("Conv2d", (3, 3), (2, 2), 2)
    assert (row.in_channels, row.out_channels, row.parameters) == (8, 8, 8 * 4 * 9 + 8)
    assert row.normalization == "norm1"
