"""Several processes on one job: which one this is, who makes what, and one set of answers for all."""
