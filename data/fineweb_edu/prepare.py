"""FineWeb-Edu, sample-10BT: 305M train and 5M val tokens.
python data/fineweb_edu/prepare.py [--train_tokens N] [--val_tokens N]

Streams only as much as it needs (about 1.5 GB of text) and keeps nothing but the tokens (620 MB). Killed at any moment,
the same command goes on, and the result is byte for byte the same. Documents come in the order of one pinned
revision. The sha256 of a document's text decides between val and train, so copies of a text are always on the same
side. A side ends with the document that reaches its number of tokens.
"""
import glob
import itertools
import json
import os
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]
import tokens  # noqa: E402
from configurator import whole_file  # noqa: E402

REVISION = "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9"
HUB = f"hf://datasets/HuggingFaceFW/fineweb-edu@{REVISION}/sample/10BT/*.parquet"
BATCH = 1000  # documents between two commits, about 5 MB of text, so that fsync costs little


def read_batches(files, stream, n_read):
    """Yields (list of str, where the stream stands after it), from the stream's state on, n_read documents into it.
    files: HUB or patterns of local paths. Raises ValueError."""
    try:
        import datasets  # here, since it takes a second
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs is raised below
        with tempfile.TemporaryDirectory() as cache:  # for a lock file; home may be read-only
            rows = datasets.load_dataset("parquet", data_files=files, columns=["text"], split="train",
                                         batch_size=BATCH, streaming=True, cache_dir=cache)
        if stream:
            rows.load_state_dict(stream)
        each = enumerate(rows, n_read + 1)
        while batch := list(itertools.islice(each, BATCH)):
            for number, row in batch:
                if not isinstance(row["text"], str):
                    raise ValueError(f"row {number:,} has no text")
            yield [row["text"] for _, row in batch], rows.state_dict()
    except Exception as e:  # the hub's client has dozens of kinds; what helps is the same for all
        source = "the Hugging Face hub" if files == HUB else "the parquet files"
        raise ValueError(f"cannot read {source} ({type(e).__name__}: {e}): check network and files and run the same "
                         "command again, it goes on; --parquet DIR takes downloaded files") from e


def side(text, wanted):
    """Val gets a tenth more than its share, so that it is full before train is; the rest is left out."""
    draw = int.from_bytes(tokens.key(text), "big")
    return "val" if 10 * draw * sum(wanted.values()) < 11 * wanted["val"] * 2**64 else "train"


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
        found = [file.resolve() for file in tokens.find_files(args.parquet, [".parquet"])]
        files = [glob.escape(str(file)) for file in found]
        source = f"{len(found)} parquet files, {sum(file.stat().st_size for file in found):,} bytes"
    settings = dict(tokenizer=args.tokenizer, train_tokens=wanted["train"], val_tokens=wanted["val"], source=source)
    state_file = args.out / "state.json"
    if tokens.is_whole(args.out, settings):
        state_file.unlink(missing_ok=True)
        return
    encoding = tokens.get_encoding(args.tokenizer)

    # state.json says how many tokens of the .bin files are on disk for sure; what they hold beyond that is cut off
    state = dict(settings=settings, stream=None, rows=0, train=0, val=0)
    if state_file.exists():
        state = json.loads(state_file.read_text())
        print(f"going on after {state['rows']:,} documents")
    if state["settings"] != settings:
        raise ValueError(f"{args.out} holds half a data set with other settings ({state['settings']}): give those "
                         f"again, or delete {state_file} to start anew")
    batches = read_batches(files, state["stream"], state["rows"])
    try:
        with open(args.out / "train.bin", "ab") as train, open(args.out / "val_set.bin", "ab") as val, \
                tqdm(total=sum(wanted.values()), initial=state["train"] + state["val"], unit="tok", unit_scale=True,
                     disable=None) as bar:
            outputs = {"train": train, "val": val}
            for split, f in outputs.items():
                if f.tell() < 2 * state[split]:
                    raise ValueError(f"{f.name} is shorter than {state_file} says: delete that to start anew")
                f.truncate(2 * state[split])
            while any(state[split] < wanted[split] for split in wanted):
                texts, state["stream"] = next(batches, (None, None))
                if not texts:
                    state_file.unlink(missing_ok=True)
                    raise ValueError(f"{source} ended after {state['rows']:,} documents with {state['train']:,} train "
                                     f"and {state['val']:,} val tokens: ask for less")
                state["rows"] += len(texts)
                for split, f in outputs.items():
                    mine = [text for text in texts if side(text, wanted) == split]
                    for ids in tokens.encode(mine, encoding):
                        if state[split] < wanted[split]:
                            f.write(ids)
                            state[split] += len(ids)
                    f.flush()
                    os.fsync(f.fileno())
                with whole_file(state_file) as f:
                    f.write(json.dumps(state).encode())
                bar.update(state["train"] + state["val"] - bar.n)
    except OSError as e:
        raise OSError(f"cannot write to {args.out} ({e.strerror or e}): free some space and run the same command "
                      "again, it goes on where it was") from e
    tokens.save_meta(args.out, encoding, source, settings)
    state_file.unlink()


if __name__ == "__main__":
    tokens.run(main)
