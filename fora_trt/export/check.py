"""The check that an export makes before it writes a bundle: its tolerance, its result, and how it is called.

`evaluate/export_check.py` makes the check: it needs the engines and the denoiser, which are later stages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from fora_trt.bundle import Bundle, GraphError
from fora_trt.models.spec import Model

GRAPH_TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1}
"""Tolerance by precision: the largest error of a graph relative to PyTorch's largest value. PyTorch runs in fp32."""


@dataclass(frozen=True)
class Measured:
    """The error of the full and of the reuse graph, and the backend and device that ran them."""

    errors: dict[str, GraphError]
    where: str

    def wrong(self, precision: str) -> str | None:
        """The first graph whose error exceeds the tolerance of the precision; None if no error does.

        The tolerance covers rounding and the order of sums. A reuse step reads what the other graphs computed, so
        it comes last.
        """
        tolerance = GRAPH_TOLERANCE[precision]
        return next((graph for graph, error in self.errors.items() if not error.relative <= tolerance), None)


class Check(Protocol):
    """Compares the graphs of a bundle that is not written yet with the model in memory."""

    def measure(self, model: Model, bundle: Bundle) -> Measured:
        """The errors of the graphs. Raises `ExportError` if they cannot be run."""

    def locate(self, model: Model, bundle: Bundle, graph: str) -> str:
        """The first node of the full or the reuse graph that differs, in words; for a bundle at level `none`."""
