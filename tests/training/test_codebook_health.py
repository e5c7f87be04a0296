"""CodebookHealth: what is said of a model's codebooks is what counting and backward passes by hand say.

As a program this file fits a model on some processes and writes what was logged: `test_..._of_several_processes`.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import lightning as L
import polars as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision

from recsys_lightning.data.datamodules import ItemDataModule, SequenceDataModule
from recsys_lightning.data.encoders import TfidfSVD
from recsys_lightning.data.sources import Synthetic
from recsys_lightning.errors import InputError
from recsys_lightning.models.popularity import Popularity
from recsys_lightning.models.recommender import Recommender
from recsys_lightning.models.rqvae import RQVAE
from recsys_lightning.models.sparc import SPARC, SparcCodebooks, SparcSearch
from recsys_lightning.models.two_tower import UserSettings
from recsys_lightning.nn.quantize import ResidualQuantizer
from recsys_lightning.retrieval.recommendations import Recommendations
from recsys_lightning.semantic_ids.residual_kmeans import ResidualKMeans
from recsys_lightning.semantic_ids.table import SemanticIds
from recsys_lightning.training.codebook_health import CodebookHealth
from recsys_lightning.training.codebook_report import CodebookLevel, CodebookReport
from recsys_lightning.training.codebook_state import gradient_norms, item_codes_now
from recsys_lightning.training.evaluation import EvaluationSettings
from recsys_lightning.training.recommender import RecommenderModule
from recsys_lightning.training.tokenizer import FILE_NAME, TokenizerModule

LEVELS, CODES, WIDTH = 2, 4, 6


class Coded(Recommender):
    """A vector an item and codebooks of them, with loss terms of known gradients.

    `pull` is 3 * (sum of the level-1 codebook), `pulls` n * (sum of all) in the n-th step, `aside` knows no codebook.
    """

    def __init__(self, catalog, collapse_after=math.inf, initialised=True):
        super().__init__()
        self.num_items, self.collapse_after, self.steps = catalog.num_items, collapse_after, 0
        torch.manual_seed(0)
        self.items = torch.nn.Embedding(catalog.num_items + 1, WIDTH)
        self.dropout = torch.nn.Dropout(0.5)
        self.frozen = torch.nn.Dropout(0.5)
        self.books = ResidualQuantizer(WIDTH, LEVELS, CODES, codebook_update="gradient", dead_code_threshold=0.0)
        if initialised:
            self.books.init_from_data(self.items.weight[1:])

    @property
    def quantizer(self):
        return self.books

    @torch.no_grad()
    def item_codes(self):
        return self.books.encode(self.dropout(self.frozen(self.items.weight[1:])))

    def losses(self, batch):
        self.steps += 1
        if self.steps > self.collapse_after:
            self.items.weight.data.zero_()
        vectors = self.items(batch.target[:, 0])
        books = self.books.codebooks
        return {
            "quantization": 0.5 * self.books(vectors).loss,
            "pull": 3 * books[0].sum(),
            "pulls": self.steps * books.sum(),
            "aside": vectors.sum(-1).mean(),
            "constant": torch.ones(()),
        }

    def encode_items(self, item_ids):
        return self.items(item_ids)

    def recommend(self, batch, k, index):
        return Recommendations(batch.target.expand(-1, k), -torch.arange(k).expand(len(batch), -1).float())


class Shrunk(Coded):
    """Its level-1 codebook has one codeword within reach from the start."""

    def __init__(self, catalog):
        super().__init__(catalog)
        self.books.codebooks.data[0, 0] = 0
        self.books.codebooks.data[0, 1:] += 1000


SQUARE_ROOT = math.sqrt(CODES * WIDTH)  # the norm of a codebook of ones


def sequences(folder) -> SequenceDataModule:
    """61 users, 4 training batches of 16."""
    source = Synthetic(num_users=61, num_themes=2, topics_per_theme=2, items_per_topic=6, min_length=4, max_length=9)
    return SequenceDataModule(source, cache_dir=str(folder), k_core=0, batch_size=16, seed=3)


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    """A Trainer without a folder, and so a tokenizer's file, goes where the program was started."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def data(tmp_path):
    return sequences(tmp_path / "cache")


@pytest.fixture
def items(tmp_path):
    source = Synthetic(num_users=80, num_themes=2, topics_per_theme=3, items_per_topic=8)
    return ItemDataModule(source, TfidfSVD(dim=12), cache_dir=str(tmp_path / "cache"), k_core=0, batch_size=16, seed=1)


def module(rate=0.01, **settings) -> RecommenderModule:
    return RecommenderModule(
        lambda catalog: Coded(catalog, **settings),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=rate),
        schedule="constant",
        evaluation=EvaluationSettings(ks=(5,)),
    )


def fit(model, data, *callbacks, **settings) -> L.Trainer:
    quiet = {"logger": False, "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks)}
    quiet |= {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    quiet |= {"use_distributed_sampler": False, "accelerator": "cpu", "max_epochs": 1}
    run = L.Trainer(callbacks=list(callbacks), **(quiet | settings))
    run.fit(model, data)
    return run


def logged(run, prefix) -> dict[str, float]:
    return {name: float(value) for name, value in run.callback_metrics.items() if name.startswith(prefix)}


def by_hand(codes: torch.Tensor, size: int) -> list[tuple[float, float, int]]:
    """Perplexity, share of the entropy and dead codes of each level."""
    found = []
    for column in codes.T.tolist():
        shares = [column.count(code) / len(column) for code in set(column)]
        entropy = -sum(share * math.log(share) for share in shares)
        found.append((math.exp(entropy), entropy / math.log(size), size - len(shares)))
    return found


# ------------------------------------------------------------------------------------------------------------ usage


def test_every_epoch_logs_the_usage_of_the_whole_catalogue_also_where_nothing_is_validated(data, tmp_path):
    model, logger = module(rate=0.5), CSVLogger(tmp_path / "log", name="", version="")
    run = fit(model, data, CodebookHealth(), limit_val_batches=0, max_epochs=3, logger=logger)
    codes = model.built.eval().item_codes()
    assert len(codes) == data.catalog.num_items
    for level, (perplexity, entropy, dead) in enumerate(by_hand(codes, CODES), start=1):
        assert float(run.callback_metrics[f"codebook/perplexity@{level}"]) == pytest.approx(perplexity, rel=1e-5)
        assert float(run.callback_metrics[f"codebook/entropy@{level}"]) == pytest.approx(entropy, rel=1e-5)
        assert float(run.callback_metrics[f"codebook/dead_codes@{level}"]) == dead
    assert float(run.callback_metrics["codebook/cells"]) == len({tuple(row) for row in codes.tolist()})
    assert pl.read_csv(tmp_path / "log" / "metrics.csv")["codebook/perplexity@1"].drop_nulls().len() == 3


def test_what_is_left_and_what_has_changed_is_logged_of_the_whole_catalogue(data, tmp_path):
    model, logger = module(rate=10.0), CSVLogger(tmp_path / "log", name="", version="")
    seen = []

    class Codes(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            seen.append(pl_module.built.eval().item_codes())
            pl_module.train()

    run = fit(model, data, Codes(), CodebookHealth(), max_epochs=3, logger=logger)
    vectors, books = model.built.items.weight[1:].detach(), model.built.books.codebooks.detach()
    first = vectors - books[0][seen[-1][:, 0]]
    left = first - books[1][seen[-1][:, 1]]
    expected = {
        "residual_norm@1": (first.norm(dim=1) / vectors.norm(dim=1)).mean(),
        "residual_norm@2": (left.norm(dim=1) / vectors.norm(dim=1)).mean(),
        "reconstruction_error": left.square().sum(1).mean() / (vectors - vectors.mean(0)).square().sum(1).mean(),
        "churn": (seen[-1] != seen[-2]).any(1).float().mean(),
    }
    for name, value in expected.items():
        assert float(run.callback_metrics[f"codebook/{name}"]) == pytest.approx(float(value), rel=1e-4), name
    assert expected["churn"] > 0, "or this test says nothing of it"
    assert pl.read_csv(tmp_path / "log" / "metrics.csv")["codebook/churn"].drop_nulls().len() == 2, "not of the first"


def test_the_catalogue_is_counted_and_not_what_a_batch_has_of_it(data):
    class Batch(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.items = batch.target[:, 0]

    model, seen = module(rate=0.0), Batch()
    run = fit(model, data, seen, CodebookHealth(), limit_train_batches=1)
    codes = model.built.eval().item_codes()
    of_batch, of_all = (len({tuple(row) for row in rows.tolist()}) for rows in (codes[seen.items - 1], codes))
    assert float(run.callback_metrics["codebook/cells"]) == of_all
    assert of_batch < of_all, "a batch would say something else"


@pytest.mark.parametrize(("every", "expected"), [(None, [1, 3, 5]), (1, [0, 1, 2, 3, 4, 5]), (3, [2, 5])])
def test_a_tokenizer_is_checked_when_it_validates_or_as_often_as_is_asked_for(items, tmp_path, every, expected):
    model = TokenizerModule(lambda width: RQVAE(width, (8,), 4, 2, 6))
    logger = CSVLogger(tmp_path / "log", name="", version="")
    settings = {"max_epochs": 6, "check_val_every_n_epoch": 2, "logger": logger}
    run = fit(model, items, CodebookHealth(every_n_epochs=every), **settings)
    table = pl.read_csv(tmp_path / "log" / "metrics.csv").filter(pl.col("codebook/perplexity@1").is_not_null())
    assert table["epoch"].to_list() == expected
    x = model.built.target(items.catalog.text_embeddings()[1:])
    error = (model.built.reconstruct(x) - x).square().sum(1).mean() / (x - x.mean(0)).square().sum(1).mean()
    assert float(run.callback_metrics["codebook/reconstruction_error"]) == pytest.approx(float(error), rel=1e-3)
    latents = model.built.encoder(x).detach()
    left = latents - model.built.quantizer.decode(model.built.encode(x))
    share = (left.norm(dim=1) / latents.norm(dim=1)).mean()
    assert float(run.callback_metrics["codebook/residual_norm@2"]) == pytest.approx(float(share), rel=1e-3)


def test_nothing_is_logged_of_codebooks_that_are_not_initialised_and_the_end_says_so(data):
    health = CodebookHealth(1)
    run = fit(module(initialised=False), data, health)
    assert not logged(run, ("codebook/", "gradient/"))
    assert health.report.levels == ()
    assert "not initialised yet" in health.report.warning
    assert health.report.record() == {"codebooks": [], "codebooks_whole": {}, "collapsed": False, "codebook_events": 0}


def test_a_model_without_codebooks_is_left_alone(data):
    health = CodebookHealth(1)
    run = fit(RecommenderModule(Popularity, evaluation=EvaluationSettings(ks=(5,))), data, health)
    assert not logged(run, ("codebook/", "gradient/"))
    assert health.report is None


def test_counting_codes_leaves_every_part_in_its_mode(data):
    data.prepare_data()
    data.setup()
    model = Coded(data.catalog).train()
    model.frozen.eval()
    one, other = (item_codes_now(model, data.catalog).codes for _ in range(2))
    assert torch.equal(one, other), "without dropout"
    assert (model.training, model.dropout.training, model.frozen.training) == (True, True, False)


# -------------------------------------------------------------------------------------------------------- gradients


def test_gradient_norms_are_those_of_a_backward_pass_for_each_term_and_level(data):
    data.prepare_data()
    data.setup()
    batch = next(iter(data.train_dataloader()))
    model = Coded(data.catalog)
    found = gradient_norms(model.losses(batch), model.books.codebooks)
    assert model.books.codebooks.grad is None
    for name in ("quantization", "pull", "pulls"):
        again = Coded(data.catalog)
        again.losses(batch)[name].backward()
        expected = [float(codebook.norm()) for codebook in again.books.codebooks.grad]
        assert found[name].tolist() == pytest.approx(expected), name
    assert found["quantization"].min() > 0
    assert found["pull"].tolist() == pytest.approx([3 * SQUARE_ROOT, 0])
    assert found["aside"].tolist() == found["constant"].tolist() == [0, 0]


@pytest.mark.parametrize(("every", "expected"), [(1, 2.5), (2, 2.0), (3, 2.5), (50, 1.0)])
def test_gradients_are_measured_in_every_nth_batch_and_the_mean_is_logged(data, every, expected):
    run = fit(module(), data, CodebookHealth(every))
    assert run.global_step == 4
    for level in (1, 2):
        assert float(run.callback_metrics[f"gradient/pulls@{level}"]) == pytest.approx(expected * SQUARE_ROOT)


def test_gradients_may_be_switched_off(data):
    run = fit(module(), data, CodebookHealth(0))
    assert not logged(run, "gradient/")
    assert logged(run, "codebook/")


@pytest.mark.parametrize(
    "settings",
    [
        {"accumulate_grad_batches": 4},
        {"precision": "bf16-mixed"},
        {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))]},
    ],
    ids=["accumulation", "bfloat16", "float16 with a scaled loss"],
)
def test_gradients_are_those_of_the_weighted_terms_however_the_step_is_taken(data, settings):
    plain, other = (logged(fit(module(), data, CodebookHealth(50), **s), "gradient/") for s in ({}, settings))
    assert plain.keys() == other.keys()
    assert plain["gradient/quantization@1"] > 0
    assert other == pytest.approx(plain, rel=2e-2)


def test_codebooks_that_no_gradient_moves_have_none(items):
    run = fit(TokenizerModule(lambda width: RQVAE(width, (8,), 4, 2, 6)), items, CodebookHealth(1))
    assert not logged(run, "gradient/")


@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 3}, {"precision": "bf16-mixed"}])
def test_training_is_the_same_with_and_without(data, settings):
    weights = []
    for callbacks in ([], [CodebookHealth(1)]):
        model = module(rate=0.1)
        torch.manual_seed(5)
        fit(model, data, *callbacks, max_epochs=2, **settings)
        weights.append(model.state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_training_a_tokenizer_is_the_same_with_and_without(items, update):
    weights = []
    for callbacks in ([], [CodebookHealth(1, min_perplexity_share=1.0, every_n_epochs=1)]):
        torch.manual_seed(5)
        model = TokenizerModule(lambda width: RQVAE(width, (8,), 4, 2, 6, codebook_update=update, dropout=0.2))
        fit(model, items, *callbacks, max_epochs=3)
        weights.append(model.state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_no_graph_is_held_after_a_step(data, items):
    for model, source in ((module(), data), (TokenizerModule(lambda width: RQVAE(width, (8,), 4, 2, 6)), items)):
        fit(model, source)
        assert model.step_losses == {}


# ------------------------------------------------------------------------------------------------------------ SPARC


def sparc(**codebooks) -> RecommenderModule:
    settings = SparcCodebooks(num_levels=LEVELS, num_codes=CODES, warmup_steps=4, **codebooks)
    user = UserSettings(num_layers=0, num_heads=1)
    return RecommenderModule(
        lambda catalog: SPARC(catalog, 8, user=user, codebooks=settings, search=SparcSearch(num_interests=2)),
        evaluation=EvaluationSettings(ks=(5,)),
    )


def test_sparc_is_watched_from_the_end_of_its_warm_up_on(data, tmp_path):
    model, health, logger = sparc(), CodebookHealth(1), CSVLogger(tmp_path / "log", name="", version="")
    run = fit(model, data, health, max_epochs=3, logger=logger)
    table = pl.read_csv(tmp_path / "log" / "metrics.csv")
    for name in ("codebook/perplexity@1", "gradient/bce@1"):
        assert table[name].drop_nulls().len() == 2, "the first of three epochs is the warm-up"
    expected = by_hand(model.built.eval().item_codes(), CODES)
    assert [(row.perplexity, row.entropy, row.dead_codes) for row in health.report.levels] == [
        pytest.approx(row, rel=1e-5) for row in expected
    ]
    found = logged(run, "gradient/")
    assert min(found[f"gradient/{term}@1"] for term in ("bce", "rq", "bpr", "contrast")) > 0
    assert found["gradient/interest@1"] == 0, "which code comes next is read off the history alone"


def test_codebooks_that_stand_still_are_counted_and_have_no_gradient(data):
    run = fit(sparc(joint=False), data, CodebookHealth(1), max_epochs=2)
    assert "codebook/perplexity@1" in run.callback_metrics
    assert not logged(run, "gradient/")


# ------------------------------------------------------------------------------------------------- the end of a fit


def test_a_planted_collapse_is_caught_and_a_healthy_codebook_is_not(data):
    healthy, collapsed = CodebookHealth(), CodebookHealth()
    fit(module(), data, healthy)
    assert healthy.report.levels[0].perplexity > CODES / 2
    assert not healthy.report.collapsed
    assert healthy.report.warning is None
    run = fit(module(collapse_after=0), data, collapsed)
    assert collapsed.report.levels[0][:6] == (1, 1.0, CODES, 0.0, CODES - 1, 0.75)
    assert collapsed.report.collapsed
    assert collapsed.report.warning == (
        "WARNING: the level-1 codebook of the last epoch has collapsed: perplexity 1.0 of 4 codes, "
        "at or below 0.5 of its size"
    )
    assert float(run.callback_metrics["codebook/perplexity@1"]) == 1.0


def test_the_checkpoint_that_is_kept_as_best_is_judged_and_the_module_keeps_its_last_state(data, tmp_path):
    best = ModelCheckpoint(tmp_path, "best", monitor="codebook/perplexity@1", mode="max", save_on_train_epoch_end=True)
    model, health = module(rate=0.0, collapse_after=4), CodebookHealth()  # after the first epoch
    fit(model, data, health, best, max_epochs=2)
    assert health.report.judged == "best.ckpt"
    assert not health.report.collapsed
    assert not model.built.items.weight.any()
    last = CodebookHealth()
    fit(module(rate=0.0, collapse_after=4), data, last, max_epochs=2)
    assert last.report.judged == "the last epoch"
    assert last.report.collapsed


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75, 0.8])
def test_a_perplexity_at_the_share_is_a_collapse_and_above_it_is_none(share):
    """48 of 64 codes used evenly have a perplexity of 48, which in single precision comes out above it."""
    for used in (16, 32, 48, 60):
        codes = torch.arange(used).repeat(7)[:, None]  # (N, 1)
        usage = SemanticIds(torch.cat([codes[:1] * 0, codes]), 64, "", "").collision_report()
        level = CodebookLevel(1, usage.perplexity[0], 64, usage.entropy_share[0], 64 - used, 0.0)
        assert CodebookReport("", (level,), share).collapsed == (used <= share * 64), (used, share)


def test_only_level_1_is_judged_and_a_share_of_0_judges_nothing():
    well, ill = CodebookLevel(1, 3.9, 4, 0.98, 0, 0.1), CodebookLevel(2, 1.0, 4, 0.0, 3, 0.75)
    assert not CodebookReport("", (well, ill), 0.5).collapsed
    assert CodebookReport("", (ill, well), 0.5).collapsed
    assert not CodebookReport("", (ill, well), 0.0).collapsed


@pytest.mark.parametrize("command", ["test", "validate"])
def test_a_test_judges_what_it_tests(data, command):
    health = CodebookHealth()
    run = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[health], enable_progress_bar=False
    )
    model = module()
    model.recommender = None
    data.prepare_data()
    data.setup()
    model.recommender = Coded(data.catalog)
    model.recommender.items.weight.data.zero_()
    getattr(run, command)(model, data, verbose=False)
    assert health.report.judged == "the model"
    assert health.report.collapsed


@pytest.mark.parametrize(
    "build", [lambda width: RQVAE(width, (8,), 4, 2, 6), lambda width: ResidualKMeans(width, 2, 6)], ids=["rqvae", "km"]
)
def test_a_tokenizer_is_judged_by_the_table_that_it_writes(items, tmp_path, build):
    best = ModelCheckpoint(tmp_path, "best", monitor="val/loss", mode="min", auto_insert_metric_name=False)
    health = CodebookHealth()
    run = fit(TokenizerModule(build), items, health, best, max_epochs=3, default_root_dir=tmp_path)
    expected = by_hand(SemanticIds.load(tmp_path / FILE_NAME).codes[1:], 6)
    found = [(row.perplexity, row.entropy, row.dead_codes) for row in health.report.levels]
    assert found == [pytest.approx(row, rel=1e-5) for row in expected]
    assert bool(logged(run, "codebook/")) == hasattr(run.lightning_module.built, "quantizer"), "k-means is not trained"
    assert "val/perplexity@1" in run.callback_metrics


def test_the_gradients_of_a_tokenizer_are_measured_too(items):
    build = lambda width: RQVAE(width, (8,), 4, 2, 6, codebook_update="gradient")  # noqa: E731
    found = logged(fit(TokenizerModule(build), items, CodebookHealth(1)), "gradient/")
    assert set(found) == {f"gradient/{term}@{level}" for term in ("reconstruction", "quantization") for level in (1, 2)}
    assert found["gradient/quantization@1"] > 0
    assert found["gradient/reconstruction@1"] == 0, "straight through: the codebooks get nothing of it"


def test_bad_settings_are_refused_by_their_keys():
    with pytest.raises(InputError, match=r"codebook_health.gradient_every_n_steps=-1 must be 0 \(off\) or more"):
        CodebookHealth(gradient_every_n_steps=-1)
    with pytest.raises(InputError, match=r"codebook_health.min_perplexity_share=1.5 must lie in \[0, 1\]"):
        CodebookHealth(min_perplexity_share=1.5)
    with pytest.raises(InputError, match=r"codebook_health.max_dead_share=-0.1 must lie in \[0, 1\]"):
        CodebookHealth(max_dead_share=-0.1)
    with pytest.raises(InputError, match=r"codebook_health.every_n_epochs=0 must be 1 or more, or null"):
        CodebookHealth(every_n_epochs=0)


# ------------------------------------------------------------------------------------------------ several processes


def write_what_was_logged(folder: Path, devices: int) -> None:
    """Fit on some processes with weights that stand still, so that only the counting is compared."""
    strategy = {"devices": devices, "strategy": "ddp"} if devices > 1 else {}
    torch.manual_seed(0)
    run = fit(module(rate=0.0), sequences(folder / "cache"), CodebookHealth(1), **strategy)
    assert run.world_size == devices
    found = logged(run, ("codebook/", "gradient/"))
    (folder / f"{devices}-{run.global_rank}.json").write_text(json.dumps(found))


def write_what_was_repaired(folder: Path) -> None:
    """Fit on two processes a model whose level 1 collapses, and write its codebooks on each."""
    torch.manual_seed(0)
    model, health = module(rate=0.0), CodebookHealth(0, on_collapse="repair")
    model.build_model = Shrunk
    settings = {"devices": 2, "strategy": "ddp", "max_epochs": 2, "default_root_dir": folder}
    run = fit(model, sequences(folder / "cache"), health, **settings)
    found = {"books": model.built.books.codebooks.tolist(), "perplexity": logged(run, "codebook/perplexity")}
    (folder / f"repaired-{run.global_rank}.json").write_text(json.dumps(found))


def test_the_figures_are_those_of_several_processes(tmp_path):
    write_what_was_logged(tmp_path, 1)
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PL_", "SLURM", "LOCAL_"))}
    command = [sys.executable, __file__, str(tmp_path)]
    done = subprocess.run(command, env=clean | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    one, *two = (json.loads((tmp_path / name).read_text()) for name in ("1-0.json", "2-0.json", "2-1.json"))
    assert two[0] == two[1]
    assert two[0].keys() == one.keys()
    for name in (name for name in one if name.startswith("codebook/")):
        assert two[0][name] == pytest.approx(one[name]), name
    assert two[0]["gradient/pull@1"] == pytest.approx(one["gradient/pull@1"]) == pytest.approx(3 * SQUARE_ROOT)
    assert two[0]["gradient/quantization@1"] > 0
    first, second = (json.loads((tmp_path / f"repaired-{rank}.json").read_text()) for rank in (0, 1))
    assert first == second, "the repair is the first process's on both"
    assert first["perplexity"]["codebook/perplexity@1"] > CODES / 2
    events = (tmp_path / "codebook-events.jsonl").read_text().splitlines()
    assert len(events) == 1, "written once"
    assert json.loads(events[0])["action"] == "reset_dead"
    usage = pl.read_parquet(tmp_path / "codebook-usage.parquet")
    assert usage.height == 2 * LEVELS * CODES, "two checks, each written once"


if __name__ == "__main__":
    write_what_was_logged(Path(sys.argv[1]), 2)
    write_what_was_repaired(Path(sys.argv[1]))
