"""The ``prune`` verb, and pruned networks in all that follows: fine-tuning, resuming, converting, inspecting."""

import contextlib
import io
import json

import pytest
import torch

import adderkit
from adderkit import AdderConfig, CalibrationConfig, PruneConfig
from adderkit.convert.checkpoint.report import read_report
from adderkit.convert.model_source import ModelSource
from adderkit.convert.record import transforms_of
from adderkit.recipes.data.unlabeled import UnlabeledImages
from adderkit.recipes.runs.folder import RunFolder
from adderkit.recipes.training import run as finetune
from adderkit.recipes.training.models import Job
from adderkit.recipes.verbs.convert import ConversionJob, run_conversion
from adderkit.recipes.verbs.prune import PruningJob, run_pruning

DIGITS = UnlabeledImages("digits", count=32)
BY_WEIGHT = PruneConfig(ratio=0.5, importance="magnitude")


def quiet(line):
    pass


@pytest.fixture
def pruned(tmp_path):
    """Prune a folder by weight; the folder that comes of it."""

    def prune(folder, name="pruned", **more):
        job = PruningJob(ModelSource(str(folder)), BY_WEIGHT, output=str(tmp_path / name), **more)
        return run_pruning(job, dry_run=False, announce=quiet).folder

    return prune


def test_the_verb_prunes_and_inspect_shows_it(adder_kit, adder_folder):
    words = ["prune", adder_folder, "--target", "adds=60%", "--dataset", "digits", "--calibration-images", "32"]
    status, out, err = adder_kit(*words, "--output", "small", "--json")
    assert status == 0, err
    found = json.loads(out)
    assert found["images"] == 32
    assert found["config"]["importance"] == "variance"
    assert found["after"]["adds"] <= 0.6 * found["before"]["adds"]
    counts = [json.loads(adder_kit("inspect", folder, "--json")[1]) for folder in (adder_folder, "small")]
    assert [count["additions"] for count in counts] == [found["before"]["adds"], found["after"]["adds"]]
    assert counts[1]["parameters"] == found["after"]["params"]


def test_a_dry_run_shows_the_tables_and_writes_nothing(adder_kit, cnn_folder, tmp_path):
    status, out, _ = adder_kit("prune", cnn_folder, "--ratio", "0.5", "--importance", "random", "--dry-run")
    assert status == 0
    assert "features.9.conv1" in out
    assert "the model's outputs" in out
    assert "nothing was written" in out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ratio", "0.5"], "give --dataset"),
        (["--importance", "random"], "either a ratio"),
        (["--target", "adds=nothing", "--importance", "random"], "target is 'adds=nothing'"),
    ],
)
def test_wrong_options_are_one_line(adder_kit, cnn_folder, words, message):
    status, out, err = adder_kit("prune", cnn_folder, *words)
    assert (status, out) == (1, "")
    assert message in err
    assert len(err.splitlines()) == 1


def test_importance_is_a_choice(misused, cnn_folder):
    error = misused("prune", cnn_folder, "--ratio", "0.5", "--importance", "l1")
    assert "'l1' is not one of 'variance', 'batchnorm'" in error


def test_the_model_itself_is_not_overwritten(adder_kit, cnn_folder):
    status, _, err = adder_kit("prune", cnn_folder, "--ratio", "0.5", "--importance", "random", "-o", cnn_folder)
    assert status == 1
    assert "is the model itself" in err
    source = ["--checkpoint", cnn_folder, "-o", cnn_folder]
    status, _, err = adder_kit("prune", "cifar_resnet20", "--ratio", "0.5", "--importance", "random", *source)
    assert status == 1
    assert "would replace the weights in" in err


def test_converted_tuned_pruned_tuned_and_resumed(
    adder_folder, cnn_folder, pruned, quick_recipe, tmp_path, stop_at, monkeypatch, same_run
):
    """The teacher stays the whole CNN; a run that was cut off ends as one that was not."""
    recipe = quick_recipe("distill", epochs=1)
    first = RunFolder(tmp_path / "first")
    finetune.start(Job(ModelSource(str(adder_folder))), recipe, first)
    small = pruned(first.best)
    assert read_report(small).teacher == "teacher"
    kept = adderkit.load(small / "teacher").state_dict()
    assert all(kept[name].equal(value) for name, value in adderkit.load(cnn_folder).state_dict().items())
    assert [transform["kind"] for transform in transforms_of(adderkit.load(small))] == ["adder", "prune"]

    recipe = quick_recipe("distill", epochs=2)
    straight, broken = RunFolder(tmp_path / "straight"), RunFolder(tmp_path / "broken")
    finetune.start(Job(ModelSource(str(small))), recipe, straight)
    stop_at("epoch 1/1", 1)
    with pytest.raises(KeyboardInterrupt):
        finetune.start(Job(ModelSource(str(small))), recipe, broken)
    monkeypatch.undo()
    finetune.resume(broken)
    same_run(broken, straight)
    report = read_report(straight.best)
    assert report.teacher == "teacher"
    assert report.pruning["config"]["ratio"] == 0.5
    assert adderkit.load(straight.best).features[9].conv1.weight.shape == (32, 32, 3, 3)


def test_pruned_then_converted_and_calibrated(cnn_folder, pruned, tmp_path):
    small = pruned(cnn_folder, images=DIGITS)
    calibration = CalibrationConfig(steps=2, matching_steps=2)
    config, output = AdderConfig(include=("features.4.*",)), str(tmp_path / "adder")
    job = ConversionJob(ModelSource(str(small)), config, output=output, images=DIGITS, calibration=calibration)
    with contextlib.redirect_stderr(io.StringIO()):
        folder = run_conversion(job, dry_run=False, announce=quiet).folder
    model = adderkit.load(folder)
    assert [transform["kind"] for transform in transforms_of(model)] == ["prune", "adder"]
    assert model(torch.randn(2, 1, 8, 8)).isfinite().all()
    assert "a CNN" in (small / "README.md").read_text()
