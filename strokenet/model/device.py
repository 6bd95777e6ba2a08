"""Where to compute and in which arithmetic: the words of --device and --precision turned into torch's."""

from __future__ import annotations

import logging
from typing import Literal

import torch

from strokenet.data.errors import InputError

Precision = Literal["auto", "fp32", "bf16", "fp16"]
_log = logging.getLogger("strokenet")


def choose_device(name: str, *, local: int = 0) -> torch.device:
    """auto takes a GPU, else Apple's, else the CPU; cpu, cuda, cuda:N and mps are taken at their word.

    local: the place of this process among those of one machine, which auto and cuda give a GPU each, in turn.

    Raises:
        InputError: the word is unknown, or this machine has no such device.
    """
    if name == "auto":
        return _own_gpu(local) if torch.cuda.is_available() else torch.device("mps" if _has_mps() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"--device {name!r}; allowed: auto, cpu, cuda, cuda:N, mps") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {name}: this machine shows {torch.cuda.device_count()} GPUs to torch; use cpu")
    if name == "cuda":
        return _own_gpu(local)
    if device.type == "mps" and not _has_mps():
        raise InputError("--device mps: torch finds no Apple GPU here; use cpu")
    if device.type not in ("cpu", "cuda", "mps"):
        raise InputError(f"--device {name!r}; allowed: auto, cpu, cuda, cuda:N, mps")
    return device


def cpu_has_bf16() -> bool:
    """Whether this processor multiplies bfloat16 itself (AVX512-BF16 or AMX), by torch's reading of its flags."""
    return any(getattr(torch.cpu, f"_is_{name}_supported", bool)() for name in ("avx512_bf16", "amx_tile"))


def onednn_computes(dtype: torch.dtype) -> bool:
    """Whether torch's oneDNN convolves in this type on this processor; bfloat16 wants AVX-512 or better."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def choose_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """auto: bfloat16 on a GPU or CPU that computes in it, float16 on other NVIDIA GPUs, float32 elsewhere.

    A CPU's convolutions are 3 times as fast in its own bfloat16. One without it emulates, by a plain loop or by oneDNN:
    some hundred times slower than float32, so that it is said where it was asked for.
    """
    if precision == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
        return torch.bfloat16 if device.type == "cpu" and cpu_has_bf16() else torch.float32
    if device.type == "cpu" and precision == "bf16" and not cpu_has_bf16():
        _log.warning("--precision bf16: this CPU emulates it, which is some hundred times slower; use fp32")
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or its library says that its memory is full; several say so in words alone."""
    words = str(error).casefold()
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in words or "alloc_failed" in words


def _own_gpu(local: int) -> torch.device:
    return torch.device("cuda", local % torch.cuda.device_count())


def _has_mps() -> bool:
    return bool(torch.backends.mps.is_available())
