"""The sweep over timm: what is left to do, that no trial ends it, and the document."""

import json
import os

import pytest

from benchmarks.coverage import timm_sweep
from benchmarks.coverage.table import report
from benchmarks.coverage.timm_trial import trial

PLANNED = {"kind": "plan", "parameters": 10, "convolutions": 3, "converted": 2, "inserted": 1, "folded": 0}
PLANNED |= {"terms": 9, "converted_terms": 6, "skipped": {"first convolution": 1}}


def test_plans_come_first_and_are_not_repeated():
    names = ["resnet18", "resnet34", "vgg11"]
    assert list(timm_sweep.jobs(names, [], "none")) == [("plan", name) for name in names]
    lines = [{**PLANNED, "model": name} for name in names]
    assert list(timm_sweep.jobs(names, lines, "families")) == [("run", "resnet18"), ("run", "vgg11")]
    assert list(timm_sweep.jobs(names, lines, "small"))[-1] == ("run", "resnet34")
    done = [*lines, {"kind": "run", "model": "resnet18"}]
    assert list(timm_sweep.jobs(names, done, "families")) == [("run", "resnet34"), ("run", "vgg11")][1:]


def test_large_models_are_not_run():
    lines = [{**PLANNED, "model": "resnet18"}, {**PLANNED, "model": "resnet34", "parameters": 10**9}]
    assert list(timm_sweep.jobs(["resnet18", "resnet34"], lines, "small")) == [("run", "resnet18")]


def test_a_line_that_a_kill_cut_short_is_left_out(tmp_path):
    file = tmp_path / "results.jsonl"
    file.write_text(json.dumps(PLANNED) + '\n{"kind": "pl')
    assert timm_sweep.read(file) == [PLANNED]
    assert timm_sweep.read(tmp_path / "none") == []


@pytest.mark.parametrize(("name", "key"), [("test_resnet", "converted"), ("test_vit", "refused")])
def test_trials(name, key):
    assert key in trial("plan", name)
    line = trial("run", name)
    assert key in line
    assert "failure" not in line
    assert line["agreement"] in (True, None)


def test_a_trial_never_raises():
    assert "Unknown model" in trial("plan", "no_such_model")["failure"]


class Dying(timm_sweep.Worker):
    def _start(self):
        self.pipe, theirs = timm_sweep.multiprocessing.Pipe()
        context = timm_sweep.multiprocessing.get_context("fork")
        self.process = context.Process(target=os._exit, args=(1,), daemon=True)
        self.process.start()
        theirs.close()


def test_a_dead_process_is_a_failure_not_the_end():
    line = Dying(5).run_trial(("plan", "resnet18"))
    assert line == {"kind": "plan", "model": "resnet18", "failure": "the process died"}


def test_document():
    lines = [
        {**PLANNED, "model": "resnet18"},
        {"kind": "run", "model": "resnet18", "agreement": True},
        {"kind": "plan", "model": "vit", "convolutions": 1, "refused": "none of 1 convolutions …: first convolution"},
        {"kind": "plan", "model": "bad", "convolutions": 1, "failure": "RuntimeError: a|b"},
    ]
    text = report(lines, {"resnet": ["resnet18", "resnet34"], "vit": ["vit", "bad"]})
    assert "| resnet | 1 of 2 | 1 | 2 | 1 | 1 first convolution | 1 of 1 |" in text
    assert "| first convolution | 1 | vit |" in text
    assert "| bad | plan | RuntimeError: a/b |" in text
    assert "2 (66.67 %)" in text
