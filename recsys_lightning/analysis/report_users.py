"""Example users: what they had, what came next, and what each run recommends them, with what produced it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from recsys_lightning.analysis.report_blocks import Block, ExampleUser, ListedItem, Paragraph, Section, UserList
from recsys_lightning.analysis.report_cards import NO_NAMES, CodeNames
from recsys_lightning.analysis.report_opened import OpenedRun, item_titles, shown_codes
from recsys_lightning.analysis.study_run import Progress, draw_users
from recsys_lightning.data.sequences import SequenceBatch
from recsys_lightning.errors import InputError
from recsys_lightning.models.recommender import Recommender
from recsys_lightning.models.sparc import SPARC
from recsys_lightning.retrieval.index import Found, ItemIndex
from recsys_lightning.retrieval.recommendations import Recommendations
from recsys_lightning.retrieval.soft_search import Cells, merge_interests, search_cells

HISTORY, INTERESTS = 8, 4  # items and interests of a user that are shown


class Origin(NamedTuple):
    """What produced each item of a user's list, and what the model thinks the user wants; empty where it is silent."""

    items: list[str]
    interests: str


def example_users(
    runs: Sequence[OpenedRun],
    number: int,
    places: int,
    seed: int,
    codes: Mapping[str, CodeNames],
    progress: Progress,
) -> Section:
    """Users of the test split, drawn at random, each with the lists of all runs on the same data.

    Args:
        runs: opened.
        number: users to draw.
        places: of each list.
        seed: of the draw.
        codes: names of the level-1 codes of each run that has cards.
        progress: told of each run.
    """
    found: dict[tuple[str, int], ExampleUser] = {}
    remarks: list[str] = []
    recommenders = [run for run in runs if run.studied is not None]
    for at, run in enumerate(recommenders):
        progress("example users", at, len(recommenders))
        try:
            made = _of_run(run, number, places, seed, codes.get(run.name, NO_NAMES))
        except InputError as error:
            remarks.append(f"{run.name}: {error}.")
            continue
        for key, user in made.items():
            if key in found:
                user = replace(user, lists=[*found[key].lists, *user.lists])
            found[key] = user
    if recommenders:
        progress("example users", len(recommenders), len(recommenders))
    note = Paragraph(
        f"{number} users of the test split, drawn with seed {seed}; the first {places} places of their lists, items "
        "they had already met included. An answer is a held-out item that came next."
    )
    blocks: list[Block] = [note, *found.values(), *map(Paragraph, remarks)] if found else []
    return Section("users", "Example users", blocks, " ".join(remarks) or "No run recommends items.")


def _of_run(
    run: OpenedRun, number: int, places: int, seed: int, codes: CodeNames
) -> dict[tuple[str, int], ExampleUser]:
    """Users by the data that they are of and their number."""
    studied = run.studied
    assert studied is not None  # noqa: S101 - see example_users
    data, titles = studied.data, item_titles(run.catalog)
    fingerprint = str(data.data.fingerprint)
    found = {}
    with torch.inference_mode():
        index = studied.model.build_index()
        for batch in draw_users(studied, "test", number, seed).batches:
            batch = batch.to(studied.device)
            # At least as long as most evaluations look, so that the rank of an answer further down can be told.
            listed = studied.model.recommend(batch, max(places, 100), index)
            origins = origins_of(studied.model, batch, listed, index, codes.words)
            for row in range(len(batch)):
                user = int(batch.user[row])
                shown = _user_list(run, batch, listed, origins[row], row, places, titles, codes)
                seen = [item for item in batch.seen[row].tolist() if item]
                answers = [titles[item] for item in batch.target[row].tolist() if item]
                history = [titles[item] for item in reversed(seen[-HISTORY:])]
                name = str(data.data.user_ids[user])
                earlier = len(seen) - len(history)
                found[fingerprint, user] = ExampleUser(name, history, earlier, answers, [shown])
    return found


def _user_list(
    run: OpenedRun,
    batch: SequenceBatch,
    listed: Recommendations,
    origin: Origin,
    row: int,
    places: int,
    titles: Sequence[str],
    names: CodeNames,
) -> UserList:
    items = [item for item in listed.item_ids[row].tolist() if item]
    answers = {item for item in batch.target[row].tolist() if item}
    seen = set(batch.seen[row].tolist())
    made = []
    for place, item in enumerate(items[:places]):
        codes = run.table.codes[item] if run.table is not None else None
        made.append(
            ListedItem(
                rank=place + 1,
                title=titles[item],
                semantic_id="" if codes is None else shown_codes(codes),
                origin=origin.items[place],
                hit=item in answers,
                seen=item in seen,
                card="" if codes is None else names.card(int(codes[0])),
            )
        )
    ranks = [items.index(answer) + 1 for answer in answers if answer in items]
    found = bool(ranks) and min(ranks) <= places
    verdict = f"answer at rank {min(ranks)}" if ranks else f"answer not in the first {len(items)}"
    if len(answers) > 1:
        within = sum(rank <= places for rank in ranks)
        verdict = f"{within} of {len(answers)} answers in the first {places}"
    return UserList(run.name, verdict, found, made, origin.interests)


def origins_of(
    model: Recommender,
    batch: SequenceBatch,
    listed: Recommendations,
    index: ItemIndex,
    words: Mapping[int, str],
) -> list[Origin]:
    """What produced each place of each list, in words.

    Of SPARC the interest that gives the item most, by the merge that made the list, with its probability among all
    codes; of models that generate semantic IDs the beam that holds the item; of others nothing.

    Args:
        model: that made the lists.
        batch: users (B,).
        listed: lists (B, R) of the whole catalogue.
        index: that they were made with.
        words: of level-1 codes.
    """
    if isinstance(model, SPARC) and model.has_codes:
        return _interests(model, batch, listed, index, words)
    trie = model.prefix_trie
    if listed.generated is not None and trie is not None:
        leaves, log_probs = listed.generated
        at = leaves[:, None, :] == trie.leaf_of_item[listed.item_ids][..., None]  # (B, R, M)
        found = []
        for held, chances in zip(at, log_probs, strict=True):
            beams = held.long().argmax(1)  # (R,)
            known = [
                f"beam {beam + 1} (p {_chance(float(chances[beam].exp()))})" if inside else "outside the beams"
                for beam, inside in zip(beams.tolist(), held.any(1).tolist(), strict=True)
            ]
            found.append(Origin(known, ""))
        return found
    return [Origin([""] * listed.item_ids.shape[1], "") for _ in range(len(batch))]


def _interests(
    model: SPARC, batch: SequenceBatch, listed: Recommendations, index: ItemIndex, words: Mapping[int, str]
) -> list[Origin]:
    search = model.search
    chances = (model.interest_logits(batch) / search.temperature).softmax(-1)  # (B, C)
    best = chances.topk(search.num_interests)
    code, interest_of = best.indices, _credited(model, batch, listed, index, best.indices, best.values.log())
    found = []
    for row in range(len(batch)):
        likely = [
            f"{int(code[row, at])} (p {_chance(float(best.values[row, at]))})" + _meaning(words, int(code[row, at]))
            for at in range(min(INTERESTS, code.shape[1]))
        ]
        items = []
        for at in interest_of[row].tolist():
            shown = f"interest {int(code[row, at])} (p {_chance(float(best.values[row, at]))})" if at >= 0 else ""
            items.append(shown)
        found.append(Origin(items, "Likeliest interests: " + "; ".join(likely)))
    return found


def _credited(
    model: SPARC, batch: SequenceBatch, listed: Recommendations, index: ItemIndex, codes: Tensor, log_probs: Tensor
) -> Tensor:
    """(B, R) which of a user's interests (B, K) gives an item most: the one whose list alone, merged, scores it best.

    -1 where none of their lists holds the item.
    """
    search = model.search
    chosen = torch.zeros_like(log_probs) if search.interests == "uniform" else log_probs
    chosen = chosen.log_softmax(-1)
    queries = model.interest_queries(batch, codes)  # (B, K, D)
    length = min(search.per_interest or listed.item_ids.shape[1], index.num_items)
    if search.restrict_to_code:
        level1 = torch.cat([codes.new_full((1,), -1), model.item_codes()[:, 0]])
        lists = search_cells(index, queries, length, Cells(level1, codes))
    else:
        flat = index.search_with_ties(queries.flatten(0, 1), length)
        lists = Found(*(part.view(*queries.shape[:2], -1) for part in flat))
    given = []
    for at in range(codes.shape[1]):
        alone = Found(lists.scores[:, at : at + 1], lists.item_ids[:, at : at + 1])
        width = alone.item_ids.shape[2]
        merged = merge_interests(alone, chosen[:, at : at + 1], width, search.merge, search.score_temperature)
        same = (listed.item_ids[:, :, None] == merged.item_ids[:, None, :]) & (merged.item_ids > 0)[:, None, :]
        scores = merged.scores[:, None, :].expand_as(same)
        given.append(scores.masked_fill(~same, -torch.inf).amax(-1))  # (B, R)
    scored = torch.stack(given, -1)  # (B, R, K)
    return torch.where(scored.amax(-1) > -torch.inf, scored.argmax(-1), -1)


def _meaning(words: Mapping[int, str], code: int) -> str:
    return f" {words[code]}" if words.get(code) else ""


def _chance(value: float) -> str:
    return f"{value:.2f}" if value >= 0.01 else f"{value:.1g}"
