"""Compiles every Triton kernel for a GPU that need not be here; prints one line per kernel. Run without interpreter."""

import warnings

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pal_ds.kernels import mix_triton, pair_loss_triton, score_all_triton

F, I, X, N = "*fp32", "*i64", "*bf16", "i32"  # noqa: E741


def build(kernel: object, runtime: tuple, constants: dict) -> None:
    """Machine code for compute capability 9.0, or an exception."""
    names = kernel.arg_names
    types = dict(zip(names, runtime, strict=False))
    known = {}
    for name in names[len(runtime) :]:
        value, place = constants[name], names.index(name)
        if isinstance(value, tuple):
            types[name] = ("constexpr",) * len(value)
            known |= {(place, i): part for i, part in enumerate(value)}
        else:
            types[name] = "constexpr"
            known[(place,)] = value
    source = ASTSource(fn=kernel, signature=types, constexprs=known)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
    print(kernel.__name__, len(made.asm["cubin"]))


def main() -> None:
    warnings.simplefilter("ignore")
    for cosine, points, positions, columns, kinds in (
        (False, 1, 4, 512, (1, 1)),
        (True, 2, 1, 2048, (0, 2)),
    ):
        shared = {"cosine": cosine, "points": points, "block_t": positions, "block_d": columns}
        pair = {"kinds": kinds, "gradients": True, "blocks": (32, positions, columns)}
        build(
            pair_loss_triton.pair_loss_kernel,
            ((X, I, F, F), (I, I, I, F, F), I, (F, F, F), (F, X, F, F), (N, N, N)),
            {**shared, **pair},
        )
        arguments = ((X, F, F, F), I, I, I, X, N, N)
        build(pair_loss_triton.shared_response_kernel, arguments, shared)
    build(pair_loss_triton.sum_parts_kernel, (F, F, N, N), {"block": 512})
    build(pair_loss_triton.multiply_kernel, (X, F, "i64"), {"block": 1024})
    blocks = {"block_k": 64, "block_h": 64}
    build(mix_triton.mix_kernel, (F, I, X, I, F, F, "fp32", N, N), blocks)
    arguments = (F, X, I, F, F, F, "fp32", N, N)
    build(mix_triton.mix_logits_backward_kernel, arguments, blocks)
    build(mix_triton.mix_prototypes_backward_kernel, (F, F, I, I, I, X, N, N), blocks)
    build(mix_triton.sum_owned_kernel, (F, I, I, I, F, N), {"block": 64})
    sizes = {"block_u": 32, "block_k": 64}
    build(score_all_triton.squares_kernel, (F, F, F, N, N, N), sizes)
    arguments = (F, F, F, F, I, F, N, N, N, N)
    sizes = {"cosine": True, "block_u": 32, "block_n": 64}
    build(score_all_triton.score_all_kernel, arguments, sizes)


if __name__ == "__main__":
    main()
