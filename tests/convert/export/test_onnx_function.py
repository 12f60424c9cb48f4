"""The ONNX function's body, run by ONNX Runtime, against the reference operator."""

import numpy as np
import onnx
import onnx.helper as build
import pytest
import torch
import torch.nn.functional as F

from adderkit.adder_layers.reference import adder_conv2d_reference
from adderkit.convert.export import onnx_function
from adderkit.convert.export.onnx_function import DOMAIN, NAME, VERSION, adder_function
from adderkit.convert.export.opsets import NEWEST_OPSET, OLDEST_OPSET

onnxruntime = pytest.importorskip("onnxruntime")  # for Python 3.11 and newer


def session(weight, strides, pads, dilations, group, opset=OLDEST_OPSET, kind=onnx.TensorProto.FLOAT):
    """A model of one adder layer whose input may have any batch and size."""
    attributes = {"strides": strides, "pads": pads, "dilations": dilations, "group": group}
    node = build.make_node(NAME, ["x", "w"], ["y"], domain=DOMAIN, **attributes)
    graph = build.make_graph(
        [node],
        "layer",
        [build.make_tensor_value_info("x", kind, ["N", weight.shape[1] * group, "H", "W"])],
        [build.make_tensor_value_info("y", kind, ["N", len(weight), "P", "Q"])],
        [onnx.numpy_helper.from_array(weight.numpy(), "w")],
    )
    opsets = [build.make_opsetid("", opset), build.make_opsetid(DOMAIN, VERSION)]
    model = build.make_model(graph, opset_imports=opsets, functions=[adder_function(opset)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def reference(x, weight, strides, pads, dilations, group):
    top, left, bottom, right = pads
    return adder_conv2d_reference(F.pad(x, (left, right, top, bottom)), weight, None, strides, 0, dilations, group)


GEOMETRIES = {
    "3x3": ((2, 6, 9, 11), (8, 6, 3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1),
    "1x1-strided": ((2, 6, 9, 11), (5, 6, 1, 1), (2, 2), (0, 0, 0, 0), (1, 1), 1),
    "depthwise": ((3, 4, 5, 5), (4, 1, 3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 4),
    "depthwise-multiplied": ((1, 3, 6, 5), (6, 1, 2, 3), (1, 1), (0, 1, 0, 1), (1, 1), 3),
    "grouped": ((2, 6, 7, 8), (9, 2, 3, 3), (1, 2), (1, 1, 1, 1), (1, 1), 3),
    "dilated": ((1, 4, 12, 9), (3, 4, 3, 3), (1, 1), (2, 1, 2, 1), (2, 1), 1),
    "not-square": ((2, 6, 9, 11), (8, 3, 3, 2), (2, 1), (1, 0, 1, 0), (1, 2), 2),
    "asymmetric": ((2, 4, 8, 8), (6, 4, 3, 3), (2, 2), (0, 0, 1, 1), (1, 1), 1),
    "larger-than-stride": ((1, 2, 7, 7), (2, 2, 2, 2), (3, 3), (0, 0, 0, 0), (1, 1), 1),
    "whole-image": ((2, 3, 4, 5), (2, 3, 4, 5), (1, 1), (0, 0, 0, 0), (1, 1), 1),
}


@pytest.mark.parametrize("block", [1, 300, 1 << 19])
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_geometries(monkeypatch, geometry, block):
    """Blocks of one filter, of some that do not divide their number, and of all."""
    shape, weight, *window = geometry
    monkeypatch.setattr(onnx_function, "_BODY", onnx_function._BODY.replace(str(onnx_function.BLOCK), str(block)))
    x, weights = torch.randn(shape), torch.randn(weight)
    (actual,) = session(weights, *window).run(None, {"x": x.numpy()})
    expected = reference(x, weights, *window)
    torch.testing.assert_close(torch.from_numpy(actual), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("opset", range(OLDEST_OPSET, NEWEST_OPSET + 1))
def test_opsets(opset):
    geometry = ((1, 1), (1, 1, 1, 1), (1, 1), 1)
    x, weight = torch.randn(2, 3, 6, 6), torch.randn(4, 3, 3, 3)
    (actual,) = session(weight, *geometry, opset=opset).run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(actual), reference(x, weight, *geometry), rtol=1e-5, atol=1e-5)


def test_no_image():
    (actual,) = session(torch.randn(4, 3, 3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1).run(
        None, {"x": np.zeros((0, 3, 6, 6), np.float32)}
    )
    assert actual.shape == (0, 4, 6, 6)


def test_double_precision():
    geometry = ((1, 1), (1, 1, 1, 1), (1, 1), 1)
    x, weight = torch.randn(2, 3, 6, 6).double(), torch.randn(4, 3, 3, 3).double()
    layer = session(weight, *geometry, kind=onnx.TensorProto.DOUBLE)
    (actual,) = layer.run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(actual), reference(x, weight, *geometry), rtol=1e-12, atol=1e-12)
