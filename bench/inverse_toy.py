"""The toy of bench/reward_from_demos.py's first part: a demonstrator with more modes than its student can say.

Responses have up to H = 5 tokens of 3 words, a joint and the end. The demonstrator says k J k J k, for each of three
words k alike, but for 5 slips in 100, which are any response at all. The student sees one token back: after the joint it
cannot know which word it said before. It can say one of the modes always, or all of them now and then.

Everything is a sum over the 1,365 responses: both directions of KL between the distributions of responses, and the
divergences between visitation frequencies that `functional.adversarial` names.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, MistralConfig, PreTrainedTokenizerFast

from tokenmdp.functional import adversarial
from tokenmdp.models.parts import in_parts
from tokenmdp.models.policy import Policy
from tokenmdp.recipes import adversarial as adversarial_recipe
from tokenmdp.recipes import sft
from tokenmdp.run import Run
from tokenmdp.testing.exact import Exact
from tokenmdp.types import Batch

WORDS, HORIZON, EOS, SLIPS = 3, 5, 0, 0.05
JOINT, VOCABULARY = WORDS + 1, WORDS + 2
START = (EOS,)
METHODS = ("bc", "forward", "fairl", "gail", "airl")
OWN = {
    "bc": "kl_forward",
    "forward": "visits_forward",
    "fairl": "visits_forward",
    "gail": "visits_js",
    "airl": "visits_reverse",
}
"""For each method the divergence it is said to minimise."""


@dataclass(frozen=True)
class Toy:
    """The demonstrator, exactly.

    Attributes:
        world: all responses.
        probability: [N] of each.
        modes: rows of the three modes.
        visits: [A] how often the demonstrator takes each action of each state.
        times: [A] how many of the H steps an action fills: an end fills what is left.
    """

    world: Exact
    probability: Tensor
    modes: list[int]
    visits: Tensor
    times: Tensor

    def occupancy(self, probability: Tensor) -> Tensor:
        return occupancy(self.world, probability)

    def figures(self, logp: Tensor) -> dict[str, float | list[float]]:
        """How far a policy with these log-probabilities [N] of responses is from the demonstrator; nats."""
        with torch.no_grad():
            p, expert = logp.exp(), self.probability
            own, theirs = self.occupancy(p), self.visits
            mixed = (own + theirs) / 2

            def visited(x: Tensor, y: Tensor) -> float:
                return float((self.times * torch.where(x > 0, x * (x.log() - y.log()), torch.zeros_like(x))).sum())

            return {
                "kl_forward": float((expert * (expert.log() - logp)).sum()),
                "kl_reverse": float((p * (logp - expert.log())).sum()),
                "visits_forward": visited(theirs, own),
                "visits_reverse": visited(own, theirs),
                "visits_js": 0.5 * visited(own, mixed) + 0.5 * visited(theirs, mixed),
                "modes": [float(p[i]) for i in self.modes],
            }

    def draw(self, count: int, rng: torch.Generator) -> Batch:
        """Demonstrations."""
        return self.world.batch.select(torch.multinomial(self.probability, count, replacement=True, generator=rng))


def occupancy(world: Exact, probability: Tensor) -> Tensor:
    """[A] the probability of each prefix s·a: the sum over the responses through it."""
    inside = world.action >= 0
    mass = probability[:, None].expand(world.action.shape)[inside]
    return torch.zeros(len(world.actions), dtype=mass.dtype).index_add(0, world.action[inside], mass)


def toy() -> Toy:
    world = Exact(START, VOCABULARY, HORIZON, eos=EOS)
    modes = [world.responses.index(tuple(JOINT if t % 2 else k for t in range(HORIZON))) for k in range(1, WORDS + 1)]
    p = torch.full((len(world),), SLIPS / len(world), dtype=torch.float64)
    p[modes] += (1 - SLIPS) / WORDS
    times = [HORIZON - len(a) + 1 if a[-1] == EOS else 1 for a in world.actions]
    return Toy(world, p, modes, occupancy(world, p), torch.tensor(times, dtype=torch.float64))


def exact_run(
    found: Toy, method: str, seed: int, steps: int, rate: float = 0.05
) -> list[dict[str, float | list[float]]]:
    """Train a table of next-token logits by exact gradients, against the best discriminator there is at every step.

    Returns:
        The figures at the start, and after each fifth of the steps.
    """
    rng = torch.Generator().manual_seed(seed)
    table = (0.3 * torch.randn(VOCABULARY, VOCABULARY, generator=rng, dtype=torch.float64)).requires_grad_()
    optimiser = torch.optim.Adam([table], lr=rate)
    world, curve = found.world, []
    for step in range(steps + 1):
        logp = world.logp(lambda tokens: table[tokens])
        if step % max(1, steps // 5) == 0:
            curve.append(found.figures(logp.sum(1)))
        if method == "bc":
            loss = -(found.probability * logp.sum(1)).sum()
        else:
            own = found.occupancy(world.probability(logp))
            logit = (found.visits.log() - own.detach().log()).clamp(-10, 10)
            loss = -(found.times * own * adversarial.REWARDS[method](logit)).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return curve


# -- the same with samples, a transformer and a learned discriminator ---------------------------------------------------


@dataclass(frozen=True)
class Sampled:
    """How much the sampled runs do."""

    steps: int = 120  # phases; behaviour cloning takes as many steps
    prompts: int = 48  # demonstrations a phase, four responses for each
    demonstrations: int = 4000
    rate: float = 5e-3
    methods: tuple[str, ...] = METHODS


def small(window: int, seed: int, vocabulary: int = VOCABULARY) -> Policy:
    """A transformer of two blocks over a few words, whose every position sees `window` tokens, itself included."""
    words = {"<eos>": EOS, **{f"w{i}": i for i in range(1, vocabulary)}}
    plain = Tokenizer(models.WordLevel(words, unk_token="w1"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<eos>", pad_token="<eos>")
    config = MistralConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        sliding_window=window,
        eos_token_id=EOS,
        bos_token_id=EOS,
        pad_token_id=EOS,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        for weight in model.parameters():
            if weight.dim() > 1:
                torch.nn.init.normal_(weight, 0.0, 0.1)
    return Policy(model.float(), tokenizer, name="small", compute="float32").freeze()


def sampled_run(found: Toy, method: str, size: Sampled, run: Run) -> list[dict[str, float | list[float]]]:
    """Train the recipe's way, from demonstrations alone.

    Returns:
        The figures at the start and at the end.
    """
    start, shown = small(1, run.seed), found.draw(size.demonstrations, run.rng)
    kept, rest = shown.select(range(16)), shown.select(range(16, len(shown)))
    if method == "bc":
        clone = sft.Config(
            steps=size.steps,
            rows=4 * size.prompts,
            learning_rate=size.rate,
            evaluate_every=size.steps,
            micro_tokens=8192,
        )
        trained, _ = sft.train(clone, start, rest, kept, run)
    else:
        cfg = adversarial_recipe.Config(
            reward=method,
            steps=size.steps,
            prompts=size.prompts,
            max_new_tokens=HORIZON,
            learning_rate=size.rate,
            discriminator_learning_rate=size.rate,
            discriminator_updates=3,
            micro_tokens=8192,
        )
        judge = adversarial_recipe.Discriminator(small(HORIZON + 1, run.seed + 100).backbone.twin("all"))
        trained, _ = adversarial_recipe.train(cfg, start, judge, rest, kept, run)

    def measured(policy: Policy) -> dict[str, float | list[float]]:
        return found.figures(in_parts(policy.evaluate, found.world.batch)["logp"].double().sum(1))

    return [measured(start), measured(trained)]
