"""A run survives anything: kills, signals, NaNs, full disks, damaged files, several processes;
and repeats to the bit."""
import hashlib
import json
import math
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import study
import system
from test_smoke import ENV, ROOT, TINY, data, runs, train, write_data  # noqa: F401 (data, runs: fixtures)

# 60 steps, a rolling checkpoint after each
LONG = ["--max_tokens=3840", "--log_interval=7", "--ckpt_interval_s=1e-9"]
TIMES = ("tokens_per_s",)  # all that may differ between two runs


def start(out_dir, data_dir, *args, arm="muon_qk", env=ENV, launcher=()):
    return subprocess.Popen([sys.executable, *launcher, str(ROOT / "train.py"),
                             str(ROOT / f"config/{arm}.py"), *TINY, f"--data_dir={data_dir}",
                             f"--out_dir={out_dir}", *args],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def wait_for_log(out_dir, n_rows, child):
    while child.poll() is None and len(study.read_log(out_dir)[0]) < n_rows:
        time.sleep(0.02)


def log_of(out_dir):
    rows = [json.loads(line) for line in (Path(out_dir) / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def last_weights(out_dir):
    path = max(Path(out_dir).glob("ckpt_step_*.pt"), key=lambda p: int(p.stem.split("_")[-1]))
    return torch.load(path, weights_only=True)["model"]


def assert_same_run(a, b):
    """Final weights, log (but for speeds) and spectra, equal number for number."""
    wa, wb = last_weights(a), last_weights(b)
    assert wa.keys() == wb.keys() and all(torch.equal(wa[k], wb[k]) for k in wa)
    assert log_of(a) == log_of(b)
    files = sorted(p.name for p in Path(a).glob("sv_*.npy"))
    assert files == sorted(p.name for p in Path(b).glob("sv_*.npy")) and files
    assert all((Path(a) / f).read_bytes() == (Path(b) / f).read_bytes() for f in files)


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):  # noqa: F811
    """A run that was left alone."""
    out = tmp_path_factory.mktemp("alone") / "r"
    train(out, data, *LONG)
    return out


def kill_loop(out, data_dir, kills, rng):
    """Kill -9 a run at random moments until it was killed so often, then let it end. Returns
    how often it was killed."""
    done = 0
    while done < kills:
        rows = len(study.read_log(out)[0])
        child = start(out, data_dir, *LONG)
        wait_for_log(out, rows + 1, child)  # so that each life gets somewhere
        time.sleep(rng.uniform(0, 0.08))
        if child.poll() is not None:
            break
        child.kill()
        child.wait()
        done += 1
    train(out, data_dir, *LONG)
    return done


def test_killed_and_resumed_equals_left_alone(tmp_path, data, alone):  # noqa: F811
    assert kill_loop(tmp_path / "r", data, 5, random.Random(0)) >= 3
    assert_same_run(alone, tmp_path / "r")


@pytest.mark.slow
def test_twenty_kills(tmp_path, data):  # noqa: F811
    global LONG
    keep, LONG = LONG, ["--max_tokens=25600", "--log_interval=7", "--ckpt_interval_s=1e-9"]
    try:
        train(tmp_path / "alone", data, *LONG)
        assert kill_loop(tmp_path / "r", data, 20, random.Random(1)) == 20
        assert_same_run(tmp_path / "alone", tmp_path / "r")
    finally:
        LONG = keep


def test_killed_inside_each_kind_of_write(tmp_path, data, alone):  # noqa: F811
    """The process dies right before the rename or in the middle of a row: nothing
    half-written passes for whole."""
    out = tmp_path / "r"
    crash = ("import os, sys, runpy\nsys.path.insert(0, {root!r})\nsys.argv = sys.argv[1:]\n"
             "real, seen = os.{call}, [0]\ndef dying(*a, **k):\n    seen[0] += {match}\n"
             "    if seen[0] == {nth}:\n        os.kill(os.getpid(), 9)\n    return real(*a, **k)\n"
             "os.{call} = dying\nrunpy.run_path(sys.argv[0], run_name='__main__')\n")
    for call, match, nth in (
            ("replace", "'ckpt_step' in str(a[1])", 2), ("replace", "'sv_layer' in str(a[1])", 2),
            ("replace", "'rolling' in str(a[1])", 9), ("truncate", "1", 1), ("fsync", "1", 5)):
        code = crash.format(root=str(ROOT), call=call, match=match, nth=nth)
        child = subprocess.run([sys.executable, "-c", code, str(ROOT / "train.py"),
                                str(ROOT / "config/muon_qk.py"), *TINY, f"--data_dir={data}",
                                f"--out_dir={out}", *LONG], capture_output=True, env=ENV)
        assert child.returncode == -9, (call, match, child.stderr)
    train(out, data, *LONG)
    assert_same_run(alone, out)


def test_same_command_twice_gives_the_same_run(tmp_path, data, alone):  # noqa: F811
    train(tmp_path / "r", data, *LONG)
    assert_same_run(alone, tmp_path / "r")


def test_looking_changes_nothing(tmp_path, data, alone):  # noqa: F811
    train(tmp_path / "r", data, "--max_tokens=3840", "--log_interval=0", "--first_look=0", "--n_ckpt=1")
    a, b = last_weights(alone), last_weights(tmp_path / "r")
    assert all(torch.equal(a[k], b[k]) for k in a)
    train(tmp_path / "s", data, "--max_tokens=3840", "--log_interval=11")  # another cadence
    b = last_weights(tmp_path / "s")
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_says_how_to_go_on(tmp_path, data, alone, number):  # noqa: F811
    out = tmp_path / "r"
    child = start(out, data, "--max_tokens=3840", "--log_interval=7")
    wait_for_log(out, 2, child)
    child.send_signal(number)
    stdout, stderr = child.communicate()
    assert child.returncode == 128 + number, stderr
    assert f"stopped by {number.name} at step" in stdout and "run the same command again" in stdout
    assert (out / "ckpt_rolling.pt").exists() and study.load_run(out)["status"] == "unfinished"
    train(out, data, "--max_tokens=3840", "--log_interval=7")
    assert_same_run(alone, out)


def poisoned():
    """A wrapper of train.py whose loss is NaN on the blocks whose first two tokens are in {keys}."""
    return ("import sys, runpy, torch\nsys.path.insert(0, {root!r})\nimport model\n"
            "real, calls = model.GPT.forward, [0]\ndef forward(self, idx, targets=None):\n"
            "    loss = real(self, idx, targets)\n    if not torch.is_grad_enabled():\n"
            "        return loss\n    key = int(idx[0, 0]) * 65536 + int(idx[0, 1])\n"
            "    return loss * float('nan') if key in {keys} else loss\nmodel.GPT.forward = forward\n"
            "sys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')\n")


def first_tokens(data_dir, seed, batch, sequences=4, block=16):
    """The key of poisoned() for the first sequence of a global batch: the data order,
    written again in plain numpy."""
    tokens = np.fromfile(data_dir / "train.bin", "<u2").astype(int)
    n = (len(tokens) - 1) // block
    epoch, i = divmod(batch * sequences, n)
    b = np.random.default_rng([seed, epoch]).permutation(n)[i]
    return int(tokens[b * block] * 65536 + tokens[b * block + 1])


def run_poisoned(out, data_dir, batches):
    keys = {first_tokens(data_dir, 42, b) for b in batches}
    assert len(keys) == len(batches)
    code = poisoned().format(root=str(ROOT), keys=keys)
    return subprocess.run([sys.executable, "-c", code, str(ROOT / "train.py"),
                           str(ROOT / "config/muon_qk.py"), *TINY, f"--data_dir={data_dir}",
                           f"--out_dir={out}", "--max_tokens=3840", "--log_interval=7"],
                          capture_output=True, text=True, env=ENV)


@pytest.fixture(scope="module")
def distinct(tmp_path_factory):
    """Data in which the first two tokens of a block tell it apart."""
    folder = tmp_path_factory.mktemp("distinct")
    meta = json.loads((write_data(folder / "d") / "meta.json").read_text())
    tokens = np.arange(4000)
    tokens = np.where(tokens % 2, tokens // 16 % 250, tokens % 16 * 8 + tokens // 4000).astype("<u2")
    tokens.tofile(folder / "d" / "train.bin")
    meta["train_sha256"] = hashlib.sha256(tokens.tobytes()).hexdigest()
    (folder / "d" / "meta.json").write_text(json.dumps(meta))
    return folder / "d"


def test_nan_restarts_once_without_the_batch(tmp_path, distinct):
    done = run_poisoned(tmp_path / "r", distinct, [25])
    assert done.returncode == 0, done.stderr
    run = study.load_run(tmp_path / "r")
    event, = [e for e in run["events"] if e["event"] == "restart"]
    assert event["step"] == 25 and event["batch"] == 25 and event["restart_step"] == 20
    assert run["status"] == "finished" and all(math.isfinite(r["val_loss"]) for r in run["rows"])
    steps = [r["step"] for r in run["rows"]]
    assert steps == sorted(set(steps)) and steps[-1] == 60


def test_nan_a_second_time_is_diverged_which_is_a_result(tmp_path, distinct):
    done = run_poisoned(tmp_path / "r", distinct, [25, 40])
    assert done.returncode == 0, done.stderr
    run = study.load_run(tmp_path / "r")
    assert run["status"] == "diverged" and run["val_loss"] == math.inf
    assert [e["event"] for e in run["events"] if e["event"] in ("restart", "diverged")] == [
        "restart", "diverged"]
    again = run_poisoned(tmp_path / "r", distinct, [25, 40])
    assert again.returncode == 0 and "is diverged: nothing to do" in again.stdout


def test_spot_checks_are_logged(alone):
    spots = [e for e in study.load_run(alone)["events"] if e["event"] == "spot_check"]
    assert [e["step"] for e in spots] == [10, 20, 30, 40, 50, 60]
    rows = {r["step"]: r for r in study.load_run(alone)["rows"]}
    for e, before in zip(spots, [0, 10, 20, 30, 40, 50]):
        assert e["val_loss"] == rows[e["step"]]["val_loss"] and e["mean_pr_before"] == rows[before]["mean_pr"]
        assert e["falling"] == (e["val_loss"] < rows[before]["val_loss"]) and e["nan"] is False
        assert e["max_logit"] == max(study.layer_values(rows[e["step"]], "max_logit"))


def test_second_process_on_an_out_dir_is_refused(tmp_path, data):  # noqa: F811
    child = start(tmp_path / "r", data, "--max_tokens=38400")
    wait_for_log(tmp_path / "r", 1, child)
    line = train(tmp_path / "r", data, "--max_tokens=38400", ok=False)
    assert f"in use by process {child.pid} on" in line
    child.kill()
    child.wait()
    held = system.lock(tmp_path / "r")  # the lock of the dead process is taken over
    held.close()


def test_full_disk(tmp_path, data):  # noqa: F811
    """A file size limit stands in for a full disk: one line, the earlier files intact,
    the next start goes on."""
    out = tmp_path / "r"
    child = subprocess.run([sys.executable, str(ROOT / "train.py"), str(ROOT / "config/muon_qk.py"),
                            *TINY, f"--data_dir={data}", f"--out_dir={out}", "--n_ckpt=2"],
                           capture_output=True, text=True, env=ENV, preexec_fn=lambda: (
                               signal.signal(signal.SIGXFSZ, signal.SIG_IGN),
                               resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))))
    assert child.returncode == 1 and "Traceback" not in child.stderr, child.stderr
    assert child.stderr.strip().startswith("error: cannot write into") \
        and len(child.stderr.strip().splitlines()) == 1
    assert not list(out.glob("*.tmp")) and not list(out.glob("ckpt*")) and len(study.read_log(out)[0]) >= 1
    train(out, data, "--n_ckpt=2")
    assert study.load_run(out)["status"] == "finished"


def stopped_run(out, data_dir):
    """A run stopped after its third token checkpoint, with a rolling checkpoint."""
    child = start(out, data_dir, "--max_tokens=3840", "--log_interval=7")
    wait_for_log(out, 7, child)
    child.terminate()
    child.communicate()
    assert (out / "ckpt_rolling.pt").exists()


def test_truncated_checkpoint_falls_back_to_the_one_before(tmp_path, data, alone):  # noqa: F811
    out = tmp_path / "r"
    stopped_run(out, data)
    content = (out / "ckpt_rolling.pt").read_bytes()
    (out / "ckpt_rolling.pt").write_bytes(content[:len(content) // 2])
    stdout = train(out, data, "--max_tokens=3840", "--log_interval=7")
    assert "ckpt_rolling.pt is no whole checkpoint" in stdout and "going on from step" in stdout
    assert_same_run(alone, out)


def test_half_a_last_line(tmp_path, data, alone):  # noqa: F811
    out = tmp_path / "r"
    stopped_run(out, data)
    with open(out / "log.jsonl", "a") as f:
        f.write('{"step": 59, "val')
    train(out, data, "--max_tokens=3840", "--log_interval=7")
    assert log_of(out) == log_of(alone)


def test_checkpoint_of_another_shape(tmp_path, data):  # noqa: F811
    out = tmp_path / "r"
    stopped_run(out, data)
    for path in out.glob("ckpt_step_*.pt"):
        path.unlink()
    state = torch.load(out / "ckpt_rolling.pt", weights_only=True)
    state["model"]["wte.weight"] = torch.zeros(8, 8)
    torch.save(state, out / "ckpt_rolling.pt")
    before = (out / "log.jsonl").read_bytes()
    assert "holds a model of another shape" in train(out, data, "--max_tokens=3840", "--log_interval=7",
                                                     ok=False)
    assert (out / "log.jsonl").read_bytes() == before


def test_log_that_was_cut(tmp_path, data):  # noqa: F811
    out = tmp_path / "r"
    stopped_run(out, data)
    os.truncate(out / "log.jsonl", 100)
    assert "is shorter than its checkpoint says" in train(out, data, "--max_tokens=3840",
                                                          "--log_interval=7", ok=False)


def test_data_changed_since_the_run_began(tmp_path, data):  # noqa: F811
    out = tmp_path / "r"
    stopped_run(out, data)
    other = write_data(tmp_path / "other", seed=1)
    assert "changed since the run" in train(out, other, "--max_tokens=3840", "--log_interval=7", ok=False)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder(tmp_path, data):  # noqa: F811
    (tmp_path / "ro").mkdir(mode=0o500)
    assert "ro" in train(tmp_path / "ro" / "r", data, ok=False)


# ---- several processes
def torchrun(out, data_dir, n, *args, arm="muon_qk", ok=True):
    child = start(out, data_dir, *args, arm=arm, launcher=(
        "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"))
    stdout, stderr = child.communicate(timeout=200)
    assert (child.returncode == 0) == ok, stderr
    return stdout


@pytest.mark.parametrize("arm, numbers", [("muon_qk", (2, 4)), ("adamw", (2,))])
def test_one_two_and_four_processes_agree(tmp_path, data, arm, numbers):  # noqa: F811
    """To 1e-4 over 20 steps in float32. Newton-Schulz rounds to bfloat16 where the device multiplies
    it, whatever the dtype, so that a last bit in a gradient can move a Muon update by 1/256: hence
    the modest learning rate."""
    args = ["--learning_rate=0.002"]
    train(tmp_path / "1", data, *args, arm=arm)
    one = study.load_run(tmp_path / "1")
    for n in numbers:
        torchrun(tmp_path / str(n), data, n, *args, arm=arm)
        run = study.load_run(tmp_path / str(n))
        assert [r["step"] for r in run["rows"]] == [r["step"] for r in one["rows"]]
        for key in ("val_loss", "train_loss", "grad_norm", "mean_pr"):
            a, b = ([r[key] or 0 for r in x["rows"]] for x in (one, run))
            assert np.allclose(a, b, rtol=0, atol=1e-4 if "loss" in key else 5e-3), (
                n, key, np.abs(np.subtract(a, b)).max())


def test_resume_with_another_number_of_processes(tmp_path, data, alone):  # noqa: F811
    out = tmp_path / "r"
    stopped_run(out, data)
    torchrun(out, data, 2, "--max_tokens=3840", "--log_interval=7")
    # all ranks leave
    assert "nothing to do" in torchrun(out, data, 2, "--max_tokens=3840", "--log_interval=7")
    a, b = study.load_run(alone), study.load_run(out)
    assert [r["step"] for r in a["rows"]] == [r["step"] for r in b["rows"]]
    assert a["val_loss"] == pytest.approx(b["val_loss"], abs=1e-3)


# ---- training that goes wrong
def strict_log(out_dir):
    """log.jsonl as JSON has it: no NaN, no Infinity."""
    def refuse(word):
        raise AssertionError(f"{word} is no JSON")
    return [json.loads(line, parse_constant=refuse)
            for line in (Path(out_dir) / "log.jsonl").read_text().splitlines()]


def test_a_restart_without_a_checkpoint_restores_all_of_the_start(tmp_path, distinct):
    """Norm gains too: step 0 is what it was, to the last digit, and carries nothing of
    the step that exploded."""
    train(tmp_path / "alone", distinct, "--max_tokens=3840", "--log_interval=7")
    first = study.load_run(tmp_path / "alone")["rows"][0]
    done = run_poisoned(tmp_path / "r", distinct, [3])
    assert done.returncode == 0, done.stderr
    run = study.load_run(tmp_path / "r")
    event, = [e for e in run["events"] if e["event"] == "restart"]
    assert event["step"] == 3 and event["restart_step"] == 0 and run["status"] == "finished"
    assert run["rows"][0] == first and first["train_loss"] is None and first["grad_norm"] is None


@pytest.mark.parametrize("lr", ["1e6", "1e18", "1e20"])
def test_weights_that_break_in_the_last_update_are_diverged(tmp_path, data, lr):  # noqa: F811
    out = train(tmp_path / "r", data, f"--learning_rate={lr}", "--max_tokens=64", "--n_ckpt=1", arm="adamw")
    assert "diverged" in out and study.load_run(tmp_path / "r")["status"] == "diverged"
    assert [row.get("event") for row in strict_log(tmp_path / "r")] == ["restart", None, "diverged"]


def test_a_learning_rate_far_too_high_ends_as_diverged(tmp_path, data):  # noqa: F811
    train(tmp_path / "r", data, "--learning_rate=300", arm="muon")
    assert study.load_run(tmp_path / "r")["status"] == "diverged" and strict_log(tmp_path / "r")


def test_a_probe_of_broken_weights_gives_nan_and_no_crash():
    from probe import pr1, singular_values
    gram = torch.eye(4, dtype=torch.float64).repeat(2, 1, 1)
    gram[1, 0, 0] = math.inf
    s = singular_values(gram)
    assert pr1(s)[0] == 4 and pr1(s)[1].isnan()


def test_the_highest_step_is_the_newest_checkpoint(tmp_path, data, alone):  # noqa: F811
    """Whatever a copy or a touch did to the files' times."""
    out = tmp_path / "r"
    stopped_run(out, data)
    for path in out.glob("ckpt_step_*.pt"):
        os.utime(path, (time.time() + 100, time.time() + 100))
    step = torch.load(out / "ckpt_rolling.pt", weights_only=True)["step"]
    assert f"going on from step {step} of" in train(out, data, "--max_tokens=3840", "--log_interval=7")
    assert_same_run(alone, out)


def test_ranks_with_different_checkpoints_leave(tmp_path, data):  # noqa: F811
    """Two machines whose folders differ: nothing runs, and one line says so."""
    stopped_run(tmp_path / "r0", data)
    (tmp_path / "r1").mkdir()
    (tmp_path / "rank.py").write_text(
        f"import os, runpy, sys\nsys.path.insert(0, {str(ROOT)!r})\nsys.argv = ["
        f"{str(ROOT / 'train.py')!r}, *sys.argv[1:], '--out_dir={tmp_path}/r' + os.environ['RANK']]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n")
    before = (tmp_path / "r0/log.jsonl").read_bytes()
    done = subprocess.run([
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
        str(tmp_path / "rank.py"), str(ROOT / "config/muon_qk.py"), *TINY, f"--data_dir={data}",
        "--max_tokens=3840", "--log_interval=7"], capture_output=True, text=True, env=ENV)
    assert done.returncode and "error: the processes read different checkpoints" in done.stderr, done.stderr
    assert (tmp_path / "r0/log.jsonl").read_bytes() == before


# ---- surroundings
def test_without_git(tmp_path, data):  # noqa: F811
    env = dict(ENV, PATH=str(tmp_path))
    done = start(tmp_path / "r", data, "--max_tokens=64", env=env)
    assert done.wait() == 0, done.stderr.read()
    assert json.loads((tmp_path / "r/source/versions.json").read_text())["commit"] == "unknown"


def wrapped(tmp_path, code, *args, env=ENV):
    """train.py after some lines of code."""
    (tmp_path / "wrapper.py").write_text(
        f"import runpy, sys\nsys.path.insert(0, {str(ROOT)!r})\n{code}\n"
        f"sys.argv = [{str(ROOT / 'train.py')!r}, *sys.argv[1:]]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n")
    return subprocess.run([sys.executable, tmp_path / "wrapper.py", str(ROOT / "config/muon_qk.py"),
                           *TINY, *args], capture_output=True, text=True, env=env)


def test_a_file_system_without_locks(tmp_path, data):  # noqa: F811
    done = wrapped(tmp_path, "import errno, fcntl\ndef flock(*args):\n    raise OSError(errno.ENOLCK, "
                             "'No locks available')\nfcntl.flock = flock",
                   f"--data_dir={data}", f"--out_dir={tmp_path / 'r'}", "--max_tokens=64")
    assert done.returncode == 0 and "has no locks" in done.stdout, done.stderr


def test_a_compiler_that_does_not_work_means_eager(tmp_path, data):  # noqa: F811
    env = dict(ENV, CXX="/bin/false", TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    child = start(tmp_path / "r", data, "--compile=1", "--max_tokens=64", env=env)
    out, err = child.communicate()
    line, = [line for line in out.splitlines() if "running eager" in line]
    assert child.returncode == 0 and "torch.compile does not work here" in line and "Traceback" not in err


def test_rank_left_in_the_environment(tmp_path, data):  # noqa: F811
    child = start(tmp_path / "r", data, "--max_tokens=64",
                  env=dict(ENV, RANK="3", WORLD_SIZE="8", MASTER_ADDR="nowhere"))
    assert child.wait(60) == 0, child.stderr.read()


def test_home_in_a_path(tmp_path, data):  # noqa: F811
    (tmp_path / "d").symlink_to(data)
    child = subprocess.Popen([sys.executable, str(ROOT / "train.py"), "config/muon.py", *TINY,
                              "--data_dir=~/d", "--out_dir=~/r", "--max_tokens=64"],
                             env=dict(ENV, HOME=str(tmp_path)), cwd=tmp_path,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.wait() == 0, child.stderr.read()
    assert (tmp_path / "r/log.jsonl").exists() and not (tmp_path / "~").exists()


def test_hangup_saves(tmp_path, data):  # noqa: F811
    child = start(tmp_path / "r", data, "--max_tokens=38400", "--log_interval=7")
    wait_for_log(tmp_path / "r", 1, child)
    child.send_signal(signal.SIGHUP)
    out, err = child.communicate()
    assert child.returncode == 129 and "stopped by SIGHUP" in out \
        and (tmp_path / "r/ckpt_rolling.pt").exists(), err


def test_a_folder_from_before_a_key_existed(tmp_path, data, runs):  # noqa: F811
    """An update of the scripts orphans no run: a missing key stands for its default, and a changed
    value is still refused."""
    import shutil
    out = tmp_path / "muon_qk-seed42"
    shutil.copytree(runs / "muon_qk-seed42", out)
    config = json.loads((out / "config.json").read_text())
    for key in ("qk_gain", "beta2", "deterministic"):
        del config[key]
    (out / "config.json").write_text(json.dumps(config))
    assert "nothing to do" in train(out, data)
    assert "beta2 0.95 -> 0.9" in train(out, data, "--beta2=0.9", ok=False)


def test_an_interval_of_zero_is_off(tmp_path, data):  # noqa: F811
    train(tmp_path / "r", data, "--log_interval=0", "--sv_interval=0", "--ckpt_interval_s=0",
          "--n_ckpt=2", "--first_look=0")
    run = study.load_run(tmp_path / "r")
    assert [row["step"] for row in run["rows"]] == [10, 20]
    assert sorted(p.name for p in (tmp_path / "r").glob("sv_layer_0*")) == [
        "sv_layer_0_step_10.npy", "sv_layer_0_step_20.npy"]
