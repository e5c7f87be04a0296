"""How long a call takes: several searches timed in turns, and what their samples say."""

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

Search = Callable[[int], Tensor]  # answers one input, given by number

MIN_CALLS_P99 = 100  # below it, a p99 is merely the slowest call
TURN = 16  # calls that a search is timed for before the next search has its turn
WARM_UP = 2  # calls at the start of a turn that are not counted


@dataclass
class Timing:
    """What was seen of one search."""

    seconds: list[float] = field(default_factory=list)  # of each counted call
    answers: dict[int, Tensor] = field(default_factory=dict)  # by number of the input, from counted calls
    gave_up: str = ""  # why there are no counted calls, or nothing

    def percentile(self, percent: float) -> float | None:
        """Milliseconds that `percent` of the calls stay within; None where there are too few calls to say."""
        calls = len(self.seconds)
        if calls == 0 or (percent > 50 and calls < MIN_CALLS_P99):
            return None
        return float(np.percentile(self.seconds, percent)) * 1000

    def is_done(self, repeats: int, seconds: float) -> bool:
        """Whether there are `repeats` counted calls, or `seconds` of them."""
        return len(self.seconds) >= repeats or math.fsum(self.seconds) >= seconds

    @property
    def calls_per_second(self) -> float | None:
        """Counted calls by the time they took together."""
        return len(self.seconds) / math.fsum(self.seconds) if self.seconds else None


def time_in_turns(
    searches: Sequence[Search],
    num_inputs: int,
    repeats: int,
    seconds: float,
    finish: Callable[[], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Timing]:
    """Time searches, a few calls of each in turn, so that what disturbs the machine meanwhile meets all of them.

    Each turn begins with calls that are not counted: they bring caches and frequency back to this search. Python's
    garbage collector is off. A search whose call alone takes longer than `seconds` is given up, and with it all that
    come after it in `searches`, which are expected to cost more.

    Args:
        searches: from cheap to dear; called with 0, 1, ... `num_inputs` - 1, 0, ...
        num_inputs: how many inputs there are.
        repeats: counted calls of a search.
        seconds: counted seconds of a search after which it is done even if it has fewer calls.
        finish: waits until the device has done what was asked of it; part of the time.
        clock: seconds.
    """
    timings = [Timing() for _ in searches]
    waiting = list(zip(searches, timings, strict=True))
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        while waiting:
            for search, timing in waiting:
                _take_turn(search, timing, num_inputs, repeats, seconds, finish, clock)
                if timing.gave_up:
                    break
            slow = next((place for place, (_, timing) in enumerate(waiting) if timing.gave_up), len(waiting))
            for _, timing in waiting[slow + 1 :]:
                timing.gave_up = f"not tried: a cheaper search was given up, {waiting[slow][1].gave_up}"
            waiting = [pair for pair in waiting[:slow] if not pair[1].is_done(repeats, seconds)]
    finally:
        if was_enabled:
            gc.enable()
    return timings


def _take_turn(
    search: Search,
    timing: Timing,
    num_inputs: int,
    repeats: int,
    seconds: float,
    finish: Callable[[], None] | None,
    clock: Callable[[], float],
) -> None:
    """Call a search a few times and note the times of those calls that count."""
    start = len(timing.seconds)
    for call in range(start - WARM_UP, start + TURN):
        number = call % num_inputs
        begun = clock()
        answer = search(number)
        if finish is not None:
            finish()
        took = clock() - begun
        if call >= start:
            timing.seconds.append(took)
            timing.answers.setdefault(number, answer)
            if timing.is_done(repeats, seconds):
                return
        elif start == 0 and took > seconds:
            timing.gave_up = f"a call took {took:.3g} s, limit {seconds:g} s"
            return
