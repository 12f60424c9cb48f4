"""The command line: exit status, one line of error, and one JSON object for programs."""

import contextlib
import io
import json
import subprocess
import sys

import pytest
import timm
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState

import adderkit
from adderkit import cli
from adderkit.recipes import finetune as loop
from adderkit.recipes import verification
from adderkit.recipes.recipe_files import recipe_text

VERBS = ("convert", "finetune", "evaluate", "inspect", "report", "publish", "demo", "recipes")
SETTINGS = {"train_images": 64, "batch_size": 32, "workers": 0, "crop_padding": 1, "bn_images": 64, "epochs": 1}
QUICK = [word for key, value in SETTINGS.items() for word in ("--set", f"{key}={value}")]


@pytest.fixture(autouse=True)
def fresh_accelerate():
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.fixture
def fails(adder_kit):
    """The one line that a failing command leaves on stderr."""

    def run(*words):
        status, out, err = adder_kit(*words)
        assert status == 1
        assert out == ""
        assert err.startswith("error: ")
        assert "Traceback" not in err
        assert len(err.splitlines()) == 1, err
        return err.removeprefix("error: ").rstrip("\n")

    return run


@pytest.fixture
def misused(adder_kit):
    """What wrong usage prints."""

    def run(*words):
        status, out, err = adder_kit(*words)
        assert status == 2
        assert out == ""
        assert "Traceback" not in err
        return " ".join(err.split())

    return run


@pytest.fixture
def json_of(adder_kit):
    """The one JSON object on stdout."""

    def run(*words):
        status, out, err = adder_kit(*words, "--json")
        assert status == 0, err
        assert len(out.splitlines()) == 1
        value = json.loads(out)
        assert isinstance(value, dict)
        return value

    return run


@pytest.fixture(scope="module")
def cnn(tmp_path_factory):
    torch.manual_seed(0)
    overlay = {"input_size": (1, 8, 8), "mean": (0.3053,), "std": (0.3761,)}
    model = timm.create_model("cifar_resnet20", num_classes=10, in_chans=1, pretrained_cfg_overlay=overlay)
    return adderkit.save(model, tmp_path_factory.mktemp("models") / "net")


@pytest.fixture(scope="module")
def adder(cnn):
    folder = cnn.with_name("net-adder")
    words = ["convert", "--model", str(cnn), "--include", "features.4.*", "-o", str(folder)]
    with (
        pytest.raises(SystemExit),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        cli.main(words)
    return folder


class TestRoot:
    def test_help_lists_the_verbs(self, adder_kit):
        status, out, _ = adder_kit("--help")
        assert status == 0
        assert all(verb in out for verb in VERBS)

    @pytest.mark.parametrize("verb", VERBS)
    def test_help_of_each_verb(self, adder_kit, verb):
        status, out, err = adder_kit(verb, "--help")
        assert (status, err) == (0, "")
        assert "Usage: adderkit" in out

    @pytest.mark.parametrize("words", [[], ["recipes"]], ids=["root", "recipes"])
    def test_nothing_asked_for_is_wrong_usage(self, adder_kit, words):
        status, out, err = adder_kit(*words)
        assert status == 2
        assert "Usage" in out + err

    @pytest.mark.parametrize("words", [["transmogrify"], ["recipes", "rm"]])
    def test_unknown_verb(self, misused, words):
        assert "No such command" in misused(*words)

    @pytest.mark.parametrize("verb", ["convert", "finetune", "evaluate", "inspect", "demo"])
    def test_unknown_option(self, misused, verb):
        assert "No such option" in misused(verb, "--no-such-option")

    def test_an_unexpected_error_is_one_line_that_names_debug(self, fails, monkeypatch, cnn):
        monkeypatch.setattr(verification, "build_student", lambda *_: {}["key"])
        assert "KeyError" in (line := fails("evaluate", cnn, "--dataset", "digits"))
        assert "--debug" in line

    def test_an_error_of_many_lines_becomes_one(self, fails, monkeypatch, cnn):
        def broken(*_):
            raise RuntimeError("first\n  second\nthird")

        monkeypatch.setattr(verification, "build_student", broken)
        assert "first" in fails("evaluate", cnn, "--dataset", "digits")

    @pytest.mark.parametrize("place", [0, -1], ids=["before", "after"])
    def test_debug_shows_the_traceback(self, place, cnn, monkeypatch):
        words = ["inspect", "no_such_net"]
        words.insert(place if place == 0 else len(words), "--debug")
        with pytest.raises(adderkit.convert.errors.ModelSourceError, match="no_such_net"):
            cli.main(words)

    def test_interruption_says_how_to_go_on(self, adder_kit, monkeypatch, cnn):
        def interrupted(job, recipe, folder):
            folder.start({})
            raise KeyboardInterrupt

        monkeypatch.setattr(loop, "start", interrupted)
        status, out, err = adder_kit("finetune", cnn, "--dataset", "digits")
        assert status in (1, 130)
        assert out == ""
        assert "--resume" in err

    def test_as_a_process(self, tmp_path):
        """Once from outside: no import order, no buffer and no hook of this process helps."""
        command = [sys.executable, "-m", "adderkit", "inspect", "no_such_net"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert done.stdout == ""
        assert "timm knows no model 'no_such_net'" in done.stderr
        assert "Traceback" not in done.stderr

    def test_convert_has_a_name_of_its_own(self, monkeypatch, capsys):
        monkeypatch.setattr(sys, "argv", ["convert", "--model", "cifar_resnet20", "--dry-run", "--json"])
        with pytest.raises(SystemExit) as caught:
            cli.convert_main()
        assert caught.value.code == 0
        assert json.loads(capsys.readouterr().out)["plan"]["converted"] == 20


class TestConvert:
    def test_writes_the_four_files(self, adder_kit, tmp_path):
        status, out, _ = adder_kit("convert", "--model", "cifar_resnet20", "--to", "adder", "--no-pretrained")
        folder = tmp_path / "cifar_resnet20-adder"
        assert status == 0
        assert {path.name for path in tmp_path.iterdir()} == {folder.name}
        assert {path.name for path in folder.iterdir()} == {
            "model.safetensors", "config.json", "adder_report.json", "README.md"
        }  # fmt: skip
        assert "features.1.conv1" in out
        assert "20 of 22 convolutions became adder layers" in out
        assert adderkit.load(folder).num_classes == 10

    def test_json(self, json_of):
        value = json_of("convert", "--model", "cifar_resnet20", "--no-pretrained", "-o", "here")
        assert value["plan"]["converted"] == 20
        assert value["output"] == "here"
        assert value["calibration"] is None

    def test_calibrates(self, json_of, cnn):
        words = [
            "--include",
            "features.4.conv1",
            "--dataset",
            "digits",
            "--calibration-images",
            "32",
            "--calibration-steps",
            "1",
        ]
        value = json_of("convert", "--model", cnn, *words)
        assert value["calibration"]["images"] == 32
        assert [layer["path"] for layer in value["calibration"]["layers"]] == ["features.4.conv1"]

    def test_dry_run(self, adder_kit, tmp_path):
        status, out, err = adder_kit("convert", "--model", "resnet50", "--dry-run")
        assert (status, err) == (0, "")
        assert "nothing was written" in out
        assert "layer4.2.conv3" in out
        assert list(tmp_path.iterdir()) == []

    def test_patterns(self, json_of):
        words = ["--include", "features.1.*", "--include", "re:features\\.2.*", "--exclude", "*conv2"]
        value = json_of("convert", "--model", "cifar_resnet20", "--dry-run", *words)
        converted = [row["path"] for row in value["plan"]["rows"] if row["decision"] == "convert"]
        assert converted == ["features.1.conv1", "features.2.conv1"]

    def test_first_layer_too(self, json_of):
        value = json_of("convert", "--model", "cifar_resnet20", "--dry-run", "--no-skip-first")
        assert value["plan"]["converted"] == 21

    def test_policy_flags(self, json_of, fails):
        words = ("convert", "--model", "mobilenetv3_small_100", "--dry-run")
        rows = json_of(*words)["plan"]["rows"]
        assert any(row["groups"] > 1 and row["decision"] == "convert" for row in rows)
        assert "as in a gate" in {row["reason"].split(", ")[-1] for row in rows}
        rows = json_of(*words, "--skip-depthwise", "--no-skip-gates", "--norm", "skip")["plan"]["rows"]
        assert {row["decision"] for row in rows if row["groups"] > 1} == {"skip"}
        assert any(row["reason"].startswith("no normalisation follows, but") for row in rows)
        assert "--norm" in fails(*words, "--norm", "error", "--no-skip-gates")
        assert "expected one of insert, skip, error" in fails(*words, "--norm", "maybe")

    @pytest.mark.parametrize("words", [("--min-fidelity", "0.9"), ("--budget", "mults=30%")])
    def test_hybrids_need_calibration(self, fails, words):
        assert "give --dataset" in fails("convert", "--model", "cifar_resnet20", "--no-pretrained", *words)

    def test_budget_of_another_form(self, fails):
        assert "expected mults=N%" in fails("convert", "--model", "cifar_resnet20", "--budget", "half")

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--model", "resnet50", "--to", "conv"], "'conv' is unknown, expected 'adder'"),
            ([], "Missing option '--model'"),
            (["--model", "resnet50", "--calibration-images", "3"], "--calibration-images"),
            (["--model", "resnet50", "--calibration-steps", "many"], "--calibration-steps"),
            (["resnet50"], "Usage: adderkit convert"),
        ],
        ids=["target", "no-model", "images", "steps", "argument"],
    )
    def test_wrong_usage(self, misused, words, message):
        assert message in misused("convert", *words)

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--model", "resnet5O"], "did you mean"),
            (["--model", "cifar_resnet20"], "--no-pretrained"),
            (["--model", "no/such/folder"], "neither a timm model nor a folder"),
            (["--model", "resnet50.a1_in1k"], "cannot be had"),
            (["--model", "cifar_resnet20", "--checkpoint", "no.safetensors"], "no.safetensors does not exist"),
            (["--model", "vit_tiny_patch16_224", "--dry-run"], "none of 1 convolutions can become an adder layer"),
            (["--model", "resnet18", "--dry-run", "--include", "layer1.0.convv1"], "nearest: layer1.0.conv1"),
            (["--model", "resnet18", "--dry-run", "--include", "layer1.0"], "write 'layer1.0.*'"),
            (["--model", "resnet18", "--dry-run", "--include", "re:("], "not a regular expression"),
            (["--model", "resnet18", "--dry-run", "--in-chans", "3", "--exclude", "*"], "none of"),
        ],
        ids=["typo", "untrained", "folder", "offline", "checkpoint", "vit", "near", "block", "regex", "all-excluded"],
    )
    def test_fails(self, fails, words, message, tmp_path):
        assert message in fails("convert", *words)
        assert list(tmp_path.iterdir()) == []

    def test_twice(self, fails, adder):
        assert "is an adder network already" in fails("convert", "--model", adder)

    def test_checkpoint_that_does_not_fit(self, fails, cnn):
        line = fails("convert", "--model", "resnet18", "--checkpoint", cnn / "model.safetensors")
        assert "does not fit resnet18" in line


class TestFinetune:
    def test_and_resume(self, adder_kit, json_of, adder, tmp_path):
        value = json_of("finetune", adder, "--dataset", "digits", *QUICK, "-o", "run")
        assert value["output"] == "run"
        assert [row["epoch"] for row in value["rows"]] == [0]
        arguments = yaml.safe_load((tmp_path / "run" / "args.yaml").read_text())
        assert arguments["recipe"]["distill_loss_weight"] == 1.0  # the default for a converted folder
        status, out, _ = adder_kit("finetune", "--resume", "run")
        assert status == 0
        assert "best model: run/best" in out
        assert "eval top1" in out

    def test_a_cnn_into_a_folder_of_its_own(self, adder_kit, tmp_path):
        words = ["--no-pretrained", "--dataset", "digits", *QUICK]
        status, out, err = adder_kit("finetune", "cifar_resnet20", *words)
        assert status == 0, err
        (run,) = (tmp_path / "runs").iterdir()
        assert run.name.endswith("-cifar_resnet20_digits")
        assert f"best model: runs/{run.name}/best" in out
        assert adderkit.load(run / "best").num_classes == 10

    def test_flags_and_settings_reach_the_recipe(self, adder_kit, monkeypatch, cnn):
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
        status, _, err = adder_kit("finetune", cnn, "--recipe", "cnn", *words, "--teacher", "resnet18", "-o", "run")
        assert status == 0, err
        ((job, recipe, folder),) = seen
        assert (job.model, job.teacher, str(folder.path)) == (str(cnn), "resnet18", "run")
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
    def test_wrong_usage(self, misused, words):
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
    def test_fails(self, fails, cnn, words, message, tmp_path):
        assert message in fails("finetune", cnn, *words)
        assert list(tmp_path.iterdir()) == []

    def test_resume_of_nothing(self, fails):
        assert "holds no run to resume" in fails("finetune", "--resume", "nowhere")

    def test_an_existing_run(self, fails, cnn, tmp_path):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "args.yaml").write_text("job: {}\n")
        assert "continue it with --resume run" in fails("finetune", cnn, "--dataset", "digits", *QUICK, "-o", "run")


class TestEvaluate:
    def test_json(self, json_of, adder):
        value = json_of("evaluate", adder, "--dataset", "digits", "-j", "0")
        assert value["model"] == str(adder)
        assert (value["dataset"], value["split"], value["images"]) == ("digits", "validation", 360)
        assert 0 <= value["top1"] <= value["top5"] <= 100

    def test_table(self, adder_kit, cnn):
        status, out, _ = adder_kit("evaluate", cnn, "--dataset", "digits", "--split", "train", "-j", "0")
        assert status == 0
        assert "1437" in out
        assert "top-1 %" in out

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            ([], "name one with --dataset"),
            (["--dataset", "digits", "--split", "testing"], "split is 'testing'"),
            (["--dataset", "folder"], "needs --data-dir"),
            (["--dataset", "folder", "--data-dir", "nowhere"], "--data-dir nowhere does not exist"),
        ],
        ids=["no-data", "split", "no-folder", "missing-folder"],
    )
    def test_fails(self, fails, cnn, words, message):
        assert message in fails("evaluate", cnn, *words)

    def test_no_model(self, misused):
        assert "Missing argument" in misused("evaluate")


class TestInspect:
    def test_json(self, json_of, adder, cnn):
        converted, original = (json_of("inspect", folder) for folder in (adder, cnn))
        assert converted["multiplications"] < original["multiplications"]
        assert converted["additions"] > original["additions"]
        assert converted["parameters"] == original["parameters"]

    def test_table_of_a_name_without_weights(self, adder_kit):
        status, out, err = adder_kit("inspect", "resnet18")
        assert (status, err) == (0, "")
        assert "layer4.1.conv2" in out
        assert "11,689,512" in out

    def test_damaged_folder(self, fails, cnn, tmp_path):
        folder = tmp_path / "damaged"
        folder.mkdir()
        for path in cnn.iterdir():
            (folder / path.name).write_bytes(
                path.read_bytes()[:1000] if "safetensors" in path.name else path.read_bytes()
            )
        assert "is not a whole safetensors file" in fails("inspect", folder)

    def test_configuration_that_does_not_fit(self, fails, cnn, tmp_path):
        """torch lists each tensor on a line of its own; the command line must not."""
        folder = tmp_path / "altered"
        folder.mkdir()
        for path in cnn.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        config = json.loads((folder / "config.json").read_text())
        config["pretrained_cfg"]["input_size"] = [3, 8, 8]
        config["model_args"] = {**config.get("model_args", {}), "in_chans": 3, "num_classes": 7}
        config["num_classes"] = 7
        (folder / "config.json").write_text(json.dumps(config))
        assert "expected [7, 64, 1, 1] by the steps in config.json" in fails("inspect", folder)


class TestRecipes:
    def test_ls(self, adder_kit, json_of):
        status, out, _ = adder_kit("recipes", "ls")
        assert status == 0
        names = ["addernet-cifar", "addernet-imagenet", "cnn", "distill", "imagenet-distill", "pkkd"]
        assert [line.split()[0] for line in out.splitlines()] == names
        assert list(json_of("recipes", "ls")) == names

    @pytest.mark.parametrize("name", ["cnn", "distill"])
    def test_show(self, adder_kit, name):
        assert adder_kit("recipes", "show", name) == (0, recipe_text(name), "")

    def test_copy(self, adder_kit, fails, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert adder_kit("recipes", "copy", "cnn", "mine.yaml") == (0, "recipe written: mine.yaml\n", "")
        assert (tmp_path / "mine.yaml").read_text() == recipe_text("cnn")
        assert "exists already" in fails("recipes", "copy", "cnn", "mine.yaml")

    def test_show_of_an_unknown_one(self, fails):
        assert "did you mean 'distill'" in fails("recipes", "show", "distil")


@pytest.mark.slow
def test_demo(json_of, tmp_path):
    rows = json_of("demo", "-o", "demo")["rows"]
    teacher, converted, tuned, reloaded = (row["top1"] for row in rows)
    assert teacher > 90
    assert tuned > max(converted - 5, 80)
    assert reloaded == tuned
    assert adderkit.load(tmp_path / "demo" / "final").num_classes == 10
