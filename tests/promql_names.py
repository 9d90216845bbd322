"""What queries of Prometheus name: metrics and labels, held to those that a capture has."""

from __future__ import annotations

import re

from cluster.metrics import METRICS

EXPORTED = {name: metric for metric in METRICS for name in metric.exported_names}
# Ray puts it on everything; the bounds of a histogram are Prometheus's own.
FOREIGN_LABELS = {"NodeAddress", "le"}


def find_metrics(query: str) -> set[str]:
    """Names of all metrics in a query, ours or not."""
    return set(re.findall(r"\bray_\w+", query))


def find_labels(query: str) -> set[str]:
    """Labels that a query chooses or groups by."""
    grouped = re.findall(r"\b(?:by|without|on|ignoring)\s*\(([^)]*)\)", query)
    chosen = re.findall(r"(\w+)\s*[!=]~?\s*\"", query)
    return {label.strip() for labels in grouped for label in labels.split(",")} | set(chosen)


def find_mistakes(query: str) -> list[str]:
    """Metrics that do not exist, and labels that those of the query do not have."""
    metrics = find_metrics(query)
    mistakes = [f"no metric {name}" for name in sorted(metrics - EXPORTED.keys())]
    known = {label for name in metrics & EXPORTED.keys() for label in EXPORTED[name].labels} | FOREIGN_LABELS
    return mistakes + [f"no label {label}" for label in sorted(find_labels(query) - known)]
