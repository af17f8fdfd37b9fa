"""Whether what crosses a loaded engine's boundary is what the manifest says; else memory would be read past its end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from t2v_rt.engines.bundle.manifest import GraphSpec
from t2v_rt.engines.specs import TensorSpec
from t2v_rt.errors import EngineError

DTYPES: Mapping[str, str] = {"float32": "FLOAT", "float16": "HALF", "int64": "INT64"}  # the library's names
ANY = -1  # size of a dimension that changes from call to call


def check_boundary(name: str, spec: GraphSpec, engine: Any) -> None:
    """Compares names, dtypes and shapes of an engine's tensors with the manifest's.

    Args:
        name: of the engine, for errors.
        spec: of the plan.
        engine: the library's.

    Raises:
        EngineError: a tensor is missing, too many, or another one than the manifest says.
    """
    expected = {tensor.name: tensor for tensor in _tensors(spec)}
    found = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    if set(found) != set(expected):
        differing = ", ".join(sorted(set(found) ^ set(expected)))
        raise EngineError(f"{name}: plan and manifest do not both have {differing}; build the bundle again")
    for tensor in expected.values():
        dtype, shape = engine.get_tensor_dtype(tensor.name).name, tuple(engine.get_tensor_shape(tensor.name))
        if dtype != DTYPES[tensor.dtype] or not _fits(shape, tensor, spec):
            raise EngineError(
                f"{name}: {tensor.name!r} is {dtype} {list(shape)} in the plan; expected {tensor.dtype} "
                f"[{', '.join(map(str, tensor.shape))}]; build the bundle again"
            )


def _tensors(spec: GraphSpec) -> list[TensorSpec]:
    states = [
        TensorSpec(name, state.tensor.dtype, state.tensor.shape)
        for state in spec.states
        for name in (state.input, state.output)
        if name is not None
    ]
    return [*spec.inputs, *spec.outputs, *states]


def _fits(shape: tuple[int, ...], tensor: TensorSpec, spec: GraphSpec) -> bool:
    """Whether a plan fixes a dimension to the one size that all profiles have, or leaves open one that has a name."""
    assert spec.plan is not None
    varying: list[set[int]] = [set() for _ in tensor.shape]
    for profile in spec.plan.profiles:
        for bound in ("min", "max"):
            sizes = tensor.resolve({symbol: getattr(ranges, bound) for symbol, ranges in profile.sizes.items()})
            for known, size in zip(varying, sizes, strict=True):
                known.add(size)
    return len(shape) == len(tensor.shape) and all(
        isinstance(dim, str) if size == ANY else known == {size}
        for size, dim, known in zip(shape, tensor.shape, varying, strict=True)
    )
