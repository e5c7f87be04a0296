"""RecommenderModule: what it reports is what a loop over users would count."""

import lightning as L
import pytest
import torch

from recsys_lightning.data.datamodules import SequenceDataModule
from recsys_lightning.data.sources import Synthetic
from recsys_lightning.models.popularity import Popularity
from recsys_lightning.models.recommender import Recommender
from recsys_lightning.retrieval.recommendations import Recommendations
from recsys_lightning.training.evaluation import EvaluationSettings
from recsys_lightning.training.optimizers import build_optimizer, parameter_groups
from recsys_lightning.training.recommender import RecommenderModule


@pytest.fixture
def data(tmp_path):
    source = Synthetic(num_users=90, num_themes=2, topics_per_theme=2, items_per_topic=6, min_length=4, max_length=9)
    return SequenceDataModule(source, cache_dir=str(tmp_path), k_core=0, batch_size=16, eval_batch_size=7, seed=3)


def trainer(**settings):
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(accelerator="cpu", use_distributed_sampler=False, num_sanity_val_steps=0, **(quiet | settings))


class Peeking(Recommender):
    """Answers with whatever it must not look at, if it can."""

    def __init__(self, catalog):
        super().__init__()
        self.num_items = catalog.num_items
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def losses(self, batch):
        return {"one": self.weight.square() + 1, "two": 2 * self.weight.square() + 2}

    def encode_items(self, item_ids):
        return torch.zeros(len(item_ids), 1)

    def recommend(self, batch, k, index):
        self.asked = (len(batch), k)
        return Recommendations(batch.target.expand(-1, k), -torch.arange(k).expand(len(batch), -1).float())


def test_a_repeated_item_counts_once(data):
    """A list that says the answer k times has one hit, so recall and NDCG stay at 1."""
    found = trainer().test(RecommenderModule(Peeking, evaluation=EvaluationSettings(ks=(5,))), data, verbose=False)[0]
    assert found["test/recall@5"] == pytest.approx(1.0)
    assert found["test/ndcg@5"] == pytest.approx(1.0)


def test_what_is_summed_is_what_is_logged(data):
    module = RecommenderModule(Peeking, schedule="constant", evaluation=EvaluationSettings(ks=(5,)))
    run = trainer(max_steps=1, limit_val_batches=0)
    run.fit(module, data)
    assert float(run.callback_metrics["train/one"]) == pytest.approx(1.0)
    assert float(run.callback_metrics["train/two"]) == pytest.approx(2.0)
    assert float(run.callback_metrics["train/loss"]) == pytest.approx(3.0)


def test_a_model_without_losses_trains_for_nothing_and_is_still_measured(data):
    run = trainer(max_epochs=1)
    run.fit(RecommenderModule(Popularity, evaluation=EvaluationSettings(ks=(5,))), data)
    assert float(run.callback_metrics["val/recall@5"]) > 0


def test_biases_and_norms_are_not_decayed():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    decayed, free = parameter_groups(model)
    assert [p.ndim for p in decayed["params"]] == [2]
    assert [p.ndim for p in free["params"]] == [1, 1, 1]
    assert free["weight_decay"] == 0.0


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0, [1.0] * 6),
        ("constant", 2, [1 / 3, 2 / 3, 1.0, 1.0, 1.0, 1.0]),
        ("cosine", 0, [1.0, 0.933, 0.75, 0.5, 0.25, 0.067]),
        ("cosine", 2, [1 / 3, 2 / 3, 1.0, 0.854, 0.5, 0.146]),
    ],
)
def test_learning_rates_are_those_of_the_schedule(schedule, warmup, expected):
    model = torch.nn.Linear(1, 1)
    built = build_optimizer(model, lambda p: torch.optim.SGD(p, lr=1.0), schedule, warmup, total_steps=6)
    rates = []
    for _ in range(6):
        rates.append(built["optimizer"].param_groups[0]["lr"])
        built["optimizer"].step()
        if "lr_scheduler" in built:
            built["lr_scheduler"]["scheduler"].step()
    assert rates == pytest.approx(expected, abs=1e-3)
