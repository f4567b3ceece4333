"""Chat templates in Jinja, compiled for a sandbox as transformers has it. Renders none itself."""

from __future__ import annotations

import json
from datetime import datetime
from functools import lru_cache
from typing import Any

from mistral.util.errors import FormatError, Unavailable, printable


class NotJinja(FormatError):
    """A text that is no template in Jinja."""


@lru_cache(maxsize=16)
def compile_template(text: str, source: str) -> Any:
    """A template of jinja2 that renders in a sandbox.

    Args:
        text: in Jinja.
        source: where it is from, for messages.

    Raises:
        NotJinja: it is not.
        Unavailable: jinja2 is missing.
    """
    try:
        import jinja2
    except ImportError:
        raise Unavailable(f"the template of {source} needs jinja2: pip install jinja2") from None
    try:
        return _sandbox().from_string(text)
    except jinja2.exceptions.TemplateSyntaxError as error:
        reason = printable(error.message or "a syntax error", 300)
        raise NotJinja(f"the template of {source} is no Jinja: {reason} in line {error.lineno}") from None
    except (RecursionError, ValueError, OverflowError) as error:
        raise NotJinja(f"the template of {source} is no Jinja: {type(error).__name__}") from None


def _sandbox() -> Any:
    """An environment of jinja2 with what templates of models expect to find."""
    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """{% generation %} marks what the model writes, for training; here it is just its content."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    class Namespace(jinja2.utils.Namespace):
        """A namespace that keeps no names of Python's insides."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            for name in dict(*args, **kwargs):
                _refuse_private(name)

        def __setitem__(self, name: str, value: Any) -> None:
            _refuse_private(name)
            super().__setitem__(name, value)

    def _refuse_private(name: object) -> None:
        if str(name).startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace has no {name}")

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": lambda *args, **kwargs: dict(*args, **kwargs),
        "namespace": Namespace,
    }
    return environment
