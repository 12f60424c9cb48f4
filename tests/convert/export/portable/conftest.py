"""Random plans, and the system's C compiler."""

import importlib.util
import shutil
import subprocess
from pathlib import Path

import numpy
import pytest
import torch

from adderkit.adder_layers.integer.plan import Linear
from adderkit.convert.export.portable.c_source import c_identifier, c_source
from adderkit.convert.export.portable.inputs import Normalization

PIXELS = Normalization((0.5, 0.25, 0.125), (1.5, 0.75, 1e-5))
WARNINGS = [
    *("-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror", "-Wconversion", "-Wshadow"),
    *("-Wstrict-prototypes", "-Wmissing-prototypes"),
]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]

_path = Path(__file__).parents[3] / "adder_layers" / "integer" / "random_plans.py"
_spec = importlib.util.spec_from_file_location("random_plans", _path)
random_plans = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(random_plans)

# Images from stdin, outputs to stdout.
_DRIVER = """
#include <stdio.h>
#include "net.h"
int main(void)
{
    static uint8_t image[NET_IMAGE_BYTES];
    static TYPE output[NET_OUTPUTS];
    while (fread(image, 1, sizeof image, stdin) == sizeof image) {
        net_run(image, output);
        fwrite(output, 1, sizeof output, stdout);
    }
    return 0;
}
"""


@pytest.fixture(scope="session")
def plans():
    """The module ``random_plans``."""
    return random_plans


class Compiler:
    """Writes networks in C into a folder and compiles them."""

    def __init__(self, folder):
        self.folder = folder

    def write(self, plan, name, images):
        """The files of ``c_source``; returns their beginning."""
        prefix = c_identifier(name)
        for file, pieces in c_source(plan, name, images, PIXELS).items():
            (self.folder / file).write_text("".join(pieces))
        return prefix

    def compile(self, *arguments):
        """Run the compiler; its messages fail the test."""
        done = subprocess.run(
            ["cc", *map(str, arguments)], cwd=self.folder, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def outputs(self, plan, images, *options):
        """What the compiled network makes of images ``[N, H, W, C]``, in the form of ``reference.run``."""
        self.write(plan, "net", images[:1])
        (self.folder / "driver.c").write_text(_DRIVER.replace("TYPE", "int32_t" if plan.ends_in_logits else "uint8_t"))
        self.compile(*WARNINGS, *options, "net.c", "driver.c", "-o", "driver")
        done = subprocess.run(
            [self.folder / "driver"], input=images.contiguous().numpy().tobytes(), capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr.decode()
        last = plan.steps[-1]
        if isinstance(last, Linear):
            return torch.from_numpy(numpy.frombuffer(done.stdout, "int32").copy()).reshape(len(images), -1)
        target = plan.activations[last.output]
        shape = (len(images), target.height, target.width, target.channels)
        return torch.from_numpy(numpy.frombuffer(done.stdout, "uint8").copy()).reshape(shape)


@pytest.fixture
def compiler(tmp_path):
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler named cc")
    return Compiler(tmp_path)
