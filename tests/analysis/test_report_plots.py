"""The numbers behind the report's plots."""

import numpy as np
import polars as pl
import pytest
import yaml

from recsys_lightning.analysis.report_blocks import DataTable, Plot, Section
from recsys_lightning.analysis.report_codebooks import bin_edges, cell_histogram, cell_sizes, codebooks, usage_grid
from recsys_lightning.analysis.report_curves import learning_curves, loss_balance, loss_terms, term_shares
from recsys_lightning.analysis.report_popularity import decile_recall, item_deciles
from recsys_lightning.analysis.report_sources import EVENTS, USAGE, read_source
from recsys_lightning.analysis.user_values import user_values
from recsys_lightning.data.catalog import Catalog
from recsys_lightning.errors import InputError


@pytest.fixture
def make_source(tmp_path):
    """A run under way with such a metrics.csv."""

    def make(csv: str, name: str = "one", usage: pl.DataFrame | None = None, events: str = ""):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.yaml").write_text(yaml.safe_dump({"model": {"class_path": "SPARC"}}))
        (folder / "metrics.csv").write_text(csv)
        if usage is not None:
            usage.write_parquet(folder / USAGE)
        (folder / EVENTS).write_text(events)
        return read_source(folder)

    return make


def plots(section: Section) -> dict[str, Plot]:
    return {block.title: block for block in section.blocks if isinstance(block, Plot)}


def drawn(plot: Plot) -> dict[str, tuple[list, list]]:
    return {trace.name: (list(trace.x), list(trace.y)) for trace in plot.figure.data}


# -------------------------------------------------------------------------------------------------------------- curves


def test_learning_curves_of_all_runs_share_a_plot_and_the_unseen_column_is_dashed(make_source):
    one = make_source("step,train/loss,val/recall@10,val-unseen/recall@10\n1,3,,\n2,2,0.1,0.2\n", "one")
    two = make_source("step,train/loss\n1,5\n", "two")
    found = plots(learning_curves({"one": one, "two": two}, 10))
    assert list(found) == ["Training loss", "Validation recall@10"]
    assert drawn(found["Training loss"]) == {"one": ([1, 2], [3, 2]), "two": ([1], [5])}
    recall = found["Validation recall@10"].figure.data
    assert [(trace.name, trace.line.dash) for trace in recall] == [("one", "solid"), ("one, unseen", "dash")]


def test_shares_of_loss_terms_sum_to_one_and_a_negative_term_counts_by_its_size(make_source):
    source = make_source("step,train/loss,train/bce,train/rq,train/idle\n1,2,3,-1,\n2,4,1,1,2\n")
    terms = loss_terms(source)
    assert terms == ["bce", "rq", "idle"], "the sum is no term"
    steps, shares = term_shares(source, terms)
    assert steps == [1, 2]
    assert shares == {"bce": [0.75, 0.25], "rq": [0.25, 0.25], "idle": [0.0, 0.5]}


def test_gradients_have_a_plot_a_level_and_terms_without_any_are_named(make_source):
    source = make_source("step,train/loss,gradient/bce@1,gradient/bce@2,gradient/rq@1\n1,2,0.5,0.25,0\n2,1,0.4,,0\n")
    found = plots(loss_balance({"one": source}))
    assert list(found) == ["Gradients on level 1", "Gradients on level 2"]
    assert drawn(found["Gradients on level 1"]) == {"bce": ([1, 2], [0.5, 0.4])}
    assert "Always 0: rq." in found["Gradients on level 1"].note
    assert found["Gradients on level 1"].figure.layout.yaxis.type == "log"


# ----------------------------------------------------------------------------------------------------------- codebooks


USAGE_ROWS = pl.DataFrame(
    {"epoch": [0, 0, 0, 1, 1], "step": [10, 10, 10, 20, 20], "level": [1, 1, 2, 1, 1], "code": [0, 2, 0, 0, 1]}
).with_columns(items=pl.Series([5, 4, 9, 1, 8]))


def test_a_heat_map_has_a_row_a_code_and_a_column_a_check():
    steps, grid = usage_grid(USAGE_ROWS, 1)
    assert steps == [10, 20]
    assert grid.tolist() == [[5, 1], [0, 8], [4, 0]]


def test_of_a_step_that_was_checked_twice_the_last_counts():
    twice = pl.concat([USAGE_ROWS, USAGE_ROWS.head(1).with_columns(items=pl.lit(7, pl.Int64))])
    assert usage_grid(twice, 1)[1][0].tolist() == [7, 1]


def test_codebooks_are_shown_over_time_with_their_events(make_source):
    event = '{"epoch": 0, "step": 12, "level": 1, "finding": "dead_codes", "action": "reset_dead", "codes": [1, 3],'
    event += ' "before": {}, "after": {}, "message": "two codes set anew"}\n'
    csv = "step,codebook/entropy@1,codebook/entropy@2,codebook/churn\n10,0.5,0.6,\n20,0.9,0.8,0.25\n"
    section = codebooks({"one": make_source(csv, usage=USAGE_ROWS, events=event)})
    found = plots(section)
    assert list(found) == ["Use of level 1", "Use of level 2", "Entropy", "Churn"]
    heat, mark = found["Use of level 1"].figure.data
    assert (heat.z[0][0], list(heat.x)) == (5, ["10", "20"])
    assert (list(mark.x), list(mark.text)) == (["20"], ["level 1, dead_codes: reset_dead"]), "at the next check"
    assert len(found["Use of level 2"].figure.data) == 1, "the event is of level 1"
    assert drawn(found["Entropy"])["level 2"] == ([10, 20], [0.6, 0.8])
    assert drawn(found["Entropy"])["event"][0] == [12]
    (table,) = (block for block in section.blocks if isinstance(block, DataTable))
    assert table.body == [["12", "0", "1", "dead_codes", "reset_dead", "2", "two codes set anew"]]


def test_codebook_metrics_of_a_tokenizer_are_found_under_val(make_source):
    section = codebooks({"one": make_source("step,val/perplexity@1,val/collision_rate\n10,5,0.5\n")})
    assert list(plots(section)) == ["Perplexity", "Collision rate"]


def test_a_run_without_codebooks_has_no_plots_of_them(make_source):
    assert not codebooks({"one": make_source("step,train/loss\n1,2\n")}).blocks


def test_cells_are_counted_by_the_number_of_their_items():
    codes = np.array([[0, 0], [0, 0], [0, 0], [0, 1], [1, 0], [1, 1], [1, 1]])
    assert [part.tolist() for part in cell_sizes(codes)] == [[1, 2, 3], [2, 1, 1]]
    section = cell_histogram({"one": codes}, [])
    plot, table = section.blocks
    assert drawn(plot)["one"] == ([1, 2, 3], [2, 1, 1])
    assert plot.figure.data[0].text[2] == "3 in a cell: 42.9% of the items"
    assert table.body == [["one", "7", "4", "3", "28.6%", "71.4%"]]


def test_many_sizes_share_at_most_forty_bins_of_whole_sizes():
    assert bin_edges(3).tolist() == [1, 2, 3, 4]
    edges = bin_edges(101)
    assert len(edges) - 1 <= 40
    assert set(np.diff(edges)) == {3}
    assert edges[-1] > 101
    codes = np.repeat(np.arange(2), [100, 101])[:, None]
    (plot, _) = cell_histogram({"one": codes}, []).blocks
    assert sum(plot.figure.data[0].y) == 2, "no cell is lost"


# ---------------------------------------------------------------------------------------------------------- popularity


def test_deciles_hold_as_many_items_each_and_unmet_items_are_apart():
    counts = np.array([0, 5, 0, 9, *range(20, 38)])  # 20 met items, one that was not
    groups = item_deciles(counts)
    assert np.bincount(groups[1:], minlength=11).tolist() == [2] * 10 + [1]
    assert groups[2] == 10
    assert groups[21] == 0, "the most met"
    assert groups[1] == 9, "the least met"


def test_recall_by_decile_counts_ties_by_chance_and_adds_up_to_the_recall_of_all(ranks_table):
    fields = pl.DataFrame({"item_id": [f"item {at}" for at in range(10)]})
    catalog = Catalog(fields, np.array([0, *range(10, 110, 10)]))  # item 9 is the most met
    first = [1, 4, 0, 2, 1, 9, 3, 0, 2, 1]
    ranks = ranks_table(first).with_columns(tied=pl.lit(2).cast(pl.Int32))
    found = decile_recall(ranks, catalog, 3, "")
    assert found.answers.tolist() == [1] * 10 + [0]
    # Item 6 stands at 3 or 4 by chance; item 9, decile 0, is within 3 for sure.
    assert found.recall[:10][::-1].tolist() == [1, 0, 0, 1, 1, 0, 0.5, 0, 1, 1]
    assert np.isnan(found.recall[10])
    whole = user_values(ranks, "recall@3", unseen=False).mean()
    assert np.nansum(found.recall * found.answers) / 10 == pytest.approx(whole)


def test_the_unseen_column_has_its_own_ranks(ranks_table):
    catalog = Catalog(pl.DataFrame({"item_id": ["item 0", "item 1"]}), np.array([0, 1, 2]))
    ranks = ranks_table([5, 5], [1, 5])
    assert decile_recall(ranks, catalog, 2, "").recall[[0, 5]].tolist() == [0, 0]
    assert decile_recall(ranks, catalog, 2, "_unseen").recall[[0, 5]].tolist() == [0, 1]


def test_ranks_of_other_items_are_refused(ranks_table):
    with pytest.raises(InputError, match="other data"):
        decile_recall(ranks_table([1, 1, 1]), Catalog(pl.DataFrame({"item_id": ["item 0"]}), np.array([0, 1])), 1, "")
