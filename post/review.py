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
    """[(line number, as written, value, half a unit of its last digit, 'M', '%', ...)] of a Markdown text;
    headings' own numbers, code, links, names such as GPT-2 and enumeration are no claims."""
    found, fenced = [], False
    for n, line in enumerate(text.split("\n"), 1):
        fenced ^= line.startswith("```")
        line = re.sub(r"`[^`]*`|\]\([^)]*\)|<!--.*?-->|https?://\S+|arXiv:\S+|doi:\S+", " ", line)
        line = re.sub(r"^\s*(?:#+\s*)?\d+\.\s", " ", line)
        line = re.sub(r"\b(?:Figure|Plot|Step|step|section|Gemma) \d+", " ", line)
        line = re.sub(r"(?<=\d)\s*[–-]\s*(?=\d)", " ", line)
        for m in NUMBER.finditer(line):
            digits, power, suffix = m[1].replace(",", ""), m[2] or "", m[3] or ""
            scale = {"M": 1e6, "k": 1e3, "B": 1e9}.get(suffix, 1) * float("1" + (power or "e0"))
            half = 0.5 * 10.0 ** -len(digits.partition(".")[2]) * scale
            found.append((n, m[0].strip(), float(digits) * scale, half, suffix,
                          len(digits.replace(".", "").lstrip("0"))))
    return found


def values(obj):
    """All finite numbers in a JSON object."""
    if isinstance(obj, dict):
        return [x for v in obj.values() for x in values(v)]
    if isinstance(obj, (list, tuple)):
        return [x for v in obj for x in values(v)]
    number = isinstance(obj, (int, float)) and not isinstance(obj, bool) and np.isfinite(obj)
    return [float(obj)] if number else []


def near(pool, value, half):
    """Whether the ascending pool holds a number that rounds to value."""
    i = np.searchsorted(pool, abs(value) - half * (1 + 1e-9))
    return i < len(pool) and pool[i] <= abs(value) + half * (1 + 1e-9)


def unsupported(text, S):
    """[(line, number as written)] that no result, log or table holds at the digits written. A number that is
    only in the middle of a log has to carry four digits: with fewer some row fits any number."""
    runs = S["runs"] + S["sweep"] + S["neighbours"]
    kept = [r["rows"][-1] for r in runs if r["rows"]]
    kept += [row for pairs in post.checkpoints(S["runs"]).values() for _, row in pairs]
    held = [kept, [r["config"] for r in runs], S["results"], S["picks"], S["registered"]]
    tables = [value for _, _, value, *_ in numbers(post.build(S))]
    ascending = lambda found: np.sort(np.abs(found))
    strong, logs = ascending(values(held) + tables), ascending(values([r["rows"] for r in runs]))
    bad = []
    for line, written, value, half, suffix, digits in numbers(text):
        tries = [(value, half)] + [(value / 100, half / 100)] * (suffix == "%")
        if not any(near(strong, v, h) or digits >= 4 and near(logs, v, h) for v, h in tries):
            bad.append((line, written))
    return bad


def tuned(S, text):
    """What is wrong with the choice of the learning rates, as lines."""
    bad = [f"{LABELS[a]}: no learning rate was chosen" for a in S["arms"] if a not in S["picks"]]
    for a, p in S["picks"].items():
        ended = sum(t["status"] != "unfinished" for t in p["tried"])
        bad += [f"{LABELS.get(a, a)}: only {ended} learning rates ended"] * (ended < 3)
        if not p["bracketed"] and not re.search("not bracketed", text, re.I):
            bad.append(f"{LABELS.get(a, a)} is not bracketed and the post does not say so")
    for r in S["runs"]:
        lr, pick = r["config"]["learning_rate"], S["picks"].get(r["config"]["arm"])
        if pick and not np.isclose(pick["lr"], lr):
            bad.append(f"{r['dir'].name} ran at {lr:g}, not at the chosen {pick['lr']:g}")
    return bad


def check(path, S):
    """Print the self-review of the post at path against its study; the exit status, 0 where no line fails."""
    text, c, lines = path.read_text(encoding="utf-8"), S["config"], []

    def say(what, bad, judge=None):
        lines.append("FAIL" if bad else "PERSON" if judge else "pass")
        print("\n       ".join([f"{lines[-1]:<7}{what}", *(bad or [judge] * bool(judge))]))

    say("Every number is in results, logs or tables",
        [f"line {line}: {number} is in no result, log or table" for line, number in unsupported(text, S)])
    say("Every claim is backed by a plot or number", [],
        "the numbers are checked above; whether the words go beyond them is yours to judge")
    say("LR was tuned independently per config", tuned(S, text))
    shown = re.search(r"!\[[^\]]*\]\((figures/1_val_loss\.\w+)\)", text)
    say("Loss curves are shown", ["no image of figures/1_val_loss in the post"] if not shown else
        [] if (path.parent / shown[1]).exists() else
        [f"{shown[1]} is not there: run `python plot.py {path.parent}`"])
    limits = re.search(r"^## [^\n]*limitations[^\n]*\n(.*?)(?=^## |\Z)", text, re.M | re.S | re.I)
    facts = {"parameters": re.escape(post.count(c["num_params"])), "seeds": rf"\b{len(S['seeds'])} seed",
             "tokens": re.escape(post.count(c["max_tokens"])), "one architecture": "architecture",
             "larger scale": "scale", "QK-Norm in production (Gemma 3)": "Gemma 3"}
    say("Limitations are there", ["no section named Limitations"] if not limits else
        [f"limitations do not name: {name}" for name, pattern in facts.items()
         if not re.search(pattern, limits[1], re.I)])
    say("Limitations section is honest", [], "whether it says what you know to be weak is yours to judge")
    say("The word 'proves' does not occur", [f"line {k}: {m[0]}" for k, line in enumerate(text.split("\n"), 1)
                                             for m in re.finditer(FORBIDDEN, line, re.I)])
    heading, verdict = re.search(r"^# (.*)", text, re.M), S["verdict"][0]
    bad, judge = [], None
    if not heading:
        bad = ["no title: the first heading has to be `# ...`"]
    elif heading[1].strip() != S["title"]:
        extra = [w for w in HEADLINE_WORDS if w in heading[1].lower() and w not in S["title"].lower()]
        bad = [f"title says {w!r}, which the verdict ({verdict}) does not carry" for w in extra]
        if verdict in ("D", "no verdict"):
            bad.append(f"the verdict is {verdict}: the title has to say so, as in {S['title']!r}")
        judge = f"the title was edited; the verdict's own is {S['title']!r}"
    said = re.search(r"^\*\*Verdict: (.+?)\*\*", text, re.M)
    if not said or said[1] != verdict:
        bad.append(f"the post's verdict line is {said[1] if said else 'missing'}, the runs give {verdict}")
    say("Title matches what was found", bad, judge)
    todo = [f"line {k}" for k, line in enumerate(text.split("\n"), 1) if line.startswith(post.TODO)]
    say("Marked places are written", [], f"still to be written: {', '.join(todo)}" if todo else None)
    say("Someone who disagrees would still say the experiment was fair", [], "yours to judge")
    failed = lines.count("FAIL")
    print(f"{failed} of {len(lines)} lines fail, {lines.count('PERSON')} are a person's to judge")
    return 1 if failed else 0
