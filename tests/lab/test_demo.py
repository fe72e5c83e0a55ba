"""The demo goes on exactly where kill -9 left it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SMALL = '''"""The demo at a size of seconds."""
from dataclasses import dataclass, replace

from tokenmdp.lab import demo

tiny = demo.SIZES["tiny"]
demo.SIZES["tiny"] = replace(
    tiny,
    sft=replace(tiny.sft, steps=12, evaluate_every=6),
    rm=replace(tiny.rm, epochs=1),
    ppo=replace(tiny.ppo, steps=6),
    pairs=320,
    held_out_pairs=64,
    held_out=16,
)


@dataclass(frozen=True)
class Config(demo.Config):
    size: str = "tiny"


def main(cfg, run):
    return demo.main(cfg, run)
'''


def command(script: Path, out: Path) -> list[str]:
    flags = ["--out", str(out), "--threads", "1", "--resume"]
    return [sys.executable, "-m", "tokenmdp", "run", str(script), *flags]


def facts(folder: Path) -> dict[str, bytes | object]:
    """Everything of a run that must not depend on when it was killed."""
    found: dict[str, bytes | object] = {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.jsonl")) if p.name != "times.jsonl"
    }
    summary = json.loads((folder / "summary.json").read_text())
    found["summary"] = {k: v for k, v in summary.items() if k not in ("minutes", "peak_gb")}
    return found


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("demo") / "small.py"
    path.write_text(SMALL)
    return path


def test_a_demo_killed_at_any_moment_ends_with_the_same_figures(script: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    subprocess.run(command(script, whole), check=True, capture_output=True)
    report = (whole / "report.html").read_text()
    assert "<script" not in report
    assert "http://" not in report.replace("http://www.w3.org", "")

    killed = tmp_path / "killed"
    # Kill it inside behaviour cloning, inside the offline data and inside PPO: as soon as each has begun to log.
    for stage in ("sft", "data", "ppo"):
        process = subprocess.Popen(command(script, killed), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        log = killed / stage / "metrics.jsonl"
        while process.poll() is None and not (log.exists() and log.stat().st_size):
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not (killed / "summary.json").exists(), f"it was to be killed in {stage}, and had ended"
    subprocess.run(command(script, killed), check=True, capture_output=True)
    assert facts(killed) == facts(whole)
