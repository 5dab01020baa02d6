"""From files to the token records a run reads: formats, cleaning, splits, tokenizer, store, pipeline."""
