"""PyTorch's files: what training scripts save beside the weights is passed over, anything else is refused unread."""

import argparse
import collections
import datetime
import io
import pathlib
import pickle
import sys
import types
import zipfile

import numpy as np
import pytest
import torch
from timm.utils import CheckpointSaver, ModelEmaV3

from adderkit.convert.errors import CheckpointError
from adderkit.convert.foreign_weights import pickles
from adderkit.convert.foreign_weights.read import read_weights

TENSORS = {"a.weight": torch.arange(3.0), "b": torch.ones(2, 2)}


def equal(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


# What is read


def test_checkpoint_of_timm_train(tmp_path):
    """As timm's ``train.py`` writes it: arguments, optimizer, scaler, averaged weights, metric."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    average = ModelEmaV3(model, decay=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    scaler = types.SimpleNamespace(state_dict_key="amp_scaler", state_dict=lambda: {"scale": 65536.0, "_growth": 7})
    args = argparse.Namespace(model="resnet18", data_dir=pathlib.Path("data"), opt_betas=None, lr=0.1)
    saver = CheckpointSaver(model, optimizer, args, average, scaler, checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(3, metric=np.float64(71.5))
    for name in ("model_best.pth.tar", "last.pth.tar", "checkpoint-3.pth.tar"):
        read = read_weights(tmp_path / name)
        assert equal(read.tensors, average.module.state_dict())
        assert not equal(read.tensors, model.state_dict())
        assert (read.container, read.others) == ("state_dict_ema", ("state_dict",))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    "record",
    [
        argparse.Namespace(lr=0.1, path=pathlib.Path("x")),
        types.SimpleNamespace(a=1),
        pathlib.PurePosixPath("/data"),
        np.float32(0.5),
        np.arange(4),
        np.dtype("float16"),
        datetime.datetime(2024, 1, 2, tzinfo=datetime.timezone.utc),
        collections.defaultdict(list, {"a": [1]}),
        collections.Counter([1, 1, 2]),
        torch.float16,
        torch.Size([1, 2]),
        torch.device("cuda:0"),
        torch.get_rng_state(),
        {"betas": (0.9, 0.999), "big": 2**70, "names": {"a", "b"}, "bytes": b"abc\xff", "none": None},
    ],
    ids=lambda record: type(record).__name__,
)
def test_records_beside_the_weights(tmp_path, record, zipped):
    path = tmp_path / "weights.pth"
    torch.save({"record": record, "state_dict": TENSORS}, path, _use_new_zipfile_serialization=zipped)
    assert equal(read_weights(path).tensors, TENSORS)


def test_records_of_lightning_without_lightning(tmp_path, monkeypatch):
    module = types.ModuleType("lightning.fabric.utilities.data")
    module.AttributeDict = type("AttributeDict", (dict,), {"__module__": module.__name__})
    for name in ("lightning", "lightning.fabric", "lightning.fabric.utilities", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    content = {"hyper_parameters": module.AttributeDict(lr=0.1), "state_dict": TENSORS, "loops": {"fit": {"n": 3}}}
    torch.save(content, tmp_path / "last.ckpt")
    monkeypatch.undo()
    assert equal(read_weights(tmp_path / "last.ckpt").tensors, TENSORS)


def test_float8_and_parameters(tmp_path):
    tensors = {"a": torch.nn.Parameter(torch.ones(3)), "b": torch.ones(2).to(torch.float8_e4m3fn)}
    torch.save(tensors, tmp_path / "weights.pth")
    read = read_weights(tmp_path / "weights.pth").tensors
    assert torch.equal(read["a"], torch.ones(3))
    assert torch.equal(read["b"].float(), torch.ones(2))
    assert not read["a"].requires_grad


# What is refused


class Config:
    """Stands for a class of somebody's code."""


@pytest.mark.parametrize("place", ["config", "model"])
def test_other_objects_are_named(tmp_path, place):
    torch.save({"state_dict": TENSORS, place: Config()}, tmp_path / "weights.pth")
    with pytest.raises(
        CheckpointError, match=rf"expected tensors only; found {__name__}\.Config\. If you trust it"
    ) as caught:
        read_weights(tmp_path / "weights.pth")
    assert "\n" not in str(caught.value)


def archive(path, pickled):
    """Put a pickle into the place of that of a real file."""
    torch.save(TENSORS, path)
    with zipfile.ZipFile(path) as real:
        entries = {entry.filename: real.read(entry) for entry in real.infolist()}
    with zipfile.ZipFile(path, "w") as changed:
        for name, content in entries.items():
            changed.writestr(name, pickled if name.endswith("data.pkl") else content)


def call(name, *arguments):
    """A pickle of protocol 2 that calls a global with numbers, strings or other pickles."""
    parts = [each if isinstance(each, bytes) else pickle.dumps(each, 2)[2:-1] for each in arguments]
    return b"c" + name.replace(" ", "\n").encode() + b"\n(" + b"".join(parts) + b"tR"


def nested(depth):
    """Bytes that double with each of many calls."""
    inner = call("_codecs encode", "x" * 8, "latin1")
    for _ in range(depth):
        inner = call("_codecs encode", inner, "hex")
    return inner


@pytest.mark.parametrize(
    "evil",
    [
        call("__builtin__ bytearray", 2**31 - 1),
        call("builtins bytearray", 2**31 - 1),
        call("torch.storage UntypedStorage", 2**31 - 1),
        call("torch FloatTensor", 2**31 - 1),
        call("torch Tensor", 2**31 - 1),
        nested(40),
        call("torch._utils _rebuild_qtensor", 1),
        call("os system", "true"),
        call("builtins eval", "1"),
    ],
    ids=["bytearray", "bytearray-3", "storage", "float-tensor", "tensor", "encode", "qtensor", "system", "eval"],
)
def test_calls_that_fill_the_memory_or_run_code_are_refused_before_anything_is_read(tmp_path, monkeypatch, evil):
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("the file was unpickled"))
    pickled = b"\x80\x02}(X\x05\x00\x00\x00state" + evil + b"u."
    archive(tmp_path / "weights.pth", pickled)
    with pytest.raises(CheckpointError, match="it holds pickled objects, which may run code, expected tensors only"):
        read_weights(tmp_path / "weights.pth")
    header = torch_legacy_header()
    (tmp_path / "old.pth").write_bytes(header + pickled)
    with pytest.raises(CheckpointError):
        read_weights(tmp_path / "old.pth")


def torch_legacy_header():
    """The three pickles before the object in torch's old form."""
    buffer = io.BytesIO()
    torch.save(TENSORS, buffer, _use_new_zipfile_serialization=False)
    return b"".join(part + b"." for part in buffer.getvalue().split(b".", 3)[:3])


def test_bytes_repeated_through_the_memo(tmp_path):
    text = "x" * 5000
    encode = b"c_codecs\nencode\nq\x00" + pickle.dumps(text, 2)[2:-1] + b"X\x06\x00\x00\x00latin1\x86q\x07R0"
    pickled = b"\x80\x02" + encode + b"h\x00h\x07R0" * 1000 + b"}."
    archive(tmp_path / "weights.pth", pickled)
    with pytest.raises(CheckpointError):
        read_weights(tmp_path / "weights.pth")


def test_large_pickle(tmp_path, monkeypatch):
    monkeypatch.setattr(pickles, "_MAX_BYTES", 1000)
    torch.save({"state_dict": TENSORS, "note": "x" * 2000}, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match="more than 1,000 bytes besides tensors; save only the state dict"):
        read_weights(tmp_path / "weights.pth")
