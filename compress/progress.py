"""What a person sees while a run works: a line a step, and a bar with the time left on everything that takes longer.

Goes to stderr, so that stdout holds results alone. Without a terminal only the lines are written.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any

SHOW_AFTER = 2.0
"""Seconds before a bar appears."""


_pressed: list[int] = []


def remember_interrupts() -> None:
    """From now on Ctrl-C is remembered. Python raises it wherever it is, and in a callback that C code makes or in a
    finaliser the exception is lost; then the end of the step raises it again.
    """

    def pressed(number: int, frame: Any) -> None:
        _pressed.append(number)
        signal.default_int_handler(number, frame)

    _pressed.clear()
    if threading.current_thread() is threading.main_thread():  # signals are the main thread's
        signal.signal(signal.SIGINT, pressed)


class Progress:
    """Silent unless `console` (a rich Console on stderr) is given."""

    def __init__(self, console: Any = None):
        self.console = console
        self._bars: Any = None

    @contextmanager
    def step(self, label: str) -> Iterator[None]:
        """Say that a step starts and, in the end, how long it took."""
        started = time.perf_counter()
        self.say(f"[bold]{label}[/bold] …")
        yield
        if _pressed:
            raise KeyboardInterrupt
        self.say(f"[green]✓[/green] {label} [dim]{time.perf_counter() - started:.1f} s[/dim]")

    def say(self, line: str) -> None:
        """One line."""
        if self.console is not None:
            self.console.print(line, highlight=False, soft_wrap=True)

    def track(self, items: Iterable[Any], label: str) -> Iterator[Any]:
        """Pass `items` through, with a bar once they have taken `SHOW_AFTER` seconds."""
        if self.console is None or not self.console.is_terminal:
            yield from items
            return
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        total = len(items) if isinstance(items, Sized) else None
        columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        started, bars = time.perf_counter(), None
        try:
            for number, item in enumerate(items):
                if bars is None and self._bars is None and time.perf_counter() - started > SHOW_AFTER:
                    self._bars = bars = Bars(*columns, console=self.console, transient=True)
                    bars.start()
                    bars.add_task(label, total=total)
                if bars is not None:
                    bars.update(bars.task_ids[0], completed=number)
                yield item
        finally:
            if bars is not None:
                bars.stop()
                self._bars = None
