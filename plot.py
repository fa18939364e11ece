"""The six figures of a study, from its logs alone: python plot.py out/SCALE

Writes out/SCALE/figures/1_val_loss ... 6_lr_sweep as .png and .svg. A half-done study gives the figures that it can
give; what is missing is printed, one line each.
"""
import io
import json
import math
import os
import sys
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from configurator import fail
from study import ARMS, LABELS, SCALES, SEEDS, chosen, layer_values, load_runs

# Okabe-Ito: one hue an optimizer, its lighter one and dashes for QK-Norm; markers, so that it reads in grey too
LOOKS = [("#D55E00", "-", "o"), ("#E69F00", "--", "s"), ("#0072B2", "-", "^"), ("#56B4E9", "--", "D"),
         ("#009E73", "-.", "v"), ("#CC79A7", ":", "P"), ("#000000", "-", "X")]
STYLE = {arm: dict(color=c, linestyle=l, marker=m) for arm, (c, l, m) in zip(ARMS, LOOKS)}
GREY = "#666666"
WIDTH = 7  # inches: a blog shows it at about 700 pixels, where 10 points are 14 pixels
LOSS = "validation loss (nats a token)"
PR = "mean PR1 of keys after RoPE, of {}"
matplotlib.rcParams.update({
    "font.size": 10, "axes.titlesize": 10, "axes.labelsize": 10, "xtick.labelsize": 9, "ytick.labelsize": 9,
    "legend.fontsize": 9, "legend.title_fontsize": 9, "legend.frameon": False, "legend.handlelength": 3.2,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6, "axes.axisbelow": True, "lines.markersize": 5, "figure.titlesize": 12,
    "figure.titleweight": "bold", "figure.constrained_layout.use": True, "svg.fonttype": "none",
    "svg.hashsalt": "plot"})


def millions(tokens):
    """1966080 -> '1.97M'."""
    return f"{tokens / 1e6:.3g}M"


def short(lr):
    """0.0012 -> '1.2e-3'."""
    mantissa, exponent = f"{lr:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


# ---- what the logs hold
def by_arm(runs):
    """{arm: its runs} in the order of ARMS, without arms that have none."""
    groups = {arm: [r for r in runs if r["config"]["arm"] == arm] for arm in ARMS}
    return {arm: group for arm, group in groups.items() if group}


def alive(runs):
    return [r for r in runs if r["status"] != "diverged"]


def series(run, key):
    """Tokens and values, each (n,), of the rows of a run that have a finite value under key."""
    pairs = [(r["tokens"], r[key]) for r in run["rows"] if r.get(key) is not None and math.isfinite(r[key])]
    return np.array(pairs, dtype=float).reshape(-1, 2).T


def over_seeds(runs, key):
    """Tokens (n,) that all runs share, and the values of key there, (n_runs, n)."""
    curves = [dict(zip(*series(r, key))) for r in runs]
    tokens = sorted(set.intersection(*map(set, curves))) if curves else []
    return np.array(tokens), np.array([[c[t] for t in tokens] for c in curves]).reshape(len(curves), len(tokens))


def checkpoints(run):
    """{tokens: row} at the token checkpoints of a run and at its end."""
    steps = {e["step"] for e in run["events"] if e["event"] in ("spot_check", "finished")}
    return {r["tokens"]: r for r in run["rows"] if r["step"] in steps and "mean_pr" in r}


def latest_common(main):
    """The largest token count at which every arm that has a checkpoint has one, or None: arms compare only there."""
    sets = [s for group in by_arm(alive(main)).values() if (s := set().union(*map(checkpoints, group)))]
    return max(set.intersection(*sets) or set.union(*sets)) if sets else None


def rows_at(runs, tokens):
    """[(run, row)] of the runs that have not diverged and have a checkpoint at so many tokens."""
    return [(r, checkpoints(r)[tokens]) for r in alive(runs) if tokens in checkpoints(r)]


def spectrum(run, layer, step):
    """Singular values (head_dim,) of a run's keys, each head divided by its largest, mean over heads; None, and a line
    that says so, where the file is missing or broken."""
    try:
        s = np.load(run["dir"] / f"sv_layer_{layer}_step_{step}.npy").astype(float)
        return (s / s[:, :1]).mean(0)
    except (OSError, ValueError, EOFError):
        print(f"missing: {run['dir'].name}: sv_layer_{layer}_step_{step}.npy is absent or broken")


# ---- what the figures share
SEEDS_NOTE = "thick: mean over seeds; thin: each seed; shading: min to max; numbers: at the end of the budget"


def legend(fig, runs, title, final=lambda ends: "", extra=[]):
    """One legend under the whole figure. final(last rows of an arm's finished runs): the text after its name."""
    handles = []
    for arm, group in by_arm(runs).items():
        lost, ends = len(group) - len(alive(group)), [r["rows"][-1] for r in group if r["status"] == "finished"]
        seeds = f" ({len(group)} seed{'s' * (len(group) > 1)}{f', {lost} diverged' * bool(lost)})"
        label = LABELS[arm] + (final(ends) if ends else "") + seeds
        handles.append(Line2D([], [], **STYLE[arm], linewidth=2, label=label))
    fig.legend(handles=handles + extra, loc="outside lower center", ncols=3 if extra else 2, title=title)


def curves(ax, main, key, start, informative):
    """Thin line of each seed, mean line and shading of each arm against millions of tokens from `start` on; values from
    `informative` tokens on rule the axis, those of diverged runs only where there is no other."""
    shown = [series(r, key) for r in alive(main) or main]
    values = np.concatenate([y[x >= informative] for x, y in shown])
    values = values if len(values) else np.concatenate([y for _, y in shown])
    pad, end = 0.04 * np.ptp(values) or 0.1, max(series(r, key)[0][-1] for r in main)
    low, high = values.min() - pad, values.max() + pad
    for arm, group in by_arm(main).items():
        color = STYLE[arm]["color"]
        for run in group:
            x, y = series(run, key)
            ax.plot(x / 1e6, y, color=color, linewidth=0.7, alpha=0.8)
            if run["status"] == "diverged" and x[-1] >= start:
                at, text = (x[-1] / 1e6, np.clip(y[-1], low, high)), f"seed {run['config']['seed']} diverged"
                left = x[-1] > start + 0.75 * (end - start)
                ax.plot(*at, "X", color=color, markersize=11, markeredgecolor="white", clip_on=False, zorder=5)
                ax.annotate(text, at, (0, 9), textcoords="offset points", ha="right" if left else "left", fontsize=8,
                            bbox=dict(facecolor="white", edgecolor="none", alpha=0.8, pad=1), zorder=4)
        x, y = over_seeds(alive(group), key)
        if len(x):
            marks = {t for run in group for t in checkpoints(run)}
            ax.plot(x / 1e6, y.mean(0), **STYLE[arm], linewidth=2, markevery=[i for i, t in enumerate(x) if t in marks])
            ax.fill_between(x / 1e6, y.min(0), y.max(0), color=color, alpha=0.18, linewidth=0)
    ax.set(xlabel="training tokens (millions)", ylim=(low, high), xlim=(start / 1e6, (1.02 * end - 0.02 * start) / 1e6))


# ---- the figures
def val_loss(main):
    fig = Figure((WIDTH, 4.4))
    whole, tail = fig.subplots(1, 2, width_ratios=[3, 2])
    end = max(series(r, "val_loss")[0][-1] for r in main)
    # step 0 and the first fall would leave a hair's breadth to the differences of the arms
    curves(whole, main, "val_loss", 0, 0.1 * end)
    curves(tail, main, "val_loss", 2 / 3 * end, 2 / 3 * end)
    whole.set_ylabel(LOSS)
    first = np.mean([series(r, "val_loss")[1][0] for r in main])
    whole.set_title(f"whole run; it begins above the axis, at {first:.2f}", color=GREY, fontsize=9)
    tail.set_title("last third, enlarged", color=GREY, fontsize=9)
    fig.suptitle("Validation loss")
    legend(fig, main, SEEDS_NOTE, lambda ends: f": {np.mean([row['val_loss'] for row in ends]):.3f}")
    return fig


def mean_pr(main, top):
    fig = Figure((WIDTH, 4.4))
    ax = fig.subplots()
    curves(ax, main, "mean_pr", 0, 0)
    ax.set_ylabel(PR.format(top))
    fig.suptitle("Mean participation ratio over training")
    legend(fig, main, SEEDS_NOTE, lambda ends: f": {np.mean([row['mean_pr'] for row in ends]):.1f}")
    return fig


def loss_vs_pr(main, top, last):
    fig = Figure((WIDTH, 4.7))
    every, final = axes = fig.subplots(1, 2, width_ratios=[3, 2])
    counts = sorted(set().union(*map(checkpoints, main)))
    for i, tokens in enumerate(counts):
        means = []
        for arm, group in by_arm(main).items():
            for run in group:
                row, lost = checkpoints(run).get(tokens), run["status"] == "diverged"
                edge = dict(markeredgecolor="black" if tokens == last else "none", markeredgewidth=0.8)
                look = dict(marker="x") if lost else dict(edge, marker=STYLE[arm]["marker"])
                for ax in axes[:1 + (tokens == last)] if row else []:
                    late = 1 if ax is final else (i + 1) / len(counts)
                    ax.plot(row["mean_pr"], row["val_loss"], color=STYLE[arm]["color"], alpha=0.35 + 0.65 * late,
                            markersize=3 + 5 * late, **look)
            if at := rows_at(group, tokens):
                means.append(tuple(np.mean([(row["mean_pr"], row["val_loss"]) for _, row in at], 0)))
        if means:
            x, y = zip(*sorted(means))
            for ax in axes[:1 + (tokens == last)]:
                ax.plot(x, y, color=GREY, linewidth=0.9, zorder=0)
            every.annotate(millions(tokens), (x[-1], y[-1]), (11, 0), textcoords="offset points", va="center",
                           fontsize=8)
    every.margins(x=0.15)
    final.margins(0.12)
    every.set_ylabel(LOSS)
    for ax in axes:
        ax.set_xlabel(PR.format(top).replace(" after", "\nafter"))
    every.set_title("all token checkpoints; larger is later", color=GREY, fontsize=9)
    final.set_title(f"at {millions(last)} tokens only", color=GREY, fontsize=9)
    fig.suptitle("Does a higher participation ratio go with a lower loss?")
    lost = " (x: it diverged later)" * (len(alive(main)) < len(main))
    legend(fig, main, f"a point: a run at a checkpoint{lost}; grey lines: arm means at equal tokens")
    return fig


def pr_heatmap(main, top, last):
    groups, n_layer = by_arm(main), max(r["config"]["n_layer"] for r in main)
    grid, heads = np.full((n_layer, len(groups)), np.nan), []
    for j, (arm, group) in enumerate(groups.items()):
        at = rows_at(group, last)
        if at:
            grid[:, j] = np.mean([layer_values(row, "pr") for _, row in at], 0)
        state = f"mean {grid[:, j].mean():.1f}" if at else "not there yet" if alive(group) else "diverged"
        heads.append(f"{LABELS[arm]}\n{state}")
    tall = n_layer > 12
    fig = Figure((WIDTH, 1.5 + n_layer * (0.25 if tall else 0.38)))
    ax = fig.subplots()
    ax.grid(False)
    ax.set_facecolor("#EEEEEE")
    # the whole range of PR, not that of the data: red has to mean collapsed, also where every arm is healthy
    image = ax.imshow(grid, cmap="RdYlBu", vmin=1, vmax=top, aspect="auto")
    for (i, j), value in np.ndenumerate(grid):
        dark = np.dot(image.cmap(image.norm(value))[:3], [0.3, 0.59, 0.11]) < 0.5
        ax.text(j, i, f"{value:.1f}" if np.isfinite(value) else "", ha="center", va="center",
                fontsize=8 if tall else 10, color="white" if dark else "black")
    ax.set_xticks(range(len(heads)), heads)
    ax.xaxis.tick_top()
    ax.set_yticks(range(n_layer), range(1, n_layer + 1))
    ax.set_ylabel("layer")
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    bar = fig.colorbar(image, ax=ax, label=f"PR1 of keys after RoPE, of {top}\nmean over heads and seeds", pad=0.02)
    init = np.mean([series(r, "mean_pr")[1][0] for r in main])
    ticks = [t for t in (1, *range(10, top, 10), top) if abs(t - init) > 0.06 * top]
    bar.set_ticks([*ticks, init], labels=[*ticks, f"init {init:.0f}"])
    bar.ax.axhline(init, color="black", linewidth=1.5)
    fig.suptitle(f"Participation ratio of each layer at {millions(last)} tokens")
    return fig


def spectra(main, last):
    n_layer = main[0]["config"]["n_layer"]
    layers, lowest = sorted({0, (n_layer + 1) // 2 - 1, n_layer - 1}), 1.0
    fig = Figure((WIDTH, 4.2))
    axes = fig.subplots(1, len(layers), sharey=True, squeeze=False)[0]
    for ax, layer in zip(axes, layers):
        inits = {False: [], True: []}  # the arms of a seed start from the same weights: only QK-Norm changes their keys
        for arm, group in by_arm(main).items():
            inits[group[0]["config"]["qk_norm"]] += [spectrum(r, layer, 0) for r in group]
            at = [spectrum(r, layer, row["step"]) for r, row in rows_at(group, last)]
            at = np.array([s for s in at if s is not None])
            if len(at):
                index = np.arange(1, at.shape[1] + 1)
                ax.plot(index, at.mean(0), **STYLE[arm], linewidth=1.8, markevery=(5, 12))
                ax.fill_between(index, at.min(0), at.max(0), color=STYLE[arm]["color"], alpha=0.18, linewidth=0)
                lowest = min(lowest, at.min())
        for qk_norm, start in inits.items():
            if start := [s for s in start if s is not None]:
                ax.plot(range(1, len(start[0]) + 1), np.mean(start, 0), "--" if qk_norm else "-", color=GREY,
                        linewidth=1, zorder=1)
        ax.set_title(f"layer {layer + 1} of {n_layer}")
        ax.set(yscale="log", xlabel="index, largest first")
    if lowest == 1.0:
        return f"no run has a spectrum at {millions(last)} tokens"
    axes[0].set_ylim(max(0.8 * lowest, 1e-6), 1.2)
    axes[0].set_ylabel("singular value of the keys after RoPE\ndivided by the largest (log scale)")
    fig.suptitle(f"Singular values of the keys at {millions(last)} tokens")
    legend(fig, main, "mean over heads and seeds; shading: min to max of the seeds; init dashed: with QK-Norm",
           extra=[Line2D([], [], color=GREY, linewidth=1, label="init (step 0)")])
    return fig


def lr_sweep(sweep, picks):
    ended = [r for r in sweep if r["status"] != "unfinished"]
    if not ended:
        return "no sweep run has ended"
    fig = Figure((WIDTH, 2.6 * math.ceil(len(ARMS) / 2)))
    axes = fig.subplots(math.ceil(len(ARMS) / 2), 2, sharey=True, squeeze=False).flatten()
    losses = [r["val_loss"] for r in ended if r["status"] == "finished"] or [0, 1]
    pad = 0.1 * np.ptp(losses) or 0.1
    roof = max(losses) + pad
    for ax, arm in zip(axes, ARMS):
        lrs, pick = {r["config"]["learning_rate"]: r for r in by_arm(ended).get(arm, [])}, picks.get(arm)
        good = [(lr, r["val_loss"]) for lr, r in sorted(lrs.items()) if r["status"] == "finished"]
        ax.plot(*np.array(good).reshape(-1, 2).T, **STYLE[arm], linewidth=1.8)
        for lr in (lr for lr, r in lrs.items() if r["status"] == "diverged"):
            ax.plot(lr, roof, "X", color=STYLE[arm]["color"], markersize=11, markeredgecolor="white")
            ax.annotate("diverged", (lr, roof), (0, -15), textcoords="offset points", ha="center", fontsize=8)
        title = "none chosen yet" if lrs else "no run yet"
        if pick:
            ax.plot(pick["lr"], pick["val_loss"], "*", color=STYLE[arm]["color"], markersize=16,
                    markeredgecolor="black")
            ax.annotate(f"{pick['val_loss']:.3f}", (pick["lr"], pick["val_loss"]), (0, -18), textcoords="offset points",
                        ha="center", fontsize=8)
            title = f"lr {short(pick['lr'])}" + ("" if pick["bracketed"] else ", not bracketed")
        ax.set_title(f"{LABELS[arm]}: {title}", fontsize=9)
        ax.set(xscale="log", ylim=(min(losses) - 2 * pad, roof + 0.7 * pad))
        if lrs:
            ax.set_xlim(min(lrs) / 1.5, max(lrs) * 1.5)
        ax.xaxis.set(major_locator=FixedLocator(sorted(lrs)), minor_locator=NullLocator(),
                     major_formatter=FuncFormatter(lambda lr, _: short(lr)))
        ax.tick_params(axis="x", rotation=45 if len(lrs) > 6 else 0)
    for ax in axes[len(ARMS):]:
        ax.set_visible(False)
    fig.supylabel(f"{LOSS} at {millions(ended[0]['config']['max_tokens'])} tokens", fontsize=10)
    fig.supxlabel("peak learning rate (log scale); star: the chosen one", fontsize=10)
    fig.suptitle("Learning rate sweep")
    return fig


def missing(main, sweep, picks, seeds):
    """Lines on what a whole study would have and this one has not."""
    scale = (main + sweep)[0]["config"]["scale"]
    grids = SCALES[scale]["grids"] if scale in SCALES else {}
    have = {r["dir"].name: r for r in sweep + main}
    due = [f"{arm}-lr{lr:g}" for arm in ARMS for lr in grids.get(arm, [])]
    for name in dict.fromkeys([*due, *(f"{arm}-seed{seed}" for seed in seeds for arm in ARMS), *have]):
        run = have.get(name)
        at = f"at {run['rows'][-1]['tokens']:,} tokens" if run and run["rows"] else "before its first row"
        if run is None:
            yield f"missing: {name}: not started"
        elif run["status"] == "diverged":
            yield f"diverged: {name}: last row {at}; marked where it shows, left out of means"
        elif run["status"] == "unfinished":
            yield f"missing: {name}: unfinished, {at} of {run['config']['max_tokens']:,}"
    yield from (f"missing: {arm}: no learning rate chosen" for arm in ARMS if arm not in picks)


def save(fig, folder, name):
    """Write a figure as .png and .svg, each aside first; the same data give the same bytes."""
    for kind, metadata in ("png", {"Software": None}), ("svg", {"Date": None}):
        data = io.BytesIO()
        fig.savefig(data, format=kind, dpi=150, metadata=metadata)
        aside = folder / f"{name}.{kind}.tmp"
        aside.write_bytes(data.getvalue())
        os.replace(aside, folder / f"{name}.{kind}")


def main():
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        fail("usage: python plot.py out/SCALE")
    study_dir = Path(sys.argv[1])
    try:
        runs, sweep, picks = load_runs(study_dir), load_runs(study_dir, "sweep"), chosen(study_dir)
        registered = study_dir / "preregistered.json"
        seeds = json.loads(registered.read_text())["seeds"] if registered.exists() else SEEDS
    except (ValueError, OSError) as e:
        fail(e)
    if not runs and not sweep:
        fail(f"{study_dir} holds no run: start the study with `bash sweep.sh`, or name another folder")
    print("\n".join(missing(runs, sweep, picks, seeds)) or "every run is there")

    shown = [r for r in runs if len(series(r, "val_loss")[0]) and len(series(r, "mean_pr")[0])]
    figures = dict.fromkeys(["1_val_loss", "2_mean_pr"], "no main run has a log row yet")
    figures |= dict.fromkeys(["3_loss_vs_pr", "4_pr_heatmap", "5_spectra"], "no main run has reached a checkpoint")
    if shown:
        top = shown[0]["config"]["n_embd"] // shown[0]["config"]["n_head"]  # head_dim: the largest PR there can be
        figures |= {"1_val_loss": val_loss(shown), "2_mean_pr": mean_pr(shown, top)}
    if (last := latest_common(shown)) is not None:
        figures |= {"3_loss_vs_pr": loss_vs_pr(shown, top, last), "4_pr_heatmap": pr_heatmap(shown, top, last),
                    "5_spectra": spectra(shown, last)}
    figures["6_lr_sweep"] = lr_sweep(sweep, picks)

    folder, drawn = study_dir / "figures", [name for name, fig in figures.items() if isinstance(fig, Figure)]
    try:
        folder.mkdir(exist_ok=True)
        for name, fig in figures.items():
            if name in drawn:
                save(fig, folder, name)
            else:
                print(f"missing: {name}: {fig}")
                for kind in "png", "svg":  # a figure of an earlier state would pass for one of this
                    (folder / f"{name}.{kind}").unlink(missing_ok=True)
    except OSError as e:
        fail(f"the figures cannot be written: {e}")
    if not drawn:
        fail(f"{study_dir} has nothing to draw yet: let its runs get further and plot again")
    print(f"{len(drawn)} of {len(figures)} figures in {folder}, as .png and .svg")


if __name__ == "__main__":
    main()
