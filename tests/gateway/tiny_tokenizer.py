"""A small real tokenizer, trained in a moment: byte-level BPE whose merges cross character borders."""

from __future__ import annotations

import tokenizers
from transformers import PreTrainedTokenizerFast

from gateway.tokens import Tokens

EOS = "<|end|>"

_TEXT = [
    "the quick brown fox jumps over the lazy dog and the other foxes",
    "grüße aus köln, élan vital, naïve façade",
    "日本語のテキスト 日本語のテキスト 漢字漢字漢字",
    "👩‍👩‍👧‍👦👩‍👩‍👧‍👦 🇩🇪🇫🇷 emoji 👍🏽👍🏽",
    "สวัสดีครับ สวัสดีครับ",
]

CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + m.role) }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def train(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=480,
        special_tokens=[EOS],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_TEXT * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS, chat_template=chat_template)


def tiny_tokens(chat_template: str | None = CHAT_TEMPLATE) -> Tokens:
    tokenizer = train(chat_template)
    # Padded, as the vocabularies of many models are: the last ids stand for nothing.
    return Tokens(tokenizer, vocab_size=480, eos_ids=(tokenizer.eos_token_id,))
