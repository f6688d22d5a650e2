"""scripts/train.py --model gpt: the model, its data, its optimizers, every scheme and averager, and what it writes."""

import pytest
import torch
from launch import spawn_gloo
from test_train import assert_same, in_ranks, newest, parse
from training import averaging, data_text, gpt, loop, muon, optimizers, tasks
from training import launch as job_launch

CPU = torch.device("cpu")
SMALL = ["--model", "gpt", "--window", 16, "--batch-size", 2, "--text-size", 30_000, "--level", "byte"]
SHORT = [*SMALL, "--sample", 5, "--lr-warmup", 2, "--quiet"]


@pytest.fixture
def tiny(monkeypatch):
    """`--model gpt` with 2 layers of width 64."""
    monkeypatch.setitem(gpt.SIZES, "gpt", (2, 64, 2))


@pytest.mark.parametrize(("size", "millions"), [("gpt", 1), ("gpt-10m", 10), ("gpt-25m", 25)])
def test_sizes_are_about_what_their_names_say(size, millions):
    with torch.device("meta"):
        model = gpt.GPT(256, 128, size)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(millions * 1e6, rel=0.1)


def test_no_token_sees_a_later_one():
    torch.manual_seed(0)
    model = gpt.GPT(50, 12).eval()
    tokens = torch.randint(50, (2, 12))
    other = tokens.clone()
    other[:, 7] = (other[:, 7] + 1) % 50
    before, after = model(tokens), model(other)
    assert before.shape == (2, 12, 50)
    assert torch.allclose(before[:, :7], after[:, :7], atol=1e-5)
    assert not torch.allclose(before[:, 7:], after[:, 7:], atol=1e-3)


def corpus(size=4000):
    numbers = torch.arange(size)
    return data_text.Corpus(numbers[: size * 9 // 10], numbers[size * 9 // 10 :], data_text.BYTES)


def test_windows_are_dealt_out_without_overlap_and_anew_each_epoch():
    shares = [tasks.Share(rank, 3, 4, seed=5) for rank in range(3)]
    jobs = [tasks.Windows(corpus(), torch.nn.Linear(1, 1), share, CPU, 16) for share in shares]
    steps = jobs[0].steps_per_epoch
    assert steps == ((3600 - 1) // 16 - 1) // 12
    starts = []
    for epoch in (0, 1):
        firsts = []
        for step in range(steps):
            for job in jobs:
                x, y = job.batch(epoch, step)
                assert x.shape == y.shape == (4, 16) and torch.equal(x + 1, y)
                firsts += x[:, 0].tolist()
        assert len(set(firsts)) == len(firsts) and len({first % 16 for first in firsts}) == 1
        starts.append(firsts)
    assert starts[0] != starts[1]
    assert torch.equal(
        jobs[1].batch(0, 2)[0], tasks.Windows(corpus(), None, shares[1], CPU, 16).batch(0, 2)[0]
    )

    class Uniform(torch.nn.Module):
        def forward(self, x):
            return torch.zeros(*x.shape, 4000)

    sums = torch.stack([job.evaluate(Uniform()) for job in jobs]).sum(0)
    assert sums[2] == (400 - 1) // 16 * 16 and sums[0] / sums[2] == pytest.approx(torch.tensor(4000.0).log())
    with pytest.raises(ValueError, match="windows of 16 tokens"):
        tasks.Windows(corpus(100), None, shares[0], CPU, 16)


def test_bytes_and_local_files_are_read(tmp_path):
    written = "caf\u00e9 \u2192 " * 300
    (tmp_path / "a.txt").write_text(written, encoding="utf-8")
    found = data_text.load("byte", 100_000, files=[tmp_path / "a.txt"])
    assert found.vocabulary_size == 256
    assert found.text(torch.cat((found.train, found.test))) == written
    assert len(found.test) == len(written.encode()) // 10
    share = tasks.Share(0, 1, 2, 0)
    given = parse(*SMALL, "--text-file", tmp_path / "a.txt")
    assert torch.equal(tasks.make(given, share, CPU).corpus.train, found.train)
    with pytest.raises(ValueError, match="--text-file .*missing is no file"):
        tasks.make(parse(*SMALL, "--text-file", tmp_path / "missing"), share, CPU)


def test_muon_takes_the_hidden_matrices_and_adamw_the_rest():
    model = gpt.GPT(256, 16)
    both = optimizers.make(model, parse(*SMALL, "--optimizer", "muon"))
    held = [p for group in both.param_groups for p in group["params"]]
    assert sorted(map(id, held)) == sorted(map(id, model.parameters()))
    muon = {id(p) for group in both.parts["muon"].param_groups for p in group["params"]}
    assert {n.split(".")[-2] for n, p in model.named_parameters() if id(p) in muon} == {
        "attend",
        "mix",
        "widen",
        "narrow",
    }
    decay = {id(p): group["weight_decay"] for group in both.param_groups for p in group["params"]}
    assert all((decay[id(p)] > 0) == (p.dim() >= 2) for p in model.parameters())
    with pytest.raises(ValueError, match="has none"):
        optimizers.make(torch.nn.Embedding(3, 3), parse(*SMALL, "--optimizer", "muon"))


def test_muon_is_torchs():
    """Up to the rounding of torch's bfloat16: its updates differ by at most a hundredth of their size."""
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    torch.manual_seed(0)
    start = [torch.randn(shape) for shape in ((32, 64), (64, 32), (48, 48), (32, 64))]
    found = []
    for make in (muon.Muon, lambda p, **o: torch.optim.Muon(p, adjust_lr_fn="match_rms_adamw", **o)):
        params = [torch.nn.Parameter(s.clone()) for s in start]
        optimizer = make(params, lr=0.02, weight_decay=0.3)
        for step in range(4):
            for i, p in enumerate(params):
                drawn = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + i))
                p.grad = None if i == 3 and step == 1 else drawn
            optimizer.step()
        found.append(params)
    for mine, theirs, s in zip(*found, start, strict=True):
        assert (mine - theirs).norm() < 0.01 * (theirs - s).norm()
    with pytest.raises(ValueError, match=r"matrices, got a parameter of shape \(3,\)"):
        muon.Muon([torch.nn.Parameter(torch.zeros(3))], lr=0.1)


def test_sampling_is_a_function_of_the_seed_and_touches_no_global_generator():
    torch.manual_seed(0)
    model, start = gpt.GPT(256, 8), torch.arange(20)
    state = torch.get_rng_state()
    first, again, other = (gpt.sample(model, start, 12, seed) for seed in (1, 1, 2))
    assert len(first) == 12 and torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state()) and model.training


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_it_learns_and_writes_a_text(optimizer, tiny):
    """From 5.5 (log 256) far below the loss of the bytes' frequencies, about 3.3."""
    given = [
        *SHORT,
        "--batch-size",
        8,
        "--window",
        32,
        "--optimizer",
        optimizer,
        "--scheme",
        "dense",
        "--steps",
        60,
    ]
    (summary,) = in_ranks(2, given)
    assert summary["step"] == 60 and summary["test_loss"] < 3.2 and len(summary["sample"]) > 0


def every_combination():
    for scheme in ("dense", "topk", "gtopk", "randomk", "lowbit"):
        yield ["--scheme", scheme, "--optimizer", "muon"]
    yield ["--scheme", "lowbit", "--bits", 2]
    for kind in averaging.KINDS:
        needs_sgd = kind in ("restarted", "decentralized", "stagewise")
        chosen = ["--optimizer", "sgd" if needs_sgd else "muon"]
        if kind != "decentralized":
            chosen += ["--scheme", "topk", "--density", 0.1]
        yield ["--averaging", kind, *([] if kind == "stagewise" else ["--period", 2]), *chosen]
    yield ["--averaging", "local", "--period", 2, "--averaging-start", 2, "--scheme", "gtopk"]
    yield ["--averaging", "diloco", "--period", 2, "--wire-bits", "1", "--optimizer", "muon", "--mu", "0.5"]
    for kind in ("local", "block", "slowmo"):
        yield ["--averaging", kind, "--period", 2, "--wire-bits", 1]
    yield [
        "--averaging",
        "local",
        "--period",
        2,
        "--wire-bits",
        1,
        "--averaging-start",
        2,
        "--scheme",
        "dense",
    ]


def test_every_scheme_and_averager_resumes_to_the_same_bits(tmp_path, tiny):
    """Five steps, and once more from the third."""
    combinations, runs = list(every_combination()), []
    for number, given in enumerate(combinations):
        folder = tmp_path / str(number)
        given = [*SHORT, "--text-size", 8000, "--steps", 5, "--checkpoint-every", 3, *given]
        runs.append([*given, "--checkpoint", folder / "whole"])
        runs.append([*given, "--checkpoint", folder / "part", "--stop-after", 3])
        runs.append([*given, "--checkpoint", folder / "part", "--resume"])
    summaries = in_ranks(2, *runs)
    for number, given in enumerate(combinations):
        whole, _, resumed = summaries[3 * number : 3 * number + 3]
        for one, other in zip(
            newest(tmp_path / str(number) / "whole"), newest(tmp_path / str(number) / "part"), strict=True
        ):
            for part in (one, other):
                part.pop("sums", None)
            assert_same(one, other, str(given))
        assert (whole["sample"], whole["test_loss"]) == (resumed["sample"], resumed["test_loss"]), given


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--momentum", "0.9"], "--momentum has no effect here: it needs --optimizer sgd"),
        (["--averaging", "restarted"], "--averaging restarted is SGD's"),
        (["--averaging", "stagewise", "--scheme", "topk"], "--averaging stagewise is SGD's"),
        (
            ["--averaging", "restarted", "--wire-bits", "1"],
            "--wire-bits is for local, block, slowmo, diloco, not",
        ),
        (
            ["--averaging", "diloco", "--wire-bits", "1", "--scheme", "topk"],
            "two ways to send the model's change",
        ),
        (["--averaging", "diloco", "--outer-lr", "0"], "--outer-lr 0.0 is not positive"),
        (["--averaging", "local", "--outer-lr", "1"], "--outer-lr has no effect here"),
        (["--steps", "5", "--epochs", "2"], "--epochs has no effect here"),
        (["--beta2", "1"], "--beta2 1.0 is outside [0, 1)"),
        (["--sample", "-1"], "--sample -1 is negative"),
        (["--hidden", "64"], "--hidden has no effect here"),
        (["--scheme", "topk", "--bits", "8"], "--bits has no effect here: it needs --scheme lowbit"),
    ],
)
def test_refuses_what_could_not_be_meant(given, message, capsys):
    with pytest.raises(SystemExit):
        parse("--model", "gpt", *given)
    assert message in capsys.readouterr().err


def test_the_clip_of_a_gpt_is_where_it_can_be():
    assert parse("--model", "gpt").clip_norm == 1.0
    assert parse("--model", "gpt", "--scheme", "dense").clip_norm == 1.0
    assert parse("--model", "gpt", "--no-error-feedback").clip_norm is None
    assert parse("--model", "mlp").clip_norm is None
    world = job_launch.World(0, 1, "single", CPU)

    def ranks(rank, size):
        strategy = loop.strategy_of(torch.nn.Linear(2, 2), parse("--model", "gpt"), world, 5)
        clip = strategy.state.reducer.memory.clip_norm
        strategy.close()
        return clip

    assert spawn_gloo(ranks, 1) == [1.0]
