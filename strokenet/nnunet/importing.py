"""Import: a trained nnU-Net, v1 or v2, as a model folder of ours.

Comes in: a results folder that a stranger may have made. Goes out: MODEL/plan.json and MODEL/fold_K/ with safetensors.
Everything is read and checked before the first byte is written, and the folder appears in one rename.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from strokenet.data.errors import InputError
from strokenet.data.files import new_folder
from strokenet.model.checkpoint import save_weights
from strokenet.nnunet.foreign import SHOWN, ForeignModel
from strokenet.nnunet.plans import PLANS
from strokenet.nnunet.v1 import PLANS as V1_PLANS
from strokenet.nnunet.v1 import read_v1
from strokenet.nnunet.v2 import read_v2
from strokenet.workspace import Workspace

SEARCHED = 4  # levels below the folder given, in which a results folder is looked for to name it


def import_nnunet(source: Path, out: Path) -> ForeignModel:
    """Reads the nnU-Net results folder `source` and writes the model folder `out`; `infer` takes it at once.

    Raises:
        InputError: no nnU-Net model, one that is unsafe, damaged or not supported, or `out` is there already.
    """
    if source.is_file():
        raise InputError(f"{source}: is a file; give the results folder of a trained nnU-Net, an archive unpacked")
    if not source.is_dir():
        raise InputError(f"{source}: no such folder; give the results folder of a trained nnU-Net")
    model = _read(source)
    with new_folder(out) as folder:
        workspace = Workspace(folder)
        workspace.write_plan(model.plan)
        note = {"source": f"nnU-Net {model.generation}", "trainer": model.trainer}
        for fold, weights in model.weights.items():
            files = workspace.fold(fold)
            save_weights(files.last if model.checkpoint == "final" else files.best, weights, note=note)
    return model


def _read(source: Path) -> ForeignModel:
    if (source / PLANS).is_file():
        return read_v2(source)
    if (source / V1_PLANS).is_file():
        return read_v1(source)
    if Workspace(source).plan_file.is_file():
        raise InputError(f"{source}: is a model of strokenet already; `strokenet infer` takes it")
    near = [path for path in _below(source) + list(source.absolute().parents[:2]) if _is_results_folder(path)]
    hint = (
        f"give {' or '.join(str(path) for path in near[:SHOWN])}"
        if near
        else "give a TRAINER__PLANS__3d_fullres folder"
    )
    raise InputError(f"{source}: holds neither {PLANS} (nnU-Net v2) nor {V1_PLANS} (v1); {hint}")


def _below(source: Path) -> list[Path]:
    found = []
    for depth in range(1, SEARCHED + 1):
        with suppress(OSError):  # a folder that may not be read is none that helps
            found += sorted(source.glob("*/" * depth))
    return found


def _is_results_folder(path: Path) -> bool:
    with suppress(OSError):
        return (path / PLANS).is_file() or (path / V1_PLANS).is_file()
    return False
