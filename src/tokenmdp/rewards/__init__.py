"""Rewards: whatever can judge a batch of responses. `load` makes one from its name.

A reward is an object with a `name` that maps a `Batch` to a `Score`: a learned model (`reward_model`), a classifier of
texts (`classifier`), a user's function (`function`), a task's own true reward, or a weighted sum of others (`mixture`).
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import TYPE_CHECKING

from tokenmdp.types import Reward

if TYPE_CHECKING:
    from tokenmdp.models.policy import Policy

_PLUS = re.compile(r"(?<!\d[eE])\+")  # not the one in 1e+3
_WEIGHTED = re.compile(r"([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*\*\s*(.*)")


def load(spec: str | Path, policy: Policy) -> Reward:
    """The reward called `spec`.

        sentiment              the true reward of a task, by the task's name
        runs/rm/model          a folder: a reward model on the policy's tokenizer, or a text classifier
        my_rewards.py:brevity  a function of a Python file (see `function.FunctionReward`)
        0.5*a + 1.0*b          a weighted sum of any of these; a part without a weight counts once

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

    path = Path(spec).expanduser()
    folder = bool(spec) and path.is_dir()
    if spec in tasks.names() and spec != "prompts":
        reward = tasks.load(spec, policy).reward
        if reward is None:
            raise ValueError(f"the task {spec} knows no true reward; give a reward model's folder or file.py:function")
        return reward
    if ".py:" in spec:
        from tokenmdp.rewards.function import FunctionReward

        return FunctionReward(str(path))
    if folder and (path / "vocabulary.json").is_file() and not (path / "config.json").is_file():
        from tokenmdp.rewards.classifier import TextClassifier

        return TextClassifier.load(path)
    if folder and (path / "config.json").is_file():
        from tokenmdp.rewards.reward_model import RewardModel

        return RewardModel.load(path, policy)
    names = [name for name in tasks.names() if name != "prompts"]
    near = difflib.get_close_matches(spec, names, n=1)
    if folder:
        problem = f"the folder {spec} holds neither a reward model (config.json) nor a classifier (vocabulary.json)"
    elif path.suffix == ".py":
        problem = f"{spec} names no function: write {spec}:function"
    else:
        problem = f"there is no reward {spec!r}" + (f" in {whole!r}" if spec != whole else "")
    raise ValueError(
        f"{problem}{f'; did you mean {near[0]}?' if near else '.'} A reward is a task's name ({', '.join(names)}), the "
        'folder of a reward model, path/to/file.py:function, or a mixture such as "0.5*a + 1.0*b"'
    )
