"""A model source: the model with the weights that were asked for, or one clear line; never random ones unasked."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

import adderkit
from adderkit.convert.checkpoint.report import Report
from adderkit.convert.conversion.targets import is_converted
from adderkit.convert.errors import CheckpointError, ModelSourceError
from adderkit.convert.model_source import ModelSource

NAME = "cifar_resnet20"


@pytest.fixture
def weights(tmp_path):
    """A file of weights, and the model they are of."""
    model = timm.create_model(NAME).eval()
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors", model


def equal(first, second):
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# Names


def test_random_weights_where_they_are_asked_for():
    model = ModelSource(NAME, pretrained=False, num_classes=3, in_chans=None).build()
    assert model.num_classes == 3
    assert model.in_chans == 3
    assert not model.training


def test_unknown_name_suggests_near_ones():
    with pytest.raises(ModelSourceError, match=r"no model 'resnet81'; did you mean .*resnet18"):
        ModelSource("resnet81").build()


def test_unknown_name_far_from_any():
    with pytest.raises(ModelSourceError, match=r"timm\.list_models"):
        ModelSource("qqqqqqqqqq").build()


def test_adder_is_no_model_to_begin_with():
    with pytest.raises(ModelSourceError, match="'adder' is reserved for saved adder networks"):
        ModelSource("adder", pretrained=False).build()


@pytest.mark.parametrize("name", ["user/repository", "./folder", "/no/such/folder"])
def test_path_without_a_configuration(name):
    with pytest.raises(ModelSourceError, match=r"neither a timm model nor a folder with a config\.json"):
        ModelSource(name).build()


def test_file_in_the_place_of_a_model(folder, weights):
    path, _ = folder
    with pytest.raises(ModelSourceError, match=rf"is a file, expected a timm model .*: give the folder {path}$"):
        ModelSource(str(path / "model.safetensors")).build()


def test_arguments_that_do_not_fit():
    with pytest.raises(ModelSourceError, match=f"cannot build {NAME}: .*nonsense"):
        ModelSource(NAME, pretrained=False).build(nonsense=1)


# Weights that cannot be loaded


@pytest.mark.parametrize("name", [NAME, "resnet18.no_such_tag"])
def test_no_pretrained_weights_names_the_remedies(name):
    with pytest.raises(ModelSourceError, match=r"(?s)pretrained.*--checkpoint FILE\|DIR.*--no-pretrained"):
        ModelSource(name).build()


@pytest.mark.parametrize("name", ["test_resnet", "test_resnet.r160_in1k", "hf-hub:nobody/nothing"])
def test_hub_that_cannot_be_reached_names_the_remedies(name, tmp_path):
    with pytest.raises(
        ModelSourceError, match=r"cannot load pretrained weights.*--checkpoint FILE\|DIR.*--no-pretrained"
    ) as caught:
        ModelSource(name).build(cache_dir=tmp_path)
    assert "\n" not in str(caught.value)


# A file


@pytest.mark.parametrize("pretrained", [True, False])
def test_weights_of_a_file(weights, pretrained):
    path, model = weights
    assert equal(ModelSource(NAME, pretrained=pretrained, checkpoint=str(path)).build(), model)


def test_weights_of_a_pytorch_file(weights, tmp_path):
    torch.save({"state_dict": {f"module.{k}": v for k, v in weights[1].state_dict().items()}}, tmp_path / "w.pth")
    assert equal(ModelSource(NAME, checkpoint=str(tmp_path / "w.pth")).build(), weights[1])


def rename(state):
    state["fc.wait"] = state.pop("fc.weight")


def reshape(state):
    state["fc.weight"] = torch.zeros(7, 64, 1, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rename, r"1 missing \(such as fc\.weight\), 1 unexpected \(such as fc\.wait\)"),
        (reshape, r"1 of a different shape \(such as fc\.weight\)"),
    ],
    ids=["names", "shape"],
)
def test_file_that_does_not_fit_lists_what_differs(weights, tmp_path, change, message):
    state = weights[1].state_dict()
    change(state)
    save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=rf"does not fit {NAME}: tensors {message}.*--num-classes"):
        ModelSource(NAME, checkpoint=str(tmp_path / "other.safetensors")).build()


def test_file_that_is_missing(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        ModelSource(NAME, checkpoint=str(tmp_path / "nowhere.safetensors")).build()


# A folder


@pytest.fixture
def folder(resnet20, tmp_path):
    model = resnet20()
    adderkit.convert_(model)
    return adderkit.save(model, tmp_path / "saved"), model


def test_folder_by_name_or_as_a_checkpoint(folder):
    path, model = folder
    for loaded in (
        ModelSource(str(path)).build(),
        ModelSource(f"local-dir:{path}").build(),
        ModelSource(NAME, checkpoint=str(path)).build(),
    ):
        assert is_converted(loaded)
        assert equal(loaded, model)


def test_folder_with_another_architecture(folder):
    with pytest.raises(ModelSourceError, match=rf"contains a {NAME}, expected a resnet18"):
        ModelSource("resnet18", checkpoint=str(folder[0])).build()


def test_folder_and_a_checkpoint(folder, weights):
    with pytest.raises(ModelSourceError, match="has its own weights"):
        ModelSource(str(folder[0]), checkpoint=str(weights[0])).build()


@pytest.mark.parametrize("by_name", [True, False], ids=["name", "checkpoint"])
def test_model_arguments_are_refused_with_a_folder(folder, by_name):
    path, _ = folder
    named = {"name": str(path)} if by_name else {"name": NAME, "checkpoint": str(path)}
    with pytest.raises(ModelSourceError, match="num_classes=3"):
        ModelSource(**named, num_classes=3).build()


def test_folder_that_is_damaged(folder):
    (folder[0] / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError):
        ModelSource(str(folder[0])).build()


def test_folder_of_a_name(folder, tmp_path):
    assert ModelSource(str(folder[0])).folder == folder[0]
    assert ModelSource("local-dir:anything").folder == Path("anything")
    assert ModelSource(str(tmp_path)).folder is None
    assert ModelSource("resnet18").folder is None


def test_report_is_that_of_the_folder(folder):
    assert ModelSource(str(folder[0])).report().base == NAME
    assert ModelSource(NAME).report() == Report()


def test_absolute_paths(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = folder[0]
    assert ModelSource("saved").absolute() == ModelSource(str(path))
    assert ModelSource("local-dir:saved", num_classes=3).absolute() == ModelSource(str(path), num_classes=3)
    for checkpoint in ("saved", "weights.pth"):
        source = ModelSource(NAME, checkpoint=checkpoint).absolute()
        assert source == ModelSource(NAME, checkpoint=str(tmp_path / checkpoint))
    assert ModelSource("hf-hub:user/net").absolute() == ModelSource("hf-hub:user/net")


# The result


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("resnet50.a1_in1k", "resnet50.a1_in1k-adder"),
        ("hf-hub:user/net@v1", "net-adder"),
        ("local-dir:some/net", "net-adder"),
        ("some/net/", "net-adder"),
    ],
)
def test_default_output_lies_here_and_is_called_as_the_model(name, folder):
    assert ModelSource(name).default_output("-adder") == Path(folder)


def test_result_does_not_overwrite_what_it_is_made_from(folder, weights, tmp_path):
    path, file = folder[0], weights[0]
    with pytest.raises(ModelSourceError, match="is the model itself, which is kept; give another folder"):
        ModelSource(str(path)).refuse_target(tmp_path / "x" / ".." / "saved", ", which is kept")
    for checkpoint, target in ((path, path), (path / "model.safetensors", path)):
        with pytest.raises(ModelSourceError, match="would replace the weights in"):
            ModelSource(NAME, checkpoint=str(checkpoint)).refuse_target(target)
    ModelSource(NAME, checkpoint=str(file)).refuse_target(tmp_path)
    ModelSource("saved").refuse_target(tmp_path / "saved")
