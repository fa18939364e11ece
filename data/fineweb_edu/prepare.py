"""FineWeb-Edu, sample-10BT: 305M train and 5M val tokens.
python data/fineweb_edu/prepare.py [--train_tokens N] [--val_tokens N]

Streams only as much as it needs (about 1.5 GB of text) and keeps nothing but the tokens (620 MB). Killed at
any moment, the same command goes on, and the result is byte for byte the same. Documents come in the order of
one pinned revision. The sha256 of a document's text decides between val and train, so copies of a text are
always on the same side. A side ends with the document that reaches its number of tokens.
"""
import glob
import hashlib
import json
import os
import shutil
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import tokens  # noqa: E402

REVISION = "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9"
HUB = f"hf://datasets/HuggingFaceFW/fineweb-edu@{REVISION}/sample/10BT/*.parquet"
COMMIT = 4  # chunks of about a million characters between two commits, so that fsync costs little


def read_chunks(files, state, number):
    """(list of str, where the stream stands after it), from state, number rows on. files: HUB or paths."""
    local = files != HUB
    try:
        import datasets  # here, since it takes a second
        if local:
            datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs is raised below
        names = [glob.escape(file) for file in files] if local else HUB
        with tempfile.TemporaryDirectory() as cache:  # for a lock file; home may be read-only
            rows = datasets.load_dataset("parquet", data_files=names, columns=["text"], split="train",
                                         batch_size=1000, streaming=True, cache_dir=cache)
        if state:
            rows.load_state_dict(state)
        for chunk in tokens.chunks(text_of(row, files, at) for at, row in enumerate(rows, number + 1)):
            yield chunk, rows.state_dict()
    except Exception as e:  # the hub's client has dozens of kinds; what helps is the same for all
        source = "the parquet files" if local else "the Hugging Face hub"
        raise OSError(f"cannot read {source} ({type(e).__name__}: {e}): check network and files and run "
                      "the same command again, it goes on; --parquet DIR takes downloaded files") from e


def text_of(row, files, number):
    if isinstance(row["text"], str):
        return row["text"]
    for file in [] if files == HUB else files:
        if number <= (n := tokens.open_parquet(file).metadata.num_rows):
            raise ValueError(f"{file} row {number:,} has no text")
        number -= n
    raise ValueError(f"row {number:,} has no text")


def side(text, args):
    """Val gets a tenth more than its share, so that it is full before train is; the rest is left out."""
    draw = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    both = args.train_tokens + args.val_tokens
    return "val" if 10 * draw * both < 11 * args.val_tokens * 2**64 else "train"


def main():
    parser = tokens.parser(__doc__, "gpt2", HERE)
    parser.add_argument("--train_tokens", type=int, default=305_000_000)
    parser.add_argument("--val_tokens", type=int, default=5_000_000)
    parser.add_argument("--parquet", type=tokens.path, help="folder with .parquet files, instead of the hub")
    args = parser.parse_args()
    wanted = {"train": args.train_tokens, "val": args.val_tokens}
    if min(wanted.values()) <= 0:
        raise ValueError("train_tokens and val_tokens have to be positive")
    files, source = HUB, f"FineWeb-Edu sample-10BT, revision {REVISION}"
    if args.parquet:
        files = sorted(str(file.resolve()) for file in tokens.find_files([args.parquet], [".parquet"]))
        for file in files:
            tokens.open_parquet(file)
        source = f"{len(files)} parquet files, {sum(os.path.getsize(file) for file in files):,} bytes"
    settings = dict(tokenizer=args.tokenizer, train_tokens=args.train_tokens, val_tokens=args.val_tokens,
                    source=source)
    state_file = args.out / "state.json"
    bins = {split: args.out / file for split, file in tokens.FILES.items()}
    tmp = {split: path.with_name(path.name + ".tmp") for split, path in bins.items()}
    if tokens.is_whole(args.out, settings):
        state_file.unlink(missing_ok=True)
        return
    encoding = tokens.get_encoding(args.tokenizer)

    # state.json says how much of the .tmp files is on disk for sure; what they hold beyond that is cut off
    start = dict(settings=settings, stream=None, rows=0)
    start |= {split: dict(tokens=0, documents=0, bytes=0, crc=0) for split in bins}
    state = start
    if state_file.exists():
        try:
            state = json.loads(state_file.read_text())
            [state[key] for key in start]
        except (ValueError, TypeError, KeyError) as e:
            raise ValueError(f"{state_file} is damaged ({e}): delete it to start anew") from None
    if state["settings"] != settings:
        raise ValueError(f"{args.out} holds half a data set with other settings ({state['settings']}): give "
                         f"those again, or delete {state_file} to start anew")
    for split in bins:
        if state["rows"] and not tmp[split].exists() and bins[split].exists():
            bins[split].rename(tmp[split])  # killed between the renames at the end
        if (tmp[split].stat().st_size if tmp[split].exists() else 0) < 2 * state[split]["tokens"]:
            print(f"{tmp[split]} is shorter than {state_file} says: starting anew")
            state = start
    if state["rows"]:
        print(f"going on after {state['rows']:,} documents")
    done = sum(state[split]["tokens"] for split in bins)
    free, needed = shutil.disk_usage(args.out).free, 2 * (sum(wanted.values()) - done)
    if free < needed:
        raise OSError(f"{args.out} has {free / 1e6:,.0f} MB free and needs {needed / 1e6:,.0f} MB: free "
                      "some, or give another --out")

    def encode_sides(item):
        chunk, stream = item
        sides = {split: [text for text in chunk if side(text, args) == split] for split in bins}
        return len(chunk), stream, {split: tokens.encode(texts, encoding) for split, texts in sides.items()}

    outputs = {}
    for split in bins:
        outputs[split] = open(tmp[split], "r+b" if tmp[split].exists() else "w+b")
        outputs[split].truncate(2 * state[split]["tokens"])
        outputs[split].seek(0, os.SEEK_END)

    def missing():
        return any(state[split]["tokens"] < wanted[split] for split in bins)

    with tqdm(total=sum(wanted.values()), initial=done, unit="tok", unit_scale=True, disable=None) as bar:
        chunks = read_chunks(files, state["stream"], state["rows"]) if missing() else []
        for number, (rows, stream, sides) in enumerate(tokens.in_order(encode_sides, chunks), 1):
            try:
                for split, (ids, ends, sizes) in sides.items():
                    old = state[split]
                    before = np.concatenate([[0], ends[:-1]]) if len(ends) else ends
                    n = int((before < wanted[split] - old["tokens"]).sum())  # documents, the filling one too
                    piece = ids[:ends[n - 1]].tobytes() if n else b""
                    outputs[split].write(piece)
                    bar.update(len(piece) // 2)
                    state[split] = dict(
                        tokens=old["tokens"] + len(piece) // 2, documents=old["documents"] + n,
                        bytes=old["bytes"] + int(sizes[:n].sum()), crc=zlib.crc32(piece, old["crc"]))
                state |= dict(rows=state["rows"] + rows, stream=stream)
                if number % COMMIT == 0 or not missing():
                    for f in outputs.values():
                        f.flush()
                        os.fsync(f.fileno())
                    with tokens.aside(state_file) as f:
                        f.write(json.dumps(state).encode())
            except OSError as e:
                raise OSError(f"cannot write to {args.out} ({e.strerror or e}): free some space and run the "
                              "same command again, it goes on where it was") from e
            if not missing():
                break
    for f in outputs.values():
        f.close()
    if missing():
        for path in [state_file, *tmp.values()]:
            path.unlink(missing_ok=True)
        held = " and ".join(f"{state[split]['tokens']:,} {split} tokens" for split in bins)
        raise ValueError(f"{source} ended after {state['rows']:,} documents with {held}: ask for less")

    for split in bins:
        written = state[split]
        written["sha256"] = tokens.sha256_of(tmp[split])
        n, documents, crc = 0, 0, 0
        for piece in tokens.pieces(tmp[split]):
            n, crc = n + len(piece), zlib.crc32(piece, crc)
            documents += int((piece == encoding.eot_token).sum())
        if (n, documents, crc) != (written["tokens"], written["documents"], written.pop("crc")):
            state_file.unlink()
            raise OSError(f"{tmp[split]} is not what was written to it: check the disk and run this again")
    for split in bins:
        os.replace(tmp[split], bins[split])
    tokens.save_meta(args.out, args.tokenizer, state["train"], state["val"], source, settings,
                     rows_read=state["rows"], split="by sha256 of a document's text, in the source's order")
    state_file.unlink()


if __name__ == "__main__":
    tokens.run(main)
