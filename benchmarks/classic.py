"""How long an agent of the foundations takes to solve its task, beside Stable-Baselines3 with the settings of RL Zoo.

All runs share one process and one torch thread, and take turns seed by seed. All are judged alike: training stops the
clock, and the policy plays fresh episodes in the real Gymnasium environment, until its mean return reaches the bar
(`snippets.foundations.loop.Judge`). CartPole-v1: at least 475 over 100 episodes with the policy that samples;
Pendulum-v1: at least -200 over 20 with the greedy one. A run that never gets there counts with all of its time.

    python -m benchmarks.classic PPO "SB3 PPO" --seeds 5
"""

import argparse
import importlib
import statistics
import time
from dataclasses import dataclass

import torch

from snippets.foundations import loop
from snippets.worlds.classic import CARTPOLE, PENDULUM, Task

# Stable-Baselines3's settings: RL Zoo, hyperparams/ppo.yml and sac.yml; lin_x falls from x to 0 over all steps.
ZOO = {
    "SB3 PPO": {
        "steps": 100_000,
        "envs": 8,
        "n_steps": 32,
        "batch_size": 256,
        "gae_lambda": 0.8,
        "gamma": 0.98,
        "n_epochs": 20,
        "ent_coef": 0.0,
        "learning_rate": lambda left: left * 0.001,
        "clip_range": lambda left: left * 0.2,
    },
    "SB3 SAC": {"steps": 20_000, "envs": 1, "learning_rate": 1e-3},
}


@dataclass(frozen=True)
class Contestant:
    """`every` is the number of environment steps between two looks of the judge."""

    task: Task
    module: str  # of snippets.foundations, or the name of Stable-Baselines3's class
    every: int


CONTESTANTS = {
    "PPO": Contestant(CARTPOLE, "ppo", 2048),
    "SB3 PPO": Contestant(CARTPOLE, "PPO", 2048),
    "TRPO": Contestant(CARTPOLE, "trpo", 2048),
    "A2C": Contestant(CARTPOLE, "actor_critic", 2048),
    "REINFORCE": Contestant(CARTPOLE, "policy_gradient", 2048),
    "DQN": Contestant(CARTPOLE, "dqn", 2048),
    "SAC": Contestant(PENDULUM, "sac", 160),
    "SB3 SAC": Contestant(PENDULUM, "SAC", 160),
    "TD3": Contestant(PENDULUM, "td3", 160),
    "DDPG": Contestant(PENDULUM, "ddpg", 160),
}


@dataclass(frozen=True)
class Result:
    seconds: float
    steps: int
    mean: float
    solved: bool


def run(name: str, seed: int, share: float = 1.0) -> Result:
    """One training run of a contestant, with a share of its budget of environment steps."""
    contestant = CONTESTANTS[name]
    if name in ZOO:
        return peer(name, contestant, seed, share)
    module = importlib.import_module(f"snippets.foundations.{contestant.module}")
    method = module.algorithm() if hasattr(module, "algorithm") else module.learner()
    on_policy = hasattr(module, "algorithm")
    settings = (method.settings if on_policy else method.Settings)(seed=seed)
    budget = "updates" if on_policy else "steps"
    setattr(settings, budget, max(int(share * getattr(settings, budget)), getattr(settings, "warmup", 0) + 1))
    if not on_policy:
        settings.check_every = contestant.every // settings.envs
        done = loop.train_off_policy(contestant.task, method, settings)
    else:
        a_rollout = settings.envs * (settings.horizon or contestant.task.limit)
        settings.check_every = max(contestant.every // a_rollout, 1)
        done = loop.train(contestant.task, method, settings)
    steps, seconds, mean = done.curve[-1]
    return Result(seconds, steps, mean, done.solved)


def peer(name: str, contestant: Contestant, seed: int, share: float) -> Result:
    """The same of Stable-Baselines3: the judge looks from a callback, and its time is taken off."""
    import stable_baselines3
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env

    options = dict(ZOO[name])
    budget, envs = options.pop("steps"), make_vec_env(contestant.task.name, n_envs=options.pop("envs"), seed=seed)
    model = getattr(stable_baselines3, contestant.module)("MlpPolicy", envs, seed=seed, device="cpu", **options)
    greedy = not contestant.task.discrete

    def act(obs):
        return torch.as_tensor(model.predict(obs.numpy(), deterministic=greedy)[0])

    judge = loop.Judge(contestant.task, act, seed=seed)

    class Clock(BaseCallback):
        seconds, mean, solved, began = 0.0, float("nan"), False, 0.0

        def look(self) -> None:
            self.seconds += time.perf_counter() - self.began
            state = torch.get_rng_state()  # its exploration must not depend on how often it is judged
            self.mean, self.solved = judge()
            torch.set_rng_state(state)
            self.began = time.perf_counter()

        def _on_step(self) -> bool:
            off_policy = contestant.module == "SAC"
            if off_policy and self.num_timesteps % contestant.every == 0 and self.num_timesteps > 100:
                self.look()
            return not self.solved and self.num_timesteps < share * budget

        def _on_rollout_start(self) -> None:
            if contestant.module == "PPO" and self.num_timesteps and self.num_timesteps % contestant.every == 0:
                self.look()

    clock = Clock()
    clock.began = time.perf_counter()
    model.learn(budget, callback=clock)
    if not clock.solved:
        clock.look()
    return Result(clock.seconds, model.num_timesteps, clock.mean, clock.solved)


def compare(names: list[str], seeds: range, share: float = 1.0) -> dict[str, list[Result]]:
    """{name: one result a seed}; the contestants take turns, so that what else the machine does falls on all alike."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name in names:  # the first run of a process pays for imports and caches
            run(name, seed=0, share=0.0)
        found: dict[str, list[Result]] = {name: [] for name in names}
        for seed in seeds:
            for name in names:
                found[name].append(run(name, seed, share))
        return found
    finally:
        torch.set_num_threads(threads)


def table(found: dict[str, list[Result]]) -> str:
    """Median and range of the seconds, environment steps, and how many runs solved the task."""
    rows = [f"{'':12} {'task':12} {'median s':>9} {'range':>15} {'median steps':>13} {'solved':>7}"]
    for name, results in found.items():
        seconds = [result.seconds for result in results]
        steps = statistics.median(result.steps for result in results)
        spread = f"{min(seconds):.2f} to {max(seconds):.2f}"
        solved = f"{sum(result.solved for result in results)}/{len(results)}"
        task = CONTESTANTS[name].task.name
        rows.append(f"{name:12} {task:12} {statistics.median(seconds):9.2f} {spread:>15} {steps:13.0f} {solved:>7}")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=list(CONTESTANTS), help=f"of {', '.join(CONTESTANTS)}")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=1000, help="the settings were chosen on seeds below")
    options = parser.parse_args()
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    print(table(compare(options.names, seeds)))


if __name__ == "__main__":
    main()
