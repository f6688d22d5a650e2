"""docs/recipes.md: the study behind it is whole, its words hold in the records, and its prose has no figure of them."""

import re
import statistics

import pytest
from benchmarks.pages import recipes as page
from launch import ROOT
from studies import recipes, trained

WARM, AT_ONCE = recipes.UNMASKED, recipes.MASKED_AT_ONCE
SGD = [(network, optimizer) for network in ("resnet20", "lstm") for optimizer in ("sgd", "nesterov")]
SETTINGS = {"0.9", "0.1", "0.01", "0.05", "1.5"}
"""Decimal numbers of the prose that are settings, not results."""


def test_the_study_is_whole():
    assert list(page.found()) == list(recipes.arms(list(recipes.NETWORKS)))


def test_the_prose_has_no_number_of_the_records():
    """They stand between `<!-- rendered -->` and `<!-- end -->`, where another test compares them with the records."""
    text = re.sub(r"<!-- rendered.*?<!-- end -->", "", (ROOT / "docs" / "recipes.md").read_text(), flags=re.S)
    assert "%" not in text and not re.search(r"\d[ \n]+times[ \n](?!as long)", text)
    assert set(re.findall(r"\d+\.\d+", text)) <= SETTINGS


def chosen(network, optimizer, variant, lr):
    """The loss on the data of the choice at a rate."""
    (run,) = [
        r
        for r in page.records()[1:]
        if (r["network"], r["optimizer"], r["variant"]) == (network, optimizer, variant)
        and (r["density"], r["lr"], r["seed"]) == (0.01, lr, trained.CHOICE_SEED)
    ]
    return run["loss"]


@pytest.mark.parametrize(("network", "optimizer"), SGD)
def test_what_is_said_of_every_network_under_sgd(network, optimizer):
    warm, at_once = (page.row(network, optimizer, variant) for variant in (WARM, AT_ONCE))
    dense = page.dense(network, optimizer)
    assert page.rate(network, optimizer, WARM) == 1.0  # "at the dense run's rate"
    assert page.rate(network, optimizer, AT_ONCE) > 1.0
    assert chosen(network, optimizer, AT_ONCE, dense.lr) > chosen(network, optimizer, WARM, dense.lr)
    late, last = page.loss(warm), page.loss(page.row(network, optimizer, WARM, 0.001))
    assert late < last, "0.001 cost more"
    if network == "lstm":
        others = [page.row(network, optimizer, AT_ONCE, density) for density in (0.1, 0.001)]
        assert page.loss(at_once) < min(page.loss(other) for other in others)
    else:
        assert warm.accuracy > dense.accuracy - 5e-4, "not below dense's accuracy"


@pytest.mark.parametrize("network", ("resnet20", "lstm"))
def test_what_is_said_of_masking_clipping_and_the_rate_in_the_residual(network):
    warm = page.row(network, "sgd", WARM)
    masked_late = page.row(network, "sgd", page.MASKED_LATE)
    assert page.loss(masked_late) > max(page.loss(warm), page.loss(page.row(network, "sgd", AT_ONCE)))
    assert page.rate(network, "sgd", AT_ONCE) > page.rate(network, "sgd", page.AT_ONCE)
    clipped = page.row(network, "sgd", recipes.UNMASKED_CLIPPED)
    assert page.loss(clipped) < page.loss(warm) and clipped.lr > warm.lr
    lowered = page.loss(page.dense(network, "sgd", recipes.CLIPPED)) < page.loss(page.dense(network, "sgd"))
    assert lowered == (network == "lstm")
    in_residual = page.row(network, "sgd", page.IN_RESIDUAL)
    if network == "lstm":
        assert page.loss(in_residual) < page.loss(warm) - statistics.stdev(warm.losses)
    else:
        assert abs(page.loss(in_residual) - page.loss(warm)) < statistics.stdev(warm.losses)


def test_what_is_said_of_adamw_and_of_no_memory():
    for network in recipes.NETWORKS:
        assert page.row(network, "adamw", recipes.LOWBIT, 1.0).above < trained.BAR
    plain, forgets = (page.row("gpt", "adamw", variant) for variant in ("top-k", page.FORGETS))
    assert page.loss(forgets) <= page.loss(plain), "error feedback did not help it"
    masked = page.row("lstm", "sgd", AT_ONCE, 0.001)
    assert page.loss(masked) < page.loss(page.row("lstm", "sgd", page.FORGETS, 0.001))
