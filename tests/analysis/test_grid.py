"""A grid file means what it says, and whatever is wrong with it is one line with the place and the cure."""

from pathlib import Path

import pytest
import yaml

from recsys_lightning.analysis.grid import load_grid, substituted
from recsys_lightning.errors import InputError


@pytest.fixture
def save(tmp_path, monkeypatch):
    """Write a grid beside two base files, as given or with some keys of a small one changed (None removes a key)."""
    monkeypatch.chdir(tmp_path)
    Path("exp/grids").mkdir(parents=True)
    Path("exp/base.yaml").write_text("run_dir: x\n")
    Path("exp/ids.yaml").write_text("run_dir: y\n")

    def write(text: str | None = None, **changed) -> Path:
        grid = {
            "base": "../base.yaml",
            "set": {"epochs": 3},
            "first": {"ids": {"base": "../ids.yaml", "set": {"codes": 8}}},
            "variants": {"whole": {"set": {"file": "{ids}/table"}}, "part": {"weights": "whole", "set": {"beams": 1}}},
        } | changed
        path = Path("exp/grids/small.yaml")
        path.write_text(text or yaml.safe_dump({k: v for k, v in grid.items() if v is not None}, sort_keys=False))
        return path

    return write


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as error:
        load_grid(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_variant_has_the_settings_of_the_grid_and_its_own(save):
    grid = load_grid(save(seeds=[1, 2], report="../results/small.md", published="beauty", title="Small"))
    assert list(grid.entries) == ["ids", "whole", "part"]
    assert [entry.name for entry in grid.variants] == ["whole", "part"]
    whole = grid.entries["whole"]
    assert whole.base == Path("exp/base.yaml")
    assert whole.settings == {"epochs": 3, "file": "{ids}/table"}
    assert whole.needs == ["ids"]
    assert (grid.seeds, grid.title, grid.published) == ((1, 2), "Small", "beauty")
    assert grid.report == Path("exp/results/small.md")


def test_the_settings_of_the_grid_are_not_those_of_what_the_variants_build_on(save):
    """The epochs of a recommender say nothing of those of its tokenizer."""
    ids = load_grid(save()).entries["ids"]
    assert ids.settings == {"codes": 8}
    assert ids.base == Path("exp/ids.yaml")


def test_a_variant_that_takes_weights_starts_from_the_settings_these_were_trained_with(save):
    variants = {"whole": {}, "wide": {"set": {"dim": 9}}, "part": {"weights": "wide", "set": {"beams": 1}}}
    part = load_grid(save(variants=variants)).entries["part"]
    assert part.settings == {"epochs": 3, "dim": 9, "beams": 1}
    assert part.own == {"beams": 1}
    assert part.needs == ["wide"]


def test_what_a_variant_sets_again_comes_last_on_the_command_line(save):
    """`encoder: B` after `encoder.width: 4` would undo the width."""
    common = {"encoder": "A", "encoder.width": 4}
    grid = load_grid(save(set=common, variants={"v": {"set": {"encoder": "B"}}}))
    assert list(grid.entries["v"].settings.items()) == [("encoder.width", 4), ("encoder", "B")]


def test_names_in_braces_become_folders_and_doubled_braces_and_interpolations_stay():
    folders = {"ids": Path("runs/ids")}
    value = ["{ids}/t", {"a": "{{title}} of ${dataset}"}, 3]
    assert substituted(value, folders) == ["runs/ids/t", {"a": "{title} of ${dataset}"}, 3]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"varients": {}}, "exp/grids/small.yaml: no key 'varients'; did you mean 'variants'?"),
        ({"variants": {"a": {"sett": {}}}}, "exp/grids/small.yaml: no key 'sett' in variants.a; did you mean 'set'?"),
        ({"base": "../bas.yaml"}, "base: no file exp/bas.yaml; did you mean 'exp/base.yaml'?"),
        ({"base": None}, "base is missing; a grid needs base, a file, and variants, named settings of it"),
        ({"variants": {}}, "variants is missing; a grid needs base, a file, and variants, named settings of it"),
        ({"first": None}, "variants.whole: no entry for {ids}; there are whole, part"),
        ({"variants": {"whole": {}, "a": {"weights": "hole"}}}, "no entry for weights: hole; did you mean 'whole'?"),
        ({"variants": {"a": {"set": {"x": "{b}"}}, "b": {"set": {"x": "{a}"}}}}, "for one another: a -> b -> a"),
        ({"variants": {"a": {"weights": "a"}}}, "these wait for one another: a -> a"),
        (
            {"variants": {"a": {}, "b": {"weights": "a"}, "c": {"weights": "b"}}},
            "variants.c: b trains nothing; name a, whose weights it takes",
        ),
        ({"first": {"ids": {"set": {"x": "{whole}"}}}}, "first.ids builds on the variant whole; move whole to first"),
        ({"variants": {"ids": {}}}, "ids stands under first and under variants"),
        ({"variants": {"a/b": {}}}, "'a/b' cannot be the name of a folder of runs"),
        ({"variants": {0.1: {}}}, "0.1 cannot be the name of a folder of runs"),
        ({"variants": {"seed43": {}}}, "'seed43' cannot be the name"),
        ({"variants": {"a": {"set": {"--dim": 3}}}}, "'--dim' is no key of the command line; write dim"),
        ({"variants": {"a": {"set": {"run_dir": "x"}}}}, "variants.a.set: run_dir comes from the name of the run"),
        ({"set": {"seed_everything": 1}}, "set: seed_everything comes from seeds; leave it out"),
        ({"variants": {"a": {"set": ["dim=3"]}}}, "variants.a.set must hold keys of the command line with values"),
        ({"variants": {"a": {}, "b": {"weights": "a", "base": "../ids.yaml"}}}, "takes its base from its weights"),
        ({"seeds": [1, 1]}, "seeds must be a list of different whole numbers, not [1, 1]"),
        ({"seeds": [True]}, "seeds must be a list"),
        ({"metrics": []}, "metrics must be a list such as"),
        ({"published": "buty"}, "no 'buty' for published; did you mean 'beauty'?"),
        ({"report": "a.csv"}, "report: a.csv must end with .md"),
        ({"title": ["a"]}, "title must be a string"),
    ],
)
def test_what_cannot_be_used_is_named_with_its_place(save, changed, message):
    assert message in refusal(save(**changed))


def test_a_key_that_stands_twice_is_refused(save):
    path = save("base: ../base.yaml\nvariants:\n  a: {}\n  b: {}\n  a: {set: {dim: 3}}\n")
    assert refusal(path) == f"{path} line 5: key 'a' already stands in line 3; keep one of them"


def test_what_is_no_yaml_or_not_there_is_refused(save):
    path = save("base: [")
    assert refusal(path).startswith(f"{path} is not valid YAML: ")
    assert refusal(path.with_name("smal.yaml")) == f"no grid exp/grids/smal.yaml; did you mean '{path}'?"


def test_the_merge_key_of_yaml_works(save):
    text = "base: ../base.yaml\nvariants:\n  a: {set: &a {dim: 3, x: 1}}\n  b: {set: {<<: *a, x: 2}}\n"
    assert load_grid(save(text)).entries["b"].settings == {"dim": 3, "x": 2}


def test_a_report_named_on_the_command_line_wins(save):
    assert load_grid(save(report="../a.md"), Path("there/b.md")).report == Path("there/b.md")
