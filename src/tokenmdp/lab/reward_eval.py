"""What a reward is worth before anything is optimised against it: on preferences it was not trained on, on format probes,
and on a policy's own samples.

    pairs      accuracy (Wilson's, prompts as clusters), calibration, Spearman with the data's margins, length bias,
               per-subset accuracy, chosen against rejected of other prompts; beside it the rule "the longer one is
               better", and one half
    leaks      pairs that stand in the file twice; with --trained-on FILE pairs and openings that training has seen, and
               the accuracy without them
    probes     what harmless formatting does to the score (see `probes`)
    samples    with --task, responses of the policy: how much the score varies, within and between prompts, and its agreement
               with a gold reward on pairs of one prompt and of two (see `concordance`)

A held-out pair says what the reward makes of responses that somebody else wrote; what it makes of the policy's own is
another question, and the one that counts in RL.

Source: per-subset accuracies: Lambert et al. 2024 (RewardBench), section 4.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers
from torch import Tensor

from tokenmdp import rewards, tasks
from tokenmdp.lab import concordance, pair_figures, preference_file, probes, report, reward_words
from tokenmdp.lab.pair_figures import Scored
from tokenmdp.lab.preference_file import Compared
from tokenmdp.models import catalog
from tokenmdp.models.policy import Policy
from tokenmdp.models.sampling import Sampling
from tokenmdp.rewards import embedding_reward
from tokenmdp.rewards.ensemble import Normalised
from tokenmdp.run import Run
from tokenmdp.run.files import named_paths
from tokenmdp.stats import Array
from tokenmdp.tasks import files
from tokenmdp.types import Batch, Prompt, Reward

PART = 64  # responses scored between two looks at the bar
READER = "smollm2-135m-instruct"  # whose tokens are read where neither --policy nor the reward's folder says


@dataclass(frozen=True)
class Config:
    reward: str = "runs/reward-model"  # what is evaluated (see `rewards.load`)
    data: str = "preferences.jsonl"  # TRL columns, hh-rlhf transcripts or RewardBench rows; empty for samples only
    trained_on: str = ""  # the file the reward was trained on: what it shares with the data is reported
    policy: str = ""  # whose samples are judged and whose tokens are read; empty for the reward's own tokenizer
    task: str = ""  # prompts for the policy's samples: a task's name, a file or a hub id; empty for no samples
    gold: str = ""  # a reward taken for the truth on the samples; empty for the task's own, where it has one
    prompts: int = 64  # prompts answered; those the task holds out first
    samples: int = 8  # responses a prompt
    max_new_tokens: int = 64
    temperature: float = 1.0  # of sampling
    chat: Literal["auto", "always", "never"] = "auto"  # text prompts as a user's message; auto: RewardBench's rows
    max_tokens: int = 1024  # longer responses of the data are cut there
    most: int = 0  # pairs judged at most, drawn at random; 0 for all
    probed: int = 64  # pairs that format probes rewrite; 0 for none
    chunk: int = 16  # prompts answered between checkpoints

    def __post_init__(self) -> None:
        if min(self.most, self.probed) < 0:
            raise ValueError(f"most={self.most}, probed={self.probed}: each counts pairs, and is at least 0")
        if not self.data and not self.task:
            raise ValueError("neither data nor task is given: there is nothing to evaluate the reward on")
        if self.task and not self.policy:
            raise ValueError(
                f"task {self.task} gives prompts, and nobody to answer them: name a policy by --policy MODEL"
            )
        if self.gold and not self.task:
            raise ValueError(
                f"gold={self.gold} judges a policy's own samples, and no task gives prompts for them: name one by --task, and "
                "who answers by --policy MODEL"
            )


class Reader(Policy):
    """The tokenizer of a reward model's folder, with what a policy knows of its model and none of the weights."""

    @property
    def device(self) -> torch.device:
        """Where the reward is to be: the GPU where there is one."""
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @staticmethod
    def of(folder: Path) -> Reader:
        """The reader of a folder with a config.json and a tokenizer."""
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        return Reader(model, tokenizer, name=folder.name, compute="float32")


def reader(cfg: Config) -> Policy:
    """The policy, or whoever else can give the reward its tokens."""
    if cfg.policy:
        return catalog.load(cfg.policy).freeze()
    for name in named_paths(cfg.reward):  # of an ensemble or a mixture the first member with tokens of its own
        folder = catalog.model_folder(name)
        for place in (folder, folder / "model"):
            if (file := place / embedding_reward.FILE).is_file():
                made = json.loads(file.read_text(encoding="utf-8"))["embedding"]
                if made["kind"] == "own":  # it reads the tokens of the body it was fitted on
                    return catalog.load(made["source"]).freeze()
        if all((folder / part).is_file() for part in ("config.json", "tokenizer_config.json")):
            return Reader.of(folder)
    return catalog.load(READER).freeze()


# ------------------------------------------------------------ pairs


def scores(reward: Reward, batch: Batch, run: Run, title: str) -> Array:
    """[B] the score of each response, NaN without a verdict; what had none is in no_verdict.jsonl."""
    found = np.full(len(batch), np.nan)
    with run.progress(len(batch), title, "responses") as bar:
        for start in range(0, len(batch), PART):
            rows = range(start, min(start + PART, len(batch)))
            part = batch.select(rows)
            score = reward(part)
            run.missing(start, part, score)
            found[rows.start : rows.stop] = [np.nan if (s := score.at(i)) is None else s for i in range(len(rows))]
            bar.advance(len(rows))
    return found


def scored(compared: Compared, chosen: Array, rejected: Array) -> Scored:
    """The scores with what the figures need to know of the pairs."""
    sides = (compared.pairs.chosen, compared.pairs.rejected)
    prompts = [p.ids for p in sides[0].prompts]
    number = {ids: i for i, ids in enumerate(dict.fromkeys(prompts))}
    subset = [str(p.columns.get("subset", "")) for p in compared.said]
    return Scored(
        chosen,
        rejected,
        lengths=np.stack([side.action.sum(-1).double().cpu().numpy() for side in sides], axis=1),
        prompt=np.array([number[ids] for ids in prompts]),
        row=np.array(compared.row),
        margin=np.array([float(np.nan if (m := p.columns.get("margin")) is None else m) for p in compared.said]),
        subset=subset if any(subset) else (),
    )


def on_pairs(cfg: Config, policy: Policy, reward: Reward, run: Run) -> dict[str, Any]:
    """What the data's pairs say of the reward, with leaks and probes."""
    rows = files.rows(cfg.data)
    if 0 < cfg.most < len(rows):
        rows = [rows[i] for i in torch.randperm(len(rows), generator=run.rng)[: cfg.most].tolist()]
    chat = cfg.chat == "always" or (cfg.chat == "auto" and preference_file.looks_like_rewardbench(rows))
    chat = chat and (cfg.chat == "always" or bool(policy.tokenizer.chat_template))
    compared = preference_file.read(rows, policy, cfg.max_tokens, chat)
    chosen = scores(reward, compared.pairs.chosen, run, "chosen")
    rejected = scores(reward, compared.pairs.rejected, run, "rejected")
    table = scored(compared, chosen, rejected)
    # A pointwise or Bradley-Terry model's raw score is in log-odds; normalising divided it by `scale`.
    scale = float(reward.scale) if isinstance(reward, Normalised) else None
    out: dict[str, Any] = {
        "data": dict(compared.counts),
        "faults": list(compared.faults),
        "asked_as_chat": chat,
        **pair_figures.figures(table, scale),
    }
    if cfg.trained_on:
        out["trained_on"] = shared(compared, table, files.rows(cfg.trained_on))
    if cfg.probed:
        some = torch.randperm(len(compared), generator=run.rng)[: cfg.probed].sort().values
        part = compared.pairs.select(some)
        out["probes"] = probes.probed(reward, part.chosen, part.rejected, policy)
    return out


def shared(compared: Compared, table: Scored, trained: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How many pairs and openings training has seen, and the accuracy on the pairs that share neither."""
    pairs, openings, unreadable = preference_file.overlap(compared.said, trained)
    fresh = table.known & ~np.array(pairs) & ~np.array(openings)
    return {
        "pairs": sum(pairs),
        "openings": sum(openings),
        "rows": len(trained),
        "unreadable": unreadable,
        "accuracy_without": pair_figures.rate(
            pair_figures.right(table.chosen[fresh] - table.rejected[fresh]), table.prompt[fresh]
        ),
    }


# ------------------------------------------------------------ the policy's own samples


class Judged:
    """What was said of the samples so far: for each prompt, the scores and gold scores of its responses."""

    def __init__(self) -> None:
        self.rows: dict[str, list[list[float | None]]] = {"score": [], "gold": []}

    def add(self, name: str, values: Sequence[float | None], samples: int) -> None:
        self.rows[name] += [list(values[i : i + samples]) for i in range(0, len(values), samples)]

    def table(self, name: str) -> Array:
        """[P, k] scores, NaN without a verdict."""
        return np.array([[np.nan if x is None else x for x in row] for row in self.rows[name]], dtype=np.float64)

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def scalars(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def restore(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
        self.rows = {name: [list(row) for row in rows] for name, rows in scalars["rows"].items()}


def sample(
    cfg: Config, policy: Policy, prompts: Sequence[Prompt], reward: Reward, gold: Reward | None, run: Run
) -> Judged:
    """Answer the prompts; the responses with their scores go to samples.jsonl."""
    sampling = Sampling(cfg.max_new_tokens, cfg.temperature)
    judged = Judged()
    chunks = [list(prompts[i : i + cfg.chunk]) for i in range(0, len(prompts), cfg.chunk)]
    for step in run.steps(len(chunks), judged, title="samples"):
        b = policy.sample(chunks[step], cfg.samples, sampling, run.rng)
        said = {"score": reward(b)} | ({"gold": gold(b)} if gold is not None else {})
        run.missing(step, b, said["score"])
        for name, score in said.items():
            judged.add(name, [score.at(row) for row in range(len(b))], cfg.samples)
        for row in range(len(b)):
            figures = {"gold": said["gold"].at(row)} if "gold" in said else {}
            run.sample(b, row, policy.name, proxy=said["score"].at(row), **figures)
        known = said["score"].verdict
        mean = float(said["score"].value[known].mean()) if bool(known.any()) else 0.0
        run.log(step, {"objective/scores": mean, "no_verdict": float((~known).sum())}, headline=("objective/scores",))
    return judged


def on_samples(cfg: Config, policy: Policy, reward: Reward, run: Run) -> dict[str, Any]:
    """Spread of the score on the policy's own responses, and agreement with gold where there is one."""
    task = tasks.load(cfg.task, policy)
    gold = rewards.load(cfg.gold, policy) if cfg.gold else task.reward
    asked = task.first(cfg.prompts, run.note)
    judged = sample(cfg, policy, asked, reward, gold, run)
    score = judged.table("score")
    if not np.isfinite(score).any():
        raise ValueError(
            f"{reward.name} gave no verdict on any of {score.size} responses of {policy.name}: see no_verdict.jsonl for "
            "what it said"
        )
    out: dict[str, Any] = {
        "policy": policy.name,
        "prompts": len(score),
        "held_out": len(asked) - task.learned(asked),
        "samples": cfg.samples,
        "no_verdict": int((~np.isfinite(score)).sum()),
        "spread": concordance.spread(score),
    }
    if (cfg.gold or cfg.task) == cfg.reward:
        out["gold"] = {"absent": "the reward is taken for the truth itself: it agrees with itself"}
    elif gold is not None:
        truth = judged.table("gold")
        both = {"pairs": concordance.by_pairs(score, truth), "ranks": concordance.by_ranks(score, truth)}
        out["gold"] = {"name": gold.name, "spread": concordance.spread(truth), **both}
    return out


# ------------------------------------------------------------ the verb


def main(cfg: Config, run: Run) -> dict[str, Any]:
    """Evaluate the reward; write summary.json and report.html, print the verdict."""
    policy = reader(cfg)
    reward = rewards.load(cfg.reward, policy)
    summary: dict[str, Any] = {
        "kind": "reward-eval",
        "title": f"What the reward {reward.name} is worth",
        "reward": reward.name,
        "reader": policy.name,
    }
    if cfg.data:
        summary["pairs"] = on_pairs(cfg, policy, reward, run)
    if cfg.task:
        summary["samples"] = on_samples(cfg, policy, reward, run)
    summary["verdict"] = reward_words.verdict(summary)
    (run.folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    for sentence in summary["verdict"]:
        run.note(sentence)
    page = report.build(run.folder)
    return {**reward_words.headline(summary), "report": str(page)}
