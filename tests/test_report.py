"""report.py, post/text.py and post/review.py on synthetic studies whose truth is known."""
import itertools
import json
import math
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import scipy.stats

import report
import study
import synthetic
from configurator import ROOT
from post import review, stats
from post import text as post

A, AQ, M, MQ = study.FACTORIAL
FLAT = {a: dict(loss=3.5, pr=40.0) for a in study.FACTORIAL}
STUDIES = {  # outcome: arms that lead to it
    "A": {**FLAT, M: dict(loss=3.3, pr=55.0, max_logit=14.0)},
    "B": {**FLAT, M: dict(loss=3.6, pr=55.0)},
    "C": {**FLAT, AQ: dict(loss=3.3, pr=20.0)},
    "none": {**FLAT, M: dict(loss=3.3, pr=45.0), MQ: dict(loss=3.2, pr=55.0)}}


def make(folder, evaluated=True, figures=True, **kw):
    """A whole study on disk, small: two layers, stand-ins for results.json and the figures."""
    kw.setdefault("n_layer", 2)
    kw.setdefault("noise", dict(loss=0.002, pr=0.2, pr_centered=0.2, pr_weight=0.2))
    d = synthetic.make_study(folder, spectra=False, **kw)
    runs = {r["dir"].name: dict(val_loss=r["val_loss"], val_ppl=math.exp(r["val_loss"]),
                                val_loss_stderr_bootstrap=0.0061,
                                hellaswag=dict(acc=0.26, acc_stderr=0.0044, acc_norm=0.2656, acc_norm_stderr=0.0044),
                                lambada=dict(not_available="no rows"))
            for r in study.load_runs(d) if r["status"] == "finished"}
    if evaluated:
        (d / "results.json").write_text(json.dumps(dict(runs=runs)))
    if figures:
        (d / "figures").mkdir()
        for name in post.FIGURES:
            (d / f"figures/{name}.png").write_bytes(b"\x89PNG")
    return d


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A whole mini study with its report, never changed by a test."""
    d = make(tmp_path_factory.mktemp("whole") / "mini", arms=STUDIES["none"])
    report.report(d)
    return d


def edited(whole, tmp_path, edit):
    """A copy of the whole study whose post went through edit(text)."""
    d = tmp_path / "mini"
    shutil.copytree(whole, d)
    path = d / "report.md"
    text = path.read_text()
    assert edit(text) != text, "the edit has to change something"
    path.write_text(edit(text))
    return path


# ---- verdicts ----

@pytest.mark.parametrize("outcome", STUDIES)
def test_each_scenario_is_reached_by_a_study_built_for_it(outcome, tmp_path):
    S = report.load(make(tmp_path / "mini", arms=STUDIES[outcome]))
    assert S["verdict"][0] == outcome and f"**Verdict: {outcome}**" in post.build(S)
    met = {s: all(ok for t, _, ok, _ in S["verdict"][1] if t == s) for s in "ABCD"}
    assert [s for s in "ABCD" if met[s]] == ([outcome] if outcome != "none" else [])


def test_noise_is_scenario_d(tmp_path):
    S = report.load(make(tmp_path / "mini", arms=FLAT, noise=dict(loss=0.1, pr=4)))
    assert S["verdict"][0] == "D" and S["title"].startswith("Not to be posted")


def test_no_difference_that_is_well_measured_is_none_not_noise(tmp_path):
    S = report.load(make(tmp_path / "mini", arms=FLAT, rng=3))
    assert S["verdict"][0] == "none" and "No main effect" in S["title"]


def test_a_lead_under_the_margin_is_a_tie(tmp_path):
    arms = {**FLAT, M: dict(loss=3.495, pr=55.0)}  # 0.005 nats ahead, and measured to much less than that
    S = report.load(make(tmp_path / "mini", arms=arms, noise=dict(loss=1e-4, pr=0.2), seeds=(42, 137, 7)))
    assert S["verdict"][2]["loss", "best"]["claimed"] and S["verdict"][0] == "B"


@pytest.mark.parametrize("muon, adamw, borne_out", [(14.0, 30.0, True), (35.0, 30.0, False), (150.0, 200.0, False)])
def test_scenario_a_speaks_of_logits_only_where_they_bear_it_out(muon, adamw, borne_out, tmp_path):
    arms = {**STUDIES["A"], A: dict(FLAT[A], max_logit=adamw), M: dict(STUDIES["A"][M], max_logit=muon)}
    S = report.load(make(tmp_path / "mini", arms=arms))
    assert S["verdict"][0] == "A" and ("logit control" in S["title"]) == borne_out


def test_scenario_a_without_logits_does_not_speak_of_them(tmp_path):
    S = report.load(make(tmp_path / "mini", arms=STUDIES["A"]))
    for run in S["runs"]:
        run["rows"] = [{k: v for k, v in row.items() if not k.startswith("max_logit")} for row in run["rows"]]
    S["y"] = report.measure(S["cell"], S["seeds"], S["arms"])
    assert S["verdict"][0] == "A" and "logit" not in post.title(S)


def test_a_pr_claim_has_to_hold_under_every_definition(tmp_path):
    arms = {a: dict(v, pr_weight=95 - v["pr"]) for a, v in STUDIES["A"].items()}  # the other way round in the weights
    S = report.load(make(tmp_path / "mini", arms=arms))
    e = S["verdict"][2]
    assert S["verdict"][0] == "none" and stats.decision(e["pr", "optimizer"]) == "depends on the definition"
    assert stats.decision(e["pr", "best"]) == "depends on the definition" and stats.decision(e["loss",
                                                                                               "best"]) == "resolved"
    text = post.build(S)
    assert "mean PR" not in S["title"] and "depends on the definition" in text and "not the same under all four" in text


def test_a_crossed_main_effect_makes_no_headline(tmp_path):
    arms = {A: dict(loss=3.5, pr=25.0), AQ: dict(loss=3.5, pr=15.0), M: dict(loss=3.5, pr=42.0),
            MQ: dict(loss=3.5, pr=50.0)}
    S = report.load(make(tmp_path / "mini", arms=arms, noise={k: 0.02 for k in synthetic.NOISE} | dict(loss=2e-4)))
    assert S["verdict"][2]["pr", "qk_norm"]["holds"] and "QK-Norm lowers" not in S["title"]
    assert "QK-Norm's effect on mean PR is higher under Muon" in S["title"]


def test_one_seed_gives_no_verdict_and_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "SEEDS", [42])
    S = report.load(make(tmp_path / "mini", arms=STUDIES["A"], seeds=(42,)))
    text = post.build(S)
    assert S["missing"] == [] and "no verdict" in S["title"]
    assert "**Verdict: no verdict**" in text and "one seed has no spread" in text


def test_seeds_that_agree_to_the_last_digit_give_no_verdict(tmp_path):
    S = report.load(make(tmp_path / "mini", arms=STUDIES["A"], noise={k: 0.0 for k in synthetic.NOISE}))
    S["y"]["loss"] = {a: v[:1].repeat(2) for a, v in S["y"]["loss"].items()}
    assert stats.verdict(S["y"])[0] == "no verdict"


@pytest.mark.parametrize("kw, missing", [
    (dict(absent=["muon-seed137"]), "main run muon-seed137: not started"),
    (dict(unfinished=["adamw_qk-seed42"]), "main run adamw_qk-seed42: unfinished"),
    (dict(absent=["adamw-lr0.001"]), "sweep run adamw-lr0.001: not started"),
    (dict(unfinished=["muon-lr0.008"]), "muon: no learning rate chosen"),
    (dict(absent=study.FACTORIAL), "main run adamw-seed42: not started"),
    (dict(evaluated=False), "evaluation of muon-seed42")])
def test_an_incomplete_study_names_what_is_missing_and_has_no_verdict(kw, missing, tmp_path):
    d = make(tmp_path / "mini", arms=STUDIES["A"], **kw)
    report.report(d)
    text = (d / "report.md").read_text()
    assert missing in text.split("## 1.")[0] and "**Verdict: no verdict**" in text and "nan" not in text


def test_an_arm_that_diverges_in_one_seed_is_inconsistent_and_in_all_a_result(tmp_path):
    S = report.load(make(tmp_path / "a" / "mini", arms=STUDIES["A"], diverged=["adamw-seed42"]))
    assert S["missing"] == [] and S["verdict"][0] == "D"
    S = report.load(make(tmp_path / "b" / "mini", arms=STUDIES["A"], diverged=["adamw"]))
    text = post.build(S)
    assert S["verdict"][0] == "none" and S["title"].startswith("AdamW diverged")
    assert "diverged in 2 of 2" in text and "nan" not in text and "no contrast with it is finite" in text


# ---- arms by name ----

FROZEN = dict(adamw_qk_frozen=dict(loss=3.57, pr=29.0), muon_qk_frozen=dict(loss=3.505, pr=39.0))


@pytest.fixture(scope="module")
def six(tmp_path_factory):
    """A study with six arms, three seeds, three sweep seeds and neighbours, and its report; never changed by
    a test."""
    d = make(tmp_path_factory.mktemp("six") / "mini", arms=STUDIES["none"] | FROZEN, seeds=(42, 137, 7),
             sweep_seeds=(1, 2, 3), beside={},
             noise=dict(loss=dict(adamw=0.004, adamw_qk=0.02, muon=0.001, muon_qk=0.002),
                        pr=dict(adamw=0.1, adamw_qk=0.9, muon=0.4, muon_qk=0.2)))
    report.report(d)
    return d


def rows_of(text, heading):
    """{first cell: other cells} of the first table below a heading or other text."""
    found = re.search(r"(?:^\|.*\n)+", text[text.index(heading):], re.M)[0]
    cells = [[c.strip() for c in line.strip("|\n").split("|")] for line in found.strip().split("\n")]
    return {c[0]: c[1:] for c in cells[2:]}


def values(d, arm, name):
    """Final values of an arm's main runs, read from the logs without the report's code."""
    runs = sorted((r for r in study.load_runs(d) if r["config"]["arm"] == arm),
                  key=lambda r: (42, 137, 7).index(r["config"]["seed"]))
    last = [r["rows"][-1] for r in runs]
    layers = lambda row: [v for k, v in row.items() if re.fullmatch(rf"{name}_layer_\d+", k)]
    return np.array([row["val_loss"] if name == "loss" else np.mean(layers(row)) for row in last])


def test_further_arms_are_tabled_and_change_no_verdict(six):
    text, S = (six / "report.md").read_text(), report.load(six)
    for heading in ("configs and why", "## 3.", "side by side", "## 6.",
                    "| Config | Best LR", "### Mechanism"):
        names = rows_of(text, heading)
        assert {study.LABELS[a] for a in [*study.FACTORIAL, *FROZEN]} <= names.keys(), heading
    assert "| Muon | no |" in text and "| Muon | yes, gains frozen at one |" in text and "### The 6 configs" in text
    assert "18 runs" in text and "about 6 points" in text
    y = report.measure(S["cell"], S["seeds"], study.FACTORIAL)
    assert stats.verdict(y, {}, head_dim=64)[:2] == S["verdict"][:2]
    decided = text.split("### What the contrasts")[1].split("### Mechanism")[0]
    assert not any("frozen" in part for part in (S["title"], post.tldr(S), decided))


def test_a_further_arm_that_lacks_runs_takes_no_verdict_away(six, tmp_path):
    d = tmp_path / "mini"
    shutil.copytree(six, d)
    shutil.rmtree(d / "muon_qk_frozen-seed7")
    S = report.load(d)
    fixed = report.registration("mini", [*study.FACTORIAL, *FROZEN], [42, 137, 7], [1, 2, 3])
    (d / "preregistered.json").write_text(json.dumps(fixed | dict(written="then", main_runs_begun=[])))
    assert S["verdict"][0] != "no verdict" and "main run muon_qk_frozen-seed7: not started" in S["absent"]
    shutil.rmtree(d / "muon_qk-seed7")
    assert report.load(d)["verdict"][0] == "no verdict"


def test_each_arm_has_its_own_spread_and_the_study_says_what_it_can_resolve(six):
    text = (six / "report.md").read_text()
    means, power = rows_of(text, "## 3."), rows_of(text, "### What 3 seeds")
    for a in [*study.FACTORIAL, *FROZEN]:
        v = values(six, a, "loss")
        assert means[study.LABELS[a]][-1] == f"{v.mean():.4f} ± {v.std(ddof=1):.4f}"
    s2 = [np.var(values(six, a, "loss"), ddof=1) for a in study.FACTORIAL]
    se, dof = math.sqrt(sum(s2) / 12), sum(s2)**2 / sum(v * v / 2 for v in s2)
    half = scipy.stats.t.ppf(0.975, dof) * se
    assert power["Muon minus AdamW"][0] == f"± {half:.4f}" and int(power["Muon minus AdamW"][2]) >= 2
    assert f"± {half:.4f}" in rows_of(text, "| Contrast, nats")["Muon minus AdamW"][0]


def test_arms_that_differ_in_one_thing_are_compared_under_every_definition(six, whole):
    heading = "### Arms that differ in one thing"
    table, four = (rows_of((d / "report.md").read_text(), heading) for d in (six, whole))
    assert len(table) == 9 and len(four) == 4  # 3 of QK-Norm x 2 + 3 of the optimizer; 2 + 2
    for a, b in ("adamw", "muon"), ("muon", "muon_qk"), (AQ, "adamw_qk_frozen"), (MQ, "muon_qk_frozen"):
        cells = table[f"{study.LABELS[b]} minus {study.LABELS[a]}"]
        for cell, name in zip(cells, ("loss", *post.PR_DEFINITIONS), strict=True):
            y, x = values(six, b, name), values(six, a, name)
            low, high = scipy.stats.ttest_ind(y, x, equal_var=False).confidence_interval()
            digits = 4 if name == "loss" else 2
            assert cell == f"{y.mean() - x.mean():+.{digits}f} ± {(high - low) / 2:.{digits}f}"


def test_of_the_head_dim_that_the_runs_have(tmp_path):
    d = make(tmp_path / "mini", arms=STUDIES["A"])
    for path in d.glob("**/config.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | dict(n_head=4)))
    text = post.build(report.load(d))
    assert "of 32" in text and "of 64" not in text and "Head dim: 32" in text


def test_why_a_further_arm_is_there_is_its_config_file_s_first_line(six):
    first = (ROOT / "config/muon_qk_frozen.py").read_text().split("\n")[0]
    table = rows_of((six / "report.md").read_text(), "configs and why")
    assert table["Muon + QK-Norm, frozen"][2] == first[2:].rstrip(".") and table["AdamW"][2] == "the baseline"


def test_the_number_behind_figure_3(six):
    pr, loss = (np.array([values(six, a, name) for a in [*study.FACTORIAL, *FROZEN]]) for name in ("pr", "loss"))
    over_runs, over_arms = np.corrcoef(pr.ravel(), loss.ravel())[0, 1], np.corrcoef(pr.mean(1), loss.mean(1))[0, 1]
    assert f"is {over_runs:+.2f} over 18 runs and {over_arms:+.2f} over the means" in (six / "report.md").read_text()


def test_only_a_smaller_scale_is_told_what_it_cannot_show():
    plan = dict(post.PLAN, scale="80m")
    assert post.scale_note(plan) == ""
    assert post.scale_note(dict(plan, scale="1b", num_params=10**9)) == ""
    short = post.scale_note(dict(plan, max_tokens=10**8))
    assert "cannot show what happens" in short and "HellaSwag" not in short
    assert "HellaSwag" in post.scale_note(dict(plan, num_params=10**6))


# ---- neighbouring learning rates ----

def test_rate_states_are_those_of_all_81_choices():
    rng, seen = np.random.default_rng(0), set()
    for _ in range(60):
        y = {m: {a: rng.normal(3 if a in (A, AQ) else 0, 0.2, 3) for a in study.FACTORIAL}
             for m in ("loss", "pr", "pr_centered", "pr_weight")}
        near = {a: {m: y[m][a].mean() + rng.normal(0, 1.5, 3) for m in ("loss", "pr")} for a in study.FACTORIAL}
        e = stats.analyse(y)
        for (m, name), (state, low, high) in post.rate_states(near, e).items():
            choices = [dict(zip(study.FACTORIAL, c)) for c in itertools.product(*(near[a][m] for a in study.FACTORIAL))]
            if name == "best":
                sign = 1 if m == "pr" else -1
                holds = all(max(v, key=lambda a: sign * v[a]) == e[m, name]["arm"] for v in choices)
            else:
                effects = [sum(w * v[a] for a, w in stats.CONTRASTS[name].items()) for v in choices]
                holds = all(x * e[m, name]["effect"] > 0 for x in effects)
                assert (low, high) == pytest.approx((min(effects), max(effects)))
            assert state == (post.HOLDS if holds else post.DEPENDS)
            seen.add((name, state))
    assert len(seen) == 8
    assert {s for s, *_ in post.rate_states({}, e).values()} == {post.NOT_RUN}


@pytest.mark.parametrize("outcome, beside, said", [
    ("none", None, ["were not run", "not run at neighbouring rates"]),
    ("none", dict(change={}), ["Muon lowers val loss", "holds at neighbouring rates, -"]),
    ("none", dict(change={A: (-0.5, 0.02)}), ["dependent on the learning rate: optimizer on val "
                                              "loss", "depends on the rate, -",
                                              "ended lower, in one seed: AdamW."]),
    ("A", None, ["Muon provides implicit", "(neighbouring learning rates were not run)"]),
    ("A", dict(change={MQ: (-0.4, 0.02)}), ["# Scenario A at the chosen learning rates, but not at half and "
                                            "twice these",
                                            "scenario A of the plan, at the chosen learning rates but not "
                                            "beside them"]),
    ("C", dict(diverged=["adamw-lr0.004"]), ["# Scenario C at the chosen learning rates, but",
                                             "depends on the rate |"])])
def test_a_headline_is_made_of_what_holds_at_neighbouring_rates(outcome, beside, said, tmp_path):
    S = report.load(make(tmp_path / "mini", arms=STUDIES[outcome], beside=beside, seeds=(42, 137, 7)))
    text = post.build(S)
    assert S["verdict"][0] == outcome and [words for words in said if words not in text] == []
    assert ("not run" in S["title"]) == (beside is None) and "nan" not in text and "-inf" not in text
    if beside and A in beside.get("change", {}):
        assert "Muon lowers val loss" not in S["title"]
    assert len(re.findall(r"[.](?:\s|$)", post.tldr(S))) <= 3


def test_a_half_done_neighbours_stage_is_named_and_carries_nothing(tmp_path):
    d = make(tmp_path / "mini", arms=STUDIES["none"], beside={})
    shutil.rmtree(d / "neighbours/muon-lr0.032")
    S = report.load(d)
    assert "neighbours run muon-lr0.032" in S["absent"] and S["verdict"][0] == "none" and "not run" in S["title"]
    assert "not run at neighbouring rates" in post.build(S) and "holds at neighbouring" not in post.build(S)


def test_ties_and_sweep_seeds_are_told(whole, tmp_path):
    d = make(tmp_path / "mini", sweep_seeds=(1, 2, 3), noise=dict(loss=dict(adamw=0.2)))
    text, picks = post.build(report.load(d)), study.chosen(d)
    assert "with seeds 1, 2, 3. The lowest" in text
    tied = "; ".join(study.LABELS[a] for a, p in picks.items() if p["tie"])
    assert tied and f"so that chance had a part in the choice: {tied}." in text
    assert "with seed 1. The lowest" in (whole / "report.md").read_text()


# ---- what else a folder may hold ----

def test_what_changed_since_the_registration_is_said(tmp_path):
    d = make(tmp_path / "out/mini", arms=STUDIES["A"])
    old = report.registration("mini", study.FACTORIAL, [42, 137], [1]) | dict(
        statistics="pooled", sweep_tokens=1, written="2025-01-01", main_runs_begun=[])
    old["sha256"] |= {"post/stats.py": "0" * 64}
    (d / "preregistered.json").write_text(json.dumps(old))
    report.report(d)
    text = (d / "report.md").read_text()
    assert "Since then changed: sweep tokens, statistics." in text and "**Verdict: A**" in text
    assert "Not the registered file, to the byte: `post/stats.py`." in text
    assert "Arms that were not registered" not in text
    assert review.check(d / "report.md", report.load(d)) == 0


def test_a_study_under_another_name_is_that_of_its_runs(whole, tmp_path):
    d = tmp_path / "docs/results/first"
    shutil.copytree(whole, d)
    (d / "report.md").unlink()
    report.report(d)
    assert (d / "report.md").read_text() == (whole / "report.md").read_text()


def test_a_study_of_a_scale_that_is_no_more_ends_in_one_line(tmp_path):
    d = make(tmp_path / "9b", arms=STUDIES["A"])
    for path in d.glob("**/config.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | dict(scale="9b")))
    with pytest.raises(ValueError, match="scale 9b, which study.py does not know"):
        report.load(d)


@pytest.mark.parametrize("spoil, words", [
    (lambda d: shutil.copytree(d / "muon-seed42", d / "muon-seed42.bak"), "muon-seed42.bak is left out"),
    (lambda d: (d / "adamw-seed7").mkdir() or (d / "adamw-seed7/config.json").write_text(""),
     "adamw-seed7 is left out"),
    (lambda d: (d / "x-seed7").mkdir() or (d / "x-seed7/config.json").write_text("[1]"), "x-seed7 is left "
                                                                                         "out")])
def test_one_bad_folder_is_named_and_does_not_block_the_rest(whole, tmp_path, capsys, spoil, words):
    d = tmp_path / "mini"
    shutil.copytree(whole, d)
    spoil(d)
    report.report(d)
    assert f"{d}/{words}" in capsys.readouterr().out and "**Verdict: none**" in (d / "report.md").read_text()
    assert report.load(d)["y"]["loss"][M].tolist() == report.load(whole)["y"]["loss"][M].tolist()


@pytest.mark.parametrize("name, content", [
    *itertools.product(["chosen_lr.json", "preregistered.json", "results.json"], ["", "[]"]),
    ("chosen_lr.json", '{"muon": 4}')])
def test_a_foreign_file_is_named_in_one_line(name, content, whole, tmp_path):
    d = tmp_path / "mini"
    shutil.copytree(whole, d)
    (d / name).write_text(content)
    message = fail(d)
    assert message.startswith("error: ") and name in message and "\n" not in message


# ---- the post ----

SECTIONS = ["TLDR", "Experimental Setup", "Results: Loss", "Results: Representation Quality",
            "The Relationship Between Loss and PR",
            "Downstream Evaluation", "Discussion", "Limitations", "Recommendations"]


def test_the_nine_sections_in_order_with_their_figures(whole):
    text = (whole / "report.md").read_text()
    assert re.findall(r"^## \d\. (.*)", text, re.M) == SECTIONS
    for part, numbers in (2, [6]), (3, [1]), (4, [2, 4, 5, 7]), (5, [3]):
        body = text.split(f"\n## {part}. ")[1].split("\n## ")[0]
        assert sorted(re.findall(r"\]\(figures/(\d)_", body)) == sorted(map(str, numbers))
    tldr = text.split("## 1. TLDR")[1].split("**Verdict")[0]
    assert 1 <= len(re.findall(r"\.(?:\s|$)", tldr.strip())) <= 3
    assert "| Config | Seed | Val PPL | HellaSwag | LAMBADA |" in text
    assert "| Config | Best LR | Val Loss | Mean PR | HellaSwag | LAMBADA |" in text
    assert "Gemma 3" in text and "Gemma 2" not in text and "proves" not in text


def test_every_cell_is_filled_or_marked(whole):
    rows = [line for line in (whole / "report.md").read_text().split("\n") if line.startswith("| ")]
    assert len(rows) > 50
    for line in rows:
        cells = [c.strip() for c in line.strip("|").split("|")]
        assert all(cells) and not {"nan", "inf", "None"} & set(cells), line


def test_every_table_names_its_source(whole):
    text = (whole / "report.md").read_text()
    for match in re.finditer(r"(?:^\|.*\n)+", text, re.M):
        assert text[match.end():].startswith("\n*Source: "), match[0]


def test_tables_are_the_logs(whole):
    text, runs = (whole / "report.md").read_text(), study.load_runs(whole)
    losses = [r["val_loss"] for r in runs if r["config"]["arm"] == M]
    assert f"{np.mean(losses):.4f} ± {abs(losses[0] - losses[1]) / 2:.4f}" in text
    assert f"| Muon | 137 | {math.exp(losses[1]):.2f} | 26.6 ± 0.4 % | not available |" in text
    assert "- Not available: lambada: no rows" in text
    loss = {a: np.mean([r["val_loss"] for r in runs if r["config"]["arm"] == a]) for a in study.FACTORIAL}
    assert f"| Muon minus AdamW | {(loss[M] + loss[MQ] - loss[A] - loss[AQ]) / 2:+.4f} ±" in text


def test_three_seeds_reach_every_table(tmp_path):
    d = make(tmp_path / "mini", arms=STUDIES["A"], seeds=(42, 137, 7))
    S = report.load(d)
    text = post.build(S)
    assert "| Config | Seed 42 | Seed 137 | Seed 7 | Mean |" in text
    v = np.array([r["val_loss"] for r in study.load_runs(d) if r["config"]["arm"] == M])
    assert f"{v.mean():.4f} ± {v.std(ddof=1):.4f}" in text
    assert "standard deviation over 3 seeds" in text and "2 degrees of freedom" in text


def test_small_scales_say_first_what_they_cannot_show_and_80m_checks_its_ranges(whole, tmp_path):
    first = (whole / "report.md").read_text().split("## 1.")[0]
    assert "It cannot show" in first and "926,336 parameters" in first
    text = post.build(report.load(make(tmp_path / "80m", arms={**FLAT, M: dict(loss=3.47), MQ: dict(loss=3.49)},
                                       scale="80m", n_layer=22)))
    assert "It cannot show" not in text
    assert "| Val loss, mean of the Muon arms | 3.4" in text and "25 to 27.5 | yes" in text
    assert "| AdamW above Muon | 0.02" in text and "**no**" in text  # 3.5 - 3.48 is outside 0.03 to 0.10


def test_learning_rates_say_where_they_are_not_bracketed(tmp_path):
    S = report.load(make(tmp_path / "mini", unbracketed=["muon"]))
    text = post.build(S)
    assert "Not bracketed, so perhaps not at its best learning rate: Muon." in text


def test_main_runs_that_differ_in_more_than_the_design_are_named(tmp_path):
    d = make(tmp_path / "mini")
    path = d / "muon-seed42/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(weight_decay=0.2)))
    assert "learning rate and seed, and in weight_decay." in post.build(report.load(d))


def test_what_is_not_finite_is_shown_as_such(tmp_path):
    """A look at broken weights logs null: such a run diverges, and its rows and spot checks stay readable."""
    d = make(tmp_path / "mini", diverged=["muon-seed42"])
    path = d / "muon-seed42/log.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines[-4:]:
        line.update({k: None for k in line if k.startswith(("val_loss", "mean_pr", "pr_", "max_logit"))})
        line.update(dict(nan=True, flags=["not finite"]) if "nan" in line else {})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    S = report.load(d)
    assert ", 1 with flags" in post.build(S) and S["verdict"][0] == "D"
    assert np.isfinite(S["y"]["logit"][M]).all()


def test_spot_checks_that_found_something_and_restarts_are_limitations(whole, tmp_path):
    d = make(tmp_path / "mini")
    path = d / "muon-seed42/log.jsonl"
    lines = path.read_text().splitlines()
    at = next(i for i, line in enumerate(lines) if "spot_check" in line)
    lines[at] = json.dumps(json.loads(lines[at]) | dict(val_loss=None, nan=True, flags=["not finite"]))
    lines += ['{"event": "restart", "step": 77, "tokens": 1, "reason": "loss not finite"}']
    path.write_text("\n".join(lines) + "\n")
    S = report.load(d)
    flagged = [e for r in S["runs"] for e in r["events"] if e["event"] == "spot_check" and e["flags"]]
    said = post.limitations(S)
    assert "1 restart after a loss" in said and len(flagged) < 40
    assert f"- 48 spot checks during training (step 6), {len(flagged)} with flags" in said


def test_html_is_one_file_and_has_every_table_and_figure(whole):
    page = (whole / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 7 and not re.search(r'(?:src|href)="(?!data:)', page)
    text = (whole / "report.md").read_text()
    assert page.count("<table>") == len(re.findall(r"^\| ---", text, re.M)) and page.count("<h2>") == 9


def test_an_edited_post_is_never_written_over(whole, tmp_path):
    path = edited(whole, tmp_path, lambda text: text.replace("## 9. Recommendations",
                                                             "## 9. Recommendations\n\nTune it."))
    mine = path.read_text()
    report.report(path.parent)
    assert path.read_text() == mine and "Tune it." not in (path.parent / "report.new.md").read_text()
    assert "Tune it." in (path.parent / "report.html").read_text()
    path.unlink()
    report.report(path.parent)
    before = path.read_text()
    report.report(path.parent)
    assert path.read_text() == before and "Tune it." not in before


# ---- experiment_config.md ----

STEP_1 = ["Model", "Parameters", "Layers", "Heads", "Head dim", "Vocab size", "Context length", "Dataset", "Tokenizer",
          "QK-Norm type",
          "QK-Norm placement", "Weight decay", "Batch size", "Warmup steps", "LR schedule", "Gradient clipping"]


CONFIG = ("report.experiment_config(study.scale_config({0!r}), "  # what a scale sets, without a run
          "{{a: study.scale_config({0!r}, a) for a in study.FACTORIAL}})")


def config_of(scale):
    return eval(CONFIG.format(scale))


@pytest.mark.parametrize("scale", study.SCALES)
def test_every_field_of_step_1_is_filled(scale):
    text = config_of(scale)
    fields = dict(line.split(": ", 1) for line in text.split("```")[1].strip().split("\n"))
    assert set(STEP_1) <= set(fields) and all(v.strip()
                                              for v in fields.values()) and "?" not in text and "None" not in text
    assert fields["Head dim"] == "64" and fields["QK-Norm placement"] == "before RoPE"
    if scale == "80m":
        assert fields["Parameters"].startswith("79,1") and (fields["Layers"], fields["Heads"],
                                                            fields["Context length"]) == ("22", "8", "2048")


def test_the_committed_experiment_config_is_the_80m_scale_s():
    path = ROOT / "experiment_config.md"
    assert path.read_text() == config_of("80m"), f"write what {CONFIG.format('80m')} gives into {path}"


TWEAKS = {  # field: (file, old, new, words of the new line)
    "QK-Norm placement": ("model.py", "        q, k = self.q_norm(q), self.k_norm(k)\n", "", "after RoPE"),
    "LR schedule": ("train.py", "Linear warmup, then cosine", "Linear warmup, then a straight "
                                                              "line", "a straight line"),
    "Model": ("model.py", "NORM_EPS = 1e-6", "NORM_EPS = 1e-5", "1e-05"),
    "Optimizers": ("train.py", "beta2 = 0.95", "beta2 = 0.98", "betas 0.9, 0.98"),
    "Gradient clipping": ("train.py", "grad_clip = 1.0", "grad_clip = 0.0", "none")}


def test_a_tweak_cannot_make_experiment_config_lie(tmp_path):
    """Each line is of what the code does: tweaks on a copy, all at once, and each line says its own."""
    for path in [*ROOT.glob("*.py"), ROOT / "config", ROOT / "post", ROOT / "data/tokens.py"]:
        target = tmp_path / path.relative_to(ROOT)
        target.parent.mkdir(exist_ok=True)
        shutil.copytree(path, target) if path.is_dir() else shutil.copy(path, target)

    def edit(name, old, new):
        text = (tmp_path / name).read_text()
        assert old in text, old
        (tmp_path / name).write_text(text.replace(old, new, 1))

    def fields():
        ask = f"import report, study; print({CONFIG.format('mini')})"
        out = subprocess.run([sys.executable, "-c", ask], cwd=tmp_path, capture_output=True, text=True)
        return dict(line.split(": ", 1) for line in out.stdout.split("```")[1].strip().split("\n"))
    before = config_of("mini")
    for name, old, new, _ in TWEAKS.values():
        edit(name, old, new)
    rotate = "        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)\n"
    edit("model.py", rotate, rotate + "        q, k = self.q_norm(q), self.k_norm(k)\n")
    edit("model.py", "ROPE_THETA = 10_000.0", "ROPE_THETA = 500_000.0")
    edit("muon.py", "NS_STEPS = 5", "NS_STEPS = 7")
    edit("muon.py", "momentum=0.95", "momentum=0.9")
    after = fields()
    for field, (_, _, _, words) in TWEAKS.items():
        assert words in after[field] and f"{field}: {after[field]}" not in before
    assert "theta 500,000" in after["Model"]
    assert "momentum 0.9," in after["Optimizers"] and "7 Newton-Schulz" in after["Optimizers"]
    same = [f for f in after if f not in TWEAKS]
    assert len(same) > 10 and all(f"{f}: {after[f]}\n" in before for f in same)


def test_a_placement_of_qk_norm_that_is_neither_order_is_said_to_be(monkeypatch):
    monkeypatch.setattr(report.model, "apply_rope", lambda x, cos, sin: x)  # without RoPE both orders are one
    qkv = report.model.Attention.qkv
    monkeypatch.setattr(report.model.Attention, "qkv", lambda *args: [2 * x for x in qkv(*args)])
    assert report.qk_norm_placement() == "not a known one: see Attention.qkv"


def test_experiment_config_says_where_the_runs_had_other_code(whole, tmp_path):
    d = tmp_path / "mini"
    shutil.copytree(whole, d)
    source, there = d / "muon_qk-seed137/source", "their `source/` has another muon.py and train.py.\n"
    source.mkdir()
    for name in ("train.py", "muon.py", "model.py"):
        shutil.copy(ROOT / name, source)
    assert "not that of the runs" not in report.load(d)["experiment_config"]
    for name, old, new in (("train.py", "then cosine", "then a staircase"),
                           ("muon.py", "momentum=0.95", "momentum=0.8")):
        (source / name).write_text((ROOT / name).read_text().replace(old, new))
    S = report.load(d)
    assert S["experiment_config"].endswith(there) and there in post.build(S)
    assert "then cosine" in S["experiment_config"] and "momentum 0.95," in S["experiment_config"]


# ---- registration ----

def test_registration_is_written_once_and_changes_are_named(tmp_path, monkeypatch):
    d = tmp_path / "out/mini"
    report.preregister(d)
    first = (d / "preregistered.json").read_text()
    r = json.loads(first)
    assert r["main_runs_begun"] == [] and r["seeds"] == [42, 137]
    assert r["thresholds"]["loss_margin"] == 0.02 and set(r["scenarios"]) == set("ABCD")
    make(d, arms=STUDIES["A"])
    report.preregister(d)
    assert (d / "preregistered.json").read_text() == first
    assert "before the first main run" in (state := report.load(d)["registration"]) and "unchanged" in state
    monkeypatch.setattr(stats, "LOSS_MARGIN", 0.05)
    assert "changed: thresholds" in report.load(d)["registration"]


def test_registration_after_the_fact_and_added_seeds_are_named(tmp_path):
    d = make(tmp_path / "out/mini", seeds=(42, 137, 7))
    assert "Nothing was registered" in report.load(d)["registration"]
    report.preregister(d)
    state = report.load(d)["registration"]
    assert "after 12 main runs had begun" in state and "seeds in this report: 42, 137, 7" in state


# ---- the self-review ----

def test_a_fresh_draft_passes(whole, capsys):
    assert review.check(whole / "report.md", report.load(whole)) == 0
    out = capsys.readouterr().out
    assert "FAIL" not in out and out.count("PERSON") == 4 and "still to be written" in out


@pytest.mark.parametrize("edit, line, place", [
    (lambda t: t.replace("## 9. Recommendations\n", "## 9. Recommendations\n\nMuon saves 41.37 % of "
                                                    "steps.\n"),
     "Every number", "41.37 %"),
    (lambda t: t.replace("## 7. Discussion\n", "## 7. Discussion\n\nLoss fell to 2.9137.\n"), "Every number", "2.9137"),
    (lambda t: t.replace("## 7. Discussion\n", "## 7. Discussion\n\nThis proves it.\n"), "The word "
                                                                                         "'proves'", "proves"),
    (lambda t: t.replace("figures/1_val_loss.png", "figures/other.png"), "Loss curves", "no image"),
    (lambda t: re.sub(r"## 8. Limitations.*?(?=## 9)", "", t, flags=re.S), "Limitations section", "no section"),
    (lambda t: re.sub("^# .*", "# QK-Norm is harmful", t), "Title matches", "harmful"),
    (lambda t: t.replace("**Verdict: none**", "**Verdict: A**"), "Title matches", "the runs give none")])
def test_the_review_finds(edit, line, place, whole, tmp_path, capsys):
    path = edited(whole, tmp_path, edit)
    assert review.check(path, report.load(path.parent)) == 1
    failed = re.search(r"^FAIL +(.*(?:\n {7}.*)*)", capsys.readouterr().out, re.M)[1]
    assert failed.startswith(line) and place in failed


@pytest.mark.parametrize("text", ["Loss is {0:.3f}.", "Loss is {0:.1f} nats.", "A lead of {1:.2%}.",
                                  "{0:.4f} (4 arms, GPT-2, arXiv:2507.20534, step 3)"])
def test_numbers_rounded_from_the_results_pass(text, whole, tmp_path, capsys):
    loss = study.load_runs(whole)[4]["val_loss"]
    path = edited(whole, tmp_path, lambda t: t.replace("## 7. Discussion\n",
                                                       f"## 7. Discussion\n\n{text.format(loss, 0.2656)}\n"))
    assert review.check(path, report.load(path.parent)) == 0, capsys.readouterr().out


def test_a_number_from_the_middle_of_a_log_needs_four_digits(whole, tmp_path):
    path = edited(whole, tmp_path, lambda t: t.replace("## 7. Discussion", "First 77.77, then 77.8.\n\n## 7. "
                                                                           "Discussion"))
    log = path.parent / "muon-seed42/log.jsonl"
    first, rest = log.read_text().split("\n", 1)
    log.write_text(json.dumps(json.loads(first) | dict(grad_norm=77.77)) + "\n" + rest)
    assert [number for _, number in review.unsupported(path.read_text(), report.load(path.parent))] == ["77.8"]


def test_the_review_fails_where_a_learning_rate_was_not_the_tuned_one(whole, tmp_path, capsys):
    path = edited(whole, tmp_path, lambda t: t + "\n")
    config = path.parent / "muon-seed42/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | dict(learning_rate=0.5)))
    assert review.check(path, report.load(path.parent)) == 1
    assert "muon-seed42 ran at 0.5, not at the chosen" in capsys.readouterr().out


def test_a_verdict_that_no_longer_fits_the_logs_fails(whole, tmp_path, capsys):
    path = edited(whole, tmp_path, lambda t: t + "\n")
    (path.parent / "muon-seed42/log.jsonl").unlink()
    assert review.check(path, report.load(path.parent)) == 1
    assert "the runs give no verdict" in capsys.readouterr().out


# ---- the command ----

def run(*args):
    return subprocess.run([sys.executable, ROOT / "report.py", *map(str, args)], capture_output=True, text=True)


def test_the_last_lines_name_verdict_and_files(whole, tmp_path, capsys):
    report.report(edited(whole, tmp_path, lambda text: text + "Mine.\n").parent)
    out = capsys.readouterr().out
    S = report.load(whole)
    assert f"verdict: none. {S['title']}" in out
    assert "report.new.md" in out and "report.html" in out and "figures" in out


def test_from_another_folder_the_project_s_study_is_meant(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "ROOT", tmp_path / "project")
    monkeypatch.setattr(report, "registration", lambda *a: {})
    monkeypatch.setattr("configurator.ROOT", tmp_path / "project")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    report.preregister("out/mini")
    assert (tmp_path / "project/out/mini/preregistered.json").exists() and not list((tmp_path / "elsewhere").iterdir())
    make(tmp_path / "project/out/mini")
    monkeypatch.setattr(report, "report", (asked := []).append)
    report.main(["out/mini"])
    assert asked == [tmp_path / "project/out/mini"]


def fail(*args):
    """The message that report.py ends with, called in this process."""
    with pytest.raises(SystemExit) as end:
        report.main([*map(str, args)])
    return end.value.code


def test_command_line_and_exit_status(whole, tmp_path):
    path = edited(whole, tmp_path, lambda t: t.replace("## 7. Discussion\n",
                                                       "## 7. Discussion\n\nIt proves 98.7654321.\n"))
    done = run("--check", path)
    assert done.returncode == 1 and done.stdout.count("FAIL") == 2 and "98.7654321" in done.stdout


@pytest.mark.parametrize("args, words", [
    (["{}/nothing"], "holds no run"), ([], "usage"),
    (["--check", "{}/nothing/report.md"], "holds no run"),
    (["--preregister", "{}/out/huge"], "huge"), (["--preregister", "{}/mini"], "no out/SCALE"),
    (["{}/bad"], "results.json")])
def test_bad_input_gets_one_line(args, words, tmp_path):
    make(tmp_path / "bad")
    (tmp_path / "bad/results.json").write_text("{")
    message = fail(*(a.format(tmp_path) for a in args))
    assert message.startswith("error: ") and "\n" not in message and words in message
    assert not list(tmp_path.glob("**/report.md"))
