"""``adderkit export --format c|hex``: folders that hold what they say, and one line for whatever does not fit."""

import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import adderkit
from adderkit.adder_layers.integer import reference
from adderkit.adder_layers.modules import adder_layers
from adderkit.convert.calibration.batchnorm import reestimate_batchnorm_
from adderkit.convert.checkpoint.folder import save
from adderkit.convert.model_source import ModelSource
from adderkit.convert.quantization.config import QuantizeConfig
from adderkit.convert.quantization.quantize import quantize
from adderkit.recipes.configs.recipe import Recipe
from adderkit.recipes.verbs.export import recorded_images

_path = Path(__file__).parents[2] / "adder_layers" / "integer" / "random_plans.py"
_spec = importlib.util.spec_from_file_location("random_plans", _path)
random_plans = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(random_plans)


class Quantized(nn.Module):
    """What the verb needs of a quantized network: a plan, and how images are prepared."""

    num_classes = 10

    def __init__(self, builder):
        super().__init__()
        self.plan = builder.plan()
        self.pretrained_cfg = {"input_size": (3, 8, 8), "mean": (0.5,) * 3, "std": (0.25,) * 3}


@pytest.fixture
def quantized(monkeypatch):
    """Every name is this model's."""
    model = Quantized(random_plans.residual_network(size=(8, 8)))
    monkeypatch.setattr(ModelSource, "build", lambda self: model)
    return model


@pytest.fixture
def adder_folder(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("cifar_resnet20", num_classes=10)
    adderkit.convert_(model)
    save(model, tmp_path / "plain")
    return tmp_path / "plain"


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler named cc")
def test_c_passes_the_test_that_the_summary_names(quantized, adder_kit, tmp_path):
    code, out, _ = adder_kit("export", "net-8bit", "--format", "c")
    assert code == 0
    assert out.startswith("net-8bit with 6 adder layers was written to net-8bit-c/; it needs ")
    names = [f"net_8bit{ending}" for ending in (".c", ".h", "_test.c", "_weights.h")]
    assert sorted(path.name for path in (tmp_path / "net-8bit-c").iterdir()) == names
    command = re.search("(cc -std=c99 .*)", out)[1]
    done = subprocess.run(command, shell=True, cwd=tmp_path / "net-8bit-c", capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "4 images, 0 outputs differ\n")


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler named cc")
@pytest.mark.parametrize("config", [QuantizeConfig(), QuantizeConfig(bits=4, requant="shift")])
def test_quantized_resnet20(config, adder_kit, tmp_path):
    """From a saved folder to a program whose logits are those of the network that ``load`` gives."""
    torch.manual_seed(0)
    model = timm.create_model("cifar_resnet20", pretrained_cfg_overlay={"input_size": (3, 16, 16)}).eval()
    adderkit.convert_(model)
    for layer in adder_layers(model).values():
        nn.init.normal_(layer.weight)
    images = torch.randn(16, 3, 16, 16)
    reestimate_batchnorm_(model, [images])
    save(quantize(model, images, config), tmp_path / "net")

    code, _, _ = adder_kit("export", "net", "--format", "c")
    assert code == 0
    command = "cc -std=c99 -fsanitize=address,undefined net.c net_test.c && ./a.out"
    done = subprocess.run(command, shell=True, cwd=tmp_path / "net-c", capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "4 images, 0 outputs differ\n"), done.stderr

    network = adderkit.load(tmp_path / "net")
    first = network.plan.activations[0]
    recorded = recorded_images(network.plan, network, 4, None)
    real = (recorded.float() - first.zero_point.float()) * first.scale
    expected = re.findall(r"-?\d+", (tmp_path / "net-c" / "net_test.c").read_text().split("expected[IMAGES]")[1])
    logits = torch.tensor([int(number) for number in expected[: 4 * 10]]).view(4, 10) * network.plan.steps[-1].scale
    torch.testing.assert_close(network(real.permute(0, 3, 1, 2)), logits.float(), rtol=0, atol=0)
    assert ("net_adder_by_shifts(" in (tmp_path / "net-c" / "net.c").read_text()) == (config.requant == "shift")


def test_hex_has_what_its_manifest_names(quantized, adder_kit, tmp_path):
    code, out, _ = adder_kit("export", "net", "--format", "hex", "--output", "bench/images", "--json")
    result = json.loads(out)
    assert code == 0
    folder = tmp_path / "bench" / "images"
    manifest = (folder / "manifest.json").read_text()
    named = set(re.findall(r'"file": "(.+?)"', manifest))
    assert {path.name for path in folder.iterdir()} == named | {"manifest.json"}
    assert result["files"] == len(named) + 1
    assert result["bytes"] == sum(path.stat().st_size for path in folder.iterdir())
    assert result["adder_layers"] == 6
    words = (folder / "logits.hex").read_text().split()
    image = recorded_images(quantized.plan, quantized, 1, None)
    expected = reference.run(quantized.plan, image)[0]
    assert [int(word, 16) for word in words] == [int(logit) % 2**32 for logit in expected]


def test_images_of_a_data_set_are_recorded(quantized):
    """The network's bytes of real images, on the grid of its plan."""
    images = recorded_images(quantized.plan, quantized, 4, Recipe(dataset="digits"))
    assert images.shape == (4, 8, 8, 3)
    zero_point = quantized.plan.activations[0].zero_point.double()
    real = 0.125 * (images.double() - zero_point)  # digits are 0 to 1: from -2 to 2 once they are normalized
    assert real.min() < -1.8
    assert -2.07 < real.min() <= real.max() < 2.07
    assert torch.equal(images, recorded_images(quantized.plan, quantized, 4, Recipe(dataset="digits")))


def test_files_of_others_in_the_folder_stay(quantized, adder_kit, tmp_path):
    (tmp_path / "firmware").mkdir()
    (tmp_path / "firmware" / "main.c").write_text("int main(void);")
    words = ("export", "net", "--format", "c", "-o", "firmware")
    assert adder_kit(*words)[0] == 0
    (tmp_path / "firmware" / "net.c").write_text("old")
    assert "--overwrite" in adder_kit(*words)[2]
    assert (tmp_path / "firmware" / "net.c").read_text() == "old"
    assert adder_kit(*words, "--overwrite")[0] == 0
    assert (tmp_path / "firmware" / "main.c").read_text() == "int main(void);"
    assert (tmp_path / "firmware" / "net.c").read_text().startswith("/* net: ")


def test_network_that_is_not_quantized(adder_folder, adder_kit, tmp_path):
    code, out, error = adder_kit("export", "plain", "--format", "c")
    assert (code, out) == (1, "")
    assert (
        error.strip()
        .splitlines()[-1]
        .endswith("plain is not quantized, which --format c needs; first: adderkit quantize plain --dataset NAME")
    )
    assert not (tmp_path / "plain-c").exists()


def test_layers_in_floating_point_are_refused(quantized, adder_kit, tmp_path):
    quantized.stem = nn.Conv2d(1, 3, 1)
    code, _, error = adder_kit("export", "net", "--format", "hex")
    expected = (
        "error: net has its first layer and its classifier in fp32, which --format hex does not support; "
        "quantize again with --first-last int8\n"
    )
    assert (code, error) == (1, expected)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--format", "hex", "--opset", "18"], "--opset 18 goes with --format onnx, not with hex"),
        (["--dataset", "digits"], "--dataset digits goes with --format c or hex, not with onnx"),
        (["--format", "c", "--data-dir", "x"], "--data-dir x needs the name of the data set: give --dataset as well"),
        (["--format", "c", "-o", "taken"], "taken is not a writable directory"),
        (["--format", "hex", "-o", "taken/deep"], "cannot write --output taken/deep: "),
        (["--format", "c", "--dataset", "nothing"], "nothing"),
        (["--format", "c", "--dataset", "fashion-mnist", "--data-dir", "nowhere"], "nowhere"),
    ],
)
def test_wrong_input_is_one_line(words, message, quantized, adder_kit, tmp_path):
    (tmp_path / "taken").write_text("")
    code, out, error = adder_kit("export", "net", *words)
    assert code == 1
    assert out == ""
    assert message in error
    assert "Traceback" not in error
    assert len(error.strip().splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken"]


def test_format_is_a_choice(misused):
    assert "'cpp' is not one of 'onnx', 'torch-export', 'c', 'hex'" in misused("export", "net", "--format", "cpp")


def test_own_weights(adder_kit, fails, tmp_path):
    """A CNN of timm's with the user's weights, whose number of classes the file determines."""
    torch.manual_seed(0)
    model = timm.create_model("cifar_resnet20", num_classes=7).eval()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    words = ("export", "cifar_resnet20", "--checkpoint", "weights.pth", "--format", "torch-export")
    assert "add --num-classes 7" in fails(*words)
    assert adder_kit(*words, "--num-classes", 7)[0] == 0
    images = torch.randn(2, 3, 32, 32)
    exported = torch.export.load(tmp_path / "cifar_resnet20.pt2").module()
    torch.testing.assert_close(exported(images), model(images))


def test_network_without_weights(fails):
    line = fails("export", "cifar_resnet20")
    assert "timm has no pretrained weights for 'cifar_resnet20'" in line
    assert "--checkpoint" in line
    assert "--no-pretrained" in line
