"""What people change, done on a copy: as few lines as the README names, and everything else follows."""
import json
import os
import re
import shutil
import subprocess
import sys

import pytest

import study
from test_smoke import ENV, ROOT, TINY, data  # noqa: F401 (data is a fixture)

FOUR = " ".join(study.FACTORIAL)


@pytest.fixture
def copy(tmp_path):
    ignored = shutil.ignore_patterns("out", ".git", "__pycache__", "*.bin", ".cache", ".venv",
                                     ".pytest_cache", ".gpu")
    return shutil.copytree(ROOT, tmp_path / "copy", ignore=ignored)


def edit(copy, file, *pairs):
    """Replace each old text, which has to be there once, by the new one."""
    text = (copy / file).read_text()
    for old, new in pairs:
        assert text.count(old) == 1, (file, old)
        text = text.replace(old, new)
    (copy / file).write_text(text)


def python(copy, *args, **env):
    done = subprocess.run([sys.executable, *map(str, args)], cwd=copy, capture_output=True, text=True,
                          env=ENV | env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_another_optimizer_is_an_arm(copy, data):  # noqa: F811
    edit(copy, "train.py",
         ('optimizer in ("adamw", "muon")', 'optimizer in ("adamw", "muon", "sgd")'),
         ("else:\n    adamw_groups.append(",
          "elif optimizer == \"sgd\":\n"
          "    optimizers.append(torch.optim.SGD([dict(params=hidden, lr_scale=1.0)], momentum=0.9))\n"
          "else:\n    adamw_groups.append("))
    # ci has one grid for every arm
    edit(copy, "study.py", ('    "adamw": "AdamW",\n', '    "adamw": "AdamW",\n    "sgd": "SGD",\n'))
    (copy / "config/sgd.py").write_text('# SGD on hidden matrices.\narm = "sgd"\noptimizer = "sgd"\n')
    arms = dict(ARMS=FOUR + " sgd")
    for stage, n in (("lr", 25), ("main", 10)):
        commands = python(copy, "study.py", "list", "ci", stage, **arms).splitlines()
        assert len(commands) == n and sum("config/sgd.py" in line for line in commands) == n // 5
    python(copy, "train.py", "config/sgd.py", *TINY, f"--data_dir={data}",
           f"--out_dir={copy}/out/ci/sgd-seed42", "--scale=ci")
    code = ("import study; r, = study.load_runs('out/ci'); "
            "print(r['status'], study.LABELS[r['config']['arm']], study.arms_of([r]))")
    assert python(copy, "-c", code, **arms).startswith("finished SGD ['adamw', 'sgd', 'adamw_qk'")


def test_qk_norm_after_rope_is_one_edit_and_the_probe_follows(copy):
    """The line is moved below RoPE; the probe measures the keys that attention gets then,
    captured where it gets them."""
    edit(copy, "model.py", ("        q, k = self.q_norm(q), self.k_norm(k)\n", ""),
         ("        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)\n",
          "        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)\n"
          "        q, k = self.q_norm(q), self.k_norm(k)\n"))
    (copy / "compare.py").write_text("""
import torch
from model import GPT, GPTConfig
from probe import pr1, probe
model = GPT(GPTConfig(32, 96, 2, 2, 64, 80, True)).init_weights(torch.Generator().manual_seed(0))
for block in model.h:
    block.attn.k_norm.weight.data.uniform_(0.5, 2)
idx, seen, real = torch.randint(0, 96, (3, 32)), [], torch.nn.functional.scaled_dot_product_attention
metrics, spectra = probe(model, idx)
torch.nn.functional.scaled_dot_product_attention = (
    lambda q, k, v, **kw: seen.append(k.detach()) or real(q, k, v, **kw))
model(idx)
for i, k in enumerate(seen):
    s = torch.linalg.svdvals(k.transpose(0, 1).flatten(1, 2).double())
    assert abs(pr1(s).mean().item() - metrics[f"pr_layer_{i}"]) < 1e-3, i
    gain = model.h[i].attn.k_norm.weight
    # the norm is the last thing that happened to them
    assert ((k / gain).square().mean(-1) - 1).abs().max() < 0.05
""")
    python(copy, "compare.py")


def test_another_schedule_is_one_function(copy, data):  # noqa: F811
    text = (copy / "train.py").read_text()
    body = re.search(r"    progress = .*\n    return .*\n", text)[0]
    edit(copy, "train.py", (body, "    return learning_rate * (max_steps - step) / max_steps\n"))
    python(copy, "train.py", "config/muon.py", *TINY, f"--data_dir={data}", f"--out_dir={copy}/out/r")
    rows, _ = study.read_log(copy / "out/r")
    assert [r["lr"] for r in rows if r["step"] > 5] == pytest.approx(
        [0.01 * (20 - r["step"] + 1) / 20 for r in rows if r["step"] > 5])


def test_another_probe_metric_is_one_line(copy, data):  # noqa: F811
    edit(copy, "probe.py", ('        "pr": pr1(keys).mean(-1),  # mean over heads\n',
                            '        "pr": pr1(keys).mean(-1),  # mean over heads\n'
                            '        "largest_sv": keys[..., 0].mean(-1),\n'))
    python(copy, "train.py", "config/muon.py", *TINY, f"--data_dir={data}", f"--out_dir={copy}/out/r")
    rows, _ = study.read_log(copy / "out/r")
    assert all(len(study.layer_values(row, "largest_sv")) == 2 and row["largest_sv_layer_0"] > 0
               for row in rows)


def test_own_text_needs_no_edit(copy):
    cache = ROOT / "data/.cache/tiktoken"
    if not cache.exists():
        pytest.skip("GPT-2's BPE is not here: python data/poetry/prepare.py")
    (copy / "mine.txt").write_text("\n\n".join(f"line {i} of a text of my own\n" * 40 for i in range(200)))
    env = dict(TIKTOKEN_CACHE_DIR=str(cache))
    python(copy, "data/text/prepare.py", "mine.txt", "--out", "data/mine", "--tokenizer", "gpt2-4096", **env)
    keys = [key for key in TINY if "vocab_size" not in key]
    python(copy, "train.py", "config/muon.py", *keys, "--vocab_size=4096", "--data_dir=data/mine",
           f"--out_dir={copy}/out/r")
    assert study.load_run(copy / "out/r")["status"] == "finished"


def test_frozen_gains_stay_at_one(copy, data):  # noqa: F811
    import torch
    for arm in ("adamw_qk_frozen", "muon_qk_frozen"):
        python(copy, "train.py", f"config/{arm}.py", *TINY, f"--data_dir={data}",
               f"--out_dir={copy}/out/{arm}", "--n_ckpt=1")
        state = torch.load(copy / f"out/{arm}/ckpt_step_20.pt", weights_only=True)["model"]
        gains = [p for name, p in state.items() if "q_norm" in name or "k_norm" in name]
        assert len(gains) == 4 and all((p == 1).all() for p in gains)
        config = json.loads((copy / f"out/{arm}/config.json").read_text())
        assert config["optimizer"] == arm.split("_")[0] and config["qk_norm"] and not config["qk_gain"]


def test_the_readme_names_the_lines_that_are_there():
    """`FILE:LINE` with the text of the line behind it."""
    found = re.findall(r"`([\w/]+\.(?:py|sh)):(\d+)`(?: \(`([^`]+)`\))?", (ROOT / "README.md").read_text())
    assert len(found) >= 6
    for file, number, text in found:
        line = (ROOT / file).read_text().splitlines()[int(number) - 1]
        assert text and text in line, (file, number, line)


def test_scripts_and_data_survive_a_checkout_on_windows():
    """.gitattributes keeps line ends as they are; what bash reads has none of the other kind."""
    assert "eol=lf" in (ROOT / ".gitattributes").read_text()
    for path in [*ROOT.glob("*.sh"), *ROOT.glob("tools/*.sh"), ROOT / ".ci/run"]:
        assert b"\r" not in path.read_bytes() and os.access(path, os.R_OK)
