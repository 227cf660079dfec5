"""The chat template of a text-only model: a Jinja program that writes a conversation as text.

The format is transformers' (https://huggingface.co/docs/transformers/chat_templating). Templates come with checkpoints
and are not trusted: they run in Jinja's sandbox, and see the messages and the names of special tokens only.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.sandbox

from sphinx_jax.errors import UserError

_MAX_CHARACTERS = 1 << 22


class ChatTemplate:
    """A compiled template. `special_tokens` are the values of bos_token, eos_token and others that it may use.

    Raises UserError, which names `name`, if the template is no Jinja program.
    """

    def __init__(self, template: str, special_tokens: Mapping[str, str], name: str):
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda format: datetime.datetime.now().strftime(format)
        self._name, self.special_tokens = name, dict(special_tokens)
        try:
            self._template = environment.from_string(template)
        except (jinja2.TemplateError, RecursionError, MemoryError) as error:
            raise UserError(f"{name} is not a chat template ({error}); copy the tokenizer's files again") from error

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The conversation up to where the assistant speaks; messages are {"role", "content"}.

        Raises UserError if the template fails, for example on roles that it does not know.
        """
        parts, length = [], 0
        try:
            for part in self._template.generate(
                messages=[dict(message) for message in messages], add_generation_prompt=True, **self.special_tokens
            ):
                parts.append(part)
                length += len(part)
                if length > _MAX_CHARACTERS:
                    raise UserError(
                        f"{self._name} writes more than {_MAX_CHARACTERS:,} characters; use a shorter prompt"
                    )
        except (jinja2.TemplateError, ArithmeticError, LookupError, RecursionError, TypeError, ValueError) as error:
            raise UserError(f"{self._name} cannot write this conversation ({error}); use a raw prompt") from error
        return "".join(parts)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
