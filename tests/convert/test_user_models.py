"""``--import``: the user's own code is run, its errors are one line, and it takes nobody's name."""

import sys

import pytest
import timm

from adderkit.convert.errors import ModelSourceError
from adderkit.convert.user_models import import_models, import_option, split_imports

CODE = """
from timm.models import register_model
from torch import nn

@register_model
def {name}(pretrained=False, **kwargs):
    return nn.Linear(1, {size})
"""


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """Paths and modules are those of before, after each test."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    modules = set(sys.modules)
    yield
    for name in set(sys.modules) - modules:
        if name.startswith("own_"):
            del sys.modules[name]


def test_options_may_stand_anywhere():
    words = ["--import", "a.py", "evaluate", "net", "--import=b", "--dataset", "digits"]
    assert split_imports(words) == (["evaluate", "net", "--dataset", "digits"], ["a.py", "b"])


def test_option_without_a_value():
    with pytest.raises(ModelSourceError, match="--import needs the module or file"):
        split_imports(["evaluate", "net", "--import"])


def test_repeated_command_has_the_option(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["adderkit", "--import", "a.py", "finetune", "net"])
    assert import_option() == "--import a.py "


@pytest.mark.parametrize("name", ["{}.py", "./{}.py", "{}"])
def test_file_or_module_of_the_working_directory(tmp_path, monkeypatch, name):
    own = f"own_{abs(hash(name))}"
    (tmp_path / f"{own}.py").write_text(CODE.format(name=own, size=3))
    monkeypatch.chdir(tmp_path)
    import_models(name.format(own))
    import_models(name.format(own))
    assert timm.create_model(own).out_features == 3


def test_code_that_registers_nothing_is_noticed(tmp_path, caplog):
    (tmp_path / "own_nothing.py").write_text("WIDTH = 5\n")
    (tmp_path / "own_network.py").write_text(CODE.format(name="own_network", size=3))
    for _ in range(2):
        import_models(str(tmp_path / "own_network.py"))
    assert caplog.text == ""
    import_models(str(tmp_path / "own_nothing.py"))
    assert "own_nothing.py registers no new model with timm" in caplog.text


def test_file_imports_its_neighbors(tmp_path):
    (tmp_path / "own_parts.py").write_text("WIDTH = 5\n")
    (tmp_path / "own_whole.py").write_text(
        "from own_parts import WIDTH\n" + CODE.format(name="own_whole", size="WIDTH")
    )
    import_models(str(tmp_path / "own_whole.py"))
    assert timm.create_model("own_whole").out_features == 5


@pytest.mark.parametrize(
    ("code", "reason"), [("import nothing_like_it", "ModuleNotFoundError: No module"), ("1 +", "SyntaxError: ")]
)
def test_errors_of_the_code_are_one_line(tmp_path, code, reason):
    (tmp_path / "own_broken.py").write_text(code)
    with pytest.raises(ModelSourceError, match=rf"cannot import .*own_broken\.py \({reason}.*; --debug shows"):
        import_models(str(tmp_path / "own_broken.py"))
    assert "own_broken" not in sys.modules


def test_name_of_another_module_is_refused(tmp_path):
    (tmp_path / "timm.py").write_text("")
    with pytest.raises(ModelSourceError, match=r"has the name of the Python module timm; rename the file"):
        import_models(str(tmp_path / "timm.py"))


def test_file_that_is_missing(fails):
    assert fails("evaluate", "net", "--import", "gone.py").startswith("--import gone.py does not exist")
