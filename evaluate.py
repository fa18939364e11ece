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
from system import start_device, write_text

sys.path.append(str(ROOT / "data"))
from tokens import get_encoding, load_bin, load_meta, sha256_of  # noqa: E402

TASKS = {  # row: the fields of a local row; valid: a check of it
    "hellaswag": dict(
        yaml="hellaswag/hellaswag.yaml", shots=10,
        files={"train": "hellaswag_train.jsonl", "validation": "hellaswag_validation.jsonl"},
        row=["activity_label", "ctx_a", "ctx_b", "endings", "label"],
        valid=lambda row: isinstance(row["endings"], list) and all(row["endings"])
        and all(isinstance(row[key], str) for key in ("activity_label", "ctx_a", "ctx_b"))
        and all(isinstance(ending, str) for ending in row["endings"])
        and str(row["label"]) in map(str, range(len(row["endings"])))),
    "lambada": dict(yaml="lambada/lambada_openai.yaml", shots=0, files={"test": "lambada_openai.jsonl"},
                    row=["text"], valid=lambda row: row["text"].strip()),
    "wikitext": dict(yaml="wikitext/wikitext.yaml", shots=0, files={"test": "wikitext_test.jsonl"},
                     row=["page"], valid=lambda row: row["page"].strip()),
}
FEWSHOT_SEED = 1234  # lm-eval's default, so that its command line draws the same shots
BOOTSTRAP = 1000
LM_EVAL = importlib.metadata.version("lm_eval")


# ---- checkpoints
def load_checkpoint(path, device="cpu"):
    """(model, config) of a ckpt_*.pt: a GPT in float32 on `device`; config.json's content with step and
    tokens. ValueError where the file is no checkpoint."""
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


# ---- tasks
def read_rows(path, task):
    """The rows of a .jsonl file, as dicts of the fields of one of TASKS. ValueError names file and line."""
    if not path.exists():
        raise ValueError(f"{path} is missing: --rows needs all files of a task")
    rows = []
    for number, line in enumerate(path.read_bytes().removesuffix(b"\n").split(b"\n"), 1):
        try:
            row = json.loads(line.decode("utf-8-sig"))  # -sig: a file may begin with a byte-order mark
            row = {field: row[field] for field in task["row"]}
            json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair cannot be stored
            valid = task["valid"](row)
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
            valid = False
        if not valid:
            text, fields = line.decode(errors="replace"), ", ".join(task["row"])
            raise ValueError(f"{path}, line {number}: {text!r:.60} is no JSON object in UTF-8 with valid "
                             f"{fields}")
        # HellaSwag's own labels are texts, and a Dataset's column has one type
        rows.append(row | {"label": str(row["label"])} if "label" in row else row)
    return rows


def local_rows(rows_dir):
    """{task: (sha256s of its files, {split: rows})} of the tasks that have a file in rows_dir."""
    found = {}
    for name, task in TASKS.items():
        paths = {split: Path(rows_dir) / file for split, file in task["files"].items()}
        if any(path.exists() for path in paths.values()):
            splits = {split: read_rows(path, task) for split, path in paths.items()}
            if "train" in splits and len(splits["train"]) < task["shots"]:
                raise ValueError(f"{paths['train']} has fewer rows than the {task['shots']} shots: give more")
            found[name] = [sha256_of(path) for path in paths.values()], splits
    if not found:
        raise ValueError(f"--rows {rows_dir} holds no rows: --help names the files that it takes")
    return found


@functools.cache
def ask_hub():
    """Tell `datasets`, not yet imported, to look into its cache only, where the Hub does not answer: its own
    retries take half a minute a data set."""
    import requests
    try:
        requests.head(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), timeout=4)
    except requests.RequestException:
        os.environ["HF_HUB_OFFLINE"] = "1"


def build_task(name, splits=None):
    """lm-eval's stock task `name` with its prompts built, on local rows {split: rows} or else its own data
    set. OSError where that cannot be reached."""
    ask_hub()
    import datasets  # here, because these take seconds and are not needed where all is evaluated already
    import lm_eval
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml  # TaskManager reads 10,000 other files first
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    config = load_yaml(Path(lm_eval.__file__).parent / "tasks" / TASKS[name]["yaml"])
    config.pop("tag", None)
    config["num_fewshot"] = TASKS[name]["shots"]
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
        files = " and ".join(TASKS[name]["files"].values())
        raise OSError(f"{config['dataset_path']} cannot be reached ({type(e).__name__}: {str(e)[:150]}): "
                      f"give --rows DIR with {files}") from None
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
        row = dict(id=doc_id, cut=any(cuts))
        row |= {key: int(values[key]) for key in ("acc", "acc_norm") if key in values}
        if name == "hellaswag":
            lls, gold = [ll for ll, _ in scores], doc["gold"]
            size = max(1, len(doc["choices"][gold].encode()))  # lm-eval makes "[title]" an empty text
            row.update(gold=gold, log_likelihoods=lls, gold_nats_per_byte=-lls[gold] / size)
        elif name == "lambada":
            row.update(log_likelihood=scores[0][0], target_nats=-scores[0][0])
        else:
            row.update(log_likelihood=scores[0])
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
    """The val tokens (n,) that a run's log used. OSError or ValueError where they are gone or others."""
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
    return results, [dict(id=i, nats=n, tokens=int(c)) for i, (n, c) in enumerate(zip(nats.tolist(), counts))]


# ---- evaluating
def evaluate(name, path, local, built, args, old=None, out=None):
    """All results of one checkpoint, as a dict: val_*, and a dict for each task; {part: {"not_available":
    why}} for what cannot be had. local: local_rows' answer. built: what earlier checkpoints made, to which
    this adds. old: this run's earlier results, of which those parts stay whose checkpoint is the same and
    whose rows, where any are given, are too. out: folder for one file a part, with one row a document."""
    model, config = load_checkpoint(path, args.device)
    encoding, dtype = fitting_encoding(config), args.dtype or config["dtype"]
    weights, old, kind = sha256_of(path), old or dict(done={}), (encoding.name, config["block_size"])
    run = dict(checkpoint=path.name, step=config["step"], tokens=config["tokens"], dtype=dtype, done={})
    for part in ("val", *TASKS):
        rows_of, splits = local.get(part, (None, None))
        key, before = [weights, dtype, LM_EVAL, rows_of], old["done"].get(part, [])
        file = out and out / f"{name}_{part}.jsonl"
        if before[:3] == key[:3] and rows_of in (None, before[3]) and file and file.exists():
            run |= {k: v for k, v in old.items() if k == part or k.startswith(f"{part}_")}
            run["done"][part] = before
            continue
        try:
            if part == "val":
                got, rows = run_val(model, val_tokens(config), encoding, dtype)
            else:
                built[part] = built.get(part) or build_task(part, splits)
                lm = built[kind] = built.get(kind) or adapter(encoding, config["block_size"])
                lm.model, lm.dtype, lm.desc = model, dtype, f"{name} {part}"
                got, rows = run_task(part, built[part], lm)
            lines = [json.dumps(row, allow_nan=False) + "\n" for row in (got, *rows)][1:]
        except (OSError, ValueError, ArithmeticError) as e:
            run[part] = dict(not_available=" ".join(str(e).split()))
            continue
        run |= got if part == "val" else {part: got}
        run["done"][part] = key
        if out:
            out.mkdir(parents=True, exist_ok=True)
            write_text(file, "".join(lines))
    return run


def flat(run):
    """{key: value} of a run's results; a task's keys begin with its name."""
    return {f"{key}_{sub}" if sub else key: v for key, value in run.items()
            for sub, v in (value.items() if isinstance(value, dict) else [("", value)])}


def evaluate_study(study_dir, local, args):
    """Write results.json of a study folder. ValueError, once all else is done, for a damaged checkpoint."""
    checkpoints, left_out, damaged, path = {}, {}, [], study_dir / "results.json"
    for run in load_runs(study_dir, say=print):
        name = run["dir"].name
        if run["status"] == "finished":
            checkpoints[name] = run["dir"] / f"ckpt_step_{run['rows'][-1]['step']}.pt"
        else:
            left_out[name] = run["status"]
            print(f"{name} is left out: {run['status']}")
    if not checkpoints:
        raise ValueError(f"{study_dir} holds no final checkpoint of a finished run: train first, as with "
                         f"bash sweep.sh {study_dir.name}")
    try:
        old = read_json(path, {}).get("runs", {})
        runs = {name: run | dict(done=dict(run["done"])) for name, run in old.items() if name in checkpoints}
    except (ValueError, KeyError, TypeError, AttributeError):
        print(f"{path} is damaged: evaluating anew")
        runs = {}
    protocol = dict({name: f"lm-eval's {task['yaml']}, {task['shots']}-shot" for name, task in TASKS.items()},
                    fewshot_seed=FEWSHOT_SEED, lm_eval=LM_EVAL, torch=torch.__version__,
                    device=str(args.device))
    built = {}
    for name, checkpoint in tqdm(checkpoints.items(), desc="checkpoints", disable=None):
        try:
            if checkpoint.exists() or name not in runs:  # results outlive a checkpoint deleted to save space
                runs[name] = evaluate(name, checkpoint, local, built, args, runs.get(name),
                                      study_dir / "eval")
            found = flat(runs[name])
            keys = "val_loss", "val_ppl", "hellaswag_acc_norm", "lambada_acc", "wikitext_word_ppl"
            tqdm.write(f"{name:<24} " + "  ".join(f"{key} {found[key]:.5g}" for key in keys if key in found))
        except ValueError as e:  # a damaged file must not keep the others from being evaluated
            left_out[name] = str(e)
            damaged.append(e)
        # each time, as a kill must not lose what is there
        content = dict(protocol=protocol, runs=runs, left_out=left_out)
        write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
    for line in dict.fromkeys(f"{key.replace('_', ' ')}: {why}" for run in runs.values()
                              for key, why in flat(run).items() if key.endswith("not_available")):
        print(line)
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
    parser.add_argument("study", nargs="?", type=find, help="a study's folder, such as out/80m")
    parser.add_argument("--ckpt", type=find, help="one checkpoint instead")
    parser.add_argument("--rows", type=find, help="a folder with local rows")
    parser.add_argument("--sample", metavar="TEXT", help="print a continuation of TEXT by --ckpt")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="default: the run's")
    parser.add_argument("--device", default="auto", help="auto (the default), cpu, cuda or cuda:1")
    args = parser.parse_args()
    args.device = start_device(args.device)
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
    for key, value in flat(run).items():
        print(f"{key + ':':<38}{value}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        fail(e)
