"""Pruning from end to end: what is removed, what is left, and all orders of steps saved and loaded."""

import copy

import pytest
import timm
import torch
from torch import nn

import adderkit
from adderkit import PruneConfig, convert_, load, prune_, revert_, save
from adderkit.convert.calibration.blockwise import match_blocks_
from adderkit.convert.calibration.calibrate import calibrate_
from adderkit.convert.calibration.config import CalibrationConfig
from adderkit.convert.cost.cost import cost
from adderkit.convert.errors import AdderkitError, NoModuleMatchedError
from adderkit.convert.pruning import prune as prune_module
from adderkit.convert.pruning.verify import check_pruning
from adderkit.convert.record import transforms_of

HALF = PruneConfig(ratio=0.5)
BY_WEIGHT = PruneConfig(ratio=0.5, importance="magnitude")


@pytest.fixture
def gray():
    return torch.randn(32, 1, 8, 8)


def widths(report):
    return {group.layers[0]: (group.before, group.after) for group in report.groups}


@pytest.mark.parametrize("importance", ["variance", "taylor", "batchnorm", "magnitude", "random"])
@pytest.mark.parametrize("adder", [True, False], ids=["adder", "cnn"])
def test_each_importance_halves_every_layer(resnet20, gray, importance, adder):
    model = resnet20()
    if adder:
        convert_(model)
    expected = cost(model).additions
    report = prune_(model, PruneConfig(ratio=0.5, importance=importance), gray)
    assert all(2 * after == before for path, (before, after) in widths(report).items() if path != "fc")
    assert widths(report)["fc"] == (10, 10)
    assert report.before["adds"] == expected
    assert report.after["adds"] == cost(model).additions < 0.3 * expected
    assert model(gray[:2]).isfinite().all()


def test_dead_channels_go_first_and_leave_no_trace(resnet20, gray):
    """A quarter of the channels of each block is made to be zero after ReLU; just these are removed."""
    model = resnet20()
    convert_(model)
    adderkit.convert.calibration.batchnorm.reestimate_batchnorm_(model, [gray])
    for block in range(1, 10):
        norm = model.get_submodule(f"features.{block}.bn1")
        norm.weight.data[::4], norm.bias.data[::4] = 0, -1
    inner = tuple(path for path in ("features.0.0", "features.*.conv2"))
    before, original = model(gray), copy.deepcopy(model)
    prune_(model, PruneConfig(ratio=0.25, ignore=inner), gray)
    adderkit.convert.calibration.batchnorm.reestimate_batchnorm_(original, [gray])
    torch.testing.assert_close(model(gray), original(gray), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(before, torch.zeros_like(before))
    assert model.features[3].conv1.weight.shape[0] == 12


def test_an_ignored_layer_that_is_not_there_stops_before_anything_changes(resnet20):
    model = resnet20()
    config = PruneConfig(ratio=0.5, importance="random", ignore=("features.1.*", "features.1.conv3"))
    with pytest.raises(
        NoModuleMatchedError, match=r"'features\.1\.conv3' matches no layer.*nearest: features\.1\.conv"
    ):
        prune_(model, config)
    assert model.features[2].conv1.weight.shape == (16, 16, 3, 3)


def test_ratios_rounds_and_multiples(resnet20, gray):
    assert set(widths(prune_(resnet20(), PruneConfig(ratio=0.3, importance="random"))).values()) == {
        (16, 12),  # at most this share goes
        (32, 23),
        (64, 45),
        (10, 10),
    }
    rounded = PruneConfig(ratio=0.3, importance="random", round_to=8)
    assert set(widths(prune_(resnet20(), rounded)).values()) == {(16, 16), (32, 24), (64, 48), (10, 10)}
    in_rounds = PruneConfig(ratio=0.3, importance="variance", iterative=3)
    assert widths(prune_(resnet20(), in_rounds, gray))["features.9.conv1"] == (64, 45)


@pytest.mark.parametrize("name", ["adds", "energy"])
def test_a_target_is_reached_and_hardly_more(resnet20, name):
    model = resnet20()
    convert_(model)
    report = prune_(model, PruneConfig(target=f"{name}=60%", importance="random"))
    assert 0.5 < report.after[name] / report.before[name] <= 0.6


def test_channels_are_compared_across_layers(resnet20, gray):
    model = resnet20()
    model.features[9].bn1.weight.data *= 0.01
    report = prune_(model, PruneConfig(ratio=0.1, importance="batchnorm", global_pruning=True))
    pruned = {path: after for path, (before, after) in widths(report).items() if after < before}
    assert set(pruned) == {"features.9.conv1"}
    assert 448 - sum(after for path, (_, after) in widths(report).items() if path != "fc") == 45


def test_grouped_and_depthwise_layers(tiny):
    model = tiny()
    images = torch.randn(32, 3, 8, 8)
    convert_(model, example_input=images[:1])
    report = prune_(model, HALF, images)
    assert (model.grouped.groups, model.depthwise.groups) == (2, 4)
    assert model(images[:2]).shape == (2, 5)
    assert [row.reason for row in report.groups if row.layers == ("head",)] == ["the model's outputs"]


def test_ignored_layers_stay(resnet20):
    report = prune_(resnet20(), PruneConfig(ratio=0.5, importance="random", ignore=("features.1.*",)))
    found = {group.layers[0]: group for group in report.groups}
    assert found["features.1.conv1"].after == 16
    assert found["features.0.0"].reason == "features.1.conv2 is ignored"
    assert found["features.2.conv1"].after == 8


def test_what_cannot_be_done_is_said(resnet20):
    with pytest.raises(AdderkitError, match="measured on images"):
        prune_(resnet20(), HALF)
    with pytest.raises(NoModuleMatchedError, match="ignored"):
        prune_(resnet20(), PruneConfig(ratio=0.5, importance="random", ignore=("*",)))
    with pytest.raises(NoModuleMatchedError, match="less than one"):
        prune_(resnet20(), PruneConfig(ratio=0.01, importance="random"))
    with pytest.raises(AdderkitError, match="cannot be reached"):
        prune_(resnet20(), PruneConfig(target="adds=1%", importance="random", ignore=("features.1.*",)))


def test_a_target_out_of_reach_leaves_the_model_as_it_was(resnet20, snapshot):
    model = resnet20()
    before = snapshot(model)
    with pytest.raises(AdderkitError, match="cannot be reached"):
        prune_(model, PruneConfig(target="adds=1%", importance="magnitude", iterative=4, ignore=("features.1.*",)))
    assert snapshot(model) == before


class Shuffled(nn.Module):
    """Channels change places between two layers, which no dependency graph of ours sees."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 1)
        self.second = nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.second(self.first(x).flip(1))


class PaddedShortcut(nn.Module):
    """Two convolutions beside a shortcut without weights: every second pixel, zeros for the new channels."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv1, self.norm1 = nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16)
        self.conv2, self.norm2 = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        x = self.norm0(self.stem(x)).relu()
        y = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        return self.fc((nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4)) + y).relu().mean((2, 3)))


def test_channels_beside_a_padded_shortcut_are_kept():
    """He's shortcuts for CIFAR: the channels within a block go, those of the residual stream stay."""
    model = PaddedShortcut().eval()
    report = adderkit.prune_(model, PruneConfig(ratio=0.5), torch.randn(32, 3, 8, 8))
    assert (model.conv1.out_channels, model.conv2.in_channels) == (8, 8)
    assert (model.stem.out_channels, model.conv1.in_channels, model.conv2.out_channels) == (8, 8, 16)
    kept = next(row for row in report.groups if row.layers[0] == "stem" or "stem" in row.layers)
    assert "padded or cut" in kept.reason
    assert kept.before == kept.after
    assert model(torch.randn(2, 3, 8, 8)).shape == (2, 5)


def test_channels_that_cannot_be_followed_are_refused_before_anything_changes():
    model = Shuffled()
    model.first.weight.data[:4] *= 0.1
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(AdderkitError, match="mixes channels"):
        prune_(model, BY_WEIGHT, example_input=torch.zeros(1, 3, 4, 4))
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


ORDERS = {
    "prune": [BY_WEIGHT],
    "prune-convert": [BY_WEIGHT, "convert"],
    "convert-prune": ["convert", BY_WEIGHT],
    "convert-prune-revert": ["convert", BY_WEIGHT, "revert"],
    "prune-convert-prune-revert-part": [BY_WEIGHT, "convert", BY_WEIGHT, "revert-part"],
}


@pytest.mark.parametrize("order", list(ORDERS))
def test_all_orders_save_and_load(resnet20, gray, tmp_path, order):
    model = resnet20()
    for step in ORDERS[order]:
        if isinstance(step, PruneConfig):
            prune_(model, step)
        elif step == "convert":
            convert_(model)
        else:
            revert_(model, ("features.4.*",) if step == "revert-part" else ("*",))
    again = load(save(model, tmp_path / "saved"))
    assert again(gray).equal(model.eval()(gray))
    assert transforms_of(again) == transforms_of(model)
    assert cost(again).additions == cost(model).additions


def test_inserted_normalizations_and_baked_weights(tmp_path):
    model = timm.create_model("nf_resnet26", num_classes=10).eval()  # no BatchNorm, scaled and standardized weights
    convert_(model)
    prune_(model, BY_WEIGHT, example_input=torch.zeros(1, 3, 64, 64))
    images = torch.randn(2, 3, 64, 64)
    again = load(save(model, tmp_path / "saved"))
    assert again(images).equal(model.eval()(images))
    revert_(model)
    again = load(save(model, tmp_path / "reverted"))
    torch.testing.assert_close(again(images), model.eval()(images))


def test_calibration_with_the_whole_teacher_is_refused(resnet20, gray):
    teacher = resnet20()
    student = copy.deepcopy(teacher)
    convert_(student)
    prune_(student, BY_WEIGHT)
    with pytest.raises(AdderkitError, match="pass the network that was converted"):
        calibrate_(student, teacher, gray)


def test_blocks_are_matched_where_both_networks_have_them(resnet20, gray):
    """Inside its blocks a student may be narrower; where its residual stream is, no block can be compared."""
    teacher = resnet20()
    config = CalibrationConfig(matching_steps=2, memory=1 << 28)
    options = {"generator": torch.Generator(), "progress": lambda *_: None}
    stream = ("features.0.0", "*.conv2", "*.downsample.*")
    for ignore in (stream, ()):
        student = copy.deepcopy(teacher)
        convert_(student)
        prune_(student, PruneConfig(ratio=0.5, importance="magnitude", ignore=ignore))
        before = student.features[4].conv1.weight.detach().clone()
        if ignore:
            match_blocks_(student, teacher, gray, config, **options)
            assert not student.features[4].conv1.weight.equal(before)
        else:
            with pytest.raises(AdderkitError, match="only with a network of the same channels"):
                match_blocks_(student, teacher, gray, config, **options)


def test_a_failure_in_a_later_round_changes_nothing(resnet20, gray, snapshot, monkeypatch):
    model = resnet20()
    convert_(model)
    before, rounds = snapshot(model), []

    def check(*arguments):
        rounds.append(arguments)
        if len(rounds) == 3:
            raise AdderkitError("the third round fails")
        check_pruning(*arguments)

    monkeypatch.setattr(prune_module, "check_pruning", check)
    with pytest.raises(AdderkitError, match="third round"):
        prune_(model, PruneConfig(ratio=0.5, iterative=3), gray)
    assert snapshot(model) == before
    assert model(gray).isfinite().all()


@pytest.mark.parametrize(
    "config",
    [
        PruneConfig(ratio=0.95, iterative=4, round_to=8),
        PruneConfig(ratio=0.99, global_pruning=True, importance="magnitude"),
        PruneConfig(ratio=0.999, iterative=2, importance="magnitude"),
    ],
    ids=["multiples-of-8", "global", "nearly-all"],
)
@pytest.mark.parametrize("name", ["test_efficientnet", "test_convnext"])
def test_extreme_prunings_leave_a_network(name, config, tmp_path):
    """Gates, depthwise layers and LayerNorms, which lose channels with their neighbors."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=4, pretrained_cfg_overlay={"input_size": (3, 32, 32)}).eval()
    images = torch.randn(4, 3, 32, 32)
    report = prune_(model, config, images)
    layers = dict(model.named_modules())
    for group in report.groups:
        assert group.after == group.before or group.after % config.round_to == 0
        assert layers[group.layers[0]].weight.shape[0] == group.after > 0
    assert model(images).isfinite().all()
    torch.testing.assert_close(load(save(model, tmp_path / "pruned"))(images), model.eval()(images))


def test_multiples_of_more_channels_than_there_are_change_nothing(resnet20, gray, snapshot):
    model = resnet20()
    before = snapshot(model)
    with pytest.raises(NoModuleMatchedError, match=r"multiples of 1000; .*choose a smaller round_to"):
        prune_(model, PruneConfig(ratio=0.95, iterative=2, round_to=1000), gray)
    assert snapshot(model) == before


@pytest.mark.parametrize("feature_cls", ["list", "dict", "hook", "fx", "getter"])
def test_backbone_keeps_the_channels_of_its_maps(feature_cls):
    torch.manual_seed(0)
    arguments = {"features_only": True, "feature_cls": feature_cls, "out_indices": (1, 2)}
    model = timm.create_model("test_resnet", **arguments).eval()
    images = torch.randn(2, 3, 32, 32)
    report = prune_(model, BY_WEIGHT, example_input=images[:1])
    found = model(images)
    maps = list(found.values()) if isinstance(found, dict) else found
    assert [one.shape[1] for one in maps] == model.feature_info.channels() == [32, 48]
    halved = {path.rpartition("layer")[2] for path, (before, after) in widths(report).items() if 2 * after == before}
    assert {"1.0.conv1", "2.0.conv1"} <= halved
