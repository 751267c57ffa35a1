"""Loads the module that a bundle was exported from: the PyTorch reference of all comparisons."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fora_trt.bundle import Bundle
from fora_trt.contract import LATENTS
from fora_trt.errors import BackendError, ExportError, ModelError, SourceError, TrustError
from fora_trt.export.write import weights_digest
from fora_trt.models.assembly import half_and_kept
from fora_trt.models.examples import example_inputs
from fora_trt.models.precision import dtypes_of_parameters
from fora_trt.models.sources import is_factory, model_from_source
from fora_trt.models.spec import Model, ModelSpec
from fora_trt.untrusted import shown


def model_from_bundle(bundle: Bundle, precision: str | None = None) -> Model:
    """Load the module that a bundle was exported from, and check that its weights are the same.

    With another `precision`, the weights are compared after they are rounded to that of the bundle. Raises
    `SourceError` if the source cannot be loaded, `BackendError` if its weights differ, `TrustError` if the source is a
    factory and the bundle is opened without `trust_source`.
    """
    record, sites = bundle.manifest.model, [site.module for site in bundle.manifest.cache_sites]
    source, pipeline = record.options.source, bundle.manifest.pipeline
    if pipeline is not None and pipeline.where is None:
        raise SourceError(
            f"the PyTorch reference needs the pipeline that {bundle.folder} was exported from, which was in memory; "
            "save it with save_pretrained(), and export the folder"
        )
    if is_factory(source) and not bundle.trust_source:
        raise TrustError(
            f"{bundle.folder} names the factory '{shown(source)}' as its source, and loading it would run this code of "
            "the current folder or of an installed package, for weights with the SHA-256 "
            f"{shown(record.weights_sha256)}; if you know the code and the bundle, give --trust-source "
            "(trust_source=True in Python)"
        )
    try:
        model = model_from_source(record.options, precision or bundle.manifest.precision, sites)
    except (ModelError, ExportError) as error:
        raise SourceError(
            f"the PyTorch reference needs the checkpoint that {bundle.folder} was exported from, "
            f"but '{shown(source)}' cannot be loaded: {error}"
        ) from error
    own = bundle.manifest.precision
    halved = half_and_kept(model.module, model.spec, [path for path, _ in model.sites], own)
    dtypes = dtypes_of_parameters(model.module, own, *halved)
    if (
        model.precision in ("fp32", bundle.manifest.precision)
        and weights_digest(model.module, dtypes) != record.weights_sha256
    ):
        raise BackendError(
            f"the weights of '{shown(source)}' differ from those that {bundle.folder} was exported from; "
            f"export it again: {bundle.manifest.export_command()}"
        )
    return model


def with_unread_inputs(given: Mapping[str, Tensor], spec: ModelSpec) -> dict[str, Tensor]:
    """The inputs of a bundle, with example values for those of the module that no graph of the bundle reads."""
    latents, unread = given[LATENTS], [one for one in spec.inputs if one.name not in given]
    examples = example_inputs(unread, spec.conditioning, len(latents)) if unread else {}
    return {**given, **{name: value.to(latents.device) for name, value in examples.items()}}
