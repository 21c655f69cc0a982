"""The RLHF loop: what it samples, what it refuses, and that splitting or interrupting a run changes nothing."""

import ast
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from snippets.rlhf import grpo, loop, ppo
from snippets.worlds import arithmetic, lm

ROOT = Path(__file__).parents[2]
GRPO, PPO = grpo.algorithm(), ppo.algorithm()
RECORDS = arithmetic.problems(held_out=False)[:64]


@pytest.fixture
def warm():
    return arithmetic.warm_start()


def settings(kind=GRPO.settings, **changes):
    return kind(**({"prompts": 4, "group": 4, "steps": 2, "save_every": 100} | changes))


def parameters(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# What a rollout is


def test_a_group_stands_together_and_scores_are_the_verifiers(warm):
    policy, tokenizer = warm
    batch = loop.rollout(policy, tokenizer, RECORDS, arithmetic.exact_match, settings(), step=3)
    chosen = lm.batch_indices(len(RECORDS), 4, 3, 0)
    boundary = batch.completions.ids.shape[1] - batch.completions.mask.shape[1]
    for row, score in enumerate(batch.scores):
        record = RECORDS[chosen[row // 4]]
        prompt = tokenizer.decode(batch.completions.ids[row, :boundary], skip_special_tokens=True)
        assert prompt == record["prompt"]
        assert score == float(batch.completions.texts[row] == record["answer"])


def test_the_ratio_is_one_before_the_first_step(warm):
    """Sampling and scoring see the same model: no dropout, one temperature."""
    policy, tokenizer = warm
    chosen = settings(temperature=0.7)
    batch = loop.rollout(policy, tokenizer, RECORDS, arithmetic.exact_match, chosen, step=0)
    out = batch.completions
    again = lm.token_logps(policy, out.ids, out.attention, out.mask.shape[1], temperature=0.7)
    assert torch.allclose(again[out.mask.bool()], out.logps[out.mask.bool()], atol=1e-4)


def test_the_greedy_response_is_scored_once_a_prompt_and_has_its_own_kl(warm):
    """Its rows repeat it for each response of the group; the KL is that of its tokens, at the sampling temperature."""
    policy, tokenizer = warm
    reference = arithmetic.make_model(len(tokenizer), seed=1)
    chosen = settings(temperature=0.7)
    arguments = (policy, tokenizer, RECORDS, arithmetic.exact_match, chosen)
    batch = loop.rollout(*arguments, step=0, reference=reference, greedy=True)
    records = [RECORDS[i] for i in lm.batch_indices(len(RECORDS), 4, 0, 0)]
    for i, record in enumerate(records):
        best = lm.generate(policy, tokenizer, [record["prompt"]], max_new_tokens=4, temperature=0.0)
        own, ref = (
            lm.token_logps(model, best.ids, best.attention, best.mask.shape[1], temperature=0.7).sum()
            for model in (policy, reference)
        )
        assert (batch.greedy_scores[4 * i : 4 * i + 4] == float(best.texts[0] == record["answer"])).all()
        assert torch.allclose(batch.greedy_kl[4 * i : 4 * i + 4], own - ref, atol=1e-3)
    alone = loop.rollout(*arguments, step=0, greedy=True)
    assert (alone.greedy_kl == 0).all() and loop.rollout(*arguments, step=0).greedy_scores is None


def test_a_reference_is_held_only_when_it_is_needed(warm):
    policy, tokenizer = warm
    batch = loop.rollout(policy, tokenizer, RECORDS, arithmetic.exact_match, settings(), step=0, reference=policy)
    valid = batch.completions.mask.bool()
    assert torch.allclose(batch.ref_logps[valid], batch.completions.logps[valid], atol=1e-4)
    assert loop.rollout(policy, tokenizer, RECORDS, arithmetic.exact_match, settings(), step=0).ref_logps is None


def test_the_critic_sees_the_state_before_each_token(warm):
    """Changing token t must leave V(s_0..s_t) alone and may change only what comes later."""
    policy, tokenizer = warm
    critic = loop.Critic(policy)
    torch.nn.init.normal_(critic.head.weight)
    out = lm.generate(policy, tokenizer, ["37+48=", "7+8="], max_new_tokens=4, uniforms=torch.rand(2, 4))
    width = out.mask.shape[1]
    before = critic(out.ids, out.attention, width)
    changed = out.ids.clone()
    changed[:, -width + 1] = (changed[:, -width + 1] + 1) % 10 + 2
    after = critic(changed, out.attention, width)
    assert torch.allclose(before[:, :2], after[:, :2], atol=1e-5)
    assert not torch.allclose(before[:, 2], after[:, 2], atol=1e-5)
    assert (loop.Critic(policy)(out.ids, out.attention, width) == 0).all()  # a fresh one values nothing


# One process or two, in one go or two


@pytest.mark.evidence
@pytest.mark.parametrize(
    "changes",
    [{"normalize": "token"}, {"level": "sequence", "beta": 0.1}],
    ids=["token mean", "row mean, with a KL"],
)
def test_two_processes_train_as_one(tmp_path, changes, evidence):
    flags = {"prompts": 8, "group": 4, "steps": 3, "eval_size": 8, "lr": 1e-4, **changes}
    arguments = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    # float64, or rounding in another batch size would in time change a sampled token.
    script = tmp_path / "double.py"
    script.write_text(
        "import torch\n"
        "from snippets.worlds import arithmetic, lm\n"
        "from snippets.rlhf import grpo\n"
        "warm = arithmetic.warm_start\n"
        "arithmetic.warm_start = lambda: (lambda pair: (pair[0].double(), pair[1]))(warm())\n"
        "grpo.main()\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for processes in (1, 2):
        launcher = [sys.executable] if processes == 1 else [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        ]  # fmt: skip
        command = [*launcher, str(script), *arguments, "--out", str(tmp_path / str(processes))]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    one, two = (lm.load_checkpoint(tmp_path / str(n) / "checkpoint.pt") for n in (1, 2))
    start = arithmetic.warm_start()[0].double().state_dict()
    weights = one["modules"]["policy"]
    apart = max((value - two["modules"]["policy"][name]).abs().max().item() for name, value in weights.items())
    kind = "token mean" if "normalize" in changes else "row mean with a KL"
    check = f"torchrun, 2 processes against 1: largest difference of a weight, {kind}"
    evidence("rlhf/loop", check, value=apart, bar=1e-7)
    moved = max((value - start[name]).abs().max().item() for name, value in one["modules"]["policy"].items())
    assert moved > 1e-5  # there was something to agree on


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_a_killed_run_resumes_as_if_unbroken(tmp_path, algorithm):
    flags = "--prompts 4 --group 2 --steps 8 --save_every 2 --eval_size 8 --eval_every 4 --minibatches 2 --epochs 2"
    command = [sys.executable, "-m", f"snippets.rlhf.{algorithm}", *flags.split()]

    def run(out, *more):
        return subprocess.run([*command, "--out", str(out), *more], cwd=ROOT, capture_output=True, text=True)

    whole = run(tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    broken = subprocess.Popen(
        [*command, "--out", str(tmp_path / "broken"), "--steps", "1000000"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    checkpoint = tmp_path / "broken" / "checkpoint.pt"
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    broken.send_signal(signal.SIGKILL)
    broken.wait()
    reached = lm.load_checkpoint(checkpoint)["step"]
    if reached >= 8:
        pytest.fail(f"the run was killed too late, at step {reached}")
    resumed = run(tmp_path / "broken", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    one, two = (lm.load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("whole", "broken"))
    assert one["history"] == two["history"]
    for module, state in one["modules"].items():
        for name, value in state.items():
            assert torch.equal(value, two["modules"][module][name]), (module, name)
    assert (tmp_path / "broken" / "curve.png").stat().st_size > 1000
    assert load_file(tmp_path / "broken" / "model" / "model.safetensors")


def test_a_run_is_resumed_only_with_its_own_settings(warm, tmp_path):
    policy, tokenizer = warm
    loop.train(policy, tokenizer, RECORDS, arithmetic.exact_match, GRPO, settings(out=str(tmp_path)))
    with pytest.raises(ValueError, match="cannot resume: --group was 4 and is 2 now"):
        again = settings(out=str(tmp_path), resume=True, group=2)
        loop.train(policy, tokenizer, RECORDS, arithmetic.exact_match, GRPO, again)


def test_the_seed_decides_everything(tmp_path):
    ends = []
    for seed in (1, 1, 2):
        policy, tokenizer = arithmetic.warm_start()
        loop.train(
            policy,
            tokenizer,
            RECORDS,
            arithmetic.exact_match,
            PPO,
            settings(PPO.settings, seed=seed, out=str(tmp_path)),
        )
        ends.append(parameters(policy))
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


METHODS = sorted(path.stem for path in (ROOT / "snippets/rlhf").glob("*.py") if "def algorithm()" in path.read_text())


@pytest.mark.parametrize("method", METHODS)
def test_swapping_the_algorithm_changes_one_argument(method, tmp_path):
    """The same call, word for word, trains with each method; a critic only where there is a loss for it."""
    algorithm = importlib.import_module(f"snippets.rlhf.{method}").algorithm()
    policy, tokenizer = arithmetic.warm_start()
    chosen = settings(algorithm.settings, beta=0.1, out=str(tmp_path))
    before = parameters(policy)
    trainer = loop.train(policy, tokenizer, RECORDS, arithmetic.exact_match, algorithm, chosen)
    assert set(trainer.modules) == ({"policy", "critic"} if algorithm.critic_loss else {"policy"})
    assert len(trainer.history) == 2 and not torch.equal(parameters(policy), before)


def test_the_loop_knows_no_method():
    """Nothing in it asks which method it runs: it names none, and imports none."""
    source = (ROOT / "snippets/rlhf/loop.py").read_text(encoding="utf-8")
    names = {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}
    modules = {node.module for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)}
    assert {"grpo", "ppo"} <= set(METHODS)
    assert not {name for name in names for method in METHODS if method in name.lower().split("_")}
    assert not {module for module in modules if module.startswith("snippets.rlhf")}


def test_fewer_logits_at_a_time_change_nothing(tmp_path):
    ends = []
    for chunk in (None, 5):
        policy, tokenizer = arithmetic.warm_start()
        chosen = settings(logit_chunk=chunk, beta=0.1, lr=1e-3, out=str(tmp_path))
        loop.train(policy, tokenizer, RECORDS, arithmetic.exact_match, GRPO, chosen)
        ends.append(parameters(policy))
    assert torch.allclose(*ends, atol=1e-4)


# Bad input


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None])
def test_a_reward_that_is_not_finite_is_named(warm, bad):
    policy, tokenizer = warm
    with pytest.raises(ValueError, match="for the prompt .* must be finite"):
        loop.rollout(policy, tokenizer, RECORDS, lambda completions, **_: [bad] * len(completions), settings(), step=0)


def test_a_reward_function_must_answer_for_all(warm):
    policy, tokenizer = warm
    with pytest.raises(ValueError, match="gave 1 rewards for 16 completions"):
        loop.rollout(policy, tokenizer, RECORDS, lambda completions, **_: [1.0], settings(), step=0)


@pytest.fixture(scope="module")
def files(tmp_path_factory, tiny_model):
    """The tiny model, and a good and several bad data files."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "model").symlink_to(tiny_model)
    good = json.dumps({"prompt": "1+1=", "answer": "2"})
    (folder / "good.jsonl").write_text("\n".join([good] * 8))
    (folder / "missing.jsonl").write_text(f'{good}\n{{"prompt": "1+1="}}\n')
    (folder / "type.jsonl").write_text(f'{good}\n{good}\n{{"prompt": "1+1=", "answer": 2}}\n')
    (folder / "empty.jsonl").write_text("")
    return folder


BAD = {
    "no model": ("--model {0}/none --data {0}/good.jsonl", "no model at"),
    "no data": ("--data {0}/none.jsonl", "no such file"),
    "missing column": ("--data {0}/missing.jsonl", "missing.jsonl:2: no column 'answer'"),
    "wrong type": ("--data {0}/type.jsonl", "type.jsonl:3: 'answer' must be str, got int"),
    "empty": ("--data {0}/empty.jsonl", "the data set is empty"),
    "device": ("--device abacus", "device 'abacus' cannot be used"),
    "reward": ("--reward nowhere:at_all", "--reward 'nowhere:at_all' cannot be loaded"),
    "model without data": ("--model {0}/model", "--model needs --data"),
    "nothing to resume": ("--resume --out {0}/fresh", "there is no checkpoint at"),
    "steps": ("--steps 0", "--steps must be at least 1, got 0"),
    "group of one": ("--group 1 --steps 1", "a group G of at least 2"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(files, case, monkeypatch, capsys):
    flags, message = BAD[case]
    monkeypatch.setattr(sys, "argv", ["grpo", "--eval_size", "4", "--prompts", "2", *flags.format(files).split()])
    with pytest.raises(SystemExit) as stop:
        loop.run_demo(GRPO)
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert message in lines[0]


def test_bad_input_end_to_end():
    command = [sys.executable, "-m", "snippets.rlhf.grpo", "--model", "/no/such/model", "--data", "/no/such/data"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: no model at '/no/such/model'")
    assert done.stdout == ""


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_any_model_and_any_data(files, tmp_path, algorithm):
    command = (
        f"-m snippets.rlhf.{algorithm} --model {files}/model --data {files}/good.jsonl --device cpu "
        f"--steps 2 --prompts 4 --group 2 --out {tmp_path}"
    )
    done = subprocess.run([sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "greedy" in done.stdout
    model, _ = lm.load_model(str(tmp_path / "model"), torch.device("cpu"))
    assert model.config.hidden_size == 16
