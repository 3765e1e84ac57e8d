"""The pages in a real browser: they draw, in light and dark, wide and on a phone, without an error or a connection."""

import functools
import http.server
import json
import re
import shutil
import subprocess
import threading

import _pages
import pytest

from phi3edge import page

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no browser: install Debian's chromium")

WIDTHS = (360, 1280)
PAGES = ("single.html", "several.html")
HARNESS = """<!DOCTYPE html><html><head><meta charset="utf-8"><link rel="icon" href="data:,"></head><body><script>
const cases = %s;
const found = {};
function contrast(a, b) {  // WCAG 2.1, 1.4.3
  const [x, y] = [a, b].map((colour) => {
    const parts = colour.match(/[\\d.]+/g).slice(0, 3).map((part) => part / 255);
    const linear = parts.map((part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
  });
  return (Math.max(x, y) + 0.05) / (Math.min(x, y) + 0.05);
}
async function look(name, width) {
  const frame = document.createElement("iframe");
  frame.width = width;
  frame.height = 800;
  frame.src = name;
  document.body.append(frame);
  await new Promise((done) => { frame.onload = done; });
  const inside = frame.contentDocument, root = inside.documentElement, view = frame.contentWindow;
  while (root.dataset.charts === undefined) await new Promise((done) => setTimeout(done, 20));
  const of = (element, property) => view.getComputedStyle(element)[property];
  const paper = of(inside.body, "backgroundColor");
  const bar = inside.querySelector("#chart-distribution .mark-rect path, #chart-distribution .mark-line path");
  bar.dispatchEvent(new view.PointerEvent("pointermove", {bubbles: true, clientX: 200, clientY: 200}));
  found[`${name} ${width}`] = {
    charts: root.dataset.charts,
    figures: inside.querySelectorAll("figure").length,
    drawn: [...inside.querySelectorAll("figure svg")].filter((svg) => svg.querySelector(".mark-group path")).length,
    widest: Math.max(...[...inside.querySelectorAll("figure svg")].map((svg) => svg.getBoundingClientRect().right)),
    scroll: root.scrollWidth,
    client: root.clientWidth,
    images: inside.images.length,
    paper: paper,
    contrasts: Object.fromEntries(["body", "figcaption", ".passed", ".failed", "summary", "thead th"].map(
      (what) => [what, contrast(of(inside.querySelector(what), "color"), paper)])),
    label: contrast(of(inside.querySelector("figure .role-axis-label text"), "fill"), paper),
    bar: contrast(of(bar, bar.matches(".mark-rect path") ? "fill" : "stroke"), paper),
    tip: inside.getElementById("tip").textContent,
  };
}
(async () => {
  for (const [name, width] of cases) await look(name, width);
  document.body.innerHTML = `<pre id="found"></pre>`;
  document.getElementById("found").textContent = JSON.stringify(found);
})();
</script></body></html>"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    asked: list[str] = []

    def log_request(self, code="-", size="-"):
        self.asked.append(f"{code} {self.path}")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A local server of the pages and of one that looks into them, and what was asked of it."""
    folder = tmp_path_factory.mktemp("site")
    artifact = _pages.write_folder(folder / "artifact", _pages.report(passed=False))
    (folder / "single.html").write_text(page.write(artifact).read_text(encoding="utf-8"), encoding="utf-8")
    several = page.render(_pages.comparison(), {"q4_0": artifact})
    (folder / "several.html").write_text(several, encoding="utf-8")
    cases = [[name, width] for name in PAGES for width in WIDTHS]
    (folder / "index.html").write_text(HARNESS % json.dumps(cases), encoding="utf-8")
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/index.html"
        server.shutdown()


def browse(address, profile, *options):
    """The page's elements when all has been drawn, and what the browser's console said."""
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--user-data-dir={profile}"]
    command += ["--enable-logging=stderr", "--v=0", "--virtual-time-budget=60000", "--dump-dom", *options, address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.fixture(scope="module", params=["light", "dark"])
def seen(request, site, tmp_path_factory):
    Quiet.asked.clear()
    scheme = {"light": "1", "dark": "0"}[request.param]
    document, console = browse(
        site, tmp_path_factory.mktemp("profile"), f"--blink-settings=preferredColorScheme={scheme}"
    )
    found = re.search(r'<pre id="found">(.*)</pre>', document, re.DOTALL)
    assert found, document[-2000:]
    text = found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    return request.param, json.loads(text), console, sorted({line.split()[1] for line in Quiet.asked})


def test_every_chart_draws_without_an_error(seen):
    _, pages, console, _ = seen
    assert console == []
    assert len(pages) == len(PAGES) * len(WIDTHS)
    for name, of in pages.items():
        assert of["charts"] == "drawn", name
        assert of["drawn"] == of["figures"] > 3, name


def test_nothing_else_is_asked_for(seen):
    _, pages, _, asked = seen
    assert asked == ["/index.html", "/several.html", "/single.html"]
    assert {of["images"] for of in pages.values()} == {0}


def test_no_page_is_wider_than_its_screen(seen):
    _, pages, _, _ = seen
    for name, of in pages.items():
        assert of["scroll"] <= of["client"], name
        assert of["widest"] <= of["client"], name


def test_light_and_dark_can_be_read(seen):
    scheme, pages, _, _ = seen
    for name, of in pages.items():
        light = sum(map(int, re.findall(r"\d+", of["paper"])[:3])) > 384
        assert light == (scheme == "light"), name
        assert min(of["contrasts"].values()) >= 4.5, (name, of["contrasts"])
        assert of["label"] >= 4.5, name
        assert of["bar"] >= 3, name


def test_figures_are_told_under_the_pointer(seen):
    _, pages, _, _ = seen
    assert re.search(r"KL: .* nats\ntokens: \d+", pages["single.html 1280"]["tip"])
