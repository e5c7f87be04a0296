"""What a run says of its codebooks when it ends: a row a level, and what is wrong with them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from recsys_lightning.semantic_ids.health import CodebookState

# Half of the codes, used evenly, have a perplexity of half the size: rounding must not lift it above that.
_ROUNDING = 1e-6


class CodebookLevel(NamedTuple):
    """How the whole catalogue uses the codebook of one level."""

    level: int  # from 1, the coarsest
    perplexity: float  # the number of evenly used codes of the same entropy
    size: int  # codes K
    entropy: float  # share of log K, as `entropy@l` in the logs
    dead_codes: int  # codes that no item has
    gini: float  # of the items a code
    residual_norm: float | None = None  # share of a vector's length that is left after this level

    def is_collapsed(self, min_perplexity_share: float) -> bool:
        """Whether the perplexity is at or below a share of the size; at a share of 0 nothing is."""
        return self.perplexity <= min_perplexity_share * self.size * (1 + _ROUNDING)


@dataclass(frozen=True)
class CodebookReport:
    """The codebooks of a model at the end of a command.

    Attributes:
        judged: the weights it tells of, in words.
        levels: the coarsest first; none where the codebooks are not initialised yet, as in a warm-up.
        min_perplexity_share: of the size of level 1; a perplexity at or below it is a collapse. 0: nothing is.
        whole: what is no matter of one level: ``cells``, ``collision_rate``, ``largest_cell``,
            ``reconstruction_error``.
        num_events: warnings and repairs in the run's ``codebook-events.jsonl``.
        stopped: why training was stopped for its codebooks, in words; None if it was not.
    """

    judged: str
    levels: tuple[CodebookLevel, ...]
    min_perplexity_share: float
    whole: Mapping[str, float] = field(default_factory=dict)
    num_events: int = 0
    stopped: str | None = None

    @property
    def collapsed(self) -> bool:
        """Whether too few codes of level 1 carry the catalogue."""
        return any(level.is_collapsed(self.min_perplexity_share) for level in self.levels[:1])

    @property
    def warning(self) -> str | None:
        """What is wrong with the codebooks, a line each; None if they are well and training was not stopped."""
        lines = [] if self.stopped is None else [f"WARNING: training was stopped: {self.stopped}"]
        if not self.levels:
            lines.append(f"WARNING: {self.judged} is of the warm-up: its codebooks are not initialised yet")
        elif self.collapsed:
            first = self.levels[0]
            lines.append(
                f"WARNING: the level-1 codebook of {self.judged} has collapsed: perplexity {first.perplexity:.1f} of "
                f"{first.size} codes, at or below {self.min_perplexity_share:g} of its size"
            )
        return "\n".join(lines) or None

    def record(self) -> dict[str, Any]:
        """Its entries in ``results.json``."""
        return {
            "codebooks": [level._asdict() for level in self.levels],
            "codebooks_whole": dict(self.whole),
            "collapsed": self.collapsed,
            "codebook_events": self.num_events,
        }


def codebook_levels(state: CodebookState | None) -> tuple[CodebookLevel, ...]:
    """The use of each level's codes by all items, the coarsest level first; nothing of no state."""
    if state is None:
        return ()
    usage, size = state.usage, state.table.num_codes
    norms = [None] * state.table.num_levels if state.residual_norm is None else state.residual_norm.tolist()
    columns = (usage.perplexity, usage.entropy_share, usage.num_dead, usage.gini)
    rows = zip(*(column.tolist() for column in columns), norms, strict=True)
    return tuple(
        CodebookLevel(level, perplexity, size, entropy, int(dead), gini, norm)
        for level, (perplexity, entropy, dead, gini, norm) in enumerate(rows, start=1)
    )


def whole_figures(state: CodebookState | None) -> dict[str, float]:
    """What `CodebookReport.whole` holds of a state; nothing of none."""
    wanted = ("cells", "collision_rate", "largest_cell", "reconstruction_error")
    return {} if state is None else {name: value for name, value in state.metrics().items() if name in wanted}
