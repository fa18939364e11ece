"""A study as a post that claims what its runs carry, and no more.

    python report.py out/SCALE                 writes report.md, report.html and experiment_config.md there
    python report.py --check out/SCALE/report.md   the plan's self-review of the edited post
    python report.py --preregister out/SCALE   writes preregistered.json, before the first main run
    python report.py --config SCALE            prints experiment_config.md of a scale

An edited report.md is never written over: the new draft goes to report.new.md beside it, and report.html shows the
edited one.
"""
import base64
import hashlib
import json
import re
import sys
from datetime import datetime, timezone
from pathlib import Path

import numpy as np

from post import text as post
from post import review
from post import stats
from configurator import ROOT, fail, resolve
from post.text import FIGURES, PR_DEFINITIONS, join
from post.stats import CONTRASTS, PR_NAMES
from study import (ARMS, LABELS, LOGIT_FLAG, MAX_EXTENSIONS, SCALES, SEEDS, SWEEP_SEED, chosen, layer_values, load_run,
                   load_runs)
from system import write_whole

DATA = {"data/fineweb_edu": "FineWeb-Edu, sample-10BT",
        "data/poetry": "Gutenberg Poetry Corpus (English verse, public domain)"}
TOKENIZERS = {50304: "GPT-2 BPE (50,257 ids, the model's table padded to 50,304)",
              4096: "GPT-2 BPE cut after its first merges (4,096 ids)"}


# ---- what is there ----

def read_json(path):
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except ValueError as e:
        raise ValueError(f"{path} is no JSON ({e}): restore it or delete it") from None


def last(run, name):
    """Final value of a run: 'loss' (inf where diverged), 'logit' (the largest over layers and all rows) or the mean
    over layers of a PR definition; nan where the run has none."""
    rows = run["rows"]
    if name == "loss":
        return run["val_loss"] if run["status"] != "unfinished" and run["val_loss"] is not None else np.nan
    if name == "logit":
        return max((v for row in rows for v in layer_values(row, "max_logit")), default=np.nan)
    values = layer_values(rows[-1], name) if rows and run["status"] == "finished" else []
    return float(np.mean(values)) if values else np.nan


def measure(runs, seeds):
    """(y, diverged): y {name: (4, n seeds)} of final values in the order of ARMS, and {arm: number of diverged runs},
    {} where none is, as stats.verdict() takes them."""
    cell = {(r["config"]["arm"], r["config"]["seed"]): r for r in runs}
    y = {name: np.array([[last(cell[a, s], name) if (a, s) in cell else np.nan for s in seeds] for a in ARMS])
         for name in ("loss", "logit", *PR_DEFINITIONS)}
    diverged = {a: int(np.isinf(row).sum()) for a, row in zip(ARMS, y["loss"])}
    return y, diverged if any(diverged.values()) else {}


def load(study_dir):
    """Everything the report is made from, as a dict; ValueError or OSError in one line where a file is damaged."""
    d = Path(study_dir)
    S = dict(dir=d, runs=load_runs(d), sweep=load_runs(d, "sweep"), picks=chosen(d),
             results=read_json(d / "results.json"),
             registered=read_json(d / "preregistered.json"),
             transfer=[load_run(p) for p in sorted(d.glob("transfer/*")) if (p / "config.json").exists()])
    if not S["runs"] and not S["sweep"]:
        raise ValueError(f"{d} holds no run: start the study with `bash sweep.sh`, or name another folder")
    S["planned"] = (S["registered"] or {}).get("seeds", SEEDS)
    S["seeds"] = sorted({*S["planned"], *(r["config"]["seed"] for r in S["runs"])},
                        key=lambda s: (s not in S["planned"], s))
    S["config"] = (S["runs"] or S["sweep"])[0]["config"]
    S["scale"] = S["config"]["scale"]
    S["cell"] = {(r["config"]["arm"], r["config"]["seed"]): r for r in S["runs"]}
    S["y"], S["diverged"] = measure(S["runs"], S["seeds"])
    S["missing"] = missing(S)
    S["absent"] = [f"figure {name}: run `python plot.py {d}`" for name in FIGURES
                   if not (d / f"figures/{name}.png").exists()]
    if S["missing"]:
        S["verdict"] = "no verdict", [("any", "a whole study", False,
                                       f"{len(S['missing'])} parts are missing, named at the top")], {}
    else:
        S["verdict"] = stats.verdict(S["y"], S["diverged"])
    S["title"], S["registration"] = post.title(S), registration_state(S)
    lrs = "; ".join(f"{LABELS[a]} {S['picks'][a]['lr']:g}" for a in ARMS if a in S["picks"])
    S["experiment_config"] = experiment_config(S["config"], S["config"].get("data"), lrs and f"chosen: {lrs}")
    return S


def missing(S):
    """What a whole study would have and this one has not: no verdict without it."""
    swept = {(r["config"]["arm"], r["config"]["learning_rate"]): r["status"] for r in S["sweep"]}
    grids = SCALES.get(S["scale"], {}).get("grids", {})
    out = [f"sweep run {a}-lr{lr:g}: {swept.get((a, lr), 'not started')}" for a in ARMS
           for lr in sorted({*grids.get(a, []), *(v for b, v in swept if a == b)})
           if swept.get((a, lr), "unfinished") == "unfinished"]
    out += [f"{a}: no learning rate chosen" for a in ARMS if a not in S["picks"]]
    for a in ARMS:
        for s in S["seeds"]:
            status = S["cell"][a, s]["status"] if (a, s) in S["cell"] else "not started"
            if status in ("not started", "unfinished"):
                out.append(f"main run {a}-seed{s}: {status}")
            elif status == "finished" and f"{a}-seed{s}" not in (S["results"] or {}).get("runs", {}):
                out.append(f"evaluation of {a}-seed{s} (results.json)")
    return out


def registration(scale):
    """What is fixed before the first main run."""
    return dict(
        scale=scale, seeds=SEEDS, sweep_seed=SWEEP_SEED, grids=SCALES[scale]["grids"],
        sweep_tokens=SCALES[scale]["sweep_tokens"],
        grid_rule=f"lowest final val loss wins; a winner at an edge gets points a factor of two further out, up to "
                  f"{MAX_EXTENSIONS} a side",
        measures={"loss": "final val loss, nats a token", "pr": "mean_pr at the end, mean over heads and layers"},
        contrasts={name: dict(zip(ARMS, w)) for name, w in CONTRASTS.items()}, alpha=stats.ALPHA,
        family=" ".join(stats.__doc__.split()),
        thresholds=dict(loss_margin=stats.LOSS_MARGIN, pr_margin=stats.PR_MARGIN, collapse=stats.COLLAPSE,
                        max_logit=LOGIT_FLAG),
        scenarios=stats.SCENARIOS,
        scenario_order="A, C, B, D: the first whose conditions all hold; otherwise none of the four",
        pr_definitions=PR_DEFINITIONS, pr_rule=f"a PR claim has to hold in sign under {', '.join(PR_NAMES)}",
        stats_sha256=hashlib.sha256((ROOT / "post/stats.py").read_bytes()).hexdigest())


def preregister(study_dir):
    """Write preregistered.json unless it is there."""
    d = Path(study_dir)
    path, runs = d / "preregistered.json", load_runs(d) + load_runs(d, "sweep")
    scale = runs[0]["config"]["scale"] if runs else d.name
    if scale not in SCALES:
        raise ValueError(f"scale {scale!r} is not known: choose one of {', '.join(SCALES)}")
    if path.exists():
        print(f"{path} is there: nothing to do")
        return
    begun = sorted(r["dir"].name for r in load_runs(d))
    d.mkdir(parents=True, exist_ok=True)
    text = json.dumps(registration(scale) | dict(written=datetime.now(timezone.utc).isoformat(timespec="seconds"),
                                                      main_runs_begun=begun), indent=1)
    write(path, text + "\n")
    print(f"{path}: contrasts, thresholds, seeds and grids are written down" +
          (f", AFTER {len(begun)} main runs began" if begun else ""))


def registration_state(S):
    """Sentences on whether the study was done as registered."""
    old = S["registered"]
    if not old:
        return ("Nothing was registered: `preregistered.json` is not there, so the contrasts may have been chosen with "
                "the results in reach.")
    now = registration(S["scale"]) | dict(seeds=old["seeds"]) if S["scale"] in SCALES else {}
    changed = [k for k in now if old.get(k) != json.loads(json.dumps(now[k]))]
    code = "stats_sha256" in changed
    words = [f"`preregistered.json` was written {old['written']}, " +
             (f"after {len(old['main_runs_begun'])} main runs had begun."
             if old["main_runs_begun"] else "before the first main run.")]
    rest = [k for k in changed if k != "stats_sha256"]
    words.append(f"Since then changed: {', '.join(rest)}." if rest
                 else "Contrasts, thresholds, seeds, grids and the definitions of PR are unchanged.")
    if code:
        words.append("The code that decides, stats.py, is not the registered one, to the byte.")
    if set(S["seeds"]) != set(old["seeds"]):
        words.append(f"Registered seeds: {join(old['seeds'])}; seeds in this report: {join(S['seeds'])}. Seeds added "
                     f"after a first look "
                     "make the intervals too narrow.")
    return " ".join(words)


# ---- experiment_config.md ----

def experiment_config(c, data=None, learning_rates=None):
    """experiment_config.md, every field of step 1, from config keys c; data: meta.json's content where a data set is
    there."""
    steps, data = c["max_tokens"] // c["batch_tokens"], data or {}
    gains = 2 * c["n_layer"] * (c["n_embd"] // c["n_head"])
    params = (c.get("num_params") or num_params(c)) - gains * c["qk_norm"]
    fields = {
        "Model": "LLaMA-style decoder: RMSNorm (eps 1e-6), RoPE (theta 10,000, half-split), SwiGLU, tied embeddings, "
                 "no biases, no dropout",
        "Parameters": f"{params:,} ({gains:,} more with QK-Norm)", "Layers": c["n_layer"], "Heads": c["n_head"],
        "Head dim": c["n_embd"] // c["n_head"],
        "Model width": c["n_embd"], "FFN width": c["ffn_dim"], "Vocab size": f"{c['vocab_size']:,}",
        "Context length": c["block_size"],
        "Dataset": data.get("source") or data.get("name") or DATA.get(c["data_dir"], c["data_dir"]),
        "Tokenizer": TOKENIZERS.get(c["vocab_size"]) or data.get("tokenizer") or f"{c['vocab_size']:,} ids",
        "QK-Norm type": "RMSNorm per head over the head dim, one learnable gain for q and one for k, shared by the "
                        "heads",
        "QK-Norm placement": "before RoPE",
        "Weight decay": f"{c['weight_decay']:g}, decoupled, on hidden matrices only",
        "Batch size": f"{c['batch_tokens']:,} tokens ({c['batch_tokens'] // c['block_size']} sequences)",
        "Warmup steps": f"{round(c['warmup_frac'] * steps)} of {steps:,} (linear, {c['warmup_frac']:.0%} of each run's "
                        f"own budget)",
        "LR schedule": f"cosine to {c.get('min_lr_frac', 0.1):.0%} of the peak at the end of each run's own budget",
        "Gradient clipping": f"{c['grad_clip']:g}, global norm",
        "Optimizers": "AdamW (betas 0.9, 0.95) on everything; or Muon (momentum 0.95, Nesterov, 5 Newton-Schulz steps, "
                      "update times "
                      "0.2 sqrt(max(rows, cols))) on hidden matrices and AdamW on the rest; one learning rate for all "
                      "groups",
        "Training tokens": f"{c['max_tokens']:,} a main run ({c['max_tokens'] / params:.2g} a parameter)",
        "Validation tokens": f"{c['eval_tokens'] or data.get('val_tokens') or 5_000_000:,}, the same every time, never "
                             f"trained on",
        "Probe tokens": f"{c['probe_tokens'] // c['block_size'] * c['block_size']:,} of the validation set",
        "Precision": {"float32": "float32", "bfloat16": "bfloat16 autocast over float32 weights",
                      "auto": "bfloat16 autocast over float32 weights where the device multiplies bfloat16 in hardware, "
                              "else float32"}[c["dtype"]],
        "Learning rates": learning_rates or "grids " + "; ".join(f"{LABELS[a]} {join(f'{x:g}' for x in g)}" for a,
                                                                 g in SCALES[c["scale"]]["grids"].items())}
    return "\n".join(["# Experiment configuration", "", "```", *(f"{k}: {v}" for k, v in fields.items()), "```", ""])


def scale_config(scale):
    """experiment_config.md of a scale as config/SCALE.py and train.py's defaults set it."""
    if scale not in SCALES:
        raise ValueError(f"scale {scale!r} is not known: choose one of {', '.join(SCALES)}")
    return experiment_config(resolve(ROOT / "train.py", [str(ROOT / f"config/{scale}.py")]))


def num_params(c):
    import torch  # slow to import, and only --config counts parameters itself
    from model import GPT, GPTConfig
    with torch.device("meta"):
        return GPT(GPTConfig(c["block_size"], c["vocab_size"], c["n_layer"], c["n_head"], c["n_embd"], c["ffn_dim"],
                             c["qk_norm"])).num_params()


# ---- files ----

CSS = """
:root { --ink: #1b1f24; --soft: #57606a; --line: #d8dee4; --tint: #f6f8fa; --mark: #9a6700; color-scheme: light }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 50rem; padding: 2rem 1.25rem 4rem; color: var(--ink); background: #fff;
       font: 1.0625rem/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  overflow-wrap: break-word }
h1 { font-size: 1.9rem; line-height: 1.25; margin: 0 0 1.25rem; text-wrap: balance }
h2 { font-size: 1.4rem; margin: 2.75rem 0 .75rem; padding-top: .75rem; border-top: 1px solid var(--line);
  break-after: avoid }
h3 { font-size: 1.1rem; margin: 1.75rem 0 .5rem; break-after: avoid }
img { display: block; max-width: 100%; height: auto; margin: 1rem auto }
p:has(> img) { margin: 0; break-after: avoid }
p:has(> em:only-child) { font-size: .875rem; line-height: 1.45; color: var(--soft) }
.scroll { overflow-x: auto; margin: 1rem 0 .25rem }
table { border-collapse: collapse; font-size: .875rem; line-height: 1.4; font-variant-numeric: tabular-nums;
  min-width: 100% }
th, td { padding: .4rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top }
th { border-bottom: 2px solid var(--ink); vertical-align: bottom }
th { text-align: left }
td[style*=right] { white-space: nowrap }
td:first-child { min-width: 8.5rem }
tr { break-inside: avoid }
blockquote { margin: 1rem 0; padding: .5rem 1rem; border-left: 4px solid var(--mark); background: #fff8e5;
  break-inside: avoid }
pre { padding: .75rem 1rem; background: var(--tint); border-radius: 6px; font-size: .8125rem; line-height: 1.5;
  white-space: pre-wrap }
code { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: .9em;
  background: var(--tint); padding: .1em .25em; border-radius: 3px }
pre code { padding: 0; font-size: inherit }
@media (max-width: 30rem) { body { padding: 1.25rem 1rem 3rem; font-size: 1rem } h1 { font-size: 1.5rem }
  h2 { font-size: 1.25rem } }
@media print { body { max-width: none; padding: 0; font-size: 10pt } .scroll { overflow: visible }
  table { font-size: 7.5pt }
  th, td { padding: .2rem .35rem } td { white-space: normal !important; min-width: 0 !important }
  h2 { margin-top: 1.5rem } img { max-height: 11cm } @page { margin: 1.8cm } }
"""


def html(text, study_dir):
    """One self-contained page of a Markdown post: figures become data URIs, wide tables scroll on their own."""
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


def write(path, text):
    write_whole(path, lambda f: f.write(text.encode()))


def stamp(text):
    """The last line of a draft: while it fits the text above, nobody has edited it."""
    return f"\n<!-- draft {hashlib.sha256(text.encode()).hexdigest()[:16]} -->\n"


def report(study_dir):
    """Write the report's three files; an edited report.md stays."""
    S = load(study_dir)
    path, text = S["dir"] / "report.md", post.build(S)
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    above, mark, _ = old.rpartition("\n<!-- draft ")
    edited = bool(old) and (not mark or old != above + stamp(above))
    write(path.with_name("report.new.md") if edited else path, text + stamp(text))
    write(S["dir"] / "experiment_config.md", S["experiment_config"])
    write(S["dir"] / "report.html", html(old if edited else text, S["dir"]))
    for line in S["missing"] + S["absent"]:
        print(f"missing: {line}")
    print(f"verdict: {S['verdict'][0]}")
    print(f"{path} has been edited and stays; the new draft is report.new.md beside it" if edited
          else f"{path}, report.html and experiment_config.md written")


def main():
    args = sys.argv[1:]
    try:
        if len(args) == 2 and args[0] == "--check":
            sys.exit(review.check(Path(args[1]), load(Path(args[1]).parent)))
        elif len(args) == 2 and args[0] == "--preregister":
            preregister(args[1])
        elif len(args) == 2 and args[0] == "--config":
            print(scale_config(args[1]), end="")
        elif len(args) == 1 and not args[0].startswith("-"):
            report(args[0])
        else:
            fail("usage: python report.py out/SCALE, or --check out/SCALE/report.md, --preregister out/SCALE, --config "
                 "SCALE")
    except (ValueError, OSError) as e:
        fail(e)


if __name__ == "__main__":
    main()
