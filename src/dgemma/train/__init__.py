"""Training: one objective, one loop; see objective.py for what is learnt and recipes.py for runs."""
