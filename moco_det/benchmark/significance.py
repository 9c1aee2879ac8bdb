"""Means and deviations of trials, and which differences of means are more than chance.

A trial is one run; its seed is its number. All values are in the metric's unit (points of AP), and
stay numbers here: `Summary.text` and `signed` are for the moment they are printed.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# Two-sided 95 % points of Student's t distribution for 1, 2, ... degrees of freedom.
# fmt: off
_T_95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
    2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056,
    2.052, 2.048, 2.045, 2.042,
)
# fmt: on


@dataclass(frozen=True)
class Summary:
    """Mean and sample standard deviation (n - 1) of n values; one value has no deviation."""

    mean: float
    sd: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Summary":
        """Of at least one value."""
        sd = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.fmean(values), sd, len(values))

    def text(self, decimals: int = 1) -> str:
        """For example "52.0 ± 2.8"."""
        mean = f"{self.mean:.{decimals}f}"
        return mean if self.sd is None else f"{mean} ± {self.sd:.{decimals}f}"


@dataclass(frozen=True)
class KnownDeviation:
    """What is known beforehand of the standard deviation of single trials.

    It counts as much as an estimate from trials with that many degrees of freedom.
    """

    sd: float
    degrees_of_freedom: int


@dataclass(frozen=True)
class Difference:
    """Of two means. `margin`: what chance alone stays within, 19 times in 20; None: unknown."""

    value: float
    margin: float | None

    @property
    def significant(self) -> bool:
        """Whether it exceeds what is expected of chance."""
        return self.margin is not None and abs(self.value) > self.margin

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the difference; None: unknown."""
        if self.margin is None:
            return None
        return self.value - self.margin, self.value + self.margin


def difference_from_published(
    trials: Sequence[float], mean: float, n: int, known: KnownDeviation | None = None
) -> Difference | None:
    """`trials` minus a published mean of `n` trials, whose deviation was not published.

    None where there are no trials.
    """
    if not trials:
        return None
    margin = margin_of_error([trials], [len(trials), n], known)
    return Difference(statistics.fmean(trials) - mean, margin)


def difference_of_trials(
    trials: Sequence[float], others: Sequence[float], known: KnownDeviation | None = None
) -> Difference | None:
    """The mean of `trials` minus that of `others`; None where either is empty."""
    if not trials or not others:
        return None
    margin = margin_of_error([trials, others], [len(trials), len(others)], known)
    return Difference(statistics.fmean(trials) - statistics.fmean(others), margin)


def margin_of_error(
    groups: Sequence[Sequence[float]], sizes: Sequence[int], known: KnownDeviation | None
) -> float | None:
    """The largest difference of two means of `sizes` trials that is expected of chance.

    Trials are taken as normal, with one standard deviation s for all. It is pooled from what is
    known beforehand and from the `groups` of trials at hand, each weighted by its degrees of
    freedom; the difference then stays within t s sqrt(1/n + 1/m) in 95 of 100 cases, t being
    Student's for the sum of the degrees of freedom. So two trials by themselves say little (t =
    12.7), five say more (2.8), and one trial is judged by what is known beforehand, if anything is.

    Returns:
        None where nothing tells s: single trials without a known deviation.
    """
    degrees = known.degrees_of_freedom if known else 0
    squares = degrees * known.sd**2 if known else 0.0
    for values in groups:
        if len(values) > 1:  # a single trial has no degree of freedom
            degrees += len(values) - 1
            squares += (len(values) - 1) * statistics.variance(values)
    if degrees == 0:
        return None
    return t_95(degrees) * math.sqrt(squares / degrees * sum(1 / size for size in sizes))


def t_95(degrees_of_freedom: int) -> float:
    """The two-sided 95 % point of Student's t distribution, to 0.01 beyond 30 degrees."""
    if degrees_of_freedom <= len(_T_95):
        return _T_95[degrees_of_freedom - 1]
    return 1.96 + 2.5 / degrees_of_freedom


def signed(value: float, decimals: int = 1) -> str:
    """+1.5, −1.5 (with a true minus sign), 0.0."""
    text = f"{value:+.{decimals}f}"
    return text.replace("-", "−") if float(text) else text[1:]
