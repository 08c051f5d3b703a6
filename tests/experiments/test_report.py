"""The report: it is valid, self-contained, and shows the results of the runs."""

import base64
import io
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

pytest.importorskip("jinja2", reason="the demo's libraries are not installed")
pytest.importorskip("matplotlib", reason="the demo's libraries are not installed")

import matplotlib
from PIL import Image

from xbm.experiments import charts, files, report

STEPS = np.arange(0, 200, 2)
WARMUP = 40
IMAGES = np.random.default_rng(0).integers(256, size=(40, 28, 28), dtype=np.uint8)
LABELS = np.arange(40) // 8
QUERIES = [3, 17, 38]
FIGURES = ("batch_loss", "memory_loss", "fill", "pairs", "drift", "drift_age")
PANELS = {"Fill of the memory", "Pairs in use", "Drift of samples seen again", "Age of their rows, in steps"}
VOID = {"meta"}  # elements of the page that have no end tag
LOADING = {"src", "srcset", "href", "xlink:href", "data", "action", "poster", "background"}  # attributes


def run(name, recall_at_1=0.5, *, memory=True, seed=0):
    """Return a run with random values; without a memory, the memory's figures are 0 or NaN as in the library."""
    rng = np.random.default_rng(seed)
    figures = {figure: 0.1 + rng.random(len(STEPS)) for figure in FIGURES}
    figures["memory_loss"][STEPS < WARMUP] = 0
    figures["drift"][::7] = np.nan
    if not memory:
        figures |= {"memory_loss": np.zeros(len(STEPS)), "fill": np.zeros(len(STEPS))}
        figures |= dict.fromkeys(("pairs", "drift", "drift_age"), np.full(len(STEPS), np.nan))
    return report.Run(
        name=name,
        recall_steps=[0, 100, 200],
        recall=[0.2, 0.3, recall_at_1],
        figures_steps=STEPS,
        figures=figures,
        recall_at_1=recall_at_1,
        r_precision=0.4321 + seed / 10,
        map_at_r=0.3219 + seed / 10,
        seconds=1234.56 + seed,
        memory_megabytes=6.54 if memory else 0.0,
        neighbours=rng.integers(40, size=(40, 10)),
    )


def bare(*runs):
    """Return the runs without the data of the charts, because a page without charts is fast to write."""
    return [replace(one, recall=[], figures={}) for one in runs]


PAIR = [run("in-batch only", 0.6918, memory=False), run("with memory", 0.7283, seed=1)]


def write(path, runs=PAIR, **changes):
    """Write a report, by default with two runs."""
    given = {"images": IMAGES, "labels": LABELS, "queries": QUERIES, "settings": {"capacity": 8192}, "warmup": WARMUP}
    report.write(path, runs, **given | changes)
    return path


class Page(HTMLParser):
    """A parsed page: its elements as (tag, attributes), its text outside of styles, and its styles."""

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.elements, self.open, self.pieces, self.styles = [], [], [], []
        self.feed(self.source)
        self.close()
        self.text = " ".join(" ".join(self.pieces).split())

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        (self.styles if self.open[-1:] == ["style"] else self.pieces).append(data)

    def classes(self):
        return Counter(name for _, attributes in self.elements for name in attributes.get("class", "").split())

    def labels(self, class_):
        return [attributes["aria-label"] for _, attributes in self.elements if attributes.get("class") == class_]


@pytest.fixture
def page(tmp_path):
    """Return a function that writes a page and parses it."""
    return lambda *arguments, **changes: Page(write(tmp_path / "report.html", *arguments, **changes))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return the page of two runs, without and with a memory."""
    return Page(write(tmp_path_factory.mktemp("report") / "report.html"))


def test_elements_are_closed_in_order(whole):
    assert not whole.open
    assert {"table", "svg", "ol"} <= {tag for tag, _ in whole.elements}


def test_nothing_is_loaded(whole):
    targets = [value for _, given in whole.elements for name, value in given.items() if name in LOADING]
    targets += re.findall(r"url\(([^)]*)\)", whole.source)
    assert targets
    assert all(re.match(r"""["']?(#|data:)""", target) for target in targets)
    assert not {"script", "link", "iframe"} & {tag for tag, _ in whole.elements}
    assert "@import" not in whole.source
    without_namespaces = re.sub(r'xmlns(:xlink)?="[^"]*"', "", whole.source)
    assert not re.search("https?:", without_namespaces)


def test_ids_are_unique_and_every_reference_has_one(whole):
    ids = [given["id"] for _, given in whole.elements if "id" in given]
    assert len(ids) == len(set(ids)) > 0
    assert set(re.findall(r"""["'(]#([\w-]+)["')]""", whole.source)) <= set(ids)


def test_no_style_of_a_chart_reaches_the_page(whole):
    assert [tag for tag, _ in whole.elements].count("style") == 1


def test_colours_are_those_of_the_palette(whole):
    drawn = re.findall(
        r"(?:fill|stroke|color): ?(#\w+)", re.sub("<style>.*</style>", "", whole.source, flags=re.DOTALL)
    )
    assert not drawn


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_numbers_and_names_of_every_run(page, count):
    runs = bare(*(run(f"run {i}", 0.5 + i / 10, seed=i) for i in range(count)))
    text = page(runs).text
    for i, one in enumerate(runs):
        assert one.name in text
        for number in (f"{0.5 + i / 10:.3f}", f"{0.432 + i / 10:.3f}", f"{0.322 + i / 10:.3f}", f"{1234.6 + i:,.1f}"):
            assert number in text
    assert "6.5" in text


@pytest.mark.parametrize(
    ("before", "after", "headline", "lead"),
    [
        (0.6918, 0.7283, "R@1 0.692 → 0.728 (+3.6 points) with a memory of 8,192 rows", "more often than"),
        (0.7283, 0.6918, "R@1 0.728 → 0.692 (−3.6 points) with a memory of 8,192 rows", "less often than"),
        (0.7001, 0.7003, "R@1 0.700 → 0.700 (±0.0 points) with a memory of 8,192 rows", "as often as"),
    ],
)
def test_headline_tells_gain_from_loss(page, before, after, headline, lead):
    parsed = page(bare(run("a", before, memory=False), run("b", after)))
    assert parsed.text.count(headline) == 2  # the title and the heading
    assert f"“b” ranks an image of the query’s class first {lead} “a”" in parsed.text


def test_headline_names_the_run_where_no_capacity_is_told(page):
    assert "points) with “with memory”" in page(bare(*PAIR), settings={}).text
    assert "points) with “with memory”" in page(bare(*PAIR), settings={"capacity": "8192 and 1024"}).text


def test_settings_are_told(page):
    text = page(bare(*PAIR), settings={"learning rate": 3e-4, "steps": 2500, "on": True, "<i>": "<b>"}).text
    assert "learning rate 0.0003 steps 2,500 on True <i> <b>" in text


def test_names_are_escaped(page):
    name = """</style><script>alert("1")</script>' & “x”"""
    parsed = page([run(name), run("other")])
    assert "script" not in {tag for tag, _ in parsed.elements}
    assert name in parsed.text
    assert any(name in label for label in parsed.labels("chart"))


def test_marks_agree_with_the_labels(whole):
    right = sum((LABELS[one.neighbours[query]] == LABELS[query]).sum() for one in PAIR for query in QUERIES)
    assert 0 < right < 60
    assert whole.classes()["right"] == right
    assert whole.classes()["wrong"] == 60 - right
    ticks, crosses = (
        sum(given.get("d") == path for _, given in whole.elements)
        for path in ("M1 7l3.5 3.5L11 2", "M2 2l8 8M10 2l-8 8")
    )
    assert (ticks, crosses) == (right, 60 - right)


def test_a_glyph_is_named_by_its_class(whole):
    expected = []
    for query in QUERIES:
        expected.append(f"query of class {LABELS[query]}")
        for one in PAIR:
            found = LABELS[one.neighbours[query]]
            expected += [f"{'right' if label == LABELS[query] else 'wrong'}: class {label}" for label in found]
    assert whole.labels("glyph") == expected


def test_an_image_is_embedded_once_and_shown_in_its_places(whole):
    (uri,) = re.findall(r"data:image/png;base64,([\w+/=]+)", whole.source)
    alpha = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri))))[..., 1]
    expected = [i for query in QUERIES for i in (query, *(j for one in PAIR for j in one.neighbours[query]))]
    assert alpha.size < (len(set(expected)) + report.SPRITES) * 28 * 28
    places = [given["style"] for _, given in whole.elements if given.get("class") == "glyph"]
    for place, i in zip(places, expected, strict=True):
        x, y = (28 * int(number) for number in re.fullmatch(r"--x: (\d+); --y: (\d+)", place).groups())
        np.testing.assert_array_equal(alpha[y : y + 28, x : x + 28], IMAGES[i])


def panels(page):
    """Return the titles of the memory's panels on a page."""
    return {title for title in PANELS if title in page.text}


def test_every_figure_has_its_panel(whole):
    assert panels(whole) == PANELS


@pytest.mark.parametrize("drift", [np.full(len(STEPS), np.nan), np.zeros(len(STEPS)), None])
def test_a_figure_without_readings_has_no_panel(page, drift):
    figures = {"pairs": PAIR[1].figures["pairs"]} | ({} if drift is None else {"drift": drift})
    assert panels(page([replace(PAIR[1], recall=[], figures=figures)])) == {"Pairs in use"}


def test_a_section_without_charts_is_left_out(page):
    text = page(bare(*PAIR)).text
    assert "Recall during training" not in text
    assert "Loss terms" not in text
    assert "Inside the memory" not in text


def test_only_a_memory_has_memory_lines(whole):
    text = whole.text
    assert "with memory: memory loss" in text
    assert "in-batch only: memory loss" not in text


def test_the_step_where_the_memory_switches_on_is_marked(whole):
    assert whole.text.count("“memory on”, at step 40") == 1
    assert whole.text.count("memory on") == 1 + 2 + 2 + len(PANELS)  # two of the charts are drawn in two sizes


@pytest.mark.parametrize(("one", "warmup"), [(PAIR[0], WARMUP), (PAIR[1], 0)])
def test_nothing_is_marked_without_a_memory_or_a_warmup(page, one, warmup):
    assert "memory on" not in page([replace(one, figures={})], warmup=warmup).text


def test_a_run_of_one_reading(page):
    one = replace(PAIR[1], recall_steps=[0], recall=[0.5], figures_steps=[0], figures={"batch_loss": [1.0]})
    assert "Loss terms" in page([one]).text


def test_no_queries_no_retrievals(page):
    assert "What is retrieved" not in page(bare(*PAIR), queries=[]).text


def test_what_does_not_count_yet_is_a_gap():
    values = PAIR[1].figures["memory_loss"]
    (line,) = charts.readings(PAIR, "memory_loss")
    np.testing.assert_array_equal(line.values, np.where(STEPS < WARMUP, np.nan, values))
    assert values[0] == 0  # the run itself is unchanged


def test_gaps_stay_gaps_and_edges_are_not_pulled_to_zero():
    values = np.full(200, 3.0)
    values[50:60] = np.nan
    np.testing.assert_allclose(charts.smooth(values), values)
    noise = np.random.default_rng(0).normal(size=200)
    assert np.std(charts.smooth(noise)) < 0.7


def test_same_input_same_page(page, whole):
    assert page().source == whole.source


def test_matplotlib_settings_are_neither_heeded_nor_kept(page, whole):
    with matplotlib.rc_context({"font.size": 30, "xtick.labelsize": 30, "svg.hashsalt": "other"}):
        before = dict(matplotlib.rcParams)
        assert page().source == whole.source
        assert dict(matplotlib.rcParams) == before


def test_a_failing_template_leaves_what_was_there(tmp_path):
    class Unprintable:
        def __str__(self):
            raise RuntimeError("no words")

    path = tmp_path / "report.html"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="no words"):
        write(path, bare(*PAIR), settings={"x": Unprintable()})
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failing_disk_leaves_what_was_there(tmp_path, monkeypatch, failing):
    path = tmp_path / "report.html"
    path.write_text("old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(files.os, failing, fail)
    with pytest.raises(OSError, match="disk full"):
        write(path, bare(*PAIR))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        write(tmp_path / "missing" / "report.html", bare(*PAIR))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("count", [0, 5])
def test_too_few_or_too_many_runs(tmp_path, count):
    with pytest.raises(ValueError, match=f"1 to 4 runs, got {count}"):
        write(tmp_path / "report.html", PAIR[:1] * count)


def test_neighbours_of_other_images(tmp_path):
    with pytest.raises(ValueError, match=re.escape("(40, 28, 28), (40,) and, for 'with memory', (39, 10)")):
        write(tmp_path / "report.html", [replace(PAIR[1], neighbours=PAIR[1].neighbours[1:])])


def photographs(height, width):
    """Return 40 pictures, each with its own colour in the middle and a grey border."""
    pictures = np.full((40, height, width, 3), 128, np.uint8)
    pictures[:, 2:-2, 2:-2] = np.random.default_rng(1).integers(256, size=(40, 1, 1, 3))
    return pictures


def shown(page):
    """Return the sprite sheet as RGBA, and the positions (column, row) of the images shown, in order."""
    (uri,) = re.findall(r"data:image/\w+;base64,([\w+/=]+)", page.source)
    sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri))).convert("RGBA")).astype(int)
    styles = [given["style"] for _, given in page.elements if given.get("class") == "glyph"]
    return sheet, [tuple(map(int, re.fullmatch(r"--x: (\d+); --y: (\d+)", style).groups())) for style in styles]


@pytest.mark.parametrize(
    ("height", "width", "side", "thumbnail"),
    [(100, 200, 64, (32, 64)), (300, 150, 64, (64, 32)), (40, 30, 40, (40, 30)), (12, 9, 12, (12, 9))],
)
def test_photographs_are_shown_as_thumbnails_in_their_places(page, height, width, side, thumbnail):
    images = photographs(height, width)
    parsed = page(bare(*PAIR), images=images)
    sheet, places = shown(parsed)
    expected = [i for query in QUERIES for i in (query, *(j for one in PAIR for j in one.neighbours[query]))]
    assert sheet.shape[1] == report.SPRITES * side
    for (x, y), i in zip(places, expected, strict=True):
        square = sheet[y * side : (y + 1) * side, x * side : (x + 1) * side]
        assert (square[..., 3] > 0).sum() == np.prod(thumbnail)
        middle = square[side // 2, side // 2]
        np.testing.assert_allclose(middle, [*images[i, height // 2, width // 2], 255], atol=0 if side == 12 else 12)
    assert "invert" not in parsed.source
    assert "pixelated" not in parsed.source


def test_large_photographs_make_no_large_page(page):
    images = np.random.default_rng(0).integers(256, size=(40, 200, 200, 3), dtype=np.uint8)  # noise compresses worst
    (uri,) = re.findall(r"data:image/\w+;base64,[\w+/=]+", page(bare(*PAIR), images=images, queries=range(40)).source)
    assert len(uri) < 40 * 64 * 64


def test_ink_is_turned_over_in_the_dark(whole):
    assert "invert" in whole.source
    assert "pixelated" in whole.source


def test_classes_have_names(page):
    names = ["cat", "dog", "<b>", "fox", "owl"]
    parsed = page(bare(*PAIR), names=names)
    assert parsed.labels("glyph")[0] == f"query of class {names[LABELS[QUERIES[0]]]}"
    assert "class <b>" in parsed.text


@pytest.mark.parametrize("watched", ["test", "validation"])
def test_recall_is_that_of_the_classes_watched(page, watched):
    one = replace(PAIR[1], figures={})
    assert f"Each line shows R@1 on the {watched} classes." in page([one], watched=watched).text


def test_a_single_run_is_introduced(page):
    text = page(bare(PAIR[1])).text
    assert "R@1 0.728 with a memory of 8,192 rows" in text
    assert "On 40 test images of 5 classes not seen in training." in text


def probed(one):
    values = {10: np.linspace(0.5, 0.01, 5), 100: [np.nan, np.nan, 1.5, 1.0, 0.3], 1000: [np.nan] * 5}
    return replace(one, recall=[], figures={}, probe_steps=[40, 80, 120, 160, 200], probe=values)


def test_the_slow_drift_is_drawn(page):
    text = page([probed(one) for one in PAIR]).text
    assert "Slow drift" in text
    for one in PAIR:
        for steps in (10, 100):
            assert f"{one.name}: {steps} steps apart" in text
    assert "1,000 steps apart" not in text  # never measured
    assert text.count("memory on") == 2  # the chart is drawn in two sizes
    assert not re.search("Slow drift", page(bare(*PAIR)).text)


def test_the_slow_drift_is_drawn_on_a_logarithmic_axis():
    (chart,) = dict(charts.groups([probed(PAIR[1])]))["probe"]
    (svg, _) = charts.drawings(chart, None)
    heights = {float(label): float(y) for y, label in re.findall(r' y="([\d.]+)"[^>]*>(0\.\d+)</text>', svg)}
    assert heights[0.01] - heights[0.03] == pytest.approx(heights[0.1] - heights[0.3], abs=0.1)


def test_each_distance_has_its_dashes():
    lines = charts.probed([probed(PAIR[1])])
    assert [(line.label, line.dash) for line in lines] == [
        ("with memory: 100 steps apart", "dashed"),
        ("with memory: 10 steps apart", "dotted"),
    ]
    np.testing.assert_array_equal(lines[0].values, [np.nan, np.nan, 1.5, 1.0, 0.3])
