"""Datasets that yield preference records; one file each."""

from pathlib import Path

from pal_ds.data.sources.base import Source, check_files
from pal_ds.data.sources.community_alignment import CommunityAlignment
from pal_ds.data.sources.dsp import Dsp
from pal_ds.data.sources.gpt4llm import Gpt4Llm
from pal_ds.data.sources.hh_rlhf import HhRlhf
from pal_ds.data.sources.hugging_face import HuggingFace
from pal_ds.data.sources.jsonl import Jsonl
from pal_ds.data.sources.persona import Persona
from pal_ds.data.sources.personalllm import PersonalLlm
from pal_ds.data.sources.pick_a_filter import PickAFilter
from pal_ds.data.sources.pick_a_pic import PickAPic
from pal_ds.data.sources.polis import Polis
from pal_ds.data.sources.prism import Prism
from pal_ds.data.sources.summarize_from_feedback import SummarizeFromFeedback
from pal_ds.data.sources.synthetic import Synthetic
from pal_ds.data.sources.table_files import kind_of
from pal_ds.data.sources.text_score import TextScore
from pal_ds.data.sources.ukp_conv_arg import UkpConvArg
from pal_ds.data.sources.ultrafeedback_p import UltraFeedbackP
from pal_ds.data.sources.vector_world import VectorWorld
from pal_ds.data.sources.vpl_pets import VplPets
from pal_ds.data.sources.webgpt import WebGpt

SOURCES: dict[str, type[Source]] = {
    "jsonl": Jsonl,
    "hf": HuggingFace,
    "dsp": Dsp,
    "text_score": TextScore,
    "persona": Persona,
    "summarize_from_feedback": SummarizeFromFeedback,
    "pick_a_pic": PickAPic,
    "pick_a_filter": PickAFilter,
    "hh_rlhf": HhRlhf,
    "webgpt": WebGpt,
    "gpt4llm": Gpt4Llm,
    "vpl_pets": VplPets,
    "ultrafeedback_p": UltraFeedbackP,
    "prism": Prism,
    "personalllm": PersonalLlm,
    "community_alignment": CommunityAlignment,
    "ukp_conv_arg": UkpConvArg,
    "polis": Polis,
    "synthetic": Synthetic,
    "vector_world": VectorWorld,
}
"""Short names, as the README uses them; recipes name the class (class_path: Jsonl)."""


def source_of_file(path: Path) -> Source:
    """The source that reads a file of comparisons by its name: JSON Lines, or a table (parquet, csv, tsv, json)."""
    kind = kind_of(path)
    if kind in (".parquet", ".csv", ".tsv", ".json"):
        (file,) = check_files(path)
        return HuggingFace(str(file))
    return Jsonl(str(path))
