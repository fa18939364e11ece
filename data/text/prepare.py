"""Your own text. python data/text/prepare.py PATH [--out DIR] [--tokenizer gpt2|gpt2-4096] [--val_tokens N]

PATH is a .txt file, a .jsonl file (one JSON object a line, the text under "text"), or a folder of them, taken in sorted order. A
document is one JSON object, or in .txt a passage: lines up to the first blank one after 1,000 characters, or up to 4,000.
Val is spread evenly over the text: a document goes to val whenever val has fallen behind its share. Val keeps no document, and in
.txt no line, that train has too: taking them out of train instead would take every common line out, such as the names of the
speakers in a play.
"""
import argparse
import codecs
import itertools
import json
import shlex
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import tokens  # noqa: E402


def find_files(path):
    """Sorted .txt and .jsonl files at or under path."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    files = sorted((file for file in files if file.suffix in (".txt", ".jsonl")), key=lambda file: file.as_posix())
    if not files:
        raise ValueError(f"{path} holds no .txt or .jsonl file")
    return files


def read_documents(files):
    """Yields (text, by_line) for each document; by_line is true for a passage of .txt.

    Raises ValueError that names the file and the byte or line for what is not UTF-8, not JSON, or without "text".
    """
    for file in files:
        by_line = file.suffix == ".txt"
        try:
            with open(file, encoding="utf-8-sig") as f:
                for text in passages(f) if by_line else objects(file, f):
                    yield text, by_line
        except UnicodeDecodeError:
            raise ValueError(f"{file} is not UTF-8 at byte {first_bad_byte(file):,}: convert it, or leave it out") from None


def passages(f):
    lines, size = [], 0
    while line := f.readline(4000):  # a limit, since a file may be one endless line
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
            text.encode()
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f'{file} line {number:,} is not a JSON object with a valid string under "text"') from None
        if text.strip():
            yield text


def first_bad_byte(file):
    decoder, offset = codecs.getincrementaldecoder("utf-8")(), 0
    with open(file, "rb") as f:
        while block := f.read(2**20):
            pending = len(decoder.getstate()[0])
            try:
                decoder.decode(block)
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
    parser.add_argument("path", type=Path, metavar="PATH")
    parser.add_argument("--tokenizer", default="gpt2", choices=["gpt2", "gpt2-4096"])
    parser.add_argument("--val_tokens", type=int, help="about how many (default: a tenth of the text, 1,000,000 at most)")
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to (default: this one)")
    args = parser.parse_args()
    files = find_files(args.path)
    total_bytes = sum(file.stat().st_size for file in files)
    settings = {"tokenizer": args.tokenizer, "val_tokens": args.val_tokens,
                "input": tokens.key(" ".join(str(tokens.sha256_of(file)) for file in files)).hex()}
    if tokens.is_whole(args.out, settings):
        return
    encoding = tokens.get_encoding(args.tokenizer)

    sample = [text for text, _ in itertools.islice(read_documents(files), 100)]
    tokens_a_byte = sum(len(tokens.encode([text], encoding)[0]) for text in sample) / max(1, sum(map(len, sample)))
    share = (args.val_tokens or 1_000_000) / max(1, total_bytes * tokens_a_byte)
    if args.val_tokens is None:
        share = min(share, 0.1)
    elif not 0 < share <= 0.5:
        raise ValueError(f"{args.path} is too short for --val_tokens={args.val_tokens}: it holds about "
                         f"{int(total_bytes * tokens_a_byte):,} tokens, and at most half of them can be val")

    # the first pass reads everything, so an error in the input comes up before anything is written
    val_texts, val_numbers, val_units, seen, taken = [], set(), set(), 0, 0
    for number, (text, by_line) in enumerate(read_documents(files)):
        seen += len(text)
        if taken + len(text) / 2 <= share * seen:
            taken += len(text)
            val_texts.append((text, by_line))
            val_numbers.add(number)
            val_units |= units(text, by_line)
    if not taken:
        raise ValueError(f"{args.path} is too short to be split: {total_bytes:,} bytes give no val document")

    common = set()

    def train_texts():
        for number, (text, by_line) in enumerate(read_documents(files)):
            if number not in val_numbers:
                common.update(val_units & units(text, by_line))
                yield text

    train = tokens.write_bin(args.out / "train.bin", train_texts(), encoding, total_bytes)
    val = tokens.write_bin(args.out / "val_set.bin", without(val_texts, common), encoding)
    if not val["tokens"]:
        for file in tokens.FILES.values():
            (args.out / file).unlink()
        raise ValueError(f"{args.path} repeats itself: all that could be val is in train as well")
    tokens.save_meta(args.out, args.tokenizer, train, val, f"{len(files)} files at {args.path.resolve().name}", settings,
                     shlex.join(["python", "data/text/prepare.py", *sys.argv[1:]]), val_units_dropped=len(common),
                     split="val: documents spread evenly, less the lines (.txt) or documents (.jsonl) that train has too")


if __name__ == "__main__":
    tokens.run(main)
