"""Triton kernels of all users x all items; formulas in `score_all.py`, rules in `pair_loss_triton.py`."""

import triton
import triton.language as tl


@triton.jit
def squares_kernel(
    mixture,  # [U, K] fp32
    gram,  # [Q, K, K] fp32
    out,  # out [U, Q] fp32
    num_users,
    num_sources,
    num_prototypes,
    block_u: tl.constexpr,
    block_k: tl.constexpr,
):
    """Program (users, source): s^T G_q s, the squared length of each user's point.

    Both in one axis of the grid: the others end at 65,535.
    """
    program = tl.program_id(0).to(tl.int64)
    users = program // num_sources * block_u + tl.arange(0, block_u)
    which = program % num_sources
    ks = tl.arange(0, block_k)
    known, valid = ks < num_prototypes, users < num_users
    inside = valid[:, None] & known[None, :]
    s = tl.load(mixture + users[:, None] * num_prototypes + ks[None, :], mask=inside, other=0.0)
    total = tl.zeros([block_u], tl.float32)
    for k in range(num_prototypes):
        row = (which * num_prototypes + k) * num_prototypes
        g = tl.load(gram + row + ks, mask=known, other=0.0)
        s_k = tl.load(mixture + users * num_prototypes + k, mask=valid, other=0.0)
        total += s_k * tl.sum(s * g[None, :], 1)
    tl.store(out + users * num_sources + which, total, mask=valid)


@triton.jit
def score_all_kernel(
    mixture,  # [U, K] fp32
    dots,  # [N, K] fp32
    item,  # [N] fp32: |z - c|^2, or scale / |z|
    squares,  # [U, Q] fp32
    source,  # [N] int64
    out,  # out [U, N]
    num_users,
    num_items,
    num_sources,
    num_prototypes,
    cosine: tl.constexpr,
    block_u: tl.constexpr,
    block_n: tl.constexpr,
):
    """Program (users, items), in one axis: the rank-K product, then distance or cosine in the epilogue."""
    program, item_blocks = tl.program_id(0).to(tl.int64), tl.cdiv(num_items, block_n)
    users = program // item_blocks * block_u + tl.arange(0, block_u)
    items = program % item_blocks * block_n + tl.arange(0, block_n)
    valid_u, valid_n = users < num_users, items < num_items
    inside = valid_u[:, None] & valid_n[None, :]
    product = tl.zeros([block_u, block_n], tl.float32)
    # Outer products, not tl.dot: full fp32 on every device, and K is small.
    for k in range(num_prototypes):
        s = tl.load(mixture + users * num_prototypes + k, mask=valid_u, other=0.0)
        t = tl.load(dots + items * num_prototypes + k, mask=valid_n, other=0.0)
        product += s[:, None] * t[None, :]
    of_item = tl.load(item + items, mask=valid_n, other=0.0)
    which = tl.load(source + items, mask=valid_n, other=0)
    square = tl.load(
        squares + users[:, None] * num_sources + which[None, :], mask=inside, other=0.0
    )
    if cosine:
        root = tl.sqrt_rn(tl.where(square > 0, square, 1.0))
        score = tl.where(square > 0, product * of_item[None, :] / root, 0.0)
    else:
        apart = of_item[None, :] - 2.0 * product + square
        score = -tl.sqrt_rn(tl.maximum(apart, 0.0))
    tl.store(out + users[:, None] * num_items + items[None, :], score, mask=inside)
