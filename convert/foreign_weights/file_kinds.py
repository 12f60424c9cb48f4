"""Recognize files that are not weights of PyTorch by their first bytes, and say what they are and what to do."""

import re
import tarfile
import zipfile
from pathlib import Path
from typing import Literal

from ..errors import CheckpointError

Format = Literal["safetensors", "zip", "legacy"]

_HEAD = 4096
_LEGACY_MAGIC = b"\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"  # the number that torch's old files begin with
_DOWNLOAD = "download or copy it again"
_EXTRACT = "extract it and give the file of weights in it"
_FROM_OTHER = "expected weights of PyTorch; convert it to safetensors with the names of the timm model first"

# First bytes, what the file is, and the remedy.
_SIGNATURES: tuple[tuple[bytes, str, str], ...] = (
    (b"\x1f\x8b", "is gzip-compressed", "decompress it with gunzip, or with tar -xzf if it is an archive"),
    (b"BZh", "is bzip2-compressed", "decompress it with bunzip2"),
    (b"\xfd7zXZ\x00", "is xz-compressed", "decompress it with unxz"),
    (b"\x28\xb5\x2f\xfd", "is Zstandard-compressed", "decompress it with unzstd"),
    (b"7z\xbc\xaf\x27\x1c", "is a 7-Zip archive", _EXTRACT),
    (b"Rar!", "is a RAR archive", _EXTRACT),
    (b"\x89HDF", "is an HDF5 file, as Keras and TensorFlow write it", _FROM_OTHER),
    (b"\x93NUMPY", "is a NumPy array", _FROM_OTHER),
    (b"GGUF", "is a GGUF file", _FROM_OTHER),
    (b"\x89PNG", "is an image", "give the file of weights"),
    (b"\xff\xd8\xff", "is an image", "give the file of weights"),
)
_SUFFIXES: dict[str, str] = {
    ".onnx": "is an ONNX model",
    ".pb": "is a TensorFlow graph",
    ".tflite": "is a TensorFlow Lite model",
    ".ckpt.index": "is the index of a TensorFlow checkpoint",
    ".data-00000-of-00001": "is part of a TensorFlow checkpoint",
    ".ckpt.meta": "is part of a TensorFlow checkpoint",
    ".msgpack": "is a Flax checkpoint",
    ".mlmodel": "is a Core ML model",
}


def format_of(path: Path) -> Format:
    """Return the format of a file of weights by its content, whatever its name ends in.

    Raises:
        CheckpointError: The file is missing, cut off, or something else; the message says what it is.
    """
    if not path.is_file():
        missing = "is a folder" if path.is_dir() else "does not exist"
        raise CheckpointError(f"{path} {missing}; expected a file with weights")
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except OSError as error:
        raise CheckpointError(f"cannot read weights from {path}: {error.strerror or error}") from error
    if not head:
        raise _refusal(path, "is empty", f"the download or the copy failed; {_DOWNLOAD}")
    _refuse_known(path, head)
    if head[8:9] == b"{":
        _check_safetensors_size(path, int.from_bytes(head[:8], "little"))
        return "safetensors"
    if head.startswith(b"PK"):
        _check_zip(path)
        return "zip"
    if head.startswith(b"\x80"):
        if _LEGACY_MAGIC not in head[:16]:
            raise _refusal(
                path,
                "is a plain pickle, which may run code",
                "save its tensors with torch.save or safetensors where it was made",
            )
        return "legacy"
    _refuse_text(path, head)
    if tarfile.is_tarfile(path):
        raise _refusal(
            path, "is a tar archive", f"{_EXTRACT}, or, if PyTorch before 0.4 wrote it, load and save it there"
        )
    raise _refusal(path, f"begins with {head[:8]!r}", f"expected a safetensors or PyTorch file; {_DOWNLOAD}")


def _refusal(path: Path, what: str, remedy: str) -> CheckpointError:
    return CheckpointError(f"cannot read weights from {path}: it {what}; {remedy}")


def _refuse_known(path: Path, head: bytes) -> None:
    if head.startswith(b"version https://git-lfs"):
        size = re.search(rb"^size (\d{1,15})$", head, re.MULTILINE)
        of = f" for a file of {int(size[1]):,} bytes" if size else ""
        raise _refusal(
            path,
            f"is a Git LFS pointer{of}, not the file itself",
            "run git lfs install and git lfs pull in its repository, or download the file",
        )
    for signature, what, remedy in _SIGNATURES:
        if head.startswith(signature):
            raise _refusal(path, what, remedy)
    for suffix, what in _SUFFIXES.items():
        if path.name.lower().endswith(suffix):
            raise _refusal(path, what, _FROM_OTHER)
    if head[4:8] == b"TFL3":
        raise _refusal(path, _SUFFIXES[".tflite"], _FROM_OTHER)
    if head[:1] == b"\x08" and head[2:3] == b"\x12":  # ir_version, then producer_name
        raise _refusal(path, _SUFFIXES[".onnx"], _FROM_OTHER)


def _refuse_text(path: Path, head: bytes) -> None:
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<error", b"<head")):
        raise _refusal(
            path,
            "is a web page that was saved in place of the file",
            "download it by its direct link: /resolve/ in place of /blob/ on the Hugging Face Hub, /raw/ on GitHub",
        )
    if start.startswith((b"{", b"[")):
        raise _refusal(path, "is JSON", "give the file of weights")
    try:
        head[:256].decode("utf-8")
    except UnicodeDecodeError:
        return
    if b"\x00" not in head:
        line = " ".join(head[:60].decode("utf-8", "replace").split())
        raise _refusal(
            path, f"is text that begins with {line!r}", f"expected a safetensors or PyTorch file; {_DOWNLOAD}"
        )


def _check_safetensors_size(path: Path, header: int) -> None:
    """Refuse a file that ends within its header; safetensors itself checks that the data is complete."""
    size = path.stat().st_size
    if header + 8 > size:
        raise _refusal(path, f"ends after {size:,} bytes, within the header of a safetensors file", _DOWNLOAD)


def _check_zip(path: Path) -> None:
    """Refuse ZIP archives that PyTorch's ``torch.save`` did not write, and those without an end."""
    if not zipfile.is_zipfile(path):
        raise _refusal(
            path, f"ends after {path.stat().st_size:,} bytes, before the index of a PyTorch archive", _DOWNLOAD
        )
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, NotImplementedError, ValueError) as error:
        raise _refusal(path, f"is a damaged archive ({error})", _DOWNLOAD) from error
    names = [entry.filename for entry in entries]
    inside = {name.partition("/")[2] for name in names}
    if "data.pkl" in inside:
        if "constants.pkl" in inside:
            raise _refusal(
                path,
                "is a TorchScript program",
                'extract its weights: python -c "import torch; torch.save('
                f"torch.jit.load({str(path)!r}, map_location='cpu').state_dict(), 'weights.pth')\"",
            )
        unpacked = sum(entry.file_size for entry in entries)
        if unpacked > path.stat().st_size:
            raise CheckpointError(f"{path} would unpack to {unpacked} bytes, expected tensors stored as they are")
        return
    if names and all(name.endswith(".npy") for name in names):
        raise _refusal(path, "is a NumPy archive", _FROM_OTHER)
    if any(name.endswith("model.weights.h5") for name in names):
        raise _refusal(path, "is a Keras model", _FROM_OTHER)
    if path.suffix == ".pt2" or "archive_format" in inside:
        raise _refusal(path, "is a program of torch.export", "give the weights that it was exported from")
    raise _refusal(path, "is a ZIP archive that torch.save did not write", _EXTRACT)
