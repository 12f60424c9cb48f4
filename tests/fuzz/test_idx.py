"""IDX files as somebody else may have written them."""

import gzip
from os import environ

from hypothesis import given, settings
from hypothesis import strategies as st

from adderkit.recipes.data.small import SMALL_DATASETS

fuzz = settings.get_profile(environ.get("ADDERKIT_FUZZ", "quick"))

SIZES = st.integers(0, 4) | st.sampled_from([255, 65536, 2**31, 2**32 - 1])
IMAGES, LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"


def idx(rank, sizes, content):
    return bytes((0, 0, 8, rank)) + b"".join(size.to_bytes(4, "big") for size in sizes) + content


@fuzz
@given(
    sizes=st.tuples(SIZES, SIZES, SIZES),
    count=SIZES,
    pixels=st.binary(max_size=64),
    labels=st.binary(max_size=4),
    exact=st.booleans(),
)
def test_any_sizes(sizes, count, pixels, labels, exact, place, survives):
    total = sizes[0] * sizes[1] * sizes[2]
    if exact and max(total, sizes[0]) < 1000:
        pixels, labels, count = bytes(total), bytes(sizes[0]), sizes[0]
    (place / IMAGES).write_bytes(idx(3, sizes, pixels))
    (place / LABELS).write_bytes(idx(1, (count,), labels))
    found = survives(lambda: SMALL_DATASETS["fashion-mnist"].open(str(place), "test"))
    fits = len(pixels) == total and len(labels) == count == sizes[0] and max(labels, default=0) < 10
    assert (found is not None) == (fits and sizes[1] * sizes[2] < 2**63)  # beyond that numpy has no array
    assert found is None or found.images.shape == sizes


@fuzz
@given(data=st.data())
def test_damaged_packed_file(data, damaged, place, survives):
    (place / IMAGES).unlink(missing_ok=True)
    (place / f"{IMAGES}.gz").write_bytes(data.draw(damaged(gzip.compress(idx(3, (2, 3, 3), bytes(18)), mtime=0))))
    (place / LABELS).write_bytes(idx(1, (2,), bytes(2)))
    survives(lambda: SMALL_DATASETS["fashion-mnist"].open(str(place), "test"))
    (place / f"{IMAGES}.gz").unlink()
