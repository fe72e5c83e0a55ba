"""Proxies find what is planted, choosers use it, and abstain where there is nothing."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from tokenmdp import mdp
from tokenmdp.models import catalog
from tokenmdp.models.sampling import Sampling
from tokenmdp.prompting import choose, estimate, judged, proxy, shown, stacked
from tokenmdp.prompting import log as logs
from tokenmdp.prompting.log import Builder, Log

ANIMALS, TOOLS = ("cat", "dog", "horse", "cow"), ("hammer", "saw", "drill", "wrench")
PROMPTS = ("Think of nature.", "Think of work.")


def log_of(strength: float, count: int = 240, seed: int = 0) -> Log:
    """Queries about animals go well with the first prompt and those about tools with the second, by `strength`."""
    rng = np.random.default_rng(seed)
    queries, rewards = [], []
    for i in range(count):
        animal = i % 2 == 0
        word = (ANIMALS if animal else TOOLS)[rng.integers(4)]
        queries.append(f"Tell me about the {word} number {i}")
        fits = np.array([animal, not animal])
        rewards.append(rng.random(2) < 0.5 + strength * (fits - 0.5) + np.array([0.05, -0.05]))
    every = np.repeat(np.arange(count), 2)
    names = tuple(queries)
    reward = np.concatenate(rewards).astype(float)
    return Log(
        names, tuple(map(str, range(count))), PROMPTS, ("n", "w"), every, np.tile([0, 1], count), reward, every * 0
    )


FEW = ["Tell me about the cow number 1000", "Tell me about the saw number 1001"]


@pytest.mark.parametrize("name", ["neighbours", "logistic", "boosted", "two-tower", "factorised"])
def test_a_proxy_learns_which_prompt_suits_which_query(name: str) -> None:
    make = stacked.named(name)
    log = log_of(0.8)
    value = make().fit(log).predict(FEW, PROMPTS)
    assert value.shape == (2, 2)
    assert ((value > 0) & (value < 1)).all()
    assert choose.best(value).tolist() == [0, 1]
    held = log_of(0.8, 60, seed=1)
    found = judged.prediction(held, make().fit(log).predict(held.queries, held.prompts))
    assert found["auc_within_prompt"] > 0.7


def test_a_constant_knows_prompts_and_no_queries() -> None:
    log = log_of(0.8)
    value = proxy.Constant().fit(log).predict(log.queries, [*PROMPTS, "never seen"])
    assert len(np.unique(value, axis=0)) == 1
    assert value[0, 2] == pytest.approx(log.reward.mean())
    assert judged.prediction(log, value[:, :2])["auc_within_prompt"] == 0.5


def test_the_logistic_proxy_is_scikit_learns_on_trials_written_out() -> None:
    """Its slow twin: every trial a row of query, prompt and their products, a fractional reward as two weighted rows."""
    log = log_of(0.6, 80)
    log = replace(log, reward=np.where(np.arange(len(log)) % 5 == 0, 0.3, log.reward))
    found = proxy.Logistic().fit(log)
    x = found.trials(log)
    width = found.query_side.width
    every = np.concatenate([x, (x[:, None, -2:].transpose(0, 2, 1) * x[:, None, :width]).reshape(len(x), -1)], axis=1)
    rows, labels, weight = proxy.as_classes(every, log.reward)
    twin = LogisticRegression(C=1 / 100, max_iter=5000, tol=1e-8).fit(
        rows.astype(np.float64), labels, sample_weight=weight
    )
    said = found.predict(log.queries, log.prompts)[log.query, log.prompt]
    np.testing.assert_allclose(said, twin.predict_proba(every.astype(np.float64))[:, 1], atol=1e-4)


def test_calibration_shrinks_what_is_too_sure() -> None:
    """Noise alone: trees that fit it are pulled back to the base rate."""
    log = log_of(0.0)
    held = log_of(0.0, 200, seed=2)

    def make() -> proxy.Boosted:
        return proxy.Boosted(trees=100, smallest=3)

    raw = make().fit(log).predict(held.queries, held.prompts)
    mended = stacked.Stacked([make]).fit(log).predict(held.queries, held.prompts)
    assert judged.prediction(held, mended)["ece"] < judged.prediction(held, raw)["ece"]


class Known:
    """A proxy that knows how hard a query is, and of the prompts what `says` makes of it."""

    def __init__(self, says: float) -> None:
        self.says = says

    def fit(self, log: Log) -> Known:
        return self

    def predict(self, queries: Sequence[str], prompts: Sequence[str]) -> np.ndarray:
        number = np.asarray([float(q.split()[-1]) for q in queries])
        hard, suits = np.sin(number) * 2, np.cos(number)
        which = np.asarray([PROMPTS.index(p) - 0.5 if p in PROMPTS else 0.0 for p in prompts])
        return 1 / (1 + np.exp(-(hard[:, None] + self.says * suits[:, None] * which)))


def logit_log(count: int, b: tuple[float, float], c: float, d: float) -> Log:
    """Rewards that are the probabilities of a stack with these weights over `Known(2)` themselves."""
    queries = [f"query {i}" for i in range(count)]
    every, which = np.repeat(np.arange(count), 2), np.tile([0, 1], count)
    logit = np.log(1 / (1 / Known(2.0).predict(queries, PROMPTS) - 1))
    mean = logit.mean(1, keepdims=True)
    reward = 1 / (1 + np.exp(-(np.asarray(b) + c * mean + d * (logit - mean))))
    names = tuple(queries)
    return Log(names, names, PROMPTS, ("n", "w"), every, which, reward.reshape(-1), every * 0)


def test_a_stack_finds_the_weights_of_what_all_queries_share_and_of_what_suits_them() -> None:
    log = logit_log(2000, (0.3, -0.2), c=0.8, d=0.4)
    found = stacked.Stacked([lambda: Known(2.0)]).fit(log)
    assert found.intercept == pytest.approx([0.3, -0.2], abs=0.02)
    assert (found.common[0], found.own[0]) == (pytest.approx(0.8, abs=0.02), pytest.approx(0.4, abs=0.02))
    said = found.predict(log.queries[:9], [*PROMPTS, "never seen"])
    np.testing.assert_allclose(said[:, :2].reshape(-1), log.reward[:18], atol=5e-3)
    between = np.sort(said[:, :2], axis=1)
    assert ((between[:, 0] <= said[:, 2]) & (said[:, 2] <= between[:, 1])).any(), (
        "of no prompt's own, but of the query's"
    )


def test_what_a_member_says_of_prompts_is_not_heard_where_it_is_the_wrong_way_round() -> None:
    found = stacked.Stacked([lambda: Known(-2.0)]).fit(logit_log(400, (0.3, -0.2), c=0.8, d=0.4))
    assert found.own[0] == 0
    assert (choose.best(found.predict([f"query {i}" for i in range(50)], PROMPTS)) == 0).all(), "the best constant"


def test_the_held_out_predictions_of_a_stack_did_not_see_their_rewards() -> None:
    """Turning one fold's rewards round changes nothing that is said of it."""
    log = log_of(0.8, 120)
    first = stacked.Stacked([lambda: proxy.Logistic()]).fit(log)
    reward = np.where(first.fold[log.query] == 2, 1 - log.reward, log.reward)
    other = stacked.Stacked([lambda: proxy.Logistic()]).fit(replace(log, reward=reward))
    mine = first.fold == 2
    # Its members never saw the fold; the weights were learned on the other folds' predictions, by members that did.
    np.testing.assert_allclose(other.held[mine], first.held[mine], atol=0.25)
    assert (choose.best(other.held[mine]) == choose.best(first.held[mine])).mean() > 0.9
    assert not np.allclose(other.held[~mine], first.held[~mine])


@pytest.mark.parametrize(("strength", "abstains"), [(0.8, False), (0.0, True)])
def test_a_chooser_abstains_where_there_is_nothing_to_gain(strength: float, abstains: bool) -> None:
    chooser = choose.Chooser(stacked.named("logistic")).fit(log_of(strength))
    assert chooser.abstains is abstains
    assert chooser.gain is not None
    picks = chooser.choose(FEW)
    assert picks.tolist() == ([chooser.constant] * 2 if abstains else [0, 1])
    assert chooser.several(FEW, 2).shape == (2, 2)


def sparse(log: Log, seed: int = 0, first: float = 0.5) -> Log:
    """One trial a query, of the first prompt with a chance of `first`, which the log says."""
    rng = np.random.default_rng(seed)
    which = (rng.random(len(log.queries)) > first).astype(np.int64)
    at = np.arange(len(log.queries)) * 2 + which
    return replace(log.select(at), propensity=np.where(which == 0, first, 1 - first))


def test_of_a_log_with_one_prompt_a_query_the_gain_is_estimated_by_its_propensities() -> None:
    log = sparse(log_of(0.8, 1200))
    chooser = choose.Chooser(stacked.named("logistic")).fit(log)
    assert chooser.gain is not None
    # The right prompt earns .95 and .85, the first alone .95 and .15.
    assert 0.25 < chooser.gain.low < 0.35 < chooser.gain.high < 0.45
    assert not chooser.abstains
    value = np.tile([0.5, 0.5], (len(log.queries), 1))
    picks = np.arange(len(log.queries)) % 2
    found = judged.choices(log, {"known": picks}, picks * 0, value=value)
    assert "oracle" not in found
    assert found["known"]["over_constant"]["mean"] == pytest.approx(0.35, abs=0.06)
    # A choice is the prompt that was tried on half of the queries: weights of 2 there and of 0 elsewhere.
    tried = int((picks[log.query] == log.prompt).sum())
    assert found["known"]["overlap"]["effective"] == pytest.approx(tried)
    assert found["known"]["overlap"]["largest"] == pytest.approx(1 / tried)
    assert judged.in_words(found, "known").startswith("Choosing a prompt per query pays here")


def test_an_estimate_that_few_trials_carry_is_not_told() -> None:
    """The second prompt was tried with a chance of 2 %: some twenty of a thousand trials speak of it."""
    log = sparse(log_of(0.8, 1000), first=0.98)
    value, second = np.tile([0.5, 0.5], (len(log.queries), 1)), np.ones(len(log.queries), dtype=np.int64)
    found = judged.choices(log, {"second": second}, second * 0, value=value)
    assert found["second"]["overlap"]["effective"] < 30
    said = judged.in_words(found, "second")
    assert said.startswith("Nothing can be told: weighted to this choice the log's 1000 trials are worth")
    assert "questions, and an estimate takes 30 or more" in said


@pytest.mark.parametrize(
    ("propensity", "says"),
    [
        (lambda log: log.propensity * 2, "where it should be 1: in part it asks for prompts"),
        (lambda log: log.propensity / 2, "where it should be 1: the propensities are smaller"),
        (lambda log: log.propensity, "Choosing a prompt per query pays here"),
    ],
)
def test_propensities_that_do_not_fit_the_log_tell_nothing(propensity: Callable[[Log], np.ndarray], says: str) -> None:
    log = sparse(log_of(0.8, 1200))
    value, picks = np.tile([0.5, 0.5], (len(log.queries), 1)), np.arange(len(log.queries)) % 2
    found = judged.choices(replace(log, propensity=propensity(log)), {"known": picks}, picks * 0, value=value)
    assert says in judged.in_words(found, "known")


def test_a_choice_half_of_which_was_never_tried_is_not_told() -> None:
    """The second prompt was tried on half of the queries only: of a choice of it everywhere half is the proxy's word."""
    log = log_of(0.8, 1200)
    at = np.arange(len(log.queries))
    some = np.where(at < len(at) // 2, sparse(log).prompt, 0)  # both prompts by turns, then the first alone
    one = replace(log.select(at * 2 + some), propensity=np.where(at < len(at) // 2, 0.5, 1.0))
    second = np.ones(len(log.queries), dtype=np.int64)
    value = np.tile([0.5, 0.5], (len(log.queries), 1))
    found = judged.choices(one, {"second": second}, second * 0, value=value)
    assert found["second"]["overlap"]["mean"] == pytest.approx(0.5, abs=0.06)
    assert found["second"]["overlap"]["effective"] > 30
    assert "weighted to this choice the log's trials have a mean weight" in judged.in_words(found, "second")
    turned = judged.choices(one, {"first": second * 0}, second, value=value)
    assert "weighted to the best constant prompt the log's trials have a mean" in judged.in_words(turned, "first")


def test_a_chooser_does_not_believe_a_log_whose_propensities_are_not_its_own() -> None:
    log = sparse(log_of(0.8, 1200))
    chooser = choose.Chooser(stacked.named("logistic")).fit(replace(log, propensity=log.propensity / 5))
    assert chooser.gain is None
    assert chooser.abstains


def test_repeats_of_one_draw_are_no_trials_more() -> None:
    """100 questions, one prompt of three drawn for each and asked ten times: worth as many as are in accord, not ten times."""
    drawn = np.repeat([0, 1, 2], [40, 30, 30]).repeat(10)
    question = np.arange(100).repeat(10)
    found = estimate.overlap(3.0 * (drawn == 0), question)
    assert found.effective == pytest.approx(40)
    assert found.fault("it") == ""
    assert found.mean == pytest.approx(1.2)  # which trials taken as independent would call significant
    few = estimate.overlap(np.ones(30), np.arange(3).repeat(10))
    assert few.effective == pytest.approx(3)
    assert "worth 3 questions" in few.fault("it")


def test_without_propensities_such_a_log_tells_nothing() -> None:
    log = replace(sparse(log_of(0.8, 400)), propensity=None)
    chooser = choose.Chooser(stacked.named("logistic")).fit(log)
    assert chooser.gain is None
    assert chooser.abstains
    picks = np.arange(len(log.queries)) % 2
    found = judged.choices(log, {"known": picks}, picks * 0)
    assert judged.in_words(found, "known").startswith("Nothing can be told")
    assert [name for name, row in found.items() if "untold" in row] == ["random", "known"]


def test_a_prompt_tried_on_easy_queries_is_not_credited_with_them() -> None:
    """b is better by .1 on each query; a was tried on the easy half alone (within queries), or more often there (by μ)."""
    n = 200
    ease = np.where(np.arange(n) < n // 2, 0.8, 0.2)
    every = np.arange(n)
    names = tuple(map(str, range(n)))
    query = np.concatenate([every[: n // 2], every])
    prompt = np.concatenate([np.zeros(n // 2, dtype=np.int64), np.ones(n, dtype=np.int64)])
    reward = ease[query] + 0.1 * prompt
    log = Log(names, names, ("a", "b"), ("a", "b"), query, prompt, reward, query * 0)
    assert log.reward[prompt == 0].mean() > log.reward[prompt == 1].mean()
    found = choose.worths(log)
    assert (choose.best_constant(log), found[1] - found[0]) == (1, pytest.approx(0.1))
    rng = np.random.default_rng(0)
    often = np.where(ease > 0.5, 0.9, 0.1)  # of a
    which = (rng.random(n) > often).astype(np.int64)
    one = Log(
        names,
        names,
        ("a", "b"),
        ("a", "b"),
        every,
        which,
        ease + 0.1 * which,
        every * 0,
        np.where(which, 1 - often, often),
    )
    assert choose.best_constant(one) == 1
    assert choose.best_constant(replace(one, propensity=None)) == 0, "nothing compares them within queries"


def test_who_abstains_spends_several_calls_on_the_best_prompts_of_all() -> None:
    chooser = choose.Chooser(stacked.named("logistic")).fit(log_of(0.0))
    assert chooser.abstains
    order = np.argsort(-chooser.worth).tolist()
    assert chooser.several(FEW, 2).tolist() == [order, order]


def test_fractional_rewards_are_calibrated_as_they_are() -> None:
    at = np.arange(40)
    names = tuple(map(str, at))
    log = Log(names, names, ("a", "b"), ("a", "b"), at, at % 2, np.full(40, 0.4) + 0.02 * (at % 2), at * 0)
    value = np.tile([0.4, 0.42], (40, 1))
    assert judged.prediction(log, value)["ece"] == pytest.approx(0)


def test_cost_makes_a_prompt_unattractive() -> None:
    free = choose.Chooser(proxy.Constant, abstain=False).fit(log_of(0.0))
    dear = choose.Chooser(proxy.Constant, abstain=False, cost=[10.0, 0.0], price=1.0).fit(log_of(0.0))
    assert (free.constant, dear.constant) == (0, 1)
    with pytest.raises(ValueError, match="1 costs for 2 prompts"):
        choose.Chooser(cost=[1.0]).fit(log_of(0.0))
    with pytest.raises(ValueError, match="calls is 3"):
        free.several(FEW, 3)


class Peeks(proxy.Constant):
    """A proxy that asks the language model, which is what it is there to spare."""

    def predict(self, queries: Sequence[str], prompts: Sequence[str]) -> np.ndarray:
        policy = catalog.load("tiny")
        policy.sample([policy.prompt(queries[0])], 1, Sampling(2), torch.Generator())
        return super().predict(queries, prompts)


def test_whoever_asks_the_language_model_while_fitting_or_choosing_is_stopped() -> None:
    with pytest.raises(mdp.OutOfSetting, match="not in the setting offline_inverse_rl"):
        choose.Chooser(Peeks).fit(log_of(0.5))
    chooser = choose.Chooser(Peeks, abstain=False).fit(log_of(0.5))
    with pytest.raises(mdp.OutOfSetting):
        chooser.choose(FEW)
    assert Peeks().fit(log_of(0.5)).predict(FEW, PROMPTS).shape == (2, 2)  # outside it may


def test_choices_by_hand() -> None:
    """Two queries, rewards (1, 0) and (0, 1); constant takes a: ½. The picks (a, b) earn 1: +½ over it."""
    at = np.array([0, 0, 1, 1])
    log = Log(
        ("x", "y"), ("x", "y"), ("a", "b"), ("a", "b"), at, np.array([0, 1, 0, 1]), np.array([1.0, 0, 0, 1]), at * 0
    )
    found = judged.choices(log, {"pick": np.array([0, 1])}, np.array([0, 0]))
    means = {name: (row["reward"]["mean"], row["over_constant"]["mean"]) for name, row in found.items()}
    assert means == {"random": (0.5, 0.0), judged.CONSTANT: (0.5, 0.0), "pick": (1.0, 0.5), "oracle": (1.0, 0.5)}
    assert judged.in_words(found, "pick").startswith("No significant gain")


def test_repeats_of_a_question_are_not_trials_more_on_the_page() -> None:
    """Eight times the same answer to 20 questions: the rate is as sure as from one trial each, and no surer."""
    intervals = []
    for repeats in (1, 8):
        builder = Builder()
        for query, prompt, _ in itertools.product(range(20), range(2), range(repeats)):
            row = {"query": f"question {'abcdefghijklmnopqrst'[query]}", "prompt_id": "ab"[prompt]}
            builder.add({**row, "reward": float((query + prompt) % 2)}, "here")
        log = builder.build()
        intervals.append([row["rate"] for row in shown.by_prompt(log, np.zeros(20, dtype=np.int64))])
    for once, often in zip(*intervals, strict=True):
        assert often["mean"] == once["mean"] == 0.5
        assert often["high"] - often["low"] >= once["high"] - once["low"]


def test_votes() -> None:
    assert choose.vote(["4", "5", "5", None]) == "5"
    assert choose.vote(["4", "5"]) == "4"
    assert choose.vote([None]) is None


def test_auc_by_hand() -> None:
    """Scores 1, 2, 2, 3 with successes at the last two: of 4 pairs 3 are right and one is a tie."""
    assert judged.auc(np.array([1.0, 2, 2, 3]), np.array([False, False, True, True])) == pytest.approx(3.5 / 4)
    assert judged.auc(np.array([1.0]), np.array([True])) is None


def test_nothing_is_told_from_fewer_questions_than_an_interval_needs() -> None:
    builder = Builder()
    for i in range(12):
        for p in (0, 1):
            builder.add(
                {"query": f"question {i} {'ab'[i % 2]}", "prompt_id": "ab"[p], "reward": float(i % 2 == p)}, "row"
            )
    trials = builder.build()
    picks, constant = np.arange(12) % 2, np.zeros(12, dtype=np.int64)
    value, group = trials.matrix(), np.arange(12)
    told = choose.gained(trials, picks, constant, value, group)
    assert told is not None
    assert told.mean == pytest.approx(0.5)
    assert choose.gained(trials.of_queries(range(7)), picks, constant, value, group) is None


# -- asking first -------------------------------------------------------------------------------------------------------


def test_after_asking_all_by_hand(tmp_path: Path) -> None:
    """Three prompts on two questions: the surest answer, the one a critic likes best, and the one given twice."""
    said = [("q", "a", "It is 4.", 1.0, -1.0), ("q", "b", "5", 0.0, -0.1), ("q", "c", "4.0", 1.0, -2.0)]
    said += [("r", "a", "7", 0.0, -0.1), ("r", "b", "8", 1.0, -0.2), ("r", "c", "so 7", 0.0, -3.0)]
    # Nobody gave a number: no vote, and that is wrong, whatever the answers were worth.
    said += [("s", "a", "none", 1.0, -0.2), ("s", "b", "no idea", 0.0, -0.1), ("s", "c", "who knows", 0.0, -3.0)]
    said += [("t", "a", "7", 1.0, -0.1)]  # was not tried with all prompts, and does not count
    rows = [
        {"query_id": q, "query": f"question {q}", "prompt_id": p, "response": t, "reward": r, "confidence": c}
        for q, p, t, r, c in said
    ]
    rows.append({**rows[0], "repeat": 1, "reward": 0.0, "response": "9"})  # a second try does not count either
    file = tmp_path / "log.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    log = logs.read(file, answers=True)
    critic = np.array([0.2, 0.1, 0.3, 0.1, 0.9, 0.2, 0.1, 0.2, 0.3, 0.5, 0.5])
    found = judged.after_asking(log, np.zeros(4, dtype=np.int64), scores={"critic": critic})
    means = {name: row["reward"]["mean"] for name, row in found.items()}
    assert means == pytest.approx({"confidence": 0.0, "critic": 2 / 3, "vote": 1 / 3})
    assert found["vote"]["over_constant"]["mean"] == pytest.approx(-1 / 3)  # the constant a is right on q and s
    assert {(row["queries"], row["calls"]) for row in found.values()} == {(3, 3)}
    again = tmp_path / "again.jsonl"
    logs.write(log, again)
    assert np.array_equal(logs.read(again).confidence, log.confidence)
    assert logs.read(again, answers=True).answer is None  # without responses nobody knows what was said
    assert list(judged.after_asking(logs.read(again), np.zeros(4, dtype=np.int64))) == ["confidence"]


def test_after_asking_leaves_out_what_the_log_does_not_say(tmp_path: Path) -> None:
    """A question with a response missing is not voted on, one with a confidence missing not sorted by it; both are
    counted. Repeats may be numbered from 1.
    """
    said: list[tuple[str, str, str | None, float, float | None]] = []
    for query in "qrs":
        said += [(query, "a", "It is 4.", 1.0, -1.0), (query, "b", "5", 0.0, -0.1), (query, "c", "4.0", 1.0, -2.0)]
    said[1] = ("q", "b", None, 0.0, -0.1)
    said[3] = ("r", "a", "It is 4.", 1.0, None)
    rows = [
        {
            "query_id": q,
            "query": f"question {q}",
            "prompt_id": p,
            "response": t,
            "reward": r,
            "confidence": c,
            "repeat": 1,
        }
        for q, p, t, r, c in said
    ]
    rows += [{**rows[6], "repeat": 2, "reward": 0.0, "response": "9"}]  # a second try does not count
    file = tmp_path / "log.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    log = logs.read(file, answers=True)
    found = judged.after_asking(log, np.zeros(3, dtype=np.int64))
    assert {name: (row["queries"], row["left_out"]) for name, row in found.items()} == {
        "confidence": (2, 1),
        "vote": (2, 1),
    }
    assert found["vote"]["reward"]["mean"] == 1.0
    assert found["confidence"]["reward"]["mean"] == 0.0  # b was surest both times
