"""The example's model: what its checkpoint knows, through PyTorch's attention and through the kernels."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("pydoc_data.topics", reason="this Python was built without the topics of help()")

from torch.nn import functional as F  # noqa: E402

from benchmarks.cases import replace_blocks  # noqa: E402
from examples.char_llama.measure import (  # noqa: E402
    DENSE,
    Kernels,
    Outcome,
    Setting,
    decode_loss,
    draw,
    loss_of,
    measure,
    scores_left_out,
    tables,
)
from examples.char_llama.measure import main as measure_main  # noqa: E402
from examples.char_llama.model import (  # noqa: E402
    BEGIN,
    VOCABULARY,
    Caches,
    CharLlama,
    Config,
    decode,
    encode,
    generate,
    load,
)
from examples.char_llama.text import docstrings, held_out_tokens, training_tokens  # noqa: E402
from examples.char_llama.train import CHECKPOINT, train  # noqa: E402
from examples.char_llama.train import main as train_main  # noqa: E402

SMALL = Config(layers=2, width=64, heads=2, kv_heads=1, head_dim=32, hidden=64, context=192)


@pytest.fixture(scope="module")
def trained() -> CharLlama:
    return load(CHECKPOINT)[0]


@pytest.fixture(scope="module")
def windows() -> torch.Tensor:
    return held_out_tokens(3, 512)


def test_the_checkpoint_knows_the_text(trained: CharLlama, windows: torch.Tensor) -> None:
    """Its loss is far below the entropy of the text's characters, which a model without context cannot pass."""
    text = windows[:, 1:].flatten()
    frequencies = torch.bincount(text, minlength=VOCABULARY) / text.numel()
    entropy = -torch.special.xlogy(frequencies, frequencies).sum().item()
    assert loss_of(trained, windows) < 0.6 * entropy
    torch.manual_seed(0)
    assert loss_of(CharLlama(Config()), windows) > entropy


def test_the_checkpoint_is_small_and_says_where_it_comes_from() -> None:
    assert CHECKPOINT.stat().st_size <= 2_000_000
    model, about = load(CHECKPOINT)
    assert sum(weight.numel() for weight in model.parameters()) == 800_000
    assert {"python", "torch", "seed", "steps", "batch", "bfloat16"} == set(about)


def test_dense_kernels_agree_with_pytorch(trained: CharLlama, windows: torch.Tensor) -> None:
    """Attention in another order of summation moves no logit by more than rounding does, which float64 measures."""
    tokens = windows[:1, :-1]
    with torch.no_grad():
        exact = load(CHECKPOINT)[0].double()(tokens)
        eager, kernels = trained(tokens), trained(tokens, Kernels(DENSE))
    unit = (eager - exact).abs().max()
    assert (kernels - exact).abs().max() <= 4 * unit
    text = windows[:1, 1:].flatten()
    losses = [F.cross_entropy(x.double().flatten(0, 1), text).item() for x in (exact, eager, kernels)]
    assert abs(losses[2] - losses[0]) <= 1e-5


def test_what_sparsity_leaves_out_is_counted(trained: CharLlama, windows: torch.Tensor) -> None:
    settings = [DENSE, Setting("2:4", 2, 4), Setting("skip", threshold=1.0), Setting("none", threshold=1e-30)]
    dense, half, skipping, none = measure(trained, windows[:1, :385], settings, decoded=2, new=2)
    nothing = (0.0,) * 5
    for phase in ("prefill", "decode"):
        assert dense.shares[phase] == none.shares[phase] == nothing
        assert none.loss[phase] == pytest.approx(dense.loss[phase], abs=1e-5)
    # Half of all but the recent 64 of 384 keys, and what the diagonal cuts off.
    left_out = sum(2 for i in range(384) for group in range(96) if 4 * group + 3 <= i - 64)
    assert half.shares["prefill"][0] == pytest.approx(left_out / (384 * 385 / 2), abs=0.01)
    assert 0.0 < abs(half.over(dense, "prefill")) < 0.1
    assert half.loss["decode"] == dense.loss["decode"]
    # 128 rows of a tile hardly ever agree; a row by itself sees some of its tiles below those before.
    assert skipping.shares["prefill"][0] < 0.1
    assert 0.1 < skipping.shares["decode"][0] < 0.8
    assert skipping.over(dense, "decode") != 0.0
    assert dense.same(dense) == 2.0


def test_decode_one_by_one_is_prefill(trained: CharLlama, windows: torch.Tensor) -> None:
    before = Caches()
    with torch.no_grad():
        trained(windows[:, :508], None, before)
        logits = trained(windows[:, :512])[:, 508:]
    expected = F.cross_entropy(logits.flatten(0, 1), windows[:, 509:].flatten()).item()
    assert decode_loss(trained, windows, before, Kernels(DENSE)) == pytest.approx(expected, abs=1e-4)


@pytest.fixture(scope="module")
def of_modules() -> list[str]:
    return docstrings()


@pytest.fixture
def read_once(of_modules: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The standard library is parsed for the first test that trains on it only."""
    monkeypatch.setattr("examples.char_llama.text.docstrings", lambda: of_modules)


def outcome(setting: Setting, prefill: float, decoded: float, shares: tuple[float, ...], text: list[int]) -> Outcome:
    loss = {"prefill": prefill, "decode": decoded}
    return Outcome(setting, loss, {"prefill": shares, "decode": shares}, torch.tensor([text]))


def test_the_tables_have_a_place_in_the_readme(tmp_path: Path) -> None:
    outcomes = [
        outcome(DENSE, 1.5, 1.25, (0.0, 0.0, 0.0), [1, 2, 3]),
        outcome(Setting("2:4", 2, 4), 1.75, 1.25, (0.4, 0.3, 0.5), [1, 2, 3]),
        outcome(Setting("skip", threshold=0.5), 1.5, 1.125, (0.25, 0.125, 0.375), [1, 4, 3]),
    ]
    parts = tables(outcomes, eager_loss=1.50001, n_windows=7, context=1024)
    assert parts["quality"].splitlines()[2:6] == [
        "| PyTorch's, no kernel | 1.50001 | +0.00001 |  |  |  |  |  |",
        "| dense | 1.50000 | +0.00000 |  | 1.25000 | +0.00000 |  | 3.0 of 3 |",
        "| 2:4 | 1.75000 | +0.25000 | 40.0% | 1.25000 | +0.00000 |  | 3.0 of 3 |",
        "| skip | 1.50000 | +0.00000 | 25.0% | 1.12500 | -0.12500 | 25.0% | 1.0 of 3 |",
    ]
    assert parts["layers"].splitlines()[2:] == ["| skip | 12.5% | 37.5% |"]
    readme = tmp_path / "README.md"
    readme.write_text((CHECKPOINT.parent / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    replace_blocks(readme, parts)
    assert parts["quality"] in readme.read_text(encoding="utf-8")


def test_the_plot_is_an_svg(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra `bench` is not installed")
    skipping = outcome(Setting("skip-softmax 0.5", threshold=0.5), 1.5, 1.125, (0.25, 0.125, 0.375), [1])
    draw([outcome(DENSE, 1.5, 1.25, (0.0, 0.0, 0.0), [1]), skipping], tmp_path / "plot.svg")
    text = (tmp_path / "plot.svg").read_text(encoding="utf-8")
    assert text.startswith("<?xml")
    assert ">0.5</text>" in text


def test_scores_left_out_by_hand() -> None:
    """One query at position 71, whose 64 recent keys begin with key 8: two groups are left, of growing scores."""
    q, k = torch.ones(1, 1, 1, 1), torch.arange(72.0).reshape(1, 72, 1, 1)
    assert scores_left_out(q, k, 2, 4) == (72, 4)
    assert scores_left_out(q, k, 1, 4) == (72, 6)


def test_generation_with_caches_is_generation_without(trained: CharLlama, windows: torch.Tensor) -> None:
    prompts = windows[:, :40]
    tokens = prompts
    for _ in range(12):
        with torch.no_grad():
            tokens = torch.cat((tokens, trained(tokens)[:, -1:].argmax(-1)), 1)
    assert torch.equal(generate(trained, prompts, 12), tokens[:, 40:])


def test_more_than_the_context_is_refused() -> None:
    with pytest.raises(ValueError, match="tokens: received 193 in all, allowed 192"):
        CharLlama(SMALL)(torch.zeros(1, 193, dtype=torch.int64))


def test_text_survives_encoding() -> None:
    text = "def f(x):\n    return ~x"
    assert decode(torch.cat((torch.tensor([BEGIN]), encode(text)))) == text
    assert decode(encode("a\u03b1")) == "a\n"
    assert encode("").shape == (0,)


@pytest.mark.usefixtures("read_once")
def test_nothing_held_out_is_trained_on() -> None:
    """No stretch of 200 characters of it is in the text of training."""
    seen = decode(training_tokens())
    assert len(seen) > 500_000
    windows = held_out_tokens(40, 1024)
    assert len(set(map(decode, windows))) == 40
    for window in windows:
        text = decode(window)
        assert not [i for i in range(0, 800, 100) if text[i : i + 200] in seen]


def test_training_learns_and_the_seed_decides() -> None:
    tokens = encode("the same words again and again, " * 40)
    losses = []
    for _ in range(2):
        torch.manual_seed(0)
        losses.append(train(CharLlama(SMALL), tokens, steps=20, batch=2, seed=3, bfloat16=False))
    assert losses[0] == losses[1] < 0.9 * math.log(VOCABULARY)


@pytest.mark.usefixtures("read_once")
def test_the_training_command_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.pt"
    assert train_main(["--steps", "2", "--batch", "1", "--output", str(path)]) == 0
    assert "2/2" in capsys.readouterr().err
    assert load(path)[1]["steps"] == 2


@pytest.mark.parametrize(
    ("command", "arguments", "words"),
    [
        (train_main, ["--steps", "0"], "--steps: received 0, allowed at least 1"),
        (measure_main, ["--windows", "1"], "--windows: received 1, allowed at least 4"),
    ],
    ids=["train", "measure"],
)
def test_bad_arguments_are_refused(
    command: Callable[[list[str]], int], arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command(arguments)
    assert words in capsys.readouterr().err


def test_windows_that_are_not_there_are_refused() -> None:
    with pytest.raises(ValueError, match="n: received 0"):
        held_out_tokens(0, 512)
