"""A made-up catalogue whose best possible recommender is known.

Axis letters: U users, T steps, I items, C topics, N items of a topic, B rows.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from recsys_lightning.data.rejects import RejectLog
from recsys_lightning.data.sources.source import RawData, Source
from recsys_lightning.errors import InputError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_FIRST_DAY_S = 1_388_534_400  # 2014-01-01
_SPAN_S = 2 * 365 * 86_400
_MEAN_GAP_S = 3 * 86_400

_CONSONANTS = "bdfgklmnprstvz"
_VOWELS = "aeiou"
_SYLLABLES = tuple(consonant + vowel for consonant in _CONSONANTS for vowel in _VOWELS)

_WORDS_PER_THEME = 6
_WORDS_PER_TOPIC = 8
_BRANDS_PER_TOPIC = 3
_NUM_NOISE_WORDS = 60


class Synthetic(Source):
    """Users who wander between topics, and the exact odds of their next item.

    Topics stand in a two-level hierarchy, `num_themes` themes of equally many topics. A user's topics are a Markov
    chain (`transition_matrix`): mostly on to the next topic of the same theme, sometimes to the neighbouring theme,
    sometimes the user stays, and now and then jumps anywhere. Within a topic an item is taken by Zipf's law
    (`item_distribution`), whatever was taken before. So the next item depends on the last one alone, through its topic,
    and `best_recall` and `best_ndcg` are what the best of all rankings is expected to reach.

    Titles, brands, categories and descriptions are made of invented words of the topic, its theme and of noise, so that
    text, semantic IDs and behaviour agree.

    Exactness: items are drawn with replacement, so a user meets items again, and the bounds hold for the unfiltered
    protocol only, not where seen items are removed from the ranking. They hold for the data as generated: a k-core
    would remove rare items and with them a part of the process, so experiments use ``k_core: 0`` with this source.
    With the default sizes every item is expected more than ten times, so a 5-core would remove next to nothing.

    Everything is a function of the settings and the seed; the catalogue does not depend on the number of users.

    Args:
        num_users: number of users.
        num_themes: number of themes.
        topics_per_theme: number of topics of each theme.
        items_per_topic: number of items of each topic.
        min_length: the shortest history.
        max_length: the longest history; lengths are uniform in between.
        zipf: exponent of item popularity within a topic; 0 makes all items alike.
        topic_zipf: exponent of topic popularity, which rules first topics and jumps.
        main: probability of the next topic of the same theme.
        second: probability of the same place in the next theme.
        stay: probability of the same topic; the rest, ``1 - main - second - stay``, are jumps.
        seed: seed of everything.
    """

    def __init__(
        self,
        num_users: int = 3000,
        num_themes: int = 4,
        topics_per_theme: int = 4,
        items_per_topic: int = 25,
        min_length: int = 6,
        max_length: int = 20,
        zipf: float = 1.0,
        topic_zipf: float = 0.5,
        main: float = 0.5,
        second: float = 0.2,
        stay: float = 0.15,
        seed: int = 0,
    ) -> None:
        counts = {
            "num_users": num_users,
            "num_themes": num_themes,
            "topics_per_theme": topics_per_theme,
            "items_per_topic": items_per_topic,
            "min_length": min_length,
        }
        for key, count in counts.items():
            if count < 1:
                raise InputError(f"{key} is {count}; give at least 1")
        if max_length < min_length:
            raise InputError(f"max_length is {max_length}, below min_length {min_length}; swap them")
        if min(zipf, topic_zipf) < 0:
            raise InputError(f"zipf is {zipf} and topic_zipf {topic_zipf}; neither may be negative")
        if min(main, second, stay) < 0 or main + second + stay > 1 + 1e-9:
            raise InputError(f"main {main}, second {second} and stay {stay} must not be negative or exceed 1 in sum")
        if seed < 0:
            raise InputError(f"seed is {seed}; give 0 or more")
        self.num_users = num_users
        self.num_themes = num_themes
        self.topics_per_theme = topics_per_theme
        self.items_per_topic = items_per_topic
        self.min_length = min_length
        self.max_length = max_length
        self.zipf = zipf
        self.topic_zipf = topic_zipf
        self.main = main
        self.second = second
        self.stay = stay
        self.seed = seed

    @property
    def name(self) -> str:
        """``synthetic``."""
        return "synthetic"

    @property
    def settings(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {
            "num_users": self.num_users,
            "num_themes": self.num_themes,
            "topics_per_theme": self.topics_per_theme,
            "items_per_topic": self.items_per_topic,
            "min_length": self.min_length,
            "max_length": self.max_length,
            "zipf": self.zipf,
            "topic_zipf": self.topic_zipf,
            "main": self.main,
            "second": self.second,
            "stay": self.stay,
            "seed": self.seed,
        }

    @property
    def num_topics(self) -> int:
        """The number of topics of all themes."""
        return self.num_themes * self.topics_per_theme

    @property
    def num_items(self) -> int:
        """The number of items of all topics."""
        return self.num_topics * self.items_per_topic

    def files(self, raw_dir: Path) -> list[Path]:
        """No files: the data is made."""
        return []

    def read(self, raw_dir: Path) -> RawData:
        """Make the data; `raw_dir` is not used."""
        interactions = self._interactions()
        items = self._items()
        rejects = RejectLog()
        for what, table in (("interactions", interactions), ("items", items)):
            rejects.read(what, table.height)
            rejects.keep(what, table.height)
        return RawData(interactions, items, rejects)

    @cached_property
    def transitions(self) -> Floats:
        """Probability of the next topic (column) after a topic (row)."""
        return transition_matrix(
            self.num_themes, self.topics_per_theme, self.main, self.second, self.stay, self.topic_zipf
        )  # (C, C)

    @cached_property
    def item_ids(self) -> list[str]:
        """Raw ids of all items, in the order of the columns of `next_item_probabilities`: by topic, the popular first.

        The number in an id is shuffled and says nothing about the item.
        """
        numbers = np.random.default_rng([self.seed, 0]).permutation(self.num_items)
        width = len(str(self.num_items))
        return [f"i{number:0{width}d}" for number in numbers]

    @cached_property
    def topic_of_item(self) -> dict[str, int]:
        """The topic of each raw item id."""
        return {item: position // self.items_per_topic for position, item in enumerate(self.item_ids)}

    def next_item_probabilities(self, last_items: Sequence[str]) -> Floats:
        """The odds of each item to come next, given the raw id of the last one.

        Returns:
            (B, I), columns in the order of `item_ids`; each row sums to 1.
        """
        return self._next_item_table[self._topics(last_items)]

    def best_recall(self, last_items: Sequence[str], k: int) -> float:
        """Expected Recall@k of the best ranking, averaged over users with these last items.

        No ranking by any function of the history is expected to reach more: the k most probable items are in front.
        """
        return float(self._best_gains(k, np.ones(k))[self._topics(last_items)].mean())

    def best_ndcg(self, last_items: Sequence[str], k: int) -> float:
        """Expected NDCG@k of the best ranking, averaged over users with these last items."""
        return float(self._best_gains(k, 1 / np.log2(np.arange(k) + 2))[self._topics(last_items)].mean())

    @cached_property
    def _next_item_table(self) -> Floats:
        within = item_distribution(self.items_per_topic, self.zipf)  # (N,)
        return np.asarray(np.kron(self.transitions, within), dtype=np.float64)  # (C, I)

    def _best_gains(self, k: int, gains: Floats) -> Floats:
        best = -np.sort(-self._next_item_table, axis=1)[:, :k]  # (C, k)
        return np.asarray(best @ gains[: best.shape[1]], dtype=np.float64)  # (C,)

    def _topics(self, items: Sequence[str]) -> Ints:
        unknown = [item for item in items if item not in self.topic_of_item]
        if unknown:
            raise InputError(f"item {unknown[0]!r} is not of this catalogue; use the source that made the data")
        return np.array([self.topic_of_item[item] for item in items], dtype=np.int64)  # (B,)

    def _interactions(self) -> pl.DataFrame:
        rng = np.random.default_rng([self.seed, 1])
        num_users, num_steps = self.num_users, self.max_length
        lengths = rng.integers(self.min_length, self.max_length + 1, num_users)  # (U,)
        topics = self._walk(rng)  # (U, T)
        within = item_distribution(self.items_per_topic, self.zipf)  # (N,)
        ranks = _draw(np.cumsum(within), rng.random((num_users, num_steps)))  # (U, T)
        items = topics * self.items_per_topic + ranks  # (U, T)
        starts = rng.integers(_FIRST_DAY_S, _FIRST_DAY_S + _SPAN_S, (num_users, 1))
        # At least a second apart: the time alone tells the order, and no two rows of a user are equal.
        gaps = 1 + rng.exponential(_MEAN_GAP_S, (num_users, num_steps)).astype(np.int64)
        times = starts + np.cumsum(gaps, axis=1)  # (U, T)
        used = np.arange(num_steps) < lengths[:, None]  # (U, T)
        width = len(str(num_users))
        users = np.array([f"u{number:0{width}d}" for number in range(num_users)])
        log = pl.DataFrame(
            {
                "user_id": users[np.nonzero(used)[0]],
                "item_id": np.array(self.item_ids)[items[used]],
                "timestamp": times[used],
            }
        )
        return log.sort("timestamp", maintain_order=True)

    def _walk(self, rng: np.random.Generator) -> Ints:
        """The topics of all users, a step at a time."""
        uniform = rng.random((self.num_users, self.max_length))  # (U, T)
        topics = np.empty(uniform.shape, dtype=np.int64)  # (U, T)
        cumulated = np.cumsum(self.transitions, axis=1)  # (C, C)
        shares = item_distribution(self.num_topics, self.topic_zipf)  # (C,)
        topics[:, 0] = _draw(np.cumsum(shares), uniform[:, 0])
        for step in range(1, self.max_length):
            rows = cumulated[topics[:, step - 1], :-1]  # (U, C - 1)
            topics[:, step] = (uniform[:, step, None] >= rows).sum(axis=1)
        return topics

    def _items(self) -> pl.DataFrame:
        rng = np.random.default_rng([self.seed, 2])
        vocabulary = iter(_words(rng, self._num_words))
        noise = [next(vocabulary) for _ in range(_NUM_NOISE_WORDS)]
        rows: list[tuple[str, str, str, str, str]] = []
        for theme in range(self.num_themes):
            theme_words = [next(vocabulary) for _ in range(_WORDS_PER_THEME)]
            for topic in range(self.topics_per_theme):
                topic_words = [next(vocabulary) for _ in range(_WORDS_PER_TOPIC)]
                brands = [next(vocabulary) for _ in range(_BRANDS_PER_TOPIC)]
                first = (theme * self.topics_per_theme + topic) * self.items_per_topic
                for item_id in self.item_ids[first : first + self.items_per_topic]:
                    texts = _item_texts(rng, theme_words, topic_words, noise, brands, next(vocabulary))
                    rows.append((item_id, *texts))
        columns = ("item_id", "title", "brand", "categories", "description")
        table = pl.DataFrame(rows, schema=dict.fromkeys(columns, pl.String), orient="row")
        return table.sort("item_id")  # by topic, the popular first, would give the answer away

    @property
    def _num_words(self) -> int:
        per_topic = _WORDS_PER_TOPIC + _BRANDS_PER_TOPIC + self.items_per_topic
        return _NUM_NOISE_WORDS + self.num_themes * _WORDS_PER_THEME + self.num_topics * per_topic


def transition_matrix(
    num_themes: int, topics_per_theme: int, main: float, second: float, stay: float, topic_zipf: float
) -> Floats:
    """Probability of the next topic (column) after a topic (row), topics counted theme by theme.

    ``main`` leads to the next topic of the same theme (after the last comes the first), ``second`` to the same place in
    the next theme, ``stay`` to the topic itself, and what is left anywhere, by popularity of the topics.

    Returns:
        (C, C), rows sum to 1.
    """
    num_topics = num_themes * topics_per_theme
    topics = np.arange(num_topics)
    themes, places = topics // topics_per_theme, topics % topics_per_theme
    jump = max(0.0, 1 - main - second - stay)
    matrix = np.tile(jump * item_distribution(num_topics, topic_zipf), (num_topics, 1))  # (C, C)
    matrix[topics, themes * topics_per_theme + (places + 1) % topics_per_theme] += main
    matrix[topics, (themes + 1) % num_themes * topics_per_theme + places] += second
    matrix[topics, topics] += stay
    return np.asarray(matrix / matrix.sum(axis=1, keepdims=True), dtype=np.float64)


def item_distribution(num_items: int, zipf: float) -> Floats:
    """Zipf's law: the share of rank r is proportional to ``r ** -zipf``.

    Returns:
        (num_items,), sums to 1, the largest first.
    """
    weights = np.arange(1, num_items + 1, dtype=np.float64) ** -zipf
    return np.asarray(weights / weights.sum(), dtype=np.float64)


def _draw(cumulated: Floats, uniform: Floats) -> Ints:
    """Ranks by inversion of a cumulated distribution."""
    # Without the last bound, which rounding may leave just below 1, the last rank takes what is left.
    return np.searchsorted(cumulated[:-1], uniform, side="right").astype(np.int64)


def _words(rng: np.random.Generator, count: int) -> list[str]:
    """Different pronounceable words."""
    base = len(_SYLLABLES)
    num_syllables = 3
    while base**num_syllables < 2 * count:
        num_syllables += 1
    codes = rng.choice(base**num_syllables, size=count, replace=False)
    digits = codes[:, None] // base ** np.arange(num_syllables) % base  # (count, num_syllables)
    return ["".join(_SYLLABLES[digit] for digit in word) for word in digits]


def _item_texts(
    rng: np.random.Generator,
    theme_words: list[str],
    topic_words: list[str],
    noise: list[str],
    brands: list[str],
    own_word: str,
) -> tuple[str, str, str, str]:
    """Title, brand, categories and description of one item; its own word makes the title unique."""

    def some(words: list[str], count: int) -> list[str]:
        return [words[position] for position in rng.choice(len(words), size=count, replace=False)]

    title = " ".join([own_word, *some(topic_words, 2), *some(theme_words, 1), *some(noise, 1)]).title()
    brand = some(brands, 1)[0].title()
    categories = f"{theme_words[0]} > {topic_words[0]}".title()
    body = some(some(topic_words, 5) + some(theme_words, 3) + some(noise, 3), 11)
    return title, brand, categories, " ".join(body).capitalize() + "."
