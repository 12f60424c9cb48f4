"""Digits and Fashion-MNIST: the IDX reader on files made here, and the facts that are stated about both."""

import gzip

import numpy as np
import pytest
import torch

from adderkit.convert.errors import DatasetError
from adderkit.recipes.data import small as small_datasets
from adderkit.recipes.data.small import DEBIAN_FASHION_MNIST, SMALL_DATASETS

FASHION = SMALL_DATASETS["fashion-mnist"]
NAMES = {"train": "train", "validation": "t10k"}


def idx(array):
    """The bytes of a ubyte IDX file, as described on the MNIST page."""
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes((0, 0, 8, array.ndim)) + sizes + array.astype(np.uint8).tobytes()


@pytest.fixture
def write(tmp_path):
    """Write a split's two files, each perhaps replaced by other bytes; the folder as text."""

    def files(images, labels, prefix="train", pack=False):
        for name, content in (("images-idx3", images), ("labels-idx1", labels)):
            data = content if isinstance(content, bytes) else idx(content)
            path = tmp_path / f"{prefix}-{name}-ubyte{'.gz' if pack else ''}"
            path.write_bytes(gzip.compress(data) if pack else data)
        return str(tmp_path)

    return files


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (5, 28, 28), np.uint8)


@pytest.fixture
def labels():
    return np.array([3, 0, 9, 1, 1], np.uint8)


@pytest.mark.parametrize("pack", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("split", NAMES)
def test_reads_what_was_written(write, images, labels, split, pack):
    dataset = FASHION.open(write(images, labels, NAMES[split], pack), split)
    assert len(dataset) == 5
    assert [target for _, target in (dataset[index] for index in range(5))] == labels.tolist()
    for index in range(5):
        assert np.array_equal(np.asarray(dataset[index][0]), images[index])


@pytest.mark.parametrize("alias", ["val", "test"])
def test_other_names_of_the_validation_split(write, images, labels, alias):
    assert len(FASHION.open(write(images, labels, "t10k"), alias)) == 5


def damaged(images, labels):
    whole = idx(images)
    rank_two = bytes((0, 0, 8, 2)) + whole[4:]
    return {
        "truncated": (whole[:-1], idx(labels), "has 3935 bytes, expected 3936"),
        "too-long": (whole + b"\0", idx(labels), "has 3937 bytes, expected 3936"),
        "wrong-type": (b"\0\0\x0d\x03" + whole[4:], idx(labels), "not an IDX file of images"),
        "wrong-rank": (rank_two, idx(labels), "expected it to begin with 00 00 08 03"),
        "labels-for-images": (idx(labels), idx(labels), "not an IDX file of images"),
        "images-for-labels": (whole, whole, "not an IDX file of labels"),
        "header-only-begun": (whole[:6], idx(labels), "not an IDX file of images"),
        "empty": (b"", idx(labels), "not an IDX file of images"),
        "giant-sizes": (bytes((0, 0, 8, 3)) + b"\xff" * 12, idx(labels), "has 16 bytes, expected"),
        "label-10": (whole, idx(labels + 1), "has a train label 10, expected 0 to 9"),
        "fewer-labels": (whole, idx(labels[:4]), "has 5 train images but 4 labels"),
    }


@pytest.mark.parametrize("pack", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("case", damaged(np.zeros((1, 1, 1)), np.zeros(1)))
def test_damaged_files_are_refused(write, images, labels, case, pack):
    image_bytes, label_bytes, message = damaged(images, labels)[case]
    with pytest.raises(DatasetError, match=message):
        FASHION.open(write(image_bytes, label_bytes, pack=pack), "train")


@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: b"no gzip", lambda data: flipped(data)],
                         ids=["truncated", "foreign", "flipped-bits"])  # fmt: skip
def test_a_damaged_gz(tmp_path, write, images, labels, damage):
    folder = write(images, labels, pack=True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DatasetError, match=r"ubyte.gz is damaged: .*download it again"):
        FASHION.open(folder, "train")


def flipped(data):
    middle = len(data) // 2
    return data[:middle] + bytes(255 - byte for byte in data[middle:])


def test_a_gz_that_unpacks_beyond_all_bounds(monkeypatch, write, images, labels):
    monkeypatch.setattr(small_datasets, "_LIMIT", 1000)
    with pytest.raises(DatasetError, match="not an IDX file"):
        FASHION.open(write(images, labels, pack=True), "train")


@pytest.mark.parametrize("absent", ["train-images-idx3-ubyte", "train-labels-idx1-ubyte"])
def test_a_missing_file_says_how_to_get_it(tmp_path, write, images, labels, absent):
    folder = write(images, labels)
    (tmp_path / absent).unlink()
    with pytest.raises(DatasetError, match=f"{absent}.*apt-get install dataset-fashion-mnist.*--data-dir") as caught:
        FASHION.open(folder, "train")
    assert "\n" not in str(caught.value)


def test_unknown_split():
    with pytest.raises(DatasetError, match="split is 'testing', expected one of train, validation"):
        SMALL_DATASETS["digits"].open(None, "testing")


@pytest.fixture(scope="module")
def digits():
    pytest.importorskip("sklearn")
    return {split: SMALL_DATASETS["digits"].open(None, split) for split in ("train", "validation")}


def test_digits_are_split_in_two(digits):
    assert {split: len(dataset) for split, dataset in digits.items()} == {"train": 1437, "validation": 360}
    for dataset in digits.values():
        assert set(dataset.targets.tolist()) == set(range(10))
        assert dataset[0][0].size == (8, 8)


def test_digits_are_scikit_learn_s(digits):
    from sklearn.datasets import load_digits

    original = load_digits()
    found = np.concatenate([digits[split].images for split in ("train", "validation")]).reshape(-1, 64)
    rescaled = np.round(found / 255 * 16).astype(int)
    assert sorted(map(tuple, rescaled)) == sorted(map(tuple, original.data.astype(int)))
    assert np.array_equal(digits["validation"].targets, original.target[::5])


def test_digits_splits_are_disjoint(digits):
    train, validation = ({image.tobytes() for image in digits[split].images} for split in digits)
    assert train.isdisjoint(validation)


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(DatasetError, match="needs the package scikit-learn: pip install"):
        SMALL_DATASETS["digits"].open(None, "train")


@pytest.mark.parametrize("name", SMALL_DATASETS)
def test_stated_facts_are_true(name):
    if name == "fashion-mnist" and not DEBIAN_FASHION_MNIST.is_dir():
        pytest.skip("Debian's dataset-fashion-mnist is not installed")
    facts = SMALL_DATASETS[name]
    dataset = facts.open(None, "train")
    pixels = torch.from_numpy(dataset.images.copy()).double() / 255
    assert facts.input_size == (1, *dataset.images.shape[1:])
    assert facts.mean == pytest.approx((pixels.mean().item(),), abs=5e-5)
    assert facts.std == pytest.approx((pixels.std(correction=0).item(),), abs=1e-4)
    assert set(dataset.targets.tolist()) == set(range(len(facts.classes)))


@pytest.mark.skipif(not DEBIAN_FASHION_MNIST.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_fashion_mnist_as_installed():
    assert {split: len(FASHION.open(None, split)) for split in NAMES} == {"train": 60000, "validation": 10000}
