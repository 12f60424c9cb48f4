"""``adderkit bench``: what it prints and refuses. That profiles count right is tested with the engine."""

import pytest
import torch
from torch import nn

import adderkit
from adderkit.adder_layers.integer import cpu_engine as engine
from adderkit.convert.errors import AdderkitError
from adderkit.convert.model_source import ModelSource
from adderkit.recipes.terminal.tables import show
from adderkit.recipes.verbs import bench
from adderkit.recipes.verbs.bench import BenchResult, bench_tables, run_bench

MILLISECONDS = list(range(1, 12))


@pytest.fixture(scope="module")
def integer_folder(tmp_path_factory, cnn_folder):
    """``cnn_folder`` quantized, the first convolution in fp32."""
    model = adderkit.load(cnn_folder)
    network = adderkit.quantize(model, torch.randn(16, 1, 8, 8), adderkit.QuantizeConfig(first_last="fp32"))
    return adderkit.save(network, tmp_path_factory.mktemp("integers") / "int8")


@pytest.fixture(autouse=True)
def few_runs(monkeypatch):
    monkeypatch.setattr(bench, "_MOST_RUNS", 6)


class Clock:
    """Passes of 1, 2, … 11 milliseconds, as ``time.perf_counter`` would tell them."""

    def __init__(self):
        self.now, self.left = 0.0, iter(MILLISECONDS)

    def pass_by(self, *_):
        self.now += 1e-3 * next(self.left, 0)

    def perf_counter(self):
        return self.now


def test_quantiles_of_known_latencies(monkeypatch):
    """Of 1 to 11 ms, 20 % of the way lies 3, half 6, 80 % 9 (linear interpolation); the first pass does not count."""
    clock = Clock()
    monkeypatch.setattr(bench, "time", clock)
    monkeypatch.setattr(bench, "_MOST_RUNS", len(MILLISECONDS))
    seen = []

    class Slow(nn.Module):
        def __init__(self):
            super().__init__()
            self.pretrained_cfg = {"input_size": (2, 5, 4)}

        def forward(self, x):
            if seen:
                clock.pass_by()
            seen.append((tuple(x.shape), self.training, torch.is_grad_enabled()))
            return x

    monkeypatch.setattr(ModelSource, "build", lambda self, weights: Slow())
    found = run_bench("slow", 3)
    assert (found.p20, found.p50, found.p80) == pytest.approx((3, 6, 9))
    assert found.images_per_second == pytest.approx(3 / 6e-3)
    assert (found.model, found.batch_size, found.threads, found.runs) == ("slow", 3, torch.get_num_threads(), 11)
    assert set(seen) == {((3, 2, 5, 4), False, False)}
    assert found.steps == ()


def test_a_name_is_built_without_weights(monkeypatch):
    asked = []
    build = ModelSource.build
    monkeypatch.setattr(ModelSource, "build", lambda self, **how: asked.append((self.name, how)) or build(self, **how))
    assert run_bench("cifar_resnet20", 1).runs >= 5
    assert asked == [("cifar_resnet20", {"weights": False})]


def test_one_json_object(json_of, adder_folder):
    found = json_of("bench", adder_folder, "--batch-size", 2)
    assert set(found) == {f.name for f in BenchResult.__dataclass_fields__.values()}
    assert 0 < found["p20"] <= found["p50"] <= found["p80"]
    assert (found["model"], found["batch_size"], found["steps"]) == (str(adder_folder), 2, [])


def test_profile_has_a_row_for_each_step(json_of, integer_folder):
    plan = adderkit.load(integer_folder).plan
    steps = json_of("bench", integer_folder, "--profile")["steps"]
    assert [step["path"] for step in steps] == ["", *plan.paths]
    assert [step["kind"] for step in steps] == ["read", *(step.kind for step in plan.steps)]
    weighted = [getattr(step, "weight", None) is not None for step in plan.steps]
    assert [step["giga_terms_per_second"] > 0 for step in steps] == [False, *weighted]
    assert all(step["seconds"] >= 0 for step in steps)


def test_tables_for_people(adder_kit, integer_folder):
    status, out, err = adder_kit("bench", integer_folder, "--profile", "-b", 2)
    assert (status, err) == (0, "")
    assert f"batch of 2 on cpu, {torch.get_num_threads()} threads, " in out
    for word in ("p20 ms", "p50 ms", "p80 ms", "images/s", "(image)", "giga-terms/s", "profile of one pass"):
        assert word in out


def test_shares_add_up(capsys):
    steps = tuple(engine.StepTime(f"layer[{n}]", "adder", n * 1e-3, 10.0 * (n - 1)) for n in (1, 3, 4))
    for table in bench_tables(BenchResult("net", 1, "cpu", 1, 5, 7.5, 8.0, 8.5, 1250.0, steps)):
        show(table)
    out = capsys.readouterr().out
    assert [share in out for share in ("12.5 %", "37.5 %", "50.0 %")] == [True] * 3
    assert "layer[3]" in out  # a path is no markup
    assert "1,250.0" in out


def test_a_float_network_has_no_profile(fails, adder_folder):
    line = fails("bench", adder_folder, "--profile")
    command = f"adderkit quantize {adder_folder} --dataset NAME"
    assert line == f"{adder_folder} is not quantized, which --profile needs; first: {command}"


def test_no_profile_without_the_extension(integer_folder, monkeypatch):
    monkeypatch.setenv("ADDERKIT_CPU", "torch")
    with pytest.raises(AdderkitError, match="has no profile; install adderkit with a compiler"):
        run_bench(str(integer_folder), 1, profile=True)


def test_wrong_input_is_one_line(fails, misused, tmp_path):
    assert "no_such_net" in fails("bench", "no_such_net")
    (tmp_path / "empty").mkdir()
    assert "empty" in fails("bench", "local-dir:empty")
    assert "greater than or equal to 1" in misused("bench", "cifar_resnet20", "--batch-size", 0)
    assert "Missing argument" in misused("bench")
