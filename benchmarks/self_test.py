"""Whether a bundle's self-test sees what attention's sums lose: the denoiser's own graph, its attention emulated.

    python -m t2v_rt.benchmarks.self_test --output benchmarks/results/self_test.json

For each setting a denoiser of true size and random weights is written as a plan's graph and as its float32 reference.
The self-test's call runs through the graph on the CPU, cut at its attentions: each is computed in the order of a fused
kernel's sums (`attention_sums`), over as many keys as a video has tokens. The tokens of the self-test are all alike, so
one is computed, with the keys of all positions; that they stay alike is assumed of half sums too, whose errors differ a
little from query to query. ONNX Runtime adds up all else in float32. The answer is judged as `verify` would.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from t2v_rt.benchmarks import results, wan_tensors
from t2v_rt.benchmarks.attention_sums import attention, exact_attention
from t2v_rt.benchmarks.cut_graph import Attend, CutGraph
from t2v_rt.benchmarks.make_checkpoint import Draw, write_safetensors
from t2v_rt.engines.bundle.manifest import ComponentSpec, GraphSpec, Manifest
from t2v_rt.engines.bundle.model import ModelSpec
from t2v_rt.engines.bundle.profiles import Accumulation, PlanProfile, PlanSpec, Range
from t2v_rt.engines.contract import Component, Engine, EngineState, Feeds
from t2v_rt.errors import EngineError
from t2v_rt.export.graph import GraphOptions, GraphWriter
from t2v_rt.export.precision import Precision
from t2v_rt.export.tensors import CheckpointWeights
from t2v_rt.export.text_encoders.t5 import TextEncoderConfig
from t2v_rt.export.wan.family import DEFAULTS, WanConfigs
from t2v_rt.export.wan.transformer import TransformerConfig, rotary_frequencies, write_transformer
from t2v_rt.export.wan.vae import VaeConfig
from t2v_rt.export.weight_file import WeightFile
from t2v_rt.runtime import self_test
from t2v_rt.runtime.families.wan import QUIET
from t2v_rt.system.files import remove_tree

ALL, FEW = 30, 8  # layers of the published denoiser, and as many as show what differs
Array = NDArray[np.float32]
# what a card may add up in -> what its graph is written for, and what the emulation adds up in
SUMS: Mapping[str, tuple[Accumulation, str]] = {
    "half": ("fp32", "half"),
    "half centred": ("fp16", "half"),
    "bfloat16": ("fp32", "bfloat16"),
    "float32": ("fp32", "float32"),
}


@dataclass(frozen=True)
class Setting:
    """A denoiser and a video, by what differs from weights as diffusers initialises them and 832x480 with 81 frames.

    Args:
        name: of it.
        grid: frames, rows and columns of the latents.
        gates: what the blocks' modulation is multiplied by, gates included.
        values: what the values of attention are multiplied by.
        spread: what queries and keys of self-attention are multiplied by.
        loud: whether the self-test's latents are as loud as noise.
        layers: of the denoiser; less than all 30 for time.
    """

    name: str
    grid: tuple[int, int, int] = (21, 60, 104)
    gates: float = 1.0
    values: float = 1.0
    spread: float = 1.0
    loud: bool = False
    layers: int = FEW


SETTINGS = (
    Setting("weights as initialised", layers=ALL),
    Setting("weights as initialised"),
    Setting("latents as loud as noise", loud=True),
    Setting("gates 10 times as large", gates=10.0),
    Setting("values 5 times as large", values=5.0),
    Setting("values 20 times as large", values=20.0),
    Setting("scores spread twice as far", spread=1.41),
    Setting("1280x720, 81 frames", grid=(21, 90, 160)),
)


@dataclass(frozen=True)
class InitialDraw(Draw):
    """Tensors as a new network has them: evenly spread, by the products of a sum; norms of one.

    Args:
        setting: what is multiplied.
        dim: width of the network.
    """

    setting: Setting
    dim: int

    def values(self, name: str, shape: tuple[int, ...]) -> Iterator[NDArray[np.uint16 | np.uint32]]:
        setting = self.setting
        if "norm" in name and name.endswith("weight"):
            tensor = np.full(shape, setting.spread if ".attn1." in name else 1.0, np.float32)
        elif "norm" in name:
            tensor = np.zeros(shape, np.float32)
        elif "scale_shift_table" in name:
            tensor = self.generator.standard_normal(shape, np.float32) / np.float32(math.sqrt(self.dim))
        else:
            bound = (math.prod(shape[1:]) if len(shape) > 1 else self.dim) ** -0.5
            tensor = (2 * self.generator.random(shape, np.float32) - 1) * np.float32(bound)
        if "scale_shift_table" in name or "time_proj" in name:
            tensor *= np.float32(setting.gates)
        if ".to_v." in name:
            tensor *= np.float32(setting.values)
        yield tensor.astype(np.float16).view(np.uint16).reshape(-1)


def exact(query: Array, key: Array, value: Array) -> Array:
    """Attention in float64, as graphs give it."""
    return exact_attention(query, key, value).astype(np.float32)


@dataclass(frozen=True)
class Video:
    """The tokens of a video that are all alike, of which one is at hand.

    Args:
        cosines: of the angles that keys are turned by, (tokens, channels / 2).
        sines: of the same.
        accumulator: of `attention_sums.ACCUMULATORS`.
    """

    cosines: Array
    sines: Array
    accumulator: str

    @classmethod
    def of(cls, config: TransformerConfig, grid: Sequence[int], accumulator: str) -> Video:
        """A video of so many latent frames, rows and columns."""
        sizes = [size // patch for size, patch in zip(grid, config.patch, strict=True)]
        places = np.indices(sizes).reshape(3, -1)
        angles = np.concatenate(
            [table[place] for table, place in zip(rotary_frequencies(config), places, strict=True)], axis=1
        )
        return cls(np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32), accumulator)

    def attend(self, query: Array, key: Array, value: Array) -> Array:
        """Attention in the middle of the video; what is attended to is all of it, or another text of several rows."""
        if key.shape[1] == 1:  # the one token, which lies where nothing is turned
            count, middle = len(self.cosines), slice(len(self.cosines) // 2, len(self.cosines) // 2 + 1)
            query, key = self._turned(query, middle), self._turned(key, slice(None))
            value = np.broadcast_to(value, (len(value), count, value.shape[-1]))
        return attention(query, key, value, accumulator=self.accumulator)

    def _turned(self, x: Array, tokens: slice) -> Array:
        first, second = np.split(x, 2, axis=-1)
        cos, sin = self.cosines[tokens], self.sines[tokens]
        return np.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)


class CutEngine(Engine):
    """The denoiser's graph in pieces, of one token; it takes as many as the self-test feeds, if all are alike.

    Args:
        spec: of the plan that it stands for, or of the reference.
        graph: of one token.
        attend: computes its attentions.
        patch: latent frames, rows and columns of a token.
        gain: of the latents.
    """

    def __init__(
        self, spec: GraphSpec, graph: CutGraph, attend: Attend, patch: tuple[int, int, int], gain: float
    ) -> None:
        super().__init__("transformer", spec)
        self._graph, self._attend, self._patch, self._gain = graph, attend, patch, gain

    def _run(self, feeds: Feeds, state: EngineState | None, keep: Sequence[str]) -> dict[str, Any]:
        latents = np.asarray(feeds["hidden_states"])
        frames, rows, columns = self._patch
        one = latents[:, :, :frames, :rows, :columns]
        counts = [size // of for size, of in zip(latents.shape, one.shape, strict=True)]
        assert np.array_equal(np.tile(one, counts), latents)
        given = {name: np.asarray(array) for name, array in feeds.items()}
        (made,) = self._graph.run({**given, "hidden_states": one * np.float32(self._gain)}, self._attend)
        return {self.outputs[0].name: np.tile(made, counts)}

    def close(self) -> None:
        """Nothing is held."""


class OneEngine(Component):
    """A component of one engine without states."""

    def new_states(
        self, count: int, *, height: int, width: int, role_prefix: str = "", resident: int | None = None
    ) -> Sequence[EngineState]:
        raise EngineError(f"{self.name} has no states; expected none to be asked for")

    def trim(self) -> None:
        """Nothing is held."""


@dataclass(frozen=True)
class Trial:
    """A denoiser with its self-test's answers.

    Args:
        folder: of its graphs and answers.
        configs: of the model.
        setting: of its weights.
        graphs: what attention is asked to add up in -> the graph of a plan.
        manifest: of a bundle of it.
    """

    folder: Path
    configs: WanConfigs
    setting: Setting
    graphs: Mapping[Accumulation, CutGraph]
    manifest: Manifest

    def verdict(self, sums: str) -> self_test.Verdict:
        """What the self-test says of a card that adds up in one of `SUMS`."""
        form, accumulator = SUMS[sums]
        video = Video.of(self.configs.transformer, self.setting.grid, accumulator)
        precision = "bf16" if sums == "bfloat16" else "fp16"
        built = replace(self.manifest.components["transformer"], precision=precision)
        manifest = replace(self.manifest, components={"transformer": built})
        engine = _engine(self, built.graphs["model"], self.graphs[form], video.attend)
        return self_test.check(
            "transformer", [OneEngine("transformer", built, {"model": engine})], manifest, self.folder
        )


def _engine(trial: Trial, spec: GraphSpec, graph: CutGraph, attend: Attend) -> CutEngine:
    gain = 1 / QUIET if trial.setting.loud else 1.0
    return CutEngine(spec, graph, attend, trial.configs.transformer.patch, gain)


def prepare(setting: Setting, configs: Mapping[str, Mapping[str, Any]], folder: Path) -> Trial:
    """Writes a denoiser's graphs, and the answers of its reference.

    Args:
        setting: of the weights and the video.
        configs: of the three networks, as a checkpoint has them.
        folder: that is written to.
    """
    networks = WanConfigs(
        TextEncoderConfig.from_config(configs["text_encoder"]),
        TransformerConfig.from_config(configs["transformer"]),
        VaeConfig.from_config(configs["vae"]),
    )
    stem, tensors = wan_tensors.TENSORS["transformer"]
    draw = InitialDraw(
        np.random.Generator(np.random.SFC64(0)), "fp16", wan_tensors.fan_in, setting, networks.transformer.dim
    )
    (folder / "weights").mkdir()
    write_safetensors(folder / "weights" / f"{stem}.safetensors", list(tensors(configs["transformer"])), draw)
    weights, model = CheckpointWeights.open(folder / "weights"), networks.model()
    (spec,) = _write(folder / "reference", weights, networks, model, "fp32", [None])
    sizes = dict(zip(("frames", "height", "width"), map(Range.of, setting.grid), strict=True))
    plan = PlanSpec((PlanProfile({"batch": Range.of(1), **sizes}, 0),), 0)
    components = {"transformer": ComponentSpec({"model": replace(spec, plan=plan)}, "fp16", 0)}
    manifest = Manifest("tensorrt-rtx", "fp16", "", {}, model, {}, DEFAULTS, components)
    trial = Trial(folder, networks, setting, {}, manifest)
    engine = _engine(trial, spec, CutGraph(folder / spec.path), exact)
    reference = OneEngine("transformer", ComponentSpec({"model": spec}, "fp32", 0), {"model": engine})
    calls = self_test.make_calls("transformer", reference, model, components["transformer"])
    self_test.record("transformer", {made.call.label: made.result for made in calls}, folder)
    remove_tree(folder / "reference")  # before the others are written, as all of them are large
    forms: tuple[Accumulation, ...] = ("fp32", "fp16")
    written = _write(folder / "plan", weights, networks, model, "fp16", forms)
    remove_tree(folder / "weights")
    graphs = {form: CutGraph(folder / graph.path) for form, graph in zip(forms, written, strict=True)}
    return replace(trial, graphs=graphs)


def _write(
    place: Path,
    weights: CheckpointWeights,
    configs: WanConfigs,
    model: ModelSpec,
    precision: Precision,
    forms: Sequence[Accumulation | None],
) -> list[GraphSpec]:
    """Graphs of one token, in a new folder with their weights; what they declare are the inputs of any size."""
    place.mkdir()
    frames, height, width = model.patch
    sizes = {"batch": 1, "frames": frames, "height": height, "width": width, "text": model.text.length}
    specs = []
    with WeightFile(place / "weights.data") as store:
        for form in forms:
            g = GraphWriter("transformer", weights, store, precision, GraphOptions(sizes, accumulation=form))
            write_transformer(g, configs.transformer)
            g.save(place / f"{form}.onnx")
            specs.append(GraphSpec(f"{place.name}/{form}.onnx", tuple(g.inputs), tuple(g.outputs)))
    return specs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for setting in SETTINGS:
        configs = {
            **wan_tensors.CONFIGS,
            "transformer": {**wan_tensors.CONFIGS["transformer"], "num_layers": setting.layers},
        }
        with tempfile.TemporaryDirectory() as folder:
            trial = prepare(setting, configs, Path(folder))
            for sums in SUMS:
                verdict = trial.verdict(sums)
                rows.append(
                    {
                        "setting": setting.name,
                        "layers": setting.layers,
                        "keys": math.prod(setting.grid) // math.prod(trial.configs.transformer.patch),
                        "sums": sums,
                        "error": verdict.error if math.isfinite(verdict.error) else None,
                        "allowed": verdict.tolerance,
                        "passed": verdict.passed,
                    }
                )
                print(json.dumps(rows[-1]), flush=True)
    if options.output is not None:
        results.write(options.output, {"rows": rows})


if __name__ == "__main__":
    main()
