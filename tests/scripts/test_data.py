"""The loaders: published formats read right, damaged ones refused, batches dealt out without overlap."""

import pickle
import subprocess
import sys

import numpy
import pytest
import torch
from launch import ROOT, run
from training import data_cifar10, data_digits, data_ptb, data_text, tasks
from training.models import MLP, LanguageModel, ResNet20

CPU = torch.device("cpu")


def write_cifar(folder, per_file=4):
    """The six files of the python version: row i of file f is filled with the number 40 f + i."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate((*data_cifar10.TRAIN_FILES, data_cifar10.TEST_FILE)):
        data = numpy.empty((per_file, 3072), dtype=numpy.uint8)
        for row in range(per_file):
            data[row] = 40 * number + row
            data[row, 1024] = 255  # the first pixel of the green plane
        labels = [(number + row) % 10 for row in range(per_file)]
        content = {
            b"batch_label": name.encode(),
            b"labels": labels,
            b"data": data,
            b"filenames": [b"x"] * per_file,
        }
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))


def test_cifar10_is_read_plane_by_plane(tmp_path):
    write_cifar(tmp_path / "cifar-10-batches-py")
    images, labels = data_cifar10.read_batch(tmp_path / "cifar-10-batches-py" / "data_batch_2")
    assert images.shape == (4, 3, 32, 32) and images.dtype == torch.uint8
    assert labels.tolist() == [1, 2, 3, 4]
    assert images[3, 0, 0, 0] == 43 and images[3, 1, 0, 0] == 255 and images[3, 1, 0, 1] == 43
    arrays = data_cifar10.load(tmp_path)  # the folder that holds the folder
    assert arrays.train_x.shape == (20, 3, 32, 32) and len(arrays.test_y) == 4
    assert arrays.train_y[:8].tolist() == [0, 1, 2, 3, 1, 2, 3, 4]
    torch.testing.assert_close(
        arrays.train_x[1, 0, 0, 0].item(), (1 / 255 - 0.4914) / 0.2470, atol=1e-6, rtol=0
    )
    torch.testing.assert_close(arrays.train_x[1, 1, 0, 0].item(), (1.0 - 0.4822) / 0.2435, atol=1e-6, rtol=0)


def test_cifar10_files_in_another_form_are_refused(tmp_path):
    write_cifar(tmp_path)
    (tmp_path / "data_batch_3").unlink()
    with pytest.raises(ValueError, match="data_batch_3 missing"):
        data_cifar10.load(tmp_path)
    path = tmp_path / "bad"
    for content, message in [
        ({b"data": numpy.zeros((2, 3072), numpy.uint8), b"labels": [1]}, "with 1"),
        ({b"data": numpy.zeros((2, 3071), numpy.uint8), b"labels": [1, 2]}, "3071"),
        ({b"data": numpy.zeros((1, 3072), numpy.uint8), b"labels": [10]}, "outside 0..9"),
        ({b"fine_labels": [1]}, "not a CIFAR-10 batch"),
        (subprocess.Popen, "does not need subprocess.Popen"),
    ]:
        path.write_bytes(pickle.dumps(content))
        with pytest.raises(ValueError, match=message):
            data_cifar10.read_batch(path)
    path.write_bytes(b"not a pickle")
    with pytest.raises(ValueError, match="not a CIFAR-10 batch"):
        data_cifar10.read_batch(path)


def test_cifar10_augmentation_moves_and_mirrors_within_four_pixels():
    images = torch.zeros(64, 3, 32, 32)
    images[:, 1, 10, 5] = 1.0
    out = data_cifar10.crop_and_flip(images, torch.Generator().manual_seed(0))
    assert out.shape == images.shape
    assert out[:, 0].count_nonzero() == out[:, 2].count_nonzero() == 0
    places = out[:, 1].nonzero()
    assert len(places) == 64
    rows, columns = places[:, 1], places[:, 2]
    assert rows.min() == 6 and rows.max() == 14
    mirrored = columns > 15
    assert 10 < mirrored.sum() < 54
    assert columns[~mirrored].min() == 1 and columns[~mirrored].max() == 9
    assert columns[mirrored].min() == 22 and columns[mirrored].max() == 30
    again = data_cifar10.crop_and_flip(images, torch.Generator().manual_seed(0))
    assert torch.equal(out, again)


def write_ptb(folder):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ptb.train.txt").write_text(" no it was n't <unk> monday \n but it was\n" * 50)
    (folder / "ptb.valid.txt").write_text(" it was\n" * 20)
    (folder / "ptb.test.txt").write_text(" it was but tuesday\n" * 40)


def test_ptb_lines_end_in_eos_and_unknown_words_share_a_number(tmp_path):
    write_ptb(tmp_path)
    corpus = data_ptb.load(tmp_path)
    words = [corpus.vocabulary[number] for number in corpus.train[:11].tolist()]
    assert words == ["no", "it", "was", "n't", "<unk>", "monday", "<eos>", "but", "it", "was", "<eos>"]
    assert corpus.vocabulary[0] == "<unk>" and corpus.vocabulary_size == 8
    assert [corpus.vocabulary[n] for n in corpus.test[:5].tolist()] == ["it", "was", "but", "<unk>", "<eos>"]
    (tmp_path / "ptb.valid.txt").unlink()
    with pytest.raises(ValueError, match="ptb.valid.txt missing"):
        data_ptb.load(tmp_path)


def test_standard_library_text_is_cut_without_loss_and_numbered_by_frequency(tmp_path):
    text = "def f(x_1):\n\treturn x_1 + 2.50  # naïve\n"
    for level in data_text.LEVELS:
        assert "".join(data_text.split(text, level)) == text
    assert "x_1" in data_text.split(text, "word")
    assert data_text.build_vocabulary("bbbaac", 3) == ("<unk>", "b", "a")
    assert data_text.build_vocabulary("cab", 10) == ("<unk>", "a", "b", "c")
    corpus = data_text.load("word", size=150_000, vocabulary=500)
    assert (
        corpus.vocabulary_size == 500
        and len(corpus.train) > 20_000
        and len(corpus.train) // 10 <= len(corpus.test) <= len(corpus.train) // 8
    )
    assert 0.01 < (corpus.train == 0).float().mean() < 0.5
    assert torch.equal(corpus.train, data_text.load("word", size=150_000, vocabulary=500).train)
    with pytest.raises(ValueError, match="level='line'"):
        data_text.load("line")
    with pytest.raises(ValueError, match="size=10"):
        data_text.load("char", size=10)


def test_text_vocabulary_does_not_depend_on_the_hash_seed(tmp_path):
    (tmp_path / "torch.py").write_text("Tensor = None\n")  # not needed for this, and slow to import
    program = (
        "from training import data_text\n"
        "words = data_text.split(open(data_text.__file__).read(), 'word')\n"
        "print(hash('word'), data_text.build_vocabulary(words, 100))\n"
    )
    path = f"{tmp_path}:{ROOT / 'scripts'}"
    outputs = []
    for seed in ("1", "2"):
        done = run(
            [sys.executable, "-c", program], timeout=60, env={"PYTHONHASHSEED": seed, "PYTHONPATH": path}
        )
        outputs.append(done.stdout.split(" ", 1))
    assert outputs[0][0] != outputs[1][0] and outputs[0][1] == outputs[1][1]


def test_digits_split_is_fixed_and_normalised():
    arrays = data_digits.load()
    assert len(arrays.train_y) == 1437 and len(arrays.test_y) == 360
    assert abs(arrays.train_x.mean()) < 1e-5 and abs(arrays.train_x.std() - 1) < 1e-5
    assert sorted(set(arrays.test_y.tolist())) == list(range(10))
    assert torch.equal(arrays.test_x, data_digits.load().test_x)


def test_ranks_share_an_epoch_without_overlap_and_reshuffle():
    arrays = data_digits.load()
    numbered = data_digits.Arrays(
        torch.arange(1437.0).view(-1, 1, 1, 1), arrays.train_y, arrays.test_x, arrays.test_y
    )
    jobs = [tasks.Images(numbered, MLP(64), tasks.Share(rank, 3, 16, seed=5), CPU) for rank in range(3)]
    assert jobs[0].steps_per_epoch == 1437 // 48

    def epoch(number):
        steps = range(jobs[0].steps_per_epoch)
        return [job.batch(number, step)[0].flatten().int().tolist() for step in steps for job in jobs]

    first = sum(epoch(0), [])
    assert len(first) == len(set(first)) == 29 * 48
    assert epoch(0) != epoch(1)
    counts = torch.stack([job.evaluate(lambda x: torch.zeros(len(x), 10)) for job in jobs])[:, 2]
    assert counts.tolist() == [120, 120, 120]
    with pytest.raises(ValueError, match="batch_size=500 on 3 ranks"):
        tasks.Images(numbered, MLP(64), tasks.Share(0, 3, 500, 0), CPU)


def test_text_columns_follow_on_from_window_to_window():
    stream = torch.arange(1000)
    corpus = data_text.Corpus(stream % 7, stream % 7, tuple("abcdefg"))
    numbered = data_text.Corpus(stream, stream, tuple("abcdefg"))
    model = LanguageModel(7, 8)
    shares = [tasks.Share(rank, 2, 2, 0) for rank in range(2)]
    jobs = [tasks.Text(numbered, model, share, CPU, window=10) for share in shares]
    assert jobs[0].tokens[:3].tolist() == [[0, 250], [1, 251], [2, 252]]
    assert jobs[1].tokens[0].tolist() == [500, 750] and jobs[0].steps_per_epoch == 24
    job = tasks.Text(corpus, model, shares[0], CPU, window=10)
    model.eval()
    # two windows with the carry give the same losses as one long one
    first, carry = job.loss(model, 0, 0, job.start())
    second, _ = job.loss(model, 0, 1, carry)
    whole = tasks.Text(corpus, model, shares[0], CPU, window=20).loss(model, 0, 0, job.start())[0]
    torch.testing.assert_close((first + second) / 2, whole)
    assert not torch.allclose(second, job.loss(model, 0, 1, job.start())[0])


def test_models_have_their_published_sizes_and_take_small_images():
    def count(model):
        return sum(p.numel() for p in model.parameters())

    assert count(ResNet20(3)) == 269_722  # He et al., table 6: 0.27 M
    assert ResNet20(1)(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    assert ResNet20(3)(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    model = LanguageModel(50, hidden=16)
    logits, carry = model(torch.zeros(5, 3, dtype=torch.int64), model.start(3))
    assert logits.shape == (5, 3, 50) and carry.shape == (2, 2, 3, 16) and not carry.requires_grad
