"""The report in a real browser: Chromium without a window, where one is installed."""

import html
import json
import os
import re
import shutil
import subprocess

import pytest

from adderkit.recipes.reporting.evaluations import record_evaluation
from adderkit.recipes.training.evaluate import Metrics

PHONE = 390  # pixels
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium here: apt-get install chromium"),
]

# A headless window is never narrower than 500 pixels, a frame is. Its page sees the frame's width as the screen's.
FRAME = """<!DOCTYPE html>
<body><iframe id="frame" style="border: 0; width: {width}px; height: 2000px" srcdoc="{page}"></iframe>
<script>
document.getElementById("frame").onload = (event) => {{
  const page = event.target.contentDocument;
  const right = (element) => element.getBoundingClientRect().right;
  const wide = [...page.body.querySelectorAll("*")].filter((element) => right(element) > {width} + 0.5);
  const small = [...page.querySelectorAll("body *")].filter(
    (element) => element.children.length == 0 && element.textContent.trim() && element.closest("svg") == null
      && parseFloat(page.defaultView.getComputedStyle(element).fontSize) < 13);
  document.title = JSON.stringify({{
    width: page.documentElement.scrollWidth,
    wide: wide.map((element) => element.outerHTML.slice(0, 80)),
    small: small.map((element) => element.outerHTML.slice(0, 80)),
    height: page.documentElement.scrollHeight,
  }});
}};
</script>"""


@pytest.fixture
def browse(tmp_path):
    """Open a page; the document after loading, and what was said on the console."""

    def run(text, *options):
        page = tmp_path / "page.html"
        page.write_text(text)
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # which Chromium refuses to root
        words = ["--headless", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr"]
        options = options or ("--dump-dom",)
        command = [BROWSER, *words, f"--user-data-dir={tmp_path / 'profile'}", *sandbox, *options, page.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    return run


@pytest.fixture
def measured(browse):
    """What a page measures in a frame as wide as a phone."""

    def run(text):
        document, _ = browse(FRAME.format(width=PHONE, page=html.escape(text)))
        value = re.search(r"<title>(.*?)</title>", document)[1]
        return json.loads(html.unescape(value))

    return run


@pytest.fixture
def page(adder_kit, adder_folder, tmp_path):
    """A report with all its sections, of a model in a run."""
    folder = shutil.copytree(adder_folder, tmp_path / "mine" / "best")
    (tmp_path / "mine" / "args.yaml").write_text("job: {}\n")
    (tmp_path / "mine" / "summary.csv").write_text(
        "epoch,train_loss,eval_loss,eval_top1,eval_top5,lr\n0,2,1.5,50,90,1e-9\n1,1,1,60,95,5e-10\n"
    )
    rows = [{"path": f"features.4.{name}", "correlation": 0.9, "worst": 0.8} for name in ("conv1", "conv2")]
    report = json.loads((folder / "adder_report.json").read_text())
    (folder / "adder_report.json").write_text(json.dumps({**report, "calibration": {"layers": rows}}))
    record_evaluation(folder, "hfds/" + "long" * 30, "validation", Metrics(91.5, 99.5, 0.5, 10**7, 1.0))
    status, _, err = adder_kit("report", folder, "--dataset", "digits")
    assert status == 0, err
    return (tmp_path / "mine" / "best-report.html").read_text()


def test_console_is_silent(browse, page):
    document, said = browse(page)
    for text in ("How it was made", "0.900, worst 0.800", "91.50", "loss by epoch", "data:image/png"):
        assert text in document
    assert said == []
    _, said = browse(page.replace("<main>", '<main><img src="x.png"><script>1</script>'))
    assert len(said) >= 2  # what the policy forbids is told there


def test_fits_a_phone(measured, page):
    found = measured(page)
    assert found["wide"] == []
    assert found["width"] == PHONE
    assert found["small"] == []
    assert found["height"] > 3000
    wide = measured(page.replace("<main>", '<main><pre style="width: 500px; font-size: 9px">x</pre>'))
    assert wide["width"] > PHONE
    assert len(wide["wide"]) == len(wide["small"]) == 1


def test_prints(browse, page, tmp_path):
    target = tmp_path / "page.pdf"
    browse(page, "--no-pdf-header-footer", f"--print-to-pdf={target}")
    data = target.read_bytes()
    assert data.startswith(b"%PDF")
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b", data)) <= 6
