"""Networks in C, compiled with all warnings and with sanitizers: they give what the reference gives, to the bit."""

import dataclasses
import platform
import re
import subprocess

import pytest
import torch

from adderkit.adder_layers.geometry import Window
from adderkit.adder_layers.integer import reference
from adderkit.adder_layers.integer.plan import Adder, Convolution, IntegerPlan, Linear, MaxPool
from adderkit.convert.errors import ExportError
from adderkit.convert.export.portable.c_source import c_identifier, c_source

from .conftest import PIXELS, SANITIZERS, WARNINGS, random_plans


def with_extremes(images):
    """Random images, and those whose bytes are all 0 or all 255."""
    return torch.cat([images, torch.zeros_like(images[:1]), torch.full_like(images[:1], 255)])


def assert_equal(plan, images, compiler, *options):
    expected = reference.run(plan, images)
    actual = compiler.outputs(plan, images, *options)
    assert expected.dtype == actual.dtype
    assert torch.equal(expected, actual)
    assert len(expected.unique()) > 1


def power_of_two_plan(plan):
    """The same with every multiplier of a requantization a power of two of its sign, and the first one 0."""

    def rounded(factors):
        sizes = 2 ** factors.double().abs().clamp(min=1).log2().floor()
        return (sizes * factors.sign()).to(torch.int32)

    steps = []
    for step in plan.steps:
        if not isinstance(step, MaxPool | Linear):
            to = step.requantization
            multiplier = rounded(to.multiplier)
            multiplier[0] = 0
            residual = None if to.residual_multiplier is None else rounded(to.residual_multiplier)
            changed = dataclasses.replace(to, multiplier=multiplier, residual_multiplier=residual)
            step = dataclasses.replace(step, requantization=changed)
        steps.append(step)
    return dataclasses.replace(plan, steps=tuple(steps))


def code_of(compiler, prefix, *options):
    """Assembly of each function by its name."""
    compiler.compile("-O1", "-S", *options, f"{prefix}.c")
    found, name = {}, None
    for line in (compiler.folder / f"{prefix}.s").read_text().splitlines():
        label = re.match(r"(\w+):", line)
        name = label[1] if label else name
        found[name] = found.get(name, "") + line + "\n"
    return found


@pytest.mark.parametrize("name", random_plans.LAYERS)
def test_single_layers(name, plans, compiler):
    builder = plans.single(Adder, plans.LAYERS[name])
    assert_equal(builder.plan(), with_extremes(builder.image()), compiler, *SANITIZERS)


@pytest.mark.parametrize("name", ["7x7-stem", "groups-of-three", "depthwise-stride2", "5x3-asymmetric", "residual"])
def test_single_convolutions(name, plans, compiler):
    builder = plans.single(Convolution, plans.LAYERS[name])
    assert_equal(builder.plan(), with_extremes(builder.image()), compiler, *SANITIZERS)


@pytest.mark.parametrize(("size", "terms"), [((23, 19), 1), ((16, 32), 1), ((16, 15), 3)])
def test_whole_network(size, terms, plans, compiler):
    builder = plans.residual_network(seed=size[0], size=size, terms=terms)
    assert_equal(builder.plan(), with_extremes(builder.image(4)), compiler, *SANITIZERS)


def test_classifier_of_several_pixels(plans, compiler):
    builder = plans.plain_network()
    assert_equal(builder.plan(), with_extremes(builder.image(4)), compiler, *SANITIZERS)


@pytest.mark.parametrize("optimization", ["-O0", "-O3"])
def test_optimization_changes_nothing(optimization, plans, compiler):
    builder = plans.residual_network(seed=3)
    assert_equal(builder.plan(), builder.image(4), compiler, optimization)


@pytest.mark.parametrize("window", [((2, 2), (3, 2), (0, 0), (1, 1)), ((3, 2), (2, 3), (1, 0), (2, 1))])
def test_max_pool_with_its_size_rounded_up(window, plans, compiler):
    builder = plans.Builder(5, 10, 13)
    rows, columns = Window(*window).output_size(10, 13)
    builder.max_pool(Window(*window), (rows + 1, columns + 1))
    assert_equal(builder.plan(), builder.image(3), compiler, *SANITIZERS)


def test_average_pools_and_rescaling(plans, compiler):
    builder = plans.Builder(7, 9, 8)
    builder.average_pool((2, 3), (3, 2))
    builder.rescale()
    builder.rescale(residual=1)
    assert_equal(builder.plan(), with_extremes(builder.image(3)), compiler, *SANITIZERS)


def test_logits_are_rounded_down_below_zero(plans, compiler):
    builder = plans.Builder(3, 1, 1)
    builder.linear(4)
    offset = torch.tensor([-1, -3, -(2**33), 5])
    shift = torch.tensor([1, 1, 4, 1], dtype=torch.uint8)
    step = dataclasses.replace(
        builder.steps[0], multiplier=torch.zeros(4, dtype=torch.int32), offset=offset, shift=shift
    )
    plan = dataclasses.replace(builder.plan(), steps=(step,))
    outputs = compiler.outputs(plan, builder.image(1), *SANITIZERS)
    assert outputs.tolist() == [[-1, -2, -(2**29), 2]]


def test_powers_of_two_are_shifts(plans, compiler):
    """With ``--requant shift`` only first convolution and classifier multiply, addresses included."""
    builder = plans.residual_network(seed=5, terms=2)
    plan = power_of_two_plan(builder.plan())
    assert_equal(plan, with_extremes(builder.image(4)), compiler, *SANITIZERS)
    assert "static const int8_t net_multiplier_0[16]" in (compiler.folder / "net_weights.h").read_text()


def test_some_steps_shift_and_others_multiply(plans, compiler):
    builder = plans.residual_network(seed=6)
    plan = builder.plan()
    shifting = power_of_two_plan(plan)
    chosen = [pair[index % 2] for index, pair in enumerate(zip(plan.steps, shifting.steps, strict=True))]
    mixed = dataclasses.replace(plan, steps=tuple(chosen))
    assert_equal(mixed, with_extremes(builder.image(4)), compiler, *SANITIZERS)
    assert {"net_adder", "net_adder_by_shifts"} <= code_of(compiler, "net", "-fno-inline").keys()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="reads x86 assembly")
def test_shifting_networks_have_no_multiplication(plans, compiler):
    builder = plans.residual_network(seed=5, terms=2)
    for plan, name in ((builder.plan(), "fixed"), (power_of_two_plan(builder.plan()), "shift")):
        prefix = compiler.write(plan, name, builder.image(1))
        code = code_of(compiler, prefix, "-fno-inline")
        multiplying = {
            function.removeprefix(f"{prefix}_") for function, text in code.items() if re.search(r"\ti?mul", text)
        }
        assert multiplying == (
            {"convolution", "linear", "times"} if name == "fixed" else {"convolution_by_shifts", "linear"}
        )
        adder = f"{prefix}_adder" + ("" if name == "fixed" else "_by_shifts")
        terms = adder.replace("adder", "adder_terms")
        assert {adder, terms, f"{prefix}_slide", f"{prefix}_run"} <= code.keys()


def test_the_test_of_its_own(plans, compiler):
    builder = plans.residual_network()
    prefix = compiler.write(builder.plan(), "My net-20", builder.image(3))
    assert prefix == "my_net_20"
    test = compiler.folder / "my_net_20_test.c"
    compiler.compile(*WARNINGS, *SANITIZERS, "my_net_20.c", test.name, "-o", "good")
    good = subprocess.run([compiler.folder / "good"], capture_output=True, text=True, check=False)
    assert (good.returncode, good.stdout) == (0, "3 images, 0 outputs differ\n")

    before, after = test.read_text().split("expected[IMAGES]")
    test.write_text(before + "expected[IMAGES]" + re.sub(r"-?\d+,", "77,", after, count=1))
    compiler.compile(*WARNINGS, "my_net_20.c", test.name, "-o", "bad")
    bad = subprocess.run([compiler.folder / "bad"], capture_output=True, text=True, check=False)
    assert bad.returncode == 1
    assert re.match(r"image 0, output 0: -?\d+, expected 77\n3 images, 1 outputs differ\n", bad.stdout)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "aarch64"), reason="the compiler knows no such option")
def test_no_floating_point_and_no_library(plans, compiler):
    """Compiled for general registers alone, the object needs nothing from outside and shows one name."""
    builder = plans.residual_network()
    compiler.write(builder.plan(), "net", builder.image(1))
    compiler.compile(*WARNINGS, "-mgeneral-regs-only", "-ffreestanding", "-fno-stack-protector", "-c", "net.c")
    names = subprocess.run(["nm", "-g", "net.o"], cwd=compiler.folder, capture_output=True, text=True, check=True)
    assert [line.split()[-2:] for line in names.stdout.splitlines()] == [["T", "net_run"]]


def test_two_networks_in_one_program(plans, compiler):
    for name, seed in (("one", 1), ("two", 2)):
        builder = plans.residual_network(seed)
        compiler.write(builder.plan(), name, builder.image(1))
    call = "static uint8_t image[ONE_IMAGE_BYTES]; static int32_t out[ONE_OUTPUTS]; one_run(image, out);"
    main = f'#include "one.h"\n#include "two.h"\nint main(void) {{ {call} two_run(image, out); return 0; }}\n'
    (compiler.folder / "main.c").write_text(main)
    compiler.compile(*WARNINGS, "one.c", "two.c", "main.c")
    compiler.compile("-x", "c++", "-Wall", "-Werror", "-fsyntax-only", "one.h")


def test_header_states_memory_and_grid(plans):
    builder = plans.residual_network()
    plan = builder.plan()
    files = {name: "".join(pieces) for name, pieces in c_source(plan, "net", builder.image(1), PIXELS).items()}
    defined = dict(re.findall(r"#define NET_(\w+) (.+)", files["net.h"]))
    assert defined["IMAGE_SCALE"] == "0.125"
    assert defined["IMAGE_ZERO_POINT"] == f"{{{', '.join(str(int(byte)) for byte in plan.activations[0].zero_point)}}}"
    assert (defined["IMAGE_MEAN"], defined["IMAGE_STD"]) == ("{0.5, 0.25, 0.125}", "{1.5, 0.75, 1e-05}")
    assert [int(defined[f"IMAGE_{name}"]) for name in ("HEIGHT", "WIDTH", "CHANNELS", "BYTES")] == [23, 19, 3, 1311]
    assert (defined["OUTPUTS"], defined["OUTPUT_SCALE"]) == ("10", "0.5")
    sizes = {"uint8_t": 1, "int8_t": 1, "int32_t": 4, "int64_t": 8}
    tables = re.findall(r"static const (\w+) \w+\[(\d+)\]", files["net_weights.h"])
    assert int(defined["ROM_BYTES"]) == sum(sizes[kind] * int(count) for kind, count in tables)
    assert "static uint8_t net_arena[NET_RAM_BYTES]" in files["net.c"]


def test_texts_of_others_stay_in_their_comment(plans):
    builder = plans.Builder(3, 4, 4)
    builder.rescale()
    plan = IntegerPlan(tuple(builder.activations), tuple(builder.steps), ("a*/ int evil; /* \\\n??/ b\u202e",))
    body = "".join(c_source(plan, "x*/y", builder.image(1), PIXELS)["x_y.c"])
    assert "/* 0 a__ int evil_ __ _____ b_: rescale, 4x4x3 to 4x4x3 */" in body


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet20-int8", "resnet20_int8"),
        ("Ärger über.alles", "rger_ber_alles"),
        ("20-net", "net_20_net"),
        ("../../etc/passwd", "etc_passwd"),
        ("__init__", "init"),
        ("日本", "net"),
        ("", "net"),
        ("a" * 100, "a" * 40),
    ],
)
def test_identifiers(name, expected):
    assert c_identifier(name) == expected


def test_plan_that_could_overflow_is_refused(plans):
    builder = plans.single(Adder, plans.LAYERS["3x3"])
    step = builder.steps[0]
    factors = dataclasses.replace(step.requantization, offset=step.requantization.offset + 2**62)
    plan = dataclasses.replace(builder.plan(), steps=(dataclasses.replace(step, requantization=factors),))
    with pytest.raises(ExportError, match=r"step 0 \(adder adder0\) could overflow"):
        c_source(plan, "net", builder.image(1), PIXELS)


def test_images_of_another_size_are_refused(plans):
    builder = plans.residual_network()
    with pytest.raises(ExportError, match=r"images are \[2, 23, 18, 3\] torch.uint8, expected \[N, 23, 19, 3\] uint8"):
        c_source(builder.plan(), "net", builder.image()[:, :, 1:], PIXELS)


def test_weights_come_in_small_pieces(plans):
    """Millions of weights are never one text."""
    builder = plans.single(Adder, plans.Layer(256, 512, plans.square(3, padding=1), size=(3, 3)))
    pieces = c_source(builder.plan(), "net", builder.image(1), PIXELS)["net_weights.h"]
    lengths = [len(piece) for piece in pieces]
    assert sum(lengths) > 3 * 256 * 512 * 9
    assert max(lengths) < 500
