"""The origin of a run: weights, head and users of another run or of an exported folder."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoConfig, PretrainedConfig

from pal_ds.backbones.language import STATE_PREFIX, output_layer_of
from pal_ds.backbones.transformer import read_model_config
from pal_ds.data.dataset_info import DatasetInfo
from pal_ds.engine.checkpoint.verify import refuse_strangers
from pal_ds.errors import UserError
from pal_ds.export.card import FACTS_NAME
from pal_ds.export.contents import verify_export
from pal_ds.export.weights import Tensors, weights_of
from pal_ds.heads.base import Head, UserState
from pal_ds.heads.jaxtyping_fallback import Float
from pal_ds.inference.load_run import OpenRun, open_run, trained_head
from pal_ds.io.boundary import reading
from pal_ds.runs.run_dir import OriginSource, RunDirectory
from pal_ds.users import UserTable
from pal_ds.users.ids import UserIds

STOCK_HEAD = "score.weight"
"""Name of a stock class's only tensor beyond the backbone."""


class OriginUsers(NamedTuple):
    """Users that a run may start with."""

    ids: UserIds
    logits: Float[Tensor, "U K"]
    log_reliability: Float[Tensor, "U"] | None = None
    """None where they have none, or the origin does not say."""
    log_tie_threshold: Float[Tensor, "U"] | None = None
    """None as above."""


@dataclass(frozen=True)
class Origin:
    """An origin of weights; none of the backbone's is read yet."""

    path: Path
    facts: OriginSource
    """Kind, step and hash, which name the origin for good."""
    info: DatasetInfo
    """`kind`, `tokens` and `vector_size`, as in dataset.json of the data it was trained on."""
    tokenizer: Path
    tokenizer_rewritten: bool
    model_config: Any
    """transformers config of the backbone; None for vectors."""
    frozen_path: str | None
    """Folder or hub id of a backbone that was never trained and lies outside of the run; weights is None then."""
    weights: Callable[[], Tensors] | None
    """Reads the backbone's tensors, by the names of its transformers class."""
    output_layer: Tensors | None
    """Output layer of the language model, by its full names, where one lies beside the weights and is not tied."""
    head: str
    """Class name of the head."""
    head_tensors: dict[str, Tensor]
    users: Callable[[Head], "OriginUsers"]
    """Its users, for a head of this very class and these tensors."""


def logits_of(head: Head, mixtures: Float[Tensor, "U K"]) -> Float[Tensor, "U K"] | None:
    """Return logits that this head turns into these points, up to a constant; None where it makes points otherwise.

    For mixtures, tau of s = softmax(w / tau) is read off what the head makes of the logits (1, 0, .., 0); of signed
    weights it is the head's `temperature`.
    """
    head = head.eval()
    if not head.on_simplex and "logits" in head.needs:
        logits = (mixtures * mixtures.shape[1] - 1) * head.temperature
        with torch.no_grad():
            roundtrip = head.mixture_weights(UserState(logits))
        return logits if torch.allclose(roundtrip, mixtures, atol=1e-5) else None
    probe = torch.zeros(1, mixtures.shape[1])
    probe[0, 0] = 1.0
    with torch.no_grad():
        shares = head.mixture_weights(UserState(probe))[0]
        if mixtures.shape[1] < 2 or not 0 < shares[1] < shares[0]:
            return None
        # Below what a float can tell apart, a share is as good as this one.
        logits = mixtures.double().clamp(min=1e-12).log()
        logits = (logits / (shares[0] / shares[1]).double().log()).float()
        roundtrip = head.mixture_weights(UserState(logits))
    return logits if torch.allclose(roundtrip, mixtures, atol=1e-5) else None


def open_origin(path: Path, *, trust: bool, trust_code: bool = False) -> Origin:
    """Open a run directory at its best step, or at the latest where it has none; or a folder of `tools/consolidate.py`.

    Raises:
        UserError: neither lies there, or it cannot be read; see `open_run` and `open_export`.
    """
    if (path / "config.yaml").is_file():
        return _of_run(path, trust=trust, trust_code=trust_code)
    if (path / FACTS_NAME).is_file():
        return open_export(path, trust=trust)
    raise UserError(
        f"train.init_from {path}: holds neither config.yaml (a run directory) nor {FACTS_NAME} (an exported folder). "
        "Name a directory that `train` or tools/consolidate.py wrote."
    )


def _of_run(path: Path, *, trust: bool, trust_code: bool) -> Origin:
    run = RunDirectory(path)
    step = "latest" if run.pointer("best") is None else "best"
    try:
        opened = open_run(run, step, trust=trust, trust_code=trust_code)
    except UserError as error:
        raise type(error)(f"train.init_from {path}: {error}") from None
    model_config, frozen_path, weights = _backbone_of(opened)
    return Origin(
        path=path,
        facts={"kind": "run", "step": opened.step, "hash": opened.manifest["checksum"]},
        info=opened.data.info,
        tokenizer=opened.data.tokenizer_path,
        tokenizer_rewritten=False,
        model_config=model_config,
        frozen_path=frozen_path,
        weights=weights,
        output_layer=None if weights is None else _output_layer(opened, model_config),
        head=type(opened.parts.head).__name__,
        head_tensors=dict(trained_head(opened).state_dict()),
        users=lambda _: _users_of_run(opened.users),
    )


def _backbone_of(opened: OpenRun) -> tuple[Any, str | None, Callable[[], Tensors] | None]:
    """Return (config, path of weights that were never trained, how to read weights that were)."""
    backbone = opened.parts.backbone
    if backbone is None:
        return None, None, None
    config = read_model_config(backbone)
    if backbone.tuning == "frozen" and opened.config.backbone.path is not None:
        return config, backbone.path, None
    if backbone.trust_remote_code and getattr(config, "auto_map", None):
        raise UserError(
            f"train.init_from {opened.run.path}: its backbone brings code of its own, which a copy of its trained "
            "weights would lose. Train it in one run, or use a model that transformers has a class for."
        )
    return config, None, lambda: weights_of(opened)


def _output_layer(opened: OpenRun, config: PretrainedConfig) -> Tensors | None:
    """Return the output layer as the run trained it (`loss.lm_weight`), or as it lay beside the run's first weights."""
    backbone, checkpoint = opened.parts.backbone, opened.checkpoint
    assert backbone is not None and backbone.path is not None
    files = output_layer_of(backbone.path, config)
    if not files:
        return None
    stored = stored_tensors({name: (file, name) for name, file in files.items()})
    trained = {name: STATE_PREFIX + name.rsplit(".", 1)[-1] for name in files}

    def read(name: str) -> Iterator[Tensor]:
        in_checkpoint = trained[name] in checkpoint
        return checkpoint.pieces(trained[name]) if in_checkpoint else stored.read(name)

    return Tensors(stored.shapes, read)


def stored_tensors(places: dict[str, tuple[Path, str]]) -> Tensors:
    """Return tensors of safetensors files by names of ours; `places` has the file of each and its name there."""

    def read(name: str) -> Iterator[Tensor]:
        path, stored_name = places[name]
        with safe_open(str(path), "pt") as file:
            yield file.get_tensor(stored_name).float().flatten()

    shapes = {}
    for name, (path, stored_name) in places.items():
        with safe_open(str(path), "pt") as file:
            shapes[name] = tuple(file.get_slice(stored_name).get_shape())
    return Tensors(shapes, read)


def whole(tensors: Tensors) -> dict[str, Tensor]:
    """Read all tensors into memory, in their shapes."""
    return {
        name: torch.cat(list(tensors.read(name))).view(shape)
        for name, shape in tensors.shapes.items()
    }


_OF_THE_EXPORT = ("auto_map", "architectures", "canonical", "transformers_version", "dtype")


def open_export(path: Path, *, trust: bool) -> Origin:
    """Open the folder at `path`, once its weights, config and tokenizer are those its export.json lists.

    Raises:
        UntrustedCheckpointError: a stranger may have written it, without `trust`.
        UserError: it is damaged, or of another format.
    """
    if not trust:
        for file in (path, *path.iterdir()):
            refuse_strangers(file)
    try:
        facts = verify_export(path, whole=True)
    except UserError as error:
        raise UserError(f"train.init_from {error}") from None
    with reading(path, "exported model", "Copy the folder again, or export again."):
        return _of_export(path, facts)


def _of_export(path: Path, facts: dict[str, Any]) -> Origin:
    file_of = {}
    for name in facts["sha256"]:
        if name.endswith(".safetensors"):
            with safe_open(str(path / name), "pt") as stream:
                file_of |= dict.fromkeys(stream.keys(), path / name)
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    stock = facts["stock_class"] is not None
    inner = config if stock else config["text_config"]
    inner = {key: value for key, value in inner.items() if key not in _OF_THE_EXPORT}
    model_config = AutoConfig.for_model(**inner)
    prefix = "backbone."
    if stock:
        stock_class: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(model_config)]
        prefix = f"{stock_class.base_model_prefix}."
    backbone = {
        n.removeprefix(prefix): (file, n) for n, file in file_of.items() if n.startswith(prefix)
    }
    head = {
        n.removeprefix("head."): (file, n)
        for n, file in file_of.items()
        if not n.startswith(prefix)
    }
    digest = hashlib.sha256((path / FACTS_NAME).read_bytes()).hexdigest()
    return Origin(
        path=path,
        facts={"kind": "export", "step": facts.get("step", 0), "hash": f"sha256:{digest}"},
        info=cast(DatasetInfo, {"kind": "tokens", "tokens": facts["tokens"], "vector_size": None}),
        tokenizer=path,
        tokenizer_rewritten=stock,
        model_config=model_config,
        frozen_path=None,
        weights=lambda: stored_tensors(backbone),
        output_layer=None,
        head=facts["head"],
        head_tensors=whole(stored_tensors(head)),
        users=lambda head: _users(path, head),
    )


def _users_of_run(users: UserTable) -> OriginUsers:
    of_scalars = {f"log_{name}": getattr(users, f"log_{name}") for name in users.scalars}
    return OriginUsers(users.ids, users.logits, **of_scalars)


def _users(path: Path, head: Head) -> OriginUsers:
    """Return the users of `--with_users`, whose mixtures the folder holds; nobody where it or the head has none."""
    nobody = OriginUsers(UserIds.of(()), torch.empty(0, head.num_prototypes))
    file = path / "users.jsonl"
    if not file.is_file():
        return nobody
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    logits = logits_of(head, torch.tensor([line["mixture"] for line in lines]))
    if logits is None:
        return nobody
    return OriginUsers(UserIds.of([line["user_id"] for line in lines]), logits)
