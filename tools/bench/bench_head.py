"""The head's scoring and loss: plain torch, torch.compile and the fused kernels, and a loop over tokens as the past.

    python tools/bench/bench_head.py [--rounds 15] [--compile] [--quick]

Each row first holds its contestants' numbers against each other, in this process, and is left out where they differ.
Contestants run interleaved on the same tensors; a row gives the median time (20th to 80th percentile) and, against its
first contestant, the ratio of medians with a 95% bootstrap interval. Rows for a GPU need one; what it prints there is
the evidence that `pal_ds/kernels/dispatch_table.py` asks for. `--compile` adds torch.compile on a CPU (a minute).
"""

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pal_ds.heads import PalA
from pal_ds.heads.base import Features, UserState
from pal_ds.kernels import eager
from pal_ds.kernels.collapse import mixed_linear, mixed_linear_reference
from pal_ds.kernels.dispatch_table import Implementation
from pal_ds.kernels.mix import mix
from pal_ds.kernels.pair_loss import pair_loss
from pal_ds.kernels.score_all import score_all
from pal_ds.losses import PairFacts, PreferenceLoss
from tools.bench.environment import describe_environment
from tools.bench.interleaved import Contestant, copy_bandwidth, peak_memory, row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=15, help="of all contestants of a row")
    parser.add_argument("--compile", action="store_true", help="also torch.compile on a CPU")
    parser.add_argument("--quick", action="store_true", help="the smallest size of each row")
    options = parser.parse_args()
    torch.manual_seed(0)
    triton = version("triton") if importlib.util.find_spec("triton") else None
    about = {**describe_environment(), "triton": triton, **_gpu_state()}
    print(json.dumps({"environment": about, "rounds": options.rounds}, indent=1))
    loss_rows(options)
    if torch.cuda.is_available():
        gpu_rows(options)
    else:
        cpu_rows(options)
        print("pair loss, fused against eager and torch.compile: not measured: no GPU")
        print("share of copy bandwidth, peak memory of the head: not measured: no GPU")


def loss_rows(options: argparse.Namespace) -> None:
    """The loss alone, forward and backward: a loop over pairs and tokens against `losses.PreferenceLoss`."""
    sizes = [(4, 40)] if options.quick else [(b, n) for b in (4, 32) for n in (40, 200, 450)]
    for weighting in ("cumulative", "mean", "last"):
        for num_pairs, length in sizes:
            margin, label = torch.randn(num_pairs, 512), 2 * torch.randint(2, (num_pairs,)) - 1
            start = torch.randint(512 - length, (num_pairs,))
            loss = PreferenceLoss("hinge", weighting)

            def looped(m=margin, y=label, s=start, e=start + length, w=weighting) -> list[Tensor]:
                return _with_gradient(m, lambda x: token_loop(x, y, s, e, w))

            def vectorised(m=margin, y=label, s=start, e=start + length, of=loss) -> list[Tensor]:
                return _with_gradient(m, lambda x: of(x, y, s, e).mean())

            name = f"loss alone, {weighting}, B {num_pairs}, n {length}, fp32, CPU"
            contestants = {"token loop": looped, "vectorised": vectorised}
            row(name, contestants, options.rounds if num_pairs == 4 else 7)


def token_loop(margin: Tensor, label: Tensor, start: Tensor, end: Tensor, weighting: str) -> Tensor:
    """Mean hinge loss as research code computes it: one Python step per pair and per token of its window."""
    total = torch.zeros(())
    for pair in range(len(margin)):
        window = margin[pair][start[pair] : end[pair]]
        losses = torch.clamp(1 - label[pair] * window, min=0)
        if weighting == "last":
            total = total + losses[-1]
            continue
        weighted, num_tokens = 0.0, len(losses)
        for t in range(num_tokens):
            weighted = weighted + losses[t] * (t + 1 if weighting == "cumulative" else 1)
        normaliser = num_tokens * (num_tokens + 1) / 2 if weighting == "cumulative" else num_tokens
        total = total + weighted / normaliser
    return total / len(margin)


def cpu_rows(options: argparse.Namespace) -> None:
    """Compares what runs without a GPU: the shipped head, the eager kernels, the two exact rearrangements."""
    num_pairs, num_positions, dim, num_prototypes = 8, 40, 256, 4
    case = pairs(num_pairs, num_positions, dim, torch.float32, "cpu")
    head, loss = (
        PalA(dim, num_prototypes, dim, 1, user_point="Pw"),
        PreferenceLoss("logistic", "mean"),
    )
    logits = torch.randn(num_pairs, num_prototypes)
    response = case[0]

    def shipped() -> list[Tensor]:
        def total(x: Tensor) -> Tensor:
            output = head(Features(head_input, case[1]), UserState(x))
            each = loss(output.margin, *case[3][:4])
            return (each * case[3].weight).sum()

        return _with_gradient(logits, total)

    def by_reference() -> list[Tensor]:
        def total(x: Tensor) -> Tensor:
            point = torch.softmax(x, -1) @ head.prototypes
            projected = head.projector(head_input)
            return pair_loss(
                projected, case[1], point[:, None], case[3], None, "logistic", "mean"
            ).total

        return _with_gradient(logits, total)

    head_input = response
    name = f"PAL-A head and loss, B {num_pairs}, T {num_positions}, d {dim}, fp32, CPU"
    row(name, {"shipped head": shipped, "kernels' reference": by_reference}, options.rounds)
    if options.compile:
        contestants = {x: fused(case, None, x) for x in ("torch", "compile")}
        row("pair loss, distance, same shape, CPU", contestants, options.rounds)
    score_rows(options, "cpu", ["torch"], [(512, 1024, 128, 8)])
    mix_row(options, "cpu", ["torch"], (1000, 64, 8, 8, 256))
    collapse_row(options, "cpu", (64, 8, 256))


def gpu_rows(options: argparse.Namespace) -> None:
    """Sizes at which the head is bound by memory, fp32 and bf16; share of the copy bandwidth of this very device."""
    bandwidth = copy_bandwidth()
    print(f"copy bandwidth: {bandwidth / 1e12:.2f} TB/s")
    sizes = [(t, d) for t in (8192, 16384, 65536) for d in (512, 1024, 1536)]
    for positions, dim in sizes[:1] if options.quick else sizes:
        for dtype in (torch.bfloat16, torch.float32):
            for scale in (None, torch.tensor([5.0], device="cuda")):
                case = pairs(positions // 64, 64, dim, dtype, "cuda")
                contestants = {x: fused(case, scale, x) for x in ("torch", "compile", "triton")}
                kind = "distance" if scale is None else "cosine"
                name = f"pair loss, {kind}, {positions} positions, d {dim}, {dtype}, GPU"
                medians = row(name, contestants, options.rounds)
                print(f"    triton, 20 runs alike to the bit: {repeats(contestants['triton'])}")
                # Both responses read once, both gradients written once, over the windows of these pairs.
                counted = int((case[3].end - case[3].start).sum())
                floor = 4 * counted * dim * dtype.itemsize
                for x, seconds in medians.items():
                    print(
                        f"    {x}: {floor / seconds / bandwidth:.0%} of copy bandwidth, "
                        f"{peak_memory(contestants[x]) / 2**20:.0f} MiB"
                    )
    score_rows(
        options, "cuda", ["torch", "triton"], [(100_000, 10_000, 512, k) for k in (2, 8, 64)]
    )
    for k in (2, 8, 64):
        mix_row(options, "cuda", ["torch", "compile", "triton"], (100_000, 4096, 64, k, 1024))
        collapse_row(options, "cuda", (4096, k, 512))


def repeats(run: Contestant) -> bool:
    """Return True where 20 more runs give the bits of the first."""
    first = run()
    return all(torch.equal(a, b) for _ in range(20) for a, b in zip(run(), first, strict=True))


def pairs(
    num_pairs: int, num_positions: int, dim: int, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor, Tensor, PairFacts]:
    """(responses, their index, points, facts): ragged windows, each response in one comparison."""
    start = torch.randint(num_positions // 2, (num_pairs,))
    facts = PairFacts(
        2 * torch.randint(2, (num_pairs,)) - 1,
        start,
        start + 1 + torch.randint(num_positions // 2, (num_pairs,)),
        torch.zeros(num_pairs),
        torch.full((num_pairs,), 1 / num_pairs),
    )
    made = (
        torch.randn(2 * num_pairs, num_positions, dim).to(dtype),
        torch.randperm(2 * num_pairs).view(-1, 2),
        torch.randn(num_pairs, 1, dim),
    )
    response, index, point = (x.to(device) for x in made)
    return (
        response,
        index,
        point,
        PairFacts._make(None if x is None else x.to(device) for x in facts),
    )


def fused(case: tuple, scale: Tensor | None, implementation: Implementation) -> Contestant:
    """Loss and the gradients of responses and points by one implementation."""
    response, index, point, facts = case

    def run() -> list[Tensor]:
        leaves = [response.detach().requires_grad_(), point.detach().requires_grad_()]
        loss_and_gradients = pair_loss(
            leaves[0], index, leaves[1], facts, scale, "logistic", "mean", implementation
        )
        return [
            loss_and_gradients.total.detach(),
            *torch.autograd.grad(loss_and_gradients.total, leaves),
        ]

    return run


def score_rows(
    options: argparse.Namespace,
    device: str,
    implementations: list[Implementation],
    sizes: list[tuple],
) -> None:
    """All users x all items: the dense form against the rank-K form."""
    for num_users, num_items, dim, num_prototypes in sizes:
        mixture = torch.randn(num_users, num_prototypes, device=device).softmax(-1)
        response = torch.randn(num_items, dim, device=device)
        prototypes = torch.randn(1, num_prototypes, dim, device=device)

        def dense(m=mixture, z=response, p=prototypes) -> list[Tensor]:
            return [5.0 * eager.unit(m @ p[0]) @ eager.unit(z).T]

        contestants = {"dense": dense}
        for x in implementations:
            contestants[f"rank K, {x}"] = lambda m=mixture, z=response, p=prototypes, x=x: [
                score_all(m, z, p, None, 5.0, x)
            ]
        name = f"score all, U {num_users}, N {num_items}, d {dim}, K {num_prototypes}, {device}"
        row(name, contestants, options.rounds)


def mix_row(
    options: argparse.Namespace, device: str, implementations: list[Implementation], size: tuple
) -> None:
    """User gather, softmax and the mixture of one set of prototypes per prompt, forward and backward."""
    num_users, num_rows, num_sources, k, width = size
    logits = torch.randn(num_users, k, device=device)
    prototypes = torch.randn(num_sources, k, width, device=device)
    user = torch.randint(num_users, (num_rows,), device=device)
    source = torch.randint(num_sources, (num_rows,), device=device)

    def run(implementation: Implementation) -> list[Tensor]:
        leaves = [logits.detach().requires_grad_(), prototypes.detach().requires_grad_()]
        mixed, _ = mix(leaves[0], user, leaves[1], source, 1.0, implementation)
        return [mixed.detach(), *torch.autograd.grad(mixed.square().sum(), leaves)]

    contestants = {x: partial(run, x) for x in implementations}
    name = f"mix, U {num_users}, n {num_rows}, Q {num_sources}, K {k}, h {width}, fp32, {device}"
    row(name, contestants, options.rounds)


def collapse_row(options: argparse.Namespace, device: str, size: tuple[int, int, int]) -> None:
    """PAL-B's last layer and mixture, forward and backward: K results and their mixture, or one product."""
    num_rows, k, dim = size
    shapes = ((num_rows, k, dim), (num_rows, k), (k, dim, dim), (k, dim))
    tensors = [torch.randn(*shape, device=device) / dim**0.5 for shape in shapes]

    def by(function: Callable[..., Tensor]) -> Contestant:
        def run() -> list[Tensor]:
            leaves = [x.detach().requires_grad_() for x in tensors]
            out = function(*leaves)
            return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]

        return run

    contestants = {"K results": by(mixed_linear_reference), "one product": by(mixed_linear)}
    row(
        f"PAL-B last layer, n {num_rows}, K {k}, d {dim}, fp32, {device}",
        contestants,
        options.rounds,
    )


def _with_gradient(x: Tensor, function: Callable[[Tensor], Tensor]) -> list[Tensor]:
    leaf = x.detach().requires_grad_()
    out = function(leaf)
    return [out.detach(), *torch.autograd.grad(out, leaf)]


def _gpu_state() -> dict[str, object]:
    if not torch.cuda.is_available():
        return {}
    major, minor = torch.cuda.get_device_capability()
    return {
        "hardware": f"sm_{major}{minor}",
        "cuda": torch.version.cuda,
        "clock_mhz": torch.cuda.clock_rate(),
        "power_watts": torch.cuda.power_draw() / 1e3,
    }


if __name__ == "__main__":
    main()
