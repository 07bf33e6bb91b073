"""Saved caches of several ranks: one file, however many wrote it, that any number of ranks starts from."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from checkpoints import CPU
from ranks import Rank, finish, start

import generate
from checkpoint import Checkpoint, Share, load_model
from checkpoint.model_fingerprint import model_fingerprint
from common import tensor_file
from common.errors import UserError
from engine import Engine, Sampling
from engine.link import linked
from engine.parallel import Parallel, connect
from engine.saved import SavedCache, save_cache
from kv_cache import ModelCache
from model import Config
from selective_kv import FullCache, KVCache, SelectiveCache, Shape, SinkWindowCache

CONFIG = Config(101, 48, 2, 8, 4, 96, 512, 64, qkv_bias=True, qk_norm=True)  # an odd vocabulary
POLICIES: list[KVCache] = [FullCache(), SelectiveCache(3, 8, k_bits=8, v_bits=4), SinkWindowCache(3, 8)]
LENGTHS = [150, 9]  # the longer one has closed a tile
N_NEW = 8


def text(n: int, seed: int) -> list[int]:
    return torch.randint(101, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


PROMPTS = [text(n, n) for n in LENGTHS]


class Runs:
    """What one device does, or what each of several ranks does."""

    def __init__(self, ranks: Parallel | None = None) -> None:
        self.ranks = ranks
        checkpoint = Checkpoint(None, "made", CONFIG)
        if ranks is not None:
            checkpoint = checkpoint.share_of(ranks.rank, ranks.size)
        self.share, self.config = checkpoint.share, checkpoint.config
        self.model = load_model(checkpoint, CPU, torch.float32, True, ranks=ranks)

    def engine(self, policy: KVCache) -> Engine:
        shape = Shape(len(PROMPTS), self.config.n_kv_head, self.config.head_dim, 200, torch.float32, CPU)
        cache = ModelCache(policy, self.config.n_layer, shape)
        return Engine(self.model, cache, Sampling(0.9, seed=3), ranks=self.ranks)

    def read_and_save(self, policy: KVCache, file: Path) -> list[list[int | None]]:
        engine = self.engine(policy)
        engine.read(PROMPTS)
        save_cache(file, engine, PROMPTS, share=self.share)
        engine.reset()
        return list(engine.generate(PROMPTS, N_NEW))

    def load(self, policy: KVCache, file: Path, again: Path | None = None) -> list[list[int | None]]:
        """What is written after a saved text alone, and after more of it. again: where to save what was loaded."""
        engine, saved = self.engine(policy), SavedCache(file)
        saved.require(CONFIG, policy, engine.cache.shape)
        saved.load(engine, LENGTHS, self.share)
        if again is not None:
            save_cache(again, engine, PROMPTS, share=self.share)
        written = list(engine.generate([[], []], N_NEW))
        engine.reset()
        saved.load(engine, LENGTHS, self.share)
        return written + list(engine.generate([text(3, 1), text(2, 2)], N_NEW))


def on_ranks(n_rank: int, folder: Path, job: object) -> list[Rank]:
    def body(rank: int) -> None:
        with linked("test") as link:
            assert link is not None and callable(job)
            job(connect(link, CPU))
            link.finish()

    return start(n_rank, body, folder)


@pytest.mark.parametrize("n_rank", [2, 4])
def test_any_number_of_ranks_goes_on_with_the_same_file(n_rank: int, tmp_path: Path) -> None:
    """Written by ranks or by one device, read by ranks or by one device: the same tokens, and the same bytes again."""
    alone = Runs()
    want, after = [], []
    for i, policy in enumerate(POLICIES):
        want.append(alone.read_and_save(policy, tmp_path / f"alone{i}"))
        after.append(alone.load(policy, tmp_path / f"alone{i}"))

    def job(ranks: Parallel) -> None:
        runs = Runs(ranks)
        for i, policy in enumerate(POLICIES):
            assert runs.read_and_save(policy, tmp_path / f"ranks{i}") == want[i]
            assert runs.load(policy, tmp_path / f"ranks{i}", tmp_path / f"again{i}") == after[i]
            assert runs.load(policy, tmp_path / f"alone{i}") == after[i]

    ranks = on_ranks(n_rank, tmp_path / "ranks", job)
    assert finish(ranks) == [0] * n_rank, [rank.err.read_text() for rank in ranks]
    for i, policy in enumerate(POLICIES):
        assert alone.load(policy, tmp_path / f"ranks{i}", tmp_path / f"one{i}") == after[i]
        whole = (tmp_path / f"ranks{i}").read_bytes()
        assert (tmp_path / f"again{i}").read_bytes() == whole == (tmp_path / f"one{i}").read_bytes()


def test_damage_is_found_by_every_rank(tmp_path: Path) -> None:
    """In rank 1's heads alone: rank 0 refuses too."""
    alone, file = Runs(), tmp_path / "cache"
    alone.read_and_save(FullCache(), file)
    data = bytearray(file.read_bytes())
    place = SavedCache(file).file.places["sequences.0.layers.1.k"][2]
    data[place + 3 * 150 * 64 * 4 + 5] ^= 1  # the last KV head
    file.write_bytes(data)

    def job(ranks: Parallel) -> None:
        with pytest.raises(UserError, match=r"changed or damaged since it was written \(sequences.0.layers.1.k\)"):
            Runs(ranks).load(FullCache(), file)

    ranks = on_ranks(2, tmp_path / "ranks", job)
    assert finish(ranks) == [0, 0], [rank.err.read_text() for rank in ranks]


def test_a_full_disk_of_one_rank_is_everybodys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "cache"
    file.write_text("old")
    write = tensor_file._write_at

    def full(*args: object) -> None:
        if os.environ["RANK"] == "1":
            raise OSError(28, os.strerror(28))
        write(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(tensor_file, "_write_at", full)

    def job(ranks: Parallel) -> None:
        with pytest.raises(UserError, match="rank 1: No space left"):
            Runs(ranks).read_and_save(FullCache(), file)

    ranks = on_ranks(2, tmp_path / "ranks", job)
    assert finish(ranks) == [0, 0], [rank.err.read_text() for rank in ranks]
    assert file.read_text() == "old" and {p.name for p in tmp_path.iterdir()} == {"cache", "ranks"}


def test_a_killed_rank_leaves_the_old_file(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "cache"
    argv = ["--checkpoint_path", tiny, "--prompt", "The red fox", "--max_new_tokens", 2, "--save_cache", file]

    def body(rank: int) -> None:
        generate.main([str(a) for a in argv])

    assert finish(start(2, body, tmp_path / "first")) == [0, 0]
    whole, write = file.read_bytes(), tensor_file._write_at

    def killed(*args: object) -> None:
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        write(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(tensor_file, "_write_at", killed)
    assert finish(start(2, body, tmp_path / "second"), 30) == [1, -signal.SIGKILL]
    assert file.read_bytes() == whole
    monkeypatch.undo()
    assert finish(start(2, body, tmp_path / "third")) == [0, 0]
    assert not list(tmp_path.glob(".*"))  # what the dead left has been cleared away


@pytest.mark.parametrize("tied", [False, True])
def test_shares_add_up_to_the_whole_models_fingerprint(tied: bool) -> None:
    config = Config(101, 48, 2, 8, 4, 96, 64, 64, qkv_bias=True, qk_norm=True, tied_embeddings=tied)
    whole = Checkpoint(None, "made", config)
    model = load_model(whole, CPU, torch.bfloat16, True, 7)
    want = model_fingerprint(model)
    for n_rank in (2, 4):
        shares = [Share(config, rank, n_rank) for rank in range(n_rank)]
        models = [load_model(whole.share_of(rank, n_rank), CPU, torch.bfloat16, True, 7) for rank in range(n_rank)]
        each: list[list[int]] = []

        def note(mine: list[int], each: list[list[int]] = each) -> list[list[int]]:
            each.append(mine)
            return [mine]

        for one, share in zip(models, shares, strict=True):
            model_fingerprint(one, share, note)
        assert model_fingerprint(models[0], shares[0], lambda _, each=each: each) == want
    with torch.no_grad():
        model.layers[1].feed_forward.w13.weight[5, 7] += 1  # type: ignore[union-attr,index]
    assert model_fingerprint(model) != want
