"""Save and load: bit-equal, refused where anything is damaged, and never a pickle."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import adderkit
from adderkit.convert.checkpoint import base_architecture, read_report
from adderkit.convert.errors import AdderkitError, CheckpointError
from adderkit.convert.files import sha256
from adderkit.convert.rewrite import is_converted, steps_of

FILES = ["README.md", "adder_report.json", "config.json", "model.safetensors"]


class Malicious:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture(params=[False, True], ids=["cnn", "adder"])
def model(request, resnet20):
    network = resnet20()
    if request.param:
        adderkit.convert_(network)
    return network


@pytest.fixture
def adder_model(resnet20):
    network = resnet20()
    adderkit.convert_(network)
    return network


@pytest.fixture
def saved(adder_model, tmp_path):
    """A folder with an adder network."""
    return adderkit.save(adder_model, tmp_path / "saved")


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def edit(folder, change):
    """Alter ``config.json`` as somebody with an editor would."""
    config = config_of(folder)
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def same_tensors(first, second):
    ours, theirs = first.state_dict(), second.state_dict()
    return list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


# There and back


def test_load_gives_bit_equal_outputs(model, tmp_path, grey_images):
    folder = adderkit.save(model, tmp_path / "saved")
    loaded = adderkit.load(folder)
    assert torch.equal(loaded(grey_images), model(grey_images))
    assert same_tensors(loaded, model)
    assert steps_of(loaded) == steps_of(model)
    assert not loaded.training


def test_timm_gives_bit_equal_outputs(model, tmp_path, grey_images):
    folder = adderkit.save(model, tmp_path / "saved")
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert torch.equal(loaded(grey_images), model(grey_images))


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
def test_models_of_timm_itself(name, tmp_path):
    model, image = timm.create_model(name, num_classes=7).eval(), torch.randn(1, 3, 32, 32)
    adderkit.convert_(model)
    loaded = adderkit.load(adderkit.save(model, tmp_path / "saved"))
    assert torch.equal(loaded(image), model(image))


@pytest.mark.parametrize("form", [str, Path, "local-dir:{}".format], ids=["str", "path", "local-dir"])
def test_folder_can_be_named_in_three_ways(saved, adder_model, form):
    assert same_tensors(adderkit.load(form(saved)), adder_model)


def test_structure_alone(saved, adder_model, grey_images):
    loaded = adderkit.load(saved, pretrained=False)
    assert is_converted(loaded)
    assert not same_tensors(loaded, adder_model)


def test_saving_what_was_loaded_gives_equal_files(model, tmp_path):
    first = adderkit.save(model, tmp_path / "first")
    second = adderkit.save(adderkit.load(first), tmp_path / "second")
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours | theirs)
    assert {**config_of(second), "adderkit": None} == {**config_of(first), "adderkit": None}


def test_saving_again_gives_the_same_bytes(adder_model, tmp_path):
    folders = [adderkit.save(adder_model, tmp_path / str(index)) for index in range(10)]
    assert len({sha256(folder / "model.safetensors") for folder in folders}) == 1


def test_reverted_model_is_saved_as_a_cnn(saved, tmp_path, grey_images):
    model = adderkit.load(saved)
    adderkit.revert_(model)
    folder = adderkit.save(model, tmp_path / "reverted")
    config = config_of(folder)
    assert config["architecture"] == "cifar_resnet20"
    assert not {"base", "steps"} & set(config["model_args"])
    assert torch.equal(adderkit.load(folder)(grey_images), model(grey_images))


def test_partly_reverted_model(adder_model, tmp_path, grey_images):
    adderkit.revert_(adder_model, ("features.4.*",))
    loaded = adderkit.load(adderkit.save(adder_model, tmp_path / "saved"))
    assert torch.equal(loaded(grey_images), adder_model(grey_images))


def test_classifier_that_was_replaced(adder_model, tmp_path, grey_images):
    adder_model.reset_classifier(4)
    loaded = adderkit.load(adderkit.save(adder_model.eval(), tmp_path / "saved"))
    assert loaded.num_classes == 4
    assert torch.equal(loaded(grey_images), adder_model(grey_images))


@pytest.mark.parametrize("classes", [3, 17])
def test_another_number_of_classes_gives_a_fresh_head(saved, adder_model, grey_images, classes):
    loaded = timm.create_model(f"local-dir:{saved}", pretrained=True, num_classes=classes).eval()
    ours, theirs = loaded.state_dict(), adder_model.state_dict()
    assert loaded(grey_images).shape == (2, classes)
    assert is_converted(loaded)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if not name.startswith("fc"))


def test_channels_last_model(adder_model, tmp_path, grey_images):
    adder_model.to(memory_format=torch.channels_last)
    loaded = adderkit.load(adderkit.save(adder_model, tmp_path / "saved"))
    assert same_tensors(loaded, adder_model)
    assert adder_model.fc.weight.is_contiguous(memory_format=torch.channels_last)


def test_bfloat16_model(adder_model, tmp_path, grey_images):
    adder_model.to(torch.bfloat16)
    folder = adderkit.save(adder_model, tmp_path / "saved")
    assert load_file(folder / "model.safetensors")["fc.weight"].dtype == torch.bfloat16
    loaded = adderkit.load(folder).to(torch.bfloat16)
    assert torch.equal(loaded(grey_images.bfloat16()), adder_model(grey_images.bfloat16()))


def test_saving_leaves_the_model_alone(model, tmp_path, snapshot):
    model.train()
    before, arguments, config = snapshot(model), dict(model._model_args), model.pretrained_cfg
    adderkit.save(model, tmp_path / "saved")
    assert snapshot(model) == before
    assert model._model_args == arguments
    assert model.pretrained_cfg == config


# What is in the folder


def test_files(model, tmp_path):
    folder = adderkit.save(model, tmp_path / "a" / "saved")
    assert sorted(path.name for path in folder.iterdir()) == FILES


def test_config_of_an_adder_network(saved, adder_model):
    config = config_of(saved)
    assert config["architecture"] == "adder"
    assert config["model_args"]["base"] == "cifar_resnet20"
    assert config["model_args"]["steps"] == steps_of(adder_model)
    assert config["adderkit"] == {"version": 1, "sha256": sha256(saved / "model.safetensors")}


def test_config_of_a_cnn(resnet20, tmp_path):
    config = config_of(adderkit.save(resnet20(), tmp_path / "saved"))
    assert config["architecture"] == "cifar_resnet20"
    assert not {"base", "steps"} & set(config["model_args"])


def test_weights_and_their_metadata(saved, adder_model):
    with safe_open(saved / "model.safetensors", framework="pt") as file:
        metadata = file.metadata()
        assert set(file.keys()) == set(adder_model.state_dict())
    assert list(metadata) == ["adderkit"]  # several keys come in any order: equal models, different files
    assert json.loads(metadata["adderkit"]) == {"version": 1, "steps": steps_of(adder_model)}


def test_report(adder_model, tmp_path):
    folder = adderkit.save(adder_model, tmp_path / "saved", {"accuracy": 0.5, "teacher": "resnet20"})
    report = read_report(folder)
    assert (report["accuracy"], report["teacher"]) == (0.5, "resnet20")
    assert (report["architecture"], report["base"]) == ("adder", "cifar_resnet20")
    assert report["sha256"] == sha256(folder / "model.safetensors")
    packages = {"adderkit", "torch", "torchvision", "timm", "accelerate", "safetensors"}
    assert set(report["versions"]) == {"python", *packages}
    assert read_report(tmp_path) == {}


def test_card_says_how_to_load(saved, model, tmp_path):
    text = (saved / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: timm\n") or "library_name: timm" in text.split("---")[1]
    assert "- addernet" in text.split("---")[1]
    assert "import adderkit, timm" in text


def test_existing_card_is_kept(adder_model, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    adderkit.save(adder_model, tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_saving_over_a_checkpoint(adder_model, resnet20, saved, grey_images):
    other = resnet20()
    adderkit.save(other, saved)
    assert torch.equal(adderkit.load(saved)(grey_images), other(grey_images))
    assert sorted(path.name for path in saved.iterdir()) == FILES


def test_plain_timm_refuses(saved):
    code = f"import timm; timm.create_model('local-dir:{saved}', pretrained=True)"
    result = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "Unknown model (adder)" in result.stderr


# What cannot be saved


def test_model_outside_timm(tiny, tmp_path):
    with pytest.raises(CheckpointError, match=r"TinyNet cannot be saved.*timm\.create_model.*register_model"):
        adderkit.save(tiny(), tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_base_architecture(model):
    assert base_architecture(model) == "cifar_resnet20"


@pytest.mark.parametrize("inside", ["", "below"], ids=["file", "below-a-file"])
def test_file_in_the_place_of_the_folder(adder_model, tmp_path, inside):
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(CheckpointError, match="cannot be written") as caught:
        adderkit.save(adder_model, tmp_path / "taken" / inside)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "taken").read_text() == "mine"


def test_a_save_that_fails_leaves_the_old_checkpoint(saved, adder_model, grey_images):
    before = adderkit.load(saved)(grey_images)
    with torch.no_grad():
        adder_model.fc.weight.zero_()
    adder_model._model_args["act_layer"] = nn.ReLU  # what JSON cannot say
    with pytest.raises(CheckpointError, match="act_layer"):
        adderkit.save(adder_model, saved)
    assert torch.equal(adderkit.load(saved)(grey_images), before)


# Damage


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


STEP = {"step": "adder", "version": 1, "modules": ["features.1.conv1"]}
DAMAGE = {
    "no-config": (lambda folder: (folder / "config.json").unlink(), "config.json does not exist"),
    "config-not-json": (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
    "config-list": (lambda folder: (folder / "config.json").write_text("[]"), "expected a JSON object"),
    "no-weights": (lambda folder: (folder / "model.safetensors").unlink(), "safetensors does not exist"),
    "flipped-byte": (flip_a_byte, "SHA-256 differs"),
    "cut-in-the-data": (cut_short(-1000), "not a whole safetensors file"),
    "cut-in-the-header": (cut_short(100), "not a whole safetensors file"),
    "empty-weights": (cut_short(0), "not a whole safetensors file"),
    "unknown-architecture": (setter("architecture", value="resnet18x"), "'resnet18x'.*timm knows"),
    "architecture-number": (setter("architecture", value=7), "architecture is 7"),
    "architecture-url": (setter("architecture", value="hf-hub:x/y"), "'hf-hub:x/y'"),
    "base-hub": (setter("model_args", "base", value="hf-hub:x/y"), "base is 'hf-hub:x/y'"),
    "base-folder": (setter("model_args", "base", value="local-dir:/etc"), "base is 'local-dir:/etc'"),
    "base-itself": (setter("model_args", "base", value="adder"), "base is 'adder'"),
    "base-number": (setter("model_args", "base", value=7), "base is 7"),
    "base-missing": (lambda folder: edit(folder, lambda config: config["model_args"].pop("base")), "base is ''"),
    "base-other": (setter("model_args", "base", value="test_resnet"), "do not fit its base model"),
    "steps-number": (setter("model_args", "steps", value=7), "steps"),
    "steps-string": (setter("model_args", "steps", value="adder"), "unknown step"),
    "steps-unknown": (setter("model_args", "steps", value=[{"step": "quantise"}]), "unknown step"),
    "steps-version": (setter("model_args", "steps", value=[{**STEP, "version": 9}]), "version 9"),
    "steps-path": (setter("model_args", "steps", value=[{**STEP, "modules": ["no"]}]), "'no' does not exist"),
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
def test_damaged_number_of_classes_never_gives_a_random_head(saved, adder_model, keys):
    setter(*keys, value=7)(saved)
    try:
        loaded = adderkit.load(saved)
    except CheckpointError:
        loaded = adder_model
    assert same_tensors(loaded, adder_model)


def without_the_last_module(config):
    config["model_args"]["steps"][0]["modules"].pop()


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config["model_args"].pop("steps"),
        lambda config: config["model_args"].update(steps=None),
        lambda config: config["model_args"].update(steps=[]),
        without_the_last_module,
        lambda config: config.update(architecture="cifar_resnet20", model_args={"in_chans": 1}),
    ],
    ids=["missing", "null", "empty", "one-module-fewer", "calls-itself-a-cnn"],
)
def test_altered_steps_never_compute_another_function(saved, adder_model, grey_images, change):
    # The weights fit the convolutions as well, and their metadata says what they are for.
    edit(saved, change)
    try:
        loaded = adderkit.load(saved)
    except CheckpointError:
        loaded = adder_model
    assert torch.equal(loaded(grey_images), adder_model(grey_images))


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
    with pytest.raises(CheckpointError, match=r"expected .* by the steps in config\.json"):
        adderkit.load(saved)


@pytest.mark.parametrize("value", [None, 7, [], {}], ids=str)
def test_checkpoint_without_a_checksum(saved, adder_model, value):
    # So it is with the checkpoints of timm.
    setter("adderkit", value=value)(saved)
    assert same_tensors(adderkit.load(saved), adder_model)


@pytest.mark.parametrize("value", [7, "", [], "0" * 64], ids=str)
def test_checksum_of_another_form(saved, value):
    setter("adderkit", value={"sha256": value})(saved)
    with pytest.raises(CheckpointError, match="SHA-256"):
        adderkit.load(saved)


def test_configuration_cannot_point_to_another_file(saved, adder_model, tmp_path):
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


def test_pickle_in_the_place_of_the_weights_is_never_run(saved, tmp_path):
    (saved / "model.safetensors").write_bytes(pickle.dumps(Malicious(tmp_path / "pwned")))
    edit(saved, lambda config: config.pop("adderkit"))
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        adderkit.load(saved)
    assert not (tmp_path / "pwned").exists()


def test_pickle_named_by_the_configuration_is_never_run(saved, tmp_path):
    torch.save({"fc.weight": Malicious(tmp_path / "pwned")}, tmp_path / "evil.pth")
    setter("model_args", "checkpoint_path", value=str(tmp_path / "evil.pth"))(saved)
    with pytest.raises(CheckpointError):
        adderkit.load(saved)
    assert not (tmp_path / "pwned").exists()
