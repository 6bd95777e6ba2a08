"""The words of --device and --precision."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from strokenet.data.errors import InputError
from strokenet.model.device import choose_device, choose_dtype, cpu_has_bf16


@pytest.mark.parametrize("word", ["abacus", "", "cuda:x", "meta", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(word: str) -> None:
    with pytest.raises(InputError, match="--device"):
        choose_device(word)


def test_auto_is_a_device_of_this_machine() -> None:
    expected = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert choose_device("auto").type == expected
    assert choose_device("cpu") == torch.device("cpu")


def test_precision_words_are_torchs_types(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("strokenet.model.device.cpu_has_bf16", lambda: False)
    cpu = torch.device("cpu")
    words = ("auto", "fp32", "bf16", "fp16")
    expected = [torch.float32, torch.float32, torch.bfloat16, torch.float16]
    assert [choose_dtype(word, cpu) for word in words] == expected  # type: ignore[arg-type]


@pytest.mark.parametrize("has", [True, False])
def test_a_cpu_takes_bfloat16_where_the_cpu_computes_in_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, has: bool
) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr("strokenet.model.device.cpu_has_bf16", lambda: has)
    assert choose_dtype("auto", cpu) == (torch.bfloat16 if has else torch.float32)
    assert not caplog.messages
    assert choose_dtype("bf16", cpu) == torch.bfloat16
    assert [("emulates" in said) for said in caplog.messages] == ([] if has else [True])
    assert choose_dtype("fp32", cpu) == torch.float32


def test_the_flags_of_the_processor_decide() -> None:
    cpu = Path("/proc/cpuinfo")
    if not cpu.exists():
        pytest.skip("the processor's flags are read from /proc/cpuinfo, which Linux has")
    flags = cpu.read_text().split()
    assert cpu_has_bf16() == bool({"avx512_bf16", "amx_tile"} & set(flags))


def test_each_process_of_a_machine_takes_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert [choose_device(name, local=5).index for name in ("auto", "cuda", "cuda:3")] == [1, 1, 3]
