"""Integer networks as somebody else may have written them: a plan's structure in the configuration, and its tensors."""

import json
import shutil
from os import environ

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import adderkit
from adderkit.convert.errors import CheckpointError

fuzz = settings.get_profile(environ.get("ADDERKIT_FUZZ", "quick"))

KEYS = st.sampled_from(
    [
        *(
            "kind",
            "path",
            "input",
            "output",
            "kernel",
            "stride",
            "padding",
            "dilation",
            "groups",
            "quant_max",
            "residual",
        ),
        *(
            "activations",
            "steps",
            "stem",
            "head",
            "scale",
            "outputs",
            "plan",
            "config",
            "version",
            "bits",
            "in_channels",
        ),
    ]
)
NUMBERS = st.integers(-2, 9) | st.sampled_from([255, 256, 1 << 20, 1 << 24, 10**30]) | st.floats()
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.sampled_from(["adder", "linear", "rescale", "max_pool", "x"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A folder with an integer network of 8x8 images, first and last layer in fp32."""
    torch.manual_seed(0)
    model = timm.create_model("cifar_resnet20", in_chans=1, pretrained_cfg_overlay={"input_size": (1, 8, 8)}).eval()
    config = adderkit.QuantizeConfig(first_last="fp32")
    network = adderkit.quantize(model, torch.randn(16, 1, 8, 8), config)
    return adderkit.save(network, tmp_path_factory.mktemp("saved") / "net")


@pytest.fixture
def folder(saved, place):
    """A copy to damage."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(saved, place)
    return place


def write(folder, transforms, tensors):
    """Weights and configuration that agree about the transforms, without a checksum."""
    config = json.loads((folder / "config.json").read_text())
    config["model_args"]["transforms"] = transforms
    config.pop("adderkit", None)
    (folder / "config.json").write_text(json.dumps(config))
    metadata = {"adderkit": json.dumps({"version": 1, "transforms": transforms})}
    save_file(tensors, folder / "model.safetensors", metadata)


@pytest.mark.filterwarnings("ignore")
@fuzz
@given(data=st.data())
def test_changed_plan(data, changed, saved, folder, survives):
    transforms = json.loads((saved / "config.json").read_text())["model_args"]["transforms"]
    write(folder, data.draw(changed(transforms, KEYS, VALUES)), load_file(saved / "model.safetensors"))
    model = survives(lambda: adderkit.load(folder))
    if model is not None:
        survives(lambda: model(torch.zeros(1, 1, 8, 8)) is None or None)


@pytest.mark.filterwarnings("ignore")
@fuzz
@given(name=st.integers(0, 10**6), value=st.integers(-(2**40), 2**40))
def test_changed_tensors(name, value, saved, folder, survives):
    """Whatever the integers are, the network loads and runs, or its plan is refused."""
    tensors = load_file(saved / "model.safetensors")
    whole = sorted(key for key, tensor in tensors.items() if not tensor.is_floating_point())
    chosen = tensors[whole[name % len(whole)]]
    chosen.flatten()[name % chosen.numel()] = torch.tensor(value).to(chosen.dtype)
    transforms = json.loads((saved / "config.json").read_text())["model_args"]["transforms"]
    write(folder, transforms, tensors)
    model = survives(lambda: adderkit.load(folder))
    if model is not None:
        assert model(torch.randn(1, 1, 8, 8)).shape == (1, 10)


def overflow(tensors):
    key = next(key for key in tensors if key.endswith(".offset"))
    tensors[key][0] = 2**62


def shift(tensors):
    tensors[next(key for key in tensors if key.endswith(".shift"))][0] = 63


@pytest.mark.parametrize(("damage", "message"), [(overflow, "could overflow"), (shift, "shifts by 63 bits")])
@pytest.mark.parametrize("load", [adderkit.load, lambda path: timm.create_model(f"local-dir:{path}", pretrained=True)])
def test_unsound_plans_are_refused(damage, message, load, saved, folder):
    tensors = load_file(saved / "model.safetensors")
    damage(tensors)
    write(folder, json.loads((saved / "config.json").read_text())["model_args"]["transforms"], tensors)
    with pytest.raises(CheckpointError, match=message):
        load(folder)
