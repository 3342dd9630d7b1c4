"""PAL's Pick-a-Filter: Pick-a-Pic with a planted taste for blue or red images in half the users each."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import final

from pal_ds.data.records import Record
from pal_ds.data.sources.base import stable_fraction
from pal_ds.data.sources.embeddings import Embeddings
from pal_ds.data.sources.hub_source import HubPath, HubRows, HubSource
from pal_ds.data.sources.pick_a_pic import COLUMNS, SPLITS, check_sizes, image_records
from pal_ds.errors import UserError


@final
@dataclass(eq=False)
class PickAFilter(HubSource):
    """Pick-a-Pic's choices stand; colour filters are laid over images so that they tell a taste.

    A hash puts each user into the group that likes blue or the one that likes red images (`group`).
    Of the comparisons, a share `mixture_ratio` is changed: in half of these the chosen image gets
    the filter of the user's colour, in the other half the rejected image gets the other colour; so
    a filter alone does not tell which image was chosen. All other pairs stay as they are.

    The embeddings are made by you, with one CLIP model, from the images as they are, under a blue
    and under a red filter. Splits and reasons to drop are those of `PickAPic`.

    Args:
        images: embeddings by image uid of the images as they are.
        blue_images: of the same under the blue filter.
        red_images: under the red filter.
        captions: embeddings by caption.
        mixture_ratio: PAL's beta.
        path: as for `PickAPic`; PAL used v1.
        seed: of groups, of the changed pairs and of the image that changes.
    """

    licence = "see yuvalkirstain/pickapic_v1; construction: ramya-ml/pick-a-filter-embeds (MIT)"

    images: str
    blue_images: str
    red_images: str
    captions: str
    mixture_ratio: float = 1.0
    path: HubPath = "yuvalkirstain/pickapic_v1_no_images"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.mixture_ratio <= 1.0:
            raise UserError(
                f"pick_a_filter: mixture_ratio is {self.mixture_ratio}; it is a share of the "
                "comparisons, between 0 and 1"
            )
        self._plain, self._captions = Embeddings(self.images), Embeddings(self.captions)
        self._filtered = {"blue": Embeddings(self.blue_images), "red": Embeddings(self.red_images)}
        self._rows = HubRows(self.path, tuple(SPLITS), COLUMNS)

    def records(self) -> Iterator[Record]:
        self.dropped.clear()
        check_sizes(self._captions, self._plain, *self._filtered.values())
        for record in image_records(self, self._rows, self._captions, self._shown):
            yield replace(record, group=self.group_of(record.user_id))

    def describe(self) -> dict:
        return {
            **super().describe(),
            "images": self._plain.describe(),
            "blue_images": self._filtered["blue"].describe(),
            "red_images": self._filtered["red"].describe(),
            "captions": self._captions.describe(),
        }

    def num_records(self) -> int:
        return len(self._rows)

    def group_of(self, user_id: str) -> str:
        return "blue" if stable_fraction("colour", self.seed, user_id) < 0.5 else "red"

    def _shown(
        self, user_id: str, images: tuple[str, str], label: int
    ) -> tuple[Embeddings, Embeddings]:
        """Choose which version of each image the user is shown."""
        key = (self.seed, user_id, *images)
        group, versions = self.group_of(user_id), [self._plain, self._plain]
        if stable_fraction("changed", *key) < self.mixture_ratio:
            chosen = 0 if label == -1 else 1
            if stable_fraction("chosen changes", *key) < 0.5:
                versions[chosen] = self._filtered[group]
            else:
                versions[1 - chosen] = self._filtered["red" if group == "blue" else "blue"]
        return versions[0], versions[1]
