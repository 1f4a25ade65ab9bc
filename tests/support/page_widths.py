"""What a browser cuts of a page at the widths of phones, tablets and screens."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

from tests.support.needs import need

WIDTHS = (360, 480, 768, 800, 1024, 1200, 1366, 1600)
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
    for (const text of inside.querySelectorAll("svg text, svg g[id*='text_']")) {
      const box = text.getBoundingClientRect(), drawing = text.ownerSVGElement.getBoundingClientRect();
      if (box.left < drawing.left - 0.5 || box.right > drawing.right + 0.5 ||
          box.top < drawing.top - 0.5 || box.bottom > drawing.bottom + 0.5)
        found.push(`${text.tagName}.${text.id} is not within its drawing`);
    }
    if (root.scrollWidth > root.clientWidth) found.push(`the page is ${root.scrollWidth} wide`);
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


def cut_elements(page: str, folder: Path) -> dict[str, list[str]]:
    """The elements of an HTML page that are cut or reach beyond the window, and the texts of drawings (SVG, also with
    letters as paths, in the groups that matplotlib calls text_N) that reach beyond their drawing, by the window's width
    in pixels. `folder`: for the browser's files."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    need(chromium is not None, "Chromium")
    assert chromium is not None
    quoted = json.dumps(page).replace("</", "<\\/")
    source = folder / "measure.html"
    source.write_text(MEASURE.replace("PAGE", quoted).replace("WIDTHS", json.dumps(WIDTHS)), encoding="utf-8")
    command = [
        *(chromium, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
        *("--disable-component-update", "--disable-sync", f"--user-data-dir={folder / 'profile'}"),
        *("--virtual-time-budget=60000", "--dump-dom", source.as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    match = re.search(r'<pre id="cut">(.*?)</pre>', done.stdout, re.DOTALL)
    assert match is not None, done.stderr[-500:]
    cut: dict[str, list[str]] = json.loads(html.unescape(match[1]))
    return cut
