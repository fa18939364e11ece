"""The text of the post: the nine sections of the plan's step 11, filled from a study that report.load() read.

Sentences state what was set or measured. What needs a person's judgement is a marked place with the numbers for it.
"""
import re

import numpy as np

from post from post import stats
from post.stats import ALPHA, CONTRASTS, PAIRS, PR_NAMES, decision, pair, pooled
from study import ARMS, LABELS, LOGIT_FLAG, MAX_EXTENSIONS, SWEEP_SEED, layer_values

FIGURES = ["1_val_loss", "2_mean_pr", "3_loss_vs_pr", "4_pr_heatmap", "5_spectra", "6_lr_sweep"]
TODO = "> **To be written by a person:**"
PR_DEFINITIONS = {
    "pr": "keys that attention sees, after QK-Norm and RoPE, uncentred, PR1 (the plan's RankProbe)",
    "pr_centered": "the same keys minus their mean, PR2 (a vector added to all keys cancels in the softmax)",
    "pr_pre_rope": "the keys before RoPE, uncentred, PR1",
    "pr_weight": "W_K with the QK gain folded in, PR2 (needs no batch)"}
WHY = {"adamw": "the baseline", "adamw_qk": "what QK-Norm changes under AdamW",
       "muon": "what Muon changes without QK-Norm",
       "muon_qk": "whether QK-Norm still matters under Muon"}
NAMES = {"optimizer": "Muon minus AdamW", "qk_norm": "QK-Norm: with minus without",
         "interaction": "Interaction: QK-Norm's effect under Muon minus under AdamW"}
MEASURES = {"loss": ("val loss", "nats a token", 4), "pr": ("mean PR", "of 64", 2)}  # name, unit, digits
ONE_FACTOR = [("adamw", "adamw_qk"), ("muon", "muon_qk"), ("adamw", "muon"), ("adamw_qk", "muon_qk")]
MAIN_LOGS = "last rows of `*-seed*/log.jsonl`"


# ---- pieces ----

def join(items, by=", "):
    return by.join(map(str, items))


def count(n):
    """1228800 -> '1.23M'; below a million with thousands separators."""
    return f"{n / 1e6:.3g}M" if n >= 1e6 else f"{n:,}"


def plural(n, word):
    return f"{n} {word}" + "s" * (n != 1)


def table(head, rows, source):
    """A Markdown table; columns of numbers are right-aligned."""
    number = re.compile(r"[+\-±]? ?\d|missing|not available|diverged|$")
    sides = ["---:" if rows and all(number.match(str(r[i])) for r in rows) else "---" for i in range(len(head))]
    line = lambda cells: "| " + join((str(c).replace("|", "\\|") for c in cells), " | ") + " |"
    return join([line(head), line(sides), *map(line, rows), "", f"*Source: {source}.*", ""], "\n")


def spread(values, digits):
    """Mean and spread over seeds of the values that are there: half the difference of two, the standard deviation of
    more."""
    v = np.array([x for x in values if not np.isnan(x)])
    if not len(v):
        return "missing"
    if np.isinf(v).any():
        return "diverged" if len(v) == 1 else f"diverged in {np.isinf(v).sum()} of {len(v)}"
    by = np.ptp(v) / 2 if len(v) == 2 else v.std(ddof=1) if len(v) > 2 else None
    return f"{v.mean():.{digits}f}" + (f" ± {by:.{digits}f}" if by is not None else "")


def spread_words(n):
    return {1: "one seed", 2: "± half the difference of the two seeds"}.get(n, f"± standard deviation over {n} seeds")


def over_seeds(S, name, arm):
    return spread(S["y"][name][ARMS.index(arm)], 4 if name == "loss" else 2)


def figure(S, number, caption):
    name = FIGURES[number - 1]
    if not (S["dir"] / f"figures/{name}.png").exists():
        return f"*Figure {number} is missing: run `python plot.py {S['dir']}`.*\n"
    return f"![Figure {number}: {caption}](figures/{name}.png)\n\n*Figure {number}. {caption}.*\n"


def effect(e, m, sign="+"):
    digits = MEASURES[m][2]
    return f"{e['effect']:{sign}.{digits}f} ± {e['half']:.{digits}f}"


def claim(name, m, analysis, numbers=True):
    """A resolved contrast as a clause. A main effect beside a resolved interaction is an average, and is called one."""
    e, (what, unit, _) = analysis[m, name], MEASURES[m]
    by = f" by {effect({**e, 'effect': abs(e['effect'])}, m, '')} {unit}" if numbers else ""
    if name == "interaction":
        more = "higher" if e["effect"] > 0 else "lower"
        return f"QK-Norm's effect on {what} is {more} under Muon than under AdamW{by}"
    average = " on average" * analysis[m, "interaction"]["claimed"]
    subject, verb = "Muon" if name == "optimizer" else "QK-Norm", "raises" if e["effect"] > 0 else "lowers"
    return f"{subject} {verb} {what}{average}{by}"


def crossed(analysis, m, name):
    """Whether a resolved interaction is so large that the main effect has one sign in one half of the design and the
    other in the other: then the main effect describes neither, and no headline may be made of it."""
    inter = analysis[m, "interaction"]
    return inter["claimed"] and abs(inter["effect"]) / 2 > abs(analysis[m, name]["effect"])


def title(S):
    """The headline, from the verdict and nothing else."""
    outcome, _, e = S["verdict"]
    size = f"at {count(S['config']['num_params'])} parameters"
    if outcome == "no verdict":
        return f"AdamW, Muon and QK-Norm {size}: no verdict"
    if outcome == "D":
        return f"Not to be posted: AdamW, Muon and QK-Norm {size} are too noisy or inconsistent across seeds"
    if S["diverged"]:
        return f"{join(LABELS[a] for a, k in S['diverged'].items() if k)} diverged at the chosen learning rate, {size}"
    means, qk = dict(zip(ARMS, S["y"]["pr"].mean(axis=1))), e["pr", "qk_norm"]
    if outcome == "A":  # the plan's wording speaks of logits, so they have to bear it out
        return (f"Muon provides implicit attention logit control, making QK-Norm unnecessary and harmful {size}"
                if stats.logit_control(S["y"]["logit"]) else
                f"Muon without QK-Norm has the lowest loss and the highest participation ratio of keys {size}")
    if outcome == "B":
        collapse = qk["holds"] and qk["effect"] < 0 and means["muon_qk"] <= stats.COLLAPSE * means["muon"]
        return (f"QK-Norm causes measurable dimensional collapse, but the impact on performance is limited {size}"
                if collapse and abs(e["loss", "qk_norm"]["effect"]) < stats.LOSS_MARGIN else
                f"Muon without QK-Norm has the highest participation ratio of keys, without a lead on loss, {size}")
    if outcome == "C":
        return ("High-dimensional keys may be unnecessary: AdamW + QK-Norm has the lowest loss despite collapsed PR "
                f"{size}")
    claims = [claim("interaction" if crossed(e, m, c) else c, m, e, False) for m in MEASURES
              for c in ("optimizer", "qk_norm")
              if e[m, c]["holds"] or crossed(e, m, c) and e[m, "interaction"]["holds"]]
    return f"{join(dict.fromkeys(claims), '; ') or 'No main effect of Muon or QK-Norm is resolved'}, {size}"


# ---- the sections ----

def top(S):
    """Title, what the scale can show, what is missing."""
    c, out = S["config"], [f"# {S['title']}", ""]
    if S["scale"] != "80m":
        out += [f"> **Scale {S['scale']}**: {count(c['num_params'])} parameters, {count(c['max_tokens'])} training "
                f"tokens a "
                "run. It can show that the whole procedure works, and how large an effect is in a model of this size "
                "on this "
                "text. It cannot show what happens at 80M parameters and 300M tokens, nor anything about tasks such as "
                "HellaSwag, which such a model cannot do.", ""]
    lines = S["missing"] + S["absent"]
    if lines:
        out += [f"> **Incomplete: {plural(len(lines), 'part')} missing.**" +
                " No verdict is given." * bool(S["missing"]), ">",
                *(f"> - {line}" for line in lines), ""]
    return out


def tldr(S):
    outcome, conditions, e = S["verdict"]
    loss, pr = (S["y"][m].mean(axis=1) for m in MEASURES)
    said = []
    if np.isfinite(loss).all() and np.isfinite(pr).all():
        said.append(f"After {count(S['config']['max_tokens'])} training tokens {LABELS[ARMS[loss.argmin()]]} has the "
                    f"lowest mean "
                    f"final val loss, {loss.min():.4f} nats a token, and {LABELS[ARMS[pr.argmax()]]} the highest mean "
                    f"participation ratio of keys, {pr.max():.2f} of 64.")
    if e:
        six = [(m, c) for m in MEASURES for c in CONTRASTS]
        named = lambda pairs: join(f"{c.replace('qk_norm', 'QK-Norm')} on {MEASURES[m][0]}" for m, c in pairs)
        yes = join(claim(c, m, e) for m, c in six if e[m, c]["holds"])
        depends = named(h for h in six if e[h]["claimed"] and not e[h]["holds"])
        no = named(h for h in six if not e[h]["claimed"])
        parts = [f"{word}: {what}" for word, what in (("resolved", yes), ("dependent on the definition", depends),
                                                      ("undecided", no)) if what]
        said.append("Of the six contrasts, " + join(parts, "; ") + ".")
    words = {"none": "None of the four scenarios of the plan holds", "no verdict": f"No verdict: {conditions[0][3]}"}
    said.append(words.get(outcome, f"This is scenario {outcome} of the plan") + ".")
    return ["## 1. TLDR", "", join(said, " "), "", f"**Verdict: {outcome}**", ""]


def setup(S):
    c, n = S["config"], len(S["seeds"])
    varied = {"arm", "seed", "optimizer", "qk_norm", "learning_rate", "num_params"}
    harmless = {"out_dir", "data_dir", "device", "compile", "micro_batch", "ckpt_interval_s"}
    differ = sorted({k for r in S["runs"] for k in {*r["config"], *c} - varied - harmless
                     if r["config"].get(k) != c.get(k)})
    return [
        "## 2. Experimental Setup", "", "### Architecture", "", S["experiment_config"].split("\n", 2)[2],
        "*Source: `config.json` of the runs.*", "", "### The 4 configs and why", "",
        table(["Config", "Hidden matrices", "QK-Norm", "Why"], [[LABELS[a], "Muon" if a.startswith("muon") else "AdamW",
              "yes" if a.endswith("_qk") else "no", WHY[a]] for a in ARMS], "`config/`"),
        f"{plural(n, 'seed')} per config, {count(c['max_tokens'])} tokens, {count(c['num_params'])} param model. Seeds "
        f"{join(S['seeds'])}; a seed fixes the initial weights and the order of the data, the same in all four arms. " +
        (f"The main runs also differ in: {join(differ)}." if differ else
         "The main runs differ in optimizer, QK-Norm, learning rate and seed, and in nothing else."), "",
        "### Registration and statistics", "", S["registration"], "",
        "The unit is the run." +
        f" Intervals are 95 %, from the standard deviation over seeds pooled over the four arms, with "
        f"{4 * (n - 1)} degrees of freedom. The chance of any false claim is kept at {ALPHA:g} over the six contrasts "
        f"and what "
        "the scenarios need beyond them (Holm's procedure; `stats.py` says how)." * (n > 1), "",
        "### LR tuning methodology", "", *learning_rates(S)]


def learning_rates(S):
    tokens = S["sweep"][0]["config"]["max_tokens"] if S["sweep"] else 0
    out = [f"Each arm has its own grid of learning rates, run for {count(tokens)} tokens with seed {SWEEP_SEED}. The "
           f"lowest "
           f"final val loss wins; a winner at an edge gets points a factor of two further out, up to {MAX_EXTENSIONS} "
           f"a side.",
           "", figure(S, 6, "Final val loss by learning rate; the star is the chosen one")]
    rows = []
    for a, p in ((a, S["picks"].get(a)) for a in ARMS):
        if not p:
            rows.append([LABELS[a], "missing"] + [""] * 5)
            continue
        lrs, losses = zip(*((t["lr"], t["val_loss"]) for t in p["tried"]))
        at, fit = lrs.index(p["lr"]), stats.quadratic_fit(lrs, losses)
        near = ["none" if not 0 <= i < len(lrs) else "diverged" if losses[i] is None else f"{losses[i]:.4f}"
                for i in (at - 1, at + 1)]
        rows.append([LABELS[a], f"{p['lr']:g}", "yes" if p["bracketed"] else "**not bracketed**",
                     f"{p['val_loss']:.4f}", *near,
                     f"{fit[1]:.4f} at {fit[0]:.3g}" if fit else "no minimum"])
    out += [table(["Config", "Chosen LR", "Bracketed", "Val loss", "next LR below", "next LR above",
                   "Parabola's minimum"], rows,
                  "`chosen_lr.json`; the parabola goes through the best three points in log LR")]
    return out + (transfer(S) if S["transfer"] else [])


def transfer(S):
    rows = []
    for a in ARMS:
        mine = {r["config"]["learning_rate"]: r for r in S["transfer"] if r["config"]["arm"] == a}
        lr = S["picks"].get(a, {}).get("lr", np.nan)
        run = [next((r for x, r in mine.items() if np.isclose(x, want)), None) for want in (lr, lr / 2)]
        ended = [r["val_loss"] if r else None for r in run]
        cells = ["missing" if v is None else spread([v], 4) for v in ended]
        holds = "incomplete" if None in ended else "yes" if ended[0] <= ended[1] else "**no**, half is better"
        rows.append([LABELS[a], f"{lr:g}", *cells, holds])
    tokens = join(sorted({count(r["config"]["max_tokens"]) for r in S["transfer"]}))
    return ["### Does the choice hold at a longer budget?", "",
            table(["Config", "Chosen LR", "Val loss", "at half the LR", "Choice holds"], rows,
                  f"`transfer/*/log.jsonl`, {tokens} tokens a run")]


def contrast_table(S, m):
    e, (_, unit, digits) = S["verdict"][2], MEASURES[m]
    if not e:
        return f"*No contrasts: {S['verdict'][1][0][3]}.*\n"
    line = lambda name, h: [name, effect(h, m), f"{h['p']:.2g}", f"{h['p_adjusted']:.2g}", decision(h)]
    best, (s, dof) = e[m, "best"], pooled(S["y"][m])
    return table([f"Contrast, {unit}", "Effect ± 95 %", "p", "p adjusted", "Decision"],
                 [*(line(NAMES[c], e[m, c]) for c in CONTRASTS),
                  line(f"Lead of the first arm, {LABELS[ARMS[best['arm']]]}, over {LABELS[ARMS[best['second']]]}",
                       best)],
                 f"{MAIN_LOGS}, by `stats.py`; standard deviation over seeds {s:.{digits}f}, {dof} degrees of freedom")


def results_loss(S):
    n = len(S["seeds"])
    out = ["## 3. Results: Loss", "", figure(S, 1, "Val loss over training"),
           table(["Config", *(f"Seed {s}" for s in S["seeds"]), "Mean"],
                 [[LABELS[a], *(spread([x], 4) for x in S["y"]["loss"][i]), over_seeds(S, "loss", a)]
                  for i, a in enumerate(ARMS)],
                 f"final val loss in nats a token, {MAIN_LOGS}; mean {spread_words(n)}"),
           contrast_table(S, "loss")]
    if S["verdict"][2]:
        out += ["An interval may exclude zero and the decision still be 'undecided': an interval is for one contrast, "
                "a decision "
                "for the whole family.", ""]
    noise = [r.get("val_loss_stderr_bootstrap") for r in results(S).values()
             if r.get("val_loss_stderr_bootstrap") is not None]
    if noise:
        out += [f"Evaluation noise is apart from this: the bootstrap over val sequences gives a standard error of at "
                f"most "
                f"{max(noise):.4f} nats for one run (`results.json`). It enters no interval.", ""]
    return out


def results_pr(S):
    y, whole = S["y"], all(np.isfinite(S["y"][name]).all() for name in PR_DEFINITIONS)
    orders = {name: join((LABELS[ARMS[i]] for i in np.argsort(-y[name].mean(axis=1), kind="stable")), " > ")
              for name in PR_DEFINITIONS}
    out = ["## 4. Results: Representation Quality", "",
           "PR1 is (sum s)^2 / sum s^2 and PR2 is (sum s^2)^2 / sum s^4, of the singular values s of one head's keys, "
           "out of 64. "
           "'Mean PR' is `pr` below, over heads and layers.", "",
           "### PR trajectories", "", figure(S, 2, "Mean PR over training"), contrast_table(S, "pr"),
           "### Definitions side by side", "",
           table(["Config", *PR_DEFINITIONS], [[LABELS[a], *(over_seeds(S, name, a) for name in PR_DEFINITIONS)]
                                               for a in ARMS],
                 f"{MAIN_LOGS}; {spread_words(len(S['seeds']))}"),
           *(f"- `{name}`: {text}." + f" Order: {orders[name]}." * whole for name, text in PR_DEFINITIONS.items()), ""]
    if whole:
        out += [f"The order of the arms is {'the same' if len(set(orders.values())) == 1 else 'not the same'} under "
                f"all four. A PR "
                f"claim has to hold in sign under {join(f'`{name}`' for name in PR_NAMES)}, or it 'depends on the "
                f"definition'.", ""]
    return out + ["### Per-layer breakdown", "", figure(S, 4, "PR of each layer at the end of training"),
                  "### Singular value spectra", "",
                  figure(S, 5, "Singular values of the keys, sorted, in an early, a middle and a late layer"),
                  "### PR against learning rate", "", *pr_by_lr(S)]


def pr_by_lr(S):
    ended = {(r["config"]["arm"], r["config"]["learning_rate"]): r for r in S["sweep"] if r["status"] != "unfinished"
             and r["rows"]}
    if not ended:
        return ["*No sweep run has ended.*", ""]
    end = lambda r, name: float(np.mean(layer_values(r["rows"][-1], name)))
    cells = lambda r: [f"{r['val_loss']:.4f}", *(f"{end(r, name):.2f}" for name in PR_DEFINITIONS)] \
        if r["status"] == "finished" else ["diverged"] + [""] * len(PR_DEFINITIONS)
    out = ["A PR effect may be a learning-rate effect, so here is PR at the end of every sweep run.", "",
           table(["Config", "LR", "Val loss", *PR_DEFINITIONS],
                 [[LABELS[a], f"{lr:g}", *cells(r)] for (a, lr), r in ended.items()],
                 "last rows of `sweep/*/log.jsonl`")]
    pr = {k: end(r, "pr") for k, r in ended.items() if r["status"] == "finished"}
    by_arm = {a: [v for (b, _), v in pr.items() if a == b] for a in ARMS}
    at = [pr[a, p["lr"]] for a, p in S["picks"].items() if (a, p["lr"]) in pr]
    ranges = join((f"{LABELS[a]} {min(v):.2f} to {max(v):.2f}" for a, v in by_arm.items() if v), "; ")
    chosen = f" At the chosen learning rates the arms lie between {min(at):.2f} and {max(at):.2f}." if at else ""
    out += [f"Mean PR over an arm's own grid: {ranges}.{chosen}", ""]
    shared = [[f"{LABELS[b]} minus {LABELS[a]}", f"{lr:g}", f"{pr[b, lr] - pr[a, lr]:+.2f}"] for a, b in ONE_FACTOR
              for c, lr in sorted(pr) if c == a and (b, lr) in pr]
    if shared:
        out += ["At learning rates that two arms share:", "", table(["Difference", "LR", "Mean PR"], shared,
                                                                    "the table above")]
    return out


def checkpoints(S):
    """{tokens: [(run, row)]} at the token checkpoints of the main runs."""
    found = {}
    for r in S["runs"]:
        steps = {e["step"] for e in r["events"] if e["event"] == "spot_check"}
        for row in r["rows"]:
            if row["step"] in steps:
                found.setdefault(row["tokens"], []).append((r, row))
    return dict(sorted(found.items()))


def relationship(S):
    rows = []
    for tokens, pairs in checkpoints(S).items():
        pairs = [(r["config"]["arm"], row["mean_pr"], row["val_loss"]) for r, row in pairs
                 if np.isfinite([row["mean_pr"], row["val_loss"]]).all()]
        pr, loss = (np.array([p[i] for p in pairs]) for i in (1, 2))
        if len(pairs) < 3 or not np.ptp(pr) or not np.ptp(loss):
            continue
        arm = np.array([p[0] for p in pairs])
        means = np.array([(pr[arm == a].mean(), loss[arm == a].mean()) for a in ARMS if a in arm])
        rows.append([count(tokens), len(pairs), f"{np.corrcoef(pr, loss)[0, 1]:+.2f}",
                     f"{np.corrcoef(means.T)[0, 1]:+.2f}" if len(means) == len(ARMS) else "missing",
                     f"{pr.min():.2f} to {pr.max():.2f}", f"{loss.min():.4f} to {loss.max():.4f}"])
    return ["## 5. The Relationship Between Loss and PR", "", figure(S, 3,
                                                                     "Val loss against mean PR at each token "
                                                                     "checkpoint"),
            "Both change over training, so runs are compared within one token count and never pooled over time. Runs "
            "of one arm lie "
            "together, so these are about four points, and no test is made of them.", "",
            table(["Tokens", "Runs", "Correlation over runs", "over the arm means", "Mean PR", "Val loss"], rows,
                  "`*-seed*/log.jsonl` at the token checkpoints")]


def results(S):
    return (S["results"] or {}).get("runs", {})


def task_cell(S, name, task, key):
    """One task of one run in percent with its standard error, or why there is none."""
    arm, seed = name.split("-seed")
    if S["cell"].get((arm, int(seed)), {}).get("status") == "diverged":
        return "diverged"
    r = results(S).get(name, {}).get(task) or {}
    if key not in r:
        return "not available" if "not_available" in r else "missing"
    error = r.get(f"{key}_stderr")
    return f"{100 * r[key]:.1f}" + (f" ± {100 * error:.1f} %" if error is not None else " %")


def task_mean(S, arm, task, key):
    cells = [task_cell(S, f"{arm}-seed{s}", task, key) for s in S["seeds"]]
    words = [c for c in cells if not c[0].isdigit()]
    return words[0] if words else spread([100 * results(S)[f"{arm}-seed{s}"][task][key] for s in S["seeds"]], 1) + " %"


def downstream(S):
    runs, tasks = results(S), (("hellaswag", "acc_norm"), ("lambada", "acc"))
    names = [(a, s, f"{a}-seed{s}") for a in ARMS for s in S["seeds"]]
    ppl = lambda name: f"{runs[name]['val_ppl']:.2f}" if name in runs else task_cell(S, name, "", "")
    out = ["## 6. Downstream Evaluation", "",
           table(["Config", "Seed", "Val PPL", "HellaSwag", "LAMBADA"],
                 [[LABELS[a], s, ppl(name), *(task_cell(S, name, *t) for t in tasks)] for a, s, name in names],
                 "`results.json`; HellaSwag 10-shot acc_norm, LAMBADA 0-shot last-word accuracy, ± standard error over "
                 "examples"),
           table(["Config", "Best LR", "Val Loss", "Mean PR", "HellaSwag", "LAMBADA"],
                 [[LABELS[a], f"{S['picks'][a]['lr']:g}" if a in S["picks"] else "missing", over_seeds(S, "loss", a),
                   over_seeds(S, "pr", a), *(task_mean(S, a, *t) for t in tasks)] for a in ARMS],
                 f"`chosen_lr.json`, {MAIN_LOGS}, `results.json`; {spread_words(len(S['seeds']))}")]
    reasons = {f"{t}: {r[t]['not_available']}" for r in runs.values() for t in ("hellaswag", "lambada", "wikitext")
               if "not_available" in (r.get(t) or {})}
    errors = [e for r in runs.values() if (e := (r.get("hellaswag") or {}).get("acc_norm_stderr")) is not None]
    gaps = [abs(runs[name]["val_loss"] - S["cell"][a, s]["val_loss"]) for a, s, name in names
            if name in runs and S["cell"].get((a, s), {}).get("status") == "finished"]
    out += [f"- Not available: {reason}" for reason in sorted(reasons)]
    out += ["- Chance on HellaSwag is 25 %" + (f"; the standard error of one run is {100 * max(errors):.1f} points."
                                               if errors else "."),
            "- GPT-2 124M in the same harness: HellaSwag acc 28.9 %, acc_norm 31.1 %; LAMBADA acc 32.56 %, ppl 40.06."]
    if gaps:
        out += [f"- Evaluated again, final checkpoints differ from the logs' val loss by at most {max(gaps):.4f} nats."]
    return out + [""] + (sanity(S) if S["scale"] == "80m" else [])


def sanity(S):
    """The ranges that were expected at 80m before any run."""
    loss = S["y"]["loss"].mean(axis=1)
    task = lambda name, key: np.mean([100 * r[name][key] for r in results(S).values() if key in (r.get(name) or {})]
                                     or [np.nan])
    rows = [("Val loss, mean of the Muon arms", loss[2:].mean(), 3.4, 3.6),
            ("AdamW above Muon", loss[:2].mean() - loss[2:].mean(), 0.05, 0.1),
            ("HellaSwag, %", task("hellaswag", "acc_norm"), 25, 27.5), ("LAMBADA, %", task("lambada", "acc"), 3, 15)]
    return [table(["Sanity check", "Measured", "Expected", "Inside"],
                  [[name, f"{v:.3f}" if np.isfinite(v) else "missing", f"{low} to {high}", "missing"
                    if not np.isfinite(v) else
                    "yes" if low <= v <= high else "**no**"] for name, v, low, high in rows],
                  f"{MAIN_LOGS}, `results.json`; ranges expected before any run, of 80M parameters and 300M tokens of "
                  f"FineWeb-Edu")]


def reasons(conditions):
    """What each scenario needs and whether it is so, as nested list items."""
    for s in dict.fromkeys(s for s, *_ in conditions):
        mine = [c for c in conditions if c[0] == s]
        yield f"- **{s}: {'holds' if all(ok for _, _, ok, _ in mine) else 'does not hold'}**"
        yield from (f"    - {'met' if ok else 'not met'}: {text} ({fact})" for _, text, ok, fact in mine)


def discussion(S):
    outcome, conditions, e = S["verdict"]
    name = {"none": "none of the four", "no verdict": "no verdict"}.get(outcome, f"scenario {outcome}")
    logit = S["y"]["logit"]
    entropy = {a: spread([np.mean(layer_values(r["rows"][-1], "attn_entropy")) for r in S["runs"]
                          if r["config"]["arm"] == a and r["status"] == "finished"], 3) for a in ARMS}
    out = ["## 7. Discussion", "", f"### What the contrasts decide: {name}", "",
           *reasons(conditions), "", "*Source: the tables of contrasts in sections 3 and 4, by `stats.py`.*", "",
           "### Mechanism", "",
           f"{TODO} the mechanistic explanation, why you think this happens, and what these numbers leave open. "
           f"Numbers to use:", ">",
           *(f"> - {LABELS[a]}: mean PR {over_seeds(S, 'pr', a)}, centred {over_seeds(S, 'pr_centered', a)}, of the "
             f"weights "
             f"{over_seeds(S, 'pr_weight', a)}, largest scaled logit {spread(logit[i], 1)}, attention entropy "
             f"{entropy[a]} nats"
             for i, a in enumerate(ARMS)), "",
           "*Source: `*-seed*/log.jsonl`: `pr_*` and `attn_entropy_*` at the end, `max_logit_*` the largest over "
           "layers and rows.*", ""]
    if e and np.isfinite(logit).all():
        control = stats.logit_control(logit)
        out += [f"The largest logit of Muon without QK-Norm is {'in every seed' if control else 'not in every seed'} "
                f"below that of "
                f"AdamW without QK-Norm and below {LOGIT_FLAG}: the logits "
                f"{'bear out' if control else 'do not bear out'} the "
                "wording 'implicit attention logit control'.", ""]
    return out


def limitations(S):
    c, n, y = S["config"], len(S["seeds"]), S["y"]
    wide = join(LABELS[a] for a, p in S["picks"].items() if not p["bracketed"])
    lost = join(f"{LABELS[a]} {k} of {n}" for a, k in S["diverged"].items() if k)
    restarts = sum(e["event"] == "restart" for r in S["runs"] for e in r["events"])
    out = [f"{count(c['num_params'])} params, a single architecture (LLaMA-style, {c['n_layer']} layers of width "
           f"{c['n_embd']}), one "
           "data set, one tokenizer.",
           f"{count(c['max_tokens'])} tokens a run, {c['max_tokens'] / c['num_params']:.2g} a parameter.",
           f"{plural(n, 'seed')}: " + (f"{4 * (n - 1)} degrees of freedom for the spread over seeds." if n > 1
                                       else "no spread is known.")]
    if S["verdict"][2]:
        out += [f"A difference of two arms is known to ± {pair(y['loss'], 0, 1)['half']:.4f} nats and ± "
                f"{pair(y['pr'], 0, 1)['half']:.2f} of "
                "mean PR: smaller effects stay unseen."]
    out += ["Unknown whether this holds at a larger scale, on other data, or for longer training.",
            "QK-Norm works in production models (Gemma 3, Qwen3); nothing here tests the scale and stability they need "
            "it for.",
            f"Learning rates were tuned on short runs with one seed. Weight decay ({c['weight_decay']:g}), batch size, "
            f"betas and "
            "warmup are the same in all arms and were not tuned.",
            f"PR is measured on {c['probe_tokens']:,} val tokens, and depends on its definition and on the learning "
            f"rate (section 4)."]
    out += [f"Not bracketed, so perhaps not at its best learning rate: {wide}."] * bool(wide)
    out += [f"Diverged main runs: {lost}. An infinite loss is a result, and is in no mean."] * bool(lost)
    out += [f"{plural(restarts, 'restart')} after a loss that was not finite. The batch at fault was left out, so "
            f"these runs saw other "
            "data than the other arms of their seed."] * bool(restarts)
    return ["## 8. Limitations", "", *(f"- {line}" for line in out), ""]


def recommendations(S):
    speed = {a: [x for r in S["runs"] if r["config"]["arm"] == a for row in r["rows"]
                 if (x := row.get("tokens_per_s"))] for a in ARMS}
    return ["## 9. Recommendations", "",
            f"{TODO} practical advice, no wider than section 8 allows and resting on resolved contrasts alone. Numbers "
            f"to use:", ">",
            *(f"> - {LABELS[a]}: learning rate {S['picks'][a]['lr']:g}, val loss {over_seeds(S, 'loss', a)}, "
              f"{np.median(v):,.0f} tokens/s"
              for a, v in speed.items() if v and a in S["picks"]), "",
            "*Source: `chosen_lr.json`, `*-seed*/log.jsonl` (tokens/s: median over rows, on the machine of the "
            "runs).*", ""]


def appendix(S):
    out, e, y = ["## Appendix", "", "### A. Every pair of arms", ""], S["verdict"][2], S["y"]
    cell = lambda m, a, b: effect(pair(y[m], ARMS.index(a), ARMS.index(b)), m)
    out += [table(["Difference", "Val loss, nats", "Mean PR, of 64"],
                  [[f"{LABELS[b]} minus {LABELS[a]}", cell("loss", a, b), cell("pr", a, b)] for a, b in PAIRS],
                  f"{MAIN_LOGS}; 95 % intervals, each alone and not corrected: no claim rests on them")] if e else \
           [f"*None: {S['verdict'][1][0][3]}.*", ""]
    rows, notes = [], []
    for r in S["runs"]:
        name = f"{LABELS[r['config']['arm']]}, seed {r['config']['seed']}"
        for x in r["events"]:
            if x["event"] == "spot_check":
                rows.append([name, count(x["tokens"]), f"{x['val_loss']:.4f}" + " (not falling)" * (not x["falling"]),
                             "**yes**" if x["nan"] else "no", f"{x['mean_pr_before']:.2f} → {x['mean_pr']:.2f}",
                             f"{x['max_logit_before']:.1f} → {x['max_logit']:.1f}", join(x["flags"]) or "none"])
            elif x["event"] in ("restart", "diverged"):
                notes.append(f"- {name}: {x['event']} at step {x['step']}" +
                             (f", {x['reason']}" if x.get("reason") else ""))
    return out + ["### B. Spot checks (step 6)", "",
                  table(["Run", "Tokens", "Val loss", "NaNs", "Mean PR", "Largest logit", "Flags"], rows,
                        "`spot_check` events of `*-seed*/log.jsonl`; arrows: since the checkpoint before"), *notes, ""]


def build(S):
    """The whole post as Markdown, from report.load()'s dict."""
    parts = [top, tldr, setup, results_loss, results_pr, relationship, downstream, discussion, limitations,
             recommendations, appendix]
    return join((join(part(S), "\n") for part in parts), "\n").rstrip() + "\n"
