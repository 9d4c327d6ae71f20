"""Names of the stopping rules that ``rtap eval`` measures. Cheap to import: the argument parser needs them."""

CONFIDENCE, SINGLE, MODEL, VOTE, LOGPROB, YESNO = "confidence", "single", "model", "vote", "logprob", "yesno"
MAJORITY = "majority"  # plain majority, recomputed from a vote run's samples
GENERATOR = "generator"  # server with a confidence generator; all rules but OWN_SERVER run on it
OWN_SERVER = (LOGPROB, YESNO)  # kinds of confidence that each need a separate server
RULES = (CONFIDENCE, SINGLE, MODEL, VOTE, *OWN_SERVER)
