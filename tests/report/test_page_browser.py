"""The report's page in a real browser, where one is installed: no error, nothing overflows."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from test_compare import measured
from test_report import make_plan

from yopo.report.page.page import report_page

BROWSER = next(
    filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None
)
MEASURE = """<script>addEventListener("load", () => {
  const key = new KeyboardEvent("keydown", { key: "ArrowRight", bubbles: true });
  document.querySelector("article:not([hidden]) svg.heat").dispatchEvent(key);
  const said = document.querySelector("article:not([hidden]) .readout").textContent;
  const root = document.documentElement;
  document.title = `${root.scrollWidth <= innerWidth} ${said}`;
});</script></body>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
@pytest.mark.parametrize("width", [420, 1280])
def test_nothing_overflows_and_keys_move(tmp_path: Path, width: int) -> None:
    plan = measured(make_plan(), 0.02)
    less = replace(plan, layers=tuple(replace(each, neurons=0) for each in plan.layers))
    page = report_page([("a" * 200, plan), ("b", less)])
    strict = tmp_path / "strict.html"
    strict.write_text(page)
    probe = tmp_path / "probe.html"  # measuring takes a script, which the page forbids
    probe.write_text(re.sub("<meta http-equiv[^>]*>", "", page).replace("</body>", MEASURE))
    base = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900"]
    logged = [*base, "--enable-logging=stderr", "--dump-dom"]
    done = subprocess.run([*logged, strict.as_uri()], capture_output=True, text=True, timeout=60)
    assert "CONSOLE" not in done.stderr and 'class="slider"' in done.stdout
    assert '<p class="slider" hidden' not in done.stdout  # the page's own script ran
    done = subprocess.run([*logged, probe.as_uri()], capture_output=True, text=True, timeout=60)
    (said,) = re.findall("<title>((?:true|false) [^<]*)</title>", done.stdout)
    assert re.fullmatch(r"true layer 0, head 1: rho [\d.e-]+, [\w ]+", said)
