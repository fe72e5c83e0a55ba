"""Compounding error, measured: a student's mistakes along its own responses, against the length of the response.

    J(T) = E_{s_1..s_T ~ π} Σ_{t≤T} c_t          c_t = 1(a_t ≠ a*_t), or its expectation given the state
    ε    = E_{s ~ the teacher's responses} c     the student's error where imitation trains it
    J(T) ∝ T^b                                   b: the growth exponent

The teacher is another model with the same tokens, or, with no `--teacher`, the exact expert of a task. A counted mistake
is a token that differs from the teacher's most likely one. Its expectation, `distance`, is the total variation
½ Σ_a |π(a|s) − π_E(a|s)| at every state visited: for an exact expert 1 − π(a*|s), the chance of a mistake, and for a model
a distance that is 0 only where the two agree, whereas a teacher who samples misses its own favourite now and then.

Source: Ross et al. 2011, theorem 2.1 (J ≤ C + T² ε for behaviour cloning) and theorem 3.2 (J ≤ C + u T ε for DAgger; u,
what a wrong action costs an expert who takes over, is 1 where mistakes are counted against that expert); Foster et al.
2024 (cloning by log-loss can be free of T).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tokenmdp import growth, stats, tasks
from tokenmdp.experts import Expert, check_vocabularies
from tokenmdp.functional import imitation
from tokenmdp.lab.report import meter_page
from tokenmdp.models import catalog
from tokenmdp.models.parts import in_parts
from tokenmdp.models.policy import Policy
from tokenmdp.models.sampling import Sampling
from tokenmdp.run import Run
from tokenmdp.stats import Array
from tokenmdp.types import Batch, Prompt

KINDS = ("mistakes", "distance")


@dataclass(frozen=True)
class Config:
    student: str = "smollm2-135m-instruct"  # a name, a folder or a hub id: whose responses are watched
    teacher: str = ""  # the same; empty asks the exact expert of the task that `prompts` names
    prompts: str = "prompts.jsonl"  # a file or a hub id, or a task's name, of which the held-out prompts are taken
    most: int = 64  # prompts, at most
    samples: int = 8  # responses a prompt, of the student and of a teacher that samples
    max_new_tokens: int = 64  # the longest T
    lengths: int = 5  # how many T: the longest, its half, its quarter, ...
    temperature: float = 1.0  # of student and teacher
    chunk: int = 8  # prompts between checkpoints

    def __post_init__(self) -> None:
        if min(self.most, self.samples, self.chunk) < 1 or self.lengths < 2 or self.max_new_tokens < 2:
            raise ValueError(
                f"most={self.most}, samples={self.samples}, chunk={self.chunk}, lengths={self.lengths}, "
                f"max_new_tokens={self.max_new_tokens}: the first three are at least 1, the last two at least 2"
            )
        if not self.temperature > 0:
            raise ValueError(
                f"temperature={self.temperature}: it must be positive, for a policy has to have some chance"
            )


class Guide(Protocol):
    """Who knows better: what a student is measured against."""

    name: str

    def respond(self, prompts: Sequence[Prompt], n: int, sampling: Sampling, rng: torch.Generator) -> Batch:
        """The guide's own responses, as many to each prompt."""
        ...

    def favourite(self, part: Batch) -> Int[Tensor, "B L"]:
        """What the guide would most likely do in the state before each action; 0 elsewhere."""
        ...

    def distance(self, student: Policy, part: Batch, temperature: float) -> Float[Tensor, "B L"]:
        """½ Σ_a |π(a|s) − π_E(a|s)| in the state before each action; 0 elsewhere."""
        ...


class Model:
    """A teacher model.

    Raises:
        ValueError: its tokens are not the student's.
    """

    def __init__(self, teacher: Policy, student: Policy) -> None:
        check_vocabularies(student, teacher)
        self.policy, self.name = teacher, teacher.name

    def respond(self, prompts: Sequence[Prompt], n: int, sampling: Sampling, rng: torch.Generator) -> Batch:
        return self.policy.sample(prompts, n, sampling, rng)

    def favourite(self, part: Batch) -> Int[Tensor, "B L"]:
        return self.policy.best(part)

    def distance(self, student: Policy, part: Batch, temperature: float) -> Float[Tensor, "B L"]:
        return student.divergence(self.policy, part, imitation.total_variation, temperature)


class Exact:
    """An expert who answers with one token, in every state.

    Args:
        student: whose tokens they are.
    """

    def __init__(self, expert: Expert, student: Policy) -> None:
        self.expert, self.name, self.student = expert, expert.name, student

    def respond(self, prompts: Sequence[Prompt], n: int, sampling: Sampling, rng: torch.Generator) -> Batch:
        """One response a prompt, since the expert would give the same again; `n` and `rng` change nothing."""
        said: list[list[int]] = [[] for _ in prompts]
        ends = self.student.eos_ids
        ended = [False] * len(prompts)
        for _ in range(sampling.max_new_tokens):
            going = [i for i, over in enumerate(ended) if not over]
            if not going:
                break
            # It is asked in the state before the last token, whatever token stands there.
            asked = self._batch([prompts[i] for i in going], [[*said[i], ends[0]] for i in going], [False] * len(going))
            answers = self.favourite(asked)[torch.arange(len(going)), asked.length - 1].tolist()
            for i, token in zip(going, answers, strict=True):
                said[i].append(token)
                ended[i] = token in ends
        return self._batch(prompts, said, ended)

    def _batch(self, prompts: Sequence[Prompt], said: Sequence[Sequence[int]], ended: Sequence[bool]) -> Batch:
        texts = [""] * len(prompts)  # an expert is asked about tokens
        pad = self.student.eos_ids[0]
        return Batch.build(prompts, said, texts=texts, ended=ended, pad=pad).to(self.student.device)

    def favourite(self, part: Batch) -> Int[Tensor, "B L"]:
        """The expert's answers.

        Raises:
            ValueError: there is a state in which the expert has none.
        """
        advice = self.expert(part)
        silent = int((part.action & ~advice.known).sum())
        if silent:
            raise ValueError(
                f"{self.name} has no answer in {silent} of {int(part.action.sum())} states that were visited, so mistakes "
                "there cannot be counted: the meter needs a teacher who answers wherever the student gets to"
            )
        return advice.token

    def distance(self, student: Policy, part: Batch, temperature: float) -> Float[Tensor, "B L"]:
        right = student.evaluate(part, temperature=temperature, of=self.favourite(part))["logp"].exp()
        return torch.where(part.action, 1 - right, torch.zeros_like(right))


def costs(student: Policy, guide: Guide, batch: Batch, temperature: float) -> dict[str, Float[Tensor, "B L"]]:
    """`mistakes` and `distance` at every action position of a batch, whoever's response it is; zero elsewhere."""

    def measured(part: Batch) -> dict[str, Tensor]:
        distance = guide.distance(student, part, temperature)
        wrong = part.action & (part.tokens != guide.favourite(part))
        return {"mistakes": wrong.to(distance.dtype), "distance": distance}

    return in_parts(measured, batch)


@dataclass(frozen=True)
class Measured:
    """What was measured of one student: means over each prompt's responses, by step. A response that is over costs
    nothing more.

    Attributes:
        own: for each kind of cost [P, T], along the student's own responses.
        shown: the same along the teacher's responses; of `mistakes`, those are the teacher's own.
        going, shown_going: [P, T] the share of the responses that had not ended before step t.
    """

    own: Mapping[str, Array]
    shown: Mapping[str, Array]
    going: Array
    shown_going: Array

    def until(self, kind: str, lengths: Sequence[int]) -> Array:
        """[P, K] the cost of the first T steps, for each T."""
        return np.asarray(self.own[kind].cumsum(1)[:, np.asarray(lengths) - 1])

    def errors(self, kind: str = "distance") -> Array:
        """[P, 4] cost and steps along the student's own responses, then along the teacher's."""
        pairs = ((self.own[kind], self.going), (self.shown[kind], self.shown_going))
        return np.stack([x.sum(1) for pair in pairs for x in pair], axis=1)

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        arrays = {f"own/{k}": v for k, v in self.own.items()} | {f"shown/{k}": v for k, v in self.shown.items()}
        arrays |= {"going": self.going, "shown_going": self.shown_going}
        return {name: [[round(float(x), 7) for x in row] for row in value] for name, value in arrays.items()}

    @staticmethod
    def of(plain: Mapping[str, Any]) -> Measured:
        """From what `plain` gave."""
        arrays = {name: np.asarray(value, dtype=np.float64) for name, value in plain.items()}
        parts = [{k: arrays[f"{side}/{k}"] for k in KINDS} for side in ("own", "shown")]
        return Measured(parts[0], parts[1], arrays["going"], arrays["shown_going"])


class Tally:
    """What was measured so far, a list of rows an array."""

    def __init__(self) -> None:
        self.rows: dict[str, list[list[float]]] = {}

    def add(self, found: Measured) -> None:
        for name, rows in found.plain().items():
            self.rows.setdefault(name, []).extend(rows)

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def scalars(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def restore(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
        self.rows = {name: [list(row) for row in rows] for name, rows in scalars["rows"].items()}


def measure(cfg: Config, student: Policy, guide: Guide, prompts: Sequence[Prompt], run: Run) -> Measured:
    """Have student and guide answer the prompts, and compare the student with the guide in every state both got to.

    The student's first response to each prompt goes to samples.jsonl with its number of mistakes.
    """
    sampling = Sampling(cfg.max_new_tokens, cfg.temperature)
    tally = Tally()
    chunks = [list(prompts[i : i + cfg.chunk]) for i in range(0, len(prompts), cfg.chunk)]
    for step in run.steps(len(chunks), tally, title=f"mistakes of {student.name}"):
        mine = student.sample(chunks[step], cfg.samples, sampling, run.rng)
        theirs = guide.respond(chunks[step], cfg.samples, sampling, run.rng)
        found = [(b, costs(student, guide, b, cfg.temperature)) for b in (mine, theirs)]
        for row in range(0, len(mine), cfg.samples):
            run.sample(mine, row, student.name, mistakes=float(found[0][1]["mistakes"][row].sum()))
        (own, going), (shown, shown_going) = (
            _by_step(b, cost, len(chunks[step]), cfg.max_new_tokens) for b, cost in found
        )
        tally.add(Measured(own, shown, going, shown_going))
        run.log(
            step,
            {
                "mistakes": float(own["mistakes"].sum(1).mean()),
                "distance": float(own["distance"].sum(1).mean()),
                "error_shown": float(shown["distance"].sum() / shown_going.sum()),
                "num_tokens": float(mine.action.sum()),
            },
            headline=("mistakes", "error_shown"),
        )
    return Measured.of(tally.rows)


def _by_step(batch: Batch, cost: Mapping[str, Tensor], prompts: int, T: int) -> tuple[dict[str, Array], Array]:
    """[P, T] means over each prompt's rows of every cost, and the share of rows that took the step."""
    rows, at = batch.action.nonzero(as_tuple=True)
    step = batch.action.cumsum(1)[rows, at] - 1  # responses begin at different positions

    def laid(values: Tensor) -> Array:
        out = torch.zeros((len(batch), T), dtype=torch.float64, device=values.device)
        out[rows, step] = values[rows, at].double()
        return np.asarray(out.view(prompts, -1, T).mean(1).cpu().numpy())

    return {kind: laid(cost[kind]) for kind in KINDS}, laid(batch.action)


# ------------------------------------------------------------ what it says


def summary(found: Sequence[Measured], lengths: Sequence[int], shared_prompts: bool | None = None) -> dict[str, Any]:
    """Costs, exponents and errors of a student, or of the same kind of student at several seeds; each with its 95 %
    interval over prompts (and seeds), or alone where nothing varies.

    Args:
        lengths: the T.
        shared_prompts: whether row p is the same prompt at all seeds; to be said where there are several.

    Raises:
        TypeError: several seeds, and `shared_prompts` is not given.
    """

    def said(values: Array, function: Callable[[Array], Array]) -> dict[str, float | None]:
        return told(values, function, shared_prompts, least=0.0)  # costs, errors and their ratio are none below

    out: dict[str, Any] = {"lengths": list(lengths), "cost": {}, "exponent": {}}
    for kind in KINDS:
        until = np.stack([m.until(kind, lengths) for m in found])
        out["cost"][kind] = [said(until[:, :, [k]], lambda means: means[:, 0]) for k in range(len(lengths))]
        out["exponent"][kind] = _growth(lengths, until, shared_prompts)
    errors = np.stack([m.errors() for m in found])
    out["error"] = {
        "own_states": said(errors, lambda m: m[:, 0] / m[:, 1]),
        "shown_states": said(errors, lambda m: m[:, 2] / m[:, 3]),
        "ratio": said(errors, lambda m: m[:, 0] / m[:, 1] * m[:, 3] / np.where(m[:, 2] > 0, m[:, 2], np.nan)),
    }
    mistakes = np.stack([m.errors("mistakes") for m in found])
    out["teachers_own_mistakes_a_step"] = said(mistakes, lambda m: m[:, 2] / m[:, 3])
    out["still_going"] = [float(np.mean([m.going[:, T - 1].mean() for m in found])) for T in lengths]
    error = out["error"]["shown_states"]["mean"]
    worst = growth.worst_case(min(1.0, error), lengths)
    out["worst_case"] = {
        "cost": worst.tolist(),
        "exponent": float(growth.exponent(lengths, worst)[0]) if error > 0 else None,
        "bound_cloning": [T * T * error for T in lengths],
        "linear": [T * error for T in lengths],
    }
    out["by_step"] = {
        "own": np.mean([m.own["distance"].mean(0) for m in found], axis=0).tolist(),
        "shown": np.mean([m.shown["distance"].mean(0) for m in found], axis=0).tolist(),
    }
    return out


def told(
    values: Array,
    function: Callable[[Array], Array],
    shared_prompts: bool | None = None,
    least: float = -np.inf,
) -> dict[str, float | None]:
    """An interval as results files write it, none of it below `least`; the number alone where resampling has nothing to
    say of it.
    """
    try:
        found = stats.bootstrap_of_means(values, function, shared_prompts=shared_prompts)
        return stats.bounded(found, least, np.inf)._asdict()
    except ValueError:
        alone = float(function(values.mean(axis=(0, 1))[None])[0])
        return {"mean": alone if np.isfinite(alone) else None}


def _growth(lengths: Sequence[int], until: Array, shared_prompts: bool | None) -> dict[str, Any]:
    try:
        return growth.growth(lengths, until, shared_prompts=shared_prompts)._asdict()
    except ValueError as why:
        slope = float(growth.exponent(lengths, until.mean(axis=(0, 1)))[0])
        return {"mean": slope if np.isfinite(slope) else None, "why": str(why)}


TELLING = 1.2  # the worst case's own exponent, below which growth tells nothing
PROMISES = (
    "The theorems bound mistakes from above and predict nothing: T² ε for cloning is reached only where a mistake is never "
    "made good, and a cloned model may stay far below it; cloning by log-loss can have a bound free of T.",
    "DAgger's bound, linear in T, is for a learner whose expert answered on the learner's own states, and its ε is the error "
    "there; it says nothing of one trained on demonstrations alone.",
    "RLHF puts a learned reward in the expert's place: it is right about the learner's states only where the reward is.",
)


def words(figures: Mapping[str, Any], student: str, teacher: str, exact: bool) -> list[str]:
    """The figures as sentences: what was found first, what the theorems make of it last."""
    lengths = figures["lengths"]
    slope, cost, error = figures["exponent"]["distance"], figures["cost"]["distance"][-1], figures["error"]
    what = "expected mistakes" if exact else "distance to the teacher, summed over steps,"
    verdict = {
        1: "errors compound: the cost grows faster than the length",
        0: "no sign of compounding: the cost grows like the length, as far as can be told",
        -1: "errors do not compound: the cost grows more slowly than the length",
        None: "how the cost grows cannot be told from these responses",
    }[_side(slope)]
    worst = figures["worst_case"]
    if _side(slope) != 1 and worst["exponent"] is not None and worst["exponent"] < TELLING:
        verdict = (
            "nothing can be told of compounding: the error is so large that not even the worst case would grow faster"
        )
    out = [
        f"Along the responses of {student} {verdict} (exponent {_shown(slope)} from T = {lengths[0]} to {lengths[-1]}).",
        f"In {lengths[-1]} steps {what} come to {_shown(cost)}, judged by {teacher}.",
        f"A step costs {_shown(error['own_states'])} in the student's own states and {_shown(error['shown_states'])} in the "
        f"teacher's: a ratio of {_shown(error['ratio'])}.",
    ]
    if worst["exponent"] is not None:
        out.append(
            f"With that error in the teacher's states a mistake that is never made good would lead to {worst['cost'][-1]:.3g} "
            f"(exponent {worst['exponent']:.2f} at these lengths), one that costs once to {worst['linear'][-1]:.3g}; the bound "
            f"T² ε is {worst['bound_cloning'][-1]:.3g}."
        )
    if figures["still_going"][-1] < 0.9:
        out.append(
            f"Only {figures['still_going'][-1]:.0%} of the responses reach step {lengths[-1]}, and one that is over makes no "
            "more mistakes: part of what slows the growth is that."
        )
    return [*out, *PROMISES]


def _side(slope: Mapping[str, Any]) -> int | None:
    """Whether an exponent is above 1, below it, or neither; None where there is no interval."""
    if "low" not in slope:
        return None
    return int(slope["low"] > 1) - int(slope["high"] < 1)


def _shown(found: Mapping[str, Any]) -> str:
    if found["mean"] is None:
        return "unknown"
    ends = f" [{found['low']:.3g}, {found['high']:.3g}]" if "low" in found else ""
    return f"{found['mean']:.3g}{ends}"


def main(cfg: Config, run: Run) -> dict[str, Any]:
    """Load the models and the prompts, measure, and write meter.html with the pictures."""
    student = catalog.load(cfg.student).freeze()
    task = tasks.load(cfg.prompts, student)
    if cfg.teacher:
        guide: Guide = Model(catalog.load(cfg.teacher).freeze(), student)
    elif task.expert is not None:
        guide = Exact(task.expert, student)
    else:
        raise ValueError(f"{cfg.prompts} has no exact expert to ask: name a teacher model by --teacher")
    # A list of prompts and no more: there is nothing they would be held out of.
    bare = task.expert is None and task.reward is None and task.demonstrations is None
    prompts = (*task.train, *task.held_out) if bare else task.held_out or task.train
    order = torch.randperm(len(prompts), generator=run.rng)[: cfg.most].tolist()
    lengths = growth.halved(cfg.max_new_tokens, cfg.lengths)
    found = measure(cfg, student, guide, [prompts[i] for i in order], run)
    figures = summary([found], lengths)
    said = words(figures, student.name, guide.name, not cfg.teacher)
    for line in said:
        run.note(line)
    page = meter_page.write(run.folder, figures, said, f"{student.name} against {guide.name}")
    return {"verdict": said, "prompts": len(order), "samples": cfg.samples, "page": str(page), **figures}
