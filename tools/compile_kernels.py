"""Compile every kernel for a few GPU generations, without a GPU; print registers, spills and shared memory.

Each kernel is compiled for each head size; an e4m3 cache, sinks and split lists for heads of 128, and every page size
on Hopper.
Fails if one does not compile or needs more shared memory than its GPU has, or if a Triton that has Gluon lacks what the
Hopper kernel uses.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import functools
import importlib
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import torch
import triton
from packaging.version import Version
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vllm_flashprefill.kernels import block_mean, block_select, configs, parts, sparse_attention, value_tiles
from vllm_flashprefill.kernels.descriptors import TensorDescriptor

# None where this Triton has no Gluon for Hopper.
hopper, hopper_e4m3, hopper_fp8 = (getattr(sparse_attention, name) for name in ("hopper", "hopper_e4m3", "hopper_fp8"))

# What configs.gpu_kind says of them, and the bytes of shared memory a block may have.
ARCHS = {80: "ampere", 86: "small", 89: "small", 90: "hopper", 100: "blackwell", 120: "small"}
SHARED_MEMORY = {arch: {"ampere": 163, "small": 99}.get(kind, 227) << 10 for arch, kind in ARCHS.items()}
# By argument name; Q is q's dtype, KV the cache's, T the output's. Any other pointer is to int32.
POINTERS = {
    "q_ptr": "*Q",
    "k_ptr": "*KV",
    "v_ptr": "*KV",
    "out_ptr": "*T",
    "mean_ptr": "*fp16",
    "piece_ptr": "*fp16",
    "scores_ptr": "*fp32",
    "block_counts_ptr": "*i64",
    "sums_ptr": "*fp32",
    "sinks_ptr": "*T",
    "q_scale_ptr": "*fp32",
    "k_scale_ptr": "*fp32",
    "v_scale_ptr": "*fp32",
}
# By what is said of them: blocks as they are, and in 16 pieces.
PIECES = {"": dict(PIECES=0), " with pieces": dict(PIECES=16)}
FLOATS = ("scale", "log2_alpha", "log2_candidate")


@dataclasses.dataclass(frozen=True)
class Case:
    """One kernel to compile. values: of its constants, and of some that other kernels have; absent: None arguments, and
    q_codes where queries are in 16 bits."""

    label: str
    kernel: triton.JITFunction
    arch: int
    dtype: str
    values: dict
    absent: tuple[str, ...] = ()

    @property
    def kv_dtype(self) -> str:
        return "u8" if self.values["FP8"] else self.dtype

    @property
    def q_dtype(self) -> str:
        return self.dtype if {"q_scale_ptr", "q_codes"} & set(self.absent) else "u8"


def cases(arch: int, dtype: str, head_size: int, page_sizes: list[int], fp8: list[bool]) -> Iterator[Case]:
    kind = ARCHS[arch]
    common = dict(
        HEAD_SIZE=head_size, BLOCK=128, NUM_HEADS=32, GROUP=4, FP8=False, FP8_NATIVE=arch >= 89,
        NUM_SINK_BLOCKS=2, NUM_WINDOW_BLOCKS=4, BLOCK_LIST=512, Q_COLUMNS=head_size, KV_COLUMNS=head_size,
        PIECES=0, PAGE_SIZE=0, HAS_SINKS=False, SPLIT=False, ROWS=parts.ROWS,
    )  # fmt: skip

    def case(kernel, name, launch, absent=(), **values):
        values = {**common, **launch, **values}
        return Case(f"sm_{arch} {dtype} d{head_size} {name}", kernel, arch, dtype, values, tuple(absent))

    def launch_values(config):
        return {
            "BLOCK_N": config.block_n, "NUM_STAGES": config.num_stages, "num_warps": config.num_warps,
            "USE_TMA": getattr(config, "tma", False), "BY_HEAD": getattr(config, "by_head", False),
            "maxnreg": getattr(config, "max_registers", None),
            "BLOCK_PIECES": getattr(config, "block_pieces", None),
            "PIECE_STAGES": getattr(config, "piece_stages", None),
            "ONE_LOOP": getattr(config, "one_loop", None),
        }  # fmt: skip

    for name, values in PIECES.items():
        select = {**configs.SELECT, **(configs.SELECT_PIECES if values["PIECES"] else {})}[kind, head_size]
        whole = ["piece_ptr"] * (not values["PIECES"])
        kinds = {"": ["q_scale_ptr", "parts_ptr"]}
        if 0 in page_sizes:
            kinds[", uncounted"] = ["q_scale_ptr", "parts_ptr", "block_counts_ptr"]
        if True in fp8:
            kinds[", e4m3 queries"] = ["parts_ptr"]
            kinds[", split"] = ["q_scale_ptr"]
        for counted, absent in kinds.items():
            yield case(
                block_select._block_select_kernel, f"block_select{name}{counted}", launch_values(select),
                (*whole, *absent), **values,
            )  # fmt: skip
    yield case(parts._join_parts_kernel, "join_parts", {"num_warps": 4}, ["sinks_ptr"])
    tables = {
        "": (sparse_attention._sparse_attention_kernel, configs.ATTENTION),
        " tma": (sparse_attention._sparse_attention_kernel, configs.ATTENTION_TMA),
        " gluon": (getattr(hopper, "_sparse_attention_hopper_kernel", None), configs.ATTENTION_GLUON),
    }
    e4m3_tables = {
        **tables,
        " gluon": (getattr(hopper_e4m3, "_sparse_attention_hopper_e4m3_kernel", None), configs.ATTENTION_GLUON),
        " fp8": (getattr(hopper_fp8, "_sparse_attention_hopper_fp8_kernel", None), configs.ATTENTION_GLUON),
    }
    for page_size in page_sizes:
        for is_fp8 in fp8:
            if is_fp8 and not page_size:
                continue
            absent = ["block_table_ptr"] * (not page_size) + ["k_scale_ptr", "v_scale_ptr"] * (not is_fp8)
            queries = {"": ["q_scale_ptr"], ", e4m3 queries": []} if is_fp8 else {"": ["q_scale_ptr"]}
            paged = dict(PAGE_SIZE=page_size, FP8=is_fp8)
            name = f"page {page_size}{' e4m3' if is_fp8 else ''}"
            for pieces, values in PIECES.items():
                whole = ["piece_ptr"] * (not values["PIECES"])
                kernel = block_mean._block_mean_kernel
                values = {**paged, **values}
                yield case(kernel, f"block_mean{pieces} {name}", {"num_warps": 4}, (*absent, *whole), **values)
            if is_fp8 and (kind, head_size) in configs.ATTENTION_GLUON:
                kernel = value_tiles._value_tiles_kernel
                yield case(kernel, f"value_tiles {name}", {"num_warps": 4}, **paged)
            for suffix, (kernel, table) in (e4m3_tables if is_fp8 else tables).items():
                config = table.get((kind, head_size))
                if config is None or kernel is None:
                    continue
                if config.tma and TensorDescriptor is None:
                    continue
                if config.gluon:
                    paged["BOX"] = hopper.box_rows(page_size, 128)
                elif config.tma and page_size % config.block_n:
                    continue
                descriptors = () if config.tma else ("k_desc", "v_desc")
                sinks, split = ([] if config.gluon else x for x in (["sinks_ptr"], ["parts_ptr", "sums_ptr"]))
                kinds = {what: [*scale, *sinks, *split] for what, scale in queries.items()}
                if suffix == " fp8":
                    kinds = {", e4m3 queries": []}
                elif config.gluon and is_fp8:
                    # Its scales are always there.
                    kinds = {"": ["q_codes"], ", e4m3 queries": []}
                if page_size and True in fp8:
                    if not is_fp8:
                        kinds[", sinks"] = ["q_scale_ptr", *split]
                    what, missing = next(iter(kinds.items()))
                    kinds[what + ", split"] = [name for name in missing if name not in split]
                for what, missing in kinds.items():
                    yield case(
                        kernel,
                        f"sparse_attention{suffix} {name}{what}",
                        launch_values(config),
                        (*absent, *descriptors, *missing),
                        **paged,
                        HAS_SINKS=what == ", sinks",
                        SPLIT=what.endswith(", split"),
                    )


def skipped() -> Iterator[str]:
    """What this Triton cannot compile, and why."""
    if TensorDescriptor is None:
        yield "sparse_attention tma: this Triton has no triton.tools.tensor_descriptor (3.4 has)"
    if hopper is None and Version(triton.__version__) < Version("3.5"):
        yield "sparse_attention gluon: this Triton has no Gluon for Hopper (3.5 has)"
    elif hopper is None:
        # Raises.
        importlib.import_module("vllm_flashprefill.kernels.sparse_attention_hopper")


def compile_case(case: Case):
    """Compile one kernel, its arguments typed by their names and annotations."""
    kernel, is_gluon = case.kernel, getattr(case.kernel, "is_gluon", bool)()
    constants = {name: None for name in case.absent if name in kernel.arg_names}
    signature, attributes = {}, {}
    for index, param in enumerate(kernel.params):
        name = param.name
        if param.is_constexpr:
            constants[name] = case.values[name]
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_desc"):
            signature[name] = descriptor_type(case, name, is_gluon)
        elif name.endswith("_ptr"):
            kind = POINTERS.get(name, "*i32")
            kinds = {"*T": case.dtype, "*Q": case.q_dtype, "*KV": case.kv_dtype}
            signature[name] = f"*{kinds[kind]}" if kind in kinds else kind
        else:
            signature[name] = "fp32" if name in FLOATS else param.annotation_type or "i32"
        if signature[name][0] in "*iu" and not param.do_not_specialize:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source_type = ASTSource
    if is_gluon:
        from triton.experimental.gluon._runtime import GluonASTSource as source_type
    source = source_type(kernel, signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": case.values["num_warps"], "maxnreg": case.values.get("maxnreg")}
    return triton.compile(source, target=GPUTarget("cuda", case.arch, 32), options=options)


def descriptor_type(case: Case, name: str, is_gluon: bool) -> str:
    head_size = case.values["HEAD_SIZE"]
    if not is_gluon:
        return f"tensordesc<{case.kv_dtype}{[case.values['BLOCK_N'], head_size]}>"
    if case.values["FP8"]:
        return e4m3_descriptor_type(case, name)
    shape = [64, head_size] if name == "q_desc" else [case.values["BOX"], hopper.PANEL]
    return f"tensordesc<{case.kv_dtype}{shape},{hopper.tile_layout(2)!r}>"


def e4m3_descriptor_type(case: Case, name: str) -> str:
    head_size = case.values["HEAD_SIZE"]
    layout, dtype = hopper_e4m3.codes_layout(head_size), "fp8e4nv"
    shape = [case.values["BOX"], head_size]
    if name == "q_desc":
        shape = [64, head_size]
        if case.q_dtype != "u8":
            layout, dtype = hopper.tile_layout(2), case.dtype
    elif name == "v_desc" and case.kernel is hopper_fp8._sparse_attention_hopper_fp8_kernel:
        # Of values transposed.
        layout, shape = hopper_e4m3.codes_layout(128), [head_size, 128]
    return f"tensordesc<{dtype}{shape},{layout!r}>"


@functools.cache
def cuobjdump() -> str:
    return os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/cuobjdump")


def usage(case: Case) -> tuple[str, int]:
    """What a kernel takes of its GPU, in words, and the bytes it spills."""
    compiled = compile_case(case)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [cuobjdump(), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    # The kernels have no arrays of their own, so that all of the stack is spills.
    registers, spills = (int(re.search(rf"{name}:(\d+)", text).group(1)) for name in ("REG", "STACK"))
    shared = compiled.metadata.shared
    if shared > SHARED_MEMORY[case.arch]:
        raise RuntimeError(f"needs {shared} bytes of shared memory, sm_{case.arch} has {SHARED_MEMORY[case.arch]}")
    return f"{registers} registers, {spills} bytes spilled, {shared} bytes shared", spills


# Known to the forked processes, to which a kernel cannot be sent.
CASES: list[Case] = []


def outcome(number: int) -> tuple[str, int | None]:
    """A line on one of CASES, and the bytes it spills, None if it failed."""
    case = CASES[number]
    try:
        with contextlib.redirect_stdout(None):
            text, spills = usage(case)
    except Exception as error:
        text, spills = f"FAILED {type(error).__name__}: {str(error)[:1000]}", None
    return f"{case.label}: {text}", spills


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHS, default=list(ARCHS))
    parser.add_argument("--dtype", nargs="+", default=["bf16"])
    parser.add_argument("--head-size", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--page-size", type=int, nargs="+", default=[0, 16, 128], help="on sm_90, heads of 128")
    parser.add_argument("--brief", action="store_true", help="sm_90, heads of 128, pages of 128")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    args = parser.parse_args()
    if args.brief:
        args.arch, args.head_size, args.page_size = [90], [128], [128]

    for arch in args.arch:
        for dtype in args.dtype:
            for head_size in args.head_size:
                page_sizes = args.page_size if (arch, head_size) == (90, 128) else [128]
                CASES.extend(cases(arch, dtype, head_size, page_sizes, [False, True] if head_size == 128 else [False]))
    print(f"triton {triton.__version__}, torch {torch.__version__}: {len(CASES)} kernels", flush=True)
    for line in skipped():
        print(f"skipped {line}", flush=True)

    spills = []
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        with concurrent.futures.ProcessPoolExecutor(args.jobs, fork) as pool:
            for line, spilled in pool.map(outcome, range(len(CASES))):
                print(line, flush=True)
                spills.append(spilled)
    failed = spills.count(None)
    spilling = sum(bool(spilled) for spilled in spills)
    print(f"triton {triton.__version__}: {len(CASES)} kernels, {spilling} spill, {failed} failed", flush=True)
    sys.exit(failed != 0)


if __name__ == "__main__":
    main()
