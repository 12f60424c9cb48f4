"""A plan as a module: float images in, float logits out, integers between.

Its tensors are buffers, so that ``state_dict`` and safetensors hold the integers that it computes with.
"""

from collections.abc import Mapping
from threading import Lock
from typing import Any

from torch import Tensor, nn

from .check import check_plan
from .cpu_engine import Engine
from .cuda_engine import GpuEngine
from .plan import IntegerPlan, Linear
from .record import tensors_of, with_tensors


class Tensors(nn.Module):
    """A place for buffers whose names have dots."""

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
    """A network in integers, with the first layer and the classifier in fp32 where the plan leaves them out.

    Several threads may call one network at once.

    Args:
        plan: What lies between.
        stem: The first convolution, normalization included; what follows it is the plan's first activation.
        head: The classifier, on the plan's last activation.

    Raises:
        ValueError: The plan is not sound, see ``check_plan``.
    """

    stem: nn.Conv2d | None
    head: nn.Linear | None
    _engine: Engine | GpuEngine | None

    def __init__(self, plan: IntegerPlan, stem: nn.Conv2d | None = None, head: nn.Linear | None = None) -> None:
        super().__init__()
        self._form = plan
        for name, tensor in tensors_of(plan):
            self.put(name, tensor)
        self.stem, self.head = stem, head
        self._begin_anew()
        check_plan(self.plan)
        self.eval()

    @property
    def plan(self) -> IntegerPlan:
        """The plan with the tensors that the buffers hold now."""
        return with_tensors(self._form, dict(self.named_buffers(remove_duplicate=False)))

    @property
    def engine(self) -> Engine | GpuEngine:
        """What runs the plan on the device where its tensors are, made with the first call.

        Raises:
            ValueError: The plan is not sound.
        """
        with self._lock:
            if self._engine is None:
                plan = self.plan
                device = plan.activations[0].zero.device
                self._engine = GpuEngine(plan, device) if device.type == "cuda" else Engine(plan)
            return self._engine

    @property
    def num_features(self) -> int:
        """Values that the classifier reads, by timm's name."""
        last = self._form.steps[-1]
        written = self._form.activations[last.input if isinstance(last, Linear) else last.output]
        return written.channels * written.height * written.width

    def forward(self, images: Tensor) -> Tensor:
        """Images ``[N, C, H, W]``, normalized as the float network expects, to logits ``[N, classes]`` fp32.

        Raises:
            ValueError: The images have another size than those that the plan was made for.
        """
        engine = self.engine
        plan = engine.plan
        first, last = plan.activations[0], plan.steps[-1]
        values = images if self.stem is None else self.stem(images.float())
        if values.ndim != 4 or tuple(values.shape[1:]) != (first.channels, first.height, first.width):
            raise ValueError(
                f"images are {list(images.shape)}, which gives {list(values.shape)} where the plan reads "
                f"{[first.channels, first.height, first.width]}: an integer network takes images of one size"
            )
        found = engine.run_float(values)
        if isinstance(last, Linear):
            return found.float() * last.scale
        written = plan.activations[last.output]
        real = ((found.float() - written.zero.float()) * written.scale).permute(0, 3, 1, 2).flatten(1)
        logits: Tensor = real if self.head is None else self.head(real)
        return logits

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As of any module; then the plan is checked.

        Raises:
            ValueError: The plan with these tensors is not sound.
        """
        result = super().load_state_dict(state_dict, strict, assign)
        self._begin_anew()
        check_plan(self.plan)
        return result

    def _begin_anew(self) -> None:
        self._lock = Lock()
        self._engine = None

    def _apply(self, fn: Any, recurse: bool = True) -> "IntegerNetwork":
        """Buffers moved elsewhere are other tensors."""
        super()._apply(fn, recurse)
        self._begin_anew()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """A copy makes an engine of its own."""
        return {key: value for key, value in self.__dict__.items() if key not in ("_lock", "_engine")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """See ``__getstate__``."""
        super().__setstate__(state)
        self._begin_anew()
