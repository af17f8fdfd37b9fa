"""The self-test at the first use of a bundle on a device, and its verdict, kept in the user's cache.

The verdict belongs to the bundle, the device, its driver and the library: a change of any is a first use again. So is
the next one where the device had no memory for a part of the test.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator

from t2v_rt.engines.backend_info import backend_info
from t2v_rt.engines.bundle.manifest import Manifest
from t2v_rt.engines.bundle.store import Bundle
from t2v_rt.engines.contract import Component
from t2v_rt.errors import EngineError
from t2v_rt.runtime import self_test
from t2v_rt.system.user_cache import UserCache

logger = logging.getLogger(__name__)


def is_proven(bundle: Bundle, name: str, device: str) -> bool:
    """Whether a component needs no test on a device: it has passed there, or there is nothing to hold it against.

    Args:
        bundle: that it is of.
        name: of the component.
        device: that it runs on; empty for one that needs no proof, as the reference itself ran there.
    """
    if not device or UserCache("verdicts").has(_name(bundle, name, device)):
        return True
    if not self_test.has_answers(name, bundle.folder):
        logger.warning("%s was not tested on %s: the bundle carries no self-test of it", name, device)
        return True
    return False


def proven(bundle: Bundle, name: str, shards: Iterable[Component], device: str) -> Iterator[Component]:
    """Gives a component's shards on as they come, each held against the bundle's answers first where that is due.

    So a test and the work that waits for it share one load. The verdict is kept when all shards have passed.

    Args:
        bundle: that it is of.
        name: of the component.
        shards: its engines, loaded, shard by shard.
        device: that they run on, as `is_proven` takes it.

    Raises:
        EngineError: the answers of a shard are not those of the float32 reference.
    """
    if is_proven(bundle, name, device):
        yield from shards
        return
    error, complete = 0.0, True
    for shard in shards:
        result = self_test.check(name, [shard], bundle.manifest, bundle.folder)
        if not result.passed:
            raise EngineError(
                f"{name} computes something else on {device} than its float32 reference: relative error "
                f"{result.error:.2g}, expected at most {result.tolerance:.2g}; {remedy(bundle.manifest)}"
            )
        error, complete = max(error, result.error), complete and not result.untested
        yield shard
    if complete:
        content = {"component": name, "device": device, "error": error}
        UserCache("verdicts").put(_name(bundle, name, device), json.dumps(content).encode())


def remedy(manifest: Manifest) -> str:
    """What to do where a bundle's engines give other answers than their reference."""
    if manifest.attention_accumulation == "fp16":
        return "its attention adds up in half precision, build it again with --attention-accumulation fp32"
    if backend_info(manifest.backend).ahead_of_time:
        return "update the driver, or build it again with --precision bf16"
    return "update the driver and the library"


def _name(bundle: Bundle, name: str, device: str) -> str:
    key = hashlib.sha256("\n".join((bundle.manifest.bundle_id, name, device)).encode()).hexdigest()[:32]
    return f"{key}.json"
