"""Versions of ONNX's standard operators that a model can be exported for.

Importing this module imports neither torch nor onnx, so that the command line can name the default quickly.
"""

OLDEST_OPSET, NEWEST_OPSET = 18, 23  # 18 is the first in which Pad has axes
DEFAULT_OPSET = OLDEST_OPSET
