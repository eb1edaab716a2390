"""Fields of a parsed `config.json`, checked one by one; what a file leaves out has the publisher's default.

transformers writes only what differs from its config classes' defaults (which fields that are depends on its version),
so an absent field is one of those defaults, never this program's choice.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

MAX_SIZE = 2**24  # no published dimension is near it; what is larger would only fail later, for lack of memory


@dataclasses.dataclass(frozen=True)
class Section:
    """The fields of one object in `config.json`. Every reader raises ValueError or KeyError that names the field.

    Attributes:
      values: the object.
      model_type: whose defaults stand in for absent fields.
      name: "text_config", "vision_config", or "" for the top level.
    """

    values: Mapping[str, Any]
    model_type: str
    name: str = ""

    def get(self, key: str) -> Any:
        """The field's value, else its default in transformers' config class; KeyError where that has none either."""
        if key in self.values:
            return self.values[key]
        defaults, other_names = _published(self.model_type, self.name)
        for other in other_names.get(key, ()):
            if other in self.values:
                return self.values[other]
        return defaults[key]

    def object_(self, key: str) -> Mapping[str, Any]:
        """An object; {} where it is absent or null."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, Mapping):
            raise ValueError(f"{key} must be an object, not {value!r}")
        return value or {}

    def section(self, key: str) -> "Section":
        """An object with fields, and defaults, of its own."""
        return Section(self.object_(key), self.model_type, key)

    def whole(self, key: str, *, least: int = 1, most: int = MAX_SIZE) -> int:
        """A whole number."""
        return _whole(key, self.get(key), least=least, most=most)

    def wholes(self, key: str, *, least: int = 0) -> tuple[int, ...]:
        """A list of whole numbers."""
        value = self.get(key)
        if not isinstance(value, list | tuple):
            raise ValueError(f"{key} {value!r} must be a list of whole numbers")
        return tuple(_whole(key, n, least=least, most=MAX_SIZE) for n in value)

    def positive(self, key: str) -> float:
        """A number above 0."""
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1e30:
            raise ValueError(f"{key} {value!r} must be a positive number")
        return float(value)

    def flag(self, key: str) -> bool:
        """True or false."""
        value = self.get(key)
        if not isinstance(value, bool):
            raise ValueError(f"{key} {value!r} must be true or false")
        return value


def _whole(key: str, value: Any, *, least: int, most: int) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{key} {value!r} must be a whole number from {least} to {most}")
    return value


@functools.cache
def _published(model_type: str, section: str) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """(default of every field, other names of some) of a section, as transformers' config classes have them."""
    from transformers import AutoConfig  # slow to import, and few files leave out a field that is read here

    try:
        config = AutoConfig.for_model(model_type)
    except ValueError:  # a family that the installed version does not know
        return {}, {}
    config = getattr(config, section) if section else config
    defaults = config.to_dict()
    rope = defaults.get("rope_parameters") or {}  # older versions have its fields beside the others
    other_names: dict[str, list[str]] = {}
    for other, key in config.attribute_map.items():
        other_names.setdefault(key, []).append(other)
    return {**rope, **defaults}, other_names
