"""The self-test at the first use of a bundle on a device, and its verdict, kept in the user's cache.

The verdict belongs to the bundle, the device, its driver and the library: a change of any is a first use again.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable
from pathlib import Path

from t2v_rt.engines import platform
from t2v_rt.engines.bundle import Bundle
from t2v_rt.engines.contract import Component
from t2v_rt.errors import EngineError
from t2v_rt.runtime import self_test

logger = logging.getLogger(__name__)


def prove(bundle: Bundle, name: str, parts: Callable[[], Iterable[Component]], device: str) -> None:
    """Tests a component unless it has passed on this device before.

    Args:
        bundle: that it is of.
        name: of the component.
        parts: gives its engines, loaded, part by part; called only for a test.
        device: what they run on; empty for one that needs no proof, as the reference itself ran there.

    Raises:
        EngineError: its answers are not those of the float32 reference.
    """
    if not device:
        return
    verdict = _place(bundle, name, device)
    if verdict.is_file():
        return
    if not self_test.has_answers(name, bundle.folder):
        logger.warning("%s was not tested on %s: the bundle carries no self-test of it", name, device)
        return
    result = self_test.check(name, parts(), bundle.manifest, bundle.folder)
    if not result.passed:
        raise EngineError(
            f"{name} computes something else on {device} than its float32 reference: relative error "
            f"{result.error:.2g}, expected at most {result.tolerance:.2g}; update the driver or build the bundle again"
        )
    _keep(verdict, {"component": name, "device": device, "error": result.error})


def _place(bundle: Bundle, name: str, device: str) -> Path:
    key = hashlib.sha256("\n".join((bundle.manifest.bundle_id, name, device)).encode()).hexdigest()[:32]
    return platform.cache_dir() / "verdicts" / f"{key}.json"


def _keep(place: Path, content: dict[str, object]) -> None:
    try:
        place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        temporary = platform.temporary_sibling(place)
        temporary.write_text(json.dumps(content), encoding="utf-8")
        platform.replace_file(temporary, place)
    except OSError as exc:
        logger.info("the verdict is not kept, the next use tests again: %s", exc)
