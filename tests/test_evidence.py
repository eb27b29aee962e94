"""Means, and differences between simulated runs: how often they are told apart."""

import json

import numpy as np
import pytest
from scipy import stats

from config import RECIPES, Config
from reporting import evidence
from reporting.evidence import (
    by_chance,
    difference,
    disagreement,
    estimate,
    known_deviation,
    seeds_needed,
)


def share_told(shift, first_seed=0, shared=0.0, number=5, pairs=1000):
    """The share of simulated pairs of groups that are told apart.

    Runs have a standard deviation of 1, of whose square the seed has the part `shared` in both groups.
    """
    draws = np.random.default_rng(0).normal(size=(3, pairs, number))
    ours, theirs = shared**0.5 * draws[2] + (1 - shared) ** 0.5 * draws[:2]
    groups = zip(ours + shift, theirs, strict=True)
    return np.mean(
        [difference(dict(enumerate(a)), dict(enumerate(b, first_seed))).told for a, b in groups]
    )


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 5])
@pytest.mark.parametrize("first_seed", [0, 1])  # paired, Welch
def test_without_a_difference_at_most_6_of_100_pairs_are_told_apart(first_seed, number):
    assert share_told(0, first_seed, number=number, pairs=2000) <= 0.06


def test_two_deviations_of_the_paired_differences_are_told_by_five_seeds():
    assert share_told(2 * (2 * (1 - 0.5)) ** 0.5, shared=0.5) >= 0.8


def test_two_deviations_between_runs_of_other_seeds_are_told_by_six():
    """Of five, 77 of 100 are: even Student's test, the best where deviations are equal, has 79."""
    assert 0.73 < share_told(2, first_seed=5) < 0.8 <= share_told(2, first_seed=6, number=6)


def test_a_mean_has_the_deviation_and_interval_that_scipy_gives():
    values = [0.8687, 0.872, 0.8738]
    found = estimate(values)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert found.number == 3 and found.deviation == pytest.approx(np.std(values, ddof=1))
    assert found.interval == pytest.approx((expected.low, expected.high))
    assert estimate([0.5]) == (0.5, 1, None, None)
    assert estimate([0.5, 0.5]) == (0.5, 2, 0.0, (0.5, 0.5))


def test_the_same_seeds_are_paired_in_any_order_and_others_are_not():
    ours = {0: 0.5, 1: 0.6, 2: 0.71}
    paired = difference(ours, {2: 0.7, 1: 0.59, 0: 0.48})
    assert paired.paired and paired.value == pytest.approx(0.04 / 3)
    expected = stats.ttest_rel([0.5, 0.6, 0.71], [0.48, 0.59, 0.7]).confidence_interval(0.95)
    assert paired.interval == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize("seeds", [(3, 4, 5), (0, 1, 3), (0, 1, 2, 3)])
def test_seeds_that_are_shared_in_part_or_not_at_all_are_judged_by_welch(seeds):
    ours, theirs = {0: 0.5, 1: 0.6, 2: 0.71}, dict(zip(seeds, (0.48, 0.59, 0.7, 0.6), strict=False))
    found = difference(ours, theirs)
    test = stats.ttest_ind(list(ours.values()), list(theirs.values()), equal_var=False)
    assert not found.paired and not found.told
    assert found.interval == pytest.approx(test.confidence_interval(0.95))


def test_runs_without_any_deviation_are_never_told_apart():
    same = {0: 0.5, 1: 0.6}
    assert difference(same, dict(same)) == (0.0, True, None, (0.0,))
    shifted = difference(same, {0: 0.4, 1: 0.5})  # by 0.1 at each seed, but for the rounding of floats
    assert shifted.interval is None and not shifted.told
    assert not difference({0: 0.5, 1: 0.5}, {2: 0.6, 3: 0.6}).told


def test_a_side_whose_runs_are_all_alike_can_be_judged_by_the_other():
    found = difference({0: 0.5, 1: 0.5, 2: 0.5}, {3: 0.40, 4: 0.41, 5: 0.42})
    assert found.told and found.interval[0] < 0.09 < found.interval[1]


def test_as_many_seeds_are_named_as_tell_the_difference_in_four_of_five_tries():
    assert seeds_needed(0.5, [1, 1]) == 64  # as tables of the power of Student's test say
    for first_seed, deviations in ((1, [1, 1]), (0, [2**0.5])):  # Welch, paired
        number = seeds_needed(1.5, deviations)
        assert share_told(1.5, first_seed, number=number - 1) <= 0.82
        assert share_told(1.5, first_seed, number=number) >= 0.78
    assert seeds_needed(1e-6, [1, 1]) is None and seeds_needed(1000, [1, 1]) == 2
    found = difference({0: 0.5, 1: 0.6, 2: 0.7}, {0: 0.52, 1: 0.59, 2: 0.72})
    assert not found.told and found.needed > 3


def test_images_that_one_network_alone_gets_right_are_tested_by_the_binomial_law():
    ours = np.array([True] * 8 + [False] * 2 + [True] * 5)
    theirs = np.array([False] * 8 + [True] * 2 + [True] * 5)
    assert disagreement(ours, theirs) == (8, 2, pytest.approx(2 * 56 / 1024))
    assert disagreement(ours, ours) == (0, 0, 1.0)


def test_the_deviation_of_a_recipe_is_the_one_that_was_measured(monkeypatch, tmp_path):
    record = json.loads(next(evidence.RECORDS.glob("quick-*.json")).read_bytes())
    quick = Config(**RECIPES["quick"], seed=7, device="cpu").recipe
    assert known_deviation(quick) == (record["deviation"], len(record["seeds"]))
    assert known_deviation(Config(**RECIPES["quick"], optimizer="sgd").recipe) is None
    assert known_deviation(Config(**RECIPES["custom_resnet"]).recipe) is None  # of one seed
    monkeypatch.setattr(evidence, "RECORDS", tmp_path / "absent")
    assert known_deviation(quick) is None


def test_two_runs_differ_by_chance_by_what_the_deviation_allows():
    draws = np.random.default_rng(1).normal(size=(2, 20_000))
    far = np.abs(draws[0] - draws[1]) > by_chance(1.0, 10**6)
    assert far.mean() == pytest.approx(0.05, abs=0.005)
    assert by_chance(1.0, 3) == pytest.approx(4.303 * 2**0.5, abs=0.001)  # less is known of three runs
