"""Small models, data and runs that the tests of this folder share."""

import contextlib
import io

import pytest
import timm
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image

import adderkit
from adderkit.recipes import finetune
from adderkit.recipes.conversion import ConversionJob, run_conversion
from adderkit.recipes.progress import ProgressBar
from adderkit.recipes.recipe import load_recipe
from adderkit.recipes.run_folder import RunFolder
from adderkit.recipes.setup import Job

CNN = "cifar_resnet20"
QUICK = {
    "dataset": "digits",
    "epochs": 1,
    "train_images": 64,
    "batch_size": 32,
    "bn_images": 64,
    "workers": 0,
    "crop_padding": 1,
}


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps the precision of the first run of a process."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.fixture(scope="session")
def quick_recipe():
    """A shipped recipe cut down to a second or two on digits."""
    return lambda name="cnn", **changes: load_recipe(name).changed({**QUICK, **changes})


@pytest.fixture
def train(tmp_path, quick_recipe):
    """Begin a quick run in ``tmp_path / folder``; the rows and the folder."""

    def run(recipe="cnn", folder="run", job=None, **changes):
        place = RunFolder(tmp_path / folder)
        job = job or Job(CNN, pretrained=False)
        return finetune.start(job, quick_recipe(recipe, **changes), place), place

    return run


@pytest.fixture(scope="session")
def cnn_folder(tmp_path_factory):
    """A saved CNN for digits, untrained but with statistics of the data."""
    torch.manual_seed(0)
    overlay = {"input_size": (1, 8, 8), "mean": (0.3053,), "std": (0.3761,)}
    model = timm.create_model(CNN, num_classes=10, in_chans=1, pretrained_cfg_overlay=overlay)
    folder = tmp_path_factory.mktemp("models") / "net"
    return adderkit.save(model, folder)


@pytest.fixture(scope="session")
def adder_folder(cnn_folder):
    """``cnn_folder`` with two of its layers converted, by the ``convert`` verb's own code."""
    job = ConversionJob(str(cnn_folder), str(cnn_folder.with_name("net-adder")), include=("features.4.*",))
    with contextlib.redirect_stderr(io.StringIO()):
        return run_conversion(job, dry_run=False, announce=lambda line: None).folder


@pytest.fixture
def image_folder(tmp_path):
    """Make a data set of class folders; each class has its own colour."""

    def make(splits=("train", "validation"), classes=("cat", "dog"), count=4, name="images", size=(12, 12)):
        root = tmp_path / name
        for split in splits:
            for label, kind in enumerate(classes):
                folder = root / split / kind
                folder.mkdir(parents=True)
                for index in range(count):
                    colour = (60 * label + 40, 5 * index, 255 - 60 * label)
                    Image.new("RGB", size, colour).save(folder / f"{index}.png")
        return root

    return make


@pytest.fixture
def stop_at(monkeypatch):
    """Interrupt whatever shows the progress title after some steps; ``monkeypatch.undo`` takes it back."""

    def stop(title, after):
        step = ProgressBar.step

        def interrupting(self, *args, **kwargs):
            if self.title == title and self.done >= after:
                raise KeyboardInterrupt
            step(self, *args, **kwargs)

        monkeypatch.setattr(ProgressBar, "step", interrupting)

    return stop
