"""The adder layer as an ONNX function, ``adderkit::AdderConv2d``, with a body of standard operators.

A runtime that does not know the function runs its body. A hardware flow can match it by domain and name and read its
attributes, which are those of ONNX's ``Conv``: ``strides``, ``pads`` (top, left, bottom, right), ``dilations`` and
``group``. Inputs: ``X`` ``[N, C, H, W]`` and ``W`` ``[O, C / group, kh, kw]``. Output: ``[N, O, H', W']``.

The body loops over the taps of the window. For each tap it slices the pixels under it, in all windows at once, and
scans blocks of filters, adding ``Σ_c |x - w|`` to the sums. A block has as many filters as keep the differences below
``BLOCK`` elements, at least one, so that the memory in use is that of a few layer inputs rather than that times the
number of filters. All sizes are computed from the shapes of the inputs.
"""

from typing import Any

import onnx
import onnx.parser
from onnxscript.values import Op, Opset

from .opsets import OLDEST_OPSET

DOMAIN = "adderkit"
VERSION = 1
NAME = "AdderConv2d"
BLOCK = 1 << 19  # differences at once: 2 MB in fp32, as large as a core's cache

_BODY = f"""
<domain: "{DOMAIN}", opset_import: ["": %OPSET%]>
{NAME} <strides: ints, pads: ints, dilations: ints, group: int> (X, W) => (Y)
{{
  zero = Constant <value_ints = [0]> ()
  one = Constant <value_ints = [1]> ()
  two = Constant <value_ints = [2]> ()
  three = Constant <value_ints = [3]> ()
  plane = Constant <value_ints = [2, 3]> ()
  most_elements = Constant <value_ints = [{BLOCK}]> ()
  stride = Constant <value_ints: ints = @strides> ()
  padding = Constant <value_ints: ints = @pads> ()
  dilation = Constant <value_ints: ints = @dilations> ()
  group_number = Constant <value_int: int = @group> ()
  groups = Reshape (group_number, one)

  padded = Pad (X, padding, , plane)
  batch = Shape <start = 0, end = 1> (padded)
  channels = Shape <start = 1, end = 2> (padded)
  size = Shape <start = 2, end = 4> (padded)
  filters = Shape <start = 0, end = 1> (W)
  depth = Shape <start = 1, end = 2> (W)
  kernel = Shape <start = 2, end = 4> (W)
  kernel_columns = Shape <start = 3, end = 4> (W)
  taps = ReduceProd <keepdims = 1> (kernel)

  kernel_gaps = Sub (kernel, one)
  reach = Mul (kernel_gaps, dilation)
  room = Sub (size, reach)
  room_left = Sub (room, one)
  steps = Div (room_left, stride)
  output_size = Add (steps, one)
  span = Mul (steps, stride)
  extent = Add (span, one)
  positions = ReduceProd <keepdims = 1> (output_size)

  image_elements = Mul (channels, positions)
  batch_elements = Mul (batch, image_elements)
  elements = Max (batch_elements, one)
  fitting = Div (most_elements, elements)
  most_filters = Max (fitting, one)
  group_filters = Div (filters, groups)
  others = Sub (group_filters, one)
  further_blocks = Div (others, most_filters)
  blocks = Add (further_blocks, one)
  rounded_up = Add (others, blocks)
  block = Div (rounded_up, blocks)
  filled = Mul (block, blocks)
  lacking = Sub (filled, group_filters)

  grouped_shape = Concat <axis = 0> (groups, group_filters, depth, taps)
  grouped = Reshape (W, grouped_shape)
  filling = Concat <axis = 0> (zero, lacking)
  whole = Pad (grouped, filling, , one)
  blocks_shape = Concat <axis = 0> (groups, blocks, block, depth, taps)
  in_blocks = Reshape (whole, blocks_shape)
  taps_first = Transpose <perm = [4, 1, 0, 2, 3]> (in_blocks)
  taps_shape = Concat <axis = 0> (taps, blocks, one, groups, block, depth, one)
  weights = Reshape (taps_first, taps_shape)

  zero_like = CastLike (zero, X)
  sums_shape = Concat <axis = 0> (blocks, batch, groups, block, positions)
  nothing = Expand (zero_like, sums_shape)
  window_shape = Concat <axis = 0> (batch, groups, one, depth, positions)
  tap_count = Squeeze (taps)
  endless = Constant <value = bool {{1}}> ()
  sums = Loop (tap_count, endless, nothing) <body = tap_loop (int64 tap, bool on, before) => (bool go, after) {{
    go = Identity (on)
    tap_number = Reshape (tap, one)
    row = Div (tap_number, kernel_columns)
    column = Mod (tap_number, kernel_columns)
    place = Concat <axis = 0> (row, column)
    first = Mul (place, dilation)
    end = Add (first, extent)
    pixels = Slice (padded, first, end, plane, stride)
    x = Reshape (pixels, window_shape)
    tap_weights = Gather <axis = 0> (weights, tap)
    distances = Scan <num_scan_inputs = 1, body = block_loop (w) => (distance) {{
      difference = Sub (x, w)
      absolute = Abs (difference)
      distance = ReduceSum <keepdims = 0> (absolute, three)
    }}> (tap_weights)
    after = Add (before, distances)
  }}>

  negative = Neg (sums)
  filters_together = Transpose <perm = [1, 2, 0, 3, 4]> (negative)
  filled_shape = Concat <axis = 0> (batch, groups, filled, positions)
  with_filling = Reshape (filters_together, filled_shape)
  outputs = Slice (with_filling, zero, group_filters, two)
  Y_shape = Concat <axis = 0> (batch, filters, output_size)
  Y = Reshape (outputs, Y_shape)
}}
"""


def adder_function(opset: int) -> onnx.FunctionProto:
    """Return the function, for a model to include.

    Args:
        opset: Version of ONNX's standard operators in the model, 18 or newer.
    """
    return onnx.parser.parse_function(_BODY.replace("%OPSET%", str(opset)))


def complete(model: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """Add the function to an exported model that calls it, check the model, and remove paths of this machine from it.

    Raises:
        ValueError: The model is not valid ONNX; the checker raises several subclasses.
    """
    if any(node.domain == DOMAIN for node in model.graph.node):
        model.functions.append(adder_function(opset))
    for part in (*model.graph.node, *model.graph.input, *model.graph.output, *model.graph.initializer):
        del part.metadata_props[:]  # contains stack traces with paths of this machine
    onnx.checker.check_model(model, full_check=True)
    return model


def _operator() -> Op:
    """Return the function's signature, for onnxscript's graph builder."""
    schema = onnx.defs.OpSchema
    return Op(
        Opset(DOMAIN, VERSION),
        NAME,
        schema(
            NAME,
            DOMAIN,
            VERSION,
            inputs=[schema.FormalParameter("X", "T"), schema.FormalParameter("W", "T")],
            outputs=[schema.FormalParameter("Y", "T")],
            type_constraints=[("T", ["tensor(float)", "tensor(double)", "tensor(float16)"], "")],
            attributes=[
                *(schema.Attribute(name, schema.AttrType.INTS) for name in ("strides", "pads", "dilations")),
                schema.Attribute("group", schema.AttrType.INT),
            ],
        ),
    )


def translate(
    input: Any, weight: Any, bias: Any, stride: list[int], padding: list[int], dilation: list[int], groups: int
) -> Any:
    """Translate ``torch.ops.adderkit.adder_conv2d`` to ONNX: a call of the function, and an addition for the bias.

    A weight ``[O, C / group, T, kh, kw]`` takes T calls, whose outputs are added with the factors 1, 1/2, 1/4, …
    """
    standard, layer = Opset("", OLDEST_OPSET), _operator()
    settings: dict[str, Any] = {"strides": stride, "pads": [*padding, *padding], "dilations": dilation, "group": groups}
    if len(weight.shape) == 4:
        output = layer(input, weight, **settings)
    else:
        output = None
        for index in range(weight.shape[2]):
            term = standard.Gather(weight, standard.Constant(value_int=index), axis=2)
            distance = layer(input, term, **settings)
            if output is None:
                output = distance
                continue
            factor = standard.CastLike(standard.Constant(value_float=0.5**index), distance)
            output = standard.Add(output, standard.Mul(distance, factor))
    if bias is None:
        return output
    return standard.Add(output, standard.Reshape(bias, standard.Constant(value_ints=[1, -1, 1, 1])))
