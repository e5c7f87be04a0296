"""The health of codes: every figure is the one that a formula by hand gives, and of the whole catalogue."""

import math

import pytest
import torch

from recsys_lightning.errors import InputError
from recsys_lightning.semantic_ids.health import (
    churn,
    codebook_state,
    reconstruction_error,
    residual_norms,
    usage_metrics,
)
from recsys_lightning.semantic_ids.table import SemanticIds
from recsys_lightning.semantic_ids.usage import code_usage

CODES = torch.tensor([[0, 1], [0, 1], [0, 2], [2, 0], [2, 3], [0, 1]])  # (I, L)


def table(codes: torch.Tensor, size: int = 4) -> SemanticIds:
    return SemanticIds(torch.cat([torch.zeros_like(codes[:1]), codes]), size, "", "by hand")


def gini_by_hand(counts: list[int]) -> float:
    """Half the mean difference of all pairs, over the mean."""
    pairs = [abs(a - b) for a in counts for b in counts]
    return sum(pairs) / len(pairs) / 2 / (sum(counts) / len(counts))


def test_the_usage_of_a_table_is_what_counting_by_hand_gives():
    found = usage_metrics(table(CODES))
    # Level 1 is used 4, 0, 2, 0 times, level 2 1, 3, 1, 1 times.
    first = -(4 / 6) * math.log(4 / 6) - (2 / 6) * math.log(2 / 6)
    second = -(3 / 6) * math.log(3 / 6) - 3 * (1 / 6) * math.log(1 / 6)
    expected = {
        "perplexity@1": math.exp(first),
        "perplexity@2": math.exp(second),
        "entropy@1": first / math.log(4),
        "entropy@2": second / math.log(4),
        "dead_codes@1": 2,
        "dead_codes@2": 0,
        "gini@1": gini_by_hand([4, 0, 2, 0]),
        "gini@2": gini_by_hand([1, 3, 1, 1]),
        "cells": 4,
        "largest_cell": 3,
        "collision_rate": 3 / 6,
    }
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("counts", [[3, 3, 3], [9, 0, 0], [1, 2, 6], [0, 5, 0, 1, 2]])
def test_gini_is_half_the_mean_difference_of_all_pairs_over_the_mean(counts):
    codes = torch.tensor([code for code, count in enumerate(counts) for _ in range(count)])[:, None]
    assert code_usage(codes, len(counts)).gini.item() == pytest.approx(gini_by_hand(counts), abs=1e-6)


def test_gini_runs_from_even_use_to_one_code_for_all():
    even, one = torch.arange(8)[:, None], torch.zeros(8, 1, dtype=torch.int64)
    assert code_usage(even, 8).gini.item() == 0
    assert code_usage(one, 8).gini.item() == pytest.approx(7 / 8)


def test_a_batch_would_tell_another_story_than_the_catalogue():
    """Each of 16 codes has one item; a batch of 4 items sees 12 dead codes and a quarter of the perplexity."""
    codes = torch.arange(16)[:, None]
    whole, batch = usage_metrics(table(codes, 16)), usage_metrics(table(codes[:4], 16))
    assert (whole["dead_codes@1"], whole["perplexity@1"]) == (0, pytest.approx(16))
    assert (batch["dead_codes@1"], batch["perplexity@1"]) == (12, pytest.approx(4))


def test_residual_norms_are_what_is_left_of_each_vector_after_each_level():
    torch.manual_seed(0)
    vectors, books = torch.randn(5, 3), torch.randn(2, 4, 3)
    codes = torch.tensor([[0, 1], [3, 2], [1, 1], [2, 0], [0, 3]])
    expected = []
    for level in (1, 2):
        ratios = []
        for vector, row in zip(vectors, codes.tolist(), strict=True):
            left = vector - sum(books[n, row[n]] for n in range(level))
            ratios.append(float(left.norm() / vector.norm()))
        expected.append(sum(ratios) / len(ratios))
    assert residual_norms(vectors, codes, books).tolist() == pytest.approx(expected, rel=1e-5)


def test_vectors_of_length_0_have_no_share_that_is_left():
    books, codes = torch.ones(1, 2, 3), torch.zeros(2, 1, dtype=torch.int64)
    some = residual_norms(torch.tensor([[2.0, 2.0, 2.0], [0.0, 0.0, 0.0]]), codes, books)
    assert some.tolist() == pytest.approx([0.5])
    assert residual_norms(torch.zeros(2, 3), codes, books).tolist() == [0]


@pytest.mark.parametrize("rows", [1, 3, 7])
def test_the_reconstruction_error_is_the_share_of_the_variance_however_the_items_are_cut(rows):
    torch.manual_seed(0)
    vectors = torch.randn(7, 4) + 50  # far from the origin: a variance in single precision would be wrong
    rebuilt = vectors + 0.1 * torch.randn(7, 4)
    wide = vectors.double()
    expected = (wide - rebuilt.double()).square().sum(-1).mean() / (wide - wide.mean(0)).square().sum(-1).mean()
    parts = zip(torch.split(vectors, rows), torch.split(rebuilt, rows), strict=True)
    assert reconstruction_error(parts) == pytest.approx(float(expected), rel=1e-9)


def test_the_mean_of_all_vectors_for_each_is_an_error_of_1_and_a_copy_one_of_0():
    vectors = torch.randn(6, 3)
    assert reconstruction_error([(vectors, vectors.mean(0).expand(6, 3))]) == pytest.approx(1, rel=1e-5)
    assert reconstruction_error([(vectors, vectors)]) == 0
    assert reconstruction_error([(torch.ones(3, 2), torch.ones(3, 2))]) == 0, "vectors that are all alike"
    with pytest.raises(InputError, match="at least one vector"):
        reconstruction_error([])


def test_churn_is_the_share_of_items_of_which_some_code_has_changed():
    now = CODES.clone()
    now[0, 1], now[3] = 3, torch.tensor([1, 1])
    assert churn(now, CODES) == pytest.approx(2 / 6)
    assert churn(CODES, CODES) == 0
    with pytest.raises(InputError, match=r"\(6, 2\) and those before \(5, 2\) are not of the same items"):
        churn(CODES, CODES[:5])


def test_a_state_logs_what_is_known_and_leaves_out_what_is_not():
    bare = codebook_state(table(CODES))
    assert bare.metrics() == usage_metrics(table(CODES))
    full = codebook_state(table(CODES), torch.tensor([0.5, 0.25]), 0.1, CODES.flip(0))
    more = {
        "residual_norm@1": 0.5,
        "residual_norm@2": 0.25,
        "reconstruction_error": 0.1,
        "churn": churn(CODES, CODES.flip(0)),
    }
    assert full.metrics() == usage_metrics(table(CODES)) | more
    assert full.usage.counts.tolist() == [[4, 0, 2, 0], [1, 3, 1, 1]]
