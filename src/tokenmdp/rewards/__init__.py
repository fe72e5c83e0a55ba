"""Rewards: whatever can judge a batch of responses. `load` makes one from its name.

A reward is an object with a `name` that maps a `Batch` to a `Score`: a learned model (`reward_model`), a classifier of
texts (`classifier`), a user's function (`function`), a task's own true reward, a verifier of numbers (`verifier`), a
language model that compares (`judge_model`), several rewards as one (`ensemble`), or a weighted sum of others (`mixture`).
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
_NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_WEIGHTED = re.compile(rf"([-+]?{_NUMBER})\s*\*\s*(.*)")
_ENSEMBLE = re.compile(rf"(mean|min)(?:\s*-\s*({_NUMBER})\s*\*\s*variance)?\s*\((.*)\)")
_COMMA, _COMMA_BLANK = re.compile(r",(?!\s*\w+=)"), re.compile(r",\s+(?!\w+=)")  # not those before an option


def load(spec: str | Path, policy: Policy) -> Reward:
    """The reward called `spec`.

        sentiment              the true reward of a task, by the task's name (or `name:value`, see `tasks.load`)
        numeric                the right number, from each prompt's `answer` column (see `verifier.NumericVerifier`)
        runs/rm/model          a folder: a reward model on the policy's tokenizer, of whole responses or of steps, one
                               on frozen embeddings, or a text classifier
        runs/prompts-fit       a folder: what a written prompt would earn on its query (see `prompt_proxy.PromptProxy`)
        novelty:FILE           a bonus for what the responses of a file did not say (see `novelty.Novelty`)
        log_ratio:MODEL        how much likelier a model that was cloned from demonstrations holds a response than the
                               policy, or than a second `,MODEL` (see `log_ratio.LogRatio`)
        my_rewards.py:brevity  a function of a Python file (see `function.FunctionReward`)
        judge:MODEL            how likely a language model finds it better than the prompt's `reference` (see `judge_model`)
        min(a, b, c)           an ensemble: mean(...), min(...) or mean-0.5*variance(...) (see `ensemble`)
        0.5*a + 1.0*b          a weighted sum of any of these; a part without a weight counts once

    The verifier, a judge and a function take options after another colon:

        numeric:tolerance=0.01,column=target,think=</reasoning>
        judge:smollm2-135m-instruct:column=answer,least=0.05
        my_rewards.py:brevity:timeout_seconds=2,max_missing=0.1

    Args:
        policy: what will be judged: a reward model must share its tokenizer, a task is made of its tokens.

    Raises:
        ValueError: none of these, with what is possible; or what the reward itself raises.
    """
    text = str(spec).strip()
    parts = [text] if Path(text.rpartition(":")[0] or text).exists() else _split(text, _PLUS)
    weighted = []
    for part in parts:
        match = _WEIGHTED.fullmatch(part)
        weight, name = (float(match[1]), match[2]) if match else (1.0, part)
        weighted.append((weight, _single(name, text, policy)))
    if len(weighted) == 1 and weighted[0][0] == 1.0:
        return weighted[0][1]
    from tokenmdp.rewards.mixture import Mixture

    return Mixture(weighted)


def _split(text: str, separator: re.Pattern[str]) -> list[str]:
    """The parts between separators that stand outside every parenthesis."""
    parts, start = [], 0
    for found in separator.finditer(text):
        before = text[: found.start()]
        if before.count("(") <= before.count(")"):
            parts.append(text[start : found.start()].strip())
            start = found.end()
    return [*parts, text[start:].strip()]


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
    if members := _ENSEMBLE.fullmatch(spec):
        from tokenmdp.rewards.ensemble import Ensemble

        # A comma may belong to a member; then a blank after it tells which ones part them.
        apart = _COMMA_BLANK if _COMMA_BLANK.search(members[3]) else _COMMA
        each = [load(member, policy) for member in _split(members[3], apart)]
        return Ensemble(each, members[1], float(members[2] or 0))
    if name == "judge" and rest:
        from tokenmdp.models import catalog
        from tokenmdp.rewards.judge_model import JudgeModel

        model, _, options = rest.partition(":")
        return JudgeModel(catalog.load(model).freeze(), **_options(options, spec, column=str, least=float))
    if name == "novelty" and rest:
        from tokenmdp.rewards.novelty import Novelty

        return Novelty.load(rest, policy)
    if name == "log_ratio" and rest:
        from tokenmdp.rewards.log_ratio import LogRatio

        return LogRatio.load(rest, policy)
    if folder and any((place / "chooser.json").is_file() for place in (path, path / "model")):
        from tokenmdp.rewards.prompt_proxy import PromptProxy

        return PromptProxy(path)
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
    for place in (path, path / "model"):
        if (place / "embedding_reward.json").is_file():
            from tokenmdp.rewards.embedding_reward import EmbeddingReward

            return EmbeddingReward.load(place, policy)
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
