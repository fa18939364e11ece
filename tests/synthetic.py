"""Test helper: synthetic studies with known results, in memory as study.py loads them or as the files that
the scripts write. Only tests use it; no number of it comes from a model.

The last row of a main run carries its arm's value plus normal noise: a test sets the truth and the spread
over seeds. """
import functools
import json
import math
from pathlib import Path

import numpy as np

from study import FACTORIAL, LABELS, SCALES, grid, neighbour_lrs, run_name, scale_config, winner

TRUTH = {  # final values of a main run: loss in nats, participation ratios of 64
    "adamw": dict(loss=3.62, pr=24.0, max_logit=30.0, attn_entropy=3.1),
    "adamw_qk": dict(loss=3.58, pr=33.0, max_logit=9.0, attn_entropy=3.4),
    "muon": dict(loss=3.50, pr=47.0, max_logit=14.0, attn_entropy=3.6),
    "muon_qk": dict(loss=3.51, pr=42.0, max_logit=8.5, attn_entropy=3.7),
}
OTHERS = dict(loss=3.55, pr=38.0, max_logit=8.0, attn_entropy=3.5)  # of an arm that is not in TRUTH
SHARE_OF_PR = dict(pr_centered=0.75, pr_pre_rope=0.85, pr_weight=0.7)  # of pr, where an arm does not give its own
NOISE = dict(loss=0.01, pr=0.5, pr_centered=0.5, pr_pre_rope=0.5, pr_weight=0.5, attn_entropy=0.02, max_logit=0.3)
LAYERED = ["pr", "pr_centered", "pr_pre_rope", "pr_weight", "attn_entropy", "max_logit"]


def geometric(pr, n, power):
    """Singular values (n,) float32 1, q, q^2, ... with participation ratio `pr`: PR1 at power 1, PR2 at power
    2."""
    low, high = 0.0, 1.0 - 1e-12
    for _ in range(60):  # bisection on q^power; the ratio rises with q
        q = (low + high) / 2
        low, high = (q, high) if (1 + q) * (1 - q**n) / ((1 - q) * (1 + q**n)) < pr else (low, q)
    return (q ** (np.arange(n) / power)).astype(np.float32)


@functools.lru_cache
def scale_keys(scale, arm):
    """All keys of train.py at a scale and arm, read once: 2,000 studies ask for the same few."""
    return scale_config(scale, arm)


def make_config(scale, arm, seed, lr, sweep=False, n_layer=None):
    """The content of a run's config.json."""
    c = dict(scale_keys(scale, arm), seed=seed, learning_rate=lr)
    c["n_layer"] = n_layer or c["n_layer"]
    if sweep:
        c.update(max_tokens=SCALES[scale]["sweep_tokens"], n_ckpt=0)
    matrices = c["n_layer"] * (4 * c["n_embd"] ** 2 + 3 * c["n_embd"] * c["ffn_dim"]) + c["vocab_size"] * c["n_embd"]
    gains = (2 * c["n_layer"] + 1) * c["n_embd"] + 2 * c["n_layer"] * c["qk_norm"] * (c["n_embd"] // c["n_head"])
    data = dict(tokenizer="gpt2", vocab_size=c["vocab_size"], eot=0, source="synthetic", train_tokens=c["max_tokens"],
                train_documents=1000, train_bytes=3 * c["max_tokens"], train_sha256="0" * 64, val_tokens=100_000,
                val_documents=10, val_bytes=300_000, val_sha256="0" * 64, split="none", settings={}, command="none")
    return dict(c, data=data, num_params=matrices + gains)


def log_steps(config):
    """Steps with a row, and the token checkpoints among them, both ascending."""
    last, n = config["max_tokens"] // config["batch_tokens"], config["n_ckpt"]
    ckpts = [config["max_tokens"] * k // n // config["batch_tokens"] for k in range(1, n + 1)]
    return sorted({*range(0, last, config["log_interval"]), *ckpts, last}), ckpts


def make_run(config, final, end="finished", rng=0):
    """One run as study.load_run() gives it, but with dir None. final: {"loss", "pr", ...} of its last row.
    end: 'finished', 'diverged' or 'unfinished'; the latter two stop at 60 % of the steps."""
    rng = np.random.default_rng(rng)
    steps, ckpts = log_steps(config)
    n, layers = steps[-1], config["n_layer"]
    if end != "finished":
        steps, ckpts = [s for s in steps if s <= 0.6 * n], [s for s in ckpts if s <= 0.6 * n]
    x = np.array(steps) / n
    fall = ((1 + 60 * x) ** -0.7 - 61**-0.7) / (1 - 61**-0.7)  # 1 at step 0, 0 at the end of the budget
    wiggle = 0.02 * np.sin(np.pi * x) * rng.standard_normal(len(x))
    val_loss = final["loss"] + (math.log(config["vocab_size"]) - final["loss"]) * fall + wiggle
    start = dict(pr=56.0, pr_centered=52.0, pr_pre_rope=54.0, pr_weight=48.0, attn_entropy=4.5, max_logit=1.0)
    depth = np.linspace(-0.2, 0.2, layers) if layers > 1 else np.zeros(1)  # of the mean, which it leaves as it is
    columns = [(start[k] * fall[:, None] + final[k] * (1 + depth) * (1 - fall[:, None])) for k in LAYERED]
    names = [f"{k}_layer_{i}" for k in LAYERED for i in range(layers)]
    rows = []
    for j, (step, values) in enumerate(zip(steps, np.hstack(columns).tolist())):
        warm = min(1.0, x[j] / config["warmup_frac"])
        rows.append(dict(
            step=step, tokens=step * config["batch_tokens"], lr=config["learning_rate"] * warm * (1 - 0.9 * x[j]),
            grad_norm=0.5 if step else None, tokens_per_s=25_000.0 if step else None,
            train_loss=float(val_loss[j]) - 0.02 if step else None, val_loss=float(val_loss[j]),
            mean_pr=sum(values[:layers]) / layers, **dict(zip(names, values))))
    by_step, events, before = {r["step"]: r for r in rows}, [], rows[0]
    logit = lambda row: max(row[f"max_logit_layer_{i}"] for i in range(layers))
    for step in ckpts:
        row = by_step[step]
        falling = row["val_loss"] < before["val_loss"]
        events.append(dict(event="spot_check", step=step, tokens=row["tokens"], val_loss=row["val_loss"],
                           falling=falling, nan=False, mean_pr=row["mean_pr"], mean_pr_before=before["mean_pr"],
                           max_logit=logit(row), max_logit_before=logit(before),
                           flags=[] if falling else ["val loss not falling"]))
        before = row
    if end != "unfinished":
        events.append(dict(event=end, step=steps[-1], tokens=rows[-1]["tokens"]))
    loss = {"finished": rows[-1]["val_loss"], "diverged": math.inf}.get(end)
    return dict(dir=None, config=config, rows=rows, events=events, status=end, val_loss=loss)


def study(arms={}, seeds=(42, 137), n_layer=None, scale="mini", noise={}, diverged=(), unfinished=(), absent=(),
          unbracketed=(), sweep_seeds=(1,), rng=0):
    """A whole study in memory: (main runs, sweep runs, chosen), as study.load_runs(d), load_runs(d, "sweep")
    and chosen(d) give them, except that `dir` is the run's folder below the study's.

    arms: {arm: {"loss", "pr", "pr_centered", ...}} over TRUTH; an arm that is not in the 2x2 is added by
    naming it here. noise: standard deviations over seeds, over NOISE; a value may be {arm: number}. diverged,
    unfinished, absent: run names such as 'muon-seed42' or 'adamw-lr0.001', or an arm's name for all of its
    main runs. unbracketed: arms whose best learning rate lies beyond the grid. With several sweep_seeds sweep
    runs have the noise too. rng: a seed or a numpy Generator."""
    rng = np.random.default_rng(rng)
    sd = {**NOISE, **noise}
    main, sweep, chosen = [], [], {}

    def end(*names):
        named = [how for how, which in (("diverged", diverged), ("unfinished", unfinished)) if set(names) & set(which)]
        return (named or ["finished"])[0]

    def draw(name, arm):
        return (sd[name].get(arm, NOISE[name]) if isinstance(sd[name], dict) else sd[name]) * rng.standard_normal()

    for arm in [a for a in LABELS if a in FACTORIAL or a in arms]:
        truth = {**TRUTH.get(arm, OTHERS), **arms.get(arm, {})}
        truth.update({k: truth["pr"] * share for k, share in SHARE_OF_PR.items() if k not in truth})
        results, rates = {}, grid(scale, arm)
        best = rates[-1] * 4 if arm in unbracketed else rates[2] * 1.2
        for lr, seed in [(lr, seed) for lr in rates for seed in sweep_seeds]:
            name = run_name("sweep", arm, lr, seed)
            if name in absent:
                continue
            loss = truth["loss"] + 0.5 + 0.06 * math.log2(lr / best) ** 2
            loss += draw("loss", arm) if len(sweep_seeds) > 1 else 0
            final = {**truth, "loss": loss, "pr": truth["pr"] * (lr / rates[0]) ** -0.1}
            run = make_run(make_config(scale, arm, seed, lr, True, n_layer), final, end(name), rng)
            sweep.append({**run, "dir": Path("sweep") / name})
            results.setdefault(lr, {})[seed] = run["val_loss"]
        lost = [loss for losses in results.values() for loss in losses.values() if loss is None]
        if results and not lost:
            lr, bracketed, tie = winner(results)
            mean = {x: float(np.mean(list(losses.values()))) for x, losses in results.items()}
            finite = lambda x: x if math.isfinite(x) else None
            chosen[arm] = dict(
                lr=lr, val_loss=mean[lr], bracketed=bracketed, tie=tie, seeds=list(sweep_seeds),
                tokens=SCALES[scale]["sweep_tokens"],
                tried=[dict(lr=x, val_loss=finite(mean[x]), status="finished" if finite(mean[x]) else "diverged",
                            val_losses=[finite(v) for v in results[x].values()]) for x in sorted(results)])
        for seed in sorted(seeds):
            name = f"{arm}-seed{seed}"
            final = {k: v + draw(k, arm) for k, v in truth.items()}
            if not {name, arm} & set(absent):
                lr = chosen[arm]["lr"] if arm in chosen else rates[2]
                run = make_run(make_config(scale, arm, seed, lr, False, n_layer), final, end(name, arm), rng)
                main.append({**run, "dir": Path(name)})
    return main, sweep, chosen


def neighbours(main, seed, change={}, diverged=()):
    """Runs of the stage `neighbours` beside the main runs of a seed: at half and at twice the rate. change:
    {arm: (what is added to the loss at half the rate, at twice)}; mean PR falls by a twentieth from rate to
    rate. diverged: run names such as 'muon-lr0.032'."""
    runs = []
    for r in (r for r in main if r["config"]["seed"] == seed and r["status"] == "finished"):
        c, last = r["config"], r["rows"][-1]
        for lr, more, times in zip(neighbour_lrs(c["learning_rate"]), change.get(c["arm"], (0.03, 0.02)), (1.05, 0.95)):
            name = run_name("neighbours", c["arm"], lr, seed)
            final = {k: np.mean([last[f"{k}_layer_{i}"] for i in range(c["n_layer"])]) for k in LAYERED}
            final = {k: v * (times if k.startswith("pr") else 1) for k, v in final.items()}
            run = make_run(dict(c, learning_rate=lr, n_ckpt=0), dict(final, loss=r["val_loss"] + more),
                           "diverged" if name in diverged else "finished")
            runs.append({**run, "dir": Path("neighbours") / name})
    return runs


def make_study(study_dir, spectra=True, beside=None, **kw):
    """Write study(**kw) under study_dir as the scripts do: config.json, log.jsonl and, with spectra, sv_*.npy
    of each main run, and chosen_lr.json. No checkpoints. beside: arguments of neighbours() as a dict, {} for its
    defaults; without it that stage was not run. Returns study_dir as a Path."""
    study_dir = Path(study_dir)
    main, sweep, chosen = study(**kw)
    near = [] if beside is None else neighbours(main, kw.get("seeds", (42, 137))[0], **beside)
    for run in main + sweep + near:
        folder, config = study_dir / run["dir"], run["config"]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps({**config, "out_dir": str(folder)}, indent=1))
        # a spot check comes before the row of its step, the end of the run after it
        order = {"spot_check": 0, "row": 1, "finished": 2, "diverged": 2}
        lines = sorted(run["rows"] + run["events"], key=lambda r: (r["step"], order[r.get("event", "row")]))
        (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        kept = {0, run["rows"][-1]["step"], *log_steps(config)[1]}
        for row in run["rows"] if spectra and run["dir"].parent == Path() else []:  # nothing reads a sweep run's
            if row["step"] in kept or row["step"] % config["sv_interval"] == 0:
                for i in range(config["n_layer"]):
                    for name, key, power in ("sv", "pr", 1), ("sv_weight", "pr_weight", 2):
                        s = geometric(row[f"{key}_layer_{i}"], config["n_embd"] // config["n_head"], power)
                        heads = np.arange(1, config["n_head"] + 1, dtype=np.float32)  # a scale leaves PR as it is
                        np.save(folder / f"{name}_layer_{i}_step_{row['step']}.npy", np.outer(heads, s))
    if chosen:
        study_dir.mkdir(parents=True, exist_ok=True)
        (study_dir / "chosen_lr.json").write_text(json.dumps(chosen, indent=1))
    return study_dir
