"""Options and configurations agree: each default stands in one place."""

import pytest

from adderkit import AdderConfig, CalibrationConfig, PruneConfig, QuantizeConfig
from adderkit.convert.calibration.config import HybridPolicy, TermPolicy
from adderkit.convert.errors import AdderkitError
from adderkit.convert.model_source import ModelSource
from adderkit.recipes.configs.recipe import Recipe
from adderkit.recipes.data.unlabeled import UnlabeledImages
from adderkit.recipes.verbs import convert, evaluate, finetune, prune, quantize


@pytest.fixture
def asked_of(adder_kit, monkeypatch):
    """Run a verb up to its work; the arguments that the work would get."""

    def run(module, work, *words):
        seen = []

        def noted(*arguments, **_):
            seen.append(arguments)
            raise AdderkitError("noted")

        monkeypatch.setattr(module, work, noted)
        status, _, err = adder_kit(*words)
        assert (status, err) == (1, "error: noted\n")
        return seen[0]

    return run


DIGITS = ("--dataset", "digits")


def test_convert(asked_of):
    (job,) = asked_of(convert, "run_conversion", "convert", "--model", "resnet18", *DIGITS)
    assert job == convert.ConversionJob(ModelSource("resnet18"), images=UnlabeledImages("digits"))
    assert (job.config, job.calibration, job.hybrid) == (AdderConfig(), CalibrationConfig(), HybridPolicy())


def test_convert_without_images(asked_of):
    (job,) = asked_of(convert, "run_conversion", "convert", "--model", "resnet18")
    assert job == convert.ConversionJob(ModelSource("resnet18"))


def test_prune(asked_of):
    (job,) = asked_of(prune, "run_pruning", "prune", "resnet18", "--ratio", "0.3", *DIGITS)
    assert job == prune.PruningJob(ModelSource("resnet18"), PruneConfig(ratio=0.3), images=UnlabeledImages("digits"))


def test_quantize(asked_of):
    (job,) = asked_of(quantize, "run_quantization", "quantize", "resnet18", *DIGITS)
    assert job == quantize.QuantizationJob(ModelSource("resnet18"), QuantizeConfig(), images=UnlabeledImages("digits"))


def test_evaluate(asked_of):
    asked = asked_of(evaluate, "evaluate_model", "evaluate", "resnet18", *DIGITS)
    assert asked[1:] == ("digits", None, Recipe.val_split, Recipe.batch_size, Recipe.workers)


def test_finetune_leaves_the_recipe_as_it_is(asked_of):
    _, settings, _ = asked_of(finetune, "_start", "finetune", "resnet18", "--recipe", "cnn", *DIGITS)
    from adderkit.recipes.configs.files import load_recipe

    assert settings == load_recipe("cnn").changed({"dataset": "digits"})


@pytest.mark.parametrize(
    ("words", "changed"),
    [
        (("--bits", "4", "--requant", "shift"), QuantizeConfig(bits=4, requant="shift")),
        (("--first-last", "fp32"), QuantizeConfig(first_last="fp32")),
    ],
)
def test_options_of_quantize(asked_of, words, changed):
    (job,) = asked_of(quantize, "run_quantization", "quantize", "resnet18", *words, *DIGITS)
    assert job.config == changed


def test_seed_of_quantize(asked_of):
    (job,) = asked_of(quantize, "run_quantization", "quantize", "resnet18", "--seed", 5, *DIGITS)
    assert job.images == UnlabeledImages("digits", seed=5)


def test_options_of_convert(asked_of):
    words = ("--exclude", "a.*", "--no-skip-first", "--norm", "skip", "--budget", "mults=30%", "--min-fidelity", "0.5")
    calibration = ("--calibration-steps", 3, "--matching-steps", 4, "--calibration-memory", 0.5, "--seed", 5)
    images = ("--dataset", "digits", "--data-dir", "there", "--calibration-images", 16)
    (job,) = asked_of(convert, "run_conversion", "convert", "--model", "x", *words, *calibration, *images)
    assert job.config == AdderConfig(exclude=("a.*",), skip_first=False, norm="skip")
    assert job.calibration == CalibrationConfig(steps=3, matching_steps=4, memory=1 << 29, seed=5)
    assert job.hybrid == HybridPolicy(0.5, 0.3)
    assert job.images == UnlabeledImages("digits", "there", 16, 5)


@pytest.mark.parametrize(
    ("words", "terms", "policy"),
    [
        (("--terms", "2"), 2, None),
        (("--terms", "a.*=3", "--terms", "2"), {"a.*": 3, "*": 2}, None),
        (("--terms", "auto", "--fidelity", "0.98"), 1, TermPolicy(0.98)),
        (("--terms", "auto", "--budget", "adds=125%"), 1, TermPolicy(None, 1.25)),
    ],
)
def test_terms_of_convert(asked_of, words, terms, policy):
    (job,) = asked_of(convert, "run_conversion", "convert", "x", *words, *DIGITS)
    assert (job.config, job.terms, job.hybrid) == (AdderConfig(terms=terms), policy, HybridPolicy())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--terms", "auto"), "give an aim"),
        (("--fidelity", "0.9"), "give --terms auto as well"),
        (("--terms", "2", "--budget", "adds=125%"), "give --terms auto as well"),
    ],
)
def test_terms_without_an_aim_or_an_aim_without_terms(misused, words, message):
    assert message in misused("convert", "x", *words)


def test_options_of_prune(asked_of):
    words = ("--target", "adds=50%", "--importance", "random", "--global", "--round-to", 4, "--iterative", 2)
    (job,) = asked_of(prune, "run_pruning", "prune", "x", *words, "--ignore", "a.*", "--seed", 3, *DIGITS)
    config = PruneConfig(None, "adds=50%", "random", True, 4, 2, ("a.*",), 3)
    assert job == prune.PruningJob(ModelSource("x"), config, images=UnlabeledImages("digits", seed=3))
