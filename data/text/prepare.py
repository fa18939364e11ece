"""Your own text. python data/text/prepare.py PATH ... [--out DIR] [--tokenizer gpt2-4096] [--val_tokens N]

A PATH is a file or a folder of files, taken in sorted order: .txt and .md, .jsonl (one JSON object a line,
the text under "text"), each also packed as .gz or .zst, and .parquet (the text in the column "text"). A
document is one object or row, or in .txt and .md a passage: lines up to the first blank one after 1,000
characters, or up to 4,000.
Val is spread evenly over the text: a document goes to val whenever val has fallen behind its share. Val keeps
no document, and in .txt and .md no line, that train has too: taking them out of train instead would take
every common line out, such as the names of the speakers in a play.
"""
import gzip
import io
import itertools
import json
import re
import sys
import zlib
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import tokens  # noqa: E402

ENDINGS = [kind + end for kind in (".txt", ".md", ".jsonl") for end in ("", ".gz", ".zst")] + [".parquet"]
NOT_TEXT = re.compile("[\0\ud800-\udfff]")


def read_documents(files):
    """Yields (text, by_line) for each document; by_line is true for a passage of .txt or .md.

    Raises ValueError that names the file and the line or row of what cannot be read.
    """
    for file in files:
        kind = next(ending for ending in ENDINGS if file.name.lower().endswith(ending)).split(".")[1]
        try:
            if kind == "parquet":
                batches = tokens.open_parquet(file).iter_batches(1000, columns=["text"])
                values = (value.as_py for batch in batches for value in batch["text"])
                yield from ((text, False) for text in fields(file, "row", values))
                continue
            # what is not UTF-8 comes as lone surrogates, and so is found where its line is known
            with io.TextIOWrapper(unpacked(file), "utf-8-sig", "surrogateescape") as f:
                if kind == "jsonl":
                    values = (lambda: json.loads(line)["text"] if line.strip() else "" for line in f)
                    yield from ((text, False) for text in fields(file, "line", values))
                else:
                    yield from ((text, True) for text in passages(file, f))
        except (EOFError, zlib.error, OSError) as e:
            raise ValueError(f"{file} cannot be read to its end ({e}): mend it, or leave it out") from None


def unpacked(file):
    """A binary file object of what is in a file, which may be packed."""
    if file.suffix.lower() == ".zst":
        import pyarrow  # here, since it is slow
        return io.BufferedReader(pyarrow.input_stream(str(file), compression="zstd"))
    return (gzip.open if file.suffix.lower() == ".gz" else open)(file, "rb")


def passages(file, f):
    lines, size, number = [], 0, 1
    while line := f.readline(4000):  # a limit, since a file may be one endless line
        if NOT_TEXT.search(line):
            raise ValueError(f"{file} line {number:,} is not UTF-8 (UTF-16?): convert it, or leave it out")
        number += line.endswith("\n")
        lines.append(line)
        size += len(line)
        if size >= 4000 or size >= 1000 and not line.strip():
            yield "".join(lines)
            lines, size = [], 0
    if "".join(lines).strip():
        yield "".join(lines)


def fields(file, unit, values):
    """Yields what each of values returns, if it is text that is not blank."""
    for number, value in enumerate(values, 1):
        try:
            text = value()
            text.encode()  # JSON can hold half a surrogate pair, UTF-8 cannot
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f'{file} {unit} {number:,} has no valid string under "text"') from None
        if text.strip():
            yield text


def units(text, by_line):
    """What must not be in both splits: the lines of a passage, or the one text of an object."""
    return {line.strip() for line in text.split("\n")} - {""} if by_line else {text}


def without(texts, common):
    """The (text, by_line) of val minus what train has too."""
    for text, by_line in texts:
        if by_line:
            text = "\n".join(line for line in text.split("\n") if line.strip() not in common)
        if text.strip() and text not in common:
            yield text


def main():
    parser = tokens.parser(__doc__, "gpt2", HERE)
    parser.add_argument("paths", type=tokens.path, metavar="PATH", nargs="+")
    parser.add_argument("--val_tokens", type=int, help="about how many (default: a tenth, 1,000,000 at most)")
    args = parser.parse_args()
    if args.val_tokens is not None and args.val_tokens <= 0:
        raise ValueError(f"--val_tokens={args.val_tokens}: it has to be positive")
    files, named = tokens.find_files(args.paths, ENDINGS), " ".join(map(str, args.paths))
    settings = {"tokenizer": args.tokenizer, "val_tokens": args.val_tokens,
                "input": tokens.key(" ".join(str(tokens.sha256_of(file)) for file in files)).hex()}
    if tokens.is_whole(args.out, settings):
        return
    encoding = tokens.get_encoding(args.tokenizer)

    # the first two passes read everything, so an error in the input comes up before anything is written
    total = sum(len(text) for text, _ in read_documents(files))
    sample = [text for text, _ in itertools.islice(read_documents(files), 100)]
    n_tokens = total * len(tokens.encode(sample, encoding)[0]) / max(1, sum(map(len, sample)))
    share = (args.val_tokens or 1_000_000) / max(1, n_tokens)
    if args.val_tokens is None:
        share = min(share, 0.1)
    elif share > 0.5:
        raise ValueError(f"{named} is too short for --val_tokens={args.val_tokens}: it holds about "
                         f"{int(n_tokens):,} tokens, and at most half of them can be val")

    val_texts, val_numbers, val_units, seen, taken = [], set(), set(), 0, 0
    for number, (text, by_line) in enumerate(read_documents(files)):
        seen += len(text)
        if taken + len(text) / 2 <= share * seen:
            taken += len(text)
            val_texts.append((text, by_line))
            val_numbers.add(number)
            val_units |= units(text, by_line)
    if not taken:
        raise ValueError(f"{named} is too short to be split: {total:,} characters give no val document")

    common = set()

    def train_texts():
        for number, (text, by_line) in enumerate(read_documents(files)):
            if number not in val_numbers:
                common.update(val_units & units(text, by_line))
                yield text

    train = tokens.write_bin(args.out / "train.bin", train_texts(), encoding, total)
    val = tokens.write_bin(args.out / "val_set.bin", without(val_texts, common), encoding)
    if not val["tokens"]:
        for file in tokens.FILES.values():
            (args.out / file).unlink()
        raise ValueError(f"{named} repeats itself: all that could be val is in train as well")
    source = f"{len(files)} files at {', '.join(path.resolve().name for path in args.paths)}"
    tokens.save_meta(args.out, args.tokenizer, train, val, source, settings, val_units_dropped=len(common),
                     split="val: documents spread evenly, less the lines or documents that train has too")


if __name__ == "__main__":
    tokens.run(main)
