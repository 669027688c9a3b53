"""Tokens to text, one at a time, and the search for stop strings in it.

``tokenizers.decoders.DecodeStream`` (0.22 to 0.23) does not cover this: it raises "Invalid prefix" on byte tokens that
are no UTF-8 (43 of 300 random sequences with the tokenizer of stories260K), never releases an unfinished character at
the end, and knows only tokenizers written in Rust.
"""

from collections.abc import Sequence

from awq_jax.convert.text import TokenizerLike

UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class Detokenizer:
    """Text of one row as its tokens arrive.

    A character may take several tokens, and a word-piece tokenizer decides about the space before
    a token from the one before it; so text is released only when complete, and always decoded
    together with the tokens of the text before it, which begin with a whole character.

    Args:
      tokenizer: ours or of transformers.
      prompt: token ids before the first new one.
      stop: strings that end the text; they and what follows are not part of it.
    """

    CONTEXT = 64  # tokens of the prompt: more than it has special tokens, or bytes of one run, at its end

    def __init__(self, tokenizer: TokenizerLike, prompt: Sequence[int], stop: Sequence[str] = ()):
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.ids = list(prompt[-self.CONTEXT :])
        self.read = len(self.ids)  # of these the text is released
        self.held = ""  # released by the tokenizer, but may be the beginning of a stop string
        self.text = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Text that this token completes ("" if none); sets ``stopped`` at a stop string."""
        self.ids.append(int(token))
        fresh, stable = self._fresh()
        if not fresh or fresh.endswith(UNFINISHED):
            return ""
        if stable:
            del self.ids[: self.read]
        self.read = len(self.ids)
        return self._release(fresh, last=False)

    def finish(self) -> str:
        """What was held back, once no more tokens come."""
        return "" if self.stopped else self._release(self._fresh()[0], last=True)

    def _fresh(self) -> tuple[str, bool]:
        """Text that is not yet released; whether the new tokens left the text before it as it was.

        They do not where they complete a character that the prompt, or a run of bytes, left unfinished.
        """
        known, whole = self._decode(self.ids[: self.read]), self._decode(self.ids)
        pairs = enumerate(zip(known, whole, strict=False))
        same = next((i for i, (a, b) in pairs if a != b), min(len(known), len(whole)))
        return whole[same:], same == len(known)

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _release(self, fresh: str, last: bool) -> str:
        text, self.held = self.held + fresh, ""
        found = [i for i in (text.find(s) for s in self.stop) if i >= 0]
        if found:
            text, self.stopped = text[: min(found)], True
        elif not last:
            keep = max((_overlap(text, s) for s in self.stop), default=0)
            text, self.held = text[: len(text) - keep], text[len(text) - keep :]
        self.text += text
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
