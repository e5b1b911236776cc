"""Heads by name: each trains, is in the checkpoint, and refuses what only a linear one can do."""

import pytest
import torch

from headstart import TransferClassifier
from headstart.cli import main
from headstart.errors import UserError
from headstart.model.heads import HEADS, as_linear, linear_head, make_head
from support import newest_run


@pytest.mark.parametrize("name", ["mlp", "cosine", "unit"])
def test_a_head_of_that_name_is_trained_saved_and_loaded(name, colours, train):
    assert train(colours, f"--model.head={name}", "--model.lr=0.01", "--trainer.max_epochs=10")["test/acc"] == 1.0
    best = newest_run() / "checkpoints/best.ckpt"
    content = torch.load(best, weights_only=True)
    assert content["hyper_parameters"]["head"] == name
    module = TransferClassifier.load_from_checkpoint(best)
    assert isinstance(module.head, HEADS[name])
    assert all(
        torch.equal(content["state_dict"][f"head.{key}"], value) for key, value in module.head.state_dict().items()
    )
    assert main(["evaluate", f"--ckpt_path={best}", "--report=false"])["test/acc"] == 1.0
    with pytest.raises(UserError, match=f"needs --model.head=linear, but the checkpoint has a {HEADS[name].__name__}"):
        linear_head(module.head)


def test_the_cosine_head_does_not_see_lengths():
    head, features = make_head("cosine", 8, 3), torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(head(features), head(7 * features))
    assert head(features).abs().max() <= 10


def test_an_unknown_head_is_refused_by_name(colours, refused):
    line = refused("train", f"--data.root={colours}", "--model.head=forest")
    assert line == f"error: --model.head=forest: no such head; choose from {', '.join(HEADS)}"


def test_a_linear_head_of_tensors_draws_no_random_numbers():
    state = torch.random.get_rng_state()
    head = as_linear(torch.ones(2, 3), torch.zeros(2))
    assert head(torch.ones(1, 3)).tolist() == [[3.0, 3.0]]
    assert torch.equal(torch.random.get_rng_state(), state)
