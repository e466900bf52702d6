"""Progress of long work on rank 0: a rich bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from s2srm import distributed

_LINE_SECONDS = 5.0
_LINE_FRACTION = 0.05


class ProgressBar:
    """A context manager around `total` units of work; every rank may call it, rank 0 shows it.

    On a terminal: bar, count, tokens/s, time left and the last shown values. Elsewhere: a line when
    five per cent and five seconds have passed since the last one, and one at the end.
    """

    def __init__(
        self, total: int, title: str, *, unit: str = "step", console: Console | None = None
    ) -> None:
        self.total, self.title, self.unit = total, title, unit
        self.done = self._skipped = 0
        self.tokens = 0
        self._console = console or Console(stderr=True, highlight=False)
        self._shown: dict[str, float | str] = {}
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._started = time.monotonic()
        self._last_time, self._last_done = self._started, 0

    def __enter__(self) -> ProgressBar:
        self._started = self._last_time = time.monotonic()
        if distributed.is_main() and self._console.is_terminal:
            self._bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[shown]}"),
                console=self._console,
            )
            self._task = self._bar.add_task(self.title, total=self.total, shown="")
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif distributed.is_main() and self.done > self._last_done:
            self._line(time.monotonic())

    def start_at(self, done: int) -> None:
        """So many units were done before: a resumed run."""
        self.done = self._skipped = self._last_done = done
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done)

    def advance(self, n: int = 1, tokens: int = 0, **shown: float | str) -> None:
        """n more units are done, with `tokens` tokens (over all ranks); show the given values."""
        self.done += n
        self.tokens += tokens
        self._shown.update(shown)
        if not distributed.is_main():
            return
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self.done, shown=self._values())
            return
        now = time.monotonic()
        if self.done >= self.total or (
            now - self._last_time >= _LINE_SECONDS
            and self.done - self._last_done >= _LINE_FRACTION * self.total
        ):
            self._line(now)

    def _line(self, now: float) -> None:
        """One plain line."""
        elapsed = now - self._started
        left = elapsed * (self.total - self.done) / max(self.done - self._skipped, 1)
        self._console.print(
            f"{self.title}: {self.unit} {self.done}/{self.total}"
            f" | {elapsed:.0f} s, {max(left, 0):.0f} s left | {self._values()}",
            markup=False,
            soft_wrap=True,
        )
        self._last_time, self._last_done = now, self.done

    def _values(self) -> str:
        """Tokens per second, then what the caller wants shown."""
        elapsed = max(time.monotonic() - self._started, 1e-9)
        parts = [f"{self.tokens / elapsed:,.0f} tokens/s"] if self.tokens else []
        parts += [
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in self._shown.items()
        ]
        return "  ".join(parts)
