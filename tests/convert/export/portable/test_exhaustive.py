"""Kinds of steps: the exporters, the cost and the quantizer handle each, and fail on one that they do not know."""

import dataclasses
from typing import ClassVar, get_args

import pytest

from adderkit.adder_layers.integer.plan import IntegerPlan, Requantization, Rescale, Step
from adderkit.convert.cost import integer
from adderkit.convert.export.portable import c_source, c_steps, memory_images
from adderkit.convert.export.portable.arena import Arena

from .conftest import random_plans


@dataclasses.dataclass(frozen=True)
class Unknown:
    """A step of a kind that nothing handles, with the fields of a rescaling."""

    kind: ClassVar[str] = "unknown"

    input: int
    output: int
    requantization: Requantization


@pytest.fixture
def network():
    """A plan whose only step is of an unknown kind."""
    builder = random_plans.Builder(4, 5, 5)
    builder.rescale()
    step = builder.steps[0]
    assert isinstance(step, Rescale)
    unknown = Unknown(step.input, step.output, step.requantization)
    return IntegerPlan(tuple(builder.activations), (unknown,), ("path",))


DISPATCHERS = {
    "c_source._shared_parts": lambda network: c_source._shared_parts(network.steps[0]),
    "c_steps.tables": lambda network: list(c_steps.CSteps(network, "net", Arena({}, 0)).tables()),
    "c_steps.structs": lambda network: list(c_steps.CSteps(network, "net", Arena({}, 0)).structs()),
    "c_steps.calls": lambda network: list(c_steps.CSteps(network, "net", Arena({}, 0)).calls()),
    "memory_images._describe": lambda network: memory_images._describe(network.steps[0]),
    "cost.integer._row": lambda network: integer._row(network.steps[0], "path", network, 8),
}


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
def test_unknown_steps_fail(network, dispatcher):
    with pytest.raises(AssertionError, match="unreachable"):
        DISPATCHERS[dispatcher](network)


def test_each_kind_has_a_kernel():
    assert {cls.kind for cls in get_args(Step)} <= {path.stem for path in c_source._TEMPLATES.glob("kernels/*.c")}
