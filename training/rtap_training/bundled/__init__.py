"""The bundled demo models: tokenizer, architecture, and the recipe and pipeline that train them from scratch."""
