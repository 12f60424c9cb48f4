"""Re-parameterization: done before the conversion and recorded, refused after it by whatever would merge layers."""

import copy

import pytest
import timm
import torch
from timm.models import byobnet, efficientvit_msra, fastvit, ghostnet, iformer, levit, repvit, tiny_vit
from torch import nn
from torch.fx.experimental import optimization
from torch.nn.utils.fusion import fuse_conv_bn_eval

import adderkit
from adderkit.convert.errors import AdderkitError
from adderkit.convert.model_source import ModelSource
from adderkit.convert.record import transforms_of
from adderkit.recipes.verbs.convert import ConversionJob, run_conversion

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class RepBlock(nn.Module):
    """Two parallel branches, merged under the names that repositories of such networks use."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.wide = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.wide_norm = nn.BatchNorm2d(channels)
        self.narrow = nn.Conv2d(channels, channels, 1, bias=False)
        self.narrow_norm = nn.BatchNorm2d(channels)

    def forward(self, x):
        return (self.wide_norm(self.wide(x)) + self.narrow_norm(self.narrow(x))).relu()

    def get_equivalent_kernel_bias(self):
        return self.wide.weight + nn.functional.pad(self.narrow.weight, (1, 1, 1, 1)), None

    def switch_to_deploy(self):
        kernel, _ = self.get_equivalent_kernel_bias()
        self.wide.weight = nn.Parameter(kernel)
        self.register_buffer("deployed", torch.ones(()))

    def fuse_model(self, is_qat=None):
        self.switch_to_deploy()

    def fuse_features(self, x):
        return x + 1


def own_network():
    return nn.Sequential(nn.Conv2d(3, 8, 3), RepBlock(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).eval()


@pytest.fixture
def repghost():
    """The smallest network of timm with parallel branches."""
    torch.manual_seed(0)
    return timm.create_model("repghostnet_050", num_classes=4).eval()


@pytest.mark.parametrize("method", ["get_equivalent_kernel_bias", "switch_to_deploy", "fuse_model"])
def test_methods_that_merge_converted_layers_are_refused(method):
    model = own_network()
    adderkit.convert_(model, example_input=IMAGES)
    with pytest.raises(
        AdderkitError, match=rf"{method}\(\) would compute a convolution .*'wide'.*before converting it"
    ):
        getattr(model[1], method)()
    assert model[1].fuse_features(1) == 2


def test_the_refusal_survives_copies_and_ends_with_the_conversion(tmp_path):
    model = own_network()
    kernel = model[1].get_equivalent_kernel_bias()[0]
    adderkit.convert_(model, example_input=IMAGES)
    torch.save(model, tmp_path / "whole.pt")
    for twin in (copy.deepcopy(model), torch.load(tmp_path / "whole.pt", weights_only=False)):
        with pytest.raises(AdderkitError, match="would compute a convolution"):
            twin[1].switch_to_deploy()
    adderkit.revert_(model)
    assert torch.equal(model[1].get_equivalent_kernel_bias()[0], kernel)


@pytest.mark.parametrize(
    "block",
    [
        byobnet.RepVggBlock(8, 8),
        byobnet.MobileOneBlock(8, 8),
        fastvit.MobileOneBlock(8, 8, 3),
        fastvit.RepMixer(8),
        ghostnet.GhostModuleV3(8, 8),
        repvit.RepVggDw(8, 3),
        levit.ConvNorm(8, 8, 1),
        tiny_vit.ConvNorm(8, 8),
        efficientvit_msra.ConvNorm(8, 8),
        iformer.ConvNorm(8, 8),
    ],
    ids=lambda block: f"{type(block).__module__.split('.')[-1]}.{type(block).__name__}",
)
def test_timm_refuses_to_reparameterize_converted_blocks(block):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), copy.deepcopy(block)).eval()
    adderkit.convert_(model, adderkit.AdderConfig(skip_last=False), example_input=IMAGES)
    expected = model(IMAGES)
    with pytest.raises(AdderkitError, match="re-parameterize the model before"):
        timm.utils.reparameterize_model(model, inplace=True)
    assert torch.equal(model(IMAGES), expected)


def test_a_loaded_network_refuses_too(repghost, tmp_path):
    adderkit.convert_(repghost, example_input=IMAGES)
    loaded = adderkit.load(adderkit.save(repghost, tmp_path / "saved"))
    with pytest.raises(AdderkitError, match="re-parameterize the model before"):
        timm.utils.reparameterize_model(loaded)


def test_reparameterized_first(repghost, tmp_path):
    before = repghost(IMAGES)
    merged = adderkit.reparameterize_(repghost)
    assert torch.allclose(repghost(IMAGES), before, atol=1e-5)
    assert "blocks.0.0.ghost1" in merged
    assert all(parameter.requires_grad for parameter in repghost.parameters())  # timm leaves them frozen
    assert not any(module.training for module in repghost.modules())
    teacher = copy.deepcopy(repghost)
    adderkit.convert_(repghost, example_input=IMAGES)
    assert [transform["kind"] for transform in transforms_of(repghost)] == ["reparameterize", "adder"]
    adderkit.calibrate_(repghost, teacher, torch.randn(16, 3, 32, 32), adderkit.CalibrationConfig(2, 64, 1))
    loaded = adderkit.load(adderkit.save(repghost, tmp_path / "saved"))
    assert torch.equal(loaded(IMAGES), repghost(IMAGES))
    adderkit.revert_(loaded)
    assert torch.equal(adderkit.load(adderkit.save(loaded, tmp_path / "plain"))(IMAGES), loaded(IMAGES))


def test_the_plan_advises(repghost, caplog):
    adderkit.plan(repghost, example_input=IMAGES)
    assert "which is refused after the conversion" in caplog.text
    caplog.clear()
    adderkit.reparameterize_(repghost)
    adderkit.plan(repghost, example_input=IMAGES)
    assert not caplog.records


def test_nothing_to_merge():
    with pytest.raises(AdderkitError, match="CifarResNet has no branches"):
        adderkit.reparameterize_(timm.create_model("cifar_resnet20"))


def test_converted_networks_are_not_reparameterized(repghost):
    adderkit.convert_(repghost, example_input=IMAGES)
    with pytest.raises(AdderkitError, match="layers are converted"):
        adderkit.reparameterize_(repghost)


def test_faulty_merges_are_found():
    model = own_network()  # its switch_to_deploy() leaves both branches
    with pytest.raises(AdderkitError, match=r"change by .* when timm re-parameterizes it"):
        adderkit.reparameterize_(model, IMAGES)


def test_the_verb(tmp_path):
    source = ModelSource("repghostnet_050", pretrained=False)
    job = ConversionJob(source, output=str(tmp_path / "out"), reparameterize=True)
    run_conversion(job, dry_run=False, announce=print)
    kinds = [transform["kind"] for transform in transforms_of(adderkit.load(tmp_path / "out"))]
    assert kinds == ["reparameterize", "adder"]


# Functions of PyTorch


@pytest.fixture
def pair(tiny):
    """An adder network and its outputs, which every tool has to keep, or to refuse."""
    model = tiny()
    adderkit.convert_(model, example_input=torch.zeros(1, 3, 8, 8))
    images = torch.randn(2, 3, 8, 8)
    return model, images, model(images).detach()


def test_fuse_conv_bn_eval_is_refused(pair):
    model, _, _ = pair
    with pytest.raises(TypeError, match=r"the layer is an AdderConv2d.*fuse the convolutional network"):
        fuse_conv_bn_eval(model.grouped, model.norm1)
    fused = fuse_conv_bn_eval(model.stem, model.norm0)  # still a convolution
    image = torch.randn(1, 3, 8, 8)
    assert torch.allclose(fused(image), model.norm0(model.stem(image)), atol=1e-5)


def test_to_mkldnn_is_refused(pair):
    with pytest.raises(TypeError, match=r"to_mkldnn computes a convolution.*'grouped' is an AdderConv2d"):
        torch.utils.mkldnn.to_mkldnn(pair[0])


def test_fuse_modules_of_quantization_is_refused(pair):
    with pytest.raises(AssertionError, match="AdderConv2d"):
        torch.ao.quantization.fuse_modules(pair[0], [["grouped", "norm1"]])


def test_fx_fusion_keeps_the_outputs(pair):
    model, images, expected = pair
    assert torch.allclose(optimization.fuse(model)(images), expected, atol=1e-4)


def test_jit_optimizations_keep_the_outputs(pair):
    model, images, expected = pair
    traced = torch.jit.freeze(torch.jit.trace(model, images))
    assert torch.allclose(torch.jit.optimize_for_inference(traced)(images), expected, atol=1e-4)
