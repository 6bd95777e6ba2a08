"""The words of --device and --precision."""

from __future__ import annotations

import pytest
import torch

from strokenet.data.errors import InputError
from strokenet.model.device import choose_device, choose_dtype


@pytest.mark.parametrize("word", ["abacus", "", "cuda:x", "meta", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(word: str) -> None:
    with pytest.raises(InputError, match="--device"):
        choose_device(word)


def test_auto_is_a_device_of_this_machine() -> None:
    expected = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert choose_device("auto").type == expected
    assert choose_device("cpu") == torch.device("cpu")


def test_precision_words_are_torchs_types() -> None:
    cpu = torch.device("cpu")
    words = ("auto", "fp32", "bf16", "fp16")
    expected = [torch.float32, torch.float32, torch.bfloat16, torch.float16]
    assert [choose_dtype(word, cpu) for word in words] == expected  # type: ignore[arg-type]
