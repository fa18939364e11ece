"""The tests of evaluation and export: against a plain forward pass, against lm-eval's stock `hf` model
and transformers, against wrong input. All rows are made here."""
import hashlib
import importlib.util
import itertools
import json
import math
import os
import random
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
import export
import scoring
from model import GPT, GPTConfig

torch.set_num_threads(1)  # the models are tiny, and pytest runs on all cores
ROOT = Path(__file__).resolve().parents[1]
EOT = 4095
needs_hf = pytest.mark.skipif(not all(map(importlib.util.find_spec, ("transformers", "accelerate"))),
                              reason="requirements-dev.txt is not installed")
WORDS = ("the a of in to and he she they it was is had has with for on at by sea wind night day heart "
         "love stone light old young went came said saw took gave made found held kept kitchen garden "
         "café letter soldier captain horse bread water dancing").split()


def text(rng, low, high):
    return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))


def hellaswag_rows(n, seed, longest=12):
    rng = random.Random(seed)
    return [dict(activity_label=text(rng, 1, 2), ctx_a=text(rng, 3, longest) + ".",
                 ctx_b=text(rng, 0, 2), label=rng.randrange(4),
                 endings=[text(rng, 1, 9) + rng.choice([".", " [title] and  more", ""])
                          for _ in range(4)]) for _ in range(n)]


def lambada_rows(n):
    rng = random.Random(5)
    return [dict(text=text(rng, 20, 90)) for _ in range(n)]


def write_rows(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def tiny_model(qk_norm, block_size=64, seed=0, vocab_size=4160, qk_gain=True):
    """Weights far from their init, gains far from one, and a vocabulary padded by 64 rows: what
    is wrong anywhere shows."""
    generator = torch.Generator().manual_seed(seed)
    model = (GPT(GPTConfig(block_size, vocab_size, 2, 2, 64, 96, qk_norm, qk_gain))
             .init_weights(generator).requires_grad_(False))
    for name, p in model.named_parameters():
        p.copy_(p * 4 if p.ndim == 2 else torch.rand(p.shape, generator=generator) + 0.5)
    return model


def write_data(folder, encoding):
    """A data folder of 50 documents of val text."""
    rng = random.Random(1)
    documents = [text(rng, 5, 40) + " é" for _ in range(50)]
    tokens = np.concatenate([encoding.encode_ordinary(d) + [EOT] for d in documents]).astype("<u2")
    folder.mkdir(parents=True)
    tokens.tofile(folder / "val_set.bin")
    size, sha = len(tokens), hashlib.sha256(tokens.tobytes()).hexdigest()
    meta = dict(tokenizer="gpt2-4096", vocab_size=4096, eot=EOT, train_tokens=size, val_tokens=size,
                train_sha256=sha, val_sha256=sha, val_bytes=sum(len(d.encode()) for d in documents),
                settings={}, command="none")
    (folder / "meta.json").write_text(json.dumps(meta))
    return tokens, documents, meta


def write_run(folder, model, meta, data_dir, status="finished", **more):
    folder.mkdir(parents=True)
    config = dict(vars(model.config), arm="muon_qk" if model.config.qk_norm else "muon",
                  seed=int(folder.name.split("seed")[1]), learning_rate=0.01, dtype="float32",
                  eval_tokens=0, data_dir=str(data_dir), data=meta, **more)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "log.jsonl").write_text(f'{{"step": 7, "val_loss": 8.0}}\n{{"event": "{status}"}}\n')
    for step in (7, 10) if status == "finished" else ():  # 10: not of this log
        torch.save(dict(model=model.state_dict(), config=config, step=step, tokens=step * 64,
                        optimizers=[]), folder / f"ckpt_step_{step}.pt")
    return folder / "ckpt_step_7.pt"


def call(monkeypatch, *args):
    """evaluate.py's main in this process."""
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, args)])
    evaluate.main()


@pytest.fixture(scope="module")
def encoding():
    return evaluate.get_encoding("gpt2-4096")


@pytest.fixture()
def study(tmp_path, encoding):
    """A study folder with two finished runs, one that diverged and one that is not finished."""
    tokens, documents, meta = write_data(tmp_path / "data", encoding)
    for name, status, qk_norm in (
            ("muon-seed42", "finished", False), ("muon_qk-seed137", "finished", True),
            ("muon_qk-seed42", "diverged", True), ("muon-seed137", "unfinished", False)):
        write_run(tmp_path / "out" / name, tiny_model(qk_norm), meta, tmp_path / "data", status)
    return types.SimpleNamespace(
        dir=tmp_path / "out", tokens=tokens, documents=documents, meta=meta, data=tmp_path / "data",
        ckpt=tmp_path / "out" / "muon-seed42" / "ckpt_step_7.pt", tmp=tmp_path)


@pytest.fixture()
def offline(monkeypatch):
    """Only local rows can be had."""
    monkeypatch.setattr(
        evaluate, "build_task", lambda name, splits, real=evaluate.build_task:
        real(name, splits) if splits else (_ for _ in ()).throw(OSError("x cannot be reached")))


# ---- scoring ----

def plain_scores(model, pairs):
    """Each pair alone, in one plain causal pass, with lm-eval's cut."""
    scores = []
    for context, target in pairs:
        whole = (context + target)[-(model.config.block_size + 1):]
        logp = model(torch.tensor([whole[:-1]]))[0, -len(target):].double().log_softmax(-1)
        picked = logp.gather(-1, torch.tensor(target)[:, None])[:, 0]
        scores.append((picked.sum().item(), bool((logp.argmax(-1) == torch.tensor(target)).all())))
    return scores


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("pass_tokens", [1, 100, 5000])
def test_shared_passes_equal_plain_ones(qk_norm, pass_tokens, monkeypatch):
    monkeypatch.setitem(scoring.PASS_TOKENS, "cpu", pass_tokens)
    monkeypatch.setattr("model.CPU_BLOCK", 24)
    model, rng = tiny_model(qk_norm), random.Random(0)
    ids = lambda n: [rng.randrange(4096) for _ in range(n)]
    pairs = []
    # block_size is 64: the last ones are cut, or not, by their target
    for length in (1, 3, 20, 20, 50, 62, 63, 64, 65, 120):
        context = ids(length)
        pairs += [(context, ids(n)) for n in (1, 5, 5, 2)] + [(ids(length), ids(rng.randint(1, 64)))]
    # the same context, more often than fits a pass
    pairs += [(pairs[0][0], pairs[0][1])] * 2 + [([7], ids(1))] * 30
    for context in (ids(10), ids(70)):  # greedy continuations, and one with another last token
        new = []
        for _ in range(3):
            new.append(model(torch.tensor([(context + new)[-64:]]))[0, -1].argmax().item())
        pairs += [(context, new[:1]), (context, new), (context, [*new[:-1], (new[-1] + 1) % 4096])]
    ours, plain = scoring.score(model, pairs, "float32"), plain_scores(model, pairs)
    assert max(abs(a - b) for (a, _), (b, _) in zip(ours, plain)) < 2e-4
    assert [g for _, g in ours] == [g for _, g in plain] and 2 <= sum(g for _, g in ours) < 10


def test_endings_of_an_item_share_one_pass():
    context = list(range(30))
    pairs = [(context, [1, 2, 3]), (context, [4, 6]), (context[:-1], [1, 2]), (context, [5])]
    groups = scoring.share(pairs, 64)
    assert [len(targets) for _, targets in groups] == [2, 1, 1]
    idx, pos, mask, rows = scoring.pack(groups[:2], torch.device("cpu"))
    assert idx.shape == (2, 33) and mask.shape == (2, 1, 3, 33) and len(rows) == 7
    passed = sum(scoring.pack(b, torch.device("cpu"))[0].numel() for b in scoring.batches(
        scoring.share([(context, [i] * 5) for i in range(4)], 64), 2048))
    assert passed == 30 + 4 * 4


def test_passes_are_full():
    pairs = [(list(range(n)), [1, 2]) for n in range(5, 37)]
    passes = list(scoring.batches(scoring.share(pairs, 64), 100))
    assert sum(map(len, passes)) == 32 and all(len(b) * max(len(c) + 1 for c, _ in b) <= 100 for b in passes)
    assert len(passes) <= 1.5 * sum(n + 1 for n in range(5, 37)) / 100


def test_what_no_pass_can_score_is_none():
    """A target longer than the context, one without a token, and one with nothing before it."""
    model, good = tiny_model(False), ([1, 2], [3, 4])
    scores = scoring.score(model, [([1], [2] * 65), good, ([1], []), ([], [1]), ([1], [2] * 64)], "float32")
    assert [s is None for s in scores] == [True, False, True, True, False]
    assert scores[1][0] == pytest.approx(plain_scores(model, [good])[0][0])


def test_cudnn_attention_is_off_while_scoring_and_as_before_afterwards(study, monkeypatch):
    enabled, seen, model = torch.backends.cuda.cudnn_sdp_enabled, [], tiny_model(False)
    norm, before = model.norm.forward, enabled()
    monkeypatch.setattr(model.norm, "forward", lambda x: seen.append(enabled()) or norm(x))
    scoring.val_losses(model, study.tokens[:100], "float32")
    scoring.score(model, [([1, 2], [3]), ([1, 2], [4, 5])], "float32")
    evaluate.sample(model, evaluate.load_checkpoint(study.ckpt)[1], "a", length=1)
    assert before and enabled() and len(seen) >= 3 and not any(seen)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 0.02)])
def test_val_losses_predict_every_token_once(study, encoding, dtype, tolerance):
    model, tokens = tiny_model(False), study.tokens
    assert (len(tokens) - 1) % 64  # the last block is a part
    expected, n = [], 0
    for start in range(0, len(tokens) - 1, 64):
        block = torch.from_numpy(tokens[start:start + 65].astype(np.int64))
        logp = model(block[None, :-1])[0].double().log_softmax(-1)
        expected.append(-logp.gather(-1, block[1:, None]).sum().item())
        n += len(block) - 1
    nats, counts = scoring.val_losses(model, tokens, dtype)
    assert counts.sum() == n == len(tokens) - 1 and counts[0] == 64
    assert np.abs(nats / counts - np.array(expected) / counts).max() < tolerance
    config = dict(data_dir=str(study.data), vocab_size=4160, eval_tokens=0, data=study.meta)
    results = evaluate.run_val(model, evaluate.val_tokens(config), encoding, dtype)
    assert results["val_loss"] == pytest.approx(sum(expected) / n, abs=tolerance)
    assert results["val_ppl"] == pytest.approx(math.exp(results["val_loss"])) and results["val_tokens"] == n
    # meta.json counts the bytes of all text; the very first token is predicted by nothing
    text_bytes = study.meta["val_bytes"] - len(encoding.decode_single_token_bytes(tokens[0]))
    assert results["val_bits_per_byte"] == pytest.approx(nats.sum() / math.log(2) / text_bytes)
    spread = (nats / counts).std() / len(nats) ** 0.5
    assert spread / 1.5 < results["val_loss_stderr_bootstrap"] < spread * 1.5
    part = evaluate.run_val(model, evaluate.val_tokens(dict(config, eval_tokens=100)), encoding, dtype)
    assert part["val_tokens"] == 100 and part["val_loss"] != results["val_loss"]


# ---- export, against transformers ----

@needs_hf
@pytest.mark.parametrize("qk_norm, qk_gain", [(False, True), (True, True), (True, False)])
def test_exported_logits_are_ours(qk_norm, qk_gain, study, tmp_path):
    from transformers import AutoModelForCausalLM
    checkpoint = study.dir / ("muon_qk-seed137" if qk_norm else "muon-seed42") / "ckpt_step_7.pt"
    if not qk_gain:
        checkpoint = write_run(tmp_path / "muon_qk_frozen-seed1", tiny_model(True, qk_gain=False),
                               study.meta, study.data)
    export.export(checkpoint, tmp_path / "hf")
    theirs, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True)
    assert type(theirs).__name__ == ("Qwen3ForCausalLM" if qk_norm else "LlamaForCausalLM")
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    c = theirs.config
    assert (c.tie_word_embeddings, c.hidden_act, c.rms_norm_eps, c.num_key_value_heads, c.head_dim,
            c.attention_bias, c.max_position_embeddings, c.vocab_size, c.bos_token_id, c.eos_token_id) == (
        True, "silu", 1e-6, 2, 32, False, 64, 4160, EOT, EOT) and not getattr(c, "mlp_bias", False)
    assert c.rope_parameters["rope_theta"] == 10_000 and c.rope_parameters["rope_type"] == "default"
    idx = torch.randint(4096, (3, 64), generator=torch.Generator().manual_seed(1))
    ours = evaluate.load_checkpoint(checkpoint)[0]
    with torch.no_grad():
        difference = (theirs(idx).logits - ours(idx)).abs().max().item()
    assert difference == 0 and ours(idx).std() > 0.5
    gains = [w for name, w in theirs.named_parameters() if "q_norm" in name or "k_norm" in name]
    assert len(gains) == 4 * qk_norm and (qk_gain or all((w == 1).all() for w in gains))


@needs_hf
def test_padded_texts_of_an_export_give_what_they_give_alone(study):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    export.export(study.ckpt, study.tmp / "hf")
    tokenizer = AutoTokenizer.from_pretrained(study.tmp / "hf")
    model = AutoModelForCausalLM.from_pretrained(study.tmp / "hf", dtype=torch.float32)
    assert tokenizer.pad_token == tokenizer.eos_token and tokenizer.pad_token_id == EOT
    texts = ["the sea", "the old captain went to the garden by night and"]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    assert batch["attention_mask"].sum(1).tolist() == [len(tokenizer(t)["input_ids"]) for t in texts]
    for t, row in zip(texts, model.generate(**batch, max_new_tokens=12, do_sample=False)):
        alone = model.generate(**tokenizer(t, return_tensors="pt"), max_new_tokens=12, do_sample=False)[0]
        written = tokenizer.decode(row, skip_special_tokens=True)
        assert written == tokenizer.decode(alone, skip_special_tokens=True) and written.startswith(t)


def test_a_checkpoint_from_before_qk_gain_is_read(study):
    state = torch.load(study.dir / "muon_qk-seed137" / "ckpt_step_7.pt", weights_only=True)
    del state["config"]["qk_gain"]
    torch.save(state, study.tmp / "old.pt")
    model, config = evaluate.load_checkpoint(study.tmp / "old.pt")
    assert model.config.qk_gain \
        and torch.equal(model.h[0].attn.q_norm.weight, tiny_model(True).h[0].attn.q_norm.weight)


@needs_hf
@pytest.mark.parametrize("name", ["gpt2", "gpt2-4096"])
def test_exported_tokenizer_gives_the_same_ids(name, tmp_path):
    from transformers import AutoTokenizer
    encoding = evaluate.get_encoding(name)
    model = GPT(GPTConfig(16, 50304 if name == "gpt2" else 4096, 1, 1, 8, 8)).init_weights(torch.Generator())
    torch.save(dict(model=model.state_dict(), step=1, tokens=1,
                    config=dict(vars(model.config), data=dict(tokenizer=name))), tmp_path / "c.pt")
    export.export(tmp_path / "c.pt", tmp_path / "hf")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    rng = random.Random(0)
    letters = [*map(chr, [*range(32, 127), *range(161, 256)]), *"  \n\n\téßñ…—“”日本語🙂'"]
    texts = [row["text"] for row in lambada_rows(300)] + [
        "", " ", "  a  b ", "I've don't 1234567 o'clock", "\r\n x\u00a0y"]
    texts += ["".join(rng.choices(letters, k=rng.randint(1, 80))) for _ in range(300)]
    texts += ["".join(rng.choices("abeaaa" if i % 2 else "thine g", k=30)) for i in range(300)]
    for t in texts:
        ids = encoding.encode_ordinary(t)
        assert theirs.encode(t) == ids and theirs.decode(ids) == t, t
    assert theirs.bos_token_id == theirs.eos_token_id == encoding.eot_token \
        and len(theirs) == encoding.n_vocab
    assert theirs.encode("a<|endoftext|>")[-1] == encoding.eot_token


def test_export_refuses_and_leaves_nothing_half(study, monkeypatch):
    (study.tmp / "there").mkdir()
    with pytest.raises(ValueError, match="there already"):
        export.export(study.ckpt, study.tmp / "there")
    monkeypatch.setattr(export, "save", lambda *args, **more: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export.export(study.ckpt, study.tmp / "hf")
    assert not list(study.tmp.glob("hf*"))


# ---- tasks, against lm-eval's stock hf model ----

def pairs_of(task, encoding):
    return [scoring.encode_pair(encoding, *instance.args) for instance in task.instances]


@needs_hf
@pytest.mark.parametrize("qk_norm, block_size", [(False, 64), (True, 640)])
def test_tasks_equal_stock_hf_model(qk_norm, block_size, tmp_path, encoding, monkeypatch):
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    model, meta = tiny_model(qk_norm, block_size), dict(tokenizer="gpt2-4096")
    export.export(write_run(tmp_path / "run-seed1", model, meta, tmp_path), tmp_path / "hf")
    hf = HFLM(pretrained=str(tmp_path / "hf"), device="cpu", dtype="float32", batch_size=4)
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    # seconds of looking at the machine
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    rows = {"hellaswag": dict(train=hellaswag_rows(15, 1), validation=hellaswag_rows(20, 2)),
            "lambada": dict(test=lambada_rows(40))}
    for name, splits in rows.items():
        task = evaluate.build_task(name, splits)
        pairs = pairs_of(task, encoding)
        results = evaluate.run_task(name, task, pairs, model, "float32", name)
        # a built task belongs to its prompts: the stock model gets one of its own, as lm-eval's
        # command line would build it
        theirs = lm_eval.simple_evaluate(hf, tasks=[evaluate.build_task(name, splits)], bootstrap_iters=200,
                                         task_manager=TaskManager(include_defaults=False))
        stock_name = task.config.task
        stock = {key.removesuffix(",none"): value for key, value in theirs["results"][stock_name].items()}
        samples = theirs["samples"][stock_name]
        assert [s["arguments"] for s in samples] == [
            [i.args for i in task.instances if i.doc_id == s["doc_id"]] for s in samples]
        scored = [r for s in samples for r in s["filtered_resps"]]
        mine = scoring.score(model, pairs, "float32")
        assert np.abs(np.subtract([ll for ll, _ in scored], [ll for ll, _ in mine])).max() < 1e-3
        assert [g for _, g in scored] == [g for _, g in mine]
        for key in ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr"):
            assert results.get(key) == stock.get(key)
        assert results.get("ppl") == (pytest.approx(stock["perplexity"], rel=1e-4) if name == "lambada" else None)
        too_long = [any(len(hf.tok_encode(c + t)) > block_size + 1 for c, t in s["arguments"]) for s in samples]
        assert results["cut"] == sum(too_long) and results["n"] == len(samples)
        assert block_size == 640 or results["cut"] > 0
        assert block_size == 64 or name != "hellaswag" or results["cut"] < len(samples)


def test_prompts_are_the_stock_protocol():
    rows = dict(train=hellaswag_rows(30, 1), validation=hellaswag_rows(6, 2))
    task = evaluate.build_task("hellaswag", rows)
    again = evaluate.build_task("hellaswag", rows)
    # the same shots for all models
    assert [i.args for i in task.instances] == [i.args for i in again.instances]
    shots = {f"{r['activity_label']}: {r['ctx_a']}" for r in rows["train"]}
    for instance in task.instances:
        *before, last = instance.args[0].split("\n\n")
        assert len(before) == 10 and all(any(b.startswith(s) for s in shots) for b in before)
        assert not any(last.startswith(s) for s in shots)
    lambada = evaluate.build_task("lambada", dict(test=lambada_rows(5)))
    assert [i.args[0] + i.args[1] for i in lambada.instances] == [r["text"] for r in lambada_rows(5)]


def test_continuous_results_and_cuts(monkeypatch):
    def results_of(name, scores, splits, contexts=itertools.repeat(1)):
        monkeypatch.setattr(evaluate, "score", lambda *args: scores)
        task = evaluate.build_task(name, splits)
        pairs = [([5] * n, [6, 7]) for n, _ in zip(contexts, scores)]
        return evaluate.run_task(name, task, pairs, tiny_model(False), "float32", ""), task
    results, task = results_of("hellaswag", [(-float(i), False) for i in range(1, 21)], dict(
        train=hellaswag_rows(12, 1), validation=hellaswag_rows(5, 2)))
    docs = list(task.eval_docs)
    assert results["n"] == 5 and results["cut"] == 0
    assert results["acc"] == np.mean([doc["gold"] == 0 for doc in docs])  # the largest likelihood
    assert results["gold_nats_per_byte"] == pytest.approx(np.mean(
        [(4 * i + doc["gold"] + 1) / len(doc["choices"][doc["gold"]].encode()) for i, doc in enumerate(docs)]))
    nats = np.random.default_rng(0).normal(4, 0.5, 50).tolist()
    results, _ = results_of("lambada", [(-n, i < 20) for i, n in enumerate(nats)], dict(test=lambada_rows(50)))
    boot = np.exp(np.random.default_rng(1).choice(nats, (4000, 50)).mean(1)).std()
    assert results["acc"] == 0.4 and results["ppl"] == pytest.approx(math.exp(np.mean(nats)))
    assert results["ppl_stderr"] == pytest.approx(boot, rel=0.1) \
        and results["target_nats"] == pytest.approx(np.mean(nats))
    results, _ = results_of("lambada", [(-1.0, True)] * 3, dict(test=lambada_rows(3)), (62, 63, 64))
    assert results["cut"] == 1  # a pass of 64 predicts a 65th token


def test_pairs_are_those_of_stock_models(encoding):
    """Blanks at the end of a context, none at all, half a word."""
    from lm_eval.api.model import TemplateLM
    stock = types.SimpleNamespace(tok_encode=lambda text, **_: encoding.encode_ordinary(text), backend="causal")
    for context in ("the sea", "the sea ", "the  \n ", "  ", " ", "caf"):
        for target in (" wind", "é", "  went on", ""):
            assert scoring.encode_pair(encoding, context, target) \
                == tuple(TemplateLM._encode_pair(stock, context, target))
    assert scoring.encode_pair(encoding, "", "sea") == ([EOT], encoding.encode_ordinary("sea"))


# ---- the command ----

def test_a_study_from_the_command_line_without_a_network(study):
    rows = write_rows(study.tmp / "rows", lambada_openai=lambada_rows(20))
    # nothing answers there, and nothing is in the cache, so that this test is the same with a network
    env = dict(os.environ, HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(study.tmp / "cache"),
               OMP_NUM_THREADS="1", HF_HUB_OFFLINE="")
    done = subprocess.run(
        [sys.executable, ROOT / "evaluate.py", study.dir, "--rows", rows, "--device=cpu"], env=env,
        cwd=study.tmp, capture_output=True, text=True, timeout=60)  # retries would take longer
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert sum(line.startswith("hellaswag not available: ")
               and "cannot be reached (" in line for line in lines) == 1
    assert "muon_qk-seed42 is left out: diverged" in lines and "muon-seed137 is left out: unfinished" in lines
    results = json.loads((study.dir / "results.json").read_text())
    assert set(results["runs"]) == {"muon-seed42", "muon_qk-seed137"} \
        and set(results["left_out"]) == {"muon_qk-seed42", "muon-seed137"}
    for run in results["runs"].values():
        assert run["checkpoint"] == "ckpt_step_7.pt" and run["step"] == 7 \
            and run["val_tokens"] == len(study.tokens) - 1
        assert list(run["hellaswag"]) == ["not_available"]
        assert run["lambada"]["n"] == 20 and 0 <= run["lambada"]["acc"] <= 1


def test_evaluating_again(study, monkeypatch):
    rows = write_rows(study.tmp / "rows", lambada_openai=lambada_rows(10),
                      hellaswag_train=hellaswag_rows(12, 1), hellaswag_validation=hellaswag_rows(5, 2))
    scored = []
    run_task, run_val = evaluate.run_task, evaluate.run_val
    monkeypatch.setattr(evaluate, "run_task",
                        lambda name, *rest: scored.append(name) or run_task(name, *rest))
    monkeypatch.setattr(evaluate, "run_val", lambda *rest: scored.append("val") or run_val(*rest))
    path = study.dir / "results.json"

    def go(*args):
        scored.clear()
        call(monkeypatch, study.dir, "--rows", rows, "--device=cpu", *args)
        return json.loads(path.read_text())["runs"]

    first = go()
    assert sorted(scored) == sorted(["val", "hellaswag", "lambada"] * 2)
    assert go() == first and not scored  # nothing is repeated
    path.unlink()
    random.seed(99), np.random.seed(99), torch.manual_seed(99)
    assert go() == first and len(scored) == 6  # to the last bit, whatever the global generators hold
    write_rows(rows, lambada_openai=lambada_rows(11))
    assert go()["muon-seed42"]["lambada"]["n"] == 11 and scored == ["lambada"] * 2
    state = torch.load(study.ckpt, weights_only=True)
    state["model"]["wte.weight"] *= 1.1
    torch.save(state, study.ckpt)
    # one run's three parts
    assert go()["muon-seed42"]["val_loss"] != first["muon-seed42"]["val_loss"] and len(scored) == 3
    before = path.read_text()
    # from when there was a third task
    path.write_text(before.replace('"lambada": {', '"wikitext": {"word_ppl": 9.0}, "lambada": {', 1))
    assert go() == json.loads(before)["runs"] and not scored
    path.write_text(before[:100])
    with pytest.raises(ValueError, match="results.json is no JSON .*: restore it or delete it"):
        go()
    path.write_text(before)
    monkeypatch.setattr(evaluate, "build_task", lambda *args: (_ for _ in ()).throw(OSError("no network")))
    (rows / "lambada_openai.jsonl").unlink()
    # local rows' results outlive a start without them
    assert go() == json.loads(before)["runs"] and not scored

    def killed(model, config, *rest):
        if model.config.qk_norm:
            raise KeyboardInterrupt
        return run_val(model, config, *rest)
    monkeypatch.setattr(evaluate, "run_val", killed)
    with pytest.raises(KeyboardInterrupt):
        go("--dtype=bfloat16")
    done, before = json.loads(path.read_text())["runs"], json.loads(before)["runs"]
    assert done["muon-seed42"]["dtype"] == "bfloat16" and done["muon_qk-seed137"] == before["muon_qk-seed137"]
    assert not list(study.dir.rglob("*.tmp"))


LONG = "x" + "é" * 70  # one word of more than block_size tokens


def test_rows_that_cannot_be_scored_are_named_and_left_out(study, offline, monkeypatch, capsys):
    good, hella = lambada_rows(6), hellaswag_rows(5, 2)
    at = hella[3]["label"]
    hella[3]["endings"][at] = LONG
    rows = write_rows(study.tmp / "rows", lambada_openai=[good[0], dict(text=f"the sea {LONG}"),
                                                          *good[1:], dict(text="  sea")],
                      hellaswag_train=hellaswag_rows(12, 1), hellaswag_validation=hella)
    call(monkeypatch, study.dir, "--rows", rows, "--device=cpu")
    out = capsys.readouterr().out
    run = json.loads((study.dir / "results.json").read_text())["runs"]["muon-seed42"]
    assert ("muon-seed42 lambada: row 2, 8 left out: a text to score has no token, nothing before it, "
            "or more than 64 tokens") in out
    assert "muon-seed42 hellaswag: row 4 left out" in out
    assert run["lambada"]["left_out"] == [1, 7] and run["hellaswag"]["left_out"] == [3] \
        and run["hellaswag"]["n"] == 4
    write_rows(rows, lambada_openai=good)
    call(monkeypatch, study.dir, "--rows", rows, "--device=cpu")
    clean = json.loads((study.dir / "results.json").read_text())["runs"]["muon-seed42"]["lambada"]
    assert clean == dict(run["lambada"], left_out=[])
    write_rows(rows, lambada_openai=[dict(text=f"the sea {LONG}")])
    call(monkeypatch, study.dir, "--rows", rows, "--device=cpu")
    run = json.loads((study.dir / "results.json").read_text())["runs"]["muon-seed42"]
    assert run["lambada"] == dict(not_available="none of its texts can be scored") \
        and run["hellaswag"]["n"] == 4


@pytest.mark.parametrize("harm, says", [
    (lambda data: data.rename(data.with_name("elsewhere")), "meta.json is missing"),
    (lambda data: (data / "val_set.bin").unlink(), "val_set.bin is missing"),
    (lambda data: (data / "val_set.bin").write_bytes(b"ab"), "val_set.bin has 2 bytes"),
    (lambda data: (data / "meta.json").write_text(
        (data / "meta.json").read_text().replace('"val_sha256": "', '"val_sha256": "0')),
     "holds other val tokens")])
def test_without_its_data_all_else_is_evaluated(harm, says, study, offline, monkeypatch, capsys):
    rows = write_rows(study.tmp / "rows", lambada_openai=lambada_rows(5))
    go = lambda: call(monkeypatch, study.dir, "--rows", rows, "--device=cpu")
    go()
    before = json.loads((study.dir / "results.json").read_text())["runs"]
    harm(study.data)
    go()
    assert json.loads((study.dir / "results.json").read_text())["runs"] == before  # what is known stays
    (study.dir / "results.json").unlink()
    capsys.readouterr()
    go()
    out = capsys.readouterr().out
    assert sum(line.startswith("val not available: ") and says in line for line in out.splitlines()) == 1
    after = json.loads((study.dir / "results.json").read_text())["runs"]
    for name, run in after.items():
        assert says in run["val"]["not_available"] and "val" not in run["done"] and "val_loss" not in run
        assert run["lambada"] == before[name]["lambada"]
    call(monkeypatch, "--ckpt", study.ckpt, "--rows", rows, "--device=cpu")
    assert says in json.loads(capsys.readouterr().out)["val"]["not_available"]
    call(monkeypatch, "--ckpt", study.ckpt, "--sample", "a", "--device=cpu")


def strict(path):
    return json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@pytest.mark.parametrize("weight, factor", [
    ("wte.weight", math.nan), ("norm.weight", 1e38), ("norm.weight", 1e4)])
def test_numbers_that_overflow_never_reach_a_file(weight, factor, study, monkeypatch, capsys):
    """Weights of nan; logits of inf; and a loss that is finite, whose perplexity is not."""
    state = torch.load(study.ckpt, weights_only=True)
    state["model"][weight] *= factor
    torch.save(state, study.ckpt)
    rows = write_rows(study.tmp / "rows", lambada_openai=lambada_rows(3),
                      hellaswag_train=hellaswag_rows(12, 1), hellaswag_validation=hellaswag_rows(5, 2))
    call(monkeypatch, study.dir, "--rows", rows, "--device=cpu")
    runs = strict(study.dir / "results.json")["runs"]
    assert "not_available" in runs["muon-seed42"]["val"] and "val not available" in capsys.readouterr().out
    assert runs["muon_qk-seed137"]["val_loss"] > 0 and runs["muon_qk-seed137"]["hellaswag"]["n"] == 5


def test_a_damaged_checkpoint_is_named_and_all_others_are_evaluated(study, monkeypatch):
    monkeypatch.setattr(evaluate, "TASKS", {})
    study.ckpt.write_bytes(study.ckpt.read_bytes()[:5000])
    with pytest.raises(ValueError, match="1 of 2 runs could not be evaluated: "
                                         ".*muon-seed42.*is no whole checkpoint"):
        call(monkeypatch, study.dir, "--device=cpu")
    results = strict(study.dir / "results.json")
    assert set(results["runs"]) == {"muon_qk-seed137"} \
        and "no whole checkpoint" in results["left_out"]["muon-seed42"]


def test_results_outlive_their_checkpoints(study, monkeypatch):
    monkeypatch.setattr(evaluate, "TASKS", {})
    call(monkeypatch, study.dir, "--device=cpu")
    before = strict(study.dir / "results.json")["runs"]
    study.ckpt.unlink()  # to save space
    call(monkeypatch, study.dir, "--device=cpu")
    assert strict(study.dir / "results.json")["runs"] == before
    (study.dir / "results.json").unlink()
    with pytest.raises(ValueError, match="1 of 2 runs could not be evaluated: .*ckpt_step_7.pt"):
        call(monkeypatch, study.dir, "--device=cpu")
    with open(study.dir / "muon-seed42" / "log.jsonl", "a") as f:
        f.write('{"event": "diverged"}\n')
    call(monkeypatch, study.dir, "--device=cpu")
    assert set(strict(study.dir / "results.json")["runs"]) == {"muon_qk-seed137"}


@pytest.mark.parametrize("device", ["mps", "xpu", "foo", "cuda:x", "cuda:7", "cuda", ""])
def test_devices_that_are_not_there(device, study, monkeypatch):
    if device.startswith("cuda") and torch.cuda.device_count() > 7 * (device == "cuda:7"):
        pytest.skip("that GPU is here")
    for args in ([study.dir], ["--ckpt", study.ckpt], ["--ckpt", study.ckpt, "--sample", "a"]):
        with pytest.raises(ValueError, match=f"^device '?{device}"):
            call(monkeypatch, *args, f"--device={device}")
    assert not (study.dir / "results.json").exists()


def test_float32_is_not_tf32(study, monkeypatch):
    """As a vendor's container may have it."""
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        call(monkeypatch, "--ckpt", study.ckpt, "--sample", "a", "--device=cpu")
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision(before)


def test_one_checkpoint_is_printed(study, offline, monkeypatch, capsys):
    rows = write_rows(study.tmp / "rows", lambada_openai=lambada_rows(5))
    call(monkeypatch, "--ckpt", study.ckpt, "--rows", rows, "--device=cpu")
    printed = json.loads(capsys.readouterr().out)
    nats, counts = scoring.val_losses(tiny_model(False), study.tokens, "float32")
    assert printed["val_loss"] == pytest.approx(nats.sum() / counts.sum()) and printed["lambada"]["n"] == 5
    assert printed["hellaswag"] == dict(not_available="x cannot be reached")
    assert not (study.dir / "results.json").exists()


def test_sample_continues_a_text(study, monkeypatch, capsys):
    call(monkeypatch, "--ckpt", study.ckpt, "--sample", "Once upon", "--device=cpu")
    printed = capsys.readouterr().out
    assert printed.startswith("Once upon") and len(printed) > 100
    model, config = evaluate.load_checkpoint(study.ckpt)
    state = torch.random.get_rng_state()
    assert evaluate.sample(model, config, "Once upon") + "\n" == printed  # and slides past block_size 64
    assert evaluate.sample(model, config, "Once upon", seed=2) + "\n" != printed \
        and torch.equal(state, torch.random.get_rng_state())
    with torch.no_grad():
        model.wte.weight[4096:] *= 100  # padded rows win every argmax, and are no text
    assert evaluate.sample(model, config, "") \
        and evaluate.sample(model, config, "Once", length=3).startswith("Once")


# ---- wrong input: one clear line ----

GOOD = hellaswag_rows(1, 0)[0]


@pytest.mark.parametrize("file, line", [
    *(("lambada_openai", line) for line in (
        "", "{'text'", "[1]", '{"txt": "a b"}', '{"text": 3}', '{"text": " "}', "[" * 10_000,
        '{"text": "half a pair \\ud800"}', '{"text": "no UTF-8 \udcff"}')),
    *(("hellaswag_validation", json.dumps({**GOOD, **wrong})) for wrong in (
        dict(endings="abcd"), dict(endings=["a", 2]), dict(endings=["a", ""]), dict(endings=None),
        dict(ctx_a=3), dict(label=""), dict(label=4), dict(label="9" * 5000), dict(label=math.nan),
        dict(label=True))),
    ("hellaswag_validation", json.dumps(dict(GOOD, label=7)).replace("7", "7" * 5000)),
])
def test_wrong_rows_name_file_and_line(file, line, tmp_path):
    good = dict(lambada_openai=lambada_rows(1),
                hellaswag_train=hellaswag_rows(10, 1), hellaswag_validation=[GOOD])
    rows = write_rows(tmp_path, **good)
    assert set(evaluate.local_rows(rows)) == set(evaluate.TASKS)
    with open(rows / f"{file}.jsonl", "ab") as f:
        f.write(line.encode(errors="surrogateescape") + b"\n")
    with pytest.raises(ValueError) as e:
        evaluate.local_rows(rows)
    assert f"{file}.jsonl, line 2: " in str(e.value) and len(str(e.value)) < 400
    assert "is no JSON object in UTF-8 with valid" in str(e.value)


def test_a_byte_order_mark_and_line_separators_inside_a_text(tmp_path):
    line = json.dumps(row := dict(text="one\u2028two\x85three"), ensure_ascii=False).encode()
    (tmp_path / "lambada_openai.jsonl").write_bytes(b"\xef\xbb\xbf" + line + b"\r\n")
    assert evaluate.local_rows(tmp_path)["lambada"][1] == {"test": [row]}


def test_wrong_row_folders(tmp_path):
    for files, expected in (
            (dict(), "holds no rows"), (dict(lambada_openai=[]), "lambada_openai.jsonl has 0 rows: give at least 1"),
            (dict(hellaswag_validation=[GOOD]), "hellaswag_train.jsonl is missing"),
            (dict(hellaswag_validation=[GOOD], hellaswag_train=hellaswag_rows(9, 1)),
             "hellaswag_train.jsonl has 9 rows: give at least 10")):
        folder = write_rows(tmp_path / str(len(expected)), **files)
        with pytest.raises(ValueError, match=expected):
            evaluate.local_rows(folder)
    (tmp_path / "lambada_openai.jsonl").write_bytes('{"text": "a b"}\n'.encode("utf-16"))
    with pytest.raises(ValueError, match="lambada_openai.jsonl, line 1: .* is no JSON object in UTF-8"):
        evaluate.local_rows(tmp_path)


def test_wrong_checkpoints_and_folders(study, monkeypatch):
    state = torch.load(study.ckpt, weights_only=True)
    no_ckpt, cut, other, pickled = (study.tmp / name for name in ("a.pt", "b.pt", "c.pt", "d.pt"))
    no_ckpt.write_text("hello")
    cut.write_bytes(study.ckpt.read_bytes()[:5000])
    torch.save(dict(weights=state["model"]), other)
    torch.save(dict(state, config=dict(state["config"], n_layer=3)), pickled)
    for path in (no_ckpt, cut, other, pickled):
        for tool in (evaluate.load_checkpoint, lambda p: export.export(p, study.tmp / "hf")):
            with pytest.raises(ValueError, match="is no whole checkpoint of train.py"):
                tool(path)
    with pytest.raises(ValueError, match="none.pt is no whole checkpoint.*FileNotFoundError"):
        evaluate.load_checkpoint(study.tmp / "none.pt")
    (study.tmp / "empty").mkdir()
    for args, expected in (
            ([study.tmp / "none"], "holds no final checkpoint"),
            ([study.tmp / "empty"], "holds no final checkpoint"), ([], "give a"),
            ([study.dir, "--ckpt", study.ckpt], "give a"), ([study.dir, "--sample", "a"], "give a"),
            ([study.dir, "--rows", study.tmp / "none"], "holds no rows")):
        with pytest.raises(ValueError, match=expected):
            call(monkeypatch, *args)
    assert not (study.tmp / "hf").exists()


@pytest.mark.parametrize("script, args", [
    ("evaluate.py", ["--ckpt", "none.pt"]), ("evaluate.py", ["--dtype=float8", "none"]),
    ("tools/export.py", ["none.pt", "hf"])])
def test_errors_are_one_line(script, args, tmp_path):
    done = subprocess.run([sys.executable, ROOT / script, *args], cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.returncode == 1 and done.stdout == "" and done.stderr.startswith("error: ") \
        and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
