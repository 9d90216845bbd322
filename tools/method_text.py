"""Capture methods in words."""

from __future__ import annotations

from logitstore.teacher.protocol import Method


def describe_method(method: Method) -> str:
    """A capture method in a few words, and the temperatures that it keeps normalizers at."""
    temperatures = ", ".join(f"{temperature:g}" for temperature in method.temperatures)
    return _describe_support(method) + (f"; normalizers at temperature {temperatures}" if temperatures else "")


def _describe_support(method: Method) -> str:
    if method.kind == "sample":
        return f"sample, {method.num_draws} draws per position"
    if method.kind == "head_tail":
        return f"head and tail, from probability {method.threshold:.3g} on"
    if method.kind == "given_ids":
        return "ids that the corpus gives"
    if method.top_p is None:
        return f"top-k, k = {method.k}"
    return f"top-k, k = {method.min_k} to {method.k}, as far as mass {method.top_p:g}"
