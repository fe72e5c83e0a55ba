"""Another library trains on our token MDP: stable-baselines3's PPO, as it comes, through `tokenmdp.environment`.

    python bench/environment.py --json docs/results/environment.json

The prompts ask for two letters of six, `ab>`; the score is the share of the two that the response has in their places, and
an action is one of 99 characters. Twelve of the 36 prompts are never learned on. PPO sees states only: an observation is the
tokens so far, and its two small networks read each position's token as a one-hot vector (what it does with any such space).
Nothing of its own is changed but the settings below.

Judged on the held-out prompts, 32 sampled responses each, before and after; intervals resample prompts. The best constant
is the one response that earns most when it is given to every held-out prompt, in hindsight.

Stated before the run, at every seed:
    learns      the mean score after training has a lower end above that of the best constant
    gains       the gain over the untrained start, paired by prompt, has a lower end above 0
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

import common
from tokenmdp import stats, tasks
from tokenmdp.environment import TokenEnv
from tokenmdp.models import catalog
from tokenmdp.rewards.function import FunctionReward

LETTERS, LENGTH, HELD_OUT, RESPONSES = 6, 2, 12, 32
STEPS, QUICK_STEPS = 60_000, 1024
SETTINGS = {
    "n_steps": 256,
    "batch_size": 256,
    "n_epochs": 10,
    "learning_rate": 1e-3,
    "gamma": 1.0,
    "gae_lambda": 1.0,
    "ent_coef": 0.01,
}
ENVIRONMENTS = 8
THRESHOLDS = {
    "learns": "lower end of the score on held-out prompts above the best constant's, at every seed",
    "gains": "lower end of the gain over the untrained start above 0, at every seed",
}


def share(completions: list[str], answer: list[str]) -> list[float]:
    """The share of the letters asked for that stand in their places."""
    return [
        float(np.mean([c[i : i + 1] == a[i] for i in range(len(a))])) for c, a in zip(completions, answer, strict=True)
    ]


def judged(model: Any, env: TokenEnv) -> NDArray[np.float64]:
    """[prompts] the mean score of sampled responses."""
    found = np.zeros((len(env.prompts), RESPONSES))
    for i, j in itertools.product(range(len(env.prompts)), range(RESPONSES)):
        seen, _ = env.reset(options={"prompt": i})
        done = False
        while not done:
            action, _ = model.predict(seen, deterministic=False)
            seen, earned, done, _, _ = env.step(action)
        found[i, j] = earned
    return found.mean(1)


def constant(answers: list[str]) -> float:
    """What the one response earns that suits these answers best: in each place the letter that is there most often."""
    said = "".join(max(letters, key=letters.count) for letters in zip(*answers, strict=True))
    return float(np.mean(share([said] * len(answers), answers)))


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    out = common.parser(__doc__)
    out.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = out.parse_args(argv)
    try:
        from stable_baselines3 import PPO
        from stable_baselines3.common.env_util import make_vec_env
    except ImportError as error:
        out.error(f"the peer cannot be imported ({error}): pip install -c constraints.txt '.[bench]'")
    torch.set_num_threads(1)  # networks of this size have nothing for a second one
    steps = QUICK_STEPS if args.quick else STEPS
    policy = catalog.load("tiny").freeze()
    task = tasks.load("copying", policy, length=LENGTH, letters=LETTERS, held_out=HELD_OUT)
    reward = FunctionReward(share, "share of letters")

    def env(held_out: bool = False) -> TokenEnv:
        return TokenEnv(policy, task, LENGTH, reward, held_out)

    best = constant([p.columns["answer"] for p in task.held_out])
    results: dict[str, Any] = {
        "command": common.command(),
        **common.machine(),
        "peer": f"stable-baselines3 {version('stable-baselines3')}, gymnasium {version('gymnasium')}",
        "steps": steps,
        "settings": {**SETTINGS, "environments": ENVIRONMENTS},
        "thresholds": THRESHOLDS,
        "best_constant": round(best, 4),
        "seeds": {},
    }
    for seed in args.seeds:
        world = make_vec_env(env, ENVIRONMENTS, seed=seed)
        model = PPO("MlpPolicy", world, seed=seed, device="cpu", **SETTINGS)
        before = judged(model, env(held_out=True))
        model.learn(steps, progress_bar=sys.stderr.isatty())
        after = judged(model, env(held_out=True))
        results["seeds"][str(seed)] = {
            "start": round(float(before.mean()), 4),
            "score": common.rounded(stats.bootstrap_mean(after)),
            "gain": common.rounded(stats.bootstrap_mean(after - before)),
        }
        found = results["seeds"].values()
        results["passed"] = {
            "learns": all(s["score"]["low"] > best for s in found),
            "gains": all(s["gain"]["low"] > 0 for s in found),
        }
        common.write(args.json, results)
    show(results)
    return results


def show(results: dict[str, Any]) -> None:
    """Print a line a seed, and the verdicts."""
    table = Table(title=f"{results['peer']}: PPO on the token MDP, {results['steps']:,} steps", title_justify="left")
    for name in ("seed", "start", "score on held-out prompts [95 %]", "gain"):
        table.add_column(name, justify="right")
    for seed, s in results["seeds"].items():
        score, gain = (f"{x['mean']:.3f} [{x['low']:.3f}, {x['high']:.3f}]" for x in (s["score"], s["gain"]))
        table.add_row(seed, f"{s['start']:.3f}", score, gain)
    console = Console(width=None if sys.stdout.isatty() else 110)
    console.print(table)
    console.print(f"best constant response: {results['best_constant']:.3f}", highlight=False)
    for name, passed in results["passed"].items():
        console.print(f"{'passed' if passed else 'FAILED'}: {name}, {results['thresholds'][name]}", highlight=False)


if __name__ == "__main__":
    main()
