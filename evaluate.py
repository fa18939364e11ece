"""Evaluate final checkpoints: val perplexity, HellaSwag 10-shot, LAMBADA 0-shot.

    python evaluate.py out/80m [--rows DIR]              all finished runs of a study, to its results.json
    python evaluate.py --ckpt FILE [--rows DIR]          one checkpoint, printed as results.json has it
    python evaluate.py --ckpt FILE --sample "Once upon"  a continuation, to see what a model learned

The tasks are lm-eval's own, with its prompts, shots and metrics; only the scoring of tokens (scoring.py) is
ours. --rows DIR takes local rows in place of a download: hellaswag_train.jsonl with
hellaswag_validation.jsonl, lambada_openai.jsonl.
"""
import argparse
import functools
import importlib.metadata
import itertools
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
from scoring import encode_pair, inference, score, val_losses
from study import load_runs, read_json
from system import start_device, write_text

sys.path.append(str(ROOT / "data"))
from tokens import get_encoding, load_bin, load_meta, sha256_of  # noqa: E402

TASKS = {  # fields: of a local row, with their types; valid: a further check of it
    "hellaswag": dict(
        yaml="hellaswag/hellaswag.yaml", shots=10,
        files={"train": "hellaswag_train.jsonl", "validation": "hellaswag_validation.jsonl"},
        fields=dict(activity_label=str, ctx_a=str, ctx_b=str, endings=list, label=(str, int)),
        valid=lambda row: all(isinstance(ending, str) and ending for ending in row["endings"])
        and str(row["label"]) in map(str, range(len(row["endings"])))),
    "lambada": dict(yaml="lambada/lambada_openai.yaml", shots=0, files={"test": "lambada_openai.jsonl"},
                    fields=dict(text=str), valid=lambda row: row["text"].strip()),
}
SHOWN = {"val": "val_loss", "hellaswag": "acc_norm", "lambada": "acc"}
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
    except Exception as e:  # a damaged file can fail anywhere inside the unpickler
        raise ValueError(f"{path} is no whole checkpoint of train.py ({type(e).__name__}: {str(e)[:150]}): "
                         f"give another file, or train again") from None
    return model.to(device).eval(), config


# ---- tasks
def read_rows(path, task):
    """The rows of a .jsonl file, as dicts of the fields of one of TASKS. ValueError names file and line."""
    if not path.exists():
        raise ValueError(f"{path} is missing: --rows needs all files of a task")
    rows = []
    for number, line in enumerate(path.open("rb"), 1):
        try:
            row = json.loads(line.decode("utf-8-sig"))  # -sig: a file may begin with a byte-order mark
            row = {field: row[field] for field in task["fields"]}
            json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair cannot be stored
            valid = all(isinstance(row[field], kind) for field, kind in task["fields"].items()) \
                and task["valid"](row)
        except (ValueError, RecursionError, KeyError, TypeError):
            valid = False
        if not valid:
            raise ValueError(f"{path}, line {number}: {line.decode(errors='replace')!r:.60} is no JSON object "
                             f"in UTF-8 with valid {', '.join(task['fields'])}")
        if "label" in row:
            row["label"] = str(row["label"])  # as HellaSwag's own are; a Dataset's column has one type
        rows.append(row)
    return rows


def local_rows(rows_dir):
    """{task: (sha256s of its files, {split: rows})} of the tasks that have a file in rows_dir."""
    found = {}
    for name, task in TASKS.items():
        paths = {split: Path(rows_dir) / file for split, file in task["files"].items()}
        if any(path.exists() for path in paths.values()):
            splits = {split: read_rows(path, task) for split, path in paths.items()}
            for split, rows in splits.items():
                if len(rows) < (needed := task["shots"] if split == "train" else 1):
                    raise ValueError(f"{paths[split]} has {len(rows)} rows: give at least {needed}")
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
    config["num_fewshot"] = TASKS[name]["shots"]
    if splits:
        datasets.disable_progress_bars()
        data = {split: datasets.Dataset.from_list(rows) for split, rows in splits.items()}
        config["custom_dataset"] = lambda **_: data
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


def run_task(name, task, pairs, model, dtype, desc):
    """Results of a built task, whose requests are `pairs` of token ids: lm-eval's metrics, and continuous ones,
    which small models move long before accuracy. A document that cannot be scored is named and left out."""
    from lm_eval.api.metrics import mean_stderr
    longest = model.config.block_size
    rows, cut, left_out = [], 0, []
    answers = zip(task.instances, pairs, score(model, pairs, dtype, desc), strict=True)
    for doc_id, of_doc in itertools.groupby(answers, lambda answer: answer[0].doc_id):
        instances, pairs_of_doc, scores = zip(*of_doc)
        if None in scores:
            left_out.append(doc_id)
            continue
        # a pass predicts one token more than it holds
        cut += any(len(context) + len(target) > longest + 1 for context, target in pairs_of_doc)
        doc = instances[0].doc
        metrics = task.process_results(doc, list(scores))
        row = {key: int(metrics[key]) for key in ("acc", "acc_norm") if key in metrics}
        if name == "hellaswag":
            gold = doc["gold"]
            size = max(1, len(doc["choices"][gold].encode()))  # lm-eval makes "[title]" an empty text
            row["gold_nats_per_byte"] = -scores[gold][0] / size
        else:
            row["target_nats"] = -scores[0][0]
        rows.append(row)
    if left_out:
        tqdm.write(f"{desc}: row {', '.join(str(i + 1) for i in left_out)} left out: a text to score has "
                   f"no token, nothing before it, or more than {longest} tokens")
    if not rows:
        raise ValueError("none of its texts can be scored")
    results = dict(n=len(rows), cut=cut, left_out=left_out)
    for key in rows[0]:
        values = [row[key] for row in rows]
        results[key] = sum(values) / len(values)
        results[f"{key}_stderr"] = mean_stderr(values) if len(values) > 1 else None
    if name == "lambada":
        results["ppl"] = math.exp(results["target_nats"])
        # by the delta method: lm-eval's 100,000 bootstrap draws say the same and take minutes
        error = results["target_nats_stderr"]
        results["ppl_stderr"] = None if error is None else results["ppl"] * error
    return results


def val_tokens(config):
    """The val tokens (n,) that a run's log used. OSError or ValueError where they are gone or others."""
    folder = find(config["data_dir"])
    if load_meta(folder)["val_sha256"] != config["data"]["val_sha256"]:
        raise ValueError(f"{folder} holds other val tokens than those that the run's log used")
    tokens = load_bin(folder, "val", config["vocab_size"])
    return tokens[:config["eval_tokens"] + 1] if config["eval_tokens"] else tokens


def run_val(model, tokens, encoding, dtype):
    """Results on val tokens (n,)."""
    nats, counts = val_losses(model, tokens, dtype)
    draws = np.random.default_rng(0).integers(len(nats), size=(BOOTSTRAP, len(nats)))
    lengths = np.array([len(encoding.decode_single_token_bytes(i)) for i in range(encoding.n_vocab)])
    lengths[encoding.eot_token] = 0  # no text
    loss = nats.sum() / counts.sum()
    return dict(val_loss=loss, val_ppl=math.exp(loss), val_tokens=int(counts.sum()),
                val_bits_per_byte=nats.sum() / math.log(2) / lengths[tokens[1:]].sum(),
                val_loss_stderr_bootstrap=(nats[draws].sum(1) / counts[draws].sum(1)).std(ddof=1))


# ---- evaluating
def evaluate(path, local, built, args, old={}):
    """All results of one checkpoint, as a dict: val_*, and a dict for each task; {part: {"not_available":
    why}} for what cannot be had. local: local_rows' answer. built: what earlier checkpoints made, to which
    this adds. old: this run's earlier results; a part of them stays where checkpoint, dtype and lm-eval are
    the same, and the rows, where any are given, are too."""
    model, config = load_checkpoint(path, args.device)
    encoding, dtype = get_encoding(config["data"]["tokenizer"]), args.dtype or config["dtype"]
    weights = sha256_of(path)
    run = dict(checkpoint=path.name, step=config["step"], tokens=config["tokens"], dtype=dtype, done={})
    for part in ("val", *TASKS):
        rows_of, splits = local.get(part, (None, None))
        key, before = [weights, dtype, LM_EVAL, rows_of], old.get("done", {}).get(part)
        if before and key in (before, [*before[:3], None]):
            run |= {k: v for k, v in old.items() if k.startswith(part)}
            run["done"][part] = before
            continue
        try:
            if part == "val":
                got = run_val(model, val_tokens(config), encoding, dtype)
            else:
                if (part, encoding.name) not in built:
                    task = build_task(part, splits)
                    pairs = [encode_pair(encoding, *instance.args) for instance in task.instances]
                    built[part, encoding.name] = task, pairs
                got = run_task(part, *built[part, encoding.name], model, dtype, f"{path.parent.name} {part}")
            json.dumps(got, allow_nan=False)  # ValueError for what is not finite
        except (OSError, ValueError, ArithmeticError) as e:
            run[part] = dict(not_available=" ".join(str(e).split()))
            continue
        run |= got if part == "val" else {part: got}
        run["done"][part] = key
    return run


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
    old = read_json(path, {}).get("runs", {})
    runs = {name: run for name, run in old.items() if name in checkpoints}
    protocol = {name: f"lm-eval's {task['yaml']}, {task['shots']}-shot" for name, task in TASKS.items()}
    protocol |= dict(fewshot_seed=FEWSHOT_SEED, lm_eval=LM_EVAL, torch=torch.__version__, device=str(args.device))
    built, why_not = {}, {}
    for name, checkpoint in tqdm(checkpoints.items(), desc="checkpoints", disable=None):
        try:
            if checkpoint.exists() or name not in runs:  # results outlive a checkpoint deleted to save space
                runs[name] = evaluate(checkpoint, local, built, args, runs.get(name, {}))
        except ValueError as e:  # a damaged file must not keep the others from being evaluated
            left_out[name] = str(e)
            damaged.append(e)
            continue
        finally:  # each time, as a kill must not lose what is there
            content = dict(protocol=protocol, runs=runs, left_out=left_out)
            write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
        words = []
        for part in ("val", *TASKS):
            found = runs[name].get(part, runs[name])  # val's results stand in the run itself
            if "not_available" in found:
                why_not[f"{part} not available: {found['not_available']}"] = None
            else:
                words.append(f"{part} {SHOWN[part]} {found[SHOWN[part]]:.5g}")
        tqdm.write(f"{name:<24} " + ", ".join(words))
    for line in why_not:
        print(line)
    if damaged:
        raise ValueError(f"{len(damaged)} of {len(checkpoints)} runs could not be evaluated: {damaged[0]}")


def sample(model, config, text, length=200, temperature=0.8, top_k=200, seed=1337):
    """`text` and a continuation of up to `length` tokens, which ends early where the model ends the
    document."""
    encoding, device = get_encoding(config["data"]["tokenizer"]), model.wte.weight.device
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
    print(json.dumps(evaluate(args.ckpt, local, {}, args), indent=1))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        fail(e)
