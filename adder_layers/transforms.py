"""The adder convolution under the transforms of ``torch.func``: ``grad``, ``vjp``, ``jacrev`` and ``vmap``.

Inside these transforms torch differentiates an ``autograd.Function``, but no registered operator; ``adder_conv2d``
below therefore has one of each. Forward mode and the second derivative are refused: the gradients are AdderNet's
substitutes for the derivative, whose own derivatives would mean nothing.

``vmap`` folds its dimension into the batch where all members share the weight, as for the gradients of single samples,
and into channel groups where each member has its own, as in an ensemble.
"""

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from . import ops


def adder_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Call ``ops.adder_conv2d``, in a way that the transforms of ``torch.func`` understand where one is active."""
    arguments = (input, weight, bias, stride, padding, dilation, groups)
    transformed = not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
    result: Tensor = _AdderConv2d.apply(*arguments) if transformed else ops.adder_conv2d(*arguments)
    return result


class _AdderConv2d(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> Tensor:
        result: Tensor = ops.adder_conv2d(*arguments)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ops.save_for_backward(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ops.backward(ctx, grad, _InputGrad.apply)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        raise NotImplementedError(ops.NO_FORWARD_MODE)


class _InputGrad(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> Tensor:
        result: Tensor = ops.adder_conv2d_input_grad(*arguments)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> NoReturn:
        raise NotImplementedError(ops.NO_SECOND_DERIVATIVE)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        raise NotImplementedError(ops.NO_FORWARD_MODE)


@ops.adder_conv2d.register_vmap
def _(
    info: Any, in_dims: tuple[int | None, ...], input: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any
) -> tuple[Tensor, int]:
    def call(weight: Tensor, groups: int, input: Tensor) -> Tensor:
        result: Tensor = ops.adder_conv2d(input, weight, None, *geometry[:-1], groups)
        return result

    output = _over_members(call, info.batch_size, (weight, in_dims[1]), geometry[-1], (input, in_dims[0]))
    if bias is not None:
        output = output + _expanded(bias, in_dims[2], info.batch_size)[:, None, :, None, None]
    return output, 0


@ops.adder_conv2d_input_grad.register_vmap
def _(
    info: Any, in_dims: tuple[int | None, ...], grad: Tensor, input: Tensor, weight: Tensor, *geometry: Any
) -> tuple[Tensor, int]:
    def call(weight: Tensor, groups: int, grad: Tensor, input: Tensor) -> Tensor:
        result: Tensor = ops.adder_conv2d_input_grad(grad, input, weight, *geometry[:-1], groups)
        return result

    images = ((grad, in_dims[0]), (input, in_dims[1]))
    return _over_members(call, info.batch_size, (weight, in_dims[2]), geometry[-1], *images), 0


def _over_members(
    call: Callable[..., Tensor],
    members: int,
    weight: tuple[Tensor, int | None],
    groups: int,
    *images: tuple[Tensor, int | None],
) -> Tensor:
    """Call an operator once for all members of a ``vmap``.

    Args:
        call: Takes weight, groups and the images.
        members: Size of the mapped dimension.
        weight: The weight, and its mapped dimension if it has one.
        groups: Channel groups of one member.
        images: ``[N, C, H, W]`` tensors, each with its mapped dimension if it has one.

    Returns:
        ``[members, N, C, H, W]``.
    """
    stacks = [_expanded(tensor, dim, members) for tensor, dim in images]
    kernel, dim = weight
    if dim is None:
        result = call(kernel, groups, *(stack.flatten(0, 1) for stack in stacks))
        folded: Tensor = result.unflatten(0, (members, stacks[0].shape[1]))
        return folded
    channels = (stack.movedim(0, 1).flatten(1, 2) for stack in stacks)
    result = call(kernel.movedim(dim, 0).flatten(0, 1), groups * members, *channels)
    grouped: Tensor = result.unflatten(1, (members, result.shape[1] // members))
    return grouped.movedim(1, 0)


def _expanded(tensor: Tensor, dim: int | None, members: int) -> Tensor:
    """Return a tensor with its mapped dimension first, repeated without a copy if it has none."""
    return tensor.expand(members, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
