"""Errors of reuse: how far the feature of each cache site at a step is from its features at the steps before.

This is the criterion of SmoothCache (arXiv 2411.10510), for each site instead of each kind of site: along trajectories
without caching, the L1 norm of the difference divided by that of the feature which is replaced.

Shapes: I cache sites, S steps, B samples (both halves under guidance), V values of a feature.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from fora_trt.evaluate.eager_fora import EagerFora
from fora_trt.pipeline import Sampling
from fora_trt.sampling.conditioning import Conditioning
from fora_trt.sampling.guidance import Guidance
from fora_trt.sampling.loop import Sampler, Watch

Errors = NDArray[numpy.float64]
"""(I, S, S): [i, s, t] is the error at step t of reading what step s has computed at site i; 0 for s >= t."""

VALUES = 2048
"""Largest number of values that are kept of a feature of each sample; of more, some at equal distances."""


def relative_l1(features: Tensor) -> Errors:
    """Errors (S, S) of one site from its features (S, B, V): the mean over the samples."""
    norms = features.abs().sum(-1).clamp_min(torch.finfo(features.dtype).tiny)  # (S, B)
    found = numpy.zeros((len(features), len(features)))
    for step in range(1, len(features)):
        differences = (features[:step] - features[step]).abs().sum(-1)  # (step, B)
        found[:step, step] = (differences / norms[step]).mean(-1).double().numpy()
    return found


@dataclass
class SiteObserver:
    """Keeps the features of each site at each step of trajectories that run in full."""

    eager: EagerFora
    steps: list[dict[str, Tensor]] = field(default_factory=list)

    def keep(self, latents: Tensor) -> None:
        """Keep features of the step that has run."""
        self.steps.append({path: _some(one).cpu() for path, one in self.eager.features().items()})


def _some(values: Tensor) -> Tensor:
    """At most `VALUES` of the values (B, V) of each sample."""
    return values[:, :: -(-values.shape[1] // VALUES)].clone()


def observed_errors(
    eager: EagerFora,
    plain: Sampling,
    given: Conditioning,
    seeds: Sequence[int],
    guidance: Guidance,
    batch_size: int,
    watch_steps: Watch = iter,
) -> Errors:
    """Errors of all cache sites of the bundle, in its order, along trajectories without caching."""
    observer = SiteObserver(eager)
    sampler = Sampler(eager, plain.scheduler_step, plain.schedule)
    sampler.in_batches(given, seeds, guidance, batch_size, watch_steps, observe=observer.keep)
    batches = [observer.steps[first : first + plain.nfe] for first in range(0, len(observer.steps), plain.nfe)]
    return numpy.stack([_of_site(site.module, batches) for site in eager.manifest.cache_sites])


def _of_site(path: str, batches: Sequence[Sequence[dict[str, Tensor]]]) -> Errors:
    """Errors of the site at this path, from its features at the steps of each batch."""
    joined = []
    for steps in batches:
        rows = min(len(step[path]) for step in steps)  # those of all steps: guidance may begin late
        joined.append(torch.stack([step[path][:rows] for step in steps]))
    return relative_l1(torch.cat(joined, dim=1))
