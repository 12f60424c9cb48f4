"""Start of a layer's fit: weights whose terms follow, on average, the slopes of the convolution's weights.

``-|x - w|`` has slope 1 for ``x`` below ``w`` and slope -1 above it. Over the values that an input channel takes, its
mean slope grows from -1 to 1 as ``w`` moves from the smallest value to the largest, where it is a line. The weight of a
convolution is a slope. With several terms, all but one are placed at an end of the range, and the remaining one inside,
where it gives the rest of the slope.
"""

from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

# Weights to try for each input channel: at quantiles of its values, and evenly over its range.
QUANTILES, STEPS = 49, 17
# Values of a channel to try them on, and slopes from -1 to 1 to choose the best weight for.
VALUES, SLOPES = 4096, 257


class SlopeTable(NamedTuple):
    """Best weight of one term for each slope and input channel; slopes go from -1 to 1 in even steps.

    Args:
        weight: Weights within the range of the channel, ``[R, SLOPES]`` for R channels.
        error: Error of ``-|x - w|`` against a line of that slope, up to a constant, as a share of the variance of the
            input, ``[R, SLOPES]``.
    """

    weight: Tensor
    error: Tensor

    def at(self, slope: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights for slopes ``[R, Q]``, and their errors, both ``[R, Q]``."""
        place = ((slope.clamp(-1, 1) + 1) / 2 * (SLOPES - 1)).round().long()
        beyond = (slope.abs() - 1).clamp_min(0)
        return self.weight.gather(1, place), self.error.gather(1, place) + beyond.square()


def slope_table(windows: Tensor, taps: int) -> SlopeTable:
    """Choose weights for the channels of windows ``[G, S, K]``; R is ``G · K / taps``.

    Args:
        windows: Windows of the input, ``[G, S, K]``.
        taps: ``kh · kw``, the number of positions of a filter.
    """
    values = windows.unflatten(2, (-1, taps)).permute(0, 2, 1, 3).flatten(0, 1).flatten(1)  # [R, S · taps]
    low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    values = values[:, :: max(1, values.shape[1] // VALUES)]
    places = torch.linspace(0, values.shape[1] - 1, QUANTILES, device=values.device).round().long()
    shares = torch.linspace(0, 1, STEPS, dtype=values.dtype, device=values.device)
    even = torch.minimum(low + (high - low) * shares, high)  # rounding may lead beyond the end
    candidates = torch.cat((values.sort(1).values[:, places], even, high), 1)
    centered = values - values.mean(1, keepdim=True)
    variance = centered.square().mean(1).clamp_min(1e-12)
    wanted = torch.linspace(-1, 1, SLOPES, dtype=values.dtype, device=values.device)
    error = torch.full((len(values), SLOPES), torch.inf, dtype=values.dtype, device=values.device)
    weight = torch.zeros_like(error)
    for candidate in candidates.T:
        term = -(values - candidate[:, None]).abs()
        slope = (term * centered).mean(1) / variance  # of the regression on x
        rest = term.var(1, correction=0) / variance - slope.square()
        missed = rest[:, None] + (slope[:, None] - wanted).square()
        weight = torch.where(missed < error, candidate[:, None], weight)
        error = torch.minimum(missed, error)
    weight[:, 0], weight[:, -1] = low[:, 0], high[:, 0]  # lines over the whole range, not only over these values
    return SlopeTable(weight, error.clamp_min(0))


def place_terms(table: SlopeTable, slopes: Tensor, terms: int, taps: int) -> Tensor:
    """Choose the terms of each weight so that their sum is closest to a line of a given slope.

    Args:
        table: The best weights of a term, by channel.
        slopes: Wanted slopes, ``[G, O, K]``. Those beyond what all terms give together get the closest.
        terms: Number of terms, T.
        taps: ``kh · kw``, the number of positions of a filter.

    Returns:
        Weights ``[G, O, T, K]``.
    """
    groups, filters, _ = slopes.shape
    wanted = slopes.unflatten(2, (-1, taps)).permute(0, 2, 1, 3).flatten(0, 1).flatten(1)  # [R, O · taps]
    ends = torch.stack((table.weight[:, 0], table.weight[:, -1]))  # [2, R]
    factors = [2.0**-index for index in range(terms)]
    best = torch.full_like(wanted, torch.inf)
    placed = wanted.new_zeros(terms, *wanted.shape)
    for inside in range(terms):
        others = [index for index in range(terms) if index != inside]
        for signs in product((-1, 1), repeat=terms - 1):
            lines = sum(sign * factors[index] for sign, index in zip(signs, others, strict=True))
            share = (wanted - lines) / factors[inside]
            weight, error = table.at(share)
            error = error * factors[inside] ** 2
            better = error < best
            best = torch.where(better, error, best)
            placed[inside] = torch.where(better, weight, placed[inside])
            for sign, index in zip(signs, others, strict=True):
                placed[index] = torch.where(better, ends[(sign + 1) // 2][:, None], placed[index])
    by_channel = placed.unflatten(1, (groups, -1)).unflatten(3, (filters, taps))  # [T, G, C, O, taps]
    result: Tensor = by_channel.permute(1, 3, 0, 2, 4).flatten(3)
    return result
