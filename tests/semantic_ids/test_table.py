"""The table of semantic IDs: what it refuses, what it counts, what a file keeps."""

import math
import os
from collections import Counter
from dataclasses import replace

import pytest
import torch

from recsys_lightning.errors import InputError
from recsys_lightning.semantic_ids.residual_kmeans import ResidualKMeans
from recsys_lightning.semantic_ids.table import SemanticIds
from recsys_lightning.semantic_ids.tokenizer import rebuilt, tokenize
from recsys_lightning.semantic_ids.usage import code_usage

OURS, OTHERS = "aaaabbbbccccdddd", "1111222233334444"


def table(rows=((0, 0), (3, 1), (2, 2), (3, 1), (0, 0)), num_codes=4):
    return SemanticIds(torch.tensor(rows), num_codes, OURS, "by hand")


def random_table(num_items=200, num_levels=3, num_codes=5, seed=0):
    codes = torch.randint(num_codes, (num_items + 1, num_levels), generator=torch.Generator().manual_seed(seed))
    codes[0] = 0
    return SemanticIds(codes, num_codes, OURS, "random")


def test_a_saved_table_loads_as_it_was(tmp_path):
    path = tmp_path / "new" / "folder" / "semantic_ids.safetensors"
    random_table().save(path)
    loaded = SemanticIds.load(path, OURS, 200)
    assert torch.equal(loaded.codes, random_table().codes)
    assert (loaded.num_codes, loaded.embeddings_fingerprint, loaded.tokenizer) == (5, OURS, "random")
    assert (loaded.num_items, loaded.num_levels) == (200, 3)


def test_saving_replaces_the_old_table_and_leaves_no_other_file(tmp_path):
    path = tmp_path / "semantic_ids.safetensors"
    table().save(path)
    random_table().save(path)
    assert SemanticIds.load(path).tokenizer == "random"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_table(tmp_path, monkeypatch):
    path = tmp_path / "semantic_ids.safetensors"
    table().save(path)

    def full(_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        random_table().save(path)
    assert SemanticIds.load(path).tokenizer == "by hand"
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_table_names_the_command_that_makes_it(tmp_path):
    path = tmp_path / "runs" / "beauty" / "rqvae_3x32" / "semantic_ids.safetensors"
    with pytest.raises(InputError, match=r"recsys fit -c experiments/beauty/rqvae_3x32\.yaml") as raised:
        SemanticIds.load(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)
    with pytest.raises(InputError, match="recsys fit"):
        SemanticIds.load(tmp_path / "elsewhere.safetensors")


def test_the_command_is_also_found_from_a_relative_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"experiments/beauty/rqvae\.yaml"):
        SemanticIds.load("runs/beauty/rqvae/semantic_ids.safetensors")


def test_a_table_of_other_embeddings_is_refused_with_both_fingerprints(tmp_path):
    path = tmp_path / "runs" / "beauty" / "rqvae" / "semantic_ids.safetensors"
    table().save(path)
    with pytest.raises(InputError) as raised:
        SemanticIds.load(path, OTHERS)
    message = str(raised.value)
    assert OURS[:12] in message
    assert OTHERS[:12] in message
    assert OURS not in message
    assert OTHERS not in message
    assert "recsys fit -c experiments/beauty/rqvae.yaml" in message
    assert str(path) in message


def test_a_table_of_another_catalogue_is_refused_with_both_counts(tmp_path):
    path = tmp_path / "semantic_ids.safetensors"
    table().save(path)
    with pytest.raises(InputError, match="hold 4 items but the catalogue has 17"):
        SemanticIds.load(path, OURS, 17)


def damaged_files(whole):
    yield "empty", b""
    yield "text", b"user,item\n1,2\n"
    for share in (0.1, 0.5, 0.9):
        yield f"cut at {share}", whole[: int(len(whole) * share)]
    flipped = bytearray(whole)
    flipped[-8] ^= 1  # a code that stays in range
    yield "flipped bit", bytes(flipped)


def test_a_damaged_file_is_refused_by_its_path(tmp_path):
    path = tmp_path / "semantic_ids.safetensors"
    random_table().save(path)
    for name, content in damaged_files(path.read_bytes()):
        path.write_bytes(content)
        with pytest.raises(InputError) as raised:
            SemanticIds.load(path)
        assert str(path) in str(raised.value), name


def test_a_safetensors_file_of_something_else_is_refused(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(InputError, match="no table of semantic IDs"):
        SemanticIds.load(path)
    save_file({"codes": torch.zeros(2, 1, dtype=torch.int64)}, path)
    with pytest.raises(InputError, match="no table of semantic IDs"):
        SemanticIds.load(path)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.tensor([[0, 0], [1, 4]]), "0..3, but item 1 has code 4 at level 2"),
        (torch.tensor([[0, 0], [-1, 0]]), "item 1 has code -1 at level 1"),
        (torch.tensor([[0, 1], [1, 1]]), "row 0"),
        (torch.tensor([0, 1]), r"shape \(2,\)"),
        (torch.tensor([[0, 0]]), "at least one item"),
        (torch.tensor([[0, 0], [1, 1]]).int(), "int32"),
    ],
)
def test_a_table_that_breaks_its_promises_is_not_born(codes, message):
    with pytest.raises(InputError, match=message):
        SemanticIds(codes, 4, OURS, "")


def test_collision_report_of_a_table_one_can_count_by_eye():
    report = table().collision_report()  # items 1 and 3 share (3, 1); item 2 and item 4 are alone
    assert (report.num_items, report.num_cells, report.largest_cell) == (4, 3, 2)
    assert report.collision_rate == 0.5
    assert report.mean_cell == pytest.approx(4 / 3)
    assert report.used_codes == (3, 3)


def test_collision_report_is_that_of_a_plain_count():
    ids = random_table(num_items=60)
    cells = Counter(tuple(row) for row in ids.codes[1:].tolist())
    report = ids.collision_report()
    assert report.num_cells == len(cells)
    assert report.collision_rate == pytest.approx(sum(n for n in cells.values() if n > 1) / 60)
    assert (report.largest_cell, report.mean_cell) == (max(cells.values()), pytest.approx(60 / len(cells)))
    for level in range(3):
        counts = Counter(ids.codes[1:, level].tolist())
        entropy = -sum(n / 60 * math.log(n / 60) for n in counts.values())
        assert report.used_codes[level] == len(counts)
        assert report.entropy[level] == pytest.approx(entropy, rel=1e-5)
        assert report.perplexity[level] == pytest.approx(math.exp(entropy), rel=1e-5)
        assert report.entropy_share[level] == pytest.approx(entropy / math.log(5), rel=1e-5)


def test_even_use_has_perplexity_k_and_one_code_has_perplexity_one():
    usage = code_usage(torch.tensor([[0, 2], [1, 2], [2, 2], [3, 2]]), 4)
    torch.testing.assert_close(usage.perplexity, torch.tensor([4.0, 1.0]))
    torch.testing.assert_close(usage.entropy_share, torch.tensor([1.0, 0.0]))
    assert usage.num_used.tolist() == [4, 1]
    assert usage.num_dead.tolist() == [0, 3]
    assert usage.counts.tolist() == [[1, 1, 1, 1], [0, 0, 4, 0]]
    with pytest.raises(InputError, match="at least one row"):
        code_usage(torch.zeros(0, 2, dtype=torch.int64), 4)


def test_tokenize_gives_every_item_the_code_it_has_alone_and_pads_row_zero():
    embeddings = torch.randn(21, 6, generator=torch.Generator().manual_seed(0))
    tokenizer = ResidualKMeans(6, 2, 4).fit(embeddings[1:]).train()
    ids = tokenize(tokenizer, embeddings, OURS, "RK-means 2x4")
    assert (ids.num_items, ids.num_codes, ids.embeddings_fingerprint, ids.tokenizer) == (20, 4, OURS, "RK-means 2x4")
    for item in range(1, 21):
        assert torch.equal(ids.codes[item], tokenizer.encode(embeddings[item : item + 1])[0])
    assert not ids.codes[0].any()
    assert tokenizer.training  # its mode is as before
    with pytest.raises(InputError, match="set embedding_dim to 5"):
        tokenize(tokenizer, embeddings[:, :5], OURS, "")


def test_disambiguation_counts_the_items_of_a_cell_by_id():
    codes = torch.tensor([[0, 0], [1, 1], [0, 2], [1, 1], [1, 1], [0, 2], [2, 0]])
    table = SemanticIds(codes=codes, num_codes=3, embeddings_fingerprint="f", tokenizer="t").disambiguated()
    assert table.codes.tolist() == [[0, 0, 0], [1, 1, 0], [0, 2, 0], [1, 1, 1], [1, 1, 2], [0, 2, 1], [2, 0, 0]]
    assert table.num_codes == 3
    assert table.collision_report().collision_rate == 0


def test_disambiguation_has_as_many_codes_as_the_largest_cell():
    table = SemanticIds(codes=torch.zeros(6, 1).long(), num_codes=2, embeddings_fingerprint="f", tokenizer="t")
    assert table.disambiguated().num_codes == 5


def test_raw_ids_are_kept_whatever_they_hold(tmp_path):
    names = ('B0"1', "zwei\nZeilen", "ärger", "")
    codes = torch.tensor([[0, 0], [1, 1], [0, 2], [1, 1], [2, 0]])
    ids = SemanticIds(codes=codes, num_codes=3, embeddings_fingerprint="f", tokenizer="t", item_ids=names)
    ids.save(tmp_path / "ids.safetensors")
    assert SemanticIds.load(tmp_path / "ids.safetensors").item_ids == names
    with pytest.raises(InputError, match="4 items have semantic IDs, but 3 raw ids are given"):
        replace(ids, item_ids=names[:3])


def test_the_table_of_some_items_is_theirs_in_the_order_asked_for():
    codes = torch.tensor([[0, 0], [1, 1], [0, 2], [1, 0], [2, 0]])
    ids = SemanticIds(codes=codes, num_codes=3, embeddings_fingerprint="f", tokenizer="t", item_ids=tuple("abcd"))
    some = ids.of_items(torch.tensor([4, 2]))
    assert some.codes.tolist() == [[0, 0], [2, 0], [0, 2]]
    assert some.item_ids == ("d", "b")


def test_what_codes_stand_for_and_what_is_made_of_them_come_together(monkeypatch):
    monkeypatch.setattr("recsys_lightning.semantic_ids.tokenizer._ROWS", 7)
    rows = torch.randn(60, 6, generator=torch.Generator().manual_seed(0)) + 5
    tokenizer = ResidualKMeans(6, 2, 4).fit(rows)
    codes = tokenizer.encode(rows)
    parts = list(rebuilt(tokenizer, rows, codes))
    assert len(parts) == 9
    targets, estimates = (torch.cat(column) for column in zip(*parts, strict=True))
    torch.testing.assert_close(targets, rows / rows.norm(dim=-1, keepdim=True))
    torch.testing.assert_close(estimates, tokenizer.codebooks[0][codes[:, 0]] + tokenizer.codebooks[1][codes[:, 1]])
