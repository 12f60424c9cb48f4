"""``adderkit evaluate``: metrics as JSON and as a table, and wrong input in one line."""

import pytest


def test_json(json_of, adder_folder):
    value = json_of("evaluate", adder_folder, "--dataset", "digits", "-j", "0")
    assert value["model"] == str(adder_folder)
    assert (value["dataset"], value["split"], value["images"]) == ("digits", "validation", 360)
    assert 0 <= value["top1"] <= value["top5"] <= 100


def test_table(adder_kit, cnn_folder):
    status, out, _ = adder_kit("evaluate", cnn_folder, "--dataset", "digits", "--split", "train", "-j", "0")
    assert status == 0
    assert "1437" in out
    assert "top-1 %" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name one with --dataset"),
        (["--dataset", "digits", "--split", "testing"], "split is 'testing'"),
        (["--dataset", "folder"], "needs --data-dir"),
        (["--dataset", "folder", "--data-dir", "nowhere"], "--data-dir nowhere does not exist"),
    ],
    ids=["no-data", "split", "no-folder", "missing-folder"],
)
def test_fails(fails, cnn_folder, words, message):
    assert message in fails("evaluate", cnn_folder, *words)


def test_no_model(misused):
    assert "Missing argument" in misused("evaluate")
