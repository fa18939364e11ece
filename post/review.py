"""The plan's step 12 on an edited post: a line passes, fails with the place, or is a person's to judge."""
import re

import numpy as np

from post import text as post
from study import LABELS

FORBIDDEN = r"\bprov(?:es|ed|en)\b"
HEADLINE_WORDS = ["unnecessary", "harmful", "logit control", "collapse", "limited", "lowest", "highest",
                  "best", "wins"]
NUMBER = re.compile(r"(?<![\w.,/:=#])[+\-−]?(\d[\d,]*(?:\.\d+)?|\.\d+)(e[+\-]?\d+)?"  # not glued to a name
                    r"(?:\s?([MkB%])(?!\w))?(?![\w/]|-[A-Za-z])")


def numbers(text):
    """[(line number, as written, value, half a unit of its last digit, significant digits)] of a Markdown
    text; headings' own numbers, code, links, names such as GPT-2 and enumeration are no claims."""
    found = []
    for n, line in enumerate(text.split("\n"), 1):
        line = re.sub(r"`[^`]*`|\]\([^)]*\)|<!--.*?-->|https?://\S+|arXiv:\S+|doi:\S+", " ", line)
        line = re.sub(r"^\s*(?:#+\s*)?\d+\.\s|\b(?:Figure|Plot|Step|step|section|Gemma) \d+", " ", line)
        line = re.sub(r"(?<=\d)\s*[–-]\s*(?=\d)", " ", line)
        for m in NUMBER.finditer(line):
            digits = m[1].replace(",", "")
            unit = {"M": 1e6, "k": 1e3, "B": 1e9}.get(m[3], 1) * float("1" + (m[2] or "e0"))
            half = 0.5 * 10.0 ** -len(digits.partition(".")[2])
            significant = len(digits.replace(".", "").lstrip("0"))
            found.append((n, m[0].strip(), float(digits) * unit, half * unit, significant))
    return found


def values(obj):
    """The size of every finite number in a JSON object."""
    if isinstance(obj, (dict, list)):
        return [x for v in (obj.values() if isinstance(obj, dict) else obj) for x in values(v)]
    return [abs(obj)] if type(obj) in (int, float) and np.isfinite(obj) else []


def unsupported(text, S):
    """[(line, number as written)] that no result, log or table holds at the digits written. A number that is
    only in the middle of a log has to carry four digits: with fewer some row fits any number."""
    def holds(pool, value, half):
        i = np.searchsorted(pool, value - half * (1 + 1e-9))
        return i < len(pool) and pool[i] <= value + half * (1 + 1e-9)

    runs = S["runs"] + S["sweep"] + S["neighbours"]
    kept = [[r["config"], r["events"], r["rows"][-1:]] for r in runs]
    tables = [value for _, _, value, *_ in numbers(post.build(S))]
    strong = np.sort(values([kept, S["results"], S["picks"], S["registered"], tables]))
    logs = np.sort(values([r["rows"] for r in runs]))
    bad = []
    for line, written, value, half, digits in numbers(text):
        part = 0.01 if written.endswith("%") else 1  # a share may be in percent
        if not any(holds(strong, value * k, half * k) or digits >= 4 and holds(logs, value * k, half * k)
                   for k in (1, part)):
            bad.append((line, written))
    return bad


def tuned(S, text):
    """What is wrong with the choice of the learning rates, as lines."""
    bad = [f"{LABELS[a]}: no learning rate was chosen" for a in S["arms"] if a not in S["picks"]]
    for a, p in S["picks"].items():
        if len(p["tried"]) < 3:
            bad.append(f"{LABELS[a]}: only {len(p['tried'])} learning rates ended")
        if not p["bracketed"] and not re.search("not bracketed", text, re.I):
            bad.append(f"{LABELS[a]} is not bracketed and the post does not say so")
    for r in S["runs"]:
        lr, pick = r["config"]["learning_rate"], S["picks"].get(r["config"]["arm"])
        if pick and not np.isclose(pick["lr"], lr):
            bad.append(f"{r['dir'].name} ran at {lr:g}, not at the chosen {pick['lr']:g}")
    return bad


def headline(S, text):
    """What of title and verdict line the runs do not carry, as lines, and what a person has to judge."""
    heading, said = re.search(r"^# (.*)", text, re.M), re.search(r"^\*\*Verdict: (.+?)\*\*", text, re.M)
    verdict, bad, judge = S["verdict"][0], [], None
    if not heading:
        bad = ["no title: the first heading has to be `# ...`"]
    elif heading[1].strip() != S["title"]:
        extra = [w for w in HEADLINE_WORDS if w in heading[1].lower() and w not in S["title"].lower()]
        bad = [f"title says {w!r}, which the verdict ({verdict}) does not carry" for w in extra]
        if verdict in ("D", "no verdict"):
            bad.append(f"the verdict is {verdict}: the title has to say so, as in {S['title']!r}")
        judge = f"the title was edited; the verdict's own is {S['title']!r}"
    if not said or said[1] != verdict:
        bad.append(f"the post's verdict line is {said[1] if said else 'missing'}, the runs give {verdict}")
    return bad, judge


def check(path, S):
    """Print the self-review of the post at path against its study; the exit status, 0 where no line fails."""
    text = path.read_text(encoding="utf-8")
    shown = re.search(r"!\[[^\]]*\]\((figures/1_val_loss\.\w+)\)", text)
    curves = shown and (path.parent / shown[1]).exists()
    limits = re.search(r"^## [^\n]*limitations", text, re.M | re.I)
    lines = list(enumerate(text.split("\n"), 1))
    todo = [f"line {n}" for n, line in lines if line.startswith(post.TODO)]
    review = [  # what is looked at, what is wrong, what a person has to judge
        ("Every number is in results, logs or tables",
         [f"line {n}: {number} is in no result, log or table" for n, number in unsupported(text, S)], None),
        ("Every claim is backed by a plot or number", [],
         "the numbers are checked above; whether the words go beyond them is yours to judge"),
        ("LR was tuned independently per config", tuned(S, text), None),
        ("Loss curves are shown", [] if curves else
         [f"no image of figures/1_val_loss in the post, or no such file: run `python plot.py {path.parent}`"], None),
        ("Limitations section is honest", [] if limits else ["no section named Limitations"],
         "whether it says what you know to be weak is yours to judge"),
        ("The word 'proves' does not occur",
         [f"line {n}: {m[0]}" for n, line in lines for m in re.finditer(FORBIDDEN, line, re.I)], None),
        ("Title matches what was found", *headline(S, text)),
        ("Marked places are written", [], f"still to be written: {', '.join(todo)}" if todo else None),
        ("Someone who disagrees would still say the experiment was fair", [], "yours to judge")]
    states = ["FAIL" if bad else "PERSON" if judge else "pass" for _, bad, judge in review]
    for state, (what, bad, judge) in zip(states, review):
        print("\n       ".join([f"{state:<7}{what}", *(bad or filter(None, [judge]))]))
    failed = states.count("FAIL")
    print(f"{failed} of {len(review)} lines fail, {states.count('PERSON')} are a person's to judge")
    return int(failed > 0)
