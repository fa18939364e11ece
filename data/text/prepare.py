"""Your own text. python data/text/prepare.py PATH ... [--out DIR] [--tokenizer gpt2|gpt2-4096] [--val_tokens N]

A PATH is a file or a folder of files, taken in sorted order: .txt and .md, .jsonl (one JSON object a line, the text under "text"),
each also packed as .gz or .zst, and .parquet (the text in the column "text"). A document is one object or row, or in .txt and .md a
passage: lines up to the first blank one after 1,000 characters, or up to 4,000.
Val is spread evenly over the text: a document goes to val whenever val has fallen behind its share. Val keeps no document, and in
.txt and .md no line, that train has too: taking them out of train instead would take every common line out, such as the names of
the speakers in a play.
"""
import argparse
import codecs
import gzip
import io
import itertools
import json
import sys
import zlib
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import tokens  # noqa: E402

PACKED = ("", ".gz", ".zst")
ENDINGS = [kind + packed for kind in (".txt", ".md", ".jsonl") for packed in PACKED] + [".parquet"]


def read_documents(files):
    """Yields (text, by_line) for each document; by_line is true for a passage of .txt or .md.

    Raises ValueError that names the file and the byte, line or row of what is no UTF-8 text, no JSON or without "text".
    """
    for file in files:
        kind = next(ending for ending in ENDINGS if file.name.lower().endswith(ending)).split(".")[1]
        try:
            if kind == "parquet":
                for text in rows(file):
                    yield text, False
            else:
                with io.TextIOWrapper(unpacked(file), encoding="utf-8-sig") as f:
                    for text in objects(file, f) if kind == "jsonl" else passages(f):
                        yield text, kind != "jsonl"
        except UnicodeError:
            raise ValueError(f"{file} is not UTF-8 text at byte {first_bad_byte(file):,}: convert it, or leave it out") from None
        except (EOFError, zlib.error, OSError) as e:
            raise ValueError(f"{file} cannot be read to its end ({e}): mend it, or leave it out") from None


def unpacked(file):
    """A binary file object of what is in a file, which may be packed."""
    if file.suffix.lower() == ".zst":
        import pyarrow  # here, since it is slow
        return io.BufferedReader(pyarrow.input_stream(str(file), compression="zstd"))
    return (gzip.open if file.suffix.lower() == ".gz" else open)(file, "rb")


def passages(f):
    lines, size = [], 0
    while line := f.readline(4000):  # a limit, since a file may be one endless line
        if "\0" in line:
            raise UnicodeError("NUL is valid UTF-8, but what holds it is UTF-16 or no text")
        lines.append(line)
        size += len(line)
        if size >= 4000 or size >= 1000 and not line.strip():
            yield "".join(lines)
            lines, size = [], 0
    if "".join(lines).strip():
        yield "".join(lines)


def objects(file, f):
    for number, line in enumerate(f, 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
            text.encode()  # JSON can hold half a surrogate pair, UTF-8 cannot
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f'{file} line {number:,} is not a JSON object with a valid string under "text"') from None
        if text.strip():
            yield text


def rows(file):
    number = 0
    for batch in tokens.open_parquet(file).iter_batches(1000, columns=["text"]):
        for number, text in enumerate(batch["text"], number + 1):
            try:
                text = text.as_py()
                text.encode()
            except (ValueError, AttributeError):
                raise ValueError(f'{file} row {number:,} has no valid string in the column "text"') from None
            if text.strip():
                yield text


def first_bad_byte(file):
    """Where a file stops being UTF-8, or holds a NUL; in a packed one counted in what is in it."""
    decoder, offset = codecs.getincrementaldecoder("utf-8")(), 0
    with unpacked(file) as f:
        while block := f.read(2**20):
            pending = len(decoder.getstate()[0])
            try:
                decoder.decode(block.partition(b"\0")[0])
                if b"\0" in block:
                    return offset + block.index(b"\0")
            except UnicodeDecodeError as e:
                return offset - pending + e.start
            offset += len(block)
    return offset - len(decoder.getstate()[0])


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", type=tokens.path, metavar="PATH", nargs="+")
    parser.add_argument("--tokenizer", default="gpt2", choices=["gpt2", "gpt2-4096"])
    parser.add_argument("--val_tokens", type=int, help="about how many (default: a tenth of the text, 1,000,000 at most)")
    parser.add_argument("--out", type=tokens.path, default=HERE, help="folder to write to (default: this one)")
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
    n_tokens = total * sum(len(tokens.encode([text], encoding)[0]) for text in sample) / max(1, sum(map(len, sample)))
    share = (args.val_tokens or 1_000_000) / max(1, n_tokens)
    if args.val_tokens is None:
        share = min(share, 0.1)
    elif share > 0.5:
        raise ValueError(f"{named} is too short for --val_tokens={args.val_tokens}: it holds about {int(n_tokens):,} tokens, and "
                         "at most half of them can be val")

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
    at = ", ".join(path.resolve().name for path in args.paths)
    tokens.save_meta(args.out, args.tokenizer, train, val, f"{len(files)} files at {at}", settings, val_units_dropped=len(common),
                     split="val: documents spread evenly, less the lines (.txt, .md) or documents (others) that train has too")


if __name__ == "__main__":
    tokens.run(main)
