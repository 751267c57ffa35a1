"""Export networks from the public code of other systems, and compare each bundle with eager hooks on its cache sites.

    python -m benchmarks.originals FOLDER HARDWARE

`FOLDER` has a clone of each repository that `SYSTEMS` names. Packages that they import must be installed, or be in
`FOLDER/standins`. Each network is small, has random weights, and runs in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.readme_tables import write_content
from fora_trt import InputSpec, ModelSpec, TensorSpec
from fora_trt.bundle import Bundle
from fora_trt.cli import main as fora_trt
from fora_trt.errors import BackendError
from fora_trt.inspection import inspect_bundle
from fora_trt.models.sources import model_from_source
from fora_trt.pipeline import Pipeline
from fora_trt.sampling.conditioning import Conditioning, example_conditioning
from fora_trt.sampling.step_noise import StepNoise

ROOT = Path(__file__).resolve().parents[1]
FOLDER = "ORIGINALS"
"""Environment variable with the folder of the clones."""

STEPS, INTERVAL, SEEDS = 12, 3, (0, 1)
IMAGE = TensorSpec("latents", "float32", ("batch", 4, 16, 16))
TIME = TensorSpec("timestep", "float32", ("batch",))
LABELS = TensorSpec("class_labels", "int64", ("batch",))
CLASSES = {"class_labels": InputSpec(values=(0, 10))}
DIT_SITES = "blocks.*.attn,blocks.*.mlp"

Made = tuple[nn.Module, ModelSpec]


@dataclass(frozen=True)
class System:
    """A system: its paper, its repository, and the options of the export; `make` is a factory of this module."""

    name: str
    paper: str
    repository: str
    commit: str
    make: Callable[[], Made]
    cache: str
    exclude: str = ""


@dataclass(frozen=True)
class Row:
    """What was measured for a system; `share` is the arithmetic of a reuse step over that of a full step."""

    name: str
    paper: str
    repository: str
    commit: str
    size: str
    sites: int
    level: str
    share: float
    errors: dict[str, float]
    said: list[str]


def _import(clone: str, inside: str, module: str) -> Any:
    """A module of a clone; its folder comes first among those that modules are imported from."""
    folder = Path(os.environ[FOLDER])
    for path in (folder / "standins", folder / clone / inside):
        sys.path.insert(0, str(path))
    return __import__(module, fromlist=["*"])


def _random(module: nn.Module) -> nn.Module:
    """Small random numbers in place of constant weights: zero-initialised gates would make every comparison trivial."""
    generator = torch.Generator().manual_seed(1)
    for weight in module.parameters():
        if weight.numel() > 1 and float(weight.detach().std()) < 1e-4:
            weight.data += 0.1 * torch.randn(weight.shape, generator=generator)
    for name, one in module.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            one.data += 0.2 * torch.rand(one.shape, generator=generator)
    return module.eval()


def _dit(module: nn.Module, call: Callable[..., Tensor] | None = None) -> Made:
    spec = ModelSpec(inputs=(IMAGE, TIME, LABELS), conditioning=CLASSES)
    return _random(module), spec if call is None else ModelSpec(
        inputs=spec.inputs, conditioning=CLASSES, call=lambda one, inputs: call(one, *inputs.values())
    )


SMALL = {"input_size": 16, "hidden_size": 128, "num_heads": 4, "num_classes": 10}


def learning_to_cache() -> Made:
    """The network whose layers Learning-to-Cache routes."""
    models = _import("learning-to-cache", "DiT", "models.models")
    torch.manual_seed(0)
    return _dit(models.DiT(depth=4, **SMALL))


def tinyfusion() -> Made:
    """TinyFusion: a DiT of fewer blocks."""
    models = _import("TinyFusion", ".", "models")
    torch.manual_seed(0)
    return _dit(models.DiT(depth=7, **SMALL))


def mediators() -> Made:
    """A SiT whose attention reads mediator tokens."""
    models = _import("Attention-Mediators", "attention_mediator", "models")
    torch.manual_seed(0)
    spec = ModelSpec(
        inputs=(IMAGE, TIME, LABELS),
        conditioning={**CLASSES, "timestep": InputSpec(values=(0, 1))},
        scheduler={"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 1.0},
    )
    return _random(models.SiT(depth=4, mediator_num=16, **SMALL)), spec


def dydit() -> Made:
    """DyDiT, with channels and tokens that a router masks."""
    models = _import("DyDiT", "DyDiT", "models")
    torch.manual_seed(0)
    module = models.DiT(depth=4, **SMALL)
    for block in module.blocks:  # else all channels and tokens are chosen
        for linear in (block.attn_rate.router, block.mlp_rate.router, block.token_selection.mlp_head[2]):
            nn.init.normal_(linear.bias, std=0.1)
    return _dit(module)


class Spectrum:
    """A spectrum as two real tensors; it can be multiplied with real numbers."""

    def __init__(self, real: Tensor, imaginary: Tensor) -> None:
        self.real, self.imaginary = real, imaginary

    def __imul__(self, scale: Tensor) -> Spectrum:
        return Spectrum(self.real * scale, self.imaginary * scale)


class RealFourier:
    """`torch.fft.rfft2` and `irfft2` of square patches as products of real matrices; ONNX has no such operators."""

    @staticmethod
    def rfft2(x: Tensor) -> Spectrum:
        cos, sin = RealFourier._tables(x.shape[-1])
        half = x.shape[-1] // 2 + 1
        real, imaginary = x @ cos[:, :half], -(x @ sin[:, :half])
        return Spectrum(cos @ real + sin @ imaginary, cos @ imaginary - sin @ real)

    @staticmethod
    def irfft2(spectrum: Spectrum, s: tuple[int, int]) -> Tensor:
        size = s[0]
        cos, sin = RealFourier._tables(size)
        half = size // 2 + 1
        real = cos @ spectrum.real - sin @ spectrum.imaginary
        imaginary = cos @ spectrum.imaginary + sin @ spectrum.real
        twice = torch.tensor([1.0, *[2.0] * (half - 2), 1.0])
        return ((real * twice) @ cos[:half] - (imaginary * twice) @ sin[:half]) / size**2

    @staticmethod
    def _tables(size: int) -> tuple[Tensor, Tensor]:
        angles = torch.arange(size)[:, None] * torch.arange(size) * (2 * torch.pi / size)
        return angles.cos(), angles.sin()


def dit_sr() -> Made:
    """DiT-SR: a U-Net of window attention; its window_reverse and its Fourier transform are replaced."""
    models = _import("DiT-SR", ".", "models.unet")
    if os.environ.get("UNCHANGED") is None:  # to see what is said about them

        def window_reverse(windows: Tensor, size: int, height: int, width: int) -> Tensor:
            rows = windows.view(-1, height // size, width // size, size, size, windows.shape[-1])
            return rows.permute(0, 5, 1, 3, 2, 4).flatten(2, 3).flatten(3, 4)

        layers: Any = sys.modules["models.swin_transformer"]
        layers.window_reverse = window_reverse
        layers.torch = SimpleNamespace(**vars(torch) | {"fft": RealFourier})
    torch.manual_seed(0)
    module = models.DiTSRModel(
        image_size=16,
        in_channels=8,
        model_channels=64,
        out_channels=4,
        attention_resolutions=[16, 8],
        channel_mult=(1, 2),
        num_heads=-1,
        num_head_channels=16,
        swin_depth=2,
        swin_embed_dim=64,
        window_size=4,
        lq_size=16,
        lq_channels=4,
    )
    return _random(module), ModelSpec(inputs=(IMAGE, TIME, TensorSpec("low_quality", "float32", ("batch", 4, 16, 16))))


def diffusion_rwkv() -> Made:
    """Diffusion-RWKV, whose kernel is replaced by the same sums in PyTorch."""
    from torch.utils import cpp_extension

    cpp_extension.load = lambda *given, **settings: None  # its kernel, for CUDA only
    models = _import("Diffusion-RWKV", ".", "models_drwkv")

    def attention(batch: int, tokens: int, channels: int, decay: Tensor, first: Tensor, k: Tensor, v: Tensor) -> Tensor:
        distance = (torch.arange(tokens)[:, None] - torch.arange(tokens)).abs().unsqueeze(-1).to(k.dtype)  # (T, T, 1)
        bonus = torch.where(distance == 0, first, -(distance - 1) * decay)  # (T, T, C)
        weights = (bonus + k[:, None]).softmax(2)  # (B, T, T, C)
        return (weights * v[:, None]).sum(2)

    models.RUN_CUDA = attention
    torch.manual_seed(0)
    module = models.DiffRWKVModel(img_size=16, patch_size=2, channels=4, embed_dim=64, depth=5, num_classes=10)
    return _dit(module)


def wavediff() -> Made:
    """WaveDiff: a GAN's generator, which takes new noise at every step."""
    from torch.utils import cpp_extension

    cpp_extension.load = lambda *given, **settings: None  # on a CPU its operators do not need it
    models = _import("WaveDiff", ".", "score_sde.models.ncsnpp_generator_adagn")
    config = SimpleNamespace(
        image_size=16, patch_size=1, num_channels=12, num_channels_dae=32, ch_mult=[1, 2], num_res_blocks=1,
        attn_resolutions=(8,), dropout=0.0, resamp_with_conv=True, conditional=True, fir=True,
        fir_kernel=[1, 3, 3, 1], skip_rescale=True, resblock_type="biggan", progressive="none",
        progressive_input="residual", progressive_combine="sum", embedding_type="positional", fourier_scale=16.0,
        centered=True, not_use_tanh=False, z_emb_dim=64, nz=20, n_mlp=2,
    )  # fmt: skip
    torch.manual_seed(0)
    module = _random(models.WaveletNCSNpp(config))
    pixels = TensorSpec("latents", "float32", ("batch", 12, 16, 16))
    noise = TensorSpec("z", "float32", ("batch", 20), "noise")
    scheduler = {"_class_name": "DDIMScheduler", "prediction_type": "sample", "clip_sample": False}
    return module, ModelSpec(inputs=(pixels, TIME, noise), scheduler=scheduler)


class FastViTDenoiser(nn.Module):
    """A denoiser whose blocks are those of FastViT, which classifies images."""

    def __init__(self, models: Any) -> None:
        super().__init__()
        self.embed, self.time = nn.Conv2d(4, 64, 1), nn.Linear(1, 64)
        kinds = (models.RepMixerBlock, models.RepMixerBlock, models.AttentionBlock, models.AttentionBlock)
        self.blocks = nn.ModuleList(kind(64, layer_scale_init_value=0.5) for kind in kinds)
        self.position, self.last = models.RepCPE(64, 64), nn.Conv2d(64, 4, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.embed(x) + self.time(t[:, None] / 1000)[..., None, None]
        for number, block in enumerate(self.blocks):
            h = self.position(h) if number == 2 else h
            h = block(h)
        result: Tensor = self.last(h)
        return result


def fastvit(merge: bool = False) -> Made:
    """FastViT's blocks as a denoiser, with the branches that it is trained with."""
    models = _import("ml-fastvit", ".", "models.fastvit")
    torch.manual_seed(0)
    module = _random(FastViTDenoiser(models))
    if merge:
        for one in list(module.modules()):
            if (method := getattr(one, "reparameterize", None)) is not None:
                method()
    return module, ModelSpec(inputs=(IMAGE, TIME))


def fastvit_merged() -> Made:
    """The same with merged branches."""
    return fastvit(merge=True)


FASTVIT = ("blocks.*.convffn,blocks.*.token_mixer", "blocks.0.token_mixer,blocks.1.token_mixer")
SWIN = "*.*.*.blocks.*.attn,*.*.*.blocks.*.mlp,*.*.blocks.*.attn,*.*.blocks.*.mlp"
RWKV = "*.*.att,*.*.ffn,mid_block.att,mid_block.ffn"
WAVELETS = "all_modules.13"  # the attention of the upper half, whose output is the whole trunk
SYSTEMS = (
    System("Learning-to-Cache", "2406.01733", "horseee/learning-to-cache", "d6cc781784", learning_to_cache, DIT_SITES),
    System("TinyFusion", "2412.01199", "VainF/TinyFusion", "a147de7c33", tinyfusion, DIT_SITES),
    System("attention mediators", "2408.05710", "LeapLabTHU/Attention-Mediators", "5f76c2b6c2", mediators, DIT_SITES),
    System("DyDiT", "2410.03456", "alibaba-damo-academy/DyDiT", "0ddc5097d2", dydit, DIT_SITES),
    System("DiT-SR", "2409.19589", "MateoBodon/DiT-SR", "b5c3f4eb74", dit_sr, SWIN),
    System("Diffusion-RWKV", "2404.04478", "feizc/Diffusion-RWKV", "d1b43f2188", diffusion_rwkv, RWKV),
    System("WaveDiff", "2211.16152", "VinAIResearch/WaveDiff", "f1ad48bbc7", wavediff, WAVELETS),
    System("FastViT, branches", "2303.14189", "apple/ml-fastvit", "8af5928238", fastvit, *FASTVIT),
    System("FastViT, merged", "2303.14189", "apple/ml-fastvit", "8af5928238", fastvit_merged, *FASTVIT),
)


def measured(system: System, folder: Path) -> Row:
    """Export, verify and run a system as a user does, and compare its latents with hooks in eager PyTorch."""
    source, target = f"benchmarks.originals:{system.make.__name__}", folder / system.make.__name__
    exclude = ["--exclude", system.exclude] if system.exclude else []
    said = _command("export", source, "--cache", system.cache, *exclude, "--out", folder, "--name", target.name)
    short = ("--backend", "onnxruntime", "--steps", STEPS)
    _command("verify", target, "--trust-source", "--cache-intervals", INTERVAL, *short)
    bundle = Bundle.open(target, trust_source=True)
    manifest = bundle.manifest
    given = Conditioning(len(SEEDS), example_conditioning(manifest, len(SEEDS)).conditional, None)
    file, latents_out = folder / "given.safetensors", folder / "latents.npy"
    save_file({name: one.contiguous() for name, one in given.conditional.items()}, file)
    images = ["--conditioning", file] if given.conditional else ["--num-images", len(SEEDS)]
    _command("run", target, *short, *images, "--cache-interval", INTERVAL, "--latents-out", latents_out)
    errors, refused = {}, list[str]()
    for backend in ("onnxruntime", "torch"):
        pipeline = Pipeline(bundle, steps=STEPS, cache_interval=INTERVAL, backend=backend, device="cpu")
        sampling = pipeline.sampling()
        try:
            latents = pipeline.sampler(sampling)(given, SEEDS).latents
        except BackendError as error:
            refused.append(str(error).rpartition("its node ")[2])
            continue
        want = hooked(bundle, sampling, given)
        errors[backend] = float((latents - want).abs().max() / want.abs().max())
    lines = [one for one in said.splitlines() if one.startswith(("Warning", "ignoring")) or "branches" in one]
    weights = model_from_source(manifest.model.options).module.parameters()
    parameters = sum(one.numel() for one in weights)
    return Row(
        system.name,
        system.paper,
        system.repository,
        system.commit,
        f"{parameters / 1e6:.1f} M, {' x '.join(map(str, manifest.latents.shape))}",
        len(manifest.cache_sites),
        manifest.optimization,
        inspect_bundle(bundle)["arithmetic_kept"],
        errors,
        [*lines, *refused],
    )


@torch.no_grad()
def hooked(bundle: Bundle, sampling: Any, given: Conditioning) -> Tensor:
    """The latents after a trajectory of the original network, whose cache sites return their last full output."""
    manifest = bundle.manifest
    model = model_from_source(manifest.model.options)
    kept: dict[str, Any] = {}
    full = True

    def hook(path: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if full:
                kept[path] = original(*args, **kwargs)
            return kept[path]

        return forward

    for site in manifest.cache_sites:
        module = model.module.get_submodule(site.module)
        module.forward = hook(site.module, module.forward)
    scheduler_step, noise = sampling.scheduler_step, StepNoise(manifest, SEEDS)
    scheduler_step.begin(manifest.latents.shape, SEEDS, torch.device("cpu"))
    for full in sampling.schedule.full:  # noqa: B007 # `forward` reads it
        latents = scheduler_step.model_input()
        time = scheduler_step.timestep().expand(len(SEEDS))
        values = {"latents": latents, "timestep": time, **given.conditional, **noise.next()}
        inputs = {one.name: values[one.name] for one in model.spec.inputs}
        prediction = model.spec.call(model.module, inputs)
        channels = manifest.latents.channels
        scheduler_step.advance(prediction if scheduler_step.takes_variance else prediction[:, :channels])
    result: Tensor = scheduler_step.latents.clone()
    return result


def _command(*words: object) -> str:
    """Run a command of fora-trt; return what it said on standard error."""
    done = CliRunner().invoke(fora_trt, [str(word) for word in words])
    if done.exit_code:
        raise SystemExit(f"fora-trt {words[0]} failed: {done.stderr}")
    return done.stderr


def table_of(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The lines of the table."""
    yield "| system | code | parameters, latents | sites | level | FLOPs of a reuse step | largest error |"
    yield "| --- | --- | --- | --: | --- | --: | --: |"
    for row in rows:
        paper = f"[{row['name']}](https://arxiv.org/abs/{row['paper']})"
        code = f"[{row['repository']}](https://github.com/{row['repository']}) `{row['commit'][:7]}`"
        figures = f"{row['sites']} | `{row['level']}` | {row['share']:.1%} | {max(row['errors'].values()):.1e}"
        yield f"| {paper} | {code} | {row['size']} | {figures} |"


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
@click.argument("hardware", required=False)
@click.option("--only", help="Measure one factory, and print its row as JSON.")
def main(folder: Path, hardware: str | None, only: str | None) -> None:
    """Measure all systems with the clones in FOLDER; HARDWARE names the machine in the file name."""
    os.environ[FOLDER] = str(folder.resolve())
    if only is not None:
        system = next(one for one in SYSTEMS if one.make.__name__ == only)
        with tempfile.TemporaryDirectory() as work:
            click.echo(json.dumps(asdict(measured(system, Path(work)))))
        return
    rows = []
    for system in SYSTEMS:
        words = [sys.executable, "-m", "benchmarks.originals", str(folder), "--only", system.make.__name__]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise click.ClickException(f"{system.name}: {done.stderr.strip().splitlines()[-1]}")
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        click.echo(f"{system.name}: {rows[-1]['errors']}", err=True)
    write_content(f"originals_{hardware or 'cpu'}", {"steps": STEPS, "interval": INTERVAL, "rows": rows})
    click.echo("\n".join(table_of(rows)))


if __name__ == "__main__":
    main()
