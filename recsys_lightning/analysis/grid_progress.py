"""The progress of a grid: one table on a terminal, else a line an event."""

import time
from collections import Counter
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from recsys_lightning.analysis.grid import Grid
from recsys_lightning.analysis.grid_execute import Event, State
from recsys_lightning.analysis.grid_runs import GridRun
from recsys_lightning.analysis.groups import load_results

_STYLES = {
    "queued": "dim",
    "started": "yellow",
    "finished": "green",
    "skipped": "green",
    "failed": "bold red",
    "not run": "red",
}


class Progress:
    """Shows what happens to the runs of a grid while it is entered, and how many ended how when it is left.

    Args:
        grid: the grid.
        runs: those of its runs that are to be run.
        console: where to.
        unfinished: what a run that has started is when this is left before its end.
    """

    def __init__(self, grid: Grid, runs: Sequence[GridRun], console: Console, unfinished: str = "broken off"):
        self.grid, self.console, self.unfinished = grid, console, unfinished
        self.runs = {run.name: run for run in runs}
        self.last: dict[str, Event] = {}
        self.started: dict[str, float] = {}
        self.live: Live | None = None
        if console.is_terminal:
            self.live = Live(console=console, get_renderable=self.table, refresh_per_second=2)

    def __enter__(self) -> Self:
        """Begin to show."""
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Say what has become of the runs."""
        if self.live is not None:
            self.live.stop()
        states = Counter(event.state for event in self.last.values())
        names: dict[State, str] = {
            "finished": "finished",
            "skipped": "finished before",
            "failed": "failed",
            "not run": "not run",
        }
        names |= {"started": self.unfinished, "queued": "queued"}
        parts = [f"{states[state]} {name}" for state, name in names.items() if states[state]]
        self._say(f"{self.grid.path.stem}: {len(self.runs)} runs: {', '.join(parts) or 'none begun'}")
        for event in self.last.values():
            if event.state == "failed":
                self._say(f"failed: {event.run}: {event.detail} ({self.runs[event.run].log})")
            elif event.state == "not run":
                self._say(f"not run: {event.run}: it {event.detail}")

    def show(self, event: Event) -> None:
        """Take note of an event."""
        before = self.last.get(event.run)
        if event.state == "started" and (before is None or before.state != "started"):
            self.started[event.run] = time.monotonic() - event.seconds
        self.last[event.run] = event
        if self.live is None:
            ended = sum(one.state not in ("queued", "started") for one in self.last.values())
            detail = {"failed": f": {event.detail}", "not run": f": it {event.detail}"}
            after = detail.get(event.state, f" {event.detail}" if event.detail else "")
            since = f" after {_clock(event.seconds)}" if event.seconds and event.state != "started" else ""
            line = f"[{ended}/{len(self.runs)}] {event.run} {event.state}{since}{after}"
            self._say(line + self._score(event.run, ", "))

    def table(self) -> Table:
        """One row an entry of the grid, one column a seed."""
        table = Table(title=self.grid.title)
        table.add_column("run")
        for seed in self.grid.seeds:
            table.add_column(f"seed {seed}", justify="right")
        rows: dict[str, list[Text]] = {}
        for run in self.runs.values():
            rows.setdefault(run.entry.name, []).append(self._cell(run.name))
        for name, cells in rows.items():
            table.add_row(name, *cells)
        return table

    def _cell(self, name: str) -> Text:
        event = self.last.get(name)
        if event is None:
            return Text("waiting", style="dim")
        seconds = time.monotonic() - self.started[name] if event.state == "started" else event.seconds
        words = [event.detail if event.state == "started" else event.state]
        words += [event.detail] if event.state == "queued" and event.detail else []
        words += [_clock(seconds)] if seconds else []
        return Text(" ".join(words) + self._score(name, ", "), style=_STYLES[event.state])

    def _score(self, name: str, before: str) -> str:
        """The first metric of a finished run."""
        run = self.runs[name]
        if self.last[name].state not in ("finished", "skipped") or run.entry.first:
            return ""
        metric = self.grid.metrics[0]
        value = load_results(run.folder)["metrics"].get(f"test/{metric}")
        return f"{before}{metric} {value:.4f}" if value is not None else ""

    def _say(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
