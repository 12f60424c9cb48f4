"""The backend in plain torch, for any device, computed in blocks that stay in cache and bound the memory.

Published code unfolds the whole batch and broadcasts it against all filters at once (gigabytes for a ResNet layer);
here patches are cut tile by tile and compared block by block.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..geometry import Tile, Window, tiles

# A block of 2^20 differences is 4 MB in fp32 and stays in a core's share of the last-level cache: measured 4-7 times
# faster than blocks ten times that size, whose temporaries go through memory.
BLOCK_ELEMENTS = 1 << 20
# Patches of one tile: 16 MB in fp32, held a handful of times at once (padded crop, columns, reordered columns).
PATCH_ELEMENTS = 1 << 22


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums: fp32 for half precision, whose mantissa is too short for thousands of equal signs."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def forward(input: Tensor, weight: Tensor, output: Tensor, window: Window, groups: int) -> None:
    """Overwrite ``output`` with ``-Σ_j 2^-j Σ|x - w[j]|``; ``Backend.forward`` describes the arguments."""
    terms = _filters(weight, groups)
    for tile in _tiles(window, input, weight, groups):
        patches = _patches(input, window, tile, groups, terms.dtype)
        distance = patches.new_zeros(groups, patches.shape[1], terms.shape[2])
        for factor, filters in _factors(terms):
            for group, position, out in _blocks(patches, filters):
                difference = patches[group, position, None] - filters[group, None, out]
                distance[group, position, out].add_(difference.abs_().sum(-1), alpha=factor)
        _output_box(output, tile).copy_(_from_positions(distance.neg_(), tile))


def input_grad(grad: Tensor, input: Tensor, weight: Tensor, result: Tensor, window: Window, groups: int) -> None:
    """Overwrite ``result`` with the input's gradient; ``Backend.input_grad`` describes formula and arguments."""
    result.zero_()
    terms = _filters(weight, groups)
    for tile in _tiles(window, input, weight, groups):
        patches = _patches(input, window, tile, groups, terms.dtype)
        slopes = _to_positions(_output_box(grad, tile).to(terms.dtype), groups)  # [G, P, O]
        patch_grad = torch.zeros_like(patches)
        for factor, filters in _factors(terms):
            for group, position, out in _blocks(patches, filters):
                difference = filters[group, None, out] - patches[group, position, None]
                with torch.autocast(grad.device.type, enabled=False):  # it would narrow the products
                    step = slopes[group, position, None, out] @ difference.clamp_(-1, 1)  # [G, P, 1, K]
                patch_grad[group, position].add_(step.squeeze(2), alpha=factor)
        _add_patches(patch_grad, result, window, tile)


def _filters(weight: Tensor, groups: int) -> Tensor:
    """Reshape ``[T, O, C / groups, kh, kw]`` to ``[T, G, O / G, K]`` in the compute dtype."""
    return weight.to(compute_dtype(weight.dtype)).reshape(len(weight), groups, weight.shape[1] // groups, -1)


def _factors(terms: Tensor) -> Iterator[tuple[float, Tensor]]:
    """Yield each term of a weight with its factor, 1, 1/2, 1/4 and so on."""
    for index, term in enumerate(terms):
        yield 2.0**-index, term


def _tiles(window: Window, input: Tensor, weight: Tensor, groups: int) -> Iterator[Tile]:
    elements_per_position = max(weight[0, 0].numel() * groups, weight.shape[1])
    return tiles(window, input, elements_per_position, PATCH_ELEMENTS)


def _patches(input: Tensor, window: Window, tile: Tile, groups: int, dtype: torch.dtype) -> Tensor:
    """Return the windows of a tile as ``[G, P, K]``, P over images, rows and columns."""
    rows, columns = tile.rows, tile.columns
    crop = input[tile.images, :, rows.start : rows.stop, columns.start : columns.stop].to(dtype)
    crop = F.pad(crop, (columns.before, columns.after, rows.before, rows.after))
    unfolded = F.unfold(crop, window.kernel, window.dilation, 0, window.stride)  # [n, C·kh·kw, L]
    images, _, positions = unfolded.shape
    grouped = unfolded.reshape(images, groups, -1, positions).permute(1, 0, 3, 2)
    return grouped.reshape(groups, images * positions, -1)


def _blocks(patches: Tensor, filters: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """Yield slices of groups, positions and filters whose differences fill about one block."""
    groups, positions, taps = patches.shape
    outs = filters.shape[1]
    out_block = min(outs, max(1, BLOCK_ELEMENTS // taps))
    position_block = min(positions, max(1, BLOCK_ELEMENTS // (taps * out_block)))
    group_block = min(groups, max(1, BLOCK_ELEMENTS // (taps * out_block * position_block)))
    for group in range(0, groups, group_block):
        for position in range(0, positions, position_block):
            for out in range(0, outs, out_block):
                yield (
                    slice(group, group + group_block),
                    slice(position, position + position_block),
                    slice(out, out + out_block),
                )


def _output_box(output: Tensor, tile: Tile) -> Tensor:
    rows, columns = tile.rows, tile.columns
    return output[tile.images, :, rows.first : rows.last, columns.first : columns.last]


def _to_positions(box: Tensor, groups: int) -> Tensor:
    """Reorder ``[n, O, h, w]`` to ``[G, n·h·w, O / G]``."""
    images, outs, height, width = box.shape
    grouped = box.reshape(images, groups, outs // groups, height * width).permute(1, 0, 3, 2)
    return grouped.reshape(groups, images * height * width, outs // groups)


def _from_positions(values: Tensor, tile: Tile) -> Tensor:
    """Reorder ``[G, n·h·w, O / G]`` to ``[n, O, h, w]``; the inverse of ``_to_positions``."""
    groups, _, outs = values.shape
    height, width = tile.rows.last - tile.rows.first, tile.columns.last - tile.columns.first
    box = values.reshape(groups, -1, height, width, outs).permute(1, 0, 4, 2, 3)
    return box.reshape(-1, groups * outs, height, width)


def _add_patches(patch_grad: Tensor, result: Tensor, window: Window, tile: Tile) -> None:
    """Add the windows' gradients ``[G, P, K]`` to ``result``, summed where they overlap and without the padding."""
    groups, _, taps = patch_grad.shape
    rows, columns = tile.rows, tile.columns
    images = tile.images.stop - tile.images.start
    unfolded = patch_grad.reshape(groups, images, -1, taps).permute(1, 0, 3, 2).reshape(images, groups * taps, -1)
    height, width = rows.stop - rows.start, columns.stop - columns.start
    padded = (height + rows.before + rows.after, width + columns.before + columns.after)
    box = F.fold(unfolded, padded, window.kernel, window.dilation, 0, window.stride)
    box = box[:, :, rows.before : rows.before + height, columns.before : columns.before + width]
    result[tile.images, :, rows.start : rows.stop, columns.start : columns.stop] += box
