"""One case after the other by a program that is warm: from the scan's file to the mask's, models and kernels loaded.

python -m bench.warm JOB                        ours, started by infer.py (remote.py)
.venv-peers/bin/python -m bench.warm JOB        nnU-Net's predictor, sequential, so that no worker has to start

What a clinic's server and the middle of a cohort see. Job.settings: images, out (the mask), model, mirror.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch

from bench.phases import wait_for
from bench.remote import Contender, Job, Turn, serve


def _ours(job: Job) -> Contender:
    """Our engine. Parts of a turn: reading, what is computed where the network is, and writing."""
    from strokenet.data.case import read_case
    from strokenet.data.nifti import write_mask
    from strokenet.infer.config import InferConfig
    from strokenet.infer.engine import Engine
    from strokenet.infer.predict import predict_case
    from strokenet.memory import keep_freed_memory
    from strokenet.model.checkpoint import load_model
    from strokenet.model.device import choose_device

    keep_freed_memory()  # as the command does
    device = choose_device(job.device)
    model = load_model(Path(job.settings["model"]), device=device)
    engine = Engine(model, InferConfig(tta="full" if job.settings["mirror"] else "none"))
    images = dict(zip(model.plan.channels, map(Path, job.settings["images"]), strict=True))
    out = Path(job.settings["out"])
    out.parent.mkdir(parents=True, exist_ok=True)

    def turn(count: int) -> Turn:
        spans = []
        for _ in range(count):
            marks = [time.perf_counter()]
            case = read_case("case", images)
            marks.append(time.perf_counter())
            mask = predict_case(engine, case).mask
            wait_for(device)
            marks.append(time.perf_counter())
            write_mask(out, mask, case.header)
            marks.append(time.perf_counter())
            spans.append(np.diff(marks))
        read, computed, written = (1000 * float(span) for span in np.mean(spans, axis=0))
        return Turn(ms=read + computed + written, parts_ms={"read": read, "compute": computed, "write": written})

    return Contender(answer=dict, turn=turn)


def _nnunet(job: Job) -> Contender:
    """nnU-Net's predictor, on the device as far as it goes."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    device = torch.device(job.device)
    predictor = nnUNetPredictor(
        use_mirroring=job.settings["mirror"],
        perform_everything_on_device=device.type == "cuda",
        device=device,
        allow_tqdm=False,
    )
    predictor.initialize_from_trained_model_folder(job.settings["model"], use_folds=(0,))
    images, out = list(job.settings["images"]), Path(job.settings["out"])
    out.parent.mkdir(parents=True, exist_ok=True)
    truncated = str(out).removesuffix(".nii.gz")

    def turn(count: int) -> Turn:
        began = time.perf_counter()
        for _ in range(count):
            predictor.predict_from_files_sequential([images], [truncated])
        return Turn(ms=1000 * (time.perf_counter() - began) / count)

    return Contender(answer=dict, turn=turn)


if __name__ == "__main__":
    serve({"ours": _ours, "nnunet": _nnunet})
