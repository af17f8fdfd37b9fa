"""Which bundles of plans this user built on this machine.

Plans are executable code: no others are reused, or run without the user saying so.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

from t2v_rt.errors import BackendError
from t2v_rt.system.outputs import MANIFEST_NAME
from t2v_rt.system.user_cache import UserCache

logger = logging.getLogger(__name__)


def remember_built(folder: Path) -> None:
    """Notes in the user's cache that a bundle was built here; its manifest holds the hashes of all its files."""
    if not UserCache("built").put(_name(folder), b""):
        logger.warning("%s: it is not noted that this bundle was built here; the next build will not reuse it", folder)


def built_here(folder: Path) -> bool:
    """Whether a bundle is, to the last byte of its manifest, one that was built here."""
    return UserCache("built").has(_name(folder))


def check_trust(folder: Path, trust: bool) -> None:
    """Refuses a bundle of plans from elsewhere unless the user trusts it.

    Raises:
        BackendError: not built here, and not trusted.
    """
    if not trust and not built_here(folder):
        raise BackendError(
            f"{folder} was not built on this machine by you, and plans are native code; build it here, or, where you "
            "trust its origin, say so with --trust (trust=True)"
        )


def _name(folder: Path) -> str:
    return hashlib.sha256((folder / MANIFEST_NAME).read_bytes()).hexdigest()
