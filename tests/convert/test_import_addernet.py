"""Checkpoints of AdderNet's published code: the same function under our names, or one clear line."""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from timm.data import resolve_model_data_config
from torch import nn

import adderkit
from adderkit.adder_layers.modules import adder_layers
from adderkit.convert.errors import CheckpointError, ModelSourceError, NoModuleMatchedError
from adderkit.convert.import_addernet import import_checkpoint
from adderkit.convert.model_source import ModelSource

_spec = importlib.util.spec_from_file_location("published_networks", Path(__file__).with_name("published_networks.py"))
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)
Published = _module.Published


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A published ResNet-20, its images, and its state dict in a file as ``DataParallel`` names it."""
    torch.manual_seed(0)
    network = Published((3, 3, 3), (16, 32, 64))
    images = torch.randn(2, 3, 32, 32)
    network(images, measure=True)
    file = tmp_path_factory.mktemp("published") / "r20.pth"
    torch.save({f"module.{key}": value for key, value in network.state.items()}, file)
    return network, images, file


def assert_same(model, network, images):
    """Compare logits in fp64, since statistics of two images on tiny maps make much of rounding."""
    twin = copy.copy(network)
    twin.state = {key: value.double() for key, value in network.state.items()}
    with torch.no_grad():
        torch.testing.assert_close(model.double()(images.double()), twin(images.double()), rtol=1e-4, atol=1e-4)


def test_resnet20_computes_what_the_published_network_does(published):
    network, images, file = published
    model, plan = import_checkpoint(file, "cifar_resnet20")
    assert_same(model, network, images)
    assert len(adder_layers(model)) == len(plan.paths("convert")) == 20
    assert not model.training


@pytest.mark.parametrize(
    ("name", "stages", "bottleneck", "adders"),
    [("resnet18", (2, 2, 2, 2), False, 19), ("resnet50", (3, 4, 6, 3), True, 52)],
)
def test_imagenet_networks_with_the_norm_of_the_logits_in_the_classifier(tmp_path, name, stages, bottleneck, adders):
    network = Published(stages, (64, 128, 256, 512), bottleneck=bottleneck, classes=7, imagenet=True)
    images = torch.randn(2, 3, 32, 32)
    network(images, measure=True)
    torch.save({"epoch": 90, "state_dict": network.state}, tmp_path / "net.pth")
    model, _ = import_checkpoint(tmp_path / "net.pth", name, num_classes=7)
    assert_same(model, network, images)
    assert len(adder_layers(model)) == adders
    assert isinstance(model.fc, nn.Linear)


def test_logits_without_a_norm_and_a_classifier_that_is_linear(tmp_path):
    network = Published((2, 2, 2, 2), (64, 128, 256, 512), classes=7, imagenet=True)
    state = {key: value for key, value in network.state.items() if not key.startswith("bn2.")}
    state["fc.weight"] = state["fc.weight"].flatten(1)
    torch.save(state, tmp_path / "net.pth")
    model, _ = import_checkpoint(tmp_path / "net.pth", "resnet18")
    assert torch.equal(model.fc.weight, state["fc.weight"])
    assert torch.equal(model.fc.bias, state["fc.bias"])


def test_names_of_our_own_with_only_the_parameter_renamed(tmp_path):
    model = ModelSource("cifar_vgg_small", pretrained=False, num_classes=4).build()
    adderkit.convert_(model)
    renames = {f"{path}.weight": f"{path}.adder" for path in adder_layers(model)}
    torch.save({renames.get(key, key): value for key, value in model.state_dict().items()}, tmp_path / "vgg.pth")
    imported, _ = import_checkpoint(tmp_path / "vgg.pth", "cifar_vgg_small")
    assert set(adder_layers(imported)) == set(adder_layers(model))
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in imported.state_dict().items())


def test_images_are_prepared_as_the_published_code_does(published, tmp_path):
    model, _ = import_checkpoint(published[2], "cifar_resnet20")
    adderkit.save(model, tmp_path / "saved")
    config = resolve_model_data_config(adderkit.load(tmp_path / "saved"))
    assert tuple(config["std"]) == (0.2023, 0.1994, 0.2010)
    assert config["input_size"] == (3, 32, 32)


def test_it_does_not_pass_for_weights_of_timm(tmp_path):
    network = Published((2, 2, 2, 2), (64, 128, 256, 512), classes=7, imagenet=True)
    torch.save(network.state, tmp_path / "net.pth")
    model, _ = import_checkpoint(tmp_path / "net.pth", "resnet18")
    assert not any(model.pretrained_cfg.get(key) for key in ("url", "hf_hub_id", "tag", "license"))
    assert (model.pretrained_cfg["crop_pct"], model.pretrained_cfg["interpolation"]) == (0.875, "bilinear")


def test_saved_and_loaded(published, tmp_path, adder_kit):
    network, images, file = published
    status, out, err = adder_kit("import-checkpoint", file, "--model", "cifar_resnet20", "--output", "imported")
    assert (status, err) == (0, "")
    assert "is cifar_resnet20 with 20 adder layers, 10 classes; saved in imported/" in out
    assert_same(adderkit.load(tmp_path / "imported"), network, images)


# Files of other libraries


def test_layers_that_are_named(tmp_path):
    """The imported layer computes the distance to the weights of the file; written out, not by our operator."""
    torch.manual_seed(0)
    state = ModelSource("cifar_resnet20", pretrained=False, num_classes=4).build().state_dict()
    torch.save({"model": {f"module.{key}": value for key, value in state.items()}}, tmp_path / "net.pth")
    patterns = ("features.?.conv1", r"re:features\.[1-9]\.conv2")
    model, plan = import_checkpoint(tmp_path / "net.pth", "cifar_resnet20", adder_layers=patterns)
    expected = [f"features.{block}.conv{layer}" for block in range(1, 10) for layer in (1, 2)]
    assert sorted(plan.paths("convert")) == expected
    assert set(adder_layers(model)) == set(expected)
    assert torch.equal(model.state_dict()["features.3.conv2.weight"], state["features.3.conv2.weight"])
    image = torch.randn(1, 16, 8, 8)
    weight = state["features.3.conv2.weight"]
    windows = nn.functional.unfold(image, 3, padding=1)
    distance = -(windows - weight.flatten(1)[:, :, None]).abs().sum(1).reshape(1, 16, 8, 8)
    torch.testing.assert_close(model.get_submodule("features.3.conv2")(image), distance, rtol=1e-5, atol=1e-4)


def test_pattern_that_matches_nothing(published):
    with pytest.raises(
        NoModuleMatchedError, match=r"'features\.1\.conv9' matches none of 22 .* did you mean 'features\.1"
    ):
        import_checkpoint(published[2], "cifar_resnet20", adder_layers=("features.1.conv9",))


def test_adder_network_that_torch_saved(tmp_path):
    """PyTorch saves a version with each layer, which tells the adder layers without a pattern."""
    model = ModelSource("cifar_vgg_small", pretrained=False, num_classes=4).build()
    adderkit.convert_(model)
    torch.save({"state_dict": nn.DataParallel(model).state_dict()}, tmp_path / "vgg.pth")
    imported, _ = import_checkpoint(tmp_path / "vgg.pth", "cifar_vgg_small")
    assert set(adder_layers(imported)) == set(adder_layers(model))
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in imported.state_dict().items())


# What is refused


def test_weights_of_a_cnn(tmp_path):
    torch.save(ModelSource("cifar_resnet20", pretrained=False).build().state_dict(), tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"no parameter called 'adder'.*adderkit convert --model cifar_resnet20"):
        import_checkpoint(tmp_path / "a.pth", "cifar_resnet20")


def test_another_network(published):
    with pytest.raises(CheckpointError, match=r"(is not a checkpoint of|does not fit) resnet18"):
        import_checkpoint(published[2], "resnet18")
    with pytest.raises(CheckpointError, match=r"does not fit cifar_resnet32: tensors \d+ missing"):
        import_checkpoint(published[2], "cifar_resnet32")


def test_other_classes_than_asked_for(published):
    with pytest.raises(CheckpointError, match="has 10 classes, expected the 100 of --num-classes"):
        import_checkpoint(published[2], "cifar_resnet20", num_classes=100)


def test_unknown_model(published):
    with pytest.raises(ModelSourceError, match="timm has no model"):
        import_checkpoint(published[2], "resnet21")


@pytest.mark.parametrize("name", ["bn2.weight", "bn2.running_var"])
def test_damaged_norm_of_the_logits(tmp_path, name):
    network = Published((2, 2, 2, 2), (64, 128, 256, 512), classes=7, imagenet=True)
    torch.save({**network.state, name: torch.ones(3)}, tmp_path / "net.pth")
    with pytest.raises(CheckpointError, match="bn2 is not a BatchNorm of 7 logits"):
        import_checkpoint(tmp_path / "net.pth", "resnet18")


def test_name_of_a_module_that_is_a_pattern(published, tmp_path):
    network, *_ = published
    torch.save({**network.state, "*.adder": torch.ones(3)}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match=r"\* is not a convolution there"):
        import_checkpoint(tmp_path / "evil.pth", "cifar_resnet20")
