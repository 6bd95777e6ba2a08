"""The trainer classes of nnunet 1.7.1, each built, against what the import says of them by their name."""

from __future__ import annotations

import copy
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import nn

from strokenet.nnunet.v1 import MIRRORING, OTHERWISE, UNMIRRORED
from tests.nnunet.v1_folders import Shape, parameters, plans
from tests.peers import peer
from tests.peers.row import Row

# isort: split
with peer.quiet():
    import nnunet.training.network_training as trainers
    from nnunet.network_architecture.generic_UNet import ConvDropoutNormNonlin, StackedConvLayers
    from nnunet.training.data_augmentation import default_data_augmentation
    from nnunet.training.network_training.nnUNetTrainer import nnUNetTrainer
    from nnunet.utilities.nd_softmax import softmax_helper


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a trainer class builds and does.

    fits: its parameters have the stock network's names and shapes. stock: it also computes what that does.
    mirror_axes: of its augmentation; None where the class cannot be built.
    """

    name: str
    fits: bool
    stock: bool
    mirror_axes: tuple[int, ...] | None


def trainer_row() -> Row:
    """What the import says of trainers by their name, against the classes."""
    facts = trainer_facts()
    wrong = [fact.name for fact in facts if not _claim_holds(fact)]
    cannot = sum(fact.mirror_axes is None for fact in facts)
    return Row(
        check="v1 trainers",
        on=f"network and mirroring of {len(facts)} classes by their name",
        difference=len(wrong),
        tolerance=0,
        unit="values",
        note=", ".join(wrong) or f"{cannot} cannot be built on this plan (cascades, other networks)",
    )


def _claim_holds(fact: Facts) -> bool:
    """A listed class is what its list says; one in no list is stock, or its parameters give it away."""
    name = fact.name.removeprefix("nnUNetTrainer")
    name = name[:-6] if name[-6:-1] == "_copy" else name
    if name in MIRRORING:
        return fact.stock and fact.mirror_axes == (0, 1, 2)
    if name in UNMIRRORED:
        return fact.stock and fact.mirror_axes == ()
    if name in OTHERWISE:
        return not fact.stock
    return "Cascade" in name or fact.stock or not fact.fits


def trainer_facts() -> list[Facts]:
    """Of every trainer class in nnunet, each built on a small isotropic plan."""
    shared = (
        default_data_augmentation.default_3D_augmentation_params,
        default_data_augmentation.default_2D_augmentation_params,
    )
    before = copy.deepcopy(shared)
    found = []
    for name, kind in sorted(_trainer_classes().items()):
        with peer.quiet(), _one_process(kind):
            found.append(_facts(name, kind, Shape(base=8)))
        for parameters_, stock in zip(shared, before, strict=True):
            parameters_.clear()  # the trainers change these dictionaries, which they share
            parameters_.update(copy.deepcopy(stock))
    return found


def _facts(name: str, kind: type, shape: Shape) -> Facts:
    known = inspect.signature(kind).parameters
    arguments = ["plans", 0, *([0] if "local_rank" in known else []), str(peer.FOLDER / "trainers"), str(peer.FOLDER)]
    try:
        trainer = kind(*arguments, True, 0, **({"fp16": True} if "fp16" in known else {}))
        trainer.print_to_log_file = trainer.initialize_optimizer_and_scheduler = lambda *_, **__: None
        trainer.plans = plans(shape)
        trainer.initialize(training=False)
    except Exception:  # a cascade without its first stage, a plan of another network
        return Facts(name=name, fits=False, stock=False, mirror_axes=None)
    network, augmentation = trainer.network, trainer.data_aug_params
    names = {key.removeprefix("module."): tuple(tensor.shape) for key, tensor in network.state_dict().items()}
    names = {key: size for key, size in names.items() if not key.startswith("seg_outputs") or key.endswith("weight")}
    return Facts(
        name=name,
        fits=names == parameters(shape),
        stock=names == parameters(shape) and _is_stock(trainer, network),
        mirror_axes=tuple(augmentation["mirror_axes"]) if augmentation["do_mirror"] else (),
    )


class _Wrapped(nn.Module):
    """Stands for DistributedDataParallel, which wants a group of processes: the network is its `module`."""

    def __init__(self, module: nn.Module, *_: Any, **__: Any):
        super().__init__()
        self.module = module


@contextmanager
def _one_process(kind: type) -> Iterator[None]:
    """For trainers of several GPUs: a group of one process that nobody opens."""
    with ExitStack() as stack:
        for function, value in (("init_process_group", None), ("get_world_size", 1), ("get_rank", 0)):
            stack.enter_context(mock.patch.object(torch.distributed, function, return_value=value))
        for module in {importlib.import_module(base.__module__) for base in kind.__mro__ if base is not object}:
            if hasattr(module, "DDP"):
                stack.enter_context(mock.patch.object(module, "DDP", _Wrapped))
        yield


def _is_stock(trainer: Any, network: nn.Module) -> bool:
    """Layers of the stock kind in the stock order, softmax at inference, labels instead of regions."""
    unet = getattr(network, "module", network)
    blocks = [module for module in unet.modules() if isinstance(module, StackedConvLayers)]
    layers = [layer for block in blocks for layer in block.blocks]
    return (
        all(type(layer) is ConvDropoutNormNonlin for layer in layers)
        and all(type(layer.instnorm) is nn.InstanceNorm3d for layer in layers)
        and all(type(layer.lrelu) is nn.LeakyReLU and layer.lrelu.negative_slope == 0.01 for layer in layers)
        and unet.inference_apply_nonlin is softmax_helper
        and trainer.regions_class_order is None
    )


def _trainer_classes() -> dict[str, type]:
    found = {}
    for module in pkgutil.walk_packages(trainers.__path__, f"{trainers.__name__}."):
        with peer.quiet():
            content = vars(importlib.import_module(module.name))
        found |= {
            name: kind
            for name, kind in content.items()
            if inspect.isclass(kind) and issubclass(kind, nnUNetTrainer) and kind.__module__ == module.name
        }
    return found
