"""Real architectures, pruned as CNNs and as adder networks: they run, cost less, and come back from a file."""

import pytest
import timm
import torch

import adderkit
from adderkit import PruneConfig
from adderkit.convert.pruning.channel_groups import channel_groups

MODELS = [
    "cifar_resnet20",
    "cifar_vgg_small",
    "resnet18",
    "resnet50",
    "resnext50_32x4d",
    "mobilenetv2_100",
    "efficientnet_lite0",
    "mobilenetv3_small_100",
    "convnext_atto",
    "regnetx_002",
    "densenet121",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("adder", [True, False], ids=["adder", "cnn"])
def test_a_third_of_the_channels_goes(name, adder, tmp_path):
    model = timm.create_model(name).eval()
    images = torch.randn(16, 3, 32, 32) if name.startswith("cifar") else torch.randn(16, 3, 64, 64)
    if adder:
        adderkit.convert_(model)
    groups = channel_groups(model, images[:1])
    assert [group.reason for group in groups if group.reason] == ["the model's outputs"]
    report = adderkit.prune_(model, PruneConfig(ratio=0.33), images)
    assert report.after["adds"] < 0.62 * report.before["adds"]
    assert report.after["params"] < 0.75 * report.before["params"]
    again = adderkit.load(adderkit.save(model, tmp_path / "saved"))
    assert again(images[:2]).equal(model.eval()(images[:2]))
    assert again(images[:2]).isfinite().all()


@pytest.mark.slow
def test_channels_that_depend_on_each_other_stay():
    """GhostNet joins halves by concatenation and adds the result to another layer's."""
    groups = channel_groups(timm.create_model("ghostnet_100"), torch.randn(1, 3, 64, 64))
    reasons = [group.reason for group in groups if group.reason is not None]
    assert any("depend on each other" in reason for reason in reasons)
    assert len(reasons) < len(groups)
