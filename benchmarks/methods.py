"""Every method that the benchmarks compare: its name, its file, and the settings that make it that one."""

import importlib
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Method:
    name: str
    snippet: str  # rlhf/grpo is snippets/rlhf/grpo.py, whose algorithm() is run
    changes: dict[str, Any] = field(default_factory=dict)  # to the algorithm's own settings
    exact: dict[str, Any] = field(default_factory=dict)  # and in the exact world alone

    @property
    def family(self) -> str:
        return self.snippet.split("/")[0]

    def algorithm(self) -> Any:
        return importlib.import_module(f"snippets.{self.snippet.replace('/', '.')}").algorithm()


METHODS = [
    Method("REINFORCE", "rlhf/reinforce"),
    Method("ReMax", "rlhf/remax", {"prompts": 64, "group": 1}),  # and 64 greedy responses
    Method("RLOO", "rlhf/rloo"),
    Method("PPO", "rlhf/ppo", {"prompts": 128, "group": 1}),  # a critic in the group's place
    Method("GRPO", "rlhf/grpo"),
    Method("Dr. GRPO", "rlhf/grpo", {"scale": "none", "normalize": "constant"}),
    Method("DAPO", "rlhf/grpo", {"normalize": "token", "clip_high": 0.28}),
    Method("GSPO", "rlhf/grpo", {"level": "sequence", "clip_low": 3e-4, "clip_high": 4e-4}),
    Method("CISPO", "rlhf/cispo"),
    Method("REINFORCE++", "rlhf/reinforce_pp"),
    Method("REINFORCE++-baseline", "rlhf/reinforce_pp", {"variant": "baseline"}),
    Method("RAFT", "rlhf/best_of_n"),
    Method("DPO", "preferences/dpo"),
    Method("cDPO", "preferences/dpo", {"label_smoothing": 0.1}),
    Method("Robust DPO", "preferences/dpo", {"label_smoothing": 0.1, "robust": True}),
    Method("IPO", "preferences/ipo"),
    Method("TDPO1", "preferences/tdpo", {"variant": 1}),
    Method("TDPO2", "preferences/tdpo", {"variant": 2}),
    Method("DPOP", "preferences/dpop"),
    Method("KTO", "preferences/kto"),
    Method("ORPO", "preferences/orpo"),
    Method("SimPO", "preferences/simpo"),
    Method("CPO", "preferences/cpo"),
    Method("Online DPO", "preferences/online_dpo"),
]


def method(name: str) -> Method:
    for found in METHODS:
        if found.name == name:
            return found
    raise ValueError(f"no method {name!r}; there are {', '.join(m.name for m in METHODS)}")
