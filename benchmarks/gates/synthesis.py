"""Logic synthesis with Yosys and abc, and the check that the gates compute what the circuit should."""

import json
import subprocess
import tempfile
from pathlib import Path

from .circuits import Circuit
from .netlist import Netlist

VECTORS = 1000

# What abc does: Yosys's default script, which minimizes the depth first, and one that minimizes the area alone.
MAPPINGS = {
    "fast": "abc -g cmos",
    "small": "abc -g cmos -script +strash;ifraig;scorr;dc2;dc2;strash;dch;amap,-m",
}


def yosys_version() -> str:
    """Return the version of the installed Yosys."""
    return subprocess.run(["yosys", "-V"], check=True, capture_output=True, text=True).stdout.strip()


def synthesize(circuit: Circuit) -> dict[str, dict[str, int]]:
    """Synthesize a circuit with each mapping, and check the gates.

    Returns:
        Transistors and levels by mapping.

    Raises:
        subprocess.CalledProcessError: If Yosys fails.
        ValueError: If the gates compute something else.
    """
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "synthesize.ys"
        script.write_text("\n".join(_script(circuit, Path(folder))) + "\n")
        subprocess.run(["yosys", "-q", "-s", str(script)], check=True, capture_output=True, text=True, cwd=folder)
        found = {name: (Path(folder) / f"{name}.json").read_text() for name in MAPPINGS}
    netlists = {name: Netlist(json.loads(text)["modules"][circuit.module]) for name, text in found.items()}
    for name, netlist in netlists.items():
        check(circuit, netlist, name)
    return {name: {"transistors": each.transistors, "levels": each.levels} for name, each in netlists.items()}


def check(circuit: Circuit, netlist: Netlist, mapping: str) -> None:
    """Compare gates with the circuit on random vectors.

    Raises:
        ValueError: If an output differs.
    """
    vectors = circuit.vectors(VECTORS)
    outputs = netlist.simulate({name: [vector[name] for vector in vectors] for name in circuit.inputs})
    for number, vector in enumerate(vectors):
        expected = circuit.compute(vector)
        result = {name: values[number] for name, values in outputs.items()}
        if result != expected:
            raise ValueError(f"{circuit.module}, {mapping}: {vector} gives {result}, expected {expected}")


def _script(circuit: Circuit, folder: Path) -> list[str]:
    settings = [f"-set {name} {value}" for name, value in circuit.parameters.items()]
    lines = [f"read_verilog {circuit.verilog}"]
    if settings:
        lines.append(f"chparam {' '.join(settings)} {circuit.module}")
    lines += [f"synth -flatten -noabc -top {circuit.module}", "design -save generic"]
    for name, mapping in MAPPINGS.items():
        lines += ["design -load generic", mapping, "opt_clean", f"write_json {folder / name}.json"]
    return lines
