"""What the grid was to reach, held to its cells: every row of the table is computed."""

import statistics
from collections.abc import Iterable

import numpy as np
from accuracy_arms import DEFAULT, LENGTHS
from accuracy_stats import (
    Cells,
    changes,
    kl,
    mean_and_error,
    pairs_at,
    ratio_of_means,
    shared_seeds,
    zero_shot,
)

STOCK = "gptq-2048"
GPTQ = ("gptq-512", "gptq-2048")
SIGNIFICANT = 0.05
SEEDS = 5
WITHOUT_PASSAGES = "boolq"
AGAINST = "default against GPTQ at 512 and 2048, by model, scheme and input length: "
Groups = dict[tuple[str, str], Cells]


def target_rows(groups: Groups, compared: list[dict]) -> list[list[str]]:
    """A row for each target: what, to reach, measured, whether that reaches it."""
    three_bits = {key: cells for key, cells in groups.items() if key[1].startswith("w3")}
    four_bits = {key: cells for key, cells in groups.items() if key[1].startswith("w4")}
    return [
        ["what", "to reach", "measured", "reached"],
        *against_gptq([row for row in compared if row["of"][2] in GPTQ]),
        seeds_against_gptq(groups),
        *against_single_lengths(groups),
        *worst_length(three_bits),
        *against_stock(three_bits, "3 bits", 0.5),
        *against_stock(four_bits, "4 bits", 0.8),
        *spread_over_seeds(groups),
        *zero_shot_gain(three_bits),
    ]


def reached(flags: Iterable[bool]) -> str:
    """One word for cells that reach a target or do not, and how many where they differ."""
    flags = list(flags)
    if not flags:
        return "not measured"
    if len(set(flags)) == 1:
        return "yes" if flags[0] else "no"
    return f"in {sum(flags)} of {len(flags)}"


def against_gptq(rows: list[dict]) -> list[list[str]]:
    """Lower in the mean, significantly, never significantly worse."""
    if not rows:
        return [[f"{AGAINST}lower", "in all", "no cells", reached([])]]
    lower = [row["ratio"] < 1 for row in rows]
    significant = [row for row in rows if row["p"] is not None and row["p"] < SIGNIFICANT]
    better = sum(row["ratio"] < 1 for row in significant)
    worse = len(significant) - better
    return [
        [f"{AGAINST}lower", "in all", f"in {sum(lower)} of {len(rows)}", reached(lower)],
        [
            f"{AGAINST}lower with p < {SIGNIFICANT} (Holm)",
            "in two thirds",
            f"in {better} of {len(rows)}",
            reached([better >= 2 / 3 * len(rows)]),
        ],
        [f"{AGAINST}significantly worse", "in none", f"in {worse}", reached([worse == 0])],
    ]


def seeds_against_gptq(groups: Groups) -> list[str]:
    """Also of what was not run at all, which no comparison shows."""
    seeds = [
        len(shared_seeds(cells, DEFAULT, method))
        for cells in groups.values()
        for method in GPTQ
        for _ in LENGTHS
    ]
    return [
        f"{AGAINST}seeds",
        f"at least {SEEDS}",
        f"{min(seeds, default=0)} to {max(seeds, default=0)}",
        reached(count >= SEEDS for count in seeds),
    ]


def against_single_lengths(groups: Groups) -> list[list[str]]:
    """Against one fixed length, scales chosen in the same way and not."""
    rows = []
    for prefix, words in (
        ("gptq", "min-max scales"),
        ("hs-gptq", "scales searched as before (`hs`)"),
        ("hs2-gptq", "the same search of scales"),
    ):
        found = []
        for (model, scheme), cells in groups.items():
            for length in LENGTHS:
                method = f"{prefix}-{length}"
                if ratio := _log_ratio(cells, DEFAULT, method):
                    found.append((ratio, f"{ratio:.2f} {model} {scheme} at {length}"))
        rows.append(
            [
                f"default against single lengths with {words}, mean over input lengths",
                "at most 1 against the best",
                "; ".join(text for _, text in sorted(found, reverse=True)[:4]) + " are the highest"
                if found
                else "no cells",
                reached(ratio <= 1 for ratio, _ in found),
            ]
        )
    return rows


def worst_length(groups: Groups) -> list[list[str]]:
    """KL at the worst input length, over that of GPTQ."""
    found, reaches = [], []
    for (model, scheme), cells in groups.items():
        for method in GPTQ:
            if seeds := shared_seeds(cells, DEFAULT, method):
                own, other = (
                    max(statistics.fmean(kl(cells[m][s], n) for s in seeds) for n in LENGTHS)
                    for m in (DEFAULT, method)
                )
                found.append(f"{own / other:.2f} {model} {scheme} ({method})")
                reaches.append(own / other <= 0.8)
    words = "worst input length against GPTQ's worst, 3 bits"
    return [[words, "at most 0.8", "; ".join(found), reached(reaches)]]


def against_stock(groups: Groups, bits: str, limit: float) -> list[list[str]]:
    """Against stock llm-compressor at each input length."""
    found, reaches = [], []
    for (model, scheme), cells in groups.items():
        if shared_seeds(cells, DEFAULT, STOCK):
            ratios = [ratio_of_means(pairs_at(cells, DEFAULT, STOCK, n)) for n in LENGTHS]
            found.append(f"{' / '.join(f'{r:.2f}' for r in ratios)} {model} {scheme}")
            reaches += [ratio <= limit for ratio in ratios]
    words = f"default against stock ({STOCK}), {bits}"
    return [[words, f"at most {limit}", "; ".join(found), reached(reaches)]]


def spread_over_seeds(groups: Groups) -> list[list[str]]:
    """Standard deviation over seeds of the mean KL, against GPTQ's."""
    found, reaches = [], []
    for (model, scheme), cells in groups.items():
        seeds = shared_seeds(cells, DEFAULT, STOCK)
        if len(seeds) < 3:
            continue
        own, other = (
            statistics.stdev(statistics.fmean(kl(cells[m][s], n) for n in LENGTHS) for s in seeds)
            for m in (DEFAULT, STOCK)
        )
        found.append(f"{own:.3f} / {other:.3f} {model} {scheme} ({len(seeds)} seeds)")
        reaches.append(own <= other)
    words = f"standard deviation of KL over seeds, default / {STOCK}"
    return [[words, "not larger", "; ".join(found) or "too few seeds", reached(reaches)]]


def zero_shot_gain(groups: Groups) -> list[list[str]]:
    """Zero-shot accuracy against stock's, on the same questions."""
    words = f"zero-shot mean over tasks against {STOCK}, 3 bits, points"
    gains = _gains(groups, ())
    texts = "; ".join(text for _, text in gains)
    rows = [[words, "at least +1", texts, reached(gain >= 1 for gain, _ in gains)]]
    if gains := _gains(groups, (WITHOUT_PASSAGES,)):
        words = f"the same without {WITHOUT_PASSAGES}, whose passages are missing here"
        rows.append([words, "(looked at afterwards)", "; ".join(text for _, text in gains), ""])
    return rows


def _gains(groups: Groups, left_out: tuple[str, ...]) -> list[tuple[float, str]]:
    found = []
    for (model, scheme), cells in groups.items():
        seeds = asked(cells, DEFAULT, STOCK)
        if seeds:
            own, other = (
                zero_shot([cells[m][s] for s in seeds], left_out) for m in (DEFAULT, STOCK)
            )
            gain, error = mean_and_error([a - b for a, b in zip(own, other, strict=True)])
            text = f"{gain:+.1f} ± {error:.1f} {model} {scheme} (seeds: {len(seeds)})"
            found.append((gain, text))
    return found


def asked(cells: Cells, *methods: str) -> list[int]:
    """Seeds at which all of these methods were asked questions."""
    seeds = shared_seeds(cells, *methods)
    return [seed for seed in seeds if all(cells[m][seed].get("tasks") for m in methods)]


def _log_ratio(cells: Cells, one: str, other: str) -> float | None:
    by_seed = changes(cells, other, one)
    return float(np.exp(np.mean(by_seed))) if by_seed else None
