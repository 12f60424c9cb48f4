"""An interrupted calibration resumes from its state file, with the same result."""

from dataclasses import replace

import pytest
import torch

from adderkit.convert.calibration.calibrate import calibrate_
from adderkit.convert.calibration.config import CalibrationConfig

FAST = CalibrationConfig(steps=20, samples=512, matching_steps=0)


class CutError(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize("layer", ["depthwise", "pointwise", "all layers"])
def test_goes_on_where_it_was_cut_off_to_the_same_bits(pair, teacher, data, tmp_path, layer):
    settings = replace(FAST, matching_steps=3)
    teacher, whole = pair(teacher)
    expected = calibrate_(whole, teacher, data, settings)

    def cut(what, done, total):
        if what == layer:
            raise CutError

    state = tmp_path / "state"
    _, student = pair(teacher)
    with pytest.raises(CutError):
        calibrate_(student, teacher, data, settings, state=state, progress=cut)
    assert state.is_file()
    _, student = pair(teacher)
    calls = []
    actual = calibrate_(student, teacher, data, settings, state=state, progress=lambda *call: calls.append(call[0]))
    assert actual == expected
    assert all(
        torch.equal(a, b) for a, b in zip(student.state_dict().values(), whole.state_dict().values(), strict=True)
    )
    assert "grouped" not in calls
    assert not state.exists()


@pytest.mark.parametrize("change", ["seed", "images", "teacher", "student", "damage"])
def test_state_of_something_else_is_not_taken(pair, teacher, data, tmp_path, change, caplog):
    state = tmp_path / "state"
    teacher, student = pair(teacher)

    def cut(what, done, total):
        if what == "pointwise":
            raise CutError

    with pytest.raises(CutError):
        calibrate_(student, teacher, data, FAST, state=state, progress=cut)
    if change == "damage":
        state.write_bytes(state.read_bytes()[:100])
    if change == "teacher":
        teacher.stem.weight.data.mul_(1.5)
    if change == "images":
        data = data.flip(0)
    _, fresh = pair(teacher)
    if change == "student":
        fresh.grouped.weight.data.mul_(1.5)
    calls = []
    settings = replace(FAST, seed=1 if change == "seed" else 0)
    calibrate_(fresh, teacher, data, settings, state=state, progress=lambda *call: calls.append(call[0]))
    assert "grouped" in calls
    assert ("damaged" in caplog.text) == (change == "damage")
