"""Exported models: ONNX Runtime and torch.export give what the model gives, and the adder layers are found by name."""

import copy
import json
import subprocess
import sys
import zipfile

import onnx
import pytest
import timm
import torch
from torch import nn

import adderkit
from adderkit.adder_layers.modules import adder_layers
from adderkit.convert.calibration.batchnorm import reestimate_batchnorm_
from adderkit.convert.errors import ExportError
from adderkit.convert.export.programs import export_onnx, export_program

onnxruntime = pytest.importorskip("onnxruntime")  # for Python 3.11 and newer


def network(name, size):
    """An adder network for images of that size whose statistics fit its weights."""
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained_cfg_overlay={"input_size": (3, size, size)}).eval()
    adderkit.convert_(model)
    for layer in adder_layers(model).values():
        nn.init.normal_(layer.weight)
    reestimate_batchnorm_(model, [torch.randn(16, 3, size, size)])
    return model


def run(path, images):
    (logits,) = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(
        ["logits"], {"images": images.numpy()}
    )
    return torch.from_numpy(logits)


def assert_same(model, path, size, batches=(1, 3)):
    for batch in batches:
        images = torch.randn(batch, 3, size, size)
        with torch.no_grad():
            torch.testing.assert_close(run(path, images), model(images), rtol=0, atol=1e-4)


class Small(nn.Module):
    """Two adder layers, the first with a bias and uneven padding."""

    def __init__(self, terms=1):
        super().__init__()
        self.same = adderkit.AdderConv2d(3, 4, (2, 3), padding="same", bias=True, terms=terms)
        self.reflect = adderkit.AdderConv2d(4, 2, 3, padding=1, padding_mode="reflect", groups=2, terms=terms)
        self.pretrained_cfg = {"input_size": (3, 6, 6)}
        nn.init.normal_(self.same.bias)

    def forward(self, x):
        return self.reflect(self.same(x)).mean((2, 3))


@pytest.fixture
def small():
    return Small().eval()


@pytest.fixture(scope="module")
def resnet20():
    return network("cifar_resnet20", 32)


@pytest.fixture(scope="module")
def exported(resnet20, tmp_path_factory):
    """``resnet20`` as ONNX."""
    return export_onnx(copy.deepcopy(resnet20).train(), tmp_path_factory.mktemp("export") / "net.onnx")


def test_onnx_runtime_gives_the_same_for_any_batch(resnet20, exported):
    assert_same(resnet20, exported, 32)


@pytest.mark.parametrize("order", ["prune-convert", "convert-prune"])
def test_pruned_networks(tmp_path, order):
    torch.manual_seed(0)
    model = timm.create_model("cifar_resnet20", pretrained_cfg_overlay={"input_size": (3, 16, 16)}).eval()
    images = torch.randn(32, 3, 16, 16)
    for step in order.split("-"):
        if step == "prune":
            adderkit.prune_(model, adderkit.PruneConfig(ratio=0.4, importance="random"), images)
        else:
            adderkit.convert_(model)
            reestimate_batchnorm_(model, [images])
    loaded = adderkit.load(adderkit.save(model, tmp_path / "net"))
    assert_same(loaded, export_onnx(loaded, tmp_path / "net.onnx"), 16)
    shapes = {tensor.name: list(tensor.dims) for tensor in onnx.load(tmp_path / "net.onnx").graph.initializer}
    assert shapes["features.1.conv1.weight"] == list(loaded.features[1].conv1.weight.shape) == [10, 10, 3, 3]
    program = torch.export.load(export_program(loaded, tmp_path / "net.pt2")).module()
    assert torch.equal(program(images[:3]), loaded(images[:3]))


def test_several_terms(tmp_path):
    """A call for each term of each layer, and the same outputs."""
    small = Small(terms=3).eval()
    images = torch.randn(3, 3, 6, 6)
    found = run(export_onnx(small, tmp_path / "net.onnx"), images)
    torch.testing.assert_close(found, small(images), rtol=1e-5, atol=1e-4)
    assert sum(node.domain == "adderkit" for node in onnx.load(tmp_path / "net.onnx").graph.node) == 6
    program = torch.export.load(export_program(small, tmp_path / "net.pt2")).module()
    assert torch.equal(program(images), small(images))


def test_hardware_flows_find_the_layers_by_name(resnet20, exported):
    model = onnx.load(exported)
    (function,) = model.functions
    assert (function.domain, function.name) == ("adderkit", "AdderConv2d")
    assert {node.domain for node in function.node} == {""}
    calls = [node for node in model.graph.node if node.domain == "adderkit"]
    layers = {f"{path}.weight": layer for path, layer in adder_layers(resnet20).items()}
    assert {call.input[1] for call in calls} == layers.keys()
    assert len(calls) == len(layers) == 20
    for call in calls:
        layer = layers[call.input[1]]
        settings = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in call.attribute}
        assert settings == {
            "strides": [*layer.stride],
            "pads": [*layer.padding, *layer.padding],
            "dilations": [*layer.dilation],
            "group": layer.groups,
        }


def test_nothing_of_this_machine_is_in_the_file(exported):
    content = exported.read_bytes()
    assert b".py" not in content
    assert b"metadata" not in content


@pytest.mark.slow
def test_resnet18(tmp_path):
    model = network("resnet18", 64)
    assert_same(model, export_onnx(model, tmp_path / "net.onnx"), 64)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenetv2_100", "tf_efficientnet_lite0"])
def test_depthwise_networks_so_deep_that_rounding_grows(tmp_path, name):
    """Some 50 adder layers with random weights: ONNX Runtime is as close to fp64 as PyTorch in fp32 is.

    The second has TensorFlow's padding, which is not the same on opposite sides.
    """
    model, images = network(name, 64), torch.randn(3, 3, 64, 64)
    path = export_onnx(model, tmp_path / "net.onnx")
    with torch.no_grad():
        single, double = model(images), copy.deepcopy(model).double()(images.double())
    assert double.std() > 0.1
    assert (run(path, images) - double).abs().max() < 1e-4 + 4 * (single - double).abs().max()


def test_bias_and_named_padding(small, tmp_path):
    assert_same(small, export_onnx(small, tmp_path / "net.onnx", opset=20), 6)


# torch.export


def test_program_holds_the_operator_and_reloads(small, tmp_path):
    images = torch.randn(3, 3, 6, 6)
    torch.save(images, tmp_path / "images.pt")
    export_program(small, tmp_path / "net.pt2")
    code = (
        "import adderkit, torch\n"
        "program = torch.export.load('net.pt2')\n"
        "names = [str(node.target) for node in program.graph.nodes]\n"
        "assert names.count('adderkit.adder_conv2d.default') == 2, names\n"
        "torch.save(program.module()(torch.load('images.pt')), 'logits.pt')\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    with torch.no_grad():
        torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), small(images), rtol=0, atol=1e-5)
    with zipfile.ZipFile(tmp_path / "net.pt2") as archive:
        assert not any(b".py" in archive.read(name) for name in archive.namelist() if name.endswith(".json"))


# What is refused


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_missing_package(small, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ExportError, match=rf"needs {package}: pip install 'adderkit\[export\]'"):
        export_onnx(small, tmp_path / "net.onnx")


@pytest.mark.parametrize("opset", [17, 99])
def test_opset_that_is_not_supported(small, tmp_path, opset):
    with pytest.raises(ExportError, match=f"opset is {opset}, expected 18 to 23"):
        export_onnx(small, tmp_path / "net.onnx", opset)
    assert list(tmp_path.iterdir()) == []


def test_model_that_cannot_be_traced(tmp_path):
    class Fussy(nn.Module):
        pretrained_cfg = {"input_size": (3, 4, 4)}  # noqa: RUF012

        def forward(self, x):
            return x if x.sum().item() > 0 else -x

    with pytest.raises(ExportError, match="cannot trace the model"):
        export_onnx(Fussy(), tmp_path / "net.onnx")


def test_no_half_a_file_is_left(small, tmp_path, monkeypatch):
    def save(program, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    (tmp_path / "net.pt2").write_bytes(b"old")
    monkeypatch.setattr(torch.export, "save", save)
    with pytest.raises(ExportError, match=r"cannot write .*net\.pt2: No space left on device"):
        export_program(small, tmp_path / "net.pt2")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("net.pt2", b"old")]


# Command line


def test_verb(tmp_path, adder_kit, resnet20):
    adderkit.save(resnet20, tmp_path / "net")
    status, out, err = adder_kit("export", "net", "--format", "torch-export", "--json")
    assert (status, err) == (0, "")
    done = json.loads(out)
    assert done == {
        "model": "net",
        "format": "torch-export",
        "adder_layers": 20,
        "output": "net.pt2",
        "bytes": (tmp_path / "net.pt2").stat().st_size,
    }
    status, _, err = adder_kit("export", "net", "--format", "coreml")
    assert status == 2
    assert "'coreml' is not one of 'onnx', 'torch-export', 'c', 'hex'" in err
    status, _, err = adder_kit("export", "net", "--format", "torch-export", "--opset", "18")
    assert (status, err) == (1, "error: --opset 18 goes with --format onnx, not with torch-export\n")
    for output, message in (("net.txt", "ends in '.txt', expected '.pt2'"), ("net", "ends in '', expected '.pt2'")):
        status, _, err = adder_kit("export", "net", "--format", "torch-export", "--output", output)
        assert (status, err) == (1, f"error: --output {output} {message}\n")
