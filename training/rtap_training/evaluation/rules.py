"""Names of the stopping rules that ``rtap eval`` measures. Cheap to import: the argument parser needs them."""

CONFIDENCE, SINGLE, MODEL, VOTE, ADAPTIVE = "confidence", "single", "model", "vote", "adaptive"
RULES = (CONFIDENCE, SINGLE, MODEL, VOTE, ADAPTIVE)
# Replayed on kept samples only: the plain majority, the vote weighted by confidence, and its adaptive form.
MAJORITY, WEIGHTED, CGES = "majority", "weighted", "cges"
