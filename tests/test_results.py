"""The finished studies in docs/results: their tables and verdicts come out of the kept logs again."""
import re
import shutil

import numpy as np
import pytest

import report
import study
from configurator import ROOT
from post import text

KEPT = sorted(path.parent for path in (ROOT / "docs/results").glob("*/report.md"))


@pytest.fixture(scope="module", params=KEPT, ids=[path.name for path in KEPT])
def kept(request, tmp_path_factory):
    """A copy of a finished study with its logs and spectra unpacked, as the scripts left it."""
    folder = shutil.copytree(request.param, tmp_path_factory.mktemp("kept") / request.param.name)
    for archive in folder.glob("*.tar.xz"):
        shutil.unpack_archive(archive, folder)
    return folder


def test_tables_and_verdict_come_out_of_the_logs(kept):
    S, written = report.load(kept), (kept / "report.md").read_text()
    assert not S["missing"] and f"**Verdict: {S['verdict'][0]}**" in written
    again = text.build(S).split("\n")
    rows = [line for line in again if line.startswith("|")]
    assert len(rows) > 50 and [line for line in rows if line not in written] == []
    assert again[0] == written.split("\n")[0] and text.TODO not in written


def test_it_was_registered_before_the_first_main_run(kept):
    registered = study.read_json(kept / "preregistered.json")
    assert registered["main_runs_begun"] == []
    runs = study.load_runs(kept)
    assert {r["config"]["seed"] for r in runs} == {*registered["seeds"]}
    assert {r["config"]["arm"] for r in runs} == {*registered["arms"]}


def test_spectra_give_the_logged_participation_ratios(kept):
    for run in study.load_runs(kept):
        row = run["rows"][-1]
        for i, pr in enumerate(study.layer_values(row, "pr")):
            s = np.load(run["dir"] / f"sv_layer_{i}_step_{row['step']}.npy")
            assert (s.sum(1) ** 2 / (s ** 2).sum(1)).mean() == pytest.approx(pr, abs=1e-3)


def test_the_readme_tells_the_numbers_of_a_kept_study():
    """Each row of the README's results table stands in a kept report."""
    readme = (ROOT / "README.md").read_text()
    rows = [re.sub(r"\s+", " ", line) for line in readme.split("\n") if re.match(r"\| (AdamW|Muon)", line)]
    reports = re.sub(r" +", " ", "\n".join((path / "report.md").read_text() for path in KEPT))
    assert rows and [row for row in rows if row not in reports] == []


def test_a_kept_study_is_small(kept):
    sizes = [path.stat().st_size for path in (ROOT / "docs/results" / kept.name).rglob("*") if path.is_file()]
    assert sum(sizes) < 10e6
