"""Loads the module that a bundle was exported from: the PyTorch reference of all comparisons."""

from __future__ import annotations

from fora_trt.bundle import Bundle
from fora_trt.errors import BackendError, ExportError, ModelError, SourceError
from fora_trt.export.write import weights_digest
from fora_trt.models.precision import dtypes_of_parameters
from fora_trt.models.sources import model_from_source
from fora_trt.models.spec import Model


def model_from_bundle(bundle: Bundle, precision: str | None = None) -> Model:
    """Load the module that a bundle was exported from, and check that its weights are the same.

    With another `precision`, the weights are compared after they are rounded to that of the bundle. Raises
    `SourceError` if the source cannot be loaded, `BackendError` if its weights differ.
    """
    record, sites = bundle.manifest.model, [site.module for site in bundle.manifest.cache_sites]
    source = record.options.source
    try:
        model = model_from_source(record.options, precision or bundle.manifest.precision, sites)
    except (ModelError, ExportError) as error:
        raise SourceError(
            f"the PyTorch reference needs the checkpoint that {bundle.folder} was exported from, "
            f"but {source!r} cannot be loaded: {error}"
        ) from error
    paths = [path for path, _ in model.sites]
    kept = model.spec.fp32_in_bf16 if bundle.manifest.precision == "bf16" else ()
    dtypes = dtypes_of_parameters(model.module, bundle.manifest.precision, paths, kept)
    if (
        model.precision in ("fp32", bundle.manifest.precision)
        and weights_digest(model.module, dtypes) != record.weights_sha256
    ):
        raise BackendError(
            f"the weights of {source!r} differ from those that {bundle.folder} was exported from; "
            f"export it again: fora-trt export {source} --name {bundle.manifest.name} --force"
        )
    return model
