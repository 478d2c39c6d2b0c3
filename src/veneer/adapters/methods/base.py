"""The contract of a method: the questions that the rest of the package asks of it, with the answers of a method that changes nothing.

A method changes a layer in one or both of two ways:

    trained copies    of the base's own parameters, in place of them for the adapter's tokens (`copies`)
    own tensors       at each site, and the change that they make to the layer's output (`init`, `change`)

That is all that a method needs for attaching, mixed batches, training, checkpoints and serving. A method whose change is one of the
weights answers `delta` too, and is merged; one whose change has low rank is a `LowRankMethod` (``low_rank.py``) and has fast paths.
Otherwise `no_delta` says why there is no such change. No other file asks which method an adapter has: a question that is missing here
becomes a property or function of this class.

The option fields are declared in ``veneer/_options/``, so ``LoRA(r=8)`` and a training run's ``--r 8`` are the same option.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from veneer.adapters.layers.kinds import Geometry
from veneer.adapters.layers.site import Site, Survey
from veneer.adapters.targets import select
from veneer.config import MethodOptions
from veneer.errors import AdapterError, TargetError

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of a site's tensors, by name."""

EVERY_KIND = ("linear", "conv1d", "embedding", "conv2d", "vector_layer")
"""All layer kinds, norms (vector_layer) among them."""


class Method(MethodOptions):
    """Options and behaviour of a method. Frozen; unknown options are errors.

    In all functions ``tensors`` are one site's tensors by their names on disk, ``scale`` is the adapter's scale there (one, except for
    low-rank methods), and ``weight_2d`` is the base weight as [out, in].
    """

    name: ClassVar[str]
    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv1d", "embedding", "conv2d")
    """Layer kinds that the method acts on."""
    tags: ClassVar[tuple[str, ...]] = ()
    """Tags of a model card."""
    peft_type: ClassVar[str] = "LORA"
    """``peft_type`` in ``adapter_config.json``."""
    peft_keys: ClassVar[frozenset[str]] = frozenset()
    """More keys of ``adapter_config.json`` that adapters of this ``peft_type`` have."""
    least_dimensions: ClassVar[tuple[int, ...]] = ()
    """Least numbers of dimensions of a site's tensors, in the order of `tensor_names`, for reading files."""
    shared_names: ClassVar[tuple[str, ...]] = ()
    """Names in a file of tensors that belong to no layer (`shared`)."""
    roles: ClassVar[tuple[str, ...]] = ()
    """Roles of the layers that ``target_modules="auto"`` means (``layers/roles.py``)."""
    flags: ClassVar[Mapping[str, bool]] = {}
    """Keys of ``adapter_config.json`` that tell this method from others of its ``peft_type``; none if only the receipt tells."""
    beyond_peft: ClassVar[tuple[str, ...]] = (
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "modules_to_save",
    )
    """Options that ``adapter_config.json`` has no key for."""
    tables: ClassVar[tuple[str, ...]] = ()
    """Options that hold a value by pattern (rank_pattern)."""
    learning_rate_factor: ClassVar[float] = 1.0
    """The default learning rate relative to that of LoRA."""
    low_rank: ClassVar[bool] = False
    """True if a site's first two tensors are the factors A and B of its change (`LowRankMethod`)."""
    takes_experts: ClassVar[bool] = False
    """True if the method acts on the layers of stacked experts."""
    needs_base_weights: ClassVar[bool] = False
    """True if the delta depends on the base weights."""
    as_parameter: ClassVar[bool] = False
    """True if PEFT can hold the change as that of a bare parameter (``target_parameters``): low-rank factors alone."""
    serves_tied_head: ClassVar[bool] = True
    """True if an output head can use the tensors of the embedding that it is tied to."""
    overrides_beside: ClassVar[frozenset[str]] = frozenset({"bias"})
    """Overrides that an adapter may have at a site in addition to its own tensors there."""
    changes_biases: ClassVar[bool] = False
    """True if a site's own tensors change the layer's bias too (`bias_delta`)."""
    keeps_output: ClassVar[bool] = False
    """True if backward needs the layer's output."""
    virtual_tokens: ClassVar[Literal["embeddings", "key_values"] | None] = None
    """The form of the virtual tokens that the adapter's tensor puts before the sequence, if any (``sequence.py``)."""
    no_delta: ClassVar[str] = ""
    """The reason that no weights hold the change, so that it cannot be merged; empty if they do."""
    no_low_rank: ClassVar[str] = "its change is not kept as low-rank factors"
    """The reason that the change cannot be composed, reduced or exported as low-rank factors."""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """List the options in the docstring, the method's own first, and name them with their defaults in the signature, for ``help``."""
        super().__pydantic_init_subclass__(**kwargs)
        fields = dict(sorted(cls.model_fields.items(), key=lambda item: item[0] in MethodOptions.model_fields))
        width = max(map(len, fields))
        lines = [
            f"    {name:<{width}}  {' '.join((field.description or '').split())} (default: {field.default!r})"
            for name, field in fields.items()
        ]
        by_name = inspect.Parameter.KEYWORD_ONLY
        cls.__signature__ = inspect.Signature(
            [inspect.Parameter(name, by_name, default=field.default) for name, field in fields.items()]
        )
        cls.__doc__ = "\n".join([cls.__doc__ or "", "", "Options:", *lines])

    @property
    def label(self) -> str:
        """Name of the method as the field writes it."""
        return self.name

    @property
    def size(self) -> str:
        """The option that sets the number of trained values, as ``r=16``; empty if there is none."""
        return ""

    @property
    def dropout(self) -> float:
        """Dropout probability on the input of the change."""
        return 0.0

    @property
    def every_bias(self) -> bool:
        """True if the biases of layers that are not adapted are trained too."""
        return False

    @property
    def adds_bias(self) -> bool:
        """True if a bias of B is trained at each site."""
        return False

    @property
    def shares_experts(self) -> bool:
        """True if the experts of a stack share the factors on their hidden side."""
        return False

    def peft_settings(self, tensors: Mapping[str, Mapping[str, Tensor]], names: Sequence[str]) -> dict[str, Any]:
        """Settings of ``peft_keys`` for an adapter with these tensors by site, whose names in the file are ``names``."""
        return {}

    @classmethod
    def options_of(cls, settings: Mapping[str, Any], shared: Shapes) -> dict[str, Any]:
        """The inverse: options by the settings of ``peft_keys``, of a file whose values are not checked yet.

        ``shared``: shapes of the tensors in ``shared_names`` that the file has.
        """
        return {key: settings[key] for key in cls.peft_keys & cls.model_fields.keys() if key in settings}

    # Layers

    def choose(self, survey: Survey, *, left_out: Collection[str] = ()) -> list[str]:
        """Names of the layers that the options ask for, in the model's order; ``all-linear`` does not take those in ``left_out``.

        Raises TargetError where a pattern matches nothing or names a layer that the method cannot act on.
        """
        layers: dict[str, Site] = dict(survey.sites)
        if "vector_layer" in self.kinds:
            layers |= survey.vector_layers
        tables = {name: getattr(self, name) for name in self.tables}
        options: MethodOptions = self
        if self.target_modules == "auto" and not self.roles:
            options = self.model_copy(update={"target_modules": "all-linear"})
        elif self.target_modules == "auto":
            named = tuple(name for name, site in layers.items() if site.role in self.roles and not site.reason)
            absent = {*self.roles} - {layers[name].role for name in named}
            if absent:
                raise TargetError(
                    f"{self.label} finds no layer for the {' and the '.join(sorted(absent)).replace('_', ' ')} of this model's blocks; "
                    "name layers in target_modules"
                )
            options = self.model_copy(update={"target_modules": named})
        more: Any = {"left_out": left_out, "uncovered": survey.uncovered, "tables": tables, "by_part": self.low_rank}
        chosen = select(layers, options, self.kinds, **more)
        expert = next((name for name in chosen if layers[name].stack is not None), None)
        if expert is not None and not self.takes_experts:
            raise TargetError(
                f"{self.label} does not act on stacked experts, such as {expert}; leave them out (exclude_modules), or use lora"
            )
        return chosen

    def copies(self, survey: Survey, chosen: Sequence[str]) -> Mapping[str, tuple[str, ...]]:
        """{layer: names of the base's own parameters there that the adapter trains copies of}. ``chosen``: the answer of `choose`."""
        return {}

    def fitted(self, sites: Sequence[Site]) -> Method:
        """The method for an adapter on these sites, with the options that they determine."""
        return self

    # Tensors

    def shared(self) -> dict[str, Tensor]:
        """Constants that a file has beside the adapter's own tensors, by ``shared_names``; reading compares them."""
        return {}

    def tensor_names(self, kind: str) -> tuple[str, ...]:
        """Names on disk of a site's own tensors."""
        return ()

    def tensor_shapes(self, geometry: Geometry, found: Shapes) -> dict[str, tuple[int, ...]]:
        """Shapes that a site's tensors must have. ``found``: their shapes in a file, which tell the rank and the like."""
        return {}

    def geometry(self, kind: str, found: Shapes) -> Geometry:
        """The shapes of a layer, as far as its tensors in a file tell them."""
        return Geometry(kind, 1, 1)

    def init(self, site: Site, generator: torch.Generator, dtype: torch.dtype) -> dict[str, Tensor]:
        """A new site's tensors; the adapted layer then equals the base exactly. On the meta device for a base without values."""
        return {}

    @property
    def needs_rows(self) -> bool:
        """True if a new adapter's tensors come from the training rows (``training/eva.py``), which `init` does not have."""
        return False

    @property
    def holds_half(self) -> bool:
        """True if training holds the second half of a new site's ranks."""
        return False

    def of_new_adapter(self) -> Method:
        """The method of a new adapter: this one, with the ranks that `init` made."""
        return self

    def trained_first(self, kind: str) -> tuple[str, ...]:
        """Names of the tensors that receive a gradient in the first step."""
        return self.tensor_names(kind)

    def zero_at_start(self, kind: str) -> str:
        """Name of a tensor that is zero in a new adapter and not in a trained one; empty if there is none."""
        return ""

    def lr_ratio_tensors(self, kind: str) -> tuple[tuple[str, ...], float]:
        """(names of the tensors that train at another learning rate, its ratio to that of the others)."""
        return (), 1.0

    def rank(self, tensors: Mapping[str, Tensor]) -> int:
        """Rank of a site's change, or zero for a method without one."""
        return 0

    def alpha(self, site: str) -> float:
        """lora_alpha at a site; one for a method without a scale."""
        return 1.0

    def scaling(self, r: int, lora_alpha: float) -> float:
        """Factor of the change at a site."""
        return 1.0

    # Forward

    def change(
        self, tensors: Mapping[str, Tensor], x: Tensor, y: Tensor, product: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """The change of a layer's output for the adapter's tokens, zero for a new adapter.

        Args:
            tensors: the site's tensors, in the dtype of ``y``.
            x: the layer's input [n, in].
            y: the base layer's output [n, out], with its bias.
            product: x -> W x [n, out], the base layer's product without the bias.
        """
        raise AdapterError(f"{type(self).__name__} has tensors of its own and does not say what they do (change)")

    @property
    def norms(self) -> Literal["none", "constant", "exact"]:
        """Row norms of the changed weight in the forward: unused, constants, or with gradients."""
        return "none"

    @property
    def drops_base_product(self) -> bool:
        """True if dropout acts on the base product too."""
        return False

    def fast_support(
        self, weight: float | Tensor, *, exclusive: bool
    ) -> Literal["always", "unless_overwritten", "never"]:
        """Support of the fast path for this method.

        Args:
            weight: the adapter's weight in its mix.
            exclusive: no token of the batch uses more than one adapter.

        Returns:
            "unless_overwritten" where it does so only if the model leaves the layer's output unchanged until backward.
        """
        return "never"

    def norm(self, tensors: Mapping[str, Tensor], weight_2d: Tensor, squared: Tensor, scale: float) -> Tensor | None:
        """Row norms of the changed weight, [out], or None for a method without a magnitude. ``squared`` is ||W||^2 per row."""
        return None

    @staticmethod
    def constant_norms(
        weight_2d: Tensor, squared: Tensor, adapters: Sequence[tuple[Mapping[str, Tensor], float]]
    ) -> list[Tensor]:
        """`norm` of several adapters at one site, (tensors, scale) each, without gradients; unused where `norms` is "none"."""
        return []

    def magnitude(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """The trained magnitude m, [out], or None."""
        return None

    def magnitude_scale(self, tensors: Mapping[str, Tensor], norm: Tensor) -> Tensor | None:
        """S = m / norm, the factor per output [out], or None for a method without a magnitude."""
        return None

    # Merging

    def delta(self, tensors: Mapping[str, Tensor], scale: float, weight_2d: Tensor | None) -> Tensor:
        """W' - W [out, in] in fp32, or fp64 for an fp64 base. Methods that `needs_base_weights` require ``weight_2d``."""
        raise AdapterError(
            f"a {self.label} adapter has no change of the weight: {self.no_delta or 'delta is not defined'}"
        )

    def bias_delta(self, tensors: Mapping[str, Tensor], bias: Tensor) -> Tensor | None:
        """b' - b [out] for a layer with the bias b, or None where the bias stays."""
        return None

    def moved(self, tensors: Mapping[str, Tensor]) -> float:
        """A size of a site's change for display: zero for a new adapter."""
        zero = self.zero_at_start("linear")
        return float(tensors[zero].norm()) if zero in tensors else 0.0

    def output_rows(self, tensors: Mapping[str, Tensor], rows: slice) -> dict[str, Tensor]:
        """The tensors of a layer that has only these output rows."""
        return dict(tensors)

    def changes_nothing(self, tensors: Mapping[str, Tensor]) -> bool:
        """True if a site's tensors alone show that its delta is zero."""
        return False
