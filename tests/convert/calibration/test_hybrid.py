"""Hybrids: which layers go back, that they equal the teacher's, and that the statistics after them are right."""

import copy
from types import SimpleNamespace

import pytest
import torch
from timm.layers import StdConv2d
from torch import nn

import adderkit
from adderkit import AdderConfig
from adderkit.adder_layers.modules import adder_layers
from adderkit.convert.calibration.batchnorm_shift import measure_shifts
from adderkit.convert.calibration.config import CalibrationConfig, HybridPolicy, TermPolicy
from adderkit.convert.calibration.hybrid import best_terms, keep_convolutions_, kept_plan, layers_to_keep
from adderkit.convert.conversion.plan import plan
from adderkit.convert.conversion.rewrite import convert_
from adderkit.convert.errors import AdderkitError
from adderkit.convert.record import transforms_of

IMAGE = torch.zeros(1, 3, 8, 8)
FIDELITY = {"grouped": 0.9, "depthwise": 0.5, "pointwise": 0.8}
# Terms of TinyNet: stem 13824, grouped 4608, depthwise 1152, pointwise 768; head 30: 20382 multiplications.
TOTAL = 20382
STAYS = 13854
NO_JOINT_FIT = CalibrationConfig(matching_steps=0)


def report():
    """As much of a calibration report as the choice needs."""
    return SimpleNamespace(layers=[SimpleNamespace(path=path, correlation=value) for path, value in FIDELITY.items()])


@pytest.fixture
def made(tiny):
    return plan(tiny(), example_input=IMAGE)


@pytest.mark.parametrize(
    ("limit", "kept"), [(0.4, []), (0.5, []), (0.6, ["depthwise"]), (0.85, ["depthwise", "pointwise"])]
)
def test_min_fidelity(made, limit, kept):
    found = layers_to_keep(made, report(), TOTAL, STAYS, HybridPolicy(min_fidelity=limit))
    assert sorted(found) == kept
    assert all(f"is below {limit:g}" in reason for reason in found.values())


@pytest.mark.parametrize(
    ("share", "kept"),
    [
        (0.68, []),  # 13854 stay anyway: 67.97 %
        (0.73, ["pointwise"]),  # depthwise hurts most for each multiplication, but makes 73.6 %
        (0.74, ["depthwise"]),
        (0.92, ["depthwise", "pointwise"]),
    ],
)
def test_budget(made, share, kept):
    assert sorted(layers_to_keep(made, report(), TOTAL, STAYS, HybridPolicy(budget=share))) == kept


def test_budget_counts_what_fidelity_kept(made):
    found = layers_to_keep(made, report(), TOTAL, STAYS, HybridPolicy(min_fidelity=0.6, budget=0.78))
    assert sorted(found) == ["depthwise", "pointwise"]
    assert "below" in found["depthwise"]
    assert "within" in found["pointwise"]


def test_budget_below_what_stays_anyway(made):
    with pytest.raises(AdderkitError, match=r"budget is 50\.0%.*68\.0% remain"):
        layers_to_keep(made, report(), TOTAL, STAYS, HybridPolicy(budget=0.5))


def test_nothing_left(made):
    with pytest.raises(AdderkitError, match=r"every calibrated layer.*best fidelity is 0\.900"):
        layers_to_keep(made, report(), TOTAL, STAYS, HybridPolicy(min_fidelity=0.95))


def test_layers_that_go_back_are_the_teacher_s(tiny):
    teacher = tiny()
    student, images = copy.deepcopy(teacher), torch.randn(32, 3, 8, 8)
    convert_(student, example_input=IMAGE)
    adderkit.calibrate_(student, teacher, images, CalibrationConfig(steps=2, samples=256))
    keep_convolutions_(student, teacher, ["grouped", "pointwise"], images, NO_JOINT_FIT)
    assert list(adder_layers(student)) == ["depthwise"]
    assert transforms_of(student)[0]["modules"] == ["depthwise"]
    for path in ("grouped", "pointwise"):
        layer, original = student.get_submodule(path), teacher.get_submodule(path)
        assert type(layer) is type(original)
        assert all(
            torch.equal(first, second) for first, second in zip(layer.parameters(), original.parameters(), strict=True)
        )
        assert not any(first is second for first, second in zip(layer.parameters(), original.parameters(), strict=True))
    # Statistics that stand to the convolution's outputs on the images as the teacher's stand to its own.
    shift = measure_shifts(teacher, [images])["norm1"]
    y = student.grouped(student.norm0(student.stem(images)).relu())
    deviation = (student.norm1.running_var + student.norm1.eps).sqrt()
    offset = (y.mean((0, 2, 3)) - student.norm1.running_mean) / deviation
    torch.testing.assert_close(offset, shift.offset, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(y.std((0, 2, 3)) / deviation, shift.ratio, rtol=1e-2, atol=1e-3)


def test_the_joint_fit_of_a_hybrid_keeps_the_teachers_domain(tiny):
    torch.manual_seed(0)
    teacher = tiny()
    images = 3 * torch.rand(32, 3, 8, 8) + 2  # unlike what the teacher's statistics are of
    students = []
    for steps in (0, 4):
        student = copy.deepcopy(teacher)
        convert_(student, example_input=IMAGE)
        adderkit.calibrate_(student, teacher, images, CalibrationConfig(steps=2, samples=256, matching_steps=0))
        keep_convolutions_(student, teacher, ["grouped"], images, CalibrationConfig(matching_steps=steps))
        students.append(student)
        shift = measure_shifts(teacher, [images])["norm1"]
        y = student.grouped(student.norm0(student.stem(images)).relu())
        deviation = (student.norm1.running_var + student.norm1.eps).sqrt()
        offset = (y.mean((0, 2, 3)) - student.norm1.running_mean) / deviation
        assert shift.offset.abs().max() > 1
        torch.testing.assert_close(offset, shift.offset, rtol=1e-3, atol=1e-3)
        assert torch.equal(student.grouped.weight, teacher.grouped.weight)
    assert not torch.equal(students[0].depthwise.weight, students[1].depthwise.weight)


def test_baked_and_normalized_layers_go_back_to_what_they_were():
    teacher = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), StdConv2d(4, 4, 3, bias=True), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU()
    ).append(nn.Flatten()).append(nn.Linear(4 * 8 * 8, 2)).eval()  # fmt: skip
    student, images = copy.deepcopy(teacher).train(), torch.randn(32, 3, 10, 10)
    calls = []
    student[2].register_forward_hook(lambda *_: calls.append(1))
    convert_(student, example_input=images[:1])
    keep_convolutions_(student, teacher, ["2"], images, NO_JOINT_FIT)
    assert type(student[2]) is StdConv2d
    assert student[2].training
    assert calls
    assert [transform["modules"] for transform in transforms_of(student)] == [["4"]]
    x = torch.randn(2, 4, 8, 8)
    assert torch.equal(student[2](x), teacher[2](x))


def test_only_adder_layers_go_back(tiny):
    student = tiny()
    with pytest.raises(AdderkitError, match="'stem' is not an adder layer"):
        keep_convolutions_(student, tiny(), ["stem"], torch.randn(4, 3, 8, 8))


def test_plan_says_what_went_back(made):
    changed = kept_plan(made, {"depthwise": "because"})
    assert changed.paths("convert") == ["grouped", "pointwise"]
    assert next(row.reason for row in changed.rows if row.path == "depthwise") == "because"


PRICES = {"wide": 100, "narrow": 10, "spiky": 10}
BY_TERMS = {"wide": [0.8, 0.92, 0.95], "narrow": [0.9, 0.92, 0.93], "spiky": [0.7, 0.6, 0.9]}


@pytest.mark.parametrize(
    ("policy", "terms"),
    [
        ({"additions": 1.0}, (1, 1, 1)),
        ({"additions": 1.019}, (1, 2, 1)),  # spiky gains only with two more terms, which do not fit
        ({"additions": 1.02}, (1, 1, 3)),  # and then most for each addition
        ({"additions": 1.03}, (1, 2, 3)),
        ({"additions": 1.129}, (1, 3, 3)),  # wide would come before, but does not fit
        ({"additions": 1.139}, (2, 2, 3)),
        ({"additions": 1.14}, (2, 3, 3)),
        ({"additions": 9.0}, (3, 3, 3)),
        ({"fidelity": 0.79}, (1, 1, 1)),
        ({"fidelity": 0.86}, (1, 1, 3)),
        ({"fidelity": 0.87}, (1, 2, 3)),
        ({"fidelity": 0.9}, (2, 2, 3)),
        ({"fidelity": 0.87, "additions": 1.02}, (1, 1, 3)),
    ],
)
def test_terms_go_where_they_gain_most_for_each_addition(policy, terms):
    assert tuple(best_terms(PRICES, BY_TERMS, 1000, TermPolicy(**policy)).values()) == terms


def test_an_aim_out_of_reach_is_logged(caplog):
    assert set(best_terms(PRICES, BY_TERMS, 1000, TermPolicy(fidelity=0.99)).values()) == {3}
    assert "terms reach a mean fidelity of 0.927, short of 0.990" in caplog.text


def test_price_of_a_term_is_what_cost_counts(tiny):
    def additions(terms):
        model = tiny()
        convert_(model, AdderConfig(terms=terms), example_input=IMAGE)
        return adderkit.cost(model, IMAGE).additions

    prices = {
        row.path: row.additions_per_term for row in plan(tiny(), example_input=IMAGE).rows if row.decision == "convert"
    }
    for path, price in prices.items():
        assert additions({path: 3}) - additions({path: 2}) == additions({path: 2}) - additions(1) == price
