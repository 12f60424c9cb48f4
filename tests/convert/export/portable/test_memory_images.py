"""Memory images: read back as ``$readmemh`` reads, manifest and files suffice to compute what was recorded."""

import dataclasses
import itertools
import json

import numpy
import pytest
import torch

from adderkit.adder_layers.integer import reference
from adderkit.adder_layers.integer.plan import Adder
from adderkit.convert.errors import ExportError
from adderkit.convert.export.portable.memory_images import hex_lines, memory_images

from .conftest import PIXELS, random_plans


def words(text, bits, signed):
    """What ``$readmemh`` puts into a memory, as numbers."""
    found = [int(word, 16) for word in text.split()]
    assert all(len(word) == bits // 4 for word in text.split())
    return [word - (1 << bits) if signed and word >> (bits - 1) else word for word in found]


class TestBench:
    """Computes a network from manifest and files alone, by the manifest's formulas, one number at a time."""

    __test__ = False

    def __init__(self, manifest, files):
        self.manifest = json.loads(json.dumps(manifest))
        self.files = {name: "".join(pieces) for name, pieces in files.items()}

    def array(self, entry):
        numbers = words(self.files[entry["file"]], entry["bits"], entry["signed"])
        return numpy.array(numbers, dtype=object).reshape(entry["shape"])

    def byte(self, step, arrays, channel, total, residual):
        total = total * arrays["multiplier"][channel] + arrays["offset"][channel]
        if step["residual"] is not None:
            total += residual * arrays["residual_multiplier"][channel]
        return min(max(total, 0) >> arrays["shift"][channel], step["quant_max"]) << arrays["scale_exponent"][channel]

    def taps(self, step, source, y, x):
        """Input pixels under a window, ``None`` where it is padded."""
        for i, j in itertools.product(range(step["kernel"][0]), range(step["kernel"][1])):
            row = y * step["stride"][0] + i * step["dilation"][0] - step["padding"][0]
            column = x * step["stride"][1] + j * step["dilation"][1] - step["padding"][1]
            inside = 0 <= row < len(source) and 0 <= column < len(source[0])
            yield (i, j), source[row, column] if inside else None

    def value(self, step, arrays, source, zero_point, place, residual):
        """One byte of the output."""
        y, x, c = place
        kind = step["kind"]
        if kind == "rescale":
            return self.byte(step, arrays, c, source[y, x, c], residual)
        pixels = list(self.taps(step, source, y, x))
        if kind == "max_pool":
            return max(pixel[c] for _, pixel in pixels if pixel is not None)
        if kind == "average_pool":
            return self.byte(step, arrays, c, sum(pixel[c] for _, pixel in pixels), residual)
        weight, adds = arrays["weight"], kind == "adder"
        terms = step.get("terms", 1)
        weight = weight if terms > 1 else weight[:, None]
        width = weight.shape[4]
        first = c // (len(weight) // step["groups"]) * width
        total = 0
        for (i, j), pixel in pixels:
            seen = (zero_point if pixel is None else pixel)[first : first + width]
            for term in range(terms):
                values = weight[c, term, i, j]
                total += (abs(seen - values) if adds else seen * values).sum() << terms - 1 - term
        return self.byte(step, arrays, c, total, residual)

    def check(self, step):
        """Compare what a step computes with what was recorded."""
        activations = self.manifest["activations"]
        source, zero_point = (self.array(activations[step["input"]][name]) for name in ("bytes", "zero_point"))
        arrays = {name: self.array(entry) for name, entry in step["arrays"].items()}
        if step["kind"] == "linear":
            sums = (arrays["weight"] * source.flatten()).sum(1)
            logits = (sums * arrays["multiplier"] + arrays["offset"]) >> arrays["shift"]
            assert (logits == self.array(self.manifest["logits"])).all()
            return
        recorded = self.array(activations[step["output"]]["bytes"])
        residual = step.get("residual")
        added = None if residual is None else self.array(activations[residual]["bytes"])
        for place in numpy.ndindex(recorded.shape):
            other = 0 if added is None else added[place]
            assert self.value(step, arrays, source, zero_point, place, other) == recorded[place], (step, place)


@pytest.mark.parametrize(
    "builder",
    [
        random_plans.residual_network(2, (11, 9)),
        random_plans.residual_network(3, (9, 8), terms=2),
        random_plans.plain_network(),
    ],
)
def test_manifest_and_files_suffice(builder):
    plan, image = builder.plan(), builder.image(1)
    bench = TestBench(*memory_images(plan, image[0], PIXELS))
    for step in bench.manifest["steps"]:
        bench.check(step)
    assert (bench.array(bench.manifest["activations"][0]["bytes"]) == image[0].numpy()).all()
    assert bench.array(bench.manifest["logits"]).tolist() == reference.run(plan, image)[0].tolist()
    assert bench.manifest["normalization"] == {"mean": [0.5, 0.25, 0.125], "std": [1.5, 0.75, 1e-5]}
    assert [step["path"] for step in bench.manifest["steps"]] == list(plan.paths)


@pytest.mark.parametrize(
    "name", ["groups-of-three", "depthwise-stride2", "5x3-asymmetric", "residual-six-bits", "three-terms-depthwise"]
)
def test_single_layers(name):
    builder = random_plans.single(Adder, random_plans.LAYERS[name])
    bench = TestBench(*memory_images(builder.plan(), builder.image(1)[0], PIXELS))
    for step in bench.manifest["steps"]:
        bench.check(step)
    assert "logits" not in bench.manifest


def test_every_file_is_named_once_and_only_plain_names():
    builder = random_plans.residual_network(2, (11, 9))
    plan = dataclasses.replace(builder.plan(), paths=tuple("../../evil" for _ in builder.steps))
    manifest, files = memory_images(plan, builder.image(1)[0], PIXELS)
    named = [part.split('"')[1] for part in json.dumps(manifest).split('"file": ')[1:]]
    assert sorted(named) == sorted(files)
    assert len(named) == len(set(named))
    assert all(name.replace("_", "").removesuffix(".hex").isalnum() for name in files)


@pytest.mark.parametrize(
    ("dtype", "numbers", "expected"),
    [
        (torch.uint8, [0, 9, 255], "00\n09\nff\n"),
        (torch.int8, [-128, -1, 127], "80\nff\n7f\n"),
        (torch.int32, [-2, 2**31 - 1], "fffffffe\n7fffffff\n"),
        (torch.int64, [-(2**40), 255], "ffffff0000000000\n00000000000000ff\n"),
    ],
)
def test_words(dtype, numbers, expected):
    assert "".join(hex_lines(torch.tensor(numbers, dtype=dtype))) == expected


def test_long_arrays_come_in_pieces():
    values = torch.arange(10_000).to(torch.uint8).reshape(100, 100)
    pieces = list(hex_lines(values))
    assert words("".join(pieces), 8, False) == values.flatten().tolist()
    assert max(map(len, pieces)) < 20_000


def test_image_of_another_size_is_refused():
    builder = random_plans.plain_network()
    with pytest.raises(ExportError, match=r"image is \[9, 10, 3\] torch.uint8, expected \[10, 9, 3\] uint8"):
        memory_images(builder.plan(), builder.image(1)[0].transpose(0, 1), PIXELS)


def test_plan_that_does_not_fit_is_refused():
    builder = random_plans.plain_network()
    plan = dataclasses.replace(builder.plan(), steps=tuple(builder.steps[1:]), paths=("a", "b", "c"))
    with pytest.raises(ExportError, match=r"cannot be exported: step 0 .* reads activation 1"):
        memory_images(plan, builder.image(1)[0], PIXELS)
