"""Token ids in, log-probabilities out: vLLM's `/v1/completions`."""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

from maca_serve.common.errors import BrokenAnswerError, RequestError

# Tokens per request: enough to keep the engine busy, few enough that progress moves and that the
# answers (80 bytes of JSON a token) stay small.
TOKENS_PER_REQUEST = 4096
# One request of a long context on a slow CPU.
TIMEOUT_SECONDS = 900.0
# What vLLM's server says where its answer would hold NaN; minus infinity it writes as -9999.
_NOT_NUMBERS = "Out of range float values are not JSON compliant"

Prompt = list[int]
# For a program that reaches nothing but our engines.
NO_PROXIES = {"no_proxy": "*", "NO_PROXY": "*"}


@dataclass(frozen=True)
class Answer:
    """What the engine says about one prompt of n tokens.

    Attributes:
        own: as `Client.prompt_logprobs`, n - 1 natural logarithms.
        top: the most likely tokens at each of these places with theirs, the likeliest first.
        new_tokens: what it would continue with, greedily.
    """

    own: list[float]
    top: list[dict[int, float]]
    new_tokens: list[int]


class Client:
    """Log-probabilities of prompts from one running engine."""

    def __init__(self, url: str, model: str, api_key: str | None = None) -> None:
        """Connect on the first request.

        Args:
            url: the server's, without `/v1`.
            model: the name it serves.
            api_key: what the server wants of its clients; nothing when None.
        """
        self.model = model
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        # Not through a proxy that the environment names, which would be what is measured.
        self._http = httpx.Client(
            base_url=url, timeout=TIMEOUT_SECONDS, headers=headers, trust_env=False
        )

    def prompt_logprobs(self, prompts: list[Prompt]) -> list[list[float]]:
        """Log-probability of each prompt token but the first, given those before it.

        Args:
            prompts: token ids, all sent in one request.

        Returns:
            For a prompt of n tokens n - 1 natural logarithms.

        Raises:
            RequestError: refused, unanswered, or an answer for other tokens.
        """
        body = {
            "model": self.model,
            "prompt": prompts,
            "max_tokens": 1,
            "temperature": 0,
            "prompt_logprobs": 0,
        }
        return [
            _read_logprobs(ids, choice["prompt_logprobs"])
            for ids, choice in zip(prompts, self._choices(body), strict=True)
        ]

    def complete(self, prompts: list[Prompt], new_tokens: int, top: int) -> list[Answer]:
        """Greedy continuations, end-of-text ignored, and what was likely within the prompts.

        Args:
            prompts: token ids, all sent in one request.
            new_tokens: tokens of a continuation.
            top: how many of the most likely tokens at each place; vLLM gives at most 20.

        Raises:
            RequestError: as `prompt_logprobs`; BrokenAnswerError for a log-probability that is
                none.
        """
        body = {
            "model": self.model,
            "prompt": prompts,
            "max_tokens": new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
            "prompt_logprobs": top,
        }
        return [
            Answer(
                _read_logprobs(ids, choice["prompt_logprobs"]),
                [_read_top(entry, top) for entry in choice["prompt_logprobs"][1:]],
                choice["token_ids"],
            )
            for ids, choice in zip(prompts, self._choices(body), strict=True)
        ]

    def score(self, prompts: list[Prompt], advance: Callable[[int], None]) -> list[list[float]]:
        """`prompt_logprobs` of many prompts, several to a request.

        Args:
            prompts: token ids.
            advance: called with the tokens of each finished request.
        """
        scored = []
        for batch in batches(prompts):
            scored += self.prompt_logprobs(batch)
            advance(sum(map(len, batch)))
        return scored

    def max_length(self) -> int:
        """Tokens of prompt and output together that the engine takes at most.

        Raises:
            RequestError: unanswered, or an answer without it.
        """
        answer = self._read(lambda: self._http.get("/v1/models"))
        try:
            return int(answer["data"][0]["max_model_len"])
        except (KeyError, IndexError, TypeError) as error:
            raise RequestError("vLLM does not say its max_model_len at /v1/models") from error

    def _choices(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        """One for each prompt of the request, in its order."""
        choices = sorted(self._post(body)["choices"], key=lambda choice: choice["index"])
        if len(choices) != len(body["prompt"]):
            raise RequestError(f"vLLM answered {len(choices)} of {len(body['prompt'])} prompts")
        return choices

    def _post(self, body: dict[str, Any]) -> dict[str, Any]:
        return self._read(lambda: self._http.post("/v1/completions", json=body))

    def _read(self, send: Callable[[], httpx.Response]) -> dict[str, Any]:
        try:
            answer = send()
        except httpx.HTTPError as error:
            raise RequestError(f"vLLM did not answer: {error or type(error).__name__}") from error
        if _NOT_NUMBERS in answer.text and answer.status_code == 400:
            raise BrokenAnswerError(
                "vLLM's log-probabilities are no numbers (NaN): the weights, or the kernel that "
                "runs them, are broken",
                answered=True,
            )
        if answer.status_code != 200:
            raise RequestError(
                f"vLLM answered {answer.status_code}: {answer.text[:300]}",
                answered=answer.status_code < 500,
            )
        parsed: dict[str, Any] = answer.json()
        return parsed


@contextlib.contextmanager
def direct_to(url: str) -> Iterator[None]:
    """Reach one host without the proxies of this process's environment, which others may need."""
    before = {name: os.environ.get(name) for name in NO_PROXIES}
    told = before["no_proxy"] or before["NO_PROXY"] or ""
    if told != "*":
        told = ",".join(filter(None, [told, urlsplit(url).hostname]))
    os.environ.update(dict.fromkeys(NO_PROXIES, told))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def batches(prompts: list[Prompt]) -> Iterator[list[Prompt]]:
    """Group prompts in order into requests of at most TOKENS_PER_REQUEST, at least one prompt."""
    batch: list[Prompt] = []
    tokens = 0
    for prompt in prompts:
        if batch and tokens + len(prompt) > TOKENS_PER_REQUEST:
            yield batch
            batch, tokens = [], 0
        batch.append(prompt)
        tokens += len(prompt)
    if batch:
        yield batch


def _read_logprobs(ids: Prompt, entries: list[dict[str, Any] | None]) -> list[float]:
    """Each entry maps token ids to their log-probability; with `prompt_logprobs` 0 only the own."""
    if len(entries) != len(ids):
        raise RequestError(f"vLLM answered {len(entries)} of {len(ids)} prompt tokens")
    found = []
    for token, entry in zip(ids[1:], entries[1:], strict=True):
        if entry is None or str(token) not in entry:
            raise RequestError(f"vLLM's answer has no log-probability for token {token}")
        found.append(_finite(entry[str(token)]["logprob"], token))
    return found


def _read_top(entry: dict[str, Any], top: int) -> dict[int, float]:
    """The likeliest tokens of a place; the prompt's own may be there besides."""
    found = {int(token): _finite(value["logprob"], int(token)) for token, value in entry.items()}
    ranked = sorted(found, key=lambda token: -found[token])[:top]
    return {token: found[token] for token in ranked}


def _finite(logprob: float | None, token: int) -> float:
    # vLLM writes -9999 for minus infinity, which JSON cannot hold.
    if logprob is None or not -9999.0 < logprob <= 0.0:
        raise BrokenAnswerError(
            f"vLLM gave token {token} the log-probability {logprob}: the weights, or the kernel"
            " that runs them, are broken",
            answered=True,
        )
    return float(logprob)
