"""TRL's own trainers in the tests: on the CPU, without a word, on a tiny model, and compared with ours to the last
weight."""

from torch.testing import assert_close

from snippets.worlds import arithmetic

QUIET = {
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
}


def tiny(seed=0, hidden=32):
    """A model that has learned nothing, and its tokenizer."""
    tokenizer = arithmetic.make_tokenizer()
    return arithmetic.make_model(len(tokenizer), hidden=hidden, layers=2, seed=seed), tokenizer


def same_loss_and_gradients(loss, policy, their_loss, their_model):
    """Both losses go backward; they agree, and so does the gradient of each weight."""
    loss.backward()
    their_loss.backward()
    assert_close(loss, their_loss, rtol=1e-6, atol=1e-6)
    theirs = dict(their_model.named_parameters())
    for name, parameter in policy.named_parameters():
        assert_close(parameter.grad, theirs[name].grad, rtol=1e-4, atol=1e-6)
