"""Triton kernels of the pair loss: rewards, margins, loss and all gradients in one pass over the responses.

Formulas in `pair_loss.py`, the definition in `eager.py`. Importing this file needs triton. Rules: every
element of an output is written by exactly one program, nothing is added atomically, sums run in an order that
depends on neither the launch nor the other pairs; arithmetic is fp32 and offsets are int64.
"""

import triton
import triton.language as tl

LOSSES = {"logistic": 0, "hinge": 1, "smooth_hinge": 2}
WEIGHTINGS = {"last": 0, "mean": 1, "cumulative": 2}


@triton.jit
def _inverse_norm(square):
    """1 / sqrt(square), 0 at 0 (the inner choice keeps the division finite)."""
    root = tl.sqrt_rn(tl.where(square > 0, square, 1.0))
    return tl.where(square > 0, 1.0 / root, 0.0)


@triton.jit
def _log1p(x):
    """log(1 + x) without losing small x: log(u) x / (u - 1) with u = 1 + x as rounded."""
    u = 1.0 + x
    rounded = u - 1.0
    return tl.where(rounded == 0.0, x, tl.log(u) * (x / tl.where(rounded == 0.0, 1.0, rounded)))


@triton.jit
def _loss(m, kind: tl.constexpr):
    """(loss, its derivative) of the signed margin m; kinks have the derivative of torch's relu, 0."""
    if kind == 0:
        small = tl.exp(-tl.abs(m))
        value = tl.maximum(-m, 0.0) + _log1p(small)
        slope = -tl.where(m >= 0, small, 1.0) / (1.0 + small)
    else:
        short = tl.maximum(1.0 - m, 0.0)
        if kind == 1:
            value = short
            slope = tl.where(short > 0, -1.0, 0.0)
        else:
            value = tl.where(short < 1.0, 0.5 * short * short, short - 0.5)
            slope = -tl.minimum(short, 1.0)
    return value, slope


@triton.jit
def _token_weight(step, length, kind: tl.constexpr):
    """Weight of position `step` of a window of `length`; int64 until the division."""
    if kind == 0:
        weight = tl.where(step == length - 1, 1.0, 0.0)
    elif kind == 1:
        weight = tl.where(step >= 0, 1.0, 0.0) / tl.maximum(length, 1).to(tl.float32)
    else:
        total = tl.maximum(length * (length + 1) // 2, 1)
        weight = (step + 1).to(tl.float32) / total.to(tl.float32)
    return tl.where((step >= 0) & (step < length), weight, 0.0)


@triton.jit
def _load_point(point, row, columns, dim, cosine: tl.constexpr):
    """(point in fp32, of length 1 for the cosine; 1 / its length)."""
    a = tl.load(point + row * dim + columns, mask=columns < dim, other=0.0).to(tl.float32)
    inverse = 1.0
    if cosine:
        inverse = _inverse_norm(tl.sum(a * a, 0))
        a = a * inverse
    return a, inverse


@triton.jit
def _compare(response, place, reads, a, cosine: tl.constexpr):
    """(-distance or cosine [t], 1 / length [t], z - a or z / |z| [t, d]) of the responses at `place`.

    What does not count is not read: it may hold anything.
    """
    z = tl.load(response + place, mask=reads, other=0.0).to(tl.float32)
    if cosine:
        inverse = _inverse_norm(tl.sum(z * z, 1))
        vector = z * inverse[:, None]
        value = tl.sum(vector * a[None, :], 1)
    else:
        vector = z - a[None, :]
        square = tl.sum(vector * vector, 1)
        inverse = _inverse_norm(square)
        value = -tl.sqrt_rn(square)
    return value, inverse, vector


@triton.jit
def _response_gradient(pull, value, inverse, vector, a, cosine: tl.constexpr):
    """Gradient in z; `pull` [t] is that in minus the distance, or in the cosine."""
    if cosine:
        gradient = (pull * inverse)[:, None] * (a[None, :] - value[:, None] * vector)
    else:
        gradient = -(pull * inverse)[:, None] * vector
    return gradient


@triton.jit
def _point_gradient(pull, inverse, vector, cosine: tl.constexpr):
    """Gradient in a summed over t; for the cosine in a / |a|, see `_store_point`."""
    if not cosine:
        pull = pull * inverse
    return tl.sum(pull[:, None] * vector, 0)


@triton.jit
def _store_point(out, gradient, a, inverse, columns, dim, cosine: tl.constexpr):
    """Stores the gradient in a, made for the cosine from that in a / |a|."""
    if cosine:
        gradient = inverse * (gradient - tl.sum(gradient * a, 0) * a)
    tl.store(out + columns, gradient, mask=columns < dim)


@triton.jit
def _score_pair(
    facts, pair, t, exists, reward_0, reward_1, scores, num_positions, kinds: tl.constexpr
):
    """Stores rewards and margin of positions t; (their loss, weight * d loss / d margin [t])."""
    label, start, end, required, weight = facts
    first = tl.load(start + pair)
    sign = tl.load(label + pair).to(tl.float32)
    token_weight = _token_weight(t - first, tl.load(end + pair) - first, kinds[1])
    counts = exists & (token_weight > 0)
    reward_0 = tl.where(counts, reward_0, 0.0)
    reward_1 = tl.where(counts, reward_1, 0.0)
    value, derivative = _loss(sign * (reward_1 - reward_0) - tl.load(required + pair), kinds[0])
    place = pair * num_positions + t
    tl.store(scores[1] + pair * num_positions + place, reward_0, mask=exists)
    tl.store(scores[1] + (pair + 1) * num_positions + place, reward_1, mask=exists)
    tl.store(scores[2] + place, reward_1 - reward_0, mask=exists)
    g = tl.load(weight + pair) * token_weight * sign * derivative
    return tl.sum(tl.where(counts, token_weight * value, 0.0), 0), tl.where(counts, g, 0.0)


@triton.jit
def _counting(facts, pair, t, weighting: tl.constexpr):
    """Return whether positions t of the comparison have a weight [t]."""
    first = tl.load(facts[1] + pair)
    return _token_weight(t - first, tl.load(facts[2] + pair) - first, weighting) > 0


@triton.jit
def pair_loss_kernel(
    inputs,  # response [R, T, d], response_index [B, 2], point [B, points, d], scale [1]
    facts,  # label, start, end int64; required margin, weight fp32; each [B]
    uses,  # [R] int64: how many of the 2 B entries of response_index name a response
    scores,  # out fp32: loss [B, S], reward [B, 2, T], margin [B, T]
    made,  # out: slope [B, T], d response [R, T, d], d point [B, S, points, d], d scale [B, S]
    sizes,  # T, S, d
    cosine: tl.constexpr,
    points: tl.constexpr,
    kinds: tl.constexpr,  # loss, weighting
    gradients: tl.constexpr,
    blocks: tl.constexpr,  # positions a program, positions at once, columns
):
    """Program (pair, part): some positions of one comparison, both responses; S programs a pair.

    slope is weight * d loss / d margin; d response is written here for responses used once.
    """
    pair, part = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    num_positions, num_parts, dim = sizes
    columns = tl.arange(0, blocks[2])
    row_0, row_1 = tl.load(inputs[1] + 2 * pair), tl.load(inputs[1] + 2 * pair + 1)
    a_0, inverse_0 = _load_point(inputs[2], pair * points, columns, dim, cosine)
    # With points = 1 this is the same row again.
    a_1, inverse_1 = _load_point(inputs[2], (pair + 1) * points - 1, columns, dim, cosine)
    factor = tl.load(inputs[3]) if cosine else 1.0
    loss, d_scale = 0.0, 0.0
    d_a_0, d_a_1 = tl.zeros([blocks[2]], tl.float32), tl.zeros([blocks[2]], tl.float32)
    for begin in range(0, blocks[0], blocks[1]):
        t = part * blocks[0] + begin + tl.arange(0, blocks[1])
        exists = t < num_positions
        writes = exists[:, None] & (columns < dim)[None, :]
        reads = writes & _counting(facts, pair, t, kinds[1])[:, None]
        place_0 = (row_0 * num_positions + t)[:, None] * dim + columns[None, :]
        place_1 = (row_1 * num_positions + t)[:, None] * dim + columns[None, :]
        value_0, near_0, vector_0 = _compare(inputs[0], place_0, reads, a_0, cosine)
        value_1, near_1, vector_1 = _compare(inputs[0], place_1, reads, a_1, cosine)
        part_loss, g = _score_pair(
            facts, pair, t, exists, factor * value_0, factor * value_1, scores, num_positions, kinds
        )
        loss += part_loss
        if gradients:
            tl.store(made[0] + pair * num_positions + t, g, mask=exists)
            if tl.load(uses + row_0) == 1:
                d_0 = _response_gradient(-g * factor, value_0, near_0, vector_0, a_0, cosine)
                tl.store(made[1] + place_0, d_0, mask=writes)
            if tl.load(uses + row_1) == 1:
                d_1 = _response_gradient(g * factor, value_1, near_1, vector_1, a_1, cosine)
                tl.store(made[1] + place_1, d_1, mask=writes)
            d_a_0 += _point_gradient(-g * factor, near_0, vector_0, cosine)
            d_a_1 += _point_gradient(g * factor, near_1, vector_1, cosine)
            d_scale += tl.sum(g * (value_1 - value_0), 0)
    tl.store(scores[0] + pair * num_parts + part, loss)
    if gradients:
        out = made[2] + (pair * num_parts + part) * points * dim
        if points == 2:
            _store_point(out + dim, d_a_1, a_1, inverse_1, columns, dim, cosine)
        d_a_0 = d_a_0 if points == 2 else d_a_0 + d_a_1
        _store_point(out, d_a_0, a_0, inverse_0, columns, dim, cosine)
        tl.store(made[3] + pair * num_parts + part, d_scale)


@triton.jit
def shared_response_kernel(
    inputs,  # response [R, T, d], point [B, points, d], scale [1], slope [B, T]
    entries,  # [2 B] int64: entries of response_index, those of one response together
    first_entry,  # [R] int64
    uses,  # [R] int64
    d_response,  # out [R, T, d], rows not used exactly once
    num_positions,
    dim,
    cosine: tl.constexpr,
    points: tl.constexpr,
    block_t: tl.constexpr,
    block_d: tl.constexpr,
):
    """Program (response, positions): sums a response's gradients over its comparisons, in order."""
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(uses + row)
    if count != 1:
        columns = tl.arange(0, block_d)
        t = tl.program_id(1).to(tl.int64) * block_t + tl.arange(0, block_t)
        exists = t < num_positions
        place = (row * num_positions + t)[:, None] * dim + columns[None, :]
        factor = tl.load(inputs[2]) if cosine else 1.0
        opening = tl.load(first_entry + row)
        total = tl.zeros([block_t, block_d], tl.float32)
        for entry in range(opening, opening + count):
            source = tl.load(entries + entry)
            pair, side = source // 2, source % 2
            g = tl.load(inputs[3] + pair * num_positions + t, mask=exists, other=0.0)
            reads = (g != 0)[:, None] & (columns < dim)[None, :]
            # With one point for both responses the side does not move the row.
            row_of_point = pair * points + side * (points - 1)
            a, _ = _load_point(inputs[1], row_of_point, columns, dim, cosine)
            value, inverse, vector = _compare(inputs[0], place, reads, a, cosine)
            pull = tl.where(side == 1, g, -g) * factor
            total += _response_gradient(pull, value, inverse, vector, a, cosine)
        tl.store(d_response + place, total, mask=exists[:, None] & (columns < dim)[None, :])


@triton.jit
def sum_parts_kernel(parts, out, num_parts, width, block: tl.constexpr):
    """Program (row, columns): out [n, width] = sum over j of parts [n, j, width], j ascending."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1).to(tl.int64) * block + tl.arange(0, block)
    valid = columns < width
    total = tl.zeros([block], tl.float32)
    for j in range(num_parts):
        total += tl.load(parts + (row * num_parts + j) * width + columns, mask=valid, other=0.0)
    tl.store(out + row * width + columns, total, mask=valid)


@triton.jit
def multiply_kernel(values, factor, size, block: tl.constexpr):
    """values *= factor in place; nothing is read or written where the factor is 1."""
    by = tl.load(factor).to(tl.float32)
    if by != 1.0:
        place = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
        inside = place < size
        read = tl.load(values + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(values + place, read * by, mask=inside)
