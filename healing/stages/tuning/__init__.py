"""The search for the strongest healer: what can be tried, the study, one trial, its winner."""
