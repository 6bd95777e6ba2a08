"""The estimate of the peak, against what a process really takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

MEASURE = """
import gc, json, threading, time
import numpy as np
from pathlib import Path
from strokenet.data.case import case_from_images
from strokenet.infer.memory import peak_memory_bytes
from strokenet.infer.config import InferConfig
from strokenet.infer.predict import predict
from strokenet.model.checkpoint import Model
from strokenet.model.network import build_network
from tests.plans import tiny_plan

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

def case(shape, spacing):
    scan = np.random.default_rng(0).normal(5, 1, shape).astype(np.float32)
    return case_from_images("case", {name: (scan, np.diag([*spacing, 1.0])) for name in ("T1", "FLAIR")})

plan = tiny_plan(patch=(64, 64, 64))
model = Model(root=Path("."), plan=plan, folds=("0",), networks=(build_network(plan).eval(),))
predict(model, case((16, 16, 16), (1, 1, 1)), InferConfig())
scan = case((160, 160, 100), (0.4, 0.4, 0.64))
gc.collect()
before, peak, done = resident(), [0], []

def watch():
    while not done:
        peak[0] = max(peak[0], resident())
        time.sleep(0.002)

watcher = threading.Thread(target=watch, daemon=True)
watcher.start()
predict(model, scan, InferConfig(tta="none"))
done.append(True)
watcher.join()
taken = peak[0] - before + 2 * scan.image.nbytes  # this scan and the next
print(json.dumps([taken, peak_memory_bytes(model.plan, scan.geometry)]))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="the system does not tell a process's memory")
def test_the_estimate_is_near_the_measured_peak() -> None:
    run = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    measured, estimate = json.loads(run.stdout.splitlines()[-1])
    assert 0.75 * measured < estimate < 2.5 * measured
