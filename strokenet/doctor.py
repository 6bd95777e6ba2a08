"""The doctor: what this installation is, what will run on it and why, and whether the answers are right."""

from __future__ import annotations

import importlib.metadata
import platform
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage

from kernels.components import label_components
from kernels.dispatch import Choice, choices, wanted
from kernels.resample import resample_operator, resample_reference
from planner.plan import NetworkPlan
from strokenet import __version__
from strokenet.data.case import case_from_images, read_case
from strokenet.data.nifti import write_mask
from strokenet.infer.sliding_window import importance_map
from strokenet.memory import available_bytes
from strokenet.model.device import choose_device, choose_dtype
from strokenet.model.network import UNet

PACKAGES = (  # all that the package asks for; triton, which comes with torch on a GPU; and the extra [mri]
    *("torch", "triton", "numpy", "scipy", "nibabel", "isal", "connected-components-3d", "batchgenerators"),
    *("safetensors", "matplotlib", "click", "rich", "SimpleITK", "deepbet"),
)


@dataclass(frozen=True, kw_only=True)
class Check:
    """One self-check. detail: what was compared and the difference, or the error."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """All the doctor found. facts: name -> value."""

    facts: dict[str, str]
    kernels: tuple[Choice, ...]
    checks: tuple[Check, ...]

    @property
    def healthy(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)


def examine() -> Report:
    """Runs the self-checks (a few seconds on a CPU)."""
    checks = {
        "read and write": _check_nifti,
        "resample": _check_resample,
        "components": _check_components,
        "network": _check_network,
        "kernels": _check_kernels,
    }
    results = tuple(_run(name, check) for name, check in checks.items())
    return Report(facts=_facts(), kernels=choices() if results[-1].passed else (), checks=results)


def _facts() -> dict[str, str]:
    device, free = choose_device("auto"), available_bytes()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "strokenet": __version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "free memory": "unknown" if free is None else f"{free / 1e9:.1f} GB",
        "processor": f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        "GPUs": ", ".join(gpus) or "none seen by torch",
        "--device auto": str(device),
        "--precision auto": str(choose_dtype("auto", device)).removeprefix("torch."),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _run(name: str, check: Callable[[], tuple[bool, str]]) -> Check:
    try:
        passed, detail = check()
    except Exception as error:  # a broken installation may raise anything: report it, go on with the next check
        passed, detail = False, f"{type(error).__name__}: {error}"
    return Check(name=name, passed=passed, detail=detail)


def _check_nifti() -> tuple[bool, str]:
    rng = np.random.default_rng(0)
    mask = (rng.random((7, 6, 5)) > 0.5).astype(np.uint8)
    case = case_from_images("doctor", {"mask": (mask.transpose(2, 1, 0).astype(np.float32), np.diag([2.0, 1.5, 1, 1]))})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mask.nii.gz"
        write_mask(path, mask, case.header)
        back = read_case("doctor", {"mask": path}).image[0]
    return bool((back == mask).all()), "a mask written and read again is the same"


def _check_resample() -> tuple[bool, str]:
    image = torch.randn(1, 9, 11, 10, generator=torch.Generator().manual_seed(0))
    ours, reference = (run(image, (13, 8, 10), 3) for run in (resample_operator, resample_reference))
    difference = float((ours - reference).abs().max())
    return difference < 1e-5, f"against scipy, order 3: largest difference {difference:.1e}"


def _check_kernels() -> tuple[bool, str]:
    return True, f"STROKENET_KERNELS={wanted()}"  # wanted refuses another word than auto or reference


def _check_components() -> tuple[bool, str]:
    mask = np.random.default_rng(0).random((24, 20, 22)) > 0.9
    count = ndimage.label(mask, np.ones((3, 3, 3)))[1]
    found = len(label_components(torch.from_numpy(mask).to(choose_device("auto")))[1]) - 1
    return found == count, f"{found} components, scipy {count}"


def _check_network() -> tuple[bool, str]:
    """The device's answer against the CPU's in float64, on a small network."""
    device = choose_device("auto")
    plan = NetworkPlan(
        kind="plain",
        features=(8, 16, 16),
        strides=((1, 1, 1), (2, 2, 2), (2, 2, 2)),
        kernels=((3, 3, 3),) * 3,
        encoder_blocks=(2, 2, 2),
        decoder_convs=(2, 2),
        decoder_kernels=((3, 3, 3),) * 2,
    )
    network = UNet(plan, channels=2, heads=2).eval()
    noise = torch.randn(16, 16, 16, generator=torch.Generator().manual_seed(0))
    image = torch.stack([importance_map((16, 16, 16)), noise])[None]
    with torch.inference_mode():
        fast = network.to(device)(image.to(device)).double().cpu()
        exact = network.cpu().double()(image.double())
    difference = float((fast - exact).abs().max())
    return difference < 1e-2, f"{device} in float32 against float64: largest logit difference {difference:.1e}"
