"""From the files people have to the token records a run reads: formats, clean, splits, tokenizer, store, pipeline."""
