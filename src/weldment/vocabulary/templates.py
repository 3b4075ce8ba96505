"""Chat templates: of models, by name, or as written in a recipe."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from weldment.errors import PlanError

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
ALPACA = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'user' %}{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}"
    "{% else %}{{ '### Response:\\n' + message['content'] + eos_token + '\\n\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}{{ message['content'] | trim }}<|eot_id|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
    "{% else %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% endif %}"
    "{% endfor %}"
)
EXAONE = (
    "{% for message in messages %}"
    "{{ '[|' + message['role'] + '|]' + message['content'] }}"
    "{{ '\\n' if message['role'] == 'user' else '[|endofturn|]\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '[|assistant|]' }}{% endif %}"
)
TEMPLATES: Mapping[str, str] = {
    "alpaca": ALPACA,
    "chatml": CHATML,
    "exaone": EXAONE,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
}
"""By the names that recipes may give."""

TALK = (
    {"role": "user", "content": "How are you?"},
    {"role": "assistant", "content": "Fine."},
    {"role": "user", "content": "Good."},
)
"""What templates are tried on."""


def most_common(templates: Iterable[str | None]) -> str | None:
    """The template that most have, the first of those that as many have; None if none has one."""
    counts = Counter(template for template in templates if template is not None)
    return counts.most_common(1)[0][0] if counts else None


def check_syntax(template: str, where: str) -> None:
    """Check that a template is one.

    Raises:
        PlanError: with the line at fault.
    """
    if (error := syntax_error(template)) is not None:
        fix = "Correct it, or name one: auto, " + ", ".join(TEMPLATES)
        raise PlanError(f"the chat template cannot be parsed: {error}", where=where, fix=fix)


def syntax_error(template: str) -> str | None:
    """Why a template cannot be parsed, with the line; None if it can."""
    from jinja2 import TemplateSyntaxError

    try:
        # Parsed alone, it may name filters that do not exist.
        _environment().compile(template)
    except TemplateSyntaxError as error:
        return f"{error.message} (line {error.lineno})"
    except (SyntaxError, RecursionError) as error:  # blocks nested deeper than Python's own may be
        return str(error)
    return None


def rendered(template: str, roles: Mapping[str, str]) -> str:
    """What a template makes of a short talk.

    Args:
        roles: the special tokens by their roles (`bos_token`).

    Raises:
        jinja2.TemplateError: it cannot be rendered.
    """
    from jinja2 import TemplateError

    names = {"bos_token": "", "eos_token": "", "pad_token": "", "unk_token": "", **roles}
    made = _environment().from_string(template)
    try:
        return made.render(messages=list(TALK), add_generation_prompt=True, tools=None, documents=None, **names)
    except Exception as error:  # a template can divide by zero
        raise TemplateError(str(error)) from error


def _environment() -> Any:
    """Jinja as transformers sets it up for chat templates: sandboxed, with loop controls and generation blocks."""
    import json
    from datetime import datetime, timezone

    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}`, which marks what a model writes and renders its content."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

        def _content(self, caller: Any) -> str:
            return caller()

    def refuse(message: str) -> None:
        raise TemplateError(message)

    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    made.filters["tojson"] = lambda value, indent=None, **_: json.dumps(value, ensure_ascii=False, indent=indent)
    made.globals["raise_exception"] = refuse
    made.globals["strftime_now"] = lambda form: datetime(2000, 1, 1, tzinfo=timezone.utc).strftime(form)
    return made
