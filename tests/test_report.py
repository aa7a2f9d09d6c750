"""report.html of a real run: complete, self-contained, the same bytes each time, readable on a laptop and a phone."""

from __future__ import annotations

import html
import inspect
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tersor.compress import How, apply, load_recipe
from tersor.compress.evaluate.latency import CALLS
from tersor.compress.reporting import figures, report
from tersor.compress.reporting.page import _details, render
from tersor.compress.run import resolve

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
VOID = {"meta", "br", "link", "img", "hr", "input"}


STEPS = """
metrics: [perplexity, kl]
passes:
  - use: slice
    with: {remove: 0.15, on: [ffn]}
    gate: {metric: kl, max: 100}
  - use: slice
    with: {remove: 0.1, on: [hidden]}
gate: {metric: perplexity, max: 1000000}
export:
  - use: onnx
    with: {inputs: padded}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny, write_recipe):
    folder = tmp_path_factory.mktemp("report")
    tiny("llama").save(folder / "model")
    return load_recipe(write_recipe(folder, folder / "model", STEPS, "small & <odd>.yaml"))


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory) -> Path:
    return apply(recipe, How(tmp_path_factory.mktemp("runs") / "run", threads=1)).directory


@pytest.fixture(scope="module")
def page(run) -> str:
    return (run / "report.html").read_text("utf-8")


class Structure(HTMLParser):
    """Tags that do not close, ids that meet, addresses that leave the page."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.ids, self.links, self.words, self.broken = [], [], [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append(tag)
        self.ids += [value for key, value in attributes if key == "id"]
        self.links += [value for key, value in attributes if key in ("src", "href", "srcset", "action", "data")]

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.broken.append(tag)

    def handle_data(self, data):
        self.words += data


def test_it_says_what_a_reader_looks_for(page, run):
    words = Structure(page).words
    metrics = json.loads((run / "metrics.json").read_text())
    for expected in (
        "small & <odd>",
        "passed",
        "slice with remove: 0.15, on: ffn",
        "slice may pass if kl is at most 100",
        "perplexity is at most 1,000,000",
        f"{metrics['original']['parameters']:,}",
        f"{metrics['checkpoint']['perplexity']:.4g}",
        "1-slice",
        "2-slice",
        "delivered",
        "met",
        "tersor apply recipe.yaml --output again --threads 1",
        json.loads((run / "lock.json").read_text())["weights"]["model.safetensors"],
    ):
        assert expected in words, expected
    low, high = metrics["checkpoint"]["intervals"]["perplexity"]
    assert f"({low:.4g} … {high:.4g})" in words


def test_every_step_has_its_size_and_latency(page, run):
    metrics = json.loads((run / "metrics.json").read_text())
    first, second = metrics["steps"]
    assert metrics["original"]["bytes"] > first["bytes"] > second["bytes"] == metrics["checkpoint"]["bytes"]
    assert first["latency_ms"] > 0
    words = Structure(page).words
    for block in (metrics["original"], first, metrics["checkpoint"], *metrics["artifacts"]):
        assert f"{block['latency_ms']:.4g}" in words


def test_it_asks_for_nothing_and_is_well_formed(page):
    found = Structure(page)
    assert found.broken == []
    assert found.open == []
    assert all(link.startswith("#") for link in found.links), found.links
    assert len(found.ids) == len(set(found.ids)), "ids of two figures meet"
    assert all(link[1:] in found.ids for link in found.links)
    for word in ("<script", "@import", "url(http", "<link", "<iframe", "http://", "https://"):
        assert word not in page
    assert page.count("<svg") >= 5


def test_an_address_that_leaves_would_be_seen():
    found = Structure('<a href="https://x.org"><img src="y.png"></a><b></i>')
    assert found.links == ["https://x.org", "y.png"]
    assert found.broken == ["i"]


def test_the_same_run_gives_the_same_bytes(page, run, recipe):
    journal = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
    metrics = json.loads((run / "metrics.json").read_text())
    _, plan = resolve(recipe, How(offline=True))
    assert render(run, plan, metrics, journal) == page
    metrics["checkpoint"]["perplexity"] += 1
    assert render(run, plan, metrics, journal) != page


def test_what_a_pass_left_is_shown_by_its_shape(page):
    facts, plots, rest = _details(
        {
            "task": "text-generation",
            "share": 0.123456,
            "per_layer_error": [0.1, 0.2, 0.15],
            "per_layer": {"error": [1.0, 2.0, 3.0], "kept": [1, 1, 0]},
            "tried": [{"sizes": {"hidden": n}, "loss": 1 / n} for n in (1, 2, 4)],
            "sizes": {"hidden": 40},
            "odd": [[1, 2], ["<b>"]],
        },
        "s",
    )
    assert facts == {"task": "text-generation", "share": "0.1235", "sizes": "hidden: 40"}
    assert len(plots) == 3
    assert rest.keys() == {"tried", "odd"}
    assert rest["tried"][0] == ["", "sizes", "loss"]
    assert rest["tried"][2][1:] == ["hidden: 2", "0.5"]
    assert all("layer" in plot for plot in plots[:2])


def test_columns_over_steps_are_drawn_over_them():
    few = {"step": [1, 11, 21, 31], "sparse": [3.0, 2.5, 2.0, 2.1], "dense": [3.0, 2.4, 1.9, 1.8]}
    many = {"step": few["step"], **{f"layer{n}": [1.0, 0.8, 0.5, 0.2] for n in range(20)}}
    facts, plots, rest = _details({"loss": few, "density": many}, "s")
    assert (facts, rest) == ({}, {})
    lines, layers = plots
    assert "sparse" in lines
    assert "step" in lines
    assert ["layer0" in layers, "layer7" in layers, "layer19" in layers] == [True, False, True]
    odd = _details({"odd": {**few, "step": [1, 2, 3]}}, "s")[1]
    assert "step" in odd[0], "columns of other lengths are lines of their own"
    moved = figures.lines("loss", {"sparse": few["sparse"], "dense": few["dense"]}, "step", "s-0", [1, 11, 21, 91])
    assert moved != lines


def test_records_by_a_column_are_drawn_over_it_beside_what_they_are_held_to():
    curve = [{"k": k, "loss": 3.0 - k / 10, "share": k / 8} for k in (2, 4, 8)]
    _, (plot,), rest = _details({"loss": {"dense": 2.0, "pruned": 2.9}, "loss_by_k": curve}, "s")
    assert all(word in plot for word in ("dense", "pruned", ">k<"))
    assert "share" not in plot
    assert rest.keys() == {"loss by k"}
    alone = _details({"loss_by_k": curve}, "s")[1][0]
    assert "dense" not in alone
    further = _details({"loss_by_k": [{**record, "k": 3 * record["k"]} for record in curve]}, "s")[1][0]
    assert further != alone


def test_records_of_many_numbers_are_a_field_and_those_of_no_common_scale_a_table():
    load = [{f"expert {n}": 0.1 * n + layer for n in range(8)} for layer in range(3)]
    _, (field,), rest = _details({"load": load}, "s")
    assert "expert" in field
    assert "dark: 2.7" in field
    assert rest.keys() == {"load"}
    router = [{"scale": 1e-4, "kept": 1.0 - n / 100} for n in range(4)]
    assert _details({"router": router}, "s")[1] == []
    assert len(_details({"router": [{**record, "scale": 0.1} for record in router]}, "s")[1]) == 1


def test_what_is_the_same_in_every_layer_is_a_word_and_no_plot():
    facts, plots, rest = _details({"active_per_layer": [0.5] * 8}, "s")
    assert (facts, plots, rest) == ({"active per layer": "0.5, all 8"}, [], {})
    assert len(_details({"active_per_layer": [0.5] * 7 + [0.4]}, "s")[1]) == 1


def test_calls_of_several_sizes_are_timed_and_drawn(page, run):
    metrics = json.loads((run / "metrics.json").read_text())
    calls = metrics["latency"]["calls"]
    assert [call["tokens"] for call in calls] == [n for n in CALLS if n <= metrics["latency"]["tokens"]]
    assert all(ms > 0 for call in calls for ms in call["milliseconds"].values())
    assert "times as fast as the original, by tokens of a call" in page
    table = report.calls(metrics)
    assert table[0] == ["tokens of a call, ms", *report.columns(metrics)]
    assert [row[0] for row in table[1:]] == [str(call["tokens"]) for call in calls]
    assert all("faster" in cell or "slower" in cell for row in table[1:] for cell in row[2:])
    assert report.calls({**metrics, "latency": {"calls": None}}) == []


def test_one_sample_has_no_interval_and_numbers_that_are_none_no_plot():
    svg = figures.intervals("kl & more", {"a": 1.0, "b": 2.0}, {"a": (None, None)}, [1.5], "x")
    assert svg.startswith('<svg role="img" aria-label="kl &amp; more"')
    assert _details({"loss": [1.0, float("nan"), 2.0]}, "s")[1] == []


def test_matplotlib_waits_until_a_page_is_made_and_leaves_nothing_changed():
    import matplotlib

    before = dict(matplotlib.rcParams)
    figures.bars("a", {"x": 1.0}, {"x": "1"}, "p")
    assert dict(matplotlib.rcParams) == before
    source = inspect.getsource(figures)
    assert not re.search(r"^(import|from) matplotlib", source, re.MULTILINE)


def test_a_failed_run_says_so(recipe, tmp_path):
    from tersor.compress.errors import GateMissed

    failing = load_recipe(recipe.base / "small & <odd>.yaml", ["gate={metric: kl, max: 0.0000001}"])
    with pytest.raises(GateMissed):
        apply(failing, How(tmp_path / "run", threads=1))
    words = Structure((tmp_path / "run" / "report.html").read_text("utf-8")).words
    assert "failed" in words
    assert "missed" in words
    assert "is over" in words


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [1280, 390])
def test_it_fits_the_window(page, tmp_path, width):
    """No sideways scrolling, no request, text on light. In a frame: Chromium's narrowest window is 500 pixels."""
    probe = (
        "<script>addEventListener('load', () => {const d = document.documentElement;"
        "parent.postMessage([d.scrollWidth, innerWidth, performance.getEntriesByType('resource').length,"
        "getComputedStyle(document.body).backgroundColor], '*')})</script></body>"
    )
    (tmp_path / "report.html").write_text(page.replace("</body>", probe), "utf-8")
    file = tmp_path / "frame.html"
    file.write_text(
        "<title></title><script>onmessage = e => document.title = JSON.stringify(e.data)</script>"
        f'<iframe style="width: {width}px; height: 900px; border: 0" src="report.html"></iframe>'
    )
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    command += ["--window-size=1400,950", f"--screenshot={tmp_path}/shot.png", "--dump-dom", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title, done.stderr[-500:]
    scroll, inner, requests, background = json.loads(html.unescape(title[1]))
    assert scroll <= inner
    assert requests == 0
    assert background == "rgb(255, 255, 255)"
