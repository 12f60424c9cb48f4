"""Tables for people: every number is there, and no cell is cut."""

import pytest
import timm

from adderkit import AdderConfig, plan
from adderkit.convert.calibration.calibrate import CalibrationReport, LayerFidelity
from adderkit.convert.calibration.config import CalibrationConfig
from adderkit.recipes.terminal.plan_tables import full_plan_table, plan_table
from adderkit.recipes.terminal.tables import metrics_table, show
from adderkit.recipes.training.evaluate import Metrics
from adderkit.recipes.verbs.finetune import summary_table

METRICS = Metrics(top1=98.765, top5=99.999, loss=0.12345, images=360, images_per_second=1234.5)


@pytest.fixture
def shown(capsys):
    def text(table):
        show(table)
        captured = capsys.readouterr()
        assert captured.err == ""
        assert "…" not in captured.out
        return captured.out

    return text


@pytest.fixture
def model():
    return timm.create_model("cifar_resnet20")


def test_plan(shown, model):
    made = plan(model, AdderConfig(exclude=("re:features\\.[345].*",)))
    text = shown(full_plan_table(made))
    for row in made.rows:
        assert row.path in text
        assert row.reason in text
        assert f"{row.products:,}" in text
    assert "fidelity" not in text


def test_plan_with_fidelity(shown, model):
    made = plan(model)
    path = made.paths("convert")[0]
    report = CalibrationReport(CalibrationConfig(), 64, 64, (LayerFidelity(path, 0.98765, 0.5, 0.125),), "cpu")
    text = shown(full_plan_table(made, report))
    (line,) = [line for line in text.splitlines() if path in line.split()]
    assert "0.988" in line
    assert "12.5 %" in line


def test_plan_with_several_terms(capsys, shown, model):
    made = plan(model, AdderConfig(terms={"features.2.*": 3, "features.3.conv1": 2}))
    lines = {line[0]: line[-8] for line in cells(shown(full_plan_table(made))) if "convert" in line}
    terms = {row.path: str(row.terms) for row in made.rows if row.decision == "convert"}
    assert {path: lines[path] for path in terms} == terms
    assert "terms" not in shown(full_plan_table(plan(model)))
    show(plan_table(made))
    assert [line[-6:-3] for line in cells(capsys.readouterr().out) if "adder" in line] == [
        ["adder", "1", "2"],
        ["adder", "3", "2"],
        ["adder", "2", "1"],
        ["adder", "1", "15"],
    ]


def cells(text):
    return [line.replace("│", " ").replace("->", "").split() for line in text.splitlines() if line.startswith("│")]


def test_plan_in_short(capsys, model):
    """Neighbors that share decision and reason share a row, and the table fits into 80 to 120 columns."""
    show(plan_table(plan(model)))
    out = capsys.readouterr().out
    assert max(map(len, out.rstrip().splitlines()[1:])) <= 100
    rows = [line.replace("│", " ").split() for line in out.splitlines() if line.startswith("│")]
    assert rows == [
        ["features.0.0", "unchanged", "1", "first", "convolution"],
        ["features.1.conv1", "…", "features.9.conv2", "adder", "20", "followed", "by", "BatchNorm2d"],
        ["fc", "unchanged", "1", "classifier"],
    ]


def test_plan_in_short_with_fidelity(shown, model):
    made = plan(model)
    layers = tuple(LayerFidelity(path, 0.98765, 0.5, 0.125) for path in made.paths("convert")[:2])
    text = shown(plan_table(made, CalibrationReport(CalibrationConfig(), 64, 64, layers, "cpu")))
    for row in made.rows:
        (line,) = [line for line in text.splitlines() if row.path in line.split()]
        assert ("0.988" in line) == (row.path in made.paths("convert")[:2])


def test_metrics(shown):
    text = shown(metrics_table([("net", METRICS)]))
    for cell in ("net", "98.77", "100.00", "0.1235", "360", "1234"):
        assert cell in text


@pytest.mark.parametrize("name", ["runs/net[best]/last", "[red]net", "n" * 80])
def test_a_model_s_name_is_shown_as_it_is(shown, name):
    assert name in shown(metrics_table([(name, METRICS)]))


def test_summary(shown):
    row = {"epoch": 0, "train_loss": 2.34567, "eval_loss": 1e-5, "eval_top1": 10.0, "eval_top5": 50.0, "lr": 0.05}
    text = shown(summary_table([row, {**row, "epoch": 11}]))
    for cell in ("train loss", "eval top1", "2.346", "1e-05", "0.05", "11"):
        assert cell in text


def test_summary_of_nothing(shown):
    assert shown(summary_table([])).split() in ([], ["run", "summary"])
