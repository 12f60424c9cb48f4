"""Class folders: numbered as timm numbers them; stray files are left out, and what is unclear is refused."""

import os
import unicodedata

import pytest
from PIL import Image
from timm.data.readers.reader_image_folder import ReaderImageFolder

from adderkit.convert.errors import DatasetError
from adderkit.recipes.data.class_folders import ClassFolders
from adderkit.recipes.data.splits import find_split_folder


def write(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (2, 2)).save(path, "PNG")


@pytest.fixture
def split(tmp_path):
    for name in ("10/b.png", "10/a.JPG", "2/x.jpeg", "Zebra/2.png", "Zebra/10.png", "ant/1.PNG"):
        write(tmp_path / name)
    return tmp_path


def test_order_is_timm_s(split):
    reader, expected = ClassFolders(split), ReaderImageFolder(str(split))
    assert list(reader.class_to_idx) == ["2", "10", "ant", "Zebra"]
    assert reader.class_to_idx == expected.class_to_idx
    assert reader.samples == expected.samples
    assert [reader.filename(index) for index in range(6)] == [expected.filename(index) for index in range(6)]


def test_hidden_and_system_files_are_no_images(split, caplog):
    before = ClassFolders(split).samples
    for name in (".ipynb_checkpoints/a.png", "ant/.ipynb_checkpoints/1.png", "ant/._1.png", "__MACOSX/ant/1.png",
                 "@eaDir/1.png", ".hidden.png"):  # fmt: skip
        write(split / name)
    for name in (".DS_Store", "ant/.DS_Store", "Thumbs.db", "ant/Thumbs.db", "ant/desktop.ini"):
        (split / name).write_bytes(b"x")
    assert ClassFolders(split).samples == before
    assert caplog.messages == []


def test_more_formats_than_timm_reads(split):
    Image.new("RGB", (2, 2)).save(split / "ant" / "2.webp")
    Image.new("RGB", (2, 2)).save(split / "ant" / "3.bmp")
    assert len(ClassFolders(split)) == 8


def test_images_that_are_not_read_are_counted(split, caplog):
    for name in ("a.HEIC", "b.heic", "c.gif"):
        (split / "ant" / name).write_bytes(b"x")
    assert len(ClassFolders(split)) == 6
    assert "left out 1 .gif, 2 .heic; images are read from .png" in caplog.text


def test_nested_class_folders(tmp_path, caplog):
    for name in ("animals/cat/1.png", "plants/oak/1.png"):
        write(tmp_path / name)
    assert ClassFolders(tmp_path).class_to_idx == ReaderImageFolder(str(tmp_path)).class_to_idx == {"cat": 0, "oak": 1}
    assert "the innermost ones name the classes" in caplog.text


def test_links_are_followed(split, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    write(elsewhere / "1.png")
    (split / "linked").symlink_to(elsewhere)
    assert ClassFolders(split).class_to_idx["linked"] == 3


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a/1.png", "empty/"], "class folder .*/empty has no images"),
        (["a/1.png", "1.png"], "/1.png is next to the class folders"),
        (["a/1.png", "a/b/2.png"], "/a has images as well as a class folder, .*/a/b"),
        (["a/images/1.png", "b/images/1.png"], "a/images and .*/b/images have the same name"),
        (["cat/1.png", "Cat/1.png"], "have the same name, ignoring case"),
        ([unicodedata.normalize(form, "é") + "/1.png" for form in ("NFC", "NFD")], "have the same name"),
        (["a/notes.txt/"], "has 0 images"),
    ],
    ids=["empty", "beside", "above", "merged", "case", "accents", "none"],
)
def test_unclear_folders_are_refused(tmp_path, names, message):
    for name in names:
        (tmp_path / name).mkdir(parents=True) if name.endswith("/") else write(tmp_path / name)
    with pytest.raises(DatasetError, match=message):
        ClassFolders(tmp_path)


def test_a_link_to_a_folder_above(split):
    (split / "ant" / "again").symlink_to(split)
    with pytest.raises(DatasetError, match="is a link to a folder that contains it"):
        ClassFolders(split)


def test_a_folder_that_cannot_be_listed(split, monkeypatch):
    scandir = os.scandir

    def refusing(path):
        if str(path).endswith("Zebra"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(DatasetError, match=r"cannot list .*/Zebra: Permission denied"):
        ClassFolders(split)


def test_accents_are_composed(tmp_path):
    write(tmp_path / unicodedata.normalize("NFD", "café") / "1.png")
    assert list(ClassFolders(tmp_path).class_to_idx) == [unicodedata.normalize("NFC", "café")]


class TestSplits:
    @pytest.mark.parametrize(
        ("folders", "split", "expected"),
        [
            (("train", "test"), "validation", "test"),
            (("train", "test", "val"), "validation", "val"),
            (("train", "validation", "val"), "val", "val"),
            (("training", "eval"), "train", "training"),
            (("train", "holdout"), "holdout", "holdout"),
        ],
    )
    def test_found(self, tmp_path, folders, split, expected):
        for folder in folders:
            (tmp_path / folder).mkdir()
        assert find_split_folder(str(tmp_path), split) == tmp_path / expected

    def test_the_stand_in_is_named(self, tmp_path, caplog):
        (tmp_path / "test").mkdir()
        find_split_folder(str(tmp_path), "validation")
        assert "no 'validation' split; using 'test', as --val-split test does" in caplog.text

    @pytest.mark.parametrize("split", ["train", "test"])
    def test_no_other_stands_in(self, tmp_path, split):
        (tmp_path / "validation").mkdir()
        with pytest.raises(DatasetError, match=f"no split '{split}': .*found validation; .*--train-split"):
            find_split_folder(str(tmp_path), split)
