"""Weights of other tools in a model: the right values, what was chosen is said, and no weights of another kind."""

import copy
import logging

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrizations, prune

import adderkit
from adderkit.convert.errors import CheckpointError
from adderkit.convert.model_source import ModelSource

NAME = "cifar_resnet20"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return timm.create_model(NAME, num_classes=4).eval()


@pytest.fixture(scope="module")
def adder_model(model):
    converted = copy.deepcopy(model)
    adderkit.convert_(converted)
    return converted


def build(path, **options):
    return ModelSource(NAME, checkpoint=str(path), **{"num_classes": 4, **options}).build()


def equal(first, second):
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# What is said


def test_choice_and_prefix_are_said(model, tmp_path, caplog):
    average = {f"module._orig_mod.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"model": timm.create_model(NAME).state_dict(), "model_ema": average}, tmp_path / "w.pth")
    with caplog.at_level(logging.WARNING):
        assert equal(build(tmp_path / "w.pth"), model)
    said = f"{tmp_path / 'w.pth'}: loaded model_ema, not model; stripped 'module._orig_mod.' from the names"
    assert caplog.messages == [said]


def test_nothing_is_said_of_plain_weights(model, tmp_path, caplog):
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, tmp_path / "w.pth")
    with caplog.at_level(logging.INFO):
        assert equal(build(tmp_path / "w.pth"), model)
    assert caplog.messages == []


def test_command_line_says_it(model, tmp_path, adder_kit, caplog):
    torch.save({"net": torch.compile(model).state_dict()}, tmp_path / "w.pth")
    status, *_ = adder_kit("convert", "--model", NAME, "--checkpoint", "w.pth", "--num-classes", 4, "-o", "out")
    assert status == 0
    assert caplog.messages == ["w.pth: stripped '_orig_mod.' from the names"]


# Dtypes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precision_is_converted(model, tmp_path, dtype):
    torch.save({name: tensor.to(dtype) for name, tensor in model.state_dict().items()}, tmp_path / "w.pth")
    loaded = build(tmp_path / "w.pth")
    assert {tensor.dtype for tensor in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded.fc.weight, model.fc.weight.to(dtype).float())


def test_integers_are_refused(model, tmp_path):
    state = model.state_dict() | {"fc.weight": torch.ones_like(model.fc.weight, dtype=torch.int8)}
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"fc\.weight is torch\.int8 .* give the weights before quantization"):
        build(tmp_path / "w.pth")


# What does not fit


def test_other_number_of_classes_is_named(model, tmp_path):
    torch.save(model.state_dict(), tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="it has 4 classes, expected 10: add --num-classes 4"):
        build(tmp_path / "w.pth", num_classes=None)


def test_other_number_of_channels_is_named(tmp_path):
    torch.save(timm.create_model(NAME, in_chans=1, num_classes=4).state_dict(), tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="it has 1 image channels, expected 3: add --in-chans 1"):
        build(tmp_path / "w.pth")


def test_weights_without_a_classifier(model, tmp_path):
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("fc.")}
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="it holds no classifier"):
        build(tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), r"call prune\.remove"),
        (nn.utils.weight_norm, "call remove_weight_norm"),
        (parametrizations.spectral_norm, "call remove_parametrizations"),
    ],
    ids=["prune", "weight-norm", "parametrization"],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weights_that_something_computes(model, tmp_path, change, remedy):
    changed = copy.deepcopy(model)
    change(
        changed.conv1 if hasattr(changed, "conv1") else next(m for m in changed.modules() if isinstance(m, nn.Conv2d))
    )
    torch.save(changed.state_dict(), tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=remedy):
        build(tmp_path / "w.pth")


# Weights of other networks than CNNs


def test_timm_does_not_load_weights_of_a_saved_adder_network_into_a_cnn(adder_model, tmp_path):
    folder = adderkit.save(adder_model, tmp_path / "adder")
    path = str(folder / "model.safetensors")
    with pytest.raises(RuntimeError, match=r'Missing key.*conv1\.weight"[\s\S]*Unexpected key.*conv1\.adder"'):
        timm.create_model(NAME, num_classes=4, checkpoint_path=path)


def test_weights_of_a_saved_adder_network_load_into_another(adder_model, tmp_path):
    """By timm and by torch alone; the names in the file are those of AdderNet's published code."""
    folder = adderkit.save(adder_model, tmp_path / "adder")
    state = load_file(folder / "model.safetensors")
    assert torch.equal(state["features.1.conv1.adder"], adder_model.state_dict()["features.1.conv1.weight"])
    assert "features.1.conv1.weight" not in state
    other = timm.create_model(f"local-dir:{folder}", checkpoint_path=str(folder / "model.safetensors"))
    assert equal(other, adder_model)
    blank = copy.deepcopy(adder_model)
    nn.init.zeros_(blank.get_submodule("features.1.conv1").weight)
    blank.load_state_dict(state)
    assert equal(blank, adder_model)


def test_file_of_a_saved_adder_network_without_its_metadata_and_folder(adder_model, tmp_path):
    save_file(
        load_file(adderkit.save(adder_model, tmp_path / "adder") / "model.safetensors"), tmp_path / "w.safetensors"
    )
    with pytest.raises(CheckpointError, match=r"weights of adder layers \(features\.1\.conv1\.adder\)"):
        build(tmp_path / "w.safetensors")


def test_weights_of_an_adder_folder_name_the_folder(adder_model, tmp_path):
    folder = adderkit.save(adder_model, tmp_path / "adder")
    with pytest.raises(
        CheckpointError, match=rf"the transforms adder, expected .* CNN {NAME}: give the folder {folder} as"
    ):
        build(folder / "model.safetensors")


@pytest.mark.parametrize("verb", ["evaluate", "convert", "finetune"])
def test_every_verb_refuses_them(adder_model, tmp_path, adder_kit, verb):
    adderkit.save(adder_model, tmp_path / "adder")
    name = ["--model", NAME] if verb == "convert" else [NAME]
    data = [] if verb == "convert" else ["--dataset", "digits"]
    status, _, err = adder_kit(verb, *name, "--checkpoint", "adder/model.safetensors", "--num-classes", 4, *data)
    assert status == 1
    assert "give the folder adder as the model" in err


def test_weights_of_a_run_are_known_by_the_folder_they_are_in(adder_model, tmp_path):
    folder = adderkit.save(adder_model, tmp_path / "last")
    (folder / "state").mkdir()
    save_file(adder_model.state_dict(), folder / "state" / "model_ema.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"give the folder {folder} as the model"):
        build(folder / "state" / "model_ema.safetensors")


def test_pruned_weights(model, tmp_path):
    pruned = copy.deepcopy(model)
    adderkit.prune_(pruned, adderkit.PruneConfig(ratio=0.5, importance="magnitude"))
    folder = adderkit.save(pruned, tmp_path / "pruned")
    with pytest.raises(CheckpointError, match="the transforms prune"):
        build(folder / "model.safetensors")


@pytest.mark.parametrize("wrap", [lambda net: net, nn.DataParallel], ids=["plain", "parallel"])
def test_adder_weights_saved_by_torch_are_known_by_their_version(adder_model, tmp_path, wrap):
    torch.save({"state_dict": wrap(adder_model).state_dict()}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"weights of adder layers .*adderkit import-checkpoint .* --model"):
        build(tmp_path / "w.pth")


def test_weights_of_a_saved_cnn_are_those_of_a_cnn(model, tmp_path):
    folder = adderkit.save(model, tmp_path / "cnn")
    assert equal(build(folder / "model.safetensors"), model)
    assert equal(ModelSource(NAME, checkpoint=str(folder)).build(), model)


def test_weights_of_a_cnn_in_an_adder_folder(model, adder_model, tmp_path):
    adder, cnn = adderkit.save(adder_model, tmp_path / "adder"), adderkit.save(model, tmp_path / "cnn")
    save_file(load_file(cnn / "model.safetensors"), adder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"is not the file that config\.json was written for"):
        adderkit.load(adder)
