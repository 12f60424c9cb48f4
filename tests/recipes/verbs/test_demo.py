"""``adderkit demo``: the whole workflow."""

import pytest

import adderkit
from adderkit.recipes.verbs import demo


@pytest.mark.slow
def test_demo(json_of, tmp_path):
    rows = json_of("demo", "-o", "demo")["rows"]
    teacher, converted, tuned, reloaded = (row["top1"] for row in rows)
    assert teacher > 90
    assert tuned > max(converted - 5, 80)
    assert reloaded == tuned
    assert adderkit.load(tmp_path / "demo" / "final").num_classes == 10


def test_folder_of_the_results(fails, adder_kit, tmp_path, monkeypatch):
    """An earlier demo is replaced only on request, anything else never; a demo that was killed can be repeated."""

    def work(folder, announce):
        (folder / "teacher").mkdir()
        (folder / "teacher" / "args.yaml").touch()
        if killed:
            raise KeyboardInterrupt
        return []

    monkeypatch.setattr(demo, "_run", work)
    killed = True
    with pytest.raises(KeyboardInterrupt):
        demo.run_demo(str(tmp_path / "demo"), print)
    killed = False
    assert adder_kit("demo", "-o", "demo")[0] == 0
    assert "--output demo exists already and holds a demo" in fails("demo", "-o", "demo")
    assert adder_kit("demo", "-o", "demo", "--overwrite")[0] == 0
    image = tmp_path / "images" / "teacher" / "1.png"
    image.parent.mkdir(parents=True)
    image.touch()
    assert "do not belong to a demo" in fails("demo", "-o", "images", "--overwrite")
    assert image.exists()
