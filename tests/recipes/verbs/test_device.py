"""Verbs compute on the chosen device, and give the same as on the CPU."""

from contextlib import nullcontext

import pytest
import torch

import adderkit
from adderkit.convert.checkpoint.report import read_report
from adderkit.convert.graph.modes import device_of
from adderkit.recipes.distributed import device as devices
from adderkit.recipes.reporting import examples
from adderkit.recipes.reporting import report as reports

DIGITS = ("--dataset", "digits", "--calibration-images", 32)
FEW_STEPS = ("--calibration-steps", 2, "--matching-steps", 2)


@pytest.fixture
def on_second_device(second_device, monkeypatch):
    """The default becomes the second device; ``cpu`` is still the CPU."""

    def choose(name):
        return nullcontext(second_device if name is None else torch.device(name))

    for module in (devices, reports):
        monkeypatch.setattr(module, "compute_device", choose)
    return second_device


@pytest.fixture
def same_on_both(adder_kit, on_second_device, tmp_path):
    """Run a verb on both devices; the folders that it wrote, after their weights were compared."""

    def run(*words):
        folders = []
        for name, more in (("cpu", ("--device", "cpu")), ("second", ())):
            status, _, err = adder_kit(*words, "-o", name, *more)
            assert status == 0, err
            folders.append(tmp_path / name)
        first, second = (adderkit.load(folder).state_dict() for folder in folders)
        assert first.keys() == second.keys()
        assert [name for name in first if not first[name].equal(second[name])] == []
        return folders

    return run


def test_convert(same_on_both, cnn_folder, second_device):
    words = ("convert", "--model", cnn_folder, "--include", "features.4.*", *DIGITS, *FEW_STEPS)
    cpu, second = same_on_both(*words, "--min-fidelity", 0.01)
    assert read_report(cpu).calibration["device"] == "cpu"
    assert read_report(second).calibration["device"] == str(second_device)


@pytest.mark.parametrize("first_last", ["int8", "fp32"])
def test_quantize(same_on_both, adder_folder, first_last):
    same_on_both("quantize", adder_folder, *DIGITS, "--first-last", first_last)


@pytest.mark.parametrize("importance", ["variance", "taylor", "batchnorm"])
def test_prune(same_on_both, adder_folder, importance):
    same_on_both("prune", adder_folder, "--ratio", 0.3, "--importance", importance, *DIGITS)


def test_report(adder_kit, adder_folder, on_second_device, monkeypatch):
    seen = []
    original = examples._probabilities

    def noted(model, images):
        seen.append(device_of(model))
        return original(model, images)

    monkeypatch.setattr(examples, "_probabilities", noted)
    assert adder_kit("report", adder_folder, "--dataset", "digits", "-o", "page.html")[0] == 0
    assert set(seen) == {on_second_device}


@pytest.mark.parametrize("verb", ["convert", "quantize", "prune", "report", "evaluate", "bench", "finetune"])
def test_a_device_that_is_not_there(verb, fails, adder_folder, cnn_folder, tmp_path):
    model = cnn_folder if verb == "convert" else adder_folder
    words = [verb, model] if verb != "convert" else [verb, "--model", model]
    words += [] if verb == "bench" else ["--dataset", "digits"]
    words += ["--ratio", 0.5] if verb == "prune" else []
    words += ["-o", "page.html"] if verb == "report" else []
    line = fails(*words, "--device", "gpu")
    assert line == "--device is 'gpu', expected cpu, cuda, cuda:N or another device of PyTorch"
    assert list(tmp_path.iterdir()) == []
