"""No telemetry of the libraries underneath."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.demo_bundle import build_demo

ROOT = Path(__file__).resolve().parents[2]
THE_PLACE = ROOT / "engines" / "onnxruntime" / "imported.py"
IMPORT = re.compile(r"^\s*(import|from)\s+onnxruntime\b|import\s[^#\n]*\bonnxruntime\b", re.MULTILINE)
LIBRARY = """
import os, sys
from t2v_rt import TextToVideoPipeline
pipe = TextToVideoPipeline.from_pretrained(sys.argv[1])
pipe("a red ball", seed=1, num_inference_steps=1, num_frames=1)
print(os.environ["ORT_DISABLE_TELEMETRY"])
"""


def environment(home: Path) -> dict[str, str]:
    """That of a new user's machine: continuous integration, for one, switches telemetry off by itself."""
    kept = {"PATH", "PYTHONPATH", "SYSTEMROOT", "VIRTUAL_ENV", "LD_LIBRARY_PATH"}
    known = {name: value for name, value in os.environ.items() if name in kept}
    return {**known, "HOME": str(home), "USERPROFILE": str(home), "LOCALAPPDATA": str(home), "TMPDIR": str(home)}


@pytest.mark.parametrize("way", ["library", "generate", "doctor", "build-engines"])
def test_a_new_user_gets_no_device_id_and_no_database_of_events(tmp_path: Path, way: str) -> None:
    bundle, home = build_demo(tmp_path), tmp_path / "home"
    home.mkdir()
    tool = [sys.executable, "-m", "t2v_rt"]
    commands = {
        "library": [sys.executable, "-c", LIBRARY, str(bundle)],
        "generate": [*tool, "generate", "a", "--engines", str(bundle), "--num-frames", "1", "--output", "a.npy"],
        "doctor": [*tool, "doctor"],
        "build-engines": [*tool, "build-engines", str(ROOT / "demo" / "bouncing-shapes"), "--output", "built"],
    }
    done = subprocess.run(commands[way], cwd=home, env=environment(home), capture_output=True, text=True, check=True)
    left = {path.relative_to(home).parts[0] for path in home.rglob("*") if path.is_file()}
    known = {".cache", "t2v-rt", "Library", "a.npy", "a.json", "a.npy.json", "built"}
    assert left <= known
    assert not [path for path in home.rglob("*") if "microsoft" in str(path.relative_to(home)).lower()]
    if way == "library":
        assert done.stdout == "1\n"


def test_onnx_runtime_is_imported_in_one_place() -> None:
    folders = ("t2v_rt", "export", "runtime", "engines", "benchmarks", "demo", "tests")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    assert THE_PLACE in files
    importers = {file for file in files if IMPORT.search(file.read_text(encoding="utf-8"))}
    assert importers <= {THE_PLACE, ROOT / "benchmarks" / "startup.py", Path(__file__).resolve()}
    startup = (ROOT / "benchmarks" / "startup.py").read_text(encoding="utf-8")
    assert startup.index("ORT_DISABLE_TELEMETRY") < startup.index("onnxruntime")
