"""The page in a browser: nothing is cut at the widths of phones, tablets and screens."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from analysis import report
from tests.analysis.records import LONG, result_record, searched
from tests.support.needs import need

pytestmark = [pytest.mark.e2e, pytest.mark.browser]

WIDTHS = (360, 480, 768, 1024, 1200, 1366, 1600)
MEASURE = """<!doctype html><meta charset="utf-8"><body style="margin:0"><script>
const page = PAGE, cut = {};
for (const width of WIDTHS) {
  const frame = document.createElement("iframe");
  frame.style = `width:${width}px;height:600px;border:0;display:block`;
  frame.srcdoc = page;
  frame.onload = () => {
    const inside = frame.contentDocument, root = inside.documentElement, found = [];
    for (const one of inside.querySelectorAll("details")) one.open = true;
    for (const one of inside.body.querySelectorAll("*")) {
      if (one.ownerSVGElement) continue;
      const box = one.getBoundingClientRect(), hidden = one.scrollWidth > one.clientWidth + 1 && one.clientWidth;
      if (box.right > root.clientWidth + 0.5 || hidden)
        found.push(`${one.tagName}.${one.className} ${Math.round(box.right)} ${one.textContent.slice(0, 40)}`);
    }
    cut[width] = found;
    if (Object.keys(cut).length === WIDTHS.length) {
      const result = document.createElement("pre");
      result.id = "cut";
      result.textContent = JSON.stringify(cut);
      document.body.replaceChildren(result);
    }
  };
  document.body.append(frame);
}
</script></body>"""


def test_nothing_is_cut(tmp_path: Path) -> None:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    need(chromium is not None, "Chromium")
    assert chromium is not None
    records = [
        *(result_record(users, topology=LONG, repeat=r, ttft_s=123.456 + r, added_s=0.00234) for users in (1, 1000)
          for r in range(3)),
        *(searched(rate, good=rate < 20) for rate in (1.0, 11.31, 22.63)),
    ]  # fmt: skip
    page = json.dumps(report.report(records, title="A report")).replace("</", "<\\/")
    source = tmp_path / "measure.html"
    source.write_text(MEASURE.replace("PAGE", page).replace("WIDTHS", json.dumps(WIDTHS)), encoding="utf-8")
    command = [
        *(chromium, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
        *("--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}"),
        *("--virtual-time-budget=60000", "--dump-dom", source.as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    match = re.search(r'<pre id="cut">(.*?)</pre>', done.stdout, re.DOTALL)
    assert match is not None, done.stderr[-500:]
    cut = json.loads(html.unescape(match[1]))
    assert cut == {str(width): [] for width in WIDTHS}
