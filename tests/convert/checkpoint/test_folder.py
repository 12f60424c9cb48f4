"""Save and load: bit-equal, refused where anything is damaged, and never a pickle."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import adderkit
from adderkit.adder_layers.modules import adder_layers
from adderkit.convert.checkpoint.configuration import base_architecture
from adderkit.convert.checkpoint.report import Report, read_report
from adderkit.convert.conversion.targets import is_converted
from adderkit.convert.errors import CheckpointError
from adderkit.convert.files import sha256
from adderkit.convert.record import transforms_of

FILES = ["README.md", "adder_report.json", "config.json", "model.safetensors"]


@pytest.fixture(params=[False, True], ids=["cnn", "adder"])
def model(request, resnet20):
    network = resnet20()
    if request.param:
        adderkit.convert_(network)
    return network


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


# There and back


def test_load_gives_bit_equal_outputs(model, tmp_path, gray_images, same_tensors):
    folder = adderkit.save(model, tmp_path / "saved")
    loaded = adderkit.load(folder)
    assert torch.equal(loaded(gray_images), model(gray_images))
    assert same_tensors(loaded, model)
    assert transforms_of(loaded) == transforms_of(model)
    assert not loaded.training


def test_timm_gives_bit_equal_outputs(model, tmp_path, gray_images):
    folder = adderkit.save(model, tmp_path / "saved")
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert torch.equal(loaded(gray_images), model(gray_images))


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
def test_models_of_timm_itself(name, tmp_path):
    model, image = timm.create_model(name, num_classes=7).eval(), torch.randn(1, 3, 32, 32)
    adderkit.convert_(model)
    loaded = adderkit.load(adderkit.save(model, tmp_path / "saved"))
    assert torch.equal(loaded(image), model(image))


@pytest.mark.parametrize("form", [str, Path, "local-dir:{}".format], ids=["str", "path", "local-dir"])
def test_folder_can_be_named_in_three_ways(saved, adder_model, form, same_tensors):
    assert same_tensors(adderkit.load(form(saved)), adder_model)


def test_structure_alone(saved, adder_model, gray_images, same_tensors):
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


def test_reverted_model_is_saved_as_a_cnn(saved, tmp_path, gray_images):
    model = adderkit.load(saved)
    adderkit.revert_(model)
    folder = adderkit.save(model, tmp_path / "reverted")
    config = config_of(folder)
    assert config["architecture"] == "cifar_resnet20"
    assert not {"base", "transforms"} & set(config["model_args"])
    assert torch.equal(adderkit.load(folder)(gray_images), model(gray_images))


def test_partly_reverted_model(adder_model, tmp_path, gray_images):
    adderkit.revert_(adder_model, ("features.4.*",))
    loaded = adderkit.load(adderkit.save(adder_model, tmp_path / "saved"))
    assert torch.equal(loaded(gray_images), adder_model(gray_images))


def test_classifier_that_was_replaced(adder_model, tmp_path, gray_images):
    adder_model.reset_classifier(4)
    loaded = adderkit.load(adderkit.save(adder_model.eval(), tmp_path / "saved"))
    assert loaded.num_classes == 4
    assert torch.equal(loaded(gray_images), adder_model(gray_images))


@pytest.mark.parametrize("classes", [3, 17])
def test_another_number_of_classes_gives_a_fresh_head(saved, adder_model, gray_images, classes):
    loaded = timm.create_model(f"local-dir:{saved}", pretrained=True, num_classes=classes).eval()
    ours, theirs = loaded.state_dict(), adder_model.state_dict()
    assert loaded(gray_images).shape == (2, classes)
    assert is_converted(loaded)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if not name.startswith("fc"))


def test_channels_last_model(adder_model, tmp_path, gray_images, same_tensors):
    adder_model.to(memory_format=torch.channels_last)
    loaded = adderkit.load(adderkit.save(adder_model, tmp_path / "saved"))
    assert same_tensors(loaded, adder_model)
    assert adder_model.fc.weight.is_contiguous(memory_format=torch.channels_last)


def test_bfloat16_model(adder_model, tmp_path, gray_images):
    adder_model.to(torch.bfloat16)
    folder = adderkit.save(adder_model, tmp_path / "saved")
    assert load_file(folder / "model.safetensors")["fc.weight"].dtype == torch.bfloat16
    loaded = adderkit.load(folder).to(torch.bfloat16)
    assert torch.equal(loaded(gray_images.bfloat16()), adder_model(gray_images.bfloat16()))


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
    assert config["model_args"]["transforms"] == transforms_of(adder_model)
    assert config["adderkit"] == {"version": 1, "sha256": sha256(saved / "model.safetensors")}


def test_config_of_a_cnn(resnet20, tmp_path):
    config = config_of(adderkit.save(resnet20(), tmp_path / "saved"))
    assert config["architecture"] == "cifar_resnet20"
    assert not {"base", "transforms"} & set(config["model_args"])


def test_weights_and_their_metadata(saved, adder_model):
    with safe_open(saved / "model.safetensors", framework="pt") as file:
        metadata = file.metadata()
        names = {f"{path}.weight": f"{path}.adder" for path in adder_layers(adder_model)}
        assert set(file.keys()) == {names.get(name, name) for name in adder_model.state_dict()}
    assert list(metadata) == ["adderkit"]  # several keys come in any order: equal models, different files
    assert json.loads(metadata["adderkit"]) == {"version": 1, "transforms": transforms_of(adder_model)}


def test_report(adder_model, tmp_path):
    folder = adderkit.save(adder_model, tmp_path / "saved", Report(teacher="resnet20"))
    report = read_report(folder)
    assert report.teacher == "resnet20"
    assert (report.architecture, report.base) == ("adder", "cifar_resnet20")
    assert report.sha256 == sha256(folder / "model.safetensors")
    packages = {"adderkit", "torch", "torchvision", "timm", "accelerate", "safetensors"}
    assert set(report.versions) == {"python", *packages}
    assert read_report(tmp_path) == Report()


def test_card_says_how_to_load(saved, model, tmp_path):
    text = (saved / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: timm\n") or "library_name: timm" in text.split("---")[1]
    assert "- addernet" in text.split("---")[1]
    assert "import adderkit, timm" in text


def test_existing_card_is_kept(adder_model, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    adderkit.save(adder_model, tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_saving_over_a_checkpoint(adder_model, resnet20, saved, gray_images):
    other = resnet20()
    adderkit.save(other, saved)
    assert torch.equal(adderkit.load(saved)(gray_images), other(gray_images))
    assert sorted(path.name for path in saved.iterdir()) == FILES


def test_plain_timm_refuses(saved):
    code = f"import timm; timm.create_model('local-dir:{saved}', pretrained=True)"
    result = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "Unknown model (adder)" in result.stderr


# What cannot be saved


def test_model_outside_timm(tiny, tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot save a TinyNet.*timm\.create_model.*register_model"):
        adderkit.save(tiny(), tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_base_architecture(model):
    assert base_architecture(model) == "cifar_resnet20"


@pytest.mark.parametrize("inside", ["", "below"], ids=["file", "below-a-file"])
def test_file_in_the_place_of_the_folder(adder_model, tmp_path, inside):
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(CheckpointError, match="cannot write") as caught:
        adderkit.save(adder_model, tmp_path / "taken" / inside)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "taken").read_text() == "mine"


def test_a_save_that_fails_leaves_the_old_checkpoint(saved, adder_model, gray_images):
    before = adderkit.load(saved)(gray_images)
    with torch.no_grad():
        adder_model.fc.weight.zero_()
    adder_model._model_args["act_layer"] = nn.ReLU  # what JSON cannot say
    with pytest.raises(CheckpointError, match="act_layer"):
        adderkit.save(adder_model, saved)
    assert torch.equal(adderkit.load(saved)(gray_images), before)
