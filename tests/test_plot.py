"""plot.py on synthetic studies: what the figures show is what the logs hold, on whole and on half-done studies."""
import json
import struct
import sys
import xml.etree.ElementTree as ET

import numpy as np
import pytest

import plot
import synthetic
from study import ARMS, LABELS, SCALES, chosen, load_runs

FIGURES = ["1_val_loss", "2_mean_pr", "3_loss_vs_pr", "4_pr_heatmap", "5_spectra", "6_lr_sweep"]
SWEEP = {arm: [f"{arm}-lr{lr:g}" for lr in grid] for arm, grid in SCALES["mini"]["grids"].items()}  # names of runs


def run_plot(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["plot.py", str(folder)])
    monkeypatch.setattr(plot, "SEEDS", [42, 137])
    plot.main()
    return capsys.readouterr().out.splitlines()


def svg_text(folder, name):
    texts = [e for e in ET.parse(folder / "figures" / f"{name}.svg").iter() if e.tag.endswith("text")]
    return " ".join(text for e in texts for text in e.itertext())


def lines_in(ax, arm, width):
    return [line for line in ax.lines if line.get_color() == plot.STYLE[arm]["color"] and line.get_linewidth() == width]


@pytest.mark.parametrize("scale, n_layer, seeds", [
    ("mini", 6, (42, 137)), ("80m", 22, (42, 137, 7)), ("mini", 1, (42,))])
def test_whole_study(tmp_path, monkeypatch, capsys, scale, n_layer, seeds):
    synthetic.make_study(tmp_path, scale=scale, n_layer=n_layer, seeds=seeds)
    (tmp_path / "preregistered.json").write_text(json.dumps(dict(seeds=seeds)))
    lines = run_plot(tmp_path, monkeypatch, capsys)
    assert not [line for line in lines if line.startswith(("missing", "diverged"))]
    made = sorted(p.name for p in (tmp_path / "figures").iterdir())
    assert made == sorted(f"{name}.{kind}" for name in FIGURES for kind in ("png", "svg"))
    for name in FIGURES:
        png = (tmp_path / "figures" / f"{name}.png").read_bytes()
        assert png[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">I", png[16:20])[0] == 1050
        assert all(LABELS[arm] in svg_text(tmp_path, name) for arm in ARMS)
    assert f"layer {n_layer} of {n_layer}" in svg_text(tmp_path, "5_spectra")
    before = {p.name: p.read_bytes() for p in (tmp_path / "figures").iterdir()}
    run_plot(tmp_path, monkeypatch, capsys)
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "figures").iterdir()}


def test_half_done_study_draws_what_there_is_and_names_the_rest(tmp_path, monkeypatch, capsys):
    lost, running, absent = SWEEP["adamw"][-1], SWEEP["muon"][-2], SWEEP["muon_qk"][0]
    synthetic.make_study(tmp_path, diverged=["adamw-seed137", lost], unfinished=["muon", running],
                         absent=["muon_qk", "adamw_qk-seed137", absent])
    lines = run_plot(tmp_path, monkeypatch, capsys)
    named = {line.split(": ")[1] for line in lines if line.startswith("missing")}
    assert {"muon-seed42", "muon-seed137", "muon_qk-seed42", "muon_qk-seed137", "adamw_qk-seed137", running, absent,
            "muon"} == named
    assert {line.split(": ")[1] for line in lines if line.startswith("diverged")} == {"adamw-seed137", lost}
    assert "seed 137 diverged" in svg_text(tmp_path, "1_val_loss")
    sweep = svg_text(tmp_path, "6_lr_sweep")
    assert "diverged" in sweep and "Muon: none chosen yet" in sweep
    half = load_runs(tmp_path)[0]["config"]["max_tokens"] // 2  # the last checkpoint that every arm with one has
    assert f"at {plot.millions(half)} tokens" in svg_text(tmp_path, "4_pr_heatmap")
    assert all((tmp_path / "figures" / f"{name}.png").exists() for name in FIGURES)


def test_sweep_alone_and_no_stale_figure(tmp_path, monkeypatch, capsys):
    synthetic.make_study(tmp_path, absent=ARMS)
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "1_val_loss.png").write_text("of an earlier study")
    lines = run_plot(tmp_path, monkeypatch, capsys)
    assert sorted(p.name for p in (tmp_path / "figures").iterdir()) == ["6_lr_sweep.png", "6_lr_sweep.svg"]
    assert sum(line.startswith("missing") for line in lines) == 5 + len(ARMS) * 2


@pytest.mark.parametrize("make, says", [
    (lambda d: None, "holds no run"),
    (lambda d: synthetic.make_study(d, absent=ARMS, unfinished=sum(SWEEP.values(), [])), "nothing to draw"),
    (lambda d: (synthetic.make_study(d) / "adamw-seed42/log.jsonl").write_text("{\n{}\n"), "not JSON")])
def test_nothing_to_draw_is_one_line(tmp_path, monkeypatch, capsys, make, says):
    make(tmp_path / "study")
    with pytest.raises(SystemExit) as e:
        run_plot(tmp_path / "study", monkeypatch, capsys)
    assert e.value.code.startswith("error: ") and says in e.value.code and "\n" not in e.value.code


def test_missing_and_broken_spectra_are_named(tmp_path, monkeypatch, capsys):
    synthetic.make_study(tmp_path)
    gone, broken = "sv_layer_0_step_0.npy", f"sv_layer_5_step_{load_runs(tmp_path)[0]['rows'][-1]['step']}.npy"
    (tmp_path / "muon-seed42" / gone).unlink()
    (tmp_path / "muon-seed137" / broken).write_bytes(b"\x93NUMPY")
    lines = run_plot(tmp_path, monkeypatch, capsys)
    assert [line.split()[2] for line in lines if line.startswith("missing")] == [gone, broken]
    assert (tmp_path / "figures/5_spectra.png").exists()


def test_curves_are_means_over_seeds_and_show_each_seed():
    main = synthetic.study(seeds=(42, 137, 7), diverged=["muon-seed7"])[0]
    whole, tail = plot.val_loss(main).axes
    for arm in ARMS:
        rows = [r["rows"] for r in main if r["config"]["arm"] == arm and r["status"] == "finished"]
        [mean] = lines_in(whole, arm, 2)
        assert len(lines_in(whole, arm, 0.7)) == 3
        assert np.allclose(mean.get_xdata(), [row["tokens"] / 1e6 for row in rows[0]])
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
    assert "seed 42 diverged" in [t.get_text() for t in fig.axes[0].texts]


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
    every, final = plot.loss_vs_pr(main, 64, plot.latest_common(main)).axes
    points = {(line.get_xdata()[0], line.get_ydata()[0]) for line in every.lines if len(line.get_xdata()) == 1}
    rows = [row for run in main for row in plot.checkpoints(run).values()]
    assert len(rows) == 8 * 6 and points == {(row["mean_pr"], row["val_loss"]) for row in rows}
    assert sum(len(line.get_xdata()) == 1 for line in final.lines) == 8
    assert sum(len(line.get_xdata()) == 4 for line in every.lines) == 6  # a line links equal token counts


def test_heatmap_is_the_mean_over_seeds_red_low_blue_high():
    main = synthetic.study(seeds=(1, 2, 3), diverged=["muon_qk"])[0]
    ax, bar = plot.pr_heatmap(main, 64, plot.latest_common(main)).axes
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
        [star] = [line for line in ax.lines if line.get_marker() == "*"]
        runs = [r for r in sweep if r["config"]["arm"] == arm and r["status"] == "finished"]
        best = min(runs, key=lambda r: r["val_loss"])
        assert (star.get_xdata()[0], star.get_ydata()[0]) == (best["config"]["learning_rate"], best["val_loss"])
        assert ax.get_title().startswith(LABELS[arm] + ":") and ("not bracketed" in ax.get_title()) == (arm == "muon")
        assert ax.get_xscale() == "log" and star.get_color() == plot.STYLE[arm]["color"]
    lost = [line for line in axes[0].lines if line.get_marker() == "X"]
    assert [line.get_xdata()[0] for line in lost] == SCALES["mini"]["grids"]["adamw"][-1:]
    assert lost[0].get_ydata()[0] > max(r["val_loss"] for r in sweep if r["status"] == "finished")


def test_arms_differ_in_colour_and_in_grey():
    for what in "color", "marker":
        assert len({style[what] for style in plot.STYLE.values()}) == len(ARMS)


@pytest.mark.parametrize("tokens, text", [(1_966_080, "1.97M"), (299_991_040, "300M"), (163_840, "0.164M")])
def test_millions(tokens, text):
    assert plot.millions(tokens) == text


@pytest.mark.parametrize("lr, text", [(1e-4, "1e-4"), (1.2e-3, "1.2e-3"), (0.064, "6.4e-2"), (1.0, "1e0")])
def test_short(lr, text):
    assert plot.short(lr) == text


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
    ends = [synthetic.study(rng=k, noise=dict(loss=0.02))[0][0]["val_loss"] for k in range(200)]
    assert 0.016 < np.std(ends) < 0.024
