"""The tables of docs/power.md: the share of simulated studies that claim an effect, by post/stats.py itself.

    python -m tools.power > tables.md       from the repository's root; some minutes on one core
"""
import numpy as np

from post.stats import CONTRASTS, MEASURES, analyse
from study import FACTORIAL

COUNT, SEEDS = 2000, (2, 3, 5, 8)
EQUAL = dict.fromkeys(FACTORIAL, 1.0)
MINI = dict(adamw=0.0124, adamw_qk=0.0522, muon=0.0024, muon_qk=0.0130)  # nats, at mini, five seeds


def found(contrast, size, n, sds, rng):
    """Share of COUNT studies that claim `contrast` on loss where it alone is true and `size` large; PR has
    no effect."""
    w, hits = CONTRASTS[contrast], 0
    scale = size / sum(v * v for v in w.values())
    for _ in range(COUNT):
        y = {m: {a: rng.normal(scale * w[a] * (m == "loss"), sds[a], n) for a in FACTORIAL} for m in MEASURES}
        hits += analyse(y | {"pr_centered": y["pr"], "pr_weight": y["pr"]})["loss", contrast]["claimed"]
    return hits / COUNT


def table(sds, sizes, unit):
    rng = np.random.default_rng(0)
    print(f"| contrast | effect, {unit} |", *(f"n = {n} |" for n in SEEDS))
    print("| --- " * (2 + len(SEEDS)) + "|")
    for contrast in CONTRASTS:
        for size in sizes:
            shares = [found(contrast, size, n, sds, rng) for n in SEEDS]
            print(f"| {contrast} | {size:g} |", *(f"{100 * s:.0f} % |" for s in shares), flush=True)
    print()


if __name__ == "__main__":
    table(EQUAL, (1, 2, 3, 5, 10), "in standard deviations over seeds, equal in all arms")
    table(MINI, (0.01, 0.03, 0.06, 0.1, 0.2), "in nats, with the spreads of mini")
