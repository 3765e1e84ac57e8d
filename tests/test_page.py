"""The pages as files: what is in them, and that nothing in a report can become markup or a connection."""

import itertools
import json
import re
import sys
from html.parser import HTMLParser

import _pages
import pytest
from _pages import HOSTILE

from phi3edge import page
from phi3edge.errors import ConfigError, MissingExtraError, OutputError
from phi3edge.metrics import METRICS, show_value
from phi3edge.report import to_json

VOID = {"meta", "br"}
LOADING = {"src", "srcset", "data", "action", "poster", "background", "ping", "formaction", "manifest"}


class Page(HTMLParser):
    """A page's elements; `text` is that of the body, without scripts."""

    def __init__(self, source):
        super().__init__()
        self.open, self.elements, self.texts, self.scripts, self.tables = [], [], [], [], []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), list(self.open)))
        if tag == "script":
            self.scripts.append("")
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "script" in self.open:
            self.scripts[-1] += data
        elif "body" in self.open:
            self.texts.append(data)
            if {"td", "th"} & set(self.open):
                self.tables[-1][-1][-1] += data

    @property
    def text(self):
        return "".join(self.texts)

    def of(self, tag):
        return [attributes for name, attributes, _ in self.elements if name == tag]

    def table(self, first_column):
        """The first table that has a row with this heading."""
        return next(table for table in self.tables if any(row and row[0] == first_column for row in table))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return _pages.write_folder(tmp_path_factory.mktemp("dist") / "artifact", _pages.report())


@pytest.fixture(scope="module")
def single(folder):
    path = page.write(folder)
    assert path == folder / "report.html"
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def several():
    return page.render(_pages.comparison())


@pytest.fixture(scope="module", params=["single", "several"])
def any_page(request):
    return request.getfixturevalue(request.param)


def test_nothing_is_loaded_and_the_policy_forbids_it(any_page):
    parsed = Page(any_page)
    for _, attributes, _ in parsed.elements:
        assert not LOADING & attributes.keys()
        assert attributes.get("href", "#").startswith("#")
        assert not [key for key in attributes if key.startswith("on")]
    assert not {"link", "img", "iframe", "object", "embed", "base", "form"} & {tag for tag, _, _ in parsed.elements}
    style = any_page[any_page.index("<style>") : any_page.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    [policy] = [m["content"] for m in parsed.of("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; ")
    script_rule = next(part for part in policy.split("; ") if part.startswith("script-src"))
    assert "unsafe" not in script_rule
    assert len(any_page) < 2_000_000


def test_hostile_text_stays_text(any_page):
    parsed = Page(any_page)
    assert any_page.count("<script") == len(parsed.scripts)
    assert parsed.text.count(HOSTILE) > 5  # shown as it is: contexts, answers, names
    data = [a for a in parsed.of("script") if a.get("type") == "application/json"]
    assert len(data) == len(parsed.of("figure"))
    for script in parsed.scripts[: len(data)]:
        assert "<" not in script
        json.loads(script)


def test_a_hostile_name_is_in_the_chart_as_it_is(several):
    charts = [json.loads(script) for script in Page(several).scripts[:-2]]
    names = {row.get("name") for chart in charts for row in chart["data"]["values"]}
    assert f"peer {HOSTILE}" in names


def test_every_metric_is_there(single):
    table = {row[0]: row[1] for row in Page(single).table("perplexity")}
    found = _pages.report().metrics
    for name, kind in METRICS.items():
        shown = table[kind.label + (", nats" if kind.unit == "nats" else "")]
        assert shown.startswith(show_value(found[name].value, kind.unit)), name
    assert table["KL, mean, nats"] == "0.0525 ± 0.0020"


def test_what_was_not_measured_says_so(folder):
    found = _pages.report()
    metrics = {name: metric for name, metric in found.metrics.items() if name != "peak_memory_bytes"}
    parsed = Page(page.render(found.model_copy(update={"metrics": metrics}), {"a": folder}))
    assert dict(row[:2] for row in parsed.table("perplexity"))["peak memory"] == "not measured"


def test_gates_say_where_limits_come_from(single):
    rows = {row[0]: row for row in Page(single).table("KL, mean")}
    assert rows["KL, mean"][1:4] == ["passed", "0.0525 ± 0.0020", "≤ 0.2500"]
    assert rows["KL, mean"][5] == "target iphone"
    assert rows["same most likely token"][5] == "target iphone; 0.9 of the baseline's"
    assert rows["end tokens unknown to it"][5] == "always"


def test_the_verdict_is_that_of_the_gates(folder):
    text = Page(page.render(_pages.report(passed=False), {"a": folder})).text
    assert re.search(r"Failed\s*1 of 3 gates: KL, mean", text)
    ungated = _pages.report().model_copy(update={"gates": []})
    assert "nothing was judged" in Page(page.render(ungated)).text


def test_what_other_commands_found_is_shown(single):
    parsed = Page(single)
    assert ["block 5", "q4_0", "2.00 MB", "0.0120", "0.0405", "0.0120"] in [r[:6] for r in parsed.table("block 5")]
    assert parsed.table("hellaswag")[1][4:7] == ["0.680 ± 0.010", "0.690 ± 0.010", "-0.010 ± 0.003"]
    bench = next(table for table in parsed.tables if ["tg128"] in [row[1:2] for row in table])
    assert bench[2][4:6] == ["73.0 ± 0.5", "61%"]
    assert "c" * 64 in parsed.text  # the calibration text's hash
    assert "mit" in parsed.text
    assert "does not stop at token ids [2]" in parsed.text
    assert "goes on after the reference's answer" in parsed.text


def test_the_tokens_of_each_expert_are_shown_and_a_role_is_one_line(tmp_path):
    folder = _pages.write_folder(tmp_path / "a", _pages.report())
    said = json.loads((folder / "phi3edge.json").read_text())
    linears = [{**row, "name": f"{row['name']}.{n}"} for row in said["calibration"]["linears"] for n in range(3)]
    said["calibration"] |= {"linears": linears, "expert_tokens": [[1700, 12], [300, 412]]}
    (folder / "phi3edge.json").write_text(json.dumps(said))
    parsed = Page(page.render(_pages.report(), {"a": folder}))
    assert parsed.table("layer 0") == [
        ["", "expert 0", "expert 1"],
        ["layer 0", "1,700", "12"],
        ["layer 1", "300", "412"],
    ]
    charts = [json.loads(script)["data"]["values"] for script in parsed.scripts[:-2]]
    [errors] = [rows for rows in charts if rows and "error" in rows[0]]
    assert len(errors) == 12
    assert errors[0]["error"] == pytest.approx(1e-3)


def test_without_other_commands_their_places_name_them(several):
    parsed = Page(several)
    assert "phi3edge bench" in parsed.text
    assert "layers" not in [attributes.get("id") for attributes in parsed.of("section")]


def test_differences_of_answers_are_marked_from_the_first(single):
    assert f"<pre>The sea is <mark>{'vast.'}" in single
    assert "<pre>The sea is <mark>deep.</mark></pre>" in single


def test_headings_captions_and_descriptions(any_page):
    parsed = Page(any_page)
    levels = [int(tag[1]) for tag, _, _ in parsed.elements if re.fullmatch(r"h\d", tag)]
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert len(parsed.of("caption")) == len(parsed.of("table"))
    charts = [a for a in parsed.of("div") if a.get("class") == "chart"]
    assert len(charts) == len(parsed.of("figure")) > 0
    assert all(a["aria-label"] for a in charts)
    ids = [attributes["id"] for _, attributes, _ in parsed.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = {attributes["href"][1:] for attributes in parsed.of("a")}
    assert links <= set(ids)


def test_pairs_are_a_matrix(several):
    matrix = next(table for table in Page(several).tables if table[0][:3] == ["", "q4_0", "q8_0"])
    assert matrix[1][1:3] == ["", "0.0300"]
    assert matrix[2][1:3] == ["91.0 %", ""]


def test_charts_are_vega_lite_that_compiles(single, several):
    vl_convert = pytest.importorskip("vl_convert")
    for source in (single, several):
        for script in Page(source).scripts[:-2]:
            compiled = vl_convert.vegalite_to_vega(json.loads(script))
            assert compiled["marks"]


def test_a_folder_of_two_formats_has_one_page(tmp_path):
    for name in ("gguf", "onnx"):
        _pages.write_folder(tmp_path / name, _pages.report())
    assert page.write(tmp_path) == tmp_path / "comparison.html"
    parsed = Page((tmp_path / "comparison.html").read_text(encoding="utf-8"))
    assert [h for h in parsed.texts if h.startswith("2 artifacts")]


def test_files_that_are_not_what_they_should_be_are_refused(tmp_path):
    folder = _pages.write_folder(tmp_path / "a", _pages.report())
    (folder / "layers.json").write_text('{"rows": 3}')
    with pytest.raises(OutputError, match=r"layers\.json: text: Field required"):
        page.write(folder)
    (folder / "layers.json").unlink()
    other = _pages.report()
    file = other.artifact[0].model_copy(update={"sha256": "0" * 64})
    (folder / "report.json").write_text(to_json(other.model_copy(update={"artifact": [file]})))
    with pytest.raises(OutputError, match="is of other files"):
        page.write(folder)
    (folder / "report.json").write_text("{}")
    with pytest.raises(ConfigError, match="not a report"):
        page.write(folder)
    (folder / "report.json").unlink()
    with pytest.raises(OutputError, match=r"has no report\.json"):
        page.write(folder)
    assert not (folder / "report.html").exists()


def test_without_the_package_the_error_names_the_command(monkeypatch, folder):
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    with pytest.raises(MissingExtraError) as caught:
        page.write(folder)
    assert "[report]" in caught.value.hint
