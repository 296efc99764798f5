"""ONNX graphs of a family: its parts are exported once, then stitched into the path graphs and the gated graph.

Both forms name the same weights, which lie once, outside of the graphs, in one file of ONNX external data.
"""

from __future__ import annotations

import hashlib
import io
import logging
import pickle
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper
from torch import Tensor, nn

from family.manifest import WEIGHTS_FILE, BundleError
from family.tree import Path
from training.cost import without_fused_kernels
from training.model import Family
from training.shapes import shapes_of

OPSET = 20
ALIGNMENT = 4096
"""Of every tensor in the weights file: a page, so that a runtime can map it."""


@dataclass(frozen=True, slots=True)
class Part:
    """One exported module: nodes that turn the value `input` into the value `output`; all names are the part's own."""

    nodes: tuple[NodeProto, ...]
    input: str
    output: str
    initializers: dict[str, NDArray[np.generic]]

    def connect(self, source: str, target: str) -> list[NodeProto]:
        """The nodes, reading the value `source` and writing the value `target`."""
        if self.output == self.input:  # a module that gives what it gets has no nodes
            return [helper.make_node("Identity", [source], [target])]
        names = {self.input: source, self.output: target}
        connected = []
        for node in self.nodes:
            copy = NodeProto()
            copy.CopyFrom(node)
            copy.input[:] = [names.get(name, name) for name in node.input]
            copy.output[:] = [names.get(name, name) for name in node.output]
            connected.append(copy)
        return connected


@dataclass(frozen=True, slots=True)
class Parts:
    """A family in pieces, with the shapes of its values without the batch axis; `x` is of the ONNX type `input_type`.
    `heads`: of each exit; the same for all where they share one.
    """

    embed: Part
    blocks: dict[int, Part]
    heads: dict[int, Part]
    input_type: int
    input_shape: tuple[int, ...]
    state_shape: tuple[int, ...]
    classes: int

    @property
    def initializers(self) -> dict[str, NDArray[np.generic]]:
        """All tensors of all parts by name."""
        parts = (self.embed, *self.blocks.values(), *self.heads.values())
        return {name: tensor for part in parts for name, tensor in part.initializers.items()}


@dataclass(frozen=True, slots=True)
class Placement:
    """Where each external tensor lies in the weights file, in bytes."""

    offsets: dict[str, int]
    size: int


def place(initializers: dict[str, NDArray[np.generic]]) -> Placement:
    """Lay all weights out in one file, each at an aligned offset, equal ones once (a constant that all blocks have, such
    as a causal mask). Shapes and scalars stay inside the graphs, where runtimes fold them."""
    offsets: dict[str, int] = {}
    placed: dict[bytes, int] = {}
    end = 0
    for name, tensor in initializers.items():
        if tensor.ndim > 0 and np.issubdtype(tensor.dtype, np.floating):
            content = hashlib.sha256(tensor.tobytes()).digest()
            if content not in placed:
                placed[content] = -(-end // ALIGNMENT) * ALIGNMENT
                end = placed[content] + tensor.nbytes
            offsets[name] = placed[content]
    return Placement(offsets, end)


def export_parts(family: Family, example: Tensor) -> Parts:
    """The embedding, each block and each head by torch's exporter, with a free batch axis.

    `example` is an input of at least two rows.

    Raises:
        ShapeError: the parts do not fit each other.
        BundleError: the exporter cannot translate a part; the message names it.
    """
    family = family.eval()
    shapes = shapes_of(family, example)
    with torch.no_grad():
        state = family.embed(example)
    modules: dict[str, tuple[nn.Module, Tensor]] = {"embed": (family.embed, example)}
    modules |= {f"block{node}": (family.blocks.module(node), state) for node in family.tree.nodes}
    names = {node: "head" if family.shares_head else f"head{node}" for node in family.tree.exits}
    modules |= {name: (family.head_at(node), state) for node, name in names.items()}
    parts = _export(modules)
    embed, heads = parts["embed"], {node: parts[name] for node, name in names.items()}
    blocks = {node: parts[f"block{node}"] for node in family.tree.nodes}
    input_type = TensorProto.FLOAT if example.is_floating_point() else TensorProto.INT64
    return Parts(embed, blocks, heads, input_type, shapes.input, shapes.state, shapes.classes)


def path_graph(parts: Parts, path: Path, placement: Placement) -> ModelProto:
    """`x (batch, *input_shape)` -> `logits (batch, classes)` through the blocks of `path`."""
    chain = [parts.embed, *(parts.blocks[node] for node in path), parts.heads[path[-1]]]
    values = ["x", *(f"state{index}" for index in range(len(path) + 1)), "logits"]
    nodes = [node for part, a, b in zip(chain, values, values[1:], strict=False) for node in part.connect(a, b)]
    inputs = [_value("x", ("batch", *parts.input_shape), parts.input_type)]
    outputs = [_value("logits", ("batch", parts.classes))]
    used = {name for node in nodes for name in node.input}
    tensors = {name: tensor for name, tensor in parts.initializers.items() if name in used}
    return _model(helper.make_graph(nodes, "path", inputs, outputs, _tensors(tensors, placement)))


def gated_graph(parts: Parts, placement: Placement) -> ModelProto:
    """Every path in one graph.

    Inputs: `x (rows, *input_shape)`; `state (rows, *state_shape)`; `visit (N-1,) bool`, whose element `n-1` runs
    node n; scalars `embed` (start from `x`, else from `state`) and `predict` (else `logits` has no rows; the head
    is that of the last exit in `visit`, of N/2 if there is none). What is not read may have no rows. Outputs:
    `logits`, and `state` after the last visited node, from which a later run can go on. Each block is the
    then-branch of an `If`; weights are read from the outer graph, so there is one copy.
    """
    nodes = [
        helper.make_node("If", ["embed"], ["state0"], "gate_embed",
                         then_branch=_branch(parts.embed.connect("x", "embedded"), "embedded"),
                         else_branch=_pass_through("state")),
    ]  # fmt: skip
    constants: dict[str, NDArray[np.generic]] = {"no_logits": np.zeros((0, parts.classes), np.float32)}
    for node, block in parts.blocks.items():
        before, after = f"state{node - 1}", f"state{node}" if node < len(parts.blocks) else "state_out"
        constants[f"index{node}"] = np.array(node - 1, np.int64)
        ran = f"ran{node}"
        nodes += [
            helper.make_node("Gather", ["visit", f"index{node}"], [f"visit{node}"], axis=0),
            helper.make_node("If", [f"visit{node}"], [after], f"gate_block{node}",
                             then_branch=_branch(block.connect(before, ran), ran), else_branch=_pass_through(before)),
        ]  # fmt: skip
    nodes.append(
        helper.make_node("If", ["predict"], ["logits"], "gate_head",
                         then_branch=_last_head(parts.heads),
                         else_branch=_pass_through("no_logits")),
    )  # fmt: skip
    inputs = [
        _value("x", ("x_rows", *parts.input_shape), parts.input_type),
        _value("state", ("state_rows", *parts.state_shape)),
        _value("visit", (len(parts.blocks),), TensorProto.BOOL),
        _value("embed", (), TensorProto.BOOL),
        _value("predict", (), TensorProto.BOOL),
    ]
    outputs = [_value("logits", ("logits_rows", parts.classes)), _value("state_out", ("rows", *parts.state_shape))]
    tensors = _tensors({**parts.initializers, **constants}, placement)
    return _model(helper.make_graph(nodes, "family", inputs, outputs, tensors))


def _last_head(heads: dict[int, Part]) -> GraphProto:
    """The head of the last exit that is visited, or of the first if none is: nested branches, unless all share one."""
    (_, first), *others = heads.items()
    branch = _branch(first.connect("state_out", "predicted"), "predicted")
    for node, head in others:
        if head is not first:
            own, chosen = f"predicted{node}", f"chosen{node}"
            own_branch = _branch(head.connect("state_out", own), own)
            choice = helper.make_node("If", [f"visit{node}"], [chosen], then_branch=own_branch, else_branch=branch)
            branch = _branch([choice], chosen)
    return branch


class _SideBySide(nn.Module):
    """Modules that do not know of each other, each with an input of its own."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(modules)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(module(x) for module, x in zip(self.parts, inputs, strict=True))


def _export(modules: dict[str, tuple[nn.Module, Tensor]]) -> dict[str, Part]:
    """Each of these modules, named and with an example of its input. Of those that differ in their weights alone, as blocks
    mostly do, one is translated: that takes a second or two, and rises with their number. They are translated side by side:
    most of what the exporter takes, it takes once."""
    alike: dict[object, list[str]] = {}
    for name, (module, example) in modules.items():
        alike.setdefault((fingerprint(module) or name, example.shape), []).append(name)
    graph = _translate_all({names[0]: modules[names[0]] for names in alike.values()})
    parts: dict[str, Part] = {}
    for place, (first, *others) in enumerate(alike.values()):
        parts[first] = _cut(graph, place, first)
        if others and _shows_weights(parts[first], f"{first}/parts.{place}.", modules[first][0]):
            for name in others:
                weights = {f"{name}/parts.{place}.{own}": each.detach().numpy() for own, each in _own(modules[name][0])}
                part = _cut(graph, place, name)
                parts[name] = replace(part, initializers=part.initializers | weights)
    if left := {name: module for name, module in modules.items() if name not in parts}:
        graph = _translate_all(left)
        parts |= {name: _cut(graph, place, name) for place, name in enumerate(left)}
    return parts


def fingerprint(module: nn.Module) -> bytes | None:
    """Equal for modules that differ in the values of their parameters and buffers alone; none if that cannot be told, as
    they hold what Python cannot pickle."""
    file = io.BytesIO()
    try:
        _Anonymous(file, module).dump(module)
    except Exception:  # noqa: BLE001 (whatever a module's own pickling raises)
        return None
    return file.getvalue()


class _Anonymous(pickle.Pickler):
    """Pickles a module without the values of its tensors: nothing is ever unpickled. `others`: tensors that are no
    parameters or buffers of it; each is equal to itself alone."""

    def __init__(self, file: io.BytesIO, module: nn.Module) -> None:
        super().__init__(file)
        self.others: list[Tensor] = []
        self._names = {id(tensor): name for name, tensor in _own(module)}

    def persistent_id(self, obj: object) -> object:
        """See pickle."""
        if not isinstance(obj, Tensor):
            return None
        if id(obj) not in self._names:
            self.others.append(obj)
        return self._names.get(id(obj), id(obj)), tuple(obj.shape), str(obj.dtype)


def _shows_weights(part: Part, prefix: str, module: nn.Module) -> bool:
    """Whether all of the module's own tensors are in what was translated from it, under their names, and no constant that
    the exporter may have computed from some: then others can be put in their place."""
    own = {prefix + name for name, _ in _own(module)}
    pickler = _Anonymous(io.BytesIO(), module)
    pickler.dump(module)
    constants = [tensor for name, tensor in part.initializers.items() if name not in own]
    known = [tensor.detach().numpy() for tensor in pickler.others]
    return own <= part.initializers.keys() and all(
        tensor.size == 1 or np.issubdtype(tensor.dtype, np.integer) or any(np.array_equal(tensor, each) for each in known)
        for tensor in constants
    )


def _own(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Its parameters and buffers by all of their names."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _translate_all(modules: dict[str, tuple[nn.Module, Tensor]]) -> GraphProto:
    try:
        graph = _translate(modules)
    except Exception as together:  # whatever torch or a module's own code raises while it is traced
        for name, module in modules.items():  # which of them was it?
            try:
                _translate({name: module})
            except Exception as exc:
                raise BundleError(f"{name}: torch cannot export this module to ONNX with a free batch axis: {exc}") from exc
        raise BundleError(f"torch cannot export the parts of this family together: {together}") from together
    for node in graph.node:  # source locations of this machine, ten times the size of what they describe
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    return graph


def _translate(modules: dict[str, tuple[nn.Module, Tensor]]) -> GraphProto:
    side_by_side = _SideBySide(module for module, _ in modules.values())
    # An axis each, of a size of its own: of one that all share, or that looks so, the exporter asks a single input.
    examples = tuple(_of_rows(place + 2, example) for place, (_, example) in enumerate(modules.values()))
    axes = tuple({0: torch.export.Dim(f"batch{place}")} for place in range(len(examples)))
    with _quiet_exporter(), without_fused_kernels():
        program = torch.onnx.export(
            side_by_side.eval(),
            examples,
            dynamo=True,
            dynamic_shapes=(axes,),
            opset_version=OPSET,
            input_names=[f"in{place}" for place in range(len(examples))],
            output_names=[f"out{place}" for place in range(len(examples))],
            verbose=False,
        )
    assert program is not None
    if program.model_proto.functions:
        raise BundleError("the exporter left functions in the graph, which cannot be stitched")
    return program.model_proto.graph


def _of_rows(rows: int, example: Tensor) -> Tensor:
    return example[torch.arange(rows) % len(example)]


def _cut(graph: GraphProto, place: int, name: str) -> Part:
    """What leads to the output at this place."""
    own, output = graph.input[place], graph.output[place]
    needed, nodes = {output.name}, []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            nodes.append(node)
            needed.update(_reads(node))
    if others := needed.intersection(each.name for each in graph.input) - {own.name}:
        raise BundleError(f"{name}: the exporter made it depend on what is not its own, {', '.join(sorted(others))}")
    weights = [tensor for tensor in graph.initializer if tensor.name in needed]
    cut = onnx.compose.add_prefix_graph(helper.make_graph(nodes[::-1], name, [own], [output], weights), f"{name}/")
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in cut.initializer}
    return Part(tuple(cut.node), cut.input[0].name, cut.output[0].name, tensors)


def _reads(node: NodeProto) -> Iterator[str]:
    """All names that a node or its branches mention."""
    yield from node.input
    for attribute in node.attribute:
        for graph in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else ())):
            for inner in graph.node:
                yield from _reads(inner)
            yield from (output.name for output in graph.output)


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silence the exporter's notes about packages that it could use but does not need."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _branch(nodes: list[NodeProto], output: str) -> GraphProto:
    return helper.make_graph(nodes, f"{output}_branch", [], [_value(output, None)])


def _pass_through(value: str) -> GraphProto:
    kept = f"{value}_kept"
    return _branch([helper.make_node("Identity", [value], [kept])], kept)


def _value(name: str, shape: tuple[int | str, ...] | None, kind: int = TensorProto.FLOAT) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def _tensors(tensors: dict[str, NDArray[np.generic]], placement: Placement) -> list[TensorProto]:
    return [
        _external(name, tensor, placement.offsets[name])
        if name in placement.offsets
        else numpy_helper.from_array(np.asarray(tensor), name)
        for name, tensor in tensors.items()
    ]


def _external(name: str, tensor: NDArray[np.generic], offset: int) -> TensorProto:
    proto = TensorProto(name=name, dims=tensor.shape, data_type=helper.np_dtype_to_tensor_dtype(tensor.dtype))
    proto.data_location = TensorProto.EXTERNAL
    for key, value in (("location", WEIGHTS_FILE), ("offset", str(offset)), ("length", str(tensor.nbytes))):
        proto.external_data.add(key=key, value=value)
    return proto


def _model(graph: GraphProto) -> ModelProto:
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="hbll-anytime", ir_version=10
    )
