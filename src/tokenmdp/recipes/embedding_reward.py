"""Reward modelling on frozen embeddings: inverse reinforcement learning in seconds, once the texts have been read.

    min_w  − Σ log σ( r_w(x_chosen) − r_w(x_rejected) ) + ½ λ |w|²,     r_w(x) = w · x,   x = embedding of prompt and response

The embeddings are computed once and kept, for every head, objective and share of labels that is tried afterwards. Before
the reward is fitted on all pairs, it is fitted on a sixteenth of them, an eighth and so on: whether held-out accuracy
still rises says whether more labels would help.

Source: Bradley & Terry 1952; Ouyang et al. 2022, eq. 1, with the body frozen; the classifier in its place: Sun, Shen &
    Ton 2024, "Rethinking Bradley-Terry models in preference-based reward modeling".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenmdp.functional import preference
from tokenmdp.models import catalog, embedding
from tokenmdp.models.embedding import Embedder
from tokenmdp.models.embedding_cache import Cache, cache_folder, embedded
from tokenmdp.rewards import comparisons
from tokenmdp.rewards.embedding_reward import EmbeddingReward, Head, fit
from tokenmdp.rewards.judged import judge
from tokenmdp.run import Run
from tokenmdp.tasks import data, files
from tokenmdp.types import Batch, Pairs

SETTING = "preference_rl"
HEADLINE = ("held_out/accuracies", "rewards/accuracies")


@dataclass(frozen=True)
class Config:
    model: str = "smollm2-135m-instruct"  # whose tokens the pairs are in, and whose body is read: best the SFT model
    data: str = "preferences.jsonl"  # prompt, chosen, rejected (or hh-rlhf transcripts): a file or a hub id
    embedding: str = "own"  # own body | minilm | the folder or hub id of an encoder
    pool: str = "mean"  # of the states: mean | last | first
    over: str = "row"  # which states count: those of the whole row | of the response
    head: str = "linear"  # linear | mlp | boosted
    objective: str = "bradley_terry"  # bradley_terry, of pairs | classifier, of sides (boosted is always this)
    penalty: float = 1.0  # of the linear head: 1 / the variance a pair's margin is thought to have beforehand
    curve: int = 4  # fits on growing shares of the pairs, up to one half, before the fit on all
    held_out: float = 0.1  # share of the pairs never trained on
    max_tokens: int = 512  # longer responses are cut there
    micro_tokens: int = 8192  # padded positions in one reading pass; changes memory only
    cache: str = "shared"  # where embeddings are kept: shared (beside the downloads) | none | a folder


def train(
    cfg: Config, embedder: Embedder, pairs: Pairs, held_out: Pairs, run: Run
) -> tuple[EmbeddingReward, dict[str, object]]:
    """Read all texts, fit the head; returns the reward, normalised on the held-out responses, with its held-out figures.

    Raises:
        ValueError: a setting that does not exist, or pairs that no embedding tells apart.
    """
    if not 1 <= cfg.curve <= 16:
        raise ValueError(f"curve is {cfg.curve}; it must be 1 to 16 fits, each on twice the pairs of the one before")
    cache = None
    if cfg.cache != "none":
        cache = Cache(cache_folder() if cfg.cache == "shared" else cfg.cache, embedder)
        for path in cache.damaged:
            run.note(f"{path} was a damaged part of the cache and is set aside: its texts are read again")
    sides = (pairs.chosen, pairs.rejected, held_out.chosen, held_out.rejected)
    with run.progress(sum(map(len, sides)), "embedding", "texts") as bar:
        chosen, rejected, *judged = (embedded(embedder, side, cache, bar.advance, cfg.micro_tokens) for side in sides)

    def fitted(rows: Tensor) -> Head:
        return fit(chosen[rows], rejected[rows], cfg.head, cfg.objective, cfg.penalty, run.seed)

    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(run.seed))
    for step in run.steps(cfg.curve, title="learning curve", setting=SETTING):
        rows = order[: max(1, round(len(pairs) * 0.5 ** (cfg.curve - step)))]
        head = fitted(rows)
        better, worse = head.score(chosen[rows]), head.score(rejected[rows])
        kept, lost = head.score(judged[0]), head.score(judged[1])
        metrics = {
            "loss": preference.bradley_terry(better, worse),
            "rewards/accuracies": preference.ranked_right(better, worse),
            "rewards/margins": better - worse,
            "held_out/accuracies": preference.ranked_right(kept, lost),
            "held_out/margins": kept - lost,
        }
        run.log(step, {"pairs": len(rows), **{name: float(x.mean()) for name, x in metrics.items()}}, HEADLINE)
    reward = EmbeddingReward(embedder, fitted(order), cache=cache)
    reward.normalise(Batch.concat([held_out.chosen, held_out.rejected]))
    return reward, {**judge(reward, held_out), "n_learned": len(pairs), "embedding": embedder.name}


def main(cfg: Config, run: Run) -> dict[str, object]:
    """Load the body and the pairs, train, save the reward to `model/` in the run folder."""
    policy = catalog.load(cfg.model).freeze()
    embedder = embedding.load(cfg.embedding, policy, cfg.pool, cfg.over, cfg.model)
    everything = data.pairs(files.rows(cfg.data), policy, cfg.max_tokens)
    data.tell_cut(everything, cfg.max_tokens, run.note)
    learned, kept, found = comparisons.divided(everything, cfg.held_out, run.rng)
    run.note(f"{len(learned)} pairs, {len(kept)} held out by prompt; {embedder.name} {embedder.fingerprint()}; {found}")
    reward, figures = train(cfg, embedder, learned, kept, run)
    reward.save(run.folder / "model")
    return {**figures, **found, "model": str(run.folder / "model")}
