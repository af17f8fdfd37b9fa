"""The verify command: a bundle's engines against the answers of its float32 reference."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from t2v_rt.commands.parsing import declare_options, given_options
from t2v_rt.commands.polygraphy_folder import PolygraphyFolder
from t2v_rt.engines.backend_info import backend_info
from t2v_rt.engines.backends import backend_of, load_shards
from t2v_rt.engines.bundle.store import open_bundle
from t2v_rt.errors import VerificationError
from t2v_rt.options import documented_by, option
from t2v_rt.runtime import self_test
from t2v_rt.runtime.first_use import remedy
from t2v_rt.runtime.options import BackendOptions

EXAMPLE = "example: t2v-rt verify build/demo"


@dataclass(frozen=True, kw_only=True)
class VerifyOptions(BackendOptions):
    """The options of the command.

    Args:
        bundle: folder that build-engines wrote.
        polygraphy: new folder for the self-test's inputs and for what each engine made of them here, in the format of
            Polygraphy, which takes t2v-rt[polygraphy]; the commands are named that hold each engine against them.
    """

    bundle: str = option(positional=True, metavar="BUNDLE")
    polygraphy: str | None = option(None, metavar="FOLDER")


def declare(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.epilog = EXAMPLE
    declare_options(parser, VerifyOptions)


def run(parsed: argparse.Namespace) -> dict[str, Any]:
    """Verifies the bundle; returns the report, or raises VerificationError with it where a component fails."""
    options = VerifyOptions(**given_options(VerifyOptions, parsed))
    report = verify(
        options.bundle,
        options.backend,
        provider=options.provider,
        threads=options.threads,
        device=options.device,
        trust=options.trust,
        polygraphy=options.polygraphy,
    )
    if not report["passed"]:
        raise VerificationError(
            f"{options.bundle} does not give the answers of its reference, do not use it on this machine; "
            f"{report['advice']}",
            report,
        )
    return report


def describe(report: Mapping[str, Any]) -> list[str]:
    """The report for a person."""
    lines = [
        f"{name:13}{'passed' if item['passed'] else 'FAILED'}  error {item['error']:.1e}, allowed {item['tolerance']:g}"
        + (f"; no memory to test {', '.join(item['untested'])}" if item["untested"] else "")
        for name, item in report["components"].items()
    ]
    return [*lines, *report.get("polygraphy", ())]


@documented_by(BackendOptions)
def verify(
    folder: str | Path,
    backend: str | None = None,
    *,
    provider: str | None = None,
    threads: int | None = None,
    device: int | None = None,
    trust: bool = False,
    polygraphy: str | Path | None = None,
) -> dict[str, Any]:
    """Runs the self-test of every component.

    Args:
        folder: folder of the bundle.
        polygraphy: new folder for inputs and outputs in Polygraphy's format, or None.

    Returns:
        `passed`, and for each component its error, tolerance and verdict, and the calls that were left out of it, as
        the device has no memory for their sizes; `advice` where it has not passed; with `polygraphy` a command for each
        engine under this name.

    Raises:
        BundleError: the bundle cannot be used, or carries no self-test.
        BackendError: the backend cannot be used here, or lacks an option that is given.
        EngineError: an engine failed.
        InputError: Polygraphy is not installed, or its folder cannot be written.
    """
    bundle = open_bundle(folder)
    manifest = bundle.manifest
    engines = backend_of(bundle, backend, provider=provider, threads=threads, device=device, trust=trust)
    verdicts: list[self_test.Verdict] = []
    commands: list[str] = []
    calls = None if polygraphy is None else PolygraphyFolder(polygraphy, bundle)
    for name, spec in manifest.components.items():
        with bundle.held(bundle.component_files(name)):
            shards = load_shards(engines, bundle.folder, name, spec)
            watch = None if calls is None else partial(calls.add, name)
            verdicts.append(self_test.check(name, shards, manifest, bundle.folder, watch))
        if calls is not None:
            commands += calls.write(name, verdicts[-1].tolerance)
    passed = all(verdict.passed for verdict in verdicts)
    return {
        "bundle_id": manifest.bundle_id,
        "backend": manifest.backend,
        "provider": backend_info(manifest.backend).default_provider if provider is None else provider,
        "passed": passed,
        **({} if passed else {"advice": remedy(manifest)}),
        **({} if calls is None else {"polygraphy": commands}),
        "components": {
            verdict.component: {
                "error": verdict.error,
                "tolerance": verdict.tolerance,
                "passed": verdict.passed,
                "untested": list(verdict.untested),
            }
            for verdict in verdicts
        },
    }
