"""Streamed data sets by timm's readers, made strict: a damaged image or shard is an error instead of being skipped."""

import io
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from timm.data import create_dataset
from timm.data.readers.reader_wds import ReaderWds
from torch.utils.data import IterableDataset

from ...convert.errors import DatasetError
from .images import decode_image, naming, require_whole_images, to_mode
from .labels import Labels


class StreamedImages(IterableDataset[tuple[Any, int]]):
    """A stream of images, as ``loaders.make_loader`` configures it.

    Args:
        reader: timm's reader, which distributes shards among processes and loader workers.
        mode: PIL mode of the images, ``L`` or ``RGB``.
        name: Name of the data set, for messages.
        labels: Translation of the labels; ``None`` leaves them as they are.
    """

    def __init__(self, reader: Any, mode: str, name: str, labels: Callable[[Any], int] | None = None) -> None:
        self.reader = reader
        self.mode = mode
        self.name = name
        self.labels = labels

    def __len__(self) -> int:
        return len(self.reader)

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        return self.read(self.reader)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Class names in order of class index, once the labels are matched with a model's."""
        return self.labels.names if isinstance(self.labels, Labels) else None

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, from which the order follows."""
        self.reader.set_epoch(epoch)

    def set_loader_cfg(self, num_workers: int) -> None:
        """Tell the reader how many loader workers will read."""
        self.reader.set_loader_cfg(num_workers=num_workers)

    def read(self, reader: Any) -> Iterator[tuple[Any, int]]:
        """Yield the images and labels of a copy of the reader.

        Raises:
            DatasetError: An image or a shard is damaged, or a label is not one of a class.
        """
        require_whole_images()
        if self.name.lower().startswith("hfids/"):
            _leave_undecoded(reader)
        images = iter(reader)
        number = 0

        def name() -> str:
            return f"image {number} of {self.name}"

        while True:
            try:
                image, label = next(images)
            except StopIteration:
                return
            except DatasetError:
                raise
            except Exception as error:
                with naming(name):
                    raise error
            with naming(name):
                prepared = self._decoded(image), label if self.labels is None else self.labels(label)
            yield prepared
            number += 1

    def _decoded(self, image: Any) -> Any:
        if isinstance(image, dict):  # as the package datasets stores it
            with io.BytesIO(image["bytes"]) if image.get("bytes") else open(image["path"], "rb") as file:
                return decode_image(file, self.mode)
        return to_mode(image, self.mode)


class StrictShards(ReaderWds):
    """timm's reader of WebDataset shards, with errors raised that it logs and skips."""

    def _lazy_init(self) -> None:
        super()._lazy_init()
        for stage in self.ds.pipeline:
            if "handler" in getattr(stage, "kw", {}):
                stage.kw["handler"] = _raise
                stage.args = tuple(_NamedSample(each) if callable(each) else each for each in stage.args)


class _NamedSample:
    """A function of a shard's sample, with errors that name the sample.

    Args:
        function: The function.
    """

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function

    def __call__(self, sample: Any) -> Any:
        with naming(lambda: f"{sample.get('__key__')} of {sample.get('__url__')}"):
            return self.function(sample)


def open_stream(spec: str, root: str | None, split: str, mode: str, *, training: bool) -> StreamedImages:
    """Open a data set that timm streams: ``wds/…``, ``hfids/…`` or ``tfds/…``.

    Args:
        spec: Name of the data set.
        root: Folder, or address, of its files.
        split: Name of the split.
        mode: PIL mode of the images, ``L`` or ``RGB``.
        training: Shuffle, and fill up the last batches.
    """
    kind, _, name = spec.partition("/")
    if kind.lower() == "wds":
        # With no mode, the reader leaves the conversion of pixels to us.
        reader = StrictShards(
            root=root, name=name, split=split, is_training=training, input_img_mode="", input_key="jpg;jpeg;png;webp"
        )
        return StreamedImages(reader, mode, spec)
    decoded = mode if kind.lower() == "tfds" else ""  # TensorFlow decodes to 8 bits
    dataset: Any = create_dataset(
        spec, root=root, split=split, is_training=training, download=False, input_img_mode=decoded
    )
    return StreamedImages(dataset.reader, mode, spec)


def _leave_undecoded(reader: Any) -> None:
    """Make a reader of ``hfids/…`` yield files: the package datasets would turn images as their camera was held."""
    from datasets import Image

    if reader.ds is None:
        reader._lazy_init()
    reader.ds = reader.ds.cast_column(reader.input_key, Image(decode=False))


def _raise(error: Exception) -> NoReturn:
    """Handle an error of a shard: raise it, as one line that names the shard where webdataset does."""
    if isinstance(error, DatasetError):
        raise error
    text = " ".join(str(part) for part in error.args if isinstance(part, str))
    raise DatasetError(f"a shard cannot be read: {text or type(error).__name__}; download it again") from error
