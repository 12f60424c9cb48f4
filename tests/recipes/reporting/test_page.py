"""The report page: what stands in it, where it is written, and what of somebody else's files gets into it."""

import base64
import html.parser
import json
import math
import re
import shutil

import pytest
import timm
import torch

import adderkit
from adderkit.convert.checkpoint.report import read_report
from adderkit.convert.model_source import ModelSource
from adderkit.convert.quantization.quantize import quantize
from adderkit.recipes.configs.recipe import Recipe
from adderkit.recipes.reporting.facts import gather
from adderkit.recipes.reporting.page import page
from adderkit.recipes.training.models import Job

VOID = {"meta", "link", "img"}
TAGS = """
html head meta link title style body header h1 h2 h3 p dl div dt dd nav a main section table thead tbody tr th td span
ol ul li code pre strong svg rect line polyline circle text figure figcaption img
"""
HOSTILE = "<img src=x onerror=alert(1)>\"'&</style></title><script>1</script>"


class Page(html.parser.HTMLParser):
    """A page taken apart; elements must be closed in the order in which they were opened."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.words, self.style = [], set(), [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += [(tag, *pair) for pair in attributes]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "style":
            self.style += data
        else:
            self.words.append(data)

    def values(self, name):
        return [value for _, key, value in self.attributes if key == name]


def check_safe(found):
    """Only elements of ours, nothing that runs, and nothing from elsewhere."""
    assert found.tags <= set(TAGS.split())
    assert not [key for _, key, _ in found.attributes if key.startswith("on") or key in ("style", "srcset", "action")]
    assert all(value.startswith("#") or value == "data:," for value in found.values("href"))
    assert all(value.startswith("data:image/png;base64,") for value in found.values("src"))
    assert not re.search(r"url\(|@import|expression", found.style)
    policy = next(value for value in found.values("content") if "default-src" in value)
    assert policy.split("; ")[:3] == ["default-src 'none'", "img-src data:", "style-src 'unsafe-inline'"]


@pytest.fixture
def saved(adder_folder, tmp_path):
    """A copy of the adder network, as a run has it, but without the run's files."""
    return shutil.copytree(adder_folder, tmp_path / "mine" / "best")


@pytest.fixture
def report():
    """Gather and take apart the page that comes of it; facts and page."""

    def make(folder, **options):
        facts = gather(Job(ModelSource(str(folder))), **options, device=torch.device("cpu"), announce=lambda line: None)
        return facts, Page(page(facts))

    return make


def change_report(folder, **facts):
    path = folder / "adder_report.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **facts}))


# What stands in it


def test_page_of_an_adder_network(report, saved):
    _, found = report(saved)
    check_safe(found)
    known, cost = read_report(saved), adderkit.cost(adderkit.load(saved))
    for count in (cost.honest_before, cost.honest, cost.headline_before, cost.headline):
        assert f" {count.multiplications:,} " in found.text
        assert f" {count.additions:,} " in found.text
    assert f" area in transistors, integers {cost.cnn_area(8):,.0f} {cost.area:,.0f} " in found.text
    assert f"as much area as the CNN with {round(cost.equal_weight_bits, 1):g}-bit weights" in found.text
    assert "3 of 22 convolutions are adder layers" in found.text
    assert f"{cost.parameters:,} parameters" in found.text
    for row in known.plan["rows"]:
        assert row["path"] in found.text
        assert row["reason"] in found.text
    assert " convolution matches no include pattern 19 " in found.text
    assert known.sha256 in found.text
    assert "Unknown, since the model was not calibrated" in found.text
    assert "adderkit evaluate DIR --dataset NAME --record" in found.text
    assert "adderkit report DIR --dataset NAME" in found.text


def test_page_names_terms(report, tmp_path):
    model = timm.create_model("cifar_resnet20")
    adderkit.convert_(model, adderkit.AdderConfig(include=("features.1.*",), terms={"*.conv2": 3}))
    _, found = report(adderkit.save(model, tmp_path / "net"))
    assert "3x3, 16 → 16 channels, 3 terms per weight" in found.text
    assert found.text.count("terms per weight") == 1


def test_layers_of_the_chart_add_up(report, saved):
    """The bars' labels name every multiplication of the model, before and after."""
    _, found = report(saved)
    cost = adderkit.cost(adderkit.load(saved))
    labels = [
        re.search(r": ([\d,]+) multiplications as a CNN, ([\d,]+) now", text) for text in found.values("aria-label")
    ]
    counts = [[int(number.replace(",", "")) for number in label.groups()] for label in labels if label]
    assert len(counts) == len(cost.weight_layers)
    assert [sum(column) for column in zip(*counts, strict=True)] == [
        cost.honest_before.multiplications,
        cost.multiplications,
    ]


def test_fidelity_evaluations_and_commands(report, saved, cnn_folder):
    paths = [row["path"] for row in read_report(saved).plan["rows"] if row["decision"] == "convert"]
    layers = [
        {"path": path, "correlation": 0.9 + index / 100, "worst": 0.5, "beyond_range": 0.1}
        for index, path in enumerate([*paths, "nowhere"])
    ]
    teacher = shutil.copytree(cnn_folder, saved.parent.parent / "cnn")
    for folder, top1 in ((saved, 91.25), (teacher, 93.5)):
        entry = {"dataset": "digits", "split": "validation", "images": 1797, "top1": top1, "top5": 99.5}
        other = {**entry, "top1": 12.34, "sha256": "0" * 64}
        change_report(folder, evaluations=[{**entry, "sha256": read_report(folder).sha256}, other])
    commands = ["adderkit convert --model /home/ann/net"]
    config = {"steps": 3, "matching_steps": 2, "seed": 9}
    calibration = {"config": config, "images": 64, "layers": layers}
    change_report(saved, teacher=str(teacher), calibration=calibration, commands=commands)
    _, found = report(saved)
    for index, path in enumerate(paths):
        assert f"{path} {0.9 + index / 100:.3f}, worst 0.500" in found.text
    assert "nowhere" not in found.text
    assert (
        "teacher digits, validation 1,797 93.50 99.50 adder network digits, validation 1,797 91.25 99.50" in found.text
    )
    assert "12.34" not in found.text
    assert "64 unlabeled images: 3 steps for each layer, 2 steps for all layers together, seed 9." in found.text
    assert "adderkit convert --model net" in found.text
    assert str(teacher.parent) not in found.text


def test_pruned_network(report, adder_folder, tmp_path):
    model = adderkit.load(adder_folder)
    config = adderkit.PruneConfig(target="adds=60%", importance="magnitude")
    pruned = adderkit.prune_(model, config, torch.randn(32, 1, 8, 8))
    folder = adderkit.save(
        model, tmp_path / "small", read_report(adder_folder).after("prune", pruning=pruned.to_dict())
    )
    facts, found = report(folder)
    check_safe(found)
    assert "cifar_resnet20, pruned, as an adder network" in found.text
    assert "target adds=60%, importance magnitude, measured on 32 unlabeled images." in found.text
    for key, label in (("mults", "multiplications"), ("adds", "additions"), ("params", "parameters")):
        assert f"{label} {pruned.before[key]:,} {pruned.after[key]:,}" in found.text
    assert facts.cost.additions == pruned.after["adds"]
    assert f"energy in µJ, fp32 {pruned.before['energy'] / 1e6:.1f} {pruned.after['energy'] / 1e6:.1f}" in found.text
    change_report(folder, pruning={"before": {"adds": "x"}, "config": 5})
    _, found = report(folder)
    assert "amount not recorded, importance ?." in found.text


def test_page_of_an_integer_network(report, adder_folder, tmp_path):
    network = quantize(adderkit.load(adder_folder), torch.randn(16, 1, 8, 8))
    facts, found = report(adderkit.save(network, tmp_path / "int8"))
    check_safe(found)
    adders = sum(row.kind == "adder" for row in facts.cost.layers)
    assert adders > 1
    assert (
        f"cifar_resnet20 quantized to integers: {adders} of {len(facts.cost.weight_layers)} weight layers" in found.text
    )
    assert "as a CNN this model features" in found.text  # both bars of each layer


def test_page_of_a_cnn(report, cnn_folder):
    facts, found = report(cnn_folder)
    check_safe(found)
    assert "cifar_resnet20: a CNN." in found.text
    assert "adder" not in found.text.replace("adderkit", "").replace("as adder layers", "")
    assert f" {facts.cost.multiplications:,} {facts.cost.multiplications:,} " in found.text


def test_curves_of_the_run(report, saved):
    run = saved.parent
    (run / "args.yaml").write_text("job: {}\n")
    (run / "summary.csv").write_text(
        "epoch,train_loss,eval_loss,eval_top1,eval_top5,lr\n0,2,1.5,50,90,0.1\n1,nan,x,60,95,0.05\n2,1,1e999,70,96,0\n"
    )
    facts, found = report(saved)
    check_safe(found)
    assert facts.name == "mine/best"
    assert [row["eval_top1"] for row in facts.epochs] == [50, 60, 70]
    assert math.isnan(facts.epochs[1]["train_loss"])
    assert {"loss by epoch", "accuracy (%) by epoch", "learning rate by epoch"} <= set(found.values("aria-label"))
    points = [[tuple(map(float, pair.split(","))) for pair in line.split()] for line in found.values("points")]
    top1 = next(line for line in points if len(line) == 3 and line[0][1] > 100)
    (x0, y0), (x1, y1), (x2, y2) = top1
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2)
    assert y0 > y1


def test_predictions_side_by_side(report, saved):
    facts, found = report(saved, data=Recipe(dataset="digits"))
    check_safe(found)
    shown = [*facts.examples.first, *facts.examples.differing]
    assert [base64.b64decode(value.split(",")[1]) for value in found.values("src")] == [each.picture for each in shown]
    assert f"agree on {facts.examples.agreeing} of the 256" in found.text
    for each in shown:
        best = [f"{100 * guesses[0].probability:.1f} % {guesses[0].label}" for guesses in (each.student, each.teacher)]
        marks = ["" if best[0].label == each.truth else "✗ " for best in (each.student, each.teacher)]
        assert f"{each.truth} model teacher {marks[0]}{best[0]} {marks[1]}{best[1]}" in found.text


# What somebody else wrote


def test_hostile_names(report, adder_folder, tmp_path):
    folder = shutil.copytree(adder_folder, tmp_path / HOSTILE.replace("/", ""))
    (tmp_path / "args.yaml").write_text("job: {}\n")
    (tmp_path / "summary.csv").write_text(f"epoch,{HOSTILE}\n0,1\n")
    known = read_report(folder)
    rows = [{**row, "reason": HOSTILE + row["path"]} for row in known.plan["rows"]]
    entry = {"dataset": HOSTILE, "split": HOSTILE, "images": 1, "top1": 1.0, "top5": 2.0, "sha256": known.sha256}
    change_report(
        folder,
        plan={"rows": [*rows, {**rows[0], "path": HOSTILE}]},
        evaluations=[entry],
        commands=[f"adderkit convert {HOSTILE}", "a\u202eb\ud800\x00c"],
        versions={HOSTILE: HOSTILE},
        training={"recipe": {"dataset": HOSTILE, "lr": HOSTILE}},
        calibration={"images": HOSTILE, "layers": [{"path": HOSTILE, "correlation": 1, "worst": 1}]},
    )
    facts, found = report(folder)
    check_safe(found)
    assert found.text.count(HOSTILE) > len(facts.layers)
    assert "a�b��c" in found.text
    page(facts).encode()


@pytest.mark.parametrize(
    "damage",
    [
        {"plan": [], "calibration": 5, "training": "x", "versions": None, "commands": {"a": 1}, "evaluations": "x"},
        {"plan": {"rows": [1, None, {"path": 5}, {"path": "fc"}]}, "calibration": {"layers": {"a": 1}}},
        {
            "calibration": {
                "layers": [{"path": "features.4.conv1", "correlation": math.nan, "worst": "x"}],
                "seed": math.inf,
            }
        },
        {"training": {"recipe": {"lr": 10**400, "epochs": [1], "dataset": "x" * 10**6}}, "commands": ["x" * 10**6]},
        {"plan": {"rows": [{"path": "fc", "decision": "convert", "reason": ["x"]}]}},
        {"versions": {"a": "x" * 10**6}, "teacher": "\x00", "evaluations": [{"top1": True}]},
        {"teacher": "x" * 10**4},
        {"teacher": {"a": 1}},
    ],
)
def test_report_of_another_form(report, saved, damage):
    digest = read_report(saved).sha256
    odd = {"dataset": "d", "split": "s", "images": 10**400, "top1": 10**400, "top5": math.nan, "sha256": digest}
    change_report(saved, **{"evaluations": [odd], **damage})
    facts, found = report(saved)
    check_safe(found)
    assert len(facts.layers) == 22
    assert len(page(facts)) < 60_000


# Where it is written


def test_command_line(adder_kit, saved):
    status, out, err = adder_kit("report", saved, "--json")
    assert status == 0, err
    value, target = json.loads(out), saved.with_name("best-report.html")
    assert value["output"] == str(target)
    assert value["bytes"] == target.stat().st_size
    assert (value["converted_layers"], value["convolutions"], value["examples"]) == (3, 22, 0)
    assert sorted(path.name for path in saved.parent.iterdir()) == ["best", "best-report.html"]
    status, out, _ = adder_kit("report", saved, "--output", "mine.html")
    assert status == 0
    assert "mine.html" in out
    assert "add some with --dataset NAME" in out
    assert target.read_text() == (saved.parent.parent / "mine.html").read_text()


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("page.txt", "--output page.txt ends in '.txt', expected '.html'"),
        ("folder.html", "--output folder.html is a folder, expected a file"),
        ("file/page.html", "cannot write .*file is not a writable directory"),
        ("mine/last/page.html", "is inside .*mine/last, which is protected by checksums; give a file outside it"),
    ],
)
def test_places_that_are_refused(adder_kit, saved, tmp_path, output, message):
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "file").write_text("")
    (saved.parent / "last").mkdir()
    (saved.parent / "last" / "checksums.json").write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    status, out, err = adder_kit("report", saved, "--output", output)
    assert (status, out) == (1, "")
    assert re.search(f"^error: .*{message}", err)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_is_not_a_model(adder_kit, saved):
    (saved.parent / "args.yaml").write_text("job: {}\n")
    status, _, err = adder_kit("report", saved.parent)
    assert status == 1
    assert f"error: {saved.parent} is a run folder; report on its best model: {saved}" in err
