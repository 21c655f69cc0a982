"""What the tests of DDPG, TD3 and SAC share: tasks whose values are known, samples, and short trainings."""

import dataclasses
import types

import torch

from snippets.foundations import loop
from snippets.worlds.classic import PENDULUM

UNIT = dataclasses.replace(PENDULUM, bound=1.0)


def rng(seed):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64)


def sample_of(size=64, seed=0, dtype=torch.float64, bound=1.0):
    """Steps as a replay buffer gives them, three in ten the last of an episode."""
    g = rng(seed)
    obs, after = torch.randn(2, size, 3, generator=g, dtype=dtype)
    actions = bound * (2 * torch.rand(size, 1, generator=g, dtype=dtype) - 1)
    rewards = torch.randn(size, generator=g, dtype=dtype)
    return loop.Sample(obs, actions, rewards, after, torch.rand(size, generator=g) < 0.3)


def agent_of(module, task=UNIT, seed=0, *, nets, **options):
    """A learner with these nets in float64, its target nets apart from the nets that they follow."""
    made = module.learner()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        agent = made(task, made.Settings(**{"hidden": 16} | options))
    for name in nets:
        net = getattr(agent, name).double()
        if name.startswith("target_"):
            with torch.no_grad():
                for p in net.parameters():
                    p.add_(0.1 * torch.randn(p.shape, generator=rng(seed + 1)))
    return agent


def linears(net):
    return [layer for layer in net if isinstance(layer, torch.nn.Linear)]


def trained(module, task, **options):
    made = module.learner()
    settings = made.Settings(**{"steps": 45, "updates": 5, "batch": 32, "hidden": 16, "lr": 1e-2} | options)
    return loop.train_off_policy(task, made, settings, judge=False).agent


def constant(reward, terminated=False):
    """Pendulum that pays the same for every step, and either never ends or always."""

    def step(state, action):
        return state, torch.full((len(state),), reward), torch.full((len(state),), terminated)

    return step


STATES = PENDULUM.observe(torch.tensor([[0.5, 0.0], [-2.0, 0.5]]))


def learned_value(module, terminated, **options):
    """What the critic makes of a task that pays -1 a step, each step the last of its episode by the clock."""
    task = dataclasses.replace(PENDULUM, limit=1, step=constant(-1.0, terminated))
    agent = trained(module, task, **{"warmup": 5, "envs": 2, "tau": 0.2, "gamma": 0.8} | options)
    with torch.no_grad():
        critic = agent.critics if hasattr(agent, "critics") else agent.critic
        return critic(STATES, torch.zeros(2, 1)).mean().item()


def learned_torque(module, sign, **options):
    """The mean greedy action of a task of one step that pays sign * a: critic, actor, bound and loop together."""

    def step(state, action):
        return state, sign * action.squeeze(-1), torch.ones(len(state), dtype=torch.bool)

    agent = trained(module, dataclasses.replace(PENDULUM, step=step), **{"warmup": 25} | options)
    with torch.no_grad():
        return agent.greedy(STATES).mean().item()


# Stable-Baselines3.


def peer(name, agent, **options):
    """Stable-Baselines3's learner of that name, with the agent's settings, in float64."""
    import gymnasium
    import numpy as np
    import stable_baselines3
    from stable_baselines3.common.logger import Logger

    class Empty(gymnasium.Env):
        observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (3,))
        action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,))

    k = agent.settings
    options |= {"learning_rate": k.lr, "tau": k.tau, "gamma": k.gamma, "buffer_size": 10, "device": "cpu"}
    options["policy_kwargs"] = {"net_arch": [k.hidden] * 2}
    model = getattr(stable_baselines3, name)("MlpPolicy", Empty(), **options)
    model.set_logger(Logger(None, []))
    model.policy.double()
    for part in ("actor", "actor_target", "critic", "critic_target"):
        if hasattr(model, part):
            getattr(model, part).extract_features = lambda obs, _: obs  # SB3's would make float32 of it
    return model


def feed(model, sample):
    """The next batches of a peer are this sample."""
    column = types.SimpleNamespace(
        observations=sample.obs,
        actions=sample.actions,
        next_observations=sample.after,
        rewards=sample.rewards[:, None],
        dones=sample.terminated.double()[:, None],
        discounts=None,
    )
    model.replay_buffer.sample = lambda *_, **__: column


def copy_critics(ours, theirs):
    for e, net in enumerate(theirs.q_networks):
        for i, layer in enumerate(linears(net)):
            layer.weight.data, layer.bias.data = ours.weights[i][e].data.T.clone(), ours.biases[i][e, 0].data.clone()
