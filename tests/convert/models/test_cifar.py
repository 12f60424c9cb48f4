"""The paper's networks: sizes, shapes, timm's interface, and loading."""

import itertools

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

RESNETS = ["cifar_resnet20", "cifar_resnet32"]
NAMES = [*RESNETS, "cifar_vgg_small"]


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def resnet_parameters(blocks):
    """By hand: 3x3 convolutions, 1x1 shortcuts, two numbers a BatchNorm channel, a bias-free head."""
    total, channels = 3 * 16 * 9 + 2 * 16, 16
    for width in (16, 32, 64):
        for _ in range(blocks):
            total += (channels * width + width * width) * 9 + 4 * width
            total += channels * width + 2 * width if channels != width else 0
            channels = width
    return total + 64 * 10 + 2 * 10


@pytest.mark.parametrize(("name", "millions"), [("cifar_resnet20", 0.27), ("cifar_resnet32", 0.46)])
def test_parameters_of_the_resnets(name, millions):
    count = parameters(timm.create_model(name))
    assert count == resnet_parameters((int(name[-2:]) - 2) // 6)
    assert count / 1e6 == pytest.approx(millions, abs=0.01)


def test_parameters_of_the_vgg():
    widths = [3, 128, 128, 256, 256, 512, 512]
    convolutions = sum(9 * a * b + 2 * b for a, b in itertools.pairwise(widths))
    assert parameters(timm.create_model("cifar_vgg_small")) == convolutions + 512 * 16 * 10 + 2 * 10


@pytest.mark.parametrize(("name", "depth"), [("cifar_resnet20", 20), ("cifar_resnet32", 32)])
def test_depth(name, depth):
    model = timm.create_model(name)
    paths = [path for path, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    assert len([path for path in paths if "downsample" not in path]) == depth


@pytest.mark.parametrize("in_chans", [1, 3, 4])
@pytest.mark.parametrize("num_classes", [2, 100])
@pytest.mark.parametrize("name", NAMES)
def test_output_shape(name, num_classes, in_chans):
    model = timm.create_model(name, num_classes=num_classes, in_chans=in_chans).eval()
    with torch.no_grad():
        assert model(torch.randn(2, in_chans, 32, 32)).shape == (2, num_classes)


@pytest.mark.parametrize("size", [8, 28, 33])
@pytest.mark.parametrize("name", RESNETS)
def test_resnets_take_any_size(name, size):
    assert timm.create_model(name).eval()(torch.randn(1, 3, size, size)).shape == (1, 10)


@pytest.mark.parametrize("size", [8, 28, (16, 24)], ids=str)
def test_vgg_takes_the_size_it_was_built_for(size):
    height, width = (size, size) if isinstance(size, int) else size
    model = timm.create_model("cifar_vgg_small", img_size=size).eval()
    assert model.num_features == 512 * (height // 8) * (width // 8)
    assert model(torch.randn(1, 3, height, width)).shape == (1, 10)


@pytest.mark.parametrize(("name", "channels"), [("cifar_resnet20", (16, 32, 64)), ("cifar_vgg_small", (128, 256, 512))])
@torch.no_grad()
def test_feature_maps_are_the_last_of_each_resolution(name, channels):
    model, image = timm.create_model(name).eval(), torch.randn(2, 3, 32, 32)
    backbone = timm.create_model(name, features_only=True).eval()
    weights = model.features.state_dict(prefix="features.")
    backbone.load_state_dict({key.replace("features.", "features_"): value for key, value in weights.items()})
    seen, x = {}, image
    for layer in model.features:
        x = layer(x.clone())  # some layers change their input
        if not isinstance(layer, (nn.Dropout, nn.MaxPool2d)):
            seen[x.shape[-1]] = x
    found = backbone(image)
    assert [tuple(each.shape[1:]) for each in found] == [(c, 32 // 2**i, 32 // 2**i) for i, c in enumerate(channels)]
    assert backbone.feature_info.reduction() == [1, 2, 4]
    assert all(each.equal(seen[each.shape[-1]]) for each in found)


@pytest.mark.parametrize(("name", "shape"), [("cifar_resnet20", (64, 8, 8)), ("cifar_vgg_small", (512, 4, 4))])
def test_features_and_head_are_the_whole(name, shape):
    model, image = timm.create_model(name).eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        features = model.forward_features(image)
        pooled = model.forward_head(features, pre_logits=True)
        assert features.shape == (2, *shape)
        assert pooled.shape == (2, model.num_features) == (2, model.head_hidden_size)
        assert torch.equal(model.forward_head(features), model(image))
        logits = model.fc_norm(model.fc(pooled[:, :, None, None])).flatten(1)
        assert torch.equal(logits, model(image))


def test_pooling_is_the_mean():
    model, features = timm.create_model("cifar_resnet20").eval(), torch.randn(2, 64, 3, 5)
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), features.mean((2, 3)))


@pytest.mark.parametrize("name", NAMES)
def test_reset_classifier(name):
    model, image = timm.create_model(name).eval(), torch.randn(2, 3, 32, 32)
    model.reset_classifier(7)
    assert model.num_classes == 7
    assert model.get_classifier() is model.fc
    assert model.eval()(image).shape == (2, 7)
    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), nn.Identity)
    assert model(image).shape == (2, model.num_features)
    assert torch.equal(model(image), model.forward_head(model.forward_features(image), pre_logits=True))


def test_without_a_classifier():
    assert timm.create_model("cifar_resnet20", num_classes=0).eval()(torch.randn(2, 3, 8, 8)).shape == (2, 64)


def test_another_pooling_is_refused():
    with pytest.raises(ValueError, match="global_pool is 'max', expected 'avg'"):
        timm.create_model("cifar_resnet20").reset_classifier(5, "max")


def test_first_block_by_hand():
    model = timm.create_model("cifar_resnet20").double().eval()
    block, x = model.features[4], torch.randn(2, 16, 8, 8, dtype=torch.float64)
    for norm in (block.bn1, block.bn2, block.downsample[1]):
        nn.init.normal_(norm.running_mean)
    expected = torch.relu(
        block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(x))))) + block.downsample[1](block.downsample[0](x))
    )
    torch.testing.assert_close(block(x), expected)
    assert block(x).shape == (2, 32, 4, 4)


def test_dropout_rate():
    rates = [m.p for m in timm.create_model("cifar_resnet20", drop_rate=0.3).modules() if isinstance(m, nn.Dropout)]
    assert rates == [0.3]


@pytest.fixture
def weights(tmp_path):
    model = timm.create_model("cifar_resnet20").eval()
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    return model, {"file": str(tmp_path / "weights.safetensors")}


def test_loading(weights):
    model, source = weights
    loaded = timm.create_model("cifar_resnet20", pretrained=True, pretrained_cfg_overlay=source).eval()
    image = torch.randn(2, 3, 8, 8)
    assert torch.equal(loaded(image), model(image))


@pytest.mark.parametrize("classes", [0, 3, 100])
def test_loading_with_another_number_of_classes(weights, classes):
    model, source = weights
    loaded = timm.create_model(
        "cifar_resnet20", pretrained=True, pretrained_cfg_overlay=source, num_classes=classes
    ).eval()
    ours, theirs = loaded.state_dict(), model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if not name.startswith("fc"))
    assert loaded(torch.randn(2, 3, 8, 8)).shape == (2, classes or 64)


def test_loading_for_gray_images_sums_the_stem(weights):
    model, source = weights
    loaded = timm.create_model("cifar_resnet20", pretrained=True, pretrained_cfg_overlay=source, in_chans=1).eval()
    image = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(loaded(image), model(image.expand(-1, 3, -1, -1)), rtol=1e-3, atol=1e-4)
