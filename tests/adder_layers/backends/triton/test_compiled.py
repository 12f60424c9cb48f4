"""The GPU kernels compiled for devices that are not there: no spills, no barriers, and loops that mostly add."""

import importlib.util
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from adderkit.adder_layers.backends.triton import launch as gpu
from adderkit.adder_layers.backends.triton.tiles import KERNELS, Tile, configurations

if gpu.interpreted():
    pytest.skip("TRITON_INTERPRET is set: the kernels cannot be compiled", allow_module_level=True)


def _load_disassembly():
    path = Path(__file__).resolve().parents[4] / "benchmarks" / "gpu" / "disassembly.py"
    spec = importlib.util.spec_from_file_location("disassembly", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["disassembly"] = module  # NamedTuple looks its module up
    spec.loader.exec_module(module)
    return module


disassembly = _load_disassembly()
RESNET_LAYERS = [name for name in disassembly.LAYERS if "resnet" in name]
# One layer for each shape of tile, and one depthwise layer.
SAMPLE = ["resnet50-3x3-64", "cifar_resnet20-3x3-16", "cifar_resnet20-3x3-32", "mobilenetv2-depthwise-384"]
# Half precision takes two conversions for each value that is loaded.
USEFUL_SHARE = {"fp32": 0.8, "fp16": 0.78, "bf16": 0.78}
# Small tiles load more for each sum.
INTEGER_SHARE = 0.7

pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")


def _check(kernel, layer, memory_format, dtype, target):
    launch = disassembly.launch_of(kernel, disassembly.LAYERS[layer], memory_format, dtype, target)
    compiled = disassembly.compile_launch(launch, target)
    if target == "gfx942":
        assert disassembly.spilled_on_amd(compiled) == 0
        return
    report = disassembly.measure(compiled, disassembly.USEFUL[kernel])
    if target in ("sm_80", "sm_90"):
        assert report.local == 0, report
    if launch.kernel.endswith("tiled"):
        assert report.loop.barriers == 0, report
        if target == "sm_90":
            assert report.useful_share >= USEFUL_SHARE[dtype], report


@pytest.mark.parametrize("layer", SAMPLE)
@pytest.mark.parametrize("kernel", KERNELS)
def test_hopper(kernel, layer):
    _check(kernel, layer, "nchw", "fp32", "sm_90")


@pytest.mark.parametrize("target", ["sm_80", "sm_100", "gfx942"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_other_devices(kernel, target):
    _check(kernel, "resnet50-3x3-256-stride2", "channels-last", "bf16", target)
    _check(kernel, "mobilenetv2-depthwise-96-stride2", "nchw", "fp16", target)


@pytest.mark.slow
@pytest.mark.parametrize("target", disassembly.TARGETS)
@pytest.mark.parametrize("layer", disassembly.LAYERS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_layer_layout_and_dtype(kernel, layer, target):
    for memory_format in disassembly.FORMATS:
        for dtype in disassembly.DTYPES:
            _check(kernel, layer, memory_format, dtype, target)


def _check_integer(layer, residual, target):
    """The hot loop takes one instruction for four terms of each of its sums, and little else."""
    launch = disassembly.integer_launch_of(disassembly.LAYERS[layer], residual, target)
    report = disassembly.measure(disassembly.compile_launch(launch, target), disassembly.USEFUL["integer"])
    assert report.local == 0, report
    if launch.kernel.endswith("tiled"):
        sums = launch.options["OUTER"] * launch.options["PIECES"]
        assert report.loop.useful == sums * launch.options["UNROLL"], report
        assert report.useful_share >= INTEGER_SHARE, report
        assert report.loop.barriers == 0, report


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_integer_kernels(target):
    _check_integer("resnet50-3x3-64", True, target)
    _check_integer("mobilenetv2-depthwise-384", False, target)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("layer", disassembly.LAYERS)
def test_integer_kernels_of_every_layer(layer, target):
    for residual in (False, True):
        _check_integer(layer, residual, target)


@pytest.mark.parametrize("target", disassembly.TARGETS)
def test_the_layers_use_every_configuration(target):
    used = set()
    for kernel in KERNELS:
        for layer in disassembly.LAYERS.values():
            for memory_format in disassembly.FORMATS:
                launch = disassembly.launch_of(kernel, layer, memory_format, "fp32", target)
                used.add((launch.kernel, *(launch.options.get(name) for name in ("ROWS", "LANES", "PIECES", "UNROLL"))))
    tiles = [(name, shape) for name, shape in configurations(target) if isinstance(shape, Tile)]
    assert used >= {(name, tile.rows, tile.lanes, tile.pieces, tile.unroll) for name, tile in tiles}
    assert {name for name, *_ in used} == {name for name, _ in configurations(target)}
