"""Tests of post/stats.py: estimates against scipy, hand computation and simulation; claims against studies
whose truth is known, through verdict() and analyse() themselves."""
import itertools
import math

import numpy as np
import pytest
from scipy.stats import nct, ttest_ind

from post import stats
from study import FACTORIAL

EQUAL = dict.fromkeys(FACTORIAL, 1.0)
MINI = dict(adamw=0.0124, adamw_qk=0.0522, muon=0.0024, muon_qk=0.0130)  # nats, measured with five seeds


def named(*values):
    return dict(zip(FACTORIAL, values, strict=True))


def exact(means, sds, n):
    """{arm: (n,)} with exactly these means and standard deviations over seeds."""
    x = np.linspace(-1, 1, n)
    return {a: means[a] + sds[a] * x / x.std(ddof=1) for a in FACTORIAL}


def whole(loss, pr, **names):
    return dict(loss=loss, pr=pr, pr_centered=pr, pr_weight=pr) | names


# ---- estimates

@pytest.mark.parametrize("n", [2, 3, 5])
def test_a_pair_is_welch_s_t_test(n):
    rng = np.random.default_rng(n)
    y = {a: rng.normal(3, s, n) for a, s in named(1, 5, 0.3, 2).items()}
    for a, b in stats.PAIRS:
        e, want = stats.pair(y, a, b), ttest_ind(y[b], y[a], equal_var=False)
        low, high = want.confidence_interval(0.95)
        assert (e["p"], e["dof"]) == pytest.approx((want.pvalue, want.df))
        assert e["effect"] / e["se"] == pytest.approx(want.statistic)
        assert (e["effect"] - e["half"], e["effect"] + e["half"]) == pytest.approx((low, high))


def test_degrees_of_freedom_by_hand():
    """Two runs an arm with variances 1, 4, 9, 16: weights +-1/2 give parts 1/8, 1/2, 9/8, 2, their sum
    15/4, and (15/4)^2 / (1/64 + 1/4 + 81/64 + 4) = 14.0625 / 5.53125."""
    e = stats.estimate(exact(EQUAL, named(1, 2, 3, 4), 2), stats.CONTRASTS["optimizer"])
    assert (e["se"], e["dof"], e["effect"]) == pytest.approx((math.sqrt(3.75), 14.0625 / 5.53125, 0))
    alone = stats.pair(exact(EQUAL, named(1, 0, 1, 1), 2), "adamw", "adamw_qk")
    assert alone["dof"] == pytest.approx(1) and 0 < alone["half"] < math.inf


def test_contrasts_mean_what_they_say_by_name_in_any_order():
    y = exact(dict(muon_qk=4, adamw=10, muon=5, adamw_qk=12), EQUAL, 2)
    got = {c: stats.estimate(y, w)["effect"] for c, w in stats.CONTRASTS.items()}
    assert got == pytest.approx(dict(optimizer=4.5 - 11, qk_norm=8 - 7.5, interaction=(4 - 5) - (12 - 10)))
    assert stats.pair(y, "adamw", "muon")["effect"] == pytest.approx(-5)


@pytest.mark.parametrize("name", stats.CONTRASTS)
def test_intervals_cover_and_standard_errors_are_those_of_simulated_effects(name):
    rng, count, n = np.random.default_rng(0), 4000, 5
    w = stats.CONTRASTS[name]
    x = {a: rng.normal(3, MINI[a], (count, n)) for a in FACTORIAL}
    truth = 3 * sum(w.values())
    effects = sum(w[a] * x[a].mean(axis=1) for a in w)
    got = [stats.estimate({a: v[i] for a, v in x.items()}, w) for i in range(count)]
    assert [e["effect"] for e in got] == pytest.approx(effects)
    assert np.mean([e["se"]**2 for e in got]) == pytest.approx(effects.var(), rel=0.08)
    assert 0.93 < np.mean([abs(e["effect"] - truth) <= e["half"] for e in got]) < 0.97


def test_arms_whose_runs_agree_exactly_claim_nothing_and_do_not_crash():
    y = exact(named(0.1, 0.7, 0.3, 0.2), named(0, 0, 0, 1), 3)
    e = stats.pair(y, "adamw", "adamw_qk")
    assert e["p"] == 1 and e["half"] == math.inf and e["effect"] == pytest.approx(0.6)
    stats.analyse(whole(y, y))
    assert stats.spread(y)["adamw"] == 0 and math.isfinite(stats.pair(y, "adamw", "muon_qk")["half"])
    outcome, conditions, _ = stats.verdict(whole(y, y))
    assert outcome == "no verdict" and "AdamW + QK-Norm, Muon: " in conditions[0][3]


# ---- what a study can resolve

def test_detectable_is_found_in_four_studies_of_five():
    """One arm has n - 1 degrees of freedom exactly, so that the noncentral t is exact; and by scipy.stats."""
    rng, n, count = np.random.default_rng(0), 4, 20000
    level = stats.ALPHA / 6 * (n - stats.CAUTION) / n
    e = dict(se=1 / math.sqrt(n), dof=n - 1)
    effect = stats.detectable(e, n)
    x = rng.normal(effect, 1, (count, n))
    t = x.mean(axis=1) / x.std(axis=1, ddof=1) * math.sqrt(n)
    cutoff = -nct.ppf(level / 2, n - 1, 0)
    assert np.mean(t > cutoff) == pytest.approx(0.8, abs=0.01)
    for dof in 1.0, 1.7, 9.0:
        e = dict(se=0.5, dof=dof)
        power = nct.sf(-nct.ppf(level / 2, dof, 0), dof, stats.detectable(e, n) / 0.5)
        assert power == pytest.approx(0.8, abs=1e-3)


@pytest.mark.parametrize("sds, target", [(MINI, 0.01), (MINI, 0.1), (EQUAL, 0.5), (EQUAL, 100)])
def test_seeds_needed_is_the_smallest_number(sds, target):
    for w in stats.CONTRASTS.values():
        n = stats.seeds_needed(exact(EQUAL, sds, 5), w, target)
        half = {k: stats.estimate(exact(EQUAL, sds, k), w)["half"] for k in (n, n - 1) if k > 1}
        assert half[n] <= target and half.get(n - 1, math.inf) > target


def test_correlation_over_seeds_says_whether_pairing_helps():
    x = np.array([0.0, 1, 5, 2])
    alike = stats.seed_correlation(dict(a=x, b=x + 3, c=2 * x))
    assert alike["mean"] == pytest.approx(1) and alike["helped"] == 3
    assert alike["pairs"]["a", "b"] == pytest.approx((0, math.sqrt(2) * x.std(ddof=1)), abs=1e-12)
    against = stats.seed_correlation(dict(a=x, b=-x))
    assert against["mean"] == pytest.approx(-1) and against["helped"] == 0
    assert math.isnan(stats.seed_correlation(dict(a=x, b=0 * x))["mean"])


def test_rate_range_is_that_of_all_choices():
    rng = np.random.default_rng(0)
    values = {a: list(rng.normal(size=3)) for a in FACTORIAL}
    for w in stats.CONTRASTS.values():
        every = [sum(w[a] * v for a, v in zip(w, pick))
                 for pick in itertools.product(*(values[a] for a in w))]
        assert stats.rate_range(values, w) == pytest.approx((min(every), max(every)))
        assert stats.sign_holds(values, w) == (min(every) > 0 or max(every) < 0)
    one = dict(a=[1.0, 2, 3], b=[4.0, 5, math.inf])
    assert stats.rate_range(one, dict(b=1, a=-1)) == (1, math.inf) and stats.sign_holds(one, dict(b=1, a=-1))
    both = dict(a=[1.0, 2, math.inf], b=[4.0, 5, math.inf])
    assert not stats.sign_holds(both, dict(b=1, a=-1))
    for at in range(3):
        unknown = dict(a=[1.0, 2, 3], b=[math.nan if i == at else 9.0 for i in range(3)])
        assert not stats.sign_holds(unknown, dict(b=1, a=-1))


# ---- decisions

def holm(p):
    """Holm-adjusted p-values of a dict, the textbook's way."""
    out, floor = {}, 0.0
    for i, h in enumerate(sorted(p, key=p.get)):
        out[h] = floor = max(floor, min(1.0, (len(p) - i) * p[h]))
    return out


def test_decisions_are_holm_s_over_six_until_a_scenario_needs_more():
    rng, same = np.random.default_rng(0), 0
    for _ in range(500):
        p = {m: dict(zip(stats.CONTRASTS, rng.uniform(size=3) ** 4)) for m in ("loss", "pr")}
        got = stats.decide(p, dict(loss=1.0, pr=1.0), 1.0)
        want = holm({(m, c): v for m in p for c, v in p[m].items()})
        for h in want:  # never more than Holm claims, exactly his while no measure has two contrasts resolved
            assert got[h] >= want[h] - 1e-12
        if all(sum(want[m, c] <= stats.ALPHA for c in p[m]) < 2 for m in p):
            assert {h for h in want if got[h] <= stats.ALPHA} == {h for h in want if want[h] <= stats.ALPHA}
            same += 1
    assert same > 100
    assert got["loss", "best"] == 1  # p 1


def test_best_may_be_claimed_once_two_contrasts_are():
    p = dict(loss=dict(optimizer=1e-4, qk_norm=1e-4, interaction=0.6),
             pr=dict(optimizer=1.0, qk_norm=1.0, interaction=1.0))
    got = stats.decide(p, dict(loss=0.009, pr=1e-9), 1.0)
    assert got["loss", "best"] == pytest.approx(5 * 0.009)  # 2 left on loss, 3 on PR
    assert got["pr", "best"] == 1


def test_the_counts_of_what_can_be_true_together():
    """Over all patterns of means from a small set: with r contrasts not zero, contrasts that are zero and
    the other hypotheses that one claim can be false about number at most 3, 2, 2, 1."""
    most = [0] * 4
    for means in itertools.product((0, 1, 2, 3, 5), repeat=4):
        zero = sum(abs(sum(w[a] * v for a, v in named(*means).items())) < 1e-9
                   for w in stats.CONTRASTS.values())
        strictly = sorted(means)[0] < sorted(means)[1]
        assert not strictly or zero <= 1  # what lets 'best' and 'tie' wait
        for r in range(4 - zero):  # r of the contrasts that are not zero have been claimed
            other = r >= 2 or means[2] == min(means) and strictly  # 'best' or a lead of Muon share a place
            most[r] = max(most[r], zero + other)
    assert all(found <= allowed for found, allowed in zip(most, (3, 2, 2, 1)))


def test_the_best_arm_is_tested_against_every_other_arm():
    """AdamW is a precise runner-up; Muon + QK-Norm, third, is so noisy that it may be the best."""
    pr = exact(named(50, 20, 60, 40), named(0.1, 0.1, 0.1, 30), 3)
    e = stats.analyse(whole(pr, pr))["pr", "best"]
    assert (e["arm"], e["second"], e["against"]) == ("muon", "adamw", "muon_qk")
    assert e["effect"] == pytest.approx(10)
    assert e["p"] == pytest.approx(stats.pair(pr, "muon_qk", "muon")["p"])
    assert not e["claimed"] and stats.pair(pr, "adamw", "muon")["p"] < 1e-3


def test_a_tie_is_three_times_the_smallest_of_welch_s_one_sided_tests():
    rng = np.random.default_rng(1)
    y = {a: rng.normal(3, s, 4) for a, s in named(0.01, 0.05, 0.03, 0.02).items()}
    p = [ttest_ind(y["muon"] + stats.LOSS_MARGIN, y[a], equal_var=False, alternative="greater").pvalue
         for a in FACTORIAL if a != "muon"]
    assert stats.analyse(whole(y, y))["loss", "tie"]["p"] == pytest.approx(min(1, 3 * min(p)))


def test_another_arm_than_muon_is_best_only_where_a_tie_passes():
    """With a spread far above the margin and Muon the hardest rival, the tie's three one-sided tests ask for more
    than the two-sided test of the lead."""
    y = exact(named(0, 40, 20, 40), named(5, 5, 5, 5), 4)
    e, two_sided = stats.analyse(whole(y, y)), stats.pair(y, "adamw", "muon")["p"]
    assert e["loss", "best"]["arm"] == "adamw" and e["loss", "best"]["against"] == "muon"
    assert e["loss", "best"]["p"] == e["loss", "tie"]["p"] == pytest.approx(1.5 * two_sided, rel=0.02)
    assert stats.analyse(whole(y, {a: -v for a, v in y.items()}))["pr", "best"]["p"] == pytest.approx(two_sided)


# ---- calibration: at most one study in twenty with any false claim

def draw(rng, n, means, sds, shared=0.0):
    """A study: means and sds {measure: {arm: number}}; shared: the share of variance that all arms have in
    common."""
    z, common = rng.standard_normal((2, 4, n)), rng.standard_normal((2, 1, n))
    z = math.sqrt(1 - shared) * z + math.sqrt(shared) * common
    return whole(*({a: 40 + means[m][a] + sds[m][a] * z[i, j] for j, a in enumerate(FACTORIAL)}
                   for i, m in enumerate(stats.MEASURES)))


def false_claims(analysis, means):
    """The claims that are wrong, a contrast's wrong sign among them: [(measure, name)]."""
    wrong = []
    for (m, name), e in analysis.items():
        mu = means[m]
        if not e["claimed"]:
            continue
        if name == "tie":
            false = all(mu[a] - mu["muon"] > stats.LOSS_MARGIN - 1e-9 for a in FACTORIAL if a != "muon")
        elif name == "best":
            sign = 1 if m == "loss" else -1
            false = any(sign * mu[a] <= sign * mu[e["arm"]] + 1e-9 for a in FACTORIAL if a != e["arm"])
        else:
            true = sum(w * mu[a] for a, w in stats.CONTRASTS[name].items())
            false = abs(true) < 1e-9 or true * e["effect"] < 0
        if false:
            wrong.append((m, name))
    return wrong


def share_false(n, means, sds, count, shared=0.0):
    """Share of studies with any false claim, or, where nothing is true, with the headline of a scenario."""
    rng, wrong = np.random.default_rng(n), 0
    nothing = not any(v for mu in means.values() for v in mu.values())
    for _ in range(count):
        outcome, _, analysis = stats.verdict(draw(rng, n, means, sds, shared))
        wrong += bool(false_claims(analysis, means)) or (nothing and outcome in "ABC")
    return wrong / count


NOISE = {"equal": named(1, 1, 1, 1),
         "one arm 10 times": named(1, 10, 1, 1), "one arm 30 times": named(1, 1, 1, 30),
         "AdamW 3 times": named(3, 3, 1, 1), "AdamW 5 times": named(5, 5, 1, 1)}
ZERO = dict.fromkeys(FACTORIAL, 0.0)
H = 1e4  # an effect that no study misses
TRUTHS = {  # means of loss and PR
    "optimizer on loss": (named(H, H, 0, 0), ZERO),
    "optimizer on both": (named(H, H, 0, 0), named(0, 0, H, H)),
    "no QK-Norm effect on loss": (named(-H, -3 * H, H, 3 * H), ZERO),
    "one arm on both": (named(H, 0, 0, 0), named(-H, 0, 0, 0)),
    "two best arms on both": (named(0, H, -H, -H), named(0, -H, H, H)),
    "the noisy arm is best": (named(10, H, 0, -1), ZERO)}  # and often looks third, behind a calm runner-up


def allowed(count):
    return stats.ALPHA + 2 * math.sqrt(stats.ALPHA * (1 - stats.ALPHA) / count)


@pytest.mark.parametrize("n", [2, 3, 5])
@pytest.mark.parametrize("noise", NOISE)
def test_without_effects_one_study_in_twenty_claims_anything(noise, n):
    sds = dict(loss=NOISE[noise], pr=NOISE[noise])
    assert share_false(n, dict(loss=ZERO, pr=ZERO), sds, 1500) <= allowed(1500)


@pytest.mark.parametrize("n", [2, 3, 5])
def test_seeds_that_move_all_arms_alike_make_it_stricter(n):
    assert share_false(n, dict(loss=ZERO, pr=ZERO), dict(loss=EQUAL, pr=EQUAL), 700, shared=0.8) < 0.03


@pytest.mark.parametrize("truth", TRUTHS)
@pytest.mark.parametrize("n, sds", [(2, named(1, 1, 1, 20)), (3, named(1, 1, 1, 8)), (5, named(5, 5, 1, 1))])
def test_with_some_true_effects_the_rest_is_claimed_no_more_often(truth, n, sds):
    """At each n the pattern of noise that was found hardest, and AdamW's pair."""
    loss, pr = TRUTHS[truth]
    assert share_false(n, dict(loss=loss, pr=pr), dict(loss=sds, pr=sds), 1000) <= allowed(1000)


@pytest.mark.parametrize("n", [2, 3, 5])
def test_a_lead_of_the_margin_is_seldom_called_a_tie(n):
    m = stats.LOSS_MARGIN
    means = dict(loss=named(m, m, 0, m), pr=ZERO)
    for scale in 0.001, 0.02:
        sds = dict(loss={a: scale * v for a, v in named(1, 3, 1, 1).items()}, pr=EQUAL)
        assert share_false(n, means, sds, 700) <= allowed(700)


def test_effects_of_five_standard_deviations_are_found_at_three_seeds():
    rng = np.random.default_rng(5)
    means = dict(loss=named(0, 5, -5, 0), pr=named(0, -5, 5, 0))  # main effects of 5, no interaction
    got = [stats.analyse(draw(rng, 3, means, dict(loss=EQUAL, pr=EQUAL))) for _ in range(200)]
    for m, c in itertools.product(stats.MEASURES, ("optimizer", "qk_norm")):
        assert np.mean([e[m, c]["claimed"] for e in got]) > 0.9


# ---- the verdict

FLAT = named(3.5, 3.5, 3.5, 3.5)
PR = named(40, 40, 40, 40)
VERDICTS = {"A": (FLAT | dict(muon=3.3), PR | dict(muon=55)),
            "B": (FLAT | dict(muon=3.6), PR | dict(muon=55)),
            "C": (FLAT | dict(adamw_qk=3.3), PR | dict(adamw_qk=20)),
            "none": (FLAT | dict(muon=3.3, muon_qk=3.2), PR | dict(muon=45, muon_qk=55))}


def of(loss, pr, s=0.002, n=5):
    return whole(exact(loss, dict.fromkeys(FACTORIAL, s), n), exact(pr, dict.fromkeys(FACTORIAL, 100 * s), n))


@pytest.mark.parametrize("outcome", VERDICTS)
def test_each_scenario_is_reached_whatever_other_arms_there_are(outcome):
    y = of(*VERDICTS[outcome])
    got = stats.verdict(y)
    assert got[0] == outcome
    met = {s: all(ok for t, _, ok, _ in got[1] if t == s) for s in "ABCD"}
    assert [s for s in "ABCD" if met[s]] == ([outcome] if outcome != "none" else [])
    more = {m: dict(frozen=np.full(5, math.inf)) | dict(reversed(v.items())) for m, v in y.items()}
    assert stats.verdict(more, dict(frozen=2)) == got


def test_noise_is_scenario_d_and_no_difference_well_measured_is_none():
    assert stats.verdict(of(FLAT, PR, s=0.1))[0] == "D"
    assert stats.verdict(of(FLAT, PR))[0] == "none"
    one = whole(exact(FLAT, named(0.002, 0.1, 0.002, 0.002), 5), of(FLAT, PR)["pr"])
    assert stats.verdict(one)[0] == "D"  # one arm's noise is enough: the widest pair counts


def test_thresholds_of_pr_are_a_share_of_the_head_dim():
    y = of(FLAT, PR, s=0.018)  # half-widths of a pair: .026 nats, 2.6 of PR
    y["loss"] = of(FLAT, PR)["loss"]
    assert stats.verdict(y)[0] == "none" and stats.verdict(y, head_dim=32)[0] == "D"
    assert "against 1.6 of 32" in stats.verdict(y, head_dim=32)[1][-1][3]
    assert "64" not in str(stats.SCENARIOS)


def test_a_lead_under_the_margin_is_a_tie():
    got = stats.verdict(of(FLAT | dict(muon=3.495), PR | dict(muon=55), s=1e-4))
    assert got[2]["loss", "best"]["claimed"] and got[0] == "B"


def test_a_pr_claim_has_to_hold_under_every_definition():
    y = of(*VERDICTS["A"])
    y["pr_weight"] = {a: 95 - v for a, v in y["pr"].items()}
    outcome, _, e = stats.verdict(y)
    assert outcome == "none" and stats.decision(e["pr", "optimizer"]) == "depends on the definition"
    assert stats.decision(e["pr", "best"]) == "depends on the definition"
    assert stats.decision(e["loss", "best"]) == "resolved"


def test_no_verdict_from_one_seed_or_diverged_arms():
    y = of(*VERDICTS["A"])
    assert stats.verdict({m: {a: v[:1] for a, v in d.items()} for m, d in y.items()})[0] == "no verdict"
    assert stats.verdict(y, dict(adamw=1))[0] == "D" and stats.verdict(y, dict(adamw=5, muon=0))[0] == "none"
    assert "AdamW in 1 of 5 seeds" in stats.verdict(y, dict(adamw=1))[1][0][3]


def test_logit_control_is_muon_below_adamw_and_the_flag_in_every_seed():
    assert stats.logit_control(dict(adamw=[30, 40], muon=[14, 20]))
    assert not stats.logit_control(dict(adamw=[30, 19], muon=[14, 20]))
    assert not stats.logit_control(dict(adamw=[300, 300], muon=[14, 150]))
    assert not stats.logit_control(dict(adamw=[30, 40], muon=[14, math.nan]))


def test_parabola_through_three_exact_points():
    lrs = [1e-3, 2e-3, 4e-3, 8e-3]
    losses = [3 + 0.1 * math.log(lr / 2.5e-3) ** 2 for lr in lrs]
    assert stats.quadratic_fit(lrs, losses) == pytest.approx((2.5e-3, 3.0))
    assert stats.quadratic_fit(lrs[:2], losses[:2]) is None
    three = stats.quadratic_fit(lrs[:3], [3.0, 2.0, 1.5])
    assert three == pytest.approx(stats.quadratic_fit(lrs, [3.0, 2.0, 1.5, None]))
    assert stats.quadratic_fit([1e-3, 2e-3, 4e-3], [1.0, 2.0, 2.5]) is None  # no minimum
