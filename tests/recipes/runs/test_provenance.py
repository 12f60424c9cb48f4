"""What a model says of its origin: weights, commands, measurements, and no path of a machine."""

import sys
from pathlib import Path

import pytest
import timm

import adderkit
from adderkit.convert.checkpoint.report import Report, read_report
from adderkit.convert.errors import AdderkitError
from adderkit.convert.files import sha256
from adderkit.convert.model_source import ModelSource
from adderkit.recipes.reporting.evaluations import check_recordable, eval_results, evaluations_of, record_evaluation
from adderkit.recipes.runs.provenance import (
    command_line,
    command_without_local_paths,
    weights_origin,
    without_local_paths,
)
from adderkit.recipes.training.evaluate import Metrics
from adderkit.recipes.training.models import Job

METRICS = Metrics(top1=91.5, top5=99.25, loss=0.3, images=10000, images_per_second=5.0)


# Weights


def test_source_of_weights(cnn_folder, tmp_path):
    cnn = timm.create_model("cifar_resnet20")

    def source(name, **more):
        return weights_origin(ModelSource(name, **more), cnn)

    assert source("cifar_resnet20.a1_in1k") == "cifar_resnet20.a1_in1k"
    assert source("hf-hub:ann/net@v1") == "hf-hub:ann/net@v1"
    assert source("cifar_resnet20", pretrained=False) is None
    assert source("cifar_resnet20", checkpoint="weights.pth") is None
    assert source(f"local-dir:{cnn_folder}") == str(cnn_folder)
    assert source("cifar_resnet20", checkpoint=str(cnn_folder)) == str(cnn_folder)
    for known in ("resnet50.a1_in1k", None):  # a folder passes on where its own weights came from
        adderkit.save(cnn, tmp_path / "net", Report(source=known))
        assert source(str(tmp_path / "net")) == known


def test_conversion_says_what_it_came_from(adder_folder, cnn_folder):
    report = read_report(adder_folder)
    assert report.source == str(cnn_folder)
    assert report.commands == ()  # made by Python code


def test_run_says_what_it_came_from(train, adder_folder, cnn_folder, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["adderkit", "finetune", "net-adder"])
    _, folder = train("distill", job=Job(ModelSource(str(adder_folder))))
    monkeypatch.setattr(sys, "argv", ["adderkit", "evaluate"])
    report = read_report(folder.best)
    assert report.source == str(cnn_folder)
    assert report.commands == ("adderkit finetune net-adder",)
    digest = sha256(folder.best / "model.safetensors")
    (found,) = evaluations_of(report, digest)
    assert (found.dataset, found.split, found.images) == ("digits", "validation", 360)
    with pytest.raises(AdderkitError, match="protected by checksums"):
        check_recordable(folder.last)


# Commands


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["/usr/bin/adderkit", "convert", "--include", "a.*"], "adderkit convert --include 'a.*'"),
        (["/usr/bin/convert", "--model", "x"], "convert --model x"),
        ([str(Path(adderkit.__file__).with_name("__main__.py")), "demo"], "adderkit demo"),
        (["/usr/lib/pytest/__main__.py", "tests"], None),
        (["train.py"], None),
        ([""], None),
        ([], None),
    ],
)
def test_command_line(monkeypatch, argv, expected):
    monkeypatch.setattr(sys, "argv", argv)
    assert command_line() == expected


def test_paths_of_a_machine_are_cut():
    command = "adderkit finetune /home/ann/my net --data-dir=/data/x --lr 1/3 -o C:\\\\runs\\\\mine"
    assert command_without_local_paths(command) == "adderkit finetune my net --data-dir=x --lr 1/3 -o mine"
    assert command_without_local_paths("adderkit 'convert /home/ann/x") == "adderkit ''\"'\"'convert' x"
    assert len(command_without_local_paths("adderkit " + "x " * 500_000)) <= 10_000
    facts = {"a": ["/home/ann/x", 1, None], "b": {"c": "relative/y"}, "d": "/", "e": True}
    assert without_local_paths(facts) == {"a": ["x", 1, None], "b": {"c": "relative/y"}, "d": "/", "e": True}


# Measurements


def test_recorded_evaluations_are_those_of_these_weights(adder_folder, tmp_path):
    folder = adderkit.save(adderkit.load(adder_folder), tmp_path / "net", Report(metrics={"validation": {"top1": 1.0}}))
    digest = read_report(folder).sha256
    for split in ("train", "validation", "train"):
        record_evaluation(folder, "digits", split, METRICS)
    report = read_report(folder)
    assert [(each.split, each.top1, each.images) for each in evaluations_of(report, digest)] == [
        ("validation", 91.5, 10000),
        ("train", 91.5, 10000),
    ]
    assert evaluations_of(report, "0" * 64) == []
    assert adderkit.load(folder).num_classes == 10  # the weights and their checksum are as before


def test_metrics_of_the_training_stand_in():
    report = Report(metrics={"test": METRICS.to_dict()}, training={"recipe": {"dataset": "fashion-mnist"}})
    (found,) = evaluations_of(report, "0" * 64)
    top1, top5 = eval_results(found)
    assert (top1.dataset_type, top1.dataset_split) == ("zalando-datasets/fashion_mnist", "test")
    assert (top1.metric_value, top5.metric_value) == (0.915, 0.9925)
    assert evaluations_of(Report(metrics={"test": METRICS.to_dict()}), "0" * 64) == []


@pytest.mark.parametrize(
    "entries", [None, 7, "x", [7, None], [{}], {}, [{"dataset": "digits", "sha256": "0" * 64, "top1": "99"}]], ids=str
)
def test_evaluations_of_another_form(entries):
    assert evaluations_of(Report.from_dict({"evaluations": entries}), "0" * 64) == []


def test_where_nothing_can_be_recorded(adder_folder, tmp_path):
    check_recordable(adder_folder)
    for folder, checkpoint in ((tmp_path, None), (adder_folder, "other.pth")):
        with pytest.raises(AdderkitError, match="writes into a saved folder"):
            check_recordable(folder, checkpoint)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "state").mkdir()
    with pytest.raises(AdderkitError, match="protected by checksums"):
        check_recordable(tmp_path)
