"""Contrasts, decisions and the verdict, as plain functions on y = {name: {arm: array of n seeds}}, name
one of loss, pr, pr_centered, pr_weight and what else a study measures, with the seeds in the same order
in every arm. Contrasts and verdict are those of study.FACTORIAL; y may hold further arms. docs/power.md
has the proofs and what to expect.

The unit is the run, and each arm has its own variance: a weighted sum of arm means has variance sum w^2
s^2 / n and Satterthwaite's degrees of freedom (Welch 1947), which for two arms is Welch's t-test. Seeds
are paired across arms; where they move all arms alike, s is too large for a difference and every
decision errs towards 'undecided'.

One family of hypotheses carries every claim: three contrasts on final val loss and on mean PR, six in
all, and what the scenarios need beyond them, 'one arm is best' on each measure and 'Muon's lead on loss
is under the margin'. They are tested step by step (Holm 1979): the smallest p-value against alpha / k,
then the next, where k counts the hypotheses that can still be true *together* given those already
claimed (Shaffer 1986). If an arm is strictly best, or Muon leads by a margin, at most one contrast of
that measure is zero. So 'best' waits for two contrasts of its measure, and with 0, 1, 2, 3 of them
claimed at most 3, 2, 2, 1 hypotheses of the measure are true. 'Best' and 'under the margin' share a
place on loss: an arm other than Muon is best only where 'under the margin' passes too. The best arm is
tested against every other, two-sided, and the largest p-value counts; having picked it needs no further
correction (Hung & Fithian 2016, arXiv:1610.03944, for equal variances; Sood 2025, arXiv:2503.01065, for
unequal ones). So the chance of any false claim is at most alpha if each p-value is valid. Welch's is a
little too small where one arm is far noisier than the rest and happens to look calm, the more so the
fewer the seeds: p-values enter the steps times n / (n - CAUTION), a factor that rests on simulation
(tests/test_stats.py), not on proof.
"""
import itertools
import math

import numpy as np
from scipy.special import nctdtrinc, stdtr, stdtrit  # Student's t, at a tenth of the cost of scipy.stats

from study import FACTORIAL, LABELS, LOGIT_FLAG

ALPHA = 0.05
MEASURES = ("loss", "pr")
CONTRASTS = {
    "optimizer": dict(adamw=-0.5, adamw_qk=-0.5, muon=0.5, muon_qk=0.5),  # Muon minus AdamW
    "qk_norm": dict(adamw=-0.5, adamw_qk=0.5, muon=-0.5, muon_qk=0.5),  # with minus without
    "interaction": dict(adamw=1, adamw_qk=-1, muon=-1, muon_qk=1),  # QK-Norm under Muon minus under AdamW
}
PAIRS = list(itertools.combinations(FACTORIAL, 2))
LOSS_MARGIN = 0.02  # nats a token, 2 % of perplexity: a lead below it is a tie
PR_MARGIN = 0.05  # of the head dim: a 95 % half-width above it is noise
COLLAPSE = 0.75  # 'collapsed': at most this share of the highest arm's mean PR
CAUTION = 1.25  # with it ALPHA holds, within Monte Carlo error, in all patterns tried: docs/power.md
SCENARIOS = {  # the plan's step 10; the first of A, C, B, D whose conditions all hold, else none of them
    "A": ["Muon has the lowest loss, its lead over the runner-up resolved",
          f"that lead is not shown to be under {LOSS_MARGIN} nats",
          "Muon has the highest mean PR, its lead over the runner-up resolved, and is first under every "
          "definition"],
    "B": ["Muon has the highest mean PR, its lead over the runner-up resolved, and is first under every "
          "definition",
          f"a lead of Muon on loss of {LOSS_MARGIN} nats or more over every other arm is excluded: it ties "
          "or loses"],
    "C": ["AdamW + QK-Norm has the lowest loss, its lead over the runner-up resolved",
          "a resolved PR contrast goes against it: higher under Muon, or lower with QK-Norm",
          f"its mean PR is at most {COLLAPSE} of the highest arm's"],
    "D": ["on loss or on PR no contrast is resolved while the 95 % half-width of a difference of two arms "
          f"exceeds the margin ({LOSS_MARGIN} nats, {100 * PR_MARGIN:g} % of the head dim); or an arm diverges "
          "in some seeds and finishes in others"]}
PR_NAMES = ["pr", "pr_centered", "pr_weight"]  # a PR claim has to hold in sign under all of them


def moments(x):
    """(mean, squared standard error, degrees of freedom) of one arm's runs."""
    d = [float(v - x[0]) for v in x]  # equal runs give exactly 0
    n, total = len(d), sum(d)
    return float(x[0]) + total / n, (sum(v * v for v in d) - total * total / n) / (n * (n - 1)), n - 1


def combine(m, weights):
    """estimate() from {arm: moments()}."""
    parts = [(w * w * m[a][1], m[a][2]) for a, w in weights.items()]
    effect, v = sum(w * m[a][0] for a, w in weights.items()), sum(q for q, _ in parts)
    if v == 0:  # seeds that change nothing say nothing about other seeds
        return dict(effect=effect, se=0.0, dof=float(parts[0][1]), half=math.inf, p=1.0)
    se, dof = math.sqrt(v), v * v / sum(q * q / k for q, k in parts)
    return dict(effect=effect, se=se, dof=dof, half=float(stdtrit(dof, 1 - ALPHA / 2)) * se,
                p=2 * float(stdtr(dof, -abs(effect) / se)))


def estimate(y_m, weights):
    """A weighted sum of arm means of y_m {arm: (n,)}, n >= 2, with weights {arm: weight}: its effect,
    standard error, degrees of freedom, 95 % half-width and two-sided p-value. Where no arm varies, half is
    inf, p is 1."""
    return combine({a: moments(y_m[a]) for a in weights}, weights)


def pair(y_m, a, b):
    """estimate() of arm b minus arm a."""
    return estimate(y_m, {b: 1, a: -1})


def detectable(e, n, power=0.8):
    """The true effect, in e's unit, that a study of n seeds with the standard error and degrees of freedom
    of e, an estimate(), claims with probability `power` in the first of the steps: by the noncentral t
    distribution."""
    cutoff = -stdtrit(e["dof"], ALPHA * (n - CAUTION) / n / (len(MEASURES) * len(CONTRASTS)) / 2)
    return float(nctdtrinc(e["dof"], 1 - power, cutoff)) * e["se"]


def seeds_needed(y_m, weights, target=0.01):
    """Seeds at which the 95 % half-width of estimate(y_m, weights) is at most target, if the standard
    deviations over seeds are those of y_m."""
    parts = [w * w * moments(y_m[a])[1] * len(y_m[a]) for a, w in weights.items()]
    v = sum(parts)
    ratio = v * v / sum(q * q for q in parts) if v else 1
    first = max(2, math.floor(v * (stdtrit(np.inf, 1 - ALPHA / 2) / target)**2))  # a normal would do
    return next(n for n in itertools.count(first)
                if stdtrit((n - 1) * ratio, 1 - ALPHA / 2) * math.sqrt(v / n) <= target)


def spread(y_m):
    """{arm: standard deviation over its n seeds}."""
    return {a: math.sqrt(moments(x)[1] * len(x)) for a, x in y_m.items()}


def seed_correlation(y_m):
    """Are paired seeds worth anything? dict(mean: correlation over seeds, mean over pairs of arms (+-1 each
    with two seeds, and so no news; nan where no two arms vary), pairs: {(a, b): (standard deviation of b -
    a over seeds, sqrt(s_a^2 + s_b^2), which it is without pairing)}, helped: pairs whose first is the
    smaller)."""
    s, pairs, r = spread(y_m), {}, []
    for a, b in itertools.combinations(y_m, 2):
        d = np.subtract(y_m[b], y_m[a])
        pairs[a, b] = float(d.std(ddof=1)), math.hypot(s[a], s[b])
        if s[a] and s[b]:
            r.append(np.corrcoef(y_m[a], y_m[b])[0, 1])
    return dict(mean=float(np.mean(r)) if r else math.nan, pairs=pairs,
                helped=sum(p < q for p, q in pairs.values()))


def rate_range(values, weights):
    """(lowest, highest) of a weighted sum over arms when each arm may have any of its values {arm: [at half
    the chosen rate, at it, at twice]}. A loss is inf where the rate diverged; a nan, a PR that does not
    exist, may be anything."""
    ends = [sorted((w * min(values[a]), w * max(values[a]))) for a, w in weights.items()]
    low, high = sum(a for a, _ in ends), sum(b for _, b in ends)
    if any(map(math.isnan, (low, high, *(v for a in weights for v in values[a])))):
        return -math.inf, math.inf
    return low, high


def sign_holds(values, weights):
    """Whether the contrast has one sign at all rates of rate_range()."""
    low, high = rate_range(values, weights)
    return low > 0 or high < 0


def decide(p_contrast, p_best, p_tie):
    """Step-down decisions. p_contrast: {measure: {contrast: p}}, p_best: {measure: p}, p_tie: p, for 'loss'
    and 'pr'. Returns adjusted p-values {(measure, name): p}, name a contrast, 'best' or 'tie'; claimed
    where <= ALPHA."""
    waiting = {(m, c): p for m in p_contrast for c, p in p_contrast[m].items()}
    waiting |= {(m, "best"): p for m, p in p_best.items()} | {("loss", "tie"): p_tie}
    resolved, adjusted, floor = {m: 0 for m in p_contrast}, {}, 0.0
    while True:
        k = sum((3, 2, 2, 1)[r] for r in resolved.values())
        ready = {h: p for h, p in waiting.items() if h[1] != "best" or resolved[h[0]] >= 2}
        if not ready:
            return adjusted
        h = min(ready, key=ready.get)
        floor = max(floor, min(1.0, k * waiting[h]))
        if floor > ALPHA:  # nothing after it can be claimed: the rest is adjusted by the same k
            return adjusted | {h: min(1.0, max(floor, k * p)) if h in ready else 1.0
                               for h, p in waiting.items()}
        adjusted[h] = floor
        del waiting[h]
        resolved[h[0]] += h[1] in CONTRASTS


def analyse(y):
    """Everything that verdict() and the report take from y: {(measure, name): estimate() with p_adjusted,
    claimed and holds (a claim, and for PR of the same sign under every definition)}, name a contrast or
    'best'. 'best' has its arm, the runner-up as second, the lead over it as effect and half, and as against
    the arm with the largest p-value, which is its p. ("loss", "tie"): is a lead of Muon of LOSS_MARGIN or
    more over every other excluded?"""
    stat = {m: {a: moments(y[m][a]) for a in FACTORIAL} for m in MEASURES}
    out = {(m, c): combine(stat[m], w) for m in MEASURES for c, w in CONTRASTS.items()}
    muon = [combine(stat["loss"], {"muon": 1, a: -1}) for a in FACTORIAL if a != "muon"]  # to show: > -margin
    bounds = [float(stdtr(d["dof"], -(d["effect"] + LOSS_MARGIN) / d["se"])) if d["se"] else 1.0
              for d in muon]
    tie = min(1.0, len(bounds) * min(bounds))  # any one of three would do, hence times three
    for m, sign in ("loss", 1), ("pr", -1):
        arm, *others = sorted(FACTORIAL, key=lambda a: sign * stat[m][a][0])
        leads = {a: combine(stat[m], {a: sign, arm: -sign}) for a in others}
        against = max(others, key=lambda a: leads[a]["p"])
        p = max(leads[against]["p"], tie if m == "loss" and arm != "muon" else 0)
        out[m, "best"] = leads[others[0]] | dict(p=p, arm=arm, second=others[0], against=against)
    out["loss", "tie"] = dict(p=tie)
    n = len(y["loss"]["muon"])
    p = {h: min(1.0, e["p"] * n / (n - CAUTION)) for h, e in out.items()}
    adjusted = decide({m: {c: p[m, c] for c in CONTRASTS} for m in MEASURES},
                      {m: p[m, "best"] for m in MEASURES},
                      p["loss", "tie"])
    for (m, name), e in out.items():
        e["p_adjusted"] = adjusted[m, name]
        e["claimed"] = e["holds"] = e["p_adjusted"] <= ALPHA
        if e["claimed"] and m == "pr":
            means = [{a: np.mean(y[d][a]) for a in FACTORIAL} for d in PR_NAMES]
            e["holds"] = (all(max(v, key=v.get) == e["arm"] for v in means) if name == "best" else
                          all(sum(w * v[a] for a, w in CONTRASTS[name].items()) * e["effect"] > 0
                              for v in means))
    return out


def decision(e):
    """'resolved', 'undecided' or 'depends on the definition' of an entry of analyse()."""
    return "undecided" if not e["claimed"] else "resolved" if e["holds"] else "depends on the definition"


def verdict(y, diverged=None, head_dim=64):
    """The plan's step 10, from analyse(y) alone: (outcome, conditions, analysis). outcome: A, B, C, D,
    'none' (of the four) or 'no verdict'. conditions: [(scenario, what it needs, whether it is met, the
    numbers)]. diverged: {arm: number of seeds} of runs whose loss is infinite; analysis is {} where no
    finite contrast exists. head_dim: what PR is out of."""
    n = len(y["loss"]["muon"])
    if n < 2:
        return "no verdict", [("any", "two seeds or more", False,
                               "one seed has no spread over seeds, so no interval and no claim "
                               "of reproducibility (step 5 of the plan)")], {}
    if lost := {a: diverged[a] for a in FACTORIAL if (diverged or {}).get(a)}:
        part = any(k < n for k in lost.values())
        facts = ", ".join(f"{LABELS[a]} in {k} of {n} seeds" for a, k in lost.items())
        return ("D" if part else "none"), [
            ("A, B, C", "finite contrasts", False,
             f"diverged: {facts}; an infinite loss is a result, but no contrast with it is finite"),
            ("D", "an arm diverges in some seeds and finishes in others", part, facts)], {}
    if same := [LABELS[a] for a in FACTORIAL if not all(moments(y[m][a])[1] for m in MEASURES)]:
        return "no verdict", [("any", "seeds that differ", False,
                               f"{', '.join(same)}: the runs of different seeds agree to the last digit, so "
                               "they are not independent: check that the seed reaches initialisation and data "
                               "order")], {}
    e = analyse(y)
    stat = {m: {a: moments(y[m][a]) for a in FACTORIAL} for m in MEASURES}

    def first(m, arm):
        b, unit, digits = e[m, "best"], *{"loss": ("nats", 4), "pr": (f"of {head_dim}", 2)}[m]
        hardest = f" (against {LABELS[b['against']]})" * (b["against"] != b["second"])
        text = (f"first: {LABELS[b['arm']]}, ahead of {LABELS[b['second']]} by {b['effect']:.{digits}f} "
                f"± {b['half']:.{digits}f} {unit}, adjusted p {b['p_adjusted']:.2g}{hardest}, {decision(b)}")
        return b["arm"] == arm and b["holds"], text

    tie = e["loss", "tie"]["claimed"]
    tie_text = f"adjusted p of a lead of {LOSS_MARGIN} nats or more {e['loss', 'tie']['p_adjusted']:.2g}"
    against = any(e["pr", c]["holds"] and s * e["pr", c]["effect"] > 0
                  for c, s in (("optimizer", 1), ("qk_norm", -1)))
    share = stat["pr"]["adamw_qk"][0] / max(mean for mean, *_ in stat["pr"].values())
    margin = {"loss": LOSS_MARGIN, "pr": PR_MARGIN * head_dim}
    widest = {m: max(combine(stat[m], {b: 1, a: -1})["half"] for a, b in PAIRS) for m in MEASURES}
    noisy = any(widest[m] > margin[m] and not any(e[m, c]["claimed"] for c in CONTRASTS) for m in MEASURES)
    facts = {
        "A": [first("loss", "muon"), (not tie, tie_text), first("pr", "muon")],
        "B": [first("pr", "muon"), (tie, tie_text)],
        "C": [first("loss", "adamw_qk"), (against, ", ".join(
            f"{c} {e['pr', c]['effect']:+.2f} ± {e['pr', c]['half']:.2f}, {decision(e['pr', c])}"
            for c in ("optimizer", "qk_norm"))),
            (share <= COLLAPSE, f"share {share:.3f}")],
        "D": [(noisy, f"widest half-width loss {widest['loss']:.3g} nats against {margin['loss']}, "
                      f"pr {widest['pr']:.3g} against {margin['pr']:g} of {head_dim}")]}
    conditions = [(s, text, *fact)
                  for s in SCENARIOS for text, fact in zip(SCENARIOS[s], facts[s], strict=True)]
    met = {s: all(ok for scenario, _, ok, _ in conditions if scenario == s) for s in SCENARIOS}
    return next((s for s in "ACBD" if met[s]), "none"), conditions, e  # C before B: it says more


def logit_control(largest):
    """Whether the logits bear out scenario A's wording, from largest {arm: (n,)}, the largest scaled logit
    of each run over layers and logged steps: in every seed Muon without QK-Norm stays below AdamW without
    QK-Norm and below LOGIT_FLAG. False where one was not measured."""
    return bool(np.all(np.less(largest["muon"], np.minimum(largest["adamw"], LOGIT_FLAG))))


def quadratic_fit(lrs, losses):
    """(lr, loss) at the minimum of the parabola through the best three points in log LR; None where fewer
    than three are finite or the parabola has no minimum."""
    points = sorted((loss, lr) for lr, loss in zip(lrs, losses) if loss is not None and np.isfinite(loss))[:3]
    if len(points) < 3:
        return None
    y, x = np.array(points).T
    center = np.log(x).mean()  # keeps the fit well conditioned
    a, b, c = np.polyfit(np.log(x) - center, y, 2)
    return (float(np.exp(center - b / (2 * a))), float(c - b**2 / (4 * a))) if a > 0 else None
