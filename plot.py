"""The figures of a study, from its logs alone; every metric of one run; two studies or runs compared.

    python plot.py out/mini                 the study's seven figures, in out/mini/figures
    python plot.py out/mini/muon-seed42     all that this run has logged, in its run.png; also while it runs
    python plot.py out/mini out/mini_tweak  val loss and mean PR of both, in the second one's figures

Each comes as .png and .svg. A half-done study gives the figures that it can give; those that it can't and the
runs that have not finished are printed. What a whole study would have is report.py's to say.
"""
import itertools
import math
import sys
import textwrap

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from configurator import fail, find, whole_file
from study import KINDS, LABELS, chosen, head_dim, layer_values, load_run, load_runs
from system import errors_in_one_line

# Okabe-Ito: one hue an optimizer, lighter and dashed for QK-Norm, darker and dotted for frozen gains; markers
# for grey print
LOOKS = {"adamw": ("#D55E00", "-", "o"), "adamw_qk": ("#E69F00", "--", "s"),
         "muon": ("#0072B2", "-", "^"), "muon_qk": ("#56B4E9", "--", "D"),
         "adamw_qk_frozen": ("#7A3300", ":", "v"), "muon_qk_frozen": ("#003B66", ":", "P")}
MORE = [("#009E73", "-.", "<"), ("#CC79A7", "-.", ">"), ("#000000", "-.", "p"), ("#8A7A00", "-.", "h")]
STYLE = {arm: dict(zip(("color", "linestyle", "marker"), LOOKS.get(arm, MORE[i % len(MORE)])))
         for i, arm in enumerate(LABELS)}
GREY = "#666666"
DEPTH = matplotlib.colormaps["viridis"]  # dark at 0
WIDTH = 7  # inches: a blog shows it at about 700 pixels, where 10 points are 14 pixels
LOSS = "validation loss (nats a token)"
matplotlib.rcParams.update({
    "font.size": 10, "axes.titlesize": 9, "xtick.labelsize": 9, "ytick.labelsize": 9, "figure.labelsize": 10,
    "legend.fontsize": 9, "legend.title_fontsize": 9, "legend.frameon": False, "legend.handlelength": 3.2,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6, "axes.axisbelow": True, "lines.markersize": 5, "figure.titleweight": "bold",
    "figure.constrained_layout.use": True, "svg.fonttype": "none", "svg.hashsalt": "plot"})


def amount(tokens):
    """1966080 -> '1.97M', 20480 -> '20.5k'."""
    if tokens >= 1e9:
        return f"{tokens / 1e9:.3g}B"
    return f"{tokens / 1e6:.3g}M" if tokens >= 1e5 else f"{tokens / 1e3:.3g}k" if tokens else "0"


# ---- what the logs hold
def by(key, runs):
    """{value of a config key: its runs}: arms in the order of study.py, learning rates ascending."""
    values = {r["config"][key] for r in runs}
    ordered = [arm for arm in LABELS if arm in values] if key == "arm" else sorted(values)
    return {x: [r for r in runs if r["config"][key] == x] for x in ordered}


def alive(runs):
    return [r for r in runs if r["status"] != "diverged"]


def finished(runs):
    return [r for r in runs if r["status"] == "finished"]


def series(run, key):
    """Tokens and values, each (n,), of the rows of a run that have a finite value under key."""
    pairs = np.array([(r["tokens"], r.get(key)) for r in run["rows"]], dtype=float).reshape(-1, 2)  # None: nan
    return pairs[np.isfinite(pairs[:, 1])].T


def checkpoints(run):
    """{tokens: row} at the token checkpoints of a run and at its end."""
    steps = {e["step"] for e in run["events"] if e["event"] in ("spot_check", "finished")}
    return {r["tokens"]: r for r in run["rows"] if r["step"] in steps and "mean_pr" in r}


def latest_common(main):
    """The largest token count at which every arm that has a checkpoint has one, or None."""
    sets = [set().union(*map(checkpoints, group)) for group in by("arm", alive(main)).values()]
    sets = [s for s in sets if s]
    return max(set.intersection(*sets), default=None) if sets else None


def rows_at(runs, tokens):
    """[(run, row)] of the runs that have a checkpoint at so many tokens."""
    return [(r, at[tokens]) for r in runs if tokens in (at := checkpoints(r))]


def spectra_at(pairs, layer):
    """Singular values (head_dim,) of the keys at each of [(run, row)]: each head divided by its largest, mean
    over heads. A missing or broken file is named and left out."""
    found = []
    for run, row in pairs:
        path = run["dir"] / f"sv_layer_{layer}_step_{row['step']}.npy"
        try:
            s = np.load(path).astype(float)
            found.append((s / s[:, :1]).mean(0))
        except (OSError, ValueError, EOFError):
            print(f"missing: {path} is absent or broken")
    return found


# ---- what the figures share
def arms(*studies):
    """[(arm's label, its runs, how to draw it)] of each study; two studies differ in their dashes."""
    dashes = [{"linestyle": dash} for dash in ("-", (0, (3, 1.5)))] if len(studies) > 1 else [{}]
    return [(LABELS[arm], group, STYLE[arm] | dash) for study, dash in zip(studies, dashes)
            for arm, group in by("arm", study).items()]


def pr_label(run):
    return f"mean PR1 of keys after RoPE, of {head_dim(run['config'])}"


def seeds_text(group):
    lost = ", ".join(str(r["config"]["seed"]) for r in group if r["status"] == "diverged")
    return f" ({len(group)} seed{'s' * (len(group) > 1)}{f'; X: {lost} diverged' * bool(lost)})"


def legend(fig, studies, title, text=seeds_text):
    """One legend under the whole figure, which grows with its rows: each arm with text(its runs)."""
    handles = [Line2D([], [], linewidth=2, label=label + text(group), **look)
               for label, group, look in arms(*studies)]
    for ncols in 2, 1:
        box = fig.legend(handles=handles, loc="outside lower center", ncols=ncols, title=title)
        if ncols == 1 or box.get_window_extent().width < 0.98 * fig.bbox.width:
            break
        box.remove()
    fig.set_figheight(fig.get_figheight() + 0.18 * max(0, math.ceil(len(handles) / ncols) - 2))


def curve_legend(fig, studies, names, key, digits):
    """The legend of a figure of curves, with each arm's mean at the end of its budget."""
    def text(group):
        ends = [r["rows"][-1][key] for r in finished(group)]
        return (f": {np.mean(ends):.{digits}f}" if ends else "") + seeds_text(group)

    lines = "solid: {}\ndashed: {}\nlines".format(*names) if names else "thin: each seed; thick"
    legend(fig, studies, f"{lines}: means over seeds; shading: min to max; numbers: at the end of the budget", text)


def tokens_axis(ax, start, end):
    ax.set_xlim(start, 1.02 * end - 0.02 * start)
    ax.xaxis.set(major_locator=MaxNLocator("auto", steps=[1, 2, 5, 10]),
                 major_formatter=lambda tokens, _: amount(tokens))


def band(ax, x, values, look, **line):
    """The mean over the runs as a line and, in its colour, their range. x (n,), values (runs, n)."""
    ax.plot(x, np.mean(values, 0), **look, **line)
    ax.fill_between(x, np.min(values, 0), np.max(values, 0), color=look["color"], alpha=0.18, linewidth=0)


def curves(ax, studies, key, start=0, informative=0):
    """Each seed and the band() of each arm against tokens, from a share `start` of the budget on. Values from
    the share `informative` on rule the axis, those of diverged runs only where there is no other."""
    runs = sum(studies, [])
    end = max(series(r, key)[0][-1] for r in runs)
    x, y = np.hstack([series(r, key) for r in alive(runs) or runs])
    y = y[x >= min(informative * end, x.max())]
    pad = 0.04 * np.ptp(y) or 0.1
    low, high = y.min() - pad, y.max() + pad
    tokens_axis(ax, start * end, end)
    ax.set(xlabel="training tokens", ylim=(low, high))
    for _, group, look in arms(*studies):
        for run in group:
            x, y = series(run, key)
            lost = run["status"] == "diverged"
            if lost or len(group) > 1 and len(studies) == 1:  # they would fill the gaps of dashed lines
                ax.plot(x, y, color=look["color"], linewidth=0.7, alpha=0.8)
            if lost and x[-1] >= start * end:
                ax.plot(x[-1], np.clip(y[-1], low, high), "X", color=look["color"], markersize=11,
                        markeredgecolor="white", clip_on=False, zorder=5)
        at = [dict(zip(*series(run, key))) for run in alive(group)]
        if x := sorted(set.intersection(*map(set, at))) if at else []:
            band(ax, x, [[values[t] for t in x] for values in at], look, linewidth=2,
                 markevery=max(1, len(x) // 8))


# ---- the figures
def val_loss(*studies, names=()):
    fig = Figure((WIDTH, 4.4))
    whole, tail = fig.subplots(1, 2, width_ratios=[3, 2])
    # step 0 and the first fall would leave a hair's breadth to the differences of the arms
    curves(whole, studies, "val_loss", informative=0.1)
    curves(tail, studies, "val_loss", start=2 / 3, informative=2 / 3)
    whole.set(ylabel=LOSS, title="whole run; it begins above the axis")
    tail.set(title="last third, enlarged")
    fig.suptitle("Validation loss")
    curve_legend(fig, studies, names, "val_loss", 3)
    return fig


def mean_pr(*studies, names=()):
    fig = Figure((WIDTH, 4.4))
    ax = fig.subplots()
    curves(ax, studies, "mean_pr")
    ax.set(ylabel=pr_label(studies[0][0]))
    fig.suptitle("Mean participation ratio over training")
    curve_legend(fig, studies, names, "mean_pr", 1)
    return fig


def loss_vs_pr(main, last):
    fig = Figure((WIDTH, 4.7))
    ax = fig.subplots()
    counts = sorted(set().union(*map(checkpoints, main)))
    for late, tokens in zip(np.linspace(0, 1, len(counts) + 1)[1:], counts):
        means = []
        for _, group, look in arms(main):
            for run, row in rows_at(group, tokens):
                lost, color = run["status"] == "diverged", look["color"]
                ax.plot(row["mean_pr"], row["val_loss"], "x" if lost else look["marker"], color=color,
                        alpha=0.35 + 0.65 * late, markersize=3 + 5 * late, markeredgewidth=0.8,
                        markeredgecolor="black" if tokens == last and not lost else color)
            if at := rows_at(alive(group), tokens):
                means.append(tuple(np.mean([(row["mean_pr"], row["val_loss"]) for _, row in at], 0)))
        ax.plot(*zip(*sorted(means)), color=GREY, linewidth=0.9, zorder=0)
    ax.set(xlabel=pr_label(main[0]), ylabel=LOSS,
           title=f"all token checkpoints; larger is later; black edges: at {amount(last)} tokens")
    fig.suptitle("Does a higher participation ratio go with a lower loss?")
    legend(fig, [main], "a point: a run (x: it diverged later); grey lines: arm means at equal tokens")
    return fig


def pr_heatmap(main, last):
    n_layer, top, heads, columns = main[0]["config"]["n_layer"], head_dim(main[0]["config"]), [], []
    for label, group, _ in (groups := arms(main)):
        at = rows_at(alive(group), last)
        columns.append(np.mean([layer_values(row, "pr") for _, row in at] or [[np.nan] * n_layer], 0))
        state = f"mean {columns[-1].mean():.1f}" if at else "not there yet" if alive(group) else "diverged"
        heads.append(textwrap.fill(label, 64 // len(groups), break_on_hyphens=False) + f"\n{state}")
    table = np.transpose(columns)
    fig = Figure((WIDTH, 2.2 + 0.28 * max(4, n_layer)))
    ax = fig.subplots()
    # the whole range of PR, not that of the data: red has to mean collapsed, also where every arm is healthy
    image = ax.imshow(table, cmap="RdYlBu", vmin=1, vmax=top, aspect="auto")
    for (i, j), pr in np.ndenumerate(table):
        if np.isfinite(pr):
            dark = abs(2 * pr / top - 1) > 0.7  # both ends of the colours are
            ax.text(j, i, f"{pr:.1f}", ha="center", va="center", color="white" if dark else "black")
    ax.set_xticks(range(len(heads)), heads)
    ax.set_yticks(range(n_layer), range(1, n_layer + 1))
    ax.tick_params(length=0, top=True, labeltop=True, labelbottom=False)
    ax.set(ylabel="layer")
    ax.grid(False)
    init = np.mean([series(r, "mean_pr")[1][0] for r in main])
    bar = fig.colorbar(image, label=f"PR1 of keys after RoPE, of {top}\nmean over seeds; line: {init:.0f} at init")
    bar.ax.axhline(init, color="black", linewidth=1.5)
    fig.suptitle(f"Participation ratio of each layer at {amount(last)} tokens")
    return fig


def three_layers(fig, n_layer, lines):
    """Singular values in the first, the middle and the last layer, side by side: a band() for each of lines,
    [(how to draw it, [(run, row)])]. Returns the last axes."""
    layers = sorted({0, (n_layer + 1) // 2 - 1, n_layer - 1})
    axes = fig.subplots(1, len(layers), sharey=True, squeeze=False)[0]
    for layer, ax in zip(layers, axes):
        for look, at in lines:
            if found := spectra_at(at, layer):
                band(ax, range(1, len(found[0]) + 1), found, look, linewidth=1.8, markevery=(5, 12))
        ax.set(yscale="log", xlabel="index, largest first", title=f"layer {layer + 1} of {n_layer}")
    axes[0].set_ylabel("singular value of the keys after RoPE\ndivided by the largest (log scale)")
    return ax


def spectra(main, last):
    fig = Figure((WIDTH, 4.2))
    lines = [(look, rows_at(alive(group), last)) for _, group, look in arms(main)]
    lines += [(dict(color=GREY, linestyle=dash), [(r, dict(step=0)) for r in group])  # a seed's arms begin alike
              for dash, group in zip(("-", "--"), by("qk_norm", main).values())]
    ax = three_layers(fig, main[0]["config"]["n_layer"], lines)
    if not ax.lines:
        return None
    ax.set_ylim(max(ax.get_ylim()[0], 1e-6), 1.2)
    fig.suptitle(f"Singular values of the keys at {amount(last)} tokens")
    legend(fig, [main], "means over heads and seeds; shading: min to max; grey: at init, dashed with QK-Norm")
    return fig


def against_rate(ax, group, look, key, pick):
    """An arm's runs at the end of their budget against learning rate: a dot each, a line through the means of
    the rates where none diverged, a star on the chosen one, an X on the upper edge where one diverged."""
    end = lambda run: run["rows"][-1][key]
    rates = by("learning_rate", group)
    means = {lr: np.mean([end(r) for r in runs]) for lr, runs in rates.items() if runs == finished(runs)}
    ax.set(xscale="log")
    ax.plot([r["config"]["learning_rate"] for r in finished(group)], [end(r) for r in finished(group)], ".",
            color=look["color"], alpha=0.4)
    ax.plot([*means], [*means.values()], **look, linewidth=1.6)
    for lr in rates.keys() - means:
        ax.plot(lr, 1, "X", color=look["color"], markersize=9, markeredgecolor="white", clip_on=False,
                transform=ax.get_xaxis_transform())
    if pick and pick["lr"] in means:
        ax.plot(pick["lr"], means[pick["lr"]], "*", color=look["color"], markersize=14, markeredgecolor="black",
                zorder=3)


def lr_sweep(sweep, picks):
    groups = arms([r for r in sweep if r["status"] != "unfinished"])
    if not groups:
        return None
    n_rows = math.ceil(len(groups) / 2)
    fig = Figure((WIDTH, 0.6 + 2.4 * n_rows))
    ax = None
    for i, (label, group, look) in enumerate(groups, 1):
        ax = fig.add_subplot(n_rows, 2, i, sharey=ax)
        pick, lrs = picks.get(group[0]["config"]["arm"]), [*by("learning_rate", group)]
        notes = ["none chosen yet"]
        if pick:
            notes = [f"lr {pick['lr']:g}", f"\nloss {pick['val_loss']:.3f}"]
            notes += ["not bracketed"] * (not pick["bracketed"]) + [f"tie with {lr:g}" for lr in pick["tie"]]
        against_rate(ax, group, look, "val_loss", pick)
        ax.set_title(f"{label}: " + ", ".join(notes))
        ax.set_xticks(lrs, [f"{lr:g}" for lr in lrs], rotation=30)
        ax.minorticks_off()
        ax.margins(0.1, 0.12)
    fig.supylabel(f"{LOSS} at {amount(sweep[0]['config']['max_tokens'])} tokens")
    fig.supxlabel("peak learning rate (log scale)\n"
                  "line: mean over seeds; dots: runs; star: the chosen rate; X: diverged")
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
    for (name, runs), (loss, pr) in zip(parts.items(), axes.T):
        for _, group, look in arms(runs):
            for ax, key in (loss, "val_loss"), (pr, "mean_pr"):
                against_rate(ax, group, look, key, picks.get(group[0]["config"]["arm"]))
        loss.set(title=f"{name}: {amount(runs[0]['config']['max_tokens'])} tokens")
        pr.set(xlabel="peak learning rate (log scale)")
    axes[0, 0].set_ylabel(LOSS)
    axes[1, 0].set_ylabel(pr_label((main + sweep)[0]).replace(" after", "\nafter"))
    fig.suptitle("Loss and participation ratio by learning rate")
    legend(fig, [sweep + main], "at the end of each budget; lines: means over seeds; dots: runs; "
           "star: the chosen rate; X: diverged", text=lambda group: "")
    return fig


# ---- one run
def run_page(run):
    """All that a run has logged, a panel a key, in the log's words; and its spectra."""
    c, rows = run["config"], run["rows"]
    panels = {"train_loss (dark), val_loss (light)": ["train_loss", "val_loss"]}
    for key in itertools.chain(*rows):
        name, _, layer = key.partition("_layer_")
        if layer.isdigit():
            panels[f"{name}, by layer"] = [f"{name}_layer_{i}" for i in range(c["n_layer"])]
        elif key not in ("step", "tokens", "train_loss", "val_loss"):
            panels[key] = [key]
    n_rows, end = math.ceil(len(panels) / 2), rows[-1]["tokens"] or c["batch_tokens"]
    fig = Figure((WIDTH, 1.8 * n_rows + 3))
    upper, lower = fig.subfigures(2, 1, height_ratios=[1.8 * n_rows, 3])
    for i, (title, keys) in enumerate(panels.items(), 1):
        ax = upper.add_subplot(n_rows, 2, i, title=title)
        for key, color in zip(keys, DEPTH(np.linspace(0, 0.9, len(keys)))):
            ax.plot(*series(run, key), "." * (len(rows) < 20) + "-", color=color, linewidth=1.4)
        if "loss" in title:  # beyond this a run has exploded
            ax.set_ylim(top=min(ax.get_ylim()[1], 2 * math.log(c["vocab_size"])))
        if title == "grad_norm":
            ax.set_yscale("log")
        tokens_axis(ax, 0, end)
    upper.supxlabel("training tokens; layers from the first, dark, to the last, light")

    kept = [row for row in rows if (run["dir"] / f"sv_layer_0_step_{row['step']}.npy").exists()]
    three_layers(lower, c["n_layer"], [(dict(color=DEPTH(0.9 * row["tokens"] / end)), [(run, row)]) for row in kept])
    lower.supxlabel("from the start, dark, to the end, light")
    fig.suptitle(f"{run['dir'].resolve().name}: {run['status']} at {amount(rows[-1]['tokens'])} of "
                 f"{amount(c['max_tokens'])} tokens\npeak learning rate {c['learning_rate']:g}, seed {c['seed']}")
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
            with whole_file(path) as f:
                fig.savefig(f, format=kind, dpi=150, metadata=metadata)


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
    for r in itertools.chain(*itertools.chain(*studies)):
        if r["status"] != "finished":
            print(f"{r['status']}: {r['dir']}")

    mains = [[r for r in main if series(r, "val_loss").size and series(r, "mean_pr").size] for main, *_ in studies]
    if len(folders) == 2:
        both = all(by("arm", main) for main in mains)
        figures = {f"compare_{draw.__name__}": draw(*mains, names=args) if both else None
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
    for name in sorted(figures.keys() - drawn):
        print(f"missing: {name}: no run has what it shows yet")
        for kind in "png", "svg":  # a figure of an earlier state would pass for one of this
            (folder / f"{name}.{kind}").unlink(missing_ok=True)
    if not drawn:
        fail(f"nothing to draw in {' or '.join(args)}: name a study whose runs are far enough, or its run")
    print(f"{', '.join(drawn)} in {folder}, as .png and .svg")


if __name__ == "__main__":
    main(sys.argv[1:])
