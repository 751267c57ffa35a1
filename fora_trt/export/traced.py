"""Trace a split model to ONNX, with stable names, one symbolic batch dimension and no metadata of the machine.

The full step is traced. The reuse graph is cut out of the full graph, which is much faster than a second trace:
features become inputs, and nodes that are then unread are dropped. The graphs of every optimization level are derived
from these two graphs.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from warnings import warn

import onnx_ir as ir
import torch
from onnx_ir.passes import Sequential
from onnx_ir.passes.common import (
    ClearMetadataAndDocStringPass,
    CommonSubexpressionEliminationPass,
    DeduplicateInitializersPass,
    LiftConstantsToInitializersPass,
    RemoveUnusedNodesPass,
)
from onnxscript.optimizer import fold_constants_ir
from torch import Tensor

from fora_trt.bundle import tensor_spec
from fora_trt.contract import BATCH, FEATURE, FULL, LATENTS, REUSE, CacheSite, Optimization, TensorSpec
from fora_trt.errors import ExportError, ForaWarning, first_line
from fora_trt.export.check_batch import check_symbolic_batch, reason_in_words
from fora_trt.export.check_sites import check_sites
from fora_trt.export.complex_pairs import rewrite_complex
from fora_trt.export.crop_constants import CropConstantsPass
from fora_trt.export.drop_squeezes import DropSqueezesPass
from fora_trt.export.expand_masks import ExpandMasksPass
from fora_trt.export.graphs import Graphs, graph_from_onnx, partial_from_full
from fora_trt.export.hoist import drop_unread, replace_reads
from fora_trt.export.join_projections import JoinProjectionsPass
from fora_trt.export.logical_wheres import LogicalWheresPass
from fora_trt.export.near_neutral import near_neutral_hidden
from fora_trt.export.never_called import SWITCHES, calls_watched, never_called
from fora_trt.export.nodes import edge, with_role
from fora_trt.export.optimize import optimized
from fora_trt.export.patches import PatchRowsPass, PlainTransposesPass
from fora_trt.export.read_parts import ReadPartsPass
from fora_trt.export.scatter_slices import ScatterSlicesPass
from fora_trt.export.split import NEVER_CALLED, FullStep, Split, steps_of_module
from fora_trt.models.examples import example_inputs
from fora_trt.models.sites import OTHER
from fora_trt.models.sources import is_factory
from fora_trt.models.spec import Model
from fora_trt.quiet import quiet

TRACED_BATCH = 2  # not 0 or 1, which torch.export treats as constants
OPSETS = range(20, 25)  # Gelu is a single operator since opset 20, Attention since 23


@dataclass(frozen=True)
class TracedModel:
    """A model with its full and its reuse graph before optimization, and the cache sites that the reuse graph reads.

    The two graphs are never changed: `graphs` works on clones, which share the weights.
    """

    model: Model
    opset: int
    sites: tuple[CacheSite, ...]
    full: ir.Model
    reuse: ir.Model

    def graphs(self, level: Optimization, partial: Mapping[str, Collection[str]] | None = None) -> Graphs:
        """The graphs at the given optimization level, or at the highest lower level that the model supports.

        `partial` names further graphs, each with the module paths of the cache sites that it computes. May be called
        several times, with any level.
        """
        traced = {FULL: self.full.clone(), REUSE: self.reuse.clone()}
        read = {name: self._features_of_others(computed) for name, computed in (partial or {}).items()}
        models, reached = optimized(traced, self.model.spec.inputs, level, {*chain.from_iterable(read.values())})
        graphs = {name: graph_from_onnx(one) for name, one in models.items()}
        graphs |= {name: partial_from_full(graphs[FULL], name, features) for name, features in read.items()}
        return Graphs(graphs, reached)

    def _features_of_others(self, computed: Collection[str]) -> set[str]:
        """Names of the features of all cache sites but these."""
        return {one.name for site in self.sites if site.module not in computed for one in site.features}


def traced_from_model(model: Model, opset: int, report: Callable[[str], None]) -> TracedModel:
    """Trace the full step of a model to ONNX in an opset, cut the reuse graph out of it, clean up and check both.

    Unread inputs and features are dropped. The reuse graph has no prompt input if cross-attention is cached, and an
    output that no reuse step reads is not a feature. `report` is called with the name of each stage as it begins.
    Raises `ExportError`.
    """
    paths = [path for path, _ in model.sites]
    strange = model.spec.pipeline is not None or is_factory(model.options.source)
    if strange:
        check_symbolic_batch(model.module, model.spec)
    if strange or any(kind == OTHER for _, kind in model.sites):
        report("checking the cache sites")
        with model.in_fp32():  # many CPUs multiply matrices in half precision several times slower
            check_sites(model.module, model.spec, paths)
    step, _ = steps_of_module(model.module, model.spec, paths)
    step.cut_later = True
    report("tracing the full graph")
    full = _traced(step, model.output.name, opset)
    features = {str(value.name): tensor_spec(value, "feature") for value in full.graph.outputs[1:]}
    for spec in features.values():
        _check_shape(spec, f"the output of the cache site {spec.name.removeprefix(FEATURE)}")
    report("cutting the reuse graph out of the full graph")
    reuse = _cut(full)
    known = (*model.spec.inputs, *features.values(), replace(model.output, role="prediction"))
    roles = {spec.name: spec.role for spec in known}
    for graph in (full, reuse):
        _tidy(graph, step)
        for value in (*graph.graph.inputs, *graph.graph.outputs):
            with_role(value, roles[str(value.name)])
    read = {value.name for value in reuse.graph.inputs}
    _drop_outputs(full, features.keys() - read)
    sites = [
        CacheSite(path, kind, tuple(features[name] for name in step.outputs[path].features if name in read))
        for path, kind in model.sites
        if step.outputs[path] is not NEVER_CALLED
    ]
    return TracedModel(model, opset, _sites_that_are_read(sites, paths, report), full, reuse)


def _sites_that_are_read(
    sites: Sequence[CacheSite], selected: Sequence[str], report: Callable[[str], None]
) -> tuple[CacheSite, ...]:
    """Of the sites that were called, those that have features; the others of the selected ones are reported."""
    called = [site.module for site in sites]
    uncalled = [path for path in selected if path not in called]
    unread = [site.module for site in sites if not site.features]
    if not called:
        raise ExportError(
            f"the model never calls any of the cache sites, such as {uncalled[0]}; {SWITCHES}, or give --cache other "
            "sites"
        )
    if len(unread) == len(sites):
        raise ExportError(
            f"the model does not read the output of any cache site (such as {unread[0]}); give --cache other sites"
        )
    if uncalled:
        report(f"ignoring {len(uncalled)} cache sites that the model never called, such as {uncalled[0]}")
    if unread:
        report(f"ignoring {len(unread)} cache sites whose output no reuse step reads, such as {unread[0]}")
    return tuple(site for site in sites if site.features)


def _drop_outputs(model: ir.Model, names: Collection[str]) -> None:
    kept = [value for value in model.graph.outputs if value.name not in names]
    model.graph.outputs.clear()
    model.graph.outputs.extend(kept)
    RemoveUnusedNodesPass()(model)


def program_from_step(step: Split, inputs: Mapping[str, Tensor]) -> torch.export.ExportedProgram:
    """Export a step with `torch.export`, with a symbolic batch dimension and without complex numbers.

    Raises `ExportError` if that fails.
    """
    batch = torch.export.Dim(BATCH)
    with torch.no_grad(), quiet("torch.export"):
        try:
            program = torch.export.export(
                step.eval(),
                tuple(inputs.values()),
                dynamic_shapes=(tuple({0: batch} for _ in inputs),),  # nested: `forward` has one variadic argument
                strict=False,
            )
        except ExportError:
            raise
        except Exception as error:  # torch.export raises many exception classes
            reason = reason_in_words(error, step.module, step.spec)
            raise ExportError(f"{step.spec.architecture} {reason}") from error
        rewrite_complex(program, step.spec.architecture)
    return program


def check_opset(opset: int) -> None:
    """Raise `ExportError` for an opset that no graph can be written in."""
    if opset not in OPSETS:
        raise ExportError(f"the opset is {opset}; give --opset a value from {OPSETS[0]} to {OPSETS[-1]}")


def onnx_from_program(program: torch.export.ExportedProgram, step: Split, opset: int) -> torch.onnx.ONNXProgram:
    """Convert an exported step to ONNX without optimization; values have the names of the program's nodes.

    Raises `ExportError` for an operator or a dtype that ONNX does not have.
    """
    with torch.no_grad(), quiet("torch.onnx"):
        try:
            made = torch.onnx.export(program, dynamo=True, opset_version=opset, optimize=False, verbose=False)
        except Exception as error:  # the exporter raises many exception classes
            reason = first_line(error.__cause__ or error)
            raise ExportError(f"{step.spec.architecture} cannot be converted to ONNX: {reason}") from error
    assert made is not None
    return made


def _traced(step: FullStep, prediction: str, opset: int) -> ir.Model:
    """Trace with `torch.export`, which raises if the batch is specialized, and convert to ONNX without optimization."""
    check_opset(opset)
    inputs = example_inputs(step.spec.inputs, step.spec.conditioning, TRACED_BATCH)
    with calls_watched(step.module) as called:
        program = program_from_step(step, inputs)
    if never := never_called(step.module, called, program):
        warn(
            f"the model never called {len(never)} of its modules when it was traced, such as {never[0]}; their weights "
            f"are not in the bundle. {SWITCHES[0].upper()}{SWITCHES[1:]}",
            category=ForaWarning,
            stacklevel=2,
        )
    model = onnx_from_program(program, step, opset).model
    model.graph.name = FULL
    _rename(model.graph, list(inputs), [prediction, *step.features])
    return model


def _cut(model: ir.Model) -> ir.Model:
    """The reuse graph: the full graph, in which the features (all outputs except the first) become inputs."""
    rest = model.clone()
    rest.graph.name = REUSE
    features = [*rest.graph.outputs[1:]]
    del rest.graph.outputs[1:]
    replace_reads(rest, {value: edge(str(value.name), value, "feature") for value in features})
    return rest


def _tidy(model: ir.Model, step: FullStep) -> None:
    """Run the standard optimizer and the graph passes, drop unread inputs, and check all inputs and outputs.

    Passes that remove nodes run first, because the optimizer's time grows with the square of the number of nodes.
    """
    once_only = (DeduplicateInitializersPass(), CommonSubexpressionEliminationPass())
    with quiet("torch.onnx"):
        fold_constants_ir(model)
        lift = LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)
        Sequential(RemoveUnusedNodesPass(), lift, CropConstantsPass(), *once_only)(model)
        with near_neutral_hidden(model):
            torch.onnx.ONNXProgram(model, None).optimize()
    _name_attentions(model.graph)
    Sequential(
        DropSqueezesPass(),
        LogicalWheresPass(),
        ExpandMasksPass(),
        PatchRowsPass(),
        PlainTransposesPass(),
        ScatterSlicesPass(),
        ReadPartsPass(),
        JoinProjectionsPass(),
        RemoveUnusedNodesPass(),
        *once_only,
        ClearMetadataAndDocStringPass(),
    )(model)
    name = model.graph.name
    drop_unread(model)
    if LATENTS not in (value.name for value in model.graph.inputs):
        shown = ", ".join(step.sites[:3]) + (", ..." if len(step.sites) > 3 else "")
        raise ExportError(
            f"the {name} graph does not depend on the latents if {shown} are cached; give --cache fewer sites"
        )
    for value in (*model.graph.inputs, *model.graph.outputs):
        spec = tensor_spec(value)
        _check_shape(spec, f"{spec.name!r} of the {name} graph")


def _rename(graph: ir.Graph, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Rename graph inputs and outputs to their stable names, and the exporter's batch symbol to `batch` everywhere."""
    for values, names in ((graph.inputs, inputs), (graph.outputs, outputs)):
        if len(values) != len(names):
            raise ExportError(f"the traced graph has {len(values)} inputs or outputs; {len(names)} were expected")
        for value, name in zip(values, names, strict=True):
            value.name = name
    first = graph.inputs[0].shape
    symbol = first[0].value if first is not None and isinstance(first[0], ir.SymbolicDim) else None
    if symbol is None:
        return  # the batch was specialized; the later check of inputs and outputs raises
    pattern = re.compile(rf"\b{re.escape(symbol)}\b")
    for value in (*graph.inputs, *(output for node in graph for output in node.outputs)):
        if value.shape is not None:
            value.shape = ir.Shape(
                pattern.sub(BATCH, size.value) if isinstance(size, ir.SymbolicDim) and size.value else size
                for size in value.shape
            )


def _name_attentions(graph: ir.Graph) -> None:
    """Name each `Attention` node after its module, so that messages of a backend about the node are readable."""
    taken = {node.name for node in graph}
    for node in graph:
        scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes")
        if node.op_type == "Attention" and scopes is not None:
            path = ast.literal_eval(scopes)[-2].removeprefix("module.")  # the last scope is the node itself
            if path not in taken:  # a module can contain several attentions
                node.name = path
                taken.add(path)


def _check_shape(tensor: TensorSpec, what: str) -> None:
    """Check for a symbolic batch and fixed other sizes: the exporter can silently make the batch a constant."""
    fixed = all(isinstance(size, int) for size in tensor.shape[1:])
    if not tensor.shape or tensor.shape[0] != BATCH or not fixed:
        raise ExportError(
            f"{what} has shape {list(tensor.shape)}; expected a first dimension {BATCH!r} and fixed sizes after it; "
            "remove code from the model that specializes the batch size or makes shapes depend on the inputs"
        )
