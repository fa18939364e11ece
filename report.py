"""A study as a post that claims what its runs carry, and no more.

    python report.py out/SCALE                 writes report.md, report.html and experiment_config.md there
    python report.py --check out/SCALE/report.md   the plan's self-review of the edited post
    python report.py --preregister out/SCALE   writes preregistered.json, before the first main run
    python report.py --config SCALE            prints experiment_config.md of a scale

An edited report.md is never written over: the new draft goes to report.new.md beside it, and report.html
shows the edited one. """
import ast
import base64
import hashlib
import json
import re
import sys
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch

import model
import study
from configurator import ROOT, assignments, fail, find, resolve
from post import review, stats
from post import text as post
from post.text import FIGURES, PR_DEFINITIONS, join, last
from study import FACTORIAL, LABELS, SCALES, read_json
from system import write_text

DATA = {"data/fineweb_edu": "FineWeb-Edu, sample-10BT",
        "data/poetry": "Gutenberg Poetry Corpus (English verse, public domain)"}
TOKENIZERS = {50304: "GPT-2 BPE (50,257 ids, the model's table padded to 50,304)",
              4096: "GPT-2 BPE cut after its first merges (4,096 ids)"}


# ---- what is there
def measure(runs, seeds, arms):
    """y {name: {arm: (n seeds,)}} of the runs' final values, nan where a run is missing or unfinished."""
    cell = {(r["config"]["arm"], r["config"]["seed"]): r for r in runs}
    value = lambda a, s, name: last(cell[a, s], name) if (a, s) in cell else np.nan
    return {name: {a: np.array([value(a, s, name) for s in seeds]) for a in arms}
            for name in ("loss", "logit", "attn_entropy", *PR_DEFINITIONS)}


def evaluated(path):
    """{run name: its evaluations} of results.json, {} where there is none."""
    runs = read_json(path, {}).get("runs", {})
    if not isinstance(runs, dict) or not all(isinstance(r, dict) for r in runs.values()):
        raise ValueError(f"{path} holds no evaluations: delete it and run evaluate.py again")
    return runs


def registered(path):
    """preregistered.json, {} where there is none."""
    old = read_json(path, {})
    if old and not {"written", "seeds", "main_runs_begun"} <= old.keys() or path.exists() and not old:
        raise ValueError(f"{path} holds no registration: restore it, or delete it and say so in the post")
    return old


def beside(S):
    """(near, absent): near {arm: {lr, loss, pr: values at half, once and twice the rate of its main runs,
    seed}} of the arms that have all three, and lines on what the stage `neighbours` lacks where it was
    begun."""
    seed = S["neighbours"][0]["config"]["seed"] if S["neighbours"] else None
    have = {(r["config"]["arm"], r["config"]["learning_rate"]): r for r in S["neighbours"]
            if r["config"]["seed"] == seed}
    near, absent = {}, []
    for arm in S["arms"] if have else []:
        main = S["cell"].get((arm, seed))
        lr = main["config"]["learning_rate"] if main else S["picks"].get(arm, {}).get("lr")
        if lr is None:  # named as missing already
            continue
        low, high = study.neighbour_lrs(lr)
        runs = [have.get((arm, low)), main, have.get((arm, high))]
        late = [study.run_name("neighbours", arm, x, seed) for x, r in ((low, runs[0]), (high, runs[2]))
                if not r or r["status"] == "unfinished"]
        absent += [f"neighbours run {name}" for name in late]
        if not late and main and main["status"] != "unfinished":
            near[arm] = dict(lr=[low, lr, high], seed=seed, loss=[last(r, "loss") for r in runs],
                             pr=[last(r, "pr") for r in runs])
    return near, absent


def load(study_dir):
    """Everything the report is made from, as a dict; ValueError or OSError in one line where a file is
    damaged."""
    d, left_out = Path(study_dir), []
    runs, sweep, near = (study.load_runs(d, kind, left_out.append) for kind in study.KINDS)
    S = dict(dir=d, runs=runs, sweep=sweep, neighbours=near, picks=study.chosen(d),
             transfer=any(d.glob("transfer/*")),
             results=evaluated(d / "results.json"), registered=registered(d / "preregistered.json"),
             left_out=[line.removeprefix(f"{d}/") for line in left_out])
    if not runs and not sweep:
        raise ValueError(f"{d} holds no run: start the study with `bash sweep.sh`, or name another folder" +
                         (f" ({left_out[0]})" if left_out else ""))
    planned = S["registered"].get("seeds", study.SEEDS)
    S["seeds"] = sorted({*planned, *(r["config"]["seed"] for r in runs)}, key=lambda s: (s not in planned, s))
    S["config"] = (runs or sweep)[0]["config"]
    S["scale"] = S["config"]["scale"]
    have = {r["config"]["arm"] for r in runs + sweep}
    due = {*have, *study.ARMS, *S["registered"].get("arms", []), *FACTORIAL}
    S["arms"] = [a for a in LABELS if a in due]
    S["cell"] = {(r["config"]["arm"], r["config"]["seed"]): r for r in runs}
    of = {r["config"]["arm"]: r["config"] for r in sweep + runs}
    keys = lambda a: {k: v for k, v, *_ in assignments(ROOT / f"config/{a}.py")}  # of an arm that no run is of
    S["configs"] = {a: of.get(a) or S["config"] | keys(a) for a in S["arms"]}
    S["y"] = measure(runs, S["seeds"], S["arms"])
    S["diverged"] = {a: k for a in FACTORIAL if (k := int(np.isinf(S["y"]["loss"][a]).sum()))}
    S["missing"], others = missing(S)
    S["near"], late = beside(S)
    S["absent"] = others + late + [f"figure {name}: run `python plot.py {d}`" for name in FIGURES[:6]
                                   if not (d / f"figures/{name}.png").exists()]
    if S["missing"]:
        fact = f"{len(S['missing'])} parts are missing, named at the top"
        S["verdict"] = "no verdict", [("any", "a whole study", False, fact)], {}
    else:
        S["verdict"] = stats.verdict(S["y"], S["diverged"], head_dim=study.head_dim(S["config"]))
    S["rates"] = post.rate_states(S["near"], S["verdict"][2])
    S["title"], S["registration"] = post.title(S), registration_state(S)
    lrs = "; ".join(f"{LABELS[a]} {S['picks'][a]['lr']:g}" for a in S["arms"] if a in S["picks"])
    S["experiment_config"] = experiment_config(S["config"], S["configs"], runs[0]["dir"] if runs else None,
                                               f"chosen: {lrs}" if lrs else None)
    return S


def missing(S):
    """What a whole study would have and this one has not, as two lists of lines: of the 2x2, without which
    there is no verdict, and of other arms."""
    key = lambda c: (c["arm"], c["learning_rate"], c["seed"])
    swept = {key(r["config"]): r["status"] for r in S["sweep"]}
    out = [], []
    for a in S["arms"]:
        lines = out[a not in FACTORIAL]
        rates = study.grid(S["scale"], a) if a in SCALES.get(S["scale"], {}).get("grids", {}) else []
        for lr in sorted({*rates, *(v for b, v, _ in swept if a == b)}):
            for seed in sweep_seeds(S, a):
                if (status := swept.get((a, lr, seed), "not started")) in ("not started", "unfinished"):
                    lines.append(f"sweep run {study.run_name('sweep', a, lr, seed)}: {status}")
        lines += [f"{a}: no learning rate chosen"] * (a not in S["picks"])
        for s in S["seeds"]:
            status = S["cell"][a, s]["status"] if (a, s) in S["cell"] else "not started"
            if status in ("not started", "unfinished"):
                lines.append(f"main run {a}-seed{s}: {status}")
            elif status == "finished" and f"{a}-seed{s}" not in S["results"]:
                lines.append(f"evaluation of {a}-seed{s} (results.json)")
    return out


def sweep_seeds(S, arm):
    """Seeds that an arm's sweep has or should have: of its choice, else as registered, else of its runs."""
    old = S["registered"]
    seeds = S["picks"].get(arm, {}).get("seeds") or old.get("sweep_seeds")
    seeds = seeds or [old[k] for k in ("sweep_seed",) if k in old]
    return seeds or sorted({r["config"]["seed"] for r in S["sweep"]}) or [study.FIRST_SWEEP_SEED]


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
        measures={"loss": "final val loss, nats a token", "pr": "mean_pr at the end, mean over heads and "
                                                                "layers"},
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
    scale = d.resolve().name
    if scale not in SCALES or d.resolve().parent.name != "out":
        raise ValueError(f"{study_dir} is no out/SCALE of a known scale ({join(SCALES)}): nothing was "
                         "registered")
    path = d / "preregistered.json"
    if registered(path):
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
    arms = [a for a in old.get("arms", FACTORIAL) if a in LABELS]
    known = S["scale"] in SCALES and all(a in SCALES[S["scale"]]["grids"] for a in arms)
    now = registration(S["scale"], arms, old["seeds"], old.get("sweep_seeds")) if known else {}
    now = json.loads(json.dumps(now))
    files, then = now.pop("sha256", {}), old.get("sha256", {"post/stats.py": old.get("stats_sha256")})
    begun = old["main_runs_begun"]
    new = [k.replace("_", " ") for k in now if k not in old]
    changed = [k.replace("_", " ") for k in now if k in old and old[k] != now[k]]
    edited = [f"`{f}`" for f, digest in then.items() if files.get(f) != digest]
    ran = sorted({r["config"]["seed"] for r in S["sweep"]})
    due = old.get("sweep_seeds", [old["sweep_seed"]] if "sweep_seed" in old else ran)
    extra = [LABELS[a] for a in S["arms"] if a not in arms]
    words = [f"`preregistered.json` was written {old['written']}, " +
             (f"after {len(begun)} main runs had begun." if begun else "before the first main run."),
             f"Since then changed: {join(changed)}." if changed else
             "Contrasts, thresholds, seeds, grids and the definitions of PR are unchanged." if known else
             f"The scale {S['scale']} is no more in study.py, so what changed since is not known."]
    words += [f"Not in it, because it was written by an older version: {join(new)}."] * bool(new)
    words += [f"Not the registered file, to the byte: {join(edited)}."] * bool(edited and known)
    words += [f"Arms that were not registered: {join(extra, '; ')}."] * bool(extra)
    if ran and ran != sorted(due):
        words.append(f"Registered seeds of the sweep: {join(due)}; of its runs: {join(ran)}.")
    if set(S["seeds"]) != set(old["seeds"]):
        words.append(f"Registered seeds: {join(old['seeds'])}; seeds in this report: {join(S['seeds'])}. "
                     f"Seeds added after a first look make the intervals too narrow.")
    return " ".join(words)


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


def experiment_config(c, configs, run_dir=None, learning_rates=None):
    """experiment_config.md, every field of step 1, from config keys c, the arms' configs {arm: keys}, and the
    source: the run's own snapshot where run_dir has one."""
    def source(name):
        snapshot = run_dir and run_dir / "source" / name
        return (snapshot if snapshot and snapshot.exists() else ROOT / name).read_text(encoding="utf-8")

    def constant(name, pattern):
        found = re.search(pattern, source(name), re.M)
        return found[1] if found else f"(see {name})"

    def definition(text, name):
        return next((node for node in ast.parse(text).body if getattr(node, "name", "") == name), None)

    steps, data, top = c["max_tokens"] // c["batch_tokens"], c.get("data") or {}, study.head_dim(c)
    gains, arms = 2 * c["n_layer"] * top, list(configs)
    with torch.device("meta"):
        params = model.GPT(model.gpt_config(dict(c, qk_norm=False))).num_params()
    if "num_params" in c:
        params = c["num_params"] - gains * (c["qk_norm"] and c["qk_gain"])
    lr_at = definition(source("train.py"), "lr_at")
    schedule = (ast.get_docstring(lr_at) if lr_at else None) or "not said: see train.py."
    schedule = " ".join(schedule.split()).split(". ")[0].rstrip(".").removeprefix("Learning rate of a step: ")
    valued = lambda m: f"{m[0]} ({c[m[0]]:g})" if isinstance(c.get(m[0]), float) else m[0]
    schedule = re.sub(r"\w+", valued, schedule)
    now, then = ((ROOT / "model.py").read_text(encoding="utf-8"), source("model.py"))
    same = len({ast.dump(definition(text, "Attention") or ast.Pass()) for text in (now, then)}) == 1
    betas = f"betas {c['beta1']:g}, {c['beta2']:g}"
    how = {"adamw": f"AdamW ({betas}) on everything",
           "muon": f"Muon (momentum {constant('muon.py', r'momentum=([0-9.]+)')}, Nesterov, "
                   f"{constant('muon.py', r'^NS_STEPS = ([0-9]+)')} Newton-Schulz steps, update times "
                   + constant("muon.py", r'alpha=-group\["lr"\] \* (.*?)\)$') + ") on hidden matrices and "
                                                                                "AdamW on the rest"}
    scaled = c["embed_lr_scale"] != 1
    used = list(dict.fromkeys(configs[a]["optimizer"] for a in arms))
    frozen = [LABELS[a] for a in arms if configs[a]["qk_norm"] and not configs[a]["qk_gain"]]
    fields = {
        "Model": f"LLaMA-style decoder: RMSNorm (eps {constant('model.py', r'^NORM_EPS = ([0-9.e-]+)')}), "
                 f"RoPE (theta "
                 f"{constant('model.py', r'^ROPE_THETA = ([0-9_]+)(?:[.]0)?(?![.e0-9])').replace('_', ',')}, "
                 "half-split), SwiGLU, tied embeddings, no biases, no dropout",
        "Parameters": f"{params:,} ({gains:,} more with QK-Norm)",
        "Layers": c["n_layer"], "Heads": c["n_head"], "Head dim": top,
        "Model width": c["n_embd"], "FFN width": c["ffn_dim"], "Vocab size": f"{c['vocab_size']:,}",
        "Context length": c["block_size"],
        "Dataset": data.get("source") or data.get("name") or DATA.get(c["data_dir"], c["data_dir"]),
        "Tokenizer": TOKENIZERS.get(c["vocab_size"]) or data.get("tokenizer") or f"{c['vocab_size']:,} ids",
        "QK-Norm type": "RMSNorm per head over the head dim, one learnable gain for q and one for k, shared "
                        "by the heads" + f"; gains frozen at one in {join(frozen, ' and ')}" * bool(frozen),
        "QK-Norm placement": qk_norm_placement() if same else
        f"{qk_norm_placement()} in model.py of today; the runs' own, source/model.py, has another Attention",
        "Weight decay": f"{c['weight_decay']:g}, decoupled, on hidden matrices only",
        "Batch size": f"{c['batch_tokens']:,} tokens ({c['batch_tokens'] // c['block_size']} sequences)",
        "Warmup steps": f"{round(c['warmup_frac'] * steps)} of {steps:,} (linear, {c['warmup_frac']:.0%} of "
                        f"each run's own budget)",
        "LR schedule": schedule,
        "Gradient clipping": f"{c['grad_clip']:g}, global norm" if c["grad_clip"] else "none",
        "Optimizers": f"{join((how.get(o, f'{o} (see train.py)') for o in used), '; or ')}; one learning "
                      "rate for all groups"
                      + f", times {c['embed_lr_scale']:g} for embeddings, norms and gains" * scaled,
        "Training tokens": f"{c['max_tokens']:,} a main run ({c['max_tokens'] / params:.2g} a parameter)",
        "Validation tokens": f"{c['eval_tokens'] or data.get('val_tokens') or 5_000_000:,}, the same every "
                             f"time, never trained on",
        "Probe tokens": f"{c['probe_tokens'] // c['block_size'] * c['block_size']:,} of the validation set",
        "Precision": {"float32": "float32", "bfloat16": "bfloat16 autocast over float32 weights",
                      "auto": "bfloat16 autocast over float32 weights where the device multiplies bfloat16 "
                              "in hardware, else float32"}[c["dtype"]],
        "Learning rates": learning_rates or c["scale"] not in SCALES and "none chosen" or "grids " + "; ".join(
            f"{LABELS[a]} {join(f'{x:g}' for x in study.grid(c['scale'], a))}" for a in arms)}
    lines = [f"{k}: {v}" for k, v in fields.items()]
    return "\n".join(["# Experiment configuration", "", "```", *lines, "```", ""])


def scale_config(scale):
    """experiment_config.md of a scale as config/SCALE.py and train.py's defaults set it."""
    if scale not in SCALES:
        raise ValueError(f"scale {scale!r} is not known: choose one of {join(SCALES)}")
    return experiment_config(resolve(ROOT / "train.py", [str(ROOT / f"config/{scale}.py")]),
                             {a: study.scale_config(scale, a) for a in study.ARMS})


# ---- files
CSS = """
:root { --ink: #1b1f24; --soft: #57606a; --line: #d8dee4; --tint: #f6f8fa; color-scheme: light }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 57rem; padding: 2rem 1.25rem 4rem; color: var(--ink); background: #fff;
  font: 1.0625rem/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  overflow-wrap: break-word }
h1 { font-size: 1.9rem; line-height: 1.25; margin: 0 0 1.25rem; text-wrap: balance }
h2, h3 { font-size: 1.1rem; margin: 1.75rem 0 .5rem; break-after: avoid }
h2 { font-size: 1.4rem; margin: 2.75rem 0 .75rem; padding-top: .75rem; border-top: 1px solid var(--line) }
img { display: block; max-width: 100%; height: auto; margin: 1rem auto }
p:has(> img) { margin: 0; break-after: avoid }
p:has(> em:only-child) { font-size: .875rem; line-height: 1.45; color: var(--soft) }
.scroll { overflow-x: auto; margin: 1rem 0 .25rem }
table { border-collapse: collapse; font-size: .8125rem; line-height: 1.4; min-width: 100%;
  font-variant-numeric: tabular-nums }
th, td { padding: .4rem .5rem; border-bottom: 1px solid var(--line); vertical-align: top }
th { border-bottom: 2px solid var(--ink); vertical-align: bottom; text-align: left }
td[style*=right] { white-space: nowrap }
td:first-child { min-width: 8.5rem }
tr, blockquote { break-inside: avoid }
blockquote { margin: 1rem 0; padding: .5rem 1rem; border-left: 4px solid #9a6700; background: #fff8e5 }
pre { padding: .75rem 1rem; background: var(--tint); font-size: .8125rem; white-space: pre-wrap }
code { font: .9em ui-monospace, Menlo, monospace; background: var(--tint); padding: .1em .25em }
pre code { padding: 0; font-size: inherit }
@media (max-width: 30rem) { body { padding: 1.25rem 1rem 3rem; font-size: 1rem } h1 { font-size: 1.5rem }
  h2 { font-size: 1.25rem } td { min-width: 4.5rem } td:last-child { min-width: 7rem } }
@media print { body { max-width: none; padding: 0; font-size: 10pt } .scroll { overflow: visible }
  table { font-size: 6.5pt } p:has(> em:only-child) { font-size: 8pt } th, td { padding: .15rem .25rem }
  td:first-child { min-width: 0 }
  h2 { margin-top: 1.5rem } img { max-height: 11cm } @page { margin: 1.6cm } }
"""


def html(text, study_dir):
    """One self-contained page of a Markdown post: figures become data URIs, wide tables scroll on their
    own."""
    import markdown
    body = markdown.markdown(text, extensions=["tables", "fenced_code", "sane_lists"])

    def inline(match):
        path = (Path(study_dir) / match[1]).with_suffix(".png")
        if not path.exists():
            return match[0]
        return f'src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"'

    body = re.sub(r'src="(figures/[^"]+)"', inline, body)
    body = body.replace("<table>", '<div class="scroll"><table>').replace("</table>", "</table></div>")
    heading = re.search(r"^# (.*)", text, re.M)
    return (f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta name="viewport" '
            f'content="width=device-width, initial-scale=1">\n'
            f"<title>{heading[1] if heading else 'Report'}</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
            f"{body}\n</body>\n</html>\n")


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
    for line in S["left_out"]:
        print(f"left out: {line}")
    rows = [["config", "best LR", "val loss", "mean PR"], *post.summary(S)]
    widths = [max(len(row[i]) for row in rows) + 2 for i in range(4)]
    print("\n".join("".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows))
    print(f"verdict: {S['verdict'][0]}. {S['title']}")
    stays = f"{path} has been edited and stays; the new draft is {draft.name} beside it"
    print(stays if edited else f"the post: {path}")
    print(f"to read in a browser or print: {path.with_suffix('.html')}; figures: {S['dir'] / 'figures'}")


def main():
    args = sys.argv[1:]
    try:
        if len(args) == 2 and args[0] == "--check":
            path = find(args[1])
            sys.exit(review.check(path, load(path.parent)))
        elif len(args) == 2 and args[0] == "--preregister":
            preregister(args[1])
        elif len(args) == 2 and args[0] == "--config":
            print(scale_config(args[1]), end="")
        elif len(args) == 1 and not args[0].startswith("-"):
            report(find(args[0]))
        else:
            fail("usage: python report.py out/SCALE, or --check out/SCALE/report.md, --preregister "
                 "out/SCALE, --config SCALE")
    except (ValueError, OSError) as e:
        fail(e)


if __name__ == "__main__":
    main()
