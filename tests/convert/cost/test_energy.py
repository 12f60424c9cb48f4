"""Energy by Horowitz's table, against figures worked out by hand."""

import pytest

from adderkit.convert.cost.energy import PRECISIONS, arithmetic_energy, memory_energy
from adderkit.convert.cost.operations import Operations


@pytest.mark.parametrize(
    ("name", "product", "distance"),
    [
        ("fp32", 4.6, 1.8),  # 3.7 + 0.9, 2 · 0.9
        ("fp16", 2.0, 1.3),  # 1.1 + 0.9, 0.4 + 0.9
        ("int8", 0.3, 0.13),  # 0.2 + 0.1, 0.03 + 0.1
    ],
)
def test_energy_of_a_term(name, product, distance):
    assert arithmetic_energy(Operations(products=1000), PRECISIONS[name]) == pytest.approx(1000 * product)
    assert arithmetic_energy(Operations(distances=1000), PRECISIONS[name]) == pytest.approx(1000 * distance)


@pytest.mark.parametrize(("name", "energy"), [("fp32", 3.7 + 0.9), ("fp16", 3.7 + 0.9), ("int8", 3.1 + 0.1)])
def test_normalizations_work_on_sums(name, energy):
    assert arithmetic_energy(Operations(scalings=1, sums=1), PRECISIONS[name]) == pytest.approx(energy)


def test_functions_have_no_price():
    assert arithmetic_energy(Operations(functions=10), PRECISIONS["fp32"]) == 0


def test_memory_by_accesses_of_64_bits():
    assert memory_energy(16) == {"sram_1mb": 200, "dram_least": 2600, "dram_most": 5200}
