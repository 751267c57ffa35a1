"""README and docs say what the committed results say, name only what exists, and their Python runs word for word."""

import ast
import importlib.util
import json
import pkgutil
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import yaml
from PIL import Image

import fora_trt
from benchmarks import diffusers_tests, originals, per_layer, pipeline_steps, pipelines, serving
from benchmarks.equal_evaluations import newest_ways, table_of
from benchmarks.readme_picture import LABELS, PICTURE, measured_rows, pictures_of, rows_of
from benchmarks.readme_tables import OF_THE_CPU, measurement_lines, newest_content, newest_result, readme_lines
from fora_trt import exporting
from fora_trt.bundle import Bundle
from fora_trt.cli import main
from fora_trt.engines.backends import BACKENDS
from fora_trt.metrics import METRICS
from fora_trt.models.architectures import ARCHITECTURES
from fora_trt.models.recipes import read_recipe
from fora_trt.registry import Registry
from fora_trt.report.results import (
    EAGER,
    NO_CACHE,
    About,
    Bench,
    BenchRow,
    Quality,
    QualityRow,
    Report,
    Setting,
)
from fora_trt.schedule import KINDS, Schedule
from tests.conftest import BundleAt
from tests.test_stages import STAGES
from tools.docs_site import OUTSIDE, in_repository, in_site, links_for_site

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))))
LINKED = (*PAGES, "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "export/README.md", "engines/README.md")
TEXT = {page: (ROOT / page).read_text() for page in LINKED}
README, MEASUREMENTS = TEXT["README.md"], TEXT["docs/measurements.md"]
REGISTRIES: tuple[Registry[Any], ...] = (ARCHITECTURES, BACKENDS, KINDS, METRICS)

NOT_RUN = "# not run by the tests: "


def blocks_of(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def words_of(text: str) -> str:
    return " ".join(text.split())


def row_of(report: Report, backend: str, label: str) -> BenchRow:
    assert report.bench is not None
    return next(row for row in report.bench.rows if (row.backend, row.setting.label) == (backend, label))


def reuse_share(report: Report, backend: str) -> str:
    row = row_of(report, backend, "fora:3")
    assert row.reuse_step_seconds is not None
    return f"{row.reuse_step_seconds / row.full_step_seconds:.1%}"


# --- what was measured


@pytest.mark.parametrize("model", OF_THE_CPU)
def test_every_row_of_a_result_stands_in_the_measurements(model: str) -> None:
    report, _ = newest_result(model)
    for measured in report.measured_on.values():
        assert re.fullmatch(r"[0-9a-f]{40}", measured["commit"]), "measured on changes that no commit holds"
    lines = measurement_lines(report)
    assert len(lines) > 12
    for line in lines:
        assert line in MEASUREMENTS.splitlines() or not line, line


def rows_in(text: str) -> list[str]:
    """Rows of tables with a ratio in them, which are those of measurements."""
    return [line for line in text.splitlines() if re.match(r"\|.*\| \d+\.\d\dx \|", line)]


def test_tables_hold_rows_of_the_results_alone() -> None:
    reports = [newest_result(model)[0] for model in OF_THE_CPU]
    short = {line for report in reports for line in readme_lines(report)}
    whole = {line for report in reports for line in measurement_lines(report)}
    assert len(rows_in(README)) >= 16
    assert set(rows_in(README)) <= short
    assert set(rows_in(MEASUREMENTS)) <= whole
    for page in set(PAGES) - {"README.md", "docs/measurements.md"}:
        assert not rows_in(TEXT[page])


def test_figures_in_the_text_are_measured_ones() -> None:
    (digits, own), (small, _), (base, _) = (newest_result(model) for model in OF_THE_CPU)
    words, readme = words_of(MEASUREMENTS), words_of(README)
    shares = [reuse_share(report, "onnxruntime") for report in (small, base, digits)]
    hooks = [reuse_share(report, EAGER) for report in (small, base, digits)]
    told = "A reuse step takes {} of a full step of DiT-S/2, {} of DiT-B/2 and {} of the digits model"
    assert told.format(*shares) in words
    assert "With hooks in eager PyTorch it takes {}, {} and {}.".format(*hooks) in words
    assert f"A reuse step of DiT-S/2 takes {shares[0]} of the time of a full step on ONNX Runtime, " in readme
    assert f"and {hooks[0]} in eager PyTorch with hooks." in readme
    explained = words_of(TEXT["docs/how-it-works.md"])
    assert f"{hooks[0]} of a full step on DiT-S/2" in explained
    assert f"{shares[0]} of a full step on DiT-S/2" in explained
    read = [f"{own['accuracy'][name]:.1%}" for name in ("real", "none", "fora:3", "fora:5")]
    told = (
        "reads {} of held-out real digits right reads {} of the images as the requested digit without caching, "
        "{} with `fora:3` and {} with `fora:5`"
    )
    assert told.format(*read) in words
    plain, cached = row_of(small, EAGER, NO_CACHE), row_of(small, "onnxruntime", "fora:3")
    assert f"on ONNX Runtime is {plain.seconds / cached.seconds:.1f} times as fast as plain PyTorch" in words
    assert f"| {cached.speedup:.2f}x faster (DiT-S/2, CPU) |" in README
    runs = [report.bench.repeats for report in (digits, small, base) if report.bench is not None]
    assert "{} for the digits, {} for DiT-S/2, {} for DiT-B/2".format(*runs) in words
    rows = [row for report in (digits, small, base) for row in (report.bench.rows if report.bench else ())]
    off = max(abs(1 - row.of_ideal) for row in rows if row.setting.control_of is not None)
    assert f"up to {off:.0%} from their ideal" in words
    for name in ("onnxruntime", "torch"):
        version = small.measured_on["bench"][name].partition("+")[0]
        assert version in words


def test_the_comparison_with_fewer_steps_is_a_measured_one() -> None:
    quality = newest_result("digits")[0].quality
    assert quality is not None
    rows = {row.setting.label: row for row in quality.rows if row.setting.control_of is None}
    control = next(row for row in quality.rows if row.setting.control_of == "fora:3")
    plain = quality.rows[0].seconds_per_image
    psnr = {name: f"{row.psnr:.1f} dB" for name, row in rows.items() if row.psnr is not None}
    told = (
        "FORA with 18 of 50 full steps reaches {}, and {} steps of the best solver without caching reach {:.1f} dB. "
        "The calibrated schedule reaches {} at {:.1f} times the speed"
    )
    speed = plain / rows["calibrated-18.json"].seconds_per_image
    assert told.format(
        psnr["fora:3"], control.setting.steps, control.psnr, psnr["calibrated-18.json"], speed
    ) in words_of(README)


def test_the_table_of_pipelines_is_the_measured_one() -> None:
    _, _, rest = TEXT["docs/pipelines.md"].partition("<!-- table of benchmarks/pipelines.py -->\n")
    result = newest_content("pipelines")
    assert rest.partition("\n<!-- end")[0].splitlines() == [*pipelines.table_of(result["outcomes"])]
    through = [one for one in result["outcomes"] if one["refused"] is None]
    assert max(max(*one["errors"].values(), one["verified"]) for one in through) < 1e-5


def test_the_table_of_the_code_of_other_systems_is_the_measured_one() -> None:
    _, _, rest = TEXT["docs/originals.md"].partition("<!-- table of benchmarks/originals.py -->\n")
    result = newest_content("originals")
    assert rest.partition("\n<!-- end")[0].splitlines() == [*originals.table_of(result["rows"])]
    assert re.fullmatch(r"[0-9a-f]{40}", result["environment"]["commit"]), "measured on a clean checkout"
    assert max(error for row in result["rows"] for error in row["errors"].values()) < 1e-4
    assert all(f"| {row['name'].partition(',')[0]} |" in TEXT["docs/originals.md"] for row in result["rows"])


def test_the_table_of_the_tests_of_diffusers_is_the_measured_one() -> None:
    _, _, rest = TEXT["docs/pipelines.md"].partition("<!-- table of benchmarks/diffusers_tests.py -->\n")
    groups = newest_content("diffusers-tests")["groups"]
    assert rest.partition("\n<!-- end")[0].splitlines() == [*diffusers_tests.table_of(groups)]
    assert not [one for one in groups if one["kind"] == "broken"]
    assert all(one["reason"] for one in groups if one["kind"] == "not applicable")


def test_batches_of_the_server_have_the_measured_throughput_and_latency() -> None:
    _, _, rest = TEXT["docs/serving.md"].partition("<!-- table of benchmarks/serving.py -->\n")
    result = newest_content("serving")
    assert rest.partition("\n<!-- end")[0].splitlines() == [*serving.table_of(result)]
    assert re.fullmatch(r"[0-9a-f]{40}", result["environment"]["commit"]), "measured on a clean checkout"
    for way in result["ways"].values():
        runs = [one for kinds in way.values() for one in kinds.values()]
        assert len(runs) == 2 * len(serving.KINDS) and all(run["lost"] == run["differing"] == 0 for run in runs)
    ways = result["ways"]
    batches, alone = (ways[way]["at_once"]["equal"]["per_second"] for way in ("batches", "one at a time"))
    assert batches > 1.5 * alone
    for kind in serving.KINDS:
        slowest = {way: runs["random"][kind]["p95_seconds"] for way, runs in ways.items()}
        assert min(slowest, key=lambda way: slowest[way]) == "joining"


def test_reuse_steps_of_pipelines_take_the_measured_share_of_a_full_one() -> None:
    _, _, rest = TEXT["docs/pipelines.md"].partition("<!-- table of benchmarks/pipeline_steps.py -->\n")
    result = newest_content("pipeline-steps")
    assert rest.partition("\n<!-- end")[0].splitlines() == [*pipeline_steps.table_of(result["outcomes"])]
    assert re.fullmatch(r"[0-9a-f]{40}", result["environment"]["commit"]), "measured on changes that no commit holds"
    assert [one["name"] for one in result["outcomes"]] == ["sd3", "flux", "flux2", "wan", "ltx"]
    counts = {(one["full"]["count"], one["reuse"]["count"]) for one in result["outcomes"]}
    assert counts == {(25, 35)}
    for one in result["outcomes"]:
        assert one["level"] == "fold"
        assert one["full"]["median"] > 0.1
        assert one["reuse"]["median"] < 0.03 * one["full"]["median"], one["name"]


def test_per_layer_schedules_are_the_measured_ones() -> None:
    _, _, rest = MEASUREMENTS.partition("<!-- table of benchmarks/per_layer.py -->\n")
    result = per_layer.newest()
    assert rest.partition("\n<!-- end")[0].splitlines() == per_layer.table_of(result)
    assert re.fullmatch(r"[0-9a-f]{40}", result["environment"]["commit"]), "measured on changes that no commit holds"
    ways = {one["label"]: one for one in result["ways"]}
    (found,) = (one for label, one in ways.items() if label.startswith("per-layer ("))
    assert found["full_steps"] <= ways["fora:3"]["full_steps"]
    told = "Per-layer calibration reaches {:.1f} dB, and full and reuse steps {:.1f} dB with the same arithmetic."
    assert told.format(found["psnr"], ways["calibrated"]["psnr"]) in words_of(MEASUREMENTS)


def test_equal_evaluations_are_the_measured_ones() -> None:
    """The best schedules come at least 5 dB closer to the solution than the best of the solvers."""
    shares = [reuse_share(newest_result(model)[0], "onnxruntime") for model in ("digits", "dit-s-2")]
    times = [round(18 + 182 * float(share.rstrip("%")) / 100) for share in shares]
    told = (
        "takes {} of a full step, so 18 full steps of 200 take the time of {} evaluations; with the {} of DiT-S/2 they"
    )
    assert told.format(shares[0], times[0], shares[1]) in words_of(README)
    assert f"would take that of {times[1]}." in words_of(README)
    ways = newest_ways()
    for line in table_of(ways):
        assert line in README.splitlines()
    for number, found in ways.items():
        solvers = [one.psnr for one in found if one.kind == "solver"]
        calibrated = max(one.psnr for one in found if one.kind == "calibrated")
        assert len(solvers) >= 8
        assert calibrated >= max(solvers) + 5, number


def test_ideal_speedups_in_the_text_follow_from_the_schedule() -> None:
    schedule = Schedule.fora(50, 3)
    for page in ("README.md", "docs/how-it-works.md"):
        assert f"50/{schedule.full_steps} = {schedule.ideal_speedup():.2f}" in words_of(TEXT[page])


@pytest.mark.slow
def test_the_picture_shows_what_is_computed_and_measured(digits: Bundle) -> None:
    with Image.open(PICTURE) as picture:
        shown = json.loads(picture.info["rows"])
    assert PICTURE.stat().st_size < 200_000
    measured = measured_rows()
    rows = rows_of({name: pictures_of(digits.folder, row) for name, row in measured.items()}, measured)
    assert [row.name for row in rows] == [one["name"] for one in shown] == [*measured]
    for row, one in zip(rows, shown, strict=True):
        assert (row.full_steps, row.speedup) == (one["full_steps"], one["speedup"])
        assert (row.psnr, one["psnr"]) == (None, None) or row.psnr == pytest.approx(one["psnr"], abs=0.05)
    words = words_of(README)
    speeds, losses = (
        [f"{one[key]:.1f}" for one in shown[1:]] for key in ("speedup", "psnr")
    )  # fmt: skip
    assert "at {}, {} and {} times the speed, with PSNR values of {}, {} and {} dB".format(*speeds, *losses) in words
    assert len(LABELS) == 10


# --- what exists


def commands_of(text: str) -> Iterator[tuple[str, list[str]]]:
    for block in blocks_of(text, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            name, *rest = line.partition("#")[0].split() or [""]
            yield name, rest


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md"])
def test_every_command_and_option_of_a_page_exists(page: str) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for name, rest in commands_of(TEXT[page]):
        if name == "fora-trt":
            command = main.commands[rest[0]]
            options = {option for one in command.params for option in (*one.opts, *one.secondary_opts)}
            assert {word for word in rest if re.match(r"--?[a-z]", word)} <= options, rest
        elif name == "make":
            assert rest[0] in targets
        elif name == "pip":
            assert rest[0] == "install"
            assert {*re.sub(r".*\[|\].*", "", rest[1]).split(",")} <= extras.keys()
        elif name == "python":
            assert rest[0] == "-m"
            assert importlib.util.find_spec(rest[1]) is not None
        else:
            assert name in ("", "python3", "curl", "serve", "docker", "ray"), name


OF_OTHERS = {"--build-arg", "--shm-size", "--stop-timeout", "--now"}
"""Options of Docker and systemd."""


def test_every_command_is_named_and_every_option_of_the_text_exists() -> None:
    assert {f"fora-trt {name}" for name in main.commands} <= set(re.findall(r"fora-trt [a-z]+", README))
    parameters = [each for one in main.commands.values() for each in one.params]
    known = {option for each in parameters for option in (*each.opts, *each.secondary_opts)}
    others = {"--minutes", "--resume", "--list", "--device", "--help", "--out", *OF_OTHERS}  # of scripts
    for page in PAGES:
        for code in re.findall(r"`([^`\n]+)`", TEXT[page]):
            assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", code)) <= known | others, code


def test_commands_of_a_page_are_taken_with_their_values() -> None:
    """Every option of every command line has a value of its type: click itself parses all of them."""
    for page in PAGES:
        for name, rest in commands_of(TEXT[page]):
            if name == "fora-trt" and "/" not in rest[0]:
                line = " ".join(rest[1:])
                words = [word.strip("'\"") for word in re.findall(r"'[^']*'|\"[^\"]*\"|\S+", line)]
                command = main.commands[rest[0]]
                with click.Context(command, parent=click.Context(main)) as context:
                    command.parse_args(context, words)


def test_the_recipe_of_the_formats_is_one(tmp_path: Path) -> None:
    recipes = [block for block in blocks_of(TEXT["docs/formats.md"], "toml") if block.startswith("source")]
    assert len(recipes) == 3
    for recipe in recipes:
        (tmp_path / "recipe.toml").write_text(recipe)
        assert read_recipe(tmp_path / "recipe.toml").source


def test_the_schedule_file_of_the_formats_is_one(tmp_path: Path) -> None:
    path = tmp_path / "schedule.json"
    plain, with_masks = blocks_of(TEXT["docs/formats.md"], "json")
    path.write_text(plain)
    assert Schedule.from_file(path).full == (True, False, False, True, False)
    path.write_text(with_masks)
    read = Schedule.from_file(path)
    assert (read.full, read.partial_steps) == ((True, False, False, True), 1)
    assert [*read.masks.values()] == [("transformer_blocks.0.attn1", "transformer_blocks.1.attn1")]


def test_every_key_of_a_report_is_explained() -> None:
    section = TEXT["docs/formats.md"].partition("## report.json")[2].partition("\n## ")[0]
    explained = set(re.findall(r"`([a-z0-9_]+)`", section))
    for record in (Report, About, Bench, BenchRow, Quality, QualityRow, Setting):
        assert record.model_fields.keys() <= explained


def test_every_name_of_the_reference_exists_and_all_public_names_are_there() -> None:
    names = re.findall(r"^::: (\S+)$", TEXT["docs/reference.md"], re.MULTILINE)
    found = [pkgutil.resolve_name(name) for name in names]
    called = {*fora_trt.__all__} - {"__version__", "ForaError", "export"}
    public = {getattr(fora_trt, name) for name in called} | {exporting.export}  # a package of this name calls it
    assert public <= {one for one in found if callable(one)}
    assert "fora_trt.errors" in names


def test_the_maps_of_the_package_name_its_folders_and_modules() -> None:
    package = ROOT / "fora_trt"
    folders = {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
    modules = {path.name for path in package.glob("*.py")} - {"__init__.py", "__main__.py", "quiet.py"}
    for page in ("README.md", "docs/how-it-works.md"):
        (shown,) = re.findall(r"^```\nfora_trt/\n(.*?)^```$", TEXT[page], re.MULTILINE | re.DOTALL)
        named = set(re.findall(r"^  ((?:[a-z_]+(?:\.py|/)(?:, )?)+)", shown, re.MULTILINE))
        words = {word for one in named for word in one.split(", ")}
        assert folders <= words
        assert words <= folders | modules
        if page != "README.md":
            assert modules <= words


def test_the_order_of_stages_is_the_one_that_is_enforced() -> None:
    (stages,) = blocks_of(TEXT["CONTRIBUTING.md"], "text")
    assert [*stages.split(), "__main__"] == STAGES


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["title"], citation["version"]) == ("fora-trt", fora_trt.__version__)
    assert citation["license"] == "Apache-2.0"
    assert "2407.01425" in citation["references"][0]["url"]


# --- links


def anchors_of(text: str) -> set[str]:
    """As GitHub and mkdocs make them of headings."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def links_of(text: str) -> list[tuple[str, str]]:
    without_code = re.sub(r"^```.*?^```$|`[^`\n]+`", "", text, flags=re.MULTILINE | re.DOTALL)
    found = re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", without_code)
    return [(path, anchor) for path, anchor in found if not path.startswith(("http://", "https://"))]


@pytest.mark.parametrize("page", LINKED)
def test_links_and_anchors_resolve(page: str) -> None:
    for path, anchor in links_of(TEXT[page]):
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), path
        assert not anchor or anchor in anchors_of(target.read_text()), f"{path}#{anchor}"


def pages_in(navigation: list[dict[str, object]]) -> Iterator[str]:
    for entry in navigation:
        for target in entry.values():
            if isinstance(target, str):
                yield target
            else:
                assert isinstance(target, list)
                yield from pages_in(target)


def test_the_site_has_every_page_and_its_links_resolve() -> None:
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    pages = [*pages_in(site["nav"])]
    assert {in_repository(page) for page in pages} == {*OUTSIDE, *(page for page in PAGES if page != "README.md")}
    assert all((ROOT / in_repository(page)).is_file() for page in pages)
    assert all((ROOT / hook).is_file() for hook in site["hooks"])
    files = {*pages, "digits.png"}
    for page in pages:
        path = in_repository(page)
        assert in_site(path) == page
        for target, _ in links_of(links_for_site(TEXT[path], path)):
            found = (Path("/site") / page).parent / target if target else Path("/site") / page
            assert str(found.resolve().relative_to("/site")) in files, f"{page}: {target}"


def test_a_link_out_of_the_site_becomes_text() -> None:
    text = "[rows](../benchmarks/results), [plans](../engines/README.md#a-set-of-plans), ![digits](digits.png), [x](#y)"
    told = "rows, [plans](repository/engines/README.md#a-set-of-plans), ![digits](digits.png), [x](#y)"
    assert links_for_site(text, "docs/guide.md") == told
    assert links_for_site("![d](docs/digits.png)", "README.md") == "![d](../digits.png)"


# --- Python


@pytest.fixture
def working_directory(
    digits: Bundle, pipeline_folder: Path, bundle_at: BundleAt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """A folder with the bundles that the snippets name; a tiny DiT stands for the published one. Undoes plugins."""
    (tmp_path / "export").mkdir()
    (tmp_path / "facebook").mkdir()
    (tmp_path / "export" / "digits").symlink_to(digits.folder)
    (tmp_path / "export" / "DiT-XL-2-256").symlink_to(bundle_at("fold", "fp32").folder)
    (tmp_path / "facebook" / "DiT-XL-2-256").symlink_to(pipeline_folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    before = [{**registry} for registry in REGISTRIES]
    yield tmp_path
    for registry, names in zip(REGISTRIES, before, strict=True):
        for name in registry.keys() - names.keys():
            registry.unregister(name)
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_package"]:
        del sys.modules[name]


def imported_names(block: str) -> Iterator[tuple[str, str]]:
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom):
            yield from ((str(node.module), name.name) for name in node.names)


WITH_PYTHON = [page for page in PAGES if blocks_of(TEXT[page], "python")]


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_PYTHON)
def test_the_python_of_a_page_runs_word_for_word(page: str, working_directory: Path) -> None:
    names: dict[str, object] = {"__name__": "snippet"}
    for block in blocks_of(TEXT[page], "python"):
        if block.startswith(NOT_RUN):
            compile(block, page, "exec")
            for module, name in imported_names(block):
                assert hasattr(importlib.import_module(module), name), f"{module}.{name}"
            continue
        first = block.partition("\n")[0]
        if first.startswith("# ") and first.endswith(".py"):  # a file of the reader's
            path = working_directory / first.removeprefix("# ")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block)
        exec(compile(block, page, "exec"), names)  # noqa: S102 # of this repository
    if page == "README.md":
        assert "fora_trt.Pipeline" in blocks_of(TEXT[page], "python")[0]
        assert isinstance(names["images"], list)


@pytest.mark.slow
def test_the_readme_opens_python_with_one_line_that_makes_images(working_directory: Path) -> None:
    line = 'fora_trt.Pipeline("export/digits", cache_interval=3)(class_labels=[3, 7], steps=50, seed=0).images'
    assert README.partition("## In Python")[2].partition("```python")[2].partition("```")[0].strip().endswith(line)
    images = eval(line, {"fora_trt": fora_trt})  # noqa: S307 # of this repository
    assert [image.size for image in images] == [(8, 8), (8, 8)]
    assert np.asarray(images[0]).std() > 30, "digits, not noise on one level"


@pytest.mark.slow
def test_a_network_of_ones_own_is_exported_as_the_page_says(working_directory: Path, one_trace: None) -> None:
    (block,) = [one for one in blocks_of(TEXT["docs/python.md"], "python") if one.startswith("# my_package/model.py")]
    (working_directory / "my_package").mkdir()
    (working_directory / "my_package" / "model.py").write_text(block)
    (lines,) = [one for one in blocks_of(TEXT["docs/python.md"], "sh") if "my_package.model:make" in one]
    for line in lines.splitlines():
        words = [word.strip("'") for word in line.split()]
        main.main(words[1:], prog_name=words[0], standalone_mode=False)
    assert (working_directory / "latents.npy").is_file()
