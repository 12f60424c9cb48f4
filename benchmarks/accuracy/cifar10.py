"""Conversion of a public CNN on CIFAR-10 without labels or training, with one to four terms a weight.

    python -m benchmarks.accuracy.cifar10 --data cifar10 --weights cifar10-resnet20.safetensors

The teacher is He's ResNet-20 for CIFAR-10 with shortcuts without parameters ("option A"), which timm does not have; its
weights are public (Yerlan Idelbayev's, https://github.com/akamaster/pytorch_resnet_cifar10), here as safetensors.
``--data`` is a folder with ``train/CLASS/*.png`` and ``validation/CLASS/*.png``.

Images for calibration are drawn from the training images. Reported are top-1 accuracy on the validation images and how
often the predicted class is the teacher's, after the fit of each layer alone and after that of all together, and top-1
in 8-bit integers after each; with one number of terms, and with terms chosen by layer (``convert --terms auto --budget
adds=125%``). Trials with a result in the JSON are not run again (``conversion_trials.py``).
"""

import argparse
import copy
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

import adderkit
from adderkit.convert.files import write_json

from .conversion_trials import Benchmark, Choice, resumed, run, scores

CHOICE = Choice(terms=(1, 2, 3, 4), additions=(1.25,))
QUANTIZATION_IMAGES = 256


class Shortcut(nn.Module):
    """Shortcut without parameters: every second pixel, and zeros for the channels that it lacks."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.inputs, self.outputs, self.stride = inputs, outputs, stride
        self.missing = (outputs - inputs) // 2

    def forward(self, input: Tensor) -> Tensor:
        """Return ``[N, O, H / stride, W / stride]`` of ``[N, C, H, W]``."""
        pixels = input[:, :, :: self.stride, :: self.stride]
        return F.pad(pixels, (0, 0, 0, 0, self.missing, self.missing))

    def as_convolution(self) -> nn.Module:
        """Return a layer that computes the same, of the kind that integer networks have."""
        if self.stride == 1 and not self.missing:
            return nn.Identity()
        layer = nn.Conv2d(self.inputs, self.outputs, 1, self.stride, bias=False)
        with torch.no_grad():
            layer.weight.zero_()[self.missing : self.missing + self.inputs, :, 0, 0] = torch.eye(self.inputs)
        return layer


class Block(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = Shortcut(inputs, outputs, stride)

    def forward(self, input: Tensor) -> Tensor:
        """Apply the block to ``[N, C, H, W]``."""
        output = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(input)))))
        return F.relu(output + self.shortcut(input))


class CifarResNet(nn.Module):
    """ResNet for CIFAR-10 (arXiv 1512.03385, section 4.2) with ``6 · blocks + 2`` layers."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(
                *(Block(width if index else before, width, 1 if index else stride) for index in range(blocks))
            )
            for before, width, stride in ((16, 16, 1), (16, 32, 2), (32, 64, 2))
        )
        self.linear = nn.Linear(64, 10)

    def forward(self, input: Tensor) -> Tensor:
        """Return logits ``[N, 10]`` of images ``[N, 3, 32, 32]``."""
        features = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(input))))))
        logits: Tensor = self.linear(features.mean((2, 3)))
        return logits


def teacher(weights: Path) -> nn.Module:
    """Return the network with the number of blocks that the weights have."""
    state = load_file(weights)
    model = CifarResNet(sum(name.startswith("layer1.") and name.endswith(".conv1.weight") for name in state))
    model.load_state_dict(state)
    return model.eval()


def read(folder: Path, count: int | None = None) -> tuple[Tensor, Tensor]:
    """Read images of class folders, normalized with ImageNet's mean and deviation, and their labels.

    Args:
        folder: Folder of one split.
        count: Number of images to draw; all by default.
    """
    files = [(path, label) for label, each in enumerate(sorted(folder.iterdir())) for path in sorted(each.iterdir())]
    if count is not None:
        chosen = torch.randperm(len(files), generator=torch.Generator().manual_seed(0))[:count].tolist()
        files = [files[index] for index in chosen]
    mean, deviation = (torch.tensor(values)[:, None, None] for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    pixels = np.stack([np.asarray(Image.open(path).convert("RGB")) for path, _ in files])
    images = (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - mean) / deviation
    return images, torch.tensor([label for _, label in files])


def quantized(model: nn.Module, images: Tensor) -> nn.Module:
    """Return a network in 8-bit integers; shortcuts, which have no integer step, are convolutions there."""
    model = copy.deepcopy(model)
    for block in [module for module in model.modules() if isinstance(module, Block)]:
        assert isinstance(block.shortcut, Shortcut)
        block.shortcut = block.shortcut.as_convolution()
    return adderkit.quantize(model, images)


def main() -> None:
    """Run the missing trials, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--json", type=Path, default=Path("docs/results/cifar10.json"))
    parser.add_argument("--fits", type=Path, default=Path("runs/cifar10"), help="folder of fitted networks")
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=adderkit.CalibrationConfig().matching_steps)
    arguments = parser.parse_args()
    original = teacher(arguments.weights)
    images, _ = read(arguments.data / "train", arguments.images)
    validation = read(arguments.data / "validation")
    settings = {"weights": arguments.weights.stem, "images": arguments.images, "steps": arguments.steps}
    result = resumed(arguments.json, settings)
    result["teacher"] = scores(original, original, validation)["top-1"]
    config = adderkit.CalibrationConfig(matching_steps=arguments.steps)
    few = images[:QUANTIZATION_IMAGES]
    benchmark = Benchmark(
        original, images, validation, config, arguments.fits, result["trials"], lambda model: quantized(model, few)
    )
    run(benchmark, CHOICE, lambda: write_json(arguments.json, result))


if __name__ == "__main__":
    main()
