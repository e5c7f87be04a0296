"""The studies that `recsys study` knows: what each is of, its options, and how it is made of them."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from recsys_lightning.errors import InputError

if TYPE_CHECKING:
    from recsys_lightning.analysis.study_report import Findings
    from recsys_lightning.models.recommender import Recommender

Add = Callable[..., object]  # of an argument parser
Runs = Sequence[Any]  # `StudiedRun`s of the models that the study is of, or `CodedRun`s
Report = Callable[[str, int, int], None]


class Study(NamedTuple):
    """A study.

    Attributes:
        line: what it tells, in a line.
        kinds: the models whose runs it is of; imported only when asked for. None takes whatever gives items semantic
            IDs, tables in files among them.
        add: adds its options to a parser.
        make: from the runs, the parsed options and what is told of progress.
        several: what becomes of several runs; None takes one only.
        draws: what is drawn at random.
    """

    line: str
    kinds: "Callable[[], tuple[type[Recommender], ...]] | None"
    add: Callable[[Add], None]
    make: "Callable[[Runs, argparse.Namespace, Report], Findings]"
    several: str | None = None
    draws: Literal["users", "items", "nothing"] = "users"


def _add_fusion(add: Add) -> None:
    from recsys_lightning.analysis.study_fusion import BEAMS, PSIS, TAUS

    add("--stage", choices=("val", "test"), default="val", help="whose users")
    add("--k", type=count, default=50, help="places over which diversity and the recall of the picture are taken")
    add("--beams", type=count, nargs="+", default=list(BEAMS), metavar="M", help="numbers of beams")
    add("--taus", type=float, nargs="+", default=list(TAUS), metavar="TAU", help="weights of the beam score")
    add("--psis", type=float, nargs="+", default=list(PSIS), metavar="PSI", help="weights of the cosine")


def _add_temperature(add: Add) -> None:
    from recsys_lightning.analysis.study_sparc_temperature import TEMPERATURES, WEIGHTED

    _add_split(add)
    add("--temperatures", type=float, nargs="+", default=list(TEMPERATURES), metavar="T", help="beside both limits")
    add("--merges", choices=WEIGHTED, nargs="+", default=list(WEIGHTED), help="how lists are merged, beside max")
    add("--num_interests", type=count, metavar="K", help="interests a user; the run's own")


def _add_interests(add: Add) -> None:
    _add_split(add)
    add("--numbers", type=count, nargs="+", metavar="K", help="of interests; 1, 2, 4 .. 64 and the run's own")
    add("--calls", type=count, default=50, help="of which the cost of one user is the median")


def _add_codes(add: Add) -> None:
    from recsys_lightning.analysis.codes_facts import LEVELS
    from recsys_lightning.analysis.codes_measures import CATEGORIES

    add("--before", metavar="CHECKPOINT", help="set this earlier checkpoint of the one run before it")
    add("--field", help=f"of the catalogue, with paths of categories; {CATEGORIES!r} where there is one")
    add("--levels", type=count, nargs="+", default=list(LEVELS), metavar="LEVEL", help="of the categories")
    add("--code_levels", type=count, nargs="+", default=[1, 2], metavar="LEVEL", help="of the codes that are described")
    add("--min_items", type=count, default=2, help="of a code of level 2 and on that is described")
    add("--text_fields", nargs="+", metavar="FIELD", help="whose words are counted; title, brand and description")
    add("--shown", type=count, default=32, help="codes of a level in the report, the largest; the CSV file has all")


def _add_split(add: Add) -> None:
    add("--stage", choices=("val", "test"), default="val", help="whose users")
    add("--k", type=count, default=50, help="places over which everything is measured")


def _add_cosines(add: Add) -> None:
    add("--semantic_ids", type=Path, metavar="FILE", help="take these IDs for all runs, instead of their own")


def _add_learned(add: Add) -> None:
    add("--mode", choices=("global", "per_id"), help="domain of the softmax over cosines; the run's own")
    add("--epochs", type=count, default=30, help="passes over the training users")
    add("--lr", type=float, default=0.01, help="learning rate")
    add("--hidden", type=count, default=16, help="width of the network's hidden layer")
    add("--resamples", type=count, default=10_000, help="of the bootstrap")


def _fusion(runs: Runs, given: argparse.Namespace, progress: Report) -> "Findings":
    from recsys_lightning.analysis.study_fusion import FusionGrid, fusion_study

    lists = {"beams": tuple(given.beams), "taus": tuple(given.taus), "psis": tuple(given.psis)}
    grid = FusionGrid(**lists, k=given.k, stage=given.stage, users=given.users, seed=given.seed)
    return fusion_study(runs[0], grid, progress)


def _cosines(runs: Runs, given: argparse.Namespace, progress: Report) -> "Findings":
    from recsys_lightning.analysis.study_cosines import cosine_study

    return cosine_study(runs, given.semantic_ids, given.seed, progress)


def _learned(runs: Runs, given: argparse.Namespace, progress: Report) -> "Findings":
    from recsys_lightning.analysis.study_learned import Teaching
    from recsys_lightning.analysis.study_learned_report import learned_study

    if given.resamples < 100:
        raise InputError(f"study learned-fusion: --resamples {given.resamples}: an interval needs at least 100")
    teaching = Teaching(epochs=given.epochs, lr=given.lr, hidden=given.hidden, seed=given.seed)
    return learned_study(runs[0], teaching, given.mode, given.users, progress, given.resamples)


def _temperature(runs: Runs, given: argparse.Namespace, progress: Report) -> "Findings":
    from recsys_lightning.analysis.study_sparc_temperature import TemperatureGrid, temperature_study

    grid = TemperatureGrid(
        temperatures=tuple(given.temperatures),
        merges=tuple(given.merges),
        num_interests=given.num_interests,
        k=given.k,
        stage=given.stage,
        users=given.users,
        seed=given.seed,
    )
    return temperature_study(runs, grid, progress)


def _interests(runs: Runs, given: argparse.Namespace, progress: Report) -> "Findings":
    from recsys_lightning.analysis.study_sparc_interests import InterestGrid
    from recsys_lightning.analysis.study_sparc_interests_report import interest_study

    numbers = tuple(given.numbers) if given.numbers else None
    users, calls = given.users, given.calls
    grid = InterestGrid(numbers=numbers, k=given.k, stage=given.stage, users=users, calls=calls, seed=given.seed)
    return interest_study(runs, grid, progress)


def _codes(runs: Runs, given: argparse.Namespace, progress: Report) -> "Findings":
    from recsys_lightning.analysis.codes_study import CodeStudy, code_study

    asked = CodeStudy(
        field=given.field,
        levels=tuple(given.levels),
        code_levels=tuple(given.code_levels),
        min_items=given.min_items,
        text_fields=tuple(given.text_fields) if given.text_fields else None,
        shown=given.shown,
        seed=given.seed,
    )
    return code_study(runs, asked, progress)


def _add_tokenizers(add: Add) -> None:
    from recsys_lightning.analysis.codes_measures import CATEGORIES
    from recsys_lightning.analysis.study_tokenizers import Bench

    usual = Bench()
    add(
        "--metrics",
        nargs="+",
        default=list(usual.metrics),
        metavar="METRIC",
        help="of the tests; figures foretell the first",
    )
    add("--field", default=CATEGORIES, help="of the catalogue, with paths of categories")
    add("--level", type=count, default=usual.level, help="of the categories")


def _tokenizers(runs: Runs, given: argparse.Namespace, progress: Report) -> "Findings":
    from recsys_lightning.analysis.study_tokenizers import Bench
    from recsys_lightning.analysis.study_tokenizers_report import tokenizer_study

    return tokenizer_study(runs, Bench(tuple(given.metrics), given.field, given.level), progress)


def _cobra() -> "tuple[type[Recommender], ...]":
    from recsys_lightning.models.cobra import COBRA

    return (COBRA,)


def _sparc() -> "tuple[type[Recommender], ...]":
    from recsys_lightning.models.sparc import SPARC

    return (SPARC,)


def natural(text: str) -> int:
    """A whole number of 0 or more, for argparse."""
    return _whole(text, 0)


def count(text: str) -> int:
    """A whole number of 1 or more, for argparse."""
    return _whole(text, 1)


def _whole(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of {least} or more")
    return int(text)


STUDIES = {
    "fusion": Study(
        "COBRA: recall and diversity of BeamFusion over M, tau, psi and the mode, without training again",
        _cobra,
        _add_fusion,
        _fusion,
    ),
    "cosines": Study(
        "COBRA: how near item vectors are within and between semantic IDs, and pictures of them",
        _cobra,
        _add_cosines,
        _cosines,
        several="several are set side by side",
        draws="items",
    ),
    "learned-fusion": Study(
        "COBRA: tau and psi as functions of the user, learned on the training split, against fixed ones",
        _cobra,
        _add_learned,
        _learned,
    ),
    "temperature": Study(
        "SPARC: recall, coverage and diversity of soft search over its temperature, merge by merge",
        _sparc,
        _add_temperature,
        _temperature,
        several="of several, which may differ in their seed alone, the mean is taken",
    ),
    "interests": Study(
        "SPARC: recall, tail recall and cost over the number of interests, and how right these are",
        _sparc,
        _add_interests,
        _interests,
        several="of those that differ in their seed alone the mean is taken, others stand side by side",
    ),
    "codes": Study(
        "what codes stand for, how far they agree with categories and foretell the next item, and how runs differ",
        None,
        _add_codes,
        _codes,
        several="further ones are compared with the first; tokenizers' runs and files of semantic IDs can be named too",
        draws="items",
    ),
    "tokenizers": Study(
        "COBRA: tokenizers side by side, by what their codes look like and by the recall that they lead to",
        _cobra,
        _add_tokenizers,
        _tokenizers,
        several="one a tokenizer, and of those that differ in their seed alone the mean is taken",
        draws="nothing",
    ),
}
