"""Data sets by Hugging Face's ``datasets`` from a folder: mapped from disk (``hfds/…``) and streamed (``hfids/…``)."""

import io

import numpy as np
import pytest
from PIL import Image

from adderkit.convert.errors import DatasetError
from adderkit.convert.model_source import ModelSource
from adderkit.recipes.data import datasets as data
from adderkit.recipes.data.datasets import open_dataset
from adderkit.recipes.data.loaders import make_loader
from adderkit.recipes.runs.folder import RunFolder
from adderkit.recipes.training import run as finetune
from adderkit.recipes.training.models import Job

datasets = pytest.importorskip("datasets")
SHARDS, IN_SHARD = 4, 11
CLASSES = ["cat", "dog", "eel"]
FEATURES = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
# The length of a stream has to be known beforehand; the Hub's cards tell it like this.
CARD = """---
dataset_info:
  features:
  - name: image
    dtype: image
  - name: label
    dtype:
      class_label:
        names: {'0': cat, '1': dog, '2': eel}
  splits:
  - {name: train, num_examples: 44}
  - {name: validation, num_examples: 22}
---
"""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder as a repository of the Hub: Parquet files of two splits, and a card."""
    root = tmp_path_factory.mktemp("pictures")
    for split, shards in (("train", SHARDS), ("validation", 2)):
        for shard in range(shards):
            numbers = range(shard * IN_SHARD, (shard + 1) * IN_SHARD)
            images = [Image.new("RGB", (12, 12), (60 * (number % 3) + 40, 5 * number, 90)) for number in numbers]
            table = {"image": images, "label": [number % 3 for number in numbers]}
            name = f"{split}-{shard:05d}-of-{shards:05d}.parquet"
            datasets.Dataset.from_dict(table, features=FEATURES).to_parquet(root / "data" / name)
    (root / "README.md").write_text(CARD)
    return root


@pytest.fixture
def job_and_recipe(pictures, quick_recipe, tmp_path):
    def make(reader, **changes):
        fixed = {"dataset": f"{reader}/{pictures}", "data_dir": str(tmp_path / "cache"), "train_images": 0}
        job = Job(ModelSource("cifar_resnet20", pretrained=False, num_classes=3))
        return job, quick_recipe("cnn", **fixed, batch_size=8, img_size=12, **changes)

    return make


def epoch_of(pictures, cache, reader, epoch, workers=0, seed=0, split="train"):
    """Colors, which tell the images apart, and labels of an epoch's batches."""
    dataset = open_dataset(f"{reader}/{pictures}", str(cache), split)
    loader = make_loader(dataset, lambda image: image.getpixel((0, 0))[1], 8, workers,
                         training=split == "train", seed=seed)  # fmt: skip
    loader.dataset.set_epoch(epoch)
    return len(loader), [(images.tolist(), labels.tolist()) for images, labels in loader]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_of_a_stream_has_the_whole_batches_that_the_loader_promises(pictures, tmp_path, workers):
    promised, batches = epoch_of(pictures, tmp_path, "hfids", 0, workers)
    assert promised == len(batches)
    assert {len(labels) for _, labels in batches} == {8}
    assert {color for colors, _ in batches for color in colors} == {5 * number for number in range(44)}
    assert all(color // 5 % 3 == label for colors, labels in batches
               for color, label in zip(colors, labels, strict=True))  # fmt: skip


def test_the_order_of_a_stream_follows_from_seed_and_epoch(pictures, tmp_path):
    def order(epoch, seed):
        return str(epoch_of(pictures, tmp_path, "hfids", epoch, seed=seed)[1])

    orders = {(epoch, seed): order(epoch, seed) for epoch in (0, 1) for seed in (0, 1)}
    assert all(order(*key) == value for key, value in orders.items())
    assert len(set(orders.values())) == 4


def test_evaluation_sees_each_image_of_a_stream_once(pictures, tmp_path):
    promised, batches = epoch_of(pictures, tmp_path, "hfids", 0, split="validation")
    assert promised == len(batches) == 3
    assert sorted(color for colors, _ in batches for color in colors) == [5 * number for number in range(22)]


def test_classes_are_known_by_name(pictures, tmp_path):
    for reader in ("hfds", "hfids"):
        assert data.class_names(open_dataset(f"{reader}/{pictures}", str(tmp_path), "train")) == CLASSES


@pytest.mark.parametrize("reader", ["hfds", "hfids"])
def test_images_are_read_as_from_folders(reader, tmp_path):
    """16 bits keep the high byte, the camera's orientation is not applied, and damage is named."""
    deep, turned = io.BytesIO(), io.BytesIO()
    Image.fromarray(np.full((4, 8), 40000, np.uint16)).save(deep, "PNG")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 4), "red").save(turned, "PNG", exif=exif)
    files = [deep.getvalue(), turned.getvalue(), b"no image"]
    table = {"image": [{"bytes": each, "path": None} for each in files], "label": [2, 0, 1]}
    datasets.Dataset.from_dict(table, features=FEATURES).to_parquet(tmp_path / "odd" / "train-00000-of-00001.parquet")
    (tmp_path / "odd" / "README.md").write_text(
        CARD.replace("44", "3").replace("  - {name: validation, num_examples: 22}\n", "")
    )
    dataset = open_dataset(f"{reader}/{tmp_path / 'odd'}", str(tmp_path / "cache"), "train", training=False)
    images = iter(dataset) if reader == "hfids" else (dataset[index] for index in range(3))
    assert [(np.asarray(image)[0, 0].tolist(), image.size, label) for image, label in (next(images), next(images))] == [
        ([156] * 3, (8, 4), 2),
        ([255, 0, 0], (8, 4), 0),
    ]
    with pytest.raises(DatasetError, match=r"cannot read image 2.*: it is not in an image format"):
        next(images)


@pytest.mark.parametrize("reader", ["hfds", "hfids"])
def test_a_run_is_resumed_exactly(reader, job_and_recipe, same_run, tmp_path, stop_at, monkeypatch):
    settings = {"epochs": 2, "save_every": 1, "hflip": 0.5}
    through, stopped = RunFolder(tmp_path / "through"), RunFolder(tmp_path / "stopped")
    rows = finetune.start(*job_and_recipe(reader, **settings), through)
    stop_at("epoch 1/1", 3)
    with pytest.raises(KeyboardInterrupt):
        finetune.start(*job_and_recipe(reader, **settings), stopped)
    monkeypatch.undo()
    assert finetune.resume(stopped) == rows
    same_run(stopped, through)


@pytest.mark.parametrize("reader", ["hfds", "hfids"])
def test_what_is_not_there_is_one_clear_error(reader, tmp_path, pictures):
    with pytest.raises(DatasetError, match=rf"data set '{reader}/{tmp_path}/none', split 'train', cannot be opened: "):
        open_dataset(f"{reader}/{tmp_path}/none", str(tmp_path), "train")
    with pytest.raises(DatasetError, match=r"split 'other', cannot be opened: .*; check --data-dir and the split"):
        open_dataset(f"{reader}/{pictures}", str(tmp_path), "other")


@pytest.mark.parametrize("reader", ["hfds", "hfids"])
def test_a_missing_package_is_named(reader, monkeypatch):
    monkeypatch.setattr(data, "find_spec", lambda name: None)
    with pytest.raises(DatasetError, match=f"--dataset {reader}/x needs the package datasets: pip install datasets"):
        open_dataset(f"{reader}/x", None, "train")
