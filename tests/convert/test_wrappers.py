"""Wrapped models: read through any wrapper, changed through those that do not mind, refused by name otherwise."""

import pytest
import torch
from timm.utils import ModelEma, ModelEmaV2, ModelEmaV3
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import adderkit
from adderkit.adder_layers.modules import adder_layers
from adderkit.convert.errors import AdderkitError
from adderkit.convert.wrappers import unwrapped

CALIBRATION = adderkit.CalibrationConfig(2, 64, 1)


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def compiled(model):
    return torch.compile(model, backend="eager")


READABLE = [compiled, DataParallel, AveragedModel, ModelEma, ModelEmaV2, ModelEmaV3]
CHANGEABLE = [compiled, DataParallel]


@pytest.mark.parametrize("wrap", READABLE)
def test_reading_goes_through(wrap, resnet20, adder_model, gray_images, tmp_path):
    cnn = resnet20()
    assert adderkit.plan(wrap(cnn)) == adderkit.plan(cnn)
    assert adderkit.cost(wrap(adder_model)).to_dict() == adderkit.cost(adder_model).to_dict()
    loaded = adderkit.load(adderkit.save(wrap(adder_model), tmp_path / "saved"))
    assert torch.equal(loaded(gray_images), adder_model(gray_images))


def test_quantize_goes_through(adder_model):
    images = torch.randn(16, 1, 8, 8)
    expected = adderkit.quantize(adder_model, images)(images)
    assert torch.equal(adderkit.quantize(compiled(adder_model), images)(images), expected)


@pytest.mark.parametrize("wrap", CHANGEABLE)
def test_changing_goes_through(wrap, resnet20, gray_images):
    model, plain = resnet20(), resnet20()
    plain.load_state_dict(model.state_dict())
    wrapped = wrap(model)
    wrapped(gray_images)  # compiled for the CNN
    adderkit.convert_(wrapped)
    adderkit.convert_(plain)
    assert torch.equal(wrapped(gray_images), plain(gray_images))
    adderkit.calibrate_(wrapped, wrap(resnet20()), torch.randn(16, 1, 8, 8), CALIBRATION)
    assert torch.equal(wrapped(gray_images), model(gray_images))
    assert adderkit.revert_(wrapped) == len(adder_layers(plain))
    assert not adder_layers(model)


@pytest.mark.parametrize("wrap", [AveragedModel, ModelEma, ModelEmaV2, ModelEmaV3])
def test_averages_are_not_changed(wrap, resnet20):
    average = wrap(resnet20())
    with pytest.raises(
        AdderkitError, match=r"inside a \w+, which averages .*: it must be converted before it is wrapped"
    ):
        adderkit.convert_(average)
    assert not adder_layers(unwrapped(average))


def test_parallel_training_is_not_changed(resnet20, process_group):
    wrapped = DistributedDataParallel(resnet20())
    assert adderkit.plan(wrapped).rows
    with pytest.raises(AdderkitError, match=r"DistributedDataParallel, which synchronizes .*pass its \.module"):
        adderkit.convert_(wrapped)


def test_sharded_models_are_refused(resnet20, process_group):
    model = resnet20()
    torch.distributed.fsdp.fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
    for verb in (adderkit.plan, adderkit.convert_, adderkit.cost):
        with pytest.raises(AdderkitError, match=r"sharded by FSDP2.*pass the model from before"):
            verb(model)


def test_wrapped_parts_are_refused(resnet20):
    model = resnet20()
    model.features = compiled(model.features)
    with pytest.raises(AdderkitError, match="'features' in the model is a OptimizedModule"):
        adderkit.convert_(model)


def test_nested_wrappers(resnet20):
    model = resnet20()
    assert unwrapped(ModelEmaV3(compiled(DataParallel(model)))) is not model  # a copy, as the average makes
    assert unwrapped(compiled(DataParallel(model))) is model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("resnet18", r"the model is a str.*timm.create_model\('resnet18'\)"),
        ({"conv.weight": torch.zeros(1)}, "the model is a dict, expected a torch.nn.Module"),
        (None, "the model is a NoneType"),
    ],
)
def test_other_things_are_refused(model, message):
    with pytest.raises(AdderkitError, match=message):
        adderkit.plan(model)


def test_torchscript_is_refused():
    with pytest.raises(AdderkitError, match="RecursiveScriptModule is a TorchScript model"):
        adderkit.plan(torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 3))))


class Holder(nn.Module):
    """A model with a training step, as Lightning's are."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x)


def test_holders_name_the_model_in_them(resnet20, tmp_path):
    holder = Holder(resnet20())
    with pytest.raises(AdderkitError, match=r"give an example_input.*or pass the timm model in it, \.model"):
        adderkit.plan(holder)
    with pytest.raises(AdderkitError, match=r"pass the timm model in it, \.model"):
        adderkit.save(holder, tmp_path / "saved")
    adderkit.convert_(holder, example_input=torch.zeros(1, 1, 8, 8))
    with pytest.raises(AdderkitError, match="is converted, but not by a conversion of this model"):
        adderkit.save(holder.model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("in_place", [False, True])
def test_compiled_models_notice_a_conversion(resnet20, gray_images, in_place):
    model = resnet20()
    if in_place:
        model.compile(backend="eager")
    called = model if in_place else compiled(model)
    before = called(gray_images)
    adderkit.convert_(model)
    assert not torch.equal(called(gray_images), before)
    assert torch.equal(called(gray_images), model.forward(gray_images))
