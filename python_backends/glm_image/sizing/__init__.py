"""Memory of the stages, composed of the engines' formulas, and the report on a checkpoint."""
