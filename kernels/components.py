"""Connected components: from a probability map to a lesion mask (Meddahi 2024, IV.D).

    mask = probability > threshold
    a component of n voxels stays when  n * voxel volume > min_volume * (1 + 1e-6)

Arrays are labelled by cc3d, on the box around their foreground alone; nothing is labelled twice: sizes come from a
count of the labels, the mask from a boolean look-up table. 30 lesions in 197 x 233 x 189, one core: 12 ms, without the
box 73 ms. Tensors on a GPU are labelled there (components_triton.py), with the same answer voxel for voxel; other
tensors, and all of them with STROKENET_KERNELS=reference, take the array's way and return to their device.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, cast, overload

import cc3d
import numpy as np
from numpy.typing import NDArray

from kernels.dispatch import choose_components

if TYPE_CHECKING:  # arrays must not wait for torch to be imported
    from torch import Tensor

Connectivity = Literal[6, 18, 26]
Array = TypeVar("Array", "NDArray[np.int64]", "Tensor")

# A component of exactly the limit must fall on one side on every machine: 4 voxels of 1 mm3 are not above 4 mm3, even
# when the product of three float32 spacings is 1.0000001.
VOLUME_MARGIN = 1e-6


@dataclass(frozen=True, kw_only=True, eq=False)
class ComponentTable(Generic[Array]):
    """What a lesion table needs, a row a component in the order of the labels; all in voxels, axes (D, H, W).

    voxels: (n,) int64. first, last: (n, 3) int64, corners of the bounding box, both inside it.
    coordinate_sum: (n, 3) int64; the centroid is coordinate_sum / voxels.
    """

    voxels: Array
    first: Array
    last: Array
    coordinate_sum: Array


def smallest_size(*, voxel_volume_mm3: float, min_volume_mm3: float) -> int:
    """Voxels of the smallest component that stays; 1 where min_volume_mm3 is not above 0: all stay.

    Found with the inequality of this module's docstring itself, in float64, so that no device decides it differently.
    """
    if min_volume_mm3 <= 0:
        return 1
    limit = min_volume_mm3 * (1 + VOLUME_MARGIN)
    return 1 + bisect.bisect_left(range(1, 2**53), True, key=lambda size: size * voxel_volume_mm3 > limit)


@overload
def label_components(
    mask: NDArray[np.bool_] | NDArray[np.integer], connectivity: Connectivity = 26
) -> tuple[NDArray[np.integer], NDArray[np.int64]]: ...
@overload
def label_components(mask: Tensor, connectivity: Connectivity = 26) -> tuple[Tensor, Tensor]: ...
def label_components(
    mask: NDArray[np.bool_] | NDArray[np.integer] | Tensor, connectivity: Connectivity = 26
) -> tuple[NDArray[np.integer] | Tensor, NDArray[np.int64] | Tensor]:
    """Numbers the components of a mask in raster order of their first voxels, as scipy.ndimage.label does.

    Args:
        mask: (D, H, W), non-zero is foreground; an array, or a tensor on any device.
        connectivity: 6 (faces), 18 (edges) or 26 (corners).

    Returns:
        labels (D, H, W), int32 for a tensor, 0 is background, components 1 .. n; sizes (n + 1,) int64 in voxels,
        sizes[0] is the background. On a GPU the shape of sizes costs one synchronisation.
    """
    if not isinstance(mask, np.ndarray):
        return _label_tensor(mask, connectivity)
    binary = np.ascontiguousarray(mask != 0)
    labels, count = cc3d.connected_components(binary.view(np.uint8), connectivity=connectivity, return_N=True)
    foreground = np.count_nonzero(binary)
    if 4 * foreground > binary.size:
        return labels, np.bincount(labels.ravel(), minlength=count + 1).astype(np.int64, copy=False)
    # Few voxels are looked up faster than all are counted: for 1 % of a brain 4 ms, not 32.
    sizes = np.bincount(labels.ravel()[np.flatnonzero(binary)], minlength=count + 1)
    sizes[0] = binary.size - foreground
    return labels, sizes.astype(np.int64, copy=False)


@overload
def component_table(labels: NDArray[np.integer], sizes: NDArray[np.int64]) -> ComponentTable[NDArray[np.int64]]: ...
@overload
def component_table(labels: Tensor, sizes: Tensor) -> ComponentTable[Tensor]: ...
def component_table(
    labels: NDArray[np.integer] | Tensor, sizes: NDArray[np.int64] | Tensor
) -> ComponentTable[NDArray[np.int64]] | ComponentTable[Tensor]:
    """Size, bounding box and centre of every component, of what label_components returned; on labels' device.

    No synchronisation: the number of components is the shape of sizes.
    """
    if not isinstance(labels, np.ndarray):
        return _table_of_tensor(labels, cast("Tensor", sizes))
    count = len(sizes) - 1
    places = np.nonzero(labels)
    own = labels[places].astype(np.int64) - 1
    first, last, total = (np.zeros((count, 3), np.int64) for _ in range(3))
    for axis, place in enumerate(places):
        first[:, axis] = labels.shape[axis]
        np.minimum.at(first[:, axis], own, place)
        np.maximum.at(last[:, axis], own, place)
        np.add.at(total[:, axis], own, place)
    return ComponentTable(voxels=np.asarray(sizes)[1:], first=first, last=last, coordinate_sum=total)


@overload
def volume_filter(
    mask: NDArray[np.bool_], *, voxel_volume_mm3: float, min_volume_mm3: float, connectivity: Connectivity = 26
) -> NDArray[np.bool_]: ...
@overload
def volume_filter(
    mask: Tensor, *, voxel_volume_mm3: float, min_volume_mm3: float, connectivity: Connectivity = 26
) -> Tensor: ...
def volume_filter(
    mask: NDArray[np.bool_] | Tensor,
    *,
    voxel_volume_mm3: float,
    min_volume_mm3: float,
    connectivity: Connectivity = 26,
) -> NDArray[np.bool_] | Tensor:
    """The mask without the components whose volume is not above min_volume_mm3; 0 keeps all.

    (D, H, W) bool -> the same. A tensor on a GPU is filtered there, without synchronisation.
    """
    smallest = smallest_size(voxel_volume_mm3=voxel_volume_mm3, min_volume_mm3=min_volume_mm3)
    if isinstance(mask, np.ndarray):
        return _of_size(mask, smallest, connectivity)
    return _keep_large(_bytes(mask), 0.5, smallest, connectivity).bool()


@overload
def largest_k(mask: NDArray[np.bool_], k: int, *, connectivity: Connectivity = 26) -> NDArray[np.bool_]: ...
@overload
def largest_k(mask: Tensor, k: int, *, connectivity: Connectivity = 26) -> Tensor: ...
def largest_k(
    mask: NDArray[np.bool_] | Tensor, k: int, *, connectivity: Connectivity = 26
) -> NDArray[np.bool_] | Tensor:
    """The k largest components of a mask, of equals those with the lower labels; all where there are fewer.

    (D, H, W) bool -> the same. A tensor on a GPU is filtered there, without synchronisation.

    Raises:
        ValueError: k is below 0.
    """
    if k < 0:
        raise ValueError(f"the {k} largest components; k must be 0 or more")
    if not isinstance(mask, np.ndarray):
        return _largest_of_tensor(mask, k, connectivity)
    labels, sizes = label_components(mask, connectivity)
    keep = np.zeros(len(sizes), bool)
    keep[1 + np.argsort(-sizes[1:], kind="stable")[:k]] = True
    return np.asarray(keep[labels])


@overload
def lesion_mask(
    probability: NDArray[np.floating],
    *,
    threshold: float,
    voxel_volume_mm3: float,
    min_volume_mm3: float,
    connectivity: Connectivity = 26,
) -> NDArray[np.uint8]: ...
@overload
def lesion_mask(
    probability: Tensor,
    *,
    threshold: float,
    voxel_volume_mm3: float,
    min_volume_mm3: float,
    connectivity: Connectivity = 26,
) -> Tensor: ...
def lesion_mask(
    probability: NDArray[np.floating] | Tensor,
    *,
    threshold: float,
    voxel_volume_mm3: float,
    min_volume_mm3: float,
    connectivity: Connectivity = 26,
) -> NDArray[np.uint8] | Tensor:
    """Threshold, label, filter: the binary lesion mask of a probability map.

    Args:
        probability: (D, H, W), 0 .. 1; a tensor is float32, float16 or bfloat16.
        threshold: strict, lesion is above it, in float32.
        voxel_volume_mm3: product of the spacing. min_volume_mm3: strict. connectivity: 6, 18 or 26.

    Returns:
        mask (D, H, W) uint8, 0 or 1, on the map's device. On a GPU nothing is synchronised, and after a first call,
        which compiles, a CUDA graph may capture it.

    Raises:
        ValueError: a tensor of another type or number of axes, or of 2^31 voxels or so on a GPU.
    """
    if not isinstance(probability, np.ndarray):
        smallest = smallest_size(voxel_volume_mm3=voxel_volume_mm3, min_volume_mm3=min_volume_mm3)
        return _keep_large(_checked(probability), threshold, smallest, connectivity)
    above = probability > np.float32(threshold)
    kept = volume_filter(
        above, voxel_volume_mm3=voxel_volume_mm3, min_volume_mm3=min_volume_mm3, connectivity=connectivity
    )
    return kept.view(np.uint8)


def lesion_mask_of_logits(
    logits: Tensor,
    *,
    logit_threshold: float,
    voxel_volume_mm3: float,
    min_volume_mm3: float,
    connectivity: Connectivity = 26,
) -> Tensor:
    """`lesion_mask` of what a network of two labels gives, without a probability map in between.

    Lesion is where logits[1] - logits[0] > logit_threshold, in float32. A probability above p is a difference above
    log(p / (1 - p)), but for the rounding of the softmax. logits: (2, D, H, W); the rest as in lesion_mask.
    """
    if logits.ndim != 4 or len(logits) != 2:
        raise ValueError(f"logits of shape {tuple(logits.shape)}; allowed: (2, D, H, W)")
    smallest = smallest_size(voxel_volume_mm3=voxel_volume_mm3, min_volume_mm3=min_volume_mm3)
    lesion, background = _checked(logits[1]), logits[0].detach()
    return _keep_large(lesion, logit_threshold, smallest, connectivity, background)


def _box(mask: NDArray[np.bool_]) -> tuple[slice, slice, slice]:
    """The box around the foreground of a mask that has some; one pass over it, 1 ms for a brain."""
    depth = np.flatnonzero(mask.any(axis=(1, 2)))
    plane: NDArray[np.bool_] = np.asarray(mask[depth[0] : depth[-1] + 1].any(axis=0))
    height, width = np.flatnonzero(plane.any(axis=1)), np.flatnonzero(plane.any(axis=0))
    d, h, w = (slice(int(used[0]), int(used[-1]) + 1) for used in (depth, height, width))
    return d, h, w


def _of_size(mask: NDArray[np.bool_], smallest: int, connectivity: Connectivity) -> NDArray[np.bool_]:
    """The components of at least `smallest` voxels."""
    if smallest <= 1 or not mask.any():
        return mask
    kept, box = np.zeros_like(mask), _box(mask)
    labels, sizes = label_components(mask[box], connectivity)
    keep = sizes >= smallest
    keep[0] = False
    kept[box] = keep[labels]
    return kept


def _on_gpu(tensor: Tensor) -> bool:
    return choose_components(tensor.device.type).implementation == "triton"


def _checked(values: Tensor) -> Tensor:
    allowed = ("torch.float32", "torch.float16", "torch.bfloat16")
    if values.ndim != 3 or str(values.dtype) not in allowed:
        given = f"a map of shape {tuple(values.shape)} and {values.dtype}"
        raise ValueError(f"{given}; allowed: (D, H, W) of {', '.join(allowed)}")
    return values.detach()


def _bytes(mask: Tensor) -> Tensor:
    """1 where a mask is not 0, (D, H, W) uint8."""
    return (mask.detach() != 0).byte()


def _keep_large(
    values: Tensor, threshold: float, smallest: int, connectivity: Connectivity, background: Tensor | None = None
) -> Tensor:
    """Components of at least `smallest` voxels where values (- background) > threshold. (D, H, W) uint8."""
    if _on_gpu(values):
        from kernels.components_triton import keep_large_triton

        return keep_large_triton(
            values, threshold=threshold, smallest=smallest, connectivity=connectivity, background=background
        )
    difference = values.float() if background is None else values.float() - background.float()
    mask: NDArray[np.bool_] = _array(difference) > np.float32(threshold)
    return _like(values, _of_size(mask, smallest, connectivity).view(np.uint8))


def _label_tensor(mask: Tensor, connectivity: Connectivity) -> tuple[Tensor, Tensor]:
    if _on_gpu(mask) and mask.numel() > 0:
        from kernels.components_triton import label_triton

        labels, sizes, count = label_triton(_bytes(mask), connectivity)
        sizes = sizes[: 1 + int(count)].long()  # the synchronisation
        sizes[0] = mask.numel() - sizes.sum()
        return labels, sizes
    found, voxels = label_components(_array(_bytes(mask)), connectivity)
    return _like(mask, found.astype(np.int32)), _like(mask, voxels)


def _largest_of_tensor(mask: Tensor, k: int, connectivity: Connectivity) -> Tensor:
    if _on_gpu(mask):
        from kernels.components_triton import largest_k_triton

        return largest_k_triton(_bytes(mask), k, connectivity).bool()
    return _like(mask, largest_k(_array(_bytes(mask)).view(np.bool_), k, connectivity=connectivity))


def _table_of_tensor(labels: Tensor, sizes: Tensor) -> ComponentTable[Tensor]:
    if _on_gpu(labels):
        from kernels.components_triton import table_triton

        first, last, total = table_triton(labels, len(sizes) - 1)
        return ComponentTable(voxels=sizes[1:], first=first.long(), last=last.long(), coordinate_sum=total)
    table = component_table(_array(labels), _array(sizes))
    rows = (_like(labels, row) for row in (table.voxels, table.first, table.last, table.coordinate_sum))
    return ComponentTable(**dict(zip(("voxels", "first", "last", "coordinate_sum"), rows, strict=True)))


def _array(tensor: Tensor) -> NDArray[Any]:
    return np.asarray(tensor.cpu().numpy())


def _like(tensor: Tensor, array: NDArray[Any]) -> Tensor:
    """The array as a tensor on the other one's device."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(array)).to(tensor.device)
