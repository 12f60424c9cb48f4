"""``adderkit finetune``: options reach the recipe, runs resume, and wrong input is one line."""

import pytest
import yaml

import adderkit
from adderkit.recipes.training import run as loop

SETTINGS = {"train_images": 64, "batch_size": 32, "workers": 0, "crop_padding": 1, "bn_images": 64, "epochs": 1}
QUICK = [word for key, value in SETTINGS.items() for word in ("--set", f"{key}={value}")]


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
        ["--resume", "run", "--lr", "1"],
    ],
    ids=["nothing", "model-and-resume", "epochs", "lr", "resume-and-lr"],
)
def test_wrong_usage(misused, words):
    assert "Usage: adderkit finetune" in misused("finetune", *words)


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


def test_an_existing_run(fails, cnn_folder, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "args.yaml").write_text("job: {}\n")
    assert "continue it with --resume run" in fails("finetune", cnn_folder, "--dataset", "digits", *QUICK, "-o", "run")
