"""Tiny models for the tool's tests: one with a tokenizer and a chat template, and one that accepts often."""

from __future__ import annotations

from pathlib import Path

import tokenizers
from model_helpers import head_config, head_tensors, save_head, save_tiny_model, tiny_config
from transformers import PreTrainedTokenizerFast

VOCAB = 320
TURN_END = "<|im_end|>"
_SPECIAL = [TURN_END, "<|im_start|>"]
_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_TEXT = ["Write a letter. What is the answer to the question? The train leaves at noon."]


def save_chat_model(directory: Path) -> Path:
    """A random Llama over bytes and a few words; what it says means nothing. Its end-of-turn token is id 0."""
    save_tiny_model(directory, tiny_config(vocab_size=VOCAB, max_position_embeddings=1024, eos_token_id=0))
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=_SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(_TEXT * 20, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=TURN_END, chat_template=_TEMPLATE)
    tokenizer.add_special_tokens({"additional_special_tokens": _SPECIAL[1:]})
    tokenizer.save_pretrained(directory)
    return directory


def save_agreeing_pair(directory: Path, words: int = 12) -> tuple[Path, Path]:
    """A model of a dozen tokens, so that a random head is right now and then."""
    save_tiny_model(directory / "model", tiny_config(vocab_size=words, initializer_range=0.25))
    tensors = head_tensors(draft_vocab=words)
    tensors |= {"d2t": tensors["d2t"] * 0, "t2d": tensors["t2d"][:words] | True}
    config = head_config(vocab_size=words, draft_vocab_size=words)
    return directory / "model", save_head(directory / "head", config, tensors)
