"""lm-evaluation-harness through our caches, beside its own `hf` model on the same checkpoint and tasks.

lm-eval brings 40 packages along, so requirements-dev.txt does not: `pip install lm-eval==0.4.13` runs these tests.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, SENTENCES

if importlib.util.find_spec("lm_eval") is None:
    pytest.skip("needs pip install lm-eval==0.4.13", allow_module_level=True)

import lm_eval as harness
import tokenizers
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from common.errors import UserError
from evaluation.lm_eval import SelectiveLM
from selective_kv import FullCache, SelectiveCache

TEMPLATE = "{% for m in messages %}<|end|>{{ m['role'] }}: {{ m['content'] }}{% endfor %}<|end|>assistant:"
CHOICE = """
task: made_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
ROLLING = """
task: made_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
"""
WRITING = """
task: made_writing
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: ["e"], max_gen_toks: 12, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""
TASKS = ["made_choice", "made_rolling", "made_writing"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a byte-level tokenizer and a chat template, and three tasks with their data."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>", "<|end|>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(SENTENCES, trainer)
    model.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=400, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    network = LlamaForCausalLM(config).float().eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "norm" not in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    network.save_pretrained(folder)
    words = " ".join(SENTENCES).split()
    rows = [
        {"text": " ".join(words[n : n + 3 * n + 2]), "choices": [f" {w}" for w in words[n : n + 4]], "label": n % 4}
        for n in range(1, 9)
    ]
    rows.append(rows[-1] | {"text": " ".join((words * 3)[:150])})  # longer than a tile of 128 tokens
    (folder / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    for name, text in zip(TASKS, (CHOICE, ROLLING, WRITING), strict=True):
        (folder / f"{name}.yaml").write_text(text.format(path=folder / "rows.json"))
    return folder


def results(model: Any, folder: Path, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Scores by task, and every response by task."""
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = harness.simple_evaluate(
        model=model, tasks=TASKS, task_manager=manager, log_samples=True, bootstrap_iters=0, **options
    )
    scores = {task: {k: v for k, v in row.items() if "stderr" not in k} for task, row in found["results"].items()}
    return scores, {task: [s["resps"] for s in rows] for task, rows in found["samples"].items()}


def ours(folder: Path, **settings: Any) -> SelectiveLM:
    return SelectiveLM(str(folder), **{"device": "cpu", "dtype": "float32", "batch_size": 3} | settings)


def theirs(folder: Path) -> HFLM:
    return HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=2)


def assert_same(a: Any, b: Any) -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, float):
        assert a == pytest.approx(b, rel=1e-4)
    else:
        assert a == b


@pytest.mark.parametrize("chat", [False, True])
def test_the_full_cache_equals_hf(folder: Path, chat: bool) -> None:
    """Log-likelihoods, perplexities and texts, of every sample; texts past max_length are cut alike."""
    options = {"apply_chat_template": True} if chat else {}
    a, b = results(ours(folder), folder, **options), results(theirs(folder), folder, **options)
    assert {task: {k: v for k, v in row.items() if k != "name"} for task, row in a[0].items()}
    assert_same(a, b)
    texts = [text for ((text,),) in a[1]["made_writing"]]
    assert any(texts) and not any("e" in text for text in texts)


def test_scores_go_through_the_cache(folder: Path) -> None:
    """A cache that keeps all is the full one; a coarse one is not, and token by token gives the same."""
    full, exact = results(ours(folder), folder), results(ours(folder, cache="quantize_kv:window_size=512"), folder)
    assert_same(full, exact)
    coarse = {"cache": "quantize_kv:sink_size=0", "window_size": 1, "k_bits": 2, "v_bits": 2}
    model = ours(folder, **coarse)
    assert isinstance(model.policy, SelectiveCache) and (model.policy.sink_size, model.policy.window_size) == (0, 1)
    parallel = results(model, folder)
    sequential = results(ours(folder, sequential=True, **coarse), folder)
    rolling = [row["made_rolling"]["word_perplexity,none"] for row in (full[0], parallel[0], sequential[0])]
    assert abs(rolling[1] / rolling[2] - 1) < 0.3 * abs(rolling[0] / rolling[1] - 1)
    dropping = ours(folder, cache="compress_kv:sink_size=0,window_size=1")
    assert results(dropping, folder)[1]["made_writing"] != full[1]["made_writing"]


def test_batches_do_not_matter(folder: Path) -> None:
    one, many = (results(ours(folder, batch_size=n), folder)[1]["made_writing"] for n in (1, 8))
    assert one == many


def test_mistakes(folder: Path) -> None:
    for settings, message in (
        (dict(cache="quantise"), "no cache is called"),
        (dict(cache="quantize_kv", windows=3), "--windows is a flag of no cache"),
        (dict(batch_size="auto"), "--batch_size auto: give a number"),
        (dict(max_length=4096), "is not between 2 and the model's context of 512"),
    ):
        with pytest.raises(UserError, match=message):
            ours(folder, **settings)
    request = type("Request", (), {"args": ("the", {"until": [], "num_beams": 4})})
    with pytest.raises(UserError, match="generation_kwargs num_beams=4 is not supported"):
        ours(folder).generate_until([request])
    assert isinstance(ours(folder).policy, FullCache)


def test_the_command_line(folder: Path, tmp_path: Path) -> None:
    """As a user runs it: lm-eval's own flags, and a cache whose knobs have commas between them."""
    arguments = f"checkpoint_path={folder},cache=quantize_kv:sink_size=2,window_size=9,dtype=float32"
    command = ["scripts/lm_eval.py", "--model", "selective_kv", "--model_args", arguments, "--tasks", "made_choice"]
    result = subprocess.run(
        [sys.executable, *command, "--include_path", str(folder), "--output_path", str(tmp_path), "--device", "cpu"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    assert "made_choice" in result.stdout
    (file,) = tmp_path.rglob("results_*.json")
    assert "quantize_kv:sink_size=2,window_size=9" in file.read_text()
