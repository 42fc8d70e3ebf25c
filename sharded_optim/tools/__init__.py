"""Questions about a model, a machine or a job: plan, doctor, verify, divergence."""
