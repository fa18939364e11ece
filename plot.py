"""The figures of a study, from its logs alone; every metric of one run; two studies or runs compared.

    python plot.py out/mini                 the study's seven figures, in out/mini/figures
    python plot.py out/mini/muon-seed42     all that this run has logged, in its run.png; also while it runs
    python plot.py out/mini out/mini_tweak  val loss and mean PR of both, in the second one's figures

Each comes as .png and .svg. A half-done study gives the figures that it can give; those that it can't and the
runs that have not finished are printed. What a whole study would have is report.py's to say.
"""
import itertools
import math
import re
import sys
import textwrap

import matplotlib
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from configurator import fail, find
from study import KINDS, LABELS, chosen, head_dim, layer_values, load_run, load_runs
from system import errors_in_one_line, write_whole

# Okabe-Ito: one hue an optimizer, lighter and dashed for QK-Norm, darker and dotted for frozen gains; markers
# for grey print
LOOKS = {"adamw": ("#D55E00", "-", "o"), "adamw_qk": ("#E69F00", "--", "s"),
         "muon": ("#0072B2", "-", "^"), "muon_qk": ("#56B4E9", "--", "D"),
         "adamw_qk_frozen": ("#7A3300", ":", "v"), "muon_qk_frozen": ("#003B66", ":", "P")}
MORE = [("#009E73", "-.", "<"), ("#CC79A7", "-.", ">"), ("#000000", "-.", "p"), ("#8A7A00", "-.", "h")]
STYLE = {arm: dict(zip(("color", "linestyle", "marker"), LOOKS.get(arm, MORE[i % len(MORE)])))
         for i, arm in enumerate(LABELS)}
DASHES = ["-", (0, (3, 1.5))]  # of the two studies in a comparison
GREY = "#666666"
WIDTH = 7  # inches: a blog shows it at about 700 pixels, where 10 points are 14 pixels
LOSS = "validation loss (nats a token)"
matplotlib.rcParams.update({
    "font.size": 10, "axes.titlesize": 10, "xtick.labelsize": 9, "ytick.labelsize": 9,
    "legend.fontsize": 9, "legend.title_fontsize": 9, "legend.frameon": False, "legend.handlelength": 3.2,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6, "axes.axisbelow": True, "lines.markersize": 5, "figure.titleweight": "bold",
    "figure.constrained_layout.use": True, "svg.fonttype": "none", "svg.hashsalt": "plot"})


def amount(tokens):
    """1966080 -> '1.97M', 20480 -> '20.5k'."""
    return f"{tokens / 1e6:.3g}M" if tokens >= 1e5 else f"{tokens / 1e3:.3g}k" if tokens else "0"


def short(lr):
    """0.0012 -> '1.2e-3'."""
    mantissa, exponent = f"{lr:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


# ---- what the logs hold
def by_arm(runs):
    """{arm: its runs} in the order of LABELS, without arms that have none."""
    groups = {arm: [r for r in runs if r["config"]["arm"] == arm] for arm in LABELS}
    return {arm: group for arm, group in groups.items() if group}


def by_rate(runs):
    """{learning rate: its runs}, ascending."""
    rates = sorted({r["config"]["learning_rate"] for r in runs})
    return {lr: [r for r in runs if r["config"]["learning_rate"] == lr] for lr in rates}


def means_by_rate(runs, key):
    """Learning rates where no run diverged, and the mean over seeds of key at the end there, each (n,)."""
    return np.array([(lr, np.mean([value(r["rows"][-1], key) for r in group]))
                     for lr, group in by_rate(runs).items() if group == finished(group)]).reshape(-1, 2).T


def alive(runs):
    return [r for r in runs if r["status"] != "diverged"]


def finished(runs):
    return [r for r in runs if r["status"] == "finished"]


def value(row, key):
    """A log row's value under key, or the mean of key_layer_0, _1, ...; nan where it has neither."""
    return float(np.mean(np.array(layer_values(row, key) or [row.get(key)], dtype=float)))  # None becomes nan


def series(run, key):
    """Tokens and values, each (n,), of the rows of a run that have a finite value() under key."""
    pairs = [(r["tokens"], y) for r in run["rows"] if math.isfinite(y := value(r, key))]
    return np.array(pairs, dtype=float).reshape(-1, 2).T


def checkpoints(run):
    """{tokens: row} at the token checkpoints of a run and at its end."""
    steps = {e["step"] for e in run["events"] if e["event"] in ("spot_check", "finished")}
    return {r["tokens"]: r for r in run["rows"] if r["step"] in steps and "mean_pr" in r}


def latest_common(main):
    """The largest token count at which every arm that has a checkpoint has one, or None."""
    sets = [s for group in by_arm(alive(main)).values() if (s := set().union(*map(checkpoints, group)))]
    return max(set.intersection(*sets) or set.union(*sets)) if sets else None


def rows_at(runs, tokens):
    """[(run, row)] of the runs that have not diverged and have a checkpoint at so many tokens."""
    return [(r, checkpoints(r)[tokens]) for r in alive(runs) if tokens in checkpoints(r)]


def spectra_at(pairs, layer):
    """Singular values (head_dim,) of the keys at each of [(run, row)]: each head divided by its largest, mean
    over heads. A missing or broken file is named and left out."""
    found = []
    for run, row in pairs:
        name = f"sv_layer_{layer}_step_{row['step']}.npy"
        try:
            s = np.load(run["dir"] / name).astype(float)
            found.append((s / s[:, :1]).mean(0))
        except (OSError, ValueError, EOFError):
            print(f"missing: {run['dir'].name}: {name} is absent or broken")
    return found


# ---- what the figures share
def pr_label(runs):
    tops = sorted({head_dim(r["config"]) for r in runs})
    return f"mean PR1 of keys after RoPE, of {' or '.join(map(str, tops))}"


def legend(fig, handles, title):
    """One legend under the whole figure, in as many columns as fit; a figure grows with its rows."""
    for ncols in (2, 1) if len(handles) == 4 else (3, 2, 1):
        box = fig.legend(handles=handles, loc="outside lower center", ncols=ncols, title=title)
        if ncols == 1 or box.get_window_extent().width < 0.98 * fig.bbox.width:
            break
        box.remove()
    fig.set_figheight(fig.get_figheight() + 0.18 * max(0, math.ceil(len(handles) / ncols) - 2))


def arm_handles(main, text=lambda group: "", **look):
    """Legend entries of arms: LABELS and text(the arm's runs)."""
    return [Line2D([], [], linewidth=2, label=LABELS[arm] + text(group), **STYLE[arm] | look)
            for arm, group in by_arm(main).items()]


def seeds_text(group):
    lost = ", ".join(str(r["config"]["seed"]) for r in group if r["status"] == "diverged")
    return f" ({len(group)} seed{'s' * (len(group) > 1)}{f'; X: {lost} diverged' * bool(lost)})"


def curve_legend(fig, studies, names, key, digits):
    """The legend of a figure of curves, with each arm's mean at the end of its budget."""
    def text(group):
        ends = [[value(r["rows"][-1], key) for r in finished(group) if r in study] for study in studies]
        means = ", ".join(f"{np.mean(y):.{digits}f}" if y else "none" for y in ends)
        return f": {means}" * any(ends) + seeds_text(group) * (not names)

    handles = arm_handles(sum(studies, []), text, **dict(linestyle="none") if names else {})
    handles += [Line2D([], [], color=GREY, lw=2, linestyle=d, label=n) for n, d in zip(names, DASHES)]
    legend(fig, handles, "lines: means over seeds; numbers: at the end of the budget, in the names' order"
           if names else "thick: mean over seeds; thin: each seed; shading: min to max; "
                         "numbers: at the end of the budget")


def tokens_axis(ax, start, end, ticks=6):
    size, unit = (1e6, "millions") if end >= 1e5 else (1e3, "thousands")
    ax.set(xlabel=f"training tokens ({unit})", xlim=(start, 1.02 * end - 0.02 * start))
    ax.xaxis.set(major_locator=MaxNLocator(ticks, steps=[1, 2, 5, 10]),
                 major_formatter=FuncFormatter(lambda t, _: f"{t / size:g}"))


def curves(ax, studies, key, start, informative, ticks=6):
    """Thin line of each seed, mean line and shading of each arm against tokens from `start` on. Values from
    `informative` tokens on rule the axis, those of diverged runs only where there is no other."""
    runs = sum(studies, [])
    x, y = np.hstack([series(r, key) for r in alive(runs) or runs])
    y = y[x >= informative] if x.max() >= informative else y
    pad, end = 0.04 * np.ptp(y) or 0.1, max(series(r, key)[0][-1] for r in runs)
    low, high = y.min() - pad, y.max() + pad
    tokens_axis(ax, start, end, ticks)
    ax.set_ylim(low, high)
    for dash, main in zip(DASHES, studies):
        for arm, group in by_arm(main).items():
            color, look = STYLE[arm]["color"], STYLE[arm] | (dict(linestyle=dash) if len(studies) > 1 else {})
            for run in group:
                x, y = series(run, key)
                lost = run["status"] == "diverged"
                if lost or len(group) > 1 and len(studies) == 1:  # they would fill the gaps of dashed lines
                    ax.plot(x, y, color=color, linewidth=0.7, alpha=0.8)
                if lost and x[-1] >= start:
                    ax.plot(x[-1], np.clip(y[-1], low, high), "X", color=color, markersize=11,
                            markeredgecolor="white", clip_on=False, zorder=5)
            at = [dict(zip(*series(run, key))) for run in alive(group)]
            if x := sorted(set.intersection(*map(set, at))) if at else []:
                y = np.array([[values[t] for t in x] for values in at])
                marks = [i for i, t in enumerate(x) if any(t in checkpoints(run) for run in group)]
                ax.plot(x, y.mean(0), **look, linewidth=2, markevery=marks)
                ax.fill_between(x, y.min(0), y.max(0), color=color, alpha=0.18, linewidth=0)


# ---- the figures
def val_loss(*studies, names=()):
    fig, runs = Figure((WIDTH, 4.4)), sum(studies, [])
    whole, tail = fig.subplots(1, 2, width_ratios=[3, 2])
    end = max(series(r, "val_loss")[0][-1] for r in runs)
    # step 0 and the first fall would leave a hair's breadth to the differences of the arms
    curves(whole, studies, "val_loss", 0, 0.1 * end)
    curves(tail, studies, "val_loss", 2 / 3 * end, 2 / 3 * end, ticks=3)
    whole.set_ylabel(LOSS)
    first = np.mean([series(r, "val_loss")[1][0] for r in runs])
    whole.set_title(f"whole run; it begins above the axis, at {first:.2f}", color=GREY, fontsize=9)
    tail.set_title("last third, enlarged", color=GREY, fontsize=9)
    fig.suptitle("Validation loss")
    curve_legend(fig, studies, names, "val_loss", 3)
    return fig


def mean_pr(*studies, names=()):
    fig = Figure((WIDTH, 4.4))
    ax = fig.subplots()
    curves(ax, studies, "mean_pr", 0, 0)
    ax.set_ylabel(pr_label(sum(studies, [])))
    fig.suptitle("Mean participation ratio over training")
    curve_legend(fig, studies, names, "mean_pr", 1)
    return fig


def loss_vs_pr(main, last):
    fig = Figure((WIDTH, 4.7))
    every, final = axes = fig.subplots(1, 2, width_ratios=[3, 2])
    counts, labels = sorted(set().union(*map(checkpoints, main))), []
    for i, tokens in enumerate(counts):
        late, at_last = (i + 1) / len(counts), tokens == last
        for arm, group in by_arm(main).items():
            color = STYLE[arm]["color"]
            for run in (r for r in group if tokens in checkpoints(r)):
                row, lost = checkpoints(run)[tokens], run["status"] == "diverged"
                for ax in axes[:1 + at_last]:
                    ax.plot(row["mean_pr"], row["val_loss"], "x" if lost else STYLE[arm]["marker"],
                            color=color, alpha=0.35 + 0.65 * late, markersize=3 + 5 * late,
                            markeredgecolor=color if lost else "black" if at_last else "none",
                            markeredgewidth=0.8)
        means = [tuple(np.mean([(row["mean_pr"], row["val_loss"]) for _, row in at], 0))
                 for group in by_arm(main).values() if (at := rows_at(group, tokens))]
        if means:
            x, y = zip(*sorted(means))
            for ax in axes[:1 + at_last]:
                ax.plot(x, y, color=GREY, linewidth=0.9, zorder=0)
            labels.append((amount(tokens), (x[-1], y[-1])))
    every.margins(x=0.15)
    final.margins(0.12)
    space, above = 0.05 * np.ptp(every.get_ylim()), []
    for text, at in reversed(labels):
        if all(abs(at[1] - y) > space for y in above):  # a label that would run into a later one is left out
            every.annotate(text, at, (11, 0), textcoords="offset points", va="center", fontsize=8)
            above.append(at[1])
    every.set_ylabel(LOSS)
    for ax in axes:
        ax.set_xlabel(pr_label(main).replace(" after", "\nafter"))
    every.set_title("all token checkpoints; larger is later", color=GREY, fontsize=9)
    final.set_title(f"at {amount(last)} tokens only", color=GREY, fontsize=9)
    fig.suptitle("Does a higher participation ratio go with a lower loss?")
    legend(fig, arm_handles(main, seeds_text),
           "a point: a run at a checkpoint (x: it diverged later); grey lines: arm means at equal tokens")
    return fig


def pr_heatmap(main, last):
    groups, n_layer, top = by_arm(main), main[0]["config"]["n_layer"], head_dim(main[0]["config"])
    none, heads = [[np.nan] * n_layer], []
    table = np.array([np.mean([layer_values(row, "pr") for _, row in rows_at(group, last)] or none, 0)
                      for group in groups.values()]).T
    for (arm, group), mean in zip(groups.items(), table.mean(0)):
        state = f"mean {mean:.1f}" if mean > 0 else "not there yet" if alive(group) else "diverged"
        heads.append(textwrap.fill(LABELS[arm], 64 // len(groups), break_on_hyphens=False) + f"\n{state}")
    tall, lines = n_layer > 12, max(head.count("\n") for head in heads)
    fig = Figure((WIDTH, max(3.2, 1.4 + 0.15 * lines + n_layer * (0.25 if tall else 0.38))))
    ax = fig.subplots()
    ax.grid(False)
    ax.set_facecolor("#EEEEEE")
    # the whole range of PR, not that of the data: red has to mean collapsed, also where every arm is healthy
    image = ax.imshow(table, cmap="RdYlBu", vmin=1, vmax=top, aspect="auto")
    for (i, j), pr in np.ndenumerate(table):
        dark = np.dot(image.cmap(image.norm(pr))[:3], [0.3, 0.59, 0.11]) < 0.5
        ax.text(j, i, f"{pr:.1f}" if np.isfinite(pr) else "", ha="center", va="center",
                fontsize=8 if tall else 10, color="white" if dark else "black")
    ax.set_xticks(range(len(heads)), heads)
    ax.xaxis.tick_top()
    ax.set_yticks(range(n_layer), range(1, n_layer + 1))
    ax.set_ylabel("layer")
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    bar = fig.colorbar(image, ax=ax, pad=0.02)
    init = np.mean([series(r, "mean_pr")[1][0] for r in main])
    bar.ax.axhline(init, color="black", linewidth=1.5)
    bar.set_label(f"PR1 of keys after RoPE, of {top}\nmean over seeds; line: {init:.0f} at init")
    fig.suptitle(f"Participation ratio of each layer at {amount(last)} tokens")
    return fig


def three_layers(fig, n_layer):
    """{layer: its axes} for the first, the middle and the last layer, side by side, for singular values."""
    layers = sorted({0, (n_layer + 1) // 2 - 1, n_layer - 1})
    axes = fig.subplots(1, len(layers), sharey=True, squeeze=False)[0]
    for ax, layer in zip(axes, layers):
        ax.set(yscale="log", xlabel="index, largest first", title=f"layer {layer + 1} of {n_layer}")
    axes[0].set_ylabel("singular value of the keys after RoPE\ndivided by the largest (log scale)")
    return dict(zip(layers, axes))


def spectra(main, last):
    fig = Figure((WIDTH, 4.2))
    for layer, ax in three_layers(fig, main[0]["config"]["n_layer"]).items():
        for arm, group in by_arm(main).items():
            if at := spectra_at(rows_at(group, last), layer):
                index, color = range(1, len(at[0]) + 1), STYLE[arm]["color"]
                ax.plot(index, np.mean(at, 0), **STYLE[arm], linewidth=1.8, markevery=(5, 12))
                ax.fill_between(index, np.min(at, 0), np.max(at, 0), color=color, alpha=0.18, linewidth=0)
        for qk_norm, dash in (False, "-"), (True, "--"):  # all else of a seed's arms is the same at step 0
            begun = [(r, dict(step=0)) for r in main if r["config"]["qk_norm"] == qk_norm]
            if at := spectra_at(begun, layer):
                ax.plot(range(1, len(at[0]) + 1), np.mean(at, 0), dash, color=GREY, linewidth=1, zorder=1)
    if not ax.lines:
        return None
    ax.set_ylim(max(ax.get_ylim()[0], 1e-6), 1.2)
    fig.suptitle(f"Singular values of the keys at {amount(last)} tokens")
    legend(fig, arm_handles(main, seeds_text) + [Line2D([], [], color=GREY, lw=1, label="init (step 0)")],
           "mean over heads and seeds; shading: min to max of the seeds; init dashed: with QK-Norm")
    return fig


def lr_sweep(sweep, picks):
    ended = [r for r in sweep if r["status"] != "unfinished"]
    if not ended:
        return None
    groups, losses = by_arm(ended), [r["val_loss"] for r in finished(ended)] or [0, 1]
    pad, several = 0.1 * np.ptp(losses) or 0.1, len({r["config"]["seed"] for r in ended}) > 1
    n_rows, roof = math.ceil(len(groups) / 2), max(losses) + pad
    fig = Figure((WIDTH, 0.3 + 2.4 * n_rows))
    axes = fig.subplots(n_rows, 2, sharey=True, squeeze=False).flatten()
    for ax, (arm, group) in zip(axes, groups.items()):
        rates, pick, color = by_rate(group), picks.get(arm), STYLE[arm]["color"]
        ax.plot(*means_by_rate(group, "val_loss"), **STYLE[arm], linewidth=1.8)
        for lr, runs in rates.items():
            if several:
                ax.plot([lr] * len(finished(runs)), [r["val_loss"] for r in finished(runs)], "_", color=color,
                        markersize=9, markeredgewidth=1.2)
            if lost := len(runs) - len(finished(runs)):
                ax.plot(lr, roof, "X", color=color, markersize=11, markeredgecolor="white")
                ax.annotate(f"{lost} of {len(runs)} diverged" if lost < len(runs) else "diverged", (lr, roof),
                            (0, -15), textcoords="offset points", ha="center", fontsize=8)
        title = f"{LABELS[arm]}: none chosen yet"
        if pick:
            star = dict(marker="*", linestyle="none", markeredgecolor="black")
            ties = [(t["lr"], t["val_loss"]) for t in pick["tried"] if t["lr"] in pick["tie"]]
            if ties:
                ax.plot(*zip(*ties), color="white", markersize=13, **star)
            ax.plot(pick["lr"], pick["val_loss"], color=color, markersize=16, **star)
            ax.annotate(f"{pick['val_loss']:.3f}", (pick["lr"], pick["val_loss"]), (0, -18),
                        textcoords="offset points", ha="center", fontsize=8)
            notes = ["not bracketed"] * (not pick["bracketed"])
            notes += [f"tie with {' and '.join(map(short, pick['tie']))}"] * bool(ties)
            title = f"{LABELS[arm]}: lr {short(pick['lr'])}" + ",\n" * bool(notes) + ", ".join(notes)
        ax.set_title(title, fontsize=9)
        ax.set(xscale="log", ylim=(min(losses) - 3.2 * pad, roof + 0.7 * pad))
        ax.set_xlim(min(rates) / 1.5, max(rates) * 1.5)
        ax.xaxis.set(major_locator=FixedLocator([*rates]), minor_locator=NullLocator(),
                     major_formatter=FuncFormatter(lambda lr, _: short(lr)))
        ax.tick_params(axis="x", rotation=45 if len(rates) > 6 else 0)
    for ax in axes[len(groups):]:
        ax.set_visible(False)
    note = "\nline: mean over seeds; dashes: each seed; hollow star: a tie within their noise" * several
    fig.supylabel(f"{LOSS} at {amount(ended[0]['config']['max_tokens'])} tokens", fontsize=10)
    fig.supxlabel(f"peak learning rate (log scale); star: the chosen one{note}", fontsize=10)
    fig.suptitle("Learning rate sweep")
    return fig


def rates(sweep, neighbours, main, picks):
    """Final loss and mean PR against learning rate: at the sweep's budget; at the main one, of one seed."""
    seed = next((r["config"]["seed"] for r in neighbours + main), None)
    long = [r for r in main + neighbours if r["config"]["seed"] == seed]
    parts = {name: [r for r in runs if r["status"] != "unfinished"]
             for name, runs in (("sweep", sweep), (f"main budget, seed {seed}", long)) if finished(runs)}
    if not parts:
        return None
    fig = Figure((WIDTH, 6))
    axes = fig.subplots(2, len(parts), sharex=True, squeeze=False)
    axes[1, 0].sharey(axes[1, -1])
    for (name, runs), column in zip(parts.items(), axes.T):
        for arm, group in by_arm(runs).items():
            color, pick = STYLE[arm]["color"], picks.get(arm, {}).get("lr")
            for ax, key in zip(column, ("val_loss", "mean_pr")):
                points = [(r["config"]["learning_rate"], value(r["rows"][-1], key)) for r in finished(group)]
                ax.plot(*np.array(points).reshape(-1, 2).T, ".", color=color, alpha=0.4)
                lrs, means = means_by_rate(group, key)
                ax.plot(lrs, means, **STYLE[arm], linewidth=1.6)
                ax.plot(lrs[lrs == pick], means[lrs == pick], "*", color=color, markersize=12,
                        markeredgecolor="black", zorder=3)
            for lr in {r["config"]["learning_rate"] for r in group if r["status"] == "diverged"}:
                column[0].plot(lr, 1, "X", color=color, markersize=9, markeredgecolor="white", clip_on=False,
                               transform=column[0].get_xaxis_transform())
        budget = amount(runs[0]["config"]["max_tokens"])
        column[0].set_title(f"{name}: {budget} tokens", color=GREY, fontsize=9)
        column[0].set_xscale("log")
        column[1].set_xlabel("peak learning rate (log scale)")
    axes[0, 0].set_ylabel(LOSS)
    axes[1, 0].set_ylabel(pr_label(main + sweep).replace(" after", "\nafter"))
    fig.suptitle("Loss and participation ratio by learning rate")
    legend(fig, arm_handles(sweep + main), "at the end of each budget; lines: means over seeds; dots: runs; "
                                           "star: the chosen rate; X: diverged")
    return fig


# ---- one run
PANELS = {  # title: {key: its name in the legend}
    "loss (nats a token)": {"train_loss": "train", "val_loss": "validation"},
    "participation ratio, mean over layers": {
        "mean_pr": "PR1 of keys", "pr_centered": "PR2, centred", "pr_pre_rope": "PR1 before RoPE",
        "pr_weight": "PR2 of gain x W_K"},
    "gradient norm before clipping (log scale)": {"grad_norm": ""},
    "learning rate": {"lr": ""}, "training tokens a second": {"tokens_per_s": ""}}
HEATS = {"pr": "PR1 of keys after RoPE", "attn_entropy": "attention entropy (nats)",
         "max_logit": "largest attention logit"}


def run_page(run):
    """All that a run has logged. A key that is in neither PANELS nor HEATS gets a panel under its name."""
    c, rows, panels, heats = run["config"], run["rows"], dict(PANELS), dict(HEATS)
    for key in dict.fromkeys(key for row in rows for key in row if key not in ("step", "tokens")):
        name = re.sub(r"_layer_\d+$", "", key)
        if name not in {*HEATS, *(key for panel in PANELS.values() for key in panel)}:
            (panels if name == key else heats)[name] = {key: ""} if name == key else name
    n, end = len(panels) + len(heats), rows[-1]["tokens"] or c["batch_tokens"]
    height = 1.8 * math.ceil(n / 2)
    fig = Figure((WIDTH, height + 3))
    upper, lower = fig.subfigures(2, 1, height_ratios=[height, 3])
    axes = upper.subplots(math.ceil(n / 2), 2).flatten()
    for ax, (title, panel) in zip(axes, panels.items()):
        for (key, name), color in zip(panel.items(), ("#E69F00", "#0072B2", "#009E73", "#CC79A7")):
            ax.plot(*series(run, key), "." * (len(rows) < 20) + "-", color=color, linewidth=1.4, label=name)
        if len(panel) > 1:
            ax.legend(fontsize=8, handlelength=1.2, ncols=len(panel) // 2, columnspacing=1, loc="upper right")
        ax.set_title(title, fontsize=9)
    loss, pr, norm, _, speed = axes[:len(PANELS)]
    loss.set_ylim(top=min(loss.get_ylim()[1], 2 * math.log(c["vocab_size"])))  # beyond it a run has exploded
    pr.set_ylim(0, 1.7 * pr.get_ylim()[1])  # room for the legend
    speed.set_ylim(bottom=0)
    norm.set_yscale("log")
    norm.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), minor_locator=NullLocator(),
                   major_formatter=FuncFormatter(lambda y, _: f"{y:g}"))
    at = np.array([row["tokens"] for row in rows])
    edges = np.array([at[0], *(at[1:] + at[:-1]) / 2, end])
    for ax, (name, title) in zip(axes[len(panels):], heats.items()):
        y = np.array([layer_values(row, name) or [None] * c["n_layer"] for row in rows], dtype=float).T
        scale = dict(cmap="RdYlBu", vmin=1, vmax=head_dim(c)) if name == "pr" else {}
        image = ax.pcolormesh(edges, np.arange(len(y) + 1) + 0.5, y, rasterized=True, **scale)
        upper.colorbar(image, ax=ax)
        ax.grid(False)
        ax.invert_yaxis()
        ax.yaxis.set_major_locator(MaxNLocator(6, integer=True))
        ax.set_title(f"{title}, by layer", fontsize=9)
    for i, ax in enumerate(axes):
        tokens_axis(ax, 0, end)
        ax.set_visible(i < n)
        if i < n - 2:
            ax.set_xlabel("")

    times = ScalarMappable(matplotlib.colors.Normalize(0, end))
    kept = [row for row in rows if (run["dir"] / f"sv_layer_0_step_{row['step']}.npy").exists()]
    three = three_layers(lower, c["n_layer"])
    for (layer, ax), row in itertools.product(three.items(), kept):
        for s in spectra_at([(run, row)], layer):
            ax.plot(range(1, len(s) + 1), s, color=times.to_rgba(row["tokens"]), linewidth=1.2)
    lower.colorbar(times, ax=[*three.values()], label="tokens", format=FuncFormatter(lambda t, _: amount(t)))
    fig.suptitle(f"{run['dir'].resolve().name}: {run['status']} at {amount(rows[-1]['tokens'])} of "
                 f"{amount(c['max_tokens'])} tokens\n{LABELS.get(c['arm'], c['arm'])}, peak learning rate "
                 f"{short(c['learning_rate'])}, seed {c['seed']}")
    return fig


# ---- what is asked for
def study_figures(main, sweep, neighbours, picks):
    """{name: the figure, or None where no run has what it shows}."""
    shapes = {(r["config"]["n_layer"], head_dim(r["config"])): r["dir"] for r in main}
    if len(shapes) > 1:
        fail(f"{' and '.join(map(str, shapes.values()))} differ in layers or head_dim: move one of them away")
    last = latest_common(main)
    return {
        "1_val_loss": val_loss(main) if main else None,
        "2_mean_pr": mean_pr(main) if main else None,
        "3_loss_vs_pr": loss_vs_pr(main, last) if last else None,
        "4_pr_heatmap": pr_heatmap(main, last) if last else None,
        "5_spectra": spectra(main, last) if last else None,
        "6_lr_sweep": lr_sweep(sweep, picks),
        "7_rates": rates(sweep, neighbours, main, picks)}


def save(fig, folder, name):
    """Write a figure as .png and .svg; the same data give the same bytes."""
    for kind, metadata in ("png", {"Software": None}), ("svg", {"Date": None}):
        path = folder / f"{name}.{kind}"
        with errors_in_one_line(f"{path} cannot be written", "make room, or the folder writable"):
            folder.mkdir(exist_ok=True)
            write_whole(path, lambda f: fig.savefig(f, format=kind, dpi=150, metadata=metadata))


def main(args):
    if len(args) not in (1, 2) or any(arg.startswith("-") for arg in args):
        fail("usage: python plot.py out/SCALE, or a run's folder, or two of either to compare them")
    folders = [find(arg) for arg in args]
    alone = [(folder / "config.json").exists() for folder in folders]
    try:
        studies = [[[load_run(folder)], [], []] if one else [load_runs(folder, kind, print) for kind in KINDS]
                   for folder, one in zip(folders, alone)]
        picks = chosen(folders[0])
    except (ValueError, OSError) as e:
        fail(e)
    for r in (r for study in studies for runs in study for r in runs if r["status"] != "finished"):
        at = r["rows"][-1]["tokens"] if r["rows"] else 0
        print(f"{r['status']}: {r['dir']}, at {at:,} of {r['config']['max_tokens']:,} tokens")

    mains = [[r for r in main if len(series(r, "val_loss")[0]) and len(series(r, "mean_pr")[0])]
             for main, *_ in studies]
    if len(folders) == 2:
        figures = {f"compare_{draw.__name__}": draw(*mains, names=args) if all(map(by_arm, mains)) else None
                   for draw in (val_loss, mean_pr)}
    elif alone[0]:
        [run] = studies[0][0]
        figures = {"run": run_page(run) if run["rows"] else None}
    else:
        figures = study_figures(mains[0], *studies[0][1:], picks)
    folder = folders[-1] if alone[-1] else folders[-1] / "figures"
    drawn = [name for name, fig in figures.items() if fig]
    for name in drawn:
        save(figures[name], folder, name)
    for name in [name for name in figures if name not in drawn]:
        print(f"missing: {name}: no run has what it shows yet")
        for kind in "png", "svg":  # a figure of an earlier state would pass for one of this
            (folder / f"{name}.{kind}").unlink(missing_ok=True)
    if not drawn:
        fail(f"nothing to draw in {' or '.join(args)}: name a study whose runs are far enough, or its run")
    print(f"{', '.join(drawn)} in {folder}, as .png and .svg")


if __name__ == "__main__":
    main(sys.argv[1:])
