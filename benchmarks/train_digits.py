"""Trains the digits model that ships with fora-trt: a small class-conditional DiT in pixel space.

The network is diffusers' `DiTTransformer2DModel`, the class that also loads the published DiT checkpoints: adaLN-zero
blocks, a learned null class for classifier-free guidance, and a learned variance. The data are the 1,797
handwritten 8x8 digits of scikit-learn. Everything is seeded. The result is a diffusers folder:

    python benchmarks/train_digits.py --out fora_trt/models/digits

It takes about 25 minutes on two cores with bfloat16 instructions.

Method: DiT (arXiv 2212.09748) for the network and its initialisation, improved DDPM (arXiv 2102.09672) for the
hybrid loss. Shapes: B images, C channels (1), H = W = 8 pixels.
"""

from __future__ import annotations

import copy
import json
import math
import time
from pathlib import Path

import click
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiTTransformer2DModel
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

NUM_CLASSES = 10
CONFIG = {
    "num_attention_heads": 3,
    "attention_head_dim": 32,
    "in_channels": 1,
    "out_channels": 2,
    "num_layers": 8,
    "sample_size": 8,
    "patch_size": 1,
    "num_embeds_ada_norm": NUM_CLASSES,
}
NOISE = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}


def new_model() -> DiTTransformer2DModel:
    """A DiT with one timestep and class embedder for all blocks, initialised as in the DiT paper."""
    model = DiTTransformer2DModel(**CONFIG)
    shared = model.transformer_blocks[0].norm1.emb
    shared.class_embedder.dropout_prob = 0.0  # labels are dropped below: once per image, not once per block
    for block in model.transformer_blocks:
        block.norm1.emb = shared
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(model.pos_embed.proj.weight.flatten(1))
    for embedding in (shared.class_embedder.embedding_table, *shared.timestep_embedder.children()):
        if hasattr(embedding, "weight"):
            nn.init.normal_(embedding.weight, std=0.02)
    for block in model.transformer_blocks:
        nn.init.zeros_(block.norm1.linear.weight)
    for final in (model.proj_out_1, model.proj_out_2):
        nn.init.zeros_(final.weight)
    return model


class HybridLoss:
    """Noise prediction error plus 1/1000 of the variational bound, which trains only the variance."""

    def __init__(self) -> None:
        scheduler = DDPMScheduler(**NOISE)
        beta, alpha_bar = scheduler.betas.double(), scheduler.alphas_cumprod.double()
        previous = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
        variance = beta * (1 - previous) / (1 - alpha_bar)  # of q(x_{t-1} | x_t, x_0)
        self.alpha_bar = alpha_bar.float()
        self.log_beta = beta.log().float()
        self.log_variance = torch.cat([variance[1:2], variance[1:]]).log().float()
        self.from_start = (beta * previous.sqrt() / (1 - alpha_bar)).float()
        self.from_noisy = ((1 - previous) * (1 - beta).sqrt() / (1 - alpha_bar)).float()

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        t = torch.randint(len(self.alpha_bar), (len(images),))  # (B,)
        at = {name: value[t, None, None, None] for name, value in vars(self).items()}  # each (B, 1, 1, 1)
        noise = torch.randn_like(images)  # (B, C, H, W)
        noisy = at["alpha_bar"].sqrt() * images + (1 - at["alpha_bar"]).sqrt() * noise
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(noisy, timestep=t, class_labels=labels).sample.float()  # (B, 2C, H, W)
        predicted, v = output.chunk(2, dim=1)
        start = (noisy - (1 - at["alpha_bar"]).sqrt() * predicted.detach()) / at["alpha_bar"].sqrt()
        mean = at["from_start"] * start.clamp(-1, 1) + at["from_noisy"] * noisy
        true_mean = at["from_start"] * images + at["from_noisy"] * noisy
        fraction = (v + 1) / 2
        log_variance = fraction * at["log_beta"] + (1 - fraction) * at["log_variance"]
        divergence = 0.5 * (
            log_variance
            - at["log_variance"]
            - 1
            + (at["log_variance"] - log_variance).exp()
            + (true_mean - mean).square() * (-log_variance).exp()
        )
        likelihood = 0.5 * (math.log(2 * math.pi) + log_variance + (images - mean).square() * (-log_variance).exp())
        bound = torch.where(t[:, None, None, None] == 0, likelihood, divergence)
        simple: Tensor = (predicted - noise).square().mean()
        return simple + 1e-3 * bound.mean() / math.log(2)


def save(model: DiTTransformer2DModel, out: Path) -> None:
    """Write a diffusers folder without a VAE, with weights in half precision."""
    transformer = out / "transformer"
    transformer.mkdir(parents=True, exist_ok=True)
    model.save_config(transformer)
    weights = {name: value.half().contiguous().clone() for name, value in model.state_dict().items()}
    save_file(weights, transformer / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    DDIMScheduler(**NOISE, clip_sample=False).save_pretrained(out / "scheduler")
    index = {
        "_class_name": "DiTPipeline",
        "id2label": {str(digit): str(digit) for digit in range(NUM_CLASSES)},
        "scheduler": ["diffusers", "DDIMScheduler"],
        "transformer": ["diffusers", "DiTTransformer2DModel"],
        "vae": [None, None],
    }
    (out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


@click.command(context_settings={"show_default": True})
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder to write.")
@click.option("--steps", type=click.IntRange(min=1), default=4000, help="Optimizer steps.")
@click.option("--batch-size", type=click.IntRange(min=1), default=128)
@click.option("--learning-rate", type=float, default=1e-3)
@click.option("--seed", type=int, default=0)
def main(out: Path, steps: int, batch_size: int, learning_rate: float, seed: int) -> None:
    """Train the digits model and write it as a diffusers folder."""
    torch.manual_seed(seed)
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1  # (1797, 1, 8, 8) in [-1, 1]
    labels = torch.tensor(data.target)
    model, loss_of = new_model().train(), HybridLoss()
    average = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    began, running = time.monotonic(), 0.0
    for step in range(steps):
        elapsed = (time.monotonic() - began) / 60
        warm, left = min(1.0, (step + 1) / 200), 1 - step / steps
        optimizer.param_groups[0]["lr"] = learning_rate * warm * 0.5 * (1 - math.cos(math.pi * left))
        pick = torch.randint(len(images), (batch_size,))
        dropped = torch.rand(batch_size) < 0.1
        optimizer.zero_grad(set_to_none=True)
        with sdpa_kernel(SDPBackend.MATH):  # twice as fast as the fused CPU kernel at 64 tokens
            loss = loss_of(model, images[pick], torch.where(dropped, NUM_CLASSES, labels[pick]))
            loss.backward()  # type: ignore[no-untyped-call] # torch does not annotate it
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(0.999, (step + 1) / (step + 10))
        with torch.no_grad():
            for slow, fast in zip(average.parameters(), model.parameters(), strict=True):
                slow.lerp_(fast, 1 - decay)
        running = 0.99 * running + 0.01 * loss.item() if step else loss.item()
        if step % 200 == 0:
            click.echo(f"step {step:5d}  loss {running:.4f}  {elapsed:.1f} min")
    save(average, out)
    click.echo(f"wrote {out} after {(time.monotonic() - began) / 60:.1f} min, loss {running:.4f}")


if __name__ == "__main__":
    main()
