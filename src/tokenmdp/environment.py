"""The token MDP with Gymnasium's face, so that an ordinary RL library can train on a task of ours.

    env = TokenEnv(policy, tasks.load("copying", policy), max_new_tokens=2)
    stable_baselines3.PPO("MlpPolicy", env).learn(100_000)

An action is a token; the observation is the state, every token so far; the reward is 0 until the response is done, then its
score. The policy is asked for its tokenizer only, and never acts here. The package is an extra: `pip install "tokenmdp[gym]"`.

Source: Towers et al. 2024 ("Gymnasium"); the dynamics are `mdp.TokenMDP`, Sun 2023 (arXiv 2310.06147).
Differs: a response that reaches the horizon is `terminated`, not `truncated`. Gymnasium's word asks the learner to go on
with the value of the state that was cut off, but here nothing is earned after it: the score has been paid, and the horizon
is part of the task. Which of the two ended a response is in `info`, as `ended`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenmdp.mdp import State, TokenMDP
from tokenmdp.models.policy import Policy
from tokenmdp.tasks import Task
from tokenmdp.types import Batch, Prompt, Reward

try:
    import gymnasium
except ImportError as error:
    raise ImportError(
        f'tokenmdp.environment needs a package that cannot be imported ({error}): pip install "tokenmdp[gym]", or pip '
        "install gymnasium"
    ) from error


class TokenEnv(gymnasium.Env[NDArray[np.int64], np.int64]):
    """One prompt an episode, one token a step.

    Observations are [longest prompt + H] numbers: the prompt ends where that of the longest does, the response follows, and V
    stands where there is no token. So a position means the same in every episode, and the horizon can be seen coming.

    Args:
        policy: whose tokens the task is in.
        task: its prompts begin the episodes.
        max_new_tokens: the horizon H, in tokens.
        reward: what judges; None for the task's own.
        held_out: begin with the prompts that are held out instead.
        missing: what a response without a verdict earns; None stops there, for a missing score is no 0.
        render_mode: "ansi" makes `render` return the text so far.

    Raises:
        ValueError: nothing judges, nothing is held out, or a prompt with H tokens exceeds what the model can read.
    """

    metadata = {"render_modes": ["ansi"]}  # noqa: RUF012  # Gymnasium's own name and kind

    def __init__(
        self,
        policy: Policy,
        task: Task,
        max_new_tokens: int = 24,
        reward: Reward | None = None,
        held_out: bool = False,
        missing: float | None = None,
        render_mode: str | None = None,
    ) -> None:
        judge = reward or task.reward
        if judge is None:
            raise ValueError(f"the task {task.name} knows no true reward: give one")
        self.prompts = task.held_out if held_out else task.train
        if not self.prompts:
            raise ValueError(f"the task {task.name} holds no prompts out: take those it gives to learn on")
        earns: object = missing  # whatever was given
        if earns is not None and not (isinstance(earns, int | float) and math.isfinite(earns)):
            raise ValueError(
                f"missing is {missing!r}: give what a response without a verdict earns, a finite number, or None"
            )
        if render_mode not in (None, "ansi"):
            raise ValueError(f"render_mode is {render_mode!r}; it is None or 'ansi'")
        if task.longest + max_new_tokens > policy.context:
            raise ValueError(
                f"the longest prompt of {task.name} has {task.longest} tokens; with max_new_tokens={max_new_tokens} that exceeds "
                f"the context of {policy.name}, {policy.context}: shorten one or the other"
            )
        self.policy, self.reward, self.missing, self.render_mode = policy, judge, missing, render_mode
        self.mdp = TokenMDP(max_new_tokens, policy.eos_ids, int(policy.model.config.vocab_size))
        self.longest = task.longest
        self.action_space = gymnasium.spaces.Discrete(self.mdp.vocabulary)
        self.observation_space = gymnasium.spaces.MultiDiscrete(
            np.full(self.longest + max_new_tokens, self.mdp.vocabulary + 1)
        )
        self._prompt: Prompt | None = None
        self._state: State | None = None

    def reset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[NDArray[np.int64], dict[str, Any]]:
        """Begin an episode at a prompt drawn at random, or in any state.

        Args:
            options: `prompt`, the number of one in `prompts`; `response`, tokens that were chosen already. Since the dynamics
                are known, an episode may begin in the middle of a response.

        Raises:
            ValueError: another option, no such prompt, or a response that is over.
        """
        super().reset(seed=seed)
        given = dict(options or {})
        at, chosen = given.pop("prompt", None), given.pop("response", ())
        if given:
            raise ValueError(f"there is no option {', '.join(map(repr, given))}; there are 'prompt' and 'response'")
        at = int(self.np_random.integers(len(self.prompts))) if at is None else _whole(at, "the option 'prompt'")
        if isinstance(chosen, str) or not hasattr(chosen, "__iter__"):
            raise ValueError(
                f"the option 'response' is {chosen!r}: give the tokens chosen already, a sequence of whole numbers"
            )
        response = tuple(_whole(token, "a token of 'response'") for token in chosen)
        if not 0 <= at < len(self.prompts):
            raise ValueError(f"prompt {at} of {len(self.prompts)}: give 0 to {len(self.prompts) - 1}")
        prompt = self.prompts[at]
        state = self.mdp.reset((*prompt.ids, *response), start=len(prompt.ids))
        if state.done:
            raise ValueError(f"a response of {len(response)} tokens that is over: there is nothing left to choose")
        self._prompt, self._state = prompt, state
        return self._seen(state), {"prompt": at}

    def step(self, action: np.int64) -> tuple[NDArray[np.int64], float, bool, bool, dict[str, Any]]:
        """Append a token. Where that ends the response, `info` has its `text`, whether it `ended` by itself, and its `score`,
        which is None without a verdict.

        Raises:
            ValueError: before `reset`, after the end, a token outside the vocabulary, or no verdict where `missing` is None.
        """
        if self._prompt is None or self._state is None:
            raise ValueError("a step before the first reset: there is no state yet")
        state = self.mdp.step(self._state, _whole(action, "the action"))
        if not state.done:
            self._state = state
            return self._seen(state), 0.0, False, False, {}
        text = self.policy.response_text(self._prompt.ids, state.response)
        b = Batch.build([self._prompt], [state.response], texts=[text], ended=[state.ended], pad=self.policy.eos_ids[0])
        said = self.reward(b.to(self.policy.device))
        score = said.at(0)
        earned = self.missing if score is None else score
        if earned is None:
            why = next(iter(said.reasons.values()), "it gave no finite number")
            raise ValueError(
                f"the reward {self.reward.name} gave no verdict on {text[:40]!r} ({why}): say what such a response earns, by "
                "missing=0.0 or another number"
            )
        self._state = state  # not before the reward has answered: after an error the step can be taken again
        return self._seen(state), float(earned), True, False, {"text": text, "ended": state.ended, "score": score}

    def render(self) -> str | None:
        """The prompt and the response so far, as text, where `render_mode` is "ansi"."""
        if self.render_mode is None or self._state is None:
            return None
        return self.policy.decode(self._state.tokens)

    def _seen(self, state: State) -> NDArray[np.int64]:
        """The observation of a state."""
        seen = np.full(len(self.observation_space.nvec), self.mdp.vocabulary)  # type: ignore[attr-defined]
        start = self.longest - state.start
        seen[start : start + len(state.tokens)] = state.tokens
        return seen


def _whole(value: Any, what: str) -> int:
    """A whole number as one, be it Python's, numpy's or torch's."""
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise ValueError(f"{what} is {value!r}: give a whole number")
