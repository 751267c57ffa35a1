"""From latents to pictures: the VAE where there is one, and grids to look at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fora_trt.bundle import Manifest
from fora_trt.errors import InputError, first_line
from fora_trt.quiet import quiet

SMALLEST_SIDE = 64  # pixels: smaller pictures are enlarged in a grid
DECODED_AT_ONCE = 8 * 256 * 256  # pixels, for a start: a batch that does not fit a GPU is halved


def can_decode(manifest: Manifest) -> bool:
    """Whether latents of this bundle can become pictures: they are pixels, or the source has a VAE."""
    return manifest.latents.pixels or manifest.model.vae is not None


def check_image_size(manifest: Manifest, height: int | None, width: int | None) -> None:
    """Raise `InputError` for a height or width other than what was exported: the graphs have fixed sizes."""
    if height is None and width is None:
        return
    size = manifest.model.image_size
    if size is None:
        raise InputError(f"{manifest.name} does not say its image size; leave --height and --width out")
    if (height or size[0], width or size[1]) != size:
        wanted = f"{height or size[0]}x{width or size[1]}"
        raise InputError(
            f"{manifest.name} was exported for images of {size[0]} x {size[1]} (height x width); for {wanted} export "
            f"it again: fora-trt export {manifest.model.options.source} --image-size {wanted}"
        )


class Decoder:
    """Makes pictures of latents, with the VAE of the model where it has one."""

    def __init__(self, manifest: Manifest, vae: str | None = None, *, or_latents: bool = True) -> None:
        """Look for the VAE, at `vae` or where the manifest says; its weights are loaded when they are needed.

        `or_latents` says whether a user could have the latents instead, which messages then advise.
        Raises `InputError` where there is none, before any time is spent on latents that nobody could look at.
        """
        self.manifest, self._where = manifest, vae or manifest.model.vae
        self._subfolder: str | None = None
        self._vae: Any = None
        instead = ", or give --latents-out FILE.npy instead of -o" if or_latents else ""
        self._keep = "; --latents-out FILE.npy keeps the latents" if or_latents else ""
        if manifest.latents.pixels:
            return
        if self._where is None:
            raise InputError(
                f"{manifest.name} works on latents and its source {manifest.model.options.source!r} has no VAE to "
                f"decode them; name one with --vae FOLDER{instead}"
            )
        self._subfolder = _subfolder_of_vae(self._where, instead)

    def images(self, latents: Tensor, device: torch.device) -> list[Image.Image]:
        """One RGB or grey picture for each of `latents` (B, C, H, W). Raises `InputError` for what is not finite."""
        return [Image.fromarray(image.squeeze(-1).numpy()) for image in self.levels(latents, device)]

    @torch.inference_mode()
    def levels(self, latents: Tensor, device: torch.device) -> Tensor:
        """The same as whole numbers from 0 to 255, (B, H, W, 3 or 1) in uint8 on the CPU."""
        pixels = latents if self.manifest.latents.pixels else self._decoded(latents, device)
        if not pixels.isfinite().all():
            raise InputError(
                f"the pictures of {self.manifest.name} are not finite, though the latents were: its VAE "
                f"{self._where!r} overflows on them{self._keep}"
            )
        levels = ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
        return levels.permute(0, 2, 3, 1).cpu().contiguous()

    def _decoded(self, latents: Tensor, device: torch.device) -> Tensor:
        """(B, C, h, w) -> (B, 3, H, W) in [-1, 1] on the CPU, in fp32, as many at once as fit."""
        vae, latent = self._vae_on(device), self.manifest.latents
        scaled = latents.to(device) / latent.scale + latent.shift
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        at_once = max(1, DECODED_AT_ONCE // (factor**2 * latents.shape[-1] * latents.shape[-2]))
        done: list[Tensor] = []
        while (count := sum(map(len, done))) < len(scaled):
            try:
                done.append(vae.decode(scaled[count : count + at_once]).sample.cpu())
            except torch.cuda.OutOfMemoryError:  # noqa: PERF203 # each batch may be too large
                if at_once == 1:
                    raise InputError(
                        f"{device} has no room to decode one image; end what else uses it{self._keep}"
                    ) from None
                at_once //= 2
                torch.cuda.empty_cache()
        return torch.cat(done)

    def _vae_on(self, device: torch.device) -> Any:
        """The VAE, loaded at the first call and kept."""
        from diffusers import AutoencoderKL

        if self._vae is None:
            try:
                with quiet("huggingface_hub"), quiet("diffusers"):
                    self._vae = AutoencoderKL.from_pretrained(
                        self._where, subfolder=self._subfolder, torch_dtype=torch.float32
                    )
            except (OSError, ValueError, RuntimeError) as error:
                told = f"{first_line(error)}{self._keep}"
                raise InputError(
                    f"the VAE of {self._where!r} cannot be loaded, so there are no pictures: {told}"
                ) from error
        return self._vae.to(device)


def _subfolder_of_vae(where: str, instead: str) -> str | None:
    """Where the VAE is in a pipeline's folder or repository; None for one that is a VAE itself."""
    from diffusers import AutoencoderKL

    for subfolder in ("vae", None):
        try:
            with quiet("huggingface_hub"), quiet("diffusers"):
                AutoencoderKL.load_config(where, subfolder=subfolder)
                return subfolder
        except (OSError, ValueError):  # noqa: PERF203 # two places to look at
            continue
    raise InputError(
        f"no VAE was found at {where!r}; download it where there is a network and give its folder with --vae{instead}"
    )


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
