import os
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from fora_trt.bundle import Bundle
from fora_trt.errors import BundleError, ExportError
from fora_trt.evaluate.export_check import GraphCheck
from fora_trt.export.write import bundle_from_model
from fora_trt.files import record_of, staging
from fora_trt.models.options import SourceOptions
from fora_trt.models.sources import model_from_source
from tests.damage import flip_a_byte, replace_by_link, rewrite

DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a missing file": (lambda f: (f / "reuse.onnx").unlink(), "reuse.onnx is missing"),
    "a missing manifest": (lambda f: (f / "manifest.json").unlink(), "is not a bundle: it contains no manifest.json"),
    "an altered manifest": (
        lambda f: (f / "manifest.json").write_text((f / "manifest.json").read_text().replace("1000", "1001")),
        "manifest.json was altered",
    ),
    "a truncated file": (lambda f: os.truncate(f / "full.onnx.data", 100), "has 100 bytes; the manifest records"),
    "an altered graph": (lambda f: flip_a_byte(f / "full.onnx"), "full.onnx was altered"),
    "altered weights": (lambda f: flip_a_byte(f / "full.onnx.data"), "full.onnx.data was altered"),
    "an altered scheduler": (lambda f: flip_a_byte(f / "scheduler_config.json"), "scheduler_config.json was altered"),
    "a link": (lambda f: replace_by_link(f / "full.onnx.data"), "full.onnx.data is a link"),
    "no JSON": (lambda f: (f / "manifest.json").write_text("{"), "is not the manifest of a bundle"),
    "another kind of JSON": (lambda f: (f / "manifest.json").write_text("[1]"), "is not the manifest of a bundle"),
    "a newer format": (
        lambda f: rewrite(f, lambda m: m.update(format_version=9)),
        "has format version 9; this fora-trt reads up to 8: pip install -U fora-trt",
    ),
    "an older format": (
        lambda f: rewrite(f, lambda m: m.update(format_version=1)),
        "has format version 1 of an older fora-trt; version 8 is needed; export the bundle again",
    ),
    "a path that leaves the folder": (
        lambda f: rewrite(f, lambda m: m["files"].update({"../full.onnx": m["files"].pop("full.onnx")})),
        "lists '../full.onnx', a path outside the folder",
    ),
    "an absolute path": (
        lambda f: rewrite(f, lambda m: m["files"].update({"/etc/hostname": m["files"].pop("full.onnx")})),
        "lists '/etc/hostname', a path outside the folder",
    ),
    "a graph that is not listed": (
        lambda f: rewrite(f, lambda m: m["files"].pop("full.onnx")),
        "does not list full.onnx",
    ),
    "a missing key": (lambda f: rewrite(f, lambda m: m.pop("graphs")), "is damaged at graphs"),
    "a value of a wrong type": (
        lambda f: rewrite(f, lambda m: m["latents"].update(shape="many")),
        "is damaged at latents.shape",
    ),
    "an unknown precision": (lambda f: rewrite(f, lambda m: m.update(precision="fp64")), "is damaged at precision"),
    "a lost graph": (lambda f: rewrite(f, lambda m: m["graphs"].pop("reuse")), "lists no reuse graph"),
    "another site": (
        lambda f: rewrite(f, lambda m: m["cache_sites"][0].update(module="pos_embed")),
        "do not match the outputs of its full graph",
    ),
    "another shape": (
        lambda f: rewrite(f, lambda m: m["graphs"]["full"]["inputs"][0].update(shape=["batch", 4, 9, 9])),
        "reads 'latents', which no other graph provides",
    ),
    "another dtype": (
        lambda f: rewrite(f, lambda m: m["graphs"]["reuse"]["outputs"][0].update(dtype="float64")),
        "reuse.onnx and the manifest disagree on noise_prediction",
    ),
    "an unknown key": (lambda f: rewrite(f, lambda m: m.update(plugin="x.so")), "is damaged at plugin"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_bundle_is_refused_by_name(bundle_copy: Path, damage: str) -> None:
    harm, message = DAMAGE[damage]
    harm(bundle_copy)
    with pytest.raises(BundleError) as raised:
        Bundle.open(bundle_copy)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_no_flipped_bit_of_a_manifest_goes_unnoticed(bundle_copy: Path) -> None:
    path = bundle_copy / "manifest.json"
    content = path.read_bytes()
    for position in range(0, len(content), 7):
        flip_a_byte(path, position)
        with pytest.raises(BundleError, match=r"manifest\.json (was altered|is not|has format)"):
            Bundle.open(bundle_copy)
        path.write_bytes(content)


def test_weights_from_a_file_that_is_not_listed_are_refused(bundle_copy: Path) -> None:
    model = onnx.load(bundle_copy / "full.onnx", load_external_data=False)
    tensor = next(one for one in model.graph.initializer if one.external_data)
    next(entry for entry in tensor.external_data if entry.key == "location").value = "../other.data"
    (bundle_copy / "full.onnx").write_bytes(model.SerializeToString())
    record = record_of(bundle_copy / "full.onnx").model_dump()
    rewrite(bundle_copy, lambda m: m["files"].update({"full.onnx": record}))
    with pytest.raises(BundleError, match=r"loads weights from '\.\./other\.data'"):
        Bundle.open(bundle_copy)


def test_a_bundle_records_where_it_came_from(exported: Bundle, pipeline_folder: Path) -> None:
    manifest = Bundle.open(exported.folder).manifest
    assert manifest == exported.manifest
    assert manifest.model.options.source == str(pipeline_folder)
    assert manifest.model.config["num_layers"] == 3
    assert manifest.versions.keys() == {"fora_trt", "torch", "onnx"}
    assert [site.kind for site in manifest.cache_sites] == ["attention", "feed-forward"] * 3
    assert manifest.measured_error is not None
    assert 0 < manifest.measured_error["full"].maximum < 1e-5
    assert 0 < manifest.measured_error["reuse"].relative < 1e-5
    assert manifest.latents.learned_sigma
    assert not manifest.latents.pixels
    assert sorted(manifest.files) == sorted(
        path.name for path in exported.folder.iterdir() if path.name != "manifest.json"
    )


def test_the_command_that_exports_a_bundle_again_has_its_options(exported: Bundle) -> None:
    options = SourceOptions(
        source="a b", image_size=(8, 16), null_class=False, call={"scale": 1.5, "negative": None}, component="other"
    )
    manifest = exported.manifest.model_copy(
        update={"precision": "fp16", "model": exported.manifest.model.model_copy(update={"options": options})}
    )
    given = "--no-null-class --call scale=1.5 --call negative=null --component other --force"
    start = "fora-trt export 'a b' --name tiny --precision fp16 --image-size"
    assert manifest.export_command() == f"{start} 8x16 {given}"
    assert manifest.export_command(image_size=(32, 32)) == f"{start} 32x32 {given}"


def test_two_exports_of_one_checkpoint_are_the_same_files(
    optimized: dict[str, Bundle], pipeline_folder: Path, tmp_path: Path
) -> None:
    again = bundle_from_model(model_from_source(str(pipeline_folder)), tmp_path / "tiny", check=GraphCheck())
    assert again.manifest.files == optimized["fold"].manifest.files


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.usefixtures("one_trace")
@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_failed_export_leaves_the_old_bundle_and_nothing_else(
    bundle_copy: Path, pipeline_folder: Path, failure: type[BaseException]
) -> None:
    before = {path.name: path.read_bytes() for path in bundle_copy.iterdir()}

    def fail(stage: str) -> None:
        if stage.startswith("measuring"):
            raise failure

    with pytest.raises(failure):
        bundle_from_model(
            model_from_source(str(pipeline_folder)), bundle_copy, force=True, report=fail, check=GraphCheck()
        )
    assert {path.name: path.read_bytes() for path in bundle_copy.iterdir()} == before
    assert names_in(bundle_copy.parent) == ["tiny"]


def test_replacing_needs_force_and_a_bundle(bundle_copy: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(ExportError, match="already exists; give --force"),
        staging(bundle_copy, False, "bundle", ExportError),
    ):
        pass
    with staging(bundle_copy, True, "bundle", ExportError) as folder:
        (folder / "manifest.json").write_text("new")
    assert names_in(bundle_copy) == ["manifest.json"]
    assert names_in(bundle_copy.parent) == ["tiny"]
    with (
        pytest.raises(ExportError, match=r"failed .*nothing was changed"),
        staging(tmp_path / "export" / "raced", False, "bundle", ExportError),
    ):
        (tmp_path / "export" / "raced").mkdir()
        (tmp_path / "export" / "raced" / "manifest.json").write_text("of another process")
    assert (tmp_path / "export" / "raced" / "manifest.json").read_text() == "of another process"
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.txt").write_text("years of work")
    with (
        pytest.raises(ExportError, match="is not a bundle, so --force does not"),
        staging(tmp_path / "papers", True, "bundle", ExportError),
    ):
        pass
    assert (tmp_path / "papers" / "thesis.txt").exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ExportError, match="cannot be written"),
        staging(tmp_path / "file" / "bundle", False, "bundle", ExportError),
    ):
        pass
