"""The ``convert`` verb's work: what is written, what is recorded, and what is refused."""

import json
from pathlib import Path

import pytest
import timm
import torch

import adderkit
from adderkit import AdderConfig
from adderkit.adder_layers.modules import adder_layers
from adderkit.convert.calibration.config import CalibrationConfig, HybridPolicy, TermPolicy
from adderkit.convert.conversion.targets import is_converted
from adderkit.convert.errors import AdderkitError, DatasetError, ModelSourceError, NoModuleMatchedError
from adderkit.convert.model_source import ModelSource
from adderkit.recipes.data.unlabeled import UnlabeledImages
from adderkit.recipes.verbs.convert import ConversionJob, run_conversion

FILES = {"model.safetensors", "config.json", "adder_report.json", "README.md"}
BLOCK = ("features.4.*",)
DIGITS = UnlabeledImages("digits", count=32)


@pytest.fixture
def convert(tmp_path, monkeypatch):
    """Run a conversion in an empty folder; the result and the lines that were announced."""
    monkeypatch.chdir(tmp_path)

    def run(model, dry_run=False, include=AdderConfig.include, **options):
        lines = []
        named = {
            key: options.pop(key) for key in ("pretrained", "checkpoint", "num_classes", "in_chans") if key in options
        }
        job = ConversionJob(ModelSource(str(model), **named), AdderConfig(include=include), **options)
        return run_conversion(job, dry_run=dry_run, announce=lines.append), lines

    return run


@pytest.mark.parametrize(
    ("model", "folder"),
    [
        ("resnet50", "resnet50-adder"),
        ("resnet50.a1_in1k", "resnet50.a1_in1k-adder"),
        ("hf-hub:timm/resnet50.a1_in1k", "resnet50.a1_in1k-adder"),
        ("local-dir:runs/teacher/best/", "best-adder"),
        ("runs/teacher", "teacher-adder"),
    ],
)
def test_default_folder(model, folder):
    assert str(ConversionJob(ModelSource(model)).folder) == folder


def test_default_folder_of_the_current_one(tmp_path, monkeypatch):
    (tmp_path / "net").mkdir()
    monkeypatch.chdir(tmp_path / "net")
    assert ConversionJob(ModelSource(".")).folder.name == "net-adder"


def test_output_wins():
    assert str(ConversionJob(ModelSource("resnet50"), output="some/where").folder) == "some/where"


@pytest.mark.parametrize("model", ["resnet50", "mobilenetv2_100", "cifar_resnet20"])
def test_dry_run_needs_no_weights_and_writes_nothing(convert, tmp_path, model):
    result, _ = convert(model, dry_run=True)
    assert list(tmp_path.iterdir()) == []
    assert result.folder is None
    assert result.calibration is None
    assert result.plan.paths("convert")
    assert "would become adder layers; nothing was written" in result.summary()


def test_converts_without_data_and_says_what_that_means(convert, tmp_path):
    result, lines = convert("cifar_resnet20", pretrained=False)
    folder = tmp_path / "cifar_resnet20-adder"
    assert {path.name for path in folder.iterdir()} == FILES
    assert len(adder_layers(adderkit.load(folder))) == 20 == len(result.plan.paths("convert"))
    assert "not calibrated: its accuracy is near chance" in result.summary()
    assert "--dataset" in result.summary()
    assert lines == ["converting cifar_resnet20"]


def test_calibrates_on_unlabeled_images(convert, cnn_folder):
    result, lines = convert(cnn_folder, include=BLOCK, images=DIGITS, calibration=CalibrationConfig(steps=1))
    assert result.calibration.images == 32
    assert {layer.path for layer in result.calibration.layers} == set(result.plan.paths("convert"))
    assert "calibrated on 32 images" in result.summary()
    assert lines[1].startswith("calibrating on 32 unlabeled images of digits, on ")
    report = json.loads((result.folder / "adder_report.json").read_text())
    assert report["calibration"] == json.loads(json.dumps(result.calibration.to_dict()))
    assert report["calibration"]["images"] == 32


def test_into_the_current_folder(convert, cnn_folder, tmp_path, monkeypatch):
    (tmp_path / "net").mkdir()
    monkeypatch.chdir(tmp_path / "net")
    quick = CalibrationConfig(steps=1, matching_steps=0)
    convert(cnn_folder, include=BLOCK, images=DIGITS, calibration=quick, output=".")
    assert {path.name for path in (tmp_path / "net").iterdir()} == {*FILES, "teacher"}
    assert [path.name for path in tmp_path.iterdir()] == ["net"]
    assert 'adderkit.load("net")' in Path("README.md").read_text()


HYBRID = {"include": (*BLOCK, "features.5.conv1"), "images": DIGITS, "calibration": CalibrationConfig(steps=1)}


def test_unfaithful_layers_go_back(convert, cnn_folder):
    measured = convert(cnn_folder, **HYBRID)[0].calibration.layers
    limit = sorted(layer.correlation for layer in measured)[1]
    result, lines = convert(cnn_folder, **HYBRID, hybrid=HybridPolicy(limit), output="hybrid")
    worst = min(measured, key=lambda layer: layer.correlation).path
    assert result.plan.paths("convert") == [layer.path for layer in measured if layer.path != worst]
    assert "1 returned to convolutions" in result.summary()
    assert any("1 of 4 layers return" in line for line in lines)
    loaded, original = adderkit.load(result.folder), adderkit.load(cnn_folder)
    assert torch.equal(loaded.get_submodule(worst).weight, original.get_submodule(worst).weight)
    assert worst not in adder_layers(loaded)


def test_terms_are_chosen_within_the_budget(convert, cnn_folder):
    policy = TermPolicy(additions=1.2)
    quick = {**HYBRID, "calibration": CalibrationConfig(steps=1, samples=256, matching_steps=0)}
    result, lines = convert(cnn_folder, **quick, terms=policy)
    single = adderkit.cost(adderkit.load(convert(cnn_folder, **quick, output="single")[0].folder)).additions
    loaded = adderkit.load(result.folder)
    terms = {path: layer.terms for path, layer in adder_layers(loaded).items()}
    assert max(terms.values()) > 1
    assert {row.path: row.terms for row in result.plan.rows if row.decision == "convert"} == terms
    assert single < adderkit.cost(loaded).additions <= 1.2 * single
    assert any("of the additions with one term in each layer" in line for line in lines)


def test_dry_run_says_that_the_plan_does_not_show_the_chosen_terms(convert, cnn_folder):
    _, lines = convert(cnn_folder, images=DIGITS, terms=TermPolicy(fidelity=0.9), dry_run=True)
    assert lines == ["calibration chooses the terms of each layer; the plan shows one"]
    assert convert(cnn_folder, images=DIGITS, dry_run=True)[1] == []


def test_choice_of_terms_needs_images(convert, cnn_folder):
    with pytest.raises(AdderkitError, match="--terms auto chooses by fits of each layer: give --dataset"):
        convert(cnn_folder, terms=TermPolicy(fidelity=0.9))


def test_budget_is_kept(convert, cnn_folder):
    total = adderkit.cost(adderkit.load(cnn_folder)).multiplications
    everything = adderkit.cost(adderkit.load(convert(cnn_folder, **HYBRID)[0].folder)).multiplications
    share = round(100 * (total + everything) / 2 / total, 1)
    result, _ = convert(cnn_folder, **HYBRID, hybrid=HybridPolicy(budget=share / 100), output="hybrid")
    found = adderkit.cost(adderkit.load(result.folder)).multiplications
    assert everything < found <= share / 100 * total


def test_the_same_seed_calibrates_to_the_same_weights(convert, cnn_folder):
    def weight(name, seed):
        config = CalibrationConfig(steps=1, seed=seed)
        result, _ = convert(cnn_folder, include=BLOCK, images=DIGITS, calibration=config, output=name)
        return adderkit.load(result.folder).features[4].conv1.weight

    first, second, other = (weight(name, seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_report_says_what_was_done(convert, cnn_folder):
    result, _ = convert(cnn_folder, include=BLOCK)
    report = json.loads((result.folder / "adder_report.json").read_text())
    assert report["plan"] == json.loads(json.dumps(result.plan.to_dict()))
    assert report["plan"]["config"]["include"] == list(BLOCK)
    assert "calibration" not in report
    assert report["teacher"] == "teacher"
    assert report["architecture"] == "adder"
    assert report["base"] == "cifar_resnet20"


def test_uncalibrated_weights_are_the_cnn_s(convert, cnn_folder):
    result, _ = convert(cnn_folder, include=BLOCK)
    original, student = adderkit.load(cnn_folder), adderkit.load(result.folder)
    assert all(torch.equal(value, original.state_dict()[key]) for key, value in student.state_dict().items())
    assert is_converted(student)
    assert not is_converted(original)


def test_result_is_json_ready(convert, cnn_folder):
    result, _ = convert(cnn_folder, include=BLOCK)
    found = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert set(found) == {"plan", "calibration", "output"}
    assert found["output"] == "net-adder"


class TestTeacher:
    """What the report names as the original."""

    def recorded(self, result):
        return json.loads((result.folder / "adder_report.json").read_text()).get("teacher")

    def test_of_random_weights_is_none(self, convert):
        assert self.recorded(convert("cifar_resnet20", pretrained=False, include=BLOCK)[0]) is None

    def test_of_a_folder_as_checkpoint(self, convert, cnn_folder):
        result, _ = convert("cifar_resnet20", checkpoint=str(cnn_folder), include=BLOCK)
        assert self.recorded(result) == "teacher"
        kept, original = (folder / "model.safetensors" for folder in (result.folder / "teacher", cnn_folder))
        assert kept.samefile(original)

    def test_of_a_file_of_weights_is_saved(self, convert, cnn_folder):
        weights = str(cnn_folder / "model.safetensors")
        result, _ = convert("cifar_resnet20", checkpoint=weights, num_classes=10, in_chans=1, include=BLOCK)
        assert self.recorded(result) == "teacher"
        kept, original = adderkit.load(result.folder / "teacher"), adderkit.load(cnn_folder)
        assert not is_converted(kept)
        assert all(torch.equal(value, kept.state_dict()[key]) for key, value in original.state_dict().items())

    def test_of_an_earlier_conversion_is_replaced(self, convert, cnn_folder):
        result, _ = convert(cnn_folder, include=BLOCK)
        before = (cnn_folder / "model.safetensors").read_bytes()
        weights = result.folder.parent / "other.pth"
        torch.save(timm.create_model("cifar_resnet20").state_dict(), weights)
        convert("cifar_resnet20", checkpoint=str(weights), include=BLOCK, output=str(result.folder), overwrite=True)
        kept = adderkit.load(result.folder / "teacher")
        assert torch.equal(kept.fc.weight, torch.load(weights)["fc.weight"])
        assert (cnn_folder / "model.safetensors").read_bytes() == before

    @pytest.mark.parametrize(
        ("name", "recorded"),
        [
            ("resnet18", "resnet18.a1_in1k"),
            ("resnet18.tv_in1k", "resnet18.tv_in1k"),
            ("hf-hub:timm/resnet18.a1_in1k", "teacher"),
        ],
    )
    def test_of_pretrained_weights_is_their_full_name(self, convert, monkeypatch, name, recorded):
        def build(self, **options):
            return timm.create_model(self.name.removeprefix("hf-hub:timm/"), pretrained=False)

        monkeypatch.setattr(ModelSource, "build", build)
        assert self.recorded(convert(name, include=("layer1.0.*",))[0]) == recorded


def test_converting_twice_is_refused(convert, adder_folder):
    with pytest.raises(ModelSourceError, match="is already converted; convert the CNN that it was made from"):
        convert(adder_folder)


def test_the_original_is_never_overwritten(convert, tmp_path):
    original = adderkit.save(timm.create_model("cifar_resnet20"), tmp_path / "original")
    before = (original / "model.safetensors").read_bytes()
    with pytest.raises(AdderkitError, match="--output"):
        convert(original, output=str(original), include=BLOCK)
    for checkpoint in (original, original / "model.safetensors"):
        with pytest.raises(ModelSourceError, match=r"would replace the weights in .*, which is needed as teacher"):
            convert("cifar_resnet20", checkpoint=str(checkpoint), output=str(original), include=BLOCK)
    assert (original / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_pattern_that_matches_nothing(convert, cnn_folder, tmp_path, dry_run):
    with pytest.raises(NoModuleMatchedError, match=r"features.4.conv1"):
        convert(cnn_folder, include=("features.4.convv1",), dry_run=dry_run)
    assert list(tmp_path.iterdir()) == []


def test_missing_weights_write_nothing(convert, tmp_path):
    with pytest.raises(ModelSourceError, match="--no-pretrained"):
        convert("cifar_resnet20")
    assert list(tmp_path.iterdir()) == []


def test_unknown_data_writes_nothing(convert, cnn_folder, tmp_path):
    with pytest.raises(DatasetError):
        convert(cnn_folder, images=UnlabeledImages("mnist"), include=BLOCK)
    assert list(tmp_path.iterdir()) == []
