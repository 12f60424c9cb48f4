"""The name ``adder`` in timm's registry: a base model, its transforms, and its weights."""

import pytest
import timm
import torch
from safetensors.torch import save_file

from adderkit.adder_layers.conv import AdderConv2d
from adderkit.adder_layers.modules import adder_layers
from adderkit.convert.conversion.rewrite import convert_
from adderkit.convert.errors import CheckpointError
from adderkit.convert.record import transforms_of

TRANSFORM = {"kind": "adder", "version": 1, "modules": ["features.1.conv1", "features.4.downsample.0"]}


@pytest.mark.parametrize("name", ["adder", "cifar_resnet20", "cifar_resnet32", "cifar_vgg_small"])
def test_names_are_registered(name):
    assert timm.is_model(name)
    assert not timm.is_model_pretrained(name)


def test_base_and_steps():
    model = timm.create_model("adder", base="cifar_resnet20", transforms=[TRANSFORM], num_classes=4, in_chans=1)
    assert set(adder_layers(model)) == set(TRANSFORM["modules"])
    assert isinstance(model.get_submodule("features.1.conv1"), AdderConv2d)
    assert transforms_of(model) == [TRANSFORM]
    assert model(torch.randn(2, 1, 8, 8)).shape == (2, 4)
    assert model.pretrained_cfg["architecture"] == "adder"
    assert model.pretrained_cfg["classifier"] == "fc"


@pytest.mark.parametrize("base", ["", "adder", "nonsense", "hf-hub:x/y", "local-dir:/tmp", None, 7])
def test_base_must_be_a_registered_name(base):
    arguments = {} if base is None else {"base": base}
    with pytest.raises(CheckpointError, match="expected the name of a registered timm model"):
        timm.create_model("adder", transforms=[], **arguments)


def test_transforms_that_do_not_fit():
    with pytest.raises(CheckpointError, match="does not fit its base model"):
        timm.create_model("adder", base="test_resnet", transforms=[TRANSFORM])


def test_weights_of_a_file(tmp_path):
    model = timm.create_model("cifar_resnet20").eval()
    convert_(model)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    loaded = timm.create_model(
        "adder",
        pretrained=True,
        base="cifar_resnet20",
        transforms=transforms_of(model),
        pretrained_cfg_overlay={"file": str(tmp_path / "weights.safetensors")},
    ).eval()
    image = torch.randn(1, 3, 16, 16)
    assert torch.equal(loaded(image), model(image))


def test_pretrained_without_weights_is_an_error():
    with pytest.raises(Exception, match=r"(?i)pretrained|weights"):
        timm.create_model("adder", pretrained=True, base="cifar_resnet20", transforms=[TRANSFORM])
