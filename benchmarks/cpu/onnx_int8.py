"""Int8 convolutional networks made by ONNX Runtime's own tools: QDQ format, weights per channel."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn


def write_fp32(model: nn.Module, size: int, path: Path) -> None:
    """Export a model that takes ``images`` ``[N, 3, size, size]``, for any N."""
    images = torch.randn(1, 3, size, size)
    axes = {"images": {0: "n"}, "logits": {0: "n"}}
    names: dict[str, Any] = {"input_names": ["images"], "output_names": ["logits"], "dynamic_axes": axes}
    torch.onnx.export(model, (images,), str(path), dynamo=False, **names)


def write_int8(fp32: Path, size: int, path: Path) -> None:
    """Fold and quantize with unsigned activations and signed weights, the pair that VNNI multiplies."""
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.calibrate import CalibrationDataReader
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Random(CalibrationDataReader):
        """Two images of noise."""

        def __init__(self) -> None:
            self.images: Iterator[Any] = iter([{"images": torch.randn(1, 3, size, size).numpy()} for _ in range(2)])

        def get_next(self) -> Any:
            """Return the next input, or ``None`` at the end."""
            return next(self.images, None)

    with tempfile.TemporaryDirectory() as folder:
        prepared = str(Path(folder) / "prepared.onnx")
        quant_pre_process(str(fp32), prepared)
        quantize_static(
            prepared,
            str(path),
            Random(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
