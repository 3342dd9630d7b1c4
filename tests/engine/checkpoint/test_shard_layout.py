"""DeepSpeed's layouts as arithmetic: every value has exactly one place, and dealing round is undone."""

import pytest

from pal_ds.engine.checkpoint.shard_layout import Layout, dealt, undealt


@pytest.mark.parametrize("num_parameters", [0, 1, 2, 5, 8])
@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_dealing_is_undone(num_parameters: int, world: int) -> None:
    shapes = {f"p{index}": (index,) for index in range(num_parameters)}
    assert list(undealt(dealt(shapes, world), world).items()) == list(shapes.items())


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("world", [1, 2, 3, 5, 8])
def test_every_value_has_one_place(stage: int, world: int) -> None:
    layout = Layout(stage, world, False, False, 7 if stage == 3 else 0, stage == 2, stage == 1)
    groups = [{"a": (3, 5), "b": (1,), "c": (7,)}, {"d": (2,), "e": (4, 4)}]
    found: dict[str, list[int]] = {name: [] for group in groups for name in group}
    for vector in layout.vectors(groups):
        for rank in range(world):
            places: list[int] = []
            for piece in layout.pieces(vector.shapes, rank):
                found[piece.name] += range(piece.start, piece.start + piece.num_values)
                places += range(piece.offset, piece.offset + piece.num_values)
            assert len(set(places)) == len(places)
            assert not places or max(places) < layout.num_values(vector.shapes)
    sizes = {"a": 15, "b": 1, "c": 7, "d": 2, "e": 16}
    assert {name: sorted(values) for name, values in found.items()} == {
        name: list(range(size)) for name, size in sizes.items()
    }
