"""The self-test at the first use of a bundle on a device, and its verdict, kept in the user's cache.

The verdict belongs to the bundle, the device, its driver and the library: a change of any is a first use again.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable

from t2v_rt.engines.bundle.store import Bundle
from t2v_rt.engines.contract import Component
from t2v_rt.errors import EngineError
from t2v_rt.runtime import self_test
from t2v_rt.system.user_cache import UserCache

logger = logging.getLogger(__name__)


def check_at_first_use(bundle: Bundle, name: str, shards: Callable[[], Iterable[Component]], device: str) -> None:
    """Tests a component unless it has passed on this device before.

    Args:
        bundle: that it is of.
        name: of the component.
        shards: gives its engines, loaded, shard by shard; called only for a test.
        device: what they run on; empty for one that needs no proof, as the reference itself ran there.

    Raises:
        EngineError: its answers are not those of the float32 reference.
    """
    if not device:
        return
    verdicts, verdict = UserCache("verdicts"), _name(bundle, name, device)
    if verdicts.has(verdict):
        return
    if not self_test.has_answers(name, bundle.folder):
        logger.warning("%s was not tested on %s: the bundle carries no self-test of it", name, device)
        return
    result = self_test.check(name, shards(), bundle.manifest, bundle.folder)
    if not result.passed:
        raise EngineError(
            f"{name} computes something else on {device} than its float32 reference: relative error "
            f"{result.error:.2g}, expected at most {result.tolerance:.2g}; update the driver or build the bundle again"
        )
    content = {"component": name, "device": device, "error": result.error}
    verdicts.put(verdict, json.dumps(content).encode())


def _name(bundle: Bundle, name: str, device: str) -> str:
    key = hashlib.sha256("\n".join((bundle.manifest.bundle_id, name, device)).encode()).hexdigest()[:32]
    return f"{key}.json"
