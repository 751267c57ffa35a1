"""Explanations of the words on the page of a report; a page shows those that appear on it."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass

from fora_trt.metrics import METRICS


@dataclass(frozen=True)
class Term:
    """A word with its explanation; `pattern` is a regular expression for its forms in a text."""

    topic: str
    word: str
    explanation: str
    pattern: str


STEPS, TIME, IMAGES, MODEL = "Steps and schedules", "Time and memory", "Images", "Model and measurement"
TOPICS = (STEPS, TIME, IMAGES, MODEL)
TERMS = (
    Term(
        STEPS, "step",
        "One evaluation of the network. The images start as noise, and every step removes a part of it.",
        r"\bsteps?\b",
    ),
    Term(
        STEPS, "full step",
        "A step that computes every layer, and stores what its attention and feed-forward layers output.",
        r"\bfull[ -]steps?\b",
    ),
    Term(
        STEPS, "reuse step",
        "A step that takes the outputs of these layers from earlier full steps instead of computing them, which "
        "takes a small part of the time.",
        r"\breuse[ -]steps?\b",
    ),
    Term(
        STEPS, "no caching, no cache",
        "Every step is a full step. Settings with caching are compared with this.",
        r"\bno cach(e|ing)\b|\bwithout caching\b",
    ),
    Term(
        STEPS, "setting",
        "A schedule with its number of steps and its solver.",
        r"\bsettings?\b",
    ),
    Term(
        STEPS, "schedule",
        "The list of full and reuse steps of a trajectory, written as a text such as fora:3.",
        r"\bschedules?\b",
    ),
    Term(
        STEPS, "trajectory",
        "All steps from the noise to the images, for one batch.",
        r"\btrajector(y|ies)\b",
    ),
    Term(
        STEPS, "FORA",
        "Caching as published in arXiv 2407.01425: reuse steps take the outputs of the last full step unchanged.",
        r"\bFORA\b",
    ),
    Term(
        STEPS, "fora:N",
        "The schedule of FORA with the cache interval N.",
        r"\bfora:\w",
    ),
    Term(
        STEPS, "cache interval",
        "The distance between two full steps: at least every N-th step is a full step.",
        r"\bcache intervals?\b",
    ),
    Term(
        STEPS, "even:F",
        "F full steps at equal distances.",
        r"\beven:\w",
    ),
    Term(
        STEPS, "dense:F,B",
        "F full steps that stand closer together towards the end of the trajectory: the larger B (0 to 1), the "
        "closer. Without B it is 0.3.",
        r"\bdense:\w",
    ),
    Term(
        STEPS, "every=N",
        "In a schedule: as many full steps as fora:N has.",
        r"\bevery=\w",
    ),
    Term(
        STEPS, "first=K, last=K",
        "In a schedule: the first or last K steps are full steps.",
        r"\b(first|last)=\d",
    ),
    Term(
        STEPS, "full:0,K,...",
        "Full steps at exactly these positions; the first step is 0.",
        r"\bfull:\d",
    ),
    Term(
        STEPS, "NAME.json",
        "A schedule from a file, for example one that fora-trt calibrate has written.",
        r"\.json\b",
    ),
    Term(
        STEPS, "calibrated",
        "A schedule file whose full steps were chosen for this model by fora-trt calibrate.",
        r"\bcalibrated\b",
    ),
    Term(
        STEPS, "forecast, forecast=K",
        "Reuse steps extrapolate the layer outputs of the last K + 1 full steps: K = 1 by a line, 2 by a "
        "parabola, 3 by a cubic.",
        r"\bforecasts?\b",
    ),
    Term(
        STEPS, "S steps, no cache",
        "The equal-time control: fewer steps (S) without caching, in about the same time as the schedules above "
        "it. Caching pays if its images are better than those of its control.",
        r"\d steps?, no cache\b|\bequal-time\b|\bfewer steps\b|\bcontrols?\b",
    ),
    Term(
        STEPS, "solver, scheduler",
        "The rule that computes a step's result from the output of the network, such as ddim, dpm-solver++ or "
        "unipc; order=K is its order, spacing=... says how its steps are spread over the noise levels.",
        r"\bsolvers?\b|\bschedulers?\b|\b(ddim|ddpm|dpm-solver|unipc|euler|heun|pndm)|\border=\d|\bspacing=",
    ),
    Term(
        TIME, "speed-up",
        "How many times as fast as the same backend without caching, at the full number of steps.",
        r"\bspeed-ups?\b|\btimes as fast\b",
    ),
    Term(
        TIME, "ideal, of ideal",
        "The speed-up if reuse steps took no time, and the measured speed-up as a fraction of it.",
        r"\bideal\b",
    ),
    Term(
        TIME, "over PyTorch",
        "Speed-up over PyTorch eager without caching.",
        r"\bover PyTorch\b",
    ),
    Term(
        TIME, "time, spread",
        "Time of a trajectory: the median of all timed runs, and the fastest to the slowest of them.",
        r"\bspread\b",
    ),
    Term(
        TIME, "interleaved runs",
        "All rows run in turn, again and again, so that a change of the machine's speed affects all of them.",
        r"\binterleaved\b",
    ),
    Term(
        TIME, "per image",
        "Time of a trajectory divided by the number of its images.",
        r"\bper image\b",
    ),
    Term(
        TIME, "images at once",
        "The batch size: the number of images that one trajectory computes together.",
        r"\bimages at once\b|\bbatch(es)?\b",
    ),
    Term(
        TIME, "overhead",
        "Fraction of the time outside the engines: the solver, guidance, copies and Python.",
        r"\boverhead\b",
    ),
    Term(
        TIME, "roofline",
        "Shortest possible time: the arithmetic and memory traffic of the graphs at the peak rates of this "
        "machine, which were measured in the same run. As a speed-up: the roofline of no caching divided by that "
        "of the schedule.",
        r"\broofline\b",
    ),
    Term(
        TIME, "peak rates",
        "Largest measured rates of matrix products (floating point operations per second, FLOP/s) and of copies "
        "(bytes per second, B/s).",
        r"\bpeak rates\b",
    ),
    Term(
        TIME, "peak memory",
        "Largest memory during the first steps, measured in a separate process: of the process on a CPU, of the "
        "device on a GPU.",
        r"\bpeak memory\b",
    ),
    Term(
        TIME, "backend",
        "The library that runs the network: onnxruntime, tensorrt, tensorrt-rtx, or PyTorch as torch and "
        "torch-compile.",
        r"\bbackends?\b|\bonnxruntime\b|\btensorrt\b",
    ),
    Term(
        TIME, "engine",
        "One graph of the network (for full or for reuse steps), loaded by a backend.",
        r"\bengines?\b",
    ),
    Term(
        TIME, "PyTorch eager",
        "The original PyTorch network, operation by operation; caching by hooks.",
        r"\bPyTorch eager\b",
    ),
    Term(
        TIME, "PyTorch compiled",
        "The original PyTorch network under torch.compile.",
        r"\bPyTorch compiled\b",
    ),
    Term(
        IMAGES, "Pareto front",
        "The settings that no other setting beats in both time and PSNR.",
        r"\bPareto front\b",
    ),
    Term(
        IMAGES, "minimum",
        "The smallest PSNR that a recommended setting may have (--min-psnr).",
        r"\bto keep [\d.]+ dB|\bkeeps [\d.]+ dB|\bminimum\b",
    ),
    Term(
        IMAGES, "dB",
        "Decibels, the logarithmic unit of PSNR (peak signal-to-noise ratio): 10 dB more are a tenth of the mean "
        "squared error, and differences are hard to see from about 40 dB on.",
        r"\bPSNR\b|\bdB\b",
    ),
    Term(
        IMAGES, "identical",
        "Not a bit of any pixel differs: the PSNR is infinite.",
        r"\bidentical\b|\bno difference\b",
    ),
    Term(
        IMAGES, "solution, fine solution",
        "Images of many more steps without caching, from the same noise: nearly what the network defines. No "
        "caching has an error against it too.",
        r"\bsolutions?\b",
    ),
    Term(
        IMAGES, "latents",
        "The tensor on which the steps work; it is decoded to an image at the end.",
        r"\blatents?\b",
    ),
    Term(
        IMAGES, "latent error",
        "Norm of the difference of the latents to no caching with the same solver and number of steps, divided by "
        "the norm without caching; in the table after the last step.",
        r"\blatent error\b|\berror of the latents\b",
    ),
    Term(
        IMAGES, "image features",
        "Numbers that an image classifier computes from an image; distances of sets of images are computed from "
        "them.",
        r"\bimage features?\b",
    ),
    Term(
        IMAGES, "manifold",
        "The neighbourhood of a set of image features: all points that are as near to one of them as its third "
        "nearest neighbour.",
        r"\bmanifold\b",
    ),
    Term(
        IMAGES, "guidance",
        "Classifier-free guidance: how strongly the images follow their class or prompt. Above 1 every step "
        "evaluates the network for each image twice, with and without it.",
        r"\bguidance\b",
    ),
    Term(
        MODEL, "fp32, fp16, bf16",
        "Number format of the network: 32 or 16 bits.",
        r"\b(fp32|fp16|bf16)\b",
    ),
    Term(
        MODEL, "DiT, PixArt",
        "Kinds of diffusion transformers, conditioned by a class or by a text.",
        r"\b(DiT|PixArt)",
    ),
    Term(
        MODEL, "bundle, manifest",
        "The exported graphs of the network, and the file that describes them. The digest of the manifest "
        "(SHA-256) identifies the bundle.",
        r"\bbundles?\b|\bmanifest\b",
    ),
    Term(
        MODEL, "commit",
        "The version of fora-trt's source code that was measured.",
        r"\bcommit\b",
    ),
)  # fmt: skip
"""All terms, in the order of the page. The metrics of images explain themselves, in `METRICS`."""


def terms_of(page: str, metrics: Sequence[str]) -> dict[str, list[tuple[str, str]]]:
    """Word and explanation, by topic, of the terms in the visible text of an HTML page and of the measured metrics.

    Explanations use terms too; these are explained as well.
    """
    measured = [one for one in METRICS.values() if one.name in metrics]
    text = " ".join([visible_text(page), *(one.explanation for one in measured)])
    chosen = [False] * len(TERMS)
    while new := [k for k, term in enumerate(TERMS) if not chosen[k] and re.search(term.pattern, text)]:
        for k in new:
            chosen[k] = True
            text += f" {TERMS[k].explanation}"
    found: dict[str, list[tuple[str, str]]] = {
        topic: [(term.word, term.explanation) for k, term in enumerate(TERMS) if chosen[k] and term.topic == topic]
        for topic in TOPICS
    }
    found[IMAGES] += [(one.column, one.explanation) for one in measured]
    return {topic: terms for topic, terms in found.items() if terms}


def visible_text(page: str) -> str:
    """The text of an HTML page, with the alternative texts of its images."""
    page = re.sub(r"<(style|title)>.*?</\1>", " ", page, flags=re.DOTALL)
    page = re.sub(r'<img [^>]*?alt="([^"]*)"[^>]*>', r" \1 ", page)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", page)).split())
