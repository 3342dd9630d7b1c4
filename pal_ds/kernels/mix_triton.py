"""Triton kernels of the prototype mix, forward and backward; formulas in `mix.py`, rules in `pair_loss_triton.py`."""

import triton
import triton.language as tl


@triton.jit
def mix_kernel(
    logits,  # [U, K]
    user,  # [n] int64
    prototypes,  # [Q, K, h]
    source,  # [n] int64
    mixed,  # out [n, h] fp32
    mixture,  # out [n, K] fp32
    temperature,
    num_prototypes,
    width,
    block_k: tl.constexpr,
    block_h: tl.constexpr,
):
    """Program (row, columns): softmax of the row's logits, then the weighted sum of its prototypes."""
    row = tl.program_id(0).to(tl.int64)
    ks = tl.arange(0, block_k)
    columns = tl.program_id(1).to(tl.int64) * block_h + tl.arange(0, block_h)
    known, valid = ks < num_prototypes, columns < width
    place = tl.load(user + row) * num_prototypes + ks
    w = tl.load(logits + place, mask=known, other=-float("inf")).to(tl.float32) / temperature
    raised = tl.exp(w - tl.max(w, 0))
    s = raised / tl.sum(raised, 0)
    if tl.program_id(1) == 0:
        tl.store(mixture + row * num_prototypes + ks, s, mask=known)
    chosen = (tl.load(source + row) * num_prototypes + ks)[:, None] * width + columns[None, :]
    p = tl.load(prototypes + chosen, mask=known[:, None] & valid[None, :], other=0.0)
    tl.store(mixed + row * width + columns, tl.sum(s[:, None] * p.to(tl.float32), 0), mask=valid)


@triton.jit
def mix_logits_backward_kernel(
    mixture,  # [n, K] fp32
    prototypes,  # [Q, K, h]
    source,  # [n] int64
    d_mixed,  # [n, h]
    d_mixture,  # [n, K] fp32: what reaches the mixture directly
    d_logits,  # out [n, K] fp32
    temperature,
    num_prototypes,
    width,
    block_k: tl.constexpr,
    block_h: tl.constexpr,
):
    """Program row: d s_k = <d mixed, p_k>, then through the softmax."""
    row = tl.program_id(0).to(tl.int64)
    ks = tl.arange(0, block_k)
    known = ks < num_prototypes
    s = tl.load(mixture + row * num_prototypes + ks, mask=known, other=0.0)
    d_s = tl.load(d_mixture + row * num_prototypes + ks, mask=known, other=0.0)
    first = (tl.load(source + row) * num_prototypes + ks)[:, None] * width
    for begin in range(0, width, block_h):
        columns = begin + tl.arange(0, block_h)
        valid = columns < width
        d_m = tl.load(d_mixed + row * width + columns, mask=valid, other=0.0).to(tl.float32)
        inside = known[:, None] & valid[None, :]
        p = tl.load(prototypes + first + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        d_s += tl.sum(p * d_m[None, :], 1)
    d_w = s * (d_s - tl.sum(s * d_s, 0)) / temperature
    tl.store(d_logits + row * num_prototypes + ks, d_w, mask=known)


@triton.jit
def mix_prototypes_backward_kernel(
    mixture,  # [n, K] fp32
    d_mixed,  # [n, h]
    entries,  # [n] int64: rows, those of one source together
    first_entry,  # [Q] int64
    count,  # [Q] int64
    d_prototypes,  # out [Q, K, h]
    num_prototypes,
    width,
    block_k: tl.constexpr,
    block_h: tl.constexpr,
):
    """Program (source, columns): sum over its rows, in order, of the outer product s d_mixed."""
    which = tl.program_id(0).to(tl.int64)
    ks = tl.arange(0, block_k)
    columns = tl.program_id(1).to(tl.int64) * block_h + tl.arange(0, block_h)
    known, valid = ks < num_prototypes, columns < width
    total = tl.zeros([block_k, block_h], tl.float32)
    opening = tl.load(first_entry + which)
    for entry in range(opening, opening + tl.load(count + which)):
        row = tl.load(entries + entry)
        s = tl.load(mixture + row * num_prototypes + ks, mask=known, other=0.0)
        d_m = tl.load(d_mixed + row * width + columns, mask=valid, other=0.0).to(tl.float32)
        total += s[:, None] * d_m[None, :]
    place = (which * num_prototypes + ks)[:, None] * width + columns[None, :]
    tl.store(d_prototypes + place, total, mask=known[:, None] & valid[None, :])


@triton.jit
def sum_owned_kernel(
    rows,  # [n, width] fp32
    entries,  # [n] int64: rows, those of one owner together
    first_entry,  # [U] int64
    count,  # [U] int64
    out,  # out [U, width]
    width,
    block: tl.constexpr,
):
    """Program owner: the sum of its rows in their order; zeros for one who owns none."""
    owner = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    valid = columns < width
    total = tl.zeros([block], tl.float32)
    opening = tl.load(first_entry + owner)
    for entry in range(opening, opening + tl.load(count + owner)):
        place = tl.load(entries + entry) * width + columns
        total += tl.load(rows + place, mask=valid, other=0.0)
    tl.store(out + owner * width + columns, total, mask=valid)
