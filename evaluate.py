"""Evaluate final checkpoints: val perplexity, HellaSwag 10-shot, LAMBADA 0-shot, WikiText.

    python evaluate.py out/80m [--rows DIR]                  every finished run of a study, into out/80m/results.json
    python evaluate.py --ckpt FILE [--rows DIR]              one checkpoint, as `key: value` lines
    python evaluate.py --ckpt FILE --sample "Once upon"      a continuation, so that a person sees what a model learned

The tasks are lm-eval's own, with its prompts, shots and metrics; only the scoring of tokens (scoring.py) is ours. --rows DIR takes
local rows in place of a download: hellaswag_train.jsonl with hellaswag_validation.jsonl, lambada_openai.jsonl, wikitext_test.jsonl.
"""
import argparse
import functools
import importlib.metadata
import json
import logging
import math
import os
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from configurator import ROOT, fail, find
from model import GPT, GPTConfig
from scoring import adapter, autocast, val_losses
from study import load_runs
from system import write_text

sys.path.append(str(ROOT / "data"))
from tokens import get_encoding, load_bin, load_meta, sha256_of  # noqa: E402

TASKS = {
    "hellaswag": dict(
        yaml="hellaswag/hellaswag.yaml", shots=10, files={"train": "hellaswag_train.jsonl", "validation": "hellaswag_validation.jsonl"},
        fields={"activity_label": str, "ctx_a": str, "ctx_b": str, "endings": list, "label": (str, int)}),
    "lambada": dict(yaml="lambada/lambada_openai.yaml", shots=0, files={"test": "lambada_openai.jsonl"}, fields={"text": str}),
    "wikitext": dict(yaml="wikitext/wikitext.yaml", shots=0, files={"test": "wikitext_test.jsonl"}, fields={"page": str}),
}
FEWSHOT_SEED = 1234  # lm-eval's default, so that its command line draws the same shots
BOOTSTRAP = 1000
LM_EVAL = importlib.metadata.version("lm_eval")


# ---- checkpoints ----

def load_checkpoint(path, device="cpu"):
    """(model, config) of a ckpt_*.pt: a GPT in float32 on `device`; config.json's content with the checkpoint's step and tokens.
    ValueError where the file is no checkpoint."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file: give a run's ckpt_step_*.pt")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        config = dict(state["config"], step=state["step"], tokens=state["tokens"])
        model = GPT(GPTConfig(**{key: config[key] for key in GPTConfig.__dataclass_fields__}))
        model.load_state_dict(state["model"])
    except Exception as e:  # a damaged file can fail anywhere inside the unpickler
        raise ValueError(f"{path} is no whole checkpoint of train.py ({type(e).__name__}: {str(e)[:150]}): give another file, or "
                         f"train again") from None
    return model.to(device).eval(), config


def fitting_encoding(config):
    """The tiktoken.Encoding that a checkpoint's data was made with. ValueError where it has more ids than the model."""
    encoding = get_encoding(config["data"]["tokenizer"])
    if encoding.n_vocab > config["vocab_size"]:
        raise ValueError(f"tokenizer {encoding.name} has {encoding.n_vocab:,} ids and does not fit the checkpoint's vocab_size "
                         f"{config['vocab_size']:,}: the checkpoint's config names other data than it was trained on")
    return encoding


def final_checkpoints(study_dir):
    """({run name: path of its final checkpoint}, {run name: why it has none}) of a study folder."""
    found, missing = {}, {}
    for run in load_runs(study_dir):
        name = run["dir"].name
        path = run["dir"] / f"ckpt_step_{run['rows'][-1]['step'] if run['rows'] else 0}.pt"
        if run["status"] != "finished":
            missing[name] = run["status"]
        elif not path.exists():
            missing[name] = f"finished, but {path.name} is gone"
        else:
            found[name] = path
    return found, missing


# ---- tasks ----

def read_rows(path, fields):
    """Rows of a .jsonl file, reduced to `fields` {name: type}. ValueError names file and line."""
    try:
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n") if path.exists() and path.stat().st_size else []
    except (OSError, UnicodeDecodeError) as e:
        raise ValueError(f"{path} cannot be read: {e}") from None
    rows = []
    for number, text in enumerate(lines, 1):
        try:
            row = json.loads(text)
            wrong = "not a JSON object" if not isinstance(row, dict) else next(
                (f"no field {f!r}" if f not in row else f"{f} is {row[f]!r:.60}" for f, kind in fields.items()
                 if not isinstance(row.get(f), kind) or f in ("text", "page") and not row[f].strip()), None)
            if not wrong and "endings" in fields:
                row["label"] = str(row["label"])  # Rowan/hellaswag has strings
                if not all(isinstance(ending, str) and ending for ending in row["endings"]):
                    wrong = "endings are not all texts"
                elif not row["label"].isdecimal() or int(row["label"]) >= len(row["endings"]):
                    wrong = f"label {row['label']!r} names none of the {len(row['endings'])} endings"
        except json.JSONDecodeError:
            wrong = "not JSON"
        if wrong:
            raise ValueError(f"{path}, line {number}: {wrong}: a row is a JSON object with {', '.join(fields)}")
        rows.append({field: row[field] for field in fields})
    if not rows:
        raise ValueError(f"{path} is {'empty' if path.exists() else 'missing'}: give one row a line, with {', '.join(fields)}")
    return rows


def local_rows(rows_dir):
    """{task: (sha256 of its files, {split: rows})} for the tasks that have a file in rows_dir. ValueError for a wrong row."""
    found = {}
    for name, task in TASKS.items():
        paths = {split: Path(rows_dir) / file for split, file in task["files"].items()}
        if any(path.exists() for path in paths.values()):
            splits = {split: read_rows(path, task["fields"]) for split, path in paths.items()}
            if task["shots"] > len(splits.get("train", ())):
                raise ValueError(f"{paths['train']} has {len(splits['train'])} rows, fewer than the {task['shots']} shots: give more")
            found[name] = [sha256_of(path) for path in paths.values()], splits
    if not found:
        files = ", ".join(file for task in TASKS.values() for file in task["files"].values())
        raise ValueError(f"--rows {rows_dir} holds no rows: it takes {files}")
    return found


@functools.cache
def hub_reachable():
    """Whether the Hub answers now. Where it does not, `datasets` is told to look into its cache only: its own retries take half a
    minute a data set. To be called before it is imported."""
    import requests
    try:
        if not os.environ.get("HF_HUB_OFFLINE"):
            return requests.head(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), timeout=4).status_code < 400
    except requests.RequestException:
        os.environ["HF_HUB_OFFLINE"] = "1"
    return False


def build_task(name, splits=None):
    """lm-eval's stock task `name` with its prompts built, on local rows {split: rows} or else on its own data set.
    OSError where that cannot be reached."""
    offline = splits is None and not hub_reachable()
    import datasets  # here, because these take seconds, and none of them is needed where all is evaluated already
    import lm_eval
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml  # TaskManager reads 10,000 other files first
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    config = load_yaml(Path(lm_eval.__file__).parent / "tasks" / TASKS[name]["yaml"])
    config.pop("tag", None)
    config["num_fewshot"] = TASKS[name]["shots"]
    source = config["dataset_path"]
    if splits:
        datasets.disable_progress_bars()
        config["custom_dataset"] = lambda **_: {split: datasets.Dataset.from_list(rows) for split, rows in splits.items()}
        config.update({key: None for key in ("training_split", "validation_split") if config.get(key) not in splits})
    try:
        task = ConfigurableTask(config=config)
    except Exception as e:  # whatever datasets, its file systems or the network come up with
        if splits:
            raise
        why = "no network" if offline else f"{type(e).__name__}: {str(e)[:150]}"
        raise OSError(f"{source} cannot be reached ({why}): give --rows DIR with {' and '.join(TASKS[name]['files'].values())}") from None
    task.set_fewshot_seed(FEWSHOT_SEED)
    task.build_all_requests()
    return task


def run_task(name, task, lm):
    """(results, one row a document) of a built task on an adapter: lm-eval's metrics, and continuous ones, which small models move
    long before they move accuracy."""
    from lm_eval.api.metrics import mean_stderr
    documents, metrics, rows = {}, {}, []
    responses = getattr(lm, task.instances[0].request_type)(task.instances)
    for instance, response, cut in zip(task.instances, responses, lm.cut, strict=True):
        documents.setdefault(instance.doc_id, []).append((instance.doc, response, cut))
    for doc_id, answers in documents.items():
        (doc, *_), scores, cuts = zip(*answers)
        values = task.process_results(doc, list(scores))
        for metric, value in values.items():
            metrics.setdefault(metric, []).append(value)
        row = dict(id=doc_id, cut=any(cuts), **{key: int(values[key]) for key in ("acc", "acc_norm") if key in values})
        if name == "hellaswag":
            lls, gold = [ll for ll, _ in scores], doc["gold"]
            row.update(gold=gold, log_likelihoods=lls, gold_nats_per_byte=-lls[gold] / len(doc["choices"][gold].encode()))
        elif name == "lambada":
            row.update(log_likelihood=scores[0][0], target_nats=-scores[0][0])
        else:
            row.update(log_likelihood=scores[0], words=values["word_perplexity"][1], bytes=values["bits_per_byte"][1])
        rows.append(row)
    short = {"perplexity": "ppl", "word_perplexity": "word_ppl", "byte_perplexity": "byte_ppl"}
    results = {short.get(metric, metric): task.aggregation()[metric](values) for metric, values in metrics.items()}
    for key in ("acc", "acc_norm", "gold_nats_per_byte", "target_nats"):
        if key in rows[0]:
            values = [row[key] for row in rows]
            results[key], results[f"{key}_stderr"] = sum(values) / len(values), mean_stderr(values) if len(values) > 1 else None
    if results.get("target_nats_stderr") is not None:
        # by the delta method: lm-eval's 100,000 bootstrap draws say the same and take minutes
        results["ppl_stderr"] = results["ppl"] * results["target_nats_stderr"]
    return dict(results, n=len(rows), cut=sum(row["cut"] for row in rows)), rows


def run_val(model, config, encoding, dtype):
    """(results, one row a block) of the val tokens that the run's log used."""
    tokens = load_bin(find(config["data_dir"]), "val", config["vocab_size"])
    tokens = tokens[:config["eval_tokens"] + 1] if config["eval_tokens"] else tokens
    nats, counts = val_losses(model, tokens, dtype)
    draws = np.random.default_rng(0).integers(len(nats), size=(BOOTSTRAP, len(nats)))
    lengths = np.array([len(encoding.decode_single_token_bytes(i)) for i in range(encoding.n_vocab)])
    lengths[encoding.eot_token] = 0  # no text
    loss = nats.sum() / counts.sum()
    results = dict(val_loss=loss, val_ppl=math.exp(loss), val_bits_per_byte=nats.sum() / math.log(2) / lengths[tokens[1:]].sum(),
                   val_tokens=int(counts.sum()), val_loss_stderr_bootstrap=(nats[draws].sum(1) / counts[draws].sum(1)).std(ddof=1))
    return results, [dict(id=i, nats=n, tokens=int(c)) for i, (n, c) in enumerate(zip(nats.tolist(), counts))]


# ---- evaluating ----

def evaluate(name, path, local, built, args, old=None, out=None):
    """All results of one checkpoint, as a dict. local: local_rows' answer. built: tasks and adapters that earlier checkpoints made,
    to which this adds. old: this run's earlier results, kept where the checkpoint and the rows are still the same. out: folder for
    one file a task, with one row a document."""
    model, config = load_checkpoint(path, args.device)
    encoding, dtype = fitting_encoding(config), args.dtype or config["dtype"]
    weights = sha256_of(path)
    run = dict(checkpoint=path.name, step=config["step"], tokens=config["tokens"], dtype=dtype, done={})

    def done(part, *of):  # whether `part` of exactly this was evaluated before
        run["done"][part] = [weights, dtype, *of]
        return bool(old and out and (out / f"{name}_{part}.jsonl").exists()) and old.get("done", {}).get(part) == run["done"][part]

    def keep(part, rows):
        if out:
            out.mkdir(parents=True, exist_ok=True)
            write_text(out / f"{name}_{part}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    if done("val", load_meta(find(config["data_dir"]))["val_sha256"], config["eval_tokens"]):
        run |= {key: value for key, value in old.items() if key.startswith("val_")}
    else:
        results, rows = run_val(model, config, encoding, dtype)
        run |= results
        keep("val", rows)
    for task in TASKS:
        rows_of, splits = local.get(task, ("hub", None))
        if done(task, LM_EVAL, rows_of):
            run[task] = old[task]
            continue
        if task not in built:
            try:
                built[task] = build_task(task, splits)
            except OSError as e:
                built[task] = " ".join(str(e).split())
                tqdm.write(f"{task} not available: {built[task]}")
        if isinstance(built[task], str):
            # what local rows gave earlier is not lost by a start without them
            before = old["done"][task] if old and task in old.get("done", {}) else None
            known = before and done(task, *before[2:])
            run[task] = old[task] if known else dict(not_available=built[task])
            if not known:
                del run["done"][task]
            continue
        kind = encoding.name, config["block_size"]
        lm = built[kind] = built.get(kind) or adapter(encoding, config["block_size"])
        lm.model, lm.dtype, lm.desc = model, dtype, f"{name} {task}"
        run[task], rows = run_task(task, built[task], lm)
        keep(task, rows)
    return run


def summary(name, run):
    """A run's results in one line."""
    cells = [f"{name:<18}val_loss {run['val_loss']:.4f} +- {run['val_loss_stderr_bootstrap']:.4f}  ppl {run['val_ppl']:.2f}"]
    for task, key in (("hellaswag", "acc_norm"), ("lambada", "acc"), ("wikitext", "word_ppl")):
        cells.append(f"{task} {key} {run[task][key]:.4g}" if key in run[task] else f"{task} not available")
    return "  ".join(cells)


def evaluate_study(study_dir, local, args):
    if not study_dir.is_dir():
        raise ValueError(f"{study_dir}: no such folder: give a study's, such as out/mini")
    checkpoints, missing = final_checkpoints(study_dir)
    for name, why in missing.items():
        print(f"{name} is left out: {why}")
    if not checkpoints:
        raise ValueError(f"{study_dir} holds no final checkpoint of a finished run: train first, as with bash sweep.sh {study_dir.name}")
    path, old, runs, built = study_dir / "results.json", {}, {}, {}
    try:
        old = {name: dict(run) for name, run in json.loads(path.read_text())["runs"].items()} if path.exists() else {}
    except (ValueError, KeyError, TypeError, AttributeError):
        print(f"{path} is damaged: evaluating anew")
    protocol = dict(hellaswag="lm-eval's hellaswag, 10-shot", lambada="lm-eval's lambada_openai, 0-shot", wikitext="lm-eval's wikitext",
                    fewshot_seed=FEWSHOT_SEED, lm_eval=LM_EVAL, torch=torch.__version__, device=args.device)
    for name, checkpoint in tqdm(checkpoints.items(), desc="checkpoints", disable=None):
        runs[name] = evaluate(name, checkpoint, local, built, args, old.get(name), study_dir / "eval")
        tqdm.write(summary(name, runs[name]))
        later = {key: run for key, run in old.items() if key in checkpoints and key not in runs}  # a kill must not lose these
        write_text(path, json.dumps(dict(protocol=protocol, runs=runs | later, left_out=missing), indent=1) + "\n")


@torch.no_grad()
def sample(model, config, text, length=200, temperature=0.8, top_k=200, seed=1337):
    """`text` and a continuation of up to `length` tokens, which ends early where the model ends the document."""
    encoding, device = fitting_encoding(config), model.wte.weight.device
    generator = torch.Generator().manual_seed(seed)
    ids, new = encoding.encode_ordinary(text) or [encoding.eot_token], []
    for _ in range(length):
        idx = torch.tensor([(ids + new)[-config["block_size"]:]], device=device)  # the context slides once it is full
        with autocast(device, config["dtype"]):
            logits = model.logits(model.hidden(idx)[:, -1])[0, :encoding.n_vocab].cpu()  # padded ids are no text
        best, which = logits.topk(min(top_k, len(logits)))
        new.append(which[torch.multinomial((best / temperature).softmax(-1), 1, generator=generator)].item())
        if new[-1] == encoding.eot_token:
            break
    return text + encoding.decode([token for token in new if token != encoding.eot_token])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", nargs="?", help="a study's folder, such as out/80m")
    parser.add_argument("--ckpt", help="one checkpoint instead")
    parser.add_argument("--rows", help="a folder with local rows")
    parser.add_argument("--sample", metavar="TEXT", help="print a continuation of TEXT by --ckpt")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="default: the run's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if (args.study is None) == (args.ckpt is None) or args.sample is not None and not args.ckpt:
        raise ValueError("give a study's folder, or --ckpt FILE, which --sample TEXT needs: --help says more")
    if args.sample is not None:
        return print(sample(*load_checkpoint(args.ckpt, args.device), args.sample))
    local = local_rows(args.rows) if args.rows else {}
    if args.study:
        return evaluate_study(find(args.study), local, args)
    run = evaluate(Path(args.ckpt).stem, Path(args.ckpt), local, {}, args)
    run.pop("done")
    for key, value in run.items():
        for sub, v in value.items() if isinstance(value, dict) else [("", value)]:
            print(f"{'_'.join(filter(None, (key, sub))) + ':':<38}{v}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        fail(e)
