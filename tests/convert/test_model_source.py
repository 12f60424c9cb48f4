"""From a name to a model with the weights asked for, or one clear line; never random ones unasked."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

import adderkit
from adderkit.convert.conversion.rewrite import is_converted
from adderkit.convert.errors import CheckpointError, ModelSourceError
from adderkit.convert.model_source import build_model, default_folder, is_folder

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
    model = build_model(NAME, pretrained=False, num_classes=3, in_chans=None)
    assert model.num_classes == 3
    assert model.in_chans == 3
    assert not model.training


def test_unknown_name_suggests_near_ones():
    with pytest.raises(ModelSourceError, match=r"no model 'resnet81'; did you mean .*resnet18"):
        build_model("resnet81")


def test_unknown_name_far_from_any():
    with pytest.raises(ModelSourceError, match=r"timm\.list_models"):
        build_model("qqqqqqqqqq")


def test_adder_is_no_model_to_begin_with():
    with pytest.raises(ModelSourceError, match="'adder' is what saved adder networks are called"):
        build_model("adder", pretrained=False)


@pytest.mark.parametrize("name", ["user/repository", "./folder", "/no/such/folder"])
def test_path_without_a_configuration(name):
    with pytest.raises(ModelSourceError, match=r"neither a timm model nor a folder with a config\.json"):
        build_model(name)


def test_arguments_that_do_not_fit():
    with pytest.raises(ModelSourceError, match=f"{NAME} cannot be built.*nonsense"):
        build_model(NAME, pretrained=False, nonsense=1)


# Weights that cannot be had


@pytest.mark.parametrize("name", [NAME, "resnet18.no_such_tag"])
def test_no_pretrained_weights_names_the_remedies(name):
    with pytest.raises(ModelSourceError, match=r"(?s)pretrained.*--checkpoint FILE\|DIR.*--no-pretrained"):
        build_model(name)


@pytest.mark.parametrize("name", ["test_resnet", "test_resnet.r160_in1k", "hf-hub:nobody/nothing"])
def test_hub_that_cannot_be_reached_names_the_remedies(name, tmp_path):
    with pytest.raises(ModelSourceError, match=r"cannot be had.*--checkpoint FILE\|DIR.*--no-pretrained") as caught:
        build_model(name, cache_dir=tmp_path)
    assert "\n" not in str(caught.value)


# A file


@pytest.mark.parametrize("pretrained", [True, False])
def test_weights_of_a_file(weights, pretrained):
    path, model = weights
    assert equal(build_model(NAME, pretrained=pretrained, checkpoint=path), model)


def test_weights_of_a_pytorch_file(weights, tmp_path):
    torch.save({"state_dict": {f"module.{k}": v for k, v in weights[1].state_dict().items()}}, tmp_path / "w.pth")
    assert equal(build_model(NAME, checkpoint=str(tmp_path / "w.pth")), weights[1])


def rename(state):
    state["fc.wait"] = state.pop("fc.weight")


def reshape(state):
    state["fc.weight"] = torch.zeros(7, 64, 1, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rename, r"1 missing \(such as fc\.weight\), 1 unexpected \(such as fc\.wait\)"),
        (reshape, r"1 of another shape \(such as fc\.weight\)"),
    ],
    ids=["names", "shape"],
)
def test_file_that_does_not_fit_lists_what_differs(weights, tmp_path, change, message):
    state = weights[1].state_dict()
    change(state)
    save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=rf"does not fit {NAME}: tensors {message}.*--num-classes"):
        build_model(NAME, checkpoint=tmp_path / "other.safetensors")


def test_file_that_is_missing(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        build_model(NAME, checkpoint=tmp_path / "nowhere.safetensors")


# A folder


@pytest.fixture
def folder(resnet20, tmp_path):
    model = resnet20()
    adderkit.convert_(model)
    return adderkit.save(model, tmp_path / "saved"), model


def test_folder_by_name_or_as_a_checkpoint(folder):
    path, model = folder
    for loaded in (build_model(str(path)), build_model(f"local-dir:{path}"), build_model(NAME, checkpoint=path)):
        assert is_converted(loaded)
        assert equal(loaded, model)


def test_folder_with_another_architecture(folder):
    with pytest.raises(ModelSourceError, match=rf"holds a {NAME}, expected a resnet18"):
        build_model("resnet18", checkpoint=folder[0])


def test_folder_and_a_checkpoint(folder, weights):
    with pytest.raises(ModelSourceError, match="weights of its own"):
        build_model(str(folder[0]), checkpoint=weights[0])


@pytest.mark.parametrize("by_name", [True, False], ids=["name", "checkpoint"])
def test_model_arguments_are_refused_with_a_folder(folder, by_name):
    path, _ = folder
    named = {"name": str(path)} if by_name else {"name": NAME, "checkpoint": path}
    with pytest.raises(ModelSourceError, match="num_classes=3"):
        build_model(**named, num_classes=3)


def test_folder_that_is_damaged(folder):
    (folder[0] / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError):
        build_model(str(folder[0]))


def test_is_folder(folder, tmp_path):
    assert is_folder(str(folder[0]))
    assert is_folder("local-dir:anything")
    assert not is_folder(str(tmp_path))
    assert not is_folder("resnet18")


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("resnet50.a1_in1k", "resnet50.a1_in1k-adder"),
        ("hf-hub:user/net@v1", "net-adder"),
        ("local-dir:some/net", "net-adder"),
        ("some/net/", "net-adder"),
    ],
)
def test_default_folder_lies_here_and_is_called_as_the_model(name, folder):
    assert default_folder(name, "-adder") == Path(folder)
