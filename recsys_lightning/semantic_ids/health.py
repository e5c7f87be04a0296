"""How healthy the codes of a catalogue are, as numbers by name and in words."""

from recsys_lightning.semantic_ids.table import CollisionReport, SemanticIds


def usage_metrics(table: SemanticIds) -> dict[str, float]:
    """What is logged of the codes in a table, by name: cells and collisions, and how each level's codes are used.

    ``collision_rate``, ``cells``, ``largest_cell``, and for each level l from 1 ``perplexity@l``, ``entropy@l`` (share
    of log K) and ``dead_codes@l``.
    """
    report = table.collision_report()
    values: dict[str, float] = {
        "collision_rate": report.collision_rate,
        "cells": report.num_cells,
        "largest_cell": report.largest_cell,
    }
    for level in range(table.num_levels):
        values[f"perplexity@{level + 1}"] = report.perplexity[level]
        values[f"entropy@{level + 1}"] = report.entropy_share[level]
        values[f"dead_codes@{level + 1}"] = table.num_codes - report.used_codes[level]
    return {name: float(value) for name, value in values.items()}


def describe(report: CollisionReport) -> str:
    """A collision report in one line."""
    perplexity = ", ".join(f"{value:.1f}" for value in report.perplexity)
    return (
        f"{report.num_items} items in {report.num_cells} cells, largest {report.largest_cell}, "
        f"collision rate {report.collision_rate:.3f}, perplexity of the levels {perplexity}"
    )
