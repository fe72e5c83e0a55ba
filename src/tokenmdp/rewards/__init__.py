"""Rewards: whatever can judge a batch of responses. `load` makes one from its name.

A reward is an object with a `name` that maps a `Batch` to a `Score`: a learned model (`reward_model`), a classifier of
texts (`classifier`), a user's function (`function`), a task's own true reward, a verifier of numbers (`verifier`), or a
weighted sum of others (`mixture`).
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenmdp.types import Reward

if TYPE_CHECKING:
    from tokenmdp.models.policy import Policy

_PLUS = re.compile(r"(?<!\d[eE])\+")  # not the one in 1e+3
_WEIGHTED = re.compile(r"([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*\*\s*(.*)")


def load(spec: str | Path, policy: Policy) -> Reward:
    """The reward called `spec`.

        sentiment              the true reward of a task, by the task's name (or `name:value`, see `tasks.load`)
        numeric                the right number, from each prompt's `answer` column (see `verifier.NumericVerifier`)
        runs/rm/model          a folder: a reward model on the policy's tokenizer, of whole responses or of steps, or a
                               text classifier
        novelty:FILE           a bonus for what the responses of a file did not say (see `novelty.Novelty`)
        my_rewards.py:brevity  a function of a Python file (see `function.FunctionReward`)
        0.5*a + 1.0*b          a weighted sum of any of these; a part without a weight counts once

    The verifier and a function take options after another colon:

        numeric:tolerance=0.01,column=target,think=</reasoning>
        my_rewards.py:brevity:timeout_seconds=2,max_missing=0.1

    Args:
        policy: what will be judged: a reward model must share its tokenizer, a task is made of its tokens.

    Raises:
        ValueError: none of these, with what is possible; or what the reward itself raises.
    """
    text = str(spec).strip()
    parts = [text] if Path(text.rpartition(":")[0] or text).exists() else [p.strip() for p in _PLUS.split(text)]
    weighted = []
    for part in parts:
        match = _WEIGHTED.fullmatch(part)
        weight, name = (float(match[1]), match[2]) if match else (1.0, part)
        weighted.append((weight, _single(name, text, policy)))
    if len(weighted) == 1 and weighted[0][0] == 1.0:
        return weighted[0][1]
    from tokenmdp.rewards.mixture import Mixture

    return Mixture(weighted)


def _single(spec: str, whole: str, policy: Policy) -> Reward:
    """One reward; `whole` is what the user wrote, for the error."""
    # What a reward needs is imported when it is asked for: a user's function should not wait for scikit-learn.
    from tokenmdp import tasks
    from tokenmdp.models.catalog import model_folder

    path = model_folder(spec)
    folder = bool(spec) and path.is_dir()
    name, _, rest = spec.partition(":")
    if name == "numeric":
        return _numeric(rest)
    if name == "novelty" and rest:
        from tokenmdp.rewards.novelty import Novelty

        return Novelty.load(rest, policy)
    if name in tasks.names() and name != "prompts":
        reward = tasks.load(spec, policy).reward
        if reward is None:
            raise ValueError(f"the task {spec} knows no true reward; give a reward model's folder or file.py:function")
        return reward
    if ".py:" in spec:
        from tokenmdp.rewards.function import FunctionReward

        file, _, called = str(path).rpartition(".py:")
        function, _, options = called.partition(":")
        return FunctionReward(
            f"{file}.py:{function}", **_options(options, spec, timeout_seconds=float, max_missing=float)
        )
    if folder and (path / "vocabulary.json").is_file() and not (path / "config.json").is_file():
        from tokenmdp.rewards.classifier import TextClassifier

        return TextClassifier.load(path)
    if folder and (path / "config.json").is_file():
        from tokenmdp.rewards import reward_model, step_model

        kind = step_model.StepRewardModel if (path / step_model.FILE).is_file() else reward_model.RewardModel
        return kind.load(path, policy)
    names = [name for name in tasks.names() if name != "prompts"]
    near = difflib.get_close_matches(spec, [*names, "numeric"], n=1)
    if folder:
        problem = f"the folder {spec} holds neither a reward model (config.json) nor a classifier (vocabulary.json)"
    elif path.suffix == ".py":
        problem = f"{spec} names no function: write {spec}:function"
    else:
        problem = f"there is no reward {spec!r}" + (f" in {whole!r}" if spec != whole else "")
    raise ValueError(
        f"{problem}{f'; did you mean {near[0]}?' if near else '.'} A reward is a task's name ({', '.join(names)}), the "
        'folder of a reward model, path/to/file.py:function, or a mixture such as "0.5*a + 1.0*b"; `numeric` '
        "verifies numbers"
    )


def _numeric(text: str) -> Reward:
    """The verifier of numbers; `think` names what closes the thinking, or with a blank between them what opens it, too."""
    from tokenmdp.rewards.verifier import THINK, NumericVerifier

    found = _options(text, f"numeric:{text}", tolerance=float, column=str, think=str)
    opening, _, closing = str(found.pop("think", " ".join(THINK))).rpartition(" ")
    return NumericVerifier(**found, think=(opening, closing))


def _options(text: str, spec: str, **kinds: type) -> dict[str, Any]:
    """`tolerance=0.01,column=target` as arguments; `kinds` are those there are."""
    found: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        option, _, value = (side.strip() for side in part.partition("="))
        if option not in kinds:
            raise ValueError(f"the reward {spec!r} has no option {option!r}: it has {', '.join(kinds)}, as name=value")
        try:
            found[option] = kinds[option](value)
        except ValueError:
            raise ValueError(f"the reward {spec!r} has {option}={value!r}; it must be a number") from None
    return found
