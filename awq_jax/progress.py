"""Progress: a bar on stderr or in a notebook, or a function of the caller's that is told."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import Protocol, TextIO, TypeVar

Told = Callable[[int, int | None], object]
"""Called with what is done and what there is to do in all (None: unknown), in units of the work at hand."""
Progress = bool | Told
"""Show a bar, do not, or tell a function instead."""
T = TypeVar("T")


class Bar(Protocol):
    """What a tqdm bar and `_Silent` have in common.

    Attributes:
      n, total: done, and to do in all.
    """

    n: int
    total: int | None

    def update(self, n: int = 1) -> object:
        """``n`` more are done."""

    def set_postfix_str(self, s: str = "", refresh: bool = True) -> object:
        """What is shown after the time that is left."""

    def __enter__(self) -> Bar: ...

    def __exit__(self, *exc: object) -> object: ...


class _Silent:
    """A bar that nobody sees; ``told`` hears of it."""

    def __init__(self, told: Told, total: int | None) -> None:
        self._told, self.n, self.total = told, 0, total

    def update(self, n: int = 1) -> None:
        """``n`` more are done."""
        self.n += n
        self._told(self.n, self.total)

    def set_postfix_str(self, s: str = "", refresh: bool = True) -> None:
        """Nobody sees it."""

    def __enter__(self) -> _Silent:
        return self

    def __exit__(self, *exc: object) -> None:
        pass


def bar(
    progress: Progress,
    desc: str,
    unit: str,
    total: int | None = None,
    leave: bool = True,
    delay: float = 0,
    unit_scale: bool = False,
) -> Bar:
    """A bar of `tqdm.auto`: a widget in a notebook, text elsewhere. tqdm is imported for a bar that is shown only.

    Args:
      progress: see `Progress`.
      desc, unit, total, leave, delay, unit_scale: see ``tqdm.tqdm``.
    """
    if callable(progress) or not progress:
        return _Silent(progress or (lambda done, total: None), total)
    with warnings.catch_warnings():
        # Of a notebook without ipywidgets: the bar is text there, which needs no remark.
        warnings.filterwarnings("ignore", message="IProgress not found")
        from tqdm.auto import tqdm
    shown: Bar = tqdm(total=total, desc=desc, unit=unit, leave=leave, delay=delay, unit_scale=unit_scale)
    return shown


def through(
    items: Iterable[T], progress: Progress, desc: str, unit: str, leave: bool = True, delay: float = 0
) -> Iterator[T]:
    """``items``, one after another; one is done when the next is asked for."""
    total = len(items) if isinstance(items, Sized) else None
    with bar(progress, desc, unit, total, leave, delay) as shown:
        for item in items:
            yield item
            shown.update()


class Stages:
    """One line of progress for work of several stages: ``3/7 calibrating ... 40%``.

    On a terminal the line is written over; elsewhere there is a new one for each stage, and for each quarter of it.

    Args:
      names: of the stages, in order.
      shown: False says nothing.
      out: where to; None: stderr.
    """

    def __init__(self, names: Sequence[str], shown: bool = True, out: TextIO | None = None) -> None:
        self._names, self._shown, self._out = list(names), shown, out if out is not None else sys.stderr
        self._number, self._percent, self._width = 0, -1, 0

    def next(self) -> Told:
        """Begin the next stage; what is returned is told how far it is (see `Progress`)."""
        self._number, self._percent = self._number + 1, -1
        self._say(0)
        return lambda done, total: self._say(100 * min(done, total) // total if total else 0)

    def _say(self, percent: int) -> None:
        terminal = self._out.isatty()
        percent = percent if terminal else percent // 25 * 25
        if not self._shown or percent == self._percent:
            return
        self._percent = percent
        line = f"{self._number}/{len(self._names)} {self._names[self._number - 1]} ..."
        line += f" {percent}%" if percent else ""
        self._out.write(f"\r{line.ljust(self._width)}" if terminal else f"{line}\n")
        self._out.flush()
        self._width = len(line)

    def end(self) -> None:
        """Clear the line."""
        if self._shown and self._out.isatty():
            self._out.write(f"\r{' ' * self._width}\r")
            self._out.flush()
