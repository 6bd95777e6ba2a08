"""Registration against motions that are known: of a drawn head, and of real scans."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from strokenet.data.errors import InputError
from strokenet.prepare.brain import weights_folder
from strokenet.prepare.register import RegisterConfig, Scan, brain_points, displacement_mm, register
from tests.prepare.heads import head
from tests.prepare.starts import disturbed, t1_to_flair, try_start

pytest.importorskip("SimpleITK", reason="needs SimpleITK: pip install 'strokenet[mri]'")


def drawn_pair() -> tuple[Scan, Scan]:
    h = head()
    fixed = Scan(array=h.flair, brain=h.flair != 0, geometry=h.flair_grid)
    return fixed, Scan(array=h.t1, brain=h.t1 != 0, geometry=h.t1_grid)


def test_a_known_motion_is_found() -> None:
    fixed, moving = drawn_pair()
    points = brain_points(fixed)
    found = register(fixed, moving)
    assert displacement_mm(points, head().flair_to_t1, np.eye(4)).mean() > 8
    assert displacement_mm(points, head().flair_to_t1, found.fixed_to_moving).mean() < 0.5
    rotation = found.fixed_to_moving[:3, :3]
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-6)
    assert found.metric_end < found.metric_start


def test_the_same_seed_gives_the_same_matrix() -> None:
    fixed, moving = drawn_pair()
    quick = RegisterConfig(shrink=(4,), smooth_mm=(2.0,), samples=(0.5,), iterations=5)
    first, second = (register(fixed, moving, quick).fixed_to_moving for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_a_header_that_lost_its_place_starts_from_the_brains_centres() -> None:
    fixed, moving = drawn_pair()
    far = np.eye(4)
    far[:3, 3] = 150.0, -200.0, 90.0
    lost = replace(moving, geometry=replace(moving.geometry, affine=far @ moving.geometry.affine))
    found = register(fixed, lost)
    assert found.start == "brain centres"
    truth = far @ head().flair_to_t1
    assert displacement_mm(brain_points(fixed), truth, found.fixed_to_moving).mean() < 0.5


def test_an_empty_brain_is_refused() -> None:
    fixed, moving = drawn_pair()
    empty = Scan(array=moving.array, brain=np.zeros_like(moving.brain), geometry=moving.geometry)
    with pytest.raises(InputError, match="brain of the moving scan has 0 voxels"):
        register(fixed, empty)


def test_displacement_by_hand() -> None:
    a, b = np.eye(4), np.eye(4)
    b[:3, 3] = 3, 4, 0
    b[0, 0] = 2  # x doubled: the point at x = 0 moves 5, that at x = -3 moves 4
    found = displacement_mm(np.array([[0.0, 0, 0], [-3.0, 0, 0]]), a, b)
    np.testing.assert_allclose(found, [5, 4])


@pytest.mark.slow
@pytest.mark.real
def test_real_scans_are_registered_from_two_disturbed_starts(real_data: Path) -> None:
    """All twenty: python -m tests.prepare.starts."""
    try:
        weights_folder()
    except InputError as error:
        pytest.skip(str(error))
    pair = t1_to_flair(real_data / "open_ms" / "longitudinal" / "patient12")
    for seed in (0, 1):
        trial = try_start(pair, seed)
        assert trial.start_mm > 10
        assert trial.identity_mm > 2
        assert trial.error_mm < 1


def test_a_start_is_rigid_and_within_its_limits() -> None:
    about = np.array([5.0, -3.0, 20.0])
    matrix = disturbed(np.random.default_rng(3), about)
    np.testing.assert_allclose(matrix[:3, :3] @ matrix[:3, :3].T, np.eye(3), atol=1e-12)
    assert np.abs(matrix[:3, :3] @ about + matrix[:3, 3] - about).max() <= 15
