"""Patch sampling: the peer's loader draws, strokenet repeats with the numbers that were drawn.

The two take their numbers from different generators, so equality is of the rule: every number that strokenet asks for
must have the bounds that the peer's had, in the same order for each sample, and with the peer's number the patches must
be the same voxels.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from planner.plan import Triple
from strokenet.preprocess.store import StoredCase
from strokenet.train.patches import draw_batch
from strokenet.train.spatial import initial_patch
from tests.peers import peer  # noqa: F401 - before the peer: its folders are set
from tests.peers.row import Row

# isort: split
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.label_handling.label_handling import LabelManager

OVERSAMPLING = 0.33  # the peer's trainer


def rows(full: bool) -> Iterator[Row]:
    """Whole batches of random cases, patches and label sets; and the size of the patch that is cut for training."""
    yield _batches(2000 if full else 300)
    yield _initial_patches(5000 if full else 1000)


@dataclass(frozen=True)
class _Draw:
    """A whole number of low <= value < high."""

    low: int
    high: int
    value: int


@dataclass
class _Replay:
    """Hands recorded numbers out in place of a numpy Generator. wrong: those asked for with other bounds."""

    draws: deque[_Draw]
    wrong: int = 0

    def integers(self, low: int, high: int | None = None) -> int:
        low, high = (0, low) if high is None else (low, high)
        if not self.draws:
            self.wrong += 1
            return low
        draw = self.draws.popleft()
        self.wrong += (draw.low, draw.high) != (low, high)
        return min(max(draw.value, low), high - 1)


@dataclass
class _PeerCases:
    """The peer's dataset, as its loader uses it. order: the cases as they were read, one a sample."""

    cases: Mapping[str, StoredCase]
    draws: list[_Draw]
    samples: list[list[_Draw]] = field(default_factory=list)

    @property
    def identifiers(self) -> list[str]:
        return list(self.cases)

    def load_case(self, name: str) -> tuple[Any, Any, None, dict[str, Any]]:
        self.close_sample()
        case = self.cases[name]
        places = {
            value: np.concatenate([np.zeros((len(voxels), 1), np.int64), voxels], 1)  # the peer's have a channel axis
            for value, voxels in case.foreground.items()
        }
        return case.image, case.label[None], None, {"class_locations": places}

    def close_sample(self) -> None:
        """What was drawn since the last case was read belongs to that case."""
        self.samples.append(list(self.draws))
        self.draws.clear()


def _batches(number: int) -> Row:
    wrong, forced, outside = 0, 0, 0
    for seed in range(number):
        rng = np.random.default_rng(seed)
        cases = _random_cases(rng)
        final, patch = _random_patches(rng)
        batch_size = int(rng.integers(1, 7))
        theirs, samples = _peer_batch(cases, batch_size, patch, final, seed)
        replays = [_Replay(deque(draws)) for draws in samples]
        generators: list[Any] = list(replays)
        ours = draw_batch(list(cases.values()), generators, patch=patch, final_patch=final)
        wrong += sum(replay.wrong + len(replay.draws) for replay in replays)
        wrong += sum(a != b for a, b in zip(ours.cases, theirs["keys"], strict=True))
        wrong += _differing(ours.image.numpy(), theirs["data"].numpy())
        wrong += _differing(ours.label.numpy(), theirs["target"].numpy()[:, 0])
        forced += sum(len(draws) == 3 for draws in samples)  # case, label, voxel; a free patch has case and 3 places
        outside += int((ours.image[:, 0] == 0).flatten(1).any(1).sum())  # noise is never 0
    return Row(
        check="patch sampling",
        on=f"{number} batches of random cases, patches, labels",
        difference=wrong,
        tolerance=0,
        unit="values",
        note=f"{forced} patches centred on foreground, {outside} reach outside the image",
    )


def _initial_patches(number: int) -> Row:
    rng = np.random.default_rng(0)
    wrong = 0
    for _ in range(number):
        patch = _triple(rng.integers(4, 257, 3))
        wrong += sum(a != b for a, b in zip(initial_patch(patch), _peer_initial_patch(patch), strict=True))
    return Row(
        check="patch cut for augmentation",
        on=f"{number} random patches, flat ones too",
        difference=wrong,
        tolerance=0,
        unit="values",
    )


def _peer_initial_patch(patch: Triple) -> Triple:
    """By the peer's trainer, of which it needs only the plan's patch and a log."""
    stand_in: Any = SimpleNamespace(
        configuration_manager=SimpleNamespace(patch_size=list(patch)), print_to_log_file=lambda *_: None
    )
    size = nnUNetTrainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size(stand_in)[2]
    return _triple(size)


def _peer_batch(
    cases: Mapping[str, StoredCase], batch_size: int, patch: Triple, final: Triple, seed: int
) -> tuple[dict[str, Any], list[list[_Draw]]]:
    """A batch of the peer's loader, and what it drew for each sample: the case first, then the place."""
    values = [1, 2, 3]
    labels = LabelManager({"background": 0, **{str(value): value for value in values}}, None)
    np.random.seed(seed)
    with _recorded() as draws:
        data = _PeerCases(cases, draws)
        loader = nnUNetDataLoader(data, batch_size, patch, final, labels, OVERSAMPLING)
        batch = next(loader)
        data.close_sample()
    chosen, *places = data.samples
    return batch, [[case, *place] for case, place in zip(chosen, places, strict=True)]


@contextmanager
def _recorded() -> Iterator[list[_Draw]]:
    """Notes every whole number that numpy's global generator gives to the peer."""
    draws: list[_Draw] = []
    choice, randint = np.random.choice, np.random.randint

    def note_randint(low: int, high: int) -> int:
        value = int(randint(low, high))
        draws.append(_Draw(int(low), int(high), value))
        return value

    def note_choice(a: Any, size: int | None = None, replace: bool = True, p: None = None) -> Any:
        assert replace
        assert p is None
        items = range(a) if isinstance(a, int) else a
        places = choice(len(items), size)
        draws.extend(_Draw(0, len(items), int(place)) for place in np.atleast_1d(places))
        return items[places] if size is None else [items[place] for place in places]

    with mock.patch.object(np.random, "choice", note_choice), mock.patch.object(np.random, "randint", note_randint):
        yield draws


def _random_cases(rng: np.random.Generator) -> dict[str, StoredCase]:
    """1 to 4 cases of random shapes; each label occurs in some of them only, and some have none."""
    channels = int(rng.integers(1, 4))
    return {f"case_{n}": _random_case(rng, f"case_{n}", channels) for n in range(int(rng.integers(1, 5)))}


def _random_case(rng: np.random.Generator, name: str, channels: int) -> StoredCase:
    shape = _triple(rng.integers(3, 41, 3))
    label = rng.choice(np.array([-1, 0, 0, 1, 2, 3], np.int16), shape)
    absent = [value for value in (1, 2, 3) if rng.random() < 0.4]
    label[np.isin(label, absent)] = 0
    return StoredCase(
        case_id=name,
        image=rng.standard_normal((channels, *shape)).astype(np.float32),
        label=label,
        foreground={value: np.argwhere(label == value).astype(np.int32) for value in (1, 2, 3)},
    )


def _random_patches(rng: np.random.Generator) -> tuple[Triple, Triple]:
    """The network's patch, and what is cut: as large (validation), by the rule (training), or with any margin."""
    final = _triple(rng.integers(4, 17, 3))
    margin = _triple(a + b for a, b in zip(final, rng.integers(0, 8, 3), strict=True))
    kinds = (final, initial_patch(final), margin)
    return final, kinds[int(rng.integers(3))]


def _differing(a: NDArray[Any], b: NDArray[Any]) -> int:
    """Values that differ; all of them where the shapes do."""
    return int(np.count_nonzero(a != b)) if a.shape == b.shape else max(a.size, 1)


def _triple(values: Iterable[Any]) -> Triple:
    d, h, w = (int(value) for value in values)
    return d, h, w
