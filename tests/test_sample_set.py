import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fora_trt.bundle import Bundle
from fora_trt.errors import InputError
from fora_trt.evaluate.sample_set import Layout, SampleSet
from fora_trt.pipeline import Pipeline
from fora_trt.sampling.conditioning import balanced_labels, conditioning_of_classes, drawn_labels
from fora_trt.sampling.loop import BegunTrajectory, TimedStep
from tests.processes import kill_after, started
from tests.test_cli import fora

STEPS, IMAGES = 4, 7


def sample_set(bundle: Bundle, folder: Path, steps: int = STEPS, seed: int = 5, layout: Layout = "npz") -> SampleSet:
    pipeline = Pipeline(
        bundle, cache_interval=2, steps=steps, guidance_scale=1.5, batch_size=3, backend="torch", device="cpu"
    )
    given = conditioning_of_classes(bundle.manifest, balanced_labels(bundle.manifest, IMAGES))
    return SampleSet.of(folder, pipeline, pipeline.sampling(), given, IMAGES, seed, layout)


class StoppedError(Exception):
    """As if somebody pressed Ctrl-C."""


def stopping_after(batches: int) -> Any:
    def watch(items: Any) -> Iterator[Any]:
        for k, item in enumerate(items):
            if k == batches:
                raise StoppedError
            yield item

    return watch


def test_every_image_is_what_run_makes_of_its_seed_and_class(exported: Bundle, tmp_path: Path) -> None:
    made = sample_set(exported, tmp_path / "set").make()
    with np.load(made) as content:
        pictures, labels = content["arr_0"], content["arr_1"]
        assert sorted(content.files) == ["arr_0", "arr_1"]
    assert (pictures.shape, pictures.dtype, labels.tolist()) == ((IMAGES, 16, 16, 3), np.uint8, [*range(IMAGES)])
    # what numpy itself writes of the same arrays, byte for byte
    np.savez(tmp_path / "again.npz", arr_0=pictures, arr_1=labels)
    assert (tmp_path / "again.npz").read_bytes() == made.read_bytes()
    # and every image what `run` makes of its class and its seed, alone
    for k in (0, 4, 6):
        folder = tmp_path / f"image-{k}"
        fora(
            "run", exported.folder, "--class-labels", k, "--seed", 5 + k, "--steps", STEPS, "--cache-interval", 2,
            "--backend", "torch", "-o", folder,
        )  # fmt: skip
        alone = np.asarray(Image.open(folder / "0000.png").convert("RGB")).astype(int)
        assert np.abs(alone - pictures[k]).max() <= 1, "a batch of another size may round otherwise"
    assert len({picture.tobytes() for picture in pictures}) == IMAGES


@pytest.mark.parametrize("layout", ["npz", "png"])
def test_stopped_and_resumed_it_is_the_same_to_the_bit(
    exported: Bundle, tmp_path: Path, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, folder = sample_set(exported, tmp_path / "whole", layout=layout).make(), tmp_path / "parts"
    for resume, batches in ((False, 0), (True, 1)):  # before the first, and after the first
        with pytest.raises(StoppedError):
            sample_set(exported, folder, layout=layout).make(resume, stopping_after(batches))
    again = sample_set(exported, folder, layout=layout)
    launched, launch = [], BegunTrajectory.launch

    def counted(begun: BegunTrajectory, first: int, count: int) -> list[TimedStep]:
        launched.append(first)
        return launch(begun, first, count)

    monkeypatch.setattr(BegunTrajectory, "launch", counted)
    resumed = again.make(resume=True)
    assert len(launched) == STEPS * 2, "the batch that was there is not made again"
    assert contents(resumed) == contents(whole)
    assert len(contents(whole)) == (1 if layout == "npz" else IMAGES)
    assert not (folder / "parts").exists()
    assert again.make(resume=True) == resumed
    assert len(launched) == STEPS * 2, "it was complete"


def contents(made: Path) -> list[bytes]:
    """Of the archive, or of all PNGs in order."""
    return [file.read_bytes() for file in ([made] if made.is_file() else sorted(made.glob("*.png")))]


def test_a_folder_is_resumed_with_the_same_settings_only(exported: Bundle, tmp_path: Path) -> None:
    with pytest.raises(StoppedError):
        sample_set(exported, tmp_path / "set").make(watch=stopping_after(1))
    before = {path: path.read_bytes() for path in (tmp_path / "set").rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=r"set already contains parts; give --resume"):
        sample_set(exported, tmp_path / "set").make()
    changed = {
        "seed 5; 6 was given": sample_set(exported, tmp_path / "set", seed=6),
        "steps 4; 5 was given": sample_set(exported, tmp_path / "set", steps=5),
    }
    for named, other in changed.items():
        with pytest.raises(InputError, match=f"was made with {named}"):
            other.make(resume=True)
    assert {path: path.read_bytes() for path in (tmp_path / "set").rglob("*") if path.is_file()} == before

    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.tex").touch()
    for resume in (False, True):
        with pytest.raises(InputError, match=r"other (already contains thesis\.tex|has no settings\.json)"):
            sample_set(exported, tmp_path / "other").make(resume)


def test_labels_are_balanced_or_drawn(exported: Bundle) -> None:
    manifest = exported.manifest
    assert balanced_labels(manifest, 2001) == [*range(1000), *range(1000), 0]
    drawn = drawn_labels(manifest, 4000, seed=1)
    assert drawn == drawn_labels(manifest, 4000, seed=1) != drawn_labels(manifest, 4000, seed=2)
    assert 0 <= min(drawn) < 20 and 980 <= max(drawn) < 1000
    assert 900 < len({*drawn}) < 1000, "with repetition, as draws are"


def test_the_command_says_what_it_made(exported: Bundle, tmp_path: Path) -> None:
    small = ["--steps", 2, "--cache-interval", 1, "--num-images", 5, "--batch-size", 2]
    made = json.loads(
        fora("sample", exported.folder, *small, "--labels", "drawn", "--out", tmp_path / "a", "--json").stdout
    )
    assert (made["num_images"], made["layout"], made["scheduler"]) == (5, "npz", "DDIMScheduler")
    with np.load(made["output"]) as content:
        assert content["arr_1"].tolist() == drawn_labels(exported.manifest, 5, 0)
    shown = fora("sample", exported.folder, *small, "--format", "png", "--out", tmp_path / "b")
    assert shown.stdout.startswith(f"wrote {tmp_path / 'b'}: 5 images")
    assert sorted(path.name for path in (tmp_path / "b").glob("*.png")) == [f"{k:06d}.png" for k in range(5)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cache-interval", 9, "--steps", 4], "the cache interval 9 is larger than the number of steps 4"),
        (["--prompts", "none.txt"], "none.txt does not exist"),
        (["--prompts", "empty.txt"], "empty.txt contains no prompt; write one per line"),
        (["--prompts", "prompts.txt"], "takes no prompt; give --class-labels"),
        (["--scheduler", "dance"], "there is no scheduler 'dance'"),
        (["--num-images", 0], "0 is not in the range"),
        (["--out", "a-file"], "a-file"),
    ],
)
def test_each_mistake_has_its_sentence(
    exported: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[object], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("\n \n")
    Path("prompts.txt").write_text("a lighthouse\n")
    Path("a-file").touch()
    shown = fora("sample", exported.folder, "--num-images", 4, "--out", "set", *options)
    assert shown.exit_code != 0
    assert message in shown.output
    assert not Path("set").exists()
    assert Path("a-file").stat().st_size == 0


@pytest.mark.slow
def test_killed_nine_times_it_is_the_same_to_the_bit(digits: Bundle, tmp_path: Path) -> None:
    """120 digits by the command, undisturbed and with a kill -9 at nine random moments, each after one more batch."""
    command = ["sample", digits.folder, "--num-images", 120, "--steps", 15, "--batch-size", 10, "--resume", "--out"]
    for kills in range(9):
        kill_after(kills + 1, 0.3, tmp_path / "killed", *command)
    for folder in ("killed", "whole"):
        process = started(*command, tmp_path / folder)
        process.join()
        assert process.exitcode == 0
    assert contents(tmp_path / "killed/samples.npz") == contents(tmp_path / "whole/samples.npz")
