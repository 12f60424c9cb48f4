"""Launch the Triton kernels of quantized adder layers: pack weights, choose a tile and compute the grid."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends.triton.launch import Launch, geometry_of, launch_options
from ..backends.triton.tiles import DIRECT_CHANNELS, TILED_WIDTH, Device, choose_tile, width_class
from .plan import Adder

WORD = 4  # bytes
# Module of the kernels, imported when one of them is launched.
KERNELS = f"{__package__}.triton_kernels"


class Operands(NamedTuple):
    """Tensors of an adder layer, packed for its kernel.

    Args:
        weight: Words ``[G, T, taps, words, width]`` int32, where width is a multiple of the tile; for thin groups
            ``[T, taps, C / G, O]`` uint8.
        zero_point: The bytes that padded taps read: words ``[G, words]`` int32; for thin groups ``[C]`` uint8.
        factors: ``[3 or 4, width]`` int32, each group's filters padded to whole tiles: multiplier, shift,
            scale_exponent, and the multiplier of the residual if there is one.
        offset: ``[width]`` int64.
    """

    weight: Tensor
    zero_point: Tensor
    factors: Tensor
    offset: Tensor


def operands_of(step: Adder, zero_point: Tensor) -> Operands:
    """Pack the tensors of a step for its kernel, on their device.

    Args:
        step: The adder layer.
        zero_point: Zero point of the activation that it reads, ``[C]`` uint8.
    """
    factors = step.requantization
    rows = [factors.multiplier, factors.shift, factors.scale_exponent]
    if factors.residual_multiplier is not None:
        rows.append(factors.residual_multiplier)
    stacked = torch.stack([row.to(torch.int32) for row in rows])
    weight = step.weight.flatten(1, -2).unflatten(1, (step.terms, -1))  # [O, T, taps, C / G]
    if _is_thin(step):
        packed, read, groups, tile = weight.movedim(0, -1).contiguous(), zero_point, 1, DIRECT_CHANNELS.width
    else:
        groups, tile = step.groups, width_class(len(weight) // step.groups)
        packed = _padded(words(weight).unflatten(0, (groups, -1)).movedim(1, -1), tile)
        read = words(zero_point.view(groups, -1))
    by_group = (_padded(row.unflatten(-1, (groups, -1)), tile).flatten(-2) for row in (stacked, factors.offset))
    return Operands(packed, read, *by_group)


def _padded(tensor: Tensor, multiple: int) -> Tensor:
    """Pad the end of the last axis with zeros, up to a multiple; contiguous."""
    return F.pad(tensor, (0, -tensor.shape[-1] % multiple)).contiguous()


def words(bytes: Tensor) -> Tensor:
    """Pack four neighbors of the last axis into one int32; missing ones are 0, on both sides of a distance."""
    return _padded(bytes, WORD).view(torch.int32)


def plan_adder(
    step: Adder, operands: Operands, source: Tensor, residual: Tensor | None, output: Tensor, where: Device
) -> Launch:
    """Prepare the launch that computes an adder layer.

    Args:
        step: The adder layer.
        operands: Its packed tensors.
        source: ``[N, H, W, C]`` uint8, contiguous.
        residual: The activation that is added, of the output's shape and contiguous; ``None`` without a residual.
        output: ``[N, H', W', O]`` uint8, contiguous; the launch writes it.
        where: The device.
    """
    batch, rows, columns, all_filters = output.shape
    filters, positions = all_filters // step.groups, batch * rows * columns
    geometry = geometry_of((*source.shape[1:3], rows, columns), (rows, columns), positions, step.window)
    settings = (step.groups, geometry, step.requantization.quant_max)
    tensors = (operands.weight, output, output if residual is None else residual, operands.factors, operands.offset)
    options: dict[str, int | bool] = {"RESIDUAL": residual is not None, "TERMS": step.terms}
    if _is_thin(step):
        block = DIRECT_CHANNELS
        tiles, programs = -(-all_filters // block.width), -(-positions // block.positions)
        arguments = (source, operands.zero_point, *tensors, step.weight.shape[-1], filters, tiles, *settings)
        options |= {"POSITIONS": block.positions, "WIDTH": block.width, **launch_options(block.warps, where)}
        return Launch(KERNELS, "integer_direct", (tiles * programs,), arguments, options)
    tile = choose_tile("forward", filters, positions, step.groups, where)
    tiles, programs = operands.weight.shape[-1] // tile.width, -(-positions // tile.positions)
    pixels = words(source.unflatten(3, (step.groups, -1)))
    arguments = (pixels, operands.zero_point, *tensors, pixels.shape[4], filters, tiles, *settings)
    options |= {
        "INSTRUCTION": where.processors > 0 and where.target.startswith("sm_"),
        "OUTER": tile.outer,
        "ROWS": tile.rows,
        "LANES": tile.lanes,
        "PIECES": tile.pieces,
        "UNROLL": tile.unroll,
        **launch_options(tile.warps, where),
    }
    return Launch(KERNELS, "integer_tiled", (tiles * programs * step.groups,), arguments, options)


def _is_thin(step: Adder) -> bool:
    """Return whether groups have so few filters that the tiled kernel's tile would be mostly padding."""
    return step.weight.shape[0] // step.groups < TILED_WIDTH
