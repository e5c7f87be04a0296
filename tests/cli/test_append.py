"""`recsys append`: a catalogue grows, known items keep their semantic IDs, new ones get theirs."""

import polars as pl
import pytest
import yaml

from recsys_lightning.semantic_ids.table import SemanticIds

KINDS = ("red lipstick", "doll house kit", "camping tent", "shampoo for hair", "usb cable", "wooden toy train")


def tables(folder, numbers):
    """Interactions and items, each item with a text of one of six kinds; every user has met five of them."""
    folder.mkdir()
    items = [f"i{number:02}" for number in numbers]
    titles = [f"{KINDS[number % 6]} {'for women' if number % 4 else 'for two children'}" for number in numbers]
    pl.DataFrame({"item_id": items, "title": titles}).write_csv(folder / "items.csv")
    rows = [(f"u{user}", items[(user + 3 * step) % len(items)], 1 + step) for user in range(30) for step in range(5)]
    pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row").write_csv(folder / "log.csv")
    return folder


def config(folder, encoder, collisions):
    source = {"name": "shop", "interactions": "log.csv", "items": "items.csv"}
    return {
        "seed_everything": 1,
        "run_dir": str(folder / "run"),
        "data": {
            "class_path": "ItemDataModule",
            "init_args": {
                "source": {"class_path": "Tabular", "init_args": source},
                "encoder": encoder,
                "raw_dir": str(folder / "old"),
                "cache_dir": str(folder / "cache"),
                "template": ["{title}"],
                "k_core": 0,
            },
        },
        "model": {
            "class_path": "TokenizerModule",
            "init_args": {
                "tokenizer": {"class_path": "ResidualKMeans", "init_args": {"num_levels": 2, "num_codes": 4}},
                "collisions": collisions,
            },
        },
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False},
        "checkpoint": {"monitor": "val/loss", "mode": "min"},
        "early_stopping": {"monitor": "val/loss", "mode": "min"},
    }


@pytest.fixture
def grown(tmp_path, tiny_t5, write_yaml, recsys):
    """A tokenizer fitted on 20 items, whose catalogue then loses one of them and gains eight."""
    tables(tmp_path / "old", range(20))
    tables(tmp_path / "new", [*range(1, 14), *range(20, 28), *range(14, 20)])
    encoder = {"class_path": "SentenceTransformerEncoder", "init_args": {"model": str(tiny_t5), "device": "cpu"}}

    def fit(collisions="none", encoder=encoder):
        done = recsys("fit", "-c", write_yaml(config(tmp_path, encoder, collisions)))
        assert done.status == 0, done.err
        return tmp_path / "run"

    return fit


@pytest.mark.parametrize("collisions", ["none", "extra_token", "reassign", "sinkhorn"])
def test_known_items_keep_their_codes_wherever_they_stand_and_new_ones_get_theirs(grown, recsys, tmp_path, collisions):
    run = grown(collisions)
    old, output = SemanticIds.load(run / "semantic_ids.safetensors"), tmp_path / "out" / "new.safetensors"
    assert old.num_levels == (3 if collisions == "extra_token" else 2)
    done = recsys("append", run, "--output", output, "--data.raw_dir", tmp_path / "new")
    assert done.status == 0, done.err
    assert "19 items keep their semantic IDs, 8 are new, 1 are no longer there" in done.out
    new = SemanticIds.load(output)
    assert new.num_items == 27
    assert any(old.item_ids[at] != item for at, item in enumerate(new.item_ids[:19])), "items stand elsewhere now"
    before = dict(zip(old.item_ids, old.codes[1:].tolist(), strict=True))
    after = dict(zip(new.item_ids, new.codes[1:].tolist(), strict=True))
    assert {item: codes for item, codes in after.items() if item in before} == {
        item: codes for item, codes in before.items() if item != "i00"
    }
    if collisions == "extra_token":
        assert new.collision_report().collision_rate == 0


def test_the_new_table_serves_a_run_on_the_new_data(grown, recsys, tmp_path, write_yaml):
    run = grown()
    output = tmp_path / "new.safetensors"
    assert recsys("append", run, f"--output={output}", "--data.raw_dir", tmp_path / "new").status == 0
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["run_dir"] = str(tmp_path / "cobra")
    settings["data"] = {"class_path": "SequenceDataModule", "init_args": settings["data"]["init_args"]}
    settings["data"]["init_args"] |= {"raw_dir": str(tmp_path / "new"), "batch_size": 8}
    del settings["checkpoint"], settings["early_stopping"]
    cobra = {"semantic_ids": str(output), "dim": 8, "item_encoder": {"class_path": "EmbeddingItemEncoder"}}
    cobra |= {"decoder": {"num_layers": 1, "num_heads": 1}}
    settings["model"] = {
        "class_path": "RecommenderModule",
        "init_args": {"model": {"class_path": "COBRA", "init_args": cobra}},
    }
    done = recsys("fit", "-c", write_yaml(settings, "cobra.yaml"))
    assert done.status == 0, done.err
    settings["model"]["init_args"]["model"]["init_args"]["semantic_ids"] = str(run / "semantic_ids.safetensors")
    assert "made from other item embeddings" in recsys("fit", "-c", write_yaml(settings, "old.yaml")).error


def test_embeddings_that_changed_with_the_catalogue_are_refused(grown, recsys, tmp_path):
    run = grown(encoder={"class_path": "TfidfSVD", "init_args": {"dim": 8}})
    done = recsys("append", run, "--output", tmp_path / "new.safetensors", "--data.raw_dir", tmp_path / "new")
    assert "their embeddings have changed" in done.error
    assert not (tmp_path / "new.safetensors").exists()


def test_another_catalogue_is_refused(grown, recsys, tmp_path):
    run = grown()
    tables(tmp_path / "other", range(50, 70))
    done = recsys("append", run, "--output", tmp_path / "new.safetensors", "--data.raw_dir", tmp_path / "other")
    assert "none of the items that have semantic IDs is in these data" in done.error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name one run folder"),
        (["RUN"], "--output FILE is missing"),
        (["RUN", "--output", "table.csv"], "no .safetensors file"),
        (["RUN", "--output"], "--output needs a file"),
        (["COBRA", "--output", "x.safetensors"], "holds no tokenizer"),
        (["RUN", "--output", "x.safetensors", "--semantic_ids", "nowhere.safetensors"], "no semantic IDs at"),
    ],
)
def test_a_wrong_command_line_is_one_line(trained, recsys, words, message):
    folders = {"RUN": trained / "rqvae", "COBRA": trained / "cobra"}
    assert message in recsys("append", *(folders.get(word, word) for word in words)).error
