"""The benchmark on a sample of ImageNet: the split of the photographs, the trials, and what a second run repeats."""

import json
import sys

import pytest
import torch
from PIL import Image
from torch import nn

import adderkit
from benchmarks.accuracy import imagenet_sample
from benchmarks.accuracy.conversion_trials import Choice


class TwoLayers(nn.Module):
    """Converts its second and third convolutions, of which one is depthwise."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1, 2)
        self.depthwise, self.bn1 = nn.Conv2d(4, 4, 3, 1, 1, groups=4, bias=False), nn.BatchNorm2d(4)
        self.dense, self.bn2 = nn.Conv2d(4, 12, 3, 1, 1, bias=False), nn.BatchNorm2d(12)

    def forward(self, input):
        features = self.bn1(self.depthwise(self.stem(input).relu())).relu()
        return self.bn2(self.dense(features)).relu().mean((2, 3))


@pytest.fixture
def photographs(tmp_path):
    folder = tmp_path / "photographs"
    folder.mkdir()
    for label in range(24):
        pixels = torch.randint(0, 256, (14, 20, 3), generator=torch.Generator().manual_seed(label), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{label:03}_n{label}_name_of_it.jpg")
    return folder


def test_every_fourth_class_is_measured_and_the_others_calibrate(photographs):
    images, (new, labels) = imagenet_sample.read(photographs, 8)
    assert images.shape == (18, 3, 8, 8)
    assert new.shape == (6, 3, 8, 8)
    assert labels.tolist() == [0, 4, 8, 12, 16, 20]
    assert not (images[:, None] == new).flatten(2).all(2).any()
    few, _ = imagenet_sample.read(photographs, 8, 5)
    assert torch.equal(few, images[:5])


@pytest.fixture
def benchmark_run(photographs, tmp_path, monkeypatch):
    """Run the command with a tiny teacher, and return the JSON and the names of the fitted networks."""
    torch.manual_seed(0)
    network = TwoLayers().eval()
    fitted = []
    calibrate_ = adderkit.calibrate_

    def counted(*arguments, state, **options):
        fitted.append(state.stem)
        return calibrate_(*arguments, state=state, **options)

    monkeypatch.setattr(imagenet_sample, "CHOICE", Choice((3, 2, 1), (1.5,), (0.2,), (2,)))
    monkeypatch.setattr(imagenet_sample, "teacher", lambda: network)
    monkeypatch.setattr(adderkit, "calibrate_", counted)
    target = tmp_path / "found.json"
    options = {"--data": photographs, "--json": target, "--fits": tmp_path / "fits", "--size": 8}
    options |= {"--images": 16, "--layer-steps": 1, "--steps": 1}
    monkeypatch.setattr(sys, "argv", ["imagenet_sample", *(str(part) for pair in options.items() for part in pair)])

    def once():
        fitted.clear()
        imagenet_sample.main()
        return json.loads(target.read_text()), list(fitted)

    return once


def test_trials_cost_what_was_asked_for(benchmark_run):
    found, _ = benchmark_run()
    trials = found["trials"]
    assert found["settings"] == {"images": 16, "size": 8, "layer steps": 1, "steps": 1}
    for terms in (1, 2, 3):
        row = trials[f"terms={terms}, layers"]
        assert set(row["layers"]) == {"depthwise", "dense"}
        assert 0 <= row["agreement"] <= 100
        assert trials[f"terms={terms}, layers, then blocks"]["additions"] == row["additions"]
    # The stem's additions stay, and those of the converted layers grow with the terms.
    additions = [trials[f"terms={terms}, layers"]["additions"] for terms in (1, 2, 3)]
    assert additions[0] == 1
    assert additions[2] - 1 == pytest.approx(2 * (additions[1] - 1), abs=0.002)
    assert 1 < trials["adds=150%, layers"]["additions"] <= 1.5
    hybrid = trials["terms=2, mults=20%"]
    assert hybrid["convolutions"] == ["depthwise"]
    assert trials["terms=2, layers"]["multiplications"] < hybrid["multiplications"] <= 0.2


def test_a_run_repeats_only_what_is_missing(benchmark_run, tmp_path):
    first, fitted = benchmark_run()
    assert fitted == ["terms=3", "terms=2", "terms=1", "adds=150%"]
    lost = "terms=2, layers"
    (tmp_path / "found.json").write_text(
        json.dumps({**first, "trials": {key: row for key, row in first["trials"].items() if key != lost}})
    )
    second, fitted = benchmark_run()
    assert fitted == ["terms=2"]
    assert {**second["trials"][lost], "seconds": 0} == {**first["trials"][lost], "seconds": 0}
    assert benchmark_run() == (second, [])
