"""Full fine-tuning as an adapter: trained copies of a layer's own parameters, in place of the base's for the adapter's tokens.

The base stays shared, so it trains, serves and is compared beside other methods. The delta is W' - W; merging writes the trained
weights themselves. Two last blocks alone (FT-Top2 in Li and Liang 2021, arXiv 2101.00190) are ``target_modules="all"`` with
``layers_to_transform``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import ClassVar, final

from veneer.adapters.layers.site import Survey
from veneer.adapters.methods.base import EVERY_KIND, Method
from veneer.errors import TargetError


@final
class Full(Method):
    """Trained weights and biases in place of the base's."""

    name: ClassVar[str] = "full"
    kinds: ClassVar[tuple[str, ...]] = EVERY_KIND
    tags: ClassVar[tuple[str, ...]] = ("full-fine-tuning",)
    learning_rate_factor: ClassVar[float] = 0.1
    no_low_rank: ClassVar[str] = (
        "it holds whole weights; extract low-rank factors of the merged model with veneer extract"
    )

    @property
    def label(self) -> str:
        return "full fine-tuning"

    def choose(self, survey: Survey, *, left_out: Collection[str] = ()) -> list[str]:
        chosen = super().choose(survey)
        heads = {site.tied_to: site.name for site in survey.sites.values() if site.tied_to in chosen}
        for embedding, head in heads.items():
            if not self.ensure_weight_tying and head not in chosen:
                raise TargetError(
                    f"{embedding} and {head} share one weight, and only the embedding would be trained; give ensure_weight_tying to train "
                    f"both as one, or leave {embedding} out (exclude_modules)"
                )
        return chosen

    def copies(self, survey: Survey, chosen: Sequence[str]) -> Mapping[str, tuple[str, ...]]:
        return dict.fromkeys(chosen, ("weight", "bias"))
