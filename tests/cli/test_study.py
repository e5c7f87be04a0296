"""`recsys study` from end to end, on runs that were just trained."""

import csv
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from recsys_lightning.retrieval.fusion_weights import FusionWeights
from recsys_lightning.semantic_ids.table import SemanticIds

NAMES = "fusion, cosines, learned-fusion, temperature, interests, codes, tokenizers"
SMALL = ["--beams", 2, 4, "--taus", 0.5, 1.0, "--psis", 8, "--k", 5]


@pytest.fixture(scope="session")
def runs(trained_once, tmp_path_factory) -> Path:
    """A folder with a trained COBRA, its tokenizer, a COBRA without IDs, a popularity run and two of SPARC."""
    from recsys_lightning.cli import main

    folder = tmp_path_factory.mktemp("studied")
    config = yaml.safe_load((trained_once / "cobra.yaml").read_text())
    dense = {"class_path": "COBRA", "init_args": {"dim": 16, "tokens": {"paths": "dense"}}}
    dense["init_args"]["decoder"] = {"num_layers": 1, "num_heads": 2}
    for name, model in (("dense", dense), ("popularity", {"class_path": "Popularity"})):
        config["model"]["init_args"]["model"] = model
        config["run_dir"] = str(folder / name)
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        assert main(["fit", "-c", str(folder / f"{name}.yaml")]) == 0
    # Two SPARC runs of the same start and four steps, with codebooks that learn and with frozen ones.
    for name, joint in (("sparc", True), ("static", False)):
        books = {"num_levels": 2, "num_codes": 4, "warmup_steps": 1, "joint": joint}
        settings = {"dim": 16, "codebooks": books, "search": {"num_interests": 2, "merge": "quota"}}
        config["model"]["init_args"]["model"] = {"class_path": "SPARC", "init_args": settings}
        config["run_dir"] = str(folder / name)
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        assert main(["fit", "-c", str(folder / f"{name}.yaml")]) == 0
    for name in ("cobra", "rqvae"):
        shutil.copytree(trained_once / name, folder / name)
    return folder


def table(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def check_report(path: Path, *pictures: str) -> str:
    """What every report holds, and what none may."""
    text = path.read_text()
    for name in pictures:
        assert (path.parent / name).read_bytes().startswith(b"\x89PNG")
        assert f"]({name})" in text
    for wanted in ("Written by `recsys study ", "| run | checkpoint |", "best.ckpt", "| code |", "| seconds |"):
        assert wanted in text
    assert str(path.parents[1]) not in text, "no absolute paths"
    return text


def test_fusion_writes_every_setting_and_the_best(runs, recsys, tmp_path, monkeypatch):
    output = tmp_path / "deep" / "fusion.md"
    done = recsys("study", "fusion", runs / "cobra", *SMALL, "--output", output)
    assert done.status == 0, done.err
    assert sorted(path.name for path in output.parent.iterdir()) == ["fusion.csv", "fusion.md", "fusion.png"]
    assert "60 of 60 users of the val split" in check_report(output, "fusion.png")
    rows = table(output.with_suffix(".csv"))
    # 2 modes, 2 M and 2 tau, and the run's own: M = 4, tau 1, psi 16.
    assert len(rows) == 2 * 2 * 2 + 1
    assert [(row["beams"], row["tau"], row["psi"]) for row in rows if row["own"] == "true"] == [("4", "1.0", "16.0")]
    assert "the run's own" in done.out

    monkeypatch.chdir(runs)
    options = ["--stage", "test", "--users", 20, "--seed", 3, "--k", 7, "--data.eval_batch_size", 7]
    again = tmp_path / "again.md"
    done = recsys("study", "fusion", "cobra", *SMALL[:-2], *options, "--output", again)
    assert done.status == 0, done.err
    text = check_report(again, "again.png")
    assert "20 of 60 users of the test split" in text
    assert "`recsys study fusion cobra " in text
    assert "diversity@7" in table(again.with_suffix(".csv"))[0]


def test_batches_do_not_change_what_is_measured(runs, recsys, tmp_path):
    for size in (7, 256):
        words = ["--data.eval_batch_size", size, "--output", tmp_path / f"{size}.md"]
        assert recsys("study", "fusion", runs / "cobra", *SMALL, *words).status == 0
    for one, other in zip(table(tmp_path / "7.csv"), table(tmp_path / "256.csv"), strict=True):
        assert one == other


def test_cosines_of_runs_with_and_without_ids(runs, recsys, tmp_path):
    output = tmp_path / "cosines.md"
    done = recsys("study", "cosines", runs / "cobra", runs / "dense", "--output", output)
    assert done.status == 0, done.err
    check_report(output, "cosines-heat.png", "cosines-tsne.png")
    rows = table(output.with_suffix(".csv"))
    assert [row["prefix"] for row in rows] == ["1", "2"] * 2
    assert len({row["semantic_ids"] for row in rows}) == 1
    named = tmp_path / "named.md"
    ids = runs / "rqvae" / "semantic_ids.safetensors"
    assert recsys("study", "cosines", runs / "dense", "--semantic_ids", ids, "--output", named).status == 0
    assert [row["within"] for row in table(named.with_suffix(".csv"))] == [row["within"] for row in rows[2:]]


def test_learned_fusion_leaves_weights_that_can_be_opened(runs, recsys, tmp_path):
    output = tmp_path / "learned.md"
    small = ["--epochs", 2, "--hidden", 3, "--resamples", 100, "--lr", 0.02]
    done = recsys("study", "learned-fusion", runs / "cobra", *small, "--output", output)
    assert done.status == 0, done.err
    text = check_report(output, "learned.png")
    weights = FusionWeights.load(output.with_suffix(".safetensors"))
    assert (weights.mode, weights.num_beams, weights.hidden) == ("global", 4, 3)
    assert weights.start.tolist() == [1.0, 16.0]
    rows = table(output.with_suffix(".csv"))
    assert len(rows) == 2 * 4
    assert "Adam, lr 0.02, hidden 3, seed 0" in text
    assert "of 2, by the loss on the 10% of the users held out" in text

    small += ["--mode", "per_id", "--users", 25]
    assert recsys("study", "learned-fusion", runs / "cobra", *small, "--output", output).status == 0
    assert FusionWeights.load(output.with_suffix(".safetensors")).mode == "per_id"
    assert "train 25 of 60; val 25 of 60; test 25 of 60" in output.read_text()


def test_temperature_of_a_trained_sparc(runs, recsys, tmp_path):
    output = tmp_path / "temperature.md"
    words = ["--temperatures", 0.1, 1, 10, "--merges", "quota", "sum", "--k", 5, "--stage", "test"]
    done = recsys("study", "temperature", runs / "sparc", *words, "--output", output)
    assert done.status == 0, done.err
    assert "60 of 60 users of the test split" in check_report(output, "temperature.png")
    rows = table(output.with_suffix(".csv"))
    assert [(row["merge"], row["temperature"]) for row in rows] == [
        ("-", "top-1"),
        *((merge, T) for merge in ("quota", "sum") for T in ("0.1", "1", "10", "uniform")),
        ("max", "-"),
    ]
    assert [row["temperature"] for row in rows if row["own"] == "true"] == ["1"]
    words = ["--num_interests", 4, "--users", 20, "--seed", 2, "--temperatures", 1, "--output", output]
    assert recsys("study", "temperature", runs / "sparc", *words).status == 0
    text = output.read_text()
    assert "20 of 60 users of the val split, found by the exact index with 4 interests a user" in text
    assert len(table(output.with_suffix(".csv"))) == 1 + 4 * 2 + 1, "every merge that tells interests apart"


def test_interests_of_two_trainings(runs, recsys, tmp_path):
    output = tmp_path / "interests.md"
    words = ["--k", 5, "--calls", 2, "--output", output]
    done = recsys("study", "interests", runs / "sparc", runs / "static", *words)
    assert done.status == 0, done.err
    text = check_report(output, "interests.png")
    assert "median of 2 calls of one user, and of 3 calls of up to 256 users; one thread" in text
    rows = table(output.with_suffix(".csv"))
    assert [row["interests"] for row in rows] == ["1", "2", "4"] * 2
    assert {row["own"] for row in rows if row["interests"] == "2"} == {"true"}
    assert all(float(row["ms"]) > 0 for row in rows)
    words = ["--numbers", 3, "--stage", "test", "--users", 9, *words]
    assert recsys("study", "interests", runs / "sparc", *words).status == 0
    assert [row["interests"] for row in table(output.with_suffix(".csv"))] == ["3"]
    assert "9 of 60 users of the test split" in output.read_text()


def test_codes_before_and_after_joint_training(runs, recsys, tmp_path):
    output = tmp_path / "codes.md"
    done = recsys("study", "codes", runs / "static", runs / "sparc", "--output", output)
    assert done.status == 0, done.err
    text = check_report(output, "codes.png")
    assert "Changes are counted from" in text
    assert "and their counterparts in" in text
    cards = table(output.with_suffix(".csv"))
    assert sum(int(row["items"]) for row in cards if row["level"] == "1") == 2 * 20
    assert {row["level"] for row in cards} == {"1", "2"}
    measures = table(tmp_path / "codes-measures.csv")
    levels = [(row["field"], row["code_level"], row["level"]) for row in measures]
    assert levels == [("categories", code, level) for code in "12" for level in "123"] * 2
    assert sum(int(row["items_in_both"]) for row in table(tmp_path / "codes-changes.csv")) > 0
    assert [row["level"] for row in table(tmp_path / "codes-between.csv")] == ["1", "2"]

    one = ["--before", "last", "--levels", 2, "--text_fields", "title", "--shown", 1, "--min_items", 1]
    done = recsys("study", "codes", runs / "sparc", *one, "--code_levels", 2, "--seed", 3, "--output", output)
    assert done.status == 0, done.err
    text = check_report(output, "codes.png")
    assert "(last.ckpt)" in text
    assert "the 1 largest codes are shown" in text
    assert "| words of | title |" in text
    assert "deals, seed 3 |" in text
    cards = table(output.with_suffix(".csv"))
    assert {row["level"] for row in cards} == {"2"}
    assert sum(int(row["items"]) for row in cards) == 2 * 20, "codes of one item too"
    # COBRA's codes are given to it; they can be studied too, here by brand.
    assert recsys("study", "codes", runs / "cobra", "--field", "brand", "--levels", 1, "--output", output).status == 0
    assert "the field `brand`" in output.read_text()


def test_codes_of_a_tokenizer_and_of_a_file(runs, recsys, tmp_path):
    output, own = tmp_path / "codes.md", runs / "rqvae" / "semantic_ids.safetensors"
    done = recsys("study", "codes", runs / "rqvae", runs / "cobra", own, "--output", output)
    assert done.status == 0, done.err
    text = check_report(output, "codes.png")
    assert "| semantic_ids.safetensors |" in text, "the table that the run has written, not a checkpoint"
    between = table(tmp_path / "codes-between.csv")
    assert {float(row["nmi"]) for row in between} == {1.0}, "COBRA reads the table that is also in the file"

    # A file by itself is of the run in whose folder it lies; one that lies elsewhere needs a run for its items.
    assert recsys("study", "codes", own, "--output", output).status == 0
    assert "| - | - | - | - | - |" in output.read_text()
    moved = tmp_path / "elsewhere.safetensors"
    shutil.copy(own, moved)
    assert recsys("study", "codes", moved, runs / "rqvae", "--output", output).status == 0
    assert [Path(row["run"]).name for row in table(tmp_path / "codes-between.csv")] == [moved.name] * 2
    line = f"{moved} lies in no run folder: name a run on the same data beside it, for its items"
    assert line in recsys("study", "codes", moved, "--output", output).error


def test_tokenizers_are_set_beside_what_cobra_makes_of_them(runs, recsys, tmp_path):
    tested = tmp_path / "cobra"
    shutil.copytree(runs / "cobra", tested)
    output = tmp_path / "out" / "tokenizers.md"
    words = ["--metrics", "recall@5", "--field", "categories", "--level", 1, "--output", output]
    assert "has no test/recall@5" in recsys("study", "tokenizers", tested, *words).error
    assert recsys("test", "-c", tested / "config.yaml", "--run_dir", tested).status == 0
    done = recsys("study", "tokenizers", tested, *words)
    assert done.status == 0, done.err
    check_report(output, "tokenizers.png")
    (row,) = table(output.with_suffix(".csv"))
    assert (row["tokenizer"], row["class"], row["levels"], row["codes"]) == ("rqvae", "RQVAE", "2", "4")
    assert float(row["NMI with categories"]) > 0
    assert float(row["reconstruction error"]) > 0
    assert float(row["CPU seconds"]) > 0
    assert {line["rho"] for line in table(output.with_name("tokenizers-correlations.csv"))} == {""}, "of one"
    assert "this study is of trained COBRA runs" in recsys("study", "tokenizers", runs / "popularity", *words).error


def test_an_earlier_checkpoint_of_a_tokenizer_is_tokenized_again(runs, recsys, tmp_path):
    output = tmp_path / "codes.md"
    done = recsys("study", "codes", runs / "rqvae", "--before", "last", "--output", output)
    assert done.status == 0, done.err
    names = [Path(row["run"]).name for row in table(tmp_path / "codes-measures.csv")]
    assert set(names) == {"rqvae (last.ckpt)", "rqvae (semantic_ids.safetensors)"}


def test_a_file_of_other_items_is_refused(runs, recsys, tmp_path):
    path, output = tmp_path / "other.safetensors", tmp_path / "a.md"
    SemanticIds(torch.zeros(8, 2, dtype=torch.long), 4, "f" * 64, "by hand").save(path)
    line = recsys("study", "codes", runs / "rqvae", path, "--output", output).error
    assert "other.safetensors is of other items than" in line
    assert "(7 and 20)" in line
    path = tmp_path / "renamed.safetensors"
    ids = tuple(f"z{at}" for at in range(20))
    SemanticIds(torch.zeros(21, 2, dtype=torch.long), 4, "f" * 64, "by hand", ids).save(path)
    assert "is of other items than" in recsys("study", "codes", runs / "cobra", path, "--output", output).error


def test_another_checkpoint_can_be_named(runs, recsys, tmp_path):
    output = tmp_path / "last.md"
    words = ["--ckpt_path", "last", "--users", 10, "--output", output]
    assert recsys("study", "fusion", runs / "cobra", *SMALL, *words).status == 0
    assert "| last.ckpt |" in output.read_text()


def test_help_lists_studies_and_options(recsys):
    listed = recsys("study", "--help").out
    for name in NAMES.split(", "):
        assert f"\n  {name} " in listed
        done = recsys("study", name, "--help")
        assert done.status == 0
        assert "--output" in done.out
    assert "study" in recsys("--help").out


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], f"name one of {NAMES}"),
        (["fussion"], f"no study 'fussion'; there are {NAMES}; did you mean 'fusion'?"),
        (["fusion"], "required: RUN, --output"),
        (["fusion", "{runs}/cobra"], "required: --output"),
        (["fusion", "{runs}/none", "--output", "{out}/a.md"], "no run folder"),
        (["fusion", "{runs}/popularity", "--output", "{out}/a.md"], "a run of Popularity"),
        (["cosines", "{runs}/cobra", "{runs}/rqvae", "--output", "{out}/a.md"], "a run of RQVAE"),
        (["fusion", "{runs}/dense", "--output", "{out}/a.md"], "has no semantic IDs (tokens.paths=dense)"),
        (["fusion", "{runs}/cobra", "{runs}/dense", "--output", "{out}/a.md"], "is one run too many"),
        (["fusion", "{runs}/cobra", "--output", "{out}/a.txt"], "must be a file that ends in .md"),
        (["fusion", "{runs}/cobra", "--output", "/proc/a.md"], "choose another folder"),
        (["fusion", "{runs}/cobra", "--output", "{out}/a.md", "--user", "3"], "no option '--user'; did you mean"),
        (["fusion", "{runs}/cobra", "--output", "{out}/a.md", "--users", "0"], "'0' is no whole number of 1 or more"),
        (["fusion", "{runs}/cobra", "--output", "{out}/a.md", "--taus", "1", "1"], "--taus 1.0 1.0"),
        (["fusion", "{runs}/cobra", "--output", "{out}/a.md", "--data.bathc", "3"], "no key 'data.bathc'"),
        (["fusion", "{runs}/cobra", "--output", "{out}/a.md", "--ckpt_path", "{out}/no.ckpt"], "no checkpoint"),
        (["learned-fusion", "{runs}/cobra", "--output", "{out}/a.md", "--resamples", "5"], "needs at least 100"),
        (["learned-fusion", "{runs}/cobra", "--output", "{out}/a.md", "--lr", "0"], "lr above 0"),
        (["temperature", "{runs}/cobra", "--output", "{out}/a.md"], "a run of COBRA; this study is of trained SPARC"),
        (["codes", "{runs}/popularity", "--output", "{out}/a.md"], "has no semantic IDs: there are no codes to study"),
        (["codes", "{runs}/dense", "--output", "{out}/a.md"], "has no semantic IDs: there are no codes to study"),
        (["temperature", "{runs}/sparc", "{runs}/static", "--output", "{out}/a.md"], "differ in more than their seed"),
        (["temperature", "{runs}/sparc", "--temperatures", "0", "--output", "{out}/a.md"], "finite values above 0"),
        (["temperature", "{runs}/sparc", "--num_interests", "9", "--output", "{out}/a.md"], "has 4 codes at level 1"),
        (["interests", "{runs}/sparc", "--numbers", "1", "5", "--output", "{out}/a.md"], "has 4 codes at level 1"),
        (["codes", "{runs}/sparc", "--field", "genre", "--output", "{out}/a.md"], "no text field 'genre'; there are"),
        (
            ["codes", "{runs}/sparc", "{runs}/static", "--before", "last", "--output", "{out}/a.md"],
            "--before sets a checkpoint of one run before it",
        ),
        (
            ["codes", "{runs}/rqvae/semantic_ids.safetensors", "--before", "last", "--output", "{out}/a.md"],
            "is a file of semantic IDs",
        ),
        (["codes", "{runs}/rqvae/config.yaml", "--output", "{out}/a.md"], "is no table of semantic IDs"),
        (["codes", "{runs}/sparc", "--code_levels", "3", "--output", "{out}/a.md"], "the runs have codes of levels 1"),
        (["codes", "{runs}/sparc", "--users", "3", "--output", "{out}/a.md"], "no option '--users'"),
        (["cosines", "{runs}/dense", "--output", "{out}/a.md"], "has no semantic IDs: name their file"),
        (["cosines", "{runs}/cobra", "--semantic_ids", "{out}/x", "--output", "{out}/a.md"], "no semantic IDs at"),
    ],
)
def test_wrong_input_is_one_line(runs, recsys, tmp_path, words, line):
    filled = [word.format(runs=runs, out=tmp_path) for word in words]
    assert line in recsys("study", *filled).error
    assert not list(tmp_path.iterdir())
