"""The comparison as pictures: how much of the gap each row closes, and what it reaches with more labels."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from ablation_rows import BY_NAME
from ablation_table import Comparison

from ssl_jax import files
from ssl_jax.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GAP, BUDGETS = "ablation_gap.png", "ablation_budgets.png"

_INK, _FAINT, _ACCENT = "#333333", "#bbbbbb", "#1f6fb2"
_CURVES = {"floor": "#888888", "lm": "#d9822b", "pseudo_filtered": "#4a9b5f", "full": _ACCENT}


def draw(comparison: Comparison, folder: Path) -> list[str]:
    """Writes the plots as PNG and returns their names; a plot of which nothing is known is left out.

    Raises:
      UserError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ModuleNotFoundError:
        raise UserError("the plots need matplotlib: pip install 'ssl_jax[bench]'") from None
    figures = {GAP: _gap_closed(comparison), BUDGETS: _by_budget(comparison)}
    drawn = {name: figure for name, figure in figures.items() if figure is not None}
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in drawn.items():
        with files.replacing(folder / name) as stream:
            # Without the program's version, equal results give equal files.
            figure.savefig(stream, format="png", dpi=120, metadata={"Software": None})
    return list(drawn)


def _gap_closed(comparison: Comparison) -> Figure | None:
    """A panel a regime, a line a row, at the smallest budget: the share of the gap and its interval."""
    from matplotlib.figure import Figure

    if not comparison.regimes:
        return None
    budget = min(comparison.budgets)
    panels = {}
    for regime in comparison.regimes:
        known = [comparison.figures(row, regime, budget) for row in comparison.rows(regime, budget)]
        shares = {figures.row.name: figures.gap.fraction for figures in known if figures.gap and figures.gap.fraction}
        panels[regime] = {name: share for name, share in shares.items() if name not in ("floor", "oracle")}
    most = max(map(len, panels.values()))
    if not most:
        return None
    figure = Figure(figsize=(4.6 * len(panels), 1.4 + 0.26 * most), layout="constrained")
    for axes, (regime, shares) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for height, (name, share) in enumerate(reversed(shares.items())):
            color = _ACCENT if name == "full" else _INK
            axes.plot([100 * share.low, 100 * share.high], [height, height], color=color, linewidth=1.5)
            axes.plot(100 * share.value, height, "o", color=color, markersize=5)
        axes.set_yticks(range(len(shares)), labels=[name.replace("_", " ") for name in reversed(shares)])
        axes.set_ylim(len(shares) - most - 0.5, len(shares) - 0.5)  # lines of all panels lie equally close
        for end in (0, 100):
            axes.axvline(end, color=_FAINT, linewidth=1, zorder=0)
        axes.set_title(f"{regime}, {budget:,} labeled dialogues", fontsize=10)
        axes.set_xlabel("gap closed, % (floor 0, oracle 100)")
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _by_budget(comparison: Comparison) -> Figure | None:
    """A panel a regime: bits per byte of the main rows over the labeled dialogues, logarithmic."""
    from matplotlib.figure import Figure

    if not comparison.regimes:
        return None
    figure = Figure(figsize=(4.2 * len(comparison.regimes), 3.4), layout="constrained")
    grid = figure.subplots(1, len(comparison.regimes), squeeze=False, sharey=True)
    for axes, regime in zip(grid[0], comparison.regimes, strict=True):
        for name, color in _CURVES.items():
            known = [(budget, comparison.figures(BY_NAME[name], regime, budget).bits) for budget in comparison.budgets]
            points = [(budget, bits) for budget, bits in known if bits is not None]
            if points:
                axes.plot(*zip(*points, strict=True), "o-", color=color, markersize=4, label=name.replace("_", " "))
        oracle = comparison.figures(BY_NAME["oracle"], regime, min(comparison.budgets)).bits
        if oracle is not None:
            axes.axhline(oracle, color=_INK, linestyle="--", linewidth=1, label="oracle")
        axes.set_xscale("log")
        axes.set_xticks(comparison.budgets, labels=[f"{budget:,}" for budget in comparison.budgets])
        axes.minorticks_off()
        axes.set_xlim(min(comparison.budgets) / math.sqrt(2), max(comparison.budgets) * math.sqrt(2))
        axes.set_title(regime, fontsize=10)
        axes.set_xlabel("labeled dialogues")
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8, frameon=False)
    grid[0][0].set_ylabel("reply bits/byte")
    return figure
