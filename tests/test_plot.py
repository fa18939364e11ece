"""plot.py on synthetic studies: what the figures show is what the logs hold, on whole and on half-done studies."""
import json
import math
import runpy
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.legend import Legend
from matplotlib.text import Text

import configurator
import plot
import synthetic
from study import ARMS, FACTORIAL, LABELS, chosen, grid, load_run, load_runs

FIGURES = ["1_val_loss", "2_mean_pr", "3_loss_vs_pr", "4_pr_heatmap", "5_spectra", "6_lr_sweep", "7_rates"]
SWEEP = {arm: [f"{arm}-lr{lr:g}" for lr in grid("mini", arm)] for arm in ARMS}  # names of runs
FROZEN = {"adamw_qk_frozen": {}, "muon_qk_frozen": {}}  # arms beside the 2x2
ROOT = Path(plot.__file__).parent


def run_plot(folder, capsys, *more):
    plot.main([str(folder), *map(str, more)])
    return capsys.readouterr().out.splitlines()


@pytest.fixture
def figures(monkeypatch):
    """{name: figure} of what plot.py would write: nothing is drawn or saved."""
    kept = {}
    monkeypatch.setattr(plot, "save", lambda fig, folder, name: kept.update({name: fig}))
    return kept


def text_of(fig):
    return words(" ".join(text.get_text() for text in fig.findobj(Text)))


def lines_in_marker(ax, marker):
    return [line for line in ax.lines if line.get_marker() == marker]


def words(text):
    return " ".join(text.split())


def lines_in(ax, arm, width):
    return [line for line in ax.lines if line.get_color() == plot.STYLE[arm]["color"] and line.get_linewidth() == width]


def check_layout(name, fig):
    """No text of a drawn figure is cut and no tick labels touch."""
    FigureCanvasAgg(fig).draw()
    frame = fig.bbox.padded(2)
    axes = [ax for ax in fig.findobj(Axes) if ax.get_visible()]
    for artist in [*axes, *fig.findobj(Legend), *(text for part in (fig, *fig.subfigs) for text in part.texts)]:
        box = artist.get_tightbbox()
        assert frame.contains(*box.min) and frame.contains(*box.max), (name, artist)
    for ax in axes:
        for axis in ax.xaxis, ax.yaxis:
            low, high = sorted(axis.get_view_interval())
            ticks = [t.label1 if t.label1.get_visible() else t.label2 for t in axis.get_major_ticks()
                     if low <= t.get_loc() <= high]
            boxes = [t.get_window_extent() for t in ticks if t.get_visible() and t.get_text()]
            assert not any(a.overlaps(b) for a, b in zip(boxes, boxes[1:]) if not ticks[0].get_rotation()), (
                name, ax.get_title(), [t.get_text() for t in ticks])


@pytest.mark.parametrize("kw", [
    dict(scale="ci", n_layer=1, arms=FROZEN, beside={}),
    dict(scale="80m", seeds=(42,), arms=FROZEN),
    dict(diverged=["adamw-seed137", "muon_qk", "adamw-lr0.008"], unbracketed=["muon"], arms=FROZEN,
         sweep_seeds=(1, 2, 3), noise=dict(loss=0.05))])
def test_whole_study_a_run_and_a_comparison_name_all_arms_and_cut_no_text(tmp_path, capsys, monkeypatch, figures, kw):
    d = synthetic.make_study(tmp_path / "study", **kw)
    monkeypatch.chdir(tmp_path)
    lines = run_plot("study", capsys)
    assert lines[-1] == f"{', '.join(FIGURES)} in study/figures, as .png and .svg"
    assert len(lines) == 1 + len([r for kind in ("main", "sweep", "neighbours") for r in load_runs(d, kind)
                                  if r["status"] != "finished"])
    for name in FIGURES:
        assert all(words(LABELS[arm]) in text_of(figures[name]) for arm in [*FACTORIAL, *FROZEN])
    n_layer = load_runs(d)[0]["config"]["n_layer"]
    assert f"layer {n_layer} of {n_layer}" in text_of(figures["5_spectra"])
    run_plot("study/muon-seed42", capsys)
    run_plot("study", capsys, "study/adamw-seed42")
    assert [*figures] == [*FIGURES, "run", "compare_val_loss", "compare_mean_pr"]
    for name, fig in figures.items():
        check_layout(name, fig)


def test_a_figure_is_written_as_png_and_svg_the_same_bytes_each_time(tmp_path, capsys):
    d = synthetic.make_study(tmp_path, scale="ci", n_layer=1, absent=ARMS)
    (d / "figures").mkdir()
    (d / "figures" / "1_val_loss.png").write_text("of an earlier study")
    written = []
    for _ in range(2):
        lines = run_plot(d, capsys)
        written.append({p.name: p.read_bytes() for p in (d / "figures").iterdir()})
    assert [line.split(": ")[1] for line in lines if line.startswith("missing")] == FIGURES[:5]
    assert sorted(written[0]) == [f"{name}.{kind}" for name in FIGURES[5:] for kind in ("png", "svg")]
    assert written[0] == written[1]
    png, svg = written[0]["6_lr_sweep.png"], written[0]["6_lr_sweep.svg"].decode()
    assert png[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">I", png[16:20])[0] == 1050
    assert "<svg" in svg and all(f"{LABELS[arm]}: lr" in svg for arm in ARMS)  # text, not outlines


def test_half_done_study_draws_what_there_is_and_names_what_has_not_finished(tmp_path, capsys, figures):
    lost, running, absent = SWEEP["adamw"][-1], SWEEP["muon"][-2], SWEEP["muon_qk"][0]
    d = synthetic.make_study(tmp_path, diverged=["adamw-seed137", lost], unfinished=["muon", running],
                             absent=["muon_qk", "adamw_qk-seed137", absent])
    lines = run_plot(d, capsys)
    named = {status: {line.split(": ")[1] for line in lines if line.startswith(status)}
             for status in ("unfinished", "diverged", "missing")}
    assert named == dict(unfinished={str(d / name) for name in ("muon-seed42", "muon-seed137", f"sweep/{running}")},
                         diverged={str(d / name) for name in ("adamw-seed137", f"sweep/{lost}")}, missing=set())
    assert "2 seeds; X: 137 diverged" in text_of(figures["1_val_loss"])
    assert "diverged" in text_of(figures["6_lr_sweep"]) and "Muon: none chosen yet" in text_of(figures["6_lr_sweep"])
    half = load_runs(d)[0]["config"]["max_tokens"] // 2  # the last checkpoint that every arm with one has
    assert f"at {plot.amount(half)} tokens" in text_of(figures["4_pr_heatmap"])
    assert [*figures] == FIGURES


def tiny(d, **kw):
    return synthetic.make_study(d, **dict(dict(scale="ci", n_layer=1, absent=ARMS, spectra=False), **kw))


@pytest.mark.parametrize("make, says", [
    (lambda d: d.mkdir(), "nothing to draw in"),
    (lambda d: None, "nothing to draw in"),
    (lambda d: synthetic.make_study(d, spectra=False, absent=ARMS, unfinished=sum(SWEEP.values(), [])), "nothing to"),
    (lambda d: (tiny(d) / "chosen_lr.json").write_text("{"), "chosen_lr.json is no JSON"),
    (lambda d: (tiny(d) / "chosen_lr.json").write_text('{"muon": 1}'), "chosen_lr.json holds no"),
    (lambda d: (tiny(d) / "figures").write_text(""), "cannot be written"),
    (lambda d: d.write_text(""), "study")])
def test_nothing_to_draw_is_one_line(tmp_path, capsys, make, says):
    make(tmp_path / "study")
    with pytest.raises(SystemExit) as e:
        run_plot(tmp_path / "study", capsys)
    assert e.value.code.startswith("error: ") and says in e.value.code and "\n" not in e.value.code


def test_missing_and_broken_spectra_are_named(tmp_path, capsys, figures):
    synthetic.make_study(tmp_path)
    gone, broken = "sv_layer_0_step_0.npy", f"sv_layer_5_step_{load_runs(tmp_path)[0]['rows'][-1]['step']}.npy"
    (tmp_path / "muon-seed42" / gone).unlink()
    (tmp_path / "muon-seed137" / broken).write_bytes(b"\x93NUMPY")
    lines = run_plot(tmp_path, capsys)
    assert [Path(line.split()[1]).name for line in lines if line.startswith("missing")] == [gone, broken]
    assert "5_spectra" in figures


def test_curves_are_means_over_seeds_and_show_each_seed():
    main = synthetic.study(seeds=(42, 137, 7), diverged=["muon-seed7"])[0]
    whole, tail = plot.val_loss(main).axes
    for arm in ARMS:
        rows = [r["rows"] for r in main if r["config"]["arm"] == arm and r["status"] == "finished"]
        [mean] = lines_in(whole, arm, 2)
        assert len(lines_in(whole, arm, 0.7)) == 3
        assert np.allclose(mean.get_xdata(), [row["tokens"] for row in rows[0]])
        assert np.allclose(mean.get_ydata(), np.mean([[row["val_loss"] for row in run] for run in rows], 0))
    # neither step 0 nor, in the last third, an earlier row rules the axis
    losses = [(row["tokens"], row["val_loss"]) for r in main if r["status"] == "finished" for row in r["rows"]]
    end = max(t for t, _ in losses)
    for ax, start in (whole, 0.1), (tail, 2 / 3):
        seen = [loss for t, loss in losses if t >= start * end]
        low, high = ax.get_ylim()
        assert min(seen) - 0.1 * np.ptp(seen) < low < min(seen) and max(seen) < high < max(seen) + 0.1 * np.ptp(seen)


def test_an_exploding_run_does_not_rule_the_axis():
    main = synthetic.study(diverged=["adamw-seed42"])[0]
    main[0]["rows"][-1]["val_loss"] = 1e4
    main[1]["rows"][2]["val_loss"] = float("nan")
    fig = plot.val_loss(main)
    assert all(np.isfinite(line.get_ydata()).all() for line in fig.axes[0].lines)
    assert fig.axes[0].get_ylim()[1] < 10
    assert [len(lines_in_marker(ax, "X")) for ax in fig.axes] == [1, 0]


def test_arms_are_compared_at_the_latest_tokens_that_all_have():
    def last(**kw):
        main = synthetic.study(**kw)[0]
        return plot.latest_common(main) / main[0]["config"]["max_tokens"]

    assert last(unfinished=["muon-seed42"]) == 1  # muon's other seed is there
    assert last(unfinished=["muon"]) == 0.5
    assert last(diverged=["muon"]) == 1  # a diverged arm holds back no other
    assert plot.latest_common([]) is None


def test_scatter_has_each_run_at_each_checkpoint():
    main = synthetic.study()[0]
    last = plot.latest_common(main)
    [ax] = plot.loss_vs_pr(main, last).axes
    dots = [line for line in ax.lines if len(line.get_xdata()) == 1]
    points = {(line.get_xdata()[0], line.get_ydata()[0]) for line in dots}
    rows = [row for run in main for row in plot.checkpoints(run).values()]
    assert len(rows) == 8 * 6 and points == {(row["mean_pr"], row["val_loss"]) for row in rows}
    at_last = {(line.get_xdata()[0], line.get_ydata()[0]) for line in dots if line.get_markeredgecolor() == "black"}
    assert at_last == {(row["mean_pr"], row["val_loss"]) for _, row in plot.rows_at(main, last)} and len(at_last) == 8
    assert sum(len(line.get_xdata()) == 4 for line in ax.lines) == 6  # a line links equal token counts


def test_heatmap_is_the_mean_over_seeds_red_low_blue_high():
    main = synthetic.study(seeds=(1, 2, 3), diverged=["muon_qk"])[0]
    ax, bar = plot.pr_heatmap(main, plot.latest_common(main)).axes
    image = ax.images[0]
    for j, arm in enumerate(ARMS[:3]):
        ends = [r["rows"][-1] for r in main if r["config"]["arm"] == arm]
        assert np.allclose(image.get_array()[:, j], [np.mean([row[f"pr_layer_{i}"] for row in ends]) for i in range(6)])
    assert image.get_array()[:, 3].mask.all() and "diverged" in ax.get_xticklabels()[3].get_text()
    red, blue = image.cmap(image.norm(1.0)), image.cmap(image.norm(64.0))
    assert red[0] > red[2] + 0.3 and blue[2] > blue[0] + 0.3
    assert [t.get_text() for t in ax.get_yticklabels()] == list("123456")
    assert ax.get_ylim() == (5.5, -0.5)  # layer 1 on top


def test_spectra_are_normalised_means_over_heads_and_seeds(tmp_path):
    synthetic.make_study(tmp_path, scale="80m")
    main = load_runs(tmp_path)
    axes = plot.spectra(main, plot.latest_common(main)).axes
    assert [ax.get_title() for ax in axes] == ["layer 1 of 22", "layer 11 of 22", "layer 22 of 22"]
    assert len({ax.get_ylim() for ax in axes}) == 1
    files = [r["dir"] / f"sv_layer_10_step_{r['rows'][-1]['step']}.npy" for r in main if r["config"]["arm"] == "muon"]
    want = np.mean([np.load(f)[1] / np.load(f)[1, 0] for f in files], 0)  # synthetic heads differ in scale only
    [line] = lines_in(axes[1], "muon", 1.8)
    assert np.allclose(line.get_ydata(), want, rtol=1e-5)
    assert sum(line.get_color() == plot.GREY for line in axes[1].lines) == 2  # init, without and with QK-Norm


def test_sweep_has_a_star_on_the_chosen_lr_and_marks_the_unbracketed():
    _, sweep, picks = synthetic.study(diverged=SWEEP["adamw"][-1:], unbracketed=["muon"])
    axes = plot.lr_sweep(sweep, picks).axes
    for ax, arm in zip(axes, ARMS):
        [star] = lines_in_marker(ax, "*")
        runs = [r for r in sweep if r["config"]["arm"] == arm and r["status"] == "finished"]
        best = min(runs, key=lambda r: r["val_loss"])
        assert (star.get_xdata()[0], star.get_ydata()[0]) == (best["config"]["learning_rate"], best["val_loss"])
        assert ax.get_title().startswith(LABELS[arm] + ":") and ("not bracketed" in ax.get_title()) == (arm == "muon")
        assert ax.get_xscale() == "log" and star.get_color() == plot.STYLE[arm]["color"]
    lost = lines_in_marker(axes[0], "X")
    assert [line.get_xdata()[0] for line in lost] == grid("mini", "adamw")[-1:]
    assert lost[0].get_transform().transform((1, 1))[1] == axes[0].bbox.y1  # on the upper edge


def test_arms_differ_in_colour_and_in_grey_also_those_that_a_user_adds(monkeypatch):
    monkeypatch.setitem(LABELS, "soap", "SOAP")
    monkeypatch.setitem(LABELS, "lion", "Lion")
    style = runpy.run_path(str(ROOT / "plot.py"))["STYLE"]
    assert {arm: style[arm] for arm in plot.STYLE} == plot.STYLE  # whatever else there is
    for what in "color", "marker":
        assert len({style[arm][what] for arm in LABELS}) == len(LABELS) == 8


@pytest.mark.parametrize("tokens, text", [(1_966_080, "1.97M"), (299_991_040, "300M"), (163_840, "0.164M"),
                                          (20_480, "20.5k"), (1_966_080_000, "1.97B")])
def test_amount(tokens, text):
    assert plot.amount(tokens) == text


def test_sweep_shows_each_seed_their_mean_and_the_ties():
    lost = "adamw-lr0.002-seed3"
    _, sweep, picks = synthetic.study(sweep_seeds=(1, 2, 3), noise=dict(loss=0.1), diverged=[lost])
    assert any(pick["tie"] for pick in picks.values()) and not all(pick["tie"] for pick in picks.values())
    for ax, arm in zip(plot.lr_sweep(sweep, picks).axes, ARMS):
        mine = [(r["config"]["learning_rate"], r["val_loss"]) for r in sweep if r["config"]["arm"] == arm]
        losses = {lr: [y for x, y in mine if x == lr] for lr in grid("mini", arm)}
        whole = {lr: np.mean(v) for lr, v in losses.items() if np.isfinite(v).all()}
        [line] = lines_in(ax, arm, 1.6)
        assert np.allclose(line.get_xydata(), [*whole.items()]) and len(whole) == 5 - (arm == "adamw")
        [dots] = lines_in_marker(ax, ".")
        assert sorted(map(tuple, dots.get_xydata())) == sorted(x for x in mine if math.isfinite(x[1]))
        assert words(ax.get_title()).split(", ")[2:] == [f"tie with {lr:g}" for lr in picks[arm]["tie"]]
        assert [line.get_xdata()[0] for line in lines_in_marker(ax, "X")] == [0.002] * (arm == "adamw")


def test_rates_show_the_sweep_and_one_seed_at_the_main_budget():
    main, sweep, picks = synthetic.study(arms=FROZEN, sweep_seeds=(1, 2), seeds=(42, 137))
    near = synthetic.neighbours(main, 42, diverged=["muon-lr0.032"])
    axes = plot.rates(sweep, near, main, picks).axes
    for ax, runs, key in zip(axes, (sweep, near + main) * 2, ("val_loss", "val_loss", "mean_pr", "mean_pr")):
        for arm in [*FACTORIAL, *FROZEN]:
            mine = [r for r in runs if r["config"]["arm"] == arm and r["status"] == "finished"]
            mine = [r for r in mine if runs is sweep or r["config"]["seed"] == 42]  # the neighbours' seed
            points = sorted((r["config"]["learning_rate"], r["rows"][-1][key]) for r in mine)
            [line] = lines_in(ax, arm, 1.6)
            want = {lr: np.mean([y for x, y in points if x == lr]) for lr, _ in points}
            assert np.allclose(line.get_xydata(), [*want.items()])
            assert len(want) == (5 if runs is sweep else 2 if arm == "muon" else 3)
            [dots] = [d for d in lines_in_marker(ax, ".") if d.get_color() == plot.STYLE[arm]["color"]]
            assert sorted(map(tuple, dots.get_xydata())) == points
            [star] = [s for s in lines_in_marker(ax, "*") if s.get_color() == plot.STYLE[arm]["color"]]
            assert star.get_xdata()[0] == picks[arm]["lr"]
    assert [len(lines_in_marker(ax, "X")) for ax in axes] == [0, 1, 0, 1]
    assert axes[2].get_ylim() == axes[3].get_ylim() and axes[0].get_xlim() == axes[3].get_xlim()
    axes = plot.rates(sweep, [], main, picks).axes  # the stage was not run: the main runs of a seed stand alone
    assert len(axes) == 4 and len(lines_in(axes[1], "muon", 1.6)[0].get_xdata()) == 1
    assert "seed 42" in axes[1].get_title()
    assert len(plot.rates(sweep, [], [], {}).axes) == 2
    assert plot.rates([], [], [], {}) is None


def test_copies_damaged_and_foreign_folders_are_named_and_left_out(tmp_path, capsys, figures):
    d = tiny(tmp_path / "study", absent=(), beside={})
    run_plot(d, capsys)
    before = {name: drawn(fig) for name, fig in figures.items()}
    bad = ["muon-seed42.bak", "muon-seed7", "adamw-seed9", "sweep/muon-lr0.5", "neighbours/muon-lr0.5"]
    for folder in bad:
        shutil.copytree(d / "muon-seed42", d / folder)
    (d / "muon-seed7/config.json").write_text("")
    config = json.loads((d / "adamw-seed42/config.json").read_text())
    (d / "adamw-seed9/config.json").write_text(json.dumps(config | dict(seed=9)))
    (d / "adamw-seed9/log.jsonl").write_text("{\n{}\n")
    lines = run_plot(d, capsys)
    named = sorted(line.split(" is left out: ")[0] for line in lines if " is left out: " in line)
    assert named == sorted(str(d / folder) for folder in bad)
    for name, fig in figures.items():
        np.testing.assert_array_equal(before[name], drawn(fig), name)
    (d / "adamw-seed9/log.jsonl").write_text((d / "adamw-seed42/log.jsonl").read_text())
    (d / "adamw-seed9/config.json").write_text(json.dumps(config | dict(seed=9, n_layer=3)))  # another model
    with pytest.raises(SystemExit, match="adamw-seed9.* differ in layers"):
        run_plot(d, capsys)


def test_a_study_is_found_from_another_folder(tmp_path, monkeypatch, capsys):
    tiny(tmp_path / "out/mini")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(configurator, "ROOT", tmp_path)
    folders = []
    monkeypatch.setattr(plot, "save", lambda fig, folder, name: folders.append(folder))
    run_plot("out/mini", capsys)
    assert {*folders} == {tmp_path / "out/mini/figures"}


# ---- one run
def drawn(fig):
    """All numbers in a figure's lines."""
    return np.concatenate([np.asarray(line.get_ydata(), dtype=float) for ax in fig.findobj(Axes) for line in ax.lines])


def test_run_page_leaves_no_logged_key_out(tmp_path):
    d = synthetic.make_study(tmp_path, scale="ci", n_layer=1, seeds=(42,)) / "muon-seed42"
    for row in (run := load_run(d))["rows"]:  # a user's further metrics
        row.update(z_loss=2.0, per_layer_norm=3.0, k_norm_layer_0=1.0)
    keys = set().union(*(row.keys() for row in run["rows"])) - {"step", "tokens"}
    assert {"train_loss", "val_loss", "lr", "grad_norm", "tokens_per_s", "mean_pr", "pr_weight_layer_0"} < keys
    numbers = {key: 100 + i / 7 for i, key in enumerate(sorted(keys))}
    fig = plot.run_page(dict(run, rows=[*run["rows"][:-1], run["rows"][-1] | numbers]))
    assert all(np.isclose(drawn(fig), number, atol=1e-9, rtol=0).any() for number in numbers.values())
    assert {"z_loss", "k_norm, by layer"} <= {ax.get_title() for ax in fig.findobj(Axes)}


def test_run_page_shows_the_layers_and_the_spectra(tmp_path):
    d = synthetic.make_study(tmp_path, seeds=(42,)) / "muon-seed42"
    run = load_run(d)
    axes = {ax.get_title(): ax for ax in plot.run_page(run).findobj(Axes)}
    for key in "max_logit", "pr_centered", "pr_weight":
        layers = [line.get_ydata() for line in axes[f"{key}, by layer"].lines]
        assert np.allclose(layers, [[row[f"{key}_layer_{i}"] for row in run["rows"]] for i in range(6)])
    assert [len(axes[f"layer {i} of 6"].lines) for i in (1, 3, 6)] == [len(list(d.glob("sv_layer_0_*")))] * 3
    s = np.load(d / f"sv_layer_2_step_{run['rows'][-1]['step']}.npy")[0]
    assert np.allclose(axes["layer 3 of 6"].lines[-1].get_ydata(), s / s[0], rtol=1e-5)


def test_run_page_while_it_runs_and_when_it_explodes(tmp_path, capsys, figures):
    d = synthetic.make_study(tmp_path, seeds=(42,)) / "muon-seed42"
    log = (d / "log.jsonl").read_text().splitlines()
    first = json.loads(log[0])
    restart = dict(event="restart", reason="loss not finite", step=70, tokens=143_360, batch=70, restart_step=64)
    boom = dict(first, step=128, tokens=262_144, val_loss=1e9, train_loss=None, grad_norm=None, mean_pr=None,
                pr_layer_0=None, max_logit_layer_3=1e30)
    end = dict(event="diverged", step=130, tokens=266_240)
    for lines, says in (log[:1], "unfinished at 0 of"), (log[:2] + [log[2][:50]], "unfinished at"), (
            log[:3], "unfinished at"), ([*log[:3], *map(json.dumps, (restart, boom, end))],
                                        "diverged at 0.262M of 0.786M tokens"):
        (d / "log.jsonl").write_text("\n".join(lines) + "\n" * (len(lines) != 3 or lines == log[:3]))
        assert run_plot(d, capsys)[-1].startswith("run in ")
        assert says in text_of(figures["run"])
        FigureCanvasAgg(figures["run"]).draw()
    assert figures["run"].findobj(Axes)[0].get_ylim()[1] < 20  # 1e9 does not flatten the rest
    (d / "log.jsonl").write_text("")
    with pytest.raises(SystemExit, match="nothing to draw in"):
        plot.main([str(d)])


# ---- comparison
def test_comparison_of_studies_and_of_runs(tmp_path, monkeypatch, capsys):
    a = synthetic.make_study(tmp_path / "mini", spectra=False, absent=["muon_qk"])
    b = synthetic.make_study(tmp_path / "tweak", spectra=False, rng=1)
    saved = {}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plot, "save", lambda fig, folder, name: saved.update({f"{folder}/{name}": fig}))
    out = run_plot("mini", capsys, "tweak")
    assert out == ["compare_val_loss, compare_mean_pr in tweak/figures, as .png and .svg"]
    assert [*saved] == ["tweak/figures/compare_val_loss", "tweak/figures/compare_mean_pr"]
    text = text_of(saved["tweak/figures/compare_val_loss"])
    assert {"mini", "tweak"} <= {*text.split()}
    for d in a, b:
        assert f"Muon: {np.mean([r['val_loss'] for r in load_runs(d) if r['config']['arm'] == 'muon']):.3f}" in text
    assert text.count("Muon + QK-Norm: ") == 1
    for key in "mean_pr", "val_loss":
        lines = lines_in(saved[f"tweak/figures/compare_{key}"].axes[0], "muon", 2)
        for d, line in zip((a, b), lines, strict=True):
            rows = [r["rows"] for r in load_runs(d) if r["config"]["arm"] == "muon"]
            assert np.allclose(line.get_ydata(), np.mean([[row[key] for row in run] for run in rows], 0))
        assert lines[0].get_linestyle() != lines[1].get_linestyle()
    run_plot("mini/muon-seed42", capsys, "tweak/muon-seed42")
    assert "tweak/muon-seed42/compare_mean_pr" in saved
    for args, says in (["mini", "none"], "nothing to draw in mini or none"), (["mini", "mini", "mini"], "usage"):
        with pytest.raises(SystemExit, match=says):
            plot.main(args)


# ---- the generator that the tests of plot.py and report.py rest on
def test_synthetic_files_hold_what_the_memory_holds(tmp_path):
    kw = dict(unfinished=["muon-seed42"], diverged=SWEEP["adamw"][-1:], absent=["muon_qk-seed137"])
    main, sweep, picks = synthetic.study(**kw)
    synthetic.make_study(tmp_path, **kw)
    read = load_runs(tmp_path) + load_runs(tmp_path, "sweep")
    assert len(read) == 7 + 20 and chosen(tmp_path) == picks
    log = (tmp_path / "muon-seed137/log.jsonl").read_text().splitlines()
    assert [json.loads(line).get("event") for line in log[-3:]] == ["spot_check", None, "finished"]
    for a, b in zip(main + sweep, read, strict=True):
        assert all(a[key] == b[key] for key in ("rows", "events", "status", "val_loss"))
        assert {**a["config"], "out_dir": ""} == {**b["config"], "out_dir": ""} and b["dir"] == tmp_path / a["dir"]


def test_synthetic_studies_carry_their_truth_and_their_spectra(tmp_path):
    truth = {"muon": dict(loss=3.4, pr=40.0, pr_weight=30.0)}
    synthetic.make_study(tmp_path, arms=truth, noise=dict(loss=0.0, pr=0.0, pr_weight=0.0))
    for run in (r for r in load_runs(tmp_path) if r["config"]["arm"] == "muon"):
        row = run["rows"][-1]
        assert np.isclose(run["val_loss"], 3.4) and np.isclose(row["mean_pr"], 40.0)
        for i in range(6):
            s = np.load(run["dir"] / f"sv_layer_{i}_step_{row['step']}.npy").astype(float)
            w = np.load(run["dir"] / f"sv_weight_layer_{i}_step_{row['step']}.npy").astype(float)
            assert s.shape == (2, 64) and (np.diff(s) < 0).all()
            assert np.allclose(s.sum(-1) ** 2 / (s**2).sum(-1), row[f"pr_layer_{i}"], atol=1e-4)
            assert np.allclose((w**2).sum(-1) ** 2 / (w**4).sum(-1), row[f"pr_weight_layer_{i}"], atol=1e-4)
    main, _, _ = synthetic.study(seeds=range(100, 300), noise=dict(loss=0.02))
    assert 0.016 < np.std([r["val_loss"] for r in main if r["config"]["arm"] == "adamw"]) < 0.024
