"""Your own text. python data/text/prepare.py PATH [--out DIR] [--tokenizer gpt2-4096] [--val_every N]

PATH is a file or a folder of files, taken in sorted order: .txt and .md, .jsonl (one JSON object a line, the text
under "text"), each also packed as .gz or .zst, and .parquet (the text in the column "text"). A document is one object
or row, or in .txt and .md a passage: lines up to the first blank one after 1,000 characters, or up to 4,000.
Every tenth document goes to val; give a larger N for a large corpus. Val keeps no document, and in .txt and .md no
line, that train has too: taking them out of train instead would take every common line out, such as the names of the
speakers in a play.
"""
import io
import json
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]
import tokens  # noqa: E402

ENDINGS = [kind + end for kind in (".txt", ".md", ".jsonl") for end in ("", ".gz", ".zst")] + [".parquet"]
NOT_TEXT = re.compile("[\0\ud800-\udfff]")


def read_documents(files):
    """Yields each document as the list of its units, what must not be in both splits: the lines of a passage or the
    one text of an object. Raises ValueError with the file and the line or row that cannot be read."""
    for file in files:
        kind = next(ending for ending in ENDINGS if file.name.lower().endswith(ending)).split(".")[1]
        number, passage = 1, ""
        try:
            for record in records(file, kind):
                if kind in ("txt", "md"):
                    if NOT_TEXT.search(record):
                        raise ValueError("not UTF-8, maybe UTF-16")
                    passage += record
                    number += record.endswith("\n")
                    if len(passage) >= 4000 or len(passage) >= 1000 and not record.strip():
                        yield passage.split("\n")
                        passage = ""
                else:
                    record.encode()  # JSON can hold half a surrogate pair, UTF-8 cannot
                    number += 1
                    if record.strip():
                        yield [record]
            if passage.strip():
                yield passage.split("\n")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            raise ValueError(f"{file} {'row' if kind == 'parquet' else 'line'} {number:,} is no text in UTF-8, or no "
                             f'string "text" ({type(e).__name__}: {e}): mend it or leave it out') from None


def records(file, kind):
    """Yields the texts of a file's rows or objects; of .txt and .md its lines, 4,000 characters of one at most, since
    a file may be one line."""
    if kind == "parquet":
        import pyarrow.parquet
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(1000, columns=["text"]):
            yield from batch["text"].to_pylist()
        return
    import pyarrow  # here, since it is slow
    packed = {".gz": "gzip", ".zst": "zstd"}.get(file.suffix.lower())
    binary = io.BufferedReader(pyarrow.input_stream(str(file), packed))
    # what is not UTF-8 comes as lone surrogates, and so is found where its line is known
    with io.TextIOWrapper(binary, "utf-8-sig", "surrogateescape") as f:
        if kind == "jsonl":
            yield from (json.loads(line)["text"] if line.strip() else "" for line in f)
        else:
            yield from iter(lambda: f.readline(4000), "")


def main():
    parser = tokens.parser(__doc__, "gpt2", HERE)
    parser.add_argument("path", type=tokens.path, metavar="PATH")
    parser.add_argument("--val_every", type=int, default=10, help="one document in so many goes to val")
    args = parser.parse_args()
    if args.val_every < 2:
        raise ValueError(f"--val_every={args.val_every}: it has to be 2 or more")
    files = tokens.find_files(args.path, ENDINGS)
    hashes = " ".join(str(tokens.sha256_of(file)) for file in files)
    settings = dict(tokenizer=args.tokenizer, val_every=args.val_every, input=tokens.key(hashes).hex())
    if tokens.is_whole(args.out, settings):
        return
    encoding = tokens.get_encoding(args.tokenizer)

    # this first pass reads everything, so an error in the input comes up before anything is written
    val = [units for i, units in enumerate(read_documents(files)) if i % args.val_every == 0]
    val_units = {unit.strip() for units in val for unit in units} - {""}
    common = set()

    def train_texts():
        for i, units in enumerate(read_documents(files)):
            if i % args.val_every:
                common.update(val_units.intersection(map(str.strip, units)))
                yield "\n".join(units)

    tokens.write_bin(args.out / "train.bin", train_texts(), encoding)
    left = ("\n".join(unit for unit in units if unit.strip() not in common) for units in val)
    tokens.write_bin(args.out / "val_set.bin", filter(str.strip, left), encoding)
    if not all((args.out / file).stat().st_size for file in tokens.FILES.values()):
        raise ValueError(f"{args.path} is too short to be split, or repeats itself so that all that could be val is in "
                         "train as well")
    tokens.save_meta(args.out, encoding, f"{len(files)} files at {args.path.resolve().name}", settings)


if __name__ == "__main__":
    tokens.run(main)
