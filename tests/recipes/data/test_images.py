"""Strict reading of images: pixel values of every format, and files that are no images."""

import io

import numpy as np
import pytest
from PIL import Image, ImageFile

from adderkit.convert.errors import DatasetError
from adderkit.recipes.data.datasets import open_dataset
from adderkit.recipes.data.images import decode_image

GRAY = np.array([[0, 1, 127, 200, 255]], np.uint8)
DEEP = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
COLOR = np.array([[[10, 20, 30], [200, 100, 50], [255, 0, 255]]], np.uint8)


def decoded(image, kind="PNG", mode="RGB", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return np.asarray(decode_image(file, mode)).tolist()


def in_rgb(gray):
    return np.repeat(np.asarray(gray)[..., None], 3, 2).tolist()


def test_gray_and_color():
    assert decoded(Image.fromarray(GRAY)) == in_rgb(GRAY)
    assert decoded(Image.fromarray(GRAY), mode="L") == GRAY.tolist()
    assert decoded(Image.fromarray(COLOR)) == COLOR.tolist()
    luma = (COLOR.astype(int) @ np.array([299, 587, 114]) / 1000).round()
    assert np.abs(np.array(decoded(Image.fromarray(COLOR), mode="L")) - luma).max() <= 1


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_keep_the_high_byte(kind):
    high = [[0, 0, 1, 128, 255]]
    assert decoded(Image.fromarray(DEEP), kind, "L") == high
    assert decoded(Image.fromarray(DEEP), kind) == in_rgb(high)


def test_sixteen_bits_in_the_other_byte_order():
    assert decoded(Image.frombytes("I;16B", (5, 1), DEEP.astype(">u2").tobytes()), "TIFF", "L") == [[0, 0, 1, 128, 255]]


def test_sixteen_bit_pgm():
    file = io.BytesIO(b"P5 5 1 65535\n" + DEEP.astype(">u2").tobytes())
    assert np.asarray(decode_image(file, "L")).tolist() == [[0, 0, 1, 128, 255]]


@pytest.mark.parametrize("pixels", [DEEP.astype(np.int32), DEEP.astype(np.float32)], ids=["int32", "float32"])
def test_thirty_two_bits_have_no_known_range(pixels):
    with pytest.raises(DatasetError, match=r"32 bits .*, expected 8 or 16"):
        decoded(Image.fromarray(pixels), "TIFF")


def test_one_bit_is_black_or_white():
    image = Image.new("1", (2, 1))
    image.putpixel((1, 0), 1)
    assert decoded(image) == [[[0] * 3, [255] * 3]]


def test_transparency_is_dropped():
    alpha = np.array([[0, 128, 255]], np.uint8)
    assert decoded(Image.fromarray(np.dstack([COLOR, alpha]))) == COLOR.tolist()
    gray = np.array([[5, 6, 7]], np.uint8)
    assert decoded(Image.fromarray(np.dstack([gray, alpha]), "LA")) == in_rgb(gray)


@pytest.mark.parametrize("transparency", [None, 1, bytes([0, 128, 255])], ids=["opaque", "color", "bytes"])
@pytest.mark.filterwarnings("error")
def test_palette(transparency):
    image = Image.new("P", (3, 1))
    image.putpalette(COLOR.reshape(-1).tolist())
    image.putdata([0, 1, 2])
    options = {} if transparency is None else {"transparency": transparency}
    assert decoded(image, **options) == COLOR.tolist()


def test_cmyk():
    """RGB = (255 - ink)(255 - K) / 255, both as TIFF and as JPEG, which holds inverted inks as Adobe's do."""
    inks = np.tile(np.array([255, 60, 0, 40], np.uint8), (16, 16, 1))
    expected = np.array([(255 - ink) * (255 - 40) / 255 for ink in (255, 60, 0)])
    image = Image.fromarray(inks, "CMYK")
    assert np.abs(np.array(decoded(image, "TIFF")) - expected).max() <= 1
    assert np.abs(np.array(decoded(image, "JPEG", quality=100)) - expected).max() <= 4


def test_the_first_of_several_frames():
    frames = [Image.new("RGB", (2, 2), color) for color in ("red", "lime")]
    for kind in ("TIFF", "PNG"):
        assert decoded(frames[0], kind, save_all=True, append_images=frames[1:]) == [[[255, 0, 0]] * 2] * 2


def test_the_orientation_of_a_camera_is_not_applied():
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.zeros((8, 16, 3), np.uint8)
    assert np.array(decoded(Image.fromarray(pixels), "JPEG", exif=exif)).shape == (8, 16, 3)


def write_damaged(path, damage):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(file, "JPEG")
    path.unlink(missing_ok=True)
    if damage == "link":
        path.symlink_to("nowhere.jpg")
    else:
        contents = {"truncated": file.getvalue()[:1500], "empty": b"", "text": b"<html>not found</html>"}
        path.write_bytes(contents[damage])


DAMAGES = {
    "truncated": "image file is truncated",
    "empty": "not in an image format",
    "text": "not in an image format",
    "link": "No such file",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_image_is_named_and_never_replaced(image_folder, damage):
    root = image_folder()
    path = root / "train" / "cat" / "2.jpg"
    (root / "train" / "cat" / "2.png").unlink()
    write_damaged(path, damage)
    dataset = open_dataset("folder", str(root), "train")
    assert [dataset[index][1] for index in (0, 1, 3, 4)] == [0, 0, 0, 1]
    with pytest.raises(DatasetError, match=f"cannot read {path}: .*{DAMAGES[damage]}.*; repair or remove it"):
        dataset[2]


def test_an_image_too_large_to_be_one(image_folder, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    with pytest.raises(DatasetError, match=r"cannot read .*0.png: .*decompression bomb"):
        open_dataset("folder", str(image_folder()), "train")[0]


def test_pil_must_not_fill_up_truncated_images(image_folder, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(DatasetError, match="LOAD_TRUNCATED_IMAGES is True, expected False"):
        open_dataset("folder", str(image_folder()), "train")[0]


class TestVerbs:
    """Each verb that reads images stops with one line that names the file."""

    @pytest.fixture
    def model(self, tmp_path):
        import timm

        import adderkit

        model = timm.create_model("cifar_resnet20", num_classes=2, pretrained_cfg_overlay={"input_size": (3, 12, 12)})
        return adderkit.save(model, tmp_path / "net")

    @pytest.mark.parametrize("workers", [0, 1])
    def test_evaluate(self, fails, image_folder, model, workers):
        root = image_folder()
        write_damaged(root / "validation" / "dog" / "1.png", "truncated")
        words = ("--dataset", "folder", "--data-dir", root, "-b", 3, "-j", workers)
        line = fails("evaluate", _named(model, "cat", "dog"), *words)
        assert line.startswith(f"cannot read {root}/validation/dog/1.png: image file is truncated (")
        assert line.endswith("); repair or remove it")

    @pytest.mark.parametrize("verb", ["convert", "quantize", "prune"])
    def test_calibration(self, adder_kit, image_folder, model, verb):
        root = image_folder()
        write_damaged(root / "train" / "cat" / "3.png", "text")
        words = {"convert": ["convert", "--model", model], "quantize": ["quantize", model],
                 "prune": ["prune", model, "--ratio", 0.3]}[verb]  # fmt: skip
        status, _, errors = adder_kit(*words, "--dataset", "folder", "--data-dir", root, "--output", "out")
        assert status == 1
        assert f"error: cannot read {root}/train/cat/3.png: it is not in an image format" in errors
        assert "Traceback" not in errors

    def test_finetune_and_resume(self, adder_kit, image_folder, model):
        root = image_folder(count=8)
        path = root / "train" / "dog" / "0.png"
        whole = path.read_bytes()
        write_damaged(path, "empty")
        words = ["--dataset", "folder", "--data-dir", root, "-b", 4, "--epochs", 1, "-j", 1, "-o", "run"]
        status, _, errors = adder_kit("finetune", model, "--recipe", "cnn", *words)
        assert status == 1
        assert (
            f"error: cannot read {path}: it is not in an image format that PIL knows; repair or remove it; " in errors
        )
        assert "continue with: adderkit finetune --resume" in errors
        path.write_bytes(whole)
        assert adder_kit("finetune", "--resume", "run")[0] == 0

    def test_report(self, adder_kit, image_folder, model):
        root = image_folder()
        write_damaged(root / "validation" / "cat" / "0.png", "truncated")
        status, _, errors = adder_kit("report", _named(model, "cat", "dog"), "--dataset", "folder", "--data-dir", root)
        assert status == 1
        assert "error: cannot read" in errors
        assert "validation/cat/0.png: image file is truncated" in errors


def _named(folder, *names):
    import adderkit
    from adderkit.convert.class_names import record_class_names_

    model = adderkit.load(folder)
    record_class_names_(model, names)
    return adderkit.save(model, folder)
