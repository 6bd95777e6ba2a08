"""N4 against a field that was drawn."""

from __future__ import annotations

import numpy as np
import pytest

from strokenet.data.errors import InputError
from strokenet.prepare.bias import log_bias_field
from tests.prepare.heads import head

pytest.importorskip("SimpleITK", reason="needs SimpleITK: pip install 'strokenet[mri]'")


def test_at_least_half_of_a_drawn_field_is_removed() -> None:
    h = head()
    inside = h.flair != 0
    found = log_bias_field(h.flair, inside, h.flair_grid)
    drawn = np.log(h.bias[inside])
    left = drawn - found[inside]
    assert drawn.std() > 0.05
    assert left.std() < 0.5 * drawn.std()
    assert abs(found[inside].mean()) < 1e-3
    assert found.shape == h.flair.shape


def test_a_brain_of_one_value_is_refused() -> None:
    h = head()
    with pytest.raises(InputError, match="single value"):
        log_bias_field(np.full_like(h.flair, 7), h.flair != 0, h.flair_grid)
