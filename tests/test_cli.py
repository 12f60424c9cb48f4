"""The command line: exit status, one line of error, and one JSON object for programs."""

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState

import adderkit
from adderkit import cli
from adderkit.recipes.training import models
from adderkit.recipes.training import run as loop

VERBS = (
    *("convert", "finetune", "evaluate", "inspect", "prune", "quantize", "bench"),
    *("export", "import-checkpoint", "publish", "report", "demo", "recipes"),
)
FOLDER = Path(adderkit.__file__).parent / "recipes" / "verbs"


@pytest.fixture(autouse=True)
def fresh_accelerate():
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


class TestRoot:
    def test_help_lists_the_verbs(self, adder_kit):
        status, out, _ = adder_kit("--help")
        assert status == 0
        listed = out.split("Commands:\n")[1]
        assert [line.split()[0] for line in listed.splitlines()] == list(VERBS)
        assert "..." not in listed  # no summary is truncated

    def test_each_verb_is_a_file(self):
        files = {path.stem for path in FOLDER.glob("*.py")} - {"__init__"}
        assert files == {verb.replace("-", "_") for verb in VERBS}

    def test_the_verbs_import_nothing_heavy(self, tmp_path):
        code = "import sys, adderkit.cli; print(*sys.modules)"
        names = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
        assert {"torch", "timm", "rich.table"} & set(names.stdout.split()) == set()

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

    def test_version(self, adder_kit):
        assert adder_kit("--version") == (0, f"adderkit {importlib.metadata.version('adderkit')}\n", "")

    @pytest.mark.parametrize("words", [(), ("convert",), ("recipes", "ls")])
    def test_short_form_of_help(self, adder_kit, words):
        assert adder_kit(*words, "-h") == adder_kit(*words, "--help")

    @pytest.mark.parametrize("verb", ["convert", "finetune", "evaluate", "inspect", "demo"])
    def test_unknown_option(self, misused, verb):
        assert "No such option" in misused(verb, "--no-such-option")

    def test_an_unexpected_error_is_one_line_that_names_debug(self, fails, monkeypatch, cnn_folder):
        monkeypatch.setattr(models, "build_student", lambda *_, **__: {}["key"])
        assert "KeyError" in (line := fails("evaluate", cnn_folder, "--dataset", "digits"))
        assert "--debug" in line

    def test_an_error_of_many_lines_becomes_one(self, fails, monkeypatch, cnn_folder):
        def broken(*_, **__):
            raise RuntimeError("first\n  second\nthird")

        monkeypatch.setattr(models, "build_student", broken)
        assert "first" in fails("evaluate", cnn_folder, "--dataset", "digits")

    @pytest.mark.parametrize("place", [0, -1], ids=["before", "after"])
    def test_debug_shows_the_traceback(self, place, cnn_folder, monkeypatch):
        words = ["inspect", "no_such_net"]
        words.insert(place if place == 0 else len(words), "--debug")
        with pytest.raises(adderkit.convert.errors.ModelSourceError, match="no_such_net"):
            cli.main(words)

    def test_interruption_says_how_to_go_on(self, adder_kit, monkeypatch, cnn_folder):
        def interrupted(job, recipe, folder):
            folder.start({})
            raise KeyboardInterrupt

        monkeypatch.setattr(loop, "start", interrupted)
        status, out, err = adder_kit("finetune", cnn_folder, "--dataset", "digits")
        assert status in (1, 130)
        assert out == ""
        assert "--resume" in err

    def test_as_a_process(self, tmp_path):
        """Once from outside: no import order, no buffer and no hook of this process helps."""
        command = [sys.executable, "-m", "adderkit", "inspect", "no_such_net"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert done.stdout == ""
        assert "timm has no model 'no_such_net'" in done.stderr
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

    def test_calibrates(self, json_of, cnn_folder):
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
        value = json_of("convert", "--model", cnn_folder, *words)
        assert value["calibration"]["images"] == 32
        assert [layer["path"] for layer in value["calibration"]["layers"]] == ["features.4.conv1"]

    def test_dry_run(self, adder_kit, tmp_path):
        status, out, err = adder_kit("convert", "--model", "resnet50", "--dry-run")
        assert (status, err) == (0, "")
        assert "nothing was written" in out
        assert "layer4.2.conv3" in out
        assert list(tmp_path.iterdir()) == []

    def test_model_as_argument_or_option(self, json_of):
        first, second = (json_of("convert", *words, "--dry-run") for words in (["resnet18"], ["--model", "resnet18"]))
        assert first == second

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
        assert any(row["reason"].startswith("no normalization follows, but") for row in rows)
        assert "--norm" in fails(*words, "--norm", "error", "--no-skip-gates")

    @pytest.mark.parametrize("words", [("--min-fidelity", "0.9"), ("--budget", "mults=30%")])
    def test_hybrids_need_calibration(self, fails, words):
        assert "give --dataset" in fails("convert", "--model", "cifar_resnet20", "--no-pretrained", *words)

    def test_budget_of_another_form(self, fails):
        assert "expected mults=N%" in fails("convert", "--model", "cifar_resnet20", "--budget", "half")

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--model", "resnet50", "--to", "conv"], "'conv' is not one of 'adder'"),
            ([], "give one model to convert"),
            (["resnet50", "--model", "resnet18"], "give one model to convert"),
            (["--model", "resnet50", "--calibration-images", "3"], "--calibration-images"),
            (["--model", "resnet50", "--calibration-steps", "many"], "--calibration-steps"),
            (["--model", "resnet50", "--norm", "maybe"], "'maybe' is not one of 'insert', 'skip', 'error'"),
            (["--model", "resnet50", "--data-dir", "."], "give --dataset as well"),
        ],
        ids=["target", "no-model", "two-models", "images", "steps", "norm", "data-dir"],
    )
    def test_wrong_usage(self, misused, words, message):
        assert message in misused("convert", *words)

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--model", "resnet5O"], "did you mean"),
            (["--model", "cifar_resnet20"], "--no-pretrained"),
            (["--model", "no/such/folder"], "neither a timm model nor a folder"),
            (["--model", "resnet50.a1_in1k"], "cannot load pretrained weights"),
            (["--model", "cifar_resnet20", "--checkpoint", "no.safetensors"], "no.safetensors does not exist"),
            (["--model", "vit_tiny_patch16_224", "--dry-run"], "none of 1 convolutions can be converted"),
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

    def test_twice(self, fails, adder_folder):
        assert "is already converted" in fails("convert", "--model", adder_folder)

    def test_checkpoint_that_does_not_fit(self, fails, cnn_folder):
        line = fails("convert", "--model", "resnet18", "--checkpoint", cnn_folder / "model.safetensors")
        assert "does not fit resnet18" in line


class TestInspect:
    def test_json(self, json_of, adder_folder, cnn_folder):
        converted, original = (json_of("inspect", folder) for folder in (adder_folder, cnn_folder))
        assert converted["multiplications"] < original["multiplications"]
        assert converted["additions"] > original["additions"]
        assert converted["parameters"] == original["parameters"]

    def test_table_of_a_name_without_weights(self, adder_kit):
        status, out, err = adder_kit("inspect", "resnet18")
        assert (status, err) == (0, "")
        assert "layer4.1.conv2" in out
        assert "11,689,512" in out

    def test_damaged_folder(self, fails, cnn_folder, tmp_path):
        folder = tmp_path / "damaged"
        folder.mkdir()
        for path in cnn_folder.iterdir():
            (folder / path.name).write_bytes(
                path.read_bytes()[:1000] if "safetensors" in path.name else path.read_bytes()
            )
        assert "is not a complete safetensors file" in fails("inspect", folder)

    def test_configuration_that_does_not_fit(self, fails, cnn_folder, tmp_path):
        """torch lists each tensor on a line of its own; the command line must not."""
        folder = tmp_path / "altered"
        folder.mkdir()
        for path in cnn_folder.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        config = json.loads((folder / "config.json").read_text())
        config["pretrained_cfg"]["input_size"] = [3, 8, 8]
        config["model_args"] = {**config.get("model_args", {}), "in_chans": 3, "num_classes": 7}
        config["num_classes"] = 7
        (folder / "config.json").write_text(json.dumps(config))
        assert "expected [7, 64, 1, 1] by the transforms in config.json" in fails("inspect", folder)


@pytest.mark.parametrize("words", [["prune", "--ratio", "0.5"], ["convert", "--model"], ["quantize"]])
def test_target_that_cannot_be_written_is_refused_before_the_work(words, fails, cnn_folder, tmp_path):
    (tmp_path / "file").write_text("")
    error = fails(*words, cnn_folder, "--dataset", "digits", "--output", "file/in/it")
    assert "cannot write --output file/in/it" in error
