"""Weighted sums of rows, always added in the same order: a sum does not depend on what else is computed with it."""

from __future__ import annotations

import torch
from torch import Tensor

from fora_trt.engines.tf32 import without_tf32


def add_rows(rows: Tensor, index: Tensor, weights: Tensor, target: Tensor) -> None:
    """Write `sum_t weights[b, t] * rows[index[b, t]]` to `target` (B, N); `rows` is (M, N), the others (B, T).

    Of rows that are not floats, `target` gets the last of `index`. The sums are computed in fp32. On a CPU, fp32 rows
    are added one after the other by fused multiplications and additions, as in the kernel of ONNX Runtime's engine.
    """
    if not rows.is_floating_point():
        target.copy_(rows.index_select(0, index[:, -1]))
        return
    if rows.device.type == "cpu" and rows.dtype == target.dtype == torch.float32:
        total = torch.nn.functional.embedding_bag(index, rows, per_sample_weights=weights, mode="sum")
        target.numpy()[:] = total.numpy()  # torch's threads would keep spinning after a copy and slow down the engine
        return
    with without_tf32(rows.device):
        terms = rows.index_select(0, index.flatten()).view(*index.shape, -1).float()  # (B, T, N)
        target.copy_(torch.bmm(weights[:, None], terms)[:, 0])
