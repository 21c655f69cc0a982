"""Every method with the same budget and the same seeds: in the exact world against the truth, and on arithmetic.

Exact world: 2,000 steps of 64 responses (16 to each prompt, or 8 pairs of them), Adam, learning rate 0.05 falling to 0,
the world's beta. Arithmetic: 120 steps from the warm start. Online methods sample 128 responses a step; offline ones
get the same pairs, made once of 16,000 responses, 32 a step. Everything else is the method's own default.

    python -m benchmarks.leaderboard RLOO
"""

import argparse
import tempfile
from typing import Any

import torch

from benchmarks.methods import METHODS, Method, method
from snippets.worlds import exact, trials

EXACT_STEPS, ARITHMETIC_STEPS, EVAL_EVERY = 2000, 120, 30


def exact_trial(entry: Method, seed: int, *, steps: int = EXACT_STEPS) -> trials.Trial:
    """One run in the exact world of this seed."""
    run = trials.exact_rlhf if entry.family == "rlhf" else trials.exact_preferences
    # A critic in the group's place: the budget of responses is the same.
    changes = {name: value for name, value in entry.changes.items() if name not in ("prompts", "group")}
    online = {"online": True} if entry.name == "Online DPO" else {}
    return run(entry.algorithm(), exact.make_world(seed), seed, steps=steps, **(changes | entry.exact | online))


def arithmetic_trial(entry: Method, seed: int, **changes: Any) -> dict[str, Any]:
    """One run from the arithmetic warm start."""
    run = trials.arithmetic_rlhf if entry.family == "rlhf" else trials.arithmetic_preferences
    budget = {"steps": ARITHMETIC_STEPS, "eval_every": EVAL_EVERY, "save_every": 10_000}
    with tempfile.TemporaryDirectory() as out:
        return run(entry.algorithm(), seed, out, **(budget | entry.changes | changes))


def main() -> None:
    parser = argparse.ArgumentParser(description="one method on the leaderboard's terms, one seed")
    parser.add_argument("method", choices=[entry.name for entry in METHODS])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    entry = method(args.method)
    trial = exact_trial(entry, args.seed)
    print(f"exact world: KL(pi || pi*) {trial.to_optimum:.4f} nats, share of the optimal gain {trial.share:.4f}")
    print(f"             E[r] {trial.reward:.4f} at KL(pi || pi_ref) {trial.from_reference:.4f} nats")
    run = arithmetic_trial(entry, args.seed)
    for step, accuracy in zip(run["step"], run["accuracy"], strict=True):
        print(f"arithmetic: step {step:4d}   greedy held-out exact match {accuracy:.3f}")
    print(f"{run['seconds']:.1f} CPU seconds without evaluation")


if __name__ == "__main__":
    main()
