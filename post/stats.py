"""Contrasts, decisions and the verdict, as plain functions on arrays y of shape (4 arms in the order of study.ARMS, n
seeds).

The unit is the run. s_p is the standard deviation over seeds within an arm, pooled over the four arms, with 4(n-1)
degrees of freedom; a difference of means with weights w over the arms has standard error s_p sqrt(sum w^2 / n). Seeds
are paired across arms; where they move all arms alike, s_p is too large and every decision errs towards 'undecided'.

One family of hypotheses carries every claim: the three contrasts on final val loss and on mean PR, six in all, and what
the scenarios need beyond them, 'one arm is best' on each measure and 'Muon's lead on loss is under the margin'. They
are tested step by step as in Holm (1979): the smallest p-value against alpha / k, then the next, where k counts the
hypotheses that can still be true together. At first k is 6. Counting what can be true *together* (Shaffer 1986) is what
keeps the extra hypotheses free until they matter: if an arm is strictly best, or leads by a margin, at least two
contrasts of that measure are not zero. So 'best' may be claimed only after two contrasts of its measure, and with 0, 1,
2, 3 contrasts of a measure resolved at most 3, 2, 2, 1 of its hypotheses are true. 'Best' and 'under the margin' share
a place: where Muon leads by the margin, calling another arm best errs no further than calling it a tie. The best arm is
tested against the runner-up, two-sided, which needs no correction for having picked them (Hung & Fithian 2016,
arXiv:1610.03944). The chance of any false claim is at most alpha.
"""
import numpy as np
from scipy.special import stdtr, stdtrit  # Student's t, at a tenth of the cost of scipy.stats

from study import ARMS, LABELS, LOGIT_FLAG

ALPHA = 0.05
CONTRASTS = {  # weights over adamw, adamw_qk, muon, muon_qk
    "optimizer": (-0.5, -0.5, 0.5, 0.5),  # Muon minus AdamW
    "qk_norm": (-0.5, 0.5, -0.5, 0.5),  # with minus without
    "interaction": (1, -1, -1, 1),  # effect of QK-Norm under Muon minus that under AdamW
}
PAIRS = [(a, b) for i, a in enumerate(ARMS) for b in ARMS[i + 1:]]
LOSS_MARGIN = 0.02  # nats a token, 2 % of perplexity: a lead below it is a tie
PR_MARGIN = 3.2  # of 64, 5 % of the head dim: a 95 % half-width above it is noise
COLLAPSE = 0.75  # 'collapsed': at most this share of the highest arm's mean PR
MUON, ADAMW, ADAMW_QK = (ARMS.index(a) for a in ("muon", "adamw", "adamw_qk"))
SCENARIOS = {  # the plan's step 10; the first of A, C, B, D whose conditions all hold, otherwise none of the four
    "A": ["Muon has the lowest loss, its lead over the runner-up resolved",
          f"that lead is not shown to be under {LOSS_MARGIN} nats",
          "Muon has the highest mean PR, its lead over the runner-up resolved, and is first under every definition"],
    "B": ["Muon has the highest mean PR, its lead over the runner-up resolved, and is first under every definition",
          f"a lead of Muon on loss of {LOSS_MARGIN} nats or more over every other arm is excluded: it ties or loses"],
    "C": ["AdamW + QK-Norm has the lowest loss, its lead over the runner-up resolved",
          "a resolved PR contrast goes against it: higher under Muon, or lower with QK-Norm",
          f"its mean PR is at most {COLLAPSE} of the highest arm's"],
    "D": ["on loss or on PR no contrast is resolved while the 95 % half-width of a difference of two arms exceeds the "
          "margin "
          f"({LOSS_MARGIN} nats, {PR_MARGIN} of 64); or an arm diverges in some seeds and finishes in others"]}
PR_NAMES = ["pr", "pr_centered", "pr_weight"]  # a PR claim has to hold in sign under all of them


def pooled(y):
    """(s_p, degrees of freedom) of y (4, n)."""
    return float(np.sqrt(y.var(axis=1, ddof=1).mean())), y.shape[0] * (y.shape[1] - 1)


def estimate(y, weights):
    """A weighted sum of arm means of y (4, n): its effect, standard error, 95 % half-width and two-sided p-value."""
    (s, dof), w = pooled(y), np.asarray(weights, float)
    effect, se = float(w @ y.mean(axis=1)), s * np.sqrt((w**2).sum() / y.shape[1])
    return dict(effect=effect, se=float(se), half=float(stdtrit(dof, 1 - ALPHA / 2) * se),
                p=float(2 * stdtr(dof, -abs(effect) / se)))


def pair(y, a, b):
    """estimate() of arm b minus arm a, both indices into ARMS."""
    w = np.zeros(len(ARMS))
    w[b], w[a] = 1, -1
    return estimate(y, w)


def decide(p_contrast, p_best, p_tie):
    """Step-down decisions. p_contrast: {measure: {contrast: p}}, p_best: {measure: p}, p_tie: p, for 'loss' and 'pr'.
    Returns adjusted p-values {(measure, name): p}, name a contrast, 'best' or 'tie'; claimed where <= ALPHA."""
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
            return adjusted | {h: min(1.0, max(floor, k * p)) if h in ready else 1.0 for h, p in waiting.items()}
        adjusted[h] = floor
        del waiting[h]
        resolved[h[0]] += h[1] in CONTRASTS


def analyse(y):
    """Everything that verdict() and the report take from y = {"loss", "pr", "pr_centered", "pr_weight": (4, n)}:
    contrasts {(measure, name): estimate() with p_adjusted, claimed and, for PR, holds (same sign under every
    definition)}, where measure is loss or pr and name a contrast or 'best'; 'best' has the arm's index as well, and
    effect is its lead over the runner-up. ("loss", "tie") says whether a lead of Muon of LOSS_MARGIN or more over every
    other arm is excluded."""
    out = {(m, c): estimate(y[m], w) for m in ("loss", "pr") for c, w in CONTRASTS.items()}
    for m, sign in ("loss", 1), ("pr", -1):
        best, second = np.argsort(sign * y[m].mean(axis=1), kind="stable")[:2]
        out[m, "best"] = pair(y[m], best, second) | dict(arm=int(best), second=int(second))
        out[m, "best"]["effect"] = abs(out[m, "best"]["effect"])
    dof = pooled(y["loss"])[1]
    others = [pair(y["loss"], i, MUON) for i in range(len(ARMS))
              if i != MUON]  # Muon minus the other: > -margin is to be shown
    bounds = [float(stdtr(dof, -(d["effect"] + LOSS_MARGIN) / d["se"])) for d in others]
    out["loss", "tie"] = dict(p=min(1.0, len(bounds) * min(bounds)))  # any one of three would do, hence times three
    adjusted = decide({m: {c: out[m, c]["p"] for c in CONTRASTS} for m in ("loss", "pr")},
                      {m: out[m, "best"]["p"] for m in ("loss", "pr")}, out["loss", "tie"]["p"])
    for h, e in out.items():
        e["p_adjusted"] = adjusted[h]
        e["claimed"] = e["holds"] = adjusted[h] <= ALPHA
        if e["claimed"] and h[0] == "pr" and h[1] == "best":
            e["holds"] = all(y[name].mean(axis=1).argmax() == e["arm"] for name in PR_NAMES)
        elif e["claimed"] and h[0] == "pr":
            e["holds"] = all(np.sign(np.dot(CONTRASTS[h[1]], y[name].mean(axis=1))) == np.sign(e["effect"])
                             for name in PR_NAMES)
    return out


def decision(e):
    """'resolved', 'undecided' or 'depends on the definition' of an entry of analyse()."""
    return "undecided" if not e["claimed"] else "resolved" if e["holds"] else "depends on the definition"


def verdict(y, diverged=None):
    """The plan's step 10, from analyse(y) alone: (outcome, conditions, analysis). outcome: A, B, C, D, 'none' (of the
    four) or 'no verdict'. conditions: [(scenario, what it needs, whether it is met, the numbers)]. diverged: {arm:
    number of seeds} of runs whose loss is infinite; analysis is {} where no finite contrast exists."""
    n = y["loss"].shape[1]
    if n < 2:
        return "no verdict", [("any", "two seeds or more", False,
                               "one seed has no spread over seeds, so no interval and no claim "
                               "of reproducibility (step 5 of the plan)")], {}
    if diverged:
        part = {a: k for a, k in diverged.items() if 0 < k < n}
        facts = ", ".join(f"{LABELS[a]} in {k} of {n} seeds" for a, k in diverged.items() if k)
        return ("D" if part else "none"), [
            ("A, B, C", "finite contrasts", False,
             f"diverged: {facts}; an infinite loss is a result, but no contrast with it is finite"),
            ("D", "an arm diverges in some seeds and finishes in others", bool(part), facts)], {}
    if not all(pooled(y[m])[0] > 0 for m in ("loss", "pr")):
        return "no verdict", [("any", "seeds that differ", False,
                               "the runs of different seeds agree to the last digit, "
                               "so they are not independent: check that the seed reaches initialisation and data "
                               "order")], {}
    e = analyse(y)
    means = y["pr"].mean(axis=1)

    def first(m, arm):
        b, unit = e[m, "best"], {"loss": "nats", "pr": "of 64"}[m]
        digits = {"loss": 4, "pr": 2}[m]
        text = (f"first: {LABELS[ARMS[b['arm']]]}, ahead of {LABELS[ARMS[b['second']]]} by {b['effect']:.{digits}f} "
                f"± {b['half']:.{digits}f} {unit}, adjusted p {b['p_adjusted']:.2g}, {decision(b)}")
        return b["arm"] == arm and b["holds"], text

    tie = e["loss", "tie"]["claimed"]
    tie_text = f"adjusted p of a lead of {LOSS_MARGIN} nats or more {e['loss', 'tie']['p_adjusted']:.2g}"
    against = [(c, s) for c, s in (("optimizer", 1), ("qk_norm", -1))
               if e["pr", c]["holds"] and np.sign(e["pr", c]["effect"]) == s]
    share = means[ADAMW_QK] / means.max()
    noisy = {m: not any(e[m, c]["claimed"] for c in CONTRASTS) and pair(y[m], 0, 1)["half"] > margin
             for m, margin in (("loss", LOSS_MARGIN), ("pr", PR_MARGIN))}
    widths = ", ".join(f"{m} {pair(y[m], 0, 1)['half']:.3g} against {margin}" for m, margin in
                       (("loss", LOSS_MARGIN), ("pr", PR_MARGIN)))
    facts = {
        "A": [first("loss", MUON), (not tie, tie_text), first("pr", MUON)],
        "B": [first("pr", MUON), (tie, tie_text)],
        "C": [first("loss", ADAMW_QK), (bool(against), ", ".join(
            f"{c} {e['pr', c]['effect']:+.2f} ± {e['pr', c]['half']:.2f}, {decision(e['pr', c])}"
            for c in ("optimizer", "qk_norm"))),
            (bool(share <= COLLAPSE), f"share {share:.3f}")],
        "D": [(any(noisy.values()), "half-width " + widths)]}
    conditions = [(s, text, *fact) for s in SCENARIOS for text, fact in zip(SCENARIOS[s], facts[s], strict=True)]
    met = {s: all(ok for scenario, _, ok, _ in conditions if scenario == s) for s in SCENARIOS}
    return next((s for s in "ACBD" if met[s]), "none"), conditions, e  # C before B: it says more where both hold


def logit_control(largest):
    """Whether the logits bear out scenario A's wording, from largest (4, n), the largest scaled logit of each run over
    layers and logged steps: in every seed Muon without QK-Norm stays below AdamW without QK-Norm and below LOGIT_FLAG.
    False where one was not measured."""
    return bool(np.all(largest[MUON] < np.minimum(largest[ADAMW], LOGIT_FLAG)))


def quadratic_fit(lrs, losses):
    """(lr, loss) at the minimum of the parabola through the best three points in log LR; None where fewer than three
    are finite or the parabola has no minimum."""
    points = sorted((loss, lr) for lr, loss in zip(lrs, losses) if loss is not None and np.isfinite(loss))[:3]
    if len(points) < 3:
        return None
    y, x = np.array(points).T
    center = np.log(x).mean()  # keeps the fit well conditioned
    a, b, c = np.polyfit(np.log(x) - center, y, 2)
    return (float(np.exp(center - b / (2 * a))), float(c - b**2 / (4 * a))) if a > 0 else None
