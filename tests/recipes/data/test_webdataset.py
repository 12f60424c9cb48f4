"""A WebDataset, streamed from tar shards by timm's reader: trained on, evaluated, stopped and resumed."""

import io
import json
import shutil
import subprocess
import sys
import tarfile

import pytest
from PIL import Image

from adderkit.convert.errors import DatasetError
from adderkit.convert.model_source import ModelSource
from adderkit.recipes.data import datasets as data
from adderkit.recipes.data.datasets import open_dataset, with_labels
from adderkit.recipes.data.labels import Labels
from adderkit.recipes.data.loaders import make_loader
from adderkit.recipes.runs.folder import RunFolder
from adderkit.recipes.training import run as finetune
from adderkit.recipes.training.models import Job
from adderkit.recipes.verbs.evaluate import evaluate_model

pytest.importorskip("webdataset")
SHARDS, IN_SHARD = 4, 11


def write_shard(path, start):
    with tarfile.open(path, "w") as shard:
        for number in range(start, start + IN_SHARD):
            picture = io.BytesIO()
            Image.new("RGB", (12, 12), (60 * (number % 3) + 40, 5 * number % 256, 90)).save(picture, "PNG")
            for suffix, data in (("png", picture.getvalue()), ("cls", str(number % 3).encode())):
                entry = tarfile.TarInfo(f"{number:04d}.{suffix}")
                entry.size = len(data)
                shard.addfile(entry, io.BytesIO(data))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Two splits with the description that timm's reader wants beside them."""
    root = tmp_path_factory.mktemp("shards")
    splits = {}
    for split, count in (("train", SHARDS), ("validation", 2)):
        names = [f"tiny-{split}-{index:02d}.tar" for index in range(count)]
        for index, name in enumerate(names):
            write_shard(root / name, index * IN_SHARD)
        splits[split] = {"name": split, "filenames": names, "shard_lengths": [IN_SHARD] * count,
                         "num_samples": IN_SHARD * count}  # fmt: skip
    (root / "_info.json").write_text(json.dumps({"splits": splits}))
    return root


@pytest.fixture
def streamed(shards, quick_recipe):
    """A CNN and a recipe for the stream."""
    job = Job(ModelSource("cifar_resnet20", pretrained=False, num_classes=3))

    def recipe(**changes):
        fixed = {"dataset": "wds/tiny", "data_dir": str(shards), "train_images": 0, "batch_size": 8, "img_size": 12}
        return job, quick_recipe("cnn", **fixed, **changes)

    return recipe


def epoch_of(shards, epoch, workers=0, seed=0, batch_size=8, split="train"):
    """Colors, which tell the images apart, and labels of an epoch's batches."""
    dataset = open_dataset("wds/tiny", str(shards), split)
    loader = make_loader(dataset, lambda image: image.getpixel((0, 0))[1], batch_size, workers,
                         training=split == "train", seed=seed)  # fmt: skip
    dataset.set_epoch(epoch)
    return len(loader), [(images.tolist(), labels.tolist()) for images, labels in loader]


@pytest.mark.parametrize(("workers", "batch_size"), [(0, 8), (0, 44), (2, 8), (2, 16)])
def test_an_epoch_has_the_whole_batches_that_the_loader_promises(shards, workers, batch_size):
    promised, batches = epoch_of(shards, 0, workers, batch_size=batch_size)
    assert promised == len(batches)
    assert {len(labels) for _, labels in batches} == {batch_size}
    assert {color for colors, _ in batches for color in colors} == {5 * number for number in range(44)}
    assert all(color // 5 % 3 == label for colors, labels in batches
               for color, label in zip(colors, labels, strict=True))  # fmt: skip


def test_the_order_follows_from_seed_and_epoch(shards):
    orders = {(epoch, seed): epoch_of(shards, epoch, seed=seed)[1] for epoch in (0, 1) for seed in (0, 1)}
    assert all(epoch_of(shards, epoch, seed=seed)[1] == order for (epoch, seed), order in orders.items())
    assert len({str(order) for order in orders.values()}) == 4


def test_evaluation_sees_each_image_once(shards):
    promised, batches = epoch_of(shards, 0, split="validation")
    assert promised == len(batches) == 3
    assert sorted(color for colors, _ in batches for color in colors) == [5 * number for number in range(22)]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_on_a_stream_is_resumed_exactly(streamed, same_run, tmp_path, stop_at, monkeypatch, workers):
    settings = {"epochs": 2, "save_every": 1, "workers": workers, "hflip": 0.5}
    through, stopped = RunFolder(tmp_path / "through"), RunFolder(tmp_path / "stopped")
    rows = finetune.start(*streamed(**settings), through)
    stop_at("epoch 1/1", 3)
    with pytest.raises(KeyboardInterrupt):
        finetune.start(*streamed(**settings), stopped)
    monkeypatch.undo()
    assert finetune.resume(stopped) == rows
    same_run(stopped, through)


def test_a_model_is_evaluated_on_a_stream(streamed, shards, tmp_path):
    job, recipe = streamed()
    folder = RunFolder(tmp_path / "run")
    rows = finetune.start(job, recipe, folder)
    metrics = evaluate_model(ModelSource(str(folder.last)), "wds/tiny", str(shards), "validation", 8, 0)
    assert metrics.images == 22
    assert metrics.top1 == rows[-1]["eval_top1"]


@pytest.mark.slow
def test_two_processes_share_the_shards(shards, tmp_path):
    """44 training images in batches of 4: 22 and 22, filled up to 24 and 24; 22 for evaluation, in steps of 8."""
    words = ["--no-pretrained", "--num-classes", "3", "--dataset", "wds/tiny", "--data-dir", str(shards), "--epochs",
             "1", "--batch-size", "4", "--set", "img_size=12", "--workers", "0", "--num-processes", "2"]  # fmt: skip
    command = [sys.executable, "-m", "adderkit", "finetune", "cifar_resnet20", *words, "--output", "run", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "[6/6 (100%)]" in done.stderr
    assert "evaluation [3/3 (100%)]" in done.stderr
    report = json.loads((tmp_path / "run" / "last" / "adder_report.json").read_text())
    assert report["metrics"]["validation"]["images"] == 22
    planned = subprocess.run([*command, "--dry-run"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(planned.stdout)["plan"]["steps_per_epoch"] == 6


def test_shards_at_an_address(streamed, shards, tmp_path):
    """It stays as it was given, also for a run that is resumed."""
    job, recipe = streamed()
    recipe = recipe.changed({"data_dir": f"file:{shards}"})
    folder = RunFolder(tmp_path / "run")
    rows = finetune.start(job, recipe, folder)
    assert folder.arguments()["recipe"]["data_dir"] == f"file:{shards}"
    assert finetune.resume(folder) == rows


def test_a_missing_package_is_named(shards, monkeypatch):
    monkeypatch.setattr(data, "find_spec", lambda name: None)
    with pytest.raises(DatasetError, match="--dataset wds/tiny needs the package webdataset: pip install webdataset"):
        open_dataset("wds/tiny", str(shards), "train")


def test_a_part_of_a_stream_cannot_be_chosen(adder_kit, shards):
    status, _, errors = adder_kit("finetune", "cifar_resnet20", "--no-pretrained", "--num-classes", 3,
                                  "--dataset", "wds/tiny", "--data-dir", shards, "--set", "train_images=8")  # fmt: skip
    assert status == 1
    assert "cannot be chosen from a streamed data set" in errors


class TestDamage:
    """webdataset logs and skips what cannot be read, and training repeats others in its place."""

    @pytest.fixture
    def copied(self, shards, tmp_path):
        return shutil.copytree(shards, tmp_path / "damaged")

    @pytest.mark.parametrize("split", ["train", "validation"])
    def test_an_image_is_named(self, copied, split):
        shard = copied / f"tiny-{split}-01.tar"
        contents = bytearray(shard.read_bytes())
        start = contents.index(b"IDAT")
        contents[start : start + 8] = bytes(8)
        shard.write_bytes(contents)
        with pytest.raises(DatasetError, match=rf"cannot read 0011 of {shard}: .*; repair or remove it"):
            list(open_dataset("wds/tiny", str(copied), split))

    def test_a_truncated_shard(self, copied):
        shard = copied / "tiny-validation-00.tar"
        shard.write_bytes(shard.read_bytes()[:3000])
        with pytest.raises(DatasetError, match=rf"a shard cannot be read: .*{shard}; download it again"):
            list(open_dataset("wds/tiny", str(copied), "validation"))

    def test_a_label_out_of_range(self, shards):
        dataset = with_labels(open_dataset("wds/tiny", str(shards), "validation"), Labels(2))
        with pytest.raises(
            DatasetError, match="cannot read image 2 of wds/tiny: its label is 2, expected a class index"
        ):
            list(dataset)
