"""The report's headline, its settings, and the page that they stand on."""

import json
from collections import Counter
from html.parser import HTMLParser

import pytest

from recsys_lightning.analysis.codes_cards import CodeCard
from recsys_lightning.analysis.groups import Group, Run
from recsys_lightning.analysis.report import ReportSettings, build_report, shown_names
from recsys_lightning.analysis.report_blocks import (
    CardShelf,
    DataTable,
    ExampleUser,
    ListedItem,
    Paragraph,
    Plot,
    Section,
    Settings,
    UserList,
)
from recsys_lightning.analysis.report_figures import Line, line_figure
from recsys_lightning.analysis.report_headline import by_stage, chosen_cut_off, headline
from recsys_lightning.analysis.report_page import Heading, breakable, page
from recsys_lightning.analysis.report_settings import differences, environment, flattened
from recsys_lightning.analysis.report_sources import read_source
from recsys_lightning.errors import InputError


def quiet(what: str, done: int, total: int) -> None:
    pass


def group(name: str, tmp_path, **metrics: float) -> Group:
    results = {"metrics": metrics, "data": {"fingerprint": "0"}, "model": "M", "code": {}, "config": {}, "seed": 1}
    return Group(name, (Run(name, tmp_path, results),))


def tables(section: Section) -> dict[str, DataTable]:
    return {block.title: block for block in section.blocks if isinstance(block, DataTable)}


def test_a_run_is_shown_with_its_test_and_with_validation_where_it_was_not_tested(tmp_path):
    tested = group("a", tmp_path, **{"test/recall@10": 0.2, "val/recall@10": 0.3})
    validated = group("b", tmp_path, **{"val/recall@10": 0.1})
    nothing = group("c", tmp_path)
    found = {measured.stage: [g.name for g in measured.groups] for measured in by_stage([tested, validated, nothing])}
    assert found == {"test": ["a"], "val": ["b"]}
    shown = tables(headline([tested, validated, nothing], 10))
    assert shown["Ranking (test)"].body == [["a (M)", "all", "0.2000"]]
    assert shown["Ranking (validation)"].body == [["b (M)", "all", "0.1000"]]


def test_both_filter_columns_and_slices_stand_in_the_headline_and_the_best_of_each_is_marked(tmp_path):
    one = {"test/recall@10": 0.2, "test-unseen/recall@10": 0.3, "test/tail/recall@10": 0.1, "test/tail/users": 40.0}
    two = {"test/recall@10": 0.25, "test-unseen/recall@10": 0.28, "test/tail/recall@10": 0.05, "test/tail/users": 40.0}
    shown = tables(headline([group("one", tmp_path, **one), group("two", tmp_path, **two)], 10))
    ranking = shown["Ranking (test)"]
    assert ranking.head == ["run", "items", "recall@10"]
    assert [row[1:] for row in ranking.body] == [
        ["all", "0.2000"],
        ["unseen", "0.3000"],
        ["all", "0.2500"],
        ["unseen", "0.2800"],
    ]
    assert ranking.bold == {(2, 2), (1, 2)}
    slices = shown["Slices, recall@10 (test)"]
    assert slices.head == ["run", "items", "tail (n=40)"]
    assert slices.bold == {(0, 2)}


def test_seeds_are_one_row_and_runs_on_the_same_users_are_tested_against_the_first(runs):
    sources = [read_source(name) for name in runs]
    html = build_report(sources, ReportSettings(k=5), "left out", quiet)
    assert "good/seed* (GOOD, 2 seeds)" in html.replace("<wbr>", "")
    assert "Difference from good/seed*, over the same users" in html.replace("<wbr>", "")
    assert "sections run by run are of the first of each" in html


def test_a_table_of_tokenizers_has_their_collisions_and_codes(tmp_path):
    figures = {"val/collision_rate": 0.5, "val/perplexity@1": 30.0, "val/perplexity@2": 20.0, "val/loss": 1.0}
    shown = tables(headline([group("rqvae", tmp_path, **figures)], None))
    assert shown["Semantic IDs (validation)"].head == [
        "run",
        "items",
        "collision rate",
        "loss",
        "perplexity@1",
        "perplexity@2",
    ]


def test_without_any_metrics_the_headline_says_so(tmp_path):
    section = headline([group("a", tmp_path)], None)
    assert not section.blocks
    assert "first validation" in section.missing


def test_the_cut_off_is_the_nearest_that_the_runs_have(tmp_path):
    one = [group("a", tmp_path, **{"test/recall@20": 0.1, "test/recall@50": 0.2, "test/tail/recall@5": 0.0})]
    assert chosen_cut_off(one, 10) == 5
    assert chosen_cut_off(one, 45) == 50
    assert chosen_cut_off([group("a", tmp_path)], 10) is None


def test_runs_are_named_by_two_folders_and_by_the_whole_path_where_these_are_not_unique(
    write_run, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    made = [write_run(tmp_path / name, [1, 0], [1, 0], at) for at, name in enumerate(("x/a/s", "y/a/s", "y/b/s"))]
    assert shown_names([read_source(folder) for folder in made]) == ["x/a/s", "y/a/s", "b/s"]


# ------------------------------------------------------------------------------------------------------------ settings


def test_settings_are_dotted_keys_without_places_and_classes_stand_under_their_key():
    config = {
        "run_dir": "/somewhere/runs/x",
        "model": {"class_path": "pkg.Module", "init_args": {"model": {"class_path": "pkg.SASRec"}, "lr": 0.1}},
        "data": {"raw_dir": "/home/me/raw/beauty", "ks": [5, 10], "none": None},
    }
    assert flattened(config) == {
        "model": "Module",
        "model.model": "SASRec",
        "model.lr": "0.1",
        "data.raw_dir": "raw/beauty",
        "data.ks": "[5, 10]",
        "data.none": "null",
    }


def test_only_settings_that_differ_are_listed_and_a_key_that_a_run_lacks_is_a_dash():
    assert differences([{"a": "1", "b": "2"}, {"a": "1", "b": "3", "c": "4"}]) == {"b": ["2", "3"], "c": ["-", "4"]}


def test_no_machine_path_stands_in_a_report(write_run, tmp_path):
    folder = write_run(tmp_path / "model" / "seed1", [1, 0, 3], [1, 0, 2], 1)
    results = json.loads((folder / "results.json").read_text())
    results["config"]["data"] = {"raw_dir": f"{tmp_path}/raw/beauty"}
    (folder / "results.json").write_text(json.dumps(results))
    html = build_report([read_source(folder)], ReportSettings(), "left out", quiet)
    assert "raw/beauty" in html
    assert str(tmp_path) not in html


def test_what_is_not_known_of_the_environment_is_a_dash(runs):
    source = read_source(next(iter(runs)))
    found = environment(source)
    assert found["seconds"] == "fit 1"
    assert found["data"] == "made up"
    assert found["text encoder"] == "-"
    assert found["epochs"] == "-"


# ---------------------------------------------------------------------------------------------------------------- page


EVIL = '</script><script>alert("x")</script><em>&'


class Tags(HTMLParser):
    """Counts the tags of a page and gathers its text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1

    def handle_data(self, data):
        self.text += data


def read(html: str) -> Tags:
    tags = Tags()
    tags.feed(html)
    return tags


def everything(text: str) -> str:
    """A page with such a text in every place where data can stand."""
    figure = line_figure([Line(text, [1, 2], [1, 2]), Line("two", [1, 2], [1, 2])], "step", "loss")
    card = CodeCard(1, (3,), 5, 0.1, 0.5, ((text, 0.5),), (text, text, text, text), (text,), (((4,), 0.5),))
    user = UserList(text, text, True, [ListedItem(1, text, text, text, True, True, "codes-1-3")], text)
    blocks = [
        Paragraph(text),
        DataTable(text, [text], [[text, text]]),
        Plot(text, figure, text),
        CardShelf("codes-1", text, [card], {1: 2}),
        ExampleUser(text, [text], 3, [text], [user]),
        Settings(text, text),
    ]
    return page(Heading(text, [text]), [Section("one", text, blocks, text), Section("none", "None", (), text)])


def test_everything_that_comes_from_data_is_escaped():
    evil, tame = read(everything(EVIL)), read(everything("tame"))
    tame.tags["wbr"] = evil.tags["wbr"]  # names may be broken at other places
    assert evil.tags == tame.tags, "data make no tags"
    of_plot = 2  # a name and what is shown at the pointer, which are escaped once more, for plotly
    assert evil.text.count(EVIL) == tame.text.count("tame") - of_plot


def test_a_name_may_be_broken_at_its_separators_only():
    assert str(breakable("runs/a_b<i>")) == "runs/<wbr>a_<wbr>b&lt;i&gt;"


def test_a_page_asks_nothing_of_a_network_and_holds_plotly_only_for_plots():
    plotless = page(Heading("t", []), [Section("a", "A", [Paragraph("x")])])
    assert len(plotless) < 60_000
    html = page(Heading("t", []), [Section("a", "A", [Plot("p", line_figure([Line("l", [1], [1])], "x", "y"))])])
    assert html.count("plotly.js v") == 1
    for text in (plotless, html):
        head = text[: text.index("<body>")]
        assert "default-src 'none'" in head
        assert "http://" not in head
        assert "https://" not in head
        assert '<link rel="stylesheet"' not in text


def test_only_a_live_page_reads_itself_again():
    assert 'http-equiv="refresh" content="7"' in page(Heading("t", [], 7), [])
    assert 'http-equiv="refresh"' not in page(Heading("t", []), [])


def test_a_section_without_its_data_says_why(runs):
    html = build_report([read_source(next(iter(runs)))], ReportSettings(), "Left out by --without_model.", quiet)
    for key in ("cells", "popularity", "diversity", "cards", "users"):
        part = html[html.index(f'<section id="{key}"') :]
        assert "Left out by --without_model." in part[: part.index("</section>")]
    codebooks = html[html.index('<section id="codebooks"') :]
    assert "No run logs codebook metrics" in codebooks[: codebooks.index("</section>")]


@pytest.mark.parametrize("name", ["k", "users", "examples", "places", "cards"])
def test_numbers_below_one_are_refused(name):
    with pytest.raises(InputError, match=f"--{name} 0 must be at least 1"):
        ReportSettings(**{name: 0})
