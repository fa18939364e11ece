"""A study as a post that claims what its runs carry, and no more.

    python report.py out/SCALE                 writes report.md, report.html and experiment_config.md there
    python report.py --check out/SCALE/report.md   the plan's self-review of the edited post
    python report.py --preregister out/SCALE   writes preregistered.json, before the first main run

An edited report.md is never written over: the new draft goes to report.new.md beside it, and report.html
shows the edited one.
"""
import base64
import hashlib
import inspect
import itertools
import json
import re
import sys
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch

import model
import muon
import study
from configurator import ROOT, fail, find
from post import review, stats
from post import text as post
from post.text import FIGURES, PR_DEFINITIONS, join
from study import FACTORIAL, LABELS, SCALES, read_json
from system import write_text

DATA = {"data/fineweb_edu": "FineWeb-Edu, sample-10BT",
        "data/poetry": "Gutenberg Poetry Corpus (English verse, public domain)"}
TOKENIZERS = {50304: "GPT-2 BPE (50,257 ids, the model's table padded to 50,304)",
              4096: "GPT-2 BPE cut after its first merges (4,096 ids)"}


# ---- what is there
def final(run, name):
    """Final value of a run: 'loss' (inf where diverged), 'logit' (the largest over layers and all rows) or
    the mean over layers of what layer_values() takes; nan where the run has none."""
    if name == "loss":
        return np.nan if run["val_loss"] is None else run["val_loss"]
    if name == "logit":
        logits = [x for row in run["rows"] for x in study.layer_values(row, "max_logit") if x is not None]
        return max(logits, default=np.nan)
    values = study.layer_values(run["rows"][-1], name) if run["status"] == "finished" else []
    return float(np.mean(np.array(values or [np.nan], float)))  # None becomes nan


def measure(cell, seeds, arms):
    """y {name: {arm: (n seeds,)}} of final(), nan where a run is missing or unfinished."""
    value = lambda a, s, name: final(cell[a, s], name) if (a, s) in cell else np.nan
    return {name: {a: np.array([value(a, s, name) for s in seeds]) for a in arms}
            for name in ("loss", "logit", "attn_entropy", *PR_DEFINITIONS)}


def beside(S):
    """(near, absent): near {arm: {lr, loss, pr: values at half, once and twice the rate of its main run}} of the
    arms that have all three, and lines on what the stage `neighbours` lacks where it was begun."""
    near, absent = {}, []
    seed = S["neighbours"][0]["config"]["seed"] if S["neighbours"] else None
    have = {(r["config"]["arm"], r["config"]["learning_rate"]): r for r in S["neighbours"]
            if r["config"]["seed"] == seed and r["status"] != "unfinished"}
    for arm in S["arms"]:
        main = S["cell"].get((arm, seed))
        if main and main["status"] != "unfinished":  # else it is named as missing already
            lr = main["config"]["learning_rate"]
            low, high = study.neighbour_lrs(lr)
            runs = {low: have.get((arm, low)), lr: main, high: have.get((arm, high))}
            absent += [f"neighbours run {study.run_name('neighbours', arm, x, seed)}"
                       for x, run in runs.items() if not run]
            if all(runs.values()):
                near[arm] = dict(lr=[*runs], **{m: [final(r, m) for r in runs.values()] for m in post.MEASURES})
    return near, absent


def missing(S):
    """What a whole study would have and this one has not, as two lists of lines: of the 2x2, without which
    there is no verdict, and of other arms."""
    swept = {(r["config"]["arm"], r["config"]["learning_rate"], r["config"]["seed"]): r for r in S["sweep"]}
    out = [], []
    for a in S["arms"]:
        lines = out[a not in FACTORIAL]
        rates = sorted({*study.grid(S["scale"], a), *(lr for b, lr, _ in swept if a == b)})
        seeds = (S["picks"].get(a, {}).get("seeds") or S["registered"].get("sweep_seeds")
                 or study.sweep_seeds(S["scale"]))
        runs = {f"sweep run {study.run_name('sweep', a, lr, s)}": swept.get((a, lr, s))
                for lr, s in itertools.product(rates, seeds)}
        runs |= {f"main run {a}-seed{s}": S["cell"].get((a, s)) for s in S["seeds"]}
        lines += [f"{name}: {'unfinished' if run else 'not started'}" for name, run in runs.items()
                  if not run or run["status"] == "unfinished"]
        lines += [f"{a}: no learning rate chosen"] * (a not in S["picks"])
        lines += [f"evaluation of {name} (results.json)" for s in S["seeds"]
                  if (name := f"{a}-seed{s}") not in S["results"]
                  and S["cell"].get((a, s), {}).get("status") == "finished"]
    return out


def load(study_dir):
    """Everything the report is made from, as a dict; ValueError or OSError in one line where a file is
    damaged."""
    d = Path(study_dir)
    runs, sweep, near = (study.load_runs(d, kind, print) for kind in study.KINDS)
    if not runs and not sweep:
        raise ValueError(f"{d} holds no run: start the study with `bash sweep.sh`, or name another folder")
    S = dict(dir=d, runs=runs, sweep=sweep, neighbours=near, config=(runs or sweep)[0]["config"],
             picks={a: p for a, p in study.chosen(d).items() if a in LABELS},
             results=read_json(d / "results.json", {}).get("runs", {}),
             registered=read_json(d / "preregistered.json", {}))
    S["scale"] = S["config"]["scale"]
    if S["scale"] not in SCALES:
        raise ValueError(f"{d} is of scale {S['scale']}, which study.py does not know: add its row there")
    planned = S["registered"].get("seeds", study.SEEDS)
    S["seeds"] = sorted({*planned, *(r["config"]["seed"] for r in runs)}, key=lambda s: (s not in planned, s))
    due = {*study.arms_of(runs, sweep), *S["registered"].get("arms", []), *FACTORIAL}
    S["arms"] = [a for a in LABELS if a in due]
    S["cell"] = {(r["config"]["arm"], r["config"]["seed"]): r for r in runs}
    of = {r["config"]["arm"]: r["config"] for r in sweep + runs}
    S["configs"] = {a: of.get(a) or study.scale_config(S["scale"], a) for a in S["arms"]}
    S["y"] = measure(S["cell"], S["seeds"], S["arms"])
    S["diverged"] = {a: k for a in FACTORIAL if (k := int(np.isinf(S["y"]["loss"][a]).sum()))}
    S["missing"], others = missing(S)
    S["near"], late = beside(S)
    S["absent"] = others + late + [f"figure {name}: run `python plot.py {d}`" for name in FIGURES
                                   if not (d / f"figures/{name}.png").exists()]
    if S["missing"]:
        fact = f"{len(S['missing'])} parts are missing, named at the top"
        S["verdict"] = "no verdict", [("any", "a whole study", False, fact)], {}
    else:
        S["verdict"] = stats.verdict(S["y"], S["diverged"], head_dim=study.head_dim(S["config"]))
    S["rates"] = post.rate_states(S["near"], S["verdict"][2])
    S["title"], S["registration"] = post.title(S), registration_state(S)
    S["experiment_config"] = experiment_config(S["config"], S["configs"], runs)
    return S


# ---- registration
def registration(scale, arms, seeds, sweep_seeds):
    """What is fixed before the first main run."""
    files = ["post/stats.py", f"config/{scale}.py", *(f"config/{a}.py" for a in arms)]
    return dict(
        scale=scale, arms=arms, seeds=seeds, sweep_seeds=sweep_seeds,
        grids={a: study.grid(scale, a) for a in arms}, sweep_tokens=SCALES[scale]["sweep_tokens"],
        grid_rule=f"lowest final val loss wins, the mean over the sweep's seeds; a winner at an edge gets "
                  f"points a factor of two further out, up to {study.MAX_EXTENSIONS} a side",
        neighbours_rule="where every arm of the 2x2 was also trained at half and at twice its rate, a "
                        "headline is made of those contrasts alone whose sign holds when each arm is given "
                        "any of its three rates",
        measures={"loss": "final val loss, nats a token",
                  "pr": "mean_pr at the end, mean over heads and layers"},
        contrasts=stats.CONTRASTS, alpha=stats.ALPHA, statistics=" ".join(stats.__doc__.split()),
        thresholds=dict(loss_margin=stats.LOSS_MARGIN, pr_margin=stats.PR_MARGIN, collapse=stats.COLLAPSE,
                        caution=stats.CAUTION, max_logit=study.LOGIT_FLAG),
        scenarios=stats.SCENARIOS,
        scenario_order="A, C, B, D: the first whose conditions all hold; otherwise none of the four",
        pr_definitions=PR_DEFINITIONS, pr_rule=f"a PR claim has to hold in sign under {join(stats.PR_NAMES)}",
        sha256={f: hashlib.sha256((ROOT / f).read_bytes()).hexdigest() for f in files if (ROOT / f).exists()})


def preregister(study_dir):
    """Write preregistered.json unless it is there. ValueError for a folder that is no study's."""
    d = find(study_dir) if find(study_dir).exists() else ROOT / study_dir
    scale, path = d.resolve().name, d / "preregistered.json"
    if scale not in SCALES or d.resolve().parent.name != "out":
        raise ValueError(f"{study_dir} is no out/SCALE of a known scale ({join(SCALES)}): nothing was "
                         "registered")
    if path.exists():
        print(f"{path} is there: nothing to do")
        return
    begun = sorted(r["dir"].name for r in study.load_runs(d, say=print))
    arms = [a for a in LABELS if a in FACTORIAL or a in study.ARMS]
    fixed = registration(scale, arms, study.SEEDS, study.sweep_seeds(scale))
    d.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(fixed | dict(written=datetime.now(timezone.utc).isoformat(timespec="seconds"),
                                             main_runs_begun=begun), indent=1) + "\n")
    print(f"{path}: contrasts, thresholds, seeds and grids are written down" +
          (f", AFTER {len(begun)} main runs began" if begun else ""))


def registration_state(S):
    """Sentences on whether the study was done as registered."""
    old = S["registered"]
    if not old:
        return ("Nothing was registered: `preregistered.json` is not there, so the contrasts may have been "
                "chosen with the results in reach.")
    begun, arms, seeds = len(old["main_runs_begun"]), old["arms"], old["sweep_seeds"]
    now = registration(S["scale"], arms, old["seeds"], seeds)
    changed = [k.replace("_", " ") for k in now if k != "sha256" and old.get(k) != now[k]]
    then, files = old["sha256"], now["sha256"]
    edited = [f"`{f}`" for f in then | files if then.get(f) != files.get(f)]
    added = [LABELS[a] for a in S["arms"] if a not in arms]
    ran = sorted({r["config"]["seed"] for r in S["sweep"]})
    return join(filter(None, [
        f"`preregistered.json` was written {old['written']}, " +
        (f"after {begun} main runs had begun." if begun else "before the first main run."),
        f"Since then changed: {join(changed)}." if changed else
        "Contrasts, thresholds, seeds, grids and the definitions of PR are unchanged.",
        edited and f"Not the registered file, to the byte: {join(edited)}.",
        added and f"Arms that were not registered: {join(added, '; ')}.",
        ran and ran != sorted(seeds) and
        f"Registered seeds of the sweep: {join(seeds)}; of its runs: {join(ran)}.",
        {*S["seeds"]} != {*old["seeds"]} and
        f"Registered seeds: {join(old['seeds'])}; seeds in this report: {join(S['seeds'])}. Seeds added after "
        f"a first look make the intervals too narrow."]), " ")


# ---- experiment_config.md
def qk_norm_placement():
    """Where Attention.qkv normalises, measured: what it returns for random input and uneven gains against
    both orders."""
    torch.manual_seed(0)
    attn = model.Attention(model.gpt_config(dict(n_head=2, n_embd=16, qk_norm=True)))
    for norm in (attn.q_norm, attn.k_norm):
        torch.nn.init.uniform_(norm.weight, 0.5, 2)
    x, (cos, sin) = torch.randn(1, 6, 16), model.rope_table(6, 8)
    q, k, _ = attn.qkv(x, cos, sin)
    rope = lambda t: model.apply_rope(t, cos, sin)
    raw = [proj(x).unflatten(-1, (2, 8)).transpose(1, 2) for proj in (attn.q_proj, attn.k_proj)]
    orders = {"before RoPE": [rope(attn.q_norm(raw[0])), rope(attn.k_norm(raw[1]))],
              "after RoPE": [attn.q_norm(rope(raw[0])), attn.k_norm(rope(raw[1]))]}
    return next((name for name, (a, b) in orders.items() if torch.allclose(a, q, atol=1e-5) and
                 torch.allclose(b, k, atol=1e-5)), "not a known one: see Attention.qkv")


def experiment_config(c, configs, runs=()):
    """experiment_config.md, every field of step 1, from config keys c, the arms' configs {arm: keys} and the
    code at hand, with a sentence where that is not the code of the runs."""
    code = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("model.py", "train.py", "muon.py")}
    steps, data, top = c["max_tokens"] // c["batch_tokens"], c.get("data") or {}, study.head_dim(c)
    gains = 2 * c["n_layer"] * top
    with torch.device("meta"):
        params = model.GPT(model.gpt_config(dict(c, qk_norm=False))).num_params()
    said = re.search(r'^def lr_at\(.*\n    """([^."]*)', code["train.py"], re.M)  # its first sentence
    valued = lambda m: f"{m[0]} ({c[m[0]]:g})" if isinstance(c.get(m[0]), float) else m[0]
    schedule = re.sub(r"\w+", valued, " ".join(said[1].split())) if said else "see lr_at in train.py"
    momentum = inspect.signature(muon.Muon).parameters["momentum"].default
    times = re.search(r'alpha=-group\["lr"\] \* (.*)\)', code["muon.py"])
    how = {"adamw": f"AdamW (betas {c['beta1']:g}, {c['beta2']:g}) on everything",
           "muon": f"Muon (momentum {momentum:g}, Nesterov, {muon.NS_STEPS} Newton-Schulz steps, update "
                   f"times {times[1] if times else 'see muon.py'}) on hidden matrices and AdamW on the rest"}
    optimizers = dict.fromkeys(keys["optimizer"] for keys in configs.values())
    frozen = [LABELS[a] for a, keys in configs.items() if keys["qk_norm"] and not keys["qk_gain"]]
    fields = {
        "Model": f"LLaMA-style decoder: RMSNorm (eps {model.NORM_EPS:g}), RoPE (theta "
                 f"{model.ROPE_THETA:,.0f}, half-split), SwiGLU, tied embeddings, no biases, no dropout",
        "Parameters": f"{params:,} ({gains:,} more with QK-Norm)",
        "Layers": c["n_layer"], "Heads": c["n_head"], "Head dim": top,
        "Model width": c["n_embd"], "FFN width": c["ffn_dim"], "Vocab size": f"{c['vocab_size']:,}",
        "Context length": c["block_size"],
        "Dataset": data.get("source") or DATA.get(c["data_dir"], c["data_dir"]),
        "Tokenizer": TOKENIZERS.get(c["vocab_size"]) or data.get("tokenizer") or f"{c['vocab_size']:,} ids",
        "QK-Norm type": "RMSNorm per head over the head dim, one learnable gain for q and one for k, shared "
                        "by the heads" + f"; gains frozen at one in {join(frozen, ' and ')}" * bool(frozen),
        "QK-Norm placement": qk_norm_placement(),
        "Weight decay": f"{c['weight_decay']:g}, decoupled, on hidden matrices only",
        "Batch size": f"{c['batch_tokens']:,} tokens ({c['batch_tokens'] // c['block_size']} sequences)",
        "Warmup steps": f"{round(c['warmup_frac'] * steps)} of {steps:,} (linear, {c['warmup_frac']:.0%} of "
                        f"each run's own budget)",
        "LR schedule": schedule,
        "Gradient clipping": f"{c['grad_clip']:g}, global norm" if c["grad_clip"] else "none",
        "Optimizers": join((how.get(o, f"{o} (see train.py)") for o in optimizers), "; or ") +
        "; one learning rate for all groups" +
        f", times {c['embed_lr_scale']:g} for embeddings, norms and gains" * (c["embed_lr_scale"] != 1),
        "Training tokens": f"{c['max_tokens']:,} a main run ({c['max_tokens'] / params:.2g} a parameter)",
        "Validation tokens": f"{c['eval_tokens'] or data.get('val_tokens') or 5_000_000:,}, the same every "
                             f"time, never trained on",
        "Probe tokens": f"{c['probe_tokens'] // c['block_size'] * c['block_size']:,} of the validation set",
        "Precision": {"float32": "float32", "bfloat16": "bfloat16 autocast over float32 weights",
                      "auto": "bfloat16 autocast over float32 weights where the device multiplies bfloat16 "
                              "in hardware, else float32"}[c["dtype"]]}
    lines = ["# Experiment configuration", "", "```", *(f"{k}: {v}" for k, v in fields.items()), "```", ""]
    snapshots = [(name, r["dir"] / "source" / name) for r in runs for name in code]
    if differ := sorted({name for name, path in snapshots
                         if path.exists() and path.read_text(encoding="utf-8") != code[name]}):
        lines += [f"The code at hand, which this is read from, is not that of the runs: their `source/` has "
                  f"another {join(differ, ' and ')}.", ""]
    return join(lines, "\n")


# ---- files
CSS = """
body { margin: auto; max-width: 57rem; padding: 2rem; font: 1.05rem/1.6 system-ui, sans-serif }
img { display: block; max-width: 100%; margin: auto }
table { display: block; overflow-x: auto; border-collapse: collapse; font-size: .8rem }
th, td { padding: .4rem .5rem; border-bottom: 1px solid #d8dee4; text-align: left }
td[style*=right] { white-space: nowrap; font-variant-numeric: tabular-nums }
blockquote { margin: 1rem 0; padding: .5rem 1rem; border-left: 4px solid #9a6700; background: #fff8e5 }
pre { white-space: pre-wrap }
@media print { body { padding: 0; font-size: 10pt } img { max-height: 11cm }
  table { display: table; font-size: 6.5pt } th, td { padding: .15rem .25rem } }
"""


def html(text, study_dir):
    """One self-contained page of a Markdown post: figures become data URIs."""
    import markdown

    def inline(match):
        path = (study_dir / match[1]).with_suffix(".png")
        data = path.exists() and base64.b64encode(path.read_bytes()).decode()
        return f'src="data:image/png;base64,{data}"' if data else match[0]

    heading = re.search(r"^# (.*)", text, re.M)
    body = markdown.markdown(text, extensions=["tables", "fenced_code", "sane_lists"])
    return (f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{heading[1] if heading else 'Report'}</title>\n<style>{CSS}</style>\n" +
            re.sub(r'src="(figures/[^"]+)"', inline, body) + "\n")


def stamp(text):
    """The last line of a draft: while it fits the text above, nobody has edited it."""
    return f"\n<!-- draft {hashlib.sha256(text.encode()).hexdigest()[:16]} -->\n"


def report(study_dir):
    """Write the report's three files; an edited report.md stays. Prints what is missing, the verdict and the
    results."""
    S = load(study_dir)
    path, text = S["dir"] / "report.md", post.build(S)
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    above, mark, _ = old.rpartition("\n<!-- draft ")
    edited = bool(old) and (not mark or old != above + stamp(above))
    draft = path.with_name("report.new.md") if edited else path
    write_text(draft, text + stamp(text))
    write_text(S["dir"] / "experiment_config.md", S["experiment_config"])
    write_text(S["dir"] / "report.html", html(old if edited else text, S["dir"]))
    for line in S["missing"] + S["absent"]:
        print(f"missing: {line}")
    for arm in S["arms"]:
        loss, pr = (post.over_seeds(S["y"], name, arm) for name in ("loss", "pr"))
        print(f"{LABELS[arm]:<24} val loss {loss:<16} mean PR {pr}")
    print(f"verdict: {S['verdict'][0]}. {S['title']}")
    print(f"{path} has been edited and stays; the new draft is {draft.name} beside it" if edited else
          f"the post: {path}")
    print(f"to read in a browser or print: {path.with_suffix('.html')}; figures: {S['dir'] / 'figures'}")


def main(args):
    try:
        match args:
            case ["--check", name]:
                path = find(name)
                sys.exit(review.check(path, load(path.parent)))
            case ["--preregister", name]:
                preregister(name)
            case [name] if not name.startswith("-"):
                report(find(name))
            case _:
                fail("usage: python report.py out/SCALE, or --check out/SCALE/report.md, "
                     "--preregister out/SCALE")
    except (ValueError, OSError) as e:
        fail(e)


if __name__ == "__main__":
    main(sys.argv[1:])
