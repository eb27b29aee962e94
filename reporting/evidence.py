"""How sure a mean is, or a difference between runs: intervals, tests, and how many seeds would tell."""

import json
import math
import statistics
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats

from config import Config

RECORDS = Path(__file__).parents[1] / "benchmarks" / "results" / "accuracy"  # measured over seeds
POWER = 0.8  # the chance to tell a difference that is there, for which seeds are counted
MOST = 1000  # seeds; more are not counted
NO_SPREAD = 1e-9  # a deviation of accuracies under this is the rounding of floats


class Estimate(NamedTuple):
    """What some runs say of the mean of all such runs.

    `deviation` is the runs' standard deviation, and `interval` the 95 % interval of the mean (Student's
    t); one run alone has neither.
    """

    mean: float
    number: int
    deviation: float | None
    interval: tuple[float, float] | None


class Difference(NamedTuple):
    """How much the mean of some runs is over that of others, with its 95 % interval.

    `paired` if it is from the differences between runs of one seed, else it is Welch's. `deviations` are
    of those differences, or of the two sides. `interval` is None where there is no deviation.
    """

    value: float
    paired: bool
    interval: tuple[float, float] | None
    deviations: tuple[float, ...]

    @property
    def told(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]

    @property
    def needed(self) -> int | None:
        """How many seeds a side would be needed to tell a difference of this size; None: over `MOST`."""
        return seeds_needed(self.value, self.deviations)


class Disagreement(NamedTuple):
    """On how many images one of two networks alone is right, and McNemar's exact test (two-sided)."""

    first_alone: int
    second_alone: int
    p_value: float


def estimate(values: Sequence[float]) -> Estimate:
    """Mean, standard deviation and the mean's 95 % interval of one value or more."""
    mean, count = statistics.mean(values), len(values)
    if count < 2:
        return Estimate(mean, count, None, None)
    deviation = statistics.stdev(values)
    half = float(stats.t.ppf(0.975, count - 1)) * deviation / math.sqrt(count)
    return Estimate(mean, count, deviation, (mean - half, mean + half))


def difference(first: Mapping[int, float], second: Mapping[int, float]) -> Difference:
    """The mean of `first` minus that of `second`, each a value for each seed, of two seeds or more."""
    paired = first.keys() == second.keys()
    ours = list(first.values())
    theirs = [second[seed] for seed in (first if paired else second)]
    value = statistics.mean(ours) - statistics.mean(theirs)
    deviations: tuple[float, ...] = (statistics.stdev(ours), statistics.stdev(theirs))
    if paired:
        deviations = (statistics.stdev(a - b for a, b in zip(ours, theirs, strict=True)),)
    if math.hypot(*deviations) < NO_SPREAD:
        return Difference(value, paired, None, deviations)
    with warnings.catch_warnings():  # of a side whose runs are all alike, which Welch's test can judge
        warnings.filterwarnings("ignore", "Precision loss", RuntimeWarning)
        if paired:
            test = stats.ttest_rel(ours, theirs)
        else:
            test = stats.ttest_ind(ours, theirs, equal_var=False)
    low, high = test.confidence_interval(0.95)
    return Difference(value, paired, (float(low), float(high)), deviations)


def seeds_needed(value: float, deviations: Sequence[float]) -> int | None:
    """How many seeds a side tell a difference of `value` with a chance of `POWER`; None: over `MOST`.

    Args:
        deviations: of the two sides, for Welch's test; or one, of the differences between paired runs.
    """
    squares = np.square(deviations)
    counts = np.arange(2, MOST + 1)
    freedom = squares.sum() ** 2 / np.square(squares).sum() * (counts - 1)  # Welch and Satterthwaite
    shift = abs(value) / np.sqrt(squares.sum() / counts)
    power = stats.nct.sf(stats.t.ppf(0.975, freedom), freedom, shift)
    enough = np.flatnonzero(power >= POWER)
    return int(counts[enough[0]]) if len(enough) else None


def disagreement(first: np.ndarray, second: np.ndarray) -> Disagreement:
    """McNemar's exact test of two networks on the same images, by where each is right, bool (N,)."""
    ours, theirs = int((first & ~second).sum()), int((second & ~first).sum())
    p_value = stats.binomtest(ours, ours + theirs).pvalue if ours + theirs else 1.0
    return Disagreement(ours, theirs, float(p_value))


def known_deviation(recipe: dict) -> tuple[float, int] | None:
    """The standard deviation of the test accuracy that was measured for a recipe, and of how many seeds.

    Args:
        recipe: `Config.recipe` of a run.

    Returns:
        That of the record with the most seeds in benchmarks/results/accuracy, or None.
    """
    usual, found = Config().recipe, []
    for path in sorted(RECORDS.glob("*.json")):
        record = json.loads(path.read_bytes())
        if record["deviation"] and usual | record.get("settings", {"": None}) == recipe:
            found.append((record["deviation"], len(record["seeds"])))
    return max(found, key=lambda pair: pair[1], default=None)


def chance(recipe: dict) -> str:
    """What was measured of the seed's part in a recipe's accuracy, as a sentence; or nothing."""
    known = known_deviation(recipe)
    if known is None:
        return ""
    deviation, count = known
    return (
        f"{count} seeds had a standard deviation of {100 * deviation:.2f} points: by the seed alone, "
        f"two runs differ by up to {100 * by_chance(deviation, count):.1f} points in 95 of 100 cases."
    )


def by_chance(deviation: float, count: int) -> float:
    """By how much two runs of one recipe differ at most, in 95 of 100 cases, by their seeds alone.

    Args:
        deviation: standard deviation that was measured over `count` runs.
    """
    return float(stats.t.ppf(0.975, count - 1)) * deviation * math.sqrt(2)
