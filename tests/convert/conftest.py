"""What the tests of this folder share: small networks, the same networks computed by the reference, one thread."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

import adderkit
from adderkit.adder_layers.reference import adder_conv2d_reference
from adderkit.convert.calibration.batchnorm import reestimate_batchnorm_


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Networks this small gain nothing from threads, which wait for each other where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class TinyNet(nn.Module):
    """A stem, a grouped, a depthwise and a pointwise convolution, each normalized; a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm0 = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=2)
        self.norm1 = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.norm2 = nn.BatchNorm2d(8)
        self.pointwise = nn.Conv2d(8, 6, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(6)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm0(self.stem(x)).relu()
        x = self.norm1(self.grouped(x)).relu()
        x = self.norm2(self.depthwise(x)).relu()
        x = self.norm3(self.pointwise(x)).relu()
        return self.head(self.dropout(x.mean((2, 3))))


ADDERS_OF_TINY_NET = ["grouped", "depthwise", "pointwise"]


def randomize_norms_(model: nn.Module) -> nn.Module:
    """Fresh BatchNorms do nothing in evaluation mode; drawn ones show whether their tensors survive."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
            module.num_batches_tracked.fill_(3)
    return model


@pytest.fixture
def tiny() -> Callable[[], nn.Module]:
    """A fresh ``TinyNet`` in evaluation mode."""
    return lambda: randomize_norms_(TinyNet()).eval()


@pytest.fixture
def teacher(tiny: Callable[[], nn.Module]) -> nn.Module:
    """A ``TinyNet`` whose statistics fit its images, as a trained network's do: else little passes the activations."""
    model = tiny()
    reestimate_batchnorm_(model, [torch.randn(64, 3, 8, 8)])
    return model


@pytest.fixture
def tiny_adders() -> list[str]:
    """The convolutions of ``TinyNet`` that the default configuration converts, in order of execution."""
    return list(ADDERS_OF_TINY_NET)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(4, 3, 8, 8)


@pytest.fixture
def resnet20() -> Callable[..., nn.Module]:
    """A timm model that can be saved: ``cifar_resnet20`` for gray images of 8x8 pixels, in evaluation mode."""

    def build(**kwargs: object) -> nn.Module:
        gray = {"input_size": (1, 8, 8), "mean": (0.5,), "std": (0.25,)}
        model = timm.create_model("cifar_resnet20", in_chans=1, pretrained_cfg_overlay=gray, **kwargs)
        return randomize_norms_(model).eval()

    return build


@pytest.fixture
def adder_model(resnet20: Callable[..., nn.Module]) -> nn.Module:
    network = resnet20()
    adderkit.convert_(network)
    return network


@pytest.fixture
def saved(adder_model: nn.Module, tmp_path: Path) -> Path:
    """A folder with an adder network."""
    return adderkit.save(adder_model, tmp_path / "saved")


@pytest.fixture
def same_tensors() -> Callable[[nn.Module, nn.Module], bool]:
    """Compare the tensors of two models, and their order, bit by bit."""

    def compare(first: nn.Module, second: nn.Module) -> bool:
        ours, theirs = first.state_dict(), second.state_dict()
        return list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)

    return compare


@pytest.fixture
def gray_images() -> Tensor:
    return torch.randn(2, 1, 8, 8)


@pytest.fixture
def by_reference() -> Callable[[nn.Module, list[str]], nn.Module]:
    """A copy of a CNN in which some convolutions are computed by the adder layer's formula."""

    def build(cnn: nn.Module, paths: list[str]) -> nn.Module:
        twin = copy.deepcopy(cnn)
        for path in paths:
            layer = twin.get_submodule(path)

            def forward(x: Tensor, layer: nn.Conv2d = layer) -> Tensor:
                return adder_conv2d_reference(
                    x, layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups
                )

            layer.forward = forward
        return twin

    return build


@pytest.fixture
def snapshot() -> Callable[[nn.Module], dict[str, object]]:
    """All that must be the same after an operation that promises to leave a model alone."""

    def take(model: nn.Module) -> dict[str, object]:
        modules = dict(model.named_modules(remove_duplicate=False))
        return {
            "classes": {path: type(module) for path, module in modules.items()},
            "modes": {path: module.training for path, module in modules.items()},
            "hooks": {
                path: (list(module._forward_hooks.values()), list(module._forward_pre_hooks.values()))
                for path, module in modules.items()
            },
            "attributes": {path: sorted(vars(module)) for path, module in modules.items()},
            "tensors": {name: tensor.tolist() for name, tensor in model.state_dict().items()},
            "gradients": {name: value.requires_grad for name, value in model.named_parameters()},
            "transforms": copy.deepcopy(getattr(model, "_adderkit_transforms", [])),
        }

    return take
