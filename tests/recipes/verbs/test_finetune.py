"""``adderkit finetune``: options reach the recipe, runs resume, and wrong input is one line."""

import json
import re

import pytest
import yaml

import adderkit
from adderkit.convert.model_source import ModelSource
from adderkit.recipes.configs.files import load_recipe
from adderkit.recipes.runs.folder import RunFolder
from adderkit.recipes.training import run as loop
from adderkit.recipes.training.models import Job

SETTINGS = {"train_images": 64, "batch_size": 32, "workers": 0, "crop_padding": 1, "bn_images": 64, "epochs": 1}
QUICK = [word for key, value in SETTINGS.items() for word in ("--set", f"{key}={value}")]


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory, cnn_folder):
    """A run of two epochs."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    recipe = load_recipe("cnn").changed({**SETTINGS, "dataset": "digits", "epochs": 2})
    loop.start(Job(ModelSource(str(cnn_folder))), recipe, RunFolder(folder))
    return folder


def test_and_resume(adder_kit, json_of, adder_folder, tmp_path):
    value = json_of("finetune", adder_folder, "--dataset", "digits", *QUICK, "-o", "run")
    assert value["output"] == "run"
    assert [row["epoch"] for row in value["rows"]] == [0]
    arguments = yaml.safe_load((tmp_path / "run" / "args.yaml").read_text())
    assert arguments["recipe"]["distill_loss_weight"] == 1.0  # the default for a converted folder
    status, out, _ = adder_kit("finetune", "--resume", "run")
    assert status == 0
    assert "best model: run/best" in out
    assert "eval top1" in out


def test_a_finished_run_is_extended_by_epochs(adder_kit, json_of, cnn_folder, tmp_path):
    words = ("--dataset", "digits", *QUICK, "--recipe", "cnn", "--lr", "0.02")
    longer = json_of("finetune", cnn_folder, *words, "--set", "epochs=4", "-o", "four")["rows"]
    assert len(json_of("finetune", cnn_folder, *words, "--set", "epochs=2", "-o", "run")["rows"]) == 2
    status, out, err = adder_kit("finetune", "--resume", "run", "--epochs", "4", "--json")
    assert status == 0, err
    assert "epochs: 2 -> 4" in err
    rows = json.loads(out)["rows"]
    assert [row["epoch"] for row in rows] == [0, 1, 2, 3]
    # The schedule is that of four epochs.
    assert [row["lr"] for row in rows[2:]] == [row["lr"] for row in longer[2:]]
    arguments = yaml.safe_load((tmp_path / "run" / "args.yaml").read_text())
    assert arguments["recipe"]["epochs"] == 4
    (entry,) = arguments["resumed"]
    assert (entry["epoch"], entry["batches"], entry["changes"]["epochs"]) == (2, 0, [2, 4])


def test_a_cnn_into_a_folder_of_its_own(adder_kit, tmp_path):
    words = ["--no-pretrained", "--dataset", "digits", *QUICK]
    status, out, err = adder_kit("finetune", "cifar_resnet20", *words)
    assert status == 0, err
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.endswith("-cifar_resnet20_digits")
    assert f"best model: runs/{run.name}/best" in out
    assert adderkit.load(run / "best").num_classes == 10


def test_flags_and_settings_reach_the_recipe(adder_kit, monkeypatch, cnn_folder):
    seen = []
    monkeypatch.setattr(loop, "start", lambda job, recipe, folder: seen.append((job, recipe, folder)) or [])
    words = [
        "--dataset",
        "digits",
        "--lr",
        "0.3",
        "--epochs",
        "7",
        "-b",
        "9",
        "-j",
        "0",
        "--seed",
        "4",
        "--set",
        "lr=1e-4",
        "--set",
        "data-dir=null",
    ]
    status, _, err = adder_kit("finetune", cnn_folder, "--recipe", "cnn", *words, "--teacher", "resnet18", "-o", "run")
    assert status == 0, err
    ((job, recipe, folder),) = seen
    assert (job.source.name, job.teacher, str(folder.path)) == (str(cnn_folder), "resnet18", "run")
    assert (recipe.epochs, recipe.batch_size, recipe.workers, recipe.seed) == (7, 9, 0, 4)
    assert recipe.lr == 1e-4


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["net", "--resume", "run"],
        ["net", "--epochs", "0"],
        ["net", "--lr", "fast"],
        ["--resume", "run", "--recipe", "cnn"],
        ["--resume", "run", "--output", "other"],
    ],
    ids=["nothing", "model-and-resume", "epochs", "lr", "resume-and-recipe", "resume-and-output"],
)
def test_wrong_usage(misused, words):
    assert "Usage: adderkit finetune" in misused("finetune", *words)


def test_the_number_of_processes_is_that_of_another_launcher(misused, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert "another launcher has started this process" in misused("finetune", "net", "--num-processes", "2")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "epoch=3"], "did you mean 'epochs'"),
        (["--set", "epochs"], "expected key=value"),
        (["--set", "epochs=many"], "epochs is 'many', expected int"),
        (["--recipe", "distil"], "did you mean 'distill'"),
        (["--lr", "-1"], "lr is -1.0, expected at least 0"),
        (["--dataset", "mnist"], "expected digits"),
        ([], "name one with --dataset"),
        (["--dataset", "digits", "--recipe", "distill"], "--teacher"),
        (["--dataset", "fashion-mnist", "--data-dir", "."], "apt-get install dataset-fashion-mnist"),
    ],
    ids=["typo", "no-value", "type", "recipe", "range", "data", "no-data", "no-teacher", "no-files"],
)
def test_fails(fails, cnn_folder, words, message, tmp_path):
    assert message in fails("finetune", cnn_folder, *words)
    assert list(tmp_path.iterdir()) == []


def test_resume_of_nothing(fails):
    assert "holds no run to resume" in fails("finetune", "--resume", "nowhere")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--batch-size", "8"],
            "batch_size is 32 in this run, and cannot become 8 .*finetune RUN/last --set",
        ),
        (
            ["--set", "opt=adamw"],
            "opt is 'sgd' in this run, and cannot become 'adamw' when it is resumed",
        ),
        (["--epochs", "1"], "epochs is 1, expected at least 2, as many as the run has finished"),
        (["--set", "epoch=3"], "did you mean 'epochs'"),
    ],
    ids=["batch", "optimizer", "fewer-epochs", "typo"],
)
def test_what_a_resumed_run_cannot_change(fails, finished_run, words, message):
    before = (finished_run / "args.yaml").read_bytes()
    assert re.search(message, fails("finetune", "--resume", finished_run, *words))
    assert (finished_run / "args.yaml").read_bytes() == before


def test_an_existing_run(fails, cnn_folder, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "args.yaml").write_text("job: {}\n")
    assert "continue it with --resume run" in fails("finetune", cnn_folder, "--dataset", "digits", *QUICK, "-o", "run")
