"""The probing of a model's own chat template, in the processes that render it."""

from __future__ import annotations

from server.parsing.derive_traits import EndlessError, Turn, derive_traits
from server.parsing.template_traits import TemplateTraits
from server.text.chat_renderer import ChatRenderer, TemplateLimitError
from server.text.tokenizer import Tokenizer


async def probe_template(tokenizer: Tokenizer, renderer: ChatRenderer) -> TemplateTraits:
    """What the template does with tools and reasoning: some twenty small renderings, of a millisecond each."""
    template = tokenizer.chat_template
    if template is None:
        return TemplateTraits()

    async def show(
        turns: list[Turn], *, tools: list[dict[str, object]] | None = None, add_generation_prompt: bool = False
    ) -> str | None:
        try:
            return await tokenizer.render_chat(
                renderer,
                turns,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=False,
                variables={},
                tools=tools,
            )
        except TemplateLimitError as error:
            raise EndlessError from error
        except ValueError:
            return None

    return await derive_traits(template, show)
