# SPDX-License-Identifier: Apache-2.0
"""DynSplit-KV inside Hugging Face transformers (5.x), without changes to the model.

One shot: the prefill cache goes through the service, generation goes on over what was kept.

    policy = dynsplit.policy(kept_ratio=0.2, profile="smollm2")
    with dynsplit.hf.compress(model, client, policy) as compression:
        model.generate(**inputs)
    compression.results[0].receipt

Resident: nothing is dropped; each decode step reads what the session chooses for its queries.

    policy = dynsplit.index_policy(kept_ratio=0.1, profile="smollm2")
    with dynsplit.hf.SessionCache(model, client, policy) as cache:
        model.generate(**inputs, past_key_values=cache)

On another machine than the prefill's, `cache_of` makes a cache of what it sent.

Queries are seen where the model hands them to its attention function, after RoPE, so every model
that goes through transformers' AttentionInterface will do. Prompts of a batch must be of equal
length, without padding; the prompt must be one forward (no `prefill_chunk_size`).
"""

from dynsplit.hf.kept import Compression, cache_of, compress
from dynsplit.hf.resident import SessionCache

__all__ = ["Compression", "SessionCache", "cache_of", "compress"]
