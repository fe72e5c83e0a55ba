"""The learned reward: a language model's body with one linear head, read at the last real token.

    r(x, y) = (w · h̄ − shift) / scale,   h̄ = the state at the last real token, or the mean of all states up to it

`shift` and `scale` are fixed once after training (mean and spread over the behaviour policy's samples), so that scores
have mean 0 and variance 1 where RL begins (Stiennon et al. 2020, section 3.4, normalise to mean 0). Saved as the
`AutoModelForSequenceClassification` with one label that other tools expect, and a small JSON file with shift and scale.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from jaxtyping import Float
from torch import Tensor, nn

from tokenmdp import mdp
from tokenmdp.models.backbone import Backbone
from tokenmdp.models.heads import Critic, pooled
from tokenmdp.models.parts import in_parts
from tokenmdp.models.policy import Policy
from tokenmdp.types import Batch, Score

_FILE = "tokenmdp_reward.json"


class RewardModel:
    """Scores a response by its tokens; the policy that produced them must share its tokenizer.

    Attributes:
        backbone: a sequence-classification model with one label.
        shift, scale: the affine map that makes scores comparable between runs.
        pool: what the head reads: `last` (what other tools expect) or `mean` (see `models.heads.pooled`).
    """

    def __init__(
        self,
        backbone: Backbone,
        tokenizer: transformers.PreTrainedTokenizerBase,
        name: str = "reward_model",
        pool: str = "last",
    ) -> None:
        self.backbone, self.tokenizer, self.name, self.pool = backbone, tokenizer, name, pool
        self.head: nn.Linear = _score_layer(backbone.model)
        self.head_name = next(n for n, m in backbone.model.named_children() if m is self.head)
        self.shift, self.scale = 0.0, 1.0

    @staticmethod
    def from_policy(policy: Policy, train: str, pool: str = "last", name: str = "reward_model") -> RewardModel:
        """A reward model on the policy's body (shared where it does not train), indifferent at first: its head starts
        at zero.

        Differs from Stiennon et al. 2020, appendix B.1, who draw the head from N(0, 1/(D + 1)): with a few hundred
        labels that noise is still there at the end.
        """
        body = policy.backbone.twin(train)
        config = copy.deepcopy(policy.model.config)
        config.num_labels, config.pad_token_id = 1, _padding(policy)
        with torch.device("meta"):
            model = transformers.AutoModelForSequenceClassification.from_config(config)
        setattr(model, model.base_model_prefix, body.body)
        head = _score_layer(model)
        width = head.weight.shape[1]
        head.weight = nn.Parameter(torch.zeros((1, width), device=policy.device))
        if head.bias is not None:
            head.bias = nn.Parameter(torch.zeros(1, device=policy.device))
        body.model = model.eval()
        return RewardModel(body, policy.tokenizer, name, pool)

    @staticmethod
    def load(folder: Path | str, policy: Policy, compute: str = "auto") -> RewardModel:
        """Read a reward model's directory.

        Raises:
            ValueError: it has more than one label, or its tokenizer differs from the policy's.
        """
        folder = Path(folder)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=False
        )
        if model.config.num_labels != 1:
            raise ValueError(
                f"{folder} has {model.config.num_labels} labels; a reward model has one: train it with `tokenmdp reward-model`"
            )
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if tokenizer.get_vocab() != policy.tokenizer.get_vocab():
            raise ValueError(
                f"the reward model in {folder} and the policy {policy.name} have different tokenizers; it reads token ids, so they "
                "must share one: train the reward model on this policy's body, or wrap it as a text reward (file.py:function)"
            )
        backbone = Backbone(model.to(policy.device), compute)
        backbone.freeze()
        out = RewardModel(backbone, tokenizer, folder.name)
        if (folder / _FILE).exists():
            saved = json.loads((folder / _FILE).read_text())
            out.shift, out.scale, out.pool = float(saved["shift"]), float(saved["scale"]), str(saved["pool"])
        return out

    def save(self, folder: Path | str) -> None:
        """Write a Hugging Face directory plus shift and scale."""
        folder = Path(folder)
        model = self.backbone.model if self.backbone.peft is None else self.backbone.merged()
        model.save_pretrained(folder)
        # Other tools pad by the tokenizer's token, and find the last one by `config.pad_token_id`.
        tokenizer = copy.deepcopy(self.tokenizer)
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(model.config.pad_token_id)
        tokenizer.save_pretrained(folder)
        (folder / _FILE).write_text(json.dumps({"shift": self.shift, "scale": self.scale, "pool": self.pool}) + "\n")

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The weights that train; the head always does."""
        yield from ((n, p) for n, p in self.backbone.trained())

    def last(self, batch: Batch) -> Float[Tensor, "B"]:
        """The score of each row, read at its last real token, found by position; with gradient."""
        states = pooled(self.backbone.hidden(batch.tokens, batch.read), self.pool)
        final = states[torch.arange(len(batch), device=states.device), batch.length - 1]
        return (self.head(final)[:, 0] - self.shift) / self.scale

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Score:
        """Scores of a batch, in parts of bounded memory."""
        mdp.touch("learned_reward")
        return Score.of(in_parts(lambda part: {"score": self.last(part)}, batch)["score"])

    @torch.no_grad()
    def normalise(self, batch: Batch) -> None:
        """Set shift and scale so that this batch's scores have mean 0 and variance 1."""
        self.shift, self.scale = 0.0, 1.0
        value = self(batch).value
        self.shift, self.scale = float(value.mean()), max(float(value.std(unbiased=False)), 1e-6)

    def critic(self, train: str = "head") -> Critic:
        """A critic that starts as this reward model read at every prefix: V(s) = r(s)."""
        bias = sum(float(p.detach()) for n, p in self.head.named_parameters() if n == "bias")  # most heads have none
        return Critic(
            self.backbone.twin(train),
            self.head.weight.detach()[0] / self.scale,
            (bias - self.shift) / self.scale,
            self.pool,
        )


def _padding(policy: Policy) -> int:
    """A token that no response ends in, where the tokenizer has one: other tools read at the last token that is not this."""
    tokenizer = policy.tokenizer
    known = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, *tokenizer.all_special_ids)
    return next((i for i in known if i is not None and i not in policy.eos_ids), policy.eos_ids[0])


def _score_layer(model: nn.Module) -> nn.Linear:
    """The classification layer: `score` in decoder models, `classifier` in some others."""
    for name in ("score", "classifier"):
        layer = getattr(model, name, None)
        if isinstance(layer, nn.Linear):
            return layer
    raise ValueError(
        f"{type(model).__name__} has no linear `score` or `classifier` layer, so it cannot serve as a reward model"
    )
