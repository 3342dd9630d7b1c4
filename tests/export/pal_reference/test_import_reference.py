"""A checkpoint of the PAL reference becomes a folder that scores as the reference does, and a user table.

The golden cases hold what its code printed on hidden states; the way from a text to hidden states is
written out here as its data code has it.
"""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer

from pal_ds.cli.main import main
from pal_ds.errors import UserError
from pal_ds.export.pal_reference.checkpoint import (
    ImportOptions,
    import_checkpoint,
    read_checkpoint,
)
from pal_ds.export.pal_reference.text import TextForm
from pal_ds.heads import Features, UserState
from pal_ds.heads.pal_reference import head_from_reference
from pal_ds.reward_models import load_reward_model
from pal_ds.users import UserTable
from tests.export.cases import ARCHITECTURES, make_tokenizer
from tests.export.test_folder import read_as_stranger
from tools import import_reference

GOLDEN = Path(__file__).parents[2] / "golden" / "pal_reference.safetensors"
TOLERANCE = 1e-5
END = "<|endoftext|>"
PROMPT, RESPONSES = "Human: Tell me about tea. Assistant:", (" tea is fine.", " Well, chess")
with safe_open(str(GOLDEN), "pt") as _file:
    _META = json.loads(_file.metadata()["meta"])
    _TENSORS = {key: _file.get_tensor(key) for key in _file.keys()}  # noqa: SIM118
CASES = {case["name"]: case for case in _META["cases"]}
USERS = [f"u{i}" for i in range(5)]
TEXT_CASES = ["pal_a.f(Pw).relu.cumulative", "pal_b.angle.gelu.cumulative"]


def config_of(name: str, **changes: Any) -> dict[str, Any]:
    """The reference's prefLearner_config of a golden case."""
    case = CASES[name]
    config = {"d_hid": _META["h"], "d_pref": _META["d"], "k": _META["K"], "llm_name": "some/model"}
    config |= {"pref_learner_type": case["similarity"], "proj_arch": case["projector"]}
    if case["model"] == "pal_a":
        config |= {"user_learner_type": case["user_point"]}
    config |= {"sfx_type": "softmax", "sfx_temperature": 1.0, "is_partition": False}
    return config | changes


def parameters(name: str) -> dict[str, Tensor]:
    """Of a golden case, without the learner's prefix."""
    prefix = f"{name}.param."
    return {k.removeprefix(prefix): t for k, t in _TENSORS.items() if k.startswith(prefix)}


def checkpoint_of(name: str, backbone: dict[str, Tensor]) -> dict[str, Any]:
    """As Lightning saves the reference's learner: shared parts under each of their names."""
    own = parameters(name)
    state = dict(own)
    shared = {"projector.": ("item_learner.projector.", "user_learner.projector.")}
    shared["projector_f."] = ("item_learner.projector.",)
    for key, tensor in own.items():
        for begin, copies in shared.items():
            if key.startswith(begin):
                state |= {copy + key.removeprefix(begin): tensor for copy in copies}
    for begin in ("llm.", "item_learner.llm.") + (("user_learner.llm.",) if "_b" in name else ()):
        state |= {begin + key: tensor for key, tensor in backbone.items()}
    state["softmax_w.temperature"] = state["user_learner.softmax.temperature"] = torch.ones(1)
    return {
        "epoch": 0,
        "pytorch-lightning_version": "2.2.0",
        "state_dict": {f"prefLearner.{key}": tensor for key, tensor in state.items()},
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.5)}},
        "optimizer_states": [{"state": {}, "param_groups": [{"lr": 1e-4, "params": [0]}]}],
    }


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders as llm_name downloads to: a decoder and an encoder, hidden size 32."""
    root = tmp_path_factory.mktemp("backbones")
    for name in ("gpt2", "bert"):
        torch.manual_seed(0)
        tokenizer = make_tokenizer(name)
        if name == "gpt2":
            # Its merges reach from a response into the reference's end, which is plain text to it.
            texts = [f"Well, tea is {word}.{END}" for word in ("fine", "good", "hot")] * 20
            tokenizer = tokenizer.train_new_from_iterator(texts, vocab_size=300)
        keys = {**ARCHITECTURES[name], "vocab_size": len(tokenizer)}
        model = AutoModel.from_config(AutoConfig.for_model(**keys))
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


def imported(
    folder: Path, backbone: Path, name: str, state: dict | None = None, **changes: Any
) -> Path:
    """FOLDER/out and FOLDER/users of a golden case with a backbone's weights."""
    weights = AutoModel.from_pretrained(backbone).state_dict()
    torch.save(checkpoint_of(name, weights) if state is None else state, folder / "best.ckpt")
    (folder / "config.yaml").write_text(yaml.safe_dump(config_of(name, **changes)))
    options = {"config": folder / "config.yaml", "backbone": backbone, "quiet": True}
    options = ImportOptions(**options, users_out=folder / "users")
    import_checkpoint(folder / "best.ckpt", folder / "out", options)
    return folder / "out"


def close(ours: Tensor, reference: Tensor) -> None:
    assert ours.shape == reference.shape
    assert (ours - reference).abs().max() <= TOLERANCE * reference.abs().max()


@pytest.mark.parametrize("name", CASES)
def test_rewards_of_the_folder_are_the_references(
    name: str, backbones: Path, tmp_path: Path
) -> None:
    """Each position of the golden texts as a text of its own: what a folder scores is one position."""
    head = load_reward_model(imported(tmp_path, backbones / "gpt2", name)).head
    users = UserTable.load(tmp_path / "users")
    assert list(users.ids) == USERS and users.seen.all()
    left, right, prompt = (_TENSORS[f"hidden.{key}"] for key in ("left", "right", "prompt"))
    num_pairs, num_positions, width = left.shape
    num_items = num_pairs * num_positions
    item = torch.arange(num_items)
    features = Features(
        torch.cat([left, right]).reshape(2 * num_items, 1, width),
        torch.stack([item, item + num_items], 1),
        prompt.reshape(num_items, 1, width),
        torch.stack([item, item], 1),
        torch.ones(num_items, dtype=torch.int64),
    )
    rows = _TENSORS["user_row"].repeat_interleave(num_positions)
    with torch.no_grad():
        output = head(features, UserState(users.logits[rows]))
    expected = _TENSORS[f"{name}.output"]
    if name.startswith("pal_a"):
        close(output.margin.view(num_pairs, num_positions), expected)
    else:
        close(output.reward.view(num_pairs, num_positions, 2), expected)


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("pal_b")])
def test_aligned_positions_as_the_reference_trains(name: str) -> None:
    left, right, prompt = (_TENSORS[f"hidden.{key}"] for key in ("left", "right", "prompt"))
    num_pairs, num_positions = left.shape[:2]
    pair = torch.arange(num_pairs)
    features = Features(
        torch.cat([left, right]),
        torch.stack([pair, pair + num_pairs], 1),
        prompt,
        torch.stack([pair, pair], 1),
        torch.full((num_pairs,), num_positions),
    )
    found = head_from_reference(parameters(name), config_of(name), "aligned")
    output = found.head(features, UserState(found.logits[_TENSORS["user_row"]]))
    close(output.reward.transpose(1, 2), _TENSORS[f"{name}.output"])


def reference_score(name: str, backbone: Path, texts: list[str], mixture: Tensor) -> Tensor:
    """[n]: the reference's rewards of texts by its own way to tokens, at the last one."""
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    model = AutoModel.from_pretrained(backbone).eval()
    p = parameters(name)

    def hidden(text: str) -> Tensor:
        ids = tokenizer(text + END, return_tensors="pt", return_token_type_ids=False)
        with torch.no_grad():
            return model(**ids).last_hidden_state[0, -1]

    def project(x: Tensor, prefix: str, act: Any, residual: bool) -> Tensor:
        y = x
        for layer in (0, 3, 6):
            y = nn.functional.linear(
                y if layer == 0 else act(y),
                p[f"{prefix}.mlp.layers.{layer}.weight"],
                p[f"{prefix}.mlp.layers.{layer}.bias"],
            )
        return x + y if residual else y

    if name.startswith("pal_a"):
        f = lambda x: project(x, "projector", torch.relu, True)  # noqa: E731
        point = f(mixture @ p["user_learner.P"])
        return torch.stack([-(f(hidden(PROMPT + text)) - point).norm() for text in texts])
    gelu = nn.functional.gelu
    maps = [
        project(hidden(PROMPT), f"user_learner.projectors.{k}", gelu, False)
        for k in range(len(mixture))
    ]
    point = mixture @ torch.stack(maps)
    scale = p["logit_scale"].exp().clamp(max=100)
    responses = [project(hidden(text), "projector_f", gelu, False) for text in texts]
    return torch.stack([scale * nn.functional.cosine_similarity(r, point, 0) for r in responses])


@pytest.mark.parametrize("backbone", ["gpt2", "bert"])
@pytest.mark.parametrize("name", TEXT_CASES)
def test_texts_are_read_as_in_the_reference(
    name: str,
    backbone: str,
    backbones: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Through `score`, for one user."""
    source = backbones / backbone
    out = imported(tmp_path, source, name)
    weights = torch.stack([parameters(name)[f"user_learner.W.{user}"] for user in USERS])
    mixtures = torch.softmax(weights, 1)
    lines = [json.dumps({"prompt": PROMPT, "response": text}) + "\n" for text in RESPONSES]
    (tmp_path / "in.jsonl").write_text("".join(lines))
    users = ["--user", "u3", "--users", str(tmp_path / "users")]
    main(["score", "--model", str(out), "--input", str(tmp_path / "in.jsonl"), *users])
    scored = [json.loads(line)["score"] for line in capsys.readouterr().out.splitlines()]
    expected = reference_score(name, source, list(RESPONSES), mixtures[3])
    assert expected.std() > 1e-3
    close(torch.tensor(scored), expected)


def test_users_that_do_not_fit_the_folder_are_named(
    backbones: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = imported(tmp_path, backbones / "gpt2", A)
    UserTable(2, ["u0"]).save(tmp_path / "other")
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": PROMPT + RESPONSES[0]}) + "\n")
    for user, table, words in (
        ("nobody", "users", "unknown user 'nobody'; the table holds 5 users"),
        ("u0", "other", "have 2 prototypes, the run has 3"),
        ("u0", "nowhere", "users.safetensors is missing"),
    ):
        given = ["--model", str(out), "--input", str(tmp_path / "in.jsonl"), "--user", user]
        with pytest.raises(SystemExit) as stopped:
            main(["score", *given, "--users", str(tmp_path / table)])
        assert stopped.value.code == 2 and words in capsys.readouterr().err


def test_strangers_read_the_folder(backbones: Path, tmp_path: Path) -> None:
    """For the population and for one user, with transformers alone, however a text is padded."""
    ways = [
        {"side": side, "special": special} for side, special in (("left", True), ("right", False))
    ]
    texts = [PROMPT + text for text in RESPONSES]
    jobs, expected = [], []
    for name, backbone in itertools.product(TEXT_CASES, ("gpt2", "bert")):
        mixture = None if len(jobs) % 2 else [0.0, 0.2, 0.8]
        place = tmp_path / f"{name}.{backbone}"
        place.mkdir()
        out = imported(place, backbones / backbone, name)
        job = {"folder": str(out), "texts": texts, "trust": True, "mixture": mixture, "ways": ways}
        jobs.append(job)
        weights = torch.stack([parameters(name)[f"user_learner.W.{user}"] for user in USERS])
        point = torch.softmax(weights, 1).mean(0) if mixture is None else torch.tensor(mixture)
        expected.append(reference_score(name, backbones / backbone, list(RESPONSES), point))
    for result, scores in zip(read_as_stranger(jobs, tmp_path), expected, strict=True):
        for found in result["scores"]:
            close(torch.tensor(found), scores)


def test_both_kinds_of_end_are_met(backbones: Path) -> None:
    """The tiny byte-level tokenizer joins the end with what precedes it, the encoder's does not."""
    written = {}
    for name in ("gpt2", "bert"):
        tokenizer = AutoTokenizer.from_pretrained(backbones / name)
        form = TextForm.of(tokenizer, end_text=END, prompt_end=" Assistant:")
        written[name] = form.written_end
    assert written == {"gpt2": END, "bert": ""}


def reference_projector(architecture: str, width: int) -> tuple[nn.Sequential | nn.Identity, bool]:
    """The reference's layers for a `proj_arch`: linear, batch norm, dropout, activation; ...; linear."""
    if architecture == "identity":
        return nn.Identity(), False
    layers: list[nn.Module] = []
    bias = "nobias" not in architecture
    activation = {"relu": nn.ReLU, "gelu": nn.GELU, "linear": nn.Identity}[
        architecture.split("-")[1]
    ]
    for _ in range(int(architecture[3])):
        layers.append(nn.Linear(width, width, bias=bias))
        if "batchnorm" in architecture:
            norm = nn.BatchNorm1d(width)
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2.0)
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
            layers.append(norm)
        layers += [nn.Dropout(0.5), activation()]
    layers.append(nn.Linear(width, width, bias=bias))
    return nn.Sequential(*layers).eval(), "residual" in architecture


ARCHITECTURE_NAMES = [
    "identity",
    "mlp0-linear-dropout0-nobias",
    "mlp1-relu-dropout5",
    "mlp2-gelu-dropout25-residual",
    "mlp2-relu-dropout0-batchnorm",
    "mlp1-gelu-dropout0-residual-batchnorm",
    "mlp3-linear-dropout0",
    "mlp2-linear-dropout0-batchnorm-residual",
    "mlp2-relu-dropout0-nobias",
]


@pytest.mark.parametrize("similarity", ["dist", "angle", "angle_hinge"])
@pytest.mark.parametrize("architecture", ARCHITECTURE_NAMES)
@torch.no_grad()
def test_every_projector_of_the_reference(architecture: str, similarity: str) -> None:
    torch.manual_seed(0)
    width, num_prototypes = 6, 2
    layers, residual = reference_projector(architecture, width)
    f = lambda x: x + layers(x) if residual else layers(x)  # noqa: E731
    tensors = {f"projector.mlp.layers.{k}": v for k, v in layers.state_dict().items()}
    tensors |= {"user_learner.P": torch.randn(num_prototypes, width)}
    tensors |= {"logit_scale": torch.tensor(1.5), "softmax_w.temperature": torch.tensor([0.5])}
    tensors |= {"user_learner.W.a": torch.randn(num_prototypes)}
    config = {"d_hid": width, "k": num_prototypes, "user_learner_type": "f(P)w"}
    config |= {"pref_learner_type": similarity, "proj_arch": architecture, "sfx_type": "softmax"}
    found = head_from_reference(tensors, config)
    hidden, pair = torch.randn(2, 1, width), torch.tensor([[0, 1]])
    ours = found.head(Features(hidden, pair), UserState(found.logits)).margin[0, 0]

    weights = torch.softmax(tensors["user_learner.W.a"] / 0.5, 0)
    point, responses = weights @ f(tensors["user_learner.P"]), f(hidden[:, 0])
    if similarity == "dist":
        left, right = (responses - point).norm(dim=1)
        expected = left - right
    else:
        left, right = nn.functional.cosine_similarity(responses, point[None])
        expected = (right - left) * tensors["logit_scale"].exp()
    assert ours == pytest.approx(expected.item(), abs=2e-5)


def test_a_partition_scores_by_the_largest_weight() -> None:
    name = "pal_b.angle.gelu.mean"
    found = head_from_reference(parameters(name), config_of(name, is_partition=True))
    weights = found.head.mixture_weights(UserState(found.logits))
    assert torch.equal(weights, nn.functional.one_hot(found.logits.argmax(1), 3).float())


A, B = "pal_a.f(Pw).relu.mean", "pal_b.angle.gelu.mean"


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        (A, {"pref_learner_type": "dist_logistic"}, "farther from the user"),
        (A, {"pref_learner_type": "dist_normalization"}, "depends on the other tokens"),
        (A, {"pref_learner_type": "norm"}, "no code in the reference"),
        (A, {"pref_learner_type": "other"}, "is unknown"),
        (B, {"pref_learner_type": "dist"}, "rest of the batch"),
        (B, {"pref_learner_type": "angle_hinge"}, "positions of the padded prompt"),
        (A, {"user_learner_type": "|f(P)|w"}, "no mixture of K points"),
        (A, {"sfx_type": "gumbel_softmax"}, "new mixture at every evaluation"),
        (A, {"proj_arch": "mlp2-relu"}, "none of the reference's"),
        (A, {"proj_arch": "mlp3-relu-dropout0"}, "3 linear maps"),
        (A, {"proj_arch": "identity"}, "projector.mlp.layers.0.bias is no parameter"),
        (A, {"k": 2}, "k: 2, and users have 3"),
        (A, {"proj_arch": None}, "the config has no proj_arch"),
        (B, {"user_learner_type": "Pw"}, "the config is one of PAL-A"),
    ],
)
def test_what_cannot_be_represented_is_refused_by_name(
    name: str, changes: dict, words: str
) -> None:
    with pytest.raises(ValueError, match="^(?s:.*)" + words.replace("|", r"\|")):
        head_from_reference(parameters(name), config_of(name, **changes))


def run_tool(folder: Path, backbone: Path, content: Any, capsys, *extra: str) -> str:
    """What the command says to a checkpoint with this content; it ends with code 2 and leaves nothing."""
    torch.save(content, folder / "best.ckpt")
    (folder / "config.yaml").write_text(yaml.safe_dump(config_of(A)))
    files = ["--config", str(folder / "config.yaml"), "--backbone", str(backbone)]
    with pytest.raises(SystemExit) as stopped:
        import_reference.main([str(folder / "best.ckpt"), str(folder / "out"), *files, *extra])
    assert stopped.value.code == 2
    assert {path.name for path in folder.iterdir()} == {"best.ckpt", "config.yaml"}
    return capsys.readouterr().err


class Trap:
    """An object that does something when it is loaded."""

    sprung: list[int] = []  # noqa: RUF012

    def __reduce__(self):
        return Trap.sprung.append, (1,)


def test_objects_are_not_loaded(backbones: Path, tmp_path: Path, capsys) -> None:
    content = {"state_dict": {}, "hyper_parameters": Trap()}
    said = run_tool(tmp_path, backbones / "gpt2", content, capsys)
    assert "to load objects is to run code" in said and "torch.save(c['state_dict']" in said
    assert Trap.sprung == []
    content["hyper_parameters"] = Path("x")
    assert "holds pathlib" in run_tool(tmp_path, backbones / "gpt2", content, capsys)


def test_checkpoints_that_cannot_be_are_named(backbones: Path, tmp_path: Path, capsys) -> None:
    good = checkpoint_of(A, AutoModel.from_pretrained(backbones / "gpt2").state_dict())
    state = good["state_dict"]

    def said(changes: dict, *extra: str, backbone: str = "gpt2") -> str:
        content = {"state_dict": {**state, **changes}} if changes is not state else changes
        return run_tool(tmp_path, backbones / backbone, content, capsys, *extra)

    copy = "prefLearner.item_learner.projector.mlp.layers.0.bias"
    assert "projector.mlp.layers.0.bias and its copy" in said({copy: torch.ones(32)})
    assert "stranger.x is no tensor of PAL's learner" in said({"stranger.x": torch.ones(1)})
    assert "the exported model needs shape" in said({}, backbone="bert")
    assert "unknown user 'nobody'" in said({}, "--user", "nobody")
    assert "--max_shard_size 4" in said({}, "--max_shard_size", "4")
    nowhere = run_tool(tmp_path, Path("nowhere"), good, capsys)
    assert "--backbone nowhere: cannot be opened" in nowhere
    with pytest.raises(SystemExit):
        main = import_reference.main
        files = ["--config", "nowhere", "--backbone", str(backbones / "gpt2")]
        main([str(tmp_path / "best.ckpt"), str(tmp_path / "out"), *files])
    assert "config nowhere: no such file" in capsys.readouterr().err
    for content, words in (({"a.b": torch.ones(1)}, "no user_learner"), ([1], "no state dict")):
        assert words in run_tool(tmp_path, backbones / "gpt2", content, capsys)
    for content in (b"\x80rubbish", (tmp_path / "best.ckpt").read_bytes()[:-30]):
        (tmp_path / "best.ckpt").write_bytes(content)
        with pytest.raises(UserError, match="no checkpoint that"):
            read_checkpoint(tmp_path / "best.ckpt")


def test_a_plain_state_dict_without_a_backbone(backbones: Path, tmp_path: Path) -> None:
    """The folder then has the weights of --backbone, as in the reference's runs with a fixed one."""
    weights = AutoModel.from_pretrained(backbones / "bert").state_dict()
    whole = tmp_path / "whole"
    bare = tmp_path / "bare"
    whole.mkdir()
    bare.mkdir()
    folders = [
        imported(whole, backbones / "bert", A),
        imported(bare, backbones / "bert", A, state=parameters(A)),
    ]
    assert any(name.startswith("pooler.") for name in weights)
    first, second = (load_reward_model(folder).state_dict() for folder in folders)
    assert all(torch.equal(first[name], second[name]) for name in first)
    facts = json.loads((bare / "out" / "export.json").read_text())
    assert facts["backbone_weights"] == "not in the checkpoint; given"
    assert "Imported from | best.ckpt" in (bare / "out" / "README.md").read_text()
    with pytest.raises(UserError, match="not empty"):
        imported(bare, backbones / "bert", A)
