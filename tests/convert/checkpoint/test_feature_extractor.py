"""Backbones of saved models: ``features_only=True`` of timm gives the maps that the whole network computes inside."""

import json

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import adderkit
from adderkit.convert.errors import CheckpointError
from adderkit.convert.record import transforms_of


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def saved(tmp_path):
    """Build and save a converted classifier whose every tensor is unlike that of a new model."""

    def build(name, prune=False):
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=5)
        adderkit.convert_(model)
        if prune:
            adderkit.prune_(model, adderkit.PruneConfig(ratio=0.5, importance="magnitude"))
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) * 0.2 + 0.1)
        return model.eval(), adderkit.save(model, tmp_path / "saved")

    return build


def extractor(folder, **arguments):
    return timm.create_model(f"local-dir:{folder}", features_only=True, **{"pretrained": True, **arguments}).eval()


def maps(model, images):
    found = model(images)
    return list(found.values()) if isinstance(found, dict) else found


@pytest.mark.parametrize(
    ("name", "feature_cls"),
    [
        ("test_resnet", "list"),
        ("test_resnet", "dict"),
        ("test_resnet", "hook"),
        ("test_resnet", "fx"),
        ("test_resnet", "getter"),
        ("test_convnext", None),  # flattened: stages_0 for stages.0
        ("test_efficientnet", None),  # a class of its own
    ],
)
@torch.no_grad()
def test_maps_are_those_inside_the_saved_classifier(saved, images, name, feature_cls):
    model, folder = saved(name)
    inside = model.forward_intermediates(images, intermediates_only=True)
    backbone = extractor(folder, feature_cls=feature_cls, out_indices=(1, 2))
    found = maps(backbone, images)
    assert len(found) == 2
    for one in found:
        assert any(one.shape == other.shape and torch.allclose(one, other, rtol=1e-4) for other in inside)
    assert any(isinstance(module, adderkit.AdderConv2d) for module in backbone.modules())


@torch.no_grad()
def test_backbone_of_a_pruned_network(saved, images):
    model, folder = saved("test_resnet", prune=True)
    wanted = model.forward_intermediates(images, indices=[1], intermediates_only=True)[0]
    torch.testing.assert_close(extractor(folder, out_indices=(1,))(images)[0], wanted, rtol=1e-4, atol=1e-5)


def test_record_has_the_names_of_the_extractor_alone(saved):
    _, folder = saved("test_convnext")
    backbone = extractor(folder, out_indices=(0, 1))
    modules = dict(backbone.named_modules())
    (transform,) = transforms_of(backbone)
    assert transform["modules"] == [name for name, m in modules.items() if isinstance(m, adderkit.AdderConv2d)]
    assert all(name.startswith("stages_") for name in transform["modules"])


def test_without_weights(saved):
    _, folder = saved("test_resnet")
    assert not torch.equal(*(extractor(folder, pretrained=given).layer1[0].conv1.weight for given in (True, False)))


def test_weights_that_lack_a_tensor_of_the_extractor_are_refused(saved):
    _, folder = saved("test_resnet")
    state = load_file(folder / "model.safetensors")
    state.pop("layer1.0.bn1.bias")
    save_file(state, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["adderkit"].pop("sha256")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"lacks 1 of the \d+ tensors .*such as layer1\.0\.bn1\.bias"):
        extractor(folder)


def test_quantized_network_is_refused(cnn_folder, tmp_path):
    model = adderkit.load(cnn_folder)
    network = adderkit.quantize(model, torch.randn(16, 1, 8, 8))
    folder = adderkit.save(network, tmp_path / "integers")
    with pytest.raises(CheckpointError, match=r"'quantize' transform, expected a float network for features_only"):
        extractor(folder)


@pytest.mark.parametrize(
    ("name", "feature_cls"),
    [("test_resnet", "fx"), ("test_resnet", "hook"), ("test_convnext", None), ("test_efficientnet", None)],
)
@torch.no_grad()
def test_saved_extractor_gives_the_same_maps(images, tmp_path, name, feature_cls):
    model = timm.create_model(name, features_only=True, feature_cls=feature_cls, out_indices=(1, 2))
    adderkit.convert_(model)
    folder = adderkit.save(model.eval(), tmp_path / "backbone")
    built = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    for again in (adderkit.load(folder), built):
        for one, other in zip(again(images), model(images), strict=True):
            assert torch.equal(one, other)
        assert again.feature_info.channels() == model.feature_info.channels()
