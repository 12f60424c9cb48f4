"""Weights beyond the range of their inputs, and calibration in little memory."""

from dataclasses import replace

import pytest

from adderkit.convert.calibration import layerwise as layer_fit
from adderkit.convert.calibration.calibrate import calibrate_
from adderkit.convert.calibration.config import CalibrationConfig
from adderkit.convert.calibration.reconstruction import reconstruct

FAST = CalibrationConfig(steps=20, samples=512, matching_steps=0)


@pytest.fixture
def fitted_windows(monkeypatch):
    """The windows that each layer was fitted to."""
    seen = []
    monkeypatch.setattr(
        layer_fit, "reconstruct", lambda windows, *rest: seen.append(windows) or reconstruct(windows, *rest)
    )
    return seen


def test_share_of_weights_beyond_the_range_of_their_channel(pair, teacher, data, fitted_windows):
    teacher, student = pair(teacher)
    report = calibrate_(student, teacher, data, replace(FAST, matching_steps=5))
    held_out = 1 / 8
    for layer, windows in zip(report.layers[:1], fitted_windows, strict=False):
        by_channel = windows.unflatten(2, (-1, 9))  # [G, S, C, taps]
        weight = student.get_submodule(layer.path).weight.detach().reshape(2, 4, 4, 9)  # [G, O, C, taps]
        low, high = by_channel.amin((1, 3))[:, None, :, None], by_channel.amax((1, 3))[:, None, :, None]
        share = ((weight <= low) | (weight >= high)).float().mean().item()
        assert 0 < share < 1
        assert layer.beyond_range == pytest.approx(share, abs=held_out)  # which widens the ranges a little


def test_little_memory_means_fewer_samples(pair, teacher, data, fitted_windows):
    teacher, student = pair(teacher)
    memory = 64 * 36 * 8 * 4 * 4  # room for two windows of each image in the widest layer, held four times in fp32
    report = calibrate_(
        student, teacher, data, CalibrationConfig(steps=5, samples=1 << 20, matching_steps=0, memory=memory)
    )
    assert report.samples == 2 * 64
    assert fitted_windows[0].shape == (2, 2 * 56, 36)
    assert max(windows.numel() for windows in fitted_windows) * 4 * 4 <= memory


def test_little_memory_means_more_passes_of_the_teacher(pair, teacher, data, monkeypatch):
    passes = []
    real = layer_fit.layer_outputs
    monkeypatch.setattr(layer_fit, "stepped_graph", lambda *_: None)
    monkeypatch.setattr(
        layer_fit, "layer_outputs", lambda *arguments: passes.append(list(arguments[1])) or real(*arguments)
    )
    teacher, student = pair(teacher)
    calibrate_(
        student,
        teacher,
        data,
        CalibrationConfig(steps=5, samples=64, matching_steps=0, memory=2 * (64 * 8 * 4 + 64 * 8 * 4)),
    )
    assert passes == [["grouped", "depthwise"], ["pointwise"]]
