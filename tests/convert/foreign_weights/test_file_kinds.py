"""Files that are not weights are called what they are, with a remedy, whatever their name ends in."""

import gzip
import io
import pickle
import tarfile
import warnings
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save

from adderkit.convert.errors import CheckpointError
from adderkit.convert.foreign_weights.file_kinds import format_of
from adderkit.convert.foreign_weights.read import read_weights

TENSORS = {"a": torch.arange(3000.0)}


def torch_bytes(value=TENSORS, **options):
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def zip_bytes(*names):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, b"x")
    return buffer.getvalue()


def tar_bytes():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("net.pth"))
    return buffer.getvalue()


def npz_bytes():
    buffer = io.BytesIO()
    np.savez(buffer, a=np.ones(3))
    return buffer.getvalue()


def script_bytes():
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates what users have
        torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), buffer)
    return buffer.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 102530333\n"
HTML = b"\n<!DOCTYPE html>\n<html><body>Not Found</body></html>"
S3 = b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>AccessDenied</Code></Error>'

OTHERS = {
    "empty": (b"", "is empty; the download or the copy failed"),
    "lfs": (LFS, "Git LFS pointer for a file of 102,530,333 bytes.*git lfs pull"),
    "html": (HTML, "web page.*/resolve/ in place of /blob/"),
    "s3": (S3, "web page"),
    "json": (b'{"error": "not found"}', "is JSON"),
    "text": (b"404: Not Found\n", "is text that begins with '404: Not Found'"),
    "gzip": (gzip.compress(b"x"), "gzip-compressed; decompress it with gunzip"),
    "tar": (tar_bytes(), "is a tar archive; extract it"),
    "zip": (zip_bytes("readme.txt", "net.pth"), "ZIP archive that torch.save did not write; extract it"),
    "npz": (npz_bytes(), "is a NumPy archive"),
    "npy": (b"\x93NUMPY\x01\x00", "is a NumPy array"),
    "keras": (zip_bytes("config.json", "model.weights.h5"), "is a Keras model"),
    "hdf5": (b"\x89HDF\r\n\x1a\n", "HDF5 file, as Keras and TensorFlow write it"),
    "onnx": (b"\x08\x08\x12\x07pytorch\x1a\x05", "is an ONNX model"),
    "tflite": (b"\x1c\x00\x00\x00TFL3", "TensorFlow Lite model"),
    "exported": (zip_bytes("net/archive_format", "net/data"), r"program of torch\.export"),
    "torchscript": (script_bytes(), r"TorchScript program.*torch\.jit\.load"),
    "pickle": (pickle.dumps({"a": np.ones(3)}, 2), "plain pickle, which may run code"),
    "cut-zip": (torch_bytes()[:9000], "ends after 9,000 bytes, before the index of a PyTorch archive"),
    "cut-old": (torch_bytes(_use_new_zipfile_serialization=False)[:9000], "cut off or damaged"),
    "cut-old-early": (torch_bytes(_use_new_zipfile_serialization=False)[:200], "cut off or damaged"),
    "cut-safetensors": (save(TENSORS)[:40], "ends after 40 bytes, within the header of a safetensors file"),
    "cut-safetensors-late": (save(TENSORS)[:9000], "not a complete safetensors file"),
    "noise": (bytes([1, 2, 3, 0, 200, 201, 255, 7]) * 99, "begins with b"),
}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kind", OTHERS)
def test_other_files_are_called_what_they_are(tmp_path, kind, suffix):
    content, message = OTHERS[kind]
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_weights(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["variables.data-00000-of-00001", "saved_model.pb", "net.onnx", "flax_model.msgpack"])
def test_files_that_are_known_by_their_names(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x00\x01\x02\x03" * 9)
    with pytest.raises(CheckpointError, match="expected weights of PyTorch"):
        read_weights(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (save(TENSORS), "safetensors"),
        (torch_bytes(), "zip"),
        (torch_bytes(_use_new_zipfile_serialization=False), "legacy"),
    ],
    ids=["safetensors", "zip", "legacy"],
)
@pytest.mark.parametrize("name", ["model.safetensors", "last.pth.tar", "pytorch_model.bin", "weights"])
def test_format_is_that_of_the_content(tmp_path, content, kind, name):
    (tmp_path / name).write_bytes(content)
    assert format_of(tmp_path / name) == kind
    assert torch.equal(read_weights(tmp_path / name).tensors["a"], TENSORS["a"])
