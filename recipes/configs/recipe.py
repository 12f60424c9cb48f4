"""A recipe: all settings of a run as one frozen, flat dataclass, checked when it is made."""

import dataclasses
import types
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ...convert.errors import RecipeError
from ...convert.quantization.config import BITS, Bits, Requant

RECIPE_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Training augmentation; names as in timm, except ``crop_padding``.

    Args:
        crop_padding: Pixels of padding before a random crop to the image's own size, as is usual for small images;
            0 means timm's random resized crop.
        hflip: Probability of a horizontal flip.
        scale: Smallest share of the area that a random resized crop keeps.
        color_jitter: Strength of color jitter.
        auto_augment: timm's policy string, such as ``rand-m9-mstd0.5-inc1``; empty for none.
        reprob: Probability of random erasing.
    """

    crop_padding: int = 0
    hflip: float = 0.5
    scale: float = 0.08
    color_jitter: float = 0.0
    auto_augment: str = ""
    reprob: float = 0.0


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Settings of a training run; named as timm's ``train.py`` names them.

    Args:
        version: Version of the recipe format.
        description: Purpose of the recipe in one line.
        dataset: Name of the data set: an embedded one such as ``digits``, ``folder`` for class folders, or a timm name
            such as ``hfds/…``, ``wds/…`` or ``torch/…``.
        data_dir: Folder, or address, of the data set's files.
        train_split: Name of the training split.
        val_split: Name of the evaluation split.
        class_map: File with the class index of each class name: ``.txt`` with a name per line, or ``.json``; empty for
            the model's own names or the data set's order.
        train_images: Size of a fixed random subset of the training split to train on; 0 means all of it.
        img_size: Side of the images in pixels; by default that of the model.
        crop_padding: Pixels of padding before a random crop to the image's own size; 0 means timm's random resized
            crop. With padding, ``color_jitter``, ``auto_augment`` and ``reprob`` must be off.
        hflip: Probability of a horizontal flip.
        scale: Smallest share of the area that a random resized crop keeps.
        color_jitter: Strength of color jitter.
        auto_augment: timm's policy string, such as ``rand-m9-mstd0.5-inc1``; empty for none.
        reprob: Probability of random erasing.
        workers: Number of loader processes, at most the number of processors.
        epochs: Passes over the training images.
        batch_size: Images per process and forward pass.
        grad_accum_steps: Batches per optimizer step.
        opt: timm's optimizer name; ``momentum`` is plain SGD with momentum, ``sgd`` has Nesterov's.
        lr: Learning rate at the top of the schedule.
        lr_base_size: Images of an optimizer step that ``lr`` and ``teacher_lr`` are meant for; with more or fewer, the
            rates are scaled in proportion. 0 means that they are not scaled.
        momentum: Momentum of SGD.
        weight_decay: Weight decay; biases and normalizations are not decayed.
        sched: timm's schedule name.
        warmup_epochs: Epochs of linear warm-up from ``warmup_lr``.
        warmup_lr: Learning rate at the start of the warm-up.
        min_lr: Learning rate at the end of the schedule.
        smoothing: Label smoothing.
        mixup: Alpha of mixup, which blends pairs of images and their labels; 0 means none.
        cutmix: Alpha of cutmix, which pastes a rectangle of one image into another; 0 means none.
        mixup_prob: Probability that a batch, pair or image is mixed.
        mixup_switch_prob: Probability of cutmix where both mixup and cutmix are on.
        mixup_mode: Unit for which mixing is drawn: ``batch``, ``pair`` of images or ``elem``, a single image.
        mixup_off_epoch: First epoch without mixing; 0 means that all have it.
        clip_grad: Largest norm of the model's gradient, adder weights left out where ``eta`` sets their gradient's
            norm; 0 means no clipping.
        eta: Root mean square that AdderNet's adaptive rate gives the gradient of each adder layer; 0 turns it off.
        adder_init: ``keep`` the adder layers' weights that the model comes with, or draw them from N(0, 1) with
            ``normal``, as AdderNet does for training from scratch.
        sharpness: Steepness s of the adder layers' input gradient HardTanh(s * (w - x)) in training; 1 is AdderNet's.
        kd_temperature: Temperature that softens both predictions in logit distillation.
        distill_loss_weight: Weight of logit distillation, the divergence of the student's predictions from the
            teacher's; 0 turns it off.
        task_loss_weight: Weight of the task loss, the cross-entropy with the labels; 0 turns it off.
        block_loss_weight: Weight of block distillation, the squared error between the outputs of the student's blocks
            and the teacher's; 0 turns it off. The teacher must be the CNN that was converted.
        teacher_lr: Learning rate, at the top of the schedule, of a teacher that trains alongside on the labels; 0 means
            a frozen teacher.
        kernel_loss_weight: Weight of kernel distillation, the squared error between features of both networks that
            went through kernels and learned 1x1 convolutions; 0 turns it off.
        kernel_temperature: Temperature of these kernels; the lower, the fewer of the activations count.
        bn_images: Training images to re-estimate the BatchNorm statistics of an adder network on, before each
            evaluation and save; 0 keeps the running statistics.
        sync_bn: Normalize over the batches of all processes together.
        model_ema: Also keep a moving average of the weights; it is evaluated as ``eval_…_ema`` and saved as ``best/``.
        model_ema_decay: Share of itself that the average keeps in a step.
        model_ema_warmup: Use a lower decay in the first steps.
        amp: Mixed precision: ``no``, ``bf16`` or ``fp16``.
        bits: Train for integers of 8, 6, 5 or 4 bits, as ``QuantizeConfig`` has them; 0 trains in floating point.
        requant: Requantization of those integers: ``fixed`` or ``shift``.
        channels_last: Lay out weights and activations with the channels last.
        torchcompile: Backend of ``torch.compile`` for the model, such as ``inductor``; empty for none.
        grad_checkpointing: Compute activations again in the backward pass instead of keeping them; where the model can.
        seed: Seed of weights, order and augmentation.
        log_interval: Steps between lines of ``log.txt`` (on standard error too where there is no terminal), and between
            values for trackers.
        log_with: accelerate's names of trackers, separated by commas: ``tensorboard``, ``trackio``, ``wandb``, …
        save_every: Optimizer steps between saves within an epoch; 0 means one save, after the epoch.
        skip_limit: Steps in a row that may be skipped because loss or gradient is not finite before the run ends.
    """

    version: int = RECIPE_VERSION
    description: str = ""
    dataset: str = ""
    data_dir: str | None = None
    train_split: str = "train"
    val_split: str = "validation"
    class_map: str = ""
    train_images: int = 0
    img_size: int | None = None
    crop_padding: int = 0
    hflip: float = 0.5
    scale: float = 0.08
    color_jitter: float = 0.0
    auto_augment: str = ""
    reprob: float = 0.0
    workers: int = 4
    epochs: int = 30
    batch_size: int = 128
    grad_accum_steps: int = 1
    opt: str = "sgd"
    lr: float = 0.1
    lr_base_size: int = 0
    momentum: float = 0.9
    weight_decay: float = 5e-4
    sched: str = "cosine"
    warmup_epochs: int = 0
    warmup_lr: float = 1e-5
    min_lr: float = 0.0
    smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mixup_prob: float = 1.0
    mixup_switch_prob: float = 0.5
    mixup_mode: str = "batch"
    mixup_off_epoch: int = 0
    clip_grad: float = 0.0
    eta: float = 0.2
    adder_init: str = "keep"
    sharpness: float = 1.0
    kd_temperature: float = 2.0
    distill_loss_weight: float = 0.0
    task_loss_weight: float = 1.0
    block_loss_weight: float = 0.0
    teacher_lr: float = 0.0
    kernel_loss_weight: float = 0.0
    kernel_temperature: float = 1.0
    bn_images: int = 2048
    sync_bn: bool = False
    model_ema: bool = False
    model_ema_decay: float = 0.9998
    model_ema_warmup: bool = False
    amp: str = "no"
    bits: Literal[0, Bits] = 0
    requant: Requant = "fixed"
    channels_last: bool = False
    torchcompile: str = ""
    grad_checkpointing: bool = False
    seed: int = 0
    log_interval: int = 50
    log_with: str = ""
    save_every: int = 0
    skip_limit: int = 10

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise RecipeError(f"{name} is {value}, expected at least {least}")
        for name in _SHARES:
            if not 0 <= getattr(self, name) <= 1:
                raise RecipeError(f"{name} is {getattr(self, name)}, expected a number between 0 and 1")
        for name, known in _ONE_OF.items():
            if getattr(self, name) not in known:
                raise RecipeError(f"{name} is {getattr(self, name)!r}, expected {', '.join(known[:-1])} or {known[-1]}")
        if self.bits and self.bits not in BITS:
            raise RecipeError(f"bits is {self.bits}, expected 0 or one of {', '.join(map(str, BITS))}")
        for name in ("kd_temperature", "kernel_temperature", "sharpness"):
            if getattr(self, name) <= 0:
                raise RecipeError(f"{name} is {getattr(self, name)}, expected a positive number")
        policy = self.auto_augment
        if policy and not policy.startswith(("rand", "augmix")) and policy.split("-")[0] not in _AUTO_AUGMENT:
            raise RecipeError(
                f"auto_augment is {policy!r}, expected rand-…, augmix-… or one of {', '.join(_AUTO_AUGMENT)}"
            )
        if self.crop_padding and (self.color_jitter or policy or self.reprob):
            raise RecipeError(
                f"crop_padding is {self.crop_padding}, expected 0 with color_jitter, auto_augment or reprob: "
                "they need timm's random resized crop"
            )
        if self.mixes and self.batch_size % 2:
            raise RecipeError(
                f"batch_size is {self.batch_size}, expected an even number with mixup or cutmix, which mix pairs"
            )
        if self.task_loss_weight == 0 and self.distill_loss_weight == 0:
            raise RecipeError(
                "task_loss_weight and distill_loss_weight are both 0, expected one above 0: nothing would train the "
                "classifier"
            )

    def scaled(self, rate: float, processes: int) -> float:
        """Scale a learning rate to the images that an optimizer step of that many processes has."""
        images = self.batch_size * processes * self.grad_accum_steps
        return rate * images / self.lr_base_size if self.lr_base_size else rate

    def scaled_lr(self, processes: int) -> float:
        """The student's learning rate for the images that an optimizer step of that many processes has."""
        return self.scaled(self.lr, processes)

    @property
    def augmentation(self) -> Augmentation:
        """The settings of the training images' augmentation."""
        return Augmentation(
            self.crop_padding, self.hflip, self.scale, self.color_jitter, self.auto_augment, self.reprob
        )

    @property
    def mixes(self) -> bool:
        """Whether images are mixed in some epoch."""
        return self.mixup > 0 or self.cutmix > 0

    def changed(self, values: Mapping[str, Any]) -> "Recipe":
        """Return a copy with some settings replaced, checked.

        Raises:
            RecipeError: An unknown key (the nearest is suggested) or a value of the wrong type.
        """
        hints = get_type_hints(Recipe)
        checked = {}
        if values.get("version", RECIPE_VERSION) != RECIPE_VERSION:
            raise RecipeError(
                f"the recipe has version {values['version']!r:.40}, expected {RECIPE_VERSION}: install a newer adderkit"
            )
        for key, value in values.items():
            if key not in hints:
                near = get_close_matches(key, hints, n=1, cutoff=0.4)
                hint = f"; did you mean {near[0]!r}?" if near else f"; known keys: {', '.join(hints)}"
                raise RecipeError(f"unknown recipe key {key!r}{hint}")
            checked[key] = _typed(key, value, hints[key])
        return dataclasses.replace(self, **checked)

    def to_dict(self) -> dict[str, Any]:
        """Return a mapping that YAML and JSON can hold and ``changed`` reads back."""
        return dataclasses.asdict(self)


_AUTO_AUGMENT = ("original", "originalr", "v0", "v0r", "3a")
_SHARES = ("hflip", "scale", "smoothing", "reprob", "mixup_prob", "mixup_switch_prob", "model_ema_decay")
_ONE_OF = {
    "amp": ("no", "bf16", "fp16"),
    "adder_init": ("keep", "normal"),
    "requant": get_args(Requant),
    "mixup_mode": ("batch", "pair", "elem"),
}
_LEAST: dict[str, float] = {
    **dict.fromkeys(("train_images", "crop_padding", "workers", "warmup_epochs", "bn_images", "save_every"), 0),
    "lr_base_size": 0,
    **dict.fromkeys(("img_size", "epochs", "batch_size", "grad_accum_steps", "log_interval", "skip_limit"), 1),
    **dict.fromkeys(("lr", "momentum", "weight_decay", "warmup_lr", "min_lr", "clip_grad", "eta"), 0),
    **dict.fromkeys(("block_loss_weight", "teacher_lr", "kernel_loss_weight"), 0),
    **dict.fromkeys(("distill_loss_weight", "task_loss_weight", "color_jitter", "seed"), 0),
    **dict.fromkeys(("mixup", "cutmix", "mixup_off_epoch"), 0),
}


def _typed(key: str, value: Any, hint: Any) -> Any:
    """Return the value as the field's type.

    An integer may stand for a float, and ``1e-4`` (text to YAML) too; 0 and 1 may stand for a boolean.
    """
    allowed = get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in allowed:
        return None
    wanted = next(kind for kind in allowed if kind is not type(None))
    if get_origin(wanted) is Literal:
        wanted = type(get_args(wanted)[0])  # the recipe itself checks the value
    if wanted is float and not isinstance(value, bool):
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = float("nan")
        if abs(number) < float("inf"):
            return number
    elif wanted is bool and type(value) is int and value in (0, 1):
        return bool(value)
    elif wanted is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    elif isinstance(value, wanted) and (wanted is bool or not isinstance(value, bool)):
        return value
    expected = {float: "a number", bool: "true or false"}.get(wanted, wanted.__name__)
    raise RecipeError(f"{key} is {value!r:.120}, expected {expected}")
