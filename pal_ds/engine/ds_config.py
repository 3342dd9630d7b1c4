"""Loads a DeepSpeed JSON, fills what the recipe owns, and refuses contradictions before anything is queued."""

import difflib
import json
from pathlib import Path
from typing import Any

from pal_ds.config.run_config import TrainConfig
from pal_ds.errors import UserError
from pal_ds.io.files import shipped_folder

SHIPPED_CONFIGS = shipped_folder("ds_configs", "zero*.json")

DeepSpeedConfig = dict[str, Any]
"""DeepSpeed's JSON, or a section of it: its keys are DeepSpeed's to define."""

OWNED_BY_RECIPE = {
    "train_batch_size": "train.batch_pairs",
    "train_micro_batch_size_per_gpu": "train.micro_batch_pairs",
    "gradient_accumulation_steps": "train.micro_batch_pairs",
    "gradient_clipping": "train.gradient_clipping",
    "optimizer": "optim",
    "scheduler": "optim.schedule",
}
COMMON_KEYS = (
    *OWNED_BY_RECIPE,
    *("zero_optimization", "bf16", "fp16", "activation_checkpointing", "communication_data_type"),
    *("wall_clock_breakdown", "comms_logger", "flops_profiler", "zero_allow_untested_optimizer"),
    *("zero_force_ds_cpu_optimizer", "prescale_gradients", "gradient_predivide_factor"),
    *("steps_per_print", "dump_state", "checkpoint", "data_types", "aio"),
)
REMOVED_KEYS = {
    **dict.fromkeys(
        (
            *("nebula", "compression_training", "quantize_training", "eigenvalue"),
            *("sparse_attention", "elasticity", "graph_harvesting", "curriculum_learning"),
            "progressive_layer_drop",
        ),
        "delete it",
    ),
    "amp": "delete it and set train.precision: bf16",
    "sparse_gradients": "delete it (user rows are already updated row by row)",
}
REMOVED_ZERO_KEYS = {
    "mics_shard_size": "use zero_hpz_partition_size",
    "mics_hierarchical_params_gather": "delete it",
    "zeropp_loco_param": "delete it",
}


def load_ds_config(name_or_path: str) -> tuple[DeepSpeedConfig, str]:
    """Read the DeepSpeed JSON of a shipped name (`zero3`) or of a file; return it and the path it was read from.

    Raises:
        UserError: the file is missing, is no JSON object, or holds keys that DeepSpeed removed.
    """
    path = Path(name_or_path)
    if not path.suffix and not path.exists():
        path = SHIPPED_CONFIGS / f"{name_or_path}.json"
    if not path.is_file():
        shipped = ", ".join(sorted(file.stem for file in SHIPPED_CONFIGS.glob("*.json")))
        raise UserError(
            f"train.ds_config: no file {path}. Give a path to a DeepSpeed JSON or one of: {shipped}."
        )
    try:
        config = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}:{error.lineno}: not valid JSON ({error.msg}). Mend the file."
        ) from None
    if not isinstance(config, dict):
        raise UserError(
            f"{path}: a DeepSpeed config is a JSON object, found {type(config).__name__}."
        )
    _check_shape(config, path)
    zero = config.get("zero_optimization", {})
    _check_supported(zero, path)
    removed = {key: REMOVED_KEYS[key] for key in REMOVED_KEYS.keys() & config}
    for key in REMOVED_ZERO_KEYS.keys() & zero:
        removed[f"zero_optimization.{key}"] = REMOVED_ZERO_KEYS[key]
    for key, remedy in removed.items():
        raise UserError(f"{path}: DeepSpeed removed the key {key}; {remedy}.")
    return config, str(path)


def _check_shape(config: DeepSpeedConfig, path: Path) -> None:
    """Raises UserError for a section that is no object, a stage that is none, a key that is nearly another.

    DeepSpeed ignores a top-level key that it does not know, so a misspelt one would change nothing, silently.
    """
    for section in ("zero_optimization", "bf16", "fp16"):
        if not isinstance(config.get(section, {}), dict):
            raise UserError(
                f"{path}: {section} must be an object, found {json.dumps(config[section])}."
            )
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        raise UserError(
            f"{path}: zero_optimization.stage is {json.dumps(stage)}; it must be 0, 1, 2 or 3."
        )
    for key in config:
        near = difflib.get_close_matches(key, COMMON_KEYS, n=1, cutoff=0.8)
        if near and near[0] != key and key not in COMMON_KEYS:
            raise UserError(f"{path}: DeepSpeed knows no key {key}. Did you mean {near[0]}?")


def _check_supported(zero: DeepSpeedConfig, path: Path) -> None:
    """Raises UserError for what DeepSpeed can do and a checkpoint or the guard over updates cannot follow."""
    problems = []
    for section in ("offload_optimizer", "offload_param"):
        offload = zero.get(section)
        if not isinstance(offload, dict):
            continue  # DeepSpeed refuses what is none
        if offload.get("device") == "nvme":
            problems.append(
                f'{section}.device is "nvme": DeepSpeed would copy swap files into checkpoints, unhashed. Offload to '
                '"cpu"'
            )
        if offload.get("ratio", 1) != 1:
            problems.append(
                f"{section}.ratio is {json.dumps(offload['ratio'])}: part of the model would be stepped by an "
                "optimizer that neither the schedule nor the guard over updates reaches. Delete it (or set it to 1)"
            )
    if zero.get("compute_grad_norm", True) is not True:
        problems.append(
            f"compute_grad_norm is {json.dumps(zero['compute_grad_norm'])}: updates are judged by that norm. Delete it"
        )
    if problems:
        raise UserError(f"{path}: zero_optimization.{problems[0]}.")


def check_zero_section(config: DeepSpeedConfig, name_or_path: str) -> None:
    """Raises UserError where DeepSpeed refuses a key or value of `zero_optimization`; imports deepspeed."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    try:
        DeepSpeedZeroConfig(**config["zero_optimization"])
    except ValueError as error:
        problems = getattr(error, "errors", list)()
        listed = "; ".join(f"{'.'.join(map(str, p['loc']))}: {p['msg']}" for p in problems)
        raise UserError(
            f"train.ds_config {name_or_path}: DeepSpeed refuses zero_optimization ({listed or error}). "
            "Mend the JSON."
        ) from None


def ds_config_of(settings: TrainConfig, world_size: int) -> DeepSpeedConfig:
    """Return the complete config of a recipe for `deepspeed.initialize`: no "auto", clipping always written out.

    DeepSpeed clips at 1.0 when the key is absent, hence the explicit 0.0 for "off". Its batch sizes are nominal
    here: the update plan decides which comparisons form an update, the step closes the accumulation itself.

    Raises:
        UserError: a key that the recipe owns has another value in the JSON.
    """
    config, origin = load_ds_config(settings.ds_config)
    precision = settings.precision
    filled = {
        "train_micro_batch_size_per_gpu": settings.micro_batch_pairs,
        "gradient_accumulation_steps": 1,
        "train_batch_size": settings.micro_batch_pairs * world_size,
        "gradient_clipping": float(settings.gradient_clipping),
    }
    for key, recipe_key in OWNED_BY_RECIPE.items():
        given = config.pop(key, "auto")
        if given != "auto" and (key not in filled or given != filled[key]):
            raise UserError(
                f"{origin}: {key} = {json.dumps(given)} contradicts the recipe, which owns it as {recipe_key}. "
                f'Delete {key} from the JSON (or set it to "auto") and set {recipe_key}.'
            )
    for half in ("bf16", "fp16"):
        wanted = precision == half
        given = config.pop(half, {}).get("enabled", "auto")
        if given not in ("auto", wanted):
            raise UserError(
                f"{origin}: {half}.enabled = {json.dumps(given)} contradicts train.precision: {precision}. "
                f"Delete {half} from the JSON and set train.precision (fp32 or bf16)."
            )
    config.setdefault("zero_optimization", {"stage": 0})
    return {
        **config,
        **filled,
        "bf16": {"enabled": precision == "bf16"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }


def zero_stage(config: DeepSpeedConfig) -> int:
    """Return the ZeRO stage of a config, 0 to 3."""
    return int(config["zero_optimization"].get("stage", 0))


def offloads_optimizer(config: DeepSpeedConfig) -> bool:
    """Return True where a config keeps optimizer state in host memory."""
    return config["zero_optimization"].get("offload_optimizer", {}).get("device", "none") != "none"
