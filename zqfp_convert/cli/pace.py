"""How fast work goes and when it will be done, from what it reports of itself."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field

_COUNTED = re.compile(r"^(?P<what>.*?)\s*(?P<done>\d+)/(?P<total>\d+)")


@dataclass
class Pace:
    """Progress of one piece of work.

    The first step forward does not count: it may be what an earlier run had done. From there on the
    rate is the mean one.
    """

    clock: Callable[[], float] = time.monotonic
    done: int = 0
    total: int = 0
    began: float = field(init=False)
    _from: tuple[float, int] | None = None
    _last: float = field(init=False)

    def __post_init__(self) -> None:
        self.began = self._last = self.clock()

    def update(self, done: int, total: int) -> None:
        """Take note of how much of how much is done."""
        now = self.clock()
        if done > self.done and self._from is None and self.done > 0:
            self._from = self._last, self.done
        elif done < self.done:
            self._from = None
        if done != self.done or self._from is None:
            self._last = now
        self.done, self.total = done, total

    @property
    def share(self) -> float | None:
        """How much of it is done, from 0 to 1; None while nobody knows."""
        return min(1.0, self.done / self.total) if self.total > 0 else None

    @property
    def passed(self) -> float:
        """Seconds since it began."""
        return self.clock() - self.began

    @property
    def rate(self) -> float | None:
        """What is done in a second; None while there is too little to tell."""
        if self._from is None:
            return None
        since, before = self._from
        seconds = self._last - since
        return (self.done - before) / seconds if seconds > 0 else None

    @property
    def left(self) -> float | None:
        """Seconds until all is done, at this rate; None where nobody knows."""
        rate = self.rate
        if rate is None or self.done >= self.total:
            return None
        return max(0.0, (self.total - self.done) / rate - (self.clock() - self._last))


@dataclass
class Nested:
    """Work as a whole, and the step that it is at.

    A step whose text counts, such as `tuning, step 3/400`, has a pace of its own.
    """

    unit: str = ""
    clock: Callable[[], float] = time.monotonic
    text: str = "starting"
    whole: Pace = field(init=False)
    step: Pace | None = None
    _what: str = ""
    _since: float = field(init=False)

    def __post_init__(self) -> None:
        self.whole = Pace(self.clock)
        self._since = self.clock()

    def update(self, text: str, done: int, total: int) -> None:
        """Take a report: what is being done, and how much of how much is done."""
        if text != self.text:
            self._since = self.clock()
        self.text = text
        self.whole.update(done, total)
        counted = _COUNTED.match(text)
        if counted is None:
            self.step, self._what = None, text
            return
        if self.step is None or counted["what"] != self._what:
            self.step, self._what = Pace(self.clock), counted["what"]
        self.step.update(int(counted["done"]), int(counted["total"]))

    def told(self) -> str:
        """The speed of the whole, and the time that is left."""
        rate, left = self.whole.rate, self.whole.left
        if rate is None or left is None:
            return ""
        return f"{speed(rate, self.unit)}, about {span(left)} left"

    def step_told(self) -> str:
        """What is being done, for how long, and for how long yet where it counts itself."""
        seconds = self.clock() - self._since
        parts = [span(seconds)] if seconds >= 1 else []
        # The time left of blocks is that of the whole; a step beside them has one of its own.
        if self.whole.left is None and self.step is not None and self.step.left is not None:
            parts.append(f"about {span(self.step.left)} left of this")
        return self.text + (f"  ({', '.join(parts)})" if parts else "")

    def line(self) -> str:
        """All of it on one line."""
        share = self.whole.share
        start = "" if share is None else f"{share:4.0%}  "
        told = self.told()
        return start + self.step_told() + (f"  {told}" if told else "")


def speed(rate: float, unit: str) -> str:
    """A rate in words: `24.1 M weights/s`, `3.1 MB/s`, `12 s each`."""
    if unit and rate >= 1000:
        power = next(p for p in (9, 6, 3) if rate >= 10**p)
        prefix = {9: "G", 6: "M", 3: "k"}[power]
        shown = f"{rate / 10**power:.1f} {prefix}"
        return shown + ("B/s" if unit == "bytes" else f" {unit}/s")
    if unit == "bytes":
        return f"{rate:.0f} B/s"
    return f"{rate:.1f} {unit or 'steps'}/s" if rate >= 1 else f"{1 / rate:.1f} s each"


def span(seconds: float) -> str:
    """A time span, `0:42`, `12:05` or `1:02:03`."""
    whole = int(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"
