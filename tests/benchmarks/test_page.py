from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from exitkit.benchmarks.report.figures import COLOURS
from exitkit.benchmarks.report.page import (
    BOTTOM,
    HEIGHT,
    TOP,
    Cell,
    Chart,
    Facts,
    Interval,
    Intervals,
    Point,
    Row,
    Section,
    Series,
    Table,
    html_page,
)

EVIL = "<script>alert(1)</script>"
VOID = {"meta", "link", "path", "circle"}  # what the page leaves open or closes with "/>"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page(HTMLParser):
    """The elements of a page as (tag, attributes, text); raises where tags do not match."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        element = (tag, dict(attrs), [])
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for _, _, text in self.open:
            text.append(data)

    def all(self, tag, **wanted):
        wanted = {name.rstrip("_").replace("_", "-"): value for name, value in wanted.items()}
        return [
            (attrs, "".join(text))
            for found, attrs, text in self.elements
            if found == tag and all(attrs.get(name) == value for name, value in wanted.items())
        ]


def line(name, place=0, points=((1.0, 50.0), (2.0, 60.0), (4.0, 80.0)), **settings):
    made = [Point(x, y, y - 1, y + 1, [("method", name), ("cost", f"{x:g} M")]) for x, y in points]
    return Series(name, made, place, **settings)


def chart(*series, y_label="accuracy (%)"):
    return Chart("a & b", "multiply-adds (M)", y_label, list(series), "A <caption>.")


def page(*blocks):
    return html_page("A title", ["What this is."], [Section("First", list(blocks))])


ROWS = [("ge", "9.5 ± 1", 9.5), ("joint", "10.1", 10.1), ("kd", "–", None), ("isc", "-2", -2.0), ("l2w", "–", math.nan)]
TABLE = Table(
    "A table", ["method", "accuracy"], [[Cell(name), Cell(text, key, key == 10.1)] for name, text, key in ROWS]
)


def test_the_tags_of_the_page_match_and_its_parts_are_there():
    made = Page(page(chart(line("ge")), TABLE, chart(line("ge"))))
    assert made.all("html", lang="en") and made.all("meta", name="viewport")
    assert [text for _, text in made.all("title")] == ["A title"]
    targets = {attrs["id"] for _, attrs, _ in made.elements if "id" in attrs}
    links = [attrs["href"] for attrs, _ in made.all("a")]
    assert links == ["#main", "#section-1"] and {link[1:] for link in links} <= targets
    captions = [text for _, text in made.all("strong")]
    assert captions == ["Figure 1. a & b", "Table 1. A table", "10.1", "Figure 2. a & b"]


def test_no_id_stands_for_two_elements():
    elements = Page(page(TABLE, chart(line("ge")), TABLE, chart(line("ge")))).elements
    found = [attrs["id"] for _, attrs, _ in elements if "id" in attrs]
    assert len(found) == len(set(found))


def test_what_a_user_wrote_is_shown_and_never_run():
    evil = [Series(EVIL, [Point(1, 2, None, None, [(EVIL, 'it\'s "so" </script>')])], 0)]
    blocks = [Chart(EVIL, EVIL, EVIL, evil, EVIL), Table(EVIL, [EVIL], [[Cell(EVIL, EVIL)]], EVIL)]
    html = html_page(EVIL, [EVIL], [Section(EVIL, blocks)])
    made = Page(html)
    assert html.count("<script") == 1 and "alert" not in made.all("script")[0][1]
    assert not any(name.startswith("on") for _, attrs, _ in made.elements for name in attrs)
    for tag in ("title", "h1", "h2", "a", "th", "button", "text"):
        assert any(EVIL in text for _, text in made.all(tag)), tag
    assert [json.loads(attrs["data-facts"]) for attrs, _ in made.all("path") if "data-facts" in attrs] == [
        [[EVIL, 'it\'s "so" </script>']]
    ]


def test_the_same_input_gives_the_same_bytes():
    blocks = [chart(*(line(f"method {n}", n) for n in range(9))), TABLE]
    assert page(*blocks).encode() == page(*blocks).encode()


def test_the_page_loads_nothing_from_elsewhere():
    html = page(chart(line("ge")), TABLE)
    assert not re.search(r"https?:|//\w|@import|url\(", html.replace("http://www.w3.org/2000/svg", ""))
    assert {attrs.get("src", attrs.get("href")) for _, attrs, _ in Page(html).elements} <= {
        None, "data:,", "#main", "#section-1",
    }  # fmt: skip
    assert "default-src 'none'" in html


def places(made, kind="mark"):
    found = [attrs for attrs, _ in made.all("path") if attrs.get("class", "").startswith(kind) and "transform" in attrs]
    return [tuple(map(float, re.findall(r"[\d.]+", at["transform"]))) for at in found if "data-facts" in at]


def scale(made, axis):
    """What a place on an axis stands for, from its first and last ticks."""
    ticks = made.all("g", class_=f"{axis}-tick")
    at = [float(attrs["transform"][10:-1].split()["xy".index(axis)]) for attrs, _ in ticks]
    value = [float(text.strip().replace("−", "-").replace(",", "")) for _, text in ticks]
    assert len(value) >= 2 and value == sorted(value)
    return lambda place: value[0] + (place - at[0]) / (at[-1] - at[0]) * (value[-1] - value[0])


@pytest.mark.parametrize("size", [1e-5, 0.01, 1, 300, 1e5, 1e9])
@pytest.mark.parametrize("start", [-3.3, 0, 7])
def test_points_are_drawn_where_the_data_say(size, start):
    points = [(size * (start + 0.37 * n), size * (2 + math.sin(n))) for n in range(9)]
    made = Page(page(chart(line("ge", points=points), y_label="gain")))
    x, y = scale(made, "x"), scale(made, "y")
    found = [(x(at), y(up)) for at, up in places(made)]
    for (want_x, want_y), (has_x, has_y) in zip(points, found, strict=True):
        assert abs(want_x - has_x) < 0.02 * size and abs(want_y - has_y) < 0.02 * max(size, 1)


def test_a_band_is_drawn_between_its_ends_and_breaks_off_where_there_is_none():
    ends = [(1, 3), (2, 4), (None, None), (math.nan, 5), (4, 6)]
    points = [Point(n, n + 2.0, *end, [("n", str(n))]) for n, end in enumerate(ends)]
    made = Page(page(chart(Series("ge", points, 0), y_label="gain")))
    y = scale(made, "y")
    (band,), (bar,) = made.all("path", class_="band"), made.all("path", class_="bars")
    corners = re.findall(r"[ML]([\d.]+) ([\d.]+)", band[0]["d"])
    assert [round(y(float(up)), 1) for _, up in corners] == [3, 4, 2, 1]
    assert [round(y(float(up)), 1) for up in re.fullmatch(r"M\S+ (\S+)V(\S+)", bar[0]["d"]).groups()] == [4, 6]


def test_an_accuracy_axis_ends_at_a_hundred():
    made = Page(page(chart(line("ge", points=[(1, 98.0), (2, 99.9)]))))
    assert scale(made, "y")(TOP) == pytest.approx(100)  # the top of the frame
    assert min(up for _, up in places(made)) > TOP


def test_a_chart_without_a_finite_point_says_so():
    for series in ([], [line("ge", points=[])], [line("ge", points=[(math.nan, 1.0)])]):
        assert ">no points</text>" in page(chart(*series))


def test_a_method_looks_as_in_the_figures_and_black_is_the_colour_of_the_text():
    made = Page(page(chart(*(line(f"m{n}", n) for n in range(8)), line("single", 1, joined=False))))
    groups = [attrs["color"] for attrs, _ in made.all("g", class_="series")]
    wanted = [colour.replace("#000000", "currentColor") for colour in COLOURS]
    assert groups == [*wanted, wanted[0], wanted[1]]
    lines = [attrs["stroke-dasharray"] for attrs, _ in made.all("path", class_="line") if attrs["d"] != "M1 7H33"]
    assert lines[:2] == ["none", "9 2.7"] and len(lines) == 8  # matplotlib's (5, 1.5), times the width of the line
    shapes = [attrs["d"] for attrs, _ in made.all("path") if "data-facts" in attrs]
    assert len(set(shapes)) == 8 and "C" in shapes[0] and shapes[3] == "M-4.25 4.25L4.25 4.25L4.25 -4.25L-4.25 -4.25Z"


def test_a_crowded_line_shows_some_markers_and_knows_all_its_points():
    made = Page(page(chart(line("ge", 1, [(float(n), 50.0 + n) for n in range(39)]))))
    shown = [
        n for n, attrs in enumerate(a for a, _ in made.all("path") if "data-facts" in a) if attrs["class"] == "mark"
    ]
    assert shown == [2, 8, 14, 20, 26, 32, 38] and len(places(made)) == 39


def intervals(*rows, label="difference (points)", **settings):
    made = [
        Interval(name, *ends, filled, [("method", name), ("difference", str(ends[0]))]) for name, ends, filled in rows
    ]
    return Intervals("Differences", label, made, **settings)


@pytest.mark.parametrize("size", [1e-3, 1, 40])
def test_intervals_are_drawn_where_the_data_say_and_filled_if_significant(size):
    values = {
        "ge": (0.5, -0.25, 1.25),
        "imta first=joint second=isc": (-2.0, -3.0, -1.0),
        "kd": (1.0, math.nan, math.nan),
    }
    rows = [(name, [size * value for value in ends], name != "ge") for name, ends in values.items()]
    made = Page(page(intervals(*rows)))
    x = scale(made, "x")
    assert [x(at) for at, *_ in places(made)] == pytest.approx(
        [size * ends[0] for ends in values.values()], abs=0.02 * size
    )
    heights = [up for _, up, *_ in places(made)]
    assert heights == sorted(heights) and len(set(heights)) == 3
    bars = [re.fullmatch(r"M(\S+) (\S+)H(\S+)", attrs["d"]).groups() for attrs, _ in made.all("path", class_="bars")]
    ends = [[x(float(low)), x(float(high))] for low, _, high in bars]
    assert ends == [
        pytest.approx([size * end for end in values[name][1:]], abs=0.02 * size) for name in list(values)[:2]
    ]
    assert [float(up) for _, up, _ in bars] == heights[:2]
    classes = [attrs["class"] for attrs, _ in made.all("path") if "data-facts" in attrs]
    assert classes == ["mark hollow", "mark", "mark"]
    texts = [text for _, text in made.all("text", class_="label")]
    assert {"ge", "imta first=joint", "second=isc", "kd", "difference (points)"} == set(texts)


def test_charts_of_intervals_share_an_axis_and_break_long_labels():
    one, both = (
        intervals(("ge", (1.0, 0.5, 1.5), True), x_values=[-4.0, math.nan]),
        intervals(("kd", (-4.0, -4, 1.5), True)),
    )
    first, second = Page(page(one)), Page(page(both))
    assert scale(first, "x")(500) == pytest.approx(scale(second, "x")(500))
    long = Page(page(intervals(("ge", (1.0, 0.5, 1.5), True), label="difference to " + "a method of a long name " * 4)))
    labels = [attrs for attrs, text in long.all("text", class_="label") if "difference" in text or "name" in text]
    (plot,) = [attrs for attrs, _ in long.all("svg", class_="plot")]
    assert len(labels) > 1 and max(float(attrs["y"]) for attrs in labels) < float(plot["viewbox"].split()[3])


def test_a_series_far_below_the_others_is_cut_off_and_named_in_the_caption():
    near = [line(f"m{n}", n, [(float(x), 88 + 0.1 * n + x) for x in range(3)]) for n in range(5)]
    far = line("cgt", 5, [(0.0, 88.0), (1.0, 43.5), (2.0, 60.0)])
    text = page(chart(*near, far))
    made = Page(text)
    y = scale(made, "y")
    assert "Cut off at the bottom: cgt (down to 43.5)." in text
    (clip,) = made.all("clippath")
    groups = [attrs for attrs, _ in made.all("g", class_="series")]
    assert all(attrs["clip-path"] == f"url(#{clip[0]['id']})" for attrs in groups)
    base = HEIGHT - BOTTOM
    assert all(TOP < up <= base for _, up in places(made))  # every point has its tooltip in the chart
    assert 86 < y(base) < 88 < 90 < y(TOP)
    (path,) = [attrs["d"] for attrs, _ in made.all("path", class_="line") if attrs["d"].count("L") == 2][-1:]
    assert float(path.split("L")[1].split()[1]) > 2 * base  # the line itself goes on below
    plain = page(chart(*near))
    assert "Cut off" not in plain and "clip-path=" not in plain


def test_the_caption_says_that_bands_are_shown_on_selection():
    lines = [Series(f"m{n}", [Point(x, 50.0 + n + x, 49.0, 51.0, [("n", "1")]) for x in range(3)], n) for n in range(9)]
    assert "Select a series above the chart to see its band." in page(chart(*lines))
    assert "Select a series" not in page(chart(*lines[:8]))


def test_an_interval_far_from_the_others_is_a_triangle_at_the_edge_with_its_value():
    near = [(f"m{n}", (0.1 * n, 0.1 * n - 0.3, 0.1 * n + 0.3), False) for n in range(6)]
    made = Page(page(intervals(*near, ("cgt", (-28.4, -31.0, -25.8), True), ("up", (9.0, 2.0, 16.0), False))))
    x = scale(made, "x")
    assert -0.4 < x(places(made)[-2][0]) < -0.3 and 0.8 < x(places(made)[-1][0]) < 0.9
    assert [text for _, text in made.all("text", class_="edge")] == ["−28.4", "9.0"]
    shapes = [attrs["d"] for attrs, _ in made.all("path") if "data-facts" in attrs]
    assert len(set(shapes)) == 3
    shared = Page(page(intervals(*near, ("cgt", (-28.4, -31.0, -25.8), True), x_values=[-31.0])))
    assert not list(shared.all("text", class_="edge"))


def test_a_high_series_alone_cuts_off_nothing():
    near = [line(f"m{n}", n, [(0.0, 88 + 0.1 * n), (1.0, 91.0)]) for n in range(4)]
    text = page(chart(*near, line("slow", 5, [(0.0, 87.0), (1.0, 91.0)]), line("good", 6, [(0.0, 88.0), (1.0, 99.0)])))
    assert "Cut off" not in text


def test_a_wide_interval_around_a_near_value_is_drawn_whole():
    near = [(f"m{n}", (0.1 * n, 0.1 * n - 0.3, 0.1 * n + 0.3), False) for n in range(6)]
    made = Page(page(intervals(*near, ("wide", (0.1, -12.0, 12.2), False))))
    x = scale(made, "x")
    bars = [re.fullmatch(r"M(\S+) (\S+)H(\S+)", attrs["d"]).groups() for attrs, _ in made.all("path", class_="bars")]
    assert [x(float(bars[-1][0])), x(float(bars[-1][2]))] == pytest.approx([-12, 12.2], abs=0.1)


def test_bands_of_many_series_are_shown_for_the_selected_one():
    few, many = (Page(page(chart(*(line(f"m{n}", n) for n in range(count))))) for count in (8, 9))
    assert [[attrs["class"] for attrs, _ in made.all("svg", role="img")] for made in (few, many)] == [
        ["plot"],
        ["plot many"],
    ]


def test_every_series_has_a_button_that_is_pressed():
    made = Page(page(chart(line("ge"), line("kd", 1))))
    assert [text for _, text in made.all("button", aria_pressed="true")] == ["ge", "kd"]


def test_cells_carry_what_a_click_sorts_by():
    table = Table(
        "A",
        ["m", "n"],
        [[Cell("b", "a"), Cell("∞", math.inf)], [Cell("c"), Cell("1e-7", 1e-7)], [Cell("d"), Cell(" ")]],
    )
    made = Page(page(table))
    names, numbers = made.all("th", scope="row"), made.all("td")
    assert [attrs["data-text"] for attrs, _ in names] == ["a", "c", "d"]
    assert [attrs.get("data-number") for attrs, _ in numbers] == ["Infinity", "1e-07", None]
    assert "data-missing" in numbers[2][0] and all(attrs["class"] == "number" for attrs, _ in numbers)
    assert [attrs["aria-sort"] for attrs, _ in made.all("th", scope="col")] == ["none", "none"]


@pytest.fixture(scope="module")
def browse(tmp_path_factory):
    """Open a page with a script at its end, and return the page as it then is; the script writes into `saw`."""
    if BROWSER is None:
        pytest.skip("no Chromium")

    def run(html, script):
        folder = tmp_path_factory.mktemp("browser")
        path = folder / "page.html"
        end = f"<script>const saw = document.body.dataset; {HELPERS} {script}</script></body>"
        path.write_text(html.replace("</body>", end), encoding="utf-8")
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000", "--dump-dom"]
        command = [BROWSER, *options, "--window-size=900,700", f"--user-data-dir={folder / 'profile'}", path.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        (body,) = Page(re.sub(r"<(br|input|hr)\b", r"<meta", done.stdout)).all("body")
        return {name.removeprefix("data-"): value for name, value in body[0].items()}

    return run


HELPERS = """
const $ = (what) => document.querySelector(what), tip = $("#tip"), plot = $(".plot"), ring = $(".ring");
const press = (key) => plot.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
const column = (n) => [...document.querySelectorAll("tbody tr")].map((row) => row.cells[n].textContent).join(" ");
const read = () => tip.hidden ? "" : [...tip.querySelectorAll("dd")].map((text) => text.textContent).join(" ");
const move = (x, y, kind = "pointermove") => plot.dispatchEvent(
  new PointerEvent(kind, { clientX: x, clientY: y, pointerType: "mouse", bubbles: true }));
const marks = (n) => [...document.querySelectorAll(".series")[n].querySelectorAll(".mark")];
const middle = (box) => [box.x + box.width / 2, box.y + box.height / 2];
const centre = (mark) => middle(mark.getBoundingClientRect());
"""


def test_a_head_sorts_up_then_down_and_what_is_missing_stays_last(browse):
    saw = browse(
        page(TABLE),
        """const heads = [...document.querySelectorAll("thead th")];
        const sorts = () => heads.map((head) => head.ariaSort).join();
        saw.before = column(0);
        heads[1].firstChild.click(); saw.up = column(0); saw.upsort = sorts();
        heads[1].firstChild.click(); saw.down = column(0); saw.downsort = sorts();
        heads[0].firstChild.click(); saw.names = column(0); saw.namesort = sorts();""",
    )
    assert saw["before"] == "ge joint kd isc l2w"
    assert (saw["up"], saw["upsort"]) == ("isc ge joint kd l2w", "none,ascending")
    assert (saw["down"], saw["downsort"]) == ("joint ge isc kd l2w", "none,descending")
    assert (saw["names"], saw["namesort"]) == ("ge isc joint kd l2w", "ascending,none")


def test_names_with_numbers_sort_as_people_count(browse):
    rows = [[Cell(text)] for text in ("exit 10", "–", "exit 2")]
    assert browse(page(Table("A", ["exit"], rows)), '$("thead button").click(); saw.up = column(0);')["up"] == (
        "exit 2 exit 10 –"
    )


def test_a_long_table_shows_the_rows_with_all_words_of_its_field(browse):
    rows = [[Cell(f"exit {n}"), Cell("heads" if n % 2 else "weights")] for n in range(1, 13)]
    script = """const field = $(".filter input");
    const shown = () => [...document.querySelectorAll("tbody tr")].filter((row) => !row.hidden).length;
    const type = (text) => { field.value = text; field.dispatchEvent(new Event("input")); };
    type("heads EXIT 1"); saw.some = column(0).length && shown(); saw.count = $(".filter output").textContent;
    type("nothing"); saw.none = shown();
    type(""); saw.all = shown(); saw.uncounted = $(".filter output").textContent;"""
    saw = browse(page(Table("A", ["exit", "changes"], rows)), script)
    assert (saw["some"], saw["count"]) == ("2", "2 of 12")  # exits 1 and 11
    assert (saw["none"], saw["all"], saw["uncounted"]) == ("0", "12", "")
    assert (
        browse(page(Table("A", ["exit", "changes"], rows[:8])), "saw.field = $('.filter') !== null")["field"] == "false"
    )


def test_arrow_keys_read_every_point_and_escape_hides(browse):
    series = [line("ge"), line("kd", 1, [(1.1, 40.0), (3.9, 70.0)]), line(EVIL, 2)]
    saw = browse(
        page(chart(*series)),
        """saw.stops = plot.parentNode.querySelectorAll("[tabindex]").length;
        const focus = (kind) => { plot[kind](); plot.dispatchEvent(new FocusEvent(kind)); }; // also in the background
        focus("focus"); saw.first = read(); saw.ring = ring.classList.contains("on"); saw.said = $("#said").textContent;
        press("ArrowRight"); saw.right = read();
        press("End"); press("ArrowRight"); saw.end = read();
        press("ArrowDown"); saw.below = read();
        press("ArrowDown"); press("Home"); saw.evil = read();
        press("Escape"); saw.hidden = read(); saw.noring = ring.classList.contains("on");
        press("ArrowLeft"); saw.again = read();
        press("ArrowUp"); saw.above = read();
        focus("blur"); saw.left = read();""",
    )
    assert saw["stops"] == "1"
    assert (saw["first"], saw["ring"], saw["said"]) == ("ge 1 M", "true", "method: ge, cost: 1 M")
    assert (saw["right"], saw["end"], saw["below"]) == ("ge 2 M", "ge 4 M", "kd 3.9 M")
    assert (saw["evil"], saw["hidden"], saw["noring"]) == (f"{EVIL} 1 M", "", "false")
    assert (saw["again"], saw["above"], saw["left"]) == (f"{EVIL} 1 M", "kd 1.1 M", "")


def test_arrow_keys_read_intervals_row_by_row(browse):
    rows = [(name, (at, at - 1, at + 1), True) for name, at in (("ge", 1.0), ("kd", -2.0), ("dfs", 0.5))]
    saw = browse(
        page(intervals(*rows)),
        """plot.focus(); plot.dispatchEvent(new FocusEvent("focus")); saw.first = read();
        press("ArrowDown"); saw.second = read(); press("ArrowDown"); press("ArrowDown"); saw.again = read();
        move(...centre(marks(2)[0])); saw.pointed = read(); saw.ring = ring.classList.contains("on");""",
    )
    assert (saw["first"], saw["second"], saw["again"]) == ("ge 1.0", "kd -2.0", "ge 1.0")
    assert (saw["pointed"], saw["ring"]) == ("dfs 0.5", "true")


def test_a_pointer_finds_the_nearest_point_and_the_tooltip_stays_in_the_window(browse):
    saw = browse(
        page(chart(line("a method of a long name " * 4), line("kd", 1, [(1.1, 40.0)]))),
        """let [x, y] = centre(marks(0)[1]);
        move(x + 12, y - 12); saw.near = read();
        move(x + 60, y - 60); saw.far = read();
        const inside = [], covered = [];
        const look = (mark) => {
            move(...centre(mark));
            const box = tip.getBoundingClientRect(), { clientWidth, clientHeight } = document.documentElement;
            inside.push(box.left >= 0 && box.top >= 0 && box.right <= clientWidth && box.bottom <= clientHeight);
            const [x, y] = centre(mark);
            return box.left < x && x < box.right && box.top < y && y < box.bottom;
        };
        for (const top of [0, 200, 400]) {
          window.scrollTo(0, top);
          for (const mark of [...marks(0), ...marks(1)]) covered.push(look(mark));
        }
        tip.style.width = tip.style.maxWidth = "860px"; // as wide as on a telephone, where no side has room for it
        marks(0).forEach(look);
        saw.inside = inside.length && inside.every(Boolean); saw.covered = covered.some(Boolean);
        move(0, 0, "pointerleave"); saw.gone = read();""",
    )
    assert "2 M" in saw["near"] and saw["far"] == "" == saw["gone"] and saw["inside"] == "true"
    assert saw["covered"] == "false"


def test_a_legend_button_takes_a_series_away_and_brings_it_back(browse):
    saw = browse(
        page(chart(*(line(f"m{n}", n, [(n + 1.0, 50.0 + n)]) for n in range(5)))),
        """const buttons = [...document.querySelectorAll("[aria-pressed]")];
        const every = document.querySelectorAll(".every");
        const seen = () => [...document.querySelectorAll(".series")].map(
          (group) => getComputedStyle(group).visibility === "visible" ? "1" : "0").join("");
        const pressed = () => buttons.map((button) => button.ariaPressed).join();
        plot.focus(); buttons[0].click(); saw.hidden = read(); saw.seen = seen(); saw.pressed = pressed();
        move(...centre(marks(0)[0])); saw.nothing = read();
        press("ArrowRight"); saw.next = read();
        every[1].click(); saw.none = seen(); press("ArrowDown"); saw.silent = read();
        every[0].click(); saw.all = seen();""",
    )
    assert (saw["hidden"], saw["seen"], saw["pressed"]) == ("", "01111", "false,true,true,true,true")
    assert (saw["nothing"], saw["next"]) == ("", "m1 2 M")
    assert (saw["none"], saw["silent"], saw["all"]) == ("00000", "", "11111")


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_cut_off_on_a_phone_or_a_small_screen(browse, width):
    """Tables scroll inside of themselves, and charts scale, with text that can be read."""
    budgets = [f"budget\n{n}00.5 K" for n in range(9)]
    rows = [[Cell("a method with a name")] + [Cell(f"{90 + n}.25 ± 0.55") for n in range(9)]]
    lines = [line(f"method {n}", n) for n in range(3)]
    bound = Series("bound", [Point(x, 90.0, None, None, [("bound", "90")]) for x in (1.0, 4.0)], 0, dotted=True)
    gains = intervals(*((f"a method with a name {n}", (n, n - 1.0, n + 1.0), True) for n in range(4)))
    facts = Facts([[Cell("command"), Cell("exitkit compare " + "--methods " + "ge," * 80)]])
    html = page(
        Table("Budgets", ["method", *budgets], rows),
        chart(*lines, bound),
        Row([chart(*lines)] * 4),
        Row([gains] * 3),
        facts,
    )
    frame = (
        f"<!DOCTYPE html><html><body><iframe id=frame style='border:0;width:{width}px;height:900px'></iframe></body>"
    )
    source = json.dumps(html).replace("</", r"<\/")
    saw = browse(
        frame + "</html>",
        f"""const frame = $("#frame");
        frame.onload = () => {{
          const root = frame.contentDocument, wide = root.documentElement.scrollWidth;
          const boxes = [...root.querySelectorAll("svg.plot, svg.plot text, .table, .legend, dl")].map(
            (e) => e.getBoundingClientRect());
          const scales = [...root.querySelectorAll("svg.plot")].map(
            (e) => parseFloat(getComputedStyle(e).fontSize) * e.getBoundingClientRect().width / 720);
          const table = root.querySelector(".table");
          saw.wide = wide; saw.right = Math.max(...boxes.map((box) => box.right));
          saw.left = Math.min(...boxes.map((box) => box.left)); saw.text = Math.min(...scales);
          saw.scrolls = table.scrollWidth > table.clientWidth;
        }};
        frame.srcdoc = {source};""",
    )
    assert float(saw["wide"]) <= width and float(saw["right"]) <= width and float(saw["left"]) >= 0
    assert float(saw["text"]) >= 9
    assert saw["scrolls"] == str(width == 390).lower()  # nine budgets fit a screen of 1280 pixels
