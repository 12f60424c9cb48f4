"""An edited model card is checked before anything is sent."""

import pytest

from adderkit.convert.errors import PublishError
from adderkit.recipes.hub.card_check import check_card

INDEX = """model-index:
- name: net
  results:
  - task: {type: image-classification}
    dataset: {name: digits, type: digits}
    metrics: [{type: accuracy, value: 0.9}]"""


@pytest.fixture
def card(tmp_path):
    """Write a card with a front matter."""

    def write(text):
        path = tmp_path / "README.md"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return write


@pytest.mark.parametrize(
    "text",
    [
        "# no front matter\n",
        "",
        "---\nlicense: mit\ntags:\n- timm\nbase_model: timm/resnet18\n---\n# x\n",
        "\ufeff---\r\nlicense: [mit, apache-2.0]\r\nunknown: {a: 1}\r\n---\r\n# x\r\n",
        f"---\n{INDEX}\n---\n# x\n",
        "---\nbase_model: [timm/resnet18, timm/resnet50]\nbase_model_relation: finetune\n---\n",
    ],
    ids=["none", "empty", "plain", "windows", "measurements", "two-bases"],
)
def test_sound_cards(card, text):
    check_card(card(text))


@pytest.mark.parametrize(
    ("front", "message"),
    [
        ("model-index: nonsense", "model-index is 'nonsense', expected a list of models"),
        ("model-index: {name: net}", "model-index is {'name': 'net'}, expected"),
        ("model-index:\n- 5", "model-index is [5], expected"),
        ("model-index:\n- name: net", "model-index is [{'name': 'net'}], expected"),
        (INDEX.replace(", value: 0.9", ""), "expected a list of models"),
        ("license: mit\n\ttags: x", "not valid YAML"),
        ("license: mit\nlicense: bsd", "duplicate key 'license'"),
        ("license: [mit", "not valid YAML"),
        ("- license", "expected a mapping"),
        ("license: 2024-01-01", "license is datetime.date(2024, 1, 1), expected text or a list"),
        ("tags: timm", "tags is 'timm', expected a list of texts"),
        ("tags: [1]", "tags is [1], expected a list of texts"),
        ("base_model: ann/net/more", "base_model 'ann/net/more' is not the name of a repository"),
        ("base_model_relation: child", "base_model_relation is 'child', expected one of finetune"),
    ],
)
def test_what_the_hub_would_refuse(card, front, message):
    path = card(f"---\n{front}\n---\n# x\n")
    with pytest.raises(PublishError) as caught:
        check_card(path)
    line = str(caught.value)
    assert line.startswith(f"the Hub would refuse {path}: ")
    assert message in line
    assert line.endswith("with --force")
    assert "\n" not in line


@pytest.mark.parametrize(("text", "message"), [("---\nlicense: mit\n# x", "no closing line"), (b"\xff\xfe", "utf-8")])
def test_damaged_cards(card, text, message):
    with pytest.raises(PublishError, match=message):
        check_card(card(text))
