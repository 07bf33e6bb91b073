"""A model of transformers writes with the selective cache: python examples/transformers_generate.py MODEL [PROMPT]

MODEL: a folder that from_pretrained opens, or a model's name on the Hub.
Once, in the project's folder: pip install ".[transformers]"
"""

import sys

try:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from selective_kv.transformers import SelectiveKVCache, captured_decoding
except ModuleNotFoundError as error:
    sys.exit(f'{error.name} is not installed; in the project\'s folder: pip install ".[transformers]"')

if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
    sys.exit(__doc__)
path, prompt = sys.argv[1], " ".join(sys.argv[2:]) or "Once upon a time"
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="selective_kv", dtype="auto")
model = model.to("cuda" if torch.cuda.is_available() else "cpu")
inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)

cache = SelectiveKVCache(model.config, sink_size=16, window_size=128, v_bits=4)
with captured_decoding(model):  # on a GPU steps become CUDA graphs; on a CPU it changes nothing
    written = model.generate(**inputs, past_key_values=cache, max_new_tokens=200, do_sample=False)
print(tokenizer.decode(written[0], skip_special_tokens=True))
print("bytes by region:", cache.nbytes())
