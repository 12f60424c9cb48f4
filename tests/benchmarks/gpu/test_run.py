"""The GPU benchmark's parts that need no GPU, and its timing code run on the CPU by the host's clock."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from adderkit.adder_layers.backends.triton import launch as launcher
from adderkit.adder_layers.backends.triton.tiles import Device
from benchmarks.cpu.layers import Layer
from benchmarks.gpu import integer as gpu_integer
from benchmarks.gpu import layers as gpu_layers
from benchmarks.gpu import run as gpu
from benchmarks.gpu import timing as gpu_timing
from benchmarks.gpu import training as gpu_training

LAYER = Layer("tiny", (2, 8, 6, 6), (8, 8, 3, 3), 1, 1, 1)
ROOT = Path(gpu.__file__).resolve().parents[2]


def host_timer(function):
    times = []
    for _ in range(3):
        started = time.perf_counter()
        function()
        times.append((time.perf_counter() - started) * 1e3)
    return times


@pytest.fixture
def report(tmp_path):
    clock = [0.0]
    made = gpu.Report(tmp_path / "deep" / "gpu.json", 2.0, lambda: clock[0])
    made.clock_hands = clock
    return made


def test_a_failing_section_is_recorded_and_the_next_one_runs(report):
    assert report.run("first", lambda: 1 / 0) is None
    assert report.run("second", lambda: {"value": 3}) == {"value": 3}
    written = json.loads(report.path.read_text())
    assert "ZeroDivisionError" in written["errors"]["first"]
    assert written["second"] == {"value": 3}


def test_what_there_is_no_time_for_is_left_out_and_named(report):
    report.clock_hands[0] = 100.0
    assert report.run("long", lambda: 1, needs=60.0) is None
    assert report.run("short", lambda: 1) == 1
    report.clock_hands[0] = 115.0
    report.run("late", lambda: 1)
    written = json.loads(report.path.read_text())
    assert written["left_out"] == ["long", "late"]
    assert "late" not in written


def test_junit_reports_are_summed_up():
    report = """<testsuites><testsuite>
      <testcase name="a"/><testcase name="b"><skipped message="none"/></testcase>
      <testcase name="c"><failure message="wrong">text</failure></testcase>
      <testcase name="d"><error message="broken">text</error></testcase>
    </testsuite></testsuites>"""
    result = gpu.counts([report, "<testsuites/>"], 5)
    assert (result["passed"], result["skipped"], result["failed"], result["unfinished"]) == (1, 1, 2, 1)
    assert result["failures"] == {"c": "wrong", "d": "broken"}


@pytest.mark.slow
def test_the_tests_are_found_and_run_in_shares():
    """Where there is no GPU they are skipped, and what is not there is counted all the same."""
    result = gpu.run_tests(300.0)
    assert result["collected"] > 40
    assert result["failed"] == result["unfinished"] == 0
    assert result["passed"] + result["skipped"] == result["collected"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="would measure")
def test_all_sections_are_run_and_failures_end_with_status_1(tmp_path, monkeypatch):
    """With a device that is not there: what needs one fails, is recorded, and does not stop the rest."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "run_tests", lambda seconds: {"passed": 3, "failed": 0, "unfinished": 0})
    for module, name, value in (
        (gpu_layers, "all_layers", lambda: [LAYER]),
        (gpu_layers, "compile_all", lambda layers: None),
        (gpu_training, "CASES", (gpu_training.Case("cifar_resnet20", 2, 32),)),
        (gpu_timing, "hardware", lambda: {"issue_limit_giga_terms_per_second": 1.0}),
        (gpu_timing, "GraphTimer", lambda: host_timer),
    ):
        monkeypatch.setattr(module, name, value)
    for module in (gpu_integer, gpu_layers, gpu_timing, gpu_training):
        monkeypatch.setitem(sys.modules, module.__name__.removeprefix("adderkit."), module)
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setattr(sys, "argv", ["run.py", "--json", str(tmp_path / "gpu.json")])
    import benchmarks

    for module in (gpu_integer, gpu_layers, gpu_timing, gpu_training):
        monkeypatch.setattr(benchmarks, module.__name__.rpartition(".")[2], module, raising=False)
    assert gpu.main() == 1
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert written["tests"]["passed"] == 3
    assert {name.split(maxsplit=1)[0] for name in written["errors"]} == {"training", "integer", "layer"}
    assert written["layers"] == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="would measure")
def test_without_a_device_it_says_so_in_one_line(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu" / "run.py"), "--json", str(tmp_path / "gpu.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "CUDA" in done.stderr


def test_the_issue_limit_of_an_h100():
    assert gpu_timing.issue_limit(132, 1755.0) == pytest.approx(14826.2, rel=1e-4)


def test_a_summary_is_ordered():
    assert gpu_timing.summary([5.0, 1.0, 2.0, 4.0, 3.0]) == {"p20": 1.8, "median": 3.0, "p80": 4.2}


@pytest.mark.parametrize("mode", gpu_layers.MODES)
def test_a_layer_is_measured_in_every_way(mode):
    row = gpu_layers.measure(LAYER, mode, host_timer, "cpu", 1e-3)
    assert set(row["functions"]) >= {
        f"{what} {kind}" for what in ("adder", "conv") for kind in ("forward", "input grad")
    }
    assert ("conv forward, tf32" in row["functions"]) == (mode == "fp32")
    assert row["functions"]["adder forward"]["share_of_issue_limit"] > 0
    assert row["terms"] == 2 * 36 * 8 * 72
    json.dumps(row)
    means = gpu_layers.geometric_means([row])
    assert set(means) == {f"{mode} {kind}, adder / conv" for kind in ("forward", "input grad", "weight grad")}


@pytest.mark.parametrize(("layer", "whole"), [(LAYER, True), (Layer("", (2, 9, 6, 6), (6, 3, 3, 3), 2, 1, 3), False)])
def test_quantized_layers_are_measured_beside_others(layer, whole, monkeypatch):
    """What a launch would do is prepared; only the kernel's run is left out."""
    launches = []
    monkeypatch.setattr(launcher, "device", lambda index: Device(132))
    monkeypatch.setattr(launcher.Launch, "run", lambda launch: launches.append(launch))
    result = gpu_integer.measure_all([layer, layer], host_timer, "cpu", 0.0)
    assert (len(result["layers"]), result["left_out"]) == (1, 1)
    row = result["layers"][0]
    assert {"adder uint8", "adder fp32", "conv fp16"} <= set(row["functions"])
    assert ("product int8" in row["functions"]) == whole
    assert row["terms"] == layer.terms
    assert {launch.kernel for launch in launches} == {"integer_tiled" if whole else "integer_direct"}
    json.dumps(result)


def test_layers_that_fail_or_come_too_late_are_named(report):
    broken = LAYER._replace(weight=(8, 7, 3, 3))

    def timer(function):
        report.clock_hands[0] += 12.0
        return host_timer(function)

    rows = gpu.measure_layers(report, [broken, LAYER, LAYER], timer, "cpu", None)
    assert [row["mode"] for row in rows] == ["fp32"]
    assert len(report.content["errors"]) == 2
    assert len(report.content["left_out"]) == 3
    assert report.content["geometric_means"]


def test_tf32_is_put_back():
    before = torch.backends.cudnn.allow_tf32
    with gpu_layers.tf32(not before):
        assert torch.backends.cudnn.allow_tf32 is not before
    assert torch.backends.cudnn.allow_tf32 is before


def test_each_shape_is_measured_once():
    layers = gpu_layers.all_layers(("resnet18", "resnet50"))
    assert len(layers) == len({tuple(layer)[1:] for layer in layers}) > 15
    assert sorted(gpu.spread(layers)) == sorted(layers)


@pytest.mark.parametrize("mode", ["fp32", "bf16"])
def test_a_training_step_is_measured(mode):
    case = gpu_training.Case("cifar_resnet20", 2, 32, mode)
    row = gpu_training.measure(case, "cpu", lambda: None)
    assert row["adder"]["milliseconds"]["median"] > 0
    assert row["cnn"]["images_per_second"] > 0
    assert row["time_ratio"] > 0
    json.dumps(row)
