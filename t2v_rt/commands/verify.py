"""The verify command: a bundle's engines against the answers of its float32 reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from t2v_rt.engines.backends import backend_info, backend_of, load_parts
from t2v_rt.engines.bundle.store import open_bundle
from t2v_rt.runtime import self_test


def verify(
    folder: str | Path,
    backend: str | None = None,
    *,
    provider: str | None = None,
    threads: int | None = None,
    trust: bool = False,
) -> dict[str, Any]:
    """Runs the self-test of every component.

    Args:
        folder: of the bundle.
        backend: must be the bundle's; None takes that one.
        provider: of ONNX Runtime; None for `cpu`.
        threads: of ONNX Runtime, per engine.
        trust: whether plans from elsewhere may be run.

    Returns:
        `passed`, and for each component its error, tolerance and verdict.

    Raises:
        BundleError: the bundle cannot be used, or carries no self-test.
        BackendError: the backend cannot be used here, or lacks an option that is given.
        EngineError: an engine failed.
    """
    bundle = open_bundle(folder)
    manifest = bundle.manifest
    engines = backend_of(bundle, backend, provider=provider, threads=threads, trust=trust)
    verdicts = []
    for name, spec in manifest.components.items():
        with bundle.held(bundle.component_files(name)):
            parts = load_parts(engines, bundle.folder, name, spec)
            verdicts.append(self_test.check(name, parts, manifest, bundle.folder))
    return {
        "bundle_id": manifest.bundle_id,
        "backend": manifest.backend,
        "provider": backend_info(manifest.backend).default_provider if provider is None else provider,
        "passed": all(verdict.passed for verdict in verdicts),
        "components": {
            verdict.component: {"error": verdict.error, "tolerance": verdict.tolerance, "passed": verdict.passed}
            for verdict in verdicts
        },
    }
