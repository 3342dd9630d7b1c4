"""Pick-a-Pic: people chose between two generated images; images and captions as CLIP embeddings."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, final

from pal_ds.data.records import Record
from pal_ds.data.sources.base import Source
from pal_ds.data.sources.embeddings import Embeddings
from pal_ds.data.sources.hub_source import HubPath, HubRows, HubSource, PromptSplits, id_of, text_of
from pal_ds.data.sources.table_files import as_number, as_truth
from pal_ds.errors import UserError

SPLITS = {"train": "train", "validation": "dev", "test": "test"}
COLUMNS = (
    "caption",
    "image_0_uid",
    "image_1_uid",
    "label_0",
    "label_1",
    "user_id",
    "has_label",
    "are_different",
)
TYPED = {
    "label_0": as_number,
    "label_1": as_number,
    "has_label": as_truth,
    "are_different": as_truth,
}


@final
@dataclass(eq=False)
class PickAPic(HubSource):
    """Records of vectors: the caption's embedding as prompt, the images' as responses.

    Rows come from the hub (the version without images is enough), embeddings from the files you
    give, made with one CLIP model for images and captions alike. The archives that PAL published
    (ramya-ml/pickapic-embeds) are pickles: convert them where you trust them.

    The records' own split is the hub's (validation is dev). Dropped and counted: `no_label`,
    `same_image`, `tie`, `no_image_features`, `no_caption_features`, `prompt_in_two_splits`.

    Args:
        images: embeddings by image uid, a file as `Embeddings` reads it.
        captions: embeddings by caption.
        path: hub id (v1 or v2), folder, file, or {split: file}.
    """

    licence = "see yuvalkirstain/pickapic_v1"

    images: str
    captions: str
    path: HubPath = "yuvalkirstain/pickapic_v1_no_images"

    def __post_init__(self) -> None:
        self._images, self._captions = Embeddings(self.images), Embeddings(self.captions)
        self._rows = HubRows(self.path, tuple(SPLITS), COLUMNS, typed=TYPED)

    def records(self) -> Iterator[Record]:
        self.dropped.clear()
        check_sizes(self._captions, self._images)
        images = self._images, self._images
        yield from image_records(self, self._rows, self._captions, lambda *_: images)

    def describe(self) -> dict:
        return {
            **super().describe(),
            "images": self._images.describe(),
            "captions": self._captions.describe(),
        }

    def num_records(self) -> int:
        return len(self._rows)


def image_records(
    source: Source,
    rows: HubRows,
    captions: Embeddings,
    shown: Callable[[str, tuple[str, str], int], tuple[Embeddings, Embeddings]],
) -> Iterator[Record]:
    """The rows in which someone preferred one of two different images, others counted by reason in `source.dropped`.

    `shown` says of (user id, uids of both images, label) in which embeddings either image is found.
    """
    prompts, dropped = PromptSplits(), source.dropped

    def choice(where: str, split_and_row: tuple[str, dict[str, Any]]) -> Iterator[Record]:
        split, row = split_and_row
        caption, label = text_of(row["caption"], where, "caption"), _label(where, row)
        user, images = (
            id_of(row["user_id"], where, "user_id"),
            (str(row["image_0_uid"]), str(row["image_1_uid"])),
        )
        if not row["has_label"] or label is None:
            dropped["no_label"] += 1
        elif not row["are_different"] or images[0] == images[1]:
            dropped["same_image"] += 1
        elif label == 0:
            dropped["tie"] += 1
        elif caption not in captions:
            dropped["no_caption_features"] += 1
        elif not prompts.admits(caption, split):
            dropped["prompt_in_two_splits"] += 1
        else:
            first, second = shown(user, images, label)
            if images[0] not in first or images[1] not in second:
                dropped["no_image_features"] += 1
                return
            yield Record(
                user_id=user,
                label=label,
                prompt_features=captions[caption],
                response_features=(first[images[0]], second[images[1]]),
                split=SPLITS[split],
            )

    yield from source.each_row(rows.with_splits(), choice)


def check_sizes(captions: Embeddings, *images: Embeddings) -> None:
    """A UserError where vectors of captions and images differ in size."""
    for embeddings in images:
        if embeddings.size != captions.size:
            raise UserError(
                f"{embeddings.path}: vectors of size {embeddings.size}, but those of captions in "
                f"{captions.path} have {captions.size}; make all with one model"
            )


def _label(where: str, row: Mapping[str, float | None]) -> int | None:
    """-1: the first image, 1: the second, 0: as good; None where the row does not say."""
    first, second = row["label_0"], row["label_1"]
    if first is None or second is None:
        return None
    pair = first, second
    if pair not in ((1.0, 0.0), (0.0, 1.0), (0.5, 0.5)):
        raise UserError(f"{where}: the labels are {pair}; they must be 1 and 0, 0 and 1, or 0.5")
    return int(second - first)
