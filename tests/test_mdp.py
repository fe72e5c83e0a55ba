"""The token MDP: stepping is concatenation, states are reachable by reset, ended is not truncated."""

from __future__ import annotations

import random
from collections.abc import MutableMapping
from dataclasses import FrozenInstanceError

import pytest

from tokenmdp import mdp as settings
from tokenmdp.mdp import SETTINGS, OutOfSetting, State, TokenMDP, settings_table, touch, within

EOS = 2


def mdp(horizon: int = 4) -> TokenMDP:
    return TokenMDP(horizon=horizon, eos_ids=(EOS,), vocabulary=5, start=(1, 3))


def test_ten_thousand_random_steps_equal_concatenation() -> None:
    draw = random.Random(0)
    steps = 0
    while steps < 10_000:
        horizon = draw.randint(1, 20)
        world = TokenMDP(horizon, eos_ids=(0, 7), vocabulary=50)
        prefix = [draw.randrange(50) for _ in range(draw.randint(1, 5))]
        state, actions = world.reset(prefix), []
        assert state.tokens == tuple(prefix)
        assert not state.done
        while not state.done:
            actions.append(draw.randrange(50))
            state = world.step(state, actions[-1])
            steps += 1
            assert state.tokens == tuple(prefix + actions)  # T(s, a) = concat(s, a)
            assert state.response == tuple(actions)
            assert state.ended == (actions[-1] in (0, 7))
            assert state.truncated == (not state.ended and len(actions) == horizon)
            assert state == world.reset(prefix + actions, start=len(prefix))  # any state can be reset to


def test_ended_states_are_absorbing_and_truncated_ones_are_not_ended() -> None:
    world = mdp()
    ended = world.step(world.reset(), EOS)
    assert ended == State((1, 3, EOS), start=2, ended=True, truncated=False)
    with pytest.raises(ValueError, match=r"ended state.*absorbing"):
        world.step(ended, 1)
    state = world.reset()
    for _ in range(4):
        state = world.step(state, 4)
    assert state.truncated
    assert not state.ended
    assert state.done
    with pytest.raises(ValueError, match=r"truncated state.*horizon is 4"):
        world.step(state, 1)
    last = world.step(world.reset((1, 3, 4, 4, 4), start=2), EOS)  # EOS as the last token the horizon allows
    assert last.ended
    assert not last.truncated


def test_reset_to_any_prefix() -> None:
    world = mdp()
    assert world.reset().tokens == (1, 3)
    # a prompt may hold, and end with, an end-of-sequence token: nothing of the response has happened yet
    assert not world.reset((EOS, 1, EOS)).done
    assert world.reset((1, 3, 4, EOS), start=2).ended
    assert world.reset((1, 4, 4, 4, 4), start=1).truncated
    for wrong, start, message in [
        ((), None, "at least one token"),
        ((1,), 2, "no more than it has"),
        ((1, 4), 0, "at least one token"),
        ((1, EOS, 4), 1, "token 0 of the response is 2"),
        ((1, 4, 4, 4, 4, 4), 1, "a response of 5 tokens, but the horizon is 4"),
        ((1, 9), None, "token 9 is outside the vocabulary of 5"),
    ]:
        with pytest.raises(ValueError, match=message):
            world.reset(wrong, start)
    with pytest.raises(ValueError, match="at least one token"):
        TokenMDP(4, (), 5).reset()


def test_forks_are_independent() -> None:
    world = mdp()
    state = world.step(world.reset(), 4)
    copies = world.fork(state, 3)
    assert copies == [state] * 3
    futures = [world.step(s, a) for s, a in zip(copies, (0, 1, EOS), strict=True)]
    assert [f.response for f in futures] == [(4, 0), (4, 1), (4, EOS)]
    assert state.response == (4,)  # no step changed it
    with pytest.raises(FrozenInstanceError):
        copies[0].__setattr__("ended", True)
    with pytest.raises(ValueError, match="k=0"):
        world.fork(state, 0)


def test_what_cannot_be_an_mdp() -> None:
    for arguments, message in [
        ((0, (), 5), "horizon=0"),
        ((3, (), 0), "vocabulary=0"),
        ((3, (5,), 5), "token 5 is outside"),
    ]:
        with pytest.raises(ValueError, match=message):
            TokenMDP(*arguments)
    world = mdp()
    with pytest.raises(ValueError, match="token -1 is outside the vocabulary of 5: give 0 to 4"):
        world.step(world.reset(), -1)


def test_the_table_of_settings() -> None:
    assert settings_table() == (
        "| setting | dynamics | reward | learned reward | data |\n"
        "|---|---|---|---|---|\n"
        "| `rl` | yes | yes | – | – |\n"
        "| `offline_rl` | – | logged | maybe | logged |\n"
        "| `offline_imitation` | – | – | – | demonstrations |\n"
        "| `imitation` | yes | – | – | demonstrations |\n"
        "| `inverse_rl` | yes | – | yes | demonstrations |\n"
        "| `offline_inverse_rl` | – | – | yes | logged |\n"
        "| `learning_from_demonstrations` | yes | yes | – | demonstrations |\n"
        "| `preference_rl` | yes | – | yes | comparisons |\n"
    )
    assert SETTINGS["imitation"].dynamics
    assert SETTINGS["imitation"].reward == "no"
    assert not isinstance(SETTINGS, MutableMapping)  # nobody edits the table in passing


# What each setting lets a solver touch, worked out by hand from the table's row.
PERMITTED = {
    "rl": {"dynamics", "reward", "learned_reward"},  # a learned reward is a reward like any other
    "offline_rl": {"learned_reward"},  # the reward was logged: it answers no more questions
    "offline_imitation": set(),
    "imitation": {"dynamics", "expert"},
    "inverse_rl": {"dynamics", "learned_reward", "expert"},
    "offline_inverse_rl": {"learned_reward"},
    "learning_from_demonstrations": {"dynamics", "reward", "learned_reward", "expert"},
    "preference_rl": {"dynamics", "learned_reward"},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_touching_more_than_the_row_has_raises(name: str) -> None:
    for what in ("dynamics", "reward", "learned_reward", "expert"):
        with within(name):
            if what in PERMITTED[name]:
                touch(what)
            else:
                with pytest.raises(OutOfSetting, match=f"is not in the setting {name}"):
                    touch(what)
        touch(what)  # outside any setting everything may be touched


def test_the_refusal_names_the_settings_that_have_it() -> None:
    with within("offline_imitation"), pytest.raises(OutOfSetting, match=r"true reward .*\(rl, learning_from_demon"):
        touch("reward")


def test_the_innermost_setting_counts_and_none_outlives_its_block() -> None:
    with within("rl"):
        with pytest.raises(OutOfSetting), within("imitation"):
            touch("reward")
        assert settings.running() == "rl"
        touch("reward")
    assert settings.running() is None
    with pytest.raises(ValueError, match=r"setting is 'supervised'; it must be one of rl, offline_rl"):
        within("supervised").__enter__()


def test_the_token_mdp_itself_cannot_be_moved_where_there_are_no_dynamics() -> None:
    world = mdp()
    state = world.reset()
    with within("offline_rl"):
        for act in (world.reset, lambda: world.step(state, 4), lambda: world.fork(state, 2)):
            with pytest.raises(OutOfSetting, match="acting"):
                act()
    assert world.step(state, 4).response == (4,)
