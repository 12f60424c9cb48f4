"""Transistors of the arithmetic of convolutions and adder layers, by logic synthesis. Needs Yosys.

    apt-get install yosys
    python -m benchmarks.gates.arithmetic --json docs/results/gates.json

Takes about five minutes. ``docs/hardware.md`` describes the method; ``convert/cost/area.py`` has the figures that the
cost model uses.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from adderkit.convert.files import write_json

from .circuits import (
    SUM_BITS,
    TERMS,
    Circuit,
    addition,
    distances,
    max_min,
    maxima,
    products,
    requantize_multiplier,
    requantize_shift,
)
from .synthesis import MAPPINGS, VECTORS, synthesize, yosys_version

ACTIVATION_BITS = (8, 6, 5, 4)
WEIGHT_BITS = (8, 7, 6, 5, 4, 3, 2)
TERM_COUNTS = (2, 3, 4)
MULTIPLIER_BITS = (32, 16, 8)


def circuits() -> Iterator[Circuit]:
    """List the circuits of the table."""
    for bits in ACTIVATION_BITS:
        yield from (products(bits, weight_bits) for weight_bits in WEIGHT_BITS)
        yield distances(bits)
    yield from (distances(terms=terms) for terms in TERM_COUNTS)
    yield from (max_min(), maxima(), addition(), requantize_shift())
    yield from map(requantize_multiplier, MULTIPLIER_BITS)


def main() -> None:
    """Synthesize the circuits and write their figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("docs/results/gates.json"))
    arguments = parser.parse_args()
    rows = []
    for circuit in circuits():
        row: dict[str, Any] = {"circuit": circuit.module, "parameters": dict(circuit.parameters)}
        rows.append(row | synthesize(circuit))
        print(_line(rows[-1]), flush=True)
    method = {"yosys": yosys_version(), "mappings": MAPPINGS, "terms": TERMS, "sum_bits": SUM_BITS, "vectors": VECTORS}
    write_json(arguments.json, {**method, "rows": rows})


def _line(row: dict[str, Any]) -> str:
    parameters = " ".join(f"{name}={value}" for name, value in row["parameters"].items())
    figures = (f"{name}: {row[name]['transistors']:,} transistors, {row[name]['levels']} levels" for name in MAPPINGS)
    return f"{row['circuit']} {parameters}: {'; '.join(figures)}"


if __name__ == "__main__":
    main()
