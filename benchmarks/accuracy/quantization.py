"""Accuracy after quantization on Fashion-MNIST: a CNN and its adder network in 8, 6, 5 and 4 bits.

    python -m benchmarks.accuracy.quantization --teacher runs/teacher/best --model runs/calibrated --qat runs/qat4/best

The float networks come from ``benchmarks.accuracy.fashion_mnist_table``; those of quantization-aware training from
``adderkit finetune --recipe int8-qat --set bits=4``. Ranges are chosen on unlabeled training images. Rows in the JSON
are not measured again.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import adderkit
from adderkit.convert.files import read_json_object, write_json
from adderkit.convert.quantization.fake_quantize import FakeQuantized
from adderkit.recipes.data.datasets import DataConfig
from adderkit.recipes.data.loaders import evaluation_transform, unlabeled_images
from adderkit.recipes.data.small import SMALL_DATASETS

from .fashion_mnist import hardware, versions

PTQ: list[dict[str, Any]] = [
    *({"bits": bits} for bits in (8, 6, 5, 4)),
    {"bits": 8, "requant": "shift"},
    {"bits": 8, "first_last": "fp32"},
]


def main() -> None:
    """Measure the missing rows, and write the JSON after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, required=True, help="The CNN.")
    parser.add_argument("--model", type=Path, required=True, help="Adder network made from it.")
    parser.add_argument("--qat", type=Path, nargs="*", default=[], help="Networks of quantization-aware training.")
    parser.add_argument("--images", type=int, default=512, help="Images for ranges and BatchNorm statistics.")
    parser.add_argument("--json", type=Path, default=Path("docs/results/quantization.json"))
    arguments = parser.parse_args()
    rows = read_json_object(arguments.json)["rows"] if arguments.json.exists() else []
    facts = {"calibration_images": arguments.images, "hardware": hardware(), "versions": versions()}
    for label, build in networks(arguments):
        if any(row["label"] == label for row in rows):
            continue
        started = time.perf_counter()
        row = {"label": label, "build_seconds": 0.0, **measure(network := build())}
        row["build_seconds"] = time.perf_counter() - started - row["seconds"]
        row["bytes"] = sum(each.numel() * each.element_size() for each in network.state_dict().values())
        rows.append(row)
        write_json(arguments.json, {"rows": rows, **facts})
        print(json.dumps(row), flush=True)


def networks(arguments: argparse.Namespace) -> list[tuple[str, Callable[[], nn.Module]]]:
    """Return the label of each row with a function that builds its network."""
    found: list[tuple[str, Callable[[], nn.Module]]] = [
        ("CNN, fp32", lambda: adderkit.load(arguments.teacher)),
        ("CNN, quantized, bits=8", lambda: quantized(arguments.teacher, arguments.images, {})),
        ("adder network, fp32", lambda: adderkit.load(arguments.model)),
    ]
    for settings in PTQ:
        name = ", ".join(f"{key}={value}" for key, value in settings.items())
        label = f"adder network, quantized, {name}"
        found.append((label, lambda settings=settings: quantized(arguments.model, arguments.images, settings)))  # type: ignore[misc]
    for folder in arguments.qat:
        model = adderkit.load(folder)
        assert isinstance(model, FakeQuantized)
        config = model.quantize_config
        label = f"adder network, trained, bits={config.bits}" + (", requant=shift" if config.requant == "shift" else "")
        found.append((label, lambda folder=folder: quantized(folder, arguments.images, {})))  # type: ignore[misc]
    return found


def quantized(folder: Path, count: int, settings: dict[str, Any]) -> nn.Module:
    """Quantize a saved network."""
    model = adderkit.load(folder)
    images = unlabeled_images("fashion-mnist", None, model, count)
    return adderkit.quantize(model, images, adderkit.QuantizeConfig(**settings))


@torch.no_grad()
def measure(model: nn.Module) -> dict[str, Any]:
    """Return top-1 accuracy and loss on the 10,000 test images."""
    images, targets = test_images(model)
    started, logits = time.perf_counter(), []
    for batch in images.split(100):
        logits.append(model(batch))
    found = torch.cat(logits)
    top1 = 100 * float((found.argmax(1) == targets).float().mean())
    return {
        "top1": round(top1, 2),
        "loss": float(cross_entropy(found, targets)),
        "images": len(images),
        "seconds": time.perf_counter() - started,
    }


def test_images(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Return test images ``[N, C, H, W]``, normalized as the model expects, and labels ``[N]``."""
    images, targets = SMALL_DATASETS["fashion-mnist"].read(None, "validation")
    transform: Any = evaluation_transform(DataConfig.of(model))
    return torch.stack([transform(Image.fromarray(image)) for image in images]), torch.from_numpy(targets.copy())


if __name__ == "__main__":
    main()
