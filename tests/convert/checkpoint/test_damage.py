"""Damaged and hostile checkpoints: refused with the cause, never computing something else, and no pickle is run."""

import json
import pickle
import re
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf

import adderkit
from adderkit.convert.errors import AdderkitError, CheckpointError
from adderkit.convert.model_source import ModelSource


class Malicious:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def edit(folder, change):
    """Alter ``config.json`` as somebody with an editor would."""
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def flip_a_byte(folder):
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def cut_short(size):
    def cut(folder):
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:size])

    return cut


def setter(*keys, value):
    """Put a value somewhere into ``config.json``."""

    def put(config):
        for key in keys[:-1]:
            config = config[key]
        config[keys[-1]] = value

    return lambda folder: edit(folder, put)


TRANSFORM = {"kind": "adder", "version": 1, "modules": ["features.1.conv1"]}
DAMAGE = {
    "no-config": (lambda folder: (folder / "config.json").unlink(), "config.json does not exist"),
    "config-not-json": (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
    "config-list": (lambda folder: (folder / "config.json").write_text("[]"), "expected a JSON object"),
    "no-weights": (lambda folder: (folder / "model.safetensors").unlink(), "safetensors does not exist"),
    "flipped-byte": (flip_a_byte, "SHA-256 differs"),
    "cut-in-the-data": (cut_short(-1000), "not a complete safetensors file"),
    "cut-in-the-header": (cut_short(100), "not a complete safetensors file"),
    "empty-weights": (cut_short(0), "not a complete safetensors file"),
    "unknown-architecture": (setter("architecture", value="resnet18x"), "'resnet18x'.*timm knows"),
    "architecture-number": (setter("architecture", value=7), "architecture is 7"),
    "architecture-url": (setter("architecture", value="hf-hub:x/y"), "'hf-hub:x/y'"),
    "base-hub": (setter("model_args", "base", value="hf-hub:x/y"), "base is 'hf-hub:x/y'"),
    "base-folder": (setter("model_args", "base", value="local-dir:/etc"), "base is 'local-dir:/etc'"),
    "base-itself": (setter("model_args", "base", value="adder"), "base is 'adder'"),
    "base-number": (setter("model_args", "base", value=7), "base is 7"),
    "base-missing": (lambda folder: edit(folder, lambda config: config["model_args"].pop("base")), "base is ''"),
    "base-other": (setter("model_args", "base", value="test_resnet"), "does not fit its base model"),
    "transforms-number": (setter("model_args", "transforms", value=7), "transforms"),
    "transforms-string": (setter("model_args", "transforms", value="adder"), "unknown transform"),
    "transforms-unknown": (setter("model_args", "transforms", value=[{"kind": "nonsense"}]), "unknown transform"),
    "transforms-version": (setter("model_args", "transforms", value=[{**TRANSFORM, "version": 9}]), "version 9"),
    "transforms-path": (
        setter("model_args", "transforms", value=[{**TRANSFORM, "modules": ["no"]}]),
        "'no' does not exist",
    ),
    "model-args-list": (setter("model_args", value=[]), "base|model_args"),
    "model-args-unknown": (setter("model_args", "nonsense", value=1), "nonsense"),
    "pretrained-cfg-list": (setter("pretrained_cfg", value=[]), "does not fit|pretrained_cfg|fits"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_refused_with_its_cause(saved, damage, message):
    damage(saved)
    with pytest.raises(CheckpointError, match=message):
        adderkit.load(saved)


@pytest.mark.parametrize("keys", [("model_args", "num_classes"), ("num_classes",), ("pretrained_cfg", "num_classes")])
def test_damaged_number_of_classes_never_gives_a_random_head(saved, adder_model, keys, same_tensors):
    setter(*keys, value=7)(saved)
    try:
        loaded = adderkit.load(saved)
    except CheckpointError:
        loaded = adder_model
    assert same_tensors(loaded, adder_model)


def without_the_last_module(config):
    config["model_args"]["transforms"][0]["modules"].pop()


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config["model_args"].pop("transforms"),
        lambda config: config["model_args"].update(transforms=None),
        lambda config: config["model_args"].update(transforms=[]),
        without_the_last_module,
        lambda config: config.update(architecture="cifar_resnet20", model_args={"in_chans": 1}),
    ],
    ids=["missing", "null", "empty", "one-module-fewer", "calls-itself-a-cnn"],
)
def test_altered_transforms_never_compute_another_function(saved, adder_model, gray_images, change):
    # The weights fit the convolutions as well, and their metadata says what they are for.
    edit(saved, change)
    try:
        loaded = adderkit.load(saved)
    except CheckpointError:
        loaded = adder_model
    assert torch.equal(loaded(gray_images), adder_model(gray_images))


def test_number_of_classes_damaged_everywhere(saved):
    def change(config):
        config["num_classes"] = config["model_args"]["num_classes"] = config["pretrained_cfg"]["num_classes"] = 7

    edit(saved, change)
    with pytest.raises(CheckpointError, match=r"fc\.weight"):
        adderkit.load(saved)


@pytest.mark.parametrize("other", ["wider", "cnn-of-timm"])
def test_weights_of_another_model(saved, tmp_path, other):
    name = "cifar_resnet32" if other == "wider" else "test_resnet"
    save_file(timm.create_model(name).state_dict(), saved / "model.safetensors")
    with pytest.raises(CheckpointError, match="SHA-256 differs"):
        adderkit.load(saved)
    edit(saved, lambda config: config.pop("adderkit"))
    with pytest.raises(CheckpointError, match=r"expected .* by the transforms in config\.json"):
        adderkit.load(saved)


@pytest.mark.parametrize("value", [None, 7, [], {}], ids=str)
def test_checkpoint_without_a_checksum(saved, adder_model, value, same_tensors):
    # So it is with the checkpoints of timm.
    setter("adderkit", value=value)(saved)
    assert same_tensors(adderkit.load(saved), adder_model)


@pytest.mark.parametrize("value", [7, "", [], "0" * 64], ids=str)
def test_checksum_of_another_form(saved, value):
    setter("adderkit", value={"sha256": value})(saved)
    with pytest.raises(CheckpointError, match="SHA-256"):
        adderkit.load(saved)


def test_configuration_cannot_point_to_another_file(saved, adder_model, tmp_path, same_tensors):
    other = tmp_path / "other.safetensors"
    save_file({name: torch.zeros_like(value) for name, value in adder_model.state_dict().items()}, other)
    setter("pretrained_cfg", "file", value=str(other))(saved)
    setter("pretrained_cfg", "source", value="")(saved)
    try:
        loaded = adderkit.load(saved)
    except CheckpointError:
        loaded = adder_model
    assert same_tensors(loaded, adder_model)


def test_model_arguments_cannot_name_another_checkpoint(saved, adder_model, tmp_path):
    other = tmp_path / "other.safetensors"
    save_file({name: torch.zeros_like(value) for name, value in adder_model.state_dict().items()}, other)
    setter("model_args", "checkpoint_path", value=str(other))(saved)
    with pytest.raises(CheckpointError, match="checkpoint_path"):
        adderkit.load(saved, pretrained=False)


@pytest.mark.parametrize("source", ["nowhere", "local-dir:nowhere", ""], ids=str)
def test_folder_that_is_none(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"not a folder|config\.json does not exist"):
        adderkit.load(source)


def test_hub_that_cannot_be_reached():
    with pytest.raises(AdderkitError, match="nobody/nothing"):
        adderkit.load("hf-hub:nobody/nothing")


# Pickles


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.pth", "model.pth"])
def test_pickle_beside_the_configuration_is_never_run(saved, tmp_path, name):
    (saved / "model.safetensors").unlink()
    torch.save({"fc.weight": Malicious(tmp_path / "pwned")}, saved / name)
    with pytest.raises(CheckpointError, match=r"model\.safetensors does not exist"):
        adderkit.load(saved)
    assert not (tmp_path / "pwned").exists()


def test_folder_of_timm_without_safetensors(tmp_path):
    """The message names what reads the file, and that does."""
    model = timm.create_model("cifar_resnet20").eval()
    save_for_hf(model, tmp_path / "net", safe_serialization=False)
    with pytest.raises(CheckpointError, match=r"\.bin with --checkpoint and its architecture") as caught:
        adderkit.load(tmp_path / "net")
    pickled = re.search(r"\S+pytorch_model\.bin", str(caught.value))[0]
    images = torch.randn(2, 3, 32, 32)
    assert ModelSource("cifar_resnet20", checkpoint=pickled).build()(images).equal(model(images))


def test_pickle_in_the_place_of_the_weights_is_never_run(saved, tmp_path):
    (saved / "model.safetensors").write_bytes(pickle.dumps(Malicious(tmp_path / "pwned")))
    edit(saved, lambda config: config.pop("adderkit"))
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        adderkit.load(saved)
    assert not (tmp_path / "pwned").exists()


def test_pickle_named_by_the_configuration_is_never_run(saved, tmp_path):
    torch.save({"fc.weight": Malicious(tmp_path / "pwned")}, tmp_path / "evil.pth")
    setter("model_args", "checkpoint_path", value=str(tmp_path / "evil.pth"))(saved)
    with pytest.raises(CheckpointError):
        adderkit.load(saved)
    assert not (tmp_path / "pwned").exists()
