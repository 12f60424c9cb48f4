"""Module that runs an integer plan: float images in, float logits out, integers in between.

The plan's tensors are buffers, so that ``state_dict`` and safetensors hold the integers that it computes with.
"""

from collections.abc import Mapping
from threading import Lock
from typing import Any

from torch import Tensor, nn

from .check import check_plan
from .cpu_engine import CpuEngine
from .cuda_engine import CudaEngine
from .plan import IntegerPlan, Linear
from .record import tensors_of, with_tensors


class Tensors(nn.Module):
    """Module for buffers whose names contain dots."""

    def put(self, name: str, tensor: Tensor) -> None:
        """Register a buffer under a dotted name."""
        first, _, rest = name.partition(".")
        if not rest:
            self.register_buffer(first, tensor)
            return
        if first not in self._modules:
            self.add_module(first, Tensors())
        child = self._modules[first]
        assert isinstance(child, Tensors)
        child.put(rest, tensor)


class IntegerNetwork(Tensors):
    """An integer network, with the first layer and the classifier in fp32 if the plan does not contain them.

    Several threads may call one network at the same time.

    Args:
        plan: The integer part of the network.
        stem: The first convolution with its normalization folded in; its output is the plan's first activation.
        head: The classifier, which reads the plan's last activation.

    Raises:
        ValueError: ``check_plan`` rejects the plan.
    """

    stem: nn.Conv2d | None
    head: nn.Linear | None
    _engine: CpuEngine | CudaEngine | None

    def __init__(self, plan: IntegerPlan, stem: nn.Conv2d | None = None, head: nn.Linear | None = None) -> None:
        super().__init__()
        self._plan = plan  # for its structure: the buffers hold the tensors that count
        for name, tensor in tensors_of(plan):
            self.put(name, tensor)
        self.stem, self.head = stem, head
        self._discard_engine()
        check_plan(self.plan)
        self.eval()

    @property
    def plan(self) -> IntegerPlan:
        """The plan with the current tensors of the buffers."""
        return with_tensors(self._plan, dict(self.named_buffers(remove_duplicate=False)))

    @property
    def engine(self) -> CpuEngine | CudaEngine:
        """The engine that runs the plan on the device of its tensors, created by the first call.

        Raises:
            ValueError: ``check_plan`` rejects the plan.
        """
        with self._lock:
            if self._engine is None:
                plan = self.plan
                device = plan.activations[0].zero_point.device
                self._engine = CudaEngine(plan, device) if device.type == "cuda" else CpuEngine(plan)
            return self._engine

    @property
    def num_features(self) -> int:
        """Number of values that the classifier reads, under timm's name."""
        last = self._plan.steps[-1]
        written = self._plan.activations[last.input if isinstance(last, Linear) else last.output]
        return written.channels * written.height * written.width

    def forward(self, images: Tensor) -> Tensor:
        """Classify images.

        Args:
            images: ``[N, C, H, W]``, normalized as the float network expects.

        Returns:
            Logits ``[N, classes]`` fp32.

        Raises:
            ValueError: The images do not have the size that the plan was made for.
        """
        engine = self.engine
        plan = engine.plan
        first, last = plan.activations[0], plan.steps[-1]
        values = images if self.stem is None else self.stem(images.float())
        if values.ndim != 4 or tuple(values.shape[1:]) != (first.channels, first.height, first.width):
            raise ValueError(
                f"images are {list(images.shape)}, which gives {list(values.shape)} where the plan reads "
                f"{[first.channels, first.height, first.width]}: an integer network accepts images of one size"
            )
        found = engine.run_float(values)
        if isinstance(last, Linear):
            return found.float() * last.scale
        written = plan.activations[last.output]
        real = ((found.float() - written.zero_point.float()) * written.scale).permute(0, 3, 1, 2).flatten(1)
        logits: Tensor = real if self.head is None else self.head(real)
        return logits

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load tensors as ``torch.nn.Module`` does, then check the plan.

        Raises:
            ValueError: ``check_plan`` rejects the plan with these tensors.
        """
        result = super().load_state_dict(state_dict, strict, assign)
        self._discard_engine()
        check_plan(self.plan)
        return result

    def _discard_engine(self) -> None:
        self._lock = Lock()
        self._engine = None

    def _apply(self, fn: Any, recurse: bool = True) -> "IntegerNetwork":
        """Apply a function to all tensors; the engine holds the old ones and is discarded."""
        super()._apply(fn, recurse)
        self._discard_engine()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the lock and the engine: a copy creates its own."""
        return {key: value for key, value in self.__dict__.items() if key not in ("_lock", "_engine")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the state, without an engine."""
        super().__setstate__(state)
        self._discard_engine()
