"""The adder convolution as a function and a module, with the arguments of ``F.conv2d`` and ``nn.Conv2d``."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from . import transforms
from .fusion_guard import refuse_fusion_of
from .geometry import check_arguments, check_dtypes, pair


def adder_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """Apply an adder convolution, ``y = -Σ|x - w| + bias`` over each window, with the arguments of ``F.conv2d``.

    A weight may have several terms, ``y = -Σ_j 2^-j Σ|x - w_j| + bias``: adder layers of the same input, combined by
    shifts. Term by term, a weight of the convolution that they replace is followed more closely.

    The gradients are those of AdderNet (arXiv 1912.13200, section 3.2) in place of the derivative: ``x - w`` for the
    weight and ``HardTanh(w - x)`` for the input. Padded taps count: each contributes ``-|0 - w|``. Half precision is
    summed in fp32; under autocast the output is fp32 for any input.

    Args:
        input: ``[N, C, H, W]`` or ``[C, H, W]``, floating point.
        weight: ``[O, C / groups, kh, kw]``, or ``[O, C / groups, T, kh, kw]`` with T terms, of the input's dtype and
            device.
        bias: ``[O]`` or ``None``.
        stride: Step of the window in pixels, one number or ``(height, width)``.
        padding: Zeros on each side in pixels, one number or ``(height, width)``; ``"valid"`` for none, or ``"same"``
            for an output of the input's size, which requires a stride of 1.
        dilation: Distance between taps in pixels, one number or ``(height, width)``.
        groups: Number of channel groups; ``groups == C`` is a depthwise layer.

    Returns:
        ``[N, O, H', W']`` (or ``[O, H', W']``) of the input's dtype, channels-last if the input is.

    Raises:
        TypeError: A dtype is not floating point, or dtypes differ.
        ValueError: A shape, device or setting is not as expected; the message names the argument and its value.

    Example:
        >>> input, weight = torch.randn(8, 16, 32, 32), torch.randn(24, 16, 3, 3)
        >>> adder_conv2d(input, weight, stride=2, padding=1).shape
        torch.Size([8, 24, 16, 16])
    """
    if input.ndim == 3:
        return adder_conv2d(input[None], weight, bias, stride, padding, dilation, groups)[0]
    device = input.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    check_dtypes(input, weight, bias, mixed=autocast)
    stride, dilation = pair(stride, "stride"), pair(dilation, "dilation")
    if isinstance(padding, str):
        check_arguments(input, weight, bias, stride, (0, 0), dilation, groups)
        input, padding = _resolve_named_padding(input, weight, padding, stride, dilation)
    result: Tensor = transforms.adder_conv2d(input, weight, bias, stride, pair(padding, "padding"), dilation, groups)
    return result


def _resolve_named_padding(
    input: Tensor, weight: Tensor, padding: str, stride: tuple[int, int], dilation: tuple[int, int]
) -> tuple[Tensor, tuple[int, int]]:
    """Resolve ``"same"`` and ``"valid"`` to numbers; an odd total is padded here, the extra zero below and right."""
    if padding == "valid":
        return input, (0, 0)
    if padding != "same":
        raise ValueError(f"padding is {padding!r}, expected 'same', 'valid' or numbers")
    if stride != (1, 1):
        raise ValueError(f"stride is {stride}, expected 1 with padding='same'")
    height, width = (dil * (k - 1) for dil, k in zip(dilation, weight.shape[-2:], strict=True))
    if height % 2 or width % 2:
        input = F.pad(input, (width // 2, width - width // 2, height // 2, height - height // 2))
        return input, (0, 0)
    return input, (height // 2, width // 2)


class AdderConv2d(nn.Conv2d):
    """A ``Conv2d`` that computes the negative L1 distance of window and filter instead of their dot product.

    It takes every argument of ``torch.nn.Conv2d`` and has the same parameters and state-dict keys, so a convolution's
    weights can be loaded, and ``isinstance(layer, nn.Conv2d)`` holds. The output is large and, without a bias, never
    positive, so a normalization must follow. Input and output are ``[N, C, H, W]`` and ``[N, O, H', W']``.

    Weights are initialized from N(0, 1), as in the code of the authors of AdderNet (arXiv 1912.13200).

    With ``terms=T`` above 1, each weight has T terms, whose distances are added with the factors 1, 1/2, 1/4 and so on:
    ``y = -Σ_j 2^-j Σ|x - w_j|``. The weight then is ``[O, C / groups, T, kh, kw]``.

    In training, ``sharpness`` changes the input's gradient from AdderNet's ``HardTanh(w - x)`` (1, the default) to
    ``HardTanh(sharpness · (w - x))``, which approaches the true derivative, the sign, as ``sharpness`` grows. For
    powers of two, the output is the same to the bit. It is a training setting and is not saved with the model.

    Example:
        >>> layer = AdderConv2d(16, 24, 3, stride=2, padding=1, bias=False)
        >>> layer(torch.randn(8, 16, 32, 32)).shape
        torch.Size([8, 24, 16, 16])
    """

    sharpness: float = 1.0
    # Saved in the metadata of a state dict, where it tells adder weights from a convolution's, which have version 1.
    _version: int = 2

    def __init__(self, *args: Any, terms: int = 1, **kwargs: Any) -> None:
        """Create the layer.

        Args:
            args: Positional arguments of ``torch.nn.Conv2d``.
            terms: Terms of each weight.
            kwargs: Named arguments of ``torch.nn.Conv2d``.

        Raises:
            ValueError: ``terms`` is not a whole number of at least 1.
        """
        super().__init__(*args, **kwargs)
        if terms != 1:
            self.set_terms_(terms)
            self.reset_parameters()

    @property
    def terms(self) -> int:
        """Number of terms of each weight."""
        return 1 if self.weight.ndim == 4 else self.weight.shape[2]

    def set_terms_(self, terms: int) -> None:
        """Give each weight another number of terms, in place; all start with the values of the first.

        Raises:
            ValueError: ``terms`` is not a whole number of at least 1.
        """
        if type(terms) is not int or terms < 1:
            raise ValueError(f"terms is {terms!r}, expected a whole number of at least 1")
        first = self.weight.detach() if self.terms == 1 else self.weight.detach()[:, :, 0]
        shape = first.shape if terms == 1 else (*first.shape[:2], terms, *first.shape[2:])
        weight = torch.empty(shape, dtype=first.dtype, device=first.device)
        weight.copy_(first if terms == 1 else first[:, :, None])
        self.weight = nn.Parameter(weight, self.weight.requires_grad)

    def extra_repr(self) -> str:
        """Return the settings for ``repr``, as of ``torch.nn.Conv2d``."""
        settings: str = super().extra_repr()
        return f"{settings}, terms={self.terms}" if self.terms > 1 else settings

    def reset_parameters(self) -> None:
        """Draw weights from N(0, 1); the bias starts at zero."""
        nn.init.normal_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor | fx.Proxy) -> Tensor:
        """Apply the layer to ``[N, C, H, W]`` or ``[C, H, W]``; returns ``[N, O, H', W']`` or ``[O, H', W']``."""
        if isinstance(input, fx.Proxy):
            # torch.fx keeps only modules of torch.nn whole: this keeps an adder layer whole, as the convolution was.
            tracer: Any = input.tracer
            node: Tensor = tracer.create_proxy("call_module", tracer.path_of_module(self), (input,), {})
            return node
        return super().forward(input)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load weights, which saved folders and AdderNet's published code call ``adder``."""
        if f"{prefix}adder" in state_dict:
            state_dict[f"{prefix}weight"] = state_dict.pop(f"{prefix}adder")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.training and self.sharpness != 1:
            # |s·x - s·w| / s is |x - w|, and its input gradient HardTanh(s·w - s·x). The weight's gradient is s times
            # as large, which does not affect the adaptive rate. Scaled values may overflow float16, so they are fp32.
            scaled, filters = (
                (tensor.float() if tensor.dtype == torch.float16 else tensor) * self.sharpness
                for tensor in (input, weight)
            )
            output = self._distance(scaled, filters, None) / self.sharpness
            output = output.to(torch.promote_types(input.dtype, weight.dtype))
            return output if bias is None else output + bias[:, None, None]
        return self._distance(input, weight, bias)

    def _distance(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            return adder_conv2d(input, weight, bias, self.stride, 0, self.dilation, self.groups)
        return adder_conv2d(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)


refuse_fusion_of(AdderConv2d)
