"""Names of the stopping rules that ``rtap eval`` measures. Light: the command line reads them before anything else."""

CONFIDENCE, SINGLE, MODEL, VOTE, LOGPROB, YESNO = "confidence", "single", "model", "vote", "logprob", "yesno"
MAJORITY = "majority"  # plain majority recomputed from a vote run's samples
GENERATOR = "generator"  # the server with a confidence generator, where all rules run but these:
OWN_SERVER = (LOGPROB, YESNO)  # a server's kind of confidence, so each needs one of its own
RULES = (CONFIDENCE, SINGLE, MODEL, VOTE, *OWN_SERVER)
