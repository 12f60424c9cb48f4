"""A network of one's own, from a file of weights through all verbs, without a line of Python but its registration."""

import json
import shutil
import subprocess
import sys

import pytest
import timm
import torch
from safetensors.torch import load_file

import adderkit
from adderkit.convert.calibration import calibrate
from adderkit.convert.user_models import import_models

CODE = """
import torch
from timm.models import register_model
from torch import nn


class Net(nn.Module):
    def __init__(self, classes=2):
        super().__init__()
        self.stem, self.norm1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv, self.norm2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.linear = nn.Linear(8, classes)

    def forward(self, x):
        x = torch.relu(self.norm1(self.stem(x)))
        x = torch.relu(self.norm2(self.conv(x)) + x)
        return self.linear(torch.flatten(nn.functional.adaptive_avg_pool2d(x, 1), 1))


@register_model
def own_net(pretrained=False, classes=2, **kwargs):
    model = Net(classes)
    model.pretrained_cfg = {
        "input_size": (3, 12, 12), "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25), "crop_pct": 1.0
    }
    return model


sizes = iter(range(2, 9))


@register_model
def growing_net(pretrained=False, **kwargs):
    return own_net(classes=next(sizes))
"""


@pytest.fixture
def chain(adder_kit, tmp_path, image_folder):
    """Run verbs in a folder that holds the code, the weights and 24 images; what they print as JSON."""
    image_folder(count=12)
    (tmp_path / "own_nets.py").write_text(CODE)
    import_models(str(tmp_path / "own_nets.py"))
    torch.manual_seed(0)
    torch.save(timm.create_model("own_net").state_dict(), tmp_path / "weights.pth")

    def run(*words):
        status, out, err = adder_kit("--import", "own_nets.py", *words)
        assert status == 0, err
        return out, err

    yield run
    del sys.modules["own_nets"]
    sys.path.remove(str(tmp_path))


DATA = ("--dataset", "folder", "--data-dir", "images", "--calibration-images", "16", "--calibration-steps", "1")


def test_a_network_that_cannot_be_saved_is_refused_before_it_is_calibrated(adder_kit, chain, monkeypatch):
    called = []
    monkeypatch.setattr(calibrate, "calibrate_", lambda *arguments, **options: called.append(arguments))
    status, _, err = adder_kit("--import", "own_nets.py", "convert", "growing_net", "--no-pretrained", *DATA)
    assert status == 1
    assert "cannot save growing_net: linear.weight is [2, 8], but [3, 8]" in err
    assert called == []


def test_whole_chain(chain, tmp_path):
    small = ("--calibration-images", "16")
    data = ("--dataset", "folder", "--data-dir", "images")
    original = torch.load(tmp_path / "weights.pth")
    steps = ("--calibration-steps", "2", "--matching-steps", "2", "--seed", "3")
    chain("convert", "--model", "own_net", "--checkpoint", "weights.pth", *data, *small, *steps, "-o", "adder")
    kept = load_file(tmp_path / "adder" / "teacher" / "model.safetensors")
    assert kept.keys() == original.keys()
    assert all(kept[name].equal(value) for name, value in original.items())

    shutil.move(tmp_path / "adder", tmp_path / "moved")  # the teacher is in it
    (tmp_path / "weights.pth").unlink()
    settings = ("--epochs", "1", "-b", "8", "-j", "0", "--set", "bn_images=8")
    _, err = chain("finetune", "moved", *settings, "-o", "run")
    assert f"using data set folder in {tmp_path / 'images'}, with which moved was made" in err
    shutil.rmtree(tmp_path / "moved")
    out, err = chain("evaluate", "run/best", "-j", "0", "--record", "--json")
    assert json.loads(out)["dataset"] == "folder"
    assert "with which run/best was made" in err

    chain("prune", "run/best", "--ratio", "0.25", *small, "-o", "pruned")
    chain("quantize", "pruned", *small, "-o", "integers")
    for folder in ("pruned", "integers"):
        kept = load_file(tmp_path / folder / "teacher" / "model.safetensors")
        assert all(kept[name].equal(value) for name, value in original.items())
    result = json.loads(chain("report", "integers", "--json")[0])
    assert result["compared_images"] == 24
    assert result["agreeing"] is not None
    assert chain("inspect", "pruned")[0]
    assert chain("export", "integers", "--format", "c")[0]
    chain("publish", "pruned", "--repo", "ann/net", "--license", "mit", "--dry-run")
    published = tmp_path / "net-published"
    report = json.loads((published / "adder_report.json").read_text())
    assert not {"data", "teacher"} & report.keys()
    assert not (published / "teacher").exists()
    texts = [path.read_text() for path in published.iterdir() if path.suffix in (".json", ".md")]
    assert str(tmp_path) not in "".join(texts)
    assert "own_net" in (published / "README.md").read_text()

    image = torch.randn(2, 3, 12, 12)
    assert adderkit.load(published)(image).equal(adderkit.load(tmp_path / "pruned")(image))


def test_network_that_nobody_registered(tmp_path, chain):
    """Another process, which was not told of the code, names the remedy."""
    chain("convert", "--model", "own_net", "--checkpoint", "weights.pth", "-o", "own-adder")
    words = [sys.executable, "-m", "adderkit", "evaluate", "own-adder", "--dataset", "digits"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "'own_net' in the checkpoint, expected the name of a registered timm model" in done.stderr
    assert "is registered by --import FILE" in done.stderr
    assert len(done.stderr.splitlines()) == 1
