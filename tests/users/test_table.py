"""The user table against torch's own Adam, and its promises about adding and moving users."""

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor

from pal_ds.errors import UserError
from pal_ds.users import UsersConfig, UserTable

K = 3
IDS = [f"user {i}" for i in range(6)]


def a_table(**config) -> UserTable:
    return UserTable(K, IDS, UsersConfig(**config), seed=7)


def tensors_of(table: UserTable) -> dict[str, Tensor]:
    return {k: v for k, v in table.state_dict().items() if isinstance(v, Tensor)}


def an_update(seed: int, n: int = 40, num_rows: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of rows 0 .. num_rows - 1 only, several per row, with order unlike the position."""
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randint(num_rows, (n,), generator=draw)
    scale = 10.0 ** torch.randint(-4, 4, (n, 1), generator=draw)
    gradients = torch.randn(n, K, generator=draw) * scale
    return rows, gradients, torch.randperm(n, generator=draw)


def test_each_user_follows_an_adam_of_their_own() -> None:
    table = a_table()
    parameters = [torch.nn.Parameter(row.clone()) for row in table.logits]
    optimisers = [torch.optim.Adam([p], lr=1.0) for p in parameters]
    steps = [0] * len(IDS)
    for update in range(6):
        rows, gradients, order = an_update(update, n=5, num_rows=5)
        learning_rate = 0.05 / (update + 1)
        table.apply(rows, gradients, order, learning_rate)
        for row in rows.unique().tolist():
            parameters[row].grad = gradients[rows == row].sum(0)
            optimisers[row].param_groups[0]["lr"] = learning_rate
            optimisers[row].step()
            steps[row] += 1
    assert torch.allclose(table.logits, torch.stack(list(parameters)), rtol=1e-5, atol=1e-7)
    assert table.step.tolist() == steps
    assert len(set(steps)) > 2, (
        "rows must have moved unequally often for this test to mean anything"
    )
    assert table.seen.tolist() == [s > 0 for s in steps]


def test_the_order_of_the_input_never_shows() -> None:
    rows, gradients, order = an_update(0)
    expected = a_table()
    expected.apply(rows, gradients, order, 0.05)
    for seed in range(5):
        shuffle = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
        # A plain sum in the order given would differ in the last bits for these scales.
        table = a_table()
        table.apply(rows[shuffle], gradients[shuffle], order[shuffle], 0.05)
        for name in ("logits", "exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(getattr(table, name), getattr(expected, name))


def test_gradients_are_added_in_global_order() -> None:
    gradients = torch.tensor([[1.0], [1e8], [-1e8]]).expand(3, K).contiguous()
    rows = torch.zeros(3, dtype=torch.long)
    for order, total in (([0, 1, 2], 0.0), ([2, 0, 1], 1.0)):
        table = a_table()
        table.apply(rows, gradients, torch.tensor(order), 0.05)
        assert torch.allclose(table.exp_avg[0], torch.full((K,), 0.1 * total))


def test_rows_not_named_do_not_move() -> None:
    table = a_table()
    before = table.logits.clone()
    table.apply(*an_update(0), 0.05)
    assert torch.equal(table.logits[4:], before[4:])
    assert not table.exp_avg[4:].any() and not table.step[4:].any() and not table.seen[4:].any()
    assert (table.logits[:4] != before[:4]).any(1).all()


def test_an_update_without_users_changes_nothing() -> None:
    table = a_table()
    before = table.logits.clone()
    nothing = torch.empty(0, dtype=torch.long)
    table.apply(nothing, torch.empty(0, K), nothing, 0.05)
    assert torch.equal(table.logits, before)


def test_a_row_norm_bound_acts_on_the_sum_of_each_row() -> None:
    table = a_table(max_row_norm=1.0)
    rows = torch.tensor([0, 0, 1])
    gradients = torch.tensor([[3.0, 0, 0], [0, 4.0, 0], [0.5, 0, 0]])
    table.apply(rows, gradients, torch.arange(3), 0.05)
    assert torch.allclose(table.exp_avg[0], 0.1 * torch.tensor([0.6, 0.8, 0.0]))
    assert torch.allclose(table.exp_avg[1], 0.1 * torch.tensor([0.5, 0.0, 0.0]))


def test_leaf_collects_gradients_apart_from_the_table() -> None:
    table = a_table()
    rows = table.rows([IDS[2], IDS[0], IDS[2]])
    assert rows.tolist() == [2, 0, 2]
    leaf = table.leaf(rows)
    assert torch.equal(leaf, table.logits[rows]) and leaf.is_leaf
    leaf.square().sum().backward()
    with torch.no_grad():
        leaf += 1
    assert torch.allclose(table.logits[2], leaf[0] - 1)


def test_unknown_users_are_named() -> None:
    with pytest.raises(UserError, match="'nobody'"):
        a_table().rows([IDS[0], "nobody"])
    with pytest.raises(UserError, match="and 3 more"):
        a_table().rows([f"x{i}" for i in range(8)])


def test_a_new_user_depends_on_seed_and_id_alone() -> None:
    whole = a_table()
    grown = UserTable(K, seed=7)
    for user_id in reversed(IDS):
        grown.add([user_id])
    assert torch.equal(whole.logits, grown.logits[grown.rows(IDS)])
    assert not torch.equal(whole.logits, UserTable(K, IDS, seed=8).logits)
    assert len(torch.unique(whole.logits)) == whole.logits.numel()


def test_new_logits_have_the_stated_spread() -> None:
    ids = [str(i) for i in range(4000)]
    logits = UserTable(5, ids, UsersConfig(init_std=0.3)).logits
    assert float(logits.mean()) == pytest.approx(0, abs=0.01)
    assert float(logits.std()) == pytest.approx(0.3, rel=0.02)
    assert float((logits.abs() < 0.3).float().mean()) == pytest.approx(0.683, abs=0.01)
    assert not UserTable(5, ids, UsersConfig(init_std=0.0)).logits.any()


def test_adding_and_removing_leave_the_others_as_they_were() -> None:
    table = a_table()
    table.apply(*an_update(0), 0.05)
    before = {name: t.clone() for name, t in tensors_of(table).items()}
    table.add(["late"])
    table.remove(IDS[1])
    assert "late" in table and IDS[1] not in table and len(table) == len(IDS)
    kept = [i for i in IDS if i != IDS[1]]
    old = torch.tensor([IDS.index(i) for i in kept])
    for name, tensor in tensors_of(table).items():
        assert torch.equal(tensor[table.rows(kept)], before[name][old])
    assert not table.seen[table.rows(["late"])].any()


@pytest.mark.parametrize("ids", [[""], ["a", "a"], [IDS[0]], [3]])
def test_bad_ids_are_refused(ids: list) -> None:
    table = a_table()
    with pytest.raises((UserError, TypeCheckError)):
        table.add(ids)
    assert len(table) == len(IDS) == len(table.logits)


def test_mixtures_are_points_of_the_simplex() -> None:
    table = a_table()
    assert torch.allclose(table.mixtures().sum(-1), torch.ones(len(IDS)))
    assert torch.equal(table.mixtures(0.5), torch.softmax(table.logits * 2, -1))


def test_save_and_load_continue_exactly(tmp_path) -> None:
    table = a_table()
    table.apply(*an_update(0), 0.05)
    table.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["users.arrow", "users.safetensors"]
    loaded = UserTable.load(tmp_path, table.config)
    assert loaded.ids == table.ids
    for one in (table, loaded):
        one.add(["late"])
        one.apply(*an_update(1), 0.05)
    for name, tensor in tensors_of(table).items():
        assert torch.equal(tensor, tensors_of(loaded)[name])


def test_empty_tables_save_and_load(tmp_path) -> None:
    UserTable(K).save(tmp_path)
    loaded = UserTable.load(tmp_path)
    assert len(loaded) == 0 and loaded.num_prototypes == K


def test_state_dict_round_trip_and_refusals() -> None:
    table, other = a_table(), UserTable(K, ["someone else"])
    other.load_state_dict(table.state_dict())
    assert other.ids == table.ids and torch.equal(other.logits, table.logits)
    other.apply(*an_update(0), 0.05)
    assert not torch.equal(other.logits, table.logits), "loading must copy"
    with pytest.raises(UserError, match="num_prototypes"):
        UserTable(K + 1).load_state_dict(table.state_dict())


def test_damaged_files_are_refused(tmp_path) -> None:
    with pytest.raises(UserError, match="missing"):
        UserTable.load(tmp_path)
    a_table().save(tmp_path)
    index = (tmp_path / "users.arrow").read_bytes()
    UserTable(K, IDS[:2]).save(tmp_path)
    (tmp_path / "users.arrow").write_bytes(index)
    with pytest.raises(UserError, match="damaged"):
        UserTable.load(tmp_path)


def test_one_prototype_never_moves() -> None:
    table = UserTable(1, IDS)
    before = table.logits.clone()
    leaf = table.leaf(table.rows(IDS))
    torch.softmax(leaf, -1).square().sum().backward()
    table.apply(table.rows(IDS), leaf.grad, torch.arange(len(IDS)), 0.05)
    assert torch.equal(table.logits, before)


@pytest.mark.parametrize(
    "bad",
    [{"learning_rate": 0.0}, {"betas": (1.0, 0.9)}, {"init_std": -1.0}, {"max_row_norm": 0.0}],
)
def test_bad_settings_are_named(bad: dict) -> None:
    with pytest.raises(UserError, match=next(iter(bad))):
        UsersConfig(**bad)


def test_reliability_lies_behind_the_logits(tmp_path) -> None:
    """Logits start as without it, its own moments move it, and it comes back from the disk to the bit."""
    table = a_table(reliability="learnt")
    assert torch.equal(table.logits, a_table().logits) and not table.log_reliability.any()
    rows = table.rows(IDS[:2])
    assert table.leaf(rows).shape == (2, K + 1)
    for number in range(12):
        gradients = torch.randn(2, K + 1, generator=torch.Generator().manual_seed(number))
        table.apply(rows, gradients, None, 0.05)
        assert table.log_reliability[:2].all() and not table.log_reliability[2:].any()
    plain, moved = a_table(), a_table(reliability="learnt")
    one = torch.ones(2, K + 1)
    plain.apply(rows, one[:, :K], None, 0.05)
    moved.apply(rows, one, None, 0.05)
    assert torch.equal(plain.logits, moved.logits), "logits move as they do without it"
    table.save(tmp_path / "with")
    for loaded in (
        UserTable.load(tmp_path / "with", table.config),
        UserTable.load(tmp_path / "with"),
    ):
        state = loaded.state_dict()
        for name, tensor in table.state_dict().items():
            assert (
                torch.equal(tensor, state[name])
                if isinstance(tensor, Tensor)
                else tensor == state[name]
            )
    table.remove(IDS[0])
    assert len(table.log_reliability) == len(IDS) - 1 and table.log_reliability[0]
    with pytest.raises(
        UserError, match=r"its users have a reliability, and users\.reliability is none"
    ):
        UserTable.load(tmp_path / "with", UsersConfig())
    plain.save(tmp_path / "without")
    with pytest.raises(
        UserError, match=r"have no reliability, and users\.reliability is learnt here"
    ):
        UserTable.load(tmp_path / "without", table.config)
