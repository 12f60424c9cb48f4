"""Files of weights as somebody else may have written them: safetensors, PyTorch's two forms, AdderNet's checkpoints."""

import json
import pickle
import zipfile
from os import environ, system
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from adderkit.convert.errors import CheckpointError
from adderkit.convert.foreign_weights.read import read_weights
from adderkit.convert.import_addernet import import_checkpoint
from adderkit.convert.model_source import ModelSource

fuzz = settings.get_profile(environ.get("ADDERKIT_FUZZ", "quick"))

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.int64)}
SIZES = st.integers(-1, 3) | st.sampled_from([2**16, 2**31, 2**40, 2**62, 2**64])
DTYPES = st.sampled_from(["F32", "F64", "I64", "BOOL", "F16", "BF16", "F8_E4M3", "F4", "C64", "X"])
HEADERS = st.dictionaries(
    st.text(max_size=5),
    st.fixed_dictionaries(
        {"dtype": DTYPES, "shape": st.lists(SIZES, max_size=4), "data_offsets": st.lists(SIZES, min_size=1, max_size=3)}
    )
    | st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2),
    max_size=3,
)


def torch_file(path, zipped):
    torch.save({"state_dict": TENSORS}, path, _use_new_zipfile_serialization=zipped)
    return path.read_bytes()


def is_state(found):
    return found is None or all(isinstance(found[key], torch.Tensor) for key in found)


@fuzz
@given(data=st.data())
def test_damaged_safetensors(data, damaged, place, survives):
    (place / "net.safetensors").write_bytes(data.draw(damaged(save(TENSORS, {"adderkit": "{}"}))))
    assert is_state(survives(lambda: read_weights(place / "net.safetensors").tensors))


@fuzz
@given(header=HEADERS, content=st.binary(max_size=32), length=st.none() | SIZES.filter(lambda size: 0 <= size < 2**64))
def test_safetensors_of_any_header(header, content, length, place, survives):
    text = json.dumps(header).encode()
    size = (len(text) if length is None else length).to_bytes(8, "little")
    (place / "net.safetensors").write_bytes(size + text + content)
    assert is_state(survives(lambda: read_weights(place / "net.safetensors").tensors))


@pytest.mark.filterwarnings("ignore")  # torch warns of old forms and odd storages
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
@fuzz
@given(data=st.data())
def test_damaged_pytorch_file(data, zipped, damaged, place, survives):
    (place / "net.pth").write_bytes(data.draw(damaged(torch_file(place / "net.pth", zipped))))
    assert is_state(survives(lambda: read_weights(place / "net.pth").tensors))


class Evil:
    """Unpickling it calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.filterwarnings("ignore")
@fuzz
@given(data=st.data(), protocol=st.integers(0, 5), inside=st.booleans())
def test_damaged_pickle_runs_nothing(data, protocol, inside, damaged, place, survives):
    target = place.parent / "escaped"
    function, arguments = data.draw(  # each would leave a file
        st.sampled_from(
            [(Path.touch, (target,)), (system, (f"touch {target}",)), (exec, (f"open({str(target)!r},'w')",))]
        )
    )
    evil = pickle.dumps({"a": Evil(function, *arguments)}, protocol)
    content = data.draw(st.just(evil) | damaged(evil))
    if inside:  # in the place of the pickle of a real file
        torch_file(place / "plain.pth", True)
        with zipfile.ZipFile(place / "plain.pth") as plain, zipfile.ZipFile(place / "net.pth", "w") as net:
            for entry in plain.infolist():
                net.writestr(entry.filename, content if entry.filename.endswith("data.pkl") else plain.read(entry))
    else:
        (place / "net.pth").write_bytes(content)
    survives(lambda: read_weights(place / "net.pth").tensors)
    assert not target.exists()


PUBLISHED = {
    key.replace("weight", "adder") if ".conv" in key else key: value
    for key, value in ModelSource("cifar_resnet20", pretrained=False).build().state_dict().items()
}
NAMES = st.sampled_from(["fc.weight", "bn2.weight", "layer1.0.conv1.adder", "layer1.0.conv1.b", "*.adder", ".adder"])
TENSOR = st.builds(
    lambda shape, dtype: torch.zeros((), dtype=dtype).expand(shape).contiguous(),
    st.lists(st.integers(0, 20), max_size=5),
    st.sampled_from([torch.float32, torch.float64, torch.int64, torch.complex64, torch.bool]),
)
KNOWN = st.sampled_from(sorted(PUBLISHED))
HUGE = st.sampled_from([(10**12,), (10**9, 64, 1, 1), (64, 10**12)]).map(torch.zeros(1).expand)


@pytest.mark.filterwarnings("ignore")
@fuzz
@given(
    replaced=st.dictionaries(
        st.sampled_from(sorted(PUBLISHED)) | NAMES | st.text(max_size=9), TENSOR | HUGE, max_size=3
    ),
    lost=st.sets(KNOWN, max_size=2),
    classes=st.none() | st.integers(1, 20),
)
def test_imported_checkpoint_of_other_names_and_shapes(replaced, lost, classes, place, survives):
    state = {key: value for key, value in PUBLISHED.items() if key not in lost} | replaced
    torch.save(state, place / "net.pth")
    found = survives(lambda: import_checkpoint(place / "net.pth", "cifar_resnet20", classes))
    assert found is None or all(value.isfinite().all() for value in found[0].state_dict().values())


def test_imported_checkpoint_whose_classifier_would_fill_the_memory(place, survives):
    """16 MB of a file that says how many classes there are, and nothing of how many features."""
    torch.save({"fc.weight": torch.zeros(1 << 22, 1), "layer1.0.conv1.adder": torch.zeros(1)}, place / "net.pth")
    with pytest.raises(CheckpointError, match=r"tensor of shape \(4194304, 512\), far more than its weights"):
        import_checkpoint(place / "net.pth", "resnet18")
