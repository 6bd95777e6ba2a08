"""One case by MONAI's sliding_window_inference, files to files: the command that infer.py runs for it.

    .venv-peers/bin/python -m bench.monai_infer MODEL FOLDER_OF_SCANS OUT [--mirror]

MONAI tiles and averages; reading, preprocessing and the way back to the scan are strokenet's own, so that the two
differ in what MONAI is for. The network is torch's own layers in torch's own layout, as MONAI's users have it, with
autocast where `strokenet infer` takes less than float32, too.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import click
import torch
from monai.inferers.utils import sliding_window_inference
from torch import Tensor

from strokenet.data.case import read_case
from strokenet.data.dataset import input_cases
from strokenet.data.nifti import write_mask
from strokenet.infer.postprocess import postprocess
from strokenet.infer.restore import place_back, resample_logits
from strokenet.model.checkpoint import load_model
from strokenet.model.device import choose_device, choose_dtype
from strokenet.model.inference import TrainedForm
from strokenet.preprocess.preprocess import preprocess

TILES_AT_A_TIME = {"cpu": 1, "cuda": 4}  # sw_batch_size; 4 is what MONAI's tutorials take on a GPU


@click.command()
@click.argument("model_root", type=click.Path(path_type=Path, exists=True))
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--device", "device_name", default="cpu")
@click.option("--mirror", is_flag=True, help="Average all eight mirror images.")
def main(model_root: Path, folder: Path, out: Path, device_name: str, mirror: bool) -> None:
    """Segments the one case of FOLDER with a model of one lesion label, and writes OUT/CASE.nii.gz."""
    device = choose_device(device_name)
    model = load_model(model_root, device=device)
    plan = model.plan
    (files,) = input_cases(folder, plan.channels)
    case = read_case(files.case_id, dict(zip(plan.channels, files.images, strict=True)))
    prepared = preprocess(case, plan, device)
    network = TrainedForm(model.networks[0], choose_dtype("auto", device), device)
    with torch.inference_mode():
        answer = sliding_window_inference(
            prepared.image[None],
            roi_size=plan.patch,
            sw_batch_size=TILES_AT_A_TIME[device.type],
            predictor=_mirrored(network) if mirror else network,
            overlap=0.5,
            mode="gaussian",
        )
    assert isinstance(answer, Tensor)
    logits = answer[0].float()  # (2, D, H, W)
    lesion = resample_logits(logits[1:] - logits[:1], plan, prepared.origin)[0].sigmoid()
    mask = postprocess(torch.stack([1 - lesion, lesion]), plan.postprocess, case.geometry.voxel_volume_mm3)
    write_mask(out / f"{case.case_id}.nii.gz", place_back(mask, prepared.origin).cpu().numpy(), case.header)


def _mirrored(network: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The mean of a network's answers to a tile's eight mirror images, one after the other."""
    axes = [subset for count in range(4) for subset in itertools.combinations((2, 3, 4), count)]

    def mean(tiles: Tensor) -> Tensor:
        total = network(tiles)
        for subset in axes[1:]:
            total = total + network(tiles.flip(subset)).flip(subset)
        return total / len(axes)

    return mean


if __name__ == "__main__":
    main()
