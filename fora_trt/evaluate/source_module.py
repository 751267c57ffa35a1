"""The module that a bundle was exported from, loaded again: plain PyTorch, with which everything is compared."""

from __future__ import annotations

from fora_trt.bundle import Bundle
from fora_trt.errors import BackendError, ExportError, ModelError, SourceError
from fora_trt.export.write import weights_digest
from fora_trt.models.sources import model_from_source
from fora_trt.models.spec import Model


def model_from_bundle(bundle: Bundle, precision: str | None = None) -> Model:
    """Load the module that a bundle was exported from, and make sure that it is the same.

    In another `precision` than the bundle's the weights are others too, and are not compared. Raises `SourceError`
    if the source is no longer there, `BackendError` if it has other weights.
    """
    record, sites = bundle.manifest.model, [site.module for site in bundle.manifest.cache_sites]
    source = record.options.source
    try:
        model = model_from_source(record.options, precision or bundle.manifest.precision, sites)
    except (ModelError, ExportError) as error:
        raise SourceError(
            f"plain PyTorch needs the checkpoint that {bundle.folder} was exported from, "
            f"and {source!r} cannot be loaded: {error}"
        ) from error
    if model.precision == bundle.manifest.precision and weights_digest(model.module) != record.weights_sha256:
        raise BackendError(
            f"{source!r} has other weights than those {bundle.folder} was exported from; "
            f"export it again: fora-trt export {source} --name {bundle.manifest.name} --force"
        )
    return model
