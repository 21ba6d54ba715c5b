"""Dataset layouts by name: a new one is one file here, or one of an installed package, and no line elsewhere.

The name of a layout is that of its file; the file holds one subclass of `Source`. A package from outside names such a
class in an entry point of the group `flowmask.sources`; a file here goes before an entry point of the same name.
"""

import inspect
import pkgutil
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from flowmask.data_pipeline.config import CacheSourceConfig, DataSourceConfig, source_names
from flowmask.data_pipeline.sources.base import Source, VideoSet
from flowmask.data_pipeline.sources.named import NamedSources
from flowmask.models import plugins
from flowmask.models.errors import ConfigError

GROUP = "flowmask.sources"


def open_source(data: DataSourceConfig | Sequence[CacheSourceConfig]) -> VideoSet:
    """The source that a config names, or several as one, each video with the name of its dataset.

    ConfigError lists the known sources, DataError says what is wrong with one.
    """
    if not isinstance(data, DataSourceConfig):
        names = source_names(data)
        opened = [_open(entry) for entry in data]
        return opened[0] if names == [""] else NamedSources(dict(zip(names, opened, strict=True)))
    if isinstance(data, CacheSourceConfig) and data.name:
        return NamedSources({data.name: _open(data)})
    return _open(data)


def source_class(name: str, *, key: str = "data.source") -> type[Source]:
    """The layout called `name`; ConfigError, which speaks of `key`, if there is none or its class is incomplete."""
    found = _of_file(name) or plugins.load(GROUP, name)
    if found is None:
        raise ConfigError(f"{key} is {name!r}; known sources: {', '.join(known_sources())}")
    if lacking := _lacking(found):
        raise ConfigError(f"{key} is {name!r}, whose {found!r} is no complete Source; it lacks {', '.join(lacking)}")
    return found


def known_sources() -> list[str]:
    """Names of all layouts, those of installed packages too."""
    files = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted({*filter(_of_file, files), *plugins.names(GROUP)})


def _open(data: DataSourceConfig) -> Source:
    return source_class(data.source)(data.root, split=data.split)


def _of_file(name: str) -> type[Source] | None:
    """The subclass of Source that the file `name` of this folder defines, if there is such a file."""
    if name not in {module.name for module in pkgutil.iter_modules(__path__)}:
        return None
    module = import_module(f"{__name__}.{name}")
    defined = (value for value in vars(module).values() if inspect.isclass(value))
    ours = (value for value in defined if issubclass(value, Source) and value is not Source)
    return next((value for value in ours if value.__module__ == module.__name__), None)


def _lacking(found: Any) -> list[str]:
    """What a class from outside does not have of the contract."""
    if not (inspect.isclass(found) and issubclass(found, Source)):
        return ["the base class flowmask.data_pipeline.sources.base.Source"]
    return sorted([*found.__abstractmethods__, *([] if hasattr(found, "family") else ["family"])])
