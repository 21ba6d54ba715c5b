"""The display time of each picture by the times in the file, and the picture that a slower player shows."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, floor, inf

import numpy as np

# Some containers round times to a millisecond, which moves the first picture and a later one by half of it each. So a
# tick that is this little before a picture belongs to the picture.
_ROUNDED_S = Fraction(1, 1000)
RESTART_S = Fraction(1, 4)  # a clock that steps back further begins anew; less is jitter
JUMP_S = Fraction(10)  # so does one that jumps further ahead, in formats for recordings; FFmpeg's limit too


@dataclass(frozen=True)
class ShowTimes:
    """Begin of each picture and end of the last one, in units of `unit_s` s after the first begin.

    start_s: begin of the first picture on the file's clock, which its sound shares; None: the file has no times
    shifts_s: time that is added to the file's clock after its first start, its second one, ...
    """

    begins: Sequence[int]
    end: int
    unit_s: Fraction
    start_s: Fraction | None = None
    shifts_s: tuple[Fraction, ...] = (Fraction(0),)

    def begin_s(self, number: int) -> float:
        """Begin of a picture, in s after the first one."""
        return float(self.begins[number] * self.unit_s)

    def drift_s(self, rate: float) -> float:
        """Largest difference in s between a constant rate and the times of the pictures."""
        return max(abs(float(begin * self.unit_s) - number / rate) for number, begin in enumerate(self.begins))

    def shown_at(self, rate: Fraction) -> list[int]:
        """The picture that is shown at each of the times 0, 1/rate, 2/rate, ... s before the end."""
        ticks = max(1, ceil((self.end * self.unit_s - _ROUNDED_S) * rate))
        moments = (floor((tick / rate + _ROUNDED_S) / self.unit_s) for tick in range(ticks))
        return [bisect_right(self.begins, moment) - 1 for moment in moments]


def show_times(
    begins: Sequence[int | None], *, unit_s: Fraction | None, last: int, rate: float, jumps: bool = False
) -> ShowTimes:
    """The times of pictures, mended where the file's do not rise; of a constant rate if it states less than half.

    begins: in the order of display; last: duration of the last picture, 0: the file doesn't say; both in `unit_s` s
    jumps: whether a clock that jumps ahead begins anew; else a picture may be shown for long
    """
    known = {number: begin for number, begin in enumerate(begins) if begin is not None}
    if unit_s is None or not known or 2 * len(known) < len(begins):
        start_s = min(known.values()) * unit_s if known and unit_s is not None else None
        return ShowTimes(range(len(begins)), len(begins), 1 / exact_rate(rate), start_s)
    step = max(1, round(1 / (exact_rate(rate) * unit_s)))
    longest = floor(JUMP_S / unit_s) if jumps else inf
    risen, shifts = _risen(known, step=step, restart=floor(RESTART_S / unit_s), longest=longest)
    times = _filled(risen, count=len(begins), step=step)
    from_first = [time - times[0] for time in times]
    shifts_s = tuple(shift * unit_s for shift in shifts)
    return ShowTimes(from_first, from_first[-1] + (last or step), unit_s, times[0] * unit_s, shifts_s)


def _risen(known: Mapping[int, int], *, step: int, restart: int, longest: float) -> tuple[dict[int, int], list[int]]:
    """Times by picture, made to rise, and what was added to them from each start of the clock on.

    A clock that begins anew, in recordings joined to one file, goes on one step after the picture before. A time that
    both neighbours contradict is left out. step: a usual duration; restart, longest: longer steps back and ahead begin
    anew
    """
    risen: dict[int, int] = {}
    shifts, times = [0], list(known.values())
    latest, ahead = times[0] - 1, 0
    for number, time, following in zip(known, times, [*times[1:], None]):
        if following is not None and following + ahead > latest and not latest < time + ahead <= following + ahead:
            continue
        since = time + ahead - latest
        if since <= 0 or (risen and since > longest):
            ahead += step - since
            shifts += [ahead] * (since < -restart or since > longest)
        risen[number] = latest = time + ahead
    return risen, shifts


def _filled(known: Mapping[int, int], *, count: int, step: int) -> list[int]:
    """Times of all pictures: an unknown one is between its neighbours, or a step from the last known one."""
    first, last = min(known), max(known)
    ends = {0: known[first] - first * step, count - 1: known[last] + (count - 1 - last) * step}
    whole = {0: ends[0], **known, count - 1: ends[count - 1]}
    times = np.interp(range(count), list(whole), [time - ends[0] for time in whole.values()])
    return [ends[0] + round(time) for time in times.tolist()]


def exact_rate(fps: float) -> Fraction:
    """The exact fraction of a rate: 29.97002997 is 30000/1001; at least one picture in 1001 s."""
    return max(Fraction(fps).limit_denominator(1001), Fraction(1, 1001))
