"""``adderkit demo``: the whole workflow."""

import pytest

import adderkit


@pytest.mark.slow
def test_demo(json_of, tmp_path):
    rows = json_of("demo", "-o", "demo")["rows"]
    teacher, converted, tuned, reloaded = (row["top1"] for row in rows)
    assert teacher > 90
    assert tuned > max(converted - 5, 80)
    assert reloaded == tuned
    assert adderkit.load(tmp_path / "demo" / "final").num_classes == 10
