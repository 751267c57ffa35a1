"""Decodes latents to images, with the VAE if the model has one."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fora_trt.bundle import Manifest
from fora_trt.contract import Part
from fora_trt.errors import InputError, ModelError, first_line
from fora_trt.models.architectures import Config, factors_of
from fora_trt.models.parts import vae_at, weights_of_vae
from fora_trt.quiet import quiet
from fora_trt.untrusted import shown

DECODED_AT_ONCE = 8 * 256 * 256  # pixels of the first batch; a batch that does not fit GPU memory is halved


def can_decode(manifest: Manifest) -> bool:
    """Whether latents of this bundle can become images: they are pixels, or the source has a VAE."""
    return manifest.latents.pixels or manifest.model.vae is not None


def check_image_size(manifest: Manifest, height: int | None, width: int | None) -> None:
    """Raise `InputError` for a height or width other than the exported one: the graphs have fixed sizes."""
    if height is None and width is None:
        return
    size = manifest.model.image_size
    if size is None:
        raise InputError(f"the manifest of {manifest.name} has no image size; leave --height and --width out")
    if (height or size[0], width or size[1]) != size:
        wanted = (height or size[0], width or size[1])
        raise InputError(
            f"{manifest.name} was exported for images of {size[0]}x{size[1]} (height x width), not "
            f"{wanted[0]}x{wanted[1]}; export it again: {manifest.export_command(image_size=wanted)}"
        )


class Decoder:
    """Decodes latents to images, with the VAE of the model if it has one."""

    def __init__(self, manifest: Manifest, vae: str | None = None) -> None:
        """Find the VAE, at `vae` or at the location in the manifest; its weights are loaded at the first use.

        `vae` brings its own scale and shift of the latents; the VAE in the manifest must be that of the export. Raises
        `InputError` if there is none, it is incomplete, or it does not fit, so that no time is spent on latents that
        cannot be decoded.
        """
        self.manifest = manifest
        self._scale, self._shift = manifest.latents.scale, manifest.latents.shift
        self._vae: Any = None
        if manifest.latents.pixels:
            if vae is not None:
                raise InputError(f"{manifest.name} makes pixels and needs no VAE; leave --vae out")
            return
        part = manifest.model.vae
        try:
            if vae is not None:
                part, config = vae_at(vae, with_weights=False)  # decoding looks at them
                _check_fits(manifest, part, config)
                self._scale, self._shift = factors_of(config, self._scale)
            if part is None:
                raise InputError(
                    f"{manifest.name} needs a VAE to decode its latents; its source "
                    f"'{shown(manifest.model.options.source)}' has none; name one with --vae FOLDER"
                )
            self._folder, self._variant = weights_of_vae(part)
        except ModelError as error:
            raise InputError(str(error)) from error

    def images(self, latents: Tensor, device: torch.device) -> list[Image.Image]:
        """One RGB or grey image for each of `latents` (B, C, H, W). Raises `InputError` for non-finite pixels."""
        return [Image.fromarray(image.squeeze(-1).numpy()) for image in self.levels(latents, device)]

    def levels(self, latents: Tensor, device: torch.device) -> Tensor:
        """The same images as a tensor of integers from 0 to 255, (B, H, W, 3 or 1) in uint8 on the CPU."""
        return rounded(self.pictures(latents, device))

    @torch.inference_mode()
    def pictures(self, latents: Tensor, device: torch.device) -> Tensor:
        """The same images before they are rounded: levels from 0 to 255, (B, H, W, 3 or 1) in fp32 on the CPU."""
        pixels = latents if self.manifest.latents.pixels else self._decoded(latents, device)
        if not pixels.isfinite().all():
            raise InputError(
                f"the decoded images of {self.manifest.name} are not finite, though the latents are: the VAE "
                f"{self._folder} overflows; give another one with --vae"
            )
        levels = (pixels.float() / 2 + 0.5).clamp(0, 1) * 255
        return levels.permute(0, 2, 3, 1).cpu().contiguous()

    def _decoded(self, latents: Tensor, device: torch.device) -> Tensor:
        """(B, C, h, w) -> (B, 3, H, W) in [-1, 1] on the CPU, in fp32, in batches that fit the device's memory."""
        vae = self._vae_on(device)
        scaled = latents.to(device) / self._scale + self._shift
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        at_once = max(1, DECODED_AT_ONCE // (factor**2 * latents.shape[-1] * latents.shape[-2]))
        done: list[Tensor] = []
        while (count := sum(map(len, done))) < len(scaled):
            try:
                done.append(vae.decode(scaled[count : count + at_once]).sample.cpu())
            except torch.cuda.OutOfMemoryError:  # noqa: PERF203 # each batch may be too large
                if at_once == 1:
                    raise InputError(
                        f"{device} has too little free memory to decode one image; end other processes that use it"
                    ) from None
                at_once //= 2
                torch.cuda.empty_cache()
        return torch.cat(done)

    def _vae_on(self, device: torch.device) -> Any:
        """The VAE on a device; loaded at the first call and kept."""
        from diffusers import AutoencoderKL

        if self._vae is None:
            try:
                with quiet("huggingface_hub"), quiet("diffusers"):
                    self._vae = AutoencoderKL.from_pretrained(
                        self._folder, variant=self._variant, torch_dtype=torch.float32
                    )
            except Exception as error:  # damaged files can raise anything
                raise InputError(
                    f"the VAE {self._folder} cannot be loaded: {first_line(error)}; give another one with --vae FOLDER"
                ) from error
        return self._vae.to(device)


def rounded(pictures: Tensor) -> Tensor:
    """Levels as integers, in uint8."""
    return pictures.round().to(torch.uint8)


def _check_fits(manifest: Manifest, part: Part, config: Config) -> None:
    """Raise `InputError` for a VAE whose latents have another number of channels."""
    channels = config.get("latent_channels", 4)  # 4 is the default of the class
    if channels != manifest.latents.channels:
        raise InputError(
            f"the VAE {part.where!r} has {channels} latent channels, {manifest.name} has {manifest.latents.channels}; "
            "give --vae the VAE that the network was trained with"
        )
