"""Scores answers with the scorer of their `reasoning-gym` task; runs in a process of its own (see `function`).

Some of these scorers search, or read the answer as an expression that they compute, and an answer can keep them busy
for ever: there, a hanging one is killed and loses its own verdict only.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import re
from typing import Any

RIGHT = 0.99  # wrong answers may score 0.01 to 0.17: what is not fully right is wrong
with contextlib.suppress(ImportError):  # while this file loads, for which there is more time than for an answer
    importlib.import_module("reasoning_gym")
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def judge(completions: list[str], gym: list[dict[str, Any]], gym_question: list[str]) -> list[float]:
    """1 where the scorer calls the answer right, else 0.

    Args:
        completions: answers; of one with `<answer>...</answer>` what the last of these tags hold.
        gym: where each question comes from: `name`, `size`, `seed`, `settings` of the data set, and the `entry` in it.
        gym_question: the questions, to see that the data set is the same here.
    """
    return [float(score(*row) >= RIGHT) for row in zip(completions, gym, gym_question, strict=True)]


def score(completion: str, gym: dict[str, Any], question: str) -> float:
    """The scorer's number for one answer; 0 for an empty one.

    Raises:
        ValueError: the data set made here has another question.
    """
    tagged = _TAGGED.findall(completion)
    said = (tagged[-1] if tagged else completion).strip()
    if not said:
        return 0.0
    made = dataset(gym["name"], gym["size"], gym["seed"], json.dumps(gym["settings"], sort_keys=True))
    entry = made[gym["entry"]]
    if entry["question"] != question:
        raise ValueError(
            f"{gym['name']} makes another question from the same seed in another process: set PYTHONHASHSEED=0 before the "
            "run, for this task goes through sets in their order"
        )
    return float(made.score_answer(said, entry))


@functools.lru_cache(maxsize=8)
def dataset(name: str, size: int, seed: int, settings: str) -> Any:
    """A data set of the package; `settings` are its further arguments, as JSON.

    Raises:
        ImportError: the package is not installed.
    """
    return importlib.import_module("reasoning_gym").create_dataset(name, size=size, seed=seed, **json.loads(settings))
