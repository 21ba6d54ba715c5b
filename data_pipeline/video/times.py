"""The display time of each picture by the times in the file, and the picture that a slower player shows."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, floor

# Some containers round times to a millisecond, which moves the first picture and a later one by half of it each. So a
# tick that is this little before a picture belongs to the picture.
_ROUNDED_S = Fraction(1, 1000)


@dataclass(frozen=True)
class ShowTimes:
    """Begin of each picture and end of the last one, in units of `unit_s` s after the first begin.

    start_s: begin of the first picture on the file's clock, which its sound shares; None: the file has no times
    """

    begins: Sequence[int]
    end: int
    unit_s: Fraction
    start_s: Fraction | None = None

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


def show_times(begins: Sequence[int | None], *, unit_s: Fraction | None, last: int, rate: float) -> ShowTimes:
    """The times of pictures that begin at `begins`, if the file states all of them; else times of a constant rate.

    last: duration of the last picture, in the same unit; 0: the file doesn't say
    """
    known = sorted({begin for begin in begins if begin is not None})
    start_s = known[0] * unit_s if known and unit_s is not None else None
    if unit_s is None or len(known) < len(begins):
        return ShowTimes(range(len(begins)), len(begins), 1 / exact_rate(rate), start_s)
    end = known[-1] - known[0] + (last or round(1 / (exact_rate(rate) * unit_s)))
    return ShowTimes([begin - known[0] for begin in known], end, unit_s, start_s)


def exact_rate(fps: float) -> Fraction:
    """The exact fraction of a rate: 29.97002997 is 30000/1001; at least one picture in 1001 s."""
    return max(Fraction(fps).limit_denominator(1001), Fraction(1, 1001))
