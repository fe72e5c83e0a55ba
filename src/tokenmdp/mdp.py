"""The token MDP as an object one can hold, and the table of problem settings.

    state       the tokens so far: a prefix, and the response that follows it
    action      the next token, 0 ≤ a < V
    dynamics    T(s, a) = concat(s, a): deterministic and known, so any state can be reset to, forked and replayed
    ended       the last action was an end-of-sequence token; such a state is absorbing
    truncated   the response has H tokens and has not ended; H is the horizon

`ended` and `truncated` are different facts and never both true: the first is the policy's decision, the second is ours.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal


@dataclass(frozen=True)
class State:
    """A node of the token tree. States are values: equal tokens from an equal start are the same state.

    Attributes:
        tokens: every token so far, prefix and response.
        start: how many of them are the prefix; the response is what follows.
        ended: the response ended by itself.
        truncated: the response reached the horizon without ending.
    """

    tokens: tuple[int, ...]
    start: int
    ended: bool
    truncated: bool

    @property
    def response(self) -> tuple[int, ...]:
        """The tokens chosen so far."""
        return self.tokens[self.start :]

    @property
    def done(self) -> bool:
        """True if no action is left, for whichever of the two reasons."""
        return self.ended or self.truncated


class TokenMDP:
    """Text generation as a Markov decision process with known dynamics.

        T(s, a) = s · a,   for s not ended and shorter than the horizon

    Args:
        horizon: H, the most tokens a response may have.
        eos_ids: tokens that end a response; empty for responses that only the horizon stops.
        vocabulary: V, the number of actions.
        start: the prefix `reset()` begins from when it is given none.

    Raises:
        ValueError: when the horizon or the vocabulary is not positive, or a token lies outside the vocabulary.

    Source: Sun 2023, "Reinforcement learning in the era of LLMs" (arXiv 2310.06147): generation with dynamics known to
    be concatenation.
    """

    def __init__(self, horizon: int, eos_ids: Iterable[int], vocabulary: int, start: Sequence[int] = ()) -> None:
        for name, value in (("horizon", horizon), ("vocabulary", vocabulary)):
            if value < 1:
                raise ValueError(f"{name}={value}, but it counts tokens: give at least 1")
        self.horizon = horizon
        self.vocabulary = vocabulary
        self.eos_ids = frozenset(self._token(a) for a in eos_ids)
        self.start = tuple(self._token(a) for a in start)

    def reset(self, prefix: Sequence[int] | None = None, start: int | None = None) -> State:
        """Any state at all: a fresh prefix, or the middle or the end of a response.

        Args:
            prefix: the tokens of the state; None for the MDP's own start.
            start: how many of them count as the prefix, the rest being a response in progress. None for all of them: a
                fresh state, even if its last token happens to be an end-of-sequence token (chat templates do that).

        Raises:
            ValueError: when there is no token, or the response could not have happened: longer than the horizon, or
                going on after it had ended.
            OutOfSetting: inside a setting without dynamics; so do `step` and `fork`.
        """
        touch("dynamics")
        tokens = self.start if prefix is None else tuple(self._token(a) for a in prefix)
        start = len(tokens) if start is None else start
        if not 1 <= start <= len(tokens):
            raise ValueError(
                f"a prefix of {start} of {len(tokens)} tokens: "
                "a state starts from at least one token, and from no more than it has"
            )
        response = tokens[start:]
        if len(response) > self.horizon:
            raise ValueError(
                f"a response of {len(response)} tokens, but the horizon is {self.horizon}: no such state exists"
            )
        for i, token in enumerate(response[:-1]):
            if token in self.eos_ids:
                raise ValueError(
                    f"token {i} of the response is {token}, an end-of-sequence token, yet {len(response) - i - 1} more "
                    "follow: an ended response is absorbing, so cut the response there"
                )
        ended = bool(response) and response[-1] in self.eos_ids
        return State(tokens, start, ended, not ended and len(response) == self.horizon)

    def step(self, state: State, action: int) -> State:
        """The state after an action: the same tokens and one more.

        Raises:
            ValueError: when the state is done, or the action lies outside the vocabulary.
        """
        touch("dynamics")
        if state.ended:
            raise ValueError(
                f"a step from an ended state (its last token, {state.tokens[-1]}, is an end-of-sequence token): "
                "that state is absorbing, reset to another"
            )
        if state.truncated:
            raise ValueError(
                f"a step from a truncated state ({len(state.response)} tokens, the horizon is {self.horizon}): "
                "reset to another, or build the MDP with a longer horizon"
            )
        action = self._token(action)
        ended = action in self.eos_ids
        length = len(state.tokens) + 1 - state.start
        return State((*state.tokens, action), state.start, ended, not ended and length == self.horizon)

    def fork(self, state: State, k: int) -> list[State]:
        """k copies of one state, from which k futures may be drawn. Nothing is shared that a step could change.

        Raises:
            ValueError: when k is not positive.
        """
        touch("dynamics")
        if k < 1:
            raise ValueError(f"k={k} copies of a state: ask for at least one")
        return [state] * k

    def _token(self, token: int) -> int:
        if not 0 <= token < self.vocabulary:
            raise ValueError(
                f"token {token} is outside the vocabulary of {self.vocabulary}: give 0 to {self.vocabulary - 1}"
            )
        return int(token)


@dataclass(frozen=True)
class Setting:
    """What a solver is given. A recipe names its setting, and what the setting does not have its loop cannot touch.

    Attributes:
        dynamics: it may act: sample from the policy, step, reset, fork.
        reward: the true reward: "yes", only as it was "logged", or "no".
        learned_reward: it learns a reward from data: "yes", "maybe" or "no".
        data: what it is given besides. With dynamics, "demonstrations" may come from an expert who can be asked.
    """

    dynamics: bool
    reward: Literal["yes", "logged", "no"]
    learned_reward: Literal["yes", "maybe", "no"]
    data: Literal["none", "logged", "demonstrations", "comparisons"]


SETTINGS: Mapping[str, Setting] = MappingProxyType(
    {
        "rl": Setting(dynamics=True, reward="yes", learned_reward="no", data="none"),
        "offline_rl": Setting(dynamics=False, reward="logged", learned_reward="maybe", data="logged"),
        "offline_imitation": Setting(dynamics=False, reward="no", learned_reward="no", data="demonstrations"),
        "imitation": Setting(dynamics=True, reward="no", learned_reward="no", data="demonstrations"),
        "inverse_rl": Setting(dynamics=True, reward="no", learned_reward="yes", data="demonstrations"),
        "offline_inverse_rl": Setting(dynamics=False, reward="no", learned_reward="yes", data="logged"),
        "learning_from_demonstrations": Setting(
            dynamics=True, reward="yes", learned_reward="no", data="demonstrations"
        ),
        "preference_rl": Setting(dynamics=True, reward="no", learned_reward="yes", data="comparisons"),
    }
)
"""Who supplies what, setting by setting. Source: Sun 2023 (arXiv 2310.06147), table 1. Differs: preference RL has its
own row, and so has imitation that never acts, behaviour cloning, which there shares that of imitation."""

Touch = Literal["dynamics", "reward", "learned_reward", "expert"]

_MEANING: Mapping[Touch, str] = {
    "dynamics": "acting: sampling from a policy, stepping, resetting, forking",
    "reward": "asking the true reward",
    "learned_reward": "asking a learned reward",
    "expert": "asking an expert",
}

_running: ContextVar[str | None] = ContextVar("setting", default=None)


class OutOfSetting(RuntimeError):
    """A solver touched what its setting does not have."""


def permits(setting: Setting, what: Touch) -> bool:
    """Whether a solver in this setting may touch it.

    Whoever is given a reward may be given a learned one, which to reinforcement learning is a reward like any other. An
    expert answers on the states the learner gets to, so asking one takes demonstrations and dynamics both.
    """
    if what == "dynamics":
        return setting.dynamics
    if what == "reward":
        return setting.reward == "yes"
    if what == "learned_reward":
        return setting.learned_reward != "no" or setting.reward == "yes"
    return setting.dynamics and setting.data == "demonstrations"


@contextlib.contextmanager
def within(setting: str) -> Iterator[None]:
    """Hold what runs inside to a setting: `with within("offline_rl"): ...`. The innermost one counts.

    A guard against honest mistakes, such as a supervised learner that peeks at the reward or an offline one that samples;
    code that wants to get round it can, for instance on a thread of its own, which starts outside every setting.

    Raises:
        ValueError: no such setting.
    """
    if setting not in SETTINGS:
        raise ValueError(f"setting is {setting!r}; it must be one of {', '.join(SETTINGS)}")
    before = _running.get()
    _running.set(setting)
    try:
        yield
    finally:
        _running.set(before)  # no token: a generator that holds this block may be closed from another context


def running() -> str | None:
    """The setting that holds here; None outside any."""
    return _running.get()


def touch(what: Touch) -> None:
    """Say that the dynamics, a reward or an expert is about to be used. Nothing happens outside any setting.

    Raises:
        OutOfSetting: the running setting does not have it.
    """
    name = _running.get()
    if name is None or permits(SETTINGS[name], what):
        return
    others = ", ".join(other for other, s in SETTINGS.items() if permits(s, what))
    raise OutOfSetting(
        f"{_MEANING[what]} is not in the setting {name}: do it before or after the loop of run.steps, where nothing is "
        f"learned from it, or declare a SETTING that has it ({others})"
    )


def settings_table() -> str:
    """The problem settings as a Markdown table, for the documentation."""

    def cell(value: bool | str) -> str:
        if isinstance(value, bool):
            return "yes" if value else "–"
        return "–" if value in ("no", "none") else value

    lines = ["| setting | dynamics | reward | learned reward | data |", "|---|---|---|---|---|"]
    for name, s in SETTINGS.items():
        cells = (f"`{name}`", cell(s.dynamics), cell(s.reward), cell(s.learned_reward), cell(s.data))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
