r"""Accuracy that other networks keep in a conversion without training, on Fashion-MNIST.

    python -m benchmarks.accuracy.fashion_mnist_networks --runs runs/networks \
        --json docs/results/fashion_mnist_networks.json

The teachers are trained briefly; the figure of interest is the share of *their* accuracy that remains. Calibration uses
1,024 training images and no labels. Steps whose folder exists are not run again.
"""

import argparse
from pathlib import Path
from typing import Any

from adderkit.convert.files import write_json

from .fashion_mnist import CALIBRATE, DATA, hardware, run_step, versions

# Training settings of each teacher; timm's networks take the images at 32x32.
TEACHERS: dict[str, list[str]] = {
    "cifar_vgg_small": ["--epochs", "2", "--set", "train_images=8000", "--set", "lr=0.05"],
    "resnet18": ["--epochs", "3", "--set", "train_images=20000", "--set", "lr=0.05", "--set", "img_size=32"],
    "mobilenetv2_100": ["--epochs", "3", "--set", "train_images=20000", "--set", "lr=0.05", "--set", "img_size=32"],
}


def steps(network: str) -> list[tuple[str, str, list[str]]]:
    """Return label, folder to evaluate and command that creates it, for each step of one network."""
    teacher = f"{network}-teacher"
    train = ["finetune", network, "--no-pretrained", *DATA, *TEACHERS[network], "--output", teacher]
    converted = f"{network}-adder"
    convert = ["convert", "--model", f"{teacher}/best", "--to", "adder", *CALIBRATE, "--output", converted]
    return [("CNN teacher", f"{teacher}/best", train), ("adder network", converted, convert)]


def main() -> None:
    """Run the missing steps, evaluate all, and write the JSON after each network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/networks"))
    parser.add_argument("--json", type=Path, default=Path("docs/results/fashion_mnist_networks.json"))
    parser.add_argument("--networks", nargs="+", choices=TEACHERS, default=list(TEACHERS))
    arguments = parser.parse_args()
    arguments.runs.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[dict[str, Any]]] = {}
    for network in arguments.networks:
        found[network] = [run_step(arguments.runs, *step) for step in steps(network)]
        write_json(arguments.json, {"networks": found, "hardware": hardware(), "versions": versions()})
        for row in found[network]:
            share = row["top1"] / found[network][0]["top1"]
            print(f"{network:<18}{row['label']:<20}{row['top1']:6.2f} {share:7.1%} {row['seconds'] or 0:6.0f} s")


if __name__ == "__main__":
    main()
