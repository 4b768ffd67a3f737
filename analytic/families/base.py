"""What the engine asks of a model family."""

from __future__ import annotations

import abc
import math
import re
from typing import TYPE_CHECKING, Any, ClassVar, Final, Protocol

import attrs

from analytic.errors import DsocrTraceError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from analytic.config import ExpertSizes
    from analytic.cost import Size
    from analytic.crops import PageLayout
    from analytic.layers.base import Layer, SequenceShape, Tape


#: Stands in the place of a layer where the formulas know none.
OTHER: Final = "other"


class FamilyConfig(Protocol):
    """Dimensions of one model, as far as the engine needs them."""

    @property
    def torch_dtype(self) -> str:
        """Dtype that the checkpoint is stored in."""

    @property
    def max_positions(self) -> int:
        """Positions that the model was made for."""

    @property
    def vocab_size(self) -> int:
        """Tokens that the model chooses from."""

    @property
    def experts(self) -> ExpertSizes:
        """Mixture-of-experts layers; none of them in a dense model."""


class ModelFamily(abc.ABC):
    """Models of one architecture. Stateless; a subclass holds a table and a handful of functions.

    Attributes
    ----------
    name
        What users call it.
    architectures
        Names under ``architectures`` of the ``config.json`` of such models.
    layers
        For each module class the layers that may stand for it; where several classes share a layer, the first is the
        one that the family's own tree names. A class that is not here is reported as ``other``.
    parts
        Parts of the model that people speak of, by a pattern that the paths of their modules begin with.
    """

    name: ClassVar[str]
    architectures: ClassVar[tuple[str, ...]]
    layers: ClassVar[Mapping[str, tuple[type[Layer], ...]]]
    parts: ClassVar[Mapping[str, str]] = {}

    @abc.abstractmethod
    def read_config(self, raw: Mapping[str, Any], origin: str) -> FamilyConfig:
        """Dimensions from a parsed ``config.json``; `origin` names the file in errors.

        Raises
        ------
        InputError
            If a field is missing, or sizes do not fit together.
        """

    @abc.abstractmethod
    def build(self, config: Any) -> Layer:
        """Tree of layers of a model with these dimensions."""

    def encode_page(  # noqa: B027  most families see no pages
        self, root: Any, tape: Tape, page: PageLayout, pages: Size
    ) -> None:
        """Note the vision stage of `pages` equal pages. A text model has none."""

    def place_page(  # noqa: B027  most families see no pages
        self, root: Any, tape: Tape, page: PageLayout, pages: Size
    ) -> None:
        """Note what the prefill does to lay out the features of `pages` equal pages. A text model has none."""

    @abc.abstractmethod
    def prefill(self, root: Any, tape: Tape, shape: SequenceShape, image_tokens: Size) -> None:
        """Note a prefill, `image_tokens` of whose positions hold image features."""

    @abc.abstractmethod
    def decode(self, root: Any, tape: Tape, shape: SequenceShape, forwards: Size) -> None:
        """Note `forwards` decode forwards."""

    def part(self, path: str) -> str:
        """Part of the model that a module belongs to."""
        return next((name for pattern, name in self.parts.items() if re.match(pattern, path)), "other")

    def module_class(self, layer: Layer) -> str:
        """Class of the published model that `layer` stands for.

        Raises
        ------
        DsocrTraceError
            If the table has none.
        """
        found = next((name for name, kinds in self.layers.items() if type(layer) in kinds), None)
        if found is None:
            raise DsocrTraceError(
                f"no module class stands for the layer {type(layer).__name__} of the model family {self.name}; "
                f"add it to {type(self).__name__}.layers"
            )
        return found

    def mapped(self, config: Any, live: Mapping[str, str]) -> dict[str, str]:
        """Layer that stands for each module of a live model.

        Parameters
        ----------
        config
            Dimensions of the model.
        live
            Class of each module by its path.

        Returns
        -------
        dict of str to str
            Name of the layer by module path. `OTHER` where the table does not know the class, or has another layer
            for it than the one of that place: no formula is for such a module.
        """
        expected = {node.module_path: node.analytic_layer for node in self.tree(config)}
        known = {name: {kind.__name__ for kind in kinds} for name, kinds in self.layers.items()}
        layers = {}
        for path, name in live.items():
            layer = expected.get(path, OTHER)
            layers[path] = layer if layer in known.get(name, ()) else OTHER
        return layers

    def tree(self, config: Any) -> tuple[ModuleNode, ...]:
        """Every module of the model once, in the order of ``torch.nn.Module.named_modules``."""
        return tuple(self._walk(self.build(config), "", None, 0))

    def _walk(self, layer: Layer, path: str, parent: str | None, depth: int) -> Iterator[ModuleNode]:
        children = tuple(layer.children())
        yield ModuleNode(
            module_path=path,
            module_class=self.module_class(layer),
            analytic_layer=type(layer).__name__,
            parent_path=parent,
            depth=depth,
            is_leaf=not children,
            parameters=layer.parameters(),
        )
        for name, child in children:
            yield from self._walk(child, f"{path}.{name}" if path else name, path, depth + 1)


@attrs.frozen
class ModuleNode:
    """One module of the model.

    Attributes
    ----------
    module_path
        Dotted name, empty for the root.
    module_class
        Class in the published model.
    analytic_layer
        Layer of the analytic model that stands for it.
    parent_path
        Path of the parent, None for the root.
    depth
        Names in the path.
    is_leaf
        Whether it has no children.
    parameters
        Names and shapes of the parameters that it owns itself.
    """

    module_path: str
    module_class: str
    analytic_layer: str
    parent_path: str | None
    depth: int
    is_leaf: bool
    parameters: dict[str, tuple[int, ...]]

    @property
    def parameter_count(self) -> int:
        """Elements of the parameters that the module owns itself."""
        return sum(math.prod(shape) for shape in self.parameters.values())
