"""What several terms of a weight are for: how close their sum comes to a convolution's weight, which is a slope.

    python -m benchmarks.accuracy.terms --picture docs/images/terms.png

Prints the error for weights drawn from a normal distribution, and draws three panels. The input is a normal variable
after a ReLU.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from adderkit.adder_layers.geometry import term_factors
from adderkit.convert.calibration.start import place_terms, slope_table

TERMS = (1, 2, 3, 4)
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")


def values() -> Tensor:
    """Return values of an input, ``[S]``."""
    return torch.randn(2048, generator=torch.Generator().manual_seed(0), dtype=torch.float64).relu()


def errors(input: Tensor, slopes: Tensor, terms: int) -> Tensor:
    """Return the error of the best terms for slopes ``[Q]``, as a share of the variance of ``slope · x`` at slope 1.

    Slopes are in units of the largest that the terms reach together, so that networks of different T compare.
    """
    reach = 2 - 2.0 ** (1 - terms)
    placed = place_terms(slope_table(input[None, :, None], 1), slopes[None, :, None] * reach, terms, 1)[0, :, :, 0]
    factors = term_factors(terms, input)
    sums = -((input - placed[..., None]).abs() * factors[:, None]).sum(1) / reach  # [Q, S]
    return (sums - slopes[:, None] * input).var(1, correction=0) / input.var(correction=0)


def best_error(input: Tensor, weights: Tensor, terms: int) -> float:
    """Return the error for weights ``[Q]`` at the best scale, as a share of the variance of their products."""
    power = weights.square().mean()
    scales = torch.logspace(-0.3, 1, 27, base=2, dtype=torch.float64) * weights.std()
    return min(
        float(
            errors(input, (weights / scale).clamp(-1, 1), terms).mean() * scale**2 / power
            + (weights.abs() - scale).clamp_min(0).square().mean() / power
        )
        for scale in scales
    )


def draw(input: Tensor, target: Path) -> None:
    """Draw single terms, sums of two terms, and the error by slope."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    single, double, error = figure.subplots(1, 3)
    x = torch.linspace(0, 1, 201, dtype=torch.float64)
    for weight, color in zip((0.0, 0.3, 0.7, 1.0), COLORS, strict=True):
        single.plot(x, -(x - weight).abs(), color=color, label=f"w = {weight:g}")
    single.set_title("one term: slope 1 up to w, then -1", fontsize="medium")
    for pair, color in zip(((1, 1), (1, 0), (0, 1), (0, 0)), COLORS, strict=True):
        total = -(x - pair[0]).abs() - (x - pair[1]).abs() / 2
        double.plot(x, total, color=color, label=f"w₀ = {pair[0]}, w₁ = {pair[1]}")
    double.set_title("two terms at the ends: slopes ±1.5, ±0.5", fontsize="medium")
    for axes in (single, double):
        axes.set_xlabel("x (range 0 to 1)")
        axes.set_ylabel("contribution to the output")
    slopes = torch.linspace(-1, 1, 401, dtype=torch.float64)
    for terms, color in zip(TERMS[:3], COLORS, strict=False):
        error.plot(slopes, 100 * errors(input, slopes, terms), color=color, label=f"T = {terms}")
    error.set_title("what is left of a weight", fontsize="medium")
    error.set_xlabel("slope, of the largest within reach")
    error.set_ylabel("error (% of the variance of x)")
    for axes in (single, double, error):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
        axes.spines[["top", "right"]].set_visible(False)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=110)


def main() -> None:
    """Print the errors, and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", type=Path, default=Path("docs/images/terms.png"))
    arguments = parser.parse_args()
    input = values()
    weights = torch.randn(512, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for terms in TERMS:
        print(f"T = {terms}: error {100 * best_error(input, weights, terms):.2f} % of the variance of the products")
    draw(input, arguments.picture)


if __name__ == "__main__":
    main()
