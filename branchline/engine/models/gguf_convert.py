"""Converts a GGUF file into a bfloat16 Hugging Face directory.

A program of its own (see `default_model`): `python -m branchline.engine.models.gguf_convert SOURCE TARGET`.
It prints one line for each step, `done total text`, and fails with a traceback on stderr.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

STEPS = 5

#: Text with letters, digits, spaces, a newline and characters beyond ASCII, which every byte-level tokenizer keeps.
_SAMPLE = "Round trip: 12.5 % of the café's naïve users,\nand 東京 too."


def main(source: Path, target: Path) -> None:
    _step(0, "loading PyTorch and transformers")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    torch.set_num_threads(1)  # the work is mostly Python; workers that start beside it keep their cores
    folder, name = str(source.parent), source.name
    _step(1, "reading the tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name, local_files_only=True)
    _step(2, "dequantising the weights")
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=name,
        local_files_only=True,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    _step(3, "writing the bfloat16 directory")
    tokenizer.save_pretrained(target)
    model.save_pretrained(target)
    for file in target.iterdir():
        file.chmod(0o644)
    _step(4, "checking the result")
    _check(AutoTokenizer.from_pretrained(target, local_files_only=True), tokenizer)
    _step(STEPS, "done")


def _check(written: Any, original: Any) -> None:
    """The written tokenizer keeps text as it is, agrees with the GGUF's, and renders the chat template."""
    token_ids = written.encode(_SAMPLE)
    if token_ids != original.encode(_SAMPLE) or written.decode(token_ids) != _SAMPLE:
        raise RuntimeError("the converted tokenizer does not keep text as it is")
    chat = written.apply_chat_template(
        [{"role": "user", "content": _SAMPLE}], tokenize=False, add_generation_prompt=True
    )
    if _SAMPLE not in chat or not chat.startswith("<|im_start|>"):
        raise RuntimeError("the converted chat template does not render")


def _step(done: int, text: str) -> None:
    print(done, STEPS, text, flush=True)


if __name__ == "__main__":
    # Libraries leave directories behind where temporary files go; beside the target they go with its scratch directory.
    os.environ["TMPDIR"] = str(Path(sys.argv[2]).parent)
    os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: nothing here comes from a hub
    main(Path(sys.argv[1]), Path(sys.argv[2]))
