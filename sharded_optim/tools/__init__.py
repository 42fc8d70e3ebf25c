"""Tools that examine a model, a machine or a job: plan, doctor, verify, report, divergence."""
