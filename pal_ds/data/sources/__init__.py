"""Datasets that yield preference records; one file each."""

from pal_ds.data.sources.base import Source
from pal_ds.data.sources.dsp import Dsp
from pal_ds.data.sources.hugging_face import HuggingFace
from pal_ds.data.sources.jsonl import Jsonl
from pal_ds.data.sources.persona import Persona
from pal_ds.data.sources.synthetic import Synthetic
from pal_ds.data.sources.text_score import TextScore
from pal_ds.data.sources.vector_world import VectorWorld

SOURCES: dict[str, type[Source]] = {
    "jsonl": Jsonl,
    "hf": HuggingFace,
    "dsp": Dsp,
    "text_score": TextScore,
    "persona": Persona,
    "synthetic": Synthetic,
    "vector_world": VectorWorld,
}
"""Short names, as the README uses them; recipes name the class (class_path: Jsonl)."""
