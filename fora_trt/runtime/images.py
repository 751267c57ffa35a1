"""From latents to pictures: the VAE where there is one, and grids to look at."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fora_trt.bundle import Manifest
from fora_trt.errors import InputError

SMALLEST_SIDE = 64  # pixels: smaller pictures are enlarged in a grid
DECODED_AT_ONCE = 8


def can_decode(manifest: Manifest) -> bool:
    """Whether latents of this bundle can become pictures: they are pixels, or the source has a VAE."""
    return manifest.latents.pixels or manifest.model.vae is not None


@torch.inference_mode()
def images_from_latents(latents: Tensor, manifest: Manifest, device: torch.device) -> list[Image.Image]:
    """One RGB or grey picture for each of `latents` (B, C, H, W). Raises `InputError` where there is no VAE."""
    if not can_decode(manifest):
        raise InputError(
            f"{manifest.name} works on latents and its source {manifest.model.source!r} has no VAE to decode them; "
            "give --latents-out FILE.npy instead of -o"
        )
    pixels = latents if manifest.latents.pixels else _decoded(latents, manifest, device)
    levels = ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()
    return [Image.fromarray(image.squeeze(-1).numpy()) for image in levels]


def _decoded(latents: Tensor, manifest: Manifest, device: torch.device) -> Tensor:
    """(B, 4, h, w) -> (B, 3, H, W) in [-1, 1], a few at a time."""
    from diffusers import AutoencoderKL

    source = manifest.model.vae
    try:
        vae = AutoencoderKL.from_pretrained(source, subfolder="vae", torch_dtype=torch.float32).to(device)
    except (OSError, ValueError) as error:
        raise InputError(
            f"the VAE of {source!r} cannot be loaded, so there are no pictures: {str(error).partition(chr(10))[0]}; "
            "--latents-out FILE.npy keeps the latents"
        ) from error
    parts = torch.split(latents.to(device) / manifest.latents.scale, DECODED_AT_ONCE)
    return torch.cat([vae.decode(part).sample.cpu() for part in parts])


def grid(rows: Sequence[Sequence[Image.Image]], labels: Sequence[str] | None = None) -> Image.Image:
    """Pictures of one size in rows, each with its label on the left; small pictures are enlarged, pixel by pixel."""
    first = rows[0][0]
    factor = max(1, -(-SMALLEST_SIDE // min(first.size)))
    width, height, gap = first.width * factor, first.height * factor, 4
    font = ImageFont.load_default(size=max(14, height // 5))
    margin = gap + max((int(font.getlength(label)) + 2 * gap for label in labels or ()), default=0)
    columns = max(map(len, rows))
    mode = "RGB" if first.mode == "RGB" else "L"
    sheet = Image.new(mode, (margin + columns * (width + gap), gap + len(rows) * (height + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, row in enumerate(rows):
        top = gap + i * (height + gap)
        if labels:
            draw.text((2 * gap, top + height / 2), labels[i], fill="black", font=font, anchor="lm")
        for j, image in enumerate(row):
            larger = image.resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(larger, (margin + j * (width + gap), top))
    return sheet


def square_grid(images: Sequence[Image.Image]) -> Image.Image:
    """All pictures in as many columns as rows, or one more."""
    columns = next(n for n in range(1, len(images) + 1) if n * n >= len(images))
    return grid([images[start : start + columns] for start in range(0, len(images), columns)])
