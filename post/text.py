"""The post: the nine sections of the plan's step 11, filled from a study that report.load() read.

build() is the post as it reads; above it are its tables, each from the arrays it shows, and the sentences
that depend on the results. Sentences state what was set or measured; what needs a person's judgement is a
marked place with the numbers for it. Contrasts, headline and verdict are those of the 2x2; tables hold every
arm.
"""
import itertools
import re

import numpy as np

from configurator import ROOT
from post import stats
from post.stats import ALPHA, CONTRASTS, PR_NAMES, decision
from study import FACTORIAL, FREE, LABELS, MAX_EXTENSIONS, head_dim

FIGURES = ["1_val_loss", "2_mean_pr", "3_loss_vs_pr", "4_pr_heatmap", "5_spectra", "6_lr_sweep", "7_rates"]
TODO = "> **To be written by a person:**"
PR_DEFINITIONS = {
    "pr": "keys that attention sees, after QK-Norm and RoPE, uncentred, PR1 (the plan's RankProbe)",
    "pr_centered": "the same keys minus their mean, PR2 (a vector added to all keys cancels in the softmax)",
    "pr_pre_rope": "the keys before RoPE, uncentred, PR1",
    "pr_weight": "W_K with the QK gain folded in, PR2 (needs no batch)"}
WHY = {"adamw": "the baseline", "adamw_qk": "what QK-Norm changes under AdamW",
       "muon": "what Muon changes without QK-Norm", "muon_qk": "whether QK-Norm still matters under Muon"}
NAMES = {"optimizer": "Muon minus AdamW", "qk_norm": "QK-Norm: with minus without",
         "interaction": "Interaction: QK-Norm's effect under Muon minus under AdamW"}
# name, unit (PR: of the head dim), digits
MEASURES = {"loss": ("val loss", "nats a token", 4), "pr": ("mean PR", "of {}", 2)}
HOLDS, DEPENDS = "holds at neighbouring rates", "depends on the rate"
NOT_RUN = "not run at neighbouring rates"
PLAN = dict(num_params=79_124_992, max_tokens=300_000_000)  # the plan's scale
MAIN_LOGS = "last rows of `*-seed*/log.jsonl`"


# ---- pieces
def join(items, by=", "):
    return by.join(map(str, items))


def count(n):
    """1228800 -> '1.23M'; below a million with thousands separators."""
    return f"{n / 1e9:.3g}B" if n >= 1e9 else f"{n / 1e6:.3g}M" if n >= 1e6 else f"{n:,}"


def plural(n, word):
    return f"{n} {word}" + "s" * (n != 1)


def paragraphs(*blocks):
    return join(filter(None, blocks), "\n\n")


def bullets(lines, mark="- "):
    return join((mark + line for line in lines), "\n")


def table(head, rows, source):
    """A Markdown table; columns of numbers are right-aligned."""
    number = re.compile(r"[+\-±]? ?\d|missing|not available|diverged|$")
    right = lambda i: rows and all(number.match(str(r[i])) for r in rows)
    sides = ["---:" if right(i) else "---" for i in range(len(head))]
    lines = ["| " + join(cells, " | ") + " |" for cells in (head, sides, *rows)]
    return join([*lines, "", f"*Source: {source}.*"], "\n")


def arms_table(S, head, cells, source):
    """A table() with a row for each arm: its label and cells(arm)."""
    return table(["Config", *head], [[LABELS[a], *cells(a)] for a in S["arms"]], source)


def spread(values, digits):
    """Mean and spread over seeds of the values that are there: half the difference of two, the standard
    deviation of more."""
    v = np.array([x for x in values if not np.isnan(x)])
    if not len(v):
        return "missing"
    if np.isinf(v).any():
        return "diverged" if len(v) == 1 else f"diverged in {np.isinf(v).sum()} of {len(v)}"
    by = np.ptp(v) / 2 if len(v) == 2 else v.std(ddof=1) if len(v) > 2 else None
    return f"{v.mean():.{digits}f}" + (f" ± {by:.{digits}f}" if by is not None else "")


def spread_words(n):
    few = {1: "one seed", 2: "± half the difference of the two seeds"}
    return few.get(n, f"± standard deviation over {n} seeds")


def over_seeds(y, name, arm):
    return spread(y[name][arm], 4 if name == "loss" else 2)


def figure(S, number, caption):
    """A figure with its caption; '' where it is missing, which the top of the post says."""
    name = FIGURES[number - 1]
    there = (S["dir"] / f"figures/{name}.png").exists()
    return f"![Figure {number}: {caption}](figures/{name}.png)\n\n*Figure {number}. {caption}.*" * there


def effect(e, digits):
    return f"{e['effect']:+.{digits}f} ± {e['half']:.{digits}f}"


# ---- what may be claimed
def rate_states(near, e):
    """{(measure, name): (state, lowest, highest)} of the contrasts and the 'best' of analysis e: state is
    HOLDS, DEPENDS or NOT_RUN, the numbers the range of a contrast when each arm is given any of its three
    rates, None where that was not run or not finite. near: {arm: {measure: values at half, once and twice the
    chosen rate}}."""
    if not set(FACTORIAL) <= near.keys():
        return {h: (NOT_RUN, None, None) for h in e}
    out = {}
    for m, name in (h for h in e if h[1] != "tie"):
        values = {a: near[a][m] for a in FACTORIAL}
        if name == "best":
            arm, sign = e[m, name]["arm"], -1 if m == "loss" else 1
            leads = [stats.rate_range(values, {arm: sign, b: -sign})[0] for b in FACTORIAL if b != arm]
            low, high = min(leads), np.inf  # how far it may lead is not shown
        else:
            low, high = stats.rate_range(values, CONTRASTS[name])
        holds = low > 0 if e[m, name]["effect"] > 0 else high < 0
        shown = (low, high) if np.isfinite([low, high]).all() else (None, None)
        out[m, name] = HOLDS if holds else DEPENDS, *shown
    return out


GRADES = ["resolved", "dependent on the learning rate", "dependent on the definition", "undecided"]


def grade(S, m, name):
    """Which of GRADES a contrast or 'best' has. A headline is made of what is resolved alone: under every
    definition, and at neighbouring rates where these were run."""
    e = S["verdict"][2][m, name]
    if not e["holds"]:
        return "dependent on the definition" if e["claimed"] else "undecided"
    return "dependent on the learning rate" if S["rates"][m, name][0] == DEPENDS else "resolved"


def claim(S, m, name, numbers=True):
    """A resolved contrast as a clause. A main effect beside a resolved interaction is an average, and is
    called one."""
    e, (what, unit, digits) = S["verdict"][2], MEASURES[m]
    up = e[m, name]["effect"] > 0
    if name == "interaction":
        said = f"QK-Norm's effect on {what} is {'higher' if up else 'lower'} under Muon than under AdamW"
    else:
        subject, average = "Muon" if name == "optimizer" else "QK-Norm", e[m, "interaction"]["claimed"]
        said = f"{subject} {'raises' if up else 'lowers'} {what}" + " on average" * average
    by = f" by {effect(e[m, name], digits).lstrip('+-')} {unit.format(head_dim(S['config']))}"
    return said + by * numbers


def rate_bound(S):
    """Whether something that the scenario rests on depends on the learning rate."""
    outcome, _, e = S["verdict"]
    fixed = lambda m, name: grade(S, m, name) == "resolved"
    if outcome == "C" and not any(fixed("pr", c) and sign * e["pr", c]["effect"] > 0
                                  for c, sign in (("optimizer", 1), ("qk_norm", -1))):
        return True
    first = {"A": ["loss", "pr"], "B": ["pr"], "C": ["loss"]}.get(outcome, [])
    return not all(fixed(m, "best") for m in first)


def title(S):
    """The headline, from the verdict and nothing else."""
    outcome, _, e = S["verdict"]
    size = f"at {count(S['config']['num_params'])} parameters"
    if outcome == "no verdict":
        return f"AdamW, Muon and QK-Norm {size}: no verdict"
    if outcome == "D":
        return f"Not to be posted: AdamW, Muon and QK-Norm {size} are too noisy or inconsistent across seeds"
    if S["diverged"]:
        return f"{join(LABELS[a] for a in S['diverged'])} diverged at the chosen learning rate, {size}"
    if rate_bound(S):
        return f"Scenario {outcome} at the chosen learning rates, but not at half and twice these, {size}"
    if outcome == "A":  # the plan's wording speaks of logits, so they have to bear it out
        words = ("Muon provides implicit attention logit control, making QK-Norm unnecessary and harmful"
                 if stats.logit_control(S["y"]["logit"]) else
                 "Muon without QK-Norm has the lowest loss and the highest participation ratio of keys")
    elif outcome == "B":  # the plan's speaks of a collapse by QK-Norm, and of little loss
        pr = {a: S["y"]["pr"][a].mean() for a in FACTORIAL}
        collapse = (grade(S, "pr", "qk_norm") == "resolved" and e["pr", "qk_norm"]["effect"] < 0
                    and pr["muon_qk"] <= stats.COLLAPSE * pr["muon"])
        words = ("QK-Norm causes measurable dimensional collapse, but the impact on performance is limited"
                 if collapse and abs(e["loss", "qk_norm"]["effect"]) < stats.LOSS_MARGIN else
                 "Muon without QK-Norm has the highest participation ratio of keys, without a lead on loss,")
    elif outcome == "C":
        words = ("High-dimensional keys may be unnecessary: AdamW + QK-Norm has the lowest loss despite "
                 "collapsed PR")
    else:
        told = {}
        for m, c in itertools.product(MEASURES, ("optimizer", "qk_norm")):
            inter = e[m, "interaction"]
            # a main effect of one sign in one half of the design and the other in the other describes neither
            crossed = inter["claimed"] and abs(inter["effect"]) / 2 > abs(e[m, c]["effect"])
            told[m, "interaction" if crossed else c] = None
        claims = [claim(S, *h, numbers=False) for h in told if grade(S, *h) == "resolved"]
        words = (join(claims, "; ") or "No main effect of Muon or QK-Norm is resolved" +
                 " at neighbouring learning rates" * any(e[h]["holds"] for h in told)) + ","
    not_run = S["rates"]["loss", "optimizer"][0] == NOT_RUN
    return f"{words} {size}" + " (neighbouring learning rates were not run)" * not_run


def tldr(S):
    outcome, conditions, e = S["verdict"]
    loss, pr = ({a: S["y"][m][a].mean() for a in FACTORIAL} for m in MEASURES)
    low, high, said = min(loss, key=loss.get), max(pr, key=pr.get), []
    if np.isfinite([*loss.values(), *pr.values()]).all():
        said.append(f"After {count(S['config']['max_tokens'])} training tokens {LABELS[low]} has the lowest "
                    f"mean final val loss, {loss[low]:.4f} nats a token, and " +
                    f"{LABELS[high]} " * (low != high) + f"the highest mean participation ratio of keys, "
                    f"{pr[high]:.2f} of {head_dim(S['config'])}" +
                    ", of the four arms of the 2x2" * (len(S["arms"]) > len(FACTORIAL)) + ".")
    if e:
        parts = []
        for word in GRADES:
            of = [h for h in itertools.product(MEASURES, CONTRASTS) if grade(S, *h) == word]
            what = [claim(S, m, c) if word == "resolved" else
                    f"{c.replace('qk_norm', 'QK-Norm')} on {MEASURES[m][0]}" for m, c in of]
            parts += [f"{word}: {join(what)}"] * bool(what)
        said.append(f"Of the six contrasts, {join(parts, '; ')}.")
    words = {"none": "None of the four scenarios of the plan holds",
             "no verdict": f"No verdict: {conditions[0][3]}"}
    plan = f"This is scenario {outcome} of the plan"
    plan += ", at the chosen learning rates but not beside them" * rate_bound(S)
    return join([*said, words.get(outcome, plan) + "."], " ")


# ---- the top, and section 2
def scale_note(c):
    """What a scale below the plan's cannot show."""
    small = [k for k in PLAN if c[k] < 0.99 * PLAN[k]]
    tasks = ", nor anything about tasks such as HellaSwag, which such a model cannot do"
    return (f"> **Scale {c['scale']}**: {count(c['num_params'])} parameters, {count(c['max_tokens'])} "
            f"training tokens a run. It can show that the whole procedure works, and how large an effect is "
            f"in a model of this size on this text. It cannot show what happens at the plan's "
            f"{count(PLAN['num_params'])} parameters and {count(PLAN['max_tokens'])} tokens"
            f"{tasks * ('num_params' in small)}.") if small else ""


def notices(S):
    """What is missing."""
    lacks, no = S["missing"] + S["absent"], " No verdict is given." * bool(S["missing"])
    head = f"> **Incomplete: {plural(len(lacks), 'part')} missing.**{no}\n>\n"
    return head + bullets(lacks, "> - ") if lacks else ""


def configs_table(S):
    def cells(a):
        c = S["configs"][a]
        norm = "no" if not c["qk_norm"] else "yes" if c["qk_gain"] else "yes, gains frozen at one"
        first = (ROOT / f"config/{a}.py").read_text(encoding="utf-8").split("\n")[0]  # of a further arm
        return LABELS.get(c["optimizer"], c["optimizer"]), norm, WHY.get(a, first.strip("# ."))

    return arms_table(S, ["Hidden matrices", "QK-Norm", "Why"], cells, "`config.json` of the runs, `config/`")


def differences(runs):
    """Keys in which main runs differ that neither the design nor another start of a run changes."""
    varied = FREE | {"arm", "seed", "optimizer", "qk_norm", "qk_gain", "learning_rate", "num_params"}
    keys = sorted({k for r in runs for k in r["config"]} - varied)
    return join(k for k in keys if any(r["config"].get(k) != runs[0]["config"].get(k) for r in runs))


def tuning(S):
    seeds = sorted({s for p in S["picks"].values() for s in p["seeds"]})
    tokens = sorted({r["config"]["max_tokens"] for r in S["sweep"]})
    return (f"Each arm has its own grid of learning rates, run for {join(map(count, tokens)) or 'no'} tokens "
            f"with seed{'s' * (len(seeds) > 1)} {join(seeds) or 'not known'}. The lowest final val loss wins. "
            f"Several seeds give its mean, and a tie where a neighbour is less than two standard errors of the "
            f"difference higher. A winner at an edge gets points a factor of two further out, up to "
            f"{MAX_EXTENSIONS} a side.")


def sweep_table(S):
    def cells(a):
        if a not in S["picks"]:
            return ["missing"] * 6
        p, tried = S["picks"][a], S["picks"][a]["tried"]
        losses = [spread([np.inf if v is None else v for v in t["val_losses"]], 4) for t in tried]
        at = [t["lr"] for t in tried].index(p["lr"])
        tie = f"with {join((f'{lr:g}' for lr in p['tie']), ' and ')}" if p["tie"] else \
            "no" if len(p["seeds"]) > 1 else "not known from one seed"
        return [f"{p['lr']:g}", "yes" if p["bracketed"] else "**not bracketed**", losses[at],
                *(losses[i] if 0 <= i < len(tried) else "none" for i in (at - 1, at + 1)), tie]

    n = max((len(p["seeds"]) for p in S["picks"].values()), default=1)
    return arms_table(S, ["Chosen LR", "Bracketed", "Val loss", "next LR below", "next LR above", "Tie"], cells,
                      f"`chosen_lr.json`, {spread_words(n)}")


def rates_table(S, m):
    """Each arm at half, once and twice its rate for the whole main budget; '' where no arm has all three."""
    what, _, digits = MEASURES[m]
    words = ["**no**, half is better", "yes", "**no**, twice is better"]

    def cells(a):
        if a not in S["near"]:
            return ["missing"] * 5
        near = S["near"][a]
        shown = ["diverged" if np.isinf(x) else f"{v:.{digits}f}" for v, x in zip(near[m], near["loss"])]
        return [f"{near['lr'][1]:g}", *shown, words[int(np.argmin(near["loss"]))]]

    head = ["Chosen LR", f"{what[0].upper()}{what[1:]} at half", "at the chosen LR", "at twice", "Choice holds"]
    return arms_table(S, head, cells, "`neighbours/*/log.jsonl` and the main runs of the same seed") * bool(S["near"])


# ---- sections 3 and 4
def contrast_table(S, m):
    e, (_, unit, digits) = S["verdict"][2], MEASURES[m]
    if not e:
        return f"*No contrasts: {S['verdict'][1][0][3]}.*"

    def line(name, h):
        state, low, high = S["rates"][m, h]
        by = f", {low:+.{digits}f} to {high:+.{digits}f}" if low is not None else ""
        return [name, effect(e[m, h], digits), f"{e[m, h]['p']:.2g}", f"{e[m, h]['p_adjusted']:.2g}",
                decision(e[m, h]), f"{state}{by}" if e[m, h]["claimed"] else "no claim"]

    best = e[m, "best"]
    lead = f"Lead of the first arm, {LABELS[best['arm']]}, over {LABELS[best['second']]}"
    lead += f" (p: against {LABELS[best['against']]})" * (best["against"] != best["second"])
    return table([f"Contrast, {unit.format(head_dim(S['config']))}", "Effect ± 95 %", "p", "p adjusted",
                  "Decision", "When each arm has any of its three rates"],
                 [*(line(NAMES[c], c) for c in CONTRASTS), line(lead, "best")],
                 f"{MAIN_LOGS}, by `post/stats.py`; the last column by `neighbours/*/log.jsonl`, one seed")


def resolution(S):
    """What the seeds of this study can resolve."""
    y, n, e = S["y"], len(S["seeds"]), S["verdict"][2]
    cells = lambda m, c: [f"± {e[m, c]['half']:.{MEASURES[m][2]}f}",
                          f"{stats.detectable(e[m, c], n):.{MEASURES[m][2]}f}"]
    found = "found with 80 % power"
    return table(
        ["Contrast", "Val loss, 95 %", found, "seeds for 0.01 nats", "Mean PR, 95 %", found],
        [[NAMES[c], *cells("loss", c), stats.seeds_needed(y["loss"], CONTRASTS[c]), *cells("pr", c)]
         for c in CONTRASTS],
        "`post/stats.py`, from each arm's own spread; found: the true effect that such a study would claim 8 "
        "times in 10, at the strictest of Holm's steps; seeds: for a 95 % interval of ± 0.01 nats")


def definitions(S):
    """PR under all four definitions, and whether the order of the arms is one."""
    y, arms = S["y"], S["arms"]
    whole = np.isfinite([y[name][a] for name in PR_DEFINITIONS for a in arms]).all()
    orders = {tuple(sorted(arms, key=lambda a: -y[name][a].mean())) for name in PR_DEFINITIONS}
    return paragraphs(
        arms_table(S, PR_DEFINITIONS, lambda a: [over_seeds(y, name, a) for name in PR_DEFINITIONS],
                   f"{MAIN_LOGS}; {spread_words(len(S['seeds']))}"),
        bullets(f"`{name}`: {text}." for name, text in PR_DEFINITIONS.items()),
        whole and f"The order of the arms is {'not ' * (len(orders) > 1)}the same under all four. A PR claim "
                  f"has to hold in sign under {join(f'`{name}`' for name in PR_NAMES)}, or it 'depends on the "
                  f"definition'.")


def one_step_apart(S):
    """Every pair of arms that differ in the optimizer alone, or in QK-Norm alone: none, frozen gains, learned."""
    y = S["y"]
    of = {a: (c["optimizer"], c["qk_norm"] and ("learned" if c["qk_gain"] else "frozen"))
          for a, c in S["configs"].items()}
    pairs = [(a, b) for a, b in itertools.combinations(S["arms"], 2)
             if of[a] != of[b] and (of[a][0] == of[b][0] or of[a][1] == of[b][1])]

    def cell(name, a, b):
        if len(S["seeds"]) < 2 or not np.isfinite([y[name][a], y[name][b]]).all():
            return "missing"
        return effect(stats.pair(y[name], a, b), 4 if name == "loss" else 2)

    return table(["Difference", "Val loss", *PR_DEFINITIONS],
                 [[f"{LABELS[b]} minus {LABELS[a]}", *(cell(name, a, b) for name in ("loss", *PR_DEFINITIONS))]
                  for a, b in pairs],
                 f"{MAIN_LOGS}; 95 % intervals, each alone and not corrected: no verdict hangs on them")


# ---- sections 5 and 6
def correlation(S):
    """The number behind figure 3: how loss and PR go together at the end of training."""
    pr, loss = (np.array([S["y"][m][a] for a in S["arms"]]) for m in ("pr", "loss"))
    if not np.isfinite([pr, loss]).all():
        return ""
    over_runs = np.corrcoef(pr.flat, loss.flat)[0, 1]
    over_arms = np.corrcoef(pr.mean(1), loss.mean(1))[0, 1]
    return (f"At the end of training the correlation of mean PR and val loss is {over_runs:+.2f} over "
            f"{pr.size} runs and {over_arms:+.2f} over the means of {len(pr)} arms. Runs of one arm lie "
            f"together, so these are about {len(pr)} points, and no test is made of them.")


TASKS = {"hellaswag": "acc_norm", "lambada": "acc"}  # task: which of its numbers is shown


def evaluations(S, arm, seed):
    """Val perplexity and the TASKS in percent of one run, with standard errors, or why there is none."""
    result = S["results"].get(f"{arm}-seed{seed}", {})
    none = "diverged" if S["cell"].get((arm, seed), {}).get("status") == "diverged" else "missing"
    cells = [f"{result['val_ppl']:.2f}" if "val_ppl" in result else none]
    for task, metric in TASKS.items():
        r = result.get(task, {})
        error = f" ± {100 * r[f'{metric}_stderr']:.1f}" if r.get(f"{metric}_stderr") is not None else ""
        cells.append(f"{100 * r[metric]:.1f}{error} %" if metric in r else
                     "not available" if "not_available" in r else none)
    return cells


def downstream(S):
    """Every evaluation, the results table of step 9, and what to hold them against."""
    results, seeds = S["results"], S["seeds"]
    cells = {(a, s): evaluations(S, a, s) for a, s in itertools.product(S["arms"], seeds)}

    def line(a):  # of the results table
        yield f"{S['picks'][a]['lr']:g}" if a in S["picks"] else "missing"
        yield from (over_seeds(S["y"], m, a) for m in MEASURES)
        for i, (task, metric) in enumerate(TASKS.items(), 1):
            words = [cells[a, s][i] for s in seeds if not cells[a, s][i][0].isdigit()]
            yield words[0] if words else \
                spread([100 * results[f"{a}-seed{s}"][task][metric] for s in seeds], 1) + " %"

    parts = [(part, r) for result in results.values() for part, r in result.items() if isinstance(r, dict)]
    why_not = {f"Not available: {part}: {r['not_available']}" for part, r in parts if "not_available" in r}
    return paragraphs(
        table(["Config", "Seed", "Val PPL", "HellaSwag", "LAMBADA"],
              [[LABELS[a], s, *found] for (a, s), found in cells.items()],
              "`results.json`; HellaSwag 10-shot acc_norm, LAMBADA 0-shot last-word accuracy, ± standard "
              "error over examples"),
        arms_table(S, ["Best LR", "Val Loss", "Mean PR", "HellaSwag", "LAMBADA"], line,
                   f"`chosen_lr.json`, {MAIN_LOGS}, `results.json`; {spread_words(len(seeds))}"),
        bullets([*sorted(why_not), "Chance on HellaSwag is 25 %.",
                 "GPT-2 124M in the same harness: HellaSwag acc 28.9 %, acc_norm 31.1 %; LAMBADA acc 32.56 %, "
                 "ppl 40.06."]),
        S["scale"] == "80m" and sanity(S))


def sanity(S):
    """The ranges that were expected at 80m before any run."""
    muon, adamw = (np.mean([S["y"]["loss"][a] for a in FACTORIAL if S["configs"][a]["optimizer"] == name])
                   for name in ("muon", "adamw"))
    task = lambda name: np.mean([100 * r[name][TASKS[name]] for r in S["results"].values()
                                 if TASKS[name] in r.get(name, {})] or np.nan)
    rows = [("Val loss, mean of the Muon arms", muon, 3.4, 3.6),
            ("AdamW above Muon", adamw - muon, 0.03, 0.1),
            ("HellaSwag, %", task("hellaswag"), 25, 27.5), ("LAMBADA, %", task("lambada"), 3, 15)]
    inside = lambda v, low, high: "missing" if not np.isfinite(v) else "yes" if low <= v <= high else "**no**"
    return table(["Sanity check", "Measured", "Expected", "Inside"],
                 [[name, spread([v], 3), f"{low} to {high}", inside(v, low, high)]
                  for name, v, low, high in rows],
                 f"{MAIN_LOGS}, `results.json`; ranges expected before any run, of 80M parameters and 300M "
                 f"tokens of FineWeb-Edu")


# ---- sections 7 to 9
def reasons(conditions):
    """What each scenario needs and whether it is so, as nested list items."""
    out = []
    for s in dict.fromkeys(s for s, *_ in conditions):
        mine = [c for c in conditions if c[0] == s]
        out += [f"- **{s}: {'holds' if all(ok for _, _, ok, _ in mine) else 'does not hold'}**"]
        out += [f"    - {'met' if ok else 'not met'}: {text} ({fact})" for _, text, ok, fact in mine]
    return join(out, "\n")


def limitations(S):
    c, n, near, picks = S["config"], len(S["seeds"]), S["near"], S["picks"]
    named = lambda arms: join((LABELS[a] for a in arms), "; ")  # a label may hold a comma
    wide = named(a for a in picks if not picks[a]["bracketed"])
    ties = named(a for a in picks if picks[a]["tie"])
    off = named(a for a in near if min(near[a]["loss"]) < near[a]["loss"][1])
    events = [x for r in S["runs"] for x in r["events"]]
    restarts, spots = (sum(x["event"] == kind for x in events) for kind in ("restart", "spot_check"))
    flags = sum(bool(x.get("flags")) for x in events)
    return bullets(filter(None, [
        f"{count(c['num_params'])} params, a single architecture (LLaMA-style, {c['n_layer']} layers of "
        f"width {c['n_embd']}), one data set, one tokenizer.",
        f"{count(c['max_tokens'])} tokens a run, {c['max_tokens'] / c['num_params']:.2g} a parameter.",
        f"{plural(n, 'seed')}: " + (
            f"the spread of an arm has {plural(n - 1, 'degree')} of freedom, and what is smaller than section 3 "
            "can find stays unseen." if n > 1 else "no spread is known."),
        "Unknown whether this holds at a larger scale, on other data, or for longer training.",
        "QK-Norm works in production models (Gemma 3, Qwen3); nothing here tests the scale and stability "
        "they need it for.",
        f"Learning rates were tuned on short runs. Weight decay ({c['weight_decay']:g}), batch size, betas and "
        f"warmup are the same in all arms and were not tuned.",
        f"PR is measured on {c['probe_tokens']:,} val tokens, and depends on its definition and on the "
        f"learning rate (section 4).",
        wide and f"Not bracketed, so perhaps not at its best learning rate: {wide}.",
        ties and f"A tie between neighbouring learning rates, so that chance had a part in the choice: {ties}.",
        off and f"At the main budget half or twice the chosen learning rate ended lower, in one seed: {off}.",
        not near and "No arm was trained at the rates beside its own for the main budget: how far an "
                     "effect is one of the learning rate is not known.",
        restarts and f"{plural(restarts, 'restart')} after a loss that was not finite. The batch at fault "
                     f"was left out, so these runs saw other data than the other arms of their seed.",
        f"{plural(spots, 'spot check')} during training (step 6), {flags} with flags; all are events in "
        "`*-seed*/log.jsonl`."]))


# ---- the post
def build(S):
    """The whole post as Markdown, block by block, from report.load()'s dict."""
    c, arms, seeds, y = S["config"], S["arms"], S["seeds"], S["y"]
    noise = [x for r in S["results"].values() if (x := r.get("val_loss_stderr_bootstrap")) is not None]
    n, top, params, tokens = len(seeds), head_dim(c), count(c["num_params"]), count(c["max_tokens"])
    outcome, conditions, e = S["verdict"]
    others = join((LABELS[a] for a in arms if a not in FACTORIAL), " and ")
    scenario = {"none": "none of the four", "no verdict": "no verdict"}.get(outcome, f"scenario {outcome}")
    blocks = [
        f"# {S['title']}", scale_note(c), notices(S),

        "## 1. TLDR", tldr(S), f"**Verdict: {outcome}**",

        "## 2. Experimental Setup",
        "### Architecture", S["experiment_config"].split("\n", 2)[2].strip(),
        "*Source: `config.json` of the runs, and the code.*",
        f"### The {len(arms)} configs and why", configs_table(S),
        f"{plural(n, 'seed')} per config, {tokens} tokens, {params} param model. Seeds {join(seeds)}; a seed "
        f"fixes the initial weights and the order of the data, the same in every arm. The main runs differ "
        f"in optimizer, QK-Norm, learning rate and seed, and in {differences(S['runs']) or 'nothing else'}.",
        "### Registration and statistics", S["registration"],
        f"The unit is the run. Intervals are 95 %, and each arm has its own variance over seeds (Welch's, "
        f"with Satterthwaite's degrees of freedom), as arms are not equally noisy. The chance of any false "
        f"claim is kept at {ALPHA:g} over the six contrasts and what the scenarios need beyond them, by "
        f"Holm's steps and with p-values raised for few seeds; `post/stats.py` says how." +
        f" Contrasts, headline and verdict are about the 2x2; tables hold {others} too." * bool(others),
        "### LR tuning methodology", tuning(S),
        figure(S, 6, "Final val loss by learning rate; the star is the chosen one"), sweep_table(S),
        "### Does the choice hold at the main budget?",
        rates_table(S, "loss") or f"Not known: `bash sweep.sh {S['scale']} neighbours` was not run.",

        "## 3. Results: Loss",
        figure(S, 1, "Val loss over training"),
        arms_table(S, [*(f"Seed {s}" for s in seeds), "Mean"],
                   lambda a: [*(spread([x], 4) for x in y["loss"][a]), over_seeds(y, "loss", a)],
                   f"final val loss in nats a token, {MAIN_LOGS}; mean {spread_words(n)}"),
        contrast_table(S, "loss"),
        *(["An interval may exclude zero and the decision still be 'undecided': an interval is for one "
           "contrast, a decision for the whole family.",
           f"### What {plural(n, 'seed')} can resolve", resolution(S)] if e else []),
        noise and "Evaluation noise is apart from this: the bootstrap over val sequences gives a standard "
                  f"error of at most {max(noise):.4f} nats for one run (`results.json`). It enters no "
                  "interval.",

        "## 4. Results: Representation Quality",
        f"PR1 is (sum s)^2 / sum s^2 and PR2 is (sum s^2)^2 / sum s^4, of the singular values s of one "
        f"head's keys, out of {top}. 'Mean PR' is `pr` below, over heads and layers.",
        "### PR trajectories", figure(S, 2, "Mean PR over training"), contrast_table(S, "pr"),
        "### Definitions side by side", definitions(S),
        "### Arms that differ in one thing",
        "QK-Norm's effect under each optimizer and Muon's with and without QK-Norm, each arm at its own learning rate.",
        one_step_apart(S),
        "### Per-layer breakdown", figure(S, 4, "PR of each layer at the end of training"),
        "### Singular value spectra",
        figure(S, 5, "Singular values of the keys, sorted, in an early, a middle and a late layer"),
        "### PR against learning rate",
        "A PR effect may be a learning-rate effect. Figure 7 shows PR at the end of every sweep run, and at "
        "the main budget where the stage `neighbours` was run.",
        figure(S, 7, "Val loss and mean PR against learning rate, of the sweep and at the main budget"),
        rates_table(S, "pr"),

        "## 5. The Relationship Between Loss and PR",
        figure(S, 3, "Val loss against mean PR at each token checkpoint"),
        "Both change over training, so runs are compared within one token count and never pooled over time.",
        correlation(S),

        "## 6. Downstream Evaluation", downstream(S),

        "## 7. Discussion",
        f"### What the contrasts decide: {scenario}", reasons(conditions),
        "*Source: the tables of contrasts in sections 3 and 4, by `post/stats.py`.*",
        "### Mechanism",
        f"{TODO} the mechanistic explanation, why you think this happens, and what these numbers leave open.",
        arms_table(S, ["Mean PR", "centred", "of the weights", "Largest scaled logit", "Attention entropy"],
                   lambda a: [*(over_seeds(y, name, a) for name in PR_NAMES), spread(y["logit"][a], 1),
                              spread(y["attn_entropy"][a], 3)],
                   "`*-seed*/log.jsonl`: PR and entropy (nats) at the end, the logit over all layers and rows"),

        "## 8. Limitations", limitations(S),

        "## 9. Recommendations",
        f"{TODO} practical advice, no wider than section 8 allows and resting on resolved contrasts alone."]
    return paragraphs(*blocks) + "\n"
