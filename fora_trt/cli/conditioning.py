"""What the images are to be and how strongly they are guided, from the options of a command."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fora_trt.errors import InputError

if TYPE_CHECKING:
    import torch

    from fora_trt.bundle import Bundle
    from fora_trt.runtime.conditioning import Conditioning
    from fora_trt.runtime.sampling import Guidance


def guidance_scale_of(asked: float | None, bundle: Bundle, given: Conditioning) -> float:
    """What was asked for, or what is usual for the kind of model."""
    from fora_trt.runtime.conditioning import usual_guidance_scale

    return usual_guidance_scale(bundle.manifest, given) if asked is None else asked


def guidance_of(
    asked: float | None, interval: tuple[int, int] | None, bundle: Bundle, given: Conditioning, calls: int
) -> Guidance:
    """Guidance on all steps or on a range of them, which must not be empty."""
    from fora_trt.runtime.sampling import Guidance

    guidance = Guidance(guidance_scale_of(asked, bundle, given), *(interval or (0, None)))
    if interval is not None and not any(map(guidance.guides, range(calls))):
        raise InputError(
            f"no step is guided: the interval is {interval[0]}:{interval[1]}, there are steps 0 to {calls - 1}, and "
            f"the guidance scale is {guidance.scale:g}"
        )
    return guidance


def conditioning_of(
    bundle: Bundle,
    class_labels: tuple[int, ...] | None,
    prompts: tuple[str, ...],
    negative_prompt: str,
    file: Path | None,
    num_images: int | None,
    device: torch.device,
) -> Conditioning:
    """What the images are to be, said in the one way that the model understands."""
    from fora_trt.runtime.conditioning import (
        conditioning_from_file,
        conditioning_of_classes,
        conditioning_of_tensors,
        way_to_condition,
    )

    manifest = bundle.manifest
    said = {"--class-labels": class_labels is not None, "--prompt": bool(prompts), "--prompt-embeds": file is not None}
    given = [option for option, is_given in said.items() if is_given]
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)} say the same thing in two ways; give one of them")
    if negative_prompt and not prompts:
        raise InputError("--negative-prompt goes with --prompt; a file holds its own as negative_prompt_embeds")
    if not given and (needed := way_to_condition(manifest)):
        raise InputError(f"nothing says what {manifest.name} is to make; give {needed}")
    if num_images is not None and not prompts and given:
        raise InputError(f"--num-images does not go with {given[0]}, which says how many there are; leave it out")
    if class_labels is not None:
        return conditioning_of_classes(manifest, class_labels)
    if file is not None:
        return conditioning_from_file(manifest, file)
    if prompts:
        from fora_trt.runtime.prompts import conditioning_of_prompts

        each = [prompt for prompt in prompts for _ in range(num_images or 1)]
        return conditioning_of_prompts(manifest, each, negative_prompt, device)
    return conditioning_of_tensors(manifest, num_images or 1, {}, None)


def lines_of(path: Path) -> tuple[str, ...]:
    """The lines of a text file that are not empty."""
    try:
        lines = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as text ({error})") from error
    if not lines:
        raise InputError(f"{path} holds no prompt; write one a line")
    return lines
