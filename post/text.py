"""The post: the nine sections of the plan's step 11, filled from a study that report.load() read.

build() is the post as it reads, from title to appendix; above it are its tables, each from the arrays it
shows, and the sentences that depend on the results. Sentences state what was set or measured; what needs a
person's judgement is a marked place with the numbers for it. Contrasts, headline and verdict are those of the
2x2; tables hold every arm. """
import itertools
import re

import numpy as np

from configurator import ROOT
from post import stats
from post.stats import ALPHA, CONTRASTS, PR_NAMES, decision
from study import FACTORIAL, LABELS, LOGIT_FLAG, MAX_EXTENSIONS, head_dim, layer_values

FIGURES = ["1_val_loss", "2_mean_pr", "3_loss_vs_pr", "4_pr_heatmap", "5_spectra", "6_lr_sweep", "7_rates"]
TODO = "> **To be written by a person:**"
PR_DEFINITIONS = {
    "pr": "keys that attention sees, after QK-Norm and RoPE, uncentred, PR1 (the plan's RankProbe)",
    "pr_centered": "the same keys minus their mean, PR2 (a vector added to all keys cancels in the softmax)",
    "pr_pre_rope": "the keys before RoPE, uncentred, PR1",
    "pr_weight": "W_K with the QK gain folded in, PR2 (needs no batch)"}
WHY = {"adamw": "the baseline", "adamw_qk": "what QK-Norm changes under AdamW",
       "muon": "what Muon changes without QK-Norm", "muon_qk": "whether QK-Norm still matters under Muon"}
OPTIMIZERS = {"adamw": "AdamW", "muon": "Muon"}
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
    line = lambda cells: "| " + join((str(c).replace("|", "\\|") for c in cells), " | ") + " |"
    return join([line(head), line(sides), *map(line, rows), "", f"*Source: {source}.*"], "\n")


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


def last(run, name):
    """Final value of a run: 'loss' (inf where diverged), 'logit' (the largest over layers and all rows) or
    the mean over layers of what layer_values() takes; nan where the run has none."""
    rows = run["rows"]
    if name == "loss":
        return np.nan if run["val_loss"] is None else run["val_loss"]
    if name == "logit":
        logits = [v for row in rows for v in layer_values(row, "max_logit") if v is not None]
        return max(logits, default=np.nan)
    values = layer_values(rows[-1], name) if rows and run["status"] == "finished" else []
    return float(np.mean(values)) if values and None not in values else np.nan


def figure(folder, number, caption):
    name = FIGURES[number - 1]
    if (folder / f"figures/{name}.png").exists():
        return f"![Figure {number}: {caption}](figures/{name}.png)\n\n*Figure {number}. {caption}.*"
    needed = number < 7  # not every study has what the seventh shows
    return f"*Figure {number} is missing: run `python plot.py {folder}`.*" * needed


def effect(e, m, sign="+"):
    digits = MEASURES[m][2]
    return f"{e['effect']:{sign}.{digits}f} ± {e['half']:.{digits}f}"


def difference(y, name, a, b):
    """Arm b minus arm a with its 95 % interval; 'missing' where there is none."""
    if len(y[name][a]) < 2 or not np.isfinite([y[name][a], y[name][b]]).all():
        return "missing"
    return effect(stats.pair(y[name], a, b), "loss" if name == "loss" else "pr")


# ---- what may be claimed
def rate_states(near, e):
    """{(measure, name): (state, lowest, highest)} of the contrasts and the 'best' of analysis e: state is
    HOLDS, DEPENDS or NOT_RUN, the numbers the range of a contrast when each arm is given any of its three
    rates, None where that was not run or not finite. near: {arm: {measure: values at half, once and twice the
    chosen rate}}."""
    out = {}
    for (m, name), entry in e.items():
        if name != "tie" and not set(FACTORIAL) <= near.keys():
            out[m, name] = NOT_RUN, None, None
        elif name != "tie":
            values, arm = {a: near[a][m] for a in FACTORIAL}, entry.get("arm")
            sign = np.sign(entry["effect"]) if name in CONTRASTS else -1 if m == "loss" else 1
            others = [b for b in FACTORIAL if b != arm]
            each = [CONTRASTS[name]] if name in CONTRASTS else [{arm: 1, b: -1} for b in others]
            ranges = [stats.rate_range(values, w) for w in each]
            holds = all(min(sign * low, sign * high) > 0 for low, high in ranges)
            shown = len(each) == 1 and np.isfinite(ranges).all()
            out[m, name] = (HOLDS if holds else DEPENDS, *(ranges[0] if shown else (None, None)))
    return out


def stands(S, m, name):
    """Whether a headline may be made of a contrast: resolved, under every definition, at neighbouring rates
    where run."""
    return S["verdict"][2][m, name]["holds"] and S["rates"][m, name][0] != DEPENDS


def claim(name, m, analysis, top, numbers=True):
    """A resolved contrast as a clause. A main effect beside a resolved interaction is an average, and is
    called one."""
    e, (what, unit, _) = analysis[m, name], MEASURES[m]
    by = f" by {effect({**e, 'effect': abs(e['effect'])}, m, '')} {unit.format(top)}" if numbers else ""
    if name == "interaction":
        more = "higher" if e["effect"] > 0 else "lower"
        return f"QK-Norm's effect on {what} is {more} under Muon than under AdamW{by}"
    average = " on average" * analysis[m, "interaction"]["claimed"]
    subject, verb = "Muon" if name == "optimizer" else "QK-Norm", "raises" if e["effect"] > 0 else "lowers"
    return f"{subject} {verb} {what}{average}{by}"


def crossed(analysis, m, name):
    """Whether a resolved interaction is so large that the main effect has one sign in one half of the design
    and the other in the other: then the main effect describes neither, and no headline may be made of it."""
    inter = analysis[m, "interaction"]
    return inter["claimed"] and abs(inter["effect"]) / 2 > abs(analysis[m, name]["effect"])


def rate_bound(S):
    """Whether something that the scenario rests on depends on the learning rate."""
    outcome, _, e = S["verdict"]
    first = {"A": ["loss", "pr"], "B": ["pr"], "C": ["loss"]}.get(outcome, [])
    against = [c for c, sign in (("optimizer", 1), ("qk_norm", -1)) if e and e["pr", c]["effect"] * sign > 0]
    return (any(not stands(S, m, "best") for m in first)
            or outcome == "C" and not any(stands(S, "pr", c) for c in against))


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
    size += " (neighbouring learning rates were not run)" * (S["rates"]["loss", "optimizer"][0] == NOT_RUN)
    if rate_bound(S):
        return f"Scenario {outcome} at the chosen learning rates, but not at half and twice these, {size}"
    if outcome == "A":  # the plan's wording speaks of logits, so they have to bear it out
        words = ("Muon provides implicit attention logit control, making QK-Norm unnecessary and harmful"
                 if stats.logit_control(S["y"]["logit"]) else
                 "Muon without QK-Norm has the lowest loss and the highest participation ratio of keys")
    elif outcome == "B":
        collapse = (stands(S, "pr", "qk_norm") and e["pr", "qk_norm"]["effect"] < 0 and
                    S["y"]["pr"]["muon_qk"].mean() <= stats.COLLAPSE * S["y"]["pr"]["muon"].mean())
        words = ("QK-Norm causes measurable dimensional collapse, but the impact on performance is limited"
                 if collapse and abs(e["loss", "qk_norm"]["effect"]) < stats.LOSS_MARGIN else
                 "Muon without QK-Norm has the highest participation ratio of keys, without a lead on loss,")
    elif outcome == "C":
        words = ("High-dimensional keys may be unnecessary: AdamW + QK-Norm has the lowest loss despite "
                 "collapsed PR")
    else:
        main = [(m, c) for m in MEASURES for c in ("optimizer", "qk_norm")]
        told = dict.fromkeys((m, "interaction" if crossed(e, m, c) else c) for m, c in main)
        none = "holds at neighbouring learning rates" if any(e[h]["holds"] for h in told) else "is resolved"
        claims = [claim(c, m, e, None, False) for m, c in told if stands(S, m, c)]
        words = (join(claims, "; ") or f"No main effect of Muon or QK-Norm {none}") + ","
    return f"{words} {size}"


def tldr(S):
    outcome, conditions, e = S["verdict"]
    loss, pr = ({a: S["y"][m][a].mean() for a in FACTORIAL} for m in MEASURES)
    low, high, top, said = min(loss, key=loss.get), max(pr, key=pr.get), head_dim(S["config"]), []
    if np.isfinite([*loss.values(), *pr.values()]).all():
        said.append(f"After {count(S['config']['max_tokens'])} training tokens {LABELS[low]} has the lowest "
                    f"mean final val loss, {loss[low]:.4f} nats a token, and " +
                    f"{LABELS[high]} " * (low != high) + f"the highest mean participation ratio of keys, "
                    f"{pr[high]:.2f} of {top}" +
                    ", of the four arms of the 2x2" * (len(S["arms"]) > len(FACTORIAL)) + ".")
    if e:
        six = [(m, c) for m in MEASURES for c in CONTRASTS]
        short = lambda c: c.replace("qk_norm", "QK-Norm")
        named = lambda chosen: join(f"{short(c)} on {MEASURES[m][0]}" for m, c in chosen)
        parts = {"resolved": join(claim(c, m, e, top) for m, c in six if stands(S, m, c)),
                 "dependent on the learning rate":
                     named(h for h in six if e[h]["holds"] and not stands(S, *h)),
                 "dependent on the definition":
                     named(h for h in six if e[h]["claimed"] and not e[h]["holds"]),
                 "undecided": named(h for h in six if not e[h]["claimed"])}
        not_run = S["rates"]["loss", "optimizer"][0] == NOT_RUN
        said.append("Of the six contrasts" + ", at the chosen learning rates alone" * not_run + ", " +
                    join((f"{word}: {what}" for word, what in parts.items() if what), "; ") + ".")
    words = {"none": "None of the four scenarios of the plan holds",
             "no verdict": f"No verdict: {conditions[0][3]}"}
    plan = f"This is scenario {outcome} of the plan"
    plan += ", at the chosen learning rates but not beside them" * rate_bound(S)
    return join([*said, words.get(outcome, plan) + "."], " ")


# ---- the top, and section 2
def scale_note(c):
    """What a scale other than the plan's can show."""
    size = f"{count(c['num_params'])} parameters, {count(c['max_tokens'])} training tokens a run"
    plan = f"{count(PLAN['num_params'])} parameters and {count(PLAN['max_tokens'])} tokens"
    if small := [k for k in PLAN if c[k] < 0.99 * PLAN[k]]:
        tasks = ", nor anything about tasks such as HellaSwag, which such a model cannot do"
        return (f"> **Scale {c['scale']}**: {size}. It can show that the whole procedure works, and how "
                f"large an effect is in a model of this size on this text. It cannot show what happens at "
                f"the plan's {plan}{tasks * ('num_params' in small)}.")
    larger = any(c[k] > 1.01 * PLAN[k] for k in PLAN)
    return f"> **Scale {c['scale']}**: {size}, where the plan has {plan}." * larger


def notices(S):
    """What is missing and what was left out."""
    lacks = S["missing"] + S["absent"]
    no = " No verdict is given." * bool(S["missing"])
    return paragraphs(
        lacks and f"> **Incomplete: {plural(len(lacks), 'part')} missing.**{no}\n>\n{bullets(lacks, '> - ')}",
        S["left_out"] and f"> **Left out:**\n>\n{bullets(S['left_out'], '> - ')}")


def why(arm):
    """Why an arm is there: WHY, else the first comment of its config file."""
    path = ROOT / f"config/{arm}.py"
    first = path.read_text(encoding="utf-8").split("\n")[0] if path.exists() else ""
    return WHY.get(arm) or first.lstrip("# ").rstrip(".") or "not said"


def configs_table(configs):
    """configs: {arm: the config of its runs}."""
    norm = lambda c: "no" if not c["qk_norm"] else "yes" if c["qk_gain"] else "yes, gains frozen at one"
    hidden = lambda c: OPTIMIZERS.get(c["optimizer"], c["optimizer"])
    return table(["Config", "Hidden matrices", "QK-Norm", "Why"],
                 [[LABELS[a], hidden(c), norm(c), why(a)] for a, c in configs.items()],
                 "`config.json` of the runs, `config/`")


def differences(runs, config):
    varied = {"arm", "seed", "optimizer", "qk_norm", "qk_gain", "learning_rate", "num_params"}
    harmless = {"out_dir", "data_dir", "device", "compile", "micro_batch", "ckpt_interval_s"}
    differ = sorted({k for r in runs for k in {*r["config"], *config} - varied - harmless
                     if r["config"].get(k) != config.get(k)})
    return (f"The main runs also differ in: {join(differ)}." if differ else
            "The main runs differ in optimizer, QK-Norm, learning rate and seed, and in nothing else.")


def sweep_table(picks, arms):
    rows = []
    for a in arms:
        if a not in picks:
            rows.append([LABELS[a], *["missing"] * 7])
            continue
        p, tried = picks[a], picks[a]["tried"]
        lrs, losses = zip(*((t["lr"], t["val_loss"]) for t in tried))
        at, fit = lrs.index(p["lr"]), stats.quadratic_fit(lrs, losses)
        cell = lambda t: spread([np.inf if v is None else v for v in t.get("val_losses", [t["val_loss"]])], 4)
        beside = [cell(tried[i]) if 0 <= i < len(tried) else "none" for i in (at - 1, at + 1)]
        tie = f"with {join((f'{lr:g}' for lr in p['tie']), ' and ')}" if p["tie"] else \
            "no" if len(p["seeds"]) > 1 else "not known from one seed"
        rows.append([LABELS[a], f"{p['lr']:g}", "yes" if p["bracketed"] else "**not bracketed**",
                     cell(tried[at]), *beside, tie, f"{fit[1]:.4f} at {fit[0]:.3g}" if fit else "no minimum"])
    n = max((len(p["seeds"]) for p in picks.values()), default=1)
    return table(["Config", "Chosen LR", "Bracketed", "Val loss", "next LR below", "next LR above", "Tie",
                  "Parabola's minimum"], rows,
                 f"`chosen_lr.json`, {spread_words(n)}; the parabola goes through the best three points in "
                 "log LR")


def sweep_rule(S):
    seeds = sorted({s for p in S["picks"].values() for s in p["seeds"]})
    tokens = sorted({r["config"]["max_tokens"] for r in S["sweep"]})
    wins = ("The lowest final val loss wins" if len(seeds) < 2 else
            "The lowest mean over these seeds of the final val loss wins; a neighbour whose mean is less "
            "than two standard errors of the difference higher is a tie")
    return (f"Each arm has its own grid of learning rates, run for {join(map(count, tokens)) or 'no'} tokens "
            f"with seed{'s' * (len(seeds) > 1)} {join(seeds) or 'not known'}. {wins}. A winner at an "
            f"edge gets points a factor of two further out, up to {MAX_EXTENSIONS} a side.")


def rates_table(near, m, arms):
    """Each arm at half, once and twice its rate; near as rate_states() takes it, with the rates as 'lr'."""
    what, _, digits = MEASURES[m]
    words, rows = ["**no**, half is better", "yes", "**no**, twice is better"], []
    for a in arms:
        rows.append([LABELS[a], *["missing"] * 5])
        if a in near:
            loss = near[a]["loss"]
            cells = ["diverged" if np.isinf(x) else f"{v:.{digits}f}" for v, x in zip(near[a][m], loss)]
            rows[-1][1:] = [f"{near[a]['lr'][1]:g}", *cells, words[int(np.argmin(loss))]]
    return table(["Config", "Chosen LR", f"{what[0].upper()}{what[1:]} at half", "at the chosen LR",
                  "at twice", "Choice holds"], rows,
                 "`neighbours/*/log.jsonl` and the main runs of the same seed")


# ---- sections 3 and 4
def contrast_table(S, m):
    e, (_, unit, digits) = S["verdict"][2], MEASURES[m]
    if not e:
        return f"*No contrasts: {S['verdict'][1][0][3]}.*"

    def line(name, h):
        state, low, high = S["rates"][m, h]
        by = f", {low:+.{digits}f} to {high:+.{digits}f}" if low is not None else ""
        near = f"{state}{by}" if e[m, h]["claimed"] else "no claim"
        p = [f"{e[m, h][key]:.2g}" for key in ("p", "p_adjusted")]
        return [name, effect(e[m, h], m), *p, decision(e[m, h]), near]

    best = e[m, "best"]
    lead = f"Lead of the first arm, {LABELS[best['arm']]}, over {LABELS[best['second']]}"
    lead += f" (p: against {LABELS[best['against']]})" * (best["against"] != best["second"])
    unit = unit.format(head_dim(S["config"]))
    return table([f"Contrast, {unit}", "Effect ± 95 %", "p", "p adjusted", "Decision",
                  "When each arm has any of its three rates"],
                 [*(line(NAMES[c], c) for c in CONTRASTS), line(lead, "best")],
                 f"{MAIN_LOGS}, by `post/stats.py`; the last column by `neighbours/*/log.jsonl`, one seed")


def resolution(S):
    """Each arm's own spread, and what the seeds of this study can resolve."""
    y, n, e = S["y"], len(S["seeds"]), S["verdict"][2]
    if n < 2:
        return "One seed has no spread over seeds."
    digits = {m: MEASURES[m][2] for m in MEASURES}
    sd = lambda v, k: f"{v.std(ddof=1):.{k}f}" if np.isfinite(v).all() else "missing"
    spreads = table(["Config", "Val loss, nats a token", "Mean PR"],
                    [[LABELS[a], *(sd(y[m][a], digits[m]) for m in MEASURES)] for a in S["arms"]],
                    f"{MAIN_LOGS}; standard deviation over {n} seeds, each with {plural(n - 1, 'degree')} of "
                    "freedom")
    if not e:
        return spreads
    over = {m: stats.seed_correlation({a: y[m][a] for a in FACTORIAL}) for m in MEASURES}
    worth = (f"; differences within a seed spread less than unpaired ones would in {over['loss']['helped']} "
             f"and {over['pr']['helped']} of the {len(over['loss']['pairs'])} pairs. No interval makes use "
             "of it." if n > 2 else ", but from two seeds each is one or minus one, which says nothing.")
    cells = lambda m, c: [f"± {e[m, c]['half']:.{digits[m]}f}",
                          f"{stats.detectable(e[m, c], n):.{digits[m]}f}"]
    found = "found with 80 % power"
    power = table(["Contrast", "Val loss, 95 %", found, "seeds for 0.01 nats", "Mean PR, 95 %", found],
                  [[NAMES[c], *cells("loss", c), stats.seeds_needed(y["loss"], CONTRASTS[c]), *cells("pr", c)]
                   for c in CONTRASTS],
                  "`post/stats.py`, from the spreads above; found: the true effect that such a study would "
                  "claim 8 times in 10, at the strictest of Holm's steps; seeds: for a 95 % interval of "
                  "± 0.01 nats")
    return paragraphs(spreads, "Seeds are the same in every arm. The mean correlation of two arms over seeds "
                      f"is {over['loss']['mean']:+.2f} on loss and {over['pr']['mean']:+.2f} on mean PR"
                      f"{worth}", power)


def definitions(y, arms, n):
    """PR under all four definitions, and the order of the arms under each."""
    whole = all(np.isfinite(y[name][a]).all() for name in PR_DEFINITIONS for a in arms)
    orders = {name: join((LABELS[a] for a in sorted(arms, key=lambda a: -y[name][a].mean())), " > ")
              for name in PR_DEFINITIONS if whole}
    same = "the same" if len(set(orders.values())) == 1 else "not the same"
    return paragraphs(
        table(["Config", *PR_DEFINITIONS],
              [[LABELS[a], *(over_seeds(y, name, a) for name in PR_DEFINITIONS)] for a in arms],
              f"{MAIN_LOGS}; {spread_words(n)}"),
        bullets(f"`{name}`: {text}." + (f" Order: {orders[name]}." if whole else "")
                for name, text in PR_DEFINITIONS.items()),
        whole and f"The order of the arms is {same} under all four. A PR claim has to hold in sign under "
                  f"{join(f'`{name}`' for name in PR_NAMES)}, or it 'depends on the definition'.")


def frozen_gains(y, configs):
    """Frozen against learned gains of QK-Norm under each optimizer; '' where a study has not both."""
    normed = {a: c for a, c in configs.items() if c["qk_norm"]}
    pairs = [(a, b) for a in FACTORIAL for b in normed if a in normed and normed[a]["qk_gain"]
             and not normed[b]["qk_gain"] and normed[a]["optimizer"] == normed[b]["optimizer"]]
    names = ["loss", *PR_DEFINITIONS]
    return paragraphs(
        "### Frozen against learned gains",
        "Is what QK-Norm does to the keys done by its gains? Here they stay at one, against gains that "
        "learn, under the same optimizer, each arm at its own learning rate.",
        table(["Difference", "Val loss", *PR_DEFINITIONS],
              [[f"{LABELS[b]} minus {LABELS[a]}", *(difference(y, name, a, b) for name in names)]
               for a, b in pairs],
              f"{MAIN_LOGS}; 95 % intervals, each alone and not corrected: no verdict hangs on them")
    ) if pairs else ""


def pr_by_lr(sweep):
    """PR at the end of every sweep run, by arm and learning rate."""
    ended, rows = {}, []
    for r in (r for r in sweep if r["status"] != "unfinished"):
        ended.setdefault((r["config"]["arm"], r["config"]["learning_rate"]), []).append(r)
    for (arm, lr), runs in ended.items():
        lost = "diverged" if all(r["status"] == "diverged" for r in runs) else None
        rows.append([LABELS[arm], f"{lr:g}", spread([last(r, "loss") for r in runs], 4),
                     *(lost or spread([last(r, name) for r in runs], 2) for name in PR_DEFINITIONS)])
    n = max(map(len, ended.values()), default=1)
    return table(["Config", "LR", "Val loss", *PR_DEFINITIONS], rows,
                 f"last rows of `sweep/*/log.jsonl`; {spread_words(n)}")


# ---- sections 5 and 6
def checkpoints(runs):
    """{tokens: [(run, row)]} at the token checkpoints of the main runs."""
    found = {}
    for r in runs:
        steps = {e["step"] for e in r["events"] if e["event"] == "spot_check"}
        for row in r["rows"]:
            if row["step"] in steps:
                found.setdefault(row["tokens"], []).append((r, row))
    return dict(sorted(found.items()))


def correlation_table(runs, arms):
    rows = []
    for tokens, pairs in checkpoints(runs).items():
        pairs = [(r["config"]["arm"], row["mean_pr"], row["val_loss"]) for r, row in pairs
                 if np.isfinite(np.array([row["mean_pr"], row["val_loss"]], float)).all()]  # None: not finite
        pr, loss = (np.array([p[i] for p in pairs]) for i in (1, 2))
        if len(pairs) < 3 or not np.ptp(pr) or not np.ptp(loss):
            continue
        of = {a: [b == a for b, *_ in pairs] for a in arms}
        means = np.array([(pr[k].mean(), loss[k].mean()) for k in of.values() if any(k)])
        rows.append([count(tokens), len(pairs), f"{np.corrcoef(pr, loss)[0, 1]:+.2f}",
                     f"{np.corrcoef(means.T)[0, 1]:+.2f}" if len(means) == len(arms) > 2 else "missing",
                     f"{pr.min():.2f} to {pr.max():.2f}", f"{loss.min():.4f} to {loss.max():.4f}"])
    return table(["Tokens", "Runs", "Correlation over runs", "over the arm means", "Mean PR", "Val loss"],
                 rows, "`*-seed*/log.jsonl` at the token checkpoints")


TASKS = {"val": "val_ppl", "hellaswag": "acc_norm", "lambada": "acc"}


def cell_of(result, task, status):
    """One task of one run in percent with its standard error, val perplexity where task is 'val', or why
    there is none."""
    r = result if task == "val" and "val_ppl" in result else result.get(task) or {}
    if status == "diverged" or TASKS[task] not in r:
        return "diverged" if status == "diverged" else "not available" if "not_available" in r else "missing"
    if task == "val":
        return f"{r['val_ppl']:.2f}"
    error = r.get(f"{TASKS[task]}_stderr")
    return f"{100 * r[TASKS[task]]:.1f}" + (f" ± {100 * error:.1f} %" if error is not None else " %")


def downstream(S):
    """Every evaluation, the results table of step 9, and what to hold them against."""
    runs, cells, gaps = S["results"], {}, []
    for a, s in itertools.product(S["arms"], S["seeds"]):
        run, result = S["cell"].get((a, s), {}), runs.get(f"{a}-seed{s}", {})
        cells[a, s] = [cell_of(result, task, run.get("status")) for task in TASKS]
        if "val_loss" in result and run.get("status") == "finished":
            gaps.append(abs(result["val_loss"] - run["val_loss"]))

    def mean(arm, i, task):
        if words := [cells[arm, s][i] for s in S["seeds"] if not cells[arm, s][i][0].isdigit()]:
            return words[0]
        return spread([100 * runs[f"{arm}-seed{s}"][task][TASKS[task]] for s in S["seeds"]], 1) + " %"

    parts = [(part, r) for result in runs.values() for part, r in result.items() if isinstance(r, dict)]
    why_not = {f"Not available: {part}: {r['not_available']}" for part, r in parts if "not_available" in r}
    return paragraphs(
        table(["Config", "Seed", "Val PPL", "HellaSwag", "LAMBADA"],
              [[LABELS[a], s, *found] for (a, s), found in cells.items()],
              "`results.json`; HellaSwag 10-shot acc_norm, LAMBADA 0-shot last-word accuracy, ± standard "
              "error over examples"),
        table(["Config", "Best LR", "Val Loss", "Mean PR", "HellaSwag", "LAMBADA"],
              [[*row, mean(a, 1, "hellaswag"), mean(a, 2, "lambada")]
               for a, row in zip(S["arms"], summary(S))],
              f"`chosen_lr.json`, {MAIN_LOGS}, `results.json`; {spread_words(len(S['seeds']))}"),
        bullets(filter(None, [
            *sorted(why_not),
            "Chance on HellaSwag is 25 %.",
            "GPT-2 124M in the same harness: HellaSwag acc 28.9 %, acc_norm 31.1 %; LAMBADA acc 32.56 %, "
            "ppl 40.06.",
            gaps and f"Evaluated again, final checkpoints differ from the logs' val loss by at most "
                     f"{max(gaps):.4f} nats."])),
        S["scale"] == "80m" and sanity(S["y"], S["configs"], runs))


def summary(S):
    """[[config, best learning rate, val loss, mean PR]], as strings, of every arm."""
    lr = lambda a: f"{S['picks'][a]['lr']:g}" if a in S["picks"] else "missing"
    return [[LABELS[a], lr(a), *(over_seeds(S["y"], m, a) for m in MEASURES)] for a in S["arms"]]


def sanity(y, configs, results):
    """The ranges that were expected at 80m before any run."""
    of = lambda name: np.mean([y["loss"][a].mean() for a in FACTORIAL if configs[a]["optimizer"] == name])
    found = lambda name: [(r.get(name) or {}).get(TASKS[name], np.nan) for r in results.values()]
    task = lambda name: 100 * np.mean([x for x in found(name) if x == x] or [np.nan])
    rows = [("Val loss, mean of the Muon arms", of("muon"), 3.4, 3.6),
            ("AdamW above Muon", of("adamw") - of("muon"), 0.03, 0.1),
            ("HellaSwag, %", task("hellaswag"), 25, 27.5), ("LAMBADA, %", task("lambada"), 3, 15)]
    inside = lambda v, low, high: "missing" if not np.isfinite(v) else "yes" if low <= v <= high else "**no**"
    return table(["Sanity check", "Measured", "Expected", "Inside"],
                 [[name, spread([v], 3), f"{low} to {high}", inside(v, low, high)]
                  for name, v, low, high in rows],
                 f"{MAIN_LOGS}, `results.json`; ranges expected before any run, of 80M parameters and 300M "
                 f"tokens of FineWeb-Edu")


# ---- sections 7 to 9, and the appendix
def reasons(conditions):
    """What each scenario needs and whether it is so, as nested list items."""
    out = []
    for s in dict.fromkeys(s for s, *_ in conditions):
        mine = [c for c in conditions if c[0] == s]
        out += [f"- **{s}: {'holds' if all(ok for _, _, ok, _ in mine) else 'does not hold'}**"]
        out += [f"    - {'met' if ok else 'not met'}: {text} ({fact})" for _, text, ok, fact in mine]
    return join(out, "\n")


def logits(y, e):
    if not e or not all(np.isfinite(y["logit"][a]).all() for a in FACTORIAL):
        return ""
    control = stats.logit_control(y["logit"])
    return (f"The largest logit of Muon without QK-Norm is "
            f"{'in every seed' if control else 'not in every seed'} below that of AdamW without QK-Norm and "
            f"below {LOGIT_FLAG}: the logits {'bear out' if control else 'do not bear out'} the wording "
            "'implicit attention logit control'.")


def limitations(S):
    c, y, n = S["config"], S["y"], len(S["seeds"])
    picks = {a: p for a, p in S["picks"].items() if a in S["arms"]}
    each = lambda items: join(items, "; ")  # a label may hold a comma
    wide = each(LABELS[a] for a, p in picks.items() if not p["bracketed"])
    ties = each(LABELS[a] for a, p in picks.items() if p["tie"])
    lost = each(f"{LABELS[a]} {k} of {n}" for a in S["arms"] if (k := np.isinf(y["loss"][a]).sum()))
    off = each(LABELS[a] for a, at in S["near"].items() if min(at["loss"]) < at["loss"][1])
    restarts = sum(e["event"] == "restart" for r in S["runs"] for e in r["events"])
    half = {m: [stats.pair(y[m], a, b)["half"] for a, b in itertools.combinations(FACTORIAL, 2)]
            for m in MEASURES if S["verdict"][2]}
    sweep_seeds = max((len(p["seeds"]) for p in picks.values()), default=1)
    return bullets(filter(None, [
        f"{count(c['num_params'])} params, a single architecture (LLaMA-style, {c['n_layer']} layers of "
        f"width {c['n_embd']}), one data set, one tokenizer.",
        f"{count(c['max_tokens'])} tokens a run, {c['max_tokens'] / c['num_params']:.2g} a parameter.",
        f"{plural(n, 'seed')}: " + (f"the spread of an arm has {plural(n - 1, 'degree')} of freedom." if n > 1
                                    else "no spread is known."),
        half and f"A difference of two arms is known to ± {min(half['loss']):.4f} nats at best and ± "
                 f"{max(half['loss']):.4f} at worst, and to between ± {min(half['pr']):.2f} and ± "
                 f"{max(half['pr']):.2f} of mean PR: smaller effects stay unseen.",
        "Unknown whether this holds at a larger scale, on other data, or for longer training.",
        "QK-Norm works in production models (Gemma 3, Qwen3); nothing here tests the scale and stability "
        "they need it for.",
        f"Learning rates were tuned on short runs with {plural(sweep_seeds, 'seed')}. Weight decay "
        f"({c['weight_decay']:g}), batch size, betas and warmup are the same in all arms and were not tuned.",
        f"PR is measured on {c['probe_tokens']:,} val tokens, and depends on its definition and on the "
        f"learning rate (section 4).",
        wide and f"Not bracketed, so perhaps not at its best learning rate: {wide}.",
        ties and f"A tie between neighbouring learning rates, so that chance had a part in the choice: "
                 f"{ties}.",
        off and f"At the main budget half or twice the chosen learning rate ended lower, in one seed: {off}.",
        not S["near"] and "No arm was trained at the rates beside its own for the main budget: how far an "
                          "effect is one of the learning rate is not known.",
        lost and f"Diverged main runs: {lost}. An infinite loss is a result, and is in no mean.",
        restarts and f"{plural(restarts, 'restart')} after a loss that was not finite. The batch at fault "
                     f"was left out, so these runs saw other data than the other arms of their seed."]))


def speed(runs, arm):
    rows = [row for r in runs if r["config"]["arm"] == arm for row in r["rows"]]
    seen = [x for row in rows if (x := row.get("tokens_per_s"))]
    return f"{np.median(seen):,.0f}" if seen else "missing"


def spot_checks(runs):
    """Step 6: the spot checks that found something, and what else happened to a run."""
    rows, notes, n = [], [], 0
    show = lambda x, digits: "not finite" if x is None else f"{x:.{digits}f}"
    for r in runs:
        name = f"{LABELS[r['config']['arm']]}, seed {r['config']['seed']}"
        for x in r["events"]:
            if x["event"] in ("restart", "diverged"):
                reason = f", {x['reason']}" if x.get("reason") else ""
                notes.append(f"{name}: {x['event']} at step {x['step']}{reason}")
            elif x["event"] == "spot_check":
                n += 1
                if x["flags"] or x["nan"]:
                    rows.append([name, count(x["tokens"]), show(x["val_loss"], 4),
                                 f"{show(x['mean_pr_before'], 2)} → {show(x['mean_pr'], 2)}",
                                 f"{show(x['max_logit_before'], 1)} → {show(x['max_logit'], 1)}",
                                 join(x["flags"]) or "NaN"])
    return paragraphs(
        f"{plural(n, 'spot check')}, {len(rows)} with flags. All are in `*-seed*/log.jsonl`.",
        rows and table(["Run", "Tokens", "Val loss", "Mean PR", "Largest logit", "Flags"], rows,
                       "`spot_check` events of `*-seed*/log.jsonl`; arrows: since the checkpoint before"),
        bullets(notes))


# ---- the post
def build(S):
    """The whole post as Markdown, block by block, from report.load()'s dict."""
    c, arms, seeds, y, folder = S["config"], S["arms"], S["seeds"], S["y"], S["dir"]
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
        f"### The {len(arms)} configs and why", configs_table(S["configs"]),
        f"{plural(n, 'seed')} per config, {tokens} tokens, {params} param model. Seeds {join(seeds)}; a seed "
        f"fixes the initial weights and the order of the data, the same in every arm. "
        f"{differences(S['runs'], c)}",
        "### Registration and statistics", S["registration"],
        f"The unit is the run. Intervals are 95 %, and each arm has its own variance over seeds (Welch's, "
        f"with Satterthwaite's degrees of freedom), as arms are not equally noisy. The chance of any false "
        f"claim is kept at {ALPHA:g} over the six contrasts and what the scenarios need beyond them, by "
        f"Holm's steps and with p-values raised for few seeds; `post/stats.py` says how." +
        f" Contrasts, headline and verdict are about the 2x2; tables hold {others} too." * bool(others),
        "### LR tuning methodology", sweep_rule(S),
        figure(folder, 6, "Final val loss by learning rate; the star is the chosen one"),
        sweep_table(S["picks"], arms),
        "### Does the choice hold at the main budget?",
        f"Every arm was trained for the whole main budget at half and at twice its rate too, with seed "
        f"{S['neighbours'][0]['config']['seed']}.\n\n{rates_table(S['near'], 'loss', arms)}" if S["near"] else
        f"Not known: `bash sweep.sh {S['scale']} neighbours` was not run.",

        "## 3. Results: Loss",
        figure(folder, 1, "Val loss over training"),
        table(["Config", *(f"Seed {s}" for s in seeds), "Mean"],
              [[LABELS[a], *(spread([x], 4) for x in y["loss"][a]), over_seeds(y, "loss", a)] for a in arms],
              f"final val loss in nats a token, {MAIN_LOGS}; mean {spread_words(n)}"),
        contrast_table(S, "loss"),
        "An interval may exclude zero and the decision still be 'undecided': an interval is for one "
        "contrast, a decision for the whole family." if e else "",
        f"### What {plural(n, 'seed')} can resolve", resolution(S),
        noise and "Evaluation noise is apart from this: the bootstrap over val sequences gives a standard "
                  f"error of at most {max(noise):.4f} nats for one run (`results.json`). It enters no "
                  "interval.",

        "## 4. Results: Representation Quality",
        f"PR1 is (sum s)^2 / sum s^2 and PR2 is (sum s^2)^2 / sum s^4, of the singular values s of one "
        f"head's keys, out of {top}. 'Mean PR' is `pr` below, over heads and layers.",
        "### PR trajectories", figure(folder, 2, "Mean PR over training"), contrast_table(S, "pr"),
        "### Definitions side by side", definitions(y, arms, n), frozen_gains(y, S["configs"]),
        "### Per-layer breakdown", figure(folder, 4, "PR of each layer at the end of training"),
        "### Singular value spectra",
        figure(folder, 5, "Singular values of the keys, sorted, in an early, a middle and a late layer"),
        "### PR against learning rate",
        "A PR effect may be a learning-rate effect, so here is PR at other rates: at the main budget where "
        "the stage `neighbours` was run, and at the end of every sweep run.",
        figure(folder, 7, "Val loss and mean PR against learning rate, of the sweep and at the main budget"),
        rates_table(S["near"], "pr", arms) if S["near"] else "", pr_by_lr(S["sweep"]),

        "## 5. The Relationship Between Loss and PR",
        figure(folder, 3, "Val loss against mean PR at each token checkpoint"),
        f"Both change over training, so runs are compared within one token count and never pooled over time. "
        f"Runs of one arm lie together, so these are about {len(arms)} points, and no test is made of them.",
        correlation_table(S["runs"], arms),

        "## 6. Downstream Evaluation", downstream(S),

        "## 7. Discussion",
        f"### What the contrasts decide: {scenario}", reasons(conditions),
        "*Source: the tables of contrasts in sections 3 and 4, by `post/stats.py`.*",
        "### Mechanism",
        f"{TODO} the mechanistic explanation, why you think this happens, and what these numbers leave open.",
        table(["Config", "Mean PR", "centred", "of the weights", "Largest scaled logit", "Attention entropy"],
              [[LABELS[a], *(over_seeds(y, name, a) for name in PR_NAMES), spread(y["logit"][a], 1),
                spread(y["attn_entropy"][a], 3)] for a in arms],
              "`*-seed*/log.jsonl`: PR and entropy (nats) at the end, the logit over all layers and rows"),
        logits(y, e),

        "## 8. Limitations", limitations(S),

        "## 9. Recommendations",
        f"{TODO} practical advice, no wider than section 8 allows and resting on resolved contrasts alone.",
        table(["Config", "Best LR", "Val loss", "Mean PR", "Tokens/s"],
              [[*row, speed(S["runs"], a)] for a, row in zip(arms, summary(S))],
              "`chosen_lr.json`, `*-seed*/log.jsonl`; tokens/s: median over rows, on the runs' machine"),

        "## Appendix",
        "### A. Every pair of arms",
        table(["Difference", "Val loss, nats", f"Mean PR, of {top}"],
              [[f"{LABELS[b]} minus {LABELS[a]}", *(difference(y, m, a, b) for m in MEASURES)]
               for a, b in itertools.combinations(arms, 2)],
              f"{MAIN_LOGS}; 95 % intervals, each alone and not corrected: no claim rests on them"),
        "### B. Spot checks (step 6)", spot_checks(S["runs"])]
    return paragraphs(*blocks) + "\n"
