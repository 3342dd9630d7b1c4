"""Triton kernels run on CPU tensors under Triton's interpreter; without triton these tests skip and say so."""

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from types import ModuleType

import numpy
import pytest
import torch

# The interpreter is chosen when triton decorates its functions, hence before its first import.
if importlib.util.find_spec("triton") is not None and "triton" not in sys.modules:
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    import pal_ds.kernels.mix_triton
    import pal_ds.kernels.pair_loss_triton
    import pal_ds.kernels.score_all_triton  # noqa: F401

    if before is None:
        del os.environ["TRITON_INTERPRET"]


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs Triton kernels on CPU tensors, one program after the other."""
    triton = pytest.importorskip("triton", reason="triton is not installed: pip install triton")
    if _version(triton) < (3, 9) and _version(numpy) >= (2, 4):
        pytest.skip(f"the interpreter of triton {triton.__version__} needs numpy below 2.4")
    if not is_interpreted():
        pytest.skip("triton was imported before this folder: test_apart.py runs it by itself")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    _round_to_nearest(monkeypatch)
    torch.manual_seed(0)
    yield


def is_interpreted() -> bool:
    """Whether triton came first through this file; torch's compiler, and so transformers, may import it before."""
    from pal_ds.kernels.pair_loss_triton import pair_loss_kernel

    return type(pair_loss_kernel).__name__ == "InterpretedFunction"


def _version(package: ModuleType) -> tuple[int, ...]:
    return tuple(int(part) for part in package.__version__.split(".")[:2])


def _round_to_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter cuts fp32 off to bf16, where devices round to nearest: twice the error."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    usual = InterpreterBuilder.cast_impl

    def cast(self, src, dst_type):
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            rounded = torch.tensor(src.data).to(torch.bfloat16).view(torch.uint16).numpy()
            return TensorHandle(rounded, dst_type.scalar)
        return usual(self, src, dst_type)

    monkeypatch.setattr(InterpreterBuilder, "cast_impl", cast)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers start as NaN: what a kernel forgot to write shows. Kept alive, lest two share an address."""
    empty, kept = torch.empty, []

    def poison(*args: object, **options: object) -> torch.Tensor:
        kept.append(empty(*args, **options).fill_(float("nan")))
        return kept[-1]

    monkeypatch.setattr("pal_ds.kernels.buffers.torch.empty", poison)


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """Address -> how often it was stored to."""
    from triton.runtime.interpreter import interpreter_builder

    counts: dict[int, int] = {}
    store = interpreter_builder.create_masked_store

    def counting(ptrs, value, mask, *rest):
        for address in ptrs.data[mask.data.astype(bool)].flat:
            counts[int(address)] = counts.get(int(address), 0) + 1
        return store(ptrs, value, mask, *rest)

    monkeypatch.setattr(interpreter_builder, "create_masked_store", counting)
    return counts


@pytest.fixture
def shuffled(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """shuffled(seed): from here on programs run in a random order; 0 restores the usual one."""
    from triton.runtime.interpreter import interpreter_builder

    usual = interpreter_builder.set_grid_idx

    def shuffle(seed: int) -> None:
        def at(x: int, y: int, z: int) -> None:
            nx, ny, nz = interpreter_builder.grid_dim
            generator = torch.Generator().manual_seed(seed)
            order = torch.randperm(nx * ny * nz, generator=generator).tolist()
            place = order[(x * ny + y) * nz + z]
            usual(place // (ny * nz), place // nz % ny, place % nz)

        monkeypatch.setattr(interpreter_builder, "set_grid_idx", at if seed else usual)

    return shuffle
