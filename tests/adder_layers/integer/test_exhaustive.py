"""Kinds of steps: whatever dispatches on them handles each, and fails on one that it does not know."""

import ast
import dataclasses
from pathlib import Path
from typing import ClassVar, get_args

import pytest
import torch

import adderkit
from adderkit.adder_layers.integer import check, cpu_engine, plan, record, reference
from adderkit.adder_layers.integer.cuda_engine import CudaEngine
from adderkit.adder_layers.integer.plan import IntegerPlan, Step
from tests.adder_layers.integer.random_plans import residual_network

ROOT = Path(adderkit.__file__).parent
FOLDERS = ("adder_layers/integer", "convert/cost", "convert/export/portable", "convert/quantization")


@dataclasses.dataclass(frozen=True)
class Unknown:
    """A step of a kind that nothing handles, with the fields of a rescaling."""

    kind: ClassVar[str] = "unknown"

    input: int
    output: int
    requantization: plan.Requantization


@pytest.fixture
def unknown():
    builder = residual_network()
    rescale = next(step for step in builder.steps if isinstance(step, plan.Rescale))
    return Unknown(rescale.input, rescale.output, rescale.requantization), builder.plan()


def test_the_network_of_the_tests_has_all_kinds():
    assert {type(step) for step in residual_network().plan().steps} == set(get_args(Step))


def test_kinds_have_names_of_their_own():
    assert len({cls.kind for cls in get_args(Step)}) == len(get_args(Step))


def values_of(network):
    return {number: torch.zeros(1, a.height, a.width, a.channels) for number, a in enumerate(network.activations)}


DISPATCHERS = {
    "plan.requantization_of": lambda step, network: plan.requantization_of(step),
    "plan.step_tensors": lambda step, network: plan.step_tensors(step),
    "plan.reads": lambda step, network: plan.reads(step),
    "check.extremes": lambda step, network: check.extremes(step),
    "check._check_shapes": lambda step, network: check._check_shapes(step, network.activations, "step"),
    "record._step_structure": lambda step, network: record._step_structure(step, "path"),
    "record._with_tensors": lambda step, network: record._with_tensors(step, "steps.0.", {}),
    "reference.run_step": lambda step, network: reference.run_step(step, network.activations, values_of(network)),
    "reference.step_sums": lambda step, network: reference.step_sums(step, torch.zeros(1), network.activations[0]),
    "cpu_engine.terms": lambda step, network: cpu_engine.terms(step, network),
}


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
def test_unknown_steps_fail(unknown, dispatcher):
    with pytest.raises(AssertionError, match="unreachable"):
        DISPATCHERS[dispatcher](*unknown)


def test_unknown_steps_fail_on_a_gpu(unknown):
    pytest.importorskip("triton")
    step, network = unknown
    engine = object.__new__(CudaEngine)
    engine.plan = network
    with pytest.raises(AssertionError, match="unreachable"):
        engine._run_step(step, values_of(network))


def test_unknown_kinds_are_not_read():
    structure = record.structure_of(residual_network().plan())
    structure["steps"][0]["kind"] = Unknown.kind
    with pytest.raises(ValueError, match="kind of step 0 is 'unknown', which this version does not know"):
        record.empty_plan(structure)


@pytest.mark.parametrize("cls", get_args(Step), ids=lambda cls: cls.kind)
def test_each_kind_survives_its_record(cls):
    network = residual_network().plan()
    step = next(step for step in network.steps if isinstance(step, cls))
    again = record.empty_plan(record.structure_of(IntegerPlan(network.activations, (step,), ("path",)))).steps[0]
    assert type(again) is cls
    assert {name: tensor.shape for name, tensor in plan.step_tensors(again).items()} == {
        name: tensor.shape for name, tensor in plan.step_tensors(step).items()
    }


@pytest.mark.parametrize("path", [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py"))], ids=str)
def test_every_match_ends_in_assert_never(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Match):
            last = ast.unparse(node.cases[-1])
            assert last.startswith("case _:"), f"line {node.lineno}"
            assert "assert_never(" in last, f"line {node.lineno}"


@pytest.mark.parametrize("function", ["_kind", "_window", "_groups"])
def test_unknown_steps_are_not_handed_to_cpp(unknown, function):
    pytest.importorskip("adderkit.adder_layers._cpu")
    from adderkit.adder_layers.integer import cpu_network

    step, network = unknown
    arguments = {"_kind": (step,), "_window": (step, network), "_groups": (step, 4)}[function]
    with pytest.raises(AssertionError, match="unreachable"):
        getattr(cpu_network, function)(*arguments)
