"""Checkpoints and pickles cut short, changed or put together: the right values, or one line."""

from __future__ import annotations

import collections
import pickle
import random
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from strokenet.data.errors import InputError
from strokenet.nnunet.checkpoints import load_checkpoint
from strokenet.nnunet.foreign import parameters
from strokenet.nnunet.pickles import load_pickle
from tests.nnunet import v1_folders
from tests.nnunet.hostile import LONGEST, Touch, save_legacy, save_zip


def rewritten(source: Path, target: Path, *more: tuple[str, bytes]) -> None:
    """A copy of an archive with more entries, which may have a name that is there already."""
    with warnings.catch_warnings(), zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        warnings.simplefilter("ignore")  # of a name used twice
        root = old.namelist()[0].partition("/")[0]
        for name, content in [*((name, old.read(name)) for name in old.namelist()), *more]:
            new.writestr(name.replace("ROOT", root), content)


@pytest.mark.parametrize("name", ["ROOT/data.pkl", "other/data.pkl", "ROOT/data/0", "data.pkl"])
def test_an_archive_that_names_an_entry_twice_is_refused(tmp_path: Path, name: str) -> None:
    save_zip(tmp_path / "good", {"a": torch.ones(3)})
    rewritten(tmp_path / "good", tmp_path / "same")
    assert load_checkpoint(tmp_path / "same")["a"].read().tolist() == [1.0, 1.0, 1.0]
    rewritten(tmp_path / "good", tmp_path / "file", (name, pickle.dumps({"a": 2}, 2)))
    with pytest.raises(InputError, match="file: "):
        load_checkpoint(tmp_path / "file")


def test_an_old_checkpoint_with_an_archive_behind_it_is_the_old_one(tmp_path: Path) -> None:
    """Torch goes by the first bytes; Python's zipfile would find the archive."""
    save_legacy(tmp_path / "old", {"a": 1})
    save_zip(tmp_path / "new", {"a": Touch(tmp_path / "made")})
    (tmp_path / "file").write_bytes((tmp_path / "old").read_bytes() + (tmp_path / "new").read_bytes())
    assert zipfile.is_zipfile(tmp_path / "file")
    assert load_checkpoint(tmp_path / "file") == {"a": 1}
    assert not (tmp_path / "made").exists()


def test_an_archive_with_an_old_checkpoint_before_it_is_refused_where_that_runs_something(tmp_path: Path) -> None:
    save_legacy(tmp_path / "old", {"a": Touch(tmp_path / "made")})
    save_zip(tmp_path / "new", {"a": 1})
    (tmp_path / "file").write_bytes((tmp_path / "old").read_bytes() + (tmp_path / "new").read_bytes())
    with pytest.raises(InputError, match="mkdir, which is not allowed"):
        load_checkpoint(tmp_path / "file")


def trained(path: Path, form: str) -> Callable[[Path], Any]:
    """Writes a good file, small enough that most of its bytes are not numbers. Returns what reads and checks it."""
    if form == "pickle":
        v1_folders.write_pickle(path, v1_folders.record(v1_folders.plans()))
        return load_pickle
    weights = collections.OrderedDict(a=torch.arange(6.0).view(2, 3), b=torch.nn.Parameter(torch.ones(4)))
    content = {"weights": weights, "best": [np.float64(0.5), np.float32(1)], "device": torch.device("cpu")}
    (save_zip if form == "zip" else save_legacy)(path, content)
    return lambda file: parameters(load_checkpoint(file).get("weights"), file)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_a_file_cut_short_anywhere_says_to_copy_it_again(tmp_path: Path, form: str) -> None:
    read = trained(tmp_path / "file", form)
    content = (tmp_path / "file").read_bytes()
    read(tmp_path / "file")
    for length in [*range(0, len(content), max(len(content) // 100, 1)), len(content) - 1]:
        (tmp_path / "file").write_bytes(content[:length])
        with pytest.raises(InputError, match="download or copy it again") as caught:
            read(tmp_path / "file")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_a_file_of_a_few_wrong_bytes_is_read_or_refused(tmp_path: Path, form: str) -> None:
    read = trained(tmp_path / "file", form)
    content = (tmp_path / "file").read_bytes()
    refused = 0
    for seed in range(400):
        rng, changed = random.Random(seed), bytearray(content)
        for _ in range(rng.choice((1, 1, 2, 5))):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        (tmp_path / "file").write_bytes(changed)
        said = line_of(read, tmp_path / "file")
        refused += bool(said)
        assert not said or said.startswith(f"{tmp_path / 'file'}: ")
        assert len(said) < LONGEST
    assert 100 < refused < 400


def line_of(read: Callable[[Path], Any], file: Path) -> str:
    """What is said of a file that is refused, nothing of one that is read. Any other error comes through."""
    try:
        read(file)
    except InputError as error:
        return str(error)
    return ""
