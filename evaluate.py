"""Evaluate final checkpoints: val perplexity, HellaSwag 10-shot, LAMBADA 0-shot, WikiText.

    python evaluate.py out/80m [--rows DIR]              all finished runs of a study, to its results.json
    python evaluate.py --ckpt FILE [--rows DIR]          one checkpoint, as `key: value` lines
    python evaluate.py --ckpt FILE --sample "Once upon"  a continuation, to see what a model learned

The tasks are lm-eval's own, with its prompts, shots and metrics; only the scoring of tokens (scoring.py) is
ours. --rows DIR takes local rows in place of a download: hellaswag_train.jsonl with
hellaswag_validation.jsonl, lambada_openai.jsonl, wikitext_test.jsonl.
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
from model import GPT, gpt_config
from scoring import adapter, inference, val_losses
from study import load_runs, read_json
from system import resolve_device, write_text

sys.path.append(str(ROOT / "data"))
from tokens import get_encoding, load_bin, load_meta, sha256_of  # noqa: E402

TASKS = {
    "hellaswag": dict(
        yaml="hellaswag/hellaswag.yaml", shots=10,
        files={"train": "hellaswag_train.jsonl", "validation": "hellaswag_validation.jsonl"},
        fields={"activity_label": str, "ctx_a": str, "ctx_b": str, "endings": list, "label": (str, int)}),
    "lambada": dict(yaml="lambada/lambada_openai.yaml", shots=0, files={"test": "lambada_openai.jsonl"},
                    fields={"text": str}),
    "wikitext": dict(yaml="wikitext/wikitext.yaml", shots=0, files={"test": "wikitext_test.jsonl"},
                     fields={"page": str}),
}
FEWSHOT_SEED = 1234  # lm-eval's default, so that its command line draws the same shots
BOOTSTRAP = 1000
LM_EVAL = importlib.metadata.version("lm_eval")


# ---- checkpoints
def load_checkpoint(path, device="cpu"):
    """(model, config) of a ckpt_*.pt: a GPT in float32 on `device`; config.json's content with step and
    tokens. ValueError where the file is no checkpoint."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file: give a run's ckpt_step_*.pt")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        config = dict(state["config"], step=state["step"], tokens=state["tokens"])
        model = GPT(gpt_config(config))
        model.load_state_dict(state["model"])
        config["data"]["tokenizer"]
    except Exception as e:  # a damaged file can fail anywhere inside the unpickler
        raise ValueError(f"{path} is no whole checkpoint of train.py ({type(e).__name__}: {str(e)[:150]}): "
                         f"give another file, or train again") from None
    return model.to(device).eval(), config


def fitting_encoding(config):
    """The tiktoken.Encoding of a checkpoint's data. ValueError where it has more ids than the model."""
    encoding = get_encoding(config["data"]["tokenizer"])
    if encoding.n_vocab > config["vocab_size"]:
        raise ValueError(
            f"tokenizer {encoding.name} has {encoding.n_vocab:,} ids and does not fit the checkpoint's "
            f"vocab_size {config['vocab_size']:,}: its config names other data than it was trained on")
    return encoding


def final_checkpoints(study_dir):
    """({run name: path of its final checkpoint}, {run name: why it has none}) of a study folder."""
    found, missing = {}, {}
    for run in load_runs(study_dir, say=print):
        path = run["dir"] / f"ckpt_step_{run['rows'][-1]['step'] if run['rows'] else 0}.pt"
        if run["status"] == "finished" and path.exists():
            found[path.parent.name] = path
        else:
            gone = f", but {path.name} is gone" if run["status"] == "finished" else ""
            missing[path.parent.name] = run["status"] + gone
    return found, missing


# ---- tasks
def read_row(line, fields):
    """A line of a .jsonl file, bytes, as a dict of `fields` {name: type}. ValueError says what is wrong."""
    try:
        row = json.loads(line.decode("utf-8-sig"))  # -sig: a file may begin with a byte-order mark
    except (ValueError, RecursionError):  # among them a number of 5,000 digits, and 5,000 brackets
        raise ValueError("not JSON in UTF-8") from None
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    for field, kind in fields.items():
        if field not in row:
            raise ValueError(f"no field {field!r}")
        if not isinstance(row[field], kind) or field in ("text", "page") and not row[field].strip():
            raise ValueError(f"{field} is {row[field]!r:.60}")
    if "endings" in fields:
        row["label"] = str(row["label"])  # Rowan/hellaswag has strings
        if not all(isinstance(ending, str) and ending for ending in row["endings"]):
            raise ValueError("endings are not all texts")
        if row["label"] not in map(str, range(len(row["endings"]))):
            wrong = f"label {row['label']!r:.60} names none of"
            raise ValueError(f"{wrong} the {len(row['endings'])} endings")
    row = {field: row[field] for field in fields}
    json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair: UnicodeEncodeError, a ValueError
    return row


def read_rows(path, fields):
    """The rows of a .jsonl file, as read_row() gives them. ValueError names file and line."""
    data, rows, wanted = path.read_bytes() if path.exists() else None, [], ", ".join(fields)
    if not data:
        gone = "missing" if data is None else "empty"
        raise ValueError(f"{path} is {gone}: give one row a line, with {wanted}")
    for number, line in enumerate(data.removesuffix(b"\n").split(b"\n"), 1):
        try:
            rows.append(read_row(line, fields))
        except ValueError as e:
            raise ValueError(f"{path}, line {number}: {e}: a row is a JSON object with {wanted}") from None
    return rows


def local_rows(rows_dir):
    """{task: (sha256s of its files, {split: rows})} of the tasks that have a file in rows_dir."""
    found = {}
    for name, task in TASKS.items():
        paths = {split: Path(rows_dir) / file for split, file in task["files"].items()}
        if any(path.exists() for path in paths.values()):
            splits = {split: read_rows(path, task["fields"]) for split, path in paths.items()}
            if len(shots := splits.get("train", [])) < task["shots"]:
                few = f"{len(shots)} rows, fewer than the {task['shots']} shots"
                raise ValueError(f"{paths['train']} has {few}: give more")
            found[name] = [sha256_of(path) for path in paths.values()], splits
    if not found:
        files = ", ".join(file for task in TASKS.values() for file in task["files"].values())
        raise ValueError(f"--rows {rows_dir} holds no rows: it takes {files}")
    return found


@functools.cache
def hub_reachable():
    """Whether the Hub answers. Where not, `datasets`, not yet imported, is told to look into its cache
    only: its own retries take half a minute a data set."""
    import requests
    try:
        if not os.environ.get("HF_HUB_OFFLINE"):
            hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
            return requests.head(hub, timeout=4).status_code < 400
    except requests.RequestException:
        os.environ["HF_HUB_OFFLINE"] = "1"
    return False


def build_task(name, splits=None):
    """lm-eval's stock task `name` with its prompts built, on local rows {split: rows} or else its own data
    set. OSError where that cannot be reached."""
    offline = splits is None and not hub_reachable()
    import datasets  # here, because these take seconds and are not needed where all is evaluated already
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
        data = {split: datasets.Dataset.from_list(rows) for split, rows in splits.items()}
        config["custom_dataset"] = lambda **_: data
        config |= {k: None for k in ("training_split", "validation_split") if config.get(k) not in splits}
    try:
        task = ConfigurableTask(config=config)
    except Exception as e:  # whatever datasets, its file systems or the network come up with
        if splits:
            raise
        why = "no network" if offline else f"{type(e).__name__}: {str(e)[:150]}"
        files = " and ".join(TASKS[name]["files"].values())
        raise OSError(f"{source} cannot be reached ({why}): give --rows DIR with {files}") from None
    task.set_fewshot_seed(FEWSHOT_SEED)
    task.build_all_requests()
    return task


def run_task(name, task, lm):
    """(results, one row a document) of a built task on an adapter: lm-eval's metrics, and continuous ones,
    which small models move long before accuracy. A document that cannot be scored is named and left out."""
    from lm_eval.api.metrics import mean_stderr
    documents, metrics, rows, left_out = {}, {}, [], []
    responses = getattr(lm, task.instances[0].request_type)(task.instances)
    for instance, response, cut in zip(task.instances, responses, lm.cut, strict=True):
        documents.setdefault(instance.doc_id, []).append((instance.doc, response, cut))
    for doc_id, answers in documents.items():
        (doc, *_), scores, cuts = zip(*answers)
        if None in scores:
            left_out.append(doc_id)
            continue
        values = task.process_results(doc, list(scores))
        for metric, value in values.items():
            metrics.setdefault(metric, []).append(value)
        right = {key: int(values[key]) for key in ("acc", "acc_norm") if key in values}
        row = dict(id=doc_id, cut=any(cuts), **right)
        if name == "hellaswag":
            lls, gold = [ll for ll, _ in scores], doc["gold"]
            size = max(1, len(doc["choices"][gold].encode()))  # lm-eval makes "[title]" an empty text
            row.update(gold=gold, log_likelihoods=lls, gold_nats_per_byte=-lls[gold] / size)
        elif name == "lambada":
            row.update(log_likelihood=scores[0][0], target_nats=-scores[0][0])
        else:
            words, size = values["word_perplexity"][1], values["bits_per_byte"][1]
            row.update(log_likelihood=scores[0], words=words, bytes=size)
        rows.append(row)
    if left_out:
        tqdm.write(f"{lm.desc}: row {', '.join(str(i + 1) for i in left_out)} left out: a text to score has "
                   f"no token, nothing before it, or more than {lm.max_length} tokens")
    if not rows:
        raise ValueError("none of its texts can be scored")
    results = {metric.replace("perplexity", "ppl"): task.aggregation()[metric](values)
               for metric, values in metrics.items()}
    for key in ("acc", "acc_norm", "gold_nats_per_byte", "target_nats"):
        if key in rows[0]:
            values = [row[key] for row in rows]
            results[key] = sum(values) / len(values)
            results[f"{key}_stderr"] = mean_stderr(values) if len(values) > 1 else None
    if results.get("target_nats_stderr") is not None:
        # by the delta method: lm-eval's 100,000 bootstrap draws say the same and take minutes
        results["ppl_stderr"] = results["ppl"] * results["target_nats_stderr"]
    return dict(results, n=len(rows), cut=sum(row["cut"] for row in rows), left_out=left_out), rows


def val_tokens(config):
    """The val tokens (n,) that a run's log used. OSError or ValueError where they are gone or others
    now."""
    folder = find(config["data_dir"])
    if load_meta(folder)["val_sha256"] != config["data"]["val_sha256"]:
        raise ValueError(f"{folder} holds other val tokens than those that the run's log used")
    tokens = load_bin(folder, "val", config["vocab_size"])
    return tokens[:config["eval_tokens"] + 1] if config["eval_tokens"] else tokens


def run_val(model, tokens, encoding, dtype):
    """(results, one row a block) of val tokens (n,)."""
    nats, counts = val_losses(model, tokens, dtype)
    draws = np.random.default_rng(0).integers(len(nats), size=(BOOTSTRAP, len(nats)))
    lengths = np.array([len(encoding.decode_single_token_bytes(i)) for i in range(encoding.n_vocab)])
    lengths[encoding.eot_token] = 0  # no text
    loss = nats.sum() / counts.sum()
    results = dict(val_loss=loss, val_ppl=math.exp(loss), val_tokens=int(counts.sum()),
                   val_bits_per_byte=nats.sum() / math.log(2) / lengths[tokens[1:]].sum(),
                   val_loss_stderr_bootstrap=(nats[draws].sum(1) / counts[draws].sum(1)).std(ddof=1))
    rows = zip(nats.tolist(), counts.tolist())
    return results, [dict(id=i, nats=n, tokens=int(c)) for i, (n, c) in enumerate(rows)]


# ---- evaluating
def evaluate(name, path, local, built, args, old=None, out=None):
    """All results of one checkpoint, as a dict: val_*, and a dict for each task; {part: {"not_available":
    why}} for what cannot be had. local: local_rows' answer. built: what earlier checkpoints made, to which
    this adds. old: this run's earlier results, kept where the checkpoint is the same, and the rows too or
    gone. out: folder for one file a part, with one row a document."""
    model, config = load_checkpoint(path, args.device)
    encoding, dtype = fitting_encoding(config), args.dtype or config["dtype"]
    weights, old, kind = sha256_of(path), old or dict(done={}), (encoding.name, config["block_size"])
    run = dict(checkpoint=path.name, step=config["step"], tokens=config["tokens"], dtype=dtype, done={})
    for part in ("val", *TASKS):
        rows_of, splits = local.get(part, ("hub", None))
        val_of = config["data"].get("val_sha256"), config["eval_tokens"]
        key = [weights, dtype, *(val_of if part == "val" else (LM_EVAL, rows_of))]
        before, file = old["done"].get(part), out and out / f"{name}_{part}.jsonl"
        results = {k: v for k, v in old.items() if k == part or k.startswith(f"{part}_")}
        known = results and before and before[:2] == key[:2] and file and file.exists()
        if not known or before != key:
            try:
                if part == "val":
                    got, rows = run_val(model, val_tokens(config), encoding, dtype)
                else:
                    if part not in built:
                        built[part] = build_task(part, splits)
                    if isinstance(built[part], Exception):
                        raise built[part]
                    lm = built[kind] = built.get(kind) or adapter(encoding, config["block_size"])
                    lm.model, lm.dtype, lm.desc = model, dtype, f"{name} {part}"
                    got, rows = run_task(part, built[part], lm)
                lines = [json.dumps(row, allow_nan=False) + "\n" for row in (got, *rows)][1:]
            except (OSError, ValueError, ArithmeticError) as e:
                built.setdefault(part, e)  # what cannot be reached is asked for once: that takes long
                if known and isinstance(e, OSError):
                    key = before  # what local rows gave earlier is not lost by a start without them
                else:
                    key, results = None, {part: dict(not_available=" ".join(str(e).split()))}
                    say = f"{part} not available: {results[part]['not_available']}"
                    built[say] = built.get(say) or tqdm.write(say) or True  # once for all checkpoints
            else:
                results = got if part == "val" else {part: got}
                if out:
                    out.mkdir(parents=True, exist_ok=True)
                    write_text(file, "".join(lines))
        run |= results
        if key:
            run["done"][part] = key
    return run


def summary(name, run):
    """A run's results in one line."""
    cells = ["val not available" if "val" in run else f"val_loss {run['val_loss']:.4f} +- "
             f"{run['val_loss_stderr_bootstrap']:.4f}  ppl {run['val_ppl']:.2f}"]
    for task, key in (("hellaswag", "acc_norm"), ("lambada", "acc"), ("wikitext", "word_ppl")):
        cells.append(f"{task} {key} {run[task][key]:.4g}" if key in run[task] else f"{task} not available")
    return f"{name:<18}{'  '.join(cells)}"


def evaluate_study(study_dir, local, args):
    """Write results.json of a study folder. ValueError, once all else is done, for a damaged checkpoint."""
    if not study_dir.is_dir():
        raise ValueError(f"{study_dir}: no such folder: give a study's, such as out/mini")
    checkpoints, missing = final_checkpoints(study_dir)
    for name, why in missing.items():
        print(f"{name} is left out: {why}")
    if not checkpoints:
        raise ValueError(f"{study_dir} holds no final checkpoint of a finished run: train first, as with "
                         f"bash sweep.sh {study_dir.name}")
    path, runs, built, damaged = study_dir / "results.json", {}, {}, []
    try:
        old = read_json(path, dict(runs={}))["runs"]
        json.dumps([run["done"].items() and run for run in old.values()], allow_nan=False)
    except (ValueError, KeyError, TypeError, AttributeError):
        print(f"{path} is damaged: evaluating anew")
        old = {}
    stay = {*checkpoints, *(name for name, why in missing.items() if why.startswith("finished"))}
    protocol = dict(hellaswag="lm-eval's hellaswag, 10-shot", lambada="lm-eval's lambada_openai, 0-shot",
                    wikitext="lm-eval's wikitext", fewshot_seed=FEWSHOT_SEED, lm_eval=LM_EVAL,
                    torch=torch.__version__, device=str(args.device))
    for name, checkpoint in tqdm(checkpoints.items(), desc="checkpoints", disable=None):
        try:
            runs[name] = evaluate(name, checkpoint, local, built, args, old.get(name), study_dir / "eval")
            tqdm.write(summary(name, runs[name]))
        except ValueError as e:  # a damaged file must not keep the others from being evaluated
            missing[name] = str(e)
            damaged.append(e)
        # neither a kill nor checkpoints deleted since may lose what is there
        later = {key: run for key, run in old.items() if key in stay and key not in runs}
        content = dict(protocol=protocol, runs=runs | later, left_out=missing)
        write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
    if damaged:
        raise ValueError(f"{len(damaged)} of {len(checkpoints)} runs could not be evaluated: {damaged[0]}")


def sample(model, config, text, length=200, temperature=0.8, top_k=200, seed=1337):
    """`text` and a continuation of up to `length` tokens, which ends early where the model ends the
    document."""
    encoding, device = fitting_encoding(config), model.wte.weight.device
    generator = torch.Generator().manual_seed(seed)
    ids, new = encoding.encode_ordinary(text) or [encoding.eot_token], []
    for _ in range(length):
        idx = torch.tensor([(ids + new)[-config["block_size"]:]], device=device)  # slides once it is full
        with inference(device, config["dtype"]):
            logits = model.logits(model.hidden(idx)[:, -1])[0, :encoding.n_vocab].cpu()  # others are no text
        best, which = logits.topk(min(top_k, len(logits)))
        new.append(which[torch.multinomial((best / temperature).softmax(-1), 1, generator=generator)].item())
        if new[-1] == encoding.eot_token:
            break
    return text + encoding.decode([token for token in new if token != encoding.eot_token])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.error = fail  # in one line
    place = lambda text: find(Path(text).expanduser())
    parser.add_argument("study", nargs="?", type=place, help="a study's folder, such as out/80m")
    parser.add_argument("--ckpt", type=place, help="one checkpoint instead")
    parser.add_argument("--rows", type=place, help="a folder with local rows")
    parser.add_argument("--sample", metavar="TEXT", help="print a continuation of TEXT by --ckpt")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="default: the run's")
    parser.add_argument("--device", default="auto", help="auto (the default), cpu, cuda or cuda:1")
    args = parser.parse_args()
    args.device = resolve_device(args.device)
    torch.set_float32_matmul_precision("highest")  # no TF32, which vendors' containers switch on
    if (args.study is None) == (args.ckpt is None) or args.sample is not None and not args.ckpt:
        raise ValueError("give a study's folder, or --ckpt FILE, which --sample TEXT needs: --help says more")
    if args.sample is not None:
        model, config = load_checkpoint(args.ckpt, args.device)
        return print(sample(model, dict(config, dtype=args.dtype or config["dtype"]), args.sample))
    local = local_rows(args.rows) if args.rows else {}
    if args.study:
        return evaluate_study(args.study, local, args)
    run = evaluate(args.ckpt.stem, args.ckpt, local, {}, args)
    run.pop("done")
    for key, value in run.items():
        for sub, v in value.items() if isinstance(value, dict) else [("", value)]:
            print(f"{'_'.join(filter(None, (key, sub))) + ':':<38}{v}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        fail(e)
