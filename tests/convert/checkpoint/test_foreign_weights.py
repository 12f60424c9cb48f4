"""Files of weights: tensors or one clear line, and never a pickle that runs."""

import pickle
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from adderkit.convert.checkpoint.foreign_weights import state_dict_from
from adderkit.convert.errors import CheckpointError

TENSORS = {"a.weight": torch.arange(3.0), "b": torch.ones(2, 2)}


class Malicious:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    "content",
    [
        TENSORS,
        {"state_dict": TENSORS},
        {"model": TENSORS},
        {"state_dict": {"b": torch.zeros(1)}, "state_dict_ema": TENSORS},
        {"epoch": 3, "state_dict": {f"module.{key}": value for key, value in TENSORS.items()}},
    ],
    ids=["plain", "state_dict", "model", "ema-first", "module-prefix"],
)
def test_pytorch_file(tmp_path, content):
    torch.save(content, tmp_path / "weights.pth")
    state = state_dict_from(tmp_path / "weights.pth")
    assert set(state) == set(TENSORS)
    assert all(torch.equal(state[key], TENSORS[key]) for key in TENSORS)


def test_safetensors_file(tmp_path):
    save_file(TENSORS, tmp_path / "weights.safetensors")
    state = state_dict_from(str(tmp_path / "weights.safetensors"))
    assert set(state) == set(TENSORS)
    assert all(torch.equal(state[key], TENSORS[key]) for key in TENSORS)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
@pytest.mark.parametrize("wrap", [lambda evil: {"a": evil}, lambda evil: evil], ids=["inside", "itself"])
@pytest.mark.parametrize(
    "write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))], ids=["torch", "pickle"]
)
def test_pickled_objects_are_refused_and_not_run(tmp_path, wrap, write):
    write(wrap(Malicious(tmp_path / "pwned")), tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=r"cannot read weights.*tensors only"):
        state_dict_from(tmp_path / "weights.pth")
    assert not (tmp_path / "pwned").exists()


def test_pickled_module_is_refused_with_a_command_that_extracts_its_weights(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "whole.pth", _use_new_zipfile_serialization=False)  # as in 2020
    with pytest.raises(CheckpointError, match="it holds pickled objects, which may run code") as caught:
        state_dict_from(tmp_path / "whole.pth")
    words = shlex.split(str(caught.value).split("is installed: ")[1])
    subprocess.run([sys.executable, *words[1:]], cwd=tmp_path, check=True)
    assert set(state_dict_from(tmp_path / "state.pth")) == {"weight", "bias"}


def test_old_form_of_pytorch_files(tmp_path):
    torch.save(TENSORS, tmp_path / "weights.pth", _use_new_zipfile_serialization=False)
    assert set(state_dict_from(tmp_path / "weights.pth")) == set(TENSORS)


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(1).expand(1 << 40), torch.zeros(1).expand(1 << 12, 1 << 12)],
    ids=["terabytes", "megabytes"],
)
def test_shape_that_the_file_cannot_fill(tmp_path, tensor):
    torch.save({"a": tensor}, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=r"a has shape .* more than its \d+ bytes can fill"):
        state_dict_from(tmp_path / "weights.pth")


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants:UserWarning")
@pytest.mark.parametrize("tensor", [torch.eye(2).to_sparse(), torch.zeros(2, device="meta")], ids=["sparse", "meta"])
def test_tensors_of_another_kind(tmp_path, tensor):
    torch.save({"a": tensor}, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=r"a is not a plain tensor|cannot read weights"):
        state_dict_from(tmp_path / "weights.pth")


def test_archive_that_unpacks_to_more_than_it_is(tmp_path):
    torch.save({"a": torch.zeros(1 << 20)}, tmp_path / "plain.pth")
    with zipfile.ZipFile(tmp_path / "plain.pth") as plain, zipfile.ZipFile(tmp_path / "bomb.pth", "w") as bomb:
        for entry in plain.infolist():
            bomb.writestr(entry.filename, plain.read(entry), zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match=r"would unpack to \d{7} bytes"):
        state_dict_from(tmp_path / "bomb.pth")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("weights.safetensors", b"short", "cannot read weights"),
        ("weights.pth", b"short", "cannot read weights"),
        ("weights.pth", b"", "cannot read weights"),
    ],
    ids=["safetensors", "pth", "empty"],
)
def test_damaged_file(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        state_dict_from(tmp_path / name)


@pytest.mark.parametrize(
    "content",
    [[torch.ones(1)], {"a": 1}, torch.ones(1), {"state_dict": {"a": "b"}}],
    ids=["list", "number", "tensor", "string"],
)
def test_file_without_a_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match="does not hold a state dict"):
        state_dict_from(tmp_path / "weights.pth")


@pytest.mark.filterwarnings("error")
def test_what_is_no_file_of_weights_is_told_in_words(tmp_path):
    with pytest.raises(CheckpointError, match=r"weights\.pth does not exist"):
        state_dict_from(tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match="is a folder; expected a file with weights"):
        state_dict_from(tmp_path)
    (tmp_path / "text.pth").write_text("hello")  # 'e' is no opcode of pickles
    with pytest.raises(CheckpointError, match=r"cannot read weights from .*: KeyError; expected safetensors"):
        state_dict_from(tmp_path / "text.pth")
    (tmp_path / "raw.pth").write_bytes(pickle.dumps({"a": 1}, protocol=4))  # torch warns of its protocol
    with pytest.raises(CheckpointError):
        state_dict_from(tmp_path / "raw.pth")
