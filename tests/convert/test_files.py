"""Files that are whole or not there, and JSON that somebody else may have written."""

import hashlib
import json
import os
from pathlib import Path

import pytest

from adderkit.convert.errors import CheckpointError
from adderkit.convert.files import (
    atomic_path,
    read_json_object,
    recover_folder,
    replace_folder,
    sha256,
    write_json,
    write_text,
)


@pytest.fixture(params=[0o022, 0o077], ids=["umask022", "umask077"])
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# One file


def test_new_file_takes_the_place_of_the_old(tmp_path):
    target = tmp_path / "file"
    target.write_text("old")
    with atomic_path(target) as temporary:
        temporary.write_text("new")
        assert target.read_text() == "old"
        assert temporary.parent == tmp_path
    assert target.read_text() == "new"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_old_file_stays_after_an_error(tmp_path, error):
    def interrupted():
        with atomic_path(tmp_path / "file") as temporary:
            temporary.write_text("half")
            raise error

    (tmp_path / "file").write_text("old")
    with pytest.raises(error):
        interrupted()
    assert (tmp_path / "file").read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_missing_folders_are_made(tmp_path):
    write_text(tmp_path / "a" / "b" / "file", "text")
    assert (tmp_path / "a" / "b" / "file").read_text() == "text"


def test_file_honours_the_umask(tmp_path, umask):
    write_text(tmp_path / "file", "text")
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~umask
    assert os.umask(umask) == umask


def test_text_is_utf8(tmp_path):
    write_text(tmp_path / "file", "Σ|x - w|")
    assert (tmp_path / "file").read_bytes() == "Σ|x - w|".encode()


def test_json_round_trip(tmp_path):
    value = {"a": [1, 2.5, None, True], "b": {"c": "Σ"}}
    write_json(tmp_path / "file.json", value)
    assert read_json_object(tmp_path / "file.json") == value
    assert (tmp_path / "file.json").read_text().endswith("}\n")


def test_value_that_json_cannot_say_leaves_the_old_file(tmp_path):
    write_json(tmp_path / "file.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "file.json", {"a": object()})
    assert json.loads((tmp_path / "file.json").read_text()) == {"a": 1}
    assert names(tmp_path) == ["file.json"]


# A folder


def folder_with(path, name):
    path.mkdir()
    (path / name).write_text(name)
    return path


def test_new_folder(tmp_path):
    replace_folder(tmp_path / "folder", folder_with(tmp_path / "fresh", "new"))
    assert names(tmp_path) == ["folder"]
    assert names(tmp_path / "folder") == ["new"]


def test_new_folder_takes_the_place_of_the_old(tmp_path):
    target, fresh = folder_with(tmp_path / "folder", "old"), folder_with(tmp_path / "fresh", "new")
    replace_folder(target, fresh)
    assert names(tmp_path) == ["folder"]
    assert names(target) == ["new"]


def test_old_folder_stays_where_there_is_no_new_one(tmp_path):
    target = folder_with(tmp_path / "folder", "old")
    with pytest.raises(FileNotFoundError):
        replace_folder(target, tmp_path / "missing")
    recover_folder(target)
    assert names(tmp_path) == ["folder"]
    assert names(target) == ["old"]


def test_old_folder_comes_back_after_a_kill_between_the_renames(tmp_path, monkeypatch):
    target, fresh = folder_with(tmp_path / "folder", "old"), folder_with(tmp_path / "fresh", "new")
    rename = Path.rename

    def killed(self, to):
        if self == fresh:
            raise KeyboardInterrupt
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        replace_folder(target, fresh)
    monkeypatch.undo()
    recover_folder(target)
    assert names(target) == ["old"]
    replace_folder(target, fresh)
    assert names(tmp_path) == ["folder"]
    assert names(target) == ["new"]


def test_recovering_a_whole_folder_changes_nothing(tmp_path):
    target = folder_with(tmp_path / "folder", "new")
    folder_with(tmp_path / ".folder.old", "old")
    recover_folder(target)
    recover_folder(tmp_path / "elsewhere")
    assert names(target) == ["new"]
    assert not (tmp_path / "elsewhere").exists()


# Reading


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not valid JSON"),
        (b"", "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[1]", "holds a list, expected a JSON object"),
        (b'"text"', "holds a str, expected a JSON object"),
        (b"null", "holds a NoneType, expected a JSON object"),
    ],
    ids=["half", "empty", "not-utf8", "too-deep", "list", "string", "null"],
)
def test_content_that_is_no_json_object(tmp_path, content, message):
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_json_object(path)
    assert str(path) in str(caught.value)


def test_file_that_is_missing_or_a_folder(tmp_path):
    for path in (tmp_path / "file.json", tmp_path):
        with pytest.raises(CheckpointError, match="does not exist"):
            read_json_object(path)


def test_file_that_is_too_large(tmp_path):
    path = tmp_path / "file.json"
    path.write_text('{"a": 1}')
    assert read_json_object(path, limit=8) == {"a": 1}
    with pytest.raises(CheckpointError, match="has 8 bytes, expected at most 7"):
        read_json_object(path, limit=7)


@pytest.mark.parametrize("size", [0, 1, (1 << 20) + 1])
def test_sha256(tmp_path, size):
    content = os.urandom(size)
    (tmp_path / "file").write_bytes(content)
    assert sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()
