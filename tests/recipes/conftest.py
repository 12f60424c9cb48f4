"""Small models, data and runs that the tests of this folder share."""

import copy
import math
import multiprocessing
import runpy
import socket

import pytest
import timm
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image

import adderkit
from adderkit.convert.model_source import ModelSource
from adderkit.recipes.configs.files import load_recipe
from adderkit.recipes.runs.folder import RunFolder
from adderkit.recipes.runs.progress import ProgressBar
from adderkit.recipes.training import run as finetune
from adderkit.recipes.training.models import Job

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


class Steep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * math.inf


@pytest.fixture
def steep():
    """The identity, with an infinite gradient."""
    return Steep.apply


@pytest.fixture
def pair():
    """A CNN and the adder network that it becomes."""
    torch.manual_seed(0)
    teacher = timm.create_model("cifar_resnet20", num_classes=4, pretrained_cfg_overlay={"input_size": (3, 16, 16)})
    student = copy.deepcopy(teacher)
    adderkit.convert_(student)
    return student, teacher


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
        job = job or Job(ModelSource(CNN, pretrained=False))
        return finetune.start(job, quick_recipe(recipe, **changes), place), place

    return run


@pytest.fixture
def image_folder(tmp_path):
    """Make a data set of class folders; each class has its own color."""

    def make(splits=("train", "validation"), classes=("cat", "dog"), count=4, name="images", size=(12, 12)):
        root = tmp_path / name
        for split in splits:
            for label, kind in enumerate(classes):
                folder = root / split / kind
                folder.mkdir(parents=True)
                for index in range(count):
                    color = (60 * label + 40, 5 * index, 255 - 60 * label)
                    Image.new("RGB", size, color).save(folder / f"{index}.png")
        return root

    return make


RUNS = {
    "cnn": {"recipe": "cnn", "opt": "sgd"},
    "cnn-workers": {"recipe": "cnn", "workers": 1},
    "cnn-accumulation": {"recipe": "cnn", "batch_size": 16, "grad_accum_steps": 3},
    "adder": {"recipe": "distill", "opt": "momentum", "clip_grad": 1.0},
    "average-mixed": {"recipe": "distill", "opt": "momentum", "model_ema": True, "model_ema_decay": 0.5, "mixup": 0.5},
    "adder-adamw": {"recipe": "distill", "opt": "adamw", "lr": 1e-3, "warmup_epochs": 1},
}


class StraightRuns:
    """Three epochs of each kind in ``RUNS`` without a stop, flips and padded crops on; made once, when asked for."""

    def __init__(self, quick_recipe, adder_folder, place):
        self.quick_recipe, self.adder_folder, self.place, self.made = quick_recipe, adder_folder, place, {}

    def arguments(self, kind, **more):
        changes = {"epochs": 3, "hflip": 0.5, "crop_padding": 1, **RUNS[kind], **more}
        name = changes.pop("recipe")
        job = Job(ModelSource(str(self.adder_folder))) if name == "distill" else Job(ModelSource(CNN, pretrained=False))
        return job, self.quick_recipe(name, **changes)

    def __call__(self, kind):
        if kind not in self.made:
            folder = RunFolder(self.place / kind)
            self.made[kind] = finetune.start(*self.arguments(kind), folder), folder
        return self.made[kind]


@pytest.fixture(scope="session")
def straight(tmp_path_factory, quick_recipe, adder_folder):
    """``straight(kind)`` gives rows and folder of a run that nothing stopped."""
    return StraightRuns(quick_recipe, adder_folder, tmp_path_factory.mktemp("straight"))


@pytest.fixture
def same_run():
    """Compare summaries and saved weights of two runs, bit by bit."""

    def compare(folder, other):
        assert (folder.path / "summary.csv").read_text() == (other.path / "summary.csv").read_text()
        for name in ("last", "best"):
            actual, expected = (adderkit.load(run.path / name).state_dict() for run in (folder, other))
            assert actual.keys() == expected.keys()
            assert [key for key in actual if not actual[key].equal(expected[key])] == []
        average, expected = (run.last / "state" / "model_ema.safetensors" for run in (folder, other))
        assert average.exists() == expected.exists()
        assert not expected.exists() or average.read_bytes() == expected.read_bytes()

    return compare


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


@pytest.fixture(scope="session")
def run_processes():
    """``run_processes(script, count, *arguments)`` runs a script's ``main`` in processes that know each other.

    Their server has imported torch and adderkit once, so that each starts in no time.
    """
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    context.set_forkserver_preload(["adderkit.recipes.training.run"])

    def run(script, count, *arguments):
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        children = []
        for rank in range(count):
            environment = {"ACCELERATE_USE_CPU": "true"}
            if count > 1:
                environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
                environment |= dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank))
            known = {"arguments": (environment, *map(str, arguments))}
            child = context.Process(target=runpy.run_path, args=(str(script), known, "process"))
            child.start()
            children.append(child)
        try:
            for child in children:
                child.join(600)
            assert [child.exitcode for child in children] == [0] * count
        finally:
            for child in children:
                child.kill()

    return run
