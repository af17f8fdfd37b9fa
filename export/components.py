"""The components of a bundle, of any family: graphs and weights, the table of token embeddings, the tokenizer."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from t2v_rt.engines.bundle.manifest import BLOCKS, ComponentSpec, EmbeddingSpec, GraphSpec
from t2v_rt.engines.specs import StateSpec
from t2v_rt.export import tokenizer
from t2v_rt.export.checkpoint import Checkpoint
from t2v_rt.export.family import TEXT_ENCODER, Configs
from t2v_rt.export.graph import GraphOptions, GraphWriter
from t2v_rt.export.precision import Precision
from t2v_rt.export.weight_file import WeightFile

logger = logging.getLogger(__name__)
NAMED = 3  # of unused tensors, in a warning


def export_component(
    name: str,
    checkpoint: Checkpoint,
    configs: Configs,
    folder: Path,
    precision: Precision,
    graph_options: Mapping[str, GraphOptions] | None = None,
    roles: Sequence[str] | None = None,
    store_type: type[WeightFile] = WeightFile,
) -> ComponentSpec:
    """Writes graphs and weights of one component; engines that share weights have one file of them.

    Args:
        name: a component of the checkpoint's family.
        checkpoint: the opened checkpoint.
        configs: of it, as its family reads them.
        folder: of the bundle; a folder of the component's name is made in it where there is none.
        precision: of matmul and convolution operands.
        graph_options: how the graph of each role is written; None for the plain form, which any backend runs.
        roles: of the graphs to write; None for all.
        store_type: `WeightSizes` leaves the weights out.

    Returns:
        What the manifest says of it, but for the table of the text encoder (see `export_embedding`).

    Raises:
        CheckpointError: a tensor is missing or has the wrong shape.
    """
    weights, place = checkpoint.weights_of(name), folder / name
    place.mkdir(exist_ok=True)
    graphs: dict[str, GraphSpec] = {}
    units, nbytes = configs.units(name), 0
    for unit in units:
        wanted = [role for role in unit if roles is None or role in roles]
        if not wanted:
            continue
        alone = len(units) > 1 or unit[0].startswith(BLOCKS)  # loaded one at a time, so that each has its own file
        with store_type(place / f"{unit[0] if alone else 'weights'}.data") as store:
            for role in wanted:
                label = name if role == "model" else f"{name}.{role}"
                options = GraphOptions() if graph_options is None else graph_options[role]
                g = GraphWriter(label, weights, store, precision, options)
                graphs[role] = _saved(g, store, role, configs.write(name, role, g))
        nbytes += store.nbytes
    return ComponentSpec(graphs, precision, nbytes, configs.tiles(name))


def _saved(g: GraphWriter, store: WeightFile, role: str, states: Sequence[StateSpec]) -> GraphSpec:
    """Saves a graph beside its weights; its states are declared apart from its inputs and outputs."""
    path = store.path.with_name(f"{role}.onnx")
    g.save(path)
    hidden = {name for state in states for name in (state.input, state.output)}
    return GraphSpec(
        f"{path.parent.name}/{path.name}",
        tuple(spec for spec in g.inputs if spec.name not in hidden),
        tuple(spec for spec in g.outputs if spec.name not in hidden),
        tuple(states),
        weights_bytes=g.weights_bytes,
        tiled=g.options.tiled_attention,
    )


def export_embedding(checkpoint: Checkpoint, configs: Configs, folder: Path) -> EmbeddingSpec:
    """Copies the table of token embeddings into the text encoder's folder, in the checkpoint's own dtype.

    Args:
        checkpoint: the opened checkpoint.
        configs: of it, as its family reads them.
        folder: of the bundle.

    Raises:
        CheckpointError: the tensor is missing or has the wrong shape.
    """
    (folder / TEXT_ENCODER).mkdir(exist_ok=True)
    path = f"{TEXT_ENCODER}/embedding.data"
    weights = checkpoint.weights_of(TEXT_ENCODER)
    name, shape = configs.embedding(weights)
    return EmbeddingSpec(path, weights.copy(name, shape, folder / path), *shape)


def read_tokenizer(checkpoint: Checkpoint) -> str:
    """The checkpoint's tokenizer as the text of a `tokenizer.json`; raises CheckpointError where it cannot be read."""
    return checkpoint.family.read_tokenizer(checkpoint.tokenizer)


def check_tokenizer(checkpoint: Checkpoint, configs: Configs) -> None:
    """Holds the tokenizer against the text encoder; raises CheckpointError where they do not belong together."""
    weights = checkpoint.weights_of(TEXT_ENCODER)
    name, (rows, columns) = configs.embedding(weights)
    weights.check(name, (rows, columns))
    tokenizer.check_tokenizer(read_tokenizer(checkpoint), checkpoint.tokenizer[0], rows, configs.end_token)


def warn_of_unused(checkpoint: Checkpoint, components: Sequence[str]) -> None:
    """Names, once, the tensors that were not asked for while graphs of these components were written or outlined."""
    unused_ones = checkpoint.family.unused
    for network in dict.fromkeys(checkpoint.family.networks[name] for name in components):
        weights = checkpoint.weights[network]
        unused = [name for name in weights.unasked() if not name.startswith(unused_ones.get(network, ()))]
        if unused:
            listed = ", ".join(repr(name) for name in unused[:NAMED]) + (" …" if len(unused) > NAMED else "")
            logger.warning("%s: %d tensors are not used: %s", weights.place, len(unused), listed)
