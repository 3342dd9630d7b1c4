"""Whom the watchdog blames, and when: the rules alone, without threads, network or waiting."""

from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from pal_ds.distributed.watchdog.heartbeat import Beat, Failure, Ledger, Verdict, blamed


def beat(rank: int, **changes: Any) -> Beat:
    usual = Beat(rank, f"node{rank}", "forward", 7, 1.0, 30, 2, "file.py:1 in f", True)
    return usual._replace(**changes)


beats = st.lists(
    st.builds(
        beat,
        st.just(0),
        step=st.integers(0, 2),
        num_in_step=st.integers(0, 2),
        waiting=st.booleans(),
    ),
    min_size=1,
    max_size=8,
).map(lambda found: [one._replace(rank=rank) for rank, one in enumerate(found)])


@given(beats, st.sets(st.integers(0, 7)), st.randoms())
def test_whom_to_blame(found: list[Beat], silent: set[int], random: Any) -> None:
    ranks = blamed(found, silent)
    assert ranks
    shuffled = random.sample(found, len(found))
    assert blamed(shuffled, silent) == ranks
    chosen = [found[rank] for rank in ranks]
    # Nobody is blamed who waits while another does not, nor anyone heard while another is silent.
    if silent & set(range(len(found))):
        assert set(ranks) <= silent
    elif not all(one.waiting for one in found):
        assert not any(one.waiting for one in chosen)
    # All the blamed have come equally far, and nobody of their kind less far.
    (place,) = {(one.step, one.num_in_step) for one in chosen}
    kind = [
        one
        for one in found
        if (one.rank in silent, one.waiting) == (ranks[0] in silent, chosen[0].waiting)
    ]
    assert place == min((one.step, one.num_in_step) for one in kind) or ranks[0] in silent


@given(beats, st.floats(0, 100))
def test_no_verdict_while_any_rank_makes_progress(found: list[Beat], late: float) -> None:
    ledger = Ledger(10.0, 1.0, Path("stacks"))
    for one in found:
        ledger.hear(one, 0.0)
    for one in found[:-1]:
        ledger.hear(one, late)
    ledger.hear(found[-1]._replace(num_entered=found[-1].num_entered + 1), late)
    assert ledger.verdict(late + 9.5) is None
    for one in found[:-1]:
        ledger.hear(one, late + 10.5)  # saying the same again is no progress
    verdict = ledger.verdict(late + 10.5)
    assert verdict is not None
    assert (verdict.kind, verdict.code) == ("hung", 5)


def ledger_of(*found: Beat) -> Ledger:
    ledger = Ledger(100.0, 1.0, Path("stacks"))
    for one in found:
        ledger.hear(one, 0.0)
    return ledger


def given_to(verdict: Verdict | None) -> tuple[str, tuple[int, ...], int] | None:
    return None if verdict is None else (verdict.kind, verdict.ranks, verdict.code)


def test_a_silent_rank_has_no_patience() -> None:
    """Code of others may report no progress for long; who is alive still sends signs of life."""
    loading = [beat(rank, phase="load weights", patience=6.0, waiting=False) for rank in range(3)]
    ledger = ledger_of(*loading)
    for now in (50.0, 100.0, 101.0):
        for one in (loading[0], loading[2]):
            ledger.hear(one, now)
        assert (ledger.verdict(now) is None) == (now <= 100)
    verdict = ledger.verdict(101.0)
    assert verdict is not None and given_to(verdict) == ("hung", (1,), 5)
    assert "Rank 1 has sent no sign of life for" in verdict.text
    for one in loading:
        ledger.hear(one, 550.0)
    assert ledger.verdict(550.0) is None
    for one in loading:
        ledger.hear(one, 601.0)
    assert ledger.verdict(601.0) is not None


def test_ranks_that_do_not_come_are_lost() -> None:
    ledger = Ledger(100.0, 1.0, None, range(1, 4))
    ledger.hear(beat(2), 1.0)
    ledger.hear(beat(2), 100.0)
    assert ledger.verdict(100.0) is None
    verdict = ledger.verdict(101.0)
    assert verdict is not None and given_to(verdict) == ("hung", (1, 3), 5)
    assert "ranks 1, 3 have not come within 100.0 seconds" in verdict.text


def test_causes_come_before_symptoms() -> None:
    ledger = ledger_of(*map(beat, range(4)))
    ledger.failed(Failure(0, "RuntimeError: Connection closed by peer", 1, True), 1.0)
    assert ledger.verdict(1.5) is None
    ledger.failed(Failure(3, "RuntimeError: Connection closed by peer", 1, True), 1.6)
    ledger.died(0, 1.7)  # a rank that said why it leaves has not died
    assert ledger.verdict(1.8) is None
    assert given_to(ledger.verdict(2.5)) == ("failed", (0,), 5)
    ledger.died(2, 1.9)
    assert given_to(ledger.verdict(2.0)) == ("died", (2,), 5)
    ledger.failed(Failure(1, "disk full", 4, False), 2.0)
    assert given_to(ledger.verdict(2.0)) == ("failed", (1,), 4)


def test_a_time_out_is_the_fault_of_whoever_does_not_wait() -> None:
    ledger = ledger_of(beat(0), beat(1), beat(2, waiting=False, phase="collate"))
    ledger.failed(Failure(0, "RuntimeError: Timed out waiting 1800000ms", 1, True), 1.0)
    assert given_to(ledger.verdict(3.0)) == ("hung", (2,), 5)
    # All wait: the one that says so is all that is known.
    ledger = ledger_of(beat(0), beat(1), beat(2))
    ledger.failed(Failure(0, "RuntimeError: Timed out waiting 1800000ms", 1, True), 1.0)
    assert given_to(ledger.verdict(3.0)) == ("failed", (0,), 5)


def test_ranks_that_left_are_not_waited_for() -> None:
    ledger = ledger_of(beat(0), beat(1))
    ledger.left(1)
    ledger.died(1, 1.0)
    assert ledger.verdict(50.0) is None
    assert given_to(ledger.verdict(101.0)) == ("hung", (0,), 5)


def test_a_rank_alone_that_hangs_is_named() -> None:
    verdict = ledger_of(beat(0, waiting=False)).verdict(150.0)
    assert verdict is not None
    assert "no progress: rank 0 on node0 has been in `forward` at update 7 for 2.5 minutes" in (
        verdict.text
    )


def test_a_phase_may_ask_for_patience() -> None:
    """Of one rank: the others wait for it in a phase that would not."""
    loading = beat(0, phase="load weights", waiting=False, patience=6.0)
    ledger = ledger_of(loading, beat(1))
    for one in (loading, beat(1)):
        ledger.hear(one, 590.0)
    assert ledger.verdict(599.0) is None
    assert given_to(ledger.verdict(601.0)) == ("hung", (0,), 5)
    ledger.hear(loading._replace(patience=1.0), 590.0)
    assert given_to(ledger.verdict(591.0)) == ("hung", (0,), 5)
