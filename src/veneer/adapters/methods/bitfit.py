"""BitFit: train the biases and nothing else (Ben Zaken et al. 2022, arXiv 2106.10199).

The biases are those that the base has: of linear layers and of norms. By default all of them, without the output head and what else
stands outside of the base's body; with ``target_modules`` those of the layers that it names.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import ClassVar, Literal, final

from veneer.adapters.layers.site import Survey
from veneer.adapters.methods.base import EVERY_KIND, Method
from veneer.config import Texts
from veneer.errors import TargetError


@final
class BitFit(Method):
    """Trained biases in place of the base's."""

    name: ClassVar[str] = "bitfit"
    kinds: ClassVar[tuple[str, ...]] = EVERY_KIND
    tags: ClassVar[tuple[str, ...]] = ("bitfit",)
    learning_rate_factor: ClassVar[float] = 2.0
    no_low_rank: ClassVar[str] = "it changes biases, which have no low-rank factors"

    target_modules: Literal["all-linear", "all", "auto"] | Texts = "all"
    """Layers whose biases are trained: all, all linear layers of the blocks, or names, globs, and regular expressions after re:."""

    @property
    def label(self) -> str:
        return "BitFit"

    def choose(self, survey: Survey, *, left_out: Collection[str] = ()) -> list[str]:
        layers = super().choose(survey)
        biased = [name for name in layers if getattr(survey.site(name).module, "bias", None) is not None]
        if not biased:
            raise TargetError(
                f"none of the {len(layers)} layers that target_modules names has a bias, so BitFit has nothing to train; "
                "use another method, such as lora, or a base whose layers have biases"
            )
        return biased

    def copies(self, survey: Survey, chosen: Sequence[str]) -> Mapping[str, tuple[str, ...]]:
        return dict.fromkeys(chosen, ("bias",))
