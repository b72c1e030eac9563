"""Detokenisation and stop strings."""

from __future__ import annotations

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from branchline.core import FinishReason
from branchline.engine.models.locate import locate_model
from gateway.detokenize import REPLACEMENT, Detokenizer
from gateway.output import Output
from gateway.stops import StopMatcher
from gateway.tokens import Tokens


def stream(detokenizer: Detokenizer, ids: list[int]) -> list[str]:
    return [*(detokenizer.push(index) for index in ids), detokenizer.flush()]


def byte_ids(tokens: Tokens) -> list[int]:
    """One id per byte value: tokens that hold any part of any character."""
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    vocab = tokens._tokenizer.get_vocab()
    return [vocab[char] for char in alphabet]


class TestDetokenizer:
    @given(text=st.text(max_size=80))
    def test_any_text_comes_out_whole(self, tokens: Tokens, text: str) -> None:
        ids = tokens._tokenizer.encode(text)
        assert "".join(stream(tokens.detokenizer(), ids)) == text

    @given(text=st.text(max_size=80).filter(lambda text: REPLACEMENT not in text))
    def test_no_half_character_is_shown(self, tokens: Tokens, text: str) -> None:
        assert REPLACEMENT not in "".join(stream(tokens.detokenizer(), tokens._tokenizer.encode(text))[:-1])

    @given(data=st.data())
    def test_any_ids_equal_decoding_all_at_once(self, tokens: Tokens, data: st.DataObject) -> None:
        ids = data.draw(st.lists(st.integers(0, tokens.vocab_size - 1), max_size=120))
        assert "".join(stream(tokens.detokenizer(), ids)) == tokens.decode(ids)

    @settings(max_examples=30)
    @given(data=st.data())
    def test_long_runs_that_are_no_text(self, tokens: Tokens, data: st.DataObject) -> None:
        # Longer than the window: the cut must not show a half character or lose one.
        ids = data.draw(st.lists(st.sampled_from(byte_ids(tokens)), min_size=60, max_size=200))
        assert "".join(stream(tokens.detokenizer(), ids)) == tokens.decode(ids)

    def test_characters_never_aligned_with_tokens(self) -> None:
        # Each token ends one character and begins the next, so the text ends inside a character every time.
        pieces = [b"\xe6", *[b"\x97\xa5\xe6"] * 100, b"\x97\xa5"]

        def decode(ids: list[int]) -> str:
            return b"".join(pieces[index] for index in ids).decode("utf-8", errors="replace")

        shown = stream(Detokenizer(decode), list(range(len(pieces))))
        assert "".join(shown) == "日" * 101
        assert shown[1:-1] == ["日"] * 101

    def test_work_per_token_is_bounded(self, tokens: Tokens) -> None:
        longest = 0

        def decode(ids: list[int]) -> str:
            nonlocal longest
            longest = max(longest, len(ids))
            return tokens.decode(ids)

        garbage = byte_ids(tokens)[-1:] * 2000
        stream(Detokenizer(decode), garbage + tokens._tokenizer.encode("the fox " * 500))
        assert longest <= 80

    def test_special_tokens_are_not_shown(self, tokens: Tokens) -> None:
        eos = tokens.eos_ids[0]
        half = tokens._tokenizer.encode("👍")
        assert "".join(stream(tokens.detokenizer(), [eos, *half, eos, *half])) == "👍👍"
        assert stream(tokens.detokenizer(), [eos] * 3) == [""] * 4

    def test_flush_shows_an_unfinished_character(self, tokens: Tokens) -> None:
        ids = [index for index in byte_ids(tokens) if tokens.decode([index]) == REPLACEMENT]
        assert stream(tokens.detokenizer(), ids[:1])[-1] == REPLACEMENT

    def test_sentencepiece_style_bytes_and_spaces(self) -> None:
        # Byte-fallback decoders judge a run of bytes as a whole, and strip the first space.
        vocab = {"<unk>": 0, "\u2581a": 1, "\u2581b": 2, **{f"<0x{byte:02X}>": 3 + byte for byte in range(256)}}
        backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>"))
        decoders = tokenizers.decoders
        backend.decoder = decoders.Sequence(
            [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        ids = [1, 2, *(3 + byte for byte in "é日👍é".encode()), 1, *(3 + byte for byte in "日".encode()), 2]
        shown = stream(Detokenizer(backend.decode), ids)
        assert "".join(shown) == "a bé日👍é a日 b"
        assert REPLACEMENT not in "".join(shown)


def naive(text: str, stops: list[str]) -> tuple[str, bool]:
    """The text before the occurrence that ends first, the longest of those that end together."""
    for end in range(len(text) + 1):
        ending = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(ending)], True
    return text, False


class TestStopMatcher:
    @given(
        text=st.text(alphabet="abc", max_size=40),
        stops=st.lists(st.text(alphabet="abc", min_size=1, max_size=5), max_size=4),
        data=st.data(),
    )
    def test_equals_naive_search_for_every_chunking(self, text: str, stops: list[str], data: st.DataObject) -> None:
        cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=10)))
        matcher = StopMatcher(stops)
        shown = ""
        for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
            shown += matcher.push(text[start:end])
            assert naive(text, stops)[0].startswith(shown)  # nothing that a stop string would take back
        shown += matcher.flush()
        assert (shown, matcher.matched) == naive(text, stops)

    def test_holds_back_only_what_may_begin_a_stop_string(self) -> None:
        matcher = StopMatcher(["\n\nUser:"])
        assert matcher.push("Hello\n") == "Hello"
        assert matcher.push("world\n\nUs") == "\nworld"
        assert matcher.push("ers\n") == "\n\nUsers"
        assert not matcher.matched

    def test_drops_what_follows(self) -> None:
        matcher = StopMatcher(["stop"])
        assert matcher.push("a stop b") == "a "
        assert matcher.matched
        assert matcher.push("more") == ""
        assert matcher.flush() == ""


class TestOutput:
    def test_counts_tokens_up_to_the_one_that_completes_the_stop_string(self, tokens: Tokens) -> None:
        ids = tokens._tokenizer.encode("the quick brown fox")
        output = Output(tokens.detokenizer(), ["ick b"])
        piece = output.push(ids)
        assert output.stopped
        assert piece.text == "the qu"
        assert "ick b" in tokens.decode(list(piece.token_ids))
        assert "ick b" not in tokens.decode(list(piece.token_ids[:-1]))

    def test_held_text_comes_with_the_end(self, tokens: Tokens) -> None:
        output = Output(tokens.detokenizer(), ["dogs"])
        shown = output.push(tokens._tokenizer.encode("lazy dog")).text
        assert shown == "lazy "
        assert output.finish(FinishReason.LENGTH) == ("dog", FinishReason.LENGTH)

    def test_the_last_characters_may_complete_a_stop_string(self, tokens: Tokens) -> None:
        output = Output(tokens.detokenizer(), [REPLACEMENT])
        half = next(index for index in byte_ids(tokens) if tokens.decode([index]) == REPLACEMENT)
        assert output.push([*tokens._tokenizer.encode("a"), half]).text == "a"
        assert output.finish(FinishReason.LENGTH) == ("", FinishReason.STOP)


@pytest.fixture(scope="module")
def real() -> Tokens:
    return Tokens.load(locate_model("default"))


@pytest.mark.models
class TestDefaultModelsTokenizer:
    @given(text=st.text(max_size=80))
    def test_any_text_comes_out_whole(self, real: Tokens, text: str) -> None:
        ids = real._tokenizer.encode(text, add_special_tokens=False)
        assert "".join(stream(real.detokenizer(), ids)) == real.decode(ids)

    def test_facts(self, real: Tokens) -> None:
        assert real.vocab_size == 49152
        assert real.eos_ids == (2,)
        assert 2 in real._special_ids

    async def test_chat(self, real: Tokens) -> None:
        from gateway.conversation import Conversation

        ids = await real.encode_chat(Conversation(({"role": "user", "content": "Hello"},)))
        text = real._tokenizer.decode(ids)
        assert text.startswith("<|im_start|>system")
        assert text.endswith("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")
