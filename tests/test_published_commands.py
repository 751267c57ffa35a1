"""Published checkpoints and trainers' files through the commands: exported, verified, run as in diffusers."""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import DiTPipeline, LCMScheduler, PixArtSigmaPipeline

from fora_trt.bundle import Bundle
from fora_trt.cli import main
from tests.checkpoints import authors_state, pixart_pipeline
from tests.published import aged, as_pickle, with_tensors
from tests.shared import made_once

pytestmark = pytest.mark.slow
TOKENS, STEPS = 12, 4


def fora(*arguments: object) -> str:
    done = CliRunner().invoke(main, [str(one) for one in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def latents_of(bundle: Path, *options: object) -> np.ndarray:
    file = bundle.parent / "latents.npy"
    fora("run", bundle, "--steps", STEPS, "--cache-interval", 1, "--latents-out", file, *options)
    return np.asarray(np.load(file))


def noise(images: int) -> torch.Tensor:
    return torch.cat([torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(k)) for k in range(images)])


@pytest.mark.parametrize("form", ["as published", "a variant"])
def test_a_published_dit_makes_the_latents_of_its_pipeline(form: str, pipeline_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pipeline_folder, tmp_path / "dit"))
    if form == "as published":
        aged(folder, "ada_norm_zero")
        as_pickle(folder / "transformer")
        as_pickle(folder / "vae")
    else:
        pipe = DiTPipeline.from_pretrained(folder)
        for part in ("transformer", "vae"):
            shutil.rmtree(folder / part)
            getattr(pipe, part).save_pretrained(folder / part, variant="fp16", max_shard_size="20KB")
    fora("export", folder, "--out", tmp_path / "export")
    fora("verify", tmp_path / "export/dit", "--steps", STEPS, "--cache-intervals", 2)
    ours = latents_of(tmp_path / "export/dit", "--class-labels", "3,7", "--guidance-scale", 2, "-o", tmp_path / "a.png")
    theirs = DiTPipeline.from_pretrained(pipeline_folder)
    labels = torch.tensor([3, 7, 1000, 1000])
    x = noise(2)
    theirs.scheduler.set_timesteps(STEPS)
    with torch.no_grad():
        for t in theirs.scheduler.timesteps:
            predicted = theirs.transformer(torch.cat([x, x]), timestep=t.expand(4), class_labels=labels).sample[:, :4]
            conditional, unconditional = predicted.chunk(2)
            x = theirs.scheduler.step(unconditional + 2 * (conditional - unconditional), t, x).prev_sample
    assert np.abs(ours - x.numpy()).max() < 1e-3
    assert (tmp_path / "a.png").exists()


def test_a_distilled_pixart_runs_as_its_pipeline_does(run_folder: Path, tmp_path: Path) -> None:
    made = made_once(run_folder / "checkpoints" / "pixart-sigma", partial(pixart_pipeline, kind="sigma"))
    folder = Path(shutil.copytree(made, tmp_path / "lcm"))
    LCMScheduler().save_pretrained(folder / "scheduler")
    aged(folder, "ada_norm_single", cross_attention_dim=24)
    with_tensors(folder / "transformer", **{"caption_projection.y_embedding": torch.zeros(120, 12)})
    output = fora("export", folder, "--text-length", TOKENS, "--out", tmp_path / "export")
    assert "ignored, as in diffusers: caption_projection.y_embedding" in output
    fora("verify", tmp_path / "export/lcm", "--steps", STEPS, "--cache-intervals", 2)
    ours = latents_of(tmp_path / "export/lcm", "--prompt", "a dog", "--guidance-scale", 0, "-o", tmp_path / "a.png")
    pipe = PixArtSigmaPipeline.from_pretrained(made, scheduler=LCMScheduler())
    more: dict[str, Any] = {"use_resolution_binning": False, "clean_caption": False, "output_type": "latent"}
    theirs = pipe(
        "a dog", num_inference_steps=STEPS, guidance_scale=0, max_sequence_length=TOKENS,
        generator=torch.Generator().manual_seed(0), **more,
    ).images  # fmt: skip
    assert np.abs(ours - theirs.numpy()).max() < 1e-3


@pytest.mark.parametrize("kind", ["ema", "AveragedModel"])
def test_a_trainers_checkpoint_gives_the_averaged_weights(kind: str, tmp_path: Path) -> None:
    raw, average = authors_state(seed=0), authors_state(seed=1)
    content: dict[str, Any] = {"model": raw, "ema": average, "opt": {"state": {}}}
    if kind == "AveragedModel":
        content = {"n_averaged": torch.tensor(7), **{f"module.{name}": one for name, one in average.items()}}
    torch.save(content, tmp_path / "0050000.pt")
    torch.save(average, tmp_path / "average.pt")
    digests = []
    for file in ("0050000.pt", "average.pt"):
        output = fora("export", tmp_path / file, "--num-heads", 4, "--image-size", 32, "--out", tmp_path / "export")
        assert ("; averaged)" in output) is (file == "0050000.pt")
        digests.append(Bundle.open(tmp_path / "export" / file[:-3]).manifest.model.weights_sha256)
    assert digests[0] == digests[1]
