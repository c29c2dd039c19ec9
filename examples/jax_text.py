"""Text from the bundled GPT-Neo, in JAX, as the documentation's Flax examples write it.

    python examples/jax_text.py "HAMLET."          or: make demo-jax
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402

from neo_jax import FlaxGPTNeoForCausalLM  # noqa: E402
from tokenizer import GPT2Tokenizer  # noqa: E402

folder = ROOT / "checkpoints" / "demo-neo"
tokenizer = GPT2Tokenizer.from_pretrained(folder)
model = FlaxGPTNeoForCausalLM.from_pretrained(folder)
inputs = tokenizer(" ".join(sys.argv[1:]) or "HAMLET.", return_tensors="np")
output = model.generate(**inputs, do_sample=True, temperature=0.8, top_p=0.9, max_new_tokens=160,
                        prng_key=jax.random.key(1))
print(tokenizer.batch_decode(output.sequences, skip_special_tokens=True)[0])
