"""The report of a saved model: one schema, read with care, and one table of what survives which verb."""

import json
from typing import get_args

import pytest

from adderkit.convert.checkpoint.report import (
    NOT_RECORDED,
    REPORT,
    Report,
    SavedModel,
    Verb,
    read_report,
    write_report,
)
from adderkit.convert.errors import CheckpointError

FULL = Report(
    plan={"converted": 3},
    calibration={"images": 64},
    pruning={"images": 32},
    quantization={"images": 16},
    imported={"file": "x.pth"},
    teacher="resnet18",
    data={"dataset": "digits"},
    source="resnet18.a1_in1k",
    commands=("adderkit convert", "adderkit finetune"),
    training={"epoch": 3},
    metrics={"validation": {"top1": 50.0}},
    evaluations=({"dataset": "digits"},),
    cost={"parameters": 5},
    repository="ann/net",
    license="mit",
    base_model="timm/resnet18.a1_in1k",
    card_sha256="1" * 64,
    architecture="adder",
    base="resnet18",
    versions={"python": "3.13"},
    sha256="0" * 64,
)


@pytest.mark.parametrize("report", [FULL, Report(), Report(source=None)], ids=["full", "empty", "own weights"])
def test_written_and_read_back(report, tmp_path):
    write_report(tmp_path, report)
    assert read_report(tmp_path) == report


def test_only_what_is_recorded_is_written():
    assert Report().to_dict() == {"format_version": 1}
    assert Report(source=None, teacher="net").to_dict() == {"format_version": 1, "teacher": "net", "source": None}
    assert json.loads(json.dumps(FULL.to_dict())).keys() == {"format_version", *Report.__dataclass_fields__}


def test_key_with_a_typo_is_an_error():
    with pytest.raises(TypeError, match="techer"):
        Report(techer="resnet18")
    with pytest.raises(TypeError, match="techer"):
        FULL.after("prune", techer="resnet18")


def test_folder_without_a_report(tmp_path):
    assert read_report(tmp_path) == Report()
    assert Report().source == NOT_RECORDED


@pytest.mark.parametrize("value", [7, True, [7, None], {"a": {}}, "x", [], {}], ids=str)
def test_value_of_another_type_is_dropped(value):
    """Whatever somebody else wrote, each field has its own type, and what is read can be written and read again."""
    report = Report.from_dict(dict.fromkeys([*Report.__dataclass_fields__, "unknown"], value))
    assert all(isinstance(getattr(report, name), dict) for name in ("plan", "training", "versions"))
    assert report.teacher is None or report.teacher == value == "x"
    assert all(isinstance(each, str) for each in report.commands)
    assert all(isinstance(each, dict) for each in report.evaluations)
    assert Report.from_dict(report.to_dict()) == report


def test_report_of_a_newer_version(tmp_path):
    (tmp_path / REPORT).write_text(json.dumps({"format_version": 2}))
    with pytest.raises(CheckpointError, match=r"format_version is 2 .* expected at most 1; update adderkit"):
        read_report(tmp_path)


# What survives


@pytest.mark.parametrize("verb", get_args(Verb))
def test_measurements_never_survive(verb):
    """They belong to other weights; so do the versions, and what a published folder says of itself."""
    after = FULL.after(verb)
    for name in ("training", "metrics", "evaluations", "quantization", "cost", "repository", "sha256", "versions"):
        assert getattr(after, name) == getattr(Report(), name)
    assert after.source == NOT_RECORDED  # each verb says where the weights come from


@pytest.mark.parametrize(
    ("verb", "kept"),
    [
        ("convert", {"data"}),
        ("finetune", {"plan", "calibration", "pruning", "imported", "teacher", "data"}),
        ("prune", {"plan", "calibration", "imported", "teacher", "data"}),
        ("quantize", {"plan", "calibration", "pruning", "imported", "teacher", "data"}),
    ],
)
def test_what_survives_which_verb(verb, kept):
    after = FULL.after(verb, "adderkit last", source="net")
    changed = {"format_version", "commands", "source"}
    assert after.to_dict().keys() - changed == kept
    assert all(getattr(after, name) == getattr(FULL, name) for name in kept)
    assert after.commands == (*FULL.commands, "adderkit last")
    assert FULL.after(verb).commands == FULL.commands  # made by Python code


def test_import_begins_a_report():
    assert FULL.after("import-checkpoint", "adderkit import-checkpoint") == Report(
        commands=("adderkit import-checkpoint",)
    )


# The saved model


def test_saved_model(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        SavedModel.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"abc")
    (tmp_path / "config.json").write_text('{"architecture": "resnet18"}')
    saved = SavedModel.load(tmp_path)
    assert (saved.config, saved.report) == ({"architecture": "resnet18"}, Report())
    assert saved.digest == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
