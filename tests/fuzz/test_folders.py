"""Saved folders as somebody else may have written them: configuration, report, the record of transforms."""

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
from adderkit.convert.checkpoint.report import read_report
from adderkit.convert.errors import CheckpointError
from adderkit.convert.model_source import ModelSource
from adderkit.recipes.training.models import Job, teacher_of

fuzz = settings.get_profile(environ.get("ADDERKIT_FUZZ", "quick"))

KEYS = st.sampled_from(
    [
        *("architecture", "model_args", "base", "transforms", "num_classes", "in_chans", "pretrained_cfg", "adderkit"),
        *("kind", "modules", "normalized", "folded", "version", "config", "shapes", "input_size", "classifier", "mean"),
        *("checkpoint_path", "pretrained", "hf_hub_id", "file", "source", "drop_rate", "depth", "first_conv", "url"),
    ]
)
TEXTS = st.sampled_from(["adder", "prune", "plain", "resnet18", "cifar_resnet20", "features.1.conv1", "../../up", "*"])
NUMBERS = st.integers(-2, 5) | st.sampled_from([10**6, 10**9, 2**40, 10**30]) | st.floats()
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A folder with an adder network of few layers."""
    torch.manual_seed(0)
    model = timm.create_model("cifar_resnet20", in_chans=1, pretrained_cfg_overlay={"input_size": (1, 8, 8)})
    adderkit.convert_(model, adderkit.AdderConfig(include=("features.4.*",)))
    return adderkit.save(model, tmp_path_factory.mktemp("saved") / "net")


@pytest.fixture
def folder(saved, place):
    """A copy to damage."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(saved, place)
    return place


@pytest.mark.filterwarnings("ignore")
@fuzz
@given(data=st.data(), pretrained=st.booleans())
def test_changed_configuration(data, pretrained, changed, saved, folder, survives):
    valid = json.loads((saved / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(data.draw(changed(valid, KEYS, VALUES))))
    model = survives(lambda: adderkit.load(folder, pretrained))
    if pretrained and model is not None:
        expected = load_file(saved / "model.safetensors")
        names = {key: key.replace(".adder", ".weight") for key in expected}
        assert all(torch.equal(model.state_dict()[names[key]], value) for key, value in expected.items())


@pytest.mark.filterwarnings("ignore")
@fuzz
@given(data=st.data())
def test_damaged_configuration(data, damaged, saved, folder, survives):
    (folder / "config.json").write_bytes(data.draw(damaged((saved / "config.json").read_bytes())))
    survives(lambda: adderkit.load(folder))


@pytest.mark.filterwarnings("ignore")
@fuzz
@given(data=st.data())
def test_changed_record_of_transforms(data, changed, saved, folder, survives):
    """The weights are whole, with a checksum that fits, but say that the model was made otherwise."""
    config = json.loads((saved / "config.json").read_text())
    transforms = data.draw(changed(config["model_args"]["transforms"], KEYS, VALUES) | VALUES)
    metadata = data.draw(st.just(json.dumps({"version": 1, "transforms": transforms})) | st.text(max_size=20))
    save_file(load_file(saved / "model.safetensors"), folder / "model.safetensors", {"adderkit": metadata})
    config["model_args"]["transforms"] = transforms
    del config["adderkit"]
    (folder / "config.json").write_text(json.dumps(config))
    survives(lambda: adderkit.load(folder))


@fuzz
@given(data=st.data())
def test_changed_report(data, changed, damaged, saved, folder, survives):
    valid = json.loads((saved / "adder_report.json").read_text()) | {"teacher": "resnet18"}
    text = json.dumps(data.draw(changed(valid, KEYS, VALUES))).encode()
    (folder / "adder_report.json").write_bytes(data.draw(st.just(text) | damaged(text)))
    survives(lambda: read_report(folder))
    teacher = survives(lambda: teacher_of(Job(ModelSource(str(folder)))))
    assert teacher is None or isinstance(teacher, str)


def test_configuration_of_a_model_that_would_fill_the_memory(saved, folder, survives):
    config = json.loads((saved / "config.json").read_text())
    config["model_args"]["num_classes"] = 1 << 33
    (folder / "config.json").write_text(json.dumps(config))
    for pretrained in (True, False):
        with pytest.raises(CheckpointError, match=r"describes a model with a tensor of shape \(8589934592, 64, 1, 1\)"):
            adderkit.load(folder, pretrained)
