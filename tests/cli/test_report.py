"""`recsys report` from end to end on runs that were just trained, and its page in a browser."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest
import yaml

from recsys_lightning.analysis.report_sources import EVENTS, USAGE
from recsys_lightning.cli import main
from recsys_lightning.cli import report as command
from recsys_lightning.errors import InputError

SECTIONS = (
    "headline",
    "curves",
    "codebooks",
    "balance",
    "cells",
    "popularity",
    "diversity",
    "cards",
    "users",
    "configuration",
)
LOCAL = ("file:", "data:", "blob:")
DRAWN = "[...document.querySelectorAll('.canvas')].every((canvas) => canvas.querySelector('svg.main-svg'))"
SMALL = ["--users", "20", "--examples", "2"]


def sparc_config(trained_once: Path, folder: Path) -> dict:
    config = yaml.safe_load((trained_once / "cobra.yaml").read_text())
    books = {"num_levels": 2, "num_codes": 4, "warmup_steps": 1}
    settings = {"dim": 16, "codebooks": books, "search": {"num_interests": 2, "merge": "mixture"}}
    config["model"]["init_args"]["model"] = {"class_path": "SPARC", "init_args": settings}
    config["run_dir"] = str(folder / "sparc")
    return config


@pytest.fixture(scope="session")
def tested(trained_once, tmp_path_factory) -> Path:
    """A folder with a tested COBRA and a tested SPARC, the latter with files of its codebooks."""
    folder = tmp_path_factory.mktemp("reported")
    shutil.copytree(trained_once / "cobra", folder / "cobra")
    (folder / "sparc.yaml").write_text(yaml.safe_dump(sparc_config(trained_once, folder), sort_keys=False))
    assert main(["fit", "-c", str(folder / "sparc.yaml")]) == 0
    for name in ("cobra", "sparc"):
        config = folder / name / "config.yaml"
        assert main(["test", "-c", str(config), "--run_dir", str(folder / name), "--ckpt_path", "best"]) == 0
    rows = [(at, at * 4 + 3, level, code, code + at) for at in range(3) for level in (1, 2) for code in range(4)]
    usage = pl.DataFrame(rows, schema=["epoch", "step", "level", "code", "items"], orient="row")
    usage.write_parquet(folder / "sparc" / USAGE)
    event = {
        "epoch": 1,
        "step": 5,
        "level": 1,
        "finding": "dead_codes",
        "action": "warn",
        "codes": [],
        "message": "few",
    }
    (folder / "sparc" / EVENTS).write_text(json.dumps(event) + "\n")
    return folder


@pytest.fixture(scope="session")
def report(tested) -> Path:
    """The report on both."""
    output = tested / "report.html"
    command.run(["report", str(tested / "cobra"), str(tested / "sparc"), *SMALL, "--output", str(output)])
    return output


def section(html: str, key: str) -> str:
    part = html[html.index(f'<section id="{key}"') :]
    return part[: part.index("</section>")]


# ------------------------------------------------------------------------------------------------------------ the file


def test_the_report_of_two_models_has_every_section(report):
    html = report.read_text()
    for key in SECTIONS:
        assert 'class="missing"' not in section(html, key), key
    assert str(report.parent) not in html, "no absolute paths"
    assert '"Use of level 2' in html or "Use of level 2" in html
    assert "dead_codes" in section(html, "codebooks")


def test_example_users_are_shown_with_the_lists_of_both_models_and_what_produced_each_item(report):
    users = section(report.read_text(), "users")
    assert users.count('<article class="user">') == 2
    assert users.count('<div class="list">') == 4
    plain = re.sub(r"<[^>]+>", " ", users)
    assert re.search(r"beam \d+ \(p 0\.\d+", plain)
    assert re.search(r"interest \d \(p 0\.\d+", plain)
    assert "Likeliest interests: " in plain
    links = set(re.findall(r'<a class="code" href="#([^"]+)"', users))
    assert links
    for link in links:
        assert f'<article class="card" id="{link}"' in report.read_text()


def test_a_seed_draws_the_same_example_users_for_any_runs_and_another_seed_others(tested, report, tmp_path):
    found = [re.findall(r'<span class="id">([^<]+)</span>', report.read_text())]
    for seed in (0, 1):
        output = tmp_path / "report.html"
        command.run(["report", str(tested / "sparc"), *SMALL, "--seed", str(seed), "--output", str(output)])
        found.append(re.findall(r'<span class="id">([^<]+)</span>', output.read_text()))
    assert found[0] == found[1] != found[2]


def test_without_the_model_the_report_reads_files_only(tested, tmp_path):
    shutil.copytree(tested / "sparc", tmp_path / "sparc")
    shutil.rmtree(tmp_path / "sparc" / "checkpoints")
    command.run(["report", str(tmp_path / "sparc"), "--without_model"])
    html = (tmp_path / "sparc" / "report.html").read_text()
    for key in ("cells", "popularity", "cards", "users"):
        assert "Left out by --without_model." in section(html, key)
    assert "as recorded in results.json" in section(html, "diversity")


def test_a_run_that_cannot_be_opened_is_named_in_the_report_and_on_the_terminal(tested, tmp_path, capsys):
    shutil.copytree(tested / "sparc", tmp_path / "sparc")
    shutil.rmtree(tmp_path / "sparc" / "checkpoints")
    command.run(["report", str(tmp_path / "sparc"), str(tested / "cobra"), *SMALL])
    assert "sparc could not be opened" in capsys.readouterr().err
    html = (tmp_path / "sparc" / "report.html").read_text()
    assert "could not be opened" in section(html, "users")
    assert '<div class="list">' in section(html, "users"), "of the other run"


def test_a_tokenizer_has_cells_and_cards_and_no_users(trained_once, tmp_path):
    output = tmp_path / "rqvae.html"
    command.run(["report", str(trained_once / "rqvae"), "--output", str(output)])
    html = output.read_text()
    assert "Semantic IDs (validation)" in section(html, "headline")
    assert 'class="canvas"' in section(html, "cells")
    assert '<article class="card"' in section(html, "cards")
    assert "No run recommends items." in section(html, "users")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--output", "report.pdf"], r"must be a file that ends in \.html"),
        (["--user", "3"], "no option '--user'; did you mean '--users'"),
        (["--users", "0"], "--users 0 must be at least 1"),
        (["--interval", "0"], "--interval 0: must be 1 or more"),
        (["--seed", "-1"], "--seed -1: must be 0 or more"),
    ],
)
def test_a_command_line_at_fault_is_refused_with_the_cure(tested, words, message):
    with pytest.raises(InputError, match=message):
        command.run(["report", str(tested / "sparc"), *words])


def test_a_run_named_twice_or_that_is_none_is_refused(tested, tmp_path):
    with pytest.raises(InputError, match="named twice"):
        command.run(["report", *[str(tested / "sparc")] * 2, "--without_model", "--output", str(tmp_path / "r.html")])
    with pytest.raises(InputError, match="no run folder"):
        command.run(["report", str(tmp_path / "nothing")])


# --------------------------------------------------------------------------------------------------------------- watch


@pytest.fixture
def under_way(tested, tmp_path) -> Path:
    """A copy of the SPARC run without what it leaves at its end, and its metrics cut within a line."""
    folder = tmp_path / "sparc"
    folder.mkdir()
    shutil.copy(tested / "sparc" / "config.yaml", folder)
    (folder / "metrics.csv").write_bytes((tested / "sparc" / "metrics.csv").read_bytes()[:-40])
    return folder


def test_watching_rewrites_the_report_until_the_run_has_its_results(tested, under_way, monkeypatch, capsys):
    output, seen = under_way / "report.html", []

    def sleep(seconds: float) -> None:
        seen.append((seconds, output.read_text()))
        if len(seen) == 2:
            shutil.copytree(tested / "sparc", under_way, dirs_exist_ok=True)
            os.utime(under_way / "results.json")

    monkeypatch.setattr(command.time, "sleep", sleep)
    command.run(["report", str(under_way), "--watch", "--interval", "3", *SMALL])
    assert [seconds for seconds, _ in seen] == [3, 3]
    for _, html in seen:
        assert 'http-equiv="refresh" content="3"' in html
        assert "is under way" in html
        assert "Training loss" in html
        assert "Computed once the training is over" in section(html, "users")
    last = output.read_text()
    assert 'http-equiv="refresh"' not in last
    assert '<article class="user">' in last
    assert "the training is over" in capsys.readouterr().out


def test_watching_a_run_that_is_over_writes_its_report_once(tested, tmp_path):
    output = tmp_path / "report.html"
    os.utime(tested / "sparc" / "results.json")
    command.run(["report", str(tested / "sparc"), "--watch", "--without_model", "--output", str(output)])
    assert 'http-equiv="refresh"' not in output.read_text()


def test_a_run_before_its_first_epoch_can_be_watched(under_way, monkeypatch):
    (under_way / "metrics.csv").unlink()

    def stop(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command.time, "sleep", stop)
    with pytest.raises(KeyboardInterrupt):
        command.run(["report", str(under_way), "--watch"])
    html = (under_way / "report.html").read_text()
    assert "first validation is still to come" in section(html, "headline")
    assert "nothing was logged" in section(html, "curves")


# ------------------------------------------------------------------------------------------------------------- browser


@pytest.fixture(scope="session")
def browser() -> Iterator:
    """Headless Chromium; the test is skipped where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs pip install playwright")
    found = next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
    )
    if found is None:
        pytest.skip("no Chromium: install one, e.g. apt-get install chromium")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def look(browser, report):
    """Opens the report offline in a window of such a width and theme; nothing may go wrong until it is closed."""
    contexts, wrong = [], []

    def open_page(width: int = 1280, theme: str = "light"):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=theme, offline=True)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("requestfailed", lambda request: wrong.append(request.url))
        page.on(
            "request",
            lambda request: None if request.url.startswith(("file:", "data:", "blob:")) else wrong.append(request.url),
        )
        page.goto(report.as_uri())
        for canvas in page.query_selector_all(".canvas"):
            canvas.scroll_into_view_if_needed()
        page.wait_for_function(
            "[...document.querySelectorAll('.canvas')].every((c) => c.querySelector('svg.main-svg'))"
        )
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not wrong


def brightness(page, element: str, what: str) -> float:
    """From 0, black, to 1, white."""
    colour = page.evaluate(f"getComputedStyle(document.querySelector('{element}'))['{what}']")
    red, green, blue = (int(part) / 255 for part in re.findall(r"\d+", colour)[:3])
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_is_whole_and_readable_at_both_widths_and_themes(look, width, theme):
    page = look(width, theme)
    for key in SECTIONS:
        box = page.locator(f"#{key}").bounding_box()
        assert box is not None, key
        assert box["height"] > 60, key
        assert box["width"] > 0.7 * min(width, 1000), key
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "the page does not scroll sideways"
    plots = page.evaluate("[...document.querySelectorAll('.canvas svg.main-svg')].map((s) => s.clientWidth)")
    assert max(plots) <= width
    ground, ink = brightness(page, "body", "backgroundColor"), brightness(page, "body", "color")
    plot = brightness(page, ".canvas .xtick text", "fill")
    assert (ground > 0.9 and ink < 0.2 and plot < 0.2) if theme == "light" else (ground < 0.1 and min(ink, plot) > 0.8)
    assert page.evaluate("parseFloat(getComputedStyle(document.querySelector('td')).fontSize)") >= 12


def test_the_switch_changes_the_theme_of_text_and_plots_and_is_remembered(look):
    page = look(theme="light")
    line = "document.querySelector('#curves .canvas .js-line').style.stroke"
    before = page.evaluate(line)
    page.get_by_role("button", name="Dark").click()
    assert brightness(page, "body", "backgroundColor") < 0.1
    page.wait_for_function(f"{line} !== '{before}'")
    assert brightness(page, ".canvas .xtick text", "fill") > 0.8
    assert page.locator("[data-set-theme=dark]").get_attribute("aria-pressed") == "true"
    page.reload()
    assert brightness(page, "body", "backgroundColor") < 0.1
    page.get_by_role("button", name="Auto").click()
    assert brightness(page, "body", "backgroundColor") > 0.9


def test_the_search_shows_the_cards_that_hold_all_words(look):
    page = look()
    shelf = page.locator(".shelf").first
    shown = shelf.locator(".card:visible")
    every = shown.count()
    assert every > 1
    assert shelf.locator(".card[data-level='2']:visible").count() == 0, "level 1 at first"
    title = shown.first.locator(".titles li").first.inner_text()
    shelf.get_by_role("searchbox").fill(title.upper())
    assert 1 <= shown.count() < every
    assert all(title in text for text in shown.all_inner_texts())
    shelf.get_by_role("searchbox").fill("no such word")
    assert shown.count() == 0
    assert shelf.get_by_text("No code matches.").is_visible()
    shelf.get_by_role("searchbox").fill("")
    shelf.get_by_role("combobox").select_option("all")
    assert shown.count() > every
    assert shelf.locator(".count").inner_text() == f"{shown.count()} of {shelf.locator('.card').count()} codes"


def test_a_semantic_id_leads_to_the_card_of_its_first_code_even_if_it_is_filtered_away(look):
    page = look()
    page.locator(".shelf").first.get_by_role("searchbox").fill("no such word")
    link = page.locator("#users a.code").first
    link.click()
    assert page.locator(link.get_attribute("href")).is_visible()


def test_the_page_can_be_used_by_keyboard_and_printed(look):
    page = look()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.evaluate("document.querySelector('.scroll').focus()")
    assert page.evaluate("document.activeElement.className") == "scroll", "a wide table scrolls by keyboard"
    page.emulate_media(media="print")
    assert not page.locator(".switch").is_visible()
    assert not page.locator(".toc").is_visible()
    assert page.locator("#headline table").first.is_visible()
