"""What is done about a collapse: a planted one is caught at the next check and, where it is asked for, repaired."""

import json
import logging

import lightning as L
import polars as pl
import pytest
import torch

from recsys_lightning.data.datamodules import ItemDataModule, SequenceDataModule
from recsys_lightning.data.encoders import TfidfSVD
from recsys_lightning.data.sources import Synthetic
from recsys_lightning.errors import InputError
from recsys_lightning.models.rqvae import RQVAE
from recsys_lightning.models.sparc import SPARC, SparcCodebooks, SparcSearch
from recsys_lightning.models.two_tower import UserSettings
from recsys_lightning.training.codebook_collapse import Finding, find_collapses
from recsys_lightning.training.codebook_files import EVENTS_FILE, USAGE_FILE
from recsys_lightning.training.codebook_health import CodebookHealth
from recsys_lightning.training.codebook_report import CodebookLevel
from recsys_lightning.training.evaluation import EvaluationSettings
from recsys_lightning.training.recommender import RecommenderModule
from recsys_lightning.training.tokenizer import TokenizerModule

LEVELS, CODES, PLANTED = 2, 6, 2


class Plant(L.Callback):
    """At the start of one epoch all codewords but the first go out of reach, of one level or of all."""

    def __init__(self, level=None, at=PLANTED):
        self.level, self.at = level, at

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.at:
            quantizer = pl_module.built.quantizer
            levels = range(LEVELS) if self.level is None else [self.level]
            with torch.no_grad():
                for level in levels:
                    quantizer.codebooks[level, 0] = 0
                    away = 100 * torch.randn(CODES - 1, quantizer.dim, generator=torch.Generator().manual_seed(1))
                    quantizer.codebooks[level, 1:] = away
                    if quantizer.codebook_update == "ema":
                        quantizer.sums.copy_(quantizer.usage[..., None] * quantizer.codebooks)


class Watch(L.Callback):
    """Keeps the perplexities that were logged of each epoch."""

    def __init__(self):
        self.seen = []

    def on_train_epoch_end(self, trainer, pl_module):
        values = trainer.callback_metrics
        self.seen.append([float(values.get(f"codebook/perplexity@{n}", 0)) for n in range(1, LEVELS + 1)])


@pytest.fixture
def items(tmp_path):
    source = Synthetic(num_users=80, num_themes=3, topics_per_theme=3, items_per_topic=12)
    return ItemDataModule(source, TfidfSVD(dim=12), cache_dir=str(tmp_path / "cache"), k_core=0, batch_size=32, seed=1)


@pytest.fixture
def sequences(tmp_path):
    source = Synthetic(num_users=61, num_themes=2, topics_per_theme=3, items_per_topic=8, min_length=4, max_length=9)
    return SequenceDataModule(source, cache_dir=str(tmp_path / "cache"), k_core=0, batch_size=16, seed=3)


def rqvae(update="ema", **settings) -> TokenizerModule:
    return TokenizerModule(
        lambda width: RQVAE(
            width, (16,), 8, LEVELS, CODES, codebook_update=update, dead_code_threshold=0.0, seed=1, **settings
        )
    )


def sparc(**settings) -> RecommenderModule:
    warm = {"warmup_steps": 4, "dead_code_threshold": 0.0}
    books = SparcCodebooks(num_levels=LEVELS, num_codes=CODES, **(warm | settings))
    user = UserSettings(num_layers=0, num_heads=1)
    return RecommenderModule(
        lambda catalog: SPARC(catalog, 8, user=user, codebooks=books, search=SparcSearch(num_interests=2)),
        evaluation=EvaluationSettings(ks=(5,)),
    )


def fit(model, data, folder, *callbacks, epochs=6, **settings) -> L.Trainer:
    torch.manual_seed(0)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "num_sanity_val_steps": 0, "use_distributed_sampler": False}
    checkpoint = settings.pop("ckpt_path", None)
    run = L.Trainer(
        accelerator="cpu", default_root_dir=folder, callbacks=list(callbacks), max_epochs=epochs, **(quiet | settings)
    )
    run.fit(model, data, ckpt_path=checkpoint, weights_only=True if checkpoint else None)
    return run


def events(folder) -> list[dict]:
    path = folder / EVENTS_FILE
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


# --------------------------------------------------------------------------------------------------- what is found


def row(level, perplexity, dead) -> CodebookLevel:
    return CodebookLevel(level, perplexity, 10, 0.0, dead, 0.0)


def test_a_level_is_found_at_the_share_of_its_perplexity_or_above_that_of_its_dead_codes():
    assert find_collapses([row(1, 5.1, 2), row(2, 10.0, 0)], 0.5, 0.2) == []
    low, dead = row(1, 5.0, 9), row(2, 5.1, 3)
    found = find_collapses([low, dead], 0.5, 0.2)
    assert [(one.level, one.finding) for one in found] == [(1, "low_perplexity"), (2, "dead_codes")]
    assert found[0].message == (
        "the level-1 codebook has collapsed: perplexity 5.0 of 10 codes, at or below 0.5 of its size"
    )
    assert found[1] == Finding(2, "dead_codes", "the level-2 codebook has 3 dead codes of 10, more than 0.2 of them")
    assert find_collapses([low, dead], 0.0, 1.0) == []


# ------------------------------------------------------------------------------------------------------ the repair


@pytest.mark.parametrize("repair", ["reset_dead", "reseed"])
@pytest.mark.parametrize("kind", ["ema", "gradient", "sparc"])
def test_a_planted_collapse_is_repaired_at_the_next_check_and_without_repair_it_stays(
    kind, repair, items, sequences, tmp_path
):
    seen = {}
    for action in ("warn", "repair"):
        folder, watch = tmp_path / action, Watch()
        model, data = (sparc(), sequences) if kind == "sparc" else (rqvae(kind), items)
        fit(model, data, folder, Plant(), CodebookHealth(0, on_collapse=action, repair=repair), watch)
        seen[action] = watch.seen
    bar = CODES / 2
    for found in seen.values():
        assert min(found[PLANTED - 1]) > bar, "well before"
        assert found[PLANTED][0] == 1, "caught in the epoch it was planted in"
    assert all(found[0] == 1 for found in seen["warn"][PLANTED:]), "the control stays collapsed"
    for level in range(LEVELS):
        assert seen["repair"][PLANTED + 1][level] > bar, "well at the next check, and on"
        assert seen["repair"][-1][level] > bar
    (event,) = events(tmp_path / "repair")
    assert (event["epoch"], event["level"], event["finding"]) == (PLANTED, 1, "low_perplexity")
    assert event["action"] == repair
    assert event["codes"] == list(range(1 if repair == "reset_dead" else 0, CODES))
    assert event["before"] == {
        "perplexity": 1,
        "entropy": 0,
        "dead_codes": CODES - 1,
        "gini": pytest.approx(1 - 1 / CODES),
    }
    assert event["after"]["perplexity"] > bar
    assert event["after"]["dead_codes"] <= 1, "the codeword that had all items may have none"
    assert f"perplexity now {event['after']['perplexity']:.1f}" in event["message"]
    (warned,) = (one for one in events(tmp_path / "warn") if one["level"] == 1)
    assert (warned["epoch"], warned["action"], warned["codes"], warned["after"]) == (PLANTED, "warn", [], {})


def test_a_collapse_of_the_last_level_leaves_the_codebooks_before_it_as_they_are(items, tmp_path):
    kept = {}

    class Keep(L.Callback):
        def __init__(self, name):
            self.name = name

        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == PLANTED:
                kept[self.name] = pl_module.built.quantizer.codebooks.detach().clone()

    health = CodebookHealth(0, on_collapse="repair")
    fit(rqvae(), items, tmp_path, Plant(LEVELS - 1), Keep("before"), health, Keep("after"), epochs=PLANTED + 1)
    assert torch.equal(kept["before"][:-1], kept["after"][:-1])
    assert not torch.equal(kept["before"][-1], kept["after"][-1])
    assert [event["level"] for event in events(tmp_path)] == [LEVELS]


def test_the_optimizer_forgets_the_codewords_that_were_replaced(items, tmp_path):
    run = fit(rqvae("gradient"), items, tmp_path, CodebookHealth(0, on_collapse="repair"), Plant(), epochs=PLANTED + 1)
    codebooks = run.lightning_module.built.quantizer.codebooks
    moments = run.optimizers[0].state[codebooks]
    (event,) = events(tmp_path)
    assert event["codes"]
    assert not moments["exp_avg"][0, event["codes"]].any()
    assert not moments["exp_avg_sq"][0, event["codes"]].any()
    assert moments["exp_avg"][0, 0].any()


def test_items_that_are_held_out_of_training_lend_nothing_to_a_repair(tmp_path, monkeypatch):
    from recsys_lightning.training import codebook_collapse

    source = Synthetic(num_users=80, num_themes=3, topics_per_theme=3, items_per_topic=12)
    settings = {"cache_dir": str(tmp_path / "cache"), "k_core": 0, "batch_size": 32, "seed": 1, "cold_items": 0.3}
    data = ItemDataModule(source, TfidfSVD(dim=12), **settings)
    given = []
    mend = codebook_collapse.reset_dead
    monkeypatch.setattr(
        codebook_collapse, "reset_dead", lambda books, rows, *a, **s: given.append(rows) or mend(books, rows, *a, **s)
    )
    run = fit(rqvae(), data, tmp_path, Plant(), CodebookHealth(0, on_collapse="repair"), epochs=PLANTED + 1)
    model = run.lightning_module.built
    x = data.catalog.text_embeddings()[torch.from_numpy(data.warm_items)]
    assert len(x) < data.catalog.num_items
    torch.testing.assert_close(given[0], model.eval().encoder(model.target(x)).detach())


def test_a_repair_that_does_not_help_ends_after_five_and_is_said_once(items, tmp_path):
    class Replant(Plant):
        def on_train_epoch_start(self, trainer, pl_module):
            self.at = trainer.current_epoch
            super().on_train_epoch_start(trainer, pl_module)

    fit(rqvae(), items, tmp_path, Replant(), CodebookHealth(0, on_collapse="repair"), epochs=8)
    assert [event["action"] for event in events(tmp_path)] == ["reset_dead"] * 5 + ["gave_up"]


def test_sinkhorn_begins_is_raised_and_spreads_the_codes_of_the_last_level(items, tmp_path):
    watch = Watch()
    health = CodebookHealth(0, on_collapse="repair", repair="raise_sinkhorn")
    run = fit(rqvae(ema_decay=0.5), items, tmp_path, Plant(LEVELS - 1), health, watch, epochs=12)
    found = events(tmp_path)
    assert {event["action"] for event in found} == {"raise_sinkhorn"}
    assert {event["level"] for event in found} == {LEVELS}
    assert run.lightning_module.built.quantizer.sinkhorn == pytest.approx(0.003 * 2 ** (len(found) - 1))
    assert watch.seen[PLANTED][-1] == 1
    assert watch.seen[-1][-1] > CODES / 2


def test_sinkhorn_does_not_mend_another_level_and_says_so_once(items, tmp_path):
    health = CodebookHealth(0, on_collapse="repair", repair="raise_sinkhorn")
    fit(rqvae(), items, tmp_path, Plant(0), health)
    first = [event for event in events(tmp_path) if event["level"] == 1]
    assert [event["action"] for event in first] == ["warn"]
    assert "of the last level alone" in first[0]["message"]


@pytest.mark.parametrize(
    ("model", "repair", "message"),
    [
        (lambda: sparc(joint=False), "reset_dead", "on_collapse=repair needs codebooks that are trained"),
        (lambda: rqvae(estimator="gumbel"), "raise_sinkhorn", "does not go with estimator=gumbel"),
    ],
)
def test_a_model_that_cannot_be_repaired_so_is_refused_at_the_start(model, repair, message, items, sequences, tmp_path):
    built = model()
    data = sequences if isinstance(built, RecommenderModule) else items
    with pytest.raises(InputError, match=message):
        fit(built, data, tmp_path, CodebookHealth(0, on_collapse="repair", repair=repair))
    fit(model(), data, tmp_path, CodebookHealth(0, repair=repair), epochs=1)


# ----------------------------------------------------------------------------------------------- warnings and stops


def test_a_finding_is_told_once_and_again_only_after_a_check_without_it(items, tmp_path, caplog):
    class Heal(L.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 3:
                data = trainer.datamodule.catalog.text_embeddings()[1:]
                pl_module.built.fit(data)

    with caplog.at_level(logging.WARNING, "recsys_lightning"):
        fit(rqvae(), items, tmp_path, Plant(0, 1), Heal(), Plant(0, 4), CodebookHealth(0), epochs=6)
    told = [event["epoch"] for event in events(tmp_path) if event["level"] == 1]
    assert told == [1, 4], "not in the epochs 2 and 5, where it goes on"
    lines = [record.message for record in caplog.records if "level-1 codebook has collapsed" in record.message]
    assert [line.split(":")[0] for line in lines] == ["epoch 1", "epoch 4"]


def test_a_stop_ends_the_training_and_the_summary_says_so(items, tmp_path):
    health = CodebookHealth(0, on_collapse="stop")
    run = fit(rqvae(), items, tmp_path, Plant(), health, epochs=6)
    assert run.current_epoch == PLANTED + 1
    assert run.state.finished
    assert {event["action"] for event in events(tmp_path)} == {"stop"}
    assert health.report.warning.startswith("WARNING: training was stopped: the level-1 codebook has collapsed: ")
    assert health.report.num_events == health.report.record()["codebook_events"] == len(events(tmp_path))
    well = CodebookHealth(0, on_collapse="stop", min_perplexity_share=0.0, max_dead_share=1.0)
    assert fit(rqvae(), items, tmp_path, Plant(), well, epochs=6).current_epoch == 6
    assert well.report.warning is None


# --------------------------------------------------------------------------------------------- a training that goes on


def test_a_training_that_goes_on_knows_its_codes_what_it_has_said_and_what_it_has_raised(items, tmp_path):
    def callbacks():
        return Plant(LEVELS - 1), CodebookHealth(0, on_collapse="repair", repair="raise_sinkhorn")

    first = fit(rqvae(), items, tmp_path, *callbacks(), epochs=PLANTED + 2)
    first.save_checkpoint(tmp_path / "half.ckpt")
    raised = first.lightning_module.built.quantizer.sinkhorn
    told = len(events(tmp_path))
    assert raised is not None
    lost = PLANTED + 2 + 2
    fit(rqvae(), items, tmp_path, *callbacks(), epochs=lost, ckpt_path=tmp_path / "half.ckpt")
    resumed = fit(rqvae(), items, tmp_path, *callbacks(), epochs=PLANTED + 3, ckpt_path=tmp_path / "half.ckpt")
    assert resumed.lightning_module.built.quantizer.sinkhorn >= raised
    assert "codebook/churn" in resumed.callback_metrics, "it knows the codes of before"
    usage = pl.read_parquet(tmp_path / USAGE_FILE)
    assert usage["epoch"].unique().sort().to_list() == list(range(PLANTED + 3)), "no epoch of the attempt that was lost"
    assert usage.height == (PLANTED + 3) * LEVELS * CODES
    assert len(events(tmp_path)) >= told
    assert [event["epoch"] for event in events(tmp_path)] == sorted({event["epoch"] for event in events(tmp_path)})
    fit(rqvae(), items, tmp_path, CodebookHealth(0), epochs=1)
    assert pl.read_parquet(tmp_path / USAGE_FILE)["epoch"].unique().to_list() == [0], "a new training begins anew"
    assert events(tmp_path) == []
