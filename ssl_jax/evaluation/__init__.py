"""How good a model is: likelihood, ranking, coherence, what it says; and how two of them compare."""
