"""A synthesized circuit as Yosys writes it: its transistors, its depth, and what it computes.

The simulation evaluates a gate for all input vectors at once: a wire is one Python integer with a bit for each vector.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from graphlib import TopologicalSorter
from typing import Any

# Transistors in static CMOS, the figures of Yosys's ``stat -tech cmos``.
TRANSISTORS = {
    "$_NOT_": 2,
    "$_NAND_": 4,
    "$_NOR_": 4,
    "$_AOI3_": 6,
    "$_OAI3_": 6,
    "$_AOI4_": 8,
    "$_OAI4_": 8,
    "$_NMUX_": 10,
    "$_MUX_": 12,
    "$_XOR_": 12,
    "$_XNOR_": 12,
    "$_DFF_P_": 16,
}

# Output of each gate; ``ones`` is the integer whose bits are all set.
_GATES: dict[str, Callable[[int, Mapping[str, int]], int]] = {
    "$_NOT_": lambda ones, pin: ones ^ pin["A"],
    "$_NAND_": lambda ones, pin: ones ^ (pin["A"] & pin["B"]),
    "$_NOR_": lambda ones, pin: ones ^ (pin["A"] | pin["B"]),
    "$_AOI3_": lambda ones, pin: ones ^ (pin["A"] & pin["B"] | pin["C"]),
    "$_OAI3_": lambda ones, pin: ones ^ ((pin["A"] | pin["B"]) & pin["C"]),
    "$_AOI4_": lambda ones, pin: ones ^ (pin["A"] & pin["B"] | pin["C"] & pin["D"]),
    "$_OAI4_": lambda ones, pin: ones ^ ((pin["A"] | pin["B"]) & (pin["C"] | pin["D"])),
    "$_NMUX_": lambda ones, pin: ones ^ (pin["S"] & pin["B"] | (ones ^ pin["S"]) & pin["A"]),
    "$_MUX_": lambda ones, pin: pin["S"] & pin["B"] | (ones ^ pin["S"]) & pin["A"],
    "$_XOR_": lambda ones, pin: pin["A"] ^ pin["B"],
    "$_XNOR_": lambda ones, pin: ones ^ pin["A"] ^ pin["B"],
}

Wire = int | str  # a number, or the constant "0", "1" or "x"


@dataclasses.dataclass(frozen=True)
class Gate:
    """A gate or register.

    Args:
        kind: Name of the cell.
        inputs: Wire at each input pin.
        output: Wire that it drives.
    """

    kind: str
    inputs: Mapping[str, Wire]
    output: Wire


class Netlist:
    """Gates, registers and ports of one flat module.

    Args:
        module: The module as ``write_json`` describes it.
    """

    def __init__(self, module: Mapping[str, Any]) -> None:
        self.ports: dict[str, tuple[str, list[Wire]]] = {
            name: (port["direction"], port["bits"]) for name, port in module["ports"].items()
        }
        cells = [_gate(cell) for cell in module["cells"].values()]
        self.registers = [cell for cell in cells if cell.kind == "$_DFF_P_"]
        drivers = {cell.output: cell for cell in cells if cell.kind != "$_DFF_P_"}
        needs = {output: [wire for wire in gate.inputs.values() if wire in drivers] for output, gate in drivers.items()}
        self.gates = [drivers[output] for output in TopologicalSorter(needs).static_order()]

    @property
    def transistors(self) -> int:
        """Number of transistors of gates and registers."""
        return sum(TRANSISTORS[cell.kind] for cell in [*self.gates, *self.registers])

    @property
    def levels(self) -> int:
        """Number of gates on the longest path."""
        depth: dict[Wire, int] = {}
        for gate in self.gates:
            depth[gate.output] = 1 + max(depth.get(wire, 0) for wire in gate.inputs.values())
        return max(depth.values(), default=0)

    def simulate(self, inputs: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
        """Compute the outputs for many input vectors.

        Args:
            inputs: Values of each input port except the clock, one per vector; and under the name of an output port
                that registers drive, the values that they hold.

        Returns:
            Values of each output port, one per vector; for registers, the values that they take next.
        """
        count = len(next(iter(inputs.values())))
        wires: dict[Wire, int] = {"0": 0, "1": (1 << count) - 1, "x": 0}
        for name, values in inputs.items():
            for place, wire in enumerate(self.ports[name][1]):
                wires[wire] = sum((value >> place & 1) << vector for vector, value in enumerate(values))
        for gate in self.gates:
            pins = {pin: wires[wire] for pin, wire in gate.inputs.items()}
            wires[gate.output] = _GATES[gate.kind](wires["1"], pins)
        wires |= {register.output: wires[register.inputs["D"]] for register in self.registers}
        outputs = {name: bits for name, (direction, bits) in self.ports.items() if direction == "output"}

        def value(bits: Sequence[Wire], vector: int) -> int:
            return sum((wires[wire] >> vector & 1) << place for place, wire in enumerate(bits))

        return {name: [value(bits, vector) for vector in range(count)] for name, bits in outputs.items()}


def _gate(cell: Mapping[str, Any]) -> Gate:
    connections = {pin: bits[0] for pin, bits in cell["connections"].items()}
    output = connections.pop("Q" if cell["type"] == "$_DFF_P_" else "Y")
    return Gate(cell["type"], connections, output)
