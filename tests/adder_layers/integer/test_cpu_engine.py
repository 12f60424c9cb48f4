"""The C++ executor, every instruction set that this machine has, bit by bit against the reference."""

import concurrent.futures
import dataclasses
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adderkit.adder_layers.backends import cpu
from adderkit.adder_layers.geometry import Window
from adderkit.adder_layers.integer import reference
from adderkit.adder_layers.integer.cpu_engine import CpuEngine, available, terms
from adderkit.adder_layers.integer.memory_layout import lay_out
from adderkit.adder_layers.integer.plan import Adder, Convolution, Linear, MaxPool, last_use
from tests.adder_layers.integer.random_plans import (
    LAYERS,
    POINT,
    Builder,
    Layer,
    plain_network,
    residual_network,
    single,
    square,
)

SETS = available()


@pytest.fixture(params=SETS)
def forced(request):
    return request.param


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def assert_equals_reference(builder: Builder, name: str, image: torch.Tensor | None = None) -> torch.Tensor:
    plan, image = builder.plan(), builder.image() if image is None else image
    expected, actual = reference.run(plan, image), CpuEngine(plan, name).run(image)
    assert actual.dtype == expected.dtype
    assert torch.equal(actual, expected), f"{int((actual != expected).sum())} of {expected.numel()} differ"
    return expected


def test_the_extension_was_built():
    assert SETS[-1:] == ["baseline"], "the C++ extension is missing; look at what the installation said of CMake"


@pytest.mark.parametrize("cls", [Adder, Convolution])
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name, cls, forced, threads):
    assert_equals_reference(single(cls, LAYERS[name]), forced)


@pytest.mark.parametrize("seed", range(3))
def test_networks(seed, forced, threads):
    for network in (residual_network(seed), plain_network(seed)):
        logits = assert_equals_reference(network, forced, network.image(3))
        assert logits.unique().numel() > 10


@pytest.mark.parametrize("cls", [Adder, Convolution])
@pytest.mark.parametrize("filters", [1, 2, 3, 5, 8, 9, 15, 17, 24, 31, 33, 66])
def test_tails_of_filters_and_positions(filters, cls, forced):
    for channels, columns in ((1, 1), (5, 2), (8, 3), (11, 4), (17, 5), (24, 7)):
        assert_equals_reference(single(cls, Layer(channels, filters, size=(1, columns))), forced)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_layer(data):
    def pair(low: int, high: int) -> tuple[int, int]:
        return data.draw(st.tuples(st.integers(low, high), st.integers(low, high)))

    kernel, stride, padding, dilation = pair(1, 4), pair(1, 3), pair(0, 4), pair(1, 3)
    size = tuple((k - 1) * d + 1 + more for k, d, more in zip(kernel, dilation, pair(0, 6), strict=True))
    groups = data.draw(st.sampled_from([1, 1, 2, 3, 7]))
    per_group, filters = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 12))
    layer = Layer(
        groups * per_group,
        groups * filters,
        Window(kernel, stride, padding, dilation),
        groups,
        size,
        data.draw(st.sampled_from([255, 63, 31, 15, 1])),
        data.draw(st.booleans()),
        data.draw(st.sampled_from([1, 1, 2, 3, 5])),
    )
    builder = single(data.draw(st.sampled_from([Adder, Convolution])), layer, data.draw(st.integers(0, 1000)))
    for name in SETS:
        assert_equals_reference(builder, name, builder.image(data.draw(st.integers(1, 3))))


EXTREME = (
    "many-channels",
    "7x7-stem",
    "depthwise",
    "depthwise-stride2",
    "groups",
    "four-terms-wide-groups",
    "three-terms-depthwise",
)


@pytest.mark.parametrize("byte", [0, 255])
@pytest.mark.parametrize("weight", ["least", "most", "mixed"])
@pytest.mark.parametrize("cls", [Adder, Convolution])
@pytest.mark.parametrize("layer", EXTREME)
def test_extremes(layer, cls, weight, byte, forced):
    """Sums as large as they get: pairs of products beyond 16 bits, the largest multipliers, offsets near 2^62."""
    builder = single(cls, LAYERS[layer])
    step, limits = builder.steps[0], (0, 255) if cls is Adder else (-128, 127)
    filters = len(step.weight)
    signs = (torch.arange(step.weight.numel()) % 2).reshape(step.weight.shape)
    weights = {"least": signs * 0, "most": signs * 0 + 1, "mixed": signs}[weight]
    factors = step.requantization
    for sign in (1, -1):
        largest = torch.full((filters,), sign * (2**31 - 1), dtype=torch.int32)
        offset = torch.full((filters,), -sign * (2**60))
        for shift in (0, 44, 62):
            builder.steps[0] = dataclasses.replace(
                step,
                weight=torch.tensor(limits)[weights].to(step.weight.dtype),
                requantization=dataclasses.replace(
                    factors,
                    multiplier=largest,
                    offset=offset if shift else torch.zeros_like(offset),
                    shift=torch.full((filters,), shift, dtype=torch.uint8),
                ),
            )
            builder.activations[0] = dataclasses.replace(
                builder.activations[0], zero_point=torch.full_like(builder.activations[0].zero_point, 255 - byte)
            )
            assert_equals_reference(builder, forced, torch.full_like(builder.image(1), byte))


def test_depthwise_sums_beyond_16_bits(forced):
    """17 x 17 differences of 255 are more than 16 bits hold."""
    builder = single(Adder, Layer(3, 3, square(17), groups=3, size=(18, 17)))
    builder.steps[0] = dataclasses.replace(builder.steps[0], weight=torch.zeros_like(builder.steps[0].weight))
    assert_equals_reference(builder, forced, torch.full_like(builder.image(), 255))


@pytest.mark.parametrize("channels", [1, 8])
def test_as_many_terms_as_32_bits_hold(channels, forced):
    """24 terms, each with a distance of 128, are 2^31 - 128."""
    builder = Builder(channels, 3, 3)
    builder.layer(Adder, 8, POINT, groups=channels, terms=24)
    builder.steps[0] = dataclasses.replace(builder.steps[0], weight=torch.full_like(builder.steps[0].weight, 127))
    assert_equals_reference(builder, forced, torch.full_like(builder.image(), 255))


def test_sums_of_large_windows_beyond_16_bits(forced):
    builder = Builder(5, 20, 30)
    builder.average_pool((20, 30))
    assert_equals_reference(builder, forced, torch.full_like(builder.image(), 255))


@pytest.mark.parametrize(
    ("window", "size"),
    [
        (square(3, 2, 1), None),
        (square(3, 2, 1), (7, 6)),
        (square(3, 1, 2, 3), None),
        (Window((2, 3), (1, 2), (1, 0), (2, 1)), None),
    ],
)
@pytest.mark.parametrize("channels", [3, 40])
def test_max_pooling(window, size, channels, forced, threads):
    builder = Builder(channels, 12, 11)
    builder.max_pool(window, size)
    assert_equals_reference(builder, forced)


def test_images_that_go_through_in_several_passes(forced):
    """A pass takes the images that 48 MB hold."""
    builder = Builder(48, 150, 150)
    builder.layer(Adder, 4, square(3, 50, 1))
    assert lay_out(builder.plan()).bytes * 60 > 48 << 20
    assert_equals_reference(builder, forced, builder.image(60))


def test_no_image_at_all(forced):
    network = residual_network()
    assert CpuEngine(network.plan(), forced).run(network.image(0)).shape == (0, 10)
    layer = single(Adder, LAYERS["3x3"])
    assert CpuEngine(layer.plan(), forced).run(layer.image(0)).shape == (0, 8, 11, 32)


@pytest.mark.parametrize("scale", [1 / 58.4, 0.02, 1.0])
def test_real_images_become_bytes_as_the_reference_says(scale, forced):
    builder = residual_network()
    zero_point = torch.tensor([0, 124, 255], dtype=torch.uint8)
    builder.activations[0] = dataclasses.replace(builder.activations[0], scale=scale, zero_point=zero_point)
    halves = (torch.arange(300) - 150.5) * scale  # on the edges between two bytes, as far as fp32 has them
    images = torch.randn(4, 3, 23, 19) * 60 * scale
    images.view(-1)[:300] = halves
    images[1, 1, 1, :2] = torch.tensor([float("inf"), -float("inf")])
    plan = builder.plan()
    expected = reference.run(plan, reference.quantize(images, scale, zero_point))
    for layout in (images, images.contiguous(memory_format=torch.channels_last), images.double()):
        assert torch.equal(CpuEngine(plan, forced).run_float(layout), expected)
    layer = single(Adder, Layer(3, 4, size=(23, 19)))
    layer.activations[0] = builder.activations[0]
    expected = reference.run(layer.plan(), reference.quantize(images, scale, zero_point))
    assert torch.equal(CpuEngine(layer.plan(), forced).run_float(images), expected)


def test_several_threads_call_at_once(forced):
    builder = residual_network()
    plan = builder.plan()
    engine, images = CpuEngine(plan, forced), [builder.image(1 + i % 5) for i in range(40)]
    expected = [reference.run(plan, image) for image in images]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for actual, wanted in zip(pool.map(engine.run, images), expected, strict=True):
            assert torch.equal(actual, wanted)


def test_the_engine_keeps_its_weights():
    """What it was made from may change or go."""
    builder = residual_network()
    plan, image = builder.plan(), builder.image()
    expected = reference.run(plan, image)
    engine = CpuEngine(plan)
    for step in plan.steps:
        if isinstance(step, Adder | Convolution | Linear):
            step.weight.zero_()
    assert torch.equal(engine.run(image), expected)


@pytest.mark.skipif(not torch.set_flush_denormal(False), reason="no such mode here")
def test_a_thread_that_flushes_denormal_numbers(forced):
    """Sums may be added as such numbers; what the caller asked for holds again afterwards."""
    smallest = torch.tensor([5e-324], dtype=torch.float64)
    torch.set_flush_denormal(True)
    try:
        assert_equals_reference(single(Adder, LAYERS["3x3"]), forced)
        assert (smallest * 1).item() == 0
    finally:
        torch.set_flush_denormal(False)
    assert (smallest * 1).item() > 0


def test_strided_images(forced):
    builder = residual_network()
    plan, image = builder.plan(), builder.image(4)
    assert torch.equal(CpuEngine(plan, forced).run(image[::2]), reference.run(plan, image[::2]))


def test_profile_names_every_step(forced):
    builder = residual_network()
    plan = builder.plan()
    rows = CpuEngine(plan, forced).profile(builder.image())
    assert [row.kind for row in rows] == ["read", *(step.kind for step in plan.steps)]
    assert [row.path for row in rows[1:]] == list(plan.paths)
    assert all(row.seconds > 0 for row in rows)
    assert all(
        (row.giga_terms_per_second > 0) == (terms(step, plan) > 0)
        for row, step in zip(rows[1:], plan.steps, strict=True)
    )


def test_profile_of_no_images_is_all_zeros(forced):
    builder = residual_network()
    rows = CpuEngine(builder.plan(), forced).profile(builder.image()[:0])
    assert len(rows) == len(builder.steps) + 1
    assert all(row.seconds == row.giga_terms_per_second == 0 for row in rows)


def test_terms_are_the_products_of_all_sizes():
    builder = single(Adder, LAYERS["groups"])
    assert terms(builder.steps[0], builder.plan()) == 48 * 8 * 9 * 49
    assert terms(MaxPool(0, 1, POINT), builder.plan()) == 0


@pytest.mark.parametrize("seed", range(3))
def test_activations_that_live_together_do_not_overlap(seed):
    plan = residual_network(seed).plan()
    arena, last = lay_out(plan), last_use(plan)
    born = {0: -1} | {step.output: index for index, step in enumerate(plan.steps[:-1])}
    spans = {}
    for number, activation in enumerate(plan.activations):
        rows, columns = arena.halos[number]
        size = (activation.height + 2 * rows) * (activation.width + 2 * columns) * activation.channels
        spans[number] = range(arena.offsets[number], arena.offsets[number] + size)
        assert spans[number].stop <= arena.bytes
    for a in spans:
        for b in spans:
            if a < b and born[b] <= last[a] and born[a] <= last[b]:
                assert spans[a].stop <= spans[b].start or spans[b].stop <= spans[a].start, (a, b)
    assert arena.bytes < sum(map(len, spans.values()))


def test_wrong_images_are_refused():
    engine = CpuEngine(residual_network().plan())
    with pytest.raises(
        TypeError, match=r"image has dtype torch.float32, expected torch.uint8; run_float takes real values"
    ):
        engine.run(torch.zeros(1, 23, 19, 3))
    with pytest.raises(TypeError, match=r"image has dtype torch.uint8, expected floating point; run takes bytes"):
        engine.run_float(torch.zeros(1, 3, 23, 19, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"image has shape \(1, 23, 19, 4\), expected \[N, 23, 19, 3\]"):
        engine.run(torch.zeros(1, 23, 19, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"image has shape \(3, 23, 19\), expected \[N, 3, 23, 19\]"):
        engine.run_float(torch.zeros(3, 23, 19))
    with pytest.raises(ValueError, match="image is on meta, expected cpu"):
        engine.run(torch.zeros(1, 23, 19, 3, dtype=torch.uint8, device="meta"))


def test_bad_plans_are_refused():
    plan = residual_network().plan()
    with pytest.raises(ValueError, match="11 steps and 10 paths"):
        CpuEngine(dataclasses.replace(plan, paths=plan.paths[1:]))


def test_the_variable_forces_a_lower_set(monkeypatch):
    plan = residual_network().plan()
    monkeypatch.setenv(cpu.VARIABLE, "baseline")
    assert CpuEngine(plan).instruction_set == "baseline"
    assert CpuEngine(plan, SETS[0]).instruction_set == SETS[0]
    monkeypatch.setenv(cpu.VARIABLE, "avx1024")
    with pytest.raises(ValueError, match=r"ADDERKIT_CPU is 'avx1024', expected one of .*baseline, torch"):
        CpuEngine(plan)
    with pytest.raises(ValueError, match=r"instruction_set is 'mmx', expected one of .*baseline, torch"):
        CpuEngine(plan, "mmx")


def test_the_reference_serves_where_it_must():
    builder = residual_network()
    plan, image = builder.plan(), builder.image(1)
    engine, real = CpuEngine(plan, "torch"), torch.randn(1, 3, 23, 19)
    assert engine.instruction_set is None
    assert torch.equal(engine.run(image), reference.run(plan, image))
    assert torch.equal(engine.run_float(real), CpuEngine(plan).run_float(real))
    with pytest.raises(RuntimeError, match="the engine runs the reference implementation, which has no profile"):
        engine.profile(image)


def test_without_the_extension_the_reference_serves():
    """In a process of its own, where importing the extension fails."""
    program = (
        "import sys; sys.modules['adderkit.adder_layers._cpu'] = None\n"
        "from adderkit.adder_layers.integer.cpu_engine import CpuEngine, available\n"
        "from tests.adder_layers.integer.random_plans import plain_network\n"
        "builder = plain_network()\n"
        "engine = CpuEngine(builder.plan())\n"
        "print(available(), engine.instruction_set, tuple(engine.run(builder.image(1)).shape))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, cpu.VARIABLE: ""}
    )
    assert done.stdout.strip() == "[] None (1, 7)", done.stderr
    assert "CPU extension is missing" in done.stderr
