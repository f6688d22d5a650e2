"""What other seeds, other rates and a second reading say against a verdict: a mark for the table, and a sentence."""

from __future__ import annotations

JUDGED: dict[str, tuple[str, str]] = {
    "m_dsgd_convergence": (
        "the convex slope is of another average",
        "Theorem 9 weighs by 2 / sqrt(t + 1); with its weights and 16 repeats the slope is -0.41, near the threshold of -0.4.",
    ),
    "m_dsgd_memory": (
        "trivial in part",
        "The first part could hardly fail: a memory 250 times as large would still lie below the bound.",
    ),
    "m_dsgd_stagewise": (
        "no rate tested",
        "The criterion asks for a fall to a third; the rate of Theorem 12 was not fitted.",
    ),
    "m_dsgd_variants": (
        "accuracy only",
        "The verdict rests on test accuracy; the training loss of factor masking ends at 1.5 times the dense one.",
    ),
    "gtopk_compression_ratio": (
        "trivial",
        "Any sparsifier passes: after 400 steps without a warm-up what is sent is simply too little at the largest ratios.",
    ),
    "gtopk_delta_and_convergence": (
        "generous criterion",
        "The final losses lie apart, and the gap of the LSTM is 94 % of what the criterion allows.",
    ),
    "m_avg_best_period": (
        "within noise",
        "Up to mu = 0.7 the losses over K differ by less than seeds do; by the theorem's own measure small K is best for mu > 0.",
    ),
    "m_avg_faster": (
        "an effect of the rate",
        "All mu run at one rate here; K-AVG at rate / (1 - mu) reaches the same loss as M-AVG, so the larger step explains it.",
    ),
    "m_avg_momentum_and_workers": (
        "training loss only, one rate",
        "The paper measures validation accuracy, by which the best mu is 0.7, 0.7 and 0.8 for P = 12, 24 and 48 here.",
    ),
    "m_avg_networks": (
        "no difference on ResNet-20",
        "K-AVG ends ahead here and with seeds 10 to 12, and over eight further seeds neither does; the LSTM's half holds.",
    ),
    "local_sgd_growing_gaps": (
        "a weak test",
        "The shift of the rate is 1072 steps of 4096, so that the first steps are hardly larger than the next ones.",
    ),
    "local_sgd_growing_period": (
        "in part by the step sizes",
        "The step sizes fall with H; at equal ones one-shot averaging has 1.4 to 1.5 times the error of H = 1.",
    ),
    "decentralized_consensus": (
        "by construction",
        "No gradient takes part, so it follows from the matrix alone; it tests the library and is no claim of the paper.",
    ),
    "decentralized_networks": (
        "trivial on i.i.d. data",
        "On i.i.d. data even models that never communicate have an average within 12 % of the complete graph's loss.",
    ),
    "decentralized_speedup": (
        "small rings only",
        "A ring of 8 mixes well, and no larger one was run.",
    ),
    "pr_sgd_m_constant_rate": (
        "over steps",
        "The paper draws the loss over the epochs of all workers together; here P workers have seen P times the samples.",
    ),
    "pr_sgd_m_decaying_rate": (
        "reversed with another seed",
        "The criterion is one point of 360 test images; with seed 3 the verdict is not seen.",
    ),
    "pr_sgd_m_period": (
        "trivial on i.i.d. data",
        "Averaging once, at the end, costs 11 % on i.i.d. data, where the criterion allows 25 %: no limit was located.",
    ),
    "pr_sgd_m_speedup": (
        "hardly periodic at P = 8",
        "The formula gives I = 1 or 2 at P = 8, so those runs average at nearly every step.",
    ),
}
"""By the claim's name."""
