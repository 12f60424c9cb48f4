"""Files of weights: tensors or one clear line, and never a pickle that runs."""

import json
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

from adderkit.convert.errors import CheckpointError
from adderkit.convert.foreign_weights.read import read_weights

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
    ],
    ids=["plain", "state_dict", "model", "ema-first"],
)
def test_pytorch_file(tmp_path, content):
    torch.save(content, tmp_path / "weights.pth")
    state = read_weights(tmp_path / "weights.pth").tensors
    assert set(state) == set(TENSORS)
    assert all(torch.equal(state[key], TENSORS[key]) for key in TENSORS)


def test_safetensors_file(tmp_path):
    save_file(TENSORS, tmp_path / "weights.safetensors")
    state = read_weights(str(tmp_path / "weights.safetensors")).tensors
    assert set(state) == set(TENSORS)
    assert all(torch.equal(state[key], TENSORS[key]) for key in TENSORS)


@pytest.mark.parametrize("wrap", [lambda evil: {"a": evil}, lambda evil: evil], ids=["inside", "itself"])
@pytest.mark.parametrize(
    "write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))], ids=["torch", "pickle"]
)
def test_pickled_objects_are_refused_and_not_run(tmp_path, wrap, write):
    write(wrap(Malicious(tmp_path / "pwned")), tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=r"cannot read weights.*may run code"):
        read_weights(tmp_path / "weights.pth")
    assert not (tmp_path / "pwned").exists()


def test_pickled_module_is_refused_with_a_command_that_extracts_its_weights(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "whole.pth", _use_new_zipfile_serialization=False)  # as in 2020
    with pytest.raises(CheckpointError, match="it holds pickled objects, which may run code") as caught:
        read_weights(tmp_path / "whole.pth")
    words = shlex.split(str(caught.value).split("is installed: ")[1])
    subprocess.run([sys.executable, *words[1:]], cwd=tmp_path, check=True)
    assert set(read_weights(tmp_path / "weights.pth").tensors) == {"weight", "bias"}


def test_old_form_of_pytorch_files(tmp_path):
    torch.save(TENSORS, tmp_path / "weights.pth", _use_new_zipfile_serialization=False)
    assert set(read_weights(tmp_path / "weights.pth").tensors) == set(TENSORS)


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(1).expand(1 << 40), torch.zeros(1).expand(1 << 12, 1 << 12)],
    ids=["terabytes", "megabytes"],
)
def test_shape_that_the_file_cannot_fill(tmp_path, tensor):
    torch.save({"a": tensor}, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=r"a has shape .* more than its \d+ bytes can fill"):
        read_weights(tmp_path / "weights.pth")


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants:UserWarning")
@pytest.mark.parametrize("tensor", [torch.eye(2).to_sparse(), torch.zeros(2, device="meta")], ids=["sparse", "meta"])
def test_tensors_of_another_kind(tmp_path, tensor):
    torch.save({"a": tensor}, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=r"a is not a plain tensor|cannot read weights"):
        read_weights(tmp_path / "weights.pth")


def test_archive_that_unpacks_to_more_than_it_is(tmp_path):
    torch.save({"a": torch.zeros(1 << 20)}, tmp_path / "plain.pth")
    with zipfile.ZipFile(tmp_path / "plain.pth") as plain, zipfile.ZipFile(tmp_path / "bomb.pth", "w") as bomb:
        for entry in plain.infolist():
            bomb.writestr(entry.filename, plain.read(entry), zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match=r"would unpack to \d{7} bytes"):
        read_weights(tmp_path / "bomb.pth")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("weights.safetensors", b"short", "cannot read weights"),
        ("weights.pth", b"short", "it is text that begins with 'short'"),
        ("weights.pth", b"", "it is empty"),
    ],
    ids=["safetensors", "pth", "empty"],
)
def test_damaged_file(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_weights(tmp_path / name)


@pytest.mark.parametrize(
    "content",
    [[torch.ones(1)], {"a": 1}, torch.ones(1), {"state_dict": {"a": "b"}}],
    ids=["list", "number", "tensor", "string"],
)
def test_file_without_a_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match="does not hold a state dict"):
        read_weights(tmp_path / "weights.pth")


@pytest.mark.filterwarnings("error")
def test_what_is_no_file_of_weights_is_told_in_words(tmp_path):
    with pytest.raises(CheckpointError, match=r"weights\.pth does not exist"):
        read_weights(tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match="holds no weights, expected a folder saved by adderkit or timm"):
        read_weights(tmp_path)


# Folders


def test_folder_of_accelerate(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    torch.save({"state": {}}, tmp_path / "optimizer.bin")
    assert read_weights(tmp_path).tensors.keys() == TENSORS.keys()


def test_weights_in_several_files(tmp_path):
    for number, (key, value) in enumerate(TENSORS.items()):
        save_file({key: value}, tmp_path / f"model-{number}.safetensors")
    index = {"weight_map": {key: f"model-{number}.safetensors" for number, key in enumerate(TENSORS)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    for path in (tmp_path, tmp_path / "model.safetensors.index.json"):
        state = read_weights(path).tensors
        assert state.keys() == TENSORS.keys()
        assert all(torch.equal(state[key], TENSORS[key]) for key in TENSORS)


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ({"a.weight": "../other.safetensors"}, "expected a file in the same folder"),
        ({"a.weight": "lost.safetensors"}, r"lost\.safetensors does not exist"),
        ({"c": "one.safetensors"}, "c is in .* but in none of its files"),
        ([], "has no weight_map"),
    ],
    ids=["outside", "lost", "incomplete", "list"],
)
def test_index_that_does_not_fit(tmp_path, places, message):
    save_file(TENSORS, tmp_path / "one.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(CheckpointError, match=message):
        read_weights(tmp_path)


def test_folder_with_several_files_names_them(tmp_path):
    for name in ("last.pth.tar", "model_best.pth.tar"):
        torch.save(TENSORS, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"several files of weights, last\.pth\.tar, model_best\.pth\.tar"):
        read_weights(tmp_path)
    (tmp_path / "last.pth.tar").unlink()
    assert read_weights(tmp_path).path == tmp_path / "model_best.pth.tar"


def test_distributed_checkpoint_names_the_command_that_merges_it(tmp_path):
    (tmp_path / "pytorch_model_fsdp_0").mkdir()
    (tmp_path / "pytorch_model_fsdp_0" / "__0_0.distcp").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="accelerate merge-weights"):
        read_weights(tmp_path)
