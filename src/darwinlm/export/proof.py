"""Verification of exported models: comparison of logits with the pruned model, on a text that is hard to tokenize."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from darwinlm.errors import UserError
from darwinlm.models.modeling_darwinlm import PrunedModel

LATIN = (
    "The café\u2019s naïve owner said: “It's 3.14159, isn't it?” I'LL see; they'RE here, we've 1234567890.\n"
    "def f(x: int) -> dict:\n\treturn {'a': [1, 22, 333, 4444], \"b\": x**2 % 7}  # 100%\r\n\n\n"
    "   leading    spaces, a\u00a0hard one, and trailing   \n \n"
)
"""English, code, digits, runs of spaces: all tokenizers must agree on these."""

TEXT = LATIN + (
    "Привет, мир! 你好、世界。 こんにちは 안녕하세요 مرحبا بالعالم नमस्ते दुनिया שלום ไทย ½ ² Ⅷ ٣٤٥ CamelCaseHTTPServer2\n"
    "👩\u200d👩\u200d👧\u200d👦 🇩🇪 👍🏽 ✨ <b>&amp;</b> https://example.org/a?b=c&d=%20 ----====#### x\u0302 \u200b…  "
)
"""Emoji, code, runs of spaces, other scripts, digits; composed (NFC), since llama.cpp does not normalize."""

_MOST_TOKENS = 256


class ProofError(UserError):
    """The output of an engine differs from that of the pruned model."""


@dataclass(frozen=True, kw_only=True)
class Proof:
    """Result of a comparison."""

    engine: str
    """Engine that ran the exported model, with its version."""
    positions: int
    """Number of compared positions, each over the whole vocabulary."""
    difference: float
    """Largest difference between two logits, relative to the largest logit."""
    agreeing: int
    """Number of positions with the same most likely token."""

    def __str__(self) -> str:
        return (
            f"largest logit difference {self.difference:.1e} of the largest logit, same most likely token at "
            f"{self.agreeing} of {self.positions} positions ({self.engine})"
        )


def compare(expected_TV: np.ndarray, found_TV: np.ndarray, engine: str) -> Proof:
    """Compare two models' logits, by position and vocabulary entry."""
    return Proof(
        engine=engine,
        positions=len(expected_TV),
        difference=float(np.abs(expected_TV - found_TV).max() / max(np.abs(expected_TV).max(), 1e-6)),
        agreeing=int((expected_TV.argmax(-1) == found_TV.argmax(-1)).sum()),
    )


def check(proof: Proof, most: float, what: str) -> Proof:
    """Return `proof` if the difference is at most `most`. Raises ProofError."""
    if not proof.difference <= most:
        raise ProofError(f"{what}: logits differ from the pruned model; export discarded: {proof}")
    return proof


def proof_tokens(tokenizer: Any, longest: int) -> list[int]:
    """Return the ids of `TEXT`, at most `longest`, and no more than a comparison needs."""
    ids: list[int] = tokenizer(TEXT).input_ids
    return ids[: min(_MOST_TOKENS, longest)]


@torch.no_grad()
def logits_of(model: Callable[[Tensor], Any] | PrunedModel, tokens: Sequence[int]) -> np.ndarray:
    """Return the logits of a transformers model, by position and vocabulary entry, float32."""
    logits_TV: Tensor = model(torch.tensor([list(tokens)])).logits[0]
    found: np.ndarray = logits_TV.float().numpy()
    return found
