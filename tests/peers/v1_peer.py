"""The peer's side of tests/peers/v1.py: nnunet 1.7.1 building, saving and running models on a CPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import nibabel
import numpy as np
import torch
from numpy.typing import NDArray
from skimage.transform import resize
from torch import nn

from tests.nnunet.v1_folders import Shape
from tests.peers import peer

# isort: split
with peer.quiet():
    from nnunet.inference import segmentation_export
    from nnunet.inference.predict import predict_cases
    from nnunet.network_architecture.generic_UNet import Generic_UNet
    from nnunet.network_architecture.initialization import InitWeights_He
    from nnunet.preprocessing import preprocessing
    from nnunet.training.model_restore import load_model_and_checkpoint_files
    from nnunet.training.network_training.nnUNetTrainerV2 import nnUNetTrainerV2

CHECKPOINT = "model_final_checkpoint"


@dataclass(frozen=True, kw_only=True, eq=False)
class Answer:
    """image: what the network saw, (C, D, H, W). probability (K, D, H, W) and mask (D, H, W): on the scan's grid."""

    image: NDArray[np.float32]
    probability: NDArray[np.float32]
    mask: NDArray[np.uint8]


@contextmanager
def mended() -> Iterator[None]:
    """nnunet 1.7.1 amid newer packages than its own.

    torch.load: reads tensors alone since torch 2.6; v1's checkpoints hold numpy's numbers too.
    resize_segmentation: batchgenerators of that time gave a voxel to the last label with one half or more; 0.25.5 gives
    it to the largest share, and where shares are even to the nearest. v1's models were trained on masks of the former.
    """
    with (
        mock.patch.object(torch, "load", partial(torch.load, weights_only=False)),
        mock.patch.object(preprocessing, "resize_segmentation", _resize_segmentation),
    ):
        yield


def generic_unet(shape: Shape) -> nn.Module:
    """The network as nnUNetTrainerV2 calls it."""
    return Generic_UNet(
        shape.channels,
        shape.base,
        shape.classes,
        len(shape.pools),
        shape.convs,
        2,
        nn.Conv3d,
        nn.InstanceNorm3d,
        {"eps": 1e-5, "affine": True},
        nn.Dropout3d,
        {"p": 0, "inplace": True},
        nn.LeakyReLU,
        {"negative_slope": 1e-2, "inplace": True},
        True,
        False,
        lambda x: x,
        InitWeights_He(1e-2),
        [list(pool) for pool in shape.pools],
        [list(kernel) for kernel in shape.kernels],
        False,
        True,
        True,
    )


def save_model(
    source: Path, stored: Mapping[str, Any], *, folds: int, mirror_axes: tuple[int, ...] = (0, 1, 2)
) -> None:
    """A results folder written by nnUNetTrainerV2 after one step of its optimizer; weights as `_draw` makes them."""
    source.mkdir(parents=True)
    plans_file = source.parent / f"{source.name}.pkl"
    peer_pickle(plans_file, stored)
    for fold in range(folds):
        with peer.quiet():
            trainer = nnUNetTrainerV2(
                str(plans_file), fold, str(source), str(source.parent / "Task777_Stroke"), False, 0, True, False, True
            )
            trainer.initialize(training=False)
            trainer._maybe_init_amp()
            trainer.network(torch.ones(1, trainer.num_input_channels, *trainer.patch_size))[0].mean().backward()
            trainer.optimizer.step()
            _draw(trainer.network, seed=fold)
            loss = np.mean([np.array(-0.5, np.float32)])  # as run_training collects them
            trainer.all_tr_losses, trainer.all_val_losses = [loss], [loss]
            trainer.all_val_eval_metrics = [np.mean([np.float64(0.4)])]
            trainer.best_MA_tr_loss_for_patience = loss
            trainer.data_aug_params = {**trainer.data_aug_params, "mirror_axes": mirror_axes}
            trainer.save_debug_information()
            trainer.save_checkpoint(str(source / f"fold_{fold}" / f"{CHECKPOINT}.model"))


def peer_pickle(path: Path, value: Any) -> None:
    from batchgenerators.utilities.file_and_folder_operations import save_pickle

    save_pickle(value, str(path))


def answer(source: Path, images: Sequence[Path], out: Path, *, folds: int, mirrored: bool) -> Answer:
    """The steps of predict_cases in one process, so that the resampled probabilities can be caught in float32."""
    with peer.quiet(), mended():
        trainer, checkpoints = load_model_and_checkpoint_files(
            str(source), list(range(folds)), mixed_precision=False, checkpoint_name=CHECKPOINT
        )
        image, _, properties = trainer.preprocess_patient([str(path) for path in images])
        softmax = np.zeros(1, np.float32)
        for checkpoint in checkpoints:
            trainer.load_checkpoint_ram(checkpoint, False)
            softmax = (
                softmax
                + trainer.predict_preprocessed_data_return_seg_and_softmax(
                    image,
                    do_mirroring=mirrored,
                    mirror_axes=trainer.data_aug_params["mirror_axes"],
                    use_sliding_window=True,
                    step_size=0.5,
                    use_gaussian=True,
                    all_in_gpu=False,
                    mixed_precision=False,
                )[1]
            )
        softmax /= len(checkpoints)
        softmax = softmax.transpose([0] + [axis + 1 for axis in trainer.plans["transpose_backward"]])
        resampled = _exported(softmax, out, properties)
    mask = nibabel.load(out).get_fdata().astype(np.uint8).T
    return Answer(image=image, probability=_placed(resampled, properties), mask=mask)


def command_mask(source: Path, images: Sequence[Path], out: Path) -> NDArray[np.uint8]:
    """What nnUNet_predict runs: its processes and queues, all mirrored, every fold. (D, H, W)."""
    with peer.quiet(), mended():
        predict_cases(
            str(source), [[str(path) for path in images]], [str(out)], None, False, 1, 1, mixed_precision=False
        )
    mask: NDArray[np.uint8] = nibabel.load(out).get_fdata().astype(np.uint8).T
    return mask


def _draw(network: nn.Module, *, seed: int) -> None:
    """Random norms and biases too, and heads that give logits about zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in network.named_parameters():
            drawn = torch.randn(tensor.shape, generator=generator)
            if tensor.ndim == 1:
                tensor.copy_(0.3 * drawn + ("instnorm.weight" in name))
            else:
                tensor.copy_(drawn * (2 / np.prod(tensor.shape[1:])) ** 0.5)
            if name.startswith("seg_outputs"):
                tensor.sub_(tensor.mean(1, keepdim=True))


def _exported(softmax: NDArray[np.float32], out: Path, properties: Any) -> NDArray[np.float32]:
    """Writes the mask; returns the probabilities on the crop's own grid."""
    resampled = [softmax]
    original = segmentation_export.resample_data_or_seg

    def kept(*arguments: Any, **options: Any) -> Any:
        resampled.append(original(*arguments, **options))
        return resampled[-1]

    with mock.patch.object(segmentation_export, "resample_data_or_seg", kept):
        segmentation_export.save_segmentation_nifti_from_softmax(softmax, str(out), properties)
    return resampled[-1]


def _placed(cropped: NDArray[np.float32], properties: Any) -> NDArray[np.float32]:
    """(K, *crop) -> (K, D, H, W), background outside."""
    full = np.zeros((len(cropped), *properties["original_size_of_raw_data"]), np.float32)
    full[0] = 1
    box = tuple(slice(start, stop) for start, stop in properties["crop_bbox"])
    full[(slice(None), *box)] = cropped
    return full


def _resize_segmentation(label: NDArray[Any], shape: Any, order: int = 3) -> NDArray[Any]:
    resized = np.zeros(shape, label.dtype)
    for value in np.unique(label):
        share = resize((label == value).astype(float), shape, order, mode="edge", clip=True, anti_aliasing=False)
        resized[share >= 0.5] = value
    return resized
