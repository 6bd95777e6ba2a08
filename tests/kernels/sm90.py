"""Every Triton kernel compiled for an H100 or H200, without one: the interpreter accepts code that does not compile.

    python -m tests.kernels.sm90     a line of JSON a kernel: registers a thread, barriers, spilled bytes

Runs in a process of its own, because TRITON_INTERPRET, which the other tests set, must not be set here.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import components_triton as components
from kernels import instance_norm_act_backward_triton, instance_norm_act_triton

SM90 = GPUTarget("cuda", 90, 32)


@dataclass(frozen=True, kw_only=True, eq=False)
class Build:
    """A kernel with the types of its arguments ("*bf16", "i32", "fp32") and the values of its constants.

    divisible: the arguments that are multiples of 16, as a tensor's address is: Triton then loads 16 bytes at once.
    """

    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, int | float | bool | str | None]
    warps: int
    divisible: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Built:
    """What the compiled kernel takes: registers a thread, barriers of a block, bytes spilled to local memory."""

    name: str
    registers: int
    barriers: int
    spilled_bytes: int


def _norm_builds(value: str) -> tuple[Build, ...]:
    """The kernels of instance_norm_act for maps of one type: 32 channels, and 3, where nothing is aligned."""
    aligned, odd = ("voxels", "channels"), ()
    sizes = {"voxels": "i32", "channels": "i32"}
    builds = []
    for tile, multiples in (((128, 32), aligned), ((1024, 4), odd)):
        constants = {"TILE_VOXELS": tile[0], "TILE_CHANNELS": tile[1]}
        read = {"x": f"*{value}", "means": "*fp32", "squares": "*fp32"}
        maps = dict.fromkeys(("x", "residual", "out"), f"*{value}")
        vectors = dict.fromkeys(("mean", "rstd", "weight", "bias"), "*fp32")
        builds += [
            Build(
                kernel=instance_norm_act_triton.moments_kernel,
                types={**read, **sizes, "tiles": "i32"},
                constants=constants,
                warps=instance_norm_act_triton.WARPS,
                divisible=(*read, *multiples),
            ),
            Build(
                kernel=instance_norm_act_triton.apply_kernel,
                types={**maps, **vectors, **sizes, "slope": "fp32"},
                constants={"RESIDUAL": True, "ACT": True, **constants},
                warps=instance_norm_act_triton.WARPS,
                divisible=(*maps, *vectors, *multiples),
            ),
        ]
    return tuple(builds)


def _norm_combine(shares: int) -> Build:
    pointers = dict.fromkeys(("means", "squares", "mean", "rstd"), "*fp32")
    sizes = dict.fromkeys(("voxels", "channels", "shares", "share_voxels"), "i32")
    return Build(
        kernel=instance_norm_act_triton.combine_kernel,
        types={**pointers, **sizes, "eps": "fp32"},
        constants={"TILE_SHARES": shares, "TILE_CHANNELS": 16},
        warps=4,
        divisible=(*pointers, "voxels", "channels", "share_voxels"),
    )


def _gradient_builds(value: str) -> tuple[Build, ...]:
    """The kernels of its gradients: x_hat from y, from x, and from x where y tells the sign; the last one of 3 too."""
    aligned, odd = ("voxels", "channels"), ()
    builds = []
    for rows, channels, multiples, kinds in (
        (128, 32, aligned, ((True, False), (False, False), (False, True))),
        (1024, 4, odd, ((False, True),)),
    ):
        for recover, signs in kinds:
            read = dict.fromkeys(("towards", "kept", "signs"), f"*{value}")
            written = dict.fromkeys(("out", "through"), f"*{value}")
            vectors = dict.fromkeys(("mean", "rstd", "weight", "bias"), "*fp32")
            sums = dict.fromkeys(("sums", "products"), "*fp32")
            means = dict.fromkeys(("mean_sums", "mean_products"), "*fp32")
            sizes, slopes = {"voxels": "i32", "channels": "i32"}, {"slope": "fp32", "inverse": "fp32"}
            constants = {"RECOVER": recover, "SIGNS": signs, "ACT": True, "TILE_CHANNELS": channels}
            builds += [
                Build(
                    kernel=instance_norm_act_backward_triton.gradient_sums_kernel,
                    types={**read, **vectors, **sums, **sizes, **({"tiles": "i32"} if multiples else {}), **slopes},
                    constants={**constants, **({} if multiples else {"tiles": 1}), "TILE_VOXELS": rows // 2},
                    warps=instance_norm_act_triton.WARPS,
                    divisible=(*read, *vectors, *sums, *multiples),
                ),
                Build(
                    kernel=instance_norm_act_backward_triton.gradient_apply_kernel,
                    types={**read, **written, **vectors, **means, **sizes, **slopes},
                    constants={**constants, "THROUGH": signs, "TILE_VOXELS": rows},
                    warps=instance_norm_act_triton.WARPS,
                    divisible=(*read, *written, *vectors, *means, *multiples),
                ),
            ]
    return tuple(builds)


def _gradient_combine(tile_shares: int, **ones: int) -> Build:
    """ones: the arguments that are 1, which Triton takes for constants."""
    names = ("sums", "products", "mean_sums", "mean_products", "dweight", "dbias")
    sizes = {name: "i32" for name in ("samples", "voxels", "channels", "shares") if name not in ones}
    return Build(
        kernel=instance_norm_act_backward_triton.gradient_combine_kernel,
        types={**dict.fromkeys(names, "*fp32"), **sizes},
        constants={**ones, "TILE_SHARES": tile_shares, "TILE_CHANNELS": 16},
        warps=4,
        divisible=(*names, "voxels", "channels"),
    )


def _build(kernel: Any, types: str, *, warps: int, **constants: int | bool) -> Build:
    """types: "values *fp32 depth i32 ...", argument and type in turn."""
    words = types.split()
    return Build(kernel=kernel, types=dict(zip(words[::2], words[1::2], strict=True)), constants=constants, warps=warps)


def components_builds() -> Iterator[Build]:
    """Connected components: blocks for connectivity 26, voxels for 18 and 6; every type of map and every option."""
    trees, shape = "bits *u8 parents *i32", "depth i32 height i32 width i32 cells i32"
    wide, narrow = {"BLOCK": components.WIDE, "warps": 4}, {"BLOCK": components.COUNT, "warps": 1}
    for edge, maps in ((2, ("*fp32", "*fp16", "*bf16", "*u8")), (1, ("*fp32",))):
        for dtype in maps:
            arguments = f"values {dtype} background {dtype} threshold fp32 {trees} sizes *i32 {shape}"
            yield _build(components.pack_kernel, arguments, PAIR=dtype in ("*fp16", "*bf16"), EDGE=edge, **wide)
        for reach in (3,) if edge == 2 else (1, 2):
            arguments = f"{trees} height i32 width i32 cells i32"
            yield _build(components.merge_kernel, arguments, REACH=reach, EDGE=edge, BLOCK=components.MERGE, warps=1)
        for option in (False, True):
            arguments = f"{trees} sizes *i32 firsts *i32 {shape}"
            yield _build(components.count_kernel, arguments, FIRSTS=option, EDGE=edge, **narrow)
            arguments = f"{trees} numbers *i32 smallest i32 out {'*i32' if option else '*u8'} {shape}"
            yield _build(components.paint_kernel, arguments, NUMBERS=option, EDGE=edge, **wide)
    yield _build(components.flag_kernel, "sizes *i32 firsts *i32 flags *u8 cells i32", **wide)
    arguments = "sizes *i32 firsts *i32 ranks *i32 sizes_by_label *i32 cells i32"
    yield _build(components.number_kernel, arguments, **wide)
    arguments = "labels *i32 lower *i32 upper *i32 sums *i64 height i32 width i32 voxels i32"
    yield _build(components.table_kernel, arguments, **narrow)


BUILDS: tuple[Build, ...] = (
    *components_builds(),
    *(build for value in ("fp32", "bf16", "fp16") for build in _norm_builds(value)),
    *(_norm_combine(shares) for shares in (1, instance_norm_act_triton.SHARES)),
    *(build for value in ("fp32", "bf16", "fp16") for build in _gradient_builds(value)),
    _gradient_combine(instance_norm_act_triton.SHARES),
    _gradient_combine(1, samples=1, shares=1),
)


def built(build: Build) -> Built:
    """Compiles for sm_90 and reads the machine code."""
    signature = {**build.types, **dict.fromkeys(build.constants, "constexpr")}
    attributes = {(build.kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in build.divisible}
    source = ASTSource(fn=build.kernel, signature=signature, constexprs=dict(build.constants), attrs=attributes)
    compiled = triton.compile(source, target=SM90, options={"num_warps": build.warps})
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage, code = (_cuobjdump(flag, cubin) for flag in ("-res-usage", "-sass"))
    registers, local = (int(found[1]) for found in (re.search(r"REG:(\d+)", usage), re.search(r"LOCAL:(\d+)", usage)))  # type: ignore[index]
    return Built(
        name=build.kernel.fn.__name__, registers=registers, barriers=code.count("BAR.SYNC"), spilled_bytes=local
    )


def _cuobjdump(flag: str, cubin: Path) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, flag, cubin], check=True, capture_output=True, text=True).stdout


def main() -> None:
    """Prints every kernel of BUILDS as it was built."""
    for build in BUILDS:
        sys.stdout.write(json.dumps(asdict(built(build))) + "\n")


if __name__ == "__main__":
    main()
