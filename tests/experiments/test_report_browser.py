"""The report in a real headless browser: by mouse and by keyboard, wide and narrow, light, dark and on paper."""

import json
import shutil

import pytest

from experiments.report import __main__ as command
from experiments.report import page as report

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[dev]'")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome on this machine"),
]
LARGEST = 12_000_000
PATIENCE = 300_000  # milliseconds: other work may have the machine


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "index.html"
    assert command.main(["--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def lacking(tmp_path_factory):
    """A page of the same records without those of SynFlow."""
    folder = tmp_path_factory.mktemp("lacking")
    shutil.copytree(command.ROOT / "experiments/records", folder / "records")
    gone = [f for f in (folder / "records/rooms").glob("*.json") if json.loads(f.read_text())["method"] == "synflow"]
    assert gone
    for file in gone:
        file.unlink()
    out = folder / "index.html"
    assert command.main(["--records", str(folder / "records"), "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture()
def visit(browser, path):
    """Opens the page, and at the end finds that nothing was complained about and nothing asked for."""
    complaints, requests, contexts = [], [], []

    def start(where=path, **options):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        contexts.append(context)
        context.set_default_timeout(PATIENCE)
        page = context.new_page()
        page.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda r: requests.append(r.url) if not r.url.startswith(("data:", "blob:")) else None)
        page.goto(where.as_uri())
        page.wait_for_selector("html[data-ready=yes]")
        return page

    yield start
    for context in contexts:
        context.close()
    assert complaints == []
    assert all(r.startswith("file://") and r.endswith(".html") for r in requests), "nothing but the page is asked for"


def column(page, key, table="#results-table"):
    """The texts of a column, in the order of the rows."""
    return page.evaluate(
        """([table, key]) => {
            const head = [...document.querySelectorAll(table + " thead th")];
            const at = head.findIndex(th => th.dataset.key === key);
            return [...document.querySelectorAll(table + " tbody tr.row")].map(tr => tr.cells[at].textContent);
        }""",
        [table, key],
    )


def numbers(texts):
    return [float(t.split(" ")[0]) for t in texts if t not in ("missing", "-", "")]


def traces(page, plot):
    return page.evaluate(f"document.getElementById('{plot}').data.map(t => ({{name: t.name, n: (t.x ?? []).length}}))")


def test_it_loads_with_all_its_parts_and_is_no_giant(visit, path):
    page = visit()
    assert path.stat().st_size < LARGEST
    assert page.locator("h1").count() == 1 and page.locator("#results-table tbody tr.row").count() > 10
    for plot in ("plot", "recovery", "layers", "overlap", "latency"):
        assert page.locator(f"#{plot} .main-svg").count() > 0, plot
    assert page.locator(".room").count() == 6
    assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")


def test_sorting_goes_both_ways_and_says_so(visit):
    page = visit()
    head = page.locator("#results-table th[data-key=delta_m]")
    head.locator("button").click()
    rising = numbers(column(page, "delta_m"))
    assert rising == sorted(rising) and head.get_attribute("aria-sort") == "ascending"
    head.locator("button").click()
    falling = numbers(column(page, "delta_m"))
    assert falling == sorted(rising, reverse=True) and head.get_attribute("aria-sort") == "descending"
    page.locator("#results-table th[data-key=method] button").click()
    names = column(page, "method")
    assert names == sorted(names) and head.get_attribute("aria-sort") is None
    assert page.locator("#results-table th[aria-sort]").count() == 1


def test_filters_leave_what_they_should_in_table_and_plot(visit):
    page = visit()
    every = page.locator("#results-table tr.row").count()
    page.select_option("#sparsity", "90 %")
    assert set(numbers(column(page, "sparsity"))) == {90.0}
    page.fill("#text", "cut-PLUS")
    assert column(page, "method") == ["cut-plus"] and "1 of" in page.text_content("#count")
    assert {t["name"] for t in traces(page, "plot") if t["n"]} == {"cut-plus"}
    page.fill("#text", "no such method")
    assert page.locator("#results-table tr.row").count() == 0
    assert "No row matches" in page.text_content("#results-table")
    page.click("#reset")
    assert page.locator("#results-table tr.row").count() == every and page.input_value("#text") == ""
    page.select_option("#method", "cut")
    assert set(column(page, "method")) == {"cut"}


def test_what_is_missing_is_last_whichever_way_and_can_be_hidden(visit, lacking):
    page = visit(lacking)
    head = page.locator("#results-table th[data-key=delta_m] button")
    for _ in range(2):
        head.click()
        shown = column(page, "delta_m")
        count = shown.count("missing")
        assert 0 < count < len(shown) and set(shown[-count:]) == {"missing"}
    page.click("#hide-missing")
    assert column(page, "delta_m") == shown[:-count]


def test_a_commit_or_a_record_is_found_by_the_search(visit):
    page = visit()
    row = page.evaluate("page.tables[0].rows.find(r => r.method === 'magnitude' && r.state !== 'missing')")
    page.fill("#text", row["runs"][0]["records"][0]["id"])
    assert column(page, "method") == ["magnitude"]


def test_a_row_opens_to_its_runs(visit):
    page = visit()
    button = page.locator("#results-table .expand").first
    assert button.get_attribute("aria-expanded") == "false"
    button.click()
    assert button.get_attribute("aria-expanded") == "true"
    shown = page.locator("tr.runs")
    runs = page.evaluate("page.tables[0].rows[0].runs")
    assert shown.locator(".run").count() == len(runs)
    text = shown.text_content()
    for run in runs:
        assert f"Seed {run['seed']}" in text and run["commands"][0] in text
        assert all(r["id"] in text and r["commit"] in text for r in run["records"])
    button.click()
    assert shown.count() == 0


def test_the_keyboard_is_enough(visit):
    page = visit()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.focus("#results-table th[data-key=delta_m] button")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.closest('th').getAttribute('aria-sort')") == "ascending"
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid", "the focus is seen"
    page.locator("#results-table .expand").first.focus()
    page.keyboard.press("Enter")
    assert page.locator("tr.runs").count() == 1
    page.keyboard.press("Escape")
    assert page.locator("tr.runs").count() == 0
    first = page.evaluate("document.activeElement.textContent")
    page.keyboard.press("ArrowDown")
    assert page.evaluate("document.activeElement.className") == "expand"
    page.keyboard.press("ArrowUp")
    assert page.evaluate("document.activeElement.textContent") == first
    page.fill("#text", "cut")
    page.keyboard.press("Escape")
    assert page.input_value("#text") == ""
    page.focus("#axes input:checked")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.value === state.axis.key && state.axis.key !== 'stays'")


def test_every_axis_and_every_table_can_be_drawn(visit):
    page = visit()
    for table in page.evaluate("page.tables.map(t => t.id)"):
        page.select_option("#table", table)
        assert page.locator("#results-table tr.row").count() == page.evaluate("state.table.rows.length")
        for value in page.evaluate("[...document.querySelectorAll('#axes input')].map(i => i.value)"):
            page.locator(f"#axes input[value={value}]").check(force=True)
            assert sum(t["n"] for t in traces(page, "plot")) > 0 or page.evaluate("state.table.bottom === null")


def test_hovering_shows_the_run(visit):
    page = visit()
    page.fill("#text", "cut-plus")
    spot = page.locator("#plot .scatterlayer .point").last
    spot.scroll_into_view_if_needed()
    spot.hover(force=True)
    page.wait_for_selector("#plot .hovertext")
    assert "cut-plus" in page.text_content("#plot .hoverlayer")


def test_the_gallery_switches_between_dense_and_compact(visit):
    page = visit()
    buttons = page.locator(".toggles button")
    names = buttons.all_text_contents()
    assert "dense" in names and "cut" in names
    for name in ("dense", "cut"):
        page.locator(f".toggles button[data-who={name}]").click()
        assert page.locator(".toggles button[aria-pressed=true]").all_text_contents() == [name]
        shown = page.locator(".room figure[data-who]:visible")
        assert shown.count() == 6 * 3 and {f.get_attribute("data-who") for f in shown.all()} == {name}
    page.keyboard.press("ArrowRight")
    pressed = page.locator(".toggles button[aria-pressed=true]").all_text_contents()
    assert pressed == [names[(names.index("cut") + 1) % len(names)]]


def background(page):
    return page.evaluate("getComputedStyle(document.body).backgroundColor")


def ink(page):
    return page.evaluate("document.getElementById('plot').layout.font.color")


def test_dark_by_system_and_by_button_and_plots_follow(visit):
    page = visit()
    button = page.locator("#theme")
    light, before = background(page), ink(page)
    assert button.get_attribute("aria-pressed") == "false"
    button.click()
    assert button.get_attribute("aria-pressed") == "true" and background(page) != light and ink(page) != before
    page.reload()
    page.wait_for_selector("html[data-ready=yes]")
    assert background(page) != light, "the choice is remembered"
    system = visit(color_scheme="dark")
    assert system.locator("#theme").get_attribute("aria-pressed") == "true"
    assert background(system) == background(page) and ink(system) == ink(page)
    system.click("#theme")
    assert background(system) == light and ink(system) == before


@pytest.mark.parametrize("width", [360, 768])
def test_a_narrow_screen_scrolls_only_inside_tables(visit, width):
    page = visit(viewport={"width": width, "height": 740}, has_touch=True, is_mobile=True)
    for table in page.evaluate("page.tables.map(t => t.id)"):
        page.select_option("#table", table)
        page.locator("#results-table .expand").first.click()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), table
        box = page.locator("#results-table").locator("xpath=..")
        assert box.evaluate("e => e.scrollWidth >= e.clientWidth && e.clientWidth <= innerWidth")
        inside = page.locator(".inside").first.bounding_box()
        assert inside["x"] >= 0 and inside["x"] + inside["width"] <= width


def test_paper_has_everything_but_controls(visit):
    page = visit(color_scheme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.locator(".control:visible").count() == 0 and page.locator("nav:visible").count() == 0
    for part in ("results", "plots", "inside", "pictures", "cost", "how"):
        assert page.locator(f"#{part}").is_visible()
    assert background(page) in ("rgb(255, 255, 255)", "rgba(0, 0, 0, 0)")
    assert page.locator(".room figure:visible").count() == page.locator(".room figure").count()
    assert page.evaluate("isDark()") is False
    assert len(page.pdf(prefer_css_page_size=True)) > 50_000


def test_text_has_enough_contrast_in_both_themes(visit):
    page = visit()
    script = """() => {
        const rgb = name => {
            const canvas = document.createElement("canvas").getContext("2d");
            canvas.fillStyle = colour(name);
            canvas.fillRect(0, 0, 1, 1);
            return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map(v => v / 255);
        };
        const light = name => {
            const [r, g, b] = rgb(name).map(v => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        const contrast = (a, b) => (Math.max(light(a), light(b)) + 0.05) / (Math.min(light(a), light(b)) + 0.05);
        const texts = ["ink", "soft", "accent", "good", "bad"];
        return texts.flatMap(t => ["bg", "card", "mine", "open"].map(b => [t, b, contrast(t, b)]));
    }"""
    for _ in range(2):
        assert [x for x in page.evaluate(script) if x[2] < 4.5] == []
        page.click("#theme")


def test_the_demos_page_works_too(visit, tmp_path):
    dense, pruned = command.records(command.ROOT / "experiments/records/demo")
    where = report.write(tmp_path / "report.html", report.one_comparison(dense, pruned))
    page = visit(where)
    assert column(page, "method")[:2] == ["dense, all heads", "dense, kept heads"]
    assert not page.is_visible("#table") and page.locator("#latency .main-svg").count() > 0
