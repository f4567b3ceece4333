"""chat_template.jinja from Mistral's own tokenizers: what makes transformers write conversations as Mistral does.

Written by mistral-common, whose ids it reproduces.
"""

from __future__ import annotations

import re

from mistral.tokenizer import Tokenizer

# mistral-common's templates write a space behind a control token, for tokenizers that put none in front of the text
# there. Those of `hf_tokenizer`, as SentencePiece, put one in front of every stretch of text.
SPACE_BEHIND = re.compile(r"(\[[A-Z_]+\]) ")
SPACE_ALONE = re.compile(r"\{\{- ' ' ?\}\}")


def to_chat_template(tokenizer: Tokenizer) -> str | None:
    """The template of a tokenizer's version, in Jinja.

    Args:
        tokenizer: a SentencePiece model or a tekken.json.

    Returns:
        None where mistral-common has none for it.
    """
    from mistral_common.exceptions import TokenizerException
    from mistral_common.integrations.chat_templates.chat_templates import (
        convert_tokenizer_to_chat_template,
        generate_chat_template,
    )
    from mistral_common.tokens.tokenizers.base import TokenizerVersion

    try:
        if tokenizer.is_tekken:  # what it can do stands in the file
            return convert_tokenizer_to_chat_template(tokenizer.path, plain_thinking_support=False)
        made = generate_chat_template(
            spm=True,
            tokenizer_version=TokenizerVersion(tokenizer.version),
            image_support=False,
            audio_support=False,
            thinking_support=False,
            default_system_prompt=None,
            plain_thinking_support=False,
            use_special_token_variables=True,
            model_settings_fields=None,
            reasoning_effort_values=None,
            reasoning_effort_default=None,
        )
    except (TokenizerException, ValueError):
        return None
    if tokenizer.version == "v1":  # whose [INST] is text
        return made.replace("{{- ' [INST] ' }}", "{{- '[INST] ' }}")
    return SPACE_ALONE.sub("", SPACE_BEHIND.sub(r"\1", made))
