"""What a doctor looks at: one function a check, each with a figure, a verdict and what it would mean.

    fail   what would be learned or reported is not what was asked for: do not spend money on it
    warn   it may be meant; if it is not, it spoils the run
    pass   measured, and as it should be

A check looks at the user's own model, prompts, reward and data, a few rows of each. Nothing is trained and nothing written.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tokenmdp import gate, stats
from tokenmdp.functional import imitation, measures, weights
from tokenmdp.learner import Learner
from tokenmdp.models.policy import Policy
from tokenmdp.models.sampling import Sampling
from tokenmdp.tasks import data
from tokenmdp.testing import contracts
from tokenmdp.types import Batch, Pairs, Prompt, Reward, Score

Status = Literal["pass", "warn", "fail"]
GRADIENT = {"float64": 1e-9, "float32": 1e-3, "bfloat16": 0.05, "float16": 0.02}  # relative, what rounding explains
FEW = 6  # rows that are looked at one by one
ALIKE, LONGER = (
    0.8,
    0.7,
)  # shares of groups without spread, and of longer (or shorter) winners, from which it is a warning
EQUAL = 0.1  # share of pairs with two equal sides from which it is one
LENGTH = 0.5  # rank correlation of score and length from which it is a warning
REPLY = "zebraquagga"  # what is put where a message goes


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        check: its name.
        status: pass, warn or fail.
        figure: what was measured.
        says: what it means, and what to do where it is not a pass.
    """

    check: str
    status: Status
    figure: str
    says: str


@dataclass(frozen=True)
class Patient:
    """What is looked at.

    Attributes:
        policy: the user's model; frozen.
        prompts: some of the user's prompts.
        sampled: responses to them, several each, at temperature 1.
        seconds: what sampling them took.
        train: what of the policy would train.
        sampling: how they were sampled.
        reward: what would judge, and score, what it said of `sampled`; None without one.
        fault: what it said instead, where it failed.
        data: what would be learned from, where there is such a file.
        max_tokens: where the responses of `data` were cut.
    """

    policy: Policy
    prompts: list[Prompt]
    sampled: Batch
    seconds: float
    train: str
    sampling: Sampling
    reward: Reward | None = None
    score: Score | None = None
    fault: str = ""
    data: Batch | Pairs | None = None
    max_tokens: int = 256

    @property
    def compute(self) -> str:
        return self.policy.paths["compute"]


def logp_of(policy: Policy, b: Batch, temperature: float = 1.0) -> Tensor:
    """[B, L] log-probabilities by the learner's path, nats."""
    with torch.no_grad():
        return policy.evaluate(b, temperature=temperature)["logp"]


def gradient(policy: Policy) -> Tensor:
    """The gradient that has gathered in the weights that train, in one row."""
    return torch.cat([w.grad.flatten() for _, w in policy.trained() if w.grad is not None]).float()


def around(policy: Policy, roles: Sequence[str], begin_reply: bool = False) -> str | None:
    """What the chat template writes after the last message; None where it shows no message, or refuses such a chat."""
    chat = [{"role": role, "content": REPLY if role == roles[-1] else "a"} for role in roles]
    for system in ([], [{"role": "system", "content": "a"}]):  # some templates want one
        try:
            text = policy.chat([*system, *chat], begin_reply=begin_reply)
        except ValueError:
            continue
        at = text.lower().rfind(REPLY)  # some write a message in capitals
        return None if at < 0 else text[at + len(REPLY) :]
    return None


def within(x: float, limit: float) -> Status:
    """A fail where a figure is beyond its limit, or is no number."""
    return "pass" if x <= limit else "fail"


# The tokenizer and the template ----------------------------------------------------------------------------------------


def end_of_turn(p: Patient) -> Finding:
    """The token that the chat template writes after a reply is one that ends a response."""
    policy, tokenizer = p.policy, p.policy.tokenizer
    ends = ", ".join(repr(tokenizer.convert_ids_to_tokens(i)) for i in policy.eos_ids)
    if not tokenizer.chat_template:
        return Finding("end of a response", "pass", ends, "these tokens end a response; there is no chat template")
    rest = around(policy, ("user", "assistant"))
    if rest is None:
        says = "the chat template does not show the reply of a plain chat, so what it ends one with cannot be told: look at it"
        return Finding("end of a response", "warn", ends, says)
    after = policy.encode(rest.lstrip())  # some write a blank before the end
    if after and after[0] in policy.eos_ids:
        return Finding("end of a response", "pass", ends, "the chat template ends a reply with one of them")
    written = repr(tokenizer.convert_ids_to_tokens(after[0])) if after else "nothing"
    return Finding(
        "end of a response",
        "fail",
        ends,
        f"the chat template ends a reply with {written}, which ends no response here: samples would run on to the horizon; set "
        "eos_token_id in generation_config.json to a list that has it",
    )


def ending_learned(p: Patient) -> Finding:
    """The end-of-text token of a demonstration has weight and a gradient, whatever pads the batch."""
    rows = [{"prompt": "a", "completion": " b"}, {"prompt": "a", "completion": " b c d e f"}]
    b = data.demonstrations(rows, p.policy)
    last = b.length - 1
    chosen = [int(b.tokens[i, at]) in p.policy.eos_ids and bool(b.action[i, at]) for i, at in enumerate(last.tolist())]
    weight = float(weights.per_token(b.action)[torch.arange(len(b)), last].sum())
    if not all(chosen) or not weight > 0:
        return Finding(
            "the end is learned",
            "fail",
            f"weight {weight:g}",
            "the end-of-text token is masked: it would never be learned",
        )
    student = p.policy.twin(p.train)
    student.evaluate(b)["logp"][torch.arange(len(b)), last].sum().backward()
    norm = float(gradient(student).norm())
    if not norm > 0:
        says = f"a demonstration's end has no gradient in what would train ({p.train}): are the weights zero, or not numbers?"
        return Finding("the end is learned", "fail", f"gradient norm {norm:.2g}", says)
    says = "a demonstration's last token is its end, counts in the loss and has a gradient"
    return Finding("the end is learned", "pass", f"gradient norm {norm:.2g}", says)


def template_used(p: Patient) -> Finding:
    """An instruct model is asked through its chat template."""
    turn = around(p.policy, ("user",), begin_reply=True) if p.policy.tokenizer.chat_template else None
    special = set(p.policy.tokenizer.all_special_ids)
    marked = sum(
        q.text.endswith(turn) if turn and turn.strip() else bool(special & set(q.ids[len(p.policy.opening) :]))
        for q in p.prompts
    )
    figure = f"{marked} of {len(p.prompts)} prompts"
    if not p.policy.tokenizer.chat_template or marked == len(p.prompts):
        return Finding(
            "chat template", "pass", figure, "prompts are written as this model expects them, as far as can be told"
        )
    return Finding(
        "chat template",
        "warn",
        figure,
        "the model has a chat template and these prompts go past it, as plain text; to go through it give them as chat messages: "
        '{"prompt": [{"role": "user", "content": "..."}]}',
    )


def round_trip(p: Patient) -> Finding:
    """How many responses come back as other tokens when their text is tokenised again."""
    b, moved = p.sampled, 0
    for i in range(len(b)):
        ids = b.tokens[i][b.action[i]].tolist()
        ids = ids[:-1] if ids and ids[-1] in p.policy.eos_ids else ids
        moved += p.policy.encode(p.policy.decode(ids)) != ids
    return Finding(
        "text and tokens",
        "pass",
        f"{moved} of {len(b)} differ",
        "here tokens are carried and never made again from text; whoever passes text on (an endpoint, a second stage) sees other "
        "tokens in that many responses",
    )


# The model's two paths -------------------------------------------------------------------------------------------------


def path_taken(p: Patient) -> Finding:
    """Which rollout path this model takes, and why not the fast one."""
    way = p.policy.paths.get("rollouts", "not sampled")
    tokens = int(p.sampled.action.sum())
    says = f"{tokens} tokens in {p.seconds:.1f} s; products in {p.compute}"
    slow = "slow" in way
    return Finding(
        "rollout path", "warn" if slow else "pass", f"{tokens / max(p.seconds, 1e-9):.0f} tokens/s", f"{way}; {says}"
    )


def sampler_and_learner(p: Patient) -> Iterator[Finding]:
    """Sampler and learner say the same of the same tokens, at two temperatures."""
    limit = gate.explained(gate.ROUNDING, p.compute)
    cooler = Sampling(p.sampling.max_new_tokens, temperature=0.7)
    again = p.policy.sample(p.prompts[:FEW], 2, cooler, torch.Generator().manual_seed(1))
    for b, temperature in ((p.sampled, 1.0), (again, 0.7)):
        found = measures.sampler_difference(b, logp_of(p.policy, b, temperature))
        mean, most = (found[f"sampling/sampling_logp_difference/{k}"] for k in ("mean", "max"))
        yield Finding(
            f"sampler and learner, T = {temperature:g}",
            within(mean, limit),
            f"{mean:.2g} nats, {most:.2g} at most",
            f"rounding in {p.compute} explains {limit:g} a token; beyond it every policy gradient would be one of another policy",
        )


def start_is_reference(p: Patient) -> Finding:
    """A policy that starts as its reference has a KL of exactly 0 to it."""
    b = p.sampled.select(range(min(FEW, len(p.sampled))))
    gap = float((logp_of(p.policy.twin(p.train), b) - logp_of(p.policy, b)).abs().max())
    limit = gate.explained(gate.ROUNDING, p.compute)
    says = f"before the first update the policy that would train ({p.train}) is its reference {p.policy.fingerprint()}"
    return Finding("KL to the reference at the start", within(gap, limit), f"{gap:.2g} nats", says)


def neighbours(p: Patient) -> Finding:
    """A row's log-probabilities do not depend on padding, on its neighbours or on their order."""
    b = p.sampled.select(range(min(FEW, len(p.sampled))))
    together, L = logp_of(p.policy, b), b.tokens.shape[1]
    turned = logp_of(p.policy, b.select(list(reversed(range(len(b)))))).flip(0)
    gaps = [(turned - together)[b.action].abs()]
    for i in range(len(b)):
        alone = b.select([i])
        own = logp_of(p.policy, alone)[0]
        gaps.append((own - together[i, : own.shape[0]])[b.action[i, : own.shape[0]]].abs())
    mean, most = float(torch.cat(gaps).mean()), max(float(g.max()) for g in gaps if len(g))
    limit = gate.explained(gate.ROUNDING, p.compute)
    says = f"{len(b)} rows of up to {L} tokens: padded together, in another order, and each alone"
    return Finding("padding and neighbours", within(mean, limit), f"{mean:.2g} nats, {most:.2g} at most", says)


def micro_batches(p: Patient) -> Finding:
    """The gradient on the user's model does not depend on how the batch is cut."""
    b = p.sampled.select(range(min(FEW, len(p.sampled))))
    found: list[Tensor] = []
    for tokens in (1 << 20, 1):
        student = p.policy.twin(p.train)

        def loss(part: Batch, student: Policy = student) -> tuple[Tensor, dict[str, Tensor]]:
            return imitation.nll(student.evaluate(part)["logp"]), {}

        Learner(student, 1e-5, tokens=tokens).gradient(loss, b, weights.per_token(b.action))
        found.append(gradient(student))
    gap = float((found[0] - found[1]).norm() / found[0].norm().clamp_min(1e-30))
    limit = gate.explained(GRADIENT, p.compute)
    says = (
        f"the gradient of {len(b)} responses at once and of one at a time; rounding in {p.compute} explains {limit:g}"
    )
    return Finding("micro-batches", within(gap, limit), f"{gap:.2g} relative", says)


# What would be learned from --------------------------------------------------------------------------------------------


def horizon(p: Patient) -> Finding:
    """Whether the model ends its responses before the horizon."""
    cut = float((~p.sampled.ended).float().mean())
    figure = f"{cut:.0%} of {len(p.sampled)} cut at {p.sampling.max_new_tokens}"
    if cut <= gate.CUT:
        return Finding("horizon", "pass", figure, "most responses end by themselves")
    says = "raise max_new_tokens unless that is meant: a reward that reads the end of an answer never sees it"
    return Finding("horizon", "warn", figure, says)


def cut_data(p: Patient) -> Finding | None:
    """How much of the data is cut."""
    if p.data is None:
        return None
    said: list[str] = []
    data.tell_cut(p.data, p.max_tokens, said.append)
    sides = [p.data.chosen, p.data.rejected] if isinstance(p.data, Pairs) else [p.data]
    longest = max(int(b.action.sum(-1).max()) for b in sides)
    if not said:
        return Finding(
            "length of the data", "pass", f"{longest} tokens at most", f"nothing is cut at max_tokens={p.max_tokens}"
        )
    status: Status = "warn" if said[0].startswith("warning") else "pass"
    return Finding(
        "length of the data",
        status,
        said[0].removeprefix("warning: ").partition(":")[0],
        "raise max_tokens to keep them whole",
    )


def preferences(p: Patient) -> Finding | None:
    """Whether the preferred response is mostly the longer one, and how many pairs say nothing."""
    if not isinstance(p.data, Pairs):
        return None
    one, other = (b.action.sum(-1) for b in (p.data.chosen, p.data.rejected))
    differ = one != other
    equal = int(data.alike(p.data).sum())
    longer = float((one > other)[differ].float().mean()) if bool(differ.any()) else 0.5
    share, way = max((longer, "longer"), (1 - longer, "shorter"))
    figure = f"{share:.0%} of winners are {way}" if bool(differ.any()) else "no pair differs in length"
    figure += f", {equal} of {len(p.data)} pairs are alike"
    if equal == len(p.data):
        says = f"up to {p.max_tokens} tokens no pair prefers anything: were both sides read from one column, or cut too soon?"
        return Finding("preferences", "fail", figure, says)
    if equal > EQUAL * len(p.data):
        says = (
            f"pairs with two sides that are equal up to {p.max_tokens} tokens teach nothing: how did they come about?"
        )
        return Finding("preferences", "warn", figure, says)
    if share <= LONGER:
        return Finding("preferences", "pass", figure, "length alone would not get far")
    says = "a reward that only counts tokens would be right that often: watch lengths, and judge with reward-eval"
    return Finding("preferences", "warn", figure, says)


# The reward ------------------------------------------------------------------------------------------------------------


def verdicts(p: Patient) -> Finding | None:
    """How many responses the reward could not judge."""
    if p.fault:
        return Finding("verdicts", "fail", "the reward failed", p.fault)
    if p.score is None:
        return None
    missing = int((~p.score.verdict).sum())
    figure = f"{missing} of {len(p.score.verdict)} without"
    if not missing:
        return Finding("verdicts", "pass", figure, "every response got a finite score")
    why = next(iter(p.score.reasons.values()), "the reward gave no finite number")
    status: Status = "fail" if missing == len(p.score.verdict) else "warn"
    return Finding("verdicts", status, figure, f"such rows leave the loss and are counted; the first: {why}")


def spread(p: Patient) -> Finding | None:
    """Whether responses to one prompt differ in score: without that no method that compares them learns."""
    if p.score is None or not bool(p.score.verdict.any()):
        return None
    rows, value = p.score.verdict, p.score.value
    groups = [value[(p.sampled.group == g) & rows] for g in p.sampled.group.unique()]
    groups = [g for g in groups if len(g) > 1]
    if len(groups) < 2:
        says = "it takes two prompts or more with two judged responses or more each: ask for more prompts and samples"
        return Finding("spread of the score", "warn", f"not measured, on {len(groups)} prompts", says)
    alike = sum(bool(g.max() == g.min()) for g in groups)
    figure = f"mean {float(value[rows].mean()):.3g}, alike in {alike} of {len(groups)} prompts"
    if bool(value[rows].max() == value[rows].min()):
        says = (
            f"all {int(rows.sum())} responses score the same: there is nothing to learn; take other prompts, a better start "
            "or a finer reward"
        )
        return Finding("spread of the score", "fail", figure, says)
    if alike > ALIKE * len(groups):
        says = (
            "most groups have nothing to compare: sample more, take prompts that are neither too easy nor too hard, or "
            "dynamic_sampling"
        )
        return Finding("spread of the score", "warn", figure, says)
    return Finding("spread of the score", "pass", figure, "responses to one prompt differ in score")


def length_bias(p: Patient) -> Finding | None:
    """Whether the score goes with the length of the response."""
    if p.score is None:
        return None
    rows = p.score.verdict
    value, length = p.score.value[rows].double().tolist(), p.sampled.action.sum(-1)[rows].tolist()
    try:
        rho = stats.spearman(value, length, cluster=p.sampled.group[rows].tolist())
    except ValueError:  # one of them does not vary, or there is too little to resample
        return None
    figure = f"rank correlation {rho.mean:+.2f} [{rho.low:+.2f}, {rho.high:+.2f}]"
    if abs(rho.mean) > LENGTH and rho.low * rho.high > 0:
        return Finding(
            "score and length",
            "warn",
            figure,
            "a policy finds such a rule first: watch the mean length, and judge with reward-eval",
        )
    return Finding("score and length", "pass", figure, "the score is not mostly a matter of length")


def row_by_row(p: Patient) -> Finding | None:
    """The reward says of a row what it says of it alone, every time."""
    if p.reward is None or p.score is None or not bool(p.score.verdict.any()):
        return None
    b = p.sampled.select(p.score.verdict.nonzero()[:FEW, 0])
    tolerance = 1e-4 if p.compute in ("float32", "float64") else 0.2
    begun = time.monotonic()
    try:
        contracts.check_reward(p.reward, b, tolerance)
    except contracts.ContractBroken as fault:
        return Finding("score of a row", "fail", "depends on more", str(fault))
    except Exception as fault:  # it judged these rows among others
        return Finding("score of a row", "fail", "the reward failed", f"asked again: {type(fault).__name__}: {fault}")
    calls = len(b) * 4
    return Finding(
        "score of a row",
        "pass",
        f"{1000 * (time.monotonic() - begun) / calls:.1f} ms a response",
        "the same asked twice, in another order and alone",
    )


CHECKS: tuple[Callable[[Patient], Finding | Iterator[Finding] | None], ...] = (
    end_of_turn,
    ending_learned,
    template_used,
    round_trip,
    path_taken,
    sampler_and_learner,
    start_is_reference,
    neighbours,
    micro_batches,
    horizon,
    cut_data,
    preferences,
    verdicts,
    spread,
    length_bias,
    row_by_row,
)


def look(p: Patient, advance: Callable[[], None] = lambda: None) -> list[Finding]:
    """All checks that apply, in order."""
    found: list[Finding] = []
    for check in CHECKS:
        said = check(p)
        found += [] if said is None else [said] if isinstance(said, Finding) else list(said)
        advance()
    return found
