"""What a report's page is made of, as somebody else may have written it: report, curves and card of a run."""

import csv
import dataclasses
import html.parser
import io
import json
import shutil
from os import environ

import pytest
import timm
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import adderkit
from adderkit.convert.checkpoint.report import Report, read_report, write_report
from adderkit.convert.model_source import ModelSource
from adderkit.recipes.hub import publishing
from adderkit.recipes.hub.upload import Target
from adderkit.recipes.reporting import facts as reader
from adderkit.recipes.reporting.page import page
from adderkit.recipes.training.models import Job

fuzz = settings.get_profile(environ.get("ADDERKIT_FUZZ", "quick"))

HOSTILE = [
    "<script>x</script>",
    '" onload="x',
    "</style></title><img src=x>",
    "\ud800\x00\u202e",
    "---\n- a: b",
    "]](x)",
]
TEXTS = st.sampled_from([*HOSTILE, "../../up", "/home/x", "x" * 10**5, "1e999", "hf-hub:a/b", "folder"])
NUMBERS = st.integers(-2, 5) | st.sampled_from([10**9, 10**400, -(10**400)]) | st.floats()
KEYS = TEXTS | st.sampled_from(
    ["rows", "layers", "recipe", "dataset", "top1", "images", "teacher", "sha256", "metrics"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
COLUMNS = ["epoch", "train_loss", "eval_loss", "eval_top1", "eval_top5", "lr"]
CELLS = st.sampled_from(["", "nan", "inf", "1e999", "-1", "5", *HOSTILE]) | st.floats().map(str) | st.text(max_size=5)
MOST = 1 << 20  # characters of a page


class Vocabulary(html.parser.HTMLParser):
    """Elements with their attributes; a page of anything has none that an honest page has not."""

    def __init__(self, text):
        super().__init__()
        self.known = set()
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.known |= {(tag, None), *((tag, name) for name, _ in attributes)}


def table(rows):
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue()


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A run with a model that has been through everything that a report tells of."""
    torch.manual_seed(0)
    model = timm.create_model("cifar_resnet20", in_chans=1, pretrained_cfg_overlay={"input_size": (1, 8, 8)})
    adderkit.prune_(model, adderkit.PruneConfig(ratio=0.5, importance="random"))
    plan = adderkit.convert_(model, adderkit.AdderConfig(include=("features.4.*",)))
    paths = [path for path, layer in model.named_modules() if isinstance(layer, adderkit.AdderConv2d)]
    known = {
        "plan": plan.to_dict(),
        "calibration": {
            "config": {"steps": 3, "matching_steps": 2, "seed": 9},
            "images": 64,
            "layers": [{"path": path, "correlation": 0.9, "worst": 0.5, "beyond_range": 0.1} for path in paths],
        },
        "training": {"epoch": 2, "recipe": {"dataset": "digits", "epochs": 3, "lr": 0.1, "opt": "sgd", "seed": 0}},
        "metrics": {"validation": {"top1": 90.0, "top5": 99.0, "loss": 0.3, "images": 360}},
        "commands": ("adderkit convert --model net", "adderkit finetune net-adder"),
        "pruning": {
            "config": {"target": "adds=50%", "importance": "variance"},
            **{"images": 64, "before": {"adds": 9, "energy": 1.5}, "after": {"adds": 4, "energy": 0.5}},
        },
        "teacher": "resnet18",
        "source": "resnet18.a1_in1k",
    }
    run = tmp_path_factory.mktemp("saved") / "run"
    folder = adderkit.save(model, run / "best", Report(**known))
    entry = {"dataset": "digits", "split": "validation", "images": 360, "top1": 91.25, "top5": 99.5}
    report = read_report(folder)
    write_report(folder, dataclasses.replace(report, evaluations=({**entry, "sha256": report.sha256},)))
    (run / "args.yaml").write_text("job: {}\n")
    (run / "summary.csv").write_text(table([COLUMNS, *([epoch, 2, 1.5, 50, 90, 0.1] for epoch in range(3))]))
    return run


@pytest.fixture
def folder(run, place, monkeypatch):
    """A copy to damage. The model itself is loaded once: what is read here is what is told of it."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(run, place)
    model = adderkit.load(run / "best")
    cost = adderkit.cost(model)
    monkeypatch.setattr(reader, "load", lambda source: model)
    monkeypatch.setattr(reader, "cost", lambda model: cost)
    return place / "best"


def shown(folder):
    return page(reader.gather(Job(ModelSource(str(folder))), device=torch.device("cpu"), announce=lambda line: None))


@pytest.fixture
def check(folder, survives):
    """The page of the folder as it is now; whatever is written there, it has the elements of the honest one."""
    honest = Vocabulary(shown(folder)).known
    assert {("polyline", "points"), ("td", None)} < honest

    def compare():
        text = survives(lambda: shown(folder))
        assert text is None or len(text.encode()) < MOST
        assert text is None or Vocabulary(text).known <= honest

    return compare


@fuzz
@given(data=st.data())
def test_changed_or_damaged_report(data, changed, damaged, run, folder, check):
    valid = json.loads((run / "best" / "adder_report.json").read_text())
    text = json.dumps(data.draw(changed(valid, KEYS, VALUES))).encode()
    (folder / "adder_report.json").write_bytes(data.draw(st.just(text) | damaged(text)))
    check()


@fuzz
@given(
    header=st.lists(st.sampled_from(COLUMNS) | CELLS, max_size=7),
    rows=st.lists(st.lists(CELLS, max_size=8), max_size=4),
    data=st.data(),
)
def test_curves_of_any_cells(header, rows, data, damaged, folder, check):
    text = table([header, *rows]).encode(errors="surrogatepass")
    (folder.parent / "summary.csv").write_bytes(data.draw(st.just(text) | damaged(text)))
    check()


PUBLISHED = {*("library_name", "tags", "pipeline_tag", "license", "license_name", "license_link", "base_model")}
HEADINGS = {"# net", "## Cost of one 1x8x8 image", "## Accuracy", "## How it was made", "## Limits", "## Citation"}
PUBLISHED |= {*("base_model_relation", "datasets", "metrics", "model-index")}


@fuzz
@given(data=st.data())
def test_card_of_a_changed_report(data, changed, run, folder, survives, monkeypatch):
    """Its front matter has the keys of ours, and its text no element of HTML and no heading that others wrote."""
    monkeypatch.setattr(publishing, "load", lambda source: reader.load(source))
    monkeypatch.setattr(publishing, "cost", lambda model: reader.cost(model))
    monkeypatch.setattr(publishing, "draw_chart", lambda cost, target, title: target.write_bytes(b""))
    for name in ("adder_report.json", "config.json"):
        valid = json.loads((run / "best" / name).read_text())
        (folder / name).write_text(json.dumps(data.draw(changed(valid, KEYS, VALUES) | st.just(valid))))
    built, license = folder.parent / "built", data.draw(st.none() | st.just("mit"))
    shutil.rmtree(built, ignore_errors=True)
    job = publishing.PublishJob(str(folder), Target("ann/net"), str(built), license, dry_run=True)
    if survives(lambda: publishing.run_publish(job, lambda line: None)) is None:
        return
    _, front, text = (built / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front).keys() <= PUBLISHED
    assert len(text) < MOST
    outside = "".join(text.split("```")[::2])
    assert "<" not in outside.replace("\\<", "")
    assert {line for line in text.splitlines() if line.startswith("#")} <= HEADINGS
