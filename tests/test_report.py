"""report.py, post/text.py and post/review.py on synthetic studies whose truth is known."""
import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest

from post import text as post
import report
from post import review
from post import stats
import study
import synthetic
from configurator import ROOT

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
        for name in post.FIGURES[:6]:
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
    import shutil
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
    S = report.load(make(tmp_path / "mini", arms=arms, noise=dict(loss=1e-4, pr=0.2)))
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
    S["y"] = report.measure(S["runs"], S["seeds"], S["arms"])
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
    S = report.load(make(tmp_path / "mini", arms=arms, noise={k: 0.02 for k in synthetic.NOISE}))
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


# ---- the post ----

SECTIONS = ["TLDR", "Experimental Setup", "Results: Loss", "Results: Representation Quality",
            "The Relationship Between Loss and PR",
            "Downstream Evaluation", "Discussion", "Limitations", "Recommendations"]


def test_the_nine_sections_in_order_with_their_figures(whole):
    text = (whole / "report.md").read_text()
    assert re.findall(r"^## \d\. (.*)", text, re.M) == SECTIONS
    for part, numbers in (2, [6]), (3, [1]), (4, [2, 5, 4]), (5, [3]):
        body = text.split(f"\n## {part}. ")[1].split("\n## ")[0]
        assert sorted(re.findall(r"\]\(figures/(\d)_", body)) == sorted(map(str, numbers))
    tldr = text.split("## 1. TLDR")[1].split("**Verdict")[0]
    assert 1 <= len(re.findall(r"\.(?:\s|$)", tldr.strip())) <= 3
    assert "| Config | Seed | Val PPL | HellaSwag | LAMBADA |" in text
    assert "| Config | Best LR | Val Loss | Mean PR | HellaSwag | LAMBADA |" in text
    assert "Gemma 3" in text and "Gemma 2" not in text and "proves" not in text


def test_every_cell_is_filled_or_marked(whole):
    rows = [line for line in (whole / "report.md").read_text().split("\n") if line.startswith("| ")]
    assert len(rows) > 60
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
    text = post.build(report.load(make(tmp_path / "80m", arms={**FLAT, M: dict(loss=3.45), MQ: dict(loss=3.47)},
                                       scale="80m", n_layer=22)))
    assert "It cannot show" not in text
    assert "| Val loss, mean of the Muon arms | 3.4" in text and "25 to 27.5 | yes" in text
    assert "| AdamW above Muon | 0.04" in text and "**no**" in text  # 3.5 - 3.46 is outside 0.05 to 0.10


def test_learning_rates_say_where_they_are_not_bracketed(tmp_path):
    S = report.load(make(tmp_path / "mini", unbracketed=["muon"]))
    text = post.build(S)
    row = next(line for line in text.split("\n") if line.startswith("| Muon |") and "bracketed" in line)
    assert "**not bracketed**" in row and "| none |" in row
    assert "Not bracketed, so perhaps not at its best learning rate: Muon." in text


def test_main_runs_that_differ_in_more_than_the_design_are_named(tmp_path):
    d = make(tmp_path / "mini")
    path = d / "muon-seed42/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(weight_decay=0.2)))
    assert "The main runs also differ in: weight_decay." in post.build(report.load(d))


def test_spot_checks_and_restarts_are_listed(tmp_path):
    d = make(tmp_path / "mini")
    with open(d / "muon-seed42/log.jsonl", "a") as f:
        f.write('{"event": "restart", "step": 77, "tokens": 1, "reason": "loss not finite"}\n')
    text = post.build(report.load(d))
    assert "- Muon, seed 42: restart at step 77, loss not finite" in text and "1 restart after a loss" in text
    assert len(re.findall(r"^\| .*, seed \d+ \| ", text, re.M)) == 8 * 6


def test_html_is_one_file_and_has_every_table_and_figure(whole):
    page = (whole / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 6 and not re.search(r'(?:src|href)="(?!data:)', page)
    text = (whole / "report.md").read_text()
    assert page.count("<table>") == len(re.findall(r"^\| ---", text, re.M)) and page.count("<h2>") == 10


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


@pytest.mark.parametrize("scale", study.SCALES)
def test_every_field_of_step_1_is_filled(scale):
    text = report.scale_config(scale)
    fields = dict(line.split(": ", 1) for line in text.split("```")[1].strip().split("\n"))
    assert set(STEP_1) <= set(fields) and all(v.strip()
                                              for v in fields.values()) and "?" not in text and "None" not in text
    assert fields["Head dim"] == "64" and fields["QK-Norm placement"] == "before RoPE"
    if scale == "80m":
        assert fields["Parameters"].startswith("79,1") and (fields["Layers"], fields["Heads"],
                                                            fields["Context length"]) == ("22", "8", "2048")


def test_the_committed_experiment_config_is_the_80m_scale_s():
    path = ROOT / "experiment_config.md"
    assert path.read_text() == report.scale_config("80m"), "run: python report.py --config 80m > experiment_config.md"


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
    (lambda t: t.replace("## 9. Recommendations\n", "## 9. Recommendations\n\nMuon saves 41.37 % of steps.\n"),
     "Every number", "41.37 %"),
    (lambda t: t.replace("## 7. Discussion\n", "## 7. Discussion\n\nLoss fell to 2.9137.\n"), "Every number", "2.9137"),
    (lambda t: t.replace("## 7. Discussion\n", "## 7. Discussion\n\nThis proves it.\n"), "The word 'proves'", "proves"),
    (lambda t: t.replace("figures/1_val_loss.png", "figures/other.png"), "Loss curves", "no image"),
    (lambda t: re.sub(r"## 8. Limitations.*?(?=## 9)", "", t, flags=re.S), "Limitations are there", "no section"),
    (lambda t: t.replace("Gemma 3", "Gemma 2"), "Limitations are there", "Gemma"),
    (lambda t: re.sub(r"^- 2 seeds:.*$", "- Some runs.", t, flags=re.M), "Limitations are there", "seeds"),
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
    path = edited(whole, tmp_path, lambda t: t.replace("## 7. Discussion", "First 77.77, then 77.8.\n\n## 7. Discussion"))
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


def fail(monkeypatch, *args):
    """The message that report.py ends with, called in this process."""
    monkeypatch.setattr(sys, "argv", ["report.py", *map(str, args)])
    with pytest.raises(SystemExit) as end:
        report.main()
    return end.value.code


def test_command_line_and_exit_status(whole, tmp_path):
    path = edited(whole, tmp_path, lambda t: t.replace("## 7. Discussion\n",
                                                       "## 7. Discussion\n\nIt proves 98.7654321.\n"))
    done = run("--check", path)
    assert done.returncode == 1 and done.stdout.count("FAIL") == 2 and "98.7654321" in done.stdout
    assert run("--check", whole / "report.md").returncode == 0


@pytest.mark.parametrize("args, words", [
    (["{}/nothing"], "holds no run"), (["--config", "9b"], "9b"), ([], "usage"),
    (["--check", "{}/nothing/report.md"], "holds no run"),
    (["--preregister", "{}/huge"], "huge"), (["{}/bad"], "results.json")])
def test_bad_input_gets_one_line(args, words, tmp_path, monkeypatch):
    make(tmp_path / "bad")
    (tmp_path / "bad/results.json").write_text("{")
    message = fail(monkeypatch, *(a.format(tmp_path) for a in args))
    assert message.startswith("error: ") and "\n" not in message and words in message
    assert not list(tmp_path.glob("**/report.md"))
