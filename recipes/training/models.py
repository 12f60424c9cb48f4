"""Build what a job names: the model to train, its teacher and the data, checked against each other."""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.models import get_model_input_config, split_model_name_tag
from torch import Tensor, nn

from ...adder_layers.modules import adder_layers
from ...convert.calibration.batchnorm import named_batch_norms
from ...convert.checkpoint.configuration import recorded_base
from ...convert.checkpoint.folder import CONFIG
from ...convert.class_names import class_names_of, record_class_names_
from ...convert.conversion.targets import is_converted
from ...convert.errors import ModelSourceError, RecipeError
from ...convert.files import read_json_object
from ...convert.graph.layers import is_feature_extractor
from ...convert.graph.modes import eval_mode, model_dtype
from ...convert.model_source import ModelSource
from ..configs.recipe import Recipe
from ..data.datasets import DataConfig, ImageSource, class_names, open_dataset, small_dataset, subset, with_labels
from ..data.labels import match_labels, read_class_map
from ..objectives.teacher import DistillationTeacher, FrozenTeacher
from ..objectives.terms import active_terms
from ..runs.kept_teacher import TEACHER, KeptTeacher, find_teacher


@dataclasses.dataclass(frozen=True)
class Job:
    """The models of a run, as they were named on the command line; kept in ``args.yaml``.

    Args:
        source: Model to train. Without ``num_classes`` and ``in_chans`` a timm model gets those of the data set.
        teacher: Teacher for distillation, named like a model; by default the one that the converted folder records.
        teacher_checkpoint: File or folder of weights of that teacher, instead of the pretrained ones.
        command: Command line that began the run, for the record.
    """

    source: ModelSource
    teacher: str | None = None
    teacher_checkpoint: str | None = None
    command: str | None = None

    def absolute(self) -> "Job":
        """Return the job with absolute paths, so that it can be resumed from any working directory."""
        if self.teacher is None:
            return dataclasses.replace(self, source=self.source.absolute(), teacher_checkpoint=None)
        teacher = ModelSource(self.teacher, checkpoint=self.teacher_checkpoint).absolute()
        return dataclasses.replace(
            self, source=self.source.absolute(), teacher=teacher.name, teacher_checkpoint=teacher.checkpoint
        )

    @classmethod
    def from_dict(cls, values: object) -> "Job":
        """Read what ``dataclasses.asdict`` wrote.

        Raises:
            TypeError: It has other fields.
        """
        if not isinstance(values, Mapping) or not isinstance(values.get("source"), Mapping):
            raise TypeError("expected a mapping with a source")
        job = cls(**{**values, "source": ModelSource(**values["source"])})
        if dataclasses.asdict(job) != values:
            raise TypeError("expected all fields")
        return job


def build_student(job: Job, recipe: Recipe, *, weights: bool = True, training: bool = True) -> nn.Module:
    """The model to train or to evaluate, with as many classes as the data set has.

    Args:
        job: What was named.
        recipe: Data set and image size.
        weights: Whether its weights are wanted; without them nothing is fetched.
        training: Whether it will be trained; pretrained weights that are only evaluated keep their classifier.

    Raises:
        ModelSourceError: See ``ModelSource.build``; or a saved model's classes do not fit the data set.
    """
    source, known = job.source, small_dataset(recipe.dataset)
    if source.folder is not None:
        model = source.build(weights=weights)
        _set_image_size(model, recipe.img_size)
        return model
    arguments: dict[str, Any] = {}
    names: Sequence[str] | None = None
    from_hub = source.pretrained and source.checkpoint is None
    keep = from_hub and not training
    saved = source.checkpoint_folder is not None  # it has its own model arguments
    if known is not None and not saved:
        names = known.classes
        arguments["num_classes"] = source.num_classes or (None if keep else len(names))
        arguments["in_chans"] = source.in_chans or known.input_size[0]
    elif source.num_classes is None and not saved and not keep:
        names = class_names(open_dataset(recipe.dataset, recipe.data_dir, recipe.train_split))
        arguments["num_classes"] = _count_classes(names, recipe)
    if known is not None and not saved and not from_hub:
        size = (recipe.img_size, recipe.img_size) if recipe.img_size else known.input_size[1:]
        # Whole, as training sees them: ImageNet's center crop of 0.875 would enlarge what is evaluated.
        overlay: dict[str, Any] = {"input_size": (arguments["in_chans"], *size), "crop_pct": 1.0}
        if arguments["in_chans"] == known.input_size[0]:
            overlay |= {"mean": known.mean, "std": known.std}
        arguments["pretrained_cfg_overlay"] = overlay
        if _has_fixed_size(source.name):
            arguments["img_size"] = size
    model = source.build(weights=weights, **arguments)
    _set_image_size(model, recipe.img_size)
    if training and source.checkpoint is None and names is not None and not recipe.class_map:
        _name_classes(model, names)
    return model


def build_teacher(
    job: Job, recipe: Recipe, student: nn.Module, *, trains: bool = False, weights: bool = True
) -> DistillationTeacher:
    """Build the network to distil from.

    Args:
        job: What was named.
        recipe: All settings.
        student: The model that it teaches.
        trains: Whether it trains alongside; else it is frozen.
        weights: Whether its weights are wanted; without them nothing is fetched.

    Raises:
        ModelSourceError: No teacher is named, or it does not fit the student.
    """
    name = teacher_of(job)
    if name is None:
        off = " ".join(f"--set {term.switch}=0" for term in active_terms(recipe) if term.teacher)
        raise ModelSourceError(
            f"the recipe distills, but {job.source.name} names no teacher; give the original CNN with "
            f"--teacher NAME|DIR, if needed with --teacher-checkpoint FILE, or train on labels alone with {off} "
            "--set task_loss_weight=1"
        )
    try:
        model = _teacher_model(name, job, student, trains=trains, weights=weights)
    except ModelSourceError as error:
        raise ModelSourceError(f"cannot build the teacher: {error}; or name another with --teacher") from error
    classes, own = (getattr(each, "num_classes", None) for each in (model, student))
    if classes != own:
        raise ModelSourceError(f"the teacher {name} has {classes or 'no'} classes, expected {own}, like the student")
    names, own_names = class_names_of(model), class_names_of(student)
    if names is not None and own_names is not None and names != own_names:
        index = next(index for index, name in enumerate(names) if name != own_names[index])
        raise ModelSourceError(
            f"class {index} of the teacher {name} is {names[index]!r}, expected {own_names[index]!r} as in the model; "
            "name a teacher that was trained on the same classes in the same order"
        )
    try:
        return (DistillationTeacher if trains else FrozenTeacher)(model, DataConfig.of(student))
    except ValueError as error:
        raise ModelSourceError(f"{name} cannot teach {job.source.name}: {error}") from error


def _teacher_model(name: str, job: Job, student: Any, *, trains: bool, weights: bool) -> nn.Module:
    """Build it with its weights; but a teacher that trains alongside may begin at random, as the student then does."""
    if job.teacher_checkpoint is not None:
        return teacher_source(name, job, student).build(weights=weights)
    source = ModelSource(name)
    if job.source.pretrained or not trains:
        return source.build(weights=weights)
    if source.folder is not None:
        return source.build(weights=False)
    data = DataConfig.of(student)
    overlay = {"input_size": data.input_size, "mean": data.mean, "std": data.std}
    arguments = {"num_classes": student.num_classes, "in_chans": data.input_size[0]}
    return source.build(weights=False, pretrained_cfg_overlay=overlay, **arguments)


def teacher_source(name: str, job: Job, student: Any) -> ModelSource:
    """Return where the teacher's weights come from; with a checkpoint of its own it has the student's classes."""
    source = ModelSource(name, checkpoint=job.teacher_checkpoint)
    if source.checkpoint is None or source.checkpoint_folder is not None:
        return source
    channels = get_model_input_config(student)["input_size"][0]
    return dataclasses.replace(source, num_classes=getattr(student, "num_classes", None), in_chans=channels)


def teacher_of(job: Job) -> str | None:
    """Return the teacher that was given, or else the one recorded in the converted folder.

    What a folder records may be somebody else's choice, so it is never downloaded, except its own base model's weights
    from where timm's registry says.

    Raises:
        ModelSourceError: The recorded teacher would be downloaded, or is none of timm's models.
    """
    if job.teacher is not None:
        return job.teacher
    name, folder = job.source.report().teacher, job.source.folder
    if name is None or folder is None:
        return None
    if name == TEACHER:
        return str(find_teacher(folder))
    if Path(name).is_absolute() or split_model_name_tag(name)[0] == recorded_base(read_json_object(folder / CONFIG)):
        return name
    raise ModelSourceError(
        f"{folder} names {name} as its teacher, which is not its own base model and would be downloaded: "
        f"allow that with --teacher {name}, or give another CNN"
    )


def keep_teacher(job: Job, student: nn.Module) -> KeptTeacher:
    """Return the teacher to keep in a run's folder: the one that it distills from, or else the one of the saved model.

    Args:
        job: What was named, with the teacher that the run distills from.
        student: The model that it teaches.
    """
    if job.teacher is None:
        return KeptTeacher.recorded_by(job.source)
    source = teacher_source(job.teacher, job, student)
    folder = source.folder or source.checkpoint_folder
    if folder is not None:
        return KeptTeacher(TEACHER, folder=folder)
    if source.is_registered:
        return KeptTeacher(job.teacher)
    return KeptTeacher.of_cnn(source, source.build())


def open_split(recipe: Recipe, model: nn.Module, *, training: bool) -> ImageSource:
    """Open the training or evaluation split, its labels being the model's class indices.

    Raises:
        DatasetError: The data set is missing, or has other classes than the model.
        ModelSourceError: The model has no classes.
    """
    if is_feature_extractor(model):
        raise ModelSourceError(
            "the model is a feature extractor, which has no classes to compare with labels, expected a classifier; "
            "put a head on it in Python, as docs/usage.md shows"
        )
    channels = get_model_input_config(model)["input_size"][0]
    split = recipe.train_split if training else recipe.val_split
    dataset = open_dataset(recipe.dataset, recipe.data_dir, split, channels, training=training)
    return label_split(dataset, recipe, model, training=training)


def label_split(dataset: ImageSource, recipe: Recipe, model: nn.Module, *, training: bool) -> ImageSource:
    """Translate the labels of an opened split to the model's class indices, and cut the training split.

    Args:
        dataset: Split as ``open_dataset`` returns it.
        recipe: Data set and class map; size of the training split.
        model: Model; to be trained, one without class names records those of the training split.
        training: Whether this is the training split.

    Raises:
        DatasetError: The data set has other classes than the model.
    """
    split = recipe.train_split if training else recipe.val_split
    class_map = read_class_map(recipe.class_map, recipe.data_dir) if recipe.class_map else None
    name = f"data set {recipe.dataset!r}, split {split!r},"
    labels = match_labels(class_names(dataset), model, name, class_map, training=training)
    if training and labels.names is not None and class_names_of(model) is None:
        record_class_names_(model, labels.names)
    dataset = with_labels(dataset, labels)
    return subset(dataset, recipe.train_images, recipe.seed) if training else dataset


def default_recipe(source: ModelSource) -> str:
    """Return the name of the default recipe: ``distill`` for a converted folder, ``cnn`` for anything else."""
    return "distill" if source.report().plan else "cnn"


def check_norms(model: nn.Module) -> None:
    """Refuse a frozen BatchNorm: adder weights move, its statistics would not (arXiv 2112.13608, section 2)."""
    if not is_converted(model):
        return
    for path, module in model.named_modules():
        if type(module).__name__.startswith("FrozenBatchNorm"):
            raise RecipeError(
                f"{path} is a {type(module).__name__}, expected a BatchNorm that can follow: adder weights move far, "
                "and frozen statistics go stale until training diverges; build the model without frozen normalization"
            )


def check_single_images(model: nn.Module, recipe: Recipe, images: int | None, processes: int) -> None:
    """Refuse batches of one image if a BatchNorm would then see one value per channel, whose variance is 0.

    Args:
        model: Model to train.
        recipe: Its batch size.
        images: Number of training images, if it is known.
        processes: Number of processes, whose batches ``sync_bn`` joins.

    Raises:
        RecipeError: There is such a BatchNorm.
    """
    size = min(recipe.batch_size, images or recipe.batch_size)
    if size * (processes if recipe.sync_bn else 1) > 1:
        return
    copied = copy.deepcopy(model).to("meta")
    seen: list[str] = []

    def note(path: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0].numel() == inputs[0].shape[1]:
            seen.append(path)

    for path, norm in named_batch_norms(copied).items():
        norm.register_forward_pre_hook(partial(note, path))
    with eval_mode(copied), torch.no_grad():
        copied(torch.zeros(1, *DataConfig.of(model).input_size, device="meta", dtype=model_dtype(model)))
    if seen:
        raise RecipeError(
            f"batches have a single image, so the BatchNorm {seen[0]} sees one value per channel, expected at "
            f"least 2 images: set batch_size (now {recipe.batch_size}) to 2 or more"
        )


def draw_adder_weights(model: nn.Module) -> None:
    """Draw the weights of all adder layers from N(0, 1), as AdderNet's code does (huawei-noah/AdderNet, adder.py).

    Raises:
        RecipeError: There is no adder layer.
    """
    layers = adder_layers(model)
    if not layers:
        raise RecipeError("adder_init is normal, but the model has no adder layer; convert it first, or set it to keep")
    for layer in layers.values():
        nn.init.normal_(layer.weight)


def _count_classes(names: Sequence[str] | None, recipe: Recipe) -> int | None:
    """Return the number of classes of the class map or else of the data set; ``None`` if it is unknown."""
    if recipe.class_map:
        return max(read_class_map(recipe.class_map, recipe.data_dir).values()) + 1
    return len(names) if names else None


def _name_classes(model: Any, names: Sequence[str]) -> None:
    """Record the classes that a new model will be trained on, unless it has names or another number of classes."""
    if class_names_of(model) is None and getattr(model, "num_classes", None) == len(names):
        record_class_names_(model, names)


def _set_image_size(model: nn.Module, size: int | None) -> None:
    if size is None:
        return
    current = get_model_input_config(model)
    if current["fixed_input_size"] and tuple(current["input_size"][1:]) != (size, size):
        raise RecipeError(f"img_size is {size}, expected {current['input_size'][1]}: the model's image size is fixed")
    timm_model: Any = model
    timm_model.pretrained_cfg = {**timm_model.pretrained_cfg, "input_size": (current["input_size"][0], size, size)}


def _has_fixed_size(name: str) -> bool:
    from timm.models import get_pretrained_cfg

    config = get_pretrained_cfg(split_model_name_tag(name)[0])
    return bool(config and config.fixed_input_size)
