"""A model is saved as it is now, whatever was changed since it was built; a change that is not recorded is refused."""

import pytest
import timm
import torch
from timm.models import register_model
from torch import nn

import adderkit
from adderkit.convert.checkpoint.configuration import check_savable
from adderkit.convert.errors import CheckpointError, ModelSourceError
from adderkit.convert.model_source import ModelSource

IMAGES = {"input_size": (3, 16, 16), "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}


class Plain(nn.Module):
    """A network of one's own, with nothing of timm's interface."""

    def __init__(self, classes=3):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
        self.linear = nn.Linear(8, classes)

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        return self.linear(self.bn2(self.conv2(x)).relu().mean((2, 3)))


@register_model
def configured_plain(pretrained=False, **kwargs):
    model = Plain()
    model.pretrained_cfg = dict(IMAGES)
    return model


@register_model
def adjustable_plain(pretrained=False, num_classes=3, **kwargs):
    model = Plain(num_classes)
    model.pretrained_cfg = dict(IMAGES)
    return model


@register_model
def unconfigured_plain(pretrained=False, **kwargs):
    return Plain()


def named(name, model):
    model.pretrained_cfg = {**IMAGES, "architecture": name}
    return model


def there_and_back(model, folder, image=(2, 3, 32, 32)):
    """Outputs of a model and of its saved and loaded copy, which is returned as well."""
    images = torch.randn(image, generator=torch.Generator().manual_seed(0))
    loaded = adderkit.load(adderkit.save(model.eval(), folder))
    dtype = next(model.parameters()).dtype
    with torch.no_grad():
        return model(images.to(dtype)), loaded(images.to(dtype)), loaded


def small(**arguments):
    return timm.create_model("test_resnet", **arguments)


@pytest.mark.parametrize("reset", [(7,), (0,), (7, "max"), (0, "")])
@pytest.mark.parametrize("converted", [False, True])
def test_classifier_that_was_reset(tmp_path, reset, converted):
    model = small(num_classes=10)
    if converted:
        adderkit.convert_(model)
    model.reset_classifier(*reset)
    ours, theirs, loaded = there_and_back(model, tmp_path / "net")
    assert torch.equal(ours, theirs)
    assert loaded.num_classes == reset[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_is_kept(tmp_path, dtype):
    ours, theirs, loaded = there_and_back(small().to(dtype), tmp_path / "net")
    assert torch.equal(ours, theirs)
    assert theirs.dtype == dtype
    assert loaded.bn1.num_batches_tracked.dtype == torch.int64
    built = ModelSource(str(tmp_path / "net")).build()
    assert next(built.parameters()).dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)


def test_mixed_dtypes_are_kept(tmp_path):
    model = small()
    model.fc.half()
    loaded = adderkit.load(adderkit.save(model, tmp_path / "net"))
    assert (loaded.fc.weight.dtype, loaded.conv1[0].weight.dtype) == (torch.float16, torch.float32)


@pytest.mark.parametrize(
    ("argument", "layer", "name"),
    [("act_layer", nn.SiLU, "silu"), ("norm_layer", timm.layers.GroupNorm1, "groupnorm1")],
)
def test_classes_among_the_arguments_are_saved_by_name(tmp_path, argument, layer, name):
    ours, theirs, loaded = there_and_back(small(**{argument: layer}), tmp_path / "net")
    assert torch.equal(ours, theirs)
    assert any(type(module) is layer for module in loaded.modules())
    assert loaded._model_args[argument] == name


class OwnActivation(nn.ReLU):
    pass


def test_class_without_a_name_is_refused():
    with pytest.raises(CheckpointError, match=r"argument act_layer is OwnActivation, which config.json cannot hold"):
        check_savable(small(act_layer=OwnActivation))


@pytest.mark.parametrize("arguments", [{}, {"out_indices": (1, 3)}, {"feature_cls": "hook"}])
@pytest.mark.parametrize("converted", [False, True])
def test_feature_extractors(tmp_path, arguments, converted):
    model = small(features_only=True, **arguments)
    if converted:
        adderkit.convert_(model)
    ours, theirs, loaded = there_and_back(model, tmp_path / "net")
    assert len(ours) == len(theirs)
    assert all(map(torch.equal, ours, theirs))
    assert loaded.feature_info.channels() == model.feature_info.channels()


@pytest.mark.parametrize(
    ("path", "layer"),
    [
        ("maxpool", nn.Identity()),
        ("act1", nn.SiLU()),
        ("fc", nn.Linear(96, 5)),
        ("layer1.0.conv1", nn.Conv2d(32, 32, 3, dilation=2, padding=2, bias=False)),
    ],
)
def test_changes_that_loading_would_lose_are_refused(tmp_path, path, layer):
    """The first two have no weights: the folder would load without an error, and compute something else."""
    model = small()
    model.set_submodule(path, layer)
    with pytest.raises(CheckpointError, match=rf"cannot save test_resnet: {path}.* when timm builds the network again"):
        adderkit.save(model, tmp_path / "net")
    assert not (tmp_path / "net").exists()


def test_settings_of_training_are_no_changes(tmp_path):
    model = small(drop_rate=0.3)
    model.set_grad_checkpointing()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.01
        if isinstance(module, nn.ReLU):
            module.inplace = False
    ours, theirs, _ = there_and_back(model, tmp_path / "net")
    assert torch.equal(ours, theirs)


def test_check_draws_no_random_numbers(tmp_path):
    model, before = small(), torch.get_rng_state()
    adderkit.save(model, tmp_path / "net")
    assert torch.equal(torch.get_rng_state(), before)


# Networks of one's own


@pytest.mark.parametrize("converted", [False, True])
def test_own_network_needs_a_name_only(tmp_path, converted):
    model = named("unconfigured_plain", Plain())
    if converted:
        adderkit.convert_(model)
    ours, theirs, loaded = there_and_back(model, tmp_path / "net")
    assert torch.equal(ours, theirs)
    check_savable(loaded)
    assert loaded.pretrained_cfg["mean"] == list(IMAGES["mean"])
    assert not hasattr(loaded, "num_classes")


@pytest.mark.parametrize("converted", [False, True])
def test_number_of_classes_that_only_the_registered_function_knows(tmp_path, converted):
    model = ModelSource("adjustable_plain", pretrained=False, num_classes=5).build()
    if converted:
        adderkit.convert_(model)
    ours, theirs, loaded = there_and_back(model, tmp_path / "net")
    assert loaded.linear.out_features == 5
    assert torch.equal(ours, theirs)


def test_own_network_without_a_name():
    with pytest.raises(CheckpointError, match=r"register_model, and name it in the model's pretrained_cfg"):
        check_savable(Plain())


def test_own_network_that_the_registered_function_does_not_build():
    with pytest.raises(
        CheckpointError, match=r"cannot save unconfigured_plain: linear.weight is \[4, 8\], but \[3, 8\]"
    ):
        check_savable(named("unconfigured_plain", Plain(4)))


def test_own_network_from_the_command_line_gets_its_name():
    model = ModelSource("configured_plain", pretrained=False).build()
    assert model.pretrained_cfg == {**IMAGES, "architecture": "configured_plain"}


def test_own_network_of_which_nothing_is_known():
    with pytest.raises(
        ModelSourceError, match=r"unconfigured_plain does not say what images it takes; .*pretrained_cfg"
    ):
        ModelSource("unconfigured_plain", pretrained=False).build()
